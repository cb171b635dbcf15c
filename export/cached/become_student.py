"""A newly captured graph gets the packed student's codes, scales, quantisers and full-precision tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn
from torch.fx import GraphModule

from ti_fx.errors import ExportError, PostconditionError
from ti_fx.find.packed import PackedWeight, packed_weights, weight_encodings
from ti_fx.ir.edit import aten_name, get_attr, register, tensor
from ti_fx.ir.facts import facts, record_facts
from ti_fx.ir.inserted import quantiser_of
from ti_fx.ir.pipeline import Pass, Pipeline
from ti_fx.ir.stages import CAPTURED, PACKED, PREPARED
from ti_fx.numerics.weight_codes import CLIP
from ti_fx.numerics.weight_quantisers.twn import TWN
from ti_fx.passes import Pack, QuantizeActivations
from ti_fx.passes.deploy.pack import half_name
from ti_fx.passes.prepare.sub_norms import SUB_NORMS
from ti_fx.passes.prepare.ternarize import quantise


def become(gm: GraphModule, student: GraphModule) -> list[str]:
    """Turn a captured graph into the student: its ternary weights, its quantisers, its tensors.

    Returns the student's ternary parameters that the graph does not read.
    """
    weights = {weight.parameter for weight in packed_weights(student)}
    read = _stored(gm)
    Pipeline(
        BecomeStudent(student),
        _quantisers(student, weights & read),
        Pack(kept="float16" if any(half_name(name) in _stored(student) for name in read) else "float32"),
        TakeCodes(student),
    )(gm)
    return sorted(weights - read)


@dataclass(frozen=True)
class BecomeStudent(Pass):
    """Each weight that is ternary in the student is read through its quantiser; every other tensor is the student's.

    before:  %w = w                              after:  %w = w
             %h = linear(%x, %w)                         %w_q = ternary(%w)
                                                         %h = linear(%x, %w_q)

    1. a ternary weight keeps its values, which ``Pack`` needs and :class:`TakeCodes` replaces
    2. of a tensor that the student keeps in half precision, the float32 values are taken, which ``Pack`` halves again
    3. what the forward made itself is no tensor of the model's, and stays

    Attributes:
        student: a packed graph of the same model.
    """

    takes = (CAPTURED,)
    gives = PREPARED

    student: GraphModule = field(compare=False, repr=False)

    def requires(self, gm: GraphModule) -> None:
        """The student's own model, each tensor of which is either ternary or not.

        Raises:
            ExportError: a weight is read both ways, the student lacks one that the graph reads, or it has other layers.
        """
        kept, weights = _stored(self.student), _weights(self.student)
        own = next((name for name in sorted(kept) if name.startswith(SUB_NORMS)), None)
        other = facts(self.student).kept_layers or (own and "sub-norms")
        if other:
            raise ExportError(
                f"the student was made with {other}, so its graph is not the model's, of which a cached one is made; "
                "export it without a cache"
            )
        both = sorted(weights.keys() & kept & _stored(gm))
        if both:
            raise ExportError(
                f"{both[0]} is read both packed and in full precision (Ternarize(tied='embedding')); "
                "a cached graph takes tied='both'"
            )
        for name in sorted(_stored(gm) - weights.keys()):
            known = is_constant(name) or name in kept or half_name(name) in kept
            if not known and isinstance(tensor(gm, name), nn.Parameter):
                raise ExportError(
                    f"the cached graph reads {name}, and the student does not; is this its model?"
                )

    def apply(self, gm: GraphModule) -> None:
        """Insert the weights' quantisers, and take the other tensors."""
        kept, weights = _stored(self.student), _weights(self.student)
        for node in gm.graph.find_nodes(op="get_attr"):
            name, half = str(node.target), half_name(str(node.target))
            if name in weights:
                # any method serves whose scale has the student's shape
                quantise(node, TWN, {"granularity": _granularity(self.student, weights[name]), "clip": CLIP})
            elif is_constant(name):
                continue
            elif name in kept:
                register(gm, name, tensor(self.student, name))
            elif half in kept:
                value = tensor(self.student, half).float()
                register(gm, name, nn.Parameter(value, requires_grad=False))
        record_facts(gm, recipe=facts(self.student).recipe)


@dataclass(frozen=True)
class TakeCodes(Pass):
    """The codes and the scale of each packed weight are the student's; the nodes stay, and an offset is added.

    Attributes:
        student: a packed graph of the same model.
    """

    takes = (PACKED,)

    student: GraphModule = field(compare=False, repr=False)

    def apply(self, gm: GraphModule) -> None:
        """Replace the tensors."""
        own = _weights(self.student)
        for weight in list(packed_weights(gm)):
            for target in own[weight.parameter].names:
                register(gm, target, tensor(self.student, target))
            if (offset := own[weight.parameter].offset) is not None and weight.offset is None:
                read = get_attr(weight.node, str(offset.target), offset.name, "student", like=weight.node)
                weight.node.kwargs = {**weight.node.kwargs, "offset": read}

    def ensures(self, gm: GraphModule) -> None:
        """Both graphs hold the same tensors."""
        for weight in packed_weights(gm):
            if tensor(gm, weight.codes_name) is not tensor(self.student, weight.codes_name):
                raise PostconditionError(f"take-codes left {weight.codes_name}")


def _stored(gm: GraphModule) -> set[str]:
    return {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}


def _weights(student: GraphModule) -> dict[str, PackedWeight]:
    return {weight.parameter: weight for weight in packed_weights(student)}


def _granularity(student: GraphModule, weight: PackedWeight) -> str:
    if weight.group:
        return f"group-{weight.group}"
    return "row" if tensor(student, weight.scale_name).dim() else "tensor"


def is_constant(name: str) -> bool:
    """Whether a graph's tensor is no model's, but was made in the forward: two graphs number theirs differently."""
    return name.rpartition(".")[2].startswith("lifted_tensor_")


def _quantisers(student: GraphModule, weights: Collection[str]) -> QuantizeActivations:
    """Return the pass that gives a graph with these weights the student's activation quantisers."""
    encodings = {name: one.name for name, one in weight_encodings(student).items() if name in weights}
    for node in student.graph.nodes:
        if (quantiser := quantiser_of(node)) is not None and quantiser.start is not None:
            raise ExportError(
                f"%{node.name} has a learned step, which a graph with a cache can't take over; export it without a "
                "cache, or train it with an encoding whose ranges are not learned"
            )
    attention = any(
        aten_name(reader) in ("matmul", "bmm")
        and all(quantiser_of(source) for source in reader.all_input_nodes)
        for node in student.graph.nodes
        if quantiser_of(node)
        for reader in node.users
    )
    most = next(iter(encodings.values()), "float")
    others = {name: one for name, one in encodings.items() if one != most}
    return QuantizeActivations(most, attention=attention, encodings=others)
