"""Small networks whose forward a test gives, for the engines of graphs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Body(nn.Module):
    """Some layers, and a forward that the test gives."""

    def __init__(self, body: Callable[["Body", Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.three, self.shortcut = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
            self.beta, self.gain = (
                nn.Parameter(torch.tensor(1.7)),
                nn.Parameter(torch.randn(4, 1, 1)),
            )
            self.norm, self.groups = nn.BatchNorm2d(4).eval(), nn.GroupNorm(2, 4)
            nn.init.normal_(self.groups.weight)
            with torch.no_grad():
                for tensor in (self.norm.weight, self.norm.running_var):
                    tensor.uniform_(0.5, 2)
                for tensor in (self.norm.bias, self.norm.running_mean):
                    tensor.normal_()
            self.line, self.logits = nn.Linear(4, 6, bias=False), nn.Linear(6, 10)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def block(m: Body, x: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    return x + m.two(act(m.one(x)))


def mean(h: Tensor) -> Tensor:
    return h.mean((2, 3)).sum(1)


# Forwards that both the explicit and the fused engine run.
COMMON: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "residual": lambda m, x: mean(F.silu(block(m, block(m, x)))),
    "activation added in place": lambda m, x: mean(m.one(m.two(x).add_(torch.tanh(m.one(x))))),
    "input read by two activations": lambda m, x: mean(torch.tanh(h := m.one(x)) - 0.5 * F.gelu(h)),
    "output read by two": lambda m, x: mean(
        F.silu(h := torch.tanh(m.one(x))) + F.elu_(m.two(h)) + h
    ),
    "added to itself": lambda m, x: mean(m.one((h := F.silu(m.one(x))) + h)),
    "subtracted": lambda m, x: mean(torch.sub(F.silu(m.one(x)), m.two(x), alpha=3)),
    "one activation on another": lambda m, x: mean(torch.tanh(F.elu(torch.tanh(m.one(x))))),
    "activation of the state": lambda m, x: mean(F.elu(x) + m.one(F.silu(x))),
    "state in the tail": lambda m, x: mean(F.silu(m.one(x))) + x.flatten(1).sum(1) / 7,
    "linear layers on means": lambda m, x: F.gelu(m.line(F.silu(m.one(x)).mean((2, 3)))).sum(1),
    "swish": lambda m, x: mean(m.one((h := m.one(x)) * torch.sigmoid(h))),
    "swish of a number": lambda m, x: mean(m.one((h := m.one(x)) * F.sigmoid(1.3 * h) / 1.1)),
    "learned swish": lambda m, x: mean(m.one(torch.sigmoid((h := m.one(x)) * m.beta) * h)),
    "batch norm": lambda m, x: mean(F.silu(m.norm(m.one(F.silu(m.norm(x)))))),
    "group norm": lambda m, x: mean(F.silu(m.groups(m.one(F.silu(m.groups(x)))))),
    "layer norm": lambda m, x: mean(m.one(F.silu(F.layer_norm(m.one(x), (4, 9, 7))))),
    "squares": lambda m, x: mean(F.silu(m.one(x)).square() + 0.5 * x.pow(2)),
    "scaled channels": lambda m, x: mean(F.silu(m.gain * m.one(x))) * m.beta,
}
