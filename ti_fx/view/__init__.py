"""Looking at a graph: networkx, SVG and a self-contained HTML page."""
