"""Target tokens a second of alignment, projection and the label's own mass, beside a dynamic program over
token strings.

    python benchmarks/alignment_speed.py --target-tokenizer T --source-tokenizer S --instructions FILE.jsonl

Texts and tokenizers are real, the target's with a space before the response as in Vicuna's template:
responses are joined until an example has --tokens target tokens. The source's rows are drawn: --entries ids
each, the token that came and others that occur in the texts, with nine tenths of the mass. Everything runs on
one core and is timed in CPU seconds, the best of --repeats over all examples at once, as the fusion-data
stage does it. The vocabulary map is not counted on either side. Baseline, of the same run and the same
examples, of which it takes the first --program-examples: token_dynamic_program.py, which spends no time on
rows that begin inside a source token or on the label's own mass.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from table import Measurement, run
from token_dynamic_program import align_tokens, transfer

from megatron_fuse.alignment import Rows, SourceRows, VocabularyMap, build_vocabulary_map, project_responses
from megatron_fuse.alignment.edit_distance import characters
from megatron_fuse.instructions import read_rows
from megatron_fuse.tokenization import Tokenizer, load_tokenizer
from megatron_fuse.tokenization.spans import SpanFlag, TokenSpans, response_bytes

WANTED, WANTED_RATIO = ">= 150000", "ratio >= 300"
TEMPERATURE = 2.0
SEPARATOR = " "  # before the target's responses

Result = TypeVar("Result")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target-tokenizer", type=Path, required=True)
    parser.add_argument("--source-tokenizer", type=Path, required=True)
    parser.add_argument(
        "--instructions",
        type=Path,
        required=True,
        help="instruction file (JSONL in any form that a recipe takes)",
    )
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the target in each example")
    parser.add_argument("--entries", type=int, default=10, help="entries of each row")
    parser.add_argument(
        "--program-examples", type=int, default=4, help="number of examples for the dynamic program"
    )
    parser.add_argument("--repeats", type=int, default=5)


def measure(options: argparse.Namespace) -> list[Measurement]:
    source, target = load_tokenizer(options.source_tokenizer), load_tokenizer(options.target_tokenizer)
    responses = list(_responses(options.instructions, target, options.tokens, options.examples))
    offsets = np.cumsum([0, *(len(response_bytes([text])) for text in responses)])[:-1]
    source_spans = [_spans(source, text, "") for text in responses]
    target_spans = [_spans(target, text, SEPARATOR) for text in responses]
    labels = TokenSpans.join(target_spans, offsets)
    capture = _draw_capture(source, TokenSpans.join(source_spans, offsets), options.entries)
    vocabulary_map = build_vocabulary_map(
        source,
        target,
        source_stop=_stop(source),
        target_stop=_stop(target),
        source_separator="",
        target_separator=SEPARATOR,
        remainders=True,
    )

    def project(unmatched: str) -> Callable[[], object]:
        return lambda: project_responses(capture, labels, vocabulary_map, unmatched=unmatched)

    project("condition")()  # tables of the tokenizers' bytes, made once
    speed = {name: len(labels) / _best(project(name), options.repeats)[0] for name in ("skip", "condition")}

    few = slice(options.program_examples)
    tokens = sum(map(len, target_spans[few]))
    program = _program(source, target, source_spans[few], target_spans[few], capture.rows, vocabulary_map)
    seconds, transferred = _best(program, 1)
    baseline = f"dynamic program, {len(target_spans[few])} of {len(responses)} examples"
    what = f"align and project, {len(responses)} examples of {len(labels) // len(responses)} tokens"
    matched = (project_responses(capture, labels, vocabulary_map, unmatched="skip")[1][:tokens] > 0).mean()
    return [
        Measurement(f"{what}: skip", speed["skip"], "target tokens/s", wanted=WANTED),
        Measurement(f"{what}: condition", speed["condition"], "target tokens/s", wanted=WANTED),
        Measurement(
            f"{what}: against", speed["skip"], "target tokens/s", baseline, tokens / seconds, WANTED_RATIO
        ),
        Measurement("rows that get a distribution: skip", float(matched), "of all", baseline, transferred),
    ]


def _responses(path: Path, target: Tokenizer, tokens: int, count: int) -> Iterator[str]:
    """So many texts, each of responses joined up to so many target tokens; the file begins anew where it
    ends.
    """
    responses = cycle([example.response for example in read_rows(path).read()])
    for _ in range(count):
        text, ids = "", list[int]()
        while len(ids) < tokens - 1:  # and the stop token
            text += next(responses) + "\n\n"
            ids = target.encode_continuation(SEPARATOR + text)
        yield target.joined_bytes(ids[: tokens - 1]).decode(errors="ignore").removeprefix(SEPARATOR)


def _spans(tokenizer: Tokenizer, response: str, separator: str) -> TokenSpans:
    """The response's tokens behind the template's white space, and its stop token."""
    ids, ends, lossy = tokenizer.encode_spans(separator + response)
    ends = np.append(np.maximum(ends - len(separator), 0), len(response.encode()) + 1)
    flags = np.append(lossy * SpanFlag.LOSSY, SpanFlag.STOP).astype(np.uint8)
    flags[0] |= SpanFlag.LEADING if separator else 0
    return TokenSpans(np.array([*ids, _stop(tokenizer)], np.int32), np.append(0, ends[:-1]), ends, flags)


def _stop(tokenizer: Tokenizer) -> int:
    return tokenizer.eos_id if tokenizer.eos_id is not None else min(tokenizer.special_ids)


def _draw_capture(tokenizer: Tokenizer, spans: TokenSpans, entries: int) -> SourceRows:
    draw, count = np.random.default_rng(1234), len(spans)
    pool = draw.permutation(np.unique(spans.tokens))
    # Short enough for the ids of a row to be different.
    step = draw.integers(1, len(pool) // entries, (count, 1))
    ids = pool[(draw.integers(0, len(pool), (count, 1)) + step * np.arange(entries)) % len(pool)]
    missing = (ids != spans.tokens[:, None]).all(axis=1)
    ids[missing, draw.integers(0, entries, count)[missing]] = spans.tokens[missing]
    logits = np.sort(draw.normal(0, 2, (count, entries)), axis=1)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True) / 0.9)
    return SourceRows(
        tokenizer=tokenizer,
        spans=spans,
        rows=Rows(np.full(count, entries, np.uint8), ids.ravel(), logprobs.ravel().astype(np.float32)),
        temperature=TEMPERATURE,
        token_logprobs=draw.normal(-1, 1, count).clip(max=0).astype(np.float32),
        logsumexp=np.ones(count, np.float32),
        logsumexp_temperature=np.ones(count, np.float32),
    )


def _program(
    source: Tokenizer,
    target: Tokenizer,
    source_spans: list[TokenSpans],
    target_spans: list[TokenSpans],
    rows: Rows,
    vocabulary_map: VocabularyMap,
) -> Callable[[], float]:
    """The dynamic program over some examples, its inputs in Python's own types; gives the share of rows
    transferred.
    """
    bounds = np.cumsum([0, *rows.counts.tolist()])
    entries = [
        dict(zip(rows.ids[begin:end].tolist(), rows.logprobs[begin:end].tolist(), strict=True))
        for begin, end in pairwise(bounds)
    ]
    vocabulary = {token: to for token, to in enumerate(vocabulary_map.ids.tolist()) if to >= 0}
    first, examples = 0, []
    for theirs, ours in zip(source_spans, target_spans, strict=True):
        pieces = [
            [characters(tokenizer.token_bytes[token]) for token in spans.tokens.tolist()]
            for tokenizer, spans in ((source, theirs), (target, ours))
        ]
        examples.append((*pieces, entries[first : first + len(theirs)], ours.tokens.tolist()))
        first += len(theirs)

    def run() -> float:
        rows = []
        for source_pieces, target_pieces, distributions, labels in examples:
            rows += transfer(align_tokens(source_pieces, target_pieces), distributions, labels, vocabulary)
        return sum(len(row) > 1 for row in rows) / len(rows)

    return run


def _best(work: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """CPU seconds of the fastest run, and what the last gave."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        result = work()
        seconds.append(time.process_time() - begin)
    return min(seconds), result


if __name__ == "__main__":
    sys.exit(run(__doc__, add_arguments, measure))
