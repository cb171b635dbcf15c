"""Exported files run in ONNX Runtime: as sessions, in ``generate`` and in pipelines."""
