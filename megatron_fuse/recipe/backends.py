"""The names of the backends for answers, captures and scores.

hf: a Hugging Face model in this process. megatron: the same model in Megatron-core, divided over several
processes. openai, server: a server. file: a file that the recipe names.
"""

RESPONSE_BACKENDS = ("hf", "openai", "file")
CAPTURE_BACKENDS = ("hf", "megatron", "server", "file")
SCORE_BACKENDS = ("hf", "server", "file")
