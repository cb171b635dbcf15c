"""Towers are found by data flow: a block belongs to the stack of blocks that its residual stream comes from."""

from __future__ import annotations

from torch.fx import Node

from ti_fx.find.walk import Walk, is_float
from ti_fx.ir.edit import aten_name


class Towers:
    """Which tower's blocks have been numbered, by the node that a block leaves its result in."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.owner: dict[Node, int] = {}

    def add(self, result: Node, stack: int) -> None:
        """Note the tower of a block by what the block leaves."""
        self.owner[result] = stack

    def of(self, start: Node) -> int | None:
        """Return the tower that a block reading this stream belongs to, None if it begins one."""
        walk = self.walk
        # along the stream itself: what adds to it, normalises it or moves its values
        near = walk.backward(
            start,
            lambda node: node in self.owner,
            lambda node: (
                node in walk.computed
                and is_float(node)
                and (walk.is_transparent(node) or walk.is_norm(node) or walk.is_elementwise(node))
            ),
        )
        stacks = {self.owner[node] for node in near}
        if len(stacks) == 1:
            return stacks.pop()
        # through a projection between the stages of one tower; but not where another input comes in
        ends = walk.backward(
            start,
            lambda node: node in self.owner or _brings_in(walk, node),
            lambda node: node in walk.computed and is_float(node),
        )
        stacks = {self.owner.get(node, -1) for node in ends}
        return stacks.pop() if len(stacks) == 1 and -1 not in stacks else None


def _brings_in(walk: Walk, node: Node) -> bool:
    """Whether a node is a floating-point input, or looks up an input's embeddings."""
    if node.op == "placeholder":
        return is_float(node)
    return aten_name(node) == "embedding" and node in walk.active
