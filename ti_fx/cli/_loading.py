"""What ``MODEL`` may be on the command line, and inputs that fit it."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import InputError, did_you_mean

BATCH, TOKENS = 2, 8
_CHECKPOINT = "ti_fx.json"
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")
_WAYS = "give a Hugging Face model folder, a ti_fx checkpoint, an .onnx file, or module:factory"


@dataclass(frozen=True)
class Loaded:
    """A captured graph, and what should be said about where it comes from."""

    name: str
    graph: GraphModule
    note: str = ""


@dataclass(frozen=True)
class Source:
    """A model, inputs that fit it, and what should be said about where it comes from."""

    name: str
    model: nn.Module
    example: Mapping[str, Any] | tuple[Any, ...]
    note: str = ""


def load_graph(source: str) -> Loaded:
    """Load and capture a model.

    Args:
        source: a folder with config.json, a checkpoint of ours, or ``module:factory``.

    Raises:
        InputError, CheckpointError: nothing usable is there.
        CaptureError: the model can't be captured.
    """
    from ti_fx.capture import capture

    path = Path(source)
    if path.is_dir() and (path / _CHECKPOINT).exists():
        from ti_fx.train.checkpoint import load

        return Loaded(f"checkpoint {source}", load(path), "the quantised student of a ti_fx checkpoint")
    found = load_source(source)
    return Loaded(found.name, capture(found.model, found.example), found.note)


def load_source(source: str) -> Source:
    """Load a model that is no checkpoint of ours, with inputs that fit it.

    Args:
        source: a folder with config.json, or ``module:factory``.

    Raises:
        InputError: nothing usable is there.
    """
    path = Path(source)
    if path.is_dir():
        model, note = _from_folder(path)
        return Source(f"{type(model).__name__} in {source}", model, example_for(model), note)
    if path.exists():
        raise InputError(f"{source} is a file that is no .onnx; {_WAYS}")
    if ":" in source and os.sep not in source.partition(":")[0]:
        model, example = _from_factory(source)
        return Source(f"{type(model).__name__} from {source}", model, example)
    raise InputError(f"there is no file or folder {source}; {_WAYS}")


def example_for(model: nn.Module) -> dict[str, Tensor]:
    """Return inputs that fit a Hugging Face model, from its config: ids and masks, or images.

    Raises:
        InputError: the model takes something else.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise InputError(
            f"{type(model).__name__} is no Hugging Face model, so inputs for it can't be made up; let the factory "
            "return (model, example) with a dict of keyword tensors"
        )
    generator = torch.Generator().manual_seed(0)
    parameters = inspect.signature(model.forward).parameters
    example: dict[str, Tensor] = {}
    if main == "input_ids" or "input_ids" in parameters:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        example["input_ids"] = torch.randint(1, text.vocab_size, (BATCH, TOKENS), generator=generator)
        if "attention_mask" in parameters:
            example["attention_mask"] = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    if "decoder_input_ids" in parameters and config.is_encoder_decoder:
        example["decoder_input_ids"] = torch.randint(1, text.vocab_size, (BATCH, TOKENS), generator=generator)
    if main == "pixel_values" or ("pixel_values" in parameters and hasattr(config, "vision_config")):
        example["pixel_values"] = _images(getattr(config, "vision_config", config), generator)
    if not example:
        raise InputError(
            f"{type(model).__name__} takes {main!r}, for which no example is made up; use module:factory with a "
            "function that returns (model, example)"
        )
    return example


def _images(config: Any, generator: torch.Generator) -> Tensor:
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(BATCH, config.num_channels, height, width, generator=generator)


def _from_folder(folder: Path) -> tuple[nn.Module, str]:
    import transformers

    logging: Any = transformers.utils.logging

    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json; {_WAYS}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{folder / 'config.json'} is not JSON ({error}); download the model again"
        ) from None
    kind: Any = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        raise InputError(
            f"transformers {transformers.__version__} has no {names[0]!r}; upgrade it, or use module:factory"
        )
    try:
        if any(next(folder.glob(pattern), None) for pattern in _WEIGHT_FILES):
            return kind.from_pretrained(folder, local_files_only=True), ""
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        made = kind(config) if names else kind.from_config(config)
    except OSError:
        raise
    except Exception as error:
        raise InputError(
            f"{folder} can't be loaded as {kind.__name__}: {_first_line(error)}; is it complete?"
        ) from error
    return made, "no weights in the folder: random ones were made from its config"


def _from_factory(source: str) -> tuple[nn.Module, Mapping[str, Any] | tuple[Any, ...]]:
    module_name, _, name = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"can't import {module_name!r} of {source}: {error}; it is looked for here and on PYTHONPATH"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{module_name} has no function {name!r}{did_you_mean(name, known)}")
    try:
        made = factory()
    except Exception as error:
        raise InputError(
            f"{source}() raised {type(error).__name__}: {_first_line(error)}; call it in Python"
        ) from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{source} returned a {type(model).__name__}; return a model, or (model, example)")
    return model, example_for(model) if example is None else example


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
