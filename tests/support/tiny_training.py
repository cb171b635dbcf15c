"""What the training tests share: rows of random tokens, arguments for short runs, and a trainer of a tiny BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import VOCABULARY, bert_model
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from ti_fx import Recipe
from ti_fx.recipe import Phase
from ti_fx.train import TernaryTrainer

LENGTH = 8
TERMS = ("logits", "layer_outputs", "scores", "attention_outputs")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PLAIN = Recipe("plain", schedule=(Phase("quantise"),))


def rows(count: int = 48, *, padded: bool = True, labels: bool = True) -> Any:
    """A list of rows of random tokens with labels 0, 1, 2; padded rows have 5 to 8 real tokens."""
    generator = torch.Generator().manual_seed(3)
    made: list[dict[str, Any]] = []
    for index in range(count):
        real = LENGTH - index % 4 if padded else LENGTH
        words = torch.randint(1, VOCABULARY, (real,), generator=generator).tolist()
        row = {
            "input_ids": words + [0] * (LENGTH - real),
            "attention_mask": [1] * real + [0] * (LENGTH - real),
        }
        made.append({**row, "labels": index % 3} if labels else row)
    return made


def batch(count: int = 4) -> dict[str, Tensor]:
    """The inputs of the first rows."""
    chosen = rows(count, labels=False)
    return {name: torch.tensor([row[name] for row in chosen]) for name in chosen[0]}


def arguments(folder: str | Path, **options: Any) -> TrainingArguments:
    """Short, silent, on the CPU; every step is logged and nothing is saved unless asked for."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 0.25,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**settings, **options})


def trainer(
    folder: str | Path,
    recipe: Recipe | str | None = None,
    *,
    model: nn.Module | None = None,
    arguments_options: dict[str, Any] | None = None,
    **options: Any,
) -> TernaryTrainer:
    """A trainer of a tiny BERT by ti-g with 6 intervened steps, as far as the options leave it so."""
    settings: dict[str, Any] = {"train_dataset": rows(), "eval_dataset": rows(8), "compile": "off"}
    return TernaryTrainer(
        bert_model() if model is None else model,
        Recipe.preset("ti-g", intervention_steps=6) if recipe is None else recipe,
        arguments(folder, **(arguments_options or {})),
        **{**settings, **options},
    )


def history(made: TernaryTrainer) -> list[dict[str, Any]]:
    """What was logged at each step; Trainer's own type knows numbers only, and phases have names."""
    return [dict(entry) for entry in made.state.log_history if "loss" in entry]


def weights(made: TernaryTrainer) -> dict[str, Tensor]:
    """A copy of the student's tensors."""
    return {name: value.detach().clone() for name, value in made.model.student_state().items()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that are not bit-equal."""
    return [
        name for name in sorted({*one, *other}) if name not in one or not torch.equal(one[name], other[name])
    ]


class At(TrainerCallback):
    """Call a function at the beginning and at the end of every optimiser step."""

    def __init__(self, begin: Any = None, end: Any = None) -> None:
        self.begin, self.end = begin, end

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if self.begin is not None:
            self.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if self.end is not None:
            self.end(state.global_step)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits: Any = prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, also of those that a checkpoint leaves out."""
    return {
        name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]
    }


class Notes(TrainerCallback):
    """What the optimiser saw before and after each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.untrained: list[set[str]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.states: list[int] = []
        self.ages: list[set[int]] = []
        self.optimizers: set[int] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        optimizer = options["optimizer"]
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.optimizers.add(id(optimizer))
        self.states.append(len(optimizer.state))
        named = {name: value for name, value in options["model"].named_parameters() if value.requires_grad}
        self.untrained.append({name for name, value in named.items() if value.grad is None})
        self.gradients.append(
            {name: value.grad.clone() for name, value in named.items() if value.grad is not None}
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.ages.append({int(one["step"]) for one in options["optimizer"].state.values()})


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return F.cross_entropy(logits, labels)
