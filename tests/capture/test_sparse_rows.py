"""Laws of sparse rows: they say exactly what the dense logits say, and which entries they hold depends on
a row alone.
"""

import numpy as np
import pytest
import torch
from fuse_kernels import topk

from megatron_fuse.capture.distributions import NotFiniteError, SparseRows, sparse_rows


def kept_by_definition(z: np.ndarray, top_k: int, top_p: float, filter: str, temperature: float) -> list[int]:
    """Ids that the filter keeps of one row of float64 logits; equal logits stand in the order of their
    ids.
    """
    order = np.argsort(-z, kind="stable")[:top_k]
    among = np.arange(len(z)) if filter == "full_vocabulary" else order
    scale = 1.0 if filter == "full_vocabulary" else temperature
    weights = np.exp((z - z.max()) / scale)
    mass, kept = 0.0, []
    for index in order:
        if (kept and mass >= top_p) or z[index] == -np.inf:
            break
        kept.append(int(index))
        mass += weights[index] / weights[among].sum()
    return kept


# top_k beyond the vocabulary; top_p that keeps one entry, some, all; temperatures that share an exponential,
# above and below 1
@pytest.mark.parametrize(("top_k", "top_p"), [(10, 0.95), (3, 1.0), (64, 0.9999), (10, 1e-6)])
@pytest.mark.parametrize("filter", ["full_vocabulary", "hugging_face"])
@pytest.mark.parametrize("temperatures", [[2.0], [1.0], [2.0, 0.5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_rows_give_back_the_dense_distribution(
    monkeypatch: pytest.MonkeyPatch,
    top_k: int,
    top_p: float,
    filter: str,
    temperatures: list[float],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(topk, "_CPU_CHUNK", 300)  # eight rows at a time, and one in the end
    monkeypatch.setattr(topk, "_BLOCK", 4)  # the last block is not full
    seed, rows, vocab = 3, 41, 37
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * 3 + 50).to(dtype)  # in bf16 many are equal
    logits[:, 5] = -torch.inf  # masked columns are legal
    tokens = torch.randint(6, vocab, (rows,), generator=generator)
    sparse = sparse_rows(logits, tokens, top_k=top_k, top_p=top_p, filter=filter, temperatures=temperatures)
    assert sparse.vocab_size == vocab
    dense = logits.double()
    bounds = np.concatenate([[0], np.cumsum(sparse.counts, dtype=np.int64)])
    for row in range(rows):
        span = slice(bounds[row], bounds[row + 1])
        ids = sparse.ids[span]
        assert ids.tolist() == kept_by_definition(
            dense[row].numpy(), top_k, top_p, filter, temperatures[0]
        ), f"{seed=} {row=}"
        for column, temperature in enumerate([1.0, *temperatures]):
            expected = torch.log_softmax(dense[row] / temperature, 0)[ids.tolist()].numpy()
            found = sparse.logits[span] / temperature - sparse.lse[row, column]
            # Fp32 sums of exponentials of numbers up to 20.
            np.testing.assert_allclose(found, expected, atol=2e-6)
        expected = torch.log_softmax(dense[row], 0)[tokens[row]]
        np.testing.assert_allclose(sparse.token_logprobs[row], expected, atol=4e-6)


def test_which_entries_a_row_holds_depends_on_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few different logits, negative zeros among them: at rank k there are always ties."""
    monkeypatch.setattr(topk, "_BLOCK", 8)
    seed, top_k = 11, 10
    logits = torch.randint(-2, 3, (64, 203), generator=torch.Generator().manual_seed(seed)).float()
    logits *= torch.where(
        torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0
    )
    assert (logits == 0).sum() > (logits.view(torch.int32) == 0).sum() > 0, "no zero of either sign"
    expected = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :top_k]

    def ids(rows: slice, chunk: int, threads: int) -> np.ndarray:
        monkeypatch.setattr(topk, "_CPU_CHUNK", chunk)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            tokens = torch.zeros(len(logits[rows]), dtype=torch.int64)
            options = {"top_k": top_k, "top_p": 1.0, "filter": "full_vocabulary", "temperatures": [2.0]}
            return sparse_rows(logits[rows], tokens, **options).ids.reshape(-1, top_k)
        finally:
            torch.set_num_threads(before)

    for rows, chunk, threads in [(slice(None), 2**20, 2), (slice(None), 1, 1), (slice(7, 8), 2**20, 1)]:
        np.testing.assert_array_equal(
            ids(rows, chunk, threads), expected[rows], err_msg=f"{seed=} {rows} {chunk}"
        )


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, "all masked"])
def test_rows_that_are_no_distribution_are_refused(monkeypatch: pytest.MonkeyPatch, bad: float | str) -> None:
    monkeypatch.setattr(topk, "_CPU_CHUNK", 34)  # three rows at a time: the fifth is in the second chunk
    logits = torch.zeros(7, 11)
    logits[4] = -torch.inf if bad == "all masked" else logits[4]
    if bad != "all masked":
        logits[4, 9] = bad
    with pytest.raises(NotFiniteError) as error:
        sparse_rows(
            logits,
            torch.zeros(7, dtype=torch.int64),
            top_k=3,
            top_p=1.0,
            filter="full_vocabulary",
            temperatures=[2.0],
        )
    assert error.value.row == 4


@pytest.mark.parametrize("filter", ["full_vocabulary", "hugging_face"])
def test_without_truncation_every_one_of_the_k_entries_is_kept(filter: str) -> None:
    """Also of a row so sure of itself that in fp32 its first entries have all the mass there is."""
    logits = torch.arange(40.0).flip(0).mul(30.0).expand(5, -1)
    rows = sparse_rows(
        logits, torch.zeros(5, dtype=torch.int64), top_k=10, top_p=1.0, filter=filter, temperatures=[2.0]
    )
    assert rows.counts.tolist() == [10] * 5


def test_splitting_and_joining_are_inverse() -> None:
    seed, lengths = 2, [3, 0, 4, 1]
    logits = torch.randn(sum(lengths), 20, generator=torch.Generator().manual_seed(seed))
    tokens = torch.zeros(len(logits), dtype=torch.int64)
    rows = sparse_rows(logits, tokens, top_k=5, top_p=0.6, filter="full_vocabulary", temperatures=[2.0])
    parts = rows.split(lengths)
    assert [len(part.counts) for part in parts] == lengths
    joined = SparseRows.join([SparseRows.none(1), *parts])
    for name in ("counts", "ids", "logits", "lse", "token_logprobs"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(rows, name))
    assert joined.vocab_size == 20
