"""Sample several different answers to each prompt from the base model itself.

A style is the prompt with an instruction added. The instruction is dropped from the record: what
remains is a prompt and an answer the base model can write, in a manner it would not always choose.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ..engine.engine import Engine
from ..errors import InputError
from ..models.language_model import LanguageModel
from ..request import Completion, Request, SamplingParams
from .progress import counted


class AnswerConfig(BaseModel):
    """What to sample. ``styles`` maps a name to a template with ``{prompt}`` in it."""

    model_config = ConfigDict(extra="forbid")

    styles: dict[str, str]
    max_tokens: int = Field(96, ge=1)
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(0.9, gt=0, le=1)
    seed: int = 0
    batch_size: int = Field(48, ge=1)


def read_prompts(path: Path) -> list[str]:
    """Non-empty lines of a text file.

    Raises:
        InputError: no such file, no prompt, or the same prompt twice.
    """
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"prompts {path}: {error.strerror}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise InputError(f"prompts {path}: the file is empty")
    if len(set(prompts)) != len(prompts):
        raise InputError(f"prompts {path}: a prompt occurs twice")
    return prompts


def sample_answers(
    model: LanguageModel, prompts: list[str], config: AnswerConfig, output: Path
) -> None:
    """Append one JSON line ``{prompt, style, answer, finish_reason}`` an answer to ``output``.

    Lines already there are kept and their answers not sampled again, so an interrupted run goes
    on where it stopped. An answer's seed depends on its prompt and style alone.
    """
    present = {(line["prompt"], line["style"]) for line in read_answers(output)}
    _end_last_line(output)
    wanted = [
        (prompt, style)
        for prompt in prompts
        for style in config.styles
        if (prompt, style) not in present
    ]
    requests = [
        Request(
            model.chat_tokens(config.styles[style].replace("{prompt}", prompt)),
            sampling=SamplingParams(
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=zlib.crc32(f"{config.seed}/{style}/{prompt}".encode()),
            ),
        )
        for prompt, style in wanted
    ]
    engine = Engine(model.decoder, model.stop_tokens, max_batch_size=config.batch_size)
    with (
        open(output, "a", encoding="utf-8") as file,
        counted("sampling answers", len(requests)) as count,
    ):

        def write(index: int, completion: Completion) -> None:
            prompt, style = wanted[index]
            line = {
                "prompt": prompt,
                "style": style,
                "answer": model.decode(completion.tokens).strip(),
                "finish_reason": completion.finish_reason,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            count(1)

        engine.generate(requests, on_finish=write)


def read_answers(path: Path) -> list[Mapping[str, str]]:
    """Lines written by `sample_answers`, but for a last one that an interruption cut off.

    Raises:
        InputError: a damaged line, other than such a one.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    if _is_whole(last):
        lines.append(last)
    answers: list[Mapping[str, str]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            answers.append(
                {key: record[key] for key in ("prompt", "style", "answer", "finish_reason")}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not an answer record: {error}") from error
    return answers


def _end_last_line(path: Path) -> None:
    """Make ready for another line: one that was cut off is dropped, one without an end gets it."""
    raw = path.read_bytes() if path.exists() else b""
    last = raw.split(b"\n")[-1]
    if _is_whole(last):
        path.write_bytes(raw + b"\n")
    elif last:
        path.write_bytes(raw[: -len(last)])


def _is_whole(last_line: bytes) -> bool:
    try:
        json.loads(last_line)
    except ValueError:
        return False
    return True
