"""The noise contract, against an independent Philox in numpy and the formula in float64."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fastlangevin as fl
from fastlangevin.kernels import philox as generator
from tests.laws import normal_p, uniform_p

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        0xFFFFFFFF_FFFFFFFF,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SIZES = [0, 1, 3, 4, 5, 1023, 1024, 1025]
ADDRESS = {"seed": 0x0123456789ABCDEF, "step": 77, "stream": 3, "first_chain": 1000}
N = 2**20


def philox(counter: tuple, key: int) -> list[np.ndarray]:
    """Philox4x32-10 as published, in uint64, where the product of two words cannot overflow."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
        )
        c1, c3 = p1 & mask, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def expected_words(
    chains: int, elements: int, *, seed: int, step: int, stream: int, first_chain: int = 0
) -> np.ndarray:
    """Words [chains, elements] of the contract, whose counter is (e // 4, chain, step, stream)."""
    blocks = np.arange(-(-elements // 4))[None, :]
    rows = first_chain + np.arange(chains)[:, None]
    return np.stack(philox((blocks, rows, step, stream), seed), -1).reshape(chains, -1)[
        :, :elements
    ]


def expected_normals(words: np.ndarray) -> np.ndarray:
    """Box-Muller in float64 on words [..., 4 k]."""
    w = words.reshape(*words.shape[:-1], -1, 2) >> np.uint64(8)
    radius = np.sqrt(-2 * np.log((w[..., 0] + 1.0) * 2.0**-24))
    angle = 2 * np.pi * w[..., 1] * 2.0**-24
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).reshape(words.shape)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple, key: int, words: tuple) -> None:
    assert fl.noise.philox(counter, key) == words
    tensors = fl.noise.philox(tuple(torch.tensor([word] * 2) for word in counter), key)
    assert [word.tolist() for word in tensors] == [[word] * 2 for word in words]
    assert [int(word) for word in philox(counter, key)] == list(words)


def test_words_at_a_hand_computed_address() -> None:
    """All-zero address: the first known answer is elements 0..3 of chain 0."""
    words = fl.noise.words((1, 5), seed=0, step=0, stream=0)
    assert words[0, :4].tolist() == list(KNOWN_ANSWERS[0][2])
    assert words[0, 4] == int(philox((1, 0, 0, 0), 0)[0])


@pytest.mark.parametrize(
    "address",
    [
        ADDRESS,
        {"seed": 2**64 - 1, "step": 2**32 - 1, "stream": 2**32 - 1, "first_chain": 2**32 - 3},
        {"seed": 2**32, "step": 0, "stream": 0, "first_chain": 0},
        {"seed": 1, "step": 2**31, "stream": 255, "first_chain": 2**31 - 1},
    ],
)
def test_words_are_those_of_the_contract(address: dict) -> None:
    words = fl.noise.words((3, 1025), **address)
    assert np.array_equal(words.numpy().astype(np.uint64), expected_words(3, 1025, **address))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_exact(dtype: torch.dtype) -> None:
    uniform = fl.noise.uniform((3, 1025), **ADDRESS, dtype=dtype)
    exact = (expected_words(3, 1025, **ADDRESS) >> np.uint64(8)) * 2.0**-24
    assert np.array_equal(uniform.double().numpy(), exact)


def test_initial_states_are_uniforms_of_their_stream() -> None:
    """2 u - 1 of the words at step 0, exactly: 24 bits and a sign."""
    u = (expected_words(3, 10, seed=5, step=0, stream=1, first_chain=7) >> np.uint64(8)) * 2.0**-24
    x = fl.noise.initial((3, 2, 5), seed=5, first_chain=7)
    assert x.dtype == torch.float32
    assert np.array_equal(x.reshape(3, 10).double().numpy(), 2 * u - 1)


def test_default_streams() -> None:
    at = {"seed": 5, "step": 6}
    assert torch.equal(fl.noise.normal((2, 9), **at), fl.noise.normal((2, 9), **at, stream=0))
    assert torch.equal(fl.noise.uniform((2, 9), **at), fl.noise.uniform((2, 9), **at, stream=1))
    named = [getattr(fl.noise, s) for s in ("LANGEVIN", "INITIAL", "DATA", "ACCEPT", "ORDER")]
    assert [*named, fl.noise.USER, fl.noise.FOLD_IN] == [0, 1, 2, 3, 4, 5, 255]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_normals_against_float64(dtype: torch.dtype, error: float) -> None:
    """1 M numbers in float32."""
    shape = (8, 2**17) if dtype == torch.float32 else (8, 2**15)
    normal = fl.noise.normal(shape, **ADDRESS, dtype=dtype)
    exact = expected_normals(expected_words(*shape, **ADDRESS))
    assert normal.dtype == dtype
    assert np.abs(normal.numpy() - exact).max() <= error


def test_normals_of_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of words at the ends of their range and around the quarter turns."""
    turns = [k << 29 for k in range(8)]
    around = [
        turn + off for turn in turns for off in (-0x101, -0x100, -1, 0, 1, 0xFF, 0x100, 0x101)
    ]
    ends = [0, 1, 0xFF, 0x100, 0x1FF, 0xFFFFFFFF, 0xFFFFFF00, 0xFFFFFEFF]
    pairs = torch.tensor(list(itertools.product({w % 2**32 for w in around + ends}, repeat=2)))
    w0, w1 = pairs.T[:, None, :]
    monkeypatch.setattr(generator, "philox", lambda counter, seed: (w0, w1, w1, w0))
    normal = generator.normal((1, 4 * len(pairs)), seed=0, step=0)
    words = torch.stack((w0, w1, w1, w0), -1).reshape(1, -1).numpy().astype(np.uint64)
    assert np.abs(normal.numpy() - expected_normals(words)).max() <= 2e-6
    assert 5.76 < normal.abs().max() <= 5.77


def test_fold_in() -> None:
    for seed, number in [(0, 0), (2**64 - 1, 2**64 - 1), (0x0123456789ABCDEF, 0xFEDCBA9876543210)]:
        low, high, _, _ = philox((number % 2**32, number >> 32, 0, 255), seed)
        assert fl.noise.fold_in(seed, number) == int(low) + int(high) * 2**32
    assert fl.noise.fold_in(np.int64(7), np.int64(8)) == fl.noise.fold_in(7, 8)


# Invariances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [fl.noise.normal, fl.noise.uniform])
@pytest.mark.parametrize("elements", SIZES)
def test_batch_split(draw: Callable[..., Tensor], elements: int) -> None:
    whole = draw((5, elements), seed=3, step=9, first_chain=11)
    parts = [draw((n, elements), seed=3, step=9, first_chain=11 + i) for i, n in ((0, 2), (2, 3))]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.shape == (5, elements)


@pytest.mark.parametrize("draw", [fl.noise.normal, fl.noise.uniform])
@pytest.mark.parametrize("elements", SIZES)
def test_shorter_chains_share_the_numbers_of_longer_ones(
    draw: Callable[..., Tensor], elements: int
) -> None:
    longer = draw((3, elements + 9), seed=3, step=9)
    assert torch.equal(draw((3, elements), seed=3, step=9), longer[:, :elements])


@pytest.mark.parametrize("shape", [(3, 5, 7, 11), (3, 385), (3, 55, 7)])
def test_elements_are_counted_in_logical_order(shape: tuple) -> None:
    flat = expected_normals(expected_words(3, 388, seed=1, step=2, stream=0))[:, :385]
    normal = fl.noise.normal(shape, seed=1, step=2)
    assert normal.shape == shape
    assert np.abs(normal.flatten(1).numpy() - flat).max() <= 2e-6


def test_chains_of_one_element() -> None:
    normal = fl.noise.normal((6,), seed=1, step=2)
    assert torch.equal(normal, fl.noise.normal((6, 4), seed=1, step=2)[:, 0])


def test_empty_batches() -> None:
    assert fl.noise.normal((0, 3, 4), seed=0, step=0, first_chain=2**32 - 1).shape == (0, 3, 4)
    assert fl.noise.uniform((0,), seed=0, step=0).shape == (0,)


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int32, np.uint32, np.uint8])
def test_numpy_integers_are_integers(kind: type) -> None:
    address = {"seed": 201, "step": 202, "stream": 203, "first_chain": 204}
    as_numpy = {name: kind(value) for name, value in address.items()}
    words = fl.noise.words((60, 5), **as_numpy)
    assert np.array_equal(words.numpy().astype(np.uint64), expected_words(60, 5, **address))


@pytest.mark.parametrize("draw", [fl.noise.normal, fl.noise.uniform])
def test_torchs_generator_is_left_alone(draw: Callable[..., Tensor]) -> None:
    before = torch.get_rng_state()
    draw((3, 5), seed=1, step=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_draw_seed_is_one_draw_of_the_generator() -> None:
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    assert fl.noise.draw_seed(ours) == int(torch.randint(2**63 - 1, (), generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())
    torch.manual_seed(7)
    assert fl.noise.draw_seed() == fl.noise.draw_seed(torch.Generator().manual_seed(7))


# Statistics: z scores are those of N = 2^20 numbers ---------------------------------------------


def moment_scores(z: Tensor) -> dict[str, float]:
    """How many standard errors mean, variance and kurtosis are from a standard normal's."""
    z, n = z.double().flatten(), z.numel()
    return {
        "mean": float(z.mean()) * math.sqrt(n),
        "variance": float(z.square().mean() - 1) / math.sqrt(2 / n),
        "kurtosis": float(z.pow(4).mean() - 3) / math.sqrt(96 / n),
    }


def test_moments_and_law_of_normals() -> None:
    z = fl.noise.normal((16, N // 16), seed=20, step=4)
    assert max(abs(score) for score in moment_scores(z).values()) <= 5
    assert normal_p(z) >= 1e-5


def test_one_percent_too_much_noise_fails() -> None:
    z = 1.01 * fl.noise.normal((16, N // 16), seed=20, step=4)
    assert abs(moment_scores(z)["variance"]) > 5


def test_moments_and_law_of_uniforms() -> None:
    u = fl.noise.uniform((16, N // 16), seed=20, step=4).double().flatten()
    assert abs(float(u.mean() - 0.5)) * math.sqrt(12 * N) <= 5
    assert abs(float(u.square().mean() - 1 / 3)) * math.sqrt(45 / 4 * N) <= 5
    assert uniform_p(u) >= 1e-5


@pytest.mark.parametrize(
    "neighbour",
    [
        {"seed": 21},
        {"seed": 20 + 2**32},
        {"step": 5},
        {"stream": 1},
        {"first_chain": 1},
        {"first_chain": 16},
    ],
    ids=str,
)
def test_neighbouring_addresses_are_unrelated(neighbour: dict) -> None:
    """Neither the numbers nor their squares correlate (those would if a radius were shared)."""
    address = {"seed": 20, "step": 4, "stream": 0, "first_chain": 0}
    z = fl.noise.normal((16, N // 16), **address).double()
    other = fl.noise.normal((16, N // 16), **address | neighbour).double()
    assert abs(float((z * other).sum())) / math.sqrt(N) <= 5
    assert abs(float(((z**2 - 1) * (other**2 - 1)).sum())) / (2 * math.sqrt(N)) <= 5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8])
def test_neighbouring_elements_are_unrelated(lag: int) -> None:
    z = fl.noise.normal((1, N), seed=20, step=4)[0].double()
    a, b = z[:-lag], z[lag:]
    assert abs(float((a * b).sum())) / math.sqrt(N - lag) <= 5
    assert abs(float(((a**2 - 1) * (b**2 - 1)).sum())) / (2 * math.sqrt(N - lag)) <= 5


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [fl.noise.normal, fl.noise.uniform, fl.noise.words])
@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"seed": -1}, ValueError, r"noise: seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"seed": 1.5}, TypeError, "noise: seed must be an integer, got 1.5"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"step": -1}, ValueError, r"step must be in \[0, 2\*\*32\)"),
        ({"step": 2**32}, ValueError, "step must be in"),
        ({"step": 1.0}, TypeError, "step must be an integer"),
        ({"stream": 2**32}, ValueError, "stream must be in"),
        ({"stream": -1}, ValueError, "stream must be in"),
        ({"first_chain": -1}, ValueError, "first_chain must be in"),
        ({"first_chain": 2**32 - 1}, ValueError, f"chain must be in .* got {2**32}"),
        ({"first_chain": 0.5}, TypeError, "first_chain must be an integer"),
        ({"shape": ()}, ValueError, "shape must have a leading chain dimension"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_addresses_out_of_range(
    draw: Callable[..., Tensor], wrong: dict, error: type[Exception], match: str
) -> None:
    arguments = {"shape": (2, 3), "seed": 0, "step": 0, "stream": 0, "first_chain": 0} | wrong
    with pytest.raises(error, match=match):
        draw(**arguments)


@pytest.mark.parametrize(("seed", "number"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_fold_in_out_of_range(seed: int, number: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        fl.noise.fold_in(seed, number)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("draw", [fl.noise.normal, fl.noise.uniform])
def test_torchs_default_dtype_changes_nothing(
    draw: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """A kernel that writes float32 into the memory of halves would write beyond its end."""
    want = draw((4, 1000), seed=1, step=2)
    torch.set_default_dtype(dtype)
    try:
        got = draw((4, 1000), seed=1, step=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
