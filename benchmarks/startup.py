"""Measures the CPU time that the command line takes before any work: its import, its version and every help.

    python benchmarks/startup.py [--runs 5] [--limit 0.3]

Printed beside a process that does nothing and one that imports torch, all in turn in the same run. The exit code is 1
where a help takes more than the limit. The least of the runs counts: it is the one that the machine disturbed least.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import resource
import subprocess
import sys
from pathlib import Path

from ti_fx import cli

PYTHON = [sys.executable, "-c"]
BASELINES = {"python -c pass": [*PYTHON, "pass"], "import torch": [*PYTHON, "import torch"]}


def cpu_seconds(command: list[str]) -> float:
    """Return the user and system time of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"COLUMNS": "80"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measured() -> dict[str, list[str]]:
    """Return the commands that must be quick, by what to call them."""
    script = str(Path(sys.executable).with_name("ti-fx"))
    names = [module.name for module in pkgutil.iter_modules(cli.__path__) if module.name[0] != "_"]
    helps = [["--version"], ["--help"], *([name, "--help"] for name in names)]
    return {
        "import ti_fx": [*PYTHON, "import ti_fx"],
        **{" ".join(["ti-fx", *arguments]): [script, *arguments] for arguments in helps},
    }


def main() -> int:
    """Print a line a command, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5, help="of each; the least counts")
    parser.add_argument("--limit", type=float, default=0.3, help="seconds that a help may take")
    options = parser.parse_args()
    commands = BASELINES | measured()
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            seconds[name].append(cpu_seconds(command))
    slow = [name for name in commands if name not in BASELINES and min(seconds[name]) > options.limit]
    print(f"CPU seconds, the least of {options.runs} runs")
    for name, taken in seconds.items():
        over = f"  over {options.limit:g}" if name in slow else ""
        print(f"  {name:24} {min(taken):6.3f}{over}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
