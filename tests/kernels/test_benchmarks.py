"""The kernels' benchmark: its command on small shapes, and that it times nothing that is wrong."""

import csv
import dataclasses
import itertools
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"
COMPILED = "dense torch.compile"  # a compiler's run for every shape


@pytest.fixture(autouse=True)
def siblings(monkeypatch):
    """A folder of scripts, which import each other by their file's name.

    What measures a shard leaves a group behind.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def quick_run(tmp_path, monkeypatch):
    """The rows of the command on small shapes; it exits with 1 where a provider is wrong or broken."""

    def run(*options: str) -> list[dict]:
        command = ["run.py", "--quick", "--device", "cpu", "--csv", str(tmp_path / "quick.csv"), *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as finished:
            runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")
        assert finished.value.code == 0
        with (tmp_path / "quick.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return run


def providers(case) -> list:
    from lineup import providers_of

    return providers_of(case, "cpu")


def assert_complete(rows: list[dict], wanted: set[str]) -> None:
    """A row for every case, provider and mode; figures in it unless it says why there are none."""
    from cases import quick_cases

    assert [row["provider"] for row in rows if row["kernel"] == "copy"] == ["torch copy_"]
    found = {(row["kernel"], row["dtype"], row["v"], row["provider"], row["mode"]): row for row in rows}
    expected = []
    for case in quick_cases():
        shape = (case.label, str(case.dtype).removeprefix("torch."), str(case.v))
        chosen = [provider for provider in providers(case) if provider.name in wanted]
        expected += [(p, (*shape, p.name, mode)) for p, mode in itertools.product(chosen, case.modes)]
    assert len(rows) == 1 + len(expected)
    for provider, key in expected:
        row = found[key]
        assert row["note"] == provider.absent
        if not provider.absent:
            assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
            assert float(row["gb_per_s"]) >= 0
            assert float(row["peak_mb"]) >= 0
        assert row["machine"] and row["versions"] and row["date"]


def test_command_reports_every_provider_and_case(quick_run, tmp_path):
    from cases import quick_cases

    wanted = {provider.name for case in quick_cases() for provider in providers(case)} - {COMPILED}
    plots = tmp_path / "plots"
    rows = quick_run("--providers", *sorted(wanted), "--plots", str(plots))
    assert_complete(rows, wanted)
    assert {path.name for path in plots.iterdir()} == {
        f"quick_{kernel}.png"
        for kernel in ("sparse_kl", "sparse_kl_softcap", "sparse_kl_shard", "fused_linear")
    }


@pytest.mark.slow
def test_command_reports_the_compiled_provider(quick_run):
    assert_complete(quick_run("--providers", COMPILED), {COMPILED})


def wrong_temperature(dense, logits, *rest):
    return dense(logits, *rest[:-1], 1.0)


def wrong_labels(dense, logits, labels, *rest):
    return dense(logits, labels.roll(1), *rest)


def wrong_last_row(dense, logits, *rest):
    loss = dense(logits, *rest)
    return torch.cat((loss[:-1], 1.1 * loss[-1:]))


def not_a_number(dense, logits, *rest):
    return dense(logits, *rest) * torch.nan


def broken(dense, logits, *rest):
    raise RuntimeError("no such device")


@pytest.mark.parametrize("mistake", [wrong_temperature, wrong_labels, wrong_last_row, not_a_number, broken])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_provider_is_reported_and_not_timed(mistake, dtype):
    from cases import Case
    from measure import measure
    from providers import Provider, dense, sparse_kl_providers
    from report import result_rows
    from timing import CpuMeter

    case = Case("sparse_kl", 24, 97, 3, 2.0, dtype)
    right = next(p for p in sparse_kl_providers("cpu") if p.name == "dense eager")
    wrong = Provider("wrong", lambda *arguments: mistake(dense, *arguments), right.exact)
    bad, good = measure(case, [wrong, right], CpuMeter(), "cpu", repeats=2)
    assert bad.failed and bad.note and not bad.milliseconds
    assert not good.failed and not good.note and good.milliseconds
    assert [row["provider"] for row in result_rows(case, [bad, good]) if row.get("p50_ms")] == [
        "dense eager"
    ] * 3


@pytest.mark.parametrize("kernel", ["sparse_kl", "fused_linear"])
def test_every_call_meets_the_same_inputs(kernel):
    """A provider may write over its inputs: what comes after it, and its own next call, must not notice."""
    from cases import quick_cases
    from inputs import make_inputs
    from providers import Provider
    from timing import CpuMeter, call_peaks, call_times

    case = next(case for case in quick_cases() if case.kernel == kernel)
    inputs, met = make_inputs(case, "cpu"), []

    def overwriting(*arguments):
        met.append([leaf.detach().clone() for leaf in inputs.leaves])
        loss = sum(leaf.square().sum() for leaf in inputs.leaves)
        for leaf in inputs.leaves:
            leaf.data.fill_(torch.nan)
        return loss

    provider = Provider("overwriting", overwriting, overwriting)
    call_peaks(CpuMeter(), provider, inputs)
    for _ in range(2):
        call_times(CpuMeter(), provider, inputs)
    for leaves in met:
        assert all(map(torch.equal, leaves, inputs.masters))
    assert len(met) == 3


def test_memory_is_what_a_call_adds():
    """Forward keeps `size` bytes; backward takes two such scratch buffers beside it, and the gradient is
    one more.
    """
    from cases import Case
    from inputs import make_inputs
    from providers import Provider
    from timing import CpuMeter, call_peaks

    size = 32 << 20

    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            ctx.kept = torch.ones(size, dtype=torch.uint8)
            return logits.sum(1)

        @staticmethod
        def backward(ctx, upstream):
            scratch = torch.ones(2 * size, dtype=torch.uint8)
            return torch.ones(64, 1000) * scratch[0]

    inputs = make_inputs(Case("sparse_kl", 64, 1000, 4, 2.0, torch.float32), "cpu")
    provider = Provider("known", lambda logits, *_: Known.apply(logits), None)
    forward, backward, both = call_peaks(CpuMeter(), provider, inputs)
    assert forward == pytest.approx(size, abs=size / 4)
    assert backward == both == pytest.approx(3 * size, abs=size / 4)


def test_gpu_marks_are_read_after_the_device_has_finished(monkeypatch):
    """A device that finishes only when waited for: times are differences of its own clock, the flush not
    among them.
    """
    queue, finished = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append(self)

        def elapsed_time(self, other):
            return float(finished.index(other) - finished.index(self))

    class Buffer:
        def zero_(self):
            queue.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (finished.extend(queue), queue.clear()))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Buffer())
    from timing import CudaMeter

    meter = CudaMeter()
    meter.flush()
    marks = [meter.mark()]
    queue.append("forward")
    marks.append(meter.mark())
    queue += ["backward"] * 2
    marks.append(meter.mark())
    assert meter.milliseconds(marks) == [2, 3]  # the work and the mark behind it
    assert finished[0] == "flush"


def test_targets_name_what_is_measured():
    from cases import cpu_cases, gpu_cases

    for case in (*cpu_cases(), *gpu_cases()):
        names = {provider.name for provider in providers(case)}
        for target in case.targets:
            assert target.provider in names
            assert target.against in {"", "logits", "pass"} | names - {target.provider}
            assert target.figure in {"p50_ms", "peak_mb"}


@pytest.mark.parametrize("against, value", [("dense eager", 0.5), ("logits", 0.25), ("", 0.1), ("pass", 2.5)])
@pytest.mark.parametrize("slack", [0.99, 1.01])
def test_a_target_holds_up_to_its_bound(against, value, slack, capsys):
    """ours: 0.1 ms and a quarter of the logits, which a copy moves in 0.04 ms; dense eager: 0.2 ms."""
    from cases import MODES, Case, Target
    from measure import Result
    from report import print_verdicts, verdicts

    target = Target("peak_mb" if against == "logits" else "p50_ms", against, value * slack)
    open_target = Target("p50_ms", "liger CE + sparse KL", 0.0)
    case = Case("sparse_kl", 1000, 1000, 4, 2.0, torch.float32, targets=(target, open_target))
    results = [
        Result(name, milliseconds=dict.fromkeys(MODES, (ms, ms, ms)), peak_bytes=dict.fromkeys(MODES, 10**6))
        for name, ms in (("ours", 0.1), ("dense eager", 0.2))
    ]
    found, absent = verdicts(case, results, copy_rate=case.logits_bytes / 0.04e-3)
    assert found.value == pytest.approx(value) and found.missed == (slack < 1)
    assert absent.value is None and not absent.missed
    print_verdicts([found, absent])
    printed = capsys.readouterr().out
    assert ("MISSED" in printed) == (slack < 1) and "open, not measured" in printed


def test_a_provider_without_memory_is_a_row_and_no_failure():
    from cases import Case
    from measure import measure
    from providers import Provider, sparse_kl_providers
    from timing import CpuMeter

    def large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 78.28 GiB")

    case = Case("sparse_kl", 24, 97, 3, 2.0, torch.float32)
    right = next(p for p in sparse_kl_providers("cpu") if p.name == "dense eager")
    too_large, good = measure(
        case, [Provider("large", large, right.exact), right], CpuMeter(), "cpu", repeats=2
    )
    assert too_large.note == "out of memory" and not too_large.failed and not too_large.milliseconds
    assert good.milliseconds


@pytest.mark.parametrize("mistake", ["ids", "logits", "relative_lse", "label_logits"])
def test_a_wrong_top_k_is_noticed(mistake):
    from cases import Case
    from exactness import TOLERANCES, error_of
    from inputs import make_inputs
    from top_k_providers import top_k_providers

    case = Case("top_k", 24, 97, 3, 2.0, torch.float32)
    inputs = make_inputs(case, "cpu")
    right = next(p for p in top_k_providers(case.k) if p.name.startswith("torch"))

    def wrong(*arguments):
        results = dict(
            zip(("ids", "logits", "relative_lse", "label_logits"), right.loss(*arguments), strict=True)
        )
        results[mistake] = results[mistake].flip(0) if mistake == "ids" else results[mistake] * 1.1
        return tuple(results.values())

    assert error_of(right, inputs) <= TOLERANCES[case.dtype]
    assert not error_of(dataclasses.replace(right, loss=wrong), inputs) <= TOLERANCES[case.dtype]


def test_rows_are_not_mixed_with_other_columns(tmp_path):
    from report import append_csv

    path = tmp_path / "old.csv"
    path.write_text("provider,ms\nours,1\n")
    with pytest.raises(ValueError, match=r"old\.csv has the columns provider,ms"):
        append_csv(path, [{"kernel": "copy"}], "cpu")
    assert path.read_text() == "provider,ms\nours,1\n"
