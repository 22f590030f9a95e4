"""The building blocks of csrc/sm90 on a Hopper GPU, each alone and against plain torch: wgmma products, TMA
copies, the ring of buffers. tests/cuda holds the kernels, compiled here with nvcc alone.

What is multiplied are small integers, what is copied are random bits: every result is compared bit by bit.
"""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from calls import bits
from conftest import MISSING
from inputs import lay_out, with_absurd_strides
from matrix import HALF_DTYPES, dtype_name

from build_tools import check_kernels, toolchain

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("sm90_products.cu", "sm90_copies.cu")
HEAD_DIMS = (64, 96, 128, 192, 256)  # columns of a tile
BLOCKS = (64, 96, 128)  # rows of a tile of keys
SLAB_COLS = 64
POISON = -1  # 0xffff: NaN in both types
BEHIND = 1024  # poisoned bytes that a kernel dumps behind its tile

LAYOUTS = ("contiguous", "bshd", "sbhd", "packed_qkv", "gap8", "longer_cache")
# Sizes whose last tiles of rows are partial, for tiles of 64, 96 and 128 rows.
BATCH, HEADS, SEQLEN = 2, 3, 150


# ---- the kernels -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(path of the library, what nvcc said)"""
    major = (torch.version.cuda or "").partition(".")[0]
    toolkits = [t for t in toolchain.find_toolkits(os.environ) if t.version.startswith(f"{major}." if major else "")]
    if not toolkits:
        pytest.skip(f"{MISSING}nvcc {major}".rstrip())
    runtime = toolkits[0].runtime_library()
    library = tmp_path_factory.mktemp("sm90") / "pieces.so"
    command = [
        str(toolkits[0].nvcc), "--shared", "-o", str(library), f"-I{ROOT / 'csrc'}",
        *(str(ROOT / "tests" / "cuda" / source) for source in SOURCES),
        *toolchain.NVCC_FLAGS, *check_kernels.TORCH_FLAGS, *toolchain.gencode_flags(["sm_90a"]),
        f"--threads={min(len(SOURCES), toolchain.default_jobs())}",
        "-cudart=none", f"-L{runtime.parent}", f"-l:{runtime.name}", f"-Xlinker=-rpath,{runtime.parent}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    return library, log


@pytest.fixture(scope="session")
def library(compiled):
    return ctypes.CDLL(str(compiled[0]))


@pytest.fixture(scope="session")
def hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"{MISSING}an NVIDIA GPU of compute capability 9.0")


@pytest.fixture(scope="session")
def kernels(hopper, library):
    """call(name, *arguments): tensors go by address, integers as int64."""

    def call(name, *arguments):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        as_c = [
            ctypes.c_int64(x) if isinstance(x, int) else ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x) else x
            for x in arguments
        ]
        if message := function(*as_c):
            raise RuntimeError(f"{name}: {message.decode()}")

    return call


def tma_tensor(x):
    """struct Tensor of sm90_copies.cu"""
    batch, heads, seqlen, head_dim = x.shape
    return (ctypes.c_int64 * 8)(x.data_ptr(), batch, heads, seqlen, head_dim, *x.stride()[:3])


def test_the_kernels_compile_without_complaint(compiled):
    """No warning, no spill; and ptxas serialised no wgmma, for then a test of asynchrony would prove nothing."""
    lines, problems = check_kernels.read_log("tests/cuda", compiled[1])
    assert len(lines) > 50
    assert not problems
    assert "warning" not in compiled[1]


# ---- the layout of a tile ----------------------------------------------------------------------------------


def chunk_order(rows):
    """[row, position]: which chunk of eight columns lies there, of a slab's eight (sm90/smem_tile.cuh)."""
    return torch.arange(8) ^ torch.arange(rows)[:, None] % 8


def tile_image(x, fill):
    """The bits of a row-major matrix as they lie in an sm90::SmemTile; `fill` where it has no columns."""
    rows, cols = x.shape
    slabs = -(-cols // SLAB_COLS)
    padded = torch.full((rows, slabs * SLAB_COLS), fill, dtype=torch.int16)
    padded[:, :cols] = bits(x)
    chunks = padded.view(rows, slabs, 8, 8).transpose(1, 2)  # row, chunk, slab, element
    return chunks[torch.arange(rows)[:, None], chunk_order(rows)].permute(2, 0, 1, 3).reshape(-1)


def test_chunk_offset_is_the_layout_of_these_tests(library):
    """Needs no GPU: the C++ formula (here of a tile of 96 x 192) against tile_image()."""
    rows, cols = 96, 192
    numbers = torch.arange(rows * cols, dtype=torch.int16).view(rows, cols)
    image = tile_image(numbers, 0).tolist()
    for row in range(rows):
        for col in range(0, cols, 8):
            offset = library.chunk_offset(ctypes.c_int64(row), ctypes.c_int64(col))
            assert image[offset // 2 : offset // 2 + 8] == numbers[row, col : col + 8].tolist(), (row, col)


def assert_same(actual, expected, what):
    different = (actual != expected).nonzero()
    assert len(different) == 0, f"{what}: {len(different)} of {actual.numel()} differ, first {different[0].tolist()}"


# ---- products ----------------------------------------------------------------------------------------------


def integers(*shape):
    """Exact in every type, and so are all sums of their products."""
    return torch.randint(-8, 9, shape).float()


@pytest.mark.parametrize("n", BLOCKS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_gemm_abt(kernels, dtype, head_dim, n):
    """A B^T of two tiles in shared memory. All beside the operands, and the accumulator at first, is NaN."""
    for a_index in (0, 1):
        a, b = integers(64, head_dim), integers(n, head_dim)
        images = [tile_image(x.to(dtype), POISON).cuda() for x in (a, b)]
        out = torch.empty(64, n, device="cuda")
        kernels("gemm_abt", HALF_DTYPES.index(dtype), n, head_dim, *images, a_index, out)
        assert_same(out.cpu(), a @ b.T, f"A at {a_index}, B at {1 - a_index}")


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("k", BLOCKS)
@pytest.mark.parametrize("n", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_gemm_ab(kernels, dtype, n, k, accumulates):
    """A B, A packed from an accumulator's registers. Without `accumulates` the accumulator is NaN at first."""
    for b_index in (0, 1):
        a, b, c = integers(64, k), integers(k, n), 1000 * integers(64, n)
        image = tile_image(b.to(dtype), POISON).cuda()
        out = torch.empty(64, n, device="cuda")
        c_there = c.cuda() if accumulates else None
        kernels("gemm_ab", HALF_DTYPES.index(dtype), k, n, a.cuda(), image, b_index, c_there, out)
        assert_same(out.cpu(), a @ b + c if accumulates else a @ b, f"B at {b_index}")


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("k", [64, 128])
@pytest.mark.parametrize("n", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_gemm_ab_of_two_tiles(kernels, dtype, n, k, accumulates):
    """A B, A being half of the rows of a tile in shared memory, whose other half is NaN."""
    for row0 in (0, 64):
        a, b, c = integers(64, k), integers(k, n), 1000 * integers(64, n)
        images = [tile_image(x.to(dtype), POISON).cuda() for x in (a, b)]
        out = torch.empty(64, n, device="cuda")
        c_there = c.cuda() if accumulates else None
        kernels("gemm_ab_shared", HALF_DTYPES.index(dtype), k, n, images[0], row0, images[1], c_there, out)
        assert_same(out.cpu(), a @ b + c if accumulates else a @ b, f"A from row {row0}")


# ---- TMA loads ---------------------------------------------------------------------------------------------


def random_bits(*shape):
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)


def place(x, layout):
    """A copy on the GPU with rows that begin at multiples of 16 bytes, and with poison around it."""
    head_dim = x.shape[-1]
    rows = torch.full((*x.shape[:-1], -(-head_dim // 8) * 8), POISON, dtype=x.dtype)
    rows[..., :head_dim] = x
    return lay_out(rows.cuda(), layout, POISON)[..., :head_dim]


def check_load(kernels, x, rows, cols, dtype=HALF_DTYPES[0]):
    """Every tile of every head, and one tile behind the last row, comes with zeros outside the tensor."""
    batch, heads, seqlen, head_dim = x.shape
    row_tiles = -(-seqlen // rows) + 1
    whole = torch.zeros(batch, heads, row_tiles * rows, cols, dtype=torch.int16)
    whole[:, :, :seqlen, :head_dim] = x.cpu()
    tiles = whole.view(-1, rows, cols)
    images = torch.stack([tile_image(tile, 0) for tile in tiles])
    dump = torch.zeros(len(tiles), images.shape[1] + BEHIND // 2, dtype=torch.int16, device="cuda")
    kernels("load_tiles", HALF_DTYPES.index(dtype), rows, cols, tma_tensor(x), row_tiles, dump)
    dump = dump.cpu()
    assert_same(dump[:, : images.shape[1]], images, f"[tile, element] of {batch} x {heads} x {row_tiles} tiles")
    assert bool((dump[:, images.shape[1] :] == POISON).all()), "something was written behind the tile"


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("cols", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_load_every_tile_shape(kernels, dtype, cols, rows):
    check_load(kernels, place(random_bits(BATCH, HEADS, SEQLEN, cols), "bshd"), rows, cols, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("head_dim", "cols"), [(1, 64), (33, 64), (40, 64), (72, 96), (96, 96), (111, 128), (136, 192), (200, 256)]
)
def test_load_pads_with_zeros(kernels, head_dim, cols, layout):
    """Columns past head_dim and rows past seqlen, whatever lies there in memory."""
    check_load(kernels, place(random_bits(BATCH, HEADS, SEQLEN, head_dim), layout), 64, cols)


@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 128])
def test_load_lengths(kernels, seqlen):
    check_load(kernels, place(random_bits(BATCH, HEADS, seqlen, 40), "longer_cache"), 64, 64)


@pytest.mark.parametrize("sizes", [(1, HEADS, SEQLEN), (BATCH, 1, SEQLEN), (BATCH, HEADS, 1), (1, 1, 1)])
def test_load_where_a_dimension_of_size_1_has_any_stride(kernels, sizes):
    """PyTorch leaves such strides undefined; these are no multiples of 16 bytes, which TMA would refuse."""
    check_load(kernels, with_absurd_strides(place(random_bits(*sizes, 72), "bshd")), 64, 96)


@pytest.mark.parametrize("stride0", [(0,), (1,), (2,), (0, 1, 2)], ids=["batch", "heads", "seqlen", "all"])
def test_load_of_an_expanded_tensor(kernels, stride0):
    """Stride 0 where the size is above 1, such as K and V of one head expanded to many.

    "cuTensorMapEncodeTiled failed" here means that the driver refuses stride 0, and a difference in the tiles
    that TMA misreads it. In either case v3/refusal.h must turn such tensors down, which it does not now.
    """
    sizes = [BATCH, HEADS, SEQLEN]
    once = [1 if dim in stride0 else size for dim, size in enumerate(sizes)]
    x = place(random_bits(*once, 72), "contiguous").expand(*sizes, 72)
    assert [dim for dim in range(3) if x.stride(dim) == 0] == list(stride0)
    check_load(kernels, x, 64, 96)


# ---- stores ------------------------------------------------------------------------------------------------


def check_store(kernels, out, cols, dtype):
    """`out` is a view of poisoned memory: exactly its elements are written, and the tiles hold what was sent."""
    batch, heads, seqlen, head_dim = out.shape
    row_tiles = -(-seqlen // 64) + 1
    accumulators = torch.randn(batch, heads, row_tiles * 64, cols)
    factors = torch.randn(batch, heads, row_tiles * 64)
    values = bits((accumulators * factors[..., None]).to(dtype))
    memory = torch.empty(0, dtype=torch.int16, device="cuda").set_(out.untyped_storage())
    assert bool((memory == POISON).all())
    expected = memory.cpu()
    expected.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(values[:, :, :seqlen, :head_dim])

    images = torch.stack([tile_image(tile, POISON) for tile in values.view(-1, 64, cols)])
    dump = torch.zeros(len(images), images.shape[1] + BEHIND // 2, dtype=torch.int16, device="cuda")
    arguments = (tma_tensor(out), row_tiles, accumulators.cuda(), factors.cuda(), dump)
    kernels("store_tiles", HALF_DTYPES.index(dtype), cols, *arguments)
    dump = dump.cpu()
    assert_same(dump[:, : images.shape[1]], images, "store_accumulator, [tile, element]")
    assert bool((dump[:, images.shape[1] :] == POISON).all()), "something was written behind the tile"
    assert_same(memory.cpu(), expected, "store_slabs, [element of the storage]")


def poisoned(*shape):
    return torch.full(shape, POISON, dtype=torch.int16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cols", HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=dtype_name)
def test_store_every_tile_shape(kernels, dtype, cols, layout):
    check_store(kernels, place(poisoned(BATCH, HEADS, SEQLEN, cols), layout), cols, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("head_dim", "cols"), [(8, 64), (40, 64), (72, 96), (104, 128), (136, 192), (200, 256)])
def test_store_clips_at_head_dim(kernels, head_dim, cols, layout):
    """In whole pieces of 16 bytes, no finer: v3/refusal.h turns other head_dims away."""
    check_store(kernels, place(poisoned(BATCH, HEADS, SEQLEN, head_dim), layout), cols, HALF_DTYPES[1])


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 63, 64, 65])
def test_store_clips_at_seqlen(kernels, seqlen):
    """A warp's 16 rows may lie inside, across the end or past it."""
    check_store(kernels, place(poisoned(BATCH, HEADS, seqlen, 40), "longer_cache"), 64, HALF_DTYPES[1])


@pytest.mark.parametrize("sizes", [(1, HEADS, SEQLEN), (BATCH, 1, SEQLEN), (BATCH, HEADS, 1), (1, 1, 1)])
def test_store_where_a_dimension_of_size_1_has_any_stride(kernels, sizes):
    check_store(kernels, with_absurd_strides(place(poisoned(*sizes, 72), "bshd")), 96, HALF_DTYPES[1])


# ---- the ring ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [1, 3, 4, 5, 500])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_ring(kernels, stages, items):
    """Each of four warps, all at their own pace, sees every item once, whole and in order.

    All elements of item i are i + 1: the sum tells which item it was, and that no part was of another.
    """
    numbers = torch.arange(items) + 1
    x = numbers.half().repeat_interleave(8)[:, None].repeat(1, 64)[None, None].cuda()
    sums = torch.zeros(4, items, dtype=torch.int32, device="cuda")
    kernels("walk_ring", stages, tma_tensor(x), items, sums)
    assert_same(sums.cpu(), (8 * 64 * numbers).expand(4, -1), "[warp, item]")
