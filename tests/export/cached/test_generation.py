"""Language models with a cache: the same student token by token, and transformers' ``generate`` around it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from cached_models import (
    NEW,
    Decoder,
    Translator,
    cached_llama,
    differing,
    in_eval,
    logits_of,
    operators,
    packed,
    translation_example,
)
from models import t5_model, text_example, tokens
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from ti_fx.errors import InputError
from ti_fx.export import Runtime, encoder_decoder_with_cache, to_onnx, with_cache, write_genai_config
from ti_fx.export.file.intact import INTACT_KEY
from ti_fx.export.file.metadata import PART_OF
from ti_fx.export.run.generate import OnnxCausalLM, OnnxSeq2SeqLM


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    made = cached_llama()
    report = to_onnx(made.cached, tmp_path_factory.mktemp("cache") / "llama.onnx", made.inputs)
    return Decoder(made.model, made.student, made.cached, report)


def greedy(decoder: Decoder, ids: Tensor) -> Tensor:
    """Generate without any cache, in PyTorch."""
    with torch.no_grad():
        for _ in range(NEW):
            logits = decoder.student(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids


def test_the_comparison_has_the_cache_states(decoder: Decoder) -> None:
    cases = {row.case for row in decoder.report.parity.differences}
    assert any("past=0" in case for case in cases)
    assert any("sequence=1," in case for case in cases)
    assert decoder.report.parity.skipped == ()


def test_layers_are_operators_of_onnx(decoder: Decoder) -> None:
    found = operators(decoder.report.path)
    assert (found["Attention"], found["RotaryEmbedding"], found["RMSNormalization"]) == (1, 2, 3)
    assert (found["Softmax"], found["Transpose"]) == (0, 0)


def test_a_large_constant_says_where_it_belongs(decoder: Decoder) -> None:
    large = {tensor.name for tensor in decoder.report.tensors if tensor.bytes >= 1024}
    assert "logits/constant" in large  # the head, the other way round
    assert not any(name.startswith("val_") for name in large)


def test_the_cached_graph_is_the_student(decoder: Decoder) -> None:
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.arange(9).expand(3, 9).contiguous(),
    }
    names = [str(node.target) for node in decoder.cached.graph.find_nodes(op="placeholder")]
    shapes = {
        str(node.target): node.meta["val"].shape for node in decoder.cached.graph.find_nodes(op="placeholder")
    }
    given |= {
        name: torch.zeros(3, int(shapes[name][1]), 0, int(shapes[name][3]))
        for name in names
        if "past" in name
    }
    with torch.no_grad():
        found = decoder.cached(**given)["logits"]
        expected = decoder.student(input_ids=ids, attention_mask=mask)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_greedy_search_gives_the_tokens_of_the_student_without_a_cache(decoder: Decoder) -> None:
    ids = tokens(2, 5)
    found = decoder.generate(ids, do_sample=False)
    assert torch.equal(found, greedy(decoder, ids))
    assert len(set(found[:, 5:].flatten().tolist())) > 2


def test_padding_on_the_left_changes_no_token(decoder: Decoder) -> None:
    ids = tokens(1, 5)
    other = tokens(2, 8)[1:]
    batch = torch.cat((nn.functional.pad(ids, (3, 0)), other))
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    found = decoder.generate(batch, attention_mask=mask, do_sample=False)
    assert torch.equal(found[:1, 3:], decoder.generate(ids, do_sample=False))
    assert torch.equal(found[1:], decoder.generate(other, do_sample=False))


def test_tokens_guessed_from_the_prompt_change_no_token(decoder: Decoder) -> None:
    ids = tokens(1, 4).repeat(1, 3)
    found = decoder.generate(ids, prompt_lookup_num_tokens=3, do_sample=False)
    assert torch.equal(found, greedy(decoder, ids))


@pytest.mark.slow
def test_the_last_tokens_logits_alone_generate_the_same(decoder: Decoder, tmp_path: Path) -> None:
    example = text_example(batch=2)
    cached, inputs = with_cache(decoder.student, decoder.model, example, logits_to_keep=1)
    report = to_onnx(cached, tmp_path / "last.onnx", inputs)
    last = Decoder(decoder.model, decoder.student, cached, report)
    ids = tokens(2, 5)
    options: dict[str, Any] = {"num_beams": 2, "no_repeat_ngram_size": 2}
    assert torch.equal(last.generate(ids, do_sample=False), greedy(decoder, ids))
    assert torch.equal(last.generate(ids, **options), decoder.generate(ids, **options))
    runtime: Any = OnnxCausalLM(report.path, decoder.model.config)
    every: Any = OnnxCausalLM(decoder.report.path, decoder.model.config)
    found, expected = runtime(ids, logits_to_keep=1).logits, every(ids).logits
    assert found.shape == (2, 1, expected.shape[2])
    torch.testing.assert_close(found, expected[:, -1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(every(ids, logits_to_keep=2).logits, expected[:, -2:], rtol=0, atol=0)
    with pytest.raises(InputError, match="the last token's logits alone, and 5 are asked for"):
        runtime(ids)
    with pytest.raises(InputError, match=r"alone, and . are asked for"):
        last.generate(tokens(1, 4).repeat(1, 3), prompt_lookup_num_tokens=3, do_sample=False)


def test_sampling_follows_the_seed(decoder: Decoder) -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(decoder.generate(tokens(1, 5), do_sample=True))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_file_without_a_cache_is_refused(decoder: Decoder, onnx_file: Path) -> None:
    with pytest.raises(InputError, match="has no cache"):
        OnnxCausalLM(onnx_file, decoder.model.config)


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Translator:
    model, example = in_eval(t5_model(num_layers=1)), translation_example()
    differing(model)
    student = packed(model, example)
    folder = tmp_path_factory.mktemp("translator")
    encoder, decoder = encoder_decoder_with_cache(student, model, example)
    reports = (
        to_onnx(encoder.gm, folder / "encoder.onnx", encoder.inputs),
        to_onnx(decoder.gm, folder / "decoder.onnx", decoder.inputs),
    )
    return Translator(model, student, reports)


@pytest.mark.slow
def test_the_encoder_is_one_file_and_the_decoder_another(translator: Translator) -> None:
    encoder, decoder = (
        {tensor.name for tensor in report.tensors if tensor.kind == "codes"} for report in translator.reports
    )
    assert any(name.startswith("packed.encoder.") for name in encoder)
    assert not any(name.startswith("packed.encoder.") for name in decoder)
    # what projects the encoder's states to keys and values is read once, in the encoder
    assert {name for name in encoder if ".EncDecAttention." in name} == {
        f"packed.decoder.block.0.layer.1.EncDecAttention.{part}.weight_codes" for part in ("k", "v")
    }
    assert any("past=0" in row.case for row in translator.reports[1].parity.differences)
    # the decoder's own and the one on the encoder
    assert operators(translator.reports[1].path)["Attention"] == 2


@pytest.mark.slow
def test_an_encoder_decoder_generates_as_its_student_does_without_a_cache(translator: Translator) -> None:
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    found = translator.generate(ids, attention_mask=mask, do_sample=False)
    written = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(NEW):
            logits = translator.student(input_ids=ids, attention_mask=mask, decoder_input_ids=written)[
                "logits"
            ]
            written = torch.cat((written, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, written)
    assert len(set(found.flatten().tolist())) > 3
    alone = translator.generate(ids[1:, :4], do_sample=False)
    assert torch.equal(alone, found[1:])


@pytest.mark.slow
def test_beam_search_keeps_each_beam_with_its_source(translator: Translator) -> None:
    ids = tokens(2, 7)
    both = translator.generate(ids, num_beams=3, do_sample=False)
    for row in (0, 1):
        one = translator.generate(ids[row : row + 1], num_beams=3, do_sample=False)
        assert torch.equal(both[row : row + 1], one)


@pytest.mark.slow
def test_one_graph_and_two_are_not_confused(decoder: Decoder, translator: Translator) -> None:
    with pytest.raises(InputError, match=r"has an encoder; use ti_fx.export.encoder_decoder_with_cache"):
        with_cache(translator.student, translator.model, translation_example())
    with pytest.raises(InputError, match=r"is no encoder-decoder; use ti_fx.export.with_cache"):
        encoder_decoder_with_cache(decoder.student, decoder.model, text_example(batch=2))
    with pytest.raises(InputError, match="the example needs decoder_input_ids"):
        encoder_decoder_with_cache(translator.student, translator.model, text_example(batch=2))
    encoder, of_decoder = (report.path for report in translator.reports)
    with pytest.raises(InputError, match="gives no keys and values for a decoder"):
        OnnxSeq2SeqLM(of_decoder, of_decoder, translator.model.config)
    with pytest.raises(InputError, match="reads no encoder"):
        OnnxSeq2SeqLM(encoder, decoder.report.path, translator.model.config)


@pytest.mark.slow
def test_an_encoder_decoder_without_values_has_the_same_graphs(translator: Translator) -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(translator.model.config)
    example = translation_example()
    found = encoder_decoder_with_cache(translator.student, in_eval(model), example)
    with torch.no_grad():
        expected = translator.student(**example)["logits"]
    torch.testing.assert_close(logits_of(found, example), expected, rtol=0, atol=1e-4)


def test_the_configuration_for_genai_names_what_the_file_has(decoder: Decoder, tmp_path: Path) -> None:
    path = write_genai_config(decoder.report.path, decoder.model.config)
    content = json.loads(path.read_text())
    parts = content["model"]["decoder"]
    runtime = Runtime(decoder.report.path)
    named = {parts["inputs"][name] for name in ("input_ids", "attention_mask", "position_ids")}
    layers = range(parts["num_hidden_layers"])
    named |= {parts["inputs"][f"past_{part}_names"] % layer for part in ("key", "value") for layer in layers}
    assert named == set(runtime.inputs)
    returned = {parts["outputs"]["logits"]}
    returned |= {
        parts["outputs"][f"present_{part}_names"] % layer for part in ("key", "value") for layer in layers
    }
    assert returned == set(runtime.outputs)
    assert (path.parent / parts["filename"]) == decoder.report.path
    assert (parts["num_attention_heads"], parts["num_key_value_heads"], parts["head_size"]) == (4, 2, 4)
    assert content["model"]["context_length"] == content["search"]["max_length"] == 32
    assert not content["search"]["past_present_share_buffer"]


@pytest.mark.slow
def test_a_configuration_for_genai_needs_a_cache(translator: Translator) -> None:
    with pytest.raises(InputError, match="is no decoder with a cache"):
        write_genai_config(translator.reports[0].path, translator.model.config)


def test_a_configuration_for_genai_replaces_no_other_and_takes_no_other_tokenizer(
    decoder: Decoder, tmp_path: Path
) -> None:
    path = tmp_path / "llama.onnx"
    shutil.copy(decoder.report.path, path)
    write_genai_config(path, decoder.model.config)
    written = write_genai_config(path, decoder.model.config).read_bytes()
    other = tmp_path / "other.onnx"
    shutil.copy(path, other)
    with pytest.raises(InputError, match=r"genai_config.json is of llama.onnx.*a folder of its own"):
        write_genai_config(other, decoder.model.config)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer_config.json beside .* was not exported with it"):
        write_genai_config(path, decoder.model.config)
    assert (tmp_path / "genai_config.json").read_bytes() == written


@pytest.mark.slow
def test_an_encoder_of_another_student_is_refused(translator: Translator, tmp_path: Path) -> None:
    encoder, decoder = (report.path for report in translator.reports)
    model = onnx.load(encoder)
    (whole,) = (entry for entry in model.metadata_props if entry.key == PART_OF)
    whole.value = whole.value[::-1]
    del model.metadata_props[[entry.key for entry in model.metadata_props].index(INTACT_KEY)]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"other.onnx and .* are of two students"):
        OnnxSeq2SeqLM(tmp_path / "other.onnx", decoder, translator.model.config)
