"""Random tiny transformers go through the whole chain and are compared with themselves (``python -m fuzz --help``)."""
