"""These makers return images, videos, their patches, waveforms and spectrograms."""

from __future__ import annotations

import torch
from torch import Tensor

from ti_fx.example_inputs.request import Request

SAMPLES = 1920  # of a waveform
FRAMES = 4  # of a video
GRID = 4  # patches along each side of an image that comes as a list of patches


def images(request: Request) -> Tensor:
    """Return images: [batch, channels, height, width]."""
    return request.normal(request.batch, request.channels, *request.image)


def image_lists(request: Request) -> Tensor:
    """Return one image a row, in a list: [batch, 1, channels, height, width]."""
    return request.normal(request.batch, 1, request.channels, *request.image)


def videos(request: Request) -> Tensor:
    """Return videos: [batch, frames, channels, height, width]."""
    length = request.number("num_frames", "frames_per_clip", default=FRAMES)
    return request.normal(request.batch, length, request.channels, *request.image)


def patch_width(request: Request) -> int:
    """Return the numbers in one patch."""
    patch = request.number("patch_size", "spatial_patch_size", default=8)
    return (
        request.channels * request.number("temporal_patch_size", "patch_temporal", default=1) * patch * patch
    )


def flat_patches(request: Request) -> Tensor:
    """Return the patches of all images one after the other, as models with a grid take them."""
    return request.normal(request.batch * GRID * GRID, patch_width(request))


def patches(request: Request) -> Tensor:
    """Return each image's patches: [batch, patches, numbers]."""
    return request.normal(request.batch, GRID * GRID, patch_width(request))


def patch_images(request: Request) -> Tensor:
    """Return the patches of all images as small images: [patches, channels, height, width]."""
    patch = request.number("patch_size", default=8)
    return request.normal(request.batch * GRID * GRID, request.channels, patch, patch)


def grid(request: Request) -> Tensor:
    """Return each image's frames, rows and columns of patches: [batch, 3]."""
    return torch.tensor([[1, GRID, GRID]] * request.batch)


def grid_shapes(request: Request) -> Tensor:
    """Return each image's rows and columns of patches: [batch, 2]."""
    return torch.tensor([[GRID, GRID]] * request.batch)


def patch_places(request: Request) -> Tensor:
    """Return the column and row of each patch: [batch, patches, 2]."""
    places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
    return places.expand(request.batch, -1, -1).clone()


def image_sizes(request: Request) -> Tensor:
    """Return each image's height and width: [batch, 2]."""
    return torch.tensor([list(request.image)] * request.batch)


def tile_mask(request: Request) -> Tensor:
    """Return a mask of the images in each row: [batch, images]."""
    return torch.ones(request.made["pixel_values"].shape[:2], dtype=torch.long)


def large_images(request: Request) -> Tensor:
    """Return images that are cut into four by four: [batch, channels, height, width]."""
    height, width = request.image
    return request.normal(request.batch, request.channels, 4 * height, 4 * width)


def waveforms(request: Request) -> Tensor:
    """Return waveforms: [batch, samples]."""
    return request.normal(request.batch, SAMPLES)


def channel_waveforms(request: Request) -> Tensor:
    """Return waveforms: [batch, channels, samples]."""
    return request.normal(request.batch, request.number("audio_channels", "channels", default=1), SAMPLES)


def frames(request: Request) -> int:
    """Return how many frames a spectrogram has."""
    return 2 * request.number("max_source_positions", default=32)


def spectrograms(request: Request) -> Tensor:
    """Return spectrograms: [batch, bins, frames]."""
    return request.normal(request.batch, request.bins, frames(request))


def frame_rows(request: Request) -> Tensor:
    """Return spectrograms: [batch, frames, bins]."""
    length = request.number("max_length", default=frames(request))
    return request.normal(request.batch, length, request.bins)


def wide_frame_rows(request: Request) -> Tensor:
    """Return two frames joined to one, as some feature extractors give them."""
    return request.normal(request.batch, frames(request), 2 * request.bins)


def frame_images(request: Request) -> Tensor:
    """Return spectrograms as images of one channel: [batch, 1, frames, bins]."""
    length = request.number("spec_size", "max_length", default=frames(request))
    return request.normal(request.batch, 1, length, request.bins)


def sound(request: Request) -> Tensor:
    """Return the sound that was made."""
    return (
        request.made["input_features"] if "input_features" in request.made else request.made["input_values"]
    )


def last_mask(request: Request) -> Tensor:
    """Return a mask over the last axis of the sound."""
    return torch.ones(request.batch, sound(request).shape[-1], dtype=torch.long)


def middle_mask(request: Request) -> Tensor:
    """Return a mask over the middle axis of the sound."""
    return torch.ones(request.batch, sound(request).shape[1], dtype=torch.long)


def pixel_mask(request: Request) -> Tensor:
    """Return a mask of the pixels of all images, or of their patches."""
    made = request.made["pixel_values"]
    kept = [size for axis, size in enumerate(made.shape) if axis != made.dim() - 3]
    return torch.ones(kept if made.dim() > 3 else made.shape[:2], dtype=torch.long)


def tiles(request: Request) -> Tensor:
    """Return an image cut into two and the whole of it."""
    return request.normal(request.batch, 3, request.channels, *request.image)


def wide_sizes(request: Request) -> Tensor:
    """Return the size of an image that is cut into two."""
    height, width = request.image
    return torch.tensor([[height, 2 * width]] * request.batch)


def square_images(request: Request) -> Tensor:
    """Return images as high as wide."""
    side = request.image[1]
    return request.normal(request.batch, request.channels, side, side)


def pairs(request: Request) -> Tensor:
    """Return two images a row: [batch, 2, channels, height, width]."""
    return request.normal(request.batch, 2, request.channels, *request.image)


def aspect_images(request: Request) -> Tensor:
    """Return one image of four tiles a row: [batch, 1, 4, channels, height, width]."""
    return request.normal(request.batch, 1, 4, request.channels, *request.image)
