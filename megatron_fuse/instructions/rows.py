"""Makes examples of the rows of a file. Rows that cannot be used are listed by line, kind and reason."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_fuse.chat import may_be_learned
from megatron_fuse.instructions.bad_rows import BadRow, Kind
from megatron_fuse.instructions.examples import Example, Message
from megatron_fuse.instructions.forms import FORMS, Form, detect_form
from megatron_fuse.instructions.row_texts import Row, characters
from megatron_fuse.instructions.tables import read_table
from megatron_fuse.instructions.turns import Turns
from megatron_fuse.storage import sha256_of_json
from megatron_fuse.storage.records import quoted
from megatron_fuse.storage.rows import as_id


class _Read(NamedTuple):
    example: Example
    has_own_id: bool
    began_with_answer: bool


def _read(row: Row, form: Form, every_turn: bool) -> _Read:
    said = form.read(row)
    given = row.get("id")
    # Without an id of its own, a row is named by its content, so that
    # the name stays if rows are added, removed or sorted.
    content = [said.system, said.turns, *([said.tools] if said.tools else [])]
    name = sha256_of_json(content)[:16] if given is None else _own_id(given)
    *messages, response = _learned(said, every_turn)
    if not response["content"].strip():
        raise BadRow(Kind.EMPTY, "the response is empty")
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        raise BadRow(Kind.EMPTY, "the prompt is empty")
    category = row.get("category")
    category = characters(category, "category") if isinstance(category, str) and category else None
    thought = response.get("reasoning_content")
    example = Example(
        name,
        said.system or None,
        messages,
        response["content"],
        category=category,
        reasoning=thought,
        tools=said.tools,
    )
    return _Read(example, given is not None, said.began_with_answer)


def _own_id(given: Any) -> str:
    name = as_id(given)
    if name is None:
        raise BadRow(Kind.BAD_ID, f"id is {quoted(given)}, but must be text or a whole number")
    return characters(name, "id")


def _learned(said: Turns, every_turn: bool) -> list[Message]:
    """The turns up to the last one that is learned.

    If only the last turn is learned, it must not be masked.
    """
    turns = said.turns
    if every_turn:
        while turns and not may_be_learned(turns[-1]):  # turns after the last label teach nothing
            turns = turns[:-1]
        if not turns:
            raise BadRow(Kind.MASKED, "every assistant turn is masked")
    elif "supervised" in turns[-1]:
        raise BadRow(Kind.MASKED, "the last assistant turn is masked")
    return turns


@dataclass(frozen=True)
class Rows:
    """The rows of a file that can be used. Their texts stay in the file."""

    path: Path
    form: str
    lines: dict[str, int]  # id -> line (row, if the file is a table or an array), in the file's order
    bad: list[dict[str, Any]]  # {line, kind, reason}, by line
    began_with_answer: int  # usable rows in which an assistant turn before the first question was left out
    every_turn: bool
    clean: Callable[[Example], Example] | None

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, ids: Collection[str] | None = None) -> Iterator[Example]:
        """The examples of all usable rows, or of the rows with these ids, in the file's order."""
        lines = {self.lines[name] for name in (self.lines if ids is None else ids)}
        for line, row in read_table(self.path):
            if line in lines:
                example = _read(row, FORMS[self.form], self.every_turn).example
                yield self.clean(example) if self.clean else example


def read_rows(
    path: Path,
    form: str = "auto",
    *,
    every_turn: bool = True,
    clean: Callable[[Example], Example] | None = None,
) -> Rows:
    """Checks the rows (see tables.py) in Alpaca, ShareGPT, messages or Orca form.

    `auto` takes the form of the first row.

    every_turn: all assistant turns without a mask are learned, else only the last one. clean: `Rows.read`
    applies it to each example. Ids that are made from content use the row as it is in the file, before
    `clean`. docs/data.md says which rows are listed as bad. If several rows have the same id but different
    contents, all of them are listed: other files that name this id could mean any of them.
    Raises UserError for a line that is not a JSON object, and for a file without rows of a known form.
    """
    known = detect_form(path) if form == "auto" else FORMS[form]
    bad: list[dict[str, Any]] = []
    lines: dict[str, int] = {}
    repeated: dict[str, list[int]] = {}  # id that the file gives -> lines after the first with this id
    openings = set[int]()  # lines that begin with an answer
    for line, row in read_table(path):
        try:
            example, has_own_id, began_with_answer = _read(row, known, every_turn)
            first = lines.setdefault(example.id, line)
            if first != line:
                if has_own_id:
                    repeated.setdefault(example.id, []).append(line)
                    continue
                raise BadRow(Kind.COPY, f"the same as line {first}")
        except BadRow as error:
            bad.append(_listed(line, error))
            continue
        if began_with_answer:
            openings.add(line)
    # Rows that share an id are compared in a second pass, so that no texts are kept during the first one.
    if repeated:
        for name, line, reason in _compare(path, known, every_turn, lines, repeated):
            bad.append(_listed(line, reason))
            if lines.get(name) == line:
                del lines[name]
                openings.discard(line)
        bad.sort(key=lambda row: row["line"])
    return Rows(path, known.name, lines, bad, len(openings), every_turn, clean)


def _listed(line: int, reason: BadRow) -> dict[str, Any]:
    return {"line": line, "kind": reason.kind, "reason": str(reason)}


def _compare(
    path: Path, form: Form, every_turn: bool, first: dict[str, int], others: dict[str, list[int]]
) -> Iterator[tuple[str, int, BadRow]]:
    """(id, line, reason) for rows that share an id: the copies are left out, or all rows if they differ."""
    wanted = {line for name, lines in others.items() for line in (first[name], *lines)}
    contents: dict[int, str] = {}  # line -> hash of the example; texts would take much memory
    for line, row in read_table(path):
        if line in wanted:
            contents[line] = sha256_of_json(asdict(_read(row, form, every_turn).example))
    for name, lines in others.items():
        every = [first[name], *lines]
        if len({contents[line] for line in every}) == 1:
            for line in lines:
                yield name, line, BadRow(Kind.COPY, f"the same as line {first[name]}")
            continue
        for line in every:
            other = next(each for each in every if contents[each] != contents[line])
            reason = (
                f"id {quoted(name)} is also the id of line {other}, which is different: make ids "
                "unique, or remove them"
            )
            yield name, line, BadRow(Kind.AMBIGUOUS_ID, reason)
