"""Language models take their keys and values as inputs and return them as outputs."""
