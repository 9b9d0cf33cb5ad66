"""The engine that replays a trace gives autograd's chain, whatever operators an energy uses."""

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlangevin import LangevinSampler
from fastlangevin.gradients import engine_cache, onednn
from fastlangevin.gradients.graph.record import record
from fastlangevin.gradients.trace.instructions import Trace
from fastlangevin.gradients.trace.program import Program, preparation
from fastlangevin.gradients.trace.replay_engine import Programs, ReplayGradient
from fastlangevin.gradients.trace.rewrite import rewrite
from fastlangevin.gradients.trace.split import Draft

N, SHAPE = 4, (4, 6, 6)


class Energy(nn.Module):
    """Modules by name, a forward of (module, x, **kwargs), and a linear head."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)
        self.register_buffer("table", torch.randn(5, 4))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        out = self.function(self, x, **kwargs)
        return out.flatten(1).pow(2).sum(1) / 8


class Squared(torch.autograd.Function):
    """x^2 with a gradient that is not its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0]


def conv(i: int = 4, o: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **options)


def written_to(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 8, 6, 6, dtype=x.dtype, device=x.device)
    out[:, 2:6] = m.conv(x).tanh()
    return out


def changed_between(m: Any, x: Tensor) -> Tensor:
    factor = torch.ones(4, 1, 1, dtype=x.dtype, device=x.device)
    one = x + factor
    factor.add_(1)
    return one * m.conv(x + factor)


def masked_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    h[:, 0].mul_(2)
    h += x
    return h.reshape(len(x), -1)[:, 3:] * 0.5


def attention(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x).flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(h, h, h)


def several_heads(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x).flatten(2).unflatten(1, (2, 2)).transpose(2, 3)  # [n, heads, pixels, 2]
    return F.scaled_dot_product_attention(h, h, h)


def conditional(m: Any, x: Tensor, y: Tensor) -> Tensor:
    scale, shift = m.embedding(y).chunk(2, dim=1)
    return F.silu(m.conv(x) * scale[:, :, None, None] + shift[:, :, None, None])


def of_table(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.conv(x).mean((2, 3)) * m.table[y]


def swish(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    return h * torch.sigmoid(h * m.beta.weight if hasattr(m, "beta") else h)


ENERGIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "swish": (lambda: Energy(swish, conv=conv()), {}),
    "learnable swish": (lambda: Energy(
        swish, conv=conv(), beta=nn.Linear(1, 1)), {}),
    "residual": (lambda: Energy(
        lambda m, x: F.leaky_relu(x + m.b(F.leaky_relu(m.a(x), 0.2)), 0.2),
        a=conv(), b=conv()), {}),
    "leaky relu in place": (lambda: Energy(
        lambda m, x: m.b(F.leaky_relu_(m.a(x), 0.2)), a=conv(), b=conv(stride=2)), {}),
    "batch norm": (lambda: nn.Sequential(
        Energy(lambda m, x: m.norm(m.conv(x)).relu(), conv=conv(), norm=nn.BatchNorm2d(4))
        ).eval(), {}),
    "group norm": (lambda: Energy(
        lambda m, x: F.silu(m.norm(m.conv(x))), conv=conv(), norm=nn.GroupNorm(2, 4)), {}),
    "layer norm": (lambda: Energy(
        lambda m, x: F.gelu(m.norm(m.conv(x))), conv=conv(), norm=nn.LayerNorm((4, 6, 6))), {}),
    "instance norm": (lambda: Energy(
        lambda m, x: F.elu(m.norm(m.conv(x))), conv=conv(),
        norm=nn.InstanceNorm2d(4, affine=True)), {}),
    "spectral norm": (lambda: _normed(nn.utils.parametrizations.spectral_norm), {}),
    "spectral norm by hook": (lambda: _normed(nn.utils.spectral_norm), {}),
    "weight norm": (lambda: _normed(nn.utils.parametrizations.weight_norm), {}),
    "max pooling": (lambda: Energy(
        lambda m, x: m.b(F.max_pool2d(m.a(x), 2)), a=conv(), b=conv()), {}),
    "adaptive pooling": (lambda: Energy(
        lambda m, x: F.adaptive_avg_pool2d(m.a(x).tanh(), 4), a=conv()), {}),
    "transposed convolution": (lambda: Energy(
        lambda m, x: m.up(F.relu(m.down(x))) - x, down=nn.Conv2d(4, 8, 4, 2, 1),
        up=nn.ConvTranspose2d(8, 4, 4, 2, 1)), {}),
    "transposed convolution with output padding": (lambda: Energy(
        lambda m, x: m.up(F.silu(x)), up=nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)), {}),
    "strides that skip": (lambda: Energy(
        lambda m, x: m.a(x).tanh(), a=nn.Conv2d(4, 6, (2, 3), (3, 2), (0, 1), (2, 1))), {}),
    "upsampling": (lambda: Energy(
        lambda m, x: F.interpolate(m.a(F.interpolate(x, scale_factor=2)).tanh(), size=5,
                                   mode="bilinear"), a=conv()), {}),
    "permuted": (lambda: Energy(
        lambda m, x: m.a(x).permute(0, 2, 3, 1).reshape(len(x), 36, 4).transpose(1, 2).tanh(),
        a=conv()), {}),
    "view of an image": (lambda: Energy(
        lambda m, x: m.a(x.view(len(x), 4, 3, 12)).sin(), a=conv()), {}),
    "concatenated": (lambda: Energy(
        lambda m, x: torch.cat([m.a(x), x, m.b(x).relu()], 1).logsumexp(1), a=conv(),
        b=conv()), {}),
    "split": (lambda: Energy(
        lambda m, x: (p := m.a(x).split([1, 3], 1))[1] * p[0].sigmoid(), a=conv()), {}),
    "sorted": (lambda: Energy(
        lambda m, x: m.a(x).flatten(2).sort(2).values.cumsum(2), a=conv()), {}),
    "attention": (lambda: Energy(attention, conv=conv()), {}),
    "attention of several heads": (lambda: Energy(several_heads, conv=conv()), {}),
    "one dimension": (lambda: Energy(
        lambda m, x: m.a(x.flatten(2)).tanh(), a=nn.Conv1d(4, 6, 5, 2)), {}),
    "three dimensions": (lambda: Energy(
        lambda m, x: m.a(x[:, None]).tanh(), a=nn.Conv3d(1, 2, 3, padding=1)), {}),
    "writes to a new tensor": (lambda: Energy(written_to, conv=conv()), {}),
    "a constant that changes between reads": (lambda: Energy(changed_between, conv=conv()), {}),
    "in place on views": (lambda: Energy(masked_in_place, conv=conv()), {}),
    "own gradient": (lambda: Energy(lambda m, x: Squared.apply(m.a(x)), a=conv()), {}),
    "detached": (lambda: Energy(lambda m, x: m.a(x) * m.a(x).detach().tanh(), a=conv()), {}),
    "mixes chains": (lambda: Energy(lambda m, x: m.a(x) - m.a(x).mean(0), a=conv()), {}),
    "scalar factors": (lambda: Energy(
        lambda m, x: torch.where(x > 0, x, 3.0) * torch.tensor(2.0) + 2**x, a=conv()), {}),
    "labels that scale": (lambda: Energy(
        conditional, conv=conv(), embedding=nn.Embedding(5, 8)), {"y": [0, 4, 1, 1]}),
    "labels that choose rows": (lambda: Energy(of_table, conv=conv()), {"y": [3, 0, 0, 2]}),
}  # fmt: skip


def _normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    energy = Energy(lambda m, x: m.b(m.a(x).tanh()), a=norm(conv()), b=norm(conv(4, 2)))
    energy(torch.randn(N, *SHAPE))  # one power iteration
    return energy.eval()


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    make, kwargs = ENERGIES[name]
    torch.manual_seed(0)
    energy = make().to(dtype)
    x0 = torch.randn((N, *SHAPE), generator=torch.Generator().manual_seed(1)).to(dtype)
    return energy, x0, {key: torch.tensor(value) for key, value in kwargs.items()}


def chains(energy: Any, x0: Tensor, kwargs: dict[str, Any], **options: Any) -> list[Tensor]:
    """The ends of the same chain by autograd and by the explicit engine."""
    settings: dict[str, Any] = {"steps": 3, "step_size": 0.05, "noise_std": 0.1} | options
    return [
        LangevinSampler(energy, gradient=gradient, **settings)(x0, seed=0, **kwargs)
        for gradient in ("autograd", "explicit")
    ]


# The test below runs all of them in float64.
@pytest.mark.parametrize(
    ("name", "metropolis"),
    list(zip(list(ENERGIES)[::2], itertools.cycle([False, True]), strict=False)),
)
def test_a_chain_in_float32_is_as_near_to_float64_as_autograds(name: str, metropolis: bool) -> None:
    energy, x0, kwargs = made(name, torch.float32)
    options = {"metropolis": True, "step_size": 0.005} if metropolis else {}
    want, got = chains(energy, x0, kwargs, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.filterwarnings("ignore:.*in train mode:UserWarning")
@pytest.mark.parametrize(
    ("name", "layout", "written"),
    list(
        zip(
            ENERGIES,
            itertools.cycle(LAYOUTS),
            itertools.cycle(("weights", "weights", "data")),
            strict=False,
        )
    ),
)
def test_a_chain_is_autograds_after_every_change(
    name: str, layout: torch.memory_format, written: str
) -> None:
    """Each call is that of a new sampler, whatever the calls before have recorded."""
    energy, x0, kwargs = made(name, torch.float64)
    x0 = x0.to(memory_format=layout)
    kept = LangevinSampler(energy, 2, 0.05, 0.1, gradient="explicit")
    generator = torch.Generator().manual_seed(2)
    ends = []
    for change in ("nothing", written, *(["labels"] if kwargs else [])):
        if change == "weights":
            with torch.no_grad():
                for parameter in energy.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        elif change == "data":
            for parameter in energy.parameters():
                parameter.data = parameter.data * 0.9
        elif change == "labels":
            kwargs = {key: value.flip(0) for key, value in kwargs.items()}
        new = LangevinSampler(energy, 2, 0.05, 0.1, gradient="autograd")
        ends.append(kept(x0, seed=0, **kwargs))
        torch.testing.assert_close(ends[-1], new(x0, seed=0, **kwargs), rtol=0, atol=1e-11)
    assert torch.equal(kept(x0, seed=0, **kwargs), ends[-1])
    assert not torch.equal(ends[-1], x0)


def trace_of(name: str) -> tuple[Trace, nn.Module, Tensor, dict[str, Any]]:
    energy, x0, kwargs = made(name, torch.float64)
    trace = record(energy, x0, kwargs)[0].trace
    assert isinstance(trace, Trace), trace
    return trace, energy, x0, kwargs


@pytest.mark.parametrize("name", ["spectral norm", "spectral norm by hook", "weight norm"])
def test_weights_are_normalised_once_per_chain(name: str) -> None:
    trace = trace_of(name)[0]
    program = Program(trace, energies=False)
    plain = Energy(lambda m, x: m.b(m.a(x).tanh()), a=conv(), b=conv(4, 2)).double()
    unnormed = record(plain, torch.zeros((N, *SHAPE), dtype=torch.float64))[0].trace
    assert isinstance(unnormed, Trace)
    assert program.instructions == Program(unnormed, energies=False).instructions


def test_an_observation_is_encoded_once_per_chain() -> None:
    encoder = nn.Sequential(*(nn.Sequential(conv(), nn.ReLU()) for _ in range(8)), nn.Flatten())

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(146, 1)

        def forward(self, action: Tensor, observation: Tensor) -> Tensor:
            features = self.encoder(observation)
            return self.head(torch.cat([features, action], 1)).square()

    torch.manual_seed(0)
    policy, action = Policy(), torch.randn(3, 2)
    kwargs = {"observation": torch.randn(3, *SHAPE)}
    trace = record(policy, action, kwargs)[0].trace
    assert isinstance(trace, Trace)
    assert Program(trace, energies=False).instructions <= 8
    want, got = chains(policy, action, kwargs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_steps_with_and_without_energies_read_the_same_packed_weights() -> None:
    energy, x0, _ = made("residual", torch.float32)
    trace = record(energy, x0, {})[0].trace
    assert isinstance(trace, Trace)
    programs = Programs(trace)
    inputs = programs.inputs({})
    without, with_energies = (programs.prepare(inputs)[wanted] for wanted in (False, True))
    given = {id(value) for value in inputs.values()}
    packed = [value for value in without if id(value) not in given]
    again = programs.prepare(inputs)
    assert {id(v) for v in again[False] if id(v) not in given} <= {id(v) for v in again[True]}
    assert packed
    # Each program alone would compute the same constants.
    for program, constants in zip((False, True), (without, with_energies), strict=True):
        prepare = preparation(trace, [programs.of(program)], programs.of(program).inputs)
        (alone,) = prepare(*[inputs[n] for n in programs.of(program).inputs])
        for value, other in zip(constants, alone, strict=True):
            assert torch.equal(value.to_dense(), other.to_dense())


def test_energies_are_not_computed_unless_they_are_wanted() -> None:
    trace = trace_of("residual")[0]
    fewer, more = (Program(trace, energies).instructions for energies in (False, True))
    assert fewer < more


def test_a_recording_is_made_once() -> None:
    energy, x0, _ = made("labels that scale", torch.float32)
    run = LangevinSampler(energy, 3, gradient="explicit")
    with mock.patch.object(engine_cache, "record", side_effect=engine_cache.record) as runs:
        for y in ([0, 1, 2, 3], [3, 3, 3, 3], [4, 0, 0, 1]):
            run(x0, seed=0, y=torch.tensor(y))
        assert runs.call_count == 1
        run(x0[:2], seed=0, y=torch.tensor([0, 1]))
        energy.conv.padding_mode = "circular"
        run(x0, seed=0, y=torch.tensor(y))
        assert runs.call_count == 3


def test_threads_with_other_labels_do_not_meet() -> None:
    """The engine of a call holds the constants of its own arguments."""
    energy, x0, _ = made("labels that scale", torch.float64)
    run = LangevinSampler(energy, 2, 0.05, 0.1, gradient="explicit")
    labels = [torch.tensor(y) for y in ([0, 1, 2, 3], [4, 4, 0, 2])]
    engines = [run.choose_engine(x0, {"y": y}).engine for y in labels]
    for engine in engines:
        assert isinstance(engine, ReplayGradient)
        engine.begin()
    for engine, y in zip(engines, labels, strict=True):
        x = x0.clone().requires_grad_()
        (want,) = torch.autograd.grad(energy(x, y=y).sum(), x)
        torch.testing.assert_close(engine(x0, False)[1], want, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.a(x) + torch.rand_like(x), "draws random numbers"),
        (lambda m, x: F.scaled_dot_product_attention(*[m.a(x)] * 3, dropout_p=0.1), "draws random"),
        (lambda m, x: m.a(x) * x.mean().item(), r"reads values through item\(\)"),
        (lambda m, x: m.a(x) * m.table.mul_(2).sum(), "changes a tensor in place"),
        (lambda m, x: m.a(x.detach().mul_(0.5) + x), "changes a tensor in place"),
        (lambda m, x: m.a(x)[x[:, :, :1, :1].flatten(1).sum(1) > 0], "reads a tensor's value"),
    ],
)
def test_what_a_replay_could_not_repeat_is_refused(
    forward: Callable[..., Tensor], reason: str
) -> None:
    energy = Energy(forward, a=conv())
    with pytest.raises(RuntimeError, match=reason):
        LangevinSampler(energy, 1, gradient="explicit")(torch.randn(N, *SHAPE), seed=0)


class Flagged(nn.Module):
    """An energy with Python numbers read from a buffer and, for labels, from an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("flag", torch.tensor(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.conv(x).tanh() if self.flag.item() == 1 else self.conv(x).relu()
        if y is not None:
            h = h * F.one_hot(y, 4).to(x.dtype)[:, :, None, None]
        return h.flatten(1).sum(1) * (1 + int(self.flag * 2))


def test_numbers_read_from_weights_and_labels_are_those_of_each_call() -> None:
    torch.manual_seed(0)
    energy, x0 = Flagged().double(), torch.randn(N, *SHAPE, dtype=torch.float64)
    run = LangevinSampler(energy, 2, 0.05, gradient="explicit")
    with mock.patch.object(engine_cache, "record", side_effect=engine_cache.record) as runs:
        for flag, expected in ((1, 1), (1, 1), (0, 2), (0, 2), (1, 3)):
            energy.flag.fill_(flag)
            want = LangevinSampler(energy, 2, 0.05, gradient="autograd")(x0, seed=0)
            torch.testing.assert_close(run(x0, seed=0), want, rtol=0, atol=1e-11)
            assert runs.call_count == expected
    for y in ([0, 1, 2, 3], [3, 3, 0, 0], [1, 1, 1, 1]):
        labels = torch.tensor(y)
        want = LangevinSampler(energy, 2, 0.05, gradient="autograd")(x0, seed=0, y=labels)
        torch.testing.assert_close(run(x0, seed=0, y=labels), want, rtol=0, atol=1e-11)


@pytest.mark.skipif(not onednn.runs(torch.float32), reason="this torch has no oneDNN")
@pytest.mark.parametrize("name", ["leaky relu in place", "residual"])
def test_activations_in_place_do_not_keep_convolutions_from_being_packed(name: str) -> None:
    """Only a view in another shape, through which something is written, rules out channels_last."""
    energy, x0, kwargs = made(name, torch.float32)
    trace = record(energy, x0, kwargs)[0].trace
    assert isinstance(trace, Trace)
    draft = Draft(trace, (trace.grad,))
    rewrite(draft)
    packed = [i for i in draft.added if "reorder" in str(i.op)]
    assert len(packed) == 4  # two convolutions, forward and back
