"""Transfer images to the domain of a model, by running its chains from them."""

from typing import Any

from torch import Tensor, nn

from fastlangevin.learn.tasks.guidance import StyleTerm, with_term
from fastlangevin.learn.tasks.measurements import Operator, check_operator, identity
from fastlangevin.learn.tasks.reconstruct import check_measurements, image_shape
from fastlangevin.learn.tasks.restore import with_data
from fastlangevin.names import keywords_checked
from fastlangevin.sampler import LangevinSampler


def transfer(sampler: LangevinSampler, images: Tensor, *, seed: int = 0, **guidance: Any) -> Tensor:
    """Run the chains of the target domain's model from the source images; return [n, C, H, W].

    Args:
        sampler: The model of the target domain. Its number of steps controls how far images change.
        images: The source images [n, C, H, W], in [-1, 1].
        guidance: Content, zeta, style, weight and statistics, the options of :func:`guide`.

    Raises TypeError or ValueError naming the argument, before any work.
    """
    return guide(sampler, images, **guidance)(images, seed=seed)


@keywords_checked
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
    """Return the sampler of :func:`transfer`, for one chain per image.

    Args:
        content: A linear map A. It adds |A x0 - A x|^2 / zeta^2 to the energy, which preserves A x0
            of the source x0: with ``Downsample``, its coarse shape.
        zeta: Scale of the content term, as in :func:`with_data`. If only zeta is given, A is the
            identity.
        style: Images [m, C, H, W]. The chains are guided towards their feature statistics in the
            layers of the energy; see :class:`StyleTerm` for ``weight`` and ``statistics``.
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
