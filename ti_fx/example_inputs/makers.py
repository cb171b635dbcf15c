"""A table of makers gives each input of a forward by its name."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ti_fx.example_inputs import images_and_sound
from ti_fx.example_inputs.request import FIRST_SPECIAL, Request
from ti_fx.frontend.patches import plain_torch_layers

WORDS = range(60, FIRST_SPECIAL)  # ids that are no special token in any tiny configuration
PADDED = 3  # positions at the end of the last row


def _hidden_states(request: Request) -> Tensor:
    width = request.number("hidden_size", default=64)
    return request.normal(request.batch, request.sizes.length, width)


def _words(request: Request) -> Tensor:
    return request.integers(WORDS.start, WORDS.stop, request.batch, request.sizes.length)


def _words_with_features(request: Request) -> Tensor:
    """Return words after one placeholder for each feature that the image or audio tower gives."""
    words = _words(request)
    for kind, token in _placeholders(request).items():
        count = _feature_count(request, kind) // request.batch
        words = torch.cat([torch.full((request.batch, count), token), words], dim=1)
    return words


def _words_as_told(request: Request) -> Tensor:
    """Return words after as many placeholders as the forward says that it misses."""
    words = _words(request)
    for token in _placeholders(request).values():
        one = torch.cat([torch.full((request.batch, 1), token), words], dim=1)
        mask = {"attention_mask": torch.ones_like(one)}
        try:
            run(request.model, {**request.made, **mask, "input_ids": one})
        except ValueError as error:
            told = re.search(r"features:? (\d+)", str(error))
            count = int(told.group(1)) // request.batch if told else 0
            words = torch.cat([torch.full((request.batch, count), token), words], dim=1)
    return words


_TOWERS = {
    "image": ("pixel_values",),
    "video": ("pixel_values_videos", "pixel_values"),
    "audio": ("input_features", "input_values"),
}


def _placeholders(request: Request) -> dict[str, int]:
    """Return the token that stands for a feature, for each kind of input that was made."""
    found = {}
    for kind, keys in _TOWERS.items():
        names = (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_token")
        token = request.number(*names, default=-1)
        if (
            token >= 0
            and any(key in request.made for key in keys)
            and not (kind == "video" and "image" in found)
        ):
            found[kind] = token
    return found


def _feature_count(request: Request, kind: str) -> int:
    """Run the tower; return how many features it gives to the language model, all rows together."""
    owner = next(
        (one for one in (request.model.base_model, request.model) if hasattr(one, f"get_{kind}_features")),
        request.model,
    )
    features = getattr(owner, f"get_{kind}_features")
    accepted = inspect.signature(features).parameters
    with torch.no_grad():
        found = features(**{key: value for key, value in request.made.items() if key in accepted})
    found = getattr(found, "pooler_output", found)
    leaves = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    return sum(math.prod(leaf.shape[:-1]) for leaf in leaves)


def run(model: nn.Module, example: Mapping[str, Tensor]) -> Any:
    """Return the model's outputs, computed without gradients, and without torch.nn's fast path: it skips padding."""
    with torch.no_grad(), plain_torch_layers():
        return model(**example)


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


def _ones(*names: str) -> Maker:
    """Return a maker of a mask as large as an input that was made."""
    return lambda request: torch.ones(
        next(request.made[n] for n in names if n in request.made).shape, dtype=torch.long
    )


def _numbers(*shape: int) -> Maker:
    """Return a maker of normal numbers: [batch, *shape]."""
    return lambda request: request.normal(request.batch, *shape)


def _patch_numbers(request: Request) -> Tensor:
    """Return a number for each patch of an image: [batch, patches]."""
    patch = request.number("patch_size", default=16)
    height, width = request.made["pixel_values"].shape[-2:]
    return _numbers((height // patch) * (width // patch))(request)


def _same(*shape: int, value: int = 1) -> Maker:
    """Return a maker of one whole number everywhere: [batch, *shape]."""
    return lambda request: torch.full((request.batch, *shape), value)


def _steps(*width: str) -> Maker:
    """Return a maker of numbers for each step: [batch, length, the field's value]."""
    return lambda request: request.normal(
        request.batch, request.sizes.length, request.number(*width, default=1)
    )


def _times(request: Request) -> Tensor:
    return torch.arange(request.sizes.length).expand(request.batch, -1).clone()


def _past(request: Request) -> int:
    lags: list[int] = getattr(request.config, "lags_sequence", None) or [0]
    return request.number("context_length", default=16) + max(lags)


def _past_values(request: Request) -> Tensor:
    return request.normal(request.batch, _past(request))


def _past_channels(request: Request) -> Tensor:
    channels = request.number("num_input_channels", default=1)
    return request.normal(request.batch, request.number("context_length", default=32), channels)


def _past_times(request: Request) -> Tensor:
    return request.normal(request.batch, _past(request), request.number("num_time_features", default=1))


def _future_values(request: Request) -> Tensor:
    return request.normal(request.batch, request.number("prediction_length", default=8))


def _future_times(request: Request) -> Tensor:
    steps = request.number("prediction_length", default=8)
    return request.normal(request.batch, steps, request.number("num_time_features", default=1))


def _visual_features(request: Request) -> Tensor:
    return request.normal(request.batch, 5, request.number("visual_feat_dim", default=64))


def _image_positions(request: Request) -> Tensor:
    """Return 1 for the first positions, as many as an image has features."""
    mask = torch.zeros(request.made["input_ids"].shape, dtype=torch.long)
    mask[:, 1 : 1 + request.number("latent_query_num", default=4)] = 1
    return mask


def _long_words(request: Request) -> Tensor:
    """Return words enough to hold the image's features."""
    count = request.number("latent_query_num", default=4)
    return request.integers(WORDS.start, WORDS.stop, request.batch, request.sizes.length + count)


def _image_attention(request: Request) -> Tensor:
    return torch.ones(*request.made["input_ids"].shape, 1, dtype=torch.long)


def _code_words(request: Request) -> Tensor:
    """Return one word a codebook at each step: [batch, length, codebooks]."""
    books = request.number("num_channels", "num_codebooks", default=1)
    return request.integers(0, 60, request.batch, request.sizes.length, books)


def _text_and_codes(request: Request) -> Tensor:
    """Return a word and one code a codebook at each step: [batch, length, 1 + codebooks]."""
    books = request.number("num_codebooks", default=1)
    return request.integers(1, 60, request.batch, request.sizes.length, 1 + books)


def _codebook_rows(request: Request) -> Tensor:
    """Return the codebooks as rows: [batch · codebooks, length]."""
    books = request.number("num_codebooks", default=1)
    return request.integers(0, 60, request.batch * books, request.sizes.length)


def _cross_mask(request: Request) -> Tensor:
    return torch.ones(*request.made["input_ids"].shape, 1, 4, dtype=torch.long)


def _class_words(request: Request) -> Tensor:
    """Return the names of two classes for each row, one after the other."""
    return request.integers(WORDS.start, WORDS.stop, 2 * request.batch, 6)


def _task_words(request: Request) -> Tensor:
    length = request.number("task_seq_len", default=8)
    return request.integers(WORDS.start, WORDS.stop, request.batch, length)


def _quarter_words(request: Request) -> Tensor:
    """Return words after one placeholder for each four frames."""
    (token,) = _placeholders(request).values()
    count = request.made["input_features"].shape[-1] // 4
    return torch.cat([torch.full((request.batch, count), token), _words(request)], dim=1)


def _encoded(request: Request) -> Tensor:
    return request.normal(request.batch, 9, request.number("encoder_hidden_size", "hidden_size", default=64))


Maker = Callable[[Request], Tensor]
# In the order in which they are made; several makers are tried in turn.
MAKERS: dict[str, tuple[Maker, ...]] = {
    "image_grid_thw": (images_and_sound.grid,),
    "grid_thw": (images_and_sound.grid,),
    "image_sizes": (images_and_sound.image_sizes, images_and_sound.wide_sizes),
    "spatial_shapes": (images_and_sound.grid_shapes,),
    "merge_sizes": (lambda request: torch.ones(request.batch, dtype=torch.long),),
    "image_merge_sizes": (lambda request: torch.full((request.batch,), 2),),
    "pixel_values": (
        images_and_sound.images,
        images_and_sound.videos,
        images_and_sound.image_lists,
        images_and_sound.flat_patches,
        images_and_sound.patches,
        images_and_sound.patch_images,
        images_and_sound.tiles,
    ),
    "high_res_pixel_values": (images_and_sound.images,),
    "prompt_pixel_values": (images_and_sound.images,),
    "prompt_masks": (images_and_sound.images,),
    "pixel_values_videos": (images_and_sound.videos,),
    "pixel_attention_mask": (images_and_sound.pixel_mask, images_and_sound.tile_mask),
    "target_sizes": (images_and_sound.grid_shapes,),
    "pixel_position_ids": (images_and_sound.patch_places,),
    "aspect_ratio_ids": (_same(1),),
    "aspect_ratio_mask": (_same(1, 4),),
    "hidden_states": (images_and_sound.flat_patches, images_and_sound.patch_images, _hidden_states),
    "input_values": (
        images_and_sound.waveforms,
        images_and_sound.channel_waveforms,
        images_and_sound.frame_rows,
    ),
    "input_features": (
        images_and_sound.spectrograms,
        images_and_sound.frame_rows,
        images_and_sound.wide_frame_rows,
        images_and_sound.frame_images,
    ),
    "audio_mel": (images_and_sound.frame_rows,),
    "input_features_mask": (images_and_sound.last_mask, images_and_sound.middle_mask),
    "feature_attention_mask": (images_and_sound.last_mask, images_and_sound.middle_mask),
    "audio_mel_mask": (lambda request: torch.zeros(request.made["audio_mel"].shape[:2], dtype=torch.bool),),
    "input_ids": (_words_with_features, _words_as_told, _words),
    "attention_mask": (_attention_mask,),
    "image_embeds_position_mask": (_image_positions,),
    "image_attention_mask": (_image_attention,),
    "cross_attention_mask": (_cross_mask,),
    "mm_token_type_ids": (_image_words,),
    "qformer_input_ids": (_words,),
    "classes_input_ids": (_class_words,),
    "classes_attention_mask": (_ones("classes_input_ids"),),
    "tasks_input_ids": (_words,),
    "tasks_attention_mask": (_ones("tasks_input_ids"),),
    "classes_structure": (lambda request: torch.full((request.batch,), 2),),
    "decoder_input_ids": (_words,),
    "bbox": (_boxes,),
    "visual_feats": (_visual_features,),
    "visual_pos": (_numbers(5, 4),),
    "task_inputs": (_task_words,),
    "query_embeds": (_numbers(8, 64),),
    "encoder_hidden_states": (_encoded,),
    "states": (_steps("state_dim"),),
    "actions": (_steps("act_dim"),),
    "rewards": (_steps(),),
    "returns_to_go": (_steps(),),
    "timesteps": (_times,),
    "past_values": (_past_values, _past_channels),
    "past_time_features": (_past_times,),
    "past_observed_mask": (_ones("past_values"),),
    "past_values_padding": (
        lambda request: torch.zeros(request.made["past_values"].shape, dtype=torch.long),
    ),
    "freq": (_same(1, value=0),),
    "future_values": (_future_values,),
    "future_time_features": (_future_times,),
    "latents": (_numbers(64, 16),),
    "noise": (_patch_numbers,),
}
# Shapes that only some models take, tried in place of the rule's.
OTHER_MAKERS: dict[str, Maker] = {
    "aspect images": images_and_sound.aspect_images,
    "code words": _code_words,
    "codebook rows": _codebook_rows,
    "large images": images_and_sound.large_images,
    "long words": _long_words,
    "pairs": images_and_sound.pairs,
    "quarter words": _quarter_words,
    "square images": images_and_sound.square_images,
    "text and code words": _text_and_codes,
    "tiles": images_and_sound.tiles,
    "wide sizes": images_and_sound.wide_sizes,
    "words": _words,
    "image lists": images_and_sound.image_lists,
    "numbers": _steps("hidden_size"),
}
