"""Writes tiktoken ranks as a tokenizer.json that splits text exactly as tiktoken does."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fuse.tokenization.tokenizer import Tokenizer
from megatron_fuse.tokenization.tokenizer_json import byte_level_table
from megatron_fuse.tokenization.transformers_export import wrap_backend


def as_transformers(
    tokenizer: Tokenizer, ranks: dict[bytes, int], pattern: str, special: dict[str, int]
) -> PreTrainedTokenizerFast:
    """The transformers tokenizer of tiktoken ranks. special: text -> id.

    A whole rank file takes seconds, because merges are derived from ranks.
    """
    character_of = {byte: character for character, byte in byte_level_table().items()}
    spelled = {piece: "".join([character_of[byte] for byte in piece]) for piece in ranks}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    # tiktoken looks up a whole piece before it merges anything. `ignore_merges` does the same.
    model = models.BPE({spelled[piece]: rank for piece, rank in ranks.items()}, merges, ignore_merges=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    state = json.loads(backend.to_str())
    # Special tokens may come after unused ids. Only the vocabulary
    # itself can keep such ids, so they are entered there.
    state["model"]["vocab"] |= special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state["added_tokens"] = [{"id": token, "content": text} | flags for text, token in special.items()]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    return wrap_backend(tokenizer, backend)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs that form a token, lowest rank first: the order in which tiktoken merges them."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(ranks, key=ranks.__getitem__)
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
