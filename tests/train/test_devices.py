"""Two processes train as one does on the same batches, and report the same numbers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SUPPORT = Path(__file__).parents[1] / "support"
PROGRAM = SUPPORT / "two_processes.py"


def start(folder: Path, world: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(folder)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    for one in running:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors[-3000:]


def log(folder: Path, world: int, rank: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"log-{world}-{rank}.json").read_text())
    return found


@pytest.mark.slow
def test_two_processes_train_and_report_as_one(tmp_path: Path) -> None:
    start(tmp_path, 1)
    start(tmp_path, 2)
    one = torch.load(tmp_path / "gradients-1-0.pt", weights_only=True)
    for rank in (0, 1):
        other = torch.load(tmp_path / f"gradients-2-{rank}.pt", weights_only=True)
        scale = torch.stack([value.norm() for value in one.values()]).norm()
        for name, value in other.items():
            expected = one[name.removeprefix("module.")]
            assert float((value - expected).norm() / scale) <= 1e-5, name
    timed = ("runtime", "per_second")
    expected, first, second = (
        {
            name: value
            for entry in log(tmp_path, *place)
            for name, value in entry.items()
            if not name.endswith(timed) and isinstance(value, float)
        }
        for place in ((1, 0), (2, 0), (2, 1))
    )
    assert {"eval_distillation", "eval_distillation_scores", "loss_task", "loss_logits", "eval_loss"} <= set(
        first
    )
    assert first == second
    for name, value in expected.items():
        if name != "eval_loss":  # Trainer's own is a mean of its batches' means
            assert first[name] == pytest.approx(value, rel=1e-4), name
