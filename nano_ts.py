"""nano_ts: forecast a time series with its own past. A ladder of models on one protocol, and a forecast of your CSV.

Autoregression: predict the next steps, append them to the history, slide, repeat. What differs from rung to rung is
only how many steps one call emits (S) and how it reads the history:

    history x[t-L .. t-1]                 forecast, H steps
    |..............................|      |    |    |    |    |
                      [---- L ----] -> S                            call 1
                           [---- L ----] -> S                       call 2 reads its own output
                                [---- L ----] -> S                  call 3 ...

    S = 1    repeat, AR(p), seasonal AR (89 numbers), AR-Net        one weight per lag
    S = P    seasonal naive, mean seasonal profile                  nothing fitted
    S = 96   ridge, DLinear, iTransformer, segment decoder          a GPT whose tokens are days

Papers   AR and Yule-Walker (Yule 1927; Levinson 1946; Box & Jenkins 1970). AR-Net (Triebe et al. 2019,
         arXiv:1911.12436). DLinear (Zeng et al. 2023, arXiv:2205.13504), RLinear (Li et al. 2023, arXiv:2305.10721);
         all linear variants are least squares in disguise (Toner & Darlow 2024, arXiv:2403.14587). iTransformer (Liu
         et al. 2024, arXiv:2310.06625; github.com/thuml/iTransformer). AutoTimes (Liu et al. 2024, arXiv:2402.02370;
         github.com/thuml/AutoTimes).

Commands                                               two CPU cores   expect
    python nano_ts.py                                  30 s, 0.9 GB    AR weights within 2 %; lags found: 1, 3, 10
    python nano_ts.py eval --data etth1                70 s, 1.8 GB    sar+decoder: MSE 0.384, mean of 96/192/336/720
    python nano_ts.py eval --data etth1 --model sar    5 s             seasonal AR: MSE 0.391, MAE 0.412
    python nano_ts.py forecast --data my.csv --horizon 48 --target sales
                                                       seconds         OUT/forecast.csv: dates, your units, bounds
    python nano_ts.py train --data etth1 --model decoder --resume      goes on with an interrupted fit

How a CSV is read (what was assumed, dropped or filled is printed). Dates: the first column that one order of day, month
and year reads; between day-first and month-first the more regular clock wins. Rows are sorted, rows of one time are
averaged, gaps become missing values, and missing values are filled with the value one season earlier (from the past
only) and never scored. Columns of text, of a single value or more than half empty are left out and named.

Left out on purpose: calendar features, holidays, external regressors, moving-average terms, pretrained or language
models, quantile heads (fed back with their median, their intervals shrink with the horizon). Nets keep
OUT/NAME-SEED/last.pt only: the learning rate ends at zero, so the last weights are the model.

Read in this order: `rollout`, `LagModel`, `fit_lags`, `seasonal_lags`, `SegmentDecoder`, `score`, `build`; the rest is
data, reading files and pictures.
"""

import argparse
import calendar
import contextlib
import csv
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import statistics
import sys
import threading
import time
import urllib.request
from collections import Counter
from datetime import datetime, timedelta

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# config
# ---------------------------------------------------------------------------------------------------------------------

# --- shared: config
class UserError(ValueError):
    """Something the user can fix: the command line shows it as one line and exits with code 2."""


def opt(default, help, low=None, high=None, choices=None, fixed=False):
    """A field of Config and a flag. `fixed`: belongs to the checkpoint and cannot change on resume."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, fixed=fixed))


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage first; one line is enough
        raise UserError(f"{message} (--help lists all flags)")


def parse_config(cls, argv, parts, presets, description):
    """Command line -> (part, config). `--preset` changes the defaults; a flag that is given wins over the preset."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    explained = "; ".join(f"{name}: {text}" for name, text in parts.items())
    parser.add_argument("part", nargs="?", help=explained + "; without it: everything")
    flags = {field.name: "--" + field.name.replace("_", "-") for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {
            "type": field.type, "choices": field.metadata["choices"]}
        parser.add_argument(flags[field.name], default=field.default, help=field.metadata["help"] + " [%(default)s]", **kind)
    parser.set_defaults(**presets[parser.parse_known_args(argv)[0].preset])
    args = vars(parser.parse_args(argv))
    part = args.pop("part") or "all"
    if part not in ("all", *parts):
        raise UserError(f"there is no part {part!r}, only {', '.join(parts)} (--help explains)")
    for field in dataclasses.fields(cls):
        low, high, value = field.metadata["low"], field.metadata["high"], args[field.name]
        if (low is not None and not value >= low) or (high is not None and not value <= high):  # "not >=": NaN fails too
            raise UserError(f"{flags[field.name]} must lie between {low} and {'inf' if high is None else high}, got {value}")
    return part, cls(**args)


def adopt(config, saved, where, preset):
    """Take the `fixed` fields from a checkpoint's config; a flag that asks for something else is an error."""
    changes = {}
    for field in dataclasses.fields(config):
        if field.metadata["fixed"] and field.name in saved:
            asked, default = getattr(config, field.name), preset.get(field.name, field.default)
            changes[field.name] = kept = saved[field.name]
            if asked not in (default, kept):
                raise UserError(f"{where} was made with --{field.name.replace('_', '-')} {kept}, this run asks for {asked}: "
                                "drop the flag, or choose another --out")
    return dataclasses.replace(config, **changes)


def cli(main):
    """Run main() as a program. Exit 0; 2 and one line for a UserError; 130 after Ctrl-C or SIGTERM."""
    name = pathlib.Path(sys.argv[0]).stem
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        main()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{name}: stopped. {stop}", file=sys.stderr)
        return 130
    return 0
# --- end shared

@dataclasses.dataclass
class Config:
    # what and where
    data: str = opt("ar", "ar (known coefficients), seasonal, etth1, etth2, or the path of a CSV")
    out: str = opt("out/ts", "folder for forecast.csv, pictures, checkpoints and metrics.json")
    preset: str = opt("cpu", "cpu: small nets; gpu: wider and deeper nets, three seeds", choices=("cpu", "gpu"))
    seed: int = opt(0, "seed of the generators and the nets", low=0)
    device: str = opt("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    resume: bool = opt(False, "reuse finished fits in OUT and go on with the one that was interrupted")
    check: bool = opt(False, "exit with code 1 when `eval --data etth1` misses its band")
    # the question
    target: str = opt("", "CSV: forecast only this column and ignore the others")
    horizon: str = opt("auto", "steps ahead, a number or a list as in 96,192; auto: forecast 48, eval 96,192,336,720")
    period: str = opt("auto", "rows in a season, as in 24; 1: none; auto: from the autocorrelation")
    model: str = opt("auto", "rungs as in sar,decoder,sar+decoder, or all; auto: forecast the quick ones, eval all")
    level: float = opt(0.8, "probability of the intervals", low=0.01, high=0.99)
    interval: str = opt("residual", "eval: from errors on training rows (residual) or validation rows (conformal), "
                                    "or from psi-weights (psi, AR only)", choices=("residual", "conformal", "psi"))
    # the rungs
    chunk: int = opt(0, "steps per call of ridge, dlinear, itransformer, decoder; 0: four decoder tokens", low=0)
    lookback: int = opt(0, "of ridge, dlinear, itransformer; least of the AR family; 0: 14 seasons (or 4)", low=0)
    order: int = opt(0, "p of ar, yw and arnet; 0: 14 seasons, or 32", low=0)
    sparsity: float = opt(1.0, "arnet: share of lags expected to matter; 1: no penalty", low=0.001, high=1)
    width: int = opt(64, "itransformer and decoder: width, a multiple of 8", low=8)
    layers: int = opt(2, "itransformer and decoder: blocks", low=1)
    steps: int = opt(0, "training steps of the nets; 0: each its own", low=0)
    seeds: int = opt(1, "fits of every net, with different seeds", low=1)
    # the protocol
    stride: int = opt(0, "rows between test windows; 0: 1, more only beyond 10,000 rows", low=0)
    drop_last: int = opt(0, "score only whole batches of this many windows: the bug of many test loaders", low=0)


PARTS = {"train": "only fit the nets of --model", "eval": "the ladder on --data", "forecast": "the future of a CSV"}
PRESETS = {"cpu": {}, "gpu": dict(width=128, layers=3, seeds=3)}
BAND = {"sar": 0.393, "decoder": 0.400, "sar+decoder": 0.387}  # --check: average test MSE on ETTh1 at most this


# --- shared: device
def pick_device(name, precision="auto"):
    """-> (device, dtype of the matrix products, the reason in words). bf16 only where the hardware multiplies it fast."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = next(k for k in ("cuda", "mps", "cpu") if has[k]) if name == "auto" else name
    if not has[kind]:
        raise UserError(f"--device {name}: this torch sees no such device; use --device cpu or auto")
    units = [u for u in ("amx_bf16", "avx512_bf16") if kind == "cpu" and torch.cpu.get_capabilities().get(u)]
    if kind == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        units = [torch.cuda.get_device_name()]
    bf16 = bool(units) if precision == "auto" else precision == "bf16"
    return torch.device(kind), torch.bfloat16 if bf16 else torch.float32, (
        f"{kind} ({units[0] if units else 'no fast bf16'}), matrices in {'bf16' if bf16 else 'fp32'}")


def keep_freed_memory():
    """Large freed blocks go back to the kernel, and each step pays to map them again: tell glibc to keep them (a fifth faster)."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # not glibc
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 1 << 25), libc.mallopt(-1, 1 << 29)  # M_MMAP_THRESHOLD 32 MB, M_TRIM_THRESHOLD 512 MB


def peak_memory_mb(device):
    """Peak memory in MB: of the GPU where there is one, else of this process (nan on Windows, which does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
# --- end shared

# --- shared: progress
class Progress:
    """A tqdm bar on a terminal; in a pipe or a log file one line per tenth of the work."""

    def __init__(self, total, what, start=0):
        self.total, self.what, self.done, self.start, self.began = total, what, start, start, time.time()
        self.bar = tqdm.tqdm(total=total, initial=start, desc=what, leave=False, disable=not sys.stderr.isatty())

    def update(self, n=1, **values):
        """Advance by n; `values` (numbers) are shown beside the bar."""
        shown = {name: f"{value:.4g}" for name, value in values.items()}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(n)
        self.done += n
        if self.bar.disable and self.done * 10 // self.total > (self.done - n) * 10 // self.total:
            rate = (self.done - self.start) / max(time.time() - self.began, 1e-9)
            words = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = (self.total - self.done) / rate
            print(f"{self.what} {self.done}/{self.total}  {words}  {rate:.3g}/s, {left:.0f} s left", flush=True)
        if self.done >= self.total:
            self.bar.close()
# --- end shared

# ---------------------------------------------------------------------------------------------------------------------
# data: a table of numbers with a regular clock
# ---------------------------------------------------------------------------------------------------------------------

# --- shared: fetch
def find_file(name, url, checksum):
    """Path of a named data file: in $NANO_DATA, else in data/, else downloaded there once, verified and only then renamed.

    `checksum` reads "sha256:..." or "md5:...": the publisher's own where there is one.
    """
    for folder in filter(None, (os.environ.get("NANO_DATA"), "data")):
        for path in (pathlib.Path(folder, name), pathlib.Path(folder, name.removesuffix(".gz"))):
            if path.exists():
                return path
    path = pathlib.Path("data", name)
    part, kind = path.with_name(path.name + ".part"), checksum.split(":")[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as out:  # raises on any status but 2xx
            shutil.copyfileobj(reply, out)
        if f"{kind}:{hashlib.new(kind, part.read_bytes()).hexdigest()}" != checksum:
            raise OSError(f"its {kind} is not {checksum}")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot download {url} ({error}): put {name} into data/ or into the folder that $NANO_DATA names; "
                        "the built-in data need no download") from None
    return path
# --- end shared


@dataclasses.dataclass
class Series:
    """T rows and C columns on a regular clock, in the units of the file.

    `observed` has NaN where nothing was measured. `values` is the same with the holes filled, because a model
    needs a number at every step. Models read `values`; scores look at `observed`.
    """
    name: str
    columns: list
    observed: np.ndarray  # (T, C)
    dates: list  # T datetimes, or T integers where there are no dates
    step: tuple  # (unit, how many), see find_step
    period: int = 0  # rows in a season; 1 = no season, 0 = find it
    notes: list = dataclasses.field(default_factory=list)  # what was assumed, dropped or filled
    noise: tuple = None  # generators only: ({lag: weight}, deviation) of the part that nobody can know
    values: np.ndarray = None

    def __post_init__(self):
        if self.period == 0:
            self.period = find_period(fill(self.observed, 1), usual_season(self.step))
            self.notes.append(f"season: {self.period} rows" if self.period > 1 else "season: none found")
        if len(self.observed) < 2 * self.period + 2:
            raise UserError(f"{self.name}: {len(self.observed)} rows do not hold two seasons of {self.period}: "
                            "give more rows, or --period 1")
        self.values = fill(self.observed, self.period)


def ar_process(coef, n, seed, sigma=1.0):
    """n steps of x_t = sum_k coef[k] x_{t-k} + sigma * noise after a burn-in; coef is {lag: weight} -> (n, 1)."""
    noise = np.random.default_rng(seed).normal(0, sigma, n + 1000)
    x = np.zeros(n + 1000)
    for t in range(max(coef), n + 1000):
        x[t] = noise[t] + sum(weight * x[t - lag] for lag, weight in coef.items())
    return x[1000:, None]


def seasonal_process(n, seed, columns=4):
    """Hourly meters: a daily shape, half as strong at weekends, a slow level, noise with a memory -> (n, columns).

    All but the noise u_t = 0.9 u_{t-1} + e_t could be known. No forecast beats its psi-weights: see `Arena.floor`.
    """
    rng, hour = np.random.default_rng(seed), np.arange(n)[:, None]
    phases = lambda: rng.uniform(0, 2 * np.pi, columns)
    shape = sum(np.sin(2 * np.pi * k * hour / 24 + phases()) / k for k in (1, 2, 3))
    weekend = np.where(hour // 24 % 7 >= 5, 0.5, 1.0)
    level = 0.5 * np.sin(2 * np.pi * hour / (24 * 91) + phases())
    noise = [ar_process({1: 0.9}, n, int(rng.integers(1 << 31)), sigma=0.2) for _ in range(columns)]
    return 20 + 5 * (shape * weekend + level + np.concatenate(noise, axis=1))


AR_TRUTH = {1: 0.2, 3: 0.3, 10: -0.5}
ETT_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
ETT = {"etth1": ("ETTh1.csv", "sha256:f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
       "etth2": ("ETTh2.csv", "sha256:a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b")}


def load_series(config):
    """--data -> Series."""
    if config.period != "auto" and not config.period.isdigit():
        raise UserError(f"--period must be a number of rows or auto, got {config.period}")
    period = 0 if config.period == "auto" else max(1, int(config.period))
    if period > 700:
        raise UserError(f"--period {period}: at most 700 rows; average the file to coarser steps, or use --period 1")
    if config.data == "ar":
        x = ar_process(AR_TRUTH, 20_000, config.seed)
        return Series("ar", ["x"], x, list(range(len(x))), ("rows", 1), period or 1, noise=(AR_TRUTH, 1.0))
    if config.data == "seasonal":
        x = seasonal_process(8000, config.seed)
        hours = [datetime(2024, 1, 1) + timedelta(hours=i) for i in range(len(x))]
        return Series("seasonal", ["north", "east", "south", "west"], x, hours, ("seconds", 3600), period or 24,
                      noise=({1: 0.9}, 1.0))
    if config.data in ETT:
        path = find_file(ETT[config.data][0], ETT_URL + ETT[config.data][0], ETT[config.data][1])
    else:
        path = pathlib.Path(config.data)
        if not path.is_file():
            raise UserError(f"--data {config.data}: no such file; built-in: ar, seasonal, etth1, etth2")
    return read_csv(path, config.target, period)


def fill(observed, period):
    """Fill holes from the past only: the value one season earlier, else the last one; a late start gets its first.

    Interpolation would look smoother, but a later value would leak into the input of a forecast made before it.
    Example, period 2: [1, 2, nan, 4] -> [1, 2, 1, 4]
    """
    values = observed.copy()
    for column in values.T:  # rows of the transpose are views: writing to them writes to `values`
        known = np.flatnonzero(~np.isnan(column))
        column[: known[0]] = column[known[0]]
        for t in np.flatnonzero(np.isnan(column)):
            column[t] = column[t - period] if t >= period else column[t - 1]
    return values


def usual_season(step):
    """The season that a clock suggests: a day of hours or minutes, a week of days, a year of weeks or months, or 0."""
    unit, n = step
    if unit == "seconds":
        rows = {86400: 7, 604800: 52}.get(n, 86400 / n)
    else:
        rows = {"weekdays": 5, "months": 12 / n, "month ends": 12 / n}.get(unit, 0)
    return int(rows) if rows == int(rows) and 2 <= rows <= 336 else 0


def correlogram(values, width):
    """Autocorrelation 0..width of the columns (T, C) without their level, a moving mean over `width` (odd) rows."""
    padded = np.pad(values, ((width // 2, width // 2), (0, 0)), mode="edge")
    level = np.stack([np.convolve(column, np.full(width, 1 / width), mode="valid") for column in padded.T], axis=1)
    rest = (values - level) / ((values - level).std(0) + 1e-12)
    r = autocovariance(torch.tensor(rest), width).numpy()
    return r / max(r[0], 1e-12)


def find_period(values, usual=0, least=0.2):
    """Rows in a season: the `usual` one if it shows, else a lag where the autocorrelation r has a broad peak, else 1.

    A broad peak k is the highest r between k/2 and 3k/2: noise makes small peaks anywhere, but none like this. Of
    those, the first that reaches 0.8 of the highest counts, or a week of similar days would be called 168, not 24.
    """
    if 3 * usual <= len(values) and usual and correlogram(values, usual | 1)[usual] >= least:
        return usual
    width = min(len(values) // 4, 500) // 2 * 2 + 1
    r = correlogram(values, width)
    high = [k for k in range(2, width * 2 // 3) if r[k] >= least]
    seasons = [k for k in high if r[k] == r[k // 2 : k + k // 2 + 1].max()]
    return next((k for k in seasons if r[k] >= 0.8 * max(r[j] for j in seasons)), 1)


class Scaler:
    """Subtract the mean and divide by the (population) deviation that each column has in the *training* rows."""

    def __init__(self, train):
        self.mean, self.std = train.mean(0), train.std(0)
        self.std = np.where(self.std > 0, self.std, 1.0)

    def scale(self, table):
        """(T, C) in units -> float32 tensor (T, C)."""
        return torch.tensor((table - self.mean) / self.std, dtype=torch.float32)

    def unscale(self, forecast, columns=slice(None)):
        """(..., C, H) scaled -> units. `columns` says which they are: none is stretched by another's numbers."""
        return np.asarray(forecast, dtype=np.float64) * self.std[columns, None] + self.mean[columns, None]


class TooShort(Exception):
    """A rung needs more rows than there are; the ladder goes on without it."""


def borders(series, horizon, holdout=False):
    """Rows where training, validation and test end. ETTh: 12, 4 and 4 months of 30 days, as published (the last
    rows unused).

    Else 70/10/20 percent; `holdout` (before a real forecast): the last 15 % twice, but room for some windows of
    `horizon`.
    """
    n, least = len(series.values), max(2 * series.period + 2, 16)
    part = lambda h: max(int(0.15 * n), h + min(h, 20))
    if series.name.lower() in ETT and not holdout and n >= 14400:
        return 8640, 11520, 14400
    first, middle = (n - 2 * part(horizon), n - part(horizon)) if holdout else (int(0.7 * n), n - int(0.2 * n))
    if first < least or middle - first < horizon:
        longest = max((h for h in range(1, horizon) if holdout and n - 2 * part(h) >= least), default=0)
        advice = f"use --horizon {longest} or less" if longest else "use a shorter --horizon"
        raise UserError(f"{series.name}: {n} rows are too few to test a horizon of {horizon}: {advice}, or more rows")
    return first, middle, n


# ---------------------------------------------------------------------------------------------------------------------
# model: what gradient descent fits
# ---------------------------------------------------------------------------------------------------------------------
# B windows, C columns, L steps of history (`lookback`), S steps out per call (`chunk`), H steps of forecast. Time is
# the first axis of a table (T, C) and the last axis of a window (B, C, L). Every model maps (B, C, L) -> (B, C, S).


def normalise(x):
    """Mean and deviation of each window, so that a net sees shapes and not levels: (..., L) -> two tensors
    (..., 1)."""
    return x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0).add(1e-5).sqrt()


class ARNet(nn.Module):
    """AR(p) as a net (Triebe et al. 2019): one linear layer on the last p values. Read backwards, its weights
    are the AR weights.

    `sparsity` is the share of lags expected to matter. The penalty is 0 at weight 0 and saturates at 1, so it
    asks "used or not?" where a ridge asks "how large?".
    """
    mixes_columns, chunk = False, 1

    def __init__(self, order, sparsity=1.0, centre=True, least=0):
        super().__init__()
        self.order, self.lookback, self.centre = order, max(order, least), centre
        self.strength = 0.02 * (1 / sparsity - 1)
        self.linear = nn.Linear(order, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        level = x.mean(-1, keepdim=True) if self.centre else 0
        return self.linear((x - level)[..., -self.order :]) + level

    def coefficients(self):
        """(p,): entry k-1 is the weight of lag k."""
        return self.linear.weight.detach()[0].flip(0).double().cpu()

    def penalty(self):
        """mean of 2 / (1 + exp(-3 |w|^(1/3))) - 1. Subtle: without the 1e-9 the gradient at w = 0 is infinite."""
        return (2 * torch.sigmoid(3 * (self.linear.weight.abs() + 1e-9) ** (1 / 3)) - 1).mean()

    def loss(self, w, progress):
        ramp = min(1.0, 2 * progress)  # find the weights first, then press
        return F.mse_loss(self(w[..., :-1]), w[..., -1:]) + self.strength * ramp * self.penalty()


class DLinear(nn.Module):
    """Zeng et al. 2023: a moving average is the trend, the rest the season; one linear map L -> S for each."""
    mixes_columns = False

    def __init__(self, lookback, chunk, kernel=25):
        super().__init__()
        self.lookback, self.chunk, self.kernel = lookback, chunk, kernel
        self.season, self.trend = nn.Linear(lookback, chunk), nn.Linear(lookback, chunk)
        for linear in (self.season, self.trend):
            nn.init.constant_(linear.weight, 1 / lookback)  # the first forecast is the mean of the window

    def forward(self, x):
        half = self.kernel // 2
        ends = x[..., :1].expand(*x.shape[:-1], half), x[..., -1:].expand(*x.shape[:-1], half)
        trend = torch.cat([ends[0], x, ends[1]], -1).unfold(-1, self.kernel, 1).mean(-1)
        return self.season(x - trend) + self.trend(trend)

    def loss(self, w, progress):
        return F.mse_loss(self(w[..., : self.lookback]), w[..., self.lookback :])


class Block(nn.Module):
    """A transformer block, (B, tokens, width) -> same. Norm before each half (GPT) or after it (iTransformer,
    as in 2017)."""

    def __init__(self, width, heads, causal, pre_norm, dropout=0.1):
        super().__init__()
        self.heads, self.causal, self.pre_norm = heads, causal, pre_norm
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, tokens, :)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # its own dropout is slow on CPUs
        return self.drop(self.project(y.transpose(1, 2).flatten(2)))

    def feed(self, x):
        return self.drop(self.down(F.gelu(self.up(x))))

    def forward(self, x):
        if self.pre_norm:
            x = x + self.attend(self.norm1(x))
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.feed(x))


class ITransformer(nn.Module):
    """Liu et al. 2024: a token is a whole *column*; attention mixes columns, never steps.

    There is no position embedding: permute the columns and the forecasts permute; add columns and it still runs.
    note: the original adds four tokens of calendar features.
    """
    mixes_columns = True

    def __init__(self, lookback, chunk, width, layers, heads=8):
        super().__init__()
        self.lookback, self.chunk = lookback, chunk
        self.embed, self.drop = nn.Linear(lookback, width), nn.Dropout(0.1)
        self.blocks = nn.Sequential(*[Block(width, heads, causal=False, pre_norm=False) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, chunk)

    def forward(self, x):
        level, spread = normalise(x)
        columns = self.drop(self.embed((x - level) / spread))  # (B, C, width)
        return self.head(self.norm(self.blocks(columns))) * spread + level

    loss = DLinear.loss


class SegmentDecoder(nn.Module):
    """A GPT whose tokens are segments of one series, after AutoTimes (Liu et al. 2024), without its language
    model.

        tokens      day 1      day 2     ...    day 28         Linear(24 -> width) + position
                      |          |                 |           causal attention over days
        output    days 2-5   days 3-6    ...   days 29-32      every position forecasts the 96 steps after its day

    All positions are trained at once and one model serves every horizon by roll-out. The net only corrects a
    seasonal skip, the mean of the days seen so far, so that the forecast is sane before the first training
    step. There is no KV cache: the window slides and is normalised anew at every call, so all keys change.
    """
    mixes_columns = False

    def __init__(self, token, tokens, chunk, width, layers, heads=4):
        super().__init__()
        self.token, self.tokens, self.chunk, self.lookback = token, tokens, chunk, token * tokens
        self.embed, self.position = nn.Linear(token, width), nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*[Block(width, heads, causal=True, pre_norm=True) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, chunk)
        self.gate = nn.Parameter(torch.tensor(0.1))

    def segments(self, z):
        """Normalised (N, L) -> (N, tokens, S): row i is the forecast after token i and depends on tokens <= i
        only."""
        days = z.unflatten(-1, (self.tokens, self.token))
        mean_so_far = days.cumsum(1) / torch.arange(1, self.tokens + 1, device=z.device)[:, None]
        hidden = self.norm(self.blocks(self.embed(days) + self.position))
        return mean_so_far.repeat(1, 1, self.chunk // self.token) + self.gate * self.head(hidden)

    def forward(self, x):
        level, spread = normalise(x)
        z = ((x - level) / spread).flatten(0, -2)
        return self.segments(z)[:, -1].view(*x.shape[:-1], -1) * spread + level

    def loss(self, w, progress):
        """Squared error of all positions. note: as in AutoTimes, the whole window sets the scale, so that in
        training an early position knows a little about later days; a forecast uses the last position only,
        which knows nothing of the future."""
        level, spread = normalise(w[..., : self.lookback])
        z = ((w - level) / spread).flatten(0, -2)
        truth = z[:, self.token :].unfold(-1, self.chunk, self.token)  # (N, tokens, S)
        error = (self.segments(z[:, : self.lookback]) - truth).square().mean((1, 2))
        return (error * spread.flatten().square()).mean()


# ---------------------------------------------------------------------------------------------------------------------
# the idea: one roll-out for everything, and linear rules that differ only in where their weights come from
# ---------------------------------------------------------------------------------------------------------------------


def windows(table, length):
    """Every run of `length` rows, as a view that copies nothing: (T, C) -> (T - length + 1, C, length).

    Example: the column 0, 1, 2, 3 and length 3 -> [[[0, 1, 2]], [[1, 2, 3]]]
    """
    return table.unfold(0, length, 1)


def rollout(model, history, horizon):
    """Autoregression: predict, append, slide, repeat. (..., C, at least L) -> (..., C, horizon).

    A model that emits S steps is called ceil(horizon / S) times and reads its own output from the second call
    on. With S >= horizon this is a "direct" forecast: one-step, patch-wise and direct models differ in S and in
    nothing else.
    Example: x_t = x_{t-1} / 2 after a history that ends in 8 -> 4, 2, 1
    """
    L, S = model.lookback, model.chunk
    if history.shape[-1] < L:
        raise UserError(f"a history of {history.shape[-1]} steps is shorter than the lookback of {L}: "
                        "give more rows, or a shorter --lookback")
    steps = -(-horizon // S) * S
    buffer = torch.cat([history[..., history.shape[-1] - L :], history.new_zeros(*history.shape[:-1], steps)], -1)
    for t in range(0, steps, S):
        buffer[..., L + t : L + t + S] = model(buffer[..., t : t + L])
    return buffer[..., L : L + horizon]


class LagModel:
    """next S steps = m + (x[lags] - m) @ weight, where m is the mean of the window (0 without `centre`).

    Repeat, seasonal naive, profile, AR(p), seasonal AR and ridge are all this line. `lags` (n,) count backwards
    from the next step: 1 is the last value. `weight` is (n, S). Taking m out makes the rule follow the level.
    The window, `least` steps or more, holds whole seasons, or m would swing with the time of day; it should be
    longer than the lags are few: with one lag and a window of one, x - m is 0.
    """

    def __init__(self, lags, weight, period=1, centre=True, least=0):
        self.lags = torch.tensor(list(lags))
        self.weight = torch.as_tensor(weight, dtype=torch.float64).reshape(len(self.lags), -1)
        self.centre, self.chunk = centre, self.weight.shape[1]
        self.lookback = -(-max(int(self.lags.max()), least) // period) * period
        self.sigma = None  # (C,) deviation of the one-step errors; set by a fit

    @property
    def fitted(self):
        return 0 if self.sigma is None else self.weight.numel()  # the naive rules fit nothing

    def __call__(self, x):
        level = x.mean(-1, keepdim=True) if self.centre else torch.zeros_like(x[..., :1])
        return (x[..., (self.lookback - self.lags).to(x.device)] - level) @ self.weight.to(x) + level

    def matrix(self, horizon):
        """A roll-out of a linear rule is linear: roll out the L unit histories once -> (L, horizon), and all
        forecasts of all windows are one product, `history @ matrix`. The same numbers, a hundred times
        faster."""
        return rollout(self, torch.eye(self.lookback, dtype=torch.float64)[:, None], horizon)[:, 0]

    def coefficients(self):
        """What one step puts on each lag, the mean's share included: (L,), entry k-1 for lag k."""
        return self.matrix(1)[:, 0].flip(0)


def fit_lags(table, lags, period=1, chunk=1, ridge=1e-6, centre=True, least=0):
    """Least squares over all windows of all columns: the best LagModel on these lags. (T, C) -> LagModel.

    Closed form: sum up G = X'X and b = X'y, solve (G + ridge * mean diagonal) w = b. Lags 1..p give AR(p),
    `seasonal_lags` the seasonal AR, chunk > 1 a direct forecast with one column of weights per step ahead.
    Example: the column 8, 4, 2, 1, lags [1], no centre -> weight 0.5
    """
    table = table.cpu().double()
    model = LagModel(lags, torch.zeros(len(lags), chunk), period, centre, least)
    L = model.lookback
    if len(table) < L + chunk + 1:
        raise TooShort(f"needs {L + chunk + 1} rows, has {len(table)}")

    def pairs():
        for w in windows(table, L + chunk).split(1024):
            level = w[..., :L].mean(-1, keepdim=True) if centre else 0
            yield (w[..., L - model.lags] - level).flatten(0, 1), (w[..., L:] - level).flatten(0, 1)
    G, b = (sum(parts) for parts in zip(*((x.T @ x, x.T @ y) for x, y in pairs())))
    G += (ridge * G.diagonal().mean() + 1e-9) * torch.eye(len(G), dtype=G.dtype)
    model.weight = torch.linalg.solve(G, b)
    if chunk == 1:
        stabilise(model)
    errors = torch.cat([(y - x @ model.weight)[:, 0] for x, y in pairs()])
    model.sigma = errors.view(-1, table.shape[1]).square().mean(0).sqrt()
    return model


def seasonal_lags(period, seasons, short=2):
    """The lags of the seasonal AR: the last `short` steps and, for each of the last seasons, the same phase and
    the `short` steps before.

    Multiplied out, (1 - phi B)(1 - sum_k Phi_k B^{Pk}) of Box and Jenkins has the lags 1, Pk and Pk+1; here
    their weights are free.
    Example: period 24, 2 seasons -> [1, 2, 24, 25, 26, 48, 49, 50]; with 29 seasons 89 lags.
    """
    return sorted({*range(1, short + 1), *(period * k + j for k in range(1, seasons + 1) for j in range(short + 1))})


def companion(coef):
    """x_t = sum_k coef[k-1] x_{t-k} as a matrix that moves the state (x_{t-1}, ..., x_{t-p}) one step:
    forecasts are its powers.

    Example: [a, b] -> [[a, b], [1, 0]]
    """
    A = torch.diag(coef.new_ones(len(coef) - 1), -1)
    A[0] = coef
    return A


def radius(coef):
    """Largest |eigenvalue| of the companion matrix. Below 1 a shock dies out, at 1 it stays, above 1 every
    roll-out explodes."""
    return float(torch.linalg.eigvals(companion(coef)).abs().max())


def stabilise(model, most=1.0001):
    """Multiply weights by rho^lag, which multiplies the eigenvalues by rho, until no roll-out can explode.

    A centred rule has one eigenvalue at 1, its level, and keeps it."""
    while (r := radius(model.coefficients())) > most:
        model.weight = model.weight * (0.999 / r) ** model.lags[:, None]


def psi_weights(model, horizon):
    """The answer to a unit shock, (horizon,): psi_0 = 1, psi_j = sum_k a_k psi_{j-k}: the roll-out of the
    history (..., 0, 0, 1).

    The error h steps ahead is sum_{j<h} psi_j e_{t+h-j}, so its variance is sigma^2 sum_{j<h} psi_j^2.
    Example: AR(1) with 0.5 -> 1, 0.5, 0.25
    """
    return torch.cat([torch.ones(1, dtype=torch.float64), model.matrix(horizon)[-1]])[:horizon]


def autocovariance(x, order):
    """Autocovariances r_0..r_order of the columns of x (T, C), averaged over columns -> (order + 1,), by FFT.

    Divided by T, not by T - k ("biased"): only so is the Toeplitz matrix positive definite and the fitted AR
    stable.
    """
    x = x.double() - x.double().mean(0)
    power = torch.fft.rfft(x, n=2 * len(x), dim=0).abs().square()  # zero-padded, or the end would meet the start
    return torch.fft.irfft(power, dim=0)[: order + 1].mean(1) / len(x)


def levinson(r):
    """Solve the Yule-Walker equations sum_j a_j r_|i-j| = r_i in O(p^2), order by order (Levinson 1946, Durbin
    1960).

    r (p + 1,) -> coefficients (p,), and the error variance at orders 0..p (p + 1,): where it goes flat, more
    lags buy nothing.
    Example: [1, 0.5, 0.25] -> [0.5, 0], [1, 0.75, 0.75]
    """
    coef, error = r[:0], [r[0]]
    for k in range(len(r) - 1):
        reflection = (r[k + 1] - coef @ r[1 : k + 1].flip(0)) / error[-1]  # what lag k+1 adds to the first k
        coef = torch.cat([coef - reflection * coef.flip(0), reflection[None]])
        error.append(error[-1] * (1 - reflection**2))
    return coef, torch.stack(error)


def yule_walker(table, order, centre=True, least=0):
    """AR(order) from autocovariances: one FFT and one recursion, whatever the length of the series. (T, C) ->
    LagModel."""
    table = table.cpu().double()
    coef, error = levinson(autocovariance(table, order))
    model = LagModel(range(1, order + 1), coef, centre=centre, least=least)
    model.sigma = (error[-1] / error[0]).sqrt() * table.std(0)
    return model


def stpe(found, true):
    """AR-Net's score of coefficients, symmetric total percentage error: 100 sum |found - true| / sum (|found| +
    |true|)."""
    return float(100 * (found - true).abs().sum() / (found.abs() + true.abs()).sum())


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: every window, one function for all
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forecasts(model, table, starts, horizon, batch=512):
    """The forecast made just before each row in `starts`, from the rows before it and nothing else: (T, C) ->
    (N, C, horizon)."""
    history, made = windows(table, model.lookback), []
    matrix = model.matrix(horizon).to(table) if isinstance(model, LagModel) else None
    for some in starts.split(batch):
        past = history[(some - model.lookback).to(table.device)]  # rows start - L .. start - 1
        made.append((past @ matrix if matrix is not None else rollout(model, past, horizon)).cpu())
    return torch.cat(made)


def truths(observed, starts, horizon, end):
    """What then happened: (T, C) -> (N, C, horizon), NaN where nothing was measured and from row `end` on."""
    after = observed.new_full((horizon, observed.shape[1]), math.nan)
    return windows(torch.cat([observed[:end], after]), horizon)[starts]


def score(forecast, truth, fits, naive_mae, drop_last=0):
    """MSE, MAE and MASE: means over windows, steps and columns. forecast, truth (N, C, H); fits {horizon: windows}.

    The windows of a horizon are the first `fits[horizon]` of the N, those that end inside the split: all of them are
    scored. naive_mae (C,) is the mean |x_t - x_{t-period}| of the training rows, MASE's yardstick. drop_last keeps
    whole batches of this size only, as many published test loaders do, so that the last windows go missing: on ETTh1 at
    horizon 336, batches of 512 turn ridge's MSE of 0.432 into 0.385.
    """
    result = {"windows": {}, "mse": {}, "mae": {}, "mase": {}, "mse_by_column": {}}
    for horizon, n in fits.items():
        n -= n % drop_last if drop_last else 0
        if n == 0:
            raise UserError(f"--drop-last {drop_last} leaves no window at horizon {horizon}")
        error = forecast[:n, :, :horizon] - truth[:n, :, :horizon]
        square, absolute = error.square().nanmean((0, 2)), error.abs().nanmean((0, 2))  # (C,); missing does not count
        row = {"windows": n, "mse": float(square.nanmean()), "mae": float(absolute.nanmean()),
               "mase": float((absolute / naive_mae).nanmean()), "mse_by_column": [round(float(v), 4) for v in square]}
        for key, value in row.items():
            result[key][str(horizon)] = value
    return result


def residual_interval(errors, level, conformal=False):
    """Errors (N, C, H) of past forecasts, truth - forecast -> (lower, upper) offsets for the next one, (C, H)
    each, never crossing.

    The empirical quantiles (1 -+ level) / 2 of every column and step: no Gaussian, any model, wider with the
    step because the errors of a roll-out are. conformal: one symmetric width, the ceil((N + 1) level)-th
    smallest |error|, which covers a new error with probability >= level if errors are exchangeable (those of
    overlapping windows are so only roughly).
    Example: errors -2, -1, 0, 1, 2 and level 0.5 -> -1 and 1; conformal: the third smallest of 0, 1, 1, 2, 2 ->
    -1 and 1
    """
    if conformal:
        known = (~errors.isnan()).sum(0)
        rank = torch.minimum(((known + 1) * level).ceil().long(), known).clamp(min=1)
        width = errors.abs().nan_to_num(nan=math.inf).sort(0).values.gather(0, rank[None] - 1)[0]
        return -width, width
    return torch.nanquantile(errors, (1 - level) / 2, 0), torch.nanquantile(errors, (1 + level) / 2, 0)


def psi_interval(model, horizon, level):
    """The textbook interval of an AR: Gaussian with deviation sigma sqrt(sum_{j<h} psi_j^2) -> (lower, upper),
    (C, horizon) each."""
    spread = model.sigma[:, None] * psi_weights(model, horizon).square().cumsum(0).sqrt()
    width = (statistics.NormalDist().inv_cdf((1 + level) / 2) * spread).float()
    return -width, width


def coverage(errors, interval, block):
    """Share of the truths inside, and mean width, for every `block` steps of the horizon -> two lists."""
    lower, upper = interval
    known = (~errors.isnan()).sum((0, 1))
    inside = ((errors >= lower) & (errors <= upper)).sum((0, 1)) / known.clamp(min=1)  # NaN is inside nothing
    width = (upper - lower).mean(0)
    return [[round(float(part.mean()), 4) for part in steps.split(block)] for steps in (inside, width)]


# ---------------------------------------------------------------------------------------------------------------------
# checkpoint
# ---------------------------------------------------------------------------------------------------------------------

# --- shared: checkpoint
def save_checkpoint(path, state):
    """Write `state` (tensors and plain types) so that `path` is always either the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}): free some space, or choose another --out") from None


def load_checkpoint(path):
    """-> the saved dict, on the CPU. Nothing in the file is executed (weights_only)."""
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}: train first, or point --out at the folder of a run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"], state["model"]
    except Exception as error:  # torch reports a broken file by many types
        raise UserError(f"{path} is no checkpoint of this script ({type(error).__name__}): choose another --out, or train "
                        "again") from None
    return state


def make_folder(out):
    """Create OUT before the work starts: a typing error then costs a second, not the run."""
    path = pathlib.Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}); choose another folder") from None
    return path


def rng_state():
    """The state of torch's global generators, as tensors that a checkpoint can hold."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class Interrupt:
    """`with Interrupt() as stop:` Ctrl-C and SIGTERM only set stop.asked, so that no optimizer step is cut in half."""

    def __enter__(self):
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():  # nobody else may set signal handlers
            self.before = {n: signal.signal(n, lambda *_: setattr(self, "asked", True)) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
# --- end shared

# ---------------------------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def epoch_order(epoch, n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(step, batch, n, seed):
    """Which of n windows step number `step` takes. A pure function: the position in the data is the step,
    nothing else to save."""
    per_epoch = max(1, n // batch)
    epoch, place = divmod(step, per_epoch)
    return epoch_order(epoch, n, seed)[place * batch : (place + 1) * batch]


def train(model, table, recipe, seed, name, path=None, resume=False, made_with=()):
    """Fit a net on windows of the rows of `table` (T, C), scaled; -> the loss of each step.

    AdamW, 20 steps of warm-up, cosine to zero, gradients clipped at norm 1. recipe: (steps, windows a step,
    learning rate).
    """
    steps, batch, rate = recipe
    data = windows(table, model.lookback + model.chunk)
    if not model.mixes_columns:
        data = data.flatten(0, 1)[:, None]  # every (window, column) is a series of its own
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    made_with = {"rung": name, "seed": seed, "recipe": list(recipe), "rows": list(table.shape), **dict(made_with)}
    step, losses, before = 0, [], 0.0
    if resume and path and path.exists():
        state = load_checkpoint(path)
        if state["config"] != made_with:
            raise UserError(f"{path} was made with {state['config']}, this run asks for {made_with}: "
                            "drop --resume, or choose another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])  # dropout
        step, losses, before = state["step"], state["losses"], state["seconds"]

    bar, began, model.fit_seconds = Progress(steps, name, start=step), time.time(), before
    model.train()
    with Interrupt() as stop:
        while step < steps:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = model.loss(data[batch_indices(step, batch, len(data), seed).to(table.device)], step / steps)
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss of {name} is {loss.item()} at step {step}: look for extreme values "
                                "in the data; the last good checkpoint is kept")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append(loss.item())
            bar.update(loss=losses[-1])
            model.fit_seconds = before + time.time() - began
            if path and (step % 100 == 0 or step == steps or stop.asked):
                save_checkpoint(path, {
                    "config": made_with, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "losses": losses, "seconds": model.fit_seconds, "rng": rng_state()})
            if stop.asked:
                raise KeyboardInterrupt(f"step {step} of {name} is saved; go on with the same command and --resume"
                                        if path else "")
    model.eval()
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# the ladder
# ---------------------------------------------------------------------------------------------------------------------

RUNGS = {
    "repeat": "the last value, again and again",
    "snaive": "the value one season ago",
    "profile": "the mean of the last 30 seasons, phase by phase",
    "ar": "AR(p) by least squares, one step a call",
    "yw": "AR(p) from autocovariances, by Levinson's recursion",
    "sar": "seasonal AR: 89 numbers where a season is 24 rows",
    "ridge": "a whole chunk a call, linear, in closed form (RLinear)",
    "arnet": "AR(p) by gradient descent, with a sparsity penalty",
    "dlinear": "trend and season, one linear map each",
    "itransformer": "attention over columns",
    "decoder": "causal transformer over segments",
    "sar+decoder": "the mean of the two forecasts",
}
QUICK = ["repeat", "snaive", "profile", "ar", "sar", "ridge"]  # closed forms: what `forecast --model auto` tries
RECIPES = {"arnet": (1500, 512, 3e-3), "dlinear": (800, 256, 1e-3),  # steps, windows a step, learning rate:
           "itransformer": (600, 64, 1e-3), "decoder": (215, 256, 1e-3)}  # chosen on the validation rows of ETTh1


def build(name, table, period, config, seed=0, path=None):
    """Fit one rung on all rows of `table` (T, C), scaled. Sizes follow the season P, within a quarter of the rows."""
    rows, P = len(table), period
    most = max(1, rows // 4 // P)  # seasons in a lookback
    token = P * -(-16 // P)  # whole seasons, at least 16 rows: 24 -> 24, 7 -> 21, 1 -> 16
    chunk, lookback = config.chunk or 4 * token, config.lookback or min(14 * token, rows // 4, 1000)
    order = config.order or max(1, min(14 * P if P > 1 else 32, rows // 4, 500))
    if name == "repeat":
        return LagModel([1], [1.0])
    if name == "snaive":
        return LagModel(range(P, 0, -1), torch.eye(P), P)
    if name == "profile":
        n = max(1, min(30, most, 2000 // P))
        return LagModel(range(n * P, 0, -1), torch.eye(P).repeat(n, 1) / n, P)
    if name == "ar":
        return fit_lags(table, range(1, order + 1), least=lookback)
    if name == "yw":
        return yule_walker(table, order, least=lookback)
    if name == "sar":
        return fit_lags(table, seasonal_lags(P, max(1, min(29, most - 1, 1000 // P))), P, least=lookback)
    if name == "ridge":
        return fit_lags(table, range(1, lookback + 1), chunk=chunk, ridge=1e-3)
    torch.manual_seed(seed)
    if name == "arnet":
        model = ARNet(order, config.sparsity, least=lookback)
    elif name == "dlinear":
        model = DLinear(lookback, chunk)
    elif name == "itransformer":
        model = ITransformer(config.lookback or 4 * token, chunk, config.width, config.layers)
    else:
        if chunk % token:
            raise UserError(f"--chunk {chunk}: the decoder emits whole tokens, so give a multiple of {token}")
        model = SegmentDecoder(token, min(28, rows // 4 // token), chunk, config.width, config.layers)
    if model.lookback == 0 or rows < 2 * (model.lookback + model.chunk):
        raise TooShort(f"needs {2 * (max(model.lookback, token) + model.chunk)} rows, has {rows}")
    recipe = (config.steps or RECIPES[name][0], *RECIPES[name][1:])
    shaped_by = ("data", "target", "width", "layers", "sparsity", "lookback", "chunk", "order")
    made_with = {key: getattr(config, key) for key in shaped_by} | {"period": P, "data_seed": config.seed}
    train(model.to(table.device), table, recipe, seed, name, path, config.resume, made_with)
    return model


@dataclasses.dataclass
class Rung:
    """A fitted rung and what it forecast on the validation and test rows."""
    name: str
    seed: int
    models: list  # one, or the members of a mean
    seconds: float  # to fit
    made: dict  # "val" and "test": (N, C, H) scaled forecasts
    test: dict  # see `score`
    val: float  # mean MSE over horizons on the validation rows
    skill: float  # 1 - MSE / MSE of the seasonal naive forecast, on the test rows

    @property
    def params(self):
        return sum(m.fitted if isinstance(m, LagModel) else sum(p.numel() for p in m.parameters())
                   for m in self.models)

    @property
    def lookback(self):
        return max(m.lookback for m in self.models)


class Arena:
    """A series scaled on its training rows, and the windows on which all rungs meet."""

    def __init__(self, series, ends, horizons, config, device, most_windows=10_000):
        first, middle, end = ends
        self.series, self.config, self.horizons, self.H = series, config, horizons, max(horizons)
        self.scaler = Scaler(series.values[:first])
        self.table = self.scaler.scale(series.values).to(device)
        self.train = self.table[:first]
        seen = self.scaler.scale(series.observed)
        stride = config.stride or -(-(end - middle) // most_windows)
        spans = {"val": (first, middle, max(stride, (middle - first) // 400)), "test": (middle, end, stride)}
        self.starts, self.fits, self.truth = {}, {}, {}
        for part, (a, b, every) in spans.items():
            self.starts[part] = torch.arange(a, b - min(horizons) + 1, every)
            self.fits[part] = {h: int((self.starts[part] + h <= b).sum()) for h in horizons}
            self.truth[part] = truths(seen, self.starts[part], self.H, b)
        season = (self.train[series.period :] - self.train[: -series.period]).abs().mean(0)
        self.naive_mae = season.cpu().clamp(min=1e-9)
        naive = build("snaive", self.train, series.period, config)
        self.naive_mse = self.score({"test": forecasts(naive, self.table, self.starts["test"], self.H)}, "test")["mse"]

    def score(self, made, part):
        drop_last = self.config.drop_last if part == "test" else 0
        return score(made[part], self.truth[part], self.fits[part], self.naive_mae, drop_last)

    def enter(self, name, seed, others, path=None):
        """Fit a rung, or take the mean of fitted ones, and score it -> Rung."""
        began = time.time()
        if "+" in name:
            members = [next(r for r in others if (r.name, r.seed) == (n, seed if n in RECIPES else 0))
                       for n in name.split("+")]
            models, seconds = [m for r in members for m in r.models], sum(r.seconds for r in members)
            made = {part: sum(r.made[part] for r in members) / len(members) for part in self.starts}
        else:
            models = [build(name, self.train, self.series.period, self.config, self.config.seed + seed, path)]
            seconds = getattr(models[0], "fit_seconds", time.time() - began)
            if models[0].lookback > self.starts["val"][0]:
                raise TooShort(f"looks back {models[0].lookback} rows, more than there are to train on")
            made = {part: forecasts(models[0], self.table, starts, self.H) for part, starts in self.starts.items()}
        test, val = self.score(made, "test"), self.score(made, "val")
        skill = 1 - statistics.fmean(test["mse"].values()) / statistics.fmean(self.naive_mse.values())
        return Rung(name, seed, models, seconds, made, test, statistics.fmean(val["mse"].values()), skill)

    def climb(self, names, out=None):
        """All rungs of `names`, nets once per seed -> list of Rung. One that needs more rows is named and left out."""
        rungs = []
        for name in names:
            if name == "snaive" and self.series.period == 1:
                continue  # without a season it is `repeat`
            random = any(part in RECIPES for part in name.split("+"))
            for seed in range(self.config.seeds if random else 1):
                folder = out / f"{name}-{self.config.seed + seed}" if out and name in RECIPES else None
                try:
                    rungs.append(self.enter(name, seed, rungs, make_folder(folder) / "last.pt" if folder else None))
                except (TooShort, StopIteration) as error:
                    print(f"left out: {name} {error or 'lacks a member'}")
        if not rungs:
            raise UserError(f"{self.series.name}: {len(self.train)} training rows are too few for --model "
                            f"{self.config.model}: give more rows")
        return rungs

    def interval(self, rung, kind, level):
        """Offsets around test forecasts, made from rows before the test rows only -> (lower, upper), (C, H) each."""
        if kind == "psi":
            if rung.name not in ("ar", "yw", "sar"):
                raise UserError(f"--interval psi is for ar, yw and sar, fitted one step ahead, not for {rung.name}")
            return psi_interval(rung.models[0], self.H, level)
        if kind == "conformal":
            return residual_interval(self.truth["val"] - rung.made["val"], level, conformal=True)
        starts = torch.arange(rung.lookback, len(self.train) - self.H + 1, 23)  # 23 comes to every hour of the day
        if len(starts) < 20:
            raise UserError(f"{len(starts)} training windows are too few for intervals: use --interval conformal")
        made = sum(forecasts(m, self.train, starts, self.H) for m in rung.models) / len(rung.models)
        return residual_interval(truths(self.train.cpu(), starts, self.H, len(self.train)) - made, level)

    def floor(self, steps):
        """Generators only: the scaled MSE at steps 1..`steps` that no forecast beats: the psi-weights of the noise."""
        weights, deviation = self.series.noise
        model = LagModel(list(weights), list(weights.values()), centre=False)
        units = deviation**2 * psi_weights(model, steps).square().cumsum(0).numpy()
        return units * np.mean(self.scaler.std**-2.0)


# ---------------------------------------------------------------------------------------------------------------------
# any CSV: find the clock, find the numbers, say what was done
# ---------------------------------------------------------------------------------------------------------------------

MISSING = {"", "nan", "na", "n/a", "#n/a", "nat", "null", "none", "-", "--", "?"}
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")
DAYS = ["%Y-%m-%d", "%d-%m-%Y", "%m-%d-%Y", "%d-%m-%y", "%m-%d-%y", "%Y%m%d", "%Y-%m", "%d-%b-%Y", "%b-%Y"]
CLOCKS = ["", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p"]


def to_number(cell, comma=False):
    """'1,234.5' -> 1234.5; 'n/a' -> nan; 'rain' -> None. With a decimal comma: '1.234,5' -> 1234.5."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return math.nan
    if comma:
        cell = cell.replace(".", "").replace(",", ".")
    elif THOUSANDS.fullmatch(cell):
        cell = cell.replace(",", "")
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else math.nan


def to_numbers(cells):
    """A column of text -> numbers, NaN where missing, None where the cell is no number. The decimal comma is
    noticed."""
    cells = [c.strip() for c in cells]
    commas = sum(bool(re.fullmatch(r"[-+]?[\d.]*\d,\d+", c)) and not THOUSANDS.fullmatch(c) for c in cells)
    points = sum(bool(re.fullmatch(r"[-+]?[\d,]*\d\.\d+", c)) for c in cells)
    return [to_number(c, comma=commas > points) for c in cells]


def tidy_date(cell):
    """One spelling for separators, no fractions of a second, no time zone: '1/2/2021T03:04:00.5Z' -> '1-2-2021
    03:04:00'."""
    day, clock = re.fullmatch(r"(.*?)[T,\s]*(\d{1,2}:\d\d.*)?", cell.strip(), re.DOTALL).groups()
    clock = re.sub(r"(\.\d+)?\s*(Z|UTC|[+-]\d\d:?\d\d)?$", "", clock or "")
    return re.sub(r"[/.,\s]+", "-", day) + (" " + clock if clock else "")


def to_dates(cells):
    """A column of text -> (datetimes with None where a cell is no date, the order that reads it), or (None,
    "").

    '03/04/2021' may be March or April. Of the orders that read the column, the one with the most regular clock
    wins: daily rows settle it, and on a tie (twelve first-of-month rows) day-first does, as listed in DAYS.
    """
    def read(cell, order):
        with contextlib.suppress(ValueError):
            return datetime.strptime(cell, order)
    cells, best = [tidy_date(c) for c in cells], (None, "", -1.0)
    for order in (day + clock for day in DAYS for clock in CLOCKS):
        if sum(read(c, order) is not None for c in cells[:100]) < 0.6 * len(cells[:100]):
            continue
        dates = [read(c, order) for c in cells]
        known = sorted({d for d in dates if d})
        steps = Counter(b - a for a, b in zip(known, known[1:]))
        regular = (max(steps.values(), default=0) + 1) / len(cells)  # an order that reads fewer cells loses too
        if len(known) > 0.6 * len(set(cells)) and regular > best[2]:
            best = (dates, order, regular)
    return best[:2]


def find_step(dates):
    """Sorted distinct dates or integers -> (unit, count). Months and weekdays have no fixed length and get
    units of their own."""
    deltas = Counter(b - a for a, b in zip(dates, dates[1:]))
    usual = max(deltas, key=lambda d: (deltas[d], -d.total_seconds() if isinstance(d, timedelta) else -d))
    if not isinstance(dates[0], datetime):
        return "rows", usual
    day = timedelta(days=1)
    if usual >= 28 * day:
        months = round(usual / day / 30.44)
        if all((d + day).day == 1 for d in dates):
            return "month ends", months
        if len({d.day for d in dates}) == 1:
            return "months", months
    if usual == day and len(dates) > 7 and all(d.weekday() < 5 for d in dates):
        return "weekdays", 1
    return "seconds", usual.total_seconds()


def advance(date, step, k):
    """The date k steps after `date`. Example: 31 January 2023, ("month ends", 1), 1 -> 28 February 2023."""
    unit, n = step
    if unit == "rows":
        return date + k * n
    if unit == "seconds":
        return date + timedelta(seconds=k * n)
    if unit == "weekdays":
        return datetime.combine(np.busday_offset(date.date(), k).item(), date.time())
    year, month = divmod(date.year * 12 + date.month - 1 + k * n, 12)
    last = calendar.monthrange(year, month + 1)[1]
    return date.replace(year=year, month=month + 1, day=last if unit == "month ends" else min(date.day, last))


def position(date, first, step):
    """How many steps `date` lies after `first`, as a float: the inverse of `advance`."""
    unit, n = step
    if unit == "rows":
        return (date - first) / n
    if unit == "seconds":
        return (date - first).total_seconds() / n
    if unit == "weekdays":
        return float(np.busday_count(first.date(), date.date()))
    return ((date.year - first.year) * 12 + date.month - first.month) / n


def describe(step):
    unit, n = step
    return str(timedelta(seconds=n)) if unit == "seconds" else f"{n} {unit}" if n > 1 else unit.removesuffix("s")


def label(date, step):
    """How a date is written: without the time of day where the clock ticks in whole days."""
    in_days = isinstance(date, datetime) and (step[0] != "seconds" or step[1] % 86400 == 0)
    return str(date).removesuffix(" 00:00:00") if in_days else str(date)


def read_cells(path):
    """The text of a CSV file -> (column names, rows of cells). The separator is the most frequent one in the
    first line."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip(" ,;\t")]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: export it as CSV (UTF-8); a spreadsheet is not a CSV") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    if len(lines) < 4:
        raise UserError(f"{path} has {len(lines)} lines with content: a header and at least three rows are needed")
    rows = list(csv.reader(lines, delimiter=max(",;\t", key=lines[0].count)))
    names = [name.strip() or f"column {i}" for i, name in enumerate(rows[0])]
    if any(c.strip() and to_number(c) is not None or to_dates([c])[0] for c in rows[0]):  # data already: no header
        names = [f"column {i}" for i in range(len(names))]
    else:
        rows = rows[1:]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have the same name ({Counter(names).most_common(1)[0][0]}): rename one")
    return names, [row + [""] * (len(names) - len(row)) for row in rows]


def find_clock(cells):
    """{name: column of text} -> (name of the date column or None, dates or integers, note)."""
    for name, column in cells.items():
        numbers = all(to_number(c) is not None for c in column[:100])
        if numbers and not all(re.fullmatch(r"(19|20)\d{6}", c.strip()) for c in column[:100]):
            continue  # 5.8 is a measurement, not the 5th of August
        dates, order = to_dates(column)
        if dates:
            note, bad = f"dates: column '{name}' read as {order}", sum(d is None for d in dates)
            return name, dates, note + (f"; {bad} rows without a date dropped" if bad else "")
    name, column = next(iter(cells.items()))
    numbers = [to_number(c) for c in column]
    if len(cells) > 1 and all(v is not None and v == v and v == int(v) for v in numbers):
        (rise, count), = Counter(b - a for a, b in zip(numbers, numbers[1:])).most_common(1)
        if rise > 0 and count > 0.8 * (len(numbers) - 1):
            return name, [int(v) for v in numbers], f"dates: none; column '{name}' counts the steps"
    return None, list(range(len(column))), "dates: none; rows are taken as equally spaced"


def find_numbers(path, cells, target, notes):
    """{name: column of text} -> {name: list of floats}. What is left out is noted, or an error if a target."""
    found = {}
    for name, column in cells.items():
        numbers = to_numbers(column)
        known = [v for v in numbers if v is not None and v == v]
        text = sum(v is None for v in numbers)
        problem = ("is text" if text > len(numbers) / 2 else
                   "is more than half empty" if len(known) < len(numbers) / 2 else
                   "never changes" if len(set(known)) == 1 else "")
        if problem and name == target:
            raise UserError(f"--target {target}: this column of {path} {problem}; choose another one")
        if problem:
            notes.append(f"left out: column '{name}' {problem}")
            continue
        found[name] = [math.nan if v is None else v for v in numbers]
        if text:
            notes.append(f"column '{name}': {text} cells are no numbers, taken as missing")
    rise = {name: {round(b - a, 9) for a, b in zip(numbers, numbers[1:])} for name, numbers in found.items()}
    for name in [n for n in found if len(rise[n]) == 1 and n != target and len(found) > 1]:
        notes.append(f"left out: column '{name}' only counts the rows")
        found.pop(name)
    if target and target not in found:
        raise UserError(f"--target {target}: {path} has no such column; it has {', '.join(found) or 'no numbers'}")
    if not found:
        reasons = "; ".join(notes[1:]).replace("left out: ", "")
        raise UserError(f"{path} has no column of changing numbers: {reasons}")
    return {target: found[target]} if target else found


def to_clock(path, dates, table, notes):
    """Rows in any order -> (step, dates, (T, C)) on a regular clock: sorted, rows of one time averaged, NaN in
    the gaps."""
    rows = [i for i, d in enumerate(dates) if d is not None]
    if any(dates[b] < dates[a] for a, b in zip(rows, rows[1:])):
        notes.append("rows were not in the order of time: sorted")
    distinct = sorted({dates[i] for i in rows})
    if len(distinct) < 3:
        raise UserError(f"{path}: {len(distinct)} different dates; at least three are needed")
    first, step = distinct[0], find_step(distinct)
    where = np.array([position(dates[i], first, step) for i in rows])
    slots = np.rint(where).astype(int)
    off, length = np.mean(np.abs(where - slots) > 0.1), slots.max() + 1
    if off > 0.05 or length > 4 * len(distinct):
        raise UserError(f"{path}: no regular clock (usual step {describe(step)}, {off:.0%} of the rows off its ticks, "
                        f"{len(distinct)} of {length} ticks have a row): resample it to equal steps first")
    known = ~np.isnan(table[rows])
    total, count = np.zeros((length, table.shape[1])), np.zeros((length, table.shape[1]))
    np.add.at(total, slots, np.where(known, table[rows], 0))
    np.add.at(count, slots, known)
    grid = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    known = np.flatnonzero((~np.isnan(grid)).any(1))[-1] + 1
    if known < length:
        notes.append(f"the last {length - known} rows hold no number: the forecast starts where the numbers end")
    grid, length = grid[:known], known
    dates = [advance(first, step, k) for k in range(length)]
    doubles, holes = len(rows) - len(set(slots)), int(np.isnan(grid).sum())
    gaps = length - len(set(slots[slots < length]))
    ends = f"from {label(dates[0], step)} to {label(dates[-1], step)}"
    notes.append(f"clock: {length} rows, every {describe(step)}, {ends}")
    if doubles:
        notes.append(f"duplicates: {doubles} rows share their time with another, averaged")
    if gaps:
        notes.append(f"gaps: {gaps} times have no row")
    if holes:
        notes.append(f"missing: {holes} of {grid.size} values, filled from one season earlier and never scored")
    return step, dates, grid


def read_csv(path, target="", period=0):
    """Any CSV -> Series on a regular clock, with notes on all that was assumed, dropped or filled."""
    names, rows = read_cells(path)
    cells = dict(zip(names, zip(*(row[: len(names)] for row in rows))))
    clock, dates, note = find_clock(cells)
    cells.pop(clock, None)
    notes = [note]
    numbers = find_numbers(path, cells, target, notes)
    step, dates, table = to_clock(path, dates, np.array(list(numbers.values()), dtype=np.float64).T, notes)
    return Series(path.stem, list(numbers), table, dates, step, period, notes)


# ---------------------------------------------------------------------------------------------------------------------
# report
# ---------------------------------------------------------------------------------------------------------------------

# --- shared: figures
def new_figure(width, height, rows=1, columns=1):
    """A matplotlib figure that needs no screen (no pyplot, no state), and its axes as an array (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path):
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def show_images(axis, images, columns, title):
    """uint8 images (N, H, W), `columns` a row, with a thin grey line between them."""
    grid = F.pad(images.cpu(), (0, 1, 0, 1), value=96)
    grid = F.pad(grid, (0, 0, 0, 0, 0, -len(grid) % columns), value=96).unflatten(0, (-1, columns))
    axis.imshow(grid.transpose(1, 2).flatten(0, 1).flatten(1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.axis("off")
# --- end shared


def summary(rungs):
    """Rungs -> a dict of plain numbers per name, seeds averaged."""
    rows = []
    for name in dict.fromkeys(r.name for r in rungs):
        group = [r for r in rungs if r.name == name]
        one, by_seed = group[0], [statistics.fmean(r.test["mse"].values()) for r in group]
        mse, mae, mase = ({h: statistics.fmean(r.test[key][h] for r in group) for h in one.test[key]}
                          for key in ("mse", "mae", "mase"))
        rows.append({
            "name": name, "params": one.params, "fit_seconds": statistics.fmean(r.seconds for r in group),
            "lookback": one.lookback, "mse": mse, "mae": mae, "mase": mase, "mse_average": statistics.fmean(by_seed),
            "mae_average": statistics.fmean(mae.values()), "mse_average_by_seed": by_seed,
            "skill": statistics.fmean(r.skill for r in group),
            "val_mse": statistics.fmean(r.val for r in group), "mse_by_column": one.test["mse_by_column"],
            "windows": one.test["windows"]})
    return rows


def print_ladder(rows):
    """Errors of scaled values over all test windows, steps and columns; `val` is the MSE on the validation rows."""
    print(f"\n{'MSE/MAE':<13}{'numbers':>8}{'lookback':>9}{'fit s':>7}"
          + "".join(f"{'h = ' + h:>13}" for h in rows[0]["mse"]) + f"{'average':>13}{'skill':>7}{'val':>8}")
    for r in rows:
        cells = [(r["mse"][h], r["mae"][h]) for h in r["mse"]] + [(r["mse_average"], r["mae_average"])]
        seeds = r["mse_average_by_seed"]
        spread = f"   {len(seeds)} seeds: {min(seeds):.4f} to {max(seeds):.4f}" if len(seeds) > 1 else ""
        print(f"{r['name']:<13}{r['params']:>8,}{r['lookback']:>9}{r['fit_seconds']:>7.1f}"
              + "".join(f"{f'{mse:.3f}/{mae:.3f}':>13}" for mse, mae in cells)
              + f"{r['skill']:>7.0%}{r['val_mse']:>8.3f}{spread}")
    print("windows: " + ", ".join(f"{n} at h = {h}" for h, n in rows[0]["windows"].items()), flush=True)


def draw_coefficients(panels, true, path):
    """panels: {title: {way: (order,) coefficients}}. Few lags: the weights beside the true ones. Many: their
    sizes, on a log scale."""
    figure, axes = new_figure(11, 3.8, 1, len(panels))
    for axis, (title, ways) in zip(axes[0], panels.items()):
        for i, (way, coef) in enumerate(ways.items()):
            lags, few = np.arange(1, len(coef) + 1), len(coef) <= 20
            if few:
                axis.plot(lags + 0.2 * (i - 1), coef, "osD"[i], ms=5, alpha=0.85, label=way)
            else:
                axis.plot(lags, coef.abs().clamp(min=1e-6), "osD"[i], ms=4, alpha=0.85, label=way)
        heights, bottom = [w if few else abs(w) for w in true.values()], 0 if few else 1e-6
        axis.vlines(list(true), bottom, heights, color="black", lw=1.5, zorder=0, label="truth")
        axis.axhline(bottom, color="black", lw=0.6, zorder=0)
        axis.set(title=title, xlabel="lag", ylabel="weight" if few else "|weight|", yscale="linear" if few else "log")
        axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def draw_ladder(arena, rungs, path):
    """Left: the error of every rung and how many numbers it fitted. Right: error at each step, above the floor
    where it is known."""
    figure, axes = new_figure(11, 4.6, 1, 2)
    left, right = axes[0]
    rows = sorted(summary(rungs), key=lambda row: -row["mse_average"])
    most = 1.25 * max((row["mse_average"] for row in rows if row["name"] != "repeat"), default=1)
    kinds = {"nothing fitted": "0.6", "closed form": "tab:blue", "gradient descent": "tab:orange"}
    for y, row in enumerate(rows):
        net = any(part in RECIPES for part in row["name"].split("+"))
        color = kinds["gradient descent" if net else "closed form" if row["params"] else "nothing fitted"]
        left.barh(y, min(row["mse_average"], most), color=color, alpha=0.7)
        left.text(0.01 * most, y, f"{row['name']}  {row['mse_average']:.3f}", va="center", fontsize=9)
        left.text(0.99 * most, y, f"{row['params']:,}", va="center", ha="right", fontsize=9)
    for kind, color in kinds.items():
        left.barh(0, 0, color=color, alpha=0.7, label=kind)
    left.set(yticks=[], xlim=(0, most), xlabel="test MSE, mean over horizons", title="error and numbers fitted")
    figure.legend(fontsize=8, loc="outside lower left", ncol=3, frameon=False)
    ranked = [row["name"] for row in rows[::-1]]
    for name in ranked[:4] + [name for name in ("profile", "snaive") if name in ranked[4:]]:
        rung = next(r for r in rungs if r.name == name)
        error = (rung.made["test"] - arena.truth["test"]).square().nanmean((0, 1))
        right.plot(range(1, arena.H + 1), error, label=name, lw=1.3)
    if arena.series.noise:
        right.plot(range(1, arena.H + 1), arena.floor(arena.H), "k--", lw=1.2, label="floor: the noise alone")
    right.set(xlabel="steps ahead", title="test MSE at each step", ylim=(0, None))
    right.legend(fontsize=8, ncol=2, loc="lower right")
    save_figure(figure, path)


def draw_windows(arena, rung, naive, interval, level, path, block):
    """Above: two test windows of the first column, in its units. Below: what the interval covers, block by
    block."""
    figure, axes = new_figure(11, 6.4, 2, 2)
    shown = min(arena.H, max(4 * arena.series.period, 48))
    units = lambda x: arena.scaler.unscale(x[:, :shown], slice(0, 1))[0]  # (1, H) scaled -> what is shown of it
    for axis, quarter in zip(axes[0], (1, 3)):
        i = arena.fits["test"][arena.H] * quarter // 4
        start, steps, f = int(arena.starts["test"][i]), np.arange(shown), rung.made["test"][i, :1]
        lower, upper = (units(f + offset[:1]) for offset in interval)
        axis.plot(range(-shown, 0), arena.series.observed[start - shown : start, 0], color="0.6", lw=1)
        axis.fill_between(steps, lower, upper, color="tab:red", alpha=0.15, lw=0, label=f"{level:.0%} interval")
        axis.plot(steps, units(naive.made["test"][i, :1]), color="tab:blue", lw=1, ls=":", label=naive.name)
        axis.plot(steps, units(arena.truth["test"][i, :1]), color="black", lw=1.1, label="what happened")
        axis.plot(steps, units(f), color="tab:red", lw=1.6, label=rung.name)
        axis.axvline(-0.5, color="black", lw=0.6)
        axis.set(title=f"column {arena.series.columns[0]}, forecast made before row {start}", xlabel="steps ahead")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    inside, width = coverage(arena.truth["test"] - rung.made["test"], interval, block)
    names = [f"{i * block + 1}-{min((i + 1) * block, arena.H)}" for i in range(len(inside))]
    axes[1, 0].bar(names, inside, color="tab:red", alpha=0.45)
    axes[1, 0].axhline(level, color="black", ls="--", lw=1)
    axes[1, 0].set(title=f"{rung.name}: truths inside the {level:.0%} interval", xlabel="steps ahead", ylim=(0, 1))
    axes[1, 1].bar(names, width, color="tab:red", alpha=0.45)
    axes[1, 1].set(title="mean width of the interval, in deviations of the column", xlabel="steps ahead")
    for axis in axes[1]:
        axis.tick_params(axis="x", labelsize=8)
    save_figure(figure, path)


def draw_forecast(series, dates, forecast, lower, upper, name, level, path):
    """The end of every column (six at most) and what comes next."""
    shown = min(6, len(series.columns))
    figure, axes = new_figure(11, 1.2 + 2.6 * -(-shown // 2), -(-shown // 2), min(2, shown))
    back = min(len(series.dates), max(2 * len(dates), 6 * series.period, 30))
    for c, axis in zip(range(shown), axes.flat):
        axis.plot(series.dates[-back:], series.observed[-back:, c], color="0.35", lw=1, label="measured")
        axis.plot(dates, forecast[c], color="tab:red", lw=1.4, label=f"forecast ({name})")
        axis.fill_between(dates, lower[c], upper[c], color="tab:red", alpha=0.2, lw=0, label=f"{level:.0%} interval")
        axis.set_title(series.columns[c])
        axis.tick_params(axis="x", labelrotation=20, labelsize=8)
    axes.flat[0].legend(fontsize=8, frameon=False)
    for axis in axes.flat[shown:]:
        axis.axis("off")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------------


def parse_horizons(config, default):
    """--horizon -> sorted list of steps."""
    words = (default if config.horizon == "auto" else config.horizon).replace(" ", "").split(",")
    if not all(w.isdigit() and 0 < int(w) <= 10_000 for w in words):
        raise UserError(f"--horizon must be one number of steps or a list as in 96,192, got {config.horizon}")
    return sorted({int(w) for w in words})


def parse_models(config, default):
    """--model -> names of rungs: members of means added, means last."""
    names = {"auto": default, "all": list(RUNGS)}.get(config.model) or config.model.replace(" ", "").split(",")
    names = [m for n in names if "+" in n for m in n.split("+")] + names
    for name in names:
        if "+" not in name and name not in RUNGS:
            raise UserError(f"--model {config.model}: no rung '{name}'; there are {', '.join(RUNGS)}; means: ar+ridge")
    return sorted(dict.fromkeys(names), key=lambda n: list(RUNGS).index(n) if n in RUNGS else len(RUNGS))


def say(series):
    more = f" and {len(series.columns) - 8} more" if len(series.columns) > 8 else ""
    print(f"data {series.name}: {len(series.values)} rows of {', '.join(series.columns[:8])}{more}")
    print("".join(f"  {note}\n" for note in series.notes), end="", flush=True)


def recover(config, device, out):
    """A series whose weights are known: find them three ways, then find out *which* lags there are -> metrics."""
    series = Series("ar", ["x"], ar_process(AR_TRUTH, 100_000, config.seed), list(range(100_000)), ("rows", 1), 1)
    table, results, panels = Scaler(series.values).scale(series.values), {}, {}
    terms = " ".join(f"{weight:+} x[t-{lag}]" for lag, weight in AR_TRUTH.items())
    print(f"\n1. Find the weights of x[t] = {terms} + noise in {len(table):,} values")
    for p in (10, 100):
        true = torch.zeros(p, dtype=torch.float64)
        true[[lag - 1 for lag in AR_TRUTH]] = torch.tensor(list(AR_TRUTH.values()), dtype=torch.float64)
        net = ARNet(p, len(AR_TRUTH) / p if p > 10 else 1.0, centre=False)
        net_name = "sparse AR-Net" if p > 10 else "AR-Net"

        def descend():
            recipe = (config.steps or 1000, 1024, 5e-3)
            train(net.to(device), table.to(device), recipe, config.seed, f"{net_name}, {p} lags")
            return net.coefficients()
        ways, found = {"least squares": lambda: fit_lags(table, range(1, p + 1), centre=False).weight[:, 0],
                       "Yule-Walker": lambda: yule_walker(table, p, centre=False).weight[:, 0], net_name: descend}, {}
        for way, find in ways.items():
            began = time.time()
            found[way] = find()
            seconds, error = time.time() - began, stpe(found[way], true)
            off = float((found[way] - found["least squares"]).abs().max())
            results[f"{way}, p={p}"] = {"stpe": error, "from_least_squares": off, "seconds": seconds}
            print(f"   {p:>3} lags, {way:<13} error {error:5.1f} %, at most {off:.4f} from least squares, "
                  f"{seconds:.2f} s", flush=True)
        if p > 10:
            found.pop("Yule-Walker")  # hides behind least squares in the picture
        panel = {f"{way}: error {stpe(coef, true):.1f} %": coef for way, coef in found.items()}
        panels[f"{p} lags offered, {len(AR_TRUTH)} used"] = panel
    kept = [k + 1 for k, weight in enumerate(found[net_name]) if abs(weight) > 0.05]
    print(f"   of 100 lags the sparse net uses {kept}; the truth is {list(AR_TRUTH)}")
    draw_coefficients(panels, AR_TRUTH, out / "coefficients.png")
    return {"recovery": results, "lags_found": kept}


def compete(config, series, horizons, names, device, out):
    """Climb the ladder on one series, print it, draw it -> metrics."""
    arena = Arena(series, borders(series, max(horizons)), horizons, config, device)
    rungs = arena.climb(names, out)
    print_ladder(summary(rungs))
    best = min(rungs, key=lambda r: r.val)
    print(f"the validation rows choose {best.name}")
    if series.noise:
        floors = ", ".join(f"{arena.floor(h).mean():.3f} at h = {h}" for h in horizons)
        print(f"floor, the noise alone (expected, not of this sample): MSE {floors}")
    block, bands, intervals = min(96, max(1, arena.H // 4)), {}, {}
    for rung in {r.name: r for r in rungs if r.name in ("ar", "sar", "decoder", "sar+decoder") or r is best}.values():
        if config.interval == "psi" and rung.name not in ("ar", "yw", "sar"):
            continue
        intervals[rung.name] = arena.interval(rung, config.interval, config.level)
        inside, width = coverage(arena.truth["test"] - rung.made["test"], intervals[rung.name], block)
        bands[rung.name] = {"block": block, "coverage": inside, "width": width}
        print(f"{config.level:.0%} interval ({config.interval}) of {rung.name}, blocks of {block} steps: covers "
              f"{' '.join(f'{c:.0%}' for c in inside)}; width {' '.join(f'{w:.2f}' for w in width)}", flush=True)
    draw_ladder(arena, rungs, out / "ladder.png")
    shown = best if best.name in intervals else next((r for r in rungs if r.name in intervals), None)
    if shown:
        naive = next((r for r in rungs if r.name == "snaive"), rungs[0])
        draw_windows(arena, shown, naive, intervals[shown.name], config.level, out / "windows.png", block)
    return {"models": summary(rungs), "chosen": best.name, "params": best.params,
            "intervals": {"kind": config.interval, "level": config.level, **bands}}


def forecast(config, series, horizon, names, device, out):
    """Test the rungs on the end of the series, fit the best on all rows, write what comes next -> metrics."""
    ends = borders(series, horizon, holdout=True)
    arena = Arena(series, ends, [horizon], config, device, most_windows=300)
    print(f"test: fitted on the first {ends[0]} rows, chosen on the next {ends[1] - ends[0]}, "
          f"scored on the last {ends[2] - ends[1]}")
    rungs = arena.climb(names)
    rows, best = summary(rungs), min(rungs, key=lambda r: r.val)
    print_ladder(rows)
    print(f"chosen on the validation rows: {best.name} ({RUNGS.get(best.name, 'a mean')}); its skill against the "
          f"seasonal naive forecast is {best.skill:.0%}" + ("" if best.skill > 0.02 else ": little to predict"))

    scaler = Scaler(series.values)  # now fit on everything
    table = scaler.scale(series.values).to(device)
    models = [build(name, table, series.period, config, config.seed) for name in best.name.split("+")]
    with torch.no_grad():
        ahead = scaler.unscale(sum(rollout(m, table.T[None], horizon)[0].cpu() for m in models) / len(models))
    errors = {part: arena.truth[part] - best.made[part] for part in ("val", "test")}
    offsets = residual_interval(torch.cat(list(errors.values())), config.level, conformal=True)
    lower, upper = (ahead + offset.numpy() * arena.scaler.std[:, None] for offset in offsets)
    inside = coverage(errors["test"], residual_interval(errors["val"], config.level, conformal=True), horizon)[0][0]
    print(f"interval: {config.level:.0%}, from the errors on the last {ends[2] - ends[0]} rows; made on the first half "
          f"of them, it covers {inside:.0%} of the second")
    dates = [advance(series.dates[-1], series.step, k + 1) for k in range(horizon)]
    write_forecast(series, dates, ahead, lower, upper, out / "forecast.csv")
    draw_forecast(series, dates, ahead, lower, upper, best.name, config.level, out / "forecast.png")
    return {"models": rows, "chosen": best.name, "params": best.params, "skill": best.skill, "coverage": inside,
            "first": label(dates[0], series.step), "last": label(dates[-1], series.step)}


def write_forecast(series, dates, ahead, lower, upper, path):
    """One row a step: the date, then forecast, lower and upper bound of every column, in the units of the file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *(name + part for name in series.columns for part in ("", "_lower", "_upper"))])
        for h, date in enumerate(dates):
            cells = [f"{bound[c, h]:.6g}" for c in range(len(series.columns)) for bound in (ahead, lower, upper)]
            writer.writerow([label(date, series.step), *cells])
    print(f"wrote {path}: {len(dates)} steps, {label(dates[0], series.step)} to {label(dates[-1], series.step)}")


def check(config, metrics):
    """--check: exit with code 1 when the ladder misses its band."""
    missed = [f"{row['name']} {row['mse_average']:.4f} > {BAND[row['name']]}" for row in metrics.get("models", [])
              if config.data == "etth1" and row["name"] in BAND and row["mse_average"] > BAND[row["name"]]]
    if config.check and missed:
        raise SystemExit(f"nano_ts: check failed: {'; '.join(missed)}")


def main(argv=None):
    """Run the script as from the command line; -> the dict of metrics that it also writes to OUT/metrics.json."""
    began = time.time()
    part, config = parse_config(Config, argv, PARTS, PRESETS, __doc__)
    if config.width % 8:
        raise UserError(f"--width {config.width} must be a multiple of 8, the number of heads of itransformer")
    names = parse_models(config, QUICK if part == "forecast" else list(RUNGS))
    horizons = parse_horizons(config, {"forecast": "48", "eval": "96,192,336,720"}.get(part, "24,96,336"))
    device, _, reason = pick_device(config.device, "fp32")
    keep_freed_memory()
    out = make_folder(config.out)
    print(f"nano_ts: {reason}")
    metrics = {"device": reason, "seed": config.seed}
    if part == "all" and config.data == "ar":
        metrics |= recover(config, device, out)
        print("\n2. Climb the ladder, on a series with a season")
        config = dataclasses.replace(config, data="seasonal")
    series = load_series(config)
    say(series)
    if part == "forecast":
        metrics |= forecast(config, series, horizons[-1], names, device, out)
    elif part == "train":
        arena = Arena(series, borders(series, 1), [1], config, device)
        metrics["params"] = sum(r.params for r in arena.climb([n for n in names if n in RECIPES], out))
    else:
        metrics |= compete(config, series, horizons, names, device, out)
    metrics |= {"seconds": time.time() - began, "peak_memory_mb": peak_memory_mb(device)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    print(f"total {metrics['seconds']:.0f} s, peak memory {metrics['peak_memory_mb']:.0f} MB")
    check(config, metrics)
    return metrics


if __name__ == "__main__":
    sys.exit(cli(main))
