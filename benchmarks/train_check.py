"""Does a model train with flash_ext as it does with exact attention? (`make train-check`)

A small GPT learns a made-up language, each time from the same initial weights and the same batches, with
one attention after the other. All matrix products are bf16, as autocast makes them; the baseline's
attention alone is computed in fp64 (SDPA's math backend) and its result rounded to bf16.

Two trainings drift apart whatever makes them differ first. How far is what the baseline shows when it is
repeated from initial weights nudged by less than one rounding to bf16: the noise is the largest distance
between any two of these curves, smoothed over WINDOW steps. flash_ext passes if its curve is never
farther than ALLOWED_NOISE times the noise from the baseline's, and if the model has learnt. Writes
train_check.json and a plot; the exit code is 1 if it does not pass.
"""

import argparse
import itertools
import math
import random
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_ext
from benchmarks import record, tables
from benchmarks.plots import plot_training

LAYERS, WIDTH, HEAD_DIM = 4, 256, 64
# (batch, seqlen) of a step. A CPU would need an hour for what a GPU does in a minute.
BATCH = {"cuda": (16, 512), "cpu": (4, 128)}
STEPS = 300
WARM_UP_STEPS, PEAK_RATE = 30, 1e-3
SEED = 0
NUDGED_RUNS = 3
NUDGE = 2.0**-9  # of a weight; bf16 rounds it by up to 2^-8
WINDOW = 20
ALLOWED_NOISE = 2.0

BASELINE = "fp64"


# ---- the language ----------------------------------------------------------------------------------


def make_text(length, seed):
    """Lines of a toy program: "let" binds a name to a number, "get" recalls it, "sum" adds two digits.

    Words and digits are soon learnt from their neighbours; what follows "get" takes a look back, through
    attention, at the line that bound the name.
    """
    rng, bound, lines, written = random.Random(seed), {}, [], 0
    while written < length:
        kind = rng.choice(("let", "get", "get", "sum")) if bound else "let"
        if kind == "let":
            name = rng.choice("abcdefgh")
            bound[name] = rng.randint(10, 99)
        elif kind == "get":
            name = rng.choice(sorted(bound))
        first, second = rng.randint(0, 9), rng.randint(0, 9)
        lines.append(f"sum {first} {second} {first + second}\n" if kind == "sum" else f"{kind} {name} {bound[name]}\n")
        written += len(lines[-1])
    return "".join(lines)[:length]


def make_batches(steps, batch, seqlen):
    """(vocabulary size, token ids of each step: (steps, batch, seqlen + 1))."""
    text = make_text(1 << 18, SEED)
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(letter) for letter in text])
    generator = torch.Generator().manual_seed(SEED)
    begins = torch.randint(len(tokens) - seqlen, (steps, batch, 1), generator=generator)
    return len(alphabet), tokens[begins + torch.arange(seqlen + 1)]


# ---- the attentions --------------------------------------------------------------------------------


def attend_in_fp64(q, k, v):
    with torch.autocast(q.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    return out.to(q.dtype)


def attend_with_flash_ext(q, k, v):
    return flash_ext.flash_attention(q, k, v, causal=True)


def attend_with_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# ---- the model -------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, WIDTH // HEAD_DIM, HEAD_DIM))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each a view (batch, heads, seqlen, head_dim)
        x = x + self.project(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Gpt(nn.Module):
    def __init__(self, vocabulary, seqlen, attend):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(seqlen, WIDTH)
        self.blocks = nn.Sequential(*(Block(attend) for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens):
        return self.head(self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]))


def nudge(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + NUDGE * (2 * torch.rand(parameter.shape, generator=generator) - 1)


def train(attend, vocabulary, batches, device, nudge_seed=None):
    """The loss of every step, in nats."""
    torch.manual_seed(SEED)
    steps, seqlen = batches.shape[0], batches.shape[2] - 1
    model = Gpt(vocabulary, seqlen, attend)
    if nudge_seed is not None:
        nudge(model, nudge_seed)
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95))

    def rate(step):
        return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for tokens in batches.to(device):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


# ---- the verdict -----------------------------------------------------------------------------------


def smoothed(losses):
    """Means over WINDOW steps, or over half of them where there are fewer than two windows."""
    window = min(WINDOW, len(losses) // 2)
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(1)


def distance(a, b):
    """How far two curves are apart where they are farthest, after smoothing."""
    return (smoothed(a) - smoothed(b)).abs().max().item()


def judge(curves):
    """What the rule says of curves by name: BASELINE, its nudged repetitions, and what is compared with it."""
    nudged = [name for name in curves if name.startswith(f"{BASELINE},")]
    pairs = itertools.combinations([BASELINE, *nudged], 2)
    noise = max(distance(curves[a], curves[b]) for a, b in pairs)
    others = [name for name in curves if name not in (BASELINE, *nudged)]
    distances = {name: distance(curves[name], curves[BASELINE]) for name in others}
    final = {name: smoothed(losses)[-1].item() for name, losses in curves.items()}
    has_learnt = final[BASELINE] < 0.6 * curves[BASELINE][0]
    return {
        "noise": noise,
        "distances": distances,
        "allowed": ALLOWED_NOISE * noise,
        "final_losses": final,
        "has_learnt": has_learnt,
        # `<=`: NaN fails.
        "passed": has_learnt and distances["flash_ext"] <= ALLOWED_NOISE * noise,
    }


def train_all(device, steps, batch, seqlen, screen):
    """Name -> the losses of a training with one attention."""
    vocabulary, batches = make_batches(steps, batch, seqlen)
    runs = {"flash_ext": (attend_with_flash_ext, None), BASELINE: (attend_in_fp64, None)}
    runs |= {f"{BASELINE}, nudged {i}": (attend_in_fp64, i) for i in range(1, NUDGED_RUNS + 1)}
    runs["SDPA"] = (attend_with_sdpa, None)
    curves = {}
    for name, (attend, nudge_seed) in runs.items():
        begin = time.monotonic()
        curves[name] = losses = train(attend, vocabulary, batches, device, nudge_seed)
        seconds = time.monotonic() - begin
        screen.print(f"{name:<16} loss {losses[0]:.3f} -> {losses[-1]:.3f}, {seconds:.1f} s", highlight=False)
    return curves


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--seqlen", type=int)
    record.add_output_option(parser)
    options = parser.parse_args()
    device, screen = record.default_device(), tables.console()
    batch, seqlen = BATCH[device.type]
    batch, seqlen = options.batch or batch, options.seqlen or seqlen

    curves = train_all(device, options.steps, batch, seqlen, screen)
    verdict = judge(curves)
    payload = {"steps": options.steps, "batch": batch, "seqlen": seqlen, "window": WINDOW, **verdict, "curves": curves}
    path = record.write_results("train_check", device, payload, options.output_dir)
    differences = {name: (smoothed(x) - smoothed(curves[BASELINE])).tolist() for name, x in curves.items()}
    picture = plot_training(
        *(curves, differences, verdict["allowed"], path.with_suffix(".png")),
        "Training beside exact attention",
        f"{record.device_name(device)}; GPT of {LAYERS} layers of {WIDTH}, {batch} x {seqlen} letters a step, bf16",
    )
    for name, found in verdict["distances"].items():
        screen.print(f"{name} is at most {found:.4f} nats from {BASELINE}, the noise is {verdict['noise']:.4f}")
    screen.print("passed" if verdict["passed"] else "FAILED", style="green" if verdict["passed"] else "bold red")
    screen.print(f"\nresults: {path}\nplot:    {picture}", highlight=False)
    return 0 if verdict["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
