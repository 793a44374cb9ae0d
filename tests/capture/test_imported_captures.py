"""Laws of imported captures: what our own capture says in another program's form comes back the same, and
nothing else comes in.
"""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from capture_forms import FORMS, Row
from log_lines import logged
from pyarrow import parquet
from small_captures import Models, build_world, changed, fresh_recipe, read
from small_models import write_rows

from megatron_fuse.capture import CAPTURES, STATUSES, CaptureShard, capture, require_backend
from megatron_fuse.capture.forms import given_rows
from megatron_fuse.capture.row_files import open_rows
from megatron_fuse.capture.stage import conversation_of
from megatron_fuse.chat import EncodedConversation
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import INSTRUCTIONS, example_shards
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import RESPONSES, response_shards
from megatron_fuse.responses.answers import learned_of
from megatron_fuse.stages import Context

SOURCE = "beta"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models]:
    return build_world(tmp_path_factory.mktemp("imported"))


@pytest.fixture
def fresh(world: tuple[Path, Models], tmp_path: Path) -> Recipe:
    return changed(fresh_recipe(world, tmp_path), capture={"top_p": 1.0})


def conversations(recipe: Recipe, mode: str) -> list[tuple[str, EncodedConversation | None]]:
    chat = load_format(recipe.sources[SOURCE], SOURCE)
    examples = [example for shard in example_shards(Context(recipe).open(INSTRUCTIONS)) for example in shard]
    answers = [None] * len(examples)
    if mode == "inference":
        answers = [
            answer for shard in response_shards(Context(recipe).open(RESPONSES, SOURCE)) for answer in shard
        ]
    return [
        (
            example.id,
            conversation_of(
                chat, example, answer and learned_of(answer, "template"), every_turn=mode == "training"
            ).encoded,
        )
        for example, answer in zip(examples, answers, strict=True)
    ]


def export(recipe: Recipe, form: str, mode: str = "training", *, logsumexp: bool = True) -> list[Row]:
    """Our own capture in another program's form, one row for every example that was captured."""
    rows = []
    place = [(shard, index) for shard in read(recipe, SOURCE, mode) for index in range(len(shard.status))]
    for (name, conversation), (shard, index) in zip(conversations(recipe, mode), place, strict=True):
        span = shard.rows(index)
        if conversation is None or span.start == span.stop:
            continue
        bounds = np.concatenate([[0], np.cumsum(shard.counts, dtype=np.int64)])[span.start : span.stop + 1]
        ids = [shard.entry_ids[a:b].tolist() for a, b in pairwise(bounds)]
        lse = shard.lse[span].astype(np.float64)
        logits = [shard.entry_logits[a:b].astype(np.float64) for a, b in pairwise(bounds)]
        logprobs = [(values - lse[row, 0]).tolist() for row, values in enumerate(logits)]
        own = shard.token_logprobs[span].astype(np.float64).tolist()
        sums = {
            f"{t:g}": lse[:, column].tolist() for column, t in enumerate([1.0, *recipe.capture_temperatures])
        }
        rows.append({"id": name, **FORMS[form](conversation, ids, logprobs, own, sums if logsumexp else {})})
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix != ".parquet":
        return write_rows(path, rows)
    mapping = pa.map_(pa.string(), pa.struct([("logprob", pa.float64()), ("rank", pa.int64())]))
    columns = {
        name: pa.array([row.get(name) for row in rows], mapping_type(name, mapping)) for name in rows[0]
    }
    parquet.write_table(pa.table(columns), path, row_group_size=4)
    return path


def mapping_type(name: str, mapping: pa.DataType) -> pa.DataType | None:
    if name == "prompt_logprobs":
        return pa.list_(mapping)
    return pa.map_(pa.string(), pa.list_(pa.float64())) if name == "logsumexp" else None


def with_file(recipe: Recipe, path: Path, mode: str = "training") -> Recipe:
    """The recipe with captures from a file, in a workdir of its own."""
    workdir = path.with_name(f"{path.name}.run")
    for name in ("instructions", "responses"):
        shutil.copytree(recipe.workdir / name, workdir / name)
    options = recipe.sources[SOURCE].model_copy(update={"captures": {mode: path}})
    return recipe.model_copy(update={"workdir": workdir, "sources": recipe.sources | {SOURCE: options}})


def assert_same_rows(found: list[CaptureShard], expected: list[CaptureShard]) -> None:
    for a, b in zip(found, expected, strict=True):
        for name in vars(b):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# OpenAI's form is JSON as it comes from a server; nobody has it in columns.
@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        (form, suffix)
        for form in FORMS
        for suffix in ("jsonl", "parquet")
        if (form, suffix) != ("openai", "parquet")
    ],
)
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_our_own_capture_in_another_form_comes_back_bit_for_bit(
    fresh: Recipe, tmp_path: Path, form: str, suffix: str, order: str
) -> None:
    capture(Context(fresh), SOURCE, "training")
    rows = export(fresh, form)
    if order == "shuffled":
        np.random.default_rng(4).shuffle(rows)
    recipe = with_file(fresh, write(tmp_path / f"{form}.{suffix}", rows))
    artifact = capture(Context(recipe), SOURCE, "training")
    assert artifact is not None and artifact.counts["captured"] == 13
    assert_same_rows(read(recipe, SOURCE, "training"), read(fresh, SOURCE, "training"))


def test_the_sources_own_answers_come_in_too(fresh: Recipe, tmp_path: Path) -> None:
    """With truncated answers, which have no stop token, and with examples that have none."""
    capture(Context(fresh), SOURCE, "inference")
    recipe = with_file(fresh, write(tmp_path / "own.jsonl", export(fresh, "ours", "inference")), "inference")
    capture(Context(recipe), SOURCE, "inference")
    expected = read(fresh, SOURCE, "inference")
    assert {STATUSES[code] for shard in expected for code in shard.status} == {"captured", "no_response"}
    assert_same_rows(read(recipe, SOURCE, "inference"), expected)


@pytest.mark.parametrize("filter", ["full_vocabulary", "hugging_face"])
@pytest.mark.parametrize(("top_k", "top_p"), [(10, 0.3), (3, 1.0), (5, 0.28)])
def test_a_file_is_truncated_as_a_model_s_rows_are(
    fresh: Recipe, tmp_path: Path, filter: str, top_k: int, top_p: float
) -> None:
    capture(Context(fresh), SOURCE, "training")
    wanted = {"top_k": top_k, "top_p": top_p, "filter": filter}
    recipe = changed(with_file(fresh, write(tmp_path / "all.jsonl", export(fresh, "ours"))), capture=wanted)
    capture(Context(recipe), SOURCE, "training")
    shutil.rmtree(fresh.workdir / "captures")
    direct = changed(fresh, capture=wanted)
    capture(Context(direct), SOURCE, "training")
    expected = read(direct, SOURCE, "training")
    assert len({count for shard in expected for count in shard.counts.tolist()}) > (top_p < 1), (
        "nothing was cut"
    )
    assert_same_rows(read(recipe, SOURCE, "training"), expected)


@pytest.mark.parametrize("form", FORMS)
def test_another_temperature_than_1_needs_its_log_sum_exp(fresh: Recipe, tmp_path: Path, form: str) -> None:
    capture(Context(fresh), SOURCE, "training")
    recipe = with_file(fresh, write(tmp_path / "plain.jsonl", export(fresh, form, logsumexp=False)))
    with pytest.raises(
        UserError,
        match=r"plain.jsonl:1 \(id 'e0'\): logsumexp is not given at temperature 2, .*teacher_temperature "
        r"to 1",
    ):
        capture(Context(recipe), SOURCE, "training")
    at_one = changed(recipe, loss={"teacher_temperature": 1.0})
    capture(Context(at_one), SOURCE, "training")
    for found, expected in zip(
        read(at_one, SOURCE, "training"), read(fresh, SOURCE, "training"), strict=True
    ):
        np.testing.assert_array_equal(found.lse, expected.lse[:, [0, 0]])
        np.testing.assert_array_equal(found.entry_logits, expected.entry_logits)


def test_ranks_share_the_work_and_an_unchanged_file_is_not_read_again(
    fresh: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(Context(fresh), SOURCE, "training")
    path = write(tmp_path / "shared.jsonl", export(fresh, "ours"))
    recipe = with_file(fresh, path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert capture(Context(recipe), SOURCE, "training") is None
    monkeypatch.setenv("RANK", "0")
    artifact = capture(Context(recipe), SOURCE, "training")
    assert_same_rows(read(recipe, SOURCE, "training"), read(fresh, SOURCE, "training"))
    assert artifact is not None and capture(Context(recipe), SOURCE, "training") == artifact
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"inputs.captures file"):
        capture(Context(recipe), SOURCE, "training")
    path.unlink()
    assert Context(recipe).open(CAPTURES, SOURCE, "training") == artifact


def test_neither_weights_nor_positions_are_asked_of_a_model_that_others_have_run(
    fresh: Recipe, tmp_path: Path
) -> None:
    capture(Context(fresh), SOURCE, "training")
    recipe = with_file(fresh, write(tmp_path / "far.jsonl", export(fresh, "ours")))
    directory = tmp_path / "tokenizer only"
    shutil.copytree(recipe.sources[SOURCE].model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    options = recipe.sources[SOURCE].model_copy(update={"model": str(directory)})
    recipe = recipe.model_copy(update={"sources": {SOURCE: options}})
    capture(Context(recipe), SOURCE, "training")
    assert_same_rows(read(recipe, SOURCE, "training"), read(fresh, SOURCE, "training"))
    with pytest.raises(
        UserError, match=r"--backend hf: sources.beta.captures.training names a file\. Remove it"
    ):
        require_backend(recipe, SOURCE, "training", "hf")
    require_backend(recipe, SOURCE, "training", "file")


def test_examples_without_a_row_and_rows_about_other_tokens_are_counted(
    fresh: Recipe, tmp_path: Path
) -> None:
    capture(Context(fresh), SOURCE, "training")
    rows = export(fresh, "ours")
    del rows[4]
    token = rows[7]["token_ids"][2]
    rows[7]["token_ids"][2] = token + 1
    # One token more than the response has.
    for name in ("token_ids", "top_ids", "top_logprobs", "token_logprobs"):
        rows[9][name].append(rows[9][name][-1])
    del rows[9]["logsumexp"]
    recipe = with_file(fresh, write(tmp_path / "some.jsonl", rows))
    with logged("warning") as text:
        artifact = capture(Context(recipe), SOURCE, "training")
    lines = text.getvalue().splitlines()
    assert artifact is not None
    counts = {name: artifact.counts[name] for name in STATUSES}
    assert counts == {"captured": 10, "too_long": 0, "no_response": 0, "mismatch": 2, "missing": 1}
    assert any(
        f"id 'e8'): token 2 of the response is {token + 1} (" in line and f"tokenizer gives {token} (" in line
        for line in lines
    )
    assert any("id 'e10')" in line and "tokenizer gives missing" in line for line in lines)
    expected = read(fresh, SOURCE, "training")
    for shard, whole in zip(read(recipe, SOURCE, "training"), expected, strict=True):
        for index in np.flatnonzero(shard.status == 0):
            assert shard.ce_sum[index] == whole.ce_sum[index]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_about_other_tokens_is_refused_with_both(fresh: Recipe, tmp_path: Path, form: str) -> None:
    """Every response is a token off, as if the template were another."""
    capture(Context(fresh), SOURCE, "training")
    rows = export(fresh, form)
    for row in rows:
        tokens = {"ours": "token_ids", "distill_kit": "input_ids", "vllm": "prompt_token_ids"}.get(form)
        if tokens:
            row[tokens][1] += 1
            if form == "vllm":
                row["prompt_logprobs"][1] = {str(row[tokens][1]): {"logprob": -1.0, "rank": 1}}
        else:
            row["choices"][0]["logprobs"]["tokens"][1] = "token_id:77"
    recipe = with_file(fresh, write(tmp_path / "other.jsonl", rows))
    with pytest.raises(
        UserError,
        match=r"other.jsonl:1 \(id 'e0'\): token 1 of the .* tokenizer gives .*in 5 of 5 rows the",
    ):
        capture(Context(recipe), SOURCE, "training")
    assert not list(recipe.workdir.glob("captures/*/*/shard*"))


def test_entries_whose_rounded_mass_is_a_little_above_one_leave_no_tail_below_zero(
    fresh: Recipe, tmp_path: Path
) -> None:
    capture(Context(fresh), SOURCE, "training")
    rows = export(fresh, "ours")
    for row in rows:  # two entries that hold everything, in three digits
        for place, token in enumerate(row["token_ids"]):
            row["top_ids"][place], row["top_logprobs"][place] = (
                [token, (token + 1) % 256],
                [-0.713, -0.673][::-1],
            )
            row["token_logprobs"][place] = None
        sums = {t: float(np.logaddexp(0, -0.04 / t)) for t in (1.0, 2.0)}
        row["logsumexp"] = {f"{t:g}": [value] * len(row["token_ids"]) for t, value in sums.items()}
        row["logsumexp"]["1"] = [0.673] * len(row["token_ids"])
    assert np.exp([-0.713, -0.673]).sum() > 1.0001
    recipe = with_file(fresh, write(tmp_path / "rounded.jsonl", rows))
    capture(Context(recipe), SOURCE, "training")
    for shard in read(recipe, SOURCE, "training"):
        for column, temperature in ((0, 1.0), (1, 2.0)):
            row = np.repeat(np.arange(len(shard.counts)), shard.counts)
            mass = np.bincount(row, np.exp(shard.logprobs(column, temperature).astype(np.float64)))
            assert (mass > 0.9).all() and mass.max() <= 1 + 1e-6


def shift(row: Row) -> None:
    """The classic: row t is about token t, not t + 1. In every row the token that came is the likeliest."""
    for place, token in enumerate(row["token_ids"]):
        others = [name for name in row["top_ids"][place] if name != token]
        row["top_ids"][place] = [token, *others][: len(row["top_ids"][place])]
        row["token_logprobs"][place] = row["top_logprobs"][place][0]
    for name in ("top_ids", "top_logprobs"):
        row[name].insert(0, row[name].pop())


def absolute(row: Row) -> None:
    row["logsumexp"] = {t: [value + 7 for value in values] for t, values in row["logsumexp"].items()}


def without_own(row: Row) -> None:
    row["token_logprobs"] = [None] * len(row["token_ids"])


def too_much(row: Row) -> None:
    """Two entries with .95 of the mass, and a token that is neither with .4 more."""
    two = [token for token in row["top_ids"][3] if token != row["token_ids"][3]][:2]
    row["top_ids"][3], row["top_logprobs"][3] = two, np.log([0.5, 0.45]).tolist()
    row["token_logprobs"][3] = float(np.log(0.4))
    del row["logsumexp"]


def put(name: str, *place: Any, value: Any) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        target = row[name]
        for step in place[:-1]:
            target = target[step]
        target[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shift, "the rows are shifted by one token"),
        (absolute, "logsumexp is not relative to the largest logit"),
        (too_much, "is not an entry, but its probability and those of the entries add up to more than one"),
        (without_own, "is not an entry, and token_logprobs does not give"),
        (put("top_logprobs", 3, 0, value=float("nan")), "response row 3 has a log-probability that is NaN"),
        (put("top_logprobs", 3, 1, value=0.2), "response row 3 has more probability than one"),
        (
            put("top_logprobs", 3, 1, value=float("inf")),
            "response row 3 has a log-probability that is infinite",
        ),
        (put("top_logprobs", 3, 1, value="NaN"), "top_logprobs.3.1: must be a valid number, not 'NaN'"),
        (put("top_logprobs", 3, 1, value=None), "top_logprobs.3.1: must be a valid number, not None"),
        (put("top_logprobs", 3, 1, value="a lot"), "top_logprobs.3.1: must be a valid number, not 'a lot'"),
        (put("top_logprobs", 3, 1, value=[-1.0]), "top_logprobs.3.1: must be a valid number, not .-1.0."),
        (put("top_logprobs", 3, 1, value=False), "top_logprobs.3.1: must be a valid number, not False"),
        (put("token_logprobs", 3, value=True), "token_logprobs.3: must be a valid number, not True"),
        (put("top_logprobs", 3, value=[-1.0]), "token 3 has 10 ids, but 1 log-probabilities"),
        (put("top_ids", 2, 4, value=10**5), "response row 2 has an id that is not one of the model's"),
        (put("top_ids", 2, 4, value=-1), "response row 2 has an id that is not one of the model's"),
        (put("top_ids", 2, 4, value=1.5), "top_ids.2.4: must be a valid integer, not 1.5"),
        (put("top_ids", 2, 4, value=True), "top_ids.2.4: must be a valid integer, not True"),
        (put("top_ids", 2, 4, value=[[1]]), r"top_ids.2.4: must be a valid integer, not \[\[1\]\]"),
        (put("top_ids", 2, 4, value=2**64), "18446744073709551616 is too large for a token id"),
        (put("token_ids", 1, value=3.0), "token_ids.1: must be a valid integer, not 3.0"),
        (put("token_ids", 1, value="x" * 5000), "token_ids.1: must be a valid integer, not 'xxx"),
        (
            lambda row: row["top_ids"][2].__setitem__(4, row["top_ids"][2][3]),
            "response row 2 has an id twice",
        ),
        (put("top_ids", 2, value=None), "top_ids.2: must be a valid list, not None .docs/captures.md"),
        (
            put("token_logprobs", 1, value=0.0),
            "token .* has another probability among the entries, or must be one",
        ),
        (
            put("token_logprobs", 1, value=float("nan")),
            "response row 1: token .* has a log-probability that is NaN",
        ),
        (
            put("token_logprobs", 1, value=float("inf")),
            "response row 1: token .* has a log-probability that is infinite",
        ),
        (put("token_logprobs", 1, value="NaN"), "token_logprobs.1: must be a valid number, not 'NaN'"),
        (
            put("logsumexp", "2", 3, value=0.0),
            "logsumexp is smaller than that of the entries alone .response row 3",
        ),
        (put("logsumexp", "2", 3, value=float("inf")), "logsumexp is not finite .response row 3"),
        (put("logsumexp", "2", 3, value=None), "logsumexp is not finite .response row 3"),
        (put("logsumexp", "2", 3, value=[]), "logsumexp.2.3: must be a valid number"),
        (
            lambda row: row["logsumexp"].update({"2.0": row["logsumexp"]["2"]}),
            "logsumexp: temperature 2 is given twice",
        ),
        (put("logsumexp", "nan", value=[]), "logsumexp: 'nan' is not a temperature"),
        (put("logsumexp", "-1", value=[]), "logsumexp: '-1' is not a temperature"),
        (lambda row: row["top_logprobs"].pop(), "top_logprobs has .* items, but there are .* tokens"),
        (lambda row: row.pop("token_logprobs"), "token_logprobs: missing"),
        (lambda row: row.pop("top_ids"), "the form of the row is not known: the row has id, token_ids"),
        (
            lambda row: (row.pop("top_ids"), row.update(compressed_logprobs=[[1]])),
            "DistillKit's compressed columns",
        ),
        (
            lambda row: (row.pop("top_ids"), row.update(prompt_logprobs=[None], prompt_token_ids=[1, 2])),
            "1 items, but prompt_token_ids has 2",
        ),
        (
            lambda row: (
                row.pop("top_ids"),
                row.update(
                    choices=[
                        {"logprobs": {"tokens": [" the"], "token_logprobs": [-1.0], "top_logprobs": [None]}}
                    ]
                ),
            ),
            "' the' is not a token id, .*return_tokens_as_token_ids",
        ),
    ],
)
def test_a_row_that_is_no_distribution_is_refused_by_place_and_id(
    captured: tuple[Recipe, str], tmp_path: Path, spoil: Callable[[Row], Any], message: str
) -> None:
    recipe, text = captured
    rows = [json.loads(line) for line in text.splitlines()]
    spoil(rows[2])
    with pytest.raises(UserError, match=rf"spoilt.jsonl:3 \(id 'e2'\): .*{message}"):
        capture(Context(with_file(recipe, write(tmp_path / "spoilt.jsonl", rows))), SOURCE, "training")


def entries_at(row: Row, form: str, place: int) -> dict[str, Any]:
    """What a server's row has of one token's alternatives, by id."""
    return (
        row["prompt_logprobs"][place]
        if form == "vllm"
        else row["choices"][0]["logprobs"]["top_logprobs"][place]
    )


def set_logprob(row: Row, form: str, place: int, token: int, value: Any) -> None:
    """As the server writes it: among the alternatives, and where the token came and the form has it, by
    itself.
    """
    if form == "vllm":
        entries_at(row, form, place)[str(token)]["logprob"] = value
        return
    given = row["choices"][0]["logprobs"]
    if f"token_id:{token}" in given["top_logprobs"][place]:
        given["top_logprobs"][place][f"token_id:{token}"] = value
    if given["tokens"][place] == f"token_id:{token}":
        given["token_logprobs"][place] = value


def last_alternative(row: Row, form: str, place: int, came: int) -> int:
    """The least likely alternative that did not come."""
    ids = [int(key.removeprefix("token_id:")) for key in entries_at(row, form, place)]
    return next(token for token in reversed(ids) if token != came)


# vLLM writes -9999.0 for -inf; what a file means by probability 0 must not depend on the number it chose
@pytest.mark.parametrize("zero", [-9999.0, -1000.5, -np.inf])
@pytest.mark.parametrize("form", ["vllm", "openai"])
def test_an_alternative_of_probability_0_is_absent(
    fresh: Recipe, tmp_path: Path, form: str, zero: float
) -> None:
    """The file with the number gives what the file without the alternative gives."""
    capture(Context(fresh), SOURCE, "training")
    chats = dict(conversations(fresh, "training"))
    rows, without = export(fresh, form), export(fresh, form)
    for row, other in zip(rows, without, strict=True):
        chat = chats[row["id"]]
        assert chat is not None
        for place in np.flatnonzero(chat.supervised).tolist():
            token = last_alternative(row, form, place, int(chat.ids[place]))
            set_logprob(row, form, place, token, zero)
            del entries_at(other, form, place)[str(token) if form == "vllm" else f"token_id:{token}"]
    found, expected = (
        with_file(fresh, write(tmp_path / name, content))
        for name, content in (("zero.jsonl", rows), ("no.jsonl", without))
    )
    for recipe in (found, expected):
        capture(Context(recipe), SOURCE, "training")
    assert_same_rows(read(found, SOURCE, "training"), read(expected, SOURCE, "training"))
    assert all((shard.counts < 10).all() for shard in read(found, SOURCE, "training"))


@pytest.mark.parametrize(
    ("which", "value", "message"),
    [
        (
            "label",
            -9999.0,
            "response row 1: token .* has a log-probability below -1000, which means probability 0",
        ),
        (
            "label",
            -np.inf,
            "response row 1: token .* has a log-probability below -1000, which means probability 0",
        ),
        *((which, np.nan, "has a log-probability that is NaN") for which in ("label", "alternative")),
        *((which, np.inf, "has a log-probability that is infinite") for which in ("label", "alternative")),
        *((which, "NaN", "must be a valid number, not 'NaN'") for which in ("label", "alternative")),
        *((which, None, "must be a .*number, not (null|None)") for which in ("label", "alternative")),
    ],
)
@pytest.mark.parametrize("form", ["vllm", "openai"])
def test_a_server_s_log_probability_that_cannot_be_is_refused_by_place_and_id(
    fresh: Recipe, tmp_path: Path, form: str, which: str, value: Any, message: str
) -> None:
    capture(Context(fresh), SOURCE, "training")
    rows = export(fresh, form)
    chat = dict(conversations(fresh, "training"))[rows[2]["id"]]
    assert chat is not None
    place = int(np.flatnonzero(chat.supervised)[1])
    label = int(chat.ids[place])
    token = label if which == "label" else last_alternative(rows[2], form, place, label)
    set_logprob(rows[2], form, place, token, value)
    recipe = with_file(fresh, write(tmp_path / "served.jsonl", rows))
    with pytest.raises(UserError, match=rf"served.jsonl:3 \(id 'e2'\): .*{message}"):
        capture(Context(recipe), SOURCE, "training")


@pytest.fixture(scope="module")
def captured(world: tuple[Path, Models], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, str]:
    """(recipe, its capture as JSONL in our form)"""
    recipe = changed(fresh_recipe(world, tmp_path_factory.mktemp("captured")), capture={"top_p": 1.0})
    capture(Context(recipe), SOURCE, "training")
    return recipe, "".join(json.dumps(row) + "\n" for row in export(recipe, "ours"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"token_ids": [1]}'], "file.jsonl:1: id is None, but a row needs the id of its example"),
        (['{"id": "e0"}', "", '{"top_k": 3, "id": "e0"}'], "file.jsonl:3: id 'e0' is in an earlier row too"),
        (['{"id": "e0"}', "not JSON"], "file.jsonl:2: not valid JSON"),
        (['{"id": "e0", "top_ids": [[1}'], "file.jsonl:1: not valid JSON"),
        (["[1, 2]"], "file.jsonl:1: a row must be a JSON object"),
        (['{"id": "unheard of"}', '{"id": 7}'], "none of its 2 ids is the id of an example .*is 'e0'"),
        ([], "none of its 0 ids is the id of an example"),
    ],
)
def test_a_file_without_rows_of_our_examples_is_refused(
    captured: tuple[Recipe, str], tmp_path: Path, lines: list[str], message: str
) -> None:
    recipe = with_file(captured[0], write_rows(tmp_path / "file.jsonl", lines))
    with pytest.raises(UserError, match=message):
        capture(Context(recipe), SOURCE, "training")


def test_a_file_that_is_not_there_or_no_parquet_is_refused(
    captured: tuple[Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "text.parquet", ["no parquet"])
    recipe = with_file(captured[0], path)
    with pytest.raises(UserError, match=r"text.parquet: cannot be read as Parquet"):
        capture(Context(recipe), SOURCE, "training")
    parquet.write_table(pa.table({"token_ids": [[1]]}), path)
    with pytest.raises(UserError, match=r"text.parquet: there is no column id, only token_ids"):
        capture(Context(recipe), SOURCE, "training")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"text.parquet: pyarrow is needed to read Parquet\. Run pip install pyarrow"
    ):
        capture(Context(recipe), SOURCE, "training")
    path.unlink()
    with pytest.raises(UserError, match=r"sources.beta.captures.training: .*text.parquet does not exist"):
        capture(Context(recipe), SOURCE, "training")
    with pytest.raises(
        UserError, match=r"--backend file: sources.beta.captures.inference is not set\. Name a file"
    ):
        require_backend(recipe, SOURCE, "inference", "file")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_any_rows_can_be_read_in_any_order_of_calls(tmp_path: Path, suffix: str) -> None:
    """Across batches and row groups, forwards and backwards; always in the file's order."""
    seed, names = 6, [f"n{number}" for number in range(200)]
    rows = [{"id": name, "token_ids": [number]} for number, name in enumerate(names)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_rows(path, rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    file, draw = open_rows(path), np.random.default_rng(seed)
    assert len(file) == 200 and "n3" in file and "n200" not in file
    for size in [200, 1, 1, 1, 7, 50, 50, 2]:
        wanted = draw.choice([*names, "unknown"], size, replace=False).tolist()
        found = [(row.id, row.content["token_ids"][0]) for row in file.read(wanted)]
        assert found == [(name, number) for number, name in enumerate(names) if name in wanted], f"{seed=}"


@pytest.mark.parametrize("arguments", [["--no-truncate"], ["--capture-top-p", "1"]])
def test_the_tool_keeps_all_entries_and_the_manifest_says_so(
    world: tuple[Path, Models], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    recipe = fresh_recipe(world, tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    options = ["--recipe", str(path), "--source", SOURCE, "--mode", "training", *arguments]
    monkeypatch.setattr(sys, "argv", ["capture_teacher.py", *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(__file__).parents[2] / "tools/capture_teacher.py"), run_name="__main__")
    assert end.value.code == 0
    kept = changed(recipe, capture={"top_p": 1.0})
    assert all((shard.counts == 10).all() for shard in read(kept, SOURCE, "training"))
    with pytest.raises(UserError, match=r"options.top_p = 1.0, but now options.top_p = 0.95"):
        Context(recipe).open(CAPTURES, SOURCE, "training")


def test_of_equal_alternatives_of_vllm_the_lower_rank_comes_first() -> None:
    """vLLM puts the text's token first, and gives it its place among the likeliest as its rank."""
    alternatives = {
        "12": {"logprob": -1.0, "rank": 3},
        "10": {"logprob": -0.5, "rank": 1},
        "11": {"logprob": -1.0, "rank": 2},
        "13": {"logprob": -2.0, "rank": 4},
    }
    rows = given_rows({"prompt_token_ids": [5, 12], "prompt_logprobs": [None, alternatives]})
    assert rows.ids == [[], [10, 11, 12, 13]] and rows.token_logprobs == [None, -1.0]
