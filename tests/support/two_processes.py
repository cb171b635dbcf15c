"""One of two processes that train and evaluate a tiny model, started by tests/train/test_devices.py.

Arguments: a folder to write into, the rank, the number of processes, a free port, and how many labels are real.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    folder, rank, world, port = Path(sys.argv[1]), *sys.argv[2:5]
    if int(world) > 1:
        os.environ |= {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
    import torch
    from accumulated import BY_TOKEN, gpt2, unequal_rows
    from tiny_training import Notes, trainer

    from ti_fx import Recipe
    from ti_fx.passes import Distill

    notes = Notes()
    made = trainer(
        folder / f"run-{world}",
        Recipe("two", activations=BY_TOKEN, distill=Distill(task=1.0, mask_padding=True)),
        model=gpt2(),
        arguments_options={
            "max_steps": 2,
            "per_device_train_batch_size": 4 // int(world),
            "per_device_eval_batch_size": 4 // int(world),
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.0,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            **({"ddp_backend": "gloo"} if int(world) > 1 else {}),
        },
        train_dataset=unequal_rows(causal=True),
        eval_dataset=unequal_rows(causal=True)[:6],
        callbacks=[notes],
        evaluate_distillation=True,
    )
    made.train()
    torch.save(notes.gradients[0], folder / f"gradients-{world}-{rank}.pt")
    torch.save(made.model.student_state(), folder / f"weights-{world}-{rank}.pt")
    (folder / f"log-{world}-{rank}.json").write_text(json.dumps(made.state.log_history))
    made.accelerator.end_training()
