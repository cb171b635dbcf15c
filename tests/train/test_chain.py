"""Chains of recipes: how steps are shared, what each stage's teacher is, and that they go on with the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import Train, ti_fx_command
from models import bert_model
from tiny_training import arguments, different, rows, weights
from torch import Tensor

from ti_fx import Recipe, numerics
from ti_fx.errors import InputError, RecipeError
from ti_fx.passes import KeepLayers, QuantizeActivations, Ternarize
from ti_fx.train import TernaryTrainer, trainers
from ti_fx.train.chain import stage_steps

CHAIN = Recipe(
    "chain",
    teachers=(
        Recipe("one", ternarize=Ternarize(weights="row"), activations=QuantizeActivations("float")),
        Recipe("two", ternarize=Ternarize(weights="row")),
    ),
)


def stages(folder: Path, **options: Any) -> Any:
    settings = arguments(folder, max_steps=6, save_strategy="steps", save_steps=1, save_total_limit=None)
    return trainers(
        bert_model(1), CHAIN, settings, train_dataset=rows(16), eval_dataset=None, compile="off", **options
    )


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[TernaryTrainer], list[dict[str, Tensor]], Path]:
    """The trainers of each stage, and what their students were at the end."""
    folder = tmp_path_factory.mktemp("chain")
    made, ends = [], []
    for trainer, goes_on in stages(folder):
        assert not goes_on
        trainer.train()
        made.append(trainer)
        ends.append(weights(trainer))
    return made, ends, folder


def test_steps_are_shared_out() -> None:
    assert stage_steps(CHAIN, 11) == [3, 3, 5]
    assert stage_steps(Recipe("alone"), 11) == [11]
    with pytest.raises(InputError, match="is a chain of 3, and 2 steps are fewer"):
        stage_steps(CHAIN, 2)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_chain_reads_back(suffix: str, tmp_path: Path) -> None:
    CHAIN.save(tmp_path / f"recipe{suffix}")
    assert Recipe.load(tmp_path / f"recipe{suffix}") == CHAIN
    assert [one.name for one in CHAIN.chain()] == ["one", "two", "chain"]
    assert not any(one.teachers for one in CHAIN.chain())
    assert str(CHAIN).splitlines()[0] == "teacher 1, recipe one"


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'chain' among its teachers must be of one stage"):
        Recipe("longer", teachers=(CHAIN,))
    with pytest.raises(RecipeError, match="and have all layers"):
        Recipe("shallow", teachers=(Recipe("half", keep_layers=KeepLayers()),))
    with pytest.raises(RecipeError, match=r"recipe.teachers holds 'one'; it must be a list"):
        Recipe.from_dict({"name": "wrong", "teachers": "one"})
    with pytest.raises(RecipeError, match=r"recipe.teachers\[0\] has no name"):
        Recipe.from_dict({"name": "wrong", "teachers": [{}]})
    with pytest.raises(InputError, match="is a chain of 3, and a trainer trains one"):
        TernaryTrainer(bert_model(1), CHAIN, arguments(tmp_path))
    with pytest.raises(InputError, match="whose steps are shared out; give max_steps"):
        next(iter(trainers(bert_model(1), CHAIN, arguments(tmp_path, max_steps=-1))))


@pytest.mark.slow
def test_a_student_is_the_next_ones_teacher_and_start(run: Any) -> None:
    made, ends, folder = run
    assert [trainer.state.max_steps for trainer in made] == [2, 2, 2]
    assert [Path(trainer.args.output_dir) for trainer in made] == [
        folder / "teacher-1",
        folder / "teacher-2",
        folder,
    ]
    for index, trainer in enumerate(made[1:]):
        before = ends[index]
        name = "bert.encoder.layer.0.output.dense.weight"
        teacher = trainer.model.state_dict()[f"teacher.{name}"]
        assert torch.equal(teacher, numerics.ternary(before[name], "row"))
        norm = "bert.encoder.layer.0.output.LayerNorm.weight"
        assert torch.equal(trainer.model.state_dict()[f"teacher.{norm}"], before[norm])
        assert different(before, ends[index + 1]) != []


@pytest.mark.slow
@pytest.mark.parametrize("left", [("teacher-1/checkpoint-1",), ("teacher-1", "teacher-2/checkpoint-1")])
def test_a_chain_goes_on_with_the_same_bits(left: tuple[str, ...], run: Any, tmp_path: Path) -> None:
    _, ends, folder = run
    for name in left:
        shutil.copytree(folder / name, tmp_path / name)
    last: Any = None
    for trainer, goes_on in stages(tmp_path, resume=True):
        trainer.train(resume_from_checkpoint=goes_on or None)
        last = trainer
    assert different(weights(last), ends[-1]) == []


@pytest.mark.slow
def test_the_command_trains_a_chain_and_resumes_it(tmp_path: Path, train_command: Train) -> None:
    out = tmp_path / "run"
    ran = train_command(out, "--recipe", "bit", "--steps", 6)
    assert (ran.code, ran.err) == (0, "")
    assert (out / "teacher-1" / "ti_fx.json").is_file()
    assert Recipe.load(out / "recipe.json").teachers == Recipe.preset("bit").teachers
    again = train_command(out, "--recipe", "bit", "--steps", 6)
    assert again.code == 2
    assert "holds a run already" in again.err
    again = train_command(out, "--recipe", "bit", "--steps", 6, "--resume")
    assert (again.code, again.err) == (0, "")
    assert "is finished" in again.out
    ran = ti_fx_command("export", out, "--out", tmp_path / "student.onnx")
    assert (ran.code, ran.err) == (0, "")
