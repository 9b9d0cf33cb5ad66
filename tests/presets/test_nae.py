"""sample_langevin_v2 of normalized autoencoders beside a plain transcription, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl

N, K, SEED = 4, 6, 7


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """An autoencoder's parts: an energy by another name than forward, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 1)
        self.double()
        for i, p in enumerate(self.parameters()):
            p.data.copy_(numbers(*p.shape, seed=20 + i))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1)
        return self.head(torch.tanh(self.layer(rows[:, :5] + 0.1 * rows.sum(1, keepdim=True))))

    def energy(self, x: Tensor) -> Tensor:
        return self(x) + x.square().flatten(1).sum(1, keepdim=True)

    def decoder(self, z: Tensor) -> Tensor:
        return torch.sin(2 * z)


NET = Net()
STATES = {
    "vectors": numbers(N, 5, seed=1).clamp(-0.8, 0.8),
    "images": numbers(N, 2, 3, 2, seed=2).clamp(-0.8, 0.8),
}
Z = {name: numbers(K, *x.shape, seed=3) for name, x in STATES.items()}
ENERGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "module": NET,
    "bound method": NET.energy,
    "lambda": lambda z: NET.energy(NET.decoder(z)),
}


def reference(
    x: Tensor,
    model: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    a: float = 0.05,
    s: float | None = None,
    clip: Callable[[Tensor], Tensor] = lambda g: g,
    box: tuple[float, float] | None = None,
    reject: bool = False,
    sphere: bool = False,
    anneal: bool = False,
    anneal_steps: bool = False,
    mh: bool = False,
    T: float = 1.0,
) -> dict[str, Any]:
    """The equations step by step, a chain at a time where chains decide for themselves."""
    s = math.sqrt(2 * a) if s is None else s

    def at(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        e = model(x)
        return e.detach().flatten(), clip(torch.autograd.grad(e.sum(), x)[0])

    found: dict[str, Any] = {"x": [x], "move": [], "drift": [], "noise": [], "accept": []}
    e, g = at(x)
    found["energy"] = [e]
    for k in range(len(z)):
        s_k = s / max(k, 1) if anneal else s
        a_k = a / max(k, 1) ** 2 if anneal_steps else a
        noise = s_k * z[k]
        move = -a_k * g / T + noise
        y = x + move
        if box is not None and reject:
            for i in range(len(y)):
                if (y[i] < box[0]).any() or (y[i] > box[1]).any():
                    y[i] = x[i]
        elif box is not None:
            y = y.clamp(*box)
        if sphere:
            y = y / y.square().sum(1, keepdim=True).sqrt()
        e_y, g_y = at(y)
        if mh:
            u = fl.noise.uniform((len(y),), seed=SEED, step=k, stream=3)
            taken = torch.zeros(len(y), dtype=torch.bool)
            for i in range(len(y)):
                back = ((g[i] + g_y[i]) * a_k - noise[i]).square().sum()
                forth = noise[i].square().sum()
                odds = (-(back - forth) / 4 / a_k - e_y[i] + e[i]) / T
                taken[i] = u[i] <= odds.exp()
                if not taken[i]:
                    y[i], e_y[i], g_y[i] = x[i], e[i], g[i]
            found["accept"].append(taken)
        x, e, g = y, e_y, g_y
        for name, value in (("x", x), ("move", move), ("noise", noise), ("energy", e)):
            found[name].append(value)
        found["drift"].append(-a * g)
    return found


def rows_clip(bound: float) -> Callable[[Tensor], Tensor]:
    def clip(g: Tensor) -> Tensor:
        norm = g.norm(dim=-1, keepdim=True)
        return g * ((norm < bound).double() + (norm > bound).double() * bound / norm + 1e-6)

    return clip


# Options of ours, and of the transcription.
V2: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "noise_scale": ({"noise_scale": 0.3}, {"s": 0.3}),
    "stepsize from noise": ({"stepsize": None, "noise_scale": 0.4}, {"a": 0.08, "s": 0.4}),
    "temperature": ({"temperature": 0.5}, {"T": 0.5}),
    "temperature as a tensor": ({"temperature": torch.tensor(0.5).double()}, {"T": 0.5}),
    "clip_x": ({"clip_x": (-1, 1)}, {"box": (-1, 1)}),
    "reject_boundary": (
        {"clip_x": (-1, 1), "reject_boundary": True}, {"box": (-1, 1), "reject": True},
    ),
    "reject_boundary without a box": ({"reject_boundary": True}, {}),
    "clip_grad": ({"clip_grad": 0.5}, {"clip": rows_clip(0.5)}),
    "noise_anneal": ({"noise_anneal": 1.0}, {"anneal": True}),
    "spherical": ({"spherical": True}, {"sphere": True}),
    "mh": ({"mh": True}, {"mh": True}),
    "mh, all of it": (
        {"mh": True, "clip_x": (-1, 1), "reject_boundary": True, "clip_grad": 0.5,
         "temperature": 2.0, "noise_scale": 0.5, "spherical": True},
        {"mh": True, "box": (-1, 1), "reject": True, "clip": rows_clip(0.5), "T": 2.0, "s": 0.5,
         "sphere": True},
    ),
    "ignored": ({"intermediate_samples": True}, {}),
}  # fmt: skip
MCMC: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        name: V2[name]
        for name in (
            "plain", "noise_scale", "stepsize from noise", "temperature", "noise_anneal", "mh",
        )
    },
    "bound": ({"bound": (-1, 1)}, {"box": (-1, 1)}),
    "reject_boundary": (
        {"bound": (-1, 1), "reject_boundary": True}, {"box": (-1, 1), "reject": True},
    ),
    "spherical": ({"bound": "spherical"}, {"sphere": True}),
    "spherical, mh": ({"bound": "spherical", "mh": True}, {"sphere": True, "mh": True}),
    "clip_grad": ({"clip_grad": 0.4}, {"clip": lambda g: g.clamp(-0.4, 0.4)}),
    "noise_anneal_v2": (
        {"noise_anneal_v2": True, "mh": True}, {"anneal": True, "anneal_steps": True, "mh": True},
    ),
}  # fmt: skip


def close(mine: Any, theirs: Any) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-10 if b.dtype != torch.bool else torch.equal(a, b)


@pytest.mark.parametrize(
    ("state", "case", "model"),
    [
        (state, case, list(ENERGIES)[(i + j) % len(ENERGIES)])
        for i, state in enumerate(STATES)
        for j, case in enumerate(V2)
        if state == "images" or j % 2
    ],
)
def test_nae_v2_matches_the_original_loop(case: str, state: str, model: str) -> None:
    options, settings = V2[case]
    x0, z = STATES[state], Z[state]
    before = x0.clone()
    stepsize = options.get("stepsize", 0.05)
    options = {name: value for name, value in options.items() if name != "stepsize"}
    got = fl.presets.nae_v2()(x0, ENERGIES[model], stepsize, K, noise=z, seed=SEED, **options)
    want = reference(x0, ENERGIES[model], z, **settings)
    assert list(got) == [
        "sample", "l_samples", "l_dynamics", "l_drift", "l_diffusion", "l_accept"
    ]  # fmt: skip
    close([got["sample"]], [want["x"][-1]])
    close(got["l_samples"], want["x"])
    close(got["l_dynamics"], want["move"])
    close(got["l_drift"], want["drift"])
    close(got["l_diffusion"], want["noise"])
    close(got["l_accept"], want["accept"])
    assert torch.equal(x0, before)
    assert not x0.requires_grad
    assert not got["sample"].requires_grad


@pytest.mark.parametrize(
    ("case", "state", "shape"),
    [
        (case, state, ["[n, 1]", "[n]"][(i + j) % 2])
        for i, state in enumerate(STATES)
        for j, case in enumerate(MCMC)
        if state == "images" or j % 2
    ],
)
def test_nae_mcmc_matches_the_original_loop(case: str, state: str, shape: str) -> None:
    options, settings = MCMC[case]
    x0, z = STATES[state], Z[state]
    options = {"stepsize": 0.05} | options

    def model(x: Tensor) -> Tensor:
        return NET.energy(x) if shape == "[n, 1]" else NET.energy(x)[:, 0]

    got = fl.presets.nae_mcmc()(x0, model, n_step=K, noise=z, seed=SEED, **options)
    want = reference(x0, model, z, **settings)
    close([got["sample"]], [want["x"][-1]])
    close(got["l_sample"], torch.stack(want["x"]))
    close(got["l_dynamics"], want["move"])
    close(got["l_drift"], want["drift"])
    close(got["l_diffusion"], want["noise"])
    close(got["l_accept"], want["accept"])
    assert got["l_E"].shape == (K + 1, N, 1) if shape == "[n, 1]" else (K + 1, N)
    close(got["l_E"].view(K + 1, N), torch.stack(want["energy"]))


def test_some_are_accepted_and_some_rejected() -> None:
    """Else the cases above would show nothing."""
    for options in ({"mh": True, "noise_scale": 0.7}, {"clip_x": (-1, 1), "reject_boundary": True}):
        got = fl.presets.nae_v2()(STATES["vectors"], NET.energy, 0.05, K, seed=SEED, **options)
        states = torch.stack(got["l_samples"])
        stayed = (states[1:] == states[:-1]).all(2)
        assert 0 < stayed.double().mean() < 1


@pytest.mark.parametrize("shape", ["[n, 3]", "[]", "[n]"])
def test_energies_of_other_shapes_are_summed_unless_they_decide(shape: str) -> None:
    x0, z = STATES["vectors"], Z["vectors"]
    change = {"[n, 3]": lambda e: e.expand(-1, 3) / 3, "[]": torch.sum, "[n]": torch.flatten}[shape]

    def model(x: Tensor) -> Tensor:
        return change(NET.energy(x))

    got = fl.presets.nae_v2()(x0, model, 0.05, K, noise=z)["sample"]
    close([got], [reference(x0, NET.energy, z)["x"][-1]])
    if shape != "[n]":
        with pytest.raises(ValueError, match=r"nae_v2: with mh=True the model must return \[n\]"):
            fl.presets.nae_v2()(x0, model, 0.05, K, noise=z, mh=True)


def test_nae_v2_is_a_function_of_its_seed_and_leaves_no_trace() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.3))

    net, x0 = Noisy(), STATES["vectors"].clone().requires_grad_()
    net.head.requires_grad_(False)
    state = torch.random.get_rng_state()
    a, b = (fl.presets.nae_v2()(x0, net, 0.05, K, seed=3)["sample"] for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, False]
    assert all(p.grad is None for p in net.parameters())
    part = fl.presets.nae_v2()(x0[2:], NET, 0.05, K, seed=3, first_chain=2)["sample"]
    close([part], [fl.presets.nae_v2()(x0, NET, 0.05, K, seed=3)["sample"][2:]])


def test_nae_v2_refuses_wrong_settings() -> None:
    x0, run = STATES["vectors"], fl.presets.nae_v2()
    for arguments, error, message in (
        ((x0, NET, None, K), ValueError, "nae_v2: give stepsize or noise_scale"),
        ((x0, NET, -0.1, K), ValueError, "nae_v2: stepsize must be finite and >= 0"),
        ((x0, NET, 0.1, 0), ValueError, "nae_v2: n_steps must be at least 1"),
        ((x0, Net, 0.1, K), TypeError, "nae_v2: energy must be an instance"),
        ((x0.numpy(), NET, 0.1, K), TypeError, "nae_v2: x0 must be a tensor, got ndarray"),
    ):
        with pytest.raises(error, match=message):
            run(*arguments)
    with pytest.raises(ValueError, match="nae_v2: noise must have shape"):
        run(x0, NET, 0.1, K, noise=Z["vectors"][1:])
    with pytest.raises(ValueError, match=r"nae_v2: clamp must have lo < hi"):
        run(x0, NET, 0.1, K, clip_x=(1, -1))
    with pytest.raises(ValueError, match=r'nae_mcmc: bound must be \(lo, hi\), "spherical"'):
        fl.presets.nae_mcmc()(x0, NET, 0.1, K, bound="box")
    with pytest.raises(FloatingPointError, match="not finite after 6 steps"):
        run(x0, lambda x: (1e80 * x).pow(3).sum(1), 0.1, K)
