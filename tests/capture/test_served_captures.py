"""Laws of captures from a server: they equal those of the same model in process up to rounding, and no answer
that is not certainly about our tokens and whole comes in.
"""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_server import Act, scripted
from local_teacher import Lie, LocalTeacher
from rank_pool import forked
from small_captures import Models, changed, fresh_recipe, read
from small_models import save_model, small_recipe

from megatron_fuse.capture import CAPTURES, CaptureShard, capture, require_backend
from megatron_fuse.claiming import LEASE
from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import prepare_instructions
from megatron_fuse.recipe import Recipe, ServerOptions, make_recipe
from megatron_fuse.stages import Context

SOURCE = "beta"
ROUNDING = 1e-4  # nats: fp32, other batches


@pytest.fixture
def fresh(world: tuple[Path, Models], tmp_path: Path) -> Recipe:
    """At temperature 1, where a server is exact."""
    return changed(fresh_recipe(world, tmp_path), loss={"teacher_temperature": 1.0})


@pytest.fixture(scope="module")
def teacher(world: tuple[Path, Models]) -> LocalTeacher:
    return LocalTeacher(world[1][SOURCE])


def at(recipe: Recipe, url: str, **options: Any) -> Recipe:
    """The recipe with this server, in a workdir of its own."""
    server = ServerOptions(**{"url": url, "model": "small", "timeout": 20, "max_retries": 0} | options)
    source = recipe.sources[SOURCE].model_copy(update={"backend": "server", "server": server})
    return recipe.model_copy(update={"sources": recipe.sources | {SOURCE: source}})


def lying(teacher: LocalTeacher, lie: Lie | None, **options: Any) -> LocalTeacher:
    """The teacher with other habits, without loading its model again."""
    other = object.__new__(LocalTeacher)
    other.__dict__ = {**teacher.__dict__, "lie": lie, "lies_from": 0, "requests": [], **options}
    return other


def assert_equal_up_to_rounding(served: list[CaptureShard], expected: list[CaptureShard]) -> int:
    """Everything is equal but for rounding. Returns the number of rows that were compared."""
    rows = 0
    for a, b in zip(served, expected, strict=True):
        for name in ("offsets", "status", "tokens", "starts", "ends", "flags", "response_bytes", "lossy"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        for name in ("token_logprobs", "lse", "ce_sum", "ce_stop"):
            many = 100 if name.startswith("ce") else 1  # a sum over the tokens of a response
            np.testing.assert_allclose(
                getattr(a, name), getattr(b, name), atol=many * ROUNDING, rtol=0, err_msg=name
            )
        np.testing.assert_array_equal(a.counts, b.counts)
        np.testing.assert_allclose(a.entry_logits, b.entry_logits, atol=ROUNDING, rtol=0)
        # Ids may only differ where their neighbours are as likely up to rounding.
        gaps = np.abs(np.diff(b.entry_logits, prepend=np.inf, append=-np.inf))
        clear = np.minimum(gaps[:-1], gaps[1:]) > ROUNDING
        assert clear.mean() > 0.9, "the case tells nothing"
        np.testing.assert_array_equal(a.entry_ids[clear], b.entry_ids[clear])
        rows += len(a.counts)
    return rows


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_served_model_gives_the_rows_of_the_model_in_process(
    fresh: Recipe, teacher: LocalTeacher, tmp_path: Path, engine: str, mode: str
) -> None:
    capture(Context(fresh), SOURCE, mode)
    expected = read(fresh, SOURCE, mode)
    asks = lying(teacher, None)
    with scripted(asks) as server:
        recipe = at(fresh, server.url, engine=engine).model_copy(update={"workdir": tmp_path / "served"})
        _copy(fresh, recipe)
        artifact = capture(Context(recipe), SOURCE, mode)
    assert artifact is not None and artifact.manifest["options"]["engine"] == engine
    assert assert_equal_up_to_rounding(read(recipe, SOURCE, mode), expected) > 100
    assert 1 < server.most_at_once <= 16
    key = "prompt" if engine == "vllm" else "input_ids"
    assert all(isinstance(body[key][0], int) for body in asks.requests)  # ids, never text
    assert len(asks.requests) == 1 + artifact.counts["captured"]
    assert not list((recipe.workdir / "captures").rglob(".probe*"))


def _copy(recipe: Recipe, other: Recipe) -> None:
    for name in ("instructions", "responses"):
        shutil.copytree(recipe.workdir / name, other.workdir / name)


def _vllm_positions(content: dict[str, Any]) -> list[dict[str, Any]]:
    return content["choices"][0]["prompt_logprobs"]


def _label(content: dict[str, Any], **values: Any) -> None:
    """Says something else of the last token of the prompt."""
    token = content["choices"][0]["prompt_token_ids"][-1]
    _vllm_positions(content)[-1][str(token)] |= values


def _few(content: dict[str, Any]) -> None:
    for position in _vllm_positions(content)[1:]:
        for key in list(position)[6:]:
            del position[key]


def _misspell(content: dict[str, Any]) -> None:
    for position in _vllm_positions(content)[1:]:
        for entry in position.values():
            entry["decoded_token"] = entry["decoded_token"].swapcase()


def _unspelled(content: dict[str, Any]) -> None:
    for position in _vllm_positions(content)[1:]:
        for entry in position.values():
            entry["decoded_token"] = None


def _other_ids(content: dict[str, Any]) -> None:
    choice = content["choices"][0]
    choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]
    choice["prompt_logprobs"] = [None, *choice["prompt_logprobs"][2:]]


def _doubled(content: dict[str, Any]) -> None:
    for position in _vllm_positions(content)[1:]:
        for entry in position.values():
            entry["logprob"] *= 0.1


def _nan(content: dict[str, Any]) -> Act:
    _label(content, logprob=float("nan"))
    return Act(json.dumps(content))  # as NaN, which some libraries write


# The lie, whether the probe is true, and what the error says
LIES: dict[str, tuple[Lie, bool, str]] = {
    "NaN": (_nan, True, r"to example 'e\d+' cannot be used: .*NaN"),
    "null": (lambda c: _label(c, logprob=None), True, r"of example 'e\d+': .*logprob.*valid number"),
    "probability 0": (
        lambda c: _label(c, logprob=-9999.0),
        True,
        r"to example 'e\d+' cannot be used: .* has a log-probability below -1000, which means probability 0",
    ),
    "too few": (_few, True, r"has only \d entries for a token, but capture.top_k asks for 10\. Fix"),
    "raw logits": (_doubled, True, r"more probability than one"),
    "cut": (lambda c: _vllm_positions(c).pop(), True, r"has \d+ items, but prompt_token_ids has \d+"),
    "other tokens": (_other_ids, True, r"about other tokens than those that were sent: token 0 of the"),
    "no log-probabilities": (
        lambda c: c["choices"][0].update(prompt_logprobs=None),
        False,
        r"refuses every request .*no prompt_logprobs .*start vLLM with --max-logprobs 10",
    ),
    "another tokenizer": (_misspell, False, r"spells token \d+ as .*it has another tokenizer\. Start the"),
    "no tokenizer": (_unspelled, False, r"does not spell the tokens of its prompt"),
    "another model": (
        lambda c: c.update(model="large"),
        False,
        r"answers as model 'large', but the requested model is 'small'",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_an_answer_that_cannot_be_true_ends_the_capture(
    fresh: Recipe, teacher: LocalTeacher, name: str
) -> None:
    lie, true_probe, message = LIES[name]
    with scripted(lying(teacher, lie, lies_from=int(true_probe))) as server:
        # One at a time, and a trial is told the truth after the first lie.
        recipe = at(fresh, server.url, concurrency=1)
        if name in ("null", "cut"):
            server.script = _lies_once(teacher, lie)
        with pytest.raises(UserError, match=message) as caught:
            capture(Context(recipe), SOURCE, "training")
    assert str(caught.value).startswith(f"sources.{SOURCE}.server: ")
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


def _lies_once(teacher: LocalTeacher, lie: Lie) -> LocalTeacher:
    """Lies about the first example, and answers the trial after it."""
    other = lying(teacher, None, lies_from=1)

    def lie_once(content: dict[str, Any]) -> object:
        return lie(content) if len(other.requests) == 2 else None

    other.lie = lie_once
    return other


@pytest.mark.parametrize("name", ["null", "too few", "cut", "other tokens"])
def test_sglang_s_answers_are_checked_too(fresh: Recipe, teacher: LocalTeacher, name: str) -> None:
    def lie(content: dict[str, Any]) -> None:
        info = content["meta_info"]
        own, tops = info["input_token_logprobs"], info["input_top_logprobs"]
        match name:
            case "null":
                own[-1][0] = None
            case "too few":
                tops[-1] = tops[-1][:4]
            case "cut":
                own.pop()
                tops.pop()
            case "other tokens":
                own[-1][1] += 1

    messages = {
        "null": r"of example 'e\d+': .*log-probability of null",
        "too few": r"only 4 entries for a token, .*or start SGLang with --context-length 257",
        "cut": r"other tokens than those that were sent: token \d+ of the conversation is missing",
        "other tokens": r"other tokens than those that were sent",
    }
    teaches = _lies_once(teacher, lie) if name == "null" else lying(teacher, lie, lies_from=1)
    with scripted(teaches) as server:
        recipe = at(fresh, server.url, concurrency=1, engine="sglang")
        with pytest.raises(UserError, match=messages[name]):
            capture(Context(recipe), SOURCE, "training")


def test_limits_of_the_server_are_named_with_the_fix(fresh: Recipe, teacher: LocalTeacher) -> None:
    with (
        scripted(lying(teacher, None, most_logprobs=5)) as server,
        pytest.raises(
            UserError, match=r"400 Requested prompt logprobs of 10, .*max allowed: 5.*--max-logprobs 10"
        ),
    ):
        capture(Context(at(fresh, server.url)), SOURCE, "training")
    truthful = lying(teacher, None)
    with scripted(truthful) as server:
        capture(Context(at(fresh, server.url)), SOURCE, "training")
    probe, *others = (len(body["prompt"]) for body in truthful.requests)
    assert probe < max(others), "the case tells nothing"
    shutil.rmtree(fresh.workdir / "captures")
    with (
        scripted(lying(teacher, None, most_tokens=max(others))) as server,
        pytest.raises(
            UserError,
            match=r"no distributions of example 'e\d+': 400 This model's maximum context length is "
            r".*--max-model-len 257",
        ),
    ):
        capture(Context(at(fresh, server.url)), SOURCE, "training")
    shutil.rmtree(fresh.workdir / "captures")
    with (
        scripted(lambda _: Act({"detail": "Not Found"}, 404)) as server,
        pytest.raises(
            UserError,
            match=r"nothing at /generate .*Fix sources.beta.server.model, "
            r"sources.beta.server.engine, or",
        ),
    ):
        capture(Context(at(fresh, server.url, engine="sglang")), SOURCE, "training")


def test_an_interrupted_capture_continues_with_the_next_shard_and_the_same_model(
    fresh: Recipe, teacher: LocalTeacher, world: tuple[Path, Models], tmp_path: Path
) -> None:
    def break_later(content: dict[str, Any]) -> Act | None:
        return Act({"detail": "restarting"}, 503) if len(breaks.requests) > 8 else None

    breaks = lying(teacher, break_later)
    with scripted(breaks) as server:
        recipe = at(fresh, server.url, concurrency=1)
        with pytest.raises(UserError, match=r"503 restarting.*Finished shards are kept"):
            capture(Context(recipe), SOURCE, "training")
    done = len(list((recipe.workdir / "captures").rglob("*.done")))
    assert done == 1  # five examples each
    other = save_model(tmp_path / "other", "gpt_neox", seed=9, positions=256)
    changed_model = pytest.raises(UserError, match=r"differ by \d.* nats on average .*another model now")
    with scripted(LocalTeacher(other)) as server, changed_model:
        capture(Context(at(fresh, server.url)), SOURCE, "training")
    again = lying(teacher, None)
    with scripted(again) as server:
        artifact = capture(Context(at(fresh, server.url)), SOURCE, "training")
    assert artifact is not None and artifact.counts["captured"] == 13
    assert len(again.requests) == 1 + 13 - 5


def _capture_by_claim(content: dict[str, Any]) -> None:
    """In a process of its own."""
    os.environ[LEASE] = "60"
    capture(Context(make_recipe(content)), SOURCE, "training")


def test_two_processes_capture_by_claim_from_one_server(
    fresh: Recipe, teacher: LocalTeacher, tmp_path: Path
) -> None:
    capture(Context(fresh), SOURCE, "training")
    with scripted(lying(teacher, None)) as server:
        recipe = at(fresh, server.url).model_copy(update={"workdir": tmp_path / "served"})
        _copy(fresh, recipe)
        content = recipe.model_dump(mode="json", by_alias=True)
        with ProcessPoolExecutor(2, forked()) as pool:
            list(pool.map(_capture_by_claim, [content] * 2))
    expected = read(fresh, SOURCE, "training")
    assert assert_equal_up_to_rounding(read(recipe, SOURCE, "training"), expected) > 100
    made = recipe.workdir / "captures" / SOURCE / "training"
    assert len(list(made.glob("*.done"))) == len(expected) == 3


def test_the_address_does_not_identify_a_capture_and_the_model_does(
    fresh: Recipe, teacher: LocalTeacher
) -> None:
    with scripted(lying(teacher, None)) as server:
        artifact = capture(Context(at(fresh, server.url)), SOURCE, "training")
    moved = at(fresh, "http://localhost:1/v1", concurrency=3, timeout=1)
    assert Context(moved).open(CAPTURES, SOURCE, "training") == artifact
    for options in ({"model": "large"}, {"engine": "sglang"}):
        with pytest.raises(UserError, match=next(iter(options))):
            Context(at(fresh, server.url, **options)).open(CAPTURES, SOURCE, "training")
    with pytest.raises(UserError, match="backend"):
        Context(fresh).open(CAPTURES, SOURCE, "training")


def test_at_another_temperature_ratios_are_exact(
    world: tuple[Path, Models], teacher: LocalTeacher, tmp_path: Path
) -> None:
    """Rows that differ by a factor alone are equal after `loss.tail: renormalize`."""
    fresh = changed(fresh_recipe(world, tmp_path), loss={"teacher_temperature": 2.0, "tail": "renormalize"})
    capture(Context(fresh), SOURCE, "training")
    with scripted(lying(teacher, None)) as server:
        recipe = at(fresh, server.url).model_copy(update={"workdir": tmp_path / "served"})
        _copy(fresh, recipe)
        capture(Context(recipe), SOURCE, "training")
    for a, b in zip(read(recipe, SOURCE, "training"), read(fresh, SOURCE, "training"), strict=True):
        np.testing.assert_allclose(a.lse[:, 0], b.lse[:, 0], atol=ROUNDING)
        assert (a.lse[:, 1] < b.lse[:, 1]).mean() > 0.9, "the case tells nothing"
        served, whole = (
            shard.logprobs(1, 2.0) + np.repeat(shard.lse[:, 1], shard.counts) for shard in (a, b)
        )
        np.testing.assert_allclose(served, whole, atol=ROUNDING)
        kept = np.bincount(np.repeat(np.arange(len(a.counts)), a.counts), np.exp(a.logprobs(1, 2.0)))
        assert (kept <= 1 + 1e-5).all()


@pytest.mark.parametrize(("temperature", "tail"), [(1.0, "bucket"), (2.0, "renormalize")])
def test_fusion_data_differ_by_rounding_alone(
    world: tuple[Path, Models], teacher: LocalTeacher, tmp_path: Path, temperature: float, tail: str
) -> None:
    """The rows that the loss sees: as they are, or divided by their mass."""
    root, models = world
    documents = []
    with scripted(lying(teacher, None)) as server:
        for backend in ("hf", "server"):
            recipe = small_recipe(
                tmp_path / backend,
                root / "data.jsonl",
                models["target"],
                {SOURCE: {"model": str(models[SOURCE]), "backend": backend,
                          "server": {"url": server.url, "model": "small"}}},
                loss={"teacher_temperature": temperature, "tail": tail},
                data={"shard_size": 5},
                training={"seq_length": 255},
            )  # fmt: skip
            target = recipe.target.model_copy(update={"chat_template": "vicuna_v1.1"})
            recipe = recipe.model_copy(update={"target": target})
            prepare_instructions(Context(recipe))
            capture(Context(recipe), SOURCE, "training")
            build_fusion_data(Context(recipe))
            dataset = FusionDataset(recipe)
            documents.append([dataset.document("training", n, SOURCE) for n in range(13)])
    compared = 0
    for a, b in zip(*documents, strict=True):
        np.testing.assert_array_equal(a.counts, b.counts)
        np.testing.assert_array_equal(a.match, b.match)
        rows = np.repeat(np.arange(len(a.counts)), a.counts)
        # Entries of a row by id: equally likely ones may come in another order.
        one, two = (np.lexsort((each.teacher_ids, rows)) for each in (a, b))
        np.testing.assert_array_equal(a.teacher_ids[one], b.teacher_ids[two])
        logprobs = [each.teacher_logprobs.astype(np.float64) for each in (a, b)]
        if tail == "renormalize":
            logprobs = [each - np.log(np.bincount(rows, np.exp(each))[rows]) for each in logprobs]
        # They are kept in half precision: a step is 2**-10 of the value.
        np.testing.assert_allclose(logprobs[0][one], logprobs[1][two], rtol=2e-3, atol=4e-3)
        compared += len(rows)
    assert compared > 150


SERVER = {"url": "http://localhost:8000/v1", "model": "served"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, r"at temperature 1 only\. loss.tail bucket needs .*teacher_temperature 2 too\. Set .* to 1, or "
             r"loss.tail to renormalize"),
        ({"loss": {"tail": "ignore"}}, r"loss.tail ignore needs"),
        (
            {"loss": {"tail": "renormalize"}, "alignment": {"unmatched": "condition"}},
            r"alignment.unmatched condition needs .*or alignment.unmatched to skip",
        ),
        (
            {"loss": {"tail": "renormalize"}, "selection": {"training": "average"}},
            r"selection.training average needs .*or selection.training to sum",
        ),
        ({"loss": {"tail": "renormalize"}}, None),
        ({"loss": {"teacher_temperature": 1.0}, "alignment": {"unmatched": "condition"}}, None),
        ({"loss": {"teacher_temperature": 1.0, "tail": "ignore"}}, None),
    ],
)  # fmt: skip
def test_what_a_server_cannot_give_is_refused_with_the_recipe(
    sections: dict[str, Any], message: str | None
) -> None:
    served = {"model": "m", "backend": "server", "server": SERVER}
    sources: dict[str, object] = {"a": served, "b": "other"}
    if message is None:
        small_recipe(Path("w"), Path("d"), Path("t"), sources, **sections)
        return
    with pytest.raises(UserError, match=message) as caught:
        small_recipe(Path("w"), Path("d"), Path("t"), sources, **sections)
    assert "..." not in str(caught.value)  # the message is whole
    files = {"captures": {"training": "f"}}
    small_recipe(Path("w"), Path("d"), Path("t"), {"a": served | files, "b": "other"}, **sections)


def test_a_backend_has_what_it_needs(fresh: Recipe) -> None:
    content = fresh.model_dump(mode="json", by_alias=True)
    content["sources"][SOURCE] |= {"backend": "server", "responses": None}
    with pytest.raises(UserError, match=r"backend is server, but server is not set"):
        make_recipe(content)
    # Answers of a file, and captures of a server
    content["sources"][SOURCE] |= {"server": SERVER, "responses": {"path": "answers.jsonl"}}
    recipe = make_recipe(content)
    require_backend(recipe, SOURCE, "training", "server")
    with pytest.raises(UserError, match=r"--backend hf: sources.beta.backend is server\. Change it"):
        require_backend(recipe, SOURCE, "training", "hf")
