"""The vocabulary map between a source and the target, as a recipe wants it: FUSION/maps/KEY.npz."""

from collections.abc import Iterator

import numpy as np

from megatron_fuse.alignment import VocabularyMap, cached_vocabulary_map, count_pairs
from megatron_fuse.chat import ChatFormat
from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.fusion_data.text import encode_ground_truth, supervised_bytes
from megatron_fuse.instructions import example_shards, open_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.storage import sha256_of_json
from megatron_fuse.tokenization.spans import TokenSpans


def vocabulary_map_of(recipe: Recipe, source: ChatFormat, target: ChatFormat) -> VocabularyMap:
    """The map of one source, made once (ranks that start together make it at the same time and agree on the bytes).

    `ms` counts its pairs over the ground truth, the same for both modes.
    """
    statistics = recipe.alignment.vocabulary_map == "ms"
    return cached_vocabulary_map(
        fusion_directory(recipe) / "maps",
        source.tokenizer,
        target.tokenizer,
        source_stop=source.stop_id,
        target_stop=target.stop_id,
        kind=recipe.alignment.vocabulary_map,
        source_separator=source.separator,
        target_separator=target.separator,
        remainders=recipe.alignment.unmatched == "condition",
        texts_sha256=sha256_of_json(_texts(recipe, source, target)) if statistics else "",
        pairs=(lambda: count_pairs(_aligned_shards(recipe, source, target))) if statistics else None,
    )


def _texts(recipe: Recipe, source: ChatFormat, target: ChatFormat) -> list[str]:
    """What the pairs of `ms` are counted over."""
    return [open_instructions(recipe).sha256, recipe.data.supervise, source.sha256, target.sha256]


def _aligned_shards(recipe: Recipe, *formats: ChatFormat) -> Iterator[tuple[TokenSpans, ...]]:
    """The ground truth of every shard in the tokens of each format."""
    for examples in example_shards(open_instructions(recipe)):
        data = supervised_bytes(recipe, examples)
        offsets = np.cumsum([0, *map(len, data)])[:-1]
        yield tuple(TokenSpans.join(encode_ground_truth(recipe, chat, examples).spans, offsets) for chat in formats)
