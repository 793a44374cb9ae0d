"""Writes a SentencePiece BPE model as a tokenizer.json that splits text exactly as SentencePiece does."""

from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fuse.errors import UserError
from megatron_fuse.tokenization.settings import Strips
from megatron_fuse.tokenization.tokenizer import VISIBLE_SPACE, Tokenizer
from megatron_fuse.tokenization.transformers_export import wrap_backend

BPE = 2  # TrainerSpec.ModelType


def as_transformers(
    tokenizer: Tokenizer, model: Any, strips: Strips, *, legacy: bool
) -> PreTrainedTokenizerFast:
    """The transformers tokenizer of a SentencePiece model. model: the ModelProto.

    Raises UserError if the model is not BPE or normalises text.
    """
    normalizer = model.normalizer_spec
    if (
        model.trainer_spec.model_type != BPE
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
    ):
        raise UserError(
            f"{tokenizer.name}: only BPE models without normalisation can be written as tokenizer.json here. "
            "Convert this one with transformers, and name the directory with its tokenizer.json."
        )
    vocabulary = {entry.piece: token for token, entry in enumerate(model.pieces)}
    unknown = next(entry.piece for entry in model.pieces if entry.type == entry.UNKNOWN)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            _merges(model, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    to_space = [decoders.Replace(VISIBLE_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not normalizer.add_dummy_prefix:
        backend.normalizer = normalizers.Replace(" ", VISIBLE_SPACE)
    elif legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(VISIBLE_SPACE), normalizers.Replace(" ", VISIBLE_SPACE)]
        )
    else:  # unlike SentencePiece, it adds no prefix if the text already begins with a space
        backend.pre_tokenizer = pre_tokenizers.Metaspace(VISIBLE_SPACE, prepend_scheme="first", split=False)
    if normalizer.add_dummy_prefix:
        to_space.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(to_space)
    for text, token in sorted(tokenizer.added_tokens.items(), key=lambda item: item[1]):
        entry = tokenizers.AddedToken(
            text,
            special=token in tokenizer.special_ids,
            normalized=False,
            lstrip=text in strips.left,
            rstrip=text in strips.right,
        )
        backend.add_special_tokens([entry]) if entry.special else backend.add_tokens([entry])
        if backend.token_to_id(text) != token:
            raise UserError(
                f"{tokenizer.name}: token {text!r} has id {token}, but the ids before it are not all used"
            )
    return wrap_backend(tokenizer, backend, unk_token=unknown)


def _merges(model: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs that form a piece, in SentencePiece's order: best score first.

    If scores are equal (runs of spaces), SentencePiece takes the leftmost pair, so that a run grows from the
    left. To list the longer piece first has the same effect.
    """
    usable = {
        entry.piece: entry.score for entry in model.pieces if entry.type in (entry.NORMAL, entry.USER_DEFINED)
    }
    pairs = [
        (-score, -len(piece), piece[:cut], piece[cut:])
        for piece, score in usable.items()
        for cut in range(1, len(piece))
        if piece[:cut] in usable and piece[cut:] in usable
    ]
    pairs.sort(key=lambda pair: pair[:2])
    return [(left, right) for _, _, left, right in pairs]
