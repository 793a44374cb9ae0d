"""The plan of an artifact, the finished artifact, and the comparison of the two."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_fuse.errors import UserError
from megatron_fuse.storage.files import sha256_of_file, sha256_of_json
from megatron_fuse.storage.records import ManifestRecord, PlanRecord, read_record

FORMAT_VERSION = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a stage must write.

    Two plans describe the same artifact if all fields but `directory` are equal.
    """

    directory: Path
    stage: str
    options: dict[str, Any]  # JSON values: every option that changes the bytes
    # What it is made from, by name: sha256 of parent manifests, tokenizers, templates, models.
    inputs: dict[str, str]
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
class Artifact:
    """A complete artifact directory."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hash that children record: it covers options, inputs and the checksum of every file."""
        return sha256_of_json(self.manifest)

    @property
    def counts(self) -> dict[str, int]:
        """The counts of the manifest.

        A missing key raises UserError: another version wrote the manifest, or it was edited.
        """
        return _Counts(self.directory, self.manifest["counts"])

    @property
    def summary(self) -> str:
        """The directory and the counts, for the command that made the artifact."""
        counts = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in self.counts.items())
        return f"{self.directory}: {counts}"

    def files(self, suffix: str) -> list[Path]:
        """Data files with this suffix in shard order."""
        return [self.directory / name for name in self.manifest["files"] if name.endswith(suffix)]

    def checked(self, path: Path, *, checksum: bool = True) -> Path:
        """Compares the size and the sha256 of one file with the manifest (about 1 s per GB). Returns `path`.

        path: one of this artifact's files. checksum: False compares the size alone. Raises UserError, naming
        the file, if it is not in the manifest or is not what the stage wrote.
        """
        recorded = self.manifest["files"].get(path.name)
        if recorded is None:
            raise UserError(
                f"{path}: {self.directory}/manifest.json does not list the file. Name a file of this stage."
            )
        if damage := damage_of(path, recorded["bytes"]):
            raise UserError(f"{damage}. Restore it, or run the stage again: it makes this shard again.")
        if checksum and (actual := sha256_of_file(path)) != recorded["sha256"]:
            raise UserError(
                f"{path}: the sha256 is {shown(actual)}, but the manifest has {shown(recorded['sha256'])}. "
                "Restore the file, or remove it and run the stage again: it makes this shard again."
            )
        return path

    def damage(self) -> str | None:
        """The first file that is missing or has another size than the manifest says; None if there is
        none.
        """
        return first_damage(self.directory, self.manifest["files"])

    def verify(self, *, checksums: bool = True) -> "Artifact":
        """Compares all files with the manifest; checksums: False compares sizes alone. Returns the artifact.

        Raises UserError as `checked` does.
        """
        for name in self.manifest["files"]:
            self.checked(self.directory / name, checksum=checksums)
        return self


class _Counts(dict[str, int]):
    def __init__(self, directory: Path, counts: Mapping[str, int]) -> None:
        super().__init__(counts)
        self._directory = directory

    def __missing__(self, key: str) -> int:
        raise UserError(
            f"{self._directory}/manifest.json: counts.{key} is missing. Restore the file, or remove "
            f"{self._directory} and run the stage again."
        )


def damage_of(path: Path, size: int) -> str | None:
    """What is wrong with a file that must have `size` bytes: missing or of another size. None if neither."""
    if not path.is_file():
        return f"{path}: missing"
    present = path.stat().st_size
    return None if present == size else f"{path}: {present} bytes instead of {size}"


def first_damage(directory: Path, files: Mapping[str, Any]) -> str | None:
    """damage_of the first of these files that has any. files: {name: {bytes, ...}}, as in manifests and
    markers.
    """
    damages = (damage_of(directory / name, recorded["bytes"]) for name, recorded in files.items())
    return next((damage for damage in damages if damage), None)


@dataclass(frozen=True, eq=False)
class Shards(Sequence[T]):
    """The contents of an artifact's shards.

    Each indexing reads one shard and compares its checksum; none is kept.
    """

    artifact: Artifact
    paths: list[Path]
    read: Callable[[Path], T]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> T:  # type: ignore[override]  # no slices: they would be in memory all at once
        return self.read(self.artifact.checked(self.paths[index]))


def open_artifact(
    directory: Path,
    stage: str,
    made_by: str,
    *,
    options: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    remove: Path | None = None,
) -> Artifact:
    """Opens a complete artifact and compares the sizes of all its files with the manifest.

    options, inputs: what the artifact must have been made with and from; only the given keys are compared.
    made_by: the command that makes it. remove: the directory that the user must remove before that; default:
    the artifact alone. The errors name both.

    Raises UserError if the artifact is missing, incomplete or damaged, or if its stage, format, options or
    inputs differ.
    """
    if not (directory / "manifest.json").exists():
        state = "is incomplete" if (directory / "plan.json").exists() else "does not exist"
        raise UserError(f"{directory} {state}. Run {made_by} first.")
    manifest = read_record(directory / "manifest.json", ManifestRecord).content()
    if manifest.get("format_version") != FORMAT_VERSION or manifest.get("stage") != stage:
        raise UserError(
            f"{directory}/manifest.json: it is of stage {manifest.get('stage')!r} in format "
            f"{manifest.get('format_version')}, but stage {stage!r} in format {FORMAT_VERSION} is needed. "
            f"Remove {directory} and run {made_by} again."
        )
    advice = f"Remove {remove or directory} and run {made_by} again, or restore the old value."
    for section, wanted in {"options": options or {}, "inputs": inputs or {}}.items():
        _refuse_difference(
            directory,
            section,
            {key: manifest[section][key] for key in wanted if key in manifest[section]},
            wanted,
            advice,
        )
    return Artifact(directory, manifest).verify(checksums=False)


def completed(plan: Plan) -> Artifact | None:
    """The finished artifact of a plan, None if something is left to do.

    If files are missing or have another size, or if the manifest is damaged, the result is None: run_plans
    makes them again. Raises UserError if the directory belongs to another plan.
    """
    directory, wanted = plan.directory, plan.content()
    for name, model in (("manifest.json", ManifestRecord), ("plan.json", PlanRecord)):
        if not (directory / name).exists():
            continue
        try:
            recorded = read_record(directory / name, model).content()
        except UserError:
            if name == "manifest.json":  # damaged: it is made again from plan.json and the markers
                continue
            raise
        fix = f"Move or remove {directory} and run this again, or restore the old value."
        for key in ("format_version", "stage", "options", "inputs", "shards", "shard_names"):
            _refuse_difference(directory, key, recorded.get(key), wanted.get(key), fix)
        if name == "manifest.json":
            artifact = Artifact(directory, recorded)
            return None if artifact.damage() else artifact
        return None
    return None


def _refuse_difference(directory: Path, key: str, have: Any, want: Any, advice: str) -> None:
    """Raises UserError naming the key (within a section, the first that differs) and both values."""
    if have == want:
        return
    if isinstance(have, dict) and isinstance(want, Mapping):
        inner = next(k for k in [*want, *have] if have.get(k) != want.get(k) or (k in have) != (k in want))
        if inner not in have:  # written by an older version, which did not record this key
            raise UserError(
                f"{directory} was made without {key}.{inner}, but now it is {shown(want[inner])}. {advice}"
            )
        key, have, want = f"{key}.{inner}", have.get(inner), want.get(inner)
    raise UserError(
        f"{directory} was made with {key} = {shown(have)}, but now {key} = {shown(want)}. {advice}"
    )


def shown(value: Any) -> str:
    """A recorded option or input as messages show it. A sha256 is cut to its first 12 digits."""
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if is_hash else repr(value)
