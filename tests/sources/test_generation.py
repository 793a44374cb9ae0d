"""Laws of generation in process: an answer depends on model, prompt and seed alone, and ends before the
first stop text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, save_model
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.recipe import SourceOptions
from megatron_fuse.responses import answer_text
from megatron_fuse.responses.stop_texts import StopTexts
from megatron_fuse.sources.generation import Answer, Prompt, Sampling, generate, sample

POSITIONS = 128


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        family: save_model(root / family, family, seed=seed, positions=POSITIONS)
        for seed, family in enumerate(FAMILIES)
    }


def loaded(models: dict[str, Path], family: str, **options: object) -> tuple[Any, ChatFormat]:
    source = SourceOptions(model=str(models[family]), **{"dtype": "fp32", **options})
    return load_causal_lm(source), load_format(source, family)


def naive_answer(
    model: Any, prompt: Prompt, sampling: Sampling, is_complete: Callable[[Sequence[int]], bool]
) -> Answer:
    """No batch, no cache, no padding: the whole text is read again for every token."""
    uniforms = np.random.Generator(np.random.Philox(key=prompt.seed)).random(max(prompt.room, 0))
    ids: list[int] = []
    for uniform in uniforms:
        logits = model(torch.tensor([[*prompt.ids, *ids]])).logits[0, -1].double()[: len(sampling.allowed)]
        logits[~sampling.allowed] = -torch.inf
        probabilities = torch.softmax(logits / (sampling.temperature or 1), 0).cumsum(0)
        token = int(logits.argmax()) if sampling.temperature == 0 else int((probabilities <= uniform).sum())
        if token in sampling.stop_ids:
            return Answer(ids, stopped=True)
        ids.append(token)
        if is_complete(ids):
            return Answer(ids, stopped=True)
    return Answer(ids, stopped=False)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (MambaForCausalLM, MambaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1)),
        (
            Lfm2ForCausalLM,
            Lfm2Config(
                vocab_size=40,
                hidden_size=16,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=16,
                num_hidden_layers=2,
                layer_types=["conv", "full_attention"],
            ),
        ),
    ],
)
def test_a_model_that_keeps_a_state_is_refused(model_class: type, config: Any) -> None:
    """One whose layers read nothing but the last token of what is in the cache would answer something
    else.
    """
    sampling = Sampling(frozenset({2}), torch.ones(40, dtype=torch.bool))
    with pytest.raises(UserError, match=rf"{model_class.__name__} keeps other state than keys and values"):
        generate(model_class(config), [Prompt("e", [4, 5], 3, 0)], sampling, batch_tokens=10)


def watch(model: Any) -> list[tuple[int, int, int]]:
    """(rows, tokens read, width) of every forward pass from now on."""
    passes: list[tuple[int, int, int]] = []

    def note(module: Any, arguments: tuple, named: dict[str, torch.Tensor]) -> None:
        passes.append((*named["input_ids"].shape, named["attention_mask"].shape[1]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_answers_equal_those_without_batch_cache_and_padding(
    models: dict[str, Path], family: str, temperature: float
) -> None:
    model, chat = loaded(models, family)
    seed = 20 + FAMILIES.index(family)
    random = np.random.default_rng(seed)
    # Lengths far apart, and room up to the last position that the model has: a batch must not outgrow it
    # (ALiBi tables end there).
    lengths = [1, 2, 40, 90, 120, 127, 128, 11, 12, 60, 3, 30, 100, 5, 70]
    prompts = [
        Prompt(
            str(i), random.integers(4, 260, n).tolist(), POSITIONS - n if n > 60 else 9 + i, seed * 100 + i
        )
        for i, n in enumerate(lengths)
    ]
    allowed = torch.ones(chat.tokenizer.vocab_size, dtype=torch.bool)
    allowed[[0, 1, 3]] = False
    texts = ["e", "1", "o", "fox", "\n"]
    stop = StopTexts(texts, chat)
    sampling = Sampling(frozenset(range(5, 300, 25)), allowed, temperature, is_complete=stop.completed_by)

    def is_complete(ids: Sequence[int]) -> bool:
        return any(text.encode() in chat.tokenizer.joined_bytes(ids) for text in texts)

    expected = [naive_answer(model, prompt, sampling, is_complete) for prompt in prompts]
    ways = {(answer.stopped, is_complete(answer.ids)) for answer in expected}
    assert ways == {(True, True), (True, False), (False, False)}, f"seed {seed} tells nothing"
    passes = watch(model)
    for batch_tokens in (1, 300, 700, 5000):
        passes.clear()
        finished: dict[str, Answer] = {}

        def note(prompt: Prompt, answer: Answer, finished: dict[str, Answer] = finished) -> None:
            assert prompt.name not in finished
            finished[prompt.name] = Answer(list(answer.ids), answer.stopped)

        found = generate(model, prompts, sampling, batch_tokens=batch_tokens, finished=note)
        assert found == expected, f"seed {seed}, {batch_tokens}"
        assert finished == {prompt.name: answer for prompt, answer in zip(prompts, expected, strict=True)}
        assert all(rows * width <= batch_tokens or rows == 1 for rows, _, width in passes)
        assert max(width for _, _, width in passes) <= POSITIONS
        if batch_tokens == 700:  # prompts took the places of finished rows while others were under way
            assert any(
                tokens > 1 and rows < after > before > 0
                for (before, _, _), (rows, tokens, _), (after, _, _) in zip(
                    passes, passes[1:], passes[2:], strict=False
                )
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "nearest", "share", "count"),
    [
        ("fp32", 1e-4, 0.01, 100),
        pytest.param("fp32", 1e-4, 0.01, 300, marks=pytest.mark.slow),
        pytest.param("bf16", 0.02, 0.25, 300, marks=pytest.mark.slow),
    ],
)
def test_budgets_differ_only_where_two_tokens_are_as_likely(
    models: dict[str, Path], family: str, dtype: str, nearest: float, share: float, count: int
) -> None:
    """Sums differ with the batch's shape: a greedy answer may turn where the two likeliest tokens are that
    near to each other.

    In fp32 they are nearer than 1e-4, and fewer than 1 in 100 answers turn: none of these does. In bf16 they
    need not be: it has 8 bits, and its rounding moves logits by whole steps. Of these answers up to 17 %
    turn, at gaps up to 0.0033.
    """
    model, chat = loaded(models, family, dtype=dtype)
    random = np.random.default_rng(7)
    prompts = [
        Prompt(str(i), random.integers(4, 260, random.integers(1, 30)).tolist(), 24, i) for i in range(count)
    ]
    allowed = torch.from_numpy(chat.tokenizer.byte_lengths > 0)
    sampling = Sampling(frozenset(range(5, 300, 60)), allowed, temperature=0.0)
    budgets = [
        generate(model, prompts, sampling, batch_tokens=batch_tokens) for batch_tokens in (400, 2000, 20000)
    ]
    gaps, turned = [], set()
    for prompt, first, *others in zip(prompts, *budgets, strict=True):
        for other in others:
            if other != first:
                turned.add(prompt.name)
                gaps.append(first_gap(model, prompt, first, other, sampling))
    assert all(gap < nearest for gap in gaps), gaps
    assert len(turned) < share * len(prompts), turned


def first_gap(model: Any, prompt: Prompt, answer: Answer, other: Answer, sampling: Sampling) -> float:
    """How far apart the two likeliest tokens are where two answers first differ."""
    same = 0
    for one, two in zip(answer.ids, other.ids, strict=False):
        if one != two:
            break
        same += 1
    logits = (
        model(torch.tensor([[*prompt.ids, *answer.ids[:same]]]))
        .logits[0, -1]
        .double()[: len(sampling.allowed)]
    )
    first, second = (
        torch.softmax(logits.masked_fill(~sampling.allowed, -torch.inf), 0).topk(2).values.tolist()
    )
    return first - second


def test_prompts_without_room_and_none_at_all(models: dict[str, Path]) -> None:
    model, chat = loaded(models, "llama")
    sampling = Sampling(frozenset(), torch.ones(chat.tokenizer.vocab_size, dtype=torch.bool))
    assert generate(model, [], sampling, batch_tokens=100) == []
    prompts = [Prompt("a", [5] * 9, 0, 1), Prompt("b", [6], 2, 2), Prompt("c", [7] * 200, -72, 3)]
    finished = []
    answers = generate(
        model, prompts, sampling, batch_tokens=100, finished=lambda *pair: finished.append(pair)
    )
    assert [(len(answer.ids), answer.stopped) for answer in answers] == [(0, False), (2, False), (0, False)]
    assert sorted(finished, key=lambda pair: pair[0].name) == list(zip(prompts, answers, strict=True))


def test_empty_answers_alone_are_reported_as_finished(models: dict[str, Path]) -> None:
    """Every first token is a stop token: no answer has a token, and none is left to come."""
    model, chat = loaded(models, "llama")
    size = chat.tokenizer.vocab_size
    sampling = Sampling(frozenset(range(size)), torch.ones(size, dtype=torch.bool))
    prompts = [Prompt(f"e{n}", [4, 5 + n], 3, n) for n in range(3)]
    reports: list[tuple[int, int, float]] = []
    answers = generate(
        model, prompts, sampling, batch_tokens=8, report=lambda *values: reports.append(values)
    )
    assert answers == [Answer([], True)] * 3
    assert reports[-1] == (3, 0, 1.0) and all(share <= 1 for _, _, share in reports)


@pytest.mark.parametrize("top_p", [1.0, 0.6, 0.05])  # 0.05: less than the likeliest token has
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_distribution(temperature: float, top_p: float) -> None:
    torch.manual_seed(4)
    logits = torch.randn(1, 11) * 2
    logits[0, [0, 10]] = -torch.inf
    draws = 2000
    # An even grid hits every token in its exact share.
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    share = torch.bincount(sample(logits.expand(draws, -1), grid, temperature, top_p), minlength=11) / draws
    expected = torch.softmax(logits[0].double() / temperature, 0)
    order = expected.argsort(descending=True)
    kept = int((expected[order].cumsum(0) < top_p).sum()) + 1
    expected[order[kept:]] = 0
    expected /= expected.sum()
    torch.testing.assert_close(share.double(), expected, atol=1.01 / draws, rtol=0)


def test_the_ends_of_the_random_range_give_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]]).repeat(2, 1)
    uniforms = torch.tensor([0.0, float(np.nextafter(1, 0))], dtype=torch.float64)
    assert sample(logits, uniforms, 1.0, 1.0).tolist() == [1, 2]
    assert sample(logits, uniforms, 0.0, 1.0).tolist() == [2, 2]


@pytest.fixture(scope="module")
def formats(models: dict[str, Path]) -> dict[str, ChatFormat]:
    """One tokenizer, by the white space that the template puts before a response."""
    options = SourceOptions(model=str(models["mpt"]))
    chosen = [
        load_format(options.model_copy(update={"chat_template": name}), "mpt")
        for name in (None, "vicuna_v1.1")
    ]
    assert [chat.separator for chat in chosen] == ["", " "]
    return {chat.separator: chat for chat in chosen}


def test_text_is_the_exact_decode_without_separator_and_broken_characters(
    formats: dict[str, ChatFormat],
) -> None:
    plain, spaced = formats[""], formats[" "]
    ids = plain.tokenizer.encode_continuation("  Sure 👍\n")
    assert answer_text(plain, Answer(ids, stopped=True)) == ("  Sure 👍\n", len(ids))
    assert answer_text(spaced, Answer(ids, stopped=True)) == (" Sure 👍\n", len(ids))
    emoji = plain.tokenizer.encode_continuation("a👍")
    assert len(emoji) == 5  # one token a byte: the cut falls inside the character
    assert answer_text(plain, Answer(emoji[:3], stopped=False)) == ("a", 3)
    assert answer_text(plain, Answer(emoji[:3], stopped=True)) == ("a\N{REPLACEMENT CHARACTER}", 3)
    assert answer_text(plain, Answer([], stopped=True), StopTexts(["a"], plain)) == ("", 0)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), separator=st.sampled_from(["", " "]))
def test_an_answer_ends_before_the_stop_text_that_is_whole_first(
    formats: dict[str, ChatFormat], data: st.DataObject, separator: str
) -> None:
    chat = formats[separator]
    pieces = chat.tokenizer.token_bytes
    letters = [token for token, piece in enumerate(pieces) if piece and not piece.strip(b" pearl")]
    assert max(len(pieces[token]) for token in letters) > 2  # whole stop texts inside a token
    texts = data.draw(st.lists(st.text(" pearl", min_size=1, max_size=5), min_size=1, max_size=3))
    spelled = st.sampled_from(texts).map(lambda text: [pieces.index(bytes([byte])) for byte in text.encode()])
    parts = data.draw(
        st.lists(st.sampled_from(letters).map(lambda token: [token]) | spelled, min_size=1, max_size=12)
    )
    ids = [token for part in parts for token in part]
    stop = StopTexts(texts, chat)
    whole = b"".join(pieces[token] for token in ids)
    space = len(separator) if whole.startswith(separator.encode()) else 0
    # Byte by byte: the first end of a stop text, and of those that end there the longest.
    endings = [
        (end - len(text), end)
        for end in range(space, len(whole) + 1)
        for text in sorted(texts, key=len, reverse=True)
        if whole[space:end].endswith(text.encode())
    ]
    begin, end = endings[0] if endings else (len(whole), len(whole) + 1)
    ends = np.cumsum([len(pieces[token]) for token in ids])
    completed = [stop.completed_by(ids[:count]) for count in range(1, len(ids) + 1)]
    # Tokens until the stop text is whole: what comes later is never asked for.
    before = int(np.searchsorted(ends, end))
    assert completed[: before + 1] == [False] * before + [True] * (before < len(ids))
    text, tokens = answer_text(chat, Answer(ids[: before + 1], stopped=True), stop)
    assert text.encode() == whole[space:begin]
    assert b"".join(pieces[token] for token in ids[:tokens]).startswith(whole[:begin])
    assert tokens == 0 or len(b"".join(pieces[token] for token in ids[: tokens - 1])) < begin
