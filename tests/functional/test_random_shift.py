import pytest
import torch
import torch.nn.functional as F

from rlinf.functional.random_shift import draw_offsets, random_shift

CHI_SQUARE_24_AT_0_999 = 51.2


def padded_and_cropped(images, offsets, pad):
    """The definition, image by image, with torch's own padding."""
    _, height, width, _ = images.shape
    crops = []
    for image, (dy, dx) in zip(images, offsets.tolist(), strict=True):
        padded = F.pad(image.permute(2, 0, 1)[None].double(), (pad,) * 4, mode="replicate")[0].permute(1, 2, 0)
        crops.append(padded[dy : dy + height, dx : dx + width])
    return torch.stack(crops).to(images.dtype)


def test_by_hand():
    image = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)[None, ..., None]
    shifted = {
        offset: random_shift(image, torch.tensor([offset]), 1)[0, ..., 0].tolist() for offset in [(0, 0), (1, 2)]
    }
    assert shifted == {(0, 0): [[1, 1, 2], [1, 1, 2]], (1, 2): [[2, 3, 3], [5, 6, 6]]}


def test_offset_of_pad_changes_nothing():
    images = torch.randint(256, (3, 8, 10, 3), dtype=torch.uint8)
    assert torch.equal(random_shift(images, torch.full((3, 2), 4), 4), images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("height", "width", "channels", "pad"), [(16, 16, 3, 4), (5, 9, 1, 2), (3, 2, 4, 4)])
def test_is_replicated_padding_and_a_crop(height, width, channels, pad, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, height, width, channels), generator=generator).to(dtype)
    offsets = draw_offsets(40, pad, generator)
    offsets[:4] = torch.tensor([[0, 0], [0, 2 * pad], [2 * pad, 0], [2 * pad, 2 * pad]])
    before = images.clone()
    shifted = random_shift(images, offsets, pad)
    assert torch.equal(shifted, padded_and_cropped(images, offsets, pad))
    assert shifted.dtype == dtype and shifted.is_contiguous()
    assert torch.equal(images, before)


def test_all_shifts_are_equally_likely():
    offsets = draw_offsets(10_000, 2, torch.Generator().manual_seed(0))
    counts = torch.bincount(offsets[:, 0] * 5 + offsets[:, 1], minlength=25)
    assert len(counts) == 25
    expected = 10_000 / 25
    assert ((counts - expected).square() / expected).sum() < CHI_SQUARE_24_AT_0_999


def test_offsets_are_a_function_of_the_generator():
    first, second = (draw_offsets(8, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (8, 2)
