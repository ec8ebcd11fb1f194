"""Worker: transformers in eager mode, bf16, the base model.

Only the forward passes after the prompt, and the choice of each token, are timed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import eager, worker


class Transformers:
    name = "hf"

    def __init__(self, model: Path, threads: int, cache: str) -> None:
        import torch
        import transformers

        self.model, self.cache = eager.load(model, threads), cache
        self.version = transformers.__version__
        self.settings = {
            "threads": threads,
            "weights": "bf16",
            "attention": "sdpa",
            "cache": cache,
            "torch": torch.__version__,
        }

    def decode(self, batch: int, prompt: list[int], new_tokens: int) -> worker.Decoded:
        return eager.decode(self._forward, self._make_cache, batch, prompt, new_tokens)

    def prefill(self, prompt: list[int]) -> worker.Prefilled:
        return eager.prefill(self._forward, self._make_cache, prompt)

    def _forward(self, tokens: Any, cache: Any) -> Any:
        return self.model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)

    def _make_cache(self, batch: int, length: int) -> Any:
        from transformers import DynamicCache, StaticCache

        if self.cache == "dynamic":
            return DynamicCache(config=self.model.config)
        return StaticCache(config=self.model.config, max_cache_len=length)


def main() -> int:
    parser = worker.parser(__doc__)
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    options = parser.parse_args()
    return worker.serve(lambda: Transformers(options.model, options.threads, options.cache))


if __name__ == "__main__":
    sys.exit(main())
