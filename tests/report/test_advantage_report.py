"""Laws of the advantage report: it counts what the trainer learns from, its page stands alone, and no text
can break it.
"""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from page_parts import Page
from random_observations import MODES, random_observations, texts_of
from small_fusion import SOURCES

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.instructions import INSTRUCTIONS, load_examples
from megatron_fuse.recipe import Recipe, make_recipe
from megatron_fuse.report.advantage import advantage_report, advantage_text, write_advantage_report
from megatron_fuse.report.advantage.card_page import html_card
from megatron_fuse.report.advantage.cards import card, choose_cards
from megatron_fuse.report.advantage.charts import SOURCE_COLOURS, advantage_charts
from megatron_fuse.report.advantage.numbers import GROUND_TRUTH, NOBODY, advantage_numbers
from megatron_fuse.report.advantage.page import advantage_page
from megatron_fuse.responses import RESPONSES, response_shards
from megatron_fuse.stages import Context

HOSTILE = "<script>alert('&\"')</script></details> $\\frac{x ]]> \x00 日本 \u202e {inference} %s"


@pytest.fixture(scope="module")
def report(world: Recipe) -> dict:
    return advantage_report(Context(world))


def test_wins_are_those_of_the_examples_that_are_learned_from(world: Recipe, report: dict) -> None:
    dataset = FusionDataset(world)
    examples = load_examples(Context(world).open(INSTRUCTIONS))
    learned = [n for n, example in enumerate(examples) if not example.is_validation]
    assert report["examples"] == {"counted": len(learned), "validation": len(examples) - len(learned)}
    for mode in MODES:
        wanted = Counter(dataset.selected_source(mode, n) or NOBODY for n in learned)
        assert {name: of["examples"] for name, of in report["wins"][mode].items() if of["examples"]} == wanted
    shown = {card["id"] for card in report["cards"]}
    assert shown <= {examples[n].id for n in learned}


def test_answers_are_those_of_the_responses_stage(world: Recipe, report: dict) -> None:
    validation = {
        example.id for example in load_examples(Context(world).open(INSTRUCTIONS)) if example.is_validation
    }
    for source in SOURCES:
        artifact = Context(world).open(RESPONSES, source)
        answers = [
            answer for shard in response_shards(artifact) for answer in shard if answer.id not in validation
        ]
        files = [path.read_text().split() for path in artifact.files(".unmatched.txt")]
        found = report["answers"][source]
        lengths = [len(answer.response) for answer in answers if answer.response.strip()]
        assert found["answers"] == len(lengths)
        assert found["empty"] == len(answers) - len(lengths)
        assert found["truncated"] == sum(answer.truncated for answer in answers)
        assert found["unmatched"] == len({name for file in files for name in file} - validation) > 0
        assert found["characters"] == {"mean": pytest.approx(np.mean(lengths)), "median": np.median(lengths)}
        texts = {answer.id: answer.response for answer in answers}
        for shown in report["cards"]:
            assert (
                next(answer["text"] for answer in shown["answers"] if answer["name"] == source)
                == texts[shown["id"]]
            )


def test_a_schedule_without_teachers_has_no_advantage(world: Recipe) -> None:
    content = json.loads(world.model_dump_json()) | {"schedule": {"preset": "csft"}}
    with pytest.raises(UserError, match="no phase learns from a source"):
        advantage_report(Context(make_recipe(content)))


def random_report(text: str = "text", **options: object) -> dict:
    seen = random_observations(5, **options)
    cards = [card(seen, choice, *texts_of(seen, choice.example, text)) for choice in choose_cards(seen)]
    if not seen.answers.same.shape[1]:
        cards = [
            card(seen, choice, texts_of(seen, choice.example, text)[0], []) for choice in choose_cards(seen)
        ]
    return {"fusion_data": "run/fusion/exact-skip-T2", **advantage_numbers(seen), "cards": cards}


def page_of(report: dict) -> Page:
    charts = {
        name: (title, b"\x89PNG".ljust(24, b"\0")) for name, (title, _) in advantage_charts(report).items()
    }
    return Page(advantage_page(report, charts))


# Without reward models by the reference rule; five sources leave a row of panels half empty, eight fill two.
SHAPES = [
    (1, 1, ("inference",)),
    (1, 0, MODES),
    (3, 3, MODES),
    (3, 2, ("training",)),
    (5, 0, ("inference",)),
    (8, 3, MODES),
]


@pytest.mark.parametrize(("sources", "reward_models", "modes"), SHAPES)
def test_any_number_of_sources_reward_models_and_modes_makes_a_page(
    sources: int, reward_models: int, modes: tuple[str, ...]
) -> None:
    rule = "vote" if reward_models else "reference"
    report = random_report(
        sources=sources, reward_models=reward_models, modes=modes, rule=rule, systems=sources % 4
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    page = page_of(report)
    assert page.tags["img"] == 4 + (len(modes) == 2)  # wins, lengths, length of instruction, category; modes
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for source in report["sources"]:
        assert source in page.text
    lines = advantage_text(report).splitlines()
    for name, of in report["wins"][modes[0]].items():
        assert any(name in line and f"({of['examples']:,})" in line for line in lines)


def test_hostile_texts_stay_texts() -> None:
    report = random_report(HOSTILE)
    report["lengths"]["groups"][1]["group"] = report["system_messages"]["frequent"][0]["text"] = HOSTILE
    report["groups"]["category"][0]["group"] = HOSTILE
    for _, figure in advantage_charts(report).values():
        figure.canvas.draw()  # a dollar sign begins no formula
    page = page_of(report)
    assert "script" not in page.tags and "link" not in page.tags
    assert not [link for link in page.links if not link.startswith("data:image/png;base64,")]
    assert page.text.count("<script>alert('&\"')</script></details>") >= 3 * len(report["cards"])
    assert page.unclosed == 0


@pytest.mark.parametrize("length", [10, 399, 480, 481, 5000, 100_000])
@pytest.mark.parametrize("letters", ["a", "word ", "line\n", "日"])
def test_long_texts_are_folded_and_whole(length: int, letters: str) -> None:
    """Nothing is lost or repeated where a text is cut in two."""
    text = (letters * length)[:length]
    answers = [{"name": GROUND_TRUTH, "text": text, "truncated": False}]
    shown = {
        "id": "e0",
        "reason": "why",
        "category": None,
        "system": None,
        "messages": [{"role": "user", "content": "Hello?"}],
        "winners": {"training": None},
        "weights": {"training": 1.0},
        "answers": answers,
    }
    page = Page(html_card(shown, []))
    assert page.text_of("answer-text") == text
    assert page.tags["details"] == (length > 480 or text.count("\n") > 7)


def test_a_source_has_one_colour_in_all_charts() -> None:
    """The bars of both modes, and the marks of every panel."""
    report = random_report(sources=3)
    charts = advantage_charts(report)

    def colours(figure: Figure) -> list[list[str]]:
        from matplotlib.colors import to_hex

        return [
            [to_hex(patch.get_facecolor()).upper() for patch in axes.patches]
            + [to_hex(line.get_markerfacecolor()).upper() for line in axes.lines]
            for axes in figure.axes
        ]

    for found in colours(charts["wins"][1]):
        assert found == [*SOURCE_COLOURS[:3], "#FFFFFF"]
    for name in ("lengths", "instruction_length", "category"):
        for place, found in enumerate(colours(charts[name][1])):
            assert set(found) - {"#000000", "#FFFFFF"} == {SOURCE_COLOURS[place]}


def test_the_command_prints_the_numbers_and_writes_the_same_files_twice(
    world: Recipe, report: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "report.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "advantage", str(fusion_directory(world))])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    assert ended.value.code == 0
    assert advantage_text(report) in capsys.readouterr().out
    directory = world.workdir / "reports" / "advantage" / fusion_directory(world).name
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    charts = {"wins.png", "lengths.png", "modes.png", "instruction_length.png", "category.png"}
    assert set(files) == {"advantage.json", "advantage.html", *charts}
    assert json.loads(files["advantage.json"]) == report
    assert all(files[name].startswith(b"\x89PNG\r\n") for name in charts)
    write_advantage_report(Context(world))
    assert files == {path.name: path.read_bytes() for path in directory.iterdir()}
