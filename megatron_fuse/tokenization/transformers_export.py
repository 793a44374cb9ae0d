"""The last step of every tokenizer.json that is written here: BOS, named special tokens and chat template."""

import tokenizers
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from megatron_fuse.tokenization.tokenizer import Tokenizer


def wrap_backend(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, **named: str
) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around `backend`, which has the ids of `tokenizer`.

    named: special tokens that only the backend knows.
    """
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    texts = {name: tokenizer.token_text(token) for name, token in ids.items() if token is not None}
    named |= {name: text for name, text in texts.items() if text is not None}
    if tokenizer.adds_bos:
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **named,
    )
