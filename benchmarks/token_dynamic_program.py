"""Alignment of two tokenizations as prior work does it: a dynamic program over token strings, in plain
Python.

Written from the description in the FuseLLM paper (arXiv 2401.10491), as the baseline of `alignment_speed.py`.
Every source token is compared with every target token by edit distance, the cheapest monotone path through
the table pairs them (dynamic time warping), and a target token takes the distribution of the source token
that is paired with it alone; every other target token gets all mass on one token. Quadratic in the length of
the response.
"""

import math
from collections.abc import Mapping, Sequence

from rapidfuzz.distance import Levenshtein

Distribution = dict[int, float]  # token -> log-probability


def align_tokens(source: Sequence[str], target: Sequence[str]) -> list[list[int]]:
    """For every target token the places of the source tokens that the cheapest path pairs with it, rising."""
    width = len(target)
    above = [0.0] + [math.inf] * width
    # 0: from both before, 1: from the source token before, 2: from the target token before.
    steps: list[list[int]] = []
    for piece in source:
        row, step = [math.inf], [0]
        for place, other in enumerate(target, 1):
            both, one, two = above[place - 1], above[place], row[place - 1]
            if both <= one and both <= two:
                least, choice = both, 0
            elif one <= two:
                least, choice = one, 1
            else:
                least, choice = two, 2
            row.append(least + Levenshtein.distance(piece, other))
            step.append(choice)
        above = row
        steps.append(step)
    pairs: list[list[int]] = [[] for _ in target]
    i, j = len(source), width
    while i and j:
        pairs[j - 1].append(i - 1)
        choice = steps[i - 1][j]
        i, j = i - (choice != 2), j - (choice != 1)
    return [places[::-1] for places in pairs]


def transfer(
    pairs: Sequence[Sequence[int]],
    source: Sequence[Distribution],
    labels: Sequence[int],
    vocabulary: Mapping[int, int],
) -> list[Distribution]:
    """The target's distributions. pairs: of align_tokens; labels: the target's tokens; vocabulary: source
    token -> target token. A pair of one token with one transfers the distribution, all other target tokens
    get their label."""
    used = [0] * len(source)
    for places in pairs:
        for place in places:
            used[place] += 1
    result = []
    for places, label in zip(pairs, labels, strict=True):
        if len(places) != 1 or used[places[0]] != 1:
            result.append({label: 0.0})
            continue
        mass: Distribution = {}
        for token, logprob in source[places[0]].items():
            to = vocabulary.get(token)
            if to is not None:
                mass[to] = mass.get(to, 0.0) + math.exp(logprob)
        result.append({token: math.log(p) for token, p in mass.items()})
    return result
