"""CPU seconds on one core that vocabulary maps take at a pair of tokenizers, and what loading them takes.

    python benchmarks/mined_map.py --target-tokenizer T --source-tokenizer S --csv runs/mined_map.csv

`whole map` is all that `alignment.vocabulary_map: mined` costs a pair of models, first rows with and without
white space included; `exact` is the same for that kind with remainders, the median of three. `nearest tokens`
is the search for the source's tokens that the target lacks; its baseline compares a sample of them (--sample)
with every target token, one pair at a time, in the same library, and its time is scaled from the sample to
all. --one-way leaves the map from target to source out. `load` is the median of --loads, each beside one by
transformers' AutoTokenizer.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from rapidfuzz.distance import Levenshtein
from table import Measurement, run
from transformers import AutoTokenizer

from megatron_fuse.alignment.edit_distance import characters, nearest_pieces
from megatron_fuse.alignment.vocabulary import build_vocabulary_map
from megatron_fuse.tokenization import Tokenizer, load_tokenizer

WANTED = "<= 60"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target-tokenizer", type=Path, required=True)
    parser.add_argument("--source-tokenizer", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=20, help="tokens that the baseline looks up")
    parser.add_argument(
        "--loads", type=int, default=3, help="how often each tokenizer is loaded in both ways"
    )
    parser.add_argument("--one-way", action="store_true", help="measure only the map from source to target")


def measure(options: argparse.Namespace) -> list[Measurement]:
    paths = {"target": options.target_tokenizer, "source": options.source_tokenizer}
    measurements = [m for name, path in paths.items() for m in _measure_load(name, path, options.loads)]
    target, source = load_tokenizer(options.target_tokenizer), load_tokenizer(options.source_tokenizer)
    pairs = [(source, target)] if options.one_way else [(source, target), (target, source)]
    return measurements + [m for pair in pairs for m in _measure(*pair, options.sample)]


def _measure_load(name: str, path: Path, loads: int) -> list[Measurement]:
    if not (path / "tokenizer.json").is_file():
        return []  # transformers reads other forms by other rules
    # The first imports what the others have.
    turns = [
        (
            _cpu_seconds(lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False)),
            _cpu_seconds(lambda: load_tokenizer(path)),
        )
        for _ in range(loads + 1)
    ][1:]
    # A small one loads in hundredths of a second.
    large = len(AutoTokenizer.from_pretrained(path, trust_remote_code=False)) >= 100_000
    theirs, ours = (median(seconds) for seconds in zip(*turns, strict=True))
    return [
        Measurement(
            f"load, {name} tokenizer", ours, "s", "AutoTokenizer", theirs, "ratio <= 1.5" if large else ""
        )
    ]


def _cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _measure(source: Tokenizer, target: Tokenizer, sample: int) -> list[Measurement]:
    def build(**options) -> None:
        build_vocabulary_map(source, target, source_stop=_stop(source), target_stop=_stop(target), **options)

    exact = median(_cpu_seconds(lambda: build(kind="exact", remainders=True)) for _ in range(3))
    whole = _cpu_seconds(lambda: build(kind="mined"))

    vocabulary = sorted(set(target.token_bytes) - {b""})
    missing = sorted(set(source.token_bytes) - {b"", *vocabulary})
    begin = time.process_time()
    found = nearest_pieces(missing, vocabulary)
    search = time.process_time() - begin

    texts, candidates = [characters(piece) for piece in missing], [characters(piece) for piece in vocabulary]
    chosen = np.random.default_rng(1234).permutation(len(texts))[:sample]
    begin = time.process_time()
    least = [min(Levenshtein.distance(texts[i], candidate) for candidate in candidates) for i in chosen]
    scan = (time.process_time() - begin) * len(texts) / max(len(chosen), 1)
    if least != [Levenshtein.distance(texts[i], candidates[found[i]]) for i in chosen]:
        raise RuntimeError("the search and the comparison with every token find different distances")

    sizes = f"{source.vocab_size} -> {target.vocab_size}"
    baseline = f"rapidfuzz pair by pair, {len(chosen)} of {len(texts)} scaled"
    return [
        Measurement(f"exact map with remainders, {sizes}", exact, "s"),
        Measurement(f"mined map, {sizes}: whole map", whole, "s", wanted=WANTED),
        Measurement(f"mined map, {sizes}: nearest tokens", search, "s", baseline, scan),
    ]


def _stop(tokenizer: Tokenizer) -> int:
    """A bare tokenizer.json does not say which token ends a text: any special one takes as long."""
    return min(tokenizer.special_ids) if tokenizer.eos_id is None else tokenizer.eos_id


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
