"""The captured rows of one source, aligned to the target's tokens and projected into the target's vocabulary.

In FUSION/teachers/SOURCE/MODE:

shard-00000.{counts,match,entry_ids,entry_logprobs}.{bin,idx}    rows at the supervised tokens
shard-00000.{tokens,supervised}.{bin,idx}                        the source's own answer (inference mode)
shard-00000.examples.safetensors                                 what selection needs

Log-probabilities are stored as float16 bit patterns. They are rounded DOWN, so that the mass of a row never
exceeds 1. An entry loses at most 0.04 % of the row's mass (the spacing of float16 times the probability); the
tail grows by the same amount.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_fuse import ragged
from megatron_fuse.alignment import MATCHES, Rows, SourceRows, VocabularyMap, project_responses
from megatron_fuse.capture import CAPTURED, CAPTURES, CaptureShard, capture_shard
from megatron_fuse.chat import ChatFormat
from megatron_fuse.fusion_data.answers import EMPTY_ANSWER, answer_key
from megatron_fuse.fusion_data.documents import round_down_to_half
from megatron_fuse.fusion_data.encoding import (
    Documents,
    encode_answers,
    id_dtype,
    supervised_bytes,
    write_documents,
    write_ragged,
)
from megatron_fuse.fusion_data.layout import TEACHERS, TEXT
from megatron_fuse.fusion_data.maps import vocabulary_map_of
from megatron_fuse.fusion_data.stored_spans import read_text_shard
from megatron_fuse.instructions import INSTRUCTIONS, example_shards, shard_sizes
from megatron_fuse.progress import log_complete
from megatron_fuse.responses import RESPONSES, response_shards
from megatron_fuse.responses.answers import learned_of
from megatron_fuse.stages import Context
from megatron_fuse.storage import Artifact, ShardProgress, completed, run_plan, write_safetensors
from megatron_fuse.tokenization.spans import TokenSpans, response_bytes


def build_teacher(context: Context, source: str, mode: str) -> Artifact | None:
    """Aligns and projects the capture of one source and mode.

    Returns the artifact, None if other ranks still work. The text, the capture and, in the inference mode,
    the source's responses must be complete. Raises UserError if one of them is missing or damaged, or was
    made with other options.
    """
    recipe, target = context.recipe, context.target
    plan = context.plan(TEACHERS, source, mode)
    artifact = completed(plan)
    if artifact:
        log_complete(plan.directory, artifact.counts["examples"], "examples")
        return artifact
    captures, text = context.open(CAPTURES, source, mode), context.open(TEXT)
    instructions = context.open(INSTRUCTIONS)
    examples = example_shards(instructions)
    progress = ShardProgress(plan.directory, "examples", shard_sizes(instructions))
    answers = response_shards(context.open(RESPONSES, source)) if mode == "inference" else None
    project = _Projection(
        source=context.format(source),
        vocabulary_map=vocabulary_map_of(context, source),
        unmatched=recipe.alignment.unmatched,
        temperature=recipe.loss.teacher_temperature,
        column=1 + recipe.capture_temperatures.index(recipe.loss.teacher_temperature),
    )
    dtype = id_dtype(target.tokenizer.vocab_size)

    # A closure over the opened artifacts and the projection. run_plan calls it only for the shards of this
    # rank that are missing, and each call reads one shard: memory does not grow with their number.
    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        captured, shard = capture_shard(captures, index), examples[index]
        usable = captured.status == CAPTURED
        # The inference mode learns the source's own answers. Each source has other texts, so the documents
        # are stored with the rows. In the training mode all sources share the ground truth, which is stored
        # once, in the text.
        if answers:
            responses = [learned_of(answer, recipe.data.reasoning) for answer in answers[index]]
            texts = [response.text for response in responses]
            documents = encode_answers(recipe, target, shard, responses, usable)
            write_documents(prefix, documents, dtype)
            data = [response_bytes([text]) for text in texts]
        else:
            texts = [example.response for example in shard]
            documents = read_text_shard(text, index)
            data = supervised_bytes(recipe, shard)
        rows, match, corrected = project(captured, documents, data)
        counts = _write_rows(prefix, documents, rows, match, dtype)
        # An example is available if both models read it whole: the source's capture, and the target's
        # seq_length.
        available = documents.present & usable
        _write_example_arrays(prefix, captured, documents, texts, available)
        progress.update(len(texts), counts["rows"])  # a row is a supervised token
        return {
            "examples": len(texts),
            "available": int(available.sum()),
            **counts,
            "rows_label_mass": int(corrected.sum()),
        }

    return run_plan(plan, make_shard, progress)


def _write_rows(
    prefix: Path, documents: Documents, rows: Rows, match: np.ndarray, dtype: type
) -> dict[str, int]:
    labels = [len(spans) for spans in documents.spans]  # of each document
    entries = np.diff(ragged.offsets(rows.counts)[ragged.offsets(labels)])
    write_ragged(prefix, "counts", ragged.split(rows.counts, labels), np.uint8)
    write_ragged(prefix, "match", ragged.split(match, labels), np.uint8)
    write_ragged(prefix, "entry_ids", ragged.split(rows.ids, entries), dtype)
    half = round_down_to_half(rows.logprobs).view(np.uint16)
    write_ragged(prefix, "entry_logprobs", ragged.split(half, entries), np.uint16)
    matches = {f"rows_{name}": int((match == code).sum()) for code, name in enumerate(MATCHES)}
    return {
        "rows": len(match),
        **{name: count for name, count in matches.items() if count},
        "entries": len(rows.ids),
    }


def _write_example_arrays(
    prefix: Path, captured: CaptureShard, documents: Documents, texts: Sequence[str], available: np.ndarray
) -> None:
    """Writes what selection needs of every example and source, so that it does not read the rows."""
    answers = [
        answer_key(text) if is_available else EMPTY_ANSWER
        for text, is_available in zip(texts, available, strict=True)
    ]
    example_arrays = {
        "available": available.astype(np.uint8),
        "lossy": captured.lossy,
        "target_lossy": documents.lossy.astype(np.uint8),
        "ce_sum": captured.ce_sum,
        "response_bytes": captured.response_bytes,
        "response_tokens": captured.response_tokens,
        "answer": np.array(answers),
    }
    write_safetensors(Path(f"{prefix}.examples.safetensors"), example_arrays)


@dataclass(frozen=True)
class _Projection:
    """Turns the captured rows of one source into rows at the target's tokens, over its vocabulary."""

    source: ChatFormat
    vocabulary_map: VocabularyMap
    unmatched: str
    temperature: float
    column: int  # of captured.lse, for this temperature; column 0 is temperature 1

    def __call__(
        self, captured: CaptureShard, documents: Documents, data: Sequence[bytes]
    ) -> tuple[Rows, np.ndarray, np.ndarray]:
        """`project_responses` at all supervised tokens of a shard, document after document.

        data: the supervised bytes of every example.
        """
        offsets = ragged.offsets([len(each) for each in data])[:-1]
        source = SourceRows(
            tokenizer=self.source.tokenizer,
            spans=captured.all_spans(offsets),
            rows=Rows(captured.counts, captured.entry_ids, captured.logprobs(self.column, self.temperature)),
            temperature=self.temperature,
            token_logprobs=captured.token_logprobs,
            logsumexp=captured.lse[:, 0],
            logsumexp_temperature=captured.lse[:, self.column],
        )
        target = TokenSpans.join(documents.spans, offsets)
        return project_responses(source, target, self.vocabulary_map, unmatched=self.unmatched)
