"""``encoder_decoder_with_cache`` splits an encoder-decoder into two graphs, so that the encoder runs once.

encoder  input_ids, attention_mask [batch, source] (or what else the model encodes)
         -> cross_key_0, cross_value_0 [batch, heads, source, size], ...   one pair for each layer of the decoder
            cross_mask [batch, source]    where the model makes the mask of the encoder's states itself (of audio)
decoder  decoder_input_ids [batch, sequence], attention_mask [batch, source] or cross_mask, cross_key_0, ...,
         past_key_0, ...
         -> logits, present_key_0, ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import ExportError, InputError
from ti_fx.export.cached.become_student import become
from ti_fx.export.cached.causal import (
    NEW,
    CachedGraph,
    Forward,
    captured,
    is_encoder_decoder,
    run_with_cache,
    stand_ins,
    token_ids,
    without_values,
)
from ti_fx.export.cached.names import (
    CROSS_KEY,
    CROSS_MASK,
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
from ti_fx.export.file.metadata import tensors_hash
from ti_fx.export.student import require_packed
from ti_fx.ir.edit import mode
from ti_fx.ir.facts import record_facts

_MASK = "encoder_attention_mask"  # what transformers' decoders call the mask of the encoder's states


class EncoderDecoder(NamedTuple):
    """The two graphs of an encoder-decoder."""

    encoder: CachedGraph
    decoder: CachedGraph


def encoder_decoder_with_cache(
    student: GraphModule, model: nn.Module, example: Mapping[str, Any]
) -> EncoderDecoder:
    """Return the packed student of an encoder-decoder as two graphs that hand keys and values on, and their inputs.

    Args:
        student: a packed graph of ``model``, captured without a cache.
        model: the transformers model that it was captured from; only its architecture matters, and it may be without
            values, on the meta device (then its cached graphs are not compared with it).
        example: what the student was captured with: the encoder's inputs, and ``decoder_input_ids``, int64
            ``[batch, length]`` of at least two rows and five tokens.

    Raises:
        PreconditionError: the student is not packed.
        InputError: the model has no cache of both attentions, or the example has no ``decoder_input_ids``.
        CaptureError: a part can't be captured.
        ExportError: the student's weights are not all found in the two graphs.
    """
    require_packed(student)
    if not is_encoder_decoder(model):
        raise InputError(f"{type(model).__name__} is no encoder-decoder; use ti_fx.export.with_cache")
    with mode(model, False):
        source, given, states = _both_examples(model, example)
        encoder = captured(model, source, _encoder_forward(model, states), "auto")  # images keep their sizes
        decoder = captured(model, given, _decoder_forward(model, states))
    missing = set(become(encoder.gm, student)) & set(become(decoder.gm, student))
    if missing:
        raise ExportError(
            f"neither cached graph reads {min(missing)}; was the student captured from this model?"
        )
    whole = tensors_hash(student)
    for part in (encoder, decoder):
        record_facts(part.gm, part_of=whole)
    return EncoderDecoder(encoder, decoder)


class _States(NamedTuple):
    """What an encoder-decoder keeps.

    Attributes:
        own: which of the decoder's layers keep keys and values of the decoder's tokens.
        cross: which keep those of the encoder's states.
        made: what the encoder returned for the example; its first field has the states.
        masked: the module that is given a mask of those states which the model made itself; None if it makes none.
    """

    own: Keeping
    cross: Keeping
    made: Any
    masked: nn.Module | None


def _both_examples(
    model: nn.Module, example: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], _States]:
    """Return the encoder's inputs, the decoder's after a cache, and what is kept."""
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    ids = token_ids(example, "decoder_input_ids")
    source = {
        name: value
        for name, value in example.items()
        if isinstance(value, Tensor) and name != "labels" and not name.startswith("decoder_")
    }
    if "input_ids" in source and "attention_mask" not in source:
        source["attention_mask"] = torch.ones_like(source["input_ids"])
    given = source
    if without_values(model):  # only shapes matter, and transformers can't look into a mask
        given = {name: value.to("meta") for name, value in source.items() if name != "attention_mask"}
        ids = ids.to("meta")
    masks: list[tuple[nn.Module, Tensor]] = []
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            stack.enter_context(_mask_of_states(module, partial(_noted, masks, module)))
        decode = partial(run_with_cache, model, **_encoded(model, given), decoder_input_ids=ids)
        found = decode()
        cache = getattr(found, "past_key_values", None)
        own = keeping_layers(model, getattr(cache, "self_attention_cache", None))
        cross = keeping_layers(model, getattr(cache, "cross_attention_cache", None))
        cache = EncoderDecoderCache(empty_cache(own), empty_cache(cross))
        decode(past_key_values=cache)
    made = decode.keywords.get("encoder_outputs") or BaseModelOutput(found["encoder_last_hidden_state"])
    masked, mask = masks[0] if masks else (None, None)  # the outermost module is the first
    inputs = {"decoder_input_ids": example["decoder_input_ids"][:, -NEW:].contiguous()}
    if mask is None or torch.equal(mask, source.get("attention_mask", mask.new_zeros(0))):
        masked = None
        if mask is not None or "input_ids" in source:
            inputs["attention_mask"] = source["attention_mask"]
    else:
        inputs[CROSS_MASK] = mask
    inputs |= stand_ins(by_name(cache.cross_attention_cache, CROSS_KEY, CROSS_VALUE))
    inputs |= stand_ins(by_name(cache.self_attention_cache, PAST_KEY, PAST_VALUE))
    return source, inputs, _States(own, cross, made, masked)


def _encoded(model: nn.Module, source: Mapping[str, Tensor]) -> dict[str, Any]:
    """Run the encoder alone, as ``generate`` does, and return what the model is called with for its decoder.

    Where the encoder takes only a part of the inputs (texts, and images are embedded before it), those are returned.
    """
    encoder: Any = model.get_encoder()  # type: ignore[operator]
    taken = inspect.signature(encoder.forward).parameters
    if any(name not in taken and not name.endswith("mask") for name in source):
        return dict(source)
    given = {name: value for name, value in source.items() if name in taken or "kwargs" in taken}
    made = encoder(**given, return_dict=True)
    mask = {name: value for name, value in source.items() if name == "attention_mask"}
    return {"encoder_outputs": made, **mask}


def _noted(masks: list[tuple[nn.Module, Tensor]], module: nn.Module, mask: Any) -> Any:
    if isinstance(mask, Tensor):
        masks.append((module, mask))
    return mask


@contextmanager
def _mask_of_states(module: nn.Module | None, change: Callable[[Any], Any]) -> Iterator[None]:
    """Give a module another mask of the encoder's states than the one it is called with."""

    def changed(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> Any:
        return arguments, (
            keywords if _MASK not in keywords else {**keywords, _MASK: change(keywords[_MASK])}
        )

    if module is None:
        yield
        return
    registered = module.register_forward_pre_hook(changed, with_kwargs=True)
    try:
        yield
    finally:
        registered.remove()


def _encoder_forward(model: nn.Module, states: _States) -> Forward:
    """Return a forward that gives what the decoder's layers read of the encoder; the decoder itself is dead code."""
    from transformers.cache_utils import EncoderDecoderCache

    forward = model.forward

    def encoded(**inputs: Tensor) -> dict[str, Tensor]:
        first = next(iter(inputs.values()))
        start = torch.zeros(first.shape[0], 1, dtype=torch.long, device=first.device)
        cache: Any = EncoderDecoderCache(empty_cache(states.own), empty_cache(states.cross))
        masks: list[tuple[nn.Module, Tensor]] = []
        with _mask_of_states(states.masked, lambda mask: _noted(masks, model, mask)):
            given = _encoded(model, inputs)
            forward(**given, decoder_input_ids=start, past_key_values=cache, use_cache=True, return_dict=True)
        kept = by_name(cache.cross_attention_cache, CROSS_KEY, CROSS_VALUE)
        return {**kept, CROSS_MASK: masks[0][1]} if masks else kept

    return encoded


def _decoder_forward(model: nn.Module, kept: _States) -> Forward:
    """Return a forward of the decoder alone, which reads the encoder's keys and values and never its states."""
    from transformers.cache_utils import EncoderDecoderCache

    forward = model.forward

    def cached(**inputs: Tensor) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if not name.startswith(("past_", "cross_"))}
        mask = inputs.get(CROSS_MASK)
        own = filled_cache(kept.own, inputs, PAST_KEY, PAST_VALUE)
        cache: Any = EncoderDecoderCache(own, empty_cache(kept.cross))
        cache.cross_attention_cache = filled_cache(kept.cross, inputs, CROSS_KEY, CROSS_VALUE)
        cache.is_updated = dict.fromkeys(range(len(kept.cross)), True)
        keys = inputs[CROSS_KEY.format(0)]
        width = kept.made[0].shape[-1]
        # for its shape alone
        states = type(kept.made)(last_hidden_state=keys.new_zeros(keys.shape[0], keys.shape[2], width))
        states.attention_mask = mask  # some encoders give it
        with _mask_of_states(kept.masked, lambda _: mask):
            found = forward(
                **given, encoder_outputs=states, past_key_values=cache, use_cache=True, return_dict=True
            )
        return {"logits": found.logits, **by_name(own, PRESENT_KEY, PRESENT_VALUE)}

    return cached
