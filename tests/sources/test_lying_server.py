"""Laws of servers that lie: nothing wrong becomes an answer, every exchange has an end, and what came in is
kept.

One example is lied about, once or for ever, or all are; Liar and LiarAboutMany say which.
"""

import contextlib
import json
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from local_server import Act, Asked, ScriptedServer, completion, scripted
from log_lines import logged
from served_recipes import KEY, answers, assert_nowhere, echo, journals, number, recipe_for
from small_models import save_model

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.sources import bounded_http
from megatron_fuse.sources.completions import is_name_of
from megatron_fuse.stages import Context

LIED_ABOUT = 3  # the example


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "small", "llama", seed=6)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_fuse.sources.server._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def chosen(finish: Any = "stop", **choice: Any) -> Act:
    return Act(
        {"choices": [{"index": 0, "finish_reason": finish, "message": {"content": "a lie"}, **choice}]}
    )


def said(message: Any, finish: str = "stop") -> Act:
    return chosen(finish, message=message)


def body(data: bytes, *headers: str) -> Act:
    """A response with status 200 whose bytes are these."""
    head = [
        "HTTP/1.1 200 OK",
        "content-type: application/json",
        f"content-length: {len(data)}",
        *headers,
        "",
        "",
    ]
    return Act(write=lambda file: file.write("\r\n".join(head).encode() + data))


TRUE = json.dumps(completion("a lie").content).encode()

# Whole responses with status 200 that are no answer, and what has to be said of them.
NO_ANSWERS = {
    "a list": (Act([]), "a list instead of an object"),
    "null": (Act(None), "a NoneType instead of an object"),
    "nothing": (Act({}), "choices: Field required"),
    "no choice": (Act({"choices": []}), "choices: List should have at least 1 item"),
    "choices null": (Act({"choices": None}), "choices: Input should be a valid list"),
    "choices mapping": (Act({"choices": {"0": {}}}), "choices: Input should be a valid list"),
    "two choices": (Act({"choices": completion("a lie").content["choices"] * 2}), "choices: List should "
                                                                                  "have at most 1"),
    "another index": (chosen(index=1), "choices.0.index: Input should be"),
    "index text": (chosen(index="0"), "choices.0.index: Input should be"),
    "index true": (chosen(index=False), "choices.0.index: Input should be"),
    "message null": (said(None), "choices.0.message: Input should be a valid dictionary"),
    "message text": (said("a lie"), "choices.0.message: Input should be a valid dictionary"),
    "no message": (Act({"choices": [{"finish_reason": "stop", "delta": {"content": "a lie"}}]}), "choices.0.message"),
    "other endpoint": (Act({"choices": [{"finish_reason": "stop", "text": "a lie"}]}), "choices.0.message: "
                                                                                       "Field required"),
    "content number": (said({"content": 5}), "choices.0.message.content: Input should be a valid string"),
    "content parts": (said({"content": [{"type": "text", "text": "a lie"}]}), "choices.0.message.content"),
    "content null": (said({"content": None}), "no content, although finish_reason is 'stop'"),
    "content missing": (said({"role": "assistant"}), "no content, although finish_reason is 'stop'"),
    "refusal number": (said({"content": "a lie", "refusal": 5}), "choices.0.message.refusal"),
    "no finish": (Act({"choices": [{"message": {"content": "a lie"}}]}), "choices.0.finish_reason: Field "
                                                                         "required"),
    **{
        f"finish {finish}": (chosen(finish), "choices.0.finish_reason: Input should be 'stop'")
        for finish in (None, 5, "", "banana", "STOP", "error", "abort", "tool_calls", ["stop"])
    },
    "model number": (Act({**completion("a lie").content, "model": 5}), "model: Input should be a valid "
                                                                       "string"),
    "empty": (body(b""), "not JSON"),
    "html": (Act("<html><body>Bad gateway: a lie</body></html>"), "not JSON"),
    "half": (body(TRUE[:-9]), "not JSON"),
    "twice": (body(TRUE + TRUE), "not JSON"),
    "bom": (body(b"\xef\xbb\xbf" + TRUE), "not JSON"),
    "utf-16": (body(TRUE.decode().encode("utf-16")), "not UTF-8 at byte 0"),
    "latin-1": (body(TRUE.replace(b"a lie", b"\xe9t\xe9"), "x: y"), "not UTF-8 at byte"),
    "surrogate bytes": (body(TRUE.replace(b"a lie", b"\xed\xa0\x80")), "not UTF-8 at byte"),
    "deep": (body(b"[" * 100_000), "not JSON"),
    "digits": (body(b'{"choices": ' + b"9" * 5000 + b"}"), "not JSON"),
    "key twice": (body(TRUE[:-1] + b', "choices": []}'), "the key 'choices' is given twice"),
    "content twice": (body(TRUE.replace(b'"a lie"', b'"a lie", "content": "an answer"')), "the key "
                                                                                          "'content' is "
                                                                                          "given twice"),
    "stream": (body(b"data: " + TRUE + b"\n\ndata: [DONE]\n\n"), "not JSON"),
    "no content": (Act(write=lambda file: file.write(b"HTTP/1.1 204 No Content\r\n\r\n")), "not JSON"),
    "10 MB": (completion("a lie " * 1_700_000), "bytes, which is more than the requested number of tokens "
                                                "can hold"),
    "the key": (completion(f"the key is {KEY}"), "the answer holds the key"),
}  # fmt: skip


class Liar:
    """Lies about one example, or about all and the trial; the first `times` times."""

    def __init__(self, lie: Act, *, about_all: bool = False, times: float = float("inf")) -> None:
        self.lie, self.about_all, self.left = lie, about_all, times
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> Act:
        with self._lock:
            if self.about_all or number(asked) == LIED_ABOUT:
                self.left -= 1
                if self.left >= 0:
                    return self.lie
        return echo(asked)


class LiarAboutMany:
    """A lie for every example, the first `times` times that it is asked; the trial is answered."""

    def __init__(self, lies: list[Act], times: int) -> None:
        self.lies, self.times, self.asked = lies, times, Counter[int]()
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> Act:
        with self._lock:
            self.asked[number(asked)] += 1
            times = self.asked[number(asked)]
        return self.lies[number(asked)] if number(asked) >= 0 and times <= self.times else echo(asked)


def assert_right(recipe: Recipe, examples: int = 8) -> None:
    assert {name: row.response for name, row in answers(recipe).items()} == {
        f"e{n}": f"answer {n}" for n in range(examples)
    }


def test_what_is_no_answer_once_is_asked_for_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    lies = [lie for lie, _ in NO_ANSWERS.values()]
    with scripted(LiarAboutMany(lies, 2)) as server:
        assert_right(recipe_for(model, tmp_path, server.url, examples=len(lies)), len(lies))
        assert len(server.asked) == 3 * len(lies)


def test_what_stays_no_answer_is_listed_with_the_reason(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with scripted(LiarAboutMany([lie for lie, _ in NO_ANSWERS.values()], 99)) as server:
        recipe = recipe_for(model, tmp_path, server.url, examples=len(NO_ANSWERS), max_retries=1)
        with logged("warning") as text:
            artifact = generate_responses(Context(recipe), "served")
        assert artifact is not None
        assert len(server.asked) == 3 * len(NO_ANSWERS)  # again, and a trial
    for place, (name, (_, why)) in enumerate(NO_ANSWERS.items()):
        (line,) = [
            line for line in text.getvalue().split("\n") if f"no answer to example 'e{place}': " in line
        ]
        assert "the server sent no completion but " in line and why in line and line.isprintable(), name
        assert len(line) <= 600 + len(str(recipe.workdir)), name
    assert {row.response for row in answers(recipe).values()} == {""}
    (unmatched,) = artifact.files(".unmatched.txt")
    assert unmatched.read_text().split() == [f"e{n}" for n in range(len(NO_ANSWERS))]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"a lie" in path.read_bytes()]
    assert KEY not in text.getvalue()
    assert_nowhere(KEY, tmp_path, capfd)


@pytest.mark.parametrize("name", ["html", "the key", "no choice"])
def test_a_server_that_gives_no_answer_at_all_ends_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, name: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    lie, why = NO_ANSWERS[name]
    with scripted(Liar(lie, about_all=True)) as server:
        recipe = recipe_for(model, tmp_path, server.url, max_retries=0)
        with pytest.raises(UserError) as caught:
            generate_responses(Context(recipe), "served")
    error = str(caught.value)
    assert error.startswith(
        f"sources.served.server: {server.url} refuses every request (the server sent no completion but "
    )
    assert why in error and "[at example 'e" in error
    assert len(error) <= 600 and error.isprintable()
    assert not any(path.read_bytes() for path in journals(recipe))
    assert_nowhere(KEY, tmp_path, capfd, caught.value)


def until_it_breaks(file: BinaryIO, part: bytes, pause: float = 0.0) -> int:
    """Writes for ever, or until the client is gone; bytes written."""
    written, end = 0, time.monotonic() + 60
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            written += file.write(part)
            time.sleep(pause)
    return written


def head(*lines: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", "content-type: application/json", *lines, "", ""]).encode()


def nothing(file: BinaryIO) -> None:
    until_it_breaks(file, b"", 0.05)


COMPRESSED = zlib.compress(bytes(10**7))[:9999]
ENDLESS = 1.5  # seconds of time-out for those that never end: a true answer takes less on a busy machine, too

BREAKS: dict[str, tuple[Callable[[BinaryIO], object], str]] = {
    "cut body": (lambda f: f.write(head("content-length: 999") + TRUE), r"cannot be reached \(peer closed "
                                                                        r"connection"),
    "cut chunks": (lambda f: f.write(head("transfer-encoding: chunked") + b"5\r\n{\"cho\r\n"), "cannot be reached"),
    "bad chunks": (lambda f: f.write(head("transfer-encoding: chunked") + b"zz\r\n" + TRUE), "cannot be "
                                                                                             "reached"),
    "no HTTP": (lambda f: f.write(b"\x00\x01 what?\r\n\r\n"), "cannot be reached"),
    "two lengths": (lambda f: f.write(head("content-length: 5", "content-length: 9") + TRUE), "cannot be "
                                                                                              "reached"),
    "compressed": (
        lambda f: f.write(head("content-encoding: gzip", "content-length: 9999") + COMPRESSED),
        r"cannot be reached \(the server sent a body encoded as 'gzip'\)",
    ),
    "silence": (nothing, "did not answer within 1.5 s, 2 times"),
    "silence in the body": (lambda f: (f.write(head("content-length: 999")), f.flush(), nothing(f)), "did not answer"),
    "a byte now and then": (lambda f: (f.write(head()), until_it_breaks(f, b" ", 0.1)), "did not answer "
                                                                                        "within 1.5 s"),
    "a header now and then": (lambda f: (f.write(b"HTTP/1.1 200 OK\r\n"), until_it_breaks(f, b"a: b\r\n", 0.1)), "did not"),
    "endless header": (lambda f: (f.write(b"HTTP/1.1 200 OK\r\na: "), until_it_breaks(f, b"b" * 999)), "cannot be reached"),
}  # fmt: skip


def test_an_exchange_that_breaks_or_has_no_end_is_tried_again(model: Path, tmp_path: Path) -> None:
    lies = [Act(write=write) for write, _ in BREAKS.values()]
    with scripted(LiarAboutMany(lies, 1)) as server:
        # Long enough for a true answer on a busy machine: none of them is to be lost.
        assert_right(
            recipe_for(model, tmp_path, server.url, examples=len(lies), timeout=5, max_retries=9), len(lies)
        )


@pytest.mark.parametrize("name", BREAKS)
def test_an_exchange_that_always_breaks_or_has_no_end_ends_the_run(
    model: Path, tmp_path: Path, name: str
) -> None:
    write, message = BREAKS[name]
    liar = Liar(Act(write=write))
    with scripted(liar) as server:
        timeout = ENDLESS if message.startswith("did not") else 60
        recipe = recipe_for(model, tmp_path, server.url, timeout=timeout, max_retries=1, concurrency=1)
        with pytest.raises(
            UserError, match=rf"^sources.served.server: {server.url} {message}.*'e{LIED_ABOUT}'"
        ) as caught:
            generate_responses(Context(recipe), "served")
        assert len(str(caught.value)) <= 600
        kept = journals(recipe)[0].read_bytes().count(b"\n")
        assert kept == LIED_ABOUT  # asked one by one, in order
        liar.left = 0
        server.asked.clear()
        assert_right(recipe)
        assert len(server.asked) == 8 - kept


def test_an_endless_body_ends(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "MOST_BYTES", 1 << 20)
    written: list[int] = []

    def endless(file: BinaryIO) -> None:
        file.write(head())
        written.append(until_it_breaks(file, b" " * (1 << 16)))

    with scripted(Liar(Act(write=endless))) as server:
        recipe = recipe_for(model, tmp_path, server.url, max_retries=0, timeout=50)
        with pytest.raises(
            UserError, match=r"cannot be reached \(the server sent a body of more than 1 MiB\)"
        ):
            generate_responses(Context(recipe), "served")
    assert written[0] < 64 << 20  # what the system's buffers take of it


def test_a_long_body_with_a_short_answer_is_an_answer(model: Path, tmp_path: Path) -> None:
    def script(asked: Asked) -> Act:
        return Act(
            {**echo(asked).content, "padding": "x" * 10_000_000 if number(asked) == LIED_ABOUT else ""}
        )

    with scripted(script) as server:
        assert_right(recipe_for(model, tmp_path, server.url))


@pytest.mark.parametrize("text", ["a\0b", "\x1b[2Ja\x07\u202e", "\ufeffa", "a\u2028b", "\r\n a", "a \\ud800"])
def test_odd_characters_of_an_answer_are_kept(model: Path, tmp_path: Path, text: str) -> None:
    with scripted(Liar(completion(text))) as server:
        rows = answers(recipe_for(model, tmp_path, server.url))
    assert rows[f"e{LIED_ABOUT}"].response == text


@pytest.mark.parametrize(
    ("status", "said_in_error"),
    [
        (400, "\x1b[2J\x07 no"),
        (403, "\ud800"),
        (404, "x" * 100_000),
        (418, ["a", {"b": None}]),
        (429, None),
        (500, 5),
        (503, "a\n" * 5000),
    ],
)
def test_errors_are_quoted_in_short_and_as_a_terminal_may_show_them(
    model: Path, tmp_path: Path, status: int, said_in_error: Any
) -> None:
    lie = Act({"error": {"message": said_in_error, "code": ["x"]}}, status)
    models = Act({"data": [{"id": "y" * 5000}, {"id": 5}, None, "z"]})
    with scripted(Liar(lie, about_all=True), models) as server:
        recipe = recipe_for(model, tmp_path, server.url, max_retries=0)
        with pytest.raises(UserError, match=f"^sources.served.server: {server.url} .*{status}") as caught:
            generate_responses(Context(recipe), "served")
    assert len(str(caught.value)) <= 600 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "after", ["-5", "nan", "banana", "1e999", "Thu, 01 Jan 1970 00:00:00 GMT", "999999", "0"]
)
def test_an_absurd_retry_after_is_no_reason_to_wait(model: Path, tmp_path: Path, after: str) -> None:
    """Two minutes are the most that is waited for; what asks for more, or for no number, ends the run or
    is asked again soon.
    """
    with scripted(Liar(Act({"detail": "later"}, 429, {"retry-after": after}), times=1)) as server:
        recipe = recipe_for(model, tmp_path, server.url)
        with contextlib.suppress(UserError):
            generate_responses(Context(recipe), "served")
        assert_right(recipe)


OTHERS = {
    "another": ("mistral-7b", "'mistral-7b'"),
    "an empty list of them": ("x\x1b[2J" + "y" * 5000, r"'x\\x1b"),
    "a larger one": ("small-2b", "'small-2b'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_answer_of_another_model_ends_the_run(model: Path, tmp_path: Path, name: str) -> None:
    other, quoted = OTHERS[name]
    with scripted(Liar(Act({**completion("a lie").content, "model": other}))) as server:
        recipe = recipe_for(model, tmp_path, server.url, concurrency=1)
        with pytest.raises(UserError) as caught:
            generate_responses(Context(recipe), "served")
        error = str(caught.value)
        assert (
            error.startswith(f"sources.served.server: {server.url} answers as model ")
            and "the requested model is 'small'" in error
        )
        assert (
            quoted.replace("\\\\", "\\") in error
            and error.endswith("[at example 'e3']")
            and len(error) <= 600
        )
        assert b"a lie" not in journals(recipe)[0].read_bytes()
        if name == "another":
            rows = answers(recipe_for(model, tmp_path / "known", server.url, answers_as=other))
            assert rows[f"e{LIED_ABOUT}"].response == "a lie"


@pytest.mark.parametrize(
    "said_of_models", [None, [], {"data": 5}, {"data": [5, {"id": 5}]}, "<html>", {"data": [[[]]]}]
)
def test_a_list_of_models_in_another_form_is_no_list(
    model: Path, tmp_path: Path, said_of_models: Any
) -> None:
    with scripted(echo, models=Act(said_of_models)) as server:
        assert_right(recipe_for(model, tmp_path, server.url))


def test_models_that_never_end_are_no_list(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_fuse.sources.server._CONNECT_SECONDS", 0.5)
    with scripted(
        echo, models=Act(write=lambda f: (f.write(head()), until_it_breaks(f, b" ", 0.1)))
    ) as server:
        assert_right(recipe_for(model, tmp_path, server.url))


@pytest.fixture
def elsewhere() -> Iterator[ScriptedServer]:
    with scripted(echo) as server:
        yield server


@pytest.mark.parametrize(
    ("status", "models_too"), [(301, False), (302, True), (303, False), (307, True), (308, False)]
)
def test_neither_prompts_nor_key_follow_a_redirect(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: ScriptedServer,
    status: int,
    models_too: bool,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    redirect = Act({}, status, {"location": f"{elsewhere.url}/chat/completions?{KEY}"})
    with scripted(lambda asked: redirect, redirect if models_too else None) as server:
        recipe = recipe_for(model, tmp_path, server.url)
        with pytest.raises(UserError) as caught:
            generate_responses(Context(recipe), "served")
    error = str(caught.value)
    assert f"{server.url} redirects requests ({status} to '{elsewhere.url}" in error and KEY not in error
    assert not elsewhere.asked


def test_names_of_one_model() -> None:
    for one, other in (
        ("small", "small"),
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("gpt-3.5-turbo-0613", "gpt-3.5-turbo"),
        ("/models/mistral-7b.Q4_K.gguf", "mistral-7b"),
        ("org/small@main", "small"),
        ("mistral:latest", "Mistral"),
    ):
        assert is_name_of(one, other) and is_name_of(other, one), (one, other)
    for one, other in (
        ("gpt-4o-mini", "gpt-4o"),
        ("a", "b"),
        ("", "small"),
        ("llama-70b", "llama"),
        ("small", "all"),
    ):
        assert not is_name_of(one, other) and not is_name_of(other, one), (one, other)
