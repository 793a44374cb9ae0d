"""Captures without a model: real texts, real tokenizers, drawn distributions. For benchmarks of what comes
after capture.

    recipe = synthetic_run(directory, target_tokenizer, {"mpt": source_tokenizer}, instructions,
    examples=1500) build_fusion_data(recipe)

Instructions, tokens and byte offsets are what the stages make of the given files. Synthetic are the rows
alone: of a row's entries one is the token that came (where its drawn rank is among them), the others are
drawn by how often the source's tokens occur in the texts; how many a row keeps is drawn so that the mean is
MEAN_KEPT of 10. A model directory holds a tokenizer and a stand-in for weights, which nothing after capture
reads.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from megatron_fuse.capture import CAPTURED, CAPTURES, CaptureShard, Conversation, SparseRows
from megatron_fuse.capture.stage import conversation_of
from megatron_fuse.chat import ChatFormat
from megatron_fuse.instructions import INSTRUCTIONS, example_shards, prepare_instructions
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.stages import Context
from megatron_fuse.storage import run_plan

# Entries kept of 10 on average: what real text gives under each rule (about 6 and about 8), and without
# truncation.
MEAN_KEPT = {"full_vocabulary": 6.0, "hugging_face": 8.0, "none": 10.0}
TEMPLATE = "vicuna_v1.1"
_TAIL_TOKENS = 100  # the mass that is not kept lies on so many tokens evenly
_KEPT_MASS = 0.95, 0.999  # at T = 1, drawn evenly between the two


def synthetic_run(
    directory: Path,
    target_tokenizer: Path,
    source_tokenizers: Mapping[str, Path],
    instructions: Path,
    *,
    examples: int = 1500,
    rule: str = "full_vocabulary",
    shard_size: int = 512,
    seed: int = 1234,
) -> Recipe:
    """Prepares instructions and writes a capture of the training mode for every source; returns the recipe.

    rule: a key of MEAN_KEPT, what `capture.filter` and `capture.top_p` are set to. The tokenizers are
    directories or files that `load_tokenizer` reads. What comes after `build_fusion_data` has the usual names
    under directory/run.
    """
    filtered = {"top_p": 1.0} if rule == "none" else {"filter": rule}
    names = {"target": target_tokenizer, **source_tokenizers}
    models = {name: _model_directory(directory / "models" / name, path) for name, path in names.items()}
    options = {name: {"model": str(path), "chat_template": TEMPLATE} for name, path in models.items()}
    recipe = make_recipe(
        {
            "workdir": str(directory / "run"),
            "seed": seed,
            "target": options.pop("target"),
            "sources": options,
            "data": {"path": str(instructions), "samples": examples, "shard_size": shard_size},
            "capture": filtered,
            "schedule": {"preset": "fuse"},
        }
    )
    prepare_instructions(Context(recipe))
    for place, source in enumerate(recipe.sources):
        _write_capture(Context(recipe), source, MEAN_KEPT[rule], np.random.default_rng([seed, place]))
    return recipe


def _model_directory(directory: Path, tokenizer: Path) -> Path:
    """What names a model in a recipe, with this tokenizer and without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in tokenizer.iterdir() if tokenizer.is_dir() else [tokenizer]:
        shutil.copyfile(path, directory / path.name)
    whole = directory / "tokenizer.json"
    settings = directory / "tokenizer_config.json"
    if whole.exists() and not settings.exists():  # the file alone does not say which token ends a text
        special = next(
            token["content"] for token in json.loads(whole.read_text())["added_tokens"] if token["special"]
        )
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special}))
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text("{}")
    save_file({"none": np.zeros(1, np.float32)}, directory / "model.safetensors")
    return directory


def _write_capture(context: Context, source: str, mean_kept: float, draw: np.random.Generator) -> None:
    recipe, chat = context.recipe, context.format(source)
    shards = example_shards(context.open(INSTRUCTIONS))
    every_turn = recipe.data.supervise == "every_turn"

    def conversations_of(index: int) -> list[Conversation]:
        return [conversation_of(chat, example, None, every_turn=every_turn) for example in shards[index]]

    # One shard says enough about a text's common tokens.
    frequent = np.unique(_labels(conversations_of(0)), return_counts=True)

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        conversations = conversations_of(index)
        rows = _draw_rows(_labels(conversations), recipe, chat, mean_kept, frequent, draw)
        shard = CaptureShard.of(conversations, np.full(len(conversations), CAPTURED), rows)
        shard.save(prefix.with_name(prefix.name + ".safetensors"))
        return {"examples": len(conversations), "rows": len(shard.counts), "entries": len(shard.entry_ids)}

    run_plan(context.plan(CAPTURES, source, "training"), make_shard)


def _labels(conversations: list[Conversation]) -> np.ndarray:
    return np.concatenate([conversation.encoded.spans.tokens for conversation in conversations])


def _draw_rows(
    tokens: np.ndarray,
    recipe: Recipe,
    chat: ChatFormat,
    mean_kept: float,
    frequent: tuple[np.ndarray, np.ndarray],
    draw: np.random.Generator,
) -> SparseRows:
    """tokens [r]: what came; frequent: (ids, occurrences) of the source's tokens in the texts."""
    top_k = recipe.capture.top_k
    places = np.arange(top_k)
    counts = draw.choice(1 + places, len(tokens), p=_with_mean(top_k, mean_kept))
    kept = places < counts[:, None]  # [r, k]
    # Of the token that came, from 0; where the row keeps no more than so many entries it is not among them.
    rank = draw.geometric(0.5, len(tokens)) - 1
    ids = np.where(places == rank[:, None], tokens[:, None], _distinct(tokens, top_k, frequent, draw))

    gaps = draw.exponential(0.7, (len(tokens), top_k))
    gaps[:, 0] = 0
    logits = -np.cumsum(gaps, axis=1)  # relative to the largest
    mass = draw.uniform(*_KEPT_MASS, len(tokens))
    tail_logit = np.log((np.exp(logits) * kept).sum(1) * (1 - mass) / mass / _TAIL_TOKENS)
    lse = [
        np.log((np.exp(logits / t) * kept).sum(1) + _TAIL_TOKENS * np.exp(tail_logit / t))
        for t in (1.0, *recipe.capture_temperatures)
    ]
    came = np.where(rank < counts, logits[np.arange(len(tokens)), np.minimum(rank, top_k - 1)], tail_logit)
    return SparseRows(
        counts=counts.astype(np.uint8),
        ids=ids[kept].astype(np.int32),
        logits=logits[kept].astype(np.float32),
        lse=np.stack(lse, axis=1).astype(np.float32),
        token_logprobs=(came - lse[0]).astype(np.float32),
        vocab_size=chat.tokenizer.vocab_size,
    )


def _with_mean(top_k: int, mean: float) -> np.ndarray:
    """The distribution over 1 ... top_k of largest entropy that has this mean: p(c) ~ exp(c x), x by
    bisection.
    """
    counts = 1 + np.arange(top_k)
    low, high = -50.0, 50.0
    for _ in range(60):
        x = (low + high) / 2
        weights = np.exp(x * counts - max(x, x * top_k))
        weights /= weights.sum()
        low, high = (x, high) if weights @ counts < mean else (low, x)
    return weights


def _distinct(
    tokens: np.ndarray, top_k: int, frequent: tuple[np.ndarray, np.ndarray], draw: np.random.Generator
) -> np.ndarray:
    """int32 [r, top_k]: ids by their frequency, in one row all different and none the token that came."""
    ids, occurrences = frequent
    bounds = np.cumsum(occurrences / occurrences.sum())

    def some(size: int | tuple[int, ...]) -> np.ndarray:
        return ids[np.minimum(np.searchsorted(bounds, draw.random(size)), len(ids) - 1)]

    drawn = np.concatenate([tokens[:, None], some((len(tokens), top_k))], axis=1)
    while True:
        order = np.argsort(drawn, axis=1, kind="stable")
        repeated = np.diff(np.take_along_axis(drawn, order, 1), axis=1) == 0
        rows, places = np.nonzero(repeated)
        if not len(rows):
            return drawn[:, 1:].astype(np.int32)
        drawn[rows, order[rows, places + 1]] = some(len(rows))  # the stable order has the first column first
