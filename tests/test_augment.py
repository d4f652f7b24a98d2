"""Row and column maps against the operations they stand for."""

import pytest
import torch
from torch.nn.functional import interpolate

from fastrecycle.augment import apply_maps, crop_maps, shrink_table

pytestmark = pytest.mark.usefixtures("one_thread")


def test_shrink_maps_are_interpolate_down_and_up():
    images = torch.rand(3, 2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    table = shrink_table(20, 1, 25)
    assert table.shape == (20, 20, 20)
    for small in (1, 7, 10, 19):
        flat = images.flatten(0, 1)
        down = interpolate(flat, (small, small), mode="bilinear", antialias=True)
        expected = interpolate(down, (20, 20), mode="bicubic").unflatten(0, (3, 2))
        got = apply_maps(images, table[small - 1].expand(3, -1, -1))
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)  # sums of some 20 products
    assert torch.equal(apply_maps(images, table[-1].expand(3, -1, -1)), images)
    assert torch.equal(shrink_table(20, 30, 40), torch.eye(20)[None])


def test_shrink_maps_keep_flat_images():
    torch.testing.assert_close(shrink_table(32, 3, 40).sum(-1), torch.ones(30, 32))


def test_crop_maps_enlarge_a_window():
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    whole = crop_maps(torch.ones(1), torch.zeros(1), 16)
    assert torch.equal(apply_maps(image, whole), image)
    half = crop_maps(torch.tensor([0.5]), torch.tensor([0.25]), 16)
    expected = interpolate(image[..., 4:12, 4:12], scale_factor=2, mode="bilinear")
    got = apply_maps(image, half)
    # at the window's rim our neighbours are the image's, interpolate's are copies of the rim
    torch.testing.assert_close(got[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=0, atol=1e-6)
    rows, columns = crop_maps(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.5]), 16)[:, None]
    corner = apply_maps(image, rows, columns)
    expected = interpolate(image[..., :8, 8:], scale_factor=2, mode="bilinear")
    torch.testing.assert_close(corner[..., :-1, 1:], expected[..., :-1, 1:], rtol=0, atol=1e-6)


def test_maps_are_differentiable_and_stay_in_full_precision():
    image = torch.rand(1, 1, 8, 8, requires_grad=True)
    maps = shrink_table(8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        seen = apply_maps(image, maps)
    assert seen.dtype == torch.float32
    (gradient,) = torch.autograd.grad(seen.sum(), image)
    torch.testing.assert_close(gradient[0, 0], maps[0].T @ torch.ones(8, 8) @ maps[0])
