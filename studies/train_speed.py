"""How fast is a step of training? `rankopt train`, and the shortest script that does the same, in turn.

    python studies/train_speed.py RUN                      # a run folder of a search on ResNet-20
    python studies/train_speed.py RUN --device cuda        # 90 seconds on a GPU
    python studies/train_speed.py dense --steps 2 --rounds 1 --images 256 --batch 64

Both train the same model with the same batches, teacher (ResNet-56), loss, clipping and SGD. The script is written for
this model alone: augmentation on the device, and the step in one CUDA graph. rankopt's way is that of
`rankopt.finetune`: its loss, its recorded step, its choice of precision, `rankopt.data.DeviceImages`, losses read
every hundred steps. Figures are medians over rounds, in which the two take turns. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import runpy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankopt
from rankopt.training.loop import new_capture, train
from rankopt.training.losses import TrainingLoss
from rankopt.training.precision import fastest, lay_out
from rankopt.training.recipe import make_optimizer, make_schedule
from rankopt.training.step import WARM_UP

HERE = Path(__file__).resolve().parent
CIFAR = runpy.run_path(str(HERE / "tasks" / "cifar10.py"))
RECIPE = rankopt.Recipe(rate=0.1, distill=0.9, temperature=4.0, clip=5.0, weight_decay=1e-4, precision="auto")
KD, T, CLIP = RECIPE.distill, RECIPE.temperature, RECIPE.clip


# --- the script --------------------------------------------------------------------------------------


def script(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, batch: int, precision: str
) -> Callable[[int], None]:
    """The script of ../shared/gpu/fast_train.py without its options. Returns what does a number of steps."""
    device, layout = x.device.type, torch.channels_last
    cuda = device == "cuda"
    student, teacher = student.to(memory_format=layout).train(), teacher.to(memory_format=layout).eval()
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CIFAR["MEAN"], CIFAR["STD"]))
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    own = [p.requires_grad_(True) for p in student.parameters()]
    groups = [
        {"params": [p for p in own if p.ndim >= 2], "weight_decay": RECIPE.weight_decay},
        {"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0},
    ]
    rate = torch.tensor(RECIPE.rate, device=device)
    optimizer = torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True, fused=True)
    inputs = torch.zeros(batch, 3, 32, 32, device=device).contiguous(memory_format=layout)
    targets, total = torch.zeros(batch, dtype=torch.long, device=device), torch.zeros((), device=device)

    def step() -> None:
        with autocast:
            z = student(inputs).float()
            with torch.no_grad():
                wanted = teacher(inputs).float()
        soft = F.kl_div(F.log_softmax(z / T, 1), F.log_softmax(wanted / T, 1), reduction="batchmean", log_target=True)
        loss = (1 - KD) * F.cross_entropy(z, targets) + KD * T**2 * soft
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in own]))
        torch._foreach_mul_([p.grad for p in own], (CLIP / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        total.add_(loss.detach())

    def eager() -> None:
        optimizer.zero_grad(set_to_none=True)
        step()

    go = eager
    if cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                eager()
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        go = graph.replay
    augmented = _augmented(x, y)

    # A graph does not own the memory that it replays into: these have to stay alive as long as `run`.
    def run(steps: int, _alive: Any = (student, teacher, optimizer, total)) -> None:
        images, labels, i = *next(augmented), 0
        for _ in range(steps):
            if i + batch > len(x):
                images, labels, i = *next(augmented), 0
            rate.fill_(RECIPE.rate)
            part = (images[i : i + batch].float() / 255 - mean) / std
            inputs.copy_(part.contiguous(memory_format=layout))
            targets.copy_(labels[i : i + batch])
            go()
            i += batch

    return run


def _augmented(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Epochs of shuffled, cropped and flipped images, as many times as asked for."""
    n, device = len(x), x.device
    while True:
        order = torch.randperm(n, device=device)
        windows = F.pad(x, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)
        top, left = torch.randint(0, 9, (2, n), device=device)
        out = torch.empty_like(x)
        for i in range(0, n, 5000):
            j = order[i : i + 5000]
            crops = windows[j, :, top[i : i + len(j)], left[i : i + len(j)]]
            flip = torch.rand(len(j), device=device) < 0.5
            out[i : i + len(j)] = torch.where(flip.view(-1, 1, 1, 1), crops.flip(3), crops)
        yield out, y[order]


# --- rankopt -----------------------------------------------------------------------------------------


class Clock:
    """The time at which steps end, on the device."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.times = first, last, list[float]()

    def after_step(self, step: int, losses: Any) -> None:
        if step + 1 in (self.first, self.last):
            losses.read()
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.times[1] - self.times[0]


def ours(
    model: nn.Module, task: rankopt.Task, teacher: nn.Module, recipe: rankopt.Recipe, steps: int
) -> dict[str, Any]:
    """Train as `rankopt.finetune` does, and measure `steps` steps after those that warm up and record."""
    lay_out(model, recipe, in_place=True)
    before = WARM_UP + 2
    moving = list(model.parameters())
    capture = new_capture(model, moving, 10_000)
    optimizer = make_optimizer(recipe, moving, capture is not None or None)
    loss = TrainingLoss(recipe, task, lay_out(teacher, recipe), model)
    clock = Clock(before, before + steps)
    train(
        model,
        task.train,
        loss,
        optimizer,
        steps=before + steps,
        clip=recipe.clip,
        schedule=make_schedule(recipe, optimizer, 10_000),
        after_step=clock.after_step,
        capture=capture,
        tf32=recipe.precision != "float32",
    )
    graphs, reason = (capture.shapes, capture.reason) if capture else (0, "")
    return {"seconds": clock.seconds, "graphs": graphs, "reason": reason}


# --- both --------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help='a run folder of a search on ResNet-20, or "dense"')
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=0, help="steps of a round; default 300 on a GPU, 5 elsewhere")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=0, help="default 40,000 on a GPU, 2,000 elsewhere")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    given = parser.parse_args()
    cuda = given.device.startswith("cuda")
    steps, images = given.steps or (300 if cuda else 5), given.images or (40_000 if cuda else 2_000)
    images -= images % given.batch  # whole batches only, as the script wants them
    torch.manual_seed(0)
    if cuda:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    dense = _resnet(3)
    model = copy.deepcopy(dense) if given.run == "dense" else rankopt.load(dense, given.run)
    model, dense, teacher = (m.to(given.device) for m in (model, dense, _resnet(9)))
    x = torch.from_numpy(CIFAR["pixels"]("train", 0, images).copy()).permute(0, 3, 1, 2).contiguous().to(given.device)
    y = CIFAR["labels"]("train", 0, images).to(given.device)
    data = rankopt.data.DeviceImages(
        x, y, given.batch, mean=CIFAR["MEAN"], std=CIFAR["STD"], padding=4, flip=True, device=given.device
    )
    sample = torch.zeros(1, 3, 32, 32)
    task = rankopt.Task(model=dense, example_input=sample, calibration=[sample], train=data, loss=F.cross_entropy)

    def loss(recipe: rankopt.Recipe, small: nn.Module) -> TrainingLoss:
        return TrainingLoss(recipe, task, lay_out(teacher, recipe), small)

    start = time.perf_counter()
    chosen = fastest(model, data, RECIPE, loss)
    recipe = dataclasses.replace(RECIPE, precision=chosen["precision"], channels_last=chosen["channels_last"])
    print(f"chosen in {time.perf_counter() - start:.0f} s: {chosen}", flush=True)
    go = script(copy.deepcopy(model), copy.deepcopy(teacher), x, y, given.batch, recipe.precision)
    go(1 + WARM_UP)
    own, theirs, about = [], [], {}
    for _ in range(given.rounds):
        about = ours(copy.deepcopy(model), task, teacher, recipe, steps)
        own.append(about["seconds"] / steps)
        _wait(cuda)
        start = time.perf_counter()
        go(steps)
        _wait(cuda)
        theirs.append((time.perf_counter() - start) / steps)
        print(f"rankopt {1e3 * own[-1]:.2f} ms a step, the script {1e3 * theirs[-1]:.2f}", flush=True)
    a, b = statistics.median(own), statistics.median(theirs)
    result = {
        "run": Path(given.run).name,
        "params": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "batch": given.batch,
        "precision": recipe.precision,
        "channels_last": recipe.channels_last,
        "tried": chosen["milliseconds"],
        "graphs": about["graphs"],
        "not_recorded": about["reason"],
        "rankopt": {"ms": round(1e3 * a, 3), "images_per_second": round(given.batch / a)},
        "script": {"ms": round(1e3 * b, 3), "images_per_second": round(given.batch / b)},
        "ratio": round(b / a, 3),
        "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6) if cuda else None,
    }
    print(json.dumps(result))
    print(f"rankopt has {result['ratio']:.2f} of the script's images a second")
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


def _resnet(n: int) -> nn.Module:
    from safetensors.torch import load_file

    model = CIFAR["CifarResNet"](n)
    model.load_state_dict(load_file(CIFAR["data_folder"]() / "weights" / f"resnet{6 * n + 2}_cifar10.safetensors"))
    return model.eval()


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
