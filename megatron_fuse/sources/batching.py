"""Divides sequences into batches for forward passes."""

from collections.abc import Sequence


def token_budget_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences by falling length, in batches of at most batch_tokens padded tokens.

    A longer sequence is a batch alone. The longest sequences come first, so that a budget that is too large
    for the memory fails at once.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if room < 1:
            batches.append([])
            room = max(batch_tokens // lengths[index], 1)
        batches[-1].append(index)
        room -= 1
    return batches
