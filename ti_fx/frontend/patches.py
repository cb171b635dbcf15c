"""Replaces internals of torch and transformers that stand in a trace's way, and puts them back when it ends.

Every such attribute is a row of ``ti_fx.frontend.internals``, which is compared with what is installed before it is
replaced. What is replaced is so for the whole process, in every thread: ``one_at_a_time`` keeps two captures from
undoing each other's.
"""

from __future__ import annotations

import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ti_fx.frontend.internals import known_internal

_LOCK = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let no other thread patch anything meanwhile; the same thread may go on within."""
    with _LOCK:
        yield


@contextmanager
def replaced(name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Put what ``replacement`` makes of an internal in its place."""
    with one_at_a_time():
        original = _replace(name, replacement)
        owner, _, attribute = name.rpartition(".")
        try:
            yield
        finally:
            setattr(pkgutil.resolve_name(owner), attribute, original)


def _replace(name: str, replacement: Callable[[Any], Any]) -> Any:
    """Put what ``replacement`` makes of an internal in its place for good, and return the internal."""
    original = known_internal(name)
    new = replacement(original)
    if callable(new):
        new.__wrapped__ = original  # its parameters are the original's, for a capture within a capture
    owner, _, attribute = name.rpartition(".")
    setattr(pkgutil.resolve_name(owner), attribute, new)
    return original


@contextmanager
def traceable(model: nn.Module) -> Iterator[str | None]:
    """Attention as operations that a graph can hold, for the trace and the comparison; restored afterwards.

    Yields the attention implementation of a transformers model, None for any other.

    Raises:
        VersionError: an internal of torch or transformers is not what ti_fx knows.
    """
    with (
        plain_torch_layers(),
        replaced("torch.distributions.distribution.Distribution._validate_args", lambda _: False),
        _batched_experts(model),
        _eager_attention(model) as implementation,
    ):
        yield implementation


@contextmanager
def plain_torch_layers() -> Iterator[None]:
    """torch.nn's transformer layers without what they decide by the mode or by values.

    Raises:
        VersionError: an internal of torch is not what ti_fx knows.
    """

    def by_hint(_: Any) -> Any:
        return lambda mask, is_causal=None, size=None: bool(is_causal)

    with one_at_a_time():
        is_enabled = known_internal("torch.backends.mha.get_fastpath_enabled")
        enable = known_internal("torch.backends.mha.set_fastpath_enabled")
        with replaced("torch.nn.modules.transformer._detect_is_causal_mask", by_hint):
            before = is_enabled()
            enable(False)
            try:
                yield
            finally:
                enable(before)


@contextmanager
def _batched_experts(model: nn.Module) -> Iterator[None]:
    """Mixtures of experts as batched products.

    transformers' ``grouped_mm`` can be traced, too, but is an operator of its own that ONNX has not.
    """
    _check_switch(model, "set_experts_implementation", "_experts_implementation_internal")
    switch = getattr(model, "set_experts_implementation", None)
    current: Any = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if switch is None or current is None:
        yield
        return
    with _restored(model, "_experts_implementation_internal"):
        switch("batched_mm")
        yield


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[str | None]:
    """Eager attention in a transformers model."""
    _check_switch(model, "set_attn_implementation", "_attn_implementation_internal")
    switch = getattr(model, "set_attn_implementation", None)
    if switch is None:
        yield None
        return
    with _restored(model, "_attn_implementation_internal"):
        switch("eager")
        config: Any = model.config
        yield str(config._attn_implementation)


def _check_switch(model: nn.Module, method: str, attribute: str) -> None:
    """Check that a transformers model has a method that changes an attribute of its configuration."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is not None and isinstance(model, library.PreTrainedModel):
        known_internal(f"transformers.modeling_utils.PreTrainedModel.{method}")
        known_internal(f"transformers.configuration_utils.PreTrainedConfig.{attribute}", model.config)


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
def no_empty_selections(looping: Callable[[], bool]) -> Iterator[None]:
    """While ``looping()``, take what a row selects for not empty: ``if not places.numel(): continue``.

    Where it is empty the body computes on nothing.
    """
    module = "torch.fx.experimental.symbolic_shapes"
    undecided = known_internal(f"{module}.GuardOnDataDependentSymNode")

    def of(original: Any) -> Any:
        def evaluated(environment: Any, expression: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(environment, expression, *args, **kwargs)
            except undecided:
                empty = getattr(expression, "rhs", None) == 0 and expression.rel_op in ("==", "!=")
                if not (looping() and empty):
                    raise
                answer = {**kwargs, "fallback_value": expression.rel_op == "!="}
                return original(environment, expression, *args, **answer)

        return evaluated

    with replaced(f"{module}.ShapeEnv.evaluate_expr", of):
        yield


@contextmanager
def broadcast_masks() -> Iterator[None]:
    """Masks of transformers by broadcast instead of vmap."""
    library = "transformers.masking_utils"
    if library not in sys.modules:
        yield
        return
    indices_of = known_internal(f"{library}._non_vmap_expansion_sdpa")

    def broadcast(function: Any) -> Any:
        def of(*indices: Tensor) -> Tensor:
            mask: Tensor = function(*indices_of(*indices))
            return mask.expand(*(len(index) for index in indices))

        return of

    with (
        replaced(f"{library}._vmap_expansion_sdpa", lambda _: broadcast),
        replaced(f"{library}.TransformGetItemToIndex", lambda _: lambda: nullcontext()),
    ):
        yield


@contextmanager
def decomposed_where_needed(is_needed: Callable[[Any, Any], bool]) -> Iterator[None]:
    """Let torch.onnx decompose a program only where ``is_needed(program, registry)``, else drop what nobody reads."""
    name = "torch.onnx._internal.exporter._fx_passes.decompose_with_registry"

    def of(original: Any) -> Any:
        def decomposed(exported_program: Any, registry: Any) -> Any:
            if is_needed(exported_program, registry):
                return original(exported_program, registry)
            exported_program.graph.eliminate_dead_code()
            return exported_program

        return decomposed

    with replaced(name, of):
        yield


@contextmanager
def modules_stay() -> Iterator[None]:
    """Let ``module.to(dtype)`` within forward return a module that has that dtype."""
    parse: Any = known_internal("torch._C._nn._parse_to")

    def of(original: Any) -> Any:
        def stays(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            device, dtype, *_ = parse(*args, **kwargs)
            if all(
                (device is None or value.device == device) and (dtype is None or value.dtype == dtype)
                for value in module.parameters()
            ):
                return module
            return original(module, *args, **kwargs)

        return stays

    with replaced("torch.nn.modules.module.Module.to", of):
        yield


@contextmanager
def inference_without_gradients() -> Iterator[None]:
    """Let a trace take ``torch.inference_mode()`` within forward for ``torch.no_grad()``: it would see neither."""

    def region(_: Any) -> Any:
        return lambda inferring: torch.set_grad_enabled(not inferring)

    with replaced("torch._C._InferenceMode", region):
        yield


@contextmanager
def regions_stay() -> Iterator[None]:
    """Let a trace keep a region without gradients whose results nobody reads: it may write into a buffer."""
    kept: set[Any] = known_internal("torch.fx.node._side_effectful_functions")
    region = torch.ops.higher_order.wrap_with_set_grad_enabled
    with one_at_a_time():
        known = region in kept
        kept.add(region)
        try:
            yield
        finally:
            if not known:
                kept.discard(region)


@cache
def no_guard_on_accumulation() -> None:
    """Let inductor choose how to add floats up on a CPU without a guard on the number of addends, from now on.

    torch 2.13 guards ``addends <= 4096`` there, so a graph would be compiled again as batch and sequence cross it.
    Either choice adds up any number of addends; the larger one is more precise.

    Raises:
        VersionError: an internal of torch is not what ti_fx knows.
    """
    from torch._inductor.virtualized import V

    def of(original: Any) -> Any:
        def unguarded(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            with V.graph.sizevars.shape_env.suppress_guards():
                return original(kernel, *args, **kwargs)

        return unguarded

    with one_at_a_time():
        _replace("torch._inductor.codegen.cpp.CppKernel.need_use_acc_helper", of)
