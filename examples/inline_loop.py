"""Keep an inline Langevin loop, and replace its two lines of noise and update by one call.

python examples/inline_loop.py
"""

import torch

import fastlangevin as fl


def before(energy, x, steps):
    for _ in range(steps):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(energy(x).sum(), x)
        x = x.detach()
        noise = 0.01 * torch.randn_like(x)  # line 1
        x = (x - 0.5 * grad + noise).clamp(-1, 1)  # line 2
    return x


def after(energy, x, steps, seed):
    for k in range(steps):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(energy(x).sum(), x)
        x = x.detach()
        fl.langevin_step_(x, grad, step_size=0.5, noise_std=0.01, clamp=(-1, 1), seed=seed, step=k)
    return x


if __name__ == "__main__":
    torch.manual_seed(0)
    energy = fl.ConvEnergy(channels=1, size=8, width=16)
    x0 = 2 * torch.rand(64, 1, 8, 8) - 1
    print("before", energy(before(energy, x0.clone(), 20)).mean().item())
    print("after ", energy(after(energy, x0.clone(), 20, seed=0)).mean().item())
