"""Training speed of nano_ar beside nanoGPT's own model.py: the same width, depth, heads, vocabulary, context and batch, step by step in turn.

    git clone https://github.com/karpathy/nanoGPT
    python tests/against_nanogpt.py nanoGPT/model.py

Each model runs with its own optimizer (nanoGPT: its configure_optimizers; nano_ar: Muon and AdamW), in fp32 and under bf16 autocast.
Printed: the median tokens per second of every pair, and the ratio of the best against the best.
"""

import argparse
import importlib.util
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import nano_ar  # noqa: E402


def ours(config, length, dtype):
    model = nano_ar.GPT(config.codebook, 10, nano_ar.make_order(8, length // 8, "raster"), config.dim, config.depth, config.heads)
    run, labels = nano_ar.Run(config, model, dtype), torch.zeros(config.batch, dtype=torch.long)
    forward = torch.compile(model) if config.compile else model
    return model, lambda x: nano_ar.train_step(run, x, labels, forward, dtype)


def theirs(module, config, length, dtype):
    model = module.GPT(module.GPTConfig(block_size=length, vocab_size=config.codebook, n_layer=config.depth, n_head=config.heads,
                                        n_embd=config.dim, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    forward = torch.compile(model) if config.compile else model

    def step(x):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = forward(x, x)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return model, step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path of nanoGPT's model.py")
    parser.add_argument("--length", type=int, default=64, help="context, a multiple of 8 [64]")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps per model [30]")
    parser.add_argument("--compile", action="store_true", help="torch.compile all of them; needs a C++ compiler")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("nanogpt_model", args.model)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    nano_ar.keep_freed_memory()  # one process: both profit
    config = nano_ar.Config(compile=args.compile, steps=10**6)
    x = torch.randint(config.codebook, (config.batch, args.length))
    steps, seconds = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for who, (model, step) in {"nano_ar": ours(config, args.length, dtype), "nanoGPT": theirs(module, config, args.length, dtype)}.items():
            steps[who, f"{name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"] = step
    for i in range(args.rounds + 3):
        for key, step in steps.items():
            start = time.perf_counter()
            step(x)
            if i >= 3:
                seconds.setdefault(key, []).append(time.perf_counter() - start)
    speed = {key: x.numel() / statistics.median(s) for key, s in seconds.items()}
    for (who, what), value in speed.items():
        print(f"{who:8} {what:30} {value:9,.0f} tokens/s")
    best = [max(v for (who, _), v in speed.items() if who == name) for name in ("nano_ar", "nanoGPT")]
    print(f"best against best: {best[0] / best[1]:.2f}")


if __name__ == "__main__":
    main()
