"""An exported file is compared with the graph that it came from."""

from ti_fx.export.compare.whole_file import all_of, check

__all__ = ["all_of", "check"]
