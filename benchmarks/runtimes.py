"""Exported files in other versions of ONNX Runtime: which of them load, and which nodes compute something else.

    python3.11 -m venv /tmp/ort-1.22 && /tmp/ort-1.22/bin/pip install onnxruntime==1.22.1   (1.18 and older: numpy<2)
    python benchmarks/runtimes.py /tmp/ort-1.22/bin/python ...

A BERT, a block with attention and a Llama with a cache, tiny and with random weights, are written in every encoding and
opset that makes a difference, and cut at each of their nodes, so that a node gets the same inputs in every version.
A version is off where a node's output differs from the installed version's by more than 1e-5 (relative L2).
``ti_fx.export.file.minimum_runtime`` says which version a file needs; exits with 1 if a version from there on does not
load the file or is off, so run it whenever that table or an encoding changes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import ti_fx
from ti_fx.export import to_onnx, with_cache
from ti_fx.export.compare.nodes import cut_at_nodes
from ti_fx.export.file.content import open_file
from ti_fx.export.file.minimum_runtime import MINIMUM_RUNTIME
from ti_fx.numerics.closeness import relative
from ti_fx.passes import DecomposeAttention, Pack, QuantizeActivations, Ternarize

TOLERANCE = 1e-5
WIDTH, HEADS = 128, 4
# without a table; the Llama's is tied to its head, and its look-up needs a newer version than the rest
BLOCK = {
    "int8-tensor": (18, 19, 20, 21, 22, 23, 24, 25),
    "int8-token": (21, 22, 23, 24, 25),
    "reference": (18, 21, 25),
    "nbits2": (18, 21, 25),
    "nbits2-64": (18,),
    "nbits2-32": (18,),
    "base3": (25,),
    "float": (18, 21, 25),
}
BERT = {"int8-tensor": (18, 25), "int8-token": (21,), "nbits2": (25,), "portable": (18,), "base3": (18, 25)}
LLAMA = {"int8-token": (25,), "nbits2": (25,), "base3": (18, 23, 25)}
# Run by the other versions: loads a model, and writes what it gives, its names in order, or why it can't be run.
RUN = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
print(onnxruntime.__version__)
for path in sys.argv[1:]:
    try:
        session = onnxruntime.InferenceSession(path + ".onnx", options, providers=["CPUExecutionProvider"])
        stored = numpy.load(path + ".npz")
        names = [value.name for value in session.get_inputs()]
        feed = {name: stored[str(index)] for index, name in enumerate(sorted(names))}
        found = session.run(None, feed)
    except Exception as error:
        print(" ".join(str(error).split())[:90])
    else:
        numpy.savez(path + "-out.npz", **{str(index): value for index, value in enumerate(found)})
        print("ran")
"""


class Block(nn.Module):
    """Attention and a feed-forward layer between norms."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second, self.head = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, values: Tensor) -> Tensor:
        """Take and return float32: ``[batch, length, width]`` to ``[batch, length, 5]``."""
        batch, length, width = values.shape
        query, key, value = (
            layer(values).view(batch, length, HEADS, width // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / (width // HEADS) ** 0.5
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = self.first(values + self.output(context))
        found: Tensor = self.head(self.second(hidden + self.down(nn.functional.gelu(self.up(hidden)))))
        return found


@dataclass(frozen=True)
class File:
    """A cut model (``path.onnx``), what it takes (``path.npz``), and the version that its metadata says it needs."""

    name: str
    path: Path
    minimum: tuple[int, ...]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", nargs="+", help="a Python that has another version of onnxruntime")
    parser.add_argument("--only", default="", help="a part of the names of the files to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        files = list(written(Path(name), options.only))
        _, expected = results(sys.executable, files)
        found = dict(results(python, files) for python in options.python)
        for file, installed in zip(files, expected, strict=True):
            if isinstance(installed, str):
                print(f"{file.name} does not run in the installed version: {installed}")
                return 1
        return show(files, expected, found)


def written(folder: Path, only: str) -> Iterator[File]:
    """Write every model in every encoding and opset, cut at its nodes; of these, those with ``only`` in their name."""
    block = Block().train(False)
    values = {"values": torch.randn(3, 7, WIDTH)}
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "vocab_size": 1100,
    }
    bert = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=HEADS)).train(False)
    tied = LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=2, tie_word_embeddings=True)
    llama = LlamaForCausalLM(tied).train(False)
    ids = torch.randint(0, 1100, (2, 7))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models: tuple[tuple[nn.Module, dict[str, Tensor], dict[str, tuple[int, ...]]], ...] = (
        (block, values, BLOCK),
        (bert, texts, BERT),
        (llama, texts, LLAMA),
    )
    for model, example, encodings in models:
        for encoding, opsets in encodings.items():
            names = {f"{type(model).__name__} {encoding} {opset}": opset for opset in opsets}
            wanted = {name: opset for name, opset in names.items() if only in name}
            if not wanted:
                continue
            student = packed(model, example, encoding)
            inputs = example
            if model is llama:
                student, inputs = with_cache(student, model, example)
            for name, opset in wanted.items():
                yield file_of(folder, name, student, inputs, opset)


def packed(model: nn.Module, example: dict[str, Tensor], encoding: str) -> GraphModule:
    gm = ti_fx.capture(model, example)
    ti_fx.Pipeline(DecomposeAttention(), Ternarize(), QuantizeActivations(encoding), Pack())(gm)
    return gm.eval()


def file_of(folder: Path, name: str, student: GraphModule, inputs: dict[str, Tensor], opset: int) -> File:
    path = folder / name.replace(" ", "-")
    report = to_onnx(student, folder / "whole.onnx", inputs, opset=opset)
    cut = cut_at_nodes(open_file(report.path), student, inputs)
    minimum = next(entry.value for entry in cut.model.metadata_props if entry.key == MINIMUM_RUNTIME)
    onnx.save(cut.model, f"{path}.onnx")
    feed = {str(index): cut.feed[key] for index, key in enumerate(sorted(cut.feed))}
    np.savez(f"{path}.npz", **feed)  # type: ignore[arg-type]
    return File(name, path, version(minimum))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


Result = str | list[np.ndarray]


def results(python: str, files: list[File]) -> tuple[str, list[Result]]:
    """Return an installation's version, and of each file what it gives, or why it does not run."""
    command = [python, "-c", RUN, *(str(file.path) for file in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} can't run ONNX Runtime: {done.stderr.strip().splitlines()[-1:]}")
    found, *lines = done.stdout.splitlines()
    values: list[Result] = []
    for file, line in zip(files, lines, strict=True):
        if line == "ran":
            with np.load(f"{file.path}-out.npz") as stored:
                values.append([stored[str(index)] for index in range(len(stored.files))])
        else:
            values.append(line)
    return found, values


def show(files: list[File], expected: list[Result], found: dict[str, list[Result]]) -> int:
    """Print a row for each file; return 1 if a version is off that the file's metadata takes for good enough."""
    versions = sorted(found, key=version)
    table = Table("file", "needs", *versions, title="the worst node's distance from the installed version's")
    wrong = False
    for place, file in enumerate(files):
        row = [file.name, ".".join(map(str, file.minimum))]
        for name in versions:
            result, installed = found[name][place], expected[place]
            distance = None if isinstance(result, str) else worst(result, installed)
            is_wrong = version(name) >= file.minimum and (distance is None or distance > TOLERANCE)
            wrong |= is_wrong
            row.append(("-" if distance is None else f"{distance:.0e}") + (" WRONG" if is_wrong else ""))
        table.add_row(*row)
    Console(width=40 + 10 * len(versions)).print(table)
    return int(wrong)


def worst(found: list[np.ndarray], expected: Result) -> float:
    """Return the largest relative L2 distance of a value."""
    distances = [0.0]
    for value, wanted in zip(found, expected, strict=True):
        assert isinstance(wanted, np.ndarray)
        distances.append(relative(torch.from_numpy(value), torch.from_numpy(wanted)))
    return max(distances)


if __name__ == "__main__":
    sys.exit(main())
