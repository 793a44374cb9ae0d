"""A recipe is refused with the path of the wrong key and what is allowed there, and printing it loses
nothing.
"""

from pathlib import Path

import pytest
import yaml

from megatron_fuse.errors import UserError
from megatron_fuse.experiments.layers import load_experiment
from megatron_fuse.recipe import PRESETS, dump_recipe, load_recipe, make_recipe

ROOT = Path(__file__).parents[2]
MINIMAL = {
    "workdir": "w",
    "target": {"model": "t"},
    "sources": {"a": {"model": "a"}, "b": {"model": "b"}},
    "reward_models": {"j": {"model": "j"}},
    "data": {"path": "d.jsonl"},
    "schedule": {"preset": "profuser"},
}


SERVER = {"url": "http://localhost:8000/v1", "model": "served"}


def with_change(path: str, value: object) -> dict:
    content = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *outer, last = path.split(".")
    place = content
    for key in outer:
        place = place.setdefault(key, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.lerning_rate", 1, r"training\.lerning_rate: unknown key; allowed here: .*seq_length"),
        ("sources.b.modell", "x", r"sources\.b\.modell: unknown key; allowed here: model,"),
        ("training.micro_batch_size", "two", r"training\.micro_batch_size: .*integer.*given: 'two'"),
        ("training.lr", -1, r"training\.lr: .*greater than or equal to 1e-12"),
        ("loss.tail", "bukket", r"loss\.tail: .*'bucket', 'renormalize' or 'ignore'"),
        ("data.path", None, r"data\.path: the key is required"),
        ("schedule.preset", "x", r"schedule\.preset: .*'profuser'"),
        ("schedule.phases", [], r"schedule needs exactly one of preset and phases"),
        ("sources", {"../up": {"model": "a"}}, r"sources\.\.\./up"),
        ("reward_models", {}, r"of several sources .*no reward model votes"),
        ("selection.strongest", "k", r"selection\.strongest is 'k'.*\['j'\]"),
        ("capture.temperatures", [1.0], r"teacher_temperature is 2\.0, but capture\.temperatures"),
        # mappings within mappings, one of them optional, one under a name that the recipe chooses
        (
            "sources.b.responses",
            {"path": "r", "pth": 1},
            r"sources\.b\.responses\.pth: unknown key; allowed here: path,",
        ),
        (
            "sources.b.responses",
            {"path": "r", "match": "title"},
            r"sources\.b\.responses\.match: .*'id' or 'prompt'",
        ),
        ("sources.b.responses", 3, r"sources\.b\.responses: must be a mapping of keys \(given: 3\)"),
        (
            "target.server",
            {**SERVER, "uri": 1},
            r"target\.server\.uri: unknown key; allowed here: url, model,.*extra",
        ),
        ("target.server", {"model": "m"}, r"target\.server\.url: the key is required, but missing"),
        (
            "target.server",
            {**SERVER, "concurrency": 0},
            r"target\.server\.concurrency: .*greater than or equal to 1",
        ),
        ("target.server", {**SERVER, "extra": 3}, r"target\.server\.extra: must be a mapping"),
        (
            "sources.b.captures",
            {"trainng": "p"},
            r"sources\.b\.captures\.trainng: .*'inference' or 'training'",
        ),
        (
            "reward_models.j",
            {"scores": {"path": "s", "score": 1}},
            r"reward_models\.j\.scores\.score: unknown key",
        ),
        (
            "selection.training_margin",
            {"atleast": 1},
            r"training_margin\.atleast: unknown key; allowed here: at_least,",
        ),
        ("reference", {"blue": 1}, r"reference\.blue: unknown key; allowed here: bleu,"),
        (
            "schedule",
            {"phases": [{"name": "p", "epochs": 1, "training": {"lamda": 1}}]},
            r"schedule\.phases\.0\.training\.lamda: unknown key; allowed here: weight, lambda",
        ),
        # one origin of answers and of scores
        (
            "sources.b",
            {"model": "b", "responses": "r", "server": SERVER},
            r"sources\.b: responses .* and server are both set",
        ),
        (
            "target",
            {"model": "t", "responses": "r", "server": SERVER},
            r"target: responses .* and server are both set",
        ),
        (
            "sources.b",
            {"model": "b", "responses": "r", "stop": ["##"]},
            r"sources\.b: responses .* and stop are both set",
        ),
        (
            "reward_models.j",
            {"model": "j", "scores": "s"},
            r"reward_models\.j: exactly one of model and scores \(a file\) must be set",
        ),
        (
            "reward_models.j",
            {"form": "auto"},
            r"reward_models\.j: exactly one of model and scores \(a file\) must be set",
        ),
        ("sources.b.stop", ["User:", ""], r"sources\.b: stop holds an empty text"),
        # names that the workspace needs for itself
        ("sources.target", {"model": "x"}, r"'target' is the name of the target's own answers"),
        (
            "reward_models.reference",
            {"model": "x"},
            r"'reference' is the name of the score against the ground truth",
        ),
        # who votes
        (
            "selection.reward_models",
            ["k"],
            r"selection\.reward_models has \['k'\], but reward_models has only \['j'\]",
        ),
        ("selection.reward_models", [], r"of several sources .*no reward model votes"),
        ("selection.reward_models", ["../up"], r"selection\.reward_models\.0"),
        ("schedule.order", "longest", r"schedule\.order: .*'shuffled', 'gt_length' or 'target_reward'"),
        # margins: a winner cannot win by less than nothing; from weight 1 on nothing would be weighed down
        (
            "selection.training_margin",
            {"at_least": -0.1},
            r"training_margin\.at_least: .*greater than or equal to 0",
        ),
        (
            "selection.training_margin",
            {"at_least": 1, "weight": 1},
            r"training_margin\.weight: .*less than 1",
        ),
        (
            "selection.inference_margin",
            {"at_least": 1, "weight": -1},
            r"inference_margin\.weight: .*or equal to 0",
        ),
        ("selection.inference_margin", {"at_least": float("nan")}, r"inference_margin\.at_least: .*finite"),
        ("selection.inference_margin", 1.5, r"selection\.inference_margin: must be a mapping"),
        (
            "reference",
            {"bleu": 0, "rouge_l": 0},
            r"reference: all weights are 0, or only bertscore has a weight",
        ),
        # what a sequence may be
        (
            "training",
            {"packing": True, "micro_batch_size": 4},
            r"training: packing needs micro_batch_size 1, not 4",
        ),
        (
            "parallel.sequence_parallel",
            True,
            r"tensor_model_parallel_size is 1. Set tensor_model_parallel_size to 2, 4 or 8",
        ),
        ("parallel.context_parallel_size", 2, r"parallel: context_parallel_size is 2, but .* Set it to 1"),
        # one learning rate
        (
            "training",
            {"lr_warmup_iters": 15, "lr_warmup_fraction": 0.1},
            r"training: lr_warmup_iters is 15 and lr_warmup_fraction is 0\.1, .*\. Set lr_warmup_iters to "
            r"0, or remove",
        ),
        *(
            (
                "training",
                {"lr_warmup_iters": 15, "lr_decay_iters": decay},
                rf"training: lr_decay_iters \({decay}\) .* must be above lr_warmup_iters \(15\).*\. Raise "
                r"lr_decay_iters, or lower",
            )
            for decay in (14, 15)
        ),
        (
            "training",
            {"lr_decay_style": "constant", "min_lr": 1e-6},
            r"training: min_lr is 1e-06, but with lr_decay_style constant .* stays at lr\. Set min_lr to 0, "
            r"or choose",
        ),
        (
            "training",
            {"lr_decay_style": "constant", "lr_decay_iters": 9},
            r"training: lr_decay_iters is 9, but with lr_decay_style constant .* stays at lr\. Remove "
            r"lr_decay_iters, or choose",
        ),
        (
            "training",
            {"lr_decay_style": "WSD", "lr_wsd_decay_style": "linear"},
            r"training: lr_decay_style WSD needs lr_wsd_decay_iters, the steps of its decay\. Set "
            r"lr_wsd_decay_iters, or choose",
        ),
        *(
            (
                "training",
                {**style, key: value},
                rf"training: {key} is {value}, but lr_decay_style is "
                rf"{style.get('lr_decay_style', 'cosine')}\. Remove {key}, or set "
                "lr_decay_style to WSD",
            )
            for style in ({}, {"lr_decay_style": "linear"}, {"lr_decay_style": "constant"})
            for key, value in {"lr_wsd_decay_iters": 5, "lr_wsd_decay_style": "exponential"}.items()
        ),
        *(
            (
                "training",
                {"lr_decay_style": "WSD", "lr_decay_iters": 20, "lr_wsd_decay_iters": 11, warmup: value},
                rf"training: lr_wsd_decay_iters \(11\) and the 10 steps of {warmup} are together more than "
                r"lr_decay_iters \(20\)\. Lower",
            )
            for warmup, value in {"lr_warmup_iters": 10, "lr_warmup_fraction": 0.5}.items()
        ),
        # whose weights are gathered
        (
            "parallel.overlap_param_gather",
            True,
            r"parallel: overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce\. Set "
            r"them to true",
        ),
        (
            "parallel",
            {"overlap_param_gather": True, "use_distributed_optimizer": True},
            r"parallel: overlap_param_gather needs overlap_grad_reduce\. Set it to true",
        ),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(path: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(with_change(path, value))


@pytest.mark.parametrize("url", ["https://me:hunter2@host/v1", "https://host/v1?api_key=hunter2"])
def test_no_secret_is_let_into_a_recipe_nor_into_its_refusal(url: str) -> None:
    with pytest.raises(UserError, match=r"target\.server: url must not hold a user name") as caught:
        make_recipe(with_change("target.server", {**SERVER, "url": url}))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "reward_models", [{"reward_models": {}}, {"selection": {"reward_models": []}}], ids=["none", "none votes"]
)
def test_an_order_by_reward_needs_a_reward_model(reward_models: dict) -> None:
    schedule = {"preset": "csft", "order": "target_reward"}
    with pytest.raises(UserError, match=r"schedule\.order is target_reward, but no reward model votes"):
        make_recipe({**MINIMAL, "schedule": schedule, **reward_models})


def test_the_strongest_is_one_of_those_that_vote() -> None:
    three = {**MINIMAL, "reward_models": {name: {"model": name} for name in "ijk"}}
    assert (make_recipe(three).voting_reward_models, make_recipe(three).strongest) == (["i", "j", "k"], "i")
    # The order is that of reward_models, however the reward models are listed: it decides what ties go to.
    two = make_recipe({**three, "selection": {"reward_models": ["k", "j"]}})
    assert (two.voting_reward_models, two.strongest) == (["j", "k"], "j")
    assert (
        make_recipe({**three, "selection": {"reward_models": ["k", "j"], "strongest": "k"}}).strongest == "k"
    )
    with pytest.raises(
        UserError, match=r"selection\.strongest is 'i', but the reward models that vote are \['j', 'k'\]"
    ):
        make_recipe({**three, "selection": {"reward_models": ["k", "j"], "strongest": "i"}})


SOURCES, TARGET = {"a": ["j", "k"], "b": ["j", "k"]}, {"target": ["j"]}


# (preset, selection.inference, order, whether the target is source a, who is scored by whom)
@pytest.mark.parametrize(
    ("preset", "inference", "order", "target", "scorers"),
    [
        ("profuser", "vote", "shuffled", "t", SOURCES),
        ("profuser", "vote", "gt_length", "a", SOURCES),
        ("profuser", "vote", "target_reward", "a", SOURCES),
        ("profuser", "vote", "target_reward", "t", SOURCES | TARGET),
        ("profuser", "reference", "shuffled", "t", {"a": ["reference"], "b": ["reference"]}),
        ("profuser", "reference", "target_reward", "a", {"a": ["reference", "j"], "b": ["reference"]}),
        ("profuser", "reference", "target_reward", "t", {"a": ["reference"], "b": ["reference"]} | TARGET),
        ("csft", "vote", "shuffled", "t", {}),
        ("csft", "reference", "gt_length", "t", {}),
        ("csft", "vote", "target_reward", "a", {"a": ["j"]}),
        ("csft", "vote", "target_reward", "t", TARGET),
    ],
)
def test_only_answers_that_are_used_are_made_and_scored(
    preset: str, inference: str, order: str, target: str, scorers: dict
) -> None:
    content = {
        **MINIMAL,
        "target": {"model": target},
        "reward_models": {name: {"model": name} for name in "jkl"},
        "selection": {"inference": inference, "reward_models": ["j", "k"]},
        "schedule": {"preset": preset, "order": order},
    }
    recipe = make_recipe(content)
    assert recipe.scorers == scorers
    assert recipe.answering.keys() == scorers.keys()
    assert recipe.target_as_source == ("a" if target == "a" else None)


# A template, a system message or answers of its own make the target another than the source with the same
# weights.
@pytest.mark.parametrize(
    ("own", "same"),
    [
        ({}, True),
        ({"dtype": "fp32"}, True),
        ({"chat_template": "llama2"}, False),
        ({"system": "Be brief."}, False),
        ({"responses": "own.jsonl"}, False),
        ({"server": SERVER}, False),
        ({"stop": ["User:"]}, False),
    ],
)
def test_the_target_is_a_source_where_it_answers_as_that_source_does(own: dict, same: bool) -> None:
    assert make_recipe(with_change("target", {"model": "a", **own})).target_as_source == (
        "a" if same else None
    )
    shared = with_change("target", {"model": "a", **own})
    shared["sources"]["a"] |= own
    assert make_recipe(shared).target_as_source == "a"


def test_a_phase_that_learns_nothing_is_refused() -> None:
    content = with_change("schedule", {"phases": [{"name": "idle", "epochs": 1, "training": {"lambda": 1}}]})
    with pytest.raises(UserError, match=r"schedule\.phases\.0: both modes have weight 0"):
        make_recipe(content)


def test_printing_and_reading_back_gives_the_same_recipe() -> None:
    everything = {
        "target": {
            "model": "t",
            "server": {**SERVER, "extra": {"top_k": 5, "nested": {"a": [1]}}},
            "stop": ["User:"],
        },
        "sources": {
            "a": {"model": "a", "responses": {"path": "r", "response": "responses.gpt-4", "match": "prompt"}}
        },
        "reward_models": {"j": {"model": "j", "body": "b", "form": "value_head"}, "k": {"scores": "s.jsonl"}},
        "selection": {"reward_models": ["k"], "training_margin": {"at_least": 0.1}, "inference": "reference"},
        "reference": {"bertscore_model": "e", "bertscore_layer": 9},
        "schedule": {"preset": "simulfuse", "order": "target_reward"},
        "training": {"seed": 5, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 9, "lr_warmup_fraction": 0.1},
    }
    for content in (MINIMAL, {**MINIMAL, **everything}):
        recipe = make_recipe(content)
        assert make_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("training", "style", "of_wsd"),
    [
        ({}, "cosine", None),
        ({"lr_decay_style": "constant"}, "constant", None),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9}, "WSD", "exponential"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9, "lr_wsd_decay_style": "minus_sqrt"},
            "WSD",
            "minus_sqrt",
        ),
    ],
)
def test_the_resolved_recipe_names_the_decay(training: dict, style: str, of_wsd: str | None) -> None:
    printed = yaml.safe_load(dump_recipe(make_recipe({**MINIMAL, "training": training})))["training"]
    assert (printed["lr_decay_style"], printed["lr_wsd_decay_style"]) == (style, of_wsd)


def test_a_training_takes_the_seed_of_the_recipe_or_its_own(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "seed": 3}))
    for flags, seeds in {
        "": (3, 3),
        "--seed 4": (4, 4),
        "--training-seed 0": (3, 0),
        "--seed 4 --training-seed 5": (4, 5),
    }.items():
        recipe = load_recipe(argv=["--recipe", str(path), *flags.split()])
        assert (recipe.seed, recipe.training_seed) == seeds


def test_the_target_is_compared_at_the_temperature_of_its_sources_or_at_its_own(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "loss": {"teacher_temperature": 3.0}}))
    for flags, temperatures in {
        "": (3.0, 3.0),
        "--loss-teacher-temperature 1.5": (1.5, 1.5),
        "--loss-student-temperature 1": (3.0, 1.0),
    }.items():
        recipe = load_recipe(argv=["--recipe", str(path), *flags.split()])
        assert (recipe.loss.teacher_temperature, recipe.student_temperature) == temperatures
        # The resolved recipe of a run gives the same temperatures.
        assert make_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_the_papers_recipe_states_its_temperatures_and_its_tail() -> None:
    loss = yaml.safe_load((ROOT / "examples/profuser_7b.yaml").read_text())["loss"]
    stated = {key: loss[key] for key in ("teacher_temperature", "student_temperature", "tail")}
    assert stated == {"teacher_temperature": 2.0, "student_temperature": 1.0, "tail": "renormalize"}


def test_a_path_alone_stands_for_a_file_with_the_usual_keys() -> None:
    for path, value in {"sources.a.responses": "r.jsonl", "target.responses": "r.jsonl"}.items():
        assert make_recipe(with_change(path, value)) == make_recipe(with_change(path, {"path": value}))
    scores = [
        make_recipe(with_change("reward_models.j", {"scores": value})) for value in ("s", {"path": "s"})
    ]
    assert scores[0] == scores[1]


def test_free_phases_say_what_presets_say() -> None:
    phases = [phase.model_dump(by_alias=True) for phase in PRESETS["profuser"]]
    assert make_recipe(with_change("schedule", {"phases": phases})).phases == PRESETS["profuser"]


def test_flags_with_megatron_names_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    flags = (
        "--tensor-model-parallel-size 2 --lr 1e-4 --seq-length 64 --no-loss-temperature-squared "
        "--schedule-preset csft"
    )
    recipe = load_recipe(argv=["--recipe", str(path), *flags.split()])
    assert recipe.parallel.tensor_model_parallel_size == 2
    assert (recipe.training.lr, recipe.training.seq_length) == (1e-4, 64)
    assert recipe.phases == PRESETS["csft"]


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "workdir: {"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_recipe(argv=["--recipe", str(path)])


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("examples/**/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_the_shipped_recipes_are_valid(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    if "variants" in content:
        load_experiment(path)
    else:
        make_recipe(content, str(path))
