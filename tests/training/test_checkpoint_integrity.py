"""A checkpoint's files load as they were written or not at all, and nothing in them is run."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import make_tiny_target
from test_layouts import layout, run_training

ROOT = Path(__file__).parents[2]
FILES = [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "facts.json", "metadata.json"]
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]
    """Checkpoints of the first two steps, of weights and optimizer, and their target."""
    directory = tmp_path_factory.mktemp("trained")
    target = make_tiny_target(directory / "target")
    sections = {
        "parallel": {"use_distributed_optimizer": True},
        "training": {"train_iters": 2, "save_interval": 1, "async_save": True},
    }
    ranks(1, run_training, directory / "work", target, sections)
    return directory / "work/training/checkpoints", target


def load_all(target: Path, cases: list[tuple[Path, bool]]) -> list[tuple[str, str]]:
    """In one process: the message of each load, or "loaded", and a digest of the weights."""
    import hashlib

    from megatron_fuse.errors import UserError
    from megatron_fuse.runtime import start_runtime

    start_runtime()
    from megatron_fuse.training.checkpoint import load_checkpoint
    from megatron_fuse.training.target import _whole_model

    architecture, chunks = _whole_model(target)
    outcomes = []
    for path, verify in cases:
        try:
            load_checkpoint(path, chunks, None, architecture, verify=verify)
            message = "loaded"
        except UserError as error:
            message = str(error)
        digest = hashlib.sha256()
        for parameter in chunks[0].parameters():
            digest.update(parameter.detach().numpy().tobytes())
        outcomes.append((message, digest.hexdigest()))
    return outcomes


class Cases:
    """Damaged copies of a checkpoint, loaded together in one process."""

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        self.checkpoint, self.directory = checkpoint, directory
        self.made: list[tuple[str, Path, bool]] = []

    def add(self, what: str, damage: Damage, *, verify: bool = True) -> None:
        path = self.directory / str(len(self.made)) / self.checkpoint.name
        shutil.copytree(self.checkpoint, path)
        damage(path)
        self.made.append((what, path, verify))

    def outcomes(self, ranks, target: Path) -> list[tuple[str, str, str]]:  # type: ignore[no-untyped-def]
        """(what, message, digest of the weights) of each."""
        (found,) = ranks(1, load_all, target, [(path, verify) for _, path, verify in self.made])
        return [(what, *outcome) for (what, _, _), outcome in zip(self.made, found, strict=True)]


@pytest.fixture
def cases(trained, tmp_path: Path) -> Cases:  # type: ignore[no-untyped-def]
    return Cases(trained[0] / "iter_0000002", tmp_path)


def flip(name: str, rng: random.Random) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(content)

    return damage


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes())) and None  # type: ignore[func-returns-value]


def remove(*names: str) -> Damage:
    return lambda path: [(path / name).unlink() for name in names] and None  # type: ignore[func-returns-value]


def test_a_damaged_file_is_named_and_nothing_is_loaded(ranks, trained, cases: Cases) -> None:  # type: ignore[no-untyped-def]
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    other = trained[0] / "iter_0000001"
    for name in FILES:
        cases.add(f"{name} removed", remove(name))
        cases.add(f"{name} cut off", rewrite(name, lambda content: content[:-1]))
        cases.add(f"{name} emptied", rewrite(name, lambda _: b""))
        cases.add(f"{name} longer", rewrite(name, lambda content: content + b"\0"))
        for _ in range(3):
            cases.add(f"{name} flipped", flip(name, rng))
        if name != "metadata.json":  # the same in every checkpoint
            cases.add(
                f"{name} of another step", rewrite(name, lambda _, name=name: (other / name).read_bytes())
            )
    for what, message, _ in cases.outcomes(ranks, trained[1]):
        name = what.partition(" ")[0]
        assert name in message, (seed, what, message)
        assert "another checkpoint" in message or "not a complete checkpoint" in message, (
            seed,
            what,
            message,
        )
        assert len(message) <= 600


def test_damage_to_what_a_load_does_not_ask_for_is_found(ranks, trained, cases: Cases) -> None:  # type: ignore[no-untyped-def]
    """The weights alone are loaded, as an export does it: of the optimizer's items nothing is read but to
    compare them.
    """
    metadata = pickle.loads((cases.checkpoint / ".metadata").read_bytes())
    places = [place for index, place in metadata.storage_data.items() if index.fqn.startswith("optimizer")]

    def flip_last(path: Path, name: str, at: int) -> None:
        content = bytearray((path / name).read_bytes())
        content[at] ^= 1
        (path / name).write_bytes(content)

    for place in (places[0], places[-1]):
        at = place.offset + place.length - 1
        cases.add(
            place.relative_path, lambda path, place=place, at=at: flip_last(path, place.relative_path, at)
        )
        cases.add(
            "loaded", lambda path, place=place, at=at: flip_last(path, place.relative_path, at), verify=False
        )
    whole, *_ = ranks(1, load_all, trained[1], [(cases.checkpoint, True)])[0]
    for what, message, digest in cases.outcomes(ranks, trained[1]):
        assert what in message and digest == whole[1]


def test_without_verification_sizes_are_compared_and_damage_never_ends_in_a_traceback(  # type: ignore[no-untyped-def]
    ranks, trained, cases: Cases
) -> None:
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    for name in FILES:
        cases.add(f"{name} removed", remove(name), verify=False)
        cases.add(f"{name} cut off", rewrite(name, lambda content: content[:-1]), verify=False)
    for name in FILES * 4:
        cases.add(f"{name} flipped", flip(name, rng), verify=False)
    for what, message, _ in cases.outcomes(ranks, trained[1]):
        if not what.endswith("flipped"):
            assert what.partition(" ")[0] in message, (seed, what, message)
        assert len(message) <= 600


def test_a_checkpoint_without_checksums_is_loaded_only_on_request(ranks, trained, cases: Cases) -> None:  # type: ignore[no-untyped-def]
    cases.add("whole", lambda _: None)
    cases.add("no checksums", remove("checksums.json"))
    cases.add("no checksums, on request", remove("checksums.json"), verify=False)
    whole, refused, loaded = cases.outcomes(ranks, trained[1])
    assert whole[1] == loaded[1] == "loaded" and whole[2] == loaded[2]
    assert "checksums.json" in refused[1] and "--no-verify" in refused[1]


@pytest.mark.parametrize("verify", [True, False])
def test_damaged_checksums_are_named(ranks, trained, cases: Cases, verify: bool) -> None:  # type: ignore[no-untyped-def]
    contents = [
        "",
        "{}",
        "[]",
        "nonsense",
        '{"files": {}}',
        '{"files": {}, "items": {}}',
        '{"files": null, "items": {}}',
        '{"files": {"a": 5}, "items": {}}',
        '{"files": {}, "items": {"a": 5}}',
        "\udcff",
        "[" * 99999,
    ]
    for name in ("../a", "/a", ""):
        contents.append(json.dumps({"files": {name: {"bytes": 1, "xxh3_128": "0" * 32}}, "items": {}}))
        contents.append(json.dumps({"files": {}, "items": {name: {"bytes": 1, "items": [[0, "0" * 32]]}}}))
    for size in (-1, "1", True, 1.0, None):
        contents.append(json.dumps({"files": {"a": {"bytes": size, "xxh3_128": "0" * 32}}, "items": {}}))
        contents.append(json.dumps({"files": {}, "items": {"a": {"bytes": size, "items": []}}}))
    for starts in ([1], [0, 0], [0, 5, 3], [0, 9], [-1], ["0"], [None]):
        items = [[start, "0" * 32] for start in starts]
        contents.append(json.dumps({"files": {}, "items": {"a": {"bytes": 9, "items": items}}}))
    for content in contents:
        cases.add(
            content,
            rewrite("checksums.json", lambda _, c=content: c.encode(errors="surrogateescape")),
            verify=verify,
        )
    for what, message, _ in cases.outcomes(ranks, trained[1]):
        assert "checksums.json" in message and len(message) <= 600, (what, message)


def without_checksums(damage: Damage) -> Damage:
    def both(path: Path) -> None:
        damage(path)
        (path / "checksums.json").unlink()

    return both


def facts_with(key: str, value: Any) -> Damage:
    return rewrite("facts.json", lambda content: json.dumps({**json.loads(content), key: value}).encode())


def test_small_files_are_parsed_as_what_they_should_be(ranks, trained, cases: Cases) -> None:  # type: ignore[no-untyped-def]
    wrong: list[tuple[str, Damage]] = [
        ("facts.json", facts_with(key, value))
        for key in ("model", "run", "versions")
        for value in (None, 5, [])
    ]
    wrong += [("facts.json", facts_with("iteration", value)) for value in (None, "2", -1, True, 2.5, 3)]
    wrong += [
        ("facts.json", facts_with(key, "x"))
        for key in ("best_loss", "consumed_samples", "optimizer", "recipe", "unknown")
    ]
    wrong += [
        ("facts.json", rewrite("facts.json", lambda _, c=c: c))
        for c in (b"", b"[]", b"5", b"{}", b"\xff", b"[" * 99999)
    ]
    wrong += [
        ("metadata.json", rewrite("metadata.json", lambda _, c=c: c))
        for c in (b"", b"[]", b"5", b"{}", b"\xff", b"[" * 99999)
    ]
    wrong += [("metadata.json", rewrite("metadata.json", lambda c: c.replace(b"torch_dist", b"zarr")))]
    for contents in (b"", b"nonsense", pickle.dumps({}), pickle.dumps([1]), pickle.dumps(None)):
        wrong += [(name, rewrite(name, lambda _, c=contents: c)) for name in (".metadata", "common.pt")]
    for value in (5, [1], None):
        wrong.append(("common.pt", rewrite("common.pt", lambda _, v=value: torch_saved(v))))
    for name in ("common.pt", "metadata.json", "facts.json", ".metadata", "__0_1.distcp"):
        wrong.append((name, remove(name)))
    for name, damage in wrong:
        cases.add(name, without_checksums(damage), verify=False)
    for name, message, _ in cases.outcomes(ranks, trained[1]):
        assert name in message and len(message) <= 600, (name, message)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(ranks, trained, cases: Cases) -> None:  # type: ignore[no-untyped-def]
    def exchange(path: Path) -> None:
        shutil.rmtree(path)
        shutil.copytree(trained[0] / "iter_0000001", path)

    cases.add("exchanged", exchange)
    ((_, message, _),) = cases.outcomes(ranks, trained[1])
    assert "holds the checkpoint of iteration 1" in message


# Pickles that run a command. `os.mkdir` is harmless, and its directory shows that it was called.


class Calls:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def signed(damage: Damage) -> Damage:
    """The damage, and checksums that fit it: whoever crafts a checkpoint writes those as well."""

    def both(path: Path) -> None:
        damage(path)
        content = json.loads((path / "checksums.json").read_text())
        for name, record in content["items"].items():
            if (size := (path / name).stat().st_size) > record["bytes"]:
                record["items"].append([record["bytes"], ""])
                record["bytes"] = size
        (path / "checksums.json").write_text(json.dumps(recorded_anew(path, content)))

    return both


def recorded_anew(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's checksums.json with what its files hold now."""
    import xxhash

    def checksum(data: bytes) -> str:
        return xxhash.xxh3_128(data).hexdigest()

    files, items = {}, {}
    for name in content["files"]:
        data = (path / name).read_bytes()
        files[name] = {"bytes": len(data), "xxh3_128": checksum(data)}
    for name, record in content["items"].items():
        data = (path / name).read_bytes()
        starts = [start for start, _ in record["items"]]
        spans = zip(starts, [*starts[1:], len(data)], strict=True)
        items[name] = {
            "bytes": len(data),
            "items": [[start, checksum(data[start:end])] for start, end in spans],
        }
    return {"files": files, "items": items}


def with_item(kind: str, content: bytes) -> Damage:
    """Puts `content` in the place of a stored item of the model: of the first with `kind` in its name."""

    def damage(path: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        place = next(
            place
            for index, place in metadata.storage_data.items()
            if kind in index.fqn and not index.fqn.startswith("optimizer")
        )
        place.offset = (path / place.relative_path).stat().st_size
        place.length = len(content)
        with (path / place.relative_path).open("ab") as file:
            file.write(content)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def crafted(mark: Path) -> Iterator[tuple[str, Damage]]:
    evil = Calls(mark)
    yield ".metadata", rewrite(".metadata", lambda _: pickle.dumps(evil))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield ".metadata", rewrite(".metadata", lambda _, p=protocol: pickle.dumps(evil, p))

    def hidden(content: bytes) -> bytes:
        metadata = pickle.loads(content)
        metadata.planner_data = {"of no use": [evil]}
        return pickle.dumps(metadata)

    yield ".metadata", rewrite(".metadata", hidden)
    yield "common.pt", rewrite("common.pt", lambda _: torch_saved(evil))
    yield "common.pt", rewrite("common.pt", lambda _: torch_saved({"optimizer": evil}))
    yield "common.pt", rewrite("common.pt", lambda _: pickle.dumps(evil))
    yield ".distcp", with_item("output_layer.weight", torch_saved(evil))
    yield ".distcp", with_item("output_layer.weight", pickle.dumps(evil))


def test_no_file_of_a_checkpoint_runs_code(ranks, trained, cases: Cases, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    mark = tmp_path / "was run"
    for name, damage in crafted(mark):
        cases.add(name, signed(damage))
        cases.add(name, without_checksums(damage), verify=False)
    for name, message, _ in cases.outcomes(ranks, trained[1]):
        assert not mark.exists(), (name, message)
        assert name in message and len(message) <= 600, (name, message)
    # The pickles do run where nothing keeps them from it.
    pickle.loads(pickle.dumps(Calls(mark)))
    assert mark.exists()


def recorded_and_found(
    workdir: Path, target: Path, sections: dict[str, Any]
) -> list[tuple[dict, dict, set[str]]]:
    """Trains; on rank 0, of each checkpoint: checksums.json, what it should be, and the other files."""
    run_training(workdir, target, sections)
    found = []
    for path in (
        sorted((workdir / "training/checkpoints").glob("iter_*")) if os.environ["RANK"] == "0" else ()
    ):
        recorded = json.loads((path / "checksums.json").read_text())
        names = {file.name for file in path.iterdir()} - {"checksums.json"}
        found.append((recorded, recorded_anew(path, recorded), names))
    return found


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_every_rank_checksums_what_it_writes(ranks, tmp_path: Path, asynchronous: bool) -> None:  # type: ignore[no-untyped-def]
    target = make_tiny_target(tmp_path / "target")
    training = {"train_iters": 2, "save_interval": 1, "async_save": asynchronous}
    sections = {"parallel": layout(tp=2, use_distributed_optimizer=True), "training": training}
    found, _ = ranks(2, recorded_and_found, tmp_path / "work", target, sections)
    assert len(found) == 2
    for recorded, expected, names in found:
        assert recorded == expected and len(recorded["items"]) == 4 and len(recorded["files"]) == 4
        assert names == {*recorded["files"], *recorded["items"]}
        assert all(
            record["items"][0][0] == 0 and len(record["items"]) > 4 for record in recorded["items"].values()
        )


def refusal(workdir: Path, target: Path, sections: dict[str, Any]) -> str:
    from megatron_fuse.errors import UserError

    try:
        run_training(workdir, target, sections)
    except UserError as error:
        return str(error)
    return "accepted"


def test_every_rank_says_which_file_is_damaged(ranks, trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of two ranks only the first compares the files of this checkpoint, which one rank wrote."""
    shutil.copytree(trained[0], tmp_path / "damaged")
    flip("__0_1.distcp", random.Random(5))(tmp_path / "damaged/iter_0000002")
    sections = {"parallel": layout(tp=2, use_distributed_optimizer=True)}
    sections["training"] = {
        "train_iters": 3,
        "load": str(tmp_path / "damaged"),
        "save": str(tmp_path / "new"),
    }
    messages = ranks(2, refusal, tmp_path / "work", trained[1], sections)
    assert messages[0] == messages[1] and "__0_1.distcp: checksum" in messages[0]
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").glob("iter_*"))


@pytest.mark.parametrize("content", ["²", "", "x", "1" * 99, "3.0", "-1", "release"])
def test_a_tracker_of_nonsense_is_named(tmp_path: Path, content: str) -> None:
    from megatron_fuse.errors import UserError
    from megatron_fuse.runtime import enable_cpu_megatron

    enable_cpu_megatron()
    from megatron_fuse.training.checkpoint_metadata import named_checkpoint

    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt: it holds"):
        named_checkpoint(tmp_path)


def run_tool(name: str, *arguments: str) -> tuple[Any, str]:
    """Exit code and error output of a tool, in this process."""
    errors = io.StringIO()
    sys.argv = [name, *arguments]
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        except SystemExit as end:
            return end.code, errors.getvalue()
    return None, errors.getvalue()


def test_converting_a_damaged_checkpoint_is_refused(ranks, trained, cases: Cases, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    cases.add("flipped", flip("__0_0.distcp", random.Random(3)))
    path = cases.made[0][1]
    arguments = [
        "--from-megatron",
        str(path),
        "--reference",
        str(trained[1]),
        "--output",
        str(tmp_path / "model"),
    ]
    ((code, error),) = ranks(1, run_tool, "convert_checkpoint.py", *arguments)
    assert code == 2 and f"{path}/__0_0.distcp: checksum" in error and not (tmp_path / "model").exists()
    ((code, error),) = ranks(1, run_tool, "convert_checkpoint.py", *arguments, "--no-verify")
    assert code == 0 and (tmp_path / "model/model.safetensors").exists()


# What may run code while it reads, and how a line shows that it does not
_READERS = {
    r"\btorch\.load\(": r"weights_only=True",
    r"allow_pickle=True": r"^$",
    r"\byaml\.(unsafe_|full_)?load\(": r"_Loader",
    r"\b(c?[pP]ickle|dill|cloudpickle|marshal|shelve|joblib)\b[.\w]*\.(loads?|open|Unpickler)\b": (
        r"class _(Metadata|Tensor)Unpickler\(pickle\.Unpickler\)"
    ),
    r"(?<![.\w])(eval|exec)\(": r"^$",
    r"torch\.jit\.load|torch\.package|trust_remote_code=True": r"^$",
}
# Reads what this process's own writers put into a file without a name
_OWN = {"megatron_fuse/training/write_results.py"}


def test_nothing_in_the_project_unpickles_without_an_allow_list() -> None:
    found = []
    for path in [
        *ROOT.glob("*.py"),
        *(
            path
            for room in ("megatron_fuse", "tools", "kernels", "benchmarks")
            for path in (ROOT / room).rglob("*.py")
        ),
    ]:
        if str(path.relative_to(ROOT)) in _OWN:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [
                f"{path}:{number}: {line.strip()}"
                for reader, safe in _READERS.items()
                if re.search(reader, line) and not re.search(safe, line)
            ]
    assert not found, "\n".join(found)
