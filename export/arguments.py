"""The functions of ``ti_fx.export`` refuse arguments that can't be used, each in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ti_fx.errors import InputError


def file_path(value: Any) -> Path:
    """Return the path of a file, which need not exist.

    Raises:
        InputError: it is no path, or none that the system or ONNX Runtime can open.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InputError(f"path is {value!r}; give a str or a pathlib.Path, such as 'student.onnx'")
    text = os.fspath(value)
    try:
        text.encode()
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever reads or writes it says so
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8, or holds a zero byte"
        raise InputError(f"can't use the path {text[:80]!r}: {reason}; give another") from error
    if not text.isprintable():
        raise InputError(f"the path {text!r} holds a line break or another control character; give another")
    return Path(text)


def whole_number(name: str, value: Any, least: int) -> int:
    """Return an int of at least ``least``; True and 2.0 are none.

    Raises:
        InputError: it is something else.
    """
    if type(value) is not int or value < least:
        raise InputError(f"{name} is {value!r}; give a whole number, at least {least}")
    return value


def threads_of(value: Any) -> int | None:
    """Return a number of threads, or None for one per core.

    Raises:
        InputError: it is no whole number from 1 on.
    """
    if value is not None and (type(value) is not int or not 1 <= value < 2**31):
        raise InputError(f"threads is {value!r}; give at least 1, or None for one per core")
    return value


def megabytes(value: Any) -> float | None:
    """Return a limit of memory, or None for no limit.

    Raises:
        InputError: it is no number from 0 on.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and value >= 0):  # NaN is refused, too
        raise InputError(f"ram_megabytes is {value!r}; give a number from 0 on, or None for no limit")
    return value  # type: ignore[no-any-return]


def switch(name: str, value: Any, *others: None) -> None:
    """Refuse what is neither True nor False nor one of ``others``.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, bool) and value not in others:
        raise InputError(f"{name} is {value!r}; give {'True, False or None' if others else 'True or False'}")


def graph(value: Any) -> GraphModule:
    """Return a captured graph.

    Raises:
        InputError: it is something else, such as the model itself.
    """
    if not isinstance(value, GraphModule):
        raise InputError(f"gm is a {type(value).__name__}; give the graph that ti_fx.capture returned")
    return value


def example(value: Any) -> Mapping[str, Any] | tuple[Any, ...]:
    """Return inputs of a graph, by name or in order.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, tuple | list):
        raise InputError(
            f"the inputs are a {type(value).__name__}; give a dict of tensors by name, or a tuple of tensors"
        )
    return tuple(value)


def saveable(name: str, value: Any) -> None:
    """Refuse what has no ``save_pretrained``, or is a class of it.

    Raises:
        InputError: it is something else, such as a path or a dict.
    """
    if value is not None and (
        isinstance(value, type) or not callable(getattr(value, "save_pretrained", None))
    ):
        raise InputError(
            f"{name} is a {type(value).__name__}; give the object of transformers, such as model.config or what "
            "AutoTokenizer.from_pretrained returns"
        )
