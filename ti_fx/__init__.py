"""ti_fx: a compiler that rewrites a trained transformer's torch.fx graph into ternary weights in ONNX."""

from ti_fx._checkout import check_checkout as _check_checkout
from ti_fx._version import __version__

_check_checkout()

import importlib  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from ti_fx.find.attention import AttentionSite, find_attention
    from ti_fx.find.feed_forward import FeedForwardSite, find_feed_forward
    from ti_fx.frontend.capture import capture, capture_report
    from ti_fx.ir.edit import fork
    from ti_fx.ir.pipeline import Pass, Pipeline, Report
    from ti_fx.ir.roles import stands_for
    from ti_fx.ir.stages import verify
    from ti_fx.ir.text import diff, dump
    from ti_fx.recipe import Phase, Recipe
    from ti_fx.train.checkpoint import load

__all__ = [
    "AttentionSite",
    "FeedForwardSite",
    "Pass",
    "Phase",
    "Pipeline",
    "Recipe",
    "Report",
    "__version__",
    "capture",
    "capture_report",
    "diff",
    "dump",
    "find_attention",
    "find_feed_forward",
    "fork",
    "load",
    "stands_for",
    "verify",
]

# Where each public name is defined. Torch and transformers take seconds to import, so each is imported when first used.
_HOMES = {
    "AttentionSite": "find.attention",
    "FeedForwardSite": "find.feed_forward",
    "Pass": "ir.pipeline",
    "Phase": "recipe",
    "Pipeline": "ir.pipeline",
    "Recipe": "recipe",
    "Report": "ir.pipeline",
    "capture": "frontend.capture",
    "capture_report": "frontend.capture",
    "diff": "ir.text",
    "dump": "ir.text",
    "find_attention": "find.attention",
    "find_feed_forward": "find.feed_forward",
    "fork": "ir.edit",
    "load": "train.checkpoint",
    "stands_for": "ir.roles",
    "verify": "ir.stages",
}
_SUBPACKAGES = ("analysis", "example_inputs", "export", "measure", "numerics", "passes", "train", "view")


def __getattr__(name: str) -> Any:
    """Import a public name or a subpackage when it is first used."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"ti_fx.{name}")
    if name in ("Pass", "Pipeline"):
        importlib.import_module("ti_fx.passes")  # so that their names are known in texts
    if name in _HOMES:
        value = getattr(importlib.import_module(f"ti_fx.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ti_fx' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names and subpackages, too, which are imported when first used."""
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
