"""Chat formats turn messages and a response into token ids, and say which bytes each token covers."""

from megatron_fuse.chat.encoding import EncodedConversation
from megatron_fuse.chat.format import ChatFormat
from megatron_fuse.chat.loading import load_chat_format
from megatron_fuse.chat.turns import Messages, may_be_learned, supervised_turns

__all__ = [
    "ChatFormat",
    "EncodedConversation",
    "Messages",
    "load_chat_format",
    "may_be_learned",
    "supervised_turns",
]
