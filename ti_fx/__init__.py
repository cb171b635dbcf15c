"""ti_fx: a compiler from trained transformers to ternary weights in ONNX, by rewriting their torch.fx graphs."""

__version__ = "0.1.0"

from ti_fx.layout import check_layout as _check_layout

_check_layout()
