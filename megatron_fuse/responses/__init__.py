"""The answers of every model: sampled in process, requested from a server, or read from a file."""

from megatron_fuse.responses.answers import Answerer, Response
from megatron_fuse.responses.sampled import answer_text
from megatron_fuse.responses.stage import RESPONSES, backend_of, generate_responses, response_shards

__all__ = [
    "RESPONSES",
    "Answerer",
    "Response",
    "answer_text",
    "backend_of",
    "generate_responses",
    "response_shards",
]
