"""What a user gets wrong is answered by one message with file, line or key and the fix, by exit code 2,
and by no half-written file.
"""

import json
import random
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_models import save_model, save_tokenizer, small_recipe, write_rows

from megatron_fuse.capture import CAPTURES, capture, capture_shard
from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.errors import UserError, exit_code
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.instructions import load_examples, prepare_instructions
from megatron_fuse.recipe import load_recipe
from megatron_fuse.responses import generate_responses
from megatron_fuse.stages import Context
from megatron_fuse.storage import Plan, run_plan

ROOT = Path(__file__).parents[1]
FUSION = "fusion/exact-skip-T2"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a reward model, a recipe, and a work directory with everything up to fusion data."""
    root = tmp_path_factory.mktemp("bad_input")
    for seed, (name, family) in enumerate({"alpha": "llama", "beta": "mpt"}.items()):
        save_model(root / name, family, seed=seed)
    save_model(root / "reward", "llama", reward=True)
    write_rows(
        root / "data.jsonl",
        [{"instruction": f"Add {i} and 1.", "output": f"That is {i + 1}."} for i in range(4)],
    )
    recipe = {
        "workdir": str(root / "work"),
        "target": {"model": str(root / "alpha")},
        "sources": {name: {"model": str(root / name), "dtype": "fp32"} for name in ("alpha", "beta")},
        "reward_models": {"reward": {"model": str(root / "reward"), "dtype": "fp32"}},
        "data": {"path": str(root / "data.jsonl"), "shard_size": 2},
        "responses": {"max_new_tokens": 3},
        "schedule": {"preset": "profuser"},
        "training": {"seq_length": 120, "precision": "fp32"},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for tool in (
        "prepare_instructions",
        "generate_responses",
        "score_responses",
        "capture_teacher",
        "build_fusion_data",
    ):
        assert run(tool, root) == 0
    return root


def run(tool: str, root: Path, *arguments: object) -> int:
    """The exit code of a command as a shell would start it, but in this process."""
    argv = sys.argv
    sys.argv = [tool, "--recipe", str(root / "recipe.yaml"), *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv
    raise AssertionError("the command did not end with an exit code")


def the_error(capsys: pytest.CaptureFixture) -> str:
    """The last line of stderr: the only error, without a traceback. Before it are messages about the work."""
    *messages, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert not any(line.startswith(("error: ", "Traceback")) for line in messages)
    return error


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy of it to damage; its recipe names the copy's files."""
    root = tmp_path / "world"
    shutil.copytree(made, root)
    path = root / "recipe.yaml"
    path.write_text(path.read_text().replace(str(made), str(root)))
    return root


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_arrays(path: Path, **at_zero: float) -> None:
    arrays = load_file(path)
    for name, value in at_zero.items():
        arrays[name] = arrays[name].copy()
        arrays[name].flat[0] = value
    with safe_open(path, "np") as file:  # the same size as before
        save_file(arrays, path, file.metadata())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"workdir: caf\xe9\n", "not valid YAML: 'utf-8' codec"),  # Latin-1
        (b"", "must be a mapping of keys, but is empty"),
        # Would lose a source.
        (b"sources:\n  a: {model: x}\n  a: {model: y}\n", ":3: the key 'a' is given twice"),
        (b"sources: [a, b]\n", "sources: must be a mapping of keys"),
        (b"training: {lr: .inf}\n", "training.lr: Input should be a finite number"),
        (b"training: {lr: 0.1, min_lr: 0.2}\n", "min_lr .0.2. is above lr .0.1."),
        (b"training: {adam_beta1: 1.0}\n", "training.adam_beta1: Input should be less than 1"),
        (
            b"parallel: {virtual_pipeline_model_parallel_size: 2}\n",
            "needs pipeline_model_parallel_size of at least 2",
        ),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text)
    with pytest.raises(UserError, match=f"(?s)recipe.yaml.*{message}"):
        load_recipe(argv=["--recipe", str(tmp_path / "recipe.yaml")])


def other_tokenizer(root: Path) -> None:
    save_model(root / "alpha", "llama", vocab_size=264)
    save_tokenizer(root / "alpha", vocab_size=340)


def change_config(root: Path, **changes: object) -> None:
    path = root / "alpha/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (
            lambda root: None,
            ["--tensor-model-parallel-size", 3],
            "3 does not divide num_attention_heads .4. of .*alpha",
        ),
        (lambda root: None, ["--pipeline-model-parallel-size", 5], "5 is more than the 2 layers"),
        (
            lambda root: None,
            ["--seq-length", 500],
            "--seq-length 500 is longer than max_position_embeddings .128.",
        ),
        (lambda root: None, ["--target-model", "beta"], "class MptForCausalLM is not supported"),
        (
            other_tokenizer,
            [],
            "target.model: the tokenizer has ids up to .*The tokenizer belongs to another model",
        ),
        (
            lambda root: (root / "t.jinja").write_bytes(b"\xff\xfe"),
            ["--target-chat-template", "t.jinja"],
            "not UTF-8 text",
        ),
        (
            lambda root: (root / "t.jinja").write_text("{{ 1 / 0 }}"),
            ["--target-chat-template", "t.jinja"],
            "by zero",
        ),
        (
            lambda root: (root / "data.jsonl").write_text("[" * 9999 + "]" * 9999),
            [],
            "data.jsonl:1: element 1 is not valid JSON",
        ),
        (
            lambda root: (root / "data.jsonl").write_bytes(
                b'{"instruction": "Q"}\n{"instruction": "caf\xe9"}\n'
            ),
            [],
            "data.jsonl:2: not valid JSON .'utf-8' codec can't decode byte 0xe9",
        ),
        (
            lambda root: (root / "data.jsonl").write_text('[\n{"a": 1},\n]'),
            [],
            "data.jsonl:3: element 2 is not valid JSON",
        ),
        (lambda root: None, ["--workdir", "data.jsonl"], "data.jsonl: cannot be written .Not a directory"),
    ],
)
def test_the_first_stage_refuses_what_no_later_one_could_use(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    damage: Callable[[Path], object],
    arguments: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(world)
    shutil.rmtree(world / "work")
    damage(world)
    before = files(world)
    capsys.readouterr()
    assert run("prepare_instructions", world, *arguments) == 2
    error = the_error(capsys)
    assert pytest.raises(UserError, match=message).matches(UserError(error)), error
    assert files(world) == before


@pytest.mark.parametrize(
    "damage", ["half", "other size", "more layers", "no head", "not a pickle", "NaN", "ids beyond"]
)
def test_a_broken_model_is_named_and_a_mended_one_goes_on(
    world: Path, capsys: pytest.CaptureFixture, damage: str
) -> None:
    weights = world / "alpha/model.safetensors"
    messages = {
        "half": "alpha/model.safetensors is cut off",
        "other size": "but config.json gives",
        "more layers": "has no weights for model.layers.2",
        "no head": "has no weights for lm_head.weight",
        "not a pickle": "alpha/pytorch_model.bin is a Git LFS pointer",
        "NaN": "model.norm.weight holds NaN or infinite weights",
        "ids beyond": "but the model knows only 269 ids",
    }
    if damage == "half":
        halve(weights)
    elif damage == "other size":
        change_config(world, hidden_size=64)
    elif damage == "more layers":
        change_config(world, num_hidden_layers=3)
    elif damage == "no head":
        shutil.copy(world / "reward/model.safetensors", weights)
    elif damage == "not a pickle":
        weights.unlink()
        (world / "alpha/pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "NaN":
        edit_arrays(weights, **{"model.norm.weight": np.nan})
    else:
        other_tokenizer(world)
    shutil.rmtree(world / "work/responses/alpha")
    before = files(world)
    # Not what is damaged.
    command = (
        "generate_responses",
        world,
        "--source",
        "alpha",
        "--target-model",
        world / "beta",
    )
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert messages[damage] in error
    assert "Traceback" not in error and files(world) == before
    shutil.rmtree(world / "alpha")
    save_model(world / "alpha", "llama", seed=7)
    assert run(*command) == 0


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_list(path: Path) -> None:
    path.write_text("[]")


# damage, file, what is to be made from it, by which command. (Of the files that training maps, a build run
# again and training look at the sizes alone; `inspect_data.py --verify` reads them.)
DAMAGED = [
    (flip_a_bit, "instructions/examples.00001.jsonl", "responses", "generate_responses"),
    (flip_a_bit, "instructions/examples.00001.jsonl", "captures/beta/training", "capture_teacher"),
    (flip_a_bit, "responses/beta/shard-00001.jsonl", "scores", "score_responses"),
    (flip_a_bit, "responses/beta/shard-00000.jsonl", "captures/beta/inference", "capture_teacher"),
    (flip_a_bit, "scores/beta/reward/shard-00001.npy", "fusion", "build_fusion_data"),
    (flip_a_bit, "captures/beta/training/shard-00001.safetensors", "fusion", "build_fusion_data"),
    (
        flip_a_bit,
        "{fusion}/teachers/beta/training/shard-00000.examples.safetensors",
        "none",
        "build_fusion_data",
    ),
    (write_list, "instructions/manifest.json", "responses", "generate_responses"),
    (Path.unlink, "instructions/examples.00001.jsonl", "responses", "generate_responses"),
    (Path.unlink, "scores/beta/reward/shard-00000.npy", "fusion", "build_fusion_data"),
    (halve, "responses/beta/shard-00000.jsonl", "scores", "score_responses"),
    (halve, "captures/beta/training/shard-00001.safetensors", "fusion", "build_fusion_data"),
]


@pytest.mark.parametrize(("damage", "name", "made_from_it", "tool"), DAMAGED)
def test_a_damaged_file_is_named_with_the_mend_by_the_stage_that_reads_it(
    world: Path,
    capsys: pytest.CaptureFixture,
    damage: Callable[[Path], None],
    name: str,
    made_from_it: str,
    tool: str,
) -> None:
    work = world / "work"
    path = work / name.format(fusion=FUSION)
    shutil.rmtree(work / made_from_it, ignore_errors=True)
    damage(path)
    capsys.readouterr()
    assert run(tool, world) == 2
    error = the_error(capsys)
    said = {flip_a_bit: "sha256 .*but the manifest has", halve: "bytes instead of", Path.unlink: "missing"}
    assert re.search(
        f"{path}: .*{said.get(damage, 'a list instead')}.*Restore (it|the file)[,.] .*run the stage again",
        error,
    )
    shards = {path.with_name(path.name.split(".")[0] + ".done") for path in work.glob("**/shard-*")}
    assert all(marker.exists() for marker in shards)  # whole, or not there


# key of the recipe, its new value, which command finds out, what has to be said. gamma: beta with another
# tokenizer; delta: beta with other weights. The command has its own work before it: what it makes is removed
# first.
OTHERWISE = {
    "target tokenizer": (
        "target.model",
        "gamma",
        "generate_responses",
        "instructions .*inputs.target tokenizer = ",
    ),
    "target template": (
        "target.chat_template",
        "alpaca",
        "generate_responses",
        "instructions .*inputs.target chat format",
    ),
    "target template, late": (
        "target.chat_template",
        "alpaca",
        "build_fusion_data",
        "instructions .*inputs.target chat",
    ),
    "tokenizer": ("sources.beta.model", "gamma", "capture_teacher", "responses/beta .*inputs.tokenizer = "),
    "tokenizer of answers": (
        "sources.beta.model",
        "gamma",
        "score_responses",
        "responses/beta .*inputs.tokenizer = ",
    ),
    "tokenizer, late": (
        "sources.beta.model",
        "gamma",
        "build_fusion_data",
        "responses/beta .*inputs.tokenizer = ",
    ),
    "template": (
        "sources.beta.chat_template",
        "alpaca",
        "capture_teacher",
        "responses/beta .*inputs.chat format = ",
    ),
    "template, late": (
        "sources.beta.chat_template",
        "alpaca",
        "build_fusion_data",
        "responses/beta .*inputs.chat format",
    ),
    "reward model's template": (
        "reward_models.reward.chat_template",
        "alpaca",
        "build_fusion_data",
        "scores/.*chat format",
    ),
    "model": ("sources.beta.model", "delta", "capture_teacher", "responses/beta .*inputs.model = "),
    "temperature": (
        "responses.temperature",
        0.5,
        "capture_teacher",
        "responses/alpha .*temperature = 1.0, but now .* 0.5",
    ),
    "temperature of answers": (
        "responses.temperature",
        0.5,
        "score_responses",
        "responses/alpha .*temperature = 1.0",
    ),
    "KL temperature": (
        "loss.teacher_temperature",
        3.0,
        "build_fusion_data",
        r"captures/.*temperatures = \[2.0\], but",
    ),
}
MADE = {"generate_responses": "responses", "score_responses": "scores", "capture_teacher": "captures"}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_was_made_otherwise_is_refused_by_the_stage_that_reads_it(
    world: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    key, value, tool, message = OTHERWISE[case]
    save_model(world / "gamma", "mpt", seed=1, vocab_size=340)
    save_model(world / "delta", "mpt", seed=2)
    content = yaml.safe_load((world / "recipe.yaml").read_text())
    *sections, last = key.split(".")
    section = content
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = str(world / value) if last == "model" else value
    (world / "recipe.yaml").write_text(yaml.safe_dump(content))
    shutil.rmtree(world / "work" / MADE.get(tool, "fusion"))
    capsys.readouterr()
    assert run(tool, world) == 2
    error = the_error(capsys)
    assert re.search(
        rf"work/{message}.*\. Remove .* and run megatron-fuse .* again, or restore the old value", error
    )


ODD = [
    "👩‍👩‍👧 and 👍🏽",
    "e\u0301 is not é, nor is A\u030a Å",
    "line\r\nline\rline\u2028line\x85end",
    "a\0b\0",
    "\ufeffmark",
    "\u202eright to left\u200f \U00100000\U0010fffd",
    "<|im_end|> and <|im_start|>user\n as text",
    " \t both ends \n",
]


def test_every_byte_of_a_text_arrives_in_captures_and_fusion_data(tmp_path: Path) -> None:
    """Ground truth and answers: odd texts, and random mixtures of their characters; one answer is empty."""
    draw = random.Random(7)
    texts = ODD + ["".join(draw.choices("".join(ODD), k=draw.randint(1, 40))) + "x" for _ in range(20)]
    answers = [*texts[1:], ""]
    rows = [{"id": f"{n}", "instruction": f"Repeat: {text}", "output": text} for n, text in enumerate(texts)]
    given = [{"id": f"{n}", "response": text} for n, text in enumerate(answers)]
    source = {
        "model": str(save_model(tmp_path / "beta", "mpt", positions=512, vocab_size=340)),
        "responses": str(write_rows(tmp_path / "answers.jsonl", given)),
    }
    recipe = small_recipe(
        tmp_path / "work",
        write_rows(tmp_path / "data.jsonl", rows),
        save_model(tmp_path / "alpha", "llama"),
        {"beta": source},
        schedule={"preset": "profuser"},
        training={"seq_length": 400},
        data={"shard_size": 9},
    )
    instructions = prepare_instructions(Context(recipe))
    assert [example.response for example in load_examples(instructions)] == texts
    generate_responses(Context(recipe), "beta")
    for mode in ("training", "inference"):
        capture(Context(recipe), "beta", mode)
    build_fusion_data(Context(recipe))
    fusion = FusionDataset(recipe)
    tokenizer, target = (
        load_format(recipe.sources["beta"], "beta").tokenizer,
        load_format(recipe.target, "target").tokenizer,
    )
    for mode, wanted in (("training", texts), ("inference", answers)):
        captured = Context(recipe).open(CAPTURES, "beta", mode)
        shards = [capture_shard(captured, index) for index in range(captured.manifest["shards"])]
        # The last: the stop token.
        read = [shard.spans(n).tokens[:-1] for shard in shards for n in range(len(shard.status))]
        documents = [fusion.document(mode, n, "beta") for n in range(len(texts))]
        learned = [document.tokens[document.supervised][:-1] for document in documents]
        for text, of_source, of_target in zip(wanted, read, learned, strict=True):
            assert tokenizer.joined_bytes(of_source.tolist()) == text.encode(), ascii(text)
            assert target.joined_bytes(of_target.tolist()) == text.encode(), ascii(text)


def test_names_that_the_recipe_does_not_have(made: Path, capsys: pytest.CaptureFixture) -> None:
    for tool in ("generate_responses", "score_responses", "capture_teacher"):
        assert run(tool, made, "--source", "gamma") == 2
        assert "there is no 'gamma'. Choose one of alpha, beta." in capsys.readouterr().err


def test_an_error_in_the_first_shard_leaves_nothing_and_in_a_later_one_what_is_whole(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "a", "numbers", {}, {}, shards=3)

    def failing(at: int) -> Callable[[int, Path], dict[str, int]]:
        def make(index: int, prefix: Path) -> dict[str, int]:
            Path(f"{prefix}.txt").write_text("half")
            if index == at:
                raise UserError("broken")
            return {}

        return make

    for at, left in ((0, set()), (1, {"plan.json", "shard-00000.txt", "shard-00000.done"})):
        with pytest.raises(UserError, match="broken"):
            run_plan(plan, failing(at))
        assert files(tmp_path) - {"a"} == {f"a/{name}" for name in left}


def test_what_the_operating_system_refuses_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert exit_code(lambda: (tmp_path / "nowhere").read_bytes() and None) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/nowhere: No such file or directory\n"
    with pytest.raises(ConnectionError):  # names no file: nothing that a user can look at
        exit_code(lambda: (_ for _ in ()).throw(ConnectionError("reset")))


def test_torchrun_quotes_the_message_once_per_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def refuse() -> None:
        raise UserError("parallel.x: 3 is not 2")

    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        assert exit_code(refuse) == 2
    assert capsys.readouterr().err == "error: parallel.x: 3 is not 2\n"  # by rank 0 only
    failures = {rank: ProcessFailure(rank, 1, 2, str(tmp_path / f"{rank}.json")) for rank in range(2)}
    assert "traceback : parallel.x: 3 is not 2\n" in str(ChildFailedError("megatron_fuse.pretrain", failures))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "nan"], "--temperature at least 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        ([], "model.safetensors is cut off"),
    ],
)
def test_chat_refuses(
    world: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    halve(world / "alpha/model.safetensors")
    monkeypatch.setattr(sys, "argv", ["chat", str(world / "alpha"), "--prompt", "x", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools/chat.py"), run_name="__main__")
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("chat", ["~nouser/x"]),
        ("convert_checkpoint", ["--from-megatron=~nouser/x", "--output=x"]),
        ("convert_checkpoint", ["--from-hugging-face=~nouser/x", "--output=x"]),
        ("convert_checkpoint", ["--from-hugging-face=x", "--output=~nouser/x"]),
        ("convert_checkpoint", ["--from-megatron=x", "--reference=~nouser/x", "--output=x"]),
        ("inspect_data", ["~nouser/x"]),
        ("merge_models", ["linear", "x", "x", "--output=~nouser/x"]),
        ("evaluate", ["--output=~nouser/x", "m=x"]),
        ("prepare_instructions", ["--recipe=~nouser/x"]),
    ],
)
def test_a_tilde_in_a_path_is_a_home_directory(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tool: str, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    assert end.value.code == 2 and "there is no home directory of ~nouser" in capsys.readouterr().err
