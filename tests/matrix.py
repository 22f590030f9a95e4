"""The values that the tests range over, and readable names for them."""

import torch

CAUSAL_MODES = ("none", "bottom_right", "top_left")
HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (*HALF_DTYPES, torch.float32)
HEAD_DIMS = (1, 2, 3, 5, 8, 16, 31, 40, 59, 64, 80, 96, 111, 128, 160, 192, 255, 256)
HEAD_GROUPS = ((1, 1), (2, 1), (4, 2), (6, 2), (8, 1), (7, 7), (12, 3))

# Which gradients are asked for: every subset but none.
NEEDS = [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False) if a or b or c]

# On the CPU the tiles are made small, so that short sequences cross many tile edges. On the GPU the tile
# belongs to the kernel, and the sequences are longer instead: see `length`.
CPU_TILE = (16, 16)

# Lengths as (tiles, remainder): around every tile edge, whatever the tile is.
EDGES = ((0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, -1), (2, 0), (2, 1), (3, 5))


def tile_edge(device):
    """Every tile side of that device's kernels is a multiple or a divisor of this."""
    return CPU_TILE[0] if device == "cpu" else 64


def length(edge, device):
    tiles, remainder = edge
    return tiles * tile_edge(device) + remainder


def edge_name(edge):
    return "{}t{:+}".format(*edge)


def heads_name(heads):
    return "h{}-{}".format(*heads)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def needs_name(needs):
    return "-".join(name for name, need in zip(("dq", "dk", "dv"), needs, strict=True) if need)
