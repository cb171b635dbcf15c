"""What a graph is made of, found by data flow alone: attention, feed-forward blocks, and what each weight is."""
