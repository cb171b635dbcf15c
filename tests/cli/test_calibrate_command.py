"""``ti-fx calibrate``: from rows without labels to a checkpoint that export and training go on from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from classifier import Ran, ti_fx_command
from models import VOCABULARY
from refusals import refused

import ti_fx
from ti_fx.ir.facts import facts
from ti_fx.passes import Pack
from ti_fx.train.checkpoint import read_facts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows of text without labels."""
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    rows = [f"how many w{index} and w{index * 7 % 50}" + " w3" * (index % 4) for index in range(40)]
    path.write_text("\n".join(["text", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, classifier: Path, texts: Path) -> tuple[Path, Ran]:
    out = tmp_path_factory.mktemp("calibrated") / "run"
    options = ("--rows", 24, "--batch-size", 4)
    return out, ti_fx_command("calibrate", classifier, "--data", texts, "--out", out, *options)


def test_the_report_has_each_weight_and_held_out_rows(calibrated: tuple[Path, Ran]) -> None:
    out, ran = calibrated
    assert (ran.code, ran.err) == (0, "")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (results["calibrate"], results["measure"], results["held_out_rows"]) == (
        "calibrate{rows=24}",
        "KL",
        16,
    )
    names = {row["name"] for row in results["weights"]}
    assert "bert.encoder.layer.0.attention.self.query.weight" in names
    assert all(name in ran.out for name in names)
    assert f"calibrated  KL of logits {results['calibrated']:.4f}" in ran.out
    assert "on 16 held-out rows" in ran.out


def test_the_checkpoint_is_the_calibrated_student(calibrated: tuple[Path, Ran], classifier: Path) -> None:
    out, _ = calibrated
    student = ti_fx.load(out)
    name = "bert.encoder.layer.0.output.dense.weight"
    saved = safetensors.torch.load_file(out / "model.safetensors")[name]
    assert all(len(row.unique()) <= 3 for row in saved)  # on the grid
    assert torch.equal(dict(student.named_parameters())[name], saved)
    assert read_facts(out)["made"]["passes"] == ["recipe", "calibrate{rows=24}"]
    ti_fx.Pipeline(Pack())(student)
    assert facts(student).stage == "packed"


@pytest.mark.slow
def test_training_goes_on_from_it(
    calibrated: tuple[Path, Ran], classifier: Path, rows_file: Path, tmp_path: Path
) -> None:
    out, _ = calibrated
    options = ("--recipe", out / "recipe.json", "--steps", 1, "--batch-size", 4, "--compile", "off")
    common = ("--data", rows_file, "--out", tmp_path / "run", *options)
    ran = ti_fx_command("train", classifier, "--start", out, "--learning-rate", "1e-12", *common)
    assert (ran.code, ran.err) == (0, "")
    start, end = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (out, tmp_path / "run")
    )
    for name, value in start.items():
        torch.testing.assert_close(end[name], value, rtol=0, atol=1e-6)
    assert read_facts(tmp_path / "run")["teacher"] == read_facts(out)["teacher"]


@pytest.mark.slow
def test_input_tensors_are_rows_too(classifier: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(4, VOCABULARY, (12, 6))
    np.savez(tmp_path / "rows.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    out = tmp_path / "run"
    ran = ti_fx_command("calibrate", classifier, "--data", tmp_path / "rows.npz", "--out", out, "--rows", 8)
    assert (ran.code, ran.err) == (0, "")
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["held_out_rows"] == 4


def test_what_does_not_fit_is_refused(
    calibrated: tuple[Path, Ran], classifier: Path, texts: Path, rows_file: Path, tmp_path: Path
) -> None:
    out, new = calibrated[0], tmp_path / "new"
    assert "holds a checkpoint already" in refused("calibrate", classifier, "--data", texts, "--out", out)
    assert "give the full-precision model" in refused("calibrate", out, "--data", texts, "--out", new)
    assert "--start" in refused("train", out, "--data", rows_file, "--out", new)
    short = tmp_path / "short.csv"
    short.write_text("text\nhow much\n", encoding="utf-8")
    assert "give more rows" in refused("calibrate", classifier, "--data", short, "--out", new)
    short.write_text("words\nhow much\n", encoding="utf-8")
    assert "--text-column" in refused("calibrate", classifier, "--data", short, "--out", new)
    (tmp_path / "rows.npz").write_bytes(b"nothing")
    assert "can't read" in refused("calibrate", classifier, "--data", tmp_path / "rows.npz", "--out", new)
    preset = ("--recipe", "ternarybert")  # a scale a tensor
    assert "other codes" in refused(
        "train", classifier, "--start", out, *preset, "--data", rows_file, "--out", new
    )
    assert not new.exists()
