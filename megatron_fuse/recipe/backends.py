"""The names of the backends for answers, captures and scores.

hf: a Hugging Face model in this process. openai: a server. file: a file that the recipe names.
"""

RESPONSE_BACKENDS = ("hf", "openai", "file")
CAPTURE_BACKENDS = ("hf", "file")
SCORE_BACKENDS = ("hf", "file")
