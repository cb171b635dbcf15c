"""Generate text with an exported causal language model: transformers' own ``generate`` around ONNX Runtime."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ti_fx.errors import InputError
from ti_fx.export.cache import PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE
from ti_fx.export.runtime import Runtime


class OnnxCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A file made from :func:`ti_fx.export.with_cache`, with transformers' ``generate``.

    Greedy search, sampling, beam search and batches padded on the left work as for any transformers model.

    >>> OnnxCausalLM("student.onnx", config).generate(**tokenizer(text, return_tensors="pt"))  # doctest: +SKIP

    Args:
        path: the file.
        config: the model's configuration.
        generation_config: None takes what the configuration says.
        threads: threads within a node; None leaves it to ONNX Runtime.

    Raises:
        InputError: the file is missing or damaged, or has no cache.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None = None,
        threads: int | None = None,
    ) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"  # nothing here attends; any other must be declared by the class
        super().__init__(config)
        self.runtime = Runtime(path, threads)
        names = self.runtime.inputs
        self.layers = sum(name.startswith("past_key_") for name in names)
        if not self.layers:
            raise InputError(
                f"{path} has no cache of keys and values; export what ti_fx.export.with_cache returns"
            )
        self.generation_config = copy.deepcopy(
            generation_config or GenerationConfig.from_model_config(config)
        )
        self.generation_config.use_cache = True  # what the file is for, whatever training had

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    @classmethod
    def can_generate(cls) -> bool:
        """Always."""
        return True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Run the new tokens after the cache.

        Args:
            input_ids: int64 ``[batch, sequence]``.
            attention_mask: int64 ``[batch, past + sequence]``; None counts every token.
            position_ids: int64 ``[batch, sequence]``; None counts on from the cache, as far as the mask counts tokens.
            past_key_values: the cache that the last call returned; None or empty before the first token.
            options: what ``generate`` tells every model (``use_cache``, ``return_dict``), which changes nothing here.
        """
        batch, length = input_ids.shape
        layers: list[Any] = [] if past_key_values is None else list(past_key_values.layers)
        past = [layer for layer in layers if layer.is_initialized]
        before = past[0].keys.shape[2] if past else 0
        if attention_mask is None:
            attention_mask = torch.ones(batch, before + length, dtype=torch.long)
        feed: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
        if "position_ids" in self.runtime.inputs:
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            feed["position_ids"] = position_ids.expand(batch, length)
        for index in range(self.layers):
            for name, part in ((PAST_KEY, "keys"), (PAST_VALUE, "values")):
                shape = self.runtime.inputs[name.format(index)].shape
                feed[name.format(index)] = (
                    getattr(past[index], part)
                    if past
                    else np.zeros((batch, shape[1], 0, shape[3]), np.float32)
                )
        found = self.runtime(feed)
        cache = DynamicCache()
        for index in range(self.layers):
            keys, values = (found[name.format(index)] for name in (PRESENT_KEY, PRESENT_VALUE))
            cache.update(torch.from_numpy(keys), torch.from_numpy(values), index)
        return CausalLMOutputWithPast(logits=torch.from_numpy(found["logits"]), past_key_values=cache)
