"""What the products of ternary weights read, and what they should give, is added up batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.find.products import Product, TernaryWeight
from ti_fx.ir.edit import tensor
from ti_fx.numerics import moments

EVERY = 5  # of so many batches one is kept apart
Residual = tuple[Node, Node]  # the student's value that is added to a product, and the teacher's sum


class ProductSums:
    """The moments of a group's products, added up batch by batch."""

    def __init__(
        self,
        gm: GraphModule,
        group: Sequence[TernaryWeight],
        residuals: Mapping[Product, Residual | None],
        masks: Mapping[Node, Node | None],
    ) -> None:
        self.gm = gm
        self.group = group
        self.residuals = residuals
        self.masks = masks
        self.batches = 0
        self.parts = (_Part(gm, group), _Part(gm, group))

    def of(self, one: TernaryWeight) -> tuple[moments.Moments, moments.Moments]:
        """Return the moments of most rows and of the others, every fifth batch, by which a choice is judged."""
        found = [moments.Moments(part.read[_key(one)], part.given[one.weight]) for part in self.parts]
        return found[0], found[1]

    def bias(self, one: TernaryWeight) -> Tensor | None:
        """Return the bias of a weight's products as it is, None if they have none, or several."""
        node = one.products[0].bias
        return None if node is None else tensor(self.gm, str(node.target)).detach()

    def add(self, values: Mapping[Node, Any]) -> None:
        """Add one batch."""
        self.batches += 1
        part = self.parts[self.batches % EVERY == 0]
        seen: set[object] = set()
        for one in self.group:
            for product in one.products:
                mask_node = self.masks[product.source]
                mask = None if mask_node is None else values[mask_node]
                rows = _rows(values[product.source], mask)
                residual = self.residuals[product]
                if residual is None:
                    wanted = _rows(values[product.teacher], mask)
                else:
                    own, total = residual
                    shape = values[product.teacher].shape
                    wanted = _rows((values[total] - values[own]).reshape(shape), mask)
                if _key(one) not in seen:
                    part.read[_key(one)].add(rows)
                part.given[one.weight].add(rows, wanted)
            if _key(one) is not one.weight:
                seen.add(_key(one))


class _Part:
    """The sums over some of the batches."""

    def __init__(self, gm: GraphModule, group: Sequence[TernaryWeight]) -> None:
        self.read: dict[object, moments.InputMoments] = {}
        self.given: dict[Node, moments.OutputMoments] = {}
        for one in group:
            weight = tensor(gm, str(one.weight.target))
            outputs, inputs = weight.shape[::-1] if one.products[0].transposed else weight.shape
            self.read.setdefault(_key(one), moments.InputMoments(inputs, weight.device))
            self.given[one.weight] = moments.OutputMoments(inputs, outputs, weight.device)


def _key(one: TernaryWeight) -> object:
    """Return what weights have in common that read the same: the activation; of one read several times, itself."""
    return one.products[0].source if len(one.products) == 1 else one.weight


def _rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the vectors along the last dimension, those of padding left out."""
    flat = value.reshape(-1, value.shape[-1])
    if mask is None or mask.numel() != len(flat):
        return flat
    return flat[mask.reshape(-1) != 0]


def nodes_of(
    products: Iterable[Product],
    masks: Mapping[Node, Node | None],
    residuals: Mapping[Product, Residual | None] | None = None,
) -> list[Node]:
    """Return the nodes whose values calibration of these products reads."""
    found: dict[Node, None] = {}
    for product in products:
        residual = product.residual if residuals is None else residuals[product]
        mask = masks[product.source]
        for node in (product.source, product.teacher, *(residual or ()), *(() if mask is None else (mask,))):
            found[node] = None
    return list(found)


def padding_masks(gm: GraphModule) -> list[Node]:
    """Return the inputs that say which tokens are padding."""
    return [node for node in gm.graph.find_nodes(op="placeholder") if _is_mask(node)]


def _is_mask(node: Node) -> bool:
    value = node.meta.get("val")
    return (
        str(node.target).endswith("attention_mask")
        and isinstance(value, Tensor)
        and value.dim() == 2
        and not value.dtype.is_floating_point
    )


def mask_of(source: Node, masks: Sequence[Node]) -> Node | None:
    """Return the mask whose tokens an activation has, by its sizes."""
    shape = [str(size) for size in source.meta["val"].shape]
    for mask in masks:
        batch, tokens = mask.meta["val"].shape
        if shape[:2] == [str(batch), str(tokens)] or shape[:-1] == [str(batch * tokens)]:
            return mask
    return None
