"""An assumption is a condition on the named sizes of the inputs, without which a graph is not its model.

The trace took it from the example: ``if length % 4:`` had one outcome there. It is written as Python
(``sequence % 4 == 0``), so that people can read it and a file can carry it; what is read back may compute numbers and
nothing else.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ti_fx.errors import InputError

_NODES = (
    *(
        ast.Expression,
        ast.Constant,
        ast.Name,
        ast.Load,
        ast.BinOp,
        ast.UnaryOp,
        ast.BoolOp,
        ast.Compare,
        ast.Call,
    ),
    *(
        ast.Add,
        ast.Sub,
        ast.Mult,
        ast.Div,
        ast.FloorDiv,
        ast.Mod,
        ast.Pow,
        ast.USub,
        ast.Not,
        ast.And,
        ast.Or,
    ),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "floor": math.floor,
    "log2": math.log2,
    "max": max,
    "min": min,
    "sqrt": math.sqrt,
    "trunc": math.trunc,
}
_LONGEST = 2_000  # characters


@dataclass(frozen=True)
class Assumption:
    """A condition on named sizes.

    Attributes:
        text: the condition, as Python: ``sequence % 4 == 0``.
        line: ``file:line`` of the model's code that decides by it; "" where that is not known.
        in_graph: whether the graph needs it; one that it does not need (its nodes look at their inputs' sizes) holds
            for files, whose nodes have the ranks that were traced.
    """

    text: str
    line: str = ""
    in_graph: bool = True

    def __str__(self) -> str:
        decided = f", decided at {self.line}" if self.line else ""
        return f"{self.text} is assumed{decided}{'' if self.in_graph else ' (in files alone)'}"

    @property
    def names(self) -> tuple[str, ...]:
        """The sizes that it is about."""
        return _condition(self.text)[0]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it holds at these sizes; one about a size that is not among them does not fail.

        Raises:
            InputError: the text is not such a condition.
        """
        names, condition = _condition(self.text)
        if any(name not in sizes for name in names):
            return True
        try:
            return bool(condition(*(sizes[name] for name in names)))
        except (ArithmeticError, ValueError):  # 256 // (length // 8) at a length below 8
            return False

    @property
    def condition(self) -> Callable[..., Any]:
        """The condition as a function of the sizes in ``names``."""
        return _condition(self.text)[1]

    def renamed(self, names: Mapping[str, str]) -> Assumption:
        """Return the same about sizes that have other names now."""
        own = set(self.names)
        text = re.sub(
            r"[A-Za-z_]\w*",
            lambda word: names.get(word[0], word[0]) if word[0] in own else word[0],
            self.text,
        )
        return replace(self, text=text)

    def refusal(self, sizes: Mapping[str, int]) -> str:
        """Return what is said of sizes at which it does not hold."""
        given = ", ".join(f"{name} is {sizes[name]}" for name in self.names)
        decided = f" (the model decides by that at {self.line})" if self.line else ""
        return (
            f"{given}, and the graph is the model where {self.text}{decided}; give inputs of such sizes, or capture "
            "with an example of these"
        )


def require(assumptions: tuple[Assumption, ...], sizes: Mapping[str, int]) -> None:
    """Refuse sizes at which an assumption does not hold.

    Raises:
        InputError: names the sizes, the condition, and the line of the model that decides by it.
    """
    for assumption in assumptions:
        if not assumption.holds(sizes):
            raise InputError(assumption.refusal(sizes))


@lru_cache(maxsize=4096)
def _condition(text: str) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """Return the names that a condition reads, and the condition as a function of them.

    Raises:
        InputError: it is longer than any that is written, or does more than compute with numbers.
    """
    damaged = InputError(f"{text[:80]!r} is no condition on sizes")
    try:
        tree = ast.parse(text, mode="eval") if len(text) <= _LONGEST else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None:
        raise damaged
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        fits = isinstance(node, _NODES)
        if isinstance(node, ast.Constant):
            fits = type(node.value) in (int, float, bool)
        elif isinstance(node, ast.Call):
            fits = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            fits = isinstance(node.right, ast.Constant) and node.right.value in (2, 3, 0.5)
        elif isinstance(node, ast.Name) and id(node) not in called:
            names[node.id] = None
        if not fits:
            raise damaged
    ordered = tuple(sorted(names))
    source = ast.Expression(
        ast.Lambda(
            ast.arguments(
                posonlyargs=[],
                args=[ast.arg(f"size_{name}") for name in ordered],
                kwonlyargs=[],
                kw_defaults=[],
                defaults=[],
            ),
            _Prefixed(called).visit(tree).body,
        )
    )
    # the tree was looked at node by node: numbers, names of sizes and the functions above
    code = compile(ast.fix_missing_locations(source), "<condition>", "eval")
    return ordered, eval(code, {"__builtins__": {}, **_FUNCTIONS})


class _Prefixed(ast.NodeTransformer):
    """Give names of sizes a prefix, so that none is a keyword's, a function's or a builtin's."""

    def __init__(self, called: set[int]) -> None:
        self.called = called

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return node if id(node) in self.called else ast.Name(f"size_{node.id}", node.ctx)
