"""Source models: they answer prompts in process or behind a server."""
