"""A Runner compiles one phase's graph, counts what that cost, and compiles to the same code again after a resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from ti_fx.frontend.patches import no_guard_on_accumulation
from ti_fx.ir.inputs import require_inputs

Shapes = dict[str, list[int]]


@dataclass
class CompileRecord:
    """What compiling one graph cost.

    Attributes:
        graphs: graphs that dynamo compiled for it. seconds: wall time of the calls that compiled. calls: all calls.
    """

    graphs: int = 0
    seconds: float = 0.0
    calls: int = 0


class Runner:
    """One graph, compiled or not, with the count of what compiling cost.

    Attributes:
        shapes: of the inputs at which a graph was compiled, in order. Inductor plans its loops for them, so the same
            bits come out later only of graphs that are compiled at the same shapes.
    """

    def __init__(self, gm: GraphModule, compiled: bool, first_shapes: Sequence[Shapes] = ()) -> None:
        self.gm = gm
        self.record = CompileRecord()
        self.compiled = compiled
        self.shapes: list[Shapes] = []
        self.call: Callable[..., Any] = gm
        self._first = list(first_shapes) if compiled else []
        if compiled:
            no_guard_on_accumulation()
            self.call = torch.compile(gm, fullgraph=True, dynamic=True)

    def __call__(self, **inputs: Tensor) -> Any:
        """Call the graph; the first time, compile it as an earlier run did."""
        if self._first and torch.is_grad_enabled():
            first, self._first = self._first, []
            for shapes in first:
                self._compile_at(shapes)
        self.record.calls += 1
        if (
            self.compiled
        ):  # what checks inputs as the graph is called is no part of the code that is made of it
            require_inputs(self.gm, (), inputs)
        return self._counted(inputs) if self.compiled else self.call(**inputs)

    def _counted(self, inputs: dict[str, Tensor]) -> Any:
        before, start = counters["stats"]["unique_graphs"], time.perf_counter()
        result = self.call(**inputs)
        made = counters["stats"]["unique_graphs"] - before
        if made:
            self.record.graphs += made
            self.record.seconds += time.perf_counter() - start
            self.shapes.append({name: list(value.shape) for name, value in inputs.items()})
        return result

    def _compile_at(self, shapes: Shapes) -> None:
        """Run forwards and backwards once on zeros, touching neither gradients nor random state."""
        trained = [value for value in self.gm.parameters() if value.requires_grad]
        device = trained[0].device
        types = {
            str(node.target): node.meta["val"].dtype for node in self.gm.graph.find_nodes(op="placeholder")
        }
        inputs = {
            name: torch.zeros(shape, dtype=types[name], device=device) for name, shape in shapes.items()
        }
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_generator(device)):
            torch.autograd.grad(self._counted(inputs)["loss"], trained, allow_unused=True)


def _generator(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
