"""Soft-capped logits: the loss and the largest logits of z = c tanh(x / c), whatever the implementation."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from fuse_kernels import sparse_kl_cross_entropy, topk_logsumexp
from sparse_kl_cases import DEVICE, assert_close, exact, make_case, run

TAILS = ("bucket", "renormalize", "ignore")
IMPLEMENTATIONS = ("reference", "torch", "triton")


def device_of(implementation: str) -> str:
    return DEVICE if implementation == "triton" else "cpu"


def cases():
    """Everything with everything in torch; interpreted kernels are slow, so that a plain run has a part in
    which each value occurs.
    """
    # 2: the logits' spread is 3, so that many are near the cap and those of certain rows far beyond it; 30:
    # Gemma 2
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    plain = {  # fp16: the gradient is written in the backward pass
        (2.0, "bucket", 2.0, torch.bfloat16),
        (2.0, "renormalize", 3.7, torch.float16),
        (30.0, "ignore", 1.0, torch.float32),
        (30.0, "bucket", 3.7, torch.float32),
    }
    for implementation, *values in product(("torch", "triton"), (2.0, 30.0), TAILS, (1.0, 2.0, 3.7), dtypes):
        if implementation == "triton" and values[-1] == torch.float64:
            continue
        marks = [] if implementation == "torch" or tuple(values) in plain else [pytest.mark.slow]
        yield pytest.param(implementation, *values, marks=marks)


@pytest.mark.parametrize(("implementation", "softcap", "tail", "temperature", "dtype"), cases())
def test_equals_dense_formula(implementation, softcap, tail, temperature, dtype, seed):
    case = make_case(seed, dtype=dtype)
    options = {"softcap": softcap, "tail": tail, "temperature": temperature}
    actual = run(case, implementation, device=device_of(implementation), **options)
    assert_close(actual, exact(case, **options), case, f"seed {seed}", softcap=softcap)


@pytest.mark.slow
def test_vocabulary_of_gemma(seed):
    case = make_case(seed, vocab=256000, dtype=torch.bfloat16)
    options = {"softcap": 30.0, "temperature": 2.0}
    actual = run(case, "triton", device=DEVICE, **options)
    assert_close(actual, exact(case, **options), case, f"seed {seed}", softcap=30.0)


@pytest.mark.parametrize("tail", TAILS)
def test_dense_formula_is_that_of_the_capped_logits(tail, seed):
    """The reference with a cap against the reference without one, behind a cap of its own."""
    case = make_case(seed, dtype=torch.float64, skipped=False, padding=0)
    logits = case.logits.clone().requires_grad_()
    losses = sparse_kl_cross_entropy(
        4.0 * (logits / 4.0).tanh(), case.labels, case.teacher_ids, case.teacher_logprobs,
        ce_weight=case.ce_weight, kl_weight=case.kl_weight, temperature=2.0, tail=tail,
        implementation="reference",
    )  # fmt: skip
    losses.loss.backward(case.upstream.double())
    loss, ce, kl, gradient, *fit = exact(case, softcap=4.0, temperature=2.0, tail=tail)
    torch.testing.assert_close([loss, ce, kl, *fit], [values.detach() for values in losses])
    torch.testing.assert_close(gradient, logits.grad)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_cap_far_above_the_logits_changes_nothing(implementation, seed):
    """Logits that are small beside the cap keep their digits."""
    case = make_case(seed)
    actual = run(case, implementation, softcap=1e6, device=device_of(implementation))
    assert_close(actual, exact(case), case, f"seed {seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the gradient is written forward, backward
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_saturated_gradient_keeps_its_digits(implementation, dtype):
    """1 - (z / c)^2 in fp32 has no correct digit from x = 9 c on. The gradient is not 0 there."""
    ratios = torch.tensor([-40, -12, -10, -6, -1, 0, 0.5, 3, 8, 9.5, 11, 12, 40], dtype=torch.float64)
    softcap, scale = 4.0, 2.0**16  # scale: fp16 has no smaller numbers than 6e-8
    x = (softcap * ratios)[None]
    targets = torch.tensor([11]), torch.tensor([[9, 6, 1]]), torch.tensor([[0.3, 0.2, 0.1]]).log()
    weights = {"ce_weight": torch.ones(1), "kl_weight": torch.ones(1), "tail": "ignore"}
    z = (softcap * ratios.tanh())[None].requires_grad_()
    sparse_kl_cross_entropy(z, *targets, **weights, implementation="reference").loss.backward()
    expected = scale * z.grad / ratios.cosh() ** 2

    device = device_of(implementation)
    leaf = x.to(device, dtype).requires_grad_()
    moved = [target.to(device) for target in targets]
    weights = {name: each if name == "tail" else each.to(device) for name, each in weights.items()}
    loss = sparse_kl_cross_entropy(
        leaf * 1, *moved, **weights, softcap=softcap, implementation=implementation
    ).loss
    (scale * loss).backward()
    rtol, atol = (1e-5, 0) if dtype == torch.float32 else (1e-3, 6e-8)
    gradient = leaf.grad.cpu().double()
    torch.testing.assert_close(gradient[:, 1:-1], expected[:, 1:-1], rtol=rtol, atol=atol)
    assert (gradient[:, [0, -1]].abs() < 1e-20).all()  # of x = 40 c it is below 1e-34


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_masked_column_stays_masked(implementation, seed):
    """-inf gets no probability, as without a cap, and not that of z = -c. +inf is an error of the model."""
    device = device_of(implementation)
    case = make_case(seed, n=8, vocab=20, k=3, padding=0, skipped=False)
    banned = case.logits.new_full((8, 12), -torch.inf)
    wide = replace(case, logits=torch.cat((case.logits, banned), 1), vocab_size=32)
    options = {"softcap": 5.0, "temperature": 2.0}
    loss, ce, kl, gradient, *fit = run(wide, implementation, device=device, **options)
    expected = run(case, implementation, device=device, **options)
    torch.testing.assert_close([loss, ce, kl, *fit], [*expected[:3], *expected[4:]])
    torch.testing.assert_close(gradient[:, :20], expected[3], rtol=1e-5, atol=1e-7)
    assert (gradient[:, 20:] == 0).all()
    infinite = replace(wide, logits=wide.logits.index_fill(1, torch.tensor([25]), torch.inf))
    ce = run(infinite, implementation, device=device, **options)[1]
    assert not ce[case.labels >= 0].isfinite().any()


# --- the largest logits
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "padding", "k", "dtype"),
    # 7: fewer columns than k; 32: all of them; 1003: several tiles
    [(7, 3, 10, torch.float32), (32, 3, 32, torch.float32), (1003, 0, 10, torch.bfloat16)],
)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_largest_of_the_capped_logits(implementation, vocab, padding, k, dtype, seed):
    """Ranked by (capped logit in fp32, lower id), whatever the order of the logits themselves."""
    g, softcap = torch.Generator().manual_seed(seed), 5.0
    x = torch.randn(6, vocab + padding, generator=g) * 6
    x[1] = 100 + torch.rand(vocab + padding, generator=g)  # the cap makes them all equal
    x[2] = 45 + 3 * torch.rand(vocab + padding, generator=g)  # ... or some of them
    x[3] = torch.randn(vocab + padding, generator=g) * 1e-3  # the cap does hardly anything
    x[4, 1::2] = -torch.inf
    x[:, vocab:] = torch.nan
    x, labels = x.to(dtype), torch.randint(vocab, (6,), generator=g)
    device = device_of(implementation)
    options = {"labels": labels.to(device), "vocab_size": vocab, "implementation": implementation}
    found = topk_logsumexp(x.to(device), k, [1.0, 2.0], softcap=softcap, **options)
    ids, logits, relative_lse, label_logits = (values.cpu() for values in found)

    exact_x = x[:, :vocab].double()
    z = exact_x.where(exact_x.isinf(), softcap * (exact_x / softcap).tanh())
    here = min(k, vocab)
    assert (ids[:, here:] == -1).all() and (logits[:, here:] == -torch.inf).all()
    ids, logits = ids[:, :here], logits[:, :here]
    for columns, values in zip(ids.tolist(), logits.tolist(), strict=True):
        ranks = [(-value, column) for value, column in zip(values, columns, strict=True)]
        assert ranks == sorted(set(ranks))
    assert ids[1].tolist() == list(range(here)) and (logits[1] == softcap).all()
    # A few units in the last place of fp32.
    digits = {"rtol": 4e-7, "atol": 1e-10}
    torch.testing.assert_close(logits.double(), z.gather(1, ids), **digits)
    torch.testing.assert_close(logits.double(), z.topk(here, 1).values, **digits)
    torch.testing.assert_close(label_logits.double(), z.gather(1, labels[:, None])[:, 0], **digits)
    relative = z - z.amax(1, keepdim=True)
    lse = torch.stack([relative.logsumexp(1), (relative / 2).logsumexp(1)], 1)
    torch.testing.assert_close(relative_lse.double(), lse, rtol=2e-6, atol=4e-6)
    assert label_logits[1] == softcap
