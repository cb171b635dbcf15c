"""A packed graph becomes a lowered one: what ONNX can say."""
