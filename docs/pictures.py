"""The pictures of the documentation that no other command writes: `python docs/pictures.py`."""

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import fastlangevin as fl
from fastlangevin.learn import DivergedError, resolve, save_grid, train

DOCS = Path(__file__).parent
COMMON = {"width": 16, "activation": "leaky_relu", "iterations": 800, "log_every": 5, "ema": None}
RUNS = {
    "lr 0.001, data_noise 0.1": {"lr": 0.001, "lr_final": 0.0001, "data_noise": 0.1},
    "lr 0.005, data_noise 0": {"lr": 0.005, "anneal_start": 1.0, "data_noise": 0.0},
}


def chain() -> None:
    """Eight chains of the digits model, a row for every fourth step."""
    states = fl.load("digits").trajectory(n=8, seed=3, every=4)
    save_grid(states.flatten(0, 1), DOCS / "short-run-chain.png", columns=8)


def divergence() -> None:
    """The log of a run that is stable and of one that diverges."""
    plt.rcParams["svg.hashsalt"] = "fastlangevin"  # the same bytes for the same curves
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for name, changes in RUNS.items():
        records = learn({**COMMON, **changes})
        iterations = [record["iteration"] for record in records]
        for axis, (key, title, low, high) in zip(
            axes,
            [
                ("gap", "energy gap", -4, 4),
                ("grad_norm", "|dE/dx| in the chain", 0, 4),
                ("saturation", "saturation", 0, 1),
            ],
            strict=True,
        ):
            axis.plot(iterations, [record[key] for record in records], label=name, linewidth=1)
            axis.set(title=title, xlabel="iteration", ylim=(low, high))
    axes[0].legend(fontsize=7)
    figure.savefig(DOCS / "divergence.svg", metadata={"Date": None})


def learn(changes: dict) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        try:
            train(resolve("digits", changes), run)
        except DivergedError as error:
            print(error)
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    chain()
    divergence()
