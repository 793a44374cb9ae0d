"""One example, or one chat template, as a person or a program can read it."""
