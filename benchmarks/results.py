"""The inference benchmark's numbers: what was measured, the limits they are held to, tables and a plot."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from contenders import BASELINE, DYNAMIC_INT8, INT8_PRODUCTS
from rich.markup import escape
from rich.table import Table

from ti_fx.errors import MissingExtra
from ti_fx.files import atomic_write

MINILM_SPEED = {1: 2.5, 2: 2.0}  # least speed of int8-tensor over fp32, by threads
MINILM_BYTES = 7.0e6
CODE_BITS = 2.0
BERT_BYTES = {"int8-tensor": 28.5e6, "base3": 23.0e6}
BERT_MEMORY = {"int8-tensor": 150e6, "nbits2": 120e6}
BERT_SPEED = 3.5
BERT_OVER_INT8 = 0.85
# Of the file with embeddings in fp32, from which the number comes: one with all in int8 is 4 times a file of 2 bits.
BERT_SMALLER_THAN_INT8 = 6.5
DECODE_SPEED = 5.0
DECODE_MEMORY = 1 / 8
LIMITED_BATCHES, LIMITED_SEQUENCE = (1, 8), 128
PLOT_TYPES = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class Timing:
    """The median of one contender at one size.

    Attributes:
        threads, batch: of the run.
        sequence: an encoder's tokens, or a decoder's past ones.
        label: the contender.
        seconds: of one run.
        over_fp32, over_int8: how many times faster than fp32 and than ONNX Runtime's own dynamic int8.
        of_copy: bytes of the stored weights that a run reads, per second, over those that the machine copies.
        of_multiply: operations per second over those of the machine's fp32 matrix product; int8 can exceed 1.
        copied, multiplied: those limits themselves: bytes read and written, and operations, per second.
    """

    threads: int
    batch: int
    sequence: int
    label: str
    seconds: float
    over_fp32: float
    over_int8: float
    of_copy: float | None
    of_multiply: float
    copied: float
    multiplied: float


@dataclass(frozen=True)
class Finding:
    """One contender, apart from its speed.

    Attributes:
        label: the contender.
        bytes: on disk.
        error_graph: relative L2 distance of the logits from the fake-quant graph's; None for what is no student.
        error_fp32: the same from fp32's.
        load_seconds, steady, peak: in a fresh process; bytes, above those before the session. None: not measured.
        code_bits: bits on disk per ternary weight.
        note: how it was built.
    """

    label: str
    bytes: int
    error_graph: float | None
    error_fp32: float
    load_seconds: float | None = None
    steady: float | None = None
    peak: float | None = None
    code_bits: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Limit:
    """A number and its bound. ``measured`` is None where the run's options left it out."""

    what: str
    measured: float | None
    bound: float
    least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether it holds; None: not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.least else self.measured <= self.bound


def limits(model: str, timings: Sequence[Timing], findings: Sequence[Finding]) -> list[Limit]:
    """Return the limits of a model (``minilm``, ``bert-base`` or ``gpt2``) with what was measured."""
    found = _Found(timings, findings)
    return {"minilm": _minilm, "bert-base": _bert_base, "gpt2": _gpt2}[model](found)


class _Found:
    """Numbers by label, None where they were not measured."""

    def __init__(self, timings: Sequence[Timing], findings: Sequence[Finding]) -> None:
        self.timings = {(one.label, one.threads, one.batch, one.sequence): one for one in timings}
        self.findings = {one.label: one for one in findings}

    def speed(self, label: str, other: str, threads: int, batch: int) -> float | None:
        """Return how many times faster than ``other`` a contender is."""
        found = self.timings.get((label, threads, batch, LIMITED_SEQUENCE))
        return None if found is None else {BASELINE: found.over_fp32, DYNAMIC_INT8: found.over_int8}[other]

    def megabytes(self, label: str) -> float | None:
        return self.findings[label].bytes / 1e6 if label in self.findings else None

    def memory(self, label: str) -> float | None:
        """Return resident megabytes."""
        found = self.findings.get(label)
        return None if found is None or found.steady is None else found.steady / 1e6


def _minilm(found: _Found) -> list[Limit]:
    checks = [
        Limit(
            f"int8-tensor over fp32, threads {threads}, batch {batch}",
            found.speed("int8-tensor", BASELINE, threads, batch),
            least,
            least=True,
        )
        for threads, least in MINILM_SPEED.items()
        for batch in LIMITED_BATCHES
    ]
    for label, finding in found.findings.items():
        if finding.code_bits is not None:
            checks.append(Limit(f"{label}: MB on disk", finding.bytes / 1e6, MINILM_BYTES / 1e6))
            checks.append(Limit(f"{label}: bits per ternary weight", finding.code_bits, CODE_BITS))
    return checks


def _bert_base(found: _Found) -> list[Limit]:
    checks = [
        Limit(f"{label}: MB on disk", found.megabytes(label), most / 1e6)
        for label, most in BERT_BYTES.items()
    ]
    for batch in LIMITED_BATCHES:
        for other, least in ((BASELINE, BERT_SPEED), (DYNAMIC_INT8, BERT_OVER_INT8)):
            speed = found.speed("int8-tensor", other, 1, batch)
            checks.append(
                Limit(f"int8-tensor over {other}, threads 1, batch {batch}", speed, least, least=True)
            )
    student, int8 = found.megabytes("int8-tensor"), found.megabytes(INT8_PRODUCTS)
    smaller = int8 / student if student and int8 else None
    what = f"int8-tensor: times smaller than {INT8_PRODUCTS}"
    checks.append(Limit(what, smaller, BERT_SMALLER_THAN_INT8, least=True))
    checks += [
        Limit(f"{label}: MB of RAM", found.memory(label), most / 1e6) for label, most in BERT_MEMORY.items()
    ]
    return checks


def _gpt2(found: _Found) -> list[Limit]:
    student, fp32 = found.memory("nbits2"), found.memory(BASELINE)
    share = student / fp32 if student is not None and fp32 else None
    return [
        Limit(
            "nbits2 over fp32, threads 1, batch 1, one token after 128",
            found.speed("nbits2", BASELINE, 1, 1),
            DECODE_SPEED,
            least=True,
        ),
        Limit("nbits2: share of fp32's RAM", share, DECODE_MEMORY),
    ]


# ---- tables


def timing_table(timings: Iterable[Timing], decodes: bool) -> Table:
    """Return a table with one row per contender and size."""
    columns = ["threads", "batch", "past" if decodes else "sequence", "contender", "ms"]
    columns += ["tokens/s"] if decodes else []
    table = Table(*columns, "over fp32", "over ORT int8", "of copy", "of fp32 product")
    previous = None
    for one in timings:
        size = (one.threads, one.batch, one.sequence)
        if size != previous:
            table.add_section()
            limits_of_machine = (
                f"the machine: {one.copied / 1e9:.1f} GB/s, {one.multiplied / 1e9:.0f} GFLOP/s"
            )
            table.add_row(*map(str, size), limits_of_machine)
        previous = size
        table.add_row(
            *map(str, size),
            one.label,
            f"{1e3 * one.seconds:.2f}",
            *([f"{one.batch / one.seconds:.1f}"] if decodes else []),
            f"{one.over_fp32:.2f}x",
            f"{one.over_int8:.2f}x",
            _share(one.of_copy),
            _share(one.of_multiply),
        )
    return table


def finding_table(findings: Iterable[Finding]) -> Table:
    """Return a table with one row per contender."""
    table = Table("contender", "MB", "load, s", "RAM, MB", "peak, MB", "error, graph", "error, fp32", "note")
    for one in findings:
        note = ", ".join(
            ([one.note] if one.note else [])
            + ([f"{one.code_bits:.2f} bits a weight"] if one.code_bits is not None else [])
        )
        table.add_row(
            one.label,
            f"{one.bytes / 1e6:.2f}",
            "–" if one.load_seconds is None else f"{one.load_seconds:.2f}",
            _megabytes(one.steady),
            _megabytes(one.peak),
            "–" if one.error_graph is None else f"{one.error_graph:.1e}",
            f"{one.error_fp32:.1e}",
            escape(note),
        )
    return table


def limit_table(checks: Iterable[Limit]) -> Table:
    """Return a table of limits and whether they are met."""
    table = Table("limit", "measured", "bound", "")
    verdicts = {True: "met", False: "[red]not met[/red]", None: "not measured"}
    for one in checks:
        measured = "–" if one.measured is None else f"{one.measured:.3g}"
        bound = f"at {'least' if one.least else 'most'} {one.bound:g}"
        table.add_row(one.what, measured, bound, verdicts[one.met])
    return table


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.0f}"


# ---- the plot


def plot(path: Path, title: str, timings: Sequence[Timing], findings: Sequence[Finding]) -> None:
    """Write size on disk against latency, at the first size that was timed, in the type that the name ends with.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure_type = require_matplotlib()
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = figure_type(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    first = timings[0]
    found = {one.label: one for one in findings}
    shown = [
        one
        for one in timings
        if (one.threads, one.batch, one.sequence) == (first.threads, first.batch, first.sequence)
    ]
    largest = max(found[one.label].bytes for one in shown)
    for index, one in enumerate(sorted(shown, key=lambda one: one.seconds)):
        finding = found[one.label]
        student = finding.code_bits is not None
        point = (finding.bytes / 1e6, 1e3 * one.seconds)
        axes.plot(*point, "s" if student else "o", color="tab:red" if student else "tab:blue")
        right = finding.bytes > largest / 2  # the label stays within the picture
        axes.annotate(
            one.label,
            point,
            xytext=(-6 if right else 6, 5 if index % 2 else -12),  # those of near points don't meet
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=9,
        )
    axes.set(xscale="log", yscale="log", xlabel="MB on disk", ylabel="ms", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.margins(0.15)
    axes.grid(True, alpha=0.2)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:])
    atomic_write(path, content.getvalue())


def require_matplotlib() -> type:
    """Return matplotlib's figure.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("--plot needs matplotlib; run `pip install 'ti_fx[benchmark]'`") from None
    return Figure
