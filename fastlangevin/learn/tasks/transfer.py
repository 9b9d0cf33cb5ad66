"""Images into another model's domain, by chains that start at them."""

from typing import Any

from torch import Tensor, nn

from fastlangevin.learn.tasks.guidance import StyleTerm, with_term
from fastlangevin.learn.tasks.measurements import Operator, check_operator, identity
from fastlangevin.learn.tasks.reconstruct import check_measurements, image_shape
from fastlangevin.learn.tasks.restore import with_data
from fastlangevin.sampler import LangevinSampler


def transfer(sampler: LangevinSampler, images: Tensor, *, seed: int = 0, **guidance: Any) -> Tensor:
    """Chains of the target domain's model that start at the source images [n, C, H, W].

    How far they go is a matter of the sampler's steps. ``guidance``: content, zeta, style, weight
    and statistics, the options of :func:`guide`. Returns [n, C, H, W]; raises TypeError or
    ValueError naming the argument, before any work.
    """
    return guide(sampler, images, **guidance)(images, seed=seed)


def guide(
    sampler: LangevinSampler,
    images: Tensor,
    *,
    content: Operator | None = None,
    zeta: float | None = None,
    style: Tensor | None = None,
    weight: float = 1.0,
    statistics: str = "gram",
) -> LangevinSampler:
    """The sampler of :func:`transfer`, for as many chains as there are images in [-1, 1].

    content: adds |A x0 - A x|^2 / zeta^2, which keeps what the linear A sees of the source
        (``Downsample``: its coarse shape); zeta as in :func:`with_data`. With zeta alone A is the
        identity.
    style: images [m, C, H, W] whose feature statistics in the energy's own layers pull at the
        chains, see :class:`StyleTerm` for ``weight`` and ``statistics``.
    """
    op = "transfer"
    shape = image_shape(op, sampler, images)
    check_measurements(op, images, identity, shape, bounded=True)
    guided = sampler
    if content is not None or zeta is not None:
        operator = identity if content is None else content
        check_operator(op, operator, shape, images.device, images.dtype, name="content")
        guided = with_data(guided, operator(images), operator, zeta, op)
    if style is not None:
        check_measurements(op, style, identity, shape, bounded=True, name="style")
        if not isinstance(sampler.energy, nn.Module):
            raise TypeError(
                f"{op}: style needs an energy that is an nn.Module, "
                f"got {type(sampler.energy).__name__}"
            )
        guided = with_term(guided, StyleTerm(sampler.energy, style, weight, statistics))
    return guided
