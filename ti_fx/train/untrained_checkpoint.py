"""A student that was calibrated, not trained, is written as a checkpoint that training and export go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from ti_fx.frontend.wrappers import plain_model
from ti_fx.recipe import Recipe
from ti_fx.train import checkpoint
from ti_fx.train.finished import finished_files
from ti_fx.train.model import TernaryModel


def save_untrained(
    folder: str | Path,
    gm: GraphModule,
    recipe: Recipe,
    model: nn.Module,
    *,
    example: Mapping[str, Tensor],
    tokenizer: Any = None,
) -> None:
    """Write a checkpoint of step 0 into a folder, whole or not at all; other files in it are left alone.

    Args:
        folder: made if missing.
        gm: the graph, prepared by ``recipe``.
        recipe: of the student.
        model: the model that was captured; what makes it again is written, and of a Hugging Face one its config.
        example: inputs that fit it.
        tokenizer: written beside it, if it has ``save_pretrained``.

    Raises:
        InputError: the folder can't be written.
    """
    source = plain_model(model)
    with finished_files(Path(folder), checkpoint.DESCRIPTION) as temporary:
        if isinstance(source, PreTrainedModel):
            source.config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        checkpoint.save(
            temporary,
            TernaryModel(gm, recipe),
            example=example,
            source=checkpoint.source_facts(source),
            position={"step": 0, "phase": recipe.phases()[0].name},
        )
