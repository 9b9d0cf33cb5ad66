"""Presets take what their originals take: energies of any output shape, of which the sum counts.

The transcriptions of test_presets.py differentiate ``net(x).sum()``, as the originals do.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl
from tests.presets.shared import CASES, UNIT, X0, N, Net, flags, numbers, well

# Of [n, 12]. All but the mean have one sum.
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[n]": lambda out: out.sum(1),
    "[n, 1]": lambda out: out.sum(1, keepdim=True),
    "[n, 1, 1, 1]": lambda out: out.sum(1).view(-1, 1, 1, 1),
    "[n, 3]": lambda out: out.view(-1, 3, 4).sum(2),
    "[n, 2, 3, 2]": lambda out: out.view(-1, 2, 3, 2),
    "[12, n]": lambda out: out.t(),
    "[12 n]": lambda out: out.flatten(),
    "[1]": lambda out: out.sum().view(1),
    "[], a sum": lambda out: out.sum(),
    "[], a mean": lambda out: out.mean(),
}
# The others' energies are recorded one per chain, are no energies, or come from a test of shapes.
SUMMED = [
    name
    for name in CASES
    if not name.startswith(("anatomy_eval", "nae", "ncsn", "torchebm", "ula"))
] + ["nae, clipped images"]


class Many(Net):
    """Twelve energies a chain, in an order of dimensions."""

    def __init__(self, shape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 36, 12).double()
        self.shape_outputs = shape
        for i, p in enumerate(self.head.parameters()):
            p.data.copy_(0.2 * numbers(*p.shape, seed=50 + i))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.shape_outputs(super().forward(x, y))


# The others draw, or label, several chains.
ONE_CHAIN = [
    name
    for name in SUMMED
    if not (name.startswith(("jem", "anatomy")) or "labels" in name or name == "improved_cd")
]


# Every preset meets one output with a row for each chain and one without; every output is met.
@pytest.mark.parametrize(
    ("case", "output"),
    [
        (case, list(OUTPUTS)[5 * without + (i + without) % 5])
        for i, case in enumerate(SUMMED)
        for without in (0, 1)
        if not ("inner" in case and (i + without) % 5 == 4)  # transcribed by the last layer
    ],
)
def test_the_sum_of_what_a_network_returns_is_differentiated(case: str, output: str) -> None:
    net, (step, x0, preset) = Many(OUTPUTS[output]), CASES[case]
    z, x = numbers(3, *x0.shape, seed=3), x0
    for k in range(3):
        x = step(net, x, z[k], k, 3).detach()
    got = preset(net, x0, z)
    assert got.shape == x0.shape
    assert (got - x).abs().max() <= 1e-11
    assert (got - x0).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("case", "output"),
    [(case, [*OUTPUTS, "squeezed"][-1 - i % 11]) for i, case in enumerate(ONE_CHAIN)],
)
def test_presets_of_one_chain_match_the_original(case: str, output: str) -> None:
    squeezed: Callable[[Tensor], Tensor] = lambda out: out.sum(1).squeeze()  # noqa: E731
    net, (step, x0, preset) = Many(OUTPUTS.get(output, squeezed)), CASES[case]
    z, x0 = numbers(1, 1, *x0.shape[1:], seed=3), x0[:1]
    want = step(net, x0, z[0], 0, 1).detach()
    assert (preset(net, x0, z) - want).abs().max() <= 1e-13


@pytest.mark.parametrize("output", ["[n, 3]", "[12 n]", "[], a mean"])
def test_the_last_step_of_improved_cd_sums_too(output: str) -> None:
    """im_neg_kl and the gradients that it carries to the network, for some of the chains."""
    net = Many(OUTPUTS[output])
    x0, y = UNIT.repeat(9, 1, 1, 1), torch.arange(N).repeat(9)
    z, f = numbers(2, *x0.shape, seed=3), flags(dataset="mnist")
    _, x, g = fl.presets.improved_cd()(y, f, net, x0, 2, noise=z)
    assert len(x) == 32
    x.sum().backward()
    got = [p.grad.clone() for p in net.parameters() if p.grad is not None]

    net.zero_grad()
    at = x0 + 0.001 * z[0]
    (grad,) = torch.autograd.grad(net(at.requires_grad_(), y).sum(), at)
    at = ((at - f.step_lr * grad).detach().clamp(0, 1) + 0.001 * z[1])[:32].requires_grad_()
    (grad,) = torch.autograd.grad(net(at, y[:32]).sum(), at, create_graph=True)
    want = (at - f.step_lr * grad).clamp(0, 1)
    want.sum().backward()
    assert (x - want).abs().max() <= 1e-12
    assert (g - grad).abs().max() <= 1e-12
    wanted = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(got) == len(wanted) >= 3
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-9 * (1 + theirs.abs().max())


def test_energies_that_a_preset_records_are_one_a_chain() -> None:
    """anatomy_eval's rows and torchebm's models: so the originals'."""
    net = Many(OUTPUTS["[n, 3]"])
    for name in ("anatomy_eval", "torchebm"):
        _, x0, preset = CASES[name]
        with pytest.raises(ValueError, match=r"one value per chain"):
            preset(net, x0, numbers(2, *x0.shape))


class Owner(nn.Module):
    """A network whose energy is another method than forward, and one that takes its label."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def energy(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.net(x, y)

    def conditional(self, x: Tensor, latent: Tensor | None) -> Tensor:
        return self.net(x) if latent is None else self.net(x, latent)


@pytest.mark.parametrize("case", ["improved_cd, annealed", "igebm", "openai_igebm"])
def test_a_network_that_cannot_do_without_a_label_gets_none(case: str) -> None:
    owner = Owner()
    _, x0, preset = CASES[case]
    z = numbers(3, *x0.shape, seed=3)
    assert torch.equal(preset(owner.conditional, x0, z), preset(owner.net, x0, z))


@pytest.mark.parametrize("case", [name for name in SUMMED if "inner" not in name])
def test_a_bound_methods_network_keeps_its_flags_at_every_step(case: str) -> None:
    owner = Owner()
    _, x0, preset = CASES[case]
    z = numbers(4, *x0.shape, seed=3)
    seen: list[bool] = []
    owner.net.head.register_forward_pre_hook(
        lambda layer, _: seen.append(layer.weight.requires_grad)
    )
    got = preset(owner.energy, x0, z)
    assert seen
    assert all(seen)
    assert all(p.requires_grad and p.grad is None for p in owner.parameters())
    assert torch.equal(got, preset(owner.net, x0, z))


def test_wells_and_functions_still_run() -> None:
    x = fl.presets.nae()(X0, lambda v: well(v)[:, None].expand(N, 3), 0.01, 2, seed=0)
    want = fl.presets.nae()(X0, lambda v: 3 * well(v), 0.01, 2, seed=0)
    assert (x - want).abs().max() < 1e-12
