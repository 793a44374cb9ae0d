"""Laws of fusion data's checksums: damage anywhere is named, and what was found whole is not read again
until it changes.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_fusion import own_up

from megatron_fuse.dataset import FusionDataset, build_fusion_data, checksums
from megatron_fuse.dataset.checksums import BackgroundVerification, verify_once
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.recipe import Recipe
from megatron_fuse.selection.array_file import read_arrays
from megatron_fuse.selection.choice import selection_path
from megatron_fuse.stages import Context
from megatron_fuse.storage import Artifact


def opened(recipe: Recipe) -> FusionDataset:
    """As training opens fusion data, and compares it before its first checkpoint."""
    dataset = FusionDataset(recipe)
    verify_once(dataset.artifacts)
    return dataset


def rewrite_in_place(path: Path, edit: Callable[[bytearray], None]) -> None:
    """Other bytes in the same file, of the same size and mtime."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    edit(data)
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def every_40th_token(data: bytearray) -> None:
    np.frombuffer(data, np.uint16)[::40] = 7


def low_bytes(data: bytearray) -> None:
    np.frombuffer(data, np.uint8)[::2] = 0


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("text/shard-00001.tokens.bin", every_40th_token),
        ("teachers/beta/training/shard-00000.entry_logprobs.bin", low_bytes),
        ("teachers/gamma/inference/shard-00002.match.bin", lambda data: data.reverse()),
    ],
)
def test_values_that_a_dataset_takes_without_a_word_are_named(
    copied: Recipe, name: str, edit: Callable[[bytearray], None]
) -> None:
    opened(copied)  # and recorded as whole
    path = fusion_directory(copied) / name
    rewrite_in_place(path, edit)
    with pytest.raises(
        UserError,
        match=rf"^{path}: the sha256 is .*, but the manifest has .*\. Restore the file, or remove it and run",
    ):
        opened(copied)


def test_one_bit_flipped_in_any_file_that_training_reads_is_named(copied: Recipe) -> None:
    """Of each kind of file one, by its suffix and directory; before training ends, or as the data are
    opened.
    """
    curriculum = copied.model_copy(
        update={"schedule": copied.schedule.model_copy(update={"order": "gt_length"})}
    )
    fusion, draw = fusion_directory(copied), np.random.default_rng(3)
    kinds = {}
    for path in sorted(fusion.rglob("*.*")):
        if path.is_file() and path.suffix not in (".done", ".npz", ".yaml") and path.name != "plan.json":
            kinds[path.parent, *path.suffixes] = path
    build_fusion_data(Context(curriculum))
    kinds["curriculum"] = fusion / "curriculum-gt_length.safetensors"
    kinds = {kind: path for kind, path in kinds.items() if path.name != "curriculum-shuffled.safetensors"}
    # text (with its spans) and rows of both modes, each with a manifest and a list or arrays of examples;
    # choice, order
    assert len(kinds) == 2 * 2 + 3 + 3 * (4 * 2 + 2) + 3 * (6 * 2 + 2) + 1 + 1
    opened(curriculum)
    for kind, path in kinds.items():
        whole, place = path.read_bytes(), int(draw.integers(path.stat().st_size))

        def flip(data: bytearray, place: int = place) -> None:
            data[place] ^= 1 << (place % 8)

        rewrite_in_place(path, flip)
        with pytest.raises(UserError) as raised:
            opened(curriculum)
        if path.name == "manifest.json":  # the text's and all sources' are known to the choice as well
            path = selection_path(curriculum, "training").parent if "selection" in str(raised.value) else path
        # of a stream whose index contradicts its values either file may be the damaged one
        assert str(path.with_suffix("")) in str(raised.value), kind
        assert len(str(raised.value)) <= 600
        path.write_bytes(whole)
    opened(curriculum)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files whose checksums were computed."""
    paths: list[Path] = []
    checked = Artifact.checked

    def record(self: Artifact, path: Path, *, checksum: bool = True) -> Path:
        paths.extend([path] * checksum)
        return checked(self, path, checksum=checksum)

    monkeypatch.setattr(Artifact, "checked", record)
    return paths


def read_by(paths: list[Path], artifacts: list[Artifact]) -> int:
    paths.clear()
    verify_once(artifacts)
    return len(paths)


def test_what_was_found_whole_is_read_again_only_after_a_change(
    copied: Recipe, read: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEGATRON_FUSE_CACHE", str(tmp_path / "cache"))
    artifacts = FusionDataset(copied).artifacts
    text, teacher = artifacts[0], artifacts[1]
    files = sum(len(artifact.manifest["files"]) for artifact in artifacts)
    assert read_by(read, artifacts) == files
    assert read_by(read, artifacts) == 0
    (teacher.directory / "shard-00000.match.bin").touch()
    assert read_by(read, artifacts) == len(teacher.manifest["files"])
    assert read_by(read, artifacts) == 0
    rewrite_in_place(text.directory / "shard-00000.tokens.bin", lambda data: None)
    assert read_by(read, artifacts) == len(text.manifest["files"])
    rebuilt = Artifact(text.directory, {**text.manifest, "inputs": {}})
    assert read_by(read, [rebuilt]) == len(text.manifest["files"])
    assert read_by(read, [text]) == len(text.manifest["files"])  # one record, of the last build
    assert read_by(read, artifacts) == 0
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(checksums.socket, "gethostname", lambda: "another machine")
        assert read_by(read, artifacts) == files
        assert read_by(read, artifacts) == 0
    assert read_by(read, artifacts) == 0


def test_damaged_data_leave_no_record(copied: Recipe, read: list[Path]) -> None:
    path = fusion_directory(copied) / "text/shard-00001.tokens.bin"
    text = FusionDataset(copied).artifacts[0]
    rewrite_in_place(path, every_40th_token)
    for _ in range(2):
        with pytest.raises(UserError, match="shard-00001"):
            opened(copied)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: missing"):
        verify_once([text])


@pytest.mark.parametrize("cache", ["a file", "in a file", "no bytes", "no home"])
def test_without_a_cache_directory_everything_is_read_every_time(
    copied: Recipe, read: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str
) -> None:
    root = tmp_path / "cache"
    monkeypatch.setenv("MEGATRON_FUSE_CACHE", str(root))
    artifacts = FusionDataset(copied).artifacts[:1]
    if cache == "a file":
        root.write_text("")
    elif cache == "in a file":
        root.mkdir()
        (root / "verified").write_text("")
    elif cache == "no bytes":
        verify_once(artifacts)
        (record,) = (root / "verified").iterdir()
        record.write_bytes(b"\xff\xfe")
        record.chmod(stat.S_IRUSR)
        assert read_by(read, artifacts) > 0
        assert read_by(read, artifacts) == 0  # written anew
        return
    else:
        monkeypatch.delenv("MEGATRON_FUSE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
    assert read_by(read, artifacts) == read_by(read, artifacts) > 0


def test_threads_end_with_their_block(copied: Recipe, read: list[Path]) -> None:
    artifacts = [artifact for artifact in FusionDataset(copied).artifacts for _ in range(50)]
    with BackgroundVerification(artifacts) as verification:
        pass
    assert verification.done
    assert len(read) < sum(len(artifact.manifest["files"]) for artifact in artifacts)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"id": 1}',
        '{"id": "a", "held_out": 0, "supervised_tokens": 3}',
        '{"id": "a", "held_out": true}',
        "{",
    ]
    + [
        f'{{"id": "a", "held_out": true, "supervised_tokens": {n}}}'
        for n in ("-1", "1e99", '"3"', "9" * 5000)
    ],
)
def test_a_list_of_examples_with_other_types_is_named_by_its_line(copied: Recipe, line: str) -> None:
    path = fusion_directory(copied) / "text/shard-00001.examples.jsonl"
    path.write_text(path.read_text() + line + "\n")
    own_up(path)
    with pytest.raises(UserError, match=rf"^{path}:6: ") as raised:
        FusionDataset(copied)
    assert len(str(raised.value)) <= 600


def test_a_file_that_changes_after_it_was_opened_is_named(copied: Recipe) -> None:
    dataset = FusionDataset(copied)
    path = fusion_directory(copied) / "text/shard-00000.tokens.bin"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"^{path}: the file has 0 bytes, but had \d+ when it was opened"):
        dataset.document("training", 0)
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path}: the file can no longer be read"):
        dataset.document("training", 0)


def test_a_choice_whose_file_is_another_form_is_refused(copied: Recipe) -> None:
    path = selection_path(copied, "training")
    arrays, basis = read_arrays(path, "")
    for header, said in (
        (None, "the header has no 'made'"),
        ({"selection": json.dumps(basis)}, "the header has no 'made'"),  # of the version before
        ({"made": json.dumps(basis)}, "the header has no 'basis'"),
        ({"made": json.dumps({"basis": basis})}, "the header has no 'sha256'"),
        ({"made": json.dumps({"basis": [], "sha256": "0"})}, "arrays and basis have sha256"),
        ({"made": json.dumps({"basis": basis, "sha256": [5]})}, "arrays and basis have sha256"),
        ({"made": "[]"}, "list indices"),
        ({"made": "[" * 100000}, "damaged"),
    ):
        save_file(arrays, path, header)
        with pytest.raises(UserError, match=rf"^{path}: .*{said}.*\. Run megatron-fuse build"):
            FusionDataset(copied)
