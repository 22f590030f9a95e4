"""What torch's tools need to know about the operators: batching rules for vmap, formulas for FLOPs."""

import torch
from torch.utils.flop_counter import register_flop_formula

import flash_ext.extension  # noqa: F401  (registers the operators)

_forward = torch.ops.flash_ext.forward
_backward = torch.ops.flash_ext.backward
_general_forward = torch.ops.flash_ext.general_forward
_general_backward = torch.ops.flash_ext.general_backward


# FLOPs: the convention of torch's own formulas for scaled_dot_product_attention, which count every
# score whatever the mask, and five matrix products in the backward pass against two in the forward.


@register_flop_formula(_forward)
def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    batch, heads, seqlen_q, head_dim = q_shape
    return 4 * batch * heads * seqlen_q * k_shape[2] * head_dim


@register_flop_formula(_backward)
def _backward_flops(dout_shape, q_shape, k_shape, *args, out_shape=None, **kwargs):
    batch, heads, seqlen_q, head_dim = q_shape
    return 10 * batch * heads * seqlen_q * k_shape[2] * head_dim


@register_flop_formula(_general_forward, get_raw=True)
def _general_forward_flops(*args, out_val=None, **kwargs):
    return 4 * _multiply_adds(_general_forward, args, kwargs)


@register_flop_formula(_general_backward, get_raw=True)
def _general_backward_flops(*args, out_val=None, **kwargs):
    return 10 * _multiply_adds(_general_backward, args, kwargs)


def _multiply_adds(operator, args, kwargs):
    """Of one product. The lengths of packed sequences are on the device, for which this waits."""
    names = (argument.name for argument in operator.default._schema.arguments)
    given = dict(zip(names, args, strict=False)) | kwargs
    q, k = given["q"], given["k"]
    if given.get("cu_seqlens_q") is None:
        return q.numel() * k.shape[2]
    lengths = (given[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    return q.shape[1] * q.shape[2] * sum(m * n for m, n in zip(*lengths, strict=True))


# vmap: the mapped dimension becomes part of the batch.


def _fold(tensor, dim, size):
    """(batch, ...) with `size` copies along `dim` (None: shared by all) -> (size * batch, ...)."""
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


@torch.library.register_vmap("flash_ext::forward")
def _forward_vmap(info, in_dims, q, k, v, *options):
    tensors = (_fold(x, dim, info.batch_size) for x, dim in zip((q, k, v), in_dims, strict=False))
    results = _forward(*tensors, *options)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0)


@torch.library.register_vmap("flash_ext::backward")
def _backward_vmap(info, in_dims, dout, q, k, v, out, lse, dlse=None, *options):
    inputs = zip((dout, q, k, v, out, lse, dlse), in_dims, strict=False)
    folded = (None if x is None else _fold(x, dim, info.batch_size) for x, dim in inputs)
    gradients = _backward(*folded, *options)
    # A gradient that was not asked for is empty and has no batch.
    is_empty = [x.dim() == 1 for x in gradients]
    results = (
        x if empty else x.unflatten(0, (info.batch_size, -1))
        for x, empty in zip(gradients, is_empty, strict=True)
    )
    return tuple(results), tuple(None if empty else 0 for empty in is_empty)
