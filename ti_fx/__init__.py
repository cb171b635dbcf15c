"""ti_fx: a compiler that rewrites a trained transformer's torch.fx graph into ternary weights in ONNX."""

__version__ = "0.1.0"

from ti_fx.layout import check_layout as _check_layout

_check_layout()

import importlib  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from ti_fx.capture import capture, capture_report  # noqa: E402
from ti_fx.feed_forward import FeedForwardSite, find_feed_forward  # noqa: E402
from ti_fx.graph import fork  # noqa: E402
from ti_fx.pipeline import Pass, Pipeline, Report  # noqa: E402
from ti_fx.recipe import Phase, Recipe  # noqa: E402
from ti_fx.sites import AttentionSite, find_attention  # noqa: E402
from ti_fx.text import diff, dump  # noqa: E402
from ti_fx.verify import verify  # noqa: E402

if TYPE_CHECKING:
    from ti_fx.train.checkpoint import load

__all__ = [
    "AttentionSite",
    "FeedForwardSite",
    "Pass",
    "Phase",
    "Pipeline",
    "Recipe",
    "Report",
    "capture",
    "capture_report",
    "diff",
    "dump",
    "find_attention",
    "find_feed_forward",
    "fork",
    "load",
    "verify",
]

_SUBPACKAGES = ("analysis", "export", "passes", "train", "view")


def __getattr__(name: str) -> Any:
    """Import what is slow to import (the training loop, ONNX, plots) when it is first used."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"ti_fx.{name}")
    if name == "load":
        return importlib.import_module("ti_fx.train.checkpoint").load
    raise AttributeError(f"module 'ti_fx' has no attribute {name!r}")
