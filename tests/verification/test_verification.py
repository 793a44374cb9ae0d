"""Laws of `inspect_data.py --verify`: whole fusion data is found whole, and everything that is damaged is
named.
"""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_fusion import SOURCES, own_up

from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.recipe import Recipe
from megatron_fuse.selection.array_file import read_arrays, write_arrays
from megatron_fuse.selection.choice import selection_path
from megatron_fuse.stages import Context
from megatron_fuse.storage import read_sealed, write_sealed
from megatron_fuse.verification import Verification, verify_fusion_data

TEACHER = "teachers/beta/training"
ANSWERS = "teachers/beta/inference"


def verified(recipe: Recipe) -> Verification:
    return verify_fusion_data(Context(recipe))


def change(path: Path, dtype: type, edit: Callable[[np.ndarray], object]) -> None:
    """Edits the values of a stream's file in place and owns up to it."""
    values = np.fromfile(path, dtype)
    edit(values)
    values.tofile(path)
    own_up(path)


def row_with_entries(recipe: Recipe, directory: str, least: int) -> int:
    """First entry of the first row of a teacher's first shard that has so many entries."""
    counts = np.fromfile(fusion_directory(recipe) / directory / "shard-00000.counts.bin", np.uint8)
    row = int(np.argmax(counts >= least))
    assert counts[row] >= least
    return int(counts[:row].sum())


def test_whole_fusion_data_is_found_whole(world: Recipe) -> None:
    found = verified(world)
    assert found.problems == []
    dataset = FusionDataset(world)
    documents = [
        dataset.document(mode, number, source)
        for mode in ("training", "inference")
        for source in SOURCES
        for number in range(len(dataset.example_ids))
    ]
    assert found.counts["rows"] == sum(len(document.counts) for document in documents)
    assert found.counts["entries"] == sum(len(document.teacher_ids) for document in documents)
    # Instructions, responses, scores, captures, text, rows.
    assert found.counts["artifacts"] == 1 + 3 + 3 * 2 + 6 + 1 + 6


def test_what_is_not_there_but_need_not_be_is_no_problem(copied: Recipe) -> None:
    """A machine that trains has the fusion directory alone."""
    for name in ("instructions", "responses", "scores", "captures"):
        shutil.rmtree(copied.workdir / name)
    assert verified(copied).problems == []


@pytest.mark.parametrize("seed", range(6))
def test_one_bit_flipped_anywhere_is_found(copied: Recipe, seed: int) -> None:
    draw = np.random.default_rng(seed)
    manifests = sorted(copied.workdir.rglob("manifest.json"))
    directory = manifests[draw.integers(len(manifests))].parent
    names = sorted(json.loads((directory / "manifest.json").read_text())["files"])
    path = directory / names[draw.integers(len(names))]
    data = bytearray(path.read_bytes())
    data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
    path.write_bytes(data)
    problems = verified(copied).problems
    assert any(f"{path}: the sha256" in problem and "Restore the file" in problem for problem in problems), (
        seed,
        path,
        problems,
    )


def too_many(values: np.ndarray) -> None:
    values[0] = 200


def skip_first(values: np.ndarray) -> None:
    values[np.argmax(values != 0)] = 0


# (file, type on disk, what is done to the values, what has to be said): all with the manifest's consent
DAMAGES = {
    "token id": (
        "text/shard-00001.tokens.bin",
        np.uint16,
        lambda v: v.put(2, 60000),
        "token 2: id 60000, but the target",
    ),
    "mark": (
        "text/shard-00001.supervised.bin",
        np.uint8,
        lambda v: v.put(5, 2),
        "token 5: the mark is 2, not 0 or 1",
    ),
    "first label": (
        "text/shard-00000.supervised.bin",
        np.uint8,
        lambda v: v.put(0, 1),
        "its first token is a label",
    ),
    "label lost": (
        "text/shard-00000.supervised.bin",
        np.uint8,
        lambda v: v.put(np.argmax(v), 0),
        r"example 'e0': (\d+) labels, but \d+ are listed",
    ),
    "entry id": (
        f"{TEACHER}/shard-00000.entry_ids.bin",
        np.uint16,
        lambda v: v.put(0, 65535),
        "id 65535, but the target",
    ),
    "own answer's id": (
        f"{ANSWERS}/shard-00000.tokens.bin",
        np.uint16,
        lambda v: v.put(0, 65535),
        "token 0: id 65535",
    ),
    "NaN": (
        f"{TEACHER}/shard-00000.entry_logprobs.bin",
        np.uint16,
        lambda v: v.put(0, 0x7E01),
        "is nan, not a finite",
    ),
    "infinity": (
        f"{TEACHER}/shard-00000.entry_logprobs.bin",
        np.uint16,
        lambda v: v.put(0, 0xFC00),
        "is -inf, not a",
    ),
    "positive": (
        f"{TEACHER}/shard-00000.entry_logprobs.bin",
        np.uint16,
        lambda v: v.put(0, 0x3C00),
        "is 1.0, not a",
    ),
    "count": (
        f"{TEACHER}/shard-00000.counts.bin",
        np.uint8,
        too_many,
        "row 0: 200 entries, but at most 11 are possible",
    ),
    "count and entries": (f"{TEACHER}/shard-00000.counts.bin", np.uint8, skip_first, "the counts add up to"),
    "match": (
        f"{TEACHER}/shard-00000.match.bin",
        np.uint8,
        lambda v: v.put(0, 9),
        "row 0: code 9, but the known codes are 0 to 3",
    ),
    "skipped": (f"{TEACHER}/shard-00000.match.bin", np.uint8, skip_first, "entries in a row that is skipped"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_impossible_values_are_named_though_the_checksums_fit(copied: Recipe, damage: str) -> None:
    name, dtype, edit, said = DAMAGES[damage]
    path = fusion_directory(copied) / name
    change(path, dtype, edit)
    problems = verified(copied).problems
    assert not any("sha256" in problem for problem in problems)
    expect(problems, f"{path.parent}.*{said}.*[Rr]emove {path.parent}")


def expect(problems: list[str], pattern: str) -> None:
    assert any(re.search(pattern, problem) for problem in problems), f"{pattern!r} is not in {problems}"


def test_an_id_twice_in_a_row_and_a_mass_above_one_are_named(copied: Recipe) -> None:
    prefix = fusion_directory(copied) / TEACHER / "shard-00000"
    entry = row_with_entries(copied, TEACHER, 2)
    change(Path(f"{prefix}.entry_ids.bin"), np.uint16, lambda ids: ids.put(entry + 1, ids[entry]))
    # -0.0.
    change(Path(f"{prefix}.entry_logprobs.bin"), np.uint16, lambda half: half.put([entry, entry + 1], 0x8000))
    problems = verified(copied).problems
    expect(problems, r"entry_ids.bin: example 'e\d+', row \d+: id \d+ is twice in the row")
    expect(problems, r"entry_logprobs.bin: example 'e\d+', row \d+: the mass is 2\.\d+, more than 1")


def test_an_index_that_megatron_would_read_otherwise_is_named(copied: Recipe) -> None:
    path = fusion_directory(copied) / TEACHER / "shard-00000.counts.idx"
    data = bytearray(path.read_bytes())
    data[-17] ^= 1  # within the document bounds, which follow from the lengths
    path.write_bytes(data)
    own_up(path)
    expect(
        verified(copied).problems,
        "shard-00000.counts.idx: the lengths, offsets and bounds contradict each other",
    )


def test_data_of_another_making_is_named(world: Recipe, copied: Recipe) -> None:
    def other(section: str, **values: object) -> Recipe:
        return world.model_copy(update={section: getattr(world, section).model_copy(update=values)})

    gamma = other("target", model=str(world.sources["gamma"].model))
    expect(
        verified(gamma).problems,
        r"text/manifest.json: inputs.target tokenizer is \w+..., but the recipe has \w+\.",
    )
    expect(verified(other("target", chat_template="alpaca")).problems, "inputs.target chat format is")
    expect(
        verified(other("training", seq_length=90)).problems,
        "options.seq_length is 200, but the recipe has 90",
    )
    fusion = fusion_directory(copied)
    for name, section, key, value in (
        ("text", "options", "supervise", "nothing"),
        (TEACHER, "options", "temperature", 3.0),
        (TEACHER, "options", "vocabulary_map", "em"),
        (ANSWERS, "inputs", "capture", "0" * 64),
    ):
        manifest = read_sealed(fusion / name / "manifest.json")
        manifest[section][key] = value
        write_sealed(fusion / name / "manifest.json", manifest)
    problems = verified(copied).problems
    expect(problems, "text/manifest.json: options.supervise is 'nothing', but the recipe has 'every_turn'")
    expect(problems, f"{TEACHER}/manifest.json: options.temperature is 3.0, but the recipe has 2.0")
    expect(problems, f"{TEACHER}/manifest.json: options.vocabulary_map is 'em', but the recipe has 'exact'")
    expect(problems, f"{ANSWERS}/manifest.json: inputs.capture is 0000.*captures/beta/inference is \\w+")
    # Its manifest is another now.
    expect(problems, f"{TEACHER}/manifest.json: inputs.text is .*fusion/.*/text is ")


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_choice_that_the_facts_do_not_lead_to_is_named(copied: Recipe, mode: str) -> None:
    path = selection_path(copied, mode)
    arrays, basis = read_arrays(path, "")
    arrays["source"][3] = (arrays["source"][3] + 1) % len(SOURCES)
    arrays["source"][5] = 7
    arrays["ce_sum" if mode == "training" else "scores"][2] += 1
    arrays["margin"][6], arrays["weight"][7] = -3, 0.125
    write_arrays(path, arrays, basis)
    problems = verified(copied).problems
    expect(problems, rf"{path.name}: example 'e\d+': the source is 7, but the recipe has 3")
    expect(
        problems,
        rf"{path.name}: example 'e\d+': source is \d, "
        r"but the sources' examples give \d \(2 examples differ\)",
    )
    expect(
        problems,
        rf"{path.name}: example 'e2': (ce_sum|scores) is \[.*\], but the sources' examples give .*1 examples "
        r"differ",
    )
    expect(problems, rf"{path.name}: example 'e6': margin is -3\.0, but the sources' examples give")
    expect(
        problems,
        rf"{path.name}: example 'e7': weight is 0\.125, but the sources' examples give 1\.0 \(1 examples "
        r"differ\)",
    )
    build_fusion_data(Context(copied))
    assert verified(copied).problems == []


def test_a_choice_can_be_verified_where_the_scores_are_gone(copied: Recipe) -> None:
    shutil.rmtree(copied.workdir / "scores")
    assert verified(copied).problems == []
    path = selection_path(copied, "inference")
    arrays, basis = read_arrays(path, "")
    write_arrays(path, {name: array for name, array in arrays.items() if name != "scores"}, basis)
    expect(verified(copied).problems, rf"{path.name}: the scores behind this choice are missing")


def test_missing_and_broken_files_are_all_named_at_once(copied: Recipe) -> None:
    fusion = fusion_directory(copied)
    (fusion / TEACHER / "shard-00001.match.idx").unlink()
    (fusion / "text" / "shard-00002.examples.jsonl").write_text("{")
    own_up(fusion / "text" / "shard-00002.examples.jsonl")
    (fusion / ANSWERS / "shard-00000.examples.safetensors").write_bytes(b"{}")
    (fusion / "teachers/gamma/training/manifest.json").unlink()
    (copied.workdir / "captures/alpha/training/shard-00000.safetensors").write_bytes(b"")
    problems = verified(copied).problems
    expect(problems, r"shard-00001.match.idx: missing\. Restore it")
    expect(problems, r"shard-00002.examples.jsonl: the examples cannot be read")
    expect(
        problems,
        r"beta/inference/shard-00000.examples.safetensors: the values for the selection cannot be read",
    )
    expect(problems, r"teachers/gamma/training: missing or incomplete\. Run megatron-fuse build")
    expect(problems, r"captures/alpha/training/shard-00000.safetensors: 0 bytes instead of")


def test_the_command_ends_with_0_or_lists_every_problem_and_ends_with_2(
    copied: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "inspect_data.py"
    monkeypatch.setattr(sys, "argv", [str(tool), str(fusion_directory(copied)), "--verify"])

    def run() -> int | None:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(tool), run_name="__main__")
        return ended.value.code

    assert run() == 0
    assert "all is well" in capsys.readouterr().out
    for name in ("text/shard-00000.tokens.bin", f"{TEACHER}/shard-00000.counts.bin"):
        (fusion_directory(copied) / name).unlink()
    assert run() == 2
    message = capsys.readouterr().err
    assert "problems:" in message
    for name in ("shard-00000.tokens.bin: missing", "shard-00000.counts.bin: missing"):
        assert name in message
