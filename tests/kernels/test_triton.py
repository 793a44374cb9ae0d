"""The Triton kernels against the dense formula in fp64: on a GPU compiled, elsewhere interpreted."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from fuse_kernels import sparse_kl_cross_entropy, triton_loss
from sparse_kl_cases import DEVICE, assert_close, exact, make_case, run
from torch.utils.checkpoint import checkpoint

TAILS = ("bucket", "renormalize", "ignore")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHECKS = Path(__file__).resolve().parents[2] / "kernels" / "checks"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What the kernels do not write is NaN, not by luck 0."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def cases():
    """Everything with everything; interpreted it takes minutes, so that a plain run has a part in which
    each value occurs.
    """
    # 97: one masked tile; 1023: rows unaligned; k 1, 33, 128: the smallest, no power of two, the largest
    shapes = [(97, 1, 16), (97, 33, 16), (1023, 10, 16), (1000, 128, 16)]
    # 1, 2, 4: one exponential serves both softmaxes; 3.7: the general road
    for shape, tail, temperature, dtype in product(shapes, TAILS, [1.0, 2.0, 4.0, 3.7], DTYPES):
        usual = [shape == shapes[2], tail == "bucket", temperature == 2.0, dtype == torch.bfloat16]
        # fp16: the gradient is written in the backward pass
        backward = usual == [False, True, True, False] and shape == shapes[1] and dtype == torch.float16
        marks = [] if sum(usual) >= 3 or backward else [pytest.mark.slow]
        values = (*shape, tail, temperature, dtype)
        yield pytest.param(*values, marks=marks, id="-".join(map(str, values)))


@pytest.mark.parametrize(("vocab", "k", "n", "tail", "temperature", "dtype"), cases())
def test_kernels_equal_dense_formula(vocab, k, n, tail, temperature, dtype, seed):
    case = make_case(seed, n=n, vocab=vocab, k=k, dtype=dtype)
    options = {"tail": tail, "temperature": temperature}
    actual = run(case, "triton", device=DEVICE, **options)
    assert_close(actual, exact(case, **options), case, f"seed {seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("temperature", "softcap"), [(2.0, None), (3.7, None), (2.0, 4.0)])
def test_few_rows_are_shared_among_programs(temperature, softcap, dtype, seed, monkeypatch):
    """As where there are fewer rows than processors: the gradient is written forward by the kernels of
    parts of rows.
    """
    launch = triton_loss._launch
    monkeypatch.setattr(triton_loss, "_launch", lambda logits: replace(launch(logits), whole_rows=False))
    case = make_case(seed, n=16, vocab=1003, k=10, dtype=dtype)
    options = {"temperature": temperature, "softcap": softcap}
    actual = run(case, "triton", device=DEVICE, **options)
    assert_close(actual, exact(case, **options), case, f"seed {seed}", softcap=softcap or torch.inf)


def real_vocabularies():
    """Of Llama-2, MPT (padded), Llama-3, Qwen-2 and Gemma: several tiles and splits, some of them
    unmasked.
    """
    plain = [
        (32000, torch.bfloat16),
        (50277, torch.float32),
        (128256, torch.float32),
        (128256, torch.bfloat16),
    ]
    for values in product((32000, 50277, 128256, 151936, 262144), (torch.float32, torch.bfloat16)):
        yield pytest.param(
            *values, marks=[] if values in plain else pytest.mark.slow, id=f"{values[1]}-{values[0]}"
        )


@pytest.mark.parametrize(("vocab", "dtype"), real_vocabularies())
def test_real_vocabularies(vocab, dtype, seed):
    case = make_case(seed, n=16, vocab=vocab, k=10, padding=-vocab % 128, dtype=dtype)
    assert_close(
        run(case, "triton", device=DEVICE, temperature=2.0),
        exact(case, temperature=2.0),
        case,
        f"seed {seed}",
    )


# Far from 1 on both sides: powers of exponentials would overflow.
@pytest.mark.parametrize("temperature", [0.5, 100.0])
def test_extreme_temperatures(temperature, seed):
    case = make_case(seed)
    actual = run(case, "triton", device=DEVICE, temperature=temperature)
    assert_close(actual, exact(case, temperature=temperature), case, f"seed {seed}")


@pytest.mark.parametrize("spike", [0.0, 10.0, 20.0, 30.0])  # the student's tail down to 1e-6 and far below
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_tiny_student_tail_keeps_its_digits(spike, temperature, seed):
    torch.manual_seed(seed)
    n, v, k = 8, 1000, 10
    logits = torch.randn(n, v) * 2
    ids = torch.stack([torch.randperm(v)[:k] for _ in range(n)])
    logits.scatter_add_(1, ids, torch.full((n, k), spike))
    logprobs = (torch.rand(n, k).softmax(1) * 0.7).log()
    weights = {"ce_weight": torch.zeros(n), "kl_weight": torch.ones(n)}
    results = {}
    for name, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        moved = [tensor.to(DEVICE) for tensor in (logits.to(dtype), torch.full((n,), -100), ids, logprobs)]
        options = {key: value.to(DEVICE) for key, value in weights.items()}
        results[name] = sparse_kl_cross_entropy(
            *moved, **options, temperature=temperature, implementation=name
        )[2].cpu()
    torch.testing.assert_close(results["triton"].double(), results["reference"], rtol=1e-5, atol=0)


def test_a_forward_pass_without_gradient_leaves_the_logits_as_they_were(seed):
    case = make_case(seed, dtype=torch.bfloat16)
    logits = case.logits.to(DEVICE)
    before = logits.clone()
    arguments = (logits, case.labels, case.teacher_ids, case.teacher_logprobs)
    weights = {"ce_weight": case.ce_weight.to(DEVICE), "kl_weight": case.kl_weight.to(DEVICE)}
    moved = [tensor.to(DEVICE) for tensor in arguments]
    sparse_kl_cross_entropy(*moved, **weights, vocab_size=case.vocab_size, implementation="triton")
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


def loss_of(logits, case, **options):
    arguments = (tensor.to(DEVICE) for tensor in (case.labels, case.teacher_ids, case.teacher_logprobs))
    weights = {"ce_weight": case.ce_weight.to(DEVICE), "kl_weight": case.kl_weight.to(DEVICE)}
    return sparse_kl_cross_entropy(
        logits, *arguments, **weights, vocab_size=case.vocab_size, implementation="triton", **options
    )[0]


def test_gradient_takes_the_place_of_the_logits_once(seed):
    case = make_case(seed, skipped=False)
    leaf = case.logits.nan_to_num(0.0).to(DEVICE).requires_grad_()
    logits = leaf * 1.0
    loss = loss_of(logits, case).sum()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(
        RuntimeError,
        match='Run the forward pass again, or use implementation="reference"',
    ):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("wrapped", ["compile", "checkpoint", "both"])
def test_under_compile_and_activation_checkpointing(wrapped, seed):
    case = make_case(seed, n=8, vocab=40, k=4, skipped=False)
    torch.manual_seed(seed)
    hidden = torch.randn(len(case.labels), 16, device=DEVICE)
    weight = torch.randn(16, case.logits.shape[1], device=DEVICE)

    def head(hidden, weight):
        return loss_of(hidden @ weight, case, temperature=2.0)

    def step(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        loss = function(*leaves)
        loss.backward(case.upstream.to(DEVICE))
        return loss.detach(), *(leaf.grad for leaf in leaves)

    expected = step(head)
    function = head
    if wrapped != "compile":
        function = lambda *leaves: checkpoint(head, *leaves, use_reentrant=False)  # noqa: E731
    if wrapped != "checkpoint":
        function = torch.compile(function, backend="aot_eager")
    for got, want in zip(step(function), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_operators_keep_the_promises_of_custom_operators(seed):
    case = make_case(seed, n=3, vocab=40, k=4, skipped=False)  # each operator runs many times
    logits = case.logits.nan_to_num(0.0).to(DEVICE)
    arguments = [
        tensor.to(DEVICE)
        for tensor in (
            case.labels,
            case.teacher_ids,
            case.teacher_logprobs.nan_to_num(-1.0).float(),
            case.ce_weight,
            case.kl_weight,
        )
    ]
    loss_of(logits, case)  # defines the operators
    namespace = torch.ops.fuse_kernels
    statistics = (logits, *arguments, 2.0, "bucket", 3.0, case.vocab_size, 0)
    own, weights, teacher, columns, mass, on_ids, label_logit = namespace.statistics(*statistics)
    of_shards = (own[None], teacher, weights, arguments[0], 2.0)
    coefficients = namespace.losses_of_shards(*of_shards)[1]
    upstream = case.upstream.to(DEVICE).float()
    entries = (columns, mass, on_ids, label_logit, arguments[0])
    gradient = (logits.clone(), upstream, weights, coefficients, *entries, 2.0, 3.0, case.vocab_size, 0)
    both = (logits.clone(), *statistics[1:])
    calls = {
        namespace.statistics: statistics,
        namespace.losses_of_shards: of_shards,
        namespace.losses: statistics,
        namespace.gradient_: gradient,
        namespace.losses_and_gradient_: both,
        namespace.scale_: (logits.clone(), upstream, weights),
    }
    # Which poisons what no kernel needs to write, so that runs compare unequal.
    torch.use_deterministic_algorithms(False)
    for operator, given in calls.items():
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator.default, given, test_utils=tests)


def test_too_many_entries_fall_back_with_one_warning(seed):
    case = make_case(seed, n=8, vocab=400, k=129)
    with pytest.warns(
        UserWarning, match="teacher_ids has 129 entries per row, but the Triton kernels take at most 128"
    ):
        actual = run(case, "triton", device=DEVICE)
    assert_close(actual, exact(case), case, f"seed {seed}")


def test_no_rows(seed):
    case = make_case(seed)
    empty = type(case)(*(getattr(case, name)[:0] for name in list(case.__dict__)[:-1]), case.vocab_size)
    loss, ce, kl, gradient, *fit = run(empty, "triton", device=DEVICE)
    assert [len(values) for values in (loss, ce, kl, *fit)] == [
        0
    ] * 6 and gradient.shape == empty.logits.shape


# 80, 90, 100: A100, H100 and H200, B200. A plain run compiles the general way of the temperature, which
# computes both exponentials, for few entries and without a cap.
@pytest.mark.parametrize(
    ("dtype", "capability", "options", "compiled"),
    [
        pytest.param(
            "bf16", 90, ["--modes", "0", "--most-slots", "16", "--without-cap"], 15, id="bf16-90-general"
        ),
        *(
            pytest.param(dtype, capability, [], 80, marks=pytest.mark.slow, id=f"{dtype}-{capability}")
            for dtype, capability in product(["bf16", "fp16", "fp32"], [80, 90, 100])
        ),
    ],
)
def test_compiled_ahead_of_time_nothing_spills_and_loads_are_wide(
    capability, dtype, options, compiled, tmp_path
):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, CHECKS / "ahead_of_time.py", str(capability), "--dtype", dtype, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"kernel"') == compiled


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, ["gather_kernel", "whole_row_kernel", "special_gradient_kernel", "scale_kernel"]),
        (torch.float16, [
            "gather_kernel", "off_ids_kernel", "finish_kernel", "gradient_kernel", "special_gradient_kernel"
        ]),
    ],
)  # fmt: skip
def test_kernels_are_launched_on_the_device_of_their_tensors(dtype, expected, seed, monkeypatch):
    """Triton takes the current device, which need not be that of the logits."""
    within = []

    @contextlib.contextmanager
    def device_of(tensor):
        within.append(tensor)
        yield
        within.pop()

    launched = []
    for name in expected:
        kernel = getattr(triton_loss.kernels, name)

        class Recorded:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                launched.append((self.name, len(within)))
                return self.kernel[grid]

        monkeypatch.setattr(triton_loss.kernels, name, Recorded(kernel, name))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    case = make_case(seed, n=3, vocab=40, k=4, dtype=dtype)
    run(case, "triton", device=DEVICE)
    assert launched == [(name, 1) for name in expected]
