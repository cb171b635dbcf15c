"""Graphs with a cache name their keys and values here, and turn them into transformers' caches and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ti_fx.errors import InputError

PAST_KEY, PAST_VALUE = "past_key_{}", "past_value_{}"
PRESENT_KEY, PRESENT_VALUE = "present_key_{}", "present_value_{}"
CROSS_KEY, CROSS_VALUE, CROSS_MASK = "cross_key_{}", "cross_value_{}", "cross_mask"

# For each layer of a model, whether it keeps keys and values of its own. Graphs and files number those that do.
Keeping = tuple[bool, ...]


def cached_layers(inputs: Collection[str]) -> int:
    """Return how many layers' keys and values are among a graph's inputs: 0 of one without a cache."""
    layers = 0
    while PAST_KEY.format(layers) in inputs:
        layers += 1
    return layers


def own_layers(cache: Any) -> list[Any]:
    """Return a cache's layers; of a pair, which decoders make that could read an encoder, those of its own tokens."""
    return list(getattr(getattr(cache, "self_attention_cache", cache), "layers", ()))


def keeping_layers(model: nn.Module, cache: Any) -> Keeping:
    """Return which layers keep keys and values, from the cache that the model itself made.

    Raises:
        InputError: the model made no cache, or a layer keeps anything else (the state of a recurrence, an index).
    """
    from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

    layers = own_layers(cache)
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise InputError(
                f"layer {index} of {type(model).__name__} keeps other states than keys and values "
                f"({type(layer).__name__}); export it without a cache"
            )
    keeping = tuple(isinstance(layer.keys, Tensor) for layer in layers)
    if not any(keeping):
        is_encoder = getattr(getattr(model, "config", None), "is_decoder", None) is False
        raise InputError(
            f"{type(model).__name__} returns no cache of keys and values; "
            + ("build it with is_decoder=True in its configuration, or " if is_encoder else "")
            + "export it without a cache"
        )
    return keeping


def empty_cache(keeping: Keeping) -> Any:
    """Return a cache in which each layer keeps every key and value: what a window hides, the mask hides.

    (transformers' own caches drop what has left a layer's window, so that layers differ in length.)
    """
    from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer

    cache = DynamicCache()
    cache.layers = [DynamicLayer() if kept else DummyLayer() for kept in keeping]  # type: ignore[no-untyped-call]
    return cache


def filled_cache(keeping: Keeping, inputs: Mapping[str, Tensor], key: str, value: str) -> Any:
    """Return the transformers cache that holds these keys and values."""
    cache = empty_cache(keeping)
    for index, layer in enumerate(_kept(cache)):
        layer.keys, layer.values = inputs[key.format(index)], inputs[value.format(index)]
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
    return cache


def by_name(cache: Any, key: str, value: str) -> dict[str, Tensor]:
    """Return the keys and values that a cache holds, by name."""
    found = {}
    for index, layer in enumerate(_kept(cache)):
        found[key.format(index)], found[value.format(index)] = layer.keys, layer.values
    return found


def _kept(cache: Any) -> list[Any]:
    from transformers.cache_utils import DynamicLayer

    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
