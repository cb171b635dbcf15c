"""Each invariant of a graph is a rule with a name and a check that names the nodes which break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.errors import first_line
from ti_fx.ir import leaves, moved, phased, roles
from ti_fx.ir.blends import is_drawn_from, is_share_of, share_name
from ti_fx.ir.checks import is_assertion
from ti_fx.ir.edit import aten_name, stored
from ti_fx.ir.facts import facts
from ti_fx.ir.inserted import DETACHES, is_blend, is_ours, reads_weight, weight_quantiser_of
from ti_fx.ir.leaves import is_dropout
from ti_fx.ir.outputs import is_container, prepared_result
from ti_fx.ir.roles import TEACHER_PREFIX
from ti_fx.ir.shapes import guard_count


@dataclass(frozen=True)
class Invariant:
    """A rule of a stage; ``check`` yields a message for each node that breaks it."""

    name: str
    check: Callable[[GraphModule], Iterator[str]]


def _lint(gm: GraphModule) -> Iterator[str]:
    try:
        gm.graph.lint()
    except RuntimeError as error:
        yield first_line(error)


def _order(gm: GraphModule) -> Iterator[str]:
    seen: set[Node] = set()
    for node in gm.graph.nodes:
        late = [source.name for source in node.all_input_nodes if source not in seen]
        if late:
            yield f"%{node.name} reads %{late[0]}, which comes later"
        seen.add(node)


def _roles(gm: GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if roles.role(node) not in roles.ROLES:
            yield f"%{node.name} has role {roles.role(node)}; set it with ti_fx.ir.roles.set_role"
        elif roles.role(node) == "shared" and any(
            roles.role(source) != "shared" for source in node.all_input_nodes
        ):
            yield f"shared %{node.name} reads a value that is not shared"
        elif roles.role(node) == "shared" and node.op in ("get_attr", "call_module"):
            yield f"%{node.name} is shared and depends on a stored tensor or module; it is student or teacher"


def _teacher_reads(gm: GraphModule) -> Iterator[str]:
    intervened = {twin for twin, node in roles.twins(gm.graph).items() if roles.fact(node, "intervened")}
    for node in gm.graph.nodes:
        own = roles.role(node)
        for source in node.all_input_nodes:
            other = roles.role(source)
            if own == "teacher" and other in ("student", "loss"):
                yield f"teacher %{node.name} reads {other} %{source.name}"
            if own == "student" and other == "loss" and node.op != "output":
                yield f"student %{node.name} reads loss %{source.name}"
            if own == "student" and other == "teacher" and source not in intervened and node.op != "output":
                yield f"student %{node.name} reads teacher %{source.name}, which is at no intervened point"


def _interventions(gm: GraphModule) -> Iterator[str]:
    twins = roles.twin_of(gm.graph)
    taps = {node.name: node for node in gm.graph.nodes if roles.fact(node, "intervened")}
    detached: dict[str, set[str]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in DETACHES:
            continue
        name = str(roles.fact(node, "intervention"))
        if name not in taps:
            yield f"%{node.name} detaches for an intervention at %{name}, where there is none"
        detached.setdefault(name, set()).update(_readers(node))
    for node in taps.values():
        point = roles.fact(node, "intervened")
        if node not in twins:
            yield f"%{node.name} is intervened at {point} and has no twin"
            continue
        # the model's returned outputs keep the tap, and a blend of it reads it
        straying = [
            user.name
            for user in _students(gm, node, past_idle=bool(roles.fact(node, "blended")))
            if roles.fact(user, "intervention") != node.name or not roles.fact(node, "blended")
        ]
        if straying:
            yield f"%{straying[0]} reads the tap %{node.name}; at {point} it must read %{twins[node].name}"
        returned = any(user.op == "output" or is_container(user) for user in node.users)
        if not returned and not any(roles.is_student(user) for user in twins[node].users):
            yield f"%{node.name} is intervened at {point}, and no student node reads %{twins[node].name}"
        missing = set(roles.fact(node, "detaches") or ()) - detached.get(node.name, set())
        if missing:
            yield f"the input of %{min(missing)} is not detached for the intervention at %{node.name} ({point})"


def _students(gm: GraphModule, node: Node, *, past_idle: bool = False) -> Iterator[Node]:
    """Yield the student's readers of a value, returned outputs excepted; past dropouts without effect, if asked."""
    for user in node.users:
        if not roles.is_student(user) or user.op == "output" or is_container(user):
            continue
        if past_idle and leaves.is_idle_dropout(gm, user):
            yield from _students(gm, user, past_idle=True)
        else:
            yield user


def _readers(node: Node) -> Iterator[str]:
    """Yield who reads a detach, past the detaches of other blocks that share the projection."""
    for user in node.users:
        if user.op == "call_function" and user.target in DETACHES:
            yield from _readers(user)
        else:
            yield user.name


def _blends(gm: GraphModule) -> Iterator[str]:
    taps = {node.name: node for node in gm.graph.nodes if roles.fact(node, "blended")}
    twins = roles.twin_of(gm.graph)
    for node in gm.graph.nodes:
        tap = taps.get(str(roles.fact(node, "intervention")))
        if node.op != "call_function" or not (is_blend(node) or node.target in _BY_SHARE):
            continue
        if tap is None:
            yield f"%{node.name} blends for an intervention that blends nothing; undo it with intervene"
        elif is_blend(node) and (_before_idle(gm, node.args[0]), node.args[1]) != (tap, twins.get(tap)):
            yield f"%{node.name} must blend the tap %{tap.name} with the teacher's %{twins[tap].name}"
        elif not (is_drawn_from if is_blend(node) else is_share_of)(gm, node.args[-1], tap):
            yield (
                f"%{node.name} takes %{getattr(node.args[-1], 'name', node.args[-1])} for its share; it must be the "
                f"buffer {share_name(tap.name)}, which nothing trains"
            )
    for tap in taps.values():
        beside = (
            [user.name for user in _students(gm, twins[tap]) if not is_blend(user)] if tap in twins else []
        )
        if beside:
            yield f"%{beside[0]} reads the teacher's %{twins[tap].name} beside the blend at %{tap.name}"


def _before_idle(gm: GraphModule, node: object) -> object:
    """Return what dropouts without effect read."""
    while isinstance(node, Node) and leaves.is_idle_dropout(gm, node):
        node = node.args[0]
    return node


_BY_SHARE = (numerics.detach_by, numerics.route)  # what acts on gradients by the share of a blend


def _same_twins(gm: GraphModule) -> Iterator[str]:
    teacher_of = roles.twin_of(gm.graph)
    by_name = {node.name: node for node in gm.graph.nodes}

    def origin(source: Node) -> Node:
        """Resolve what the teacher has no copy of: quantisers, dropout, what an intervention inserted."""
        while source not in teacher_of and roles.role(source) == "student" and source.all_input_nodes:
            if clone_of := roles.fact(source, "clone_of"):
                source = by_name[clone_of]
                continue
            transparent = is_ours(source) or weight_quantiser_of(source) is not None or is_dropout(gm, source)
            transparent = transparent or phased.is_phase_in(source)
            if not transparent and not roles.fact(source, "intervention"):
                break
            source = source.all_input_nodes[0]
        return teacher_of.get(source, source)

    passed = {  # the stream behind a layer that the student has not
        node: teacher_of.get(by_name[name], node)
        for node in gm.graph.nodes
        if (name := roles.fact(node, "passed_over")) in by_name
    }
    for node, twin in teacher_of.items():
        if stood := roles.fact(node, "stands_for"):
            if not _fits(node.meta.get("val"), twin.meta.get("val")):
                yield f"%{node.name} stands for %{stood} and has another shape or dtype than %{twin.name}"
            continue
        if node.op in ("get_attr", "call_module") and twin.target != f"{TEACHER_PREFIX}{node.target}":
            yield f"teacher %{twin.name} reads {twin.target}, its twin {node.target}"
        if twin.op == "call_function" and twin.target is not node.target:
            yield f"teacher %{twin.name} computes another op than its twin %{node.name}; {_DECLARE}"
        expected = torch.fx.node.map_arg((node.args, dict(node.kwargs)), origin)
        read = torch.fx.node.map_arg((twin.args, dict(twin.kwargs)), lambda one: passed.get(one, one))
        if str(expected) != str(read):
            yield f"teacher %{twin.name} and its twin %{node.name} read different inputs or constants; {_DECLARE}"


_DECLARE = "where the student alone shall differ, declare it with ti_fx.stands_for(new, old)"


def _fits(one: object, other: object) -> bool:
    """Whether two values have one dtype and shape, as far as sizes are numbers."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other)
    sizes = list(zip(one.shape, other.shape, strict=False))
    numbers = [pair for pair in sizes if all(isinstance(size, int) for size in pair)]
    return (
        one.dtype == other.dtype
        and one.dim() == other.dim()
        and all(left == right for left, right in numbers)
    )


def _frozen(gm: GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if roles.role(node) != "teacher":
            continue
        if node.op == "get_attr" and (frozen := stored(gm, node)) is not None and frozen.requires_grad:
            yield f"{node.target} requires a gradient; the teacher is frozen"
        if node.op == "call_module" and not isinstance(
            gm.get_submodule(str(node.target)), leaves.Frozen | nn.Dropout
        ):
            yield f"teacher %{node.name} calls {node.target}, which follows train(); the teacher stays in eval mode"


def _teacher_dropout(gm: GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if roles.is_teacher(node) and (is_dropout(gm, node) or "dropout" in aten_name(node)):
            yield f"teacher %{node.name} is dropout; the teacher reads past it"


def _quantised_reads(gm: GraphModule) -> Iterator[str]:
    quantised = {
        node.args[0].target
        for node in gm.graph.nodes
        if weight_quantiser_of(node) is not None and isinstance(node.args[0], Node)
    }
    for node in gm.graph.nodes:
        if node.op != "get_attr" or node.target not in quantised:
            continue
        for user in node.users:
            if phased.is_phase_in(user):
                continue  # that rule is its own
            exempt = node.target in (roles.fact(user, "exempt") or ())
            if weight_quantiser_of(user) is None and not exempt:
                yield f"%{user.name} reads the latent {node.target} beside its quantiser"


def _tied(gm: GraphModule) -> Iterator[str]:
    storage: dict[int, str] = {}
    for node in gm.graph.nodes:
        value = stored(gm, node)
        if not isinstance(value, nn.Parameter):
            continue
        first = storage.setdefault(id(value), node.target)
        if first != node.target:
            yield f"{node.target} and {first} are one Parameter under two names; read it under one"
    for first, others in facts(gm).tied.items():
        for name in others:
            if name in storage.values():
                yield f"{name} is tied to {first} in the model, and is read as a tensor of its own"


def _losses(gm: GraphModule) -> Iterator[str]:
    result = prepared_result(gm)
    if result is None:
        return
    for name, node in {"loss": result.loss, **result.losses}.items():
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim():
            yield f"{name} (%{node.name}) has shape {tuple(value.shape)}; a loss is a scalar"


def _meta(gm: GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield f"%{node.name} has no meta['val']; run the edit in a Pipeline, which refreshes it"


def _guards(gm: GraphModule) -> Iterator[str]:
    allowed = facts(gm).guards
    if allowed is not None and guard_count(gm) > allowed:
        yield f"the graph's sizes have {guard_count(gm)} guards, {allowed} at capture; don't decide by a size in Python"


def _plain(gm: GraphModule) -> Iterator[str]:
    """What torch.export leaves beside operators: sub-graphs, its own assertions."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and stored(gm, node) is None:
            yield f"%{node.name} reads {node.target}, which is no tensor of the graph"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            yield f"%{node.name} calls a sub-graph ({node.target}); its nodes belong into the graph itself"
        if is_assertion(node):
            yield f"%{node.name} is an assertion of torch.export; inputs are checked before the call instead"


def _one_read(gm: GraphModule) -> Iterator[str]:
    first: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and first.setdefault(node.target, node.name) != node.name:
            yield f"%{node.name} reads {node.target}, as %{first[node.target]} does; a tensor is read by one node"


def _alone(gm: GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if roles.role(node) in ("teacher", "loss"):
            yield f"%{node.name} is {roles.role(node)}; the student alone is in the graph before preparation and after"


def _packed(gm: GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if weight_quantiser_of(node) is not None:
            yield f"%{node.name} quantises a latent weight; pack stores its codes"
        if phased.is_phase_in(node):
            yield f"%{node.name} reads a latent weight; strip takes out what is phased in"


def _no_role(gm: GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if roles.role(node) is not None:
            yield f"%{node.name} is {roles.role(node)}; a lowered graph has nothing to train and no roles"


def _nothing_for_training(gm: GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if is_dropout(gm, node):
            yield f"%{node.name} is dropout, which does nothing in evaluation"
        elif (
            is_ours(node)
            or is_blend(node)
            or reads_weight(node)
            or phased.is_phase_in(node)
            or node.target in _LOOK_UPS
        ):
            yield f"%{node.name} calls {_called(node)}, the numerics of training, which ONNX has no operator for"


_LOOK_UPS = (numerics.ternary_embedding, numerics.quantised_embedding)


def _called(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _real(gm: GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex():
            yield f"%{node.name} is complex, and ONNX has real numbers alone"


def _operators(gm: GraphModule) -> Iterator[str]:
    """An operator of torch is translated by the exporter; one of our own functions says which opset has it."""
    opset = facts(gm).opset
    for node in gm.graph.nodes:
        if node.op != "call_function" or not str(getattr(node.target, "__module__", "")).startswith("ti_fx."):
            continue
        since = getattr(node.target, "opset", None)
        if since is None:
            yield f"%{node.name} calls {_called(node)}, which no ONNX operator is"
        elif opset is not None and since > opset:
            yield f"%{node.name} needs opset {since} or newer ({_called(node)}), and the file has opset {opset}"


TOPOLOGICAL_ORDER = Invariant("topological order", _order)  # before lint, which has another name for it
LINT = Invariant("lint", _lint)
PLAIN = Invariant("operators alone, and checks of decisions", _plain)
ONE_READ = Invariant("one read per stored tensor", _one_read)
ONE_ROLE = Invariant("one role per node", _roles)
ALONE = Invariant("the student alone", _alone)
TEACHER_READS = Invariant("teacher values are read at intervened points only", _teacher_reads)
INTERVENTIONS = Invariant("interventions and their detaches are present", _interventions)
BLENDS = Invariant("a blend reads its tap, the teacher and its share", _blends)
TWINS = Invariant("twins compute the same", _same_twins)
FROZEN = Invariant("the teacher is frozen", _frozen)
TEACHER_DROPOUT = Invariant("the teacher has no dropout", _teacher_dropout)
QUANTISED_READS = Invariant("ternarised weights are read through their quantiser", _quantised_reads)
PHASED_IN = Invariant("a weight that is phased in is read by a share", phased.broken)
TIED = Invariant("tied weights stay tied", _tied)
SCALAR_LOSSES = Invariant("losses are scalar", _losses)
MOVED = Invariant("a weight that moves is a tensor of its own", moved.broken)
PACKED_WEIGHTS = Invariant("ternary weights are packed", _packed)
NO_ROLE = Invariant("no role", _no_role)
NOTHING_FOR_TRAINING = Invariant("nothing that only training needs", _nothing_for_training)
REAL = Invariant("real numbers alone", _real)
OPERATORS = Invariant("only what the opset has", _operators)
META = Invariant("meta present and consistent", _meta)
NO_GUARD = Invariant("no guard added", _guards)
