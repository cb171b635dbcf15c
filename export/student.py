"""The graph that is exported: packed, alone, and with the encodings it was trained with, or another one on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.errors import EncodingMismatch, InputError, PreconditionError
from ti_fx.find.packed import (
    PRODUCTS,
    activation_of,
    encoding_of,
    fake_quantised,
    packed_weights,
    ternary_factor,
    weight_encodings,
)
from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name, fork
from ti_fx.ir.facts import facts, record_facts
from ti_fx.numerics.encodings import Encoding, get_encoding


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


def with_encoding(gm: GraphModule, encoding: str | None, requantize: bool) -> GraphModule:
    """Return ``gm`` if ``encoding`` is its own (or None), else a fork with the other encoding.

    An encoding of the same numerics is another way to store the same student, and always allowed.

    Raises:
        InputError: there is no such encoding.
        EncodingMismatch: it computes something else, and ``requantize`` is false.
    """
    trained = encoding_of(gm)
    if encoding is None or encoding == trained:
        return gm
    wanted = get_encoding(encoding)
    found = weight_encodings(gm)
    differ = [name for name, one in found.items() if one.fake_quant is not wanted.fake_quant]
    if differ and not requantize:
        raise EncodingMismatch(
            f"the student was trained with encoding {trained!r}, and {encoding!r} was asked for; leave encoding out, "
            "train with the other one, or pass requantize=True to see what the change costs"
        )
    copy = _requantised(gm, wanted) if differ else fork(gm)
    record_facts(copy, encoding=encoding, encodings=dict.fromkeys(found, encoding))
    return copy


def encodings_in(text: str) -> tuple[str, dict[str, str]]:
    """Return what :func:`encoding_of` wrote: the encoding, and each weight's of another one by its name.

    Raises:
        InputError: it wrote something else.
    """
    most, *rest = text.split(", ")
    if not all("=" in item for item in rest):
        raise InputError(f"{text[:80]!r} names no encodings; the file is damaged, export it again")
    return most, dict(item.rsplit("=", 1) for item in rest)


def as_written(gm: GraphModule, encoding: str, requantized_from: str | None) -> GraphModule | None:
    """Return the graph that computes as a file of ``encoding`` (see :func:`encoding_of`), None if ``gm`` does not."""
    if requantized_from == encoding_of(gm):
        return with_encoding(gm, encoding, requantize=True)
    most, others = encodings_in(encoding)
    wanted = {name: get_encoding(others.get(name, most)) for name in weight_encodings(gm)}
    found = weight_encodings(gm)
    return gm if all(found[name].fake_quant is wanted[name].fake_quant for name in found) else None


def same_numerics(one: GraphModule, other: GraphModule) -> bool:
    """Whether two forks of a student compute the same, however they are stored."""
    left, right = weight_encodings(one), weight_encodings(other)
    return all(left[name].fake_quant is right[name].fake_quant for name in left)


def _requantised(gm: GraphModule, encoding: Encoding) -> GraphModule:
    """1. a fake-quantiser is swapped   2. or removed, for float   3. where float was trained, one is inserted."""
    copy = fork(gm)
    function = encoding.fake_quant
    present = [node for node in copy.graph.nodes if fake_quantised(node)]
    for node in present:
        if function is None:
            node.replace_all_uses_with(node.all_input_nodes[0])
            copy.graph.erase_node(node)
        else:
            node.target = function
    if function is not None:
        # a projection that QuantizeActivations skipped is not recorded, and stays as it is
        recorded = facts(gm).encodings
        _quantise_products(copy, function, None if not present and not recorded else set(recorded))
    copy.recompile()
    return copy


def _quantise_products(gm: GraphModule, function: Callable[..., Any], names: set[str] | None) -> None:
    """Put a fake-quantiser before each ternary product that has none, of the weights called ``names`` (None: all)."""
    inserted: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        weight = ternary_factor(node)
        if weight is None or fake_quantised(activation_of(node)):
            continue
        if names is not None and weight.parameter not in names:
            continue
        source = activation_of(node)
        if source not in inserted:
            with gm.graph.inserting_before(node):
                inserted[source] = gm.graph.call_function(function, (source,))
            inserted[source].meta = dict(source.meta)
        node.update_arg(PRODUCTS[aten_name(node)], inserted[source])


def relative_distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ``|value - reference| / |reference|`` (L2), 0 where both are zero."""
    distance = (value.double() - reference.double()).norm()
    return float(distance / reference.double().norm().clamp(min=torch.finfo(torch.float64).tiny))
