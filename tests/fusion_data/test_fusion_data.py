"""Laws of fusion data: which rows stand at which tokens, that mass is kept, that a choice is remade
without touching documents.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from log_lines import at_every_shard
from small_fusion import SOURCES

from megatron_fuse.alignment import MATCHES, build_vocabulary_map
from megatron_fuse.capture import CAPTURES, CaptureShard, read_capture_shard
from megatron_fuse.chat import ChatFormat
from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.documents import round_down_to_half
from megatron_fuse.fusion_data.layout import fusion_directory
from megatron_fuse.fusion_data.streams import Stream
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.inspection.documents import format_view, view_document
from megatron_fuse.instructions import INSTRUCTIONS, Example, load_examples
from megatron_fuse.recipe import MODES, Margin, Recipe
from megatron_fuse.recipe.lookup import source_options
from megatron_fuse.responses import RESPONSES, Response, response_shards
from megatron_fuse.scoring.reference_scores import score_against_reference
from megatron_fuse.selection.array_file import read_arrays, write_arrays
from megatron_fuse.selection.choice import selection_path
from megatron_fuse.stages import Context
from megatron_fuse.tokenization.spans import SpanFlag
from megatron_fuse.training.batches import MicroBatch, micro_batches, plan_batch
from megatron_fuse.verification import verify_fusion_data


def changed(recipe: Recipe, **sections: object) -> Recipe:
    return recipe.model_copy(
        update={
            name: value if name == "sources" else getattr(recipe, name).model_copy(update=value)
            for name, value in sections.items()
        }
    )


def texts(recipe: Recipe, source: str, mode: str) -> list[tuple[Example, str, bool]]:
    """(example, response, whether it has an end)"""
    examples = load_examples(Context(recipe).open(INSTRUCTIONS))
    if mode == "training":
        return [(example, example.response, not example.truncated) for example in examples]
    answers: list[Response] = [
        a for shard in response_shards(Context(recipe).open(RESPONSES, source)) for a in shard
    ]
    return [(example, a.response, not a.truncated) for example, a in zip(examples, answers, strict=True)]


def captured(recipe: Recipe, source: str, mode: str) -> list[tuple[CaptureShard, int]]:
    shards = [
        read_capture_shard(path)
        for path in Context(recipe).open(CAPTURES, source, mode).files(".safetensors")
    ]
    return [(shard, index) for shard in shards for index in range(len(shard.status))]


def target_format(recipe: Recipe) -> ChatFormat:
    return load_format(recipe.target, "target")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", SOURCES)
def test_documents_are_the_conversation_in_the_targets_tokens(world: Recipe, source: str, mode: str) -> None:
    target, dataset = target_format(world), FusionDataset(world)
    for number, (example, text, stop) in enumerate(texts(world, source, mode)):
        document = dataset.document(mode, number, source)
        if not text.strip():
            assert len(document.tokens) == len(document.supervised) == len(document.counts) == 0
            continue
        messages, every_turn = example.prompt(target.system), mode == "training"
        encoded = target.encode_conversation(messages, text, stop=stop, every_turn=every_turn)
        assert document.tokens.tolist() == encoded.ids.tolist()
        assert document.supervised.tolist() == encoded.supervised.tolist()
        assert (document.tokens[-1] == target.stop_id) == stop
        assert len(document.counts) == len(document.match) == document.supervised.sum()
        assert len(document.teacher_ids) == len(document.teacher_logprobs) == document.counts.sum()
        assert document.counts.max(initial=0) <= dataset.entries_per_row
        # As stored: a vocabulary below 65536.
        assert document.tokens.dtype == document.teacher_ids.dtype == np.uint16
        assert document.teacher_logprobs.dtype == np.float16
        assert document.supervised.dtype == bool


@pytest.mark.parametrize("mode", MODES)
def test_a_source_with_the_targets_tokenizer_gives_its_own_rows_back(world: Recipe, mode: str) -> None:
    """Id for id and in the same order, but for padded columns of the logits, which no tokenizer knows."""
    dataset, rows = FusionDataset(world), 0
    vocab_size = target_format(world).tokenizer.vocab_size
    for number, (shard, index) in enumerate(captured(world, "alpha", mode)):
        document = dataset.document(mode, number, "alpha")
        span = shard.rows(index)
        if span.start == span.stop:
            continue
        entries = slice(int(shard.counts[: span.start].sum()), int(shard.counts[: span.stop].sum()))
        ids, logprobs = shard.entry_ids[entries], shard.logprobs(1, 2.0)[entries]
        row, known = np.repeat(np.arange(span.stop - span.start), shard.counts[span]), ids < vocab_size
        assert document.teacher_ids.tolist() == ids[known].tolist()
        assert document.teacher_logprobs.tolist() == round_down_to_half(logprobs[known]).tolist()
        assert document.counts.tolist() == np.bincount(row[known], minlength=len(document.counts)).tolist()
        assert {MATCHES[code] for code in document.match[document.counts > 0]} == {"exact"}
        rows += len(document.counts)
    assert rows > 100


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["beta", "gamma"])
def test_rows_of_another_tokenizer_stand_where_both_have_read_the_same_bytes(
    world: Recipe, source: str, mode: str
) -> None:
    """Every row against the rule in words; the vocabulary map itself has its own tests."""
    dataset, target = FusionDataset(world), target_format(world)
    chat = load_format(source_options(world, source), source)
    separators = {"source_separator": chat.separator, "target_separator": target.separator}
    stops = {"source_stop": chat.stop_id, "target_stop": target.stop_id}
    mapping = build_vocabulary_map(chat.tokenizer, target.tokenizer, **stops, **separators).table()
    seen = Counter()
    for number, ((example, text, stop), (shard, index)) in enumerate(
        zip(texts(world, source, mode), captured(world, source, mode), strict=True)
    ):
        if not text.strip():
            continue
        document = dataset.document(mode, number, source)
        encoded = target.encode_conversation(example.prompt(target.system), text, stop=stop)
        starts, total = encoded.spans.starts.tolist(), len(text.encode())
        span = shard.rows(index)
        source_starts = shard.starts[span].tolist()
        source_leads = (shard.flags[span] & SpanFlag.LEADING) != 0
        bounds = np.concatenate([[0], np.cumsum(document.counts, dtype=np.int64)])
        source_bounds = np.concatenate([[0], np.cumsum(shard.counts, dtype=np.int64)])
        logprobs, labels = shard.logprobs(1, 2.0), document.tokens[document.supervised]
        for row, start in enumerate(starts):
            own = slice(bounds[row], bounds[row + 1])
            ids, found = (
                document.teacher_ids[own].tolist(),
                np.exp(document.teacher_logprobs[own].astype(np.float64)),
            )
            assert found.sum() <= 1
            if start not in source_starts:
                assert (document.counts[row], MATCHES[document.match[row]]) == (0, "skip")
                seen["skip"] += 1
                continue
            if starts.count(start) > 1 or source_starts.count(start) > 1:
                continue  # tokens inside the template's white space: see the tests of align_boundaries
            first = source_starts.index(start)
            end = starts[row + 1] if row + 1 < len(starts) else total
            ends = [*source_starts[1:], total]
            if start < total and ends[first] < end:
                # The label goes on after the first source token. Where it ends with one: at least the chain
                # of them.
                if end in ends:
                    pieces = np.arange(first, ends.index(end) + 1) + span.start
                    token, lse = shard.token_logprobs[pieces[0]], shard.lse[pieces[0]]
                    chain = (token + lse[0]) / 2.0 - lse[1] + shard.token_logprobs[pieces[1:]].sum()
                    given = float(dict(zip(ids, found, strict=True)).get(int(labels[row]), 0))
                    assert given >= np.exp(chain) * (1 - 2**-7) - 1e-6, f"{example.id}, row {row}"
                    seen["chain"] += 1
                continue
            state = 2 * source_leads[first] + encoded.spans.has(SpanFlag.LEADING)[row]
            expected: dict[int, float] = defaultdict(float)
            entries = slice(source_bounds[span.start + first], source_bounds[span.start + first + 1])
            for token, logprob in zip(shard.entry_ids[entries], logprobs[entries], strict=True):
                if token < chat.tokenizer.vocab_size and mapping[state, token] >= 0:
                    expected[int(mapping[state, token])] += float(np.exp(logprob))
            assert dict(zip(ids, found, strict=True)) == pytest.approx(expected, abs=4e-4), (
                f"{example.id}, row {row}"
            )
            assert MATCHES[document.match[row]] == ("exact" if expected else "skip")
            seen["exact"] += 1
            seen["stop"] += start == total
    assert seen["exact"] > 50
    assert seen["stop"] > 3
    assert seen["chain"] > (20 if source == "beta" else 0)  # beta's tokens are short
    assert seen["skip"] > 0 or source == "beta"


def test_selected_documents_and_their_lengths(world: Recipe) -> None:
    dataset = FusionDataset(world)
    examples = load_examples(Context(world).open(INSTRUCTIONS))
    assert dataset.example_ids == [example.id for example in examples]
    assert dataset.validation.tolist() == [n for n, example in enumerate(examples) if example.is_validation]
    assert sorted([*dataset.train, *dataset.validation]) == list(range(len(examples)))
    assert len(dataset.validation) == 3
    winners = set()
    for mode in MODES:
        for number in range(len(examples)):
            document = dataset.document(mode, number)
            assert dataset.lengths(mode)[number] == len(document.tokens)
            assert dataset.supervised_tokens(mode)[number] == document.supervised.sum()
            winner = dataset.selected_source(mode, number)
            winners.add((mode, winner))
            if winner is not None:
                again = dataset.document(mode, number, winner)
                assert document.teacher_ids.tolist() == again.teacher_ids.tolist()
    assert len({winner for mode, winner in winners if mode == "inference"} - {None}) == 3, (
        "every source should win some"
    )
    with pytest.raises(UserError, match=r"no training document of source 'delta': .*alpha.*beta.*gamma"):
        dataset.document("training", 0, "delta")


def test_min_ce_selects_what_the_captures_say(world: Recipe) -> None:
    dataset = FusionDataset(world)
    ce = np.array(
        [[shard.ce_sum[index] for shard, index in captured(world, source, "training")] for source in SOURCES]
    )
    assert [dataset.selected_source("training", n) for n in range(ce.shape[1])] == [
        SOURCES[i] for i in ce.argmin(0)
    ]


def test_empty_answers_never_win_and_nobody_wins_where_all_are_empty(copied: Recipe) -> None:
    dataset = FusionDataset(copied)
    empty = np.array(
        [[not text.strip() for _, text, _ in texts(copied, source, "inference")] for source in SOURCES]
    )
    assert empty.any()
    for number in range(empty.shape[1]):
        winner = dataset.selected_source("inference", number)
        assert winner is not None
        assert not empty[SOURCES.index(winner), number]
    alone = changed(copied, sources={"beta": copied.sources["beta"]})
    build_fusion_data(Context(alone))
    dataset = FusionDataset(alone)
    lost = np.flatnonzero(empty[1])
    assert [dataset.selected_source("inference", int(n)) for n in lost] == [None] * len(lost)
    assert (dataset.lengths("inference")[lost] == 0).all()
    assert len(dataset.document("inference", int(lost[0])).tokens) == 0
    with pytest.raises(UserError, match="no source's answer was selected"):
        view_document(alone, dataset, "inference", int(lost[0]))


def files_of(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in directory.rglob("*")
        if path.is_file()
        and "selection" not in path.parts
        and path.name not in ("recipe.yaml", "curriculum-shuffled.safetensors")
    }


def test_another_choice_of_sources_or_rules_rebuilds_no_document(copied: Recipe) -> None:
    two = changed(copied, sources={name: copied.sources[name] for name in ("beta", "alpha")})
    before, three = files_of(fusion_directory(copied)), FusionDataset(copied)
    with pytest.raises(UserError, match=r"does not exist, but must hold .*'sources': \['beta', 'alpha'\]"):
        FusionDataset(two)
    build_fusion_data(Context(two))
    assert files_of(fusion_directory(copied)) == before
    assert {FusionDataset(two).selected_source("training", n) for n in range(13)} <= {"alpha", "beta"}
    assert FusionDataset(two).sha256 != three.sha256
    build_fusion_data(Context(copied))
    assert files_of(fusion_directory(copied)) == before
    assert FusionDataset(copied).sha256 == three.sha256
    strong = changed(copied, selection={"strongest": "two"})
    with pytest.raises(UserError, match=r"does not exist, but must hold .*'strongest': 'two'"):
        FusionDataset(strong)


def test_only_the_reward_models_that_the_recipe_names_decide(copied: Recipe) -> None:
    both = FusionDataset(copied).selections["inference"].arrays
    alone = changed(copied, selection={"reward_models": ["two"]})
    with pytest.raises(UserError, match=r"does not exist, but must hold .*'judges': \['two'\]"):
        FusionDataset(alone)
    build_fusion_data(Context(alone))
    found = FusionDataset(alone).selections["inference"].arrays
    np.testing.assert_array_equal(found["scores"], both["scores"][..., 1:])
    scores = np.where(found["available"] == 1, found["scores"][..., 0], -np.inf)
    said = list(
        zip(*([text for _, text, _ in texts(copied, source, "inference")] for source in SOURCES), strict=True)
    )
    for number, place in enumerate(found["source"]):  # identical texts have the best of their scores
        of_winner = [scores[number, s] for s, text in enumerate(said[number]) if text == said[number][place]]
        assert max(of_winner) == scores[number].max()


def test_the_answer_nearest_to_the_ground_truth_wins_by_reference(copied: Recipe) -> None:
    by_reference = changed(copied, selection={"inference": "reference"})
    with pytest.raises(UserError, match=r"no reference.bertscore_model"):
        build_fusion_data(Context(by_reference))
    by_reference = changed(by_reference, reference={"without_bertscore": "renormalize"})
    with pytest.raises(UserError, match=r"scores/alpha/reference.*Run megatron-fuse score"):
        build_fusion_data(Context(by_reference))
    score_against_reference(Context(by_reference))
    build_fusion_data(Context(by_reference))
    dataset = FusionDataset(by_reference)
    examples = load_examples(Context(copied).open(INSTRUCTIONS))
    answers = [[text for _, text, _ in texts(copied, source, "inference")] for source in SOURCES]
    arrays, exact = dataset.selections["inference"].arrays, 0
    np.testing.assert_allclose(arrays["score"], arrays["reference"][..., :2].mean(2), rtol=1e-6)
    for number, example in enumerate(examples):
        place, said = int(arrays["source"][number]), [of_source[number] for of_source in answers]
        assert arrays["score"][number, place] == np.nanmax(arrays["score"][number])
        if example.response in said:  # nothing is nearer than the truth itself
            assert said[place] == example.response
            exact += 1
    assert exact > 5
    assert verify_fusion_data(Context(by_reference)).problems == []
    heavier = changed(by_reference, reference={"bleu": 0.75})
    with pytest.raises(UserError, match=r"does not exist, but must hold .*'measures': \{'bleu': 0.75"):
        FusionDataset(heavier)


def all_batches(dataset: FusionDataset, weights: dict[str, tuple[float, float]]) -> list[MicroBatch]:
    """The whole dataset as one step, a document per micro-batch."""
    ranks = {"data_parallel_size": 1}
    batch = plan_batch(dataset, np.arange(len(dataset.example_ids)), weights, micro_batch_size=1, **ranks)
    rank = {"data_parallel_rank": 0, "with_targets": True, "device": torch.device("cpu")}
    return list(micro_batches(dataset, batch, **ranks, **rank))


def assert_equal_to_the_last_bit(found: list[MicroBatch], expected: list[MicroBatch]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in ((vars(ours), vars(theirs)), (vars(ours.targets), vars(theirs.targets))):
            for name, value in b.items():
                assert not isinstance(value, torch.Tensor) or torch.equal(a[name], value), name


@pytest.mark.parametrize("mode", MODES)
def test_an_example_below_its_margin_is_one_that_no_source_has_won(copied: Recipe, mode: str) -> None:
    weights = {"inference": (0.1, 0.05), "training": (1.0, 0.5)}
    before = FusionDataset(copied)
    margin = before.selections[mode].arrays["margin"]
    at_least = float(np.median(margin[np.isfinite(margin)])) + 1e-6
    path = selection_path(copied, mode)
    arrays, basis = read_arrays(path, "")
    dropped = margin < at_least
    assert 2 < dropped.sum() < len(margin) - 2, "the case tells nothing"
    write_arrays(path, {**arrays, "source": np.where(dropped, -1, arrays["source"]).astype(np.int16)}, basis)
    expected = all_batches(FusionDataset(copied), weights)

    strict = changed(copied, selection={f"{mode}_margin": Margin(at_least=at_least)})
    with pytest.raises(UserError, match=r"does not exist, but must hold .*'margin': \{'at_least'"):
        FusionDataset(strict)
    build_fusion_data(Context(strict))
    dataset = FusionDataset(strict)
    assert_equal_to_the_last_bit(all_batches(dataset, weights), expected)
    assert dataset.sha256 != before.sha256
    lost = int(np.flatnonzero(dropped)[0])
    assert dataset.selected_source(mode, lost) is None
    if mode == "inference":
        assert dataset.lengths(mode)[lost] == dataset.supervised_tokens(mode)[lost] == 0
        assert len(expected) == len(all_batches(before, weights)) - dropped.sum()
        with pytest.raises(UserError, match="or its margin is too small"):
            view_document(strict, dataset, mode, lost)
    else:
        assert len(dataset.document(mode, lost).teacher_ids) == 0 < len(dataset.document(mode, lost).tokens)
        assert "weight 0\n" in format_view(view_document(strict, dataset, mode, lost), dataset)

    half = changed(copied, selection={f"{mode}_margin": Margin(at_least=at_least, weight=0.5)})
    build_fusion_data(Context(half))
    dataset = FusionDataset(half)
    np.testing.assert_array_equal(dataset.example_weights(mode), np.where(dropped, 0.5, 1))
    assert dataset.lengths(mode).tolist() == before.lengths(mode).tolist()


def test_a_source_that_joins_later_leaves_the_others_untouched(copied: Recipe) -> None:
    fusion = fusion_directory(copied)
    shutil.rmtree(fusion)
    build_fusion_data(Context(changed(copied, sources={name: copied.sources[name] for name in SOURCES[:2]})))
    before = files_of(fusion)
    build_fusion_data(Context(copied))
    after = files_of(fusion)
    assert {path: after[path] for path in before} == before
    new = {Path(path).relative_to(fusion).parts[:2] for path in set(after) - set(before)}
    assert {part for part in new if part[0] != "maps"} == {("teachers", "gamma")}


def bytes_of(directory: Path) -> dict[Path, bytes]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "recipe.yaml"]
    return {path.relative_to(directory): path.read_bytes() for path in files}


def test_an_interrupted_build_continues_and_ends_with_the_same_bytes(copied: Recipe) -> None:
    fusion = fusion_directory(copied)
    expected = bytes_of(fusion)
    shutil.rmtree(fusion)

    class Stop(Exception):
        pass

    shards = iter(range(100))

    def interrupt(line: str) -> None:
        if next(shards) in (0, 4, 9, 11):
            raise Stop

    for _ in range(4):
        with pytest.raises(Stop), at_every_shard(interrupt):
            build_fusion_data(Context(copied))
    build_fusion_data(Context(copied))
    found = bytes_of(fusion)
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []


def build_on_this_rank(recipe: Recipe) -> dict[str, str]:
    return {mode: selection.sha256 for mode, selection in build_fusion_data(Context(recipe)).items()}


def test_two_ranks_share_the_work_and_end_with_the_same_bytes(copied: Recipe, ranks: Callable) -> None:
    fusion = fusion_directory(copied)
    expected = bytes_of(fusion)
    shutil.rmtree(fusion)
    first, second = ranks(2, build_on_this_rank, copied)
    assert first == second
    found = bytes_of(fusion)
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []


def test_csft_needs_no_source_and_its_text_has_rows_without_entries(copied: Recipe) -> None:
    csft = copied.model_copy(update={"schedule": type(copied.schedule)(preset="csft")})
    for name in ("captures", "scores", "responses", "fusion"):
        shutil.rmtree(copied.workdir / name)
    build_fusion_data(Context(csft))
    dataset = FusionDataset(csft)
    document = dataset.document("training", 0)
    assert dataset.lengths("training")[0] == len(document.tokens) > 0
    assert dataset.supervised_tokens("training")[0] == len(document.counts) == len(document.match)
    assert len(document.teacher_ids) == document.counts.sum() == document.match.sum() == 0
    assert (dataset.lengths("inference") == 0).all()
    assert view_document(csft, dataset, "training", 0)["source"] is None


def test_what_does_not_fit_the_recipe_is_refused(copied: Recipe, world: Recipe) -> None:
    fusion = fusion_directory(copied)
    with pytest.raises(UserError, match=r"was made with inputs.target tokenizer = .* but now"):
        FusionDataset(
            changed(copied, target={"model": str(copied.sources["gamma"].model), "chat_template": None})
        )
    with pytest.raises(UserError, match=r"was made with inputs.target chat format"):
        FusionDataset(changed(copied, target={"chat_template": "alpaca"}))
    with pytest.raises(
        UserError, match=r"was made with options.seq_length = 200, but now options.seq_length = 100"
    ):
        FusionDataset(changed(copied, training={"seq_length": 100}))
    with pytest.raises(
        UserError,
        match=r"was made with options.temperatures = \[2.0\], but now options.temperatures = \[3.0\]",
    ):
        FusionDataset(changed(copied, loss={"teacher_temperature": 3.0}))
    (fusion / "teachers/beta/training/manifest.json").unlink()
    with pytest.raises(UserError, match="beta/training is incomplete\. Run megatron-fuse build"):
        FusionDataset(copied)
    shutil.rmtree(copied.workdir / "captures/gamma/inference")
    with pytest.raises(UserError, match="--source gamma --mode inference"):
        build_fusion_data(Context(copied))
    selection_path(copied, "training").write_bytes(b"{}")
    shutil.copytree(world.workdir / "captures/gamma/inference", copied.workdir / "captures/gamma/inference")
    build_fusion_data(Context(copied))
    FusionDataset(copied)


def test_every_stream_opens_in_megatron(world: Recipe) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefixes = sorted(str(path.with_suffix("")) for path in fusion_directory(world).rglob("*.idx"))
    fields = {prefix.rsplit(".", 1)[1] for prefix in prefixes}
    assert fields == {"tokens", "supervised", "counts", "match", "entry_ids", "entry_logprobs"}
    assert len(prefixes) == 3 * (2 + 3 * 4 + 3 * 6)
    for prefix in prefixes:
        theirs, ours = IndexedDataset(prefix), Stream([prefix])
        assert len(theirs) == len(ours) == 5 or prefix.split("shard-0000")[1][0] == "2"
        assert all(theirs[i].tolist() == ours[i].tolist() for i in range(len(ours)))
