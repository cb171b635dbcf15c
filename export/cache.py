"""A language model that reads and returns its keys and values, so that a file of it generates token by token.

The cached graph is captured from the model itself, which knows where positions and masks go on after a cache; the
student's codes, scales, quantisers and full-precision tensors then take the model's place, so both compute the same.

A causal language model is one graph:

inputs   input_ids [batch, sequence]                        new tokens
         attention_mask [batch, past + sequence]            1 for every token that counts
         position_ids [batch, sequence]                     where the model's forward takes them
         past_key_0, past_value_0 [batch, heads, past, size], ...   one pair a layer; past may be 0
outputs  logits [batch, sequence, vocabulary], present_key_0, present_value_0 [batch, heads, past + sequence, size], ...

An encoder-decoder is two, so that what the decoder reads of the encoder is computed once:

encoder  input_ids, attention_mask [batch, source] (or what else the model encodes)
         -> cross_key_0, cross_value_0 [batch, heads, source, size], ...   one pair for each layer of the decoder
decoder  decoder_input_ids [batch, sequence], attention_mask [batch, source], cross_key_0, ..., past_key_0, ...
         -> logits, present_key_0, ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.capture import capture
from ti_fx.errors import CaptureError, ExportError, InputError
from ti_fx.export.inputs import other_sizes, resized
from ti_fx.export.states import (
    CROSS_KEY,
    CROSS_VALUE,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
    Keeping,
    by_name,
    empty_cache,
    filled_cache,
    keeping_layers,
)
from ti_fx.export.student import require_packed
from ti_fx.export.transfer import become
from ti_fx.graph import mode, prune, register, state
from ti_fx.metadata import move_to_cpu
from ti_fx.program import forward_of_tensors

SEQUENCE, PAST, TOTAL, SOURCE = "sequence", "past", "total", "source"
_NEW = 3  # tokens after the cache in the example of the trace
# A token's logits after a cache and without one: two orders of the same sums, relative to the largest.
SAME = 1e-3

Forward = Callable[..., dict[str, Tensor]]


class CachedGraph(NamedTuple):
    """A graph with keys and values as inputs or outputs, and inputs for it."""

    gm: GraphModule
    inputs: dict[str, Tensor]


class EncoderDecoder(NamedTuple):
    """The two graphs of an encoder-decoder."""

    encoder: CachedGraph
    decoder: CachedGraph


def with_cache(student: GraphModule, model: nn.Module, example: Mapping[str, Any]) -> CachedGraph:
    """Return the packed student of a causal language model with its cache as inputs and outputs, and inputs for it.

    Args:
        student: a packed graph of ``model``, captured without a cache.
        model: the transformers model that it was captured from; only its architecture matters, and it may be without
            values, on the meta device (then its cached graph is not compared with it).
        example: ``input_ids`` and, if there is any padding, ``attention_mask``, int64 ``[batch, length]`` of at least
            two rows and five tokens.

    Raises:
        PreconditionError: the student is not packed.
        InputError: the model has no cache of keys and values, or the example has no ``input_ids``.
        CaptureError: the model can't be captured with its cache.
        ExportError: the student's weights are not all found in the cached graph.
    """
    require_packed(student)
    if _is_encoder_decoder(model):
        raise InputError(
            f"{type(model).__name__} has an encoder; use ti_fx.export.encoder_decoder_with_cache"
        )
    with mode(model, False):
        inputs, keeping = _causal_example(model, example)
        cached = _captured(model, inputs, _causal_forward(model, keeping))
    missing = become(cached.gm, student)
    if missing:
        raise ExportError(
            f"the cached graph does not read {missing[0]}; was the student captured from this model?"
        )
    return cached


def encoder_decoder_with_cache(
    student: GraphModule, model: nn.Module, example: Mapping[str, Any]
) -> EncoderDecoder:
    """Return the packed student of an encoder-decoder as two graphs that hand keys and values on, and their inputs.

    Args:
        student: a packed graph of ``model``, captured without a cache.
        model: the transformers model that it was captured from; only its architecture matters.
        example: what the student was captured with: the encoder's inputs, and ``decoder_input_ids``, int64
            ``[batch, length]`` of at least two rows and five tokens.

    Raises:
        PreconditionError: the student is not packed.
        InputError: the model has no cache of both attentions, or the example has no ``decoder_input_ids``.
        CaptureError: a part can't be captured.
        ExportError: the student's weights are not all found in the two graphs.
    """
    require_packed(student)
    if not _is_encoder_decoder(model):
        raise InputError(f"{type(model).__name__} is no encoder-decoder; use ti_fx.export.with_cache")
    with mode(model, False):
        source, given, states = _both_examples(model, example)
        encoder = _captured(model, source, _encoder_forward(model, states))
        decoder = _captured(model, given, _decoder_forward(model, states))
    missing = set(become(encoder.gm, student)) & set(become(decoder.gm, student))
    if missing:
        raise ExportError(
            f"neither cached graph reads {min(missing)}; was the student captured from this model?"
        )
    return EncoderDecoder(encoder, decoder)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _captured(model: nn.Module, inputs: dict[str, Tensor], forward: Forward) -> CachedGraph:
    with forward_of_tensors(model, forward, list(inputs)):
        gm = capture(model, inputs, dynamic="all").eval()
        _name_sizes(gm)
        if _without_values(model):
            _stand_in(gm)
        else:
            _compare_states(gm, model, inputs)
    return CachedGraph(gm, inputs)


def _without_values(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _stand_in(gm: GraphModule) -> None:
    """Let zeros, of four bytes in all, stand in for each tensor without values until it becomes the student's."""
    prune(gm)  # gives it containers of its own
    for name, stored in [*gm.named_parameters(), *gm.named_buffers()]:
        if stored.is_meta:
            zeros = torch.zeros((), dtype=stored.dtype).expand(stored.shape)
            is_parameter = isinstance(stored, nn.Parameter)
            register(gm, name, nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros)
    move_to_cpu(gm)


def _name_sizes(gm: GraphModule) -> None:
    """Call the cache's length ``past``, a causal model's mask's, their sum, ``total``, and the encoder's ``source``."""
    facts = state(gm)
    names = facts["dims"]
    shapes = {str(node.target): node.meta["val"].shape for node in gm.graph.find_nodes(op="placeholder")}
    meanings = [
        ("decoder_input_ids", 1, SEQUENCE),
        (CROSS_KEY.format(0), 2, SOURCE),
        (PAST_KEY.format(0), 2, PAST),
    ]
    if PAST_KEY.format(0) in shapes and CROSS_KEY.format(0) not in shapes:
        meanings.append(("attention_mask", 1, TOTAL))
        facts["sums"] = {TOTAL: (PAST, SEQUENCE)}
    for name, index, meaning in meanings:
        if name in shapes and str(shapes[name][index]) in names:
            names[str(shapes[name][index])] = meaning
    if PAST_KEY.format(0) in shapes:
        facts["cases"] = ({PAST: 0}, {SEQUENCE: 1}, {PAST: 0, SEQUENCE: 1})
    least = {PAST: 0, TOTAL: 1}
    facts["smallest"] = {symbol: least[name] for symbol, name in names.items() if name in least}


def _compare_states(gm: GraphModule, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Compare graph and model before the first token and at a single one: the trace took all sizes for at least 2."""
    for sizes in other_sizes(gm, inputs):
        given = resized(gm, inputs, sizes)
        with torch.no_grad():
            expected, found = model(**given), gm(**given)
        for name, value in expected.items():
            if not torch.allclose(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max())):
                raise CaptureError(
                    f"the cached graph of {type(model).__name__} differs from the model in {name} at "
                    + ", ".join(f"{key}={size}" for key, size in sizes.items())
                )


def _causal_example(model: nn.Module, example: Mapping[str, Any]) -> tuple[dict[str, Tensor], Keeping]:
    """Return the example's last tokens after a cache of all of them, and which layers keep what is in it."""
    ids = _token_ids(example, "input_ids")
    mask = example.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        if _without_values(model):  # only the cache's shapes matter, and transformers can't look into a mask
            found = model(input_ids=ids.to("meta"), use_cache=True, return_dict=True)
            keeping = keeping_layers(model, getattr(found, "past_key_values", None))
            cache = empty_cache(keeping)
            model(input_ids=ids.to("meta"), past_key_values=cache, use_cache=True)
        else:
            found = model(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True)
            keeping = keeping_layers(model, getattr(found, "past_key_values", None))
            cache = empty_cache(keeping)
            model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
            last = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
            _require_same(model, last["logits"][:, -1], found["logits"][:, -1])
    batch, past = ids.shape
    inputs = {
        "input_ids": ids[:, -_NEW:].contiguous(),
        "attention_mask": torch.cat((mask, mask[:, -_NEW:]), 1),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(past, past + _NEW).expand(batch, _NEW).contiguous()
    random = torch.Generator().manual_seed(0)
    past_values = {
        name: torch.randn(value.shape, dtype=value.dtype, generator=random) if value.is_meta else value
        for name, value in by_name(cache, PAST_KEY, PAST_VALUE).items()
    }
    return inputs | past_values, keeping


def _require_same(model: nn.Module, found: Tensor, expected: Tensor) -> None:
    """Refuse a model that gives a token other logits after a cache than without one.

    Raises:
        InputError: it does.
    """
    gap = float((found - expected).abs().max() / expected.abs().max())
    if not gap <= SAME:
        raise InputError(
            f"{type(model).__name__} gives a token other logits after a cache than without one (relative {gap:.1e}), "
            "so more is kept between tokens than keys and values; export it without a cache"
        )


class _States(NamedTuple):
    """What an encoder-decoder keeps.

    Attributes:
        own: which of the decoder's layers keep keys and values of the decoder's tokens.
        cross: which keep those of the encoder's states.
        width: numbers in one of the encoder's states.
    """

    own: Keeping
    cross: Keeping
    width: int


def _both_examples(
    model: nn.Module, example: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], _States]:
    """Return the encoder's inputs, the decoder's after a cache, and what is kept."""
    from transformers.cache_utils import EncoderDecoderCache

    ids = _token_ids(example, "decoder_input_ids")
    source = {
        name: value
        for name, value in example.items()
        if isinstance(value, Tensor) and name != "labels" and not name.startswith("decoder_")
    }
    if "input_ids" in source and "attention_mask" not in source:
        source["attention_mask"] = torch.ones_like(source["input_ids"])
    with torch.no_grad():
        found = model(**source, decoder_input_ids=ids, use_cache=True, return_dict=True)
        cache = getattr(found, "past_key_values", None)
        states = _States(
            keeping_layers(model, getattr(cache, "self_attention_cache", None)),
            keeping_layers(model, getattr(cache, "cross_attention_cache", None)),
            found["encoder_last_hidden_state"].shape[-1],
        )
        cache = EncoderDecoderCache(empty_cache(states.own), empty_cache(states.cross))
        model(**source, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    given = {"decoder_input_ids": ids[:, -_NEW:].contiguous()}
    if "input_ids" in source:  # padding in other sources (frames, patches) is the encoder's business alone
        given["attention_mask"] = source["attention_mask"]
    given |= by_name(cache.cross_attention_cache, CROSS_KEY, CROSS_VALUE)
    return source, given | by_name(cache.self_attention_cache, PAST_KEY, PAST_VALUE), states


def _token_ids(example: Mapping[str, Any], name: str) -> Tensor:
    ids = example.get(name)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < _NEW:
        raise InputError(
            f"the example needs {name} of [batch, length] with at least {_NEW} tokens for a cached graph"
        )
    return ids


def _causal_forward(model: nn.Module, keeping: Keeping) -> Forward:
    """Return a forward of tensors alone: the cache goes in and comes out as keys and values by layer."""
    forward = model.forward

    def cached(**inputs: Tensor) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if not name.startswith("past_")}
        cache = filled_cache(keeping, inputs, PAST_KEY, PAST_VALUE)
        found = forward(**given, past_key_values=cache, use_cache=True, return_dict=True)
        return {"logits": found.logits, **by_name(cache, PRESENT_KEY, PRESENT_VALUE)}

    return cached


def _encoder_forward(model: nn.Module, states: _States) -> Forward:
    """Return a forward that gives what the decoder's layers read of the encoder; the decoder itself is dead code."""
    from transformers.cache_utils import EncoderDecoderCache

    forward = model.forward

    def encoded(**inputs: Tensor) -> dict[str, Tensor]:
        first = next(iter(inputs.values()))
        start = torch.zeros(first.shape[0], 1, dtype=torch.long, device=first.device)
        cache: Any = EncoderDecoderCache(empty_cache(states.own), empty_cache(states.cross))
        forward(**inputs, decoder_input_ids=start, past_key_values=cache, use_cache=True, return_dict=True)
        return by_name(cache.cross_attention_cache, CROSS_KEY, CROSS_VALUE)

    return encoded


def _decoder_forward(model: nn.Module, kept: _States) -> Forward:
    """Return a forward of the decoder alone, which reads the encoder's keys and values and never its states."""
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    forward = model.forward

    def cached(**inputs: Tensor) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if not name.startswith(("past_", "cross_"))}
        own = filled_cache(kept.own, inputs, PAST_KEY, PAST_VALUE)
        cache: Any = EncoderDecoderCache(own, empty_cache(kept.cross))
        cache.cross_attention_cache = filled_cache(kept.cross, inputs, CROSS_KEY, CROSS_VALUE)
        cache.is_updated = dict.fromkeys(range(len(kept.cross)), True)
        keys = inputs[CROSS_KEY.format(0)]
        states = keys.new_zeros(keys.shape[0], keys.shape[2], kept.width)  # for its shape alone
        found = forward(
            **given,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return {"logits": found.logits, **by_name(own, PRESENT_KEY, PRESENT_VALUE)}

    return cached
