"""The graph that is exported: packed, alone, and with the encoding it was trained with, or another one on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx import encodings, numerics, roles
from ti_fx.encodings import ENCODINGS, get_encoding
from ti_fx.errors import EncodingMismatch, ExportError, PreconditionError
from ti_fx.graph import aten_name, fork, state

_NAMES = {encoding.fake_quant: encoding.name for encoding in ENCODINGS.values() if encoding.fake_quant}
_PRODUCTS = {"linear": 0, "addmm": 1, "mm": 0, "matmul": 0}  # where a linear layer reads its activation


@dataclass(frozen=True)
class PackedWeight:
    """A call of ``unpack_ternary`` and what it reads."""

    node: Node
    codes: Node
    scale: Node
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def codes_name(self) -> str:
        """Name of the buffer with the codes."""
        return str(self.codes.target)

    @property
    def scale_name(self) -> str:
        """Name of the buffer with the scale."""
        return str(self.scale.target)


def as_packed(argument: Any) -> PackedWeight | None:
    """Return the packed weight that an argument is, or None."""
    if not isinstance(argument, Node) or argument.target is not encodings.unpack_ternary:
        return None
    arguments: Any = argument.args
    codes, scale, shape, dtype = arguments
    return PackedWeight(argument, codes, scale, tuple(shape), dtype)


def fake_quantised(node: Node) -> str | None:
    """Return the encoding whose activation fake-quantiser a node is, or None."""
    return _NAMES.get(node.target) if callable(node.target) else None


def packed_weights(gm: GraphModule) -> Iterator[PackedWeight]:
    """Yield the packed weights in graph order; a tied weight may be read more than once."""
    for node in gm.graph.nodes:
        weight = as_packed(node)
        if weight is not None:
            yield weight


def require_packed(gm: GraphModule) -> None:
    """Refuse a graph that is not a packed student.

    Raises:
        PreconditionError: names the pass that is missing.
    """
    for node in gm.graph.nodes:
        if roles.role(node) in ("teacher", "loss"):
            raise PreconditionError(
                f"export needs the student alone, and %{node.name} is {roles.role(node)}; run Strip() and Pack() first"
            )
        if node.target is numerics.ternary:
            raise PreconditionError(f"export needs packed weights, and %{node.name} is not; run Pack() first")
    if not any(packed_weights(gm)):
        raise PreconditionError("export finds no packed ternary weight; run Ternarize() and Pack() first")


def encoding_of(gm: GraphModule) -> str:
    """Return the name of the encoding the student was trained with: as recorded, else as its fake-quantisers say.

    Raises:
        ExportError: the graph mixes encodings, or records another one than its nodes compute.
    """
    used = {_NAMES[node.target]: node for node in gm.graph.nodes if node.target in _NAMES}
    recorded = state(gm).get("encoding")
    name = recorded or next(iter(used), "float")
    for other, node in used.items():
        if other != name:
            raise ExportError(
                f"%{node.name} computes {other}, but the graph's encoding is {name}; use one encoding for the whole "
                f"graph: QuantizeActivations(encoding={other!r})"
            )
    return str(name)


def with_encoding(gm: GraphModule, encoding: str | None, requantize: bool) -> GraphModule:
    """Return ``gm`` if ``encoding`` is its own (or None), else a fork with the other encoding's fake-quantisers.

    Raises:
        InputError: there is no such encoding.
        EncodingMismatch: it is not the graph's, and ``requantize`` is false.
    """
    trained = encoding_of(gm)
    if encoding is None or get_encoding(encoding).name == trained:
        return gm
    if not requantize:
        raise EncodingMismatch(
            f"the student was trained with encoding {trained!r}, and {encoding!r} was asked for; leave encoding out, "
            "train with the other one, or pass requantize=True to see what the change costs"
        )
    return _requantised(gm, encoding)


def _requantised(gm: GraphModule, encoding: str) -> GraphModule:
    """1. a fake-quantiser is swapped   2. or removed, for float   3. from float: one before each ternary product."""
    copy = fork(gm)
    function = get_encoding(encoding).fake_quant
    present = [node for node in copy.graph.nodes if node.target in _NAMES]
    for node in present:
        if function is None:
            node.replace_all_uses_with(node.args[0])
            copy.graph.erase_node(node)
        else:
            node.target = function
    if function is not None and not present:
        inserted: dict[Node, Node] = {}
        for node in list(copy.graph.nodes):
            if not _is_ternary_product(node):
                continue
            position = _PRODUCTS[aten_name(node)]
            source = node.args[position]
            assert isinstance(source, Node)
            if source not in inserted:
                with copy.graph.inserting_before(node):
                    inserted[source] = copy.graph.call_function(function, (source,))
                inserted[source].meta = dict(source.meta)
            node.update_arg(position, inserted[source])
    state(copy)["encoding"] = encoding
    copy.recompile()
    return copy


def _is_ternary_product(node: Node) -> bool:
    if aten_name(node) not in _PRODUCTS:
        return False
    weight: Any = node.args[_PRODUCTS[aten_name(node)] + 1]
    if isinstance(weight, Node) and aten_name(weight) == "t":
        weight = weight.args[0]
    return as_packed(weight) is not None


def relative_distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ``|value - reference| / |reference|`` (L2), 0 where both are zero."""
    distance = (value.double() - reference.double()).norm()
    return float(distance / reference.double().norm().clamp(min=torch.finfo(torch.float64).tiny))
