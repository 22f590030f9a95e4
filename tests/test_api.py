"""What is refused, and how: the message names operator, argument, rule and value. Nothing is silent."""

import math
import re

import pytest
import torch
from calls import ALGORITHMS, backward, fastest, forward
from inputs import Shape, make_qkv, make_qkv_dout
from numerics import check_forward

import flash_ext

BF16 = torch.bfloat16
ERRORS = (RuntimeError, ValueError, TypeError)


def refuse(call, *parts):
    """`call` raises, its message holds every part, and a good call afterwards works."""
    with pytest.raises(ERRORS) as caught:
        call()
    message = str(caught.value).split("\nException raised from")[0]
    for part in parts:
        assert re.search(part, message), f"{part!r} is missing in {message!r}"
    q, k, v = make_qkv(Shape(), torch.float32, "cpu")
    check_forward(*forward(q, k, v), q, k, v)


def tensors(device, dtype=BF16, **changes):
    return dict(zip("qkv", make_qkv(Shape(2, 4, 2, 10, 12, 16).with_(**changes), dtype, device), strict=True))


# Each case: what is wrong, how it is made from good inputs, and what the message must say.
WRONG_TENSORS = {
    "q-rank-2": ("q", lambda x: x[0, 0], r"4 dimensions.*got 2"),
    "k-rank-3": ("k", lambda x: x[0], r"4 dimensions.*got 3"),
    "v-rank-5": ("v", lambda x: x[None], r"4 dimensions.*got 5"),
    "q-int": ("q", lambda x: x.int(), r"float16.*got Int"),
    "q-fp8": ("q", lambda x: x.to(torch.float8_e4m3fn), r"float16.*got Float8"),
    "q-complex": ("q", lambda x: x.to(torch.complex64), r"float16.*got Complex"),
    "k-dtype": ("k", lambda x: x.half(), r"dtype.*BFloat16.*like q.*got Half"),
    "v-dtype": ("v", lambda x: x.float(), r"dtype.*BFloat16.*like q.*got Float"),
    "k-device": ("k", lambda x: x.to("meta"), r"on (cpu|cuda:0).*got meta"),
    "v-device": ("v", lambda x: x.to("meta"), r"on (cpu|cuda:0).*got meta"),
    "k-batch": ("k", lambda x: x[:1], r"batch 2 like q.*got 1"),
    "v-batch": ("v", lambda x: x.repeat(2, 1, 1, 1), r"batch 2 like q.*got 4"),
    "k-head-dim": ("k", lambda x: x[..., :8], r"head_dim 16 like q.*got 8"),
    "v-head-dim": ("v", lambda x: x.repeat(1, 1, 1, 2), r"head_dim 16 like q.*got 32"),
    "v-heads": ("v", lambda x: x[:, :1], r"heads 2 like k.*got 1"),
    "v-seqlen": ("v", lambda x: x[:, :, :5], r"seqlen 12 like k.*got 5"),
    "q-strided": ("q", lambda x: x.repeat(1, 1, 1, 2)[..., ::2], r"stride 1.*got stride 2"),
    "k-strided": ("k", lambda x: x.mT.contiguous().mT, r"stride 1.*got stride 12"),
    "v-strided": ("v", lambda x: x[..., :1].expand(-1, -1, -1, 16), r"stride 1.*got stride 0"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensor(device, case):
    name, spoil, rule = WRONG_TENSORS[case]
    inputs = tensors(device)
    inputs[name] = spoil(inputs[name])
    refuse(lambda: torch.ops.flash_ext.forward(**inputs), rf"flash_ext\.forward: {name} must", rule)


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensor_through_the_interface(device, case):
    name, spoil, _ = WRONG_TENSORS[case]
    inputs = tensors(device)
    inputs[name] = spoil(inputs[name])
    if case != "k-rank-3":
        refuse(lambda: flash_ext.flash_attention(**inputs), rf"\b{name}\b", "got")
    with pytest.raises(ERRORS, match=r"got"):
        flash_ext.explain(**inputs)


@pytest.mark.parametrize("heads", [(4, 3), (2, 4), (4, 0), (5, 2)], ids="h{0[0]}-{0[1]}".format)
def test_heads_that_do_not_divide(device, heads):
    inputs = tensors(device, heads=heads[0], heads_kv=heads[1])
    refuse(lambda: torch.ops.flash_ext.forward(**inputs), rf"k must.*divides q's {heads[0]}, got {heads[1]}")


@pytest.mark.parametrize("head_dim", [0, 257, 512])
def test_head_dim_out_of_range(device, head_dim):
    inputs = tensors(device, head_dim=head_dim)
    refuse(lambda: torch.ops.flash_ext.forward(**inputs), rf"q must have head_dim 1 to 256, got {head_dim}")


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scale_that_is_not_finite(device, scale):
    q, k, v, dout = make_qkv_dout(Shape(), BF16, device)
    out, lse = forward(q, k, v)
    rule = r"scale must be finite, got -?(nan|inf)"
    refuse(lambda: forward(q, k, v, scale=scale), rule)
    refuse(lambda: backward(dout, q, k, v, out, lse, scale=scale), rule)
    refuse(lambda: flash_ext.flash_attention(q, k, v, scale=scale), rule)
    refuse(lambda: flash_ext.explain(q, k, v, scale=scale), rule)


@pytest.mark.parametrize("causal", ["upper", "", None, 2, "none "], ids=repr)
def test_unknown_causal(device, causal):
    q, k, v = make_qkv(Shape(), BF16, device)
    refuse(lambda: flash_ext.flash_attention(q, k, v, causal=causal), rf"causal must.*got {causal!r}")
    refuse(lambda: flash_ext.explain(q, k, v, causal=causal), rf"causal must.*got {causal!r}")
    if isinstance(causal, str):
        refuse(lambda: forward(q, k, v, causal=causal), rf"causal must.*got '{causal}'")


@pytest.mark.parametrize("algorithm", ["v0", "V2", "", "flash"])
def test_unknown_algorithm(device, algorithm):
    q, k, v = make_qkv(Shape(), BF16, device)
    refuse(lambda: flash_ext.flash_attention(q, k, v, algorithm=algorithm), rf"algorithm must.*got '{algorithm}'")
    refuse(lambda: flash_ext.explain(q, k, v, algorithm=algorithm), rf"algorithm must.*got '{algorithm}'")


@pytest.mark.parametrize("tile", [(0, 16), (16, -1)], ids=str)
def test_impossible_tile(tile):
    q, k, v, dout = make_qkv_dout(Shape(), BF16, "cpu")
    out, lse = forward(q, k, v)
    refuse(lambda: forward(q, k, v, tile=tile), r"tile must be two positive", str(tile[0]))
    refuse(lambda: backward(dout, q, k, v, out, lse, tile=tile), r"tile must be two positive")


@pytest.mark.gpus(1)
def test_tile_and_fp64_are_for_the_cpu():
    q, k, v = make_qkv(Shape(), BF16, "cuda")
    refuse(lambda: forward(q, k, v, tile=(16, 16)), r"tile must not be given for CUDA")
    refuse(lambda: forward(q.double(), k.double(), v.double()), r"float64 on the CPU only.*got Double")


@pytest.mark.gpus(1)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_F42_inputs_on_two_devices(name):
    inputs = tensors("cuda")
    inputs[name] = inputs[name].cpu()
    refuse(lambda: torch.ops.flash_ext.forward(**inputs), r"must be on", r"like q", r"got")


def test_three_and_four_dimensions_mixed(device):
    q, k, v = make_qkv(Shape(2, 1, 1), BF16, device)
    refuse(lambda: flash_ext.flash_attention(q[:, 0], k, v), r"k and v must have 3 dimensions like q, got 4")
    refuse(lambda: flash_ext.flash_attention(q, k[:, 0], v), r"k must have 4 dimensions.*got 3")
    refuse(lambda: flash_ext.flash_attention(q[0, 0], k, v), r"q must have 4 dimensions.*got 2")


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_not_a_tensor(device, argument):
    inputs = tensors(device) | {argument: None}
    with pytest.raises((*ERRORS, AttributeError)):
        flash_ext.flash_attention(**inputs)


@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_other_kinds_of_tensors(device, kind):
    inputs = tensors(device, torch.float32)
    if kind == "sparse":
        inputs["q"] = inputs["q"].to_sparse()
    else:
        inputs = {name: torch.nested.nested_tensor(list(x), layout=torch.jagged) for name, x in inputs.items()}
    refuse(lambda: torch.ops.flash_ext.forward(**inputs), "flash_ext")


WRONG_BACKWARD = {
    "dout-shape": ("dout", lambda x: x[:, :1], r"dout must have shape.*\[1, 2, 40, 32\].*got \[1, 1, 40, 32\]"),
    "dout-dtype": ("dout", lambda x: x.half(), r"dout must have dtype.*BFloat16.*got Half"),
    "dout-device": ("dout", lambda x: x.to("meta"), r"dout must be on.*got meta"),
    "dout-rank": ("dout", lambda x: x[0], r"dout must have"),
    "out-shape": ("out", lambda x: x[:, :, :3], r"out must have shape.*got \[1, 2, 3, 32\]"),
    "out-dtype": ("out", lambda x: x.float(), r"out must have dtype.*got Float"),
    "out-strided": ("out", lambda x: x.mT.contiguous().mT, r"out must have a dense last.*got stride 40"),
    "lse-shape": ("lse", lambda x: x[:, :, :5], r"lse must have shape \[1, 2, 40\].*got \[1, 2, 5\]"),
    "lse-rank": ("lse", lambda x: x[..., None], r"lse must have shape \[1, 2, 40\].*got \[1, 2, 40, 1\]"),
    "lse-dtype": ("lse", lambda x: x.bfloat16(), r"lse must have dtype Float.*got BFloat16"),
    "lse-device": ("lse", lambda x: x.to("meta"), r"lse must be on.*got meta"),
    "dlse-shape": ("dlse", lambda x: x[:, :1], r"dlse must have shape \[1, 2, 40\].*got \[1, 1, 40\]"),
    "dlse-dtype": ("dlse", lambda x: x.double(), r"dlse must have dtype Float.*got Double"),
    "dlse-device": ("dlse", lambda x: x.to("meta"), r"dlse must be on.*got meta"),
    "q-head-dim": ("q", lambda x: x[..., :8], r"k must have head_dim 8 like q, got 32"),
}


@pytest.mark.parametrize("case", WRONG_BACKWARD)
def test_wrong_tensor_in_backward(device, case):
    name, spoil, rule = WRONG_BACKWARD[case]
    q, k, v, dout = make_qkv_dout(Shape(), BF16, device)
    out, lse = forward(q, k, v)
    arguments = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": lse.clone()}
    arguments[name] = spoil(arguments[name])
    refuse(lambda: torch.ops.flash_ext.backward(**arguments), r"flash_ext\.backward: ", rule)


# ---- what the package says of itself -------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_explain(device, algorithm, causal):
    q, k, v = make_qkv(Shape(2, 4, 2, 256, 512, 64), BF16, device)
    explanation = flash_ext.explain(q, k, v, causal=causal, algorithm=algorithm)
    assert explanation.algorithm == (fastest(device=device) if algorithm == "auto" else algorithm)
    assert explanation.block_m > 0
    assert explanation.block_n > 0
    visible = {False: 256 * 512, True: 256 * 257 // 2 + 256 * 256, "top_left": 256 * 257 // 2}[causal]
    assert explanation.flops == 4 * 2 * 4 * 64 * visible
    assert explanation.hbm_bytes >= 2 * 2 * 64 * (2 * 4 * 256 + 2 * 2 * 512) / 2
    if device == "cuda":
        assert explanation.num_warps > 0
        assert 0 < explanation.shared_memory_bytes <= 227 * 1024
        assert explanation.num_thread_blocks > 0
    for word in (explanation.algorithm, "tile", "FLOPs", f"{explanation.flops:,}", "workspace"):
        assert word in str(explanation)


@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (-1, 2), (3, 2), (0, 0), (40, 40)], ids=str)
def test_explain_counts_what_a_window_leaves(device, causal, window):
    for seqlen_q, seqlen_k in ((7, 19), (19, 7), (16, 16)):
        q, k, v = make_qkv(Shape(1, 1, 1, seqlen_q, seqlen_k, 8), BF16, device)
        diagonal = 0 if causal == "top_left" else seqlen_k - seqlen_q
        left, right = window[0], 0 if causal else window[1]
        distances = [j - i - diagonal for i in range(seqlen_q) for j in range(seqlen_k)]
        visible = sum((left < 0 or x >= -left) and (right < 0 or x <= right) for x in distances)
        assert flash_ext.explain(q, k, v, causal=causal, window=window).flops == 4 * 8 * visible


def test_explain_takes_what_flash_attention_takes(device):
    q, k, v = make_qkv(Shape(2, 1, 1, 256, 512, 64), BF16, device)
    assert flash_ext.explain(q[:, 0], k[:, 0], v[:, 0], scale=0.5).flops > 0
    assert flash_ext.explain(q[..., 1:60], k[..., 1:60], v[..., 1:60]).flops > 0


def test_build_info():
    info = flash_ext.build_info()
    assert info["version"] == flash_ext.__version__
    assert info["torch_running"] == torch.__version__
    assert info["cpu_capability"] in ("avx512", "avx2", "default")
    for key in ("torch_version", "cuda_version", "architectures", "kernels", "head_dims"):
        assert key in info
