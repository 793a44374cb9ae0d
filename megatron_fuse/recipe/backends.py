"""The words for where answers, distributions and scores come from. hf: a model in process. openai: a server. file: what the recipe names."""

RESPONSE_BACKENDS = ("hf", "openai", "file")
CAPTURE_BACKENDS = ("hf", "file")
SCORE_BACKENDS = ("hf", "file")
