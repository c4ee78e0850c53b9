# %% [markdown]
# # 70 Scaling out
#
# **Guess first, and write your answers down.**
#
# 1. nano_ar has 0.9 million weights and takes 64 images a step. With two processes instead of one, how many times as fast is it?
# 2. Eight devices must add up vectors of S bytes, so that all of them hold the sum. How many bytes must each send?
# 3. A model has a billion weights. Does training it fit into 8 GB? Into eight devices of 8 GB?
# 4. The batch does not fit into memory. Must you take a smaller one, and search the learning rate anew?
#
# What two cores can show is measured here; the rest is **computed**, from assumptions that stand in the cells. One GPU was at hand for a quarter of an hour; what it said is marked *quoted*.

# %%
import sys
sys.path[:0] = ["..", "../.."]  # the repository, seen from lessons/ and from lessons/solutions/
import os, pathlib, shlex, subprocess, tempfile, time, matplotlib.pyplot as plt, numpy as np, torch
import nano_ar, nano_spec, nano_tok, nano_var; from types import SimpleNamespace
from lessons.checks import band, lesson_70 as check, put, steps

# %% [markdown]
# ## One batch, several devices
#
# In **data parallelism** every device (with a process of its own) holds the whole model and takes a part of the batch. The loss is a mean over images, so its gradient is a mean, too, and a mean can be put together from parts:
#
# $$\nabla\,\frac1B\sum_{i=1}^{B}\ell_i=\sum_{k=1}^{N}\frac{n_k}{B}\;\nabla\Big(\frac1{n_k}\sum_{i\in\text{part }k}\ell_i\Big).$$
#
# DistributedDataParallel takes the plain mean of the N gradients, which is right for **equal parts** only. So `my_part` in nano_ar.py refuses a batch that does not divide.
#
# **Exercise 1.** `average(gradients, sizes)`: a list of N tensors, each the gradient of the mean loss of a part, and the list of the $n_k$ -> the gradient of the mean over the whole batch. For gradients 2 and 6 of parts with 3 and 1 images: $\frac34\cdot2+\frac14\cdot6=3$, and not 4.
#
# *Hint:* how much does one image of each part count?

# %%
def average(gradients, sizes):
    """The gradient of the whole batch, from the gradients of unequal parts."""
    # SOLUTION (about 1 line, 5 minutes)
    return sum(n / sum(sizes) * g for g, n in zip(gradients, sizes))
    # END


check.check_average(average)

# %%
torch.manual_seed(0)
model, tokens, labels = nano_ar.GPT(16, 10, 8, 8, 32, 1, 1), torch.randint(16, (12, 64)), torch.arange(12) % 10
torch.nn.init.normal_(model.head.weight, std=0.1)  # it starts at 0, and would pass no gradient on
gradient = lambda i: torch.autograd.grad(nano_ar.loss_of(model, tokens[i], labels[i]), model.slot)[0]
whole = gradient(slice(0, 12))
for cut in (6, 9):
    plain = (gradient(slice(0, cut)) + gradient(slice(cut, 12))) / 2
    print(f"parts of {cut} and {12 - cut}: the plain mean is off by {(plain - whole).norm() / whole.norm():.1e} of its length")
x = torch.tensor([0.0, 2, 10, 12])
print("variance of all", x.var(correction=0).item(), "; mean of the variances of halves", x.view(2, 2).var(1, correction=0).mean().item())

# %% [markdown]
# The last line is the other trap: **not everything is a mean over images.** A variance, as in batch norm, is not; nor are a codebook's running means, if each device moves its own. nano_var therefore calls `gather`: every process sees the vectors of the whole batch, and moves the codes in the same way.
#
# The global batch stays what it was. So the losses are the same, and **no learning rate has to be searched anew**. If instead each device keeps 64 images, the batch grows with N, the noise of its gradient falls, there are fewer steps in an epoch, and the rate is open again (Goyal et al. 2017, arXiv:1706.02677, multiply it by N, after a warm-up, for SGD; that need not hold for Muon).
#
# ## The ring
#
# How do N devices add up? Each could send all it has to all others: (N - 1) S bytes. In a **ring** each talks to its right neighbour alone. The vector is cut into N chunks, and in a round every worker sends one. In the first N - 1 rounds the receiver *adds* what comes to its own chunk of that number; after these, each chunk is complete at one worker. In N - 1 more the receiver *replaces* its chunk: the complete ones go around. A message is S / N bytes, so a worker sends
#
# $$2\,(N-1)\cdot\frac SN<2S,$$
#
# however many workers there are. (But each round costs a delay: for short vectors that is what counts.)
#
# **Exercise 2.** `schedule(N)`: 2 (N - 1) rows, one a round; entry w of a row is the number of the chunk, 0 to N - 1, that worker w sends to worker (w + 1) mod N. `schedule(2)` may be `[[0, 1], [1, 0]]`. Any schedule is right that leaves every sum at every worker, each addend once.
#
# *Hint:* what came in the last round must go on in the next one.

# %%
def schedule(N):
    """Which chunk each worker sends, round by round."""
    # SOLUTION (about 4 lines, 15 minutes)
    rounds = []
    for t in range(2 * (N - 1)):
        rounds.append([(w - t) % N for w in range(N)])
    return rounds
    # END


check.check_schedule(schedule)

# %%
def run_ring(rounds, x):
    """x (worker, chunk, m) -> after each round; the first half adds, the second replaces."""
    N, seen = len(x), [x.clone()]
    for t, row in enumerate(rounds):
        sent = [seen[-1][w, c].clone() for w, c in enumerate(row)]
        seen.append(seen[-1].clone())
        for w, c in enumerate(row):
            right = (w + 1) % N
            seen[-1][right, c] = sent[w] + (seen[-1][right, c] if t < N - 1 else 0)
    return seen

mine = SimpleNamespace(schedule=None)
with put(mine, "schedule", schedule):
    states = run_ring(mine.schedule(4), torch.ones(4, 4, 1))
    figure, axes = plt.subplots(1, 7, figsize=(9, 1.7), layout="constrained")
    for t, (axis, state) in enumerate(zip(axes, states)):
        axis.imshow(state[..., 0], vmin=0, vmax=4)
        axis.set(xticks=[], yticks=[], title=f"after {t}", xlabel="chunk", ylabel="worker" if t == 0 else "")
    plt.show()
for N in (2, 4, 8, 64):
    print(f"{N:2} workers: {2 * (N - 1) / N:.2f} S sent by each; {N - 1} S if each sends all to all")

# %% [markdown]
# Colour: how many addends a chunk holds, one to four. The sums grow along a diagonal, and then spread.
#
# ## The commands
#
#     torchrun --standalone --nproc_per_node=2 nano_ar.py
#
# starts two processes on this machine (nano_var.py can, too; the other scripts cannot). On four hosts with eight GPUs each, the same line on every host, HOST being any one of them:
#
#     torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 nano_ar.py --out SHARED/FOLDER
#
# Processes get their numbers, the ranks, when they meet; `--node_rank` is for `--rdzv_backend=static` only. A checkpoint knows nothing of their number: with `--resume` any number goes on, if all can read the folder. Now one process, then two, with one thread each.

# %%
def run(processes, folder, *flags):
    """Train the real nano_ar.py -> its history and the seconds that it took."""
    root = next(p for p in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents) if (p / "nano_ar.py").exists())
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes} " if processes > 1 else ""
    command = f"{torchrun}nano_ar.py train --device cpu --precision fp32 --data {folder}/tiny.npz --out {folder}/{processes}"
    subprocess.run([sys.executable, *shlex.split(command), *flags], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    state = torch.load(f"{folder}/{processes}/last.pt", weights_only=True)
    return [entry["train"] for entry in state["history"]], state["seconds"]

images, classes = nano_ar.glyphs(steps(600, few=40), 0)
for size in ("--dim 32 --depth 1 --batch 8 --steps 40", "--dim 128 --depth 4 --batch 64 --steps 15")[:steps(2, few=0)]:
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/tiny.npz", images=images.numpy(), labels=classes.numpy())
        (one, seconds), (two, less) = (run(n, folder, "--codebook", "64", *size.split()) for n in (1, 2))
    off = max(abs(a - b) / a for a, b in zip(one, two))
    print(f"{size}: losses differ by {off:.0e} at most; two processes are {seconds / less:.2f} times as fast")

# %% [markdown]
# The losses agree up to rounding. The ratio is this machine's, busy or not: read yours. It falls short of 2 because each process repeats what is not divided (Muon's products for *all* matrices, the look at the test images), because gradients travel, and because small operations cost their start whatever their size: a tiny model consists of these, and can be slower on two.
#
# ## What a token costs
#
# A matrix with n weights takes n multiplications and n additions a token: **2 n** operations (FLOP; GFLOP: billions, TFLOP: thousands of billions). The backward pass takes two such products, one for the gradient of the weights and one for that of the inputs: 6 n in all. Embeddings are looked up, and cost none. In a block of nano_ar, qkv has $3C^2$ weights, proj $C^2$, up and down $4C^2$ each; the head has $CV$.
# Attention adds products without weights: scores, and means of values, $2LC$ each forward (all L slots counted, masked ones too), three times that with the backward pass.
#
# **Exercise 3.** `flops_per_token(V, L, C, depth)`: operations of one training step per token, matrix products only. With V = 1, L = 1, C = 1, depth = 1: $6\cdot(12+1)+12=90$.
#
# The check lets torch count the real GPT (`torch.utils.flop_counter`).

# %%
def flops_per_token(V, L, C, depth):
    """Forward and backward pass of nano_ar's GPT, for each token of the batch."""
    # SOLUTION (about 2 lines, 10 minutes)
    weights = depth * 12 * C * C + C * V
    return 6 * weights + 12 * L * C * depth
    # END


check.check_flops_per_token(flops_per_token)

# %%
def cost(V, L, C, depth):  # the same in other words, so that the next cells run without yours
    return 72 * depth * C**2 + 6 * C * V + 12 * L * C * depth

def seconds_of(C, B, depth=2):
    model = nano_ar.GPT(64, 10, 8, 8, C, depth, C // 32)
    tokens, labels = torch.zeros(B, 64, dtype=torch.long), torch.zeros(B, dtype=torch.long)
    return nano_ar.milliseconds(lambda: nano_ar.loss_of(model, tokens, labels).backward()) / 1000

for C, B in ((64, 16), (64, 64), (256, 16))[:steps(3, few=1)]:
    took, count = seconds_of(C, B), cost(64, 64, C, 2) * B * 64
    print(f"width {C:3}, batch {B:2}: {count / 1e9:6.1f} GFLOP, measured {took * 1000:6.0f} ms: {count / took / 1e9:.0f} GFLOP/s")

# %% [markdown]
# If time followed the formula, the last column would be one number. Wide products come nearer to the processor's best; norms, rotations and softmax are not counted, and weigh most in narrow models.
#
# ## What a device must hold
#
# For each weight: itself, its gradient, and what the optimizer remembers, 4 bytes each. Muon (matrices in blocks) keeps one velocity; AdamW (all else) a mean and a mean square. To these come **activations**, kept for the backward pass: they grow with the images that one device takes, so data parallelism divides them, and nothing else.
#
# Data parallelism cannot train a model larger than a device. **Sharding** (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054; FSDP in torch) divides the other three by N: stage 1 the optimizer's memory, stage 2 the gradients as well, stage 3 the weights, too, each layer being fetched when needed. Stages 1 and 2 send no more than the ring, stage 3 half as much again (ZeRO, section 7). (Tensor parallelism cuts each matrix over devices; pipeline parallelism gives each device some of the layers.)
#
# **Exercise 4.** `state_bytes(inside, outside, N, stage)`: bytes on one of N devices without activations, all in 32 bits, for `inside` weights under Muon and `outside` weights under AdamW; stage 0 to 3. For 10, 1, N = 2: stage 0 gives 44 + 44 + 48 = 136, stage 1 gives 112.

# %%
def state_bytes(inside, outside, N, stage):
    """Weights, gradients and optimizer on each of N devices."""
    # SOLUTION (about 4 lines, 10 minutes)
    weights = gradients = 4 * (inside + outside)
    optimizer, total = 4 * inside + 8 * outside, 0
    for place, size in enumerate((optimizer, gradients, weights)):
        total += size / N if stage > place else size
    return total
    # END


check.check_state_bytes(state_bytes)

# %%
def kept_bytes(function):
    """Bytes that autograd keeps for the backward pass: every storage once, weights included."""
    kept = {}
    def pack(x):
        kept[x.untyped_storage()._cdata] = (x.untyped_storage().nbytes(), x)  # held, so that no address comes twice
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(size for size, _ in kept.values())

def activation_bytes(model, *batch):
    """Bytes for one more image: of two batches, less one; weights cancel."""
    sizes = [kept_bytes(lambda: nano_ar.loss_of(model, *(x[:B] for x in batch))) for B in (1, 2)]
    return sizes[1] - sizes[0]

two = torch.zeros(2, 64, dtype=torch.long), torch.zeros(2, dtype=torch.long)
for C, depth in ((64, 2), (128, 4)):
    size = activation_bytes(nano_ar.GPT(512, 10, 8, 8, C, depth, C // 32), *two)
    print(f"width {C}, depth {depth}: {size / 1e6:.2f} MB an image, {size / (64 * depth * C * 4):.1f} x L x depth x C numbers")

# %% [markdown]
# ## The GPU presets, computed and run
#
# For each transformer with `--preset gpu`: weights, memory in 32 bits (bf16 needs less), operations, and minutes on an **assumed** card: 8 GB, 25 TFLOP/s at its best, a fifth of it reached. Left out: sampling, judging, data, tokenizers, the draft model, nano_var's AdaLN, Muon's products (below). Activations: 24 numbers for each slot, block and channel (20.7 and 24.2 were printed), as if all blocks were nano_ar's; three for each logit.

# %%
PEAK, REACHED, PER_BLOCK = 25e12, 0.2, 24
for name, script, L, V in (("nano_ar", nano_ar, 64, 1024), ("nano_var", nano_var, 85, 512), ("nano_spec", nano_spec, 512, 256)):
    p = SimpleNamespace(**script.PRESETS["gpu"])
    inside, outside, rows = 12 * p.depth * p.dim**2, 2 * V * p.dim, p.batch * L
    memory = 12 * inside + 16 * outside + rows * 4 * (PER_BLOCK * p.dim * p.depth + 3 * V)
    work = cost(V, L, p.dim, p.depth) * rows
    minutes = work * p.steps / (PEAK * REACHED) / 60
    print(f"{name:9} {(inside + outside) / 1e6:5.1f} M weights, {memory / 1e9:5.1f} GB, {work / 1e12:5.2f} TFLOP a step, {minutes:4.0f} minutes; "
          f"{'fits' if memory < 8e9 and minutes < 30 else 'does NOT fit 8 GB and 30 minutes'}")
print(f"cache in sampling: {2 * 8 * 64 * 384 * 4 / 1e6:.1f} MB for each row of nano_ar's preset")

# %% [markdown]
# A preset that does not fit needs a smaller batch, accumulation (below), or fewer steps. Two did not fit, and were changed.
#
# *Quoted, one H200, bf16, other jobs beside it:* peak memory 3.8 GB for nano_ar, 6.0 for nano_var, 4.2 for nano_spec. All below the count, since bf16 halves most activations. The *time* was further off: nano_ar took 50 ms a step, 29 TFLOP/s on a card whose data sheet says 989: 3 %, not a fifth. Matrices of width 384 are small there; probably it waits for Python to start the next kernel.
#
# *Quoted, the same run:* nano_ar's preset then took 20,000 glyphs, each 51 times. After 800, 2,400, 4,000 steps the training loss was 54, 12, 9 nats an image, that of test images 111, 177, **210**: worse than from class and cell alone, 132. Yet the samples had gFD 1.41, *better than real images*, 2.11. nearest.png shows why: training images, a few pixels changed. The Fréchet distance compares two crowds, and copies are as good a crowd as their originals. Only the likelihood of other images notices, or a look at neighbours.
#
# So the presets for images now draw 200,000 glyphs (`--data glyphs-200k`), each used five times by the transformers. As they stand they have not run in full: if you have a card, compare `test` with `train` first.
#
# ## Up to a billion weights
#
# A step computes, and sends 2 (N - 1) / N times the gradients. If sending hides behind computing, the larger of the two counts; if not, their sum (drawn). Muon's products, which nobody divides, are a third part. A matrix with sides $s\le l$ takes five rounds of $4s^2l+2s^3$ (lesson 22): $70\,C^3$ for qkv, 30 for proj, 90 each for up and down, $280\,C^3$ a block and step.
# One pass over a million images of 256 tokens, 512 in a batch, links of 10 GB/s, devices of 100 TFLOP/s of which 40 % are reached: all assumed.

# %%
def step_seconds(C, depth, N, B=512, L=256, V=4096, speed=40e12, link=10e9):
    compute, muon = cost(V, L, C, depth) * B * L / N / speed, 280 * C**3 * depth / speed
    return compute + muon + 2 * (N - 1) / N * 4 * (12 * depth * C**2 + 2 * V * C) / link

devices, figure = [1, 2, 4, 8, 16, 32, 64], plt.figure(figsize=(8, 2.6), layout="constrained")
left, right = figure.subplots(1, 2)
for C, depth in ((128, 4), (512, 12), (1024, 24), (2048, 20)):
    times, n = [step_seconds(C, depth, N) for N in devices], 12 * depth * C**2 + 2 * 4096 * C
    left.loglog(devices, [times[0] / t for t in times], label=f"{n / 1e6:.0f} M")
    print(f"{n / 1e6:6.0f} M weights: {times[0] * 1e6 / 512 / 3600:6.2f} hours on one device, {times[-1] * 1e6 / 512 / 3600:6.3f} on 64: {times[0] / times[-1]:.1f} times as fast")
left.loglog(devices, devices, "k:")
left.set(xlabel="devices", ylabel="times as fast (computed)")
left.legend(fontsize=7)
for stage, divided in enumerate((0, 4, 8, 12)):  # bytes a weight that are divided, Muon everywhere
    right.loglog(devices, [12 - divided + divided / N for N in devices], label=f"stage {stage}")
right.axhline(8, color="k", ls=":")
right.set(xlabel="devices", ylabel="GB for a billion weights")
right.legend(fontsize=7)
plt.show()

# %% [markdown]
# With a fixed batch each device has less to do, while what it sends stays the same: the curves bend. Without sharding a billion weights take 12 GB on one device as on 64; stage 1 never gets below 8 GB (dotted). Activations come on top.
#
# ## Put it into the script: accumulation
#
# One device can do in turn what several do at once: k small backward passes add their gradients up, and only the activations of one part are kept. The trap is the division: `backward` *adds*, so each part must count by its share of the batch.
#
# **Exercise 5.** `in_parts(model, tokens, labels)` takes the place of `nano_ar.loss_of`: tokens (B, L) in parts of at most 16 images. It returns the mean loss of the whole batch. All parts but the last call `backward` inside; the last one gets its gradient when the caller calls `backward` on what you return. Without gradients (`torch.is_grad_enabled()`) it only returns the mean.
#
# *Hint:* `whole + loss - loss.detach()` has the value of `whole` and the gradient of `loss`. A part's loss is `F.cross_entropy(logits.flatten(0, 1), t.flatten())`.

# %%
def in_parts(model, tokens, labels):
    """The mean loss of a batch, with the memory of 16 images."""
    # SOLUTION (about 8 lines, 20 minutes)
    whole, loss = torch.zeros(()), torch.zeros(())
    for t, y in zip(tokens.split(16), labels.split(16)):
        if loss.requires_grad:
            loss.backward()
        logits = model(t, y).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), t.flatten()) * len(t) / len(tokens)
        whole = whole + loss.detach()
    return whole + loss - loss.detach()
    # END


check.check_in_parts(in_parts)

# %%
def fit():
    """The last training loss of a small nano_ar, batch 64."""
    torch.manual_seed(0)
    config = SimpleNamespace(seed=0, batch=64, steps=steps(30), lr=0.02)
    network = nano_ar.GPT(64, 10, 8, 8, 64, 2, 2)
    return nano_ar.train(config, network, data)[-1]["train"]

codebook = nano_ar.fit_codebook(images, 64, torch.Generator().manual_seed(0))
some = nano_ar.encode(images, codebook)
data = SimpleNamespace(train_tokens=some, train_labels=classes, test_tokens=some[:20], test_labels=classes[:20])
whole = fit()
with put(nano_ar, "loss_of", in_parts):
    parts = fit()
    print(f"whole batches {whole:.4f} nats, four parts {parts:.4f}")
    band("difference, nats", abs(whole - parts), 0, 0.05)

# %% [markdown]
# The same training, up to rounding, with the activations of 16 images instead of 64. The operations are the same; smaller products reach fewer of them in a second (GFLOP/s above). With several processes each `backward` would send: see `no_sync` of DistributedDataParallel.
#
# ## What did not work, or was not tried
#
# * **Twice the devices, half the time.** In the stored run, on two idle cores, two processes were 1.45 times as fast at nano_ar's width and depth, and .66 times with the tiny model. What helps is many tokens for each device between two messages; width alone does not (see the curves), as operations and gradients both grow with $C^2$, and Muon with $C^3$.
# * **Several GPUs, several hosts** were not at hand. Here they are arithmetic; nccl has never run. Real links have delays.
# * **Muon is not divided.** Each process orthogonalises all matrices. One could give each process some of them, and send the results around: with more devices, do that first.
#
# ## Your four guesses
#
# 1. Printed above, for your machine. 2. 1.75 S, and never 2 S. 3. No: 12 to 16 GB without activations; at stage 3 each of eight holds 1.5 to 2 GB. 4. No: accumulate, and change nothing else.
#
# **Read on.** Li et al., *PyTorch Distributed* (2020, arXiv:2006.15704), how sending hides behind the backward pass; Patarasuk & Yuan (2009), why the ring sends as little as possible; Rajbhandari et al., *ZeRO* (arXiv:1910.02054). In the repository: the block `processes` of nano_ar.py, and tests/test_processes.py, which shows that two processes train what one does.
