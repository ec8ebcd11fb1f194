"""Recipes for rewards that train in seconds."""

from pathlib import Path

import yaml

RECIPES = Path(__file__).parents[2] / "recipes"


def small_recipe(folder, **changes):
    """A deterministic NP-BTL on the synthetic task, for a few hundred steps at most."""
    recipe = {
        "model": "np-btl",
        "hidden_dim": 128,
        "data": {"kind": "synthetic", "population": "interval"},
        "tasks": {"context_max": 10, "num_targets": 20},
        "encoder": {"latent_dim": 64, "hidden_dim": 128, "aggregate": "mean"},
        "train": {
            "output_dir": str(folder),
            "steps": 200,
            "tasks_per_batch": 128,
            "learning_rate": 2e-3,
            "warmup_steps": 20,
            "cpu_threads": 1,
            "save_every": 0,
            "progress": "off",
            "tensorboard": False,
        },
        "evaluation": {"contexts": [0, 1, 3, 5, 10], "num_tasks": 2000, "num_targets": 20},
    }
    for name, value in changes.items():
        if isinstance(value, dict):
            recipe[name] = recipe.get(name, {}) | value
        else:
            recipe[name] = value
    return recipe


def write_yaml(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path
