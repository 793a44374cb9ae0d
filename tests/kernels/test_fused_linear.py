"""The loss from hidden states equals the product followed by the loss: values and all gradients, whole and
over shards.
"""

import random
from dataclasses import replace
from itertools import accumulate, product

import pytest
import torch
import torch.distributed as dist
from fuse_kernels import chunk_rows, fused_linear_sparse_kl, sparse_kl_cross_entropy
from sparse_kl_cases import DEVICE, Case, make_case

WIDTH = 12


def make_linear_case(seed: int, **options) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """A case without logits, hidden states [n, h] and a weight [v, h] whose padded rows are poisoned."""
    case = make_case(seed, **options)
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(case.labels), WIDTH, generator=g).to(case.logits.dtype)
    weight = torch.randn(case.logits.shape[1], WIDTH, generator=g).to(case.logits.dtype)
    skipped = (case.ce_weight == 0) & (case.kl_weight == 0)
    hidden[skipped] = torch.nan
    return replace(case, logits=torch.empty(0)), hidden, weight


def arguments(case: Case) -> tuple[tuple, dict]:
    weights = {"ce_weight": case.ce_weight, "kl_weight": case.kl_weight, "vocab_size": case.vocab_size}
    return (case.labels, case.teacher_ids, case.teacher_logprobs), weights


def exact(case: Case, hidden: torch.Tensor, weight: torch.Tensor, **options):
    """loss, ce, kl, gradients of hidden and weight, what is known of the fit: fp64, all logits at once,
    plain autograd.
    """
    hidden, weight = (tensor.double().nan_to_num(0).requires_grad_() for tensor in (hidden, weight))
    targets, weights = arguments(case)
    logits = hidden @ weight.t()
    loss, ce, kl, *fit = sparse_kl_cross_entropy(
        logits, *targets, **weights, implementation="reference", **options
    )
    loss.backward(case.upstream.double())
    return loss.detach(), ce, kl, hidden.grad, weight.grad, *fit[:2]


def fused(case: Case, hidden: torch.Tensor, weight: torch.Tensor, **options):
    device = DEVICE if options.get("implementation") == "triton" else "cpu"
    hidden, weight = (tensor.to(device).clone().requires_grad_() for tensor in (hidden, weight))
    targets, weights = arguments(case)
    targets = [target.to(device) for target in targets]
    weights = {
        name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in weights.items()
    }
    loss, ce, kl, *fit = fused_linear_sparse_kl(hidden, weight, *targets, **weights, **options)
    loss.backward(case.upstream.to(device, loss.dtype))
    return tuple(tensor.cpu() for tensor in (loss.detach(), ce, kl, hidden.grad, weight.grad, *fit[:2]))


def assert_near(actual, expected, dtype: torch.dtype, largest: float = 0.0) -> None:
    """Relative to the norm of each.

    Half types: the logits themselves are rounded, each by up to a half of `eps` times the largest one. A
    probability among few entries has the errors of its own logit and of the log-sum-exp. largest: the largest
    logit over the temperature.
    """
    bound = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    bounds = dict.fromkeys(("loss", "ce", "kl", "hidden", "weight", "teacher mass"), bound)
    bounds["student mass"] = max(bound, torch.finfo(dtype).eps * largest)
    for (name, most), a, e in zip(bounds.items(), actual, expected, strict=True):
        assert a.isfinite().all(), name
        assert (a.double() - e).norm() <= most * e.norm(), name


def largest_logit(case: Case, hidden: torch.Tensor, weight: torch.Tensor) -> float:
    return float((hidden.double().nan_to_num(0) @ weight[: case.vocab_size].double().t()).abs().max())


HALF = (torch.bfloat16, torch.float16)
CASES = [
    (implementation, chunk_tokens, tail, temperature, dtype)
    for implementation in ("torch", "reference", "triton")
    for chunk_tokens in (1, 7, 1024)  # one row; a short last chunk; all at once
    for tail, temperature in (("bucket", 2.0), ("renormalize", 1.0), ("ignore", 3.7))
    for dtype in (torch.float64, torch.float32, *HALF)
    # Interpreted kernels are slow and take no fp64; of half types one case each says all.
    if implementation != "triton"
    or (chunk_tokens == 7 and dtype in (torch.float32, *HALF[: tail == "bucket"]))
    if dtype not in HALF or chunk_tokens == 7
]


@pytest.mark.parametrize(("implementation", "chunk_tokens", "tail", "temperature", "dtype"), CASES, ids=str)
def test_equals_the_product_followed_by_the_loss(
    implementation, chunk_tokens, tail, temperature, dtype, seed
):
    case, hidden, weight = make_linear_case(seed, n=16, vocab=61, k=5, dtype=dtype)
    if implementation == "triton":
        hidden = hidden.nan_to_num(0)  # its rows stay in the products, where NaN would spread
    options = {"tail": tail, "temperature": temperature}
    for unit in (False, True):
        if unit:
            case = replace(case, upstream=torch.ones(16))
        actual = fused(
            case,
            hidden,
            weight,
            implementation=implementation,
            chunk_tokens=chunk_tokens,
            unit_upstream=unit,
            **options,
        )
        largest = largest_logit(case, hidden, weight) / temperature if dtype in HALF else 0.0
        assert_near(actual, exact(case, hidden, weight, **options), dtype, largest)
        assert (actual[4][case.vocab_size :] == 0).all()  # padded columns


@pytest.mark.parametrize("unit", [False, True], ids=["any upstream", "unit upstream"])
@pytest.mark.parametrize("implementation", ["torch", "reference", "triton"])
def test_the_cap_is_that_of_the_product(implementation, unit, seed):
    case, hidden, weight = make_linear_case(seed, n=16, vocab=61, k=5, skipped=False)
    if unit:
        case = replace(case, upstream=torch.ones(16))
    options = {"softcap": 3.0, "temperature": 2.0}
    passes = {"implementation": implementation, "chunk_tokens": 7, "unit_upstream": unit}
    actual = fused(case, hidden, weight, **passes, **options)
    assert_near(actual, exact(case, hidden, weight, **options), torch.float32)


@pytest.mark.parametrize("unit", [False, True], ids=["any upstream", "unit upstream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_adds_to_megatrons_main_gradient(dtype, unit, seed):
    case, hidden, weight = make_linear_case(seed, n=30, vocab=61, k=5, dtype=dtype)
    if unit:
        case = replace(case, upstream=torch.ones(30))
    expected = exact(case, hidden, weight)
    weight = weight.clone().requires_grad_()
    weight.main_grad = torch.full(weight.shape, 0.5)
    hooks = []
    # Where Megatron's data parallelism waits.
    accumulation = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulation.register_hook(lambda *_: hooks.append(weight.grad))
    targets, weights = arguments(case)
    for micro_batch in (1, 2):
        loss = fused_linear_sparse_kl(
            hidden, weight, *targets, **weights, chunk_tokens=8, unit_upstream=unit
        )[0]
        loss.backward(case.upstream)
        assert len(hooks) == micro_batch and hooks[-1].is_sparse and hooks[-1]._nnz() == 0
        weight.grad = None
    bound = 3e-6 if dtype == torch.float32 else 2e-2
    assert (weight.main_grad.double() - 0.5 - 2 * expected[4]).norm() <= bound * 2 * expected[4].norm()


@pytest.mark.parametrize("main", [False, True])
def test_a_promise_of_unit_upstream_is_checked(main, seed):
    case, hidden, weight = make_linear_case(seed, n=16, vocab=61, k=5, skipped=False)
    targets, weights = arguments(case)

    def backward(upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        if main:
            leaves[1].main_grad = torch.zeros_like(weight)
        loss = fused_linear_sparse_kl(*leaves, *targets, **weights, chunk_tokens=8, unit_upstream=True).loss
        loss.backward(upstream, retain_graph=True)
        with pytest.raises(RuntimeError, match="the first backward pass has used up the gradients"):
            loss.backward(upstream)
        return leaves[0].grad, leaves[1].main_grad if main else leaves[1].grad

    assert all(gradient.isfinite().all() for gradient in backward(torch.ones(16)))
    with pytest.raises(ValueError, match="upstream gradient of a loss is not 1"):
        backward(torch.full((16,), 0.5))
    # A step that is to be thrown away: the norm of each gradient says so.
    assert all(gradient.norm().isnan() for gradient in backward(torch.full((16,), torch.nan)))


def test_products_of_a_unit_upstream(seed):
    """Three for each chunk, where any upstream takes four."""
    case, hidden, weight = make_linear_case(seed, n=20, vocab=61, k=5, skipped=False)
    targets, weights = arguments(case)
    for unit, products in ((True, 3), (False, 4)):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        with torch.profiler.profile() as profile:
            fused_linear_sparse_kl(
                *leaves, *targets, **weights, chunk_tokens=10, unit_upstream=unit
            ).loss.sum().backward()
        names = ("aten::mm", "aten::addmm_", "aten::addmm")
        assert sum(event.count for event in profile.key_averages() if event.key in names) == 2 * products


def test_chunks_have_a_size_of_their_own():
    # 1024 rows of Llama-3's vocabulary in bf16 are 250 MB; a shard of a quarter has four times as many; never
    # fewer than 128
    assert [chunk_rows(*shape) for shape in ((128256, 2), (32064, 2), (128256, 4), (1 << 24, 4))] == [
        1024,
        4096,
        512,
        128,
    ]


def test_tied_weight_keeps_its_other_gradient(seed):
    """Of an embedding that is the output layer too, autograd adds up both gradients, whichever comes
    first.
    """
    case, _, weight = make_linear_case(seed, n=16, vocab=61, k=5, skipped=False)
    ids = torch.randint(61, (16,), generator=torch.Generator().manual_seed(seed))
    targets, weights = arguments(case)

    def gradient(main: bool) -> torch.Tensor:
        tied = weight.clone().requires_grad_()
        if main:
            tied.main_grad = torch.zeros_like(tied)
        loss, *_ = fused_linear_sparse_kl(tied[ids], tied, *targets, **weights, chunk_tokens=8)
        loss.backward(case.upstream)
        return tied.main_grad + tied.grad if main else tied.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_graph_can_be_walked_twice(seed):
    case, hidden, weight = make_linear_case(seed, n=16, vocab=61, k=5, skipped=False)
    hidden.requires_grad_()
    targets, weights = arguments(case)
    loss, *_ = fused_linear_sparse_kl(hidden, weight, *targets, **weights, chunk_tokens=8)
    first = torch.autograd.grad(loss, hidden, case.upstream, retain_graph=True)[0]
    second = torch.autograd.grad(loss, hidden, 2 * case.upstream)[0]
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_no_rows_and_nothing_to_weigh(weight):
    for n in (0, 3):
        hidden, matrix = torch.ones(n, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
        labels, ids = torch.zeros(n, dtype=torch.long), torch.zeros(n, 1, dtype=torch.long)
        weights = {"ce_weight": torch.full((n,), weight), "kl_weight": torch.full((n,), weight)}
        losses = fused_linear_sparse_kl(hidden, matrix, labels, ids, torch.zeros(n, 1), **weights)
        losses[0].sum().backward()
        assert [values.shape for values in losses] == [(n,)] * 6
        assert hidden.grad.shape == hidden.shape and (matrix.grad != 0).any() == (n > 0 and weight > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden is \[2, 3, 4\]"),
        (
            {"weight": torch.zeros(5, 3)},
            r"weight is \[5, 3\] torch.float32, but hidden of \[2, 4\] torch.float32 needs \[v, 4\]",
        ),
        ({"weight": torch.zeros(5, 4).bfloat16()}, "weight is .*bfloat16"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels is \[3\], but hidden of 2 rows"),
        ({"labels": torch.full((2,), 5)}, r"labels\[0\] is 5, but must be -100 or 0 ... 4"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"implementation": "fast"}, "implementation is 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    given = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(5, 4),
        "labels": torch.zeros(2, dtype=torch.long),
        "teacher_ids": torch.zeros(2, 1, dtype=torch.long),
        "teacher_logprobs": torch.zeros(2, 1),
        "ce_weight": torch.ones(2),
        "kl_weight": torch.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_sparse_kl(**(given | change))


# --- over shards
# -------------------------------------------------------------------------------------------------------

LAYOUTS = {"tp2": (61, [32, 32]), "tp4 padding": (40, [16] * 4), "tp2 uneven": (61, [3, 60])}


def compare_with_whole(seed: int) -> dict[str, str]:
    """On every rank: each layout that fits the number of ranks; the complaint of each case, "" where all
    is well.
    """
    from test_sparse_kl_vocab_parallel import Collectives

    dist.init_process_group("gloo")
    group = dist.group.WORLD
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    complaints = {}
    for name, (vocab, widths) in LAYOUTS.items():
        if len(widths) != size:
            continue
        start = [0, *accumulate(widths)][rank]
        shard = slice(start, start + widths[rank])
        case, hidden, weight = make_linear_case(seed, n=12, vocab=vocab, k=5, padding=sum(widths) - vocab)
        hidden = hidden.nan_to_num(0)
        expected = exact(case, hidden, weight, temperature=2.0)
        expected = (*expected[:4], expected[4][shard], *expected[5:])
        case_of = {False: case, True: replace(case, upstream=torch.ones(12))}
        expected_of = {False: expected}
        unit = exact(case_of[True], hidden, weight, temperature=2.0)
        expected_of[True] = (*unit[:4], unit[4][shard], *unit[5:])
        choices = product(("torch", "triton", *["reference"] * (len(set(widths)) == 1)), (False, True))
        for implementation, unit in choices:
            place = {
                "vocab_start": start,
                "group": group,
                "implementation": implementation,
                "unit_upstream": unit,
            }
            try:
                with Collectives() as collectives:
                    actual = fused(
                        case_of[unit], hidden, weight[shard], temperature=2.0, chunk_tokens=6, **place
                    )
                assert_near(actual, expected_of[unit], torch.float32)
                if implementation != "reference":
                    weighed = int(((case.ce_weight != 0) | (case.kl_weight != 0)).sum())
                    rows = 12 if implementation == "triton" else weighed
                    gathers = collectives.seen["c10d::_allgather_base_"]
                    assert gathers <= -(-rows // 6) and collectives.seen["c10d::allreduce_"] == 1, (
                        collectives.seen
                    )
                complaints[f"{name} {implementation} {unit}"] = ""
            except AssertionError as error:
                complaints[f"{name} {implementation} {unit}"] = f"rank {rank}: {error}"
    return complaints


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_shards_equal_the_whole(size, ranks):
    seed = random.randrange(2**31)
    for complaints in ranks(size, compare_with_whole, seed):
        assert len(complaints) >= 4
        assert not any(complaints.values()), f"seed {seed}: {complaints}"
