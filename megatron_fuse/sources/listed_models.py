"""Whether a server has the model that it is to be asked for, by its own list: some answer under any name, with the model they have."""

import difflib
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_fuse.sources.completions import Malformed, is_name_of, read_object

_SHOWN = 8


def listed_models(content: bytes) -> list[str]:
    """Names of a response from /v1/models, aliases included, as llama.cpp has them; empty where it is no such list."""
    names: list[str] = []
    try:
        for model in read_object(content)["data"]:
            names += [name for name in (model["id"], *(model.get("aliases") or [])) if isinstance(name, str)]
    except (Malformed, KeyError, TypeError, AttributeError):
        return []
    return names


def unlisted(asked: Sequence[str], listed: Sequence[str]) -> str | None:
    """What is wrong with the names by which a model is asked for: None where one of them is listed, or the list says nothing.

    A proxy's list may have patterns (`openai/*`). A path may be served without being listed: `transformers serve` lists the models
    of its cache.
    """
    if not listed or any(is_name_of(name, one) or fnmatchcase(one, name) for name in listed for one in asked):
        return None
    # os.path.exists is false for a name that is longer than the file system allows, where Path.exists raises.
    if any(Path(one).is_absolute() or ("/" in one and os.path.exists(one)) for one in asked):
        return None
    lower = {name.casefold(): name for name in listed}
    close = [lower[name] for name in difflib.get_close_matches(asked[0].casefold(), lower, n=3, cutoff=0.5)]
    names = [*close, *(name for name in listed if name not in close)]
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"has no model {asked[0]!r}; it lists {', '.join(names[:_SHOWN])}{more}"
