"""Leaf modules hold the operations that behave differently in training; they read ``self.training``.

A dropout flag in the graph would be a constant: flipping it means another graph and another compilation. A leaf
module follows ``train()`` and ``eval()`` as any nn.Module does. Dropout itself is torch.nn.Dropout.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx.numerics.onnx_nodes import since_opset


class ScaledDotProductAttention(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention`` with dropout in training only."""

    def __init__(self, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return softmax(query keyᵀ · scale + mask) value; shapes ``(..., length, head size)``."""
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def extra_repr(self) -> str:
        """Show the options in a dump."""
        return f"p={self.dropout_p}, causal={self.is_causal}, scale={self.scale}, gqa={self.enable_gqa}"


class DropPath(nn.Dropout):
    """Stochastic depth: in training each row's values, or those of all rows, are dropped with probability ``p``.

    Args:
        p: the probability.
        rows: whether a number is drawn for each row; else one for all of them.
        uniform: whether uniform numbers are drawn, as transformers does, or those of a Bernoulli distribution: with
            the same seed the same rows are dropped as in the model.
    """

    def __init__(self, p: float, rows: bool, uniform: bool) -> None:
        super().__init__(p)
        self.rows = rows
        self.uniform = uniform

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` of shape ``(rows, ...)``; what is kept in training is divided by ``1 - p``."""
        if not self.training:
            return input
        keep = 1 - self.p
        shape = (input.shape[0] if self.rows else 1,) + (1,) * (input.dim() - 1)
        if self.uniform:
            drawn = torch.rand(shape, dtype=input.dtype, device=input.device)
            return input.div(keep) * torch.floor(drawn + keep)
        return input * input.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Show the options in a dump."""
        return f"p={self.p:g}, rows={self.rows}, uniform={self.uniform}"


@since_opset(18)
def add_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Add an attention mask that broadcasts to ``scores``; where a boolean one is False, scores are the lowest number.

    That is zero after softmax, as -inf is, and a row with everything masked is the mean of V, not NaN.
    """
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


@since_opset(18)
def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Return the boolean ``(queries, keys)`` mask of causal attention: True at and below the diagonal."""
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()


class BatchNorm(nn.Module):
    """Batch normalisation over the given tensors: batch statistics in training, running ones in evaluation."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps

    def forward(
        self,
        value: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
    ) -> Tensor:
        """Normalise ``value`` of shape ``(batch, channels, ...)``; running statistics are updated in training."""
        return torch.nn.functional.batch_norm(
            value,
            running_mean,
            running_var,
            weight,
            bias,
            training=self.training or running_mean is None,
            momentum=self.momentum,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Show the options in a dump."""
        return f"momentum={self.momentum}, eps={self.eps}"


class Frozen(nn.Module):
    """A copy of a leaf for the teacher: always in eval mode, whatever ``train()`` says."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = copy.deepcopy(leaf).eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode."""
        self.training = mode
        return self

    def forward(self, *args: Tensor | None) -> Tensor:
        """Run the leaf in eval mode."""
        result: Tensor = self.leaf(*args)
        return result

    def extra_repr(self) -> str:
        """Show the leaf's options in a dump."""
        return f"{type(self.leaf).__name__}, {self.leaf.extra_repr()}"


def is_dropout(gm: GraphModule, node: Node) -> bool:
    """Whether the node is a dropout leaf, which the teacher has no copy of."""
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.Dropout)
