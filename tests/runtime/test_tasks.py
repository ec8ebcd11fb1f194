"""Tasks: disjoint, reproducible, evenly drawn, and padded without influence."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from fssa_runtime.training.data import Preference, PreferenceData
from fssa_runtime.training.evaluation import Scores, evaluate
from fssa_runtime.training.synthetic import Population, SyntheticTasks
from fssa_runtime.training.tasks import (
    EVALUATION,
    EmbeddedTaskDataset,
    OptionTask,
    TaskConfig,
    TaskDataset,
    TooFewChoicesError,
    collate_options,
    collate_rows,
)


def make_data(prompts_of_user):
    return PreferenceData(
        tuple(
            Preference(user, prompt, f"good {i}", f"bad {i}")
            for user, prompts in prompts_of_user.items()
            for i, prompt in enumerate(prompts)
        )
    )


# Two users with many pairs; prompts come up several times.
DATA = make_data({"a": [f"p{i % 7}" for i in range(30)], "b": [f"p{i % 5}" for i in range(25)]})
ALL = np.arange(len(DATA))


def make_tasks(data=DATA, rows=ALL, num_tasks=400, seed=0, **config):
    stream = config.pop("stream", 0)
    settings = TaskConfig(**{"context_max": 6, "num_targets": 5, **config})
    return TaskDataset(data, rows, settings, num_tasks=num_tasks, seed=seed, stream=stream)


@pytest.mark.parametrize("disjoint_by", ["pair", "prompt"])
def test_context_and_targets_are_of_one_user_and_disjoint(disjoint_by):
    shared_prompts = 0
    for task in make_tasks(disjoint_by=disjoint_by):
        context, target = task.context.tolist(), task.target.tolist()
        assert len({*context, *target}) == len(context) + len(target)
        assert {DATA.preferences[row].user for row in context + target} == {task.user}
        prompts = [{DATA.prompt_ids[row] for row in rows} for rows in (context, target)]
        shared_prompts += bool(prompts[0] & prompts[1])
        assert 1 <= len(target) <= 5
    # By pair alone prompts do recur: the stricter test above is not true by accident.
    assert (shared_prompts > 0) == (disjoint_by == "pair")


def test_lengths_and_users_are_drawn_evenly():
    tasks = list(make_tasks(num_tasks=3500))
    lengths = Counter(len(task.context) for task in tasks)
    assert sorted(lengths) == [0, 1, 2, 3, 4, 5, 6]
    assert all(abs(count - 500) < 5 * math.sqrt(500) for count in lengths.values())
    assert abs(Counter(task.user for task in tasks)["a"] - 1750) < 5 * math.sqrt(875)
    used = Counter(row for task in tasks for row in task.target)
    assert set(used) == set(range(len(DATA)))


def assert_same(a, b):
    assert a.user == b.user
    assert a.context.tolist() == b.context.tolist()
    assert a.target.tolist() == b.target.tolist()


def test_a_task_depends_on_seed_stream_and_index_only():
    tasks, longer = make_tasks(), make_tasks(num_tasks=10_000)
    for index in (5, 0, 399):
        assert_same(tasks[index], longer[index])
    signatures = {
        str((task.user, task.context, task.target))
        for dataset in (tasks, make_tasks(seed=1), make_tasks(stream=EVALUATION))
        for task in dataset
    }
    assert len(signatures) > 1190, "streams or seeds share tasks"


def test_contexts_of_fixed_length_are_nested():
    by_n = [make_tasks(context_min=n, context_max=n) for n in (0, 2, 5)]
    for short, middle, long in zip(*by_n, strict=True):
        assert (len(short.context), len(middle.context), len(long.context)) == (0, 2, 5)
        assert long.context[:2].tolist() == middle.context.tolist()
        assert short.target.tolist() == middle.target.tolist() == long.target.tolist()


def test_only_the_given_rows_are_used():
    rows = ALL[::3]
    for task in make_tasks(rows=rows):
        assert {*task.context, *task.target} <= set(rows.tolist())


def test_small_users_are_left_out_by_name():
    data = make_data({"big": [f"p{i}" for i in range(8)], "small": ["p0", "p1"], "one": ["p0"] * 9})
    rows = np.arange(len(data))
    by_pair = make_tasks(data, rows, context_min=3)
    assert by_pair.left_out_users == ("small",)
    with pytest.warns(UserWarning, match="1 of 3 users have too few choices .* left out: 'small'$"):
        by_pair.say_who_is_left_out()
    by_prompt = make_tasks(data, rows, context_min=3, disjoint_by="prompt")
    assert by_prompt.left_out_users == ("small", "one")
    assert {task.user for task in by_prompt} == {"big"}
    with pytest.raises(TooFewChoicesError, match="at least 9 context choices"):
        make_tasks(data, rows, context_min=9, context_max=9)


def test_context_leaves_a_target():
    data = make_data({"u": ["p0", "p0", "p1"]})
    for disjoint_by in ("pair", "prompt"):
        for task in make_tasks(data, np.arange(3), disjoint_by=disjoint_by):
            assert len(task.target) >= 1
            assert len(task.context) <= 2


def test_a_question_asked_twice_is_in_context_or_targets():
    """The same two answers, chosen the other way round and in another line, give a choice away."""
    twice = [
        Preference("u", "p", chosen, rejected)
        for a, b in (("a", "b"), ("c", "d"), ("e", "f"))
        for chosen, rejected in ((a, b), (b, a))
    ]
    data = PreferenceData((*twice, Preference("u", "other", "a", "b")))
    assert data.question_ids.tolist() == [0, 0, 1, 1, 2, 2, 3]
    for task in make_tasks(data, np.arange(len(data))):
        shared = set(data.question_ids[task.context]) & set(data.question_ids[task.target])
        assert not shared


def test_index_out_of_range_stops():
    for tasks in (
        make_tasks(num_tasks=3),
        SyntheticTasks(Population(), TaskConfig(), num_tasks=3, seed=0),
    ):
        assert len(list(tasks)) == 3
        for index in (3, -1):
            with pytest.raises(IndexError, match=r"index: expected 0\.\.2"):
                tasks[index]


def test_bad_range_is_refused():
    with pytest.raises(ValueError, match="context_min must not exceed context_max"):
        TaskConfig(context_min=5, context_max=3)


def test_collate_rows_pads_with_a_mask():
    tasks = [make_tasks()[index] for index in range(12)]
    batch = collate_rows(tasks)
    for i, task in enumerate(tasks):
        for name, rows in (("context", task.context), ("target", task.target)):
            mask = batch[f"{name}_mask"][i]
            assert batch[f"{name}_rows"][i][mask].tolist() == rows.tolist()
            assert mask.sum() == len(rows)
    assert batch["context_mask"].shape[1] == max(len(task.context) for task in tasks)


def test_embedded_tasks_look_up_their_rows():
    chosen, rejected = torch.randn(2, len(DATA), 4)
    tasks = make_tasks(num_tasks=20)
    embedded = EmbeddedTaskDataset(tasks, chosen, rejected)
    batch = collate_options(list(embedded))
    rows = collate_rows(list(tasks))
    for kind, mask in (("context", rows["context_mask"]), ("target", rows["target_mask"])):
        assert torch.equal(batch[f"{kind}_mask"], mask)
        wanted = rows[f"{kind}_rows"][mask]
        assert torch.equal(batch[f"{kind}_chosen"][mask], chosen[wanted])
        assert torch.equal(batch[f"{kind}_rejected"][mask], rejected[wanted])


def test_collate_of_no_context_at_all():
    tasks = make_tasks(context_max=0, num_tasks=3)
    chosen, rejected = torch.randn(2, len(DATA), 4)
    batch = collate_options(list(EmbeddedTaskDataset(tasks, chosen, rejected)))
    assert batch["context_chosen"].shape == (3, 0, 4)
    assert batch["context_mask"].shape == (3, 0)


POPULATIONS = [
    Population(),
    *(Population("normal", rho) for rho in (-1.0, -0.7, 0.0, 0.7)),
]


@pytest.mark.parametrize("population", POPULATIONS, ids=str)
def test_limits_agree_with_simulation(population):
    """The Bayes predictor, scored like any model, meets the closed formulas."""
    by_n = {
        n: SyntheticTasks(
            population,
            TaskConfig(context_min=n, context_max=n, num_targets=5),
            num_tasks=4000,
            seed=3,
            max_context=3,
        )
        for n in (0, 1, 3)
    }
    measured = evaluate(
        lambda batch: Scores(population.bayes_log_probs(batch), None),
        by_n,
        collate=collate_options,
        batch_size=1000,
    )["contexts"]
    for n in by_n:
        entry = measured[str(n)]
        slack = 1e-9
        accuracy, nll = population.bayes_accuracy(n), population.bayes_nll(n)
        assert abs(entry["accuracy"] - accuracy) < 5 * entry["accuracy_se"] + slack
        assert abs(entry["nll"] - nll) < 5 * entry["nll_se"] + slack


@pytest.mark.parametrize("population", POPULATIONS, ids=str)
def test_identification_error_agrees_with_simulation(population):
    """A wrong guess of the kind needs a context without conflict, and then is a coin toss."""
    tasks = SyntheticTasks(
        population, TaskConfig(context_min=2, context_max=2, num_targets=1), num_tasks=8000, seed=5
    )
    batch = collate_options(tasks.__getitems__(list(range(0, 8000, 2))))
    open_kind = ~population.conflicts(batch["context_chosen"], batch["context_rejected"]).any(1)
    error = 0.5 * open_kind.double().mean().item()
    expected = population.identification_error(2)
    assert abs(error - expected) < 5 * 0.5 * math.sqrt(0.25 / 4000)
    if population.name == "normal":
        closed = 0.25 + math.asin(population.rho) / (2 * math.pi)
        assert population.identification_error(1) == pytest.approx(closed)


def test_interval_limits_are_the_published_ones():
    population = Population()
    for n in (0, 1, 3, 5, 10):
        assert population.bayes_accuracy(n) == 1 - 2.0 ** -(n + 2)
        assert population.bayes_nll(n) == pytest.approx(math.log(2) * 2.0 ** -(n + 1))


def test_interval_rewards_by_hand():
    options = torch.tensor([[0.2], [0.6], [0.9]])
    expected = torch.tensor([[0.2, 0.2], [1.2, 0.4], [1.8, 0.1]])
    torch.testing.assert_close(Population().rewards(options), expected)


def test_synthetic_users_choose_by_their_own_reward():
    for population in POPULATIONS:
        tasks = SyntheticTasks(population, TaskConfig(), num_tasks=20, seed=0)
        for task in tasks:
            for kind in ("context", "target"):
                chosen = population.rewards(getattr(task, f"{kind}_chosen"))[:, int(task.mode)]
                rejected = population.rewards(getattr(task, f"{kind}_rejected"))[:, int(task.mode)]
                assert (chosen >= rejected).all()


def test_normal_options_have_the_correlation():
    options = Population("normal", -0.7).sample_options(np.random.default_rng(0), (20_000,))
    assert np.corrcoef(options.T)[0, 1] == pytest.approx(-0.7, abs=0.02)
    assert options.std(axis=0) == pytest.approx([1.0, 1.0], abs=0.02)


def pair_keys(task: OptionTask, kind: str):
    pairs = torch.cat([getattr(task, f"{kind}_chosen"), getattr(task, f"{kind}_rejected")], -1)
    return {tuple(sorted(pair)) for pair in pairs.tolist()}


def test_synthetic_contexts_and_targets_never_share_a_pair():
    tasks = SyntheticTasks(Population(), TaskConfig(), num_tasks=200, seed=0)
    for task in tasks:
        assert len(pair_keys(task, "target")) == 20
        assert not pair_keys(task, "context") & pair_keys(task, "target")


def test_synthetic_tasks_are_reproducible_nested_and_balanced():
    config = TaskConfig(context_max=6, num_targets=4)
    tasks = SyntheticTasks(Population(), config, num_tasks=64, seed=0)
    batched = tasks.__getitems__([9, 2, 40])
    for index, task in zip((9, 2, 40), batched, strict=True):
        assert torch.equal(task.context_chosen, tasks[index].context_chosen)
        assert torch.equal(task.target_rejected, tasks[index].target_rejected)
    assert Counter(task.mode for task in tasks) == {"0": 32, "1": 32}
    assert pair_keys(tasks[6], "target") == pair_keys(tasks[7], "target")
    assert len({len(task.context_chosen) for task in tasks}) == 7

    def fixed(n, **changes):
        options = {"seed": 0, "stream": EVALUATION, "max_context": 6, **changes}
        return SyntheticTasks(Population(), config.with_context(n), num_tasks=8, **options)

    for short, long in zip(fixed(1), fixed(6), strict=True):
        assert torch.equal(short.context_chosen, long.context_chosen[:1])
        assert torch.equal(short.target_chosen, long.target_chosen)
    seen = pair_keys(tasks[0], "target")
    for other in (fixed(1), fixed(1, seed=1), fixed(1, stream=0, seed=1)):
        assert not seen & pair_keys(other[0], "target")


def test_bad_populations_are_refused():
    with pytest.raises(ValueError, match="rho: expected a correlation"):
        Population("normal", 1.5)
    with pytest.raises(ValueError, match="rho: expected 0 for the interval"):
        Population("interval", 0.5)


def test_synthetic_choices_among_several():
    config = TaskConfig(context_max=4, num_targets=50)
    for population in POPULATIONS:
        tasks = SyntheticTasks(population, config, num_tasks=20, seed=0, num_options=4)
        batch = collate_options(list(tasks))
        assert batch["target_rejected"].shape == (20, 50, 3, population.option_dim)
        best = population.rewards(batch["target_chosen"])
        others = population.rewards(batch["target_rejected"])
        for user in range(20):
            assert (best[user, :, None, user % 2] >= others[user, ..., user % 2]).all()
        # The best predictor never rules out what happened, and knows more with more context.
        assert torch.isfinite(population.bayes_log_probs(batch)[..., 0]).all()


def test_users_of_one_kind_only():
    config = TaskConfig(context_max=4, num_targets=5)
    both = SyntheticTasks(Population(), config, num_tasks=8, seed=0)
    for mode in (0, 1):
        tasks = SyntheticTasks(Population(), config, num_tasks=8, seed=0, mode=mode)
        assert {task.mode for task in tasks} == {str(mode)}
        for index in range(mode, 8, 2):
            assert torch.equal(tasks[index].target_chosen, both[index].target_chosen)
