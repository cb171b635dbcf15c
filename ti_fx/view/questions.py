"""Questions about a graph are answered by what can be reached in its networkx view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networkx
from torch.fx import GraphModule

from ti_fx.errors import InputError, did_you_mean
from ti_fx.view.network import to_networkx


@dataclass(frozen=True)
class Answer:
    """The names that answer a question, grouped, each group under a sentence that says what it holds."""

    question: str
    groups: dict[str, tuple[str, ...]]


def output_without_loss(graph: networkx.DiGraph[str]) -> Answer:
    """Return the student's nodes that feed an output and no loss: nothing trains them but the task's own loss.

    Args:
        graph: from :func:`ti_fx.view.to_networkx`.
    """
    outputs = set(graph.graph["outputs"])
    feeding = outputs.union(*(networkx.ancestors(graph, name) for name in outputs))
    trained = _ancestors(graph, _loss(graph))
    found = [name for name in graph if name in feeding - trained and graph.nodes[name]["role"] == "student"]
    return Answer(
        "What feeds the output but no loss?",
        {
            "parameters": tuple(name for name in found if graph.nodes[name]["op"] == "parameter"),
            "other nodes": tuple(name for name in found if graph.nodes[name]["op"] != "parameter"),
        },
    )


def teacher_cone(graph: networkx.DiGraph[str]) -> Answer:
    """Return everything the teacher's values are computed from, and who reads the teacher."""
    teacher = {name for name in graph if graph.nodes[name]["role"] == "teacher"}
    cone = teacher.union(*(networkx.ancestors(graph, name) for name in teacher))
    readers = {reader for name in teacher for reader in graph.successors(name)} - teacher
    by_role = {
        role: tuple(name for name in graph if name in readers and graph.nodes[name]["role"] == role)
        for role in ("student", "loss")
    }
    return Answer(
        "What does the teacher consist of, and who reads it?",
        {
            "teacher": tuple(name for name in graph if name in teacher),
            "shared nodes that the teacher reads": tuple(name for name in graph if name in cone - teacher),
            "student nodes that read the teacher (interventions)": by_role["student"],
            "loss nodes that read the teacher": by_role["loss"],
        },
    )


def trained(graph: networkx.DiGraph[str]) -> Answer:
    """Return which of the student's stored tensors get a gradient from the loss, and which don't.

    Edges are followed backward from the loss; a gradient stops at a detach, at the teacher, and at values that are not
    floating point (indices, masks, sizes).
    """
    loss = _loss(graph)
    if loss is None:
        raise InputError(
            "the graph has no loss, so nothing is trained; run duplicate-teacher and distill first"
        )
    reached: set[str] = set()
    queue = [loss]
    while queue:
        name = queue.pop()
        if name in reached or not _carries_gradient(graph, name):
            continue
        reached.add(name)
        queue.extend(graph.predecessors(name))
    stored = [
        name
        for name, attributes in graph.nodes(data=True)
        if attributes["op"] == "parameter" and attributes["role"] == "student" and _is_floating(attributes)
    ]
    return Answer(
        "Which stored tensors get a gradient?",
        {
            "trained": tuple(str(graph.nodes[name]["target"]) for name in stored if name in reached),
            "without a gradient": tuple(
                str(graph.nodes[name]["target"]) for name in stored if name not in reached
            ),
        },
    )


QUESTIONS: dict[str, Callable[[networkx.DiGraph[str]], Answer]] = {
    "output-without-loss": output_without_loss,
    "teacher-cone": teacher_cone,
    "trained": trained,
}


def ask(gm: GraphModule, question: str) -> Answer:
    """Answer one of ``QUESTIONS`` about a graph.

    Raises:
        InputError: there is no such question, or the graph is not ready for it.
    """
    if question not in QUESTIONS:
        raise InputError(f"can't answer {question!r}{did_you_mean(question, QUESTIONS)}")
    return QUESTIONS[question](to_networkx(gm))


def _loss(graph: networkx.DiGraph[str]) -> str | None:
    loss: str | None = graph.graph.get("loss")
    return loss


def _ancestors(graph: networkx.DiGraph[str], name: str | None) -> set[str]:
    return set() if name is None else {name, *networkx.ancestors(graph, name)}


def _is_floating(attributes: dict[str, object]) -> bool:
    return "float" in str(attributes.get("dtype", "float"))


def _carries_gradient(graph: networkx.DiGraph[str], name: str) -> bool:
    attributes = graph.nodes[name]
    stops = attributes["op"] == "detach" or attributes["role"] in ("teacher", "shared")
    return not stops and _is_floating(attributes)
