"""nano_ts: forecast a time series from its own past. Eight models, one protocol, and a forecast of your CSV.

Autoregression: predict the next steps, append them to the history, slide, repeat. From model to model two
things differ: how many steps one call emits (S), and how it reads the history.

    history x[t-L .. t-1]                forecast, H steps
    |..............................|     |    |    |    |    |
                      [---- L ----] ---> S                       call 1
                           [---- L ----] ---> S                  call 2 reads what call 1 made
                                [---- L ----] ---> S             call 3 ...

    S = 1     repeat, AR(p), seasonal AR (sar), AR-Net    a weight per lag: least squares or gradient descent
    S = P     seasonal naive (snaive)                     nothing fitted; P is the season, 24 rows for hours
    S = 96    ridge, iTransformer, segment decoder        linear; attention over columns; a GPT over days

The parts of the file: the roll-out; linear models; nets; training; evaluation and intervals; then series, any
CSV, the ladder (all models on one series, simplest first), the forecast, pictures, settings. What stands
between `# --- shared: NAME` and `# --- end shared` is the same, word for word, in other scripts.

Papers: AR (Yule 1927; Box & Jenkins 1970). AR-Net (Triebe et al. 2019, arXiv:1911.12436). Why a linear rival
belongs beside every transformer (Zeng et al. 2023, arXiv:2205.13504; Toner & Darlow 2024, arXiv:2403.14587).
iTransformer (Liu et al. 2024, arXiv:2310.06625). AutoTimes (Liu et al. 2024, arXiv:2402.02370). Intervals by
split conformal prediction (Papadopoulos et al. 2002; Lei et al. 2018, arXiv:1604.04173).

One recipe for all data. The sizes in `build` and NETS were chosen by the error on the validation rows of
ETTh1, rows 8640 to 11520, and then frozen; no test row and no other data had a say. Tried were: for sar 7,
14, 29 and 56 seasons with 1, 2 and 3 short lags; for ar and ridge lookbacks of 168, 336 and 720, two chunks
and four sizes of the ridge; for the nets, in 72 runs with up to three seeds: rate, steps, batch, blocks,
dropout, lookback, the decoder's first gate, AR-Net's penalty. The *kinds* of model come from papers that have
looked at ETTh1's test rows for years: ETTh2, ETTm1 and ETTm2, where nothing was chosen, are the fairer test.

    python nano_ts.py                            generated series whose weights are known; all goes to out/ts
    python nano_ts.py eval --data etth1          published protocol, 96 to 720 steps (downloads 2.6 MB once)
    python nano_ts.py forecast --data my.csv --horizon 30     forecast.csv and forecast.png of your own table
    python nano_ts.py forecast --data my.csv --dates "%d/%m/%Y" --target sales --level 0.9
    python nano_ts.py eval --data ettm1 --model sar,decoder,sar+decoder --resume      go on after Ctrl-C
"""
import argparse, calendar, csv, dataclasses, functools, hashlib, io, itertools, json
import math, operator, os, pathlib, re, statistics, sys, time, urllib.request, zipfile
from collections import Counter
from datetime import datetime, timedelta
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tqdm

import kernels

# ----- roll-out: predict, append, slide, repeat -------------------------------------------------------------
# T rows and C columns of a table; B windows; L steps of history (`lookback`); S steps that one call emits
# (`chunk`); H steps of forecast (`horizon`); P rows in a season (`period`). Time is the first axis of a table
# (T, C), as in a file, and the last axis of a window (B, C, L). Every model maps (B, C, L) to (B, C, S).
def windows(table, length):
    """Every run of `length` rows: (T, C) -> (T - length + 1, C, length), a view that copies nothing.

    Example: the column 0, 1, 2, 3 and length 3 -> [[[0, 1, 2]], [[1, 2, 3]]]
    """
    return table.unfold(0, length, 1)


def rollout(model, history, horizon):
    """Autoregression: (B, C, at least L) -> (B, C, H). From the second call on a model reads its own output.

    A model of S steps is called ceil(H / S) times: for 96 hours AR(p) 96 times, the decoder once. With S >= H
    this is what papers call a direct forecast. Direct, patch by patch, step by step: S differs and nothing
    else.
    Example: x_t = x_{t-1} / 2 after a history that ends in 8 -> 4, 2, 1
    """
    L, S = model.lookback, model.chunk
    if history.shape[-1] < L:
        raise ValueError(f"a history of {history.shape[-1]} steps is shorter than the lookback of {L}")
    calls = -(-horizon // S)                                   # rounded up
    x = F.pad(history[..., -L:], (0, calls * S))               # (B, C, L + calls S): the window, then room
    for t in range(0, calls * S, S):
        x[..., L + t:L + t + S] = model(x[..., t:t + L])   # L values, known or made, just before the new ones
    return x[..., L:L + horizon]


# ----- linear models: lags and weights ----------------------------------------------------------------------
class LagModel:
    """Next S steps = m + (x[lags] - m) @ weight. AR(p), seasonal AR, ridge, naive rules are all this line.

    lags (n,) count backwards from the next step: 1 is the last value. weight (n, S): a column per step ahead.
    m is the mean of the window, or 0 without `centre`. (So with `centre` lag k really has the weight w_k + (1
    - sum w) / L, as m holds all lags; these sum to 1, and a window of equal values goes on so.) Why not a
    constant in place of m? It would pull every forecast to the level of the training years; m lets it stay at
    the level of the last weeks. The window should hold whole seasons, or m itself swings with the time of
    day.
    """

    def __init__(self, lags, weight, lookback, centre=True):
        self.lags = torch.as_tensor(list(lags))
        self.weight = torch.as_tensor(weight, dtype=torch.float64)
        self.lookback, self.chunk, self.centre = lookback, self.weight.shape[1], centre
        if not 1 <= self.lags.min() <= self.lags.max() <= lookback:     # a lag of 0 would read the answer
            raise ValueError(f"lags must be from 1 to the lookback, {lookback}")

    def __call__(self, x):
        level = x.mean(-1, keepdim=True) if self.centre else 0 # (B, C, 1)
        past = x[..., self.lookback - self.lags]               # (B, C, n): lag 1 is place L - 1, the last one
        return (past - level) @ self.weight.to(x) + level      # (B, C, S)

    @functools.cache                                           # weights never change after __init__
    def matrix(self, horizon):
        """(L, H). Row i: the forecast of the history that is 1 at place i and 0 elsewhere.

        A roll-out of a linear rule is linear, and any history is a sum of such unit histories. So all
        forecasts of all windows are one product, history @ matrix: the same numbers, far faster.
        """
        units = torch.eye(self.lookback, dtype=torch.float64)[:, None]  # (L, 1, L): history i is 1 at place i
        return rollout(self, units, horizon)[:, 0]

    def radius(self):
        """Largest |eigenvalue| of a step: below 1 a shock dies out, at 1 it stays, above 1 it explodes.

        One step multiplies the state (x[t-1], ..., x[t-L]) by the companion matrix: weights in the first row,
        ones below the diagonal; H steps are its power H. Example: weights a, b -> [[a, b], [1, 0]]
        """
        A = torch.diag(torch.ones(self.lookback - 1, dtype=torch.float64), -1)
        A[0] = self.matrix(1)[:, 0].flip(0)                   # weights of lag 1 .. L, the share of m included
        return float(torch.linalg.eigvals(A).abs().max())


def fit_lags(table, lags, lookback, chunk=1, ridge=1e-6, centre=True):
    """Least squares over all windows of all columns: (T, C) -> the LagModel on these lags of least error.

    X: the n centred lags of a window, Y: the S values that followed. The best weights solve (X'X + ridge) w =
    X'Y: no iteration, and both sums are small, (n, n) and (n, S), however long the series is. Lags 1..p give
    AR(p), `seasonal_lags` the seasonal AR, chunk > 1 a direct forecast of many steps.
    Example: the column 8, 4, 2, 1, lags [1], no centre -> weight 0.5
    """
    enough(table, lookback + chunk)
    lags, XX, XY = torch.as_tensor(list(lags)), 0, 0
    for w in windows(table.cpu().double(), lookback + chunk).split(1024):  # all at once could fill memory
        level = w[..., :lookback].mean(-1, keepdim=True) if centre else 0  # the past alone, as in a forecast
        X = (w[..., lookback - lags] - level).flatten(0, 1)    # (1024 C, n): a column is one more series,
        Y = (w[..., lookback:] - level).flatten(0, 1)          # (1024 C, S)  all share the weights
        XX, XY = XX + X.T @ X, XY + X.T @ Y
    # Neighbouring lags look alike, so X'X is nearly singular; a little on its diagonal keeps weights small.
    # Columns that never move make X'X zero: 1e-9 gives even that a solution, weights of 0.
    XX += (ridge * XX.diagonal().mean() + 1e-9) * torch.eye(len(XX), dtype=XX.dtype)
    return stabilise(LagModel(lags, torch.linalg.solve(XX, XY), lookback, centre))


def stabilise(model):
    """If a roll-out would explode, shrink the weights of a one-step model until it does not.

    Weights times rho^lag make eigenvalues times rho, here .9999 / radius: they solve z^n = sum_k w_k z^(n-k);
    put z / rho for z. Least squares looks one step ahead and does not mind a radius of 1.01, but 1.01^720 is
    1,300. A centred rule keeps one eigenvalue at 1, its level. 1.0005^720 is 1.4 and may stay: a clean daily
    wave has eigenvalues *on* the circle, estimates lie just beside it, and to shrink them costs more than it
    saves. Why a loop? Without centre one round is exact; the weights that m adds do not shrink along: look
    again.
    """
    while model.chunk == 1 and (radius := model.radius()) > 1.0005:
        weight = model.weight * (0.9999 / radius) ** model.lags[:, None]
        model = LagModel(model.lags, weight, model.lookback, model.centre)
    return model


def seasonal_lags(period, seasons, short=2):
    """The last `short` steps and, for each of the last seasons, the same phase and `short` steps before it.

    Box and Jenkins' (1 - phi B)(1 - sum_k Phi_k B^{Pk}), where B is one step back, multiplied out, has lags
    1, Pk and Pk + 1, the last with weight -phi Phi_k; here all weights are free. With P = 24 and 29 seasons 2
    + 29 * 3 = 89 lags reach back a month. Example: period 24, 2 seasons -> 1, 2, 24, 25, 26, 48, 49, 50
    """
    lags = {period * k + j for k in range(1, seasons + 1) for j in range(short + 1)}
    return sorted(lags | set(range(1, short + 1)))      # a set: with period 1 or 2 some come twice


def enough(table, rows):
    """Refuse to fit where there are not at least two windows of this many rows."""
    if len(table) <= rows:
        raise ValueError(f"it needs more than {rows} rows to learn from, there are {len(table)}")


# ----- nets: what gradient descent fits ---------------------------------------------------------------------
def normalise(x):
    """Mean and deviation of each window, so that nets see shapes, not levels: (..., L) -> two of (..., 1)."""
    return x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0).add(1e-5).sqrt()


class ARNet(nn.Module):
    """AR(p) as a net (Triebe et al. 2019): one linear layer on the last p values, fitted by gradient descent.

    What it has over least squares is the penalty. `sparsity`, the paper's s, is the share of lags expected to
    matter: .3 means that 7 lags in 10 should end near 0. lambda = .02 (1/s - 1) is the paper's code's.
    """
    mixes_columns, chunk = False, 1

    def __init__(self, order, sparsity):
        super().__init__()
        self.lookback, self.strength = order, 0.02 * (1 / sparsity - 1)    # lambda(s); s = 1: no penalty
        self.linear = nn.Linear(order, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def loss(self, w, progress):
        """Windows w (B, 1, p + 1), progress 0..1 -> squared error one step ahead + penalty."""
        level = w[..., :-1].mean(-1, keepdim=True)
        error = self.linear(w[..., :-1] - level) + level - w[..., -1:]     # (B, 1, 1): forecast - truth
        # R(w) = 2 / (1 + exp(-3 |w|^(1/3))) - 1 is 0 at 0 and soon near 1. It asks "used or not?" where ridge
        # asks "how large?". Without the 1e-9 its slope at 0 is infinite. Its strength grows from nothing over
        # the first half of training: weights that are 0 because nothing has been learned yet must not be held
        # there.
        used = (2 * torch.sigmoid(3 * (self.linear.weight.abs() + 1e-9) ** (1 / 3)) - 1).mean()
        return error.square().mean() + self.strength * min(1, 2 * progress) * used

    def rule(self):
        """Read backwards its weights are AR weights: a LagModel as from `fit_lags`, rolled out the same."""
        weight = self.linear.weight.detach().cpu().double().T.flip(0)  # (p, 1): the weight of lag 1 is first
        return stabilise(LagModel(range(1, len(weight) + 1), weight, self.lookback))


class Block(nn.Module):
    """A transformer block (B, N, width) -> same: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)  # GPTs widen 4 times

    def forward(self, x, mask=None):
        # softmax(q k^T / sqrt(D)) v: a mean of the values v, weighted by how well keys answer the query
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))   # (B, N, 3, heads, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                   # (B, heads, N, D) each, as attention wants it
        y = kernels.attention(q, k, v, mask)                   # no mask: every token sees all others
        x = x + self.proj(y.transpose(1, 2).flatten(2))        # heads side by side again: (B, N, width)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ITransformer(nn.Module):
    """Liu et al. 2024: a token is a whole *column*; attention mixes columns and never steps.

    There is no position embedding: exchange columns and the forecasts are exchanged; add columns and it still
    runs. Not as in the paper: that normalises after each half of a block, uses dropout, adds four tokens of
    calendar features and trains one model for each horizon; this one emits S steps and is rolled out.
    """
    mixes_columns = True

    def __init__(self, lookback, chunk, width, layers):
        super().__init__()
        self.lookback, self.chunk = lookback, chunk
        self.embed, self.head = nn.Linear(lookback, width), nn.Linear(width, chunk)  # one for all columns
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        level, spread = normalise(x)
        tokens = self.embed((x - level) / spread)         # (B, C, L) -> (B, C, width): history is the feature
        for block in self.blocks:
            tokens = block(tokens)                             # no mask: columns have no order
        return self.head(self.norm(tokens)) * spread + level   # (B, C, S), back at the level of the window

    def loss(self, w, progress):
        """Windows w (B, C, L + S): the rows to read and those to forecast. `progress` is for AR-Net alone."""
        return F.mse_loss(self(w[..., :self.lookback]), w[..., self.lookback:])


class SegmentDecoder(nn.Module):
    """A GPT whose tokens are segments of a series, after AutoTimes (Liu et al. 2024), without language model.

        tokens      day 1      day 2     ...    day 28         Linear(24 -> width) + position
                      |          |                 |           causal attention over days
        output    days 2-5   days 3-6    ...   days 29-32      each position: the 96 steps after its day

    As in a GPT all positions are trained at once, and one model serves every horizon by roll-out. AutoTimes
    has tokens of 96 steps, emits one token, and puts a frozen language model and embedded dates between its
    two linear maps; short tokens, long outputs and the skip below are not from there. Why no KV cache? The
    window slides and is normalised anew at every call, which changes all keys.
    """
    mixes_columns = False

    def __init__(self, token, tokens, chunk, width, layers):
        super().__init__()
        self.token, self.tokens, self.chunk, self.lookback = token, tokens, chunk, token * tokens
        self.embed, self.head = nn.Linear(token, width), nn.Linear(width, chunk)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.tensor(0.1))            # how much the net may correct, see `segments`

    def segments(self, z):
        """Normalised (N, L) -> (N, tokens, S): row i forecasts what follows token i from tokens <= i only."""
        days = z.unflatten(-1, (self.tokens, self.token))      # (N, tokens, token)
        seen = torch.arange(1, self.tokens + 1, device=z.device)
        mean_day = days.cumsum(1) / seen[:, None]       # (N, tokens, token): the mean of the days seen so far
        x = self.embed(days) + self.position                   # (N, tokens, width)
        for block in self.blocks:
            x = block(x, kernels.causal(self.tokens))          # day i sees the days 1 .. i
        # the net only corrects "the next days are the mean day", which is sane before the first training step
        # S is a multiple of the token, so the mean day fits in S / token times: (N, tokens, S)
        skip = mean_day.repeat(1, 1, self.chunk // self.token)
        return skip + self.gate * self.head(self.norm(x))

    def forward(self, x):
        level, spread = normalise(x)
        z = ((x - level) / spread).flatten(0, 1)              # (B, C, L) -> (B C, L): every column on its own
        return self.segments(z)[:, -1].view(*x.shape[:2], -1) * spread + level  # the last one saw all days

    def loss(self, w, progress):
        """Windows w (B, 1, L + S) -> mean squared error of all positions.

        As in AutoTimes the whole window sets the scale, so in training an early position knows a little about
        later days. A forecast uses the last position alone, and that one knows nothing of its future.
        """
        level, spread = normalise(w[..., :self.lookback])
        z = ((w - level) / spread).flatten(0, 1)               # (B, L + S)
        truth = z[:, self.token:].unfold(-1, self.chunk, self.token)  # (B, tokens, S): what follows each
        error = (self.segments(z[:, :self.lookback]) - truth) * spread  # else calm windows weigh most
        return error.square().mean()


# ----- training ---------------------------------------------------------------------------------------------
def train(model, table, recipe, config, path=None):
    """Fit a net to random windows of the rows of `table` (T, C), scaled -> the loss of every step.

    recipe: steps, windows in a step, highest learning rate. path: where to save every 100 steps, if anywhere.
    AdamW; 20 steps of warm-up, then a cosine to zero, so that the last weights are the model and nothing has
    to be selected. All chance is a function of (seed, step): resumed from `path`, the run is bit for bit the
    run that was never stopped, and no state of a generator has to be kept.
    """
    steps, batch, rate = recipe
    enough(table, model.lookback + model.chunk)
    data = windows(table, model.lookback + model.chunk)        # (n, C, L + S), still a view
    if not model.mixes_columns:
        data = data.flatten(0, 1)[:, None]              # (n C, 1, L + S), a view: a column is one more series
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    shaped_by = ("data", "target", "period", "seed", "width", "layers")     # what has shaped the weights
    made_with = {"recipe": list(recipe), "table": [*table.shape, float(table.double().sum())]}
    made_with |= {key: getattr(config, key) for key in shaped_by}
    losses = []
    if config.resume and path and path.exists():
        state = load(path)
        if state["config"] != made_with:
            fail(f"{path} was made with {state['config']}, this run with {made_with}: drop --resume, or "
                 "choose another --out")
        losses = resume(state, "model", model, [optimizer])[1]
    for step in tqdm.trange(len(losses), steps, desc=type(model).__name__, disable=None, leave=False):
        for group in optimizer.param_groups:                   # the rate of this step
            group["lr"] = rate * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        i = torch.randint(len(data), (batch,), generator=rng)
        loss = model.loss(data[i.to(table.device)], step / steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)      # one wild window must not throw the weights
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):                      # before it can be saved
            fail(f"the loss at step {step} is {losses[-1]}: look for extreme values in the data")
        if path and ((step + 1) % 100 == 0 or step + 1 == steps):
            save(path, {"config": made_with, "step": step + 1, "history": losses,
                        "model": model.state_dict(), "optimizers": [optimizer.state_dict()]})
    return losses


# ----- evaluation: every window, one function for all -------------------------------------------------------
@torch.no_grad()
def predict(models, history, horizon):
    """The mean of the forecasts of `models`, each rolled out on its own: (B, C, at least L) -> (B, C, H)."""
    made = []
    for model in models:
        if isinstance(model, LagModel):                        # the whole roll-out is one product
            made.append(history[..., -model.lookback:] @ model.matrix(horizon).to(history))
        else:
            made.append(rollout(model, history, horizon))
    # Errors of different models partly cancel. Two of equal size s and correlation r leave, averaged, a mean
    # square of s^2 (1 + r) / 2: with r = .8 a tenth less, for free.
    return torch.stack(made).mean(0)


def errors(models, table, observed, starts, horizon):
    """Forecast - truth (N, C, H). The forecast for `start` sees rows before `start` and nothing else.

    table (T, C) is without holes, for the models; observed (T, C) is NaN where nothing was measured, and so
    is the error there and beyond the last row: a start near the end still serves the short horizons.
    """
    L = max(model.lookback for model in models)                # each model cuts off what it does not read
    history = windows(table, L)                                # history[i] is the rows i .. i + L - 1
    future = windows(F.pad(observed, (0, 0, 0, horizon), value=math.nan), horizon)
    made = []
    for some in starts.split(256):
        made.append(predict(models, history[(some - L).to(table.device)], horizon).cpu())
    return torch.cat(made) - future[starts]


def score(models, table, observed, first, last, horizons, stride=1):
    """MSE and MAE as published: means over columns, steps and *all* windows between rows `first` and `last`.

    Windows may look back beyond `first`, their H steps end before `last`. Published loaders often drop the
    last incomplete batch, and with it the hardest windows; here batches change nothing.
    """
    # ETTh1's test rows are 11520 .. 14399: for 96 steps that is 14400 - 11520 - 96 + 1 = 2,785 windows
    starts = torch.arange(first, last - min(horizons) + 1, stride)
    error = errors(models, table, observed, starts, max(horizons))     # made once for all horizons
    result = {"windows": {}, "mse": {}, "mae": {}}
    for h in horizons:
        inside = error[starts + h <= last, :, :h]      # (windows, C, h); what was not measured does not count
        result["windows"][str(h)] = len(inside)
        result["mse"][str(h)] = float(inside.square().nanmean())
        result["mae"][str(h)] = float(inside.abs().nanmean())
    return result | {"by_step": inside.square().nanmean((0, 1)).tolist()}      # of the longest horizon


def conformal(errors, level):
    """Errors of past forecasts (N, C, H) -> half the width of the interval around the next forecast, (C, H).

    The ceil((N + 1) level)-th smallest |error|. If the next error is exchangeable with the N, that is, if any
    order of the N + 1 is as likely as any other, all N + 1 ranks are equally likely for it, so it is inside
    with probability >= level: no Gaussian, any model. Example: of 19 errors and level .8 the 16th, and 16 of
    20 ranks are inside. If the rank is beyond N (20 errors, level .99), no finite width keeps the promise:
    infinity. The errors must come from the very model that forecasts, on rows to which it was not fitted.
    Errors of overlapping windows of a drifting series are exchangeable only roughly, which is why `forecast`
    prints what was covered.
    """
    known = (~errors.isnan()).sum(0)                           # (C, H): N for each column and step
    # in 64 bits, less 1e-9: in 32 bits N + 1 = 25 times .6 is 15.000001, and rounding up would give rank 16
    rank = ((known + 1).double() * level - 1e-9).ceil().long()
    sizes = errors.abs().nan_to_num(nan=math.inf).sort(0).values
    sizes = torch.cat([sizes, torch.full_like(sizes[:1], math.inf)])   # (N + 1, C, H): rank N + 1 is infinite
    return sizes.gather(0, rank[None] - 1)[0]


# ----- data: a table of numbers with a regular clock --------------------------------------------------------
@dataclasses.dataclass
class Series:
    """T rows and C columns in the units of the file; NaN where nothing was measured; row 0 is full."""
    name: str
    columns: list
    dates: list       # T datetimes, or row numbers where the file has no dates
    step: object      # between two dates: a timedelta, a number of months, or 1 row
    table: np.ndarray # (T, C)
    period: int       # P; 1: no season
    ends: tuple = ()  # rows where train, validation and test end, if they are published


# (1 - .6 B)(1 - .5 B^24 - .45 B^168) multiplied out; B is one step back, so lag 25 has -(.6 x .5) = -.3
LAW = {1: 0.6, 24: 0.5, 25: -0.3, 168: 0.45, 169: -0.27}


def generate(rows, seed):
    """x_t = sum_k LAW[k] x_{t-k} + noise of deviation 1, lifted by 20 -> (rows, 4).

    A pattern of the day that changes over weeks. The rung "truth" knows LAW, and takes for 20 the mean of the
    rows to fit.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows + 2000, 4, generator=rng, dtype=torch.float64).numpy()
    for t in range(max(LAW), len(x)):                          # until here x is only the noise
        x[t] += sum(weight * x[t - lag] for lag, weight in LAW.items())
    return 20 + x[2000:]                                       # before, the pattern has yet to build up


ETT_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
ETT = {  # file, checksum, rows a day
    "etth1": ("ETTh1.csv", "md5:8381763947c85f4be6ac456c508460d6", 24),
    "etth2": ("ETTh2.csv", "md5:51a229a3fc13579dd939364fefe9c7ab", 24),
    "ettm1": ("ETTm1.csv", "md5:82d6bd89109c63d075d99c1077b33f38", 96),
    "ettm2": ("ETTm2.csv", "md5:7687e47825335860bf58bccb31be0c56", 96)}


# --- shared: fetch
def fetch(folder, name, url, checksum):
    """Path of a data file: in $NANO_DATA or data/, else downloaded there, checked, only then given its name.

    checksum: "md5:..." or "sha256:...". A file that lies there already is the user's own and is not checked.
    """
    path = pathlib.Path(os.environ.get("NANO_DATA", "data"), folder, name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = urllib.request.urlopen(url + name, timeout=30).read()
        kind, digest = checksum.split(":")
        if hashlib.new(kind, content).hexdigest() != digest:
            raise OSError(f"what came from {url}{name} is damaged")
        write(path, content)
    return path
# --- end shared


def load_series(config):
    """--data -> Series. The four names have published borders; a file called ETTh1.csv is any file."""
    if config.data == "known":
        if config.target or config.dates:
            fail("--target and --dates are for a file: give one with --data")
        dates = [datetime(2024, 1, 1) + timedelta(hours=t) for t in range(6000)]
        return Series("known", list("abcd"), dates, timedelta(hours=1), generate(6000, config.seed),
                      config.period or 24)
    name, checksum, per_day = ETT.get(config.data, (config.data, "", 0))    # any other word is a path
    try:
        path = fetch("", name, ETT_URL, checksum) if per_day else pathlib.Path(name)
        columns, dates, step, table = read_csv(path, config.target, config.dates)
    except (OSError, ValueError) as error:
        where = f"; or put {name} into data/ or the folder that $NANO_DATA names" if per_day else ""
        fail(f"--data {config.data}: {error}{where}")
    # months of 30 days: 8640, 11520, 14400 hours, or 34560, 46080, 57600 quarters; the rest is not scored
    ends = tuple(months * 30 * per_day for months in (12, 16, 20)) if per_day else ()
    if ends and len(table) < ends[-1]:
        fail(f"{path}: {len(table)} rows, but {config.data} has {ends[-1]} and more: give the whole file")
    return Series(path.stem, columns, dates, step, table, config.period or usual_period(dates, step), ends)


def usual_period(dates, step):
    """The season of a clock: a day of up to 400 rows, a week of days, a year of weeks or months; else 1."""
    if not isinstance(dates[0], datetime):
        return 1
    # the clock alone decides: a season found in the numbers would have to look at test rows, or at a few rows
    if step in (timedelta(days=1), timedelta(days=7)):
        return 7 if step == timedelta(days=1) else 52
    rows = 12 / step if isinstance(step, int) else timedelta(days=1) / step     # months, or hours and minutes
    return int(rows) if rows == int(rows) and 2 <= rows <= 400 else 1


def fill(table, period):
    """Fill holes from the past only: the value one season earlier, else the last one. (T, C) -> (T, C)

    A straight line through the hole looks smoother, but its far end is the future of a forecast made inside.
    Example, period 2: 1, 2, nan, 4 -> 1, 2, 1, 4
    """
    values = table.copy()
    for t, c in np.argwhere(np.isnan(table)):                  # in the order of time
        season = table[t - period, c] if t >= period else math.nan
        values[t, c] = values[t - 1, c] if math.isnan(season) else season
    return values


def split(series, horizon):
    """Rows where fitting, choosing and testing end: 70, 15, 15 percent, but room for windows of `horizon`.

    Room means 21 windows in each part, or horizon + 1 where that is less: bounds are made from their errors.
    """
    n, part = len(series.table), max(int(0.15 * len(series.table)), horizon + min(horizon, 20))
    if n - 2 * part < max(2 * series.period + 2, 16):
        fail(f"{series.name}: {n} rows are too few to fit a season of {series.period} and to choose and test "
             f"forecasts of {horizon} steps: use a shorter --horizon, --period 1 (no season), or more rows")
    return n - 2 * part, n - part, n


# ----- any CSV: find the clock, find the numbers, say what was done -----------------------------------------
def to_date(cell, form):
    """ISO text (2024-03-31, 2024-03-31 02:00, 2024-03), or text in the format `form` -> datetime, or None.

    None also from year 9000 on: such dates stand for "never", and what follows 9999 is no date in Python.
    """
    cell = cell.strip()
    try:
        if form:
            date = datetime.strptime(cell, form)
        else:
            date = datetime.fromisoformat(cell + "-01" if len(cell) == 7 else cell.removesuffix("Z"))
    except (ValueError, re.error):                             # re: --dates names a part twice, as in %Y %Y
        return None
    return date.replace(tzinfo=None) if date.year < 9000 else None


def to_number(cell, comma):
    """'12.5' -> 12.5; with decimal commas '1.234,5' -> 1234.5; text, empty cells, inf, 1e200 -> nan"""
    if comma:
        grouped = re.fullmatch(COMMA_NUMBER, cell.strip())     # or 12.5 beside 1,5 would be read as 125
        cell = cell.replace(".", "").replace(",", ".") if grouped else ""
    try:
        value = float(cell) if "_" not in cell else math.nan   # Python's 1_000: in a table it is text
    except ValueError:
        return math.nan
    return value if abs(value) < 1e100 else math.nan           # squares of larger ones leave 64 bits


COMMA_NUMBER = r"[+-]?(\d{1,3}(\.\d{3})+|\d*)(,\d*)?([eE][+-]?\d+)?"  # 1.234,5 or 1234,5 or 12


def advance(date, step, k):
    """The date k steps later. 30 November + 1 month -> 31 December: the end of a month stays an end."""
    if not isinstance(date, datetime) or isinstance(step, timedelta):
        return date + k * step
    year, month = divmod(date.year * 12 + date.month - 1 + k * step, 12)  # months are counted
    last = calendar.monthrange(year, month + 1)[1]
    at_end = date.day == calendar.monthrange(date.year, date.month)[1]
    return date.replace(year=year, month=month + 1, day=last if at_end else min(date.day, last))


def find_clock(cells, form):
    """{column: its cells as text} -> dates, None where a cell is none. Their column leaves `cells`.

    The first column in which nine cells of ten are dates; else columns called year, month, day, hour, as many
    as there are in this order (a year alone is enough); else there are no dates and rows are numbered.
    """
    for name in cells:
        dates = [to_date(cell, form) for cell in cells[name]]
        if sum(date is not None for date in dates) > 0.9 * len(dates):
            del cells[name]
            return dates
    if form:
        raise ValueError(f"no column holds dates like --dates '{form}'")
    lower = {name.strip().lower(): name for name in cells}
    parts = list(itertools.takewhile(lower.__contains__, ("year", "month", "day", "hour")))
    if not parts:
        return list(range(len(next(iter(cells.values())))))
    form = "%Y %m %d %H"[:3 * len(parts) - 1]                  # each part is two letters and a space
    rows = zip(*(cells.pop(lower[part]) for part in parts))    # ("2010", "1", "2", "0"), ...
    return [to_date(" ".join(row), form) for row in rows]


def to_grid(dates, table):
    """Dated rows in any order -> dates, step and (T, C) on a regular clock, NaN where a tick has no row."""
    known = sorted({date for date in dates if date is not None})
    steps = Counter(b - a for a, b in zip(known, known[1:]))   # an hour: 8,700 times, 3 hours: 7 times, ...
    if not steps:
        raise ValueError("there is only one date" if known else "no cell of the date column is a date")
    first, step = known[0], steps.most_common(1)[0][0]         # the usual distance is the step of the clock
    rows = [i for i, date in enumerate(dates) if date is not None]
    if isinstance(step, timedelta) and step >= timedelta(days=28):
        step = round(step.days / 30.44)                     # months: 28 to 31 days are one, 365 or 366 are 12
        ticks = [((dates[i].year - first.year) * 12 + dates[i].month - first.month) / step for i in rows]
    else:
        ticks = [(dates[i] - first) / step for i in rows]
    places = np.rint(ticks).astype(int)                        # which tick of the clock a row is
    wrong = int((np.abs(places - ticks) > 0.1).sum()) + len(places) - len(set(places.tolist()))
    if wrong > 0.05 * len(rows) or places.max() >= 2 * len(rows):
        raise ValueError(f"no regular clock: the usual step is {step}, but {wrong} rows are off its ticks or "
                         "share a date; resample the table to equal steps, or keep one of its series")
    grid = np.full((places.max() + 1, table.shape[1]), math.nan)
    grid[places] = table[rows]                                 # of two rows with one date the later stays
    return [advance(first, step, k) for k in range(len(grid))], step, grid


def read_csv(path, target="", form=""):
    """A header and rows -> column names, dates, step, table (T, C) in units. Prints what it did."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:      # newline: a quoted cell may hold one
            separator = max(",;\t", key=file.readline().count)          # what the header has most of
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)  # strict: a quote must end
            lines = list(reader)
    except csv.Error as error:
        raise ValueError(f"{error} in line {reader.line_num}, or a quote above is not closed") from None
    except UnicodeDecodeError:
        raise ValueError("this is no UTF-8 text; export the table as CSV (UTF-8)") from None
    rows = [row for row in lines if any(cell.strip() for cell in row)]
    if len(rows) < 4:
        raise ValueError(f"{len(rows)} lines with content; a header and at least three rows are needed")
    if len(set(rows[0])) < len(rows[0]):
        raise ValueError("two columns have the same name")
    wide = [row for row in rows if any(row[len(rows[0]):])]   # more cells than the header: which is which?
    if wide:
        start = separator.join(wide[0])[:40]
        raise ValueError(f"the header has {len(rows[0])} cells, a row {len(wide[0])}: {start}; quote cells "
                         "that hold a separator, or write decimal points")
    cells = dict(zip(rows[0], itertools.zip_longest(*rows[1:], fillvalue="")))
    # separated by ; because the comma is taken, for decimals? If no number has one, points are decimal points
    numbers = (cell for cell in itertools.chain(*rows[1:]) if "," in cell)
    comma = separator == ";" and any(not math.isnan(to_number(cell, True)) for cell in numbers)
    dates, columns = find_clock(cells, form), {}
    for name in cells:
        numbers = np.array([to_number(cell, comma) for cell in cells[name]])    # (T,)
        known = numbers[np.isfinite(numbers)]
        # left out: text, and what rises by one number in all rows: by 0 it never changes, by 1 it counts them
        if len(known) > max(2, 0.5 * len(numbers)) and np.ptp(np.diff(known)) > 0:
            columns[name] = numbers
    if not columns or target and target not in columns:
        raise ValueError(f"no column {target or 'of changing numbers'}, only {', '.join(columns) or 'text'}")
    columns = {target: columns[target]} if target else columns
    dates, step, table = to_grid(dates, np.stack(list(columns.values()), 1))
    full = np.flatnonzero(~np.isnan(table).any(1))        # a hole before the first full row has no past to be
    if len(full) == 0:                                     # filled from; empty rows at the end are the future
        raise ValueError("no row holds all columns; choose one with --target")
    begin, end = full[0], np.flatnonzero(~np.isnan(table).all(1))[-1] + 1
    dates, table = dates[begin:end], table[begin:end]
    left_out = ", ".join(name for name in cells if name not in columns) or "none"
    clock = f"every {step}" if isinstance(dates[0], datetime) else "no dates found (--dates FORMAT helps)"
    print(f"{path}: {len(table)} rows, {dates[0]} to {dates[-1]}, {clock}")
    print(f"columns {', '.join(columns)}; left out: {left_out}; missing values: {np.isnan(table).sum()}, "
          "filled from one season earlier and never scored")
    return list(columns), dates, step, table


# ----- the ladder: all models on one series -----------------------------------------------------------------
# Recipes of the nets: steps, windows a step, learning rate. Chosen, like all sizes, as the docstring says.
NETS = {"arnet": (2000, 512, 3e-3), "itransformer": (600, 64, 1e-3), "decoder": (215, 256, 4e-3)}
MODELS = ("repeat", "snaive", "ar", "sar", "ridge", *NETS)


def build(name, table, P, config, path=None):
    """Fit a model to the rows of `table` (T, C), scaled. Sizes follow the season P, within a quarter of T."""
    most = max(1, len(table) // 4)                             # rows that a lookback may take
    token = P * -(-16 // P)                           # whole seasons, 16 rows or more: 24, 7, 1 -> 24, 21, 16
    lookback = min(14 * token, most, 1000)                     # two weeks of hours: 336
    lookback -= lookback % P if lookback > P else 0            # whole seasons, or the level would swing
    chunk = token * max(1, min(4, most // token))              # four days of hours: 96
    if name == "repeat":                                       # the last value, again and again
        return LagModel([1], [[1.0]], 1, centre=False)
    if name == "snaive":                                # the next P values are those of lags P, P - 1, ..., 1
        return LagModel(range(P, 0, -1), torch.eye(P), P, centre=False)
    if name == "truth":                                        # generated series only
        return LagModel(LAW, [[weight] for weight in LAW.values()], max(LAW), centre=False)
    if name == "ar":
        return fit_lags(table, range(1, lookback + 1), lookback)
    if name == "ridge":                                        # the same lags, many steps a call
        return fit_lags(table, range(1, lookback + 1), lookback, chunk, ridge=1e-3)
    if name == "sar":                                          # 29 seasons, or what a thousand rows hold
        seasons = max(1, min(29, most // P - 1, 1000 // P - 1))
        lags = seasonal_lags(P, seasons)
        return fit_lags(table, lags, P * -(-max(lags) // P))   # whole seasons that hold all lags
    torch.manual_seed(config.seed)                             # the first weights
    if name == "arnet":
        net = ARNet(lookback, sparsity=0.3)
    elif name == "itransformer":
        net = ITransformer(4 * token, chunk, config.width, config.layers)
    else:
        net = SegmentDecoder(token, max(1, min(28, most // token)), chunk, config.width, config.layers)
    train(net.to(table.device), table, NETS[name], config, path)
    return net.rule() if name == "arnet" else net


def numbers(model):
    """How many numbers were learned: the rules without a level are those that nobody fitted."""
    if isinstance(model, LagModel):
        return model.weight.numel() if model.centre else 0
    return sum(p.numel() for p in model.parameters())


class Ladder:
    """A series and its models: fitted on rows before `first`, chosen on those before `middle`, then tested.

    A ladder, because models are entered simplest first: a net has earned its place if it beats those below.

    All is scaled: minus the mean, divided by the (population) deviation of each column in the rows before
    `first`. Nothing behind that border, not even a mean, reaches a model before its forecast is due.
    """

    def __init__(self, series, ends, horizons, config, device):
        self.series, self.horizons, self.config = series, horizons, config
        self.first, self.middle, self.last = ends
        known = series.table[:self.first]
        self.mean, self.std = np.nanmean(known, 0), np.nanstd(known, 0)     # (C,) each
        self.std[self.std == 0] = 1                            # a column that stood still until `first`
        self.observed = self.scale(series.table)               # (T, C), NaN in the holes: what is scored
        self.table = self.scale(fill(series.table, series.period)).to(device)  # no holes: what models read
        self.fitted, self.rows = {}, []

    def scale(self, table):
        return torch.tensor((table - self.mean) / self.std, dtype=torch.float32)

    def unscale(self, forecast):
        """(C, H) -> in the units of the file: each column by its own two numbers."""
        return forecast.double().numpy() * self.std[:, None] + self.mean[:, None]

    def models(self, name):
        """decoder -> one model; sar+decoder -> two, whose forecasts are averaged. Each is fitted once."""
        for part in name.split("+"):
            if part not in self.fitted:
                path = pathlib.Path(self.config.out, part + ".pt")
                rows = self.table[:self.first]
                self.fitted[part] = build(part, rows, self.series.period, self.config, path)
        return [self.fitted[part] for part in name.split("+")]

    def enter(self, name):
        """Fit and score -> a row of plain numbers. `val` is what may be looked at when choosing a model."""
        began = time.time()
        models = self.models(name)
        row = {"name": name, "params": sum(map(numbers, models)), "fit_seconds": time.time() - began,
               "lookback": max(model.lookback for model in models)}
        row |= score(models, self.table, self.observed, self.middle, self.last, self.horizons)
        stride = max(1, (self.middle - self.first) // 400)     # some 400 windows are enough to choose
        val = score(models, self.table, self.observed, self.first, self.middle, self.horizons, stride)
        row["mean"], row["val"] = (statistics.fmean(result["mse"].values()) for result in (row, val))
        return row

    def climb(self, names):
        """Enter all models, print a line for each -> the name that the validation rows choose."""
        naive = self.enter("snaive")["mean"]                   # the yardstick of `skill`
        titles = "".join(f"{f'h = {h}':>14}" for h in self.horizons)
        print(f"\nMSE / MAE      numbers lookback  fit s{titles}  mean MSE  skill     val")
        for name in names:
            try:
                row = self.enter(name)
            except ValueError as error:                        # too few rows for this one; the others go on
                print(f"{name:<14}left out: {error}")
                continue
            row["skill"] = 1 - row["mean"] / max(naive, 1e-12)  # 0: no better than the seasonal naive
            self.rows.append(row)
            cells = "".join(f"{row['mse'][h]:>8.3f} {row['mae'][h]:.3f}" for h in row["mse"])
            print(f"{name:<14}{row['params']:>8,}{row['lookback']:>9}{row['fit_seconds']:>7.1f}{cells}"
                  f"{row['mean']:>10.4f}{row['skill']:>7.0%}{row['val']:>8.3f}", flush=True)
        # `truth` knows what no model can. Test errors stand in the table, but have no say in the choice.
        candidates = [row for row in self.rows if row["name"] != "truth"]
        if not candidates:
            fail("too few rows for every model: give more rows, or --model repeat,snaive")
        best = min(candidates, key=operator.itemgetter("val"))
        windows = ", ".join(f"{n:,} at h = {h}" for h, n in best["windows"].items())
        print(f"test windows: {windows}; the validation rows choose {best['name']}")
        return best["name"]


def compare_weights(ladder):
    """Generated series only: were its weights found, and how much do the other lags get?"""
    print("\nweight of lag " + "".join(f"{lag:>8}" for lag in LAW) + "   largest other")
    for name in ("truth", "ar", "sar", "arnet"):
        model = ladder.models(name)[0]
        weights = dict(zip(model.lags.tolist(), model.weight[:, 0].abs().tolist()))    # lag: |weight|
        cells = "".join(f"{weights.pop(lag, 0):>8.3f}" for lag in LAW)
        print(f"|{name}|".ljust(14) + f"{cells}{max(weights.values(), default=0):>16.3f}")


# ----- forecast: what comes next, with bounds ---------------------------------------------------------------
def forecast(ladder, name, out):
    """Measure the errors of a model on the test rows, write what comes next with bounds made from them.

    The model that forecasts is the one whose errors were measured. To fit it again on all rows is usual; but
    that model would make other errors, which nobody has seen, and the promise of `conformal` would be void.
    It reads the newest rows all the same; only its weights are older.
    """
    series, models, H, level = ladder.series, ladder.models(name), ladder.horizons[-1], ladder.config.level
    starts = torch.arange(ladder.middle, ladder.last - H + 1)
    seen = errors(models, ladder.table, ladder.observed, starts, H)            # (N, C, H)
    width = conformal(seen, level)                             # (C, H)
    if width.isinf().any():
        needed, known = math.ceil(level / (1 - level) - 1e-9), int((~seen.isnan()).sum(0).min())
        fail(f"--level {level} needs {needed} past errors of each step, there are {known}: lower --level or "
             "--horizon, or give more rows")
    early, late = seen.chunk(2)                         # do bounds made on the first half hold on the second?
    inside = float((late.abs() <= conformal(early, level)).sum() / (~late.isnan()).sum())
    enough_early = conformal(early, level).isfinite().all()
    covered = f"cover {inside:.0%} of the second" if enough_early else "are infinite: too few to check"
    print(f"\nforecast by {name}, {level:.0%} bounds from its errors in {len(seen)} test windows; from the "
          f"first half of them, bounds {covered}")
    ahead = predict(models, ladder.table.T[None], H)[0].cpu()  # (C, H), scaled
    middle, low, high = (ladder.unscale(x) for x in (ahead, ahead - width, ahead + width))
    T = len(series.dates)                               # counted from the first: after 30 Jan, 28 Feb 30 Mar
    dates = [advance(series.dates[0], series.step, T - 1 + k) for k in range(1, H + 1)]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    titles = [[column, column + "_lower", column + "_upper"] for column in series.columns]
    writer.writerow(["date", *itertools.chain(*titles)])
    for h, date in enumerate(dates):
        row = np.stack([middle[:, h], low[:, h], high[:, h]], 1).flatten()     # three numbers of each column
        writer.writerow([date] + [f"{number:.6g}" for number in row])
    write(out / "forecast.csv", file.getvalue().encode())
    print(f"wrote {out / 'forecast.csv'}: {H} steps, {dates[0]} to {dates[-1]}")
    draw_forecast(series, dates, middle, low, high, f"{name}, {level:.0%} bounds", out / "forecast.png")
    return {"coverage": inside, "first": str(dates[0]), "last": str(dates[-1])}


# ----- pictures ---------------------------------------------------------------------------------------------
def new_figure(width, height, rows, columns):
    """A matplotlib figure that needs no screen -> figure, axes (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_ladder(ladder, path):
    """Error at each step ahead: who is good at the next step, and who at the last?"""
    figure, axes = new_figure(7, 4.2, 1, 1)
    axis, best = axes[0, 0], min(row["mean"] for row in ladder.rows)
    for row in ladder.rows:
        if row["mean"] < 2 * best:                             # others would flatten the picture
            axis.plot(range(1, len(row["by_step"]) + 1), row["by_step"], label=row["name"])
    axis.set(xlabel="steps ahead", ylabel="MSE, scaled", title="test error at each step", ylim=(0, None))
    axis.legend(fontsize=8, ncol=2, loc="lower right")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def draw_forecast(series, dates, middle, low, high, title, path):
    """The end of every column (six at most) and what comes next."""
    shown = min(6, len(series.columns))
    figure, axes = new_figure(11, 1.2 + 2.6 * -(-shown // 2), -(-shown // 2), min(2, shown))
    back = max(2 * len(dates), 3 * series.period)              # rows of the past that are shown
    for c, axis in enumerate(axes.flat[:shown]):
        axis.plot(series.dates[-back:], series.table[-back:, c], color="0.4", label="measured")
        axis.plot(dates, middle[c], color="tab:red", label=title)
        axis.fill_between(dates, low[c], high[c], color="tab:red", alpha=0.2, lw=0)
        axis.set_title(series.columns[c], parse_math=False)    # a name may hold $
        axis.tick_params(axis="x", labelrotation=20, labelsize=8)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


# ----- settings and main ------------------------------------------------------------------------------------
NAME, PARTS = "nano_ts", ("eval", "forecast")
FLAGS = {  # name: default, what is allowed (a list, or the least value), help
    "data": ("known", None, "known (generated, of known weights), etth1, etth2, ettm1, ettm2, or a CSV file"),
    "out": ("out/ts", None, "folder for checkpoints, pictures, forecast.csv and metrics.json"),
    "preset": ("cpu", ("cpu", "gpu"), "other defaults; gpu: wider and deeper nets"),
    "seed": (0, 0, "of the generated series and the nets"),
    "device": ("auto", ("auto", "cpu", "cuda", "mps"), "where to train the nets"),
    "resume": (False, None, "take finished nets from OUT, go on with the one that was interrupted"),
    "target": ("", None, "CSV: forecast this column alone"),
    "dates": ("", None, "CSV: format of the dates if they are not ISO, as in %%d/%%m/%%Y or %%Y"),
    "period": (0, 0, "rows in a season, 1: none, 0: a day of hours, a week of days, a year of weeks, months"),
    "horizon": ("", None, "steps ahead, as in 48 or 96,192; nothing: two seasons, or what is published"),
    "model": ("", None, "as in sar,decoder,sar+decoder; nothing: all, but no nets for forecast"),
    "level": (0.8, 0.01, "probability that a bound shall hold, below 1"),
    "width": (64, 4, "width of itransformer and decoder, a multiple of 4"),
    "layers": (1, 1, "their blocks"),
}
PRESETS = {"cpu": {}, "gpu": dict(width=128, layers=2)}


def fail(message):
    """What is wrong, where, and what to do, in one line on stderr; exit code 2."""
    print(f"{NAME}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def read_settings(argv=None):
    """The command line -> part, config. A flag that was given wins over the preset, that over the default."""
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail                                     # argparse would print the usage first: many lines
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS), help="all: both")
    for name, (default, _, text) in FLAGS.items():
        kind = {"action": "store_true"} if default is False else {"type": type(default)}
        parser.add_argument("--" + name, **kind, default=argparse.SUPPRESS, help=f"{text} [{default}]")
    given = vars(parser.parse_args(argv))                    # SUPPRESS: this holds only what was really given
    if any(value in ([], "--") for value in given.values()):     # what argparse makes of --out=--
        fail("-- is no value: give the flag another")
    part, defaults = given.pop("part"), {name: default for name, (default, _, _) in FLAGS.items()}
    for name, value in given.items():
        allowed = FLAGS[name][1]
        if isinstance(allowed, tuple) and value not in allowed:
            fail(f"--{name} {value}: choose one of {', '.join(allowed)}")
        if isinstance(allowed, (int, float)) and not allowed <= value < 1e9:  # so written, nan fails, too
            fail(f"--{name} {value}: must be a number from {allowed} on, below a billion")
    return part, SimpleNamespace(**defaults | PRESETS[given.get("preset", "cpu")] | given)


def pick_device(name):
    """auto: the first that this machine has. Least squares stays on the CPU, in float64."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in has if has[k]) if name == "auto" else name
    if not has[kind]:
        fail(f"--device {name}: this torch sees no such device; use --device cpu")
    return torch.device(kind)


# --- shared: checkpoint
def write(path, content):
    """Write bytes so that `path` is always all of the old file or all of the new one."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())                     # on the disk before it has the name: power may fail
        os.replace(part, path)                                   # atomic
    finally:
        part.unlink(missing_ok=True)                             # half a file is of no use


def save(path, state):
    """Keep tensors and plain types; by way of the memory, for torch would hide that a disk is full."""
    content = io.BytesIO()
    torch.save({"script": NAME, **state}, content)
    write(path, content.getbuffer())


def load(path):
    """-> the dict that `save` wrote, on the CPU. weights_only: nothing in the file is executed.

    The zip archive has a checksum of each part, which torch.load ignores: of 200 files with one bit turned it
    gave 187 back, with a wrong weight. A zip may unpack to far more than its size; ours is not compressed.
    """
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(part.file_size for part in file.infolist())
            if size > path.stat().st_size or file.testzip():
                raise ValueError("a bit has changed, or a zip bomb")
        state = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"config": dict, "step": int, "history": list, "optimizers": list}
        if state.get("script") != NAME or any(type(state[key]) is not kinds[key] for key in kinds):
            raise ValueError("written by another script")
    except FileNotFoundError:
        fail(f"there is no checkpoint {path}: train first, or point --out at the folder of a run")
    except Exception:                                            # torch reports broken files by many types
        fail(f"{path} is broken, or not a checkpoint of {NAME}: train again, or choose another --out")
    return state


def resume(state, name, network, optimizers=()):
    """Put what `save` has kept of them back in its places -> first step, history, seconds so far."""
    try:
        network.load_state_dict(state[name])
        for i, optimizer in enumerate(optimizers):
            optimizer.load_state_dict(state["optimizers"][i])
            for weight, memory in optimizer.state.items():       # their shapes torch does not compare
                assert all(x.shape in ((), weight.shape) for x in memory.values()), "running means"
        return state["step"], state["history"], float(state.get("seconds", 0))
    except Exception as error:                                   # of another version, or changed by hand
        fail(f"this checkpoint fits another network ({str(error)[:99]}): train again, or change --out")


def run_as_program(main):
    """Call main(). Being stopped, no memory, or a file that cannot be used, ends in one line."""
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; the same command with --resume goes on from the last report, if there was one")
    except OSError as error:
        fail(f"cannot use {error.filename or 'a file'} ({error.strerror}): make room, or another --out")
    except (MemoryError, RuntimeError) as error:                 # torch has no type of its own for it
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in ("allocate", "overflow")):
            raise
        fail("this needs more memory than there is: choose smaller sizes, or a smaller batch")
# --- end shared


def read_lists(config, part, series):
    """--horizon and --model -> steps ahead, names of models, with defaults that suit the series."""
    P, published = series.period, series.ends and part != "forecast"
    text = config.horizon or ("96,192,336,720" if published else str(2 * P if P > 1 else 10))
    horizons = sorted({int(word) if word.isdecimal() else 0 for word in text.split(",")})
    if horizons[0] < 1:
        fail(f"--horizon {text}: must be a number of steps, or a list as in 96,192")
    names = config.model.split(",") if config.model else [*MODELS, "sar+decoder"]
    if part == "forecast" and not config.model:                # a second instead of a minute; see --model
        names = MODELS[:5]
    for name in "+".join(names).split("+"):
        if name not in MODELS:
            fail(f"--model {config.model}: no model {name!r}; there are {', '.join(MODELS)}, and sums as in "
                 "sar+decoder")
    return horizons, [*names, "truth"] if config.data == "known" else names


def main(argv=None):
    """The command line -> the metrics, which are also written to OUT/metrics.json."""
    began = time.time()
    part, config = read_settings(argv)
    if not config.level < 1 or config.width % 4:
        fail(f"--level {config.level} must be below 1, --width {config.width} a multiple of 4 (the heads)")
    device, out = pick_device(config.device), pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)                   # now: a typing error must not cost the whole run
    series = load_series(config)
    horizons, names = read_lists(config, part, series)
    # `forecast` alone learns from, and is measured on, the newest rows; else published borders, if any
    ends = series.ends if series.ends and part != "forecast" else split(series, horizons[-1])
    print(f"{ends[0]} rows to fit, {ends[1] - ends[0]} to choose, {ends[2] - ends[1]} to test; season of "
          f"{series.period}; nets on {device}", flush=True)
    ladder = Ladder(series, ends, horizons, config, device)
    best = ladder.climb(names)                                 # fits, scores and prints all
    metrics = {"device": str(device), "seed": config.seed, "models": ladder.rows, "chosen": best}
    if config.data == "known" and part != "forecast":
        compare_weights(ladder)
    if part != "forecast":
        draw_ladder(ladder, out / "ladder.png")
    if part != "eval":
        metrics |= forecast(ladder, best, out)
    metrics["params"], metrics["seconds"] = sum(map(numbers, ladder.models(best))), time.time() - began
    # numbers only: what a lesson or a table in a README is made from
    write(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    print(f"total {metrics['seconds']:.0f} s")
    return metrics


if __name__ == "__main__":
    run_as_program(main)
