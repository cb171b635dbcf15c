"""An export compares each node of the file with PyTorch's, on the values that PyTorch's node read.

The file's values have the names of the packed graph's nodes. A copy of the model is cut at each of them: what the
PyTorch node gave goes in, what ONNX Runtime computes from it comes out, all in one run. So an error shows where it is
made, and nowhere else.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ti_fx.errors import ParityError
from ti_fx.export import inputs as io
from ti_fx.export.file.content import FileContent
from ti_fx.export.report import NodeReport
from ti_fx.export.run.session import reason_of, session_of
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


def compare_nodes(file: FileContent, student: GraphModule, inputs: Mapping[str, Tensor]) -> NodeReport:
    """Compare every node that the file has a value of with PyTorch's, in the file's order.

    Args:
        file: the file.
        student: the packed graph of the same encoding.
        inputs: by name, of any size that the graph takes.

    Raises:
        ParityError: names the first node that differs, its module and layer.
    """
    cut = cut_at_nodes(file, student, inputs)
    name = file.path.name
    runtime = session_of(cut.model.SerializeToString(), name, folder=file.path.parent)
    try:
        computed = runtime.run(list(cut.expected), cut.feed)
    except Exception as error:  # ONNX Runtime's errors share no base class but Exception
        running = _RUNNING.search(str(error))
        node = cut.nodes.get(running[1].partition("/")[0]) if running else None
        raise ParityError(
            f"ONNX Runtime can't run {where(node) if node else 'a node'} of {name} on PyTorch's inputs: "
            f"{reason_of(error)}"
        ) from error
    return _compared(dict(zip(cut.expected, computed, strict=True)), cut.expected)


@dataclass(frozen=True)
class Choice:
    """Which values topk or sort chose: they may take equals in any order, and without ``sorted`` all.

    Attributes:
        dim: along which they chose.
        source: what they chose from, where it is the places of values that are compared; None of values.
    """

    dim: int
    source: Tensor | None

    def in_order(self, chosen: Tensor) -> Tensor:
        """Return the values that were chosen, in order."""
        values = chosen if self.source is None else self.source.gather(self.dim, chosen.long())
        return values.sort(self.dim).values


@dataclass(frozen=True)
class Expected:
    """What PyTorch computed for a node, and what ONNX Runtime may compute instead.

    Attributes:
        node: PyTorch's.
        value: what it gave.
        choice: of what topk or sort gave, what they chose.
        step: of a product of a quantised activation, what one step of its quantiser changes at most.
    """

    node: Node
    value: Tensor
    choice: Choice | None
    step: Tensor | None


@dataclass(frozen=True)
class CutModel:
    """A model in which every reader of a node's value reads PyTorch's value instead.

    Attributes:
        model: it gives the values that are compared.
        feed: what it takes.
        expected: those values as PyTorch computed them, by name, in the file's order.
        nodes: the node of the graph that PyTorch ran, of each name.
    """

    model: onnx.ModelProto
    feed: dict[str, NDArray[Any]]
    expected: dict[str, Expected]
    nodes: dict[str, Node]


def cut_at_nodes(file: FileContent, student: GraphModule, inputs: Mapping[str, Tensor]) -> CutModel:
    """Run the graph in PyTorch, and cut the file's model at each value that both have; arguments as above."""
    flat, leaves = io.flat_outputs(student)
    nodes = {node.name: node for node in flat.graph.nodes}
    nodes |= {name: nodes[node.name] for name, node in leaves.items()}
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    named = {nodes[name] for node in model.graph.node for name in node.output if name in nodes}
    with mode(flat, False), torch.no_grad():
        recorder = _Recorder(flat, named)
        with io.refusals():
            recorder.run(*inputs.values())
    values = recorder.values
    cut = _cut(model, {name: values[node] for name, node in nodes.items() if node in values})
    feed = {f"{_GIVEN}{name}": values[nodes[name]].contiguous().numpy() for name in cut.given}
    feed |= {name: value.numpy() for name, value in inputs.items() if name in cut.inputs}
    expected = {name: _expected(flat, nodes[name], values) for name in cut.compared}
    return CutModel(model, feed, expected, nodes)


def _expected(gm: GraphModule, node: Node, values: Mapping[Node, Tensor]) -> Expected:
    value = values[node]
    step = _product_step(gm, node, values) if value.is_floating_point() else None
    return Expected(node, value, choice_of(node, value, values), step)


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


def _compared(found: Mapping[str, Any], wanted: Mapping[str, Expected]) -> NodeReport:
    worst, worst_node, most, most_node = 0.0, "", 0.0, ""
    for name, array in found.items():
        node, expected, step = wanted[name].node, wanted[name].value, wanted[name].step
        if array.dtype.kind not in "biuf":
            raise ParityError(f"{where(node)} is the first node that differs: no numbers in ONNX Runtime")
        got = torch.from_numpy(array)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise ParityError(
                f"{where(node)} is the first node that differs: {got.dtype}{list(got.shape)} in ONNX Runtime, "
                f"{expected.dtype}{list(expected.shape)} in PyTorch"
            )
        choice = wanted[name].choice
        pair = (got, expected) if choice is None else (choice.in_order(got), choice.in_order(expected))
        gap = closeness.gap(*pair)
        if not expected.is_floating_point():  # indices, masks
            if gap.any():
                raise ParityError(
                    f"{where(node)} is the first node that differs: {int((gap > 0).sum())} of {gap.numel()} values"
                )
            continue
        distance = closeness.norm_beside(gap, expected)
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


def choice_of(node: Node, value: Tensor, values: Mapping[Node, Tensor]) -> Choice | None:
    """Return what topk or sort chose, None if ``value`` is not theirs.

    Args:
        node: whose value it is.
        value: what the node gave.
        values: of other nodes.
    """
    while aten_name(node) == "to":
        node = node.args[0]  # type: ignore[assignment]
    whole = node.args[0] if node.target is operator.getitem else None
    if not isinstance(whole, Node) or aten_name(whole) not in _ORDERS:
        return None
    source: Any = whole.args[0]
    position = 2 if aten_name(whole) == "topk" else 1
    dim: Any = whole.args[position] if len(whole.args) > position else whole.kwargs.get("dim", -1)
    return Choice(dim, None if value.is_floating_point() else values.get(source))


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
        learned = [tensor(gm, str(one.target)) for one in argument.args[1:] if isinstance(one, Node)]
        step = quantiser.step(values[argument], *learned)
        if step.shape[:-1] != values[node].shape[:-1]:
            step = step.max()  # its rows are not the product's
        weights = [as_packed(_untransposed(other)) for other in node.all_input_nodes]
        largest = [
            sum(float(tensor(gm, name).abs().max()) for name in weight.names[1:])
            for weight in weights
            if weight is not None
        ]
        return step * max(largest, default=1.0)
    return None


def _untransposed(node: Node) -> Node:
    return node.args[0] if getattr(node.target, "__name__", "") == "t.default" else node  # type: ignore[return-value]
