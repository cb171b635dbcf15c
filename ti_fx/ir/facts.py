"""Facts record what ti_fx knows of a whole graph beside its nodes: sizes, tied names, encodings, the recipe, the stage.

They are frozen: a pass that learns something replaces them, so that forks never change each other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor
from torch.fx import GraphModule

from ti_fx.ir.assumptions import Assumption

KEY = "ti_fx"  # in gm.meta; of a node's own entry see ti_fx.ir.roles
PREPARE = "recipe"  # in the place of a recipe's passes among those that a graph went through

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True)
class CaptureReport:
    """What capture found out.

    Attributes:
        dims: per input, each dimension's name if it is dynamic, else its size.
        static: why a dimension is not dynamic, by ``input.dimension``.
        constants: keyword arguments that are not tensors and are baked into the graph.
        attention: the attention implementation used for the trace (None: not a transformers model).
        nodes: nodes in the graph.
        parameters: number of parameter elements the graph reads.
        checked: largest relative difference from the source model, in ``eval`` and ``train`` mode.
        unchecked: what could not be compared with the source model, and why; None if everything was.
        further: the same difference where more was compared: buffers, gradients, other sizes, values and calls.
        left_out: further comparisons that could not be made, and why.
        followed: what the model decides by values, which the graph has as on the example.
        assumptions: conditions on the dynamic sizes, by which the model decides what it computes.
    """

    dims: dict[str, tuple[str | int, ...]]
    static: dict[str, str]
    constants: dict[str, Any]
    attention: str | None
    nodes: int
    parameters: int
    checked: dict[str, float] = field(default_factory=dict)
    unchecked: str | None = None
    followed: tuple[str, ...] = ()
    further: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    assumptions: tuple[Assumption, ...] = ()

    def __str__(self) -> str:
        rows = [f"{name}: [{', '.join(map(str, sizes))}]" for name, sizes in self.dims.items()] + [
            f"{where} is static: {why}" for where, why in self.static.items()
        ]
        rows += map(str, self.assumptions)
        rows += self.followed
        rows += self.left_out
        if self.further:
            more = "; ".join(f"{name}: {value:.1e}" for name, value in self.further.items())
            rows.append(f"relative difference from the model: {more}")
        checked = ", ".join(f"{name} {value:.1e}" for name, value in self.checked.items())
        compared = self.unchecked or f"relative difference: {checked}"
        rows.append(f"{self.nodes} nodes, {self.parameters:,} parameters; {compared}")
        return "\n".join(rows)


@dataclass(frozen=True)
class Sizes:
    """What is known of the sizes that are not fixed.

    Attributes:
        names: what each is called (``batch``), by its symbol in ``node.meta["val"]``.
        smallest: sizes below the trace's own bound that work, by symbol: those of a cache, which may be empty.
        sums: a size that is the sum of others, by name: a mask covers the cache and the new tokens.
        cases: sizes, by name, at which a file has to be tried beside others.
        assumptions: conditions on them without which the graph is not the model.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    smallest: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cases: tuple[Mapping[str, int], ...] = ()
    assumptions: tuple[Assumption, ...] = ()


@dataclass(frozen=True)
class GraphFacts:
    """What is recorded of a graph.

    Attributes:
        stage: the name of the stage that the graph is in (``ti_fx.ir.stages``).
        sizes: of the dimensions that are dynamic.
        guards: how many guards those sizes had at capture; None: not captured yet.
        tied: further names of a tensor in the source model, by its first one.
        baked: the values of inputs that are constants of the graph.
        written: the buffers that the source model writes into in evaluation.
        example: the inputs that the graph was captured with.
        dynamic: which sizes the capture left open: its argument.
        passes: those that a pipeline has run on the graph since its capture, as text, in order.
        capture: the report of the capture.
        task: the weight of the model's own loss, None if it is not trained.
        encoding: the encoding that was chosen for the ternary weights.
        encodings: each ternary weight's encoding, by parameter name.
        recipe: of a graph that ``Recipe.prepare`` made, the recipe as JSON values.
        opset: of a graph that is being lowered, the ONNX opset of the file.
        unfused: of a graph that is being lowered, why a block of attention is not one node, by the name of its softmax.
        kept_layers: the pass that left layers out, as text; None: the student has all.
        layer_map: then, by stack, which of the model's layers the student's are.
        part_of: of an encoder or decoder, a digest of the student that both are parts of.
    """

    stage: str = "captured"
    sizes: Sizes = Sizes()
    guards: int | None = None
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    baked: Mapping[str, Tensor] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    example: Mapping[str, Tensor] | None = None
    dynamic: str = "auto"
    passes: tuple[str, ...] = ()
    capture: CaptureReport | None = None
    task: float | None = None
    encoding: str | None = None
    encodings: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Json] | None = None
    opset: int | None = None
    unfused: Mapping[str, str] = field(default_factory=dict)
    kept_layers: str | None = None
    layer_map: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    part_of: str | None = None


def facts(gm: GraphModule) -> GraphFacts:
    """Return what is recorded of a graph; of one that ti_fx did not make, nothing is."""
    recorded = gm.meta.get(KEY)
    return recorded if isinstance(recorded, GraphFacts) else GraphFacts()


def record_facts(gm: GraphModule, **changes: Any) -> None:
    """Replace some of the facts of a graph.

    Args:
        gm: the graph.
        changes: fields of :class:`GraphFacts`.

    Raises:
        TypeError: there is no such field.
    """
    gm.meta[KEY] = replace(facts(gm), **changes)


def record_sizes(gm: GraphModule, **changes: Any) -> None:
    """Replace some of what is known of a graph's sizes; ``changes`` are fields of :class:`Sizes`.

    Where sizes get other names, what is assumed of them goes by those.
    """
    known = facts(gm).sizes
    if "names" in changes and "assumptions" not in changes:
        new = {name: changes["names"].get(symbol, name) for symbol, name in known.names.items()}
        changes["assumptions"] = tuple(one.renamed(new) for one in known.assumptions)
    record_facts(gm, sizes=replace(known, **changes))
