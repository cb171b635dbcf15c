"""A checkpoint says how its graph was made from the model, and from that the graph is made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import CheckpointError, RecipeError
from ti_fx.frontend.capture import capture
from ti_fx.frontend.dynamic_sizes import Dynamic
from ti_fx.frontend.wrappers import unwrapped
from ti_fx.ir.edit import fork
from ti_fx.ir.facts import PREPARE, facts, record_facts
from ti_fx.ir.pipeline import Pass, Pipeline
from ti_fx.ir.roles import LEARNED_PREFIXES
from ti_fx.recipe import Recipe

_JSON = (bool, int, float, str, type(None))


def how_made(gm: GraphModule) -> dict[str, Any]:
    """Return how a prepared graph was made, as JSON values: the capture's options, and the passes since."""
    known = facts(gm)
    constants = {} if known.capture is None else known.capture.constants
    return {
        "dynamic": known.dynamic,
        "constants": {name: value for name, value in constants.items() if isinstance(value, _JSON)},
        "passes": list(known.passes),
    }


def has_own_passes(made: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether other passes than a recipe's own made the graph: they may have given it tensors that no model has."""
    return bool(recipe.extra_passes) or _passes(made) != [PREPARE]


def require_fit(
    source: nn.Module, weights: Mapping[str, Tensor], where: str | Path, *, is_whole: bool
) -> None:
    """Refuse a model whose tensors are not those of a checkpoint, before it is captured.

    Args:
        source: the model, or a graph that was captured from it.
        weights: the checkpoint's.
        where: the checkpoint's folder.
        is_whole: whether the model has them all: no pass has made any.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    with unwrapped(source):
        own = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, value in weights.items():
        if name not in own and (not is_whole or name.startswith(LEARNED_PREFIXES)):
            continue  # a pass may have made it, or did
        if name not in own or own[name].shape != value.shape:
            found = tuple(own[name].shape) if name in own else "missing"
            raise CheckpointError(
                f"{where} is of another model: {name} is {tuple(value.shape)} there and {found} in "
                f"{type(source).__name__}"
            )


def make_again(
    source: nn.Module, recipe: Recipe, made: Mapping[str, Any], example: Mapping[str, Tensor]
) -> GraphModule:
    """Return a prepared graph of the source model, made as the checkpoint's was; the teacher's values are any.

    Args:
        source: the model, or a graph that was captured from it, which may have been through the first of the passes.
        recipe: of the checkpoint.
        made: what :func:`how_made` returned; empty of an old checkpoint.
        example: the inputs that the checkpoint's graph was captured with.

    Raises:
        CheckpointError: a pass is not known here, or the source graph went through others.
    """
    if isinstance(source, GraphModule):
        gm = fork(source)
    else:
        device = next((parameter.device for parameter in source.parameters()), torch.device("cpu"))
        inputs: dict[str, Any] = {name: value.to(device) for name, value in example.items()}
        dynamic = cast("Dynamic", made.get("dynamic", "auto"))
        gm = capture(source, inputs | dict(made.get("constants", {})), dynamic=dynamic)
    passes, ran = _passes(made), list(facts(gm).passes)
    if ran != passes[: len(ran)]:
        raise CheckpointError(
            f"the graph given as model= went through {', '.join(ran)}, the checkpoint's through {', '.join(passes)}; "
            "give one that is captured alone, or has been through the first of these"
        )
    for written in passes[len(ran) :]:
        if written == PREPARE:
            _prepare(gm, recipe)
        elif not (one := _parsed(written)).values_alone:
            Pipeline(one)(gm)
    return gm


def _prepare(gm: GraphModule, recipe: Recipe) -> None:
    """Prepare a graph by a recipe, without the passes that change values alone, which the checkpoint has."""
    extra = tuple(one for one in recipe.extra_passes if not one.values_alone)
    replace(recipe, extra_passes=extra).prepare(gm)
    record_facts(gm, recipe=recipe.to_dict())


def _passes(made: Mapping[str, Any]) -> list[str]:
    return list(made.get("passes", [PREPARE]))


def _parsed(written: str) -> Pass:
    try:
        return Pass.parse(written)
    except RecipeError as error:
        raise CheckpointError(
            f"the checkpoint's graph went through the pass {written}, which is not known here ({error}); import the "
            "module that defines it first, or give model= a captured graph that it has run on"
        ) from None
