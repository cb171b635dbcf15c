"""A packed student to export or to check: from a checkpoint, or from a plain model that is never trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ti_fx.cli._loading import load_source
from ti_fx.errors import InputError


@dataclass(frozen=True)
class Student:
    """A packed graph, inputs that fit it, and the folder that its configuration and tokenizer are in, if any."""

    graph: GraphModule
    example: Mapping[str, Any] | tuple[Any, ...]
    folder: Path | None


def packed_student(source: str, *, model: str | None, ternarize: bool, encoding: str | None) -> Student:
    """Return the packed student.

    Args:
        source: a checkpoint's folder; with ``ternarize``, a model as ``load_source`` takes it.
        model: the source model of a checkpoint, where the checkpoint can't make it by itself.
        ternarize: ``source`` is a plain model, to be made ternary as it is.
        encoding: of the activations of such a model; a checkpoint has its own.

    Raises:
        TiFxError: nothing usable is there, or the model can't be captured.
    """
    from ti_fx.passes import DecomposeAttention, Pack, QuantizeActivations, Ternarize
    from ti_fx.pipeline import Pipeline
    from ti_fx.train.checkpoint import EXAMPLE, FACTS, load, read_tensors

    folder = Path(source)
    is_checkpoint = (folder / FACTS).is_file()
    if ternarize and is_checkpoint:
        raise InputError(f"{source} is a checkpoint, so it is ternary already; leave out --ternarize")
    if ternarize and model is not None:
        raise InputError("--source says which model a checkpoint is of; leave it out with --ternarize")
    if ternarize:
        from ti_fx.capture import capture

        found = load_source(source)
        gm = capture(found.model.float().eval(), found.example)
        activations = QuantizeActivations() if encoding is None else QuantizeActivations(encoding=encoding)
        Pipeline(DecomposeAttention(), Ternarize(), activations, Pack())(gm)
        return Student(gm, found.example, folder if folder.is_dir() else None)
    if not is_checkpoint and ((folder / "config.json").is_file() or ":" in source):
        raise InputError(
            f"{source} is a model, not a ti_fx checkpoint; train it with ti-fx train, or take it untrained: --ternarize"
        )
    gm = load(folder, None if model is None else load_source(model).model)
    Pipeline(Pack())(gm)
    return Student(gm, read_tensors(folder / EXAMPLE), folder)


def saved_parts(folder: Path | None) -> tuple[Any, Any]:
    """Return the configuration and the tokenizer (or image processor) saved in a folder, None for what is not there."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    if folder is None or not (folder / "config.json").is_file():
        return None, None
    kinds = {"tokenizer_config.json": AutoTokenizer, "preprocessor_config.json": AutoImageProcessor}
    kind: Any = next((kind for name, kind in kinds.items() if (folder / name).is_file()), None)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config, None if kind is None else kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"can't read the configuration or tokenizer in {folder}: {first}") from error
