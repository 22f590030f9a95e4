"""Counts that follow from the shape alone: visible scores, FLOPs, bytes through device memory.

`causal` is the operators' spelling of the mask: "none", "bottom_right" or "top_left".
"""


def _diagonal(seqlen_q, seqlen_k, causal):
    """Row i sees the keys j <= i + diagonal."""
    return {"none": seqlen_k, "bottom_right": seqlen_k - seqlen_q, "top_left": 0}[causal]


def _keys_of_row(row, seqlen_k, diagonal):
    return min(max(row + 1 + diagonal, 0), seqlen_k)


def _sum_of_clamped(first, count, upper):
    """The sum of `count` consecutive integers from `first` on, each clamped to 0..upper."""
    below = min(max(-first, 0), count)
    above = min(max(first + count - 1 - upper, 0), count - below)
    inside = count - below - above
    return inside * (2 * (first + below) + inside - 1) // 2 + above * upper


def visible_scores(seqlen_q, seqlen_k, causal="none", window=(-1, -1)):
    """How many elements of one seqlen_q x seqlen_k score matrix the causal mask and the window leave.

    Row i stands at key i + diagonal, which is in the bottom right corner for the last row also without
    a causal mask.
    """
    left, right = window
    right = 0 if causal != "none" else right
    diagonal = _diagonal(seqlen_q, seqlen_k, "bottom_right" if causal == "none" else causal)
    ends = seqlen_q * seqlen_k if right < 0 else _sum_of_clamped(diagonal + right + 1, seqlen_q, seqlen_k)
    begins = 0 if left < 0 else _sum_of_clamped(diagonal - left, seqlen_q, seqlen_k)
    return ends - begins


def forward_flops(batch, heads, seqlen_q, seqlen_k, head_dim, causal="none", window=(-1, -1)):
    """Floating-point operations of the two matrix products, over visible scores only."""
    return 4 * batch * heads * visible_scores(seqlen_q, seqlen_k, causal, window) * head_dim


def forward_v1_traffic(batch, heads, seqlen_q, seqlen_k, head_dim, itemsize, block_n, causal="none"):
    """Bytes (read, written) that v1 asks of device memory, had the GPU no cache.

    K and V are read once. O, l and m (fp32) are initialised once; for each block of block_n keys, every
    query row that sees it reads Q, and reads and writes O, l and m; at the end they are read once more to
    write the result and the logsumexp.
    """
    diagonal = _diagonal(seqlen_q, seqlen_k, causal)
    first_rows = (min(max(key - diagonal, 0), seqlen_q) for key in range(0, seqlen_k, block_n))
    steps = sum(seqlen_q - row for row in first_rows)
    row, state = head_dim * itemsize, 4 * (head_dim + 2)
    read = 2 * seqlen_k * row + steps * (row + state) + seqlen_q * state
    written = seqlen_q * state + steps * state + seqlen_q * (row + 4)
    return batch * heads * read, batch * heads * written


def forward_q_outer_traffic(batch, heads, seqlen_q, seqlen_k, head_dim, itemsize, block_m, causal="none"):
    """Bytes (read, written) that v2 and v3 ask of device memory, had the GPU no cache.

    Each tile of block_m query rows reads Q once and the visible part of K and V, and writes O and the
    logsumexp once.
    """
    diagonal = _diagonal(seqlen_q, seqlen_k, causal)
    last_rows = (min(row + block_m, seqlen_q) - 1 for row in range(0, seqlen_q, block_m))
    keys_read = sum(_keys_of_row(row, seqlen_k, diagonal) for row in last_rows)
    row = head_dim * itemsize
    return batch * heads * (seqlen_q + 2 * keys_read) * row, batch * heads * seqlen_q * (row + 4)
