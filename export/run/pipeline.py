"""``pipeline`` makes a function of texts or images from an exported file, with transformers' own pipelines.

What a file is for is read from its inputs and outputs, and what goes with it from the files beside it, which
``to_onnx`` wrote there together with it: config.json and the tokenizer's or the image processor's. Others are refused.

=====================  ===================================================  ====================================
task                   the file takes and gives                             the callable takes
=====================  ===================================================  ====================================
text-classification    input_ids; logits ``[batch, labels]``                a text, a pair of texts, or a list
image-classification   pixel_values; logits ``[batch, labels]``             a PIL image, a path, or a list
text-generation        input_ids and a cache (``with_cache``)               a prompt, a chat, or a list
=====================  ===================================================  ====================================
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ti_fx.errors import InputError, MissingExtra, did_you_mean, first_line
from ti_fx.export import arguments
from ti_fx.export.cached.names import CROSS_KEY, PAST_KEY
from ti_fx.export.file.companions import CONFIG, PROCESSOR, TOKENIZER, companions, require_companion
from ti_fx.export.run.session import Runtime

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedConfig

TEXT, IMAGE, GENERATION = "text-classification", "image-classification", "text-generation"
TASKS = (TEXT, IMAGE, GENERATION)


def pipeline(
    path: str | os.PathLike[str], task: str | None = None, *, threads: int | None = None, **options: Any
) -> Pipeline:
    """Return transformers' pipeline for an exported file, with the tokenizer or image processor saved beside it.

    >>> pipeline("student.onnx")("Who wrote this?")  # doctest: +SKIP
    [{'label': 'human', 'score': 0.97}]

    Texts are cut at the longest that tokenizer and file take, and padded to the file's length where that is fixed.
    What the pipeline can't take raises InputError, too.

    Args:
        path: the file.
        task: ``text-classification``, ``image-classification`` or ``text-generation``; None takes what the file is for.
        threads: threads within a node; None leaves it to ONNX Runtime (one per core).
        options: of every call, as transformers' pipeline takes them (``top_k``, ``batch_size``, ``do_sample``, ...).

    Raises:
        InputError: there is no such file or task, the file is for another task or for none of these, or what belongs
            beside it is missing, can't be read or is another model's.
        MissingExtra: the file takes images, and Pillow is not installed.
    """
    if task is not None and task not in TASKS:
        raise InputError(f"there is no task {task!r}{did_you_mean(str(task), TASKS)}")
    file = arguments.file_path(path)
    runtime = Runtime(file, threads)
    found = _task(runtime, file)
    if task not in (None, found):
        raise InputError(f"{file} is for {found}, and {task} was asked for; leave the task out")
    from ti_fx.export.run import (
        transformers_pipelines,  # here, as transformers' pipelines take seconds to import
    )

    with companions(file) as folder, transformers_pipelines.one_line("make this pipeline"):
        config = _config(file, folder)
        if found == GENERATION:
            return transformers_pipelines.text_generation(
                runtime, config, _tokenizer(file, folder), folder, options
            )
        _require_labels(runtime, config, file)
        if found == TEXT:
            return transformers_pipelines.text_classification(
                runtime, config, _tokenizer(file, folder), options
            )
        return transformers_pipelines.image_classification(runtime, config, _processor(file, folder), options)


def _task(runtime: Runtime, path: Path) -> str:
    """Return what a file is for, as its inputs and outputs say."""
    taken = set(runtime.inputs)
    if PAST_KEY.format(0) in taken and "input_ids" in taken:
        return GENERATION
    logits = _logits(runtime)
    if logits is not None and len(logits) == 2:
        if "input_ids" in taken and "pixel_values" not in taken:
            return TEXT
        if taken == {"pixel_values"}:
            return IMAGE
    if CROSS_KEY.format(0) in {*runtime.inputs, *runtime.outputs}:
        raise InputError(
            f"{path} is one of an encoder-decoder's two files; call both with ti_fx.export.run.generate.OnnxSeq2SeqLM"
        )
    raise InputError(
        f"{path} takes {', '.join(runtime.inputs)} and gives {', '.join(runtime.outputs)}, which is none of "
        f"{', '.join(TASKS)}; call it with ti_fx.export.Runtime"
    )


def _logits(runtime: Runtime) -> list[int | str] | None:
    return next((value.shape for value in runtime.session.get_outputs() if value.name == "logits"), None)


def _config(path: Path, folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    found: PreTrainedConfig = _read(path, folder, AutoConfig, CONFIG)
    return found


def _tokenizer(path: Path, folder: Path) -> Any:
    from transformers import AutoTokenizer

    return _read(path, folder, AutoTokenizer, TOKENIZER)


def _processor(path: Path, folder: Path) -> Any:
    from transformers import AutoImageProcessor

    if importlib.util.find_spec("PIL") is None:
        raise MissingExtra("images are read with Pillow: pip install 'ti_fx[images]'")
    return _read(path, folder, AutoImageProcessor, PROCESSOR)


def _read(path: Path, folder: Path, kind: Any, name: str) -> Any:
    require_companion(path, folder, name)
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise errors without a common base
        reason = first_line(error)
        raise InputError(f"can't read {name} beside {path}: {reason}; export it again") from error


def _require_labels(runtime: Runtime, config: PreTrainedConfig, path: Path) -> None:
    """Check that the configuration beside a file is its own: one folder has place for one."""
    logits = _logits(runtime)
    assert logits is not None
    if isinstance(logits[1], int) and logits[1] != config.num_labels:
        raise InputError(
            f"{CONFIG} beside {path} names {config.num_labels} labels, and the file gives {logits[1]}; it is another "
            "model's: export each into a folder of its own"
        )
