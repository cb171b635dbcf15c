"""ti_fx: a compiler that rewrites a trained transformer's torch.fx graph into ternary weights in ONNX."""

__version__ = "0.1.0"

from ti_fx.layout import check_layout as _check_layout

_check_layout()
