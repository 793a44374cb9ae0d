"""The scenarios of the map (map.yaml): what the instructions teach, how often they are wrong, how many they
are, and who is fused.

    python examples/skills/scenarios.py --output examples/skills/build --scenario taught_3

Makes the models of a scenario and writes its instructions, `map/SCENARIO.jsonl`. A row has two more keys
than those of skills.py: `category`, the skill, and `accuracy`, for each source the share of problems of this
skill (split `train`) that it answers rightly. With `accuracy` as the scores of a reward model, the rule
`by_category` is an oracle: it takes the source that is best at the skill.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from evaluate import evaluate
from lm import CACHE_FILE
from make_models import make_models
from make_tokenizers import make_tokenizers
from skills import SKILLS, Problem, draw, wrong_response
from train_sources import ALPHA_WORKED, BETA_LLAMA, BETA_WORKED, GAMMA_LLAMA, GAMMA_WORKED, SourceSettings

from megatron_fuse.errors import exit_code
from megatron_fuse.storage import write_json

# alpha is best at addition and weekday, beta at sorting and reversing, gamma at shifting and conversion. Of
# three taught and three untaught skills, each source is best at one.
TAUGHT = {
    2: ("addition", "sorting"),
    3: ("addition", "sorting", "shifting"),
    4: ("addition", "sorting", "shifting", "reversing"),
    6: tuple(SKILLS),
}
OWN = {"own": "alpha", "first": "beta", "second": "gamma"}
LEFT_OUT = 48  # for validation, as in recipe.yaml
POOL = 2.6  # rows for each row of a seed's sample, where the skills have that many problems
MOST_PER_SKILL = 280  # conversion and weekday have few problems


@dataclass(frozen=True)
class Scenario:
    """taught: number of skills. wrong: share of wrong answers in the ground truth. examples: rows for
    training.

    sources: name in map.yaml -> directory under sources/. `own` is the target. further: models beyond
    make_models.
    """

    taught: int = 6
    wrong: float = 0.0
    examples: int = 600
    sources: tuple[tuple[str, str], ...] = tuple(OWN.items())
    further: tuple[SourceSettings, ...] = ()

    @property
    def skills(self) -> tuple[str, ...]:
        return TAUGHT[self.taught]


def _sources(own: str, first: str, second: str) -> tuple[tuple[str, str], ...]:
    return (("own", own), ("first", first), ("second", second))


SCENARIOS = {
    "base": Scenario(),
    "taught_2": Scenario(taught=2),
    "taught_3": Scenario(taught=3),
    "taught_4": Scenario(taught=4),
    "wrong_15": Scenario(wrong=0.15),
    "wrong_30": Scenario(wrong=0.3),
    "wrong_50": Scenario(wrong=0.5),
    "examples_120": Scenario(examples=120),
    "examples_300": Scenario(examples=300),
    "examples_1500": Scenario(examples=1500),
    "target_beta": Scenario(sources=_sources("beta_llama", "alpha", "gamma"), further=(BETA_LLAMA,)),
    "target_gamma": Scenario(sources=_sources("gamma_llama", "alpha", "beta"), further=(GAMMA_LLAMA,)),
    "worked": Scenario(
        sources=_sources("alpha_worked", "beta_worked", "gamma_worked"),
        further=(ALPHA_WORKED, BETA_WORKED, GAMMA_WORKED),
    ),
    # Corners: what the axes do together.
    "taught_3_wrong_30": Scenario(taught=3, wrong=0.3),
    "taught_3_examples_120": Scenario(taught=3, examples=120),
    "wrong_30_examples_120": Scenario(wrong=0.3, examples=120),
    "taught_3_wrong_30_examples_120": Scenario(taught=3, wrong=0.3, examples=120),
    "taught_3_worked": Scenario(
        taught=3,
        sources=_sources("alpha_worked", "beta_worked", "gamma_worked"),
        further=(ALPHA_WORKED, BETA_WORKED, GAMMA_WORKED),
    ),
    "taught_3_target_beta": Scenario(
        taught=3, sources=_sources("beta_llama", "alpha", "gamma"), further=(BETA_LLAMA,)
    ),
}


def problems(scenario: Scenario, seed: int) -> list[Problem]:
    """Different problems of the split `fusion`, equally many of each taught skill, in random order."""
    rng = random.Random(seed)
    wanted = -(-(scenario.examples + LEFT_OUT) // len(scenario.skills))
    per_skill = max(wanted, min(MOST_PER_SKILL, round(POOL * wanted)))
    chosen: list[Problem] = []
    for skill in scenario.skills:
        found: dict[tuple, Problem] = {}
        while len(found) < per_skill:
            problem = draw(skill, "fusion", rng)
            found.setdefault(problem.values, problem)
        chosen += found.values()
    rng.shuffle(chosen)
    return chosen


def accuracies(output: Path, scenario: Scenario) -> dict[str, dict[str, float]]:
    """skill -> source -> share of right answers on the split `train`.

    A model is measured once, and the numbers are kept.
    """
    found: dict[str, dict[str, float]] = {skill: {} for skill in SKILLS}
    for name, directory in scenario.sources:
        model = output / "sources" / directory
        kept = output / "map" / f"accuracy-{directory}.json"
        made_from = (model / CACHE_FILE).read_text()
        if not kept.exists() or json.loads(kept.read_text())["model"] != made_from:
            measured = evaluate(model, "train", 60, seed=7)["generation"]
            shares = {skill: measured[skill]["accuracy"] / 100 for skill in SKILLS}
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"model": made_from, "accuracy": shares})
        for skill, share in json.loads(kept.read_text())["accuracy"].items():
            found[skill][name] = share
    return found


def write_scenario(output: Path, name: str, seed: int) -> int:
    """Writes the instructions of a scenario.

    Returns their number. The same file comes out on every machine.
    """
    scenario = SCENARIOS[name]
    right, rng = accuracies(output, scenario), random.Random(seed + 1)
    path = output / "map" / f"{name}.jsonl"
    rows = []
    for number, problem in enumerate(problems(scenario, seed)):
        is_wrong = rng.random() < scenario.wrong
        text = wrong_response(problem, "worked", rng) if is_wrong else problem.response("worked")
        row = {"id": f"{problem.skill}-{number:05d}", "instruction": problem.instruction, "input": ""}
        rows.append(row | {"output": text, "category": problem.skill, "accuracy": right[problem.skill]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # Runs are bound to their data, so that a file that is right already keeps its time.
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "build")
    parser.add_argument("--scenario", choices=SCENARIOS, required=True)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    make_tokenizers(options.output, seed=1234)
    make_models(options.output, options.processes, further=SCENARIOS[options.scenario].further)
    count = write_scenario(options.output, options.scenario, seed=1234)
    print(f"{options.output / 'map' / options.scenario}.jsonl: {count} examples")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
