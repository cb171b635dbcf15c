"""``with_cache`` gives a causal language model's graph its keys and values as inputs and outputs, for generation.

The cached graph is captured from the model itself, which knows where positions and masks go on after a cache; the
student's codes, scales, quantisers and full-precision tensors then take the model's place, so both compute the same.

A causal language model is one graph:

inputs   input_ids [batch, sequence]                        new tokens
         attention_mask [batch, past + sequence]            1 for every token that counts
         position_ids [batch, sequence]                     where the model's forward takes them
         past_key_0, past_value_0 [batch, heads, past, size], ...   one pair a layer; past may be 0
outputs  logits [batch, sequence, vocabulary], or [batch, 1, vocabulary] of the last token alone (logits_to_keep=1)
         present_key_0, present_value_0 [batch, heads, past + sequence, size], ...

An encoder-decoder is two (``ti_fx.export.cached.encoder_decoder``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import CaptureError, ExportError, InputError, first_line
from ti_fx.export.cached.become_student import become, is_constant
from ti_fx.export.cached.names import (
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
    own_layers,
)
from ti_fx.export.inputs import other_sizes, resized
from ti_fx.export.student import require_packed
from ti_fx.frontend.capture import capture
from ti_fx.frontend.dynamic_sizes import Dynamic
from ti_fx.frontend.model_for_trace import forward_of_tensors
from ti_fx.ir.edit import constant_size, erase_dead_writes, input_names, mode, prune, register
from ti_fx.ir.facts import facts, record_sizes
from ti_fx.ir.shapes import move_to_cpu
from ti_fx.numerics.closeness import largest

SEQUENCE, PAST, TOTAL, SOURCE = "sequence", "past", "total", "source"
PAST_AXES = (0, 2)  # of keys and values: batch and tokens
NEW = 3  # tokens after the cache in the example of the trace
# A token's logits after a cache and without one: two orders of the same sums, relative to the largest.
SAME = 1e-3

Forward = Callable[..., dict[str, Tensor]]


class CachedGraph(NamedTuple):
    """A graph with keys and values as inputs or outputs, and inputs for it."""

    gm: GraphModule
    inputs: dict[str, Tensor]


def with_cache(
    student: GraphModule, model: nn.Module, example: Mapping[str, Any], *, logits_to_keep: int = 0
) -> CachedGraph:
    """Return the packed student of a causal language model with its cache as inputs and outputs, and inputs for it.

    Args:
        student: a packed graph of ``model``, captured without a cache.
        model: the transformers model that it was captured from; only its architecture matters, and it may be without
            values, on the meta device (then its cached graph is not compared with it).
        example: ``input_ids`` and, if there is any padding, ``attention_mask``, int64 ``[batch, length]`` of at least
            two rows and five tokens.
        logits_to_keep: 0 gives the logits of every new token; 1 of the last alone, which is all that ``generate``
            reads of a prompt: the head, a quarter of a small model, then runs once a prompt and not for each token.

    Raises:
        PreconditionError: the student is not packed.
        InputError: the model has no cache of keys and values, or keeps more than those between tokens; the student
            takes more than text; the example has no ``input_ids``; the model can't leave out logits.
        CaptureError: the model can't be captured with its cache.
        ExportError: the student's weights are not all found in the cached graph.
    """
    require_packed(student)
    if is_encoder_decoder(model):
        raise InputError(
            f"{type(model).__name__} has an encoder; use ti_fx.export.encoder_decoder_with_cache"
        )
    if logits_to_keep not in (0, 1):
        raise InputError(
            f"logits_to_keep is {logits_to_keep!r}; give 0 for every token's logits, 1 for the last's"
        )
    if logits_to_keep and "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise InputError(f"the forward of {type(model).__name__} takes no logits_to_keep; leave it out")
    with mode(model, False):
        inputs, forward = causal_inputs(model, example, {"logits_to_keep": 1} if logits_to_keep else {})
        others = sorted(set(input_names(student)) - {"input_ids", "attention_mask", "position_ids"})
        if others:
            raise InputError(
                f"the student takes {', '.join(others)}, and a graph with a cache takes text alone; "
                "capture the student with input_ids and attention_mask, or export it without a cache"
            )
        cached = captured(model, inputs, forward)
    missing = become(cached.gm, student)
    if missing:
        raise ExportError(
            f"the cached graph does not read {missing[0]}; was the student captured from this model?"
        )
    return cached


def causal_inputs(
    model: nn.Module, example: Mapping[str, Any], options: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], Forward]:
    """Return a causal model's inputs after a cache of the example, and its forward of such tensors alone.

    ``options`` go to the model's own forward. The model must be in eval mode; errors are those of :func:`with_cache`.
    """
    inputs, keeping = _causal_example(model, example)
    return inputs, _causal_forward(model, keeping, options or {})


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model's configuration says so."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def captured(
    model: nn.Module, inputs: dict[str, Tensor], forward: Forward, dynamic: Dynamic = "all"
) -> CachedGraph:
    """Capture another forward of a model, and compare it with that forward where there are values."""
    with forward_of_tensors(model, forward, list(inputs)):
        gm = capture(model, inputs, dynamic=dynamic).eval()
        erase_dead_writes(gm.graph)  # a decoder with experts, in the encoder's graph
        gm.recompile()
        require_free(gm, model)
        _name_sizes(gm)
        if without_values(model):
            stand_in(gm)
        else:
            _compare_states(gm, model, inputs)
    return CachedGraph(gm, inputs)


def without_values(model: nn.Module) -> bool:
    """Whether a model is on the meta device."""
    return any(parameter.is_meta for parameter in model.parameters())


def stand_in(gm: GraphModule) -> None:
    """Let zeros, of four bytes in all, stand in for each tensor without values until it becomes the student's."""
    prune(gm)  # gives it containers of its own
    for name, stored in [*gm.named_parameters(), *gm.named_buffers()]:
        if stored.is_meta:
            if is_constant(name) and stored.numel():
                raise CaptureError(
                    f"the forward makes the constant {name} on the model's device, where it has no value; "
                    "give the model with its values"
                )
            one = torch.zeros((), dtype=stored.dtype)
            zeros = one.expand(stored.shape) if stored.numel() else one.new_zeros(stored.shape)
            is_parameter = isinstance(stored, nn.Parameter)
            register(gm, name, nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros)
    move_to_cpu(gm)


def require_free(gm: GraphModule, model: nn.Module) -> None:
    """Refuse a graph that holds values or lengths of its example, with which no text goes on.

    Raises:
        CaptureError: it does.
    """
    why = "so that a graph with a cache would hold the example's; export it without a cache"
    baked = sorted(facts(gm).baked)
    if baked:
        raise CaptureError(
            f"{type(model).__name__} decides in Python by the values of {', '.join(baked)}, {why}"
        )
    lengths = {"input_ids": 1, "decoder_input_ids": 1, PAST_KEY.format(0): 2}
    inputs = {str(node.target): node for node in gm.graph.find_nodes(op="placeholder")}
    for name, node in inputs.items() if PAST_KEY.format(0) in inputs else ():
        if name in lengths and constant_size(node.meta["val"].shape[lengths[name]]) is not None:
            raise CaptureError(f"the code of {type(model).__name__} fixes the length of {name}, {why}")
    for key, value in ((PAST_KEY, PAST_VALUE), (CROSS_KEY, CROSS_VALUE)):
        for index in range(len(inputs)):
            pair = [inputs[name.format(index)] for name in (key, value) if name.format(index) in inputs]
            if len({str(node.meta["val"].shape[2]) for node in pair}) > 1:
                raise CaptureError(
                    f"the code of {type(model).__name__} takes {pair[1].target} to be of another length than "
                    f"{pair[0].target}, which every cache contradicts; export it without a cache"
                )


def _name_sizes(gm: GraphModule) -> None:
    """Call the cache's length ``past``, a causal model's mask's, their sum, ``total``, and the encoder's ``source``."""
    names = dict(facts(gm).sizes.names)
    shapes = {str(node.target): node.meta["val"].shape for node in gm.graph.find_nodes(op="placeholder")}
    meanings = [
        ("decoder_input_ids", 1, SEQUENCE),
        (CROSS_KEY.format(0), 2, SOURCE),
        (PAST_KEY.format(0), 2, PAST),
    ]
    sums: dict[str, tuple[str, ...]] = {}
    if PAST_KEY.format(0) in shapes and CROSS_KEY.format(0) not in shapes:
        meanings.append(("attention_mask", 1, TOTAL))
        sums = {TOTAL: (PAST, SEQUENCE)}
    for name, index, meaning in meanings:
        if name in shapes and str(shapes[name][index]) in names:
            names[str(shapes[name][index])] = meaning
    has_past = PAST_KEY.format(0) in shapes
    cases: tuple[dict[str, int], ...] = ({PAST: 0}, {SEQUENCE: 1}, {PAST: 0, SEQUENCE: 1}) if has_past else ()
    least = {PAST: 0, TOTAL: 1}
    smallest = {symbol: least[name] for symbol, name in names.items() if name in least}
    record_sizes(gm, names=names, sums=sums, cases=cases, smallest=smallest)


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
    ids = token_ids(example, "input_ids")
    mask = example.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        if without_values(model):  # only the cache's shapes matter, and transformers can't look into a mask
            found = run_with_cache(model, input_ids=ids.to("meta"))
            keeping = keeping_layers(model, getattr(found, "past_key_values", None))
            cache = empty_cache(keeping)
            run_with_cache(model, input_ids=ids.to("meta"), past_key_values=cache)
        else:
            padded = mask.clone()
            padded[0, 0] = 0  # shows a mask that is taken for other tokens' after a cache
            found = run_with_cache(model, input_ids=ids, attention_mask=padded)
            keeping = keeping_layers(model, getattr(found, "past_key_values", None))
            cache = empty_cache(keeping)
            run_with_cache(model, input_ids=ids[:, :-1], attention_mask=padded[:, :-1], past_key_values=cache)
            last = run_with_cache(model, input_ids=ids[:, -1:], attention_mask=padded, past_key_values=cache)
            expected = found["logits"][:, -1]
            _require_same(model, last["logits"][:, -1], expected)
            if any(layer.is_sliding for layer in own_layers(found["past_key_values"])):
                _require_windows(model, ids, padded, expected)
    batch, past = ids.shape
    inputs = {
        "input_ids": ids[:, -NEW:].contiguous(),
        "attention_mask": torch.cat((mask, mask[:, -NEW:]), 1),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(past, past + NEW).expand(batch, NEW).contiguous()
    return inputs | stand_ins(by_name(cache, PAST_KEY, PAST_VALUE)), keeping


def run_with_cache(model: nn.Module, **inputs: Any) -> Any:
    """Run a model that is asked for its cache.

    Raises:
        InputError: it fails, or gives no logits.
    """
    try:
        found = model(**inputs, use_cache=True, return_dict=True)
    except (
        Exception
    ) as error:  # whatever a model raises that was not made for a cache, or not for these inputs
        reason = first_line(error)
        raise InputError(
            f"{type(model).__name__} fails with {', '.join(inputs)} and use_cache=True ({reason}); "
            "give an example that it takes, or export it without a cache"
        ) from error
    if "logits" not in found:
        raise InputError(
            f"{type(model).__name__} gives no logits, from which text is generated; give the model with its head, "
            "or export it without a cache"
        )
    return found


def stand_ins(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with random numbers in the place of those without values."""
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, dtype=value.dtype, generator=random) if value.is_meta else value
        for name, value in values.items()
    }


def _require_same(model: nn.Module, found: Tensor, expected: Tensor) -> None:
    """Refuse a model that gives a token other logits after a cache than without one.

    Raises:
        InputError: it does.
    """
    gap = largest(found, expected)
    if gap > SAME:
        raise InputError(
            f"{type(model).__name__} gives a token other logits after a cache than without one (relative {gap:.1e}, "
            "in a batch with padding): more is kept than keys and values, or the mask is read otherwise; "
            "export it without a cache"
        )


def _require_windows(model: nn.Module, ids: Tensor, mask: Tensor, expected: Tensor) -> None:
    """Refuse a model whose own cache forgets what its mask does not hide, where the example is long enough to tell.

    Raises:
        InputError: it does.
    """
    before = run_with_cache(model, input_ids=ids[:, :-1], attention_mask=mask[:, :-1])
    cache = before["past_key_values"]
    last = run_with_cache(model, input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache)
    if largest(last["logits"][:, -1], expected) > SAME:
        raise InputError(
            f"the configuration of {type(model).__name__} has a sliding window that its attention lacks, so that its "
            "generate forgets tokens which the student attends to; set sliding_window to None there"
        )


def token_ids(example: Mapping[str, Any], name: str) -> Tensor:
    """Return the example's tokens.

    Raises:
        InputError: there are none, or too few.
    """
    ids = example.get(name)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < NEW:
        raise InputError(
            f"the example needs {name} of [batch, length] with at least {NEW} tokens for a cached graph"
        )
    return ids


def _causal_forward(model: nn.Module, keeping: Keeping, options: Mapping[str, int]) -> Forward:
    """Return a forward of tensors alone: the cache goes in and comes out as keys and values by layer."""
    forward = model.forward

    def cached(**inputs: Tensor) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if not name.startswith("past_")}
        cache = filled_cache(keeping, inputs, PAST_KEY, PAST_VALUE)
        found = forward(**given, **options, past_key_values=cache, use_cache=True, return_dict=True)
        return {"logits": found.logits, **by_name(cache, PRESENT_KEY, PRESENT_VALUE)}

    return cached
