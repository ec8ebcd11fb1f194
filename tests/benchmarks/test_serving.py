"""The serving benchmark's arithmetic, its loop and its sides, without a model."""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from rich.console import Console

from benchmarks import readme_tables, serving, serving_sides, text_gate
from benchmarks.peers import lora
from benchmarks.peers.client import PEERS, Spec, start
from benchmarks.peers.play import Ask, Played, play
from benchmarks.serving import Benchmark, Served, asks, parse
from benchmarks.serving_sides import ALONE, SIDES, Side
from benchmarks.text_gate import Gate
from benchmarks.worker_process import WorkerError
from fssa_runtime.planning.trace import Arrival
from tests.benchmarks.test_peers import MODULE, make_environment


def ask(time: float = 0.0, user: int = 0, new: int = 3) -> Ask:
    return Ask(time, user, [1, 2], new)


class Stub:
    """An engine of two rows that takes a hundredth of a second for a step."""

    def __init__(self, asked: Sequence[Ask]) -> None:
        self.asked = asked
        self.waiting: list[int] = []
        self.left: dict[int, int] = {}
        self.most = 0

    def step(self) -> list[tuple[int, int]]:
        while self.waiting and len(self.left) < 2:
            index = self.waiting.pop(0)
            self.left[index] = self.asked[index].new_tokens
        self.most = max(self.most, len(self.left))
        time.sleep(0.01)
        made = [(index, 10 * index + left) for index, left in self.left.items()]
        self.left = {index: left - 1 for index, left in self.left.items() if left > 1}
        return made


def test_the_loop_serves_all_and_tells_when_each_token_came() -> None:
    asked = [ask(new=2), ask(new=3), ask(0.2, new=1)]
    stub = Stub(asked)
    played = play(asked, stub.waiting.append, stub.step)
    assert [len(times) for times in played.times] == [2, 3, 1]
    assert played.first_tokens == [[2, 1], [13, 12, 11], [21]]
    assert stub.most == 2
    assert played.times[0] == played.times[1][:2]
    assert 0.01 <= played.times[0][0] <= played.times[0][1] < played.times[1][2] < 0.2
    assert played.times[2][0] >= 0.21, "not before it arrived"
    assert played.seconds >= played.times[2][0]


def test_the_loop_refuses_more_tokens_than_were_asked_for() -> None:
    with pytest.raises(RuntimeError, match="request 0: more than the 1 tokens"):
        play([ask(new=1), ask(new=2)], lambda index: None, lambda: [(0, 5)])


def test_times_become_latencies_and_goodput() -> None:
    asked = [ask(1.0), ask(2.0), ask(3.0)]
    in_time, late_first, late_later = [1.5, 1.6, 1.7], [4.0, 4.1, 4.2], [3.1, 3.2, 4.0]
    played = Played(4.5, [in_time, late_first, late_later], [[1], [1], [1]])
    summary = Served.of(asked, played, ttft=1.0, itl=0.5).summary()
    assert summary["tokens_per_s"] == pytest.approx(2.0)
    assert summary["goodput_per_s"] == pytest.approx(1 / 4.5)
    assert summary["good_share"] == pytest.approx(1 / 3)
    assert summary["ttft_ms_p50"] == pytest.approx(500, rel=0.03)
    assert summary["itl_ms_p99"] == pytest.approx(800, rel=0.03)


def test_one_token_each_has_no_time_between_tokens() -> None:
    summary = Served.of([ask(new=1)], Played(0.5, [[0.5]], [[1]]), 1.0, 1.0).summary()
    assert "ttft_ms_p50" in summary
    assert "itl_ms_p50" not in summary


def test_arrivals_become_requests() -> None:
    arrivals = [Arrival(0.5, 7, 3, 4, 2), Arrival(0.9, 7, 4, 5, 3)]
    first, second = asks(arrivals, 50)
    assert (first.time, first.user, len(first.prompt_tokens), first.new_tokens) == (0.5, 7, 4, 2)
    assert second.user == 7
    assert first.prompt_tokens != second.prompt_tokens[:4]
    waiting = asks(arrivals, 50, waiting=True)
    assert [(one.time, one.user) for one in waiting] == [(0.0, 0), (0.0, 1)]
    assert [one.prompt_tokens for one in waiting] == [first.prompt_tokens, second.prompt_tokens]


def test_bursts_keep_the_rate_and_crowd() -> None:
    spread = {}
    for kind in ("poisson", "bursty"):
        options = parse(["--requests", "4000"])
        times = [a.time for a in serving.trace_of(options, kind, 5.0).arrivals()]
        assert 4000 / times[-1] == pytest.approx(5.0, rel=0.15)
        counts = [0] * (int(times[-1]) + 1)
        for moment in times:
            counts[int(moment)] += 1
        spread[kind] = statistics.variance(counts) / statistics.mean(counts)
    assert spread["poisson"] < 1.3 < 2.5 < spread["bursty"]


def test_users_get_adapters_in_the_order_in_which_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lora.numbers([900, 3, 900, 5]) == [0, 1, 0, 2]
    monkeypatch.setattr(lora, "MAX_ADAPTERS", 2)
    assert lora.numbers([900, 3, 5, 3]) == [0, 1, 0, 1]


class Language(torch.nn.Module):
    """A model whose next token is certain to be the last one plus ``shift``."""

    def __init__(self, shift: int = 1, scale: float = 8.0) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> Any:
        wanted = (tokens + self.shift) % 20
        logits = self.scale * torch.nn.functional.one_hot(wanted, 20).float()
        return type("Output", (), {"logits": logits})


def make_gate() -> Gate:
    gate = Gate.__new__(Gate)
    gate.exact, gate.plain = Language(), Language()
    return gate


def test_the_gate_passes_what_the_weights_would_write_and_nothing_else() -> None:
    gate, prompts = make_gate(), [[1, 2]] * 9
    assert gate.judge(prompts, [[3, 4, 5]] * 9, None) == {"side": 0.0, "plain": 0.0}
    wrong_once = [[3, 4, 5]] * 8 + [[3, 9, 10]]
    with pytest.raises(RuntimeError, match="mean loss"):
        gate.judge(prompts, wrong_once, None)


def test_the_gate_does_not_pass_what_is_not_a_number() -> None:
    gate = make_gate()
    gate.exact = Language(scale=math.nan)
    with pytest.raises(RuntimeError, match="mean loss"):
        gate.judge([[1, 2]], [[3, 4, 5]], None)


def test_the_gate_judges_each_request_under_its_own_weights() -> None:
    gate = make_gate()
    prompts, answers = [[1, 2], [1, 2]], [[3, 4], [4, 6]]

    @contextlib.contextmanager
    def wear(model: Language, index: int) -> Any:
        model.shift = (1, 2)[index]
        yield model
        model.shift = 1

    assert gate.judge(prompts, answers, wear)["side"] == 0.0
    with pytest.raises(RuntimeError):
        gate.judge(prompts, answers, None)


def test_adapters_are_added_to_the_linears_and_taken_back(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = lora.adapter(tmp_path, tmp_path / "work", 3)
    model: Any = torch.nn.Module()
    model.model = torch.nn.Module()
    layer: Any = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([layer])
    layer.self_attn, layer.mlp = torch.nn.Module(), torch.nn.Module()
    for site, (inputs, outputs) in lora._sites(config).items():
        block, name = site.split(".")
        setattr(getattr(layer, block), name, torch.nn.Linear(inputs, outputs, bias=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    delta = tensors[f"{prefix}.lora_B.weight"].float() @ tensors[f"{prefix}.lora_A.weight"].float()
    numbers = [1, 1, 0]
    for index in range(4):
        lora.adapter(tmp_path, tmp_path / "work", index)
    with text_gate._adapted(model, folder):
        changed = layer.mlp.down_proj.weight - before["model.layers.0.mlp.down_proj.weight"]
        torch.testing.assert_close(changed, delta, atol=1e-6, rtol=1e-4)
        assert all(not value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    wear = text_gate.wear_adapters(numbers, tmp_path, tmp_path / "work")
    worn = []
    for index in range(3):
        with wear(model, index):
            worn.append(layer.mlp.up_proj.weight.detach().clone())
    assert worn[0].equal(worn[1])
    assert not worn[0].equal(worn[2])


class Free:
    """A gate that passes everything."""

    def judge(self, prompts: Any, answers: Any, wear: Any) -> dict[str, float]:
        return {"side": 0.0, "plain": 0.0}


def make_benchmark(speeds: dict[str, float], arguments: Sequence[str] = ()) -> Any:
    """Sides that write all tokens at a constant speed; the benchmark and what was called."""
    calls: list[tuple[str, int, bool]] = []

    def side(name: str) -> Side:
        def run(asked: Sequence[Ask], come_back: bool) -> Played:
            calls.append((name, len(asked), come_back))
            if name == "broken":
                raise WorkerError("broken: the worker has ended")
            total, now, times = 0, 0.0, []
            for one in asked:
                now = max(now, one.time)
                times.append([now + (i + 1) / speeds[name] for i in range(one.new_tokens)])
                now, total = times[-1][-1], total + one.new_tokens
            written = [[int(speeds[name])] * one.new_tokens for one in asked]
            return Played(now, times, written)

        return Side(run)

    options = parse(["--requests", "12", "--concurrency", "4", "--rounds", "2", *arguments])
    sides = {name: side(name) for name in speeds}
    console = Console(file=io.StringIO())
    return Benchmark(sides, Free(), 50, options, console), calls  # type: ignore[arg-type]


SPEEDS = {"base only": 1000.0, "one user": 990.0, "all distinct": 980.0, ALONE: 245.0}


def test_sides_take_turns_there_and_back_and_ratios_are_taken() -> None:
    bench, calls = make_benchmark(SPEEDS | {"vllm": 490.0, "broken": 1.0, "llama_cpp": 98.0})
    *_, result = bench.measure()
    assert bench.absent == {"broken": "broken: the worker has ended"}
    closed = calls[len(SPEEDS) + 3 :][:12]
    order = [*SIDES, ALONE, "vllm", "llama_cpp"]
    assert [name for name, _, _ in closed] == [*order, *reversed(order)]
    assert [count for _, count, _ in closed[:6]] == [12, 12, 12, 4, 12, 12]
    assert not any(come_back for _, _, come_back in closed)
    ratios = result["all_distinct_over"]
    assert set(ratios) == {*order} - {"all distinct"}
    assert ratios["vllm"] == pytest.approx(2.0)
    assert ratios["llama_cpp"] == pytest.approx(10.0)
    loads = [(load["arrivals"], load["share_of"]) for load in result["open"]]
    assert loads == [
        ("poisson", "all distinct"),
        ("bursty", "all distinct"),
        ("poisson", "llama_cpp"),
    ]
    assert result["open"][0]["rate"] == pytest.approx(10 * result["open"][2]["rate"])
    assert set(result["open"][0]["sides"]) == {*order} - {ALONE}
    assert all(come_back for _, _, come_back in calls[len(SPEEDS) + 3 + 12 :])


def test_without_peers_there_is_no_load_for_the_slowest_and_a_slow_one_is_cut() -> None:
    arguments = ["--arrivals", "bursty", "--seconds", "0.001"]
    bench, _ = make_benchmark(dict(SPEEDS), arguments)
    *_, result = bench.measure()
    (load,) = result["open"]
    assert load["arrivals"] == "bursty"
    assert load["num_requests"] == 8


def test_a_side_of_ours_that_fails_its_gate_ends_the_benchmark() -> None:
    bench, _ = make_benchmark(dict(SPEEDS) | {"vllm": 490.0})

    class Strict(Free):
        def judge(self, prompts: Any, answers: Any, wear: Any) -> dict[str, float]:
            raise RuntimeError("mean loss")

    bench.gate = Strict()
    with pytest.raises(RuntimeError, match="gate: base only: mean loss"):
        list(bench.measure())


def test_a_peer_that_fails_its_gate_is_absent() -> None:
    bench, _ = make_benchmark(dict(SPEEDS) | {"vllm": 490.0})

    class Picky(Free):
        def judge(self, prompts: Any, answers: Any, wear: Any) -> dict[str, float]:
            if answers[0][0] == 490:
                raise RuntimeError("mean loss")
            return super().judge(prompts, answers, wear)

    bench.gate = Picky()
    *_, result = bench.measure()
    assert bench.absent == {"vllm": "gate: vllm: mean loss"}
    assert "vllm" not in result["closed"]


@pytest.mark.parametrize("loads", [0, 1])
def test_what_was_measured_before_a_peer_died_is_written(
    loads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, _ = make_benchmark(SPEEDS | {"vllm": 490.0})
    measured, opened = bench._open, []

    def died(kind: str, rate: float) -> dict[str, Any]:
        if len(opened) == loads:
            raise WorkerError("vllm: the worker has ended")
        opened.append(kind)
        return measured(kind, rate)

    monkeypatch.setattr(bench, "_open", died)
    monkeypatch.setattr(serving, "Benchmark", lambda *_: bench)
    monkeypatch.setattr(serving, "start", lambda *_, **__: ({}, {"hf": "no environment"}))
    model = SimpleNamespace(folder=tmp_path, decoder=MagicMock())
    monkeypatch.setattr(serving.LanguageModel, "load", lambda *_, **__: model)
    for name in ("Gate", "Ours", "set_threads", "machine"):
        monkeypatch.setattr(serving, name, MagicMock())
    serving.Ours.return_value.slot_costs.return_value = {"find_ms": 0.1, "fill_ms": 0.1}
    serving.machine.return_value = {}
    serving.set_threads.return_value = 2
    file = tmp_path / "new" / "folder" / "serving.json"
    assert serving.main(["--peers", "", "--json", str(file)]) == 1
    record = json.loads(file.read_text())
    assert set(record["closed"]) == {*SPEEDS, "vllm"}
    assert [load["arrivals"] for load in record["open"]] == opened
    assert record["absent"] == {"hf": "no environment"}


def test_peers_that_can_be_run_are_started_and_the_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_environment(tmp_path)
    arguments = ("--marker", str(tmp_path / "marker"))
    for name, mode in (("vllm", "good"), ("hf", "cannot-start")):
        spec = Spec("fake", MODULE, ("--mode", mode, *arguments))
        monkeypatch.setitem(PEERS, name, spec)
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        peers, absent = start(
            ["vllm", "hf", "llama_cpp", "peft"],
            stack,
            model=tmp_path,
            folder=tmp_path,
            serving=True,
            report=said.append,
        )
        assert list(peers) == ["vllm"]
        assert said == ["starting vllm", "starting hf"]
        asked = [ask(0.0), ask(0.1)]
        played = serving_sides.peer_side(peers["vllm"], tmp_path, 4).play(asked, True)
    assert [len(times) for times in played.times] == [3, 3]
    assert set(absent) == {"hf", "llama_cpp", "peft"}
    assert "no module named engine" in absent["hf"]
    assert "no environment" in absent["llama_cpp"]
    assert "one row" in absent["peft"]


@pytest.mark.parametrize("arguments", [["--peers", "ollama"], ["--arrivals", "steady"]])
def test_unknown_words_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert f"{arguments[0]}: expected some of" in capsys.readouterr().err


def test_no_arrivals_are_refused() -> None:
    with pytest.raises(SystemExit):
        parse(["--arrivals", ""])


def settings_of(bench: Benchmark) -> dict[str, Any]:
    return {k: v for k, v in vars(bench.options).items() if not isinstance(v, Path)}


def test_the_readme_table_has_every_side_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, _ = make_benchmark(SPEEDS | {"vllm_lora": 98.0})
    *_, result = bench.measure()
    (tmp_path / "serving.json").write_text(
        json.dumps(
            {
                **result,
                "settings": settings_of(bench),
                "absent": {"hf": "hf: there is no environment"},
            }
        )
    )
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    table = readme_tables.serving()
    assert "98 (10.00×)" in table
    assert "| **ours, every request another user** |" in table
    assert "vLLM on the CPU, a LoRA of its own for each user" in table
    assert "not measured: hf" in table.replace("Not", "not")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[0].count("requests/s") == 3


def test_the_readme_table_says_what_was_asked_and_what_is_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--seconds", "0.1", "--ttft", "2000", "--itl", "70"]
    bench, _ = make_benchmark(SPEEDS, ["--output-tokens", "20", *options])
    asked: dict[tuple[bool, int], list[Ask]] = {}
    for side in bench.sides.values():

        def remember(some: Sequence[Ask], come_back: bool, play: Any = side.play) -> Played:
            asked[come_back, len(some)] = list(some)
            return play(some, come_back)

        monkeypatch.setattr(side, "play", remember)
    *_, result = bench.measure()
    record = {**result, "settings": settings_of(bench), "absent": {}}
    (tmp_path / "serving.json").write_text(json.dumps(record))
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    table = readme_tables.serving()
    waiting = asked[False, 12]
    prompt = statistics.fmean(len(one.prompt_tokens) for one in waiting)
    answer = statistics.fmean(one.new_tokens for one in waiting)
    assert f"have {prompt:.0f} tokens and {answer:.0f} to write on average" in table
    assert round(answer) != 20
    assert "tokens/s, 12 waiting" in table
    assert "the first 4 of them" in table
    for load in result["open"]:
        requests = asked[True, load["num_requests"]]
        assert len(requests) == 8
        assert f"{load['arrivals']}, {len(requests)} at " in table
        assert str(len({one.user for one in requests})) in table.split("of the loads are from")[1]
    assert "first token came within 2,000 ms and every other within 70 ms" in table
