"""From the rows of a file to examples, with every row that cannot be used listed by line, kind and reason."""

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
    # From content, so that it stays the same when rows are added, removed or sorted.
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
        raise BadRow(Kind.BAD_ID, f"id is {quoted(given)}, neither text nor a whole number")
    return characters(name, "id")


def _learned(said: Turns, every_turn: bool) -> list[Message]:
    """The turns up to the last one that is learned. Where only the last is to be learned, this has to be it."""
    turns = said.turns
    if every_turn:
        while turns and not may_be_learned(turns[-1]):  # what follows the last label teaches nothing
            turns = turns[:-1]
        if not turns:
            raise BadRow(Kind.MASKED, "every assistant turn is masked")
    elif "supervised" in turns[-1]:
        raise BadRow(Kind.MASKED, "the last assistant turn is masked")
    return turns


@dataclass(frozen=True)
class Rows:
    """Which rows of a file can be used. Their texts stay in the file."""

    path: Path
    form: str
    lines: dict[str, int]  # id -> line (of a table or an array: row), in the file's order
    bad: list[dict[str, Any]]  # {line, kind, reason}, by line
    began_with_answer: int  # usable rows whose first assistant turn, before any question, was left off
    every_turn: bool
    clean: Callable[[Example], Example] | None

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, ids: Collection[str] | None = None) -> Iterator[Example]:
        """The usable rows, or those of these ids, in the file's order."""
        lines = {self.lines[name] for name in (self.lines if ids is None else ids)}
        for line, row in read_table(self.path):
            if line in lines:
                example = _read(row, FORMS[self.form], self.every_turn).example
                yield self.clean(example) if self.clean else example


def read_rows(
    path: Path, form: str = "auto", *, every_turn: bool = True, clean: Callable[[Example], Example] | None = None
) -> Rows:
    """Looks through rows (see tables.py) in Alpaca, ShareGPT, messages or Orca form; `auto` takes the first row's.

    every_turn: all assistant turns are learned that no mask leaves out, else the last one alone. clean: what `Rows.read` does to
    each example; ids made from content are those of the row as it is in the file.
    docs/data.md says which rows are listed. Rows with one id and different contents are all listed, as what other
    files say of that id cannot be given to one of them. Raises UserError for a line that is no JSON object and for a file
    without known rows.
    """
    known = detect_form(path) if form == "auto" else FORMS[form]
    bad: list[dict[str, Any]] = []
    lines: dict[str, int] = {}
    repeated: dict[str, list[int]] = {}  # id of its own -> lines after the first
    openings = set[int]()  # lines that began with an answer
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
    """(id, line, why it is left out) for ids that several rows have: the copies, or all of them if they differ."""
    wanted = {line for name, lines in others.items() for line in (first[name], *lines)}
    contents: dict[int, str] = {}  # a hash in the place of a text: half of a long file may be copies
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
                f"id {quoted(name)} is also that of line {other}, which differs: make ids unique, or leave them out"
            )
            yield name, line, BadRow(Kind.AMBIGUOUS_ID, reason)
