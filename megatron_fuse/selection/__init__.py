"""The choice of a source for each example, by rules, margins and mixtures, and the order of the examples."""
