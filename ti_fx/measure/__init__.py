"""Exported files are timed on this machine, their memory is measured, and an encoding is chosen by that."""

from ti_fx.measure.bench import Bench, bench
from ti_fx.measure.choose import Choice, choose_encoding, resolve

__all__ = ["Bench", "Choice", "bench", "choose_encoding", "resolve"]
