"""Invalid numbers in a file of captures are refused. The message has line, id and place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from capture_forms import Row
from exported_captures import SOURCE, assert_same_rows, conversations, export, with_file, write
from small_captures import read

from megatron_fuse.capture import capture
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Context


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


@pytest.fixture(scope="module")
def exported(captured: Recipe) -> str:
    """Its rows in our form, as one JSON list; every test reads a copy of its own."""
    return json.dumps(export(captured, "ours"))


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
    captured: Recipe, exported: str, tmp_path: Path, spoil: Callable[[Row], Any], message: str
) -> None:
    rows = json.loads(exported)
    spoil(rows[2])
    with pytest.raises(UserError, match=rf"spoilt.jsonl:3 \(id 'e2'\): .*{message}"):
        capture(Context(with_file(captured, write(tmp_path / "spoilt.jsonl", rows))), SOURCE, "training")


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
    captured: Recipe, tmp_path: Path, form: str, zero: float
) -> None:
    """The file with the number gives what the file without the alternative gives."""
    chats = dict(conversations(captured, "training"))
    rows, without = export(captured, form), export(captured, form)
    for row, other in zip(rows, without, strict=True):
        chat = chats[row["id"]]
        assert chat is not None
        for place in np.flatnonzero(chat.supervised).tolist():
            token = last_alternative(row, form, place, int(chat.ids[place]))
            set_logprob(row, form, place, token, zero)
            del entries_at(other, form, place)[str(token) if form == "vllm" else f"token_id:{token}"]
    found, expected = (
        with_file(captured, write(tmp_path / name, content))
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
    captured: Recipe, tmp_path: Path, form: str, which: str, value: Any, message: str
) -> None:
    rows = export(captured, form)
    chat = dict(conversations(captured, "training"))[rows[2]["id"]]
    assert chat is not None
    place = int(np.flatnonzero(chat.supervised)[1])
    label = int(chat.ids[place])
    token = label if which == "label" else last_alternative(rows[2], form, place, label)
    set_logprob(rows[2], form, place, token, value)
    recipe = with_file(captured, write(tmp_path / "served.jsonl", rows))
    with pytest.raises(UserError, match=rf"served.jsonl:3 \(id 'e2'\): .*{message}"):
        capture(Context(recipe), SOURCE, "training")
