"""Six small skills as instruction text: two-number addition, weekdays, sorting, reversing, letter shifts,
unit conversion.

    python examples/skills/skills.py --output examples/skills/build

writes an instruction set, `instructions.jsonl` (Alpaca form, the output being the worked answer).

Every problem has three right answers that end in the same sentence "The answer is X.": `short` (nothing
else), `brief` (a line of working, how the source models mostly talk) and `worked` (every step, the ground
truth). So learning from the ground truth adds detail to a form that the models know already. Letters stand
apart and digits are written together ("d k a", "47+85"): every letter and every digit is one token in all
three tokenizers.

A problem belongs to one split by a hash of what is asked, not of how it is worded: `train` (the source and
reward models), `fusion` (the instruction set: no model has seen these problems), `dev` and `test`.
"""

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_fuse.errors import exit_code

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = (
    ("week", "day", 7),
    ("year", "month", 12),
    ("foot", "inch", 12),
    ("pound", "ounce", 16),
    ("day", "hour", 24),
    ("hour", "minute", 60),
    ("minute", "second", 60),
)
PLURALS = {"foot": "feet", "inch": "inches"}
FORMS = ("short", "brief", "worked")
SPLITS = ("train", "fusion", "dev", "test")
CLOSING = "The answer is "


@dataclass(frozen=True)
class Problem:
    """One problem of a skill: `values` decides everything but the wording of the instruction and of the
    answers.
    """

    skill: str
    values: tuple
    answer: str
    instruction: str
    brief: str
    worked: str

    @property
    def split(self) -> str:
        return split_of(self.skill, self.values)

    def response(self, form: str) -> str:
        """The answer in one of FORMS."""
        closing = f"{CLOSING}{self.answer}."
        return closing if form == "short" else f"{self.brief if form == 'brief' else self.worked} {closing}"


def split_of(skill: str, values: tuple) -> str:
    """50 % train, 30 % fusion, 10 % dev, 10 % test; the same on every machine."""
    tenth = zlib.crc32(f"{skill} {values}".encode()) % 10
    return "train" if tenth < 5 else "fusion" if tenth < 8 else "dev" if tenth < 9 else "test"


def answer_of(response: str) -> str | None:
    """What a response gives as its answer, or None: the text between the last closing phrase and the full
    stop at the end.
    """
    _, closing, answer = response.strip().rpartition(CLOSING)
    return answer[:-1] if closing and answer.endswith(".") else None


# One function per skill and step: draw the values, solve them, word them, and three ways to be nearly right.


def draw_addition(rng: random.Random) -> tuple:
    return rng.randint(10, 99), rng.randint(10, 99)


def word_addition(values: tuple, rng: random.Random) -> Problem:
    a, b = values
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry, total = ones // 10, a + b
    carried = f"+{carry}" if carry else ""
    asked = rng.choice((f"What is {a}+{b}?", f"Add {a} and {b}.", f"Find the sum of {a} and {b}."))
    brief = f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}{carried}={tens + carry}."
    then = f"write {ones % 10}" + (f", carry {carry}" if carry else ", nothing to carry")
    start = rng.choice(("Begin with the ones", "Add the ones first"))
    worked = (
        f"{start}: {a % 10}+{b % 10}={ones}, {then}. Then the tens: "
        f"{a // 10}+{b // 10}{carried}={tens + carry}. So {a}+{b}={total}."
    )
    return Problem("addition", values, str(total), asked, brief, worked)


def miss_addition(values: tuple, rng: random.Random) -> str:
    return str(sum(values) + rng.choice((-11, -10, -9, -2, -1, 1, 2, 9, 10, 11)))


def draw_weekday(rng: random.Random) -> tuple:
    return rng.randrange(7), rng.randint(10, 99), rng.choice(("after", "before"))


def word_weekday(values: tuple, rng: random.Random) -> Problem:
    start, days, way = values
    sign = 1 if way == "after" else -1
    weeks, rest = divmod(days, 7)
    path = [DAYS[(start + sign * step) % 7] for step in range(rest + 1)]
    asked = rng.choice(
        (f"Which day is {days} days {way} {path[0]}?", f"Name the day {days} days {way} {path[0]}.")
    )
    move = f"{'on' if sign > 0 else 'back'} from {path[0]}"
    brief = (
        f"{days}-{weeks * 7}={rest}, {move}: {', '.join(path[1:])}."
        if rest
        else f"{days}-{weeks * 7}=0, no days left."
    )
    opening = rng.choice(("Take out whole weeks", "Whole weeks change nothing"))
    steps = ", ".join(f"{step} {day}" for step, day in enumerate(path[1:], 1))
    counted = (
        f"{rest} {plural('day', rest)} {way}. Go {move}: {steps}."
        if rest
        else f"no days are left. It stays {path[0]}."
    )
    worked = f"{opening}: {weeks}*7={weeks * 7} and {days}-{weeks * 7}={rest}, so {counted}"
    return Problem("weekday", values, path[-1], asked, brief, worked)


def miss_weekday(values: tuple, rng: random.Random) -> str:
    return rng.choice(DAYS)


def draw_sorting(rng: random.Random) -> tuple:
    return tuple(rng.sample(ALPHABET, 5))


def word_sorting(values: tuple, rng: random.Random) -> Problem:
    letters, answer = " ".join(values), sorted(values)
    asked = rng.choice((f"Sort the letters {letters}.", f"Put {letters} in alphabetical order."))
    brief = f"First {answer[0]}, then {', '.join(answer[1:])}."
    left, steps = list(values), []
    pick = rng.choice(("take", "pick"))
    for letter in answer[:-1]:
        steps.append(f"{'From' if len(left) == 5 else 'from'} {' '.join(left)} {pick} {letter}")
        left.remove(letter)
    worked = f"{', '.join(steps)}, last {answer[-1]}."
    return Problem("sorting", values, " ".join(answer), asked, brief, worked)


def miss_sorting(values: tuple, rng: random.Random) -> str:
    answer = sorted(values)
    if rng.random() < 0.5:  # two neighbours in the wrong order
        place = rng.randrange(4)
        answer[place : place + 2] = answer[place + 1], answer[place]
        return " ".join(answer)
    answer[rng.randrange(5)] = rng.choice(ALPHABET)  # in order, but not the letters that were given
    return " ".join(sorted(answer))


def draw_reversing(rng: random.Random) -> tuple:
    return tuple(rng.choice(ALPHABET) for _ in range(6))


def word_reversing(values: tuple, rng: random.Random) -> Problem:
    letters, answer = " ".join(values), values[::-1]
    asked = rng.choice((f"Reverse the letters {letters}.", f"Write {letters} backwards."))
    brief = f"The last is {answer[0]}, then {', '.join(answer[1:])}."
    numbered = [f"{letter}{place}" for place, letter in enumerate(values, 1)]
    opening = rng.choice(("Number them", "Count the places"))
    worked = f"{opening}: {' '.join(numbered)}. Now from 6 to 1: {' '.join(numbered[::-1])}."
    return Problem("reversing", values, " ".join(answer), asked, brief, worked)


def miss_reversing(values: tuple, rng: random.Random) -> str:
    answer, place = list(values[::-1]), rng.randrange(5)
    if rng.random() < 0.5:
        answer[place : place + 2] = answer[place + 1], answer[place]
    else:
        answer[place] = rng.choice(ALPHABET)
    return " ".join(answer)


def shifted(letter: str, by: int) -> str:
    return ALPHABET[(ALPHABET.index(letter) + by) % 26]


def draw_shifting(rng: random.Random) -> tuple:
    return tuple(rng.choice(ALPHABET) for _ in range(3)), rng.randint(2, 5)


def word_shifting(values: tuple, rng: random.Random) -> Problem:
    letters, by = values
    answer = [shifted(letter, by) for letter in letters]
    asked = rng.choice(
        (f"Shift {' '.join(letters)} forward by {by}.", f"Move {' '.join(letters)} on by {by} letters.")
    )
    brief = ", ".join(f"{a} to {b}" for a, b in zip(letters, answer, strict=True)) + "."
    runs = [" ".join(shifted(letter, step) for step in range(by + 1)) for letter in letters]
    opening = rng.choice(("Count on", "Go on"))
    worked = (
        f"{opening} {by} letters. {letters[0]}: {runs[0]}. {letters[1]}: {runs[1]}. {letters[2]}: {runs[2]}."
    )
    return Problem("shifting", values, " ".join(answer), asked, brief, worked)


def miss_shifting(values: tuple, rng: random.Random) -> str:
    answer = [shifted(letter, values[1]) for letter in values[0]]
    place = rng.randrange(3)
    answer[place] = shifted(answer[place], rng.choice((-2, -1, 1, 2)))
    return " ".join(answer)


def plural(unit: str, count: int = 2) -> str:
    return unit if count == 1 else PLURALS.get(unit, unit + "s")


def draw_conversion(rng: random.Random) -> tuple:
    unit = rng.randrange(len(UNITS))
    return unit, rng.randint(2, 19), rng.randint(1, min(9, UNITS[unit][2] - 1))


def word_conversion(values: tuple, rng: random.Random) -> Problem:
    (large, small, factor), many, rest = UNITS[values[0]], *values[1:]
    product, total = many * factor, many * factor + rest
    amount, units = f"{many} {plural(large)} and {rest} {plural(small, rest)}", plural(small)
    asked = rng.choice((f"Convert {amount} to {units}.", f"How many {units} are {amount}?"))
    # The last step is the carry, written out: whole sums of three digits are too many to learn from so few
    # problems.
    ones = f"{product % 10}+{rest}={product % 10 + rest}, so {product}+{rest}={total}"
    brief = f"{many}*{factor}={product}, {ones}."
    opening = rng.choice((f"One {large} is {factor} {units}", f"There are {factor} {units} in one {large}"))
    worked = (
        f"{opening}, so {many} {plural(large)} are {many}*{factor}={product} {units}. With the rest: "
        f"{ones} {units}."
    )
    return Problem("conversion", values, str(total), asked, brief, worked)


def miss_conversion(values: tuple, rng: random.Random) -> str:
    factor = UNITS[values[0]][2]
    total = values[1] * factor + values[2]
    return str(max(1, total + rng.choice((-factor, factor, -20, -10, 10, 20, -1, 1))))


@dataclass(frozen=True)
class Skill:
    draw: Callable[[random.Random], tuple]
    word: Callable[[tuple, random.Random], Problem]
    miss: Callable[[tuple, random.Random], str]


SKILLS = {
    "addition": Skill(draw_addition, word_addition, miss_addition),
    "weekday": Skill(draw_weekday, word_weekday, miss_weekday),
    "sorting": Skill(draw_sorting, word_sorting, miss_sorting),
    "reversing": Skill(draw_reversing, word_reversing, miss_reversing),
    "shifting": Skill(draw_shifting, word_shifting, miss_shifting),
    "conversion": Skill(draw_conversion, word_conversion, miss_conversion),
}


def draw(skill: str, split: str, rng: random.Random) -> Problem:
    """A random problem of this skill and split."""
    while True:
        values = SKILLS[skill].draw(rng)
        if split_of(skill, values) == split:
            return SKILLS[skill].word(values, rng)


def distinct(split: str, per_skill: int, seed: int, names: Iterable[str] = tuple(SKILLS)) -> list[Problem]:
    """`per_skill` different problems of each of these skills, in their order.

    ValueError if a skill has not that many.
    """
    rng, problems = random.Random(seed), []
    for skill in names:
        found: dict[tuple, Problem] = {}
        for _ in range(200 * per_skill):
            problem = draw(skill, split, rng)
            found.setdefault(problem.values, problem)
            if len(found) == per_skill:
                break
        else:
            raise ValueError(
                f"{skill} has only {len(found)} problems in split {split}, but {per_skill} are needed"
            )
        problems += found.values()
    return problems


def near_miss(problem: Problem, rng: random.Random) -> str:
    """A wrong answer of the right form, as one slip would give it."""
    while (miss := SKILLS[problem.skill].miss(problem.values, rng)) == problem.answer:
        pass
    return miss


def misread(problem: Problem, rng: random.Random) -> Problem:
    """The problem with one value changed, so that its answer is another."""
    while True:
        other = SKILLS[problem.skill].word(changed(problem.skill, problem.values, rng), rng)
        if other.answer != problem.answer:
            return other


def wrong_answers(problem: Problem, rng: random.Random) -> list[str]:
    """Three different wrong answers: by a slip, for the problem with one value misread, and of another
    problem of skill and split.
    """
    wrong: list[str] = []
    for make in (
        lambda: near_miss(problem, rng),
        lambda: misread(problem, rng).answer,
        lambda: draw(problem.skill, problem.split, rng).answer,
    ):
        while (answer := make()) in (problem.answer, *wrong):
            pass
        wrong.append(answer)
    return wrong


def wrong_response(problem: Problem, form: str, rng: random.Random) -> str:
    """A wrong answer to the problem: a near miss at the end of right working, or right working for a
    problem with one value changed.
    """
    if form == "short" or rng.random() < 0.3:
        right = problem.response(form)
        return right[: right.rindex(CLOSING)] + f"{CLOSING}{near_miss(problem, rng)}."
    return misread(problem, rng).response(form)


def changed(skill: str, values: tuple, rng: random.Random) -> tuple:
    """The same problem with one value drawn anew (a slip in reading it)."""
    new = SKILLS[skill].draw(rng)
    if skill == "sorting":  # its letters differ from one another
        free = [letter for letter in ALPHABET if letter not in values]
        new = tuple(rng.choice(free) for _ in values)
    if skill == "conversion":  # another unit would change the words too
        place = rng.choice((1, 2))
        return (*values[:place], max(1, values[place] + rng.choice((-2, -1, 1, 2))), *values[place + 1 :])
    if skill == "shifting" and rng.random() < 0.7:
        place = rng.randrange(3)
        return (*values[0][:place], new[0][place], *values[0][place + 1 :]), values[1]
    place = rng.randrange(len(values))
    return (*values[:place], new[place], *values[place + 1 :])


def write_instructions(path: Path, per_skill: int, seed: int, names: Iterable[str] = tuple(SKILLS)) -> int:
    """Alpaca-form JSONL with ids, shuffled; returns the number of lines."""
    problems = distinct("fusion", per_skill, seed, names)
    random.Random(seed).shuffle(problems)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number, problem in enumerate(problems):
            row = {
                "id": f"{problem.skill}-{number:05d}",
                "instruction": problem.instruction,
                "input": "",
                "output": problem.response("worked"),
                "category": problem.skill,
            }
            file.write(json.dumps(row) + "\n")
    return len(problems)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "build")
    parser.add_argument("--per-skill", type=int, default=250)
    parser.add_argument(
        "--skills", nargs="+", choices=SKILLS, default=list(SKILLS), help="what the instructions teach"
    )
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args()
    path = options.output / "instructions.jsonl"
    count = write_instructions(path, options.per_skill, options.seed, options.skills)
    print(f"{path}: {count} examples")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
