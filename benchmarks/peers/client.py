"""Start a peer's worker in the peer's environment and ask it for timings. Standard library only.

    with Peer("llama_cpp", model=folder, threads=2) as peer:
        peer.decode(batch=8, prompt=[1, 2, 3], new_tokens=64).seconds

``worker`` says what a timing covers. A peer is measured or it is absent with a reason: nothing
here falls back to another engine or to other settings.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.play import Ask, Played
from benchmarks.peers.worker import Decoded, Prefilled
from benchmarks.worker_process import WorkerError, WorkerProcess

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
            except WorkerError as error:
                reason = str(error)
        if reason is not None:
            absent[name] = reason
    return peers, absent


class Peer(WorkerProcess):
    """A running worker. ``name``, ``version`` and ``settings`` are what it said of itself, ``work``
    is where its derived files lie, ``adapters`` is its spec's.

    model: folder with ``config.json`` and bf16 ``model.safetensors``.
    folder: where ``setup.sh`` made the environments.
    work: folder for what the worker derives from the model and for its log; made if absent.
    threads: compute threads of the worker.
    options: further arguments of the worker, such as ``["--flash-attention", "off"]``.
    start_timeout, timeout: seconds to wait for the worker to be ready and for each answer.

    Raises ``WorkerError`` if the peer is absent, does not start in time or ends; ``ValueError`` for
    a name that is no peer or a thread count below one.
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
            raise WorkerError(reason)
        work = folder / "work" if work is None else work
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.adapters = spec.adapters
        command = [
            str(_python(folder / spec.environment).absolute()),
            *("-m", spec.module),
            *("--model", str(Path(model).absolute())),
            *("--work", str(work.absolute())),
            *("--threads", str(threads)),
            *spec.arguments,
            *options,
        ]
        super().__init__(
            name,
            command,
            log=work / f"{name}.log",
            cwd=ROOT,
            environment=_environment(threads),
            start_timeout=start_timeout,
            timeout=timeout,
        )
        missing = {"name", "version", "settings"} - set(self.ready)
        if missing:
            self._fail(f"did not say its {', '.join(sorted(missing))} when it started")
        self.name: str = self.ready["name"]
        self.version: str = self.ready["version"]
        self.settings: dict[str, Any] = self.ready["settings"]

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

    def _ask(self, request: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
        answer = self.ask(request)
        if set(answer) != set(fields):
            self._fail(f"{request['op']} answers {sorted(fields)}, got {sorted(answer)}")
        return answer


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
