"""Which source has the advantage on which example: reward scores, votes, and losses on the ground truth."""
