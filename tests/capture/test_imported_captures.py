"""Laws of imported captures: what our own capture says in another program's form comes back the same, and
nothing else comes in.
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from capture_forms import FORMS
from exported_captures import SOURCE, assert_same_rows, export, with_file, write
from log_lines import logged
from pyarrow import parquet
from small_captures import Models, changed, fresh_recipe, read
from small_models import write_rows

from megatron_fuse.capture import CAPTURES, STATUSES, capture, require_backend
from megatron_fuse.capture.forms import given_rows
from megatron_fuse.capture.row_files import open_rows
from megatron_fuse.errors import UserError
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Context


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
    captured: Recipe, tmp_path: Path, form: str, suffix: str, order: str
) -> None:
    rows = export(captured, form)
    if order == "shuffled":
        np.random.default_rng(4).shuffle(rows)
    recipe = with_file(captured, write(tmp_path / f"{form}.{suffix}", rows))
    artifact = capture(Context(recipe), SOURCE, "training")
    assert artifact is not None and artifact.counts["captured"] == 13
    assert_same_rows(read(recipe, SOURCE, "training"), read(captured, SOURCE, "training"))


def test_the_sources_own_answers_come_in_too(copied_capture: Recipe, tmp_path: Path) -> None:
    """With truncated answers, which have no stop token, and with examples that have none."""
    capture(Context(copied_capture), SOURCE, "inference")
    recipe = with_file(
        copied_capture,
        write(tmp_path / "own.jsonl", export(copied_capture, "ours", "inference")),
        "inference",
    )
    capture(Context(recipe), SOURCE, "inference")
    expected = read(copied_capture, SOURCE, "inference")
    assert {STATUSES[code] for shard in expected for code in shard.status} == {"captured", "no_response"}
    assert_same_rows(read(recipe, SOURCE, "inference"), expected)


@pytest.mark.parametrize("filter", ["full_vocabulary", "hugging_face"])
@pytest.mark.parametrize(("top_k", "top_p"), [(10, 0.3), (3, 1.0), (5, 0.28)])
def test_a_file_is_truncated_as_a_model_s_rows_are(
    copied_capture: Recipe, tmp_path: Path, filter: str, top_k: int, top_p: float
) -> None:
    wanted = {"top_k": top_k, "top_p": top_p, "filter": filter}
    recipe = changed(
        with_file(copied_capture, write(tmp_path / "all.jsonl", export(copied_capture, "ours"))),
        capture=wanted,
    )
    capture(Context(recipe), SOURCE, "training")
    shutil.rmtree(copied_capture.workdir / "captures")
    direct = changed(copied_capture, capture=wanted)
    capture(Context(direct), SOURCE, "training")
    expected = read(direct, SOURCE, "training")
    assert len({count for shard in expected for count in shard.counts.tolist()}) > (top_p < 1), (
        "nothing was cut"
    )
    assert_same_rows(read(recipe, SOURCE, "training"), expected)


@pytest.mark.parametrize("form", FORMS)
def test_another_temperature_than_1_needs_its_log_sum_exp(
    captured: Recipe, tmp_path: Path, form: str
) -> None:
    recipe = with_file(captured, write(tmp_path / "plain.jsonl", export(captured, form, logsumexp=False)))
    with pytest.raises(
        UserError,
        match=r"plain.jsonl:1 \(id 'e0'\): logsumexp is not given at temperature 2, .*teacher_temperature "
        r"to 1",
    ):
        capture(Context(recipe), SOURCE, "training")
    at_one = changed(recipe, loss={"teacher_temperature": 1.0})
    capture(Context(at_one), SOURCE, "training")
    for found, expected in zip(
        read(at_one, SOURCE, "training"), read(captured, SOURCE, "training"), strict=True
    ):
        np.testing.assert_array_equal(found.lse, expected.lse[:, [0, 0]])
        np.testing.assert_array_equal(found.entry_logits, expected.entry_logits)


def test_ranks_share_the_work_and_an_unchanged_file_is_not_read_again(
    captured: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "shared.jsonl", export(captured, "ours"))
    recipe = with_file(captured, path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert capture(Context(recipe), SOURCE, "training") is None
    monkeypatch.setenv("RANK", "0")
    artifact = capture(Context(recipe), SOURCE, "training")
    assert_same_rows(read(recipe, SOURCE, "training"), read(captured, SOURCE, "training"))
    assert artifact is not None and capture(Context(recipe), SOURCE, "training") == artifact
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"inputs.captures file"):
        capture(Context(recipe), SOURCE, "training")
    path.unlink()
    assert Context(recipe).open(CAPTURES, SOURCE, "training") == artifact


def test_neither_weights_nor_positions_are_asked_of_a_model_that_others_have_run(
    captured: Recipe, tmp_path: Path
) -> None:
    recipe = with_file(captured, write(tmp_path / "far.jsonl", export(captured, "ours")))
    directory = tmp_path / "tokenizer only"
    shutil.copytree(recipe.sources[SOURCE].model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    options = recipe.sources[SOURCE].model_copy(update={"model": str(directory)})
    recipe = recipe.model_copy(update={"sources": {SOURCE: options}})
    capture(Context(recipe), SOURCE, "training")
    assert_same_rows(read(recipe, SOURCE, "training"), read(captured, SOURCE, "training"))
    with pytest.raises(
        UserError, match=r"--backend hf: sources.beta.captures.training names a file\. Remove it"
    ):
        require_backend(recipe, SOURCE, "training", "hf")
    require_backend(recipe, SOURCE, "training", "file")


def test_examples_without_a_row_and_rows_about_other_tokens_are_counted(
    captured: Recipe, tmp_path: Path
) -> None:
    rows = export(captured, "ours")
    del rows[4]
    token = rows[7]["token_ids"][2]
    rows[7]["token_ids"][2] = token + 1
    # One token more than the response has.
    for name in ("token_ids", "top_ids", "top_logprobs", "token_logprobs"):
        rows[9][name].append(rows[9][name][-1])
    del rows[9]["logsumexp"]
    recipe = with_file(captured, write(tmp_path / "some.jsonl", rows))
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
    expected = read(captured, SOURCE, "training")
    for shard, whole in zip(read(recipe, SOURCE, "training"), expected, strict=True):
        for index in np.flatnonzero(shard.status == 0):
            assert shard.ce_sum[index] == whole.ce_sum[index]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_about_other_tokens_is_refused_with_both(captured: Recipe, tmp_path: Path, form: str) -> None:
    """Every response is a token off, as if the template were another."""
    rows = export(captured, form)
    for row in rows:
        tokens = {"ours": "token_ids", "distill_kit": "input_ids", "vllm": "prompt_token_ids"}.get(form)
        if tokens:
            row[tokens][1] += 1
            if form == "vllm":
                row["prompt_logprobs"][1] = {str(row[tokens][1]): {"logprob": -1.0, "rank": 1}}
        else:
            row["choices"][0]["logprobs"]["tokens"][1] = "token_id:77"
    recipe = with_file(captured, write(tmp_path / "other.jsonl", rows))
    with pytest.raises(
        UserError,
        match=r"other.jsonl:1 \(id 'e0'\): token 1 of the .* tokenizer gives .*in 5 of 5 rows the",
    ):
        capture(Context(recipe), SOURCE, "training")
    assert not list(recipe.workdir.glob("captures/*/*/shard*"))


def test_entries_whose_rounded_mass_is_a_little_above_one_leave_no_tail_below_zero(
    captured: Recipe, tmp_path: Path
) -> None:
    rows = export(captured, "ours")
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
    recipe = with_file(captured, write(tmp_path / "rounded.jsonl", rows))
    capture(Context(recipe), SOURCE, "training")
    for shard in read(recipe, SOURCE, "training"):
        for column, temperature in ((0, 1.0), (1, 2.0)):
            row = np.repeat(np.arange(len(shard.counts)), shard.counts)
            mass = np.bincount(row, np.exp(shard.logprobs(column, temperature).astype(np.float64)))
            assert (mass > 0.9).all() and mass.max() <= 1 + 1e-6


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
    captured: Recipe, tmp_path: Path, lines: list[str], message: str
) -> None:
    recipe = with_file(captured, write_rows(tmp_path / "file.jsonl", lines))
    with pytest.raises(UserError, match=message):
        capture(Context(recipe), SOURCE, "training")


def test_a_file_that_is_not_there_or_no_parquet_is_refused(
    captured: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "text.parquet", ["no parquet"])
    recipe = with_file(captured, path)
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
