"""Many samples as files of a folder, drawn by any number of processes and resumed after a stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import check_count
from fastlangevin.distributed import DistributedError, Group
from fastlangevin.gradients.modules import device_of
from fastlangevin.kernels.devices import device_name
from fastlangevin.learn.atomic import save_json
from fastlangevin.learn.checkpoint import checksum
from fastlangevin.learn.data.sample_folder import FORMAT, SAMPLES, VERSION, shard_paths
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.images import save_arrays
from fastlangevin.learn.job import VERSIONS, check_same_folder, compare_with_code
from fastlangevin.learn.reading import as_json, read_json
from fastlangevin.learn.run_folder import has_plan
from fastlangevin.sampler import LangevinSampler


def sample_shards(
    sampler: LangevinSampler,
    n: int,
    out: str | Path,
    *,
    seed: int = 0,
    per_file: int = 512,
    group: Group | None = None,
    report: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Draw n samples from noise into files of ``per_file`` samples each, and return their paths.

    The samples equal the result of one call ``sampler(n=n, seed=seed)``, in float32. The file of
    chains i, i + 1, ... is called i.npy, with eight digits. samples.json describes the files.
    Complete files are kept, so that the same call continues after a stop, with any number of
    processes. Each process draws the next file that is missing. The call returns when all files
    exist. On rank 0, ``report(samples written, n)`` is called on the way.

    Raises FileExistsError if the folder holds samples of another model, seed, number, version or
    kind of device, or other files; DistributedError if the processes differ, do not share the
    folder, or one of them fails.
    """
    out, group = Path(out), group or Group()
    plan = _plan(sampler, check_count("sample", "n", n), seed, per_file)
    compare_with_code(group, plan)
    group.first(lambda: _open_folder(out, plan), f"folder of samples {out}")
    check_same_folder(group, out, "sample")
    paths = shard_paths(out, n, per_file)
    try:
        with group.working():
            for i in group.deal(len(paths), "samples"):
                if paths[i].exists():
                    continue
                first = i * per_file
                x = sampler(n=min(per_file, n - first), seed=seed, first_chain=first)
                save_arrays(paths[i], x.float())
                group.check("samples")
                if report is not None and group.rank == 0:
                    n_written = _count_written(paths, per_file, n)
                    if n_written < n:
                        report(n_written, n)
        group.barrier("samples")
    except DistributedError as error:
        raise DistributedError(f"{error}; the same command continues") from error
    if report is not None and group.rank == 0:
        report(n, n)
    return paths


def _plan(sampler: LangevinSampler, n: int, seed: int, per_file: int) -> dict[str, Any]:
    """Return what the samples depend on, JSON-ready."""
    plan = {"format": FORMAT, "version": VERSION, "n": n, "per_file": per_file, "seed": seed}
    return as_json({**plan, **_identity(sampler), "device": _device(sampler), **VERSIONS})


def _identity(sampler: LangevinSampler) -> dict[str, Any]:
    """Return a digest of the weights, and the settings, of a sampler and of its start."""
    energy, values = sampler.energy, sampler.settings()
    start = values.pop("start")
    weights = energy.state_dict() if isinstance(energy, torch.nn.Module) else {}
    settings = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}
    identity = {"weights": checksum("", weights), "sampler": settings}
    return identity if start is None else identity | {"start": _identity(start)}


def _device(sampler: LangevinSampler) -> str:
    """Return the name of the GPU that computes the samples, or "cpu"."""
    device = device_of(sampler.energy) or torch.device("cpu")
    return device_name(device) if device.type == "cuda" else device.type


def _open_folder(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan into a new folder; FileExistsError unless an old one has the same plan."""
    file = out / SAMPLES
    if not has_plan("sample", out, SAMPLES, "samples"):
        save_json(file, plan, indent=1)
        return
    saved = read_json(file)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise FileError(f"{file} does not describe samples of fastlangevin")
    plan = {"start": None, **plan}  # which plans without a start do not name
    changed = [name for name in plan if saved.get(name) != plan[name]]
    if changed:
        changes = ", ".join(
            f"{name} ({saved.get(name)} there, {plan[name]} now)" for name in changed
        )
        raise FileExistsError(f"sample: {out} holds other samples: {changes}; name another folder")


def _count_written(paths: list[Path], per_file: int, n: int) -> int:
    """Return how many samples are in files that exist."""
    names = {path.name for path in paths[0].parent.glob("*.npy")}
    full = sum(path.name in names for path in paths[:-1]) * per_file
    return full + (n - (len(paths) - 1) * per_file) * (paths[-1].name in names)
