"""Capture a transformer, make it ternary, train it beside its teacher for a few steps, export it, run the file.

python examples/quickstart.py
"""

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import ti_fx
from ti_fx import Pipeline
from ti_fx.export import Runtime, to_onnx
from ti_fx.passes import Distill, DuplicateTeacher, Intervene, Pack, QuantizeActivations, Strip, Ternarize


def batch(rows: int = 8, length: int = 16) -> dict[str, torch.Tensor]:
    """Random tokens [rows, length], where your data would be."""
    tokens = torch.randint(1, 5000, (rows, length))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="fewer layers and steps")
parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
options = parser.parse_args()
layers, size, steps = (2, 32, 4) if options.tiny else (4, 128, 60)
torch.manual_seed(0)

# 1. A model. Yours comes from from_pretrained, fine-tuned on your task: it becomes both teacher and student.
config = BertConfig(
    vocab_size=5000, num_hidden_layers=layers, hidden_size=size, num_attention_heads=4, num_labels=3
)
model = BertForSequenceClassification(config)
example = batch()

# 2. Its graph. Attention is found by following the data, not by names.
gm = ti_fx.capture(model, example)
print(ti_fx.capture_report(gm))
print(*ti_fx.find_attention(gm), sep="\n")

# 3. Student, frozen teacher and losses in one graph: passes in order, each verified as it has run.
captured = ti_fx.dump(gm)
prepare = Pipeline(
    DuplicateTeacher(),
    Ternarize(weights="tensor", embeddings="row"),
    QuantizeActivations(encoding="int8-tensor"),
    Distill(logits=1.0, layer_outputs=1.0, scores=1.0, attention_outputs=1.0),
    Intervene(at="output"),
)
print(prepare(gm))
print(*ti_fx.diff(captured, gm).splitlines()[:12], "...", sep="\n")

# 4. Training is PyTorch as usual. Half-way the teacher stops intervening: one more pass, on the same graph.
#    (ti_fx.train.TernaryTrainer does all this by a recipe: see bring_your_own.py.)
optimizer = torch.optim.AdamW([tensor for tensor in gm.parameters() if tensor.requires_grad], lr=2e-4)
gm.train()
for step in range(steps):
    if step == steps // 2:
        print(Pipeline(Intervene(at=None))(gm))
    result = gm(**batch())
    optimizer.zero_grad()
    result["loss"].backward()
    optimizer.step()
    if step % max(1, steps // 6) == 0:
        losses = ", ".join(f"{name} {value.item():.3f}" for name, value in result["losses"].items())
        print(f"step {step}: {losses}")

# 5. The student alone, its weights as codes and scales; then the file, compared with PyTorch as it is written.
gm.eval()
print(Pipeline(Strip(), Pack())(gm))
report = to_onnx(gm, options.out / "student.onnx", example, config=config)
print(report)

# 6. The file needs ONNX Runtime only, and takes batches of other sizes.
logits = Runtime(report.path)(batch(rows=5, length=30))["logits"]
print(f"ONNX Runtime: logits of shape {list(logits.shape)}")
