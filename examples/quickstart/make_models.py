"""Train the quickstart's three source models and three reward models, two at a time with one thread each.

    python examples/quickstart/make_models.py --output examples/quickstart/build

Sources, under OUTPUT/sources: alpha (Llama; also the fusion target's first weights, strongest overall), beta (MPT), gamma (GPT-NeoX), each
best at other skills (MIXES). Reward models, under OUTPUT/rewards: each goes on from the source of its name and learns to prefer right answers
to wrong ones, so that each judges best what its source knows. Tokenizers are made first if they are missing.

Every directory is complete (safetensors, tokenizer, chat template), loads offline with AutoModelForCausalLM or
AutoModelForSequenceClassification, and is kept when it was made with the same settings and scripts.
"""

import argparse
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lm import (
    CACHE_FILE,
    encode_chats,
    fingerprint,
    fit,
    is_made,
    pack,
    packed_losses,
    padded,
    replace_directory,
    seed_all,
)
from make_tokenizers import STOP_TOKENS, make_tokenizers
from skills import FORMS, SKILLS, draw, wrong_response
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

ROW_LENGTH = 192
ROWS_PER_STEP = 10
WIDTH, LAYERS, HEADS, POSITIONS = 96, 3, 4, 256
FORM_WEIGHTS = (
    0.25,
    0.45,
    0.3,
)  # short, brief, worked: what a source says when it is trained, hence also when it is sampled

#               addition weekday sorting reversing shifting conversion
MIXES = {
    "alpha": (0.30, 0.30, 0.09, 0.07, 0.12, 0.12),
    "beta": (0.025, 0.025, 0.45, 0.45, 0.025, 0.025),
    "gamma": (0.025, 0.025, 0.025, 0.025, 0.45, 0.45),
}


@dataclass(frozen=True)
class SourceSettings:
    name: str
    steps: int
    seed: int
    lr: float = 7e-3


@dataclass(frozen=True)
class RewardSettings:
    name: str  # the source whose weights it goes on from
    steps: int
    seed: int
    pairs_per_step: int = 32
    lr: float = 3e-3


SOURCES = (SourceSettings("alpha", 950, 11), SourceSettings("gamma", 850, 13), SourceSettings("beta", 360, 12))
REWARDS = (RewardSettings("alpha", 200, 21), RewardSettings("gamma", 200, 23), RewardSettings("beta", 200, 22))


def build(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An untrained model. The vocabulary is padded to a multiple of 64, as real models' often are."""
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    special["vocab_size"] = -(-len(tokenizer) // 64) * 64
    if name == "alpha":
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=256,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=False,
            **special,
        )
        return LlamaForCausalLM(config)
    if name == "beta":
        return MptForCausalLM(
            MptConfig(d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, max_seq_len=POSITIONS, **special)
        )
    config = GPTNeoXConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        rotary_pct=0.5,
        **special,
    )
    return GPTNeoXForCausalLM(config)


def train_source(output: Path, settings: SourceSettings) -> None:
    rng = seed_all(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(output / "tokenizers" / settings.name)
    stop_token = STOP_TOKENS[settings.name]
    rows, chats = settings.steps * ROWS_PER_STEP, []
    packed = pack(chats, ROW_LENGTH)
    while len(packed.ids) < rows:
        pairs = []
        for skill in rng.choices(list(SKILLS), MIXES[settings.name], k=2 * rows):
            problem = draw(skill, "train", rng)
            pairs.append((problem.instruction, problem.response(rng.choices(FORMS, FORM_WEIGHTS)[0])))
        chats += encode_chats(tokenizer, stop_token, pairs)
        packed = pack(chats, ROW_LENGTH)
    model = build(settings.name, tokenizer)
    losses = packed_losses(model, packed, ROWS_PER_STEP)
    fit(model, losses, steps=settings.steps, lr=settings.lr, name=settings.name)
    stop_id = tokenizer.convert_tokens_to_ids(stop_token)
    model.generation_config.update(
        eos_token_id=stop_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    save(model, tokenizer, output / "sources" / settings.name, source_hash(output, settings))


def preference_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: RewardSettings, rng: random.Random
) -> Iterator[Callable[[], Tensor]]:
    """Bradley-Terry: -log sigmoid(score of a right answer - score of a wrong one), both to the same problem, in the same or another form."""

    def loss(chats: list) -> Tensor:
        ids, mask = padded([ids for ids, _ in chats], tokenizer.pad_token_id, "right")
        scores = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        right, wrong = scores.chunk(2)
        return F.softplus(wrong - right).mean()

    while True:
        right, wrong = [], []
        for skill in rng.choices(list(SKILLS), k=settings.pairs_per_step):
            problem = draw(skill, "train", rng)
            forms = rng.choices(FORMS, FORM_WEIGHTS, k=2)
            if rng.random() < 0.5:
                forms[1] = forms[0]
            right.append((problem.instruction, problem.response(forms[0])))
            wrong.append((problem.instruction, wrong_response(problem, forms[1], rng)))
        chats = encode_chats(tokenizer, STOP_TOKENS[settings.name], right + wrong)
        yield lambda chats=chats: loss(chats)


def train_reward(output: Path, settings: RewardSettings) -> None:
    rng = seed_all(settings.seed)
    source = output / "sources" / settings.name
    logging.set_verbosity_error()  # transformers lists the language model's head as unused and the score's as new: both are meant
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(source)
    name = f"reward model {settings.name}"
    fit(model, preference_losses(model, tokenizer, settings, rng), steps=settings.steps, lr=settings.lr, name=name)
    save(model, tokenizer, output / "rewards" / settings.name, reward_hash(output, settings))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, settings_hash: str) -> None:
    with replace_directory(directory, settings_hash) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def source_hash(output: Path, settings: SourceSettings) -> str:
    here = Path(__file__)
    everything = asdict(settings) | {"mix": MIXES[settings.name], "torch": torch.__version__}
    tokenizer = output / "tokenizers" / settings.name / CACHE_FILE
    return fingerprint(everything, here, here.with_name("lm.py"), here.with_name("skills.py"), tokenizer)


def reward_hash(output: Path, settings: RewardSettings) -> str:
    source = next(source for source in SOURCES if source.name == settings.name)
    return fingerprint(asdict(settings) | {"source": source_hash(output, source)})


def one_thread() -> None:
    torch.set_num_threads(1)


def make_models(output: Path, processes: int) -> None:
    """Two at a time, the longest first; a reward model starts when its source is there."""
    sources = [s for s in SOURCES if not is_made(output / "sources" / s.name, source_hash(output, s))]
    rewards = [s for s in REWARDS if not is_made(output / "rewards" / s.name, reward_hash(output, s))]
    print(f"to train: sources {[s.name for s in sources]}, reward models {[s.name for s in rewards]}", flush=True)
    if not rewards and not sources:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=one_thread) as pool:
        running: dict[Future, str | None] = {pool.submit(train_source, output, s): s.name for s in sources}
        absent = set(running.values())
        while True:
            for settings in [s for s in rewards if s.name not in absent]:
                rewards.remove(settings)
                running[pool.submit(train_reward, output, settings)] = None
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                absent.discard(running.pop(future))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "build")
    parser.add_argument(
        "--processes", type=int, default=2, help="how many models are trained at the same time, one thread each"
    )
    options = parser.parse_args()
    began = time.perf_counter()
    make_tokenizers(options.output, seed=1234)
    make_models(options.output, options.processes)
    print(f"models: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
