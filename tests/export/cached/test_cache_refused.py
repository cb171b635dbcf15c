"""Models, graphs and options that no cache can be made for are refused, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cached_models import CachedStudent, cached_llama, in_eval, packed
from models import bert_model, gpt2_model, text_example, tokens
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

import ti_fx
from ti_fx.errors import CaptureError, ExportError, InputError, PreconditionError
from ti_fx.export import with_cache
from ti_fx.export.cached.causal import require_free, stand_in
from ti_fx.export.cached.names import keeping_layers
from ti_fx.ir.facts import record_facts


@pytest.fixture
def decoder() -> CachedStudent:
    return cached_llama()


def test_logits_that_can_not_be_left_out_are_refused(
    decoder: CachedStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="logits_to_keep is 2"):
        with_cache(decoder.student, decoder.model, text_example(batch=2), logits_to_keep=2)
    monkeypatch.setattr(decoder.model, "forward", lambda input_ids, past_key_values: None)
    with pytest.raises(InputError, match="LlamaForCausalLM takes no logits_to_keep"):
        with_cache(decoder.student, decoder.model, text_example(batch=2), logits_to_keep=1)


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


def test_what_keeps_more_than_keys_and_values_is_refused(decoder: CachedStudent) -> None:
    cache: Any = DynamicCache()
    cache.layers = [LinearAttentionLayer()]
    with pytest.raises(InputError, match=r"layer 0 of LlamaForCausalLM keeps other states .*LinearAttention"):
        keeping_layers(decoder.model, cache)
    for made in (WithMemory, WithShiftedMask):
        with pytest.raises(InputError, match="other logits after a cache than without"):
            with_cache(decoder.student, in_eval(made(decoder.model.config)), {"input_ids": tokens(2, 9)})


def test_a_model_that_fails_with_a_cache_is_refused(
    decoder: CachedStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(**options: Any) -> None:
        raise ValueError("no cache here")

    monkeypatch.setattr(decoder.model, "forward", forward)
    with pytest.raises(
        InputError, match=r"fails with input_ids, attention_mask and use_cache.*no cache here"
    ):
        with_cache(decoder.student, decoder.model, text_example(batch=2))


def test_a_window_that_attention_lacks_is_refused(decoder: CachedStudent) -> None:
    """As in Moshi, whose cache forgets what its mask does not hide."""
    config = copy.deepcopy(decoder.model.config)
    config.sliding_window = 4
    with pytest.raises(
        InputError, match=r"has a sliding window that its attention lacks.* set sliding_window"
    ):
        with_cache(decoder.student, in_eval(LlamaForCausalLM(config)), {"input_ids": tokens(2, 9)})


def test_a_model_without_a_head_is_refused(decoder: CachedStudent) -> None:
    with pytest.raises(InputError, match=r"LlamaModel gives no logits.* give the model with its head"):
        with_cache(decoder.student, decoder.model.model, text_example(batch=2))


def test_what_reads_more_than_text_is_refused() -> None:
    model, example = in_eval(gpt2_model(n_layer=1)), text_example(batch=2)
    student = packed(model, {**example, "token_type_ids": torch.zeros_like(example["input_ids"])})
    with pytest.raises(
        InputError, match="the student takes token_type_ids, and a graph with a cache takes text"
    ):
        with_cache(student, model, example)


def test_a_graph_that_holds_its_examples_values_or_length_is_refused(decoder: CachedStudent) -> None:
    gm = ti_fx.fork(decoder.cached)
    (ids,) = (node for node in gm.graph.find_nodes(op="placeholder") if node.target == "input_ids")
    ids.meta = {**ids.meta, "val": tokens(2, 3)}
    with pytest.raises(CaptureError, match="LlamaForCausalLM fixes the length of input_ids"):
        require_free(gm, decoder.model)
    record_facts(gm, baked={"attention_mask": tokens(2, 3)})
    with pytest.raises(CaptureError, match="decides in Python by the values of attention_mask"):
        require_free(gm, decoder.model)


def test_a_graph_whose_keys_and_values_differ_in_length_is_refused(decoder: CachedStudent) -> None:
    """What T5Gemma 2's trace gives, whose masks are those of two lengths together."""
    gm = ti_fx.fork(decoder.cached)
    (values,) = (node for node in gm.graph.find_nodes(op="placeholder") if node.target == "past_value_0")
    values.meta = {**values.meta, "val": torch.zeros(2, 2, 3, 8)}
    with pytest.raises(CaptureError, match="takes past_value_0 to be of another length than past_key_0"):
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


def test_what_has_no_cache_is_refused() -> None:
    model, example = in_eval(bert_model()), text_example(batch=2)
    with pytest.raises(
        InputError, match="returns no cache of keys and values; build it with is_decoder=True"
    ):
        with_cache(packed(model, example), model, example)


def test_what_is_not_packed_or_too_short_is_refused(decoder: CachedStudent) -> None:
    example = text_example(batch=2)
    with pytest.raises(PreconditionError, match="no packed ternary weight"):
        with_cache(ti_fx.capture(decoder.model, example), decoder.model, example)
    with pytest.raises(InputError, match="input_ids"):
        with_cache(decoder.student, decoder.model, {"input_ids": tokens(2, 2)})


@pytest.mark.slow
def test_a_table_read_in_two_ways_is_refused() -> None:
    model, example = in_eval(gpt2_model()), text_example(batch=2)
    with pytest.raises(ExportError, match="both packed and in full precision"):
        with_cache(packed(model, example, tied="embedding"), model, example)
