"""Hugging Face model directories: finding, identifying, checking and loading them."""
