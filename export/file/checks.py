"""A file says what its model refuses by the values of its inputs, in a form that ``Runtime`` computes with PyTorch.

ONNX has no assertion, so a file's own nodes can't refuse. What a check computes from the inputs alone is written beside
them as JSON, an operator a row; what it needs beyond the inputs (weights, results of layers) is not, and the file says
which checks ``Runtime`` can't make.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.errors import InputError
from ti_fx.ir.checks import MARK, check_message
from ti_fx.ir.edit import tensor

_MOST_NODES, _MOST_NUMBERS = 200, 4096
# What compares, counts and moves numbers; nothing here reads a file, draws or writes.
_COMPUTES = """
_assert_async _local_scalar_dense _to_copy _unique2 abs add all amax amin any arange argmax argmin argsort bitwise_and
bitwise_not bitwise_or bitwise_xor cat clamp clone contiguous count_nonzero cumsum diff div eq expand flatten flip
floor_divide full full_like gather ge gt index isfinite isin isinf isnan item le logical_and logical_not logical_or
logical_xor lt max mean min mul ne neg nonzero numel ones ones_like permute remainder reshape roll scalar_tensor select
slice sort squeeze stack sub sum sym_numel sym_size to transpose unique_consecutive unique_dim unsqueeze view where
zeros zeros_like
"""
_ATEN = frozenset(_COMPUTES.split())
_OF_SIZES = "add and_ eq floordiv ge getitem gt le lt mod mul ne neg or_ sub"
_PYTHON: dict[str, Callable[..., Any]] = {name: getattr(operator, name) for name in _OF_SIZES.split()}
_SYMBOLIC = {"not_": operator.not_, "sym_ite": torch.sym_ite, "sym_not": torch.sym_not}


@dataclass(frozen=True)
class FileCheck:
    """What a model refuses.

    Attributes:
        message: what is said.
        rows: operators, in order: name, arguments, keyword arguments; () where more than the inputs decides.
    """

    message: str
    rows: tuple[Any, ...] = field(default=(), repr=False)

    def require(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse inputs at which it fails.

        Raises:
            InputError: it fails, with the message.
        """
        values: list[Any] = []
        try:
            with torch.no_grad():
                for name, args, kwargs in self.rows:
                    given = [_decoded(one, values, inputs) for one in args]
                    known = {key: _decoded(one, values, inputs) for key, one in kwargs.items()}
                    values.append(_operator(name)(*given, **known))
        except (RuntimeError, IndexError, TypeError) as error:  # the assertion itself, or what leads to it
            raise InputError(self.message) from error


def checks_of(gm: GraphModule) -> list[FileCheck]:
    """Return the checks of a graph; rows are there where its inputs alone decide."""
    found = []
    for node in gm.graph.nodes:
        message = check_message(node)
        if message is not None:
            found.append(FileCheck(message.removeprefix(MARK), tuple(_rows(gm, node) or ())))
    return found


def to_json(checks: list[FileCheck]) -> str:
    """Return checks as they stand in a file: each one's rows as text, by its message."""
    return json.dumps({check.message: json.dumps(check.rows) for check in checks})


def from_json(written: Mapping[str, Any]) -> tuple[FileCheck, ...]:
    """Return the checks of a file.

    Raises:
        InputError: one is damaged, or would do more than compute with numbers.
    """
    found = []
    for message, text in written.items():
        try:
            rows = json.loads(text)
            for name, args, kwargs in rows:
                _operator(name)
                list(args), dict(kwargs)
        except (TypeError, ValueError, AttributeError, RecursionError):
            raise InputError("the file's metadata ti_fx.checks is damaged; export it again") from None
        found.append(FileCheck(message, tuple(rows)))
    return tuple(found)


def _rows(gm: GraphModule, check: Node) -> list[Any] | None:
    """Return what leads to a check as rows; None where it is more than the inputs."""
    wanted, queue = {check}, [check]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in wanted:
                wanted.add(source)
                queue.append(source)
    if len(wanted) > _MOST_NODES:
        return None
    rows: list[Any] = []
    places: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if node not in wanted:
            continue
        if node.op == "placeholder":
            places[node] = {"input": str(node.target)}
            continue
        if node.op == "get_attr":
            constant = tensor(gm, str(node.target))
            if (
                isinstance(constant, torch.nn.Parameter)
                or constant.numel() > _MOST_NUMBERS
                or constant.is_meta
            ):
                return None
            places[node] = {"tensor": constant.tolist(), "dtype": str(constant.dtype)}
            continue
        name = _name(node)
        if name is None:
            return None
        try:
            args = [_encoded(one, places) for one in node.args]
            kwargs = {key: _encoded(one, places) for key, one in node.kwargs.items()}
        except TypeError:
            return None
        places[node] = {"row": len(rows)}
        rows.append([name, args, kwargs])
    return rows


def _name(node: Node) -> str | None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        name = f"aten.{target._schema.name.partition('::')[2]}.{target._overloadname}"
    else:
        kind = getattr(target, "__name__", "")
        known = {**_PYTHON, **_SYMBOLIC}.get(kind)
        name = f"python.{kind}" if known is target else ""
    try:
        _operator(name)
    except ValueError:
        return None
    return name


def _operator(name: str) -> Callable[..., Any]:
    """Return the operator of a name.

    Raises:
        ValueError: there is none that only computes.
    """
    kind, _, rest = name.partition(".")
    if kind == "python" and rest in {**_PYTHON, **_SYMBOLIC}:
        return {**_PYTHON, **_SYMBOLIC}[rest]
    packet, _, overload = rest.partition(".")
    if kind != "aten" or packet not in _ATEN:
        raise ValueError(f"{name!r} is no operator of a check")
    try:
        found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    except AttributeError:
        raise ValueError(f"{name!r} is no operator of a check") from None
    return found


def _encoded(value: Any, places: Mapping[Node, Any]) -> Any:
    if isinstance(value, Node):
        return places[value]
    if isinstance(value, list | tuple):
        return [_encoded(one, places) for one in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, torch.device | torch.layout | torch.memory_format):
        return {"left": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} in a check")


def _decoded(value: Any, values: list[Any], inputs: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(one, values, inputs) for one in value]
    if not isinstance(value, dict):
        return value
    if "input" in value:
        return inputs[value["input"]]
    if "row" in value:
        return values[value["row"]]
    if "left" in value:  # where it is computed: here
        return None
    dtype = getattr(torch, str(value["dtype"]).removeprefix("torch."))
    return torch.tensor(value["tensor"], dtype=dtype) if "tensor" in value else dtype
