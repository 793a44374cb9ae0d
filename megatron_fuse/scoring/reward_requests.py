"""Requests for the reward of a conversation, in the forms of vLLM and of SGLang.

    vLLM     POST /classify {model, input: ids, use_activation: false}   data[0].probs [1]
             POST /pooling, the same                                     data[0].data [1] or, by token, [n][1]
    SGLang   POST /classify {model, input_ids: ids}                       embedding [1]

Without an activation a reward is the output of the head, as in process. A sigmoid would tie large rewards.
"""

import math
from collections.abc import Sequence
from typing import Any

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import RewardServerOptions
from megatron_fuse.sources.completions import read_object
from megatron_fuse.sources.request_kind import FINISHED_SHARDS, Body, Malformed, NoAnswer, Received
from megatron_fuse.text_safety import brief


class _RewardRequests:
    """What the kinds share (RequestKind)."""

    keys = ("engine", "endpoint")
    kept = FINISHED_SHARDS
    most_bytes = None
    advice = (
        "or start the server for a classifier or reward model (vLLM: --runner pooling; SGLang: "
        "--is-embedding), with room for the longest conversation"
    )

    def __init__(self, options: RewardServerOptions, where: str) -> None:
        self.options, self.where = options, where

    def without_answer(self, name: str, refusal: NoAnswer) -> float:
        raise UserError(
            f"{self.where}: no reward for example {brief(repr(name), 80)}: {refusal.reason}. Fix "
            f"{self.where}, {self.advice}."
        )


class VllmRewards(_RewardRequests):
    """Requests to vLLM."""

    @property
    def path(self) -> str:
        return f"/{self.options.endpoint}"

    def body(self, ids: Sequence[int]) -> Body:
        return {"model": self.options.model, "input": list(ids), "use_activation": False}

    def read(self, content: bytes, body: Body) -> Received[float]:
        whole = read_object(content)
        try:
            (item,) = whole["data"]
            values = item["probs" if self.options.endpoint == "classify" else "data"]
            read = (whole.get("usage") or {}).get("prompt_tokens")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Malformed(f"not an answer of vLLM's {self.path}: {error!r}") from None
        # A model with a reward per token gives a list of lists. The last token's counts, as in process.
        if isinstance(values, list) and values and isinstance(values[-1], list):
            values = values[-1]
        return Received(_reward(values, read, len(body["input"])), _name(whole.get("model")))


class SglangRewards(_RewardRequests):
    """Requests to SGLang."""

    path = "/classify"

    def body(self, ids: Sequence[int]) -> Body:
        return {"model": self.options.model, "input_ids": list(ids)}

    def read(self, content: bytes, body: Body) -> Received[float]:
        whole = read_object(content)
        try:
            values, read = whole["embedding"], (whole.get("meta_info") or {}).get("prompt_tokens")
        except (KeyError, AttributeError) as error:
            raise Malformed(f"not an answer of SGLang's /classify: {error!r}") from None
        return Received(_reward(values, read, len(body["input_ids"])))


RewardRequests = VllmRewards | SglangRewards
ENGINES: dict[str, type[RewardRequests]] = {"vllm": VllmRewards, "sglang": SglangRewards}


def _reward(values: Any, read: Any, sent: int) -> float:
    """The one reward of a list. read: the number of tokens that the server counts, if it says so."""
    if isinstance(read, int) and read != sent:
        raise Malformed(f"the server read {read} tokens, but {sent} were sent")
    if not isinstance(values, list) or len(values) != 1:
        raise Malformed(
            f"{len(values) if isinstance(values, list) else 'no'} rewards, but a reward model has 1"
        )
    (value,) = values
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Malformed(f"a reward of {brief(repr(value), 40)}")
    return float(value)


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
