"""The state that the stages of one recipe share.

Tokenizers, fingerprints and manifests are slow to read, so each is read once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.fingerprints import model_fingerprint
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.huggingface.reward_models import load_reward_model_format, reward_model_fingerprint
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.lookup import answering_options, recipe_key, reward_model_options
from megatron_fuse.stages.stage import Hashes, Key, Parents, Stage
from megatron_fuse.storage import Artifact, Plan, completed, open_artifact


class Context:
    """A recipe with the chat formats of its models, the fingerprints of their weights, and the artifacts
    opened so far.

    An artifact that was opened is not read again. After a command has written artifacts, make a new context.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._read: dict[tuple[str, ...], Any] = {}
        self._opened: dict[tuple[Stage, Key], Artifact] = {}

    def once(self, kind: str, name: str, read: Callable[[], Any]) -> Any:
        """The result of `read`, which is called once for each kind and name."""
        if (kind, name) not in self._read:
            self._read[kind, name] = read()
        return self._read[kind, name]

    def format(self, name: str) -> ChatFormat:
        """Tokenizer and chat format of a source, or of `target`.

        Raises UserError if they are missing or damaged.
        """
        options = answering_options(self.recipe, name)
        return self.once("format", name, lambda: load_format(options, recipe_key(name)))

    @property
    def target(self) -> ChatFormat:
        """The target's tokenizer and chat format."""
        return self.format("target")

    @property
    def target_hashes(self) -> Hashes:
        """Hashes for artifacts that hold the target's tokens, or whose texts were truncated by its tokens."""
        return {"target tokenizer": self.target.tokenizer.sha256, "target chat format": self.target.sha256}

    def reward_model_format(self, name: str) -> ChatFormat:
        """Tokenizer and chat format in which a reward model reads conversations."""
        options = reward_model_options(self.recipe, name)
        return self.once("reward model's format", name, lambda: load_reward_model_format(options, name))

    def model_directory(self, name: str) -> Path:
        """Where the model of a source, or of `target`, lies.

        Raises UserError if it is not on this machine.
        """
        return resolve_model(answering_options(self.recipe, name).model, f"{recipe_key(name)}.model")

    def fingerprint(self, name: str) -> str:
        """Hash of the weights of a source, or of `target`.

        Raises UserError if they are not on this machine.
        """
        return self.once("weights", name, lambda: model_fingerprint(self.model_directory(name)))

    def reward_model_fingerprint(self, name: str) -> str:
        """Hash of the files that decide a reward model's scores.

        Raises UserError if they are not on this machine.
        """
        options = reward_model_options(self.recipe, name)
        return self.once("reward model's weights", name, lambda: reward_model_fingerprint(options, name))

    def plan(self, stage: Stage, *key: str) -> Plan:
        """The plan of an artifact: its options and the hashes of its inputs.

        Raises UserError if a parent is missing, or was made with other options or inputs.
        """
        parents = self._parents(stage, key)
        inputs = {name: parent.sha256 for name, parent in parents.items()}
        inputs |= stage.formats(self, *key) | stage.origin(self, *key)
        return Plan(
            stage.directory(self.recipe, *key),
            stage.recorded_as,
            stage.options(self.recipe, *key) | stage.packages(self.recipe, *key),
            inputs,
            shards=self._shards(stage, key) if stage.shard_names is None else len(stage.shard_names),
            shard_names=None if stage.shard_names is None else list(stage.shard_names),
        )

    def open(self, stage: Stage, *key: str) -> Artifact:
        """A finished artifact. Raises UserError if it is missing, or was made with other options or inputs.

        Options, tokenizers, templates and parents are compared. Weights and the user's files are compared if
        they are on this machine.
        """
        if (stage, key) not in self._opened:
            inputs = {name: parent.sha256 for name, parent in self._parents(stage, key).items()}
            inputs |= stage.formats(self, *key) | self._origin_if_here(stage, key)
            self._opened[stage, key] = self._open(stage, key, inputs)
        return self._opened[stage, key]

    def open_alone(self, stage: Stage, *key: str) -> Artifact:
        """`open` if the parents may be missing: only options, tokenizers and templates are compared."""
        return self._open(stage, key, stage.formats(self, *key))

    def refuse_changed_options(self, parents: Parents) -> None:
        """Raises UserError if an artifact of a lineage was made with other options than the recipe has now.

        For a machine that may have only a part of the lineage: missing artifacts are not compared. Tokenizers
        and weights are not compared either.
        """
        for stage, key in lineage(self.recipe, parents):
            if (stage.directory(self.recipe, *key) / "manifest.json").exists():
                self._open(stage, key, {})

    def state(self, stage: Stage, *key: str) -> str:
        """`done`, `to do` or `k of n shards`.

        Raises UserError if the artifact was made with other options or inputs.
        """
        if stage.state is not None:
            return stage.state(self, *key)
        directory = stage.directory(self.recipe, *key)
        if not (directory / "plan.json").exists():
            return "to do"
        plan = self.plan(stage, *key)
        if completed(plan):
            return "done"
        done = sum((directory / f"{name}.done").exists() for name in plan.names())
        return f"{done} of {plan.shards} shards"

    def _open(self, stage: Stage, key: Key, inputs: Hashes) -> Artifact:
        return open_artifact(
            stage.directory(self.recipe, *key),
            stage.recorded_as,
            stage.command.format(*key),
            options=stage.options(self.recipe, *key),
            inputs=inputs,
            remove=stage.remove(self.recipe) if stage.remove else None,
        )

    def _parents(self, stage: Stage, key: Key) -> dict[str, Artifact]:
        parents = stage.parents(self.recipe, *key)
        return {name: self.open(parent, *names) for name, (parent, names) in parents.items()}

    def _shards(self, stage: Stage, key: Key) -> int:
        """Number of shards of the examples, the same for all stages: that of the first parent."""
        parent, names = next(iter(stage.parents(self.recipe, *key).values()))
        artifact = self.open(parent, *names)
        # The instructions are one unit of work. Their counts say how many shards of examples it holds.
        return artifact.counts["shards"] if parent.shard_names is not None else artifact.manifest["shards"]

    def _origin_if_here(self, stage: Stage, key: Key) -> Hashes:
        try:
            return stage.origin(self, *key)
        except (UserError, OSError):
            return {}


def lineage(recipe: Recipe, parents: Parents) -> list[tuple[Stage, Key]]:
    """All artifacts that these parents are made from, and the parents: each one once, after its own
    parents.
    """
    in_order: dict[tuple[Stage, Key], None] = {}

    def visit(parents: Parents) -> None:
        for stage, key in parents.values():
            if (stage, key) not in in_order:
                visit(stage.parents(recipe, *key))
                in_order[stage, key] = None

    visit(parents)
    return list(in_order)
