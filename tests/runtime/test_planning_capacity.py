"""``fssa plan``: step times, the rate that holds, the command, and what is refused."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fssa_runtime.cli import main
from fssa_runtime.errors import InputError
from fssa_runtime.planning.capacity import PRECISION, Service, find_rate, holds
from fssa_runtime.planning.machine import MACHINES, Machine, Roofline, Step
from fssa_runtime.planning.measured import read_measured
from fssa_runtime.planning.memory import MemoryPlan
from fssa_runtime.planning.result import Objectives, Result
from fssa_runtime.planning.shapes import model_size
from fssa_runtime.planning.trace import Lengths

from .models import write_model
from .planned import RESULTS, SMOLLM, SimpleTime, trace


def test_roofline_by_hand() -> None:
    model = model_size("llama-8b", 16)
    machine = Machine("toy", bytes_per_s=1e12, flop_per_s=1e15, memory_bytes=80e9, source="")
    roofline = Roofline(model, machine, overhead_s=0.001)
    linears = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 32 * 16 * 81920
    head = 128256 * 4096
    one = roofline.terms(Step(1, 0, 100, 100))
    assert one["weights"] == pytest.approx(2 * (linears + head) / 1e12)
    assert one["attention"] == pytest.approx(100 * 131072 / 1e12)
    assert (one["products"], one["refills"], one["overhead"]) == (0, 0, 0.001)
    prompt = roofline.terms(Step(0, 8192, 8192, 8192 * 8193 // 2))
    assert prompt["weights"] == 0
    assert prompt["products"] == pytest.approx((8192 * 2 * linears + 2 * head) / 1e15)
    assert prompt["attention"] == pytest.approx(4 * 32 * 4096 * 8192 * 8193 / 2 / 1e15)
    refills = roofline.terms(Step(1, 0, 1, 1, refills=3))["refills"]
    assert refills == pytest.approx((3 * 14336 + 3584 * 17 * 4) / 1e12)
    assert MACHINES["h100"].bytes_per_s == 3.35e12


def test_measured_decoding_gives_back_what_was_measured() -> None:
    file, model = RESULTS / "decode.json", model_size(SMOLLM, 16)
    found = json.loads(file.read_text())
    measured = read_measured(file, model, MACHINES["h100"], 16)
    assert measured.basis == "measured"
    for batch in (1, 8, 32):
        keys = batch * (found["prompt_tokens"] + found["new_tokens"] // 2)
        rate = found["summary"]["decode"][str(batch)]["all distinct"]["tokens_per_s"]
        assert sum(measured.terms(Step(batch, 0, keys, keys)).values()) == pytest.approx(
            batch / rate
        )
    length = found["prefill_tokens"]
    step = Step(0, length, length, length * (length + 1) // 2)
    rate = found["summary"]["prefill"]["all distinct"]["tokens_per_s"]
    assert sum(measured.terms(step).values()) == pytest.approx(length / rate)
    lines = {n: measured.terms(Step(n, 0, 0, 0))["step"] for n in (1, 8, 20, 32, 512, 992)}
    assert lines[20] == pytest.approx((lines[8] + lines[32]) / 2)
    assert lines[992] == pytest.approx(2 * lines[512] - lines[32])


@pytest.mark.parametrize("with_between", [True, False])
def test_measured_profile(tmp_path: Path, with_between: bool) -> None:
    file, model = tmp_path / "profile.json", model_size(SMOLLM, 16)
    found = json.loads((RESULTS / "profile_avx2.json").read_text())
    for name in ("model", "rank"):
        found.pop(name, None)
    between = found["between_steps"] if with_between else found.pop("between_steps")
    file.write_text(json.dumps(found))
    measured = read_measured(file, model, MACHINES["h100"], 16)
    parts = found["steps"]["32"]["all distinct"]
    terms = measured.terms(Step(32, 0, 32 * found["keys"], 32 * found["keys"]))
    besides = statistics.median(between["32"]["all distinct"]) if with_between else 0.0
    assert sum(terms.values()) == pytest.approx(1e-3 * (sum(parts.values()) + besides))
    assert any("time between the steps" in note for note in measured.notes) is not with_between
    assert terms["attention"] == pytest.approx(1e-3 * parts["paged_attention"])
    for name in ("model", "rank"):
        assert any(f"does not name its {name}" in note for note in measured.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected what"),
        ('{"steps": {}}', "ValueError|at least two|ZeroDivision"),
        ('{"steps": {"1": {}}, "keys": 80}', "all distinct"),
        ('{"summary": {"decode": {}}}', "raw"),
        ('{"model": "llama", "steps": {}}', "measured with llama"),
        ('{"rank": 8, "steps": {}}', "rank 8"),
    ],
)
def test_measured_files_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "measured.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        read_measured(file, model_size(SMOLLM, 16), MACHINES["h100"], 16)


def service(**changes: Any) -> Service:
    memory = MemoryPlan(0, 0, 0, 0, 1, 1000, 1000, 1, 16, 1000)
    options: dict[str, Any] = {
        "memory": memory,
        "step_time": SimpleTime(),
        "objectives": Objectives(1.0, 0.5),
        # Twenty tokens of prompt and eleven steps: 0.13 s alone.
        "trace": trace(
            num_requests=2000,
            continued=0.0,
            prompt=Lengths(20, 20, 0.0),
            output=Lengths(11, 11, 0.0),
        ),
        "max_streams": 1,
        "max_tokens": 100,
        "max_length": 600,
    }
    return Service(**{**options, **changes})


def test_the_rate_that_is_found_holds_and_a_larger_one_does_not() -> None:
    tried: list[float] = []
    rate, result = find_rate(service(), lambda rate: tried.append(rate))
    assert holds(result)
    # One stream at a time: 7.7 a second at most (refills take a little), less for waiting.
    assert 3 < rate < 1 / 0.13
    assert not holds(service().run(PRECISION**2 * rate))
    assert rate in tried


def test_requests_that_may_all_come_at_once_tell_no_rate() -> None:
    with pytest.raises(InputError, match="requests: expected more than 2 to look for a rate"):
        find_rate(service(trace=trace(num_requests=2)), lambda rate: None)


def test_no_rate_holds_an_impossible_objective() -> None:
    rate, result = find_rate(service(objectives=Objectives(0.02, 0.5)), lambda rate: None)
    assert not holds(result)
    # What a request takes alone is told, of all of them.
    assert rate < 0.01
    assert result.requests == 2000
    assert result.ttft.min == pytest.approx(0.030)


def test_a_run_that_fails_stops_early() -> None:
    result: Result = service().run(1000.0, stop_early=True)
    assert result.stopped
    assert not holds(result)
    assert result.requests < 200


MEASURED = ["--measured", str(RESULTS / "decode.json")]


def plan(*more: str, model: str = SMOLLM, machine: str = "h100") -> int:
    return main(["plan", "--model", model, "--machine", machine, *more])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.json", tmp_path / "deep" / "b.json"]
    for file in files:
        assert plan("--rate", "30", "--requests", "200", "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert out.strip("\n") + "\n" == out  # a bar would leave an empty line
    assert "roofline" in out
    assert "1,000,000 of 1,000,000 users are resident" in out
    found = [json.loads(file.read_text()) for file in files]
    for one in found:
        del one["served"]["scheduler_s_per_step_here"]
    assert found[0] == found[1]
    assert found[0]["basis"]["step_times"] == "roofline"
    assert found[0]["served"]["requests"] == 200
    assert found[0]["users"]["resident"] == 10**6


def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "[old]:bug:")
    options = ["--rate", "30", "--requests", "20", "--max-length", "64"]
    options += ["--output-tokens", "8", "--prompt-tokens", "8"]
    assert plan(*options, model=str(folder)) == 0
    assert str(folder) in capsys.readouterr().out.replace("\n", "")


def test_a_folder_for_the_json_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--json", str(tmp_path), model="no-such-model") == 1
    assert "cannot be written: Is a directory" in capsys.readouterr().err


def test_the_command_with_measured_steps_looks_for_a_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At rates of the test's own: what is measured next may hold all 60 requests at once.
    found = json.loads((RESULTS / "decode.json").read_text())
    for batch, rate in {"1": 137.0, "8": 863.0, "32": 1116.0}.items():
        found["summary"]["decode"][batch]["all distinct"]["tokens_per_s"] = rate
    found["summary"]["prefill"]["all distinct"]["tokens_per_s"] = 1335.0
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps(found))
    options = ["--bandwidth-gb-s", "40", "--tflops", "0.4", "--memory-gb", "8"]
    options += ["--measured", str(measured), "--requests", "60", "--users", "1000"]
    options += ["--max-streams", "16", "--step-tokens", "64", "--json", str(tmp_path / "a.json")]
    options += ["--output-tokens", "16", "--prompt-tokens", "16"]
    assert plan(*options, machine="custom") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["basis"]["step_times"] == "measured"
    assert found["served"]["holds"]
    assert found["machine"]["source"] == "as given"
    assert "too short to tell" in capsys.readouterr().out
    assert plan(*options, "--ttft", "0.001", machine="custom") == 0
    assert "no rate holds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "0"], "--rate: expected more than 0"),
        (["--rate", "-1"], "--rate: expected more than 0"),
        (["--memory-gb", "0.25"], "does not fit"),
        (["--memory-gb", "0"], "memory of the machine: expected more than 0"),
        (["--bandwidth-gb-s", "nan"], "bandwidth of the machine"),
        (["--users", "0"], "num_users"),
        (["--requests", "0"], "num_requests"),
        (["--rank", "0"], "rank: expected at least 1"),
        (["--prompt-tokens", "0"], "--prompt-tokens: expected 1"),
        (["--output-tokens", "100000"], "--output-tokens: expected 1"),
        (["--max-length", "100000"], "--max-length: expected 2 to 8192"),
        (["--max-length", "0"], "--max-length: expected 2 to 8192"),
        (["--max-streams", "0"], "streams of a step"),
        (["--max-streams", "64", "--step-tokens", "32"], "streams of a step"),
        (["--page-size", "0"], "page"),
        (["--slots", "3"], "fewer than the 256 streams"),
        (["--ttft", "0"], "objective"),
        (["--overhead-ms", "-1"], "overhead"),
        (["--measured", "/nowhere.json"], "No such file"),
        ([*MEASURED, "--overhead-ms", "500"], "--overhead-ms: expected none beside --measured"),
        ([*MEASURED, "--overhead-ms", "0"], "--overhead-ms: expected none beside --measured"),
        ([*MEASURED, "--tflops", "500"], "--tflops: expected none beside --measured"),
        (["--memory-gb", "0.5", "--users", "256", "--max-length", "8192"], "the longest request"),
    ],
)
def test_the_commands_errors(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--rate" not in options:
        options = [*options, "--rate", "1"]
    assert plan("--requests", "10", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("fssa: error:")
    assert message in error


def test_models_and_machines_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(model="nothing") == 1
    assert "llama-8b" in capsys.readouterr().err
    assert plan(machine="custom") == 1
    assert "--bandwidth-gb-s" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan(machine="abacus")
