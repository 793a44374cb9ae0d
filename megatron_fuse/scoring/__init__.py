"""Scores of everyone's answers: by reward models, against the ground truth, or from files."""
