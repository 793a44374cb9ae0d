"""Laws of the advantage report's numbers, each against a slow count of the same thing."""

from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_observations import MODES, random_observations

from megatron_fuse.report.advantage.numbers import (
    CATEGORIES,
    FREQUENT,
    GROUND_TRUTH,
    NOBODY,
    advantage_numbers,
    agreement,
    favourites,
    frequent_groups,
    quartiles,
    tied,
    wilson,
    wins,
)
from megatron_fuse.selection.rules import NONE

# One source always wins or nobody does; three as in the paper; eight, more than panels stand side by side.
SOURCES = [1, 3, 8]


@given(st.integers(0, 400), st.integers(0, 400))
def test_wilsons_interval_ends_where_the_share_is_just_as_far_as_95_of_100_samples_stray(
    part: int, rest: int
) -> None:
    whole = part + rest
    low, high = wilson(part, whole)
    if not whole:
        assert (low, high) == (None, None)
        return
    share = part / whole
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for end in (low, high):  # |share - p| = z sqrt(p (1 - p) / n), the interval's definition
        assert abs(share - end) == pytest.approx(
            1.959964 * np.sqrt(max(end * (1 - end), 0) / whole), abs=1e-7
        )


@given(st.lists(st.integers(NONE, 4), max_size=50))
def test_wins_count_every_example_once(winners: list[int]) -> None:
    names = [f"source-{place}" for place in range(5)]
    found = wins(np.array(winners, np.int16), names)
    assert list(found) == [*names, NOBODY]
    for place, name in [*enumerate(names), (NONE, NOBODY)]:
        assert found[name]["examples"] == winners.count(place)
        assert found[name]["share"] == (winners.count(place) / len(winners) if winners else None)


@given(st.lists(st.tuples(st.integers(NONE, 3), st.integers(NONE, 3)), max_size=40))
def test_agreement_is_cohens_kappa(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array([pair[side] for pair in pairs], np.int16) for side in (0, 1))
    found = agreement(first, second)
    chosen = [pair for pair in pairs if NONE not in pair]
    assert found == agreement(second, first)
    assert found["examples"] == len(chosen)
    if not chosen:
        assert found["agree"] is found["chance"] is found["kappa"] is None
        return
    share = [
        [Fraction(sum(pair[side] == c for pair in chosen), len(chosen)) for c in range(4)] for side in (0, 1)
    ]
    agree = Fraction(sum(one == other for one, other in chosen), len(chosen))
    chance = sum(one * other for one, other in zip(*share, strict=True))
    assert found["agree"] == pytest.approx(float(agree)) and found["chance"] == pytest.approx(float(chance))
    assert found["kappa"] == (None if chance == 1 else pytest.approx(float((agree - chance) / (1 - chance))))


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("reward_models", [1, 2, 3])
def test_reward_models_favourites_and_ties_by_hand(sources: int, reward_models: int) -> None:
    seen = random_observations(
        sources + reward_models, sources=sources, reward_models=reward_models, examples=200
    )
    arrays, same = seen.selections["inference"], seen.answers.same
    scores, votes = arrays["scores"], arrays["votes"]
    liked, ties = favourites(scores, same), tied(votes, same)
    for n in range(len(same)):
        able = [s for s in range(sources) if same[n, s] and not np.isnan(scores[n, s]).any()]
        ballots = []
        for reward_model in range(reward_models):
            if able:
                # Identical texts are one answer, worth the best of its scores.
                worth = [
                    max(scores[n, o, reward_model] for o in able if same[n, o] == same[n, s]) for s in able
                ]
                assert liked[n, reward_model] == able[worth.index(max(worth))]
                ballots.append(same[n, liked[n, reward_model]])
            else:
                assert liked[n, reward_model] == NONE
        counts = [ballots.count(text) for text in set(ballots)]
        assert ties[n] == (len(counts) > 1 and counts.count(max(counts)) > 1)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_quartiles_part_the_examples_in_order(lengths: list[int]) -> None:
    characters = np.array(lengths)
    parts = quartiles(characters)
    assert 1 <= len(parts) <= 4
    assert np.sum([members for _, members in parts], 0).tolist() == [1] * len(lengths)
    for (_, shorter), (_, longer) in pairwise(parts):
        assert characters[shorter].max() < characters[longer].min()
    for name, members in parts:
        low, high = characters[members].min(), characters[members].max()
        assert name == (f"{low} to {high} characters" if low < high else f"{low} characters")
    if len(set(lengths)) == len(lengths) >= 4:  # nothing has to stay together
        sizes = [int(members.sum()) for _, members in parts]
        assert len(sizes) == 4 and max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(-1, 20), max_size=80), st.integers(2, 12))
def test_frequent_groups_part_the_examples_by_falling_frequency(codes: list[int], most: int) -> None:
    names = [f"category {code}" for code in range(21)]
    parts = frequent_groups(np.array(codes, np.int64), names, most)
    assert np.sum([members for _, members in parts], 0).tolist() == ([1] * len(codes) if codes else 0)
    named = [(name, int(members.sum())) for name, members in parts if name in names]
    for name, size in named:
        assert size == codes.count(names.index(name)) > 0
    assert [size for _, size in named] == sorted((size for _, size in named), reverse=True)
    different = len(set(codes) - {-1})
    others = {name: int(members.sum()) for name, members in parts if name not in names}
    assert len(named) == (different if different <= most else most - 1)
    assert ("all others" in others) == (different > most)
    assert others.get("none given", 0) == codes.count(-1)


@pytest.mark.parametrize("modes", [MODES, ("training",), ("inference",)])
@pytest.mark.parametrize("sources", SOURCES)
def test_groups_add_up_to_the_whole(sources: int, modes: tuple[str, ...]) -> None:
    seen = random_observations(sources, sources=sources, modes=modes, categories=20, examples=150)
    report = advantage_numbers(seen)
    assert set(report["wins"]) == set(modes)
    assert (report["modes"] is None) == (len(modes) == 1)
    for groups in report["groups"].values():
        assert sum(group["examples"] for group in groups) == 150
        for mode in modes:
            for name, of in report["wins"][mode].items():
                assert sum(group["wins"][mode][name]["examples"] for group in groups) == of["examples"]
    assert len(report["groups"]["category"]) == CATEGORIES + 1  # and those without
    if len(modes) == 2:
        table = np.array(report["modes"]["table"])
        assert table.sum() == report["modes"]["examples"]
        assert np.trace(table) == pytest.approx(report["modes"]["agree"] * table.sum())


@pytest.mark.parametrize("reward_models", [1, 2, 3])
def test_reward_models_are_compared_with_each_other_and_with_the_choice(reward_models: int) -> None:
    seen = random_observations(reward_models, reward_models=reward_models, examples=120)
    arrays = seen.selections["inference"]
    liked = favourites(arrays["scores"], seen.answers.same)
    found = advantage_numbers(seen)["reward_models"]
    assert [pair["reward_models"] for pair in found["pairs"]] == [
        list(pair) for pair in combinations(seen.reward_models, 2)
    ]
    for reward_model, name in enumerate(seen.reward_models):
        assert found["winner"][name]["agree"] == pytest.approx(
            (liked[:, reward_model] == arrays["source"])[arrays["source"] != NONE].mean()
        )
        assert sum(found["favourites"][name].values()) == pytest.approx(1)
    if reward_models == 1:  # it decides alone
        assert found["winner"]["reward-0"]["agree"] == found["unanimous"] == 1
        assert found["tied"] == 0


@pytest.mark.parametrize("systems", [0, 3, 30])
@pytest.mark.parametrize("categories", [0, 3])
def test_lengths_are_medians_of_answers_that_are_not_empty(systems: int, categories: int) -> None:
    seen = random_observations(systems, systems=systems, categories=categories, examples=300)
    report = advantage_numbers(seen)
    by = report["lengths"]["by"]
    assert by == ("system message" if systems else "category" if categories else None)
    frequent = report["system_messages"]["frequent"]
    assert len(frequent) == min(systems, FREQUENT)
    sizes = [int((seen.system == code).sum()) for code in range(systems)]
    assert [of["examples"] for of in frequent] == sorted(sizes, reverse=True)[:FREQUENT]
    for group in report["lengths"]["groups"]:
        name = group["group"]
        if name == "all examples":
            members = np.ones(300, bool)
        elif name == "none given":
            members = (seen.system if by == "system message" else seen.category) < 0
        elif by == "system message":
            members = seen.system == seen.system_messages.index(name)
        else:
            members = seen.category == seen.categories.index(name)
        assert group["examples"] == members.sum()
        assert group["median"][GROUND_TRUTH] == np.median(seen.characters[members])
        for place, source in enumerate(seen.sources):
            given = seen.answers.characters[members & ~seen.answers.empty[:, place], place]
            assert group["median"][source] == (np.median(given) if len(given) else None)


def test_flags_are_counted_per_source() -> None:
    seen = random_observations(7)
    found = advantage_numbers(seen)["answers"]
    for place, source in enumerate(seen.sources):
        of = found[source]
        for flag in ("empty", "truncated", "refused", "unmatched"):
            assert of[flag] == getattr(seen.answers, flag)[:, place].sum()
        assert of["answers"] + of["empty"] == len(seen.numbers)
        given = ~seen.answers.empty[:, place]
        assert of["tokens"] == {
            "mean": pytest.approx(seen.answers.tokens[given, place].mean()),
            "median": np.median(seen.answers.tokens[given, place]),
        }


def test_margins_tell_winners_that_do_not_count_in_full() -> None:
    seen = random_observations(8)
    found = advantage_numbers(seen)["margins"]
    for mode, arrays in seen.selections.items():
        won = [n for n in range(len(seen.numbers)) if arrays["source"][n] != NONE]
        assert found[mode]["dropped"] == sum(arrays["weight"][n] == 0 for n in won)
        assert found[mode]["lowered"] == sum(0 < arrays["weight"][n] < 1 for n in won)
        finite = [arrays["margin"][n] for n in won if np.isfinite(arrays["margin"][n])]
        assert found[mode]["median"] == np.median(finite)
