"""The plan of a recipe for a cluster: layout, memory, time and disk of every stage.

Needs the models' config.json alone: no weights, no tokenizer, no GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_fuse.capture import CAPTURES
from megatron_fuse.capture.megatron_layout import readable_source, source_architecture
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.pipeline.stages import Work, steps
from megatron_fuse.planning import durations
from megatron_fuse.planning.durations import Layout, TrainingWork
from megatron_fuse.planning.gpus import Cluster
from megatron_fuse.planning.layouts import (
    Choice,
    TrainingChoice,
    choose,
    fits_model,
    in_process_layouts,
    megatron_layouts,
    server_layouts,
    training_choices,
)
from megatron_fuse.planning.memory import Need, answering_need, reading_need, served_need, training_need
from megatron_fuse.planning.rates import Rates
from megatron_fuse.planning.sizes import BYTES, ModelSize, read_size
from megatron_fuse.recipe import AnsweringOptions, Recipe, SourceOptions
from megatron_fuse.recipe.lookup import answering_options, recipe_key, reward_model_options
from megatron_fuse.responses import RESPONSES, backend_of
from megatron_fuse.scoring.reference_scores import REFERENCE_SCORES
from megatron_fuse.scoring.scores import SCORES
from megatron_fuse.stages import Amounts
from megatron_fuse.target import target_directory
from megatron_fuse.training.schedule import make_schedule
from megatron_fuse.training.stage import EXPORT, TRAINING, training_tokens

# Bytes of a parameter in a checkpoint: the weight, both moments in fp32, and with bf16 the fp32 master.
_CHECKPOINT_BYTES = {"bf16": 2 + 4 + 4 + 4, "fp32": 4 + 4 + 4}
# A batch holds at least so many texts of the mean length: fewer would leave a GPU idle.
_LEAST_TEXTS = 2


@dataclass(frozen=True)
class StagePlan:
    """One artifact. need: of the busiest GPU; None if the stage uses no GPU. change: what the recipe has to
    say for this layout, empty if it says so already.
    """

    label: str
    disk: float
    layout: str = ""
    need: Need | None = None
    seconds: float = 0.0
    fits: bool = True
    change: str = ""


@dataclass(frozen=True)
class TrainingPlan:
    """The recipe's own options, the smallest change that fits if they do not fit, and the fastest options."""

    own: TrainingChoice
    smallest: TrainingChoice | None
    fastest: TrainingChoice | None

    @property
    def counted(self) -> TrainingChoice:
        """What the sums of the plan count: the recipe's options if they fit, else the smallest change."""
        return self.smallest or self.own


@dataclass(frozen=True)
class Plan:
    cluster: Cluster
    amounts: Amounts
    stages: tuple[StagePlan, ...]
    training: TrainingPlan
    sizes: dict[str, ModelSize]  # by recipe key: "target", "sources.NAME", "reward_models.NAME"

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs of the cluster, while any stage uses them."""
        return self.cluster.gpus * sum(stage.seconds for stage in self.stages) / 3600

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)


def make_plan(recipe: Recipe, amounts: Amounts, cluster: Cluster, rates: Rates) -> Plan:
    """The plan. Raises UserError if a model has no readable config.json, or if the target cannot be trained
    at the recipe's layout.
    """
    planner = _Planner(recipe, amounts, cluster, rates)
    training = planner.training()
    stages = [
        stage for works in steps(recipe).values() for work in works for stage in planner.stage(work, training)
    ]
    return Plan(cluster, amounts, tuple(stages), training, planner.sizes)


class _Planner:
    """Plans one artifact after the other. Each config.json is read once."""

    def __init__(self, recipe: Recipe, amounts: Amounts, cluster: Cluster, rates: Rates) -> None:
        self.recipe, self.amounts, self.cluster, self.rates = recipe, amounts, cluster, rates
        self.shards = -(-amounts.examples // recipe.data.shard_size)
        self.sizes: dict[str, ModelSize] = {}

    def stage(self, work: Work, training: TrainingPlan) -> Iterator[StagePlan]:
        plain = StagePlan(work.label(self.recipe), work.disk(self.recipe, self.amounts))
        if work.stage == RESPONSES:
            yield self._answers(plain, *work.key)
        elif work.stage == SCORES:
            yield self._scores(plain, work.key[1])
        elif work.stage == REFERENCE_SCORES:
            yield self._reference_scores(plain)
        elif work.stage == CAPTURES:
            yield self._captures(plain, *work.key)
        elif work.stage == TRAINING:
            yield self._training(plain, training.counted)
        elif work.stage == EXPORT:
            yield replace(plain, disk=BYTES[self.recipe.export.dtype] * self._size("target").parameters)
        else:
            yield plain

    def training(self) -> TrainingPlan:
        recipe, amounts, cluster = self.recipe, self.amounts, self.cluster
        architecture = read_architecture(target_directory(recipe))
        size = self._size("target", recipe.target)
        schedule = make_schedule(recipe, amounts.examples - amounts.validation_examples)
        modes = ["inference"] * recipe.uses_inference_mode + ["training"]
        work = TrainingWork(
            tokens=training_tokens(recipe, amounts),
            mean_length=max(amounts.read(mode) for mode in modes) / amounts.examples,
            steps=schedule.last_step(recipe.training.train_iters),
        )

        def cost(changed: Recipe) -> tuple[Need, float]:
            data = cluster.gpus // changed.parallel.model_parallel_size
            need = training_need(changed, architecture, data_parallel_size=data)
            return need, durations.training_seconds(changed, size, work, cluster, self.rates)

        return TrainingPlan(*training_choices(recipe, architecture, cluster, cost))

    def _answers(self, plain: StagePlan, name: str) -> StagePlan:
        recipe, amounts = self.recipe, self.amounts
        options = answering_options(recipe, name)
        if backend_of(recipe, name) == "file":
            return plain
        key = recipe_key(name)
        size = self._size(key, options)
        prompt, answer = (
            each / amounts.examples for each in (amounts.question_tokens, amounts.answer_tokens)
        )
        longest = prompt + recipe.responses.max_new_tokens

        def cost(layout: Layout, batch_tokens: int) -> tuple[Need, float]:
            if layout.backend == "server":
                rows = options.server.concurrency if options.server else _rows(batch_tokens, longest)
                need = served_need(
                    size, options.dtype, rows=rows, longest=longest, tensor=layout.gpus_of_replica
                )
            else:
                rows = min(_rows(batch_tokens, longest), recipe.data.shard_size)
                need = answering_need(
                    size,
                    options.dtype,
                    rows=rows,
                    prompt=prompt,
                    longest=longest,
                    top_p=recipe.responses.top_p,
                    gpus=layout.gpus_of_replica,
                )
            seconds = durations.answering_seconds(
                size,
                options.dtype,
                layout,
                self.rates,
                answers=amounts.examples,
                prompt=prompt,
                answer=answer,
                rows=rows,
                shards=self.shards,
            )
            return need, seconds

        in_process, served = in_process_layouts(self.cluster), server_layouts(self.cluster, size)
        if options.server:
            layouts = served
        else:
            layouts = [*_own(in_process, options), *served]
        batch = recipe.responses.batch_tokens
        choice = choose(layouts, batch, _LEAST_TEXTS * longest, self.cluster, cost)
        change = _change(key, choice, layouts[0], "responses.batch_tokens", batch)
        return _planned(plain, choice, change)

    def _captures(self, plain: StagePlan, name: str, mode: str) -> StagePlan:
        recipe, amounts = self.recipe, self.amounts
        source = recipe.sources[name]
        if mode in source.captures:
            return plain
        key = f"sources.{name}"
        size = self._size(key, source)
        read, learned = amounts.read(mode), amounts.learned(mode)
        length = read / amounts.examples

        def cost(layout: Layout, batch_tokens: int) -> tuple[Need, float]:
            if layout.backend == "server":
                rows = source.server.concurrency if source.server else _rows(batch_tokens, length)
                need = served_need(
                    size, source.dtype, rows=rows, longest=length, tensor=layout.gpus_of_replica
                )
            else:
                need = reading_need(
                    size,
                    source.dtype,
                    batch_tokens=batch_tokens,
                    logits=batch_tokens * learned / read,
                    tensor=layout.tensor,
                    pipeline=layout.pipeline,
                    chunked=layout.backend == "megatron",
                )
            return need, self._reading_seconds(
                size, source.dtype, layout, batch_tokens, read, length, learned
            )

        layouts = self._capture_layouts(key, source, size)
        batch = recipe.capture.batch_tokens
        choice = choose(layouts, batch, _LEAST_TEXTS * length, self.cluster, cost)
        return _planned(plain, choice, _change(key, choice, layouts[0], "capture.batch_tokens", batch))

    def _scores(self, plain: StagePlan, name: str) -> StagePlan:
        options = reward_model_options(self.recipe, name)
        if options.model is None:
            return plain
        key = f"reward_models.{name}"
        if key not in self.sizes:
            part = "body" if options.body else "model"
            directory = resolve_model(options.body or options.model, f"{key}.{part}")
            self.sizes[key] = read_size(directory, key, trust_remote_code=options.trust_remote_code)
        tokens = self.amounts.read("inference")
        served = options.server.concurrency if options.server else None
        return self._read_once(plain, key, options.dtype, tokens, served)

    def _reference_scores(self, plain: StagePlan) -> StagePlan:
        model = self.recipe.reference.bertscore_model
        if not model:
            return plain
        key = "reference.bertscore_model"
        if key not in self.sizes:
            self.sizes[key] = read_size(resolve_model(model, key), key)
        return self._read_once(plain, key, "fp32", self.amounts.answer_tokens + self.amounts.response_tokens)

    def _read_once(
        self, plain: StagePlan, key: str, dtype: str, tokens: float, served: int | None = None
    ) -> StagePlan:
        """A model with one output for each text reads all of them, on one GPU for each process.

        served: the number of requests at the same time, if a server reads.
        """
        size, length = self.sizes[key], tokens / self.amounts.examples

        def cost(layout: Layout, batch_tokens: int) -> tuple[Need, float]:
            if served:
                tensor = layout.gpus_of_replica
                need = served_need(size, dtype, rows=served, longest=length, tensor=tensor)
            else:
                need = reading_need(size, dtype, batch_tokens=batch_tokens, logits=0)
            return need, self._reading_seconds(size, dtype, layout, batch_tokens, tokens, length, 0)

        batch = self.recipe.scoring.batch_tokens
        layouts = server_layouts(self.cluster, size) if served else in_process_layouts(self.cluster)[:1]
        choice = choose(layouts, batch, _LEAST_TEXTS * length, self.cluster, cost)
        return _planned(plain, choice, _change(key, choice, layouts[0], "scoring.batch_tokens", batch))

    def _reading_seconds(
        self,
        size: ModelSize,
        dtype: str,
        layout: Layout,
        batch_tokens: int,
        tokens: float,
        length: float,
        logits: float,
    ) -> float:
        return durations.reading_seconds(
            size,
            dtype,
            layout,
            self.rates,
            tokens=tokens,
            mean_length=length,
            logits=logits,
            shards=self.shards,
            batch_tokens=batch_tokens,
        )

    def _training(self, plain: StagePlan, choice: TrainingChoice) -> StagePlan:
        return replace(
            plain,
            disk=self._checkpoint_bytes(),
            layout=choice.layout,
            need=choice.need,
            seconds=choice.seconds,
            fits=choice.fits,
            change=choice.words,
        )

    def _checkpoint_bytes(self) -> float:
        """Of all checkpoints that are kept at the same time, with the one that is being written."""
        training = self.recipe.training
        schedule = make_schedule(self.recipe, self.amounts.examples - self.amounts.validation_examples)
        last = schedule.last_step(training.train_iters)
        # One at each multiple of the interval, and one at the end of each phase.
        saved = last // (training.save_interval or last + 1) + len(self.recipe.phases)
        kept = saved if training.save_retain_last is None else min(saved, training.save_retain_last + 2)
        return kept * _CHECKPOINT_BYTES[training.precision] * self._size("target").parameters

    def _size(self, key: str, options: AnsweringOptions | None = None) -> ModelSize:
        if key not in self.sizes:
            assert options is not None
            self.sizes[key] = read_size(
                resolve_model(options.model, f"{key}.model"), key, trust_remote_code=options.trust_remote_code
            )
        return self.sizes[key]

    def _capture_layouts(self, key: str, source: SourceOptions, size: ModelSize) -> list[Layout]:
        """The ways in which a source can be captured, the recipe's own first."""
        if source.backend == "megatron":
            own = self._megatron_layout(key, source)
            return [own, *(each for each in self._megatron_layouts(key, size) if each != own)]
        if source.backend == "server":
            return server_layouts(self.cluster, size)
        in_process = in_process_layouts(self.cluster)
        layouts = _own(in_process, source)
        return layouts + self._megatron_layouts(key, size) + server_layouts(self.cluster, size)

    def _megatron_layouts(self, key: str, size: ModelSize) -> list[Layout]:
        """The layouts at which a capture in Megatron would take the source."""
        try:
            architecture = readable_source(self.recipe, key.removeprefix("sources."))
        except UserError:
            return []
        return [each for each in megatron_layouts(self.cluster, size) if fits_model(each, architecture)]

    def _megatron_layout(self, key: str, source: SourceOptions) -> Layout:
        """The layout that the recipe states. Raises UserError if it does not fit the model or the GPUs."""
        tensor = source.parallel.tensor_model_parallel_size
        pipeline = source.parallel.pipeline_model_parallel_size
        gpus = self.cluster.gpus
        copy = source.parallel.model_parallel_size
        if gpus % copy:
            raise UserError(
                f"{key}.parallel needs a multiple of {copy} GPUs (tensor x pipeline), but "
                f"--gpus is {self.cluster}. Change it, or plan for other GPUs."
            )
        source_architecture(self.recipe, key.removeprefix("sources."))
        return Layout("megatron", tensor, pipeline, gpus // copy)


def _own(in_process: list[Layout], options: AnsweringOptions) -> list[Layout]:
    """The layouts in process without one process on each GPU, if the recipe divides the model."""
    return (in_process[1:] or in_process) if options.device_map else in_process


def _rows(batch_tokens: int, longest: float) -> int:
    return max(int(batch_tokens // longest), 1)


def _planned(plain: StagePlan, choice: Choice, change: str) -> StagePlan:
    return replace(
        plain,
        layout=str(choice.layout),
        need=choice.need,
        seconds=choice.seconds,
        fits=choice.fits,
        change=change,
    )


def _change(key: str, choice: Choice, own: Layout, budget: str, batch_tokens: int) -> str:
    """What the recipe has to say differently; empty if nothing. budget: the key of the token budget."""
    words, layout = [], choice.layout
    if layout != own and layout.backend == "hf":
        words.append(f"{key}.device_map: auto, with {layout.pipeline} GPUs for each process")
    elif layout != own and layout.backend == "megatron":
        words.append(
            f"{key}.backend: megatron, with parallel: {{tensor_model_parallel_size: {layout.tensor}, "
            f"pipeline_model_parallel_size: {layout.pipeline}}}"
        )
    elif layout.backend == "server" and own.backend != "server":
        words.append(f"{key}.server, on {layout.gpus_of_replica} GPUs each")
    if choice.batch_tokens != batch_tokens:
        words.append(f"{budget}: {choice.batch_tokens} for {key}")
    return ", ".join(words)
