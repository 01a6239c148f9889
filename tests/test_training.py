"""The training loop: schedule, resuming, and the contrastive loss; what a batch holds."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from invertune import training
from invertune.sampling import batch_indices, generator, pair_indices
from invertune.training import Recipe, TrainingError, contrastive_loss, fit


def test_contrastive_loss_equals_a_slow_float64_version() -> None:
    rng = generator(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 7, generator=rng)) for _ in "ab")
    scale = torch.tensor(2.0)
    logits = [
        [
            math.exp(2.0) * sum(a * b for a, b in zip(i.tolist(), t.tolist(), strict=True))
            for t in text
        ]
        for i in image
    ]
    rows = [math.log(sum(map(math.exp, logits[n]))) - logits[n][n] for n in range(5)]
    columns = [math.log(sum(math.exp(r[n]) for r in logits)) - logits[n][n] for n in range(5)]
    expected = (sum(rows) + sum(columns)) / 10
    assert contrastive_loss(image, text, scale).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("start", [math.log(100), 4.7])
def test_the_logit_scale_can_fall_from_its_limit_but_not_rise(start: float) -> None:
    ends = []
    for sign in (1, -1):
        net = torch.nn.Module()
        net.logit_scale = torch.nn.Parameter(torch.tensor(start))
        recipe = Recipe(5, 0.01, weight_decay=0, schedule="constant")
        fit(net, lambda step, net=net, sign=sign: {"loss": sign * net.logit_scale.exp()}, recipe)
        ends.append(net.logit_scale.item())
    assert ends == pytest.approx([start - 0.05, start], abs=1e-4)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_shows_every_item_at_most_once(batches: int, batch: int, seed: int) -> None:
    count = batches * batch + min(batch - 1, 3)
    seen = torch.cat([batch_indices(count, batch, seed, step) for step in range(batches)])
    assert len(seen.unique()) == batches * batch
    steps = range(batches, 2 * batches)
    again = torch.cat([batch_indices(count, batch, seed, step) for step in steps])
    assert batches * batch < 8 or not torch.equal(again, seen)


def test_pairs_in_no_order_meet_other_pairs_in_every_epoch() -> None:
    epochs = [
        {frozenset(pair_indices(64, 8, 0, 8 * epoch + step, cycled).tolist()) for step in range(8)}
        for cycled in (False, True)
        for epoch in (0, 1)
    ]
    assert not epochs[0] & epochs[1]
    assert epochs[2] == epochs[3] == {frozenset(range(i, i + 8)) for i in range(0, 64, 8)}


def test_a_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="3 items, fewer than one batch of 4"):
        batch_indices(3, 4, 0, 0)


def test_the_cosine_schedule_warms_up_peaks_and_ends_near_zero() -> None:
    recipe = Recipe(steps=100, lr=1.0, warmup=10)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001


def _problem() -> tuple[nn.Module, Tensor]:
    """A net with a convolution that is channels last in memory, as those of ``models``."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    net = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return net, torch.randn(64, 4, 3, 3)


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVED_APART", 7)
    monkeypatch.setattr(training, "LOG_EVERY", 5)
    recipe = Recipe(steps=30, lr=0.01, warmup=3)

    def run(checkpoint: Path | None, stop: int = 99) -> tuple[nn.Module, list[dict[str, float]]]:
        net, inputs = _problem()

        def loss_at(step: int) -> dict[str, Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            rows = batch_indices(64, 16, 1, step)
            wanted = inputs[rows].mean((1, 2, 3))[:, None]
            return {"loss": (net(inputs[rows]) - wanted).pow(2).mean()}

        return net, fit(net, loss_at, recipe, checkpoint=checkpoint)

    whole, whole_log = run(None)
    for stop in (3, 10, 29):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"{stop}.safetensors", stop)
        resumed, log = run(tmp_path / f"{stop}.safetensors")
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name
        assert log == whole_log


def test_a_checkpoint_that_was_cut_off_is_left_aside(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(training, "SAVED_APART", 4)
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    path = tmp_path / "cut.safetensors"
    net, inputs = _problem()
    terms = {"loss_at": lambda step: {"loss": net(inputs).square().mean()}}
    fit(net, recipe=Recipe(5, 0.01), checkpoint=path, **terms)
    path.write_bytes(path.read_bytes()[:-9])
    log = fit(net, recipe=Recipe(5, 0.01), checkpoint=path, **terms)
    assert len(log) == 5 and f"{path} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "saved"), [(99, []), (350, [100, 200, 300])])
def test_a_short_run_saves_every_100_steps(
    steps: int, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _saved(steps, tmp_path, monkeypatch) == saved


def test_a_long_run_saves_ten_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _saved(2000, tmp_path, monkeypatch) == list(range(200, 2001, 200))
    assert _saved(2505, tmp_path, monkeypatch) == list(range(250, 2501, 250))


def _saved(steps: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After how many steps a training of ``steps`` writes its checkpoint."""
    seen: list[int] = []
    monkeypatch.setattr(training, "_save", lambda *given: seen.append(given[4]))
    net = nn.Linear(1, 1)

    def loss_at(step: int) -> dict[str, Tensor]:
        return {"loss": net.weight.sum()}

    fit(net, loss_at, Recipe(steps, 1e-6), checkpoint=folder / "none.safetensors")
    return seen


def test_a_loss_that_is_not_finite_stops_with_step_and_setting() -> None:
    net, inputs = _problem()

    def loss_at(step: int) -> dict[str, Tensor]:
        return {"loss": net(inputs).mean() * (math.nan if step == 4 else 1)}

    with pytest.raises(TrainingError, match=r"is nan .* at step 4 of 10; lower lr \(now 0.1\)"):
        fit(net, loss_at, Recipe(10, 0.1))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    net = torch.nn.Linear(2, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        return {"loss": (net.weight * 0).sum().sqrt()}  # 0, with an infinite slope

    with pytest.raises(TrainingError, match=r"loss is 0.0 and the norm of its gradient"):
        fit(net, loss_at, Recipe(2, 0.1))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
