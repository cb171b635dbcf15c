"""``ti-fx recipes``, and how long the phases of ``ti-fx train`` are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from classifier import Train, ti_fx_command

from ti_fx import Recipe
from ti_fx.recipe import DEFAULT, PRESETS


def test_recipes_lists_the_presets_and_prints_one_that_is_taken_as_a_file(tmp_path: Path) -> None:
    ran = ti_fx_command("recipes")
    assert (ran.code, ran.err) == (0, "")
    assert all(name in ran.out for name in PRESETS)
    assert all(preset.what in ran.out and preset.source in ran.out for preset in PRESETS.values())
    assert f"{DEFAULT} (default)" in ran.out
    for options, expected in (
        ((), Recipe.preset("ti-g")),
        (("--intervention-steps", 12), Recipe.preset("ti-g", intervention_steps=12)),
        (("--intervention-steps", 0.3), Recipe.preset("ti-g", intervention_steps=0.3)),
    ):
        ran = ti_fx_command("recipes", "show", "ti-g", *options)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith("# Gradual: the teacher's output until s/6")
        (tmp_path / "my.yaml").write_text(ran.out)
        assert Recipe.load(tmp_path / "my.yaml") == expected
    shown = ti_fx_command("recipes", "show", tmp_path / "my.yaml").out
    assert shown == "".join(line for line in ran.out.splitlines(True) if not line.startswith("# "))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show",), "takes show NAME , not 'show'"),
        (("shwo", "ti-g"), "takes show NAME"),
        (("show", "ti-x"), "no recipe is called 'ti-x'; did you mean"),
        (("show", "missing.yaml"), "can't read recipe missing.yaml"),
        (("show", "ternarybert", "--intervention-steps", 9), "ternarybert is none"),
        (("show", "ti-g", "--intervention-steps", 3), "intervention_steps is 3"),
        (("show", "ti-g", "--intervention-steps", 8.5), "intervention_steps is 8.5"),
        (("--intervention-steps", 8), "is for one recipe"),
    ],
)
def test_what_recipes_is_given_is_checked(words: tuple[object, ...], message: str) -> None:
    ran = ti_fx_command("recipes", *words)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1


def steps_of(out: Path) -> list[float | None]:
    return [phase["steps"] for phase in json.loads((out / "recipe.json").read_text())["schedule"]]


@pytest.mark.slow
def test_a_short_training_shortens_a_preset_and_says_so(tmp_path: Path, train_command: Train) -> None:
    out = tmp_path / "run"
    ran = train_command(out, "--recipe", "ti-g", "--steps", 8)
    assert (ran.code, ran.err) == (0, "")
    assert (
        "8 steps are too few for ti-g as published, which intervenes in 60: it intervenes in 6 here"
        in ran.out
    )
    assert steps_of(out) == [1, 1, 4, None]
    ran = train_command(out, "--recipe", "ti-g", "--steps", 9, "--resume")
    assert ran.code == 2
    assert "steps was 8 and is 9" in ran.err


@pytest.mark.slow
def test_an_intervened_part_is_as_long_as_asked(tmp_path: Path, train_command: Train) -> None:
    ran = train_command(tmp_path / "run", "--recipe", "ti-m", "--steps", 4, "--intervention-steps", 0.5)
    assert (ran.code, ran.err) == (0, "")
    assert "map: intervene{at=map}, 50% of training" in ran.out
    assert "too few" not in ran.out
    for options, message in (
        (
            ("--recipe", "ti-g", "--steps", 5),
            "need at least 7 optimiser steps and training has 5; raise --steps",
        ),
        (
            ("--recipe", "ti-m", "--steps", 9, "--intervention-steps", 20),
            "has 9; raise --steps, lower --intervention",
        ),
        (("--recipe", "ternarybert", "--intervention-steps", 20), "ternarybert is none"),
    ):
        ran = train_command(tmp_path / "other", *options)
        assert ran.code == 2
        assert message in ran.err
        assert ran.err.count("\n") == 1


@pytest.mark.slow
def test_layer_blend_is_trained_and_exported(tmp_path: Path, train_command: Train) -> None:
    out = tmp_path / "run"
    ran = train_command(out, "--recipe", "layer-blend", "--steps", 4)
    assert (ran.code, ran.err) == (0, "")
    assert steps_of(out) == [0.5, None]
    assert "blend layer 1.000" in ran.out
    ran = ti_fx_command("export", out, "--out", tmp_path / "student.onnx")
    assert (ran.code, ran.err) == (0, "")
