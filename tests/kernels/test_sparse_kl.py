"""The chunked implementation against the dense formula in fp64, and the laws of the loss itself."""

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from fuse_kernels import off_ids, sparse_kl_cross_entropy
from fuse_kernels.rows import VocabularyShard
from sparse_kl_cases import DEVICE, Case, assert_close, exact, make_case, run
from torch.utils._python_dispatch import TorchDispatchMode

TAILS = ("bucket", "renormalize", "ignore")
# 1, 2 and 4: one exponential serves both softmaxes; 3.7: the general road
TEMPERATURES = (1.0, 2.0, 4.0, 3.7)


def cases():
    """Everything with everything; of the largest shape a plain run has a part."""
    # 97: smaller than a vector loop's unit; 1023: rows unaligned; 32000: the paper's vocabulary, several
    # chunks. k 1: the smallest; 10: the recipes'; 33: a third of the vocabulary of 97, so that the tail is no
    # afterthought
    shapes = [(97, 1, 24), (97, 33, 48), (1023, 10, 24), (1023, 33, 24), (32000, 10, 16)]
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    # skipped rows are gathered around; without any, the rows are read and written where they lie
    for shape, tail, temperature, dtype, skipped in product(
        shapes, TAILS, TEMPERATURES, dtypes, [True, False]
    ):
        usual = [tail == "bucket", temperature == 2.0, dtype == torch.float32, skipped]
        marks = [pytest.mark.slow] if shape[0] == 32000 and sum(usual) < 3 else []
        values = (*shape, tail, temperature, dtype, skipped)
        yield pytest.param(*values, marks=marks, id="-".join(map(str, values)))


@pytest.mark.parametrize(("vocab", "k", "n", "tail", "temperature", "dtype", "skipped"), cases())
def test_chunked_equals_dense_formula(vocab, k, n, tail, temperature, dtype, skipped, seed):
    case = make_case(seed, n=n, vocab=vocab, k=k, dtype=dtype, skipped=skipped)
    options = {"tail": tail, "temperature": temperature}
    assert_close(run(case, "torch", **options), exact(case, **options), case, f"seed {seed}")


# Far from 1 on both sides: powers of exponentials would overflow.
@pytest.mark.parametrize("temperature", [0.5, 100.0])
def test_extreme_temperatures(temperature, seed):
    case = make_case(seed)
    assert_close(
        run(case, "torch", temperature=temperature),
        exact(case, temperature=temperature),
        case,
        f"seed {seed}",
    )


def one_row(logits, ids, mass, label=-100, **options):
    """(ce, kl) of a single row at weights 1, as floats."""
    mass = torch.tensor([mass], dtype=torch.float64)
    arguments = (
        torch.tensor([logits], dtype=torch.float64),
        torch.tensor([label]),
        torch.tensor([ids]),
        mass.log(),
    )
    weight = torch.ones(1)
    losses = sparse_kl_cross_entropy(*arguments, ce_weight=weight, kl_weight=weight, **options)
    return losses.ce.item(), losses.kl.item()


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_values_worked_by_hand(implementation):
    # Student 1/2, 1/4, 1/8, 1/8 at T = 1. Teacher 1/4 and 1/4 on the first two, 1/2 left.
    logits, mass = [math.log(p) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 8)], [1 / 4, 1 / 4]
    stored = 0.25 * math.log(0.5) + 0.25 * math.log(1)
    expected = {
        "ignore": stored,  # negative: half the teacher's mass is not there
        "bucket": stored + 0.5 * math.log(0.5 / 0.25),
        "renormalize": 0.5 * math.log(1) + 0.5 * math.log(2),
    }
    for tail, kl in expected.items():
        values = one_row(logits, [0, 1], mass, label=2, tail=tail, implementation=implementation)
        assert values == pytest.approx((math.log(8), kl), abs=1e-12), tail
    # At T = 2 the student's probabilities go with their square roots.
    roots = [math.sqrt(p) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 8)]
    kl = sum(0.5 * math.log(0.5 / (root / sum(roots))) for root in roots[:2])
    values = one_row(logits, [0, 1], [0.5, 0.5], label=2, temperature=2.0, implementation=implementation)
    assert values == pytest.approx((math.log(8), kl), abs=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_bucket_is_zero_exactly_at_the_teacher(temperature, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 50, generator=g, dtype=torch.float64).requires_grad_()
    top = (logits.detach() / temperature).log_softmax(1).topk(5)
    none, one = torch.zeros(6), torch.ones(6)
    arguments = (torch.full((6,), -100), top.indices, top.values)
    before = logits.detach().clone()
    loss, _, kl, *_ = sparse_kl_cross_entropy(
        logits, *arguments, ce_weight=none, kl_weight=one, temperature=temperature
    )
    loss.sum().backward()
    assert kl.abs().max() < 1e-14 and logits.grad.abs().max() < 1e-14
    nudged = before + 0.1 * torch.randn(6, 50, generator=g, dtype=torch.float64)
    _, _, kl, *_ = sparse_kl_cross_entropy(
        nudged, *arguments, ce_weight=none, kl_weight=one, temperature=temperature
    )
    assert (kl > 0).all()


# 1e-6: 1 - M keeps one digit in fp32; 1e-30: it keeps none; 1e-60: exp itself underflows in fp32
@pytest.mark.parametrize("student_tail", [1e-6, 1e-30, 1e-60])
def test_certain_student_keeps_its_tail(student_tail, seed):
    case = make_case(seed, n=8, vocab=1023, k=2, padding=0)
    logits = torch.randn(8, 1023, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([[5, 900]] * 8)
    certain = logits.logsumexp(1, keepdim=True) - math.log(student_tail)
    logits.scatter_(1, ids, certain.expand(8, 2))
    mass = torch.tensor([[0.6, 0.3]] * 8)
    case = replace(case, logits=logits, teacher_ids=ids, teacher_logprobs=mass.log(), kl_weight=torch.ones(8))
    actual, expected = run(case, "torch"), exact(case)
    assert_close(actual, expected, case, f"seed {seed}")
    torch.testing.assert_close(actual[2].double(), expected[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("tail", TAILS)
def test_stored_mass_of_one_or_more_leaves_no_tail(implementation, tail):
    for excess in (0.0, 1e-7, 5e-4):  # exact; fp32 rounding; half-precision rounding
        mass = [0.75 + excess, 0.25]
        _, kl = one_row([2.0, 1.0, 0.0], [0, 1], mass, tail=tail, implementation=implementation)
        _, closed = one_row(
            [2.0, 1.0, 0.0], [0, 1], [0.75, 0.25], tail="ignore", implementation=implementation
        )
        assert kl == pytest.approx(closed, abs=1e-3 if excess else 1e-12)
    # Every column stored: nothing is left over that could hold a tail.
    _, kl = one_row(
        [2.0, 1.0, 0.0], [0, 1, 2], [0.5, 0.3, 0.2 - 1e-7], tail=tail, implementation=implementation
    )
    assert math.isfinite(kl) and kl > 0


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("tail", TAILS)
def test_what_is_skipped_and_what_is_reported(implementation, tail):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 20, generator=g)
    logits[4:] = torch.nan  # rows to which nothing gives weight
    before = logits.clone()
    logits.requires_grad_()
    labels = torch.tensor([3, 3, -100, 3, 3, -100, 3, -100])
    ids = torch.tensor([[1, 2], [1, 2], [1, 2], [-1, -1], [1, 2], [1, 2], [-1, -1], [-1, -1]])
    logprobs = torch.full((8, 2), math.log(0.4))
    ce_weight = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 1])  # row 5, 7: a weight, but no label
    kl_weight = torch.tensor([0.0, 1, 1, 1, 0, 0, 1, 1])  # row 6, 7: a weight, but no teacher
    options = {"ce_weight": ce_weight, "kl_weight": kl_weight, "tail": tail, "implementation": implementation}
    loss, ce, kl, *_ = sparse_kl_cross_entropy(logits, labels, ids, logprobs, **options)
    loss.sum().backward()
    assert not ce.requires_grad and not kl.requires_grad
    assert ((ce != 0).tolist(), (kl != 0).tolist()) == (
        [True, True, False, True, *[False] * 4],
        [True] * 3 + [False] * 5,
    )
    torch.testing.assert_close(loss.detach(), ce * ce_weight + kl * kl_weight)
    assert (logits.grad[4:] == 0).all() and (logits.grad[:4] != 0).any(1).all()
    only_ce = before[3].softmax(0)
    only_ce[3] -= 1
    torch.testing.assert_close(logits.grad[3], only_ce)  # no teacher: the gradient of the cross entropy alone


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_masked_logits_of_minus_infinity(implementation, seed):
    """A banned column costs nothing where neither label nor teacher wants it, and poisons no unweighted
    part.
    """
    case = make_case(seed, n=4, vocab=30, k=3, padding=0)
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    logits[:, 20:] = -torch.inf
    ids = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 25], [1, 2, 3]])
    labels = torch.tensor([4, 25, 4, 4])
    ce_weight, kl_weight = torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, 1, 0, 1])
    mass = torch.full((4, 3), 0.2)
    case = replace(case, logits=logits, labels=labels, teacher_ids=ids, teacher_logprobs=mass.log())
    case = replace(case, ce_weight=ce_weight, kl_weight=kl_weight)
    loss, ce, kl, gradient, *_ = run(
        case, implementation, device=DEVICE if implementation == "triton" else "cpu"
    )
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert ce[1] == torch.inf and kl[2] == torch.inf and (gradient[:, 20:] == 0).all()


@pytest.mark.parametrize("skipped", [True, False])
def test_rows_do_not_depend_on_their_chunk(skipped, monkeypatch, seed):
    case = make_case(seed, n=40, vocab=300, skipped=skipped)
    whole = run(case, "torch", temperature=2.0)
    for elements in (1, 700, 2000):  # one row a chunk; two rows; six, with a short last one
        monkeypatch.setattr(off_ids, "_CPU_CHUNK", elements)
        for a, b in zip(run(case, "torch", temperature=2.0), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_degenerate_sizes(implementation):
    def call(n, v, k, weight=1.0):
        logits = torch.zeros(n, v, requires_grad=True)
        ids, logprobs = torch.zeros((n, k), dtype=torch.int32), torch.zeros(n, k)
        weights = {"ce_weight": torch.full((n,), weight), "kl_weight": torch.full((n,), weight)}
        labels = torch.zeros(n, dtype=torch.int32)
        results = sparse_kl_cross_entropy(
            logits, labels, ids, logprobs, **weights, implementation=implementation
        )
        results[0].sum().backward()
        return [r.tolist() for r in results], logits.grad

    assert call(0, 5, 3)[0] == [[]] * 6
    (loss, ce, kl, *fit), _ = call(2, 4, 0)  # no teacher at all: plain cross entropy
    assert ce == pytest.approx([math.log(4)] * 2) and loss == ce and kl == [0, 0]
    assert fit == [[0, 0]] * 3
    values, gradient = call(2, 4, 1, weight=0.0)  # nothing to do in any row
    assert values == [[0, 0]] * 6 and (gradient == 0).all()
    values, gradient = call(2, 1, 1)  # a vocabulary of one: certain, and nothing off the ids
    assert values == [[0, 0]] * 3 + [[1, 1]] * 3 and (gradient == 0).all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_gradient_the_same_results_and_the_same_logits(dtype, implementation, seed):
    device = DEVICE if implementation == "triton" else "cpu"
    case = make_case(seed, vocab=64, dtype=dtype)
    logits = case.logits.to(device).requires_grad_()
    arguments = [tensor.to(device) for tensor in (case.labels, case.teacher_ids, case.teacher_logprobs)]
    weights = {"ce_weight": case.ce_weight.to(device), "kl_weight": case.kl_weight.to(device)}
    options = {**weights, "vocab_size": case.vocab_size, "implementation": implementation}
    with torch.no_grad():
        results = sparse_kl_cross_entropy(logits, *arguments, **options)
    assert not results.loss.requires_grad
    torch.testing.assert_close(logits.detach().cpu(), case.logits, rtol=0, atol=0, equal_nan=True)
    loss, ce, kl, _, *fit = run(case, implementation, device=device)
    torch.testing.assert_close([values.cpu() for values in results], [loss, ce, kl, *fit])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("skipped", [False, True])
def test_an_upstream_gradient_scales_its_row(skipped, implementation, seed):
    """In bf16 a row whose upstream gradient is not 1 is rounded a second time. A row of 1 is not changed."""
    device = DEVICE if implementation == "triton" else "cpu"
    case = make_case(seed, n=16, vocab=300, dtype=torch.bfloat16, skipped=skipped)
    unit = run(case, implementation, device=device)[3]
    upstream = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    upstream[::3] = 1
    case = replace(case, upstream=upstream)
    scaled, expected = run(case, implementation, device=device)[3], exact(case)[3]
    assert torch.equal(scaled[::3], unit[::3])
    # A rounding to bf16 changes a value by at most 2**-8 of it. The rest is room for the fp32 arithmetic.
    torch.testing.assert_close(scaled.double(), expected, rtol=2.05 * 2**-8, atol=1e-7)


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_how_student_and_teacher_fit(implementation):
    device = DEVICE if implementation == "triton" else "cpu"
    probabilities = torch.tensor(
        [[0.5, 0.25, 0.125, 0.125], [0.25, 0.5, 0.125, 0.125], [0.4, 0.4, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]]
    )
    ids = torch.tensor([[0, 2], [0, 2], [1, 2], [-1, -1]])
    mass = torch.tensor([[0.5, 0.2], [0.5, 0.2], [0.3, 0.3], [1.0, 1.0]])  # in the last row of empty slots
    losses = sparse_kl_cross_entropy(
        probabilities.log().to(device), torch.full((4,), 3, device=device), ids.to(device),
        mass.log().to(device),
        ce_weight=torch.ones(4, device=device), kl_weight=torch.ones(4, device=device), tail="renormalize",
        implementation=implementation,
    )  # fmt: skip
    assert losses.teacher_mass.tolist() == pytest.approx([0.7, 0.7, 0.6, 0.0], rel=1e-6)
    assert losses.student_mass.tolist() == pytest.approx([0.625, 0.375, 0.5, 0.0], rel=1e-6)
    # Row 2: the student has two largest, the teacher has two likeliest, and one of them is both.
    assert losses.agreement.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the gradient is written forward, backward
def test_gradient_takes_the_place_of_the_logits_once(dtype, seed):
    case = make_case(seed, vocab=64, padding=0, dtype=dtype)
    leaf = case.logits.clone().requires_grad_()
    logits = leaf * 1
    weights = {"ce_weight": case.ce_weight, "kl_weight": case.kl_weight}
    loss = sparse_kl_cross_entropy(logits, case.labels, case.teacher_ids, case.teacher_logprobs, **weights)[0]
    (gradient,) = torch.autograd.grad(loss, logits, case.upstream.to(loss.dtype), retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(gradient, run(case, "torch")[3], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="written over the logits"):
        loss.backward(case.upstream)


def test_logits_that_somebody_changed_are_refused(seed):
    case = make_case(seed, vocab=64, padding=0)
    logits = case.logits.clone().requires_grad_() * 1
    weights = {"ce_weight": case.ce_weight, "kl_weight": case.kl_weight}
    loss = sparse_kl_cross_entropy(logits, case.labels, case.teacher_ids, case.teacher_logprobs, **weights)[0]
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(case.upstream)


def test_strided_logits(seed):
    case = make_case(seed, n=16, vocab=61, dtype=torch.float32)
    wide = torch.full((32, 200), torch.nan)
    wide[::2, 5 : 5 + case.logits.shape[1]] = case.logits
    wide.requires_grad_()
    view = (wide * 1)[::2, 5 : 5 + case.logits.shape[1]]
    arguments = (view, case.labels, case.teacher_ids, case.teacher_logprobs)
    weights = {"ce_weight": case.ce_weight, "kl_weight": case.kl_weight}
    loss = sparse_kl_cross_entropy(*arguments, **weights, vocab_size=61)[0]
    loss.backward(case.upstream)
    expected = run(case, "torch")
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(wide.grad[::2, 5 : 5 + case.logits.shape[1]], expected[3])


class LargestTensors(TorchDispatchMode):
    """Counts the storages of at least `size` elements that operations bring into being."""

    def __init__(self, size: int, known: torch.Tensor):
        super().__init__()
        self.size, self.storages, self.kept = size, {known.untyped_storage().data_ptr()}, [known]
        self.created = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            large = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.size * 4
            if large and tensor.untyped_storage().data_ptr() not in self.storages:
                self.storages.add(tensor.untyped_storage().data_ptr())
                self.kept.append(tensor)  # else its address may be used again
                self.created += 1
        return result


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("skip", [False, True])  # skipped rows take another road through the chunks
def test_no_tensor_of_the_size_of_the_logits_comes_into_being(temperature, skip, monkeypatch, seed):
    monkeypatch.setattr(off_ids, "_CPU_CHUNK", 2000)
    case = make_case(seed, n=64, vocab=1000, padding=0)
    logits = case.logits.nan_to_num(0.0).requires_grad_()
    kl_weight = case.kl_weight if skip else torch.ones(64)
    arguments = (logits, case.labels, case.teacher_ids, case.teacher_logprobs)
    options = {
        "ce_weight": case.ce_weight if skip else torch.ones(64),
        "kl_weight": kl_weight,
        "temperature": temperature,
    }
    with LargestTensors(64 * 1000 // 8, logits) as seen:
        torch.autograd.grad(sparse_kl_cross_entropy(*arguments, **options)[0].sum(), logits)
    assert seen.created == 0


def test_case_holds_what_it_promises():
    """The random cases must keep their odd rows, or the tests above check less than they say."""
    case: Case = make_case(1, n=48, vocab=97, k=33)
    mass = torch.where(case.teacher_ids >= 0, case.teacher_logprobs.exp(), 0).sum(1)
    assert (
        (case.labels == -100).any()
        and (case.teacher_ids < 0).all(1).any()
        and case.logits.isnan().all(1).any()
    )
    assert any(len(set(row)) < len(row) for row in case.teacher_ids[3::8].tolist())
    assert ((mass - 1).abs() < 1e-6).any() and (mass < 0.9).any()


def test_chunks_on_a_gpu_keep_it_busy():
    """Of 131072 columns a chunk for a CPU's cache has one row, whose launches alone would take longer than
    its work.
    """
    logits = torch.empty(8192, 131072, device="meta", dtype=torch.bfloat16)
    rows = SimpleNamespace(labels=torch.empty(8192, device="meta"))
    starts = [start for start, *_ in off_ids.buffers(logits, rows, VocabularyShard(0, 131072, 131072, None))]
    assert 1 < len(starts) <= 32
