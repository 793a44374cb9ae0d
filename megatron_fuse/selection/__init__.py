"""Which source has the advantage on which example: rules, margins and mixtures; and the order of the examples."""
