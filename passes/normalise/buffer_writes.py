"""Let a module of the graph's own write into a buffer where the model's code does, in the same modes."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.errors import WriteError
from ti_fx.ir import leaves
from ti_fx.ir.edit import ancestors, aten_name, call_module, register, stored, supersede, written_arguments
from ti_fx.ir.facts import facts
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED


@dataclass(frozen=True)
class BufferWrites(Pass):
    """What writes into a buffer is a small module, which writes in training, or always where the model does.

    before:  %sum = add(%count, 1)                after:  %sum = add(%count, 1)
             %copy_ = copy_(%count, %sum)                 %copy_ = BufferWrite{copy_.default}(%count, %sum)

    1. a write into a buffer or a view of one; ``written`` of the graph's facts are those that evaluation writes into
    2. a buffer in whose place the model puts another tensor, which torch.export copies into it at the end, is written
       where that tensor is made, and who reads the tensor reads the buffer: evaluation has no other
    3. refused: a write into a Parameter, which an optimiser moves; and a buffer that evaluation writes into and that
       the outputs depend on, so that they would be others at each call, which no exported file can do

    A graph that was traced in eval mode has the writes of evaluation alone.
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Replace each such write, in graph order.

        Raises:
            WriteError: a write that has no place in a graph; names the tensor and the line.
        """
        result = gm.graph.output_node()
        at_the_end = set(itertools.takewhile(_is_copy, _before(result)))
        for node in list(gm.graph.nodes):
            read = next((base for part in written_arguments(node) if (base := _stored_base(gm, part))), None)
            if read is None:
                continue
            where = _line(node)
            if isinstance(stored(gm, read), nn.Parameter):
                raise WriteError(
                    f"forward writes into the parameter {read.target}{where}, which training moves, too; keep such "
                    "numbers in a buffer, or leave that write out of the model"
                )
            always = not gm.training or str(read.target) in facts(gm).written
            if always and read in ancestors([result]):
                raise WriteError(
                    f"forward writes into the buffer {read.target} in evaluation{where}, and its outputs depend on it: "
                    "they would be others at each call; write in training alone, or make it an input and an output"
                )
            written = _replace(gm, node, always)
            if not always and node in at_the_end:
                _write_early(written, read)


def _replace(gm: GraphModule, node: Node, always: bool) -> Node:
    assert isinstance(node.target, torch._ops.OpOverload)
    if any(isinstance(value, Node) for value in node.kwargs.values()):
        raise WriteError(f"%{node.name} writes into a buffer by a keyword{_line(node)}; give it by position")
    name = node.target._schema.name.removeprefix("aten::")
    leaf = leaves.BufferWrite(f"{name}.{node.target._overloadname}", dict(node.kwargs), always)
    target = f"leaves.{node.name}"
    leaf.train(gm.training)
    register(gm, target, leaf)
    made = call_module(node, target, node.args)
    supersede(node, made)
    return made


def _before(node: Node) -> Iterator[Node]:
    while (node := node.prev).op != "root":
        yield node


def _is_copy(node: Node) -> bool:
    return aten_name(node) == "copy_"


def _write_early(written: Node, read: Node) -> None:
    """Move a write to where its value is made, unless the buffer's own value is read after that."""
    value: Any = written.args[1]
    if not isinstance(value, Node) or any(value < user for user in read.users if user is not written):
        return
    value.append(written)
    for user in [user for user in value.users if user is not written]:
        user.replace_input_with(value, written)


def _stored_base(gm: GraphModule, node: Node) -> Node | None:
    """Return the read of the stored tensor that a node is, or is a view of; None if it is none."""
    value: Any = node
    while isinstance(value, Node) and value.op != "get_attr":
        value = value.args[0] if value.args and _is_its_input(gm, value) else None
    return value if isinstance(value, Node) else None


def _is_its_input(gm: GraphModule, node: Node) -> bool:
    """Whether a node gives the memory of its first input: a view of it, or what was written into it."""
    if node.op == "call_module":
        return leaves.is_buffer_write(gm, node)
    views = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return views or node.target is operator.getitem or bool(written_arguments(node))


def _line(node: Node) -> str:
    """Return `` (file:line)`` of the model's code that a node was traced from, as far as the trace says."""
    found = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace", "")))
    return f" ({found[-1][0].rpartition('/')[2]}:{found[-1][1]})" if found else ""
