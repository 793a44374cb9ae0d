"""Laws of the example cards: at most ten different examples, the same for the same data, each showing what
its reason says.
"""

import numpy as np
import pytest
from random_observations import MODES, random_observations, texts_of

from megatron_fuse.report.advantage.cards import CARDS, card, choose_cards
from megatron_fuse.report.advantage.numbers import tied
from megatron_fuse.report.advantage.observations import Observations
from megatron_fuse.selection.rules import NONE


def holds(seen: Observations, n: int, reason: str) -> bool:
    """Whether the data show what a card says of example n."""
    sources = {mode: int(arrays["source"][n]) for mode, arrays in seen.selections.items()}
    names = {mode: None if place == NONE else seen.sources[place] for mode, place in sources.items()}
    mode = "inference" if "inference" in sources else "training"
    margin = seen.selections[mode]["margin"][n]
    tie = bool(seen.reward_models) and bool(tied(seen.selections[mode]["votes"], seen.answers.same)[n])
    named = all(name in reason for name in names.values() if name) or f"of {names[mode]} in" in reason
    kinds = {
        "a clear win": margin > 0 and not tie,
        "a narrow win": margin > 0 and not tie,
        "a tie": tie,
        "the modes disagree": len(set(sources.values())) == 2 and named,
        "no source wins": sources[mode] == NONE,
    }
    for beginning, true in kinds.items():
        if reason.startswith(beginning):
            return true
    if reason.startswith("the winning answer"):
        flags = seen.answers.truncated if "cut off" in reason else seen.answers.refused
        return names[mode] in reason and bool(flags[n, sources[mode]])
    if "both modes" in reason:
        return len(set(sources.values())) == 1 and names[mode] in reason
    return "without a competitor" in reason and margin == np.inf and names[mode] in reason


@pytest.mark.parametrize("sources", [1, 3, 8])
@pytest.mark.parametrize("reward_models", [0, 1, 2, 3])
@pytest.mark.parametrize("modes", [MODES, ("training",), ("inference",)])
def test_cards_are_different_examples_that_show_their_reason(
    sources: int, reward_models: int, modes: tuple[str, ...]
) -> None:
    rule = "vote" if reward_models else "reference"
    for seed in range(3):
        seen = random_observations(seed, sources=sources, reward_models=reward_models, modes=modes, rule=rule)
        choices = choose_cards(seen)
        assert choices == choose_cards(seen)
        assert len({choice.example for choice in choices}) == len(choices) == CARDS
        for choice in choices:
            assert holds(seen, choice.example, choice.reason), (seed, choice)


def test_every_kind_of_card_is_shown_where_the_data_have_it() -> None:
    reasons = " ".join(
        choice.reason for choice in choose_cards(random_observations(1, reward_models=2, examples=300))
    )
    for kind in (
        "clear win",
        "tie",
        "disagree",
        "both modes",
        "narrow win",
        "cut off",
        "declines",
        "no source",
    ):
        assert kind in reasons


def test_fewer_examples_than_cards_are_each_shown_once() -> None:
    seen = random_observations(2, examples=4)
    assert sorted(choice.example for choice in choose_cards(seen)) == [0, 1, 2, 3]


@pytest.mark.parametrize("rule", ["vote", "reference"])
def test_a_card_tells_of_every_answer_what_it_was_chosen_by(rule: str) -> None:
    seen = random_observations(3, rule=rule)
    inference, training = seen.selections["inference"], seen.selections["training"]
    for choice in choose_cards(seen):
        n = choice.example
        found = card(seen, choice, *texts_of(seen, n, "text"))
        truth, *answers = found["answers"]
        assert truth["text"] == "text truth"
        for place, (name, answer) in enumerate(zip(seen.sources, answers, strict=True)):
            assert answer["name"] == name
            assert answer["wins"] == [
                mode for mode in seen.selections if seen.selections[mode]["source"][n] == place
            ]
            nats = training["ce_sum"][n, place] / training["response_bytes"][n]
            assert answer["nats_per_byte"] == (None if np.isnan(nats) else pytest.approx(nats))
            others = [other for other in answers[:place] if other["text"] and other["text"] == answer["text"]]
            assert answer["same_as"] == (others[0]["name"] if others else None)
            if rule == "vote":
                assert answer["votes"] == inference["votes"][n, place]
                wanted = dict(zip(seen.reward_models, inference["scores"][n, place], strict=True))
                assert answer["scores"] == {j: None if np.isnan(s) else s for j, s in wanted.items()}
            else:
                assert "votes" not in answer
                assert list(answer["reference"]) == ["bleu", "rouge_l", "bertscore", "score"]
