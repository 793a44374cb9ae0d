"""Random observations for the advantage report: any number of sources and reward models, identical, empty
and unscored answers.
"""

import numpy as np

from megatron_fuse.instructions import Example
from megatron_fuse.recipe import MODES
from megatron_fuse.report.advantage.observations import Answers, Observations
from megatron_fuse.responses import Response
from megatron_fuse.selection.margins import score_margin, training_margin, vote_margin
from megatron_fuse.selection.rules import best_score, majority_vote, min_ce


def random_observations(
    seed: int,
    *,
    examples: int = 60,
    sources: int = 3,
    reward_models: int = 2,
    modes: tuple[str, ...] = MODES,
    rule: str = "vote",
    systems: int = 4,
    categories: int = 3,
) -> Observations:
    random = np.random.default_rng(seed)
    shape = (examples, sources)
    selections = {}
    if "training" in modes:
        ce = random.uniform(1, 50, shape)
        ce[random.random(shape) < 0.1] = np.nan
        lossy, response_bytes = random.random(shape) < 0.1, random.integers(1, 200, examples)
        tokens = random.integers(1, 90, shape)
        source = min_ce(ce, lossy, response_bytes=response_bytes, response_tokens=tokens)
        margin = training_margin(ce, lossy, response_bytes, source)
        selections["training"] = {
            "ce_sum": ce,
            "response_bytes": response_bytes,
            "source": source,
            "margin": margin,
        }
    same = random.integers(0, 4, shape)  # few different texts, so that some are identical; 0 = empty
    answering = "inference" in modes
    if answering and rule == "reference":
        reference = random.random((*shape, 3)).astype(np.float32)
        score = np.where(same == 0, np.nan, reference.mean(2).astype(np.float64))
        source = best_score(score, same)
        margin = score_margin(score, same, source)
        selections["inference"] = {"reference": reference, "score": score, "source": source, "margin": margin}
    elif answering:
        scores = random.integers(0, 4, (*shape, reward_models)).astype(np.float32)
        scores[random.random(scores.shape) < 0.02] = np.nan
        source, votes = majority_vote(scores, same)
        margin = vote_margin(scores, votes, same, source)
        selections["inference"] = {"scores": scores, "votes": votes, "source": source, "margin": margin}
    for arrays in selections.values():
        arrays["weight"] = random.choice([0.0, 0.5, 1.0], examples).astype(np.float32)
    answers = Answers(
        characters=random.integers(1, 900, shape) * (same != 0),
        tokens=random.integers(1, 300, shape) * (same != 0),
        same=same,
        empty=same == 0,
        truncated=random.random(shape) < 0.1,
        refused=random.random(shape) < 0.1,
        unmatched=(same == 0) & (random.random(shape) < 0.5),
    )
    if not answering:
        answers = Answers(**{name: values[:, :0] for name, values in vars(answers).items()})
    return Observations(
        sources=[f"source-{place}" for place in range(sources)],
        reward_models=[f"reward-{place}" for place in range(reward_models)]
        if answering and rule == "vote"
        else [],
        strongest=0,
        rules={mode: {"training": "sum", "inference": rule}[mode] for mode in modes},
        numbers=np.arange(examples),
        validation=5,
        characters=random.integers(1, 2000, examples),
        truncated=random.random(examples) < 0.1,
        instruction_characters=random.integers(1, 50, examples),
        system=random.integers(-1, systems, examples) if systems else np.full(examples, -1),
        system_messages=[f"You are assistant {place}.\n" * 20 for place in range(systems)],
        category=random.integers(-1, categories, examples) if categories else np.full(examples, -1),
        categories=[f"category {place}" for place in range(categories)],
        answers=answers,
        selections=selections,
    )


def texts_of(seen: Observations, place: int, text: str) -> tuple[Example, list[Response]]:
    """An example and its answers, all of them this text and a mark of their own."""
    messages = [{"role": "user", "content": f"{text} instruction"}]
    example = Example(
        f"e{place} {text}", f"{text} system", messages, f"{text} truth", category=f"{text} category"
    )
    answers = seen.answers
    flags = (values[place].tolist() for values in (answers.same, answers.truncated, answers.refused))
    return example, [
        Response(example.id, f"{text} answer {same}" if same else "", truncated, 3, refused)
        for same, truncated, refused in zip(*flags, strict=True)
    ]
