"""The target as Megatron-core's GPTModel, with the fusion loss computed inside it.

Legend: s sequence, b batch, v padded vocabulary, p tensor-parallel size, k stored teacher entries per token,
n = s b tokens.
"""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, fields
from functools import partial

import torch
from fuse_kernels import TokenLosses, fused_linear_sparse_kl, sparse_kl_cross_entropy
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from megatron_fuse.model.architecture import Architecture, check_layout
from megatron_fuse.model.attention import PackedDocuments
from megatron_fuse.model.layers import layer_spec
from megatron_fuse.model.weight_blocks import is_of_expert


@dataclass(frozen=True)
class FusionLossOptions:
    """Options of the loss of one token, by the names of fuse_kernels.sparse_kl_cross_entropy.

    temperature: the student's.
    The factor T^2, like phases, modes and lambdas, is part of the weights in FusionTargets.
    """

    temperature: float = 1.0
    tail: str = "bucket"  # bucket | renormalize | ignore
    implementation: str = "auto"  # auto | triton | torch | reference
    fused_linear: bool = False  # compute the output layer and the loss together, a chunk of tokens at a time


@dataclass(frozen=True)
class FusionTargets:
    """Labels, teacher entries and weights of each position, passed to GPTModel as `labels`. Row t is about
    token t + 1."""

    labels: Tensor  # [b, s] int64, -100 = none
    teacher_ids: Tensor  # [b, s, k] int64, -1 = empty slot
    teacher_logprobs: Tensor  # [b, s, k] fp32, natural log at the KL temperature
    ce_weight: Tensor  # [b, s] fp32
    kl_weight: Tensor  # [b, s] fp32

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "FusionTargets":
        """The same targets on another device."""
        return FusionTargets(
            *(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self))
        )


@dataclass(frozen=True)
class ReadPositions:
    """The positions whose next token a source predicts, passed to GPTModel as `labels`."""

    flat: Tensor  # [n] int64, counted over the flattened tokens [b, s]


class FusionGPTModel(GPTModel):
    """This rank's part of the target, or of a source.

    With FusionTargets as `labels` the last stage returns losses, never logits. With ReadPositions it returns
    the hidden states [n, h] there, of which `logits_of` makes logits, some rows at a time.

    Returned logits would be copied twice: GPTModel transposes them, Float16Module casts them to fp32. Without
    labels the result is that of GPTModel: logits [b, s, v/p], padded columns included.

    Attention is causal without a mask (`attention_mask=None`). With PackedDocuments it stays within each
    document, and rotary positions start anew at each document; position_ids [1, s] must do so too.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        *,
        seq_length: int,
        loss_options: FusionLossOptions,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config,
            layer_spec(architecture, config, vp_stage),
            vocab_size=architecture.padded_vocab_size,
            max_sequence_length=seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        self.architecture = architecture
        self.loss_options = loss_options
        device = self.rotary_pos_emb.inv_freq.device
        self.rotary_pos_emb.inv_freq = torch.tensor(architecture.inverse_frequencies, device=device)
        self.local_rotary_pos_emb = None
        if (frequencies := architecture.local_inverse_frequencies) is not None:
            self.local_rotary_pos_emb = copy(self.rotary_pos_emb)
            self.local_rotary_pos_emb.inv_freq = torch.tensor(frequencies, device=device)
        if (scale := architecture.embedding_scale) is not None:  # rounded as transformers rounds it
            scale = torch.tensor(scale, device="cpu").to(config.params_dtype).item()
        self.embedding_scale = scale
        # Some layers of Megatron are not created on the GPU:
        # torch's RMSNorm is created on torch's default device.
        for module in self.modules():
            if any(parameter.device.type == "cpu" for parameter in module.parameters(recurse=False)):
                module.to(torch.cuda.current_device())
        _mark_tensor_parallel_weights(self)
        _mark_weights_of_experts(self)
        _release_routing_after_use(self)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *rest: object,
        packed_seq_params: PackedDocuments | None = None,
        **named: object,
    ) -> Tensor:
        # The local layers rotate by position (_preprocess).
        # Transformer Engine takes the documents' bounds as they are.
        if packed_seq_params is not None and self.config.transformer_impl == "local":
            packed_seq_params = packed_seq_params.with_rotations_by_position()
        return super().forward(input_ids, position_ids, *rest, packed_seq_params=packed_seq_params, **named)

    def _preprocess(
        self, *rest: object, position_ids: Tensor, packed_seq_params: PackedDocuments | None = None, **named
    ):
        """GPTModel's _preprocess, with the embedding scaled, and with one rotation per position of the
        sequence, [s, 1, 1, d], if rotations go by position.

        If layers with a window have rotations of their own, both kinds come together, [s, 1, 2, d].

        Megatron's own table of rotations reaches up to the longest document. Megatron applies it document by
        document, which waits for the GPU.
        """
        named |= {"position_ids": position_ids, "packed_seq_params": packed_seq_params}
        hidden_states, rotations, *others = super()._preprocess(*rest, **named)
        if self.pre_process and self.embedding_scale is not None:
            hidden_states = hidden_states * self.embedding_scale
        if self.local_rotary_pos_emb is not None:
            rotations = torch.cat([rotations, self.local_rotary_pos_emb(len(rotations))], dim=2)
        if packed_seq_params is not None and packed_seq_params.rotates_by_position:
            rotations = rotations[position_ids[0]]
        return (hidden_states, rotations, *others)

    def _postprocess(
        self,
        hidden_states: Tensor,
        labels: FusionTargets | ReadPositions | None = None,
        **rest: object,
    ) -> Tensor:
        """From hidden states [s, b, h] (sequence-parallel: [s/p, b, h]) to logits, losses, or the hidden
        states of some positions.

        Without `fused_linear` this is GPTModel's _postprocess. With it the losses come from here, without a
        call of the output layer. So this must do what the output layer does besides its product: take the
        tied weight, wait for a weight that other ranks update, gather a split sequence, and sum the hidden
        states' gradient over the tensor-parallel group.
        """
        if isinstance(labels, ReadPositions):
            if self.config.sequence_parallel:
                hidden_states = gather_from_sequence_parallel_region(
                    hidden_states, group=self.pg_collection.tp
                )
            sequence, batch = hidden_states.shape[:2]
            # Position t of text i lies at i s + t among the tokens [b, s], and at t b + i here.
            rows = labels.flat % sequence * batch + labels.flat // sequence
            return hidden_states.flatten(0, 1)[rows]
        if labels is None or not (self.post_process and self.loss_options.fused_linear):
            output = super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
            softcap = self.architecture.logit_softcap
            # The loss caps the logits by itself.
            if labels is None and self.post_process and softcap is not None:
                output = softcap * (output / softcap).tanh()
            return output
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # The gradient that arrives here is already summed over the group by the loss. So the backward
            # pass of the gather only takes this rank's part of it.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group
            )
        _run_pre_hooks(self.output_layer)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        # unit_upstream: the upstream gradient of every loss is 1 (training/loss.py).
        loss = partial(fused_linear_sparse_kl, hidden_states.flatten(0, 1), weight, unit_upstream=True)
        sequence, batch = hidden_states.shape[:2]
        return self._losses(loss, labels, sequence, batch, columns=len(weight))

    def logits_of(self, hidden_states: Tensor) -> Tensor:
        """Logits [n, v/p] of this rank's columns from hidden states [n, h] of the last stage. No gradient.

        They are not capped: like the loss, the function that takes them does that (logit_softcap).
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        # The output layer would gather the rows of a sequence that the ranks share. These are whole.
        return linear(hidden_states, weight)

    def compute_language_model_loss(self, labels: FusionTargets, logits: Tensor) -> Tensor:
        """The fusion loss of every position. GPTModel calls it instead of its cross entropy.

        logits [s, b, v/p], as the output layer returns them; the gradient is written over them. Returns [6,
        b, s] fp32, in the order of `fuse_kernels.TokenLosses`: only the first, the loss, is differentiable.
        Collectives: those of the kernels over the tensor-parallel group, no other.
        """
        loss = partial(sparse_kl_cross_entropy, logits.flatten(0, 1))
        sequence, batch, columns = logits.shape
        return self._losses(loss, labels, sequence, batch, columns)

    def _losses(
        self,
        loss: Callable[..., TokenLosses],
        targets: FusionTargets,
        sequence: int,
        batch: int,
        columns: int,
    ) -> Tensor:
        """[6, b, s] from a loss function that already has the student's rows [s b], in the order of [s, b].

        columns: number of logits columns of this rank. Raises TypeError if the targets are no FusionTargets.
        """
        if not isinstance(targets, FusionTargets):
            raise TypeError(f"labels must be FusionTargets, not {type(targets).__name__}")
        group = self.pg_collection.tp

        # Megatron keeps the sequence first, [s, b]:
        # the targets [b, s] follow it, as they are smaller than the logits.
        def rows(target: Tensor) -> Tensor:  # [b, s, ...] -> [s b, ...]
            return target.transpose(0, 1).reshape(sequence * batch, *target.shape[2:])

        losses = loss(
            rows(targets.labels),
            rows(targets.teacher_ids),
            rows(targets.teacher_logprobs),
            ce_weight=rows(targets.ce_weight),
            kl_weight=rows(targets.kl_weight),
            temperature=self.loss_options.temperature,
            tail=self.loss_options.tail,
            softcap=self.architecture.logit_softcap,
            vocab_size=self.architecture.vocab_size,
            vocab_start=group.rank() * columns,
            group=group,
            implementation=self.loss_options.implementation,
        )
        return torch.stack([values.view(sequence, batch).t() for values in losses])


def build_model(
    architecture: Architecture,
    config: TransformerConfig,
    *,
    seq_length: int | None = None,
    loss_options: FusionLossOptions | None = None,
    vp_stage: int | None = None,
    pre_process: bool | None = None,
    post_process: bool | None = None,
) -> FusionGPTModel:
    """One model chunk of this rank. Its parameters are unset unless config.perform_initialization is set.

    seq_length: tokens of a sequence; None: as many as the architecture takes.
    vp_stage: the number of the chunk under virtual pipeline parallelism.
    pre_process, post_process: whether the chunk holds the embedding and the output layer. None: as Megatron's
        process groups say, which must then exist.

    Parameters are on the GPU, if there is one. Linear and embedding weights have config.params_dtype, norms
    fp32 until Float16Module casts them. Raises UserError if the architecture does not take so many tokens.
    """
    check_layout(architecture, seq_length=seq_length)
    place = {"ignore_virtual": False, "vp_stage": vp_stage}
    if pre_process is None:
        pre_process = parallel_state.is_pipeline_first_stage(**place)
    if post_process is None:
        post_process = parallel_state.is_pipeline_last_stage(**place)
    return FusionGPTModel(
        architecture,
        config,
        seq_length=seq_length or architecture.max_position_embeddings,
        loss_options=loss_options or FusionLossOptions(),
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )


def build_model_chunks(
    architecture: Architecture,
    config: TransformerConfig,
    *,
    seq_length: int | None = None,
    loss_options: FusionLossOptions | None = None,
) -> list[FusionGPTModel]:
    """All model chunks of this rank, in order: one, or several under virtual pipeline parallelism."""
    virtual = config.virtual_pipeline_model_parallel_size
    stages: Iterable[int | None] = [None] if virtual is None else range(virtual)
    build = partial(build_model, architecture, config, seq_length=seq_length, loss_options=loss_options)
    return [build(vp_stage=stage) for stage in stages]


def _run_pre_hooks(module: torch.nn.Module) -> None:
    """Runs the pre-hooks of a module whose weight is read without a call of the module.

    In a pre-hook DistributedDataParallel with overlap_param_gather waits until the other ranks' shares of the
    weight are here.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def _release_routing_after_use(model: GPTModel) -> None:
    """Makes each layer of experts forget the probabilities of its router after the forward pass.

    Megatron keeps them, and with them their graph, until the next forward pass. That graph reaches the
    gradient hooks of DistributedDataParallel, and these reach the model. Python does not see such a cycle, so
    that model, gradients and process groups would never be freed.
    """

    def forget(layer: MoELayer, *_: object) -> None:
        layer.token_dispatcher.probs = None

    for module in model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_hook(forget)


def _mark_weights_of_experts(model: GPTModel) -> None:
    """Marks the weights of experts as such also if every rank has all experts. Megatron does so only with
    expert parallelism.

    Then experts always have gradient buffers and an optimizer of their own, so that a checkpoint loads at any
    number of ranks that share them.
    """
    for name, parameter in model.named_parameters():
        if is_of_expert(name):
            parameter.allreduce = False


def _mark_tensor_parallel_weights(model: GPTModel) -> None:
    """Marks sharded weights as sharded. Megatron's own layers do so only while they initialise their weights.

    Megatron takes unmarked weights for copies of one another:
    the gradient norm would count only the shard of rank 0.
    """
    dimensions = {
        tensor_parallel_layers.VocabParallelEmbedding: 0,
        tensor_parallel_layers.ColumnParallelLinear: 0,
        tensor_parallel_layers.RowParallelLinear: 1,
    }
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        dimension = next((dimensions[kind] for kind in type(module).mro() if kind in dimensions), None)
        if dimension is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            # A shard of linear_fc1 has two pieces: one of the gate, one of the up projection.
            stride = 2 if name.endswith("linear_fc1") else 1
            tensor_parallel_layers.set_tensor_model_parallel_attributes(weight, True, dimension, stride)
