"""Keeps the runs of a study in one JSON file, written anew after each, so that a study that was stopped goes on."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from study.one_run import Key
from ti_fx.files import atomic_write

FORMAT = 1


class Store:
    """Runs by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[Key, dict[str, Any]] = {}
        if path.is_file():
            for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
                self.runs[_key(run)] = run

    def add(self, run: dict[str, Any]) -> None:
        """Add a run, and what it ran on, and write the file."""
        self.runs[_key(run)] = {**run, "on": circumstances()}
        rows = ",\n".join(json.dumps(one) for one in self.runs.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, f'{{"format": {FORMAT}, "runs": [\n{rows}\n]}}\n')


def circumstances() -> str:
    """Return what a run's numbers depend on beside its key."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {platform.machine()} {capability}, {torch.get_num_threads()} threads"


def _key(run: dict[str, Any]) -> Key:
    return Key(**{name: run[name] for name in asdict(Key("", "", 0.0, 0))})
