"""Draw one layer before and after a Teacher Intervention: the picture in the README.

Run: python examples/draw_intervention.py [FILE.svg]
"""

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import ti_fx
from ti_fx.passes import DuplicateTeacher, Intervene, QuantizeActivations, Ternarize
from ti_fx.view import svg_diff

path = Path(sys.argv[1] if len(sys.argv) > 1 else "intervention.svg")

# Any transformer does; this is one layer of the demo's shape, with random weights.
model = BertForSequenceClassification(
    BertConfig(hidden_size=384, num_hidden_layers=1, num_attention_heads=12, intermediate_size=1536)
)
ids = torch.ones(2, 8, dtype=torch.long)
gm = ti_fx.capture(model, {"input_ids": ids, "attention_mask": ids})
ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), QuantizeActivations())(gm)

before = ti_fx.fork(gm)  # a graph of its own over the same tensors
ti_fx.Pipeline(Intervene(at="map"))(gm)
titles = ("student and frozen teacher", "after intervene{at=map}")
path.write_text(svg_diff(before, gm, layer=0, titles=titles), encoding="utf-8")
print(f"wrote {path}; what changed, as text:\n{ti_fx.diff(before, gm)}")
