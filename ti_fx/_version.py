"""The version, which importing anything else is not needed to read."""

__version__ = "0.1.0"
