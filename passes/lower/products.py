"""The quantised products of a packed graph: linear layers of a fake-quantised activation and a packed weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from ti_fx.find.packed import PackedWeight, as_packed
from ti_fx.ir.edit import aten_name, constant_size
from ti_fx.ir.inserted import quantiser_of
from ti_fx.numerics.quantiser import Quantiser


@dataclass(frozen=True)
class Product:
    """A linear layer of a fake-quantised activation and a packed weight.

    Attributes:
        node: whose value the product is.
        fake_quant: the quantiser's node.
        flat: the view that is quantised, where the product reads what it was flattened from; else None.
        quantiser: its numerics.
        weight: ``(outputs, inputs)`` if ``transposed``, else ``(inputs, outputs)``.
        transposed: see there.
        bias: ``(outputs,)`` or None.
    """

    node: Node
    fake_quant: Node
    flat: Node | None
    quantiser: Quantiser
    weight: PackedWeight
    transposed: bool
    bias: Node | None

    @property
    def activation(self) -> Node:
        """What is quantised."""
        source = (self.fake_quant if self.flat is None else self.flat).args[0]
        assert isinstance(source, Node)
        return source

    @property
    def shape(self) -> tuple[int, ...]:
        """``(outputs, inputs)`` of the weight."""
        return self.weight.shape if self.transposed else self.weight.shape[::-1]


def products(graph: Graph) -> list[Product]:
    """Return the quantised products in graph order."""
    return [found for node in graph.nodes if (found := match_product(node)) is not None]


def match_product(node: Node) -> Product | None:
    """Match a linear layer that reads a fake-quantised activation and a packed weight.

    1. linear(x, w, bias)   2. addmm(bias, x, w)   3. mm(x, w), matmul(x, w)
    In 2 and 3, w may be the transpose of a packed weight.
    """
    name = aten_name(node)
    if node.kwargs or name not in ("linear", "addmm", "mm", "matmul"):
        return None
    arguments: list[Any] = list(node.args)
    bias = arguments.pop(0) if name == "addmm" else None
    activation, stored, *rest = arguments
    if rest:
        bias = rest[0]
    transposed = name == "linear"
    if not transposed and isinstance(stored, Node) and aten_name(stored) == "t":
        transposed, stored = True, stored.args[0]
    weight, quantiser = as_packed(stored), quantiser_of(activation)
    if weight is None or quantiser is None or len(weight.shape) != 2:
        return None
    if bias is not None and (not isinstance(bias, Node) or bias.meta["val"].dim() != 1):
        return None
    if not transposed and weight.scale.meta["val"].dim():
        return None  # one scale per input can't leave the sum
    if weight.offset is not None:
        return None  # what is added is multiplied, too
    if weight.group and (not quantiser.block or weight.group % quantiser.block):
        return None  # one scale per group leaves the sum in a product by blocks alone, of which a group holds some
    if quantiser.codes is None and not quantiser.block:
        return None  # no operator of ONNX multiplies what it gives but as floats
    if quantiser.per_token and constant_size(activation.meta["val"].shape[-1]) is None:
        return None
    flat = activation.args[0]
    view = _restored(node, flat)
    if view is None:
        return Product(node, activation, None, quantiser, weight, transposed, bias)
    return Product(view, activation, flat, quantiser, weight, transposed, bias)


def _restored(product: Node, flat: Any) -> Node | None:
    """Return the view after a product that restores what the view before it, ``flat``, took away, None without one.

    before:  %flat = view(%x, [-1, k])        after:  %h = product(%x)
             %product = addmm(%bias, %flat, %w)
             %h = view(%product, [b, s, n])
    """
    if len(product.users) != 1 or not isinstance(flat, Node) or aten_name(flat) not in ("view", "reshape"):
        return None
    (view,) = product.users
    source = flat.args[0]
    if aten_name(view) not in ("view", "reshape") or not isinstance(source, Node):
        return None
    before, middle, after = (node.meta["val"].shape for node in (source, flat, view))
    outputs = product.meta["val"].shape[-1]
    if before[-1] != middle[-1] or [*map(str, after)] != [*map(str, before[:-1]), str(outputs)]:
        return None
    return view
