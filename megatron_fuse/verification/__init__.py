"""Checks everything that fusion data holds, and says all that is wrong with it.

    artefacts.py    files: size and sha256 against the manifest, of the text, of the sources' rows and, as far as it is there, of
                    what they were made from; lineage: what each was made with and from, against the recipe and its parents
    shards.py       documents: ids within the vocabulary, one mark a token, lengths that fit each other; rows: counts that fit
                    labels and entries, no id twice in a row, finite log-probabilities of at most 0, a mass of at most 1
    selection.py    the choice between the sources: who has the example, and what the stored facts lead to

One shard is in memory at a time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data import modes_with_teacher
from megatron_fuse.fusion_data.documents import ROW_FIELDS, TEXT_FIELDS
from megatron_fuse.fusion_data.layout import teacher_directory, teacher_options, text_directory
from megatron_fuse.recipe import Recipe
from megatron_fuse.sources.huggingface import load_format
from megatron_fuse.storage import Artefact, read_jsonl
from megatron_fuse.verification.artefacts import (
    expected_artefacts,
    file_problems,
    lineage_problems,
    open_artefacts,
)
from megatron_fuse.verification.selection import FACTS, Facts, fact_problems, selection_problems
from megatron_fuse.verification.shards import (
    ShardFiles,
    document_problems,
    labels_per_example,
    listed_problems,
    mend,
    row_problems,
)


@dataclass
class Verification:
    """problems: one line each, with file, example or row, value and mend; counts: what was looked at."""

    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def verify_fusion_data(recipe: Recipe, progress: Callable[[str], None] = print) -> Verification:
    """Looks at all fusion data of a recipe. Raises UserError only where the recipe's target itself cannot be read."""
    target = load_format(recipe.target, "target")
    found = Verification()
    expected = expected_artefacts(recipe, target)
    artefacts = open_artefacts(expected, found.problems)
    for entry in expected:
        if entry.directory in artefacts:
            progress(f"{entry.directory}: checksums and lineage")
            artefact = artefacts[entry.directory]
            found.problems += [*file_problems(artefact), *lineage_problems(entry, artefacts)]
            files = artefact.manifest["files"].values()
            found.counts.update(artefacts=1, files=len(files), bytes=sum(facts["bytes"] for facts in files))
    text = artefacts.get(text_directory(recipe))
    if text:
        verifier = _Verifier(recipe, target.tokenizer.vocab_size, found, progress)
        verifier.verify_text(text)
        for mode in modes_with_teacher(recipe):
            teachers = {source: artefacts.get(teacher_directory(recipe, source, mode)) for source in recipe.sources}
            verifier.verify_mode(mode, text, {name: teacher for name, teacher in teachers.items() if teacher})
    return found


@dataclass(frozen=True)
class _Verifier:
    """Adds what it finds to `found`. names, labels: of the text's shards, the examples' ids and supervised tokens [n]; a shard
    whose names cannot be read has none, and nothing more is said of it."""

    recipe: Recipe
    vocab_size: int
    found: Verification
    progress: Callable[[str], None]
    names: list[list[str]] = field(default_factory=list)
    labels: list[np.ndarray | None] = field(default_factory=list)

    def verify_text(self, text: Artefact) -> None:
        for prefix in _prefixes(text):
            self.progress(f"{prefix}: documents")
            listed = self._examples(prefix)
            self.names.append(list(listed))
            self.labels.append(None)
            if listed:
                shard = ShardFiles.read(prefix, self.names[-1], TEXT_FIELDS)
                self.labels[-1] = self._documents(shard)
                self.found.problems += listed_problems(shard, self.labels[-1], np.array([*listed.values()]))

    def verify_mode(self, mode: str, text: Artefact, teachers: dict[str, Artefact]) -> None:
        """Rows of these sources, and the selection where the facts of all the recipe's sources can be read."""
        facts = [self._teacher(mode, teacher) for teacher in teachers.values()]
        if len(facts) == len(self.recipe.sources) and None not in facts and all(self.names):
            self.progress(f"selection of the {mode} mode")
            parents = {"text": text.sha256, **{source: teacher.sha256 for source, teacher in teachers.items()}}
            self.found.problems += selection_problems(self.recipe, mode, parents, facts, list(chain(*self.names)))

    def _teacher(self, mode: str, teacher: Artefact) -> Facts | None:
        """The facts of all examples; None where some cannot be read."""
        facts = []
        if teacher.manifest["shards"] != len(self.names):
            shards = f"{teacher.manifest['shards']} shards, the text has {len(self.names)}"
            self.found.problems.append(
                f"{teacher.directory}/manifest.json: {shards}{mend(teacher.directory / 'shard')}"
            )
            return None
        for prefix, names, labels in zip(_prefixes(teacher), self.names, self.labels, strict=True):
            if not names:
                continue
            self.progress(f"{prefix}: rows")
            if mode == "inference":  # the source's own answers
                labels = self._documents(ShardFiles.read(prefix, names, TEXT_FIELDS))
            shard = ShardFiles.read(prefix, names, ROW_FIELDS)
            self.found.problems += row_problems(
                shard,
                labels,
                vocab_size=self.vocab_size,
                entries_per_row=teacher_options(self.recipe, mode)["entries_per_row"],
            )
            sizes = {name: len(shard.fields[name].values) for name in shard.fields}
            self.found.counts.update(rows=sizes.get("counts", 0), entries=sizes.get("entry_ids", 0))
            facts.append(self._facts(prefix, names, labels, mode))
        if None in facts:
            return None
        return {name: np.concatenate([part[name] for part in facts]) for name in facts[0]} if facts else None

    def _documents(self, shard: ShardFiles) -> np.ndarray | None:
        """Checks the conversations; supervised tokens of each, None where they cannot be read."""
        seq_length = self.recipe.training.seq_length
        self.found.problems += document_problems(shard, vocab_size=self.vocab_size, seq_length=seq_length)
        labels = labels_per_example(shard)
        if labels is not None:
            self.found.counts.update(documents=int((labels > 0).sum()), supervised_tokens=int(labels.sum()))
        return labels

    def _examples(self, prefix: Path) -> dict[str, int]:
        """Supervised tokens by id, as the text lists them; nothing where that cannot be read."""
        path = prefix.with_name(prefix.name + ".examples.jsonl")
        try:
            return {str(row["id"]): int(row["supervised_tokens"]) for _, row in read_jsonl(path)}
        except (UserError, KeyError, TypeError, ValueError, OSError) as error:
            self.found.problems.append(f"{path}: its examples cannot be read ({error}){mend(prefix)}")
            return {}

    def _facts(self, prefix: Path, names: list[str], labels: np.ndarray | None, mode: str) -> Facts | None:
        path = prefix.with_name(prefix.name + ".examples.safetensors")
        try:
            facts = load_file(path)
            if any(len(values) != len(names) for values in facts.values()) or FACTS - facts.keys():
                raise UserError(f"holds {sorted(facts)}, wanted are {sorted(FACTS)} of {len(names)} examples")
        except (UserError, SafetensorError, OSError) as error:
            self.found.problems.append(f"{path}: what selection needs cannot be read ({error}){mend(prefix)}")
            return None
        if labels is not None:
            self.found.problems += fact_problems(path, facts, labels, names, mode)
        return facts


def _prefixes(artefact: Artefact) -> list[Path]:
    return [artefact.directory / f"shard-{index:05d}" for index in range(artefact.manifest["shards"])]
