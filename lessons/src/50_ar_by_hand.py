# %% [markdown]
# # 50 AR by hand
#
# **Guess first, and write your answers down.** A series is made from its own past and a little noise $e_t$ of deviation 1. Two recipes:
#
# $$\text{A:}\quad x_t=1.8\,x_{t-1}-0.9\,x_{t-2}+e_t\qquad\qquad \text{B:}\quad x_t=0.6\,x_{t-1}+0.5\,x_{t-2}+e_t$$
#
# 1. In A one weight is far above 1; in B both are well below. Which of the two runs away?
# 2. You see 300 values of A and want to find 1.8 and -0.9. You do not know that there are two weights, and allow 40. What is lost?
# 3. A forecast of A 60 steps ahead: does its error still grow at step 60, or has it stopped somewhere?
#
# All the rest of the course predicts the next thing from the things before. Here the model is one line, so every question about it has an exact
# answer: what it remembers, whether a roll-out explodes, how wrong step 60 will be. You compute all of it by hand.

# %%
import sys
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import matplotlib.pyplot as plt, torch, nano_ts
from lessons.checks import band, lesson_50 as check, put, steps
torch.manual_seed(0)

# %%
# x_t = sum_k weights[k-1] x_{t-k} + e_t, the first 500 steps thrown away -> (rows, columns), float64
def simulate(weights, rows, seed, columns=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows + 500, columns, generator=rng, dtype=torch.float64).numpy()
    for t in range(len(weights), len(x)):
        for k, weight in enumerate(weights, 1):
            if weight:
                x[t] += weight * x[t - k]
    return torch.from_numpy(x[500:])


A, B = [1.8, -0.9], [0.6, 0.5]
figure, axes = plt.subplots(1, 2, figsize=(8, 2.2), layout="constrained")
for axis, name, weights in zip(axes, "AB", (A, B)):
    x = simulate(weights, 120, seed=1)[:, 0]
    axis.plot(x)
    axis.set(title=f"{name}: {weights}", xlabel="step")
    print(f"{name}: largest of 120 values {x.abs().max():.3g}")
plt.show()

# %% [markdown]
# B runs away: after 620 steps, 500 of them not shown, it has passed $10^{17}$. A swings, about six times in 120 steps, and nobody put a wave
# into it. Single weights say nothing. What does?
#
# ## One step is a matrix
#
# Keep the last p values as a **state**, newest first: $s_t=(x_{t-1},\dots,x_{t-p})$. One step puts a weighted sum in front, moves the others
# back, and forgets the last:
#
# $$s_{t+1}=M s_t,\qquad M=\begin{pmatrix}a_1&a_2&\cdots&a_p\\1&&&\\&\ddots&&\\&&1&\end{pmatrix}$$
#
# $M$ is the **companion matrix**. A forecast h steps ahead is the first entry of $M^h s$: a roll-out is a matrix power. So all depends on the
# eigenvalues $\lambda$ of $M$, which are the roots of $z^p=a_1z^{p-1}+\dots+a_p$: a part of the past that points along one eigenvector is
# multiplied by $\lambda$ at each step. If all $|\lambda|<1$ every shock dies out; $|\lambda|>1$ explodes; a complex pair turns by its angle and
# makes a wave of $2\pi/\text{angle}$ steps.
#
# **Exercise 1.** `companion(weights)`: (p,) -> (p, p), weights[0] belongs to lag 1. `companion([a, b])` is `[[a, b], [1, 0]]`.
#
# *Hint:* `torch.diag(ones, -1)` writes below the diagonal. For p = 1 there is nothing below it.

# %%
def companion(weights):
    """The matrix of one step of the state (x[t-1], ..., x[t-p])."""
    # SOLUTION (about 3 lines, 6 minutes)
    matrix = torch.diag(torch.ones(len(weights) - 1, dtype=weights.dtype), -1)
    matrix[0] = weights
    return matrix
    # END


check.check_companion(companion)

# %% [markdown]
# The script's `LagModel` is such a rule, with `radius()` for the largest $|\lambda|$ (`centre=False`: no level is taken out). For two lags the
# eigenvalues are the roots of $z^2=a_1z+a_2$:

# %%
for name, (a, b) in (("A", A), ("B", B)):
    root = (a + complex(a * a + 4 * b) ** 0.5) / 2
    model = nano_ts.LagModel([1, 2], [[a], [b]], 2, centre=False)
    turn = f", a turn in {2 * torch.pi / torch.tensor(root).angle():.1f} steps" if root.imag else ""
    print(f"{name}: root {root:.3f}, size {abs(root):.4f}, the script says {model.radius():.4f}{turn}")
print(f"a radius of 1.01 for 720 steps: {1.01 ** 720:,.0f}; of 1.0005: {1.0005 ** 720:.2f}")

# %% [markdown]
# A's radius is $\sqrt{0.9}=0.9487$ (for a complex pair, $-a_2$ is the product of the two roots), and it turns once in 19.5 steps: the wave in
# the picture. B's is 1.07. Least squares does not look at the radius: a fit with small one-step errors may have one of 1.01, and 720 steps
# ahead that is a factor of 1,292. So `nano_ts.stabilise` shrinks the weights of a fit whose radius is above 1.0005.
#
# ## From data to weights: Yule and Walker
#
# Multiply $x_t=\sum_k a_k x_{t-k}+e_t$ by $x_{t-j}$ and take the mean. The noise is new at time t, so it is uncorrelated with the past, and
# what remains are **autocovariances** $r_k=\mathrm E[x_t x_{t-k}]$ (mean of x taken out):
#
# $$r_j=\sum_{k=1}^{p}a_k\,r_{|j-k|},\quad j=1\dots p .$$
#
# These p equations have p unknowns and need only p + 1 numbers from the whole series. Udny Yule used two lags for sunspots in 1927.
#
# **Exercise 2.** `autocovariance(x, order)`: (T, C) -> $r_0\dots r_{order}$ in float64, with each column's mean taken out, averaged over
# columns: $r_k=\frac1T\sum_{t=k}^{T-1}(x_t-\bar x)(x_{t-k}-\bar x)$. For the column 1, 2, 3 and order 1: 2/3, 0.
#
# *Hint:* the sum for lag k has T - k terms, and is divided by **T** all the same. Find out below why.

# %%
def autocovariance(x, order):
    """Autocovariances of lags 0 .. order, mean over columns: (T, C) -> (order + 1,)."""
    # SOLUTION (about 5 lines, 8 minutes)
    x = x.double() - x.double().mean(0)
    r = []
    for k in range(order + 1):
        r.append((x[k:] * x[:len(x) - k]).sum(0).mean())
    return torch.stack(r) / len(x)
    # END


check.check_autocovariance(autocovariance)

# %% [markdown]
# For a sum of T - k terms it looks more honest to divide by T - k. Try both on 200 pieces of A, 60 values each, 20 lags. (`lag_products`
# and `toeplitz` are ours, so that this cell runs before you have written yours.)

# %%
# sums of x_t x_{t-k}, by FFT: padded with zeros, or the end of the series would meet its start
def lag_products(x, order):
    power = torch.fft.rfft((x - x.mean(0)), n=2 * len(x), dim=0).abs().square()
    return torch.fft.irfft(power, dim=0)[:order + 1].mean(1)


def toeplitz(r):  # (p,) -> (p, p), entry (i, j) is r[|i - j|]
    i = torch.arange(len(r))
    return r[(i[:, None] - i).abs()]


radii = {"T": [], "T - k": []}
for seed in range(steps(200)):
    x = simulate(A, 60, seed)
    for name, count in (("T", 60.0), ("T - k", 60.0 - torch.arange(21))):
        r = lag_products(x, 20) / count
        fit = nano_ts.LagModel(range(1, 21), torch.linalg.solve(toeplitz(r[:-1]), r[1:])[:, None], 20, centre=False)
        radii[name].append(fit.radius())
for name, sizes in radii.items():
    sizes = torch.tensor(sizes)
    print(f"divided by {name:5}: radius {sizes.min():.3f} to {sizes.max():.3f}, above 1 in {(sizes > 1).double().mean():.0%} of the pieces")

# %% [markdown]
# Divided by T the $r_k$ are the autocovariances of something, namely of the piece with zeros before and behind it. So the matrix of the
# $r_{|i-j|}$ is positive definite and the fit is stable, always. Divided by T - k each number is nearly unbiased, but together they may be
# the autocovariances of nothing: six fits in ten explode.
#
# ## Levinson and Durbin: one more lag at a time
#
# A general solver needs about $p^3/3$ multiplications. But the matrix has the same number along each diagonal (a **Toeplitz** matrix), and so
# the solution for k + 1 lags follows from the one for k. Let $a_1\dots a_k$ be known, with error variance $v$ (at first $v=r_0$, no lags). What lag k + 1 can still
# explain is the **reflection**
#
# $$g=\frac{r_{k+1}-\sum_{j=1}^{k}a_j\,r_{k+1-j}}{v},\qquad a_j\leftarrow a_j-g\,a_{k+1-j},\qquad a_{k+1}=g,\qquad v\leftarrow v\,(1-g^2).$$
#
# The second formula corrects the old weights by themselves, read backwards; all of them at once. The cost is $p^2$. And $|g|<1$ at every order
# if and only if the radius is below 1. Worked for $r=(1,\,0.5,\,0.25)$: $g=0.5$, $v=0.75$; then $g=(0.25-0.5\cdot0.5)/0.75=0$: the second lag
# explains nothing.
#
# **Exercise 3.** `levinson(r)`: (p + 1,) -> the weights (p,), and the error variances of orders 0 to p, (p + 1,). For the r above: (0.5, 0)
# and (1, 0.75, 0.75). No solver.
#
# *Hint:* `flip(0)` reads backwards, and makes a copy. In a loop over j that overwrites $a_j$ one after the other, what would go wrong?

# %%
def levinson(r):
    """Solve r_j = sum_k a_k r_|j-k| order by order -> weights (p,), error variances (p + 1,)."""
    # SOLUTION (about 7 lines, 15 minutes)
    weights, error = r[:0], [r[0]]
    for k in range(len(r) - 1):
        missing = r[k + 1] - (weights * r[1:k + 1].flip(0)).sum()
        reflection = missing / error[-1]
        weights = torch.cat([weights - reflection * weights.flip(0), reflection[None]])
        error.append(error[-1] * (1 - reflection**2))
    return weights, torch.stack(error)
    # END


check.check_levinson(levinson)

# %% [markdown]
# The second question: error variances at 1, 2, 3 ... 40 lags. Below: the one that Yule-Walker believes, $v$ from its 300 values; that of least
# squares on the 300 values it was fitted to; and those of both on 40 fresh series of the same kind.

# %%
x, fresh = simulate(A, 300, seed=3), simulate(A, 300, seed=4, columns=40)
r, orders, table = lag_products(x, 40) / len(x), (1, 2, 3, 5, 10, 20, 40), []
for p in orders:
    weights = torch.linalg.solve(toeplitz(r[:p]), r[1:p + 1])
    row = [r[0] - weights @ r[1:p + 1]]
    fits = (fresh, weights), (x, nano_ts.fit_lags(x, range(1, p + 1), p, centre=False).weight[:, 0])
    for series, found in (*fits, (fresh, fits[1][1])):
        w = nano_ts.windows(series, p + 1)  # (n, columns, p + 1)
        row.append((w[..., -1] - w[..., :-1] @ found.flip(0)).square().mean())
    table.append(torch.stack(row))
print("      Yule-Walker      least squares\nlags  believes  fresh  own    fresh")
for p, row in zip(orders, table):
    print("{:4}  {:.3f}     {:.3f}  {:.3f}  {:.3f}".format(p, *row))

# %%
table = torch.stack(table)
figure, axes = plt.subplots(1, 2, figsize=(8, 2.3), layout="constrained")
for column, name in ((1, "Yule-Walker, fresh"), (2, "least squares, own"), (3, "least squares, fresh")):
    axes[0].plot(orders, table[:, column], ".-", label=name)
axes[0].set(xlabel="lags", title="error variance; the noise has 1", ylim=(0.7, 2.0))
axes[0].legend()
axes[1].plot(r / r[0], ".-")
axes[1].set(xlabel="lag", title="autocorrelation of A, 300 values")
plt.show()

# %% [markdown]
# On fresh data both errors fall until two lags and no further: that is how one sees the order. (One lag is a disaster although the
# autocorrelation at lag 1 is near 1: the second makes A turn.) Each further weight is noise around 0. On its own data least squares gets
# better and better, 0.78 with 40 lags, less than the noise; on fresh data it gets worse, from 0.98 to 1.08. So what is lost is a tenth, and
# the data of the fit do not show it.
#
# At two lags Yule-Walker believes 1.86 where 1 is true. We come back to that.
#
# ## How wrong is step h? Psi weights
#
# Let one shock of size 1 hit a series at rest. Its echo is $\psi_0=1,\ \psi_j=\sum_{k=1}^{\min(j,p)}a_k\psi_{j-k}$: the roll-out of the
# history $(\dots,0,0,1)$. The error h steps ahead is the sum of the echoes of the h shocks that nobody knew, so its variance is
# $\sigma^2(\psi_0^2+\dots+\psi_{h-1}^2)$. Worked: one lag of 0.5 gives 1, 0.5, 0.25.
#
# **Exercise 4.** `psi(weights, horizon)`: (p,) -> $\psi_0\dots\psi_{horizon-1}$, (horizon,).
#
# *Hint:* for j < p only j weights have something to multiply.

# %%
def psi(weights, horizon):
    """The echo of a unit shock: psi_0 .. psi_{horizon-1}."""
    # SOLUTION (about 7 lines, 10 minutes)
    echo = [1.0]
    for j in range(1, horizon):
        value = 0.0
        for k in range(1, min(j, len(weights)) + 1):
            value += float(weights[k - 1]) * echo[j - k]
        echo.append(value)
    return torch.tensor(echo[:horizon], dtype=torch.float64)
    # END


check.check_psi(psi)

# %% [markdown]
# The spread from psi, against 4,000 simulated futures after the same past. The script's `LagModel.matrix` rolls out the unit history, which
# is the echo without its first 1.

# %%
law = nano_ts.LagModel([1, 2], [[1.8], [-0.9]], 2, centre=False)
echo = torch.cat([torch.ones(1, dtype=torch.float64), law.matrix(59)[-1]])  # the history (0, 1)
spread = echo.square().cumsum(0).sqrt()
start = torch.tensor([[[3.0, 8.0]]], dtype=torch.float64)
futures = start.expand(steps(4000), 1, 2)
for h in range(60):
    futures = torch.cat([futures, law(futures[..., -2:]) + torch.randn(len(futures), 1, 1)], -1)
measured = futures[:, 0, 2:].std(0)
for h in (1, 2, 5, 20, 60):
    print(f"step {h:2}: psi says {spread[h - 1]:.2f}, simulated {measured[h - 1]:.2f}")

# %%
middle = nano_ts.rollout(law, start, 60)[0, 0]
figure, axis = plt.subplots(figsize=(6, 2.5))
axis.plot(futures[:6, 0, 2:].T, color="0.7", lw=0.8)
axis.plot(middle, color="tab:red")
axis.fill_between(range(60), middle - 1.28 * spread, middle + 1.28 * spread, color="tab:red", alpha=0.2, lw=0)
axis.set(xlabel="steps ahead", title="A: roll-out, 80 % band from psi, six futures")
plt.show()

# %% [markdown]
# The error of a stable series stops growing: when the echoes have died out, the forecast is the mean and its error the spread of the series
# itself. That answers the third question.
#
# ## What it does to waves: the spectrum
#
# Put a wave of f cycles a step through the recipe: a lag of k steps turns it by $2\pi fk$. So noise, in which all waves are equally strong,
# comes out with the **spectral density**
#
# $$S(f)=\frac{\sigma^2}{\left|1-\sum_k a_k e^{-2\pi i f k}\right|^2},\qquad \int_{-1/2}^{1/2}S(f)\,df=r_0 .$$
#
# Near a frequency at which an eigenvalue is close to the unit circle the denominator is nearly 0: a peak. For one lag of 0.5 and $\sigma=1$:
# $S(0)=1/0.5^2=4$, $S(1/2)=1/1.5^2=0.444$.
#
# **Exercise 5.** `spectrum(weights, sigma, f)`: (p,), a number, frequencies (n,) -> (n,), real.
#
# *Hint:* `torch.exp(-2j * torch.pi * ...)` is complex; the lags start at 1.

# %%
def spectrum(weights, sigma, f):
    """Spectral density of an AR at frequencies f (cycles a step)."""
    # SOLUTION (about 4 lines, 8 minutes)
    lags = torch.arange(1, len(weights) + 1)
    turns = torch.exp(-2j * torch.pi * f.double()[:, None] * lags)  # (n, p)
    response = 1 - turns @ weights.to(turns.dtype)
    return sigma**2 / response.abs().square()
    # END


check.check_spectrum(spectrum)

# %% [markdown]
# The script's generated series has five weights, `nano_ts.LAW`: $(1-0.6B)(1-0.5B^{24}-0.45B^{168})$ multiplied out, B being one step back.
# Its density comes here from its echo, $\left|\sum_j\psi_je^{-2\pi ifj}\right|^2$, the same thing by another way. Beside it the
# periodogram: the data's squared Fourier transform, 12 pieces averaged.

# %%
truth = nano_ts.LagModel(nano_ts.LAW, [[w] for w in nano_ts.LAW.values()], 169, centre=False)
N = steps(8, few=1)
echo = torch.cat([torch.ones(1, dtype=torch.float64), truth.matrix(N * 1008 - 1)[-1]])
density = torch.fft.rfft(echo).abs().square()[::N]  # every 8th: the frequencies of 1,008 steps
data = torch.from_numpy(nano_ts.generate(3 * 1008, seed=0)) - 20
pieces = torch.fft.rfft(data.T.unflatten(1, (3, 1008))).abs().square().mean((0, 1)) / 1008
f = torch.fft.rfftfreq(1008)
figure, axis = plt.subplots(figsize=(8, 2.5))
axis.semilogy(f, pieces, color="0.7", lw=3, label="periodogram")
axis.semilogy(f, density, color="tab:red", lw=0.8, label="from LAW")
axis.set(xlabel="cycles an hour", title="generated series: a peak for each harmonic of the day")
axis.legend()
plt.show()
top = density[12:].argmax() + 12
print(f"highest peak beyond slow waves at {f[top]:.4f} cycles an hour, that is every {1 / f[top]:.1f} hours; radius {truth.radius():.4f}")

# %% [markdown]
# A daily pattern is not one wave but all of 1/24, 2/24, 3/24 ...; the small peaks between them belong to the week. Five weights make them all.
#
# ## Few of many lags: AR-Net
#
# What if only three of 100 possible lags matter, and one does not know which? AR-Net (arXiv:1911.12436) is a linear layer trained by gradient
# descent, with a penalty that asks "used or not?": $\lambda(s)\,\frac1p\sum_k R(a_k)$, $R(a)=2/(1+e^{-3|a|^{1/3}})-1$, $\lambda=0.02\,(1/s-1)$,
# where s is the share of lags expected to matter. R is 0 at 0 and steep beside it, then flat: it hardly cares how large a weight is. (The
# script's `ARNet` is this, and takes the level of the window out as well; the series below has none.) The paper's score is
# $100\,\sum|\hat a-a|/\sum(|\hat a|+|a|)$, in percent. The rival that every statistician would try: least squares, throw away weights within
# three standard errors ($3/\sqrt T$) of 0, fit again.

# %%
P, few = 100, {1: 0.2, 3: 0.3, 10: -0.5}
true = torch.zeros(P, dtype=torch.float64)
for lag, weight in few.items():
    true[lag - 1] = weight
x = simulate(true.tolist(), 20_000, seed=5)


def scored(found):
    return 100 * (found - true).abs().sum() / (found.abs() + true.abs()).sum()


# gradient descent on the squared error and the penalty, which grows from 0 over the first half -> weights (P,)
def ar_net(s, count):
    weights, data = torch.zeros(P, requires_grad=True), nano_ts.windows(x[:, 0].float(), P + 1).flip(1)  # the newest first
    optimizer = torch.optim.Adam([weights])
    for step in range(steps(count)):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / count)
        w = data[torch.randint(len(data), (2048,))]
        used = 2 * torch.sigmoid(3 * (weights.abs() + 1e-9) ** (1 / 3)) - 1  # 1e-9: or the slope at 0 is infinite
        loss = (w[:, 1:] @ weights - w[:, 0]).square().mean()
        loss = loss + 0.02 * (1 / s - 1) * min(1, 2 * step / count) * used.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights.detach().double()


# %%
ols = nano_ts.fit_lags(x, range(1, P + 1), P, centre=False).weight[:, 0]
kept = [k + 1 for k in range(P) if ols[k].abs() > 3 / len(x) ** 0.5]
twice = torch.zeros_like(true)
twice[torch.tensor(kept) - 1] = nano_ts.fit_lags(x, kept, P, centre=False).weight[:, 0]
found = {"least squares": ols, "least squares twice": twice}
found |= {"AR-Net, no penalty": ar_net(1.0, 2000), "AR-Net, s = 0.03": ar_net(0.03, 2000)}
for name, weights in found.items():
    print(f"{name:20} off by {scored(weights):5.1f} %, {(weights.abs() > 0.01).sum():3} weights above 0.01, lag 10: {weights[9]:.3f}")

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.2), layout="constrained", sharey=True)
for axis, (name, weights) in zip(axes, found.items()):
    axis.stem(range(1, P + 1), weights, markerfmt=".", basefmt=" ")
    axis.set(title=name, xlabel="lag")
plt.show()

# %% [markdown]
# The penalty does what the paper says: 6 weights in place of 22 are above 0.01, and the score is half that of plain least squares. But two
# least squares in a row, without any training, reach 1.8 %. A net earns its price where there is no closed form: more layers, other losses.
#
# ## The same matrix in a network: companion state spaces
#
# SpaceTime (arXiv:2303.09489) stacks layers that carry a state, $s_t=M s_{t-1}+b\,u_t$, $y_t=c\cdot s_t$, with input u, output y. Its M is a
# companion matrix (the paper writes the weights into the last column), and here is why. With the plain shift (ones below the diagonal, no
# weights) and $b=(1,0,\dots)$ the state *is* the last p inputs, so $c=(a_1,\dots,a_p)$ makes y an AR forecast, $c=(1,-1,0,\dots)$ a difference,
# $c=(1,\dots,1)/p$ a moving average; for p = 1, $M=1-\alpha$, $b=\alpha$ is exponential smoothing. And when the layer must forecast it makes
# its own inputs, $u_{t+1}=k\cdot s_t$: then $s_{t+1}=(M+bk^\top)s_t$, and with $k=a$ that is the matrix of exercise 1. The paper's "closed
# loop" is the roll-out of this lesson.
#
# For training the loop over t is too slow. Written out, $y_t=\sum_{j=0}^{t}F_j\,u_{t-j}$ with $F_j=c^\top M^j b$: a convolution, and the FFT
# does it for all t at once. (The $F_j$ come from a loop here; the paper finds them by FFT, too.)
#
# **Exercise 6.** `convolve(M, b, c, u)`: (p, p), (p,), (p,), inputs (T,) -> outputs (T,), the state before $u_0$ being 0. First the T numbers
# $F_j$, then `torch.fft.rfft` and `irfft`. For $M=0.5$, $b=c=1$ and u = 1, 0, 2: 1, 0.5, 2.25.
#
# *Hint:* an FFT of length T is a circle. How long must it be, so that the end does not run into the start?

# %%
def convolve(M, b, c, u):
    """Outputs of the state space, by one convolution with F_j = c M^j b."""
    # SOLUTION (about 8 lines, 12 minutes)
    T, state, F = len(u), b, []
    for _ in range(T):
        F.append(c @ state)
        state = M @ state
    spectrum_F = torch.fft.rfft(torch.stack(F), n=2 * T)
    spectrum_u = torch.fft.rfft(u, n=2 * T)
    return torch.fft.irfft(spectrum_F * spectrum_u, n=2 * T)[:T]
    # END


check.check_convolve(convolve)

# %%
shift, b = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 0.0])
closed = shift + torch.outer(b, torch.tensor(A))
state, made = torch.tensor([8.0, 3.0]), []  # newest first: the history 3, 8
for _ in range(5):
    state = closed @ state
    made.append(round(float(state[0]), 3))
print(f"shift + b k:\n{closed}\nclosed loop {made}\nroll-out    {[round(float(v), 3) for v in middle[:5]]}")

# %% [markdown]
# ## In the script's place
#
# `nano_ts.build("ar", ...)` fits 336 lags by least squares. Now Yule-Walker takes its place: your autocovariances, your recursion. The
# score is the mean square error over 48 steps, on the unseen last quarter of 3,000 hours, in units of the series' own variance. (The
# seasonal naive repeats the last day.)

# %%
# fits lags 1 .. p, like nano_ts.fit_lags
def by_yule_walker(table, lags, lookback, chunk=1, ridge=0.0, centre=True):
    weights, _ = levinson(autocovariance(table, len(lags)))
    return nano_ts.LagModel(lags, weights[:, None], lookback, centre)


rows = torch.from_numpy(nano_ts.generate(3000, seed=0))
table = ((rows - rows[:2250].mean(0)) / rows[:2250].std(0, correction=0)).float()


def error_48(name):
    model = nano_ts.build(name, table[:2250], 24, None)
    return nano_ts.score([model], table, table, 2250, 3000, [48])["mse"]["48"]


print(f"truth {error_48('truth'):.3f}, least squares {error_48('ar'):.3f}, seasonal naive {error_48('snaive'):.3f}")
with put(nano_ts, "fit_lags", by_yule_walker):
    band("MSE with your Yule-Walker", error_48("ar"), 0.33, 0.36)

# %% [markdown]
# The truth knows the five weights, and no model can do better on average; 336 fitted weights, 331 of which should be 0, lose 2 or 3 %.
#
# ## What did not work
#
# Dividing by T has its price: it pulls $r_k$ towards 0, the more the larger k is beside T. Pieces of A, two lags, the mean of 100 fits:

# %%
for rows in (60, 300):
    both = []
    for seed in range(steps(100)):
        x = simulate(A, rows, seed)
        r = lag_products(x, 2) / rows
        least = nano_ts.fit_lags(x, [1, 2], 2, centre=False).weight[:, 0]
        both.append(torch.cat([torch.linalg.solve(toeplitz(r[:2]), r[1:]), least]))
    print("{:3} values: Yule-Walker {:.3f} {:.3f}, least squares {:.3f} {:.3f}".format(rows, *torch.stack(both).mean(0)))

# %% [markdown]
# Near the unit circle a small error in $r_k$ is a large error in the weights: with $r_0=7.16^2$ a pull of one part in 300 is
# $r_0/300=0.17$, and the noise has variance 1. That is where the 1.86 came from. Least squares drops the first p rows and assumes nothing
# about what lies beyond the ends; its weights are nearly right already at 60 values, but nothing keeps the radius below 1. So the script
# fits by least squares, then looks at the radius.
#
# ## Where to read on
#
# * `nano_ts.py`: `LagModel`, `fit_lags`, `stabilise`, `ARNet`.
# * Box and Jenkins, *Time Series Analysis*, 1970: psi weights, seasonal products. Brockwell and Davis, *Time Series: Theory and Methods*,
#   sections 3.3, 5.2 and 8.1-8.2.
# * Levinson 1946; Durbin 1960. Speech codecs transmit the reflections, because $|g|<1$ is easy to guarantee.
# * AR-Net: arXiv:1911.12436, code `ourownstory/AR-Net`. SpaceTime: arXiv:2303.09489, code `HazyResearch/spacetime`.
