"""Give what is written in place a tensor of its own, so that the value before stays what it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.ir.edit import aten_name, written_arguments
from ti_fx.ir.memory import shares_with
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED

aten = torch.ops.aten


@dataclass(frozen=True)
class OutOfPlace(Pass):
    """An operator that writes into a value computes a new one: what was compared or read before is not overwritten.

    before:  %h = add_(%x, %y)                   after:  %h = add(%x, %y)
             %z = relu(%x)                               %z = relu(%h)

    Losses compare values of layers, interventions read them, and the derivative of a softmax is computed from its
    result: each needs the value as it was.

    1. where nothing else that shares the memory is read afterwards: no view of it, and what it is a view of not either
    2. not into inputs and stored tensors, whose new values others see
    3. where the new tensor has the same dtype, which an operator in place keeps
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Rewrite each, in order."""
        for node in list(gm.graph.nodes):
            name = aten_name(node)
            if not name.endswith("_") or name.startswith("_") or name == "detach_":  # which writes no value
                continue
            if len(written_arguments(node)) != 1:
                continue
            written = node.args[0]
            function = getattr(aten, name[:-1], None)
            overload = getattr(node.target, "_overloadname", "")
            if not isinstance(written, Node) or function is None or overload not in function.overloads():
                continue
            if _keeps_dtype(node, written) and _is_alone(node, written):
                node.target = getattr(function, overload)
                for user in [user for user in written.users if node < user]:
                    user.replace_input_with(written, node)


def _keeps_dtype(node: Node, written: Node) -> bool:
    """Whether the same operator out of place gives the dtype of what is written into."""
    into = written.meta["val"]
    others = [
        one.meta["val"]
        for one in node.all_input_nodes
        if isinstance(one.meta.get("val"), Tensor) and one is not written
    ]
    if not isinstance(into, Tensor) or not into.is_floating_point():
        return False
    return all(
        torch.promote_types(into.dtype, one.dtype) == into.dtype or (not one.dim() and not one.is_complex())
        for one in others
    )


def _is_alone(node: Node, written: Node) -> bool:
    """Whether nothing that shares the memory of what is written into is read after it, but by its own name."""
    root = written
    while (source := shares_with(root)) is not None:
        root = source
    if root.op in ("placeholder", "get_attr"):
        return False
    family, queue = {root}, [root]
    while queue:
        for user in queue.pop().users:
            if user is not node and user < node and user not in family and shares_with(user) in family:
                family.add(user)
                queue.append(user)
    return not any(node < user for one in family if one is not written for user in one.users)
