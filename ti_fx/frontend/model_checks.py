"""Keeps a model's own checks of values in the graph, with the model's own words.

``torch._check`` and transformers' ``torch_compilable_check`` become, in a trace, assertions without a message, like
torch.export's own, or nothing. A model refuses by them what it would compute wrongly, and so must its graph.
"""

from __future__ import annotations

import ast
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ti_fx.frontend.internals import known_internal
from ti_fx.frontend.patches import replaced
from ti_fx.frontend.source_lines import TORCH, caller, short
from ti_fx.ir.checks import REFUSES

_PLAIN: Any = torch  # its checks have no types
_LIBRARY = "transformers.utils.import_utils"


@contextmanager
def kept_checks(hints: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Let each check of values that the model makes be a node of the graph, which raises with the model's message.

    Args:
        hints: whether torch.export gets to know, too, what a check says of sizes that depend on values.
    """

    def of_condition(original: Any) -> Any:
        def checked(error_type: Any, cond: Any, message: Any) -> Any:
            if isinstance(cond, torch.SymBool) and _is_open(cond) and _asked_by_model():
                torch._assert_async(_as_tensor(cond), _message(message))
                if not hints():
                    return None
            return original(error_type, cond, message)

        return checked

    def of_tensor(original: Any) -> Any:
        def checked(error_type: Any, cond: Any, message: Any = None) -> None:
            if not isinstance(cond, Tensor) or not _asked_by_model():
                original(error_type, cond, message)
            else:
                torch._assert_async(cond.all(), _message(message))

        return checked

    def of_library(original: Any) -> Any:
        def checked(cond: Any, msg: Any, error_type: Any = ValueError) -> None:
            if os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK") == "1":
                return
            cond = cond() if callable(cond) and not isinstance(cond, Tensor) else cond
            if isinstance(cond, Tensor):
                torch._assert_async((cond != 0).all(), _message(msg))
            elif isinstance(cond, torch.SymBool) and _is_open(cond):
                torch._assert_async(_as_tensor(cond), _message(msg))
                if hints():
                    _PLAIN._check(cond)
            elif not cond:  # by sizes: a branch like any other
                raise error_type(_text(msg))

        checked.__wrapped__ = original  # type: ignore[attr-defined]
        return checked

    with ExitStack() as stack:
        if _LIBRARY in sys.modules:
            original = known_internal(f"{_LIBRARY}.torch_compilable_check")
            stack.enter_context(_in_every_module("torch_compilable_check", original, of_library(original)))
        stack.enter_context(replaced("torch._check_with", of_condition))
        stack.enter_context(replaced("torch._check_tensor_all_with", of_tensor))
        yield


@contextmanager
def _in_every_module(name: str, original: Any, new: Any) -> Iterator[None]:
    """Put a function in the place of another wherever it was imported."""
    owners = [
        module
        for module in list(sys.modules.values())
        if getattr(module, "__dict__", {}).get(name) is original
    ]
    try:
        for module in owners:
            setattr(module, name, new)
        yield
    finally:
        for module in owners:
            setattr(module, name, original)


def _is_open(cond: torch.SymBool) -> bool:
    return bool(free_unbacked_symbols(cond))


def _as_tensor(cond: torch.SymBool) -> Tensor:
    """Return a condition as a tensor: torch.export drops an assertion on a number that it knows from another."""
    number: Tensor = _PLAIN.scalar_tensor(_PLAIN.sym_ite(cond, 1, 0))
    return number != 0


def _asked_by_model() -> bool:
    """Whether what called the check is not torch's own kernel."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == torch.__file__:
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(TORCH)


def _text(message: Any) -> str:
    try:
        said = message() if callable(message) else message
    except Exception:  # words about values, which a trace has not
        said = None
    return " ".join(str(said).split()) if said else "it checks values there"


def _message(message: Any) -> str:
    return f"{REFUSES}{_text(message).rstrip('.')} ({short(caller())}); give inputs that the model takes"


def raised_at(where: str) -> str | None:
    """Return what the model raises where the condition at a ``file:line`` comes out otherwise; None: it raises nothing.

    ``if bad.any(): raise ValueError("no")`` and ``assert good.all(), "no"``.
    """
    path, _, line = where.rpartition(":")
    for node in _statements(path):
        if isinstance(node, ast.Assert):
            first, last, said = node.lineno, node.test.end_lineno, node.msg
        else:
            raises = [part[0] for part in (node.body, node.orelse) if part and isinstance(part[0], ast.Raise)]
            if not raises:
                continue
            error = raises[0].exc
            first, last = node.lineno, node.test.end_lineno
            said = error.args[0] if isinstance(error, ast.Call) and error.args else error
        if first <= int(line) <= (last or first):
            return _spoken(said)
    return None


@lru_cache(maxsize=64)
def _statements(path: str) -> tuple[Any, ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except (SyntaxError, ValueError):
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.If | ast.Assert))


def _spoken(said: ast.expr | None) -> str:
    """Return the words of a message; what it would compute is left as it is written."""
    if said is None:
        return "an assertion fails"
    if isinstance(said, ast.Constant):
        return " ".join(str(said.value).split())
    if isinstance(said, ast.JoinedStr):
        parts = [
            str(part.value) if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"  # type: ignore[attr-defined]
            for part in said.values
        ]
        return " ".join("".join(parts).split())
    return " ".join(ast.unparse(said).split())
