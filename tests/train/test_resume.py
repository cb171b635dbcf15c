"""Checkpoints: what is in them, what they refuse, and training that goes on bit-equal after it was killed anywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_model, gpt2_model
from safetensors.torch import load_file, save_file
from tiny_training import At, batch, different, history, rows, trainer, weights
from torch import Tensor
from transformers import BertForSequenceClassification, GPT2LMHeadModel

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import CheckpointError, InputError
from ti_fx.passes import Distill
from ti_fx.recipe import Phase
from ti_fx.train import TernaryTrainer, checkpoint

STEPS = 8  # output, context, 4 of the map, then 2 of plain training after the restart
PLAIN = Recipe("plain", schedule=(Phase("quantise"),))
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS}


def made(folder: Path, *, saving: dict[str, Any] | None = None, **options: Any) -> TernaryTrainer:
    """A ti-g trainer with dropout that saves at every step."""
    settings = {"model": bert_model(layers=1), **options}
    return trainer(folder, arguments_options={**SAVING, **(saving or {})}, **settings)


class Whole:
    """An uninterrupted run, its checkpoints, and its final weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer = made(folder)
        self.trainer.train()
        self.weights = weights(self.trainer)
        self.last = folder / f"checkpoint-{STEPS}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copied(whole: Whole, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    target = tmp_path / "checkpoint-8"
    shutil.copytree(whole.last, target)
    return target


# --- what a checkpoint holds ----------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_students_tensors_only(whole: Whole) -> None:
    saved = load_file(whole.last / "model.safetensors")
    assert set(saved) == set(bert_model(layers=1).state_dict())
    assert different(saved, whole.weights) == []
    optimizer = torch.load(whole.last / "optimizer.pt", weights_only=True)
    trained = [value for value in whole.trainer.model.parameters() if value.requires_grad]
    assert len(optimizer["state"]) == len(trained)
    facts = json.loads((whole.last / "ti_fx.json").read_text())
    assert facts["position"] == {"step": STEPS, "phase": "quantise", "compiled": {}}
    assert list(facts["phases"]) == ["output", "context", "map", "quantise"]
    assert facts["recipe"] == whole.trainer.recipe.to_dict()


def test_from_pretrained_loads_the_latent_weights(whole: Whole) -> None:
    loaded = BertForSequenceClassification.from_pretrained(whole.last)
    assert different(dict(loaded.state_dict()), whole.weights) == []


@pytest.mark.slow
def test_a_tied_model_is_saved_once_and_loads_back(tmp_path: Path) -> None:
    saved = trainer(
        tmp_path,
        PLAIN,
        model=gpt2_model(n_layer=1),
        arguments_options={"max_steps": 1},
        train_dataset=rows(8, labels=False),
        eval_dataset=None,
    )
    saved.train()
    saved.save_model(str(tmp_path / "saved"))
    loaded: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    found, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    names = dict(found.state_dict())
    for name, value in weights(saved).items():
        assert torch.equal(names[name], value), name
    student = ti_fx.load(tmp_path / "saved")
    assert torch.equal(student(**batch()).logits, saved.student()(**batch()).logits)


@pytest.mark.slow
def test_a_loaded_student_equals_the_trained_one_without_a_teacher(whole: Whole) -> None:
    expected = whole.trainer.student()(**batch()).logits
    loaded = ti_fx.load(whole.last)
    assert torch.equal(loaded(**batch()).logits, expected)
    assert not loaded.training
    assert not [name for name, _ in loaded.named_parameters() if name.startswith("teacher")]
    assert torch.equal(ti_fx.load(whole.last, model=bert_model(layers=1))(**batch()).logits, expected)


@pytest.mark.slow
def test_save_model_replaces_an_earlier_one_whole(whole: Whole, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    whole.trainer.save_model(str(target))
    names = sorted(path.name for path in target.iterdir())
    whole.trainer.save_model(str(target))
    assert sorted(path.name for path in target.iterdir()) == names
    assert not [name for name in names if name.startswith(".")]
    assert torch.equal(ti_fx.load(target)(**batch()).logits, whole.trainer.student()(**batch()).logits)


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "saved"
    whole.trainer.save_model(str(target))
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "atomic_write", full)
    with pytest.raises(InputError, match=r"can't write checkpoint .*No space left on device") as caught:
        whole.trainer.save_model(str(target))
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


# --- refusals -------------------------------------------------------------------------------------------------------


def truncate(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def facts(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "ti_fx.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


def source(name: str) -> Callable[[Path], None]:
    return facts(lambda values: values["source"].update({"class": name}))


def flip_one_weight(folder: Path) -> None:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][0] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (truncate("model.safetensors"), "can't read .*model.safetensors: .*damaged or missing"),
        (remove("model.safetensors"), "can't read .*model.safetensors: .*damaged or missing"),
        (flip_one_weight, "classifier.bias is not what was saved; the file is damaged"),
        (truncate("ti_fx.json"), "can't read .*ti_fx.json"),
        (remove("ti_fx.json"), "no finished ti_fx checkpoint: ti_fx.json is missing"),
        (facts(lambda values: values.pop("weights")), "ti_fx.json has no weights; the file is damaged"),
        (facts(lambda values: values.update(format=9)), "written by another version"),
        (facts(lambda values: values["recipe"].update(schedul=1)), "no key 'schedul'"),
        (facts(lambda values: values["phases"].update(map="0" * 64)), "'map' is another graph now, though the version"),
        (facts(lambda values: values["phases"].pop("map")), "phase 'map' is another graph now"),
        (source("transformers.NoSuchModel"), "NoSuchModel, which transformers .* lacks"),
        (source("mine.Model"), r"mine.Model that only you can make; pass model="),
        (truncate("example.safetensors"), "can't read .*example.safetensors"),
        (truncate("config.json"), "can't read the config"),
        (remove("config.json"), "can't read the config"),
    ],
)  # fmt: skip
def test_load_refuses_what_is_damaged_in_one_line(
    edit: Callable[[Path], None], message: str, copied: Path
) -> None:
    edit(copied)
    with pytest.raises(CheckpointError, match=message) as caught:
        ti_fx.load(copied)
    assert "\n" not in str(caught.value)


def test_load_refuses_a_missing_folder_and_another_model(whole: Whole, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished ti_fx checkpoint"):
        ti_fx.load(tmp_path / "missing")
    for other in (bert_model(layers=2), bert_model(layers=1, intermediate_size=64), gpt2_model()):
        with pytest.raises(CheckpointError, match=r"is of another model|is another graph now") as caught:
            ti_fx.load(whole.last, model=other)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def resuming(tmp_path_factory: pytest.TempPathFactory) -> TernaryTrainer:
    """A trainer that is to go on with what it can't, again and again."""
    return made(tmp_path_factory.mktemp("resuming"), saving={"max_steps": STEPS + 1})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (flip_one_weight, "classifier.bias is not what was saved"),
        (truncate("optimizer.pt"), "can't resume from .*training state is damaged"),
        (truncate("scheduler.pt"), "can't resume from .*training state is damaged"),
        (truncate("rng_state.pth"), "can't resume from .*training state is damaged"),
        (truncate("trainer_state.json"), "can't resume from .*training state is damaged"),
        (remove("optimizer.pt"), "holds a model but no state of its training"),
        (remove("trainer_state.json"), "holds a model but no state of its training"),
        (facts(lambda values: values["teacher"].update({"classifier.bias": "0"})),
         "with another teacher: classifier.bias differs"),
        (facts(lambda values: values["phases"].update(output="0" * 64)), "phase 'output' is another graph now"),
    ],
)  # fmt: skip
def test_resume_refuses_what_is_damaged_in_one_line(
    edit: Callable[[Path], None], message: str, copied: Path, resuming: TernaryTrainer
) -> None:
    edit(copied)
    with pytest.raises(CheckpointError, match=message) as caught:
        resuming.train(resume_from_checkpoint=str(copied))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_resume_refuses_another_recipe_teacher_or_model(copied: Path) -> None:
    def resume(**options: Any) -> None:
        made(copied.parent, **options).train(resume_from_checkpoint=str(copied))

    with pytest.raises(CheckpointError, match="trained with recipe 'ti-g' of other options"):
        resume(recipe=Recipe.preset("ti-o", intervention_steps=6))
    changed = Recipe("ti-g", distill=Distill(scores=0.5), schedule=Recipe.preset("ti-g").phases())
    with pytest.raises(CheckpointError, match="trained with recipe 'ti-g' of other options"):
        resume(recipe=changed)
    other = bert_model(layers=1)
    with torch.no_grad():
        other.classifier.bias.add_(1.0)
    with pytest.raises(CheckpointError, match=r"with another teacher: classifier\.bias differs"):
        resume(model=other)
    with pytest.raises(CheckpointError, match=r"with another teacher: .* differs"):
        resume(model=bert_model(layers=1, intermediate_size=64))
    with pytest.raises(CheckpointError, match="holds no finished checkpoint to resume from"):
        made(copied.parent / "empty").train(resume_from_checkpoint=True)


# --- killed and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    # within a phase; the slow ones are every other step, the restart's, too
    [pytest.param(step, marks=() if step == 3 else pytest.mark.slow) for step in range(1, STEPS)],
)
def test_training_resumed_from_any_step_ends_bit_equal(step: int, whole: Whole, tmp_path: Path) -> None:
    resumed = made(tmp_path)
    resumed.train(resume_from_checkpoint=str(whole.folder / f"checkpoint-{step}"))
    assert different(weights(resumed), whole.weights) == []
    tail = [entry["phase"] for entry in history(resumed)]
    assert tail == ["output", "context", *["map"] * 4, "quantise", "quantise"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]
)
def test_an_error_between_two_saves_costs_only_the_steps_since(
    step: int, whole: Whole, tmp_path: Path
) -> None:
    """Saved at every second step; the error comes inside a step, before the optimiser's."""
    saving = {"save_steps": 2} if step > 1 else {}

    def fail(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    first = made(tmp_path, saving=saving, callbacks=[At(begin=fail)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = made(tmp_path, saving=saving)
    resumed.train(resume_from_checkpoint=True)
    assert different(weights(resumed), whole.weights) == []


CHILD = """
import os, signal, sys, warnings
from pathlib import Path
from test_resume import made
from tiny_training import At

folder, step, place, compile = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]

def kill(now):
    if now == step:
        os.kill(os.getpid(), signal.SIGKILL)

trainer = made(folder, compile=compile)
if place == "save":  # the model is written by then, the rest of the checkpoint is not
    save = trainer._save_rng_state
    trainer._save_rng_state = lambda folder: (kill(trainer.state.global_step), save(folder))
else:
    trainer.add_callback(At(**{place: kill}))
trainer.train()
"""


def killed(folder: Path, step: int, place: str, compile: str = "off") -> None:
    """Train in another process that kills itself, as a full queue or a power cut would."""
    here = Path(__file__).parent
    found = os.environ.get("PYTHONPATH", "")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(here), str(here.parent / "support"), str(here.parents[1]), found])
        ),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", CHILD, str(folder), str(step), place, compile]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "place"),
    [
        (3, "save"),
        # the restart: the next step clears the optimiser
        pytest.param(6, "begin", marks=pytest.mark.slow),
        pytest.param(1, "begin", marks=pytest.mark.slow),
        pytest.param(2, "end", marks=pytest.mark.slow),
        pytest.param(6, "save", marks=pytest.mark.slow),
        pytest.param(7, "end", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_bit_equal(step: int, place: str, whole: Whole, tmp_path: Path) -> None:
    killed(tmp_path, step, place)
    last = step if place == "begin" else step - 1
    assert checkpoint.last_finished(tmp_path) == tmp_path / f"checkpoint-{last}"
    unfinished = tmp_path / f".checkpoint-{step}.tmp"
    assert unfinished.is_dir() == (place == "save")
    resumed = made(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert different(weights(resumed), whole.weights) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint-{n}" for n in range(1, STEPS + 1)
    ]


def test_a_folder_without_facts_is_no_checkpoint(whole: Whole, tmp_path: Path) -> None:
    """As another program, or an interrupted copy, would leave it."""
    shutil.copytree(whole.folder / "checkpoint-5", tmp_path / "checkpoint-5")
    shutil.copytree(whole.folder / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "ti_fx.json").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    resumed = made(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert different(weights(resumed), whole.weights) == []


@pytest.mark.slow
@pytest.mark.parametrize(("step", "place"), [(6, "begin"), (3, "save")])
def test_a_killed_compiled_run_resumes_bit_equal(step: int, place: str, tmp_path: Path) -> None:
    uninterrupted = made(tmp_path / "whole", compile="on")
    uninterrupted.train()
    killed(tmp_path / "killed", step, place, compile="on")
    resumed = made(tmp_path / "killed", compile="on")
    resumed.train(resume_from_checkpoint=True)
    assert different(weights(resumed), weights(uninterrupted)) == []
