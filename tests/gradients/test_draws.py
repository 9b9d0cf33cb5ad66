"""Numbers that energies draw: those of a seed, which leave torch's generators alone."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlangevin import noise
from fastlangevin.gradients import draws
from fastlangevin.gradients.draws import Draws
from fastlangevin.gradients.untouched import left_as_found
from fastlangevin.kernels import extension

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
DRAW: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(5),
    "rand out": lambda: torch.rand(5, out=torch.empty(5)),
    "rand_like": lambda: torch.rand_like(X),
    "randn": lambda: torch.randn(40),
    "randint": lambda: torch.randint(9, (5,)),
    "randint_like": lambda: torch.randint_like(X, 3, 9),
    "randperm": lambda: torch.randperm(9),
    "random_": lambda: torch.empty(5).random_(),
    "normal": lambda: torch.normal(X, 0.5),
    "normal_": lambda: torch.empty(5).normal_(),
    "log_normal_": lambda: torch.empty(5).log_normal_(),
    "cauchy_": lambda: torch.empty(5).cauchy_(),
    "exponential_": lambda: torch.empty(5).exponential_(),
    "geometric_": lambda: torch.empty(5).geometric_(0.5),
    "bernoulli": lambda: torch.bernoulli(X.sigmoid()),
    "binomial": lambda: torch.binomial(torch.full((5,), 9.0), torch.full((5,), 0.5)),
    "poisson": lambda: torch.poisson(X.exp()),
    "multinomial": lambda: torch.multinomial(torch.ones(9), 4),
    "gamma": lambda: torch.distributions.Gamma(X.exp(), X.exp()).rsample(),
    "dirichlet": lambda: torch._sample_dirichlet(torch.ones(5)),
    "dropout": lambda: F.dropout(X, 0.5),
    "native_dropout": lambda: torch.native_dropout(X, 0.5, True)[0],
    "alpha_dropout": lambda: F.alpha_dropout(X, 0.5, training=True),
    "dropout1d": lambda: F.dropout1d(X, 0.5),
    "rrelu": lambda: F.rrelu(X, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "checkpoint": lambda: checkpoint(lambda x: F.dropout(x, 0.5), X, use_reentrant=False),
    "jit": lambda: torch.jit.script(nn.Dropout())(X),
    "vmap": lambda: torch.vmap(lambda x: F.dropout(x, 0.5), randomness="different")(X[0]),
    "func.grad": lambda: torch.func.grad(lambda x: F.dropout(x, 0.5).sum())(X),
    "several": lambda: torch.cat([torch.rand(3), F.dropout(torch.ones(3)), torch.randn(30)]),
    "manual_seed": lambda: (torch.rand(1), torch.manual_seed(4), torch.rand(3))[2],
    "fork_rng": lambda: _forked(),
    "own generator": lambda: torch.rand(3, generator=torch.Generator().manual_seed(4)),
}


def _forked() -> Tensor:
    first = torch.rand(2)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        inside = torch.rand(2)
    return torch.cat([first, inside, torch.rand(2)])


@pytest.mark.parametrize("name", DRAW)
def test_draws_have_the_bits_of_a_seeded_generator_which_does_not_move(name: str) -> None:
    """Those of a step's seed in chains, and in an energy that runs alone those that come next."""
    torch.manual_seed(noise.fold_in(7, 3))
    want = [DRAW[name]() for _ in range(2)]
    torch.manual_seed(1)
    before, own = torch.get_rng_state(), Draws(7, CPU)
    for step in (2, 3, 3):
        with own.step(step):
            found = [DRAW[name]() for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, found, want))
    with left_as_found(nn.Identity(), CPU):
        found = [DRAW[name]() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, found, [DRAW[name]() for _ in range(2)]))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["manual_seed", "fork_rng", "checkpoint"])
def test_energies_that_handle_the_generators_are_noticed(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the extension's profile function, and by the one in Python that replaces it."""
    if not compiled:
        monkeypatch.setattr(extension, "library", None)
    elif extension.library is None:
        pytest.skip("the extension is not built")
    torch.manual_seed(noise.fold_in(7, 3))
    want = [DRAW[name]() for _ in range(2)]
    torch.manual_seed(1)
    before, own = torch.get_rng_state(), Draws(7, CPU)
    with own.step(3):
        found = [DRAW[name]() for _ in range(2)]
    assert sys.getprofile() is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("compiled", [True, False])
def test_only_watched_objects_call_the_profile_function(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(extension, "library", None)
    elif extension.library is None:
        pytest.skip("the extension is not built")
    watched, other, callers = [1], [1], []
    try:
        extension.watch_methods([watched], lambda frame: callers.append(frame.f_code.co_name))
        other.append(2)
        (lambda: watched.append(2))()
        len(watched)
    finally:
        sys.setprofile(None)
    assert callers == ["<lambda>"]


# Tagged as drawing, though on CPU and CUDA they draw nothing, or only by operators that are known.
DRAW_NOTHING = {
    "_cudnn_init_dropout_state",  # from the seed that it is given
    "_fill_mem_eff_dropout_mask_",
    "_flash_attention_forward_no_dropout_inplace",
    "_fused_sdp_choice",
    "_lstm_mps",
    "_nested_tensor_softmax_with_shape",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention_for_cpu",  # refuses dropout
}


def test_torch_itself_uses_the_dispatch_key_of_draws_for_nothing() -> None:
    Draws(0, CPU)  # registers the kernels of this package
    names = [*draws.drawing_operators(), draws._ATTENTION]
    names += [op for name in draws._WITHOUT_GENERATOR for op in draws._overloads(name)]
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(draws._KEY_NAME)
    assert set(registered) <= {op.name() for op in names}
    for tensor in (X, nn.Parameter(X.clone()), X.to_sparse(), torch.empty(2, device="meta")):
        assert not torch._C._dispatch_keys(tensor).has(draws._KEY)
    assert not torch._C._dispatch_tls_is_dispatch_key_included(draws._KEY)


def test_every_operator_of_torchs_that_draws_is_known() -> None:
    known = set(draws.drawing_operators())
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    packets = [
        getattr(torch.ops.aten, name.removeprefix("aten::"), None)
        for name in names
        if name.startswith("aten::")
    ]
    ops = [getattr(p, overload) for p in packets if p is not None for overload in p.overloads()]
    drawing = {op for op in ops if torch.Tag.nondeterministic_seeded in op.tags}
    assert len(drawing) > 80
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in drawing - known:
        made_of_others = any(
            has(op.name(), key)
            for key in ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
        )
        listed = op._opname in draws._WITHOUT_GENERATOR or op._opname in DRAW_NOTHING
        assert made_of_others or listed or op._opname.endswith("_backward"), op
