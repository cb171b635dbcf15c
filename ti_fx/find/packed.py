"""A packed graph's weights are found here, with who reads each and by which encoding that computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.ir.edit import aten_name
from ti_fx.ir.facts import facts
from ti_fx.ir.inserted import quantiser_of
from ti_fx.numerics.encodings import Encoding, WeightEncodings, encoding_with, get_encoding
from ti_fx.numerics.quantiser import Quantiser

ATTENTION = "attention"


PRODUCTS = {"linear": 0, "addmm": 1, "mm": 0, "matmul": 0}  # where a linear layer reads its activation


@dataclass(frozen=True)
class PackedWeight:
    """A call of ``unpack_ternary`` and what it reads.

    ``group`` neighbours share a scale, 0: a row or all do; ``offset`` is added, None: nothing is.
    """

    node: Node
    codes: Node
    scale: Node
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int = 0
    offset: Node | None = None

    @property
    def codes_name(self) -> str:
        """Name of the buffer with the codes."""
        return str(self.codes.target)

    @property
    def scale_name(self) -> str:
        """Name of the buffer with the scale."""
        return str(self.scale.target)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the buffers: codes, scale, and the offset of a weight that has one."""
        return self.codes_name, self.scale_name, *(() if self.offset is None else (str(self.offset.target),))

    @property
    def parameter(self) -> str:
        """Name of the parameter that Pack made the codes from."""
        return self.codes_name.removeprefix("packed.").removesuffix("_codes")


def as_packed(argument: Any) -> PackedWeight | None:
    """Return the packed weight that an argument is, or None."""
    if not isinstance(argument, Node) or argument.target is not numerics.unpack_ternary:
        return None
    arguments: Any = argument.args
    codes, scale, shape, dtype = arguments
    more: Any = argument.kwargs
    return PackedWeight(argument, codes, scale, tuple(shape), dtype, more.get("group", 0), more.get("offset"))


def looked_up(node: Node) -> PackedWeight | None:
    """Return the table of an embedding, None for any other node."""
    table = as_packed(node.args[0]) if aten_name(node) == "embedding" else None
    return table if table is not None and len(table.shape) == 2 else None


def packed_weights(gm: GraphModule) -> Iterator[PackedWeight]:
    """Yield the packed weights in graph order; a tied weight may be read more than once."""
    for node in gm.graph.nodes:
        weight = as_packed(node)
        if weight is not None:
            yield weight


def weight_encodings(gm: GraphModule) -> dict[str, Encoding]:
    """Return the encoding of each packed weight, by parameter name.

    What a product computes is what its nodes say; of encodings of the same numerics, it is the one that
    ``QuantizeActivations`` recorded.
    """
    recorded = facts(gm).encodings
    default = facts(gm).encoding or _first_encoding(gm)
    found = {
        weight.parameter: get_encoding(recorded.get(weight.parameter, default))
        for weight in packed_weights(gm)
    }
    for node in gm.graph.nodes:
        weight = ternary_factor(node)
        if weight is None:
            continue
        computed = quantiser_of(activation_of(node))
        if computed is not None and computed is not found[weight.parameter].quantiser:
            found[weight.parameter] = encoding_with(computed)
    return found


def weight_quantisers(gm: GraphModule) -> dict[str, Quantiser | None]:
    """Return what the activation of each packed weight is quantised by, by parameter name, None for float."""
    return {name: encoding.quantiser for name, encoding in weight_encodings(gm).items()}


def _first_encoding(gm: GraphModule) -> str:
    """Return the encoding of the first quantiser in a graph where a user put quantisers by hand."""
    found = next(filter(None, map(quantiser_of, gm.graph.nodes)), None)
    return "float" if found is None else encoding_with(found).name


def encoding_of(gm: GraphModule) -> WeightEncodings:
    """Return the names of the encodings of the student's weights."""
    found = weight_encodings(gm)
    counts = Counter(encoding.name for encoding in found.values())
    ((most, _),) = counts.most_common(1) or (("float", 0),)
    return WeightEncodings(
        most, {name: encoding.name for name, encoding in found.items() if encoding.name != most}
    )


def batch_dependent(gm: GraphModule) -> tuple[str, ...]:
    """Return the weights whose activation has one range for the whole batch, by name, in graph order.

    Through them a row's result depends on what else is in its batch. ``attention`` stands for the products of attention
    where those are quantised so, too.
    """
    found: dict[str, None] = {}
    for node in gm.graph.nodes:
        quantiser = quantiser_of(node)
        if quantiser is not None and not quantiser.batch_invariant:
            for reader in node.users:
                weight = ternary_factor(reader)
                found[ATTENTION if weight is None else weight.parameter] = None
    return tuple(found)


def is_quantised(gm: GraphModule) -> bool:
    """Whether any activation is fake-quantised."""
    return any(quantiser_of(node) for node in gm.graph.nodes)


def ternary_factor(node: Node) -> PackedWeight | None:
    """Return the packed weight that a linear layer reads, as it is or transposed, None for any other node."""
    if aten_name(node) not in PRODUCTS:
        return None
    weight: Any = node.args[PRODUCTS[aten_name(node)] + 1]
    if isinstance(weight, Node) and aten_name(weight) == "t":
        weight = weight.args[0]
    return as_packed(weight)


def activation_of(node: Node) -> Node:
    """Return what a linear layer multiplies its weight by."""
    source = node.args[PRODUCTS[aten_name(node)]]
    assert isinstance(source, Node)
    return source
