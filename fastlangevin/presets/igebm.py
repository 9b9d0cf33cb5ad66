"""Du and Mordatch's samplers: OpenAI's release, its PyTorch port, improved contrastive divergence.

All three add noise, take the gradient there, and clamp only after the move. UvA's clamps before
the gradient too, which is noise_order="before".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlangevin.arguments import GradClip, check_count
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.untouched import left_as_found
from fastlangevin.presets.common import (
    Samplers,
    in_eval_mode,
    kick,
    labelled,
    noise_first_settings,
    run_noise_first,
    take_seed,
)


def igebm(
    model: Callable[..., Tensor], step_size: float = 10, sample_step: int = 60
) -> Callable[..., Tensor]:
    """The inline loop of the PyTorch port of implicit generation, as ``sample(neg_img, neg_id)``.

        x <- x + 0.005 z,    x <- clamp(x - step_size clip(dE/dx)),    clip +-0.01, clamp (0, 1)

    model: the energy, called model(x, neg_id), or model(x) where neg_id is None, of any output
    shape: its sum is what is differentiated; in eval mode meanwhile. Returns a function of (neg_img
    [n, ...], neg_id=None) with ``seed``, ``generator`` and ``noise`` [sample_step, n, ...] besides,
    which returns the states after sample_step steps, detached.

    Differs: neg_img is left alone; flags and modes are put back as they were found, where the
    original ends with all parameters requiring grad and in train mode.
    Source: rosinality/igebm-pytorch, train.py.
    """
    samplers, stds = Samplers(), [0.005] * sample_step

    def sample(
        neg_img: Tensor,
        neg_id: Tensor | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> Tensor:
        settings = noise_first_settings(sample_step, step_size, stds, (0.0, 1.0), 0.01)
        wrap, given = labelled(model, neg_id)
        sampler = samplers(model, wrap, **settings)
        with in_eval_mode(model):
            return run_noise_first(
                sampler,
                neg_img,
                stds[0],
                take_seed(seed, generator),
                noise,
                first_chain=first_chain,
                **given,
            )

    return sample


def openai_igebm(
    model: Callable[..., Tensor],
    *,
    num_steps: int = 20,
    step_lr: float = 1.0,
    noise_scale: float = 1.0,
    rescale: float = 1.0,
    proj_norm: float = 0.0,
    proj_norm_type: str = "li",
    temperature: float = 1.0,
) -> Callable[..., Tensor]:
    """The loop of implicit generation as OpenAI released it, with its flags by their names.

        x <- x + 0.005 rescale noise_scale z,    x <- clamp(x - step_lr clip(d(T E)/dx))

    with T = temperature, clamp (0, rescale), and a clip by proj_norm unless that is 0: of each
    element ("li") or of the L2 norm of the whole batch ("l2", which is what clip_by_norm of one
    tensor does). model: the energy, of any output shape, called model(x, label), or model(x)
    without a label; its sum is what is differentiated. The CIFAR-10 commands use step_lr=10,
    num_steps=60, proj_norm=0.01. Returns a function of (x_mod [n, ...], label=None) with ``seed``,
    ``generator``, ``noise`` [num_steps, n, ...] and the differentiable options of a
    :class:`LangevinSampler` call: without --zero_kl the original's loss passes through all steps,
    which is ``differentiable=True``.

    Differs: one call in place of a TensorFlow graph; energies along the way are not returned.
    Source: openai/ebm_code_release, train.py; Du and Mordatch, NeurIPS 2019.
    """
    if proj_norm_type not in ("li", "l2"):
        raise ValueError(
            f'openai_igebm: proj_norm_type must be "li" or "l2", got {proj_norm_type!r}'
        )
    if not temperature > 0:
        raise ValueError(f"openai_igebm: temperature must be > 0, got {temperature!r}")
    samplers, stds = Samplers(), [0.005 * rescale * noise_scale] * num_steps
    clip: GradClip | None = None
    if proj_norm != 0:
        clip = proj_norm / temperature  # of the gradient of E, the step being T step_lr
        clip = ("batch_norm", clip) if proj_norm_type == "l2" else clip
    settings = noise_first_settings(
        num_steps, step_lr * temperature, stds, (0.0, float(rescale)), clip
    )

    def sample(
        x_mod: Tensor,
        label: Tensor | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
        differentiable: bool = False,
        checkpoint: str | int = "auto",
        grad_steps: int | None = None,
    ) -> Tensor:
        wrap, given = labelled(model, label)
        sampler = samplers(model, wrap, **settings)
        through = {"differentiable": True, "checkpoint": checkpoint, "grad_steps": grad_steps}
        options = given | (through if differentiable else {}) | {"first_chain": first_chain}
        return run_noise_first(
            sampler, x_mod, stds[0], take_seed(seed, generator), noise, **options
        )

    return sample


def improved_cd() -> Callable[..., tuple[Any, ...]]:
    """``gen_image(label, FLAGS, model, im_neg, num_steps, sample=False)`` of improved CD.

        x <- x + 0.001 c_k z,    x <- clamp(x - step_lr dE/dx),    clamp (0, 1)

    with c_k = (K - k - 1) / K under FLAGS.anneal, else 1. FLAGS: an object with ``step_lr``,
    ``anneal`` and ``dataset``. model: the energy, called model(x, label), or model(x) where label
    is None, of any output shape: its sum is what is differentiated, so the [n, 3] of the original's
    multiscale networks (its default) are added up. Returns a function with ``seed``, ``generator``
    and ``noise`` [num_steps, n, ...] besides, which returns (im_neg, im_neg_kl, im_grad): im_neg
    [n, ...] detached; im_neg_kl the first 128 chains (datasets "cifar10" and "celeba") or 32,
    differentiable in the model's parameters through the last step alone, which is
    ``differentiable=True, grad_steps=1``; im_grad the gradient of the energy of those chains there.
    ``sample=True`` returns (im_neg, im_neg_kl, im_samples, im_grad), as the original's train.py
    asks for at every save_interval: im_samples the num_steps states [n, ...] after each move,
    before its clamp; im_grad that of all chains, and im_neg_kl without a graph to the model.

    Differs: im_grad carries no graph; im_neg is left alone; a model of which nothing requires grad
    raises ValueError, but for ``sample=True``. The label of those chains in im_neg_kl goes with
    them (the original hands over the whole batch's); where it is None, a model that can do with x
    alone is called model(x), and not model(x, None). ``FLAGS.all_step`` is not read: the original's
    own ``detach`` cuts the graph that it builds.
    Source: yilundu/improved_contrastive_divergence, train.py; Du et al., ICML 2021.
    """
    until_last, last = Samplers(), Samplers()

    def gen_image(
        label: Tensor | None,
        FLAGS: Any,
        model: Callable[..., Tensor],
        im_neg: Tensor,
        num_steps: int,
        sample: bool = False,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        first_chain: int = 0,
    ) -> tuple[Any, ...]:
        K = check_count("improved_cd", "num_steps", num_steps)
        seed, (wrap, given) = take_seed(seed, generator), labelled(model, label)
        stds = [0.001 * ((K - k - 1) / K if FLAGS.anneal else 1) for k in range(K)]
        move = {"step_size": FLAGS.step_lr, "clamp": (0.0, 1.0), "noise_order": "last"}
        n = 128 if FLAGS.dataset in ("cifar10", "celeba") else 32
        options = given | {"seed": seed, "first_chain": first_chain}
        if sample:
            free = move | {"steps": 1, "noise_std": 0.0, "clamp": None}
            sampler = last(model, wrap, gradient="autograd", **free)
            x, samples = im_neg, []
            for k, std in enumerate(stds):
                x = kick(x, std, seed, noise, first_chain, k)
                with left_as_found(sampler.energy, x.device):
                    _, im_grad = energy_and_grad(sampler.energy, x, given)
                samples.append(sampler(x, first_step=k, **options))
                x = samples[-1].clamp(0.0, 1.0)
            return x, x[:n].clone(), samples, im_grad
        x = kick(im_neg, stds[0], seed, noise, first_chain)
        if K > 1:
            sampler = until_last(model, wrap, steps=K - 1, noise_std=stds[1:], **move)
            later = None if noise is None else noise[1:]
            x = sampler(x, first_step=1, noise=later, **options)
        last_step = last(model, wrap, steps=1, noise_std=0.0, gradient="autograd", **move)
        few = {name: value[:n] for name, value in given.items()}
        with left_as_found(last_step.energy, x.device):
            _, im_grad = energy_and_grad(last_step.energy, x[:n], few)
        moved = last_step(x, **options)  # before the graph below takes memory
        im_neg_kl = last_step(x[:n], seed=seed, differentiable=True, checkpoint="none", **few)
        return moved, im_neg_kl, im_grad

    return gen_image
