"""Worker: transformers in eager mode, in the faster of bf16 and fp32, the base model.

Only the forward passes after the prompt, and the choice of each token, are timed.

Serving is transformers' own continuous batching, on its paged cache with PyTorch's attention. Its
loop has a thread to itself and keeps the time of each token, on the clock that is read here.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import eager, precision, worker
from benchmarks.peers.play import NUM_FIRST_TOKENS, Ask, Played

PAGE = 32  # tokens; the default of 256 is for attention that reads pages in place


class Transformers:
    name = "hf"

    def __init__(self, model: Path, threads: int, cache: str) -> None:
        import torch
        import transformers

        self.model, dtype = eager.load(model, threads)
        self.cache = cache
        self.version = transformers.__version__
        self.settings = {
            "threads": threads,
            "weights": precision.describe(dtype),
            "attention": "sdpa",
            "cache": cache,
            "serving": f"continuous batching, pages of {PAGE} tokens",
            "torch": torch.__version__,
        }

    def decode(self, batch: int, prompt: list[int], new_tokens: int) -> worker.Decoded:
        return eager.decode(self._forward, self._make_cache, batch, prompt, new_tokens)

    def prefill(self, prompt: list[int]) -> worker.Prefilled:
        return eager.prefill(self._forward, self._make_cache, prompt)

    def serve(self, asked: list[Ask], concurrency: int, step_tokens: int) -> Played:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        longest = max(len(ask.prompt_tokens) + ask.new_tokens for ask in asked)
        batching = ContinuousBatchingConfig(
            max_batch_tokens=step_tokens,
            max_requests_per_batch=concurrency,
            page_size=PAGE,
            num_blocks=concurrency * (longest // PAGE + 1),
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        )
        with self.model.continuous_batching_context_manager(
            # No token ends an answer.
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=batching,
        ) as manager:
            # Its thread makes the cache when it starts.
            manager.add_request([0], request_id="first", max_new_tokens=1)
            self._collect(manager, 1)
            start = time.perf_counter()
            for index, ask in enumerate(asked):
                time.sleep(max(0.0, start + ask.time - time.perf_counter()))
                manager.add_request(
                    ask.prompt_tokens,
                    request_id=str(index),
                    max_new_tokens=ask.new_tokens,
                    record_timestamps=True,
                )
            done = self._collect(manager, len(asked))
        outputs = [done[str(index)] for index in range(len(asked))]
        times = [[moment - start for moment in output.timestamps] for output in outputs]
        first = [list(output.generated_tokens[:NUM_FIRST_TOKENS]) for output in outputs]
        return Played(max(moments[-1] for moments in times), times, first)

    def _collect(self, manager: Any, number: int) -> dict[str, Any]:
        """That many finished answers, by request."""
        done: dict[str, Any] = {}
        while len(done) < number:
            output = manager.get_result(timeout=1.0)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("the thread of continuous batching has ended")
            elif output.error is not None:
                raise RuntimeError(output.error)
            elif output.is_finished():
                done[output.request_id] = output
        return done

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
