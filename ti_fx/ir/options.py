"""A frozen dataclass's fields are options, written as text that parses back: for passes, recipes, the command line.

``name{key=value key=value}``, default values left out; None is ``none``, tuples are ``1,2``, mappings ``a:1,b:2``, odd
text is quoted. A comma may stand between two options, too.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from ti_fx.errors import RecipeError, did_you_mean

_PLAIN = re.compile(r"[A-Za-z0-9_.*?\[\]/+:-]+")
_ITEM = r'"(?:[^"\\]|\\.)*"|[^\s{}",]*'
_KEY = r"[A-Za-z_]\w*="
_OPTION = re.compile(rf"[\s,]*({_KEY})((?:{_ITEM})(?:,(?!\s*{_KEY})(?:{_ITEM}))*)")


def kebab(name: str) -> str:
    """Return ``duplicate-teacher`` for ``DuplicateTeacher``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def write(name: str, value: Any) -> str:
    """Return ``name{key=value ...}`` with the fields of dataclass instance ``value`` that differ from their default."""
    written = [
        f"{field.name}={_text(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if _is_option(field) and getattr(value, field.name) != _default(field)
    ]
    return f"{name}{{{' '.join(written)}}}" if written else name


def parse(written: str, kinds: Mapping[str, type[Any]]) -> Any:
    """Return an instance of one of ``kinds`` from text.

    Raises:
        RecipeError: unknown name or option (near names are listed), or a value that does not fit.
    """
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:\{(.*)\})?\s*", written, re.DOTALL)
    if match is None:
        raise RecipeError(f"can't read {written!r}; write name{{key=value key=value}}")
    name, inner = match[1], match[2] or ""
    if name not in kinds:
        raise RecipeError(f"no pass is called {name!r}{did_you_mean(name, kinds)}")
    values: dict[str, str] = {}
    position = 0
    while inner[position:].strip():
        option = _OPTION.match(inner, position)
        if option is None:
            raise RecipeError(f"can't read {inner[position:].strip()!r} in {written!r}; write key=value")
        values[option[1].removesuffix("=")] = option[2]
        position = option.end()
    return construct(kinds[name], values, where=name)


def construct(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Make ``kind`` from values given as text or as JSON, converted to the types of its fields.

    Raises:
        RecipeError: unknown option or a value that does not fit; names the option.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if _is_option(field)}
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise RecipeError(f"{where} has no option {key!r}{did_you_mean(key, fields)}")
        try:
            converted[key] = convert(value, hints[key])
        except (ValueError, TypeError):
            raise RecipeError(f"{where}: {key}={value!r} does not fit {_describe(hints[key])}") from None
    try:
        return kind(**converted)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from None


def convert(value: Any, hint: Any) -> Any:
    """Convert text or JSON to the type ``hint``; raises ValueError if it does not fit."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint))
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise ValueError(value)
    if origin is tuple:
        items = _items(value) if isinstance(value, str) else list(value)
        return tuple(convert(item, get_args(hint)[0]) for item in items)
    if origin is Mapping:
        pairs = [_pair(item) for item in _items(value)] if isinstance(value, str) else dict(value).items()
        return {convert(key, get_args(hint)[0]): convert(item, get_args(hint)[1]) for key, item in pairs}
    if hint is type(None):
        if value is None or value == "none":
            return None
        raise ValueError(value)
    if hint is bool:
        if value in (True, False) and isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
        raise ValueError(value)
    if hint in (int, float):
        if isinstance(value, bool) or (hint is int and isinstance(value, float)):
            raise ValueError(value)
        return hint(value)
    if hint is str and isinstance(value, str):
        return str(json.loads(value)) if value.startswith('"') else value
    raise ValueError(value)


def _items(text: str) -> list[str]:
    return [item for item in re.findall(rf"(?:^|,)({_ITEM})", text) if item]


def _pair(item: str) -> tuple[str, str]:
    key, colon, value = convert(item, str).rpartition(":")
    if not colon:
        raise ValueError(item)
    return key, value


def _convert_union(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in sorted(choices, key=lambda choice: choice is str):
        try:
            return convert(value, choice)
        except (ValueError, TypeError):
            continue
    raise ValueError(value)


def _is_option(field: dataclasses.Field[Any]) -> bool:
    """Whether a field is written as text: what is not compared (a module, a graph) is none."""
    return field.init and field.compare


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(_text(item) for item in value)
    if isinstance(value, Mapping):
        return ",".join(_text(f"{key}:{item}") for key, item in value.items())
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    return text if _PLAIN.fullmatch(text) and text != "none" else json.dumps(text)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in get_args(hint))
    return "none" if hint is type(None) else str(getattr(hint, "__name__", hint))
