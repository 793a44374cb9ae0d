"""The state that the stages of one recipe share.

Tokenizers, fingerprints and manifests are slow to read, so each is read once.
"""

from collections.abc import Callable, Iterator
from typing import Any

from megatron_fuse.chat import ChatFormat
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.fingerprints import model_fingerprint
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.huggingface.reward_models import load_reward_model_format, reward_model_fingerprint
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.lookup import answering_options, recipe_key, reward_model_options
from megatron_fuse.stages.stage import Hashes, Key, Stage
from megatron_fuse.storage import Artifact, Plan, completed, open_artifact


class Context:
    """A recipe with the chat formats of its models, the fingerprints of their weights, and the artifacts opened so far.

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

    def fingerprint(self, name: str) -> str:
        """Hash of the weights of a source, or of `target`.

        Raises UserError if they are not on this machine.
        """
        options = answering_options(self.recipe, name)
        where = f"{recipe_key(name)}.model"
        return self.once("weights", name, lambda: model_fingerprint(resolve_model(options.model, where)))

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

    def refuse_changed_options(self, stage: Stage, *key: str) -> None:
        """Raises UserError if an ancestor of an artifact was made with other options than the recipe has now.

        For a machine that may have the artifact alone: ancestors that are missing are not compared.
        Tokenizers and weights are not compared either.
        """
        for ancestor, names in _ancestors(self.recipe, stage, key):
            if (ancestor.directory(self.recipe, *names) / "manifest.json").exists():
                self._open(ancestor, names, {})

    def state(self, stage: Stage, *key: str) -> str:
        """`done`, `to do` or `k of n shards`. Raises UserError if the artifact was made with other options or inputs."""
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


def _ancestors(recipe: Recipe, stage: Stage, key: Key) -> Iterator[tuple[Stage, Key]]:
    """All artifacts that an artifact is made from, directly or through others, each one once."""
    waiting, seen = [(stage, key)], set[tuple[Stage, Key]]()
    while waiting:
        stage, key = waiting.pop()
        for parent in stage.parents(recipe, *key).values():
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
                yield parent
