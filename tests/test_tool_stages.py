"""Rows with tools through the stages: what is prepared and listed, what models read of it, what a server
is asked.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.nn as nn
from chat_families import format_of, save_tokenizer
from log_lines import logged
from small_models import small_recipe, write_rows
from tool_messages import TOOLS, asks, call, calls, output, says, tool
from transformers import LlamaConfig

from megatron_fuse.capture.stage import conversation_of
from megatron_fuse.chat import load_chat_format
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.text import build_text
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import Example, left_out, load_examples, prepare_instructions
from megatron_fuse.instructions.bad_rows import Kind
from megatron_fuse.instructions.cleaning import Cleaning
from megatron_fuse.instructions.prepare import example_shards
from megatron_fuse.pipeline.estimates import estimate_amounts
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.models import ResponseFile, SourceOptions
from megatron_fuse.report.advantage.card_page import _spoken
from megatron_fuse.responses import Response
from megatron_fuse.responses.given import given_answers
from megatron_fuse.responses.sampled import _prompts
from megatron_fuse.responses.served import _Format
from megatron_fuse.scoring.reward_models import RewardModel
from megatron_fuse.scoring.scores import _readable
from megatron_fuse.stages import Context
from megatron_fuse.tokenization import load_tokenizer

ROME = call(0, "weather", city="Rome")
TALK = [asks("hello world"), calls(ROME), output(ROME, "20 degrees")]
EXAMPLE = Example("e", None, TALK, "It is warm.", tools=TOOLS)  # type: ignore[arg-type]
TOOL_ROW = {"id": "t", "messages": [*TALK, says("It is warm.")], "tools": json.dumps(TOOLS)}
PLAIN = [
    {"id": f"p{n}", "messages": [asks(f"hello {n}"), says("Sure."), asks("then?"), says("the station")]}
    for n in range(3)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories with config and tokenizer of a family; no weights."""
    root = tmp_path_factory.mktemp("models")

    def model(name: str) -> Path:
        directory = root / name
        if not directory.exists():
            save_tokenizer(name, directory)
            LlamaConfig(vocab_size=500, num_labels=1).save_pretrained(directory)
        return directory

    return model


def recipe_of(
    models: Callable[[str], Path], path: Path, rows: list[dict], source: str = "glm 4.5", **sections: Any
) -> Recipe:
    path.mkdir(exist_ok=True)
    data = write_rows(path / "rows.jsonl", rows)
    options = {"training": {"seq_length": 900}, **sections}
    options["data"] = {"validation_samples": 0, **options.get("data", {})}
    return small_recipe(path / "run", data, models("qwen3"), {"s": models(source)}, **options)


def listed(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (recipe.workdir / "instructions/examples.dropped.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_with_tools_reach_the_targets_text(models: Callable, tmp_path: Path) -> None:
    recipe = recipe_of(models, tmp_path, [*PLAIN, TOOL_ROW])
    artifact = prepare_instructions(Context(recipe))
    (example,) = [each for each in load_examples(artifact) if each.id == "t"]
    assert (example.messages, example.response, example.tools) == (TALK, "It is warm.", TOOLS)
    assert listed(recipe) == [] and "dropped_for_tools" not in artifact.counts
    target = load_format(recipe.target, "target")
    text = build_text(Context(recipe))
    assert text is not None and text.counts["documents"] == 4
    tokens = np.fromfile(text.directory / "shard-00000.tokens.bin", np.uint16)
    (labels,) = (np.fromfile(path, np.uint8) for path in text.directory.glob("*.supervised.bin"))
    whole, learned = (target.tokenizer.decode(ids.tolist()) for ids in (tokens, tokens[labels == 1]))
    assert "20 degrees" in whole and '"name": "weather"' in whole and "It is warm." in learned
    assert not any(part in learned for part in ("20 degrees", "weather", "Rome"))
    read = target.encode_conversation(
        example.prompt(), example.response, every_turn=True, tools=example.tools
    )
    assert example.target_tokens == len(read.ids)
    assert read.ids.tolist() in [
        tokens[begin : begin + len(read.ids)].tolist() for begin in range(len(tokens))
    ]


def test_rows_without_tools_are_written_without_the_key(models: Callable, tmp_path: Path) -> None:
    """The same bytes as those of instructions that were made before tools were read."""
    recipe = recipe_of(models, tmp_path, [*PLAIN, TOOL_ROW])
    artifact = prepare_instructions(Context(recipe))
    lines = (artifact.directory / "examples.00000.jsonl").read_text().splitlines()
    for line, example in zip(lines, load_examples(artifact), strict=True):
        row = asdict(example)
        assert row.pop("tools") == (TOOLS if example.id == "t" else None)
        assert ("tools" in json.loads(line)) == (example.id == "t")
        if example.id != "t":
            stored = {"held_out" if key == "is_validation" else key: value for key, value in row.items()}
            assert line == json.dumps(stored, ensure_ascii=False)
    keys = [
        "id",
        "system",
        "messages",
        "response",
        "truncated",
        "held_out",
        "target_tokens",
        "category",
        "reasoning",
    ]
    assert list(json.loads(lines[0])) == keys


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("vicuna", "sources.s: the chat template of {} does not print the offered tool weather"),
        ("gemma 1 and 2", "sources.s: the chat template of {} does not print the offered tool weather"),
    ],
)
def test_a_row_that_a_source_cannot_read_is_listed(
    models: Callable, tmp_path: Path, source: str, reason: str
) -> None:
    recipe = recipe_of(models, tmp_path, [TOOL_ROW, *PLAIN], source)
    artifact = prepare_instructions(Context(recipe))
    assert listed(recipe) == [
        {"id": "t", "line": 1, "kind": Kind.TOOLS, "reason": reason.format(models(source))}
    ]
    assert (artifact.counts["dropped_for_tools"], artifact.counts["dropped_for_length"]) == (1, 0)
    assert [each.id for each in load_examples(artifact)] == ["p0", "p1", "p2"]
    assert any(line.split() == ["tools", "1", "line", "1"] for line in left_out(artifact))
    alone = recipe_of(models, tmp_path / "alone", [TOOL_ROW], source)
    with pytest.raises(
        UserError, match=r"rows\.jsonl: no example can be read \('t': sources\.s: the chat template"
    ):
        prepare_instructions(Context(alone))


def test_what_a_template_refuses_is_listed_with_its_own_words(models: Callable, tmp_path: Path) -> None:
    add = call(1, "add", numbers=[1])
    row = TOOL_ROW | {
        "messages": [asks("hello"), calls(ROME, add), output(ROME, "1"), output(add, "2"), says("Sure.")]
    }
    recipe = recipe_of(models, tmp_path, [row, *PLAIN], "llama3.1")
    prepare_instructions(Context(recipe))
    (found,) = listed(recipe)
    assert found["reason"].endswith(" refuses the messages: single tool-calls at once!")


@pytest.mark.parametrize("reward_model", ["granite", "zephyr"])
def test_a_row_that_a_reward_model_cannot_read_is_listed(
    models: Callable, tmp_path: Path, reward_model: str
) -> None:
    options = {"model": str(models(reward_model)), "form": "classifier"}
    sections: dict[str, Any] = {"schedule": {"preset": "profuser"}, "reward_models": {"j": options}}
    recipe = recipe_of(models, tmp_path, [TOOL_ROW, *PLAIN], **sections)
    prepare_instructions(Context(recipe))
    reason = (
        f"reward_models.j: the chat template of {models(reward_model)} does not print the offered tool "
        "weather"
    )
    assert [row["reason"] for row in listed(recipe)] == ([] if reward_model == "granite" else [reason])


def test_a_reward_model_that_is_elsewhere_is_said(models: Callable, tmp_path: Path) -> None:
    """Only for rows with tools; the others need no reward model."""
    options = {"model": str(tmp_path / "none"), "form": "classifier"}
    sections: dict[str, Any] = {"schedule": {"preset": "profuser"}, "reward_models": {"j": options}}
    for rows, expected in (([TOOL_ROW, *PLAIN], True), (PLAIN, False)):
        recipe = recipe_of(models, tmp_path / f"{expected}", rows, **sections)
        with logged("warning") as said:
            assert len(load_examples(prepare_instructions(Context(recipe)))) == len(rows)
        assert ("not known whether reward_models.j can read tools" in said.getvalue()) == expected


def test_a_model_that_joins_later_is_named_with_the_row(models: Callable, tmp_path: Path) -> None:
    recipe = recipe_of(models, tmp_path, PLAIN, "vicuna")
    vicuna, zephyr = format_of("vicuna"), format_of("zephyr")
    served = SourceOptions(model=str(models("vicuna")), server={"url": "http://localhost:1/v1", "model": "x"})  # type: ignore[arg-type]
    asking = recipe.model_copy(update={"sources": {"s": served}})
    model = SimpleNamespace(config=LlamaConfig())
    reward_model = RewardModel("j", nn.Identity(), nn.Identity(), zephyr, stop=True, causal=True)
    meetings = [
        lambda: conversation_of(vicuna, EXAMPLE, None, every_turn=True),
        lambda: _prompts(recipe, "s", model, vicuna, [EXAMPLE]),
        lambda: _Format(asking, "s", vicuna).room(EXAMPLE),
        lambda: _readable(reward_model, EXAMPLE, [Response("e", "x", truncated=False, tokens=1)]),
    ]
    for meet in meetings:
        with pytest.raises(
            UserError, match=r"does not print .* \(example 'e'\)\. Choose another chat_template\. Or remove"
        ):
            meet()


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_server_is_asked_in_openais_form(models: Callable, tmp_path: Path, endpoint: str) -> None:
    recipe = recipe_of(models, tmp_path, PLAIN, "qwen3")
    server = {"url": "http://localhost:1/v1", "model": "x", "endpoint": endpoint}
    served = SourceOptions(model=str(models("qwen3")), server=server)  # type: ignore[arg-type]
    chat = format_of("qwen3")
    format = _Format(recipe.model_copy(update={"sources": {"s": served}}), "s", chat)
    body = format.body(EXAMPLE, 5)
    if endpoint == "completions":
        assert body["prompt"] == chat.render_prompt(TALK, TOOLS) and "tools" not in body
        return
    assert (body["tools"], body["tool_choice"]) == (TOOLS, "none")
    asked = json.loads(json.dumps(body["messages"]))
    assert asked[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert asked[2] == TALK[2] and (asked[0], asked[1]["role"]) == (TALK[0], "assistant")
    plain = format.body(Example("p", None, [asks("hello")], "x"), 5)  # type: ignore[list-item]
    assert not {"tools", "tool_choice"} & set(plain)


@pytest.mark.parametrize(
    "prompt",
    [
        "hello world",
        TALK,
        [TALK[0],
         {**TALK[1], "content": None,
          "tool_calls": [{"function": {"name": "weather", "arguments": '{"city":"Rome"}'}}]},
         {"role": "tool", "content": "20 degrees"}],
    ],
)  # fmt: skip
def test_answers_in_a_file_are_found_by_a_prompt_with_calls(tmp_path: Path, prompt: Any) -> None:
    other = Example("o", None, [*TALK[:2], output(ROME, "30 degrees")], "x", tools=TOOLS)  # type: ignore[list-item]
    path = write_rows(tmp_path / "answers.jsonl", [{"prompt": prompt, "response": "Warm."}])
    options = ResponseFile(path=path, match="prompt")
    examples = [EXAMPLE] if isinstance(prompt, str) else [EXAMPLE, other]
    answer = given_answers(options, "s", format_of("qwen3"), examples)
    found = answer(0, examples)
    assert [each and each.response for each in found] == ["Warm.", None][: len(examples)]


def test_texts_of_tools_are_cleaned_as_prompts_are() -> None:
    decomposed = "e\u0301"
    made = call(0, "weather", **{decomposed: [decomposed]})
    messages = [asks("hello"), calls(made, reasoning_content=decomposed), output(made, f" {decomposed}")]
    example = Example("e", None, messages, "x", tools=[tool(decomposed)])  # type: ignore[arg-type]
    clean = Cleaning(nfc=True, strip=True)(example)
    assert decomposed not in json.dumps(asdict(clean), ensure_ascii=False)
    assert clean.messages[2]["content"] == " é"  # what the assistant says alone is stripped
    for reasoning in ("drop", "supervise"):  # a call is context: its thought is not learned
        (_, found, _) = Cleaning(nfc=False, strip=False, reasoning=reasoning)(example).messages
        assert (found["content"], found["tool_calls"]) == ("", [made]) and "reasoning_content" not in found


def test_estimates_count_tools(models: Callable, tmp_path: Path) -> None:
    plain = {"id": "t", "messages": [asks("hello world"), says("It is warm.")]}
    small, large = (
        estimate_amounts(Context(recipe_of(models, tmp_path / name, [row])))
        for name, row in (("a", plain), ("b", TOOL_ROW))
    )
    assert large.prompt_tokens > small.prompt_tokens + len(json.dumps(TOOLS)) / 8
    assert large.response_tokens == pytest.approx(small.response_tokens)


def test_reports_show_calls() -> None:
    assert _spoken(TALK[1]) == 'weather({"city": "Rome"})'
    assert _spoken(TALK[0]) == "hello world"


def test_shards_are_read_as_they_were_written(models: Callable, tmp_path: Path) -> None:
    """Also what JSON and Python write differently: large numbers, null, nested lists."""
    arguments = {"a": [1, 2.5, None, True, {"b": []}], "n": 12345678901234567890123, "é": "\u2028"}
    made = call(0, "weather", **arguments)
    row = TOOL_ROW | {"messages": [asks("hello"), calls(made), output(made, ""), says("Sure.")]}
    recipe = recipe_of(models, tmp_path, [row])
    (example,) = example_shards(prepare_instructions(Context(recipe)))[0]
    assert example.messages[1]["tool_calls"] == [made]
    assert load_chat_format(load_tokenizer(models("qwen3"))).encode_prompt(example.prompt(), example.tools)
