"""Laws of answers that a server gives: the real server of transformers for what is right, a scripted one
for what goes wrong.
"""

import json
import logging
import re
import runpy
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_server import Act, Asked, RealServer, completion, scripted
from log_lines import at_messages_of_shards, logged
from ports import free_port
from rank_pool import forked
from served_recipes import KEY, answers, assert_nowhere, echo, journals, number, recipe_for
from small_models import save_model
from small_tokenizers import make_tokenizer

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import load_examples, prepare_instructions
from megatron_fuse.progress import Progress
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import RESPONSES, Response, generate_responses
from megatron_fuse.responses.journal import open_journal
from megatron_fuse.sources.listed_models import unlisted
from megatron_fuse.stages import Context

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "small", "llama", seed=6)


@pytest.fixture(scope="module")
def real(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    server = RealServer(model, tmp_path_factory.mktemp("server") / "log.txt")
    server.start()
    yield server
    server.kill()


def greedy(model: Path) -> dict[str, Any]:
    """What makes `transformers serve` choose as we do: special tokens and padded columns are no text."""
    config = json.loads((model / "config.json").read_text())
    tokens = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    suppressed = [0, 1, 3, *range(len(tokens), config["vocab_size"])]
    return {
        "generation_config": json.dumps(
            {"do_sample": False, "eos_token_id": 2, "suppress_tokens": suppressed}
        )
    }


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_real_server_answers_as_the_model_in_process(
    real: RealServer, model: Path, tmp_path: Path, endpoint: str
) -> None:
    options = {"model": str(model), "endpoint": endpoint, "extra": greedy(model), "concurrency": 4}
    recipe = recipe_for(
        model, tmp_path, real.url, examples=16, stop=["12"], responses={"max_new_tokens": 40}, **options
    )
    served, local = answers(recipe), answers(recipe, "local")
    assert {row.truncated for row in local.values()} == {True, False}, "the case tells nothing"
    for name, row in served.items():
        assert row.response == local[name].response.rstrip("\ufffd" * row.truncated), name
        # A stop token in the last place counts as cut off there: the server compares numbers of tokens only.
        assert row.truncated == local[name].truncated or local[name].tokens == 39, name


@pytest.mark.slow
def test_a_real_server_killed_in_mid_run_and_started_again(
    real: RealServer, model: Path, tmp_path: Path
) -> None:
    options = {"model": str(model), "extra": greedy(model), "concurrency": 3, "max_retries": 1}
    recipe = recipe_for(model, tmp_path, real.url, examples=40, responses={"max_new_tokens": 60}, **options)
    whole = answers(recipe)
    shutil.rmtree(recipe.workdir / "responses")

    def kill_after_some_answers() -> None:
        while not journals(recipe) or journals(recipe)[0].read_bytes().count(b"\n") < 8:
            time.sleep(0.002)
        real.kill()

    killer = threading.Thread(target=kill_after_some_answers)
    killer.start()
    try:
        with pytest.raises(
            UserError,
            match=rf"sources.served.server: {real.url} cannot be reached .*Start the server.*next run "
            r"requests the others",
        ):
            generate_responses(Context(recipe), "served")
    finally:
        killer.join()
        real.start()
    known = journals(recipe)[0].read_bytes().count(b"\n")
    assert 8 <= known < 40
    assert answers(recipe) == whole
    assert real.answered() == 40 - known
    assert not journals(recipe)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_so_many_requests_are_under_way_and_never_more(model: Path, tmp_path: Path, concurrency: int) -> None:
    together = threading.Barrier(concurrency)

    def script(asked: Asked) -> Act:
        together.wait(timeout=20)
        time.sleep(0.03)  # for one too many to come in
        return echo(asked)

    with scripted(script) as server:
        rows = answers(recipe_for(model, tmp_path, server.url, examples=12, concurrency=concurrency))
    assert server.most_at_once == concurrency
    assert [rows[f"e{n}"].response for n in range(12)] == [f"answer {n}" for n in range(12)]
    assert sorted(map(number, server.asked)) == list(range(12))


FAULTS = {
    0: Act({"error": {"message": "slow down"}}, 429, {"retry-after": "1.2"}),
    1: Act({"error": {"message": "oh"}}, 500),
    2: Act("<html>bad gateway</html>", 502),
    3: Act({"detail": "loading"}, 503),
    4: Act(drop=True),
    5: Act({"error": {"message": "late"}}, 408),
}


def test_what_passes_is_tried_again(model: Path, tmp_path: Path) -> None:
    seen = Counter[int]()

    def script(asked: Asked) -> Act:
        seen[number(asked)] += 1
        if seen[6] == 1 and number(asked) == 6:
            time.sleep(2)  # longer than the time-out
        return FAULTS[number(asked)] if seen[number(asked)] == 1 and number(asked) in FAULTS else echo(asked)

    with scripted(script) as server:
        rows = answers(recipe_for(model, tmp_path, server.url, timeout=1))
    assert [rows[f"e{n}"].response for n in range(8)] == [f"answer {n}" for n in range(8)]
    assert seen == Counter(dict.fromkeys([*FAULTS, 6], 2)) | Counter([7])
    first, second = (asked.time for asked in server.asked if number(asked) == 0)
    assert second - first >= 1.2  # the package's own first pause is half a second


REFUSED = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "x"}}


@pytest.mark.parametrize(
    "act, message",
    [
        (
            Act(REFUSED, 401),
            r"does not accept the key \(401 .*\[key\].*environment variable FUSE_TEST_KEY holds it",
        ),
        (Act(REFUSED, 403), r"does not accept the key \(403"),
        (
            Act(REFUSED, 404),
            r"has no model 'small', or nothing at /chat/completions \(404 .*\[key\]\); it lists small, "
            r"tiny\. Fix sources",
        ),
        (Act(REFUSED, 400), r"refuses every request \(400 .*\[key\]\)\. Fix sources.served.server"),
        (Act({"detail": "Unexpected fields"}, 422), r"refuses every request \(422 Unexpected fields\)"),
        (
            Act(REFUSED, 429),
            r"accepts no more requests for now \(429 .*\[key\]\).*next run requests the others",
        ),
        (Act(REFUSED, 429, {"retry-after": "9999"}), r"accepts no more requests for now"),
        (Act(f"<p>{KEY}</p>", 503), r"fails \(503 <p>\[key\]</p>\)"),
        (
            Act(f"<p>{KEY}</p>"),
            r"refuses every request \(the server sent no completion but <p>\[key\]</p> \(not JSON: .*\)\)",
        ),
        (
            Act({"error": KEY}),
            r'refuses every request \(the server sent no completion but {"error": "\[key\]"} \(choices: '
            r"Field required\)\)",
        ),
        (Act(drop=True), r"cannot be reached \(.*\)\. Start the server, or fix sources.served.server.url"),
    ],
    ids=str,
)
def test_what_is_wrong_with_all_requests_ends_the_run(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    act: Act,
    message: str,
) -> None:
    monkeypatch.setenv("FUSE_TEST_KEY", KEY + "\n")  # as from `$(cat file)` in some shells
    with scripted(lambda asked: act, models=Act({"data": [{"id": "small"}, {"id": "tiny"}]})) as server:
        options = {"max_retries": 0, "concurrency": 2, "api_key_variable": "FUSE_TEST_KEY"}
        recipe = recipe_for(model, tmp_path, server.url, examples=30, **options)
        with pytest.raises(UserError) as caught:
            generate_responses(Context(recipe), "served")
    error = str(caught.value)
    assert re.match(rf"sources\.served\.server: {server.url} {message}", error), error
    assert len(server.asked) <= 4  # two at once, each with a trial
    assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
    assert not any(path.read_bytes() for path in journals(recipe))
    assert_nowhere(KEY, tmp_path, capfd, caught.value)


def test_nobody_listens_or_the_key_is_wrong_before_anything_is_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(UserError, match=rf"{nobody} cannot be reached .*connection.*Start the server"):
        answers(recipe_for(model, tmp_path / "1", nobody, max_retries=50))  # which would be minutes
    with scripted(echo, models=Act(REFUSED, 401)) as server:
        recipe = recipe_for(model, tmp_path / "2", server.url)
        with pytest.raises(UserError, match=r"OPENAI_API_KEY is not set, but should hold it"):
            answers(recipe)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with pytest.raises(UserError, match=r"401 .*\[key\].*OPENAI_API_KEY holds it") as caught:
            answers(recipe)
    assert not server.asked
    assert_nowhere(KEY, tmp_path, capfd, caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(
        UserError, match=r"^the environment variable OPENAI_API_KEY holds characters that no key has"
    ):
        answers(recipe)


LISTED = Act({"data": [{"id": "other"}, {"id": "org/Small-2b"}, {"id": "third", "aliases": ["also"]}]})


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ("small", True),  # a folder's name, too
        ("models/small", False),
        ("models/other", True),
        ("/models/other", False),  # perhaps there, on the server's machine
        ("s" * 300, True),  # longer than a file's name may be
        ("models/" + "s" * 300, True),
    ],
)
def test_a_path_may_be_served_without_being_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("small", "models/small"):
        (tmp_path / folder).mkdir(parents=True)
    assert bool(unlisted([asked], ["large", "org/large"])) == refused


@pytest.mark.parametrize(
    ("models", "options", "refused"),
    [
        (LISTED, {"model": "small"}, True),
        (LISTED, {"model": "smal-2b"}, True),
        (LISTED, {"model": "small-2b"}, False),
        (LISTED, {"model": "also"}, False),
        (LISTED, {"model": "mine", "answers_as": "org/Small-2b"}, False),
        (LISTED, {"model": "/models/mine"}, False),  # transformers serve lists its cache alone
        (Act({"data": [{"id": "openai/*"}, {"id": "x"}]}), {"model": "openai/small"}, False),
        (Act({"data": [{"id": f"m{n}"} for n in range(99)]}), {"model": "small"}, True),
        (Act({"data": [{"id": KEY}]}), {"model": "small"}, True),
        (Act({"data": []}), {"model": "small"}, False),
        (Act("no such page", 404), {"model": "small"}, False),
        (Act("broken", 500), {"model": "small"}, False),
    ],
    ids=str,
)
def test_a_name_that_the_server_does_not_list_is_refused_before_anything_is_asked(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    models: Act,
    options: dict[str, str],
    refused: bool,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with scripted(echo, models=models) as server:
        recipe = recipe_for(model, tmp_path, server.url, **options)
        if not refused:
            assert len(answers(recipe)) == 8
            return
        with pytest.raises(UserError) as caught:
            answers(recipe)
        error = str(caught.value)
        assert not server.asked
        assert error.startswith(
            f"sources.served.server: {server.url} has no model {options['model']!r}; it lists "
        )
        assert error.endswith(
            "Fix sources.served.server.model. If it is the same model under another name, set "
            "sources.served.server.answers_as to its name in that list."
        )
        assert KEY not in error and len(error) < 700
        if models is LISTED:
            assert "it lists org/Small-2b, other, third, also. Fix" in error  # the closest first
        if len(models.content["data"]) == 99:
            assert "m7, and 91 more" in error


def test_an_example_that_the_server_refuses_is_listed_and_the_others_are_answered(
    model: Path, tmp_path: Path
) -> None:
    def script(asked: Asked) -> Act:
        if len(server.asked) == 9:
            return Act({"detail": "restarting"}, 503)
        if number(asked) == 5:
            return Act({"error": {"message": "context length exceeded: \ud83d", "code": 400}}, 400)
        return echo(asked)

    with scripted(script) as server:
        recipe = recipe_for(model, tmp_path, server.url, examples=12, concurrency=1, max_retries=0)
        with logged("warning") as text:
            with pytest.raises(UserError, match="503 restarting"):
                generate_responses(Context(recipe), "served")
            artifact = generate_responses(Context(recipe), "served")
        assert artifact is not None
    assert text.getvalue().count("no answer to example 'e5': 400 context length exceeded: \\ud83d") == 1
    (unmatched,) = artifact.files(".unmatched.txt")
    assert unmatched.read_text() == "e5\n"
    rows = answers(recipe)
    assert [row.id for row in rows.values() if row.response != f"answer {row.id[1:]}"] == ["e5"]
    # One trial, and twice the one that met the restart: nothing else is asked again, the refused one neither.
    assert sorted(map(number, server.asked)) == sorted([*range(12), -1, number(server.asked[8])])


REPLIES = {
    0: (completion("whole"), Response("e0", "whole", False, 0)),
    1: (completion("cut o", "length"), Response("e1", "cut o", True, 0)),
    2: (completion("", "content_filter"), Response("e2", "", True, 0, refused=True)),
    3: (completion(None, refusal="I must not."), Response("e3", "I must not.", False, 0, refused=True)),
    4: (completion("I'm sorry, but I cannot help with that."), Response(
        "e4", "I'm sorry, but I cannot help with that.", False, 0, refused=True
    )),
    5: (completion("yes", reasoning_content="hm"), Response("e5", "yes", False, 0, reasoning="hm")),
    6: (completion(None, "length", reasoning_content="hm"), Response("e6", "", True, 0, reasoning="hm")),
    # The server left the stop text in.
    7: (completion("before STOP after", "length"), Response("e7", "before ", False, 0)),
    8: (completion("half a \ud83d"), Response("e8", "half a \ufffd", False, 0)),
    9: (completion("cut in é\ufffd", "length"), Response("e9", "cut in é", True, 0)),
    10: (
        Act({"error": {"message": "filtered", "code": "content_filter"}}, 400),
        Response("e10", "", False, 0, refused=True),
    ),
    11: (completion("  white\n "), Response("e11", "  white\n ", False, 0)),
}  # fmt: skip


def test_what_comes_back_is_kept_and_flagged(model: Path, tmp_path: Path) -> None:
    with scripted(lambda asked: REPLIES[number(asked)][0]) as server:
        recipe = recipe_for(model, tmp_path, server.url, examples=12, stop=["STOP"])
        rows = answers(recipe)
    tokenizer = load_format(recipe.sources["served"], "served").tokenizer
    for _, expected in REPLIES.values():
        tokens = len(tokenizer.encode_continuation(expected.response))
        assert rows[expected.id] == Response(**vars(expected) | {"tokens": tokens})
    counts = Context(recipe).open(RESPONSES, "served").counts
    assert (counts["refused"], counts["truncated"], counts["empty"]) == (4, 4, 3)


def test_prompts_without_room_are_not_asked(model: Path, tmp_path: Path) -> None:
    short, positions = tmp_path / "short", 30
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    with scripted(echo) as server:
        recipe = recipe_for(model, tmp_path, server.url, directory=short, responses={"max_new_tokens": 99})
        rows = answers(recipe)
    chat = load_format(recipe.sources["served"], "served")
    examples = load_examples(prepare_instructions(Context(recipe)))
    rooms = {each.id: positions - len(chat.encode_prompt(each.prompt())) for each in examples}
    assert {f"e{number(asked)}": asked.body["max_tokens"] for asked in server.asked} == {
        name: room for name, room in rooms.items() if room > 0
    }
    assert {row.id for row in rows.values() if row.truncated and not row.response} == {
        name for name, room in rooms.items() if room <= 0
    }
    assert 0 < len(server.asked) < 8, "the case tells nothing"


@pytest.mark.parametrize("kind", ["sentencepiece", "llama_json", "llama_metaspace", "byte_level"])
@pytest.mark.parametrize("template", ["vicuna_v1.1", "llama2", "chatml"])
def test_a_prompt_as_text_has_one_bos_where_the_server_reads_it(
    model: Path, tmp_path: Path, kind: str, template: str
) -> None:
    """A server reads it as tokenizers read any text; what the model meets has to be what capture shows it
    later.
    """
    other = make_tokenizer(kind, tmp_path / "other")
    other = other if other.is_dir() else other.parent
    shutil.copy(model / "config.json", other)
    with scripted(lambda asked: Act({"choices": [{"text": " fine</s>", "finish_reason": "stop"}]})) as server:
        recipe = recipe_for(
            model, tmp_path, server.url, directory=other, endpoint="completions", chat_template=template
        )
        rows = answers(recipe)
    chat = load_format(recipe.sources["served"], "served")
    examples = {example.id: example for example in load_examples(prepare_instructions(Context(recipe)))}
    read = chat.tokenizer.hugging_face()
    for asked in server.asked:
        prompt, ids = (
            chat.encode_prompt(examples[f"e{number(asked)}"].prompt()),
            read(asked.body["prompt"])["input_ids"],
        )
        special = [
            [token for token in tokens if token in chat.tokenizer.special_ids] for tokens in (prompt, ids)
        ]
        assert special[0] == special[1]
        assert special[0].count(chat.tokenizer.bos_id) <= 1
        # This one tokenizer puts a space in front of a text, but none behind a BOS that is in the text.
        assert ids == prompt or (kind, template) == ("llama_metaspace", "llama2")
        assert chat.tokenizer.joined_bytes(ids).lstrip() == chat.tokenizer.joined_bytes(prompt).lstrip()
    ends_turn = chat.tokenizer.token_text(chat.stop_id)
    expected = (" fine" if ends_turn == "</s>" else " fine</s>").removeprefix(chat.separator)
    assert {row.response for row in rows.values()} == {expected}


def test_a_request_holds_messages_sampling_and_a_seed_of_its_own(model: Path, tmp_path: Path) -> None:
    extra = {"top_k": 7, "top_p": None, "max_tokens": None, "max_completion_tokens": 9}
    with scripted(echo) as server:
        recipe = recipe_for(
            model, tmp_path, server.url, extra=extra, stop=["###"], responses={"temperature": 0.7}
        )
        answers(recipe)
    bodies = {number(asked): asked.body for asked in server.asked}
    assert bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q0"},
    ]
    assert bodies[1]["messages"] == [{"role": "user", "content": "Q1 fig fig"}]
    seeds = {body.pop("seed") for body in bodies.values() if body.pop("messages")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    common = {"model": "small", "temperature": 0.7, "stop": ["###"], "top_k": 7, "max_completion_tokens": 9}
    assert all(body == common for body in bodies.values())


class Outage:
    """Gives so many answers, then 503."""

    def __init__(self, answers: float) -> None:
        self.left = answers

    def __call__(self, asked: Asked) -> Act:
        self.left -= 1
        return echo(asked) if self.left >= 0 else Act({"detail": "down"}, 503)


def test_an_interrupted_run_asks_for_the_rest_alone(model: Path, tmp_path: Path) -> None:
    outage = Outage(7)
    with scripted(outage) as server:
        options = {"data": {"shard_size": 5}, "concurrency": 1, "max_retries": 0}
        recipe = recipe_for(model, tmp_path, server.url, examples=12, **options)
        with pytest.raises(UserError, match=r"503 down.*The answers received so far are kept"):
            generate_responses(Context(recipe), "served")
        _, begun = journals(recipe)  # five answers, two answers
        begun.write_bytes(begun.read_bytes()[:-9])  # a kill within the last line
        server.asked.clear()
        outage.left = 2
        with pytest.raises(UserError, match="503 down"):
            generate_responses(Context(recipe), "served")
        outage.left = float("inf")
        interrupted = generate_responses(Context(recipe), "served")
        assert len(server.asked) == 12 - 5 - 1 + 1  # the one that met the second outage twice
        assert interrupted is not None
        assert not journals(recipe)

        shutil.rmtree(interrupted.directory)
        undisturbed = generate_responses(Context(recipe), "served")
        assert undisturbed is not None
        assert undisturbed.sha256 == interrupted.sha256


def test_a_damaged_journal_is_named(model: Path, tmp_path: Path) -> None:
    recipe = recipe_for(model, tmp_path, "http://localhost/v1")
    path = recipe.workdir / "responses/served/.answers-00000.tmp"
    path.parent.mkdir(parents=True)
    whole = json.dumps({"request": "a", "text": "a", "sha256": "0" * 64})
    for line in ("{", "[]", "[" * 100_000, '{"text": "a"}', '{"sha256": "a"}', whole):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=f"^{path}:1: damaged .*\. Remove the file"):
            generate_responses(Context(recipe), "served")


def test_progress_is_told_while_answers_come_in(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_fuse.sources.server._PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr("megatron_fuse.progress.INTERVAL", 0.0)
    told = threading.Event()

    def script(asked: Asked) -> Act:
        assert number(asked) < 5 or told.wait(20)
        return echo(asked)

    def note(progress: Progress, items: int, *rest: Any) -> None:
        update(progress, items, *rest)
        if items == 5:
            told.set()

    update = Progress.update
    monkeypatch.setattr(Progress, "update", note)
    with scripted(script) as server, logged() as lines:
        generate_responses(Context(recipe_for(model, tmp_path, server.url, concurrency=1)), "served")
    assert re.search(r"responses/served: 62%, 5/8 examples, nothing new for < 1 s$", lines.getvalue(), re.M)


@pytest.mark.parametrize(
    "changes, reused",
    [
        ({"responses": {"temperature": 0.5}}, 0),
        ({"responses": {"max_new_tokens": 9}}, 0),
        ({"extra": {"top_k": 3}}, 0),
        ({"stop": ["x"]}, 0),
        ({"model": "larger"}, 0),
        ({"concurrency": 3, "timeout": 9}, 3),
    ],
    ids=str,
)
def test_answers_to_another_question_are_not_reused(
    model: Path, tmp_path: Path, changes: dict[str, Any], reused: int
) -> None:
    """The answers of a first shard outlive its plan, so that a mended recipe is not bound by it."""
    outage = Outage(3)
    with scripted(outage, models=Act({"data": [{"id": "small"}, {"id": "larger"}]})) as server:
        with pytest.raises(UserError, match="503 down"):
            answers(recipe_for(model, tmp_path, server.url, concurrency=1, max_retries=0))
        outage.left = float("inf")
        server.asked.clear()
        answers(recipe_for(model, tmp_path, server.url, **changes))
    assert len(server.asked) == 8 - reused


def test_the_key_reaches_the_server_and_no_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FUSE_TEST_KEY", KEY)
    outage = Outage(3)
    with scripted(outage) as server:
        options = {"api_key_variable": "FUSE_TEST_KEY", "max_retries": 0, "concurrency": 1}
        recipe = recipe_for(model, tmp_path, server.url, **options)
        with pytest.raises(UserError):
            generate_responses(Context(recipe), "served")
        assert_nowhere(KEY, tmp_path, capfd)
        outage.left = float("inf")
        generate_responses(Context(recipe), "served")
    assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
    assert_nowhere(KEY, tmp_path, capfd)


def generate(recipe: Recipe) -> None:
    generate_responses(Context(recipe), "served")


def test_two_processes_do_not_ask_for_the_same_answers(model: Path, tmp_path: Path) -> None:
    """The second waits for the first."""
    asked_once, may_answer = threading.Event(), threading.Event()

    def script(asked: Asked) -> Act:
        asked_once.set()
        may_answer.wait(60)
        return echo(asked)

    def answer_if_it_waits(message: str) -> None:
        if "waiting for shard 0" in message:
            may_answer.set()

    with scripted(script) as server, at_messages_of_shards(logging.INFO, answer_if_it_waits):
        recipe = recipe_for(model, tmp_path, server.url, timeout=120)
        first = forked().Process(target=generate, args=(recipe,))  # two threads would share their locks
        first.start()
        try:
            assert asked_once.wait(60)
            generate(recipe)
            assert may_answer.is_set()
        finally:
            may_answer.set()
            first.join()
        assert first.exitcode == 0
        assert {row.response for row in answers(recipe).values()} == {f"answer {n}" for n in range(8)}
    assert len(server.asked) == 8


def test_a_journal_is_open_once(tmp_path: Path) -> None:
    path = tmp_path / ".answers-00000.tmp"
    with (
        open_journal(path),
        pytest.raises(UserError, match=r"answers-00000.tmp: another process requests the same answers"),
        open_journal(path),
    ):
        pass


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": "https://user:pass@host/v1"}, "url must not hold a user name, a password or a query"),
        ({"url": "https://host/v1?key=pass"}, "url must not hold a user name, a password or a query"),
        ({"url": "localhost:8000/v1"}, "url must be a base URL"),
        ({"extra": {"stream": True, "seed": 1}}, "extra must not have seed, stream"),
    ],
)
def test_options_that_are_refused(model: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"sources.served.server: {message}") as caught:
        recipe_for(model, tmp_path, options.pop("url", "http://localhost/v1"), **options)
    assert "pass@" not in str(caught.value)
    assert "=pass" not in str(caught.value)


def test_the_command_refuses_another_backend_than_the_recipes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    with scripted(echo) as server:
        recipe = recipe_for(model, tmp_path, server.url)
        path.write_text(recipe.model_dump_json(exclude_none=True))
        main = runpy.run_path(str(ROOT / "tools/generate_responses.py"))["main"]

        def command(*arguments: str) -> None:
            monkeypatch.setattr(sys, "argv", ["generate_responses.py", "--recipe", str(path), *arguments])
            main()

        with pytest.raises(
            UserError, match="--backend hf: in the recipe, 'served' answers by backend openai"
        ):
            command("--source", "local", "--source", "served", "--backend", "hf")
        assert not (recipe.workdir / "responses").exists()
        command()
        assert "no answers are needed" in capsys.readouterr().out  # the preset `fuse` has no inference mode
        command("--source", "served", "--backend", "openai")
    assert "examples: 8, tokens: " in capsys.readouterr().out
