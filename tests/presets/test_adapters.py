"""Other libraries' energies go in as they are; their samplers' signatures; the recipes run."""

import importlib.util
import inspect
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.testing.loop import Record

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
X0 = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
Z = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def torchebm() -> Any:
    return pytest.importorskip("torchebm", reason="torchebm is not installed")


@pytest.fixture
def ebm() -> Any:
    return pytest.importorskip("ebm", reason="ebmkit is not installed")


def descend(energy: Any, x: Tensor, z: Tensor, a: float = 0.01, b: float = 0.1) -> Tensor:
    for k in range(len(z)):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(energy(x).sum(), x)
        x = x - a * g + b * z[k]
    return x.detach()


def sampler(energy: Any) -> fl.LangevinSampler:
    return fl.LangevinSampler(energy, steps=6, step_size=0.01, noise_std=0.1)


def test_torchebms_models_go_in_as_they_are(torchebm: Any) -> None:
    from torchebm import core

    for model in (core.DoubleWellModel(), core.GaussianModel(torch.zeros(2), torch.eye(2))):
        got = sampler(model)(X0, noise=Z)
        assert (got - descend(model, X0, Z)).abs().max() < 1e-6
        assert (got - X0).abs().max() > 0.01


def test_ebmkits_energies_go_in_as_they_are(ebm: Any) -> None:
    torch.manual_seed(0)
    model = ebm.EnergyModel(torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(),
                                                torch.nn.Linear(8, 1)))  # fmt: skip

    def well(x: Tensor) -> Tensor:
        return (x.square() - 1).square().sum(1)

    for energy in (model, ebm.TemperedEnergy(well, 0.5), ebm.SumEnergy(model, well)):
        got = sampler(energy)(X0, noise=Z)
        assert (got - descend(energy, X0, Z)).abs().max() < 1e-6
        assert (got - descend(lambda x: 0 * x.sum(), X0, Z)).abs().max() > 1e-3


def positional(function: Any) -> list[tuple[str, Any]]:
    return [
        (p.name, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in ("seed", "noise", "first_chain")
    ]


def test_the_facade_has_torchebms_signature(torchebm: Any) -> None:
    from torchebm.samplers import LangevinDynamics

    assert positional(fl.presets.torchebm) == positional(LangevinDynamics)
    assert positional(fl.presets.torchebm.sample) == positional(LangevinDynamics.sample)


def test_the_facade_has_ebmkits_signature(ebm: Any) -> None:
    def given(function: Any) -> list[tuple[str, Any]]:
        return [pair for pair in positional(function) if pair[0] != "generator"]

    assert given(fl.presets.ebmkit) == given(ebm.LangevinDynamics)
    for name in ("sample", "step"):
        assert given(getattr(fl.presets.ebmkit, name)) == given(getattr(ebm.LangevinDynamics, name))


@pytest.mark.parametrize("thin", [1, 2, 4])
@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("chains", [1, 5])
def test_the_facade_returns_what_torchebm_returns(
    torchebm: Any, thin: int, trajectory: bool, chains: int
) -> None:
    """Shapes, and with equal noise values: mean, var and energy of the states kept."""
    from torchebm.core import DoubleWellModel
    from torchebm.samplers import LangevinDynamics

    x0, z = X0[:chains], Z[:, :chains]
    options = {"step_size": 0.01, "noise_scale": 0.5, "clamp": (-1.0, 1.0)}
    asked = {"n_steps": 6, "thin": thin, "return_trajectory": trajectory}
    found = []

    def loop(x: Tensor) -> Tensor:
        theirs = LangevinDynamics(DoubleWellModel(), **options)
        out, diagnostics = theirs.sample(x, return_diagnostics=True, **asked)
        found[:] = [out, diagnostics]
        return x if trajectory else out

    # compare gives its noise to the loop; noise and states are then those of its last such run.
    ours = fl.presets.torchebm(DoubleWellModel(), **options)
    record = Record(z, 0)
    with record:
        loop(x0.clone())
    out, diagnostics = ours.sample(x0, return_diagnostics=True, noise=z, **asked)
    assert out.shape == found[0].shape
    assert (out - found[0]).abs().max() < 1e-6
    assert diagnostics.keys() == found[1].keys()
    for name, value in diagnostics.items():
        assert value.shape == found[1][name].shape
        assert (value - found[1][name]).abs().max() < 1e-5
    plain = ours.sample(x0, noise=z, **asked)
    assert torch.equal(plain, out)


def test_the_facade_takes_torchebms_schedulers(torchebm: Any) -> None:
    from torchebm.core import DoubleWellModel, LinearScheduler
    from torchebm.samplers import LangevinDynamics

    def schedule() -> Any:
        return LinearScheduler(start_value=0.02, end_value=0.001, n_steps=6)

    report = fl.testing.compare(
        lambda x: LangevinDynamics(DoubleWellModel(), schedule(), 0.5).sample(x, n_steps=6),
        lambda x, noise: fl.presets.torchebm(DoubleWellModel(), schedule(), 0.5).sample(
            x, n_steps=6, noise=noise
        ),
        X0,
        steps=6,
        rounds=1,
    )
    assert report.same, report
    assert report.draws == 6


def test_the_facade_starts_from_normals_and_moves_conditions() -> None:
    def well(x: Tensor, y: Tensor) -> Tensor:
        return (x - y[:, None]).square().sum(1)

    ours = fl.presets.torchebm(well, step_size=0.5, noise_scale=0.0)
    x = ours.sample(dim=3, n_samples=4, n_steps=1, y=torch.arange(4.0), seed=0)
    assert (x - torch.arange(4.0)[:, None]).abs().max() < 1e-6
    still = fl.presets.torchebm(lambda x: 0 * x.flatten(1).sum(1), step_size=0.5, noise_scale=0.0)
    x = still.sample(dim=(500, 2), n_samples=4, n_steps=1, seed=0).flatten()
    assert abs(x.mean()) < 5 / 4000**0.5
    assert abs(x.var() - 1) < 5 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("trajectory", [False, True])
def test_the_facade_returns_what_ebmkit_returns(ebm: Any, trajectory: bool) -> None:
    options = {"step_size": 0.1, "steps": 6, "grad_clip": 0.5, "clamp": (-1.0, 1.0)}

    def energy(x: Tensor) -> Tensor:
        return (x.square() - 1).square().sum(1)

    with Record(Z, 0):
        want = ebm.LangevinDynamics(**options).sample(energy, X0, return_trajectory=trajectory)
    got = fl.presets.ebmkit(**options).sample(energy, X0, return_trajectory=trajectory, noise=Z)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-5
    with Record(Z[:1], 0):
        want = ebm.LangevinDynamics(**options).step(energy, X0)
    assert (fl.presets.ebmkit(**options).step(energy, X0, noise=Z[:1]) - want).abs().max() < 1e-6


def example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": name}
    exec(compile((EXAMPLES / f"{name}.py").read_text(), name, "exec"), found)
    return found


def test_the_recipe_for_inline_loops_is_the_same_chain() -> None:
    recipe, steps = example("inline_loop"), 6
    energy = fl.ConvEnergy(1, 8, 4)
    x0 = torch.rand(3, 1, 8, 8) * 2 - 1
    z = torch.stack([fl.noise.normal(x0.shape, seed=3, step=k) for k in range(steps)])
    record = Record(z, 0)
    with record:
        want = recipe["before"](energy, x0.clone(), steps)
    got = recipe["after"](energy, x0.clone(), steps, 3)
    assert record.draws == steps
    assert (got - want).abs().max() < 1e-5
    assert (got - x0).abs().max() > 1e-2


@pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="lightning is not installed"
)
def test_the_lightning_module_trains() -> None:
    module = example("lightning_module")["ShortRun"](width=4, steps=2)
    optimizer = module.configure_optimizers()
    assert len(optimizer.param_groups[0]["params"]) == len(list(module.energy.parameters()))
    assert list(module.state_dict()) == [f"energy.{name}" for name in module.energy.state_dict()]


def test_the_lightning_module_takes_other_chains_for_every_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also while gradients accumulate, when global_step stands still; with Lightning's names."""

    class Module(torch.nn.Module):
        global_step = global_rank = current_epoch = 0

        def log(self, *_: Any, **__: Any) -> None: ...

    stub = types.ModuleType("lightning")
    stub.LightningModule = Module
    monkeypatch.setitem(sys.modules, "lightning", stub)
    module, chains = example("lightning_module")["ShortRun"](width=2, steps=1), []
    module.energy.register_forward_pre_hook(lambda _, given: chains.append(given[0].detach()))
    batch = [torch.zeros(3, 1, 8, 8)]
    for epoch, index in ((0, 0), (0, 1), (1, 0)):
        module.current_epoch = epoch
        module.training_step(batch, index)
    ends = [x for before, x in itertools.pairwise(chains) if not before.any()]
    assert len({tuple(x.flatten().tolist()) for x in ends}) == 3


def test_a_facade_moves_takes_its_integrator_and_checks_early(torchebm: Any) -> None:
    from torchebm import core, integrators

    facade, own = fl.presets.torchebm, integrators.EulerMaruyamaIntegrator(dtype=torch.float32)
    model = core.GaussianModel(torch.zeros(2), torch.eye(2))
    moved = facade(model, step_size=0.01, integrator=own).to("cpu")
    assert isinstance(moved, facade)
    assert moved.integrator is own
    assert moved.get_scheduled_value("step_size") == 0.01
    assert torch.equal(
        moved.sample(X0, n_steps=3, seed=0), facade(model, 0.01).sample(X0, n_steps=3, seed=0)
    )
    assert facade(lambda x: x.square().sum(1)).to("meta").device.type == "meta"
    for options, error, message in (
        ({"step_size": -0.1}, ValueError, "step_size must be finite and >= 0"),
        ({"noise_scale": -0.1}, ValueError, "noise_scale must be finite and >= 0"),
        ({"clamp": (1, -1)}, ValueError, "clamp must have lo < hi"),
        ({"integrator": "heun"}, ValueError, "integrator must be None or"),
        ({"integrator": integrators.LeapfrogIntegrator()}, TypeError, "BaseSDERungeKutta"),
        ({"integrator": own, "dtype": torch.float64}, ValueError, "device/dtype"),
    ):
        with pytest.raises(error, match=f"torchebm: .*{message}"):
            facade(model, **options)


def test_ebmkits_facade_checks_early_and_accepts_every_step() -> None:
    assert fl.presets.ebmkit().last_accept_rate is None
    for options, message in (
        ({"step_size": -0.1}, "step_size must be finite and >= 0"),
        ({"noise_scale": -0.1}, "noise_scale must be finite and >= 0"),
        ({"clamp": (1, -1)}, "clamp must have lo < hi"),
        ({"grad_clip": -1.0}, "grad_clip must have a bound > 0"),
        ({"steps": 0}, "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"ebmkit: {message}"):
            fl.presets.ebmkit(**options)
