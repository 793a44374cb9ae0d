"""Files of data: instructions in their forms and containers."""

import json
from pathlib import Path
from typing import Any

from campaign import FuzzTarget

from megatron_fuse.instructions.examples import read_rows

_TEXTS = ["Sure: 12 + 30 = 42.", "日本 and été are words. 🙂", "Yes.", " begins and ends with a space "]
_FORMS: dict[str, Any] = {
    "alpaca": lambda n, text: {"instruction": f"Question {n}?", "input": "", "output": text, "system": "Be brief."},
    "sharegpt": lambda n, text: {
        "conversations": [{"from": "human", "value": f"Q {n}"}, {"from": "gpt", "value": text}]
    },
    "messages": lambda n, text: {
        "messages": [{"role": "user", "content": f"Q {n}"}, {"role": "assistant", "content": text}]
    },
    "orca": lambda n, text: {"system_prompt": "", "question": f"Question {n}?", "response": text},
}


def _rows(form: str) -> list[dict[str, Any]]:
    return [{"id": f"e{n}", "category": "colour", **_FORMS[form](n, _TEXTS[n % len(_TEXTS)])} for n in range(8)]


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _instructions(form: str) -> FuzzTarget:
    return FuzzTarget(
        name=f"instructions-{form}",
        make_seeds=lambda directory: _write_jsonl(directory / "data.jsonl", _rows(form)),
        run=lambda directory: list(read_rows(directory / "data.jsonl").read()),
        names=("data.path",),
    )


TARGETS = [_instructions(form) for form in _FORMS]
