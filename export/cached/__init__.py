"""Cached graphs read keys and values and return them, so that a file of one generates token by token."""
