"""Measure models on the six skills and print one table.

    python examples/skills/evaluate.py alpha=examples/skills/build/sources/alpha fused=runs/fused/export \
        --output runs

Each model is a Hugging Face directory of a Llama, MPT or GPT-NeoX model with its tokenizer and chat template.
Two measures, because they can tell opposite stories (a model that learns to show its working may forget how
to answer at once):

- generation: greedy decoding in the model's own chat template; right when the text ends in "The answer is X."
  with the right X.
- choice: the right "The answer is X." against three wrong ones (a near miss, a value misread, another
  problem's answer), each a whole
  response at once without working, by log-likelihood (chance is 25 %).

Problems are those of `--split` (test by default: no model has been trained on them). Accuracies are in
percent, with the standard error of that many problems; the mean is over skills. OUTPUT gets evaluation.md and
evaluation.json.
"""

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lm import Encoded, encode_chats, encode_prompts, pack, packed_logits, padded
from skills import CLOSING, SKILLS, SPLITS, Problem, answer_of, distinct, wrong_answers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

from megatron_fuse.errors import exit_code
from megatron_fuse.processes import end_with_pool
from megatron_fuse.sources.row_cache import cache_argument

MEASURES = ("generation", "choice")
ROW_LENGTH = 192
MAX_NEW_TOKENS = 110  # the longest worked answer has about 90 in any of the tokenizers


def stop_token_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the chat template writes after a response. ValueError if it writes none."""
    marker = "RESPONSE"
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": marker}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(marker)[2].strip()
    if after not in tokenizer.get_added_vocab() and after not in tokenizer.all_special_tokens:
        raise ValueError(
            f"{tokenizer.name_or_path}: the chat template ends a response with {after!r}, which is not a "
            "special token"
        )
    return after


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompts: list[list[int]], stop_id: int, batch_size: int = 300
) -> list[list[int]]:
    """Greedy responses without their stop token; an unfinished one has MAX_NEW_TOKENS tokens.

    Prompts are taken by length, so that little is padded; answers that have ended leave the batch.
    """
    argument = cache_argument(model.base_model.forward)
    responses: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), batch_size):
        live = order[start : start + batch_size]
        ids, mask = padded([prompts[number] for number in live], 0, "left")
        cache = DynamicCache(config=model.config)
        for _ in range(MAX_NEW_TOKENS):
            inputs = {"input_ids": ids, "attention_mask": mask, argument: cache, "use_cache": True}
            if model.config.model_type != "mpt":  # ALiBi looks at distances only
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
            hidden = model.base_model(**inputs).last_hidden_state[:, -1]
            ids = model.get_output_embeddings()(hidden).argmax(-1, keepdim=True)  # [n, 1]
            going = (ids[:, 0] != stop_id).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(live):
                live, ids, mask = [live[row] for row in going], ids[going], mask[going]
                cache.batch_select_indices(going)
            for number, token in zip(live, ids[:, 0].tolist(), strict=True):
                responses[number].append(token)
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
    return responses


@torch.inference_mode()
def response_logprobs(model: PreTrainedModel, chats: list[Encoded], rows_per_batch: int = 64) -> np.ndarray:
    """Sum of log p over each response's tokens, the stop token included. [n] float64."""
    packed, logprobs = pack(chats, ROW_LENGTH), []
    for start in range(0, len(packed.ids), rows_per_batch):
        logits, labels = packed_logits(model, packed, slice(start, start + rows_per_batch))
        logprobs.append(-F.cross_entropy(logits, labels, reduction="none").double().numpy())
    lengths = [len(ids) - prompt_length for ids, prompt_length in chats]
    return np.add.reduceat(np.concatenate(logprobs), np.cumsum([0, *lengths[:-1]]))


def choices(problems: list[Problem], seed: int = 5) -> list[tuple[str, str]]:
    """Four (instruction, response) pairs a problem, the right one first; the same for every model."""
    rng = random.Random(seed)
    options = [[problem.answer, *wrong_answers(problem, rng)] for problem in problems]
    return [
        (p.instruction, f"{CLOSING}{text}.")
        for p, texts in zip(problems, options, strict=True)
        for text in texts
    ]


def per_skill(problems: list[Problem], right: list[bool]) -> dict:
    """Accuracy and its standard error in percent, for each skill and their mean."""
    table = {}
    for skill in SKILLS:
        hits = [hit for problem, hit in zip(problems, right, strict=True) if problem.skill == skill]
        share = sum(hits) / len(hits)
        error = math.sqrt(share * (1 - share) / len(hits))
        table[skill] = {"accuracy": 100 * share, "standard_error": 100 * error, "problems": len(hits)}
    return table | {"mean": mean(table, SKILLS)}


def mean(table: dict[str, dict], names: Iterable[str]) -> dict[str, float]:
    """The mean accuracy over these skills of a table of per_skill, with its standard error."""
    rows = [table[name] for name in names]
    return {
        "accuracy": sum(row["accuracy"] for row in rows) / len(rows),
        "standard_error": math.sqrt(sum(row["standard_error"] ** 2 for row in rows)) / len(rows),
        "problems": sum(row["problems"] for row in rows),
    }


def learned_and_kept(table: dict[str, dict], taught: Sequence[str]) -> dict[str, dict[str, float]]:
    """The mean over the skills that the instructions teach, and over the others if there are any."""
    others = [skill for skill in SKILLS if skill not in taught]
    return {"learned": mean(table, taught)} | ({"kept": mean(table, others)} if others else {})


def evaluate(directory: Path, split: str, problems_per_skill: int, seed: int) -> dict:
    """Both measures of one model, its mean response length in tokens, one sample per skill, and the
    seconds it took.
    """
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False
    ).eval()
    stop_token = stop_token_of(tokenizer)
    problems = distinct(split, problems_per_skill, seed)
    prompts = encode_prompts(tokenizer, [problem.instruction for problem in problems])
    responses = generate(model, prompts, tokenizer.convert_tokens_to_ids(stop_token))
    texts = [tokenizer.decode(response).strip() for response in responses]
    generated = [answer_of(text) == problem.answer for text, problem in zip(texts, problems, strict=True)]
    logprobs = response_logprobs(model, encode_chats(tokenizer, stop_token, choices(problems))).reshape(-1, 4)
    firsts = range(0, len(problems), problems_per_skill)
    return {
        "directory": str(directory),
        "generation": per_skill(problems, generated),
        "choice": per_skill(problems, (logprobs[:, 0] > logprobs[:, 1:].max(1)).tolist()),
        "mean_response_tokens": sum(map(len, responses)) / len(responses),
        "samples": [
            {"instruction": problems[n].instruction, "response": texts[n], "right": generated[n]}
            for n in firsts
        ],
        "seconds": time.perf_counter() - began,
    }


def markdown(results: dict[str, dict], taught: Sequence[str] = tuple(SKILLS)) -> str:
    """One table, a row for each model and measure; means with their standard errors.

    taught: if it is not all skills, the means over the taught and over the other skills come first.
    """
    means = ["learned", "kept"] if set(taught) < set(SKILLS) else []
    skills = [*taught, *(skill for skill in SKILLS if skill not in taught)]
    heads = ["model", "measure", *means, *skills, "mean"]
    rows = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for measure in MEASURES:
        for name, result in results.items():
            table = result[measure] | learned_and_kept(result[measure], taught)
            accuracies = {skill: f"{table[skill]['accuracy']:.0f}" for skill in skills}
            for key in (*means, "mean"):
                accuracies[key] = f"{table[key]['accuracy']:.1f} ± {table[key]['standard_error']:.1f}"
            rows.append([name, measure, *(accuracies[head] for head in heads[2:])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    justify = [str.ljust, str.ljust, *[str.rjust] * (len(heads) - 2)]
    lines = [
        [put(cell, width) for put, cell, width in zip(justify, row, widths, strict=True)] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME=DIRECTORY", help="models, in the table's order")
    parser.add_argument("--output", type=Path, help="directory for evaluation.md and evaluation.json")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument(
        "--per-skill",
        type=int,
        default=100,
        help="problems of each skill (the skill `conversion` has only about 100 in the split test)",
    )
    parser.add_argument(
        "--taught",
        nargs="+",
        choices=SKILLS,
        default=list(SKILLS),
        help="the skills that the instructions taught; the table gives means of these and of the others",
    )
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument(
        "--processes", type=int, default=2, help="models measured at the same time, one thread each"
    )
    options = parser.parse_args()
    names, _, directories = zip(*(model.partition("=") for model in options.models), strict=True)
    wrong = [
        model
        for model, directory in zip(options.models, directories, strict=True)
        if not Path(directory, "config.json").is_file()
    ]
    if wrong:
        sys.exit(
            f"error: {', '.join(wrong)}: no config.json there. Write each model as NAME=DIRECTORY, with a "
            "config.json in the directory."
        )
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), end_with_pool) as pool:
        jobs = [
            pool.submit(evaluate, Path(d), options.split, options.per_skill, options.seed)
            for d in directories
        ]
        results = {name: job.result() for name, job in zip(names, jobs, strict=True)}
    table = markdown(results, options.taught)
    print(
        f"accuracy in percent, split {options.split}, {options.per_skill} problems of each skill (choice: "
        f"chance is 25)\n\n{table}"
    )
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        settings = {"split": options.split, "per_skill": options.per_skill, "seed": options.seed}
        settings |= {"taught": options.taught}
        (options.output / "evaluation.md").write_text(table, encoding="utf-8")
        (options.output / "evaluation.json").write_text(
            json.dumps(settings | {"models": results}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
