"""The client of the benchmark's peers and the workers' loop, against a worker without a model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import client
from benchmarks.peers.client import PEERS, ROOT, Peer, Spec, available
from benchmarks.peers.play import Ask
from benchmarks.worker_process import WorkerError

MODULE = "tests.benchmarks.fake_peer"
Start = Callable[..., Peer]


def make_environment(folder: Path, *, finished: bool = True) -> None:
    """What setup.sh leaves, with this Python in it."""
    scripts = folder / "fake" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "python").symlink_to(sys.executable)
    if finished:
        (folder / "fake" / client.INSTALLED).write_text("")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start the fake worker in one of its modes."""
    make_environment(tmp_path)

    def begin(mode: str = "good", **arguments: Any) -> Peer:
        marker = ("--marker", str(tmp_path / "marker"))
        spec = Spec("fake", MODULE, ("--mode", mode, *marker))
        monkeypatch.setitem(PEERS, "fake", spec)
        return Peer("fake", model=tmp_path, folder=tmp_path, **arguments)

    return begin


def ask_worker(*lines: str) -> list[dict[str, Any]]:
    """The worker's answers to these lines, the first of them what it says when it is ready."""
    done = subprocess.run(
        [sys.executable, "-m", MODULE, "--model", ".", "--work", "."],
        input="".join(line + "\n" for line in lines),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


REQUEST = {"time": 0.0, "user": 0, "prompt_tokens": [1], "new_tokens": 1}


def serve_line(**changes: Any) -> str:
    """A request to serve, as a line."""
    good = {"op": "serve", "requests": [REQUEST], "concurrency": 1, "step_tokens": 8}
    return json.dumps(good | changes)


def until(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def ended(pid: int) -> bool:
    """Whether the process is soon gone or waits only to be reaped."""

    def gone() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state in "ZX"

    return until(gone)


def test_a_peer_says_what_it_is_and_answers(start: Start) -> None:
    with start(threads=3) as peer:
        assert (peer.name, peer.version) == ("fake", "1.0")
        assert peer.settings == {"threads": 3, "omp": "3"}
        decoded = peer.decode(batch=2, prompt=[5, 6], new_tokens=10)
        assert decoded == (0.5, 20, [[6, 7, 8, 9], [7, 8, 9, 10]])
        assert peer.prefill([5, 6, 7]) == (0.25, 3)


def test_a_peer_serves_requests_as_they_come(start: Start) -> None:
    asked = [Ask(0.0, 4, [5, 6], 2), Ask(0.25, 7, [8], 1)]
    with start() as peer:
        played = peer.serve(asked, concurrency=3, step_tokens=64)
    assert played == (1.0, [[0.5, 1.0], [0.75]], [[3, 64], [7, 8]])


def test_an_answer_that_lacks_a_token_is_refused(start: Start) -> None:
    peer = start("lazy")
    with pytest.raises(WorkerError, match="did not write the tokens"):
        peer.serve([Ask(0.0, 0, [1], 2), Ask(0.0, 0, [1], 2)], concurrency=1, step_tokens=8)
    assert ended(peer._process.pid)


def test_a_peer_that_cannot_batch_continuously_says_so(start: Start) -> None:
    peer = start("alone")
    with pytest.raises(WorkerError, match="fake does not batch continuously"):
        peer.serve([Ask(0.0, 0, [1], 2)], concurrency=1, step_tokens=8)
    assert "packs all requests into one row" in str(available("peft", serving=True))


def test_what_libraries_print_is_no_answer(start: Start, tmp_path: Path) -> None:
    with start("chatty") as peer:
        assert peer.decode(batch=1, prompt=[1], new_tokens=2).tokens == 2
    log = (tmp_path / "work" / "fake.log").read_text()
    for line in ("printed while starting", "printed from Python", "printed from a child"):
        assert line in log


def test_a_closed_peer_has_ended_and_says_so(start: Start) -> None:
    peer = start()
    pid = peer._process.pid
    peer.close()
    peer.close()
    assert peer._process.returncode == 0, "the worker was asked to exit, not killed"
    assert ended(pid)
    with pytest.raises(WorkerError, match="has ended"):
        peer.prefill([1])


def test_an_error_of_the_engine_reaches_the_caller_and_ends_the_worker(start: Start) -> None:
    peer = start("raises")
    with pytest.raises(WorkerError, match=r"decode failed: RuntimeError: no such sequence"):
        peer.decode(batch=1, prompt=[1], new_tokens=1)
    assert ended(peer._process.pid)


def test_a_worker_that_dies_is_reported_with_its_status_and_last_words(start: Start) -> None:
    peer = start("dies")
    with pytest.raises(WorkerError, match=r"ended with status 7(.|\n)*about to die"):
        peer.decode(batch=1, prompt=[1], new_tokens=1)


def test_a_worker_that_hangs_is_ended_with_its_children(start: Start, tmp_path: Path) -> None:
    peer = start("hangs", timeout=2.0)
    with pytest.raises(WorkerError, match=r"no answer within 2 s"):
        peer.decode(batch=1, prompt=[1], new_tokens=1)
    pids = [int(word) for word in (tmp_path / "marker").read_text().split()]
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)


def test_a_busy_worker_ends_after_the_process_that_started_it(tmp_path: Path) -> None:
    make_environment(tmp_path)
    marker = tmp_path / "marker"
    program = f"""
from pathlib import Path
from benchmarks.peers.client import PEERS, Peer, Spec
PEERS["fake"] = Spec("fake", {MODULE!r}, ("--mode", "hangs", "--marker", {str(marker)!r}))
folder = Path({str(tmp_path)!r})
Peer("fake", model=folder, folder=folder).decode(batch=1, prompt=[1], new_tokens=1)
"""
    starter = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        assert until(lambda: marker.exists() and len(marker.read_text().split()) == 2)
    finally:
        starter.kill()
        starter.wait()
    worker, child = map(int, marker.read_text().split())
    try:
        assert ended(worker)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("cannot-start", r"did not start: ImportError: no module named engine"),
        ("slow-start", r"no answer within 2 s"),
        ("silent", r"ended with status 3"),
        ("babbles", r"expected a JSON object, got b'hello, I am no JSON'"),
        ("nameless", r"did not say its settings, version"),
    ],
)
def test_a_worker_that_does_not_start_is_ended(start: Start, mode: str, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        start(mode, start_timeout=2.0 if mode == "slow-start" else 60.0)


def test_an_interrupted_start_leaves_no_worker(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Peer] = []

    def interrupt(peer: Peer, timeout: float) -> None:
        begun.append(peer)
        raise KeyboardInterrupt

    monkeypatch.setattr(Peer, "_receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert ended(begun[0]._process.pid)


def test_an_absent_peer_is_reported_and_never_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEERS, "fake", Spec("fake", MODULE))
    assert "there is no environment" in str(available("fake", folder=tmp_path))
    with pytest.raises(WorkerError, match="there is no environment"):
        Peer("fake", model=tmp_path, folder=tmp_path)
    make_environment(tmp_path, finished=False)
    assert "did not finish" in str(available("fake", folder=tmp_path))
    (tmp_path / "fake" / client.INSTALLED).write_text("")
    assert available("fake", folder=tmp_path) is None


def test_a_name_that_is_no_peer_and_no_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name: expected one of .*'ollama'"):
        available("ollama", folder=tmp_path)
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        Peer("hf", model=tmp_path, folder=tmp_path, threads=0)


def test_every_peer_has_its_worker() -> None:
    for name, spec in PEERS.items():
        assert (ROOT / f"{spec.module.replace('.', os.sep)}.py").is_file(), name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "a request is a line of JSON"),
        ("[1]", "whose op is one of"),
        ('{"op": "train"}', "whose op is one of"),
        ('{"op": "prefill"}', "prefill takes ['op', 'prompt_tokens'], got ['op']"),
        ('{"op": "prefill", "prompt_tokens": []}', "prompt_tokens: expected a list"),
        ('{"op": "prefill", "prompt_tokens": [1, "a"]}', "prompt_tokens: expected a list"),
        ('{"op": "prefill", "prompt_tokens": [1], "seed": 1}', "got ['op', 'prompt_tokens', 's"),
        (
            '{"op": "decode", "batch": 0, "prompt_tokens": [1], "new_tokens": 1}',
            "batch: expected an integer of at least 1, got 0",
        ),
        (
            '{"op": "decode", "batch": 1, "prompt_tokens": [1], "new_tokens": true}',
            "new_tokens: expected an integer of at least 1, got True",
        ),
        (serve_line(concurrency=0), "concurrency: expected an integer of at least 1, got 0"),
        (serve_line(requests=[]), "requests: expected a list of objects, not empty"),
        (serve_line(requests=[1]), "requests: expected objects, got 1"),
        (serve_line(requests=[{"time": 0}]), "a request takes ['new_tokens', 'prompt_tokens', "),
        (serve_line(requests=[REQUEST | {"user": -1}]), "user: expected a number of at least 0"),
        (serve_line(requests=[REQUEST | {"time": "now"}]), "time: expected seconds from 0 on"),
        (
            serve_line(requests=[REQUEST | {"time": 2}, REQUEST | {"time": 1}]),
            "time: expected seconds from 2 on, got 1",
        ),
    ],
)
def test_a_bad_request_gets_an_error_and_the_next_one_its_answer(line: str, message: str) -> None:
    ready, refused, answered = ask_worker(line, '{"op": "prefill", "prompt_tokens": [1, 2]}')
    assert ready["ready"] is True
    assert list(refused) == ["error"]
    assert message in refused["error"]
    assert answered == {"seconds": 0.25, "tokens": 2}


def test_exit_ends_the_loop_and_has_no_answer() -> None:
    assert len(ask_worker('{"op": "exit"}', '{"op": "prefill", "prompt_tokens": [1]}')) == 1
