"""The settings files of transformers beside a tokenizer's own file, as typed models.

A file of another form is refused here, with an error that names file and key.

tokenizer_config.json     TokenizerConfig
special_tokens_map.json   names of special tokens -> their texts
added_tokens.json         texts of tokens -> ids
tokenizer.json            TokenizerFile: the parts that are read before the library checks them
config.json               ModelKind, for the class of the tokenizer
chat_template.jinja       text
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, ValidationError
from pydantic_core import from_json

from megatron_fuse.errors import UserError
from megatron_fuse.storage.records import first_problem, parse_record, quoted
from megatron_fuse.storage.strict_json import read_object, read_small_file

Model = TypeVar("Model", bound=BaseModel)

MOST_IDS = 1 << 22  # the largest published vocabularies have 262,144; every id takes memory, used or not
_MOST_BYTES = 512 << 20
_FIX = "Save the tokenizer with transformers again, or fetch it again."


def _is_id(text: str) -> str:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < MOST_IDS):
        raise ValueError(f"must be an id below {MOST_IDS}")
    return text


TokenId = Annotated[int, Field(ge=0, lt=MOST_IDS)]
IdText = Annotated[str, AfterValidator(_is_id)]


class _Strict(BaseModel):
    """Values are not converted to another type. Unknown keys are allowed."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class AddedToken(_Strict):
    content: str
    special: bool = False
    normalized: bool | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


TokenText = str | AddedToken | None


class NamedTemplate(_Strict):
    name: str
    template: str


class TokenizerConfig(_Strict):
    bos_token: TokenText = None
    eos_token: TokenText = None
    pad_token: TokenText = None
    unk_token: TokenText = None
    cls_token: TokenText = None
    sep_token: TokenText = None
    mask_token: TokenText = None
    additional_special_tokens: list[TokenText] | None = None
    extra_special_tokens: list[TokenText] | dict[str, TokenText] | None = None
    added_tokens_decoder: dict[IdText, AddedToken] = {}
    chat_template: str | dict[str, str] | list[NamedTemplate] | None = None
    tokenizer_class: str | None = None
    auto_map: dict[str, Any] | list[str | None] | None = None
    model_max_length: float | int | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    legacy: bool | None = None


class SpecialTokens(RootModel[dict[str, TokenText | list[TokenText] | dict[str, TokenText]]]):
    model_config = ConfigDict(strict=True)


class AddedTokens(RootModel[dict[str, TokenId]]):
    model_config = ConfigDict(strict=True)


class ModelKind(_Strict):
    model_type: str | None = None
    tokenizer_class: str | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None


def _known_ids(vocabulary: Any) -> Any:
    """Checks the ids, before the library makes a table of all of them.

    A vocabulary that is a list needs no check: its ids are the places.
    """
    if isinstance(vocabulary, dict):
        for token in vocabulary.values():
            if type(token) is not int or not 0 <= token < MOST_IDS:
                raise ValueError(
                    f"every id must be a whole number below {MOST_IDS}, but one is {str(token)[:20]}"
                )
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError("two tokens have the same id")
    return vocabulary


class AddedEntry(AddedToken):
    id: TokenId


class Vocabulary(BaseModel):
    vocab: Annotated[Any, AfterValidator(_known_ids)] = None


class TokenizerFile(BaseModel):
    """The parts that are checked here. For errors in the rest, the library names line and column."""

    model_config = ConfigDict(strict=True)

    added_tokens: list[AddedEntry] = []
    model: Vocabulary


@dataclass(frozen=True)
class Strips:
    """The added tokens that remove the white space on their left (`lstrip`) or right (`rstrip`)."""

    left: frozenset[str]
    right: frozenset[str]

    def parts(self) -> list[str]:
        """Parts of a hash. There are none if no token removes white space."""
        return [json.dumps([sorted(self.left), sorted(self.right)])] if self.left or self.right else []

    def applied(self, parts: list[str]) -> list[str]:
        """The parts of a text, split at its added tokens, without the white space that the tokens remove."""
        parts = list(parts)
        for index, part in enumerate(parts):
            if part in self.left and index > 0:
                parts[index - 1] = parts[index - 1].rstrip()
            if part in self.right and index + 1 < len(parts):
                parts[index + 1] = parts[index + 1].lstrip()
        return parts


@dataclass(frozen=True)
class Settings:
    """The settings beside a tokenizer's file. All are empty if there are no such files.

    added: text -> id of every token that the settings name; tokens of the vocabulary may be among them.
    special: the ids of those that are marked special.
    """

    file: Path
    config: TokenizerConfig
    added: dict[str, int]
    special: frozenset[int]
    strips: Strips
    chat_template: str | None

    def named_token(self, kind: str, tokens: dict[str, int], default: int | None) -> int | None:
        """The id of `bos_token`, `eos_token` or `pad_token` (kind: bos, eos, pad) if it is named, else
        default.

        Raises UserError if BOS or EOS is not a token of this tokenizer: the model would not know it.
        """
        text = text_of(getattr(self.config, f"{kind}_token"))
        if text and text not in tokens and kind != "pad":
            raise UserError(
                f"{self.file}: {kind}_token is {quoted(text)}, which is not a token of this tokenizer. {_FIX}"
            )
        return tokens.get(text, default) if text is not None else default


def text_of(token: TokenText) -> str | None:
    return token.content if isinstance(token, AddedToken) else token


def read_settings(directory: Path) -> Settings:
    """Reads the settings of a directory. Raises UserError, with file and key, if a file has another form."""
    file = directory / "tokenizer_config.json"
    config = _read(file, TokenizerConfig)
    added = dict(_read(directory / "added_tokens.json", AddedTokens).root)
    _read(directory / "special_tokens_map.json", SpecialTokens)
    added |= {entry.content: int(token) for token, entry in config.added_tokens_decoder.items()}
    special = frozenset(int(token) for token, entry in config.added_tokens_decoder.items() if entry.special)
    entries = config.added_tokens_decoder.values()
    strips = Strips(
        frozenset(entry.content for entry in entries if entry.lstrip),
        frozenset(entry.content for entry in entries if entry.rstrip),
    )
    template: Any = config.chat_template
    template_file = directory / "chat_template.jinja"
    if template_file.exists() or template_file.is_symlink():
        template = read_text(template_file)
    elif isinstance(template, list):  # several templates with names
        template = next((entry.template for entry in template if entry.name == "default"), None)
    elif isinstance(template, dict):
        template = template.get("default")
    return Settings(file, config, added, special, strips, template)


def read_text(path: Path, where: str = "") -> str:
    """The text of a template's file. where: the recipe's key that names the file, for errors."""
    data = read_small_file(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        place = f"{where}: {path}" if where else str(path)
        raise UserError(f"{place}: line {line} is not UTF-8 text: {error.reason}") from error


def check_tokenizer_files(directory: Path) -> dict[str, Any] | None:
    """Checks a tokenizer's files before transformers reads them.

    Returns the content of tokenizer.json, None if there is no such file.

    Raises UserError, with file and key. For such files transformers would raise an error without file and
    key, or use up all memory.
    """
    read_settings(directory)
    _read(directory / "config.json", ModelKind)
    path = directory / "tokenizer.json"
    return _read_tokenizer_file(path) if path.exists() or path.is_symlink() else None


def _read_tokenizer_file(path: Path) -> dict[str, Any]:
    data = read_small_file(path, _MOST_BYTES)
    try:
        content = from_json(data, cache_strings="none")  # few strings occur twice, so a cache does not help
        TokenizerFile.model_validate(content)
    except ValueError:
        try:
            TokenizerFile.model_validate_json(data)  # its messages speak of JSON, not of Python objects
        except ValidationError as error:
            raise UserError(f"{path}: {first_problem(error)}. {_FIX}") from error
        raise
    return content


def _read(path: Path, model: type[Model]) -> Model:
    """The file's content; the model's default if there is no file."""
    there = path.exists() or path.is_symlink()
    return parse_record(read_object(path) if there else {}, model, str(path), _FIX)
