"""Random tiny transformers go through the whole chain and are compared with themselves; see ``python -m fuzz --help``."""
