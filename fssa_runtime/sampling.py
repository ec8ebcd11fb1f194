"""How the tokens of an answer are chosen, and when it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .checks import require_int, require_ints, require_number
from .errors import InputError

# What one request may ask for: each of these costs the others of its batch time or memory.
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_LOGIT_BIASES = 1000
MAX_GRAMMAR_LENGTH = 100_000
# What the buffers of a step hold, and what no random generator needs more of.
MAX_TOP_K = 2**31 - 1
SEED_BITS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when an answer ends.

    With the model's logits l, counts c of a token in the answer so far, and s = 1 for tokens of the
    prompt or the answer: l is divided by ``repetition_penalty`` where s = 1 and l > 0, multiplied
    by it where s = 1 and l < 0; then ``frequency_penalty``·c and ``presence_penalty``·[c > 0] are
    taken away, ``logit_bias`` is added, and tokens that may not come are ruled out. What
    temperature, top_k, top_p and min_p do then is written in `fssa_kernels.sample`.
    Log-probabilities that are reported are the model's own, before all of this.

    Args:
        max_tokens: tokens of the answer at most; None for as many as fit.
        temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
        seed: makes a sampled answer repeatable, whatever else is in the batch.
        repetition_penalty: above 0; 1 is off (arXiv 1909.05858).
        presence_penalty, frequency_penalty: 0 is off.
        logit_bias: added to the logits of these token ids; minus infinity rules a token out.
        stop: a string or several; the answer ends where the first of them would begin.
        stop_token_ids: tokens that end an answer, beside the model's own.
        ignore_eos: the model's own stop tokens do not end it.
        min_tokens: before these are written neither stop tokens nor stop strings end it.
        top_logprobs: so many of the likeliest tokens are reported beside each one chosen.
        prompt_logprobs: the prompt's own tokens are scored, with so many of the likeliest beside
            each; None does not. The prompt is computed anew, whatever is cached.
        json_schema, regex, lark: only text that obeys is written: a JSON schema (a mapping, a
            boolean or their JSON text), a regular expression, or a grammar in Lark's notation; at
            most one of them. An answer cut off by ``max_tokens`` is a beginning of such a text.

    Raises:
        InputError: a value out of range or of the wrong type, named.
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    lark: str | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._own("stop", stop, Collection, tuple)
        self._own("stop_token_ids", self.stop_token_ids, Collection, tuple)
        self._own("logit_bias", self.logit_bias, Mapping, dict)
        self._check_draw()
        self._check_end()
        self._check_logits()
        self._check_report()
        self._check_grammar()

    @property
    def edits_logits(self) -> bool:
        """Whether a token is not chosen from the model's logits as they are."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
            or self.grammar
        )

    @property
    def grammar(self) -> tuple[str, str] | None:
        """What a text has to obey, as (kind, its text), or None."""
        for kind in ("json_schema", "regex", "lark"):
            value = getattr(self, kind)
            if value is not None:
                return kind, value if isinstance(value, str) else json.dumps(value)
        return None

    def _own(self, name: str, value: object, kind: type, copy: Callable[[Any], object]) -> None:
        """Keep a copy, so that what the caller does with the original changes no request."""
        if not isinstance(value, kind):
            raise InputError(
                f"{name}: expected a {kind.__name__.lower()}, got {type(value).__name__}"
            )
        object.__setattr__(self, name, copy(value))

    def _check_draw(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            require_number(name, getattr(self, name))
        require_int("top_k", self.top_k)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be finite and >= 0, got {self.temperature}")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise InputError(
                f"top_k must be >= 0 (0 is off) and at most {MAX_TOP_K}, got {self.top_k}"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.seed is not None:
            require_int("seed", self.seed)
            if self.seed.bit_length() > SEED_BITS:
                raise InputError(f"seed must be a number of at most {SEED_BITS} bits, got more")

    def _check_end(self) -> None:
        if self.max_tokens is not None:
            require_int("max_tokens", self.max_tokens)
            if self.max_tokens < 1:
                raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}")
        require_int("min_tokens", self.min_tokens)
        require_ints("stop_token_ids", self.stop_token_ids)
        most = math.inf if self.max_tokens is None else self.max_tokens
        if not 0 <= self.min_tokens <= most:
            raise InputError(f"min_tokens must be in 0..max_tokens, got {self.min_tokens}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InputError(f"stop: at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise InputError(
                    f"stop: expected strings of 1 to {MAX_STOP_LENGTH} characters, got "
                    f"{f'one of {len(text)}' if isinstance(text, str) else type(text).__name__}"
                )

    def _check_logits(self) -> None:
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            require_number(name, getattr(self, name))
        require_ints("tokens of logit_bias", self.logit_bias)
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(
                f"repetition_penalty must be finite and above 0, got {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be finite, got {getattr(self, name)}")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InputError(
                f"logit_bias: at most {MAX_LOGIT_BIASES} tokens, got {len(self.logit_bias)}"
            )
        for token, bias in self.logit_bias.items():
            require_number(f"logit_bias of token {token}", bias)
            if not (math.isfinite(bias) or bias == -math.inf):
                raise InputError(f"logit_bias of token {token} must be a number, got {bias}")

    def _check_report(self) -> None:
        for name in ("top_logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                require_int(name, value)
                if not 0 <= value <= MAX_TOP_LOGPROBS:
                    raise InputError(f"{name} must be in 0..{MAX_TOP_LOGPROBS}, got {value}")

    def _check_grammar(self) -> None:
        given = [
            name for name in ("json_schema", "regex", "lark") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise InputError(f"expected one of {' and '.join(given)}, got both")
        for name in given:
            try:
                text = self.grammar[1]  # type: ignore[index]
            except (TypeError, ValueError) as error:
                raise InputError(f"{name}: expected what JSON can hold: {error}") from error
            if not 0 < len(text) <= MAX_GRAMMAR_LENGTH:
                raise InputError(
                    f"{name}: expected 1 to {MAX_GRAMMAR_LENGTH} characters, got {len(text)}"
                )
        if given and self.ignore_eos:
            raise InputError(f"{given[0]} and ignore_eos: a text that obeys has an end")


GREEDY = SamplingParams()


def from_generation_config(config: Mapping[str, Any]) -> SamplingParams:
    """What a model's ``generation_config.json`` recommends.

    Without ``do_sample`` it is greedy, whatever else is said of sampling. Values that cannot be
    obeyed here are left out, since nobody asked for them.
    """
    names = ["repetition_penalty"]
    if config.get("do_sample"):
        names += ["temperature", "top_k", "top_p", "min_p"]
    given = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample"):
        given.setdefault("temperature", 1.0)
    if config.get("max_new_tokens"):
        given["max_tokens"] = config["max_new_tokens"]
    assert given.keys() <= {each.name for each in fields(SamplingParams)}
    kept: dict[str, Any] = {}
    for name, value in given.items():
        try:
            SamplingParams(**{name: value})
        except InputError:
            continue
        kept[name] = value
    return SamplingParams(**kept)
