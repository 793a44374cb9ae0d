"""Seconds on one core that a vocabulary map by least edit distance takes, both ways, beside comparing with every token.

    python benchmarks/mined_map.py --target-tokenizer T --source-tokenizer S --csv runs/mined_map.csv

`whole map` is all that `alignment.vocabulary_map: mined` costs a pair of models, first rows with and without white space
included. `nearest tokens` is the search for the source's tokens that the target lacks; its baseline compares a sample
of them with every target token, one pair at a time, in the same library, and its time is scaled from the sample to all.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein
from table import Measurement, run

from megatron_fuse.alignment.edit_distance import characters, nearest_pieces
from megatron_fuse.alignment.vocabulary import build_vocabulary_map
from megatron_fuse.tokenization import Tokenizer, load_tokenizer

WANTED = "<= 60"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target-tokenizer", type=Path, required=True)
    parser.add_argument("--source-tokenizer", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=150, help="tokens that the baseline looks up")


def measure(options: argparse.Namespace) -> list[Measurement]:
    target, source = load_tokenizer(options.target_tokenizer), load_tokenizer(options.source_tokenizer)
    return [*_measure(source, target, options.sample), *_measure(target, source, options.sample)]


def _measure(source: Tokenizer, target: Tokenizer, sample: int) -> list[Measurement]:
    begin = time.perf_counter()
    build_vocabulary_map(source, target, source_stop=_stop(source), target_stop=_stop(target), kind="mined")
    whole = time.perf_counter() - begin

    vocabulary = sorted(set(target.token_bytes) - {b""})
    missing = sorted(set(source.token_bytes) - {b"", *vocabulary})
    begin = time.perf_counter()
    found = nearest_pieces(missing, vocabulary)
    search = time.perf_counter() - begin

    texts, candidates = [characters(piece) for piece in missing], [characters(piece) for piece in vocabulary]
    chosen = np.random.default_rng(1234).permutation(len(texts))[:sample]
    begin = time.perf_counter()
    least = [min(Levenshtein.distance(texts[i], candidate) for candidate in candidates) for i in chosen]
    scan = (time.perf_counter() - begin) * len(texts) / max(len(chosen), 1)
    if least != [Levenshtein.distance(texts[i], candidates[found[i]]) for i in chosen]:
        raise RuntimeError("the search and the comparison with every token find different distances")

    sizes = f"{source.vocab_size} -> {target.vocab_size}"
    baseline = f"rapidfuzz pair by pair, {len(chosen)} of {len(texts)} scaled"
    return [
        Measurement(f"mined map, {sizes}: whole map", whole, "s", wanted=WANTED),
        Measurement(f"mined map, {sizes}: nearest tokens", search, "s", baseline, scan),
    ]


def _stop(tokenizer: Tokenizer) -> int:
    """A bare tokenizer.json does not say which token ends a text: any special one takes as long."""
    return min(tokenizer.special_ids) if tokenizer.eos_id is None else tokenizer.eos_id


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
