"""The training step of a Llama in this version and in another one of the project.

    git worktree add /tmp/other COMMIT
    python benchmarks/step_of_two_versions.py --other /tmp/other

Each version is a process of its own, with one thread. They take turns. A step is the forward and backward
pass of 56 million parameters over 512 tokens, in CPU seconds; the median of the later steps counts.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from table import Measurement, run
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_fuse.runtime import start_runtime

_HERE = Path(__file__).resolve()
_STEP = "--seconds-of-a-step"  # the process of one version
_VOCABULARY, _TOKENS, _ENTRIES = 32000, 512, 10
_UNCOUNTED = 3  # the first steps take memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--other", type=Path, required=True, help="checkout of the other version")
    parser.add_argument("--repeats", type=int, default=6, help="processes of each version; the median counts")
    parser.add_argument("--steps", type=int, default=14, help="steps of a process")


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The project wants a new family not to cost the step of a Llama more than 2 %."""
    versions = (_HERE.parents[1], options.other.resolve())
    turns = [[_seconds(version, options.steps) for version in versions] for _ in range(options.repeats)]
    here, other = (statistics.median(of_one) for of_one in zip(*turns, strict=True))
    return [Measurement("training step of a Llama", here, "s", "the other version", other, "ratio <= 1.02")]


def _seconds(version: Path, steps: int) -> float:
    environment = os.environ | {"PYTHONPATH": f"{version}:{version / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(_HERE), _STEP, str(steps)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def seconds_of_a_step(steps: int) -> float:
    torch.set_num_threads(1)
    start_runtime()
    # Megatron-core may only be imported once the runtime has prepared the process.
    from megatron_fuse.model.architecture import read_architecture
    from megatron_fuse.model.config import transformer_config
    from megatron_fuse.model.conversion import load_hugging_face_weights
    from megatron_fuse.model.gpt import FusionLossOptions, FusionTargets, build_model

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=_VOCABULARY,
        max_position_embeddings=_TOKENS,
    )
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        architecture = read_architecture(directory)
        model = build_model(
            architecture, transformer_config(architecture), loss_options=FusionLossOptions(temperature=2.0)
        )
        load_hugging_face_weights([model], directory)
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randint, _VOCABULARY, generator=generator)
    targets = FusionTargets(
        labels=draw((1, _TOKENS)),
        teacher_ids=draw((1, _TOKENS, _ENTRIES)),
        teacher_logprobs=torch.full((1, _TOKENS, _ENTRIES), 0.08).log(),
        ce_weight=torch.ones(1, _TOKENS),
        kl_weight=torch.full((1, _TOKENS), 0.5),
    )
    tokens, seconds = draw((1, _TOKENS)), []
    for _ in range(steps):
        start = time.process_time()
        losses = model(tokens, None, None, labels=targets)
        losses[0].sum().backward()
        model.zero_grad()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[_UNCOUNTED:])


if __name__ == "__main__":
    if sys.argv[1:2] == [_STEP]:
        print(seconds_of_a_step(int(sys.argv[2])))
    else:
        sys.exit(run(__doc__, add_arguments, measure))
