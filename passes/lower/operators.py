"""ONNX nodes as functions on tensors: each call becomes exactly the ONNX nodes it names when the graph is exported.

They only ever stand in the private copy that the exporter traces (see ``ti_fx.numerics.onnx_nodes``). What a node of
the domain ``ti_fx`` stands for is put in its place by ``ti_fx.export.file.markers`` after the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ti_fx.numerics.onnx_nodes import Size, cast, node, nodes, since_opset

MARKER_DOMAIN = "ti_fx"
MARKER = "Packed"
ZERO_CODES = 0b10101010  # four times the code 0, each stored as code + 2


@since_opset(18)
def packed(stored: Tensor, target: str, kind: str, shape: Size, dtype: torch.dtype) -> Tensor:
    """Mark a stored tensor as the packed graph's tensor ``target``, so that it is found again in the finished file.

    ``kind``: a layout of ``ti_fx.numerics.layouts``, ``scale`` or ``constant``. Of ``int2`` and its transposed twin,
    whose ``dtype`` is int8, a Cast of an INT2 initialiser is left; the other markers vanish.
    """
    attributes = {"target": target, "kind": kind} | (
        {"codes_shape": list(shape)} if dtype == torch.int8 else {}
    )
    return node(f"{MARKER_DOMAIN}::{MARKER}", (stored,), dtype, shape, **attributes)


@since_opset(18)
def codes_from_table(stored: Tensor, table: Tensor, shape: Sequence[int]) -> Tensor:
    """Return int8 codes from packed bytes by a table, ``(256, codes in a byte)``; done once, as the file is loaded.

    ``stored``: uint8, flat, or ``(rows, bytes)`` of a weight whose rows begin with a byte.
    """
    count = torch.Size(shape).numel()
    codes = torch.nn.functional.embedding(cast(stored, torch.int32), table)
    if codes.numel() == count:  # a needless step would leave one more copy of the codes behind
        return codes.reshape(tuple(shape))
    if stored.dim() == 2:
        return codes.flatten(1)[:, : shape[1]]
    return codes.reshape(-1)[:count].reshape(tuple(shape))


@since_opset(18)
def dequantised_weight(codes: Tensor, scale: Tensor, group: int = 0, offset: Tensor | None = None) -> Tensor:
    """Return the float32 ternary weight of int8 codes. ONNX Runtime folds it into a constant when it loads the file.

    ``group``: how many neighbours share a scale, ``(..., groups)``; 0: a row or the tensor has one. ``offset``, of the
    scale's shape, is added.

    DequantizeLinear is avoided on purpose: DequantizeLinear(INT2) + MatMul is fused into MatMulNBits with 8-bit
    activations, which is another computation.
    """
    return _scaled(codes, scale, group, offset)


def _scaled(codes: Tensor, scale: Tensor, group: int, offset: Tensor | None) -> Tensor:
    """Return codes times scale, and the offset added to it."""
    size = codes.shape[-1]
    value = cast(codes, torch.float32) * (_spread(scale, group, size) if group else scale)
    if offset is None:
        return value
    return value + (_spread(offset, group, size) if group else offset)


def _spread(scale: Tensor, times: int, size: int) -> Tensor:
    """Return a scale with each entry of the last dimension so many times beside itself, cut to ``size``."""
    if times == 1 and scale.shape[-1] == size:
        return scale
    repeated = scale.unsqueeze(-1).expand(*scale.shape, times).flatten(-2)
    return repeated if repeated.shape[-1] == size else repeated[..., :size]


@since_opset(18)
def gather_ternary(codes: Tensor, scale: Tensor, ids: Tensor, columns: int) -> Tensor:
    """Look rows up in a table that stays packed in memory.

    Args:
        codes: uint8 ``(rows, columns / 4)``, each code stored as code + 2.
        scale: float32 ``(rows, 1)`` or ``()``.
        ids: integers, any shape; one beyond the table is refused by a look-up beside it, as this operator would give
            zeros.
        columns: a multiple of 4.
    """
    nothing = torch.zeros(codes.shape[0], dtype=torch.uint8)
    ids = ids + cast(node("Gather", (nothing, ids), torch.uint8, ids.shape), ids.dtype)
    scale = scale.expand(codes.shape[0], 1)
    block = max(16, 1 << (columns - 1).bit_length())  # one block a row: the scale needs no repetition
    return node(
        "com.microsoft::GatherBlockQuantized",
        (codes, ids, scale),
        torch.float32,
        [*ids.shape, columns],
        bits=2,
        block_size=block,
        quantize_axis=1,
        gather_axis=0,
    )


@since_opset(18)
def look_up_by_table(
    codes: Tensor,
    scale: Tensor,
    table: Tensor,
    ids: Tensor,
    columns: int,
    group: int = 0,
    offset: Tensor | None = None,
) -> Tensor:
    """Look rows up in a table that stays packed in memory, with standard operators alone, as fast as the others do.

    Args:
        codes: uint8 ``(rows, bytes)``.
        scale: float32 ``(rows, 1)``, ``(rows, groups)`` or ``()``.
        table: int8 ``(256, codes in a byte)``.
        ids: integers, any shape.
        columns: codes in a row.
        group: how many neighbours share a scale, 0: a row or the table has one.
        offset: what is added, of the scale's shape.
    """
    stored = node("Gather", (codes, ids), torch.uint8, [*ids.shape, codes.shape[1]])
    found = torch.nn.functional.embedding(cast(stored, torch.int32), table).flatten(-2)
    if found.shape[-1] != columns:
        found = found[..., :columns]
    if scale.dim():
        scale = torch.nn.functional.embedding(ids, scale)
        offset = None if offset is None else torch.nn.functional.embedding(ids, offset)
    return _scaled(found, scale, group, offset)


@since_opset(18)
def block_linear(
    value: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    block: int,
    per_scale: int = 0,
) -> Tensor:
    """Return the linear layer of an activation, quantised by block within the operator, and a ternary weight.

    ONNX Runtime's MatMulNBits; the weight stays packed in memory. Two bits are fast at these blocks and accuracy
    level 4 alone: with blocks of 16 or 256, or another level, it takes 20 times as long.

    Args:
        value: float32 ``(..., inputs)``.
        codes: uint8 with ``outputs * inputs / 4`` elements, each code stored as code + 2, a row after the other; flat,
            or ``(outputs, blocks, block / 4)``.
        scale: float32 ``()``, ``(outputs, 1)`` or ``(outputs, groups)``; expanded in the graph, so the file holds it
            once.
        bias: float32 ``(outputs,)`` or None.
        shape: ``(outputs, inputs)``; inputs a multiple of 4.
        block: 32, 64 or 128.
        per_scale: blocks in a group, 0: a row or the tensor has one scale.
    """
    outputs, inputs = shape
    blocks = -(-inputs // block)
    if codes.dim() == 1:
        codes = codes.reshape(outputs, inputs // 4)
        if inputs % block:
            codes = torch.nn.functional.pad(codes, (0, (blocks * block - inputs) // 4), value=ZERO_CODES)
        codes = codes.reshape(outputs, blocks, block // 4)
    scale = _spread(scale, per_scale, blocks) if per_scale else scale.reshape(-1, 1).expand(outputs, blocks)
    given = [value, codes, scale]
    return node(
        "com.microsoft::MatMulNBits",
        given if bias is None else [*given, None, None, bias],
        torch.float32,
        [*value.shape[:-1], outputs],
        K=inputs,
        N=outputs,
        bits=2,
        block_size=block,
        accuracy_level=4,
        weight_prepacked=0,  # the default; 1.27 and older, which compute something else, don't know it and refuse it
    )


@since_opset(18)
def integer_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    per_token: bool,
) -> Tensor:
    """Return the linear layer of quantised activations and a ternary weight, summed in integers.

    Args:
        codes: from the quantiser of the activation (``Quantiser.codes``), ``(..., inputs)``.
        scale: from the same quantiser.
        zero_point: from the same quantiser: ``()``, or one a token, ``(..., 1)``. MatMulInteger of ONNX Runtime takes
            one for all, so those of tokens are subtracted afterwards, times the sums of the weight's columns.
        weight: int8 ``(inputs, outputs)``.
        weight_scale: float32 ``()`` or ``(outputs,)``.
        bias: float32 ``(outputs,)`` or None.
        per_token: whether ``scale`` has one entry per token.
    """
    shape = [*codes.shape[:-1], weight.shape[1]]
    of_tokens, zero = bool(zero_point.dim()), torch.zeros((), dtype=torch.uint8)
    total = node("MatMulInteger", (codes, weight, zero if of_tokens else zero_point), torch.int32, shape)
    if of_tokens:
        total = total - cast(zero_point, torch.int32) * cast(weight, torch.int32).sum(0, dtype=torch.int32)
    result = cast(total, torch.float32)
    # Per token in this order: with the scales multiplied first, ONNX Runtime 1.31 fuses MatMulIntegerToFloat and loses
    # the bias wherever the activation scale is per row.
    result = result * weight_scale * scale if per_token else result * (scale * weight_scale)
    return result if bias is None else result + bias


@since_opset(18)
def sum_for_norm(left: Tensor, right: Tensor) -> Tensor:
    """Add two tensors by ONNX Sum, which ONNX Runtime does not fuse with the LayerNormalization that follows.

    Its SkipLayerNormalization takes 5x the time of Sum and LayerNormalization together on the CPU (1.31).
    """
    return node("Sum", (left, right), left.dtype, (left + right).shape)


@since_opset(23)
def rms_norm(value: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise the last dimension by its root mean square: ONNX RMSNormalization (opset 23).

    Args:
        value: float32 ``(..., size)``.
        weight: float32 ``(size,)``.
        epsilon: added to the mean square.
    """
    return node("RMSNormalization", (value, weight), value.dtype, value.shape, axis=-1, epsilon=epsilon)


@since_opset(23)
def rotary(value: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> Tensor:
    """Rotate the halves of each head against each other: ONNX RotaryEmbedding (opset 23).

    Args:
        value: float32 ``(batch, length, heads * size)``, or ``(batch, heads, length, size)``.
        cosine: float32 ``(batch or 1, length, size / 2)``.
        sine: the same.
        heads: number of heads that ``value`` holds merged; 0: it has them apart.
    """
    batch = value.shape[0]
    tables = (cosine.expand(batch, -1, -1), sine.expand(batch, -1, -1))
    merged = {"num_heads": heads} if heads else {}
    return node("RotaryEmbedding", (value, *tables), value.dtype, value.shape, **merged)


@since_opset(23)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    heads: int,
    shared_heads: int,
) -> Tensor:
    """Multi-head attention: ONNX Attention (opset 23).

    Args:
        query: float32 ``(batch, length, heads * size)``, or ``(batch, heads, length, size)``.
        key: float32 ``(batch, key length, shared heads * size)``, or with the heads apart, as the query.
        value: as the key.
        mask: float32, added to the scores, ``(batch or 1, heads or 1, length, key length)``, or None.
        scale: factor of the scores.
        heads: number of the query's heads.
        shared_heads: number of the keys' and values' heads, which divides ``heads``.
    """
    inputs = (query, key, value) if mask is None else (query, key, value, mask)
    attributes = _attention_attributes(query, scale, heads, shared_heads)
    return node("Attention", inputs, query.dtype, _attended(query, value, heads, shared_heads), **attributes)


@since_opset(23)
def attention_with_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    heads: int,
    shared_heads: int,
    past_key: Tensor,
    past_value: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`attention`, after a cache of keys and values; returns the longer cache, too.

    Args:
        query: float32, as in :func:`attention`.
        key: the new tokens'.
        value: the new tokens'.
        mask: float32 ``(batch or 1, heads or 1, length, past + length)``, or None.
        scale: factor of the scores.
        heads: number of the query's heads.
        shared_heads: number of the keys' and values' heads.
        past_key: float32 ``(batch, shared heads, past, size)``.
        past_value: the same.
    """
    length = key.shape[1] if key.dim() == 3 else key.shape[2]
    longer = [
        [past.shape[0], past.shape[1], past.shape[2] + length, past.shape[3]]
        for past in (past_key, past_value)
    ]
    found = nodes(
        "Attention",
        (query, key, value, mask, past_key, past_value),
        (query.dtype,) * 3,
        (_attended(query, value, heads, shared_heads), *longer),
        **_attention_attributes(query, scale, heads, shared_heads),
    )
    return found[0], found[1], found[2]


def _attention_attributes(query: Tensor, scale: float, heads: int, shared_heads: int) -> dict[str, Any]:
    merged = {"q_num_heads": heads, "kv_num_heads": shared_heads} if query.dim() == 3 else {}
    return {"scale": scale, **merged}


def _attended(query: Tensor, value: Tensor, heads: int, shared_heads: int) -> Size:
    """Return the context's shape: as many heads as the query, of the values' size."""
    if query.dim() == 4:
        return [*query.shape[:3], value.shape[3]]
    return [*query.shape[:2], value.shape[2] // shared_heads * heads]
