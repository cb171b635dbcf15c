"""Every field of transformers' TrainingArguments is in a table here: honoured, refused, or of no use to a trainer.

A field that would change nothing is refused with the way to what it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from ti_fx.errors import InputError
from ti_fx.recipe import Recipe

# Done by Trainer, accelerate and torch as for any model.
HONOURED: dict[str, str] = {
    "length of training": "num_train_epochs max_steps ignore_data_skip auto_find_batch_size seed data_seed "
    "full_determinism",
    "batches": "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "average_tokens_across_devices train_sampling_strategy length_column_name remove_unused_columns label_names "
    "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order accelerator_config",
    "optimiser": "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon max_grad_norm",
    "loss": "label_smoothing_factor",
    "numbers": "bf16 fp16 tf32",
    "logs": "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
    "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics",
    "evaluation": "eval_strategy eval_steps eval_delay prediction_loss_only eval_on_start eval_do_concat_batches "
    "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics metric_for_best_model "
    "greater_is_better load_best_model_at_end",
    "checkpoints": "output_dir save_only_model save_strategy save_steps save_on_each_node save_total_limit "
    "enable_jit_checkpoint restore_callback_states_from_checkpoint push_to_hub hub_token hub_private_repo hub_model_id "
    "hub_strategy hub_always_push hub_revision",
    "devices": "use_cpu torch_empty_cache_steps ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_backend ddp_timeout fsdp fsdp_config deepspeed",
}

# Nothing that Trainer itself reads: scripts and launchers do.
UNUSED: dict[str, str] = {
    "do_train": "a script reads it",
    "do_eval": "a script reads it; eval_strategy sets it",
    "do_predict": "a script reads it",
    "resume_from_checkpoint": "a script reads it and passes it to train()",
    "local_rank": "the launcher sets it",
}

_CHECKPOINTING = (
    "recomputes a model's layers, and a captured graph has none; lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps instead"
)
_COMPILE = "would compile the wrapper; use TernaryTrainer(compile='on')"
_ROUNDS = "would round the trained weights themselves; evaluate under bf16=True or fp16=True instead"
_LIGER = "replaces a model's layers, which the captured graph has already; leave it out"

# Any value but the default is refused.
REFUSED: dict[str, str] = {
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "use_cache": "asks for a cache of keys and values, which a training graph has not; leave it False",
    "neftune_noise_alpha": "adds noise behind a model's embedding layer, and a captured graph has no layers; "
    "put the noise into the model's forward, or leave it out",
    "optim_target_modules": "names layers, and a captured graph has none; use an optim that trains every parameter",
    "bf16_full_eval": _ROUNDS,
    "fp16_full_eval": _ROUNDS,
    "parallelism_config": "splits sequences or weights over devices, which a captured graph can't follow; use DDP",
    "ddp_static_graph": "needs the same parameters trained in every step, and phases train others; leave it out",
    "debug": "watches a model's layers, and a captured graph has none; leave it out",
}


def fields() -> set[str]:
    """Return every field that the table has."""
    honoured = {name for group in HONOURED.values() for name in group.split()}
    return honoured | set(UNUSED) | set(REFUSED)


def require_arguments(args: TrainingArguments, recipe: Recipe, model: Any) -> None:
    """Refuse what would change nothing, or could not be done.

    Raises:
        InputError: names the field, and what to use in its place.
    """
    defaults = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
    for name, why in REFUSED.items():
        value = getattr(args, name, None)
        if value != defaults.get(name) and value not in (None, False, "", [], {}):
            raise InputError(f"{name} {why}")
    for name, (is_wrong, why) in _BY_RECIPE.items():
        if is_wrong(args, recipe, model):
            raise InputError(f"{name} {why}")


_BY_RECIPE: dict[str, tuple[Callable[[TrainingArguments, Recipe, Any], bool], str]] = {
    "label_smoothing_factor": (
        lambda args, recipe, model: bool(args.label_smoothing_factor) and not recipe.distill.task,
        "smooths the labels of the task's loss, to which this recipe gives no weight; set Distill(task=...), or leave "
        "it 0",
    ),
    "label_smoothing_factor of a model": (
        lambda args, recipe, model: bool(args.label_smoothing_factor) and not hasattr(model, "config"),
        "without a transformers configuration is not done by Trainer; smooth them in compute_loss_func=",
    ),
    "ddp_find_unused_parameters": (
        lambda args, recipe, model: (
            args.ddp_find_unused_parameters is False
            and any(phase.intervene.at is not None for phase in recipe.phases())
        ),
        "is False, and an intervention leaves some parameters without a gradient; leave it out",
    ),
}
