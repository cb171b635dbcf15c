"""Two processes write to one place at once: what is there in the end is one's or the other's, whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import FINISHED, REFUSED, answer, ended, is_one_of, packed, started
from models import bert_model, text_example
from tiny_training import trainer

from ti_fx import Recipe
from ti_fx.export import to_onnx
from ti_fx.train.checkpoint import read_facts, read_weights


@pytest.mark.parametrize("external", [False, True])
def test_two_exports_to_one_path(tmp_path: Path, external: bool) -> None:
    students = [packed(seed) for seed in (1, 2)]
    alone = [tmp_path / f"alone{index}" / "student.onnx" for index in (0, 1)]
    for path, student in zip(alone, students, strict=True):
        to_onnx(student, path, text_example(), external_data=external)
    path = tmp_path / "both" / "student.onnx"
    children = [
        started(
            lambda student=student: to_onnx(student, path, text_example(), external_data=external), tmp_path
        )
        for student in students
    ]
    ends = [ended(child) for child in children]
    assert set(ends) <= {FINISHED, REFUSED}
    assert FINISHED in ends
    assert is_one_of(answer(path), [answer(other) for other in alone])
    assert not [left for left in path.parent.iterdir() if left.name.endswith(".tmp")]


def test_two_checkpoints_in_one_folder(tmp_path: Path) -> None:
    made = []
    for index in range(2):
        one = trainer(tmp_path / str(index), "ternarybert", model=bert_model(layers=1))
        with torch.no_grad():
            next(iter(one.model.parameters())).add_(index)
        made.append(one)
    for turn in range(3):
        folder = tmp_path / f"both{turn}"
        children = [
            started(lambda one=one, to=folder: [one.save_model(str(to)) for _ in range(4)], tmp_path)
            for one in made
        ]
        ends = [ended(child) for child in children]
        assert set(ends) <= {FINISHED, REFUSED}, ends
        assert FINISHED in ends
        read_weights(folder, read_facts(folder))


def test_two_recipes_at_one_path(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipes = [Recipe.preset(name) for name in ("ti-g", "ti-m")]
    children = [
        started(lambda recipe=recipe: [recipe.save(path) for _ in range(50)], tmp_path) for recipe in recipes
    ]
    assert [ended(child) for child in children] == [FINISHED, FINISHED]
    assert Recipe.load(path) in recipes
    assert [left.name for left in tmp_path.iterdir()] == ["recipe.yaml"]
