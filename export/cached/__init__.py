"""Language models that read and return their keys and values."""
