"""Recipes: those that ship load, and a bad one names its file and field."""

import pytest
from pydantic import ValidationError

from fssa_runtime.training.reward_recipe import ChoiceFiles, RewardConfig
from fssa_runtime.training.trainer import load_config

from .reward_recipes import RECIPES, small_recipe, write_yaml

REWARD_RECIPES = [
    path for path in sorted(RECIPES.rglob("*.yaml")) if "hidden_dim" in path.read_text()
]


@pytest.mark.parametrize("path", REWARD_RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_load(path):
    assert load_config(path, RewardConfig).train.steps > 0


BAD_RECIPES = [
    ({"train": {"steps": 0}}, "train.steps: .*greater than or equal to 1, got 0"),
    ({"train": {"step": 3}}, "train.step: Extra inputs are not permitted, got 3"),
    ({"encoder": {"aggregate": "max"}}, "encoder.aggregate: .*'mean', 'sum' or 'attention'"),
    ({"model": "np"}, "model: Input should be 'np-btl', 'btl' or 'dpl', got 'np'"),
    ({"model": "dpl", "encoder": None, "head": "linear"}, "head: expected 'mlp' for model 'dpl'"),
    ({"model": "btl"}, "encoder: expected none for model 'btl'"),
    ({"kl_weight": 0.5}, "kl_weight: expected none unless encoder.stochastic"),
    ({"data": {"kind": "web"}}, "data: .*'kind'.*'synthetic', 'preferences', 'choices'"),
    ({"data": {"rho": 0.5}}, "data.synthetic: .*rho: expected 0 for the interval"),
    (
        {"tasks": {"disjoint_by": "prompt"}},
        "tasks.disjoint_by: expected 'pair' for data of kind 'synthetic'",
    ),
    ({"objective": "elbo"}, "objective: expected none unless encoder.stochastic"),
    ({"num_samples": 8}, "num_samples: expected none unless objective is 'marginal'"),
    (
        {"encoder": {"stochastic": True}, "objective": "marginal", "kl_weight": 1.0},
        "kl_weight: expected none unless .* objective 'elbo'",
    ),
    ({"evaluation": {"num_samples": 8}}, "evaluation.num_samples: expected 0 unless"),
    ({"evaluation": {"num_samples": 7}}, "evaluation.num_samples: .*multiple of 2"),
    (
        {"data": {"num_options": 3}, "evaluation": {"identification": True}},
        "evaluation.identification: expected false except on synthetic pairs",
    ),
    (
        {"data": {"mode": 1}, "evaluation": {"identification": True}},
        "evaluation.identification: expected false with data.mode",
    ),
    (
        {
            "data": {"population": "normal", "rho": 1.0},
            "evaluation": {"identification": True},
        },
        r"evaluation.identification: expected false at data.rho 1.0, where both kinds .* alike",
    ),
    (
        {"model": "dpl", "encoder": None, "data": {"num_options": 3}},
        "data.num_options: expected 2 for model 'dpl'",
    ),
    ({"evaluation": {"contexts": []}}, "evaluation.contexts: .*at least 1 item"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES)
def test_a_bad_recipe_names_file_and_field(tmp_path, changes, message):
    path = write_yaml(tmp_path / "bad.yaml", small_recipe(tmp_path, **changes))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path, RewardConfig)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["- 1\n", "a: [", "", "\x00"])
def test_what_is_not_a_recipe_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"bad\.yaml: expected"):
        load_config(write_yaml(tmp_path / "bad.yaml", content), RewardConfig)


def test_a_fold_is_one_of_the_folds():
    with pytest.raises(ValidationError, match=r"fold: expected 0\.\.2, got 3"):
        ChoiceFiles(kind="choices", files=("x",), num_folds=3, fold=3)
