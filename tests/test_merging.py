"""Merges against a straight computation in fp64 by the methods' papers; what is random, against its laws."""

import itertools
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from log_lines import logged
from safetensors.torch import load_file, save_file
from small_models import save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fuse.errors import UserError
from megatron_fuse.merging import METHODS, RECORD, Merge, merge_models, read_models
from megatron_fuse.model.weight_files import DTYPES
from megatron_fuse.storage import read_json, sha256_of_file

pytest.importorskip("mergekit", reason="mergekit is not installed: pip install 'megatron-fuse[merge]'")

ROOT = Path(__file__).parent.parent
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and a and b that were "trained" from it: every tensor of theirs is moved."""
    root = tmp_path_factory.mktemp("family")
    save_model(root / "base", "llama")
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        moved(
            root / "base", root / name, lambda _, x, g=generator: x + 0.05 * torch.randn(x.shape, generator=g)
        )
    return root


def moved(origin: Path, directory: Path, change) -> Path:
    """A copy of a model with every tensor changed: change(name, tensor)."""
    shutil.copytree(origin, directory)
    tensors = {
        name: change(name, tensor).contiguous()
        for name, tensor in load_file(origin / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def read(directory: Path) -> Tensors:
    return {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}


def merged(output: Path, method: str, *models: Path, **options: object) -> Tensors:
    assert merge_models(Merge(method, models, **{"dtype": "fp32", **options}), output)
    return read(output)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Shoemake 1985 on the flattened tensors; straight where they are nearly parallel."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    if cosine.abs() > 0.9995:
        return (1 - t) * a + t * b
    angle = cosine.acos()
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def ties(
    base: Tensor, models: list[Tensor], weights: list[float], density: float, normalize: bool = True
) -> Tensor:
    """Yadav et al. 2023: trim, elect a sign, merge what has it."""
    differences = []
    for model, weight in zip(models, weights, strict=True):
        difference = (model.float() - base.float()).double()  # as rounded as what is ranked there
        least = (
            difference.abs().flatten().sort(descending=True).values[max(int(density * base.numel()), 1) - 1]
        )
        differences.append(weight * torch.where(difference.abs() >= least, difference, 0.0))
    elected = torch.where(sum(differences) >= 0, 1.0, -1.0)
    agreeing = [difference.sign() == elected for difference in differences]
    total = sum(torch.where(agrees, d, 0.0) for agrees, d in zip(agreeing, differences, strict=True))
    if not normalize:
        return base + total
    share = sum(weight * agrees for weight, agrees in zip(weights, agreeing, strict=True))
    return base + total / torch.where(share == 0, 1.0, share)


def assert_same(ours: Tensors, expected: Tensors) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        # fp32 arithmetic on values around 1
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("weights", [None, (0.7, 0.3), (3.0, 1.0)])
def test_linear_is_the_weighted_mean(
    family: Path, tmp_path: Path, weights: tuple[float, float] | None
) -> None:
    ours = merged(tmp_path / "out", "linear", family / "a", family / "b", weights=weights)
    a, b = read(family / "a"), read(family / "b")
    x, y = weights or (0.5, 0.5)
    assert_same(ours, {name: (x * a[name] + y * b[name]) / (x + y) for name in a})


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(family: Path, tmp_path: Path, t: float) -> None:
    # Independent models: an angle of about 90 degrees between matrices, of 0 between the norms' weights, all
    # ones.
    other = save_model(tmp_path / "other", "llama", seed=7)
    ours = merged(tmp_path / "out", "slerp", family / "base", other, t=t)
    a, b = read(family / "base"), read(other)
    assert_same(ours, {name: slerp(a[name], b[name], t) for name in a})
    angle = torch.nn.functional.cosine_similarity(*(m["lm_head.weight"].flatten() for m in (a, b)), dim=0)
    assert angle.abs() < 0.1


# On both sides of the threshold, where arc and line differ by 1e-4 of the values; opposite models have no
# arc.
@pytest.mark.parametrize("cosine", [0.9993, 0.9997, -1.0])
def test_slerp_of_nearly_parallel_tensors_is_linear(family: Path, tmp_path: Path, cosine: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def turned(_: str, tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        along = tensor.double() / tensor.double().norm()
        across = noise - (noise * along).sum() * along
        return (tensor.norm() * (cosine * along + (1 - cosine**2) ** 0.5 * across / across.norm())).float()

    other = moved(family / "base", tmp_path / "other", turned)
    ours = merged(tmp_path / "out", "slerp", family / "base", other)
    a, b = read(family / "base"), read(other)
    assert_same(ours, {name: slerp(a[name], b[name], 0.5) for name in a})
    line = {name: (a[name] + b[name]) / 2 for name in a}
    far = max(((ours[name] - line[name]).norm() / a[name].norm()).item() for name in a)
    assert (far > 5e-5) == (cosine == 0.9993)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.2)])
def test_ties_trims_elects_and_merges(
    family: Path, tmp_path: Path, density: float, weights: tuple[float, float]
) -> None:
    ours = merged(
        tmp_path / "out",
        "ties",
        family / "a",
        family / "b",
        base=family / "base",
        density=density,
        weights=weights,
    )
    base, models = read(family / "base"), [read(family / name) for name in "ab"]
    expected = {
        name: ties(base[name], [model[name] for model in models], list(weights), density) for name in base
    }
    assert_same(ours, expected)


@pytest.mark.parametrize("rescale", ["density", "l1"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.6)])
def test_dare_that_drops_nothing_adds_the_differences(
    family: Path, tmp_path: Path, rescale: str, weights: tuple[float, float]
) -> None:
    options = {"base": family / "base", "density": 1.0, "weights": weights, "rescale": rescale}
    models = family / "a", family / "b"
    linear = merged(tmp_path / "linear", "dare_linear", *models, **options)
    signed = merged(tmp_path / "ties", "dare_ties", *models, **options)
    base, a, b = (read(family / name) for name in ("base", "a", "b"))
    x, y = weights
    assert_same(
        linear, {name: base[name] + x * (a[name] - base[name]) + y * (b[name] - base[name]) for name in base}
    )
    assert_same(signed, {n: ties(base[n], [a[n], b[n]], [x, y], 1.0, normalize=False) for n in base})


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_a_share_and_divides_it_by_the_density(
    family: Path, tmp_path: Path, method: str, density: float
) -> None:
    ours = merged(tmp_path / "out", method, family / "a", base=family / "base", density=density)
    kept = entries = 0
    base, a = read(family / "base"), read(family / "a")
    for name in base:
        change, difference = ours[name] - base[name], a[name] - base[name]
        keeps = change != 0
        torch.testing.assert_close(change[keeps], difference[keeps] / density, rtol=1e-4, atol=2e-6)
        kept, entries = kept + int(keeps.sum()), entries + keeps.numel()
    # Five standard errors.
    assert abs(kept / entries - density) < 5 * (density * (1 - density) / entries) ** 0.5


def test_dare_drops_from_each_model_by_itself(family: Path, tmp_path: Path) -> None:
    ours = merged(
        tmp_path / "out", "dare_linear", family / "a", family / "b", base=family / "base", density=0.5
    )
    name = "model.embed_tokens.weight"
    base, a, b = (read(family / model)[name] for model in ("base", "a", "b"))
    change = ours[name] - base
    shares = []
    for x, y in ((0, 0), (0, 1), (1, 0), (1, 1)):
        expected = (x * (a - base) + y * (b - base)) * 0.5 / 0.5  # the weight over the density
        shares.append(((change - expected).abs() < 2e-6).double().mean().item())
    assert sum(shares) == pytest.approx(1, abs=1e-2)
    # Every combination of kept and dropped is as likely: five standard errors of a quarter.
    assert all(abs(share - 0.25) < 5 * (0.1875 / base.numel()) ** 0.5 + 1e-3 for share in shares), shares


def test_dare_drops_from_each_tensor_by_itself(family: Path, tmp_path: Path) -> None:
    ours, base = (
        merged(tmp_path / "out", "dare_linear", family / "a", base=family / "base"),
        read(family / "base"),
    )
    kept = [ours[name] != base[name] for name in base if name.endswith(("q_proj.weight", "o_proj.weight"))]
    for first, second in itertools.combinations(kept, 2):
        # Half of what is kept here is kept there: five standard errors.
        assert abs((first == second).double().mean().item() - 0.5) < 2.5 / first.numel() ** 0.5


def test_todays_rescaling_keeps_the_l1_norm_of_every_tensor(family: Path, tmp_path: Path) -> None:
    ours = merged(
        tmp_path / "out", "dare_linear", family / "a", base=family / "base", density=0.3, rescale="l1"
    )
    base, a = read(family / "base"), read(family / "a")
    for name in base:
        assert (ours[name] - base[name]).abs().sum() == pytest.approx(
            (a[name] - base[name]).abs().sum().item(), rel=1e-4
        )


def test_a_seed_decides_every_byte_and_moves_no_other_generator(family: Path, tmp_path: Path) -> None:
    models, options = (family / "a", family / "b"), {"base": family / "base"}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    merged(tmp_path / "first", "dare_ties", *models, **options, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    merged(tmp_path / "again", "dare_ties", *models, **options, seed=3)
    merged(tmp_path / "other", "dare_ties", *models, **options, seed=4)
    first, again, other = (
        sha256_of_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other")
    )
    assert first == again != other


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties"])
def test_mergekits_own_command_gives_the_same_bits(family: Path, tmp_path: Path, method: str) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    density = 1.0 if method == "dare_ties" else 0.4  # what it drops depends on the order of its tasks
    options = {"base": family / "base", "density": density} if method in ("ties", "dare_ties") else {}
    ours = merged(tmp_path / "ours", method, family / "a", family / "b", **options)
    per_model = (
        {"weight": 0.5, "density": density} if options else {} if method == "slerp" else {"weight": 0.5}
    )
    configuration = {
        "merge_method": method,
        "models": [{"model": str(family / name), "parameters": per_model} for name in "ab"],
        "base_model": str(family / "base") if options else str(family / "a") if method == "slerp" else None,
        "parameters": {"t": 0.5} if method == "slerp" else None,
        "dtype": "float32",
    }
    theirs = tmp_path / "theirs"
    run_merge(MergeConfiguration.model_validate(configuration), str(theirs), MergeOptions(quiet=True))
    assert all(torch.equal(ours[name], tensor) for name, tensor in read(theirs).items())
    assert ours.keys() == read(theirs).keys()


def test_bf16_is_the_fp32_merge_rounded_once(family: Path, tmp_path: Path) -> None:
    options = {"base": family / "base", "density": 0.5}
    exact = merged(tmp_path / "fp32", "ties", family / "a", family / "b", **options)
    rounded = merged(tmp_path / "bf16", "ties", family / "a", family / "b", **options, dtype="bf16")
    assert all(torch.equal(rounded[name], exact[name].float().bfloat16().double()) for name in exact)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16


def in_dtype(origin: Path, directory: Path, dtype: torch.dtype) -> Path:
    return moved(origin, directory, lambda _, tensor: tensor.to(dtype))


@pytest.mark.parametrize(
    ("first", "second", "asked", "written", "line"),
    [
        ("fp32", "fp32", None, "fp32", None),
        ("bf16", "bf16", None, "bf16", None),
        ("fp16", "fp16", None, "fp16", None),
        ("bf16", "fp16", None, "fp32", None),  # neither holds the other's values
        ("bf16", "fp32", None, "fp32", None),
        ("bf16", "bf16", "fp32", "fp32", None),
        (
            "fp32",
            "fp32",
            "bf16",
            "bf16",
            "fp32 weights are written as bf16, which rounds them: --dtype fp32 keeps them",
        ),
        (
            "fp32",
            "bf16",
            "fp16",
            "fp16",
            "fp32 weights are written as fp16, which rounds them: --dtype fp32 keeps them",
        ),
        (
            "bf16",
            "bf16",
            "fp16",
            "fp16",
            "bf16 weights are written as fp16, which rounds them: --dtype bf16 keeps them",
        ),
    ],
)
def test_a_merge_keeps_the_precision_of_its_models_or_says_that_it_does_not(
    family: Path, tmp_path: Path, first: str, second: str, asked: str | None, written: str, line: str | None
) -> None:
    models = [
        in_dtype(family / name, tmp_path / name, DTYPES[dtype])
        for name, dtype in zip("ab", (first, second), strict=True)
    ]
    with logged("warning") as said:
        assert merge_models(Merge("linear", tuple(models), dtype=asked), tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {DTYPES[written]}
    assert read_json(tmp_path / "out" / RECORD)["dtype"] == written
    assert read_json(tmp_path / "out/config.json")["dtype"] == str(DTYPES[written]).removeprefix("torch.")
    assert said.getvalue().splitlines() == ([f"warning: {line}"] if line else [])


def test_the_command_writes_a_model_once_and_says_of_what(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shutil.copytree(family / "a", tmp_path / "a")
    settings = read_json(first / "tokenizer_config.json")
    (first / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": "{{ 'the first' }}"})
    )
    output = tmp_path / "merged" / "ties"
    command = [
        "merge_models.py",
        "--method",
        "ties",
        "--model",
        f"{first}:0.6",
        "--model",
        f"{family / 'b'}:0.4",
    ]
    command += ["--base", str(family / "base"), "--density", ".4", "--dtype", "fp32", "--output", str(output)]

    def run(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools/merge_models.py"), run_name="__main__")
        return end.value.code

    assert run(command) == 0
    base, models = read(family / "base"), [read(first), read(family / "b")]
    expected = {name: ties(base[name], [model[name] for model in models], [0.6, 0.4], 0.4) for name in base}
    assert_same(read(output), expected)
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ 'the first' }}"
    logits = AutoModelForCausalLM.from_pretrained(output)(torch.arange(8)[None]).logits
    assert logits.isfinite().all()
    record = read_json(output / RECORD)
    assert (record["method"], record["weights"], record["density"]) == ("ties", [0.6, 0.4], 0.4)
    assert len(set(record["fingerprints"])) == 3

    stamp = (output / "model.safetensors").stat().st_mtime_ns
    assert run(command) == 0
    assert "was there already, in fp32" in capsys.readouterr().out
    assert run([".5" if word == ".4" else word for word in command]) == 2
    assert "density is 0.4 there, but 0.5 here" in capsys.readouterr().err
    assert (output / "model.safetensors").stat().st_mtime_ns == stamp
    assert [entry.name for entry in output.parent.iterdir()] == ["ties"]

    (output / "model.safetensors").unlink()
    assert run(command) == 0 and "merged" in capsys.readouterr().out
    assert_same(read(output), expected)
    weights = bytearray((output / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (output / "model.safetensors").write_bytes(weights)
    assert run(command) == 2
    assert "model.safetensors: checksum" in capsys.readouterr().err


def test_a_merge_that_breaks_off_leaves_nothing(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("megatron_fuse.merging.write_beside_weights", full_disk)
    with pytest.raises(UserError, match=r"out: cannot be written \(no space left"):
        merge_models(Merge("linear", (family / "a", family / "b")), tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_constants_that_older_checkpoints_hold_are_left_out(family: Path, tmp_path: Path) -> None:
    older = shutil.copytree(family / "b", tmp_path / "older")
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(
        load_file(family / "b" / "model.safetensors") | constants,
        older / "model.safetensors",
        metadata={"format": "pt"},
    )
    ours = merged(tmp_path / "out", "linear", family / "a", older)
    a, b = read(family / "a"), read(family / "b")
    assert_same(ours, {name: (a[name] + b[name]) / 2 for name in a})


@pytest.mark.parametrize(
    ("method", "models", "options", "message"),
    [
        ("ties2", "ab", {}, "--method is 'ties2'. Choose one of linear, slerp"),
        ("linear", "ab", {"dtype": "int8"}, "--dtype is 'int8'"),
        ("linear", "a", {}, "merges at least 2 models, but --model names 1"),
        ("slerp", "a", {}, "merges exactly 2 models, but --model names 1"),
        ("slerp", "aba", {}, "merges exactly 2 models, but --model names 3"),
        ("slerp", "ab", {"base": "base"}, "--method slerp does not use --base"),
        ("slerp", "ab", {"weights": (1.0, 1.0)}, "--method slerp does not use a weight in --model"),
        ("slerp", "ab", {"t": 1.5}, "--t is 1.5"),
        ("linear", "ab", {"base": "base"}, "--method linear does not use --base"),
        ("linear", "ab", {"density": 0.5}, "--method linear does not use --density"),
        (
            "linear",
            "ab",
            {"weights": (1.0, 0.0)},
            "weights of the models are 1.0, 0.0, but must be from 1e-6",
        ),
        ("ties", "ab", {}, "Name the base model with --base"),
        ("dare_ties", "ab", {}, "Name the base model with --base"),
        ("dare_linear", "ab", {}, "Name the base model with --base"),
        ("ties", "ab", {"base": "base", "t": 0.5}, "--method ties does not use --t"),
        ("ties", "ab", {"base": "base", "rescale": "l1"}, "--method ties does not use --rescale"),
        ("ties", "ab", {"base": "base", "density": 0.0}, "--density is 0.0"),
        ("dare_ties", "ab", {"base": "base", "density": 1.01}, "--density is 1.01"),
        ("dare_ties", "ab", {"base": "base", "density": float("nan")}, "--density is nan"),
        ("dare_ties", "ab", {"base": "base", "rescale": "l2"}, "--rescale is 'l2'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    family: Path, tmp_path: Path, method: str, models: str, options: dict, message: str
) -> None:
    options = {key: family / value if key == "base" else value for key, value in options.items()}
    with pytest.raises(UserError) as refusal:
        merge_models(
            Merge(method, tuple(family / name for name in models), **options), tmp_path / "new" / "out"
        )
    assert message in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def edited(directory: Path, file: str, change) -> None:
    content = json.loads((directory / file).read_text())
    change(content)
    (directory / file).write_text(json.dumps(content))


def other_rotation(directory: Path) -> None:
    edited(directory, "config.json", lambda config: config["rope_parameters"].update(rope_theta=5e5))


def other_vocabulary(directory: Path) -> None:
    edited(directory, "config.json", lambda config: config.update(vocab_size=299))


def two_tokens_exchanged(directory: Path) -> None:
    def exchange(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edited(directory, "tokenizer.json", exchange)


def a_token_more(directory: Path) -> None:
    """In a row of the embedding that the other tokenizer leaves unused."""

    def add(content: dict) -> None:
        token = max(content["model"]["vocab"].values()) + 1
        added = {"id": token, "content": "<|tool|>", "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append(added | flags)

    edited(directory, "tokenizer.json", add)


def other_shape(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def quantised(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def tensor_missing(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_rotation, "differ in config.json, at rope_parameters"),
        (other_vocabulary, r"have vocabularies of \d+ and 299 rows"),
        (two_tokens_exchanged, r"differ in the tokenizer, at \d+: b'[ab]' and b'[ab]'"),
        (a_token_more, r"differ in the tokenizer, at \d+: None and '<\|tool\|>'"),
        (other_shape, r"differ in the shapes of tensors, at lm_head.weight: \(\d+, 32\) and \(\d+, 32\)"),
        (tensor_missing, r"differ in the shapes of tensors, at lm_head.weight: \(\d+, 32\) and None"),
        (quantised, "lm_head.weight is I8, but only weights of fp32, bf16 or fp16 can be merged"),
    ],
)
@pytest.mark.parametrize("role", ["model", "base"])
def test_models_that_do_not_fit_each_other_are_refused(
    family: Path, tmp_path: Path, change, message: str, role: str
) -> None:
    strange = shutil.copytree(family / "b", tmp_path / "strange")
    change(strange)
    second, base = (strange, family / "base") if role == "model" else (family / "b", strange)
    with pytest.raises(UserError, match=message):
        merge_models(Merge("ties", (family / "a", second), base=base), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def with_rows(origin: Path, directory: Path, further: int, *, token: bool = False) -> Path:
    """A copy of a model with so many rows more, random ones, or fewer in embedding and head; token: the
    first new one has a token.
    """
    rows = load_file(origin / "model.safetensors")["lm_head.weight"].shape[0]
    generator = torch.Generator().manual_seed(5)

    def longer(_: str, tensor: Tensor) -> Tensor:
        if tensor.shape[0] != rows:
            return tensor
        return torch.cat([tensor, torch.randn(max(further, 0), *tensor.shape[1:], generator=generator)])[
            : rows + further
        ]

    moved(origin, directory, longer)
    edited(directory, "config.json", lambda config: config.update(vocab_size=rows + further))
    if token:

        def add(content: dict) -> None:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            content["added_tokens"].append({"id": rows, "content": "<|more|>", "special": True} | flags)

        edited(directory, "tokenizer.json", add)
    return directory


@pytest.fixture(scope="module")
def full(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family with a token for every row."""
    root = tmp_path_factory.mktemp("full")
    for name in ("base", "a", "b"):
        with_rows(family / name, root / name, -5)
    return root


@pytest.mark.parametrize(
    ("further", "token", "longer_first", "said"),
    [
        (
            1,
            False,
            False,
            r"the 1 extra row lies beyond the \d+ tokens of the tokenizer of {longer}\. No text uses them",
        ),
        (64, False, False, "the 64 extra rows lie beyond the"),
        (
            1,
            True,
            False,
            r"1 of the 1 extra rows of {longer} are for tokens that the other model does not have "
            r"\('<\|more\|>'\)",
        ),
        (64, True, False, r"1 of the 64 extra rows of {longer} are for tokens"),
        (1, True, True, r"1 of the 1 extra rows of {longer} are for tokens"),
    ],
)
def test_other_numbers_of_rows_are_refused_with_what_they_stand_for(
    full: Path, tmp_path: Path, further: int, token: bool, longer_first: bool, said: str
) -> None:
    longer = with_rows(full / "b", tmp_path / "longer", further, token=token)
    models = [longer, full / "a"] if longer_first else [full / "a", longer]
    with pytest.raises(UserError) as refusal:
        merge_models(Merge("linear", tuple(models)), tmp_path / "new" / "out")
    rows = load_file(full / "a" / "model.safetensors")["lm_head.weight"].shape[0]
    counts = (rows + further, rows) if longer_first else (rows, rows + further)
    message = str(refusal.value)
    assert f"{models[0]} and {models[1]} have vocabularies of {counts[0]} and {counts[1]} rows: " in message
    assert re.search(said.format(longer=re.escape(str(longer))), message), message
    assert message.endswith(
        "Set --rows first to merge the rows of the first model: it "
        f"{'keeps them as they are in that model' if longer_first else 'leaves them out'}."
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("longer_first", [False, True])
def test_rows_of_the_first_model_are_merged(
    full: Path, tmp_path: Path, method: str, token: bool, longer_first: bool
) -> None:
    """It is the merge without further rows; further ones of the first model stay as they are in it, those
    of the second are cut.
    """
    longer = with_rows(full / "b", tmp_path / "longer", 3, token=token)
    options = {"base": full / "base"} if "base" in METHODS[method].options else {}
    rows = load_file(full / "a" / "model.safetensors")["lm_head.weight"].shape[0]
    models = (longer, full / "a") if longer_first else (full / "a", longer)
    equal = (full / "b", full / "a") if longer_first else (full / "a", full / "b")
    ours = merged(tmp_path / "out", method, *models, rows="first", **options)
    expected = merged(tmp_path / "plain", method, *equal, **options)
    if longer_first:
        assert read_json(tmp_path / "out/config.json")["vocab_size"] == rows + 3
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert torch.equal(ours[name][rows:], read(longer)[name][rows:]) and len(ours[name]) == rows + 3
            ours[name] = ours[name][:rows]
    assert (
        all(torch.equal(ours[name], expected[name]) for name in expected) and ours.keys() == expected.keys()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == rows + 3 * longer_first
    assert read_json(tmp_path / "out" / RECORD)["rows"] == "first"


def test_rows_of_other_tokens_stay_refused(full: Path, tmp_path: Path) -> None:
    longer = with_rows(full / "b", tmp_path / "longer", 3)
    two_tokens_exchanged(longer)
    with pytest.raises(UserError, match="differ in the tokenizer"):
        merge_models(Merge("linear", (full / "a", longer), rows="first"), tmp_path / "out")
    with pytest.raises(UserError, match=r"--rows is 'base'\. Set it to first, or remove it"):
        merge_models(Merge("linear", (full / "a", longer), rows="base"), tmp_path / "out")


def test_another_class_is_refused_by_its_name(family: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "neox", "gpt_neox")
    with pytest.raises(
        UserError, match=r"at architectures: \['LlamaForCausalLM'\] and \['GPTNeoXForCausalLM'\]"
    ):
        merge_models(Merge("slerp", (family / "a", other)), tmp_path / "out")


def test_what_is_no_merge_of_ours_is_left_alone(family: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists but has no merge\.json"):
        merge_models(Merge("linear", (family / "a", family / "b")), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_mergekit_the_extra_is_named(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-fuse\[merge\]'"):
        merge_models(Merge("linear", (family / "a", family / "b")), tmp_path / "out")


def test_a_model_is_named_with_or_without_its_weight(family: Path, tmp_path: Path) -> None:
    a, b = family / "a", family / "b"
    colon = shutil.copytree(a, tmp_path / "a:7")
    assert read_models([str(a), str(b)]) == ((a, b), None)
    assert read_models([f"{a}:0.25", f"{b}:1e-1"]) == ((a, b), (0.25, 0.1))
    assert read_models([str(colon), str(b)]) == ((colon, b), None)
    with pytest.raises(UserError, match="1 of 2 models have a weight"):
        read_models([f"{a}:1", str(b)])
    with pytest.raises(UserError, match="is not a directory and not a model"):
        read_models([f"{a}:half", str(b)])
