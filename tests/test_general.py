"""Masks, biases, windows, soft cap, sinks, dropout, packed sequences and block sparsity, each alone and mixed."""

import math
import random

import pytest
import torch
from calls import CPU_ALGORITHMS, assert_same_bits, bits, fastest
from general_cases import FEATURES, GRADIENTS, call, check_call, draw_features, on, on_device, random_case
from inputs import Shape, make_qkv, make_qkv_dout

import flash_ext
from flash_ext import attention_reference, flash_attention
from flash_ext.philox import dropout_factor, philox4x32_7

NAN = math.nan


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_feature_alone(device, algorithm, feature, seed):
    tensors, options = random_case(seed, [feature], device)
    check_call(*tensors, **(options | {"algorithm": algorithm}))


@pytest.mark.parametrize("feature", [*FEATURES, "all"])
@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_gradcheck(algorithm, feature):
    shape = Shape(2, 4, 2, 5, 6, 3)
    names = ["float_mask", "window", "alibi", "softcap", "sinks", "dropout"] if feature == "all" else [feature]
    features = draw_features(random.Random(feature), shape, torch.float64, names)
    wanted = [name for name in ("attn_mask", "alibi_slopes", "sinks") if name in features]
    wanted = [name for name in wanted if features[name].is_floating_point()]
    if "attn_mask" in wanted:
        features["attn_mask"] = features["attn_mask"].nan_to_num(neginf=-2.0)
    leaves = [*make_qkv(shape, torch.float64, "cpu"), *(features[name].double() for name in wanted)]

    def function(q, k, v, *biases):
        given = features | dict(zip(wanted, biases, strict=True))
        out, lse = call(q, k, v, given, algorithm=algorithm, tile=(2, 3))
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves], rtol=1e-6, atol=1e-8)


# ---- dropout -------------------------------------------------------------------------------------


def test_philox_known_answers():
    """From the test vectors of Random123."""
    for key, counter, answer in (
        (0, (0,) * 4, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (-1, (0xFFFFFFFF,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ):
        words = philox4x32_7(key, tuple(torch.tensor(x) for x in counter))
        assert tuple(int(x) for x in words) == answer


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.97])
def test_dropout_statistics(p):
    """Rates of all elements, rows, columns and neighbouring pairs, in standard deviations."""
    n = 512
    kept = dropout_factor(p, torch.tensor([5, 7]), 2, 3, range(n), n) > 0
    dropped = (~kept).double() - p

    def deviations(x, count):
        return (x / (count * p * (1 - p)) ** 0.5).abs().max().item()

    assert deviations(dropped.sum(), dropped.numel()) < 5
    assert deviations(dropped.sum(-1), n) < 7 + 1 / (n * p) ** 0.5 * 20
    assert deviations(dropped.sum(-2), n) < 7 + 1 / (n * p) ** 0.5 * 20
    for shift in (1, 8, 16, 32):
        for dim in (1, 2, 3):
            pairs = (dropped * dropped.roll(shift, dim)).sum() / (p * (1 - p))
            assert abs(pairs.item()) / dropped.numel() ** 0.5 < 5, (shift, dim)


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_dropout_is_exactly_the_replayed_mask(device, algorithm):
    """With V the identity, out is the dropped softmax itself, zeros and all."""
    n = 100
    q, k = torch.randn(2, 2, 3, n, n, device=device)
    rng_state = torch.tensor([123456789012345, 6], device=device)
    identity = torch.eye(n, device=device).expand(2, 3, n, n)
    out = flash_attention(q, k, identity, dropout_p=0.3, rng_state=rng_state, algorithm=algorithm)
    factor = dropout_factor(0.3, rng_state, 2, 3, range(n), n)
    assert torch.equal(out == 0, factor == 0)
    torch.testing.assert_close(out, (torch.softmax(q @ k.mT / n**0.5, -1) * factor).float())


def test_dropout_seeds_and_limits():
    q, k, v = make_qkv(Shape(), torch.float32, "cpu")
    torch.manual_seed(1)
    first, second = (flash_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, flash_attention(q, k, v, dropout_p=0.5))
    assert flash_attention(q, k, v, dropout_p=1.0).abs().max() == 0
    assert torch.equal(flash_attention(q, k, v, dropout_p=0.0), flash_attention(q, k, v))


# ---- lengths -------------------------------------------------------------------------------------

# The bits are those of one kernel, and plain attention has others.
ALWAYS_GENERAL = {"window": (-1, -1)}
LENGTHS_Q, LENGTHS_K = (17, 0, 40, 5), (30, 12, 0, 33)


def packed_inputs(fill, device, gap=3):
    """q, k, v, dout of four sequences between rows of `fill`, and the arguments."""
    cu_q, cu_k = ([gap + sum(lengths[:i]) for i in range(5)] for lengths in (LENGTHS_Q, LENGTHS_K))
    tensors = []
    for heads, cu in ((4, cu_q), (2, cu_k), (2, cu_k), (4, cu_q)):
        torch.manual_seed(heads + len(tensors))
        x = torch.full((cu[-1] + gap, heads, 16), fill)
        x[cu[0] : cu[-1]] = torch.randn(cu[-1] - cu[0], heads, 16)
        tensors.append(x)
    lengths = {
        "cu_seqlens_q": i32(*cu_q), "cu_seqlens_k": i32(*cu_k), "max_seqlen_q": 40, "max_seqlen_k": 33,
    }  # fmt: skip
    return on(device, *tensors), on_device(lengths, device)


def run(q, k, v, dout, **options):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = flash_attention(*leaves, return_lse=True, **options)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (6, 4), "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_packed_sequences_have_the_bits_of_each_alone(device, algorithm, options):
    """And rows of no sequence have out 0, lse -inf and gradients 0, whatever NaN is there."""
    (q, k, v, dout), lengths = packed_inputs(NAN, device)
    options = ALWAYS_GENERAL | options | {"algorithm": algorithm}
    results = run(q, k, v, dout, **lengths, **options)
    owned_q, owned_k = (torch.zeros(len(x), dtype=torch.bool, device=device) for x in (q, k))
    cu_q, cu_k = lengths["cu_seqlens_q"], lengths["cu_seqlens_k"]
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        owned_q[q0:q1], owned_k[k0:k1] = True, True
        rows = (slice(q0, q1), slice(k0, k1), slice(k0, k1), slice(q0, q1))
        alone = [x[r].transpose(0, 1)[None] for x, r in zip((q, k, v, dout), rows, strict=True)]
        expected = run(*alone, **options)
        actual = [results[0][q0:q1], results[1][:, q0:q1], results[2][q0:q1], results[3][k0:k1], results[4][k0:k1]]
        actual = [x[None] if i == 1 else x.transpose(0, 1)[None] for i, x in enumerate(actual)]
        assert_same_bits(actual, expected, f"sequence {int(q0)}")
    assert not results[0][~owned_q].any()
    assert (results[1][:, ~owned_q] == -math.inf).all()
    assert not results[2][~owned_q].any()
    assert not results[3][~owned_k].any()
    assert not results[4][~owned_k].any()


@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_padding_is_never_read(device, algorithm, causal):
    """Each batch entry has the bits of a call with its own keys alone, though the others are NaN."""
    q, k, v, dout = make_qkv_dout(Shape(3, 4, 2, 20, 70, 16), torch.float32, device)
    options = ALWAYS_GENERAL | {"causal": causal, "algorithm": algorithm}
    lengths = (0, 33, 70)
    for x in (k, v):
        for b, n in enumerate(lengths):
            x[b, :, n:] = NAN
    results = run(q, k, v, dout, seqlens_k=i32(*lengths).to(device), **options)
    for b, n in enumerate(lengths):
        own = [q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], dout[b : b + 1]]
        expected = run(*own, **options)
        actual = [x[b : b + 1] for x in results]
        assert not actual[3][:, :, n:].any()
        assert not actual[4][:, :, n:].any()
        assert_same_bits([*actual[:3], actual[3][:, :, :n], actual[4][:, :, :n]], expected, f"entry {b}")


MALFORMED = (
    (0, 10, 5, 20, 30), (-7, 10, 20, 30, 40), (0, 10, 20, 30, 10**9), (2**31 - 1, -(2**31), 0, 5, 3),
    (50, 40, 30, 20, 10), (0, 0, 0, 0, 2**31 - 1),
)  # fmt: skip


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k", "seqlens_k"])
@pytest.mark.parametrize("lengths", MALFORMED, ids=str)
def test_malformed_lengths(device, lengths, which):
    """They read and write nothing outside the tensors (NaN around k and v would show), and can be found out."""
    (q, k, v, dout), good = packed_inputs(0.0, device)
    fenced = []
    for x in (q, k, v, dout):
        fence = torch.full((len(x) + 200, *x.shape[1:]), NAN, device=device)
        fence[100:-100] = x
        fenced.append(fence[100:-100])
    bad = good | {which: i32(*(lengths[1:] if which == "seqlens_k" else lengths)).to(device)}
    for result in run(*fenced, **bad):
        assert not result.isnan().any()
    with pytest.raises(RuntimeError, match=rf"{which} must .*got"):
        flash_attention(q, k, v, validate=True, **bad)
    begin_at_0 = good | {"cu_seqlens_q": good["cu_seqlens_q"] - 3, "cu_seqlens_k": good["cu_seqlens_k"] - 3}
    flash_attention(q, k, v, validate=True, **begin_at_0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("softcap", [0.0, 0.5, 30.0])
def test_nan_behind_the_diagonal_stays_there(device, softcap, head_dim):
    """Also where scores are near a soft cap: queries before a key that is NaN have the bits they had."""
    q, k, v = make_qkv(Shape(1, 2, 2, 300, 300, head_dim), torch.bfloat16, device)
    options = {"causal": True, "softcap": softcap, "window": (250, -1), "return_lse": True}
    expected = flash_attention(q, k, v, **options)
    k[:, :, 201] = NAN
    out, lse = flash_attention(q, k, v, **options)
    assert_same_bits((out[:, :, :201], lse[:, :, :201]), [x[:, :, :201] for x in expected], "rows before")
    assert out[:, :, 201:].isnan().all()


# ---- refusals ------------------------------------------------------------------------------------

REFUSED = {
    "mask-shape": ({"attn_mask": torch.zeros(2, 4, 9, 12)}, r"attn_mask must have shape.*got \[2, 4, 9, 12\]"),
    "mask-dtype": ({"attn_mask": torch.zeros(10, 12, dtype=torch.int32)}, r"attn_mask must have dtype.*got Int"),
    "mask-device": ({"attn_mask": torch.zeros(10, 12, device="meta")}, r"attn_mask must be on cpu.*got meta"),
    "window": ({"window": (-2, 0)}, r"window must.*-2"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes must have shape.*4 heads.*got \[3\]"),
    "sinks": ({"sinks": torch.zeros(2, 4)}, r"sinks must have shape.*got \[2, 4\]"),
    "softcap": ({"softcap": -1.0}, r"softcap must.*got -1"),
    "softcap-inf": ({"softcap": math.inf}, r"softcap must.*got inf"),
    "dropout": ({"dropout_p": 1.5}, r"dropout_p must be 0 to 1, got 1.5"),
    "rng": ({"dropout_p": 0.5, "rng_state": torch.zeros(3, dtype=torch.int64)}, r"rng_state must.*got.*3"),
    "seqlens-dtype": ({"seqlens_k": torch.zeros(2, dtype=torch.int64)}, r"seqlens_k must have dtype Int, got Long"),
    "seqlens-shape": ({"seqlens_k": i32(1, 2, 3)}, r"seqlens_k must have shape \[2\], got \[3\]"),
    "cu-alone": ({"cu_seqlens_q": i32(0, 4)}, r"cu_seqlens_q and cu_seqlens_k must be given together.*alone"),
    "max-alone": ({"max_seqlen_q": 4}, r"max_seqlen_q must be given with cu_seqlens_q"),
    "cu-rank": (
        {"cu_seqlens_q": i32(0, 4), "cu_seqlens_k": i32(0, 4), "max_seqlen_q": 4, "max_seqlen_k": 4},
        r"q must have 3 dimensions \(total, heads, head_dim\).*got 4",
    ),
    "block-size": ({"block_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "block_size": 32}, r"block_size must.*32"),
    "block-shape": ({"block_mask": torch.ones(1, 1, 2, 1, dtype=torch.bool)}, r"block_mask must.*got \[1, 1, 2, 1\]"),
    "block-dtype": ({"block_mask": torch.ones(1, 1, 1, 1)}, r"block_mask must have dtype Bool, got Float"),
    "v3": ({"softcap": 1.0, "algorithm": "v3"}, r"algorithm 'v3' needs a GPU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    arguments, message = REFUSED[case]
    q, k, v = make_qkv(Shape(2, 4, 2, 10, 12, 16), torch.bfloat16, "cpu")
    with pytest.raises((RuntimeError, ValueError), match=message):
        flash_attention(q, k, v, **arguments)
    with pytest.raises((RuntimeError, ValueError)):
        flash_ext.explain(q, k, v, **arguments)


# ---- the package around it -----------------------------------------------------------------------


def test_explain(device):
    q, k, v = make_qkv(Shape(2, 4, 2, 100, 120, 64), torch.bfloat16, device)
    explanation = flash_ext.explain(q, k, v, softcap=30.0, window=(10, 0), causal=True)
    if device == "cpu":
        assert explanation.algorithm == explanation.backward == "v2"
    else:
        lengths = torch.tensor([100, 120], dtype=torch.int32, device=device)
        explanation = flash_ext.explain(q, k, v, seqlens_k=lengths)
        assert explanation.algorithm == explanation.backward == fastest(device=device)
        assert explanation.num_thread_blocks > 0


def test_masks_are_taken_where_they_lie(device):
    """Any strides, expanded or transposed, and lower ranks: the same bits as a dense copy."""
    q, k, v = make_qkv(Shape(2, 4, 2, 10, 12, 16), torch.float32, device)
    transposed = torch.randn(2, 4, 12, 10, device=device).mT
    expanded = torch.randn(2, 1, 1, 12, device=device).expand(2, 4, 10, 12)
    for mask in (transposed, expanded, transposed[0, 0], transposed[0], expanded[:, :1, :1] > 0):
        dense = mask.expand(2, 4, 10, 12).contiguous()
        same = [flash_attention(q, k, v, attn_mask=x) for x in (mask, dense)]
        assert torch.equal(bits(same[0]), bits(same[1]))


def test_three_dimensions():
    q, k, v = make_qkv(Shape(2, 1, 1, 10, 12, 16), torch.float32, "cpu")
    mask = torch.randn(2, 10, 12)
    out = flash_attention(q[:, 0], k[:, 0], v[:, 0], attn_mask=mask, window=(3, 3))
    assert torch.equal(out, flash_attention(q, k, v, attn_mask=mask[:, None], window=(3, 3))[:, 0])


def test_a_sink_alone_is_all_of_a_row(device):
    """A row that sees no key has lse = sink, and all of lse's gradient goes to the sink."""
    q, k, v = make_qkv(Shape(1, 2, 2, 3, 4, 8), torch.float32, device)
    sinks = torch.tensor([0.5, -3.0], device=device, requires_grad=True)
    hidden = torch.zeros(3, 4, dtype=torch.bool, device=device)
    out, lse = flash_attention(q, k, v, attn_mask=hidden, sinks=sinks, return_lse=True)
    assert not out.any()
    assert torch.equal(lse, sinks.detach()[None, :, None].expand(1, 2, 3))
    assert torch.equal(torch.autograd.grad(lse.sum(), sinks)[0], torch.tensor([3.0, 3.0], device=device))


def test_opcheck_and_compile():
    shape = Shape(1, 4, 2, 10, 12, 8)
    q, k, v = (x.requires_grad_() for x in make_qkv(shape, torch.float32, "cpu"))
    mask, sinks = torch.randn(1, 1, 10, 12, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.library.opcheck(
        torch.ops.flash_ext.general_forward.default, (q, k, v, mask, None, sinks), {"window": (3, 2), "softcap": 3.0}
    )

    def function(q, k, v, mask, sinks):
        return flash_attention(q, k, v, attn_mask=mask, sinks=sinks, window=(4, 1), causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = (q, k, v, mask, sinks)
    for actual, expected in zip(
        torch.autograd.grad(compiled(*inputs).sum(), inputs),
        torch.autograd.grad(function(*inputs).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_autocast():
    q, k, v = make_qkv(Shape(), torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attention(q, k, v, attn_mask=torch.randn(40, 40), sinks=torch.randn(2))
    assert out.dtype == torch.bfloat16


def test_block_mask_from_flex():
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    dense = torch.rand(1, 2, 3, 4) < 0.5
    counts = dense.sum(-1, dtype=torch.int32)
    order = torch.argsort(dense.int(), dim=-1, descending=True, stable=True).int()
    flex = BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=64, seq_lengths=(190, 256))
    converted = flash_ext.block_mask_from_flex(flex)
    assert converted["block_size"] == 64
    assert torch.equal(converted["block_mask"], dense)
    causal = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 256, 256, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(ValueError, match="whole blocks only.*got 4 partial"):
        flash_ext.block_mask_from_flex(causal)
    q, k, v = make_qkv(Shape(1, 2, 2, 256, 256, 16), torch.float32, "cpu")
    blocks = flash_ext.block_mask_from_flex(causal, ignore_mask_mod=True)
    out = flash_attention(q, k, v, causal=True, **blocks)
    torch.testing.assert_close(out, attention_reference(q, k, v, causal=True)[0].float())


def test_only_wanted_gradients_are_computed(device):
    q, k, v, dout = make_qkv_dout(Shape(1, 2, 2, 9, 9, 8), torch.float32, device)
    mask = torch.randn(1, 2, 9, 9, device=device)
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, mask)
    everything = torch.ops.flash_ext.general_backward(dout, q, k, v, out, lse, None, mask)
    for i, name in enumerate(GRADIENTS[:4]):
        needs = [j == i for j in range(6)]
        alone = torch.ops.flash_ext.general_backward(dout, q, k, v, out, lse, None, mask, needs=needs)
        assert torch.equal(alone[i], everything[i]), name
        assert all(x.numel() == 0 for j, x in enumerate(alone) if j != i)


@pytest.mark.parametrize("mask_shape", [(3, 4, 150, 130), (1, 4, 150, 130), (3, 1, 1, 130), (1, 1, 150, 1)], ids=str)
def test_bias_gradients_repeat_to_the_bit(device, mask_shape):
    """When asked to, also where an element of the mask is a sum over batch entries, heads, rows or keys."""
    q, k, v, dout = make_qkv_dout(Shape(3, 4, 2, 150, 130, 64), torch.bfloat16, device)
    biases = [torch.randn(mask_shape, device=device), torch.rand(4, device=device), torch.randn(4, device=device)]
    rng_state = torch.tensor([3, 4], device=device)

    def gradients():
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *biases)]
        out = flash_attention(
            *leaves[:3], attn_mask=leaves[3], alibi_slopes=leaves[4], sinks=leaves[5], dropout_p=0.2,
            rng_state=rng_state, deterministic=True,
        )  # fmt: skip
        return torch.autograd.grad(out, leaves, dout)

    first = gradients()
    for _ in range(5):
        assert_same_bits(gradients(), first, "gradients", GRADIENTS)
