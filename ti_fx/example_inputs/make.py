"""``example_inputs`` makes inputs for a model's forward from its signature and its configuration."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig

from ti_fx.errors import DataError
from ti_fx.example_inputs.makers import MAKERS, OTHER_MAKERS, run
from ti_fx.example_inputs.overrides import ALSO, UNUSED
from ti_fx.example_inputs.request import Request, Sizes

TRIES = 80
# Made where the forward demands them, ALSO names them or the line after says when.
_USUAL = {
    "image_grid_thw", "image_sizes", "spatial_shapes", "pixel_values", "pixel_values_videos", "pixel_attention_mask",
    "input_values", "input_features", "input_features_mask", "feature_attention_mask", "input_ids", "attention_mask",
    "mm_token_type_ids", "decoder_input_ids", "bbox", "past_values", "image_merge_sizes", "target_sizes",
}  # fmt: skip


def example_inputs(
    name: str, model: nn.Module, sizes: tuple[Sizes, ...], seed: int, device: torch.device | None = None
) -> list[dict[str, Tensor]]:
    """Return keyword tensors for the model's forward, in each of these sizes, after running it on all of them.

    They are on ``device``, or on the model's; on the meta device shapes are all that a run checks.

    Where an input comes in several shapes among models (images, their patches, or several a row), the first with
    which the forward runs is taken.

    Raises:
        DataError: the forward needs an input that no rule makes, or fails on all that the rules make.
    """
    parameters = inspect.signature(model.forward).parameters
    keys = _keys(name, model, parameters)
    first: Exception | None = None
    also = ALSO.get(name, {})
    own = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    makers = {key: (OTHER_MAKERS[also[key]],) if also.get(key) else MAKERS[key] for key in keys}
    for chosen in itertools.islice(itertools.product(*(makers[key] for key in keys)), TRIES):
        examples = []
        try:
            for number, size in enumerate(sizes):
                generator = torch.Generator().manual_seed(seed + number)
                request = Request(model.config, model, size, generator)  # type: ignore[arg-type]
                for key, maker in zip(keys, chosen, strict=True):
                    request.made[key] = maker(request).to(device or own)
                _try(model, {key: value.to(own) for key, value in request.made.items()})
                examples.append(request.made)
        except Exception as error:
            first = first or error
            continue
        return examples
    text = " ".join(str(first).split())[:200]
    raise DataError(
        f"{name}: the forward of {type(model).__name__} fails on {', '.join(keys) or 'nothing'}: "
        f"{type(first).__name__}: {text}"
    ) from first


def _try(model: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Run the model; one without values may stop where it looks at them."""
    try:
        _check_finite(run(model, example))
    except (RuntimeError, NotImplementedError) as error:
        if "meta tensor" not in str(error):
            raise


def _check_finite(outputs: Any) -> None:
    """Raise ValueError if an output is no number: some masks leave a row nothing to attend to."""
    for leaf in pytree.tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs):
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            continue
        if leaf.is_floating_point() and bool(leaf.isnan().any()):
            raise ValueError("an output is not a number (NaN)")


def _keys(name: str, model: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the inputs to make, in order.

    Raises:
        DataError: one is needed that no rule makes.
    """
    config: PreTrainedConfig = model.config  # type: ignore[assignment]
    also, unused = ALSO.get(name, {}), UNUSED.get(name, frozenset())
    needed = {
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    keys: list[str] = []
    for key in MAKERS:
        wanted = key in parameters and key not in unused and key in _USUAL
        if key in also or key in needed or (wanted and _makes_sense(key, config, keys, parameters)):
            keys.append(key)
    missing = sorted(needed - set(keys))
    if missing:
        raise DataError(
            f"{name}: the forward of {type(model).__name__} needs `{missing[0]}`, which no rule makes"
        )
    return keys


def _makes_sense(key: str, config: PreTrainedConfig, keys: list[str], parameters: Mapping[str, Any]) -> bool:
    """Whether an input that the forward could do without belongs in the example."""
    if key in ("attention_mask", "mm_token_type_ids", "bbox"):
        return "input_ids" in keys and (key != "mm_token_type_ids" or "pixel_values" in keys)
    if key in ("pixel_values_videos", "input_features", "input_values"):
        return "pixel_values" not in parameters
    if key in ("input_features_mask", "feature_attention_mask"):
        return "input_features" in keys or "input_values" in keys
    if key == "pixel_attention_mask":
        return "pixel_values" in keys
    if key == "decoder_input_ids":
        return config.is_encoder_decoder
    return True
