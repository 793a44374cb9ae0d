"""Models of one family, which merging needs: `ancestor`, and `numbers` and `letters`, which go on from its
weights.

All are of alpha's architecture and have its tokenizer. The ancestor sees all six skills for a while, each of
its descendants then gives 80 % of its training to three of them: what the paper merges, Vicuna and
Llama-2-chat over Llama-2, on a small scale.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from lm import CACHE_FILE, fingerprint, fit, is_made, packed_losses, replace_directory, seed_all
from make_models import be_modest
from make_tokenizers import STOP_TOKENS
from train_sources import ROWS_PER_STEP, build, training_chats
from transformers import AutoModelForCausalLM, AutoTokenizer

FAMILY = "alpha"


@dataclass(frozen=True)
class Relative:
    name: str
    #    addition weekday sorting reversing shifting conversion
    mix: tuple[float, ...]
    steps: int
    seed: int
    lr: float = 7e-3
    ancestor: str | None = None

    def directory(self, output: Path) -> Path:
        return output / "sources" / self.name

    def hash(self, output: Path) -> str:
        here = Path(__file__)
        scripts = [here.with_name(name) for name in (here.name, "train_sources.py", "lm.py", "skills.py")]
        made_of = output / "sources" / self.ancestor if self.ancestor else output / "tokenizers" / FAMILY
        return fingerprint(asdict(self) | {"torch": torch.__version__}, *scripts, made_of / CACHE_FILE)


ANCESTOR = Relative("ancestor", (1 / 6,) * 6, 400, 21)
DESCENDANTS = (
    Relative("numbers", (0.27, 0.27, 0.06, 0.07, 0.07, 0.26), 500, 22, 4e-3, "ancestor"),
    Relative("letters", (0.06, 0.07, 0.27, 0.26, 0.27, 0.07), 400, 23, 4e-3, "ancestor"),
)


def train(output: Path, relative: Relative) -> None:
    rng = seed_all(relative.seed)
    tokenizer = AutoTokenizer.from_pretrained(output / "tokenizers" / FAMILY, trust_remote_code=False)
    stop_token = STOP_TOKENS[FAMILY]
    packed = training_chats(tokenizer, stop_token, relative.mix, relative.steps * ROWS_PER_STEP, rng)
    start = output / "sources" / relative.ancestor if relative.ancestor else None
    model = (
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, trust_remote_code=False)
        if start
        else build(FAMILY, tokenizer)
    )
    model.train()
    fit(
        model,
        packed_losses(model, packed, ROWS_PER_STEP),
        steps=relative.steps,
        lr=relative.lr,
        name=relative.name,
    )
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "pad_token_id")}
    model.generation_config.update(eos_token_id=tokenizer.convert_tokens_to_ids(stop_token), **special)
    with replace_directory(relative.directory(output), relative.hash(output)) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def make_relatives(output: Path, processes: int, seed: int = 0) -> None:
    """Trains what is missing; the tokenizers have to be there. seed: of the whole set."""
    for settings in ((ANCESTOR,), DESCENDANTS):
        generation = [replace(relative, seed=relative.seed + 1000 * seed) for relative in settings]
        todo = [
            relative
            for relative in generation
            if not is_made(relative.directory(output), relative.hash(output))
        ]
        print(
            "to train:",
            ", ".join(str(relative.directory(output)) for relative in todo) or "nothing",
            flush=True,
        )
        if todo:
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), be_modest) as pool:
                list(pool.map(train, [output] * len(todo), todo))
