"""Texts before which an answer ends."""

from collections.abc import Sequence

from megatron_fuse.chat import ChatFormat


class StopTexts:
    """Finds stop texts in the bytes of an answer, after the template's white space before a response.

    A thought that the prompt opened is not searched: the answer begins after it. The stop text that is
    complete at the earliest byte ends the answer; if there are several, the longest. So the borders of tokens
    make no difference, and the kept part contains no stop text.
    """

    def __init__(self, texts: Sequence[str], chat: ChatFormat) -> None:
        self.texts = [text.encode() for text in texts]
        self.longest = max(map(len, self.texts), default=0)
        self.separator, self.spelled = chat.separator.encode(), chat.spelled
        self.thought_end = (chat.thought_end or "").encode() if chat.opens_thought else b""

    def completed_by(self, ids: Sequence[int]) -> bool:
        """Whether generated ids contain a stop text.

        The ids without the last one are known to contain none.
        """
        # A fast path. Every token has at least one byte, so the last `longest` tokens lie after the
        # template's white space and have room for every stop text.
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
        """A response's bytes before the stop text that ends it; all bytes if there is none."""
        begin = self._answer_begins(data)
        return data[:begin] + self.cut_answer(data[begin:])

    def cut_answer(self, data: bytes) -> bytes:
        """The same for an answer without its thought."""
        return data[: self._find(data)]

    def _answer_begins(self, data: bytes) -> int:
        """The number of bytes of the thought, its end tag and the white space after it.

        All bytes, if the thought has no end tag.
        """
        if not self.thought_end:
            return 0
        _, _, answer = data.partition(self.thought_end)
        return len(data) - len(answer.lstrip())

    def _find(self, data: bytes) -> int | None:
        """The beginning of the stop text that is complete first; None if there is no stop text."""
        matches = [(data.find(text) + len(text), -len(text)) for text in self.texts if text in data]
        return sum(min(matches)) if matches else None
