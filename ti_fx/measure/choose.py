"""Choose an encoding by measuring the model on this machine, before it is trained for one.

An encoding is what a student is trained for, so what is recorded of a graph and in a checkpoint is its name, never "the
best one": ``auto`` in a recipe is resolved when a graph is prepared, and the report shows the table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.fx import GraphModule

from ti_fx.errors import ExportError, InputError
from ti_fx.export import arguments
from ti_fx.export import inputs as io
from ti_fx.export.run.session import Runtime
from ti_fx.export.writer import to_onnx
from ti_fx.find.packed import packed_weights
from ti_fx.ir.edit import fork
from ti_fx.ir.facts import facts
from ti_fx.ir.inserted import quantised_weights
from ti_fx.ir.pipeline import Pipeline
from ti_fx.measure.footprint import footprint
from ti_fx.measure.stopwatch import medians
from ti_fx.numerics.encodings import AUTO, get_encoding
from ti_fx.passes import DecomposeAttention, Pack, QuantizeActivations, Strip, Ternarize
from ti_fx.recipe import Recipe

CANDIDATES = ("int8-tensor", "int8-token", "nbits2")
_WIDTH = 12  # of the column of names, at least
AS_FAST = 1.05  # medians of a busy machine differ by so much from run to run


@dataclass(frozen=True)
class Measured:
    """One encoding of the model.

    Attributes:
        encoding: its name.
        milliseconds: of one run on the example, the median.
        megabytes: of memory, after one run against before loading; None where the system does not say.
        on_disk: megabytes of the file.
    """

    encoding: str
    milliseconds: float
    megabytes: float | None
    on_disk: float

    def __str__(self) -> str:
        return self.row(_WIDTH)

    def row(self, width: int) -> str:
        """Return a line of a table whose first column is so wide."""
        memory = "-" if self.megabytes is None else f"{self.megabytes:.0f} MB"
        alone = "no" if get_encoding(self.encoding).batch_invariant else "yes"
        return f"  {self.encoding:{width}} {self.milliseconds:9.2f} ms  {memory:>8}  {self.on_disk:8.2f} MB  {alone}"


@dataclass(frozen=True)
class Choice:
    """The encoding that was chosen, why, and what was measured."""

    encoding: str
    reason: str
    measured: tuple[Measured, ...]

    def __str__(self) -> str:
        width = max(_WIDTH, *(len(one.encoding) for one in self.measured))
        head = (
            f"  {'encoding':{width}} {'one run':>12}  {'RAM':>8}  {'on disk':>11}  a row depends on its batch"
        )
        return "\n".join(
            [f"{self.encoding}: {self.reason}", head, *(one.row(width) for one in self.measured)]
        )


def choose_encoding(
    gm: GraphModule,
    example: Mapping[str, Any] | tuple[Any, ...],
    *,
    candidates: Sequence[str] = CANDIDATES,
    ram_megabytes: float | None = None,
    threads: int | None = None,
    rounds: int = 7,
    activations: QuantizeActivations | None = None,
) -> Choice:
    """Export the model in each encoding, run each on the example in turn, and choose the fastest that fits.

    Of those as fast as the fastest, within 5%, one whose rows don't depend on the rest of their batch is taken. Each
    file is compared with PyTorch, as any export is. ``gm`` is left as it was.

    Args:
        gm: a captured graph, at any stage of its preparation; what is not ternary yet is ternarised as by default.
        example: inputs of the size that counts: a whole batch of texts, or one token.
        candidates: names of encodings.
        ram_megabytes: the most memory that loading and one run may take; None is no limit.
        threads: within a node; None is one per core.
        rounds: how often each is run; the median counts.
        activations: the pass whose encoding is chosen, with its other options; None quantises as ``gm`` does already,
            or by default.

    Raises:
        InputError: an encoding is not known; a limit is given where the system does not say what memory is used.
        ExportError: none fits within the limit.
    """
    arguments.graph(gm)
    arguments.whole_number("rounds", rounds, 1)
    arguments.threads_of(threads)
    arguments.megabytes(ram_megabytes)
    if isinstance(candidates, str) or not isinstance(candidates, Sequence) or not candidates:
        raise InputError(f"candidates is {candidates!r}; give at least one encoding in a list")
    for name in candidates:
        get_encoding(name)
    students = _students(gm, candidates, activations)
    inputs = io.bind(gm, example)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {one: folder / f"{one}.onnx" for one in candidates}
        for one, path in files.items():
            own = None if activations else one  # with options, single weights may have other encodings
            to_onnx(students[one], path, inputs, encoding=own, requantize=activations is None)
        loaded = {one: Runtime(path, threads) for one, path in files.items()}
        times = medians({one: partial(runtime, inputs) for one, runtime in loaded.items()}, rounds)
        arrays: dict[str, Any] = {key: value.numpy() for key, value in inputs.items()}
        np.savez(folder / "inputs.npz", **arrays)
        measured = tuple(
            Measured(
                one,
                times[one],
                footprint(path, folder / "inputs.npz", threads).megabytes,
                path.stat().st_size / 1e6,
            )
            for one, path in files.items()
        )
    return fastest_that_fits(measured, ram_megabytes)


def resolve(recipe: Recipe, gm: GraphModule) -> tuple[Recipe, Choice | None]:
    """Return the recipe with the name of an encoding where it says ``auto``, and what was measured for it.

    Measured is the student that the recipe leads to, on the example that ``gm`` was captured with.
    A recipe that names an encoding is returned as it is, with None.

    Args:
        recipe: the method.
        gm: a graph from ``ti_fx.capture``.

    Raises:
        InputError: the graph keeps no example. ExportError: it is not on the CPU, or can't be exported.
    """
    if recipe.activations.encoding != AUTO:
        return recipe, None
    example = facts(gm).example
    if example is None:
        raise InputError(
            "the graph keeps no example to measure it on; capture it with ti_fx.capture, or name an encoding"
        )
    student = fork(gm)
    Pipeline(DecomposeAttention(), recipe.ternarize)(student)
    choice = choose_encoding(student, example, activations=recipe.activations)
    return replace(recipe, activations=replace(recipe.activations, encoding=choice.encoding)), choice


def _students(
    gm: GraphModule, candidates: Sequence[str], activations: QuantizeActivations | None
) -> dict[str, GraphModule]:
    if activations is None:
        return dict.fromkeys(candidates, _packed(gm))
    found = {}
    for name in candidates:
        found[name] = fork(gm)
        Pipeline(replace(activations, encoding=name), Strip(), Pack())(found[name])
    return found


def _packed(gm: GraphModule) -> GraphModule:
    copy = fork(gm)
    if any(packed_weights(copy)):
        return copy
    if not quantised_weights(copy):
        Pipeline(Ternarize())(copy)
        Pipeline(QuantizeActivations(encoding="float"))(copy)
    Pipeline(Strip(), Pack())(copy)
    return copy


def fastest_that_fits(measured: tuple[Measured, ...], limit: float | None) -> Choice:
    """Return the fastest of the measured encodings that run in ``limit`` megabytes (None: any), with the reason.

    Of encodings that are about as fast, one whose rows do not depend on their batch is chosen.

    Raises:
        InputError: there is a limit, and this system does not say what memory is used.
        ExportError: no encoding runs within the limit.
    """
    fitting = list(measured)
    if limit is not None:
        needs = {one: one.megabytes for one in measured}
        if None in needs.values():
            raise InputError("this system does not say what memory is used; leave ram_megabytes out")
        fitting = [one for one, need in needs.items() if need is not None and need <= limit]
    if not fitting:
        least = min(measured, key=lambda one: one.megabytes or 0)
        raise ExportError(
            f"no encoding runs in {limit:g} MB: {least.encoding} needs the least, {least.megabytes:.0f} MB"
        )
    fastest = min(fitting, key=lambda one: one.milliseconds)
    alike = [one for one in fitting if one.milliseconds <= AS_FAST * fastest.milliseconds]
    chosen = next((one for one in alike if get_encoding(one.encoding).batch_invariant), fastest)
    reason = f"the fastest, {chosen.milliseconds:.2f} ms"
    if chosen is not fastest:
        reason = f"as fast as {fastest.encoding}, and a row's result does not depend on its batch"
    if limit is not None:
        reason += f", of {len(fitting)} that run in {limit:g} MB"
    return Choice(chosen.encoding, reason, measured)
