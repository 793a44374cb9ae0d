"""How well each source's distributions came over into the target's tokens, and on which kinds of text they
did not.

Computed shard by shard from fusion data and captures. The numbers are one JSON object, {"fusion_data",
"vocabulary_map", "unmatched", "temperature", "teachers": [one object per source and mode]}, each teacher
being

    source, mode
    examples    all; read: the source has rows for them; whole: share of these whose every byte both
                tokenizers spell
    vocabulary  tokens: the source's that stand for bytes; exact: share of them with a target token of equal
                bytes
    captured    rows; mass: mean stored mass of a row at the KL temperature; exact_mass: share of it on
                exactly mapped tokens
    label_mass  share of the rows that the label's own mass changes
    rows        {"all" or a class of text: rows; exact, condition, onehot, skip: shares of them; mass: mean
                stored mass of
                the exact ones, which can be set beside the captured mass}
    longest_unmatched   [example, tokens, bytes, text] of the longest different runs of skipped labels

Rows are the supervised tokens of the examples read; a class is that of the label's text. A share or mean of
nothing is null.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from megatron_fuse import ragged
from megatron_fuse.alignment import MATCHES
from megatron_fuse.capture import CAPTURES, capture_shard
from megatron_fuse.chat import ChatFormat
from megatron_fuse.dataset.checksums import verify_once
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import TEACHERS, TEXT, fusion_directory
from megatron_fuse.fusion_data.listing import read_listed
from megatron_fuse.fusion_data.maps import vocabulary_map_of
from megatron_fuse.fusion_data.streams import Stream
from megatron_fuse.progress import Progress
from megatron_fuse.stages import Context
from megatron_fuse.storage import Artifact
from megatron_fuse.tokenization import Tokenizer

TEXT_CLASSES = (
    "Latin letters",
    "digits",
    "white space",
    "punctuation and other",
    "non-Latin text",
    "end of turn",
)
LONGEST = 10  # unmatched spans that are listed


def alignment_report(context: Context) -> dict[str, Any]:
    """The numbers of every source and mode.

    Raises UserError where fusion data or captures are missing or of another recipe.
    """
    recipe, classes = context.recipe, text_classes(context.target)
    modes, teachers = recipe.modes_with_teacher, []
    if not modes:
        raise UserError("schedule: no phase has a lambda for a source's distributions, so none are aligned")
    with Progress("alignment report", "sources", len(modes) * len(recipe.sources)) as progress:
        for mode, source in product(modes, recipe.sources):
            teachers.append(_teacher_report(context, source, mode, classes))
            progress.update(len(teachers))
    return {
        "fusion_data": str(fusion_directory(recipe)),
        "vocabulary_map": recipe.alignment.vocabulary_map,
        "unmatched": recipe.alignment.unmatched,
        "temperature": recipe.loss.teacher_temperature,
        "teachers": teachers,
    }


def text_classes(target: ChatFormat) -> np.ndarray:
    """uint8 [vocab_size]: place in TEXT_CLASSES of every token, by its first character that is no white
    space.

    Bytes that are no whole character count as non-Latin text: a vocabulary spells by bytes what it has no
    tokens for.
    """
    classes = np.array(
        [TEXT_CLASSES.index(_text_class(piece)) for piece in target.tokenizer.token_bytes], np.uint8
    )
    classes[target.stop_id] = TEXT_CLASSES.index("end of turn")
    return classes


def _text_class(piece: bytes) -> str:
    try:
        first = piece.decode().lstrip()[:1]
    except UnicodeDecodeError:
        return "non-Latin text"
    if not first:
        return "white space"
    if first.isdigit():
        return "digits"
    if first.isalpha() and unicodedata.name(first, "").startswith("LATIN"):
        return "Latin letters"
    return (
        "non-Latin text"
        if first.isalpha() or unicodedata.category(first)[0] == "M"
        else "punctuation and other"
    )


@dataclass(frozen=True, eq=False)
class Labels:
    """The supervised rows of one shard's examples that the source has read: r rows, labels of the target.

    example int64 [r]: number in the shard; tokens int64 [r]; match uint8 [r]: place in MATCHES; mass float64
    [r]: stored.
    """

    example: np.ndarray
    tokens: np.ndarray
    match: np.ndarray
    mass: np.ndarray


@dataclass(frozen=True, eq=False)
class Tally:
    """rows int64 [classes, matches]; mass float64 [classes, matches]: their stored mass, added up."""

    rows: np.ndarray
    mass: np.ndarray

    @classmethod
    def none(cls) -> "Tally":
        return cls(
            np.zeros((len(TEXT_CLASSES), len(MATCHES)), np.int64), np.zeros((len(TEXT_CLASSES), len(MATCHES)))
        )

    @classmethod
    def of(cls, labels: Labels, classes: np.ndarray) -> "Tally":
        cell = classes[labels.tokens].astype(np.int64) * len(MATCHES) + labels.match
        cells = len(TEXT_CLASSES) * len(MATCHES)
        rows, mass = np.bincount(cell, minlength=cells), np.bincount(cell, labels.mass, minlength=cells)
        return cls(rows.reshape(-1, len(MATCHES)), mass.reshape(-1, len(MATCHES)))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.rows + other.rows, self.mass + other.mass)

    def shares(self) -> dict[str, dict[str, float | int | None]]:
        """Of all rows, and of every class that occurs."""
        parts = {"all": (self.rows.sum(0), self.mass.sum(0))}
        parts |= {
            name: (self.rows[i], self.mass[i]) for i, name in enumerate(TEXT_CLASSES) if self.rows[i].any()
        }
        exact = MATCHES.index("exact")
        return {
            name: {
                "rows": int(rows.sum()),
                **{match: _ratio(rows[code], rows.sum()) for code, match in enumerate(MATCHES)},
                "mass": _ratio(mass[exact], rows[exact]),
            }
            for name, (rows, mass) in parts.items()
        }


def unmatched_spans(labels: Labels, tokenizer: Tokenizer, names: list[str]) -> list[dict[str, Any]]:
    """The LONGEST longest runs of skipped labels by bytes, of equal texts the first; none lies across two
    examples.

    names: of the shard's examples.
    """
    key = np.where(labels.match == MATCHES.index("skip"), labels.example, -1)
    bounds = (
        np.flatnonzero(np.concatenate([[True], np.diff(key) != 0, [True]]))
        if len(key)
        else np.zeros(1, np.int64)
    )
    begins, ends = bounds[:-1], bounds[1:]
    skipped = key[begins] >= 0
    begins, ends = begins[skipped], ends[skipped]
    total = ragged.offsets(tokenizer.byte_lengths[labels.tokens])
    sizes = total[ends] - total[begins]
    by_text: dict[bytes, dict[str, Any]] = {}
    for i in np.argsort(-sizes, kind="stable"):
        piece = tokenizer.joined_bytes(labels.tokens[begins[i] : ends[i]].tolist())
        if piece not in by_text:
            by_text[piece] = {
                "example": names[key[begins[i]]],
                "tokens": int(ends[i] - begins[i]),
                "bytes": int(sizes[i]),
                "text": piece.decode(errors="backslashreplace"),
            }
        if len(by_text) == LONGEST:
            break
    return list(by_text.values())


def _longest(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the spans of several shards."""
    # The later entry stays: of equal texts the first.
    first = {span["text"]: span for span in reversed(spans)}
    return sorted(first.values(), key=lambda span: (-span["bytes"], spans.index(span)))[:LONGEST]


def _teacher_report(context: Context, source: str, mode: str, classes: np.ndarray) -> dict[str, Any]:
    text, teacher = context.open_alone(TEXT), context.open_alone(TEACHERS, source, mode)
    tally, longest = Tally.none(), list[dict[str, Any]]()
    examples = read = whole = 0
    for names, example_arrays, labels in _shards(text, teacher, mode):
        tally += Tally.of(labels, classes)
        longest = _longest(longest + unmatched_spans(labels, context.target.tokenizer, names))
        available = example_arrays["available"].astype(bool)
        examples += len(names)
        read += int(available.sum())
        whole += int(
            (available & (example_arrays["lossy"] == 0) & (example_arrays["target_lossy"] == 0)).sum()
        )
    return {
        "source": source,
        "mode": mode,
        "examples": {"all": examples, "read": read, "whole": _ratio(whole, read)},
        **_capture_report(context, source, mode),
        "label_mass": _ratio(teacher.counts["rows_label_mass"], tally.rows.sum()),
        "rows": tally.shares(),
        "longest_unmatched": longest,
    }


def _shards(
    text: Artifact, teacher: Artifact, mode: str
) -> Iterator[tuple[list[str], dict[str, np.ndarray], Labels]]:
    """Of every shard the examples' names, the arrays that selection needs of them, and the labels.

    Raises UserError for damage.
    """
    verify_once([text, teacher])
    for shard in range(teacher.manifest["shards"]):
        name = f"shard-{shard:05d}"
        names = [row.id for row in read_listed(text.directory / f"{name}.examples.jsonl")]
        example_arrays = load_file(teacher.directory / f"{name}.examples.safetensors")
        documents = text if mode == "training" else teacher
        tokens, supervised = (
            Stream([documents.directory / f"{name}.{field}"]).values() for field in ("tokens", "supervised")
        )
        yield (
            names,
            example_arrays,
            _labels(teacher.directory / name, tokens[supervised != 0], example_arrays["available"]),
        )


def _labels(prefix: Path, tokens: np.ndarray, available: np.ndarray) -> Labels:
    """tokens: every supervised token of the shard's documents."""
    counts, match, logprobs = (
        Stream([f"{prefix}.{field}"]) for field in ("counts", "match", "entry_logprobs")
    )
    entry_rows = ragged.row_numbers(counts.values())
    mass = np.bincount(entry_rows, np.exp(logprobs.values().view(np.float16).astype(np.float64)), len(tokens))
    example = ragged.row_numbers(counts.lengths)
    read = available[example] != 0
    return Labels(example[read], tokens[read].astype(np.int64), match.values()[read], mass[read])


def _capture_report(context: Context, source: str, mode: str) -> dict[str, Any]:
    recipe, chat = context.recipe, context.format(source)
    exact = vocabulary_map_of(context, source).exact
    spelling = chat.tokenizer.byte_lengths > 0
    spelling[list(chat.tokenizer.special_ids)] = False
    temperature = recipe.loss.teacher_temperature
    column = 1 + recipe.capture_temperatures.index(temperature)
    rows, mass, exact_mass = 0, 0.0, 0.0
    capture = context.open(CAPTURES, source, mode)
    for shard in range(capture.manifest["shards"]):
        captured = capture_shard(capture, shard)
        entries = np.exp(captured.logprobs(column, temperature).astype(np.float64))
        known = captured.entry_ids < len(exact)  # the others are padded columns of the logits
        rows += len(captured.counts)
        mass += float(entries.sum())
        exact_mass += float(entries[known] @ exact[captured.entry_ids[known]])
    return {
        "vocabulary": {"tokens": int(spelling.sum()), "exact": _ratio(exact[spelling].sum(), spelling.sum())},
        "captured": {"rows": rows, "mass": _ratio(mass, rows), "exact_mass": _ratio(exact_mass, mass)},
    }


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
