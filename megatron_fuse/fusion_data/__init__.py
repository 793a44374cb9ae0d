"""Fusion data: the examples in the target's tokens, and the rows of every source aligned to these tokens."""
