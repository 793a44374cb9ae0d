"""The image and the pinned versions are of what pyproject.toml asks for."""

import os
import re
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def needed(*extras: str) -> set[Requirement]:
    lines = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {Requirement(line) for some in lines for line in some}


def test_the_image_gets_what_the_project_asks_for() -> None:
    """All but torch, which the image brings with the libraries that are built for it."""
    lines = (ROOT / "docker/requirements.txt").read_text().splitlines()
    given = {Requirement(line) for line in lines if not line.startswith("#")}
    assert (
        given == {requirement for requirement in needed() if requirement.name != "torch"} and len(given) > 10
    )


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-py312.txt"])
def test_every_version_is_pinned_once(file: str) -> None:
    """Of what `make test` and `make lint` install, as far as the project names it; each pin is one that
    the project allows.
    """
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines]
    pinned = {canonicalize_name(name): version for name, version in pins}
    assert len(pinned) == len(pins)
    for requirement in needed("dev"):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_transformer_engine_is_of_the_range_that_megatron_core_declares() -> None:
    """Of 0.16; what later ones declare has no bounds."""
    ours = [
        requirement
        for requirement in needed("gpu-cu12", "gpu-cu13")
        if requirement.name == "transformer-engine"
    ]
    theirs = next(
        of for of in map(Requirement, requires("megatron-core") or ()) if of.name == "transformer-engine"
    )
    assert len(ours) == 2 and all(requirement.extras > {"pytorch"} for requirement in ours)
    allowed = {
        version
        for version in ("2.8", "2.9", "2.11.0", "2.12", "3.0")
        if all(requirement.specifier.contains(version) for requirement in ours)
    }
    assert allowed == {"2.9", "2.11.0"} and all(theirs.specifier.contains(version) for version in allowed)


def test_make_keeps_compiled_modules_whatever_the_environment_says() -> None:
    """Without them a process that imports torch and transformers needs twice the time."""
    shown = subprocess.run(
        ["make", "--no-print-directory", "--eval", 'show: ; @echo "[$$PYTHONDONTWRITEBYTECODE]"', "show"],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "[]\n"
