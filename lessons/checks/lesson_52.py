"""Checks of lesson 52. Oracles: counting loops, quantiles and ranks of sorted lists, the integral of the law of an order statistic, and the exact coverage of new errors."""

import math

import torch

from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_holes(errors, share, seed=9):
    """NaN in this share of the places, but never in all errors of a column and step."""
    holes = torch.rand(errors.shape, generator=torch.Generator().manual_seed(seed)) < share
    holes[0] = False
    return errors.masked_fill(holes, math.nan)


SHAPES = ((1, 1, 1), (5, 1, 3), (19, 3, 7), (40, 2, 24))


# --- the judge --------------------------------------------------------------------------------------------------------


@exercise(
    ("the error is not the offset of the truth", "(-errors >= low) & (-errors <= high)", "(errors >= low) & (errors <= high)"),
    ("one bound is enough", "(-errors >= low) & (-errors <= high)", "(-errors >= low) | (-errors <= high)"),
    ("missing truths count as outside", "(~errors.isnan()).sum((0, 1))", "torch.full(errors.shape[2:], errors.shape[0] * errors.shape[1])"),
    ("missing truths count as inside", ".sum((0, 1))  # (H,): NaN is inside nothing", ".logical_or(errors.isnan()).sum((0, 1))"),
    ("a mean of shares", "i.sum() / k.sum()", "(i / k).mean()"),
    ("the last, shorter block is lost", "for i, k in pairs]", "for i, k in pairs if len(i) == min(block, len(known))]"),
    ("blocks of windows, not of steps", lambda e, low, high, block: torch.stack([((-p >= low) & (-p <= high)).double().mean() for p in e.split(block)])),
    ("below the upper bound alone", "(-errors >= low) & (-errors <= high)", "(-errors <= high)"),
)
def check_coverage(coverage):
    for shape, block, share in (((1, 1, 1), 1, 0), ((5, 1, 3), 2, 0.2), ((19, 3, 7), 3, 0.3), ((40, 2, 24), 12, 0), ((40, 2, 24), 24, 0.5)):
        e, low = with_holes(normal(*shape), share), normal(*shape[1:], seed=1) - 1
        high = low + 2 * torch.rand(low.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        truth = []
        for begin in range(0, shape[2], block):
            hits = counted = 0
            for n in range(shape[0]):
                for c in range(shape[1]):
                    for h in range(begin, min(begin + block, shape[2])):
                        x = 10 - float(e[n, c, h])  # the truth under a forecast of 10
                        if not math.isnan(x):
                            counted += 1
                            hits += 10 + float(low[c, h]) <= x <= 10 + float(high[c, h])
            truth.append(hits / counted)
        close(coverage(e, low, high, block), torch.tensor(truth), f"errors {shape}, {share:.0%} missing, block {block}")
    e = torch.tensor([[[0.0, 3.0, 0.0]], [[0.0, 0.0, math.nan]]])
    close(coverage(e, -torch.ones(1, 3), torch.ones(1, 3), 2), torch.tensor([0.75, 1.0]), "4 known and 1 known, blocks of 2")
    close(coverage(torch.tensor([[[1.5]], [[-1.5]]]), torch.tensor([[-1.0]]), torch.tensor([[2.0]]), 1), torch.tensor([0.5]),
          "the worked example: offsets -1 and 2, errors 1.5 and -1.5")


# --- quantiles of past errors -----------------------------------------------------------------------------------------


def quantile(values, q):
    """Linear between the two nearest of the sorted values."""
    values = sorted(v for v in values if not math.isnan(v))
    place = q * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


@exercise(
    ("errors are not offsets: the sign", "return low, high", "return -high, -low"),
    ("lower and upper exchanged", "return low, high", "return high, low"),
    ("a level of .8 leaves .2 on each side", "(1 - level) / 2", "(1 - level)"),
    ("the median below", "(1 + level) / 2", "0.5"),
    ("one quantile for all steps", "low = -torch.nanquantile(errors, (1 + level) / 2, 0)", "low = -torch.nanquantile(errors, (1 + level) / 2) + 0 * errors[0].nan_to_num()"),
    ("missing errors are not left out", "high = -torch.nanquantile", "high = -torch.quantile"),
    ("missing errors are 0", "low = -torch.nanquantile(errors,", "low = -torch.nanquantile(errors.nan_to_num(),"),
    ("symmetric", lambda e, level: (-torch.nanquantile(e.abs(), level, 0), torch.nanquantile(e.abs(), level, 0))),
    ("a Gaussian", lambda e, level: (-e.nan_to_num().mean(0) - 1.28 * e.nan_to_num().std(0), 1.28 * e.nan_to_num().std(0) - e.nan_to_num().mean(0))),
)
def check_residual_bounds(residual_bounds):
    low, high = residual_bounds(torch.tensor([-1.0, 0, 1, 2, 8])[:, None, None], 0.5)
    close(torch.cat([low, high], 1), torch.tensor([[-2.0, 0.0]]), "the worked example")
    for shape, level, share in zip(SHAPES, (0.8, 0.5, 0.9, 0.75), (0, 0.2, 0.3, 0)):
        e = with_holes(normal(*shape) + 0.3, share)
        low, high = residual_bounds(e, level)
        for name, ours, q in (("low", low, (1 + level) / 2), ("high", high, (1 - level) / 2)):
            truth = [[-quantile(e[:, c, h].tolist(), q) for h in range(shape[2])] for c in range(shape[1])]
            close(ours, torch.tensor(truth, dtype=torch.float64), f"{name}, errors {shape}, level {level}, {share:.0%} missing")
    inner, outer = residual_bounds(normal(200, 3, 10) + 5, 0.5), residual_bounds(normal(200, 3, 10) + 5, 0.9)
    need((outer[0] <= inner[0]).all() and (inner[0] <= inner[1]).all() and (inner[1] <= outer[1]).all(),
         "a higher level must give wider bounds, and the lower bound must not cross the upper one")


# --- conformal --------------------------------------------------------------------------------------------------------


@exercise(
    ("rank of N, not of N + 1", "(known + 1).double()", "known.double()"),
    ("rounded down", ".ceil()", ".floor().clamp(min=1)"),
    ("clamped: a promise that 20 errors cannot keep", ".ceil().long()", ".ceil().long().minimum(known)"),
    ("rounding lifts 55.00000000000001 to 56", " - 1e-9", ""),
    ("missing errors counted", "known = (~errors.isnan()).sum(0)", "known = torch.full(errors.shape[1:], len(errors))"),
    ("float32 lifts 15.000001 to 16", "(known + 1).double()", "(known + 1)"),
    ("signed errors", "errors.abs()", "errors"),
    ("one rank too far", "k[None] - 1", "k[None]"),
    ("one width for all steps", "return sizes.gather(0, k[None] - 1)[0]", "return sizes.gather(0, k[None] - 1)[0].amax(1, keepdim=True).expand(errors.shape[1:])"),
    ("infinity forgotten: an interpolated quantile", lambda e, level: torch.nanquantile(e.abs(), level, 0)),
)
def check_conformal_width(conformal_width):
    e = torch.tensor([3.0, -1, 2, -5])[:, None, None]
    close(conformal_width(e, 0.6), torch.tensor([[3.0]]), "errors 3, -1, 2, -5 at .6")
    need(conformal_width(e, 0.9).isinf().all(), "4 errors at .9 ask for the fifth smallest of four: infinity")
    for shape, level, share in (((1, 1, 1), 0.5, 0), ((5, 1, 3), 0.5, 0.2), ((19, 3, 7), 0.8, 0.3), ((20, 2, 3), 0.99, 0), ((99, 1, 2), 0.55, 0), ((24, 2, 1), 0.6, 0)):
        e, truth = with_holes(normal(*shape), share), []
        for column in e.permute(1, 2, 0).tolist():
            for seen in column:
                sizes = sorted(abs(v) for v in seen if not math.isnan(v))
                # the smallest rank k with k / (N + 1) >= level, found by counting, in whole percents
                k = next(k for k in range(1, len(sizes) + 2) if 100 * k >= round(100 * level) * (len(sizes) + 1))
                truth.append((sizes + [math.inf])[k - 1])
        ours, truth = conformal_width(e, level), torch.tensor(truth, dtype=torch.float64).view(shape[1:])
        need(ours.shape == truth.shape, f"errors {shape}: shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}")
        same = (ours.isinf() == truth.isinf()).all()
        need(same, f"errors {shape}, level {level}: infinite where finite is right, or the other way round (missing ones counted?)")
        close(ours.nan_to_num(posinf=0), truth.nan_to_num(posinf=0), f"errors {shape}, level {level}, {share:.0%} missing")
    e = normal(20, 1, 20_000)  # 19 errors and a new one: 16 of 20 ranks are inside
    inside = (e[19].abs() <= conformal_width(e[:19], 0.8)).double().mean().item()
    need(abs(inside - 0.8) < 4 * math.sqrt(0.16 / 20_000), f"new errors are inside with {inside:.3f}, wanted .8")


# --- what one calibration covers --------------------------------------------------------------------------------------


def by_integral(N, level):
    """The k-th of N uniform numbers has density ~ u^(k-1) (1-u)^(N-k); its mean and deviation on a fine grid."""
    k = next((k for k in range(1, N + 1) if 1000 * k >= round(1000 * level) * (N + 1)), None)
    if k is None:
        return 1.0, 0.0
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    log = (k - 1) * u.log() + (N - k) * (-u).log1p()
    p = (log - log.max()).exp()
    p = p / p.sum()
    mean = (p * u).sum()
    return float(mean), float((p * (u - mean) ** 2).sum().sqrt())


@exercise(
    ("the level itself", "return k / (N + 1)", "return level"),
    ("divided by N", "return k / (N + 1)", "return k / N"),
    ("rounded down", "math.ceil((N + 1) * level - 1e-9)", "math.floor((N + 1) * level)"),
    ("clamped", "return 1.0, 0.0", "k = N"),
    ("no 1e-9", " - 1e-9", ""),
    ("the variance", "math.sqrt(k * (N + 1 - k) / (N + 2)) / (N + 1)", "k * (N + 1 - k) / (N + 2) / (N + 1) ** 2"),
    ("a binomial's deviation", "math.sqrt(k * (N + 1 - k) / (N + 2)) / (N + 1)", "math.sqrt(level * (1 - level) / N)"),
    ("N + 1 for N + 2", "/ (N + 2)", "/ (N + 1)"),
)
def check_promise(promise):
    for N, level in ((19, 0.8), (1, 0.5), (7, 0.6), (99, 0.55), (399, 0.8), (20, 0.95), (30, 0.9), (20, 0.99)):
        ours = promise(N, level)
        need(isinstance(ours, tuple) and len(ours) == 2, "return two numbers, mean and deviation")
        close(torch.tensor(ours, dtype=torch.float64), torch.tensor(by_integral(N, level), dtype=torch.float64), f"promise({N}, {level})", 1e-4)


# --- bounds for whole curves ------------------------------------------------------------------------------------------


@exercise(
    ("the shape made from the errors that are ranked", "shape, rest = errors[:n].square()", "shape, rest = errors.square()"),
    ("the same errors ranked", "errors[n:]", "errors"),
    ("the mean over steps: a curve may stick out", ".amax(-1)", ".mean(-1)"),
    ("signed errors", "rest.abs()", "rest"),
    ("rank of N, not of N + 1", "(known + 1).double()", "known.double()"),
    ("clamped", ".ceil().long()", ".ceil().long().minimum(known)"),
    ("one shape for all steps", ".nanmean(0).sqrt()", ".nanmean((0, 2)).sqrt()[:, None].expand(errors.shape[1:])"),
    ("the scores are not widths yet", "* shape", "* torch.ones_like(shape)"),
    ("windows with a hole counted", "known = (~scores.isnan()).sum(0)", "known = torch.full(scores.shape[1:], len(scores))"),
    ("each step on its own", lambda e, level: e[len(e) // 3 :].abs().nan_to_num(nan=math.inf).sort(0).values[-max(1, int(len(e) * (1 - level) * 2 / 3))]),
)
def check_path_width(path_width):
    for shape, level, share in (((6, 1, 1), 0.5, 0), ((31, 1, 3), 0.6, 0.05), ((60, 3, 7), 0.8, 0.01), ((9, 2, 4), 0.99, 0)):
        e = with_holes(normal(*shape) * torch.linspace(1, 3, shape[2]), share)
        first, truth = shape[0] // 3, torch.zeros(shape[1:], dtype=torch.float64)
        for c in range(shape[1]):
            size = []
            for h in range(shape[2]):
                seen = [v * v for v in e[:first, c, h].tolist() if not math.isnan(v)]
                size.append(math.sqrt(sum(seen) / len(seen)))
            curves = [curve for curve in e[first:, c].tolist() if not any(map(math.isnan, curve))]
            scores = sorted(max(abs(v) / s for v, s in zip(curve, size)) for curve in curves)
            k = next(k for k in range(1, len(scores) + 2) if 100 * k >= round(100 * level) * (len(scores) + 1))
            truth[c] = (scores + [math.inf])[k - 1] * torch.tensor(size)
        ours = path_width(e, level)
        need(ours.shape == truth.shape, f"errors {shape}: shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}")
        need((ours.isinf() == truth.isinf()).all(), f"errors {shape}, level {level}: infinite in the wrong places")
        close(ours.nan_to_num(posinf=0), truth.nan_to_num(posinf=0), f"errors {shape}, level {level}, {share:.0%} missing")
    e = normal(30, 4000, 5).cumsum(-1)  # 4,000 columns: 29 curves and a new one each, 19 ranked after 10 for the shape
    inside = (e[29].abs() <= path_width(e[:29], 0.8)).all(-1).double().mean().item()
    need(abs(inside - 0.8) < 4 * math.sqrt(0.16 / 4000), f"whole new curves are inside with {inside:.3f}, wanted .8")
