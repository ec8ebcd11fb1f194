"""The worker of one build in `benchmarks.cpu_compare`: times decode steps when it is asked to.

It runs as a file, with another checkout's packages in PYTHONPATH: what it imports is that build's.

    {"op": "step", "row": "all distinct", "batch": 8, "keys": 80, "repeats": 2}
    {"op": "exit"}

The answer is ``{"ms": {part: milliseconds}}``, by the build's own `benchmarks.cpu_profile`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Answer requests until ``exit`` or the end of stdin."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="the build's checkout")
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="the largest there will be")
    parser.add_argument("--keys", type=int, required=True)
    parser.add_argument("--instruction-set")
    options = parser.parse_args()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what libraries print is no answer

        def send(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        try:
            step = _stepper(options)
        except Exception as error:
            send({"ready": False, "error": f"{type(error).__name__}: {error}"})
            raise
        send({"ready": True})
        for line in sys.stdin:
            request = json.loads(line)
            if request.pop("op") == "exit":
                break
            send({"ms": step(**request)})
    return 0


def _stepper(options: argparse.Namespace) -> Any:
    """A function of a row's name, the batch, keys and repeats."""
    from fssa_kernels.native import NATIVE as native

    if native is None:
        raise RuntimeError(f"the native kernels of {options.folder} are not built")
    if options.folder.resolve() not in Path(native.__file__).resolve().parents:
        raise RuntimeError(f"expected the kernels of {options.folder}, got {native.__file__}")
    from benchmarks import cpu_profile
    from benchmarks.decode_sides import Ours
    from fssa_runtime.models.language_model import LanguageModel
    from fssa_runtime.threads import set_threads

    if options.instruction_set is not None:
        native.set_instruction_set(options.instruction_set)
    set_threads(options.threads)
    model = LanguageModel.load(options.model, dtype="bfloat16")
    ours = Ours(model, options.batch, 512, max(256, options.keys))
    cpu_profile.fill_caches(ours)

    def step(row: str, batch: int, keys: int, repeats: int) -> dict[str, float]:
        return cpu_profile.profile(ours, row, batch, keys, repeats)

    return step


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # this checkout's modules
    sys.exit(main())
