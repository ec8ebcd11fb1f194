"""A worker that serves no model: it answers as its one argument of mode tells it to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.peers import worker
from benchmarks.peers.play import Ask, Played


class Fake:
    name = "fake"
    version = "1.0"

    def __init__(self, mode: str, threads: int, marker: str) -> None:
        self.mode, self.marker = mode, marker
        self.settings: dict[str, Any] = {
            "threads": threads,
            "omp": os.environ.get("OMP_NUM_THREADS"),
        }

    def decode(self, batch: int, prompt: list[int], new_tokens: int) -> worker.Decoded:
        if self.mode == "raises":
            raise RuntimeError("no such sequence")
        if self.mode == "dies":
            print("about to die", file=sys.stderr, flush=True)
            os._exit(7)
        if self.mode == "hangs":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open(self.marker, "w") as file:
                file.write(f"{os.getpid()} {child.pid}")
            time.sleep(600)
        if self.mode == "chatty":
            print("printed from Python", flush=True)
            os.system("echo printed from a child")
        rows = [[(prompt[-1] + row + i) % 100 for i in range(4)] for row in range(batch)]
        return worker.Decoded(0.5, batch * new_tokens, rows)

    def prefill(self, prompt: list[int]) -> worker.Prefilled:
        return worker.Prefilled(0.25, len(prompt))

    def serve(self, asked: list[Ask], concurrency: int, step_tokens: int) -> Played:
        """Every token half a second after the one before; the limits are the first answer's."""
        times = [[ask.time + 0.5 * (i + 1) for i in range(ask.new_tokens)] for ask in asked]
        if self.mode == "lazy":
            times[-1].pop()
        first = [[ask.user, *ask.prompt_tokens] for ask in asked]
        first[0] = [concurrency, step_tokens]
        return Played(max(moments[-1] for moments in times), times, first)


class Alone(Fake):
    """An engine that cannot batch continuously."""

    serve = None  # type: ignore[assignment]


def main() -> int:
    parser = worker.parser("fake")
    parser.add_argument("--mode", default="good")
    parser.add_argument("--marker", default="")
    options = parser.parse_args()

    def start() -> Fake:
        print("printed while starting", flush=True)
        if options.mode == "cannot-start":
            raise ImportError("no module named engine")
        if options.mode == "slow-start":
            time.sleep(600)
        kind = Alone if options.mode == "alone" else Fake
        return kind(options.mode, options.threads, options.marker)

    if options.mode == "silent":
        return 3
    if options.mode == "babbles":
        print("hello, I am no JSON", flush=True)
        time.sleep(600)
    if options.mode == "nameless":
        print('{"ready": true, "name": "fake"}', flush=True)
        time.sleep(600)
    return worker.serve(start)


if __name__ == "__main__":
    sys.exit(main())
