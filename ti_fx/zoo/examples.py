"""Inputs for a model's forward, from its signature and its configuration."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig

from ti_fx.errors import DataError
from ti_fx.zoo.exceptions import ALSO, UNUSED
from ti_fx.zoo.tiny import FIRST_SPECIAL, IMAGE

WORDS = range(60, FIRST_SPECIAL)  # ids that are no special token in any tiny configuration
PADDED = 3  # positions at the end of the last row
SAMPLES = 1920  # of a waveform
FRAMES = 4  # of a video
GRID = 4  # patches along each side of an image that comes as a list of patches
TRIES = 40


@dataclass(frozen=True)
class Sizes:
    """How large an example is: rows, and words in each."""

    batch: int
    length: int


@dataclass
class Request:
    """What a maker of one input may look at.

    Attributes:
        config: of the whole model.
        model: the model itself.
        sizes: rows and words.
        generator: draws every number.
        made: the inputs so far, by name.
    """

    config: PreTrainedConfig
    model: nn.Module
    sizes: Sizes
    generator: torch.Generator
    made: dict[str, Tensor] = field(default_factory=dict)

    def number(self, *names: str, default: int) -> int:
        """Return the first of these fields that the configuration, or one inside it, has as a whole number."""
        for name, config in itertools.product(names, list(_configs(self.config))):
            value = _plain(config, name)
            if isinstance(value, list | tuple) and value and isinstance(value[0], int):
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return default

    def normal(self, *shape: int) -> Tensor:
        """Return normal numbers, float32."""
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return whole numbers from ``low`` to below ``high``, int64."""
        return torch.randint(low, high, shape, generator=self.generator)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.sizes.batch

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.number("num_channels", "in_channels", "in_chans", "in_channel", default=3)

    @property
    def image(self) -> tuple[int, int]:
        """The height and width of an image."""
        for name, config in itertools.product(
            ("image_size", "img_size", "input_size"), list(_configs(self.config))
        ):
            value = _plain(config, name)
            if isinstance(value, int) and value > 1:
                return value, value
            if (
                isinstance(value, list | tuple)
                and len(value) == 2
                and all(isinstance(one, int) for one in value)
            ):
                return value[0], value[1]
        return 2 * IMAGE, 2 * IMAGE

    @property
    def bins(self) -> int:
        """Numbers in each frame of a spectrogram."""
        return self.number(
            "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels", "feature_size",
            "input_feat_size", "input_size", "audio_feature_size", "input_dim", default=32,
        )  # fmt: skip


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _plain(config: PreTrainedConfig, name: str) -> Any:
    """Return the field's value, also under a name that the class maps to another; None where there is none."""
    return vars(config).get(config.attribute_map.get(name, name))


def _images(request: Request) -> Tensor:
    return request.normal(request.batch, request.channels, *request.image)


def _image_lists(request: Request) -> Tensor:
    return request.normal(request.batch, 1, request.channels, *request.image)


def _videos(request: Request) -> Tensor:
    frames = request.number("num_frames", "frames_per_clip", default=FRAMES)
    return request.normal(request.batch, frames, request.channels, *request.image)


def _patch_width(request: Request) -> int:
    patch = request.number("patch_size", "spatial_patch_size", default=8)
    return request.channels * request.number("temporal_patch_size", default=1) * patch * patch


def _flat_patches(request: Request) -> Tensor:
    """Return the patches of all images one after the other, as models with a grid take them."""
    return request.normal(request.batch * GRID * GRID, _patch_width(request))


def _patches(request: Request) -> Tensor:
    return request.normal(request.batch, GRID * GRID, _patch_width(request))


def _patch_images(request: Request) -> Tensor:
    patch = request.number("patch_size", default=8)
    return request.normal(request.batch * GRID * GRID, request.channels, patch, patch)


def _grid(request: Request) -> Tensor:
    return torch.tensor([[1, GRID, GRID]] * request.batch)


def _grid_shapes(request: Request) -> Tensor:
    return torch.tensor([[GRID, GRID]] * request.batch)


def _image_sizes(request: Request) -> Tensor:
    return torch.tensor([list(request.image)] * request.batch)


def _hidden_states(request: Request) -> Tensor:
    width = request.number("hidden_size", default=64)
    return request.normal(request.batch, request.sizes.length, width)


def _waveforms(request: Request) -> Tensor:
    return request.normal(request.batch, SAMPLES)


def _channel_waveforms(request: Request) -> Tensor:
    return request.normal(request.batch, request.number("audio_channels", "channels", default=1), SAMPLES)


def _frames(request: Request) -> int:
    return 2 * request.number("max_source_positions", default=32)


def _spectrograms(request: Request) -> Tensor:
    return request.normal(request.batch, request.bins, _frames(request))


def _frame_rows(request: Request) -> Tensor:
    frames = request.number("max_length", default=_frames(request))
    return request.normal(request.batch, frames, request.bins)


def _wide_frame_rows(request: Request) -> Tensor:
    """Return two frames joined to one, as some feature extractors give them."""
    return request.normal(request.batch, _frames(request), 2 * request.bins)


def _frame_images(request: Request) -> Tensor:
    frames = request.number("spec_size", "max_length", default=_frames(request))
    return request.normal(request.batch, 1, frames, request.bins)


def _frame_mask(request: Request) -> Tensor:
    for key in ("input_features", "input_values"):
        if key in request.made:
            made = request.made[key]
            frames = made.shape[2] if made.dim() == 3 and made.shape[1] == request.bins else made.shape[-2]
            return torch.ones(request.batch, made.shape[-1] if made.dim() == 2 else frames, dtype=torch.long)
    return torch.ones(request.batch, SAMPLES, dtype=torch.long)


def _pixel_mask(request: Request) -> Tensor:
    made = request.made["pixel_values"]
    kept = [size for axis, size in enumerate(made.shape) if axis != made.dim() - 3]
    return torch.ones(kept if made.dim() > 3 else made.shape[:2], dtype=torch.long)


def _words(request: Request) -> Tensor:
    return request.integers(WORDS.start, WORDS.stop, request.batch, request.sizes.length)


def _words_with_features(request: Request) -> Tensor:
    """Return words after one placeholder for each feature that the image or audio tower gives."""
    words = _words(request)
    for kind, keys in _TOWERS.items():
        given = {key: value for key, value in request.made.items() if key.startswith(keys)}
        if not given:
            continue
        token = request.number(*(f"{kind}_token_{word}" for word in ("id", "index")), default=-1)
        if token >= 0:
            count = _feature_count(request.model, kind, given) // request.batch
            words = torch.cat([torch.full((request.batch, count), token), words], dim=1)
    return words


_TOWERS = {
    "image": ("pixel", "image", "high_res", "spatial"),
    "audio": ("input_features", "input_values", "feature"),
}


def _feature_count(model: nn.Module, kind: str, given: Mapping[str, Tensor]) -> int:
    """Run the tower; return how many features it gives to the language model."""
    owner = model if hasattr(model, f"get_{kind}_features") else model.base_model
    features = getattr(owner, f"get_{kind}_features")
    accepted = inspect.signature(features).parameters
    extra = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    with torch.no_grad():
        found = features(
            **{
                key: value
                for key, value in given.items()
                if key in accepted or (extra and key.startswith("image_"))
            }
        )
    found = getattr(found, "pooler_output", found)
    leaves = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    return sum(math.prod(leaf.shape[:-1]) for leaf in leaves)


def _attention_mask(request: Request) -> Tensor:
    mask = torch.ones(request.made["input_ids"].shape[:2], dtype=torch.long)
    mask[-1, -PADDED:] = 0
    return mask


def _image_words(request: Request) -> Tensor:
    """Return 1 at the placeholders of an image, 2 or more nowhere."""
    token = request.number("image_token_id", "image_token_index", default=-1)
    return (request.made["input_ids"] == token).long()


def _boxes(request: Request) -> Tensor:
    corner = request.integers(0, 30, *request.made["input_ids"].shape, 2)
    return torch.cat([corner, corner + request.integers(1, 30, *corner.shape)], dim=-1)


Maker = Callable[[Request], Tensor]
# In the order in which they are made; several makers are tried in turn.
MAKERS: dict[str, tuple[Maker, ...]] = {
    "image_grid_thw": (_grid,),
    "grid_thw": (_grid,),
    "image_sizes": (_image_sizes,),
    "spatial_shapes": (_grid_shapes,),
    "pixel_values": (_images, _videos, _image_lists, _flat_patches, _patches, _patch_images),
    "pixel_values_videos": (_videos,),
    "pixel_attention_mask": (_pixel_mask,),
    "hidden_states": (_flat_patches, _patch_images, _hidden_states),
    "input_values": (_waveforms, _channel_waveforms, _frame_rows),
    "input_features": (_spectrograms, _frame_rows, _wide_frame_rows, _frame_images),
    "input_features_mask": (_frame_mask,),
    "feature_attention_mask": (_frame_mask,),
    "input_ids": (_words_with_features, _words),
    "attention_mask": (_attention_mask,),
    "mm_token_type_ids": (_image_words,),
    "decoder_input_ids": (_words,),
    "bbox": (_boxes,),
}
# Left out unless the forward demands them or ALSO names them.
_OPTIONAL = {"hidden_states"}


def run(model: nn.Module, example: Mapping[str, Tensor]) -> Any:
    """Return the model's outputs, computed without gradients."""
    with torch.no_grad():
        return model(**example)


def example_inputs(
    name: str, model: nn.Module, sizes: tuple[Sizes, ...], seed: int
) -> list[dict[str, Tensor]]:
    """Return keyword tensors for the model's forward, in each of these sizes, after running it on all of them.

    Where an input comes in several shapes among models (images, their patches, or several a row), the first with
    which the forward runs is taken.

    Raises:
        DataError: the forward needs an input that no rule makes, or fails on all that the rules make.
    """
    parameters = inspect.signature(model.forward).parameters
    keys = _keys(name, model, parameters)
    first: Exception | None = None
    makers = {**MAKERS, **ALSO.get(name, {})}
    for chosen in itertools.islice(itertools.product(*(makers[key] for key in keys)), TRIES):
        examples = []
        try:
            for number, size in enumerate(sizes):
                generator = torch.Generator().manual_seed(seed + number)
                request = Request(model.config, model, size, generator)  # type: ignore[arg-type]
                for key, maker in zip(keys, chosen, strict=True):
                    request.made[key] = maker(request)
                run(model, request.made)
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
    for key in {**MAKERS, **also}:
        wanted = key in parameters and key not in unused and key not in _OPTIONAL
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
