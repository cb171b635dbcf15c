"""Your own transformer, in plain PyTorch: train it on real images of digits, make it ternary, run it as ONNX.

Nothing here is a Hugging Face model. The data is scikit-learn's load_digits: 1,797 scans of 8x8 pixels.

    python examples/bring_your_own.py
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import TrainingArguments

import ti_fx
from ti_fx.export import Runtime, to_onnx
from ti_fx.passes import Pack
from ti_fx.train import TernaryTrainer


class Block(nn.Module):
    """One pre-norm layer, with the three projections in one matrix and torch's fused attention."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, places, size] in and out."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = scaled_dot_product_attention(*parts.unbind(0))
        x = x + self.out(context.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class DigitReader(nn.Module):
    """A small vision transformer: [batch, 16, 4] pixels in patches of 2x2 to [batch, 10] logits."""

    def __init__(self, size: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Linear(4, size)
        self.places = nn.Parameter(torch.randn(16, size) * 0.02)
        self.blocks = nn.Sequential(*(Block(size, heads=4) for _ in range(layers)))
        self.norm, self.classify = nn.LayerNorm(size), nn.Linear(size, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Read a batch of digits."""
        return self.classify(self.norm(self.blocks(self.patches(pixels) + self.places)).mean(1))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="a few steps only")
parser.add_argument("--out", type=Path, default=Path("runs/bring_your_own"))
options = parser.parse_args()
teacher_steps, student_steps, intervention_steps = (20, 12, 6) if options.tiny else (800, 600, 60)
torch.manual_seed(0)

images, labels = map(torch.tensor, load_digits(return_X_y=True))
patches = (images / 8 - 1).float().view(-1, 8, 8).unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
train_x, test_x, train_y, test_y = train_test_split(patches, labels, test_size=0.2, random_state=0)

# 1. The full-precision model, trained as you always do.
model = DigitReader()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(teacher_steps):
    rows = torch.randint(len(train_x), (64,))
    loss = cross_entropy(model(train_x[rows]), train_y[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
full = accuracy(model.eval()(test_x), test_y)

# 2. Teacher intervention: a recipe, rows named as forward's arguments, and transformers' own TrainingArguments.
trainer = TernaryTrainer(
    model,
    ti_fx.Recipe.preset("ti-g", intervention_steps=intervention_steps),
    TrainingArguments(str(options.out), max_steps=student_steps, learning_rate=1e-3),
    train_dataset=[{"pixels": row} for row in train_x],
)
trainer.train()

# 3. The student alone, packed, as a file that ONNX Runtime runs.
student = trainer.student()
ti_fx.Pipeline(Pack())(student)
report = to_onnx(student, options.out / "digits.onnx", {"pixels": test_x[:8]})
print(report)
logits = torch.from_numpy(Runtime(report.path)({"pixels": test_x})["output_0"])
ternary = accuracy(logits, test_y)
print(f"test accuracy: {full:.3f} in full precision, {ternary:.3f} with ternary weights in ONNX Runtime")
