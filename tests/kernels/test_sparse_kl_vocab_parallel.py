"""The vocabulary split over gloo ranks: the loss of every rank and the gradient of every shard against the
whole.
"""

import random
from collections import Counter
from itertools import accumulate, product

import pytest
import torch
import torch.distributed as dist
from sparse_kl_cases import assert_close, exact, make_case, run
from torch.utils._python_dispatch import TorchDispatchMode

# name: (real vocabulary, columns of each shard)
LAYOUTS = {
    "tp2 padded": (1003, [512, 512]),  # 21 padded columns, all in the last shard
    "tp4 padded": (1003, [256] * 4),
    # The second shard is mostly, the third and fourth wholly padding.
    "tp4 shards of padding": (150, [128] * 4),
    "tp4 tiny": (9, [3] * 4),  # a shard may hold nothing but teacher entries
    "tp4 uneven": (360, [100, 57, 200, 3]),
    "tp2 uneven": (200, [3, 211]),
}
TAILS = ("bucket", "renormalize", "ignore")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SOFTCAPS = {"bucket": (None, 4.0), "renormalize": (None,), "ignore": (None,)}  # by tail


class Collectives(TorchDispatchMode):
    """Counts the collectives by name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("c10d"):
            self.seen[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def implementations(every: bool, even: bool, tail: str, dtype: torch.dtype) -> list[str]:
    """Those that take such shards: the reference only even ones, the Triton kernels no fp64.

    Interpreted kernels are slow. If not `every`, they run in bf16 with one tail alone.
    """
    triton = dtype == torch.float32 or (dtype == torch.bfloat16 and (every or tail == "bucket"))
    return ["torch", *["reference"] * even, *["triton"] * triton]


def compare_with_whole(seed: int, every: bool) -> dict[str, str]:
    """On every rank: each layout that fits the number of ranks; the complaint of each case, "" where all
    is well.
    """
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    complaints = {}
    for name, (vocab, widths) in LAYOUTS.items():
        if len(widths) != size:
            continue
        start = [0, *accumulate(widths)][rank]
        even = len(set(widths)) == 1
        for tail, dtype in product(TAILS, DTYPES):
            for softcap in SOFTCAPS[tail]:
                # The first eleven rows have all kinds of rows. The interpreter takes a second for ten.
                case = make_case(
                    seed, n=11, vocab=vocab, k=min(10, vocab - 1), padding=sum(widths) - vocab, dtype=dtype
                )
                options = {"tail": tail, "temperature": 2.0, "softcap": softcap}
                shard = slice(start, start + widths[rank])
                expected = exact(case, **options)
                expected = (*expected[:3], expected[3][:, shard], *expected[4:])
                for implementation in implementations(every, even, tail, dtype):
                    key = f"{name} {tail} {dtype} {softcap} {implementation}"
                    place = {"vocab_start": start, "group": group}
                    try:
                        actual = run(case, implementation, columns=shard, **place, **options)
                        if implementation != "reference" or dtype == torch.float64:
                            assert_close(actual, expected, case, key, softcap=softcap or torch.inf)
                        gathered = [torch.empty_like(actual[0]) for _ in range(size)]
                        dist.all_gather(gathered, actual[0], group=group)
                        assert all(torch.equal(g, actual[0]) for g in gathered), "ranks disagree on the loss"
                        complaints[key] = ""
                    except AssertionError as error:
                        complaints[key] = f"rank {rank}: {error}"
    return complaints


def count_collectives(seed: int, implementation: str) -> dict[str, int]:
    dist.init_process_group("gloo")
    group, size = dist.group.WORLD, dist.get_world_size()
    case = make_case(seed, n=4, vocab=500, padding=12)
    width = 512 // size
    start = dist.get_rank() * width
    with Collectives() as collectives:
        run(case, implementation, columns=slice(start, start + width), vocab_start=start, group=group)
    return dict(collectives.seen)


SLOW = [pytest.param((size, True), marks=pytest.mark.slow, id=f"{size}, every case") for size in (2, 4)]


@pytest.fixture(scope="module", params=[pytest.param((2, False), id="2"), *SLOW])
def results(request, ranks):
    """What each rank found, all layouts in one go."""
    (size, every), seed = request.param, random.randrange(2**31)
    return size, every, seed, ranks(size, compare_with_whole, seed, every)


@pytest.mark.parametrize("tail", TAILS)
def test_shards_equal_the_whole(results, tail):
    size, every, seed, found = results
    layouts = [name for name, (_, widths) in LAYOUTS.items() if len(widths) == size]
    cases = sum(
        len(SOFTCAPS[tail]) * len(implementations(every, len(set(LAYOUTS[name][1])) == 1, tail, dtype))
        for name in layouts
        for dtype in DTYPES
    )
    for complaints in found:
        mine = [complaint for key, complaint in complaints.items() if f" {tail} " in key]
        assert len(mine) == cases
        assert not any(mine), f"seed {seed}:\n" + "\n".join(filter(None, mine))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("size", [2, 4])
def test_one_collective_in_all(size, implementation, ranks):
    seed = random.randrange(2**31)
    assert ranks(size, count_collectives, seed, implementation) == [{"c10d::_allgather_base_": 1}] * size


def refused_shards() -> str:
    dist.init_process_group("gloo")
    case = make_case(1, n=8, vocab=500, padding=12)
    start = dist.get_rank() * 250  # shards of 256 columns that overlap
    try:
        run(
            case,
            "torch",
            columns=slice(start, start + 256),
            vocab_start=start,
            group=dist.group.WORLD,
            check=True,
        )
    except ValueError as error:
        return str(error)
    return ""


def test_shards_that_do_not_tile_the_vocabulary_are_refused_where_asked(ranks):
    assert (
        ranks(2, refused_shards)
        == ["vocab_start: a shard begins at column 250, but those before it end at 256"] * 2
    )
