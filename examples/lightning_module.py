"""A LightningModule that learns an energy with a sampler in place of an inline loop.

pip install lightning && python examples/lightning_module.py
"""

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastlangevin as fl


class ShortRun(lightning.LightningModule):
    def __init__(self, width: int = 16, steps: int = 30) -> None:
        super().__init__()
        self.energy = fl.ConvEnergy(channels=1, size=8, width=width)
        # The sampler is no module: parameters, devices and checkpoints are those of self.energy.
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


if __name__ == "__main__":
    data = TensorDataset(2 * torch.rand(256, 1, 8, 8) - 1)
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(ShortRun(), DataLoader(data, batch_size=64))
