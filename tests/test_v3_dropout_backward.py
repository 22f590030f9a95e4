"""v3's backward with dropout, alone and with window, alibi_slopes, sinks and block_mask, and what it refuses."""

import random

import pytest
import torch
from calls import assert_same_bits
from general_cases import GRADIENTS, check_backward, check_repeatable_backward, draw_features
from inputs import Shape, make_qkv_dout
from matrix import CAUSAL_MODES, HALF_DTYPES, dtype_name
from v3_cases import check_drawn_backward

from flash_ext.philox import dropout_factor

OTHERS = ("window", "alibi", "sinks", "block_mask")
HEAD_DIMS = (64, 128)
P = (0.1, 0.1, 0.5, 0.9, 0.998)

v3 = pytest.mark.parametrize("algorithm", ["v3"])


def random_state():
    return torch.randint(-(1 << 62), 1 << 62, (2,))


def check_drawn(device, algorithm, seed, others):
    def draw(rng, shape, dtype):
        features = draw_features(rng, shape, dtype, others)
        return features | {"dropout_p": rng.choice(P), "rng_state": random_state()}

    check_drawn_backward(device, algorithm, seed, draw)


@v3
@pytest.mark.parametrize("seed", range(60))
def test_dropout_alone(device, algorithm, seed):
    check_drawn(device, algorithm, seed, [])


@v3
@pytest.mark.parametrize("seed", range(60))
def test_combination(device, algorithm, seed):
    rng = random.Random(seed)
    check_drawn(device, algorithm, 1000 + seed, rng.sample(OTHERS, rng.randint(1, 3)))


@v3
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_steps_far_apart(device, algorithm, head_dim, size, deterministic):
    """A tile's next step is any block of rows, of any head of the group, or is left out by one half of the keys."""
    for seed in range(4):
        rng = random.Random(f"{seed}{size}{head_dim}{deterministic}")
        torch.manual_seed(rng.randrange(1 << 30))
        shape = Shape(2, 6, 2, rng.randint(900, 1600), rng.randint(300, 900), head_dim)
        sizes = (2, 6, -(-shape.seqlen_q // size), -(-shape.seqlen_k // size))
        mask = torch.rand(sizes, device=device) < rng.choice([0.15, 0.4])
        features = {"block_mask": mask, "block_size": size}
        if seed % 2:
            features["window"] = (rng.choice([70, 300]), rng.choice([0, 100]))
        features |= {"dropout_p": rng.choice(P), "rng_state": random_state().to(device)}
        tensors = make_qkv_dout(shape, rng.choice(HALF_DTYPES), device)
        options = {"causal": rng.choice(CAUSAL_MODES), "deterministic": deterministic}
        check_backward(*tensors, None, features, algorithm=algorithm, **options)


@v3
@pytest.mark.parametrize("block_size", [None, 64, 128])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("dropout_p", [0.1, 0.6])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_drops_the_very_elements(device, algorithm, head_dim, dropout_p, causal, block_size):
    """Of equal weights and a dout of one-hot rows, dV shows which ones were kept."""
    shape = Shape(2, 6, 2, 400, 333, head_dim)
    q, k, v, dout = (x * 0 for x in make_qkv_dout(shape, torch.bfloat16, device))
    state = random_state().to(device)
    options = {"causal": causal, "dropout_p": dropout_p, "rng_state": state}
    if block_size is not None:
        blocks = torch.rand(2, 6, -(-400 // block_size), -(-333 // block_size), device=device) < 0.5
        options |= {"block_mask": blocks, "block_size": block_size}
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)
    kept = dropout_factor(dropout_p, state, 2, 6, range(400), 333) != 0
    visible = torch.arange(333, device=device) <= torch.arange(400, device=device)[:, None] - (400 - 333)
    if causal != "none":
        kept = kept & visible
    if block_size is not None:
        on = blocks.repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)
        kept = kept & on[:, :, :400, :333]
    for head in (0, 2, 4, 5):
        for row0 in (0, 130, 400 - head_dim):
            dout.zero_()
            dout[:, head, row0 : row0 + head_dim] = torch.eye(head_dim, device=device, dtype=dout.dtype)
            _, _, dv, *_ = torch.ops.flash_ext.general_backward(
                dout, q, k, v, out, lse, algorithm=algorithm, needs=[True] * 3 + [False] * 3, **options
            )
            expected = kept[:, head, row0 : row0 + head_dim].mT
            assert torch.equal(dv[:, head // 3] != 0, expected), (head, row0)


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_many_tiles_repeat_to_the_bit(device, algorithm, dtype, head_dim, causal):
    q, k, v, dout = make_qkv_dout(Shape(3, 12, 4, 1500, 1400, head_dim), dtype, device)
    dropout = {"dropout_p": 0.2, "rng_state": random_state().to(device)}
    for features in ({}, {"window": (300, 100), "sinks": torch.randn(12, device=device)}):
        check_repeatable_backward(q, k, v, dout, dropout | features, algorithm=algorithm, causal=causal)


@v3
def test_no_state_is_kept_between_calls(device, algorithm):
    """The memory of rng_state is read anew by a replayed CUDA graph."""
    q, k, v, dout = make_qkv_dout(Shape(1, 2, 1, 300, 300, 64), torch.bfloat16, device)
    state = random_state().to(device)
    options = {"dropout_p": 0.3, "rng_state": state, "deterministic": True, "needs": [True] * 3 + [False] * 3}
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", dropout_p=0.3, rng_state=state)

    def backward():
        return torch.ops.flash_ext.general_backward(dout, q, k, v, out, lse, algorithm=algorithm, **options)

    first = backward()
    if q.is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = backward()
        graph.replay()
        assert_same_bits(results, first, "replayed", GRADIENTS)
    state += 1
    second = backward()
    assert not torch.equal(second[2], first[2])
    if q.is_cuda:
        graph.replay()
        assert_same_bits(results, second, "replayed with another state", GRADIENTS)


@pytest.mark.hopper
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"softcap": 3.0}, "softcap and dropout_p"),
        ({"dropout_p": 0.9995}, "at most 0.999"),
        ({"dropout_p": 1.0}, "at most 0.999"),
    ],
    ids=str,
)
def test_refused(arguments, reason):
    """By name where v3 was asked for; "auto" takes v2."""
    options = {"dropout_p": 0.5, "rng_state": random_state().cuda()} | arguments
    q, k, v, dout = make_qkv_dout(Shape(2, 4, 2, 70, 90, 64), torch.bfloat16, "cuda")
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)
    given = (dout, q, k, v, out, lse)
    with pytest.raises(RuntimeError, match=rf"general_backward: algorithm 'v3' .*{reason}"):
        torch.ops.flash_ext.general_backward(*given, algorithm="v3", **options)
    automatic, v2 = (
        torch.ops.flash_ext.general_backward(*given, algorithm=name, deterministic=True, **options)
        for name in ("auto", "v2")
    )
    assert_same_bits(automatic, v2, "algorithm='auto'", GRADIENTS)
