"""The options of training: steps, optimizer, checkpoints and logs."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_fuse.recipe.values import (
    Count,
    Decay,
    GradientNorm,
    LearningRate,
    LeastLearningRate,
    Line,
    Location,
    Options,
    Positive,
    Rank,
    Seed,
    Tokens,
)


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
    moe_aux_loss_coeff: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0,
        description="weight of the auxiliary loss that spreads the tokens of a mixture over its experts; 0: "
        "no such loss, so that the target learns from its teachers alone. Needs packing",
    )
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
    def _spreads_no_padding(self) -> Self:
        if self.moe_aux_loss_coeff and not self.packing:
            raise ValueError(
                f"moe_aux_loss_coeff is {self.moe_aux_loss_coeff}, but without packing the auxiliary loss "
                "would count the padding, too. Set packing to true, or moe_aux_loss_coeff to 0."
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
