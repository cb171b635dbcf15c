"""Example inputs are made for a model from its forward's signature and its configuration."""

from ti_fx.example_inputs.make import example_inputs
from ti_fx.example_inputs.request import Sizes

__all__ = ["Sizes", "example_inputs"]
