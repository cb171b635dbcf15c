"""The demo fine-tunes a teacher, trains three ternary students, exports and runs them, and reports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ti_fx.demo import classifier, measure, students
from ti_fx.demo.circumstances import THREADS, circumstances, on_threads
from ti_fx.demo.data import Questions, load_questions, model_folder, tokenized
from ti_fx.demo.show import print_table, write_page
from ti_fx.demo.stages import VERSIONS, Stage, Stages
from ti_fx.demo.students import METHODS, STUDENT_SETTINGS, StudentSettings
from ti_fx.demo.teacher import TEACHER_SETTINGS, TeacherSettings, fine_tune, quiet_loading
from ti_fx.export import pipeline, to_onnx
from ti_fx.files import atomic_path, atomic_write, sha256_of
from ti_fx.ir.edit import input_names
from ti_fx.ir.pipeline import Pipeline
from ti_fx.measure.baselines import export_dynamic_int8
from ti_fx.passes import Pack
from ti_fx.recipe import DEFAULT
from ti_fx.train import load
from ti_fx.train.scores import scores

SEED = 0
# The rooms that a trained student depends on; a test holds this against what ti_fx.train imports.
_ROOMS = "errors files numerics ir find passes frontend export phases presets recipe measure train"
TRAINING_CODE = tuple(_ROOMS.split())
LATENCY_ROUNDS = 15
SIDECARS = ("config.json", "tokenizer.json", "tokenizer_config.json")
QUESTION = "Who wrote Hamlet ?"


def run(
    folder: Path,
    *,
    say: Callable[[str], None] = print,
    teacher_settings: TeacherSettings = TEACHER_SETTINGS,
    student_settings: StudentSettings = STUDENT_SETTINGS,
    seed: int = SEED,
    threads: int = THREADS,
) -> dict[str, Any]:
    """Run the whole demo below ``folder`` and return what went into ``results.json``.

    Writes ``results.json``, ``report.html``, ``student.onnx`` (the default recipe's; the others' have their names),
    recipes and checkpoints.
    Stages that ran before with the same code, data, settings and circumstances are reused; accuracy and latency are
    measured anew. One processor gives the same numbers at the same seed and ``threads``, however many cores it has.

    Raises:
        TiFxError: data or weights are missing or not the pinned ones, or a stage fails; says what to do.
    """
    start = time.perf_counter()
    data = load_questions()
    source = model_folder()
    with on_threads(threads):
        stages = Stages(folder / "stages", say)
        teacher = _teacher(stages, source, data, teacher_settings, seed)
        trained = {
            method: _student(stages, method, teacher, data, student_settings, seed) for method in METHODS
        }
        exported = _export(stages, teacher, trained)
        _publish(folder, trained, exported)
        say("measuring accuracy and latency")
        measured_at = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(teacher.folder / "model")
        results: dict[str, Any] = {
            "seed": seed,
            "data": {"source_sha256": data.source_sha256, "sizes": data.sizes, "digests": data.digests},
            "circumstances": circumstances(),
            "versions": {name: version(name) for name in VERSIONS},
            "settings": {"teacher": asdict(teacher_settings), "students": asdict(student_settings)},
            "teacher": teacher.result,
            "students": {method: stage.result for method, stage in trained.items()},
            "exports": exported.result,
            "test": _test_scores(teacher, trained, exported, data, tokenizer, threads),
            "latency": _latency(exported, tokenizer),
            "reached": _reached({method: stage.result for method, stage in trained.items()}),
        }
        seconds = {stage.name: {"seconds": stage.seconds, "reused": stage.reused} for stage in stages.done}
        seconds["measure"] = {"seconds": time.perf_counter() - measured_at, "reused": False}
        results["stages"] = seconds
        results["seconds"] = time.perf_counter() - start
        atomic_write(folder / "results.json", json.dumps(results, indent=1) + "\n")
        write_page(
            results,
            folder / "report.html",
            trained[DEFAULT].folder / "checkpoint",
            teacher.folder / "model",
            data,
        )
    print_table(results)
    (answer,) = pipeline(folder / "student.onnx")(QUESTION)
    say(f"student.onnx takes {QUESTION!r} for {answer['label']} ({answer['score']:.0%})")
    say(f"wrote {folder}/report.html, results.json and student.onnx in {time.perf_counter() - start:.0f} s")
    return results


def _teacher(stages: Stages, source: Path, data: Questions, settings: TeacherSettings, seed: int) -> Stage:
    def make(folder: Path) -> dict[str, Any]:
        done = fine_tune(source, data, folder / "model", seed=seed, settings=settings)
        return {
            "steps": done.steps,
            "train_seconds": done.seconds,
            "validation": done.validation,
            "history": list(done.history),
            "sha256": sha256_of(folder / "model" / "model.safetensors"),
        }

    facts = {"settings": asdict(settings), "data": data.digests, "seed": seed}
    return stages.run("teacher", facts, ("demo.teacher", "demo.data"), make)


def _student(
    stages: Stages, method: str, teacher: Stage, data: Questions, settings: StudentSettings, seed: int
) -> Stage:
    def make(folder: Path) -> dict[str, Any]:
        return students.train(method, teacher.folder / "model", data, folder, seed=seed, settings=settings)

    facts = {
        "settings": asdict(settings),
        "recipe": students.recipe(method, settings).to_dict(),
        "teacher": teacher.result["sha256"],
        "data": data.digests,
        "seed": seed,
    }
    return stages.run(method, facts, (*TRAINING_CODE, "demo.students", "demo.measure"), make)


def _export(stages: Stages, teacher: Stage, trained: dict[str, Stage]) -> Stage:
    def make(folder: Path) -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(teacher.folder / "model")
        example = _example(tokenizer)
        rows: dict[str, Any] = {}
        for method, stage in trained.items():
            gm = load(stage.folder / "checkpoint")
            Pipeline(Pack())(gm)
            with quiet_loading():
                config = AutoModelForSequenceClassification.from_pretrained(teacher.folder / "model").config
            report = to_onnx(gm, folder / f"{method}.onnx", example, config=config, tokenizer=tokenizer)
            rows[method] = {
                "bytes": report.bytes,
                "encoding": report.encoding,
                "code_bits": report.code_bits,
                "bits": report.code_and_scale_bits,
                "text": str(report),
            }
        classifier.export_fp32(teacher.folder / "model", folder / "fp32.onnx", example)
        export_dynamic_int8(folder / "fp32.onnx", folder / "dynamic-int8.onnx")
        for name in ("fp32", "dynamic-int8"):
            rows[name] = {"bytes": (folder / f"{name}.onnx").stat().st_size}
        return rows

    facts = {
        "teacher": teacher.result["sha256"],
        "students": [stage.folder.name for stage in trained.values()],
    }
    return stages.run("export", facts, (*TRAINING_CODE, "demo.classifier"), make)


def _example(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    batch = tokenizer(
        ["How far is it from Denver to Aspen ?", "What is an atom ?"], padding=True, return_tensors="pt"
    )
    return dict(batch)


def _publish(folder: Path, trained: dict[str, Stage], exported: Stage) -> None:
    """Put what a user looks for where they look for it: with what lies beside them, the files are callables."""
    for name in SIDECARS:
        atomic_write(folder / name, (exported.folder / name).read_bytes())
    for method in METHODS:
        name = "student.onnx" if method == DEFAULT else f"{method}.onnx"
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes((exported.folder / f"{method}.onnx").read_bytes())
        recipe = (trained[method].folder / "recipe.json").read_text(encoding="utf-8")
        atomic_write(folder / f"{method}.json", recipe)
        link = folder / f"checkpoint-{method}"
        link.unlink(missing_ok=True)
        link.symlink_to((trained[method].folder / "checkpoint").relative_to(folder))


def _test_scores(
    teacher: Stage,
    trained: dict[str, Stage],
    exported: Stage,
    data: Questions,
    tokenizer: PreTrainedTokenizerBase,
    threads: int,
) -> dict[str, Any]:
    """Evaluate everything on the test split, which nothing before has looked at."""
    dataset = tokenized(data.test, tokenizer, label_count=len(data.label_names))
    with quiet_loading():
        model = AutoModelForSequenceClassification.from_pretrained(teacher.folder / "model")
    calls = {("full precision", "PyTorch"): measure.torch_call(model, students.INPUTS)}
    calls["full precision", "ONNX Runtime"] = measure.onnx_call(exported.folder / "fp32.onnx", threads)
    calls["dynamic int8", "ONNX Runtime"] = measure.onnx_call(exported.folder / "dynamic-int8.onnx", threads)
    for method, stage in trained.items():
        gm = load(stage.folder / "checkpoint")
        Pipeline(Pack())(gm)
        calls[method, "PyTorch"] = measure.torch_call(gm, input_names(gm))
        calls[method, "ONNX Runtime"] = measure.onnx_call(exported.folder / f"{method}.onnx", threads)
    logits, rows = {}, []
    for (name, engine), call in calls.items():
        logits[name, engine], labels = measure.logits_of(call, dataset, tokenizer)
        rows.append({"model": name, "engine": engine, **scores(logits[name, engine], labels)})
    agreement = {
        name: measure.agreement(logits[name, "ONNX Runtime"], logits[name, "PyTorch"])
        for name in ("full precision", *trained)
    }
    return {"rows": len(dataset), "scores": rows, "agreement": agreement}


def _latency(exported: Stage, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    files = {name: exported.folder / f"{name}.onnx" for name in ("fp32", "dynamic-int8", DEFAULT)}
    return measure.latencies(
        files,
        batch_sizes=(1, 8),
        sequence=128,
        threads=(1, 2),
        rounds=LATENCY_ROUNDS,
        vocabulary=len(tokenizer),
    )


def _reached(results: dict[str, Any]) -> dict[str, Any]:
    """Return when each method reached TernaryBERT's final validation accuracy and KL."""
    final = results["ternarybert"]["validation"]
    return {
        method: {
            "accuracy": students.steps_to(
                result["history"], "eval_accuracy", final["accuracy"], at_least=True
            ),
            "kl": students.steps_to(result["history"], "eval_kl", final["kl"], at_least=False),
        }
        for method, result in results.items()
    }
