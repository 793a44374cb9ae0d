"""A chat with a Hugging Face model.

Answers are printed while they are generated, with control characters as escapes.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from megatron_fuse.chat import ChatFormat, load_chat_format
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.bars import without_bars
from megatron_fuse.model.config_file import end_token_ids
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.own_code import not_loadable
from megatron_fuse.text_safety import printable
from megatron_fuse.tokenization import load_tokenizer

Messages = list[dict[str, str]]


def load(directory: Path, system: str | None, trust_remote_code: bool) -> tuple[ChatFormat, Any]:
    """The chat format and the model, on the GPU if there is one. system: the system message, None for none.

    Raises UserError if the model cannot be loaded, or if its tokenizer has no chat template.
    """
    allowed_by = "--trust-remote-code"
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code, allowed_by=allowed_by)
    if tokenizer.chat_template is None:
        raise UserError(f"{directory} has no chat template. Put a chat_template.jinja beside its tokenizer.")
    WeightFiles(directory).open_all()
    message, ends = readable(system) if system else None, end_token_ids(directory)
    chat = load_chat_format(tokenizer, system=message, where=str(directory), end_ids=ends)
    try:
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                directory, local_files_only=True, dtype="auto", trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises many types for missing or damaged files
        raise not_loadable(directory, error, allowed_by=allowed_by) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return chat, model.to(device).eval()


def answer(chat: ChatFormat, model: Any, messages: Messages, generation: dict[str, Any]) -> str:
    """Prints the answer while it is generated, and returns it.

    generation: further arguments of `model.generate`.
    """
    ids = torch.tensor([chat.encode_prompt(messages)], device=model.device)
    printer = Printer(chat)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=sorted(chat.end_ids),
        pad_token_id=chat.stop_id,
        streamer=printer,
        **generation,
    )
    return printer.text.strip()


class Printer(BaseStreamer):
    """Prints the tokens of `generate`: only whole characters, and control characters as escapes."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat, self.text, self.prompt_seen = chat, "", False
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self.chat.decode_response(self.ids)
        if not text.endswith("\ufffd"):  # this character stands for one whose bytes are not complete yet
            self._show(text)

    def end(self) -> None:
        self._show(self.chat.decode_response(self.ids))
        print(flush=True)

    def _show(self, text: str) -> None:
        print(printable(text[len(self.text) :], prose=True), end="", flush=True)
        self.text = text


def readable(argument: str) -> str:
    """A text of the command line with bytes that are no UTF-8 replaced: tokenizers accept only UTF-8."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
