"""The capture of one shard of examples as one safetensors file: ragged arrays on end, offsets per example."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megatron_fuse.errors import UserError
from megatron_fuse.storage import temporary_then_rename

# What became of an example. Only those of the first have rows.
STATUSES = ("captured", "too_long", "inexact", "no_response")
EXACT_STATUS = 0


@dataclass(frozen=True)
class CaptureShard:
    """n examples; r response rows of all of them; e entries; t captured temperatures beside T = 1.

    Row j of a response predicts its token j; with a supervised stop token the last row predicts that.
    """

    offsets: np.ndarray  # int64 [n + 1]: rows of an example
    status: np.ndarray  # uint8 [n]: index in STATUSES
    stop: np.ndarray  # uint8 [n]: the last row predicts the stop token
    leading: np.ndarray  # uint8 [n]: the first response token begins in the template's white space
    response_bytes: np.ndarray  # int32 [n]
    ce_sum: (
        np.ndarray
    )  # float64 [n]: nats over the response's bytes, the stop token left out; NaN where there are no rows
    ce_stop: np.ndarray  # float64 [n]: nats of the stop token; NaN where it is not supervised
    tokens: np.ndarray  # int32 [r]: what came
    starts: np.ndarray  # int32 [r]: byte offset in the response at which it begins
    token_logprobs: np.ndarray  # float32 [r]: its log p at T = 1
    lse: np.ndarray  # float32 [r, 1 + t]: log-sum-exp relative to the largest logit
    counts: np.ndarray  # uint8 [r]
    entry_ids: np.ndarray  # int32 [e]
    entry_logits: np.ndarray  # float32 [e]: relative to the largest logit

    def save(self, path: Path) -> None:
        tensors = {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}
        with temporary_then_rename(path) as temporary:
            save_file(tensors, temporary)

    def rows(self, example: int) -> slice:
        return slice(int(self.offsets[example]), int(self.offsets[example + 1]))

    def logprobs(self, column: int, temperature: float) -> np.ndarray:
        """[e] natural log of the entries' probability at the temperature whose log-sum-exp is in this column of `lse`."""
        return self.entry_logits / np.float32(temperature) - np.repeat(self.lse[:, column], self.counts)


def read_capture_shard(path: Path) -> CaptureShard:
    """Raises UserError where the file is missing, broken or holds a number that no distribution has."""
    mend = f"remove {path.parent} and run tools/capture_teacher.py again"
    try:
        shard = CaptureShard(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a capture ({error}): {mend}") from error
    for name in ("entry_logits", "lse", "token_logprobs"):
        values = getattr(shard, name)
        impossible = np.isposinf if name == "token_logprobs" else np.isinf  # what came may have had no chance
        bad = np.argwhere(np.isnan(values) | impossible(values))  # also of a shard without any row
        if len(bad):
            raise UserError(f"{path}: {name} is not finite in row {bad[0, 0]}: {mend}")
    if int(shard.counts.sum()) != len(shard.entry_ids) or int(shard.offsets[-1]) != len(shard.counts):
        raise UserError(f"{path}: counts, offsets and entries do not fit each other: {mend}")
    return shard
