"""User text that is printed holds nothing that a terminal would obey."""

import ast
import io
import logging
import math
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from log_lines import logged

from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.huggingface.talk import Printer
from megatron_fuse.inspection.documents import format_view
from megatron_fuse.reporting.layout import html_page, html_table, markdown_table, text_table
from megatron_fuse.text_safety import printable, say
from megatron_fuse.training.guards import StepGuard

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),  # clears the screen
        ("\x9b31m", r"\x9b31m"),  # the one-byte form of ESC [
        ("\x00\x07\x08\x7f", r"\x00\x07\x08\x7f"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\u202eevil\u2066x\u200f\u061c", r"\u202eevil\u2066x\u200f\u061c"),
        ("a\u200bb\ufeffc\u200d\u2060", r"a\u200bb\ufeffc\u200d\u2060"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\ud800x\udfff", r"\ud800x\udfff"),
        ("\U000e0041", r"\U000e0041"),  # an invisible tag
        ("Grüße, 你好 \u00a0 \u3000 👍 e\u0301 \\x1b", "Grüße, 你好 \u00a0 \u3000 👍 e\u0301 \\x1b"),
        ("", ""),
    ],
)
def test_unsafe_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_prose_keeps_lines_and_joiners_alone() -> None:
    assert printable("a\n\tb\r\x1b\u202e\u200b", prose=True) == "a\n\tb\\r\\x1b\\u202e\\u200b"
    assert printable("👩\u200d🚀 می\u200cخواهم\n", prose=True) == "👩\u200d🚀 می\u200cخواهم\n"


def test_no_code_point_escapes_the_rule() -> None:
    everything = "".join(c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Co"))
    shown = printable(everything)
    shown.encode("utf-8")
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    kept = set(printable(everything, prose=True)) - set(shown)
    assert kept == {"\n", "\t", "\u200c", "\u200d"}


BAD = "id\x1b[2J\x9b31m\u202eevil\u200b\x07"
SEEN = r"id\x1b[2J\x9b31m\u202eevil\u200b\x07"


def _step_guard() -> str:
    guard = StepGuard(max_skipped=2)
    warning = guard.watch(1, "phase", {"grad norm": math.nan}, lambda: [BAD])
    with pytest.raises(UserError) as refused:
        guard.watch(2, "phase", {"grad norm": math.nan}, lambda: [BAD])
    return f"{warning}\n{refused.value}"


def _inspected() -> str:
    token = {"id": 1, "text": BAD, "supervised": True, "match": "exact", "tail": 0.1}
    token["entries"] = [{"id": 1, "text": BAD, "logprob": -1.0}]
    view = {
        "id": BAD,
        "mode": "training",
        "source": "alpha",
        "tokens": [token, token | {"supervised": False}],
    }
    return format_view(view, SimpleNamespace(selections={}))


def _logged() -> str:
    with logged() as text:
        logging.getLogger("megatron_fuse.training").warning(BAD)
    return text.getvalue()


def _chat_tool() -> str:
    chat = SimpleNamespace(decode_response=lambda ids: (BAD + "\n")[: len(ids)])
    printer = Printer(chat)

    def generate() -> None:
        printer.put(torch.tensor([1, 2]))  # the prompt
        for token in range(len(BAD) + 1):
            printer.put(torch.tensor([token]))
        printer.end()

    return _printed(generate)


def _refusal() -> str:
    def refuse() -> None:
        raise UserError(f"row {BAD}")

    return _printed(lambda: exit_code(refuse))


def _printed(work: Callable[[], object]) -> str:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        work()
    return out.getvalue()


ROADS: dict[str, Callable[[], str]] = {
    "a message": lambda: _printed(lambda: say(BAD)),
    "an error": _refusal,
    "a step's warning": _step_guard,
    "a log record": _logged,
    "an example inspected": _inspected,
    "a table on the terminal": lambda: "\n".join(text_table((["name", "n"], [[BAD, "1"], ["x", BAD]]))),
    "a table in Markdown": lambda: "\n".join(markdown_table(([BAD, "n"], [[BAD, "1"]]))),
    "a page": lambda: html_page(BAD, html_table(([BAD, "n"], [[BAD, "1"]]))),
    "the chat tool": _chat_tool,
}


@pytest.mark.parametrize("road", ROADS)
def test_no_road_prints_what_a_terminal_obeys(road: str) -> None:
    text = ROADS[road]()
    assert SEEN in text
    assert text.replace("\n", "").isprintable()


def test_pages_show_html_of_the_data_as_text() -> None:
    page = html_page("<script>a</script>", html_table((["<b>"], [["<img src=x onerror=alert(1)> & \"'"]])))
    assert "<script>" not in page and "<img" not in page and "&lt;img src=x" in page
    assert markdown_table((["a|b"], [["c\nd"]]))[0] == r"| a\|b |"


PROTOCOLS = {
    "text_safety.py",
    "errors.py",
    "fork_server.py",
    "processes.py",
    "interrupts.py",
    "chat.py",
    "loading.py",
    "main.py",
    "talk.py",
}


RESULTS = {"text_safety.py", "plan_table.py", "dry_run.py"}


def _uses(name: str) -> list[Path]:
    """The files of library and tools in which a function of this name is called, once for each call."""
    files = [found for root in ("megatron_fuse", "tools") for found in (ROOT / root).rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    return [
        path
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_nothing_is_printed_but_by_say() -> None:
    """Besides these files, whose own prints are escaped, constant, YAML, or read by programs."""
    assert {path.name for path in _uses("print")} <= PROTOCOLS


def test_only_commands_and_tables_say_anything() -> None:
    """Progress and messages are log records, which --log-level and the rank decide about.

    In verification/shards.py `say` is an argument.
    """
    others = {path for path in _uses("say") if path.parent.name != "cli" and path.name not in RESULTS}
    assert {str(path.relative_to(ROOT)) for path in others} == {"megatron_fuse/verification/shards.py"}
