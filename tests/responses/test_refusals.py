"""Which openings decline."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fuse.responses.refusals import is_refusal

DATA = Path(__file__).parents[2] / "../shared/data"

DECLINES = [
    "I'm sorry, but I can't help with that.",
    "I am sorry but I'm unable to provide such a list.",
    "Sorry, I cannot assist with this request.",
    "As an AI language model, I cannot predict future events. However, I can give some hints.",
    "As a responsible and ethical assistant, I must inform you that I cannot provide a list of courses.",
    "I cannot fulfill your request. I'm just an AI.",
    "I apologize, but I am unable to discuss this.",
    "I'm just an AI, it's not within my programming or ethical guidelines to provide information on it.",
    "Thank you for your question! I'm here to help you. However, I must inform you that I cannot provide "
    "such advice.",
    "No, I'm sorry but I can't help you write your memoir.",
    "I must respectfully decline to write this.",
    "As an AI language model, it is not ethical or appropriate for me to provide advice on tax fraud.",
    "I'm sorry, but as an AI assistant I do not have the ability to write essays.",
    "I won't participate in this.",
    "**I'd rather not** say.",
]
ANSWERS = [
    "",
    "Paris.",
    "I'm sorry to hear that. I can't imagine how you feel.",
    "I'm so sorry for your loss. I can't find the words.",
    "I'm sorry you had a rough day. What happened?",
    "As an AI language model, I don't have personal preferences. Here is what others say:",
    "As an AI language model, I think that both matter.",
    "As an AI, I cannot feel, but I can list what people report.",
    "I cannot help the way I feel about the Lord up high",
    "I can't wait to see you! I cannot provide for the party, though.",
    "I cannot stress enough how much sleep matters.",
    "I apologize for being late, but I'm here now and ready to start our date!",
    "Thank you for asking! You cannot divide by zero.",
    "Hello! I'm here to help you. However, I must point out that a tomato is a fruit.",
    "I'm sorry, I'm not sure what you mean. Could you say more?",
    "Banks cannot provide cash as capital because it is volatile.",
    "He said: I'm sorry, but I can't help you.",
    "The cake is done. I'm sorry, but I can't help you with the icing.",
]


@pytest.mark.parametrize("text", DECLINES)
def test_answers_that_decline(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_that_do_not(text: str) -> None:
    assert not is_refusal(text)


@given(
    text=st.sampled_from(DECLINES + ANSWERS),
    before=st.text("\n\t \"“‘'*>", max_size=4),
    case=st.sampled_from([str, str.upper, str.lower]),
    apostrophe=st.sampled_from("'’"),
    wrap=st.sampled_from(" \n"),
    after=st.sampled_from(["", " Bye.", "\n\nI'm sorry, but I can't help with that."]),
)
def test_look_and_sequel_do_not_matter(
    text: str, before: str, case, apostrophe: str, wrap: str, after: str
) -> None:
    """Neither case, apostrophes, quotes, line breaks, nor what comes after an opening that has decided."""
    if text in DECLINES or not text:
        after = after.partition("\n")[0]
    changed = (
        before + case(text).replace("'", apostrophe).replace(" ", wrap) + "\n" + "Well then. " * 5 + after
    )
    assert is_refusal(changed) == (text in DECLINES)


@given(st.text())
def test_any_text_has_an_answer(text: str) -> None:
    assert is_refusal(text) in (True, False)


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")
def test_models_that_are_known_to_decline_do() -> None:
    """Llama-2-chat declines more than any of the others, and GPT-4's ground truth hardly ever."""
    rows = [json.loads(line) for line in (DATA / "responses/alpaca_eval.jsonl").open(encoding="utf-8")]
    share = {
        name: sum(is_refusal(row["responses"][name]) for row in rows) / len(rows)
        for name in rows[0]["responses"]
    }
    assert max(share, key=share.__getitem__) == "llama-2-7b-chat-hf"
    assert 0.05 < share["llama-2-7b-chat-hf"] < 0.15
    truth = [json.loads(line)["output"] for line in (DATA / "instructions/gpt4.jsonl").open(encoding="utf-8")]
    assert 0 < sum(map(is_refusal, truth)) / len(truth) < 0.01
