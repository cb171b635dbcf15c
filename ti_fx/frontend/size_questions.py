"""Records what is asked about sizes in a trace, and by which line of the model: ``if length % 4:``.

torch.export keeps what it could not answer by itself as guards. What it answers because it takes every open size for at
least 2 (``if length == 1:``) it keeps nowhere, and neither tells it a Python branch from what a kernel asks about
strides; so each question is recorded as it is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch

from ti_fx.frontend.patches import replaced
from ti_fx.frontend.source_lines import TI_FX, TORCH, short

EVALUATE = "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_expr"
# Where Python turns a size or a condition on sizes into a number or a truth value.
_NUMBERS = torch.__file__
# Python of torch that a model's forward runs and a trace follows, as it does the model's own.
_TRACER = f"{TI_FX}frontend/export_program.py"
# Code that torch.fx writes, and Python's own import.
_GENERATED = ("<eval_with_key>", "<frozen")
_FOLLOWED = tuple(
    f"{TORCH}{name}"
    for name in ("nn/", "functional.py", "_tensor.py", "utils/checkpoint.py", "distributions/")
)


class Question(NamedTuple):
    """A question about sizes.

    Attributes:
        asked: what was asked, of torch's symbols: a condition or a size.
        answer: a truth value or a number.
        line: ``file:line`` of the model's code that asked, or that called the kernel that did.
        branch: whether Python goes on by the answer, or a kernel.
    """

    asked: Any
    answer: Any
    line: str
    branch: bool


@dataclass
class Questions:
    """What was asked about sizes in a trace.

    Attributes:
        asked: each question of a line once, in order.
        environment: torch's, of the sizes' symbols; None: nothing was asked.
    """

    asked: dict[Question, None] = field(default_factory=dict)
    environment: Any = None

    def why_fixed(self, name: str, index: int, size: int) -> str | None:
        """Return which line of the model fixes an input's size, and what to change; None where none is known."""
        symbols = {} if self.environment is None else self.environment.source_to_var
        symbol = next(
            (one for source, one in symbols.items() if source.endswith(f"['{name}'].size()[{index}]")), None
        )
        about = [one for one in self.asked if one.line and symbol in one.asked.free_symbols]
        numbers = [one for one in about if not isinstance(one.answer, bool)]
        numbers = [one for one in numbers if getattr(one.answer, "is_Integer", isinstance(one.answer, int))]
        if numbers:
            return (
                f"{short(numbers[0].line)} makes a Python number of it, {size} (range, int, a list by length, an "
                "f-string, ...); a tensor operation there (torch.arange) leaves it open"
            )
        relations = {"==": True, "!=": False}
        equal = [one for one in about if relations.get(getattr(one.asked, "rel_op", "")) == bool(one.answer)]
        equal.sort(key=lambda one: not one.branch)
        if equal:
            return (
                f"{short(equal[0].line)} fits it to {size} (a comparison, a reshape, a sum with a table of that many "
                "rows, ...); sizes that are read off the inputs there leave it open"
            )
        return None


@contextmanager
def size_questions(questions: Questions) -> Iterator[None]:
    """Record what is asked about sizes meanwhile, and nothing of an earlier trace."""
    questions.asked.clear()
    questions.environment = None

    def of(original: Any) -> Any:
        def evaluated(environment: Any, expression: Any, *args: Any, **kwargs: Any) -> Any:
            answer = original(environment, expression, *args, **kwargs)
            if expression.free_symbols:
                line, branch = _asker(sys._getframe(1))
                questions.environment = environment
                questions.asked[Question(expression, answer, line, branch)] = None
            return answer

        return evaluated

    with replaced(EVALUATE, of):
        yield


def _asker(frame: FrameType | None) -> tuple[str, bool]:
    """Return the model's line that is running, and whether Python asks there, past what only passes questions on."""
    by_python, branch = False, None
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _TRACER:  # torch.export's own, before or after the model's forward
            return "", False
        if not file.startswith(TORCH):
            if not file.startswith((TI_FX, *_GENERATED)):
                break
        elif file == _NUMBERS:
            by_python = True
        elif branch is None and not file.startswith(f"{TORCH}fx"):
            branch = by_python and file.startswith(_FOLLOWED)
        frame = frame.f_back
    if frame is None:
        return "", False
    return f"{frame.f_code.co_filename}:{frame.f_lineno}", by_python if branch is None else branch
