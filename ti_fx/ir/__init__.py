"""The graph is edited, described, checked and rewritten by these modules, which know no single pass."""
