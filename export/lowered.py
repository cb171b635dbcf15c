"""A packed graph becomes the graph that torch.onnx takes: its nodes are what the file computes."""

from __future__ import annotations

import os

from torch.fx import GraphModule

from ti_fx.errors import InputError
from ti_fx.export import arguments
from ti_fx.export.student import require_packed
from ti_fx.find.packed import weight_encodings
from ti_fx.ir.edit import fork, mode
from ti_fx.ir.facts import record_facts
from ti_fx.ir.pipeline import Pipeline
from ti_fx.ir.stages import LOWERED
from ti_fx.numerics.encodings import NEWEST_OPSET
from ti_fx.passes.lower import LOWER

OLDEST_OPSET = 18  # the oldest that torch.onnx writes


def lower(
    gm: GraphModule, opset: int | None = None, *, dump_dir: str | os.PathLike[str] | None = None
) -> GraphModule:
    """Return what a packed graph's ONNX file computes, as a graph of its own: dump it, compare it, draw it.

    It is in the stage LOWERED, and for eval mode. ONNX's own operators stand in it as functions of
    ``ti_fx.passes.lower.operators``, which give zeros in PyTorch; so it can be looked at, not run. The passes are those
    of ``ti_fx.passes.lower.LOWER``. Its stored codes are stand-ins of the right shape. ``gm`` and its tensors are left
    alone.

    Args:
        gm: a captured graph after ``Strip()`` and ``Pack()``.
        opset: as of :func:`ti_fx.export.to_onnx`.
        dump_dir: a folder for the graph's text before the first pass and after each.

    Raises:
        PreconditionError: the graph is not stripped and packed.
        InputError: there is no such opset.
        ExportError: ONNX, or this opset of it, can't express the graph; names the node.
    """
    require_packed(arguments.graph(gm))
    copy = fork(gm)
    copy._parameters, copy._buffers = dict(gm._parameters), dict(gm._buffers)
    copy._forward_pre_hooks.clear()
    copy._forward_pre_hooks_with_kwargs.clear()
    record_facts(copy, opset=opset_for(gm, opset))
    with mode(copy, False):
        Pipeline(*LOWER.passes, stage=LOWERED, dump_dir=dump_dir)(copy)
    return copy


def opset_for(gm: GraphModule, opset: int | None) -> int:
    """Return the opset of a packed graph's file: the one asked for, or what the encodings of its weights want.

    Raises:
        InputError: it is none that can be written.
    """
    if opset is None:
        return max(encoding.opset for encoding in weight_encodings(gm).values())
    if type(opset) is not int or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise InputError(
            f"opset is {opset!r}; use {OLDEST_OPSET} to {NEWEST_OPSET}, or None for the encoding's own"
        )
    return opset
