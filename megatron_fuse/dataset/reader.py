"""The dataset that the trainer reads: documents in the target's tokens, with the teacher's rows of the
winning or any other source.

    FUSION/text/                           prompt and ground-truth response of every example
    FUSION/teachers/SOURCE/training/       the source's rows at the text's supervised tokens
    FUSION/teachers/SOURCE/inference/      prompt, the source's own answer and its rows
    FUSION/selection/MODE-RULE.safetensors which source has the advantage, per example
    FUSION/curriculum-ORDER.safetensors    what orders the examples if they are not shuffled (curriculum.py)

Every artifact holds one stream per field (streams.py), with one sequence per example. The sequence of an
example that is left out is empty.
"""

from collections.abc import Sequence

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.documents import (
    NO_DOCUMENT,
    ROW_FIELDS,
    TEXT_FIELDS,
    Document,
    DocumentStreams,
)
from megatron_fuse.fusion_data.layout import TEACHERS, TEXT
from megatron_fuse.fusion_data.listing import read_examples
from megatron_fuse.fusion_data.streams import Stream
from megatron_fuse.recipe import MODES, Recipe
from megatron_fuse.selection.choice import SELECTION, Selection, read_selection
from megatron_fuse.selection.curriculum import CURRICULUM, read_curriculum
from megatron_fuse.selection.mixture import mix
from megatron_fuse.selection.rules import NONE
from megatron_fuse.stages import Context, Parents
from megatron_fuse.storage import Artifact, sha256_of_json

MOST_ENTRIES = np.iinfo(np.uint8).max  # entries of a row: their count is stored in one byte


def data_parents(recipe: Recipe) -> Parents:
    """What a training reads its data by: the order of the examples, and the selection of every mode."""
    selections: Parents = {mode: (SELECTION, (mode,)) for mode in recipe.modes_with_teacher}
    return {"curriculum": (CURRICULUM, ()), **selections}


class FusionDataset:
    """Fusion data of a recipe, memory-mapped.

    Raises UserError if a part is missing, incomplete or made for another target.

    Examples are numbered as in the instructions. Attributes:
        train, validation [*] int64: the examples of each split that have a document
        entries_per_row: the most entries that a row can have
        sha256: hash of all documents and of the choice between sources
        curriculum: the order of the examples, None if they are shuffled
        artifacts: all artifacts that hold documents; checksums.py compares their checksums

    Opening checks the sizes of all files against their manifests and indices, the indices against each other,
    and the checksums of the small files that it reads whole: the lists of examples, the selections and the
    curriculum. It reads no document. The content of a document is checked when it is read, as far as its
    parts must fit each other.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.sources = list(recipe.sources)
        # Training may run on a machine that has only the fusion data: options are compared only for those
        # earlier stages that are there.
        context = Context(recipe)
        context.refuse_changed_options(data_parents(recipe))
        text = context.open_alone(TEXT)
        self.artifacts = [text]
        rows = read_examples(text)
        self.example_ids: list[str] = [row.id for row in rows]
        self._text_streams = _streams(text, TEXT_FIELDS)
        self._labels = np.array([row.supervised_tokens for row in rows], np.int64)
        ground_truth = DocumentStreams(
            text.directory, self._text_streams, None, examples=len(rows), supervised_tokens=self._labels
        )
        self._documents: dict[tuple[str | None, str], DocumentStreams] = {(None, "training"): ground_truth}
        is_validation = np.array([row.is_validation for row in rows], bool)
        present = ground_truth.lengths > 0
        self.train = np.flatnonzero(present & ~is_validation)
        self.validation = np.flatnonzero(present & is_validation)
        self.entries_per_row = 0
        self.selections: dict[str, Selection] = {}
        for mode in recipe.modes_with_teacher:
            parents = {
                source: self._add_teacher(context.open_alone(TEACHERS, source, mode), source, mode)
                for source in self.sources
            }
            self.selections[mode] = read_selection(recipe, mode, {"text": text.sha256, **parents})
        self.curriculum = read_curriculum(recipe, text.sha256)
        self._chosen = dict.fromkeys(MODES, np.full(len(rows), NONE, np.int16))
        # Examples with weight 0 (dropped by their margin) are treated as having no winner.
        self._chosen |= {mode: np.where(s.weight > 0, s.source, NONE) for mode, s in self.selections.items()}
        self._weights = dict.fromkeys(MODES, np.ones(len(rows), np.float32))
        self._weights |= {mode: np.where(s.weight > 0, s.weight, 1) for mode, s in self.selections.items()}
        # A mixture puts the entries of all candidates side by side into one row.
        self._mixtures = {
            mode: s.arrays["mixture"] for mode, s in self.selections.items() if "mixture" in s.arrays
        }
        if self._mixtures:
            self.entries_per_row *= len(recipe.candidates)
            if self.entries_per_row > MOST_ENTRIES:
                raise UserError(
                    f"selection.training: average of {len(recipe.candidates)} sources needs "
                    f"{self.entries_per_row} entries per row, but a row holds at most {MOST_ENTRIES}. Name "
                    "fewer sources in selection.sources, or lower capture.top_k and capture again."
                )
        choices = [f"{mode} {selection.sha256}" for mode, selection in self.selections.items()]
        self.sha256 = sha256_of_json([text.sha256, *choices])
        # In the training mode the text is the same for every teacher;
        # in the inference mode it is the winner's answer.
        self._lengths = {"training": ground_truth.lengths, "inference": self._of_winners("lengths")}
        self._supervised = {"training": self._labels, "inference": self._of_winners("supervised_tokens")}

    def _add_teacher(self, artifact: Artifact, source: str, mode: str) -> str:
        """Opens one source's rows; returns their sha256."""
        self.artifacts.append(artifact)
        rows, entries_per_row = (
            _streams(artifact, ROW_FIELDS),
            artifact.manifest["options"]["entries_per_row"],
        )
        text, labels = (
            (self._text_streams, self._labels)
            if mode == "training"
            else (_streams(artifact, TEXT_FIELDS), None)
        )
        self._documents[source, mode] = DocumentStreams(
            artifact.directory,
            text,
            rows,
            examples=len(self.example_ids),
            entries_per_row=entries_per_row,
            supervised_tokens=labels,
        )
        self.entries_per_row = max(self.entries_per_row, entries_per_row)
        return artifact.sha256

    def _of_winners(self, field: str) -> np.ndarray:
        """[examples] int64: a field of the winning answer, 0 if no answer won."""
        values = np.zeros(len(self.example_ids), np.int64)
        for number, source in enumerate(self.sources):
            won = self._chosen["inference"] == number
            if won.any():
                values[won] = getattr(self._documents[source, "inference"], field)[won]
        return values

    def lengths(self, mode: str) -> np.ndarray:
        """[examples] int64: tokens of the selected document, 0 if there is none."""
        return self._lengths[mode]

    def supervised_tokens(self, mode: str) -> np.ndarray:
        """[examples] int64: supervised tokens of the selected document."""
        return self._supervised[mode]

    def example_weights(self, mode: str) -> np.ndarray:
        """[examples] float32, above 0: the weight of the selected document, by the margin of its source."""
        return self._weights[mode]

    def winners(self, mode: str) -> np.ndarray:
        """[examples] int16: index in `sources` of the source with the advantage;
        for a mixture that of the largest weight.

        NONE = no teacher: no source won, or the margin has dropped the example.
        """
        return self._chosen[mode]

    def selected_source(self, mode: str, example: int) -> str | None:
        """Name of the source with the advantage, None if `winners` has NONE."""
        number = self._chosen[mode].item(example)
        return None if number == NONE else self.sources[number]

    def document(self, mode: str, example: int, source: str | None = None) -> Document:
        """The document of an example with the rows of `source`: views of the files, without copies.

        source None: the selected source or, if the selection weighs the sources, their mixture. Without a
        teacher the document of the training mode is the text with empty rows. Without an answer the document
        of the inference mode is empty.
        Raises UserError if the recipe has no such source, or if the document is damaged.
        """
        if source is None and mode in self._mixtures:
            return self._mixed(mode, example)
        source = source or self.selected_source(mode, example)
        documents = self._documents.get((source, mode))
        if documents is not None:
            return documents[example]
        if source is None:
            return NO_DOCUMENT
        known = sorted(name for name, of_mode in self._documents if of_mode == mode and name is not None)
        available = (
            f"has {known}" if known else f"has none, because no phase has a lambda for the {mode} mode"
        )
        raise UserError(
            f"there is no {mode} document of source {source!r}: the fusion data of this recipe {available}"
        )

    def _mixed(self, mode: str, example: int) -> Document:
        weights = self._mixtures[mode][example]
        if self._chosen[mode][example] == NONE or not weights.any():
            return self._documents[None, mode][example]
        weighed = [(self.sources[number], float(weights[number])) for number in np.flatnonzero(weights)]
        return mix(
            [self._documents[source, mode][example] for source, _ in weighed],
            [weight for _, weight in weighed],
        )


def _streams(artifact: Artifact, fields: Sequence[str]) -> dict[str, Stream]:
    return {
        field: Stream([path.with_suffix("") for path in artifact.files(f".{field}.idx")]) for field in fields
    }
