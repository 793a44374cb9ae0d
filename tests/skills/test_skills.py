"""The skills: right answers are right, splits do not leak, and packing, decoding and chat ids are what
they claim.
"""

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "examples" / "skills"
sys.path.insert(0, str(SCRIPTS))

import evaluate  # noqa: E402
import lm  # noqa: E402
import make_tokenizers  # noqa: E402
import skills  # noqa: E402
import train_sources  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

NAMES = list(make_tokenizers.STOP_TOKENS)


def solve(problem: skills.Problem) -> str:
    """The answer from the instruction's text alone, by other code than the one that words it."""
    text = problem.instruction
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    letters = re.findall(r"\b[a-z]\b", text)
    if problem.skill == "addition":
        return str(sum(numbers))
    if problem.skill == "weekday":
        start = next(place for place, day in enumerate(skills.DAYS) if day in text)
        return skills.DAYS[(start + (numbers[0] if "after" in text else -numbers[0])) % 7]
    if problem.skill == "sorting":
        return " ".join(sorted(letters))
    if problem.skill == "reversing":
        return " ".join(reversed(letters))
    if problem.skill == "shifting":
        return " ".join(chr((ord(letter) - ord("a") + numbers[0]) % 26 + ord("a")) for letter in letters)
    sizes = {
        "week": 7,
        "year": 12,
        "feet": 12,
        "pound": 16,
        "hours and": 60,
        "minutes and": 60,
        "days and": 24,
    }
    return str(
        numbers[0] * next(size for word, size in sizes.items() if re.search(rf"\d {word}", text)) + numbers[1]
    )


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_answers_are_right_and_wrong_ones_are_wrong(skill):
    rng = random.Random(7)
    for _ in range(200):
        problem = skills.draw(skill, "train", rng)
        assert problem.answer == solve(problem), problem
        for form in skills.FORMS:
            assert skills.answer_of(problem.response(form)) == problem.answer
            assert skills.answer_of(skills.wrong_response(problem, form, rng)) not in (
                problem.answer,
                None,
            ), problem
        assert len({problem.answer, *skills.wrong_answers(problem, rng)}) == 4


def test_unfinished_text_has_no_answer():
    assert skills.answer_of("7+3=10. The answer is 1") is None
    assert skills.answer_of("7+3=10.") is None
    assert skills.answer_of("The answer is 3. The answer is 4.") == "4"


def test_splits_share_no_problem_and_are_reproducible():
    drawn = {split: skills.distinct(split, 40, seed=3) for split in skills.SPLITS}
    assert skills.distinct("test", 40, seed=3) == drawn["test"]
    seen = [(problem.skill, problem.values) for problems in drawn.values() for problem in problems]
    assert len(seen) == len(set(seen)) == 40 * len(skills.SKILLS) * len(skills.SPLITS)
    reworded = [
        skills.SKILLS[p.skill].word(p.values, random.Random(n)) for p in drawn["test"] for n in range(3)
    ]
    assert {problem.split for problem in reworded} == {"test"}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    output = tmp_path_factory.mktemp("build")
    make_tokenizers.make_tokenizers(output, seed=5)
    return output


def chats_of(build, name, count=12, seed=2):
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(build / "tokenizers" / name)
    problems = [skills.draw(skill, "dev", rng) for skill in rng.choices(list(skills.SKILLS), k=count)]
    pairs = [(problem.instruction, problem.response(rng.choice(skills.FORMS))) for problem in problems]
    return tokenizer, pairs, lm.encode_chats(tokenizer, make_tokenizers.STOP_TOKENS[name], pairs)


@pytest.mark.parametrize("name", NAMES)
def test_chat_ids_are_those_of_the_library(build, name):
    from megatron_fuse.chat import load_chat_format
    from megatron_fuse.tokenization import load_tokenizer

    tokenizer, pairs, chats = chats_of(build, name)
    chat_format = load_chat_format(load_tokenizer(build / "tokenizers" / name))
    assert evaluate.stop_token_of(tokenizer) == make_tokenizers.STOP_TOKENS[name]
    for (instruction, response), (ids, prompt_length) in zip(pairs, chats, strict=True):
        ours = chat_format.encode_conversation([{"role": "user", "content": instruction}], response)
        assert (ours.ids.tolist(), ours.prompt_length, ours.exact) == (ids, prompt_length, True), instruction


def test_sentencepiece_and_hugging_face_agree(build):
    import sentencepiece

    directory = build / "tokenizers" / "alpha"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # Words that were never seen, letters of several bytes, two spaces, a line break: all go through merges or
    # bytes.
    for text in [*make_tokenizers.corpus(9, per_skill=20), "Zürich  is\nnice", "internationalization 1234"]:
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), text


@pytest.mark.parametrize("name", NAMES)
def test_packing_and_padding_change_nothing(build, name):
    """Log-probabilities and greedy answers are those of one conversation alone, without packing, padding
    or a cache.
    """
    torch.manual_seed(4)
    tokenizer, _, chats = chats_of(build, name)
    model = train_sources.build(name, tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the start, where all positions look alike
            parameter.add_(0.1 * torch.randn_like(parameter))
        alone = []
        for ids, prompt_length in chats:
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            alone.append(sum(logprobs[at - 1, ids[at]].item() for at in range(prompt_length, len(ids))))
        np.testing.assert_allclose(evaluate.response_logprobs(model, chats), alone, rtol=1e-4)

        prompts = [ids[:length] for ids, length in chats[:4]]
        # So that one answer ends at once.
        stop_id = int(model(torch.tensor([prompts[0]])).logits[0, -1].argmax())
        responses = evaluate.generate(model, prompts, stop_id, batch_size=3)
    assert responses[0] == []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            best = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
        ended = len(response) < evaluate.MAX_NEW_TOKENS
        assert best[: len(response) + ended] == response + [stop_id] * ended


def test_directory_appears_only_when_finished(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), lm.replace_directory(target, "a") as temporary:
        (temporary / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with lm.replace_directory(target, "a") as temporary:
        (temporary / "whole").write_text("")
    assert lm.is_made(target, "a") and not lm.is_made(target, "b") and (target / "whole").exists()
