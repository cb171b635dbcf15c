"""What torch.export returns becomes a captured graph."""
