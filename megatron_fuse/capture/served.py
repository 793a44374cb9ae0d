"""A server reads conversations by teacher forcing: it takes the place of a source model in this process.

The server gets our token ids, and gives the likeliest tokens at every place with their log-probabilities at
temperature 1. Relative logits and the log-sum-exp at temperature 1 follow from these. The log-sum-exp at
another temperature does not: that of the given entries takes its place, and recipe/exactness.py refuses
recipes for which this is not exact.

Before the first shard, the server reads a probe. Its tokens must be spelled as our tokenizer spells them, and
it must get the same log-probabilities as the probe of the earlier shards, if there are any.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_fuse.capture.checked_rows import MismatchError, checked_rows
from megatron_fuse.capture.distributions import SparseRows
from megatron_fuse.capture.forms import BadRowError
from megatron_fuse.capture.reading import reading_status
from megatron_fuse.capture.served_forms import ENGINES, ServedRows
from megatron_fuse.capture.shards import CAPTURED, CaptureShard, Conversation
from megatron_fuse.chat import ChatFormat, EncodedConversation
from megatron_fuse.errors import UserError
from megatron_fuse.progress import Report, silent
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.lookup import source_options
from megatron_fuse.sources.request_kind import Body
from megatron_fuse.sources.server import Server
from megatron_fuse.storage import temporary_then_rename
from megatron_fuse.text_safety import brief
from megatron_fuse.tokenization import Tokenizer

_PROBE_TEXT = "The quick brown fox has 12 + 30 = 42 déjà vu.\n\tDone"  # short: a server may read little
_PROBE_FILE = ".probe.tmp"  # a temporary file, which a finished capture no longer has
_FEWEST_SPELLED = 8  # tokens of the probe
# Mean nats: far above the rounding of an engine, and below the difference between two models.
_OTHER_MODEL = 0.1


class ServedReader:
    """The server of a source.

    report: called every few seconds with the conversations and the tokens that are read, and the share of all
    tokens.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: str,
        chat: ChatFormat,
        directory: Path,
        *,
        vocab_size: int,
        positions: int | None,
        report: Report = silent,
    ) -> None:
        """Reads the probe.

        directory: of the capture. vocab_size: the number of ids that the source's model knows. positions: the
        most tokens that it can read, if that is known.
        Raises UserError if the server cannot be reached, refuses the probe, or has another model.
        """
        self.recipe, self.chat, self.vocab_size, self.report = recipe, chat, vocab_size, report
        self.where, server = f"sources.{source}.server", source_options(recipe, source).server
        if server is None:
            raise ValueError(f"sources.{source} has no server")
        # The server reads the last token too, which a model in process only predicts, and adds one.
        seq_length = recipe.training.seq_length
        self.limit = min(seq_length, positions - 2 if positions else seq_length)
        self.entries = min(recipe.capture.top_k, vocab_size)
        longest = max(map(len, chat.tokenizer.token_bytes), default=1)
        self.kind = ENGINES[server.engine](recipe, self.where, server, self.entries, longest)
        self.server: Server[ServedRows] = Server(server, self.where, self.kind)
        messages = [{"role": "user", "content": "Hello."}]
        self.probe = chat.encode_conversation(messages, _PROBE_TEXT, stop=True)
        self._check_probe(directory / _PROBE_FILE)

    def capture_shard(self, conversations: Sequence[Conversation]) -> CaptureShard:
        """Has the conversations read, several at a time.

        Raises UserError, with the example, if one of them gets no rows or rows that cannot be used.
        """
        status = np.array([reading_status(each, self.limit) for each in conversations], np.uint8)
        chosen = {
            conversations[index].example: conversations[index].readable
            for index in np.flatnonzero(status == CAPTURED).tolist()
        }
        rows = self._read(chosen) if chosen else {}
        nothing = SparseRows.none(len(self.recipe.capture_temperatures))
        joined = SparseRows.join([nothing, *(rows[name] for name in chosen)])
        return CaptureShard.of(conversations, status, joined)

    def _read(self, conversations: Mapping[str, EncodedConversation]) -> dict[str, SparseRows]:
        rows: dict[str, SparseRows] = {}
        total, done = sum(len(each.ids) for each in conversations.values()), 0

        def receive(name: str, served: ServedRows) -> None:
            nonlocal done
            rows[name] = self._sparse(name, served, conversations[name])
            done += len(conversations[name].ids)

        def progress() -> None:
            self.report(len(rows), done, done / total)

        bodies = {name: self._body(each) for name, each in conversations.items()}
        self.server.ask(bodies, self._body(self.probe), receive, progress)
        return rows

    def _body(self, conversation: EncodedConversation, *, texts: bool = False) -> Body:
        first = int(np.argmax(conversation.supervised))
        return self.kind.body(conversation.ids.tolist(), first, texts=texts)

    def _sparse(self, name: str, served: ServedRows, conversation: EncodedConversation) -> SparseRows:
        """Checks what the server says of an example. Raises UserError, which names the example."""
        place = f"{self.where}: the answer to example {brief(repr(name), 80)}"
        try:
            rows = checked_rows(
                served.rows,
                conversation,
                self.recipe,
                self.chat.tokenizer,
                self.vocab_size,
                sums_of_entries=True,
            )
        except MismatchError as error:
            raise UserError(
                f"{place} is about other tokens than those that were sent: {error}. Use a server that takes "
                "token ids as they are, without a proxy that changes them."
            ) from error
        except BadRowError as error:
            raise UserError(f"{place} cannot be used: {error}") from error
        fewest = min(len(served.rows.ids[at]) for at in np.flatnonzero(conversation.supervised).tolist())
        if fewest < self.entries:
            raise UserError(
                f"{place} has only {fewest} entries for a token, but capture.top_k asks for {self.entries}. "
                f"Fix {self.where}, {self.kind.advice}."
            )
        return rows

    def _check_probe(self, path: Path) -> None:
        answers: list[ServedRows] = []
        body = self._body(self.probe, texts=True)
        self.server.ask({"probe": body}, body, lambda _, served: answers.append(served), lambda: None)
        (served,) = answers
        rows = self._sparse("probe", served, self.probe)
        if problem := _misspelled(self.chat.tokenizer, self.probe.ids, served.texts):
            raise UserError(
                f"{self.where}: {problem}. Start the server with this source's model and tokenizer, or fix "
                f"{self.where}.url."
            )
        if not any(path.parent.glob("*.done")):  # no shard is finished: an earlier probe binds nobody
            path.unlink(missing_ok=True)
        earlier = _kept_probe(path, rows.token_logprobs)
        difference = float(np.abs(rows.token_logprobs - earlier).mean())
        if not difference <= _OTHER_MODEL:
            raise UserError(
                f"{self.where}: the probe's log-probabilities differ by {difference:.3g} nats on average "
                "from those of the finished shards: the server has another model now. Start "
                f"the earlier model, or remove {path.parent} and capture again."
            )


def _misspelled(tokenizer: Tokenizer, ids: np.ndarray, texts: Sequence[str | None]) -> str | None:
    """What is wrong with the spelling of tokens by the server; None if nothing is.

    Special tokens, parts of characters and white space at the ends are not compared: servers spell these in
    different ways.
    """
    spelled = 0
    for token, text in zip(ids.tolist(), texts, strict=True):
        own = tokenizer.token_bytes[token].decode("utf-8", "replace").strip()
        if text is None or not own or "\N{REPLACEMENT CHARACTER}" in own or token in tokenizer.special_ids:
            continue
        if text.strip() != own:
            return (
                f"the server spells token {token} as {brief(repr(text), 40)}, but the source's tokenizer as "
                f"{own!r}: it has another tokenizer"
            )
        spelled += 1
    if spelled < _FEWEST_SPELLED:
        return "the server does not spell the tokens of its prompt, so that its tokenizer cannot be compared"
    return None


def _kept_probe(path: Path, logprobs: np.ndarray) -> np.ndarray:
    """The log-probabilities of the first probe of this capture, which may be this one."""
    with suppress(OSError, ValueError):
        earlier = np.array(path.read_text(encoding="ascii").split(), np.float32)
        return earlier if len(earlier) == len(logprobs) else np.full_like(logprobs, np.nan)
    with temporary_then_rename(path) as temporary:
        temporary.write_text("".join(f"{value:.6f}\n" for value in logprobs.tolist()), encoding="ascii")
    return logprobs
