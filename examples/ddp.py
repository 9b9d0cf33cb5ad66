"""Short-run learning in several processes: DDP around the energy, and chains split by rank.

    torchrun --nproc-per-node 2 examples/ddp.py

The sampler gets the energy without DDP, because sampling needs neither synchronisation nor DDP's
hooks. ``first_chain`` gives every process its own part of one batch of chains.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastlangevin as fl


def main(iterations: int = 3, n: int = 8) -> None:
    dist.init_process_group("gloo")  # "nccl", and a device for each rank, on GPUs
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    energy = fl.ConvEnergy(channels=1, size=8, width=8)
    model = DistributedDataParallel(energy)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sampler = fl.LangevinSampler(energy, steps=20)
    data = torch.rand(world * n, 1, 8, 8)[rank * n : (rank + 1) * n]
    for iteration in range(iterations):
        x = sampler(n=n, seed=iteration, first_chain=rank * n)
        optimizer.zero_grad()
        # DDP needs a single forward pass, of both batches, before the backward pass.
        real, fake = model(torch.cat([data, x])).split(n)
        (real.mean() - fake.mean()).backward()
        optimizer.step()
    # All processes have the same weights and different chains.
    total = torch.cat([p.detach().flatten() for p in model.parameters()]).sum()
    pairs = [torch.zeros(2, dtype=torch.float64) for _ in range(world)]
    dist.all_gather(pairs, torch.stack([total, x.sum()]).double())
    if rank == 0:
        print("weights", [float(pair[0]) for pair in pairs])
        print("chains ", [float(pair[1]) for pair in pairs])
    dist.barrier()  # no process exits while another still communicates with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
