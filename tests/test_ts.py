"""nano_ts against oracles: closed forms, plain loops in float64, simulation, the published protocol. No network, no GPU."""

import csv
import dataclasses
import datetime
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nano_ts as ts  # noqa: E402

NANO_DATA = pathlib.Path(os.environ.get("NANO_DATA", ROOT / "data"))
needs_etth1 = pytest.mark.skipif(not (NANO_DATA / "ETTh1.csv").exists(), reason="put ETTh1.csv into data/ or $NANO_DATA")
NAIVE = ["repeat", "snaive", "profile"]


def tiny(**changes):
    return dataclasses.replace(ts.Config(), **{"steps": 3, "width": 16, "layers": 1, **changes})


def noise(rows, columns, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=(rows, columns)), dtype=torch.float64)


def waves(rows, columns=2, period=24, seed=0):
    t, rng = np.arange(rows)[:, None], np.random.default_rng(seed)
    return np.sin(2 * np.pi * t / period + np.arange(columns)) + 0.2 * rng.normal(size=(rows, columns))


def hourly(table, name="made up", period=24):
    start = datetime.datetime(2024, 1, 1)
    dates = [start + datetime.timedelta(hours=i) for i in range(len(table))]
    return ts.Series(name, [f"c{i}" for i in range(table.shape[1])], np.asarray(table), dates, ("seconds", 3600.0), period)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def read(tmp_path, text, **how):
    return ts.read_csv(write(tmp_path / "my.csv", text), **how)


def rows_of(values, start="2024-01-01", hours=1, form="%Y-%m-%d %H:%M"):
    first = datetime.datetime.fromisoformat(start)
    return "date,v\n" + "".join(f"{(first + datetime.timedelta(hours=hours * i)).strftime(form)},{v}\n" for i, v in enumerate(values))


# --- the protocol ----------------------------------------------------------------------------------------------------


def test_etth_windows_are_the_published_ones():
    series = hourly(noise(17420, 1).numpy(), name="ETTh1")
    arena = ts.Arena(series, ts.borders(series, 720), [96, 192, 336, 720], tiny(), "cpu")
    assert arena.fits["test"] == {96: 2785, 192: 2689, 336: 2545, 720: 2161}
    assert len(arena.train) == 8640 and arena.starts["test"][0] == 11520
    fits = arena.fits["test"]
    result = ts.score(torch.zeros(2785, 1, 720), arena.truth["test"], fits, arena.naive_mae, drop_last=128)
    assert result["windows"] == {"96": 2688, "192": 2688, "336": 2432, "720": 2048}


def test_other_files_are_split_70_10_20_and_a_forecast_keeps_room():
    series = hourly(noise(1000, 1).numpy())
    assert ts.borders(series, 50) == (700, 800, 1000)
    first, middle, end = ts.borders(series, 100, holdout=True)
    assert end == 1000 and middle - first == end - middle == 150
    with pytest.raises(ts.UserError, match="use --horizon") as told:
        ts.borders(series, 600, holdout=True)
    longest = int(re.search(r"--horizon (\d+)", str(told.value)).group(1))
    ts.borders(series, longest, holdout=True)  # what the message advises works, and one more does not
    with pytest.raises(ts.UserError):
        ts.borders(series, longest + 1, holdout=True)


def test_the_scaler_sees_training_rows_only():
    table = waves(600)
    changed = table.copy()
    changed[420:] = 1e6 * np.random.default_rng(1).normal(size=(180, 2))
    a, b = (ts.Arena(hourly(x), (420, 480, 600), [24], tiny(), "cpu") for x in (table, changed))
    assert torch.equal(a.train, b.train) and torch.equal(a.naive_mae, b.naive_mae)
    assert np.allclose(a.train.mean(0), 0, atol=1e-6) and np.allclose(a.train.var(0, correction=0), 1, atol=1e-5)


def test_unscale_inverts_scale_for_all_columns_and_for_one():
    table = np.array([[1.0, 100.0, -5.0], [3.0, 300.0, 5.0], [8.0, 200.0, 0.0], [4.0, 150.0, 1.0]])
    scaler = ts.Scaler(table)
    windows = scaler.scale(table).T[None]  # (1, C, H)
    assert np.allclose(scaler.unscale(windows)[0].T, table, atol=1e-4)
    for c in range(3):
        assert np.allclose(scaler.unscale(windows[:, c : c + 1], slice(c, c + 1))[0, 0], table[:, c], atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ts.RUNGS if "+" not in n])
def test_no_forecast_reads_the_future(name):
    torch.manual_seed(0)
    table = torch.tensor(waves(900), dtype=torch.float32)
    model = ts.build(name, table[:600], 24, tiny())
    starts = torch.tensor([650, 700])
    whole = ts.forecasts(model, table, starts, 30)
    for i, start in enumerate(starts):
        blind = table.clone()
        blind[start:] = math.nan
        cut = ts.forecasts(model, blind, starts[i : i + 1], 30)[0]
        assert not cut.isnan().any() and torch.allclose(whole[i], cut, atol=1e-5)
        moved = table.clone()
        moved[start - 1] += 1.0
        assert not torch.allclose(whole[i], ts.forecasts(model, moved, starts[i : i + 1], 30)[0], atol=1e-5), "the last value must count"


def test_score_is_the_plain_mean_and_missing_truths_do_not_count():
    f, y = noise(5, 2 * 4).view(5, 2, 4), noise(5, 2 * 4, 1).view(5, 2, 4)
    y[1, 0, 2] = math.nan
    result = ts.score(f, y, {2: 5, 4: 3}, torch.tensor([0.5, 2.0]))
    for horizon, n in ((2, 5), (4, 3)):
        columns = [[(f[i, c, h] - y[i, c, h]).item() for i in range(n) for h in range(horizon) if not math.isnan(y[i, c, h])] for c in range(2)]
        assert result["mse"][str(horizon)] == pytest.approx(np.mean([np.mean(np.square(e)) for e in columns]))
        assert result["mae"][str(horizon)] == pytest.approx(np.mean([np.mean(np.abs(e)) for e in columns]))
        assert result["mase"][str(horizon)] == pytest.approx(np.mean([np.mean(np.abs(columns[0])) / 0.5, np.mean(np.abs(columns[1])) / 2]))


def test_forecasts_do_not_depend_on_the_batch_size():
    table = torch.tensor(waves(400), dtype=torch.float32)
    model = ts.build("itransformer", table[:300], 8, tiny())
    starts = torch.arange(310, 380)
    assert torch.allclose(ts.forecasts(model, table, starts, 20, batch=7), ts.forecasts(model, table, starts, 20, batch=64), atol=1e-5)


def test_a_named_file_is_found_in_the_data_folder(tmp_path, monkeypatch):
    write(tmp_path / "ETTh2.csv", rows_of(waves(200, 1)[:, 0]))
    monkeypatch.setenv("NANO_DATA", str(tmp_path))
    series = ts.load_series(tiny(data="etth2"))
    assert series.name == "ETTh2" and series.values.shape == (200, 1)


def test_truths_end_at_the_border():
    table = torch.arange(10.0)[:, None]
    y = ts.truths(table, torch.tensor([5, 7]), 4, end=9)
    assert y[:, 0].nan_to_num(nan=-1).tolist() == [[5, 6, 7, 8], [7, 8, -1, -1]]


@needs_etth1
def test_etth1_repeat_and_seasonal_ar():
    series = ts.read_csv(NANO_DATA / "ETTh1.csv")
    assert series.values.shape == (17420, 7) and series.period == 24
    arena = ts.Arena(series, ts.borders(series, 720), [96, 192, 336, 720], tiny(), "cpu")
    repeat, sar = arena.climb(["repeat", "sar"])
    assert repeat.test["mse"]["96"] == pytest.approx(1.2944, abs=1e-3) and repeat.test["mae"]["96"] == pytest.approx(0.7132, abs=1e-3)
    dropped = ts.score(repeat.made["test"], arena.truth["test"], arena.fits["test"], arena.naive_mae, drop_last=32)
    assert dropped["mse"]["336"] == pytest.approx(1.323, abs=1e-3) and dropped["mae"]["336"] == pytest.approx(0.744, abs=1e-3)  # as published
    assert sar.params == 89 and np.mean(list(sar.test["mse"].values())) < 0.393
    _, width = ts.coverage(arena.truth["test"] - sar.made["test"], arena.interval(sar, "psi", 0.8), 96)
    inside, _ = ts.coverage(arena.truth["test"] - sar.made["test"], arena.interval(sar, "residual", 0.8), 96)
    assert all(0.75 <= c <= 0.88 for c in inside) and width == sorted(width)


# --- linear rules ----------------------------------------------------------------------------------------------------


def test_rollout_is_predict_append_slide():
    model = ts.LagModel([1, 3], [[0.5, 0.1], [0.2, 0.3]], centre=True)
    history = noise(2, 3 * 5).view(2, 3, 5)
    slow = history.clone()
    for _ in range(4):
        slow = torch.cat([slow, model(slow[..., -3:])], -1)
    assert torch.allclose(ts.rollout(model, history, 7), slow[..., 5:12])
    by_hand = history.mean(-1)[0, 0] + 0.5 * (history[0, 0, 4] - history[0, 0].mean()) + 0.1 * (history[0, 0, 2] - history[0, 0].mean())
    assert ts.LagModel([1, 3], [0.5, 0.1], least=5)(history)[0, 0, 0].item() == pytest.approx(by_hand.item())
    with pytest.raises(ts.UserError, match="2 steps is shorter than the lookback of 3"):
        ts.rollout(model, history[..., :2], 7)
    assert ts.rollout(ts.LagModel([1], [0.5], centre=False), torch.tensor([[[1.0, 8.0]]]), 3).flatten().tolist() == [4, 2, 1]


def test_a_chunk_as_long_as_the_horizon_is_a_direct_forecast():
    model = ts.fit_lags(noise(300, 2), range(1, 11), chunk=6)
    history = noise(2, 10).view(1, 2, 10)
    assert torch.equal(ts.rollout(model, history, 6), model(history))


def test_naive_rules_are_the_slices_they_claim():
    table = torch.tensor(waves(400, period=7), dtype=torch.float64)
    x = table[-120:].T[None]
    made = {n: ts.rollout(ts.build(n, table, 7, tiny()), x, 16) for n in NAIVE}
    assert torch.allclose(made["repeat"], x[..., -1:].expand(1, 2, 16))
    assert torch.allclose(made["snaive"], torch.cat([x[..., -7:]] * 3, -1)[..., :16])
    n = min(30, 400 // 4 // 7)
    assert torch.allclose(made["profile"][..., :7], x[..., -7 * n :].unflatten(-1, (n, 7)).mean(-2))


def test_least_squares_equals_lstsq():
    table, lags = noise(200, 3).cumsum(0), [1, 2, 5]
    for centre, chunk in ((False, 1), (True, 1), (True, 4)):
        rows, targets = [], []
        for c in range(3):
            for t in range(5, 200 - chunk + 1):
                level = table[t - 5 : t, c].mean() if centre else 0
                rows.append([table[t - k, c] - level for k in lags])
                targets.append((table[t : t + chunk, c] - level).tolist())
        oracle = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
        model = ts.fit_lags(table, lags, chunk=chunk, ridge=0.0, centre=centre)
        assert np.allclose(model.weight, oracle, atol=1e-6)
        residual = (np.array(targets) - np.array(rows) @ oracle)[:, 0].reshape(3, -1)
        assert np.allclose(model.sigma, np.sqrt((residual**2).mean(1)), atol=1e-6), "one deviation per column"


def test_worked_examples_of_the_docstrings():
    assert ts.fit_lags(torch.tensor([[8.0], [4], [2], [1]]), [1], ridge=0.0, centre=False).weight.item() == pytest.approx(0.5, abs=1e-6)
    assert ts.seasonal_lags(24, 2) == [1, 2, 24, 25, 26, 48, 49, 50] and len(ts.seasonal_lags(24, 29)) == 89
    assert torch.equal(ts.companion(torch.tensor([0.5, 0.25])), torch.tensor([[0.5, 0.25], [1.0, 0.0]]))
    coef, error = ts.levinson(torch.tensor([1, 0.5, 0.25], dtype=torch.float64))
    assert coef.tolist() == [0.5, 0] and error.tolist() == [1, 0.75, 0.75]
    assert ts.psi_weights(ts.LagModel([1], [0.5], centre=False), 3).tolist() == [1, 0.5, 0.25]
    assert ts.windows(torch.arange(4.0)[:, None], 3).tolist() == [[[0, 1, 2]], [[1, 2, 3]]]
    assert ts.fill(np.array([[1.0], [2], [math.nan], [4]]), 2)[:, 0].tolist() == [1, 2, 1, 4]
    five = torch.tensor([-2.0, -1, 0, 1, 2])[:, None, None]
    for conformal in (False, True):
        assert [float(v) for v in ts.residual_interval(five, 0.5, conformal)] == [-1, 1]


def test_levinson_solves_the_toeplitz_system_and_is_stable():
    for seed in range(3):
        table = noise(80, 2, seed).cumsum(0)  # a random walk: as hard as it gets
        r = ts.autocovariance(table, 20)
        slow = [(sum(((c := table[:, i] - table[:, i].mean())[k:] * c[: 80 - k]).sum() for i in range(2)) / 160).item() for k in range(21)]
        assert np.allclose(r, slow)
        coef, error = ts.levinson(r)
        toeplitz = torch.stack([r[(torch.arange(20) - i).abs()] for i in range(20)])
        assert torch.allclose(coef, torch.linalg.solve(toeplitz, r[1:]), atol=1e-8)
        assert error[-1] == pytest.approx((r[0] - coef @ r[1:]).item()) and (error.diff() <= 1e-12).all()
        assert ts.radius(coef) < 1


def test_seasonal_ar_rollout_is_a_companion_power():
    model = ts.fit_lags(torch.tensor(waves(600)), ts.seasonal_lags(24, 3), 24)
    dense = model.coefficients()  # the share of the window mean included
    A = ts.companion(dense)
    history = torch.tensor(waves(model.lookback, seed=5)).T[None]
    state = history[0, 0].flip(0)
    expected = [(torch.linalg.matrix_power(A, h) @ state)[0] for h in range(1, 41)]
    made = ts.rollout(model, history, 40)
    assert torch.allclose(made[0, 0], torch.stack(expected), atol=1e-8)
    assert torch.allclose(history @ model.matrix(40), made, atol=1e-8), "the roll-out of a linear rule is one matrix"
    assert dense.sum().item() == pytest.approx(1) and ts.radius(dense) <= 1.0001


def test_psi_weights_are_the_spread_of_simulated_futures():
    model = ts.LagModel([1, 2, 5], [0.5, -0.3, 0.2], centre=False)
    model.sigma = torch.tensor([0.7], dtype=torch.float64)
    generator, paths = torch.Generator().manual_seed(0), torch.zeros(40_000, 1, 5, dtype=torch.float64)
    for _ in range(8):
        shock = 0.7 * torch.randn(40_000, 1, 1, generator=generator, dtype=torch.float64)
        paths = torch.cat([paths, model(paths[..., -5:]) + shock], -1)
    spread = paths[:, 0, 5:].std(0)
    assert torch.allclose(0.7 * ts.psi_weights(model, 8).square().cumsum(0).sqrt(), spread, rtol=0.02)
    lower, upper = ts.psi_interval(model, 8, 0.8)
    inside = ((paths[:, 0, 5:] > lower[0]) & (paths[:, 0, 5:] < upper[0])).double().mean(0)
    assert torch.allclose(inside, torch.full((8,), 0.8, dtype=torch.float64), atol=0.01)


def test_an_unstable_fit_does_not_explode():
    growing = torch.tensor(1.05 ** np.arange(200.0))[:, None] * (1 + 0.01 * noise(200, 1))
    for lags, centre in (([1, 2, 3], False), (range(1, 9), True), (ts.seasonal_lags(12, 3), True)):
        model = ts.fit_lags(growing, lags, centre=centre)
        assert ts.radius(model.coefficients()) <= 1.0002
        future = ts.rollout(model, growing.T[None], 2000)
        assert future.isfinite().all() and future.abs().max() < 10 * growing.max()
    raw = ts.LagModel([1, 2], [1.5, -0.4], centre=False)
    assert ts.radius(raw.coefficients()) > 1
    before = torch.linalg.eigvals(ts.companion(raw.coefficients())).abs().max()
    ts.stabilise(raw)
    after = torch.linalg.eigvals(ts.companion(raw.coefficients())).abs().max()
    assert before > 1 > after and after.item() == pytest.approx(0.999)


# --- nets ------------------------------------------------------------------------------------------------------------


def test_decoder_positions_do_not_see_later_tokens():
    torch.manual_seed(0)
    model = ts.SegmentDecoder(4, 6, 8, 16, 2).eval()
    z = torch.randn(3, 24)
    y = model.segments(z)
    changed = z.clone()
    changed[:, 12:] += 1
    again = model.segments(changed)
    assert torch.equal(y[:, :3], again[:, :3]) and not torch.allclose(y[:, 3], again[:, 3])


def test_decoder_starts_as_the_mean_of_the_days_and_trains_every_position():
    torch.manual_seed(0)
    model = ts.SegmentDecoder(4, 6, 8, 16, 1).eval()
    torch.nn.init.zeros_(model.gate)
    x = torch.randn(2, 3, 24, dtype=torch.float32)
    assert torch.allclose(model(x), x.unflatten(-1, (6, 4)).mean(-2).repeat(1, 1, 2), atol=1e-4)
    w = torch.randn(5, 1, 32)  # 24 of history and 8 to come
    level, spread = w[..., :24].mean(-1, keepdim=True), (w[..., :24].var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    z, total = ((w - level) / spread)[:, 0], []
    for i in range(6):
        forecast = z[:, : 4 * (i + 1)].unflatten(-1, (i + 1, 4)).mean(1).repeat(1, 2)
        total.append(((forecast - z[:, 4 * (i + 1) : 4 * (i + 1) + 8]) * spread[:, 0]).square().mean())
    assert model.loss(w, 0.0).item() == pytest.approx(np.mean([t.item() for t in total]), rel=1e-5)


def test_itransformer_permutes_with_its_columns_and_takes_any_number():
    torch.manual_seed(0)
    model = ts.ITransformer(12, 5, 16, 2).eval()
    x, order = torch.randn(4, 6, 12), torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(model(x)[:, order], model(x[:, order]), atol=1e-5)
    assert model(torch.randn(2, 11, 12)).shape == (2, 11, 5)
    moved = x.clone()
    moved[:, 0] = torch.randn(4, 12)
    assert not torch.allclose(model(x)[:, 1], model(moved)[:, 1]), "columns are mixed"


@pytest.mark.parametrize("name", ["itransformer", "decoder"])
def test_nets_follow_level_and_scale(name):
    torch.manual_seed(0)
    model = ts.ITransformer(24, 8, 16, 1) if name == "itransformer" else ts.SegmentDecoder(4, 6, 8, 16, 1)
    model.eval()
    x = torch.randn(2, 3, 24)
    assert torch.allclose(model(x) * 50 + 1000, model(x * 50 + 1000), atol=0.05)


def test_dlinear_is_the_sum_of_two_linear_maps():
    torch.manual_seed(0)
    model, x = ts.DLinear(30, 4, kernel=5), torch.randn(2, 3, 30)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2)), mode="edge")
    trend = torch.tensor(np.stack([padded[..., i : i + 5].mean(-1) for i in range(30)], -1))
    assert torch.allclose(model(x), model.season(x - trend) + model.trend(trend), atol=1e-5)


def test_ar_net_finds_what_least_squares_finds():
    table = torch.tensor(ts.ar_process({1: 0.5, 3: -0.3}, 5000, seed=0), dtype=torch.float32)
    ols = ts.fit_lags(table, range(1, 6), centre=False).weight[:, 0]
    net = ts.ARNet(5, centre=False)
    ts.train(net, table, (400, 512, 1e-2), 0, "arnet")
    assert (net.coefficients() - ols).abs().max() < 0.01
    assert ts.stpe(net.coefficients(), torch.tensor([0.5, 0, -0.3, 0, 0])) < 10


def test_sparse_ar_net_beats_least_squares_when_most_lags_are_idle():
    true = torch.zeros(60, dtype=torch.float64)
    true[[0, 2, 9]] = torch.tensor([0.2, 0.3, -0.5], dtype=torch.float64)
    table = torch.tensor(ts.ar_process(ts.AR_TRUTH, 20_000, seed=1), dtype=torch.float32)
    net = ts.ARNet(60, sparsity=0.05, centre=False)
    assert net.penalty().item() < 0.01
    net.loss(torch.randn(4, 1, 61), 1.0).backward()
    assert net.linear.weight.grad.isfinite().all(), "the penalty has a finite gradient at zero"
    ts.train(net, table, (600, 512, 5e-3), 0, "arnet")
    ols = ts.fit_lags(table, range(1, 61), centre=False).weight[:, 0]
    assert ts.stpe(net.coefficients(), true) < 0.5 * ts.stpe(ols, true)
    assert (net.coefficients().abs() > 0.05).nonzero().flatten().tolist() == [0, 2, 9]


def test_batches_visit_every_window_once_an_epoch():
    seen = torch.cat([ts.batch_indices(step, 4, 12, seed=3) for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12)) and seen.tolist() != list(range(12))
    assert len(ts.batch_indices(5, 64, 10, seed=0)) == 10


# --- training goes on exactly where it stopped ----------------------------------------------------------------------------


def decoder():
    torch.manual_seed(1)
    return ts.SegmentDecoder(4, 5, 8, 16, 1)


def test_resume_is_bit_identical(tmp_path):
    table, recipe = torch.tensor(waves(300), dtype=torch.float32), (30, 16, 1e-3)
    straight, path = decoder(), tmp_path / "last.pt"
    losses = ts.train(straight, table, recipe, 7, "decoder")
    cut, calls = decoder(), []
    loss = cut.loss

    def until_ctrl_c(w, progress):
        calls.append(progress)
        if len(calls) == 13:
            signal.raise_signal(signal.SIGINT)
        return loss(w, progress)
    cut.loss = until_ctrl_c
    with pytest.raises(KeyboardInterrupt, match="step 13 .*--resume"):
        ts.train(cut, table, recipe, 7, "decoder", path)
    resumed = decoder()
    torch.manual_seed(999)  # the checkpoint brings its own
    assert ts.train(resumed, table, recipe, 7, "decoder", path, resume=True) == losses
    for a, b in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_run_or_half_a_file_is_one_clear_error(tmp_path):
    table, path = torch.tensor(waves(300), dtype=torch.float32), tmp_path / "last.pt"
    ts.train(decoder(), table, (2, 16, 1e-3), 7, "decoder", path)
    with pytest.raises(ts.UserError, match="was made with"):
        ts.train(decoder(), table, (4, 16, 1e-3), 7, "decoder", path, resume=True)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ts.UserError, match="last.pt"):
        ts.train(decoder(), table, (2, 16, 1e-3), 7, "decoder", path, resume=True)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    table, path = torch.tensor(waves(300), dtype=torch.float32), tmp_path / "last.pt"
    ts.train(decoder(), table, (2, 16, 1e-3), 7, "decoder", path)
    before = path.read_bytes()
    with pytest.raises(ts.UserError, match="loss of decoder is nan at step 0"):
        ts.train(decoder(), table * math.nan, (2, 16, 1e-3), 7, "decoder", path)
    assert path.read_bytes() == before


# --- intervals -------------------------------------------------------------------------------------------------------


def test_quantiles_never_cross_and_widen_with_the_level():
    errors = noise(200, 3 * 10, 4).view(200, 3, 10) + 5  # biased on purpose
    errors[::7, 1, 3] = math.nan
    for conformal in (False, True):
        inner, outer = (ts.residual_interval(errors, level, conformal) for level in (0.5, 0.9))
        assert (outer[0] <= inner[0]).all() and (inner[0] <= inner[1]).all() and (inner[1] <= outer[1]).all()


def test_conformal_covers_new_errors_exactly_as_promised():
    e = noise(20, 20_000)  # 19 calibration errors and a new one: rank ceil(20 * 0.8) = 16, so P(inside) = 16/20
    lower, upper = ts.residual_interval(e[:19, :, None], 0.8, conformal=True)
    inside = ((lower[:, 0] <= e[19]) & (e[19] <= upper[:, 0])).double().mean().item()
    assert abs(inside - 0.8) < 4 * math.sqrt(0.16 / 20_000)


def test_coverage_counts_by_block_and_skips_missing():
    errors = torch.tensor([[[0.0, 3.0, 0.0]], [[0.0, 0.0, math.nan]]])
    inside, width = ts.coverage(errors, (-torch.ones(1, 3), torch.ones(1, 3)), 2)
    assert inside == [0.75, 1.0] and width == [2.0, 2.0]


# --- any CSV -----------------------------------------------------------------------------------------------------------


def test_fill_never_looks_ahead():
    table = waves(100)
    table[40:45] = table[60, 0] = math.nan
    later = table.copy()
    later[70:] += 100
    assert np.array_equal(ts.fill(table, 24)[:70], ts.fill(later, 24)[:70]) and not np.isnan(ts.fill(table, 24)).any()
    assert np.array_equal(ts.fill(table, 24)[40:45], ts.fill(table, 24)[16:21])


def test_season_is_found_and_not_invented():
    assert ts.find_period(waves(600, period=24)) == 24 and ts.find_period(waves(150, period=12)) == 12
    assert ts.find_period(waves(400, period=7) + 0.05 * np.arange(400)[:, None]) == 7
    assert ts.find_period(ts.seasonal_process(2000, 0)) == 24, "a day, not a week"
    hidden = 20 * np.random.default_rng(0).normal(size=(1500, 1)).cumsum(0) / 100 + waves(1500, 1)  # a day behind weather
    assert ts.find_period(hidden, usual=24) == 24
    assert ts.find_period(noise(1500, 1).cumsum(0).numpy(), usual=24) == 1
    steps = {("seconds", 3600.0): 24, ("seconds", 900.0): 96, ("seconds", 86400.0): 7, ("months", 3): 4, ("month ends", 1): 12,
             ("weekdays", 1): 5, ("months", 12): 0, ("seconds", 7.0): 0, ("rows", 5): 0}
    assert {step: ts.usual_season(step) for step in steps} == steps
    assert ts.find_period(noise(500, 1).numpy()) == 1 and ts.find_period(noise(500, 1).cumsum(0).numpy()) == 1


@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M:%S", "%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M", "%d.%m.%Y %H:%M", "%Y-%m-%dT%H:%M:%SZ",
                                  "%d-%b-%Y %H:%M", "%Y/%m/%d %I:%M %p", "%d/%m/%y %H:%M", "%Y-%m-%d %H:%M:%S.000+02:00"])
def test_date_orders(tmp_path, form):
    series = read(tmp_path, rows_of(range(24 * 40), "2021-01-28", form=form), period=24)
    assert series.dates[0] == datetime.datetime(2021, 1, 28) and series.dates[-1] == datetime.datetime(2021, 3, 8, 23)
    assert series.step == ("seconds", 3600.0) and series.columns == ["v"]


def test_ambiguous_days_are_settled_by_the_clock(tmp_path):
    first_days = read(tmp_path, rows_of(range(12), "2021-03-01", 24, "%d/%m/%Y"), period=1)  # 01/03, 02/03, ... 12/03
    assert first_days.dates[1] == datetime.datetime(2021, 3, 2)
    american = read(tmp_path, rows_of(range(12), "2021-03-01", 24, "%m/%d/%Y"), period=1)
    assert american.dates[1] == datetime.datetime(2021, 3, 2)


@pytest.mark.parametrize("dates, unit, following", [
    (["2023-11-30", "2023-12-31", "2024-01-31"], "month ends", ["2024-02-29", "2024-03-31"]),
    (["2023-10-31", "2024-01-31", "2024-04-30"], "month ends", ["2024-07-31", "2024-10-31"]),
    (["2023-01-15", "2023-02-15", "2023-03-15", "2023-04-15"], "months", ["2023-05-15", "2023-06-15"]),
    (["2020-01-01", "2021-01-01", "2022-01-01"], "months", ["2023-01-01", "2024-01-01"]),
    (["2024-02-26", "2024-02-27", "2024-02-28"], "seconds", ["2024-02-29", "2024-03-01"]),
    ([f"2024-03-{d:02}" for d in (4, 5, 6, 7, 8, 11, 12, 13, 14, 15)], "weekdays", ["2024-03-18", "2024-03-19"])])
def test_the_forecast_starts_one_step_after_the_last_row(dates, unit, following):
    dates = [datetime.datetime.fromisoformat(d) for d in dates]
    step = ts.find_step(dates)
    assert step[0] == unit
    assert [ts.label(ts.advance(dates[-1], step, k), step) for k in (1, 2)] == following
    for i, d in enumerate(dates):
        assert ts.position(d, dates[0], step) == pytest.approx(i) and ts.advance(dates[0], step, i) == d


def test_a_missing_and_a_doubled_hour_of_the_clock_change(tmp_path):
    rows = rows_of(range(100), "2024-03-30").splitlines()
    del rows[1 + 26]  # the hour that spring takes
    rows.insert(60, rows[59].rsplit(",", 1)[0] + ",77")  # the hour that autumn gives twice
    series = read(tmp_path, "\n".join(rows), period=24)
    assert len(series.dates) == 100 and np.isnan(series.observed[26, 0]) and series.values[26, 0] == 2.0
    assert series.dates[26] == datetime.datetime(2024, 3, 31, 2)
    assert series.observed[59, 0] == (59 + 77) / 2
    assert any("1 times have no row" in n for n in series.notes) and any("averaged" in n for n in series.notes)


def messy(path, rows=700):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(rows):
        when = datetime.datetime(2023, 1, 25) + datetime.timedelta(hours=i)
        sales = f"{5000 + 1000 * math.sin(i * math.pi / 12) + rng.normal(0, 50):,.1f}"
        lines.append(f'{when:%d/%m/%Y %H:%M},"{sales}",{10 + math.cos(i * math.pi / 12) + rng.normal(0, 0.1):.2f},rain,7')
    lines[50] = lines[50].split(",")[0] + ",NaN,,sun,7"
    lines[60] = lines[60].split(",")[0] + ",,broken,sun,7"
    lines[99], lines[100] = lines[100], lines[99]
    lines.insert(200, lines[199])
    del lines[300:312]
    return write(path, "when,sales,temp,weather,station\n" + "\n".join(lines) + "\n")


def test_a_messy_file_is_read_and_reported(tmp_path):
    series = ts.read_csv(messy(tmp_path / "m.csv"))
    assert series.columns == ["sales", "temp"] and series.values.shape == (700, 2) and series.period == 24
    assert 3800 < series.values[:, 0].min() and series.values[:, 0].max() < 6200 and not np.isnan(series.values).any()
    told = "\n".join(series.notes)
    for words in ("'when' read as %d-%m-%Y %H:%M", "'weather' is text", "'station' never changes", "1 cells are no numbers", "sorted",
                  "1 rows share", "12 times have no row", "missing: 28 of 1400"):
        assert words in told, told


def test_forecast_command_writes_dates_units_and_bounds(tmp_path):
    out = tmp_path / "out"
    metrics = ts.main(["forecast", "--data", str(messy(tmp_path / "m.csv")), "--horizon", "30", "--out", str(out), "--target", "sales"])
    with open(out / "forecast.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["date", "sales", "sales_lower", "sales_upper"] and len(rows) == 30
    assert rows[0]["date"] == "2023-02-23 04:00:00" and rows[-1]["date"] == "2023-02-24 09:00:00"
    for i, row in enumerate(rows):
        lower, middle, upper = (float(row["sales" + k]) for k in ("_lower", "", "_upper"))
        assert lower <= middle <= upper and abs(middle - (5000 + 1000 * math.sin((700 + i) * math.pi / 12))) < 300
    assert metrics["skill"] > 0 and (out / "forecast.png").stat().st_size > 10_000
    saved = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert {"name", "params", "fit_seconds", "lookback", "mse", "mae"} <= set(saved["models"][0])


def test_the_forecast_of_a_known_process_is_its_closed_form(tmp_path):
    """x_t - m = 0.9 (x_{t-1} - m) + e: the forecast is m + 0.9^h (x_T - m), with the mean m of the last 200 rows, in units."""
    x = 50 + ts.ar_process({1: 0.9}, 3000, seed=6)[:, 0]
    out = tmp_path / "out"
    write(tmp_path / "my.csv", rows_of(x, "2020-01-01"))
    ts.main(["forecast", "--data", str(tmp_path / "my.csv"), "--horizon", "5", "--model", "ar", "--order", "1",
             "--lookback", "200", "--period", "1", "--out", str(out)])
    with open(out / "forecast.csv", encoding="utf-8") as file:
        made = [float(row["v"]) for row in csv.DictReader(file)]
    level = x[-200:].mean()
    assert abs(x[-1] - x[-2]) > 1 and made == pytest.approx([level + 0.9**h * (x[-1] - level) for h in range(1, 6)], abs=0.3)


@pytest.mark.parametrize("text, say", [
    ("date,a,b\n" + "".join(f"2020-01-{i:02},5,x\n" for i in range(1, 20)), "'a' never changes; column 'b' is text"),
    ("a,b\n1,2\n", "at least three rows"),
    ("", "at least three rows"),
    ("date,v\n" + "".join(f"2020-01-01 00:{m:02}:00,{m}\n" for m in (0, 1, 2, 4, 9, 17, 21, 33, 34, 52, 53, 58)), "no regular clock"),
    ("date,v\n" + "".join(f"2020-01-01,{i}\n" for i in range(9)), "1 different dates"),
    ("v,v\n1,2\n2,3\n3,4\n4,5\n", "two columns have the same name"),
    (rows_of(range(30)), "too few to test a horizon of 48: use --horizon"),
])
def test_files_that_cannot_be_used_say_why(tmp_path, text, say):
    path = write(tmp_path / "my.csv", text)
    with pytest.raises(ts.UserError, match=re.escape(say)):
        ts.main(["forecast", "--data", str(path), "--out", str(tmp_path / "out"), "--period", "1"])


@pytest.mark.parametrize("flags, say", [
    (["--target", "nothing"], "no such column; it has sales, temp"),
    (["--target", "weather"], "is text"),
    (["--target", "station"], "never changes"),
    (["--model", "magic"], "no rung 'magic'"),
    (["--horizon", "0"], "--horizon must be"),
    (["--horizon", "two"], "--horizon must be"),
    (["--period", "day"], "--period must be"),
    (["--period", "1440"], "at most 700 rows"),
    (["--period", "600"], "do not hold two seasons"),
    (["--data", "nowhere.csv"], "no such file"),
    (["--level", "1.5"], "--level must lie"),
])
def test_wrong_flags_say_what_to_do(tmp_path, flags, say):
    argv = ["forecast", "--data", str(messy(tmp_path / "m.csv")), "--out", str(tmp_path / "out"), *flags]
    with pytest.raises(ts.UserError, match=re.escape(say)):
        ts.main(argv)


def test_a_spreadsheet_is_not_a_csv(tmp_path):
    (tmp_path / "my.csv").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(ts.UserError, match="not UTF-8"):
        ts.read_csv(tmp_path / "my.csv")


def test_row_numbers_are_no_data_and_empty_rows_at_the_end_are_the_future(tmp_path):
    v = waves(80, 1)[:, 0]
    lines = rows_of([f"{x:.3f}" for x in v] + [""] * 10).splitlines()
    text = "\n".join(["," + lines[0]] + [f"{i},{line}" for i, line in enumerate(lines[1:])])  # as pandas writes its index
    series = read(tmp_path, text)
    assert series.columns == ["v"] and len(series.dates) == 80 and not np.isnan(series.observed).any()
    assert series.dates[-1] == datetime.datetime(2024, 1, 4, 7)
    assert any("only counts the rows" in n for n in series.notes) and any("last 10 rows hold no number" in n for n in series.notes)


def test_files_without_dates(tmp_path):
    plain = read(tmp_path, "v\n" + "".join(f"{v:.3f}\n" for v in waves(100, 1)[:, 0]))
    assert plain.dates == list(range(100)) and ts.advance(99, plain.step, 1) == 100
    counted = read(tmp_path, "t,v\n" + "".join(f"{10 + 5 * i},{v:.3f}\n" for i, v in enumerate(waves(100, 1)[:, 0])))
    assert counted.columns == ["v"] and counted.dates[:2] == [10, 15] and counted.step == ("rows", 5)
    headless = read(tmp_path, "".join(f"2020-01-01 {h:02}:00,{h % 7}\n" for h in range(24)), period=1)
    assert headless.columns == ["column 1"] and len(headless.values) == 24


def test_decimal_commas_and_thousands(tmp_path):
    german = read(tmp_path, "Datum;Umsatz\n" + "".join(f"{d:02}.01.2020;1.23{d % 10},5{d % 7}\n" for d in range(1, 29)), period=1)
    assert german.values[0, 0] == pytest.approx(1231.51) and german.dates[0] == datetime.datetime(2020, 1, 1)
    assert ts.to_number("1,234.5") == 1234.5 and ts.to_number("rain") is None and math.isnan(ts.to_number("n/a"))
    assert math.isnan(ts.to_number("inf"))


# --- the program -------------------------------------------------------------------------------------------------------


def test_eval_runs_every_rung_and_means(tmp_path):
    metrics = ts.main(["eval", "--data", "seasonal", "--steps", "2", "--width", "16", "--layers", "1", "--horizon", "24,48", "--stride", "11",
                       "--model", "all", "--out", str(tmp_path), "--seeds", "2"])
    rows = {row["name"]: row for row in metrics["models"]}
    assert set(rows) == set(ts.RUNGS) and len(rows["decoder"]["mse_average_by_seed"]) == 2 and len(rows["sar"]["mse_average_by_seed"]) == 1
    assert rows["repeat"]["params"] == rows["snaive"]["params"] == 0 and rows["sar"]["params"] == 89
    assert rows["snaive"]["skill"] == 0 and rows["sar"]["skill"] > 0.2
    assert rows["sar+decoder"]["mse_average_by_seed"][0] != rows["sar+decoder"]["mse_average_by_seed"][1]
    assert rows["sar+decoder"]["params"] == rows["sar"]["params"] + rows["decoder"]["params"]
    assert {p.name for p in tmp_path.iterdir()} >= {"ladder.png", "windows.png", "metrics.json", "decoder-0", "decoder-1"}
    again = ts.main(["eval", "--data", "seasonal", "--steps", "2", "--width", "16", "--layers", "1", "--horizon", "24,48", "--stride", "11",
                     "--model", "decoder", "--out", str(tmp_path), "--resume"])
    assert again["models"][0]["mse_average_by_seed"][0] == pytest.approx(rows["decoder"]["mse_average_by_seed"][0], abs=1e-9)


def test_no_forecast_beats_the_floor_on_average():
    series = ts.load_series(tiny(data="seasonal"))
    arena = ts.Arena(series, ts.borders(series, 24), [24], tiny(), "cpu")
    (sar,) = arena.climb(["sar"])
    error = (sar.made["test"] - arena.truth["test"]).square().nanmean((0, 1)).numpy()
    assert arena.floor(24)[0] == pytest.approx(np.mean(arena.scaler.std**-2.0)) and (error > 0.9 * arena.floor(24)).all()
    assert error[0] < 1.25 * arena.floor(24)[0], "one step ahead the seasonal AR is near the floor"


def test_exit_codes_and_a_silent_import(tmp_path):
    run = lambda *argv: subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT)
    bad = run("nano_ts.py", "forecast", "--data", "nowhere.csv", "--out", str(tmp_path))
    assert bad.returncode == 2 and bad.stderr.startswith("nano_ts: error: ") and bad.stderr.count("\n") == 1
    quiet = run("-c", "import nano_ts")
    assert quiet.returncode == 0 and quiet.stdout == quiet.stderr == ""


def test_check_fails_when_the_band_is_missed():
    config = tiny(data="etth1", check=True)
    ts.check(config, {"models": [{"name": "sar", "mse_average": 0.391}]})
    with pytest.raises(SystemExit, match="sar 0.5000 > 0.393"):
        ts.check(config, {"models": [{"name": "sar", "mse_average": 0.5}]})
