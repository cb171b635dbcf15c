"""Makes the page of the study from its runs: a table a setting, every arm at its own best rate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from study.arms import BASELINE
from study.one_run import Key
from study.settings import Setting
from ti_fx.analysis import area_under, steps_until

Run = dict[str, Any]
HEAD = """# Convergence: which method pays where

Made by `python benchmarks/convergence.py page` from `benchmarks/results/convergence.json`, which holds every run: all
arms at all rates, not the best alone. A rate is chosen by the divergence from the teacher at the end, on validation
rows, of seed 0; the other seeds run at that rate, and the table shows test rows. `area` is the area under the curve
over TernaryBERT's at the same seed; `steps to TernaryBERT's end` is the share of all steps after which the divergence
is where TernaryBERT ends (or how many seeds get there); `p` is a paired t-test of the ends; `edge` marks a rate at the
end of the grid.
"""


@dataclass(frozen=True)
class Row:
    """An arm in one setting, over its seeds.

    Attributes:
        rate: of all that were tried, the one with the least divergence at the end, on validation rows, of seed 0.
        is_edge: whether it is the first or last of the grid.
        kl, accuracy, seconds: at the end, on test rows, by seed. area: under the curve, mean over baseline's, by seed.
        reached: the share of all steps after which the curve is at the baseline's end, by seed; None: never.
        p: of a paired t-test of the end against the baseline's.
    """

    arm: str
    rate: float
    is_edge: bool
    kl: tuple[float, ...]
    accuracy: tuple[float, ...]
    seconds: tuple[float, ...]
    area: tuple[float, ...]
    reached: tuple[float | None, ...]
    p: float | None


def best_rate(runs: Iterable[Run], rates: Sequence[float]) -> float | None:
    """Return the rate of the best end among the runs of one arm and seed 0; None: not all rates were tried."""
    ends = {run["rate"]: run["curve"][-1]["kl"] for run in runs if run["seed"] == 0}
    if set(rates) - set(ends):
        return None
    return min(rates, key=lambda rate: (ends[rate] != ends[rate], ends[rate]))


def rows(setting: Setting, runs: dict[Key, Run]) -> list[Row]:
    """Return the arms of a setting that were tried at every rate, the baseline first, then by their ends."""
    by_arm: dict[str, list[Run]] = defaultdict(list)
    for key, run in runs.items():
        if key.setting == setting.name and run["steps"] == setting.steps:
            by_arm[key.arm].append(run)
    chosen: dict[str, dict[int, Run]] = {}
    for arm, tried in by_arm.items():
        rate = best_rate(tried, setting.rates)
        if rate is not None:
            chosen[arm] = {run["seed"]: run for run in tried if run["rate"] == rate}
    if BASELINE not in chosen:
        return []
    found = [_row(setting, arm, seeds, chosen[BASELINE]) for arm, seeds in chosen.items()]
    return sorted(found, key=lambda row: (row.arm != BASELINE, mean(row.kl)))


def _row(setting: Setting, arm: str, seeds: dict[int, Run], baseline: dict[int, Run]) -> Row:
    both = sorted(set(seeds) & set(baseline))
    ends = [seeds[seed]["test"]["kl"] for seed in both]
    others = [baseline[seed]["test"]["kl"] for seed in both]
    target = mean(run["curve"][-1]["kl"] for run in baseline.values())
    areas, reached = [], []
    for seed in both:
        steps, kl = _curve(seeds[seed])
        areas.append(area_under(steps, kl) / area_under(*_curve(baseline[seed])))
        step = steps_until(steps, kl, target)
        reached.append(None if step is None else step / setting.steps)
    rate = next(iter(seeds.values()))["rate"]
    tested = arm != BASELINE and len(both) > 1
    return Row(
        arm,
        rate,
        rate in (setting.rates[0], setting.rates[-1]),
        tuple(ends),
        tuple(seeds[seed]["test"]["accuracy"] for seed in both),
        tuple(seeds[seed]["curve"][-1]["seconds"] for seed in both),
        tuple(areas),
        tuple(reached),
        paired_p(ends, others) if tested else None,
    )


def paired_p(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the two-sided p of a paired t-test; Student's distribution is integrated over its angle."""
    gaps = [one - other for one, other in zip(values, others, strict=True)]
    spread, freedom = stdev(gaps), len(gaps) - 1
    if not spread:
        return 1.0 if not mean(gaps) else 0.0
    t = abs(mean(gaps)) / (spread / math.sqrt(len(gaps)))
    angles = np.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 20_001)
    half = np.linspace(0.0, math.pi / 2, 20_001)
    tail, whole = (float(np.trapezoid(np.cos(part) ** (freedom - 1), part)) for part in (angles, half))
    return tail / whole


def _curve(run: Run) -> tuple[list[float], list[float]]:
    return [row["step"] for row in run["curve"]], [row["kl"] for row in run["curve"]]


def table(setting: Setting, found: list[Row]) -> str:
    """Return a setting's table as Markdown."""
    lines = [
        f"### `{setting.name}`: {setting.what}",
        "",
        f"{setting.steps} steps of {setting.batch_size} rows; every arm at the best of {len(setting.rates)} rates.",
        "",
        "| arm | rate | KL at the end | p | area | steps to TernaryBERT's end | accuracy | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        known = [share for share in row.reached if share is not None]
        reached = (
            f"{mean(known):.2f} N"
            if len(known) == len(row.reached)
            else f"{len(known)} of {len(row.reached)}"
        )
        cells = [
            row.arm,
            f"{row.rate:g}{' (edge)' if row.is_edge else ''}",
            _spread(row.kl),
            "" if row.p is None else f"{row.p:.2g}",
            f"{mean(row.area):.2f}",
            reached,
            f"{100 * mean(row.accuracy):.1f}%",
            f"{mean(row.seconds):.0f}",
            str(len(row.kl)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4g}" if len(values) < 2 else f"{mean(values):.4g} ± {stdev(values):.2g}"


def page(settings: Iterable[Setting], runs: dict[Key, Run]) -> str:
    """Return the page."""
    sections = [table(setting, found) for setting in settings if (found := rows(setting, runs))]
    return "\n".join([HEAD, *sections])
