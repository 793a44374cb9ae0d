"""Scores of the models' answers: by reward models, against the ground truth, or from files."""
