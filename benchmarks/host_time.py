"""What one call costs the CPU thread that makes it: v2 and v3 beside torch's SDPA on the same shapes.

The shapes are small, so the GPU keeps up. Calls are timed in batches, too short to fill the launch
queue, with the GPU drained before each; rounds visit the contenders in random order and the median
counts. Results are freed call by call, as in a model without gradients.
"""

import argparse
import contextlib
import functools
import gc
import random
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_ext
from benchmarks import record, tables
from benchmarks.baselines import BASELINES
from benchmarks.cases import AttentionCase

CASES = (
    AttentionCase(1, 1, 256, 64, "fp16"),
    AttentionCase(2, 8, 512, 64, "bf16"),
    AttentionCase(2, 8, 512, 128, "bf16", causal=True),
    AttentionCase(1, 16, 256, 128, "fp16", causal=True, layout="bshd"),
)
BATCH = 32
ROUNDS = 200
WARM_UP_ROUNDS = 3


def _sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _v2(q, k, v, causal):
    return flash_ext.flash_attention(q, k, v, causal=causal, algorithm="v2")


def _v3(q, k, v, causal):
    return flash_ext.flash_attention(q, k, v, causal=causal, algorithm="v3")


# Plain calls, as users write them; a backend of SDPA is chosen outside of the timed batch.
CONTENDERS = {
    "flash_ext_v2": (_v2, contextlib.nullcontext),
    "flash_ext_v3": (_v3, contextlib.nullcontext),
    "sdpa": (_sdpa, contextlib.nullcontext),
    "sdpa_flash": (_sdpa, functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
}


def measure(case, with_grad, device, rounds):
    """Median microseconds per call of each contender."""
    q, k, v, _ = case.make_inputs(device)
    if with_grad:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    order = [x for x in CONTENDERS.items() if BASELINES[x[0]].refusal(case, "forward", device) is None]
    times = {name: [] for name, _ in order}
    shuffle = random.Random(0).shuffle
    for round_idx in range(WARM_UP_ROUNDS + rounds):
        shuffle(order)
        for name, (attention, backend) in order:
            with backend():
                elapsed = _batch_time(attention, q, k, v, case.causal)
            if round_idx >= WARM_UP_ROUNDS:
                times[name].append(1e6 * elapsed / BATCH)
    return {name: statistics.median(values) for name, values in times.items()}


def _batch_time(attention, q, k, v, causal):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(BATCH):
        attention(q, k, v, causal)
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    record.add_output_option(parser)
    options = parser.parse_args()
    device, screen = record.default_device(), tables.console()
    if device.type != "cuda":
        screen.print("Host time is measured beside a GPU that does the work: nothing to measure here.")
        return 1

    rows = []
    gc.disable()
    for case in CASES:
        for with_grad in (False, True):
            medians = measure(case, with_grad, device, options.rounds)
            shape = case.record() | {"grad": with_grad}
            rows += [shape | {"impl": name, "us": us} for name, us in medians.items()]
            cells = "".join(f"  {tables.LABELS[name]} {us:6.2f} us" for name, us in medians.items())
            screen.print(f"{case.label():<27}{'grad' if with_grad else '':<5}{cells}", highlight=False)
    payload = {"calls_per_batch": BATCH, "rows": rows}
    path = record.write_results("host_time", device, payload, options.output_dir)
    screen.print(f"\nresults: {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
