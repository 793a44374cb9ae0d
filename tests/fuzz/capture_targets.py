"""Captures: those made elsewhere, in every form, and the shards that our own stage wrote."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from campaign import FuzzTarget
from capture_forms import FORMS
from data_targets import chat_format, examples, shared
from pyarrow import parquet
from small_models import small_recipe, write_rows

from megatron_fuse.capture.imported import CaptureFile
from megatron_fuse.capture.shards import Conversation, read_capture_shard
from megatron_fuse.capture.stage import conversation_of
from megatron_fuse.recipe import Recipe

_TOP = 5


@cache
def _conversations() -> list[Conversation]:
    return [conversation_of(chat_format(), example, None, every_turn=True) for example in examples()]


def _rows(form: str) -> list[dict[str, Any]]:
    """Of drawn logits over the whole vocabulary."""
    random = np.random.default_rng(3)
    rows = []
    for conversation in _conversations():
        tokens = conversation.encoded.spans.tokens
        logits = random.normal(0, 3, (len(tokens), chat_format().tokenizer.vocab_size))
        logits -= logits.max(1, keepdims=True)
        lse = {temperature: np.log(np.exp(logits / temperature).sum(1)) for temperature in (1.0, 2.0)}
        logprobs = logits - lse[1.0][:, None]
        ids = np.argsort(-logprobs, 1)[:, :_TOP]
        content = FORMS[form](
            conversation.encoded,
            ids.tolist(),
            np.take_along_axis(logprobs, ids, 1).tolist(),
            logprobs[np.arange(len(tokens)), tokens].tolist(),
            {f"{temperature:g}": values.tolist() for temperature, values in lse.items()},
        )
        rows.append({"id": conversation.example, **content})
    return rows


@cache
def _recipe() -> Recipe:
    return small_recipe(Path("run"), Path("data.jsonl"), shared(), {"s": shared()})


def _read(path: Path) -> None:
    tokenizer = chat_format().tokenizer
    shard = CaptureFile(_recipe(), path, tokenizer, tokenizer.vocab_size).capture_shard(_conversations())
    # What comes in is what our own reader takes.
    shard.save(path.parent / "out/shard.safetensors")
    read_capture_shard(path.parent / "out/shard.safetensors")


def _captures(form: str) -> FuzzTarget:
    return FuzzTarget(
        f"captures-{form}",
        lambda directory: write_rows(directory / "captures.jsonl", _rows(form)),
        lambda directory: _read(directory / "captures.jsonl"),
    )


def _save_parquet(directory: Path) -> None:
    table = pyarrow.Table.from_pylist(_rows("ours"))
    parquet.write_table(table, directory / "captures.parquet", row_group_size=3)


def _save_shard(directory: Path) -> None:
    given = write_rows(directory / "captures.jsonl", _rows("ours"))
    _read(given)
    given.unlink()
    (directory / "out/shard.safetensors").rename(directory / "shard.safetensors")
    (directory / "out").rmdir()


def _use_shard(directory: Path) -> None:
    shard = read_capture_shard(directory / "shard.safetensors")
    for example in range(len(shard.status)):
        shard.spans(example)
    _ = shard.response_tokens, shard.logprobs(0, 1.0)


def _reader(name: str) -> Callable[[Path], None]:
    return lambda directory: _read(directory / name)


TARGETS = [
    *(_captures(form) for form in FORMS),
    FuzzTarget("captures-parquet", _save_parquet, _reader("captures.parquet")),
    FuzzTarget("capture-shard", _save_shard, _use_shard),
]
