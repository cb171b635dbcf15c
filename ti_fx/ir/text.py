"""A graph is written as text, one node a line, and two graphs as their difference.

``%name = op(args)  type  @module  #role``: no ids, devices or timings, so that equal graphs have equal text.
"""

from __future__ import annotations

import bisect
import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx.ir import roles
from ti_fx.ir.facts import facts

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
# Numbers that say more by name: the end of a slice, a mask's value.
_LIMITS = {
    torch.iinfo(torch.int64).max: "end",
    torch.finfo(torch.float64).min: "min(f64)",
    torch.finfo(torch.float32).min: "min(f32)",
    torch.finfo(torch.bfloat16).min: "min(bf16)",
}


def dump(gm: GraphModule) -> str:
    """Return the graph as text, one node a line, equal for equal graphs."""
    return "\n".join(lines(gm).values()) + "\n"


def lines(gm: GraphModule, nodes: Iterable[Node] | None = None) -> dict[str, str]:
    """Return the dump's line of each node (of ``nodes`` only, if given), by node name, in graph order."""
    dims = facts(gm).sizes.names
    return {node.name: _line(gm, node, dims) for node in (gm.graph.nodes if nodes is None else nodes)}


def diff(before: GraphModule | str, after: GraphModule | str, context: int = 2) -> str:
    """Return the unified diff of two graphs or dumps, without file headers and line numbers; empty if equal."""
    old, new = (
        (dump(graph) if isinstance(graph, GraphModule) else graph).splitlines() for graph in (before, after)
    )
    text = []
    for group in _Matcher(None, old, new, autojunk=False).get_grouped_opcodes(context):
        text.append("@@")
        for tag, first, last, start, stop in group:
            if tag == "equal":
                text += [f" {line}" for line in old[first:last]]
            else:
                text += [f"-{line}" for line in old[first:last]] + [f"+{line}" for line in new[start:stop]]
    return "\n".join(text) + ("\n" if text else "")


class _Matcher(difflib.SequenceMatcher[str]):
    """Matches the lines of two dumps in linear time: a line's partner is the one of the same text (and number).

    The longest run of partners in the order of both is kept (lines that moved are removed and added). difflib's own
    search for the longest blocks is quadratic.
    """

    a: list[str]
    b: list[str]

    def get_matching_blocks(self) -> list[difflib.Match]:
        """Return the lines that both have, in order, with the empty block at the end that difflib promises."""
        partners = {line: index for index, line in enumerate(_numbered(self.b))}
        pairs = [(index, partners[line]) for index, line in enumerate(_numbered(self.a)) if line in partners]
        blocks: list[difflib.Match] = []
        for first, second in _longest_rising(pairs):
            last = blocks[-1] if blocks else None
            if last is not None and (last.a + last.size, last.b + last.size) == (first, second):
                blocks[-1] = difflib.Match(last.a, last.b, last.size + 1)
            else:
                blocks.append(difflib.Match(first, second, 1))
        return [*blocks, difflib.Match(len(self.a), len(self.b), 0)]


def _numbered(texts: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Tell equal lines apart; a dump has none, as each begins with the node's name."""
    seen: Counter[str] = Counter()
    for line in texts:
        yield line, seen[line]
        seen[line] += 1


def _longest_rising(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest subsequence whose second numbers rise; the first ones do."""
    ends: list[int] = []  # the smallest last number of a rising run of each length
    at: list[int] = []  # the pair that this number belongs to
    before: list[int | None] = []
    for index, (_, second) in enumerate(pairs):
        length = bisect.bisect_left(ends, second)
        ends[length : length + 1] = [second]
        at[length : length + 1] = [index]
        before.append(at[length - 1] if length else None)
    found = []
    step = at[-1] if at else None
    while step is not None:
        found.append(pairs[step])
        step = before[step]
    return found[::-1]


def type_text(value: Any, dims: Mapping[str, str]) -> str:
    """Return ``f32[batch, sequence, 384]`` for a tensor, ``int`` for a size, a bracketed list for structures."""
    if isinstance(value, torch.Tensor):
        shape = ", ".join(_size(size, dims) for size in value.shape)
        return f"{_dtype(value.dtype)}[{shape}]"
    if isinstance(value, torch.SymInt | int):
        return f"size {_size(value, dims)}"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key}: {type_text(item, dims)}" for key, item in value.items())
        return f"{{{inner}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(type_text(item, dims) for item in value)})"
    return "" if value is None else type(value).__name__


def module_path(node: Node) -> str:
    """Return the dotted path of the innermost module of the user's model that made the node, or ``""``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return "" if path.startswith("_") else path


def where(node: Node) -> str:
    """Return how a user finds a node: ``%linear_3 (encoder.layer.0.intermediate.dense, layer 0)``."""
    path = module_path(node)
    layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    inside = [path] if path else []
    inside += [f"layer {layer[1]}"] if layer else []
    return f"%{node.name}" + (f" ({', '.join(inside)})" if inside else "")


def operation(gm: GraphModule, node: Node) -> str:
    """Return the node's operation: ``linear``, ``softmax.int``, ``Dropout{p=0.1}``, ``input``, a tensor's path."""
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return str(node.target)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return f"{type(module).__name__}{{{module.extra_repr().replace(', inplace=False', '')}}}"
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.partition("::")[2]
        overload = node.target._overloadname
        return name if overload in ("default", "Tensor") else f"{name}.{overload}"
    return str(getattr(node.target, "__name__", node.target))


def _size(size: Any, dims: Mapping[str, str]) -> str:
    if isinstance(size, int):
        return str(size)
    text = _expression(size.node.expr)
    return dims.get(text) or re.sub(r"[A-Za-z_]\w*", lambda symbol: dims.get(symbol[0], symbol[0]), text)


@lru_cache(maxsize=4096)
def _expression(expression: Any) -> str:
    return str(expression)  # which takes longer than all else in a line


def _line(gm: GraphModule, node: Node, dims: Mapping[str, str]) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    text = f"%{node.name} = {operation(gm, node)}"
    if node.op not in ("placeholder", "get_attr"):
        arguments = [_argument(argument) for argument in node.args]
        arguments += [
            f"{key}={_argument(value)}" for key, value in node.kwargs.items() if not _is_unsaid(key, value)
        ]
        text += f"({', '.join(arguments)})"
    parts = [text, type_text(node.meta.get("val"), dims)]
    if path := module_path(node):
        parts.append(f"@{path}")
    if role := roles.role(node):
        parts.append(f"#{role}")
    if point := roles.fact(node, "intervened"):
        parts.append(f"tap of {point}")
    if stood := roles.fact(node, "stands_for"):
        parts.append(f"stands for %{stood}")
    if layout := roles.fact(node, "layout"):
        parts.append(f"stored as {layout}")
    return "  ".join(part for part in parts if part)


def without_role(line: str) -> str:
    """Return what a line says of a node's value: all but its role and what follows."""
    return line.partition("  #")[0]


def _is_unsaid(key: str, value: Any) -> bool:
    """Whether a keyword is left out of the text: devices, and what torch.export spells out of the defaults."""
    return key == "device" or (key == "pin_memory" and not value) or value is torch.strided


def _argument(argument: Any) -> str:
    if isinstance(argument, Node):
        return f"%{argument.name}"
    if isinstance(argument, tuple | list):
        return f"[{', '.join(_argument(item) for item in argument)}]"
    if isinstance(argument, Mapping):
        return "{" + ", ".join(f"{key}: {_argument(item)}" for key, item in argument.items()) + "}"
    if isinstance(argument, torch.device):
        return "device"
    if isinstance(argument, torch.dtype):
        return _dtype(argument)
    if isinstance(argument, int | float) and not isinstance(argument, bool):
        return _LIMITS.get(argument, str(argument))
    return str(argument)


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
