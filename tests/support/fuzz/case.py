"""A case says everything about one random transformer: the module, its inputs and the passes are made from it alone."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

WIDTH = 16
VOCABULARY = 40
TABLE = 48  # rows of a table of positions, and of a stored causal mask
MASKED = ("bool", "int", "float", "ignore", "bool4", "additive4")  # how a mask of padding is given


@dataclass(frozen=True)
class Case:
    """One random transformer.

    Attributes:
        seed: of weights and inputs.
        batch, length: sizes of the example.
        dtype: of weights and features. ids: dtype of the ids; ``none``: features come in instead.
        layers, heads, key_heads, head_width: the shape; fewer key heads than heads share them.
        norm: where norms stand: ``pre``, ``post``, ``sandwich`` or ``none``. rms: RMSNorm, else LayerNorm.
        projection: which of Q, K and V come from one weight. bias: of the projections.
        kernel: how attention is written. scale: what is scaled. query_norm: RMSNorm on Q and K.
        mask: how a mask of padding is given. causal: how a causal mask is made, if there is one. window: tokens to
            either side that are seen, 0 for all. masking: what a mask does to scores.
        empty_rows: whether one row of the batch is padding alone.
        positions: how places are known.
        feed_forward: ``plain``, ``gated`` or ``none``. activation: of it.
        memory: a second sequence, of a length of its own, is read by cross-attention.
        pooling: what becomes of the tokens. head: what is returned. tied: a token head shares the table of ids.
        prompts: a third input with a batch of its own, compared with what was pooled.
        outputs: the structure that is returned.
        dropout: in the blocks.
        extra: what else happens: buffers, decisions in Python, parts without gradient.
        encoding, attention, weights, tables, at, variant, layer_outputs: options of the passes.
        until: the last step that is tried.
    """

    seed: int = 0
    batch: int = 2
    length: int = 8
    dtype: str = "float32"
    ids: str = "int64"
    layers: int = 1
    heads: int = 2
    key_heads: int = 2
    head_width: int = 8
    norm: str = "post"
    rms: bool = False
    projection: str = "separate"
    bias: bool = True
    kernel: str = "hand"
    scale: str = "scores"
    query_norm: bool = False
    mask: str = "none"
    causal: str = "none"
    window: int = 0
    masking: str = "fill"
    empty_rows: bool = False
    positions: str = "none"
    feed_forward: str = "plain"
    activation: str = "gelu"
    memory: bool = False
    pooling: str = "none"
    head: str = "classes"
    tied: bool = False
    prompts: bool = False
    outputs: str = "dict"
    dropout: float = 0.0
    extra: str = "none"
    encoding: str = "float"
    attention: bool = False
    weights: str = "tensor"
    tables: bool = False
    at: str = "none"
    variant: str = "paper"
    layer_outputs: bool = False
    until: str = "export"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and features."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    def text(self) -> str:
        """Return the case as an expression: the fields that are not as by default."""
        changed = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return f"Case({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def json(self) -> str:
        """Return the case as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Return the case that :meth:`json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**fields)
