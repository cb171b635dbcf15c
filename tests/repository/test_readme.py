"""The README's code runs as printed, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

pytestmark = pytest.mark.seconds

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_code_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "any", "text", "and", "another", "one"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    folder = tmp_path / "model"
    kind: Any = BertTokenizer  # untyped in transformers
    tokenizer = kind(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 1100,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 3,
    }
    config = BertConfig(**sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    rows = [{**tokenizer("any text and another one"), "labels": index % 3} for index in range(8)]
    names: dict[str, Any] = {"folder": folder, "train_dataset": rows, "eval_dataset": rows}
    monkeypatch.chdir(tmp_path)
    quick = code.replace("max_steps=600", "max_steps=62, per_device_train_batch_size=2, report_to='none'")
    assert quick != code
    exec(compile(quick, "README.md", "exec"), names)
    assert (tmp_path / "student.onnx").stat().st_size < 100_000
