"""PyTorch's side of `benchmark.py`: `pspnet_torch.py` and, with a checkout, the authors' own module.

* Compiled for inference the weights are frozen (constants, with norms folded into them); in
  training the loss is compiled, and SGD is PyTorch's fused one.
* On a GPU everything runs under autocast to bfloat16, with cuDNN's search for algorithms.
"""

import functools
import os
import sys
import time
from collections.abc import Callable

import cv2
import numpy as np
import pspnet_torch
import torch
import torch.nn.functional as F  # noqa: N812
from benchmark_worker import (
    SCALES,
    Prepared,
    Task,
    best_rate,
    its_turn,
    random_batch,
    random_image,
)
from torch import Tensor, nn


def prepare(task: Task) -> Prepared:
    """By what the task asks for."""
    torch.backends.cudnn.benchmark = True
    most = float(os.environ.get("BENCHMARK_DEVICE_GIB", "inf")) * 2**30
    if torch.cuda.is_available():
        has = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / has))
    prepared = {
        "forward": forward,
        "training step": training_step,
        "evaluation": evaluation,
        "matrix product": matrix_product,
    }[task.what](task)
    is_short = task.what in ("forward", "training step")
    return tuned(prepared) if torch.cuda.is_available() and is_short else prepared


def tuned(prepared: Prepared) -> Prepared:
    """After cuDNN has chosen its algorithms, which it does by timing them: while the device is this process's."""
    torch.backends.cudnn.benchmark = False
    start = time.perf_counter()
    prepared.wait(prepared.call())  # torch.compile compiles
    seconds = time.perf_counter() - start
    torch.backends.cudnn.benchmark = True
    with its_turn():
        prepared.wait(prepared.call())
    return prepared._replace(facts=lambda: prepared.facts() | {"first_call_seconds": seconds})


def make_model(task: Task) -> nn.Module:
    """Ours in PyTorch, or the authors' module, with random weights."""
    torch.manual_seed(0)
    if not task.semseg:
        model = pspnet_torch.PSPNet(task.backbone, task.num_classes, width=task.width)
    else:
        sys.path.insert(0, task.semseg)
        from model.pspnet import PSPNet  # pyrefly: ignore

        depth = int(task.backbone.removeprefix("resnet"))
        if task.width != 64 or depth not in (50, 101, 152):
            raise ValueError(
                f"{task.backbone} of width {task.width}: the authors' module has depths 50, 101 "
                "and 152 of width 64"
            )
        model = PSPNet(layers=depth, classes=task.num_classes, pretrained=False)
    return model.to(_device(task), memory_format=_memory_format(task))


def forward(task: Task) -> Prepared:
    """Normalized float32 images -> logits at image size."""
    run = _inference(task)
    values = np.random.default_rng(0).standard_normal(
        (task.batch, 3, task.crop, task.crop), dtype=np.float32
    )
    images = torch.from_numpy(values).to(_device(task), memory_format=_memory_format(task))
    return Prepared(lambda: run(images), _wait, lambda: _facts(task))


def training_step(task: Task) -> Prepared:
    """8-bit images and labels -> changed weights: both losses, all gradients, SGD."""
    device, model = _device(task), make_model(task).train()
    optimizer = pspnet_torch.make_sgd(model)
    if _is_compiled(task):
        optimizer = _fused(optimizer)
    images, labels = (torch.from_numpy(array).to(device) for array in random_batch(task))
    labels = labels.long()
    num_steps = 0

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            normalized = pspnet_torch.normalize(images)
            normalized = normalized.contiguous(memory_format=_memory_format(task))
            if task.semseg:
                _, main, aux = model(normalized, labels)
                return main + 0.4 * aux
            return pspnet_torch.segmentation_loss(*model(normalized), labels)[0]

    run = torch.compile(loss_of, dynamic=False) if _is_compiled(task) else loss_of

    def call() -> Tensor:
        nonlocal num_steps
        pspnet_torch.set_poly_learning_rate(optimizer, num_steps, num_steps=100_000)
        optimizer.zero_grad()  # before, so that no old gradient takes memory in the forward pass
        loss = run(images, labels)
        loss.backward()
        optimizer.step()
        num_steps += 1
        return loss.detach()

    return Prepared(call, _wait, lambda: _facts(task))


def evaluation(task: Task) -> Prepared:
    """The class map of one image, window by window, as the authors' script goes about it."""
    run, device = _inference(task), _device(task)
    image = random_image(task)
    mean, std = (np.array(x, np.float32) for x in (pspnet_torch.MEAN, pspnet_torch.STD))

    def probabilities_of(window: np.ndarray) -> np.ndarray:
        """[crop, crop, 3] within 0..255 -> [crop, crop, classes], averaged with the mirror image."""
        normalized = torch.from_numpy(((window - mean) / std).transpose(2, 0, 1)[None])
        pair = torch.cat([normalized, normalized.flip(3)])
        pair = pair.to(device, memory_format=_memory_format(task))
        with torch.inference_mode():
            scores = F.softmax(run(pair), dim=1)
            found = (scores[0] + scores[1].flip(2)) / 2
        return found.float().cpu().numpy().transpose(1, 2, 0)

    def call() -> np.ndarray:
        height, width = image.shape[:2]
        total = np.zeros((height, width, task.num_classes))
        for scale in SCALES:
            long_side = round(scale * task.base_size)
            size = [round(long_side / max(height, width) * side) for side in (width, height)]
            scaled = cv2.resize(np.float32(image), size, interpolation=cv2.INTER_LINEAR)
            found = slide(probabilities_of, scaled, task.crop, task.num_classes)
            total += _resize_channels(found, (width, height))
        return total.argmax(axis=2)

    return Prepared(call, _wait, lambda: _facts(task))


def slide(
    probabilities_of: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    crop: int,
    num_classes: int,
) -> np.ndarray:
    """Means over windows that lie two thirds of their side apart, the last ones moved back inside.

    Args:
        probabilities_of: [crop, crop, 3] -> [crop, crop, classes].
        image: f32[height, width, 3], padded with the mean where it is smaller than a window.

    Returns:
        [height, width, classes].
    """
    height, width = image.shape[:2]
    missing = [max(crop - side, 0) for side in (height, width)]
    above, left = (pixels // 2 for pixels in missing)
    borders = (above, missing[0] - above, left, missing[1] - left)
    image = cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=pspnet_torch.MEAN)
    total = np.zeros((*image.shape[:2], num_classes))
    count = np.zeros((*image.shape[:2], 1))
    rows, columns = (_starts(side, crop) for side in image.shape[:2])
    for row in rows:
        for column in columns:
            window = (slice(row, row + crop), slice(column, column + crop))
            total[window] += probabilities_of(image[window])
            count[window] += 1
    return (total / count)[above : above + height, left : left + width]


def _starts(side: int, crop: int) -> list[int]:
    stride = -(-crop * 2 // 3)
    number = -(-(side - crop) // stride) + 1
    return [min(i * stride, side - crop) for i in range(number)]


def _resize_channels(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # Four at a time: OpenCV 5 takes no more.
    parts = (array[..., i : i + 4] for i in range(0, array.shape[-1], 4))
    resized = (cv2.resize(np.ascontiguousarray(part), size) for part in parts)
    return np.concatenate([x.reshape(*size[::-1], -1) for x in resized], axis=2)


def matrix_product(task: Task) -> Prepared:
    """Floating-point operations a second of square products in the precision of the networks."""
    rates = {}
    for side in task.product_sides:
        a, b = torch.randn((2, side, side), device=_device(task)).to(getattr(torch, task.dtype))
        rates[side] = best_rate(functools.partial(torch.matmul, a, b), _wait, 2 * side**3)
    return Prepared(lambda: None, _wait, lambda: {"flops_per_second": rates} | _facts(task))


def _inference(task: Task) -> Callable[[Tensor], Tensor]:
    """Normalized images -> logits, without gradients."""
    device, model = _device(task), make_model(task).eval()
    if _is_compiled(task):
        from torch._inductor import config  # slow to import, and needed only here

        config.freezing = True
        mode = "reduce-overhead" if "graphs" in task.column else "default"
        model = torch.compile(model, dynamic=False, mode=mode)

    def run(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = model(images)
            return outputs if task.semseg else outputs[0]

    return run


def _fused(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The same, with one kernel for all of an update."""
    kept = ("params", "lr", "base_lr")
    groups = [{name: group[name] for name in kept} for group in optimizer.param_groups]
    common = {name: optimizer.defaults[name] for name in ("momentum", "weight_decay")}
    return torch.optim.SGD(groups, fused=True, **common)


def _is_compiled(task: Task) -> bool:
    return "compiled" in task.column


def _memory_format(task: Task) -> torch.memory_format:
    return torch.contiguous_format if "NCHW" in task.column else torch.channels_last


def _device(task: Task) -> str:
    return "cuda" if task.platform == "gpu" else "cpu"


def _wait(result: object) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _facts(task: Task) -> dict:
    """The highest memory is that since it was asked for before: cuDNN's search for algorithms comes first."""
    peak = None
    if task.platform == "gpu":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()  # other columns wait on the same device
    return {
        "versions": {"torch": torch.__version__, "CUDA": torch.version.cuda},
        "threads": torch.get_num_threads(),
        "device_bytes": peak,
    }
