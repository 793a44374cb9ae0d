"""What is known of a conversation's distributions, as other programs write it (docs/captures.md).

Each writer takes the conversation and, of its supervised tokens, the entries' ids and log p, the tokens' own
log p, and the log-sum-exps by temperature ({} leaves them out).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_fuse.chat import EncodedConversation

Row = dict[str, Any]


def ours(conversation: EncodedConversation, ids: list, logprobs: list, own: list, sums: dict) -> Row:
    tokens = conversation.spans.tokens.tolist()
    row = {"token_ids": tokens, "top_ids": ids, "top_logprobs": logprobs, "token_logprobs": own}
    return {**row, "logsumexp": sums} if sums else row


def spread(conversation: EncodedConversation, values: list, filler: Any, *, first: Any) -> list:
    """One item per token of the conversation: the supervised tokens' values, and something else about its
    prompt.
    """
    whole = [filler] * len(conversation.ids)
    whole[0] = first
    for place, value in zip(np.flatnonzero(conversation.supervised).tolist(), values, strict=True):
        whole[place] = value
    return whole


def distill_kit(conversation: EncodedConversation, ids: list, logprobs: list, own: list, sums: dict) -> Row:
    """A row about every token but the first, and a padding token behind the last one."""
    columns = {
        "token_ids": (ids, [3, 4]),
        "top_values": (logprobs, [-0.1, -9.0]),
        "token_logprobs": (own, -1.0),
    }
    row = {name: spread(conversation, *values, first=None)[1:] for name, values in columns.items()}
    for values in row.values():
        values.append(values[0])
    row["input_ids"] = [*conversation.ids.tolist(), 0]
    if sums:
        row["logsumexp"] = {
            t: [*spread(conversation, lse, 1.0, first=None)[1:], 1.0] for t, lse in sums.items()
        }
    return row


def vllm(conversation: EncodedConversation, ids: list, logprobs: list, own: list, sums: dict) -> Row:
    """The token itself comes first in a position's mapping, with its rank where it is not among the
    likeliest.
    """
    positions = []
    for token, names, values, logprob in zip(
        conversation.spans.tokens.tolist(), ids, logprobs, own, strict=True
    ):
        ranked = {
            name: (value, rank) for rank, (name, value) in enumerate(zip(names, values, strict=True), 1)
        }
        given = {token: ranked.get(token, (logprob, 4321))} | ranked
        positions.append(
            {
                str(name): {"logprob": value, "rank": rank, "decoded_token": "?"}
                for name, (value, rank) in given.items()
            }
        )
    # A prompt position has the conversation's own token, whichever that is.
    prompt = [
        None,
        *({str(token): {"logprob": -0.5, "rank": 1, "decoded_token": "?"}} for token in conversation.ids[1:]),
    ]
    for place, position in zip(np.flatnonzero(conversation.supervised).tolist(), positions, strict=True):
        prompt[place] = position
    row: Row = {"prompt_token_ids": conversation.ids.tolist(), "prompt_logprobs": prompt}
    return (
        {**row, "logsumexp": {t: spread(conversation, lse, 1.0, first=None) for t, lse in sums.items()}}
        if sums
        else row
    )


def openai(conversation: EncodedConversation, ids: list, logprobs: list, own: list, sums: dict) -> Row:
    top = [
        {f"token_id:{name}": value for name, value in zip(names, values, strict=True)}
        for names, values in zip(ids, logprobs, strict=True)
    ]
    given = {
        "tokens": [f"token_id:{token}" for token in conversation.ids.tolist()],
        "token_logprobs": spread(conversation, own, -1.0, first=None),
        "top_logprobs": spread(conversation, top, {"token_id:5": -0.1}, first=None),
    }
    row: Row = {"choices": [{"index": 0, "text": "?", "logprobs": given}]}
    return (
        {**row, "logsumexp": {t: spread(conversation, lse, 1.0, first=None) for t, lse in sums.items()}}
        if sums
        else row
    )


FORMS: dict[str, Callable[..., Row]] = {
    "ours": ours,
    "distill_kit": distill_kit,
    "vllm": vllm,
    "openai": openai,
}
