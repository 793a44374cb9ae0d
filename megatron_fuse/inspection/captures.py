"""How far the log-probabilities of a capture lie from those of the source's model in this process.

For captures of a server or of a file: engines round in different ways, and quantised ones differ by more.
"""

from typing import Any

import numpy as np

from megatron_fuse import ragged
from megatron_fuse.capture import CAPTURED, CAPTURES, CaptureShard, capture_shard
from megatron_fuse.capture.reading import SourceReader
from megatron_fuse.capture.stage import shard_conversations
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.instructions import INSTRUCTIONS, example_shards
from megatron_fuse.recipe.lookup import recipe_key, source_options
from megatron_fuse.responses import RESPONSES, response_shards
from megatron_fuse.stages import Context


def compare_capture(context: Context, source: str, mode: str, most: int) -> dict[str, Any]:
    """Reads captured examples again, with the source's model in this process.

    most: examples to read; the first ones. Compared are the log-probabilities at temperature 1 of the text's
    tokens, and of the entries that both rows have. Returns the differences:

    {"source", "mode", "examples", "rows", "logprobs": how many are compared, "mean", "p99", "largest": of
    |difference| in nats, "top1_differs": share of the rows with another likeliest token}

    Raises UserError if the capture is missing, if the model cannot be loaded, or if nothing is captured.
    """
    recipe = context.recipe
    artifact, examples = context.open(CAPTURES, source, mode), example_shards(context.open(INSTRUCTIONS))
    answers = response_shards(context.open(RESPONSES, source)) if mode == "inference" else None
    model = load_causal_lm(source_options(recipe, source), where=recipe_key(source))
    reader = SourceReader(recipe, source, model)
    differences: list[np.ndarray] = []
    read = rows = other_top = 0
    for index, shard_examples in enumerate(examples):
        captured = capture_shard(artifact, index)
        chosen = np.flatnonzero(captured.status == CAPTURED)[: most - read].tolist()
        given = shard_conversations(
            context, source, mode, shard_examples, answers[index] if answers else None
        )
        own = reader.capture_shard([given[i] for i in chosen])
        for place, example in enumerate(chosen):
            if own.status[place] != CAPTURED:  # the model may read less than the server
                continue
            one, other = _Rows(captured, captured.rows(example)), _Rows(own, own.rows(place))
            differences += [one.text - other.text, one.common(other)]
            rows += len(one.text)
            other_top += int((one.top != other.top).sum())
            read += 1
        if read >= most:
            break
    if not rows:
        raise UserError(f"{artifact.directory}: there is no captured example to compare.")
    distances = np.abs(np.concatenate(differences))
    return {
        "source": source,
        "mode": mode,
        "examples": read,
        "rows": rows,
        "logprobs": len(distances),
        "mean": float(distances.mean()),
        "p99": float(np.quantile(distances, 0.99)),
        "largest": float(distances.max()),
        "top1_differs": other_top / rows,
    }


class _Rows:
    """The rows of one example, at temperature 1: text [n] the log p of its tokens, top [n] the likeliest ids,
    and entries by row and id.
    """

    def __init__(self, shard: CaptureShard, rows: slice) -> None:
        counts = shard.counts[rows]
        begins = ragged.offsets(shard.counts)[rows.start : rows.stop + 1]
        entries = slice(int(begins[0]), int(begins[-1]))
        row = ragged.row_numbers(counts)
        self.text = shard.token_logprobs[rows].astype(np.float64)
        self.top = shard.entry_ids[begins[:-1]]
        self.keys = row.astype(np.int64) << 32 | shard.entry_ids[entries]
        self.logprobs = shard.entry_logits[entries].astype(np.float64) - shard.lse[rows, 0][row]

    def common(self, other: "_Rows") -> np.ndarray:
        """The differences of the entries that both have."""
        _, here, there = np.intersect1d(self.keys, other.keys, assume_unique=True, return_indices=True)
        return self.logprobs[here] - other.logprobs[there]


def format_comparison(found: dict[str, Any]) -> str:
    """The differences as text."""
    return (
        f"{found['source']} {found['mode']}: {found['examples']:,} examples, {found['rows']:,} rows, "
        f"{found['logprobs']:,} log-probabilities, captured against the model in this process\n"
        f"|difference| in nats: mean {found['mean']:.2g}, 99 % at most {found['p99']:.2g}, largest "
        f"{found['largest']:.2g}\n"
        f"another likeliest token in {100 * found['top1_differs']:.2f} % of the rows"
    )
