"""Evaluate the samples of a run, or samples in files, against the data of the run."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlangevin.distributed import Group, split_rows
from fastlangevin.learn.build import choose_device, fingerprint
from fastlangevin.learn.checkpoint import checksum, find_checkpoint, read_checkpoint, run_folder
from fastlangevin.learn.config import TrainConfig
from fastlangevin.learn.data.load import ImageData, load_images
from fastlangevin.learn.evaluation.evaluate import (
    Evaluation,
    evaluate,
    save,
    shuffled,
    to_text,
    yardsticks,
)
from fastlangevin.learn.evaluation.features import make_features
from fastlangevin.learn.job import compare_with_code
from fastlangevin.learn.model import load
from fastlangevin.learn.run_data import load_held_out
from fastlangevin.progress import Report, silent
from fastlangevin.sampler import LangevinSampler

_BATCH = 256


class RunEvaluation(NamedTuple):
    """An evaluation, with facts about its samples."""

    evaluation: Evaluation
    files: str | None  # name of the samples if they were read from files
    facts: dict[str, Any]  # JSON-ready
    folder: Path | None  # of the run; None for a model without a run and for samples in files

    def text(self) -> str:
        """Return the table, with the name of the samples if they were read from files."""
        text = to_text(self.evaluation)
        return text if self.files is None else f"samples    {self.files}\n{text}"

    def save(self, path: Path) -> None:
        """Write the figures as JSON."""
        save(self.evaluation, path, **self.facts)


def evaluate_run(
    run: str | Path,
    config: TrainConfig,
    train: ImageData,
    *,
    n: int | None = None,
    samples: str | None = None,
    images: str | None = None,
    features: str = "auto",
    reference: int = 2048,
    noise: Sequence[float] = (0.3,),
    quantise: bool = True,
    k: int = 3,
    seed: int = 1,
    device: str = "auto",
    averaged: bool = True,
    group: Group | None = None,
    report: Report = silent,
) -> RunEvaluation:
    """Evaluate n samples, and as many held-out images, noisy images and images of uniform noise.

    The arguments are those of the command ``evaluate``, of :func:`evaluate`, :func:`make_features`
    and :func:`yardsticks`. If no images are held out, training images that are not in the reference
    take their place, with a warning. All processes of ``group`` call this function, and return the
    same figures. Raises ValueError naming the argument, before any sample is drawn.
    """
    group = group or Group()
    checkpoint, torch_device = find_checkpoint(run), choose_device(device)
    with group.working():
        held_out = _held_out(config, train, images)
        read = _read_samples(samples, train, config.on_corrupt)
    order = shuffled(train if held_out is None else held_out, seed)
    if held_out is None:
        reference = min(reference, len(train) // 2)
        order = order[reference:]
    name, source = ("held-out data", held_out) if held_out else ("other training images", train)
    n = _choose_count(n, k, {name: len(order)} | ({"samples": len(read)} if read else {}))
    options = {"n": n, "features": features, "reference": reference, "noise": list(noise),
               "quantise": quantise, "k": k, "seed": seed, "averaged": averaged}  # fmt: skip
    sources = {"the data": train, "the held-out images": held_out, "the samples": read}
    _compare_work(group, options, sources, checkpoint)
    sampler = None if read else _load_for(train, checkpoint, torch_device, averaged)
    extract = make_features(features, train, torch_device, group)
    real = source.batch(order[:n]).to(torch_device)
    marks = yardsticks(real, list(noise), seed)
    facts: dict[str, Any] = {"run": str(run), "samples": samples}
    if read:
        drawn = read.batch(shuffled(read, seed)[:n]).to(torch_device)
    elif sampler is not None:
        drawn = _draw(sampler, n, seed, group, report)
        iteration = read_checkpoint(checkpoint)[1].get("iteration")
        facts |= {"iteration": iteration, "averaged": averaged, "steps": sampler.steps}
    evaluation = evaluate(
        {name: real, "samples": drawn} | marks, train, extract,
        held_out=name if held_out else None, reference=reference, quantised=quantise, k=k,
        seed=seed, group=group, report=report,
    )  # fmt: skip
    facts |= {"seed": seed, "held_out": held_out.name if held_out else None}
    files = f"{n} of {read.name}" if read else None
    return RunEvaluation(evaluation, files, facts, None if read else run_folder(checkpoint))


def _choose_count(n: int | None, k: int, available: dict[str, int]) -> int:
    """Return the number of images per set, from the numbers that are available by name."""
    scarce = min(available, key=available.__getitem__)
    if n is not None and n > available[scarce]:
        raise ValueError(
            f"evaluate: n must be at most {available[scarce]}, the {scarce} there are, got {n}"
        )
    n = n or min(2048, available[scarce])
    if n <= k:
        raise ValueError(f"evaluate: k must be less than the {n} images of a set, got {k}")
    return n


def _compare_work(
    group: Group, options: dict[str, Any], sources: dict[str, ImageData | None], checkpoint: Path
) -> None:
    """Raise DistributedError unless all processes have equal options, images and checkpoints."""
    if group.world_size == 1:
        return
    with group.working():
        tensors, info = read_checkpoint(checkpoint)
    digests: dict[str, Any] = {name: data and fingerprint(data) for name, data in sources.items()}
    digests["the checkpoint"] = checksum(json.dumps(info), tensors)
    compare_with_code(group, options | digests)


def _held_out(config: TrainConfig, train: ImageData, images: str | None) -> ImageData | None:
    try:
        return load_held_out(config, train.shape, images)
    except ValueError as error:
        if images is not None:
            raise
        warnings.warn(f"no held-out images: {error}", stacklevel=3)
        return None


def _read_samples(samples: str | None, train: ImageData, on_corrupt: str) -> ImageData | None:
    if samples is None:
        return None
    read = load_images(samples, channels=train.shape[0], on_corrupt=on_corrupt, bounded=False)
    if read.shape != train.shape:
        raise ValueError(
            f"evaluate: samples must be images of {list(train.shape)}, as the data are, got "
            f"{read.name}"
        )
    return read


def _load_for(
    train: ImageData, checkpoint: Path, device: torch.device, averaged: bool
) -> LangevinSampler:
    """Load a sampler; ValueError if its images do not have the data's shape."""
    sampler = load(checkpoint, device=device, averaged=averaged)
    shape = getattr(sampler.energy, "shape", None)
    if shape is not None and tuple(shape) != tuple(train.shape):
        raise ValueError(
            f"evaluate: data must be images of the model's shape {list(shape)}, got {train.name}"
        )
    return sampler


def _draw(sampler: LangevinSampler, n: int, seed: int, group: Group, report: Report) -> Tensor:
    def draw(rows: slice) -> tuple[Tensor]:
        parts: list[Tensor] = []
        for i in range(rows.start, rows.stop, _BATCH):
            parts.append(sampler(n=min(_BATCH, rows.stop - i), seed=seed, first_chain=i))
            report("sample", i + len(parts[-1]) - rows.start, rows.stop - rows.start)
        return (torch.cat(parts),)

    (samples,) = split_rows(group, n, _BATCH, draw, "the samples")
    assert samples is not None
    return samples
