"""What rounding costs, and the types that a number of bytes buys."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor, nn

from overproof.errors import InputError
from overproof.export.sensitivity import Option, choose_types, fisher_diagonal
from overproof.models.base import Prediction

KINDS = (Ggml.Q4_0, Ggml.Q5_0, Ggml.Q8_0)


def options(rng: np.random.Generator, matrices: int) -> dict[str, list[Option]]:
    found = {}
    for number in range(matrices):
        size, cost = int(rng.integers(10, 200)), rng.uniform(0.1, 10)
        costs = (cost, cost * rng.uniform(0.1, 0.6), cost * rng.uniform(0.0, 0.1))
        sizes = (4 * size, 5 * size, 8 * size)
        found[f"m{number}"] = [Option(*each) for each in zip(KINDS, sizes, costs, strict=True)]
    return found


def total(given: dict[str, list[Option]], chosen: dict[str, Ggml]) -> tuple[int, float]:
    taken = [next(option for option in given[name] if option.kind is kind) for name, kind in chosen.items()]
    return sum(option.size_bytes for option in taken), sum(option.cost for option in taken)


@pytest.mark.parametrize("seed", range(12))
def test_what_a_budget_buys_is_the_best_that_is_within_it(seed: int) -> None:
    given = options(np.random.default_rng(seed), 5)
    for kind in KINDS[:2]:
        uniform = dict.fromkeys(given, kind)
        budget, cost = total(given, uniform)
        found = total(given, choose_types(given, budget, "x"))
        assert (found[0] <= budget, found[1] <= cost * 1.0000001) == (True, True)
    budget = int(1.4 * total(given, dict.fromkeys(given, Ggml.Q4_0))[0])
    best = min(
        cost
        for kinds in product(KINDS, repeat=5)
        for size, cost in [total(given, dict(zip(given, kinds, strict=True)))]
        if size <= budget
    )
    assert total(given, choose_types(given, budget, "x"))[1] == pytest.approx(best)


def test_budgets_of_millions_of_bytes_are_kept_though_they_are_counted_in_larger_units() -> None:
    rng = np.random.default_rng(0)
    given = {
        name: [replace(option, size_bytes=option.size_bytes * 70_001 + int(rng.integers(99))) for option in found]
        for name, found in options(rng, 40).items()
    }
    uniform = total(given, dict.fromkeys(given, Ggml.Q5_0))
    found = total(given, choose_types(given, uniform[0] + 100_000, "x"))
    assert found[0] <= uniform[0] + 100_000
    assert found[1] < uniform[1]


def test_a_budget_that_nothing_meets_names_what_is_missing() -> None:
    given = {"a": [Option(Ggml.Q4_0, 3_000_000, 1.0), Option(Ggml.Q8_0, 6_000_000, 0.1)]}
    with pytest.raises(
        InputError, match=r"x: 2\.50 MB are left .* the least they take is 3\.00 MB: give 0\.50 MB more"
    ):
        choose_types(given, 2_500_000, "x")
    assert choose_types(given, 3_000_000, "x") == {"a": Ggml.Q4_0}
    assert choose_types(given, 6_000_000, "x") == {"a": Ggml.Q8_0}


def test_the_cost_of_small_errors_is_what_the_loss_grows_by() -> None:
    """Where the model is as sure as its labels are: drawn from it."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    inputs = torch.randn(4000, 6)
    with torch.no_grad():
        labels = torch.multinomial(model(inputs).softmax(-1), 1)[:, 0]

    def predict(of: nn.Module, batch: dict[str, Tensor]) -> Prediction:
        logits = of(batch["x"])[:, None]
        return Prediction(logits, batch["y"][:, None], torch.ones(len(logits), 1, dtype=torch.bool))

    batches = [{"x": inputs[i : i + 1], "y": labels[i : i + 1]} for i in range(len(inputs))]
    told = list[int]()
    (fisher,) = fisher_diagonal(model, ["weight"], batches, predict, told.append).values()
    assert told[-1] == 4000
    errors = 0.05 * torch.randn(200, 4, 6)
    with torch.no_grad():
        before = nn.functional.cross_entropy(model(inputs), labels)
        grown = [
            float(nn.functional.cross_entropy(inputs @ (model.weight + error).T, labels) - before) for error in errors
        ]
    foretold = [float(0.5 * (fisher * error.square()).sum()) for error in errors]
    assert np.mean(grown) == pytest.approx(np.mean(foretold), rel=0.15)
