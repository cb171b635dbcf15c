"""What the command-line tests share: a tiny text classifier in a folder, its data, its checkpoint and its ONNX file."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from models import VOCABULARY, bert_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ti_fx import cli

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LABELS = ("number", "human", "place")
ROWS = ("how many w1,number", "who is w2 and w5,human", "where is w3,2", "how much,0")


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


def ti_fx_command(*arguments: object) -> Ran:
    """Run ``ti-fx`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["ti-fx", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.main()
    code = stopped.value.code or 0
    assert isinstance(code, int)
    return Ran(code, out.getvalue(), err.getvalue())


def write_rows(path: Path, rows: tuple[str, ...] = ROWS * 4) -> Path:
    """Write a CSV file with a text and a label column."""
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: [CLS] text [SEP]; words it has not seen are [UNK]."""
    known = [*SPECIAL, "how", "many", "much", "who", "where", "is", "and"]
    words = known + [f"w{index}" for index in range(VOCABULARY - len(known))]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny classifier of three named labels, with its tokenizer. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    names = dict(enumerate(LABELS))
    model = bert_model(layers=1, id2label=names, label2id={name: index for index, name in names.items()})
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 rows of data for it."""
    return write_rows(tmp_path_factory.mktemp("data") / "train.csv")


Train = Callable[..., Ran]


@pytest.fixture(scope="session")
def train_command(classifier: Path, rows_file: Path) -> Train:
    """Train the classifier into a folder for 4 steps, with more options at will."""

    def run(out: Path, *options: object) -> Ran:
        settings = ("--recipe", "ternarybert", "--steps", 4, "--batch-size", 4, "--compile", "off")
        return ti_fx_command("train", classifier, "--data", rows_file, "--out", out, *settings, *options)

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, train_command: Train, rows_file: Path) -> Path:
    """A finished run. Tests copy it before they damage it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    ran = train_command(out, "--eval", rows_file)
    assert ran.code == 0, ran.err
    return out


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The run's student as ONNX. Tests copy it before they damage it."""
    path = tmp_path_factory.mktemp("exported") / "student.onnx"
    ran = ti_fx_command("export", checkpoint, "--out", path)
    assert ran.code == 0, ran.err
    return path
