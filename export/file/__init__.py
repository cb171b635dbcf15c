"""An exported file holds packed tensors, and says of itself what it is."""
