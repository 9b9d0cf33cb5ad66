"""What presets keep and return: buffers, banks, trajectories and gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from tests.presets.shared import (
    ANATOMY,
    CASES,
    EVAL,
    LABELS,
    SAME,
    SHAPE,
    SIGMAS,
    UNIT,
    VECTORS,
    X0,
    N,
    Net,
    anatomy_eval_step,
    anatomy_step,
    args,
    flags,
    grad,
    numbers,
    score_net,
    uva_step,
    well,
)


def uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    return 2 * fl.noise.uniform(shape, seed=seed, step=0) - 1


def test_short_run_starts_from_uniform_noise_of_its_seed(net: Net) -> None:
    sample_q = fl.presets.short_run(net.float(), SHAPE, m=3)
    x = sample_q(2, seed=5)
    sampler = fl.LangevinSampler(net, steps=2, step_size=1.0, noise_std=0.01, maximize=True)
    assert x.shape == (3, *SHAPE)
    assert x.dtype == torch.float32
    assert torch.equal(x, sampler(uniform((3, *SHAPE), 5), seed=5))
    torch.manual_seed(1)
    first = sample_q(2)
    assert not torch.equal(first, sample_q(2))
    torch.manual_seed(1)
    assert torch.equal(first, sample_q(2))
    assert torch.equal(
        sample_q(2, generator=torch.Generator().manual_seed(1)),
        sample_q(2, generator=torch.Generator().manual_seed(1)),
    )
    with pytest.raises(ValueError, match="seed or generator"):
        sample_q(2, seed=1, generator=torch.Generator())


def test_anatomy_returns_the_mean_gradient_and_keeps_its_bank(net: Net) -> None:
    z = numbers(3, N, *SHAPE)
    bank = torch.stack([X0[i % N] + i for i in range(9)]) / 9
    before = bank.clone()
    sample_s_t = fl.presets.anatomy(net, ANATOMY, s_t_0=bank)
    x, r = sample_s_t(3, "persistent", seed=0, noise=z)
    # Which states were drawn is seen in the bank, in which order in x.
    slots = [i for i in range(9) if not torch.equal(bank[i], before[i])]
    order = [next(i for i in slots if torch.equal(bank[i], row)) for row in x]
    state, norms = before[order], []
    for k in range(3):
        norms.append(grad(net, state).flatten(1).norm(dim=1).mean())
        state = anatomy_step(net, state, z[k], k, 3)
    assert (x - state).abs().max() < 1e-12
    assert r.shape == ()
    assert abs(r - sum(norms) / 3) < 1e-12
    kept = bank.clone()
    sample_s_t(3, "persistent", False, noise=z)
    assert torch.equal(bank, kept)


def test_anatomy_from_data_and_from_noise(net: Net) -> None:
    net.float()
    data = torch.full((7, *SHAPE), 0.5)
    config = ANATOMY | {"data_epsilon": 0.1, "epsilon": 0.0}
    flat = fl.presets.anatomy(lambda x: 0 * x.flatten(1).sum(1), config, data)
    want = 0.5 + 0.1 * fl.noise.normal((N, *SHAPE), seed=2, step=0, stream=2)
    assert torch.equal(flat(1, "data", seed=2)[0], want)
    assert torch.equal(flat(1, "uniform", seed=2)[0], uniform((N, *SHAPE), 2))
    gaussian = flat(1, "gaussian", seed=2)[0]
    assert abs(gaussian.mean()) < 5 / math.sqrt(gaussian.numel())
    assert gaussian.abs().max() > 1
    for init, expected in (("persistent", "s_t_0"), ("noise", "init_type")):
        with pytest.raises(ValueError, match=expected):
            flat(1, init)
    with pytest.raises(ValueError, match="q holds 3 states for a batch of 4"):
        fl.presets.anatomy(net, config, data[:3])(1, "data")
    with pytest.raises(FloatingPointError, match="not finite"):
        fl.presets.anatomy(lambda x: (1e30 * x).pow(3).flatten(1).sum(1), config)(5, "uniform")


def test_anatomy_eval_records_every_step(net: Net) -> None:
    z, temperature = numbers(3, N, *SHAPE), 0.4 * 0.3**2 / 2
    config = EVAL | {"epsilon": 0.02, "train_epsilon": 0.3, "num_mcmc_steps": 3}
    x, ens, grads = fl.presets.anatomy_eval(net, config, X0)(noise=z)
    state = X0
    for k in range(3):
        assert (ens[k] - net(state).flatten() / temperature).abs().max() < 1e-10
        norm = (0.02**2 / 2 * grad(net, state) / temperature).flatten(1).norm(dim=1)
        assert (grads[k] - norm).abs().max() < 1e-12
        state = anatomy_eval_step(net, state, z[k], k, 3)
    assert (x - state).abs().max() < 1e-12


def test_anatomy_eval_adjusted(net: Net) -> None:
    """The original's joint energies decide, with the contract's uniforms."""
    z, temperature, epsilon = numbers(8, N, *SHAPE), 0.4 * 0.3**2 / 2, 0.15
    config = EVAL | {"epsilon": epsilon, "train_epsilon": 0.3, "num_mcmc_steps": 8}
    sample = fl.presets.anatomy_eval(net, config | {"use_mh_langevin": True}, X0)
    x, ens, _, accepts = sample(seed=4, noise=z)

    def energy(x: Tensor) -> Tensor:
        return net(x).flatten() / temperature

    state = X0
    for k in range(8):
        g = grad(energy, state)
        proposal = state - epsilon**2 / 2 * g + epsilon * z[k]
        p = z[k] - epsilon / 2 * (g + grad(energy, proposal))
        before = energy(state) + 0.5 * z[k].square().flatten(1).sum(1)
        after = energy(proposal) + 0.5 * p.square().flatten(1).sum(1)
        u = fl.noise.uniform((N, 1), seed=4, step=k, stream=3, dtype=torch.float64)[:, 0]
        taken = u < (before - after).exp()
        assert (ens[k] - energy(state)).abs().max() < 1e-9
        assert accepts[k] == taken.double().mean()
        state = torch.where(taken.view(-1, 1, 1, 1), proposal, state)
    assert (x - state).abs().max() < 1e-9
    assert 0 < accepts.mean() < 1


def test_jem_writes_its_slots_back_block_by_block(net: Net) -> None:
    """12 states of 4 classes: labels 2 and 0 change one state each, of blocks 6..8 and 0..2."""
    buffer = numbers(12, *SHAPE)
    before, y = buffer.clone(), torch.tensor([2, 0])
    x = fl.presets.jem(args())(net, buffer, y=y, n_steps=2, seed=0)
    changed = [i for i in range(12) if not torch.equal(buffer[i], before[i])]
    assert [i // 3 for i in changed] == [0, 2]
    assert torch.equal(buffer[changed], x[[1, 0]])
    for seed in range(8):
        found = fl.presets.jem(args(sgld_lr=0, sgld_std=0))(net, before, y, 1, seed=seed)
        assert all((before[3 * c : 3 * c + 3] == row).all(-1).all(-1).all(-1).any()
                   for c, row in zip(y.tolist(), found, strict=True))  # fmt: skip


def test_jem_starts_anew_at_the_rate(net: Net) -> None:
    """N = 4 x 400 chains at rate 0.3: the number of those off the buffer's 9 has |z| <= 5."""
    rates = {"sgld_lr": 0.0, "sgld_std": 0.0, "reinit_freq": 0.3}
    still = fl.presets.jem(args(batch_size=400, **rates))
    buffer = torch.full((400, *SHAPE), 9.0)
    fresh = 0
    for seed in range(4):
        x = still(net.float(), buffer.clone(), n_steps=1, seed=seed)
        new = (x != 9).flatten(1)
        assert torch.equal(new.all(1), new.any(1))
        assert x[new.all(1)].abs().le(1).all()
        fresh += int(new.all(1).sum())
    assert abs(fresh - 480) / math.sqrt(1600 * 0.3 * 0.7) <= 5


def test_jem_without_a_buffer(net: Net) -> None:
    net.float()
    sample_q = fl.presets.jem(args(sgld_lr=0.0, sgld_std=0.0), shape=SHAPE)
    assert torch.equal(sample_q(net, [], n_steps=1, seed=3), uniform((N, *SHAPE), 3))
    assert sample_q(net, [], torch.zeros(7, dtype=torch.int64), 1).shape == (7, *SHAPE)


def test_jempp_saves_when_asked(net: Net) -> None:
    buffer = X0.clone()
    fl.presets.jempp(args())(net, buffer, LABELS, 2, 0, save=False)
    assert torch.equal(buffer, X0)
    x = fl.presets.jempp(args())(net, buffer, LABELS, 2, 0)
    assert torch.equal(buffer, x)
    assert (x.abs() > 1).any()  # the noise comes after the clamp


def test_improved_cd_differentiates_through_the_last_step_alone(net: Net) -> None:
    z = numbers(3, 40, *SHAPE)
    x0 = numbers(40, *SHAPE, seed=5).clamp(0, 1)
    labels = torch.arange(40) % N
    im_neg, im_neg_kl, im_grad = fl.presets.improved_cd()(labels, flags(), net, x0, 3, noise=z)
    x = x0
    for k in range(3):
        x = (x + 0.001 * z[k]).detach()
        noisy, x = x, (x + 0 - 0.2 * grad(net, x + 0, labels)).clamp(0, 1)
    few = noisy[:32].requires_grad_()
    (g,) = torch.autograd.grad(net(few, labels[:32]).sum(), few, create_graph=True)
    want = (few.detach() - 0.2 * g).clamp(0, 1)
    assert im_neg.shape == x0.shape
    assert not im_neg.requires_grad
    assert (im_neg_kl - want).abs().max() < 1e-12
    assert (im_grad - g).abs().max() < 1e-12
    weights = numbers(32, *SHAPE, seed=6)
    expected = torch.autograd.grad((want * weights).sum(), [*net.parameters()], allow_unused=True)
    found = torch.autograd.grad((im_neg_kl * weights).sum(), [*net.parameters()], allow_unused=True)
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-10
    cifar = fl.presets.improved_cd()(labels, flags(dataset="cifar10"), net, x0, 1)
    assert cifar[1].shape == x0.shape


def test_openai_igebm_differentiates_through_all_steps(net: Net) -> None:
    z = numbers(3, N, *SHAPE)
    sample = fl.presets.openai_igebm(net, num_steps=3, step_lr=0.2)
    x = UNIT
    for k in range(3):
        x = x + 0.005 * z[k]
        x = x if x.requires_grad else x.requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        x = (x - 0.2 * g).clamp(0, 1)
    weight = net.head.weight
    (want,) = torch.autograd.grad(x.square().sum(), weight)
    got = sample(UNIT, noise=z, differentiable=True)
    assert (torch.autograd.grad(got.square().sum(), weight)[0] - want).abs().max() < 1e-10


def test_uva_keeps_the_newest_states(net: Net) -> None:
    net.float()
    chains = fl.presets.uva(net, SHAPE, sample_size=4, max_len=10, seed=1)
    batches = [uniform((4, *SHAPE), 1)]
    for _ in range(4):
        batches.append(chains.sample_new_exmps(steps=2, step_size=3))
        newest = torch.cat(batches)[-10:]
        assert chains.buffer.added == 4 * len(batches)
        held = chains.buffer.states[: min(10, chains.buffer.added)]
        assert {tuple(x.flatten().tolist()) for x in held} == {
            tuple(x.flatten().tolist()) for x in newest
        }
    assert batches[-1].shape == (4, *SHAPE)
    again = fl.presets.uva(net, SHAPE, 4, 10, seed=1)
    assert torch.equal(again.sample_new_exmps(2, 3), batches[1])
    # Killed after two batches and resumed.
    resumed = fl.presets.uva(net, SHAPE, 4, 10, seed=1)
    again.sample_new_exmps(2, 3)
    resumed.buffer.load_state_dict(again.buffer.state_dict())
    resumed.drawn = again.drawn
    assert torch.equal(resumed.sample_new_exmps(2, 3), batches[3])


def test_uva_returns_every_step(net: Net) -> None:
    z = numbers(3, N, *SHAPE)
    images = fl.presets.uva.generate_samples(net, X0, 3, 3, True, noise=z)
    x = X0
    for k in range(3):
        x = uva_step(net, x, z[k], k, 3)
        assert (images[k] - x).abs().max() < 1e-12


def test_ncsn_returns_a_list_on_the_cpu() -> None:
    z, sample = numbers(8, N, 5), fl.presets.ncsn()
    images = sample(VECTORS, score_net, torch.tensor(SIGMAS), 2, 1e-3, noise=z)
    assert [image.shape for image in images] == [(N, 5)] * 9
    last = torch.full((N,), 3)
    want = images[7] + SIGMAS[-1] ** 2 * score_net(images[7], last)
    assert (images[8] - want).abs().max() < 1e-7
    (final,) = sample(VECTORS, score_net, torch.tensor(SIGMAS), 2, 1e-3, True, noise=z)
    assert torch.equal(final, images[8])
    assert len(sample(VECTORS, score_net, SIGMAS, 2, denoise=False)) == 8


@pytest.mark.parametrize("step_size", [0.1, [0.1, 0.2, 0.3], torch.tensor([[0.1], [0.2], [0.3]])])
@pytest.mark.parametrize("temperature", [0.5, torch.tensor([0.5, 1.0, 2.0, 0.0])])
def test_ula_ties_noise_to_step_and_temperature(step_size: Any, temperature: Any) -> None:
    z = numbers(3, N, 5).float()
    sampler = fl.presets.ula(well, temperature, steps=3, step_size=step_size)
    x = VECTORS.float()
    for k in range(3):
        a = step_size if isinstance(step_size, float) else float(step_size[k])
        heat = torch.as_tensor(temperature).view(-1, 1)
        x = x - a * grad(well, x) + (2 * a * heat).sqrt() * z[k]
    assert (sampler(VECTORS.float(), noise=z) - x).abs().max() < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_half_network_leaves_the_state_in_full(case: str, net: Net) -> None:
    _, x0, preset = CASES[case]
    x0 = x0.float()
    got = preset(net.bfloat16(), x0, numbers(4, *x0.shape).float())
    moved = got[(got.abs() < 0.9) & (got != 0)].float()
    assert got.dtype in (torch.float32, torch.float64)  # torchebm's case asks for float64
    assert (moved != moved.bfloat16().float()).double().mean() > 0.5


def test_torchebms_diagnostics_of_a_half_network(net: Net) -> None:
    ours = fl.presets.torchebm(net.bfloat16(), step_size=0.1)
    _, found = ours.sample(X0.float(), n_steps=2, return_diagnostics=True)
    assert found["energy"].dtype == torch.float32
    assert found["energy"].shape == (2,)


@pytest.mark.parametrize("preset", ["jem", "jempp"])
def test_slots_drawn_twice_keep_the_later_chain(
    preset: str, threads: Callable[[int], None]
) -> None:
    """300 chains on 512 slots: whatever the threads, the last of a slot's chains is in it."""
    threads(2)
    settings = args(batch_size=300, sgld_std=0.1)
    sample = getattr(fl.presets, preset)(settings)
    for seed in range(2):
        buffer = torch.zeros(512, 16, 8, 8)
        x = sample(lambda v: 0 * v.flatten(1).sum(1), buffer, None, 1, seed=seed)
        slots = fl.presets.common.draw_slots(300, 512, seed).tolist()
        last = {slot: row for row, slot in enumerate(slots)}
        assert len(last) < 300
        assert torch.equal(buffer[list(last)], x[list(last.values())])


def test_uvas_buffer_follows_a_model_and_lists_its_examples(net: Net) -> None:
    chains = fl.presets.uva(net.float(), SHAPE, sample_size=2, max_len=5, seed=1)
    moves = []
    to, chains.buffer.to = chains.buffer.to, lambda device: moves.append(device) or to(device)
    first, second = (chains.sample_new_exmps(1, 3) for _ in range(2))
    assert moves == [torch.device("cpu")] * 2
    assert [image.shape for image in chains.examples] == [(1, *SHAPE)] * 5
    newest = torch.cat(chains.examples)[:4]
    assert torch.equal(newest, torch.cat([first, second]).flip(0))


def test_improved_cd_returns_its_samples(net: Net) -> None:
    z, labels = numbers(3, 40, *SHAPE), torch.arange(40) % N
    x0 = numbers(40, *SHAPE, seed=5).clamp(0, 1)
    gen_image = fl.presets.improved_cd()
    im_neg, im_neg_kl, samples, im_grad = gen_image(
        labels, flags(anneal=True), net, x0, 3, sample=True, noise=z
    )
    x = x0
    for k in range(3):
        noisy = x + 0.001 * (3 - k - 1) / 3 * z[k]
        g = grad(net, noisy, labels)
        assert (samples[k] - (noisy - 0.2 * g)).abs().max() < 1e-12
        x = (noisy - 0.2 * g).clamp(0, 1)
    assert (samples[2] != im_neg).any()
    assert (im_neg - x).abs().max() < 1e-12
    assert (im_grad - g).abs().max() < 1e-12
    assert (im_neg_kl - im_neg[:32]).abs().max() < 1e-12
    without = gen_image(labels, flags(anneal=True), net, x0, 3, noise=z)[0]
    assert (without - im_neg).abs().max() < 1e-12


def test_settings_that_are_tensors_may_come_again(net: Net) -> None:
    s = torch.full((N,), 0.1)
    sample_q = fl.presets.short_run(net.float(), SHAPE, m=N)
    assert torch.equal(sample_q(2, s, seed=1), sample_q(2, s, seed=1))
    assert not torch.equal(sample_q(2, s, seed=1), sample_q(2, 2 * s, seed=1))
    a = torch.tensor([0.1, 0.2, 0.3, 0.4])
    ours = fl.presets.ebmkit(step_size=a, steps=2)
    got = ours.sample(well, VECTORS.float(), seed=1)
    ours.step_size = 0.1
    other = ours.sample(well, VECTORS.float(), seed=1)
    assert torch.allclose(got[0], other[0], atol=1e-6)
    assert (got[1:] - other[1:]).abs().max() > 0.1


def test_ncsns_images_are_their_own(net: Net) -> None:
    images = fl.presets.ncsn()(VECTORS, score_net, SIGMAS, 2, 1e-3, seed=1)
    assert all(i.untyped_storage().nbytes() == i.numel() * i.element_size() for i in images)
    sigmas = [sigma for sigma in SIGMAS for _ in range(2)]
    sampler = fl.LangevinSampler.from_score(
        score_net, steps=8, step_size=[1e-3 * (s / SIGMAS[-1]) ** 2 for s in sigmas],
        noise_std=[(2e-3) ** 0.5 * s / SIGMAS[-1] for s in sigmas],
    )  # fmt: skip
    labels = [torch.full((N,), k // 2) for k in range(8)]
    want = sampler(VECTORS, seed=1, step_kwargs={"labels": labels})
    assert (images[7] - want).abs().max() < 1e-12


RANKS: dict[str, Callable[[Net, int], Tensor]] = {
    "short_run": lambda f, c: fl.presets.short_run(f, SHAPE, m=3)(1, seed=1, first_chain=c),
    "anatomy": lambda f, c: fl.presets.anatomy(f, ANATOMY)(1, "uniform", seed=1, first_chain=c)[0],
    "jem": lambda f, c: fl.presets.jem(args(), shape=SHAPE)(f, [], None, 1, seed=1, first_chain=c),
    "jempp": lambda f, c: fl.presets.jempp(args(), shape=SHAPE)(
        f, [], None, 1, 0, seed=1, first_chain=c
    ),
    "igebm": lambda f, c: fl.presets.igebm(f, 10, 2)(UNIT, seed=1, first_chain=c),
    "openai_igebm": lambda f, c: fl.presets.openai_igebm(f, num_steps=2)(
        UNIT, seed=1, first_chain=c
    ),
    "improved_cd": lambda f, c: fl.presets.improved_cd()(
        None, flags(), f, UNIT, 2, seed=1, first_chain=c
    )[0],
    "uva": lambda f, c: fl.presets.uva(f, SHAPE, 3, seed=1, first_chain=c).sample_new_exmps(2),
    "nae": lambda f, c: fl.presets.nae()(VECTORS, well, 0.05, 2, seed=1, first_chain=c),
    "ncsn": lambda f, c: fl.presets.ncsn()(
        VECTORS, score_net, SIGMAS, 1, 1e-3, seed=1, first_chain=c
    )[-1],
    "torchebm": lambda f, c: fl.presets.torchebm(well).sample(
        dim=5, n_steps=2, seed=1, first_chain=c
    ),
    "ebmkit": lambda f, c: fl.presets.ebmkit(steps=2).sample(well, VECTORS, seed=1, first_chain=c),
}  # fmt: skip


@pytest.mark.parametrize("preset", RANKS)
def test_ranks_draw_other_numbers(preset: str, net: Net) -> None:
    run = RANKS[preset]
    if preset in ("short_run", "anatomy", "jem", "jempp", "uva"):
        net.float()
    assert torch.equal(run(net, 0), run(net, 0))
    assert not torch.equal(run(net, 0), run(net, 7))


def test_jempps_clamped_steps_of_a_half_network_are_taken_in_full(net: Net) -> None:
    """The gradient alone is the network's, in bfloat16: also where the inner steps clamp."""
    net.bfloat16()
    x0, z = SAME.float(), numbers(1, N, *SHAPE).float()
    sample = fl.presets.jempp(args(pyld_lr=0.05))
    got = sample(net, x0.clone(), n_steps=1, in_steps=3, noise=z)
    g = grad(lambda v: net(v.bfloat16()).float(), x0).clamp(-0.3, 0.3)
    want = (x0 + 0.1 * g).clamp(-1, 1)
    want = (want + 0.15 * g).clamp(-1, 1) + 0.02 * z[0]
    assert (got - want).abs().max() < 1e-6
