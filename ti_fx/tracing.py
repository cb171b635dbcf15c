"""torch.export of a model as users have it: what is dynamic, what would be baked, and whose fault a failure is."""

from __future__ import annotations

import inspect
import io
import random
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ti_fx.errors import CaptureError, InputError, RandomnessError, TiFxError
from ti_fx.steering import Concrete, decides_at_random, steering_inputs

Dynamic = Literal["auto", "all", "batch", "none"]
# Inputs of this many dimensions are images and videos: their sizes as symbols cost minutes of algebra.
IMAGE_RANK = 4

BATCH = "batch"


@contextmanager
def traceable(model: nn.Module) -> Iterator[str | None]:
    """Attention as operations that a graph can hold, for the trace and the comparison; restored afterwards.

    Yields the attention implementation of a transformers model, None for any other.
    """
    with plain_torch_layers(), _batched_experts(model), _eager_attention(model) as implementation:
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


def _dynamic_shapes(tensors: dict[str, Tensor], dynamic: Dynamic) -> tuple[dict[str, Any], dict[str, str]]:
    if dynamic == "none":
        return dict.fromkeys(tensors), {}
    batch = next((value.shape[0] for value in tensors.values() if value.dim()), 0)
    named = torch.export.Dim(BATCH)
    shapes: dict[str, Any] = {}
    static: dict[str, str] = {}
    for name, value in tensors.items():
        dims: dict[int, Any] = {}
        for index, size in enumerate(value.shape):
            if index == 0 and size == batch and batch > 1:
                dims[index] = named
            elif dynamic == "auto" and value.dim() >= IMAGE_RANK:
                static[f"{name}.{index}"] = (
                    f"dynamic='auto' fixes it at {size}, as in every input of {IMAGE_RANK} or more dimensions; "
                    "dynamic='all' does not"
                )
            elif dynamic in ("auto", "all") and size > 1:
                dims[index] = torch.export.Dim.AUTO
            elif dynamic in ("auto", "all"):
                static[f"{name}.{index}"] = f"the example's size is {size}; give an example of at least 2"
        shapes[name] = dims or None
    return shapes, static


@dataclass(frozen=True)
class Traced:
    """What torch.export gave.

    Attributes:
        program: the exported program.
        static: why a dimension is not dynamic, by ``input.dimension``.
        baked: the values of inputs that are constants of the program.
    """

    program: torch.export.ExportedProgram
    static: dict[str, str]
    baked: dict[str, Tensor]


def export(
    model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any], dynamic: Dynamic
) -> Traced:
    """Trace a model.

    Raises:
        InputError: the model itself fails on the example.
        CaptureError: it can't be traced, or draws random numbers in Python; names the source line where known.
    """
    with _python_randomness(model):
        if model.training and not any(value.is_meta for value in tensors.values()):
            _no_random_choice(model, tensors, constants)
        first: Traced | None = None
        known: TiFxError | None = None
        try:
            first = Traced(*_export(model, tensors, constants, dynamic, {}), {})
            steered = _reads_values(first.program)
        except Exception as error:
            known = _capture_error(model, error, tensors, constants)
            steered = "data-dependent" in str(error) and isinstance(known, CaptureError)
            if not steered:
                raise known from error
        if steered:
            baked = {name: tensors[name] for name in steering_inputs(model, tensors, constants)}
            rest = {name: value for name, value in tensors.items() if name not in baked}
            if baked and rest:
                try:
                    return Traced(*_export(model, rest, constants, dynamic, baked), baked)
                except Exception as error:
                    # what these values steer is not all that is in the way: the first attempt says what is
                    if known is not None:
                        raise known from error
        if first is None:
            assert known is not None
            raise known
        return first


def _reads_values(program: torch.export.ExportedProgram) -> bool:
    """Whether the program turns a tensor's value into a size or a flag."""
    return any(
        getattr(node.target, "__name__", "") in ("item.default", "_local_scalar_dense.default")
        for node in program.graph.nodes
    )


def _no_random_choice(model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any]) -> None:
    try:
        where = decides_at_random(model, tensors, constants)
    except Exception as error:
        raise _capture_error(model, error, tensors, constants) from error
    if where is not None:
        raise RandomnessError(
            f"{type(model).__name__} decides by a random number what it computes ({where}), which a trace would freeze "
            "into one outcome; turn that off (layerdrop=0, apply_spec_augment=False, ...)"
        )


def _export(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    dynamic: Dynamic,
    baked: dict[str, Tensor],
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    shapes, static = _dynamic_shapes(tensors, dynamic)
    constants = {**constants, **baked}
    with Concrete(baked.values()):
        try:
            return _trace(model, tensors, constants, shapes), static
        except Exception as error:
            if dynamic not in ("auto", "all") or not (baked or _is_about_shapes(error)):
                raise
            reason = _shape_reason(error)
        # The model ties or fixes sizes in a way that can't be expressed: keep the batch dynamic if it can be, and say
        # so. Values that are constants mostly fix the batch, too.
        batch = not baked
        if batch:
            try:
                exported = _trace(model, tensors, constants, _dynamic_shapes(tensors, "batch")[0])
            except Exception as error:
                if not _is_about_shapes(error):
                    raise
                batch = False
        if not batch:
            exported = _trace(model, tensors, constants, _dynamic_shapes(tensors, "none")[0])
    for name, value in tensors.items():
        for index in range(int(batch), value.dim()):
            static[f"{name}.{index}"] = reason
    return exported, static


def _trace(
    model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any], shapes: dict[str, Any]
) -> torch.export.ExportedProgram:
    printed = io.StringIO()  # torch prints the half-made graph of a failed trace
    with (
        _modules_stay(),
        _keywords_only(model, list(tensors), constants),
        torch.random.fork_rng(devices=[]),
        redirect_stderr(printed),
    ):
        exported = torch.export.export(model, (), tensors, dynamic_shapes=shapes, strict=False)
    sys.stderr.write(printed.getvalue())
    return exported


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
    """Give ``forward`` the signature that the graph will have: torch.export can't name what ``**kwargs`` takes."""
    forward = model.forward

    def bound(**tensors: Tensor) -> Any:
        return forward(**tensors, **constants)

    kind = inspect.Parameter.KEYWORD_ONLY
    bound.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in inputs])  # type: ignore[attr-defined]
    own = model.__dict__.get("forward")
    model.forward = bound
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _is_about_shapes(error: Exception) -> bool:
    return bool(re.search(r"[Cc]onstraint|dynamic_shapes|specializ", str(error)))


def _capture_error(
    model: nn.Module, error: Exception, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> TiFxError:
    """Return what to tell the user: the example does not fit the model, or the model does not fit one graph."""
    if isinstance(error, TiFxError):
        return error
    name = type(model).__name__
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(**tensors, **constants)
    except Exception as own:
        return InputError(
            f"{name} fails on the example{_at(own)}: {_first_line(own)}; give inputs that it takes"
        )
    advice = "make it a tensor operation, or leave that part out of the model"
    if "data-dependent" in str(error):
        advice = f"control flow that depends on tensor values has no place in one graph: {advice}"
    return CaptureError(f"{name} can't be captured{_at(error)}: {_first_line(error)}; {advice}")


def _at(error: BaseException) -> str:
    where = _user_line(error)
    return f" ({where})" if where else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__


def _shape_reason(error: BaseException) -> str:
    """Return which size the model's code fixes, as far as torch.export tells."""
    found = re.search(
        r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error)
    )
    return f"the model's code fixes {found[1]} at {found[2]}" if found else _first_line(error)


def _user_line(error: BaseException) -> str:
    """Return ``file:line`` of the innermost frame that is the model's own code, as far as the traceback tells."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not re.search(r"[/\\](torch|ti_fx)[/\\]", frame.filename) and not frame.filename.startswith("<"):
            return f"{frame.filename}:{frame.lineno}"
    return ""


_RANDOM_FUNCTIONS = (
    "random",
    "uniform",
    "randint",
    "choice",
    "choices",
    "sample",
    "shuffle",
    "gauss",
    "randrange",
)
_NUMPY_FUNCTIONS = (
    "rand",
    "random",
    "uniform",
    "randint",
    "choice",
    "permutation",
    "normal",
    "randn",
    "shuffle",
)


@contextmanager
def _python_randomness(model: nn.Module) -> Iterator[None]:
    """Raise if the model decides anything by Python's or NumPy's random numbers: the trace would bake one outcome."""
    import numpy

    found: list[str] = []

    def recording(function: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            frames = traceback.extract_stack()[:-1]
            frame = next(
                (f for f in reversed(frames) if not re.search(r"[/\\](torch|numpy|random\.py)", f.filename)),
                None,
            )
            if frame is not None and "ti_fx" not in frame.filename:
                found.append(f"{frame.filename}:{frame.lineno}")
            return function(*args, **kwargs)

        return recorded

    patched: list[tuple[Any, str, Any]] = []
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    for module, names in ((random, _RANDOM_FUNCTIONS), (numpy.random, _NUMPY_FUNCTIONS)):
        for name in names:
            patched.append((module, name, getattr(module, name)))
            setattr(module, name, recording(getattr(module, name)))
    try:
        yield
    finally:
        for module, name, function in patched:
            setattr(module, name, function)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
    if found:
        raise RandomnessError(
            f"{type(model).__name__} draws random numbers in Python ({found[0]}), which a trace would freeze into one "
            "outcome; turn that off (layerdrop=0, apply_spec_augment=False, ...) or draw them with torch"
        )
