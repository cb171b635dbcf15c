"""``ti-fx train``, ``export`` and ``check``, from a user's file to a checked ONNX file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from classifier import LABELS, ROWS, Train, ti_fx_command, write_rows
from transformers import AutoTokenizer, BertForSequenceClassification

import ti_fx
from ti_fx import Phase, Recipe
from ti_fx.errors import DataError
from ti_fx.export import Runtime
from ti_fx.ir.facts import facts
from ti_fx.passes import Intervene
from ti_fx.train.data import read_texts

NAMES = dict(enumerate(LABELS))


def test_a_run_leaves_checkpoint_recipe_and_results(checkpoint: Path, rows_file: Path) -> None:
    assert Recipe.load(checkpoint / "recipe.json").steps == 4
    results = json.loads((checkpoint / "results.json").read_text(encoding="utf-8"))
    assert (results["recipe"], results["steps"], results["training_rows"]) == ("ternarybert", 4, 16)
    data = read_texts(rows_file, NAMES)
    student = ti_fx.load(checkpoint)
    inputs = AutoTokenizer.from_pretrained(checkpoint)(list(data.texts), padding=True, return_tensors="pt")
    predicted = student(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits.argmax(-1)
    assert results["accuracy"] == (predicted == torch.tensor(data.labels)).float().mean().item()
    # The latent weights load as the model they were.
    BertForSequenceClassification.from_pretrained(checkpoint)


@pytest.mark.slow
def test_losses_by_name_and_scores_are_printed(tmp_path: Path, train_command: Train, rows_file: Path) -> None:
    recipe = tmp_path / "short.yaml"
    phases = (Phase("map", Intervene("map"), 2), Phase("quantise", restart=True))
    Recipe("short", schedule=phases, steps=5).save(recipe)
    ran = train_command(tmp_path / "run", "--recipe", recipe, "--steps", 4, "--eval", rows_file)
    assert (ran.code, ran.err) == (0, "")
    assert "16 training rows, 4 steps" in ran.out
    assert "map: loss " in ran.out
    assert "quantise: loss " in ran.out
    assert "(logits " in ran.out
    assert "student on 16 rows: accuracy " in ran.out


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, checkpoint: Path, train_command: Train, rows_file: Path
) -> None:
    out = tmp_path / "run"
    # The checkpoint after 3 of 4 steps is what a run killed in the last step leaves.
    out.mkdir()
    os.symlink(checkpoint / "checkpoint-3", out / "checkpoint-3")
    ran = train_command(out, "--resume", "--eval", rows_file)
    assert (ran.code, ran.err) == (0, "")
    left, right = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (out, checkpoint))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, checkpoint: Path, train_command: Train) -> None:
    out = tmp_path / "run"
    shutil.copytree(checkpoint, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    ran = train_command(out, "--resume")
    assert (ran.code, ran.err) == (0, "")
    assert f"the run in {out} is finished, 4 of 4 steps: nothing was changed" in ran.out
    ran = train_command(out, "--resume", "--steps", 8)
    assert ran.code == 2
    assert "of other options: steps was 4 and is 8; resume with that recipe" in ran.err
    assert ran.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_exported_file_answers_as_the_student(checkpoint: Path, onnx_file: Path) -> None:
    assert {path.name for path in onnx_file.parent.iterdir()} >= {"config.json", "tokenizer.json"}
    tokens = torch.randint(4, 1000, (5, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = ti_fx.load(checkpoint)(**inputs).logits
    # Two correct implementations round alike here: the model is small enough that no value lies on a boundary.
    assert np.allclose(Runtime(onnx_file)(inputs)["logits"], expected.detach().numpy(), atol=1e-5)


@pytest.mark.slow
def test_check_accepts_its_own_file_and_refuses_another(
    tmp_path: Path, classifier: Path, checkpoint: Path, onnx_file: Path
) -> None:
    ran = ti_fx_command("check", onnx_file, checkpoint)
    assert (ran.code, ran.err) == (0, "")
    assert "stored tensors are equal byte for byte" in ran.out
    untrained = tmp_path / "untrained.onnx"
    assert ti_fx_command("export", classifier, "--ternarize", "--out", untrained).code == 0
    assert ti_fx_command("check", untrained, classifier, "--ternarize").code == 0
    ran = ti_fx_command("check", untrained, checkpoint)
    assert ran.code == 1
    assert "is not the graph's" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.slow
def test_another_encoding_is_exported_only_on_request(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "student.onnx"
    ran = ti_fx_command("export", checkpoint, "--out", out, "--encoding", "int8-token")
    assert ran.code == 2
    assert "trained with encoding 'int8-tensor'" in ran.err
    assert not out.exists()
    ran = ti_fx_command("export", checkpoint, "--out", out, "--encoding", "int8-token", "--requantize")
    assert ran.code == 0
    assert "requantised after training" in ran.out
    assert ti_fx_command("check", out, checkpoint).code == 0


@pytest.mark.parametrize("command", ["train", "export", "check"])
def test_help_has_an_example(command: str) -> None:
    ran = ti_fx_command(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"ti-fx {command} " in ran.out
    assert "Example" in ran.out


@pytest.mark.slow
def test_the_installed_command_trains(tmp_path: Path, classifier: Path, rows_file: Path) -> None:
    """As a user runs it, with nothing of pytest around: standard error stays empty in a pipe."""
    arguments = [
        "train",
        classifier,
        "--data",
        rows_file,
        "--out",
        tmp_path / "run",
        "--recipe",
        "ternarybert",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "from ti_fx.cli import main; main()", *map(str, arguments), "--steps", "2"],
        env={**os.environ, "PYTHONPATH": str(Path(ti_fx.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "next: ti-fx export" in done.stdout


@pytest.mark.slow  # three encodings are exported and measured
def test_the_encoding_is_measured_before_training(tmp_path: Path, train_command: Train) -> None:
    out = tmp_path / "run"
    ran = train_command(out, "--encoding", "auto")
    assert (ran.code, ran.err) == (0, "")
    assert "a row depends on its batch" in ran.out  # the table of what was measured
    encoding = Recipe.load(out / "recipe.json").activations.encoding
    assert f"{encoding}: " in ran.out
    assert facts(ti_fx.load(out)).encoding == encoding


def test_a_stopped_run_goes_on_with_the_encoding_that_was_chosen(
    tmp_path: Path, train_command: Train
) -> None:
    ran = train_command(tmp_path / "run", "--resume", "--encoding", "auto")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "goes on with the encoding that was chosen" in ran.err


# --- the data file ----------------------------------------------------------------------------------------------------


def test_the_same_rows_in_every_format_are_the_same(tmp_path: Path) -> None:
    rows = [tuple(row.rsplit(",", 1)) for row in ROWS]
    comma = write_rows(tmp_path / "rows.csv", ROWS)
    tab = tmp_path / "rows.tsv"
    # As Excel writes it: a byte order mark, and line ends of two characters.
    tab.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["label\ttext", *(f"{b}\t{a}" for a, b in rows)]).encode())
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n\n".join(json.dumps({"text": a, "label": b, "note": None}) for a, b in rows))
    found = [read_texts(path, NAMES) for path in (comma, tab, lines)]
    assert found[0] == found[1] == found[2]
    assert found[0].labels == (0, 1, 2, 0)
    assert found[0].texts[1] == "who is w2 and w5"


def test_a_label_in_json_may_be_a_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 2}\n')
    assert read_texts(path, NAMES).labels == (2,)


def test_a_name_comes_before_a_number(tmp_path: Path) -> None:
    assert read_texts(write_rows(tmp_path / "a.csv", ("x,1",)), {0: "1", 1: "0"}).labels == (0,)


def test_quoted_text_may_hold_commas_and_lines(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv", ('"one, two\nthree",human',))
    assert read_texts(path, NAMES).texts == ("one, two\nthree",)


def test_json_is_a_list_of_objects_or_one_a_line(tmp_path: Path) -> None:
    rows = [{"text": "one", "label": "human"}, {"text": "two", "label": 2}]
    path = tmp_path / "rows.json"
    for written in (json.dumps(rows), json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        path.write_text(written)
        found = read_texts(path, NAMES)
        assert (found.texts, found.labels) == (("one", "two"), (1, 2))


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,review,stars\n7,good,1\n")
    found = read_texts(path, NAMES, text_column="review", label_column="stars")
    assert (found.texts, found.labels) == (("good",), (1,))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "has 0 rows"),
        ("a.csv", "text,label\n", "has 0 rows"),
        ("a.jsonl", "\n", "has 0 rows"),
        ("a.csv", "text,label\nhi,3\n", "line 2: label 3 is out of range; the model has the ids 0 to 2"),
        ("a.csv", "text,label\nhi,0\nho,-1\n", "line 3: label -1 is out of range"),
        (
            "a.csv",
            "text,label\nhi,humn\n",
            "line 2: label 'humn' is not one of the model's; did you mean 'human'?",
        ),
        ("a.jsonl", '{"text": "a", "label": 1.0}\n', "label 1.0 is not one of the model's"),
        ("a.jsonl", '{"text": "a", "label": true}\n', "label True is not one of the model's"),
        ("a.csv", "text,label\nhi\n", "label None is not one of the model's"),
        ("a.csv", "text,label\n,0\n", "line 2: no text in column 'text'"),
        ("a.jsonl", '{"text": 5, "label": 0}\n', "line 1: no text in column 'text'"),
        ("a.csv", "review,label\nhi,0\n", "has no text column .*--text-column; it has review, label"),
        ("a.csv", "text,rating\nhi,0\n", "has no label column .*--label-column"),
        ("a.jsonl", "{'text': 1}\n", "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 holds a list"),
        (
            "a.json",
            '[{"text": "a", "label": 0}, {"text": "b", "label": 9}]',
            "row 2: label 9 is out of range",
        ),
        (
            "a.json",
            '[{"text": "a", "label": 0}',
            r"is not JSON \(.*; write a list of objects, or one object per line",
        ),
        ("a.json", '["a"]', "holds no list of objects"),
        ("a.json", "[]", "has 0 rows"),
        ("a.txt", "hi", "must end in .csv, .tsv or .jsonl"),
        ("a.csv", "text,label\n\udcff,0\n", "is not UTF-8"),
        ("a.csv", "text,label\n" + "x" * 140_000 + ",0\n", "is not well-formed CSV"),
    ],
)
def test_a_data_file_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=message) as raised:
        read_texts(path, NAMES)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column 'txet'; did you mean 'text'"):
        read_texts(write_rows(tmp_path / "a.csv"), NAMES, text_column="txet")
