"""No training: capture -> Ternarize -> QuantizeActivations -> Pack -> ONNX.

Weights that were never trained to be ternary answer badly. This shows the compiler alone, and what a file would weigh.

    python examples/no_training.py [FOLDER_OF_A_TEXT_ENCODER]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, BertConfig

import ti_fx
from ti_fx.export import Runtime, to_onnx
from ti_fx.passes import Pack, QuantizeActivations, Ternarize

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", help="of a Hugging Face model; left out: BERT with random weights")
parser.add_argument("--tiny", action="store_true", help="a small BERT")
parser.add_argument("--out", type=Path, default=Path("runs/no_training"))
options = parser.parse_args()

if options.folder:
    model = AutoModel.from_pretrained(options.folder, dtype=torch.float32)
else:
    small = {"vocab_size": 5000, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    model = AutoModel.from_config(BertConfig(**small if options.tiny else {}))
model.eval()

# The example gives names, types and one size of the inputs; batch and sequence stay free.
tokens = torch.randint(1, model.config.vocab_size, (2, 16))
example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
gm = ti_fx.capture(model, example)
before = gm(**example).last_hidden_state

# A pass edits the graph in place. After these two it computes with ternary weights, still held as floats.
print(ti_fx.Pipeline(Ternarize(), QuantizeActivations(encoding="int8-tensor"))(gm))
ternary = gm(**example).last_hidden_state

# Pack turns the weights into codes and scales; what the graph computes is the same bit for bit.
print(ti_fx.Pipeline(Pack())(gm))
assert torch.equal(gm(**example).last_hidden_state, ternary)

# The writer keeps the file only if ONNX Runtime computes what PyTorch does.
report = to_onnx(gm, options.out / "ternary.onnx", example, config=model.config)
print(report)

answer = torch.from_numpy(Runtime(report.path)(example)["last_hidden_state"])
moved = ((answer - before).norm() / before.norm()).item()
size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(f"{size / 1e6:.1f} MB became {report.bytes / 1e6:.1f} MB; untrained, the output moved by {moved:.0%}")
