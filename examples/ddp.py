"""Learning in several processes with DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/ddp.py

Two lines are fastlangevin's: ``shard`` and the sampler. Every process runs its part of one batch of
chains, so the chains do not depend on the number of processes. The sampler gets the energy without
DDP, because sampling needs neither synchronisation nor DDP's hooks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastlangevin as fl


def main(iterations: int = 3, n: int = 16) -> tuple[dict[str, Tensor], Tensor]:
    dist.init_process_group("gloo")  # "nccl", and a device for each rank, on GPUs
    torch.manual_seed(0)
    energy = fl.ConvEnergy(channels=1, size=8, width=8)
    model = DistributedDataParallel(energy)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sampler = fl.LangevinSampler(energy, steps=20)
    data = 2 * torch.rand(n, 1, 8, 8) - 1  # one batch of all processes
    for iteration in range(iterations):
        part = fl.distributed.shard(n)
        x = sampler(n=part.n, seed=iteration, first_chain=part.first_chain)
        optimizer.zero_grad()
        # DDP needs a single forward pass, of both batches, before the backward pass.
        real, fake = model(torch.cat([data[part.rows()], x])).split(part.n)
        # DDP takes the mean over processes. Uneven parts need their share of the batch as weight.
        ((real.sum() - fake.sum()) * dist.get_world_size() / n).backward()
        optimizer.step()
    dist.barrier()  # no process exits while another still communicates with it
    dist.destroy_process_group()
    return energy.state_dict(), x


if __name__ == "__main__":
    weights, x = main()
    print(
        "weights", sum(float(value.sum()) for value in weights.values()), "chains", float(x.sum())
    )
