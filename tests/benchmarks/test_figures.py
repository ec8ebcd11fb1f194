"""What is drawn is what the result files say, and the committed figures are drawn from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figure_data import read_result
from benchmarks.figures import FIGURES, FOLDER, ROOT, TASTE_UNITS, main, source_of
from benchmarks.policies import EVERYBODY, KINDS, PROMPT
from fssa_runtime.errors import InputError
from fssa_runtime.training.synthetic import Population

RESULTS = ROOT / "benchmarks" / "results" / FOLDER
DRAWN = ROOT / "docs" / "figures"
COMMITTED = [name for name in FIGURES if (RESULTS / f"{name}.json").is_file()]
Points = tuple[list[float], list[float]]


def panels(name: str, result: dict[str, Any]) -> list[Any]:
    """The panels of a figure drawn from a result."""
    pytest.importorskip("matplotlib")
    drawing = FIGURES[name]
    figure = drawing.draw(read_result(json.dumps(result).encode(), drawing.form, name))
    figure.draw_without_rendering()
    return figure.axes


def committed(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def lines(axes: Any) -> dict[str, Points]:
    """Labelled lines and points of a panel, by label."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def bars(axes: Any) -> list[list[float]]:
    """Ends of the error bars, in the order in which the series were drawn."""
    return [
        [float(y) for part in container.lines[2] for xy in part.get_segments() for y in xy[:, 1]]
        for container in axes.containers
    ]


def ends(means: list[float], errors: list[float]) -> list[float]:
    return [m + sign * e for m, e in zip(means, errors, strict=True) for sign in (-1, 1)]


def value(mean: float, error: float | None = 0.01) -> dict[str, float | None]:
    return {"mean": mean, "standard_error": error}


def policies(seeds: int = 1) -> dict[str, Any]:
    """Accuracies nobody measured: of kind k in seed s, s + 2k hundredths above the policy's."""

    def scores(accuracy: float, seed: int) -> dict[str, Any]:
        modes = {
            kind: {"accuracy": accuracy + 0.02 * k + 0.01 * seed, "accuracy_se": 0.03}
            for k, kind in enumerate(KINDS)
        }
        return {"accuracy": 0.0, "accuracy_se": 0.0, "modes": modes}

    def run(seed: int) -> dict[str, Any]:
        made = {name: {0: 0.5, 10: best} for name, best in (("ours", 0.8), (PROMPT, 0.6))}
        policies = made | {EVERYBODY: {0: 0.4}}
        found = {
            name: {"contexts": {str(n): scores(a, seed) for n, a in contexts.items()}}
            for name, contexts in policies.items()
        }
        for k, kind in enumerate(KINDS):
            own = {"accuracy": 0.9 - 0.01 * k, "accuracy_se": 0.02}
            found[f"DPO, {kind}"] = {"contexts": {"0": own | {"modes": {kind: own}}}}
        return found

    return {"seeds": "0", "runs": [run(seed) for seed in range(seeds)]}


def swap_test() -> dict[str, Any]:
    conditions: dict[str, Any] = {"unmodulated": {"tastes": {"length": value(4), "x": value(1)}}}
    for t, taste in enumerate(("length", "x")):
        for i, name in enumerate(("less", "mix 0.25", "mix 0.5", "more")):
            measured = {"length": value(9, 9), "x": value(9, 9), taste: value(3 + i + t, 0.1 * i)}
            above = {"nll_above_own_samples": 0.1 * (t + 1) * (i - 1)}
            conditions[f"{taste} {name}"] = {"tastes": measured} | above
    return {
        "config": {"mixtures": [0.5, 0.25]},
        "num_prompts": 7,
        "conditions": conditions,
        "swap": {"length": {}, "x": {}},
    }


def test_synthetic_stands_beside_the_exact_limit() -> None:
    result = committed("synthetic")
    both = panels("synthetic", result)
    for axes, name, scale in zip(both, ("accuracy", "nll"), (100, 1), strict=True):
        drawn = lines(axes)
        xs, ys = drawn.pop("best possible")
        for n, entry in result["models"]["NP-BTL"]["runs"][0]["heldout"]["contexts"].items():
            assert ys[xs.index(int(n))] == pytest.approx(scale * entry[f"bayes_{name}"])
        kinds = [result["models"][f"dedicated to kind {kind}"] for kind in (0, 1)]
        own = sum(kind["mean"]["0"][name]["mean"] for kind in kinds) / 2
        assert drawn.pop("dedicated to one kind")[1] == pytest.approx([scale * own] * 2)
        for model in ("BTL", "DPL"):
            level = result["models"][model]["mean"]["0"][name]["mean"]
            assert drawn.pop(model)[1] == pytest.approx([scale * level] * 2)
        assert list(drawn) == ["NP-BTL", "NP-BTL, a single latent"]
        for (model, (xs, ys)), ends_drawn in zip(drawn.items(), bars(axes), strict=True):
            mean = result["models"][model]["mean"]
            assert xs == [int(n) for n in mean]
            assert ys == pytest.approx([scale * entry[name]["mean"] for entry in mean.values()])
            errors = [scale * entry[name]["standard_error"] for entry in mean.values()]
            assert ends_drawn == pytest.approx(ends(ys, errors))


def test_identification_runs_by_the_formula() -> None:
    result = committed("identify")
    (axes,) = panels("identify", result)
    drawn = lines(axes)
    for n in ("1", "3"):
        xs, ys = drawn[f"n = {n}, best possible"]
        assert (xs[0], xs[-1]) == (-1, 1)
        assert ys[100] == pytest.approx(100 * 0.5 ** (int(n) + 1))  # ρ = 0
        xs, ys = drawn[f"n = {n}, NP-BTL"]
        for rho, error in zip(xs, ys, strict=True):
            mean = result["models"][f"{rho:g}"]["mean"][n]["identification_error"]["mean"]
            assert error == pytest.approx(100 * mean)
        assert len(xs) == len(result["models"])


@pytest.mark.parametrize("table", ["swissmetro", "electricity"])
def test_people_stand_beside_the_logits(table: str) -> None:
    result = committed(f"people_{table}")
    both = panels(f"people_{table}", result)
    for axes, name, scale in zip(both, ("nll", "accuracy"), (-1, 100), strict=True):
        drawn = lines(axes)
        assert list(drawn) == list(result["mean"]["0"])
        for (label, (xs, ys)), ends_drawn in zip(drawn.items(), bars(axes), strict=True):
            entries = [result["mean"][str(n)][label][name] for n in xs]
            assert xs == [int(n) for n in result["mean"]]
            assert ys == pytest.approx([scale * entry["mean"] for entry in entries])
            errors = [abs(scale) * entry["standard_error"] for entry in entries]
            assert ends_drawn == pytest.approx(ends(ys, errors))


def test_questions_and_the_way_to_go() -> None:
    result = committed("questions")
    (axes,) = panels("questions", result)
    goal, *ways = lines(axes).items()
    start = result["mean"]["accuracy"]["random"][0]["mean"]
    assert goal[1][1] == pytest.approx([100 * (0.1 * start + 0.9)] * 2)
    for (label, (xs, ys)), way in zip(ways, ("active", "random"), strict=True):
        means = [100 * entry["mean"] for entry in result["mean"]["accuracy"][way]]
        assert (xs, ys) == (list(range(len(means))), pytest.approx(means))
        assert f"{result['mean']['choices_needed'][way]['mean']:.1f} answers" in label
    result["mean"]["choices_needed"]["random"] = value(None, None)  # type: ignore[arg-type]
    (axes,) = panels("questions", result)
    assert [label for label in lines(axes) if "never there" in label] == [
        "random questions, never there"
    ]


def test_policies_between_floor_and_ceiling() -> None:
    result = policies()
    every, *kinds, legend = panels("policies", result)
    drawn = lines(every)
    assert drawn["ours"] == ([0, 10], pytest.approx([53, 83]))  # 50 and 80, and 0, 2, 4, 6 more
    assert drawn[PROMPT] == ([0, 10], pytest.approx([53, 63]))
    assert drawn[EVERYBODY][1] == pytest.approx([43, 43])
    assert drawn["DPO, this kind alone"][1] == pytest.approx([88.5, 88.5])
    assert bars(every)[0] == pytest.approx(ends([53, 83], [1.5, 1.5]))  # 3 / √4
    assert [axes.get_title() for axes in kinds] == list(KINDS)
    drawn = lines(kinds[2])
    assert drawn["ours"] == ([0, 10], pytest.approx([54, 84]))
    assert drawn[EVERYBODY][1] == pytest.approx([44, 44])
    assert drawn["DPO, this kind alone"][1] == pytest.approx([88, 88])
    assert bars(kinds[2])[0] == pytest.approx(ends([54, 84], [3, 3]))
    assert len(legend.get_legend().get_texts()) == 4


def test_policies_of_several_seeds_have_the_error_over_seeds() -> None:
    result = policies(seeds=4)
    for seed in (1, 2):
        del result["runs"][seed][PROMPT]
    del result["runs"][3]["DPO, lists-"]  # a seed without a ceiling does not count
    every, *_ = panels("policies", result)
    drawn = lines(every)
    assert drawn["ours, 3 seeds"][1] == pytest.approx([54, 84])
    assert drawn[PROMPT][1] == pytest.approx([53, 63])
    assert bars(every)[0] == pytest.approx(ends([54, 84], [1 / 3**0.5] * 2))


def test_swap_test_from_less_to_more() -> None:
    length, length_nll, other, other_nll = panels("swap_test", swap_test())
    drawn = lines(length)
    assert drawn["written for users"] == ([0, 0.25, 0.5, 1], [3, 4, 5, 6])
    assert drawn["unmodulated model"][1] == [4, 4]
    assert bars(length)[0] == pytest.approx(ends([3, 4, 5, 6], [0, 0.1, 0.2, 0.3]))
    assert length.get_ylabel() == TASTE_UNITS["length"]
    assert lines(other)["written for users"][1] == [4, 5, 6, 7]
    assert list(length_nll.lines[0].get_ydata()) == pytest.approx([-0.1, 0, 0.1, 0.2])
    assert list(other_nll.lines[0].get_ydata()) == pytest.approx([-0.2, 0, 0.2, 0.4])
    assert length_nll.get_ylim() == other_nll.get_ylim()
    low, high = length_nll.get_ylim()
    assert low < -0.2
    assert high > 0.4


def write(folder: Path, **results: Any) -> Path:
    (folder / FOLDER).mkdir(parents=True)
    for name, result in results.items():
        (folder / FOLDER / f"{name}.json").write_text(json.dumps(result))
    return folder


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    results = write(tmp_path / "results", swap_test=swap_test(), policies=policies())
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["--results", str(results), "--out", str(first)]) == 0
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "another", "axes.grid": True}):
        assert main(["--results", str(results), "--out", str(second)]) == 0
    assert sorted(path.name for path in first.iterdir()) == ["policies.svg", "swap_test.svg"]
    for path in first.iterdir():
        content = path.read_bytes()
        assert content == (second / path.name).read_bytes()
        assert b"<dc:date>" not in content
        assert matplotlib.__version__.encode() not in content
        assert source_of(path.stem, (results / FOLDER / f"{path.stem}.json").read_bytes()) in (
            content.decode()
        )


def test_only_what_is_asked_for_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    results = write(tmp_path / "results", swap_test=swap_test(), policies=policies())
    out = tmp_path / "out"
    command = ["--results", str(results), "--out", str(out), "--only"]
    assert main([*command, "questions"]) == 1
    assert "questions.json" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "policies"]) == 0
    assert [path.name for path in out.iterdir()] == ["policies.svg"]
    with pytest.raises(SystemExit):
        main([*command, "nothing"])


def test_nothing_to_draw_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "synthetic.json" in capsys.readouterr().err


def test_an_ill_formed_file_is_named_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    broken = swap_test()
    del broken["conditions"]["x mix 0.5"]
    results = write(tmp_path / "results", swap_test=broken, policies=policies())
    out = tmp_path / "out"
    assert main(["--results", str(results), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "swap_test.json" in error
    assert "conditions.x mix 0.5.tastes.x" in error
    assert not out.exists()


def form_error(name: str, content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        read_result(content, FIGURES[name].form, "the file")
    return str(caught.value)


def test_what_is_wrong_with_a_file_is_said() -> None:
    assert "Invalid JSON" in form_error("questions", b"{")
    assert "table" in form_error("synthetic", json.dumps(committed("identify")).encode())
    result = committed("people_swissmetro")
    del result["mean"]["3"]["NP-BTL"]
    assert "predictors" in form_error("people_swissmetro", json.dumps(result).encode())
    result = committed("questions")
    result["mean"]["accuracy"]["active"][1]["mean"] = float("nan")
    assert "accuracy.active.1.mean" in form_error("questions", json.dumps(result).encode())
    result = committed("identify")
    result["models"]["0"]["runs"][1]["recipe"]["data"]["rho"] = 0.1
    assert "correlation" in form_error("identify", json.dumps(result).encode())
    several = policies(seeds=2)
    del several["runs"][1]["ours"]["contexts"]["10"]
    assert "runs.*.ours" in form_error("policies", json.dumps(several).encode())
    several = policies(seeds=2)
    del several["runs"][1]["DPO, lists+"]["contexts"]["0"]
    assert "runs.1.DPO, lists+" in form_error("policies", json.dumps(several).encode())
    lacking = policies()
    del lacking["runs"][0]["DPO, lists+"]
    assert "every ceiling" in form_error("policies", json.dumps(lacking).encode())


def test_the_limits_of_the_file_are_those_drawn() -> None:
    result = committed("identify")
    for model in result["models"].values():
        run = model["runs"][0]
        population = Population("normal", run["recipe"]["data"]["rho"])
        for n, entry in run["heldout"]["contexts"].items():
            limit = entry["bayes_identification_error"]
            assert limit == pytest.approx(population.identification_error(int(n)))


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_figures_are_drawn_from_the_committed_results(name: str) -> None:
    content = (RESULTS / f"{name}.json").read_bytes()
    drawn = DRAWN / f"{name}.svg"
    again = f"run `python -m benchmarks.figures --only {name}`"
    assert drawn.is_file(), again
    assert source_of(name, content) in drawn.read_text(encoding="utf-8"), again


def test_pictures_shown_in_the_documentation_exist() -> None:
    shown = 0
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
            shown += 1
    assert shown > 0
    assert {path.stem for path in DRAWN.iterdir()} == set(COMMITTED)
