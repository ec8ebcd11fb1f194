"""Start a peer's worker in the peer's environment and ask it for timings. Standard library only.

    with Peer("llama_cpp", model=folder, threads=2) as peer:
        peer.decode(batch=8, prompt=[1, 2, 3], new_tokens=64).seconds

``worker`` says what a timing covers. A peer is measured or it is absent with a reason: nothing
here falls back to another engine or to other settings.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks.peers.play import Ask, Played
from benchmarks.peers.worker import Decoded, Prefilled

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "peers"
INSTALLED = "installed"  # written into an environment by setup.sh when the peer imports
SETUP = "benchmarks/peers/setup.sh"


class Spec(NamedTuple):
    """How a peer is run: its environment, the module in it, and the mode's arguments.

    ``no_serving``: why it cannot batch continuously, or None if it can. ``adapters``: whether it
    gives every user an adapter of `lora`.
    """

    environment: str
    module: str
    arguments: tuple[str, ...] = ()
    no_serving: str | None = None
    adapters: bool = False


PEERS = {
    "llama_cpp": Spec("llama_cpp", "benchmarks.peers.serve_llama_cpp"),
    "llama_cpp_f16": Spec("llama_cpp", "benchmarks.peers.serve_llama_cpp", ("--weights", "f16")),
    "vllm": Spec("vllm", "benchmarks.peers.serve_vllm"),
    "vllm_eager": Spec("vllm", "benchmarks.peers.serve_vllm", ("--eager",)),
    "vllm_lora": Spec("vllm", "benchmarks.peers.serve_vllm", ("--lora",), adapters=True),
    "hf": Spec("hf", "benchmarks.peers.serve_hf"),
    "peft": Spec(
        "peft",
        "benchmarks.peers.serve_peft",
        no_serving="its adapters are one a row of a batch, and transformers' continuous batching "
        "packs all requests into one row; a batch that nobody can join is another thing",
        adapters=True,
    ),
}


class PeerError(RuntimeError):
    """A peer that could not be started or asked. Its process has ended when this is raised."""


def available(name: str, *, folder: Path = FOLDER, serving: bool = False) -> str | None:
    """Why the peer cannot be run from the environments in ``folder``, or None if it can.

    serving: it is to batch continuously, which not every peer can.

    Raises ``ValueError`` for a name that is no peer.
    """
    spec = _spec(name)
    if serving and spec.no_serving is not None:
        return f"{name}: {spec.no_serving}"
    environment = folder / spec.environment
    if not _python(environment).exists():
        return f"{name}: there is no environment {environment}; make it with {SETUP}"
    if not (environment / INSTALLED).is_file():
        return f"{name}: the installation in {environment} did not finish; run {SETUP} again"
    return None


def start(
    names: Sequence[str],
    stack: contextlib.ExitStack,
    *,
    model: Path,
    folder: Path = FOLDER,
    threads: int = 2,
    timeout: float = 600.0,
    serving: bool = False,
    report: Callable[[str], None] = print,
) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that can be run, started, and why the others are absent.

    ``stack`` ends them. ``report`` is told who is being started. The rest is as for `Peer` and
    `available`.
    """
    peers: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    for name in names:
        reason = available(name, folder=folder, serving=serving)
        if reason is None:
            report(f"starting {name}")
            try:
                peers[name] = stack.enter_context(
                    Peer(name, model=model, folder=folder, threads=threads, timeout=timeout)
                )
            except PeerError as error:
                reason = str(error)
        if reason is not None:
            absent[name] = reason
    return peers, absent


class Peer:
    """A running worker. ``name``, ``version`` and ``settings`` are what it said of itself, ``work``
    is where its derived files lie, ``adapters`` is its spec's.

    model: folder with ``config.json`` and bf16 ``model.safetensors``.
    folder: where ``setup.sh`` made the environments.
    work: folder for what the worker derives from the model and for its log; made if absent.
    threads: compute threads of the worker.
    options: further arguments of the worker, such as ``["--flash-attention", "off"]``.
    start_timeout, timeout: seconds to wait for the worker to be ready and for each answer.

    Raises ``PeerError`` if the peer is absent, does not start in time or ends; ``ValueError`` for a
    name that is no peer or a thread count below one.
    """

    def __init__(
        self,
        name: str,
        *,
        model: Path,
        folder: Path = FOLDER,
        work: Path | None = None,
        threads: int = 2,
        options: tuple[str, ...] = (),
        start_timeout: float = 600.0,
        timeout: float = 600.0,
    ) -> None:
        spec = _spec(name)
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        reason = available(name, folder=folder)
        if reason is not None:
            raise PeerError(reason)
        work = folder / "work" if work is None else work
        work.mkdir(parents=True, exist_ok=True)
        self._timeout = timeout
        self._buffer = b""
        self._label = name
        self.work = work
        self.adapters = spec.adapters
        self._log = work / f"{name}.log"
        command = [
            str(_python(folder / spec.environment).absolute()),
            *("-m", spec.module),
            *("--model", str(Path(model).absolute())),
            *("--work", str(work.absolute())),
            *("--threads", str(threads)),
            *spec.arguments,
            *options,
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=_environment(threads),
                start_new_session=True,  # the worker's own children end with it
            )
        self._ended = False
        try:
            ready = self._receive(start_timeout)
            if ready.get("ready") is not True:
                self._fail(f"did not start: {ready.get('error', ready)}")
            missing = {"name", "version", "settings"} - set(ready)
            if missing:
                self._fail(f"did not say its {', '.join(sorted(missing))} when it started")
        except BaseException:  # an interrupt too: nobody else could end the worker
            self._end()
            raise
        self.name: str = ready["name"]
        self.version: str = ready["version"]
        self.settings: dict[str, Any] = ready["settings"]

    def decode(self, batch: int, prompt: list[int], new_tokens: int) -> Decoded:
        """Time ``new_tokens`` greedy steps of ``batch`` sequences that begin with ``prompt``."""
        answer = self._ask(
            {"op": "decode", "batch": batch, "prompt_tokens": prompt, "new_tokens": new_tokens},
            Decoded._fields,
        )
        return Decoded(**answer)

    def prefill(self, prompt: list[int]) -> Prefilled:
        """Time the reading of ``prompt`` by one sequence."""
        answer = self._ask({"op": "prefill", "prompt_tokens": prompt}, Prefilled._fields)
        return Prefilled(**answer)

    def serve(self, asked: Sequence[Ask], concurrency: int, step_tokens: int) -> Played:
        """Have requests, in order of time, answered as they come, by continuous batching."""
        request = {
            "op": "serve",
            "requests": [one._asdict() for one in asked],
            "concurrency": concurrency,
            "step_tokens": step_tokens,
        }
        played = Played(**self._ask(request, Played._fields))
        wanted = [one.new_tokens for one in asked]
        if [len(times) for times in played.times] != wanted:
            self._fail("serve did not write the tokens that were asked for")
        return played

    def close(self) -> None:
        """End the worker: with its consent within ten seconds, without it after."""
        if not self._ended:
            with contextlib.suppress(PeerError):
                self._send({"op": "exit"})
                self._settle(10.0)
        self._end()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
        if self._ended:
            raise PeerError(f"{self._label}: the worker has ended")
        self._send(request)
        answer = self._receive(self._timeout)
        if "error" in answer:
            self._fail(f"{request['op']} failed: {answer['error']}")
        if set(answer) != set(fields):
            self._fail(f"{request['op']} answers {sorted(fields)}, got {sorted(answer)}")
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._fail("the worker takes no requests")

    def _receive(self, timeout: float) -> dict[str, Any]:
        """The next line of the worker, an object; whatever else comes ends the worker."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self._fail(f"no answer within {timeout:g} s")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                self._settle(10.0)
                self._end()
                self._fail(f"the worker ended with status {self._process.returncode}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._fail(f"expected a JSON object, got {line[:200]!r}")
        return answer

    def _fail(self, message: str) -> Any:
        self._end()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        told = "\n    ".join(["", f"last lines of {self._log}:", *lines]) if lines else ""
        raise PeerError(f"{self._label}: {message}{told}")

    def _settle(self, timeout: float) -> None:
        """Wait for the worker to end by itself; not reaped, its group's id stays its own."""
        deadline = time.monotonic() + timeout
        options = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while os.waitid(os.P_PID, self._process.pid, options) is None:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)

    def _end(self) -> None:
        """Kill what is left of the worker and its children, and release the pipes; once."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _spec(name: str) -> Spec:
    if name not in PEERS:
        raise ValueError(f"name: expected one of {sorted(PEERS)}, got {name!r}")
    return PEERS[name]


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"


def _environment(threads: int) -> dict[str, str]:
    """This process's environment for a worker: no hub, one thread count, no foreign modules."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
