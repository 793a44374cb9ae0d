"""What transformers keeps beside a tokenizer file: tokenizer_config.json, added_tokens.json, chat_template.jinja."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fuse.errors import UserError


@dataclass(frozen=True)
class Settings:
    """All empty where nothing lies beside the file.

    added: text -> id of every token that is named there, the vocabulary's own among them; special: the ids of those that
    are marked special.
    """

    config: dict[str, Any]
    added: dict[str, int]
    special: frozenset[int]
    chat_template: str | None

    def named_token(self, kind: str, tokens: dict[str, int], default: int | None) -> int | None:
        """The id of `bos_token`, `eos_token` or `pad_token` (kind: bos, eos, pad) if it is named and known, else default."""
        entry = self.config.get(f"{kind}_token")  # its text, or an AddedToken
        text = entry.get("content") if isinstance(entry, dict) else entry
        return tokens.get(text, default)


def read_settings(directory: Path) -> Settings:
    """Raises UserError for files that do not hold what transformers writes."""
    config = _read_json(directory / "tokenizer_config.json")
    added = dict(_read_json(directory / "added_tokens.json"))
    special: set[int] = set()
    try:
        for token, entry in config.get("added_tokens_decoder", {}).items():
            added[entry["content"]] = int(token)
            if entry.get("special"):
                special.add(int(token))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory / 'tokenizer_config.json'}: added_tokens_decoder does not map ids to "
            f'{{"content": text, "special": true or false}} ({error!r}): save the tokenizer with transformers again'
        ) from error
    template_file = directory / "chat_template.jinja"
    template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return Settings(config, added, frozenset(special), template)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {str(content)[:40]!r}")
    return content
