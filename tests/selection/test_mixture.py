"""Several teachers as one: the mixture's rows against sums of dense distributions; a subset of the
sources, and chance.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_fuse.dataset import FusionDataset, build_fusion_data
from megatron_fuse.errors import UserError
from megatron_fuse.fusion_data.documents import Document
from megatron_fuse.recipe import Recipe
from megatron_fuse.selection.mixture import mix
from megatron_fuse.selection.rules import NONE, inverse_ce, random_source
from megatron_fuse.stages import Context

VOCABULARY = 12


def dense(document: Document) -> np.ndarray:
    """[r, VOCABULARY] float64: the mass of every token."""
    rows = np.repeat(np.arange(len(document.counts)), document.counts.astype(int))
    mass = np.zeros((len(document.counts), VOCABULARY))
    np.add.at(mass, (rows, document.teacher_ids), np.exp(document.teacher_logprobs.astype(np.float64)))
    return mass


@st.composite
def teachers(draw: st.DrawFn) -> list[Document]:
    """The rows of two to four teachers over the same few tokens; some rows are empty, some ids occur
    twice.
    """
    labels = draw(st.integers(0, 5))
    tokens, supervised = np.arange(labels + 1, dtype=np.uint16), np.arange(labels + 1) > 0
    documents = []
    for _ in range(draw(st.integers(2, 4))):
        counts = draw(arrays(np.uint8, labels, elements=st.integers(0, 3)))
        entries = int(counts.sum())
        ids = draw(arrays(np.uint16, entries, elements=st.integers(0, VOCABULARY - 1)))
        logprobs = draw(arrays(np.float16, entries, elements=st.floats(-12, -1.125, width=16)))
        documents.append(Document(tokens, supervised, counts, ids, logprobs, np.zeros(labels, np.uint8)))
    return documents


@given(teachers(), st.data())
def test_a_mixture_is_the_weighed_sum_of_those_who_speak(
    documents: list[Document], data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(1e-3, 1)) for _ in documents]
    mixed = mix(documents, weights)
    speaking = np.stack([document.counts > 0 for document in documents]) * np.array(weights)[:, None]
    shares = speaking / np.maximum(speaking.sum(0), 1e-300)
    wanted = sum(share[:, None] * dense(document) for share, document in zip(shares, documents, strict=True))
    found = dense(mixed)
    # Float16 down to -32.
    assert (found <= wanted * (1 + 1e-12)).all() and np.allclose(found, wanted, rtol=1.6e-2, atol=0)
    assert mixed.counts.tolist() == np.sum([document.counts for document in documents], 0, dtype=int).tolist()
    assert mixed.tokens is documents[0].tokens


@settings(max_examples=50)
@given(arrays(np.float64, (6, 3), elements=st.floats(0.01, 50) | st.just(np.nan)), st.data())
def test_weights_are_inverse_cross_entropies_of_those_who_read(ce: np.ndarray, data: st.DataObject) -> None:
    lossy = data.draw(arrays(bool, ce.shape))
    weights = inverse_ce(ce, lossy)
    for row, found, part in zip(ce, weights, lossy, strict=True):
        able = np.isfinite(row) & (~part if (np.isfinite(row) & ~part).any() else True)
        wanted = np.where(able, 1 / np.where(able, row, 1), 0)
        assert np.allclose(found, wanted / max(wanted.sum(), 1e-300), rtol=1e-9)


def test_chance_takes_each_of_the_able_as_often() -> None:
    able = np.tile([[True, False, True], [False, False, False], [True, True, True]], (3000, 1))
    found = random_source(able, (7, 0))
    assert (found == random_source(able, (7, 0))).all() and (found != random_source(able, (8, 0))).any()
    shares = [np.bincount(found[start::3] + 1, minlength=4) / 3000 for start in range(3)]
    assert shares[1].tolist() == [1, 0, 0, 0] and shares[0][2] == shares[0][0] == 0
    assert np.allclose(shares[0][[1, 3]], 1 / 2, atol=0.05) and np.allclose(shares[2][1:], 1 / 3, atol=0.05)


def rebuilt(recipe: Recipe, **selection: object) -> tuple[Recipe, FusionDataset]:
    recipe = recipe.model_copy(update={"selection": recipe.selection.model_copy(update=selection)})
    build_fusion_data(Context(recipe))
    return recipe, FusionDataset(recipe)


def test_rules_stand_side_by_side(copied: Recipe) -> None:
    whole = FusionDataset(copied)
    two, of_two = rebuilt(copied, sources=["beta", "gamma"])
    _, of_chance = rebuilt(copied, training="random", inference="random")
    assert FusionDataset(copied).sha256 == whole.sha256 and FusionDataset(two).sha256 == of_two.sha256
    for mode in ("training", "inference"):
        chosen = of_two.selections[mode].source
        assert set(chosen.tolist()) <= {1, 2, NONE} and (chosen != NONE).any()
        kept = whole.selections[mode].source > 0  # who wins among all wins among fewer
        assert (chosen[kept] == whole.selections[mode].source[kept]).all()
    assert len({whole.sha256, of_two.sha256, of_chance.sha256}) == 3


def test_the_average_of_all_sources_is_read_as_one_teacher(copied: Recipe) -> None:
    recipe, dataset = rebuilt(copied, training="average")
    weights = dataset.selections["training"].arrays["mixture"]
    assert np.allclose(weights.sum(1)[dataset.train], 1)
    for example in dataset.train.tolist():
        parts = [dataset.document("training", example, source) for source in recipe.sources]
        mixed, wanted = dataset.document("training", example), mix(parts, weights[example].tolist())
        for name in vars(wanted):
            assert np.array_equal(getattr(mixed, name), getattr(wanted, name)), name
        assert mixed.counts.max(initial=0) <= dataset.entries_per_row
    assert FusionDataset(copied).sha256 != dataset.sha256


def test_a_mixture_of_too_many_entries_is_refused(copied: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = rebuilt(copied, training="average")
    monkeypatch.setattr("megatron_fuse.dataset.reader.MOST_ENTRIES", 20)
    with pytest.raises(
        UserError,
        match=r"average of 3 sources needs 33 entries per row, but a row holds at most 20\. Name fewer",
    ):
        FusionDataset(recipe)


def test_documents_are_not_changed_by_mixing() -> None:
    one = Document(
        np.arange(2, dtype=np.uint16),
        np.array([False, True]),
        np.array([1], np.uint8),
        np.array([3], np.uint16),
        np.array([-1.0], np.float16),
        np.zeros(1, np.uint8),
    )
    mix([one, replace(one, teacher_ids=np.array([4], np.uint16))], [0.5, 0.5])
    assert one.teacher_logprobs.tolist() == [-1.0]
