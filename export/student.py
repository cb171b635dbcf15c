"""The graph that is exported: packed, alone, and with the encodings it was trained with, or another one on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx import encodings, numerics, roles
from ti_fx.encodings import Encoding, encoding_of_numerics, get_encoding
from ti_fx.errors import EncodingMismatch, InputError, PreconditionError
from ti_fx.graph import aten_name, fork, state

ATTENTION = "attention"
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

    @property
    def parameter(self) -> str:
        """Name of the parameter that Pack made the codes from."""
        return self.codes_name.removeprefix("packed.").removesuffix("_codes")


def as_packed(argument: Any) -> PackedWeight | None:
    """Return the packed weight that an argument is, or None."""
    if not isinstance(argument, Node) or argument.target is not encodings.unpack_ternary:
        return None
    arguments: Any = argument.args
    codes, scale, shape, dtype = arguments
    return PackedWeight(argument, codes, scale, tuple(shape), dtype)


def fake_quantised(node: Node) -> str | None:
    """Return the first encoding whose activation fake-quantiser a node is, or None."""
    encoding = encoding_of_numerics(node.target)
    return None if encoding is None else encoding.name


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


def weight_encodings(gm: GraphModule) -> dict[str, Encoding]:
    """Return the encoding of each packed weight, by parameter name.

    What a product computes is what its nodes say; of encodings of the same numerics, it is the one that
    ``QuantizeActivations`` recorded.
    """
    recorded: dict[str, str] = state(gm).get("encodings", {})
    used = (name for node in gm.graph.nodes if (name := fake_quantised(node)) is not None)
    default = state(gm).get("encoding") or next(used, "float")
    found = {
        weight.parameter: get_encoding(recorded.get(weight.parameter, default))
        for weight in packed_weights(gm)
    }
    for node in gm.graph.nodes:
        weight = _ternary_factor(node)
        if weight is None:
            continue
        computed = encoding_of_numerics(_activation(node).target)
        if computed is not None and computed.fake_quant is not found[weight.parameter].fake_quant:
            found[weight.parameter] = computed
    return found


def encoding_of(gm: GraphModule) -> str:
    """Return the student's encoding: a name, and after it each weight of another one (``int8-token, fc=nbits2``)."""
    found = weight_encodings(gm)
    counts = Counter(encoding.name for encoding in found.values())
    ((most, _),) = counts.most_common(1) or (("float", 0),)
    others = [f"{name}={encoding.name}" for name, encoding in found.items() if encoding.name != most]
    return ", ".join([most, *others])


def batch_dependent(gm: GraphModule) -> tuple[str, ...]:
    """Return the weights whose activation has one range for the whole batch, by name, in graph order.

    Through them a row's result depends on what else is in its batch. ``attention`` stands for the products of attention
    where those are quantised so, too.
    """
    found: dict[str, None] = {}
    for node in gm.graph.nodes:
        encoding = encoding_of_numerics(node.target)
        if encoding is not None and not encoding.batch_invariant:
            for reader in node.users:
                weight = _ternary_factor(reader)
                found[ATTENTION if weight is None else weight.parameter] = None
    return tuple(found)


def is_quantised(gm: GraphModule) -> bool:
    """Whether any activation is fake-quantised."""
    return any(fake_quantised(node) for node in gm.graph.nodes)


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
    state(copy)["encoding"] = encoding
    state(copy)["encodings"] = dict.fromkeys(found, encoding)
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
        recorded = state(gm).get("encodings", {})
        _quantise_products(copy, function, None if not present and not recorded else set(recorded))
    copy.recompile()
    return copy


def _quantise_products(gm: GraphModule, function: Callable[..., Any], names: set[str] | None) -> None:
    """Put a fake-quantiser before each ternary product that has none, of the weights called ``names`` (None: all)."""
    inserted: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        weight = _ternary_factor(node)
        if weight is None or fake_quantised(_activation(node)):
            continue
        if names is not None and weight.parameter not in names:
            continue
        source = _activation(node)
        if source not in inserted:
            with gm.graph.inserting_before(node):
                inserted[source] = gm.graph.call_function(function, (source,))
            inserted[source].meta = dict(source.meta)
        node.update_arg(_PRODUCTS[aten_name(node)], inserted[source])


def _ternary_factor(node: Node) -> PackedWeight | None:
    """Return the packed weight that a linear layer reads, as it is or transposed, None for any other node."""
    if aten_name(node) not in _PRODUCTS:
        return None
    weight: Any = node.args[_PRODUCTS[aten_name(node)] + 1]
    if isinstance(weight, Node) and aten_name(weight) == "t":
        weight = weight.args[0]
    return as_packed(weight)


def _activation(node: Node) -> Node:
    """Return what a linear layer multiplies its weight by."""
    source = node.args[_PRODUCTS[aten_name(node)]]
    assert isinstance(source, Node)
    return source


def relative_distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ``|value - reference| / |reference|`` (L2), 0 where both are zero."""
    distance = (value.double() - reference.double()).norm()
    return float(distance / reference.double().norm().clamp(min=torch.finfo(torch.float64).tiny))
