"""Presets take the arguments of their originals, and name bad ones."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import fastlangevin as fl
from tests.presets.shared import (
    ANATOMY,
    EVAL,
    LABELS,
    SHAPE,
    SIGMAS,
    VECTORS,
    X0,
    K,
    Net,
    args,
    flags,
    score_net,
    well,
)

SIGNATURES: dict[str, tuple[Callable[[], Any], str]] = {
    "short_run": (lambda: fl.presets.short_run(well), "K=100, s=0.01"),
    "anatomy": (lambda: fl.presets.anatomy(well, ANATOMY), "L, init_type, update_s_t_0=True"),
    "anatomy_eval": (
        lambda: fl.presets.anatomy_eval(well, EVAL | {"epsilon": 1, "train_epsilon": 1}, X0),
        "",
    ),
    "jem": (lambda: fl.presets.jem(args()), f"f, replay_buffer, y=None, n_steps={K}"),
    "jempp": (
        lambda: fl.presets.jempp(),
        "f, replay_buffer, y=None, n_steps=10, in_steps=10, args=None, save=True",
    ),
    "improved_cd": (
        lambda: fl.presets.improved_cd(),
        "label, FLAGS, model, im_neg, num_steps, sample=False",
    ),
    "uva": (
        lambda: fl.presets.uva.generate_samples,
        "model, inp_imgs, steps=60, step_size=10, return_img_per_step=False",
    ),
    "uva, buffer": (
        lambda: fl.presets.uva(well, (2,), 3).sample_new_exmps,
        "steps=60, step_size=10",
    ),
    "nae": (
        lambda: fl.presets.nae(),
        "x, model, stepsize, n_steps, noise_scale=None, intermediate_samples=False, clip_x=None, "
        "clip_grad=None, reject_boundary=False, noise_anneal=None, spherical=False, mh=False",
    ),
    "nae_v2": (
        lambda: fl.presets.nae_v2(),
        "x, model, stepsize, n_steps, noise_scale=None, intermediate_samples=False, clip_x=None, "
        "clip_grad=None, reject_boundary=False, noise_anneal=None, spherical=False, mh=False, "
        "temperature=None",
    ),
    "nae_mcmc": (
        lambda: fl.presets.nae_mcmc(),
        "x, model, stepsize, n_step, noise_scale=None, bound=None, clip_grad=None, "
        "reject_boundary=False, noise_anneal=None, noise_anneal_v2=None, mh=False, "
        "temperature=None",
    ),
    "ncsn": (
        lambda: fl.presets.ncsn(),
        "x_mod, scorenet, sigmas, n_steps_each=200, step_lr=8e-06, final_only=False, "
        "verbose=False, denoise=True",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_preset_has_the_originals_signature(name: str) -> None:
    """Its positional parameters, in order, with their defaults; the rest by keyword alone."""
    make, want = SIGNATURES[name]
    found = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(make()).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ", ".join(found) == want
    with pytest.raises(TypeError, match="friction"):
        make()(friction=1.0)


@pytest.mark.parametrize("name", ["igebm", "openai_igebm", "short_run", "torchebm", "uva"])
def test_an_option_that_the_original_did_not_have(name: str) -> None:
    with pytest.raises(TypeError, match="friction"):
        getattr(fl.presets, name)(well, friction=1.0)


def jem(f: Net, y: Any = None, **options: Any) -> Tensor:
    return fl.presets.jem(args(**options))(f, X0.clone(), y, 1)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "y must be in 0..3", lambda f: fl.presets.jem(args())(f, X0, LABELS + 1)),
        (ValueError, "3 states for a batch of 4", lambda f: fl.presets.jem(args())(f, X0[:3])),
        (
            ValueError,
            "each of the 3 classes",
            lambda f: fl.presets.jem(args(n_classes=3))(f, X0, LABELS % 3),
        ),
        (TypeError, "floating dtype", lambda f: fl.presets.jem(args())(f, X0.byte())),
        (TypeError, "replay_buffer must be a tensor", lambda f: fl.presets.jem(args())(f, [X0])),
        (TypeError, "give args", lambda f: fl.presets.jempp()(f, X0)),
        (
            ValueError,
            "layer_one",
            lambda f: fl.presets.jempp(args(pyld_lr=0.1))(well, X0),
        ),
        (ValueError, "proj_norm_type", lambda f: fl.presets.openai_igebm(f, proj_norm_type="l1")),
        (TypeError, "y must be a tensor of integers", lambda f: jem(f, LABELS.double())),
        (ValueError, r"y must have shape \[n\], got \[4, 1\]", lambda f: jem(f, LABELS[:, None])),
        (TypeError, "y must be a tensor of integers, got list", lambda f: jem(f, [0, 1, 2, 3])),
        (ValueError, r"reinit_freq must be in \[0, 1\], got 2", lambda f: jem(f, reinit_freq=2)),
        (ValueError, "args.uncond", lambda f: jem(f, LABELS, uncond=True)),
        (
            ValueError,
            "num_steps must be at least 1",
            lambda f: fl.presets.improved_cd()(None, flags(), f, X0, 0),
        ),
        (ValueError, "temperature must be", lambda f: fl.presets.openai_igebm(f, temperature=0)),
        (TypeError, "temperature must be a number", lambda f: fl.presets.ula(f, "hot")),
        (ValueError, "step_size must be", lambda f: fl.presets.ebmkit(-0.1)),
        (TypeError, "shape must be a sequence", lambda f: fl.presets.short_run(f, shape=8)),
        (TypeError, "sigmas must be a sequence", lambda f: fl.anneal.levels(1.0, 2, 1e-3)),
        (TypeError, "sigmas must be a number", lambda f: fl.anneal.levels(["a"], 2, 1e-3)),
        (ValueError, "max_len", lambda f: fl.presets.uva(f, SHAPE, 9, 8)),
        (ValueError, "mh is not", lambda f: fl.presets.nae()(VECTORS, well, 0.1, 2, mh=True)),
        (ValueError, "stepsize or", lambda f: fl.presets.nae()(VECTORS, well, None, 2)),
        (
            ValueError,
            "verbose",
            lambda f: fl.presets.ncsn()(VECTORS, score_net, SIGMAS, verbose=True),
        ),
        (ValueError, "decay", lambda f: fl.presets.torchebm(f, decay=0.1)),
        (ValueError, "integrator", lambda f: fl.presets.torchebm(f, integrator="heun")),
        (ValueError, "thin", lambda f: fl.presets.torchebm(f).sample(X0, thin=0)),
        (ValueError, "x or dim", lambda f: fl.presets.torchebm(f).sample()),
        (TypeError, "noise_std", lambda f: fl.presets.ula(f, noise_std=0.1)),
        (ValueError, "temperature", lambda f: fl.presets.ula(f, -1.0)),
    ],
)
def test_presets_name_wrong_input(
    net: Net, error: type, match: str, call: Callable[[Net], Any]
) -> None:
    with pytest.raises(error, match=match):
        call(net)
