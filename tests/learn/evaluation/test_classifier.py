"""ClassifierCheck: a classifier's opinion of samples."""

import dataclasses

import numpy as np
import pytest
import torch

import fastlangevin as fl
from fastlangevin.distributed import Group
from fastlangevin.learn import ImageData, load_images
from fastlangevin.learn.evaluation.classifier import MOST_IMAGES, ClassifierCheck
from tests.distributed.threads import run_ranks


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images("digits")


@pytest.fixture(scope="module")
def judge(digits: ImageData) -> ClassifierCheck:
    return ClassifierCheck(digits)


def noise(n: int) -> torch.Tensor:
    return 2 * fl.noise.uniform((n, 1, 8, 8), seed=3, step=0) - 1


def test_real_digits_are_the_upper_mark(judge: ClassifierCheck, digits: ImageData) -> None:
    """1,797 digits: sure of 88 % (+- 3), and as many of each class as the labels say (+- 10)."""
    found = judge.of_data()
    assert found.sure == pytest.approx(0.88, abs=0.03)
    assert sum(found.classes) == 1797
    assert digits.labels is not None
    assert np.abs(np.array(found.classes) - np.bincount(digits.labels)).max() <= 10


def test_noise_is_the_lower_mark(judge: ClassifierCheck) -> None:
    """N = 1,000: fewer than a quarter, here and in another draw."""
    assert judge.of_noise(1000).sure < 0.25
    assert judge(noise(1000)).sure < 0.25
    assert judge.of_noise(1000, seed=1) != judge.of_noise(1000)


def test_each_class_is_found_where_it_is(judge: ClassifierCheck, digits: ImageData) -> None:
    assert digits.labels is not None
    for label in range(10):
        found = judge(digits.batch(np.flatnonzero(digits.labels == label)))
        assert found.classes[label] >= 0.95 * sum(found.classes)


@pytest.mark.parametrize("gain", [10.0, 1e6])
def test_contrast_beyond_the_datas_is_cut_off(judge: ClassifierCheck, gain: float) -> None:
    loud = gain * noise(500)
    assert judge(loud) == judge(loud.clamp(-1, 1))


def test_a_lower_threshold_is_passed_more_often(digits: ImageData, judge: ClassifierCheck) -> None:
    easy = ClassifierCheck(digits, threshold=0.5).of_data()
    assert easy.sure > judge.of_data().sure
    assert easy.classes == judge.of_data().classes


def test_samples_that_require_grad_are_judged(judge: ClassifierCheck) -> None:
    assert judge(noise(50).requires_grad_()) == judge(noise(50))


def test_processes_whose_fits_differ_use_that_of_rank_0(digits: ImageData) -> None:
    """As on CPUs that round differently, here by much more."""
    some = load_images("digits", limit=300)
    others = [some, dataclasses.replace(some, pixels=255 - some.pixels)]

    def work(group: Group) -> np.ndarray:
        return ClassifierCheck(others[group.rank], group=group).probabilities(noise(20))

    first, second = run_ranks(2, work)
    assert np.array_equal(first, second)
    assert np.array_equal(first, ClassifierCheck(some).probabilities(noise(20)))


def test_data_without_labels(digits: ImageData) -> None:
    with pytest.raises(ValueError, match="check: digits, 1797 x 1x8x8 has no labels"):
        ClassifierCheck(dataclasses.replace(digits, labels=None))


def test_of_many_images_some_of_every_class() -> None:
    """Also where the classes come in turn, and any fixed stride meets one or two of them."""
    n = 10 * MOST_IMAGES
    labels = np.arange(n) % 10
    pixels = (20 * labels).astype(np.uint8)[:, None, None, None]
    judge = ClassifierCheck(ImageData(pixels, labels, "in turn", 127.5, 1.0))
    assert len(judge.images) == MOST_IMAGES
    found = ((judge.images.flatten() + 1) * 127.5 / 20).round().long()
    assert found.bincount().min() > 400  # of 500 on average
    assert judge.classes == 10
