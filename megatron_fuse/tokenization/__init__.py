"""Tokenizers of every family behind one interface: `load_tokenizer(path) -> Tokenizer`."""

import re
import shlex
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.tokenization.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]

EXPECTED = (
    "a directory with tokenizer.json, with tokenizer.model (SentencePiece, or Llama-3's tiktoken ranks), "
    "with T5's spiece.model, with vocab.json and merges.txt, or with one *.tiktoken rank file; or such a "
    ".model or .tiktoken file itself"
)


def load_tokenizer(
    path: str | Path, *, trust_remote_code: bool = False, allowed_by: str | None = None
) -> Tokenizer:
    """Reads a tokenizer from local files.

    trust_remote_code: whether a tokenizer class that comes with the model may run. allowed_by: the option
    that allows it, for the error.
    Raises UserError if there is no tokenizer; it names the files that are expected.
    """
    path = Path(path)
    # Each library is imported only if it is needed: the import of transformers alone takes a second.
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _hugging_face(path, trust_remote_code, allowed_by)
        for name in ("tokenizer.model", "spiece.model"):
            if (path / name).is_file():
                return _model_file(path / name)
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _hugging_face(path, trust_remote_code, allowed_by)
        ranks = sorted(path.glob("*.tiktoken"))
        if len(ranks) == 1:
            return _tiktoken(ranks[0])
        _refuse_own_forms(path)
        listing = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
        raise UserError(f"{path}: no tokenizer found, only {listing}. Name {EXPECTED}.")
    if not path.exists():
        raise UserError(f"{path} does not exist. Name {EXPECTED}.")
    if path.suffix == ".tiktoken":
        return _tiktoken(path)
    if path.suffix == ".model":
        return _model_file(path)
    if path.name == "tokenizer.json":
        return _hugging_face(path.parent, trust_remote_code, allowed_by)
    raise UserError(f"{path}: not a tokenizer file. Name {EXPECTED}.")


# Vocabularies of Mistral and of some models that come with code of their own. Per file name: what comes
# before the command that converts it, the program with which transformers makes a tokenizer.json of it
# (sys.argv[1] is the directory), and what comes after the command.
_CONVERSIONS = {
    "tekken.json": (
        "pip install mistral-common && ",
        "import sys; from transformers.integrations.mistral import convert_tekken_tokenizer as convert; "
        'convert(sys.argv[1] + "/tekken.json").save_pretrained(sys.argv[1])',
        "",
    ),
    "tiktoken.model": (
        "",
        "import sys; from transformers import AutoTokenizer as A; from transformers.convert_slow_tokenizer "
        "import TikTokenConverter as C; "
        'd = sys.argv[1]; t = A.from_pretrained(d); C(d + "/tiktoken.model", t.pat_str, '
        'extra_special_tokens=t.special_tokens).converted().save(d + "/tokenizer.json")',
        " (transformers asks whether to run the Python code in the directory)",
    ),
}


def _refuse_own_forms(directory: Path) -> None:
    """Raises UserError for a vocabulary whose file has no splitting rule.

    The error gives the command to convert it.
    """
    for name, (before, program, after) in _CONVERSIONS.items():
        if (directory / name).is_file():
            command = f"{before}{shlex.join(['python', '-c', program, str(directory)])}{after}"
            raise UserError(f"{directory}: {name} must be converted to tokenizer.json once. Run {command}")


def _hugging_face(directory: Path, trust_remote_code: bool, allowed_by: str | None) -> Tokenizer:
    from megatron_fuse.tokenization.hugging_face import load_hugging_face

    return load_hugging_face(directory, trust_remote_code, allowed_by)


def _model_file(path: Path) -> Tokenizer:
    """SentencePiece and Llama-3 both name their files tokenizer.model.

    Only tiktoken ranks have such a first line.
    """
    with path.open("rb") as file:
        ranks = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(4096))
    return _tiktoken(path) if ranks else _sentence_piece(path)


def _sentence_piece(path: Path) -> Tokenizer:
    from megatron_fuse.tokenization.sentence_piece import load_sentence_piece

    return load_sentence_piece(path)


def _tiktoken(path: Path) -> Tokenizer:
    from megatron_fuse.tokenization.tiktoken_ranks import load_tiktoken

    return load_tiktoken(path)
