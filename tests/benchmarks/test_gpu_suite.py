"""The GPU suite without a GPU: its dry run, deadline and gate, and the resources of kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from benchmarks.gate import Judgement, judge
from benchmarks.gpu_resources import Compiled, compile_one, report, thin
from benchmarks.gpu_suite import __main__ as command
from benchmarks.gpu_suite import correctness, targets
from benchmarks.gpu_suite.problems import AttentionProblem, LinearProblem, NormProblem
from benchmarks.gpu_suite.report import headline, write
from benchmarks.gpu_suite.scale import TINY
from benchmarks.gpu_suite.shapes import MODELS
from benchmarks.gpu_suite.suite import OUT_OF_MEMORY, OUT_OF_TIME, Side, Suite
from benchmarks.gpu_suite.timing import Deadline, HostClock
from benchmarks.gpu_suite.workers import spread
from fssa_kernels import explain, modulated_linear, residual_film_rms_norm
from fssa_kernels.gpu.device import KNOWN, NOMINAL
from fssa_kernels.gpu.launch import Launch, collecting, launch, options
from fssa_kernels.gpu.resources import Resources, compile_for, distinct
from fssa_kernels.ops.modulated_linear import api
from fssa_kernels.ops.modulated_linear.triton_config import Config

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="compiles kernels"
)


def run(*arguments: str, module: str = "benchmarks.gpu_suite") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="session")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], str]:
    """(what it printed, results.json, summary.md) of one dry run."""
    folder = tmp_path_factory.mktemp("gpu_suite")
    done = run("--out", str(folder), "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return done.stdout, results, (folder / "summary.md").read_text(encoding="utf-8")


def suite(minutes: float = 1.0) -> Suite:
    return Suite(TINY, HostClock(), Deadline(60 * minutes))


def side(work: Callable[[int], Any] = lambda i: None, **changes: Any) -> Side:
    return Side(work, (1, 1), **changes)


def test_the_dry_run_reaches_every_part(dry):
    _, results, _ = dry
    assert {record["part"] for record in results["records"]} == set(command.SHARES)
    assert set(results["seconds"]) == set(command.SHARES)


def test_every_side_of_the_dry_run_was_timed_and_right(dry):
    _, results, _ = dry
    told = [
        (record["part"], record["key"], name, one["status"])
        for record in results["records"]
        for name, one in {"": {"status": "ok"}, **record["sides"]}.items()
        if (one if name else record).get("status", "ok") != "ok"
    ]
    assert told == []


def test_the_dry_run_times_all_that_a_gpu_would_be_asked(dry):
    _, results, _ = dry
    kinds = {
        side.split()[0]
        for record in results["records"]
        if record["part"] == "linears"
        for side in record["sides"]
    }
    families = {"none", "static", "gated", "core", "factors"}
    assert kinds == families | {"cublas", "multi-lora", "eager", "compiled"}
    ops = {r["key"]["op"] for r in results["records"] if r["part"] == "other ops"}
    assert "modulated_linear" not in ops
    assert len(ops) == 6
    decode = next(r for r in results["records"] if r["part"] == "decode")
    assert set(decode["sides"]) >= {"base only", "nobody", "one user", "all distinct"}


def test_no_figure_of_the_dry_run_can_be_mistaken_for_a_measurement(dry):
    printed, results, summary = dry
    assert results["dry_run"] is True
    assert all(record["dry_run"] for record in results["records"] if record["sides"])
    assert summary.startswith("**DRY RUN")
    assert "DRY RUN" in printed
    for line in (*summary.splitlines(), *printed.splitlines()):
        if not line.startswith("| ") or "---" in line:
            continue
        for cell in line.strip("| ").split(" | "):
            assert not cell.replace(".", "").replace("e-", "").isdigit() or len(cell) < 3, line


def test_every_sample_is_kept(dry):
    _, results, _ = dry
    timed = [
        one for record in results["records"] for one in record["sides"].values() if "time_us" in one
    ]
    assert len(timed) > 100
    assert all(len(one["us"]) == TINY.rounds for one in timed)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_with_no_time_every_row_says_so_and_files_are_written(tmp_path):
    done = run("--out", str(tmp_path), "--dry-run", "--minutes", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {record["part"] for record in results["records"]} == set(command.SHARES)
    assert all(OUT_OF_TIME in record["status"] for record in results["records"])
    assert "not measured" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_the_dry_run_of_the_search_writes_a_table_that_dispatch_reads(tmp_path):
    table = tmp_path / "new" / "table.json"
    arguments = ["--dry-run", "--minutes", "0.05", "--out", str(table)]
    done = run(*arguments, module="benchmarks.gpu_tune")
    assert done.returncode == 0, done.stderr
    (key, found), *_ = json.loads(table.read_text())["modulated_linear"].items()
    assert key.endswith(" m16")
    assert Config(**found["config"]).way in ("fused", "vendor")


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--out", "nowhere", "--only", "limits,nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_time_that_runs_out_in_a_contest_leaves_the_rest_unmeasured():
    running = suite(0.002)
    sides = {"slow": lambda: side(lambda i: time.sleep(0.2)), "late": lambda: side()}

    def slow() -> Side:
        time.sleep(0.2)
        return side()

    record = running.contest("p", {}, {**sides, "slow": slow}, base="slow")
    assert "time_us" in record["sides"]["slow"]
    assert record["sides"]["late"]["status"] == OUT_OF_TIME


def test_a_side_that_fails_leaves_the_others_alone():
    def fails() -> Side:
        raise ValueError("no such thing")

    def too_large() -> Side:
        raise torch.OutOfMemoryError("a lot")

    running = suite()
    sides = {"base": lambda: side(), "fails": fails, "too large": too_large}
    record = running.contest("p", {}, sides, base="base")
    assert record["sides"]["fails"]["status"] == "error: ValueError: no such thing"
    assert record["sides"]["too large"]["status"] == OUT_OF_MEMORY
    assert record["sides"]["base"]["ratio"] == 1.0
    assert record["sides"]["base again"]["ratio"] > 0


def test_a_side_that_is_wrong_is_not_timed():
    called = []
    wrong = side(called.append, check=lambda: Judgement(1.0, 0.1, "off by one"))
    record = suite().contest("p", {}, {"base": lambda: wrong}, base="base")
    assert record["sides"]["base"]["status"] == "wrong: off by one"
    assert "us" not in record["sides"]["base"]
    assert called == []


def test_an_op_that_is_wrong_is_reported_and_none_of_its_rows_is_timed(monkeypatch):
    native = next(b for b in api._OP.backends if b.name == "reference")
    broken = native.run

    def off(*inputs: Any) -> torch.Tensor:
        return broken(*inputs) + 0.5

    position = [backend.name for backend in api._OP.backends].index("triton")
    entry = [*api._OP.backends]
    # Beside a reference that stays right: it is what the judgement holds the others against.
    entry[position] = type(native)("triton", off)
    monkeypatch.setattr(api._OP, "backends", tuple(entry))
    monkeypatch.setattr(
        correctness, "explain", lambda op, **inputs: _only_triton(op == "modulated_linear")
    )
    running = suite()
    correctness.measure(running)
    assert list(running.wrong) == ["modulated_linear"]
    faults = running.records[-1]["faults"]
    assert faults
    assert all(fault["backend"] == "triton" for fault in faults)
    called = []
    record = running.contest(
        "p", {}, {"base": lambda: side(called.append, ops=("modulated_linear",))}, base="base"
    )
    assert record["sides"]["base"]["status"].startswith("wrong: modulated_linear-")
    assert called == []


def _only_triton(can: bool) -> list[Any]:
    from fssa_kernels.dispatch import Verdict

    return [Verdict("triton", can, can, "")]


def test_a_case_that_raises_makes_its_op_wrong(monkeypatch):
    def fails(piece: Any) -> dict[str, str]:
        if piece.op == "sample":
            raise RuntimeError("an illegal memory access was encountered")
        return {"triton": ""}

    monkeypatch.setattr(correctness, "check", fails)
    running = suite()
    correctness.measure(running)
    assert list(running.wrong) == ["sample"]
    assert "illegal memory access" in headline({**_empty(), "records": running.records})


def test_nan_and_errors_beyond_twice_torchs_are_faults():
    exact = torch.randn(5, dtype=torch.float64)
    plain = (exact + 0.01).float()
    assert judge([(exact + 0.019).float()], [plain], [exact]).good
    assert not judge([(exact + 0.022).float()], [plain], [exact]).good
    assert not judge([torch.full((5,), float("nan"))], [plain], [exact]).good
    assert not judge([plain[:4]], [plain], [exact]).good
    assert not judge([torch.tensor([1])], [torch.tensor([2])], [torch.tensor([2])]).good


def test_workers_outlive_a_process_that_dies():
    pieces = [0, 1, 2, "die", 4]
    results = list(spread(_work, pieces, 2, Deadline(120)))
    assert {index: result for index, result, why in results if not why} == {
        0: 0,
        1: 10,
        2: 20,
        4: 40,
    }
    assert [(index, why) for index, _, why in results if why] == [
        (3, "error: the process ended with 7")
    ]


def test_workers_stop_at_the_deadline():
    results = list(spread(_work, ["sleep"], 1, Deadline(0.5)))
    assert results == [(0, None, OUT_OF_TIME)]


def _work(piece: Any) -> Any:
    if piece == "die":
        os._exit(7)
    if piece == "sleep":
        time.sleep(60)
    return 10 * piece


def test_ratios_are_taken_round_by_round():
    sides = {"a": {"us": [1.0, 10.0, 3.0], "time_us": 3.0}, "b": {"us": [1, 5, 2], "time_us": 2.0}}
    record = {"part": "decode", "key": {}, "sides": sides}
    assert targets.quotient(record, "a", "b") == 1.5
    assert targets.quotient(record, "a", "c") is None


def test_a_target_nobody_measured_reads_not_measured(tmp_path):
    write(tmp_path, _empty())
    lines = (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if "| ≤" in line or "| ≥" in line]
    assert len(table) == len(targets.targets())
    assert all("not measured" in line for line in table)


def _empty() -> dict[str, Any]:
    names = ("device", "capability", "driver", "torch", "triton", "commit")
    return {"dry_run": False, "limits": {}, "records": [], **dict.fromkeys(names, "some")}


@pytest.mark.parametrize("family", ["none", "static", "gated", "core", "factors"])
def test_problems_are_built_on_meta_and_never_hold_zeros_for_users(family):
    problem = LinearProblem(MODELS["tiny"].linears["qkv"], 7, family, 4, 3)
    meta = problem.inputs("meta", torch.bfloat16)
    real = problem.inputs("cpu", torch.bfloat16)
    assert meta.keys() == real.keys()
    for name, value in real.items():
        if isinstance(value, torch.Tensor):
            assert (meta[name].shape, meta[name].dtype) == (value.shape, value.dtype)
            assert value.any()
    if family in ("gated", "core"):
        assert real["slots"].unique().tolist() == [1, 2, 3]
        assert not real["rows"][0].any()


@triton.jit
def spilling_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    """Every value is needed again after the sum of all, and there are too many for registers."""
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + c).to(tl.float32)
    tl.store(out_ptr + c, x * tl.sum(x))


@triton.jit
def modulated_linear_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    """By its name it should use tensor cores; it does not."""
    c = tl.arange(0, BLOCK)
    tl.store(out_ptr + c, tl.load(x_ptr + c) + 1)


def special(kernel: Any, block: int, dtype: torch.dtype) -> Any:
    x = torch.empty(block, dtype=dtype, device="meta")
    arguments = {"out_ptr": x, "x_ptr": x, "BLOCK": block}
    return distinct([Launch(kernel, (1,), arguments, 1, 1)])[0]


def test_kernels_are_launched_as_they_are_compiled_ahead_of_time():
    given = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: given.update(arguments)

    x = torch.zeros(1)
    launch(Kernel(), (1,), {"x": x}, num_warps=8, num_stages=2)
    assert given == {"x": x, **options(8, 2)}


def test_a_kernel_that_spills_is_at_fault(capsys):
    compiled = compile_one(special(spilling_kernel, 16384, torch.float32), 80)
    assert compiled.error == ""
    assert compiled.resources.stack_bytes > 0
    assert report([compiled], 0) == 1
    told = capsys.readouterr()
    assert "spilling_kernel BLOCK=16384" in told.err
    assert "spills" in told.err
    assert "1 spill" in told.out


def test_a_product_without_tensor_cores_is_at_fault_in_half_precision_only(capsys):
    half, single = (
        compile_one(special(modulated_linear_kernel, 128, dtype), 90)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half.faults() == ["uses no tensor cores"]
    assert single.faults() == []
    assert report([single], 0) == 0
    assert report([half, single], 0) == 1
    assert "uses no tensor cores" in capsys.readouterr().err


def test_too_much_shared_memory_and_what_does_not_compile_are_faults():
    limit = NOMINAL[80].shared_bytes
    taken = Resources(32, 0, limit + 1, "mma")
    assert "shared memory" in Compiled("k", "", 80, True, taken).faults()[0]
    assert Compiled("k", "", 90, True, taken).faults() == []
    assert "does not compile: why" in Compiled("k", "", 80, True, None, "why").faults()[0]


@pytest.mark.parametrize("low_rank", [100, 192])
def test_a_norm_with_factors_in_fp32_fits_a_gpu_with_little_shared_memory(low_rank):
    device = KNOWN[89]
    inputs = NormProblem(64, 4096, low_rank=low_rank).inputs("meta", torch.bfloat16)
    for name in ("lora_a", "gates"):
        inputs[name] = inputs[name].float()
    with collecting(device) as launches:
        residual_film_rms_norm(**inputs, backend="triton")
    (only,) = distinct(launches)
    assert only.name == "norm_shrink_kernel"
    taken = compile_for(only, device.capability)
    assert taken.shared_bytes <= device.shared_bytes
    assert taken.stack_bytes == 0


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_a_linear_with_factors_in_fp32_fits_the_shared_memory(num_tokens):
    device = NOMINAL[90]
    problem = LinearProblem(MODELS["llama-8b"].linears["gate_up"], num_tokens, "static", 128, 1)
    inputs = problem.inputs("meta", torch.bfloat16)
    for name in ("lora_a", "lora_b"):
        inputs[name] = inputs[name].float()
    with collecting(device) as launches, torch.no_grad():
        modulated_linear(**inputs, backend="triton")
    for one in distinct(launches):
        assert compile_for(one, device.capability).shared_bytes <= device.shared_bytes


@pytest.mark.parametrize(
    ("dtype", "head_dim", "most"),
    [(torch.float32, 128, 64), (torch.float32, 192, 32), (torch.bfloat16, 192, 64)],
    ids=str,
)
def test_more_heads_of_a_kv_head_than_registers_hold_are_left_to_others(dtype, head_dim, most):
    def verdict(group):
        inputs = AttentionProblem(1, 1, 64, group, 1, head_dim).inputs("meta", dtype)
        with collecting(NOMINAL[80]):
            verdicts = explain("paged_attention", **inputs)
        return next(v.reason for v in verdicts if v.backend == "triton")

    assert f"takes at most {most}" in verdict(most + 1)
    assert "share a KV head" not in verdict(most)


def test_thinning_keeps_every_tile_and_is_always_the_same():
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    specials = [special(spilling_kernel, b, dtype) for b in (64, 128, 256) for dtype in dtypes]
    for most, left in ((0, 3), (4, 4), (100, 9)):
        kept = thin(specials, most)
        assert len(kept) == left
        assert {dict(one.constants)["BLOCK"] for one in kept} == {64, 128, 256}
        assert kept == thin(specials, most)
    # The types take turns, so that none is left out everywhere.
    assert len({one.signature[0] for one in thin(specials, 0)}) == 3
