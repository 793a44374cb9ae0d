"""The options of the stages that make fusion data, of selection, loss and schedule, and of the export."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_fuse.recipe.presets import PRESETS, Phase
from megatron_fuse.recipe.values import (
    BatchTokens,
    Count,
    Layers,
    Location,
    ModelPlace,
    Name,
    Options,
    Positive,
    Precision,
    SamplingTemperature,
    Share,
    Temperature,
    Tokens,
    Weight,
)


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
        "the response (MinCE); per_byte, per_token: the same per unit, per_token as FuseLLM, which favours "
        "small pieces; average: all sources, mixed by their cross-entropies (AvgCE); winner: the source "
        "whose own answer wins; by_category: the source with the best mean score in the example's category; "
        "random: a control",
    )
    inference: Literal["vote", "reference", "by_category", "random"] = Field(
        "vote",
        description="how the winning answer is chosen; vote: by the votes of the reward models; reference: "
        "by the score against the ground truth; by_category: the answer of the source with the best mean "
        "score in the example's category; random: a control",
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
        "the response; winner: in the unit of inference_margin; by_category: in standard deviations of the "
        "scores",
    )
    inference_margin: Margin | None = Field(
        None,
        description="smallest difference between the winner's answer and the next, in votes (one reward "
        "model or reference: in scores; by_category: in standard deviations of the scores)",
    )
    strongest: Name | None = Field(
        None,
        description="reward model whose score decides between answers with equal votes; default: the first "
        "that votes",
    )


class LossOptions(Options):
    teacher_temperature: Temperature = Field(2.0, description="temperature of the sources' distributions")
    student_temperature: Temperature | None = Field(
        None,
        description="temperature of the target's distributions in the KL; default: "
        "loss.teacher_temperature, with which the KL is least where the target equals its source",
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


class ExportOptions(Options):
    path: Location | None = Field(
        None, description="directory of the fused model in Hugging Face form; default: WORKDIR/export"
    )
    dtype: Precision = "bf16"
    checkpoint: Literal["best", "latest"] = Field(
        "best",
        description="best: the checkpoint with the lowest validation cross-entropy; latest: the last one",
    )
