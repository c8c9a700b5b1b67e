"""ddpm-bench peers: the same step by us and by everybody else, interleaved in one run."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ddpm_runtime.backends import BACKENDS, open_backend
from ddpm_runtime.backends.processors import usable_processors
from ddpm_runtime.bundle import Bundle, read_bundle
from ddpm_runtime.errors import DDPMError, missing_extra

from .report import print_rows
from .speed_options import check_positive, json_option
from .speed_report import Case, finish, load_average, make_report, timed_case
from .stepping import Stepper, program_for
from .timing import SETTLE_S, Timed, interleave, ratio

__all__ = ["peers_command"]

_QUESTION = "How long does one sampling step take with us and with others, same weights, same run?"
_UNFAIR = [
    "peers marked 'network only' do not update x_t; ours always does",
    "diffusers' pipeline has its own network of equal size, not our weights",
    "torch.compile is timed after compiling, which takes it tens of seconds",
    "all libraries' thread pools live in one process; each way settles before it is timed",
    "bf16 and fp32 give different images; compare like with like",
]
_NETWORKS = ("fashion-mnist", "cifar-10")


Step = Callable[[], Any]


@click.command("peers")
@click.option("--network", type=click.Choice(_NETWORKS), default="fashion-mnist")
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(1, 8))
@click.option("--rounds", default=30, help="Timed steps of each, at most.")
@click.option("--warm-up", default=3, help="Steps of each before the first that counts.")
@click.option("--budget-s", default=90.0, help="For each batch size: begin no round after.")
@click.option("--only", multiple=True, help="Ways whose name holds one of these words.")
@click.option("--threads", type=int, default=None, help="[default: usable processors]")
@json_option
@click.pass_context
def peers_command(
    context: click.Context, /, network: str, batch_sizes: tuple[int, ...], rounds: int,
    warm_up: int, budget_s: float, only: tuple[str, ...], threads: int | None,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Time one step by each peer on this machine. Ratios are taken round by round."""
    check_positive(batch_size=batch_sizes, rounds=rounds, warm_up=warm_up)
    try:
        import torch

        from .peer_networks import NETWORKS, make_bundle, make_network
    except ImportError as error:
        raise missing_extra(str(error.name), "run the peers", "bench") from error
    load = load_average()
    torch.set_num_threads(threads or usable_processors())
    config = NETWORKS[network]
    unet = make_network(config)
    path = make_bundle(unet, config, network)
    cases: list[Case] = []
    try:
        bundle = read_bundle(path)
        for batch in sorted(set(batch_sizes)):
            steps, notes = _all_steps(unet, bundle, network, batch, threads, only)
            with tqdm(total=rounds, unit=" rounds", desc=f"batch {batch}", file=sys.stderr) as bar:
                timed = interleave(
                    steps,
                    rounds=rounds,
                    warm_up=warm_up,
                    budget_s=budget_s,
                    settle_s=SETTLE_S,
                    on_round=bar.update,
                )
            found = _cases(timed, notes, network, batch)
            _print(found, batch)
            cases += found
            del steps
            gc.collect()
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)
    report = make_report(
        context,
        question=_QUESTION,
        known_unfairness=_UNFAIR,
        threads=threads,
        load_before=load,
    )
    report["network"], report["cases"] = network, cases
    finish(report, json_path)


def _all_steps(
    unet: Any, bundle: Bundle, network: str, batch: int, threads: int | None, only: tuple[str, ...]
) -> tuple[dict[str, Step], dict[str, str]]:
    """Our step with every backend and precision there is, then everyone else's."""
    from .peer_networks import NETWORKS, diffusers_network
    from .peers import build_peers

    config = NETWORKS[network]
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    program = program_for(bundle, "ddim")
    for name in BACKENDS:
        for precision in ("fp32", "bf16"):
            if not _wanted(f"ours-{name}-{precision}", only):
                continue
            try:
                backend, _ = open_backend(
                    bundle, backend=name, threads=threads, precision=precision
                )
            except DDPMError:
                continue  # this backend or processor has it not
            steps[f"ours-{name}-{precision}"] = Stepper(backend, program, batch)
            notes[f"ours-{name}-{precision}"] = "whole step"
    for peer in build_peers(
        unet,
        lambda: diffusers_network(config),
        config,
        bundle,
        batch,
        threads or usable_processors(),
    ):
        key = f"{peer.name}-{peer.precision}"
        if not _wanted(key, only):
            continue
        try:
            steps[key], notes[key] = peer.build(), peer.note
        except ImportError as error:
            click.echo(f"left out: {key}, {error.name} is not installed", err=True)
    return steps, notes


def _wanted(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(word in name for word in only)


def _cases(timed: Timed, notes: dict[str, str], network: str, batch: int) -> list[Case]:
    """A case each; for every one of ours the ratio of each peer to it."""
    ours = [name for name in notes if name.startswith("ours-")]
    cases = []
    for name, note in notes.items():
        case = timed_case(
            f"peers/{network}/batch-{batch}/{name}", timed, name, batch_size=batch, note=note
        )
        samples = timed.samples_ms
        case["over"] = {one: ratio(samples[name], samples[one]) for one in ours if one != name}
        cases.append(case)
    return cases


def _print(cases: list[Case], batch: int) -> None:
    ours = [case["id"].rsplit("/", 1)[1] for case in cases if "/ours-" in case["id"]]
    click.echo(f"\nbatch {batch}: ms a step, and how many times longer than ours (p5 to p95)")
    rows = [("way", "p50", "p95", *ours)]
    for case in cases:
        cells = []
        for one in ours:
            found = case["over"].get(one)
            cells.append(
                "1" if found is None
                else f"{found['p50']:.2f} ({found['p5']:.2f} to {found['p95']:.2f})"
            )  # fmt: skip
        summary = case["summary"]
        name = case["id"].rsplit("/", 1)[1]
        rows.append((name, f"{summary['p50']:.2f}", f"{summary['p95']:.2f}", *cells))
    print_rows(rows)
