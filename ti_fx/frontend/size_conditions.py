"""Writes what a trace asked about sizes as conditions on named sizes, in Python that people can read."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv, Mod
from torch.utils._sympy.printers import PythonPrinter

from ti_fx.errors import InputError
from ti_fx.frontend.size_questions import Question, Questions
from ti_fx.frontend.source_lines import short
from ti_fx.ir.assumptions import Assumption

Sizes = dict[str, int]
_TRIED = 400  # sizes of one dimension, one after another
_SIMPLIFIED = 160  # characters; algebra on longer conditions takes long


class Candidate(NamedTuple):
    """A condition that the trace took for true.

    Attributes:
        text: of the named sizes, as Python.
        line: of the model's code that asked.
        branch: whether Python goes on by it.
    """

    text: str
    line: str
    branch: bool


class SizeSymbols:
    """Torch's symbols for the sizes of inputs, by the names that the graph has for them."""

    def __init__(self, program: torch.export.ExportedProgram, names: Mapping[str, str] | None = None) -> None:
        """``names``: of each size, by its expression as text; None: as the inputs' dimensions are."""
        self.environment: Any = None
        self.values: dict[Any, Any] = {}  # of each symbol, an expression of named sizes
        self.further: list[Any] = []  # conditions that the inputs' shapes alone say
        self._guards: set[Any] = set()
        derived: dict[str, Any] = {}
        for node in program.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                continue
            for index, size in enumerate(value.shape):
                if not isinstance(size, torch.SymInt):
                    continue
                self.environment = size.node.shape_env
                name = f"{node.name}_{index}" if names is None else names.get(str(size))
                expression = size.node.expr
                if name is None:
                    continue
                named = sympy.Symbol(name, integer=True, positive=True)
                if expression.is_Symbol:
                    self.values.setdefault(expression, named)
                else:
                    derived[name] = (expression, named)
        for expression, named in derived.values():
            self._derive(expression, named)
        if self.environment is not None:
            self._guards = {guard.expr for guard in self.environment.guards}

    def bounds(self) -> dict[str, tuple[int, int | None]]:
        """Return the smallest and the largest size of each name that torch.export allows; None: there is no largest."""
        found: dict[str, tuple[int, int | None]] = {}
        for symbol, named in self.values.items():
            if named.is_Symbol:
                bounds = self.environment.bound_sympy(symbol)
                upper = int(bounds.upper) if bounds.upper.is_Integer else None
                found[str(named)] = (1 if bounds.lower <= 2 else int(bounds.lower)), upper
        return found

    def _derive(self, expression: Any, named: Any) -> None:
        """Take a dimension that is an expression (4 * s0) for what it says of its symbol."""
        unknown = [symbol for symbol in expression.free_symbols if symbol not in self.values]
        if unknown:
            solved = sympy.Poly(expression, unknown[0]) if len(expression.free_symbols) == 1 else None
            if solved is None or solved.degree() != 1:
                return
            factor, rest = solved.all_coeffs()
            self.values[unknown[0]] = FloorDiv(named - rest, factor)
            if factor != 1:
                self.further.append(sympy.Eq(Mod(named - rest, factor), 0))
        else:
            self.further.append(sympy.Eq(expression.xreplace(self.values), named))

    def candidates(self, questions: Questions) -> Iterator[Candidate]:
        """Yield the conditions as text, those of Python's branches first."""
        for condition in self.further:
            yield Candidate(_text(condition), "", True)
        for question in sorted(questions.asked, key=lambda one: not one.branch):
            condition = self._named(question)
            if condition is not None:
                line = short(question.line) if question.line else ""
                yield Candidate(_text(condition), line, question.branch)

    def without_text(self, questions: Questions) -> set[Any]:
        """Return the symbols about which a branch asks what is no arithmetic."""
        asked = [(question, self._named(question)) for question in questions.asked if question.branch]
        return {
            symbol
            for question, condition in asked
            if condition is not None and not _as_python(condition)
            for symbol in self.environment.replace(question.asked).free_symbols
        }

    def _named(self, question: Question) -> Any:
        """Return what a question's answer says of the named sizes; None where that is nothing."""
        if self.environment is None:
            return None
        condition = _condition(question)
        if not question.branch and condition not in self._guards:
            return None  # answered by what is known of the sizes already
        condition = self.environment.replace(condition)
        if not condition.free_symbols or not condition.free_symbols <= self.values.keys():
            return None
        named = condition.xreplace(self.values)
        return None if named in (sympy.true, sympy.false) else named


def _condition(question: Question) -> Any:
    if question.answer in (True, sympy.true) and isinstance(question.answer, bool | type(sympy.true)):
        return question.asked
    if isinstance(question.answer, bool | type(sympy.false)):
        return sympy.Not(question.asked)
    return sympy.Eq(question.asked, question.answer)


def _text(condition: Any) -> str:
    """Return a condition as Python, in its simplest form; "" if it is not arithmetic."""
    plain = _as_python(condition)
    if len(plain) > _SIMPLIFIED:
        return plain
    for simpler in map(_as_python, _simpler(condition)):
        if simpler and len(simpler) < len(plain) and _equal(plain, simpler):
            plain = simpler
    return plain


def _as_python(condition: Any) -> str:
    try:
        text = PythonPrinter().doprint(condition)
        text = (
            text.replace("math.", "").replace("torch._sym_sqrt", "sqrt").replace("torch.sym_float", "1.0 * ")
        )
        text = ast.unparse(ast.parse(text, mode="eval"))
        Assumption(text).holds({})
    except (AssertionError, InputError, SyntaxError, NotImplementedError, TypeError, ValueError):
        return ""
    return text


def _simpler(condition: Any) -> Iterator[Any]:
    """Yield an equality or inequality without factors that say nothing, and with remainders for quotients."""
    if not isinstance(condition, sympy.Eq | sympy.Ne):
        return
    difference = condition.lhs - condition.rhs
    for one in (
        difference,
        difference.replace(FloorDiv, lambda a, b: (a - Mod(a, b)) / b if b.is_Integer else FloorDiv(a, b)),
    ):
        try:
            factors = sympy.Mul.make_args(sympy.factor(sympy.expand(one)))
        except (sympy.PolynomialError, TypeError):
            continue
        kept = sympy.Mul(*(factor for factor in factors if not factor.is_positive and not factor.is_number))
        number, rest = kept.as_coeff_Add()
        yield condition.func(rest, -number)


def _equal(first: str, second: str) -> bool:
    a, b = Assumption(first), Assumption(second)
    names = sorted({*a.names, *b.names})
    return all(a.holds(point) == b.holds(point) for point in points(dict.fromkeys(names, 8), [first, second]))


def points(own: Mapping[str, int], texts: Iterable[str]) -> list[Sizes]:
    """Return sizes at which conditions are tried, those nearest to ``own`` first: one changed, then several."""
    numbers = {
        abs(int(node.value))
        for text in texts
        for node in ast.walk(ast.parse(text, mode="eval"))
        if isinstance(node, ast.Constant) and abs(node.value) < 2**20
    }
    edges = {number + step for number in numbers for step in (-1, 0, 1)} | {2 * one for one in numbers}
    every = sorted({*range(1, _TRIED), *(edge for edge in edges if edge > 0), 512, 1024, 4096})
    found = [
        {**own, name: size}
        for name in own
        for size in sorted(every, key=lambda size: (abs(size - own[name]), size))
    ]
    if len(own) > 1:
        draw = random.Random(0)
        small = sorted({*range(1, 17), *(edge for edge in edges if 0 < edge < 1000)})
        found += [{name: draw.choice(small) for name in own} for _ in range(1500)]
        found += [dict.fromkeys(own, size) for size in small]
    return found
