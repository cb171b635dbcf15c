"""The passes: one rewrite of the graph a file, the file named after the pass."""

if __name__ != "ti_fx.passes":
    raise ImportError(f"import ti_fx.passes, not {__name__}: this would make a second copy of every pass")
