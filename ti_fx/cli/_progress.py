"""Shows training in the terminal: a bar with the phase, and a line of losses or scores every so often."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """A bar on standard error, where it is a terminal, and the log's lines on standard output."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not Console(stderr=True).is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("training")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Show the bar, at the step that training resumes from."""
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Print the losses by name, or the scores of an evaluation."""
        logs = logs or {}
        if "phase" in logs:
            self.bar.update(self.task, description=str(logs["phase"]))
            parts = [
                f"{name.removeprefix('loss_')} {logs[name]:.4g}" for name in logs if name.startswith("loss_")
            ]
            shares = [
                f"{name.replace('_', ' ', 1)} {logs[name]:.3f}" for name in logs if name.startswith("blend_")
            ]
            line = f"{logs['phase']}: loss {logs['loss']:.4g} ({', '.join([*parts, *shares])})"
        elif "eval_accuracy" in logs:
            line = f"evaluation: accuracy {logs['eval_accuracy']:.4f}, macro-F1 {logs['eval_macro_f1']:.4f}"
        else:
            return
        self.console.print(
            f"step {state.global_step}/{state.max_steps}  {line}", highlight=False, soft_wrap=True
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Take the bar away."""
        self.bar.stop()
