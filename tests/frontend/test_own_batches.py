"""Inputs whose batches are not one: an image with two texts, rows that share their positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import seeded
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import ti_fx
from ti_fx.errors import InputError

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SPECIAL = {"eos_token_id": 1099, "bos_token_id": 1, "pad_token_id": 0}
TEXT = {**SIZES, **SPECIAL, "vocab_size": 1100, "max_position_embeddings": 16}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}


def clip_inputs(images: int, texts: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(images * 10 + texts)
    ids = torch.randint(2, 1099, (texts, 6), generator=generator)
    ids[:, -1] = 1099
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(images, 3, 8, 8, generator=generator),
    }


@pytest.fixture(scope="module")
def clip() -> Any:
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    made: nn.Module = seeded(lambda: CLIPModel(config))
    return made.eval()


def test_an_image_with_two_texts(clip: Any, tmp_path: Path) -> None:
    gm = ti_fx.capture(clip, clip_inputs(1, 2)).eval()
    dims = ti_fx.capture_report(gm).dims
    assert dims["input_ids"][0] == "batch"
    assert dims["pixel_values"][0] == "pixel_values_batch"
    for images, texts in ((1, 2), (2, 1), (3, 2), (2, 2), (1, 5), (4, 4)):
        inputs = clip_inputs(images, texts)
        expected = clip(**inputs).logits_per_image
        assert torch.allclose(gm(**inputs)["logits_per_image"], expected, atol=1e-5), (images, texts)
        assert expected.shape == (images, texts)


@pytest.mark.slow
def test_equal_batches_are_one(clip: Any) -> None:
    gm = ti_fx.capture(clip, clip_inputs(2, 2))
    dims = ti_fx.capture_report(gm).dims
    assert dims["input_ids"][0] == dims["pixel_values"][0] == "batch"
    with pytest.raises(InputError, match="must be equal"):
        gm(**clip_inputs(1, 2))


class Retrieval(nn.Module):
    """Queries that attend to documents; ``offset`` is one row that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, queries: Tensor, documents: Tensor, offset: Tensor) -> Tensor:
        keys = self.document(documents)
        attended = (self.query(queries) @ keys.T).softmax(-1) @ keys
        result: Tensor = attended + offset
        return result


@pytest.mark.parametrize(("queries", "documents"), [(3, 5), (1, 4), (4, 1), (1, 2)])
@pytest.mark.parametrize("dynamic", ["auto", "batch"])
def test_each_family_of_inputs_has_its_batch(queries: int, documents: int, dynamic: Any) -> None:
    def inputs(first: int, second: int) -> dict[str, Tensor]:
        return {
            "queries": torch.randn(first, 8),
            "documents": torch.randn(second, 8),
            "offset": torch.randn(1, 8) if queries > 1 else torch.randn(8),
        }

    model = seeded(Retrieval)
    gm = ti_fx.capture(model, inputs(queries, documents), dynamic=dynamic)
    for first, second in ((queries, documents), (6, 3), (2, 2), (1, 7), (5, 1)):
        given = inputs(first, second)
        assert torch.allclose(gm(**given), model(**given), atol=1e-6)
    assert isinstance(ti_fx.capture_report(gm).dims["offset"][0], int)
