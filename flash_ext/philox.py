"""The dropout mask of csrc/common/philox.h in plain torch: for the reference and for replays."""

import torch

_MASK32 = 0xFFFFFFFF


def _product(a, b):
    """High and low 32 bits of a * b; b is an int64 tensor of 32-bit numbers."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b  # below 2^48: no overflow
    middle = (low >> 16) + high
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _MASK32


def philox4x32_7(key, counter):
    """Philox4x32-7 of a 64-bit key and four broadcastable int64 tensors of 32-bit numbers."""
    key0, key1 = key & _MASK32, (key >> 32) & _MASK32
    c0, c1, c2, c3 = counter
    for _ in range(7):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def dropout_factor(dropout_p, rng_state, batch, heads, rows, columns):
    """What dropout multiplies the softmax by: 0 or 1 / (1 - p), fp64, (batch, heads, rows, columns).

    `rows` is a range; p is `dropout_p` rounded to a multiple of 2^-16.
    """
    seed, offset = rng_state.tolist()
    device = rng_state.device
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    row = torch.arange(rows.start, rows.stop, device=device).view(-1, 1)
    column = torch.arange(columns, device=device)
    group_row, group_column = ((row >> 4) << 3) | (row & 7), ((column >> 5) << 3) | (column & 7)
    offset = torch.full((1,), offset & _MASK32, device=device)
    words = torch.broadcast_tensors(*philox4x32_7(seed, (group_column, group_row, head, offset)))
    word = torch.stack(words).gather(0, ((column >> 3) & 3).expand(1, *words[0].shape))[0]
    number = torch.where(row & 8 != 0, word >> 16, word & 0xFFFF)
    threshold = int(dropout_p * 65536 + 0.5)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return torch.where(number >= threshold, scale, 0.0).double()
