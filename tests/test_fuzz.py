"""Random cases: all arguments at once. A failure prints the case, the line that repeats it, and the
smallest case found that fails as well.

    python -m pytest tests/test_fuzz.py --fuzz-cases 10000
"""

import math
import random
from dataclasses import dataclass, fields, replace

import torch
from calls import ALGORITHMS, CPU_ALGORITHMS, assert_same_bits, backward, forward, missing_for, serves
from inputs import ALIGNED_LAYOUTS, FAMILIES, LAYOUTS, Shape, lay_out, make_qkv_dout, with_absurd_strides
from matrix import CAUSAL_MODES, DTYPES, HALF_DTYPES, HEAD_DIMS, tile_edge
from numerics import check_forward, check_gradients

NAMES = ("q", "k", "v", "dout")
MAX_SCORES = {"cpu": 1 << 16, "cuda": 1 << 21}
NEEDS = ((True, True, True), (True, True, True), (True, False, False), (False, True, True), (False, True, False))
EXPANSIONS = ("none", "none", "none", "batch", "heads", "rows")


@dataclass(frozen=True)
class Case:
    """Everything that varies."""

    batch: int
    heads_kv: int
    group: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: torch.dtype
    family: str
    causal: str
    scale: float | None
    algorithm: str
    deterministic: bool
    layouts: tuple  # of q, k, v, dout
    expanded: str  # one tensor: the errors of equal rows add up, and two would make all rows equal
    expansion: str
    poison: float
    with_dlse: bool
    needs: tuple
    tile: tuple | None
    threads: int

    @property
    def shape(self):
        heads = self.heads_kv * self.group
        return Shape(self.batch, heads, self.heads_kv, self.seqlen_q, self.seqlen_k, self.head_dim)

    @property
    def is_served(self):
        return all(serves(self.algorithm, "cuda", self.dtype, self.head_dim, layout) for layout in self.layouts)


def draw_length(rng, device):
    edge = tile_edge(device)
    if rng.random() < 0.4:
        return rng.choice([0, 1, edge - 1, edge, edge + 1, 2 * edge - 1, 2 * edge, 2 * edge + 1, 4 * edge + 1])
    return round(math.exp(rng.uniform(0, math.log(10 * edge))))


def draw(rng, device):
    on_cpu = device == "cpu"
    algorithms = CPU_ALGORITHMS if on_cpu else [name for name in ALGORITHMS if not missing_for(name)]
    algorithm = rng.choice(algorithms)
    head_dim = rng.choice(HEAD_DIMS) if rng.random() < 0.6 else rng.randint(1, 256)
    dtypes, layouts = [*DTYPES, torch.float64] if on_cpu else DTYPES, tuple(LAYOUTS)
    if algorithm == "v3":
        head_dim, dtypes, layouts = (head_dim + 7) // 8 * 8, HALF_DTYPES, ALIGNED_LAYOUTS
    seqlen_q, seqlen_k = draw_length(rng, device), draw_length(rng, device)
    if rng.random() < 0.3:
        seqlen_k = seqlen_q
    heads_kv, group = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3, 4, 7])
    scores = max(1, seqlen_q * seqlen_k * heads_kv * group)
    batch = min(rng.choice([0, 1, 1, 1, 2, 3, 5]), max(1, MAX_SCORES[device] // scores))
    return Case(
        batch=batch,
        heads_kv=heads_kv,
        group=group,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        dtype=rng.choice(dtypes),
        family=rng.choice(list(FAMILIES)),
        causal=rng.choice(CAUSAL_MODES),
        scale=rng.choice([None, None, None, 0.0, -0.2, 0.05, 1.0]),
        algorithm=algorithm,
        deterministic=rng.random() < 0.5,
        layouts=tuple(rng.choice(layouts) for _ in range(4)),
        expanded=rng.choice(NAMES),
        expansion=rng.choice(EXPANSIONS),
        poison=rng.choice([math.nan, math.inf, 1e4, 0.0]),
        with_dlse=rng.random() < 0.3,
        needs=rng.choice(NEEDS),
        tile=(rng.randint(1, 40), rng.randint(1, 40)) if on_cpu and rng.random() < 0.5 else None,
        threads=rng.choice([1, 1, 1, 1, 1, 2, 3]) if on_cpu else 1,
    )


def expand(x, expansion):
    dim = {"batch": 0, "heads": 1, "rows": 2}.get(expansion)
    if dim is None or x.shape[dim] == 0:
        return x
    return x.narrow(dim, 0, 1).expand_as(x)


def place(x, layout, expansion, poison):
    if x.numel() == 0:
        return x
    return with_absurd_strides(expand(lay_out(x, layout, poison), expansion))


def run(case, device, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(case.threads)
    try:
        plain = make_qkv_dout(case.shape, case.dtype, device, case.family)
        expansions = [case.expansion if name == case.expanded else "none" for name in NAMES]
        how = zip(plain, case.layouts, expansions, strict=True)
        tensors = [place(x, layout, expansion, case.poison) for x, layout, expansion in how]
        before = [x.clone() for x in tensors]
        q, k, v, dout = tensors
        masking = {"causal": case.causal, "scale": case.scale}
        out, lse = forward(q, k, v, algorithm=case.algorithm, tile=case.tile, **masking)
        dlse = torch.randn_like(lse) if case.with_dlse else None
        options = {"algorithm": case.algorithm, "deterministic": case.deterministic}
        options |= {"needs": case.needs, "tile": case.tile}
        gradients = backward(dout, q, k, v, out, lse, dlse=dlse, **options, **masking)
        gradients = [x if need else None for x, need in zip(gradients, case.needs, strict=True)]

        assert_same_bits(tensors, before, "inputs after the call")
        check_forward(out, lse, q, k, v, **masking)
        check_gradients(gradients, q, k, v, dout, dlse=dlse, **masking)
    finally:
        torch.set_num_threads(1)


# ---- shrinking -----------------------------------------------------------------------------------

SIMPLEST = Case(
    batch=1, heads_kv=1, group=1, seqlen_q=1, seqlen_k=1, head_dim=1, dtype=torch.float32, family="randn",
    causal="none", scale=None, algorithm="v2", deterministic=True, layouts=("contiguous",) * 4,
    expanded="q", expansion="none", poison=0.0, with_dlse=False, needs=(True,) * 3, tile=None, threads=1,
)  # fmt: skip


def simpler(case):
    """Cases with one field replaced by its simplest value, or halved."""
    for field in fields(Case):
        value, simplest = getattr(case, field.name), getattr(SIMPLEST, field.name)
        candidates = [simplest]
        if type(value) is int:
            candidates += [value // 2, value - 8, value - 1]
        for candidate in candidates:
            if candidate != value and (type(value) is not int or candidate >= 1):
                changed = replace(case, **{field.name: candidate})
                if changed.is_served:
                    yield changed


def fails(case, device, seed):
    try:
        run(case, device, seed)
    except Exception:
        return True
    return False


def shrink(case, device, seed, attempts=1000):
    """Greedy: take the first simpler case that fails too, until none does."""
    while attempts:
        for candidate in simpler(case):
            attempts -= 1
            if not attempts or fails(candidate, device, seed):
                break
        else:
            return case
        if attempts:
            case = candidate
    return case


def test_random_case(device, fuzz_seed):
    case = draw(random.Random(fuzz_seed), device)
    try:
        run(case, device, fuzz_seed)
    except Exception as error:
        raise AssertionError(
            f"{type(error).__name__}: {error}\n"
            f"  case    {case}\n"
            f"  repeat  python -m pytest 'tests/test_fuzz.py::test_random_case[{device}-{fuzz_seed}]' "
            f"--fuzz-cases {fuzz_seed + 1}\n"
            f"  smaller {shrink(case, device, fuzz_seed)}"
        ) from error


def test_shrinking_finds_the_smallest_case(monkeypatch):
    """The shrinker itself, on a planted failure."""
    case = draw(random.Random(3), "cpu")
    case = replace(case, seqlen_k=77, causal="top_left")

    def planted(case, device, seed):
        return case.seqlen_k >= 17 and case.causal == "top_left"

    monkeypatch.setitem(globals(), "fails", planted)
    assert shrink(case, "cpu", 0) == replace(SIMPLEST, seqlen_k=17, causal="top_left")
