"""Du and Mordatch's samplers: OpenAI's release, its PyTorch port, improved contrastive divergence.

All three add noise, take the gradient there, and clamp only after the move. The UvA tutorial's
sampler also clamps before the gradient, which is noise_order="before".
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastlangevin.arguments import GradClip, check_count
from fastlangevin.gradients.autograd import energy_and_grad
from fastlangevin.gradients.untouched import left_as_found
from fastlangevin.names import keywords_checked
from fastlangevin.presets.common import (
    Randomness,
    Samplers,
    in_eval_mode,
    kick,
    labelled,
    noise_after_move,
    random_keywords,
    run_noise_first,
)
from fastlangevin.sampler import LangevinSampler


@keywords_checked
def igebm(
    model: Callable[..., Tensor], step_size: float = 10, sample_step: int = 60
) -> Callable[..., Tensor]:
    """``sample(neg_img, neg_id)``: the inline loop of the PyTorch port of implicit generation.

        x <- x + 0.005 z,    x <- clamp(x - step_size clip(dE/dx)),    clip +-0.01, clamp (0, 1)

    model: the energy, called model(x, neg_id), or model(x) if neg_id is None, of any output shape:
    its sum is differentiated. It is in eval mode during a call. Returns a function of (neg_img
    [n, ...], neg_id=None) with the presets' keywords (``noise`` is [sample_step, n, ...]). It
    returns the states after sample_step steps, detached.

    Differs: neg_img is not changed; requires_grad flags and modes are restored, while the original
    leaves all parameters requiring grad and the model in train mode.
    Source: rosinality/igebm-pytorch, train.py.
    """
    samplers, stds = Samplers(), [0.005] * sample_step
    settings: dict[str, Any] = {"steps": sample_step, "step_size": step_size, "clamp": (0.0, 1.0)}
    settings |= {"grad_clip": 0.01, **noise_after_move(stds)}

    @random_keywords
    def sample(neg_img: Tensor, neg_id: Tensor | None = None, *, random: Randomness) -> Tensor:
        wrap, model_kwargs = labelled(model, neg_id)
        sampler = samplers(model, wrap, **settings)
        with in_eval_mode(model):
            return run_noise_first(sampler, neg_img, stds[0], random, **model_kwargs)

    return sample


@keywords_checked
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
    """The loop of implicit generation as OpenAI released it, with its flags under their names.

        x <- x + 0.005 rescale noise_scale z,    x <- clamp(x - step_lr clip(d(T E)/dx))

    with T = temperature and clamp (0, rescale). Unless proj_norm is 0, it bounds each element
    ("li") or the L2 norm of the whole batch ("l2", as clip_by_norm of one tensor does). model: the
    energy, of any output shape, called model(x, label), or model(x) without a label; its sum is
    differentiated. The CIFAR-10 commands use step_lr=10, num_steps=60, proj_norm=0.01. Returns a
    function of (x_mod [n, ...], label=None) with the presets' keywords (``noise`` is
    [num_steps, n, ...]) and the differentiable options of a :class:`LangevinSampler` call. Without
    --zero_kl the original's loss passes through all steps, which is ``differentiable=True``.

    Differs: it is a call and not a TensorFlow graph; the intermediate energies are not returned.
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
        clip = proj_norm / temperature  # it bounds dE/dx: the step size is T step_lr
        clip = ("batch_norm", clip) if proj_norm_type == "l2" else clip
    settings: dict[str, Any] = {"steps": num_steps, "step_size": step_lr * temperature}
    settings |= {"clamp": (0.0, float(rescale)), "grad_clip": clip, **noise_after_move(stds)}

    @random_keywords
    def sample(
        x_mod: Tensor,
        label: Tensor | None = None,
        *,
        differentiable: bool = False,
        checkpoint: str | int = "auto",
        grad_steps: int | None = None,
        random: Randomness,
    ) -> Tensor:
        wrap, options = labelled(model, label)
        sampler = samplers(model, wrap, **settings)
        if differentiable:
            options |= {"differentiable": True, "checkpoint": checkpoint, "grad_steps": grad_steps}
        return run_noise_first(sampler, x_mod, stds[0], random, **options)

    return sample


def improved_cd() -> Callable[..., tuple[Any, ...]]:
    """``gen_image(label, FLAGS, model, im_neg, num_steps, sample=False)`` of improved CD.

        x <- x + 0.001 c_k z,    x <- clamp(x - step_lr dE/dx),    clamp (0, 1)

    with c_k = (K - k - 1) / K if FLAGS.anneal, else 1. FLAGS: an object with ``step_lr``,
    ``anneal`` and ``dataset``. model: the energy, called model(x, label), or model(x) if label is
    None, of any output shape: its sum is differentiated, so the three energies per chain [n, 3] of
    the original's default, multiscale networks are added up. Returns a function with the presets'
    keywords (``noise`` is [num_steps, n, ...]).

    It returns (im_neg, im_neg_kl, im_grad). im_neg [n, ...] is detached. im_neg_kl holds the first
    128 chains (datasets "cifar10" and "celeba") or 32; it is differentiable in the model's
    parameters through the last step only, as with ``differentiable=True, grad_steps=1``. im_grad is
    the gradient of these chains' energy at the last step. ``sample=True``, which the original's
    train.py uses at every save_interval, returns (im_neg, im_neg_kl, im_samples, im_grad).
    im_samples then lists the num_steps states [n, ...] after each move, before its clamp; im_grad
    is that of all chains; im_neg_kl has no graph to the model.

    Differs: im_grad carries no graph; im_neg is not changed; a model without a parameter that
    requires grad raises ValueError unless ``sample=True``. The chains in im_neg_kl keep their own
    labels (the original passes the whole batch's); if label is None, a model that accepts x alone
    is called model(x) and not model(x, None). ``FLAGS.all_step`` is not read: the original's own
    ``detach`` cuts the graph that it builds.
    Source: yilundu/improved_contrastive_divergence, train.py; Du et al., ICML 2021.
    """
    until_last, last = Samplers(), Samplers()

    @random_keywords
    def gen_image(
        label: Tensor | None,
        FLAGS: Any,
        model: Callable[..., Tensor],
        im_neg: Tensor,
        num_steps: int,
        sample: bool = False,
        *,
        random: Randomness,
    ) -> tuple[Any, ...]:
        K = check_count("improved_cd", "num_steps", num_steps)
        wrap, model_kwargs = labelled(model, label)
        stds = [0.001 * ((K - k - 1) / K if FLAGS.anneal else 1) for k in range(K)]
        move = {"step_size": FLAGS.step_lr, "clamp": (0.0, 1.0), "noise_order": "last"}
        n = 128 if FLAGS.dataset in ("cifar10", "celeba") else 32
        options = model_kwargs | {"seed": random.seed, "first_chain": random.first_chain}
        if sample:
            unclamped = move | {"steps": 1, "noise_std": 0.0, "clamp": None}
            sampler = last(model, wrap, gradient="autograd", **unclamped)
            x, samples = im_neg, []
            for k, std in enumerate(stds):
                x = kick(x, std, random, k)
                im_grad = _gradient(sampler, x, model_kwargs)
                samples.append(sampler(x, first_step=k, **options))
                x = samples[-1].clamp(0.0, 1.0)
            return x, x[:n].clone(), samples, im_grad
        x = kick(im_neg, stds[0], random)
        if K > 1:
            sampler = until_last(model, wrap, steps=K - 1, noise_std=stds[1:], **move)
            later_noise = None if random.noise is None else random.noise[1:]
            x = sampler(x, first_step=1, noise=later_noise, **options)
        last_step = last(model, wrap, steps=1, noise_std=0.0, gradient="autograd", **move)
        kl_kwargs = {name: value[:n] for name, value in model_kwargs.items()}
        im_grad = _gradient(last_step, x[:n], kl_kwargs)
        moved = last_step(x, **options)  # before the graph below takes memory
        im_neg_kl = last_step(
            x[:n], seed=random.seed, differentiable=True, checkpoint="none", **kl_kwargs
        )
        return moved, im_neg_kl, im_grad

    return gen_image


def _gradient(sampler: LangevinSampler, x: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    with left_as_found(sampler.energy, x.device):
        return energy_and_grad(sampler.energy, x, model_kwargs)[1]
