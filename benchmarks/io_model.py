"""Bytes that naive attention, v1, v2 and v3 ask of the memory system in one forward call (no mask).

N is the sequence length, d the head dimension, per head; the papers' Theta(N d + N^2) against
Theta(N^2 d^2 / M), here with its constants. The model counts every pass over a tensor as if nothing
were cached: what the L2 cache absorbs is the distance between the model and the counters.
"""

FP32 = 4


def naive_bytes(case):
    """Four passes that touch N x N: S = QK^T written; S * scale read, written; softmax read, written;
    P read for PV. Reads Q, K, V once each and 3 N^2 elements; writes O and 3 N^2."""
    tensor = case.seqlen * case.head_dim * case.itemsize
    square = case.seqlen**2 * case.itemsize
    return _all_heads(case, read=3 * tensor + 3 * square, written=tensor + 3 * square)


def v1_bytes(case, block_n):
    """Algorithm 1: K and V once; for each of the N / block_n blocks of K and V, Q is read again and
    O, l and m (fp32) are read and written.

    O, l and m are also written once to begin with, and read once at the end, when the result and the
    logsumexp are written in their final types.
    """
    blocks = -(-case.seqlen // block_n)
    tensor = case.seqlen * case.head_dim * case.itemsize
    state = case.seqlen * (case.head_dim + 2) * FP32
    return _all_heads(
        case,
        read=2 * tensor + blocks * (tensor + state) + state,
        written=state + blocks * state + tensor + case.seqlen * FP32,
    )


def q_outer_bytes(case, block_m):
    """v2 and v3: Q once; K and V once for each of the N / block_m tiles of Q; O and the logsumexp written once.

    The tiles of one head run side by side, so K and V come from L2 for all but the first of them.
    """
    tiles = -(-case.seqlen // block_m)
    tensor = case.seqlen * case.head_dim * case.itemsize
    return _all_heads(case, read=tensor + 2 * tiles * tensor, written=tensor + case.seqlen * FP32)


def compulsory_bytes(case):
    """Each input read once, each output written once: what no exact attention can go below."""
    tensor = case.seqlen * case.head_dim * case.itemsize
    return _all_heads(case, read=3 * tensor, written=tensor)


def _all_heads(case, read, written):
    heads = case.batch * case.heads
    return heads * read, heads * written
