"""Loads what ``MODEL`` names on the command line: a model with inputs that fit it, or its captured graph."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import InputError, did_you_mean, first_line

BATCH, TOKENS = 2, 12
_CHECKPOINT = "ti_fx.json"
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")
_WAYS = (
    "give a Hugging Face model folder, a name on its hub (gpt2, organisation/name), a ti_fx checkpoint, an .onnx file, "
    "module:factory, or path/file.py:factory"
)
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w-][\w.-]*")  # gpt2 has no organisation
_FILES = (".onnx", ".py", ".json", ".yaml", ".safetensors", ".bin", ".pt", ".csv")
_HUB_SECONDS = 20.0  # for an answer; a download takes as long as it takes


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

    @property
    def constants(self) -> dict[str, Any]:
        """What the example holds beside tensors, by name: flags, and None."""
        given = self.example if isinstance(self.example, Mapping) else {}
        return {name: value for name, value in given.items() if not isinstance(value, Tensor)}


@dataclass(frozen=True)
class Hollow:
    """A model whose parameters have no values (they are on the meta device), and where the values are.

    Attributes:
        model: in eval mode.
        example: inputs that fit it, on the CPU.
        folder: of its weights.
        buffers: the values of its buffers, which no file has.
    """

    model: nn.Module
    example: Mapping[str, Any]
    folder: Path
    buffers: dict[str, Tensor]


def load_hollow(source: str) -> Hollow:
    """Make a model of which only the buffers have values, so that weights can be read one at a time.

    Args:
        source: a folder with config.json and safetensors, or a name on the hub.

    Raises:
        InputError: nothing usable is there.
    """
    folder = Path(source)
    if not folder.is_dir():
        if not _HUB_NAME.fullmatch(source):
            raise InputError(
                f"--low-memory reads weights from safetensors in a model's folder, and {source} is none; leave it out"
            )
        folder = _from_hub(source, meta=False)
    model, _ = _from_folder(folder, meta=True, buffers=True)
    buffers = dict(model.named_buffers())
    model.float().to("meta").eval()  # what is read becomes what the graph has, and export needs float32
    return Hollow(model, example_for(model, torch.device("cpu")), folder, buffers)


def load_graph(source: str, meta: bool = False) -> Loaded:
    """Load and capture a model.

    Args:
        source: a folder with config.json, a name on the hub, a checkpoint of ours, or ``module:factory``.
        meta: make the model without values, so that its size does not matter; so is one of which only the
            configuration is there.

    Raises:
        InputError, CheckpointError: nothing usable is there.
        CaptureError: the model can't be captured.
    """
    from ti_fx.frontend.capture import capture

    path = Path(source)
    if path.is_dir() and (path / _CHECKPOINT).exists():
        from ti_fx.train.checkpoint import load

        return Loaded(f"checkpoint {source}", load(path), "the quantised student of a ti_fx checkpoint")
    found = load_source(source, meta or (path.is_dir() and not _has_weights(path)))
    return Loaded(found.name, capture(found.model, found.example), found.note)


def load_source(source: str, meta: bool = False) -> Source:
    """Load a model that is no checkpoint of ours, with inputs that fit it.

    Args:
        source: a folder with config.json, a name on the hub, or ``module:factory``.
        meta: make the model without values.

    Raises:
        InputError: nothing usable is there.
    """
    path = Path(source)
    if path.is_dir():
        model, note = _from_folder(path, meta)
        return Source(f"{type(model).__name__} in {source}", model, example_for(model), note)
    if path.suffix == ".onnx" and path.is_file():
        raise InputError(
            f"{source} is an exported file, and a model is needed: give the one that it came from"
        )
    if path.exists():
        raise InputError(f"{source} is a file that is no .onnx; {_WAYS}")
    if ":" in source:
        model, example = _from_factory(source, meta)
        return Source(f"{type(model).__name__} from {source}", model, example)
    if not _HUB_NAME.fullmatch(source) or path.suffix in _FILES:
        raise InputError(f"there is no file or folder {source}; {_WAYS}")
    model, note = _from_folder(_from_hub(source, meta), meta)
    return Source(f"{type(model).__name__} {source} from the hub", model, example_for(model), note)


def example_for(model: nn.Module, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return inputs that fit a Hugging Face model, by the rules of the zoo, on ``device`` or on the model's.

    Raises:
        InputError: it is no such model, or no rule makes what it takes.
    """
    from ti_fx.errors import DataError
    from ti_fx.example_inputs.make import example_inputs
    from ti_fx.example_inputs.request import Sizes

    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise InputError(
            f"{type(model).__name__} is no Hugging Face model, so inputs for it can't be made up; let the factory "
            "return (model, example) with a dict of keyword tensors"
        )
    model.eval()
    try:
        (example,) = example_inputs(config.model_type, model, (Sizes(BATCH, TOKENS),), seed=0, device=device)
    except DataError as error:
        raise InputError(
            f"no example inputs: {error}; use module:factory with a function that returns (model, example)"
        ) from error
    return example


def _from_hub(name: str, meta: bool) -> Path:
    """Return the folder of a model's files: from the cache, else downloaded; without weights for ``meta``.

    Raises:
        InputError: the hub has no such model, or can't be reached.
    """
    import huggingface_hub

    files = ["*.json", *([] if meta else ["*.safetensors"])]
    try:
        cached = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        if meta or _has_weights(cached):
            return cached
    except OSError:  # not in the cache
        pass
    try:
        # fails at once where nothing can be reached; a download would go on trying
        listed = huggingface_hub.HfApi().model_info(name, timeout=_HUB_SECONDS).siblings or []
        if not meta and not any(file.rfilename.endswith(".safetensors") for file in listed):
            files.append("*.bin")
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub's errors and its transport's have no common base
        if "/" not in name:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(
                f"there is no file or folder {name}; {_WAYS} (the hub gave none: {reason})"
            ) from error
        raise InputError(
            f"there is no folder {name}, the cache of the hub has no such model, and the hub gave none "
            f"({type(error).__name__}: {first_line(error)}); download it where there is a network, or {_WAYS}"
        ) from error


def _from_folder(folder: Path, meta: bool, buffers: bool = False) -> tuple[nn.Module, str]:
    """Return a folder's model and a note; with ``meta`` without values, of which ``buffers`` keeps the buffers'."""
    import transformers
    from accelerate import init_empty_weights

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
    has_weights = _has_weights(folder)
    try:
        if has_weights and not meta:
            return kind.from_pretrained(folder, local_files_only=True), ""
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        hollow = init_empty_weights() if buffers else torch.device("meta")
        with hollow if meta else nullcontext():
            made = kind(config) if names else kind.from_config(config)
    except OSError:
        raise
    except Exception as error:
        raise InputError(
            f"{folder} can't be loaded as {kind.__name__}: {first_line(error)}; is it complete?"
        ) from error
    values = "made without values" if meta else "random ones were made from its config"
    return made, values if has_weights else f"no weights in the folder: {values}"


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _WEIGHT_FILES)


def _from_factory(source: str, meta: bool) -> tuple[nn.Module, Mapping[str, Any] | tuple[Any, ...]]:
    place, _, name = source.rpartition(":")
    module = _module(place, source)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{place} has no function {name!r}{did_you_mean(name, known)}")
    try:
        with torch.device("meta") if meta else nullcontext():
            made = factory()
    except Exception as error:
        raise InputError(
            f"{source}() raised {type(error).__name__}: {first_line(error)}; call it in Python"
        ) from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{source} returned a {type(model).__name__}; return a model, or (model, example)")
    return model, example_for(model) if example is None else example


def _module(place: str, source: str) -> ModuleType:
    """Import a module by its name, or run a file.

    Raises:
        InputError: there is none, or importing it fails.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        if not Path(place).is_file():
            raise InputError(f"there is no file {place} for {source}")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"can't import {place!r} of {source}: {error}; it is looked for here and on PYTHONPATH"
        ) from error
    except Exception as error:
        raise InputError(
            f"importing {place} raised {type(error).__name__}: {first_line(error)}; run it in Python"
        ) from error
