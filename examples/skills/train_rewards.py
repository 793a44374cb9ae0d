"""Reward models: three small verifiers, of different quality because they train for different lengths of
time.

All are MPT models with one label (MptForSequenceClassification) and go on from one `base`: source beta after
more training on every skill. Three layers learn to verify when they are shown WHERE an answer goes wrong. So
in half of the training answers some digits, letters or days are replaced; a head on every token, dropped
afterwards, tells the replaced ones, and the reward, read at the stop token, tells whether there are any.
(Pairs alone, -log sigmoid(right - wrong), taught next to nothing in this time, and rotary models learned less
than this ALiBi one.)
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lm import encode_chats, fingerprint, fit, packed_losses, padded, replace_directory, seed_all
from make_tokenizers import STOP_TOKENS
from skills import DAYS, FORMS, SKILLS, draw
from torch import Tensor, nn
from train_sources import BETA, FORM_WEIGHTS, ROWS_PER_STEP, training_chats
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

STOP_TOKEN = STOP_TOKENS[BETA.name]
REPLACED = (1, 1, 2, 4, 6)  # how many tokens of a wrong answer are replaced: one of these


@dataclass(frozen=True)
class BaseSettings:
    """The language model that all reward models go on from."""

    steps: int = 450
    seed: int = 20
    lr: float = 7e-3
    #    addition weekday sorting reversing shifting conversion: more of what beta has seen little of
    mix: tuple[float, ...] = (0.22, 0.20, 0.08, 0.08, 0.20, 0.22)

    def directory(self, output: Path) -> Path:
        return output / "rewards-base"

    def hash(self, output: Path) -> str:
        return fingerprint(asdict(self) | {"source": BETA.hash(output)}, Path(__file__))


@dataclass(frozen=True)
class RewardSettings:
    name: str
    steps: int
    seed: int
    answers_per_step: int = 32
    lr: float = 3e-3

    def directory(self, output: Path) -> Path:
        return output / "rewards" / self.name

    def hash(self, output: Path) -> str:
        return fingerprint(asdict(self) | {"base": BASE.hash(output)})


BASE = BaseSettings()
STRONG = RewardSettings("strong", 600, 21)
MIDDLE = RewardSettings("middle", 350, 22)
WEAK = RewardSettings("weak", 200, 23)


def train_base(output: Path, settings: BaseSettings) -> None:
    rng = seed_all(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(BETA.directory(output), trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(BETA.directory(output), trust_remote_code=False)
    packed = training_chats(tokenizer, STOP_TOKEN, settings.mix, settings.steps * ROWS_PER_STEP, rng)
    losses = packed_losses(model, packed, ROWS_PER_STEP)
    fit(model, losses, steps=settings.steps, lr=settings.lr, name="reward models' base")
    save(model, tokenizer, settings.directory(output), settings.hash(output))


def exchangeable_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """For each digit, letter or day token: all tokens of its kind, so that a replacement looks as good as
    what it replaces.
    """
    kinds: dict[str, list[int]] = {"digit": [], "letter": [], "day": []}
    for token in sorted(tokenizer.get_vocab().values()):  # which come in another order in every process
        text = tokenizer.decode([token])
        if len(text) == 1 and text in "0123456789":
            kinds["digit"].append(token)
        elif len(text) == 2 and text[0] == " " and text[1].islower():
            kinds["letter"].append(token)
        elif text[1:] in DAYS:
            kinds["day"].append(token)
    return {token: tokens for tokens in kinds.values() for token in tokens}


def verification_losses(
    model: PreTrainedModel,
    token_head: nn.Linear,
    tokenizer: PreTrainedTokenizerBase,
    settings: RewardSettings,
    rng: random.Random,
) -> Iterator[Callable[[], Tensor]]:
    """Cross-entropy of the replaced tokens, and half of that of the whole answers; every second answer has
    replaced tokens.
    """
    kinds = exchangeable_tokens(tokenizer)

    def loss(chats: list[list[int]], marks: list[list[float]]) -> Tensor:
        ids, mask = padded(chats, tokenizer.pad_token_id, "right")  # [n, l]
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        # 1 replaced, 0 could have been, -1 neither.
        flat = torch.tensor([mark for row in marks for mark in row])
        asked = flat >= 0
        # Few tokens are replaced: without the weight the head would say "none" for a long time.
        replaced = F.binary_cross_entropy_with_logits(
            token_head(hidden[mask.bool()][asked])[:, 0], flat[asked], pos_weight=torch.tensor(3.0)
        )
        right = torch.tensor([float(1.0 not in row) for row in marks])
        scores = model.get_submodule("score")(hidden[torch.arange(len(chats)), mask.sum(1) - 1])[:, 0]
        return replaced + 0.5 * F.binary_cross_entropy_with_logits(scores, right)

    while True:
        pairs = []
        for skill in rng.choices(list(SKILLS), k=settings.answers_per_step):
            problem = draw(skill, "train", rng)
            pairs.append((problem.instruction, problem.response(rng.choices(FORMS, FORM_WEIGHTS)[0])))
        chats, marks = [], []
        for number, (ids, prompt_length) in enumerate(encode_chats(tokenizer, STOP_TOKEN, pairs)):
            places = [at for at in range(prompt_length, len(ids)) if ids[at] in kinds]
            row, changed = [-1.0] * len(ids), list(ids)
            for at in places:
                row[at] = 0.0
            if number % 2:
                for at in rng.sample(places, min(len(places), rng.choice(REPLACED))):
                    changed[at] = rng.choice([token for token in kinds[ids[at]] if token != ids[at]])
                    row[at] = 1.0
            chats.append(changed)
            marks.append(row)
        yield lambda chats=chats, marks=marks: loss(chats, marks)


def train_reward(output: Path, settings: RewardSettings) -> None:
    rng = seed_all(settings.seed)
    base = BASE.directory(output)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, trust_remote_code=False)
    # A part of the model only while it is trained.
    model.add_module("token_head", nn.Linear(model.config.hidden_size, 1))
    losses = verification_losses(model, model.get_submodule("token_head"), tokenizer, settings, rng)
    fit(model, losses, steps=settings.steps, lr=settings.lr, name=f"reward model {settings.name}")
    del model.token_head
    save(model, tokenizer, settings.directory(output), settings.hash(output))


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, settings_hash: str
) -> None:
    with replace_directory(directory, settings_hash) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
