"""A Request says what a maker is to make: the input, the sizes, and the model's configuration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

FIRST_SPECIAL = 100  # ids at and above this one are special tokens that were moved down
IMAGE = 32  # pixels along each side of an image, unless the configuration says otherwise


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
        for name, config in itertools.product(names, list(configs(self.config))):
            value = plain(config, name)
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
            ("image_size", "img_size", "input_size"), list(configs(self.config))
        ):
            value = plain(config, name)
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


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and all those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)


def plain(config: PreTrainedConfig, name: str) -> Any:
    """Return the field's value, also under a name that the class maps to another; None where there is none."""
    return vars(config).get(config.attribute_map.get(name, name))
