"""Texts before which an answer ends."""

from collections.abc import Sequence

from megatron_fuse.chat import ChatFormat


class StopTexts:
    """They are sought in the answer's bytes, behind the white space that the template itself puts before a response.

    A thought that the prompt opened is not searched: the answer begins behind it.
    The text that is whole at the earliest byte ends the answer; of several, the longest. Where tokens cut the answer makes no
    difference then, and what is kept holds no stop text.
    """

    def __init__(self, texts: Sequence[str], chat: ChatFormat) -> None:
        self.texts = [text.encode() for text in texts]
        self.longest = max(map(len, self.texts), default=0)
        self.separator, self.spelled = chat.separator.encode(), chat.spelled
        self.thought_end = (chat.thought_end or "").encode() if chat.opens_thought else b""

    def completed_by(self, ids: Sequence[int]) -> bool:
        """Whether generated ids hold a stop text, of which it is known that all but the last of them hold none."""
        # Every token has a byte at least: so many lie behind the template's white space, and have room for every stop text.
        if len(ids) > self.longest + len(self.separator):
            if self._find(self.spelled(ids[-self.longest :])) is None:
                return False
            if not self.thought_end:
                return True
        data = self.spelled(ids)
        if self.separator.startswith(data):
            return False
        data = data.removeprefix(self.separator)
        return self._find(data[self._answer_begins(data) :]) is not None

    def cut(self, data: bytes) -> bytes:
        """A response's bytes before the stop text that ends it; all of them where there is none."""
        begin = self._answer_begins(data)
        return data[:begin] + self.cut_answer(data[begin:])

    def cut_answer(self, data: bytes) -> bytes:
        """As cut, of an answer without its thought."""
        return data[: self._find(data)]

    def _answer_begins(self, data: bytes) -> int:
        """Number of bytes of the thought, its end and the white space behind it; all of them where it has no end."""
        if not self.thought_end:
            return 0
        _, _, answer = data.partition(self.thought_end)
        return len(data) - len(answer.lstrip())

    def _find(self, data: bytes) -> int | None:
        """Where the stop text begins that is whole first."""
        found = [(data.find(text) + len(text), -len(text)) for text in self.texts if text in data]
        return sum(min(found)) if found else None
