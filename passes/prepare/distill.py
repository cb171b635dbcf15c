"""Add the losses that pull the student towards the teacher, as nodes of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from ti_fx.errors import PostconditionError, PreconditionError
from ti_fx.find.attention import AttentionSite, block_outputs, find_attention, streams
from ti_fx.find.heads import HeadVectors, head_vectors
from ti_fx.find.outputs import embeddings, logits, name_is_logits
from ti_fx.find.walk import before_moves
from ti_fx.ir import moved, roles
from ti_fx.ir.edit import ancestors, aten_name, call, erase
from ti_fx.ir.facts import record_facts
from ti_fx.ir.memory import overwritten
from ti_fx.ir.outputs import PreparedResult, model_outputs, named_leaves, prepared_result
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.stages import CAPTURED, PREPARED
from ti_fx.numerics import losses

TERMS = ("logits", "layer_outputs", "scores", "attention_outputs", "embeddings", "maps", "relations")


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
    6. ``maps``: divergence of the attention maps, summed over blocks
    7. ``relations``: divergence of how alike the tokens are to each other in a stack's last self-attention, by their
       queries, their keys and their values
    8. ``task``: the model's own loss on labels; its weight is recorded, and the trainer adds it. With this alone the
       graph needs no teacher, and its own loss is 0

    The formulas stand in ``ti_fx.numerics.losses``. Errors that are not relative are dominated by a decoder's few large
    values: of a stream whose first token is a hundred times as long as the others, that token is all that is trained.

    Sources: TernaryBERT, section 3.2; Teacher Intervention, section 4; maps: EMNLP 2022, Kim et al.; relations:
    MiniLMv2; token-scaled: NeurIPS 2023, Kim et al. The published weights are all 1, without task.
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
        maps, relations: weights; 0 leaves the term out.
        errors: how the squared errors of layer and attention outputs, scores and embeddings are measured: ``absolute``;
            or in units of the teacher's own variance, of each ``token`` (of scores, of each row of the batch) or of the
            whole ``layer``.
        logits_loss: soft ``cross-entropy``; ``kl`` divergence, of the same gradients, 0 where both agree; or
            ``token-scaled`` cross-entropy of a decoder, in which tokens that the teacher finds hard count for more.
            ``token-scaled-or-kl``: of logits that are not one for each of a decoder's tokens, their divergence.
        temperature: of the logits; of ``token-scaled``, of the tokens' scales, where None is 10 as published.
        embeddings_loss: ``squared`` error, or the ``cosine`` distance.
        learned: the terms, ``task`` excepted, whose weights are learned: such a loss L counts as its weight times
            ``exp(-s) L + s``, with s a Parameter of training alone, 0 at first (Kendall et al., CVPR 2018).
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
    maps: float = 0.0
    relations: float = 0.0
    errors: Literal["absolute", "token", "layer"] = "absolute"
    logits_loss: Literal["cross-entropy", "kl", "token-scaled", "token-scaled-or-kl"] = "cross-entropy"
    temperature: float | None = None
    embeddings_loss: Literal["squared", "cosine"] = "squared"
    learned: tuple[str, ...] = ()

    def requires(self, gm: GraphModule) -> None:
        """A teacher, and what the chosen terms compare."""
        if not any(roles.is_teacher(node) for node in gm.graph.nodes) and not self.is_task_alone:
            raise PreconditionError("distill needs a teacher", missing="duplicate-teacher")
        if self.logits and not logits(gm):
            raise PreconditionError("distill{logits} needs an output called logits; set logits=0")
        sites = find_attention(gm)
        if not sites and any(getattr(self, term) for term in _OF_BLOCKS):
            raise PreconditionError(
                "distill finds no attention block, so it has no scores, attention or layer outputs to compare; "
                "set those weights to 0"
            )
        if self.scores or self.maps or self.relations:
            for site in sites:
                if site.scores is None:
                    raise PreconditionError(
                        f"distill can't see the scores of {site.where} (%{site.context.name})",
                        missing="decompose-attention",
                    )
        self._require_options(gm, sites)
        if self.mask_padding and not any(_masks(gm, sites).values()):
            raise PreconditionError("distill{mask_padding=true} finds no attention mask among the inputs")
        self._require_values(gm)
        there = {name for name, pairs, _ in self._terms(gm) if pairs}
        if missing := [term for term in self.learned if term not in there]:
            raise PreconditionError(
                f"distill{{learned}} can't weigh {missing[0]!r}, which is none of its terms here: "
                f"{', '.join(sorted(there)) or 'none'}"
            )
        if not self.task and not any(pairs for _, pairs, _ in self._terms(gm)):
            raise PreconditionError("distill has no term left: give at least one weight above 0")

    def _require_options(self, gm: GraphModule, sites: list[AttentionSite]) -> None:
        """Raise where an option can't be: a temperature that is none, relations without their factors."""
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise PreconditionError(f"distill{{temperature={self.temperature}}}: give a number above 0")
        if self.logits_loss == "token-scaled" and self.logits != 0:
            for node in logits(gm):
                token_ids(gm, node)
        if self.relations:
            for site, vectors in _last_blocks(gm, sites):
                if vectors is None:
                    raise PreconditionError(
                        f"distill{{relations}} can't tell queries, keys and values of {site.where} apart "
                        f"(%{site.context.name}); set relations=0"
                    )

    def _require_values(self, gm: GraphModule) -> None:
        """Raise where a value that is to be compared is overwritten before the losses read it."""
        for term, nodes, _ in self._terms(gm):
            for node, _ in nodes:
                for writer in overwritten(node):
                    raise PreconditionError(
                        f"distill{{{term}}} can't compare %{node.name}: %{writer.name} writes into it in place; let "
                        f"the model compute a new tensor (x = x + y for x += y), or set {term}=0"
                    )

    @property
    def is_task_alone(self) -> bool:
        """Whether nothing is compared with a teacher."""
        others = (*(getattr(self, term) for term in _OF_BLOCKS), self.embeddings)
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
        """Say which output is taken for logits where none is called so, and which have no tokens to be scaled by."""
        found = logits(gm) if self.logits != 0 else []
        said = []
        if found and not any(name_is_logits(name) for name in named_leaves(model_outputs(gm))):
            said.append(
                f"%{found[0].name} is taken for logits, as a linear layer computes it and no output has a name; of an "
                "embedding, set logits=0 and embeddings=1"
            )
        if self.logits_loss == "token-scaled-or-kl":
            said += [
                f"%{node.name} is compared by kl, as it has no logits for each of a decoder's tokens"
                for node in found
                if self._logits_by(gm, node) == "kl"
            ]
        return "\n".join(said)

    def _logits_by(self, gm: GraphModule, node: Node) -> str:
        """Return which loss compares a node of logits."""
        if self.logits_loss != "token-scaled-or-kl":
            return self.logits_loss
        try:
            token_ids(gm, node)
        except PreconditionError:
            return "kl"
        return "token-scaled"

    def apply(self, gm: GraphModule) -> None:
        """Remove the losses there are and insert these before the output."""
        for term in moved.log_variances(gm).keys() - set(self.learned):
            moved.forget(gm, term)
        remove(gm)
        output = gm.graph.output_node()
        outputs = output.args[0]
        teacher = roles.twin_of(gm.graph)
        masks = _masks(gm, find_attention(gm)) if self.mask_padding else {}
        flat: dict[Node, Node] = {}
        each: dict[str, Node] = {}
        added: list[Node] = []
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
                function, further = self._function(gm, name, node, index)
                arguments = (node, teacher[node], mask, *further)
                parts.append(call(output, function, arguments, f"loss_{name}_{index}", "loss"))
            each[name] = call(output, losses.total, (parts,), f"loss_{name}", "loss")
            weights.append(float(weight))  # as a recipe's file has it
            added.append(each[name])
            if name in self.learned:
                added[-1] = moved.learn(gm, name, each[name], output, nodes[0][0].meta["val"])
        if each:
            total = call(output, losses.weighted, (added, weights), "loss", "loss")
        else:
            first = next(iter(named_leaves(outputs).values()))
            total = call(output, losses.nothing, (first,), "loss", "loss")
        output.args = (PreparedResult(total, each, outputs).structure(),)
        record_facts(gm, task=self.task)

    def _function(
        self, gm: GraphModule, term: str, node: Node, index: int
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what compares a node of a term with its twin, and its arguments beside these and the mask."""
        if term == "logits":
            chosen = self._logits_by(gm, node)
            if chosen == "token-scaled":
                return losses.token_scaled_cross_entropy, (token_ids(gm, node), float(self.temperature or 10))
            function = losses.kl_divergence if chosen == "kl" else losses.soft_cross_entropy
            return function, () if self.temperature is None else (float(self.temperature),)
        if term == "maps":
            return losses.map_divergence, ()
        if term == "relations":  # queries, keys and values in turn
            return losses.relation_divergence, (True,) if index % 3 == 1 else ()
        if term == "embeddings" and self.embeddings_loss == "cosine":
            return losses.cosine_distance, ()
        if term == "scores":
            relative = self.errors != "absolute"
            return losses.relative_scores_error if relative else losses.scores_error, ()
        return _ERRORS[self.errors], ()

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
            "maps": (self.maps, [(site.scores, site.stack) for site in sites]),
            "relations": (
                self.relations,
                [
                    (node, site.stack)
                    for site, vectors in (_last_blocks(gm, sites) if self.relations else ())
                    for node in vectors or ()
                ],
            ),
        }
        for name, (weight, nodes) in weights.items():
            yield name, [(node, stack) for node, stack in nodes if node in teacher] if weight else [], weight


_OF_BLOCKS = ("layer_outputs", "scores", "attention_outputs", "maps", "relations")

_ERRORS: dict[str, Callable[..., Any]] = {
    "absolute": losses.mean_squared_error,
    "token": losses.token_error,
    "layer": losses.layer_error,
}


_FLATTEN = torch.ops.aten.flatten.using_ints


def _towers(sites: list[AttentionSite]) -> dict[int, list[AttentionSite]]:
    towers: dict[int, list[AttentionSite]] = {}
    for site in sites:
        towers.setdefault(site.stack, []).append(site)
    return towers


def _last_blocks(
    gm: GraphModule, sites: list[AttentionSite]
) -> list[tuple[AttentionSite, HeadVectors | None]]:
    """Return each stack's last self-attention, with what its products multiply."""
    last = list({site.stack: site for site in sites if site.kind == "self"}.values())
    return list(zip(last, head_vectors(gm, last), strict=True))


def token_ids(gm: GraphModule, logits: Node) -> Node:
    """Return the input that holds the tokens of a decoder's logits, one for each.

    Raises:
        PreconditionError: there is none, or more than one.
    """
    wanted = [str(size) for size in logits.meta["val"].shape]
    looked_up = {
        before_moves(node.args[1])
        for node in gm.graph.nodes
        if aten_name(node) == "embedding" and isinstance(node.args[1], Node)
    }
    found = [
        node
        for node in gm.graph.find_nodes(op="placeholder")
        if node in looked_up
        and len(wanted) == 3
        and [str(size) for size in node.meta["val"].shape] == wanted[:2]
    ]
    if len(found) != 1:
        names = ", ".join(str(node.target) for node in found) or "no input"
        raise PreconditionError(
            f"distill{{logits_loss=token-scaled}} needs one input with the token of each of %{logits.name}'s rows, and "
            f"finds {names}; it is for decoders that read token ids: use logits_loss=kl"
        )
    ids: Node = found[0]
    return ids


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
