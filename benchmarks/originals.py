"""The sampling loops of published codebases, rewritten, and the presets that replace them.

Each is the loop as its users run it, with its own random numbers, buffers and side effects, but
without printing and logging. The presets' docstrings name the sources.
"""

import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlangevin as fl

_DTYPES = torch.float32, torch.float64
Pair = tuple[Callable[..., Any], Callable[..., Any]]  # a loop(x0) and its replacement


class Case(NamedTuple):
    """A loop(x0), its replacement ours(x0, noise=), and the chains' initial states."""

    name: str
    loop: Callable[[Tensor], Any]
    ours: Callable[..., Any]
    x0: Tensor
    energy: nn.Module


class Net(nn.Module):
    """An energy (or its negative) with its first layer at ``f.layer_one``, as JEM++ needs it."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.f = fl.ConvEnergy(3, size, width)
        self.f.layer_one = self.f.layers[0]

    def forward(self, x: Tensor, y: Any = None) -> Tensor:
        return self.f(x)


class ScoreNet(nn.Module):
    """A small noise-conditional score network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ELU(), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.layers(x) / (1 + labels.view(-1, 1, 1, 1))


def cases(steps: int, size: int, width: int, batch: int, dtype: torch.dtype) -> list[Case]:
    """The cases of every codebase, except of those whose package is not installed."""
    torch.manual_seed(0)
    net = Net(size, width)
    x0 = (2 * torch.rand(batch, 3, size, size) - 1).to(dtype)
    # For loops that draw their starts from a buffer: every state is the same.
    equal_states = x0[:1].expand_as(x0).clone()
    all_cases = [
        Case("short_run", *short_run(net, steps), x0, net),
        Case("anatomy", *anatomy(net, steps, size, batch), equal_states, net),
        Case("anatomy_eval", *anatomy_eval(net, steps), x0, net),
        Case("jem", *jem(net, steps, batch), equal_states, net),
        Case("jempp", *jempp(net, steps, batch), equal_states, net),
        Case("igebm", *igebm(net, steps), (x0 + 1) / 2, net),
        Case("openai_igebm", *openai_igebm(net, steps), (x0 + 1) / 2, net),
        Case("improved_cd", *improved_cd(net, steps), (x0 + 1) / 2, net),
        Case("uva", *uva(net, steps), x0, net),
        Case("nae", *nae(net, steps), x0, net),
        Case("nae_v2", *nae_v2(net, steps), x0, net),
        Case("ula", *ula(net, steps), x0, net),
    ]
    score = ScoreNet(width)
    all_cases.append(Case("ncsn", *ncsn(score, steps), x0, score))
    if importlib.util.find_spec("torchebm"):
        all_cases.append(Case("torchebm", *torchebm(net, steps), x0, net))
    if importlib.util.find_spec("ebm"):
        all_cases.append(Case("ebmkit", *ebmkit(net, steps), x0, net))
    return all_cases


def short_run(f: nn.Module, steps: int) -> Pair:
    def sample_q(x0: Tensor) -> Tensor:
        x = x0.requires_grad_()
        for _ in range(steps):
            (df,) = torch.autograd.grad(f(x).sum(), [x], retain_graph=True)
            x.data += df + 1e-2 * torch.randn_like(x)
        return x.detach()

    ours = fl.presets.short_run(f)
    return sample_q, lambda x, noise: ours(steps, x0=x, noise=noise)


def anatomy(f: nn.Module, steps: int, size: int, batch: int) -> Pair:
    config = {"epsilon": 0.01, "batch_size": batch, "im_ch": 3, "im_sz": size}

    def sample_s_t(bank: Tensor) -> tuple[Tensor, Tensor]:
        slots = torch.randperm(len(bank))[:batch]
        x = bank[slots].clone().requires_grad_()
        r = torch.zeros(1)
        for _ in range(steps):
            (df,) = torch.autograd.grad(f(x).sum(), [x])
            x.data += -df + config["epsilon"] * torch.randn_like(x)
            r += df.flatten(1).norm(dim=1).mean()
        bank[slots] = x.detach()
        return x.detach(), r.squeeze() / steps

    def ours(bank: Tensor, noise: Tensor | None) -> Any:
        sample = fl.presets.anatomy(f, config, s_t_0=bank.clone())
        return sample(steps, "persistent", noise=noise)

    return sample_s_t, ours


def anatomy_eval(f: nn.Module, steps: int) -> Pair:
    config = {
        "num_mcmc_steps": steps, "epsilon": 0.015, "temp_factor": 1.0, "train_epsilon": 0.015,
    }  # fmt: skip
    temperature = config["temp_factor"] * config["train_epsilon"] ** 2 / 2
    scale = config["epsilon"] ** 2 / 2

    def langevin_grad(x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x0.requires_grad_()
        energies, grads = (torch.zeros(steps, len(x)) for _ in range(2))
        for k in range(steps):
            energy = f(x) / temperature
            energies[k] = energy.detach().cpu()
            (g,) = torch.autograd.grad(energy.sum(), [x])
            x.data += -scale * g + config["epsilon"] * torch.randn_like(x)
            grads[k] = scale * g.flatten(1).norm(dim=1).cpu()
        return x.detach(), energies, grads

    return langevin_grad, lambda x, noise: fl.presets.anatomy_eval(f, config, x)(noise=noise)


def jem_args(batch: int) -> SimpleNamespace:
    return SimpleNamespace(
        n_steps=20, sgld_lr=1.0, sgld_std=1e-2, reinit_freq=0.0, batch_size=batch, n_classes=10,
        eps=1.0, pyld_lr=0.2,
    )  # fmt: skip


def draw(buffer: Tensor, args: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """JEM's start: states of the buffer, each replaced by a new one at a rate."""
    slots = torch.randint(0, len(buffer), (args.batch_size,))
    fresh = torch.empty(args.batch_size, *buffer.shape[1:], dtype=buffer.dtype).uniform_(-1, 1)
    is_new = (torch.rand(args.batch_size) < args.reinit_freq).to(buffer.dtype)[:, None, None, None]
    return is_new * fresh + (1 - is_new) * buffer[slots], slots


def jem(f: nn.Module, steps: int, batch: int) -> Pair:
    args = jem_args(batch)

    def sample_q(buffer: Tensor) -> Tensor:
        f.eval()
        start, slots = draw(buffer, args)
        x = start.requires_grad_()
        for _ in range(steps):
            (df,) = torch.autograd.grad(f(x, y=None).sum(), [x], retain_graph=True)
            x.data += args.sgld_lr * df + args.sgld_std * torch.randn_like(x)
        f.train()
        out = x.detach()
        buffer[slots] = out.cpu()
        return out

    ours = fl.presets.jem(args)
    return sample_q, lambda buffer, noise: ours(f, buffer.clone(), n_steps=steps, noise=noise)


def jempp(f: nn.Module, steps: int, batch: int) -> Pair:
    args, in_steps = jem_args(batch), 5
    args.sgld_lr = args.sgld_std = 0.0

    def sample_q(buffer: Tensor) -> Tensor:
        x, slots = draw(buffer, args)
        layer, outputs = f.f.layer_one, []
        hook = layer.register_forward_hook(lambda module, inputs, out: outputs.append(out))
        for _ in range(steps):
            x = x.detach().requires_grad_()
            outputs.clear()
            energy = f(x).sum()
            _, p = torch.autograd.grad(energy, [x, outputs[0]], retain_graph=True)
            for _ in range(in_steps):
                x = x.detach().requires_grad_()
                (df,) = torch.autograd.grad((layer(x) * p).sum(), [x], retain_graph=True)
                x = (x + args.pyld_lr * df.clamp(-args.eps, args.eps)).clamp(-1, 1)
        hook.remove()
        buffer[slots] = x.detach().cpu()
        return x.detach()

    ours = fl.presets.jempp(args)

    def replacement(buffer: Tensor, noise: Tensor | None) -> Tensor:
        return ours(f, buffer.clone(), None, steps, in_steps, noise=noise)

    return sample_q, replacement


def igebm(model: nn.Module, steps: int) -> Pair:
    step_size = 10

    def inline(neg_img: Tensor) -> Tensor:
        noise = torch.randn(neg_img.shape)
        neg_img.requires_grad_()
        for parameter in model.parameters():
            parameter.requires_grad = False
        model.eval()
        for _ in range(steps):
            noise = noise.to(neg_img.dtype).normal_(0, 0.005)
            neg_img.data.add_(noise)
            model(neg_img).sum().backward()
            neg_img.grad.data.clamp_(-0.01, 0.01)
            neg_img.data.add_(neg_img.grad.data, alpha=-step_size)
            neg_img.grad.zero_()
            neg_img.data.clamp_(0, 1)
        for parameter in model.parameters():
            parameter.requires_grad = True
        model.train()
        return neg_img.detach()

    ours = fl.presets.igebm(model, step_size, steps)
    return inline, ours


def openai_igebm(model: nn.Module, steps: int) -> Pair:
    def graph(x: Tensor) -> Tensor:
        for _ in range(steps):
            x = (x + 0.005 * torch.randn_like(x)).detach().requires_grad_()
            (g,) = torch.autograd.grad(model(x).sum(), [x])
            x = (x - 10 * g.clamp(-0.01, 0.01)).clamp(0, 1)
        return x.detach()

    return graph, fl.presets.openai_igebm(model, num_steps=steps, step_lr=10, proj_norm=0.01)


def improved_cd(model: nn.Module, steps: int) -> Pair:
    flags = SimpleNamespace(step_lr=100.0, anneal=False, all_step=False, dataset="cifar10")

    def gen_image(im_neg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        im_noise = torch.randn_like(im_neg).detach()
        for k in range(steps):
            im_noise.normal_()
            im_neg = (im_neg + 0.001 * im_noise).requires_grad_()
            (im_grad,) = torch.autograd.grad(model(im_neg).sum(), [im_neg])
            if k == steps - 1:
                im_neg_kl = im_neg[:128]
                energy = model(im_neg_kl).sum()
                (kl_grad,) = torch.autograd.grad(energy, [im_neg_kl], create_graph=True)
                im_neg_kl = (im_neg_kl - flags.step_lr * kl_grad).clamp(0, 1)
            im_neg = (im_neg - flags.step_lr * im_grad).detach().clamp(0, 1)
        return im_neg, im_neg_kl, kl_grad

    ours = fl.presets.improved_cd()
    return gen_image, lambda x, noise: ours(None, flags, model, x, steps, noise=noise)


def uva(model: nn.Module, steps: int) -> Pair:
    def generate_samples(inp_imgs: Tensor) -> Tensor:
        was_training = model.training
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad = False
        inp_imgs.requires_grad_()
        noise = torch.randn(inp_imgs.shape, dtype=inp_imgs.dtype)
        with torch.enable_grad():
            for _ in range(steps):
                noise.normal_(0, 0.005)
                inp_imgs.data.add_(noise)
                inp_imgs.data.clamp_(-1, 1)
                (-model(inp_imgs)).sum().backward()
                inp_imgs.grad.data.clamp_(-0.03, 0.03)
                inp_imgs.data.add_(inp_imgs.grad.data, alpha=-10)
                inp_imgs.grad.zero_()
                inp_imgs.data.clamp_(-1, 1)
        for parameter in model.parameters():
            parameter.requires_grad = True
        model.train(was_training)
        return inp_imgs

    # The loop that the tutorial's sample_new_exmps runs.
    def ours(x: Tensor, noise: Tensor | None) -> Tensor:
        return fl.presets.uva.generate_samples(model, x, steps, 10, noise=noise)

    return generate_samples, ours


def nae(model: nn.Module, steps: int) -> Pair:
    def sample_langevin(x: Tensor) -> Tensor:
        stepsize, samples = 0.1, []
        scale = math.sqrt(2 * stepsize)
        x.requires_grad_()
        for _ in range(steps):
            samples.append(x.detach().to("cpu"))
            noise = torch.randn_like(x) * scale
            (g,) = torch.autograd.grad(model(x).sum(), [x])
            x = x - stepsize * g + noise
        return x.detach()

    ours = fl.presets.nae()
    return sample_langevin, lambda x, noise: ours(x, model, 0.1, steps, noise=noise)


def nae_v2(model: nn.Module, steps: int) -> Pair:
    def sample_langevin_v2(x: Tensor) -> Tensor:
        stepsize = 0.1
        scale = math.sqrt(2 * stepsize)
        x.requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), [x])
        records: list[Tensor] = [x.detach().to("cpu")]
        for _ in range(steps):
            noise = torch.randn_like(x) * scale
            move = -stepsize * g + noise
            x = x + move
            (g,) = torch.autograd.grad(model(x).sum(), [x])
            records += [v.detach().cpu() for v in (move, -stepsize * g, noise, x)]
        return x.detach()

    ours = fl.presets.nae_v2()
    return sample_langevin_v2, lambda x, noise: ours(x, model, 0.1, steps, noise=noise)["sample"]


def ula(energy: nn.Module, steps: int) -> Pair:
    a, temperature = 1e-2, 0.5

    def inline(x: Tensor) -> Tensor:
        for _ in range(steps):
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(energy(x).sum(), [x])
            x = x - a * g + math.sqrt(2 * a * temperature) * torch.randn_like(x)
        return x.detach()

    return inline, fl.presets.ula(energy, temperature, steps=steps, step_size=a)


def ncsn(net: nn.Module, steps: int) -> Pair:
    sigmas, step_lr = [1.0, 0.1], 1e-4

    @torch.no_grad()
    def anneal(x: Tensor) -> list[Tensor]:
        images = []
        for c, sigma in enumerate(sigmas):
            labels = torch.full((len(x),), c)
            size = step_lr * (sigma / sigmas[-1]) ** 2
            for _ in range(steps // len(sigmas)):
                x = x + size * net(x, labels) + torch.randn_like(x) * math.sqrt(2 * size)
                images.append(x.to("cpu"))
        return [x + sigmas[-1] ** 2 * net(x, labels)]

    ours = fl.presets.ncsn()

    def replacement(x: Tensor, noise: Tensor | None) -> list[Tensor]:
        return ours(x, net, sigmas, steps // len(sigmas), step_lr, True, noise=noise)

    return anneal, replacement


def torchebm_model(energy: nn.Module) -> Any:
    """An energy as torchebm's samplers take it."""
    from torchebm.core import BaseModel

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.energy = energy

        def forward(self, x: Tensor) -> Tensor:
            return self.energy(x)

    return Model()


def torchebm(energy: nn.Module, steps: int) -> Pair:
    from torchebm.samplers import LangevinDynamics

    options: dict[str, Any] = {"step_size": 0.1, "noise_scale": 0.1}

    def theirs(x: Tensor) -> Tensor:
        # Made here, because it takes the dtype that its model has at the time.
        dynamics = LangevinDynamics(torchebm_model(energy), dtype=x.dtype, **options)
        return dynamics.sample(x=x, n_steps=steps)

    ours = {d: fl.presets.torchebm(energy, dtype=d, **options) for d in _DTYPES}
    return theirs, lambda x, noise: ours[x.dtype].sample(x=x, n_steps=steps, noise=noise)


def ebmkit(energy: nn.Module, steps: int) -> Pair:
    import ebm

    options = {"step_size": 10.0, "steps": steps, "noise_scale": 0.005, "grad_clip": 0.01}
    theirs, ours = ebm.LangevinDynamics(**options), fl.presets.ebmkit(**options)
    return (
        lambda x: theirs.sample(energy, x),
        lambda x, noise: ours.sample(energy, x, noise=noise),
    )
