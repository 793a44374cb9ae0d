"""Our own captures in the forms of other programs, as files that a recipe can name."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from capture_forms import FORMS, Row
from pyarrow import parquet
from small_captures import read
from small_models import write_rows

from megatron_fuse.capture import CaptureShard
from megatron_fuse.capture.stage import conversation_of
from megatron_fuse.chat import EncodedConversation
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import INSTRUCTIONS, example_shards
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import RESPONSES, response_shards
from megatron_fuse.responses.answers import learned_of
from megatron_fuse.stages import Context

SOURCE = "beta"


def conversations(recipe: Recipe, mode: str) -> list[tuple[str, EncodedConversation | None]]:
    chat = load_format(recipe.sources[SOURCE], SOURCE)
    examples = [example for shard in example_shards(Context(recipe).open(INSTRUCTIONS)) for example in shard]
    answers = [None] * len(examples)
    if mode == "inference":
        answers = [
            answer for shard in response_shards(Context(recipe).open(RESPONSES, SOURCE)) for answer in shard
        ]
    return [
        (
            example.id,
            conversation_of(
                chat, example, answer and learned_of(answer, "template"), every_turn=mode == "training"
            ).encoded,
        )
        for example, answer in zip(examples, answers, strict=True)
    ]


def export(recipe: Recipe, form: str, mode: str = "training", *, logsumexp: bool = True) -> list[Row]:
    """Our own capture in another program's form, one row for every example that was captured."""
    rows = []
    place = [(shard, index) for shard in read(recipe, SOURCE, mode) for index in range(len(shard.status))]
    for (name, conversation), (shard, index) in zip(conversations(recipe, mode), place, strict=True):
        span = shard.rows(index)
        if conversation is None or span.start == span.stop:
            continue
        bounds = np.concatenate([[0], np.cumsum(shard.counts, dtype=np.int64)])[span.start : span.stop + 1]
        ids = [shard.entry_ids[a:b].tolist() for a, b in pairwise(bounds)]
        lse = shard.lse[span].astype(np.float64)
        logits = [shard.entry_logits[a:b].astype(np.float64) for a, b in pairwise(bounds)]
        logprobs = [(values - lse[row, 0]).tolist() for row, values in enumerate(logits)]
        own = shard.token_logprobs[span].astype(np.float64).tolist()
        sums = {
            f"{t:g}": lse[:, column].tolist() for column, t in enumerate([1.0, *recipe.capture_temperatures])
        }
        rows.append({"id": name, **FORMS[form](conversation, ids, logprobs, own, sums if logsumexp else {})})
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix != ".parquet":
        return write_rows(path, rows)
    mapping = pa.map_(pa.string(), pa.struct([("logprob", pa.float64()), ("rank", pa.int64())]))
    columns = {
        name: pa.array([row.get(name) for row in rows], mapping_type(name, mapping)) for name in rows[0]
    }
    parquet.write_table(pa.table(columns), path, row_group_size=4)
    return path


def mapping_type(name: str, mapping: pa.DataType) -> pa.DataType | None:
    if name == "prompt_logprobs":
        return pa.list_(mapping)
    return pa.map_(pa.string(), pa.list_(pa.float64())) if name == "logsumexp" else None


def with_file(recipe: Recipe, path: Path, mode: str = "training") -> Recipe:
    """The recipe with captures from a file, in a workdir of its own."""
    workdir = path.with_name(f"{path.name}.run")
    for name in ("instructions", "responses"):
        shutil.copytree(recipe.workdir / name, workdir / name)
    options = recipe.sources[SOURCE].model_copy(update={"captures": {mode: path}})
    return recipe.model_copy(update={"workdir": workdir, "sources": recipe.sources | {SOURCE: options}})


def assert_same_rows(found: list[CaptureShard], expected: list[CaptureShard]) -> None:
    for a, b in zip(found, expected, strict=True):
        for name in vars(b):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
