"""Analysis measures a student against its teacher, and a model against what would be ternary in it."""

from ti_fx.analysis.convergence import area_under, steps_until
from ti_fx.analysis.hessian import (
    HessianProducts,
    Spectrum,
    eigenvalues_by_example,
    spectrum,
    top_eigenvalues,
)
from ti_fx.analysis.layer_error import LayerError, layer_errors
from ti_fx.analysis.loss_surface import LossSurface, loss_surface
from ti_fx.analysis.map_ranking import MapRanking, map_ranking
from ti_fx.analysis.never_trained import untrained
from ti_fx.analysis.sensitivity import Sensitivity, sensitivity
from ti_fx.analysis.weights import StoredWeight, stored_weights
from ti_fx.ir.untrained import Untrained

__all__ = [
    "HessianProducts",
    "LayerError",
    "LossSurface",
    "MapRanking",
    "Sensitivity",
    "Spectrum",
    "StoredWeight",
    "Untrained",
    "area_under",
    "eigenvalues_by_example",
    "layer_errors",
    "loss_surface",
    "map_ranking",
    "sensitivity",
    "spectrum",
    "steps_until",
    "stored_weights",
    "top_eigenvalues",
    "untrained",
]
