"""What several passes ask of a node before they fuse it with others."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from ti_fx.ir.edit import aten_name

COPIES = ("contiguous", "clone")
RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten")
EVERYTHING = 2**31 - 1  # an end of a slice from here on is no end


def called(argument: Any, *names: str) -> bool:
    """Whether an argument is a call of one of these ATen operators."""
    return isinstance(argument, Node) and aten_name(argument) in names


def rank(argument: Any) -> int:
    """Return the number of dimensions of a node's tensor, -1 of anything else."""
    value = argument.meta.get("val") if isinstance(argument, Node) else None
    return value.dim() if isinstance(value, Tensor) else -1


def transposed(node: Any, dims: tuple[int, int]) -> Node | None:
    """Return what ``node`` is the transpose of, over exactly these dimensions."""
    while called(node, *COPIES):
        node = node.args[0]
    if not called(node, "transpose"):
        return None
    count = node.meta["val"].dim()
    if {int(dim) % count for dim in node.args[1:3]} != set(dims):
        return None
    source = node.args[0]
    return source if isinstance(source, Node) else None


def split_view(node: Any) -> Node | None:
    """Return the view by which ``(batch, length, heads * size)`` was split into ``(batch, heads, length, size)``."""
    split = transposed(node, (1, 2))
    if split is None or aten_name(split) not in RESHAPES or rank(split) != 4 or rank(split.args[0]) != 3:
        return None
    source: Any = split.args[0]
    heads, size = split.meta["val"].shape[2:]
    return split if source.meta["val"].shape[2] == heads * size else None
