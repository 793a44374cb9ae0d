"""Files that change under an artifact, finished or begun: the stage makes them again or refuses them, or a
later one refuses them.

What no later result depends on (a marker of a finished artifact, say) may stay as it is: then a later stage
gives the same bytes.
"""

import random
from pathlib import Path
from typing import Any

from jobs import Watch
from targets import Broken, Files, Target, require_good_end, require_rerun

# (files in the artifact, name, another name, draw) -> the files that are written over; None: deleted
Damage = dict[str, bytes | None]


def _flipped(files: Files, name: str, draw: random.Random) -> Damage:
    content = bytearray(files[name])
    if not content:
        return {name: b"x"}
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return {name: bytes(content)}


def _emptied(files: Files, name: str, draw: random.Random) -> Damage:
    return {name: b""}


def _deleted(files: Files, name: str, draw: random.Random) -> Damage:
    return {name: None}


def _cut(files: Files, name: str, draw: random.Random) -> Damage:
    return {name: files[name][: draw.randrange(len(files[name]) or 1)]}


def _swapped(files: Files, name: str, draw: random.Random) -> Damage:
    """With a file of the same kind, of another shard or part."""
    suffix = name.split(".", 1)[-1]
    other = draw.choice([other for other in files if other.split(".", 1)[-1] == suffix])
    return {name: files[other], other: files[name]}


_DAMAGES = (_flipped, _emptied, _deleted, _cut, _swapped)


def damage_and_rerun(target: Target, draw: random.Random) -> dict[str, Any]:
    state = draw.choice(("finished", "finished", "without manifest", "killed"))
    if state == "killed":
        target.run(Watch(kill_at=draw.randint(target.operations // 3, target.operations)))
    else:
        target.restore()
    files = target.files()
    if state == "without manifest":
        for name in [name for name in files if Path(name).name == "manifest.json"]:
            (target.directory / name).unlink()
            del files[name]
    if not files:
        return {"outcome": "nothing there", "codes": []}
    damage = draw.choice(_DAMAGES)
    changed = damage(files, draw.choice(sorted(files)), draw)
    changed = {name: content for name, content in changed.items() if content != files[name]}
    for name, content in changed.items():
        path = target.directory / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    facts = {"how": f"{state}, {', '.join(changed)} {damage.__name__.strip('_')}"}
    try:
        return {**facts, **_look(target, changed, state)}
    except Broken as broken:
        raise Broken(f"{facts['how']}: {broken}") from broken


def _look(target: Target, changed: Damage, state: str) -> dict[str, Any]:
    before = _identities(target)
    job = target.run()
    require_good_end(job)
    facts = {"codes": [job.exit_code]}
    if job.exit_code == 2:
        _require_named(target, job.text, changed)
        target.restore()
        require_rerun(target)
        return {**facts, "outcome": "refused"}
    if not target.differences():
        made = _shards_of(
            name for name, identity in _identities(target).items() if before.get(name) != identity
        )
        if state == "finished" and (more := made - _shards_of(changed)):
            raise Broken(f"shards were made again that had no damage: {', '.join(sorted(more))}")
        return {**facts, "outcome": "made again" if changed else "no damage", "made": len(made)}
    return {**facts, "outcome": _read_later(target, changed)}


def _read_later(target: Target, changed: Damage) -> str:
    """The stage has ended with 0 over damage: a later one has to refuse it, or to give the same bytes
    without it.
    """
    reader = target.reader
    if reader is None:
        raise Broken("the damage stays, and nothing reads it later")
    reader.forget()
    try:
        job = reader.run()
        require_good_end(job)
        if job.exit_code == 2:
            _require_named(target, job.text, changed)
            return "refused later"
        if differences := reader.differences():
            raise Broken(f"{reader.name} reads the damage silently: {differences[0]}")
        return "without effect"
    finally:
        reader.restore()


def _require_named(target: Target, text: str, changed: Damage) -> None:
    """Raises Broken unless a message names a file that was changed, or the directory whose plan or
    manifest was.
    """
    said = text[text.rfind("error: ") :]
    paths = [target.directory / name for name in changed]
    if not any(
        path.name in said or (path.name in ("plan.json", "manifest.json") and str(path.parent) in said)
        for path in paths
    ):
        raise Broken(f"none of the damaged files is named in: {said.strip()[:600]}")


def _identities(target: Target) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(target.directory)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in target.directory.rglob("*")
        if path.is_file()
    }


def _shards_of(names: Any) -> set[str]:
    """Shards are known by their name alone: those of artifacts that share work are made together."""
    return {
        name
        for name in (Path(path).name.split(".")[0] for path in names)
        if name.startswith(("shard-", "part"))
    }
