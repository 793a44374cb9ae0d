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
        description="instructions: JSONL, a JSON array, Parquet, or a directory that `datasets` saved"
    )
    format: Literal["auto", "alpaca", "sharegpt", "messages", "orca"] = Field(
        "auto", description="row form of the file"
    )
    samples: Positive | None = Field(None, description="seeded random sample of so many examples; default: all")
    validation_samples: Count = Field(
        0, description="how many of these examples are kept out of training; CE and KL are evaluated on them"
    )
    too_long: Literal["truncate", "drop"] = Field(
        "truncate", description="what happens to a response that does not fit --seq-length in every model"
    )
    supervise: Literal["every_turn", "last_turn"] = Field(
        "every_turn", description="assistant turns of a ground-truth conversation that are learned from"
    )
    normalize: Literal["none", "nfc"] = Field(
        "none", description="nfc: every text in Unicode's composed form, as most tokenizers of today read it"
    )
    strip: bool = Field(False, description="leave off white space around the responses of the ground truth")
    reasoning: Literal["template", "drop", "supervise"] = Field(
        "template",
        description="thoughts of messages and answers; template: context, where the model's own template prints them; supervise: "
        "learned, as the beginning of the response",
    )
    shard_size: Positive = Field(
        512,
        description="examples per shard, the unit of parallel and resumed work: fewer shards than processes leave some of these idle. "
        "The data that are made do not depend on the number of processes",
    )


class ResponseOptions(Options):
    temperature: SamplingTemperature = Field(1.0, description="sampling temperature (paper silent); 0 is greedy")
    top_p: Share = Field(1.0, description="nucleus sampling (paper silent)")
    max_new_tokens: Tokens = Field(512, description="tokens of the source's own tokenizer")
    batch_tokens: BatchTokens = Field(
        32768, description="positions of prompts and answers to come, padding included, that are generated together"
    )


class ScoringOptions(Options):
    batch_tokens: BatchTokens = Field(16384, description="padded tokens per forward pass")
    share_prompts: bool = Field(
        True, description="read the prompt that several answers share once, where the model can"
    )


class ReferenceOptions(Options):
    """Reference score of an answer: a weighted mean of three measures in [0, 1], against the ground truth."""

    bleu: Weight = 0.25
    rouge_l: Weight = 0.25
    bertscore: Weight = 0.5
    bertscore_model: ModelPlace | None = Field(
        None, description="directory of the encoder that BERTScore compares with"
    )
    bertscore_layer: Layers | None = Field(None, description="layer whose states it compares; default: the last")
    without_bertscore: Literal["refuse", "renormalize"] = Field(
        "refuse", description="without bertscore_model: an error, or the other two weights brought to 1"
    )

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if self.bleu + self.rouge_l + (self.bertscore if self.bertscore_model else 0) == 0:
            raise ValueError("all weights are 0, or only bertscore has one and there is no bertscore_model")
        return self


class CaptureOptions(Options):
    top_k: Annotated[int, Field(ge=1, le=128)] = Field(10, description="most entries stored per token")
    top_p: Share = Field(0.95, description="entries are dropped once those before them hold this mass")
    filter: Literal["full_vocabulary", "hugging_face"] = Field(
        "full_vocabulary",
        description="top-p over the T=1 probabilities of the whole vocabulary, or in Hugging Face's sampling order: "
        "temperature, then top-k, then top-p over what is left",
    )
    temperatures: list[Temperature] | None = Field(
        None,
        max_length=16,
        description="temperatures whose log-sum-exp is stored, the first also that of filter hugging_face; default: the loss's "
        "teacher_temperature",
    )
    batch_tokens: BatchTokens = Field(8192, description="padded tokens per forward pass")


class AlignmentOptions(Options):
    vocabulary_map: Literal["exact", "em", "mined", "ms"] = Field(
        "exact",
        description="source token -> target token: equal bytes, else the first piece of the target's own tokenization; equal "
        "strings only; least edit distance (FuseLLM); the token most often met at aligned positions (FuseChat)",
    )
    unmatched: Literal["skip", "condition", "onehot"] = Field(
        "skip",
        description="target position whose byte offset lies inside a source token: cross-entropy only; the source's entries "
        "that continue the bytes read; all mass on the label (FuseLLM)",
    )


class Margin(Options):
    """The weight of examples whose winner has only a small margin."""

    at_least: Annotated[float, Field(ge=0, le=1e12)] = Field(description="margin from which an example counts in full")
    weight: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the examples below it; 0 drops them")


class SelectionOptions(Options):
    training: Literal["sum", "per_byte", "per_token", "average", "random"] = Field(
        "sum",
        description="cross-entropy compared between sources (MinCE); per_token as FuseLLM, which favours small pieces; average "
        "mixes all sources' distributions by their cross-entropies (AvgCE); random is a control",
    )
    inference: Literal["vote", "reference", "random"] = Field(
        "vote",
        description="which source's own answer wins: by the reward models' votes, or by the score against the ground truth; "
        "random is a control",
    )
    sources: list[Name] | None = Field(
        None, min_length=1, description="sources that are chosen between; default: all, which are captured in any case"
    )
    reward_models: list[Name] | None = Field(
        None, description="reward models that vote; one alone decides by its score; default: all of reward_models"
    )
    training_margin: Margin | None = Field(
        None, description="in nats per byte of response, between the best and the second best source"
    )
    inference_margin: Margin | None = Field(
        None, description="in votes (one reward model or reference: in scores) between the winner's answer and the next"
    )
    strongest: Name | None = Field(
        None, description="reward model whose score breaks a tie of votes; default: the first that votes"
    )


class LossOptions(Options):
    teacher_temperature: Temperature = Field(2.0, description="of the sources' distributions")
    student_temperature: Temperature = Field(1.0, description="of the target's distributions in the KL")
    temperature_squared: bool = Field(False, description="multiply KL by student_temperature^2 (Hinton et al. 2015)")
    tail: Literal["bucket", "renormalize", "ignore"] = Field(
        "bucket", description="what becomes of the teacher's mass outside the stored entries"
    )
    implementation: Literal["auto", "triton", "torch", "reference"] = "auto"
    fused_linear: bool = Field(
        False,
        description="compute the output layer and the loss together, 256 MB of logits at a time, so that they never exist as a whole; "
        "the gradients of both are computed in the forward pass",
    )


class ScheduleOptions(Options):
    preset: Literal[tuple(PRESETS)] | None = Field(None, description="phases by name")  # type: ignore[valid-type]
    phases: list[Phase] | None = Field(None, description="phases written out")
    order: Literal["shuffled", "gt_length", "target_reward"] = Field(
        "shuffled",
        description="of the examples in every epoch: shuffled; the shortest ground truth first; the best reward of the "
        "target's own answer first",
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.preset is None) == (self.phases is None):
            raise ValueError("give exactly one of preset and phases")
        if self.phases == []:
            raise ValueError("phases is empty")
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
        description="gather the weights that the distributed optimizer has updated during the next forward pass; needs "
        "use_distributed_optimizer and overlap_grad_reduce",
    )
    sequence_parallel: bool = Field(
        False,
        description="split norms and residuals over the tensor-parallel ranks, along the sequence; needs Transformer Engine",
    )
    context_parallel_size: Ranks = Field(1, description="1: sequences are not split over ranks")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"

    @model_validator(mode="after")
    def _has_stages_to_interleave(self) -> Self:
        virtual = self.virtual_pipeline_model_parallel_size or 1
        if virtual > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"virtual_pipeline_model_parallel_size {virtual} needs pipeline_model_parallel_size of at least 2, not 1"
            )
        return self

    @model_validator(mode="after")
    def _has_weights_to_gather(self) -> Self:
        missing = [name for name in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(self, name)]
        if self.overlap_param_gather and missing:
            raise ValueError(
                f"overlap_param_gather needs {' and '.join(missing)}: set {'it' if len(missing) == 1 else 'them'} to true as well, "
                "or overlap_param_gather to false"
            )
        return self

    @model_validator(mode="after")
    def _splits_sequences_evenly(self) -> Self:
        size = self.tensor_model_parallel_size
        if self.sequence_parallel and (size == 1 or SEQUENCE_MULTIPLE % size):
            raise ValueError(
                f"sequence_parallel splits sequences, of a multiple of {SEQUENCE_MULTIPLE} positions, over the tensor-parallel ranks: "
                f"set tensor_model_parallel_size to 2, 4 or 8, not {size}"
            )
        return self

    @model_validator(mode="after")
    def _keeps_sequences_whole(self) -> Self:
        if self.context_parallel_size != 1:
            raise ValueError(
                f"context_parallel_size is {self.context_parallel_size}: a sequence's targets and teacher rows are not split over "
                "ranks; leave it at 1, and take a larger tensor_model_parallel_size, or training.recompute, where memory is short"
            )
        return self


class TrainingOptions(Options):
    seed: Seed | None = Field(
        None,
        description="of the order of the examples in every epoch, the only draw of a training; default: the recipe's seed, which alone "
        "decides what the other stages draw",
    )
    seq_length: Tokens = Field(2048, description="most target tokens of one conversation, in every stage")
    micro_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        1, description="sequences per forward pass and data-parallel rank"
    )
    global_batch_size: Annotated[int, Field(ge=1, le=100_000_000)] = Field(128, description="examples per step")
    packing: bool = Field(
        False,
        description="several examples share a sequence of up to seq_length, none of them seeing another: a step learns the same "
        "from the same examples without the padding",
    )
    lr: LearningRate = Field(1.5e-5, description="highest learning rate")
    min_lr: LeastLearningRate = Field(0.0, description="learning rate at the end of its decay")
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = Field(
        "cosine",
        description="how the learning rate goes from lr to min_lr after the warm-up; constant: not at all; WSD (warm-up, stable, decay): "
        "in the last lr_wsd_decay_iters steps",
    )
    lr_decay_iters: Positive | None = Field(
        None,
        description="steps after which the learning rate is min_lr, the warm-up counted; default: those of the whole schedule",
    )
    lr_warmup_iters: Count = Field(0, description="steps from 0 to lr")
    lr_warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="the same as a share of lr_decay_iters; default: lr_warmup_iters decides"
    )
    lr_wsd_decay_iters: Positive | None = Field(
        None, description="steps of the decay of WSD, the last of lr_decay_iters"
    )
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] | None = Field(
        None, description="how the learning rate goes down in them; default: exponential with WSD"
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(0.0, description="of AdamW")
    adam_beta1: Decay = Field(0.9, description="decay of the mean of the gradient")
    adam_beta2: Decay = Field(0.999, description="decay of the mean of its square")
    adam_eps: Annotated[float, Field(ge=1e-20, le=1)] = Field(1e-8, description="added to the root of that mean")
    clip_grad: GradientNorm = Field(1.0, description="maximal gradient norm; 0 switches clipping off")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="of parameters and activations; bf16 keeps fp32 masters"
    )
    deterministic: bool = Field(
        False,
        description="use only algorithms whose result is the same each time; on a GPU slower, and without it losses differ in the "
        "last digits from run to run",
    )
    recompute: bool = Field(False, description="recompute each layer's activations in the backward pass")
    train_iters: Positive | None = Field(
        None, description="stop after so many steps; the schedule stays that of the whole run"
    )
    save: Location | None = Field(None, description="checkpoint directory; default: WORKDIR/training/checkpoints")
    load: Location | None = Field(
        None, description="checkpoint directory to continue from; default: the save directory"
    )
    save_interval: Positive | None = Field(
        None, description="steps between checkpoints; default: at the end of phases only"
    )
    save_retain_last: Positive | None = Field(
        None, description="keep so many of the newest checkpoints; the best one stays besides; default: all"
    )
    save_retain_interval: Positive | None = Field(
        None, description="keep the checkpoints at multiples of so many steps, the last and the best; default: all"
    )
    async_save: bool = Field(False, description="train on while a checkpoint is written")
    override: bool = Field(
        False, description="continue from a checkpoint of a run with other data or options, with a warning for each"
    )
    verify: bool = Field(
        True,
        description="compare checkpoints, exports and fusion data with their checksums; without, presence and sizes alone",
    )
    exit_signal_handler: bool = Field(True, description="at SIGTERM, SIGUSR1 or Ctrl-C finish the step, save and exit")
    exit_interval: Positive | None = Field(None, description="save and exit after a step that is a multiple of this")
    exit_duration_in_mins: Annotated[float, Field(ge=1e-9, le=1e8)] | None = Field(
        None, description="save and exit once the process is as many minutes old"
    )
    log_interval: Positive = 1
    timing_log_level: Annotated[int, Field(ge=0, le=2)] = Field(
        0,
        description="0: time whole iterations; 1: also what happens about once in each; 2: also what happens once a micro-batch. Above 0 "
        "every timer waits for the GPU, and at those of level 1 the ranks wait for each other, so that iterations may take longer",
    )
    profile: bool = Field(
        False,
        description="record some iterations with torch's profiler, a trace per rank, in profile/ beside metrics.jsonl",
    )
    profile_step_start: Positive = Field(10, description="first iteration that --profile records")
    profile_step_end: Positive = Field(12, description="iteration before which --profile ends")
    profile_ranks: list[Rank] = Field([0], min_length=1, description="ranks that --profile records")
    eval_interval: Positive | None = Field(
        None, description="steps between evaluations; default: at the end of phases only"
    )
    tensorboard_dir: Location | None = Field(None, description="default: WORKDIR/training/tensorboard")
    wandb_project: Line | None = Field(None, description="log to this Weights & Biases project; default: none")
    wandb_exp_name: Line | None = Field(None, description="name of the run there; default: the name of WORKDIR")
    max_skipped_iterations: Positive = Field(
        10, description="stop after so many steps in a row whose gradient or loss is not finite"
    )
    check_for_spiky_loss: bool = Field(True, description="warn where the loss leaves its running median far behind")
    check_weight_hash_across_dp_replicas_interval: Positive | None = Field(
        None, description="steps between comparisons of the weights of all data-parallel replicas; default: never"
    )

    @model_validator(mode="before")
    @classmethod
    def _names_the_decay_of_wsd(cls, value: Any) -> Any:
        """Writes out Megatron-LM's default, so that the resolved recipe shows it."""
        if isinstance(value, dict) and value.get("lr_decay_style") == "WSD" and not value.get("lr_wsd_decay_style"):
            return value | {"lr_wsd_decay_style": "exponential"}
        return value

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        iters, fraction, decay = self.lr_warmup_iters, self.lr_warmup_fraction, self.lr_decay_iters
        if iters and fraction is not None:
            raise ValueError(
                f"lr_warmup_iters is {iters} and lr_warmup_fraction {fraction}, and both say how long the warm-up is: set "
                "lr_warmup_iters to 0, or leave out lr_warmup_fraction"
            )
        if decay is not None and decay <= iters:
            raise ValueError(
                f"lr_decay_iters ({decay}) is not above lr_warmup_iters ({iters}), but the warm-up is a part of it: raise "
                "lr_decay_iters, or lower lr_warmup_iters"
            )
        return self

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is above lr ({self.lr}), from which it is to be reached")
        return self

    @model_validator(mode="after")
    def _decays_by_one_style(self) -> Self:
        style, decay = self.lr_decay_style, self.lr_decay_iters
        if style == "WSD":
            if self.lr_wsd_decay_iters is None:
                raise ValueError(
                    "lr_decay_style WSD needs lr_wsd_decay_iters, the steps of its decay: set it, or take another lr_decay_style"
                )
            if decay is not None:
                self.require_room_for_wsd(decay)
        else:
            of_wsd = {"lr_wsd_decay_iters": self.lr_wsd_decay_iters, "lr_wsd_decay_style": self.lr_wsd_decay_style}
            for key, value in of_wsd.items():
                if value is not None:
                    raise ValueError(
                        f"{key} is {value}, but lr_decay_style is {style}: leave out {key}, or set lr_decay_style to WSD"
                    )
        if style == "constant" and self.min_lr:
            raise ValueError(
                f"min_lr is {self.min_lr}, but lr_decay_style constant stays at lr: set min_lr to 0, or take another lr_decay_style"
            )
        if style == "constant" and decay is not None:
            raise ValueError(
                f"lr_decay_iters is {decay}, but lr_decay_style constant stays at lr: leave out lr_decay_iters, or take another "
                "lr_decay_style"
            )
        return self

    def warmup_steps(self, decay_iters: int) -> float:
        """Number of warm-up steps, not always an integer. decay_iters: lr_decay_iters, or its default."""
        return self.lr_warmup_iters if self.lr_warmup_fraction is None else self.lr_warmup_fraction * decay_iters

    def require_room_for_wsd(self, decay_iters: int) -> None:
        """Raises ValueError if the warm-up and the decay of WSD together take more than decay_iters steps."""
        warmup, wsd = self.warmup_steps(decay_iters), self.lr_wsd_decay_iters or 0
        if warmup + wsd > decay_iters:
            of_warmup = "lr_warmup_iters" if self.lr_warmup_fraction is None else "lr_warmup_fraction"
            raise ValueError(
                f"lr_wsd_decay_iters ({wsd}) and the {warmup:g} steps of {of_warmup} are more than lr_decay_iters ({decay_iters}): "
                f"lower one of the two, or raise lr_decay_iters"
            )

    @model_validator(mode="after")
    def _packs_one_by_one(self) -> Self:
        if self.packing and self.micro_batch_size != 1:
            raise ValueError(
                f"packing needs micro_batch_size 1, not {self.micro_batch_size}: a packed sequence already holds several examples; "
                "set micro_batch_size to 1, or packing to false"
            )
        return self

    @model_validator(mode="after")
    def _profiles_an_iteration(self) -> Self:
        start, end = self.profile_step_start, self.profile_step_end
        if self.profile and end <= start:
            raise ValueError(
                f"profile_step_end is {end}: it is the iteration before which the profile ends, so set it above profile_step_start ({start})"
            )
        return self


class ExportOptions(Options):
    path: Location | None = Field(
        None, description="Hugging Face directory of the fused model; default: WORKDIR/export"
    )
    dtype: Precision = "bf16"
    checkpoint: Literal["best", "latest"] = Field(
        "best", description="best by validation cross-entropy, or the last one"
    )


class Recipe(Options):
    """One fusion run: models, data, and how distributions are captured, aligned, selected and learned."""

    workdir: Location = Field(description="directory of all artifacts")
    seed: Seed = Field(1234, description="of every draw: samples, answers, order, ties")
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
                f"loss.teacher_temperature is {self.loss.teacher_temperature} but capture.temperatures is {captured}: add it there"
            )
        if TARGET in self.sources:
            raise ValueError(f"sources: {TARGET!r} is the name of the target's own answers: name the source otherwise")
        if REFERENCE in self.reward_models:
            raise ValueError(f"reward_models: {REFERENCE!r} is the name of the score against the ground truth")
        unknown = set(self.selection.sources or []) - set(self.sources)
        if unknown:
            raise ValueError(f"selection.sources has {sorted(unknown)} but sources has {sorted(self.sources)}")
        unknown = set(self.selection.reward_models or []) - set(self.reward_models)
        if unknown:
            raise ValueError(
                f"selection.reward_models has {sorted(unknown)} but reward_models has {sorted(self.reward_models)}"
            )
        strongest = self.selection.strongest
        if strongest is not None and strongest not in self.voting_reward_models:
            raise ValueError(
                f"selection.strongest is {strongest!r} but those that vote are {self.voting_reward_models}: name one of them"
            )
        votes = self.uses_inference_mode and self.selection.inference == "vote"
        if votes and len(self.candidates) > 1 and not self.voting_reward_models:
            raise ValueError(
                "schedule gives the inference mode a weight, several sources answer and no reward model votes: name at least "
                "one in reward_models, take selection.inference: reference, or a preset without inference mode (csft, fuse)"
            )
        if self.schedule.order == "target_reward" and not self.voting_reward_models:
            raise ValueError(
                "schedule.order is target_reward, but no reward model votes: name one in reward_models to score the target"
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
            same = all(getattr(source, key) == getattr(target, key) for key in ("model", "chat_template", "system"))
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

        If a phase uses the inference mode, these are the sources. If the target's reward orders the examples,
        the target is added, unless it is one of the sources: then that source is there.
        """
        answering: dict[str, AnsweringOptions] = dict(self.sources) if self.uses_inference_mode else {}
        if self.schedule.order == "target_reward":
            source = self.target_as_source
            answering |= {source: self.sources[source]} if source else {TARGET: self.target}
        return answering

    @property
    def scorers(self) -> dict[str, list[str]]:
        """Maps each answering model to its scorers, by the names in scores/NAME/SCORER.

        The answers of a source are scored by the reward models that vote, or by `reference` under
        selection.inference reference. If the target's reward orders the examples (schedule.order
        target_reward), the strongest reward model scores the target's answers too.
        """
        chosen_by = {"vote": self.voting_reward_models, "reference": [REFERENCE], "random": []}[
            self.selection.inference
        ]
        scorers = {name: list(chosen_by) for name in self.sources} if self.uses_inference_mode else {}
        if self.schedule.order == "target_reward":
            of_target = scorers.setdefault(self.target_as_source or TARGET, [])
            if self.strongest is not None and self.strongest not in of_target:
                of_target.append(self.strongest)
        return scorers

    @property
    def capture_temperatures(self) -> list[float]:
        return self.capture.temperatures or [self.loss.teacher_temperature]
