"""``ti-fx inspect``: what it prints, the files it writes, and one line with the right exit code for every mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import huggingface_hub
import onnx
import pytest
from models import Tiny, bert_model, gpt2_model, vit_model

import ti_fx
from ti_fx.cli import _loading
from ti_fx.zoo import build

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch, bert_layer: Tiny) -> str:
    """The name of a model that is captured already: for tests of what comes after loading."""
    monkeypatch.setattr(
        _loading, "load_graph", lambda source, meta: _loading.Loaded(source, bert_layer.fork())
    )
    return "captured"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as from_pretrained takes it."""
    path = tmp_path_factory.mktemp("models") / "bert"
    bert_model(layers=1).save_pretrained(path)
    return path


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, f"ti_fx {ti_fx.__version__}\n", "")


def test_help_names_every_command_and_option(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "inspect" in out
    assert "Exit codes: 0 done, 1 a check failed, 2 bad input" in out
    code, out, _ = run("inspect", "--help")
    assert code == 0
    for option in ("--recipe", "--diff", "--dump", "--ask", "--svg", "--html", "--graph", "--json", "--meta"):
        assert option in out
    assert "Examples" in out


def test_a_folder_is_described(run: Run, folder: Path) -> None:
    code, out, err = run("inspect", folder)
    assert (code, err) == (0, "")
    assert "input_ids: [batch, sequence]" in out
    assert "Attention blocks: 1 (1 self)" in out
    assert "Feed-forward blocks: 1" in out
    assert (
        "Stack 0, layer 0\n  self-attention\n    query   bert.encoder.layer.*.attention.self.query.weight"
        in out
    )
    assert "    up      bert.encoder.layer.*.intermediate.dense.weight" in out
    assert (
        "Activations: 5 values would be quantised (int8-tensor), those that 7 ternary projections read" in out
    )
    assert "Ternary, a scale per row: word embedding" in out
    assert "Kept: head: no parametric operation follows it" in out
    assert "times smaller" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) < 120


def test_json_says_it_all(run: Run, captured: str) -> None:
    code, out, err = run("inspect", captured, "--recipe", "ti-g", "--ask", "trained", "--dump", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["inputs"] == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert [site["kind"] for site in facts["attention"]] == ["self"]
    assert facts["stacks"] == [{"stack": 0, "layers": 1, "attention": 1, "feed_forward": 1}]
    (block,) = facts["feed_forward"]
    assert block["gate"] is None
    assert block["weights"]["down"] == "bert.encoder.layer.0.output.dense.weight"
    assert facts["attention"][0]["weights"]["key"] == "bert.encoder.layer.0.attention.self.key.weight"
    assert facts["activations"]["encoding"] == "int8-tensor"
    assert "bert.encoder.layer.0.output.dense.weight" in facts["activations"]["projections"]
    assert facts["bytes_after"] < facts["bytes_before"]
    names = [step["name"] for step in facts["passes"]]
    assert names[-1] == "intervene{at=output}"
    assert "duplicate-teacher" in names
    assert "classifier.weight" in facts["answer"]["trained"]
    assert "return {loss:" in facts["dump"]


def test_a_diff_names_what_ran_before_it(run: Run, captured: str) -> None:
    code, out, _ = run("inspect", captured, "--diff", "intervene{at=map}", "--diff", "intervene{at=output}")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "first ran: duplicate-teacher"
    assert lines[1].startswith("intervene{at=map}: 1 added")
    assert any(line.startswith("intervene{at=output}: ") for line in lines)
    assert any(line.startswith("+%") and line.endswith("tap of map") for line in lines)


def test_every_pass_can_be_asked_for_alone(run: Run, captured: str) -> None:
    passes = ["ternarize{weights=row}", "quantize-activations", "distill", "strip", "pack"]
    for written in passes:
        code, out, err = run("inspect", captured, "--diff", written)
        assert (code, err) == (0, ""), written
        assert "@@" in out


def test_files_are_written(run: Run, captured: str, tmp_path: Path) -> None:
    svg, html, graph = (tmp_path / name for name in ("a.svg", "a.html", "a.graphml"))
    code, out, _ = run(
        "inspect", captured, "--diff", "ternarize", "--svg", svg, "--html", html, "--graph", graph
    )
    assert code == 0
    assert out.splitlines()[-3:] == [f"wrote {path}" for path in (svg, html, graph)]
    assert "after ternarize" in ElementTree.parse(svg).getroot().attrib["aria-label"]
    assert "<h1>" in html.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_factory_and_a_folder_without_weights(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_here.py").write_text(
        "from models import PlainTransformer, text_example\n\ndef make():\n"
        "    example = text_example()\n"
        "    return PlainTransformer(), {'tokens': example['input_ids'], 'keep': example['attention_mask']}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, _ = run("inspect", "made_here:make")
    assert code == 0
    assert "PlainTransformer from made_here:make" in out
    assert "Attention blocks: 2" in out
    code, by_path, _ = run("inspect", tmp_path / "made_here.py:make")
    assert code == 0
    assert by_path.splitlines()[1:] == out.splitlines()[1:]
    vit_model().config.save_pretrained(tmp_path / "vit")
    config = json.loads((tmp_path / "vit/config.json").read_text())
    config["architectures"] = ["ViTForImageClassification"]
    (tmp_path / "vit/config.json").write_text(json.dumps(config))
    code, out, _ = run("inspect", tmp_path / "vit")
    assert code == 0
    assert "no weights in the folder: made without values" in out
    assert "pixel_values: [batch, 3" in out


@pytest.mark.slow
def test_without_values_the_same_is_said(run: Run, folder: Path) -> None:
    code, out, err = run("inspect", folder, "--meta")
    assert (code, err) == (0, "")
    assert "(made without values)" in out.splitlines()[0]
    remark, said = (
        "  not compared with the model in eval mode: it does not run without values",
        out.splitlines()[1:],
    )
    assert [line.startswith(remark) for line in said].count(True) == 1
    with_values = run("inspect", folder)[1].splitlines()[1:]
    assert [line for line in said if not line.startswith(remark)] == with_values


@pytest.mark.slow
def test_a_model_that_hears(run: Run, tmp_path: Path) -> None:
    build("wav2vec2").model.save_pretrained(tmp_path / "speech")  # type: ignore[operator]
    code, out, err = run("inspect", tmp_path / "speech")
    assert (code, err) == (0, "")
    assert "input_values: [batch, " in out
    assert "Attention blocks: 2 (2 self)" in out
    assert "Kept: a weight is computed from it (weight norm)" in out
    assert "Kept: convolution, not a linear projection" in out


@pytest.mark.slow
def test_a_name_on_the_hub(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--some--bert"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, out, err = run("inspect", "some/bert")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "BertForSequenceClassification some/bert from the hub"
    assert out.splitlines()[1:] == run("inspect", folder)[1].splitlines()[1:]
    shutil.copytree(cached, tmp_path / "models--tiny-bert")  # a name without an organisation
    assert (
        run("inspect", "tiny-bert")[1].splitlines()[0]
        == "BertForSequenceClassification tiny-bert from the hub"
    )
    assert_one_line(
        run("inspect", "gpt2"), "there is no file or folder gpt2; give a Hugging Face model folder"
    )
    assert_one_line(run("inspect", "gpt2"), "offline mode is enabled")
    assert_one_line(
        run("inspect", "some/gpt2"), "there is no folder some/gpt2, the cache of the hub has no such"
    )
    assert_one_line(run("inspect", "some/gpt2"), "offline mode is enabled")


@pytest.mark.slow
def test_layers_that_are_alike_are_one(run: Run, tmp_path: Path) -> None:
    gpt2_model().save_pretrained(tmp_path / "gpt2")
    code, out, _ = run("inspect", tmp_path / "gpt2")
    assert code == 0
    assert "Stack 0, layers 0 to 1\n  self-attention (one projection makes query, key and value)" in out
    assert out.count("c_attn.weight") == 2
    assert "Ternary, a scale per row: word embedding, tied to a projection" in out


def test_an_onnx_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4, 4], [0.0] * 16)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [result], [weight]))
    onnx.helper.set_model_props(model, {"author": "someone"})
    onnx.save(model, path)
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "float[batch, 4]" in out
    assert "author  someone" in out
    code, out, _ = run("inspect", path, "--json")
    assert json.loads(out)["stored_bytes"] == {"FLOAT": 64}
    path.write_bytes(path.read_bytes()[:40])
    code, out, err = run("inspect", path)
    assert (code, out) == (2, "")
    assert "was cut short" in err


def broken_models(folder: Path, tmp_path: Path) -> list[tuple[list[object], str]]:
    """Return each thing that is no usable model, and what its one line says."""
    empty, broken, cut = (tmp_path / name for name in ("empty", "broken", "cut"))
    empty.mkdir()
    broken.mkdir()
    (broken / "config.json").write_text("{")
    shutil.copytree(folder, cut)
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    (tmp_path / "wrong.py").write_text(
        "import torch\n"
        "def mlp(): return torch.nn.Linear(2, 2), (torch.ones(2, 2),)\n"
        "def bad(): raise ValueError('no')\n"
    )
    (tmp_path / "broken.py").write_text("nothing")
    (tmp_path / "file.txt").write_text("old")
    return [
        (["bogus"], "No such command 'bogus'"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "nowhere", "--nonsense"], "No such option"),
        (["inspect", "nowhere"], "there is no file or folder nowhere; give a Hugging Face model folder"),
        (["inspect", "file.txt"], "is a file that is no .onnx"),
        (["inspect", "nowhere.onnx"], "nowhere.onnx: No such file or directory"),
        (["inspect", empty], "has no config.json"),
        (["inspect", broken], "is not JSON"),
        (["inspect", cut], "can't be loaded as BertForSequenceClassification"),
        (["inspect", "nowhere_at_all:make"], "can't import 'nowhere_at_all'"),
        (["inspect", "wrong:mlq"], "has no function 'mlq'; did you mean 'mlp'?"),
        (["inspect", "wrong:bad"], "raised ValueError: no"),
        (["inspect", "nowhere.py:make"], "there is no file nowhere.py"),
        (["inspect", "broken.py:make"], "importing broken.py raised NameError"),
        (["inspect", "wrong:mlp"], "has no attention block"),
    ]


WRONG_OPTIONS: list[tuple[list[str], str]] = [
    (["--diff", "ternarise"], "no pass is called 'ternarise'; did you mean 'ternarize'"),
    (["--diff", "ternarize{skip=x.*}"], "skip='x.*' matches no weight"),
    (["--recipe", "tig"], "no recipe is called 'tig'; did you mean 'ti-g'"),
    (["--svg", "a.svg", "--layer", "7"], "no layer 7 in stack 0"),
    (["--graph", "file.txt"], "end the name in .graphml, .dot, .json"),
    (["--html", "file.txt/x.html"], "can't write"),
    (["--ask", "trained"], "nothing is trained; run duplicate-teacher"),
]


def assert_one_line(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("ti-fx: ")
    assert err.count("\n") == 1, err
    assert message in err


def test_what_is_no_model_is_one_line_and_exit_code_2(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in broken_models(folder, tmp_path):
        assert_one_line(run(*arguments), message)


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS, ids=lambda value: str(value)[:30])
def test_a_wrong_option_is_one_line_and_exit_code_2(
    run: Run, captured: str, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("old")
    assert_one_line(run("inspect", captured, *options), message)
    assert Path("file.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.slow
def test_the_installed_command_stops_quietly_when_its_reader_goes(folder: Path) -> None:
    command = [str(Path(sys.executable).with_name("ti-fx")), "inspect", str(folder), "--dump"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        assert shown.stdout.readline().startswith(b"%input_ids = input")
        shown.stdout.close()
        assert shown.stderr.read() == b""
