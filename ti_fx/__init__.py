"""ti_fx: a compiler that rewrites a trained transformer's torch.fx graph into ternary weights in ONNX."""

__version__ = "0.1.0"

from ti_fx.layout import check_layout as _check_layout

_check_layout()

from ti_fx.capture import capture, capture_report  # noqa: E402
from ti_fx.graph import fork  # noqa: E402
from ti_fx.pipeline import Pass, Pipeline, Report  # noqa: E402
from ti_fx.sites import AttentionSite, find_attention  # noqa: E402
from ti_fx.text import diff, dump  # noqa: E402
from ti_fx.verify import verify  # noqa: E402

__all__ = [
    "AttentionSite",
    "Pass",
    "Pipeline",
    "Report",
    "capture",
    "capture_report",
    "diff",
    "dump",
    "find_attention",
    "fork",
    "verify",
]
