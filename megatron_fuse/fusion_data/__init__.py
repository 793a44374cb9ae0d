"""Fusion data: the examples in the target's tokens, and every source's rows aligned to them once."""
