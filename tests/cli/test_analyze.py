"""``ti-fx analyze``: where a student loses what its teacher knows, as tables, JSON and a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from classifier import ti_fx_command
from refusals import refused


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    rows = [f"how many w{index} and w{index * 7 % 50}" for index in range(8)]
    path.write_text("\n".join(["text", *rows]) + "\n", encoding="utf-8")
    return path


def test_every_measure_of_a_rounded_student(classifier: Path, texts: Path, tmp_path: Path) -> None:
    page = tmp_path / "analysis.html"
    kinds = [
        part for one in ("layers", "maps", "sensitivity", "hessian", "surface") for part in ("--what", one)
    ]
    ran = ti_fx_command("analyze", classifier, "--data", texts, *kinds, "--html", page, "--rows", 4)
    assert (ran.code, ran.err) == (0, "")
    for title in (
        "Error by layer",
        "Ranking loss of maps",
        "Cost of each weight alone",
        "Largest eigenvalues",
    ):
        assert title in ran.out
        assert title in page.read_text(encoding="utf-8")
    assert "bert.encoder.layer.0.attention.self.query.weight" in ran.out
    assert ran.out.endswith(f"wrote {page}\n")


@pytest.mark.slow
def test_a_checkpoints_student_is_analysed_by_its_own_recipe(
    classifier: Path, checkpoint: Path, texts: Path
) -> None:
    options = ("--data", texts, "--rows", 4, "--what", "layers", "--json")
    trained = ti_fx_command("analyze", classifier, "--student", checkpoint, *options)
    rounded = ti_fx_command("analyze", classifier, *options)
    assert (trained.code, rounded.code) == (0, 0), trained.err
    found, other = json.loads(trained.out), json.loads(rounded.out)
    assert found["student"] == str(checkpoint)
    assert [row["point"] for row in found["layers"]] == [row["point"] for row in other["layers"]]
    assert found["layers"] != other["layers"]


def test_what_can_not_be_analysed_is_refused(classifier: Path, checkpoint: Path, texts: Path) -> None:
    assert "is a checkpoint of a ternary student" in refused("analyze", checkpoint, "--data", texts)
    message = refused("analyze", classifier, "--student", classifier, "--data", texts)
    assert "is no finished ti_fx checkpoint" in message
