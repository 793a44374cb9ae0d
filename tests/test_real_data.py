"""The whole road on real text with real tokenizers at their full vocabularies; needs ../shared/data beside
the repository.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MptConfig,
    MptForCausalLM,
)

from megatron_fuse.chat import load_chat_format
from megatron_fuse.dataset import FusionDataset
from megatron_fuse.recipe import load_recipe
from megatron_fuse.tokenization import load_tokenizer

ROOT = Path(__file__).parents[1]
DATA = ROOT / "../shared/data"
SEQ_LENGTH, STEPS, BATCH = 224, 100, 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there"),
]


def train(model: torch.nn.Module, documents: list[list[int]], seed: int) -> None:
    """A few minutes of next-token prediction: enough to know common words, so that entries can be read
    against the text.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS, pct_start=0.1)
    for _ in range(STEPS):
        chosen = [document[:SEQ_LENGTH] for document in draw.sample(documents, BATCH)]
        width = max(map(len, chosen))
        ids = torch.tensor([document + [0] * (width - len(document)) for document in chosen])
        mask = torch.tensor([[1] * len(document) + [0] * (width - len(document)) for document in chosen])
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        kept = mask[:, 1:].bool()
        logits = model.get_output_embeddings()(hidden[kept])
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][kept])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("real")
    tokenizers = {
        "llama": DATA / "tokenizers/llama2/tokenizer.model",
        "mpt": DATA / "tokenizers/gpt_neox_mpt/tokenizer.json",
    }
    templates = {"llama": "vicuna_v1.1", "mpt": "chatml"}
    llama = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=32000, max_position_embeddings=512, **llama)),
        "mpt": MptForCausalLM(
            MptConfig(vocab_size=50432, d_model=128, n_heads=4, n_layers=2, max_seq_len=512)
        ),
    }
    rows = [json.loads(line) for line in (DATA / "instructions/gpt4.jsonl").open()]
    for seed, (name, model) in enumerate(models.items()):
        (directory / name).mkdir()
        shutil.copy(tokenizers[name], directory / name)
        if name == "mpt":  # the file alone does not say which token ends a text
            special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
            (directory / name / "tokenizer_config.json").write_text(json.dumps(special))
        chat = load_chat_format(load_tokenizer(directory / name), templates[name])
        documents = [
            chat.encode_conversation(
                [{"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()}], row["output"]
            )
            for row in rows
        ]
        train(model, [document.ids.tolist() for document in documents], seed)
        model.save_pretrained(directory / name)
    reward_model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=32000, max_position_embeddings=512, num_labels=1, pad_token_id=None, **llama)
    )
    reward_model.save_pretrained(directory / "reward")
    shutil.copy(tokenizers["llama"], directory / "reward")
    recipe = {
        "workdir": str(directory / "work"),
        "target": {"model": str(directory / "llama"), "chat_template": "vicuna_v1.1"},
        "sources": {
            name: {"model": str(directory / name), "dtype": "fp32", "chat_template": templates[name]}
            for name in models
        },
        "reward_models": {
            "reward": {"model": str(directory / "reward"), "dtype": "fp32", "chat_template": "vicuna_v1.1"}
        },
        "data": {"path": str(DATA / "instructions/gpt4.jsonl"), "samples": 336, "validation_samples": 16},
        "responses": {"max_new_tokens": 64},
        "schedule": {"preset": "profuser"},
        "training": {
            "seq_length": SEQ_LENGTH,
            "micro_batch_size": 8,
            "global_batch_size": 16,
            "lr": 1e-3,
            "precision": "fp32",
            "log_interval": 5,
        },
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(*command: str, processes: int = 1) -> str:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if processes > 1 else "2"}
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_all_stages_and_both_phases(recipe_file: Path, layout: str) -> None:
    workdir = recipe_file.parent / "work"
    run("tools/run_recipe.py", "--recipe", str(recipe_file), "--until", "fusion data")
    output = run(
        "pretrain_fuse.py", "--recipe", str(recipe_file), f"--{layout}-model-parallel-size", "2",
        "--save", str(workdir / layout), processes=2,
    )  # fmt: skip
    print(output)
    validation = re.findall(r"validation at .*", output)
    values = [dict(re.findall(r"(\S+): (\d\S*)", line)) for line in validation]
    assert len(values) == 3  # before, between the phases (20 steps each epoch), at the end
    for name in ("ce/inference", "kl/inference", "ce/training", "kl/training"):
        print(name, [value[name] for value in values])
    start, between, end = ({name: float(number) for name, number in value.items()} for value in values)
    # Each mode's cross-entropy falls once a phase teaches it; the first phase, on the sources' own poor
    # texts, may raise the other.
    assert end["ce/inference"] < start["ce/inference"]
    assert end["ce/training"] < between["ce/training"]
    assert end["kl/inference"] < start["kl/inference"] and end["kl/training"] < start["kl/training"]


def first_with_rows(recipe_file: Path, mode: str, source: str) -> int:
    """An example with a long enough answer: such a small model's own one may be empty, and is then left
    out.
    """
    dataset = FusionDataset(load_recipe(argv=["--recipe", str(recipe_file)]))
    return next(
        i
        for i in range(len(dataset.example_ids))
        if (dataset.document(mode, i, source).counts > 0).sum() > 30
    )


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_teacher_entries_read_against_the_text(recipe_file: Path, mode: str) -> None:
    index = first_with_rows(recipe_file, mode, "mpt")
    options = ["--recipe", str(recipe_file), "--index", str(index), "--mode", mode, "--source", "mpt"]
    print(run("tools/inspect_data.py", *options)[:6000])
    shown = json.loads(run("tools/inspect_data.py", *options, "--json"))
    rows = [token for token in shown["tokens"] if token["supervised"] and token["match"] == "exact"]
    assert len(rows) > 10
    named = [token for token in rows if token["id"] in {entry["id"] for entry in token["entries"]}]
    # A small model's ten likeliest tokens hold the right one far more often than ten of 32000 at random
    # would; what it sampled itself, from a distribution as flat as its own, less often than real text.
    assert len(named) > {"training": 0.25, "inference": 0.1}[mode] * len(rows)
