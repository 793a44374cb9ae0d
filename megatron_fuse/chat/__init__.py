"""Chat templates: from messages and a response to token ids, and to the bytes at which every response token ends."""

from megatron_fuse.chat.format import (
    ChatFormat,
    EncodedConversation,
    Messages,
    load_chat_format,
    may_be_learned,
    supervised_turns,
)

__all__ = ["ChatFormat", "EncodedConversation", "Messages", "load_chat_format", "may_be_learned", "supervised_turns"]
