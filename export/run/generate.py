"""Exported language models generate text: transformers' own ``generate`` calls ONNX Runtime."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput

from ti_fx.errors import InputError
from ti_fx.export.cached.names import (
    CROSS_KEY,
    CROSS_VALUE,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
    cached_layers,
    filled_cache,
)
from ti_fx.export.file.metadata import PART_OF
from ti_fx.export.run.session import Runtime


class OnnxModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What transformers asks of any model, around an exported file.

    Args:
        runtime: the file.
        config: the model's configuration.
    """

    config_class = PreTrainedConfig

    def __init__(self, runtime: Runtime, config: PreTrainedConfig) -> None:
        config = copy.deepcopy(config)
        # nothing here attends or has experts; any other implementation must be declared by the class
        config._attn_implementation = config._experts_implementation = "eager"
        super().__init__(config)
        self.runtime = runtime

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32


class _OnnxLM(OnnxModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """What transformers asks of a model that generates, around the file of a decoder with a cache."""

    def __init__(
        self,
        path: str | os.PathLike[str] | Runtime,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None,
        threads: int | None,
    ) -> None:
        super().__init__(path if isinstance(path, Runtime) else Runtime(path, threads), config)
        self.layers = cached_layers(self.runtime.inputs)
        if not self.layers:
            raise InputError(
                f"{path} has no cache of keys and values; export what ti_fx.export.with_cache returns"
            )
        self.generation_config = copy.deepcopy(
            generation_config or GenerationConfig.from_model_config(config)
        )
        self.generation_config.use_cache = True  # what the file is for, whatever training had

    @classmethod
    def can_generate(cls) -> bool:
        """Always."""
        return True

    def _run(self, feed: Mapping[str, Any], cache: DynamicCache | None) -> tuple[Tensor, DynamicCache]:
        """Return the logits, and the cache with the new tokens' keys and values."""
        past = _filled(cache)
        given = dict(feed)
        batch = next(iter(feed.values())).shape[0]
        for index in range(self.layers):
            for name, part in ((PAST_KEY, "keys"), (PAST_VALUE, "values")):
                shape = self.runtime.inputs[name.format(index)].shape
                given[name.format(index)] = (
                    getattr(past[index], part)
                    if past
                    else np.zeros((batch, shape[1], 0, shape[3]), np.float32)
                )
        found = self.runtime.tensors(given)
        # filled, not updated: an update of an empty cache copies
        return found["logits"], filled_cache((True,) * self.layers, found, PRESENT_KEY, PRESENT_VALUE)


class OnnxCausalLM(_OnnxLM):  # type: ignore[no-untyped-call]
    """A file made from :func:`ti_fx.export.with_cache`, with transformers' ``generate``.

    Greedy search, sampling, beam search and batches padded on the left work as for any transformers model.

    >>> OnnxCausalLM("student.onnx", config).generate(**tokenizer(text, return_tensors="pt"))  # doctest: +SKIP

    Args:
        path: the file, or a runtime that has loaded it.
        config: the model's configuration.
        generation_config: None takes what the configuration says.
        threads: threads within a node; None leaves it to ONNX Runtime.

    Raises:
        InputError: the file is missing or damaged, or has no cache.
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        path: str | os.PathLike[str] | Runtime,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(path, config, generation_config, threads)
        shapes = {value.name: value.shape for value in self.runtime.session.get_outputs()}
        self.last_alone = shapes["logits"][1] == 1

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Run the new tokens after the cache.

        Args:
            input_ids: int64 ``[batch, sequence]``.
            attention_mask: int64 ``[batch, past + sequence]``; None counts every token.
            position_ids: int64 ``[batch, sequence]``; None counts on from the cache, as far as the mask counts tokens.
            past_key_values: the cache that the last call returned; None or empty before the first token.
            logits_to_keep: of how many last tokens the logits are returned; 0 of all.
            options: what ``generate`` tells every model (``use_cache``, ``return_dict``), which changes nothing here.

        Raises:
            InputError: the file gives the last token's logits alone (``with_cache(..., logits_to_keep=1)``), and more
                are asked for.
        """
        batch, length = input_ids.shape
        wanted = min(logits_to_keep or length, length)
        if self.last_alone and wanted > 1:
            raise InputError(
                f"the file gives the last token's logits alone, and {wanted} are asked for: pass logits_to_keep=1, or "
                "export the file with the logits of all (logits_to_keep=0)"
            )
        past = _filled(past_key_values)
        before = past[0].keys.shape[2] if past else 0
        if attention_mask is None:
            attention_mask = torch.ones(batch, before + length, dtype=torch.long)
        feed = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
        if "position_ids" in self.runtime.inputs:
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            feed["position_ids"] = position_ids.expand(batch, length)
        logits, cache = self._run(feed, past_key_values)
        return CausalLMOutputWithPast(logits=logits[:, -wanted:], past_key_values=cache)


class OnnxSeq2SeqLM(_OnnxLM):  # type: ignore[no-untyped-call]
    """The two files made from :func:`ti_fx.export.encoder_decoder_with_cache`, with transformers' ``generate``.

    Greedy search, sampling, beam search and padded batches work as for any transformers model.

    Args:
        encoder: the encoder's file.
        decoder: the decoder's file.
        config: the model's configuration.
        generation_config: None takes what the configuration says.
        threads: threads within a node; None leaves it to ONNX Runtime.

    Raises:
        InputError: a file is missing or damaged, or is not that of an encoder or a decoder with a cache, or they are of
            two students.
    """

    def __init__(
        self,
        encoder: str | os.PathLike[str],
        decoder: str | os.PathLike[str],
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(decoder, config, generation_config, threads)
        if CROSS_KEY.format(0) not in self.runtime.inputs:
            raise InputError(f"{decoder} reads no encoder; for a causal language model use OnnxCausalLM")
        self.encoder = OnnxEncoder(encoder, threads)
        if self.encoder.runtime.metadata.get(PART_OF) != self.runtime.metadata.get(PART_OF):
            raise InputError(
                f"{encoder} and {decoder} are of two students; give the two files that were exported together"
            )
        self.main_input_name = self.encoder.main_input_name

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """What the encoder's file takes is no misspelt option."""
        taken = self.encoder.runtime.inputs
        super()._validate_model_kwargs(  # type: ignore[misc]
            {name: value for name, value in model_kwargs.items() if name not in taken}
        )

    def get_encoder(self, modality: str | None = None) -> OnnxEncoder:
        """Return the encoder, which ``generate`` runs once."""
        return self.encoder

    def forward(
        self,
        decoder_input_ids: Tensor,
        encoder_outputs: Mapping[str, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **options: Any,
    ) -> Seq2SeqLMOutput:
        """Run the decoder's new tokens after the cache.

        Args:
            decoder_input_ids: int64 ``[batch, sequence]``.
            encoder_outputs: what the encoder returned.
            attention_mask: int64 ``[batch, source]``, of the encoder's tokens; None counts every one.
            past_key_values: the cache that the last call returned; None or empty before the first token.
            options: what ``generate`` tells every model (``use_cache``, ``return_dict``), which changes nothing here.
        """
        feed: dict[str, Any] = {"decoder_input_ids": decoder_input_ids}
        feed |= {name: value for name, value in encoder_outputs.items() if name in self.runtime.inputs}
        if "attention_mask" in self.runtime.inputs:
            keys = encoder_outputs[CROSS_KEY.format(0)]
            if attention_mask is None:
                attention_mask = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.long)
            feed["attention_mask"] = attention_mask.long()
        own = None if past_key_values is None else past_key_values.self_attention_cache
        logits, cache = self._run(feed, own)
        both = EncoderDecoderCache(cache, DynamicCache())
        return Seq2SeqLMOutput(logits=logits, past_key_values=both)


class OnnxEncoder(nn.Module):
    """The file of an encoder, as ``generate`` calls it."""

    def __init__(self, path: str | os.PathLike[str], threads: int | None) -> None:
        super().__init__()
        self.runtime = Runtime(path, threads)
        if CROSS_VALUE.format(0) not in self.runtime.outputs:
            raise InputError(
                f"{path} gives no keys and values for a decoder; export both parts that "
                "ti_fx.export.encoder_decoder_with_cache returns"
            )
        self.main_input_name = next(name for name in self.runtime.inputs if not name.endswith("mask"))

    def forward(self, attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Return what the decoder's layers read: ``cross_key_0``, ... float32 ``[batch, heads, source, size]``.

        The inputs are those of the file, and options of ``generate``, which change nothing here; ``attention_mask``
        counts every token (or sample) if left out.

        Raises:
            InputError: it is left out where it can't be told how long it is.
        """
        inputs = self.runtime.inputs
        feed = {name: value for name, value in kwargs.items() if name in inputs}
        if "attention_mask" in inputs:
            if attention_mask is None:
                first = feed[self.main_input_name]
                if first.ndim != 2:
                    raise InputError(f"{self.main_input_name} needs its attention_mask; give it, too")
                attention_mask = torch.ones(first.shape, dtype=torch.long)
            feed["attention_mask"] = attention_mask.long()
        return {name: torch.from_numpy(value) for name, value in self.runtime(feed).items()}


def _filled(cache: DynamicCache | None) -> list[Any]:
    """Return the layers of a cache that hold anything."""
    layers: list[Any] = [] if cache is None else list(cache.layers)
    return [layer for layer in layers if layer.is_initialized]
