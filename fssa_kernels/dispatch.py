"""Which backends an op has, what each supports, and which one serves a call.

A backend answers two different questions. `cannot` says that it is unable to serve the call: naming
it then raises. `avoid` says that it could, but that another backend was measured faster on inputs
like these: `backend="auto"` then passes it over, naming it still works.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fssa_kernels.native import CURRENT, RecordingError


def never(*_inputs: Any) -> None:
    """The answer of a backend that has nothing to object to."""
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `run(*inputs)` computes. `cannot(*inputs)` returns the reason why it cannot serve these inputs,
    or None. `avoid(*inputs)` returns the measured reason why `auto` prefers a later backend, or
    None; it is asked only where `cannot` returned None. `records` says that its calls can be
    recorded into a `StepGraph`; while one is being recorded, the others cannot serve.
    """

    name: str
    run: Callable[..., Any]
    cannot: Callable[..., str | None] = never
    avoid: Callable[..., str | None] = never
    records: bool = False

    def objection(self, inputs: Sequence[Any]) -> str | None:
        """Why it cannot serve these inputs now, or None."""
        if CURRENT.recorder is not None and not self.records:
            return "its calls cannot be recorded into a StepGraph"
        return self.cannot(*inputs)


@dataclass(frozen=True)
class Verdict:
    """What dispatch thinks of one backend for one call."""

    backend: str
    chosen: bool
    can: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {'chosen' if self.chosen else 'not chosen'}: {self.reason}"


@dataclass(frozen=True)
class OpEntry:
    """What is known of an op: how its arguments are checked, its backends in order, and the
    arguments that it writes in place."""

    prepare: Callable[..., tuple[Any, ...]]
    backends: tuple[Backend, ...]
    writes: tuple[str, ...] = ()


_OPS: dict[str, OpEntry] = {}


def enrol(op: str, entry: OpEntry) -> None:
    """Make an op known to `explain`."""
    assert op not in _OPS
    _OPS[op] = entry


def lookup(op: str) -> OpEntry:
    """The entry of that op; ValueError names the known ones."""
    if op not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(sorted(_OPS))}, got {op!r}")
    return _OPS[op]


def select(op: str, backends: Sequence[Backend], backend: str, inputs: Sequence[Any]) -> Backend:
    """The backend that serves this call.

    With "auto" the first one that can and is not avoided; if every able one is avoided, the first
    able one. A name selects that backend.

    Raises ValueError for an unknown name, and for a backend that cannot serve, with its reason;
    while a StepGraph is being recorded, RecordingError where none can.
    """
    if backend == "auto":
        able = None
        for candidate in backends:
            if candidate.objection(inputs) is None:
                if candidate.avoid(*inputs) is None:
                    return candidate
                able = able or candidate
        if able is not None:
            return able
        reasons = "; ".join(f"{c.name}: {c.objection(inputs)}" for c in backends)
        error = ValueError if CURRENT.recorder is None else RecordingError
        raise error(f"{op}: no backend supports these inputs: {reasons}")
    named = find(op, backends, backend)
    reason = named.objection(inputs)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot serve this call: {reason}")
    return named


def find(op: str, backends: Sequence[Backend], backend: str) -> Backend:
    """The backend of that name; ValueError names the known ones."""
    for candidate in backends:
        if candidate.name == backend:
            return candidate
    known = ", ".join(["auto", *(candidate.name for candidate in backends)])
    raise ValueError(f"{op}: backend: expected one of {known}, got {backend!r}")


def judge(
    op: str, backends: Sequence[Backend], backend: str, inputs: Sequence[Any]
) -> tuple[Verdict, ...]:
    """Every backend's verdict on one call, in the order in which `auto` asks them.

    Raises ValueError for an unknown name.
    """
    cannot = {candidate.name: candidate.objection(inputs) for candidate in backends}
    named = None if backend == "auto" else find(op, backends, backend).name
    chosen = named
    if named is None and None in cannot.values():
        chosen = select(op, backends, "auto", inputs).name
    verdicts = []
    for candidate in backends:
        name = candidate.name
        if cannot[name] is not None:
            verdicts.append(Verdict(name, False, False, f"cannot: {cannot[name]}"))
            continue
        avoid = candidate.avoid(*inputs)
        if name == named:
            reason = "named by the caller"
        elif named is not None:
            reason = f"can, but the caller named {named!r}"
        elif avoid is not None and name == chosen:
            reason = f"the only one that can, though: {avoid}"
        elif avoid is not None:
            reason = f"can, but auto prefers another: {avoid}"
        elif name == chosen:
            reason = "the first that supports these inputs"
        else:
            reason = f"can, but {chosen!r} comes first"
        verdicts.append(Verdict(name, name == chosen, True, reason))
    return tuple(verdicts)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Verdict, ...]:
    """Why each backend of an op would or would not serve a call; nothing is computed.

    `op` is a public function of `fssa_kernels`, or its name; the rest is what it would be called
    with. Returns one `Verdict` per backend in the order in which `auto` asks them; a named backend
    that cannot serve is reported here rather than raised.

    Raises what the op itself raises for bad arguments, and ValueError for an unknown op or backend.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    entry = lookup(name)
    *inputs, backend = entry.prepare(*args, **kwargs)
    return judge(name, entry.backends, backend, inputs)
