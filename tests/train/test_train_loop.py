"""The training run: it learns, it resumes to the bit, it shares work, it stops when told."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import same_bits, tiny_config, tiny_dataset

from ddpm_runtime.errors import CheckpointError, ConfigurationError, NonFiniteError
from ddpm_train.checkpoint import load_checkpoint, read_state
from ddpm_train.data import ImageDataset
from ddpm_train.loop import train
from ddpm_train.metrics import COLUMNS, MetricsFile, read_metrics


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Raw weights, averages and Adam's moments of a run, by one flat set of names."""
    state = read_state(run / "resume.pt", "ddpm-engine resume state")
    flat = {f"weights.{name}": value for name, value in state["weights"].items()}
    flat |= {f"average.{name}": value for name, value in state["average"].items()}
    for number, moments in state["optimizer"]["state"].items():
        flat |= {f"adam.{number}.{name}": value for name, value in moments.items()}
    return flat


def comparable_metrics(run: Path) -> list[tuple[float, ...]]:
    """Every column but the speed."""
    return [tuple(row[name] for name in COLUMNS[:-1]) for row in read_metrics(run / "metrics.csv")]


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_falls(tmp_path, prediction_type):
    config = tiny_config(
        diffusion__prediction_type=prediction_type,
        optimization__steps=80,
        optimization__learning_rate=5e-3,
        run__log_every=20,
    )
    rng = np.random.default_rng(0)
    flat = np.broadcast_to(rng.integers(256, size=(20, 1, 1, 1)), (20, 1, 8, 8)).astype(np.uint8)
    train(config, ImageDataset(images=flat), tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert losses[-1] < 0.7 * losses[0]


def test_a_run_leaves_a_checkpoint_of_the_average_with_its_provenance_and_no_paths(tmp_path):
    dataset, config = tiny_dataset(), tiny_config()
    result = train(config, dataset, tmp_path / "run")
    assert (result.step, result.stopped_by) == (12, None)
    checkpoint = load_checkpoint(tmp_path / "run" / "model.pt")
    state = read_state(tmp_path / "run" / "resume.pt", "ddpm-engine resume state")
    assert same_bits(checkpoint.state_dict, state["average"])
    assert not same_bits(checkpoint.state_dict, state["weights"])
    assert checkpoint.step == 12
    assert checkpoint.class_names == dataset.class_names
    assert checkpoint.schedule_spec == {"name": "linear", "num_train_timesteps": 50}
    assert checkpoint.provenance["recipe"] == config.to_dict()
    assert checkpoint.provenance["data"] == {"images": 20, "sha256": dataset.fingerprint()}
    for file in (tmp_path / "run").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(tmp_path):
    for name, parts in (("whole", 1), ("parts", 4)):
        config = tiny_config(
            network__dropout=0.0, optimization__steps=4, optimization__accumulation=parts
        )
        train(config, tiny_dataset(), tmp_path / name)
    whole = read_state(tmp_path / "whole" / "resume.pt", "ddpm-engine resume state")["weights"]
    parts = read_state(tmp_path / "parts" / "resume.pt", "ddpm-engine resume state")["weights"]
    # equal but for the order of float32 sums, which Adam's division by small roots amplifies
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-4


@pytest.mark.parametrize("changes", [{"run__precision": "bf16"}, {"run__channels_last": True}])
def test_other_precisions_and_layouts_learn_nearly_the_same(tmp_path, changes):
    for name, extra in (("plain", {}), ("other", changes)):
        config = tiny_config(network__dropout=0.0, **extra)
        train(config, tiny_dataset(), tmp_path / name)
    plain, other = (comparable_metrics(tmp_path / name) for name in ("plain", "other"))
    for expected, found in zip(plain, other, strict=True):
        assert found[2] == pytest.approx(expected[2], rel=0.02)  # the loss; bf16 has 8 bits
    weights = load_checkpoint(tmp_path / "other" / "model.pt").state_dict
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_weight_decay_shrinks_matrices_and_spares_vectors(tmp_path):
    still = {"optimization__learning_rate": 0.1, "optimization__steps": 1}
    initial = tiny_config(**still, optimization__warmup_steps=10**6)  # as good as no step
    decayed = tiny_config(**still, optimization__warmup_steps=0, optimization__weight_decay=1.0)
    plain = tiny_config(**still, optimization__warmup_steps=0)
    for name, config in (("initial", initial), ("decayed", decayed), ("plain", plain)):
        train(config, tiny_dataset(), tmp_path / name)
    start, with_decay, without = (
        read_state(tmp_path / name / "resume.pt", "ddpm-engine resume state")["weights"]
        for name in ("initial", "decayed", "plain")
    )
    for name in start:
        expected = 0.1 * start[name] if start[name].ndim > 1 else torch.zeros_like(start[name])
        torch.testing.assert_close(without[name] - with_decay[name], expected, rtol=1e-3, atol=1e-5)


def test_a_run_that_diverges_says_so_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(
        optimization__learning_rate=1e6, optimization__gradient_clip=0.0, run__save_every=100
    )
    with pytest.raises(NonFiniteError, match="lower --learning-rate"):
        train(config, tiny_dataset(), tmp_path)
    assert load_checkpoint(tmp_path / "model.pt").step == 0


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 4, 5, 7, 11])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, stop_at):
    """Mid-epoch (20 images, batches of 8), with dropout, flips, hidden labels, between log rows."""
    train(tiny_config(), tiny_dataset(), tmp_path / "unbroken")
    train(tiny_config(optimization__steps=stop_at), tiny_dataset(), tmp_path / "broken")
    train(tiny_config(), tiny_dataset(), tmp_path / "broken", resume=True)
    assert same_bits(weights_of(tmp_path / "unbroken"), weights_of(tmp_path / "broken"))
    assert comparable_metrics(tmp_path / "unbroken") == comparable_metrics(tmp_path / "broken")
    whole, resumed = (
        load_checkpoint(tmp_path / name / "model.pt") for name in ("unbroken", "broken")
    )
    assert same_bits(whole.state_dict, resumed.state_dict)


def test_the_same_recipe_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_config(run__seed=seed), tiny_dataset(), tmp_path / name)
    assert same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert not same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))


CHANGES = [
    ("network.channels", {"network__channels": 16}),
    ("data.flip", {"data__flip": False}),
    ("diffusion.schedule", {"diffusion__schedule": {"name": "cosine", "num_train_timesteps": 50}}),
    ("optimization.learning_rate", {"optimization__learning_rate": 1e-3}),
    ("run.seed", {"run__seed": 5}),
]


@pytest.mark.parametrize(("field", "change"), CHANGES)
def test_resuming_with_another_config_is_refused_by_the_name_of_the_field(tmp_path, field, change):
    train(tiny_config(optimization__steps=1), tiny_dataset(), tmp_path)
    before = (tmp_path / "resume.pt").read_bytes()
    with pytest.raises(ConfigurationError, match=f"cannot resume with {field} ="):
        train(tiny_config(**change), tiny_dataset(), tmp_path, resume=True)
    assert (tmp_path / "resume.pt").read_bytes() == before


def test_steps_and_intervals_may_change(tmp_path):
    train(tiny_config(optimization__steps=1), tiny_dataset(), tmp_path)
    longer = tiny_config(optimization__steps=3, run__log_every=1, run__save_every=1)
    assert train(longer, tiny_dataset(), tmp_path, resume=True).step == 3


def test_resuming_on_other_data_is_refused(tmp_path):
    train(tiny_config(optimization__steps=1), tiny_dataset(), tmp_path)
    with pytest.raises(ConfigurationError, match="other data"):
        train(tiny_config(), tiny_dataset(seed=1), tmp_path, resume=True)


def test_a_run_is_not_overwritten(tmp_path):
    train(tiny_config(optimization__steps=1), tiny_dataset(), tmp_path)
    with pytest.raises(ConfigurationError, match="Continue it with --resume"):
        train(tiny_config(), tiny_dataset(), tmp_path)


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(tiny_config(), tiny_dataset(), tmp_path, resume=True)


def test_metrics_after_the_resumed_step_are_dropped_and_a_torn_row_too(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    for step in range(1, 6):
        metrics.add({**dict.fromkeys(COLUMNS, 0.5), "step": step, "images": 8 * step})
    metrics.close()
    with path.open("a") as file:
        file.write("6,48,0.")
    resumed = MetricsFile(path, resumed_step=3)
    resumed.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_tensorboard_gets_the_same_numbers_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path / "tensorboard"), 1)

        def add_scalar(self, *row):
            written.append(row)

        def close(self):
            written.append("closed")

    board = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.add({**dict.fromkeys(COLUMNS, 0.5), "step": 4})
    metrics.close()
    assert written == [*((name, 0.5, 4) for name in COLUMNS[2:]), "closed"]


# --- signals, locks, kills -----------------------------------------------------------------------

PROGRAM = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    import torch
    torch.set_num_threads(1)
    from ddpm_train.loop import train
    from tiny_training import tiny_config, tiny_dataset
    steps, resume = int(sys.argv[2]), len(sys.argv) > 4
    config = tiny_config(optimization__steps=steps, run__save_every=5, run__log_every=1)
    result = train(config, tiny_dataset(), Path(sys.argv[1]), resume=resume)
    sys.exit(128 + result.stopped_by if result.stopped_by else 0)
"""


def start(run: Path, steps: int, *, resume: bool = False) -> subprocess.Popen:
    here = str(Path(__file__).parent)
    arguments = [str(run), str(steps), here, *(["resume"] if resume else [])]
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments])


def wait_for_steps(run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = read_metrics(run / "metrics.csv")
        if rows and rows[-1]["step"] >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{run} took no {count} steps")


def test_a_run_killed_at_any_step_and_resumed_has_the_same_bits(tmp_path):
    steps, broken = 40, tmp_path / "broken"
    rng = np.random.default_rng(0)
    for number, kill_after in enumerate(sorted(rng.integers(1, steps - 10, size=2).tolist())):
        process = start(broken, steps, resume=number > 0)
        wait_for_steps(broken, kill_after)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(broken, steps, resume=True).wait() == 0
    assert start(tmp_path / "unbroken", steps).wait() == 0
    assert same_bits(weights_of(tmp_path / "unbroken"), weights_of(broken))
    assert comparable_metrics(tmp_path / "unbroken") == comparable_metrics(broken)
    assert not [name for name in os.listdir(broken) if ".tmp" in name]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_in_hand_with_everything_saved(tmp_path, number, code):
    process = start(tmp_path, 10**6)
    wait_for_steps(tmp_path, 3)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    state = read_state(tmp_path / "resume.pt", "ddpm-engine resume state")
    rows = read_metrics(tmp_path / "metrics.csv")
    assert state["step"] == rows[-1]["step"] == load_checkpoint(tmp_path / "model.pt").step


def test_a_second_process_on_a_run_directory_is_refused_with_the_holder_named(tmp_path):
    process = start(tmp_path, 10**6)
    try:
        wait_for_steps(tmp_path, 1)
        with pytest.raises(ConfigurationError, match=f"in use by process {process.pid}"):
            train(tiny_config(), tiny_dataset(), tmp_path, resume=True)
    finally:
        process.kill()
        process.wait()


def test_a_second_interrupt_is_immediate(tmp_path):
    slow = """
        import sys, time
        from ddpm_train.stopping import stop_request
        with stop_request() as stop:
            print("ready", flush=True)
            time.sleep(60) if not stop else None
            print("first", flush=True)
            time.sleep(60)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(slow)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None  # the first is only noted
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT  # which a shell reports as 130
    assert time.monotonic() - began < 30
    process.stdout.close()


# --- several processes ---------------------------------------------------------------------------

WORKER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from ddpm_train.distributed import process_group
    from ddpm_train.loop import Run
    from ddpm_train.stopping import StopRequest
    from tiny_training import tiny_config, tiny_dataset
    config = tiny_config(network__dropout=0.0, optimization__steps=6, optimization__accumulation=2)
    with process_group("cpu") as processes:
        run = Run(config, tiny_dataset(), Path(sys.argv[2]), processes, resume=False, on_step=None)
        result = run.until_done(StopRequest())
        run.close()
    torch.save(run.learner.network.state_dict(), Path(sys.argv[2]) / f"rank{processes.rank}.pt")
"""


def run_workers(folder: Path, world_size: int, port: int) -> None:
    folder.mkdir()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    here = str(Path(__file__).parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), here, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * world_size


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_agree_to_the_bit_and_with_one_process_to_rounding(tmp_path):
    run_workers(tmp_path / "two", 2, free_port())
    run_workers(tmp_path / "one", 1, free_port())
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in range(2))
    alone = torch.load(tmp_path / "one" / "rank0.pt")
    assert same_bits(first, second)
    # equal but for the order of float32 sums, which Adam's division by small roots amplifies
    assert max(float((first[name] - alone[name]).abs().max()) for name in alone) < 1e-4
    two, one = (comparable_metrics(tmp_path / name) for name in ("two", "one"))
    for found, expected in zip(itertools.chain(*two), itertools.chain(*one), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_batch_that_cannot_be_shared_equally_is_refused_with_one_that_can(tmp_path):
    with pytest.raises(ConfigurationError, match="use --batch-size 6"):
        train(tiny_config(optimization__accumulation=3), tiny_dataset(), tmp_path)
