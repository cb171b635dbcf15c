"""Write stochastic depth (Huang et al., 2016, arXiv 1603.09382), which Python turns off in evaluation, as a leaf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.ir.checks import is_random
from ti_fx.ir.edit import aten_name, constant_size, erase, replace_by_leaf
from ti_fx.ir.leaves import DropPath
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import EXPORTED


@dataclass(frozen=True)
class StochasticDepth(Pass):
    """A product that drops whole branches of rows at random is a leaf that does so in training alone.

    before:  %drawn = bernoulli_(%rows, keep)    after:  %y = DropPath{p=1 - keep}(%x)
             %factor = div_(%drawn, keep)
             %y = mul(%x, %factor)

    1. transformers          mul(div(%x, keep), floor(add(rand(rows), keep)))
    2. timm, torchvision     mul(%x, div_(bernoulli_(empty(rows), keep), keep))

    3. a single number that nobody reads is not drawn: Python has read it, and it did not matter

    A model writes ``if not self.training: return hidden`` (DropPath): a trace in training mode has the random numbers
    for good, one in eval mode never. The leaf draws the same numbers. A graph that was traced in eval mode is left.
    """

    takes = (EXPORTED,)

    def apply(self, gm: GraphModule) -> None:
        """Replace each such product, and drop the single numbers that nobody reads."""
        _drop_unread_draws(gm)
        if not gm.training:
            return
        for node in list(gm.graph.nodes):
            if aten_name(node) not in ("mul", "mul_") or len(node.args) != 2:
                continue
            for value, factor in (node.args, node.args[::-1]):
                found = _dropped(value, factor)
                if found is not None:
                    leaf, kept, chain = found
                    replace_by_leaf(gm, node, leaf, (kept,))
                    for link in chain:
                        if not link.users:
                            erase(link)
                    break


def _drop_unread_draws(gm: GraphModule) -> None:
    drawn: list[Node] = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        single = isinstance(value, Tensor) and all(constant_size(size) == 1 for size in value.shape)
        if single and (is_random(node) or any(source in drawn for source in node.all_input_nodes)):
            drawn.append(node)
    for node in reversed(drawn):
        if not node.users and node.op == "call_function":
            erase(node)


def _dropped(value: Any, factor: Any) -> tuple[DropPath, Node, list[Node]] | None:
    """Return the leaf, what it reads, and the nodes that it takes the place of, readers first."""
    if not isinstance(value, Node) or not isinstance(factor, Node):
        return None
    scaled, keep = _operation(factor, ("div", "div_"))
    drawn, probability = _operation(scaled, ("bernoulli_",))
    if drawn is not None and keep == probability and aten_name(drawn) in ("empty", "new_empty"):
        rows = _rows(drawn, drawn.args[0 if aten_name(drawn) == "empty" else 1], value)
        chain = [factor, scaled, drawn]
        return None if rows is None else (DropPath(1 - keep, rows, uniform=False), value, chain)
    moved, _ = _operation(factor, ("floor", "floor_"))
    drawn, keep = _operation(moved, ("add",))
    kept, divisor = _operation(value, ("div",))
    if drawn is not None and kept is not None and keep == divisor and aten_name(drawn) == "rand":
        rows = _rows(drawn, drawn.args[0], kept)
        chain = [factor, moved, drawn, value]
        return None if rows is None else (DropPath(1 - keep, rows, uniform=True), kept, chain)
    return None


def _operation(node: Any, names: tuple[str, ...]) -> tuple[Any, Any]:
    """Return the two arguments of one of these operations (None for a second that is not there), else None twice."""
    if not isinstance(node, Node) or aten_name(node) not in names or not node.args:
        return None, None
    first, second = node.args[0], node.args[1] if len(node.args) > 1 else None
    return (first, second) if isinstance(first, Node) else (None, None)


def _rows(drawn: Node, sizes: Any, value: Node) -> bool | None:
    """Return whether a number is drawn for each row (False: one for all of them), None for any other shape."""
    first, *rest = drawn.meta["val"].shape
    of_value = value.meta["val"].shape
    alone = len(sizes) == len(of_value) and all(constant_size(size) == 1 for size in rest)
    if not alone:
        return None
    if constant_size(first) == 1 and constant_size(of_value[0]) != 1:
        return False
    return True if first == of_value[0] else None
