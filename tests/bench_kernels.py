"""Errors and times of kernels.py, on whatever device is here:  python tests/bench_kernels.py [--dtype bfloat16]

1. Errors of every op against float64, the torch path and the kernel. The kernel needs a GPU; on a CPU
   `TRITON_INTERPRET=1 python tests/bench_kernels.py` interprets it. The scan comes first: old compilers got it wrong.
2. Do what is timed and what it is timed against compute the same? At tiny shapes, everywhere.
3. Times, on a GPU only: ours beside torch's own, the ratio is theirs / ours, so above 1 ours is faster.
"""

import argparse
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import kernels

sdpa = F.scaled_dot_product_attention


def relative(ours, truth):
    return float((ours.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp(min=1e-9))


def errors(device, dtype):
    """Rows (op, case, error) of the path in use: relative Frobenius norm, or share of tokens that differ."""
    rng = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, device=device, generator=rng)

    s, v = 3 * randn(4, 300), randn(4, 300, 64)
    truth = kernels.scan_reference(s.double(), v.double())
    yield "scan_attention", "4 x 300", relative(kernels.scan_attention(s, v), truth)
    masks = kernels.full(70, 49), kernels.causal(129), kernels.scales([1, 4, 16, 64]), kernels.markov([1, 4, 16, 64])
    for mask in (*masks, kernels.window(129, 20), kernels.tree([-1, 0, 1, 1, 0], 44)):
        n, m = mask.shape
        x = [randn(2, h, length, 64).to(dtype).requires_grad_() for h, length in ((4, n), (2, m), (2, m))]
        double = [t.detach().double().requires_grad_() for t in x]
        ours, truth = kernels.attention(*x, mask), kernels.attention_reference(*double, mask)[0]
        do = randn(*ours.shape).to(dtype)
        yield "attention", f"{mask.name}, output", relative(ours, truth)
        gradients = torch.autograd.grad(ours, x, do), torch.autograd.grad(truth, double, do.double())
        for name, a, b in zip("qkv", *gradients):
            yield "attention", f"{mask.name}, d{name}", relative(a, b)
    q, k, v = randn(2, 4, 3, 64).to(dtype), randn(2, 2, 900, 64).to(dtype), randn(2, 2, 900, 64).to(dtype)
    length = torch.tensor([900, 37], device=device)
    truth = kernels.decode_reference(q.double(), k.double(), v.double(), length)
    yield "decode_attention", "3 tokens, lengths 900, 37", relative(kernels.decode_attention(q, k, v, length), truth)
    logits, noise = 3 * randn(50, 500), randn(50, 500).abs() + 0.01
    ours = kernels.sample(logits, 0.8, 50, 0.9, noise=noise)
    truth = kernels.sample_reference(logits.double(), 0.8, 50, 0.9, noise)
    yield "sample", "50 x 500, other tokens", float((ours != truth).double().mean())
    p, q = randn(50, 5, 100).softmax(-1), randn(50, 4, 100).softmax(-1)
    drafts = torch.randint(100, (50, 4), device=device, generator=rng)
    rest = drafts, torch.rand(50, 4, device=device, generator=rng), noise[:, :100]
    other = kernels.verify(p, q, *rest)[0] != kernels.verify_reference(p.double(), q.double(), *rest)[0]
    yield "verify", "50 x 4 drafts, other tokens", float(other.double().mean())


SMALL = {"causal": [(1, 2, 17, 16)], "scales": [(1, 2, (1, 2, 3), 16)], "decode": [(2, 2, 40, 16)],
         "tokens": [(3, 50)], "scan": [(3, 20, 4)]}
LARGE = {  # the shapes of the scripts, and long ones
    "causal": [(64, 4, 64, 32), (8, 16, 2048, 64), (4, 16, 4096, 64), (4, 8, 4096, 128)],       # B, H, N, D
    "scales": [(64, 4, (1, 2, 4, 8), 32), (8, 16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 64)],      # B, H, sides, D
    "decode": [(64, 16, 4096, 64), (1, 16, 8192, 64), (1, 8, 131072, 128), (64, 4, 256, 32)],   # B, H, S, D
    "tokens": [(64, 32768), (64, 4096), (64, 256)],                                             # B, V
    "scan": [(1024, 4096, 64)],                                                                 # rows, N, D
}


def pairs(shapes, device, dtype):
    """Yields case, work in GFLOP or GB, its unit, our function, the name of the other, the other function."""
    for B, H, N, D in shapes["causal"]:
        case, mask, work = f"causal {B}x{H}x{N}x{D}", kernels.causal(N), 2 * B * H * N * N * D / 1e9
        x = [torch.randn(B, H, N, D, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        do = torch.randn(B, H, N, D, device=device, dtype=dtype)
        yield case, work, "GFLOP/s", lambda: kernels.attention(*x, mask), "sdpa", lambda: sdpa(*x, is_causal=True)
        ours, theirs = kernels.attention(*x, mask), sdpa(*x, is_causal=True)
        yield (f"{case} backward", 2.5 * work, "GFLOP/s",
               lambda: torch.autograd.grad(ours, x, do, retain_graph=True), "sdpa",
               lambda: torch.autograd.grad(theirs, x, do, retain_graph=True))
    for B, H, sides, D in shapes["scales"]:
        mask = kernels.scales([side * side for side in sides])
        dense, N = mask.dense(device), mask.shape[0]
        x = [torch.randn(B, H, N, D, device=device, dtype=dtype) for _ in range(3)]
        work = 4 * B * H * D * float(dense.sum()) / 1e9
        yield (f"scales {B}x{H}x{N}x{D}", work, "GFLOP/s", lambda: kernels.attention(*x, mask),
               "sdpa", lambda: sdpa(*x, dense))
    for B, H, S, D in shapes["decode"]:
        q, k, v = (torch.randn(B, H, n, D, device=device, dtype=dtype) for n in (1, S, S))
        work = 2 * B * H * S * D * q.element_size() / 1e9
        yield (f"decode {B}x{H}x{S}x{D}", work, "GB/s", lambda: kernels.decode_attention(q, k, v, S),
               "sdpa", lambda: sdpa(q, k, v))
    for B, V in shapes["tokens"]:
        x, noise = 3 * torch.randn(B, V, device=device), torch.empty(B, V, device=device).exponential_()
        yield (f"sample {B}x{V}, k 50, p 0.9", 8 * B * V / 1e9, "GB/s",
               lambda: kernels.sample(x, 0.8, 50, 0.9, noise=noise), "sort", lambda: kernels.sample_reference(x, 0.8, 50, 0.9, noise))
        p, q = (torch.randn(B, n, V, device=device).softmax(-1) for n in (5, 4))
        rest = torch.randint(V, (B, 4), device=device), torch.rand(B, 4, device=device), noise
        yield (f"verify {B}x4x{V}", 12 * B * V / 1e9, "GB/s", lambda: kernels.verify(p, q, *rest)[0],
               "torch", lambda: kernels.verify_reference(p, q, *rest)[0])
    for rows, N, D in shapes["scan"]:
        s, v = torch.randn(rows, N, device=device), torch.randn(rows, N, D, device=device)
        before = torch.full_like(s[:, 0], -kernels.INF), torch.zeros_like(s[:, 0]), torch.zeros_like(v[:, 0])
        yield (f"scan {rows}x{N}x{D}", 8 * rows * N * D / 1e9, "GB/s", lambda: kernels.scan_attention(s, v),
               "torch", lambda: kernels._scan_torch(s, v, before)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU, else float32")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = "cuda" if gpu else "cpu", getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    runs = kernels.triton is not None and (gpu or kernels.interpreting())
    print(f"errors against float64, {dtype}, {torch.cuda.get_device_name() if gpu else 'CPU'}")
    print(f"{'op':<20}{'case':<32}{'torch path':>12}{'kernel':>12}")
    columns = []
    for choice in ("reference", "triton") if runs else ("reference",):
        with kernels.use(choice):
            columns.append(list(errors(device, dtype)))
    for row, last in zip(columns[0], columns[-1]):
        print(f"{row[0]:<20}{row[1]:<32}{row[2]:>12.1e}{f'{last[2]:.1e}' if runs else 'not run':>12}")
    print("\nlargest difference between what is timed and its peer, tiny shapes")
    with kernels.use("triton" if runs else "auto"):
        for case, _, _, ours, peer, theirs in pairs(SMALL, device, dtype):
            a, b = (x if isinstance(x, tuple) else (x,) for x in (ours(), theirs()))
            worst = max(float((s.detach().double() - t.detach().double()).abs().max()) for s, t in zip(a, b))
            print(f"{case:<34}{peer:<10}{worst:.1e}")
    if not gpu:
        how = "interpreted on this CPU" if runs else "not run at all: TRITON_INTERPRET=1 interprets them on a CPU"
        print(f"\nNo GPU here, so nothing is timed. The kernels were {how}.")
        return
    print(f"\n{'case':<34}{'ms':>9}{'rate':>16}   {'peer':<8}{'ms':>9}{'ratio':>8}")
    for case, work, unit, ours, peer, theirs in pairs(LARGE, device, dtype):
        a, b = (kernels.triton.testing.do_bench(f, return_mode="median") for f in (ours, theirs))
        print(f"{case:<34}{a:>9.3f}{work / a * 1e3:>9,.0f} {unit}   {peer:<8}{b:>9.3f}{b / a:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
