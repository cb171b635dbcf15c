"""A graph is run with the values of some nodes changed, or as its teacher, and its outputs are told apart by place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from ti_fx.ir.edit import fork, input_names
from ti_fx.ir.outputs import model_outputs, named_leaves


class Replaced(Interpreter):
    """Runs a graph with the values of some nodes changed."""

    def __init__(self, gm: GraphModule, changes: Mapping[Node, Callable[[Tensor], Tensor]]) -> None:
        super().__init__(gm)
        self.changes = changes

    def run_node(self, n: Node) -> Any:
        """Run a node, and change what it gave if it is to be changed."""
        value = super().run_node(n)
        return self.changes[n](value) if n in self.changes else value


def as_teacher(gm: GraphModule, twins: Mapping[Node, Node]) -> GraphModule:
    """Return a fork that returns the teacher's values of the outputs."""
    teacher = fork(gm)
    nodes = {node.name: node for node in teacher.graph.nodes}
    output = teacher.graph.output_node()
    leaves = list(named_leaves(model_outputs(gm)).values())
    output.args = (tuple(nodes[twins.get(node, node).name] for node in leaves),)
    teacher.recompile()
    return teacher


def ordered(gm: GraphModule, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return a graph's inputs in its own order."""
    return [inputs[name] for name in input_names(gm)]


def tensors(outputs: Any) -> dict[str, Tensor]:
    """Return the output's tensors by their place among its tensors."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return {str(index): leaf for index, leaf in enumerate(leaves)}


def source_line(node: Node | None) -> str:
    """Return ``package/file.py:line`` of the model's code that made a node, as the counting mode writes it."""
    trace = "" if node is None else str(node.meta.get("stack_trace") or "")
    places = re.findall(r'File "(.*?)", line (\d+)', trace)
    for path, line in reversed(places):
        if "/torch/" not in path:
            return f"{path.rpartition('site-packages/')[2]}:{line}"
    return "unknown"
