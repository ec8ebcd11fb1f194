"""Multinomial and mixed logit estimated by xlogit. Runs in the environment `xlogit`.

    python -m benchmarks.peers.mixed_logit CHOICES.npz --draws 500

The file holds options [N, K, E] with the chosen one first, available [N, K] and persons [N]. The
utility of an option is linear in its features, the same coefficients for every alternative. In the
mixed logit every coefficient is Normal over the persons, independently, and the same for all
choices of a person (panel); it is estimated by simulated maximum likelihood with Halton draws. One
line of JSON goes to the standard output: `library`, `draws`, `seconds`, and for each model
`log_likelihood` (nats, of the data it was estimated on), `converged`, `mean` and `std` [E].

Numpy, SciPy and xlogit only: nothing of this project.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from xlogit import MixedLogit, MultinomialLogit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("choices", type=Path)
    parser.add_argument("--draws", type=int, default=500)
    arguments = parser.parse_args()
    data = np.load(arguments.choices)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        multinomial = estimate(MultinomialLogit(), data)
        mixed = estimate(MixedLogit(), data, draws=arguments.draws)
    report = {
        "library": f"xlogit {version('xlogit')}",
        "draws": arguments.draws,
        "seconds": time.perf_counter() - start,
        "multinomial": multinomial,
        "mixed": mixed,
    }
    print(json.dumps(report))


def estimate(model: Any, data: Any, *, draws: int = 0) -> dict[str, Any]:
    """Maximum likelihood of a multinomial logit, or simulated with `draws` of a mixed one."""
    order = np.argsort(data["persons"], kind="stable")
    options, available = data["options"][order].astype(float), data["available"][order]
    persons = np.unique(data["persons"][order], return_inverse=True)[1]
    num_choices, num_options, num_features = options.shape
    names = [f"x{e}" for e in range(num_features)]
    long = {
        "X": options.reshape(-1, num_features),
        "y": np.tile(np.arange(num_options) == 0, num_choices),
        "varnames": names,
        "alts": np.tile(np.arange(num_options), num_choices),
        "ids": np.repeat(np.arange(num_choices), num_options),
        "avail": available.reshape(-1).astype(int),
        "verbose": 0,
    }
    if draws:
        long |= {
            "panels": np.repeat(persons, num_options),
            "randvars": dict.fromkeys(names, "n"),
            "n_draws": draws,
            "halton": True,
        }
    model.fit(**long)
    values = dict(zip(model.coeff_names, model.coeff_.tolist(), strict=True))
    return {
        "log_likelihood": float(model.loglikelihood),
        "converged": bool(model.convergence),
        "mean": [values[name] for name in names],
        # The sign of a scale is not identified.
        "std": [abs(values[f"sd.{name}"]) if draws else 0.0 for name in names],
    }


if __name__ == "__main__":
    main()
