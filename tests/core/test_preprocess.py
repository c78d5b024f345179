"""The one resize, against torch's antialiased interpolation and against itself on windows and mirrors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from refinedet_cli.core.config import PreprocessConfig
from refinedet_cli.core.preprocess import Window, preprocess, resize_weights

PLAIN = PreprocessConfig(height=64, width=64, mean=(0.0, 0.0, 0.0))
MEAN = PreprocessConfig(height=64, width=128, mean=(123.0, 117.0, 104.0), std=(58.0, 57.0, 56.0))


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def interpolated(image: Tensor, height: int, width: int) -> Tensor:
    planes = image.permute(2, 0, 1)[None].float()
    return functional.interpolate(planes, (height, width), mode="bilinear", align_corners=False, antialias=True)[0]


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (200, 300), (333, 77), (65, 63), (20, 30), (1, 1), (1, 500), (31, 640), (63, 1)]
)
@pytest.mark.parametrize("config", [PLAIN, replace(PLAIN, width=192)], ids=["square", "wide"])
def test_equals_antialiased_interpolation(height, width, config):
    image = picture(height, width)
    assert_close(preprocess(image, config), interpolated(image, config.height, config.width), rtol=0, atol=6e-3)


def test_a_picture_of_the_input_s_size_is_left_as_it_is():
    image = picture(64, 64)
    assert_close(preprocess(image, PLAIN), image.permute(2, 0, 1).float(), rtol=0, atol=0)


def test_an_even_picture_stays_even():
    image = torch.full((37, 91, 3), 200, dtype=torch.uint8)
    assert_close(preprocess(image, PLAIN), torch.full((3, 64, 64), 200.0), rtol=1e-5, atol=0)


def test_normalisation_by_hand():
    image = torch.tensor([[[123, 174, 0]]], dtype=torch.uint8)
    expected = torch.tensor([0.0, 1.0, -104 / 56])[:, None, None].expand(3, 64, 128)
    assert_close(preprocess(image, MEAN), expected)


def test_bgr_is_rgb_with_its_planes_reversed():
    image = picture(50, 70)
    rgb, bgr = preprocess(image, MEAN), preprocess(image, replace(MEAN, channel_order="bgr"))
    assert_close(bgr, rgb.flip(0), rtol=0, atol=0)


def test_mirror_is_a_flip():
    image = picture(90, 51)
    flipped = preprocess(image, MEAN, mirror=True)
    assert_close(flipped, preprocess(image, MEAN).flip(2), rtol=0, atol=0)
    assert_close(flipped, preprocess(image.flip(1), MEAN), rtol=0, atol=1e-5)


def test_a_window_inside_is_a_crop():
    image = picture(120, 100)
    window = Window(left=10, top=35, right=93, bottom=110)
    assert_close(preprocess(image, MEAN, window), preprocess(image[35:110, 10:93], MEAN), rtol=0, atol=1e-6)


def test_the_whole_picture_is_a_window():
    image = picture(120, 100)
    assert_close(preprocess(image, MEAN, Window(0, 0, 100, 120)), preprocess(image, MEAN), rtol=0, atol=0)


@pytest.mark.parametrize("mirror", [False, True], ids=["", "mirrored"])
@pytest.mark.parametrize(
    "window",
    [Window(-20, -35, 130, 200), Window(-20, 10, 60, 90), Window(40, 50, 170, 140), Window(-400, -3, 500, 4)],
    ids=["around", "left", "corner", "thin"],
)
def test_a_window_that_reaches_beyond_shows_the_mean_there(window, mirror):
    image = picture(120, 100)
    # The same on a canvas of the mean colour, whose parts are whole numbers.
    width, height = window.right - window.left, window.bottom - window.top
    canvas = torch.tensor(MEAN.mean).to(torch.uint8).expand(height, width, 3).clone()
    for y in range(max(window.top, 0), min(window.bottom, 120)):
        columns = slice(max(window.left, 0), min(window.right, 100))
        canvas[y - window.top, columns.start - window.left : columns.stop - window.left] = image[y, columns]
    assert_close(preprocess(image, MEAN, window, mirror), preprocess(canvas, MEAN, mirror=mirror), rtol=0, atol=1e-5)


def test_what_lies_beyond_is_exactly_the_mean():
    resized = preprocess(picture(64, 64), replace(PLAIN, mean=MEAN.mean), Window(0, 0, 256, 64))
    assert not resized[:, :, 17:].any()
    assert bool(resized[:, :, :16].all(dim=0).any())


@pytest.mark.parametrize(
    "window",
    [
        Window(-50, 0, -20, 30), Window(-30, 0, 0, 30), Window(100, 0, 130, 30), Window(150, 0, 260, 30),
        Window(0, -50, 30, -20), Window(0, -30, 30, 0), Window(0, 120, 30, 150), Window(0, 170, 30, 299),
        Window(-9, -9, -1, -1), Window(500, 500, 700, 700),
    ],
)  # fmt: skip
def test_a_window_wholly_beyond_is_nothing_but_the_mean(window):
    assert_close(preprocess(picture(120, 100), MEAN, window), torch.zeros(3, 64, 128), rtol=0, atol=0)


def test_input_is_left_as_it_was():
    image = picture(30, 40)
    before = image.clone()
    preprocess(image, MEAN, Window(-5, 3, 20, 25), mirror=True)
    assert torch.equal(image, before)


@pytest.mark.parametrize(("length", "outputs"), [(100, 64), (10, 64), (64, 64), (1, 7), (999, 3)])
def test_weights_are_means(length, outputs):
    weights = resize_weights(0, length, length, outputs)
    assert weights.shape == (outputs, length)
    assert bool((weights >= 0).all())
    assert_close(weights.sum(dim=1), torch.ones(outputs))
    assert_close(weights, weights.flip(0, 1), rtol=0, atol=1e-7)


def test_halving_by_hand():
    # Triangles of half-width 2 input pixels: 1 3 3 1 eighths, less what is cut off at the ends.
    expected = torch.tensor([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    assert_close(resize_weights(0, 4, 4, 2), expected)


def test_doubling_by_hand():
    expected = torch.tensor([[4, 0], [3, 1], [1, 3], [0, 4]]) / 4
    assert_close(resize_weights(0, 2, 2, 4), expected)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(5, 5, 3),
        torch.zeros(5, 5, dtype=torch.uint8),
        torch.zeros(3, 5, 5, dtype=torch.uint8),
        torch.zeros(5, 5, 4, dtype=torch.uint8),
        torch.zeros(0, 5, 3, dtype=torch.uint8),
        torch.zeros(1, 5, 5, 3, dtype=torch.uint8),
    ],
)
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match=r"expected a picture uint8\[H, W, 3\]"):
        preprocess(image, PLAIN)


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.out
        return func(*args, **(kwargs or {}))


def test_an_accelerator_is_given_few_products():
    config = PreprocessConfig(height=64, width=128)
    with Products() as products:
        made = preprocess(torch.empty(375, 500, 3, dtype=torch.uint8, device="meta"), config)
    assert made.shape == (3, 64, 128)
    assert products.count == 2
