"""The back end: a packed graph becomes an ONNX file, checked to run in ONNX Runtime as it does in PyTorch."""

if __name__ != "ti_fx.export":
    raise ImportError(f"import ti_fx.export, not {__name__}: this would make a second copy of its classes")
