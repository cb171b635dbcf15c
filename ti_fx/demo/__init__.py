"""The demo takes a real model and real data from full precision to a packed ternary ONNX file."""
