"""Every option of a recipe, for every stage, with its type, default and meaning.

A key has Megatron-LM's name if Megatron-LM has the option. An unknown key is an error. Paths are relative to
the directory in which the command runs. `--help` prints `Field(description=...)`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_fuse.recipe.models import (
    REFERENCE,
    TARGET,
    AnsweringOptions,
    RewardModelOptions,
    SourceOptions,
    TargetOptions,
)
from megatron_fuse.recipe.modes import Mode
from megatron_fuse.recipe.presets import PRESETS, Phase
from megatron_fuse.recipe.values import (
    BatchTokens,
    Count,
    Decay,
    GradientNorm,
    Layers,
    LearningRate,
    LeastLearningRate,
    Line,
    Location,
    ModelPlace,
    Name,
    Options,
    Positive,
    Precision,
    Rank,
    Ranks,
    SamplingTemperature,
    Seed,
    Share,
    Temperature,
    Tokens,
    Weight,
)

# The sequences of a step are padded to a multiple of this number of positions. That gives few different
# lengths, and fills whole vector lanes.
SEQUENCE_MULTIPLE = 8


class DataOptions(Options):
    path: Location = Field(
        description="file of the instructions: JSONL, a JSON array, Parquet, or a directory that `datasets` "
        "saved"
    )
    format: Literal["auto", "alpaca", "sharegpt", "messages", "orca"] = Field(
        "auto", description="form of the rows of the file"
    )
    samples: Positive | None = Field(
        None, description="use a seeded random sample of this many examples; default: all"
    )
    validation_samples: Count = Field(
        0, description="number of examples kept out of training, on which CE and KL are evaluated"
    )
    too_long: Literal["truncate", "drop"] = Field(
        "truncate",
        description="what happens to a response that is longer than --seq-length in any of the models",
    )
    supervise: Literal["every_turn", "last_turn"] = Field(
        "every_turn", description="assistant turns of a ground-truth conversation that are learned"
    )
    normalize: Literal["none", "nfc"] = Field(
        "none", description="nfc: bring every text to Unicode's composed form, as most current tokenizers do"
    )
    strip: bool = Field(False, description="remove white space around the responses of the ground truth")
    reasoning: Literal["template", "drop", "supervise"] = Field(
        "template",
        description="thoughts in messages and answers; template: they are context, if the model's own "
        "template prints them; drop: they are removed; supervise: they are learned, as the beginning of the "
        "response",
    )
    shard_size: Positive = Field(
        512,
        description="examples per shard, the unit of parallel and resumed work. With fewer shards than "
        "processes, some processes have no work. The data do not depend on the number of processes",
    )


class ResponseOptions(Options):
    temperature: SamplingTemperature = Field(
        1.0, description="sampling temperature; 0: always the likeliest token (the paper gives no value)"
    )
    top_p: Share = Field(
        1.0,
        description="nucleus sampling: share of the probability that is sampled from (the paper gives no "
        "value)",
    )
    max_new_tokens: Tokens = Field(
        512, description="most tokens of an answer, counted in the model's own tokenizer"
    )
    batch_tokens: BatchTokens = Field(
        32768, description="positions that are generated together: prompts, longest answers and padding"
    )


class ScoringOptions(Options):
    batch_tokens: BatchTokens = Field(16384, description="tokens per forward pass, with padding")
    share_prompts: bool = Field(
        True, description="read a prompt that several answers share only once, if the model can do that"
    )


class ReferenceOptions(Options):
    """Reference score of an answer: a weighted mean of three measures in [0, 1], against the ground truth."""

    bleu: Weight = 0.25
    rouge_l: Weight = 0.25
    bertscore: Weight = 0.5
    bertscore_model: ModelPlace | None = Field(None, description="directory of the encoder for BERTScore")
    bertscore_layer: Layers | None = Field(
        None, description="layer of the encoder whose states are compared; default: the last"
    )
    without_bertscore: Literal["refuse", "renormalize"] = Field(
        "refuse",
        description="if there is no bertscore_model: refuse: raise an error; renormalize: scale the "
        "other two weights to a sum of 1",
    )

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if self.bleu + self.rouge_l + (self.bertscore if self.bertscore_model else 0) == 0:
            raise ValueError(
                "all weights are 0, or only bertscore has a weight and there is no bertscore_model. Set "
                "another weight, or name a bertscore_model."
            )
        return self


class CaptureOptions(Options):
    top_k: Annotated[int, Field(ge=1, le=128)] = Field(
        10, description="most entries that are stored per token"
    )
    top_p: Share = Field(
        0.95,
        description="entries are stored, the likeliest first, until they hold this share of the probability",
    )
    filter: Literal["full_vocabulary", "hugging_face"] = Field(
        "full_vocabulary",
        description="full_vocabulary: top-p over the probabilities of the whole vocabulary at temperature 1; "
        "hugging_face: the order of sampling in Hugging Face: temperature, then top-k, then top-p over the "
        "rest",
    )
    temperatures: list[Temperature] | None = Field(
        None,
        max_length=16,
        description="temperatures whose log-sum-exp is stored; the first is also the temperature of filter "
        "hugging_face; default: loss.teacher_temperature",
    )
    batch_tokens: BatchTokens = Field(8192, description="tokens per forward pass, with padding")


class AlignmentOptions(Options):
    vocabulary_map: Literal["exact", "em", "mined", "ms"] = Field(
        "exact",
        description="how a source token becomes a target token; exact: equal bytes, else the first piece of "
        "the target's own tokenization; em: equal strings only; mined: equal bytes, else the least edit "
        "distance (FuseLLM); ms: the token that is most often at aligned positions (FuseChat)",
    )
    unmatched: Literal["skip", "condition", "onehot"] = Field(
        "skip",
        description="target position whose first byte lies inside a source token; skip: cross-entropy only; "
        "condition: those entries of the source that continue the bytes read; onehot: all mass on the label "
        "(FuseLLM)",
    )


class Margin(Options):
    """The weight of examples whose winner has only a small margin."""

    at_least: Annotated[float, Field(ge=0, le=1e12)] = Field(
        description="smallest margin with which an example counts fully"
    )
    weight: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="weight of the examples with a smaller margin; 0 drops them"
    )


class SelectionOptions(Options):
    training: Literal["sum", "per_byte", "per_token", "average", "winner", "by_category", "random"] = Field(
        "sum",
        description="which source teaches the ground truth; sum: the one with the least cross-entropy over "
        "the "
        "response (MinCE); per_byte, per_token: the same per unit, per_token as FuseLLM, which favours small "
        "pieces; average: all sources, mixed by their cross-entropies (AvgCE); winner: the source whose own "
        "answer wins; by_category: the source with the best mean score in the example's category; random: a "
        "control",
    )
    inference: Literal["vote", "reference", "by_category", "random"] = Field(
        "vote",
        description="how the winning answer is chosen; vote: by the votes of the reward models; reference: "
        "by the score against the ground truth; by_category: the answer of the source with the best mean "
        "score "
        "in the example's category; random: a control",
    )
    sources: list[Name] | None = Field(
        None,
        min_length=1,
        description="sources that can win; default: all. All sources are captured in any case",
    )
    reward_models: list[Name] | None = Field(
        None,
        description="reward models that vote; if there is only one, its score decides; default: all of "
        "reward_models",
    )
    training_margin: Margin | None = Field(
        None,
        description="smallest difference between the best and the second best source, in nats per byte of "
        "the "
        "response; winner: in the unit of inference_margin; by_category: in standard deviations of the "
        "scores",
    )
    inference_margin: Margin | None = Field(
        None,
        description="smallest difference between the winner's answer and the next, in votes (one reward "
        "model "
        "or reference: in scores; by_category: in standard deviations of the scores)",
    )
    strongest: Name | None = Field(
        None,
        description="reward model whose score decides between answers with equal votes; default: the first "
        "that votes",
    )


class LossOptions(Options):
    teacher_temperature: Temperature = Field(2.0, description="temperature of the sources' distributions")
    student_temperature: Temperature = Field(
        1.0, description="temperature of the target's distributions in the KL"
    )
    temperature_squared: bool = Field(
        False, description="multiply the KL by student_temperature^2 (Hinton et al. 2015)"
    )
    tail: Literal["bucket", "renormalize", "ignore"] = Field(
        "bucket", description="how the KL treats the teacher's mass outside the stored entries"
    )
    implementation: Literal["auto", "triton", "torch", "reference"] = "auto"
    fused_linear: bool = Field(
        False,
        description="compute output layer and loss together, for 256 MB of logits at a time, so that the "
        "whole logits are never in memory. The gradients of both are computed in the forward pass",
    )


class ScheduleOptions(Options):
    preset: Literal[tuple(PRESETS)] | None = Field(None, description="name of a list of phases")  # type: ignore[valid-type]
    phases: list[Phase] | None = Field(None, description="list of phases, instead of a preset")
    order: Literal["shuffled", "gt_length", "target_reward"] = Field(
        "shuffled",
        description="order of the examples in every epoch; shuffled; gt_length: the shortest ground truth "
        "first; target_reward: the best reward of the target's own answer first",
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.preset is None) == (self.phases is None):
            raise ValueError("schedule needs exactly one of preset and phases. Set one of the two.")
        if self.phases == []:
            raise ValueError("phases is empty. Write at least one phase.")
        return self

    def resolve(self) -> list[Phase]:
        return PRESETS[self.preset] if self.preset else list(self.phases or [])


class ParallelOptions(Options):
    tensor_model_parallel_size: Ranks = 1
    pipeline_model_parallel_size: Ranks = 1
    virtual_pipeline_model_parallel_size: Ranks | None = None
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = Field(
        False,
        description="gather the weights that the distributed optimizer has updated during the next forward "
        "pass. Needs use_distributed_optimizer and overlap_grad_reduce",
    )
    sequence_parallel: bool = Field(
        False,
        description="divide norms and residuals over the tensor-parallel ranks, along the sequence. Needs "
        "Transformer Engine",
    )
    context_parallel_size: Ranks = Field(
        1, description="only 1 is supported: sequences are not divided over ranks"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"

    @model_validator(mode="after")
    def _has_stages_to_interleave(self) -> Self:
        virtual = self.virtual_pipeline_model_parallel_size or 1
        if virtual > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"virtual_pipeline_model_parallel_size {virtual} needs pipeline_model_parallel_size of at "
                "least 2, not 1"
            )
        return self

    @model_validator(mode="after")
    def _has_weights_to_gather(self) -> Self:
        missing = [
            name for name in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(self, name)
        ]
        if self.overlap_param_gather and missing:
            raise ValueError(
                f"overlap_param_gather needs {' and '.join(missing)}. Set "
                f"{'it' if len(missing) == 1 else 'them'} to true too, or set overlap_param_gather to false."
            )
        return self

    @model_validator(mode="after")
    def _splits_sequences_evenly(self) -> Self:
        size = self.tensor_model_parallel_size
        if self.sequence_parallel and (size == 1 or SEQUENCE_MULTIPLE % size):
            raise ValueError(
                f"sequence_parallel divides sequences, whose length is a multiple of {SEQUENCE_MULTIPLE}, "
                f"over the tensor-parallel ranks, but tensor_model_parallel_size is {size}. Set "
                "tensor_model_parallel_size to 2, 4 or 8."
            )
        return self

    @model_validator(mode="after")
    def _keeps_sequences_whole(self) -> Self:
        if self.context_parallel_size != 1:
            raise ValueError(
                f"context_parallel_size is {self.context_parallel_size}, but sequences cannot be divided "
                "over ranks, because their targets and teacher rows are not divided. Set it to 1. To save "
                "memory, set a larger tensor_model_parallel_size, or training.recompute."
            )
        return self


class TrainingOptions(Options):
    seed: Seed | None = Field(
        None,
        description="seed of the order of the examples in every epoch, the only random choice of a training; "
        "default: the recipe's seed, which alone decides the random choices of the other stages",
    )
    seq_length: Tokens = Field(2048, description="most target tokens of one conversation, in all stages")
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        1, description="most sequences per forward pass on one data-parallel rank"
    )
    global_batch_size: Annotated[int, Field(ge=1, le=100_000_000)] = Field(
        128, description="examples per step, over all ranks"
    )
    packing: bool = Field(
        False,
        description="put several examples into one sequence of up to seq_length tokens; none of them sees "
        "another. A step learns the same from the same examples, without the padding",
    )
    lr: LearningRate = Field(1.5e-5, description="highest learning rate")
    min_lr: LeastLearningRate = Field(0.0, description="learning rate at the end of the decay")
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = Field(
        "cosine",
        description="how the learning rate goes from lr to min_lr after the warm-up; constant: it stays at "
        "lr; WSD (warm-up, stable, decay): it goes down in the last lr_wsd_decay_iters steps",
    )
    lr_decay_iters: Positive | None = Field(
        None,
        description="step at which the learning rate reaches min_lr, counted from the start of the warm-up; "
        "default: the last step of the schedule",
    )
    lr_warmup_iters: Count = Field(0, description="steps in which the learning rate rises from 0 to lr")
    lr_warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="length of the warm-up as a share of lr_decay_iters; default: lr_warmup_iters is used",
    )
    lr_wsd_decay_iters: Positive | None = Field(
        None, description="steps of the decay of WSD, at the end of lr_decay_iters"
    )
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] | None = Field(
        None, description="how the learning rate goes down in the decay of WSD; default: exponential"
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.0, description="weight decay of AdamW")
    adam_beta1: Decay = Field(0.9, description="decay of AdamW's mean of the gradient")
    adam_beta2: Decay = Field(0.999, description="decay of AdamW's mean of the squared gradient")
    adam_eps: Annotated[float, Field(ge=1e-20, le=1)] = Field(
        1e-8, description="number that AdamW adds to the root of the mean of the squared gradient"
    )
    clip_grad: GradientNorm = Field(1.0, description="largest norm of the gradient; 0 switches clipping off")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16",
        description="precision of parameters and activations; bf16 keeps fp32 copies of the weights in the "
        "optimizer",
    )
    deterministic: bool = Field(
        False,
        description="use only algorithms that give the same result every time. They are slower on a GPU; "
        "without them, losses differ in the last digits between runs",
    )
    recompute: bool = Field(
        False, description="compute the activations of each layer again in the backward pass, to save memory"
    )
    train_iters: Positive | None = Field(
        None, description="stop after this step; the schedule stays that of the whole run"
    )
    save: Location | None = Field(
        None, description="checkpoint directory; default: WORKDIR/training/checkpoints"
    )
    load: Location | None = Field(
        None, description="checkpoint directory from which the run continues; default: the save directory"
    )
    save_interval: Positive | None = Field(
        None, description="steps between checkpoints; default: a checkpoint only at the end of a phase"
    )
    save_retain_last: Positive | None = Field(
        None, description="number of newest checkpoints to keep; the best one is also kept; default: all"
    )
    save_retain_interval: Positive | None = Field(
        None,
        description="keep the checkpoints at multiples of this number of steps, the last one and the "
        "best one; default: all",
    )
    async_save: bool = Field(False, description="continue training while a checkpoint is written")
    override: bool = Field(
        False,
        description="continue from a checkpoint of a run with other data or options; prints a warning "
        "for each difference",
    )
    verify: bool = Field(
        True,
        description="compare checkpoints, exports and fusion data with their checksums; without it, only "
        "presence and sizes are compared",
    )
    exit_signal_handler: bool = Field(
        True, description="at SIGTERM, SIGUSR1 or Ctrl-C: finish the step, save and exit"
    )
    exit_interval: Positive | None = Field(
        None, description="save and exit after the next step that is a multiple of this number"
    )
    exit_duration_in_mins: Annotated[float, Field(ge=1e-9, le=1e8)] | None = Field(
        None, description="save and exit when the process has run for this number of minutes"
    )
    log_interval: Positive = 1
    timing_log_level: Annotated[int, Field(ge=0, le=2)] = Field(
        0,
        description="0: time whole iterations; 1: also time what happens about once per iteration; 2: also "
        "time what happens once per micro-batch. Above 0 every timer waits for the GPU, and with level 1 "
        "timers the ranks wait for each other, so iterations can take longer",
    )
    profile: bool = Field(
        False,
        description="record some iterations with torch's profiler; writes one trace per rank to profile/ "
        "beside metrics.jsonl",
    )
    profile_step_start: Positive = Field(10, description="first iteration that --profile records")
    profile_step_end: Positive = Field(12, description="first iteration after the recorded ones")
    profile_ranks: list[Rank] = Field([0], min_length=1, description="ranks that --profile records")
    eval_interval: Positive | None = Field(
        None, description="steps between evaluations; default: an evaluation only at the end of a phase"
    )
    tensorboard_dir: Location | None = Field(
        None, description="directory of the TensorBoard logs; default: WORKDIR/training/tensorboard"
    )
    wandb_project: Line | None = Field(
        None, description="log to this Weights & Biases project; default: none"
    )
    wandb_exp_name: Line | None = Field(
        None, description="name of the run in Weights & Biases; default: the name of WORKDIR"
    )
    max_skipped_iterations: Positive = Field(
        10, description="stop after this number of steps in a row in which gradient or loss is not finite"
    )
    check_for_spiky_loss: bool = Field(True, description="warn if the loss is far above its running median")
    check_weight_hash_across_dp_replicas_interval: Positive | None = Field(
        None,
        description="steps between comparisons of the weights on all data-parallel ranks; default: never",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_the_decay_of_wsd(cls, value: Any) -> Any:
        """Writes out Megatron-LM's default, so that the resolved recipe shows it."""
        if (
            isinstance(value, dict)
            and value.get("lr_decay_style") == "WSD"
            and not value.get("lr_wsd_decay_style")
        ):
            return value | {"lr_wsd_decay_style": "exponential"}
        return value

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        iters, fraction, decay = self.lr_warmup_iters, self.lr_warmup_fraction, self.lr_decay_iters
        if iters and fraction is not None:
            raise ValueError(
                f"lr_warmup_iters is {iters} and lr_warmup_fraction is {fraction}, but only one of them can "
                "set the length of the warm-up. Set lr_warmup_iters to 0, or remove lr_warmup_fraction."
            )
        if decay is not None and decay <= iters:
            raise ValueError(
                f"lr_decay_iters ({decay}) includes the warm-up, so it must be above lr_warmup_iters "
                f"({iters}). Raise lr_decay_iters, or lower lr_warmup_iters."
            )
        return self

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr ({self.min_lr}) is above lr ({self.lr}), but the learning rate falls from lr to "
                "min_lr. Lower min_lr, or raise lr."
            )
        return self

    @model_validator(mode="after")
    def _decays_by_one_style(self) -> Self:
        style, decay = self.lr_decay_style, self.lr_decay_iters
        if style == "WSD":
            if self.lr_wsd_decay_iters is None:
                raise ValueError(
                    "lr_decay_style WSD needs lr_wsd_decay_iters, the steps of its decay. Set "
                    "lr_wsd_decay_iters, or choose another lr_decay_style."
                )
            if decay is not None:
                self.require_room_for_wsd(decay)
        else:
            of_wsd = {
                "lr_wsd_decay_iters": self.lr_wsd_decay_iters,
                "lr_wsd_decay_style": self.lr_wsd_decay_style,
            }
            for key, value in of_wsd.items():
                if value is not None:
                    raise ValueError(
                        f"{key} is {value}, but lr_decay_style is {style}. Remove {key}, or set "
                        "lr_decay_style to WSD."
                    )
        if style == "constant" and self.min_lr:
            raise ValueError(
                f"min_lr is {self.min_lr}, but with lr_decay_style constant the learning rate stays at lr. "
                "Set min_lr to 0, or choose another lr_decay_style."
            )
        if style == "constant" and decay is not None:
            raise ValueError(
                f"lr_decay_iters is {decay}, but with lr_decay_style constant the learning rate stays at lr. "
                "Remove lr_decay_iters, or choose another lr_decay_style."
            )
        return self

    def warmup_steps(self, decay_iters: int) -> float:
        """Number of warm-up steps, not always an integer. decay_iters: lr_decay_iters, or its default."""
        return (
            self.lr_warmup_iters if self.lr_warmup_fraction is None else self.lr_warmup_fraction * decay_iters
        )

    def require_room_for_wsd(self, decay_iters: int) -> None:
        """Raises ValueError if the warm-up and the decay of WSD together take more than decay_iters steps."""
        warmup, wsd = self.warmup_steps(decay_iters), self.lr_wsd_decay_iters or 0
        if warmup + wsd > decay_iters:
            of_warmup = "lr_warmup_iters" if self.lr_warmup_fraction is None else "lr_warmup_fraction"
            raise ValueError(
                f"lr_wsd_decay_iters ({wsd}) and the {warmup:g} steps of {of_warmup} are together more than "
                f"lr_decay_iters ({decay_iters}). Lower one of the two, or raise lr_decay_iters."
            )

    @model_validator(mode="after")
    def _packs_one_by_one(self) -> Self:
        if self.packing and self.micro_batch_size != 1:
            raise ValueError(
                f"packing needs micro_batch_size 1, not {self.micro_batch_size}, because a packed sequence "
                "already holds several examples. Set micro_batch_size to 1, or packing to false."
            )
        return self

    @model_validator(mode="after")
    def _profiles_an_iteration(self) -> Self:
        start, end = self.profile_step_start, self.profile_step_end
        if self.profile and end <= start:
            raise ValueError(
                f"profile_step_end is {end}, but the profile ends before this iteration. Set it above "
                f"profile_step_start ({start})."
            )
        return self


class ExportOptions(Options):
    path: Location | None = Field(
        None, description="directory of the fused model in Hugging Face form; default: WORKDIR/export"
    )
    dtype: Precision = "bf16"
    checkpoint: Literal["best", "latest"] = Field(
        "best",
        description="best: the checkpoint with the lowest validation cross-entropy; latest: the last one",
    )


class Recipe(Options):
    """One fusion run: models, data, and how distributions are captured, aligned, selected and learned."""

    workdir: Location = Field(description="directory of all artifacts")
    seed: Seed = Field(1234, description="seed of all random choices: samples, answers, order, ties")
    target: TargetOptions
    sources: dict[Name, SourceOptions] = Field(min_length=1)
    reward_models: dict[Name, RewardModelOptions] = Field(default_factory=dict)
    data: DataOptions
    responses: ResponseOptions = ResponseOptions()
    scoring: ScoringOptions = ScoringOptions()
    reference: ReferenceOptions = ReferenceOptions()
    capture: CaptureOptions = CaptureOptions()
    alignment: AlignmentOptions = AlignmentOptions()
    selection: SelectionOptions = SelectionOptions()
    loss: LossOptions = LossOptions()
    schedule: ScheduleOptions
    parallel: ParallelOptions = ParallelOptions()
    training: TrainingOptions = TrainingOptions()
    export: ExportOptions = ExportOptions()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        captured = self.capture.temperatures
        if captured is not None and self.loss.teacher_temperature not in captured:
            raise ValueError(
                f"loss.teacher_temperature is {self.loss.teacher_temperature}, but capture.temperatures is "
                f"{captured}. Add the temperature there."
            )
        if TARGET in self.sources:
            raise ValueError(
                f"sources: {TARGET!r} is the name of the target's own answers. Give the source another name."
            )
        if REFERENCE in self.reward_models:
            raise ValueError(
                f"reward_models: {REFERENCE!r} is the name of the score against the ground truth. Give the "
                "reward model another name."
            )
        unknown = set(self.selection.sources or []) - set(self.sources)
        if unknown:
            raise ValueError(
                f"selection.sources has {sorted(unknown)}, but sources has only {sorted(self.sources)}. "
                "Remove or correct the unknown names."
            )
        unknown = set(self.selection.reward_models or []) - set(self.reward_models)
        if unknown:
            raise ValueError(
                f"selection.reward_models has {sorted(unknown)}, but reward_models has only "
                f"{sorted(self.reward_models)}. Remove or correct the unknown names."
            )
        strongest = self.selection.strongest
        if strongest is not None and strongest not in self.voting_reward_models:
            raise ValueError(
                f"selection.strongest is {strongest!r}, but the reward models that vote are "
                f"{self.voting_reward_models}. "
                "Set it to one of them."
            )
        scored = {"vote", "by_category"} & self.rules_for_answers
        if scored and len(self.candidates) > 1 and not self.voting_reward_models:
            raise ValueError(
                f"selection compares the answers of several sources ({', '.join(sorted(scored))}), but no "
                "reward "
                "model votes. Add a reward model to reward_models, set selection.inference to reference, or "
                "choose "
                "a preset without inference mode (csft, fuse) and another selection.training."
            )
        if self.schedule.order == "target_reward" and not self.voting_reward_models:
            raise ValueError(
                "schedule.order is target_reward, but no reward model votes. Add one to reward_models to "
                "score the target."
            )
        return self

    @property
    def phases(self) -> list[Phase]:
        return self.schedule.resolve()

    @property
    def training_seed(self) -> int:
        return self.seed if self.training.seed is None else self.training.seed

    @property
    def uses_inference_mode(self) -> bool:
        return any(phase.inference.is_used for phase in self.phases)

    @property
    def rules_for_answers(self) -> set[str]:
        """The rules that compare the sources' own answers, of both modes."""
        rules: list[str] = [self.selection.inference] if self.uses_inference_mode else []
        if any(phase.training.needs_teacher for phase in self.phases):
            by_answers = {"winner": self.selection.inference, "by_category": "by_category"}
            if self.selection.training in by_answers:
                rules.append(by_answers[self.selection.training])
        return set(rules)

    @property
    def uses_answers(self) -> bool:
        """Whether the sources answer: to be learned from, or to choose the source of the ground truth."""
        return bool(self.rules_for_answers)

    @property
    def modes_with_teacher(self) -> list[str]:
        """Modes whose captures training reads, in the order of Mode.

        If no phase has a lambda for the training mode (CSFT), the ground truth needs no source.
        """
        used = {Mode.INFERENCE: self.uses_inference_mode}
        used[Mode.TRAINING] = any(phase.training.needs_teacher for phase in self.phases)
        return [mode.value for mode in Mode if used[mode]]

    @property
    def candidates(self) -> list[str]:
        """The sources that selection chooses between, in the order of `sources`."""
        chosen = self.selection.sources
        return [name for name in self.sources if chosen is None or name in chosen]

    @property
    def voting_reward_models(self) -> list[str]:
        """The reward models that vote, in the order of `reward_models`."""
        chosen = self.selection.reward_models
        return [name for name in self.reward_models if chosen is None or name in chosen]

    @property
    def strongest(self) -> str | None:
        """The reward model whose score breaks ties of votes; None if no reward model votes."""
        return self.selection.strongest or next(iter(self.voting_reward_models), None)

    @property
    def target_as_source(self) -> str | None:
        """The source that is the same model as the target; its answers are then also the target's. Else None.

        None also if the recipe gives the target other answers than this source: stop, responses or server
        differ and are set.
        """
        target = self.target
        for name, source in self.sources.items():
            same = all(
                getattr(source, key) == getattr(target, key) for key in ("model", "chat_template", "system")
            )
            differing = [
                value
                for key in ("stop", "responses", "server")
                if (value := getattr(target, key)) != getattr(source, key)
            ]
            if same and not any(differing):
                return name
        return None

    @property
    def answering(self) -> dict[str, AnsweringOptions]:
        """The models that generate answers, by name.

        If a phase uses the inference mode, or answers choose the source of the ground truth, these are the
        sources. If the target's reward orders the examples, the target is added, unless it is one of the
        sources: then that source is there.
        """
        answering: dict[str, AnsweringOptions] = dict(self.sources) if self.uses_answers else {}
        if self.schedule.order == "target_reward":
            source = self.target_as_source
            answering |= {source: self.sources[source]} if source else {TARGET: self.target}
        return answering

    @property
    def scorers(self) -> dict[str, list[str]]:
        """Maps each answering model to its scorers, by the names in scores/NAME/SCORER.

        The answers of a source are scored by the reward models that vote, by `reference` if the rule is
        reference, or by both if the two modes have such rules. If the target's reward orders the examples
        (schedule.order target_reward), the strongest reward model scores the target's answers too.
        """
        scored_by = {
            "vote": self.voting_reward_models,
            "by_category": self.voting_reward_models,
            "reference": [REFERENCE],
            "random": [],
        }
        chosen_by = list(
            dict.fromkeys(scorer for rule in sorted(self.rules_for_answers) for scorer in scored_by[rule])
        )
        scorers = {name: list(chosen_by) for name in self.sources} if self.uses_answers else {}
        if self.schedule.order == "target_reward":
            of_target = scorers.setdefault(self.target_as_source or TARGET, [])
            if self.strongest is not None and self.strongest not in of_target:
                of_target.append(self.strongest)
        return scorers

    @property
    def capture_temperatures(self) -> list[float]:
        return self.capture.temperatures or [self.loss.teacher_temperature]
