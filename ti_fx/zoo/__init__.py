"""The zoo builds a tiny model with random weights of every architecture that ``transformers`` can build."""

from ti_fx.zoo.models import Entry as Entry
from ti_fx.zoo.models import build as build
from ti_fx.zoo.models import model_types as model_types
