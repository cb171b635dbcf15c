"""A dispatch mode watches a forward for attention blocks, by the tensors that each operator takes and gives.

An attention block is a softmax of the product of two activations whose result multiplies a third. Nothing is known of
modules or architectures: a dispatch mode sees every operator of a forward, whatever wrote it.

A tensor is *free* if it comes from parameters, buffers and constants alone without a product (a table, its slices, a
scaled copy); everything else is an activation. So a router ``softmax(x @ W)`` is not counted, and learned queries that
pass a linear are. Stored queries that meet the keys as they are count, too: a batched product with the free tensor on
its left.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Change = Callable[[Tensor], Tensor]

_SOFTMAX = {"aten::_softmax", "aten::_safe_softmax", "aten::softmax"}
_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::dot", "aten::addbmm"}
_BATCHED = {"aten::bmm", "aten::baddbmm"}
_FUSED = "scaled_dot_product"
# These give a tensor of the same numbers in other places. Views are known by themselves.
_MOVES = {
    "aten::_reshape_copy",
    "aten::_to_copy",
    "aten::_unsafe_view",
    "aten::as_strided",
    "aten::cat",
    "aten::clone",
    "aten::constant_pad_nd",
    "aten::copy",
    "aten::copy_",
    "aten::flip",
    "aten::gather",
    "aten::im2col",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::index_select",
    "aten::masked_fill",
    "aten::masked_fill_",
    "aten::masked_scatter",
    "aten::repeat",
    "aten::roll",
    "aten::scatter",
    "aten::scatter_",
    "aten::select_scatter",
    "aten::slice_scatter",
    "aten::stack",
    "aten::take_along_dim",
    "aten::tril",
    "aten::triu",
    "aten::unfold_copy",
}


@dataclass(frozen=True)
class AttentionCall:
    """One softmax of the product of two activations.

    Attributes:
        index: its place among those of one forward, from zero.
        op: ``aten::_softmax``, the fused operator, or ``exp/sum`` where the model writes it out.
        module: path of the innermost module that was running.
        source: file and line that called it.
        shape: of the map (of the queries, for a fused operator).
        has_value: whether the map multiplies a further activation; a contrastive or pooling softmax does not.
        used: whether the model's outputs depend on it.
        moot: whether every position has the same value, so that no map would make a difference: the first block of
            a decoder whose queries begin as zeros, or a map over one position.
        projection: path of the module that multiplies the context by a stored weight, empty if none does.
        moved: whether the context reaches it with nothing but its place changed (no gate, no norm on the way).
    """

    index: int
    op: str
    module: str
    source: str
    shape: tuple[int, ...]
    has_value: bool
    used: bool = False
    moot: bool = False
    projection: str = ""
    moved: bool = False


@dataclass
class _Facts:
    """What is known of a tensor.

    Attributes:
        free: no input and no product in it.
        scores: it comes from a product of two activations by elementwise operators and moves alone.
        maps: softmaxes that it comes from in that way.
        contexts: softmaxes whose map times values it is, in another place at most. blended: the same after elementwise
            operators, too.
        exponent: what the softmax that is written out began with, if this is its exponential.
        total: the same, if this is the sum of that exponential, or its logarithm.
        normalised: the logarithm of a softmax: scores less the logarithm of their total.
        upstream: the calls that it depends on in any way, a bit for each.
    """

    free: bool = False
    scores: bool = False
    maps: frozenset[int] = frozenset()
    contexts: frozenset[int] = frozenset()
    blended: frozenset[int] = frozenset()
    exponent: int | None = None
    total: int | None = None
    normalised: bool = False
    upstream: int = 0


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator; may change the result of one softmax."""

    def __init__(self, model: nn.Module, index: int | None = None, change: Change | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.index, self.change = model, index, change
        self.calls: list[AttentionCall] = []
        self.alive: list[Tensor] = []  # an id means something only as long as its tensor lives
        self.facts: dict[int, _Facts] = {}
        self.written: dict[int, _Facts] = {}  # by storage: what was written into a part of it
        self.path: list[str] = []
        self.upstream = 0  # of the operator that is running
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._set(tensor, _Facts(free=True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = [self._get(tensor) for tensor in tensors]
        self.upstream = functools.reduce(operator.or_, (facts.upstream for facts in given), 0)
        result = func(*args, **kwargs)
        if name in _SOFTMAX:
            return self._softmax(name, result, given)
        if _FUSED in name:
            return self._fused(name, result, args, kwargs, given)
        facts = self._joined(func, name, given)
        if name in _PRODUCTS:
            facts = self._product(name, given, tensors[-2:])
            self._projected(given[-2:])
        elif name == "aten::exp" and given[0].normalised:
            return self._softmax("exp/sum", result, given)
        elif name == "aten::exp" and facts.scores:
            facts = replace(facts, exponent=id(tensors[0]))
        elif name == "aten::logsumexp" and given[0].scores:
            facts = _Facts(total=id(tensors[0]))
        elif name == "aten::sub" and len(given) == 2 and given[1].total == id(tensors[0]):
            facts = replace(facts, normalised=True)
        elif name in ("aten::sum", "aten::cumsum") and given[0].exponent is not None:
            facts = _Facts(total=given[0].exponent)
        elif (
            name == "aten::div"
            and len(given) == 2
            and given[0].exponent is not None
            and given[0].exponent == given[1].total
        ):
            return self._softmax("exp/sum", result, [replace(given[0], exponent=None)])
        self._record(func, args, result, facts)
        return result

    def _joined(self, func: Any, name: str, given: list[_Facts]) -> _Facts:
        """Return what an operator's result is, if the operator is no product."""
        free = all(facts.free for facts in given)
        moves = func.is_view or name in _MOVES
        keeps = moves or torch.Tag.pointwise in func.tags
        if not keeps:
            return _Facts(free=free)
        exponents = {facts.exponent for facts in given if facts.exponent is not None}
        totals = {facts.total for facts in given if facts.total is not None}
        return _Facts(
            free=free,
            scores=any(facts.scores for facts in given),
            maps=frozenset().union(*(facts.maps for facts in given)),
            contexts=given[0].contexts if moves and given else frozenset(),
            blended=frozenset().union(*(facts.blended for facts in given)),
            exponent=exponents.pop() if len(exponents) == 1 and not totals else None,
            total=totals.pop() if len(totals) == 1 and not exponents else None,
        )

    def _product(self, name: str, given: list[_Facts], operands: list[Tensor]) -> _Facts:
        left, right = given[-2:]
        contexts = frozenset[int]()
        for one, other, value, axis in ((left, right, operands[1], -2), (right, left, operands[0], -1)):
            if not other.free:
                self._multiplied(one.maps, value, axis)
                contexts |= one.maps
        queries = not left.free or name in _BATCHED
        return _Facts(
            scores=(queries and not right.free) or any(facts.scores for facts in given[:-2]),
            contexts=contexts,
            blended=contexts,
        )

    def _projected(self, given: list[_Facts]) -> None:
        """Note the module that multiplies a context by a weight."""
        for one, other in (given, given[::-1]):
            for index in one.blended if other.free else ():
                if not self.calls[index].projection and self.path:
                    moved = index in one.contexts
                    self.calls[index] = replace(self.calls[index], projection=self.path[-1], moved=moved)

    def _multiplied(self, maps: frozenset[int], value: Tensor, axis: int) -> None:
        for index in maps:
            self.calls[index] = replace(self.calls[index], has_value=True, moot=_same_along(value, axis))

    def _softmax(self, op: str, result: Tensor, given: list[_Facts]) -> Tensor:
        facts = _Facts(free=given[0].free)
        if given[0].scores:
            index = self._call(op, tuple(result.shape), has_value=False)
            if index == self.index and self.change is not None:
                result = self.change(result)
            facts = _Facts(maps=frozenset((index,)))
            self.upstream |= 1 << index
        self._set(result, facts)
        return result

    def _fused(
        self, name: str, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[_Facts]
    ) -> Any:
        if not given[1].free:
            index = self._call(name, tuple(args[0].shape), has_value=True)
            self._multiplied(frozenset((index,)), args[2], -2)
            self.upstream |= 1 << index
            if index == self.index and self.change is not None:
                context = _attention(self.change, *args, **kwargs)
                result = (context, *result[1:]) if isinstance(result, tuple) else context
        contexts = frozenset((len(self.calls) - 1,)) if not given[1].free else frozenset[int]()
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._set(leaf, _Facts(contexts=contexts, blended=contexts))
        return result

    def _call(self, op: str, shape: tuple[int, ...], has_value: bool) -> int:
        index = len(self.calls)
        module = self.path[-1] if self.path else ""
        self.calls.append(AttentionCall(index, op, module, _source(), shape, has_value))
        return index

    def _record(self, func: Any, args: tuple[Any, ...], result: Any, facts: _Facts) -> None:
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._set(leaf, facts)
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            written = replace(facts, upstream=facts.upstream | self.upstream)
            self.written[args[0].untyped_storage()._cdata] = written

    def _set(self, tensor: Tensor, facts: _Facts) -> None:
        self.alive.append(tensor)
        self.facts[id(tensor)] = replace(facts, upstream=facts.upstream | self.upstream)

    def used(self, outputs: Any) -> int:
        """Return the calls that the outputs depend on, a bit for each."""
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
        return functools.reduce(operator.or_, (self._get(leaf).upstream for leaf in leaves), 0)

    def _get(self, tensor: Tensor) -> _Facts:
        facts = self.facts.get(id(tensor))
        if facts is None:
            self._set(tensor, facts := _Facts())
        written = self.written.get(tensor.untyped_storage()._cdata)
        if written is None:
            return facts
        return replace(
            facts,
            upstream=facts.upstream | written.upstream,
            free=facts.free and written.free,
            scores=facts.scores or written.scores,
            maps=facts.maps | written.maps,
            contexts=facts.contexts | written.contexts,
            blended=facts.blended | written.blended,
        )


def _same_along(value: Tensor, axis: int) -> bool:
    if value.dim() < -axis:
        return False
    first = value.narrow(axis, 0, 1)
    return bool((value - first).abs().max() <= 1e-6 * first.abs().max())


def _attention(
    change: Change,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """Return what the fused operator would with another map."""
    causal = any(option is True for option in rest) or options.get("is_causal", False)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        )
    return change(torch.softmax(scores, dim=-1)) @ value


_LIBRARY = str(Path(torch.__file__).parent)
_STANDARD = sysconfig.get_paths()["stdlib"]


def _source() -> str:
    """Return file and line of the innermost caller that is neither torch nor this module."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        inside = name == __file__ or name.startswith(_LIBRARY)
        if not inside and not (name.startswith(_STANDARD) and "site-packages" not in name):
            parts = Path(name).parts
            start = parts.index("site-packages") + 1 if "site-packages" in parts else len(parts) - 1
            return f"{'/'.join(parts[start:])}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown"


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Run a block under the mode, with the path of the running module known."""
    registrations = []

    def leave(*_: Any) -> None:
        watch.path.pop()

    for path, module in watch.model.named_modules():
        registrations.append(module.register_forward_pre_hook(lambda *_, path=path: watch.path.append(path)))
        registrations.append(module.register_forward_hook(leave, always_call=True))
    try:
        with watch:
            yield
    finally:
        for registration in registrations:
            registration.remove()
