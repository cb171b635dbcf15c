"""A trained language model is exported with its cache, of the class that the checkpoint says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifier import ti_fx_command
from models import llama_model, t5_model
from tiny_training import PLAIN, rows, trainer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ti_fx.export import Runtime
from ti_fx.train.checkpoint import source_model


def test_a_checkpoint_says_the_class_that_its_configuration_leaves_out(tmp_path: Path) -> None:
    llama_model(num_hidden_layers=1).config.save_pretrained(tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path).architectures is None
    found = source_model(tmp_path, {"source": {"class": "transformers.LlamaForCausalLM", "dtype": "float32"}})
    assert isinstance(found, LlamaForCausalLM)


def _with_decoder(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "decoder_input_ids": row["input_ids"]}


@pytest.mark.slow  # each is captured six times
@pytest.mark.parametrize(
    ("make", "files"),
    [(llama_model, ["student.onnx"]), (t5_model, ["student-decoder.onnx", "student-encoder.onnx"])],
)
def test_a_trained_model_is_exported_with_its_cache(
    make: Callable[..., nn.Module], files: list[str], tmp_path: Path
) -> None:
    is_causal = make is llama_model
    model = make(num_hidden_layers=1) if is_causal else make(num_layers=1)
    data = [row if is_causal else _with_decoder(row) for row in rows(8, labels=False)]
    made = trainer(
        tmp_path / "run",
        PLAIN,
        model=model,
        arguments_options={"max_steps": 1},
        train_dataset=data,
        eval_dataset=data,
    )
    made.train()
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "file" / "student.onnx"
    made.save_model(str(checkpoint))
    ran = ti_fx_command("export", checkpoint, "--cache", "--out", out)
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in out.parent.glob("*.onnx")) == files
    for name in files:
        assert ti_fx_command("check", out.with_name(name), checkpoint).code == 0
    assert "logits" in Runtime(out.with_name(files[0])).outputs
