"""Analysis measures a student against its teacher, and a model against what would be ternary in it."""

from ti_fx.analysis.divergence import Divergence, divergence
from ti_fx.analysis.layer_error import LayerError, layer_errors
from ti_fx.analysis.never_trained import untrained
from ti_fx.analysis.weights import StoredWeight, stored_weights
from ti_fx.ir.untrained import Untrained

__all__ = [
    "Divergence",
    "LayerError",
    "StoredWeight",
    "Untrained",
    "divergence",
    "layer_errors",
    "stored_weights",
    "untrained",
]
