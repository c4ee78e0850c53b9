"""Checks of lesson 50. Oracles: sums written as loops, a general solver, matrix powers, a recurrence step by step; all in float64."""

import math
from unittest import mock

import torch

from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stable(p, seed):
    """Weights whose absolute sum is 0.9: every shock dies out."""
    weights = normal(p, seed=seed)
    return 0.9 * weights / weights.abs().sum()


def step_matrix(weights):
    """One step of the state, entry by entry."""
    p = len(weights)
    rows = [[float(weights[j]) if i == 0 else float(j == i - 1) for j in range(p)] for i in range(p)]
    return torch.tensor(rows, dtype=torch.float64)


@exercise(
    ("the ones above the diagonal", ", -1)", ", 1)"),
    ("the ones on the diagonal", "torch.diag(torch.ones(len(weights) - 1, dtype=weights.dtype), -1)", "torch.eye(len(weights), dtype=weights.dtype)"),
    ("the weights in a column", "matrix[0] = ", "matrix[:, 0] = "),
    ("the weights in the last row", "matrix[0] = ", "matrix[-1] = "),
    ("the oldest weight first", "= weights\n", "= weights.flip(0)\n"),
    ("added to what is there", "matrix[0] = weights", "matrix += weights"),
    ("transposed", "return matrix", "return matrix.T"),
)
def check_companion(companion):
    for p in (1, 2, 3, 7):
        weights = normal(p, seed=p)
        close(companion(weights), step_matrix(weights), f"weights {[round(float(w), 2) for w in weights]}")
        history = normal(p, seed=10 + p)  # oldest first
        ahead = sum(float(weights[k - 1]) * float(history[p - k]) for k in range(1, p + 1))
        state = companion(weights) @ history.flip(0)
        need(abs(float(state[0]) - ahead) < 1e-9, f"{p} lags: one step gives {float(state[0]):.4f}, wanted {ahead:.4f}")


@exercise(
    ("divided by T - k", ".sum(0).mean())", ".mean(0).mean() * len(x))"),
    ("the mean left in", "x.double() - x.double().mean(0)", "x.double()"),
    ("one mean for all columns", "x.double().mean(0)", "x.double().mean()"),
    ("columns added", ".sum(0).mean()", ".sum()"),
    ("the circle: the end meets the start", "(x[k:] * x[:len(x) - k])", "(x * x.roll(k, 0))"),
    ("one lag too few", "range(order + 1)", "range(order)"),
    ("lag 0 left out", "range(order + 1)", "range(1, order + 1)"),
    ("autocorrelations", "torch.stack(r) / len(x)", "torch.stack(r) / r[0]"),
    ("not divided", " / len(x)\n", "\n"),
)
def check_autocovariance(autocovariance):
    cases = [(torch.tensor([[1.0], [2.0], [3.0]]), 1)]
    cases += [(3 * normal(T, C, seed=T) + torch.arange(C) + 2, order) for T, C, order in ((7, 1, 6), (20, 2, 5), (41, 3, 12))]
    for x, order in cases:
        T, C = x.shape
        wanted = []
        for k in range(order + 1):
            total = 0.0
            for c in range(C):
                column = [float(v) for v in x[:, c]]
                mean = math.fsum(column) / T
                total += math.fsum((column[t] - mean) * (column[t - k] - mean) for t in range(k, T)) / T
            wanted.append(total / C)
        close(autocovariance(x, order), torch.tensor(wanted, dtype=torch.float64), f"{T} rows, {C} columns, order {order}")


def forget_old_weights(r):
    """Right reflections would need the corrected weights."""
    weights, error = r[:0], [r[0]]
    for k in range(len(r) - 1):
        g = (r[k + 1] - (weights * r[1:k + 1].flip(0)).sum()) / error[-1]
        weights = torch.cat([weights, g[None]])
        error.append(error[-1] * (1 - g**2))
    return weights, torch.stack(error)


def by_solving(r):
    """Right values, at the price of a general solver for each order."""
    weights, error = r[:0], [r[0]]
    for k in range(1, len(r)):
        i = torch.arange(k)
        weights = torch.linalg.solve(r[(i[:, None] - i).abs()], r[1:k + 1])
        error.append(r[0] - weights @ r[1:k + 1])
    return weights, torch.stack(error)


def no_solver(*args, **kwargs):
    need(False, "no general solver: the weights for k + 1 lags follow from those for k")


@exercise(
    ("a general solver", by_solving),
    ("the autocovariances not read backwards", "r[1:k + 1].flip(0)", "r[1:k + 1]"),
    ("the weights not read backwards", "reflection * weights.flip(0)", "reflection * weights"),
    ("divided by r_0, not by what is left", "missing / error[-1]", "missing / r[0]"),
    ("the correction added", "weights - reflection", "weights + reflection"),
    ("1 - g in place of 1 - g squared", "reflection**2", "reflection"),
    ("the variance of order 0 again and again", "error.append(error[-1] * ", "error.append(error[0] * "),
    ("old weights not corrected", forget_old_weights),
    ("what the old weights explain not taken off", "r[k + 1] - (weights * r[1:k + 1].flip(0)).sum()", "r[k + 1]"),
    ("only the last variance", "torch.stack(error)", "error[-1]"),
)
def check_levinson(levinson):
    cases = [torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64)]
    for p, seed in ((3, 0), (8, 1), (20, 2)):
        walk = normal(80, seed=seed).cumsum(0)  # a random walk: as hard as it gets
        walk = walk - walk.mean()
        cases.append(torch.stack([(walk[k:] * walk[:80 - k]).sum() / 80 for k in range(p + 1)]))
    for r in cases:
        p = len(r) - 1
        wanted, errors = None, [r[0]]
        for order in range(1, p + 1):
            matrix = torch.tensor([[float(r[abs(i - j)]) for j in range(order)] for i in range(order)], dtype=torch.float64)
            wanted = torch.linalg.solve(matrix, r[1:order + 1])
            errors.append(r[0] - wanted @ r[1:order + 1])
        with mock.patch.multiple(torch.linalg, solve=no_solver, inv=no_solver, pinv=no_solver, lstsq=no_solver):
            weights, variances = levinson(r.clone())
        close(weights, wanted, f"{p} lags, the weights", 1e-6)
        close(variances, torch.stack(errors), f"{p} lags, the error variances", 1e-6)


@exercise(
    ("the shock itself left out", "torch.tensor(echo[:horizon]", "torch.tensor((echo + [0.0])[1:horizon + 1]"),
    ("the weights read backwards", "weights[k - 1]", "weights[-k]"),
    ("one lag off", "echo[j - k]", "echo[j - k + 1 if k > 1 else j - 1]"),
    ("the last lag forgotten", "min(j, len(weights)) + 1", "min(j, len(weights) - 1) + 1"),
    ("the echo of the shock alone", "min(j, len(weights)) + 1", "min(j, 1) + 1"),
    ("the weights themselves", "float(weights[k - 1]) * echo[j - k]", "float(weights[k - 1]) * (j == k)"),
    ("already added up", "torch.tensor(echo[:horizon], dtype=torch.float64)", "torch.tensor(echo[:horizon], dtype=torch.float64).cumsum(0)"),
    ("squared too early", "torch.tensor(echo[:horizon], dtype=torch.float64)", "torch.tensor(echo[:horizon], dtype=torch.float64) ** 2"),
    ("one step too many", "torch.tensor(echo[:horizon]", "torch.tensor(echo + echo[:1]"),
)
def check_psi(psi):
    cases = [(torch.tensor([0.5], dtype=torch.float64), 3), (torch.tensor([1.8, -0.9], dtype=torch.float64), 30)]
    cases += [(stable(p, p), horizon) for p, horizon in ((3, 1), (5, 4), (5, 24))]
    for weights, horizon in cases:
        M, state, wanted = step_matrix(weights), torch.zeros(len(weights), dtype=torch.float64), []
        state[0] = 1.0  # the shock has just arrived
        for _ in range(horizon):
            wanted.append(state[0].clone())
            state = M @ state
        close(psi(weights, horizon), torch.stack(wanted), f"{len(weights)} lags, {horizon} steps")


@exercise(
    ("upside down", "sigma**2 / response.abs().square()", "sigma**2 * response.abs().square()"),
    ("1 plus the lags", "1 - turns", "1 + turns"),
    ("radians taken for cycles", "-2j * torch.pi", "-1j"),
    ("the first lag counted as 0", "torch.arange(1, len(weights) + 1)", "torch.arange(len(weights))"),
    ("the amplitude, not the power", ".abs().square()", ".abs()"),
    ("deviation, not variance", "sigma**2 /", "sigma /"),
    ("the real part alone", "response.abs().square()", "response.real.square()"),
    ("the noise alone", "return sigma**2 / response.abs().square()", "return sigma**2 / response.abs().square() ** 0"),
    ("the weights read backwards", "weights.to(turns.dtype)", "weights.flip(0).to(turns.dtype)"),
)
def check_spectrum(spectrum):
    close(spectrum(torch.tensor([0.5], dtype=torch.float64), 1.0, torch.tensor([0.0, 0.5])), torch.tensor([4, 4 / 9]), "one lag of 0.5 at f = 0, 0.5")
    for p, sigma, n in ((1, 1.0, 1), (2, 0.5, 5), (6, 3.0, 24)):
        weights, f = stable(p, 20 + p), torch.linspace(0.03, 0.5, n, dtype=torch.float64)
        M, state, echo = step_matrix(weights), torch.eye(p, dtype=torch.float64)[0], []
        for _ in range(1500):  # S(f) = sigma^2 |sum_j psi_j e^(-2 pi i f j)|^2
            echo.append(float(state[0]))
            state = M @ state
        echo, j = torch.tensor(echo, dtype=torch.float64), torch.arange(1500)
        angle = 2 * math.pi * f[:, None] * j
        wanted = sigma**2 * ((echo * angle.cos()).sum(1) ** 2 + (echo * angle.sin()).sum(1) ** 2)
        close(spectrum(weights, sigma, f), wanted, f"{p} lags, sigma {sigma}")


@exercise(
    ("a circle: the end runs into the start", "torch.fft.rfft(torch.stack(F), n=2 * T)\n    spectrum_u = torch.fft.rfft(u, n=2 * T)\n    return torch.fft.irfft(spectrum_F * spectrum_u, n=2 * T)[:T]",
     "torch.fft.rfft(torch.stack(F))\n    spectrum_u = torch.fft.rfft(u)\n    return torch.fft.irfft(spectrum_F * spectrum_u, n=T)"),
    ("one step late", "        F.append(c @ state)\n        state = M @ state\n", "        state = M @ state\n        F.append(c @ state)\n"),
    ("the matrix transposed", "state = M @ state", "state = M.T @ state"),
    ("b and c exchanged", "len(u), b, []\n    for _ in range(T):\n        F.append(c @ state)", "len(u), c, []\n    for _ in range(T):\n        F.append(b @ state)"),
    ("a correlation, not a convolution", "spectrum_F * spectrum_u", "spectrum_F.conj() * spectrum_u"),
    ("the second half", "[:T]", "[T:]"),
    ("the kernel itself", "return torch.fft.irfft(spectrum_F * spectrum_u, n=2 * T)[:T]", "return torch.stack(F)"),
    ("the state not multiplied", "state = M @ state", "state = M @ b"),
)
def check_convolve(convolve):
    one = torch.ones(1, dtype=torch.float64)
    cases = [(0.5 * one[:, None], one, one, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))]
    for p, T in ((1, 1), (2, 9), (4, 33), (6, 5)):
        M = 0.9 * normal(p, p, seed=p) / p
        cases.append((M, normal(p, seed=p + 1), normal(p, seed=p + 2), normal(T, seed=p + 3)))
    for M, b, c, u in cases:
        state, wanted = torch.zeros(len(b), dtype=torch.float64), []
        for value in u:  # the recurrence, step by step
            state = M @ state + b * value
            wanted.append((c * state).sum())
        close(convolve(M, b, c, u), torch.stack(wanted), f"{len(b)} states, {len(u)} steps")
