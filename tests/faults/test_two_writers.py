"""Two processes write to one place at once: what is there in the end is one's or the other's, whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from forked import (
    FINISHED,
    REFUSED,
    answer,
    ended,
    export_packed,
    is_one_of,
    save_often,
    save_recipe,
    started,
)

from ti_fx import Recipe
from ti_fx.train.checkpoint import read_facts, read_weights

pytestmark = pytest.mark.slow  # four processes that capture


@pytest.mark.parametrize("external", [False, True])
def test_two_exports_to_one_path(tmp_path: Path, external: bool) -> None:
    alone = [tmp_path / f"alone{seed}" / "student.onnx" for seed in (1, 2)]
    for seed, path in enumerate(alone, 1):
        export_packed(seed, path, external)
    path = tmp_path / "both" / "student.onnx"
    children = [started(partial(export_packed, seed, path, external), tmp_path) for seed in (1, 2)]
    ends = [ended(child) for child in children]
    assert set(ends) <= {FINISHED, REFUSED}
    assert FINISHED in ends
    assert is_one_of(answer(path), [answer(other) for other in alone])
    assert not [left for left in path.parent.iterdir() if left.name.endswith(".tmp")]


def test_two_checkpoints_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    children = [
        started(partial(save_often, float(change), tmp_path / str(change), folder), tmp_path)
        for change in (0, 1)
    ]
    assert [ended(child) for child in children] == [FINISHED, FINISHED]
    read_weights(folder, read_facts(folder))


def test_two_recipes_at_one_path(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    names = ("ti-g", "ti-m")
    children = [started(partial(save_recipe, name, path), tmp_path) for name in names]
    assert [ended(child) for child in children] == [FINISHED, FINISHED]
    assert Recipe.load(path) in [Recipe.preset(name) for name in names]
    assert [left.name for left in tmp_path.iterdir()] == ["recipe.yaml"]
