"""What the inference benchmark compares: each contender is built into files once, and run from them.

fp32              torch.onnx of the original model with scaled-dot-product attention: the baseline
fp32 optimised    the same file after onnxruntime.transformers' optimiser
ORT int8          ONNX Runtime's own dynamic int8 of it
ORT int8 products the same of its matrix products alone, embeddings in fp32
OpenVINO int8/4   OpenVINO's weight compression of it (nncf), run as by default: in bfloat16 where the processor has it
onnxsim ternary   an fp32 file of the student's ternary weights, which onnxsim's quantize_ternary makes int8 codes; it
                  quantises activations as int8-tensor does, and embeddings stay in fp32
PyTorch           the original model, eager and compiled
int8-tensor, ...  ti_fx's encodings; the student is not trained
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from kept import Entry, Store, sources, versions
from numpy.typing import NDArray
from running import Kind
from subjects import Subject
from torch.fx import GraphModule

import ti_fx
from ti_fx import numerics
from ti_fx.demo.classifier import export_fp32
from ti_fx.errors import ExportError, MissingExtra
from ti_fx.export import ExportReport, to_onnx, with_cache
from ti_fx.files import atomic_path
from ti_fx.measure.baselines import export_dynamic_int8
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

BASELINE, OPTIMISED = "fp32", "fp32 optimised"
DYNAMIC_INT8, INT8_PRODUCTS = "ORT int8", "ORT int8 products"
PYTORCH, COMPILED = "PyTorch", "PyTorch compiled"
TERNARY_PEER = "onnxsim ternary"
OPENVINO = {"OpenVINO int8": "INT8_ASYM", "OpenVINO int4": "INT4_SYM"}
_REFERENCE = "reference.npy"
_OWN = ("benchmarks/contenders.py", "benchmarks/subjects.py")


@dataclass(frozen=True)
class Contender:
    """Something to run.

    Attributes:
        label: its name in every table.
        kind: what runs it.
        path: its file, or the folder of a PyTorch model.
        bytes: on disk, of all its files.
        facts: what was found when it was built: ``note``, ``streamed`` (bytes of the stored weights that one run
            reads), ``code_bits`` of a student.
        reference: a student's logits of the error inputs as its fake-quant graph computes them.
    """

    label: str
    kind: Kind
    path: Path
    bytes: int
    facts: dict[str, Any]
    reference: NDArray[Any] | None = None


class Builder:
    """Builds the contenders of one model into a store.

    Args:
        subject: the model.
        store: where files go.

    Attributes:
        left_out: why a contender could not be built, by label.
    """

    def __init__(self, subject: Subject, store: Store) -> None:
        self.subject = subject
        self.store = store
        self.left_out: dict[str, str] = {}

    def baselines(self) -> list[Contender]:
        """Return fp32, fp32 optimised if the optimiser takes the file, and dynamic int8 of all and of the products."""
        found = [self._of_file(BASELINE, self._fp32, "fp32.onnx")]
        optimised = self._optional(OPTIMISED, self._optimised)
        found += [self._of_file(OPTIMISED, optimised, "model.onnx")] if optimised else []
        for label, operators in ((DYNAMIC_INT8, None), (INT8_PRODUCTS, ("MatMul", "Gemm"))):
            write = partial(export_dynamic_int8, self._fp32_path, operators=operators)
            found.append(
                self._of_file(label, self._derived(label.lower().replace(" ", "-"), write), "model.onnx")
            )
        return found

    def openvino(self) -> list[Contender]:
        """Return both of OpenVINO's weight compressions, as far as it is installed and takes the file."""
        found = []
        for label, mode in OPENVINO.items():
            entry = self._optional(label, lambda mode=mode: self._compressed(mode))  # type: ignore[misc]
            if entry is not None:
                size = sum(path.stat().st_size for path in entry.folder.glob("model.*"))
                found.append(Contender(label, "openvino", entry.folder / "model.xml", size, entry.facts))
        return found

    def peers(self) -> list[Contender]:
        """Return what onnxsim makes of the same ternary weights, as far as it is installed and takes the file.

        Its error is against int8-tensor's fake-quant graph, as it quantises activations alike.
        """
        entry = self._optional(TERNARY_PEER, self._packed_by_peer)
        if entry is None:
            return []
        path = entry.folder / "model.onnx"
        reference = np.load(entry.folder / _REFERENCE)
        return [Contender(TERNARY_PEER, "onnx", path, path.stat().st_size, entry.facts, reference)]

    def pytorch(self) -> list[Contender]:
        """Return the original model in PyTorch, eager and compiled."""
        folder = self._source.folder
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        eager = Contender(PYTORCH, "torch", folder, size, {})
        return [eager, Contender(COMPILED, "compiled", folder, size, {})]

    def student(self, encoding: str) -> Contender:
        """Return the ternary student in an encoding."""
        key = self._key(*_OWN, "ti_fx", "passes", "export")
        entry = self.store.get(
            self._name(encoding), key, lambda folder: self._write_student(folder, encoding)
        )
        reference = np.load(entry.folder / _REFERENCE)
        path = entry.folder / "student.onnx"
        return Contender(encoding, "onnx", path, path.stat().st_size, entry.facts, reference)

    # ---- how each is built

    @cached_property
    def _source(self) -> Entry:
        return self.store.get(self._name("source"), self._key(*_OWN), self._write_source)

    def _write_source(self, folder: Path) -> dict[str, Any]:
        self.subject.save(folder)
        return {}

    @cached_property
    def _fp32(self) -> Entry:
        key = self._key(*_OWN, "ti_fx/demo/classifier.py", "export/baselines.py")
        return self.store.get(self._name("fp32"), key, self._write_fp32)

    @property
    def _fp32_path(self) -> Path:
        return self._fp32.folder / "fp32.onnx"

    def _write_fp32(self, folder: Path) -> dict[str, Any]:
        path = folder / "fp32.onnx"
        with quiet():
            self._write_plain(self._source.folder, path)
        return {"streamed": streamed_bytes(path)}

    def _write_plain(self, source: Path, path: Path) -> None:
        """Export a model of the subject's class as it is."""
        if self.subject.decodes:
            _export_decoder(self.subject, source, path)
        else:
            export_fp32(source, path, {**self.subject.example()})

    def _derived(self, name: str, write: Callable[[Path], str | None]) -> Entry:
        """Return an entry made from the fp32 file by ``write``, which returns a note."""

        def build(folder: Path) -> dict[str, Any]:
            with quiet():
                note = write(folder / "model.onnx")
            return {"streamed": streamed_bytes(folder / "model.onnx"), "note": note or ""}

        return self.store.get(self._name(name), self._key(*_OWN) | {"from": self._fp32.digest}, build)

    def _optimised(self) -> Entry:
        return self._derived("fp32-optimised", self._write_optimised)

    def _write_optimised(self, path: Path) -> str:
        """Write what the optimiser makes of the fp32 file as its own family, or else as the most general one."""
        from onnxruntime.transformers.optimizer import optimize_model

        config = self.subject.config()
        heads, width = config.num_attention_heads, config.hidden_size
        failures = ""
        for family in dict.fromkeys((self.subject.family, "bert")):
            try:
                model = optimize_model(str(self._fp32_path), family, num_heads=heads, hidden_size=width)
            except Exception as error:  # whatever its fusions meet in a file that they were not made for
                failures += f"; as {family} it fails: {type(error).__name__}: {error}"
                continue
            fused = {name: count for name, count in model.get_fused_operator_statistics().items() if count}
            model.save_model_to_file(str(path))
            counts = ", ".join(f"{count} {name}" for name, count in fused.items()) or "nothing"
            return f"as {family}, fused {counts}{failures}"
        raise ExportError(f"onnxruntime.transformers' optimiser can't take the file{failures}")

    def _compressed(self, mode: str) -> Entry:
        missing = [name for name in ("openvino", "nncf") if find_spec(name) is None]
        if missing:
            raise MissingExtra(
                f"{' and '.join(missing)} can't be imported; run `pip install 'ti_fx[benchmark]'`"
            )

        def build(folder: Path) -> dict[str, Any]:
            import nncf
            import openvino

            options: dict[str, Any] = {}
            if mode.startswith("INT4"):
                adjust = nncf.GroupSizeFallbackMode.ADJUST  # where 128 does not divide a width
                options["advanced_parameters"] = nncf.AdvancedCompressionParameters(
                    group_size_fallback_mode=adjust
                )
            with quiet():
                model = openvino.Core().read_model(self._fp32_path)
                chosen = getattr(nncf.CompressWeightsMode, mode)
                openvino.save_model(
                    nncf.compress_weights(model, mode=chosen, **options), folder / "model.xml"
                )
            return {}

        key = self._key(*_OWN) | versions("openvino", "nncf") | {"from": self._fp32.digest}
        return self.store.get(self._name(f"openvino-{mode.lower()}"), key, build)

    def _packed_by_peer(self) -> Entry:
        if find_spec("onnxsim") is None:
            raise MissingExtra("onnxsim can't be imported; run `pip install 'ti_fx[benchmark]'`")

        def build(folder: Path) -> dict[str, Any]:
            import onnxsim

            source, plain = folder / "source", folder / "fp32.onnx"
            model = self.subject.load(self._source.folder)
            with torch.no_grad():
                for name, value in self._ternary_values().items():
                    model.get_parameter(name).copy_(value)
            model.save_pretrained(source)
            with quiet():
                self._write_plain(source, plain)
                packed = onnxsim.quantize_ternary(onnx.load(plain))
            onnx.save(packed, folder / "model.onnx")
            plain.unlink()
            shutil.rmtree(source)
            np.save(folder / _REFERENCE, self._reference("int8-tensor"))
            products = sum(node.op_type == "MatMulInteger" for node in packed.graph.node)
            note = f"{products} products of integers"
            return {"streamed": streamed_bytes(folder / "model.onnx"), "note": note}

        key = self._key(*_OWN, "ti_fx", "passes") | versions("onnxsim")
        return self.store.get(self._name("onnxsim-ternary"), key, build)

    def _ternary_values(self) -> dict[str, torch.Tensor]:
        """Return the values of the student's ternary weights by name."""
        gm = self._ternary
        return {
            str(node.args[0].target): numerics.ternary(
                gm.get_parameter(str(node.args[0].target)), *node.args[1:], **node.kwargs
            ).detach()
            for node in gm.graph.nodes
            if node.target is numerics.ternary
        }

    @cached_property
    def _model(self) -> Any:
        return self.subject.load(self._source.folder, "eager")

    @cached_property
    def _ternary(self) -> GraphModule:
        gm = ti_fx.capture(self._model, self.subject.example()).eval()
        ti_fx.Pipeline(Ternarize())(gm)
        return gm

    def _fake_quantised(self, encoding: str) -> GraphModule:
        gm = ti_fx.fork(self._ternary)
        ti_fx.Pipeline(QuantizeActivations(encoding=encoding), Strip())(gm)
        return gm

    def _reference(self, encoding: str) -> NDArray[Any]:
        with torch.no_grad():
            logits: NDArray[Any] = self._fake_quantised(encoding)(**self.subject.error_inputs())[
                "logits"
            ].numpy()
        return logits

    def _write_student(self, folder: Path, encoding: str) -> dict[str, Any]:
        gm = self._fake_quantised(encoding)
        np.save(folder / _REFERENCE, self._reference(encoding))
        path = folder / "student.onnx"
        report = self._write(gm, path, Pack())
        return {"streamed": streamed_bytes(path), "code_bits": report.code_bits}

    def _write(self, gm: GraphModule, path: Path, pack: Pack) -> ExportReport:
        ti_fx.Pipeline(pack)(gm)
        example = self.subject.example()
        if self.subject.decodes:
            cached, inputs = with_cache(gm, self._model, example)
            return to_onnx(cached, path, inputs)
        return to_onnx(gm, path, example)

    # ---- small things

    def _optional(self, label: str, build: Callable[[], Entry]) -> Entry | None:
        try:
            return build()
        except Exception as error:  # others' tools, which raise what they like; the run says what is left out
            self.left_out[label] = " ".join(str(error).split())[:300] or type(error).__name__
            return None

    def _of_file(self, label: str, entry: Entry, name: str) -> Contender:
        path = entry.folder / name
        return Contender(label, "onnx", path, path.stat().st_size, entry.facts)

    def _name(self, contender: str) -> str:
        return f"{self.subject.name.replace(', ', '-')}-{contender}"

    def _key(self, *paths: str) -> dict[str, str]:
        installed = versions("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
        return {"sources": sources(*paths)} | installed


def _export_decoder(subject: Subject, source: Path, path: Path) -> None:
    """Write the original decoder with its cache as inputs and outputs, all sizes dynamic."""
    model = subject.runnable(subject.load(source))
    feed = {name: torch.from_numpy(value) for name, value in subject.export_feed().items()}
    dynamic = torch.export.Dim.DYNAMIC
    past = tuple({0: dynamic, 2: dynamic} for name in feed if name.startswith("past_"))
    shapes = (*({0: dynamic, 1: dynamic} for _ in range(len(feed) - len(past))), past)
    present = [name.replace("past_", "present_") for name in feed if name.startswith("past_")]
    with torch.no_grad(), atomic_path(path) as temporary:
        program = torch.onnx.export(
            model,
            tuple(feed.values()),
            dynamic_shapes=shapes,
            input_names=list(feed),
            output_names=["logits", *present],
            dynamo=True,
            verbose=False,
            optimize=True,
        )
        assert program is not None
        program.save(str(temporary), external_data=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep other tools' progress and advice off the terminal; their errors are raised all the same."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def streamed_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a file that one run reads whole: all but tables that rows are taken from."""
    graph = onnx.load(path).graph
    looked_up: set[str] = set()
    whole: set[str] = set()
    for node in graph.node:
        table = node.op_type in ("Gather", "GatherBlockQuantized")
        for index, name in enumerate(node.input):
            (looked_up if table and index != 1 else whole).add(name)
    return sum(
        tensor.ByteSize()
        for tensor in graph.initializer
        if tensor.name in whole or tensor.name not in looked_up
    )
