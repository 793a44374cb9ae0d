"""The road of the inference mode over real models' answers to MT-Bench, from files to the report; needs
../shared/data.

The answers are those of vicuna-7b-v1.5, llama-2-7b-chat and mpt-7b-chat, read by small random models with the
real tokenizers.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sentencepiece import SentencePieceProcessor
from small_models import write_rows
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MptConfig,
    MptForCausalLM,
)

from megatron_fuse.dataset import FusionDataset
from megatron_fuse.recipe import load_recipe

RougeScorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer
sentence_bleu = pytest.importorskip("sacrebleu").sentence_bleu

ROOT = Path(__file__).parents[1]
DATA = ROOT / "../shared/data"
ANSWERS = DATA / "responses/mt_bench.jsonl"
SOURCES = {"vicuna": "vicuna-7b-v1.5", "llama2": "llama-2-7b-chat", "mpt": "mpt-7b-chat"}
REWARD_MODELS = ("first", "second", "third")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES = {"vicuna": "vicuna_v1.1", "llama2": "llama2", "mpt": "chatml"}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ANSWERS.exists(), reason=f"{ANSWERS} is not there")]


def save(directory: Path, model: torch.nn.Module) -> Path:
    """With the tokenizer of its family."""
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    if isinstance(model, MptForCausalLM):
        shutil.copy(DATA / "tokenizers/gpt_neox_mpt/tokenizer.json", directory)
        special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
        (directory / "tokenizer_config.json").write_text(json.dumps(special))
    else:
        shutil.copy(DATA / "tokenizers/llama2/tokenizer.model", directory)
    return directory


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mt_bench")
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **LLAMA)
    models = {
        "vicuna": LlamaForCausalLM(llama),
        "llama2": LlamaForCausalLM(llama),
        "mpt": MptForCausalLM(
            MptConfig(vocab_size=50432, d_model=16, n_heads=2, n_layers=1, max_seq_len=2048)
        ),
    }
    rows = [json.loads(line) for line in ANSWERS.open()]
    data = [
        {key: row[key] for key in ("id", "category", "instruction")} | {"output": row["responses"]["gpt-4"]}
        for row in rows
    ]
    reward_model = LlamaConfig(
        vocab_size=32000, max_position_embeddings=2048, num_labels=1, pad_token_id=None, **LLAMA
    )
    reward_models = {
        name: save(root / name, LlamaForSequenceClassification(reward_model)) for name in REWARD_MODELS
    }
    matches = {"match": "id"}, {"match": "prompt", "prompt": "instruction"}, {"match": "id"}
    recipe = {
        "workdir": str(root / "work"),
        "target": {"model": str(root / "vicuna"), "chat_template": "vicuna_v1.1"},
        "sources": {
            name: {
                "model": str(save(root / name, model)),
                "dtype": "fp32",
                "chat_template": TEMPLATES[name],
                "responses": {"path": str(ANSWERS), "response": f"responses.{SOURCES[name]}", **match},
            }
            for (name, model), match in zip(models.items(), matches, strict=True)
        },
        "reward_models": {
            name: {"model": str(path), "dtype": "fp32", "chat_template": "vicuna_v1.1"}
            for name, path in reward_models.items()
        },
        "reference": {"without_bertscore": "renormalize"},
        "data": {"path": str(write_rows(root / "data.jsonl", data))},
        "schedule": {"preset": "profuser"},
        "training": {"seq_length": 2048},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def closest_to_the_truth(rows: list[dict], root: Path) -> list[str]:
    """The winners by BLEU and ROUGE-L, half each, of the packages called directly."""
    rouge = RougeScorer(["rougeL"])

    def score(row: dict, name: str) -> float:
        answer, truth = row["responses"][SOURCES[name]], row["responses"]["gpt-4"]
        return sentence_bleu(answer, [truth]).score / 100 + rouge.score(truth, answer)["rougeL"].fmeasure

    return [max(SOURCES, key=lambda name: score(row, name)) for row in rows]


def most_votes(rows: list[dict], root: Path) -> list[str]:
    """The winners by rewards of one conversation at a time, with the ids of the vocabulary's own package."""
    tokenizer = SentencePieceProcessor(str(DATA / "tokenizers/llama2/tokenizer.model"))
    reward_models = [
        LlamaForSequenceClassification.from_pretrained(root / reward_model).eval()
        for reward_model in REWARD_MODELS
    ]
    winners = []
    for row in rows:
        rewards = np.zeros((len(SOURCES), len(REWARD_MODELS)))
        for place, name in enumerate(SOURCES.values()):
            text = f"{SYSTEM} USER: {row['instruction']} ASSISTANT: {row['responses'][name]}"
            ids = torch.tensor([tokenizer.encode(text, add_bos=True, add_eos=True)])
            with torch.inference_mode():
                rewards[place] = [reward_model(ids).logits.item() for reward_model in reward_models]
        votes = np.bincount(rewards.argmax(0), minlength=len(SOURCES))
        winners.append(max(range(len(SOURCES)), key=lambda place: (votes[place], rewards[place, 0])))
    return [list(SOURCES)[winner] for winner in winners]


@pytest.mark.parametrize("rule, independent", [("reference", closest_to_the_truth), ("vote", most_votes)])
def test_from_given_answers_to_the_report(
    recipe_file: Path, rule: str, independent: Callable[[list[dict], Path], list[str]]
) -> None:
    rows = [json.loads(line) for line in ANSWERS.open()]
    option = ["--selection-inference", rule]
    run("tools/run_recipe.py", "--recipe", str(recipe_file), "--until", "fusion data", *option)
    dataset = FusionDataset(load_recipe(argv=["--recipe", str(recipe_file), *option]))
    assert dataset.example_ids == [row["id"] for row in rows]
    winners = [dataset.selected_source("inference", example) for example in range(len(rows))]
    assert winners == independent(rows, recipe_file.parent)
    assert len(set(winners)) == len(SOURCES)
    for example, (row, winner) in enumerate(zip(rows, winners, strict=True)):
        document = dataset.document("inference", example)
        assert document.supervised.any(), (row["id"], winner)
    printed = run("tools/report.py", "advantage", "--recipe", str(recipe_file), *option)
    report = Path(printed.split("written to ")[1].strip())
    assert (report / "advantage.html").stat().st_size > 0
    shown = json.loads((report / "advantage.json").read_text())
    assert {group["group"] for group in shown["groups"]["category"]} == {row["category"] for row in rows}
    assert shown["examples"]["counted"] == len(rows)
    won = {source: shown["wins"]["inference"][source]["examples"] for source in SOURCES}
    assert won == {source: winners.count(source) for source in SOURCES}
