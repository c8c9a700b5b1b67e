"""What was measured, as cases of a speed report."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddpm_runtime.bundle import Bundle

from .gpu_matrix import Group, Measured
from .gpu_ours import OurBatch
from .gpu_timing import host_gap_share
from .speed_report import Case, timed_case
from .timing import ratio, summarise

__all__ = ["cases_of", "row_flops", "skipped"]


def cases_of(
    group: Group, measured: list[Measured], flops: int | None, gflops: dict[str, float]
) -> list[Case]:
    """A case each, compared with the others of its group.

    Args:
        group: the group.
        measured: its ways.
        flops: of the network for one image; None if they could not be counted.
        gflops: what the GPU can do, by precision; empty if it was not measured.
    """
    cases = []
    reference = next((one for one in measured if one.way.precision == "fp32"), measured[0])
    for one in measured:
        timed, rows = one.timed, len(group.program)
        case = timed_case(
            group.case_id(one.way.name),
            timed,
            one.way.name,
            way=one.way.name,
            network=group.subject.name,
            batch_size=group.batch,
            rows=rows,
            precision=one.way.precision,
            backend=one.batch.description,
        )
        batch_s = case["summary"]["p50"] / 1e3
        evaluations = int(group.program.table.evaluates.sum())
        case["images_per_s"] = group.batch / batch_s
        case["evaluations_per_s"] = group.batch * evaluations / batch_s
        case["setup"] = {**one.batch.setup, "steady_batch_ms": case["summary"]["p50"]}
        case.update(_device_times(one))
        row_ms = case.get("row_ms") or case["summary"]["p50"] / rows
        case.update(_utilisation(flops, group.batch, row_ms, gflops.get(one.way.precision)))
        case["pixels_from"] = {"way": reference.way.name, **_difference(one, reference)}
        samples = timed.samples_ms
        case["over"] = {
            other.way.name: ratio(samples[other.way.name], samples[one.way.name])
            for other in measured
            if other.way.name.startswith("torch-") and other is not one
        }
        cases.append(case)
    return cases


def skipped(groups: list[Group]) -> list[dict[str, str]]:
    """What was left out, with the reasons."""
    return [{"id": one.case_id, "reason": one.reason} for group in groups for one in group.skipped]


def row_flops(bundle: Bundle) -> int | None:
    """Operations of one image's evaluation, counted in its float32 graph; None without onnx."""
    try:
        from .graph_cost import count_graph
    except ImportError:
        return None
    return count_graph(bundle.network_bytes, 1).product_flops


def _device_times(one: Measured) -> dict[str, Any]:
    """Ours only: a row on the host's clock and on the device's, and the gap between them."""
    if not isinstance(one.batch, OurBatch):
        return {}
    rows_ms = one.batch.rows_ms[-one.timed.rounds :]
    device_ms, how = one.batch.device_rows_ms()
    wall, busy = summarise(rows_ms), summarise(device_ms)
    return {
        "row_ms": wall["p50"],
        "row_samples": rows_ms,
        "device_row_ms": busy["p50"],
        "device_row_samples": device_ms,
        "device_time": how,
        "host_gap_share": host_gap_share(busy["p50"], wall["p50"]),
        "device_memory_bytes": one.batch.memory_bytes,
    }


def _utilisation(
    flops: int | None, batch: int, row_ms: float, limit: float | None
) -> dict[str, Any]:
    """GFLOP/s in a row, and the share of what the GPU can do: MFU."""
    if flops is None:
        return {"gflops": None, "mfu": None}
    rate = flops * batch / row_ms / 1e6
    return {"gflops": rate, "mfu": None if limit is None else rate / limit}


def _difference(one: Measured, other: Measured) -> dict[str, float]:
    """Of the pixels, in levels of 255."""
    apart = np.abs(one.pixels.astype(np.int16) - other.pixels.astype(np.int16))
    return {"mean_levels": float(apart.mean()), "most_levels": float(apart.max())}
