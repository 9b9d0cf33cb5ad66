"""SplitBatch: a batch of chains, divided among processes, and the gradient of its loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlangevin.distributed import Group, OrderedSum, Shard, shard

_OP = "ShortRunLearner"


class SplitBatch:
    """A batch of n chains in consecutive parts, which are divided among the processes.

    The gradient of a part is computed by the process that runs its chains. The gradients of all
    parts are added in an order that depends on the number of parts alone, so the sum has the same
    bits for every number of processes. Each process has at least one part. Raises ValueError if
    there are fewer chains than parts or processes, or if the energy normalises over the batch,
    because its parts would then have other energies.
    """

    def __init__(self, energy: nn.Module, n: int, parts: int, group: Group) -> None:
        if n < group.world_size:
            raise ValueError(
                f"{_OP}: batch_size must be at least the number of processes = {group.world_size}, "
                f"got {n}"
            )
        if n < parts:
            raise ValueError(f"{_OP}: parts must be at most batch_size = {n}, got {parts}")
        parts = max(parts, group.world_size)
        for name, module in energy.named_modules() if parts > 1 else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f"{_OP}: a batch in {parts} parts needs an energy without batch "
                    f"normalisation, got {type(module).__name__} {name}; use GroupNorm, or one "
                    "process and one part"
                )
        self.parts = [shard(n, i, parts) for i in range(parts)]
        self._energy, self._group, self._sum = energy, group, OrderedSum(parts, group)
        parts_of_ranks = [self.parts[of_rank.rows()] for of_rank in self._sum.shards]
        self.chains = [Shard(p[0].first_chain, sum(s.n for s in p)) for p in parts_of_ranks]
        self.own = self.chains[group.rank]

    def backward(
        self, loss: Callable[[Shard], Tensor], figures: Tensor, signal: Callable[[], int], what: str
    ) -> tuple[Tensor, int]:
        """Set the parameters' ``grad`` to the gradient of the sum of the losses of all parts.

        Returns the float32 figures [n, F] of all processes, and the largest signal, a small number,
        of any. ``loss`` may fill in this process's rows of ``figures``. ``signal`` is called as
        late as possible.
        """
        if len(self.parts) == 1:
            loss(self.own).backward()
            return figures, signal()
        parameters = [p for p in self._energy.parameters() if p.requires_grad]
        wide = any(p.dtype == torch.float64 for p in parameters)
        dtype = torch.float64 if wide else torch.float32

        def gradient(part: int) -> Tensor:
            self._energy.zero_grad(set_to_none=True)
            loss(self.parts[part]).backward()
            # The last numbers say which parameters have a gradient.
            present = [figures.new_tensor(p.grad is not None) for p in parameters]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            return torch.cat([g.to(dtype).flatten() for g in (*grads, *present)])

        def extra() -> Tensor:
            most_chains = max(chains.n for chains in self.chains)
            padded = figures.new_zeros(most_chains, figures.shape[1])
            padded[: len(figures)] = figures
            return torch.cat([padded.flatten(), figures.new_tensor([signal()])]).to(dtype)

        total, extras = self._sum(gradient, extra, what)
        *grads, present = total.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, grad, count in zip(parameters, grads, present.tolist(), strict=True):
            parameter.grad = grad.view_as(parameter).to(parameter.dtype) if count else None
        rows = [
            values[:-1].view(-1, figures.shape[1])[: chains.n]
            for values, chains in zip(extras, self.chains, strict=True)
        ]
        return torch.cat(rows).to(figures.dtype), int(max(values[-1] for values in extras))
