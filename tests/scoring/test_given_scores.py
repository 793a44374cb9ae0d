"""Laws of scores from a file: each belongs to one answer, and nothing is made up for the others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import Example
from megatron_fuse.recipe import ScoreFile
from megatron_fuse.responses import Response
from megatron_fuse.scoring.given_scores import given_scores

DATA = Path(__file__).parents[2] / "../shared/data"
WHERE = "reward_models.reward.scores"

SCORES = {
    "e0": {"vicuna-7b-v1.5": 0.25, "mpt": -1e30},
    "e1": {"vicuna-7b-v1.5": 3, "mpt": 1e-30},
    "e3": {"mpt": 7.5},
}
TRIPLES = [
    {"id": key, "source": name, "score": score} for key, row in SCORES.items() for name, score in row.items()
]
MAPPINGS = [{"id": key, "scores": row} for key, row in SCORES.items()]


def example(name: str) -> Example:
    return Example(name, None, [{"role": "user", "content": "?"}], "gt")


def answer(name: str, text: str = "an answer") -> Response:
    return Response(name, text, truncated=False, tokens=1)


def read(path: Path, **options: Any):
    return given_scores(ScoreFile(path=path, **options), WHERE)


@pytest.mark.parametrize(
    "rows, options",
    [
        (TRIPLES, {}),
        (MAPPINGS, {}),
        (TRIPLES[:2] + MAPPINGS[1:], {}),
        ([*TRIPLES, *TRIPLES, *MAPPINGS], {}),
        (
            [
                *MAPPINGS,
                {"id": "e1", "scores": None},
                {"id": "e9"},
                {"id": "e9", "source": "x", "score": None},
            ],
            {},
        ),
        ([row | {"source": "where the row is from"} for row in MAPPINGS], {}),
        (
            [{"i": row["id"], "a": {"reward.2": row["scores"]}} for row in MAPPINGS],
            {"id": "i", "scores": "a.reward.2"},
        ),
    ],
    ids=["triples", "mappings", "both", "repeated", "nulls", "source_of_the_row", "nested"],
)
@pytest.mark.parametrize("order", [1, -1])
def test_every_form_says_the_same(tmp_path: Path, rows: list, options: dict[str, str], order: int) -> None:
    given = read(write_rows(tmp_path / "scores.jsonl", rows[::order]), **options)
    assert sorted(given.sources) == ["mpt", "vicuna-7b-v1.5"]
    names = ["e3", "e0", "e1", "e2"]
    for source in given.sources:
        expected = [SCORES.get(name, {}).get(source, np.nan) for name in names]
        found = given.of_source(source, [example(name) for name in names], [answer(name) for name in names])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.array(expected, np.float32))
        given.check(source, map(example, names))


@pytest.mark.parametrize("form", ["struct", "map", "triples"])
def test_parquet(tmp_path: Path, form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    if form == "triples":
        table = pyarrow.Table.from_pylist([row | {"score": float(row["score"])} for row in TRIPLES])
    else:
        floats = [{name: float(score) for name, score in row.items()} for row in SCORES.values()]
        kind = pyarrow.map_(pyarrow.string(), pyarrow.float64()) if form == "map" else None
        scores = pyarrow.array([list(row.items()) if form == "map" else row for row in floats], type=kind)
        table = pyarrow.table({"id": list(SCORES), "scores": scores})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "scores.parquet")
    given = read(tmp_path / "scores.parquet")
    found = {
        source: given.of_source(source, [example(name) for name in SCORES], [answer(name) for name in SCORES])
        for source in given.sources
    }
    assert sorted(found) == ["mpt", "vicuna-7b-v1.5"]
    np.testing.assert_array_equal(found["mpt"], np.array([-1e30, 1e-30, 7.5], np.float32))
    np.testing.assert_array_equal(found["vicuna-7b-v1.5"], np.array([0.25, 3, np.nan], np.float32))


def test_an_empty_answer_has_no_score(tmp_path: Path) -> None:
    given = read(write_rows(tmp_path / "scores.jsonl", MAPPINGS))
    found = given.of_source("mpt", [example("e0"), example("e1")], [answer("e0", " \n"), answer("e1")])
    assert np.isnan(found).tolist() == [True, False]


def test_a_score_of_another_answer_is_refused(tmp_path: Path) -> None:
    rows = [
        TRIPLES[0] | {"response": " an answer\n"},
        TRIPLES[1] | {"response": "another"},
        TRIPLES[2] | {"response": None},
    ]
    given = read(write_rows(tmp_path / "scores.jsonl", rows))
    names = ["e0", "e1"]
    found = given.of_source(
        "vicuna-7b-v1.5", [example(name) for name in names], [answer(name) for name in names]
    )
    assert found.tolist() == [0.25, 3]
    with pytest.raises(UserError, match=r"scores.jsonl:2: this score is for another answer of 'mpt' to 'e0'"):
        given.of_source("mpt", [example("e0")], [answer("e0")])
    # Nothing is taken from that row.
    assert np.isnan(given.of_source("mpt", [example("e0")], [answer("e0", "")]))


def test_files_for_other_examples_or_sources_are_refused(tmp_path: Path) -> None:
    given = read(write_rows(tmp_path / "scores.jsonl", MAPPINGS))
    with pytest.raises(UserError, match=r"no score of 'llama'; its sources are vicuna-7b-v1\.5, mpt"):
        given.of_source("llama", [example("e0")], [answer("e0")])
    with pytest.raises(UserError, match="no score of 'llama'"):
        given.check("llama", [example("e0")])
    with pytest.raises(
        UserError, match=r"none of its 3 ids .*the instructions have 'x0', .*the file has 'e0', 'e1', 'e3'"
    ):
        given.check("mpt", [example(f"x{n}") for n in range(9)])
    with pytest.raises(UserError, match="none of its 2 ids"):
        given.check("vicuna-7b-v1.5", [example("e3")])

    def endless():
        yield example("e0")
        raise AssertionError("read on after the first that was found")

    given.check("mpt", endless())


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"id": "a", "source": "x", "score": "1.0"}], "jsonl:1: the score of 'x' is '1.0'"),
        ([{"id": "a", "source": "x", "score": True}], "jsonl:1: the score of 'x' is True"),
        (['{"id": "a", "scores": {"x": NaN}}'], "jsonl:1: the score of 'x' is nan"),
        (['{"id": "a", "scores": {"x": -Infinity}}'], "jsonl:1: the score of 'x' is -inf"),
        ([{"id": "a", "scores": {"x": 1e39}}], r"the score of 'x' is 1e\+39, .*float32"),
        ([{"id": "a", "scores": {"x": 10**400}}], "jsonl:1: the score of 'x' is 1000"),
        ([{"id": "a", "scores": [1]}], "jsonl:1: scores is a list, not a mapping"),
        ([{"id": "a", "source": 3, "score": 1}], "jsonl:1: source is a int, not text"),
        ([{"id": "a", "source": "x", "score": 1, "response": 3}], "jsonl:1: response is a int, not text"),
        ([{"source": "x", "score": 1}], "jsonl:1: id is None"),
        (
            [{"id": "a", "scores": {"x": 1}}, {"id": "a", "source": "x", "score": 2}],
            "jsonl:2: .*'x' to 'a' .*line 1",
        ),
        (
            [{"id": "a", "source": "x", "score": 1, "response": text} for text in "bc"],
            "jsonl:2: .*'x' to 'a' is also scored in line 1",
        ),
        (
            [{"id": "a", "Score": 1}],
            f"no row has a score: .* mapping .* scores .{WHERE}.scores.; line 1 has id, Score",
        ),
        ([], "no row has a score: .*; the file is empty"),
        (["["], "jsonl:2: element 1 is not valid JSON .an object is missing."),
        (None, f"{WHERE}: .*scores.jsonl does not exist"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, rows: list | None, message: str) -> None:
    if rows is not None:
        write_rows(tmp_path / "scores.jsonl", rows)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "scores.jsonl")


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")
def test_real_scores_by_a_nested_key() -> None:
    path, reward_model = DATA / "responses/alpaca_eval.jsonl", "weighted_gpt4_turbo__win_vs_gpt4_1106_preview"
    given = read(path, scores=f"scores.{reward_model}")
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    examples = [example(row["id"]) for row in rows]
    for source in given.sources:
        found = given.of_source(
            source, examples, [answer(row["id"], row["responses"][source]) for row in rows]
        )
        expected = [(row["scores"].get(reward_model) or {}).get(source, np.nan) for row in rows]
        np.testing.assert_array_equal(found, np.array(expected, np.float32))
        assert np.isfinite(found).any()
