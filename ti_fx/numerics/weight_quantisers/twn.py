"""Ternary Weight Networks: a threshold at 0.7 of the mean magnitude."""

from __future__ import annotations

from ti_fx.numerics.ternary_weights import ternary, ternary_codes
from ti_fx.numerics.weight_quantiser import WeightQuantiser

TWN = WeightQuantiser(
    "twn",
    ternary,
    ternary_codes,
    formula="sign(W) where |W| > 0.7 mean|W|, else 0; scale: mean |W| of what is beyond",
    source="Ternary Weight Networks, arXiv 1605.04711; TernaryBERT, EMNLP 2020",
)
