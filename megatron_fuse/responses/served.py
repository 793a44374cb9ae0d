"""Answers of an OpenAI-compatible server."""

import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fuse.chat import ChatFormat
from megatron_fuse.chat.thoughts import split_thought
from megatron_fuse.claiming import claiming
from megatron_fuse.huggingface.limits import declared_positions
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.instructions import Example, naming_example
from megatron_fuse.progress import Progress
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.lookup import answering_options, recipe_key
from megatron_fuse.responses.answers import Answerer, Response
from megatron_fuse.responses.journal import open_journal
from megatron_fuse.responses.refusals import is_refusal
from megatron_fuse.responses.sampled import example_seed
from megatron_fuse.responses.stop_texts import StopTexts
from megatron_fuse.sources.completions import Completions, Reply
from megatron_fuse.sources.request_kind import Body
from megatron_fuse.sources.server import Server
from megatron_fuse.storage import sha256_of_json
from megatron_fuse.text_safety import brief

logger = logging.getLogger(__name__)

_THOUGHT_END = "</think>"  # the tag if a server keeps thoughts apart and the template has no tag
_SEEDS = 2**31  # llama.cpp takes 32 bits, and the highest means "any"; others take signed 32 or 64 bits
_TRIAL = Example("", None, [{"role": "user", "content": "Say hello."}], "")  # any model can answer it


def served_answers(
    recipe: Recipe, name: str, chat: ChatFormat, directory: Path, progress: Progress
) -> Answerer:
    """Requests answers from the recipe's server for the model with this name.

    Replies for a shard are kept under `directory` until the artifact is complete. A prompt that leaves no
    room is not sent: its answer is empty and truncated, as from a model in process. If the server refuses a
    request but answers others, the answer is None.
    """
    format = _Format(recipe, name, chat)
    longest = max(map(len, chat.tokenizer.token_bytes), default=1)
    kind = Completions(format.server.endpoint, longest)
    server = Server(format.server, f"{recipe_key(name)}.server", kind)
    # A stopped process still has its journal open. Who takes its shard over by claim has one of its own.
    suffix = f".{secrets.token_hex(4)}" if claiming() else ""
    trial = format.body(_TRIAL, max(format.room(_TRIAL), 1))

    def answer(shard: int, examples: list[Example]) -> list[Response | None]:
        rooms = {example.id: format.room(example) for example in examples}
        bodies = {each.id: format.body(each, rooms[each.id]) for each in examples if rooms[each.id] > 0}
        requests = {key: sha256_of_json([key, body]) for key, body in bodies.items()}
        journals = directory.glob(f".answers-{shard:05d}*.tmp")
        with open_journal(directory / f".answers-{shard:05d}{suffix}.tmp", journals) as journal:
            missing = {key: body for key, body in bodies.items() if requests[key] not in journal}
            received = 0

            def receive(key: str, reply: Reply) -> None:
                nonlocal received
                received += 1
                journal.add(requests[key], reply)
                if reply.fault:
                    logger.warning(f"{directory}: no answer to example {brief(repr(key))}: {reply.fault}")

            def report() -> None:
                progress.update(len(examples) - len(missing) + received)

            if missing:
                progress.found(len(examples) - len(missing))
                server.ask(missing, trial, receive, report)
            replies = {key: journal.reply(request) for key, request in requests.items()}
        return [
            format.response(each.id, replies.get(each.id, Reply("", truncated=True))) for each in examples
        ]

    return answer


class _Format:
    """Makes requests of a model's examples, and responses of the server's replies."""

    def __init__(self, recipe: Recipe, name: str, chat: ChatFormat) -> None:
        self.recipe, self.name, self.chat = recipe, name, chat
        options = answering_options(recipe, name)
        if options.server is None:
            raise ValueError(f"{recipe_key(name)} has no server")
        self.server = options.server
        positions = declared_positions(resolve_model(options.model, f"{recipe_key(name)}.model"))
        # Prompt, answer and stop token must fit together, because capture leaves out longer conversations.
        self.limit = min(recipe.training.seq_length, positions or recipe.training.seq_length)
        # A server that gets the prompt as text may not know which tokens end a turn in our template.
        ends = sorted(chat.end_ids, key=lambda token: (token != chat.stop_id, token))
        names = (
            filter(None, map(chat.tokenizer.token_text, ends))
            if self.server.endpoint == "completions"
            else ()
        )
        self.stops = list(dict.fromkeys([*options.stop, *names]))
        self.stop_texts = StopTexts(self.stops, chat)

    def room(self, example: Example) -> int:
        """The most tokens of an answer. Below 1, there is no room for an answer."""
        with naming_example(example):
            prompt = self.chat.encode_prompt(example.prompt(self.chat.system), example.tools)
        return min(self.recipe.responses.max_new_tokens, self.limit - len(prompt))

    def body(self, example: Example, room: int) -> Body:
        """The request as JSON, without keys that the recipe's `extra` sets to null."""
        sampling, server = self.recipe.responses, self.server
        body = {
            "model": server.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": room,
            "seed": example_seed(self.recipe, self.name, example) % _SEEDS,
            "stop": self.stops or None,
            **self._question(example),
            **server.extra,
        }
        return {key: value for key, value in body.items() if value is not None}

    def _question(self, example: Example) -> Body:
        messages = example.prompt(self.chat.system)
        if self.server.endpoint == "chat":
            # If our template takes no system message, it is put before the first user message. The server
            # mostly has the same template.
            question = {"messages": [_plain(message) for message in self.chat.with_system(messages)]}
            # Only text is learned, so the offered tools are context: the model must not call them.
            return question | ({"tools": example.tools, "tool_choice": "none"} if example.tools else {})
        prompt, tokenizer = self.chat.render_prompt(messages, example.tools), self.chat.tokenizer
        # Servers tokenize a prompt like any text. If the tokenizer adds BOS, a BOS of the template would be a
        # second one, so it is removed. If the tokenizer adds none, the template's BOS stays.
        bos = tokenizer.bos_id if tokenizer.adds_bos else None
        return {"prompt": prompt.removeprefix((tokenizer.token_text(bos) if bos is not None else None) or "")}

    def response(self, name: str, reply: Reply) -> Response | None:
        """The response in the common form.

        None if there is no answer: the request failed, or the reply ended without text after its thought or
        at all.
        """
        if reply.fault:
            return None
        thought, answer = self._thought_and_answer(reply)
        # Some servers leave the stop text in the reply, and some
        # notice it only in the last token. So it is cut off here.
        kept = self.stop_texts.cut_answer(answer.encode())
        truncated = reply.truncated and len(kept) == len(answer.encode())
        # If the reply was cut off within a character, it ends in U+FFFD.
        text = kept.decode().rstrip("\N{REPLACEMENT CHARACTER}") if truncated else kept.decode()
        if not (text.strip() or truncated or reply.refused):
            return None
        tokens = len(self.chat.tokenizer.encode_continuation(text))
        return Response(name, text, truncated, tokens, reply.refused or is_refusal(text), thought)

    def _thought_and_answer(self, reply: Reply) -> tuple[str | None, str]:
        """The thought, which the server may keep apart or leave in the text; and the answer, stripped.

        A server may leave the end of a thought in the text. After a prompt that we rendered (endpoint
        `completions`), the whole thought is in the text.
        """
        chat, text = self.chat, reply.text.removeprefix(self.chat.separator)
        server = self.server
        # A chat server that does not keep thoughts apart sends the text after the
        # template's `<think>`. If that text is cut off before the end tag, all of
        # it is thought, unless the recipe sets options of the server's template.
        unmarked = reply.truncated and reply.reasoning is None and "chat_template_kwargs" not in server.extra
        opened = chat.opens_thought and (server.endpoint == "completions" or unmarked)
        end = chat.thought_end or (_THOUGHT_END if reply.reasoning is not None else None)
        thought, answer = split_thought(text, end, opened=opened, cut=reply.truncated)
        if reply.reasoning is not None:
            thought = "\n".join(filter(None, (reply.reasoning.strip(), thought)))
        # A server that removes thoughts leaves the white space after them.
        if thought is not None or chat.thought_end is not None:
            answer = answer.lstrip()
        return thought, answer if reply.truncated or not chat.closing else answer.removesuffix(chat.closing)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form: without this project's mask, and with the arguments of calls as text.

    The thought stays: the server's template prints it or leaves it out.
    """
    keys = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")
    plain = {key: message[key] for key in keys if key in message}
    if "tool_calls" in plain:
        plain["tool_calls"] = [
            call
            | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
            for call in plain["tool_calls"]
            for function in [call["function"]]
        ]
    return plain
