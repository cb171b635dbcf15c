"""Keep some of the layers: the student is shallower than its teacher, and begins with the weights of those it keeps."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ti_fx.errors import PostconditionError, PreconditionError, SelectionError
from ti_fx.find.attention import find_attention
from ti_fx.find.layers import Layer, find_layers
from ti_fx.ir import leaves, roles
from ti_fx.ir.edit import erase_dead, prune, replace_input
from ti_fx.ir.facts import facts, record_facts
from ti_fx.ir.outputs import is_container, prepared_result
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED


@dataclass(frozen=True)
class KeepLayers(Pass):
    """What read the stream behind a layer that goes reads the stream before it; the teacher keeps all its layers.

    before:  %x1 = layer 0 of %x0   #student         after:  %x2 = layer 1 of %x0       #student
             %x2 = layer 1 of %x1   #student                 %x1_t = layer 0 of %x0_t   #teacher
             ...                                             %x2_t = layer 1 of %x1_t   #teacher

    1. layers are found by the residual stream that each reads and leaves, in every stack of attention blocks
    2. the student's nodes and tensors of the others go; of what stays, each node keeps its twin, so that losses compare
       the stream behind a layer with the teacher's behind the layer that it was made from
    3. under an intervention a layer reads the teacher's stream behind the layer before it that was kept
    4. the student's layers are numbered anew, from 0

    The map from the student's layers to the model's is in the report. It runs before Distill, and once.

    Sources: layer reduction of XTC, arXiv 2206.01859, section 4; the map of evenly spread layers, whose last is the
    model's: TinyBERT, arXiv 1909.10351.

    Attributes:
        share: of each stack's layers that stay, at least one, evenly spread.
        layers: those that stay, by number; None: as ``share`` says.
        stack: of which layers go; None: of every one.
    """

    takes = (CAPTURED, PREPARED)
    gives = PREPARED

    share: float = 0.5
    layers: tuple[int, ...] | None = None
    stack: int | None = None

    def requires(self, gm: GraphModule) -> None:
        """Layers that can be told apart, and nothing outside that reads into one that goes."""
        done = facts(gm).kept_layers
        if done == str(self):
            return
        if done is not None:
            raise PreconditionError(
                f"{self} finds layers left out by {done} already; capture the model again"
            )
        if prepared_result(gm) is not None:
            raise PreconditionError(
                f"{self} comes before distill, whose losses compare layers; capture the model again"
            )
        if any(roles.fact(node, "intervened") for node in gm.graph.nodes):
            raise PreconditionError(f"{self} comes before an intervention; undo it with the pass intervene")
        if not 0 < self.share <= 1:
            raise SelectionError(f"keep-layers{{share={self.share}}}: give a number above 0, of at most 1")
        for layer in self._dropped(gm):
            _require_alone(layer)

    def _dropped(self, gm: GraphModule) -> list[Layer]:
        """Return the layers that go, in order."""
        found = find_layers(gm)
        if not found:
            raise PreconditionError(f"{self} finds no attention block, by which layers are told apart")
        return [layer for layer in found if layer.number not in self._kept(found, layer.stack)]

    def _kept(self, found: list[Layer], stack: int) -> tuple[int, ...]:
        """Return the numbers of the layers of a stack that stay."""
        count = sum(layer.stack == stack for layer in found)
        if self.stack is not None and self.stack not in {layer.stack for layer in found}:
            raise SelectionError(f"{self}: there is no stack {self.stack}; print ti_fx.find_attention(gm)")
        if self.stack not in (None, stack):
            return tuple(range(count))
        kept = spread(count, self.share) if self.layers is None else tuple(sorted(set(self.layers)))
        if not kept or not all(0 <= number < count for number in kept):
            raise SelectionError(
                f"{self}: stack {stack} has layers 0 to {count - 1}; keep at least one of these"
            )
        return kept

    def explain(self, gm: GraphModule) -> str:
        """Say which of the model's layers each stack's are."""
        return "\n".join(
            f"stack {stack}: layers 0 to {len(own) - 1} are the model's {', '.join(map(str, own))}"
            for stack, own in facts(gm).layer_map.items()
        )

    def apply(self, gm: GraphModule) -> None:
        """Pass the stream by each layer that goes, and erase what nobody reads any more."""
        if facts(gm).kept_layers is not None:
            return
        found, teacher, dropped = find_layers(gm), roles.twin_of(gm.graph), self._dropped(gm)
        kept = {stack: self._kept(found, stack) for stack in sorted({layer.stack for layer in found})}
        before: dict[Node, Node] = {}  # by the stream behind a layer that goes, the one before
        for layer in dropped:
            start = before[layer.end] = before.get(layer.start, layer.start)
            source = _behind_dropout(gm, start)
            for user in list(layer.end.users):
                if roles.is_student(user) or user.op == "output":
                    replace_input(user, layer.end, source)
            if layer.end in teacher:
                roles.record(teacher[layer.end], passed_over=start.name)
        erase_dead([node for node in gm.graph.nodes if roles.is_student(node) and node.op != "output"])
        there = {node.name for node in gm.graph.nodes}
        for twin in teacher.values():
            if roles.fact(twin, "twin") not in there:
                roles.record(twin, twin=None)
        prune(gm)
        record_facts(gm, kept_layers=str(self), layer_map=kept)

    def ensures(self, gm: GraphModule) -> None:
        """The student has the layers that stay."""
        for stack, own in facts(gm).layer_map.items():
            layers = {site.layer for site in find_attention(gm) if site.stack == stack}
            if layers != set(range(len(own))):
                raise PostconditionError(
                    f"keep-layers left {len(layers)} layers in stack {stack}, not {len(own)}"
                )


def _require_alone(layer: Layer) -> None:
    """Raise PreconditionError where something outside reads into a layer."""
    returned = [user for user in layer.end.users if user.op == "output" or is_container(user)]
    if returned and not layer.is_last:
        raise PreconditionError(
            f"the model returns what {layer.where} leaves (%{layer.end.name}), which would go; capture it without "
            "hidden states among its outputs, or keep this layer"
        )
    for node, user in layer.read_outside():
        reader = "the model returns" if user.op == "output" or is_container(user) else f"%{user.name} reads"
        raise PreconditionError(
            f"{reader} %{node.name} of {layer.where}, which would go; keep this layer, or let the model return no "
            "attention maps and no cache"
        )


def _behind_dropout(gm: GraphModule, stream: Node) -> Node:
    """Return what the student reads of a stream: the dropout behind it, where that alone reads it."""
    users = [user for user in stream.users if roles.is_student(user) and user.op != "output"]
    readers = [user for user in users if not is_container(user)]
    return readers[0] if len(readers) == 1 and leaves.is_dropout(gm, readers[0]) else stream


def spread(count: int, share: float) -> tuple[int, ...]:
    """Return which of so many layers stay: the last of each of as many parts of equal length as shall stay."""
    kept = max(1, round(count * share))
    return tuple((index + 1) * count // kept - 1 for index in range(kept))
