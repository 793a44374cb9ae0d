"""Measure one model on the skills and write what an experiment asks for: {metric: {value, n}}.

    python examples/skills/measure.py --model DIRECTORY --output FILE.json --split dev --seed 1

Metrics: `generation` and `choice`, as evaluate.py defines them, means over the skills in percent, and each of
them by skill. With --scenario (scenarios.py) also `learned` and `kept`: `generation` over the skills that
the instructions teach, and over the others.
"""

import argparse
import json
from pathlib import Path

from evaluate import MEASURES, evaluate, learned_and_kept
from scenarios import SCENARIOS
from skills import SPLITS

from megatron_fuse.errors import exit_code


def metric(accuracy: dict[str, float]) -> dict[str, float]:
    """A row of evaluate.per_skill as an experiment asks for it."""
    return {"value": accuracy["accuracy"], "n": accuracy["problems"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--seed", type=int, required=True, help="seed of the random choice of problems")
    parser.add_argument("--per-skill", type=int, default=60, help="problems of each skill")
    parser.add_argument("--scenario", choices=SCENARIOS, help="whose taught skills are reported apart")
    options = parser.parse_args()
    found = evaluate(options.model, options.split, options.per_skill, options.seed)
    metrics = {}
    for measure in MEASURES:
        for skill, of in found[measure].items():
            name = measure if skill == "mean" else f"{measure}/{skill}"
            metrics[name] = metric(of)
    if options.scenario:
        means = learned_and_kept(found["generation"], SCENARIOS[options.scenario].skills)
        metrics |= {name: metric(of) for name, of in means.items()}
    metrics["response tokens"] = {"value": found["mean_response_tokens"], "n": metrics["generation"]["n"]}
    options.output.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
