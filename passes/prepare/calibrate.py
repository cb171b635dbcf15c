"""Choose the codes and scales of ternary weights by what they give on a few hundred unlabelled rows; no gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.errors import DataError, PostconditionError, PreconditionError
from ti_fx.find.products import Product, TernaryWeight, ternary_weights
from ti_fx.ir import roles
from ti_fx.ir.edit import mode, tensor
from ti_fx.ir.inserted import quantised_weights, weight_quantiser_of
from ti_fx.ir.pipeline import Pass
from ti_fx.ir.roles import TEACHER_PREFIX
from ti_fx.ir.rows import as_batches
from ti_fx.ir.run_by_need import RunByNeed
from ti_fx.ir.stages import PREPARED
from ti_fx.numerics import error_feedback, moments
from ti_fx.numerics.moments import Moments
from ti_fx.numerics.ternary_weights import ternary, ternary_codes
from ti_fx.passes.prepare.product_sums import ProductSums, mask_of, nodes_of, padding_masks
from ti_fx.passes.prepare.tune_scales import tune_scales

DAMPING = 0.3  # where there are too few batches to choose by
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
TUNED = "scales, biases and norms"  # the row of their tuning
Latents = Literal["grid", "cell"]
Batches = Mapping[str, Tensor] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Calibrated:
    """What calibration did to one weight.

    Attributes:
        name: of the parameter.
        rows: of activations (tokens) that its products were seen on.
        inputs: of each product.
        before, after: squared error of its products on these rows, beside the variance of what is wanted of them.
        changed: share of codes that are others now.
        zeros: share of codes that are 0.
        damping: that was used.
        seconds: it took.
        note: why it was left as rounding has it, or what to know of it.
    """

    name: str
    rows: int = 0
    inputs: int = 0
    before: float = 0.0
    after: float = 0.0
    changed: float = 0.0
    zeros: float = 0.0
    damping: float = 0.0
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        if self.name == TUNED:
            return f"{TUNED}: distance {self.before:.4f} -> {self.after:.4f} on rows kept apart, {self.note}"
        if not self.rows:
            return f"{self.name}: as rounded, {self.note}"
        said = f"; {self.note}" if self.note else ""
        return (
            f"{self.name}: error {self.before:.4f} -> {self.after:.4f} on {self.rows:,} rows, {self.changed:.0%} of "
            f"codes changed, {self.zeros:.0%} are 0, damping {self.damping:g}, {self.seconds:.1f} s{said}"
        )


@dataclass(frozen=True)
class Calibrate(Pass):
    """Each ternary weight's codes and scales become those whose products give, on real rows, what the teacher gives.

    The graph stays as it is; the values of latent weights change, and those of their biases.

    before:  %w_q = ternary(%w)                  after:  the same, and ternary(%w) has other codes and another scale
             %h = linear(%x, %w_q, %b)

    1. weights are taken in the order of the graph; x is what the student reads, its earlier weights calibrated already
       and its activations quantised
    2. the target is the weight that fits what the teacher gives best (ridge regression); with ``residual``, where a
       residual is added to the product, the sum is what should equal the teacher's
    3. rounding with error feedback at several scales, then descent over single codes; scales by least squares
    4. a bias that only these products read is moved by the mean error
    5. the latent weight is placed where the training quantiser makes exactly these codes and scales of it
    6. word embeddings, and whatever is no product, stay as rounding has them
    7. with ``steps``, scales, biases and norms then follow the gradient of the outputs' distance

    Sources: GPTQ (arXiv 2210.17323), GPTAQ (arXiv 2504.02692) for the teacher's side, QuantEase (arXiv 2309.01885).

    Attributes:
        rows: how many rows of the data are used at most.
        damping: share of the mean second moment that is added to each input's; it pulls towards the teacher's weight.
            None: of several, for each weight, the one with which four fifths of the batches fit the others best.
        residual: whether the error of the residual stream is made up for, too.
        biases: whether biases are moved.
        latents: where latent weights are placed: ``grid``: on their ternary values; ``cell``: as near to the teacher's
            weight as their codes allow, ``margin`` off the threshold.
        margin: share of the threshold.
        batch_size: rows a batch, where the data is one mapping of tensors.
        steps: of gradient descent on scales, biases and norms, afterwards; codes stay. 0: no gradients at all.
        data: inputs of the graph by name: one mapping of tensors, or batches of them (a list, a DataLoader); what the
            graph does not take (labels) is left out.
        report: what it did, a row a weight; filled when it runs.
        said: is told each row as it comes.
    """

    takes = (PREPARED,)
    gives = PREPARED
    values_alone = True

    rows: int = 512
    damping: float | None = None
    residual: bool = True
    biases: bool = True
    latents: Latents = "grid"
    margin: float = 0.05
    batch_size: int = 32
    steps: int = 0
    data: Batches | None = field(default=None, compare=False, repr=False)
    report: list[Calibrated] = field(default_factory=list, compare=False, repr=False)
    said: Callable[[Calibrated], None] | None = field(default=None, compare=False, repr=False)

    def requires(self, gm: GraphModule) -> None:
        """Ternary weights, a teacher, no intervention, and data."""
        nodes = list(gm.graph.nodes)
        if not any(roles.is_teacher(node) for node in nodes):
            raise PreconditionError("calibrate needs a teacher", missing="duplicate-teacher")
        if not any(one.quantiser for one in ternary_weights(gm)):
            raise PreconditionError("calibrate needs ternary weights", missing="ternarize")
        for node in quantised_weights(gm):
            granularity = node.kwargs["granularity"]
            if node.target is not ternary or granularity not in ("tensor", "row"):
                method = weight_quantiser_of(node)
                raise PreconditionError(
                    "calibrate places latent weights for the method twn with a scale per tensor or row, and "
                    f"{node.all_input_nodes[0].target} is {method and method.name} per {granularity}; run "
                    "Ternarize() without method= and groups first, or train without it"
                )
        if any(roles.fact(node, "intervened") for node in nodes):
            raise PreconditionError(
                "calibrate needs the student without an intervention; run intervene first"
            )
        if self.data is None:
            raise PreconditionError(
                "calibrate has no rows; give Calibrate(data=...), a dict of tensors or batches of them, or use ti-fx "
                "calibrate"
            )

    def apply(self, gm: GraphModule) -> None:
        """Set the latent weights and the biases."""
        self.report.clear()
        assert self.data is not None
        batches = as_batches(gm, self.data, self.rows, self.batch_size)
        found = ternary_weights(gm)
        with mode(gm, training=False), torch.no_grad():
            _Calibration(self, gm, found, batches).run()
            if self.steps:
                start = time.perf_counter()
                before, after = tune_scales(gm, batches, self.steps)
                row = Calibrated(TUNED, before=before, after=after, note=f"{self.steps} steps")
                _say(self, replace(row, seconds=time.perf_counter() - start))

    def ensures(self, gm: GraphModule) -> None:
        """There is a row for each ternary weight."""
        reached = {row.name for row in self.report}
        for one in ternary_weights(gm):
            if one.weight.target not in reached:
                raise PostconditionError(f"calibrate did not reach {one.weight.target}")

    def explain(self, gm: GraphModule) -> str:
        """Return the report."""
        return "\n".join(map(str, self.report))


def _say(one: Calibrate, row: Calibrated) -> None:
    one.report.append(row)
    if one.said is not None:
        one.said(row)


class _Calibration:
    """One run of the pass."""

    def __init__(
        self, one: Calibrate, gm: GraphModule, found: list[TernaryWeight], batches: list[dict[str, Tensor]]
    ) -> None:
        self.options = one
        self.gm = gm
        self.weights = [weight for weight in found if weight.products]
        self.left = [weight for weight in found if not weight.products]
        self.waiting = {product.node for weight in self.weights for product in weight.products}
        products = [product for weight in self.weights for product in weight.products]
        masks = padding_masks(gm)
        self.masks = {product.source: mask_of(product.source, masks) for product in products}
        self.run_by_need = RunByNeed(gm, batches, nodes_of(products, self.masks))

    def run(self) -> None:
        """Calibrate the weights, those that read one activation together."""
        for one in self.left:
            _say(self.options, Calibrated(str(one.weight.target), note=one.reason))
        todo = list(self.weights)
        while todo:
            group = [todo.pop(0)]
            source = group[0].products[0].source
            if all(product.source is source for product in group[0].products):
                others = [one for one in todo if all(product.source is source for product in one.products)]
                group += others
                todo = [one for one in todo if one not in others]
            self._calibrate(group)

    def _calibrate(self, group: Sequence[TernaryWeight]) -> None:
        start = time.perf_counter()
        products = [product for one in group for product in one.products]
        residuals = {product: self._residual(product) for product in products}
        ahead = any(product.source is not products[0].source for product in products)
        if ahead and self.run_by_need.writes:
            for one in group:
                note = "read by several layers of a graph that writes into its values"
                _say(self.options, Calibrated(str(one.weight.target), note=note))
            return
        sums = ProductSums(self.gm, group, residuals, self.masks)
        nodes = nodes_of(products, self.masks, residuals)
        self.run_by_need.visit(nodes, sums.add, ahead=ahead)
        self.waiting.difference_update(product.node for product in products)
        shared = (time.perf_counter() - start) / len(group)
        for one in group:
            start = time.perf_counter()
            row = self._set(one, sums)
            _say(self.options, replace(row, seconds=shared + time.perf_counter() - start))
        later = set(nodes_of(self._open(), self.masks))
        self.run_by_need.release(set(nodes_of(products, self.masks)) - later)

    def _open(self) -> list[Product]:
        return [product for one in self.weights for product in one.products if product.node in self.waiting]

    def _residual(self, product: Product) -> tuple[Node, Node] | None:
        """Return a product's residual if that is known before the product, and depends on no weight yet to come."""
        if product.residual is None or not self.options.residual:
            return None
        upstream = self.run_by_need.upstream([product.residual[0]])
        return None if upstream & self.waiting else product.residual

    def _set(self, one: TernaryWeight, sums: ProductSums) -> Calibrated:
        """Calibrate one weight from its sums."""
        name, options = str(one.weight.target), self.options
        most, others = sums.of(one)
        every = most + others
        _require_numbers(name, every)
        if not every.read.count:
            return Calibrated(name, note="no row reaches it")
        latent, turned = tensor(self.gm, name), one.products[0].transposed
        teacher = _turn(tensor(self.gm, f"{TEACHER_PREFIX}{name}"), turned)
        kwargs: dict[str, Any] = dict(one.quantiser.kwargs)
        old, size = ternary_codes(latent, **kwargs)
        bias, own_bias = sums.bias(one), _own_bias(one) if options.biases else None
        fit = _Fit(teacher, bias, own_bias is not None)
        damping = fit.best_damping(most, others) if options.damping is None else options.damping
        target, heavy = (value.to(latent.dtype) for value in fit.target(every, damping))
        _, guess = ternary_codes(_turn(target, turned).contiguous(), **kwargs)
        codes, scale = error_feedback.ternary_by_feedback(target, heavy, _turn(guess, turned))
        made = codes * scale
        before = moments.relative_error(every, _turn(old.to(latent.dtype) * size, turned), bias)
        after = moments.relative_error(every, made, fit.bias(every, made))
        inputs = made.shape[1]
        note = f"fewer rows than its {inputs:,} inputs" if every.read.count < inputs else ""
        row = Calibrated(name, every.read.count, inputs, before, after, zeros=_zeros(codes), note=note)
        if not after < before:
            return replace(row, after=before, zeros=_zeros(old))
        moved = fit.bias(every, made)
        codes, scale = _turn(codes, turned).contiguous(), _turn(scale, turned).contiguous()
        if not self._write(latent, _turn(teacher, turned), codes, scale, kwargs):
            largest = f"a scale of {float(scale.max()):.3g} beyond clip={kwargs.get('clip')}"
            return replace(row, rows=0, zeros=_zeros(old), note=f"its calibrated codes need {largest}")
        self.run_by_need.forget(one.weight)
        if own_bias is not None:
            assert moved is not None
            tensor(self.gm, str(own_bias.target)).copy_(moved)
            self.run_by_need.forget(own_bias)
        return replace(row, damping=damping, changed=float((codes != old).double().mean()))

    def _write(
        self, latent: Tensor, teacher: Tensor, codes: Tensor, scale: Tensor, options: dict[str, Any]
    ) -> bool:
        """Place a latent weight so that the quantiser makes these codes and scales of it; False: there is no place."""
        made = error_feedback.latents_on_grid(codes, scale)
        if self.options.latents == "cell":
            near = error_feedback.latents_in_cells(codes, scale, teacher, self.options.margin)
            if error_feedback.has_codes(near, codes, scale, **options):
                made = near
        if not error_feedback.has_codes(made, codes, scale, **options):
            return False
        latent.copy_(made)
        return True


class _Fit:
    """What a weight should be, by ridge regression towards the teacher's."""

    def __init__(self, teacher: Tensor, bias: Tensor | None, moves: bool) -> None:
        self.teacher, self.own, self.moves = teacher, bias, moves

    def bias(self, sums: Moments, weight: Tensor) -> Tensor | None:
        """Return the bias beside a weight."""
        return moments.fitted_bias(sums, weight) if self.moves else self.own

    def target(self, sums: Moments, damping: float) -> tuple[Tensor, Tensor]:
        """Return the weight of least error, and the second moment that the error of others is measured by."""
        second, cross = moments.centred(sums) if self.moves else moments.without_bias(sums, self.own)
        target = error_feedback.regression_target(self.teacher, second, cross, damping)
        return target, error_feedback.damped(second, damping)

    def best_damping(self, most: Moments, others: Moments) -> float:
        """Return the damping with which most rows give the least error on the others."""
        if not most.read.count or not others.read.count:
            return DAMPING

        def judged(damping: float) -> float:
            target, _ = self.target(most, damping)
            return moments.relative_error(others, target, self.bias(most, target))

        return min(DAMPINGS, key=judged)


def _require_numbers(name: str, sums: Moments) -> None:
    if not bool(sums.read.second.isfinite().all()):
        raise DataError(f"what {name} reads is no number on some row; leave out rows with NaN or infinity")
    if not bool(sums.given.cross.isfinite().all()):
        raise DataError(f"what the teacher gives at {name} is no number on some row; leave that row out")


def _own_bias(one: TernaryWeight) -> Node | None:
    """Return the bias that only this weight's products read."""
    bias = one.products[0].bias
    if bias is None or len([user for user in bias.users if roles.is_student(user)]) != len(one.products):
        return None
    return bias


def _turn(value: Tensor, turned: bool) -> Tensor:
    return value.T if turned and value.dim() == 2 else value


def _zeros(codes: Tensor) -> float:
    return float((codes == 0).double().mean())
