"""Architectures with a cache of their own kind: windows, experts, tied heads, pairs of caches, and sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cached_models import differing, in_eval, logits_of, packed
from models import gpt2_model, llama_model, text_example
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    RemBertConfig,
    RemBertForCausalLM,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
)

from ti_fx.errors import InputError
from ti_fx.export import encoder_decoder_with_cache, to_onnx, with_cache
from ti_fx.export.run.generate import OnnxCausalLM, OnnxSeq2SeqLM
from ti_fx.passes import Pack


@pytest.mark.slow
def test_windows_and_experts_have_a_cache(tmp_path: Path) -> None:
    """Longer than a window, which transformers' own cache would cut; a router's softmax is no attention."""
    config = MixtralConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        num_local_experts=2,
        sliding_window=4,
        vocab_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = in_eval(MixtralForCausalLM(config))
    differing(model)
    example = {"input_ids": torch.randint(64, (2, 7))}
    student = packed(model, example)
    cached, inputs = with_cache(student, model, example)
    runtime: Any = OnnxCausalLM(to_onnx(cached, tmp_path / "mixtral.onnx", inputs).path, config)
    ids = torch.randint(64, (2, 6))
    found = runtime.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        expected = ids
        for _ in range(6):
            logits = student(input_ids=expected)["logits"]
            expected = torch.cat((expected, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, expected)
    assert len(set(found[:, 6:].flatten().tolist())) > 3


@pytest.mark.slow
def test_a_tied_head_and_learned_positions_have_a_cache_too(tmp_path: Path) -> None:
    model, example = in_eval(gpt2_model()), text_example(batch=2)
    cached, inputs = with_cache(packed(model, example), model, example)
    report = to_onnx(cached, tmp_path / "gpt2.onnx", inputs)
    assert report.parity.skipped == ()


@pytest.mark.slow
def test_an_encoders_architecture_as_a_decoder_has_a_cache() -> None:
    """RemBERT makes a pair of caches, of which that for an encoder stays empty."""
    config = RemBertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        input_embedding_size=16,
        output_embedding_size=16,
        is_decoder=True,
    )
    model, example = in_eval(RemBertForCausalLM(config)), {"input_ids": torch.randint(64, (2, 7))}
    student = packed(model, example)
    cached, _ = with_cache(student, model, example)
    none = torch.zeros(2, 2, 0, 8)
    found = cached(
        **example,
        attention_mask=torch.ones(2, 7, dtype=torch.long),
        position_ids=torch.arange(7).expand(2, 7).contiguous(),
        past_key_0=none,
        past_value_0=none,
    )
    torch.testing.assert_close(found["logits"], student(**example)["logits"])


def speech_model() -> Speech2TextForConditionalGeneration:
    torch.manual_seed(0)
    config = Speech2TextConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=64,
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=32,
    )
    model: Speech2TextForConditionalGeneration = in_eval(Speech2TextForConditionalGeneration(config))
    differing(model)
    return model


def speech_example() -> dict[str, Tensor]:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 12:] = 0
    return {
        "input_features": torch.randn(2, 24, 8),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(64, (2, 5)),
    }


@pytest.mark.slow
def test_padding_of_what_is_heard_reaches_the_decoder() -> None:
    """The encoder has fewer states than the input has frames, so the model makes their mask itself."""
    model, example = speech_model(), speech_example()
    student = packed(model, example)
    parts = encoder_decoder_with_cache(student, model, example)
    assert "cross_mask" in parts.decoder.inputs
    with torch.no_grad():
        expected = student(**example)["logits"]
        heard = student(**{**example, "attention_mask": torch.ones(2, 24, dtype=torch.long)})["logits"]
    torch.testing.assert_close(logits_of(parts, example), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(heard, expected, atol=1e-2)


@pytest.mark.slow
def test_what_is_heard_is_generated_from(tmp_path: Path) -> None:
    model, example = speech_model(), speech_example()
    encoder, decoder = encoder_decoder_with_cache(packed(model, example), model, example)
    paths = [
        to_onnx(part.gm, tmp_path / f"{name}.onnx", part.inputs).path
        for name, part in (("encoder", encoder), ("decoder", decoder))
    ]
    runtime: Any = OnnxSeq2SeqLM(paths[0], paths[1], model.config)
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "decoder_start_token_id": 1}
    given = {name: example[name] for name in ("input_features", "attention_mask")}
    found = runtime.generate(**given, **options)
    alone = runtime.generate(**{name: value[1:] for name, value in given.items()}, **options)
    assert torch.equal(found[1:], alone)
    with pytest.raises(InputError, match="input_features needs its attention_mask"):
        runtime.generate(input_features=given["input_features"], **options)


@pytest.mark.slow
def test_what_is_kept_in_half_precision_stays_so_with_a_cache() -> None:
    """Of the student that was trained, not of the model that the cached graph is captured from."""
    model, example = in_eval(llama_model()), text_example(batch=2)
    differing(model)
    student = packed(model, example, Pack(kept="float16"))
    untrained = in_eval(llama_model())
    cached, inputs = with_cache(student, untrained, example)
    with torch.no_grad():
        before = {name: value for name, value in inputs.items() if "past" not in name}
        empty = {name: value[:, :, :0] for name, value in inputs.items() if "past" in name}
        ids = inputs["input_ids"]
        given = before | {
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(3).expand(2, 3),
        }
        found = cached(**given, **empty)["logits"]
        expected = student(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
