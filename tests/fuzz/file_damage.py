"""Damage to files as users and disks make it: seeded changes of bytes, of values in JSON, JSONL and YAML, and
of whole files.

`mutate(path, random)` changes one file in place and says what it did. The same seed makes the same change.
"""

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml


@dataclass(frozen=True)
class Mutation:
    """What was done to a file.

    keys: the keys on the way to a changed value, so that a message can be asked to name one of them. line: of
    a changed row, from 1.
    """

    file: str
    what: str
    keys: tuple[str, ...] = ()
    line: int | None = None


# --- bytes


def _flip_bits(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64)) if changed else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _remove_part(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + data[start + random.choice((1, 1, 7, 100, 4096)) :]


def _repeat_part(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    end = start + random.choice((1, 8, 100, 4096))
    return data[:end] + data[start:end] * random.choice((1, 1, 3)) + data[end:]


_PIECES = (
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff\xfe",
    b"\xc3",
    b"\xed\xa0\x80",
    b'"',
    b"{",
    b"]",
    b",",
    b"\x1b[2J",
    b"9" * 5000,
    b"nan",
)


def _insert(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data) + 1)
    return data[:place] + random.choice(_PIECES) + data[place:]


def _overwrite(data: bytes, random: Random) -> bytes:
    start, length = random.randrange(len(data) + 1), random.choice((1, 4, 64, 1024))
    length = min(length, len(data) - start)
    return (
        data[:start]
        + random.choice((bytes(length), b"\xff" * length, random.randbytes(length)))
        + data[start + length :]
    )


_BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _flip_bits,
    _flip_bits,
    _cut,
    _remove_part,
    _repeat_part,
    _insert,
    _overwrite,
)


def mutate_bytes(path: Path, random: Random) -> Mutation:
    change = random.choice(_BYTES)
    _replace(path, change(path.read_bytes(), random))
    return Mutation(path.name, f"bytes: {change.__name__.strip('_')}")


# --- whole files


def _delete(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    _replace(path, b"")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _symlink_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _dangling_symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("there-is-no-such-file")


def _unreadable(path: Path) -> None:
    path.chmod(0)


_FILES: tuple[Callable[[Path], None], ...] = (_delete, _empty, _directory, _symlink_loop, _dangling_symlink)


def mutate_file(path: Path, random: Random) -> Mutation:
    # Root may read everything.
    change = random.choice(_FILES if os.geteuid() == 0 else (*_FILES, _unreadable))
    change(path)
    return Mutation(path.name, f"file: {change.__name__.strip('_')}")


# --- values of JSON and YAML


@dataclass(frozen=True)
class Raw:
    """Text of JSON or YAML that no value of Python is written as."""

    text: str


_DEEP = 100_000
_NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 255, 256, 2**31, -(2**31), 2**63, -(2**63) - 1, 2**64),
    *(0.5, 1.5, 1.0, -0.0, 1e-320, 1e308, -1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *(Raw("1e999"), Raw("9" * 400), Raw("9" * 5000)),
)
_TEXTS: tuple[Any, ...] = (
    *(
        "",
        " ",
        "x",
        "5",
        "-1.5",
        "true",
        "null",
        "nan",
        "é",
        "\ud800",
        "a\0b",
        "\x1b[2J\x07",
        "a\u2028b",
        "../..",
        "/",
        "~nouser/x",
    ),
    *("x" * 5000, "{{ 1 / 0 }}"),
)
_OTHERS: tuple[Any, ...] = (
    *(
        None,
        None,
        True,
        False,
        [],
        {},
        [None],
        [[1], 5],
        {"a": 1},
        {"": None},
        [{}],
        ["x"],
        [1, "x"],
        [1.5, None],
    ),
    Raw("[" * _DEEP + "]" * _DEEP),
    Raw('{"a":' * _DEEP + "1" + "}" * _DEEP),
)
_YAML_TEXTS = (
    *(
        "2024-02-30",
        "!!int abc",
        "!!bool a",
        "!!timestamp a",
        "!!float x",
        "!!binary 1",
        "&a [*a]",
        "&a {b: *a}",
        "0777",
        "1:30",
    ),
    *(
        "~",
        ".nan",
        ".inf",
        "-.inf",
        "1e3",
        "yes",
        "off",
        "*unknown",
        "!!python/object:os.system x",
        "<<",
        "? x",
        "2024-01-01",
        "=",
        "[1, 2",
    ),
    "[&a [x,x], &b [*a,*a], &c [*b,*b], &d [*c,*c], &e [*d,*d], &f [*e,*e], &g [*f,*f], &h [*g,*g], "
    "[*h,*h,*h,*h]]",
)


def _other_value(value: Any, random: Random) -> Any:
    """Something else in a value's place: often near to it, often of another type."""
    near: list[Any] = []
    if isinstance(value, bool):
        near = [not value, int(value), str(value).lower()]
    elif isinstance(value, int | float):
        near = [-value, value + 1, str(value), bool(value), float(value), value * 1000, value + 0.5, [value]]
    elif isinstance(value, str):
        near = [
            value + "\ud800",
            value + "\0",
            value[: len(value) // 2],
            value * 2,
            [value],
            {"x": value},
            value + "\x1b[31m",
            value.upper(),
        ]
    elif isinstance(value, list):
        near = [
            value[1:],
            value[::-1],
            [*value, None],
            [*value, *value[:1]],
            [value],
            dict(enumerate(map(str, value[:3]))),
            value[:1] * 1000,
            value[:1],
        ]
    elif isinstance(value, dict):
        near = [list(value), list(value.items()), [value], {**value, "": value}]
    return random.choice(random.choice((near or _OTHERS, _NUMBERS, _TEXTS, _OTHERS)))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within a value, itself included; of long lists the first ones and the last."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*path, key))
    elif isinstance(value, list):
        for index in dict.fromkeys((0, 1, 2, len(value) - 1)):
            if 0 <= index < len(value):
                yield from _places(value[index], (*path, index))


@dataclass(frozen=True)
class _Changed:
    value: Any
    what: str
    keys: tuple[str, ...]


def change_value(value: Any, random: Random) -> _Changed:
    """One value within a JSON value replaced, removed, renamed, given twice or added to."""
    places = list(_places(value))
    # Half of the draws among the upper places: a list of numbers has so many more.
    short = [place for place in places if len(place) <= 2]
    *way, last = random.choice(random.choice((places, short))) or (None,)
    if last is None:
        other = _other_value(value, random)
        return _Changed(other, f"the whole -> {_shown(other)}", ())
    root = copy.deepcopy(value)
    parent = root
    for step in way:
        parent = parent[step]
    keys = tuple(str(step) for step in (*way, last) if isinstance(step, str))
    place = ".".join(map(str, (*way, last)))
    how = random.randrange(10)
    if how == 0:
        del parent[last]
        return _Changed(root, f"{place} removed", keys)
    if how == 1 and isinstance(parent, dict):
        parent[f"{last}x"] = parent.pop(last)
        return _Changed(root, f"{place} renamed", keys)
    if how == 2 and isinstance(parent, dict):
        other = _other_value(parent[last], random)
        parent[_Twice(str(last))] = other
        return _Changed(root, f"{place} given again as {_shown(other)}", keys)
    if how == 3 and isinstance(parent, dict):
        other = _other_value(parent[last], random)
        parent["added"] = other
        return _Changed(
            root, f"{'.'.join(map(str, [*way, 'added']))} = {_shown(other)}", (*keys[:-1], "added")
        )
    other = _other_value(parent[last], random)
    parent[last] = other
    return _Changed(root, f"{place} -> {_shown(other)}", keys)


class _Twice(str):
    """A key that is equal to none, so that a mapping can hold it twice."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def json_text(value: Any, **options: Any) -> str:
    """JSON with raw parts; half characters are escaped."""
    raws: list[str] = []

    def without(inner: Any) -> Any:
        if isinstance(inner, Raw):
            raws.append(inner.text)
            return f"@@raw{len(raws) - 1}@@"
        if isinstance(inner, dict):
            return {key: without(item) for key, item in inner.items()}
        return [without(item) for item in inner] if isinstance(inner, list) else inner

    text = json.dumps(without(value), **options)
    for index, raw in enumerate(raws):
        text = text.replace(f'"@@raw{index}@@"', raw)
    return text


def mutate_json(path: Path, random: Random) -> Mutation:
    changed = change_value(json.loads(path.read_bytes()), random)
    _replace(path, json_text(changed.value).encode())
    return Mutation(path.name, changed.what, changed.keys)


def mutate_jsonl(path: Path, random: Random) -> Mutation:
    lines = path.read_bytes().splitlines()
    line = random.randrange(len(lines))
    how = random.randrange(20)
    if how < 2:  # other rows: one twice, one gone
        lines[line : line + 1] = [lines[line]] * 2 if how else []
        what, keys = f"line {line + 1} {'twice' if how else 'gone'}", ()
    else:
        changed = change_value(json.loads(lines[line]), random)
        lines[line] = json_text(changed.value).encode()
        what, keys = f"line {line + 1}: {changed.what}", changed.keys
    _replace(path, b"".join(line + b"\n" for line in lines))
    return Mutation(path.name, what, keys, line + 1)


def mutate_yaml(path: Path, random: Random) -> Mutation:
    """The values of JSON, or a scalar that YAML alone knows."""
    content = yaml.safe_load(path.read_bytes())
    changed = change_value(content, random)
    if random.random() < 0.4:
        paths = [place for place in _places(content) if place and not isinstance(content, list)]
        place = random.choice(paths)
        raw = random.choice(_YAML_TEXTS)
        root = copy.deepcopy(content)
        parent = root
        for step in place[:-1]:
            parent = parent[step]
        parent[place[-1]] = Raw(raw)
        changed = _Changed(
            root, f"{'.'.join(map(str, place))} -> {raw}", tuple(str(s) for s in place if isinstance(s, str))
        )
    _replace(path, json_text(changed.value).encode())
    return Mutation(path.name, changed.what, changed.keys)


def mutate_safetensors(path: Path, random: Random) -> Mutation:
    """A value of the header, which is JSON behind its length."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    changed = change_value(json.loads(data[8 : 8 + length]), random)
    header = json_text(changed.value).encode()
    size = len(header) if random.random() < 0.9 else random.choice((0, 1, 2**40, 2**64 - 1))
    _replace(path, struct.pack("<Q", size) + header + data[8 + length :])
    return Mutation(path.name, f"header: {changed.what}", changed.keys)


def mutate_text(path: Path, random: Random) -> Mutation:
    """Of a text by lines or words: one removed, doubled, or in another's place."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    separator = random.choice(("\n", " "))
    parts = text.split(separator)
    a, b = random.randrange(len(parts)), random.randrange(len(parts))
    what = random.choice(("removed", "doubled", "swapped", "replaced"))
    if what == "removed":
        del parts[a]
    elif what == "doubled":
        parts.insert(b, parts[a])
    elif what == "swapped":
        parts[a], parts[b] = parts[b], parts[a]
    else:
        parts[a] = random.choice(
            ("", "-1", "9" * 5000, "nan", "x", "\0", "\x1b[2J", "x" * 100_000, "{%", "}}")
        )
    _replace(path, separator.join(parts).encode("utf-8", "surrogateescape"))
    return Mutation(path.name, f"text: part {a} {what}", line=None)


_BY_SUFFIX: dict[str, Callable[[Path, Random], Mutation]] = {
    ".json": mutate_json,
    ".done": mutate_json,
    ".jsonl": mutate_jsonl,
    ".yaml": mutate_yaml,
    ".yml": mutate_yaml,
    ".safetensors": mutate_safetensors,
    ".txt": mutate_text,
    ".csv": mutate_text,
    ".jinja": mutate_text,
    ".tiktoken": mutate_text,
}


def mutate(path: Path, random: Random) -> Mutation:
    """Changes one file in place: by what it holds, its bytes, or as a whole."""
    by_content = _BY_SUFFIX.get(path.suffix)
    draw = random.random()
    if draw < 0.06:
        return mutate_file(path, random)
    if by_content and draw < 0.7 and path.stat().st_size:
        return by_content(path, random)
    return mutate_bytes(path, random)


def _replace(path: Path, data: bytes) -> None:
    """Writes a new file: the old one may have other names, which keep what they had."""
    path.unlink()
    path.write_bytes(data)


def _shown(value: Any) -> str:
    text = value.text if isinstance(value, Raw) else ascii(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def copy_files(source: Path, target: Path) -> None:
    """A fresh copy of the seeds; what was there before goes."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=shutil.copyfile, symlinks=True)
