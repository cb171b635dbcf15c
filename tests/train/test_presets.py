"""Every preset trains an encoder, a decoder and a vision transformer, and its student is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tiny, bert_model, llama_model, vit_model
from tiny_training import arguments, different, history, rows, weights
from torch import nn

import ti_fx
from ti_fx import Recipe
from ti_fx.export import Runtime, to_onnx
from ti_fx.numerics.losses import kl_divergence, token_scaled_cross_entropy
from ti_fx.passes import Pack
from ti_fx.recipe import PRESETS
from ti_fx.train import TernaryTrainer, trainers


def _texts() -> Any:
    return rows(16)


def _unlabelled() -> Any:
    return rows(16, labels=False)


def _images() -> Any:
    generator = torch.Generator().manual_seed(5)
    return [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % 3}
        for index in range(16)
    ]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "encoder": (bert_model, _texts),
    "decoder": (llama_model, _unlabelled),
    "vision": (vit_model, _images),
}


def run(name: str, kind: str, folder: Path) -> TernaryTrainer:
    """Train a tiny model by a preset for 8 steps, with a check that weights moved; its interventions fit into 6."""
    make, data = MODELS[kind]
    preset = PRESETS[name]
    recipe = Recipe.preset(name, intervention_steps=None if preset.length is None else 6)
    taken, last = 0, None
    stages = trainers(
        make(), recipe, arguments(folder), train_dataset=data(), eval_dataset=None, compile="off"
    )
    for made, _ in stages:
        before = weights(made)
        made.train()
        taken += len(history(made))
        assert different(weights(made), before)
        last = made
    assert taken == 8
    assert last is not None
    return last


def export(made: TernaryTrainer, folder: Path) -> None:
    """Save the checkpoint, load it, and write the student's file, which is compared with the graph."""
    made.save_model(str(folder / "checkpoint"))
    student = ti_fx.load(folder / "checkpoint")
    Pack()(student)
    assert to_onnx(student, folder / "student.onnx", made.example).bytes > 0
    Runtime(folder / "student.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_its_student_is_exported(name: str, kind: str, tmp_path: Path) -> None:
    export(run(name, kind, tmp_path), tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("phase-in", "vision")])
def test_a_preset_runs(name: str, kind: str, tmp_path: Path) -> None:
    made = run(name, kind, tmp_path)
    assert made.student().graph.find_nodes(op="call_function", target=ti_fx.numerics.ternary)


def test_tsld_scales_tokens_where_there_are_some_and_says_where_not(gpt2: Tiny, bert: Tiny) -> None:
    tsld = Recipe.preset("tsld")
    for tiny, target, said in (
        (gpt2, token_scaled_cross_entropy, ""),
        (bert, kl_divergence, "is compared by kl, as it has no logits for each of a decoder's tokens"),
    ):
        gm = tiny.fork()
        report = tsld.prepare(gm)
        (part,) = [node for node in gm.graph.nodes if node.name == "loss_logits_0"]
        assert part.target is target
        (explained,) = [row.explanation for row in report.passes if row.name.startswith("distill")]
        assert said in explained
        assert bool(said) == bool(explained)
