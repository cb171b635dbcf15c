"""A newly captured graph gets the packed student's codes, scales, quantisers and full-precision tensors."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.fx import GraphModule

from ti_fx.errors import ExportError
from ti_fx.find.packed import packed_weights, weight_encodings
from ti_fx.ir.edit import aten_name, register, tensor
from ti_fx.ir.facts import facts, record_facts
from ti_fx.ir.inserted import quantiser_of
from ti_fx.ir.pipeline import Pipeline
from ti_fx.ir.shapes import refresh
from ti_fx.passes import Pack, QuantizeActivations
from ti_fx.passes.deploy.pack import half_name
from ti_fx.passes.prepare.ternarize import quantise


def become(gm: GraphModule, student: GraphModule) -> list[str]:
    """Turn a captured graph into the student: its ternary weights, its quantisers, its tensors.

    Returns the student's ternary parameters that the graph does not read.
    """
    weights = {weight.parameter: weight for weight in packed_weights(student)}
    found = {str(node.target): node for node in gm.graph.find_nodes(op="get_attr")}
    kept = {str(node.target) for node in student.graph.find_nodes(op="get_attr")}
    missing = sorted(weights.keys() - found.keys())
    weights = {name: weight for name, weight in weights.items() if name in found}
    both = sorted(weights.keys() & kept)
    if both:
        raise ExportError(
            f"{both[0]} is read both packed and in full precision (Ternarize(tied='embedding')); "
            "a cached graph takes tied='both'"
        )
    for name, weight in weights.items():
        quantise(found[name], "row" if tensor(student, weight.scale_name).dim() else "tensor")
    refresh(gm, ())
    halves = False
    for name in found.keys() - weights.keys():
        if is_constant(name):
            continue
        half = half_name(name)
        if name in kept:
            register(gm, name, tensor(student, name))
        elif half in kept:
            halves = True
            register(gm, name, nn.Parameter(tensor(student, half).float(), requires_grad=False))
        elif isinstance(tensor(gm, name), nn.Parameter):
            raise ExportError(f"the cached graph reads {name}, and the student does not; is this its model?")
    Pipeline(_quantisers(student, weights), Pack(kept="float16" if halves else "float32"))(gm)
    for weight in weights.values():
        for target in (weight.codes_name, weight.scale_name):
            register(gm, target, tensor(student, target))
    record_facts(gm, recipe=facts(student).recipe)
    return missing


def is_constant(name: str) -> bool:
    """Whether a graph's tensor is no model's, but was made in the forward: two graphs number theirs differently."""
    return name.rpartition(".")[2].startswith("lifted_tensor_")


def _quantisers(student: GraphModule, weights: Collection[str]) -> QuantizeActivations:
    """Return the pass that gives a graph with these weights the student's activation quantisers."""
    encodings = {name: one.name for name, one in weight_encodings(student).items() if name in weights}
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
