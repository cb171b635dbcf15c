"""The inference benchmark's own parts: what is kept and when it is stale, limits, feeds, counts and refusals."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import contenders
import inference
import numpy as np
import onnx
import pytest
import torch
from contenders import Builder, streamed_bytes
from kept import Store
from measure import distance, interleaved
from onnx import TensorProto, helper
from results import Finding, Timing, limits, plot
from rich.console import Console
from subjects import QUICK, SUBJECTS
from transformers import GPT2Config, GPT2LMHeadModel

from ti_fx.errors import InputError

pytestmark = pytest.mark.seconds


def timing(label: str, over_fp32: float, over_int8: float = 1.0, threads: int = 1, batch: int = 1) -> Timing:
    return Timing(threads, batch, 128, label, 0.01, over_fp32, over_int8, 0.1, 0.5, 1e10, 1e11)


def finding(label: str, megabytes: float, memory: float | None = None, bits: float | None = None) -> Finding:
    steady = None if memory is None else memory * 1e6
    return Finding(label, int(megabytes * 1e6), None, 0.0, 0.1, steady, steady, bits)


# ---- what is kept


def build(store: Store, key: dict[str, str], text: str = "content") -> list[Path]:
    """Get the entry ``fp32``; return the folders in which it was built just now."""
    built = []

    def write(folder: Path) -> dict[str, Any]:
        built.append(folder)
        (folder / "file").write_text(text)
        return {"text": text}

    entry = store.get("fp32", key, write)
    assert entry.facts == {"text": (entry.folder / "file").read_text()}
    return built


def test_what_is_kept_is_reused_under_the_same_key_alone(tmp_path: Path) -> None:
    said = io.StringIO()
    store = Store(tmp_path / "kept", Console(file=said))
    assert build(store, {"torch": "1"})
    assert not build(store, {"torch": "1"})
    assert build(store, {"torch": "2"}, "another")
    assert (tmp_path / "kept/fp32/file").read_text() == "another"
    (tmp_path / "kept/fp32/file").write_text("cut")
    assert build(store, {"torch": "2"})
    (tmp_path / "kept/fp32/built.json").write_text("{")
    assert build(store, {"torch": "2"})
    for words in ("not built yet", "reused from", "another torch", "files were changed", "can't be read"):
        assert words in said.getvalue()


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    store = Store(tmp_path, Console(quiet=True))
    build(store, {"torch": "1"})

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.get("fp32", {"torch": "2"}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["fp32"]
    assert not build(store, {"torch": "1"})


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't keep files in"):
        Store(tmp_path / "file" / "kept", Console(quiet=True))


# ---- limits


BERT_TIMES = [timing("int8-tensor", 4.0, 0.9, batch=batch) for batch in (1, 8)]
BERT_FOUND = [
    finding("ORT int8 products", 190),
    finding("int8-tensor", 28.4, 140, 2.0),
    finding("nbits2", 28.4, 100, 2.0),
    finding("base3", 22.9, 140, 1.6),
]


def unmet(model: str, timings: list[Timing], findings: list[Finding]) -> list[str]:
    return [one.what for one in limits(model, timings, findings) if one.met is False]


def test_limits_that_hold_are_met() -> None:
    assert all(one.met for one in limits("bert-base", BERT_TIMES, BERT_FOUND))
    assert len(limits("bert-base", BERT_TIMES, BERT_FOUND)) == 9
    decode = [timing("nbits2", 5.1)]
    assert all(
        one.met for one in limits("gpt2", decode, [finding("fp32", 498, 800), finding("nbits2", 35, 99)])
    )
    fast = [timing("int8-tensor", 3.0, threads=count, batch=batch) for count in (1, 2) for batch in (1, 8)]
    assert all(one.met for one in limits("minilm", fast, [finding("int8-tensor", 6.8, 30, 2.0)]))


@pytest.mark.parametrize(
    ("index", "changed", "expected"),
    [
        (0, finding("ORT int8 products", 180), ["int8-tensor: times smaller than ORT int8 products"]),
        (1, finding("int8-tensor", 28.6, 140), ["int8-tensor: MB on disk"]),
        (1, finding("int8-tensor", 28.4, 151), ["int8-tensor: MB of RAM"]),
        (2, finding("nbits2", 28.4, 121), ["nbits2: MB of RAM"]),
        (3, finding("base3", 23.1, 140), ["base3: MB on disk"]),
    ],
)
def test_a_limit_of_bert_base_that_does_not_hold_is_named(
    index: int, changed: Finding, expected: list[str]
) -> None:
    found = [changed if place == index else one for place, one in enumerate(BERT_FOUND)]
    assert unmet("bert-base", BERT_TIMES, found) == expected


def test_speeds_and_shares_below_their_limits_are_named() -> None:
    slow = [BERT_TIMES[0], timing("int8-tensor", 3.4, 0.84, batch=8)]
    assert unmet("bert-base", slow, BERT_FOUND) == [
        "int8-tensor over fp32, threads 1, batch 8",
        "int8-tensor over ORT int8, threads 1, batch 8",
    ]
    found = [finding("fp32", 498, 800), finding("nbits2", 35, 101)]
    assert unmet("gpt2", [timing("nbits2", 4.9)], found) == [
        "nbits2 over fp32, threads 1, batch 1, one token after 128",
        "nbits2: share of fp32's RAM",
    ]
    assert unmet("minilm", [timing("int8-tensor", 2.4)], [finding("base3", 7.1, 30, 2.1)]) == [
        "int8-tensor over fp32, threads 1, batch 1",
        "base3: MB on disk",
        "base3: bits per ternary weight",
    ]


def test_what_a_run_left_out_is_not_taken_for_met() -> None:
    for model in SUBJECTS:
        assert [one.met for one in limits(model, [], [])] == [None] * len(limits(model, [], []))
        assert limits(model, [], [])


# ---- what is measured


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("measure.SECONDS", 0.0)
    turns: list[str] = []
    found = interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=7)
    assert found.keys() == {"a", "b"}
    assert turns == ["a"] * 4 + ["b"] * 4 + ["a", "b"] * 7


def test_the_distance_is_relative() -> None:
    assert distance(np.array([3.0, 0.0]), np.array([0.0, 4.0])) == pytest.approx(1.25)


def test_a_decoder_with_its_cache_computes_what_the_model_does_without() -> None:
    subject = QUICK["gpt2"]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=2000))
    model.eval()  # type: ignore[no-untyped-call]
    tokens = {name: torch.from_numpy(value) for name, value in subject.error_feed().items()}
    with torch.no_grad():
        expected = model(tokens["input_ids"]).logits
        logits, *present = subject.runnable(model)(*tokens.values())
        past = [value[:, :, :-1] for value in present]
        last = subject.runnable(model)(
            tokens["input_ids"][:, -1:], tokens["attention_mask"], tokens["position_ids"][:, -1:], *past
        )[0]
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(last, expected[:, -1:])


@pytest.mark.parametrize(("name", "prefill"), [("bert-base", False), ("gpt2", False), ("gpt2", True)])
def test_operations_are_those_of_the_products(name: str, prefill: bool) -> None:
    subject = QUICK[name]
    width, inner, layers, tokens = 64, 128 if name == "bert-base" else 256, 2, 16
    decodes = name == "gpt2" and not prefill
    read, written = (tokens + 1, 1) if decodes else (tokens, tokens)
    layer = written * (4 * width * width + 2 * width * inner) + 2 * written * read * width
    head = width * width + 2 * width if name == "bert-base" else written * 2000 * width
    one, three = (subject.operations(subject.feed(rows, tokens, prefill)) for rows in (1, 3))
    assert one == 2 * (layers * layer + head)
    assert three == 3 * one


def test_a_table_that_rows_are_taken_from_is_not_read_whole(tmp_path: Path) -> None:
    tensors = {
        name: helper.make_tensor(
            name, TensorProto.FLOAT, shape, np.zeros(shape, np.float32).tobytes(), raw=True
        )
        for name, shape in (("table", (100, 8)), ("weight", (8, 4)), ("tied", (50, 8)))
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Gather", ["tied", "ids"], ["others"]),
        helper.make_node("MatMul", ["rows", "weight"], ["product"]),
        helper.make_node("Add", ["tied", "tied"], ["sum"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [2])
    out = helper.make_tensor_value_info("product", TensorProto.FLOAT, [2, 4])
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [ids], [out], [*tensors.values()])), tmp_path / "m"
    )
    assert streamed_bytes(tmp_path / "m") == tensors["weight"].ByteSize() + tensors["tied"].ByteSize()


# ---- what is left out or refused


def test_without_openvino_its_columns_are_left_out_and_the_extra_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "find_spec", lambda name: None if name == "nncf" else find_spec("onnx"))
    builder = Builder(QUICK["minilm"], Store(tmp_path, Console(quiet=True)))
    assert builder.openvino() == []
    assert builder.left_out.keys() == {"OpenVINO int8", "OpenVINO int4"}
    assert builder.left_out["OpenVINO int4"].startswith("nncf can't be imported")
    assert "ti_fx[benchmark]" in builder.left_out["OpenVINO int4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "6"], "a median needs at least 7"),
        (["--full", "--batch", "1"], "leave out --batch and --sequence"),
        (["--plot", "picture.txt"], "must end with one of .svg"),
        (["--threads", "0"], "invalid positive value"),
        (["--encoding", "int7"], "invalid choice"),
        (["--prefill"], "is for a decoder, and minilm is none"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        inference.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert inference.main(["--quick", "--plot", str(tmp_path / "plot.svg")]) == 2
    assert "ti_fx[benchmark]" in capsys.readouterr().out


def test_the_plot_shows_each_contender_of_the_first_size(tmp_path: Path) -> None:
    timings = [timing("fp32", 1.0), timing("nbits2", 2.0), timing("base3", 2.0, batch=8)]
    findings = [finding("fp32", 90), finding("nbits2", 7, bits=2.0), finding("base3", 6, bits=1.6)]
    plot(tmp_path / "plot.svg", "a title", timings, findings)
    drawn = (tmp_path / "plot.svg").read_text()
    assert "<!-- fp32 -->" in drawn
    assert "<!-- nbits2 -->" in drawn
    assert "<!-- base3 -->" not in drawn


@pytest.mark.slow
def test_a_quick_run_measures_everything(tmp_path: Path) -> None:
    script = Path(inference.__file__)
    for model in ("bert-base", "gpt2"):
        path = tmp_path / f"{model}.json"
        command = [sys.executable, str(script), "--quick", "--model", model, "--rounds", "7"]
        command += ["--threads", "1", "--batch", "1", "--encoding", "nbits2", "--json", str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        found = json.loads(path.read_text())
        labels = [one["label"] for one in found["contenders"]]
        assert [labels[0], labels[-1]] == ["fp32", "nbits2"]
        assert "ORT int8" in labels
        assert [one["label"] for one in found["timings"]] == labels
        assert found["contenders"][-1]["error_graph"] < 0.05
        assert all(one["steady"] > 0 and one["peak"] >= one["steady"] for one in found["contenders"])
        assert found["limits"] == []
