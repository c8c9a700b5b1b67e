"""Train the judge that measures generated garments, export it, and write its card (torch).

    pip install 'ddpm-engine[bench,export]'
    python -m ddpm_bench.judge_train --data DIR --out benchmarks/ddpm_bench/fashion_judge.onnx

The judge sees the 60,000 training images and labels only. The 10,000 held-out images are touched
once, at the end, through the exported file: no epoch, no weight and no setting is chosen on them.
There is no mirroring in the augmentation on purpose: every Fashion-MNIST shoe points left, and a
judge that had been taught not to care would not see a generator that turns them round.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional

from ddpm_runtime.atomic import atomic_file

from .data import RealImages, read_real_images
from .judge_network import JudgeNetwork

__all__ = ["main"]

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

SEED = 0
EPOCHS = 16
BATCH_SIZE = 256
PEAK_LEARNING_RATE = 0.15
WARMUP_SHARE = 0.2
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
MAX_SHIFT = 2  # pixels
ERASED = 8  # pixels

RECIPE: dict[str, Any] = {
    "epochs": EPOCHS,
    "batch_size": BATCH_SIZE,
    "optimizer": f"SGD, Nesterov momentum {MOMENTUM}, weight decay 5e-4",
    "learning_rate": f"one cycle of cosines, peak {PEAK_LEARNING_RATE} after "
    f"{WARMUP_SHARE:.0%} of the steps".replace("%", " %"),
    "augmentation": f"shift by -{MAX_SHIFT}..{MAX_SHIFT} pixels, each axis; "
    f"erase one {ERASED}x{ERASED} square in half the images",
    "loss": "cross entropy",
    "precision": "bfloat16 autocast, float32 weights",
    "trained_on": "Fashion-MNIST train split, 60,000 images; t10k is never seen in training",
    "selection": "none: the weights after the last step",
    "seed": SEED,
}


@click.command()
@click.option("--data", required=True, help="Folder of Fashion-MNIST's IDX files.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="ONNX file to write.")
def main(data: str, out: Path) -> None:
    """Train, export, measure on held-out images, write the ONNX file and its card."""
    train_images, held_out = (
        read_real_images(data, split=split, size=28, channels=1) for split in ("train", "t10k")
    )
    started = time.perf_counter()
    network = train(train_images)
    seconds = time.perf_counter() - started
    onnx_bytes = onnx_from_network(network)
    card = make_card(onnx_bytes, held_out) | {
        "recipe": RECIPE,
        "training_seconds": round(seconds),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    text = json.dumps(card, indent=2) + "\n"
    with atomic_file(out) as file:
        file.write(onnx_bytes)
    with atomic_file(out.with_suffix(".json")) as file:
        file.write(text.encode())
    click.echo(text)


def train(real: RealImages) -> JudgeNetwork:
    """The judge after ``EPOCHS`` passes over (N, 28, 28, 1) images and their labels."""
    torch.manual_seed(SEED)
    network = JudgeNetwork().to(memory_format=torch.channels_last).train()
    pixels = torch.from_numpy(real.images.copy())
    targets = torch.from_numpy(real.labels)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=PEAK_LEARNING_RATE,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, EPOCHS * (len(pixels) // BATCH_SIZE), pct_start=WARMUP_SHARE
    )
    for epoch in range(EPOCHS):
        right = total = 0
        for batch, wanted in epoch_batches(pixels, targets):
            with torch.autocast("cpu", torch.bfloat16):
                _, logits = network(augment(batch))
            loss = functional.cross_entropy(logits.float(), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == wanted).sum())
            total += len(wanted)
        click.echo(f"epoch {epoch + 1}/{EPOCHS}: train accuracy {right / total:.4f}", err=True)
    return network.eval()


def epoch_batches(pixels: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in a random order; the last incomplete batch is dropped."""
    order = torch.randperm(len(pixels))
    for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        yield pixels[chosen], targets[chosen]


def augment(batch: Tensor) -> Tensor:
    """Shift every image, erase a square in half of them; (N, H, W, 1) uint8 → the same.

    The background of Fashion-MNIST is 0, so both fill with 0.
    """
    count, height, width, _ = batch.shape
    padded = functional.pad(batch, (0, 0, MAX_SHIFT, MAX_SHIFT, MAX_SHIFT, MAX_SHIFT))
    down, right = torch.randint(0, 2 * MAX_SHIFT + 1, (2, count, 1))
    rows = (torch.arange(height) + down)[:, :, None]
    columns = (torch.arange(width) + right)[:, None, :]
    shifted = padded[torch.arange(count)[:, None, None], rows, columns]
    top = torch.randint(0, height - ERASED + 1, (count, 1))
    left = torch.randint(0, width - ERASED + 1, (count, 1))
    in_rows = (torch.arange(height) >= top) & (torch.arange(height) < top + ERASED)
    in_columns = (torch.arange(width) >= left) & (torch.arange(width) < left + ERASED)
    erased = in_rows[:, :, None] & in_columns[:, None, :] & (torch.rand(count, 1, 1) < 0.5)
    return shifted.masked_fill(erased[..., None], 0)


def onnx_from_network(network: JudgeNetwork) -> bytes:
    """The network as one self-contained ONNX file with a dynamic batch."""
    program = torch.onnx.export(
        network.to(memory_format=torch.contiguous_format).eval(),
        (torch.zeros(2, 28, 28, 1, dtype=torch.uint8),),
        dynamo=True,
        input_names=["images"],
        output_names=["features", "logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    proto = program.model_proto
    for node in proto.graph.node:  # the exporter notes source lines, with this machine's paths
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def make_card(onnx_bytes: bytes, held_out: RealImages) -> dict[str, Any]:
    """What the shipped bytes are and how often they are right on held-out images."""
    session = onnxruntime.InferenceSession(onnx_bytes, providers=["CPUExecutionProvider"])
    images, labels = held_out.images, held_out.labels
    predicted = np.concatenate(
        [
            session.run(["logits"], {"images": images[start : start + 500]})[0].argmax(1)
            for start in range(0, len(images), 500)
        ]
    )
    right = predicted == labels
    return {
        "sha256": sha256(onnx_bytes).hexdigest(),
        "size_bytes": len(onnx_bytes),
        "held_out": "Fashion-MNIST t10k, 10,000 images",
        "held_out_accuracy": round(float(right.mean()), 4),
        "held_out_accuracy_by_class": {
            name: round(float(right[labels == label].mean()), 4)
            for label, name in enumerate(CLASSES)
        },
        "classes": list(CLASSES),
        "features": int(session.get_outputs()[0].shape[1]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


if __name__ == "__main__":
    main()
