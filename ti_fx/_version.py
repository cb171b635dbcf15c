"""This file holds the version, so that reading it imports nothing else."""

__version__ = "0.1.0"
