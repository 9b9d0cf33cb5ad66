"""Learning with sharded weights, gradients and optimiser: FSDP2, ``fully_shard``.

    torchrun --nproc-per-node 2 examples/fsdp2.py

A chain evaluates the energy hundreds of times, and sharded weights would have to be collected for
each evaluation. The two lines collect them once per iteration instead, into a replica for the
sampler, which any engine can then run. If the replica does not fit on a device, pass the sharded
module to the sampler with ``gradient="autograd"``.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastlangevin as fl


def full(value: Tensor) -> Tensor:
    """The whole of a sharded parameter."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def main(iterations: int = 3, n: int = 16) -> tuple[dict[str, Tensor], Tensor]:
    dist.init_process_group("gloo")  # "nccl", and a device for each rank, on GPUs
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    energy = fl.ConvEnergy(channels=1, size=8, width=8)
    replica = copy.deepcopy(energy)
    fully_shard(energy, mesh=mesh)
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3)
    sampler = fl.LangevinSampler(replica, steps=20)
    data = 2 * torch.rand(n, 1, 8, 8) - 1  # one batch of all processes
    for iteration in range(iterations):
        replica.load_state_dict({name: full(v) for name, v in energy.state_dict().items()})
        part = fl.distributed.shard(n)
        x = sampler(n=part.n, seed=iteration, first_chain=part.first_chain)
        optimizer.zero_grad()
        real, fake = energy(torch.cat([data[part.rows()], x])).split(part.n)
        # FSDP takes the mean over processes. Uneven parts need their share of the batch as weight.
        ((real.sum() - fake.sum()) * dist.get_world_size() / n).backward()
        optimizer.step()
    weights = {name: full(value) for name, value in energy.state_dict().items()}
    dist.barrier()  # no process exits while another still communicates with it
    dist.destroy_process_group()
    return weights, x


if __name__ == "__main__":
    weights, x = main()
    print(
        "weights", sum(float(value.sum()) for value in weights.values()), "chains", float(x.sum())
    )
