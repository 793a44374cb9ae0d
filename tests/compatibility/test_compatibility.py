"""docs/compatibility.md is what a run finds.

FUSE_WRITE_DOCS=1 pytest -m slow tests/compatibility      # writes it; without the variable the run compares
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import model_families
import pytest
import tokenizer_forms
import transformers
import weight_forms
from chat_families import FAMILIES as TEMPLATES
from chat_families import save_tokenizer
from model_families import answers, captures, cell, is_target, rewards, save_family

from megatron_fuse.chat import load_chat_format
from megatron_fuse.model.config_file import end_token_ids
from megatron_fuse.tokenization import load_tokenizer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
NO_CLASSIFIER = "no: transformers has no classifier of this family"

HEAD = """# What can be read, and how that was found

`FUSE_WRITE_DOCS=1 pytest -m slow tests/compatibility` writes this page: every cell is what small random models, made for the run,
did. `yes` says that the numbers were those of the library named above the table; `no` is the refusal that a user reads.
"""
MODELS = """
## Model families

Against transformers {version}: log-probabilities of a response (captures), greedy answers in a batch with a cache against one
forward pass per token (answers), every bit of the weights after import into Megatron-core and export (target), rewards of
`AutoModelForSequenceClassification` (reward model). A family that cannot answer in process can do so behind a server.
"""
WEIGHTS = """
## Weight files

A small Llama in each form.
"""
TOKENIZERS = """
## Tokenizer files

Ids of a text with digits, accents, runs of white space, emoji and a special string, against the library that owns the form.
`spells` says whether tokens stand for the very bytes of every text; where not, rows that differ are marked, and a share of the
text is learned without a teacher.
"""
CHAT = """
## Chat templates

Whole conversations against `apply_chat_template`; see [chat_templates.md](chat_templates.md). `\\n` is a line break.
"""


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _models(root: Path, ranks: Callable) -> Iterator[tuple[str, ...]]:
    for family in model_families.FAMILIES:
        model = save_family(family, root / family)
        try:
            reward_model = cell(rewards, save_family(family, root / f"{family}-reward", reward=True))
        except ValueError as error:
            assert "AutoModelForSequenceClassification" in str(error)
            reward_model = NO_CLASSIFIER
        target = cell(is_target, model, ranks, root / f"{family}-export")
        yield family, cell(captures, model), cell(answers, model), target, reward_model


def _weights(root: Path, ranks: Callable) -> Iterator[tuple[str, ...]]:
    model, reward_model = (
        save_family("llama", root / "llama"),
        save_family("llama", root / "reward", reward=True),
    )
    for number, form in enumerate(weight_forms.FORMS):
        own = weight_forms.in_form(form, model, root / f"model-{number}")
        # The export is compared with the file that the form was made of.
        target = cell(_target_of(model), own, ranks, root / f"export-{number}")
        reward = cell(rewards, weight_forms.in_form(form, reward_model, root / f"reward-{number}"))
        yield form, cell(captures, own), target, reward


def _target_of(model: Path) -> Callable[[Path, Callable, Path], None]:
    return lambda directory, ranks, output: is_target(directory, ranks, output, original=model)


def _tokenizers(root: Path) -> Iterator[tuple[str, ...]]:
    for number, (name, (make, reference, library)) in enumerate(tokenizer_forms.FORMS.items()):
        path = make(root / str(number))
        read = cell(tokenizer_forms.same_ids, path, reference)
        spelt = ("yes" if tokenizer_forms.spells(path) else "no") if read == "yes" else ""
        yield (
            f"`{name}`" if "." in name and "," not in name and " " not in name else name,
            read,
            library,
            spelt,
        )


def _templates(root: Path) -> Iterator[tuple[str, ...]]:
    def shown(text: str) -> str:
        return "`" + repr(text)[1:-1].replace("|", "\\|") + "`" if text else ""

    for number, name in enumerate(TEMPLATES):
        directory = save_tokenizer(name, root / str(number))
        tokenizer = load_tokenizer(directory)
        chat = load_chat_format(tokenizer, end_ids=end_token_ids(directory))
        ends = [shown(tokenizer.token_text(token) or "") for token in sorted(chat.end_ids)]
        system = "before the first question" if chat.folds_system else "yes"
        yield (
            name,
            shown(tokenizer.token_text(chat.stop_id) or ""),
            " ".join(ends),
            shown(chat.generation),
            shown(chat.opening or chat.separator),
            system,
        )


def _document(root: Path, ranks: Callable) -> str:
    for part in ("models", "weights", "tokenizers", "templates"):
        (root / part).mkdir()
    return "".join(
        (
            HEAD,
            MODELS.format(version=transformers.__version__),
            "\n",
            _table(("family", *model_families.ROLES), _models(root / "models", ranks)),
            WEIGHTS,
            "\n",
            _table(("weights", "source", "target", "reward model"), _weights(root / "weights", ranks)),
            TOKENIZERS,
            "\n",
            _table(("tokenizer", "read", "against", "spells"), _tokenizers(root / "tokenizers")),
            CHAT,
            "\n",
            _table(
                (
                    "template",
                    "stop token",
                    "sampling ends at",
                    "generation begins with",
                    "before a given response",
                    "system",
                ),
                _templates(root / "templates"),
            ),
        )
    )


def _without_version(text: str) -> str:
    return re.sub(r"transformers \d+\.\d+\.\d+", "transformers", text)


@pytest.mark.slow
def test_the_page_is_what_a_run_finds(ranks: Callable, tmp_path: Path) -> None:
    found = _document(tmp_path, ranks)
    if os.environ.get("FUSE_WRITE_DOCS"):
        DOCUMENT.write_text(found, encoding="utf-8")
    assert _without_version(DOCUMENT.read_text(encoding="utf-8")) == _without_version(found)


def test_the_page_has_every_case() -> None:
    """The cheap half: a case that was added without a run has no row."""
    rows = [
        line.split(" | ")[0].strip("| `")
        for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
        if line[:1] == "|"
    ]
    cases = [*model_families.FAMILIES, *weight_forms.FORMS, *tokenizer_forms.FORMS, *TEMPLATES]
    assert [
        row for row in rows if row not in ("family", "weights", "tokenizer", "template") and "---" not in row
    ] == cases


@pytest.mark.parametrize("form", tokenizer_forms.FORMS)
def test_a_tokenizer_is_read_as_its_own_library_reads_it(form: str) -> None:
    make, reference, _ = tokenizer_forms.FORMS[form]
    with TemporaryDirectory() as root:
        found = cell(tokenizer_forms.same_ids, make(Path(root) / "model"), reference)
    assert (found == "yes") == (reference is not None), found
