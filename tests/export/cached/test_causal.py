"""Language models with a cache: the same student token by token, and transformers' ``generate`` around it."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from models import bert_model, gpt2_model, llama_model, t5_model, text_example, tokens
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RemBertConfig,
    RemBertForCausalLM,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

import ti_fx
from ti_fx.errors import CaptureError, ExportError, InputError, PreconditionError
from ti_fx.export import (
    ExportReport,
    Runtime,
    encoder_decoder_with_cache,
    to_onnx,
    with_cache,
    write_genai_config,
)
from ti_fx.export.cached.causal import require_free, stand_in
from ti_fx.export.cached.encoder_decoder import EncoderDecoder
from ti_fx.export.cached.names import keeping_layers
from ti_fx.export.run.generate import OnnxCausalLM, OnnxSeq2SeqLM
from ti_fx.ir.facts import record_facts
from ti_fx.ir.pipeline import Pass
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

NEW = 12


@dataclass(frozen=True)
class Decoder:
    """A packed student, the same with its cache, and its file."""

    model: LlamaForCausalLM
    student: GraphModule
    cached: GraphModule
    report: ExportReport

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        """Generate in ONNX Runtime."""
        runtime: Any = OnnxCausalLM(self.report.path, self.model.config)
        found: Tensor = runtime.generate(
            ids, **{"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **options}
        )
        return found


def in_eval(model: nn.Module) -> Any:
    model.train(False)
    return model


def differing(model: nn.Module) -> None:
    """Enlarge the weights, so that the scores of tokens differ clearly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else None


def packed(
    model: nn.Module, example: dict[str, Tensor], pack: Pass | None = None, **options: object
) -> GraphModule:
    gm = ti_fx.capture(model, example)
    quantisers = QuantizeActivations("int8-token")  # a token's result does not depend on those beside it
    ti_fx.Pipeline(Ternarize(min_rows=32, **options), quantisers, Strip(), pack or Pack())(gm)  # type: ignore[arg-type]
    return gm.eval()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    torch.manual_seed(0)
    model = in_eval(llama_model())
    differing(model)
    example = text_example(batch=2)
    student = packed(model, example)
    cached, inputs = with_cache(student, model, example)
    return Decoder(
        model, student, cached, to_onnx(cached, tmp_path_factory.mktemp("cache") / "llama.onnx", inputs)
    )


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


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_layers_are_operators_of_onnx(decoder: Decoder, translator: Translator) -> None:
    found = operators(decoder.report.path)
    assert (found["Attention"], found["RotaryEmbedding"], found["RMSNormalization"]) == (2, 4, 5)
    assert (found["Softmax"], found["Transpose"]) == (0, 0)
    assert (
        operators(translator.reports[1].path)["Attention"] == 4
    )  # two of the decoder's own, two on the encoder


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


def test_logits_that_can_not_be_left_out_are_refused(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="logits_to_keep is 2"):
        with_cache(decoder.student, decoder.model, text_example(batch=2), logits_to_keep=2)
    monkeypatch.setattr(decoder.model, "forward", lambda input_ids, past_key_values: None)
    with pytest.raises(InputError, match="LlamaForCausalLM takes no logits_to_keep"):
        with_cache(decoder.student, decoder.model, text_example(batch=2), logits_to_keep=1)


def test_sampling_follows_the_seed(decoder: Decoder) -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(decoder.generate(tokens(1, 5), do_sample=True))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class WithMemory(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Keeps more than keys and values: how often it ran."""

    runs = 0.0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.runs += 1
        found = super().forward(*arguments, **options)
        found.logits = found.logits * self.runs
        return found


class WithShiftedMask(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Takes the mask after a cache for that of other tokens, as GIT does, whose cache begins with an image."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        cache = options.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            options["attention_mask"] = options["attention_mask"].roll(1, -1)
        return super().forward(*arguments, **options)


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


def test_what_keeps_more_than_keys_and_values_is_refused(decoder: Decoder) -> None:
    cache: Any = DynamicCache()
    cache.layers = [LinearAttentionLayer()]
    with pytest.raises(InputError, match=r"layer 0 of LlamaForCausalLM keeps other states .*LinearAttention"):
        keeping_layers(decoder.model, cache)
    for made in (WithMemory, WithShiftedMask):
        with pytest.raises(InputError, match="other logits after a cache than without"):
            with_cache(decoder.student, in_eval(made(decoder.model.config)), {"input_ids": tokens(2, 9)})


def test_a_model_that_fails_with_a_cache_is_refused(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(**options: Any) -> None:
        raise ValueError("no cache here")

    monkeypatch.setattr(decoder.model, "forward", forward)
    with pytest.raises(
        InputError, match=r"fails with input_ids, attention_mask and use_cache.*no cache here"
    ):
        with_cache(decoder.student, decoder.model, text_example(batch=2))


def test_a_window_that_attention_lacks_is_refused(decoder: Decoder) -> None:
    """As in Moshi, whose cache forgets what its mask does not hide."""
    config = copy.deepcopy(decoder.model.config)
    config.sliding_window = 4
    with pytest.raises(
        InputError, match=r"has a sliding window that its attention lacks.* set sliding_window"
    ):
        with_cache(decoder.student, in_eval(LlamaForCausalLM(config)), {"input_ids": tokens(2, 9)})


def test_a_model_without_a_head_is_refused(decoder: Decoder) -> None:
    with pytest.raises(InputError, match=r"LlamaModel gives no logits.* give the model with its head"):
        with_cache(decoder.student, decoder.model.model, text_example(batch=2))


def test_what_reads_more_than_text_is_refused() -> None:
    model, example = in_eval(gpt2_model(n_layer=1)), text_example(batch=2)
    student = packed(model, {**example, "token_type_ids": torch.zeros_like(example["input_ids"])})
    with pytest.raises(
        InputError, match="the student takes token_type_ids, and a graph with a cache takes text"
    ):
        with_cache(student, model, example)


def test_a_graph_that_holds_its_examples_values_or_length_is_refused(decoder: Decoder) -> None:
    gm = ti_fx.fork(decoder.cached)
    (ids,) = (node for node in gm.graph.find_nodes(op="placeholder") if node.target == "input_ids")
    ids.meta = {**ids.meta, "val": tokens(2, 3)}
    with pytest.raises(CaptureError, match="LlamaForCausalLM fixes the length of input_ids"):
        require_free(gm, decoder.model)
    record_facts(gm, baked={"attention_mask": tokens(2, 3)})
    with pytest.raises(CaptureError, match="decides in Python by the values of attention_mask"):
        require_free(gm, decoder.model)


def test_a_graph_whose_keys_and_values_differ_in_length_is_refused(decoder: Decoder) -> None:
    """What T5Gemma 2's trace gives, whose masks are those of two lengths together."""
    gm = ti_fx.fork(decoder.cached)
    (values,) = (node for node in gm.graph.find_nodes(op="placeholder") if node.target == "past_value_1")
    values.meta = {**values.meta, "val": torch.zeros(2, 2, 3, 8)}
    with pytest.raises(CaptureError, match="takes past_value_1 to be of another length than past_key_1"):
        require_free(gm, decoder.model)


def test_a_constant_that_is_made_without_a_value_is_refused() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.tensor([1.0], device=x.device)

    gm = ti_fx.capture(Shifted(3, 3, device="meta"), {"x": torch.ones(2, 3, device="meta")})
    with pytest.raises(
        CaptureError, match=r"the forward makes the constant .* give the model with its values"
    ):
        stand_in(gm)


@pytest.mark.slow
def test_a_tied_head_and_learned_positions_have_a_cache_too(tmp_path: Path) -> None:
    model, example = in_eval(gpt2_model()), text_example(batch=2)
    cached, inputs = with_cache(packed(model, example), model, example)
    report = to_onnx(cached, tmp_path / "gpt2.onnx", inputs)
    assert report.parity.skipped == ()


def test_what_has_no_cache_is_refused() -> None:
    model, example = in_eval(bert_model()), text_example(batch=2)
    with pytest.raises(
        InputError, match="returns no cache of keys and values; build it with is_decoder=True"
    ):
        with_cache(packed(model, example), model, example)


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


def test_what_is_not_packed_or_too_short_is_refused(decoder: Decoder) -> None:
    example = text_example(batch=2)
    with pytest.raises(PreconditionError, match="no packed ternary weight"):
        with_cache(ti_fx.capture(decoder.model, example), decoder.model, example)
    with pytest.raises(InputError, match="input_ids"):
        with_cache(decoder.student, decoder.model, {"input_ids": tokens(2, 2)})


def test_a_table_read_in_two_ways_is_refused() -> None:
    model, example = in_eval(gpt2_model()), text_example(batch=2)
    with pytest.raises(ExportError, match="both packed and in full precision"):
        with_cache(packed(model, example, tied="embedding"), model, example)


def test_a_file_without_a_cache_is_refused(decoder: Decoder, onnx_file: Path) -> None:
    with pytest.raises(InputError, match="has no cache"):
        OnnxCausalLM(onnx_file, decoder.model.config)


@dataclass(frozen=True)
class Translator:
    """A packed encoder-decoder and its two files, which generate."""

    model: T5ForConditionalGeneration
    student: GraphModule
    reports: tuple[ExportReport, ExportReport]

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        """Generate in ONNX Runtime."""
        encoder, decoder = self.reports
        runtime: Any = OnnxSeq2SeqLM(encoder.path, decoder.path, self.model.config)
        settings = {
            "max_new_tokens": NEW,
            "eos_token_id": None,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        }
        found: Tensor = runtime.generate(ids, **{**settings, **options})
        return found


def translation_example() -> dict[str, Tensor]:
    return {**text_example(batch=2), "decoder_input_ids": tokens(2, 5)}


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Translator:
    model, example = in_eval(t5_model()), translation_example()
    differing(model)
    student = packed(model, example)
    folder = tmp_path_factory.mktemp("translator")
    encoder, decoder = encoder_decoder_with_cache(student, model, example)
    reports = (
        to_onnx(encoder.gm, folder / "encoder.onnx", encoder.inputs),
        to_onnx(decoder.gm, folder / "decoder.onnx", decoder.inputs),
    )
    return Translator(model, student, reports)


def test_the_encoder_is_one_file_and_the_decoder_another(translator: Translator) -> None:
    encoder, decoder = (
        {tensor.name for tensor in report.tensors if tensor.kind == "codes"} for report in translator.reports
    )
    assert any(name.startswith("packed.encoder.") for name in encoder)
    assert not any(name.startswith("packed.encoder.") for name in decoder)
    # what projects the encoder's states to keys and values is read once, in the encoder
    assert {name for name in encoder if ".EncDecAttention." in name} == {
        f"packed.decoder.block.{layer}.layer.1.EncDecAttention.{part}.weight_codes"
        for layer in (0, 1)
        for part in ("k", "v")
    }
    assert any("past=0" in row.case for row in translator.reports[1].parity.differences)


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


def test_beam_search_keeps_each_beam_with_its_source(translator: Translator) -> None:
    ids = tokens(2, 7)
    both = translator.generate(ids, num_beams=3, do_sample=False)
    for row in (0, 1):
        one = translator.generate(ids[row : row + 1], num_beams=3, do_sample=False)
        assert torch.equal(both[row : row + 1], one)


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


def logits_of(parts: EncoderDecoder, example: dict[str, Tensor]) -> Tensor:
    """Return what the decoder's graph gives before any cache, of what the encoder's hands on."""
    encoder, decoder = parts
    given = {name: example[name] for name in decoder.inputs if name in example}
    given |= {name: value[:, :, :0] for name, value in decoder.inputs.items() if name.startswith("past_")}
    with torch.no_grad():
        kept = encoder.gm(**{name: example[name] for name in encoder.inputs})
        found: Tensor = decoder.gm(**given, **kept)["logits"]
    return found


def test_an_encoder_decoder_without_values_has_the_same_graphs(translator: Translator) -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(translator.model.config)
    example = translation_example()
    found = encoder_decoder_with_cache(translator.student, in_eval(model), example)
    with torch.no_grad():
        expected = translator.student(**example)["logits"]
    torch.testing.assert_close(logits_of(found, example), expected, rtol=0, atol=1e-4)


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


def test_a_configuration_for_genai_needs_a_cache(translator: Translator) -> None:
    with pytest.raises(InputError, match="is no decoder with a cache"):
        write_genai_config(translator.reports[0].path, translator.model.config)
