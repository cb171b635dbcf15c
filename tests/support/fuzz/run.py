"""Draws cases, runs them, writes failing ones down as files that run alone, and counts what became of all."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.attention import Trace
from fuzz.case import Case
from fuzz.chain import Wrong, check
from fuzz.grammar import cases
from fuzz.inputs import inputs_of
from fuzz.modules import build

BLOCK = 6  # cases a block: hypothesis draws each block anew


@dataclass
class Tally:
    """What became of cases.

    Attributes:
        right, refused: how many; refusals: how often which line, numbers and names left out; examples: a case of each.
        compared: how many inputs were compared. sizes: lines about inputs that a graph or file refused.
        failures: what was wrong, and the file that shows it.
    """

    right: int = 0
    refused: int = 0
    compared: int = 0
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)
    sizes: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, Case] = field(default_factory=dict)
    failures: list[tuple[str, Path]] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many cases were run."""
        return self.right + self.refused + len(self.failures)

    def summary(self) -> str:
        """Return the counts and the reasons, a line each."""
        lines = [
            f"{self.cases} cases: {self.right} right, {self.refused} refused, {len(self.failures)} wrong; "
            f"{self.compared} inputs compared, {sum(self.sizes.values())} refused"
        ]
        for reason, count in self.refusals.most_common():
            lines += [f"  refused {count}: {reason}", f"    {self.examples[reason].text()}"]
        lines += [f"  input refused {count}: {reason}" for reason, count in self.sizes.most_common(12)]
        lines += [f"  WRONG {why}\n    {path}" for why, path in self.failures]
        return "\n".join(lines)


def drawn(count: int, first_seed: int, until: str | None = None) -> list[Case]:
    """Return ``count`` different cases, the same in each call."""
    found: dict[Case, None] = {}
    block = first_seed
    while len(found) < count:
        drawn_now: list[Case] = []

        @seed(block)
        @settings(
            max_examples=BLOCK,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases(until))
        def draw(case: Case) -> None:
            drawn_now.append(case)  # noqa: B023, called at once

        draw()
        found.update(dict.fromkeys(drawn_now[1:]))  # the first is hypothesis' plainest, of any seed
        block += 1
    return list(found)[:count]


def run(
    count: int,
    first_seed: int,
    folder: Path,
    until: str | None = None,
    *,
    cheap: bool = False,
    shrink: bool = False,
    progress: bool = False,
) -> Tally:
    """Run cases and write the failing ones into ``folder``.

    Args:
        count: how many.
        first_seed: of the first block that hypothesis draws.
        folder: for failing cases.
        until: the last step; None draws it.
        cheap: one layer each, and most are attention alone and stop after capture: for a run of seconds.
        shrink: make failing cases as plain as still fails.
        progress: count on standard error.
    """
    tally = Tally()
    for index, case in enumerate(drawn(count, first_seed, until)):
        if cheap:
            last = {0: "export", 5: "prepare", 15: "prepare"}.get(index % 20, "capture")
            case = dataclasses.replace(case, layers=1, until=last)
            if last == "capture":
                case = dataclasses.replace(case, feed_forward="none", memory=False)
        run_one(case, tally, folder, shrink=shrink)
        if progress:
            print(
                f"\r{tally.cases}/{count}, {len(tally.failures)} wrong", end="", file=sys.stderr, flush=True
            )
    if progress:
        print(file=sys.stderr)
    return tally


def run_one(case: Case, tally: Tally, folder: Path, *, shrink: bool = False) -> None:
    """Run a case and count it."""
    try:
        outcome = check(case)
    except Wrong as error:
        smallest, why = shrunk(case, str(error)) if shrink else (case, str(error))
        tally.failures.append((why, write_down(smallest, why, folder)))
        return
    tally.compared += outcome.compared
    tally.sizes.update(_alike(line) for line in outcome.sizes)
    if outcome.refused is None:
        tally.right += 1
    else:
        tally.refused += 1
        reason = f"{outcome.at}: {_alike(outcome.refused)}"
        tally.refusals[reason] += 1
        tally.examples.setdefault(reason, case)


def shrunk(case: Case, why: str) -> tuple[Case, str]:
    """Return the plainest case that fails alike, and how: each field is set back to its default where it still does."""
    kind = re.sub(r"[\d.]+(e[+-]\d+)?", "N", why)[:25]
    for field_ in dataclasses.fields(case):
        plain: dict[str, Any] = {field_.name: field_.default}
        plainer = dataclasses.replace(case, **plain)
        if field_.name == "heads":
            plainer = dataclasses.replace(plainer, key_heads=2, head_width=8)
        if plainer == case or not runs(plainer):
            continue
        try:
            check(plainer)
        except Wrong as error:
            if re.sub(r"[\d.]+(e[+-]\d+)?", "N", str(error))[:25] == kind:
                case, why = plainer, str(error)
    return case, why


def runs(case: Case) -> bool:
    """Whether a case's module runs at all: the grammar's do, others need not."""
    try:
        build(case)(**inputs_of(case, case.batch, case.length))
        build(case, spelled=True).run(**inputs_of(case, case.batch, case.length), trace=Trace())
    except Exception:  # whatever torch says of sizes that don't fit
        return False
    return True


def _alike(line: str) -> str:
    """Return a line without the numbers and names in which refusals of one kind differ."""
    return re.sub(r"%\w+", "%", re.sub(r"\d+", "N", line))[:200]


def write_down(case: Case, why: str, folder: Path) -> Path:
    """Write a case as a file that runs alone, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"case_{hashlib.sha256(case.json().encode()).hexdigest()[:10]}.py"
    here = Path(__file__).resolve().parents[1]
    path.write_text(
        f'"""{why}"""\n\nimport sys\n\nsys.path[:0] = [{str(here)!r}, {str(here.parents[1])!r}]\n\n'
        f"from fuzz.case import Case\nfrom fuzz.chain import check\n\nprint(check({case.text()}))\n"
    )
    return path
