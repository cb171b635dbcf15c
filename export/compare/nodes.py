"""An export compares each node of the file with PyTorch's, on the values that PyTorch's node read.

The file's values have the names of the packed graph's nodes. A copy of the model is cut at each of them: what the
PyTorch node gave goes in, what ONNX Runtime computes from it comes out, all in one run. So an error shows where it is
made, and nowhere else.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ti_fx.errors import ParityError
from ti_fx.export import inputs as io
from ti_fx.export.report import NodeReport
from ti_fx.export.run.session import session_of
from ti_fx.find.packed import as_packed
from ti_fx.ir.edit import aten_name, mode, tensor, written_arguments
from ti_fx.ir.inserted import quantiser_of
from ti_fx.ir.text import where
from ti_fx.numerics import closeness

# A float node: two correct implementations of one operation on the same values, relative L2.
NODE_TOLERANCE = 1e-5
_GIVEN = "given/"
_RUNNING = re.compile(r"Name:'([^']*)'")  # so ONNX Runtime names the node that it was running
_ORDERS = ("topk", "sort")
_UNINITIALISED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def compare_nodes(
    path: str | os.PathLike[str], student: GraphModule, inputs: Mapping[str, Tensor]
) -> NodeReport:
    """Compare every node that the file has a value of with PyTorch's, in the file's order.

    Args:
        path: the file.
        student: the packed graph of the same encoding.
        inputs: by name, of any size that the graph takes.

    Raises:
        ParityError: names the first node that differs, its module and layer.
    """
    cut = cut_at_nodes(path, student, inputs)
    runtime = session_of(cut.model.SerializeToString(), Path(path).name, folder=Path(path).parent)
    try:
        computed = runtime.run(cut.compared, cut.feed)
    except Exception as error:  # ONNX Runtime's errors share no base class but Exception
        reason = " ".join(str(error).split())
        named = _RUNNING.search(reason)
        node = cut.nodes.get(named[1].partition("/")[0]) if named else None
        raise ParityError(
            f"ONNX Runtime can't run {where(node) if node else 'a node'} of {Path(path).name} on PyTorch's inputs: "
            f"{reason[:300]}"
        ) from error
    return _compared(cut.gm, dict(zip(cut.compared, computed, strict=True)), cut.nodes, cut.values)


@dataclass(frozen=True)
class CutModel:
    """A model in which every reader of a node's value reads PyTorch's value instead.

    Attributes:
        model: it gives the values of ``compared``.
        feed: what it takes.
        compared: names of values, in the file's order.
        gm: the graph that PyTorch ran.
        nodes: its node of each name.
        values: what PyTorch computed.
    """

    model: onnx.ModelProto
    feed: dict[str, NDArray[Any]]
    compared: list[str]
    gm: GraphModule
    nodes: dict[str, Node]
    values: dict[Node, Tensor]


def cut_at_nodes(
    path: str | os.PathLike[str], student: GraphModule, inputs: Mapping[str, Tensor]
) -> CutModel:
    """Run the graph in PyTorch, and cut the file's model at each value that both have; arguments as above."""
    flat, leaves = io.flat_outputs(student)
    nodes = {node.name: node for node in flat.graph.nodes}
    nodes |= {name: nodes[node.name] for name, node in leaves.items()}
    model = onnx.load(os.fspath(path), load_external_data=False)
    named = {nodes[name] for node in model.graph.node for name in node.output if name in nodes}
    with mode(flat, False), torch.no_grad():
        recorder = _Recorder(flat, named)
        with io.refusals():
            recorder.run(*inputs.values())
    values = recorder.values
    cut = _cut(model, {name: values[node] for name, node in nodes.items() if node in values})
    feed = {f"{_GIVEN}{name}": values[nodes[name]].contiguous().numpy() for name in cut.given}
    feed |= {name: value.numpy() for name, value in inputs.items() if name in cut.inputs}
    return CutModel(model, feed, cut.compared, flat, nodes, values)


class _Recorder(Interpreter):
    """Runs a graph and keeps the tensors that the comparison reads, and that nothing writes into.

    Those are the values of the nodes that the file names, of quantised activations, and what is put in order. Unpacked
    weights are mostly not among them, and are freed as soon as they are used: all at once are the float model.
    """

    def __init__(self, gm: GraphModule, named: set[Node]) -> None:
        super().__init__(gm)
        self._kept = {
            node
            for node in gm.graph.nodes
            if node in named or quantiser_of(node) or any(aten_name(user) in _ORDERS for user in node.users)
        }
        self._seen: dict[Node, Tensor] = {}
        self._written: list[Tensor] = []  # kept, so that no other tensor gets their memory

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n in self._kept:
            self._seen[n] = value.detach()
        self._written += [self.env[argument] for argument in written_arguments(n)]
        if aten_name(n) in _UNINITIALISED:
            self._written.append(value)
        return value

    @property
    def values(self) -> dict[Node, Tensor]:
        """The values by node that ONNX Runtime has, too.

        ONNX has no writes, so what is written into is another value there, and no array holds bfloat16.
        """
        written = {value.untyped_storage().data_ptr() for value in self._written}
        return {
            node: value
            for node, value in self._seen.items()
            if value.untyped_storage().data_ptr() not in written and value.dtype != torch.bfloat16
        }


@dataclass(frozen=True)
class _Cut:
    compared: list[str]
    given: set[str]
    inputs: set[str]


def _cut(model: onnx.ModelProto, values: Mapping[str, Tensor]) -> _Cut:
    """Let every reader of a named value read an input instead, and return each named value."""
    graph = model.graph
    compared = [name for node in graph.node for name in node.output if name in values]
    known, given = set(compared), set[str]()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in known:
                node.input[index] = _GIVEN + name
                given.add(name)
    for name in sorted(given):
        value = values[name]
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.numpy().dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(_GIVEN + name, kind, list(value.shape)))
    inputs = {value.name for value in graph.input}
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in compared)
    return _Cut(compared, given, inputs)


def _compared(
    gm: GraphModule, found: Mapping[str, Any], nodes: Mapping[str, Node], values: Mapping[Node, Tensor]
) -> NodeReport:
    worst, worst_node, most, most_node = 0.0, "", 0.0, ""
    for name, array in found.items():
        node = nodes[name]
        if array.dtype.kind not in "biuf":
            raise ParityError(f"{where(node)} is the first node that differs: no numbers in ONNX Runtime")
        got, expected = torch.from_numpy(array), values[node]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise ParityError(
                f"{where(node)} is the first node that differs: {got.dtype}{list(got.shape)} in ONNX Runtime, "
                f"{expected.dtype}{list(expected.shape)} in PyTorch"
            )
        gap = closeness.gap(*chosen_in_order(node, values, got, expected))
        if not expected.is_floating_point():  # indices, masks
            if gap.any():
                raise ParityError(
                    f"{where(node)} is the first node that differs: {int((gap > 0).sum())} of {gap.numel()} values"
                )
            continue
        distance = closeness.norm_beside(gap, expected)
        step = _product_step(gm, node, values)
        if step is None or distance <= NODE_TOLERANCE:
            if not distance <= NODE_TOLERANCE:
                raise ParityError(
                    f"{where(node)} is the first node that differs from PyTorch on the same inputs: relative "
                    f"{distance:.1e}, allowed {NODE_TOLERANCE:g}, most at {_place(gap)}"
                )
            worst, worst_node = max((worst, worst_node), (distance, name))
            continue
        allowed = step + NODE_TOLERANCE * float(expected.abs().max())
        steps = float((gap / allowed).max())
        if not steps <= 1:
            raise ParityError(
                f"{where(node)} is the first node that differs from PyTorch on the same inputs: by {steps:.2g} steps "
                f"of its quantised input, allowed 1, most at {_place(gap)}"
            )
        most, most_node = max((most, most_node), (steps, name))
    return NodeReport(len(found), worst, worst_node, most, most_node)


def chosen_in_order(
    node: Node, values: Mapping[Node, Tensor], got: Tensor, expected: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what topk and sort chose, in order: they may take equals in any, and without ``sorted`` all."""
    while aten_name(node) == "to":
        node = node.args[0]  # type: ignore[assignment]
    whole = node.args[0] if node.target is operator.getitem else None
    if not isinstance(whole, Node) or aten_name(whole) not in _ORDERS:
        return got, expected
    source: Any = whole.args[0]
    position = 2 if aten_name(whole) == "topk" else 1
    dim: Any = whole.args[position] if len(whole.args) > position else whole.kwargs.get("dim", -1)
    if not got.is_floating_point() and source in values:
        got, expected = (values[source].gather(dim, places.long()) for places in (got, expected))
    return got.sort(dim).values, expected.sort(dim).values


def _place(gap: Tensor) -> list[int]:
    return [int(index) for index in torch.unravel_index(gap.argmax(), gap.shape)]


def _product_step(gm: GraphModule, node: Node, values: Mapping[Node, Tensor]) -> Tensor | None:
    """Return what one step of the activation's quantiser changes at most, for a product of a quantised activation."""
    product: Any = node
    while aten_name(product) in ("view", "reshape") and product.args[0] in values:
        if values[product].shape[-1] != values[product.args[0]].shape[-1]:
            break
        product = product.args[0]  # the file may hold the product in the view's shape alone
    if product is not node:
        step = _product_step(gm, product, values)
        rows = values[node].shape[:-1]
        return step if step is None or not step.dim() else step.reshape(*rows, 1)
    for argument in node.all_input_nodes:
        quantiser = quantiser_of(argument)
        if quantiser is None:
            continue
        step = quantiser.step(values[argument])
        if step.shape[:-1] != values[node].shape[:-1]:
            step = step.max()  # its rows are not the product's
        weights = [as_packed(_untransposed(other)) for other in node.all_input_nodes]
        scales = [tensor(gm, weight.scale_name) for weight in weights if weight is not None]
        return step * max((float(scale.abs().max()) for scale in scales), default=1.0)
    return None


def _untransposed(node: Node) -> Node:
    return node.args[0] if getattr(node.target, "__name__", "") == "t.default" else node  # type: ignore[return-value]
