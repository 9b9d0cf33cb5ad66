"""Checkpoints and records that are damaged: found, named, and never gone on from in silence."""

import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlangevin.learn import TrainConfig, resolve, train
from fastlangevin.learn.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    checksum,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from fastlangevin.learn.errors import FileError
from fastlangevin.learn.log import RunLog, read_records, read_series
from fastlangevin.learn.model import load
from fastlangevin.learn.run_data import run_config
from tests.command import run_command

SETTINGS = {
    "size": None,
    "channels": None,
    "width": 1,
    "steps": 1,
    "batch_size": 2,
    "iterations": 4,
    "save_every": 2,
    "log_every": 1,
    "sample_every": 4,
    "samples": 1,
    "ema": 0.9,
    "buffer_size": 2,
    "buffer_kind": "fifo",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8))
    return resolve("paper-cifar10", overrides=SETTINGS | {"data": str(path)})


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never damaged, with checkpoints of iterations 2 and 4."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config, out)
    return out


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Bit for bit, under the same names."""
    return one.keys() == two.keys() and all(
        (value.dtype, value.shape) == (two[name].dtype, two[name].shape)
        and value.numpy().tobytes() == two[name].numpy().tobytes()
        for name, value in one.items()
    )


def flipped(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


# Bits and bytes ----------------------------------------------------------------------------------


def places(content: bytes) -> list[int]:
    """Every 97th byte, the header's last (padding), and the first and last of every tensor."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    ends = [8 + length + at for entry in header.values() for at in entry["data_offsets"]]
    return sorted({*range(0, len(content), 97), *(at - 1 for at in ends), *ends} - {len(content)})


def test_a_flipped_bit_is_found_wherever_it_is(whole: Path, tmp_path: Path) -> None:
    """In the header, its padding and every tensor; nothing in the file is free to change."""
    content = list_checkpoints(whole)[-1].read_bytes()
    path = tmp_path / "flipped.safetensors"
    for count, position in enumerate(places(content)):
        path.write_bytes(flipped(content, position, bit=count % 8))
        with pytest.raises(DamagedCheckpointError, match=f"^{path} "):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.uint16, torch.bool],
)
def test_every_dtype_is_written_checked_and_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"odd": torch.ones(3).to(dtype), "empty": torch.zeros(0, 2), "last": torch.ones(())}
    save_checkpoint(tmp_path / "a", tensors, {})
    save_checkpoint(tmp_path / "b", dict(reversed(tensors.items())), {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for read in (read_checkpoint(tmp_path / "a")[0], load_file(tmp_path / "a")):
        assert all(read[name].dtype == value.dtype for name, value in tensors.items())
        assert all(torch.equal(read[name].float(), v.float()) for name, v in tensors.items())


def test_a_truncated_file_is_found_at_every_length(whole: Path, tmp_path: Path) -> None:
    content = list_checkpoints(whole)[-1].read_bytes()
    path = tmp_path / "short.safetensors"
    for length in {*range(0, len(content), 97), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(DamagedCheckpointError, match=f"^{path} "):
            read_checkpoint(path)


def test_a_blanked_block_is_found(whole: Path, tmp_path: Path) -> None:
    """As a disk leaves it that lost a write: zeros, wherever there was something else."""
    content = list_checkpoints(whole)[-1].read_bytes()
    path = tmp_path / "blanked.safetensors"
    size = 64
    for start in range(0, len(content), size):
        blank = content[:start] + bytes(len(content[start : start + size]))
        path.write_bytes(blank + content[start + size :])
        if path.read_bytes() != content:
            with pytest.raises(DamagedCheckpointError, match=f"^{path} "):
                read_checkpoint(path)


def test_tensors_that_have_changed_places_are_found(whole: Path, tmp_path: Path) -> None:
    """The checksum is of names, dtypes and shapes too, and of the JSON."""
    tensors, info = read_checkpoint(whole)
    header = json.dumps(info)
    weight, average = "model.layers.0.weight", "ema.layers.0.weight"
    changes = [
        tensors | {weight: tensors[average], average: tensors[weight]},
        tensors | {weight: tensors[weight].flatten()},
        tensors | {weight: tensors[weight].view(torch.int32)},
        {name: value for name, value in tensors.items() if name != "buffer_added"},
        tensors | {"more": torch.zeros(0)},
    ]
    sums = {checksum(header, each) for each in (tensors, *changes)}
    assert len(sums | {checksum(header + " ", tensors)}) == len(changes) + 2


@pytest.mark.parametrize("where", [40, "cut"])
def test_a_resumed_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    where: int | str, config: TrainConfig, whole: Path, copied: Path
) -> None:
    """It says so, and its end is the older checkpoint's continuation bit for bit."""
    older, newest = list_checkpoints(copied)
    content = newest.read_bytes()
    damaged = content[:999] if where == "cut" else flipped(content, int(where), 4)
    newest.write_bytes(damaged)
    with pytest.warns(UserWarning, match=f"{newest} .* continues from {older}"):
        train(config, copied, resume=True)
    assert newest.read_bytes() == content
    assert newest.with_suffix(".damaged").read_bytes() == damaged
    without_seconds = [
        [{k: v for k, v in record.items() if k != "seconds"} for record in read_records(run)]
        for run in (copied, whole)
    ]
    assert without_seconds[0] == without_seconds[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(config, copied, resume=True)


def test_reading_a_damaged_run_names_the_checkpoint_before(copied: Path) -> None:
    """Other weights are for the user to choose."""
    older, newest = list_checkpoints(copied)
    newest.write_bytes(flipped(newest.read_bytes(), -1, 0))
    with pytest.raises(DamagedCheckpointError, match=f"^{newest} .*; the one before it is {older}"):
        load(copied)


def test_another_version_is_not_taken_for_damage(config: TrainConfig, copied: Path) -> None:
    """The newest checkpoint may be of a later fastlangevin, which went on with the run."""
    newest = list_checkpoints(copied)[-1]
    tensors, info = read_checkpoint(newest)
    save_checkpoint(newest, tensors, info | {"version": 2})
    with pytest.raises(CheckpointError, match=f"^{newest} is a .* of version 2") as caught:
        train(config, copied, resume=True)
    assert not isinstance(caught.value, DamagedCheckpointError)
    assert newest.exists()


def test_a_checkpoint_without_a_checksum_is_read(whole: Path, tmp_path: Path) -> None:
    """Earlier versions wrote none."""
    tensors, info = read_checkpoint(whole)
    save_file(tensors, tmp_path / "old", metadata={"fastlangevin": json.dumps(info)})
    found = read_checkpoint(tmp_path / "old")
    assert same(found[0], tensors)
    assert found[1] == info


# Content of a wrong kind -------------------------------------------------------------------------

WRONG = [None, True, -1, 0, 1.5, math.nan, "x", [], [1], [[]], {}, {"a": 1}]


def refusal(read: Callable[[], object]) -> str:
    """What an error for the user says; empty if there is none. Any other error is a failure."""
    try:
        read()
    except FileError as error:
        return str(error)
    return ""


def with_info(run: Path, path: Path, **changes: Any) -> Path:
    """A checkpoint whose checksum is right, and whose header is not."""
    tensors, info = _read_once(run)
    save_checkpoint(path, tensors, info | changes)
    return path


@functools.cache
def _read_once(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return read_checkpoint(run)


@pytest.mark.parametrize("wrong", [None, True, -1, 1.5, "x", [1], {"a": 1}], ids=str)
def test_headers_of_wrong_types_are_refused_by_name(
    wrong: Any, config: TrainConfig, copied: Path
) -> None:
    """By what needs them: a sampler, a command, a resumed run."""
    newest = list_checkpoints(copied)[-1]
    tensors, info = read_checkpoint(newest)
    readers = {
        "energy": lambda: load(newest),
        "sampler": lambda: load(newest),
        "config": lambda: run_config(newest),
        "iteration": lambda: train(config, copied, resume=True),
    }
    fine = {"energy": ({},), "sampler": ({},), "config": ({},), "iteration": (0,)}
    for part, read in readers.items():
        save_checkpoint(newest, tensors, info | {part: wrong})
        if part == "config" and wrong is None:  # of a learner's own
            continue
        said = refusal(read)
        assert said.startswith(f"{newest} ") or wrong in fine[part], (part, said)


@pytest.mark.parametrize("part", ["energy", "sampler", "config"])
def test_settings_of_wrong_types_are_refused_by_name(
    part: str, whole: Path, tmp_path: Path
) -> None:
    """Every setting in a header, as every other type; what is not refused serves."""
    _, info = read_checkpoint(whole)
    path = tmp_path / "wrong.safetensors"

    def read() -> object:
        return run_config(path) if part == "config" else load(path)(n=1, seed=0)

    refused = 0
    # Each setting meets some of them. Of a run's 33 one each: a preset is parsed for each.
    for i, name in enumerate(info[part]):
        for wrong in WRONG[i % 3 :: 3] if part != "config" else [[[[]], {"a": 1}][i % 2]]:
            with_info(whole, path, **{part: info[part] | {name: wrong}})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = refusal(read)
            assert said == "" or said.startswith(f"{path} "), (name, wrong)
            refused += said != ""
    assert refused >= len(info[part]) * (2 if part != "config" else 0.5)


def test_a_header_does_not_decide_how_much_memory_is_taken(whole: Path, tmp_path: Path) -> None:
    """A network of 10^15 weights is described in a few bytes; the file's weights are compared."""
    energy = read_checkpoint(whole)[1]["energy"] | {"width": 10**6, "size": 256}
    path = with_info(whole, tmp_path / "huge.safetensors", energy=energy)
    with pytest.raises(CheckpointError, match=f"^{path} is of another architecture"):
        load(path)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.weight", "ema_updates", "adam.step.layers.0.bias", "buffer", "buffer_added"],
)
def test_tensors_of_wrong_shapes_are_refused_by_name(
    name: str, config: TrainConfig, copied: Path
) -> None:
    newest = list_checkpoints(copied)[-1]
    tensors, info = read_checkpoint(newest)
    for wrong in (torch.zeros(0), torch.zeros(2, 3), torch.zeros(1, 1, 1, 1)):
        save_checkpoint(newest, tensors | {name: wrong}, info)
        with pytest.raises(FileError, match=f"^{newest} "):
            train(config, copied, resume=True)
    save_checkpoint(newest, {k: v for k, v in tensors.items() if k != name}, info)
    with pytest.raises(FileError, match=f"^{newest} "):
        train(config, copied, resume=True)


DEEP = "[" * 100_000


def test_headers_that_are_not_a_mapping_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "header.safetensors"
    for header in (DEEP, "", "1", "null", "[1]", '"x"', "{", "NaN", "9" * 5000):
        save_file({"x": torch.zeros(1)}, path, metadata={"fastlangevin": header})
        with pytest.raises(FileError, match=f"^{path} "):
            read_checkpoint(path)


BAD_LINES = [
    DEEP,
    "[1]",
    "3",
    '"text"',
    "null",
    "{}",
    '{"iteration": "2", "gap": 1, "reach": 1}',
    '{"iteration": 2.0, "gap": 1, "reach": 1}',
    '{"iteration": true, "gap": 1, "reach": 1}',
    '{"iteration": -1, "gap": 1, "reach": 1}',
    '{"iteration": null, "gap": 1, "reach": 1}',
    '{"iteration": [2], "gap": 1, "reach": 1}',
    '{"iteration": 2, "gap": "1", "reach": 1}',
    '{"iteration": 2, "gap": [1], "reach": {}}',
    '{"iteration": 2, "gap": null, "reach": null}',
]


@pytest.mark.parametrize("name", ["metrics.jsonl", "series.jsonl"])
def test_records_of_a_wrong_kind_are_refused_by_file_and_line(name: str, copied: Path) -> None:
    path = copied / name
    lines = path.read_text().splitlines()
    read = read_records if name == "metrics.jsonl" else read_series
    for bad in BAD_LINES:
        path.write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n")
        with pytest.raises(FileError, match=f"^{path}, line 2: "):
            read(copied)
        with pytest.raises(FileError, match=f"^{path}, line 2: "):
            RunLog(copied, 4)


def test_settings_of_a_run_that_are_damaged_are_refused_by_name(
    config: TrainConfig, copied: Path
) -> None:
    path = copied / "config.yaml"
    text = path.read_text()
    for before, after in (("steps: 1", "steps: x"), ("width: 1", "wide: 1"), ("lr: ", "lr: -")):
        path.write_text(text.replace(before, after))
        assert path.read_text() != text
        with pytest.raises(FileError, match=f"^{path}"):
            train(config, copied, resume=True)


def test_commands_say_it_in_one_line(copied: Path) -> None:
    newest = list_checkpoints(copied)[-1]
    newest.write_bytes(flipped(newest.read_bytes(), -1, 0))
    for command in (["sample", "--n", "1", "--out", str(copied / "x.png")], ["export"]):
        found = run_command(command[0], copied, *command[1:])
        assert found.exit_code == 1
        assert found.stderr.count("\n") == 1
        assert f"{newest} is damaged: its checksum" in found.stderr


def test_a_command_warns_in_one_line_and_goes_on(config: TrainConfig, copied: Path) -> None:
    newest = list_checkpoints(copied)[-1]
    newest.write_bytes(flipped(newest.read_bytes(), -1, 0))
    found = run_command("train", "--out", copied, "--resume")
    assert found.exit_code == 0, found.output
    lines = [line for line in found.stderr.splitlines() if "checksum" in line]
    assert lines[0].startswith(f"warning: train: {newest} is damaged")
    assert len(lines) == 1
    assert dataclasses.replace(config) == resolve(copied / "config.yaml")
