"""Which method converges fastest to its teacher: every recipe, each at its own rate, over settings and seeds.

    python benchmarks/convergence.py run --images FOLDER --text FOLDER --minutes 60
    python benchmarks/convergence.py run --settings vit-12,decoder-24 --arms ternarybert,ti-g
    python benchmarks/convergence.py state
    python benchmarks/convergence.py page

A run that is in the results is not made again, so that the study goes on where it was stopped. Teachers are trained
once and kept in --out. Of each arm every rate is tried with seed 0, then the other seeds at the best one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from study.arms import BASELINE, Arm, all_arms
from study.one_run import Key, train
from study.page import best_rate, page
from study.rows import Yardstick
from study.settings import Setting, all_settings
from study.store import Store

from ti_fx.errors import TiFxError, first_line
from ti_fx.files import atomic_write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "convergence.json"
PAGE = ROOT / "docs" / "convergence.md"


def main() -> int:
    """Run what is asked for; return the exit code."""
    options = parse()
    settings = all_settings({"images": options.images, "text": options.text})
    arms = all_arms()
    store = Store(options.results)
    chosen = [settings[name] for name in named(options.settings, settings, "setting")]
    wanted = [arms[name] for name in named(options.arms, arms, "arm")]
    wanted.sort(key=lambda arm: arm.name != BASELINE)
    if options.do == "page":
        atomic_write(PAGE, page(settings.values(), store.runs))
        print(f"wrote {PAGE}")
        return 0
    if options.do == "state":
        for setting in chosen:
            left = len(list(missing(setting, wanted, store)))
            print(f"{setting.name}: {left} runs to make next")
        return 0
    torch.set_num_threads(options.threads)
    until = time.monotonic() + 60 * options.minutes
    for setting in chosen:
        if not run(setting, wanted, store, options.out, until):
            print("out of time; the same command goes on")
            return 0
    return 0


def run(setting: Setting, arms: list[Arm], store: Store, out: Path, until: float) -> bool:
    """Make the runs of a setting that are missing; return False if time ran out."""
    if next(missing(setting, arms, store), None) is None:
        return True
    folder = setting.teacher(out)
    data = setting.data(folder)
    teacher = setting.load(folder)
    validation, test = (Yardstick(teacher, rows, data.shifted) for rows in (data.validation, data.test))
    print(
        f"{setting.name}: the teacher's own accuracy {test.measure(teacher.eval()).accuracy:.1%}", flush=True
    )
    while (key := next(missing(setting, arms, store), None)) is not None:
        if time.monotonic() > until:
            return False
        arm = next(one for one in arms if one.name == key.arm)
        made = train(key, setting, arm, setting.load(folder), data, validation, test)
        store.add(made)
        start, end = made["curve"][0], made["curve"][-1]
        print(
            f"{key.setting} {key.arm} rate {key.rate:g} seed {key.seed}: KL {start['kl']:.4g} -> {end['kl']:.4g}, "
            f"{end['seconds']:.0f} s",
            flush=True,
        )
    return True


def missing(setting: Setting, arms: list[Arm], store: Store) -> Iterator[Key]:
    """Yield the runs to make next: every rate of every arm, then the seeds at the best one."""
    for arm in arms:
        keys = [Key(setting.name, arm.name, rate, 0) for rate in setting.rates]
        yield from (key for key in keys if key not in store.runs)
    for seed in range(1, setting.seeds):
        for arm in arms:
            tried = [
                one for key, one in store.runs.items() if (key.setting, key.arm) == (setting.name, arm.name)
            ]
            rate = best_rate(tried, setting.rates)
            if rate is not None and (key := Key(setting.name, arm.name, rate, seed)) not in store.runs:
                yield key


def named(written: str | None, known: Mapping[str, object], kind: str) -> list[str]:
    """Return the names in a comma-separated list, all where there is none."""
    if written is None:
        return list(known)
    names = written.split(",")
    for name in names:
        if name not in known:
            sys.exit(f"no {kind} is called {name!r}; there are {', '.join(known)}")
    return names


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=("run", "state", "page"))
    parser.add_argument("--settings", help="of the study, by commas; all if left out")
    parser.add_argument("--arms", help="methods, by commas; all if left out")
    parser.add_argument("--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--text", type=Path, default=Path("wikitext-2"))
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"), help="where teachers are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after so long")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TiFxError as error:
        sys.exit(f"convergence: {first_line(error)}")
