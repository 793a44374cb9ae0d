"""Checks by a server's own list whether it has a model.

This is necessary because some servers accept any name, and answer with the model that they have.
"""

import difflib
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_fuse.sources.completions import is_name_of, read_object
from megatron_fuse.sources.request_kind import Malformed

_SHOWN = 8


def listed_models(content: bytes) -> list[str]:
    """The names in a response of /v1/models, with llama.cpp's aliases; empty if it is not such a list."""
    names: list[str] = []
    try:
        for model in read_object(content)["data"]:
            names += [name for name in (model["id"], *(model.get("aliases") or [])) if isinstance(name, str)]
    except (Malformed, KeyError, TypeError, AttributeError):
        return []
    return names


def unlisted(asked: Sequence[str], listed: Sequence[str]) -> str | None:
    """What is wrong with the names of a requested model.

    None if one of them is listed, or if the list is empty.

    A proxy's list may have patterns (`openai/*`). A server may serve a path that it does not list:
    `transformers serve` lists only the models of its cache.
    """
    if not listed or any(is_name_of(name, one) or fnmatchcase(one, name) for name in listed for one in asked):
        return None
    # For a name that is too long for the file system, os.path.exists is false, but Path.exists raises.
    if any(Path(one).is_absolute() or ("/" in one and os.path.exists(one)) for one in asked):
        return None
    lower = {name.casefold(): name for name in listed}
    close = [lower[name] for name in difflib.get_close_matches(asked[0].casefold(), lower, n=3, cutoff=0.5)]
    names = [*close, *(name for name in listed if name not in close)]
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"has no model {asked[0]!r}; it lists {', '.join(names[:_SHOWN])}{more}"
