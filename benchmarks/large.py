"""What it costs to export a Llama of 7B parameters with ternary weights, from capture to a checked file.

    python benchmarks/large.py                 the whole model: about 2.2 GB on disk for a while
    python benchmarks/large.py --layers 2      a quick run, same widths
    python benchmarks/large.py --keep FOLDER   leave the files there

The model is captured on the meta device, and its weights are made one by one, at random, as pack_from asks for them:
ternary matrices, and a head in full precision. So the float model is never in memory. Each step prints its seconds and
the process's largest resident memory so far, mapped files included. Exits with 1 above GIGABYTES.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ti_fx
from ti_fx.export import pack_from, to_onnx
from ti_fx.passes import QuantizeActivations, Strip, Ternarize

GIGABYTES = 8.0
LAYERS = 32
VOCABULARY, WIDTH, INNER, HEADS = 32000, 4096, 11008, 32
SCALE = 0.02


def main() -> int:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=arguments.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    with step("build without values"), init_empty_weights():
        model: nn.Module = LlamaForCausalLM(config)
    buffers = dict(model.named_buffers())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e9:.2f} billion parameters in {arguments.layers} layers")
    example = {
        "input_ids": torch.arange(2 * 5).view(2, 5) * 3001 % VOCABULARY,
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
    }
    with step("capture"):
        gm = ti_fx.capture(model.to("meta"), example)
    with step("rewrite"):
        activations = QuantizeActivations(encoding=arguments.encoding)
        ti_fx.Pipeline(Ternarize(), activations, Strip())(gm)
    with step("make, pack and drop each weight"):
        pack_from(gm, buffers, RandomWeights(model))
    with tempfile.TemporaryDirectory(dir=arguments.keep) as folder:
        path = Path(arguments.keep or folder) / "student.onnx"
        with step("export and compare"):
            report = to_onnx(gm, path, example, external_data=True)
        print(report)
        for file in sorted(path.parent.glob("student.onnx*")):
            print(f"{file.name}: {file.stat().st_size:,} bytes")
    peak = gigabytes()
    print(f"largest resident memory: {peak:.2f} GB, allowed {GIGABYTES:g} GB")
    return 0 if peak <= GIGABYTES else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the 32 that 7B parameters are")
    parser.add_argument("--encoding", default="nbits2", help="of the activations")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--keep", metavar="FOLDER", help="an existing folder, in which the files are left")
    return parser.parse_args()


class RandomWeights:
    """A function of a parameter's name that makes its values: the same ones whenever it is asked."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes = {name: value.shape for name, value in model.named_parameters()}

    def __call__(self, name: str) -> Tensor:
        """Return float32 values; raises KeyError for another name."""
        shape = self.shapes[name]
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if len(shape) == 1:
            return 1 + SCALE * torch.randn(shape, generator=random)
        if name.startswith("lm_head"):
            return SCALE * torch.randn(shape, generator=random)
        return torch.randint(-1, 2, shape, dtype=torch.int8, generator=random) * SCALE


@contextmanager
def step(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.0f} s, {gigabytes():.2f} GB at most so far", flush=True)


def gigabytes() -> float:
    """Return the largest resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    sys.exit(main())
