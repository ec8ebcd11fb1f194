"""Worker: PEFT on transformers in eager mode, every row of the batch through an adapter of its own.

The mixed batch is PEFT's ``adapter_names``: rank 16 on all seven linears, row i through adapter i,
all of it in the faster of bf16 and fp32. Only the forward passes after the prompt, and the choice
of each token, are timed; adapters are loaded when a batch first needs them, outside the clock.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import eager, lora, precision, worker


class Peft:
    name = "peft"

    def __init__(self, model: Path, work: Path, threads: int) -> None:
        import peft
        import torch
        import transformers

        self.folder, self.work = model, work
        loaded, dtype = eager.load(model, threads)
        self.model = peft.PeftModel.from_pretrained(
            loaded,
            str(lora.adapter(model, work, 0)),
            adapter_name="0",
            autocast_adapter_dtype=False,  # or the adapters would be float32 beside bf16
        ).eval()
        self.dtype = getattr(torch, dtype)
        self.model.to(self.dtype)
        self.loaded = 1
        self.version = peft.__version__
        self.settings = {
            "threads": threads,
            "weights": precision.describe(dtype),
            "adapters": f"one a row, r={lora.RANK}, 7 linears",
            "attention": "sdpa",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }

    def decode(self, batch: int, prompt: list[int], new_tokens: int) -> worker.Decoded:
        for index in range(self.loaded, batch):
            self.model.load_adapter(
                str(lora.adapter(self.folder, self.work, index)),
                adapter_name=str(index),
                autocast_adapter_dtype=False,
            )
            self.loaded = index + 1
        self.model.to(self.dtype)
        return eager.decode(self._forward, self._make_cache, batch, prompt, new_tokens)

    def prefill(self, prompt: list[int]) -> worker.Prefilled:
        return eager.prefill(self._forward, self._make_cache, prompt)

    def _forward(self, tokens: Any, cache: Any) -> Any:
        names = [str(row) for row in range(len(tokens))]
        return self.model(
            input_ids=tokens, past_key_values=cache, logits_to_keep=1, adapter_names=names
        )

    def _make_cache(self, batch: int, length: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)


def main() -> int:
    options = worker.parser(__doc__).parse_args()
    return worker.serve(lambda: Peft(options.model, options.work, options.threads))


if __name__ == "__main__":
    sys.exit(main())
