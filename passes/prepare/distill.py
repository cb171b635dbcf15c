"""Add the losses that pull the student towards the teacher, as nodes of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from ti_fx.errors import PostconditionError, PreconditionError
from ti_fx.find.attention import AttentionSite, block_outputs, find_attention, streams
from ti_fx.find.outputs import embeddings, logits, name_is_logits
from ti_fx.ir import roles
from ti_fx.ir.edit import ancestors, aten_name, call, erase
from ti_fx.ir.facts import record_facts
from ti_fx.ir.outputs import PreparedResult, model_outputs, named_leaves, prepared_result
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED
from ti_fx.numerics import losses

TERMS = ("logits", "layer_outputs", "scores", "attention_outputs", "embeddings")


@dataclass(frozen=True)
class Distill(Pass):
    """The graph returns the losses beside the student's outputs.

    before:  return %outputs                     after:  %loss_scores_0 = scores_error(%scores, %scores_t)  #loss
                                                         ...
                                                         return {loss: %loss, losses: {...}, outputs: %outputs}

    1. ``logits``: soft cross-entropy of every output called logits (where no output has a name, of the first one, if a
       linear layer computes it)
    2. ``layer_outputs``: mean squared error of the embeddings' and every layer's output, summed over layers
    3. ``scores``: mean squared error of attention scores, positions at or below -100 zeroed on both sides
    4. ``attention_outputs``: mean squared error of the attention block's output, summed over blocks: after the residual
       add and norm (``reference``, the published code) or the output projection's result (``paper``, Fig. 3)
    5. ``embeddings``: mean squared error of every other output that a layer beyond those compared computes: a
       sentence's vector, projected and normalised
    6. ``task``: the model's own loss on labels; its weight is recorded, and the trainer adds it. With this alone the
       graph needs no teacher, and its own loss is 0

    Sources: TernaryBERT, section 3.2; Teacher Intervention, section 4. The published weights are all 1, without task.
    The defaults of ``variant`` and ``mask_padding`` are the published code's, because measuring showed no difference:
    TI-G on the demo's task, 180 steps, one seed, has a validation accuracy of 91.8% as published, 92.2% with
    ``paper``, and 92.2% with ``mask_padding``; one standard error is 1.2 points.

    Attributes:
        logits: weight; None: 1 where the model returns logits, else 0.
        layer_outputs, scores, attention_outputs, task: weights; 0 leaves the term out.
        embeddings: weight; None: 1 where the model returns no logits, else 0.
        variant: which value ``attention_outputs`` compares.
        mask_padding: leave padding tokens out of the means; needs an attention mask among the inputs. Each stack is
            masked by its own; one without a mask among the inputs is not masked.
    """

    takes = (CAPTURED, PREPARED)
    gives = PREPARED

    logits: float | None = None
    layer_outputs: float = 1.0
    scores: float = 1.0
    attention_outputs: float = 1.0
    task: float = 0.0
    variant: Literal["reference", "paper"] = "reference"
    mask_padding: bool = False
    embeddings: float | None = None

    def requires(self, gm: GraphModule) -> None:
        """A teacher, and what the chosen terms compare."""
        if not any(roles.is_teacher(node) for node in gm.graph.nodes) and not self.is_task_alone:
            raise PreconditionError("distill needs a teacher", missing="duplicate-teacher")
        if self.logits and not logits(gm):
            raise PreconditionError("distill{logits} needs an output called logits; set logits=0")
        sites = find_attention(gm)
        if not sites and (self.scores or self.attention_outputs or self.layer_outputs):
            raise PreconditionError(
                "distill finds no attention block, so it has no scores, attention or layer outputs to compare; "
                "set those weights to 0"
            )
        if self.scores:
            for site in sites:
                if site.scores is None:
                    raise PreconditionError(
                        f"distill can't see the scores of {site.where} (%{site.context.name})",
                        missing="decompose-attention",
                    )
        if self.mask_padding and not any(_masks(gm, sites).values()):
            raise PreconditionError("distill{mask_padding=true} finds no attention mask among the inputs")
        if not self.task and not any(pairs for _, pairs, _ in self._terms(gm)):
            raise PreconditionError("distill has no term left: give at least one weight above 0")

    @property
    def is_task_alone(self) -> bool:
        """Whether nothing is compared with a teacher."""
        others = (self.layer_outputs, self.scores, self.attention_outputs, self.embeddings)
        return bool(self.task) and self.logits == 0 and not any(others)

    def _own_logits(self, gm: GraphModule) -> list[Node]:
        """Return the logits; with ``logits=0``, only those that are called so."""
        is_named = any(name_is_logits(name) for name in named_leaves(model_outputs(gm)))
        return logits(gm) if is_named or self.logits != 0 else []

    def _embeddings_weight(self, gm: GraphModule) -> float:
        if self.embeddings is not None:
            return self.embeddings
        return 0.0 if self.is_task_alone or logits(gm) else 1.0

    def explain(self, gm: GraphModule) -> str:
        """Say which output is taken for logits where none is called so."""
        found = logits(gm)
        if (
            not found
            or self.logits == 0
            or any(name_is_logits(name) for name in named_leaves(model_outputs(gm)))
        ):
            return ""
        return (
            f"%{found[0].name} is taken for logits, as a linear layer computes it and no output has a name; of an "
            "embedding, set logits=0 and embeddings=1"
        )

    def apply(self, gm: GraphModule) -> None:
        """Remove the losses there are and insert these before the output."""
        remove(gm)
        output = gm.graph.output_node()
        outputs = output.args[0]
        teacher = roles.twin_of(gm.graph)
        masks = _masks(gm, find_attention(gm)) if self.mask_padding else {}
        flat: dict[Node, Node] = {}
        each: dict[str, Node] = {}
        weights: list[float] = []
        for name, nodes, weight in self._terms(gm):
            if not nodes:
                continue
            parts = []
            for index, (node, stack) in enumerate(nodes):
                mask = masks.get(stack)
                if mask is not None and name == "attention_outputs" and node.meta["val"].dim() == 2:
                    if mask not in flat:  # a projection over (batch · tokens, width)
                        flat[mask] = call(output, _FLATTEN, (mask,), f"{mask.name}_flat", "loss")
                    mask = flat[mask]
                arguments = (node, teacher[node], mask)
                parts.append(call(output, _FUNCTIONS[name], arguments, f"loss_{name}_{index}", "loss"))
            each[name] = call(output, losses.total, (parts,), f"loss_{name}", "loss")
            weights.append(weight)
        if each:
            total = call(output, losses.weighted, (list(each.values()), weights), "loss", "loss")
        else:
            first = next(iter(named_leaves(outputs).values()))
            total = call(output, losses.nothing, (first,), "loss", "loss")
        output.args = (PreparedResult(total, each, outputs).structure(),)
        record_facts(gm, task=self.task)

    def ensures(self, gm: GraphModule) -> None:
        """The output is a dict with a scalar loss."""
        if prepared_result(gm) is None:
            raise PostconditionError("distill did not add its losses to the output")

    def _terms(self, gm: GraphModule) -> Iterable[tuple[str, list[tuple[Node, int]], float]]:
        """Yield each term's name, the student nodes it compares with the stack each belongs to, and its weight."""
        teacher = roles.twin_of(gm.graph)
        sites = find_attention(gm)
        towers = _towers(sites)
        last = max(towers, default=0)
        layers = {node: stack for stack, nodes in streams(gm, sites).items() for node in nodes}
        ends = [site.output for site in sites] if self.variant == "paper" else block_outputs(gm, sites)
        weights: dict[str, tuple[float, list[tuple[Node | None, int]]]] = {
            "logits": (1.0 if self.logits is None else self.logits, [(node, last) for node in logits(gm)]),
            "layer_outputs": (self.layer_outputs, [*layers.items()]),
            "scores": (self.scores, [(site.scores, site.stack) for site in sites]),
            "attention_outputs": (
                self.attention_outputs,
                [(node, site.stack) for node, site in zip(ends, sites, strict=True)],
            ),
            "embeddings": (
                self._embeddings_weight(gm),
                [(node, last) for node in embeddings(gm, [*layers, *self._own_logits(gm)])],
            ),
        }
        for name, (weight, nodes) in weights.items():
            yield name, [(node, stack) for node, stack in nodes if node in teacher] if weight else [], weight


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "logits": losses.soft_cross_entropy,
    "layer_outputs": losses.mean_squared_error,
    "scores": losses.scores_error,
    "attention_outputs": losses.mean_squared_error,
    "embeddings": losses.mean_squared_error,
}


_FLATTEN = torch.ops.aten.flatten.using_ints


def _towers(sites: list[AttentionSite]) -> dict[int, list[AttentionSite]]:
    towers: dict[int, list[AttentionSite]] = {}
    for site in sites:
        towers.setdefault(site.stack, []).append(site)
    return towers


def _masks(gm: GraphModule, sites: list[AttentionSite]) -> dict[int, Node | None]:
    """Return each stack's own padding mask: the one that its first block reads (a decoder's is not the encoder's)."""
    return {stack: padding_mask(gm, tower[:1]) for stack, tower in _towers(sites).items()}


def remove(gm: GraphModule) -> None:
    """Remove every loss node and return the student's outputs again."""
    gm.graph.output_node().args = (model_outputs(gm),)
    for node in reversed(list(gm.graph.nodes)):
        if roles.role(node) == "loss":
            erase(node)
    record_facts(gm, task=None)


def padding_mask(gm: GraphModule, sites: list[AttentionSite]) -> Node | None:
    """Return the input of shape (batch, tokens) that masks scores and is no index of an embedding, or None."""
    indices = {
        node
        for embedding in gm.graph.nodes
        if aten_name(embedding) == "embedding"
        for node in ancestors([embedding.args[1]], stop=_is_size)
    }
    for site in sites:
        if site.scores is None:
            continue
        reached = ancestors(
            [site.scores], stop=lambda node: _is_size(node) or node.op == "get_attr" or node in indices
        )
        shared = [node for node in reached if node.op == "placeholder" and roles.role(node) == "shared"]
        masks = [
            node
            for node in shared
            if node.meta["val"].dim() == 2
            and not node.meta["val"].is_floating_point()
            and node not in indices
        ]
        if masks:
            return masks[0]
    return None


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)
