"""The demo is killed at a random moment: it goes on from the stages that were finished, and from no other."""

from __future__ import annotations

import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from demo_encoder import save_tiny_encoder
from forked import FINISHED, demo, ended, killed, started

from ti_fx.demo.stages import RESULT, Stages
from ti_fx.demo.students import METHODS
from ti_fx.train.checkpoint import read_facts

STAGES, CHANGES = ("teacher", *METHODS, "export"), 90


def stage_of(folder: Path) -> str:
    return folder.name.rpartition("-")[0]


def what_it_made(out: Path) -> dict[str, Any]:
    """What must be the same in every run: weights and files."""
    results = json.loads((out / "results.json").read_text())
    return {
        "teacher": results["teacher"]["sha256"],
        **{name: read_facts(out / f"checkpoint-{name}")["weights"] for name in METHODS},
        **{path.name: path.read_bytes() for path in out.glob("*.onnx")},
    }


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with the demo's tokenizer."""
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def whole(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing has killed, and the seconds that it took."""
    out = tmp_path_factory.mktemp("whole") / "run"
    start = time.monotonic()
    assert ended(started(partial(demo, encoder, out), out)) == FINISHED
    return out, time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_killed_demo_reuses_finished_stages_alone(
    encoder: Path, whole: tuple[Path, float], seed: int, tmp_path: Path
) -> None:
    """It begins with some stages that an earlier run has left, so that the moments are spread over all."""
    earlier, seconds = whole
    left = STAGES[: seed % (len(STAGES) + 1)]
    for folder in (earlier / "stages").iterdir():
        if stage_of(folder) in left:
            shutil.copytree(folder, tmp_path / "stages" / folder.name)
    work = partial(demo, encoder, tmp_path)
    how = killed(work, tmp_path, seed, seconds / (1 + len(left)), CHANGES)
    assert how in (FINISHED, -signal.SIGKILL)
    finished = {stage_of(path.parent) for path in tmp_path.glob(f"stages/*/{RESULT}")}
    assert finished >= set(left)
    assert ended(started(work, tmp_path)) == FINISHED
    ran = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert {name for name in STAGES if ran[name]["reused"]} == finished
    assert what_it_made(tmp_path) == what_it_made(earlier)
    assert not list((tmp_path / "stages").rglob("*.tmp"))


def test_a_stage_is_reused_as_it_was_written_alone(tmp_path: Path) -> None:
    """One whose files were changed since, or that did not end, runs again."""
    ran: list[int] = []

    def make(folder: Path) -> dict[str, Any]:
        (folder / "model").write_text("weights")
        ran.append(len(ran))
        if len(ran) == 1:
            raise KeyboardInterrupt
        return {"number": len(ran)}

    def run(**facts: Any) -> int:
        stage = Stages(tmp_path, lambda line: None).run("stage", facts, ("errors",), make)
        number: int = stage.result["number"]
        return number

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []
    assert [run(), run()] == [2, 2]
    (folder,) = tmp_path.iterdir()
    for name in ("model", RESULT):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        number = run()
        assert number == len(ran) == run()
    assert len(ran) == 4
    assert run(setting=1) == 5
