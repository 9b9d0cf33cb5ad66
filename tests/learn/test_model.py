"""Samplers as files: any energy's weights and settings, here or on the hub."""

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from fastlangevin.learn.checkpoint import CheckpointError, read_checkpoint
from tests.command import run_command

SHAPE = (1, 8, 8)


class Own(nn.Module):
    """An energy of somebody's own, with a buffer and weights of two dtypes."""

    shape = SHAPE

    def __init__(self, width: int = 5, extra: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.last = nn.Linear(width, 1)
        self.register_buffer("scale", torch.full((), 0.5, dtype=torch.float64))
        if extra:
            self.extra = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)).tanh()).flatten() * self.scale.float()


class Score(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def own(seed: int = 0, **settings: Any) -> Own:
    torch.manual_seed(seed)
    return Own(**settings)


SETTINGS: dict[str, dict[str, Any]] = {
    "numbers": {"steps": 3, "step_size": 0.5, "noise_std": 0.02, "clamp": (-1.0, 1.0)},
    "schedule": {"steps": 3, "step_size": [0.5, 0.25, 0.1], "grad_clip": 0.01},
    "tensor": {"steps": 2, "step_size": torch.tensor([[0.5], [0.1]]), "noise_std": 0.0},
    "clip": {"steps": 2, "grad_clip": ("chain_norm", 0.1), "noise_order": "before"},
    "ascent": {"steps": 2, "maximize": True, "gradient": "autograd", "backend": "reference"},
    "adjusted": {"steps": 2, "step_size": 0.1, "noise_std": 0.1, "metropolis": True},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_an_own_energy_comes_back_with_its_settings(case: str, tmp_path: Path) -> None:
    sampler = fl.LangevinSampler(own(), **SETTINGS[case])
    fl.save(sampler, tmp_path / "a.safetensors")
    again = fl.load(tmp_path / "a.safetensors", energy=own(seed=1))
    assert torch.equal(again(n=4, seed=7), sampler(n=4, seed=7))
    for name, value in sampler.settings().items():
        loaded = again.settings()[name]
        assert torch.equal(loaded, value) if isinstance(value, Tensor) else loaded == value


@pytest.mark.parametrize("case", ["schedule", "tensor"])
def test_a_model_with_schedules_keeps_its_steps_unless_they_change_too(
    case: str, tmp_path: Path
) -> None:
    path, steps = tmp_path / "a.safetensors", SETTINGS[case]["steps"]
    fl.save(fl.LangevinSampler(own(), **SETTINGS[case]), path)
    with pytest.raises(ValueError, match=f"has schedules of {steps} steps in step_size; give"):
        fl.load(path, energy=own(), steps=9)
    assert fl.load(path, energy=own(), steps=9, step_size=0.1).steps == 9
    assert fl.load(path, energy=own(), steps=steps).steps == steps


def test_a_conv_energy_needs_no_argument_and_a_score_network_stays_one(tmp_path: Path) -> None:
    sampler = fl.LangevinSampler(fl.ConvEnergy(1, 8, 4, activation="silu").double(), steps=2)
    fl.save(sampler, tmp_path / "deep" / "a.safetensors")
    again = fl.load(tmp_path / "deep" / "a.safetensors")
    assert next(again.energy.parameters()).dtype == torch.float64
    assert torch.equal(again(n=3, seed=1), sampler(n=3, seed=1))
    score = fl.LangevinSampler.from_score(Score(), steps=2)
    fl.save(score, tmp_path / "b.safetensors")
    x0 = torch.ones(2, 3)
    loaded = fl.load(tmp_path / "b.safetensors", energy=Score())
    assert torch.equal(loaded(x0, seed=0), score(x0, seed=0))


def test_every_misfit_is_listed_and_the_energy_left_alone(tmp_path: Path) -> None:
    fl.save(fl.LangevinSampler(own(extra=True)), tmp_path / "a.safetensors")
    other = own(seed=1, width=6)
    before = [value.clone() for value in other.state_dict().values()]
    with pytest.raises(CheckpointError) as error:
        fl.load(tmp_path / "a.safetensors", energy=other)
    for text in (
        "Own.first.weight needs [6, 64], the file has [5, 64]",
        "Own.last.weight needs [1, 6], the file has [1, 5]",
        "Own.extra needs nothing, the file has [3]",
    ):
        assert text in str(error.value)
    assert all(map(torch.equal, before, other.state_dict().values()))
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(9)))
    with pytest.raises(CheckpointError, match=r"needs \[1, 1\], .* has nothing.*; and 19 more"):
        fl.load(tmp_path / "a.safetensors", energy=many)


def test_a_custom_energy_that_is_not_given_is_named(tmp_path: Path) -> None:
    fl.save(fl.LangevinSampler(own()), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"of the class .*test_model:Own: pass it"):
        fl.load(tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"energy must be an nn\.Module, got <class"):
        fl.load(tmp_path / "a.safetensors", energy=Own)  # type: ignore[arg-type]


def quadratic(x: Tensor) -> Tensor:
    return x.square().sum(1)


class Odd(Score):
    def get_extra_state(self) -> str:
        return "text"


@pytest.mark.parametrize(
    ("sampler", "name", "kind", "match"),
    [
        (own(), "a.safetensors", TypeError, "save: sampler must be a LangevinSampler, got Own"),
        (fl.LangevinSampler(own()), "a.pt", ValueError, r"must end in \.safetensors, got .*a\.pt"),
        (fl.LangevinSampler(quadratic), "a.safetensors", TypeError, "nn.Module.*quadratic"),
        (fl.LangevinSampler(Odd()), "a.safetensors", TypeError, "save: .*_extra_state of type str"),
        (fl.LangevinSampler(nn.LazyLinear(1)), "a.safetensors", ValueError, "save: .*lazy"),
    ],
)
def test_what_cannot_be_saved(
    sampler: Any, name: str, kind: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=match):
        fl.save(sampler, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*no-op")  # of the meta device, which holds no values
def test_swapped_arguments_of_save_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a LangevinSampler, got str; give the sampler fi"):
        fl.save("a.safetensors", fl.LangevinSampler(own()))  # type: ignore[arg-type]


class Other(Own):
    """An energy with the weights of Own and another forward pass."""


def test_weights_of_another_class_are_loaded_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fl.save(fl.LangevinSampler(Other()), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"of the class \S+:Other, and .* one of \S+:Own,") as seen:
        fl.load(tmp_path / "a.safetensors", energy=Own())
    assert seen[0].filename == __file__
    monkeypatch.setattr(Other, "__module__", "__main__")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fl.load(tmp_path / "a.safetensors", energy=Other())


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="load: device 'cuda' was asked for, but torch sees no CU"):
        fl.load("digits", device="cuda")
    match = "ReplayBuffer: device 'cuda:1' was asked for, but torch sees no CUDA device"
    for kind in ("index", "fifo"):
        with pytest.raises(ValueError, match=match):
            fl.ReplayBuffer(4, (1,), seed=0, kind=kind, device=torch.device("cuda:1"))
    with pytest.raises(ValueError, match=match):
        fl.ReplayBuffer(4, (1,), seed=0).to("cuda:1")


def test_an_energy_stays_on_its_device(tmp_path: Path) -> None:
    fl.save(fl.LangevinSampler(own()), tmp_path / "a.safetensors")
    energy = own().to("meta")
    assert fl.load(tmp_path / "a.safetensors", energy=energy).energy.first.weight.is_meta
    loaded = fl.load(tmp_path / "a.safetensors", energy=own(), device="meta")
    assert loaded.energy.first.weight.is_meta


# The hub -----------------------------------------------------------------------------------------


class FakeHub(types.ModuleType):
    """What is used of huggingface_hub, on a folder: FOLDER/owner/name/FILE."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []

    def hf_hub_download(self, repo: str, file: str, *, revision: str | None, **_: Any) -> str:
        self.asked.append((repo, revision))
        path = self.folder / repo / file
        if not path.exists():
            raise LookupError(f"\n404 Client Error: {repo}\n\nLog in with ...")
        return str(path)

    def HfApi(self, **_: Any) -> "FakeHub":
        return self

    def create_repo(self, repo: str, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        (self.folder / repo).mkdir(parents=True)
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        for path in folder_path.iterdir():
            (self.folder / repo_id / path.name).write_bytes(path.read_bytes())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_a_pushed_sampler_can_be_loaded_by_its_name(hub: FakeHub) -> None:
    sampler = fl.LangevinSampler(own(), steps=2)
    assert fl.push_to_hub(sampler, "me/own") == "https://hub/me/own"
    for name in ("hf:me/own", "hf://me/own", Path("hf://me/own")):
        again = fl.load(name, energy=own(seed=1))
        assert torch.equal(again(n=2, seed=1), sampler(n=2, seed=1))
    fl.load("hf:me/own@v1.0/x", energy=own())
    assert hub.asked == [("me/own", None)] * 3 + [("me/own", "v1.0/x")]
    card = (hub.folder / "me/own/README.md").read_text()
    assert 'fl.load("hf:me/own", energy=MyEnergy())  # an instance of' in card
    assert "| steps | 2 |" in card


def test_a_run_is_pushed_as_its_export_and_commands_take_the_name(
    hub: FakeHub, tmp_path: Path
) -> None:
    fl.push_to_hub("digits", "me/digits")
    info = read_checkpoint(hub.folder / "me/digits/model.safetensors")[1]
    assert info["config"]["data"] == "digits"
    card = (hub.folder / "me/digits/README.md").read_text()
    assert 'sampler = fl.load("hf:me/digits")\n' in card
    assert "| width | 32 |" in card
    fl.push_to_hub("faces", "me/faces")
    card = (hub.folder / "me/faces/README.md").read_text()
    assert "| start | enlarged samples of a model of smaller images, which is in the file |" in card
    result = run_command("sample", "hf://me/digits", "--n", 2, "--out", tmp_path / "a.npy")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'a.npy'}\n")


def test_what_the_hub_lacks_is_said_in_a_line(hub: FakeHub) -> None:
    with pytest.raises(OSError, match=r"^hf:me/x could not be downloaded: 404 Client Error: me/x$"):
        fl.load("hf:me/x")
    with pytest.raises(ValueError, match=r"must be hf:owner/name or .*, got 'hf:digits'"):
        fl.load("hf:digits")
    with pytest.raises(FileNotFoundError, match="models on the hub: hf:owner/name"):
        fl.load("me/x")


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "fastlangevin\[hub\]"'):
        fl.load("hf:me/own")
    with pytest.raises(ImportError, match=r'pip install "fastlangevin\[hub\]"'):
        fl.push_to_hub(fl.LangevinSampler(own()), "me/own")


def test_the_library_itself_finds_a_cached_model_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--me--own", "0" * 40
    sampler = fl.LangevinSampler(own(), steps=2)
    fl.save(sampler, repo / "snapshots" / commit / "model.safetensors")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    again = fl.load("hf:me/own", energy=own(seed=1))
    assert torch.equal(again(n=2, seed=1), sampler(n=2, seed=1))
    with pytest.raises(OSError, match="hf:me/other could not be downloaded: "):
        fl.load("hf:me/other")
