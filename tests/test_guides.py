"""The guides name files, functions, pages and terms that exist."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [
    "README.md",
    "CONTRIBUTING.md",
    "AGENTS.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/README.md",
    "docs/glossary.md",
]
GLOSSARY = ROOT / "docs" / "glossary.md"


def guide(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def defined(path: Path) -> Iterator[str]:
    """Names that a module defines; those of a class's functions with the class in front."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)
            )
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def places() -> list[tuple[str, str]]:
    """(file, name) of every `file.py:name` in the guides."""
    return sorted({place for name in GUIDES for place in re.findall(r"`([\w/]+\.py):([\w.]+)`", guide(name))})


def test_the_index_has_the_questions_that_everyone_asks() -> None:
    questions = "\n".join(re.findall(r"^\| (.+\?) \|", guide("docs/README.md"), re.M))
    for words in (
        "captured",
        "projected",
        "winner chosen",
        "phases become weights",
        "loss computed",
        "arithmetic",
    ):
        assert words in questions


@pytest.mark.parametrize(("file", "name"), places())
def test_every_function_of_the_index_exists(file: str, name: str) -> None:
    assert name in set(defined(ROOT / file))


@pytest.mark.parametrize("name", GUIDES)
def test_every_file_that_a_guide_names_exists(name: str) -> None:
    """Paths in code type from the root, X and NAME standing for any; links from the guide's own directory."""
    tops = "|".join(
        entry.name for entry in ROOT.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    paths = re.findall(rf"`((?:{tops})/[\w./*-]*)", guide(name))
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", guide(name))
    patterns = {path: re.sub(r"\b(X|NAME)\b", "*", path.rstrip("/")) for path in paths}
    missing = [path for path, pattern in patterns.items() if not any(ROOT.glob(pattern))]
    missing += [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w.]+\.md)\)", guide("docs/README.md")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def terms() -> list[str]:
    return re.findall(r"^- \*\*(.+?)\*\*: \S", GLOSSARY.read_text(encoding="utf-8"), re.M)


def test_the_glossary_is_sorted_and_has_each_term_once() -> None:
    folded = [term.casefold() for term in terms()]
    assert len(folded) > 50 and folded == sorted(set(folded))
    assert len(folded) == len(re.findall(r"^- ", GLOSSARY.read_text(encoding="utf-8"), re.M))


def plain(text: str) -> str:
    return re.sub(r"[\s_-]+", " ", text.casefold())


@pytest.fixture(scope="module")
def used() -> str:
    """All code and documents but the guides themselves."""
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "kernels").rglob("*.py")]
    paths += (ROOT / "megatron_fuse").rglob("*.py")
    own = {GLOSSARY, ROOT / "docs" / "README.md"}
    return plain("\n".join(path.read_text(encoding="utf-8") for path in paths if path not in own))


@pytest.mark.parametrize("term", terms())
def test_every_term_of_the_glossary_is_in_use(term: str, used: str) -> None:
    assert re.search(rf"\b{re.escape(plain(term))}s?\b", used)


def test_every_guide_has_the_version_that_is_installed() -> None:
    version = tomllib.loads(guide("pyproject.toml"))["project"]["version"]
    assert re.findall(r"^## ([\d.]+) - ", guide("CHANGELOG.md"), re.M)[0] == version
    citation = yaml.safe_load(guide("CITATION.cff"))
    assert (citation["title"], citation["version"], citation["license"]) == (
        "Megatron-Fuse",
        version,
        "Apache-2.0",
    )
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
