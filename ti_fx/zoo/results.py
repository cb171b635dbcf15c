"""A Result says what came of one model and what that counts as; a file keeps the results of a run."""

from __future__ import annotations

import inspect
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers.models.auto import modeling_auto

from ti_fx._version import __version__
from ti_fx.errors import InputError
from ti_fx.files import atomic_write
from ti_fx.zoo.chain import STAGES, Outcome
from ti_fx.zoo.exclusions import EXCLUSIONS
from ti_fx.zoo.run import DIED, TIMED_OUT, Job

Verdict = Literal["error", "timed out", "died", "refused", "passed", "no attention", "not built"]
# In the order to show them. Only a refusal is meant; the three before it are a bug, or a limit that was too small.
FAILED: tuple[Verdict, ...] = ("error", "timed out", "died", "refused")
WITH_ATTENTION: tuple[Verdict, ...] = (*FAILED, "passed")
VERDICTS: tuple[Verdict, ...] = (*WITH_ATTENTION, "no attention", "not built")

PLAIN = "plain PyTorch"
GROUPS = ("encoder", "decoder", "encoder-decoder", "vision", "audio", "multimodal", "other", PLAIN)
_VERSIONS = ("torch", "transformers", "onnx", "onnxruntime")
# What was measured where a point of every site was replaced by a known tensor, by the point.
REPLACEMENTS = {"map": "replaced", "context": "replaced context", "output": "replaced output"}
# What ``write_short`` keeps of a result.
_SHORT = ("name", "file", "attention", "group", "until", "stage", "verdict", "refused", "blocks", "numbers")
# How the keywords of a model's forward begin, and what they carry.
_INPUTS = {"input_ids": "text", "pixel_values": "vision", "input_features": "audio", "input_values": "audio"}
_DECLARED = {"image": "vision", "video": "vision", "audio": "audio"}


@dataclass(frozen=True)
class Result:
    """One model's outcome.

    Attributes:
        job: what was run. until: the last stage asked for. group: one of ``GROUPS``, empty if it was not built.
    """

    job: Job
    outcome: Outcome
    until: str
    group: str

    @classmethod
    def of(cls, job: Job, outcome: Outcome, until: str) -> Result:
        """Return the result of a run; its texts name no folder of this machine."""
        if outcome.refused is not None:
            outcome.refused = (outcome.refused[0], _without_folders(outcome.refused[1]))
        outcome.notes = [_without_folders(note) for note in outcome.notes]
        group = PLAIN if job.file else group_of(outcome.model_class)
        return cls(job, outcome, until, group if outcome.model_class else "")

    @property
    def verdict(self) -> Verdict:
        """What the outcome counts as; without a count of its blocks a built model counts as one with attention."""
        outcome = self.outcome
        if outcome.refused is None:
            return "passed"
        if not outcome.typed:
            return {TIMED_OUT: "timed out", DIED: "died"}.get(outcome.refused[0], "error")  # type: ignore[return-value]
        if not outcome.stage:
            return "not built"
        return "no attention" if outcome.blocks == 0 else "refused"

    @property
    def title(self) -> str:
        """The model's name, with what tells it from others of the same name."""
        more = self.job.file or ("" if self.job.attention == "eager" else self.job.attention)
        return f"{self.job.name} ({more})" if more else self.job.name

    @property
    def reason(self) -> str:
        """Why it did not pass, in one line; empty if it passed."""
        if self.outcome.refused is None:
            return ""
        if self.verdict == "no attention" and self.job.file is None and self.job.name in EXCLUSIONS:
            excluded = EXCLUSIONS[self.job.name]
            return f"{excluded.reason} ({excluded.op}, {excluded.source})"
        kind, message = self.outcome.refused
        message = " ".join(message.split())
        if self.verdict in ("no attention", "not built"):  # the stage is always the same
            return message.partition(": ")[2].removeprefix(f"{self.job.name}: ")
        return f"{kind}: {message}"

    @property
    def seconds(self) -> float:
        """How long all stages took together."""
        return sum(self.outcome.seconds.values())

    @property
    def rank(self) -> int:
        """The place of the last stage that was passed, -1 before the first."""
        return STAGES.index(self.outcome.stage) if self.outcome.stage else -1

    @property
    def sites(self) -> str:
        """The sites found, by kind."""
        return ", ".join(f"{count} {kind}" for kind, count in self.outcome.kinds.items())

    def reached(self, stage: str) -> bool:
        """Return whether a stage was passed."""
        return self.rank >= STAGES.index(stage)

    def asked(self, stage: str) -> bool:
        """Return whether a stage was to be run."""
        return STAGES.index(self.until) >= STAGES.index(stage)

    def is_enough(self, until: str, retry: bool) -> bool:
        """Return whether it need not run again until that stage; what did not pass need not unless ``retry``."""
        return self.asked(until) if self.outcome.passed else not retry

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values: numbers to six digits, None for one that is infinite or NaN."""
        whole = {"file": self.job.file, "group": self.group, "until": self.until, "verdict": self.verdict}
        numbers = {
            name: float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
            for name, value in self.outcome.numbers.items()
        }
        return {"name": self.job.name, **whole, **self.outcome.to_json(), "numbers": numbers}

    def to_short_json(self) -> dict[str, Any]:
        """Return what the table of architectures needs of ``to_json``: few fields, few numbers, of one digit each."""
        value = self.to_json()
        measured = {name: value["numbers"].get(name) for name in REPLACEMENTS.values()}
        value["numbers"] = {name: float(f"{one:.0e}") for name, one in measured.items() if one is not None}
        short = {name: value[name] for name in _SHORT if value[name] not in (None, {})}
        return short if self.outcome.typed else {**short, "typed": False}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Result:
        """Return the result that either of the two wrote; raises KeyError, TypeError or ValueError if that is none."""
        known = {field.name for field in fields(Outcome)}
        outcome = Outcome(**{name: part for name, part in value.items() if name in known})
        if outcome.refused is not None:
            kind, message = outcome.refused
            outcome.refused = (kind, message)
        STAGES.index(value["until"])
        return cls(
            Job(value["name"], value.get("file"), value["attention"]), outcome, value["until"], value["group"]
        )


def group_of(model_class: str) -> str:
    """Return the group of a class of transformers: what its forward takes, and for text how it is used.

    A text model is an encoder-decoder if its forward takes ``decoder_input_ids``, a decoder if it takes a cache or
    stands in transformers' table of causal language models, and else an encoder. A class whose forward names no
    such input is grouped by the modality that it declares.
    """
    found: Any = getattr(transformers, model_class, None)
    if found is None:
        return "other"
    keywords = inspect.signature(found.forward).parameters
    taken = {kind for start, kind in _INPUTS.items() if any(word.startswith(start) for word in keywords)}
    if not taken:
        declared = found.input_modalities
        declared = [declared] if isinstance(declared, str) else declared
        taken = {_DECLARED.get(modality, "other") for modality in declared}
    if len(taken) > 1:
        return "multimodal"
    (kind,) = taken
    if kind != "text":
        return kind
    if "decoder_input_ids" in keywords:
        return "encoder-decoder"
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return "decoder" if "past_key_values" in keywords or model_class in causal else "encoder"


def _without_folders(text: str) -> str:
    return re.sub(r"/[^\s:'\"()]*/site-packages/", "", text).replace(f"{Path.cwd()}/", "")


def versions() -> dict[str, str]:
    """Return the versions that results depend on, by name."""
    found = {name: version(name).partition("+")[0] for name in _VERSIONS}
    return {"ti_fx": __version__, "python": platform.python_version(), **found}


@dataclass(frozen=True)
class Run:
    """The content of a file of results: the results in the order to show them, and the versions they come from."""

    results: tuple[Result, ...]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, results: Iterable[Result]) -> Run:
        """Return a run with the installed versions."""
        return cls(tuple(sorted(results, key=_order)), versions())

    def with_verdict(self, *verdicts: Verdict) -> list[Result]:
        """Return the results with one of these verdicts."""
        return [result for result in self.results if result.verdict in verdicts]

    def write(self, path: Path) -> None:
        """Write the run as JSON, a result a line, so that two runs can be compared; nobody sees half of it.

        Raises:
            InputError: it can't be written there.
        """
        self._write(path, Result.to_json)

    def write_short(self, path: Path) -> None:
        """Write of the run what the table of architectures needs, a quarter of ``write``; ``read`` takes it, too.

        Raises:
            InputError: it can't be written there.
        """
        self._write(path, Result.to_short_json)

    def _write(self, path: Path, as_json: Callable[[Result], dict[str, Any]]) -> None:
        ordered = sorted(
            self.results, key=lambda result: (result.job.file or "", result.job.name, result.job.attention)
        )
        lines = ",\n".join(json.dumps(as_json(result), allow_nan=False) for result in ordered)
        atomic_write(path, f'{{"versions": {json.dumps(dict(self.versions))},\n"results": [\n{lines}\n]}}\n')

    @classmethod
    def read(cls, path: Path) -> Run:
        """Return the run that ``write`` or ``write_short`` wrote.

        Raises:
            InputError: the file is missing or holds something else.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            results = [Result.from_json(one) for one in value["results"]]
            return cls(tuple(sorted(results, key=_order)), value["versions"])
        except OSError as error:
            raise InputError(
                f"can't read {path}: {error.strerror}; ti-fx zoo --json writes such a file"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} holds no results of ti-fx zoo ({type(error).__name__}: {error}); give another file"
            ) from error


def _order(result: Result) -> tuple[int, str, str]:
    return VERDICTS.index(result.verdict), result.job.name, result.title
