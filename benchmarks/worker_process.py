"""A process that is asked by lines of JSON and answers by lines of JSON. Standard library only.

    with WorkerProcess("echo", command, log=Path("echo.log")) as worker:
        worker.ask({"op": "decode"})

The process says ``{"ready": true}`` once, or ``{"error": message}``, and answers each request with
one line. What it prints otherwise belongs on its standard error, which is its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

Self = TypeVar("Self", bound="WorkerProcess")


class WorkerError(RuntimeError):
    """A worker that could not be started or asked. Its process has ended when this is raised."""


class WorkerProcess:
    """A running worker. ``ready`` is what it said when it was.

    label: its name in errors. command: what is run, in folder ``cwd`` with ``environment``.
    log: file for its standard error.
    start_timeout, timeout: seconds to wait for the worker to be ready and for each answer.

    Raises ``WorkerError`` if it does not start in time or ends.
    """

    def __init__(
        self,
        label: str,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 600.0,
        timeout: float = 600.0,
    ) -> None:
        self._label = label
        self._timeout = timeout
        self._buffer = b""
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=cwd,
                env=environment,
                start_new_session=True,  # the worker's own children end with it
            )
        self._ended = False
        try:
            self.ready = self._receive(start_timeout)
            if self.ready.get("ready") is not True:
                self._fail(f"did not start: {self.ready.get('error', self.ready)}")
        except BaseException:  # an interrupt too: nobody else could end the worker
            self._end()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        if self._ended:
            raise WorkerError(f"{self._label}: the worker has ended")
        self._send(request)
        answer = self._receive(self._timeout)
        if "error" in answer:
            self._fail(f"{request['op']} failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the worker: with its consent within ten seconds, without it after."""
        if not self._ended:
            with contextlib.suppress(WorkerError):
                self._send({"op": "exit"})
                self._settle(10.0)
        self._end()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, message: Mapping[str, Any]) -> None:
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

    def _fail(self, message: str) -> NoReturn:
        self._end()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        told = "\n    ".join(["", f"last lines of {self._log}:", *lines]) if lines else ""
        raise WorkerError(f"{self._label}: {message}{told}")

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
