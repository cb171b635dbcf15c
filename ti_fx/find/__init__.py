"""Attention, feed-forward blocks and the parts that weights play are found in a graph by data flow alone."""
