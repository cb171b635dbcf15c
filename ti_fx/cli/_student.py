"""Makes the packed student to export or to check: of a checkpoint, or of a plain model that is never trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from torch.fx import GraphModule

from ti_fx.cli import _output as output
from ti_fx.cli._encodings import Encodings
from ti_fx.cli._loading import load_hollow, load_source
from ti_fx.errors import InputError, first_line
from ti_fx.numerics.encodings import Kept


@dataclass(frozen=True)
class Student:
    """A packed graph, inputs that fit it, and the folder that its configuration and tokenizer are in, if any."""

    graph: GraphModule
    example: Mapping[str, Any] | tuple[Any, ...]
    folder: Path | None


Part = Literal["", "encoder", "decoder"]
PARTS: tuple[Part, ...] = get_args(Part)


def packed_student(
    source: str,
    *,
    model: str | None,
    ternarize: bool,
    encodings: Encodings,
    kept: Kept | None,
    cache: bool,
    logits_to_keep: int = 0,
    low_memory: bool = False,
) -> dict[Part, Student]:
    """Return the packed student, of an encoder-decoder with a cache both parts.

    Args:
        source: a checkpoint's folder; with ``ternarize``, a model as ``load_source`` takes it.
        model: the source model of a checkpoint, where the checkpoint can't make it by itself.
        ternarize: ``source`` is a plain model, to be made ternary as it is.
        encodings: of the weights of such a model; a checkpoint has its own.
        kept: the type of what is not ternary, as of ``Pack``.
        cache: whether a language model's keys and values go in and out.
        logits_to_keep: of a causal one with its cache, as of ``with_cache``.
        low_memory: read the weights of a plain model one at a time.

    Raises:
        TiFxError: nothing usable is there, or the model can't be captured.
    """
    from ti_fx.ir.pipeline import Pipeline
    from ti_fx.passes import Pack
    from ti_fx.train.checkpoint import DESCRIPTION, EXAMPLE, load, read_facts, read_tensors, source_model

    folder = Path(source)
    is_checkpoint = (folder / DESCRIPTION).is_file()
    if ternarize and is_checkpoint:
        raise InputError(f"{source} is a checkpoint, so it is ternary already; leave out --ternarize")
    if ternarize and model is not None:
        raise InputError("--source says which model a checkpoint is of; leave it out with --ternarize")
    if low_memory and not ternarize:
        raise InputError(
            "--low-memory is for a plain model, and needs --ternarize; a checkpoint is read whole"
        )
    if logits_to_keep and not cache:
        raise InputError("--logits-to-keep is for a language model with its cache; add --cache")
    if ternarize:
        student, of = _made_ternary(source, encodings, kept, low_memory)
        return _with_cache(student, of, logits_to_keep) if cache else {"": student}
    if not is_checkpoint and ((folder / "config.json").is_file() or ":" in source):
        raise InputError(
            f"{source} is a model, not a ti_fx checkpoint; train it with ti-fx train, or take it untrained: --ternarize"
        )
    gm = load(folder, None if model is None else load_source(model).model)
    Pipeline(Pack(kept=kept))(gm)
    student = Student(gm, read_tensors(folder / EXAMPLE), folder)
    if not cache:
        return {"": student}
    of = source_model(folder, read_facts(folder)) if model is None else load_source(model).model
    return _with_cache(student, of, logits_to_keep)


def _made_ternary(
    source: str, encodings: Encodings, kept: Kept | None, low_memory: bool
) -> tuple[Student, nn.Module]:
    """Return the packed student of a plain model as it is, and the model."""
    from ti_fx.export import pack_from
    from ti_fx.frontend.capture import capture
    from ti_fx.ir.pipeline import Pipeline
    from ti_fx.passes import DecomposeAttention, Pack, QuantizeActivations, Ternarize

    activations = QuantizeActivations(
        encodings.name or QuantizeActivations().encoding, encodings=encodings.others
    )
    passes = (DecomposeAttention(), Ternarize(), activations)
    if low_memory:
        hollow = load_hollow(source)
        gm = capture(hollow.model, hollow.example)
        Pipeline(*passes)(gm)
        pack_from(gm, hollow.folder, hollow.buffers, kept=kept)
        return Student(gm, hollow.example, hollow.folder), hollow.model
    found = load_source(source)
    if found.note:
        output.say(f"{found.name}: {found.note}")
    gm = capture(found.model.float().eval(), found.example)
    Pipeline(*passes, Pack(kept=kept))(gm)
    folder = Path(source)
    return Student(gm, found.example, folder if folder.is_dir() else None), found.model


def _with_cache(student: Student, model: nn.Module, logits_to_keep: int) -> dict[Part, Student]:
    from ti_fx.export import encoder_decoder_with_cache, with_cache
    from ti_fx.export.cached.causal import is_encoder_decoder
    from ti_fx.export.inputs import bind

    model.float().eval()
    example = bind(student.graph, student.example)
    if is_encoder_decoder(model):
        if logits_to_keep:
            raise InputError(
                "--logits-to-keep is for causal models; a decoder with an encoder has no long prompt"
            )
        both = encoder_decoder_with_cache(student.graph, model, example)
        return {
            "encoder": Student(both.encoder.gm, both.encoder.inputs, student.folder),
            "decoder": Student(both.decoder.gm, both.decoder.inputs, student.folder),
        }
    found = with_cache(student.graph, model, example, logits_to_keep=logits_to_keep)
    return {"": Student(found.gm, found.inputs, student.folder)}


def saved_parts(folder: Path | None) -> dict[str, Any]:
    """Return what is saved in a model's folder beside its weights, as the arguments that ``to_onnx`` takes.

    Raises:
        InputError: a file can't be read.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

    if folder is None or not (folder / "config.json").is_file():
        return {}
    parts: dict[str, tuple[str, Any]] = {
        "config": ("config.json", AutoConfig),
        "tokenizer": ("tokenizer_config.json", AutoTokenizer),
        "processor": ("preprocessor_config.json", AutoImageProcessor),
        "generation_config": ("generation_config.json", GenerationConfig),
    }
    try:
        return {
            argument: kind.from_pretrained(folder, local_files_only=True)
            for argument, (name, kind) in parts.items()
            if (folder / name).is_file()
        }
    except (OSError, ValueError) as error:
        first = first_line(error)
        raise InputError(f"can't read what lies beside the weights in {folder}: {first}") from error
