"""States of several tensors against chains of the concatenated state."""

import copy
import functools
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastlangevin as fl

N, K = 4, 8
SHAPES = {"z": (3,), "image": (2, 4, 4), "scalar": ()}
D = 3 + 32 + 1


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Joint(nn.Module):
    """An energy of a latent vector, an image and a number, all of which it ties together."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(2, 3, 3, padding=1).double()
        self.project = nn.Linear(3, 3).double()
        for i, parameter in enumerate(self.parameters()):
            parameter.data.copy_(0.5 * numbers(*parameter.shape, seed=60 + i))

    def forward(self, state: dict[str, Tensor], shift: float = 0.0) -> Tensor:
        image = state["image"].view(-1, 4, 4)  # as of a contiguous tensor
        maps = self.convolve(image.view(-1, 2, 4, 4)).tanh().mean((2, 3))
        z, s = state["z"] - shift, state["scalar"]
        tie = (self.project(z) * maps).sum(1) * s
        return tie + (z**4).sum(1) / 4 + state["image"].square().flatten(1).sum(1) / 2 + s**2


class Flat(nn.Module):
    """The same energy of the concatenated state [n, D]."""

    def __init__(self, joint: Joint) -> None:
        super().__init__()
        self.joint = joint

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.joint(split(x), **kwargs)


def split(x: Tensor) -> dict[str, Tensor]:
    z, image, scalar = (part.contiguous() for part in x.split([3, 32, 1], dim=-1))
    lead = x.shape[:-1]
    return {"z": z, "image": image.reshape(*lead, 2, 4, 4), "scalar": scalar.reshape(lead)}


def flatten(parts: dict[str, Tensor], lead: int = 1) -> Tensor:
    return torch.cat([p.reshape(*p.shape[:lead], -1) for p in parts.values()], dim=-1)


@pytest.fixture
def joint() -> Joint:
    return Joint()


@pytest.fixture
def x0() -> dict[str, Tensor]:
    return {name: 0.5 * numbers(N, *SHAPES[name], seed=i) for i, name in enumerate(SHAPES)}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "before": {"noise_order": "before", "clamp": (-0.7, 0.6)},
    "norm": {"grad_clip": ("chain_norm", 1.5), "noise_order": "last"},
    "per chain": {"step_size": torch.linspace(0.01, 0.1, N, dtype=torch.float64)},
    "metropolis": {"metropolis": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_chain_of_the_concatenated_state(
    joint: Joint, x0: dict[str, Tensor], options: dict
) -> None:
    settings = {"steps": K, "step_size": 0.05, "noise_std": 0.3} | options
    parts, flat = fl.LangevinSampler(joint, **settings), fl.LangevinSampler(Flat(joint), **settings)
    kept = copy.deepcopy(x0)
    x = parts(x0, seed=1, first_chain=3, shift=0.2)
    want = flat(flatten(x0), seed=1, first_chain=3, shift=0.2)
    assert list(x) == list(SHAPES)
    torch.testing.assert_close(x, split(want), atol=1e-12, rtol=0)
    assert all(part.is_contiguous() and not part.requires_grad for part in x.values())
    torch.testing.assert_close(x0, kept, atol=0, rtol=0)

    trajectory = parts.trajectory(x0, seed=1, first_chain=3, shift=0.2, every=3)
    assert [t.shape for t in trajectory.values()] == [(3, N, *s) for s in SHAPES.values()]
    wanted = split(flat.trajectory(flatten(x0), seed=1, first_chain=3, shift=0.2, every=3))
    torch.testing.assert_close(trajectory, wanted, atol=1e-12, rtol=0)

    found = parts.diagnose(x0, seed=1, first_chain=3, shift=0.2)
    wanted = flat.diagnose(flatten(x0), seed=1, first_chain=3, shift=0.2)
    torch.testing.assert_close(found.x, x, atol=0, rtol=0)
    torch.testing.assert_close(tuple(found[1:]), tuple(wanted[1:]), atol=1e-12, rtol=0)


def plain(joint: Joint, x: dict[str, Tensor], z: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loop that people write over a dict of tensors."""
    for k in range(K):
        x = {name: part.detach().requires_grad_() for name, part in x.items()}
        grads = torch.autograd.grad(joint(x).sum(), list(x.values()))
        x = {name: x[name] - 0.05 * g + 0.3 * z[name][k] for name, g in zip(x, grads, strict=True)}
    return {name: part.detach() for name, part in x.items()}


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_noise_given_by_part_and_every_kind(
    joint: Joint, x0: dict[str, Tensor], kind: type
) -> None:
    z = {name: numbers(K, N, *shape, seed=9) for name, shape in SHAPES.items()}
    want = plain(joint, x0, z)

    def energy(state: Any) -> Tensor:
        assert type(state) is kind
        return joint(state if kind is dict else dict(zip(SHAPES, state, strict=True)))

    def of(parts: dict[str, Tensor]) -> Any:
        return parts if kind is dict else kind(parts.values())

    run = fl.LangevinSampler(energy, steps=K, step_size=0.05, noise_std=0.3)
    x = run(of(x0), noise=of(z))
    assert type(x) is kind
    torch.testing.assert_close(x, of(want), atol=1e-12, rtol=0)


def test_vaebms_preconditioned_sampler_is_a_list_of_latents() -> None:
    """-step / 2 times the gradient and sqrt(step) noise, on a list; the mean's n is in the step."""
    step, latents = 1e-2, [numbers(N, 2, 4, 4), numbers(N, 5)]

    def energy(parts: list[Tensor]) -> Tensor:
        return sum((part**4).flatten(1).sum(1) for part in parts)  # type: ignore[return-value]

    z = [numbers(K, *part.shape, seed=3) for part in latents]
    run = fl.LangevinSampler(energy, steps=K, step_size=step / 2, noise_std=step**0.5)
    want = []
    for part, noise in zip(latents, z, strict=True):
        for k in range(K):
            part = part - step / 2 * 4 * part**3 + step**0.5 * noise[k]
        want.append(part)
    torch.testing.assert_close(run(latents, noise=z), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("checkpoint", ["none", "step"])
def test_gradients_reach_every_part(joint: Joint, x0: dict[str, Tensor], checkpoint: str) -> None:
    leaves = {name: part.requires_grad_() for name, part in x0.items()}
    run = functools.partial(
        fl.LangevinSampler(joint, steps=5, step_size=0.05), seed=2, differentiable=True,
        checkpoint=checkpoint,
    )  # fmt: skip
    out = run(leaves)
    loss = sum((part * (1 + i)).square().sum() for i, part in enumerate(out.values()))
    inputs = [*leaves.values(), *joint.parameters()]
    found = torch.autograd.grad(loss, inputs)

    flat = flatten(x0).detach().requires_grad_()
    sampler = fl.LangevinSampler(Flat(joint), steps=5, step_size=0.05)
    out = split(sampler(flat, seed=2, differentiable=True, checkpoint="none"))
    loss = sum((part * (1 + i)).square().sum() for i, part in enumerate(out.values()))
    grad, *weights = torch.autograd.grad(loss, [flat, *joint.parameters()])
    wanted = (*split(grad).values(), *weights)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def test_score_networks_of_several_tensors(x0: dict[str, Tensor]) -> None:
    def net(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scalar": -state["scalar"], "z": -(state["z"] ** 3), "image": -state["image"]}

    def energy(state: dict[str, Tensor]) -> Tensor:
        image = state["image"].square().flatten(1).sum(1) / 2
        return (state["z"] ** 4).sum(1) / 4 + image + state["scalar"] ** 2 / 2

    settings: dict[str, Any] = {"steps": K, "step_size": 0.1}
    x = fl.LangevinSampler.from_score(net, **settings)(x0, seed=1)
    want = fl.LangevinSampler(energy, **settings)(x0, seed=1)
    torch.testing.assert_close(x, want, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"a score: LangevinSampler\.from_score"):
        fl.LangevinSampler(lambda s: flatten(s), **settings)(x0, seed=1)
    with pytest.raises(ValueError, match=r"the score must be a dict with keys \['z', 'image', 'sc"):
        fl.LangevinSampler.from_score(lambda s: [*s.values()], **settings)(x0, seed=1)
    with pytest.raises(ValueError, match="one value per chain is an energy"):
        fl.LangevinSampler.from_score(energy, **settings)(x0, seed=1)


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_chains_from_p0_by_the_energys_shapes(kind: type) -> None:
    """Elements are counted through the parts, in their order."""
    shapes = {"a": (3,), "b": (2, 2)}

    def energy(state: Any) -> Tensor:
        first, second = state.values() if kind is dict else state
        return first.sum(1) + second.sum((1, 2))

    energy.shape = shapes if kind is dict else kind(shapes.values())  # type: ignore[attr-defined]
    run = fl.LangevinSampler(energy, steps=1, step_size=0.0, noise_std=0.0)
    x = run(n=3, seed=5, first_chain=2)
    assert type(x) is kind
    first, second = x.values() if kind is dict else x
    flat = 2 * fl.noise.uniform((3, 7), seed=5, step=0, first_chain=2) - 1
    assert torch.equal(first, flat[:, :3])
    assert torch.equal(second, flat[:, 3:].view(3, 2, 2))
    assert "state's shape" not in run.explain()


def test_dtypes_and_modules(joint: Joint) -> None:
    """The state is float32 beside a bf16 module, whatever halves it comes in; no trace is left."""
    net = copy.deepcopy(joint).bfloat16()
    net.project.weight.requires_grad_(False)
    seen = set()
    net.register_forward_pre_hook(lambda _, args: seen.update(p.dtype for p in args[0].values()))
    x0 = {
        "z": numbers(N, 3).bfloat16(), "image": numbers(N, 2, 4, 4).half(),
        "scalar": numbers(N).float(),
    }  # fmt: skip
    x = fl.LangevinSampler(net, steps=3, step_size=0.01)(x0, seed=0)
    assert {part.dtype for part in x.values()} == {torch.float32}
    assert seen == {torch.float32, torch.bfloat16}  # it is asked in the state's dtype first
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True]
    assert [part.dtype for part in x0.values()] == [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_modes_empty_batches_and_one_part(mode: Any) -> None:
    run = fl.LangevinSampler(lambda s: (s[0] ** 4).sum(1), steps=3, step_size=0.05)
    with mode():
        x0 = [numbers(N, 3)]
        (x,) = run(x0, seed=0)
        (empty,) = run([torch.zeros(0, 3)], seed=0)
    single = fl.LangevinSampler(lambda x: (x**4).sum(1), steps=3, step_size=0.05)
    assert torch.equal(x, single(x0[0], seed=0))
    assert empty.shape == (0, 3)


def test_train_mode_is_warned_of_where_the_sampler_was_called() -> None:
    dropout = nn.Dropout()
    dropout.forward = lambda state: (state[0] ** 2).sum(1)  # type: ignore[method-assign,assignment]
    run = fl.LangevinSampler(dropout, steps=1)
    with pytest.warns(UserWarning, match="Dropout") as seen:
        run([A], seed=0)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run([A], seed=0)


def test_latent_chains() -> None:
    """An energy over z [n, d] through a decoder, as in latent-space models: |z|^2 / 2 + U(G(z))."""
    decode = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    target = numbers(6)

    def energy(z: Tensor) -> Tensor:
        return z.square().sum(1) / 2 + (decode(z) - target).square().sum(1)

    z0, noise = numbers(N, 3), numbers(K, N, 3, seed=1)
    z = fl.LangevinSampler(energy, steps=K, step_size=0.05, noise_std=0.3)(z0, noise=noise)
    want = z0
    for k in range(K):
        leaf = want.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        want = want - 0.05 * grad + 0.3 * noise[k]
    torch.testing.assert_close(z, want, atol=1e-12, rtol=0)


def test_explain_and_scores_by_name(joint: Joint, x0: dict[str, Tensor]) -> None:
    text = fl.LangevinSampler(joint, steps=2).explain(x0)
    assert f"[{N}, {D}]" in text
    assert "gradient   explicit: " in text
    ends = [
        fl.LangevinSampler(joint, steps=2, gradient=gradient)(x0, seed=0)
        for gradient in ("explicit", "autograd")
    ]
    for name in x0:
        torch.testing.assert_close(ends[0][name], ends[1][name])


A, B = torch.zeros(4, 2), torch.zeros(4, 3)
WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, "x0 is an empty list"),
    ({}, {}, ValueError, "x0 is an empty dict"),
    ([A, 1.0], {}, TypeError, r"x0\[1\] must be a tensor, got float"),
    ({"a": A, "b": [B]}, {}, TypeError, r"x0\['b'\] must be a tensor, got list"),
    ([A, B.long()], {}, TypeError, r"x0\[1\] must be of floating dtype, got torch.int64"),
    ([torch.tensor(1.0), B], {}, ValueError, r"x0\[0\] must have a leading chain dimension"),
    ([A, B[:3]], {}, ValueError, r"x0\[1\] has 3 chains, x0\[0\] has 4"),
    ([A, B.to("meta")], {}, ValueError, r"x0\[1\] is on meta, x0\[0\] on cpu"),
    ([A, B.double()], {}, TypeError, "x0 must be float64 in all parts or in none, got 0 torch.fl"),
    ([A, B], {"noise": torch.zeros(2, 4, 5)}, ValueError, "noise must be a list or tuple of 2 ten"),
    ([A, B], {"noise": [torch.zeros(2, 4, 2)]}, ValueError, "of 2 tensors, got list of 1"),
    ([A, B], {"noise": {"a": A}}, ValueError, r"of 2 tensors, got keys \['a'\]"),
    (
        {"a": A, "b": B},
        {"noise": {"a": torch.zeros(2, 4, 2), "b": torch.zeros(2, 4, 2)}},
        ValueError,
        r"noise\['b'\] must have shape \[2, 4, 3\], got \[2, 4, 2\]",
    ),
    (
        {"a": A},
        {"noise": {"b": A}},
        ValueError,
        r"noise must be a dict with keys \['a'\], got keys",
    ),
]


@pytest.mark.parametrize(("x0", "options", "error", "match"), WRONG, ids=[w[3] for w in WRONG])
@pytest.mark.parametrize("method", ["__call__", "trajectory", "diagnose"])
def test_states_that_do_not_fit(
    x0: Any, options: dict, error: type[Exception], match: str, method: str
) -> None:
    def energy(state: Any) -> Tensor:
        raise AssertionError("work was begun")

    with pytest.raises(error, match=match):
        getattr(fl.LangevinSampler(energy, steps=2), method)(x0, seed=0, **options)


class Pair(NamedTuple):
    z: Tensor
    image: Tensor


def test_a_named_tuple_stays_one() -> None:
    def energy(state: Pair) -> Tensor:
        return state.z.square().sum(1) + state.image.square().flatten(1).sum(1)

    x0 = Pair(numbers(N, 3), numbers(N, 2, 2))
    got = fl.LangevinSampler(energy, steps=2, step_size=0.1, noise_std=0.0)(x0, seed=0)
    assert type(got) is Pair
    assert (got.z - 0.64 * x0.z).abs().max() < 1e-12


def test_a_score_of_parts_as_an_energy_is_told_where_to_go() -> None:
    x0 = {"z": numbers(N, 3)}
    with pytest.raises(TypeError, match=r"got dict; parts like the state.s .*from_score"):
        fl.LangevinSampler(lambda state: {"z": -state["z"]}, steps=1)(x0, seed=0)
