"""Transformers' pipelines run an exported file in ONNX Runtime instead of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    ImageClassificationPipeline,
    PreTrainedConfig,
    TextClassificationPipeline,
    TextGenerationPipeline,
)
from transformers.image_utils import is_valid_image
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.chat_template_utils import Chat

from ti_fx.errors import InputError, TiFxError, first_line
from ti_fx.export.run.generate import OnnxCausalLM, OnnxModel
from ti_fx.export.run.session import Runtime

# What a tokenizer gives that changes nothing, whatever the model, where it is this value throughout.
_NEUTRAL = {"attention_mask": 1, "token_type_ids": 0}
_NO_LIMIT = 10**6  # a tokenizer without one says 10**30


class OnnxClassifier(OnnxModel):  # type: ignore[no-untyped-call]
    """An exported classifier in the place of a transformers model.

    A file of a fixed batch takes any number of rows: what is missing from the last batch are copies of its last row,
    which change no range of a quantiser.

    Args:
        runtime: the file.
        config: the model's configuration.
    """

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Return the logits, float32 ``[rows, labels]``.

        Raises:
            InputError: the file does not take an input whose values matter.
        """
        given = self._taken(inputs)
        rows = next(iter(given.values())).shape[0]
        fixed = next(iter(self.runtime.inputs.values())).shape[0]
        size = fixed if isinstance(fixed, int) else rows
        logits = []
        for start in range(0, rows, size):
            places = torch.arange(start, start + size).clamp(max=rows - 1)
            found = self.runtime.tensors({name: value[places] for name, value in given.items()})
            logits.append(found["logits"])
        return SequenceClassifierOutput(logits=torch.cat(logits)[:rows])

    def _taken(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        taken = {name: value for name, value in inputs.items() if name in self.runtime.inputs}
        for name in inputs.keys() - taken.keys():
            if name not in _NEUTRAL or bool((inputs[name] != _NEUTRAL[name]).any()):
                raise InputError(
                    f"the file takes no {name}, and these texts need it; export it with an example that has {name}"
                )
        return taken


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn what transformers says of options and inputs that it can't use into one line.

    Raises:
        InputError: names ``what`` was to be done.
    """
    try:
        yield
    except TiFxError:
        raise
    except (OSError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"transformers can't {what}: {first_line(error)}; give other options") from error


class _OfFile:
    """What the pipelines have in common: errors of one line, and no check of a model's class by its name."""

    takes = ""

    def check_model_type(self, supported_models: Any) -> None:
        """Nothing: a file is of no class of transformers'."""

    def fits(self, given: Any) -> bool:
        """Whether this is something that the callable takes, one at a time."""
        raise NotImplementedError

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """As transformers' pipeline; an empty list gives an empty list.

        Raises:
            InputError: transformers can't use the inputs or options.
        """
        if isinstance(inputs, list) and not inputs:
            return []
        with one_line("run this call"):
            return super().__call__(inputs, **options)  # type: ignore[misc]

    def preprocess(self, given: Any, **options: Any) -> Any:
        """Return the model's inputs.

        Raises:
            InputError: this is nothing that the callable takes, or it can't be read.
        """
        if not self.fits(given):
            raise InputError(f"this callable takes {self.takes}; got {type(given).__name__}")
        try:
            plain = str(given) if isinstance(given, Path) else given
            return super().preprocess(plain, **options)  # type: ignore[misc]
        except (OSError, ValueError, TypeError) as error:
            reason = first_line(error)
            raise InputError(f"can't make inputs of this {type(given).__name__}: {reason}") from error


class _TextClassification(_OfFile, TextClassificationPipeline):  # type: ignore[misc]
    takes = "a text, a pair as {'text': ..., 'text_pair': ...}, or a list of those"

    def fits(self, given: Any) -> bool:
        if isinstance(given, Mapping):
            return {"text"} <= given.keys() <= {"text", "text_pair"} and _are_texts(given.values())
        is_pair = isinstance(given, list) and len(given) == 1 and isinstance(given[0], list)
        return isinstance(given, str) or (is_pair and len(given[0]) == 2 and _are_texts(given[0]))

    def preprocess(self, given: Any, **options: Any) -> Any:  # type: ignore[override]
        """As for all, and no text without a token, of which a file gives nothing."""
        made = super().preprocess(given, **options)
        if not made["input_ids"].numel():
            raise InputError(
                f"the tokenizer makes no token of the text {given!r:.80}; give one that is not empty"
            )
        return made


class _ImageClassification(_OfFile, ImageClassificationPipeline):  # type: ignore[misc]
    takes = "a PIL image, the path of an image, an array of one, or a list of those"

    def fits(self, given: Any) -> bool:
        return isinstance(given, str | Path) or bool(is_valid_image(given))  # type: ignore[no-untyped-call]


class _TextGeneration(_OfFile, TextGenerationPipeline):  # type: ignore[misc]
    takes = "a prompt, a chat, or a list of those"

    def fits(self, given: Any) -> bool:
        return isinstance(given, str | Chat)


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def text_classification(
    runtime: Runtime, config: PreTrainedConfig, tokenizer: Any, options: dict[str, Any]
) -> TextClassificationPipeline:
    """Return the callable for texts; ``options`` are those of every call."""
    shape = runtime.inputs["input_ids"].shape
    given = ("input_ids", "attention_mask", "token_type_ids")
    tokenizer.model_input_names = [
        name for name in given if name in {*tokenizer.model_input_names, *runtime.inputs}
    ]
    if isinstance(shape[1], int):
        sizes: dict[str, Any] = {"truncation": True, "padding": "max_length", "max_length": shape[1]}
    else:
        longest = min(tokenizer.model_max_length, runtime.largest.get(shape[1], _NO_LIMIT))
        sizes = {"truncation": True, "max_length": longest} if longest < _NO_LIMIT else {}
    model = OnnxClassifier(runtime, config)
    return _TextClassification(  # type: ignore[no-untyped-call]
        model=model, tokenizer=tokenizer, task="text-classification", device="cpu", **{**sizes, **options}
    )


def image_classification(
    runtime: Runtime, config: PreTrainedConfig, processor: Any, options: dict[str, Any]
) -> ImageClassificationPipeline:
    """Return the callable for images; ``options`` are those of every call."""
    model = OnnxClassifier(runtime, config)
    return _ImageClassification(  # type: ignore[no-untyped-call]
        model=model, image_processor=processor, task="image-classification", device="cpu", **options
    )


def text_generation(
    runtime: Runtime, config: PreTrainedConfig, tokenizer: Any, folder: Path, options: dict[str, Any]
) -> TextGenerationPipeline:
    """Return the callable for prompts; ``options`` are those of every call, ``generate``'s too."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked, so which one makes no difference
    saved = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder, local_files_only=True) if saved else None
    model = OnnxCausalLM(runtime, config, generation)
    return _TextGeneration(  # type: ignore[no-untyped-call]
        model=model, tokenizer=tokenizer, task="text-generation", device="cpu", **options
    )
