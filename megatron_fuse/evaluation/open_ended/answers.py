"""The answers of an open-ended evaluation: generated in process, or given in the prompts file.

    OUTPUT/answers/NAME.jsonl     the generated answers of one model, one JSON line each (records.py)

Every model answers in its own chat template, with its own tokens and stop tokens. All models have the same
sampling settings. In a further turn a model sees its own answers to the turns before.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.chat import ChatFormat
from megatron_fuse.evaluation.models import fingerprint
from megatron_fuse.evaluation.open_ended.participants import Participant, format_of
from megatron_fuse.evaluation.open_ended.prompts import Prompt
from megatron_fuse.evaluation.open_ended.records import open_records
from megatron_fuse.evaluation.results import MODEL
from megatron_fuse.huggingface.limits import max_positions
from megatron_fuse.huggingface.loading import load_causal_lm, refuse_unknown_ids
from megatron_fuse.progress import Progress, log_complete
from megatron_fuse.responses.sampled import make_sampling, read_response
from megatron_fuse.responses.stop_texts import StopTexts
from megatron_fuse.sources.generation import Answer as GeneratedIds
from megatron_fuse.sources.generation import Prompt as PromptIds
from megatron_fuse.sources.generation import generate
from megatron_fuse.storage import sha256_of_json

Turn = tuple[str, int]  # id of the prompt, number of the turn from 1


@dataclass(frozen=True)
class Sampling:
    """The settings that all models share.

    limit: only the first so many prompts. temperature 0 is greedy. The seed counts if the temperature is not
    0.
    """

    limit: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer of one model to a turn of a prompt.

    truncated: the token limit cut it off, or its prompt left no room. tokens: None for an answer of the file,
    whose tokenizer is not known. reasoning: the thought before the answer; it is not judged.
    """

    prompt: str
    turn: int
    text: str
    truncated: bool = False
    tokens: int | None = None
    reasoning: str | None = None


Answers = Mapping[Turn, Answer]


def turns_of(prompts: Sequence[Prompt]) -> list[Turn]:
    """All turns in the order in which they are asked: the first ones of all prompts, then the second ones."""
    turns = [(prompt.id, turn) for prompt in prompts for turn in range(1, len(prompt.turns) + 1)]
    return sorted(turns, key=lambda each: each[1])


def given_answers(name: str, prompts: Sequence[Prompt]) -> Answers:
    """The answers of a model in the prompts file. Some may be missing."""
    found = [
        Answer(prompt.id, turn, text)
        for prompt in prompts
        for turn, text in enumerate(prompt.given.get(name, ()), 1)
    ]
    return {(answer.prompt, answer.turn): answer for answer in found}


def conversation(prompt: Prompt, turn: int, answers: Answers) -> list[dict[str, Any]]:
    """The messages that a model answers in a turn, with its own answers to the turns before."""
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(prompt.turns[:turn], 1):
        messages.append({"role": "user", "content": question})
        if number < turn:
            answer = answers[prompt.id, number]
            thought = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
            messages.append({"role": "assistant", "content": answer.text, **thought})
    return messages


class Generator:
    """A participant that generates.

    Its files are checked when it is made, and loaded when they are needed.
    """

    def __init__(self, participant: Participant, sampling: Sampling) -> None:
        if participant.options is None or participant.directory is None:
            raise ValueError(f"{participant.name} generates no answers")
        self.participant, self.sampling = participant, sampling
        self.options, self.directory = participant.options, participant.directory
        self.chat: ChatFormat = format_of(participant)
        self.fingerprint = fingerprint(self.directory)

    def made_from(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Everything that decides the answers.

        The number of tokens in a batch changes them by rounding only.
        """
        return {
            **asdict(self.sampling),
            "prompts": sha256_of_json([[prompt.id, list(prompt.turns)] for prompt in prompts]),
            "dtype": self.options.dtype,
            "stop": self.options.stop,
            "chat format": self.chat.sha256,
            "end tokens": sorted(self.chat.end_ids),
            MODEL: self.fingerprint,
        }

    def check_earlier(self, prompts: Sequence[Prompt], output: Path) -> None:
        """Raises UserError if there are answers of an earlier call that were made from something else."""
        path = self._path(output)
        if path.exists():
            with open_records(path, Answer, self.made_from(prompts)):
                pass

    def _path(self, output: Path) -> Path:
        return output / "answers" / f"{self.participant.name}.jsonl"

    def answers(self, prompts: Sequence[Prompt], output: Path, batch_tokens: int) -> Answers:
        """The answers to all turns. Those of an interrupted call are read and not made again.

        batch_tokens: see generate. Raises UserError if the file of answers was made from something else.
        """
        path, turns = self._path(output), turns_of(prompts)
        with open_records(path, Answer, self.made_from(prompts)) as records:
            answers = {(answer.prompt, answer.turn): answer for answer in records.rows}
            if all(turn in answers for turn in turns):
                log_complete(path, len(turns), "answers")
                return answers

            def add(answer: Answer) -> None:
                answers[answer.prompt, answer.turn] = answer
                records.add(answer)

            model = load_causal_lm(self.options, where=self.participant.where)
            with Progress(path, "answers", len(turns), already=len(answers), most=True) as progress:
                for number in sorted({turn for _, turn in turns}):
                    asked = [
                        prompt
                        for prompt in prompts
                        if len(prompt.turns) >= number and (prompt.id, number) not in answers
                    ]
                    progress.begin_part(len(asked))
                    self._answer_turn(model, asked, number, answers, add, batch_tokens, progress)
                    progress.end_part(len(answers))
        return answers

    def _answer_turn(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        turn: int,
        answers: Answers,
        add: Callable[[Answer], None],
        batch_tokens: int,
        progress: Progress,
    ) -> None:
        """Answers one turn of these prompts, whose turns before are answered."""
        if not prompts:
            return
        stop_texts = StopTexts(self.options.stop, self.chat)
        sampling = make_sampling(
            self.chat, stop_texts, temperature=self.sampling.temperature, top_p=self.sampling.top_p
        )
        asked = [self._encoded(model, prompt, turn, answers) for prompt in prompts]
        refuse_unknown_ids(model, max(max(each.ids) for each in asked), self.participant.where)

        def finished(prompt: PromptIds, ids: GeneratedIds) -> None:
            response = read_response(prompt.name, self.chat, ids, stop_texts)
            if response is None:  # the model ended after its thought
                add(Answer(prompt.name, turn, "", tokens=0))
                return
            add(
                Answer(
                    prompt.name,
                    turn,
                    response.response,
                    response.truncated,
                    response.tokens,
                    response.reasoning,
                )
            )

        generate(
            model,
            asked,
            sampling,
            batch_tokens=batch_tokens,
            report=progress.update,
            finished=finished,
        )

    def _encoded(self, model: Any, prompt: Prompt, turn: int, answers: Answers) -> PromptIds:
        ids = self.chat.encode_prompt(conversation(prompt, turn, answers))
        positions = max_positions(model.config)
        room = self.sampling.max_new_tokens
        if positions is not None:
            room = min(room, positions - len(ids))
        # Without the model's name: one model under two names gives the same answers.
        digest = hashlib.sha256(f"{self.sampling.seed}\0{prompt.id}\0{turn}".encode()).digest()
        return PromptIds(prompt.id, ids, room, int.from_bytes(digest[:16], "little"))
