"""Packed sequences and seqlens_k on v3: lengths that only the GPU knows, whatever they are."""

import itertools
import math
import random

import pytest
import torch
from calls import assert_same_bits
from general_cases import call, check_forward, on_device
from inputs import Shape, make_qkv
from matrix import CAUSAL_MODES, HALF_DTYPES, dtype_name
from sequence_cases import COMBINATIONS, FEATURES, MALFORMED, Packed, draw_features, draw_packed, i32, of_entry

BF16 = torch.bfloat16
NAN = math.nan

pytestmark = pytest.mark.hopper
v3 = pytest.mark.parametrize("algorithm", ["v3"])


def check_packed(packed, features, **options):
    """Each sequence has the bits of a call with it alone, which is checked against the reference; rows of none have
    out 0 and lse -inf."""
    torch.full_like(packed.qkv[0], NAN)  # freed at once, and handed out again
    out, lse = packed.call(features, **options)
    is_owned = torch.zeros(len(out), dtype=torch.bool, device=out.device)
    for b in range(len(packed.cu_q) - 1):
        q_rows, k_rows = packed.rows(b)
        is_owned[q_rows] = True
        if q_rows.start == q_rows.stop:
            continue
        own = of_entry(features, b)
        actual = (out[q_rows].transpose(0, 1)[None], lse[None, :, q_rows])
        if k_rows.start == k_rows.stop:  # v3 refuses no keys at all
            expected = call(*packed.alone(b), own, **(options | {"algorithm": "v2"}))
        else:
            expected = check_forward(*packed.alone(b), own, **options)
        assert_same_bits(actual, expected, f"sequence {b} of {packed.cu_q} {packed.cu_k}")
    assert not out[~is_owned].any()
    assert (lse[:, ~is_owned] == -math.inf).all()


@v3
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed(device, algorithm, head_dim, names, seed):
    rng = random.Random(f"{seed}{names}{head_dim}")
    packed, features, options = draw_packed(rng, names, head_dim, [1, 3, 7, 40], device)
    check_packed(packed, features, algorithm=algorithm, **options)


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_edges_of_lengths(device, algorithm, head_dim, causal):
    pairs = list(itertools.product((0, 1, 64, 65, 129, 192, 193, 400), repeat=2))
    packed = Packed(*zip(*pairs, strict=True), 2, 1, head_dim, device=device)
    sinks = torch.tensor([0.5, -3.0], device=device)
    for features in ({"window": (-1, -1)}, {"window": (100, 30)}, {"sinks": sinks}):
        check_packed(packed, features, algorithm=algorithm, causal=causal)


@v3
@pytest.mark.parametrize("head_dim", [64, 128])
def test_neighbours_do_not_matter(device, algorithm, head_dim):
    """A sequence keeps its bits where all others are NaN, and where it lies elsewhere among them."""
    lengths = (130, 64, 1, 300, 193)
    packed = Packed(lengths, lengths, 4, 2, head_dim, device=device)
    expected = packed.call({}, algorithm=algorithm, causal="bottom_right")
    for b in range(len(lengths)):
        own, _ = packed.rows(b)
        others = [torch.full_like(x, NAN) for x in packed.qkv]
        for x, y in zip(others, packed.qkv, strict=True):
            x[own] = y[own]
        out, lse = call(*others, packed.lengths, algorithm=algorithm, causal="bottom_right")
        assert_same_bits((out[own], lse[:, own]), (expected[0][own], expected[1][:, own]), f"sequence {b}")


@v3
@pytest.mark.parametrize("count", [33, 1025, 5000])
def test_many_sequences(device, algorithm, count):
    """More than a warp, a thread block or all thread blocks have threads and tiles for, in one order or another."""
    rng = random.Random(count)
    lengths = [rng.choice([0, 1, 5, 20, 64, 70, 130]) for _ in range(count)]
    packed = Packed(lengths, lengths, 2, 1, 64, device=device)
    first = packed.call({}, algorithm=algorithm, causal="bottom_right")
    for b in rng.sample(range(count), 30):
        if lengths[b] > 0:
            own, _ = packed.rows(b)
            expected = check_forward(*packed.alone(b), {}, algorithm=algorithm, causal="bottom_right")
            assert_same_bits((first[0][own].transpose(0, 1)[None], first[1][None, :, own]), expected, f"{b}")
    for _ in range(5):
        assert_same_bits(packed.call({}, algorithm=algorithm, causal="bottom_right"), first, "again")


@v3
@pytest.mark.parametrize("names", [(), FEATURES], ids="+".join)
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_padding(device, algorithm, head_dim, causal, names):
    """Each batch entry has the bits of a call with its own keys alone, though the others are NaN."""
    rng = random.Random(f"{names}{causal}{head_dim}")
    lengths = (0, 1, 64, 127, 128, 129, 300, 513)
    for seqlen_q, dtype in ((77, BF16), (300, torch.float16)):
        q, k, v = make_qkv(Shape(len(lengths), 4, 2, seqlen_q, 513, head_dim), dtype, device)
        for b, n in enumerate(lengths):
            k[b, :, n:], v[b, :, n:] = NAN, NAN
        features = on_device(draw_features(names, rng, len(lengths), 4), device)
        seqlens_k = i32(lengths).to(device)
        out, lse = call(q, k, v, features | {"seqlens_k": seqlens_k}, algorithm=algorithm, causal=causal)
        for b, n in enumerate(lengths):
            own = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], of_entry(features, b))
            expected = (
                check_forward(*own, algorithm=algorithm, causal=causal)
                if n > 0
                else call(*own, algorithm="v2", causal=causal)
            )
            assert_same_bits((out[b : b + 1], lse[b : b + 1]), expected, f"entry {b}, {n} keys")


@v3
def test_packed_and_padded(device, algorithm):
    """seqlens_k counts the keys of packed sequences, too."""
    packed = Packed((100, 200, 64, 50), (300, 200, 129, 5), 2, 2, 64, device=device)
    used = (77, 0, 400, 5)  # beyond a sequence's own: all of it
    out, lse = call(*packed.qkv, packed.lengths | {"seqlens_k": i32(used).to(device)}, algorithm=algorithm)
    for b, n in enumerate(used):
        q, k, v = packed.alone(b)
        expected = call(q, k[:, :, :n], v[:, :, :n], {}, algorithm="v3" if n > 0 else "v2")
        rows, _ = packed.rows(b)
        assert_same_bits((out[rows].transpose(0, 1)[None], lse[None, :, rows]), expected, f"sequence {b}")


@v3
@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k", "both", "seqlens_k"])
@pytest.mark.parametrize("lengths", MALFORMED, ids=str)
def test_malformed_lengths(device, algorithm, lengths, which):
    """They read nothing outside the tensors (NaN around them would show), and the next call is a good one."""
    good = Packed((170, 0, 400, 50), (300, 120, 0, 333), 4, 2, 64, gap=0, device=device)
    fenced = []
    for x in good.qkv:
        fence = torch.full((len(x) + 2000, *x.shape[1:]), NAN, dtype=BF16, device=device)
        fence[1000:-1000] = x
        fenced.append(fence[1000:-1000])
    names = ("cu_seqlens_q", "cu_seqlens_k") if which == "both" else (which,)
    values = i32(lengths[1:] if which == "seqlens_k" else lengths).to(device)
    bad = good.lengths | dict.fromkeys(names, values)
    expected = good.call({}, algorithm=algorithm, causal="bottom_right")
    for causal in ("none", "bottom_right"):
        out, lse = call(*fenced, bad, algorithm=algorithm, causal=causal)
        assert not out.isnan().any()
        assert not lse.isnan().any()
    assert_same_bits(good.call({}, algorithm=algorithm, causal="bottom_right"), expected, "a good call after it")


@v3
def test_more_tiles_than_there_can_be(device, algorithm):
    """Sequences that all overlap have more tiles than the workspace, which says so of none: results are finite."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(3000, 2, 64, device=device, dtype=BF16) for _ in range(3))
    cu = i32([0, 3000] * 64 + [0]).to(device)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3000, "max_seqlen_k": 3000}
    torch.full_like(q, NAN)
    out, lse = call(q, k, v, lengths, algorithm=algorithm)
    assert not out.isnan().any()
    assert not lse.isnan().any()


@v3
@pytest.mark.parametrize("is_packed", [True, False])
def test_graph_replay_with_other_lengths(device, algorithm, is_packed):
    """A captured call reads its lengths anew each time."""
    rng = random.Random(5)
    torch.manual_seed(5)
    batch, total = 6, 1500
    if is_packed:
        q, k, v = (torch.randn(total, n, 64, device=device, dtype=BF16) for n in (4, 2, 2))
        cu = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": total, "max_seqlen_k": total}
    else:
        q, k, v = make_qkv(Shape(batch, 4, 2, 250, 700, 64), BF16, device)
        cu = torch.zeros(batch, dtype=torch.int32, device=device)
        lengths = {"seqlens_k": cu}
    run = lambda: call(q, k, v, lengths, algorithm=algorithm, causal="bottom_right")  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(8):
        cu.copy_(i32(sorted(rng.randint(0, total) for _ in cu) if is_packed else [rng.randint(0, 700) for _ in cu]))
        for x in captured:
            x.fill_(NAN)
        graph.replay()
        assert_same_bits([x.clone() for x in captured], run(), str(cu.tolist()))
        torch.cuda.synchronize()


@v3
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_one_long_among_short(device, algorithm, dtype):
    """Several rounds of the grid; some thread blocks have no tile at all of the second call."""
    lengths = (5000, *(64,) * 40, 3000, 1)
    for heads in (12, 1):
        packed = Packed(lengths, lengths, heads, 1, 128, dtype, device=device)
        first = packed.call({}, algorithm=algorithm, causal="bottom_right")
        for b in (0, 7, 41, 42):
            own, _ = packed.rows(b)
            expected = call(*packed.alone(b), {}, algorithm=algorithm, causal="bottom_right")
            assert_same_bits((first[0][own].transpose(0, 1)[None], first[1][None, :, own]), expected, f"{b}")
        for _ in range(10):
            assert_same_bits(packed.call({}, algorithm=algorithm, causal="bottom_right"), first, "again")
    nothing = packed.lengths | {name: torch.zeros(44, dtype=torch.int32, device=device) for name in
                                ("cu_seqlens_q", "cu_seqlens_k")}  # fmt: skip
    out, lse = call(*packed.qkv, nothing, algorithm=algorithm)
    assert not out.any()
    assert (lse == -math.inf).all()


@v3
def test_no_keys_at_all_is_refused(device, algorithm):
    q, k = torch.zeros(10, 2, 64, dtype=BF16, device=device), torch.zeros(0, 2, 64, dtype=BF16, device=device)
    cu_q, cu_k = (i32(x).to(device) for x in ((0, 10), (0, 0)))
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 10, "max_seqlen_k": 5}
    with pytest.raises(RuntimeError, match="algorithm 'v3' needs keys"):
        call(q, k, k, lengths, algorithm=algorithm)
    out, lse = call(q, k, k, lengths, algorithm="auto")
    assert not out.any()
    assert (lse == -math.inf).all()
