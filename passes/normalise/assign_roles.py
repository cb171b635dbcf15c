"""Give every node of a captured graph its first role."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx.ir import outputs, roles
from ti_fx.ir.checks import is_random
from ti_fx.ir.edit import written_arguments
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED


@dataclass(frozen=True)
class AssignRoles(Pass):
    """A node is shared if nothing trainable, stored or random is upstream of it, and the student's otherwise.

    before:  %mask = rsub(%attention_mask, 1)    after:  %mask = rsub(%attention_mask, 1)  #shared
             %h = linear(%x, %w)                         %h = linear(%x, %w)  #student

    1. reads of stored tensors, leaf modules, random numbers, the model's outputs, and what reads a student's value
    2. a tensor that the student writes into is the student's own: a twin writes into another
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Give roles from the inputs down, again for as long as the student is found to write into a shared tensor."""
        own: set[Node] = set()
        while True:
            _assign(gm, own)
            written = {
                base
                for node in gm.graph.nodes
                if roles.is_student(node)
                for base in _written(node)
                if not roles.is_student(base)
            }
            if not written:
                return
            own |= written


def _assign(gm: GraphModule, own: set[Node]) -> None:
    for node in gm.graph.nodes:
        student = (
            node in own
            or node.op in ("get_attr", "call_module", "output")
            or is_random(node)
            or outputs.is_container(node)
            or any(roles.is_student(source) for source in node.all_input_nodes)
        )
        roles.set_role(node, "student" if student else "shared")


def _written(node: Node) -> Iterator[Node]:
    """Yield what an in-place operator writes into, and what that is a view of."""
    for written in written_arguments(node):
        value: Any = written
        while isinstance(value, Node):
            if value.op == "placeholder":
                break
            yield value
            views = isinstance(value.target, torch._ops.OpOverload) and value.target.is_view
            value = value.args[0] if views or value.target is operator.getitem else None
