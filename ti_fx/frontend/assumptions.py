"""Finds which of the questions about sizes that a trace answered by the example matter at other sizes.

A Python branch by sizes (``if length % 4:``) matters wherever it goes another way. What a kernel asks (about strides,
mostly), and what is otherwise at a size of 1 alone, mostly changes nothing: it matters if graph and model differ at
sizes where the answer is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ti_fx.errors import InputError
from ti_fx.frontend.compare import compare_modes, compare_shapes
from ti_fx.frontend.model_for_trace import unchanged_buffers
from ti_fx.frontend.size_conditions import Candidate, Sizes, SizeSymbols, points
from ti_fx.frontend.size_questions import Questions
from ti_fx.ir.assumptions import Assumption
from ti_fx.ir.edit import mode
from ti_fx.ir.facts import facts

_MOST_RUNS = 12  # of model and graph
_LARGEST_RUN = 1100


def size_assumptions(
    model: nn.Module,
    gm: GraphModule,
    program: torch.export.ExportedProgram,
    questions: Questions,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
) -> tuple[Assumption, ...]:
    """Return what a graph that was just traced assumes of its sizes.

    Args:
        model: the source model.
        gm: its graph, whose sizes have names.
        program: what torch.export made of the model.
        questions: what was asked about sizes meanwhile.
        tensors: the inputs that were traced.
        constants: what else the model's forward takes.
    """
    names = facts(gm).sizes.names
    symbols = SizeSymbols(program, names)
    named = {
        str(node.target): [names.get(str(size)) for size in node.meta["val"].shape]
        for node in gm.graph.find_nodes(op="placeholder")
    }
    own = {
        name: tensors[key].shape[index]
        for key, sizes in named.items()
        for index, name in enumerate(sizes)
        if name is not None
    }
    if not own:
        return ()
    is_meta = any(value.is_meta for value in tensors.values())
    compare: Callable[..., object] = compare_shapes if is_meta else compare_modes

    def sized(where: Sizes) -> dict[str, Tensor]:
        return {
            key: _resized(
                value, [where.get(str(name), value.shape[axis]) for axis, name in enumerate(named[key])]
            )
            for key, value in tensors.items()
        }

    def agrees(where: Sizes) -> bool:
        try:
            compare(model, gm, sized(where), constants)
        except Exception:  # the model, the graph or the comparison: what one alone takes is no agreement
            return False
        return True

    found = assumptions(symbols.candidates(questions), own, symbols.bounds(), agrees)
    for name in own:
        one = {**own, name: 1}
        if all(each.holds(one) for each in found) and symbols.bounds().get(name, (1, None))[0] == 1:
            where = {
                symbol: sympy.Integer(one[str(of)]) for symbol, of in symbols.values.items() if str(of) in one
            }
            with unchanged_buffers(model):
                is_as_traced = _has_traced_shapes(gm, sized(one), where)
            if not is_as_traced:
                found += (Assumption(f"{name} != 1", in_graph=False),)
    return found


def _has_traced_shapes(gm: GraphModule, inputs: Mapping[str, Tensor], sizes: Mapping[Any, int]) -> bool:
    """Whether every value has the shape that was traced: a squeeze drops a size of 1, and in a file it does not."""
    with mode(gm, False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            _Shapes(gm, sizes).run(
                *(inputs[str(node.target)] for node in gm.graph.find_nodes(op="placeholder"))
            )
        except Exception:  # a shape that it can't go on with, among others
            return False
    return True


class _Shapes(Interpreter):
    """Run a graph up to the first value that has another shape than was traced."""

    def __init__(self, gm: GraphModule, sizes: Mapping[Any, int]) -> None:
        super().__init__(gm)
        self.sizes = sizes

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        traced = n.meta.get("val")
        if isinstance(value, Tensor) and isinstance(traced, Tensor):
            sizes = [self._size(size) for size in traced.shape]
            if len(sizes) != value.dim() or any(
                size not in (None, found) for size, found in zip(sizes, value.shape, strict=True)
            ):
                raise InputError(f"%{n.name} has another shape than was traced")
        return value

    def _size(self, size: int | torch.SymInt) -> int | None:
        """Return a traced size as a number; None where it depends on values."""
        expression = sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)
        known = expression.xreplace(self.sizes)
        return int(known) if known.is_number else None


def _resized(value: Tensor, sizes: list[int]) -> Tensor:
    """Return a tensor tiled and cropped to other sizes."""
    for index, size in enumerate(sizes):
        if size != value.shape[index]:
            positions = torch.arange(size, device=value.device) % value.shape[index]
            value = value.index_select(index, positions)
    return value


def assumptions(
    candidates: Iterable[Candidate],
    own: Mapping[str, int],
    bounds: Mapping[str, tuple[int, int | None]],
    agrees: Callable[[Sizes], bool],
) -> tuple[Assumption, ...]:
    """Return what the graph assumes.

    Args:
        candidates: what the trace took for true, Python's branches first.
        own: the example's sizes, by name.
        bounds: the smallest and the largest size that the graph takes, by name.
        agrees: whether graph and model compute the same at other sizes.
    """
    kept: list[Assumption] = []
    asked = list({one.text: one for one in reversed(list(candidates)) if one.text}.values())[::-1]
    asked.sort(key=lambda one: not one.branch)
    tried = points(own, [one.text for one in asked])
    allowed = [where for where in tried if _within(where, bounds)]
    runs = _Runs(agrees)
    for one in asked:
        assumption = Assumption(one.text, one.line)
        if not assumption.holds(own):
            continue
        beyond, single = _broken(assumption, tried if one.branch else allowed, kept)
        if (beyond and one.branch) or runs.differ(assumption, beyond or single, kept):
            kept.append(assumption)
    return tuple(kept)


def _broken(
    assumption: Assumption, tried: Iterable[Sizes], kept: Iterable[Assumption]
) -> tuple[list[Sizes], list[Sizes]]:
    """Return the first sizes at which this alone does not hold: two of more than 1 each, and others."""
    beyond: list[Sizes] = []
    single: list[Sizes] = []
    for where in tried:
        if assumption.holds(where) or not all(other.holds(where) for other in kept):
            continue
        (beyond if all(where[name] > 1 for name in assumption.names) else single).append(where)
        if len(beyond) == 2:
            break
    return beyond, single[:2]


class _Runs:
    """Runs graph and model at sizes where conditions do not hold, few times: a run tells of every one."""

    def __init__(self, agrees: Callable[[Sizes], bool]) -> None:
        self.agrees = agrees
        self.known: list[tuple[Sizes, bool]] = []

    def differ(self, assumption: Assumption, broken: list[Sizes], kept: Iterable[Assumption]) -> bool:
        """Whether graph and model differ at sizes where a condition does not hold; if that can't be told, they do."""
        if not broken:
            return False
        seen = [
            found
            for where, found in self.known
            if not assumption.holds(where) and all(other.holds(where) for other in kept)
        ]
        if not seen:
            small = [where for where in broken if max(where.values()) <= _LARGEST_RUN]
            if not small or len(self.known) >= _MOST_RUNS:
                return " != " not in assumption.text
            for where in small:
                seen.append(self.agrees(where))
                self.known.append((where, seen[-1]))
        return not all(seen)


def _within(where: Mapping[str, int], bounds: Mapping[str, tuple[int, int | None]]) -> bool:
    return all(
        lower <= where[name] <= (where[name] if upper is None else upper)
        for name, (lower, upper) in bounds.items()
        if name in where
    )
