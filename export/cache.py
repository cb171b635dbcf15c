"""A causal language model that reads and returns its keys and values, so that a file of it generates token by token.

The cached graph is captured from the model itself, which knows where positions and masks go on after a cache; the
student's codes, scales, quantisers and full-precision tensors then take the model's place, so both compute the same.

inputs   input_ids [batch, sequence]                        new tokens
         attention_mask [batch, past + sequence]            1 for every token that counts
         position_ids [batch, sequence]                     where the model's forward takes them
         past_key_0, past_value_0 [batch, heads, past, size], ...   one pair a layer; past may be 0
outputs  logits [batch, sequence, vocabulary], present_key_0, present_value_0 [batch, heads, past + sequence, size], ...
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.capture import capture
from ti_fx.errors import CaptureError, ExportError, InputError
from ti_fx.export.inputs import other_sizes, resized
from ti_fx.export.student import fake_quantised, packed_weights, require_packed, weight_encodings
from ti_fx.graph import aten_name, mode, register, state, tensor
from ti_fx.passes import Pack, QuantizeActivations
from ti_fx.passes.ternarize import quantise
from ti_fx.pipeline import Pipeline
from ti_fx.program import forward_of_tensors

PAST_KEY, PAST_VALUE = "past_key_{}", "past_value_{}"
PRESENT_KEY, PRESENT_VALUE = "present_key_{}", "present_value_{}"
SEQUENCE, PAST, TOTAL = "sequence", "past", "total"
_NEW = 3  # tokens after the cache in the example of the trace


def with_cache(
    student: GraphModule, model: nn.Module, example: Mapping[str, Any]
) -> tuple[GraphModule, dict[str, Tensor]]:
    """Return the packed student of a causal language model with its cache as inputs and outputs, and inputs for it.

    Args:
        student: a packed graph of ``model``, captured without a cache.
        model: the transformers model that it was captured from; only its architecture matters.
        example: ``input_ids`` and, if there is any padding, ``attention_mask``, int64 ``[batch, length]`` of at least
            two rows and five tokens.

    Raises:
        PreconditionError: the student is not packed.
        InputError: the model has no cache of keys and values, or the example has no ``input_ids``.
        CaptureError: the model can't be captured with its cache.
        ExportError: the student's weights are not all found in the cached graph.
    """
    require_packed(student)
    with mode(model, False):
        inputs = _example(model, example)
        with _cached_forward(model, list(inputs)):
            gm = capture(model, inputs, dynamic="all").eval()
            _name_sizes(gm)
            _compare_states(gm, model, inputs)
    _become(gm, student)
    return gm, inputs


def _name_sizes(gm: GraphModule) -> None:
    """Call the cache's length ``past``, and the mask's, their sum, ``total``."""
    names = state(gm)["dims"]
    for name, index, meaning in ((PAST_KEY.format(0), 2, PAST), ("attention_mask", 1, TOTAL)):
        (node,) = (node for node in gm.graph.find_nodes(op="placeholder") if node.target == name)
        names[str(node.meta["val"].shape[index])] = meaning
    facts = state(gm)
    facts["sums"] = {TOTAL: (PAST, SEQUENCE)}
    facts["cases"] = ({PAST: 0}, {SEQUENCE: 1})
    facts["may_be_empty"] = tuple(symbol for symbol, name in names.items() if name == PAST)


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


def _example(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return inputs after a cache: the example's last tokens, and keys and values of all of them."""
    ids = example.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < _NEW:
        raise InputError(
            f"the example needs input_ids of [batch, length] with at least {_NEW} tokens for a cached graph"
        )
    mask = example.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True)
    layers = getattr(getattr(found, "past_key_values", None), "layers", None)
    if not layers or any(not isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        raise InputError(
            f"{type(model).__name__} returns no cache of keys and values; export it without a cache"
        )
    batch, past = ids.shape
    inputs = {
        "input_ids": ids[:, -_NEW:].contiguous(),
        "attention_mask": torch.cat((mask, mask[:, -_NEW:]), 1),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(past, past + _NEW).expand(batch, _NEW).contiguous()
    for index, layer in enumerate(layers):
        inputs[PAST_KEY.format(index)], inputs[PAST_VALUE.format(index)] = layer.keys, layer.values
    return inputs


@contextmanager
def _cached_forward(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Give the model a forward of tensors alone: the cache goes in and comes out as keys and values by layer."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    forward = model.forward
    count = sum(name.startswith("past_key_") for name in names)
    tokens = [name for name in names if not name.startswith("past_")]

    def cached(**inputs: Tensor) -> dict[str, Tensor]:
        cache = DynamicCache()
        for index in range(count):
            layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.keys, layer.values = inputs[PAST_KEY.format(index)], inputs[PAST_VALUE.format(index)]
            layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
            cache.layers.append(layer)
        given = {name: inputs[name] for name in tokens}
        found = forward(**given, past_key_values=cache, use_cache=True, return_dict=True)
        result = {"logits": found.logits}
        for index, layer in enumerate(found.past_key_values.layers):
            result[PRESENT_KEY.format(index)] = layer.keys
            result[PRESENT_VALUE.format(index)] = layer.values
        return result

    with forward_of_tensors(model, cached, names):
        yield


def _become(gm: GraphModule, student: GraphModule) -> None:
    """Turn a captured graph into the student: its ternary weights, its quantisers, its tensors."""
    weights = {weight.parameter: weight for weight in packed_weights(student)}
    found = {str(node.target): node for node in gm.graph.find_nodes(op="get_attr")}
    kept = {str(node.target) for node in student.graph.find_nodes(op="get_attr")}
    missing = sorted(weights.keys() - found.keys())
    if missing:
        raise ExportError(
            f"the cached graph does not read {missing[0]}; was the student captured from this model?"
        )
    both = sorted(weights.keys() & kept)
    if both:
        raise ExportError(
            f"{both[0]} is read both packed and in full precision (Ternarize(tied='embedding')); "
            "a cached graph takes tied='both'"
        )
    for name, weight in weights.items():
        quantise(found[name], "row" if tensor(student, weight.scale_name).dim() else "tensor")
    Pipeline(_quantisers(student), Pack())(gm)
    for weight in weights.values():
        for target in (weight.codes_name, weight.scale_name):
            register(gm, target, tensor(student, target))
    for name in found.keys() & kept:
        if name in dict(student.named_parameters()) or name in dict(student.named_buffers()):
            register(gm, name, tensor(student, name))
    recipe = state(student).get("recipe")
    if recipe is not None:
        state(gm)["recipe"] = recipe


def _quantisers(student: GraphModule) -> QuantizeActivations:
    """Return the pass that gives a graph the student's activation quantisers."""
    encodings = weight_encodings(student)
    names = list(dict.fromkeys(encoding.name for encoding in encodings.values()))
    attention = any(
        aten_name(reader) in ("matmul", "bmm")
        and all(fake_quantised(source) for source in reader.all_input_nodes)
        for node in student.graph.nodes
        if fake_quantised(node)
        for reader in node.users
    )
    others = {name: one.name for name, one in encodings.items() if one.name != names[0]}
    return QuantizeActivations(names[0], attention=attention, encodings=others)
