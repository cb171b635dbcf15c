"""Time and memory of exported files on this machine, and the encoding that they speak for."""

from ti_fx.measure.bench import Bench, bench
from ti_fx.measure.choose import Choice, choose_encoding, resolve

__all__ = ["Bench", "Choice", "bench", "choose_encoding", "resolve"]
