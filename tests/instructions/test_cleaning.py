"""Laws of data.normalize and data.strip, and of what the command says about what it read and left out."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_lines import logged
from small_models import small_recipe, write_rows
from small_tokenizers import make_tokenizer
from transformers import LlamaConfig

from megatron_fuse.errors import UserError
from megatron_fuse.instructions import (
    INSTRUCTIONS,
    Example,
    left_out,
    load_examples,
    prepare_instructions,
    read_rows,
)
from megatron_fuse.instructions.cleaning import Cleaning, is_in_nfc
from megatron_fuse.recipe import Recipe
from megatron_fuse.stages import Context
from megatron_fuse.tokenization import load_tokenizer

NFD, NFC = "e\u0301te\u0301", "\u00e9t\u00e9"
TEXT = st.text(alphabet="e\u0301\u00e9 \n가각\u1100\u1161a", max_size=12)


@given(
    system=st.none() | TEXT, texts=st.tuples(TEXT, TEXT, TEXT, TEXT), nfc=st.booleans(), strip=st.booleans()
)
def test_each_text_is_cleaned_as_its_role_asks(
    system: str | None, texts: tuple, nfc: bool, strip: bool
) -> None:
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts[:3], strict=True)]
    messages[1]["supervised"] = False
    example = Example("x", system, messages, texts[3], category="c")
    clean = Cleaning(nfc=nfc, strip=strip)(example)
    form = (lambda text: unicodedata.normalize("NFC", text)) if nfc else str
    first, answer, second = (message["content"] for message in clean.messages)
    assert (first, second) == (form(texts[0]), form(texts[2])), "a prompt keeps its white space"
    assert (answer, clean.response) == tuple(form(text.strip() if strip else text) for text in texts[1::2])
    assert clean.system == (None if system is None else form(system))
    assert (clean.id, clean.category, clean.messages[1]["supervised"]) == ("x", "c", False)
    assert Cleaning(nfc=nfc, strip=strip)(clean) == clean
    assert is_in_nfc(clean) or not nfc


# NFC; no normaliser; T5's own, which is NFKC with more
@pytest.mark.parametrize(
    "kind, composes", [("byte_level", True), ("llama_json", False), ("sentencepiece", False)]
)
def test_a_tokenizer_that_composes_is_known(tmp_path: Path, kind: str, composes: bool) -> None:
    tokenizer = load_tokenizer(make_tokenizer(kind, tmp_path / kind))
    assert tokenizer.composes == composes
    assert (tokenizer.encode(NFD) == tokenizer.encode(NFC)) == composes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, kind in {"composing": "byte_level", "plain": "llama_json"}.items():
        make_tokenizer(kind, root / name)
        LlamaConfig(vocab_size=600, architectures=["LlamaForCausalLM"]).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


ROWS = [
    {"instruction": NFD, "output": f" {NFD}\n"},
    {"instruction": "Q", "output": "A\n"},
    {"instruction": NFD, "output": NFC, "id": "given"},
]


def recipe_for(
    models: dict[str, Path], path: Path, rows: list, target: str = "plain", **data: object
) -> Recipe:
    file = write_rows(path / "rows.jsonl", rows)
    recipe = small_recipe(path / "run", file, models[target], {"beta": models["plain"]}, data=data)
    chatml = recipe.target.model_copy(update={"chat_template": "chatml"})
    beta = recipe.sources["beta"].model_copy(update={"chat_template": "chatml"})
    return recipe.model_copy(update={"target": chatml, "sources": {"beta": beta}})


@pytest.mark.parametrize(
    "data, responses",
    [
        ({}, [f" {NFD}\n", "A\n", NFC]),
        ({"normalize": "nfc"}, [f" {NFC}\n", "A\n", NFC]),
        ({"strip": True}, [NFD, "A", NFC]),
        ({"normalize": "nfc", "strip": True}, [NFC, "A", NFC]),
    ],
)
def test_options_clean_the_artifact_and_leave_ids_alone(
    models: dict[str, Path], tmp_path: Path, data: dict, responses: list[str]
) -> None:
    recipe = recipe_for(models, tmp_path, ROWS, **data)
    artifact = prepare_instructions(Context(recipe))
    examples = load_examples(artifact)
    assert [example.response for example in examples] == responses
    assert [example.id for example in examples] == [
        example.id for example in read_rows(recipe.data.path).read()
    ]
    assert artifact.counts["not_in_nfc"] == (data.get("normalize") is None)
    for key, value in {"normalize": "nfc", "strip": True}.items():
        if data.get(key) != value:
            other = recipe.model_copy(update={"data": recipe.data.model_copy(update={key: value})})
            with pytest.raises(UserError, match=rf"made with options\.{key} = "):
                Context(other).open(INSTRUCTIONS)


@pytest.mark.parametrize(
    "target, data, hint",
    [("composing", {}, True), ("composing", {"normalize": "nfc"}, False), ("plain", {}, False)],
)
def test_the_hint_appears_where_a_tokenizer_would_compose(
    models: dict[str, Path], tmp_path: Path, target: str, data: dict, hint: bool
) -> None:
    with logged() as said:
        prepare_instructions(Context(recipe_for(models, tmp_path, ROWS, target, **data)))
    hints = [line for line in said.getvalue().splitlines() if "data.normalize: nfc" in line]
    expected = (
        "warning: 1 of 3 examples have responses that are not in Unicode's form NFC, which target "
        "would read as NFC"
    )
    assert [line.startswith(expected) for line in hints] == [True] * hint


def test_the_table_counts_every_kind_with_its_first_line(models: dict[str, Path], tmp_path: Path) -> None:
    long = {"instruction": "word " * 200, "output": "A"}
    rows = [ROWS[1], {"instruction": "Q"}, long, ROWS[1], {"instruction": "R"}, ROWS[0]]
    artifact = prepare_instructions(Context(recipe_for(models, tmp_path, rows)))
    assert [line.split() for line in left_out(artifact)] == [
        ["left", "out", "rows", "for", "example"],
        ["value", "missing", "2", "line", "2"],
        ["copy", "of", "an", "earlier", "row", "1", "line", "4"],
        ["no", "room", "behind", "the", "prompt", "1", "line", "3"],
    ]
    (dropped,) = (json.loads(line) for line in (artifact.directory / "examples.dropped.jsonl").open())
    assert (dropped["line"], dropped["kind"]) == (3, "no room behind the prompt")
    (tmp_path / "whole").mkdir()
    assert list(left_out(prepare_instructions(Context(recipe_for(models, tmp_path / "whole", ROWS))))) == []


def test_instructions_of_an_older_version_are_refused_by_name(
    models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(models, tmp_path, ROWS)
    artifact = prepare_instructions(Context(recipe))
    for name in ("manifest.json", "plan.json"):
        content = json.loads((artifact.directory / name).read_text())
        del content["options"]["normalize"], content["sha256"]
        (artifact.directory / name).write_text(json.dumps(content))
    for refuse in (lambda context: context.open(INSTRUCTIONS), prepare_instructions):
        with pytest.raises(
            UserError, match=r"was made without options\.normalize, but now it is 'none'\. .*[Rr]emove"
        ):
            refuse(Context(recipe))
