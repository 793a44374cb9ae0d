"""Plants errors in a copy of fuse_kernels, one at a time, and asks the tests to find each.

    python kernels/checks/mutations.py                   # all, two at a time: 3 minutes on two cores
    python kernels/checks/mutations.py --only triton     # those whose file has this in its name

Prints, for every error, the test that caught it. Exits with 1 where one goes unnoticed, where the text that
it replaces does not occur exactly once (so that the table cannot rot), or where the tests fail without any.
The working tree is only read.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "fuse_kernels"


@dataclass(frozen=True)
class Mutation:
    error: str  # what is wrong then, and what it would do to a training run
    file: str
    old: str
    new: str


MUTATIONS = (
    Mutation(
        "the KL gradient lost its 1 / T: at T = 2 the KL counts double",
        "triton_kernels.py",
        "ce_weight, kl_weight * inv_t, lse_1, lse_t, off_t, total, tail, T_MODE",
        "ce_weight, kl_weight, lse_1, lse_t, off_t, total, tail, T_MODE",
    ),
    Mutation(
        "the student's tail is 1 - M: its digits cancel where the student is nearly certain",
        "triton_kernels.py",
        "    lse_t = _log_add(off_t, on_t)\n",
        "    lse_t = _log_add(off_t, on_t)\n    off_t = lse_t + tl.log(1.0 - tl.exp(on_t - lse_t))\n",
    ),
    Mutation(
        "the label's share of the teacher's tail is taken from all columns, not from those off the ids",
        "triton_kernels.py",
        "tl.exp(z * inv_t - off_t), 0.0)",
        "tl.exp(z * inv_t - lse_t), 0.0)",
    ),
    Mutation(
        "a repeated entry loses its mass: what met on one token in the vocabulary map is dropped",
        "triton_kernels.py",
        "tl.sum(tl.where(same, other_mass[None, :], 0.0), 1)",
        "tl.sum(tl.where(same & (other[None, :] == slot[:, None]), other_mass[None, :], 0.0), 1)",
    ),
    Mutation(
        "a row without weight keeps its logits where the gradient belongs: the NaN of a masked position "
        "spreads",
        "triton_kernels.py",
        "_write_zeros(logits, 0, width, BLOCK, ROUND)",
        "pass",
    ),
    Mutation(
        "the gradient written forward is not multiplied by its upstream gradient",
        "triton_kernels.py",
        "if (upstream == 1.0) | weightless:",
        "if (upstream == upstream) | weightless:",
    ),
    Mutation(
        "the largest logit is sought off the ids alone: student and teacher always agree",
        "triton_kernels.py",
        "        tl.maximum(m, on_largest), likeliest,\n",
        "        on_largest, likeliest,\n",
    ),
    Mutation(
        "the sums of earlier tiles are not rescaled to a new maximum: wrong beyond one tile only",
        "triton_kernels.py",
        "sum_t * scale_t + tl.sum(e_t, 0)",
        "sum_t + tl.sum(e_t, 0)",
    ),
    Mutation(
        "backward begins its masked tile where the part begins: what precedes is rewritten from the gradient",
        "triton_kernels.py",
        "for at in range(whole, last, BLOCK):",
        "for at in range(first, last, BLOCK):",
    ),
    Mutation(
        "forward does not put the logits on the ids back: a reader of the logits finds -inf there",
        "triton_kernels.py",
        "tl.store(LOGITS + row * stride + column, on_ids.to(LOGITS.dtype.element_ty), mask=here)",
        "pass",
    ),
    Mutation(
        "padded columns count in the log-sum-exp: the model learns to avoid tokens that do not exist",
        "triton_loss.py",
        "results, coefficients, logits.stride(0), n, real_columns, width, k,",
        "results, coefficients, logits.stride(0), n, width, width, k,",
    ),
    Mutation(
        "the KL gradient lost its 1 / T: at T = 2 the KL counts double",
        "chunked.py",
        "w_ce, w_kl = rows.ce_weight, rows.kl_weight / temperature",
        "w_ce, w_kl = rows.ce_weight, rows.kl_weight",
    ),
    Mutation(
        "the KL gradient of a backward pass lost its 1 / T",
        "chunked.py",
        "w_kl = upstream.double() * rows.kl_weight / temperature",
        "w_kl = upstream.double() * rows.kl_weight",
    ),
    Mutation(
        "the teacher's tail is spread over one column more than there is",
        "chunked.py",
        "of_tail[part] / sums[1].clamp(min=1.0)",
        "of_tail[part] / (sums[1] + 1.0)",
    ),
    Mutation(
        "the gradient written forward is not multiplied by its upstream gradient",
        "off_ids.py",
        "    if (upstream == 1).all():\n",
        "    if True:\n",
    ),
    Mutation(
        "the teacher's tail is spread over all columns, not over those off the ids: 0.3 of it may become 0.1",
        "chunked.py",
        "(shift_t - statistics.off_t).exp()",
        "(shift_t - statistics.lse_t).exp()",
    ),
    Mutation(
        "the student's tail includes the ids: its mass is always 1",
        "off_ids.py",
        "out[on_ids] = -torch.inf",
        "pass",
    ),
    Mutation(
        "a label among the entries is not seen: the commonest token gets no cross entropy",
        "chunked.py",
        "(p - entries.is_label)",
        "p",
    ),
    Mutation(
        "rows without weight keep their logits where the gradient belongs",
        "chunked.py",
        "logits[skipped] = 0",
        "pass",
    ),
    Mutation(
        "padded columns keep their logits where the gradient belongs",
        "chunked.py",
        "logits[:, shard.columns :] = 0",
        "pass",
    ),
    Mutation(
        "an infinite part without weight is summed: 0 * inf makes the loss NaN",
        "chunked.py",
        "(rows.kl_weight * kl).where(rows.kl_weight != 0, 0.0)",
        "rows.kl_weight * kl",
    ),
    Mutation(
        "of a repeated entry only one keeps its mass: what met on one token in the vocabulary map is dropped",
        "rows.py",
        "torch.zeros_like(mass).scatter_add(",
        "torch.zeros_like(mass).scatter(",
    ),
    Mutation(
        "the weight's gradient is the last chunk's alone",
        "linear.py",
        "of_weight.addmm_(gradient.t(), hidden)",
        "of_weight.copy_(gradient.t() @ hidden)",
    ),
    Mutation(
        "every chunk is weighed by the first chunk's upstream gradient",
        "linear.py",
        "passes.gradient_(logits, upstream[start:stop], state)",
        "passes.gradient_(logits, upstream[: stop - start], state)",
    ),
    Mutation(
        "the weight's gradient is in main_grad and returned as well: Megatron counts it twice",
        "linear.py",
        '_no_gradient(weight) if hasattr(weight, "main_grad") else self.weight.to(weight.dtype)',
        "self.weight.to(weight.dtype)",
    ),
    Mutation(
        "a promise of unit upstream is not checked: gradients of another loss than the caller's",
        "linear.py",
        "(upstream.isfinite() & (upstream != 1)).any()",
        "False",
    ),
    Mutation(
        "the gradient lacks the slope of the cap: capped logits learn as if they could grow",
        "triton_softcap.py",
        "result = gradient * (4.0 * e * inverse * inverse)",
        "result = gradient",
    ),
    Mutation(
        "small logits are capped by the formula for large ones: they lose their digits",
        "triton_softcap.py",
        "tl.where(tl.abs(y) < 0.6, near,",
        "tl.where(tl.abs(y) < 0.0, near,",
    ),
    Mutation(
        "the cap turns a masked column's -inf into -c: a token that is forbidden gets probability",
        "softcap.py",
        ".mul_(softcap).add_(infinite)",
        ".mul_(softcap)",
    ),
    Mutation(
        "the slope of the cap is a difference: it has no digit left where the cap saturates",
        "softcap.py",
        ".cosh_().square_().reciprocal_()",
        ".tanh_().square_().neg_().add_(1)",
    ),
    Mutation(
        "of equal logits the last is kept, not the first",
        "topk.py",
        "<< 32) - numbers",
        "<< 32) + numbers",
    ),
    Mutation(
        "a lane remembers its last largest logit, not its first",
        "triton_topk.py",
        "first_tile = tl.where(tl.max(z, 0) > m, number, first_tile)",
        "first_tile = tl.where(tl.max(z, 0) >= m, number, first_tile)",
    ),
)

_TRITON_TESTS = (
    "tests/kernels/test_triton.py",
    "-k",  # 128256 columns are the first of which interpreted parts have two tiles
    "equal_dense_formula and 97-33-16 and 2.0 or real_vocabularies and bfloat16-128256 or tiny_student_tail "
    "and 30.0 or leaves_the_logits or few_rows and float32 and 2.0",
)
_CHUNKED_TESTS = (
    "tests/kernels/test_sparse_kl.py",
    *(
        "-k",
        "equals_dense_formula and 97-33 and (float32 or float16) or certain_student or masked_logits or "
        "upstream",
    ),
)
# A quick selection for each file: an error counts as caught only by one of these.
TESTS = {
    "triton_kernels.py": _TRITON_TESTS,
    "triton_loss.py": _TRITON_TESTS,
    "chunked.py": _CHUNKED_TESTS,
    "off_ids.py": _CHUNKED_TESTS,
    "rows.py": _CHUNKED_TESTS,
    "linear.py": ("tests/kernels/test_fused_linear.py", "-k", "torch-7-bucket or main_gradient or promise"),
    "softcap.py": ("tests/kernels/test_softcap.py", "-k", "torch and (masked or saturated)"),
    "triton_softcap.py": (
        "tests/kernels/test_softcap.py",
        "-k",
        "triton and (saturated and dtype0 or changes_nothing)",
    ),
    "topk.py": ("tests/kernels/test_topk.py", "-k", "sort and 1003 and torch"),
    "triton_topk.py": ("tests/kernels/test_topk.py", "-k", "sort and 1003 and triton and float16"),
}


def mutated(mutation: Mutation) -> str:
    """The whole text of the mutation's file with the error in it.

    Raises ValueError unless `old` occurs exactly once.
    """
    text = (PACKAGE / mutation.file).read_text()
    found = text.count(mutation.old)
    if found != 1:
        raise ValueError(
            f"{mutation.file} has {mutation.old!r} {found} times, not once. Correct the entry "
            f'"{mutation.error}" in {Path(__file__).name}.'
        )
    return text.replace(mutation.old, mutation.new)


@dataclass(frozen=True)
class Outcome:
    passed: bool
    failed: str | None  # the first test that failed, and why; None too where pytest could not even begin
    output: str


def run_tests(tests: Sequence[str], mutation: Mutation | None = None) -> Outcome:
    """Over a copy of the package, with this error in it or with none."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / PACKAGE.name
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation:
            (copy / mutation.file).write_text(mutated(mutation))
        # PYTHONPATH comes before an editable install. Were it otherwise, every mutation would survive, and be
        # reported.
        settings = {
            "PYTHONPATH": directory,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "240",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
        )
    failed = re.search(r"^FAILED (.*)", done.stdout, re.MULTILINE)
    return Outcome(done.returncode == 0, failed and failed[1], done.stdout + done.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="check only errors in files with this text in their names")
    parser.add_argument("--jobs", type=int, default=2, help="number of test runs at the same time")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.file]
    for mutation in chosen:
        mutated(mutation)  # raises before anything runs

    caught = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(run_tests, dict.fromkeys(TESTS[mutation.file] for mutation in chosen)):
            if not outcome.passed:
                print(f"without any planted error the tests fail:\n{outcome.output}")
                return 1
        outcomes = pool.map(run_tests, [TESTS[mutation.file] for mutation in chosen], chosen)
        for mutation, outcome in zip(chosen, outcomes, strict=True):
            caught += outcome.failed is not None
            print(f"{'caught  ' if outcome.failed else 'SURVIVED'} {mutation.file}: {mutation.error}")
            print(f"         {outcome.failed or outcome.output}", flush=True)
    print(f"{caught} of {len(chosen)} planted errors caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
