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
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.capture import capture
from ti_fx.errors import CaptureError, ExportError, InputError
from ti_fx.export.inputs import other_sizes, resized
from ti_fx.export.student import fake_quantised, packed_weights, require_packed, weight_encodings
from ti_fx.graph import aten_name, mode, prune, register, state, tensor
from ti_fx.metadata import move_to_cpu
from ti_fx.passes import Pack, QuantizeActivations
from ti_fx.passes.pack import half_name
from ti_fx.passes.ternarize import quantise
from ti_fx.pipeline import Pipeline
from ti_fx.program import forward_of_tensors

PAST_KEY, PAST_VALUE = "past_key_{}", "past_value_{}"
PRESENT_KEY, PRESENT_VALUE = "present_key_{}", "present_value_{}"
CROSS_KEY, CROSS_VALUE = "cross_key_{}", "cross_value_{}"
SEQUENCE, PAST, TOTAL, SOURCE = "sequence", "past", "total", "source"
_NEW = 3  # tokens after the cache in the example of the trace

Forward = Callable[..., dict[str, Tensor]]


def cached_layers(inputs: Collection[str]) -> int:
    """Return how many layers' keys and values are among a graph's inputs: 0 of one without a cache."""
    layers = 0
    while PAST_KEY.format(layers) in inputs:
        layers += 1
    return layers


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
        cached = _captured(model, _causal_example(model, example), _causal_forward(model))
    missing = _become(cached.gm, student)
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
        source, given = _both_examples(model, example)
        encoder = _captured(model, source, _encoder_forward(model))
        decoder = _captured(model, given, _decoder_forward(model))
    missing = set(_become(encoder.gm, student)) & set(_become(decoder.gm, student))
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


def _causal_example(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return inputs after a cache: the example's last tokens, and keys and values of all of them."""
    ids = _token_ids(example, "input_ids")
    mask = example.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    # without values, only the cache's shapes matter, and transformers can't look into a mask
    given = (
        {"input_ids": ids.to("meta")}
        if _without_values(model)
        else {"input_ids": ids, "attention_mask": mask}
    )
    with torch.no_grad():
        found = model(**given, use_cache=True, return_dict=True)
    layers = _layers(model, getattr(found, "past_key_values", None))
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
        for name, value in _flat(layers, PAST_KEY, PAST_VALUE).items()
    }
    return inputs | past_values


def _both_examples(
    model: nn.Module, example: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the encoder's inputs, and the decoder's after a cache."""
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
    past = _layers(model, getattr(cache, "self_attention_cache", None))
    cross = _layers(model, getattr(cache, "cross_attention_cache", None))
    given = {"decoder_input_ids": ids[:, -_NEW:].contiguous()}
    if "input_ids" in source:  # padding in other sources (frames, patches) is the encoder's business alone
        given["attention_mask"] = source["attention_mask"]
    return source, given | _flat(cross, CROSS_KEY, CROSS_VALUE) | _flat(past, PAST_KEY, PAST_VALUE)


def _token_ids(example: Mapping[str, Any], name: str) -> Tensor:
    ids = example.get(name)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < _NEW:
        raise InputError(
            f"the example needs {name} of [batch, length] with at least {_NEW} tokens for a cached graph"
        )
    return ids


def _layers(model: nn.Module, cache: Any) -> list[Any]:
    layers = list(getattr(cache, "layers", ()))
    if not layers or any(not isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        raise InputError(
            f"{type(model).__name__} returns no cache of keys and values; export it without a cache"
        )
    return layers


def _flat(layers: list[Any], key: str, value: str) -> dict[str, Tensor]:
    """Return the keys and values of a cache's layers by name."""
    found = {}
    for index, layer in enumerate(layers):
        found[key.format(index)], found[value.format(index)] = layer.keys, layer.values
    return found


def _cache(inputs: Mapping[str, Tensor], key: str, value: str) -> Any:
    """Return the transformers cache that holds these keys and values."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    index = 0
    while key.format(index) in inputs:
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.keys, layer.values = inputs[key.format(index)], inputs[value.format(index)]
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
        cache.layers.append(layer)
        index += 1
    return cache


def _causal_forward(model: nn.Module) -> Forward:
    """Return a forward of tensors alone: the cache goes in and comes out as keys and values by layer."""
    forward = model.forward

    def cached(**inputs: Tensor) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if not name.startswith("past_")}
        cache = _cache(inputs, PAST_KEY, PAST_VALUE)
        found = forward(**given, past_key_values=cache, use_cache=True, return_dict=True)
        return {"logits": found.logits, **_flat(found.past_key_values.layers, PRESENT_KEY, PRESENT_VALUE)}

    return cached


def _encoder_forward(model: nn.Module) -> Forward:
    """Return a forward that gives what the decoder's layers read of the encoder; the decoder itself is dead code."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    forward = model.forward

    def encoded(**inputs: Tensor) -> dict[str, Tensor]:
        first = next(iter(inputs.values()))
        start = torch.zeros(first.shape[0], 1, dtype=torch.long, device=first.device)
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        forward(**inputs, decoder_input_ids=start, past_key_values=cache, use_cache=True, return_dict=True)
        return _flat(cache.cross_attention_cache.layers, CROSS_KEY, CROSS_VALUE)

    return encoded


def _decoder_forward(model: nn.Module) -> Forward:
    """Return a forward of the decoder alone, which reads the encoder's keys and values and never its states."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    forward = model.forward
    config: Any = model.config

    def cached(**inputs: Tensor) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if not name.startswith(("past_", "cross_"))}
        cross = _cache(inputs, CROSS_KEY, CROSS_VALUE)
        cache: Any = EncoderDecoderCache(_cache(inputs, PAST_KEY, PAST_VALUE), DynamicCache())
        cache.cross_attention_cache = cross
        cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        keys = cross.layers[0].keys
        states = keys.new_zeros(keys.shape[0], keys.shape[2], config.hidden_size)  # for its shape alone
        found = forward(
            **given,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        layers = found.past_key_values.self_attention_cache.layers
        return {"logits": found.logits, **_flat(layers, PRESENT_KEY, PRESENT_VALUE)}

    return cached


def _become(gm: GraphModule, student: GraphModule) -> list[str]:
    """Turn a captured graph into the student: its ternary weights, its quantisers, its tensors.

    Returns the student's ternary parameters that the graph does not read.
    """
    weights = {weight.parameter: weight for weight in packed_weights(student)}
    found = {str(node.target): node for node in gm.graph.find_nodes(op="get_attr")}
    kept = {str(node.target) for node in student.graph.find_nodes(op="get_attr")}
    missing = sorted(weights.keys() - found.keys())
    weights = {name: weight for name, weight in weights.items() if name in found}
    both = sorted(weights.keys() & kept)
    if both:
        raise ExportError(
            f"{both[0]} is read both packed and in full precision (Ternarize(tied='embedding')); "
            "a cached graph takes tied='both'"
        )
    for name, weight in weights.items():
        quantise(found[name], "row" if tensor(student, weight.scale_name).dim() else "tensor")
    halves = False
    for name in found.keys() - weights.keys():
        half = half_name(name)
        if name in kept:
            register(gm, name, tensor(student, name))
        elif half in kept:
            halves = True
            register(gm, name, nn.Parameter(tensor(student, half).float(), requires_grad=False))
        elif isinstance(tensor(gm, name), nn.Parameter):
            raise ExportError(f"the cached graph reads {name}, and the student does not; is this its model?")
    Pipeline(_quantisers(student, weights), Pack(kept="float16" if halves else "float32"))(gm)
    for weight in weights.values():
        for target in (weight.codes_name, weight.scale_name):
            register(gm, target, tensor(student, target))
    recipe = state(student).get("recipe")
    if recipe is not None:
        state(gm)["recipe"] = recipe
    return missing


def _quantisers(student: GraphModule, weights: Collection[str]) -> QuantizeActivations:
    """Return the pass that gives a graph with these weights the student's activation quantisers."""
    encodings = {name: one.name for name, one in weight_encodings(student).items() if name in weights}
    attention = any(
        aten_name(reader) in ("matmul", "bmm")
        and all(fake_quantised(source) for source in reader.all_input_nodes)
        for node in student.graph.nodes
        if fake_quantised(node)
        for reader in node.users
    )
    most = next(iter(encodings.values()), "float")
    others = {name: one for name, one in encodings.items() if one != most}
    return QuantizeActivations(most, attention=attention, encodings=others)
