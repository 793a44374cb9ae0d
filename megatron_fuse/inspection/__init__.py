"""Views of one example or one chat template, as text or as JSON."""
