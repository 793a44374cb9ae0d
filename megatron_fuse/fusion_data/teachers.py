"""One source's captured rows, aligned to the target's tokens and written in its vocabulary.

FUSION/teachers/SOURCE/MODE/shard-00000.{counts,match,entry_ids,entry_logprobs}.{bin,idx}    rows at the supervised tokens
FUSION/teachers/SOURCE/inference/shard-00000.{tokens,supervised}.{bin,idx}                   the source's own answer
FUSION/teachers/SOURCE/MODE/shard-00000.examples.safetensors                                 what selection needs

Log-probabilities are float16 bit patterns, rounded DOWN so that a row's mass never exceeds 1: an entry loses at most 0.04 % of
the row's mass (the spacing of float16 times the probability), and the tail grows by as much.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from megatron_fuse.alignment import (
    LabelMass,
    Rows,
    VocabularyMap,
    align_boundaries,
    cached_vocabulary_map,
    label_mass,
    project_rows,
)
from megatron_fuse.capture import EXACT_STATUS, CaptureShard, open_capture, read_capture_shard
from megatron_fuse.chat import ChatFormat
from megatron_fuse.fusion_data.layout import MATCHES, TEACHER_STAGE, fusion_directory, target_hashes, teacher_directory
from megatron_fuse.fusion_data.text import TargetDocuments, encode_documents, id_dtype, read_text_shard, write_ragged
from megatron_fuse.instructions import example_shards, open_instructions
from megatron_fuse.recipe import Recipe
from megatron_fuse.responses import open_responses, response_shards
from megatron_fuse.sources.huggingface import load_format, source_options
from megatron_fuse.storage import Artefact, Plan, completed, run_plan, temporary_then_rename

EMPTY_ANSWER = 0  # no answer, instead of the answer's hash


def plan_teacher(recipe: Recipe, source: str, mode: str, target: ChatFormat, text: Artefact) -> Plan:
    """What a source's rows depend on: capture, target, text, and how they are brought together; never the other sources."""
    captured = open_capture(recipe, source, mode)
    options = {
        "mode": mode,
        "vocabulary_map": recipe.alignment.vocabulary_map,
        "unmatched": recipe.alignment.unmatched,
        "temperature": recipe.loss.teacher_temperature,
        "entries_per_row": recipe.capture.top_k + 1,  # the label's own mass may add one
    }
    inputs = {"capture": captured.sha256, "text": text.sha256, **target_hashes(target)}
    directory = teacher_directory(recipe, source, mode)
    return Plan(directory, TEACHER_STAGE, options, inputs, captured.manifest["shards"])


def build_teacher(
    recipe: Recipe, source: str, mode: str, target: ChatFormat, text: Artefact, progress: Callable[[str], None] = print
) -> Artefact | None:
    """Aligns and projects one source's capture of one mode. None while other ranks still work."""
    plan = plan_teacher(recipe, source, mode, target, text)
    artefact = completed(plan)
    if artefact:
        return artefact
    chat = load_format(source_options(recipe, source), f"sources.{source}")
    captures = open_capture(recipe, source, mode).files(".safetensors")
    examples = example_shards(open_instructions(recipe))
    answers = response_shards(open_responses(recipe, source)) if mode == "inference" else None
    projection = _Projection(
        source=chat,
        target=target,
        vocabulary_map=cached_vocabulary_map(
            fusion_directory(recipe) / "maps",
            chat.tokenizer,
            target.tokenizer,
            source_stop=chat.stop_id,
            target_stop=target.stop_id,
            kind=recipe.alignment.vocabulary_map,
            source_separator=chat.separator,
            target_separator=target.separator,
        ),
        unmatched=recipe.alignment.unmatched,
        temperature=recipe.loss.teacher_temperature,
        column=1 + recipe.capture_temperatures.index(recipe.loss.teacher_temperature),
    )

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        captured = read_capture_shard(captures[index])
        usable = captured.status == EXACT_STATUS
        if answers:
            texts = [answer.response for answer in answers[index]]
            responses = [(answer.response, not answer.truncated) for answer in answers[index]]
            chosen = [response if fine else None for response, fine in zip(responses, usable, strict=True)]
            documents = encode_documents(target, examples[index], chosen, recipe.training.seq_length)
            write_ragged(prefix, "tokens", documents.tokens, id_dtype(target.tokenizer.vocab_size))
            write_ragged(prefix, "supervised", documents.supervised, np.uint8)
            available = documents.present
        else:
            texts = [example.response for example in examples[index]]
            documents = read_text_shard(text, index)
            available = documents.present & documents.exact & usable
        rows, match = projection(captured, documents, texts)
        counts = _write_rows(prefix, documents, rows, match, id_dtype(target.tokenizer.vocab_size))
        facts = {
            "available": available.astype(np.uint8),
            "ce_sum": captured.ce_sum,
            "response_bytes": captured.response_bytes,
            "answer": np.array([_answer_key(t) if a else EMPTY_ANSWER for t, a in zip(texts, available, strict=True)]),
        }
        with temporary_then_rename(Path(f"{prefix}.examples.safetensors")) as temporary:
            save_file(facts, temporary)
        return {"examples": len(texts), "available": int(available.sum()), **counts}

    return run_plan(plan, make_shard, progress)


def _answer_key(text: str) -> int:
    """The same for identical answers, never EMPTY_ANSWER."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True) | 1


def _write_rows(prefix: Path, documents: TargetDocuments, rows: Rows, match: np.ndarray, dtype: type) -> dict[str, int]:
    lengths = np.array([len(starts) for starts in documents.starts], np.int64)
    bounds = np.cumsum(lengths)[:-1]
    entry_bounds = np.concatenate([[0], np.cumsum(rows.counts, dtype=np.int64)])[bounds]
    write_ragged(prefix, "counts", np.split(rows.counts, bounds), np.uint8)
    write_ragged(prefix, "match", np.split(match, bounds), np.uint8)
    write_ragged(prefix, "entry_ids", np.split(rows.ids, entry_bounds), dtype)
    half = round_down_to_half(rows.logprobs).view(np.uint16)
    write_ragged(prefix, "entry_logprobs", np.split(half, entry_bounds), np.uint16)
    matches = {f"rows_{name}": int((match == code).sum()) for code, name in enumerate(MATCHES)}
    return {"rows": len(match), **{name: count for name, count in matches.items() if count}, "entries": len(rows.ids)}


def round_down_to_half(values: np.ndarray) -> np.ndarray:
    """The largest float16 that is not above each value (at most 0, and not below float16's least number)."""
    values = np.clip(values, np.finfo(np.float16).min, 0)
    half = values.astype(np.float16)
    above = half.astype(values.dtype) > values
    half[above] = np.nextafter(half[above], np.float16(-np.inf))
    return half


@dataclass(frozen=True)
class _Projection:
    """How one source's rows become the target's."""

    source: ChatFormat
    target: ChatFormat
    vocabulary_map: VocabularyMap
    unmatched: str
    temperature: float
    column: int  # of the capture's log-sum-exps

    def __call__(self, captured: CaptureShard, documents: TargetDocuments, texts: list[str]) -> tuple[Rows, np.ndarray]:
        """Rows at all supervised tokens of the shard, document after document, and how each was aligned, uint8."""
        rows = self._known_rows(captured)
        entry_offsets = np.concatenate([[0], np.cumsum(rows.counts, dtype=np.int64)])
        source_rows, leading, labels = [], [], []
        for example, starts in enumerate(documents.starts):
            span = captured.rows(example)
            aligned = np.full(len(starts), -1, np.int32)
            if len(starts) and span.stop > span.start and documents.exact[example]:
                aligned = align_boundaries(captured.starts[span], starts, unmatched=self.unmatched)
            first_row = np.zeros(len(starts), bool)
            first_row[:1] = documents.leading[example]
            leading.append(first_row)
            source_rows.append(np.where(aligned >= 0, aligned + span.start, -1))
            entries = slice(entry_offsets[span.start], entry_offsets[span.stop])
            own_rows = Rows(rows.counts[span], rows.ids[entries], rows.logprobs[entries])
            labels.append(self._label_mass(captured, documents, example, texts[example], aligned, own_rows))
        source_leading = np.zeros(len(captured.counts), bool)
        begins = captured.offsets[:-1][np.diff(captured.offsets) > 0]
        source_leading[begins] = captured.leading[np.diff(captured.offsets) > 0]
        source_row = np.concatenate([np.zeros(0, np.int64), *source_rows])
        projected = project_rows(
            rows,
            source_row,
            self.vocabulary_map,
            leading=np.concatenate([np.zeros(0, bool), *leading]),
            source_leading=source_leading,
            labels=_join_labels(labels),
        )
        # A row whose mass has all gone to the tail says nothing: it is skipped like one without a source row.
        says = (source_row >= 0) & (projected.counts > 0)
        return projected, np.where(says, MATCHES.index("exact"), MATCHES.index("skip")).astype(np.uint8)

    def _known_rows(self, captured: CaptureShard) -> Rows:
        """The rows without entries of padded logits columns, which no tokenizer knows: their mass is in the tail."""
        logprobs = captured.logprobs(self.column, self.temperature)
        known = captured.entry_ids < self.source.tokenizer.vocab_size
        if known.all():
            return Rows(captured.counts, captured.entry_ids, logprobs)
        row = np.repeat(np.arange(len(captured.counts)), captured.counts)
        counts = np.bincount(row[known], minlength=len(captured.counts)).astype(np.uint8)
        return Rows(counts, captured.entry_ids[known], logprobs[known])

    def _label_mass(
        self,
        captured: CaptureShard,
        documents: TargetDocuments,
        example: int,
        text: str,
        aligned: np.ndarray,
        rows: Rows,
    ) -> LabelMass:
        span, starts = captured.rows(example), documents.starts[example]
        if not (aligned >= 0).any():
            return LabelMass.none(len(starts))
        response = text.encode()
        tokens = captured.tokens[span]
        stop = bool(captured.stop[example])
        source_ends = np.append(captured.starts[span], len(response))[1 : len(tokens) + 1 - stop]
        target_ends = np.append(starts, len(response))[1 : len(starts) + 1 - stop]
        labels = documents.tokens[example][documents.supervised[example].astype(bool)].astype(np.int32)
        return label_mass(
            rows,
            aligned,
            self.source.tokenizer,
            response=response,
            source_tokens=tokens[: len(source_ends)],
            source_ends=source_ends,
            target_tokens=labels[: len(target_ends)],
            target_ends=target_ends,
            label_logprobs=captured.token_logprobs[span],
            logsumexp=captured.lse[span, 0],
            logsumexp_temperature=captured.lse[span, self.column],
            temperature=self.temperature,
        )


def _join_labels(parts: list[LabelMass]) -> LabelMass:
    names = ("log_fraction", "source_token", "source_logprob", "label")
    return LabelMass(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
