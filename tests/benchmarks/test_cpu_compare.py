"""Two builds in turn: what is compiled, whose kernels are timed, and what the means are of."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import cpu_compare
from benchmarks.cpu_compare import ROWS, SIDES, BuildError, built, one_round, summarise
from fssa_kernels.native import NATIVE
from tests.runtime.models import write_model

FAKE_BUILD = """
from pathlib import Path
assert Path("good").read_text() == "yes"
Path("fssa_kernels/_native.fake.so").write_text("")
with open("builds.txt", "a") as file:
    file.write("built\\n")
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One whose first revision does not compile and whose second one does."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    folder = tmp_path / "repository"
    (folder / "fssa_kernels").mkdir(parents=True)
    (folder / "fssa_kernels" / "__init__.py").write_text("")
    (folder / "setup.py").write_text(FAKE_BUILD)
    git(folder, "init", "--quiet")
    for good in ("no", "yes"):
        (folder / "good").write_text(good)
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", good)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    run = subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return run.stdout.strip()


def test_a_revision_is_built_once(repository: Path, tmp_path: Path) -> None:
    commit, builds = git(repository, "rev-parse", "HEAD"), tmp_path / "builds"
    for revision in ("HEAD", commit[:8], "HEAD^0"):
        assert built(revision, Console(), repository, builds) == (builds / commit, commit)
    assert (builds / commit / "builds.txt").read_text() == "built\n"


def test_what_cannot_be_built_is_an_error_that_says_why(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="expected a revision or the folder of a checkout, got"):
        built("nothing", Console(), repository, tmp_path / "builds")
    with pytest.raises(BuildError, match=r"does not compile, see .*build\.log"):
        built("HEAD~1", Console(), repository, tmp_path / "builds")


def test_a_checkout_is_named_by_its_commit_and_whether_it_was_changed(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert built(str(repository), Console()) == (repository, commit)
    (repository / "good").write_text("perhaps")
    assert built(str(repository), Console()) == (repository, f"{commit}-dirty")


def test_a_checkout_without_a_commit_goes_by_its_name_and_no_path(tmp_path: Path) -> None:
    (tmp_path / "unpacked").mkdir()
    assert built(str(tmp_path / "unpacked"), Console()) == (tmp_path / "unpacked", "unpacked")


def test_a_round_has_the_median_of_as_many_turns_of_every_side_and_row() -> None:
    turns: Counter[tuple[str, str]] = Counter()

    def step(side: str, row: str) -> dict[str, float]:
        turns[side, row] += 1
        number = [5.0, 1.0, 2.0][turns[side, row] - 1] + 100 * SIDES.index(side) + ROWS.index(row)
        return {"o": number, "down": 10.0 - number}

    times = one_round(step, 3)
    assert set(turns.values()) == {3}
    assert times["this"]["all distinct"] == {"o": 103.0, "down": -93.0, "sum": 10.0}
    assert times["other"]["base only"]["o"] == 2.0


def a_round(barriers: list[float], other: tuple[float, float], this: tuple[float, float]) -> Any:
    """One in which base only and all distinct took so long."""
    sides = {
        side: {row: {"o": ms, "sum": ms} for row, ms in zip(ROWS, times, strict=True)}
        for side, times in (("other", other), ("this", this))
    }
    return {"barrier_s": barriers, "ms": sides}


def test_the_error_is_of_the_means_of_starts_and_unsure_rounds_are_left_out() -> None:
    near, apart, unsure = [2e-8, 9e-8], [2e-7, 1e-7], [2e-8, 2e-7]
    starts = [
        {
            "first": "other",
            "rounds": {
                "8": [
                    a_round(near, (10.0, 20.0), (9.0, 20.0)),
                    a_round(near, (10.0, 20.0), (11.0, 20.0)),
                    a_round(unsure, (10.0, 20.0), (99.0, 99.0)),
                    a_round(apart, (10.0, 20.0), (5.0, 10.0)),
                ]
            },
        },
        {"first": "this", "rounds": {"8": [a_round(near, (10.0, 16.0), (12.0, 16.0))]}},
    ]
    states = summarise(starts)["8"]
    assert (states["near"]["starts"], states["near"]["rounds"]) == (2, 3)
    base = states["near"]["this_over_other"]["base only"]
    assert base["mean"] == pytest.approx((1.0 + 1.2) / 2)
    assert base["standard_error"] == pytest.approx(math.hypot(0.1, 0.1) / math.sqrt(2))
    assert states["near"]["base_over_distinct"]["other"]["mean"] == pytest.approx(0.5625)
    assert states["near"]["ms"]["this"]["base only"]["sum"] == 11.0
    assert states["apart"]["this_over_other"]["all distinct"] == {
        "mean": 0.5,
        "standard_error": None,
    }


@pytest.mark.skipif(NATIVE is None, reason="the native kernels are not built")
def test_both_builds_are_timed_and_each_is_first_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_compare, "NEAR_SECONDS", math.inf)
    monkeypatch.setattr(cpu_compare, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr(cpu_compare, "BUILDS", tmp_path / "builds")
    model, target = write_model(tmp_path / "model"), tmp_path / "compared.json"
    arguments = [str(cpu_compare.ROOT), "--model", str(model), "--batch", "1,3", "--keys", "20"]
    arguments += ["--starts", "2", "--seconds", "0.05", "--json", str(target)]
    assert cpu_compare.main([*arguments, "--instruction-set", "portable"]) == 0
    result = json.loads(target.read_text())
    assert result["machine"]["instruction_set"] == "portable"
    assert [begun["first"] for begun in result["starts"]] == ["other", "this"]
    for batch in ("1", "3"):
        for begun in result["starts"]:
            assert begun["rounds"][batch]
            for one in begun["rounds"][batch]:
                assert min(min(rows.values()) for rows in one["ms"].values()) > 0
        near = result["summary"][batch]["near"]
        assert near["starts"] == 2
        for side in SIDES:
            for row in ROWS:
                parts = near["ms"][side][row]
                assert {"qkv", "head", "paged_attention", "sum"} <= set(parts)
                assert 0 < parts["qkv"] < parts["sum"]
        assert 0 < near["this_over_other"]["base only"]["mean"] < math.inf
    assert "batch 3, cores near, 2 starts" in capsys.readouterr().out


@pytest.mark.skipif(NATIVE is None, reason="the native kernels are not built")
def test_kernels_of_another_build_are_not_taken_for_those_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_compare, "BUILDS", tmp_path / "builds")
    model = write_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    assert cpu_compare.main([str(tmp_path / "empty"), "--model", str(model)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "ended after start 0 of 4" in said
    assert "expected the kernels of" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "many"], "--batch: expected numbers from 1 on, got 'many'"),
        (["--batch", "8,0"], "--batch: expected numbers from 1 on, got '8,0'"),
        (["--starts", "0"], "keys, starts and seconds must be positive"),
        (["--seconds", "nan"], "keys, starts and seconds must be positive"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cpu_compare.main(["HEAD", *arguments])
    assert message in capsys.readouterr().err
