"""The front end: an nn.Module and example inputs become a captured graph."""
