"""What a plan says: as data for JSON, and as tables."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from .capacity import SHARE_WITHIN, Service, holds
from .machine import Machine
from .memory import TABLE_SHARE
from .result import Result
from .shapes import ModelSize
from .sketch import Sketch


def describe(
    model: ModelSize,
    machine: Machine,
    service: Service,
    rate: float,
    result: Result,
    *,
    searched: bool,
) -> dict[str, Any]:
    """Everything that was asked, and what was found at a rate: ``searched``, or given."""
    memory, trace = service.memory, service.trace
    return {
        "model": {
            "name": model.name,
            "parameters": model.parameters,
            "kv_bytes_per_token": model.kv_token_bytes,
            "table_bytes_per_user": model.row_bytes,
        },
        "machine": {
            "name": machine.name,
            "bytes_per_s": machine.bytes_per_s,
            "flop_per_s": machine.flop_per_s,
            "source": machine.source,
        },
        "basis": {"step_times": service.step_time.basis, "notes": list(service.step_time.notes)},
        "memory_bytes": {
            "total": memory.total,
            "weights": memory.weights,
            "shared_factors": memory.factors,
            "buffers": memory.buffers,
            "table": memory.table,
            "keys_and_values": memory.kv,
        },
        "users": {
            "asked": trace.num_users,
            "resident": memory.slots,
            "most_resident": memory.max_slots,
            "table_share_at_most": TABLE_SHARE,
        },
        "kv_tokens": memory.kv_tokens,
        "load": {
            "requests": trace.num_requests,
            "zipf": trace.zipf,
            "prompt_tokens": trace.prompt.mean,
            "output_tokens": trace.output.mean,
            "continued": trace.continued,
            "on_seconds": trace.on_seconds,
            "off_seconds": trace.off_seconds,
            "seed": trace.seed,
        },
        "limits": {
            "max_streams": service.max_streams,
            "max_tokens": service.max_tokens,
            "max_length": service.max_length,
            "page_size": memory.page_size,
            "reuse": service.reuse,
        },
        "objectives": {
            "ttft_ms": 1e3 * service.objectives.ttft_s,
            "itl_ms": 1e3 * service.objectives.itl_s,
            "share_within": SHARE_WITHIN,
        },
        "searched": searched,
        "rate": rate,
        "served": _served(result),
    }


def _served(result: Result) -> dict[str, Any]:
    busy = sum(result.terms.values())
    return {
        "holds": holds(result),
        "requests": result.requests,
        "requests_per_s": result.requests / result.seconds,
        "tokens_per_s": result.output_tokens / result.seconds,
        "prompt_tokens_per_s": result.prompt_tokens / result.seconds,
        "goodput_requests_per_s": result.within / result.seconds,
        "within": result.within / result.requests,
        "seconds": result.seconds,
        "last_arrival_s": result.last_arrival,
        "steps": result.steps,
        "step_time_shares": {name: value / busy for name, value in result.terms.items()},
        "idle": 1 - busy / result.seconds,
        "ttft_s": _quantiles(result.ttft),
        "ttft_busy_users_s": _quantiles(result.ttft_busy),
        "ttft_other_users_s": _quantiles(result.ttft_others),
        "itl_s": _quantiles(result.itl),
        "streams_waiting": _quantiles(result.queue),
        "streams_of_a_step": _quantiles(result.batch),
        "preemptions": result.preemptions,
        "prompt_reused": result.reused_tokens / max(1, result.prompt_tokens),
        "slot_misses": result.slot_misses / max(1, result.slot_lookups),
        "longest_wait_s": result.longest_wait,
        "longest_wait_user": result.longest_wait_user,
        "fairness_jain": result.fairness,
        # Of the machine that simulated; all else follows from the seed.
        "scheduler_s_per_step_here": result.host_s / result.steps,
    }


def _quantiles(sketch: Sketch) -> dict[str, float | None]:
    values = {f"p{100 * share:g}": sketch.quantile(share) for share in (0.5, 0.9, 0.99)}
    values |= {"max": sketch.quantile(1), "mean": sketch.mean}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def show(found: dict[str, Any], console: Console) -> None:
    """The same as tables."""
    # Names of models and files are no markup.
    as_is: dict[str, Any] = {"markup": False, "emoji": False}
    model, machine, users = found["model"], found["machine"], found["users"]
    console.print(
        f"{model['name']} ({model['parameters'] / 1e9:.2f} B parameters, bf16) on "
        f"{machine['name']}: {machine['bytes_per_s'] / 1e9:,.0f} GB/s, "
        f"{machine['flop_per_s'] / 1e12:,.2f} TFLOP/s ({machine['source']})",
        **as_is,
    )
    console.print(_memory_table(found))
    resident, asked = users["resident"], users["asked"]
    console.print(
        f"{resident:,} of {asked:,} users are resident; the table's share of the memory "
        f"({users['table_share_at_most']:.0%} of what the model leaves) holds "
        f"{users['most_resident']:,}"
    )
    objectives = found["objectives"]
    aim = (
        f"{objectives['share_within']:.0%} of requests: first token in "
        f"{objectives['ttft_ms']:g} ms, then one every {objectives['itl_ms']:g} ms"
    )
    served = found["served"]
    if found["searched"] and not served["holds"]:
        console.print("no rate holds the objectives; below is the lowest that was tried")
    verdict = "holds" if served["holds"] else "does NOT hold"
    console.print(f"{found['rate']:.3g} requests/s: {verdict} ({aim})")
    console.print(_served_table(served))
    console.print(_times_table(served))
    console.print(f"step times: {found['basis']['step_times']}", **as_is)
    for note in found["basis"]["notes"]:
        console.print(f"  {note}", **as_is)
    if served["last_arrival_s"] < 30e-3 * objectives["ttft_ms"]:
        console.print(
            f"  the trace lasts {served['last_arrival_s']:.1f} s only: too short to tell a rate "
            "that holds from a queue that grows; more --requests would"
        )


def _memory_table(found: dict[str, Any]) -> Table:
    memory, model, users = found["memory_bytes"], found["model"], found["users"]
    table = Table("memory", "GB", "how")
    kv_token, row = model["kv_bytes_per_token"], model["table_bytes_per_user"]
    rows = {
        "weights": f"{model['parameters']:,} parameters × 2 bytes",
        "shared_factors": "A, B, and the map from latents to rows",
        "buffers": "activations and logits of a step, estimated",
        "table": f"({users['resident']:,} users + 1) × {row:,} bytes",
        "keys_and_values": f"{found['kv_tokens']:,} tokens × {kv_token:,} bytes",
        "total": "",
    }
    for name, how in rows.items():
        table.add_row(name.replace("_", " "), f"{memory[name] / 1e9:.2f}", how)
    table.columns[1].justify = "right"
    return table


def _served_table(served: dict[str, Any]) -> Table:
    table = Table("at this rate", "")
    shares = ", ".join(f"{k} {v:.0%}" for k, v in served["step_time_shares"].items() if v)
    rows = {
        "requests": f"{served['requests']:,} in {served['seconds']:,.1f} s",
        "requests/s": f"{served['requests_per_s']:,.2f}",
        "within the objectives": f"{served['within']:.2%}",
        "goodput, requests/s": f"{served['goodput_requests_per_s']:,.2f}",
        "tokens/s written": f"{served['tokens_per_s']:,.0f}",
        "tokens/s of prompts": f"{served['prompt_tokens_per_s']:,.0f}",
        "of prompts, found in pages": f"{served['prompt_reused']:.1%}",
        "preemptions": f"{served['preemptions']:,}",
        "table rows refilled": f"{served['slot_misses']:.1%} of admissions",
        "longest wait": f"{served['longest_wait_s']:.3g} s, user {served['longest_wait_user']}",
        "fairness (Jain, 1 is best)": f"{served['fairness_jain']:.3f}",
        "step time": shares,
        "idle": f"{served['idle']:.1%}",
        "scheduler (on this machine)": f"{1e6 * served['scheduler_s_per_step_here']:.0f} µs a step",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    table.columns[1].justify = "right"
    return table


def _times_table(served: dict[str, Any]) -> Table:
    table = Table("", "p50", "p90", "p99", "max")
    rows = {
        "first token, ms": ("ttft_s", 1e3),
        "  users who send half of it": ("ttft_busy_users_s", 1e3),
        "  all other users": ("ttft_other_users_s", 1e3),
        "between tokens, ms": ("itl_s", 1e3),
        "streams waiting": ("streams_waiting", 1.0),
        "streams of a step": ("streams_of_a_step", 1.0),
    }
    for name, (key, scale) in rows.items():
        values = [served[key][column] for column in ("p50", "p90", "p99", "max")]
        table.add_row(name, *("–" if v is None else f"{scale * v:,.1f}" for v in values))
    for column in table.columns[1:]:
        column.justify = "right"
    return table
