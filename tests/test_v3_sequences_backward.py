"""Packed sequences and seqlens_k in v3's backward: lengths that only the GPU knows, whatever they are."""

import itertools
import math
import random

import pytest
import torch
from calls import assert_same_bits
from general_cases import assert_near, check_gradients, exact_backward, on_device
from inputs import Shape, make_qkv_dout
from matrix import CAUSAL_MODES
from sequence_cases import COMBINATIONS, FEATURES, MALFORMED, Packed, draw_features, draw_packed, i32, of_entry

BF16 = torch.bfloat16
NAN = math.nan

pytestmark = pytest.mark.hopper
v3 = pytest.mark.parametrize("algorithm", ["v3"])


def backward(dout, q, k, v, out, lse, dlse=None, *, needs=None, **options):
    """(dq, dk, dv, dsinks). What they and workspaces are taken from is NaN before."""
    for count in (1 << 12, 1 << 17, 1 << 20, 1 << 22, q.numel(), k.numel()):
        torch.full((count,), NAN, device=q.device, dtype=torch.float32)
        torch.full((count,), NAN, device=q.device, dtype=q.dtype)
    needs = needs or [True, True, True, False, False, "sinks" in options]
    *gradients, _, _, dsinks = torch.ops.flash_ext.general_backward(
        dout, q, k, v, out, lse, dlse, needs=needs, **options
    )
    return *gradients, dsinks


def without_keys(q, features):
    """(out, lse) of queries that have none."""
    sinks = features.get("sinks")
    lse = torch.full(q.shape[:3], -math.inf, device=q.device)
    if sinks is not None:
        lse[:] = sinks.float()[:, None]
    return torch.zeros_like(q), lse


class Call:
    """Packed sequences with the reference's out and lse of each, NaN between them; dlse with a gradient of lse."""

    def __init__(self, packed, features, has_dlse, causal="none", scale=None):
        q = packed.qkv[0]
        self.packed, self.features, self.options = packed, features, {"causal": causal, "scale": scale}
        self.dout, self.out = torch.full_like(q, NAN), torch.full_like(q, NAN)
        self.lse, dlse = (torch.full((q.shape[1], len(q)), NAN, device=q.device) for _ in range(2))
        self.dlse = dlse if has_dlse else None
        self.rights = []
        for b in range(len(packed.cu_q) - 1):
            rows, keys = packed.rows(b)
            own = packed.alone(b)
            dout = torch.randn(own[0].shape, device=q.device).to(q.dtype)
            own_dlse = torch.randn(dout.shape[:3], device=q.device) if has_dlse else None
            right = None
            if keys.start < keys.stop and rows.start < rows.stop:
                right = exact_backward(*own, dout, own_dlse, of_entry(features, b), **self.options)
            out, lse = right[:2] if right else without_keys(own[0], features)
            self.rights.append(right)
            self.dout[rows], self.out[rows] = dout[0].transpose(0, 1), out[0].transpose(0, 1).to(q.dtype)
            self.lse[:, rows] = lse[0].float()
            if has_dlse:
                self.dlse[:, rows] = own_dlse[0]

    def run(self, algorithm, **options):
        options = self.features | self.packed.lengths | self.options | options
        return backward(self.dout, *self.packed.qkv, self.out, self.lse, self.dlse, algorithm=algorithm, **options)

    def alone(self, b):
        rows, _ = self.packed.rows(b)
        inputs = (x[rows].transpose(0, 1)[None] for x in (self.dout, self.out))
        lses = (None if x is None else x[None, :, rows].contiguous() for x in (self.lse, self.dlse))
        return (*inputs, *lses)

    def check(self, algorithm, is_exact=True):
        """Each sequence's gradients against the reference; dK and dV have the bits of a call with it alone."""
        dq, dk, dv, dsinks = self.run(algorithm)
        owned = [torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (dq, dk)]
        for b, right in enumerate(self.rights):
            rows, keys = self.packed.rows(b)
            owned[0][rows], owned[1][keys] = True, True
            gradients = [
                x[r].transpose(0, 1)[None] for x, r in ((dq, rows), (dk, keys), (dv, keys))
            ]
            if right is None:
                assert not any(x.any() for x in gradients), f"sequence {b}"
                continue
            own = of_entry(self.features, b)
            dout, out, lse, dlse = self.alone(b)
            given = self.packed.alone(b)
            if is_exact:
                check_gradients(*given, dout, dlse, own, right, gradients, algorithm=algorithm, **self.options)
            expected = backward(dout, *given, out, lse, dlse, algorithm=algorithm, **own, **self.options)
            assert_same_bits(gradients[1:], expected[1:3], f"sequence {b} of {self.packed.cu_q} {self.packed.cu_k}")
        assert not dq[~owned[0]].any()
        assert not dk[~owned[1]].any()
        assert not dv[~owned[1]].any()
        if "sinks" in self.features:
            expected = self.run("v2")[3]
            assert ((dsinks - expected).abs() <= 1e-2 + 2e-3 * expected.abs()).all(), (dsinks, expected)


@v3
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed(device, algorithm, head_dim, names, seed):
    rng = random.Random(f"{seed}{names}{head_dim}")
    packed, features, options = draw_packed(rng, names, head_dim, [1, 3, 7, 20], device)
    Call(packed, features, rng.random() < 0.5, **options).check(algorithm)


@v3
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_edges_of_lengths(device, algorithm, head_dim, causal):
    pairs = list(itertools.product((0, 1, 64, 65, 129, 192, 400), repeat=2))
    packed = Packed(*zip(*pairs, strict=True), 2, 1, head_dim, device=device)
    sinks = torch.tensor([0.5, -3.0], device=device)
    for features in ({"window": (-1, -1)}, {"window": (100, 30), "sinks": sinks}):
        Call(packed, features, True, causal).check(algorithm)


@v3
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_mask(device, algorithm, head_dim, size):
    torch.manual_seed(size)
    lengths = (130, 64, 700, 1, 300)
    packed = Packed(lengths, lengths[::-1], 4, 2, head_dim, device=device)
    mask = torch.rand(5, 4, -(-700 // size), -(-700 // size), device=device) < 0.5
    options = {"block_mask": mask, "block_size": size, "causal": "bottom_right"}
    out, lse = torch.ops.flash_ext.general_forward(*packed.qkv, algorithm="v2", **options, **packed.lengths)
    dout = torch.randn_like(out)
    ours, other = (backward(dout, *packed.qkv, out, lse, algorithm=x, **options, **packed.lengths)
                   for x in (algorithm, "v2"))  # fmt: skip
    assert_near(ours[:3], other[:3])


@v3
@pytest.mark.parametrize("head_dim", [64, 128])
def test_huge_scores(device, algorithm, head_dim):
    """Whose log-sum-exp is read again, where it lies among the packed ones."""
    torch.manual_seed(0)
    lengths = (130, 64, 70, 300)
    packed = Packed(lengths, lengths, 4, 2, head_dim, device=device)
    packed.qkv[0].mul_(3000)
    Call(packed, {}, False, "bottom_right").check(algorithm, is_exact=False)


@v3
@pytest.mark.parametrize("count", [33, 1025, 5000])
def test_many_sequences(device, algorithm, count):
    """More than a warp, a thread block or all thread blocks have threads and tiles for."""
    rng = random.Random(count)
    torch.manual_seed(count)
    lengths = [rng.choice([0, 1, 5, 20, 64, 70, 130]) for _ in range(count)]
    packed = Packed(lengths, lengths, 2, 1, 64, device=device)
    out, lse = packed.call({}, algorithm="v2", causal="bottom_right")
    dout = torch.randn_like(out)
    run = lambda name: backward(  # noqa: E731
        dout, *packed.qkv, out, lse, algorithm=name, causal="bottom_right", **packed.lengths
    )
    first, expected = run(algorithm), run("v2")
    assert_near(first[:3], expected[:3])
    for gradient in first[:3]:
        assert not gradient[:7].any()
        assert not gradient[-7:].any()
    for _ in range(5):
        assert_same_bits(run(algorithm)[1:3], first[1:3], "again")


@v3
@pytest.mark.parametrize("names", [(), FEATURES], ids="+".join)
@pytest.mark.parametrize("causal", CAUSAL_MODES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_padding(device, algorithm, head_dim, causal, names):
    """Keys that are not used may be NaN and get gradients of 0."""
    rng = random.Random(f"{names}{causal}{head_dim}")
    torch.manual_seed(1)
    lengths = (0, 1, 64, 127, 128, 129, 300, 513)
    for seqlen_q, dtype in ((77, BF16), (300, torch.float16)):
        q, k, v, dout = make_qkv_dout(Shape(len(lengths), 4, 2, seqlen_q, 513, head_dim), dtype, device)
        features = on_device(draw_features(names, rng, len(lengths), 4), device)
        options = {"causal": causal}
        rights, out, lse = [], torch.empty_like(q), torch.empty(q.shape[:3], device=device)
        dlse = torch.randn(q.shape[:3], device=device)
        for b, n in enumerate(lengths):
            k[b, :, n:], v[b, :, n:] = NAN, NAN
            own = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], dout[b : b + 1], dlse[b : b + 1])
            right = exact_backward(*own, of_entry(features, b), **options) if n > 0 else None
            own_out, own_lse = right[:2] if right else without_keys(own[0], features)
            out[b], lse[b] = own_out[0].to(dtype), own_lse[0].float()
            rights.append((own, right))
        seqlens_k = i32(lengths).to(device)
        dq, dk, dv, _ = backward(
            dout, q, k, v, out, lse, dlse, algorithm=algorithm, seqlens_k=seqlens_k, **features, **options
        )
        for b, (n, (own, right)) in enumerate(zip(lengths, rights, strict=True)):
            assert not dk[b, :, n:].any()
            assert not dv[b, :, n:].any()
            if right is None:
                assert not dq[b].any()
                continue
            gradients = dq[b : b + 1], dk[b : b + 1, :, :n], dv[b : b + 1, :, :n]
            check_gradients(*own, of_entry(features, b), right, gradients, algorithm=algorithm, **options)


@v3
def test_packed_and_padded(device, algorithm):
    """seqlens_k counts the keys of packed sequences, too."""
    torch.manual_seed(2)
    packed = Packed((100, 200, 64, 50), (300, 200, 129, 5), 2, 2, 64, device=device)
    used = (77, 0, 400, 5)  # beyond a sequence's own: all of it
    packed.lengths["seqlens_k"] = i32(used).to(device)
    for b, n in enumerate(used):
        _, keys = packed.rows(b)
        for x in packed.qkv[1:]:
            x[min(keys.start + n, keys.stop) : keys.stop] = NAN
    out, lse = packed.call({}, algorithm="v2")
    dout = torch.randn_like(out)
    ours, other = (backward(dout, *packed.qkv, out, lse, algorithm=x, **packed.lengths) for x in (algorithm, "v2"))
    assert_near(ours[:3], other[:3])
    for actual, expected in zip(ours[:3], other, strict=False):
        assert torch.equal(actual.any(-1), expected.any(-1))


@v3
@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k", "both", "seqlens_k"])
@pytest.mark.parametrize("lengths", MALFORMED, ids=str)
def test_malformed_lengths(device, algorithm, lengths, which):
    """They read nothing outside the tensors (NaN around them would show), and the next call is a good one."""
    torch.manual_seed(3)
    good = Packed((170, 0, 400, 50), (300, 120, 0, 333), 4, 2, 64, gap=0, device=device)
    fenced = []
    for x in (*good.qkv, torch.randn_like(good.qkv[0])):
        fence = torch.full((len(x) + 2000, *x.shape[1:]), NAN, dtype=BF16, device=device)
        fence[1000:-1000] = x
        fenced.append(fence[1000:-1000])
    *qkv, dout = fenced
    names = ("cu_seqlens_q", "cu_seqlens_k") if which == "both" else (which,)
    values = i32(lengths[1:] if which == "seqlens_k" else lengths).to(device)
    bad = good.lengths | dict.fromkeys(names, values)

    def run(lengths, causal):
        out, lse = torch.ops.flash_ext.general_forward(*qkv, algorithm="v2", causal=causal, **lengths)
        return backward(dout, *qkv, out, lse, algorithm=algorithm, causal=causal, **lengths)

    expected = run(good.lengths, "bottom_right")
    for causal in ("none", "bottom_right"):
        for x in run(bad, causal)[:3]:
            assert not x.isnan().any()
    again = run(good.lengths, "bottom_right")
    assert_same_bits(again[1:3], expected[1:3], "a good call after it")
    assert (again[0].float() - expected[0].float()).abs().max() <= 0.02


@v3
def test_more_tiles_than_there_can_be(device, algorithm):
    """Sequences that all overlap have more tiles than the workspace, which says so of none: results are finite."""
    torch.manual_seed(1)
    q, k, v, dout = (torch.randn(3000, 2, 64, device=device, dtype=BF16) for _ in range(4))
    cu = i32([0, 3000] * 64 + [0]).to(device)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3000, "max_seqlen_k": 3000}
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **lengths)
    for x in backward(dout, q, k, v, out, lse, algorithm=algorithm, **lengths)[:3]:
        assert not x.isnan().any()


@v3
@pytest.mark.parametrize("is_packed", [True, False])
def test_graph_replay_with_other_lengths(device, algorithm, is_packed):
    """A captured call reads its lengths anew each time."""
    rng = random.Random(5)
    torch.manual_seed(5)
    batch, total = 6, 1500
    if is_packed:
        q, k, v, dout = (torch.randn(total, n, 64, device=device, dtype=BF16) for n in (4, 2, 2, 4))
        cu = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": total, "max_seqlen_k": total}
    else:
        q, k, v, dout = make_qkv_dout(Shape(batch, 4, 2, 250, 700, 64), BF16, device)
        cu = torch.zeros(batch, dtype=torch.int32, device=device)
        lengths = {"seqlens_k": cu}
    options = {"causal": "bottom_right"} | lengths
    out, lse = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)
    call = lambda: torch.ops.flash_ext.general_backward(  # noqa: E731
        dout, q, k, v, out, lse, algorithm=algorithm, **options
    )[:3]
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(8):
        cu.copy_(i32(sorted(rng.randint(0, total) for _ in cu) if is_packed else [rng.randint(0, 700) for _ in cu]))
        results = torch.ops.flash_ext.general_forward(q, k, v, algorithm="v2", **options)
        out.copy_(results[0])
        lse.copy_(results[1])
        for x in captured:
            x.fill_(NAN)
        graph.replay()
        replayed, expected = [x.clone() for x in captured], call()
        assert_same_bits(replayed[1:], expected[1:], str(cu.tolist()))
        assert (replayed[0].float() - expected[0].float()).abs().max() <= 0.02
        torch.cuda.synchronize()


@v3
@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_long_among_short(device, algorithm, head_dim):
    """Several rounds of the grid; some thread blocks have no tile at all of the second call."""
    torch.manual_seed(7)
    lengths = (5000, *(64,) * 40, 3000, 1)
    for heads in (12, 1):
        packed = Packed(lengths, lengths, heads, 1, head_dim, device=device)
        out, lse = packed.call({}, algorithm="v2", causal="bottom_right")
        dout = torch.randn_like(out)
        run = lambda name, lengths: backward(  # noqa: E731
            dout, *packed.qkv, out, lse, algorithm=name, causal="bottom_right", **lengths  # noqa: B023
        )
        first, expected = run(algorithm, packed.lengths), run("v2", packed.lengths)
        assert_near(first[:3], expected[:3])
        for _ in range(10):
            assert_same_bits(run(algorithm, packed.lengths)[1:3], first[1:3], "again")
    nothing = packed.lengths | {name: torch.zeros(44, dtype=torch.int32, device=device) for name in
                                ("cu_seqlens_q", "cu_seqlens_k")}  # fmt: skip
    assert not any(x.any() for x in run(algorithm, nothing)[:3])


@v3
@pytest.mark.parametrize("needs", range(1, 16))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_only_wanted_gradients_are_computed(device, algorithm, head_dim, needs):
    torch.manual_seed(8)
    packed = Packed((130, 64, 300), (200, 0, 300), 4, 2, head_dim, device=device)
    sinks = torch.randn(4, device=device)
    options = packed.lengths | {"sinks": sinks}
    out, lse = packed.call({"sinks": sinks}, algorithm="v2")
    dout = torch.randn_like(out)
    wanted = [bool(needs >> i & 1) for i in range(3)] + [False, False, needs >= 8]
    run = lambda needs: backward(dout, *packed.qkv, out, lse, algorithm=algorithm, needs=needs, **options)  # noqa: E731
    everything = run([True, True, True, False, False, True])
    for is_wanted, actual, expected in zip([*wanted[:3], wanted[5]], run(wanted), everything, strict=True):
        if not is_wanted:
            assert actual.numel() == 0
        else:
            assert torch.allclose(actual.float(), expected.float(), rtol=0.02, atol=0.02)


@v3
@pytest.mark.parametrize("name", ["cu_seqlens_q", "seqlens_k"])
def test_deterministic_is_refused(device, algorithm, name):
    packed = Packed((130, 64, 300), (200, 10, 300), 4, 2, 64, gap=0, device=device)
    tensors, lengths = packed.qkv, packed.lengths
    if name == "seqlens_k":
        tensors = [x.transpose(0, 1)[None].contiguous() for x in tensors]
        lengths = {name: i32([150]).to(device)}
    out, lse = torch.ops.flash_ext.general_forward(*tensors, algorithm="v2", **lengths)
    given = (torch.randn_like(out), *tensors, out, lse)
    with pytest.raises(RuntimeError, match=f"algorithm 'v3' has no deterministic kernels with {name}"):
        backward(*given, algorithm=algorithm, deterministic=True, **lengths)
    automatic, v2 = (backward(*given, algorithm=x, deterministic=True, **lengths) for x in ("auto", "v2"))
    assert_same_bits(automatic, v2, "algorithm='auto'")
