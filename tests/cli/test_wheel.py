"""The wheel: what it holds, and that it works outside the repository."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from small_models import save_model, write_rows

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"megatron_fuse": ROOT / "megatron_fuse", "fuse_kernels": ROOT / "kernels/fuse_kernels"}


def python(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=True, cwd=cwd
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, as the build leaves files beside what it builds."""
    root = tmp_path_factory.mktemp("wheel")
    for folder in ("megatron_fuse", "kernels", "tests", "tools"):
        shutil.copytree(ROOT / folder, root / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "copy" / name)
    python("build", "--wheel", "--no-isolation", "--outdir", root, root / "copy", cwd=root)
    (path,) = root.glob("*.whl")
    return path


def test_it_holds_both_packages_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    wanted = {
        str(package / path.relative_to(folder))
        for package, folder in ((Path(name), folder) for name, folder in SOURCES.items())
        for path in folder.rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert names - about == wanted and "megatron_fuse/evaluation/tasks/mmlu_local.yaml" in wanted
    assert {Path(name).name for name in about} >= {"METADATA", "LICENSE", "entry_points.txt"}


class Installed:
    """The wheel in an environment of its own, which finds other packages in the one of the tests."""

    def __init__(self, directory: Path, wheel: Path) -> None:
        self.bin = directory / "environment/bin"
        venv.create(directory / "environment", with_pip=False, symlinks=True)
        # Before other packages are found: pip could otherwise find the project itself among them.
        python(
            "pip", "--python", self.bin / "python", "install", "--no-deps", "--no-index", wheel, cwd=directory
        )
        (self.packages,) = directory.glob("environment/lib/python*/site-packages")
        others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.packages / "others.pth").write_text("\n".join(others) + "\n")
        self.cwd = directory
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        self.environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(self, program: str, *words: object) -> str:
        done = subprocess.run(
            [self.bin / program, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.cwd,
            env=self.environment,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_its_command_runs_outside_the_repository(installed: Installed) -> None:
    found = installed.run(
        "python",
        "-c",
        "import megatron_fuse, fuse_kernels; print(megatron_fuse.__file__, fuse_kernels.__file__)",
    )
    assert [Path(path).parents[1] for path in found.split()] == [installed.packages] * 2
    assert "\n    capture " in installed.run("megatron-fuse", "--help")
    assert "--capture-top-k" in installed.run("python", "-m", "megatron_fuse.cli", "capture", "--help")
    printed = installed.run(
        "megatron-fuse", "run", "--recipe", ROOT / "examples/profuser_7b.yaml", "--print-recipe"
    )
    assert yaml.safe_load(printed)["schedule"]["preset"] == "profuser"


@pytest.mark.slow
def test_it_runs_a_recipe_from_instructions_to_the_exported_model(installed: Installed) -> None:
    """Over two processes, so that torchrun starts the modules; with paths relative to the directory that
    it runs in.
    """
    for seed, (name, family) in enumerate({"alpha": "llama", "beta": "gpt_neox"}.items()):
        save_model(installed.cwd / name, family, seed=seed)
    save_model(installed.cwd / "reward", "llama", seed=2, reward=True)
    rows = [{"instruction": f"Add {i} and 1.", "output": f"That is {i + 1}."} for i in range(16)]
    write_rows(installed.cwd / "data.jsonl", rows)
    recipe = {
        "workdir": "work",
        "target": {"model": "alpha"},
        "sources": {name: {"model": name, "dtype": "fp32"} for name in ("alpha", "beta")},
        "reward_models": {"reward": {"model": "reward", "dtype": "fp32"}},
        "data": {"path": "data.jsonl", "validation_samples": 4, "shard_size": 8},
        "responses": {"max_new_tokens": 4},
        "schedule": {"preset": "profuser"},
        "training": {"seq_length": 120, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
        "export": {"dtype": "fp32"},
    }
    (installed.cwd / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    printed = installed.run("megatron-fuse", "run", "--recipe", "recipe.yaml", "--nproc-per-node", "2")
    assert "$ torchrun --nproc-per-node 2 -m megatron_fuse.cli capture --recipe work/recipe.yaml" in printed
    assert "$ torchrun --nproc-per-node 2 -m megatron_fuse.pretrain --recipe work/recipe.yaml" in printed
    assert (installed.cwd / "work/export/model.safetensors").exists()
    fusion = next((installed.cwd / "work/fusion").glob("exact-*"))
    assert "all is well" in installed.run("megatron-fuse", "inspect", fusion, "--verify")
