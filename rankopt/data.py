"""Training data that lies on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankopt.core.errors import TaskError


class DeviceImages:
    """Batches (images, labels) of images that lie on a device, which crops, flips and normalises them there.

    For a task's `train`. Each epoch has another order and other crops. They are drawn from a seed that is drawn from
    torch's global generator, and are the same on every device. Images are float32 (b, c, height, width), in the
    channels-last memory format.

    Args:
        images: Images, uint8 (n, c, height, width).
        labels: Their labels, (n, ...).
        batch: Examples of a batch; the last one of an epoch may be smaller.
        mean: Mean of each channel, on the scale from 0 to 1.
        std: Standard deviation of each channel.
        padding: Pad with black by this many pixels on each side, and crop the old size at random; 0: no crops.
        flip: Whether to mirror half of the images.
        device: Where they lie.

    Raises:
        TaskError: The images are of another type or shape, or the labels are not as many.
    """

    def __init__(  # public: one keyword per option
        self,
        images: Tensor,
        labels: Tensor,
        batch: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int = 0,
        flip: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TaskError(f"images are {images.dtype} {tuple(images.shape)}: give uint8 (n, c, height, width)")
        if len(labels) != len(images) or batch < 1:
            raise TaskError(f"{len(images)} images, {len(labels)} labels, batches of {batch}: give as many labels")
        if not len(mean) == len(std) == images.shape[1]:
            raise TaskError(f"images have {images.shape[1]} channels: give as many means and standard deviations")
        self.batch, self.padding, self.flip = batch, padding, flip
        self.size = images.shape[2:]
        padded = F.pad(images.to(device), (padding,) * 4)
        self.images = padded.permute(0, 2, 3, 1).contiguous()  # an image's pixels side by side
        self.labels = labels.to(device)
        self.mean, self.std = (255 * torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.labels), self.labels.device
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        shifts = torch.randint(2 * self.padding + 1, (2, n, 1), generator=generator)
        mirrored = (torch.rand(n, 1, generator=generator) < 0.5) & self.flip
        order, shifts, mirrored = (
            drawn.to(device) for drawn in (torch.randperm(n, generator=generator), shifts, mirrored)
        )
        height, width = (torch.arange(size, device=device) for size in self.size)
        for start in range(0, n, self.batch):
            part = slice(start, start + self.batch)
            rows = shifts[0, part] + height
            columns = shifts[1, part] + torch.where(mirrored[part], width.flip(0), width)
            which = order[part]
            pixels = self.images[which[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield pixels.permute(0, 3, 1, 2).float().sub_(self.mean).div_(self.std), self.labels[which]
