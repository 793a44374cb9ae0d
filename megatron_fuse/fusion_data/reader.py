"""What the trainer reads: documents in the target's tokens with the teacher's rows, for the winning source or any other.

    FUSION/text/                           prompt and ground-truth response of every example
    FUSION/teachers/SOURCE/training/       the source's rows at the text's supervised tokens
    FUSION/teachers/SOURCE/inference/      prompt, the source's own answer and its rows
    FUSION/selection/MODE.safetensors      which source has the advantage, per example

Every artefact holds one stream per field (streams.py), with one sequence per example, empty where the example is left out.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_fuse.advantage.selection import NONE
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import (
    BUILT_BY,
    TEACHER_STAGE,
    TEXT_STAGE,
    check_target,
    modes_with_teacher,
    teacher_directory,
    text_directory,
)
from megatron_fuse.fusion_data.selection import Selection, read_selection
from megatron_fuse.fusion_data.streams import Stream
from megatron_fuse.recipe import Recipe
from megatron_fuse.storage import Artefact, open_artefact, read_jsonl, sha256_of_json


@dataclass(frozen=True)
class Document:
    """One conversation. r = supervised.sum(); row i is the distribution that PREDICTS the i-th supervised token.

    tokens int64 [n]; supervised bool [n]: the token is a label; counts uint8 [r]: stored entries of a row, 0 where the teacher
    says nothing; entry_ids int64 [e] and entry_logprobs float32 [e], natural log at the KL temperature, with e = counts.sum();
    match uint8 [r]: index in MATCHES. The rest of a row's mass, 1 - sum(exp(entry_logprobs)), is its tail.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    counts: np.ndarray
    entry_ids: np.ndarray
    entry_logprobs: np.ndarray
    match: np.ndarray


class _Streams:
    """The streams of one artefact."""

    def __init__(self, artefact: Artefact, *fields: str) -> None:
        self.streams = {
            field: Stream([path.with_suffix("") for path in artefact.files(f".{field}.idx")]) for field in fields
        }

    def __getitem__(self, field: str) -> Stream:
        return self.streams[field]


_ROW_FIELDS = ("counts", "match", "entry_ids", "entry_logprobs")


class FusionDataset:
    """Fusion data of a recipe, memory-mapped. Raises UserError where a part is missing, incomplete or made for another target.

    Examples are numbered as in the instructions. `train` and `held_out` [*] int64: the examples of either split that have a
    document. `entries_per_row`: most entries that a row can have. `sha256`: of every document and of the choice between sources.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.sources = list(recipe.sources)
        text = open_artefact(text_directory(recipe), TEXT_STAGE, BUILT_BY)
        check_target(text, recipe)
        rows = [row for path in text.files(".examples.jsonl") for _, row in read_jsonl(path)]
        self.example_ids: list[str] = [row["id"] for row in rows]
        self._text = _Streams(text, "tokens", "supervised", "starts")
        self._check_size(text.directory, len(self._text["tokens"]))
        held_out = np.array([row["held_out"] for row in rows], bool)
        present = self._text["tokens"].lengths > 0
        self.train, self.held_out = np.flatnonzero(present & ~held_out), np.flatnonzero(present & held_out)
        self.entries_per_row = 0
        self.selections: dict[str, Selection] = {}
        self._teachers: dict[tuple[str, str], _Streams] = {}
        self._selected = {mode: np.full(len(rows), NONE, np.int16) for mode in ("inference", "training")}
        for mode in modes_with_teacher(recipe):
            parents = {
                "text": text.sha256,
                **{source: self._open_teacher(recipe, source, mode) for source in self.sources},
            }
            self.selections[mode] = read_selection(recipe, mode, parents)
            self._selected[mode] = self.selections[mode].source
        choices = [f"{mode} {selection.sha256}" for mode, selection in self.selections.items()]
        self.sha256 = sha256_of_json([text.sha256, *choices])
        self._lengths = {mode: self._selected_lengths(mode, "tokens") for mode in self._selected}
        self._supervised = {mode: self._selected_lengths(mode, "counts") for mode in self._selected}

    def _check_size(self, directory: Path, examples: int) -> None:
        if examples != len(self.example_ids):
            raise UserError(
                f"{directory} holds {examples} documents, but there are {len(self.example_ids)} examples: "
                f"remove {directory} and run {BUILT_BY} again"
            )

    def _open_teacher(self, recipe: Recipe, source: str, mode: str) -> str:
        directory = teacher_directory(recipe, source, mode)
        artefact = open_artefact(directory, TEACHER_STAGE, BUILT_BY)
        own_text = ("tokens", "supervised") if mode == "inference" else ()
        streams = _Streams(artefact, *own_text, *_ROW_FIELDS)
        self._check_size(directory, len(streams["counts"]))
        self._teachers[source, mode] = streams
        self.entries_per_row = max(self.entries_per_row, artefact.manifest["options"]["entries_per_row"])
        return artefact.sha256

    def _selected_lengths(self, mode: str, field: str) -> np.ndarray:
        if (
            mode == "training"
        ):  # the same text whichever source is the teacher; `starts` has one value per supervised token
            return self._text["starts" if field == "counts" else field].lengths
        lengths = np.zeros(len(self.example_ids), np.int64)
        for number, source in enumerate(self.sources):
            chosen = self._selected[mode] == number
            if chosen.any():
                lengths[chosen] = self._teachers[source, mode][field].lengths[chosen]
        return lengths

    def lengths(self, mode: str) -> np.ndarray:
        """[examples] int64: tokens of the selected document, 0 = there is none."""
        return self._lengths[mode]

    def supervised_tokens(self, mode: str) -> np.ndarray:
        """[examples] int64: supervised tokens of the selected document."""
        return self._supervised[mode]

    def selected_source(self, mode: str, example: int) -> str | None:
        """Name of the source with the advantage; None: no teacher for this example."""
        number = int(self._selected[mode][example])
        return None if number == NONE else self.sources[number]

    def document(self, mode: str, example: int, source: str | None = None) -> Document:
        """The document of an example with the rows of `source` (default: the selected one).

        In training mode without a teacher the text has rows without entries; in inference mode without an answer the document
        is empty.
        """
        source = source or self.selected_source(mode, example)
        if source is not None and (source, mode) not in self._teachers:
            known = sorted({name for name, of_mode in self._teachers if of_mode == mode})
            found = f"has {known}" if known else f"has none, as no phase has a lambda for the {mode} mode"
            raise UserError(f"no {mode} document of source {source!r}: this recipe's fusion data {found}")
        teacher = self._teachers.get((source, mode))
        text = self._text if mode == "training" else teacher
        if text is None:
            nothing = np.zeros(0, np.int64)
            return Document(nothing, nothing.astype(bool), *_no_rows(0))
        tokens = text["tokens"][example].astype(np.int64)
        supervised = text["supervised"][example].astype(bool)
        if teacher is None:
            return Document(tokens, supervised, *_no_rows(int(supervised.sum())))
        return Document(
            tokens=tokens,
            supervised=supervised,
            counts=teacher["counts"][example],
            entry_ids=teacher["entry_ids"][example].astype(np.int64),
            entry_logprobs=teacher["entry_logprobs"][example].view(np.float16).astype(np.float32),
            match=teacher["match"][example],
        )


def _no_rows(rows: int) -> tuple[np.ndarray, ...]:
    """counts, entry_ids, entry_logprobs, match of rows about which no teacher says anything."""
    return np.zeros(rows, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(rows, np.uint8)
