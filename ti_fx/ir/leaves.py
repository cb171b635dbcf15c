"""Leaf modules hold the operations that behave differently in training; they read ``self.training``.

A dropout flag in the graph would be a constant: flipping it means another graph and another compilation. A leaf
module follows ``train()`` and ``eval()`` as any nn.Module does. Dropout itself is torch.nn.Dropout.
"""

from __future__ import annotations

import copy
from typing import Any

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


class DrawnShare(nn.Module):
    """Which rows or tokens read the teacher's value: in training each does with the probability ``share``.

    Args:
        each: ``rows`` or ``tokens``: for what a number is drawn, in every call anew.
        heads: whether the third dimension from the end counts heads, which read alike: that of a map or a context.
    """

    def __init__(self, each: str, heads: bool) -> None:
        super().__init__()
        self.each = each
        self.heads = heads

    def forward(self, value: Tensor, share: Tensor) -> Tensor:
        """Return 1 where the teacher is read and 0 elsewhere, of a shape that broadcasts to ``value``.

        In evaluation nothing is drawn: it is the share everywhere, as a dropout is its mean.

        Args:
            value: what is read, ``(rows, ...)`` or ``(..., tokens, features)``.
            share: the probability, [].
        """
        if self.each == "rows":
            shape = (value.shape[0],) + (1,) * (value.dim() - 1)
        elif self.heads and value.dim() > 3:
            shape = (*value.shape[:-3], 1, value.shape[-2], 1)
        else:
            shape = (*value.shape[:-1], 1)
        if not self.training:
            return torch.zeros(shape, dtype=share.dtype, device=value.device) + share
        return (torch.rand(shape, dtype=share.dtype, device=value.device) < share).to(share.dtype)

    def extra_repr(self) -> str:
        """Show the options in a dump."""
        return f"each={self.each}, heads={self.heads}"


@since_opset(18)
def add_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Add an attention mask that broadcasts to ``scores``; where it is False or -inf, scores are a very low number.

    That is zero after softmax, as -inf is, and a row with everything masked is a number, not NaN: see
    :func:`zero_masked_rows`.
    """
    lowest = torch.finfo(scores.dtype).min
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, lowest)
    return scores + mask.masked_fill(mask == float("-inf"), lowest / 2)


@since_opset(18)
def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Return the boolean ``(queries, keys)`` mask of causal attention: True at and below the diagonal."""
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()


@since_opset(18)
def zero_masked_rows(map: Tensor, mask: Tensor) -> Tensor:
    """Zero the rows of an attention map ``(..., queries, keys)`` whose mask, False or -inf, hides every key.

    So does ``scaled_dot_product_attention``: the context of such a query is zero.
    """
    hidden = ~mask if mask.dtype == torch.bool else mask == float("-inf")
    return map.masked_fill(hidden.all(-1, keepdim=True), 0.0)


class BatchNorm(nn.Module):
    """Batch normalisation over the given tensors: batch statistics in training, running ones in evaluation.

    Args:
        momentum: the weight of a new batch in the running statistics; None: that of one batch among all so far.
        eps: is added to the variance.
    """

    _is_impure = True  # torch.fx: its statistics move although nobody reads its output

    def __init__(self, momentum: float | None, eps: float) -> None:
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
        batches: Tensor | None = None,
    ) -> Tensor:
        """Normalise ``value`` of shape ``(batch, channels, ...)``; training updates what is running, and the count."""
        if not self.training or running_mean is None or running_var is None:
            return torch.nn.functional.batch_norm(
                value, running_mean, running_var, weight, bias, running_mean is None, 0.0, self.eps
            )
        if batches is not None:
            batches.add_(1)
        if self.momentum is not None or batches is None:
            share = self.momentum or 0.0
            return torch.nn.functional.batch_norm(
                value, running_mean, running_var, weight, bias, True, share, self.eps
            )
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        result = torch.nn.functional.batch_norm(value, mean, var, weight, bias, True, 1.0, self.eps)
        one_of_all = batches.to(mean.dtype).reciprocal()
        running_mean.lerp_(mean, one_of_all)
        running_var.lerp_(var, one_of_all)
        return result

    def extra_repr(self) -> str:
        """Show the options in a dump."""
        return f"momentum={self.momentum}, eps={self.eps}"


class InstanceNorm(nn.Module):
    """Instance normalisation that has running statistics: an instance's own in training, running ones in evaluation."""

    _is_impure = True

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps

    def forward(
        self,
        value: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
    ) -> Tensor:
        """Normalise ``value`` of shape ``(batch, channels, ...)``; running statistics are updated in training."""
        if not self.training:  # the same, and an operator of ONNX
            return torch.nn.functional.batch_norm(
                value, running_mean, running_var, weight, bias, False, 0.0, self.eps
            )
        return torch.nn.functional.instance_norm(
            value, running_mean, running_var, weight, bias, True, self.momentum, self.eps
        )

    def extra_repr(self) -> str:
        """Show the options in a dump."""
        return f"momentum={self.momentum}, eps={self.eps}"


class BufferWrite(nn.Module):
    """An operator that writes into one of the model's buffers.

    Args:
        operator: of ATen, with its overload: ``copy_.default``.
        options: its constant keyword arguments.
        always: whether evaluation writes, too; else training alone.
    """

    _is_impure = True  # torch.fx: it does something although nobody reads its output

    def __init__(self, operator: str, options: dict[str, Any], always: bool) -> None:
        super().__init__()
        self.operator = operator
        self.options = options
        self.always = always

    def forward(self, written: Tensor, *args: Any) -> Tensor:
        """Return ``written``, a buffer or a view of one, after the operator has written into it."""
        if not (self.training or self.always):
            return written
        name, _, overload = self.operator.partition(".")
        result: Tensor = getattr(getattr(torch.ops.aten, name), overload)(written, *args, **self.options)
        return result

    def extra_repr(self) -> str:
        """Show the operator in a dump."""
        options = [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([self.operator, *options, f"always={self.always}"])


class Frozen(nn.Module):
    """A copy of a leaf for the teacher: always in eval mode, whatever ``train()`` says; it writes into no buffer."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = copy.deepcopy(leaf).eval()
        if isinstance(self.leaf, BufferWrite):
            self.leaf.always = False

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


def is_buffer_write(gm: GraphModule, node: Node) -> bool:
    """Whether the node writes into one of the model's buffers."""
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), BufferWrite)


def is_idle_dropout(gm: GraphModule, node: Node) -> bool:
    """Whether the node is a dropout that drops nothing in training either: it gives the very tensor that it takes."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return type(module) is nn.Dropout and module.p == 0
