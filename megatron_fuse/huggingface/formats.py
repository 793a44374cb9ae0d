"""The tokenizer and chat format of a model of the recipe."""

from megatron_fuse.chat import ChatFormat, load_chat_format
from megatron_fuse.huggingface.resolving import resolve_model, trust_key
from megatron_fuse.model.config_file import end_token_ids, read_model_config
from megatron_fuse.recipe import TARGET, ModelOptions
from megatron_fuse.tokenization import load_tokenizer


def load_format(options: ModelOptions, where: str) -> ChatFormat:
    """Tokenizer and chat format of a model of the recipe. where: its key (`sources.mpt`), for errors.

    Raises UserError if the model, its tokenizer or its template is missing or damaged.
    """
    directory = resolve_model(options.model, f"{where}.model")
    # Before the library of the tokenizer reads it: errors of the library name no key.
    read_model_config(directory)
    tokenizer = load_tokenizer(
        directory, trust_remote_code=options.trust_remote_code, allowed_by=trust_key(where)
    )
    return load_chat_format(
        tokenizer,
        options.chat_template,
        options.system,
        where,
        end_token_ids(directory),
        learns=where == TARGET,
    )
