"""Known tensors replace a site's context and output, in the graph and, by forward hooks, in the original module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ti_fx.find.attention import AttentionSite
from ti_fx.zoo.watch import AttentionCall

# What the whole context is replaced by: it stays the same however the heads are moved on the way to the projection.
LEVEL = 0.5


@dataclass(frozen=True)
class Replacement:
    """A change that means the same in the graph and in the original module.

    Attributes:
        node: whose value is changed in the graph.
        module: the original module whose input or output is changed. call: at which of its calls.
        point: ``context`` (the module's input) or ``output``.
    """

    node: Node
    module: nn.Module
    call: int
    point: str

    def value(self, like: Tensor) -> Tensor:
        """Return what is put in the place of a value."""
        if self.point == "context":
            return torch.full_like(like, LEVEL)
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)

    @contextmanager
    def in_module(self) -> Iterator[None]:
        """Change the original module."""
        calls = 0

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal calls
            calls += 1
            if self.point == "context" and calls - 1 == self.call:
                return (self.value(inputs[0]), *inputs[1:])
            return None

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if self.point == "output" and calls - 1 == self.call:
                return self.value(output)
            return None

        hooks = [self.module.register_forward_pre_hook(before), self.module.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def replacements(
    sites: Sequence[AttentionSite],
    calls: Sequence[AttentionCall],
    model: nn.Module,
    run: Callable[[], Any],
) -> list[Replacement]:
    """Return the changes that forward hooks can make: where the output projection is a module that does nothing else.

    Which module that is, the count of the running model says, not the graph.

    Args:
        sites: of the captured graph, before any pass.
        calls: the blocks counted in the model, in the same order.
        model: what was captured.
        run: runs the model.
    """
    modules = {call.projection: model.get_submodule(call.projection) for call in calls if call.projection}
    modules = {path: module for path, module in modules.items() if _is_linear(module)}
    called = _call_counts(modules, run)
    seen: Counter[str] = Counter()
    found = []
    for site, call in zip(sites, calls, strict=True):
        path = call.projection
        turn = seen[path]
        seen[path] += 1
        # called by something else, too: which call is this block's is not known
        if path not in modules or called[path] != sum(one.projection == path for one in calls):
            continue
        if site.output is not None:
            found.append(Replacement(site.output, modules[path], turn, "output"))
        if call.moved:
            found.append(Replacement(site.context, modules[path], turn, "context"))
    return found


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is one projection: a weight of two dimensions of its own, and no module inside."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not any(module.children())


def _call_counts(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> Counter[str]:
    """Return how often each module is called in a run."""
    counts: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, path=path: counts.update((path,)))
        for path, module in modules.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return counts
