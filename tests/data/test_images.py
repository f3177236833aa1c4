"""Images that lie on the device."""

from __future__ import annotations

import pytest
import torch

import rankopt
from rankopt.data import DeviceImages

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def images(n=10):
    return torch.randint(1, 256, (n, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(x):
    return (x.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_every_image_once_an_epoch_in_another_order():
    x, y = images(), torch.arange(10)
    data = DeviceImages(x, y, 4, mean=MEAN, std=STD)
    assert len(data) == 3
    orders = []
    for _ in range(2):
        parts = list(data)
        assert [len(a) for a, _ in parts] == [4, 4, 2]
        order = torch.cat([b for _, b in parts])
        torch.testing.assert_close(torch.cat([a for a, _ in parts]), normalised(x[order]))
        assert all(a.is_contiguous(memory_format=torch.channels_last) for a, _ in parts)
        orders.append(order)
    assert orders[0].sort()[0].equal(y) and not orders[0].equal(orders[1])


def test_the_same_seed_gives_the_same_epoch():
    data = DeviceImages(images(), torch.arange(10), 4, mean=MEAN, std=STD, padding=2, flip=True)
    torch.manual_seed(5)
    first = [a for a, _ in data]
    torch.manual_seed(5)
    second = []
    for a, _ in data:
        torch.rand(3)  # what a model draws between batches does not matter
        second.append(a)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_crops_and_flips_are_those_of_the_padded_image():
    """Each result is one of the 25 crops or their mirror images, and over some epochs all of them turn up."""
    x = images(1)
    data = DeviceImages(x, torch.zeros(1), 1, mean=MEAN, std=STD, padding=2, flip=True)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    crops = [padded[0, :, i : i + 6, j : j + 5] for i in range(5) for j in range(5)]
    known = [normalised(c) for crop in crops for c in (crop, crop.flip(2))]
    torch.manual_seed(0)
    seen = set()
    for _ in range(600):
        ((found, _),) = data
        (match,) = [i for i, k in enumerate(known) if torch.allclose(k, found[0], atol=1e-6)]
        seen.add(match)
    assert len(seen) == 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": images().float()}, "give uint8"),
        ({"images": images()[0]}, "give uint8"),
        ({"labels": torch.arange(9)}, "10 images, 9 labels"),
        ({"batch": 0}, "batches of 0"),
        ({"mean": (0.5,)}, "3 channels"),
    ],
)
def test_bad_images(change, said):
    given = {"images": images(), "labels": torch.arange(10), "batch": 4, "mean": MEAN, "std": STD} | change
    with pytest.raises(rankopt.TaskError, match=said):
        DeviceImages(**given)
