"""Source models: what answers, and whose distributions are captured."""
