"""The largest logits and the log-sum-exps of a row, against a sort in Python and sums in fp64."""

import random
from itertools import product

import pytest
import torch
import torch.distributed as dist
from fuse_kernels import TopK, gather_topk_logsumexp, topk_logsumexp
from sparse_kl_cases import DEVICE

IMPLEMENTATIONS = ("torch", "triton")
ROWS = 8


def make_logits(seed: int, vocab: int, padding: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [8, vocab + padding] and labels: ties of all kinds, masked columns, padding that must not be
    looked at.
    """
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(ROWS, vocab + padding, generator=g) * 3).to(dtype)
    logits[0] = -3.0  # all equal
    logits[1, 1:] = -torch.inf  # one column alone
    logits[2] = torch.randint(-1, 2, logits.shape[1:], generator=g).to(dtype)
    # Zeros of either sign are equal.
    logits[3] = torch.where(torch.rand(logits.shape[1], generator=g) < 0.5, -0.0, 0.0)
    logits[4] += 1e4  # far from 0
    logits[:, vocab:] = torch.nan
    return logits, torch.randint(vocab, (ROWS,), generator=g)


def exact(logits: torch.Tensor, labels: torch.Tensor, vocab: int, k: int, temperatures) -> TopK:
    z = logits[:, :vocab].double()
    order = [sorted(range(vocab), key=lambda column: (-row[column], column))[:k] for row in z.tolist()]
    ids = torch.tensor([columns + [-1] * (k - len(columns)) for columns in order])
    largest = z.gather(1, ids.clamp(min=0)).where(ids >= 0, -torch.inf)
    relative = z - z.amax(1, keepdim=True)
    lse = torch.stack([(relative / temperature).logsumexp(1) for temperature in temperatures], 1)
    return TopK(ids, largest, lse, z.gather(1, labels[:, None])[:, 0])


def assert_same(actual: TopK, expected: TopK) -> None:
    assert torch.equal(actual.ids.cpu(), expected.ids)
    assert torch.equal(actual.logits.cpu().double(), expected.logits)
    torch.testing.assert_close(
        actual.relative_lse.cpu().double(), expected.relative_lse, rtol=2e-6, atol=2e-6
    )
    assert torch.equal(actual.label_logits.cpu().double(), expected.label_logits)


def cases():
    """Everything with everything. Interpreted, a plain run has the unaligned rows at every type with one pair
    of temperatures, and at all temperatures with one type. It has two cases of the other rows. Neither the
    types' nor the temperatures' branches depend on the shape.
    """
    # 7: fewer columns than k; 97: one tile; 1003: rows that are not aligned; 4096: whole tiles alone
    shapes = [(7, 1, 10), (97, 3, 1), (1003, 0, 10), (4096, 0, 33)]
    # one exponential for both; the general way; without T = 1; two that are not 1
    temperatures = [(1.0, 2.0), (2.5, 1.0), (4.0,), (2.0, 3.0)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for values in product(temperatures, shapes, dtypes, IMPLEMENTATIONS):
        chosen, (vocab, padding, k), dtype, implementation = values
        other = (chosen, dtype) in ((temperatures[0], torch.bfloat16), (temperatures[3], torch.float32))
        other |= vocab == 1003 and (chosen == temperatures[1] or dtype == torch.bfloat16)
        marks = [] if implementation == "torch" or other else [pytest.mark.slow]
        name = f"{chosen}-{vocab}-{padding}-{k}-{dtype}-{implementation}"
        yield pytest.param(vocab, padding, k, chosen, dtype, implementation, marks=marks, id=name)


@pytest.mark.parametrize(("vocab", "padding", "k", "temperatures", "dtype", "implementation"), cases())
def test_equals_a_sort_and_sums_in_fp64(vocab, padding, k, temperatures, dtype, implementation, seed):
    logits, labels = make_logits(seed, vocab, padding, dtype)
    device = DEVICE if implementation == "triton" else "cpu"
    moved, before = logits.to(device), logits.clone()
    options = {"labels": labels.to(device), "vocab_size": vocab, "implementation": implementation}
    actual = topk_logsumexp(moved, k, temperatures, **options)
    assert_same(actual, exact(logits, labels, vocab, k, temperatures))
    torch.testing.assert_close(moved.cpu(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_real_vocabulary_in_rows_that_lie_apart(implementation, seed):
    logits, labels = make_logits(seed, 128256, 0, torch.bfloat16)
    device = DEVICE if implementation == "triton" else "cpu"
    wide = torch.full((2 * ROWS, 128300), torch.nan, dtype=torch.bfloat16, device=device)
    wide[::2, 5 : 5 + 128256] = logits.to(device)
    view = wide[::2, 5 : 5 + 128256]
    actual = topk_logsumexp(view, 10, [1.0, 2.0], labels=labels.to(device), implementation=implementation)
    assert_same(actual, exact(logits, labels, 128256, 10, [1.0, 2.0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_a_row_that_is_no_distribution_has_no_finite_sum(bad, implementation):
    device = DEVICE if implementation == "triton" else "cpu"
    logits = torch.zeros(3, 50, device=device)
    logits[1] = logits[1] - torch.inf if bad is None else logits[1]  # all masked
    if bad is not None:
        logits[1, 30] = bad
    lse = topk_logsumexp(logits, 3, [1.0, 2.0], implementation=implementation).relative_lse
    assert lse.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows_and_no_labels(implementation):
    device = DEVICE if implementation == "triton" else "cpu"
    found = topk_logsumexp(torch.zeros(0, 50, device=device), 3, [1.0, 2.0], implementation=implementation)
    assert [list(found.ids.shape), list(found.logits.shape), list(found.relative_lse.shape)] == [
        [0, 3],
        [0, 3],
        [0, 2],
    ]
    assert found.label_logits is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 5, dtype=torch.long)}, r"logits is \[2, 5\] torch.int64"),
        ({"k": 0}, "k is 0, but must be at least 1"),
        ({"temperatures": []}, r"temperatures is \[\]"),
        ({"temperatures": [1.0, 0.0]}, "finite numbers above 0"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels is \[3\]"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"vocab_size": 6}, "vocab_size is 6, but the logits have 5 columns"),
        ({"implementation": "fast"}, "implementation is 'fast'"),
        ({"implementation": "triton", "k": 65}, "k is 65, but the kernel keeps at most 64"),
        (
            {"implementation": "triton", "logits": torch.zeros(2, 5, dtype=torch.float64)},
            "logits is torch.float64",
        ),
    ],
)
def test_bad_arguments(change, message):
    given = {"logits": torch.zeros(2, 5), "k": 2, "temperatures": [1.0]}
    with pytest.raises(ValueError, match=message):
        topk_logsumexp(**(given | change))


def test_the_operator_keeps_the_promises_of_custom_operators(seed):
    logits, labels = make_logits(seed, 97, 3, torch.float32)
    logits, labels = logits[:3].to(DEVICE), labels[:3].to(DEVICE)  # the operator runs many times
    topk_logsumexp(logits, 4, [2.0], vocab_size=97, implementation="triton")  # defines the operator
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for given, softcap in ((labels, 5.0), (None, None)):
        # Label logits are not written without labels: operators that are compared have to have all.
        named = tests if given is not None else tests[:2]
        torch.library.opcheck(
            torch.ops.fuse_kernels.topk.default, (logits, given, 4, 2.0, softcap, 97, 0), test_utils=named
        )


# --- over shards
# -------------------------------------------------------------------------------------------------------

# (real vocabulary, columns of each shard): padding; shards that are padding alone; fewer columns than k
LAYOUTS = [(1003, [512, 512]), (150, [128] * 4), (9, [3] * 4), (200, [3, 211])]


def compare_with_whole(seed: int) -> list[str]:
    from test_sparse_kl_vocab_parallel import Collectives

    dist.init_process_group("gloo")
    group, rank, complaints = dist.group.WORLD, dist.get_rank(), []
    for vocab, widths in LAYOUTS:
        if len(widths) != dist.get_world_size():
            continue
        start = sum(widths[:rank])
        logits, labels = make_logits(seed, vocab, sum(widths) - vocab, torch.bfloat16)
        expected = exact(logits, labels, vocab, 5, [1.0, 2.0])
        shard = logits[:, start : start + widths[rank]]
        for implementation in IMPLEMENTATIONS:
            place = {
                "vocab_size": vocab,
                "vocab_start": start,
                "group": group,
                "implementation": implementation,
            }
            try:
                with Collectives() as collectives:
                    assert_same(topk_logsumexp(shard, 5, [1.0, 2.0], labels=labels, **place), expected)
                assert dict(collectives.seen) == {"c10d::_allgather_base_": 1}
                # Capped logits are those of the whole, to the last bit.
                capped = {"softcap": 4.0, "labels": labels}
                whole = {"vocab_size": vocab, "implementation": implementation}
                for over, of in zip(
                    topk_logsumexp(shard, 5, [1.0, 2.0], **capped, **place),
                    topk_logsumexp(logits, 5, [1.0, 2.0], **capped, **whole),
                    strict=True,
                ):
                    same = {"rtol": 2e-6, "atol": 2e-6} if over.shape[1:] == (2,) else {"rtol": 0, "atol": 0}
                    torch.testing.assert_close(over, of, **same)
                with Collectives() as collectives:
                    gathered = gather_topk_logsumexp(shard, 5, [1.0, 2.0], labels=labels, **place)
                assert (gathered is not None) == (rank == 0)
                if gathered is not None:
                    assert_same(gathered, expected)
                assert dict(collectives.seen) == {"c10d::gather_": 1}
            except AssertionError as error:
                complaints.append(f"{vocab} {widths} {implementation}, rank {rank}: {error}")
    return complaints


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_shards_find_what_the_whole_holds(size, ranks):
    seed = random.randrange(2**31)
    for complaints in ranks(size, compare_with_whole, seed):
        assert not complaints, f"seed {seed}"
