"""The warning about modules in train mode."""

import sys
import warnings
from collections.abc import Callable

from torch import Tensor, nn

from fastlangevin.gradients.modules import module_of, submodules_of


def warn_of_train_mode(energy: Callable[..., Tensor]) -> bool:
    """Warn of modules whose train mode changes the chain; return whether there are any."""
    effect = effect_of_train_mode(energy)
    if effect is None:
        return False
    warnings.warn(
        f"LangevinSampler: {effect}; energy.eval() samples from the energy itself",
        stacklevel=_levels_to_the_caller(),
    )
    return True


def effect_of_train_mode(energy: Callable[..., Tensor]) -> str | None:
    """Say which modules change the chain because they are in train mode, and how; None if none."""
    root = module_of(energy)
    if root is None or not any(_effect(module) for module in submodules_of(energy)):
        return None
    effects = []
    for name, module in root.named_modules():
        called = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        effect = _effect(module)
        if effect is not None:
            effects.append(f"{called} {effect}")
    more = f" (and {len(effects) - 1} more)" if len(effects) > 1 else ""
    return f"in train mode {effects[0]}{more}"


def _effect(module: nn.Module) -> str | None:
    if not getattr(module, "training", False):  # absent after torch.jit.freeze
        return None
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return "makes the energy another random function at every step"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "makes every chain depend on the others of its batch"
    return None


def _levels_to_the_caller() -> int:
    """Return how many frames above the calling function the package was entered."""
    package, frame, levels = __name__.partition(".")[0] + ".", sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(package):
        frame, levels = frame.f_back, levels + 1
    return levels
