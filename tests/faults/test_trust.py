"""Nothing that is loaded runs code, and no path that a file names leads out of its folder."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from models import bert_model, text_example
from places import ROOT
from tiny_training import trainer

import ti_fx
from ti_fx import Pipeline
from ti_fx.errors import TiFxError
from ti_fx.export import Runtime, to_onnx
from ti_fx.export.file.content import open_file
from ti_fx.passes import Pack, Ternarize

# What reads pickles, or runs what a file says.
UNPICKLE = {
    ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("torch", "load"), ("joblib", "load"),
    ("dill", "load"), ("shelve", "open"), ("marshal", "load"), ("marshal", "loads"), ("yaml", "load"),
    ("yaml", "unsafe_load"), ("yaml", "full_load"),
}  # fmt: skip


def sources() -> list[Path]:
    return [
        path for folder in ("ti_fx", "passes", "export") for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def test_no_code_of_the_package_unpickles() -> None:
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Name) and called.id in ("eval", "exec"):
                found.append(f"{path.name}: {called.id}")
            if not isinstance(called, ast.Attribute) or not isinstance(called.value, ast.Name):
                continue
            name = (called.value.id, called.attr)
            safe = any(
                word.arg == "weights_only"
                and isinstance(word.value, ast.Constant)
                and word.value.value is True
                for word in node.keywords
            )
            arrays = name[1] == "load" and name[0] in ("np", "numpy")
            allowed = any(
                word.arg == "allow_pickle"
                and isinstance(word.value, ast.Constant)
                and word.value.value is True
                for word in node.keywords
            )
            if (name in UNPICKLE and not safe) or (arrays and allowed):
                found.append(f"{path.name}: {'.'.join(name)}")
            if any(word.arg == "trust_remote_code" for word in node.keywords):
                found.append(f"{path.name}: trust_remote_code")
    assert found == ["assumptions.py: eval"]  # of numbers alone: every node of the text was looked at before


class Bomb:
    """Says that it was unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_in_a_training_state_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    made = trainer(tmp_path / "run", "ternarybert", model=bert_model(layers=1), arguments_options=options)
    made.train()
    folder = tmp_path / "run" / "checkpoint-1"
    (folder / "digests.json").unlink()  # whoever plants a pickle can plant its digest
    zipped, plain = torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))
    for name, write in (("optimizer.pt", zipped), ("scheduler.pt", plain), ("rng_state.pth", zipped)):
        whole = (folder / name).read_bytes()
        write(Bomb(), folder / name)
        with pytest.raises(TiFxError, match="can't resume from") as caught:
            made.train(resume_from_checkpoint=str(folder))
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(whole)
    torch.save(Bomb(), folder / "training_args.bin")
    ti_fx.load(folder, model=bert_model(layers=1))
    made.train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "went off").exists()
    torch.load(folder / "training_args.bin", weights_only=False)
    assert (tmp_path / "went off").exists()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model and its data file."""
    folder = tmp_path_factory.mktemp("pair")
    gm = ti_fx.capture(bert_model(layers=1), text_example())
    Pipeline(Ternarize(), Pack())(gm)
    to_onnx(gm, folder / "student.onnx", text_example(), external_data=True)
    return folder


@pytest.mark.parametrize(
    "place", ["../other.data", "/etc/hostname", "a/b.data", "..", "C:\\x", "linked.data"]
)
def test_no_tensor_is_read_from_outside_the_folder(pair: Path, tmp_path: Path, place: str) -> None:
    path = tmp_path / "folder" / "student.onnx"
    path.parent.mkdir()
    for part in pair.iterdir():
        shutil.copy(part, path.parent)
    model = onnx.load(str(path), load_external_data=False)
    (data,) = path.parent.glob("*.data")
    outside = tmp_path / "other.data"
    outside.write_bytes(data.read_bytes())
    (path.parent / "linked.data").symlink_to(outside)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    for known in (False, True):
        for item in model.metadata_props:
            if item.key == "ti_fx.data" and known:
                item.value = json.dumps({**json.loads(item.value), "name": place})
        path.write_bytes(model.SerializeToString())
        for read in (open_file, Runtime):
            with pytest.raises(TiFxError) as caught:
                read(path)
            assert "\n" not in str(caught.value)
