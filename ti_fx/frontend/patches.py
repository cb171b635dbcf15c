"""Every patch of torch's and transformers' internals that a trace needs, each undone when it ends."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from ti_fx.frontend.constant_mode import Concrete


@contextmanager
def traceable(model: nn.Module) -> Iterator[str | None]:
    """Attention as operations that a graph can hold, for the trace and the comparison; restored afterwards.

    Yields the attention implementation of a transformers model, None for any other.
    """
    with (
        plain_torch_layers(),
        _unvalidated_distributions(),
        _batched_experts(model),
        _eager_attention(model) as implementation,
    ):
        yield implementation


@contextmanager
def plain_torch_layers() -> Iterator[None]:
    """torch.nn's transformer layers without what they decide by the mode or by values.

    Their fast path computes nothing at padding (zeros come out), and only in eval mode. Whether a mask is causal is a
    hint that only chooses a kernel, and without the hint they compare the mask's values.
    """
    layers: Any = torch.nn.modules.transformer
    fast_path, detect = torch.backends.mha.get_fastpath_enabled(), layers._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        layers._detect_is_causal_mask = detect


@contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """torch.distributions without a look at its arguments' values, which computes nothing."""
    distribution = torch.distributions.Distribution
    before = distribution._validate_args
    distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        distribution.set_default_validate_args(before)


@contextmanager
def _batched_experts(model: nn.Module) -> Iterator[None]:
    """Mixtures of experts as batched products: a loop over the experts that are hit depends on values.

    transformers' ``grouped_mm`` can be traced, too, but is an operator of its own that ONNX has not.
    """
    switch = getattr(model, "set_experts_implementation", None)
    current: Any = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if switch is None or current is None:
        yield
        return
    with _restored(model, "_experts_implementation_internal"):
        switch("batched_mm")
        yield


@contextmanager
def _restored(model: nn.Module, attribute: str) -> Iterator[None]:
    """Put an attribute of every configuration in the model back as it was."""
    configs = {
        id(found): found for part in model.modules() if (found := getattr(part, "config", None)) is not None
    }
    before = [(found, getattr(found, attribute, None)) for found in configs.values()]
    try:
        yield
    finally:
        for found, value in before:
            if hasattr(found, attribute):
                setattr(found, attribute, value)


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[str | None]:
    """Eager attention in a transformers model: the map must be in the graph."""
    switch = getattr(model, "set_attn_implementation", None)
    if switch is None:
        yield None
        return
    with _restored(model, "_attn_implementation_internal"):
        switch("eager")
        config: Any = model.config
        yield str(config._attn_implementation)


@contextmanager
def _taken_for_hit(concrete: Concrete) -> Iterator[None]:
    """In a loop over what a mask hits, take what a row selects for not empty: ``if not places.numel(): continue``.

    Where it is empty the body computes on nothing.
    """
    original: Any = ShapeEnv.evaluate_expr

    def evaluated(environment: ShapeEnv, expression: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(environment, expression, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            empty = getattr(expression, "rhs", None) == 0 and expression.rel_op in ("==", "!=")
            if not (concrete.looping and empty):
                raise
            return original(
                environment, expression, *args, **{**kwargs, "fallback_value": expression.rel_op == "!="}
            )

    ShapeEnv.evaluate_expr = evaluated  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        ShapeEnv.evaluate_expr = original  # type: ignore[method-assign]


@contextmanager
def _without_checks(active: bool) -> Iterator[None]:
    """Leave out transformers' own checks of values, which compute nothing; the model has run on the example."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    if active:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if active and before is None:
            del os.environ[name]
        elif active and before is not None:
            os.environ[name] = before


@contextmanager
def _broadcast_masks() -> Iterator[None]:
    """Masks of transformers by broadcast instead of vmap: a graph can't hold its batched tensors."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    if masks is None:
        yield
        return
    before = masks._vmap_expansion_sdpa, masks.TransformGetItemToIndex

    def broadcast(function: Any) -> Any:
        def of(*indices: Tensor) -> Tensor:
            mask: Tensor = function(*masks._non_vmap_expansion_sdpa(*indices))
            return mask.expand(*(len(index) for index in indices))

        return of

    masks._vmap_expansion_sdpa, masks.TransformGetItemToIndex = broadcast, nullcontext
    try:
        yield
    finally:
        masks._vmap_expansion_sdpa, masks.TransformGetItemToIndex = before


@contextmanager
def whole_numbers_stay(model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Take the model's buffers of one whole number (a stride, a kernel's size) for constants, and yield them."""
    found = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
        and buffer.numel() == 1
        and not (buffer.is_floating_point() or buffer.is_complex())
    ]
    before = [(module, dict(module._buffers)) for module in {id(one[0]): one[0] for one in found}.values()]
    try:
        for module, name, buffer in found:
            del module._buffers[name]
            module.__dict__[name] = buffer
        yield tuple(buffer for _, _, buffer in found)
    finally:
        for module, name, _ in found:
            del module.__dict__[name]
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)  # in their order, which state_dict() has


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer's values back as they were: running statistics change with every forward in training."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


@contextmanager
def _modules_stay() -> Iterator[None]:
    """Let ``module.to(dtype)`` within forward return a module that has that dtype: a trace can't swap weights."""
    original = nn.Module.to

    def stays(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if all(
            (device is None or value.device == device) and (dtype is None or value.dtype == dtype)
            for value in module.parameters()
        ):
            return module
        return original(module, *args, **kwargs)

    nn.Module.to = stays  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


@contextmanager
def _keywords_only(model: nn.Module, inputs: list[str], constants: dict[str, Any]) -> Iterator[None]:
    """Bind what is constant."""
    forward = model.forward

    def bound(**tensors: Tensor) -> Any:
        return without_caches(forward(**tensors, **constants))

    with forward_of_tensors(model, bound, inputs):
        yield


def without_caches(outputs: Any) -> Any:
    """Return a model's outputs as ``use_cache=False`` gives them, also where the model makes a cache all the same."""
    library = sys.modules.get("transformers.cache_utils")
    if library is None or not isinstance(outputs, Mapping):
        return outputs
    kept = {name: value for name, value in outputs.items() if not isinstance(value, library.Cache)}
    kind: Any = type(outputs)
    return outputs if len(kept) == len(outputs) else kind(**kept)


@contextmanager
def forward_of_tensors(
    model: nn.Module, function: Callable[..., Any], inputs: Sequence[str]
) -> Iterator[None]:
    """Let a function of keyword tensors be the model's forward.

    It gets the signature that the graph will have: torch.export can't name what ``**kwargs`` takes.
    """
    kind = inspect.Parameter.KEYWORD_ONLY
    function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in inputs])  # type: ignore[attr-defined]
    own = model.__dict__.get("forward")
    model.forward = function
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own
