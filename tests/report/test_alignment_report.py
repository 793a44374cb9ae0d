"""Laws of the alignment report: its shares are those of the documents that the trainer reads, and its page
stands alone.
"""

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_parts import Page
from small_fusion import SOURCES
from small_tokenizers import hugging_face

from megatron_fuse.alignment import MATCHES
from megatron_fuse.capture import CAPTURED, CAPTURES, capture_shard
from megatron_fuse.dataset import FusionDataset
from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.recipe import MODES, Recipe
from megatron_fuse.report.alignment import alignment_report, alignment_text, write_alignment_report
from megatron_fuse.report.alignment.numbers import (
    LONGEST,
    TEXT_CLASSES,
    Labels,
    Tally,
    text_classes,
    unmatched_spans,
)
from megatron_fuse.report.alignment.page import alignment_page
from megatron_fuse.stages import Context
from megatron_fuse.tokenization.hugging_face import wrap_hugging_face


@pytest.fixture(scope="module")
def report(world: Recipe) -> dict:
    return alignment_report(Context(world))


def teacher(report: dict, source: str, mode: str) -> dict:
    return next(t for t in report["teachers"] if (t["source"], t["mode"]) == (source, mode))


def captured_examples(recipe: Recipe, source: str, mode: str) -> np.ndarray:
    capture = Context(recipe).open(CAPTURES, source, mode)
    shards = [capture_shard(capture, index) for index in range(capture.manifest["shards"])]
    return np.concatenate([shard.status == CAPTURED for shard in shards])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", SOURCES)
def test_shares_are_those_of_the_documents(world: Recipe, report: dict, source: str, mode: str) -> None:
    dataset, found = FusionDataset(world), teacher(report, source, mode)
    classes = text_classes(load_format(world.target, "target"))
    read = captured_examples(world, source, mode)
    rows = []  # (class, match, mass)
    for number in np.flatnonzero(read):
        document = dataset.document(mode, int(number), source)
        labels = document.tokens[document.supervised].astype(int)
        bounds = np.cumsum([0, *document.counts.tolist()])
        probabilities = np.exp(document.teacher_logprobs.astype(np.float64))
        rows += [
            (
                TEXT_CLASSES[classes[label]],
                MATCHES[document.match[row]],
                probabilities[slice(*bounds[row : row + 2])].sum(),
            )
            for row, label in enumerate(labels)
        ]
    assert found["examples"]["all"] == len(dataset.example_ids)
    assert found["examples"]["read"] == read.sum()
    assert set(found["rows"]) == {"all"} | {name for name, _, _ in rows}
    for name, shares in found["rows"].items():
        chosen = [row for row in rows if name in ("all", row[0])]
        assert shares["rows"] == len(chosen)
        assert sum(shares[match] for match in MATCHES) == pytest.approx(1)
        for match in MATCHES:
            assert shares[match] == pytest.approx(sum(row[1] == match for row in chosen) / len(chosen))
        kept = [mass for _, match, mass in chosen if match == "exact"]
        assert shares["mass"] == (pytest.approx(np.mean(kept)) if kept else None)


def test_a_source_with_the_targets_tokenizer_loses_nothing(report: dict) -> None:
    for mode in MODES:
        found = teacher(report, "alpha", mode)
        assert found["rows"]["all"]["exact"] > 0.99
        assert found["examples"]["whole"] == 1
        # A letter and its byte token are one text, and the map takes one of them.
        assert found["vocabulary"]["exact"] > 0.97
        assert found["label_mass"] == 0
        # Rounding down and padded columns of the logits, which no tokenizer knows, are all that mass is lost
        # to.
        assert found["rows"]["all"]["mass"] == pytest.approx(found["captured"]["mass"], abs=0.1)


def test_captured_mass_is_that_of_the_captures(world: Recipe, report: dict) -> None:
    for source in SOURCES:
        capture = Context(world).open(CAPTURES, source, "training")
        shards = [capture_shard(capture, index) for index in range(capture.manifest["shards"])]
        mass = sum(np.exp(shard.logprobs(1, 2.0)).sum() for shard in shards)
        found = teacher(report, source, "training")["captured"]
        assert found["rows"] == sum(len(shard.counts) for shard in shards)
        assert found["mass"] == pytest.approx(mass / found["rows"], rel=1e-5)
        assert 0 < found["exact_mass"] <= 1


CLASSES = {
    "Latin letters": ["the", " the", "été", "ß", "\n\nYes", "Łódź"],
    "digits": ["1", " 12", "٣"],
    "white space": [" ", "\n\n", "\t  ", "\u3000"],
    "punctuation and other": [",", " (", "<|", "🙂", "…", "€", "_a"],
    "non-Latin text": ["日本", " слово", "ا", b"\xe6", b"\x97\xa5"],
}


def test_text_classes_of_tokens() -> None:
    pieces = [(name, piece) for name, pieces in CLASSES.items() for piece in pieces]
    data = [piece if isinstance(piece, bytes) else piece.encode() for _, piece in pieces]

    tokenizer = SimpleNamespace(token_bytes=[*data, b"</s>"])  # all that a class depends on
    found = [
        TEXT_CLASSES[code] for code in text_classes(SimpleNamespace(tokenizer=tokenizer, stop_id=len(data)))
    ]
    assert found == [*(name for name, _ in pieces), "end of turn"]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 5)), max_size=40))
def test_unmatched_spans_are_the_longest_different_runs_within_an_example(
    rows: list[tuple[int, bool, int]],
) -> None:
    tokenizer = wrap_hugging_face(hugging_face("byte_level"), "small")
    words = [
        tokenizer.encode_continuation(text)[0]
        for text in ("a", " the", "1", "internationalization", "\n", "日")
    ]
    rows = sorted(rows, key=lambda row: row[0])
    labels = Labels(
        example=np.array([row[0] for row in rows], np.int64),
        tokens=np.array([words[row[2]] for row in rows], np.int64),
        match=np.array([MATCHES.index("skip" if row[1] else "exact") for row in rows], np.uint8),
        mass=np.zeros(len(rows)),
    )
    expected: set[tuple[str, int]] = set()
    run: list[int] = []
    for place, (example, skipped, word) in enumerate(rows):
        run += [words[word]] if skipped else []
        following = rows[place + 1] if place + 1 < len(rows) else (-1, False, 0)
        if skipped and (following[0] != example or not following[1]):
            expected.add((tokenizer.joined_bytes(run).decode(errors="backslashreplace"), len(run)))
            run = []
    texts = {text for text, _ in expected}
    found = unmatched_spans(labels, tokenizer, ["e0", "e1", "e2", "e3"])
    assert len(found) == len({span["text"] for span in found}) == min(len(texts), LONGEST)
    assert [span["bytes"] for span in found] == sorted((span["bytes"] for span in found), reverse=True)
    assert {(span["text"], span["tokens"]) for span in found} <= expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=30), st.integers(0, 30))
def test_tallies_of_parts_add_up_to_the_tally_of_the_whole(rows: list[tuple[int, int]], cut: int) -> None:
    classes = np.arange(len(TEXT_CLASSES), dtype=np.uint8)

    def tally(part: list[tuple[int, int]]) -> Tally:
        tokens, match = (np.array([row[i] for row in part], np.int64) for i in (0, 1))
        return Tally.of(
            Labels(np.zeros(len(part), np.int64), tokens, match.astype(np.uint8), tokens / 8), classes
        )

    whole, parts = tally(rows), Tally.none() + tally(rows[:cut]) + tally(rows[cut:])
    assert whole.rows.tolist() == parts.rows.tolist()
    assert whole.shares() == parts.shares()  # eighths add up without rounding


def test_the_page_stands_alone_and_escapes_what_the_data_says(report: dict) -> None:
    hostile = "<script>alert('&\"')</script> https://example.org/a.js"
    span = {"example": hostile, "tokens": 3, "bytes": 9, "text": hostile}
    first, *others = report["teachers"]
    page = alignment_page(
        {**report, "teachers": [{**first, "longest_unmatched": [span]}, *others]}, b"\x89PNG"
    )
    parts = Page(page)
    assert "script" not in parts.tags and "link" not in parts.tags
    assert parts.text.count(hostile) == 2
    assert [link[:22] for link in parts.links] == ["data:image/png;base64,"]
    assert parts.unclosed == 0
    for found in report["teachers"]:
        assert f"{found['source']}, {found['mode']} mode" in parts.text


def test_the_command_prints_a_table_and_writes_three_files(
    world: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "report.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "alignment", str(fusion_directory(world))])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    assert ended.value.code == 0
    directory = world.workdir / "reports" / "alignment" / fusion_directory(world).name
    assert sorted(path.name for path in directory.iterdir()) == [
        "alignment.html",
        "alignment.json",
        "alignment.png",
    ]
    report = json.loads((directory / "alignment.json").read_text())
    assert report == alignment_report(Context(world))
    assert (directory / "alignment.png").read_bytes().startswith(b"\x89PNG\r\n")
    output = capsys.readouterr().out
    assert alignment_text(report) in output
    assert "\x1b" not in output  # no colours into a file
    for found in report["teachers"]:
        share = f"{100 * found['rows']['all']['exact']:.1f} %"
        assert re.search(rf"all +{found['rows']['all']['rows']:,} +{share}", output)


def test_the_same_data_give_the_same_files(world: Recipe) -> None:
    directory = world.workdir / "reports" / "alignment" / fusion_directory(world).name
    files = []
    for _ in range(2):
        write_alignment_report(Context(world))
        files.append({path.name: path.read_bytes() for path in directory.iterdir()})
    assert files[0] == files[1]
