"""Outputs are told apart: logits by name or by the layer that computes them, embeddings by the layers before them."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule, Node

from ti_fx.find.walk import Walk, is_float
from ti_fx.ir import roles
from ti_fx.ir.edit import ancestors, aten_name, stored
from ti_fx.ir.outputs import model_outputs, named_leaves


def name_is_logits(name: str) -> bool:
    """Whether a model calls an output logits: ``logits``, ``start_logits``, ``logits_per_image``."""
    return name == "logits" or name.endswith("_logits") or name.startswith("logits_")


def logits(gm: GraphModule) -> list[Node]:
    """Return the outputs that are logits: those called so; where none has a name, the first if a linear layer makes it.

    What a norm, a division by a length or a tanh makes is an embedding.
    """
    named = named_leaves(model_outputs(gm))
    found = [node for name, node in named.items() if name_is_logits(name)]
    unnamed = all(name == "output" or name.split(".")[0].isdigit() for name in named)
    if found or not unnamed:
        return found
    first = next((node for node in named.values() if is_float(node)), None)
    return [first] if first is not None and _is_linear(gm, first) else []


def _is_linear(gm: GraphModule, node: Node) -> bool:
    """Whether a stored weight makes a value, past what only moves it, adds a bias to it or scales it by a number."""
    walk = Walk(gm, "student")
    while not walk.is_projection(node):
        active = [source for source in node.all_input_nodes if source in walk.active and is_float(source)]
        moves = walk.is_transparent(node) or aten_name(node) in ("add", "mul", "div")
        if len(active) != 1 or not moves:
            return False
        node = active[0]
    return True


def embeddings(gm: GraphModule, compared: Iterable[Node]) -> list[Node]:
    """Return the floating-point outputs that a matrix computes beyond the nodes that are compared already.

    Outputs within a structure (all hidden states, a tuple) are none.
    """
    known = set(compared)
    found = []
    for name, node in named_leaves(model_outputs(gm)).items():
        if not is_float(node) or ("." in name and not name.split(".")[0].isdigit()) or node in known:
            continue
        beyond = ancestors([node], stop=lambda one: one in known)
        if any((value := stored(gm, one)) is not None and value.dim() > 1 for one in beyond - known):
            found.append(node)
    return [node for node in dict.fromkeys(found) if roles.is_student(node)]
