"""Answers that a model in process samples. Each answer has a random stream of its own."""

import codecs
import hashlib
from functools import cache

import numpy as np
import torch

from megatron_fuse import ragged
from megatron_fuse.chat import ChatFormat
from megatron_fuse.chat.thoughts import split_thought
from megatron_fuse.huggingface.limits import max_positions
from megatron_fuse.huggingface.loading import load_causal_lm, refuse_unknown_ids
from megatron_fuse.instructions import Example, naming_example
from megatron_fuse.progress import Report, silent
from megatron_fuse.recipe import Recipe
from megatron_fuse.recipe.lookup import answering_options, recipe_key
from megatron_fuse.responses.answers import Answerer, Response
from megatron_fuse.responses.refusals import is_refusal
from megatron_fuse.responses.stop_texts import StopTexts
from megatron_fuse.sources.generation import Answer, Prompt, Sampling, generate


def sampled_answers(recipe: Recipe, name: str, chat: ChatFormat, report: Report = silent) -> Answerer:
    """Samples answers of the model with this name in the recipe. It is loaded at the first missing shard.

    report: see generate.
    """
    options, where = answering_options(recipe, name), recipe_key(name)
    stop_texts = StopTexts(options.stop, chat)
    sampling = make_sampling(
        chat, stop_texts, temperature=recipe.responses.temperature, top_p=recipe.responses.top_p
    )
    model = cache(lambda: load_causal_lm(options, where=where))

    def answer(shard: int, examples: list[Example]) -> list[Response | None]:
        prompts = _prompts(recipe, name, model(), chat, examples)
        batch_tokens = recipe.responses.batch_tokens
        answers = generate(model(), prompts, sampling, batch_tokens=batch_tokens, report=report)
        return [
            read_response(example.id, chat, each, stop_texts)
            for example, each in zip(examples, answers, strict=True)
        ]

    return answer


def example_seed(recipe: Recipe, name: str, example: Example) -> int:
    """128 bits that depend only on the recipe's seed, the model's name and the example's id.

    They do not depend on the batch, the order of examples or the rank.
    """
    digest = hashlib.sha256(f"{recipe.seed}\0{name}\0{example.id}".encode()).digest()
    return int.from_bytes(digest[:16], "little")


def _prompts(recipe: Recipe, name: str, model, chat: ChatFormat, examples: list[Example]) -> list[Prompt]:
    # Prompt, answer and stop token must fit together, because capture leaves out longer conversations.
    limit = min(recipe.training.seq_length, max_positions(model.config) or recipe.training.seq_length)
    prompts = []
    for example in examples:
        with naming_example(example):
            ids = chat.encode_prompt(example.prompt(chat.system), example.tools)
        room = min(recipe.responses.max_new_tokens, limit - len(ids))
        prompts.append(Prompt(example.id, ids, room, example_seed(recipe, name, example)))
    refuse_unknown_ids(model, max(max(prompt.ids) for prompt in prompts), recipe_key(name))
    return prompts


def make_sampling(chat: ChatFormat, stop_texts: StopTexts, *, temperature: float, top_p: float) -> Sampling:
    """How a model in process samples its answers. temperature 0 is greedy."""
    tokenizer = chat.tokenizer
    # Special tokens, unused ids and columns of the logits beyond the vocabulary have no text, so they are
    # never sampled. End tokens and the tags of thoughts are the exceptions.
    allowed = torch.from_numpy(tokenizer.byte_lengths > 0)
    allowed[sorted({*chat.end_ids, *chat.thought_tags})] = True
    return Sampling(
        chat.end_ids,
        allowed,
        temperature=temperature,
        top_p=top_p,
        is_complete=stop_texts.completed_by if stop_texts.texts else None,
    )


def read_response(name: str, chat: ChatFormat, answer: Answer, stop_texts: StopTexts) -> Response | None:
    """The response in the common form. None if the model ended after its thought, without an answer."""
    text, tokens = answer_text(chat, answer, stop_texts)
    thought, text = split_thought(text, chat.thought_end, opened=chat.opens_thought, cut=not answer.stopped)
    if thought is not None:
        if not text and answer.stopped:
            return None
        tokens = len(chat.tokenizer.encode_continuation(text))
    return Response(name, text, not answer.stopped, tokens, is_refusal(text), thought)


def answer_text(chat: ChatFormat, answer: Answer, stop_texts: StopTexts | None = None) -> tuple[str, int]:
    """The exact text of generated ids before the first stop text, and the number of ids that contain it.

    White space that the template itself prints before or after a response is left out. A character that the
    token limit cut in two is left out too. Bytes that are not UTF-8 become U+FFFD.
    """
    data = chat.spelled(answer.ids)
    space = len(chat.separator) if data.startswith(chat.separator.encode()) else 0
    kept = stop_texts.cut(data[space:]) if stop_texts else data[space:]
    if answer.stopped and len(kept) == len(data) - space:
        kept = kept.removesuffix(chat.closing.encode())
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(kept, final=answer.stopped)
    lengths = chat.tokenizer.byte_lengths[np.array(answer.ids, np.int64)]
    return text, int(np.sum(ragged.offsets(lengths)[:-1] < space + len(kept)))
