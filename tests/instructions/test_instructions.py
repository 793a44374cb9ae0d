"""Laws of the instructions stage: what a sample may depend on, and what is refused."""

import json
import random
import re
import runpy
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from small_instructions import alpaca, recipe_for
from small_models import write_rows

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import (
    INSTRUCTIONS,
    example_shards,
    load_examples,
    prepare_instructions,
    read_rows,
)
from megatron_fuse.recipe import make_recipe
from megatron_fuse.stages import Context

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("key", ["id", "category"])
def test_a_row_without_characters_leaves_no_directory(
    models: dict[str, Path], tmp_path: Path, key: str
) -> None:
    recipe = recipe_for(models, tmp_path, [f'{{"instruction": "Q", "output": "A", "{key}": "\\ud800"}}'])
    with pytest.raises(
        UserError,
        match=rf"data.jsonl: none of its .* rows can be used .*line 1: {key} holds half a surrogate pair",
    ):
        prepare_instructions(Context(recipe))
    assert not recipe.workdir.exists()


def test_ids_from_content_do_not_depend_on_place_and_copies_are_listed(tmp_path: Path) -> None:
    rows = [{"instruction": name, "output": "A"} for name in "abc"]
    forward = read_rows(write_rows(tmp_path / "rows.jsonl", [*rows, rows[0]]))
    backward = read_rows(write_rows(tmp_path / "rows.jsonl", rows[::-1]))
    assert list(forward.lines) == list(backward.lines)[::-1]
    assert forward.bad == [{"line": 4, "kind": "copy of an earlier row", "reason": "the same as line 1"}]


def test_sample_and_split_depend_on_seed_and_ids_only(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [alpaca(number) for number in range(60)]

    def draw(name: str, rows: list, **sections: object) -> dict[str, bool]:
        (tmp_path / name).mkdir()
        artifact = prepare_instructions(Context(recipe_for(models, tmp_path / name, rows, **sections)))
        examples = load_examples(artifact)
        assert artifact.counts["held_out"] == sum(e.is_validation for e in examples)
        order = {row["id"]: place for place, row in enumerate(rows)}
        assert sorted(examples, key=lambda e: order[e.id]) == examples, "file order is lost"
        return {e.id: e.is_validation for e in examples}

    some = {"data": {"samples": 20, "validation_samples": 5, "shard_size": 7}}
    first = draw("first", rows, **some)
    assert len(first) == 20 and sum(first.values()) == 5
    shuffled = random.Random(3).sample(rows, len(rows))
    assert draw("shuffled", shuffled, **some) == first
    assert set(first) <= set(draw("larger", rows, data={"samples": 40}))
    assert set(draw("seed", rows, seed=99, **some)) != set(first)


def test_a_directory_made_under_the_old_name_of_a_key_goes_on(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Recorded names stay as they were, so that plans of older versions are plans of today's recipes."""
    data = {"samples": 5, "validation_samples": 2}
    recipe = recipe_for(models, tmp_path, [alpaca(number) for number in range(9)], data=data)
    artifact = prepare_instructions(Context(recipe))
    recorded = {
        "seed": recipe.seed,
        "seq_length": recipe.training.seq_length,
        "format": "auto",
        "samples": 5,
        "held_out": 2,
        "too_long": "truncate",
        "supervise": "every_turn",
        "normalize": "none",
        "strip": False,
        "reasoning": "template",
        "shard_size": recipe.data.shard_size,
    }
    plan = json.loads((artifact.directory / "plan.json").read_text())
    assert list(plan["options"].items()) == list(recorded.items())
    rows = [json.loads(line) for path in artifact.files(".jsonl") for line in path.read_text().splitlines()]
    assert sum(row.get("held_out", False) for row in rows) == artifact.counts["held_out"] == 2
    made = {path: path.stat().st_mtime_ns for path in artifact.directory.iterdir()}
    content = recipe.model_dump(mode="json", by_alias=True)
    content["data"]["held_out"] = content["data"].pop("validation_samples")
    with pytest.warns(FutureWarning, match=r"data\.held_out is deprecated: write data\.validation_samples"):
        older = make_recipe(content)
    again = prepare_instructions(Context(older))
    assert again.sha256 == artifact.sha256
    assert made == {path: path.stat().st_mtime_ns for path in artifact.directory.iterdir()}


def test_earlier_turns_count_as_the_recipe_supervises_them(models: dict[str, Path], tmp_path: Path) -> None:
    """A template that forgets earlier turns cannot show them to be learned, and need not where the last
    one alone is.
    """
    template = tmp_path / "last.jinja"
    template.write_text("{{ messages[-1]['content'] }}{{ '<|im_end|>' if not add_generation_prompt }}")
    turns = [{"role": role, "content": role} for role in ["user", "assistant"] * 2]
    recipe = recipe_for(models, tmp_path, [{"messages": turns}], data={"supervise": "last_turn"})
    recipe = recipe.model_copy(
        update={"target": recipe.target.model_copy(update={"chat_template": str(template)})}
    )
    prepare_instructions(Context(recipe))
    every = recipe.model_copy(update={"data": recipe.data.model_copy(update={"supervise": "every_turn"})})
    with pytest.raises(UserError, match=r"options\.supervise = 'last_turn', but now .* 'every_turn'"):
        Context(every).open(INSTRUCTIONS)
    with pytest.raises(UserError, match="prints 0 of the 1 earlier assistant turns"):
        prepare_instructions(Context(every.model_copy(update={"workdir": tmp_path / "other"})))


@pytest.mark.parametrize(
    "rows, sections, message",
    [
        ([{"instruction": "Q"}], {}, "none of its 1 rows can be used.*line 1: output is missing"),
        (
            [alpaca(1), alpaca(2)],
            {"data": {"validation_samples": 2}},
            "data.validation_samples is 2, but there are only 2",
        ),
        ([alpaca(1)], {"training": {"seq_length": 4}}, "no example fits --seq-length 4"),
        ([alpaca(1)], {"data": {"path": "nowhere.jsonl"}}, "data.path: nowhere.jsonl does not exist"),
    ],
)
def test_refusals_leave_nothing_behind(
    models: dict[str, Path], tmp_path: Path, rows: list[object], sections: dict, message: str
) -> None:
    recipe = recipe_for(models, tmp_path, rows, **sections)
    with pytest.raises(UserError, match=message):
        prepare_instructions(Context(recipe))
    assert not recipe.workdir.exists()


def test_texts_are_in_memory_one_shard_at_a_time(models: dict[str, Path], tmp_path: Path) -> None:
    """A file ten times as long takes as much memory, to prepare and to read again."""

    def peak(work: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peaks = []
    for run, examples in enumerate((4, 4, 24)):  # the first is for what stays in memory after it
        (tmp_path / str(run)).mkdir()
        rows = [alpaca(n, instruction="Question? " * 1000) for n in range(examples)]  # 10 kB each
        recipe = recipe_for(
            models, tmp_path / str(run), rows, data={"shard_size": 2}, training={"seq_length": 10**6}
        )
        prepared = peak(lambda recipe=recipe: prepare_instructions(Context(recipe)))
        shards = example_shards(Context(recipe).open(INSTRUCTIONS))
        peaks.append((prepared, peak(lambda shards=shards: [len(shard) for shard in shards])))
    for few, many in zip(*peaks[1:], strict=True):
        assert many < few + 100_000, peaks  # ids and counts grow; the texts by 200 kB


def test_plan_is_free_of_sources_and_other_options_are_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [alpaca(number) for number in range(9)]
    recipe = recipe_for(models, tmp_path, rows, data={"shard_size": 4})
    artifact = prepare_instructions(Context(recipe))
    assert (artifact.counts["examples"], artifact.counts["shards"]) == (9, 3)
    artifact.verify()
    one = recipe.model_copy(update={"sources": {"coarse": recipe.sources["coarse"]}})
    assert Context(one).plan(INSTRUCTIONS) == Context(recipe).plan(INSTRUCTIONS)
    assert (
        prepare_instructions(Context(one)).sha256 == artifact.sha256 == Context(one).open(INSTRUCTIONS).sha256
    )
    other = recipe.model_copy(update={"seed": 5})
    for refuse in (prepare_instructions, lambda context: context.open(INSTRUCTIONS)):
        with pytest.raises(UserError, match=r"seed = 1234.*5"):
            refuse(Context(other))


def test_the_command_prints_counts_and_exits_with_2_on_bad_data(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = recipe_for(models, tmp_path, [alpaca(1), {"instruction": "Q"}])
    # JSON is YAML.
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(by_alias=True, exclude_none=True))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare", "--recipe", str(tmp_path / "recipe.yaml"), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / "prepare_instructions.py"), run_name="__main__")
        return end.value.code

    assert run() == 0
    printed = capsys.readouterr().out
    assert "bad rows: 1, leading answers left off: 0, dropped for length: 0, examples: 1" in printed
    assert re.search(r"^value missing +1  line 2$", printed, re.MULTILINE)
    broken = write_rows(tmp_path / "broken.jsonl", [alpaca(1), "{"])
    assert run("--data-path", str(broken), "--workdir", str(tmp_path / "other")) == 2
    assert "broken.jsonl:2: not valid JSON" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
