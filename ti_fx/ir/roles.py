"""Each node records its role and what passes did to it under one key of ``node.meta``.

Every node has a role:

==========  ===========================================================================================
shared      no parameter, buffer or randomness upstream (inputs, masks made from them); read by everyone
student     the network that is trained and shipped; a fresh capture is all student
teacher     a frozen copy of a student node, its *twin*
loss        computed from the others for training only
==========  ===========================================================================================
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch.fx import Graph, Node

from ti_fx.errors import VerificationError

KEY = "ti_fx"
TEACHER = "teacher"  # the submodule that holds the teacher's frozen tensors
TEACHER_PREFIX = f"{TEACHER}."  # of their names
# the submodules that hold what quantisers learn: weight_quant.<parameter>.<name>, activation_quant.<node>.<name>
WEIGHT_QUANT, ACTIVATION_QUANT = "weight_quant", "activation_quant"
LEARNED_PREFIXES = (f"{WEIGHT_QUANT}.", f"{ACTIVATION_QUANT}.")  # of their names
Role = Literal["shared", "student", "teacher", "loss"]
ROLES: tuple[Role, ...] = get_args(Role)


def role(node: Node) -> Role | None:
    """Return the node's role, or None if it has none yet."""
    value: Role | None = node.meta.get(KEY, {}).get("role")
    return value


def set_role(node: Node, value: Role) -> None:
    """Give the node its role."""
    record(node, role=value)


def record(node: Node, **facts: Any) -> None:
    """Add facts (JSON values only, nodes by name) to the node's ti_fx entry; None removes a fact."""
    entry = {**node.meta.get(KEY, {}), **facts}
    node.meta[KEY] = {name: value for name, value in entry.items() if value is not None}


def fact(node: Node, name: str) -> Any:
    """Return one recorded fact, or None."""
    return node.meta.get(KEY, {}).get(name)


def is_student(node: Node) -> bool:
    """Whether the node belongs to the student."""
    return role(node) == "student"


def is_teacher(node: Node) -> bool:
    """Whether the node belongs to the teacher."""
    return role(node) == "teacher"


def stands_for(new: Node, old: Node) -> None:
    """Declare that a student node stands where ``old`` stood: its counterpart in the teacher is that of ``old``.

    A pass after DuplicateTeacher that changes the student alone calls it, for the node that others read in the place
    of ``old``: ``old`` may be gone, may feed ``new``, or may be ``new`` itself with another operation. Losses (those
    that read ``old`` now, too), interventions and the finders take ``new`` for the student's value from then on, and
    the rule that twins compute the same does not hold of it.

    Args:
        new: of the shape and dtype of ``old``.
        old: a student node, or one that stands for another.
    """
    record(new, stands_for=fact(old, "stands_for") or old.name)
    for user in list(old.users):
        if role(user) == "loss":
            user.replace_input_with(old, new)


def twins(graph: Graph) -> dict[Node, Node]:
    """Return teacher node -> student node: what DuplicateTeacher copied, or the last one that stands for that.

    Of the stream behind a layer that the student has not, it is the stream that the student reads in its place.
    """
    by_name = {node.name: node for node in graph.nodes}
    by_name |= {fact(node, "stands_for"): node for node in graph.nodes if fact(node, "stands_for")}
    names = {node: fact(node, "passed_over") or fact(node, "twin") for node in graph.nodes}
    return {node: by_name[name] for node, name in names.items() if name in by_name}


def twin_of(graph: Graph) -> dict[Node, Node]:
    """Return student node -> teacher node: :func:`twins`, read the other way, with all that stand for one."""
    teacher = {fact(node, "twin"): node for node in graph.nodes if fact(node, "twin")}
    found = {node: teacher.get(fact(node, "stands_for") or node.name) for node in graph.nodes}
    return {node: twin for node, twin in found.items() if twin is not None and is_student(node)}


def infer(graph: Graph) -> None:
    """Give nodes without a role the one their inputs imply: loss over student over teacher over shared.

    Raises:
        VerificationError: a node without a role reads both teacher and student.
    """
    for node in graph.nodes:
        if role(node) is not None:
            continue
        inputs = {role(source) for source in node.all_input_nodes}
        if "loss" in inputs:
            set_role(node, "loss")
        elif {"teacher", "student"} <= inputs:
            raise VerificationError(
                f"one role per node: %{node.name} has no role and reads both teacher and student; give it one with "
                "ti_fx.ir.roles.set_role"
            )
        elif "teacher" in inputs:
            set_role(node, "teacher")
        else:
            outside = node.op in ("get_attr", "call_module", "output")
            set_role(node, "student" if outside or "student" in inputs else "shared")
