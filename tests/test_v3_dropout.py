"""Dropout in v3's forward: the elements that common/philox.h names, alone and with the other features."""

import itertools
import math
import random

import pytest
import torch
from calls import assert_same_bits
from general_cases import call, check_call, check_forward
from inputs import Shape, make_qkv
from matrix import CAUSAL_MODES, HALF_DTYPES, dtype_name
from v3_cases import COMBINATIONS, draw_case, draw_gradient_case

import flash_ext
from flash_ext.philox import dropout_factor

BF16 = torch.bfloat16

pytestmark = pytest.mark.hopper
v3 = pytest.mark.parametrize("algorithm", ["v3"])
head_dims = pytest.mark.parametrize("head_dim", [64, 128])


def dropout(p, device, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    state = torch.randint(-(1 << 62), 1 << 62, (2,))
    return {"dropout_p": p, "rng_state": state.to(device)}


@v3
@head_dims
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("p", [0.1, 0.37, 0.5, 0.9])
def test_drops_the_replayed_elements(device, algorithm, p, dtype, head_dim):
    """Where all scores are equal, and V is one row of the identity after another, out shows what is kept."""
    batch, heads, seqlen_q, seqlen_k = 2, 3, 457, 400
    features = dropout(p, device, seed=int(1000 * p))
    factor = dropout_factor(p, features["rng_state"], batch, heads, range(seqlen_q), seqlen_k)
    q = torch.zeros(batch, heads, seqlen_q, head_dim, dtype=dtype, device=device)
    k = torch.randn(batch, 1, seqlen_k, head_dim, device=device).to(dtype)
    for key0 in range(0, seqlen_k, head_dim):
        count = min(head_dim, seqlen_k - key0)
        v = torch.zeros_like(k)
        v[:, :, range(key0, key0 + count), range(count)] = 1
        out, _ = call(q, k, v, features, algorithm=algorithm)
        expected = factor[..., key0 : key0 + count] / seqlen_k
        assert torch.equal(out[..., :count] == 0, expected == 0)
        assert out[..., count:].abs().max().item() == 0 if count < head_dim else True
        torch.testing.assert_close(out[..., :count].double(), expected, rtol=0.01, atol=0)


@v3
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("names", [(), *COMBINATIONS], ids="+".join)
def test_combination(device, algorithm, names, seed):
    (q, k, v, _), features, options = draw_case(f"dropout{seed}{names}", names, device)
    features |= dropout([0.1, 0.5, 0.9][seed % 3], device, seed)
    check_forward(q, k, v, features, algorithm=algorithm, **options)


@v3
@head_dims
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("p", [1e-6, 0.01, 0.75, 0.99, 0.999, 1.0])
def test_probabilities(device, algorithm, p, dtype, head_dim):
    """From nothing to all that is dropped."""
    q, k, v = make_qkv(Shape(2, 4, 2, 300, 333, head_dim), dtype, device)
    for causal in CAUSAL_MODES:
        out, lse = check_forward(q, k, v, dropout(p, device), algorithm=algorithm, causal=causal)
        _, expected = call(q, k, v, {"window": (-1, -1)}, algorithm=algorithm, causal=causal)
        torch.testing.assert_close(lse, expected, rtol=2e-6, atol=2e-6)
    if p == 1.0:
        assert out.abs().max().item() == 0


@v3
@head_dims
def test_shapes(device, algorithm, head_dim):
    for seqlen_q, seqlen_k in itertools.product((1, 65, 192, 400, 705), (1, 31, 128, 257, 640)):
        q, k, v = make_qkv(Shape(1, 2, 1, seqlen_q, seqlen_k, head_dim), BF16, device)
        for causal in CAUSAL_MODES:
            check_forward(q, k, v, dropout(0.2, device), algorithm=algorithm, causal=causal)


@v3
@head_dims
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 100.0, 1e5])
def test_scales(device, algorithm, scale, head_dim):
    """Also maxima that grow from block to block, and scores beyond what one FMA rounds well."""
    q, k, v = make_qkv(Shape(1, 2, 1, 150, 600, head_dim), torch.float16, device)
    k *= torch.linspace(1, 0.1, 600, device=device).view(1, 1, -1, 1).half()
    check_forward(q, k, v, dropout(0.5, device), algorithm=algorithm, scale=scale)


@v3
@head_dims
def test_many_tiles_repeat_to_the_bit(device, algorithm, head_dim):
    q, k, v = make_qkv(Shape(2, 12, 3, 2500, 3000, head_dim), BF16, device)
    features = dropout(0.1, device, 5)
    first = call(q, k, v, features, algorithm=algorithm, causal="bottom_right")
    for _ in range(20):
        again = call(q, k, v, features, algorithm=algorithm, causal="bottom_right")
        assert_same_bits(again, first, "again")
    factor = dropout_factor(0.1, features["rng_state"], 2, 12, range(2500), 3000)[1, 7:8].float()
    expected = torch.softmax(q[1, 7:8].float() @ k[1, 1:2].float().mT / math.sqrt(head_dim), -1)
    out, _ = call(q, k, v, features, algorithm=algorithm)
    torch.testing.assert_close(out[1, 7:8].float(), (expected * factor) @ v[1, 1:2].float(), rtol=0.03, atol=2e-3)


@v3
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("names", [(), *COMBINATIONS[:4]], ids="+".join)
def test_gradients(device, algorithm, names, seed):
    """The forward and the backward that "auto" takes drop the same elements."""
    rng = random.Random(f"gradients{seed}")
    _, tensors, features = draw_gradient_case(rng, names, device)
    features |= dropout(0.3, device, seed)
    check_call(*tensors, features, algorithm="auto", causal=rng.choice(CAUSAL_MODES))


@head_dims
def test_replayed_graphs_drop_anew(head_dim):
    q, k, v = make_qkv(Shape(1, 2, 1, 300, 300, head_dim), BF16, "cuda")
    features = dropout(0.5, "cuda", 1)
    state = features["rng_state"]
    states = [state.clone(), state + 12345]
    call(q, k, v, features, algorithm="v3")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(q, k, v, features, algorithm="v3")
    for new in states:
        state.copy_(new)
        graph.replay()
        expected = call(q, k, v, features | {"rng_state": new}, algorithm="v3")
        assert_same_bits(results, expected, "replayed")


def test_auto_takes_v3_and_explain_says_so():
    q, k, v = make_qkv(Shape(1, 2, 1, 300, 300, 64), BF16, "cuda")
    features = dropout(0.1, "cuda", 2)
    assert_same_bits(*(call(q, k, v, features, algorithm=name) for name in ("auto", "v3")), "algorithm='auto'")
    explanation = flash_ext.explain(q, k, v, dropout_p=0.1)
    assert explanation.algorithm == "v3"
