"""The whole recipe: every option of every stage, with its type, default and meaning.

The sections are in models.py (models and their servers), stage_options.py (data to export) and
training_options.py. A key has Megatron-LM's name if Megatron-LM has the option. An unknown key is an error.
Paths are relative to the directory in which the command runs. `--help` prints `Field(description=...)`.
"""

from typing import Self

from pydantic import Field, model_validator

from megatron_fuse.recipe.exactness import beyond_server
from megatron_fuse.recipe.model_parallel import ParallelOptions
from megatron_fuse.recipe.models import (
    REFERENCE,
    TARGET,
    AnsweringOptions,
    RewardModelOptions,
    SourceOptions,
    TargetOptions,
)
from megatron_fuse.recipe.modes import Mode
from megatron_fuse.recipe.presets import Phase
from megatron_fuse.recipe.stage_options import (
    AlignmentOptions,
    CaptureOptions,
    DataOptions,
    ExportOptions,
    LossOptions,
    ReferenceOptions,
    ResponseOptions,
    ScheduleOptions,
    ScoringOptions,
    SelectionOptions,
)
from megatron_fuse.recipe.training_options import TrainingOptions
from megatron_fuse.recipe.values import (
    Location,
    Name,
    Options,
    Seed,
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
                f"{self.voting_reward_models}. Set it to one of them."
            )
        scored = {"vote", "by_category"} & self.rules_for_answers
        if scored and len(self.candidates) > 1 and not self.voting_reward_models:
            raise ValueError(
                f"selection compares the answers of several sources ({', '.join(sorted(scored))}), but no "
                "reward model votes. Add a reward model to reward_models, set selection.inference to "
                "reference, or choose a preset without inference mode (csft, fuse) and another "
                "selection.training."
            )
        problem = beyond_server(
            self.sources,
            self.modes_with_teacher,
            temperature=self.loss.teacher_temperature,
            tail=self.loss.tail,
            unmatched=self.alignment.unmatched,
            mixed=self.selection.training == "average" and len(self.candidates) > 1,
        )
        if problem:
            raise ValueError(problem)
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
    def student_temperature(self) -> float:
        """The temperature of the target's distributions in the KL."""
        own = self.loss.student_temperature
        return self.loss.teacher_temperature if own is None else own

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
