"""Settings: configs and options, and what they resolve to."""

import dataclasses
import json
import math
import re
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastlangevin.learn import TrainConfig, resolve
from fastlangevin.learn.build import build_energy
from fastlangevin.learn.config import FIELDS, config_names, config_text, save_config

CONFIGS = ["anatomy-nonconvergent", "digits", "paper-64", "paper-cifar10"]

# The authors' published CIFAR-10 code, and what its authors' Anatomy code does otherwise.
PAPER = {
    "steps": 100,
    "step_size": 1.0,
    "noise_std": 0.01,
    "noise_order": "after",
    "clamp": None,
    "grad_clip": None,
    "width": 64,
    "activation": "leaky_relu",
    "leak": 0.2,
    "size": 32,
    "channels": 3,
    "flip": False,
    "limit": None,
    "batch_size": 64,
    "data_noise": 0.03,
    "lr": 1e-4,
    "beta1": 0.9,
    "beta2": 0.999,
    "iterations": 100_000,
    "ema": None,
    "buffer_size": 0,
    "buffer_kind": "index",
    "seed": 1,
}
ANATOMY = PAPER | {"steps": 150, "width": 32, "leak": 0.05, "batch_size": 100}

SOME = {"lr": 0.0002, "clamp": [-1.0, 1.5], "flip": True, "data": "x.npy", "ema": 0.99, "steps": 7}


def write(path: Path, settings: dict[str, Any]) -> Path:
    """Settings as a file in the format of its suffix."""
    if path.suffix == ".toml":
        lines = (f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
        path.write_text("".join(lines))
    else:
        dump = json.dumps if path.suffix == ".json" else yaml.safe_dump
        path.write_text(dump(settings))
    return path


# Presets -----------------------------------------------------------------------------------------


def test_the_configs_are_these() -> None:
    assert config_names() == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_states_every_setting_and_no_other(name: str) -> None:
    stated = yaml.safe_load(config_text(name))
    assert list(stated) == list(FIELDS)
    resolved = dataclasses.asdict(resolve(name))
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in resolved.items()} == stated


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("paper-cifar10", PAPER),
        ("paper-64", PAPER | {"size": 64}),
        ("anatomy-nonconvergent", ANATOMY),
    ],
)
def test_the_papers_numbers(name: str, numbers: dict[str, Any]) -> None:
    config = resolve(name)
    assert {key: getattr(config, key) for key in numbers} == numbers
    assert (config.lr_final, config.data_noise_final) == (config.lr, config.data_noise)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("paper-cifar10", 2_763_393), ("paper-64", 6_958_209), ("anatomy-nonconvergent", 693_569)],
)
def test_the_papers_nets(name: str, parameters: int) -> None:
    config = resolve(name, overrides={"device": "cpu"})
    data: Any = types.SimpleNamespace(shape=(config.channels, config.size, config.size))
    net = build_energy(config, data)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert (net.leak, net.activation) == (config.leak, config.activation)


def test_digits_is_the_default() -> None:
    assert resolve() == resolve("digits")
    assert resolve().data == "digits"


@pytest.mark.parametrize(
    ("name", "near"),
    [("paper-46", "; did you mean paper-64?"), ("Digits", "; did you mean digits?"), ("x", "")],
)
def test_an_unknown_config_is_refused_with_the_names_and_a_near_one(name: str, near: str) -> None:
    want = f"config must be one of {', '.join(CONFIGS)}, or a file, got '{name}'{near}"
    with pytest.raises(ValueError, match=f"^{re.escape(want)}$"):
        resolve(name)


# Files and precedence ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".toml", ".json", ""])
def test_every_format_says_the_same(suffix: str, tmp_path: Path) -> None:
    found = resolve(write(tmp_path / f"settings{suffix}", SOME))
    assert found == dataclasses.replace(resolve(), **SOME | {"clamp": (-1.0, 1.5)})


@pytest.mark.parametrize("indent", [2, "\t"], ids=["spaces", "tabs"])
def test_json_with_indentation(indent: int | str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(SOME, indent=indent))
    assert resolve(path) == resolve(overrides=SOME)


def test_options_win_over_the_file_and_the_file_over_the_config_it_names(tmp_path: Path) -> None:
    settings = {"config": "paper-cifar10", "steps": 11, "batch_size": 22}
    file = write(tmp_path / "a.yaml", settings)
    changed = resolve(file, {"batch_size": 33})
    assert (changed.batch_size, changed.steps, changed.width) == (33, 11, 64)
    assert resolve(file, {}) == resolve(file)


@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
def test_a_file_may_name_the_config_that_it_changes(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"a{suffix}", {"config": "paper-64", "steps": 11})
    assert resolve(file) == dataclasses.replace(resolve("paper-64"), steps=11)


def test_a_name_in_the_package_wins_over_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "digits", {"steps": 11})
    assert resolve("digits") == resolve()
    assert resolve(tmp_path / "digits").steps == resolve("./digits").steps == 11


def test_a_file_that_names_an_unknown_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config must be one of .*, got 'mine'"):
        resolve(write(tmp_path / "a.yaml", {"config": "mine"}))


def test_a_printed_config_is_a_file_to_start_from(tmp_path: Path) -> None:
    for name in CONFIGS:
        (tmp_path / "a.yaml").write_text(config_text(name))
        assert resolve(tmp_path / "a.yaml") == resolve(name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clamp": (-1.0, 1.0), "ema": 0.999, "data": "a path: with #signs"},
        {"lr": 1e-5 / 3, "max_energy": math.inf, "seed": 2**64 - 1},
        {"data": "1e3", "precision": "bf16", "grad_clip": 0.1, "limit": 5},
        {"data": "null"},
        {"data": "ünï/コード"},
    ],
    ids=str,
)
def test_a_saved_config_is_read_back(changes: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(resolve("paper-64"), **changes)
    save_config(config, tmp_path / "config.yaml")
    assert resolve(tmp_path / "config.yaml") == config
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text("utf-8"))) == list(FIELDS)


# Types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("lr", "1e-4", 1e-4),
        ("lr", 1, 1.0),
        ("iterations", "250", 250),
        ("iterations", 1e5, 100_000),
        ("iterations", "1e5", 100_000),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("seed", str(2**64 - 1), 2**64 - 1),
        ("ema", None, None),
        ("ema", "none", None),
        ("learn_precision", "none", None),
        ("ema", "0.5", 0.5),
        ("grad_clip", 2, 2.0),
        ("clamp", [-1, 1], (-1.0, 1.0)),
        ("clamp", (0, 0.5), (0.0, 0.5)),
        ("clamp", None, None),
        ("flip", True, True),
        ("data", None, None),
    ],
)
def test_a_value_becomes_its_settings_type(name: str, value: Any, want: Any) -> None:
    got = getattr(resolve(overrides={name: value}), name)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.e-4"])
def test_numbers_that_yaml_reads_as_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"lr: {text}\n")
    assert resolve(tmp_path / "a.yaml").lr == 1e-4


WRONG = [
    ("lr", "fast"),
    ("lr", True),
    ("lr", [1e-4]),
    ("lr", {"value": 1e-4}),
    ("lr", None),
    ("lr", math.nan),
    ("lr", ""),
    ("iterations", 1.5),
    ("iterations", "many"),
    ("iterations", True),
    ("iterations", None),
    ("iterations", math.inf),
    ("iterations", math.nan),
    ("iterations", [3]),
    ("size", 8.5),
    ("size", False),
    ("flip", 1),
    ("flip", "yes"),
    ("flip", None),
    ("data", True),
    ("data", ["a", "b"]),
    ("data", {"path": "a"}),
    ("device", None),
    ("on_corrupt", None),
    ("ema", "None"),
    ("ema", True),
    ("clamp", 1.0),
    ("clamp", True),
    ("clamp", "ab"),
    ("clamp", "12"),
    ("clamp", {-1.0: None, 1.0: None}),
    ("clamp", [1.0]),
    ("clamp", [-1.0, 0.0, 1.0]),
    ("clamp", ["low", "high"]),
    ("clamp", [None, 1.0]),
    ("clamp", [[-1.0], [1.0]]),
    ("clamp", {"lo": -1.0, "hi": 1.0}),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{k}={v!r}" for k, v in WRONG])
def test_values_of_a_wrong_type_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got ") as caught:
        resolve(overrides={name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("where", "unknown"),
    [
        ("options", ["learning_rate"]),
        ("options", ["Lr", "step-size"]),
        ("file", ["learning_rate"]),
        ("file", [1]),
        ("file", [1, "x", None]),
    ],
    ids=str,
)
def test_unknown_settings_are_named(where: str, unknown: list[Any], tmp_path: Path) -> None:
    """With where they came from, and what there is instead. YAML's keys may be numbers."""
    settings = dict.fromkeys(unknown, 2) | {"lr": 1e-4}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False) if where == "file" else "{}")
    source = str(file) if where == "file" else "options"
    match = f"^{source}: no setting is called .*; the settings are data, .*, samples$"
    with pytest.raises(ValueError, match=match) as caught:
        resolve(file, overrides=settings if where == "options" else None)
    named = str(caught.value).removeprefix(f"{source}: no setting is called ").split(";")[0]
    assert sorted(named.split(", ")) == sorted(map(str, unknown))


# Files that cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.yaml", b"lr: [1\nb: }", "cannot be read as yaml"),
        ("a.yaml", b"lr: !!python/object/apply:os.getcwd []", "cannot be read as yaml"),
        ("a.toml", b"lr = ", "cannot be read as toml"),
        ("a.toml", b"lr: 1", "cannot be read as toml"),
        ("a.json", b'{"lr": 1', "cannot be read as json"),
        ("a", b"lr: [1", "cannot be read as yaml"),
        ("a.yaml", b"", "must hold settings by name, got NoneType"),
        ("a.yaml", b"- lr\n- 1", "must hold settings by name, got list"),
        ("a.json", b"3", "must hold settings by name, got int"),
        ("a.yaml", b"\xff\xfe\x00lr", ""),
        ("a.toml", b"\x89PNG\r\n", ""),
    ],
)
def test_files_that_hold_no_settings(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / name} .*{match}"):
        resolve(tmp_path / name)


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "a.yaml")):
        resolve(tmp_path / "a.yaml")


def test_every_setting_is_explained() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainConfig))
