"""The vocabulary map between a source and the target with the options of a recipe: FUSION/maps/KEY.npz."""

from collections.abc import Iterator

from megatron_fuse import ragged
from megatron_fuse.alignment import VocabularyMap, cached_vocabulary_map, count_pairs
from megatron_fuse.chat import ChatFormat
from megatron_fuse.fusion_data.encoding import encode_ground_truth, supervised_bytes
from megatron_fuse.fusion_data.layout import TEXT, fusion_directory
from megatron_fuse.fusion_data.stored_spans import read_text_shard
from megatron_fuse.instructions import INSTRUCTIONS, example_shards
from megatron_fuse.stages import Context
from megatron_fuse.storage import sha256_of_json
from megatron_fuse.tokenization.spans import TokenSpans


def vocabulary_map_of(context: Context, name: str) -> VocabularyMap:
    """The map of one source, made once and then read from its file.

    Ranks that start together each make it, and write the same bytes. The map `ms` counts its pairs over the
    ground truth, so that it is the same for both modes.
    """
    recipe, source, target = context.recipe, context.format(name), context.target
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
        texts_sha256=sha256_of_json(_texts(context, source, target)) if statistics else "",
        pairs=(lambda: count_pairs(_aligned_shards(context, source))) if statistics else None,
    )


def _texts(context: Context, source: ChatFormat, target: ChatFormat) -> list[str]:
    """Everything that decides over which texts and tokens the pairs of `ms` are counted."""
    return [context.open(INSTRUCTIONS).sha256, context.recipe.data.supervise, source.sha256, target.sha256]


def _aligned_shards(context: Context, source: ChatFormat) -> Iterator[tuple[TokenSpans, TokenSpans]]:
    """The ground truth of every shard in the tokens of the source and of the target."""
    text = context.open(TEXT)
    for index, examples in enumerate(example_shards(context.open(INSTRUCTIONS))):
        data = supervised_bytes(context.recipe, examples)
        offsets = ragged.offsets([len(each) for each in data])[:-1]
        documents = encode_ground_truth(context.recipe, source, examples), read_text_shard(text, index)
        read, wanted = (TokenSpans.join(each.spans, offsets) for each in documents)
        yield read, wanted
