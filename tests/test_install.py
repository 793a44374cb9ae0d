"""What the image installs is what setup.py asks for."""

from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_the_image_gets_what_setup_asks_for() -> None:
    """All but torch, which the image brings with the libraries that are built for it."""
    lines = (ROOT / "docker/requirements.txt").read_text().splitlines()
    given = {Requirement(line) for line in lines if not line.startswith("#")}
    needed = {Requirement(line) for line in requires("megatron-fuse") or () if "extra ==" not in line}
    assert given == {requirement for requirement in needed if requirement.name != "torch"} and len(given) > 10


def test_transformer_engine_is_of_the_range_that_megatron_core_declares() -> None:
    """Of 0.16; what later ones declare has no bounds."""
    ours, theirs = (of_transformer_engine(package) for package in ("megatron-fuse", "megatron-core"))
    assert len(ours) == 2 and all(requirement.extras > {"pytorch"} for requirement in ours)
    allowed = {
        version
        for version in ("2.8", "2.9", "2.11.0", "2.12", "3.0")
        if all(requirement.specifier.contains(version) for requirement in ours)
    }
    assert allowed == {"2.9", "2.11.0"} and all(theirs[0].specifier.contains(version) for version in allowed)


def of_transformer_engine(package: str) -> list[Requirement]:
    found = map(Requirement, requires(package) or ())
    return [requirement for requirement in found if requirement.name == "transformer-engine"]
