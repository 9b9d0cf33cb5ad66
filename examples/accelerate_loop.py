"""Learning in several processes with Hugging Face Accelerate.

    pip install accelerate && torchrun --nproc-per-node 2 examples/accelerate_loop.py

Two lines are fastlangevin's: ``shard`` and the sampler, which gets the energy without Accelerate's
wrapper.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

import fastlangevin as fl


def main(iterations: int = 3, n: int = 16) -> tuple[dict[str, Tensor], Tensor]:
    accelerator = Accelerator(cpu=True)  # without an argument, a GPU for each rank
    torch.manual_seed(0)
    energy = fl.ConvEnergy(channels=1, size=8, width=8)
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(energy, optimizer)
    sampler = fl.LangevinSampler(energy, steps=20)
    data = 2 * torch.rand(n, 1, 8, 8) - 1  # one batch of all processes
    for iteration in range(iterations):
        part = fl.distributed.shard(n)
        x = sampler(n=part.n, seed=iteration, first_chain=part.first_chain)
        optimizer.zero_grad()
        real, fake = model(torch.cat([data[part.rows()], x])).split(part.n)
        # The wrapper takes the mean over processes; uneven parts need their share as weight.
        accelerator.backward((real.sum() - fake.sum()) * accelerator.num_processes / n)
        optimizer.step()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return energy.state_dict(), x


if __name__ == "__main__":
    weights, x = main()
    print(
        "weights", sum(float(value.sum()) for value in weights.values()), "chains", float(x.sum())
    )
