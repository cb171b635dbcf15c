"""What a command prints of a report is all of it, and never the word None."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from classifier import ti_fx_command
from models import bert_model

FIXED = """
import torch
from torch import nn

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, values):
        return {"logits": self.head(self.first(values).reshape(2, 8))}

def make():
    return Fixed(), {"values": torch.randn(2, 8)}
"""


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without weights."""
    folder = tmp_path_factory.mktemp("configuration")
    config = bert_model(layers=1).config
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_check_says_what_was_not_compared(tmp_path: Path) -> None:
    bert_model(1).save_pretrained(tmp_path / "bert")
    out = tmp_path / "student.onnx"
    ran = ti_fx_command("export", tmp_path / "bert", "--out", out, "--ternarize")
    assert ran.code == 0, ran.err
    ran = ti_fx_command("check", out, tmp_path / "bert", "--ternarize")
    assert ran.out.startswith(f"{out}: ONNX Runtime against PyTorch\n  output")
    assert "nodes were compared one by one" in ran.out
    assert "None" not in ran.out
    ran = ti_fx_command("check", out, tmp_path / "bert", "--ternarize", "--ram-megabytes", "0.001")
    assert (ran.code, ran.err) == (0, "")
    title, allowed, tensors, skipped = ran.out.splitlines()
    assert title == f"{out}: ONNX Runtime against PyTorch"
    assert allowed == "allowed: stored tensors alone were compared"
    assert tensors.endswith(" stored tensors are equal byte for byte")
    assert skipped.startswith("not compared at any size: the weights take about 0 MB in ONNX Runtime, and ")


def test_what_a_file_does_not_say_is_left_out(tmp_path: Path, onnx_file: Path) -> None:
    model = onnx.load(onnx_file)
    kept = [
        entry
        for entry in model.metadata_props
        if entry.key in ("ti_fx.encoding", "ti_fx.tensors", "ti_fx.recipe")
    ]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.producer_name = model.producer_version = ""
    onnx.save(model, tmp_path / "bare.onnx")
    ran = ti_fx_command("inspect", tmp_path / "bare.onnx")
    assert (ran.code, ran.err) == (0, "")
    assert "a ternary student of an unknown model\n" in ran.out
    assert "recipe ternarybert" in ran.out
    assert "None" not in ran.out
    assert "needs ONNX Runtime" not in ran.out


def test_inspect_says_what_capture_found(tmp_path: Path) -> None:
    (tmp_path / "fixed.py").write_text(FIXED)
    source = f"{tmp_path / 'fixed.py'}:make"
    ran = ti_fx_command("inspect", source, "--dump", "--json")
    assert ran.code == 0, ran.err
    remarks = json.loads(ran.out)["remarks"]
    assert remarks[0].startswith("values.0 is static: ")


def test_inspect_names_every_encoding(tmp_path: Path, configuration: Path) -> None:
    recipe = {"name": "mixed", "activations": {"encodings": {"*.output.dense": "nbits2-32"}}}
    (tmp_path / "mixed.json").write_text(json.dumps(recipe))
    ran = ti_fx_command("inspect", configuration, "--recipe", tmp_path / "mixed.json")
    assert ran.code == 0, ran.err
    assert "would be quantised (int8-tensor, *.output.dense=nbits2-32), those that" in ran.out


@pytest.mark.slow
def test_made_up_weights_are_said(tmp_path: Path, configuration: Path) -> None:
    made_up = "no weights in the folder: random ones were made from its config"
    out = tmp_path / "student.onnx"
    ran = ti_fx_command("export", configuration, "--out", out, "--ternarize")
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"BertForSequenceClassification in {configuration}: {made_up}\n")
    sizes = ("--batch", 1, "--length", 4, "--rounds", 1)
    ran = ti_fx_command("bench", out, "--against", configuration, *sizes, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["remarks"][0].endswith(made_up)
    ran = ti_fx_command("choose", configuration, *sizes, "--encoding", "float")
    assert ran.code == 0, ran.err
    assert f"({made_up})" in ran.out.splitlines()[0]
