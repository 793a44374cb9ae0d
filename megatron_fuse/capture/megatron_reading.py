"""A source in Megatron reads conversations: its layers and its vocabulary may be split over ranks.

Every rank of a copy goes through the same batches in the same order, and does its part of each: the stages of
the pipeline form an assembly line. Megatron's own forward-only schedule is not used. It keeps the outputs of
all micro-batches until the end and sends the shape of each before the tensor. Here the shapes are known on
every rank, and a batch's rows are reduced to a few numbers at once.

The last stage takes the hidden states of the supervised positions alone. In chunks of rows, each
tensor-parallel rank makes the logits of its columns and keeps the largest and the log-sum-exps. One gather
per chunk merges them on the leader. So no rank ever has a whole row of logits, unless it has all columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fuse_kernels import TopK, gather_topk_logsumexp
from megatron.core import parallel_state

from megatron_fuse.capture.distributions import NotFiniteError, SparseRows, sparse_rows_of
from megatron_fuse.capture.megatron_inputs import model_input
from megatron_fuse.capture.megatron_layout import source_architecture
from megatron_fuse.capture.megatron_ranks import PipelineNeighbours, SourceRanks
from megatron_fuse.capture.reading import (
    ReadingBatch,
    capture_in_batches,
    not_finite,
    reading_limit,
    reading_order,
)
from megatron_fuse.capture.shards import CaptureShard, Conversation
from megatron_fuse.huggingface.loading import refuse_ids_beyond
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.model.architecture import Architecture
from megatron_fuse.model.config import transformer_config
from megatron_fuse.model.conversion import load_hugging_face_weights
from megatron_fuse.model.expected_weights import check_weights
from megatron_fuse.model.gpt import FusionGPTModel, ReadPositions, build_model
from megatron_fuse.model.weight_files import DTYPES, WeightFiles
from megatron_fuse.progress import Report, silent
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.lookup import source_options

# Logits of this rank's columns in one chunk of rows.
_CPU_CHUNK, _GPU_CHUNK = 2**24, 2**28


@dataclass
class MegatronReader:
    """This rank's part of a source. report: see capture_in_batches; only the leader calls it."""

    recipe: Recipe
    source: str
    model: FusionGPTModel
    ranks: SourceRanks
    neighbours: PipelineNeighbours
    report: Report = silent

    @classmethod
    def load(
        cls, recipe: Recipe, source: str, ranks: SourceRanks, report: Report = silent
    ) -> "MegatronReader":
        """Builds this rank's part of the source and reads its weights, of which it reads only its own slices.

        Raises UserError for a model or a layout that does not fit, and for damaged weights.
        """
        options = source_options(recipe, source)
        architecture = source_architecture(recipe, source)
        directory = resolve_model(options.model, f"sources.{source}.model")
        check_weights(WeightFiles(directory), architecture)  # before memory is taken for them
        layout = options.parallel
        model = build_source(
            architecture, options.dtype, **layout.sizes, transformer_impl=layout.transformer_impl
        )
        load_hugging_face_weights([model], directory)
        neighbours = PipelineNeighbours(DTYPES[options.dtype], ranks.device)
        return cls(recipe, source, model, ranks, neighbours, report)

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    def capture_shard(self, conversations: Sequence[Conversation]) -> CaptureShard:
        """The shard of these conversations. The other ranks of the copy take part meanwhile."""
        return capture_in_batches(conversations, self.recipe, self._limit, self._read, self.report)

    def take_part(self, conversations: Sequence[Conversation]) -> None:
        """This rank's part of a shard that the leader makes."""
        _, batches = reading_order(conversations, self._limit, self.recipe.capture.batch_tokens)
        for batch in batches:
            self._forward(ReadingBatch.of([conversations[index] for index in batch]))
        self.neighbours.finish()

    @property
    def _limit(self) -> int:
        return reading_limit(self.recipe, self.architecture.max_position_embeddings)

    def _read(self, conversations: list[Conversation]) -> list[SparseRows]:
        batch, options = ReadingBatch.of(conversations), self.recipe.capture
        largest = self._forward(batch)
        assert largest is not None  # this rank leads
        try:
            rows = sparse_rows_of(
                largest,
                self.architecture.vocab_size,
                top_p=options.top_p,
                filter=options.filter,
                temperatures=self.recipe.capture_temperatures,
            )
        except NotFiniteError as error:
            dtype = self.model.config.params_dtype
            raise not_finite(self.source, dtype, conversations, batch, error.row) from error
        return rows.split(batch.lengths)

    @torch.inference_mode()
    def _forward(self, batch: ReadingBatch) -> TopK | None:
        """This rank's part of the forward pass over a batch. The leader gets the largest logits of the
        supervised positions [n, k], the others None.
        """
        refuse_ids_beyond(self.architecture.vocab_size, batch.largest_id, f"sources.{self.source}")
        given, neighbours = model_input(batch, self.model.config, self.ranks.device), self.neighbours
        if not neighbours.is_first:
            shape = (given.own_length, len(given.tokens), self.architecture.hidden_size)
            hidden_states = neighbours.receive(shape)
            self.model.set_input_tensor(hidden_states)
        output = self.model(
            given.tokens,
            given.position_ids,
            None,  # attention is causal without a mask
            labels=ReadPositions(given.supervised) if neighbours.is_last else None,
            packed_seq_params=given.packed,
        )
        if neighbours.is_last:
            return self._largest(output, batch.labels.to(self.ranks.device))
        neighbours.send(output)
        return None

    def _largest(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> TopK | None:
        """The TopK of rows of hidden states [n, h] over the whole vocabulary, on the leader; else None."""
        group, vocab_size = parallel_state.get_tensor_model_parallel_group(), self.architecture.vocab_size
        columns = self.architecture.padded_vocab_size // group.size()
        chunk = max((_CPU_CHUNK if hidden_states.device.type == "cpu" else _GPU_CHUNK) // columns, 1)
        parts = [
            gather_topk_logsumexp(
                self.model.logits_of(rows),
                min(self.recipe.capture.top_k, vocab_size),
                (1.0, *self.recipe.capture_temperatures),
                labels=labels_of_rows,
                softcap=self.architecture.logit_softcap,
                vocab_size=vocab_size,
                vocab_start=group.rank() * columns,
                group=group,
            )
            for rows, labels_of_rows in zip(hidden_states.split(chunk), labels.split(chunk), strict=True)
        ]
        if not self.ranks.is_leader:
            return None
        return TopK(*(torch.cat(values) for values in zip(*parts, strict=True)))


def build_source(
    architecture: Architecture,
    dtype: str,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    transformer_impl: str = "auto",
) -> FusionGPTModel:
    """This rank's part of a source in evaluation mode, in one precision, with unset parameters."""
    config = transformer_config(
        architecture,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        params_dtype=DTYPES[dtype],
        transformer_impl=transformer_impl,
    )
    # Megatron makes the norms in fp32.
    return build_model(architecture, config).eval().requires_grad_(False).to(DTYPES[dtype])
