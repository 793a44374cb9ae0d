"""A report's page as a browser takes it apart."""

from collections import Counter
from html.parser import HTMLParser

_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """links: all that the page takes from elsewhere; tags: how often each occurs; text: what is shown;
    unclosed: elements that are closed in another order than they were opened, or not at all."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.text = ""
        self.unclosed = 0
        self._open: list[tuple[str, str]] = []  # tag and class
        self._texts: list[tuple[list[str], str]] = []  # the classes around it, and the text
        self.feed(content)
        self.close()
        self.unclosed += len(self._open)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")
        ]
        self.links += [
            value or "" for name, value in attributes if name == "style" and "url(" in (value or "")
        ]
        if tag not in _VOID:
            self._open.append((tag, dict(attributes).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()
        else:
            self.unclosed += 1

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.text += data
        self._texts.append(([name for _, of in self._open for name in of.split()], data))

    def text_of(self, name: str) -> str:
        """All text inside elements of this class, but for marks of what is folded."""
        return "".join(text for names, text in self._texts if name in names and "more" not in names)
