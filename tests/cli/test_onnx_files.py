"""The command line on exported files: what it shows of them, encodings by weight, and the choice of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from classifier import Train, ti_fx_command, tokenizer
from models import bert_model, llama_model, t5_model

import ti_fx
from ti_fx.cli._encodings import chosen_encodings
from ti_fx.cli._recipe import with_encodings
from ti_fx.errors import InputError
from ti_fx.export import pipeline
from ti_fx.export.file.content import open_file
from ti_fx.passes import QuantizeActivations
from ti_fx.recipe import Recipe

FACTORY = """
import torch
from torch import nn

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, values):
        hidden = nn.functional.gelu(self.first(values))
        return {"logits": self.head(self.norm(values + self.second(hidden)))}

def make():
    torch.manual_seed(0)
    return Layers(), {"values": torch.randn(3, 32, generator=torch.Generator().manual_seed(1))}
"""


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("factory") / "layers.py"
    path.write_text(FACTORY)
    return f"{path}:make"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, factory: str) -> Path:
    """Two encodings, and half precision for the rest."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.onnx"
    encodings = ("--encoding", "int8-token", "--encoding", "second=int8-tensor")
    ran = ti_fx_command("export", factory, "--ternarize", "--out", path, *encodings, "--kept", "float16")
    assert ran.code == 0, ran.err
    assert "encoding int8-token, second.weight=int8-tensor, opset 25" in ran.out
    return path


def test_check_takes_encodings_and_precision_from_the_file(mixed: Path, factory: str) -> None:
    ran = ti_fx_command("check", mixed, factory, "--ternarize")
    assert (ran.code, ran.err) == (0, "")
    assert "10 stored tensors are equal byte for byte" in ran.out


@pytest.mark.slow
def test_a_student_trained_with_two_encodings_is_exported_and_checked(
    tmp_path: Path, train_command: Train
) -> None:
    encodings = ("--encoding", "int8-token", "--encoding", "*.intermediate.dense=int8-tensor")
    ran = train_command(tmp_path / "run", *encodings)
    assert ran.code == 0, ran.err
    out = tmp_path / "student.onnx"
    assert ti_fx_command("export", tmp_path / "run", "--out", out, "--kept", "float16").code == 0
    assert ti_fx_command("check", out, tmp_path / "run").code == 0
    own = json.loads(ti_fx_command("inspect", out, "--json").out)["ti_fx"]
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    assert own["encoding"] == f"int8-token, {weight}=int8-tensor"
    assert own["batch_dependent"] == [weight]
    assert set(own["kept"]) == {"float16"}


@pytest.mark.slow  # a decoder is captured four times
def test_a_language_model_is_exported_with_its_cache_and_continues_prompts(tmp_path: Path) -> None:
    llama_model(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    out = tmp_path / "file" / "student.onnx"
    options = ("--ternarize", "--cache", "--encoding", "int8-token", "--logits-to-keep", "1")
    ran = ti_fx_command("export", tmp_path / "llama", "--out", out, *options)
    assert ran.code == 0, ran.err
    assert open_file(out).outputs["logits"][:2] == ("batch", 1)
    assert ti_fx_command("check", out, tmp_path / "llama", "--ternarize").code == 0
    (found,) = pipeline(out)("how many w7", max_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("how many w7")
    assert (out.parent / "generation_config.json").is_file()


@pytest.mark.slow  # an encoder-decoder is captured four times
def test_an_encoder_decoder_becomes_two_files_that_are_checked(tmp_path: Path) -> None:
    t5_model(num_layers=1).save_pretrained(tmp_path / "t5")
    options = ("--ternarize", "--cache", "--encoding", "int8-token")
    ran = ti_fx_command("export", tmp_path / "t5", "--out", tmp_path / "file" / "t5.onnx", *options)
    assert ran.code == 0, ran.err
    files = [tmp_path / "file" / f"t5-{part}.onnx" for part in ("encoder", "decoder")]
    assert sorted((tmp_path / "file").glob("*.onnx")) == sorted(files)
    for file in files:
        assert ti_fx_command("check", file, tmp_path / "t5", "--ternarize").code == 0
    ran = ti_fx_command("export", tmp_path / "t5", "--out", files[0], *options, "--logits-to-keep", "1")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "--logits-to-keep is for causal models" in ran.err
    llama_model(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    ran = ti_fx_command("check", files[1], tmp_path / "llama", "--ternarize")
    assert ran.code == 2
    assert "is the decoder of an encoder-decoder, and" in ran.err


@pytest.mark.slow
def test_weights_that_are_read_one_at_a_time_give_the_same_file(tmp_path: Path) -> None:
    bert_model(1).save_pretrained(tmp_path / "bert")
    outs = [tmp_path / name / "student.onnx" for name in ("whole", "single")]
    for out, options in zip(outs, ((), ("--low-memory",)), strict=True):
        ran = ti_fx_command("export", tmp_path / "bert", "--out", out, "--ternarize", *options)
        assert ran.code == 0, ran.err
    assert outs[0].read_bytes() == outs[1].read_bytes()
    options = ("--ternarize", "--low-memory", "--ram-megabytes", "0.001")
    ran = ti_fx_command("check", outs[0], tmp_path / "bert", *options)
    assert ran.code == 0, ran.err
    assert "stored tensors alone were compared" in ran.out
    assert "not compared at any size: the weights take about" in ran.out
    assert "None" not in ran.out


def test_reading_weights_one_at_a_time_needs_a_plain_model_in_a_folder(tmp_path: Path, factory: str) -> None:
    out = tmp_path / "student.onnx"
    for source, options, reason in (
        (factory, ("--ternarize",), "reads weights from safetensors in a model's folder"),
        (str(tmp_path), (), "is for a plain model, and needs --ternarize"),
    ):
        ran = ti_fx_command("export", source, "--out", out, "--low-memory", *options)
        assert ran.code == 2
        assert reason in ran.err
    assert not out.exists()


def test_inspect_shows_encodings_by_weight(mixed: Path) -> None:
    ran = ti_fx_command("inspect", mixed)
    assert (ran.code, ran.err) == (0, "")
    for text in (
        f"a ternary student of Layers, written by ti_fx {ti_fx.__version__} with torch ",
        "encoding int8-token, second.weight=int8-tensor\n",
        "a row's result depends on what else is in its batch: one range of activations for all, before second.weight\n",
        "tensors that are not ternary: 6 in float16\n",
        "needs ONNX Runtime 1.24 or newer\n",
        "no recipe: its passes were run one by one\n",
        "values  inputs     float[batch, 32]\n",
    ):
        assert text in ran.out
    rows = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert "first.weight 1 32×48 int8-token int2-transposed 0.00" in rows
    assert "second.weight 1 48×32 int8-tensor int2-transposed 0.00" in rows
    assert "packed.head.weight_half other FLOAT16 4×32 0.00" in rows


def test_inspect_shows_the_recipe_and_the_model(onnx_file: Path) -> None:
    ran = ti_fx_command("inspect", onnx_file)
    assert (ran.code, ran.err) == (0, "")
    assert "a ternary student of BertForSequenceClassification" in ran.out
    assert "recipe ternarybert" in ran.out
    assert "sequence is at most 32\n" in ran.out
    facts = json.loads(ti_fx_command("inspect", onnx_file, "--json").out)
    own = facts["ti_fx"]
    assert own["recipe"]["name"] == "ternarybert"
    assert (len(own["recipe_sha256"]), len(own["tensors_sha256"])) == (64, 64)
    assert own["batch_invariant"] is False
    assert facts["tensors"][0]["bytes"] == max(row["bytes"] for row in facts["tensors"])
    assert {row["encoding"] for row in facts["tensors"] if row["kind"] == "codes"} == {"int8-tensor"}


def test_a_file_by_others_is_listed(tmp_path: Path) -> None:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    path = tmp_path / "other.onnx"
    onnx.save(onnx.helper.make_model(graph, producer_name="someone"), path)
    ran = ti_fx_command("inspect", path)
    assert (ran.code, ran.err) == (0, "")
    assert "not written by ti_fx, but by someone: what its tensors stand for is not known" in ran.out
    assert "float[batch, 4]" in ran.out
    assert json.loads(ti_fx_command("inspect", path, "--json").out)["ti_fx"] is None


def test_damaged_metadata_is_one_line(mixed: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    for key, text, message in (
        ("ti_fx.tensors", "[", "metadata ti_fx.tensors is damaged"),
        ("ti_fx.kept", "[", "metadata ti_fx.kept is damaged"),
        ("ti_fx.versions", "3", "metadata ti_fx.versions is damaged"),
        ("ti_fx.largest", '{"sequence": []}', "metadata ti_fx.largest is damaged"),
        ("ti_fx.batch_dependent", '"all"', "metadata ti_fx.batch_dependent is damaged"),
        ("ti_fx.weight_encodings", "float, fc", "metadata ti_fx.weight_encodings is damaged"),
        ("ti_fx.weight_encodings", '{"fc": 3}', "metadata ti_fx.weight_encodings is damaged"),
    ):
        model = onnx.load(mixed)
        next(entry for entry in model.metadata_props if entry.key == key).value = text
        onnx.save(model, path)
        ran = ti_fx_command("inspect", path)
        assert (ran.code, ran.out) == (2, "")
        assert message in ran.err


def test_what_lies_beside_the_weights_goes_beside_the_file(tmp_path: Path, checkpoint: Path) -> None:
    from transformers import GenerationConfig, ViTImageProcessorPil

    from ti_fx.cli._student import saved_parts

    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors"))
    ViTImageProcessorPil().save_pretrained(folder)
    GenerationConfig(max_new_tokens=7).save_pretrained(folder)  # type: ignore[no-untyped-call]
    assert saved_parts(folder).keys() == {"config", "tokenizer", "processor", "generation_config"}
    assert saved_parts(None) == {}
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="can't read what lies beside the weights"):
        saved_parts(folder)


def test_encodings_are_read_from_options() -> None:
    assert not chosen_encodings(None)
    found = chosen_encodings(["*.fc=nbits2", "int8-token"])
    assert (found.name, found.others) == ("int8-token", {"*.fc": "nbits2"})
    for written, message in (
        (["int9"], "unknown encoding 'int9'"),
        (["fc=int9"], "unknown encoding 'int9'"),
        (["=nbits2"], "write NAME|GLOB=NAME"),
        (["nbits2", "float"], "give one for all weights"),
    ):
        with pytest.raises(InputError) as raised:
            chosen_encodings(written)
        assert message in str(raised.value)


def test_options_take_the_place_of_a_recipes_encodings() -> None:
    recipe = Recipe("own", activations=QuantizeActivations("int8-token", encodings={"a": "nbits2"}))
    both = with_encodings(recipe, chosen_encodings(["b=float"])).activations
    assert (both.encoding, both.encodings) == ("int8-token", {"a": "nbits2", "b": "float"})
    all_of_it = with_encodings(recipe, chosen_encodings(["reference"])).activations
    assert (all_of_it.encoding, all_of_it.encodings) == ("reference", {})
    assert with_encodings(recipe, chosen_encodings(None)) is recipe


def test_choose_prints_its_choice(factory: str) -> None:
    options = ("--encoding", "float", "--batch", 2, "--rounds", 1, "--threads", 1)
    ran = ti_fx_command("choose", factory, *options, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["encoding"] == "float"
    assert [row["encoding"] for row in found["measured"]] == ["float"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("choose", "FACTORY", "--length", 9), "the model has no dynamic sequence; leave --length out"),
        (("choose", "FACTORY", "--encoding", "int9"), "unknown encoding 'int9'"),
        (("export", "FACTORY", "--out", "x.onnx", "--encoding", "a=nbits2"), "give GLOB=NAME to ti-fx train"),
        (("export", "FACTORY", "--out", "x.onnx", "--kept", "int8"), "Invalid value for '--kept'"),
        (
            ("export", "FACTORY", "--ternarize", "--out", "x.onnx", "--cache"),
            "the example needs input_ids",
        ),
        (
            ("export", "FACTORY", "--ternarize", "--out", "x.onnx", "--logits-to-keep", 1),
            "--logits-to-keep is for a language model with its cache; add --cache",
        ),
        (
            ("export", "FACTORY", "--ternarize", "--out", "x.onnx", "--encoding", "none=nbits2"),
            "encodings='none' matches no ternary weight",
        ),
    ],
)
def test_wrong_options_are_one_line(
    factory: str,
    arguments: tuple[object, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(factory if argument == "FACTORY" else argument for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_an_exported_file_is_no_model(mixed: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("choose", mixed)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is an exported file, and a model is needed" in err
