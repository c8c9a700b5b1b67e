"""ddpm-bench whole: a user's whole job, from starting Python to images on the disk."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from ddpm_runtime.bundle import read_bundle

from .fresh_process import run_fresh
from .report import print_rows
from .speed_options import check_positive, json_option
from .speed_report import Case, finish, load_average, make_report, sampled_case

__all__ = ["whole_command"]

_QUESTION = "How long does the same job take, from starting the program to a file?"
_UNFAIR = [
    "the others make their network from seed 0 and read no checkpoint; we read a bundle",
    "diffusers' network is its own, of equal size",
    "our compiled networks and calibration are in the cache, as on any but the first start",
    "all write a PNG file; the networks are in the page cache",
]

_OURS = """
import json, sys, time
engine, n, steps, precision, backend, out = sys.argv[1:]
from ddpm_runtime import Engine
from ddpm_runtime.images import save_images
with Engine.load(engine, precision=precision, backend=backend) as engine:
    began = time.perf_counter()
    images = engine.sample(int(n), steps=int(steps), sampler="ddim")
    seconds = time.perf_counter() - began
save_images(out, images, indices=list(range(int(n))))
print(json.dumps({"sampling_s": seconds}))
"""

_TORCH = """
import json, sys, time
network, n, steps, kind, out = sys.argv[1:]
import torch
from diffusers import DDIMScheduler
from PIL import Image
from ddpm_bench.peer_networks import NETWORKS, diffusers_network, make_network
config = NETWORKS[network]
n = int(n)
unet = diffusers_network(config) if kind == "diffusers" else make_network(config)
scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
scheduler.set_timesteps(int(steps))
began = time.perf_counter()
with torch.inference_mode():
    x = torch.randn(n, config.image_channels, config.image_size, config.image_size)
    label = torch.arange(n) % max(1, config.num_classes)
    for t in scheduler.timesteps:
        if kind == "diffusers":
            words = {"class_labels": label} if config.num_classes else {}
            prediction = unet(x, t, **words).sample
        else:
            words = [label] if config.num_classes else []
            prediction = unet(x, t.expand(n).float(), *words)
        x = scheduler.step(prediction, t, x).prev_sample
    images = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
seconds = time.perf_counter() - began
grid = images.permute(0, 2, 3, 1).reshape(-1, config.image_size, config.image_channels)
Image.fromarray(grid.squeeze(-1).numpy()).save(out)
print(json.dumps({"sampling_s": seconds}))
"""


@click.command("whole")
@click.option(
    "--engine", "engine_path", required=True, type=click.Path(path_type=Path), help="Ours."
)
@click.option(
    "--network",
    type=click.Choice(("fashion-mnist", "cifar-10")),
    default="fashion-mnist",
    help="The engine's architecture, for the others.",
)
@click.option("-n", "--num-images", "n", default=64, help="Images.")
@click.option("--steps", default=50, help="DDIM steps.")
@click.option("--rounds", default=3, help="Fresh processes of each.")
@json_option
@click.pass_context
def whole_command(
    context: click.Context, /, engine_path: Path, network: str, n: int, steps: int, rounds: int,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Sample images in fresh processes: ours, PyTorch eager, diffusers; in turn, several times."""
    check_positive(num_images=n, steps=steps, rounds=rounds)
    read_bundle(engine_path)
    load = load_average()
    found = _measure(engine_path, network, n, steps, rounds)
    cases: list[Case] = []
    for part in ("process_s", "sampling_s"):
        ours = float(np.median([run[part] for run in found["ours-auto"]]))
        for name, runs in found.items():
            case = sampled_case(
                f"whole/{network}/{part}/{name}", [run[part] for run in runs], unit="s"
            )
            case["over_ours"] = case["summary"]["p50"] / ours
            cases.append(case)
    report = make_report(
        context, question=_QUESTION, known_unfairness=_UNFAIR, threads=None, load_before=load
    )
    report["network"], report["cases"] = network, cases
    rows = [("seconds", "p50", "min", "times ours")]
    rows += [
        (
            case["id"].split("/", 2)[2],
            f"{case['summary']['p50']:.2f}",
            f"{case['summary']['min']:.2f}",
            f"{case['over_ours']:.2f}",
        )
        for case in cases
    ]
    print_rows(rows)
    finish(report, json_path)


def _measure(
    engine_path: Path, network: str, n: int, steps: int, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Every way in turn; a first start of ours, uncounted, fills the cache."""
    job = (str(n), str(steps))
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "images.png")
        ways: dict[str, tuple[str, tuple[str, ...]]] = {
            "ours-auto": (_OURS, (str(engine_path), *job, "auto", "auto", out)),
            "torch-eager": (_TORCH, (network, *job, "torch", out)),
            "diffusers-eager": (_TORCH, (network, *job, "diffusers", out)),
        }
        try:
            bf16 = (_OURS, (str(engine_path), *job, "bf16", "auto", out))
            run_fresh(bf16[0], *bf16[1])
            ways["ours-bf16"] = bf16
        except Exception as error:  # no bf16 here: leave it out, and say so
            click.echo(f"left out: ours-bf16, {error}", err=True)
        run_fresh(_OURS, *ways["ours-auto"][1])
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for _ in tqdm(range(rounds), unit=" rounds", file=sys.stderr):
            for name, (code, words) in ways.items():
                found[name].append(run_fresh(code, *words))
    return found
