"""A checkpoint keeps the student's latent weights under the source names, and what rebuilds and verifies the graphs.

A folder holds ``model.safetensors`` (so ``from_pretrained`` loads the latent weights), the source's config and
tokenizer, ``example.safetensors`` (the inputs that the graph was captured with), what Trainer saves to resume,
and, written last, ``ti_fx.json``: recipe, versions, phase position, digests of the teacher's tensors and of each
phase's dump. A folder without it is an unfinished one.
"""

from __future__ import annotations

import base64
import importlib
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import TrainerState

from ti_fx.errors import CheckpointError, RecipeError, first_line
from ti_fx.files import atomic_path, atomic_write
from ti_fx.frontend.wrappers import plain_model
from ti_fx.ir.facts import facts as graph_facts
from ti_fx.ir.moved import log_variances
from ti_fx.ir.pipeline import Pipeline
from ti_fx.ir.roles import TEACHER_PREFIX
from ti_fx.passes import Strip
from ti_fx.recipe import Recipe
from ti_fx.train import intact
from ti_fx.train.made_again import has_own_passes, how_made, make_again, require_fit
from ti_fx.train.model import TernaryModel, digest
from ti_fx.train.order import EpochStart
from ti_fx.train.same_recipe import check_recipe
from ti_fx.train.source import not_finite

DESCRIPTION = "ti_fx.json"
WEIGHTS = "model.safetensors"
EXAMPLE = "example.safetensors"
TRAINER_STATE = "trainer_state.json"
FORMAT = 1
KEYS = ("recipe", "source", "versions", "position", "teacher", "phases", "weights")
VERSIONS = ("torch", "transformers", "ti_fx")


def save(
    folder: str | Path,
    model: TernaryModel,
    *,
    example: Mapping[str, Tensor],
    source: Mapping[str, Any],
    position: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    epoch: EpochStart | None = None,
) -> None:
    """Write weights, example and facts into ``folder``; each file atomically, the facts last.

    Args:
        folder: made if missing.
        model: the trained module.
        example: inputs that fit its graph; those that it was captured with go first, where they are known.
        source: how to make the source model again: ``{"class": "transformers.BertForSequenceClassification"}``.
        position: the step and phase that training has reached.
        weights: the student's tensors if they were gathered already (sharded training).
        epoch: where the present epoch began.

    Raises:
        InputError: the folder can't be written, or the disk is full; no half-written file is left.
    """
    target = Path(folder)
    example = graph_facts(model.prepared()).example or example
    student = model.student_state() if weights is None else weights
    plain = {name: value.detach().cpu().contiguous() for name, value in student.items()}
    _save_tensors(target / WEIGHTS, plain)
    _save_tensors(
        target / EXAMPLE, {name: value.detach().cpu().contiguous() for name, value in example.items()}
    )
    facts = {
        "format": FORMAT,
        "recipe": model.recipe.to_dict(),
        "source": dict(source),
        "made": how_made(model.prepared()),
        "versions": {name: _version(name) for name in VERSIONS},
        "position": dict(position),
        "teacher": model.teacher_digests(),
        "phases": model.phase_digests(),
        "weights": {name: digest(value) for name, value in plain.items()},
    }
    if epoch is not None:
        facts["epoch"] = _epoch_facts(epoch)
    atomic_write(target / DESCRIPTION, json.dumps(facts, indent=1) + "\n")


def _epoch_facts(epoch: EpochStart) -> dict[str, Any]:
    place = {"epoch": epoch.epoch, "step": epoch.step}
    if epoch.state is None:
        return place
    state = base64.b64encode(epoch.state.numpy().tobytes()).decode()
    return {**place, "state": state, "digest": digest(epoch.state)}


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(None, str(error)) from error


def read_facts(folder: str | Path) -> dict[str, Any]:
    """Return what ``ti_fx.json`` in a checkpoint folder says.

    Raises:
        CheckpointError: the folder or file is missing, unfinished or damaged.
    """
    path = Path(folder) / DESCRIPTION
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no finished ti_fx checkpoint: {DESCRIPTION} is missing; give a checkpoint-N folder"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read {path}: {first_line(error)}; use another checkpoint") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} has no format {FORMAT}; it was written by another version of ti_fx")
    for key in KEYS:
        if not isinstance(facts.get(key), dict):
            raise CheckpointError(f"{path} has no {key}; the file is damaged, use another checkpoint")
    return facts


def epoch_start(folder: str | Path, facts: Mapping[str, Any]) -> EpochStart | None:
    """Return where the checkpoint's epoch began; None if that was not saved.

    Raises:
        CheckpointError: it is damaged.
    """
    saved = facts.get("epoch")
    if saved is None:
        return None
    with readable(folder):
        if "state" not in saved:
            return EpochStart(int(saved["epoch"]), int(saved["step"]))
        state = torch.frombuffer(bytearray(base64.b64decode(saved["state"])), dtype=torch.uint8)
        if digest(state) != saved["digest"]:
            raise ValueError("the order of the rows is not what was saved")
        return EpochStart(int(saved["epoch"]), int(saved["step"]), state)


def training_state(folder: str | Path) -> TrainerState:
    """Return Trainer's state of a checkpoint that has what training goes on from, beside the model.

    Raises:
        CheckpointError: it holds only a model, or Trainer's state can't be read.
    """
    path = Path(folder) / TRAINER_STATE
    if not path.is_file() or not [*path.parent.glob("optimizer*"), *path.parent.glob("global_step*")]:
        raise CheckpointError(
            f"{folder} holds a model but no state of its training; resume from a checkpoint-N folder saved without "
            "save_only_model"
        )
    with readable(folder):
        state: TrainerState = TrainerState.load_from_json(str(path))
        intact.require_training_state(Path(folder))
    return state


@contextmanager
def readable(folder: str | Path | None) -> Iterator[None]:
    """Turn what torch and transformers raise on a damaged optimiser, schedule or generator state into one line.

    Raises:
        CheckpointError: names the folder.
    """
    try:
        yield
    except (
        OSError,
        RuntimeError,
        EOFError,
        TypeError,
        ValueError,
        LookupError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(
            f"can't resume from {folder}: {first_line(error)}; its training state is damaged, use another checkpoint"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or no safetensors file.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"can't read {path}: {first_line(error)}; the file is damaged or missing, use another checkpoint"
        ) from None


def read_weights(folder: str | Path, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the checkpoint's weights, verified by their digests.

    Raises:
        CheckpointError: a tensor is missing or is not what was saved.
    """
    path = Path(folder) / WEIGHTS
    tensors = read_tensors(path)
    for name, wanted in facts["weights"].items():
        if name not in tensors or digest(tensors[name]) != wanted:
            raise CheckpointError(
                f"{path}: {name} is not what was saved; the file is damaged, use another checkpoint"
            )
        if not_finite(tensors[name]) == "nan":
            raise CheckpointError(
                f"{path}: {name} holds nan, as training had diverged; use an earlier checkpoint"
            )
    return tensors


def restore(model: TernaryModel, folder: str | Path, facts: Mapping[str, Any]) -> None:
    """Put a checkpoint's weights into a model that is about to train on, after verifying that it is the same one.

    Raises:
        CheckpointError: another recipe, teacher or model; names what differs.
    """
    check_recipe(folder, facts, model.recipe)
    own = model.teacher_digests()
    for name, wanted in facts["teacher"].items():
        if own.get(name) != wanted:
            raise CheckpointError(
                f"{folder} was trained with another teacher: {name} differs; start from the same full-precision model"
            )
    verify_phases(model, folder, facts)
    load_values(model.prepared(), read_weights(folder, facts), folder)
    model.set_learned(facts["position"].get("learned", {}))


def verify_phases(model: TernaryModel, folder: str | Path, facts: Mapping[str, Any]) -> None:
    """Compare each phase's dump with the checkpoint's.

    Raises:
        CheckpointError: a phase's graph is another one; names the phase and the versions it was written with.
    """
    for name, found in model.phase_digests().items():
        if facts["phases"].get(name) != found:
            written = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
            now = ", ".join(f"{key} {_version(key)}" for key in VERSIONS)
            if now == written:
                raise CheckpointError(
                    f"{folder}: phase {name!r} is another graph now, though the versions are those that it was saved "
                    "with: the graph was captured otherwise, or edited without a pass; give model= a graph captured "
                    "and edited as for training"
                )
            raise CheckpointError(
                f"{folder}: phase {name!r} is another graph now (saved by {written}; this is {now}); "
                "use the versions it was saved with"
            )


def load_values(gm: GraphModule, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy values into a graph's student tensors in place.

    Raises:
        CheckpointError: a tensor is missing or has another shape: the checkpoint is of another model.
    """
    learned = {str(read.target) for read in log_variances(gm).values()}
    wanted = {
        name: value
        for name, value in [*gm.named_parameters(), *gm.named_buffers()]
        if not name.startswith(TEACHER_PREFIX) and name not in learned and name in gm.state_dict()
    }
    for name, value in wanted.items():
        found = tensors.get(name)
        if found is None or found.shape != value.shape:
            shape = "missing" if found is None else f"{tuple(found.shape)}"
            raise CheckpointError(
                f"{where} is of another model: {name} is {shape}, the model's is {tuple(value.shape)}"
            )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(tensors[name])


def load(checkpoint: str | Path, model: nn.Module | None = None) -> GraphModule:
    """Return the quantised student of a checkpoint, ready to evaluate, to ``Pack`` and to export.

    The graph is captured again and its passes are run again; each phase's dump must be what was saved. The teacher's
    values aren't needed.

    Args:
        checkpoint: a folder that ``TernaryTrainer`` wrote.
        model: the source model, of any values, or a graph that was captured from it; None: made from the config in
            the checkpoint (Hugging Face models). The checkpoint's values are put into its tensors.

    Raises:
        CheckpointError: the checkpoint is unfinished, damaged, or of another model.
    """
    facts = read_facts(checkpoint)
    weights = read_weights(checkpoint, facts)
    source = source_model(checkpoint, facts) if model is None else plain_model(model)
    example = read_tensors(Path(checkpoint) / EXAMPLE)
    try:
        recipe = Recipe.from_dict(facts["recipe"])
    except RecipeError as error:
        raise CheckpointError(
            f"{Path(checkpoint) / DESCRIPTION}: {error}; import the module that defines what is missing first, or use "
            "another checkpoint"
        ) from None
    made = facts.get("made", {})
    require_fit(source, weights, checkpoint, is_whole=not has_own_passes(made, recipe))
    gm = make_again(source, recipe, made, example)
    load_values(gm, weights, checkpoint)
    verify_phases(TernaryModel(gm, recipe), checkpoint, facts)
    intact.require_model(Path(checkpoint))
    Pipeline(Strip())(gm)
    gm.eval()
    return gm


def source_model(checkpoint: str | Path, facts: Mapping[str, Any]) -> nn.Module:
    """Return the model that a checkpoint was captured from, made from its config, in eval mode; its values are random.

    Raises:
        CheckpointError: only the user can make it, or its config can't be read.
    """
    name = str(facts["source"].get("class", ""))
    module, _, attribute = name.rpartition(".")
    if not module.startswith("transformers"):
        raise CheckpointError(f"{checkpoint} holds a {name or 'model'} that only you can make; pass model=")
    kind = getattr(importlib.import_module("transformers"), attribute, None)
    if kind is None:
        raise CheckpointError(
            f"{checkpoint} holds a {name}, which transformers {transformers.__version__} lacks"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(str(checkpoint), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read the config in {checkpoint}: {first_line(error)}") from None
    model: nn.Module = kind(config)
    return model.to(getattr(torch, str(facts["source"].get("dtype", "float32")))).eval()


def source_facts(model: nn.Module) -> dict[str, Any]:
    """Return what :func:`load` needs to make a source model again."""
    kind = type(model)
    parameter = next(model.parameters(), None)
    dtype = "float32" if parameter is None else str(parameter.dtype).removeprefix("torch.")
    root = kind.__module__.partition(".")[0]
    name = (
        f"transformers.{kind.__name__}"
        if root == "transformers"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    return {"class": name, "dtype": dtype}


def last_finished(folder: str | Path) -> Path | None:
    """Return the newest finished ``checkpoint-N`` in an output folder, None if there is none."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in Path(folder).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / DESCRIPTION).is_file()
    ]
    return max(found)[1] if found else None


def _version(name: str) -> str:
    return version("ti-fx" if name == "ti_fx" else name)
