"""Add a frozen copy of the student, node by node, that later passes take values from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx.errors import InputError, PostconditionError, PreconditionError
from ti_fx.ir import leaves, roles
from ti_fx.ir.edit import insert, register, tensor
from ti_fx.ir.inserted import is_ours, reads_weight
from ti_fx.ir.leaves import is_dropout
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.roles import TEACHER, TEACHER_PREFIX
from ti_fx.ir.stages import CAPTURED, PREPARED


@dataclass(frozen=True)
class DuplicateTeacher(Pass):
    """Every student node gets a frozen twin; outputs don't change.

    before:  %h = linear(%x, %w)   #student       after:  %h = linear(%x, %w)           #student
                                                          %h_t = linear(%x_t, %w_t)     #teacher

    1. a parameter or buffer is copied once to ``teacher.<its name>``, as a Parameter without gradient (buffers would be
       broadcast by DDP at every step and duplicated by ``.to()``); of whole numbers, which are few, as a buffer
    2. dropout has no twin: the teacher reads past it
    3. other leaf modules are copied in eval mode, whatever ``train()`` says
    4. shared nodes (inputs, masks) are read by both
    5. a graph that has a teacher keeps its nodes; with ``teacher=`` the values are taken anew

    Attributes:
        teacher: the module to take values from, with the student's parameter names and shapes; None: the student.
    """

    takes = (CAPTURED, PREPARED)
    gives = PREPARED

    teacher: nn.Module | None = field(default=None, compare=False)

    def requires(self, gm: GraphModule) -> None:
        """A graph that is not quantised yet."""
        if any(roles.is_teacher(node) for node in gm.graph.nodes):
            return
        for node in gm.graph.nodes:
            quantised = reads_weight(node) or is_ours(node)
            if node.op == "call_function" and quantised:
                raise PreconditionError(
                    f"duplicate-teacher needs the full-precision graph, and %{node.name} quantises; run it first"
                )

    def apply(self, gm: GraphModule) -> None:
        """Insert each twin right after its student node."""
        has_teacher = any(roles.is_teacher(node) for node in gm.graph.nodes)
        if has_teacher and self.teacher is None:
            return
        values = None if self.teacher is None else _named_tensors(self.teacher)
        modules = {str(node.target): gm.get_submodule(str(node.target)) for node in _teacher_modules(gm)}
        own = _own_values(gm)
        gm._modules[TEACHER] = nn.Module()  # a fork keeps the teacher it had
        _copy_values(own, gm, values)
        for target, module in modules.items():
            register(gm, target, module)
        if has_teacher:
            return
        twins: dict[Node, Node] = {}
        for node in [node for node in gm.graph.nodes if roles.is_student(node) and node.op != "output"]:
            if is_dropout(gm, node):
                source = node.args[0]
                assert isinstance(source, Node)
                twins[node] = twins.get(source, source)
            else:
                twins[node] = _twin(gm, node, twins)

    def ensures(self, gm: GraphModule) -> None:
        """Every student node but dropout and the output has a twin."""
        students = set(roles.twins(gm.graph).values())
        if not students:
            raise PostconditionError("duplicate-teacher made no teacher: the graph has no student node")


def _teacher_modules(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.find_nodes(op="call_module") if roles.is_teacher(node)]


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _own_values(gm: GraphModule) -> dict[str, Tensor]:
    """Return the tensors that the student reads, by name, and those of the teacher that the student has not."""
    reads = gm.graph.find_nodes(op="get_attr")
    found = {str(node.target).removeprefix(TEACHER_PREFIX): node for node in reads if roles.is_teacher(node)}
    # the share of a blend is none of the model's, and what a quantiser learns has no part in the teacher
    found |= {
        str(node.target): node
        for node in reads
        if roles.is_student(node)
        and not roles.fact(node, "intervention")
        and not str(node.target).startswith(roles.LEARNED_PREFIXES)
    }
    return {name: tensor(gm, str(node.target)) for name, node in found.items()}


def _copy_values(own_values: dict[str, Tensor], gm: GraphModule, values: dict[str, Tensor] | None) -> None:
    """Register ``teacher.<name>`` for each."""
    for target, own in own_values.items():
        value = own if values is None else values.get(target)
        if value is None:
            raise InputError(f"the teacher has no tensor {target}; give a model of the same architecture")
        if value.shape != own.shape:
            raise InputError(
                f"the teacher's {target} is {tuple(value.shape)}, the student's {tuple(own.shape)}"
            )
        copy = value.detach().clone().to(own.device)
        # whole numbers stay a buffer: an average over parameters could not be taken of them
        frozen = nn.Parameter(copy, requires_grad=False) if copy.is_floating_point() else copy
        register(gm, TEACHER_PREFIX + target, frozen)


def _twin(gm: GraphModule, node: Node, twins: dict[Node, Node]) -> Node:
    def read(argument: Node) -> Node:
        return twins.get(argument, argument)

    args = torch.fx.node.map_arg(node.args, read)
    kwargs: dict[str, Any] = torch.fx.node.map_arg(dict(node.kwargs), read)
    target: Any = node.target
    if node.op == "get_attr":
        target = f"{TEACHER_PREFIX}{node.target}"
    elif node.op == "call_module":
        target = f"{TEACHER_PREFIX}{node.target}"
        register(gm, target, leaves.Frozen(gm.get_submodule(str(node.target))))
    twin = insert(node.next, node.op, target, args, kwargs, name=f"{node.name}_t", role="teacher", like=node)
    roles.record(twin, twin=node.name)
    roles.record(node, stands_for=None)  # the teacher does what the student does now
    return twin
