"""Train three source models and three reward models, two at a time with one thread each.

    python examples/skills/make_models.py --output examples/skills/build

| directory under OUTPUT     | content                                                                |
|----------------------------|------------------------------------------------------------------------|
| sources/alpha, beta, gamma | Llama (also the fusion target's first weights), MPT, GPT-NeoX          |
|                            | (train_sources.py)                                                     |
| rewards/strong, middle,    | sequence classifiers with one label (train_rewards.py)                 |
| weak                       |                                                                        |
| rewards-base               | the model from which the training of the reward models begins          |
| tokenizers                 | made first if they are missing (make_tokenizers.py)                    |

Every directory is complete (safetensors, tokenizer, chat template), loads offline with AutoModelForCausalLM
or AutoModelForSequenceClassification, and is kept when it was made with the same settings and scripts.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import torch
from lm import is_made
from make_tokenizers import make_tokenizers
from train_rewards import BASE, MIDDLE, STRONG, WEAK, BaseSettings, RewardSettings, train_base, train_reward
from train_sources import ALPHA, BETA, GAMMA, SourceSettings, train_source
from transformers.utils import logging

from megatron_fuse.errors import exit_code
from megatron_fuse.processes import end_with_pool

Settings = SourceSettings | BaseSettings | RewardSettings

# What is trained, by what, and what has to be there before; what others wait for comes first.
JOBS: dict[Settings, tuple[Callable[[Path, Settings], None], Settings | None]] = {
    BETA: (train_source, None),
    GAMMA: (train_source, None),
    BASE: (train_base, BETA),
    STRONG: (train_reward, BASE),
    ALPHA: (train_source, None),
    MIDDLE: (train_reward, BASE),
    WEAK: (train_reward, BASE),
}


def reseeded(settings: Settings, seed: int) -> Settings:
    # So that no two models of any sets have the same.
    return replace(settings, seed=settings.seed + 1000 * seed)


def be_modest() -> None:
    """In each process: an end with this one, one thread, and none of the notes on new and unused weights
    that a changed head is bound to cause.
    """
    end_with_pool()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make_models(output: Path, processes: int, seed: int = 0, further: Sequence[SourceSettings] = ()) -> None:
    """Trains the missing models in the order of JOBS. A model that continues another one waits for it.

    seed: of the whole set. further: sources beyond those of JOBS.
    """
    jobs = {
        reseeded(settings, seed): (train, after and reseeded(after, seed))
        for settings, (train, after) in {**JOBS, **dict.fromkeys(further, (train_source, None))}.items()
    }
    todo = [settings for settings in jobs if not is_made(settings.directory(output), settings.hash(output))]
    if not todo:
        print(f"{output}: all models were made before")
        return
    print("to train:", ", ".join(str(settings.directory(output)) for settings in todo), flush=True)
    running: dict[Future, Settings] = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), be_modest) as pool:
        while todo or running:
            unfinished = [*todo, *running.values()]
            ready = [settings for settings in todo if jobs[settings][1] not in unfinished]
            for settings in ready[: processes - len(running)]:
                todo.remove(settings)
                running[pool.submit(jobs[settings][0], output, settings)] = settings
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                del running[future]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "build")
    parser.add_argument(
        "--processes", type=int, default=2, help="models trained at the same time, one thread each"
    )
    options = parser.parse_args()
    began = time.perf_counter()
    make_tokenizers(options.output, seed=1234)
    make_models(options.output, options.processes)
    print(f"tokenizers and models: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
