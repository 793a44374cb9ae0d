"""What becomes of examples that are longer than seq_length."""

import json
import re
from pathlib import Path

import pytest
from small_instructions import alpaca, recipe_for
from small_tokenizers import make_tokenizer

from megatron_fuse.chat import load_chat_format
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import load_examples, prepare_instructions
from megatron_fuse.instructions.bad_rows import BadRow
from megatron_fuse.instructions.examples import Example
from megatron_fuse.instructions.length import fit
from megatron_fuse.stages import Context
from megatron_fuse.tokenization import load_tokenizer


# Neighbours: the cut falls on every byte of a character.
@pytest.mark.parametrize("seq_length", [40, 41, 42, 43, 64])
def test_a_cut_response_is_the_longest_that_fits_every_model(
    models: dict[str, Path], tmp_path: Path, seq_length: int
) -> None:
    texts = [
        "The quick brown fox. " * 20,
        "日本語のテキスト" * 9,
        "👍🏽é" * 12,
        "12345 " * 30,
        "ok",
        "\r\n\0 x" * 30,
    ]
    rows = [{"id": str(i), "instruction": "Q?", "output": text} for i, text in enumerate(texts)]
    recipe = recipe_for(models, tmp_path, rows, training={"seq_length": seq_length})
    artifact = prepare_instructions(Context(recipe))
    formats = [load_format(recipe.target, "target"), *(load_format(o, n) for n, o in recipe.sources.items())]
    examples = load_examples(artifact)
    assert [e.truncated for e in examples] == [True, True, True, True, False, True]
    assert artifact.counts["truncated"] == 5
    for example, text in zip(examples, texts, strict=True):
        assert text.startswith(example.response)
        encoded = [
            f.encode_conversation(example.prompt(), example.response, stop=not example.truncated)
            for f in formats
        ]
        assert example.target_tokens == len(encoded[0].ids)
        longest = max(len(e.ids) for e in encoded)
        assert longest <= seq_length
        if example.truncated:  # up to three byte tokens are given up for a whole character
            assert longest >= seq_length - 3
            more = text[: len(example.response) + 1]
            assert (
                max(len(f.encode_conversation(example.prompt(), more, stop=False).ids) for f in formats)
                > seq_length
            )


def test_text_stays_whole_where_only_its_stop_token_is_too_much(
    models: dict[str, Path], tmp_path: Path
) -> None:
    chat = load_format(recipe_for(models, tmp_path, [alpaca(1)]).target, "target")
    example = Example("x", None, [{"role": "user", "content": "Q"}], "abc 👍")
    length = len(chat.encode_conversation(example.prompt(), example.response).ids)
    whole, stopless, cut = (fit(example, [("target", chat)], length - less) for less in range(3))
    assert (whole.response, whole.truncated) == ("abc 👍", False)
    assert (stopless.response, stopless.truncated) == ("abc 👍", True)
    assert (cut.response, cut.truncated) == ("abc ", True)


# llama2 keeps every turn's white space and ends it with EOS; vicuna_v1.1's first token of a turn is a leading
# one.
@pytest.mark.parametrize("template", ["chatml", "vicuna_v1.1", "llama2"])
@pytest.mark.parametrize("every_turn", [False, True])
def test_only_the_last_response_is_cut_at_any_length(tmp_path: Path, template: str, every_turn: bool) -> None:
    kinds = ["byte_level"] if template == "chatml" else ["sentencepiece", "llama_json"]
    formats = [
        (kind, load_chat_format(load_tokenizer(make_tokenizer(kind, tmp_path / kind)), template))
        for kind in kinds
    ]
    turns = ["international?", "Sure: été 🙂", "and 12?", "x", "more", "nation 日本 answer"]
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, turns, strict=True)
    ]
    example = Example("x", None, messages[:-1], turns[-1])

    def tokens(text: str, stop: bool) -> int:
        encoded = [
            f.encode_conversation(messages[:-1], text, stop=stop, every_turn=every_turn) for _, f in formats
        ]
        return max(len(e.ids) for e in encoded)

    outcomes = set()
    for seq_length in range(tokens("", False) - 2, tokens(turns[-1], True) + 1):
        try:
            fitted = fit(example, formats, seq_length, every_turn=every_turn)
        except BadRow as reason:
            outcomes.add("left out")
            assert tokens("n", False) > seq_length, seq_length
            assert re.search("leaves no room: [0-9]+ tokens for", str(reason)), seq_length
            continue
        outcomes.add("cut" if fitted.truncated else "whole")
        assert fitted.messages == example.messages and turns[-1].startswith(fitted.response), seq_length
        assert tokens(fitted.response, not fitted.truncated) <= seq_length, seq_length
        if fitted.truncated and fitted.response != turns[-1]:
            assert tokens(turns[-1][: len(fitted.response) + 1], False) > seq_length, (
                f"{seq_length}: more would fit"
            )
    assert outcomes == {"left out", "cut", "whole"}


def test_long_examples_are_dropped_by_policy_and_the_sample_is_still_filled(
    models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [alpaca(n) if n % 2 else alpaca(n, output="long " * 99) for n in range(20)]
    recipe = recipe_for(models, tmp_path, rows, data={"too_long": "drop", "samples": 10})
    artifact = prepare_instructions(Context(recipe))
    assert sorted(int(e.id[1:]) for e in load_examples(artifact)) == list(range(1, 20, 2))
    dropped = [json.loads(line) for line in (artifact.directory / "examples.dropped.jsonl").open()]
    assert artifact.counts["dropped_for_length"] == len(dropped) > 0
    assert all("tokens for" in row["reason"] for row in dropped)


def test_a_prompt_without_room_is_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [alpaca(1), alpaca(2, instruction="word " * 200)]
    artifact = prepare_instructions(Context(recipe_for(models, tmp_path, rows)))
    assert [e.id for e in load_examples(artifact)] == ["e1"]
    assert artifact.counts["dropped_for_length"] == 1


_MEGABYTES = [("word ", "truncate"), ("a", "drop"), ("\r\n", "truncate")]
_MORE_MEGABYTES = [("a", "truncate")] + [
    (text, policy) for text in ("🙂", "e\u0301", "\0") for policy in ("truncate", "drop")
]


@pytest.mark.parametrize(
    ("text", "policy"),
    [*_MEGABYTES, *(pytest.param(*case, marks=pytest.mark.slow) for case in _MORE_MEGABYTES)],
    ids=ascii,
)
def test_a_megabyte_is_cut_or_dropped(
    models: dict[str, Path], tmp_path: Path, text: str, policy: str
) -> None:
    whole = text * (10**6 // len(text.encode())) + "end"
    recipe = recipe_for(models, tmp_path, [alpaca(1), alpaca(2, output=whole)], data={"too_long": policy})
    artifact = prepare_instructions(Context(recipe))
    dropped = [json.loads(line)["reason"] for line in (artifact.directory / "examples.dropped.jsonl").open()]
    assert [e.id for e in load_examples(artifact)] == (["e1"] if dropped else ["e1", "e2"])
    if policy == "drop":
        assert re.fullmatch(r"[0-9]+ tokens for target, seq_length is 128", *dropped)
    elif not text.strip():
        assert re.match("the prompt leaves room for white space only: ", *dropped)
    else:
        _, cut = load_examples(artifact)
        assert cut.truncated and len(cut.response) > 10 and whole.startswith(cut.response)
