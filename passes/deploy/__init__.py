"""A prepared graph becomes a packed one: the student alone, its ternary weights as codes."""
