"""Recipes that nobody can mean are refused at once, in one short message with the file and the line; texts
keep their meaning.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import dump_recipe, load_recipe, make_recipe, read_document, read_recipe
from megatron_fuse.recipe.loading import _flags
from megatron_fuse.recipe.yaml_files import LIMIT, dump_yaml

RECIPE = """\
workdir: w
target: {model: t}
sources: {a: {model: a}, b: {model: b, server: {url: "http://h/v1", model: m, extra: {top_k: 1}}}}
reward_models: {j: {model: j}}
data: {path: d.jsonl}
schedule: {preset: profuser}
"""
Change = Callable[[str], str | bytes]


def with_line(line: str) -> Change:
    return lambda text: text + line


def instead(old: str, new: str) -> Change:
    return lambda text: text.replace(old, new)


def extra(value: str) -> Change:
    return instead("{top_k: 1}", f"{{x: {value}}}")


DOUBLING = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrstu", "bcdefghijklmnopqrstuv", strict=True)
)

# line of the recipe, what is wrong, what is said
BAD: dict[str, tuple[Change, str]] = {
    # scalars that YAML libraries raise on
    "date": (with_line("seed: 2024-02-30"), r":7: seed: .*valid integer \(given: '2024-02-30'\)"),
    "int tag": (with_line("seed: !!int abc"), r":7: the tag !!int is not supported"),
    "bool tag": (with_line("seed: !!bool a"), r":7: the tag !!bool"),
    "timestamp tag": (instead("path: d.jsonl", "path: !!timestamp a"), r":5: the tag !!timestamp"),
    "tag of Python": (with_line("seed: !!python/object/apply:os.getpid []"), r":7: the tag !!python/object"),
    "own tag": (with_line("seed: !x 5"), r":7: the tag !x"),
    "5000 digits": (with_line(f"seed: {'9' * 5000}"), r":7: 9+ \.\.\. 9+ does not fit into a 64-bit integer"),
    "65 bits": (
        extra("18446744073709551616"),
        r":3: 18446744073709551616 does not fit into a 64-bit integer",
    ),
    "5000 digits of a float": (
        with_line(f"training: {{lr: {'9' * 5000}.0}}"),
        r":7: .* does not fit into a 64-bit",
    ),
    "too large": (extra("1e400"), r":3: 1e400 does not fit"),
    "too small": (extra("-1e-400"), r":3: -1e-400 does not fit"),
    "directive": (lambda text: f"%YAML {'9' * 5000}.1\n---\n{text}", r":1: not valid YAML"),
    "escape": (with_line('seed: "\\UFFFFFFFF"'), r":7: not valid YAML"),
    # what two versions of YAML read as two things
    "octal": (
        with_line("seed: 0777"),
        r":7: 0777 is 511 in YAML 1\.1 \(octal\) and 777 in YAML 1\.2: write 511 or 777",
    ),
    "no octal": (with_line("seed: 089"), r":7: 089 is octal in YAML 1\.1 and decimal"),
    "base 60": (with_line("seed: 1:30"), r":7: 1:30 is a number to the base 60 .* and text"),
    "binary": (with_line("seed: 0b11"), r":7: 0b11 is a binary number"),
    "yes": (
        with_line("training: {packing: yes}"),
        r":7: yes is true in YAML 1\.1 and text in YAML 1\.2: write true",
    ),
    "No": (with_line("training: {packing: No}"), r":7: No is false .*: write false, or \"No\" in quotes"),
    "on in a place without a type": (extra("[on]"), r":3: on is true"),
    "off as a key": (extra("{off: 1}"), r":3: off is false"),
    # shapes
    "lists 3000 deep": (with_line(f"seed: {'[' * 3000}{']' * 3000}"), r":7: more than 64 lists and mappings"),
    "block lists 3000 deep": (with_line(f"seed:\n{'- ' * 3000}1"), r":8: more than 64 lists and mappings"),
    "mappings 3000 deep": (extra("{a: " * 3000 + "}" * 3000), r":3: more than 64 lists and mappings"),
    "an alias in itself": (extra("&a {b: *a}"), r":3: the alias \*a is used inside its own value"),
    "a list in itself": (extra("&a [1, *a]"), r":3: the alias \*a"),
    "doubling aliases": (
        with_line(DOUBLING),
        r":2\d: the file holds more than 1048576 characters and values",
    ),
    "doubling merges": (
        with_line(
            "a: &a {x: 1}\n"
            + "".join(
                f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n"
                for a, b in zip("abcdefghijklmnopqrstu", "bcdefghijklmnopqrstuv", strict=True)
            )
        ),
        r":2\d: the file holds more than",
    ),
    "a long text many times": (
        extra(f"[&a {'x' * 70_000}, {', '.join(['*a'] * 20)}]"),
        r":3: the file holds more than",
    ),
    "no such alias": (with_line("seed: *a"), r":7: not valid YAML: .*undefined alias"),
    "a huge file": (with_line("#" * LIMIT), r"r\.yaml: larger than 1048576 bytes"),
    "a merge of a number": (with_line("training: {<<: 5}"), r":7: not valid YAML: .*for merging"),
    "two documents": (with_line("---\nseed: 1"), r":7: not valid YAML: .*single document"),
    "a list": (lambda _: "- a", r"r\.yaml: must be a mapping of keys, but holds a list"),
    "nothing": (lambda _: "", r"r\.yaml: .*but is empty"),
    # keys
    "a key twice": (with_line("seed: 1\nseed: 2"), r":8: the key 'seed' is given twice"),
    "a key twice, in quotes": (with_line("seed: 1\n'seed': 2"), r":8: the key 'seed' is given twice"),
    "a key twice in extra": (extra("{a: 1, a: 1}"), r":3: the key 'a' is given twice"),
    "a number as a key": (extra("{1: 2}"), r":3: the key 1 is not text\. Put it in quotes"),
    "null as a key": (with_line("~: 1"), r":7: the key ~ is not text"),
    "a list as a key": (with_line("? [a]\n: 1"), r":7: the key is not text"),
    "a long key": (with_line(f"{'k' * 900}: 1"), r":7: k+ \.\.\. k+: unknown key; allowed here: workdir"),
    # characters
    "NUL": (with_line("seed: a\0b"), r":7: not valid YAML: it holds the control character '\\x00'"),
    "bell": (with_line("seed: 'a\x07b'"), r":7: not valid YAML: it holds the control character '\\x07'"),
    "NUL, escaped": (instead("workdir: w", 'workdir: "a\\0b"'), r":1: 'a\\x00b' holds a NUL"),
    "half of a character": (
        instead("workdir: w", 'workdir: "\\ud800"'),
        r":1: '\\ud800' holds half of a character",
    ),
    "half of a character as a key": (extra('{"\\udfff": 1}'), r":3: '\\udfff' holds half"),
    "Latin-1": (
        lambda text: text.encode() + b"seed: \xe9\n",
        r":7: not valid YAML: 'utf-8' codec .*Save the file as UTF-8",
    ),
    "UTF-16": (lambda text: text.encode("utf-16"), r":1: not valid YAML: 'utf-8' codec"),
    # paths
    "empty workdir": (instead("workdir: w", 'workdir: ""'), r":1: workdir: must not be empty"),
    "blank workdir": (instead("workdir: w", 'workdir: " "'), r":1: workdir: must not be empty"),
    "unknown user, workdir": (
        instead("workdir: w", "workdir: ~nouser/w"),
        r":1: workdir: there is no home directory of ~nouser",
    ),
    "unknown user, model": (
        instead("model: t", "model: ~nouser/w"),
        r":2: target\.model: there is no home directory",
    ),
    "unknown user, save": (
        with_line("training: {save: ~nouser}"),
        r":7: training\.save: there is no home directory",
    ),
    "unknown user, export": (
        with_line("export: {path: ~nouser}"),
        r":7: export\.path: there is no home directory",
    ),
    "long name": (
        instead("workdir: w", f"workdir: {'w' * 256}"),
        r":1: workdir: a path must have at most 4095 bytes .* this one has 256 and 256",
    ),
    "long path": (
        instead("workdir: w", f"workdir: {'w/' * 2100}"),
        r":1: workdir: a path must have at most 4095 bytes",
    ),
    "model of 5000 characters": (
        instead("model: t", f"model: {'m' * 5000}"),
        r":2: target\.model: a path must have at most",
    ),
    "empty model": (instead("model: t", "model: ''"), r":2: target\.model: must not be empty"),
    "newline in a path": (instead("path: d.jsonl", 'path: "d\\n"'), r":5: data\.path: holds '\\n'"),
    "escape in a path": (instead("path: d.jsonl", 'path: "d\\e[2J"'), r":5: data\.path: holds '\\x1b'"),
    "long name of a source": (
        instead("{a: {model: a},", f"{{{'a' * 101}: {{model: a}},"),
        r":3: sources\.a+: .*at most 100",
    ),
    # servers
    "port": (instead("http://h/v1", "http://h:99999/v1"), r":3: sources\.b\.server: url must be a base URL"),
    "brackets": (instead("http://h/v1", "http://[::1/v1"), r":3: sources\.b\.server: url must be a base URL"),
    "no host": (instead("http://h/v1", "http:///v1"), r":3: sources\.b\.server: url must be a base URL"),
    "NaN in a request": (extra(".nan"), r":3: sources\.b\.server\.extra.*finite"),
    # types
    "a truth value as a number": (
        instead("path: d.jsonl", "path: d, samples: true"),
        r":5: data\.samples: .*valid integer \(given: True\)",
    ),
    "a text as a number": (with_line("seed: '5'"), r":7: seed: .*valid integer \(given: '5'\)"),
    "a text as a truth value": (
        with_line("training: {packing: 'true'}"),
        r":7: training\.packing: .*valid boolean",
    ),
    "a number as a text": (
        instead("model: t", "model: 5"),
        r":2: target\.model: .*valid string \(given: 5\)",
    ),
    "a number as a path": (instead("workdir: w", "workdir: 5"), r":1: workdir: .*path .*\(given: 5\)"),
    "a list as a section": (with_line("training: [1]"), r":7: training: must be a mapping of keys"),
    "a form of a weight": (
        instead("preset: profuser", "phases: [{name: p, epochs: 1, training: {weight: {frm: 1, to: 1}}}]"),
        r":6: schedule\.phases\.0\.training\.weight\.frm: unknown key; allowed here: from, to, shape",
    ),
}

# section.key, values beyond what a practitioner would take, sensible values
NUMBERS: dict[str, tuple[list[float], list[float]]] = {
    "seed": ([-1, 2**32, 1.5], [0, 2**32 - 1]),
    "responses.temperature": ([1e308, 1e-320, 0.009, -1, float("nan")], [0, 0.01, 0.7, 2.0, 100]),
    "responses.top_p": ([1e-320, 0, 1.1], [0.001, 0.9, 1, 1.0]),
    "responses.max_new_tokens": ([0, -1, 10**8], [1, 1_000_000]),
    "responses.batch_tokens": ([0, 10**10], [1, 10**8]),
    "loss.teacher_temperature": ([1e300, 1e-320, 0, 101], [0.01, 1, 2.0, 20]),
    "loss.student_temperature": ([1e300, 0], [0.5, 2.0]),
    "capture.top_k": ([0, 129], [1, 128]),
    "capture.top_p": ([1e-320, 2], [0.95]),
    "capture.batch_tokens": ([-5], [8192]),
    "training.lr": ([1e308, 0, -1, 1e-320, float("inf")], [1e-7, 1.5e-5, 1e-3, 1]),
    "training.min_lr": ([1e308, -1, 1e-320], [0, 1e-6]),
    "training.weight_decay": ([1e308, -0.1], [0, 0.1, 1]),
    "training.adam_eps": ([1e308, 0, 1e-320], [1e-15, 1e-8]),
    "training.adam_beta1": ([1, -0.1], [0, 0.9]),
    "training.clip_grad": ([1e308, -1, 1e-320], [0, 1.0]),
    "training.seq_length": ([0, -1, 10**9], [16, 2048, 10_000_000]),
    "training.micro_batch_size": ([0, 10**7], [1, 512]),
    "training.global_batch_size": ([0, 10**9], [1, 65536]),
    "training.seed": ([-1, 2**32, 1.5], [0, 2**32 - 1]),
    "training.lr_decay_iters": ([0, 10**10], [1, 10**6]),
    "training.lr_warmup_iters": ([-1, 10**10], [0, 1000]),
    "training.lr_warmup_fraction": ([-0.1, 1, float("nan")], [0, 0.03, 0.5]),
    "training.lr_wsd_decay_iters": ([0, 10**10], [1, 10**6]),
    "training.train_iters": ([0, 10**10], [1, 10**7]),
    "training.exit_duration_in_mins": ([0, 1e308], [1e-6, 1400]),
    "data.samples": ([0, -1, 10**10], [1, 10**8]),
    "data.validation_samples": ([-1, 10**10], [0, 512]),
    "data.shard_size": ([0, 10**10], [1, 512]),
    "parallel.tensor_model_parallel_size": ([0, -1, 10**7], [1, 8]),
    "reference.bleu": ([-1, 1e308, 1e-320], [0, 0.25]),
    "reference.bertscore_layer": ([0, 10**5], [1, 24]),
    "target.server.timeout": ([0, 1e308, 1e-320], [0.5, 600]),
    "target.server.concurrency": ([0, 10**6], [1, 512]),
    "target.server.max_retries": ([-1, 10**6], [0, 6]),
    "selection.training_margin.at_least": ([-1, 1e308], [0, 1e9]),
    "schedule.phases.0.epochs": ([0, 1e-5, 10**6, 1e308], [1, 0.25, 100]),
    "schedule.phases.0.training.lambda": ([-1, 1e308, 1e-320], [0, 0.5, 10]),
    "schedule.phases.0.training.weight.from": ([-1, 1e308], [0, 1]),
}


def write(directory: Path, change: Change) -> Path:
    path = directory / "r.yaml"
    content = change(RECIPE)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_one_short_message_with_its_line(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    path = write(tmp_path, change)
    start = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) <= 600, str(caught.value)
    assert time.process_time() - start < 5


def nested(key: str, value: object) -> dict:
    """The recipe with the key; lists and servers on its way are filled in."""
    content = yaml.safe_load(RECIPE)
    if key.startswith("target.server"):
        content["target"]["server"] = {"url": "http://h/v1", "model": "m"}
    if key.startswith("schedule"):
        content["schedule"] = {"phases": [{"name": "p", "epochs": 1, "inference": {"weight": 1}}]}
    if key.endswith("weight.from"):
        content["schedule"]["phases"][0]["training"] = {"weight": {"to": 1}}
    place = content
    *outer, last = key.split(".")
    for part in outer:
        place = place[int(part)] if part.isdecimal() else place.setdefault(part, {})
    place[last] = value
    if key == "training.lr":
        place["min_lr"] = 0
    if key == "training.lr_wsd_decay_iters":
        place["lr_decay_style"] = "WSD"
    return content


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_beyond_all_practice_are_refused_and_sensible_ones_taken(key: str) -> None:
    beyond, sensible = NUMBERS[key]
    for value in beyond:
        with pytest.raises(UserError, match=key.replace(".", r"\.")) as caught:
            make_recipe(nested(key, value))
        assert len(str(caught.value)) <= 600
    for value in sensible:
        make_recipe(nested(key, value))


def test_every_number_of_a_recipe_has_a_lower_and_an_upper_limit_in_its_help() -> None:
    from megatron_fuse.recipe.loading import _metadata, _scalar_type
    from megatron_fuse.recipe.values import limits

    without = [
        flag
        for flag, _, field in _flags()
        if _scalar_type(field.annotation) in (int, float) and not limits(_metadata(field))
    ]
    assert without == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "0777"], r"^--seed: 0777 is 511"),
        (["--seed", "1:30"], r"^--seed: 1:30 is a number to the base 60"),
        (["--seed", "9" * 5000], r"^--seed: 9+ \.\.\. 9+ does not fit into a 64-bit integer"),
        (["--training-seed", "-1"], r"^--training-seed: training\.seed: .*greater than or equal to 0"),
        (
            ["--lr-decay-style", "wsd"],
            r"^--lr-decay-style: training\.lr_decay_style: .*'constant', 'linear', 'cosine' or 'WSD'",
        ),
        (
            ["--lr-warmup-fraction", "1"],
            r"^--lr-warmup-fraction: training\.lr_warmup_fraction: .*less than 1",
        ),
        (["--seed", "two"], r"^--seed: seed: .*valid integer \(given: 'two'\)"),
        (["--lr", "1e308"], r"^--lr: training\.lr: .*less than or equal to 10"),
        (["--lr", "1e-400"], r"^--lr: 1e-400 does not fit"),
        (["--responses-top-p", "1e-320"], r"^--responses-top-p: responses\.top_p: "),
        (
            ["--loss-teacher-temperature", "1e300"],
            r"^--loss-teacher-temperature: loss\.teacher_temperature: ",
        ),
        (["--workdir", ""], r"^--workdir: workdir: must not be empty"),
        (["--workdir", "~nouser/x"], r"^--workdir: workdir: there is no home directory of ~nouser"),
        (["--save", "a\nb"], r"^--save: training\.save: holds '\\n'"),
        (["--load", "x" * 300], r"^--load: training\.load: a path must have at most"),
        (["--export-path", "\udcff\x1b"], r"^--export-path: export\.path: holds"),
        (["--target-model", ""], r"^--target-model: target\.model: must not be empty"),
    ],
)
def test_flags_go_through_the_same_checks(tmp_path: Path, flags: list[str], message: str) -> None:
    path = write(tmp_path, with_line(""))
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(argv=["--recipe", str(path), *flags])
    assert len(str(caught.value)) <= 600


def test_many_errors_are_told_as_far_as_a_message_goes(tmp_path: Path) -> None:
    path = write(tmp_path, with_line("training: {" + ", ".join(f"k{n}: {n}" for n in range(50)) + "}"))
    with pytest.raises(UserError, match=r"training\.k0: unknown key; .*\n.*and 4\d more$") as caught:
        read_recipe(path)
    assert len(str(caught.value)) <= 600


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    content = yaml.safe_load(RECIPE)
    content["workdir"] = content["data"]["path"] = content["target"]["model"] = "~/x"
    content["target"]["chat_template"] = "~/x"
    content["sources"]["a"] |= {"responses": "~/x", "captures": {"training": "~/x"}}
    content["reward_models"] = {"j": {"model": "~/x", "body": "~/x"}, "k": {"scores": {"path": "~/x"}}}
    content["reference"] = {"bertscore_model": "~/x"}
    content["training"] = {"save": "~/x", "load": "~/x", "tensorboard_dir": "~/x"}
    content["export"] = {"path": "~/x"}
    recipe = make_recipe(content)
    printed = dump_recipe(recipe)
    assert printed.count(f"{tmp_path}/x") == 14 and "~" not in printed
    assert make_recipe({**content, "workdir": "./~x"}).workdir == Path.cwd() / "~x"


def test_readings_that_everybody_agrees_on_stay(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(
        b"\xef\xbb\xbfa: [1_000, 0x10, 0o17, 1e3, 1.5e-05, .5, -3, +4, .inf]\nb: [true, False, null, ~, ]\n"
        b"c: [2024-02-28, 1.2.3, a:b, 10.0.0.1:80, 'yes', \"0777\", y, n, '=']\nd: &d {x: 1}\ne: {<<: *d, "
        b'y: *d}\nf: "\\ud83d\\ude00"\n'
    )
    content = read_document(tmp_path / "a.yaml").content
    assert content["a"] == [1000, 16, 15, 1000.0, 1.5e-5, 0.5, -3, 4, float("inf")]
    assert content["b"] == [True, False, None, None]
    assert content["c"] == ["2024-02-28", "1.2.3", "a:b", "10.0.0.1:80", "yes", "0777", "y", "n", "="]
    assert content["e"] == {"x": 1, "y": {"x": 1}} and content["f"] == "\N{GRINNING FACE}"


PIECES = [
    "yes",
    "1e-4",
    "0777",
    "1:30",
    "2024-01-01",
    "null",
    ": ",
    "0o17",
    "-",
    "~",
    "<<",
    "=",
    "\u2028",
    "\u2029",
    "\x85",
    "é",
    "\N{GRINNING FACE}",
]
PIECES += [
    " ",
    "'",
    '"',
    "#",
    "1_000",
    "\x7f",
    "\ufeff",
    "on",
    "\n",
    "\t",
    "!",
    "&a",
    "*",
    "%",
    "@",
    "`",
    "\r",
    "\x1b",
    "a",
    "word ",
    "\\",
    "{",
    "[",
    ",",
]


def test_every_text_that_is_printed_is_read_back_by_us_and_by_yaml_1_1(tmp_path: Path) -> None:
    draw, path = random.Random(5), tmp_path / "a.yaml"
    for _ in range(25):
        texts = ["".join(draw.choices(PIECES, k=draw.choice([1, 2, 5, 60]))) for _ in range(8)]
        content = {f"k{text}": [text, {"x": text}] for text in texts}
        path.write_text(dump_yaml(content), encoding="utf-8", newline="")
        assert read_document(path).content == content, texts
        assert yaml.safe_load(path.read_bytes()) == content, texts
