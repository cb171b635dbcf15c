"""A user's labelled texts (CSV, TSV, JSON lines) are read, checked and tokenised before anything is trained."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ti_fx.errors import DataError, did_you_mean

TEXT_COLUMNS = ("text", "sentence", "question", "content")
LABEL_COLUMNS = ("label", "labels", "class")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_JSON = ".json"


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their label ids, a row each."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


class TokenisedTexts(Dataset[dict[str, Any]]):
    """Rows of the tokenizer's columns (lists of int, cut but not padded: the collator pads) and ``labels`` (int)."""

    def __init__(self, data: LabelledTexts, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        encoded = tokenizer(list(data.texts), truncation=True, max_length=max_length)
        self.columns: dict[str, list[list[int]]] = dict(encoded)
        self.labels = data.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {name: column[index] for name, column in self.columns.items()}
        return {**row, "labels": self.labels[index]}


def read_texts(
    path: str | Path,
    label_names: Mapping[int, str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
) -> LabelledTexts:
    """Read labelled texts from a ``.csv`` or ``.tsv`` file with a header, a ``.jsonl`` file, or a list in ``.json``.

    Args:
        path: the file, in UTF-8.
        label_names: names by id, as ``model.config.id2label`` has them; a label in the file is a name or an id.
        text_column: None takes the first there is of ``text``, ``sentence``, ``question``, ``content``.
        label_column: None takes the first there is of ``label``, ``labels``, ``class``.

    Raises:
        DataError: the file is missing, empty or damaged, a column is missing, or a row has no text or a label that is
            none of the model's; names the line.
    """
    path = Path(path)
    ids = {name: index for index, name in label_names.items()}
    texts: list[str] = []
    labels: list[int] = []
    chosen: tuple[str, str] | None = None
    for place, row in _rows(path):
        if chosen is None:
            chosen = (
                _column(path, row, text_column, TEXT_COLUMNS, "text"),
                _column(path, row, label_column, LABEL_COLUMNS, "label"),
            )
        text, label = (row.get(name) for name in chosen)
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{path}, {place}: no text in column {chosen[0]!r}; fill it in or leave the row out"
            )
        texts.append(text)
        labels.append(_label(label, ids, f"{path}, {place}"))
    if not texts:
        raise DataError(f"{path} has 0 rows of data; give at least 1")
    return LabelledTexts(tuple(texts), tuple(labels))


def read_plain_texts(path: str | Path, text_column: str | None = None) -> tuple[str, ...]:
    """Read the texts of a file as :func:`read_texts` takes it, without labels.

    Raises:
        DataError: the file is missing, empty or damaged, the column is missing, or a row has no text.
    """
    path = Path(path)
    texts: list[str] = []
    name: str | None = None
    for place, row in _rows(path):
        name = _column(path, row, text_column, TEXT_COLUMNS, "text") if name is None else name
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}, {place}: no text in column {name!r}; fill it in or leave the row out")
        texts.append(text)
    if not texts:
        raise DataError(f"{path} has 0 rows of data; give at least 1")
    return tuple(texts)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place: the line it ends on."""
    suffix = path.suffix.lower()
    if suffix not in (*_DELIMITERS, *_JSON_LINES, _JSON):
        raise DataError(f"data file {path} must end in .csv, .tsv or .jsonl (or .json: a list of objects)")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == _JSON:
                yield from _json_rows(path, file.read())
            elif suffix in _DELIMITERS:
                reader = csv.DictReader(file, delimiter=_DELIMITERS[suffix])
                for row in reader:
                    yield f"line {reader.line_num}", row
            else:
                for line, text in enumerate(file, 1):
                    if text.strip():
                        yield f"line {line}", _json_row(text, f"{path}, line {line}")
    except OSError as error:
        raise DataError(f"can't read data {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path} is not well-formed {suffix[1:].upper()}: {error}") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a list of objects, with their places in it, or of a file with an object a line."""
    try:
        rows = json.loads(text)
    except ValueError as error:
        lines = [(line, one) for line, one in enumerate(text.splitlines(), 1) if one.strip()]
        if len(lines) < 2 or not lines[0][1].strip().startswith("{") or not lines[0][1].strip().endswith("}"):
            raise DataError(
                f"{path} is not JSON ({error}); write a list of objects, or one object per line"
            ) from None
        for line, one in lines:
            yield f"line {line}", _json_row(one, f"{path}, line {line}")
        return
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} holds no list of objects; write one object with a text and a label per row")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _json_row(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where} holds a {type(row).__name__}; write one object with a text and a label per line"
        )
    return row


def _column(path: Path, row: Mapping[str, Any], asked: str | None, known: tuple[str, ...], what: str) -> str:
    columns = [str(name) for name in row if name is not None]
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{path} has no column {asked!r}{did_you_mean(asked, columns)}")
        return asked
    for name in known:
        if name in columns:
            return name
    raise DataError(
        f"{path} has no {what} column (one of {', '.join(known)}); name yours with --{what}-column; "
        f"it has {', '.join(columns)}"
    )


def _label(value: Any, ids: Mapping[str, int], where: str) -> int:
    """Return a label's id; a name comes before a number, for models whose names are digits."""
    written = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if written in ids:
        return ids[written]
    if written.isdecimal() and int(written) in ids.values():
        return int(written)
    if written.lstrip("-").isdecimal():
        raise DataError(
            f"{where}: label {written} is out of range; the model has the ids 0 to {len(ids) - 1}"
        )
    raise DataError(f"{where}: label {value!r} is not one of the model's{did_you_mean(written, ids)}")
