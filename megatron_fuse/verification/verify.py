"""The whole verification: artifacts, text and order of the examples, then rows and choice of each mode."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path

import numpy as np

from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.documents import ROW_FIELDS, TEXT_FIELDS
from megatron_fuse.fusion_data.layout import TEACHERS, TEXT
from megatron_fuse.fusion_data.stored_spans import SUFFIX
from megatron_fuse.progress import Progress
from megatron_fuse.selection.curriculum import curriculum_path
from megatron_fuse.stages import Context
from megatron_fuse.storage import Artifact
from megatron_fuse.verification.artifacts import (
    expected_artifacts,
    file_problems,
    lineage_problems,
    open_artifacts,
)
from megatron_fuse.verification.curriculum import curriculum_problems
from megatron_fuse.verification.selection import (
    ExampleArrays,
    example_problems,
    read_example_arrays,
    selection_problems,
)
from megatron_fuse.verification.shards import (
    ShardFiles,
    document_problems,
    fix,
    labels_per_example,
    listed_problems,
    read_listed,
    row_problems,
    span_problems,
)


@dataclass
class Verification:
    """problems: one line each, with file, example or row, value and fix.

    counts: numbers of what was checked.
    """

    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def verify_fusion_data(context: Context) -> Verification:
    """Checks all fusion data of a recipe.

    Raises UserError only if the recipe's target itself cannot be read.
    """
    recipe, verification = context.recipe, Verification()
    expected = expected_artifacts(context)
    artifacts = open_artifacts(expected, verification.problems)
    with Progress("checksums and lineage", "artifacts", len(artifacts)) as progress:
        for entry in expected:
            if entry.directory in artifacts:
                artifact = artifacts[entry.directory]
                verification.problems += [*file_problems(artifact), *lineage_problems(entry, artifacts)]
                files = artifact.manifest["files"].values()
                verification.counts.update(
                    artifacts=1, files=len(files), bytes=sum(file["bytes"] for file in files)
                )
                progress.update(verification.counts["artifacts"])
    text = artifacts.get(TEXT.directory(recipe))
    if text:
        prefixes = _prefixes(text)
        teachers = {
            (mode, source): artifacts[directory]
            for mode, source in product(recipe.modes_with_teacher, recipe.sources)
            if (directory := TEACHERS.directory(recipe, source, mode)) in artifacts
        }
        with Progress("documents and rows", "shards", len(prefixes) * (1 + len(teachers))) as progress:
            verifier = _ShardVerifier(context, verification, progress)
            shards = [verifier.text_shard(prefix) for prefix in prefixes]
            verifier.curriculum(text, shards)
            for mode in recipe.modes_with_teacher:
                of_mode = {source: teacher for (its, source), teacher in teachers.items() if its == mode}
                verifier.mode(mode, text, shards, of_mode)
    return verification


@dataclass(frozen=True, eq=False)
class _TextShard:
    """names: the examples' ids; empty if they cannot be read. Then the shard is not checked any further.

    listed int64 [n]: their supervised tokens, as listed beside the ids. labels int64 [n]: the same, counted
    from the marks; None if these cannot be read.
    """

    names: list[str]
    listed: np.ndarray
    labels: np.ndarray | None


class _ShardVerifier:
    """Checks the shards of the artifacts of one recipe, and adds problems and counts to the verification."""

    def __init__(self, context: Context, verification: Verification, progress: Progress) -> None:
        self.context = context
        self.recipe = context.recipe
        self.vocab_size = context.target.tokenizer.vocab_size
        self.verification = verification
        self.progress, self.checked = progress, 0

    def text_shard(self, prefix: Path) -> _TextShard:
        self._checking()
        try:
            listed = read_listed(prefix)
        except UserError as error:
            self.verification.problems.append(str(error))
            listed = {}
        tokens = np.array([*listed.values()], np.int64)
        if not listed:
            return _TextShard([], tokens, None)
        shard = ShardFiles.read(prefix, list(listed), TEXT_FIELDS)
        labels = self._documents(shard)
        self.verification.problems += listed_problems(shard, labels, tokens)
        if labels is not None:
            self.verification.problems += span_problems(Path(f"{prefix}{SUFFIX}"), labels, list(listed))
        return _TextShard(list(listed), tokens, labels)

    def curriculum(self, text: Artifact, shards: list[_TextShard]) -> None:
        """Checks the values that order the examples, if the ids of all examples can be read.

        If the order is `shuffled`, the file may be missing.
        """
        path = curriculum_path(self.recipe)
        if all(shard.names for shard in shards) and (
            path.exists() or self.recipe.schedule.order != "shuffled"
        ):
            names = list(chain.from_iterable(shard.names for shard in shards))
            listed = np.concatenate([shard.listed for shard in shards])
            self.verification.problems += curriculum_problems(self.context, text.sha256, listed, names)

    def mode(
        self, mode: str, text: Artifact, shards: list[_TextShard], teachers: dict[str, Artifact]
    ) -> None:
        """Checks the rows of these sources, and the selection if the examples' arrays of all sources are
        readable.
        """
        arrays_or_none = [
            self._teacher(mode, source, teacher, shards) for source, teacher in teachers.items()
        ]
        example_arrays = [each for each in arrays_or_none if each is not None]
        if len(example_arrays) == len(self.recipe.sources) and all(shard.names for shard in shards):
            parents = {
                "text": text.sha256,
                **{source: teacher.sha256 for source, teacher in teachers.items()},
            }
            names = list(chain.from_iterable(shard.names for shard in shards))
            self.verification.problems += selection_problems(
                self.context, mode, parents, example_arrays, names
            )

    def _teacher(
        self, mode: str, source: str, teacher: Artifact, shards: list[_TextShard]
    ) -> ExampleArrays | None:
        """Checks the rows of one source. Returns the arrays of all examples; None if some cannot be read."""
        prefixes = _prefixes(teacher)
        if len(prefixes) != len(shards):
            manifest = teacher.directory / "manifest.json"
            self.verification.problems.append(
                f"{manifest}: {len(prefixes)} shards, but the text has {len(shards)}{fix(manifest)}"
            )
            return None
        pairs = zip(prefixes, shards, strict=True)
        most = TEACHERS.options(self.recipe, source, mode)["entries_per_row"]
        arrays_or_none = [
            self._row_shard(mode, prefix, shard, most) for prefix, shard in pairs if shard.names
        ]
        example_arrays = [each for each in arrays_or_none if each is not None]
        if not example_arrays or len(example_arrays) < len(arrays_or_none):
            return None
        return {name: np.concatenate([part[name] for part in example_arrays]) for name in example_arrays[0]}

    def _row_shard(
        self, mode: str, prefix: Path, text: _TextShard, entries_per_row: int
    ) -> ExampleArrays | None:
        """Checks the rows of one shard. Returns the arrays of its examples; None if they cannot be read."""
        self._checking()
        labels = text.labels
        if mode == "inference":  # the documents are the source's answers, stored beside the rows
            labels = self._documents(ShardFiles.read(prefix, text.names, TEXT_FIELDS))
        shard = ShardFiles.read(prefix, text.names, ROW_FIELDS)
        self.verification.problems += row_problems(
            shard, labels, vocab_size=self.vocab_size, entries_per_row=entries_per_row
        )
        sizes = {name: len(rows.values) for name, rows in shard.fields.items()}
        self.verification.counts.update(rows=sizes.get("counts", 0), entries=sizes.get("entry_ids", 0))
        path = prefix.with_name(prefix.name + ".examples.safetensors")
        try:
            example_arrays = read_example_arrays(path, len(text.names))
        except UserError as error:
            self.verification.problems.append(str(error))
            return None
        if labels is not None:
            self.verification.problems += example_problems(path, example_arrays, labels, text.names, mode)
        return example_arrays

    def _checking(self) -> None:
        """Counts the shard whose check begins, so that the last one counts too."""
        self.checked += 1
        self.progress.update(self.checked)

    def _documents(self, shard: ShardFiles) -> np.ndarray | None:
        """Checks the conversations.

        Returns the number of supervised tokens of each, int64 [n]; None if unreadable.
        """
        seq_length = self.recipe.training.seq_length
        self.verification.problems += document_problems(
            shard, vocab_size=self.vocab_size, seq_length=seq_length
        )
        labels = labels_per_example(shard)
        if labels is not None:
            self.verification.counts.update(
                documents=int((labels > 0).sum()), supervised_tokens=int(labels.sum())
            )
        return labels


def _prefixes(artifact: Artifact) -> list[Path]:
    return [artifact.directory / f"shard-{index:05d}" for index in range(artifact.manifest["shards"])]
