"""How much of what 500 steps of TernaryBERT gain over rounding, calibration gains without a gradient.

    python benchmarks/calibrate.py minilm --out runs/calibrate
    python benchmarks/calibrate.py vit --images FOLDER --out runs/calibrate    (Fashion-MNIST's gzipped idx files)
    python benchmarks/calibrate.py minilm --teacher FOLDER --rows 1024 --options "{latents=cell}"

One run trains a teacher, makes a student of it by rounding, one by calibration and one by training, and measures the
KL to the teacher of all three on held-out rows. Teacher and trained student are kept in --out: what was stopped goes
on, and what is there is not made again. Exits with 1 if calibration closes less than SHARE of the gap between rounding
and training, or takes more than SECONDS.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from study import images, questions
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

import ti_fx
from ti_fx.analysis import divergence
from ti_fx.demo.data import load_questions, tokenized
from ti_fx.passes import Calibrate, Ternarize
from ti_fx.train import TernaryTrainer

SHARE, SECONDS = 0.7, 300.0
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """A teacher and its data.

    Attributes:
        load: a new copy of the teacher.
        rows: training rows as Trainer takes them.
        collate: makes a batch of rows.
        held_out: batches to measure on.
        learning_rate, batch_size: of TernaryBERT.
    """

    load: Callable[[], nn.Module]
    rows: Any
    collate: Any
    held_out: list[Batch]
    learning_rate: float
    batch_size: int


def main() -> int:
    """Measure one setting; return the exit code."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out) / arguments.setting
    out.mkdir(parents=True, exist_ok=True)
    setting = minilm(out, arguments) if arguments.setting == "minilm" else vit(out, arguments)
    recipe = replace(
        ti_fx.Recipe.preset("ternarybert"),
        ternarize=Ternarize(weights=arguments.weights),
        steps=arguments.steps,
    )
    used = calibration_rows(setting, arguments.rows)
    gm = ti_fx.capture(setting.load().eval(), {name: value[:2] for name, value in used[0].items()})
    recipe.prepare(gm)
    rounded = divergence(gm.eval(), setting.held_out)
    written = ti_fx.Pass.parse(f"calibrate{arguments.options}")
    assert isinstance(written, Calibrate)
    one = replace(written, data=used, rows=arguments.rows)
    started = time.perf_counter()
    ti_fx.Pipeline(one)(gm)
    seconds = time.perf_counter() - started
    calibrated = divergence(gm, setting.held_out)
    trained = train(setting, recipe, arguments.steps, out / f"{arguments.weights}-{arguments.steps}")
    closed = (rounded.value - calibrated.value) / max(rounded.value - trained, 1e-12)
    print(
        f"{arguments.setting}, weights per {arguments.weights}: KL to the teacher on {rounded.rows:,} held-out rows"
    )
    print(f"  rounding                     {rounded.value:.4f}")
    print(f"  {one}, {arguments.threads} threads: {calibrated.value:.4f}, {seconds:.0f} s")
    print(f"  TernaryBERT, {arguments.steps} steps    {trained:.4f}")
    print(f"  closed: {closed:.1%} of the gap (at least {SHARE:.0%}, within {SECONDS:.0f} s)")
    return int(closed < SHARE or seconds > SECONDS)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("setting", choices=("minilm", "vit"))
    parser.add_argument("--out", default="runs/calibrate", help="where teacher and trained student are kept")
    parser.add_argument("--teacher", type=Path, help="a fine-tuned classifier to use instead (minilm)")
    parser.add_argument("--images", type=Path, help="the folder of Fashion-MNIST's idx files (vit)")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--weights", choices=("tensor", "row"), default="row")
    parser.add_argument("--options", default="", help="of calibrate, as text: {damping=0.1}")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def minilm(out: Path, arguments: argparse.Namespace) -> Setting:
    """MiniLM on question types."""
    data = load_questions()
    folder = arguments.teacher or out / "teacher"
    if not (folder / "config.json").is_file():
        questions.make(None, False, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = len(data.label_names)
    train_rows = tokenized(data.train, tokenizer, label_count=labels)
    validation = tokenized(data.validation, tokenizer, label_count=labels)
    collate = DataCollatorWithPadding(tokenizer)
    rows = [validation[index] for index in range(len(validation))]
    return Setting(lambda: questions.load(folder), train_rows, collate, batches(rows, collate, 64), 2e-4, 32)


def vit(out: Path, arguments: argparse.Namespace) -> Setting:
    """A ViT of 12 layers on Fashion-MNIST, trained here for 600 steps."""
    if arguments.images is None:
        sys.exit("vit needs --images FOLDER with Fashion-MNIST's gzipped idx files")
    folder = out / "teacher"
    if not (folder / "config.json").is_file():
        set_seed(0)
        images.make(arguments.images, 12, folder)
    held_out = images.read(arguments.images, "t10k", 0, images.HELD_OUT)
    rows = images.read(arguments.images, "train", 0, images.TRAIN)
    return Setting(
        lambda: images.load(folder), rows, images.stack, batches(held_out, images.stack, 100), 5e-4, 64
    )


def batches(rows: list[Any], collate: Any, size: int) -> list[Batch]:
    """Return rows in batches, texts of a length together, without labels."""
    if "input_ids" in rows[0]:
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    made = [dict(collate(rows[start : start + size])) for start in range(0, len(rows), size)]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in made]


def calibration_rows(setting: Setting, count: int) -> list[Batch]:
    """Return training rows, drawn at random, without labels."""
    order = torch.randperm(len(setting.rows), generator=torch.Generator().manual_seed(0)).tolist()
    return batches([setting.rows[index] for index in order[:count]], setting.collate, 32)


def train(setting: Setting, recipe: ti_fx.Recipe, steps: int, out: Path) -> float:
    """Return the KL after TernaryBERT's steps; trained once, and gone on with after a stop."""
    result = out / "result.json"
    if result.is_file():
        return float(json.loads(result.read_text(encoding="utf-8"))["kl"])
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=setting.learning_rate,
        per_device_train_batch_size=setting.batch_size,
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=0,
        save_strategy="steps",
        save_steps=100,
        save_total_limit=1,
        logging_steps=100,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="group_by_length" if "input_ids" in setting.rows[0] else "random",
    )
    set_seed(0)
    trainer = TernaryTrainer(
        setting.load(),
        recipe,
        arguments,
        train_dataset=setting.rows,
        data_collator=setting.collate,
        compile="off",
    )
    trainer.train(resume_from_checkpoint=True if any(out.glob("checkpoint-*")) else None)
    found = divergence(trainer.model.prepared().eval(), setting.held_out).value
    result.write_text(json.dumps({"kl": found}), encoding="utf-8")
    return found


if __name__ == "__main__":
    sys.exit(main())
