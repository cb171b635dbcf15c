"""Write the table of architectures from results of ``ti-fx zoo --json``, and count how many models passed each stage.

python -m ti_fx.zoo.summary RESULTS                        prints the table
python -m ti_fx.zoo.summary RESULTS docs/architectures.md  writes it between the page's two marks, and beside the page
                                                           zoo.json, which keeps of the results what the table shows
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ti_fx.errors import InputError
from ti_fx.files import atomic_write
from ti_fx.zoo.chain import STAGES
from ti_fx.zoo.results import FAILED, GROUPS, PLAIN, REPLACEMENTS, VERDICTS, WITH_ATTENTION, Result, Run

KEPT = "zoo.json"
BEGIN = (
    "<!-- Written from docs/zoo.json by: python -m ti_fx.zoo.summary docs/zoo.json docs/architectures.md -->"
)
END = "<!-- end of the zoo's table -->"
_SHOWN_STAGES = {"train": "training step", "runtime": "ONNX Runtime"}


@dataclass(frozen=True)
class StageCount:
    """How many models passed a stage, of those that were to run it."""

    stage: str
    passed: int
    asked: int

    @property
    def share(self) -> float:
        """The part that passed, 0 to 1."""
        return self.passed / self.asked if self.asked else 0.0

    def __str__(self) -> str:
        return f"{self.passed} of {self.asked} ({100 * self.share:.1f}%)"


@dataclass(frozen=True)
class Part:
    """Results that are counted together: model types with one kind of attention, or the factories of files.

    Attributes:
        title: what they are. results: those with attention. without, not_built: how many are left out.
    """

    title: str
    results: tuple[Result, ...]
    without: int
    not_built: int

    def stages(self) -> list[StageCount]:
        """Return the count of each stage that somebody was to run, from capture on."""
        counts = [count_stage(self.results, stage) for stage in STAGES[STAGES.index("capture") :]]
        return [count for count in counts if count.asked]


def count_stage(results: Iterable[Result], stage: str) -> StageCount:
    """Return how many of these results passed a stage."""
    asked = [result for result in results if result.asked(stage)]
    return StageCount(stage, sum(result.reached(stage) for result in asked), len(asked))


def parts(run: Run) -> list[Part]:
    """Return the parts of a run that are there: eager, sdpa, plain PyTorch."""
    titles = {"eager": "model types, eager attention", "sdpa": "model types, sdpa attention", "": PLAIN}
    found = []
    for attention, title in titles.items():
        those = [result for result in run.results if result.job.attention == attention]
        if those:
            counts = {verdict: sum(one.verdict == verdict for one in those) for verdict in VERDICTS}
            having = tuple(one for one in those if one.verdict in WITH_ATTENTION)
            found.append(Part(title, having, counts["no attention"], counts["not built"]))
    return found


def by_reason(results: Sequence[Result]) -> dict[str, list[str]]:
    """Return each reason with the models' names, once each; reasons that most share come first."""
    found: dict[str, list[str]] = {}
    for result in results:
        names = found.setdefault(result.reason, [])
        if result.job.name not in names:
            names.append(result.job.name)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[1])))


def markdown(run: Run) -> str:
    """Return the table of a run, and below it what failed, what has no attention and what was not built."""
    lines = [_sentence(run), "", *_table(run)]
    failed = run.with_verdict(*FAILED)
    lines += _listed(f"Refused or failed: {len(failed)}", [f"`{one.title}`: {one.reason}" for one in failed])
    without = run.with_verdict("no attention")
    lines += _listed(f"Without softmax attention: {_distinct(without)}", _reasons(without))
    unbuilt = run.with_verdict("not built")
    eager = {
        one.job.name for one in run.results if one.job.attention == "eager" and one.verdict in WITH_ATTENTION
    }
    only_eager = [one for one in unbuilt if one.job.attention == "sdpa" and one.job.name in eager]
    # What isn't built with eager attention isn't built with sdpa either; said once.
    neither = [one for one in unbuilt if one.job.attention != "sdpa"]
    lines += _listed(f"Built, but not with sdpa attention: {len(only_eager)}", _reasons(only_eager))
    lines += _listed(f"Not built: {len(neither)}", _reasons(neither))
    return "\n".join(lines)


def replaced(text: str, table: str) -> str:
    """Return a page with the table between its two marks replaced.

    Raises:
        InputError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"the page has no place for the table; write {BEGIN} and {END} where it belongs")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main(arguments: Sequence[str]) -> None:
    """Print the table of a file of results, or write it into a page and what it shows beside that.

    Raises:
        InputError: wrong arguments, a file that can't be read or written, or a page without the marks.
    """
    if len(arguments) not in (1, 2):
        raise InputError(
            "give a file that ti-fx zoo --json wrote, and, to change it, a page such as docs/architectures.md"
        )
    run = Run.read(Path(arguments[0]))
    if len(arguments) == 1:
        print(markdown(run))
        return
    page = Path(arguments[1])
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"can't read {page}: {error.strerror}; give a page that has the marks") from None
    atomic_write(page, replaced(text, markdown(run)))
    run.write_short(page.with_name(KEPT))


def _sentence(run: Run) -> str:
    names = {"transformers": "transformers", "torch": "torch", "onnxruntime": "ONNX Runtime"}
    measured = (
        "Measured with " + ", ".join(f"{title} {run.versions[name]}" for name, title in names.items()) + "."
    )
    return " ".join([measured, *_verified(run)])


def _verified(run: Run) -> list[str]:
    """Say at how many models the sites were checked by numbers, and how closely graph and model agree there."""
    counts = []
    worst = 0.0
    for point, name in REPLACEMENTS.items():
        # None is a number that was infinite or NaN: of no use here.
        measured = (one.outcome.numbers.get(name) for one in run.results)
        found = [number for number in measured if number is not None]
        if found:
            counts.append(f"the {point} in {len(found)}")
            worst = max(worst, max(found))
    if not counts:
        return []
    return [
        f"A known tensor in a site's place changed graph and model alike (relative {worst:.0e} at most): "
        + ", ".join(counts)
        + " models."
    ]


def _table(run: Run) -> list[str]:
    types = [one for one in run.results if one.job.file is None and one.verdict in WITH_ATTENTION]
    attentions = [name for name in ("eager", "sdpa") if any(one.job.attention == name for one in types)]
    plain = [one for one in run.results if one.job.file is not None and one.verdict in WITH_ATTENTION]
    heads = ["group"]
    for attention in attentions or ["eager"]:
        heads += [f"with attention ({attention})", *_SHOWN_STAGES.values()]
    rows = [[group, *_cells(types, attentions, group)] for group in GROUPS]
    rows = [row for row in rows if any(cell not in ("0", "–") for cell in row[1:])]
    if len(rows) > 1:
        rows.append(["**all types**", *(f"**{cell}**" for cell in _cells(types, attentions, None))])
    if plain:
        counted = [str(len(plain)), *(_cell(plain, stage, False) for stage in _SHOWN_STAGES)]
        rows.append([PLAIN, *counted, *["–"] * (len(heads) - 1 - len(counted))])
    return [
        _row(heads),
        _row(["---", *["---:"] * (len(heads) - 1)]),
        *map(_row, rows),
    ]


def _cells(types: Sequence[Result], attentions: Sequence[str], group: str | None) -> list[str]:
    cells = []
    for attention in attentions:
        those = [one for one in types if one.job.attention == attention]
        if group is not None:
            # One that did not live to say its class is in no group that we know.
            those = [one for one in those if (one.group or "other") == group]
        cells.append(str(len(those)))
        cells += [_cell(those, stage, group is None) for stage in _SHOWN_STAGES]
    return cells


def _cell(results: Sequence[Result], stage: str, in_percent: bool) -> str:
    counted = count_stage(results, stage)
    if not counted.asked:
        return "–"
    some = f" of {counted.asked}" if counted.asked < len(results) else ""
    share = f" ({100 * counted.share:.1f}%)" if in_percent else ""
    return f"{counted.passed}{some}{share}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    # No tag, no line of its own, no link: messages print code.
    escaped = [line.replace("<", "&lt;").replace("\n", " ").replace("](", "]\\(") for line in lines]
    return [
        "",
        f"<details><summary>{title}</summary>",
        "",
        *(f"- {line}" for line in escaped),
        "",
        "</details>",
    ]


def _reasons(results: Sequence[Result]) -> list[str]:
    """Return a line a reason, with the names of its models."""
    return [
        f"{', '.join(f'`{name}`' for name in names)}: {reason}"
        for reason, names in by_reason(results).items()
    ]


def _distinct(results: Sequence[Result]) -> int:
    return len({(one.job.name, one.job.file) for one in results})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as complaint:
        sys.exit(f"ti_fx.zoo.summary: {complaint}")
