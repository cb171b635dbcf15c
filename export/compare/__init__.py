"""An exported file against the graph that it came from."""

from ti_fx.export.compare.whole_file import all_of, check

__all__ = ["all_of", "check"]
