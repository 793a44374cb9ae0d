"""Requests for the log-probabilities of a prompt, in the forms of vLLM and of SGLang.

    vLLM     POST /v1/completions {model, prompt: ids, prompt_logprobs: k, ...}
             choices[0].prompt_token_ids [n], choices[0].prompt_logprobs [n] (see forms.py)
    SGLang   POST /generate {input_ids, return_logprob, top_logprobs_num: k, logprob_start_len: s, ...}
             meta_info.input_token_logprobs [n - s] of [log p, id, text]; the first log p is null
             meta_info.input_top_logprobs [n - s] of lists of the same; the first is null

Both are asked for one token more than the prompt, which is dropped, and for temperature 1, so that an engine
that scales its log-probabilities gives the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from megatron_fuse.capture.forms import BadRowError, GivenRows, given_rows
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe, ServerOptions
from megatron_fuse.sources.request_kind import FINISHED_SHARDS, Body, Malformed, NoAnswer, Received
from megatron_fuse.storage.records import first_problem
from megatron_fuse.text_safety import brief

_ENTRY_BYTES = 192  # of one entry as JSON, without the bytes of its token
_ESCAPED = 6  # bytes of a token's byte as JSON, such as \u000a


@dataclass(frozen=True)
class ServedRows:
    """What a server says of a prompt. texts [n]: how it spells the tokens, None if it does not."""

    rows: GivenRows
    texts: Sequence[str | None]


class _PromptLogprobs:
    """What the two kinds of requests share (RequestKind)."""

    keys = ("engine",)
    kept = FINISHED_SHARDS
    start: ClassVar[str]  # the engine's options that give enough entries of long enough conversations

    def __init__(self, recipe: Recipe, where: str, server: ServerOptions, k: int, longest_token: int) -> None:
        """k: entries of a row. longest_token: bytes of the model's longest token."""
        self.where, self.model, self.k = where, server.model, k
        self.context = recipe.training.seq_length + 2  # the predicted token, and the one that is dropped
        self.most_bytes = self.context * (k + 1) * (_ENTRY_BYTES + _ESCAPED * longest_token) + (1 << 20)

    def without_answer(self, name: str, refusal: NoAnswer) -> ServedRows:
        raise UserError(
            f"{self.where}: no distributions of example {brief(repr(name), 80)}: {refusal.reason}. Fix "
            f"{self.where}, {self.advice}."
        )

    @property
    def advice(self) -> str:
        start = self.start.format(k=self.k, context=self.context)
        return f"or start {start}, or lower capture.top_k or training.seq_length"


class VllmPromptLogprobs(_PromptLogprobs):
    """Requests to vLLM."""

    path = "completions"
    start = "vLLM with --max-logprobs {k} and --max-model-len {context}"

    def body(self, ids: Sequence[int], first: int, *, texts: bool) -> Body:
        """A request for the distributions of the tokens from index `first` on.

        vLLM gives all of the prompt, with texts.
        """
        return {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": self.k,
            "return_token_ids": True,
        }

    def read(self, content: bytes, body: Body) -> Received[ServedRows]:
        try:
            whole: Any = from_json(content)
            (choice,) = whole["choices"]
            positions, model = choice["prompt_logprobs"], whole.get("model")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Malformed(f"not a completion with prompt_logprobs: {error!r}") from None
        if positions is None or choice.get("prompt_token_ids") is None:
            raise Malformed("no prompt_logprobs or no prompt_token_ids: not a vLLM, or one before 0.10.2")
        try:
            rows = given_rows(choice)
        except BadRowError as error:
            raise Malformed(str(error)) from None
        texts = [
            position[str(token)].get("decoded_token") if position else None
            for token, position in zip(rows.tokens, positions, strict=True)
        ]
        return Received(ServedRows(rows, texts), model if isinstance(model, str) and model else None)


# [log p, id, text]
_Item = tuple[float | None, int, str | None]


class _MetaInfo(BaseModel):
    model_config = ConfigDict(strict=True)

    input_token_logprobs: list[_Item]
    input_top_logprobs: list[list[_Item] | None]


class _Generated(BaseModel):
    model_config = ConfigDict(strict=True)

    meta_info: _MetaInfo


class SglangPromptLogprobs(_PromptLogprobs):
    """Requests to SGLang."""

    path = "/generate"
    start = "SGLang with --context-length {context}"

    def body(self, ids: Sequence[int], first: int, *, texts: bool) -> Body:
        """A request for the distributions of the tokens from index `first` on, `first` > 0."""
        return {
            "input_ids": list(ids),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": first - 1,  # the first item has no distribution
            "top_logprobs_num": self.k,
            "return_text_in_logprobs": texts,
        }

    def read(self, content: bytes, body: Body) -> Received[ServedRows]:
        try:
            given = _Generated.model_validate_json(content).meta_info
        except ValidationError as error:
            raise Malformed(f"not an answer of SGLang's /generate: {first_problem(error)}") from None
        items, tops = given.input_token_logprobs, given.input_top_logprobs
        if len(tops) != len(items):
            raise Malformed(f"{len(tops)} input_top_logprobs, but {len(items)} input_token_logprobs")
        nulls = [i for i, (logprob, *_) in enumerate(items) if logprob is None and i]
        nulls += [i for i, top in enumerate(tops) for logprob, *_ in top or () if logprob is None]
        if nulls:
            raise Malformed(f"item {nulls[0]} has a log-probability of null")
        # The tokens before the first item are those that were sent.
        unread = body["logprob_start_len"]
        rows = GivenRows(
            tokens=[*body["input_ids"][:unread], *(token for _, token, _ in items)],
            whole=True,
            ids=[[]] * unread + [[token for _, token, _ in top or ()] for top in tops],
            logprobs=[[]] * unread + [[p for p, *_ in top or () if p is not None] for top in tops],
            token_logprobs=[None] * unread + [logprob for logprob, *_ in items],
            logsumexp={},
        )
        return Received(ServedRows(rows, [None] * unread + [text for *_, text in items]))


PromptLogprobs = VllmPromptLogprobs | SglangPromptLogprobs
ENGINES: dict[str, type[PromptLogprobs]] = {"vllm": VllmPromptLogprobs, "sglang": SglangPromptLogprobs}
