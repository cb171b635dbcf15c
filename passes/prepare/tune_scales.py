"""A few gradient steps on scales, biases and norms pull a student's output to its teacher's; no code changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx.find.outputs import logits
from ti_fx.find.walk import is_float
from ti_fx.ir import roles
from ti_fx.ir.edit import erase_dead_writes, fork, tensor
from ti_fx.ir.inserted import quantised_weights
from ti_fx.ir.outputs import model_outputs, named_leaves
from ti_fx.passes.prepare.product_sums import EVERY, mask_of, padding_masks

SCALE_RATE, SMALL_RATE = 2e-3, 5e-4  # of Adam, for the logarithm of a scale and for a bias or norm
JUDGED = 20  # steps between two looks at the batches that are kept apart


@dataclass(frozen=True)
class Compared:
    """An output of the student, the teacher's, the padding, and whether both are logits of several classes."""

    student: Node
    teacher: Node
    mask: Node | None
    is_logits: bool


def compared(gm: GraphModule) -> Compared | None:
    """Return the first logits of a prepared graph, else its first output; None where the teacher has none like it."""
    found, teachers = logits(gm), roles.twin_of(gm.graph)
    outputs = [node for node in named_leaves(model_outputs(gm)).values() if is_float(node)]
    node = next((node for node in outputs if node in found or not found), None)
    if node is None or node not in teachers:
        return None
    shape = node.meta["val"].shape
    mask = mask_of(node, padding_masks(gm)) if len(shape) == 3 else None
    return Compared(node, teachers[node], mask, node in found and bool(shape[-1] != 1))


def distance(student: Tensor, teacher: Tensor, is_logits: bool) -> Tensor:
    """Return the mean KL(teacher || student) of logits, or the squared error beside the teacher's variance.

    Args:
        student: ``(rows, entries)``.
        teacher: the same shape.
        is_logits: which of the two.
    """
    if is_logits:
        wanted = teacher.log_softmax(-1)
        return (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1).mean()
    spread = (teacher - teacher.mean(0)).square().sum().clamp(min=1e-30)
    return (student - teacher).square().sum() / spread


def tune_scales(gm: GraphModule, batches: Sequence[Mapping[str, Tensor]], steps: int) -> tuple[float, float]:
    """Tune scales, biases and norms in place; return the distance before and after, on batches that are kept apart.

    Every fifth batch is kept apart; of the values on the way those are kept that are best there.

    Args:
        gm: a calibrated graph, in eval mode.
        batches: inputs by name.
        steps: of Adam, a batch each; the rate falls to zero.
    """
    found = compared(gm)
    apart = list(batches[EVERY - 1 :: EVERY])
    used = [batch for index, batch in enumerate(batches) if index % EVERY != EVERY - 1]
    if found is None or not apart or not used:
        return 0.0, 0.0
    pair = _Pair(gm, found)
    tuned = _Tuned(gm)
    best = first = pair.judge(apart)
    kept = tuned.copy()
    optimiser = torch.optim.Adam(
        [{"params": tuned.small, "lr": SMALL_RATE}, {"params": tuned.logs, "lr": SCALE_RATE}],
        betas=(0.9, 0.98),
    )
    order = torch.Generator().manual_seed(0)
    turns = [
        index for _ in range(steps // len(used) + 1) for index in torch.randperm(len(used), generator=order)
    ]
    for step, turn in enumerate(turns[:steps]):
        for group, rate in zip(optimiser.param_groups, (SMALL_RATE, SCALE_RATE), strict=True):
            group["lr"] = rate * (1 - step / steps)
        with torch.enable_grad():
            gradients = torch.autograd.grad(pair(used[int(turn)]), tuned.all, allow_unused=True)
        tuned.take(gradients)
        optimiser.step()
        tuned.write()
        if (step + 1) % JUDGED == 0 or step + 1 == steps:
            now = pair.judge(apart)
            if now < best:
                best, kept = now, tuned.copy()
    tuned.restore(kept)
    return first, best


class _Pair:
    """The distance of the student's output from the teacher's, as a function of a batch."""

    def __init__(self, gm: GraphModule, found: Compared) -> None:
        self.gm = fork(gm)
        self.is_logits = found.is_logits
        nodes = {node.name: node for node in self.gm.graph.nodes}
        wanted = (found.student, found.teacher, *(() if found.mask is None else (found.mask,)))
        (output,) = self.gm.graph.find_nodes(op="output")
        output.args = (tuple(nodes[node.name] for node in wanted),)
        erase_dead_writes(self.gm.graph)
        self.gm.recompile()

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        student, teacher, *mask = self.gm(**batch)
        rows = [value.reshape(-1, value.shape[-1]) for value in (student, teacher)]
        if mask:
            rows = [value[mask[0].reshape(-1) != 0] for value in rows]
        return distance(rows[0], rows[1], self.is_logits)

    def judge(self, batches: Sequence[Mapping[str, Tensor]]) -> float:
        """Return the mean over batches."""
        with torch.no_grad():
            return sum(float(self(batch)) for batch in batches) / len(batches)


class _Tuned:
    """What is tuned: Parameters of one dimension as they are, ternary weights by the logarithms of their scales."""

    def __init__(self, gm: GraphModule) -> None:
        quantisers = quantised_weights(gm)
        self.weights = [tensor(gm, str(node.all_input_nodes[0].target)) for node in quantisers]
        self.weights, quantisers = _trained(self.weights, quantisers)
        self.base = [value.detach().clone() for value in self.weights]
        self.logs = [
            torch.zeros((len(value), 1) if node.kwargs["granularity"] == "row" else (), device=value.device)
            for node, value in zip(quantisers, self.weights, strict=True)
        ]
        self.small = list(dict.fromkeys(_small(gm)))

    @property
    def all(self) -> list[Tensor]:
        """What gradients are computed of."""
        return [*self.small, *self.weights]

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Set the gradients of what the optimiser moves."""
        count = len(self.small)
        for value, gradient in zip(self.small, gradients[:count], strict=True):
            value.grad = gradient
        for log, weight, gradient in zip(self.logs, self.weights, gradients[count:], strict=True):
            if gradient is None:
                log.grad = None
            else:
                along = gradient * weight.detach()
                log.grad = along.sum(1, keepdim=True) if log.dim() else along.sum()

    def write(self) -> None:
        """Put the scales into the latent weights, whose codes stay what they are."""
        for log, weight, base in zip(self.logs, self.weights, self.base, strict=True):
            weight.data.copy_(base * log.exp())

    def copy(self) -> list[Tensor]:
        """Return the values as they are."""
        return [value.detach().clone() for value in self.all]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Put values back, and no gradients."""
        for own, value in zip(self.all, values, strict=True):
            own.data.copy_(value)
            own.grad = None


def _trained(weights: Sequence[Tensor], nodes: Sequence[Node]) -> tuple[list[Tensor], list[Node]]:
    pairs = [(weight, node) for weight, node in zip(weights, nodes, strict=True) if weight.requires_grad]
    return [weight for weight, _ in pairs], [node for _, node in pairs]


def _small(gm: GraphModule) -> Iterator[Any]:
    for node in gm.graph.find_nodes(op="get_attr"):
        value = tensor(gm, str(node.target))
        is_small = isinstance(value, nn.Parameter) and value.dim() == 1 and value.is_floating_point()
        if roles.is_student(node) and is_small and value.requires_grad:
            yield value
