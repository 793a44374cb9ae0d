"""A reward model behind a server. It gets the same token ids as a reward model in this process."""

import logging
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from megatron_fuse import ragged
from megatron_fuse.chat import Messages
from megatron_fuse.chat.tool_rendering import Tools
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.limits import declared_positions
from megatron_fuse.huggingface.reward_models import FORMS, find_reward_model, load_reward_model_format
from megatron_fuse.progress import Report, silent
from megatron_fuse.recipe import RewardModelOptions
from megatron_fuse.scoring.reward_models import RewardFormat
from megatron_fuse.scoring.reward_requests import ENGINES
from megatron_fuse.sources.server import Server

logger = logging.getLogger(__name__)

_PROBE = [{"role": "user", "content": "Say hello."}], "Hello."


class ServedRewardModel:
    """A reward model of the recipe with the key `server`."""

    def __init__(self, options: RewardModelOptions, name: str) -> None:
        """Reads a probe.

        Raises UserError if the server cannot be reached, has another model or refuses the probe.
        """
        if options.server is None:
            raise ValueError(f"reward_models.{name} has no server")
        files = find_reward_model(options, name)
        self.name, self.chat = name, load_reward_model_format(options, name)
        self.max_tokens = declared_positions(files.body)
        self._format = RewardFormat(self.chat, FORMS[files.form].stop)
        where = f"reward_models.{name}.server"
        self._kind = ENGINES[options.server.engine](options.server, where)
        self._server: Server[float] = Server(options.server, where, self._kind)
        self._trial = self._kind.body(self.encode(*_PROBE).tolist())
        self._warn_of_activation(where)

    def encode(self, messages: Messages, response: str, tools: Tools | None = None) -> np.ndarray:
        """RewardFormat.encode"""
        return self._format.encode(messages, response, tools)

    def score(
        self, groups: Sequence[Sequence[np.ndarray]], names: Sequence[str], report: Report = silent
    ) -> list[np.ndarray]:
        """The rewards float32 [K] of every group, in order. A group holds the K conversations of one example.

        names: the examples, for errors. report: as of `score_conversations`, but every few seconds.
        Raises UserError if a conversation gets no reward.
        """
        sizes = [len(group) for group in groups]
        conversations = [ids for group in groups for ids in group]
        labels = [f"{name}, answer {k}" for name, size in zip(names, sizes, strict=True) for k in range(size)]
        bodies = {
            label: self._kind.body(ids.tolist()) for label, ids in zip(labels, conversations, strict=True)
        }
        rewards: dict[str, float] = {}
        lengths = dict(zip(labels, map(len, conversations), strict=True))

        def progress() -> None:
            read = sum(lengths[label] for label in rewards)
            report(len(rewards), read, read / sum(lengths.values()))

        if bodies:
            self._server.ask(bodies, self._trial, rewards.__setitem__, progress)
        return ragged.split(np.array([rewards[label] for label in labels], np.float32), sizes)

    def _warn_of_activation(self, where: str) -> None:
        """Warns if the server's rewards may have passed a sigmoid, although none is asked for."""
        rewards: dict[str, float] = {}
        self._server.ask({"probe": self._trial}, self._trial, rewards.__setitem__, lambda: None)
        if "use_activation" not in self._trial:
            return
        activated = {"activated": self._trial | {"use_activation": True}}
        with suppress(UserError):  # a server that refuses the option cannot be asked
            self._server.ask(activated, self._trial, rewards.__setitem__, lambda: None)
        if rewards["probe"] == rewards.get("activated"):
            logger.warning(
                f"{where}: the server gives the same reward with and without use_activation. If it applies a "
                "sigmoid in both cases, large rewards are equal. Use a vLLM that knows use_activation."
            )
