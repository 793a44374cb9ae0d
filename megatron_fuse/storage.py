"""Artefact directories: what a stage writes, whole or resumable, and tied by hashes to everything it was made from.

    DIRECTORY/plan.json             what is being made: stage, options, input hashes, number of shards; written first
    DIRECTORY/shard-00000.*         data files, each written to a temporary name and renamed
    DIRECTORY/shard-00000.done      {files: {name: {bytes, sha256}}, counts}: the shard is whole
    DIRECTORY/manifest.json         plan, files and summed counts; written last, its presence means complete

A rerun finds the plan equal and takes only the shards without marker. A plan that differs is refused with the key and both
values: nothing is overwritten. Any number of processes may share the work; whoever completes the last shard writes the manifest.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from megatron_fuse.errors import UserError

FORMAT_VERSION = 1


def sha256_of_bytes(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))  # so that ("ab", "c") and ("a", "bc") differ
        digest.update(part)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    return sha256_of_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def temporary_then_rename(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it there at the end; on an error nothing is left behind.

    Raises UserError where the operating system refuses: no permission, a file in a directory's place, a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    with temporary_then_rename(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    with temporary_then_rename(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of every non-empty line. A malformed line raises UserError naming it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number}: not valid JSON ({error}): a row is a JSON object on one line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: a row is a JSON object on one line, this is a {type(row).__name__}")
            yield number, row


@dataclass(frozen=True)
class Plan:
    """What a stage is to write. Two plans are the same artefact when all but `directory` is equal."""

    directory: Path
    stage: str
    options: dict[str, Any]  # JSON values: every option that changes the bytes
    inputs: dict[str, str]  # what it is made from, by name: sha256 of parent manifests, tokenizers, templates, models
    shards: int
    shard_names: list[str] | None = field(default=None)  # default: shard-00000, ...

    def names(self) -> list[str]:
        return self.shard_names or [f"shard-{index:05d}" for index in range(self.shards)]

    def content(self) -> dict[str, Any]:
        content = asdict(self)
        del content["directory"]
        if self.shard_names is None:
            del content["shard_names"]
        return json.loads(json.dumps({"format_version": FORMAT_VERSION, **content}))


@dataclass(frozen=True)
class Artefact:
    """A complete artefact directory."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hash that children record: it covers options, inputs and the checksum of every file."""
        return sha256_of_json(self.manifest)

    @property
    def counts(self) -> dict[str, int]:
        return self.manifest["counts"]

    def files(self, suffix: str) -> list[Path]:
        """Data files with this suffix in shard order."""
        return [self.directory / name for name in self.manifest["files"] if name.endswith(suffix)]

    def verify(self, *, checksums: bool = True) -> "Artefact":
        """Compares all files with the manifest, by size alone where checksums is False; returns the artefact."""
        mend = f"restore it, or remove {self.directory} and rerun the stage"
        for name, facts in self.manifest["files"].items():
            path = self.directory / name
            if not path.is_file():
                raise UserError(f"{path}: missing; its manifest lists it: {mend}")
            if path.stat().st_size != facts["bytes"]:
                raise UserError(f"{path}: {path.stat().st_size} bytes, the manifest has {facts['bytes']}: {mend}")
            if checksums and (found := sha256_of_file(path)) != facts["sha256"]:
                raise UserError(f"{path}: sha256 {found[:12]}..., the manifest has {facts['sha256'][:12]}...: {mend}")
        return self


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of an object")
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): remove {path.parent} and rerun the stage") from error
    return content


def _refuse_other_plan(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in ("format_version", "stage", "options", "inputs", "shards", "shard_names"):
        have, want = found.get(key), wanted.get(key)
        if have == want:
            continue
        if isinstance(have, dict) and isinstance(want, dict):
            inner = next(k for k in [*want, *have] if have.get(k) != want.get(k))
            key, have, want = f"{key}.{inner}", have.get(inner), want.get(inner)
        raise UserError(
            f"{directory} was made with {key} = {have!r}, but now {key} = {want!r}: "
            f"move or remove {directory} to make it anew, or put the old value back"
        )


def open_artefact(directory: Path, stage: str, made_by: str) -> Artefact:
    """Opens a complete artefact whose files all have their size. `made_by` names the command that makes it, for errors."""
    if not (directory / "manifest.json").exists():
        state = "is incomplete" if (directory / "plan.json").exists() else "does not exist"
        raise UserError(f"{directory} {state}: run {made_by} first")
    manifest = read_json(directory / "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION or manifest.get("stage") != stage:
        raise UserError(
            f"{directory}/manifest.json: stage {manifest.get('stage')!r} in format {manifest.get('format_version')}, "
            f"needed is {stage!r} in format {FORMAT_VERSION}"
        )
    return Artefact(directory, manifest).verify(checksums=False)


def completed(plan: Plan) -> Artefact | None:
    """The finished artefact of a plan, None where something is left to do. Another plan's directory is refused."""
    for name in ("manifest.json", "plan.json"):
        if (plan.directory / name).exists():
            found = read_json(plan.directory / name)
            _refuse_other_plan(plan.directory, found, plan.content())
            return Artefact(plan.directory, found).verify(checksums=False) if name == "manifest.json" else None
    return None


def rank_and_world() -> tuple[int, int]:
    """This process's share of the work under torchrun: it takes every w-th shard from the r-th on."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


MakeShard = Callable[[int, Path], dict[str, int]]


def run_plan(plan: Plan, make_shard: MakeShard, progress: Callable[[str], None] = print) -> Artefact | None:
    """Makes the missing shards of this rank, then the manifest if every shard is there.

    make_shard(index, prefix) writes files named `prefix.<suffix>` (through a temporary name of its own or not: a shard without
    marker is made again) and returns counts, which are added up in the manifest. Returns the artefact, None while other ranks
    still work on theirs.
    """
    artefact = completed(plan)
    if artefact:
        return artefact
    directory = plan.directory
    write_json(directory / "plan.json", plan.content())
    rank, world_size = rank_and_world()
    names = plan.names()
    for index in range(rank, len(names), world_size):
        marker = directory / f"{names[index]}.done"
        if marker.exists():
            continue
        _remove_files(directory, names[index])
        try:
            counts = make_shard(index, directory / names[index])
        except Exception:
            _forget(plan, names[index])
            raise
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            for path in sorted(directory.glob(f"{names[index]}.*"))
        }
        if not (directory / "plan.json").exists():  # another rank failed at its first shard
            write_json(directory / "plan.json", plan.content())
        write_json(marker, {"files": files, "counts": counts})
        done = sum((directory / f"{name}.done").exists() for name in names)
        progress(f"{directory}: shard {done}/{len(names)}")
    return _finish(plan)


def _remove_files(directory: Path, shard: str) -> None:
    """Data files of a shard without marker, whole or temporary."""
    for leftover in directory.glob(f"*{shard}.*"):
        leftover.unlink()


def _forget(plan: Plan, shard: str) -> None:
    """After an error: leaves nothing half-written, and no plan that would bind a mended rerun while no shard is done."""
    _remove_files(plan.directory, shard)
    if not any((plan.directory / f"{name}.done").exists() for name in plan.names()):
        (plan.directory / "plan.json").unlink(missing_ok=True)
        with suppress(OSError):  # not empty: another rank is still at work
            plan.directory.rmdir()


def _finish(plan: Plan) -> Artefact | None:
    markers = [plan.directory / f"{name}.done" for name in plan.names()]
    if not all(marker.exists() for marker in markers):
        return None
    files: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for marker in markers:
        content = read_json(marker)
        files |= content["files"]
        for key, value in content["counts"].items():
            counts[key] = counts.get(key, 0) + value
    manifest = {**plan.content(), "counts": counts, "files": files}
    write_json(plan.directory / "manifest.json", manifest)
    return Artefact(plan.directory, manifest)


def shard_bounds(items: int, shard_size: int) -> np.ndarray:
    """[shards + 1] first item of every shard, and the number of items at the end. At least one shard, even of nothing."""
    return np.unique(np.append(np.arange(0, max(items, 1), shard_size), items)) if items else np.array([0, 0])


@dataclass(frozen=True)
class Workspace:
    """Names of the artefact directories under a recipe's workdir; nothing else knows them."""

    root: Path

    @property
    def instructions(self) -> Path:
        return self.root / "instructions"

    def responses(self, source: str) -> Path:
        return self.root / "responses" / source

    def scores(self, source: str, reward_model: str) -> Path:
        return self.root / "scores" / source / reward_model

    def captures(self, source: str, mode: str) -> Path:
        return self.root / "captures" / source / mode

    def fusion(self, vocabulary_map: str, unmatched: str, temperature: float) -> Path:
        """Fusion data exists once for each way of alignment and each KL temperature."""
        return self.root / "fusion" / f"{vocabulary_map}-{unmatched}-T{temperature:g}"

    @property
    def training(self) -> Path:
        return self.root / "training"

    @property
    def checkpoints(self) -> Path:
        return self.training / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"
