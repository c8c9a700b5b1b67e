"""Loss, targets, moving average, learning rate, batches: against oracles that share no code."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny_training import tiny_config, tiny_dataset

from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.schedule import make_schedule
from ddpm_runtime.trajectory import discrete_trajectory
from ddpm_train.batches import BatchSource, pixels_to_network
from ddpm_train.config import OptimizationConfig
from ddpm_train.diffusion import ForwardProcess, training_loss
from ddpm_train.ema import MovingAverage, warmed_up_decay
from ddpm_train.learning_rate import learning_rate_at
from ddpm_train.seeds import derive_seed

T = 100
SCHEDULE = make_schedule(num_train_timesteps=T)
CPU = torch.device("cpu")


def some_tensors(count: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(count, 2, 4, 4, generator=generator) * 2 - 1
    epsilon = torch.randn(count, 2, 4, 4, generator=generator)
    return x_0, torch.arange(count), epsilon


# --- the forward process -------------------------------------------------------------------------


def test_noising_at_once_has_the_moments_of_noising_step_by_step():
    """x_t = √(1 − β_t)·x_{t−1} + √β_t·ε, simulated: DDPM eq. 2, no ᾱ anywhere."""
    paths, t, start = 200_000, 59, 0.8
    rng = np.random.default_rng(0)
    x = np.full(paths, start)
    for beta in SCHEDULE.betas[: t + 1]:
        x = np.sqrt(1 - beta) * x + np.sqrt(beta) * rng.standard_normal(paths)
    process = ForwardProcess(SCHEDULE, "epsilon")
    x_0 = torch.full((paths, 1, 1, 1), start)
    epsilon = torch.randn(paths, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    x_t = process.noised(x_0, torch.full((paths,), t), epsilon)
    # two sample means of deviation ≤ 1 differ by 5·√(2/paths) once in two million
    assert abs(float(x_t.mean()) - x.mean()) < 5 * math.sqrt(2 / paths)
    assert abs(float(x_t.std()) - x.std()) < 5 * math.sqrt(1 / paths)


def test_noised_images_and_velocities_are_those_of_diffusers():
    x_0, timesteps, epsilon = some_tensors()
    oracle = DDPMScheduler(num_train_timesteps=T, beta_schedule="linear")
    process = ForwardProcess(SCHEDULE, "v_prediction")
    expected = oracle.add_noise(x_0, epsilon, timesteps)
    # its tables are float32 products of 100 factors
    torch.testing.assert_close(process.noised(x_0, timesteps, epsilon), expected, rtol=0, atol=1e-5)
    expected = oracle.get_velocity(x_0, epsilon, timesteps)
    torch.testing.assert_close(process.target(x_0, timesteps, epsilon), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_samplers_recover_the_image_from_a_perfect_answer(prediction_type):
    """The target of training is what the runtime takes the network's answer for."""
    x_0, timesteps, epsilon = some_tensors()
    process = ForwardProcess(SCHEDULE, prediction_type)
    x_t = process.noised(x_0, timesteps, epsilon).double()
    answer = process.target(x_0, timesteps, epsilon).double()
    falling = np.arange(T - 1, -1, -1, dtype=np.float64)
    levels = discrete_trajectory(SCHEDULE, prediction_type, falling)
    from_x = torch.tensor(levels.x0_from_x[::-1].copy())[:, None, None, None]
    from_m = torch.tensor(levels.x0_from_m[::-1].copy())[:, None, None, None]
    torch.testing.assert_close(from_x * x_t + from_m * answer, x_0.double(), rtol=0, atol=1e-6)


def test_velocity_and_noised_image_are_a_rotation_of_image_and_noise():
    x_0, timesteps, epsilon = some_tensors()
    process = ForwardProcess(SCHEDULE, "v_prediction")
    x_t = process.noised(x_0, timesteps, epsilon)
    v = process.target(x_0, timesteps, epsilon)
    torch.testing.assert_close(x_t**2 + v**2, x_0**2 + epsilon**2)


def test_an_epsilon_network_cannot_be_trained_where_no_signal_is_left():
    betas = [0.1, 0.5, 1.0]  # zero terminal SNR
    schedule = make_schedule("custom", 3, betas=betas)
    with pytest.raises(ConfigurationError, match="v_prediction"):
        ForwardProcess(schedule, "epsilon")
    ForwardProcess(schedule, "v_prediction")


# --- the loss ------------------------------------------------------------------------------------

# residuals 0.5 and −2; by hand: (0.25 + 4)/2; (0.5 + 2)/2; δ=1: (0.125 + 1.5)/2;
# δ=0.1: (0.1·0.45 + 0.1·1.95)/2
LOSSES_BY_HAND = [
    ("l2", 1.0, 2.125),
    ("l1", 1.0, 1.25),
    ("huber", 1.0, 0.8125),
    ("huber", 0.1, 0.12),
    ("huber", 4.0, 1.0625),
]


@pytest.mark.parametrize(("loss", "delta", "expected"), LOSSES_BY_HAND)
def test_losses_are_what_they_are_by_hand(loss, delta, expected):
    prediction = torch.tensor([1.5, -1.0]).reshape(2, 1, 1, 1)
    target = torch.tensor([1.0, 1.0]).reshape(2, 1, 1, 1)
    assert float(training_loss(loss, prediction, target, delta)) == pytest.approx(expected)
    assert float(training_loss(loss, target, target, delta)) == 0.0


def test_the_loss_is_computed_in_float32_whatever_the_network_answers_in():
    prediction = torch.full((1, 1, 100, 100), 1.0, dtype=torch.bfloat16)
    target = torch.full((1, 1, 100, 100), 1.001)
    loss = training_loss("l2", prediction, target)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(1e-6, rel=1e-3)


# --- the moving average --------------------------------------------------------------------------


def test_the_moving_average_is_the_weighted_sum_its_definition_unrolls_to():
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(5.0)
    average = MovingAverage(network, 0.9)
    values = np.random.default_rng(0).normal(size=150)
    for number, value in enumerate(values):
        with torch.no_grad():
            network.weight.fill_(value)
        average.update(number)
    decays = np.array([min(0.9, (1 + n) / (10 + n)) for n in range(150)])
    # weight of value i: (1 − d_i) · Π_{j > i} d_j; of the start: Π d_j
    later = np.append(np.cumprod(decays[::-1])[::-1], 1.0)
    expected = 5.0 * later[0] + float(((1 - decays) * later[1:] * values).sum())
    assert float(average.weights["weight"]) == pytest.approx(expected, abs=1e-6)


def test_the_decay_warms_up_and_stays():
    assert warmed_up_decay(0.999, 0) == pytest.approx(0.1)
    assert warmed_up_decay(0.999, 90) == pytest.approx(0.91)
    assert warmed_up_decay(0.999, 10**6) == 0.999
    assert warmed_up_decay(0.0, 5) == 0.0


# --- the learning rate ---------------------------------------------------------------------------


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    config = OptimizationConfig(steps=110, warmup_steps=10, learning_rate=1.0, decay="cosine")
    rates = [learning_rate_at(step, config) for step in range(110)]
    assert rates[:11] == pytest.approx([0.1 * n for n in range(1, 11)] + [1.0])
    assert rates[60] == pytest.approx(0.5)  # half-way
    assert rates[35] == pytest.approx(math.cos(math.pi / 8) ** 2)  # (1 + cos 2a)/2 = cos² a
    assert 0 < rates[109] < 1e-3
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_the_learning_rate_stays_without_decay():
    config = OptimizationConfig(steps=50, warmup_steps=0, learning_rate=3e-4)
    assert {learning_rate_at(step, config) for step in range(50)} == {3e-4}


# --- batches -------------------------------------------------------------------------------------


def source(count: int = 20, *, rank: int = 0, world_size: int = 1, **changes) -> BatchSource:
    config = tiny_config(**{"data__flip": False, **changes})
    dataset = tiny_dataset(count)
    return BatchSource(dataset, config, T, device=CPU, rank=rank, world_size=world_size)


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own():
    batches = source(20)  # batches of 8: five make two epochs
    visited = torch.cat([batches.indices(step) for step in range(5)]).reshape(2, 20)
    assert (visited.sort(dim=1).values == torch.arange(20)).all()
    assert not torch.equal(visited[0], visited[1])


def test_a_batch_may_hold_more_images_than_the_data_set():
    visited = source(3).indices(0)
    assert visited.bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_a_batch_is_a_function_of_seed_and_step_alone():
    fresh, used = source(), source()
    for step in [4, 0, 7]:
        used.batch(step)
    for step in [2, 3]:
        for name in ("x_0", "epsilon", "timesteps", "labels"):
            assert torch.equal(getattr(fresh.batch(step), name), getattr(used.batch(step), name))


def test_another_seed_changes_everything_that_is_drawn():
    first, second = source().batch(0), source(run__seed=1).batch(0)
    for name in ("x_0", "epsilon", "timesteps"):
        assert not torch.equal(getattr(first, name), getattr(second, name))


def test_the_shares_of_all_processes_make_the_batch_of_one():
    changes = {"data__flip": True}
    whole = source(**changes).batch(3)
    shares = [source(rank=rank, world_size=4, **changes).batch(3) for rank in range(4)]
    for name in ("x_0", "epsilon", "timesteps", "labels"):
        joined = torch.cat([getattr(share, name) for share in shares])
        assert torch.equal(joined, getattr(whole, name))


def test_the_parts_of_an_accumulated_batch_make_the_batch():
    whole = source().batch(0)
    for name in ("x_0", "epsilon", "timesteps", "labels"):
        joined = torch.cat([getattr(part, name) for part in whole.split(4)])
        assert torch.equal(joined, getattr(whole, name))


def test_timesteps_are_uniform_over_all_levels():
    batches = source(optimization__batch_size=10_000)
    counts = batches.batch(0).timesteps.bincount(minlength=T)
    assert len(counts) == T
    # Pearson's χ² over 100 cells has mean 99 and deviation √198
    chi_squared = float(((counts - 100.0) ** 2 / 100.0).sum())
    assert abs(chi_squared - 99) < 5 * math.sqrt(198)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_labels_are_hidden_as_often_as_asked_and_otherwise_true(share):
    size = 20_000
    batches = source(optimization__batch_size=size, diffusion__label_dropout=share)
    labels = batches.batch(0).labels
    true = torch.from_numpy(tiny_dataset().labels)[batches.indices(0)]
    hidden = labels == 3  # num_classes
    assert torch.equal(labels[~hidden], true[~hidden])
    deviation = math.sqrt(share * (1 - share) / size)
    assert abs(float(hidden.float().mean()) - share) <= 5 * deviation


def test_an_unconditional_data_set_has_no_labels():
    dataset = tiny_dataset(classes=0)
    batches = BatchSource(dataset, tiny_config(), T, device=CPU)
    assert batches.batch(0).labels is None


def test_half_of_the_images_are_mirrored_and_none_when_not_asked():
    size = 4_000
    plain = source(optimization__batch_size=size).batch(0).x_0
    flipped = source(optimization__batch_size=size, data__flip=True).batch(0).x_0
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(dim=1)
    kept = (flipped == plain).flatten(1).all(dim=1)
    assert (mirrored ^ kept).all()
    assert abs(float(mirrored.float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(size)


def test_pixels_span_minus_one_to_one():
    ends = pixels_to_network(torch.tensor([0, 255], dtype=torch.uint8))
    assert ends.tolist() == [-1.0, 1.0]


def test_seeds_differ_by_every_argument():
    seeds = {
        derive_seed(seed, purpose, step)
        for seed in range(10)
        for purpose in ("noise", "order")
        for step in range(100)
    }
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().run.seed = 3
