"""Every row of every document, and every choice, against the reference in road_reference.py and
road_reference_rows.py.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from road_reference import (
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Conversation,
    Row,
    Side,
    Turn,
    converse,
    cross_entropy,
    least,
    read,
    vote,
)
from road_reference_models import TEXTS, make_sides, save_models
from road_reference_rows import Mass, Pair, Rules, teacher_row
from small_fusion import run_before_fusion
from small_models import small_recipe, write_rows
from transformers import AutoModelForCausalLM

from megatron_fuse.alignment import MATCHES
from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.fusion_data.documents import Document
from megatron_fuse.instructions import INSTRUCTIONS, load_examples
from megatron_fuse.instructions.examples import Example
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import RESPONSES, response_shards
from megatron_fuse.scoring.scores import load_scores
from megatron_fuse.stages import Context

SEQ_LENGTH = 250
# Earlier questions and answers of some examples.
EARLIER = {
    1: [("Before?", TEXTS[5])],
    3: [("One?", TEXTS[6]), ("Two?", TEXTS[2])],
    4: [("Once more?", TEXTS[7])],
    5: [("Nothing?", ""), ("Next to nothing?", " \n")],
    8: [("Long ago?", TEXTS[3])],
}
SYSTEM_MESSAGE = {2: "Be brief.", 3: "Answer the user."}


def example_row(number: int, text: str) -> dict[str, object]:
    turns = [*EARLIER.get(number, []), (f"Question {number}?", text)]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    if number in SYSTEM_MESSAGE:
        messages.insert(0, {"role": "system", "content": SYSTEM_MESSAGE[number]})
    return {"id": f"e{number}", "messages": messages}


TEMPLATES = {"piece": "vicuna_v1.1", "alpaca": "alpaca", "level": None, "lossy": "vicuna_v1.1"}


def model_options(root: Path, name: str) -> dict[str, str | None]:
    return {"model": str(root / ("piece" if name == "alpaca" else name)), "chat_template": TEMPLATES[name]}


def run_road(root: Path, target: str, names: Sequence[str], supervise: str) -> Recipe:
    """Every stage before fusion data."""
    write_rows(root / "data.jsonl", [example_row(n, text) for n, text in enumerate(TEXTS)])
    sources = {}
    for place, (name, stride) in enumerate(zip(names, (1, 2, 4), strict=True)):
        answers = [TEXTS[(n * stride) % len(TEXTS)] if n != 5 + place else "" for n in range(len(TEXTS))]
        answers[4] = answers[4] + answers[4]
        file = write_rows(
            root / f"{name}.jsonl",
            [{"id": f"e{n}", "response": text, "truncated": n % 3 == 1} for n, text in enumerate(answers)],
        )
        sources[name] = {**model_options(root, name), "responses": str(file)}
    recipe = small_recipe(
        root / f"run-{target}-{supervise}",
        root / "data.jsonl",
        root,
        sources,
        data={"shard_size": 4, "supervise": supervise},
        training={"seq_length": SEQ_LENGTH},
        schedule={"preset": "profuser"},
        capture={"top_k": TOP_K, "top_p": TOP_P, "batch_tokens": 700},
        loss={"teacher_temperature": TEMPERATURE},
        reward_models={name: {"model": str(root / name)} for name in ("weak", "strong")},
        selection={"strongest": "strong"},
    )
    recipe = recipe.model_copy(
        update={"target": recipe.target.model_copy(update=model_options(root, target))}
    )
    run_before_fusion(recipe)
    return recipe


@dataclass
class Reading:
    """One text of an example as one source has read it. rows: None where the example is left out."""

    mode: str
    example: int
    source: str
    theirs: Conversation
    ours: Conversation
    rows: list[Row] | None

    def __str__(self) -> str:
        return f"example {self.example}, {self.mode} mode, source {self.source}"


def read_all(recipe: Recipe, sides: dict[str, Side], target: Side) -> Iterator[Reading]:
    every_turn = recipe.data.supervise == "every_turn"
    examples = load_examples(Context(recipe).open(INSTRUCTIONS))
    for name, source in recipe.sources.items():
        model = AutoModelForCausalLM.from_pretrained(source.model)
        answers = [
            answer for shard in response_shards(Context(recipe).open(RESPONSES, name)) for answer in shard
        ]
        for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
            for mode, final in (
                ("training", (example.response, not example.truncated)),
                ("inference", (answer.response, not answer.truncated)),
            ):
                turns = turns_of(example, *final, earlier=every_turn and mode == "training")
                theirs, ours = (converse(side, turns, example.system) for side in (sides[name], target))
                fits = max(len(theirs.ids), len(ours.ids)) <= SEQ_LENGTH + 1  # the last token is only a label
                rows = read(model, theirs) if final[0].strip() and fits else None
                yield Reading(mode, number, name, theirs, ours, rows)


def turns_of(example: Example, response: str, stop: bool, earlier: bool) -> list[Turn]:
    contents = [message["content"] for message in example.messages]
    before = [Turn(q, a, supervised=earlier) for q, a in zip(contents[0::2], contents[1::2], strict=False)]
    return [*before, Turn(contents[-1], response, stop=stop)]


@dataclass
class Road:
    """All stages before fusion data, once as the library has run them and once as the reference reads the
    same texts.
    """

    recipe: Recipe
    sides: dict[str, Side]
    target: Side
    readings: list[Reading]

    def dataset(self, alignment: str) -> FusionDataset:
        vocabulary_map, unmatched = alignment.split()
        options = {"vocabulary_map": vocabulary_map, "unmatched": unmatched}
        recipe = self.recipe.model_copy(
            update={"alignment": self.recipe.alignment.model_copy(update=options)}
        )
        build_fusion_data(Context(recipe))
        return FusionDataset(recipe)


ALL = ("piece", "level", "lossy")
# Target: sources, supervised turns; the last target and its first source differ in their templates alone.
ROADS = {
    "piece": (ALL, "every_turn"),
    "level": (ALL, "every_turn"),
    "lossy": (ALL, "every_turn"),
    "alpaca": (("piece", "level", "alpaca"), "last_turn"),
}


@pytest.fixture(scope="module")
def roads(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Road]:
    """By target."""
    root = tmp_path_factory.mktemp("road")
    save_models(root)
    sides = make_sides(root)

    def make(target: str) -> Road:
        recipe = run_road(root, target, *ROADS[target])
        return Road(recipe, sides, sides[target], list(read_all(recipe, sides, sides[target])))

    return cache(make)


@pytest.mark.parametrize(
    ("target", "alignment"),
    [
        ("piece", "exact skip"),
        ("piece", "exact condition"),
        ("piece", "em skip"),
        ("level", "exact condition"),
        ("level", "exact onehot"),
        ("level", "em condition"),
        ("lossy", "exact condition"),
        ("lossy", "exact onehot"),
        ("alpaca", "exact condition"),
    ],
)
def test_every_row_of_every_document(roads: Callable[[str], Road], target: str, alignment: str) -> None:
    road = roads(target)
    dataset = road.dataset(alignment)
    seen: Counter[str] = Counter()
    for reading in road.readings:
        document = dataset.document(reading.mode, reading.example, reading.source)
        source = road.sides[reading.source]
        rules = Rules(*alignment.split(), same_vocabulary=source.pieces == road.target.pieces)
        check_document(document, reading, source, road.target, rules)
        if reading.rows is not None:
            seen.update(kinds_of_labels(reading.theirs, reading.ours, document))
    # What the texts were chosen for; a label over several source tokens is the hard case.
    at_least = {"exact": 400, "exact long": 20, "exact cut": 2, "skip": 50}
    at_least |= {"condition": {"condition": 10, "condition long": 3}, "onehot": {"onehot": 50}}.get(
        rules.unmatched, {}
    )
    assert all(seen[kind] >= count for kind, count in at_least.items()), seen


@pytest.mark.parametrize("target", ROADS)
def test_every_choice(roads: Callable[[str], Road], target: str) -> None:
    """The advantage in both modes, over texts of one turn and of several, whole, cut short and left out."""
    road = roads(target)
    dataset, names = road.dataset("exact condition"), list(road.recipe.sources)
    scores = np.stack(
        [
            [
                load_scores(Context(road.recipe), name, reward_model)
                for reward_model in road.recipe.reward_models
            ]
            for name in names
        ]
    )
    of = {(reading.mode, reading.example, reading.source): reading for reading in road.readings}
    for number in range(len(TEXTS)):
        trained = [of["training", number, name] for name in names]
        ce = [cross_entropy(reading.theirs, reading.rows) for reading in trained if reading.rows is not None]
        assert dataset.selections["training"].arrays["ce_sum"][number] == pytest.approx(ce, rel=1e-5)
        winner = least(ce, [reading.theirs.all_read() for reading in trained])
        assert dataset.selected_source("training", number) == names[winner], f"example {number}, {ce=}"
        answered = [of["inference", number, name] for name in names]
        texts = ["" if reading.rows is None else reading.theirs.text[:-1].decode() for reading in answered]
        winner = vote(texts, scores[:, :, number], strongest=1)
        assert dataset.selected_source("inference", number) == (None if winner is None else names[winner])
    # Too long.
    assert any(reading.rows is None and reading.theirs.text.strip(b"\0") for reading in road.readings)
    several = [reading.ours for reading in road.readings if reading.ours.answers > 1]
    assert bool(several) == (road.recipe.data.supervise == "every_turn")
    assert not several or {conversation.tokens[-1].stop for conversation in several} == {True, False}


def check_document(document: Document, reading: Reading, source: Side, target: Side, rules: Rules) -> None:
    where, ours = f"{reading}, {rules}", reading.ours
    if reading.rows is None:
        assert (reading.mode, len(document.tokens)) == ("inference", 0), where
        return
    assert document.tokens.tolist() == ours.ids, where
    assert np.flatnonzero(document.supervised).tolist() == [token.place for token in ours.tokens], where
    pair = Pair(source, target, reading.theirs, ours, reading.rows, rules)
    expected = [teacher_row(pair, number) for number in range(len(ours.tokens))]
    found = [MATCHES[code] for code in document.match]
    assert found == [match for match, _ in expected], where
    bounds = np.cumsum([0, *document.counts.tolist()])
    assert bounds[-1] == len(document.teacher_ids) == len(document.teacher_logprobs), where
    for number, (_, mass) in enumerate(expected):
        entries = slice(bounds[number], bounds[number + 1])
        check_row(
            document.teacher_ids[entries], document.teacher_logprobs[entries], mass, f"{where}, row {number}"
        )


def check_row(ids: np.ndarray, logprobs: np.ndarray, mass: Mass, where: str) -> None:
    """Every entry is the expected one, rounded down to float16."""
    found = dict(zip(ids.tolist(), logprobs, strict=True))
    assert len(found) == len(ids) and found.keys() == mass.keys(), where
    for token, probability in mass.items():
        exact = math.log(probability)
        slack = 2e-5  # of a capture in float32, batched in another way
        assert rounded_down(exact - slack) <= found[token] <= min(rounded_down(exact + slack), 0), (
            f"{where}, {token=}"
        )


def rounded_down(value: float) -> np.float16:
    nearest = np.float16(value)
    return np.nextafter(nearest, np.float16(-np.inf)) if float(nearest) > value else nearest


def kinds_of_labels(theirs: Conversation, ours: Conversation, document: Document) -> Iterator[str]:
    """How labels lie that have a distribution. long: goes on after the source's first token, of which a
    conditioned row has read a part; cut: such a one that ends inside a source token."""
    edges = {edge for token in theirs.tokens for edge in (token.begin, token.end)}
    for label, code in zip(ours.tokens, document.match, strict=True):
        match = MATCHES[code]
        yield match
        if match in ("exact", "condition"):
            first_end = min(edge for edge in edges if edge > label.begin)
            if first_end < label.end:
                yield f"{match} long"
                if label.end not in edges:
                    yield f"{match} cut"
