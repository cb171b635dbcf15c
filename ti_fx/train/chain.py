"""A chain of recipes is trained in turn: each student is the next one's teacher, and what that one begins with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from transformers import TrainingArguments

from ti_fx.errors import InputError
from ti_fx.ir.edit import fork, tensor
from ti_fx.ir.inserted import quantised_weights
from ti_fx.recipe import Recipe
from ti_fx.train import checkpoint
from ti_fx.train.trainer import TernaryTrainer


def stage_steps(recipe: Recipe, steps: int) -> list[int]:
    """Return how many of so many optimiser steps each recipe of a chain has: equal parts, the last what is left.

    Raises:
        InputError: there are fewer steps than recipes.
    """
    count = len(recipe.chain())
    if steps < count:
        raise InputError(
            f"recipe {recipe.name!r} is a chain of {count}, and {steps} steps are fewer; give more steps"
        )
    part = steps // count
    return [part] * (count - 1) + [steps - part * (count - 1)]


def stage_folder(out: str | Path, recipe: Recipe, index: int) -> Path:
    """Return where a chain's stage is trained: the last in ``out`` itself, the others below it."""
    last = index == len(recipe.teachers)
    return Path(out) if last else Path(out) / f"teacher-{index + 1}"


def trainers(
    model: nn.Module,
    recipe: Recipe,
    args: TrainingArguments,
    *,
    teacher: nn.Module | None = None,
    resume: bool = False,
    **options: Any,
) -> Iterator[tuple[TernaryTrainer, bool]]:
    """Yield a trainer for each recipe of a chain that is still to be trained, and whether a checkpoint goes on.

    Train each before the next is asked for: ``trainer.train(resume_from_checkpoint=goes_on or None)``. Of a recipe
    without teachers there is one trainer. What a stage ends with is saved in its folder, from which a resumed chain
    goes on.

    Args:
        model: as for TernaryTrainer; its Parameters are trained in every stage.
        recipe: the chain.
        args: ``max_steps`` is that of all stages together; ``output_dir`` the last one's.
        teacher: of the first stage.
        resume: go on with what is in the folders.
        options: of every TernaryTrainer.

    Raises:
        InputError: no steps are given, or too few. CheckpointError: a folder is another run's.
    """
    steps = args.max_steps if args.max_steps > 0 else recipe.steps
    if recipe.teachers and not steps:
        raise InputError(
            f"recipe {recipe.name!r} is a chain, whose steps are shared out; give max_steps or its steps"
        )
    parts = stage_steps(recipe, steps) if steps else [args.max_steps]
    for index, (one, part) in enumerate(zip(recipe.chain(), parts, strict=True)):
        last, folder = index == len(parts) - 1, stage_folder(str(args.output_dir), recipe, index)
        own = copy.copy(args)
        own.output_dir, own.max_steps = str(folder), part
        source = fork(model) if isinstance(model, GraphModule) else model
        made = TernaryTrainer(source, one, own, teacher=teacher, **options)
        if not last and resume and (folder / checkpoint.DESCRIPTION).is_file():
            checkpoint.restore(made.model, folder, checkpoint.read_facts(folder))
        else:
            yield made, resume and checkpoint.last_finished(folder) is not None
            if not last:
                made.save_model(str(folder))
        if not last:
            teacher = as_teacher(made)


def as_teacher(trained: TernaryTrainer) -> nn.Module:
    """Return a copy of the trained model with each weight as the student's quantisers read it.

    Its activations are not quantised: a teacher's are in full precision.
    """
    gm, made = trained.model.prepared(), copy.deepcopy(trained.source)
    named = dict(made.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for node in quantised_weights(gm):
            quantise: Any = node.target
            read = [str(one.target) for one in node.all_input_nodes]
            named[read[0]].copy_(quantise(*(tensor(gm, name) for name in read), **node.kwargs))
    return made
