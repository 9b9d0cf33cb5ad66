"""A LightningModule that learns an energy with a sampler in place of an inline loop.

    pip install lightning && torchrun --nproc-per-node 2 examples/lightning_module.py

Two lines of ``training_step`` are fastlangevin's: the seed and the sampler.
"""

import os

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastlangevin as fl


class ShortRun(lightning.LightningModule):
    def __init__(self, width: int = 16, steps: int = 30) -> None:
        super().__init__()
        self.energy = fl.ConvEnergy(channels=1, size=8, width=width)
        # The sampler is not a module; self.energy has the parameters, device and checkpoints.
        self.sampler = fl.LangevinSampler(self.energy, steps=steps)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        # The seed counts batches. global_step would not do: it counts the optimizer's steps, and
        # does not change while gradients accumulate.
        seed = fl.noise.fold_in(self.current_epoch, index)
        chains = self.sampler(n=len(x), seed=seed, first_chain=self.global_rank * len(x))
        gap = self.energy(x).mean() - self.energy(chains).mean()
        self.log("energy_gap", gap, prog_bar=True)
        return gap

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(n: int = 256, batch_size: int = 64) -> ShortRun:
    torch.manual_seed(0)
    module = ShortRun()
    data = TensorDataset(2 * torch.rand(n, 1, 8, 8) - 1)
    # Under torchrun Lightning finds the other processes by itself, with these numbers of them.
    world_size = fl.distributed.read_launch().world_size
    on_each_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        strategy="auto" if world_size == 1 else "ddp",
        devices=on_each_node,
        num_nodes=world_size // on_each_node,
    )
    trainer.fit(module, DataLoader(data, batch_size=batch_size // world_size))
    return module


if __name__ == "__main__":
    main()
