"""A Pipeline runs passes over one graph in order and checks the graph after each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from textwrap import indent
from typing import ClassVar

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ti_fx.errors import InputError, PostconditionError, PreconditionError
from ti_fx.files import atomic_write
from ti_fx.ir import options, roles, text
from ti_fx.ir.edit import prune, sort, tensor
from ti_fx.ir.facts import facts, record_facts
from ti_fx.ir.outputs import prepared_result
from ti_fx.ir.registered import WithRegistered
from ti_fx.ir.shapes import refresh, signature
from ti_fx.ir.stages import PREPARED, STAGES, Progress, Stage, stage_of, verify
from ti_fx.ir.undo import Undo
from ti_fx.ir.untrained import Untrained, table, untrained


@dataclass(frozen=True)
class Pass(PassBase):
    """One rewrite. Subclass as a frozen dataclass; its fields are its options, and ``str(pass)`` parses back.

    A pass sets the state of what it selects and leaves the rest alone; selected again with other options, that state
    is replaced. Run twice, nothing changes.

    Attributes:
        takes: the stages of the graphs that it rewrites; empty: any.
        gives: the stage that the graph is in afterwards; None: the one that it was in.
        values_alone: whether it changes the values of tensors alone, by data that its text does not hold: a
            checkpoint, which has those values, is read without it.
    """

    takes: ClassVar[tuple[Stage, ...]] = ()
    gives: ClassVar[Stage | None] = None
    values_alone: ClassVar[bool] = False

    def requires(self, gm: GraphModule) -> None:
        """Raise PreconditionError, naming the missing pass, unless the graph is ready."""

    def apply(self, gm: GraphModule) -> None:
        """Edit ``gm`` in place."""
        raise NotImplementedError

    def explain(self, gm: GraphModule) -> str:
        """Return what a report should say of the graph beside counts: what the pass decided, and why."""
        return ""

    def ensures(self, gm: GraphModule) -> None:
        """Raise PostconditionError unless the pass did what it promises."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Run inside any torch.fx pass manager; whether it changed the graph is measured."""
        return PassResult(graph_module, Pipeline(self)(graph_module).changed)

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Run this pass alone, with the checks of a Pipeline."""
        return self.call(graph_module)

    @classmethod
    def name(cls) -> str:
        """Return the name used in texts: ``duplicate-teacher`` for DuplicateTeacher."""
        return options.kebab(cls.__name__)

    @staticmethod
    def parse(written: str) -> Pass:
        """Return the pass that ``str(pass)`` wrote: ``intervene{at=map layers=0,1}``.

        Raises:
            RecipeError: no such pass or option, or a value of the wrong type; near names are listed. A distribution
                registers a pass that can't be imported or a name that is taken.
        """
        parsed: Pass = options.parse(written, Pass.known())
        return parsed

    @staticmethod
    def known() -> Mapping[str, type[Pass]]:
        """Return every pass by its name: those imported so far, and those that installed distributions register."""
        return WithRegistered({kind.name(): kind for kind in _subclasses(Pass)}, Pass)

    def __str__(self) -> str:
        return options.write(self.name(), self)


def _subclasses(kind: type[Pass]) -> Iterator[type[Pass]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


@dataclass(frozen=True)
class PassReport:
    """What one pass changed, measured on the dump.

    Attributes:
        name: the pass as text. added, removed, rewired: numbers of nodes. parameters: elements that the graph reads
        afterwards. milliseconds: wall time, checks included. explanation: what the pass decided and why, most often
        nothing. changed: whether the dump is another.
    """

    name: str
    added: int
    removed: int
    rewired: int
    parameters: int
    milliseconds: float
    explanation: str = ""

    @property
    def changed(self) -> bool:
        """Whether the pass changed the graph."""
        return bool(self.added or self.removed or self.rewired)


@dataclass(frozen=True)
class Report:
    """What a Pipeline did, a row a pass.

    Attributes:
        passes: in order.
        untrained: of a graph that has losses now, the Parameters that they do not move.
    """

    passes: tuple[PassReport, ...]
    untrained: tuple[Untrained, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether any pass changed the graph."""
        return any(row.changed for row in self.passes)

    def __str__(self) -> str:
        rows = [
            f"{index}. {row.name}: {row.added} added, {row.removed} removed, {row.rewired} rewired; "
            f"{row.parameters:,} parameters; {row.milliseconds:.0f} ms"
            + indent(f"\n{row.explanation}" if row.explanation else "", "   ")
            for index, row in enumerate(self.passes, 1)
        ]
        return "\n".join([*rows, *table(self.untrained)])


class Pipeline:
    """Run passes in the order written; after each: sort, lint, recompile, refresh meta, verify, ensures.

    Any ``torch.fx`` PassBase is accepted; a new GraphModule that it returns is copied back into the one given. If a
    pass fails, or a check of what it left, the graph is as it was before the first one, with new node objects.

    Args:
        passes: in order, each as an instance or as text (``"intervene{at=map}"``, several on a line each).
        stage: where the passes lead. After each, every invariant of that stage that held before must hold; after the
            last, all of them, and the graph is recorded in that stage. None: after each pass the graph keeps the
            invariants of the stage that it is in.
        dump_dir: a folder for the graph's text before the first pass (``00-exported.txt``) and after each
            (``01-inline-subgraphs.txt``). It is made if it is not there.

    Raises:
        InputError: one of ``passes`` is none (a class of passes, a list). RecipeError: a text can't be read.
    """

    def __init__(
        self,
        *passes: PassBase | str,
        stage: Stage | None = None,
        dump_dir: str | PathLike[str] | None = None,
    ) -> None:
        self.passes = tuple(made for one in passes for made in _instances(one))
        self.stage = stage
        self.dump_dir = None if dump_dir is None else Path(dump_dir)

    def __call__(self, gm: GraphModule) -> Report:
        """Rewrite ``gm`` in place and report.

        Raises:
            TiFxError: as a pass, the verifier or a contract raises it, with a note that gives the pass, its position
                and the neighbourhood in the dump.
        """
        rows: list[PassReport] = []
        calls = _calls(gm)
        before = text.lines(gm)
        self._write(0, str(stage_of(gm)), before)
        progress = None if self.stage is None else Progress(self.stage, gm)
        undo = Undo(gm)
        for position, one in enumerate(self.passes, 1):
            start = time.perf_counter()
            try:
                after = _run(one, gm, before, undo, progress)
                if progress is not None and position == len(self.passes):
                    progress.finish()
                elapsed = 1000 * (time.perf_counter() - start)
                explanation = one.explain(gm) if isinstance(one, Pass) else ""
                rows.append(_measure(str(one), gm, before, after, elapsed, explanation))
                self._write(position, name_of(one), after)
            except BaseException as error:
                error.add_note(self._note(one, position, gm, before))
                undo()
                raise
            before = after
        if _calls(gm) == calls:
            gm.recompile()  # it may have been edited before, by hand
        if progress is not None:
            progress.finish()  # also where there is no pass at all
            record_facts(gm, stage=progress.stage.name)
        record_facts(gm, passes=(*facts(gm).passes, *map(_written, self.passes)))
        return Report(tuple(rows), _untrained(gm))

    def __str__(self) -> str:
        return "\n".join(map(str, self.passes))

    def _write(self, position: int, name: str, lines: dict[str, str]) -> None:
        if self.dump_dir is not None:
            atomic_write(self.dump_dir / f"{position:02}-{name}.txt", "\n".join(lines.values()) + "\n")

    def _note(self, one: PassBase, position: int, gm: GraphModule, before: dict[str, str]) -> str:
        note = f"in pass {position} of {len(self.passes)}: {one}"
        try:
            change = text.diff("\n".join(before.values()), text.dump(gm), context=1).splitlines()[:20]
        except (
            Exception
        ) as broken:  # the graph may be too broken to print: the note says so, the error goes up
            return f"{note}; the graph can't be printed: {broken}"
        return "\n".join([note, *change])


def _instances(one: object) -> Iterator[PassBase]:
    """Yield the passes that an argument of a Pipeline stands for."""
    if isinstance(one, PassBase):
        yield one
    elif isinstance(one, str):
        yield from (Pass.parse(line) for line in one.splitlines() if line.strip())
    elif isinstance(one, type) and issubclass(one, PassBase):
        raise InputError(f"{one.__name__} is a class of passes; give an instance: {one.__name__}()")
    elif isinstance(one, Pipeline | list | tuple):
        raise InputError(
            f"a Pipeline takes passes one by one, and this is a {type(one).__name__}; write Pipeline(*passes)"
        )
    else:
        raise InputError(
            f"{type(one).__name__} is no pass; give an instance of ti_fx.Pass or of torch.fx's PassBase, or a text"
        )


def _untrained(gm: GraphModule) -> tuple[Untrained, ...]:
    """Return what the losses of a graph do not move; what an intervention leaves out, another phase may train."""
    is_whole = stage_of(gm) is PREPARED and prepared_result(gm) is not None
    intervened = is_whole and any(roles.fact(node, "intervened") for node in gm.graph.nodes)
    return untrained(gm) if is_whole and not intervened else ()


def _written(one: PassBase) -> str:
    """Return a pass as text; of a foreign one, which has none that parses, where its class is."""
    return str(one) if isinstance(one, Pass) else f"{type(one).__module__}.{type(one).__qualname__}"


def name_of(one: PassBase) -> str:
    """Return a pass's name without its options; of a foreign one, its class's name."""
    return one.name() if isinstance(one, Pass) else options.kebab(type(one).__name__)


def _run(
    one: PassBase, gm: GraphModule, before: dict[str, str], undo: Undo, progress: Progress | None
) -> dict[str, str]:
    """Run one pass with every check; ``before`` and the result are the dump's lines by node name.

    Code is generated anew only if a call changed: on a large graph that takes longest.
    With ``progress``, it is the stage that the passes lead to whose invariants are checked.
    """
    calls = _calls(gm)
    if isinstance(one, Pass):
        one.requires(gm)
        _require_stage(one, gm)
        with undo.watching():
            one.apply(gm)
        if one.gives is not None:
            record_facts(gm, stage=one.gives.name)
    else:
        with undo.watching():
            _apply_foreign(one, gm)
    sort(gm.graph)
    is_rewired = _calls(gm) != calls
    if is_rewired:
        gm.graph.lint()
    after = text.lines(gm)
    changed = _changed_nodes(gm, before, after)
    if is_rewired or changed:
        gm.recompile()
    evaluated = refresh(gm, changed)
    after |= text.lines(gm, evaluated)
    if progress is None:
        verify(gm, changed=())  # refresh has just evaluated every changed node
    else:
        progress.check(gm)
    if isinstance(one, Pass):
        one.ensures(gm)
    return after


def _calls(gm: GraphModule) -> list[tuple[object, ...]]:
    """Return what code is generated from."""
    return [(node.name, node.op, node.target, node.args, node.kwargs) for node in gm.graph.nodes]


def _require_stage(one: Pass, gm: GraphModule) -> None:
    """Refuse a graph of a stage that a pass does not take.

    Raises:
        PreconditionError: names the stages that it takes, and how a graph gets there.
    """
    stage = stage_of(gm)
    if one.takes and stage not in one.takes:
        names = " or ".join(taken.name for taken in one.takes)
        order = list(STAGES.values())
        is_late = order.index(stage) > max(order.index(taken) for taken in one.takes)
        first = one.takes[0]
        advice = "capture the model again" if is_late else first.advice
        raise PreconditionError(
            f"{one.name()} takes a graph that is {names}, and this one is {stage}"
            + (f"; {advice}" if advice else ""),
            missing=None if is_late else first.missing,
        )


def _apply_foreign(one: PassBase, gm: GraphModule) -> None:
    result = one(gm)
    if result is None:
        raise PostconditionError(
            f"pass {type(one).__name__} returned nothing; a torch.fx pass returns a PassResult"
        )
    made = result.graph_module
    if made is not gm:
        gm._modules, gm._parameters, gm._buffers = made._modules, made._parameters, made._buffers
        gm._non_persistent_buffers_set = made._non_persistent_buffers_set
        gm.graph = made.graph
        prune(gm)
    roles.infer(gm.graph)


def _changed_nodes(gm: GraphModule, before: dict[str, str], after: dict[str, str]) -> list[Node]:
    """Return the nodes whose line is another up to the role, and the reads of tensors that were replaced."""
    return [
        node
        for node in gm.graph.nodes
        if text.without_role(before.get(node.name, "")) != text.without_role(after[node.name])
        or "val" not in node.meta
        or (node.op == "get_attr" and signature(node.meta["val"]) != signature(tensor(gm, node.target)))
    ]


def _measure(
    name: str,
    gm: GraphModule,
    before: dict[str, str],
    after: dict[str, str],
    milliseconds: float,
    explanation: str,
) -> PassReport:
    shared = before.keys() & after.keys()
    return PassReport(
        name=name,
        added=len(after.keys() - shared),
        removed=len(before.keys() - shared),
        rewired=sum(before[node] != after[node] for node in shared),
        parameters=sum(parameter.numel() for parameter in gm.parameters()),
        milliseconds=milliseconds,
        explanation=explanation,
    )
