"""Give a packed student another encoding than the one it was trained with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ti_fx.errors import PostconditionError, PreconditionError
from ti_fx.find.packed import PRODUCTS, activation_of, packed_weights, ternary_factor, weight_quantisers
from ti_fx.ir.edit import aten_name, call, prune, rename
from ti_fx.ir.facts import facts, record_facts
from ti_fx.ir.inserted import quantiser_of
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import PACKED
from ti_fx.numerics.encodings import get_encoding
from ti_fx.numerics.quantiser import Quantiser
from ti_fx.passes.prepare.first_steps import erase_quantiser, erase_unread, steps_of


@dataclass(frozen=True)
class Requantize(Pass):
    """Every activation that is quantised is quantised by another encoding.

    before:  %x_int8 = int8_tensor(%x)           after:  %x_int8 = int8_token(%x)
             %h = linear(%x_int8, %w_q)                  %h = linear(%x_int8, %w_q)

    1. a fake-quantiser is swapped, those of attention too
    2. for ``float`` it goes
    3. where float was trained, one is inserted before each product of a packed weight; a projection that
       ``QuantizeActivations`` skipped stays as it is

    Attributes:
        encoding: a name from ``ti_fx.numerics.encodings.ENCODINGS``; recorded in the graph for all its weights.
    """

    takes = (PACKED,)

    encoding: str

    def requires(self, gm: GraphModule) -> None:
        """Packed weights: before ``Pack`` it is ``QuantizeActivations`` that sets the encoding. Steps are learned."""
        wanted = get_encoding(self.encoding).quantiser
        if wanted is not None and wanted.start is not None:
            lacking = [name for name, found in weight_quantisers(gm).items() if found is not wanted]
            lacking += [
                f"%{node.name}" for node in gm.graph.nodes if quantiser_of(node) not in (None, wanted)
            ]
            if lacking:
                raise PreconditionError(
                    f"requantize can't learn the steps of {self.encoding}, and {lacking[0]} has none; train with "
                    f"QuantizeActivations(encoding={self.encoding!r})"
                )
        if not any(packed_weights(gm)):
            raise PreconditionError("requantize needs packed weights", missing="pack")

    def apply(self, gm: GraphModule) -> None:
        """Swap, remove or insert the quantisers, and record the encoding of each weight."""
        quantiser = get_encoding(self.encoding).quantiser
        present = [node for node in gm.graph.nodes if quantiser_of(node)]
        recorded, learned = facts(gm).encodings, False
        for node in present:
            if quantiser is None:
                node.replace_all_uses_with(node.all_input_nodes[0])
                learned |= erase_quantiser(node)
            elif quantiser_of(node) is not quantiser:
                learned |= _swap(node, quantiser)
        if learned:
            prune(gm)
        if quantiser is not None and (recorded or not present):
            _quantise_products(gm, quantiser, recorded or _parameters(gm))
        record_facts(gm, encoding=self.encoding, encodings=dict.fromkeys(recorded, self.encoding))

    def ensures(self, gm: GraphModule) -> None:
        """No other quantiser is left."""
        wanted = get_encoding(self.encoding).quantiser
        for node in gm.graph.nodes:
            if quantiser_of(node) not in (None, wanted):
                raise PostconditionError(f"requantize left %{node.name}")


def _swap(node: Node, quantiser: Quantiser) -> bool:
    """Let a fake-quantiser be another one, whose bits its name says; return whether a step is read no more."""
    old, learned = quantiser_of(node), steps_of(node)
    node.target, node.args = quantiser.function, node.args[:1]
    erase_unread(learned)
    if old is not None and old.suffix != quantiser.suffix:
        rename(node, f"{node.all_input_nodes[0].name}_{quantiser.suffix}")
    return bool(learned)


def _parameters(gm: GraphModule) -> set[str]:
    return {weight.parameter for weight in packed_weights(gm)}


def _quantise_products(gm: GraphModule, quantiser: Quantiser, names: Collection[str]) -> None:
    """Put a fake-quantiser before each product of a packed weight called so that has none; readers of one share it."""
    inserted: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        weight = ternary_factor(node)
        if weight is None or weight.parameter not in names or quantiser_of(activation_of(node)):
            continue
        source = activation_of(node)
        if source not in inserted:
            name = f"{source.name}_{quantiser.suffix}"
            inserted[source] = call(node, quantiser.function, (source,), name, "student")
        node.update_arg(PRODUCTS[aten_name(node)], inserted[source])
