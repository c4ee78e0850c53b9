"""How soon does nano_ar reach the loss that nanoGPT's model.py, with AdamW, has after 300 seconds on the same tokens?

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench_ar.py nanoGPT/model.py

Run it alone on the machine. Both models have the same width, depth, number of heads, tokens, batches and precision, and
read the class in the first of 64 slots: nanoGPT as one of ten further tokens. nanoGPT: AdamW as its configure_optimizers
sets it up, clipping at 1, warm-up and cosine as in its train.py, the rate over the share of the time that has passed.
nano_ar: `train` of the script, whole runs of a growing number of steps, until one ends at or below nanoGPT's loss.
Validation is not timed, and the two times are those of training alone. No part of pytest: it measures, and proves nothing.
"""

import argparse
import importlib.util
import math
import pathlib
import sys
import time
from types import SimpleNamespace

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import nano_ar  # noqa: E402


def load_module(path):
    """nanoGPT's model.py as a module; dataclasses need to find it in sys.modules."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt(module, config, data, dtype, seconds, lr):
    """Train nanoGPT's model for `seconds` -> nats per test image, steps, tokens per second."""
    V = data.codebook_size
    torch.manual_seed(config.seed)
    model = module.GPT(module.GPTConfig(block_size=64, vocab_size=V + data.classes, n_layer=config.depth,
                                        n_head=config.dim // 32, n_embd=config.dim, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, lr, (0.9, 0.95), "cpu")

    def loss_of(tokens, labels):
        read = torch.cat([V + labels[:, None], tokens[:, :-1]], dim=1)  # the class, then the tokens but the last
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(read, tokens)[1]

    step, spent = 0, 0.0
    while spent < seconds:
        begun, share = time.perf_counter(), spent / seconds
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * share))           # down to a tenth, as in its train.py
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, share / 0.02, cosine) if step else lr / 100
        chosen = nano_ar.batch_at(step, len(data.train_tokens), config.batch, config.seed)
        loss_of(data.train_tokens[chosen], data.train_labels[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, spent = step + 1, spent + time.perf_counter() - begun
    with torch.no_grad():
        parts = zip(data.test_tokens.split(250), data.test_labels.split(250))
        nats = sum(64 * len(x) * loss_of(x, c).item() for x, c in parts) / len(data.test_tokens)
    return nats, step, step * config.batch * 64 / spent


def ours(config, data, dtype, steps):
    """One whole run of nano_ar's `train` -> nats per test image, seconds of training."""
    torch.manual_seed(config.seed)
    model = nano_ar.GPT(data.codebook_size, data.classes, 8, 8, config.dim, config.depth, config.dim // 32)
    own, looked = nano_ar.nats_per_image, []

    def timed(*args):
        begun = time.perf_counter()
        nats = own(*args)
        looked.append(time.perf_counter() - begun)
        return nats

    nano_ar.nats_per_image = timed
    try:
        begun = time.perf_counter()
        history = nano_ar.train(SimpleNamespace(**{**vars(config), "steps": steps}), model, data, dtype)
        return history[-1]["test"], time.perf_counter() - begun - sum(looked)
    finally:
        nano_ar.nats_per_image = own


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path of nanoGPT's model.py")
    parser.add_argument("--seconds", type=float, default=300, help="of training for nanoGPT [300]")
    parser.add_argument("--lr", type=float, default=1e-3, help="nanoGPT's learning rate [1e-3, that of its small models]")
    parser.add_argument("--steps", type=int, default=250, help="nano_ar's first run [250]")
    parser.add_argument("--more", type=int, default=50, help="steps more in each further run [50]")
    parser.add_argument("--data", default="glyphs", help="as for nano_ar [glyphs]")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16, for both [auto]")
    args = parser.parse_args(argv)
    config = nano_ar.read_settings(["train", "--data", args.data, "--device", "cpu"])[1]
    dtype, data = nano_ar.pick_device("cpu", args.precision)[1], nano_ar.load_data(config)
    goal, steps, speed = nanogpt(load_module(args.model), config, data, dtype, args.seconds, args.lr)
    print(f"nanoGPT   {goal:6.2f} nats per test image after {args.seconds:.0f} s, {steps} steps, {speed:,.0f} tokens/s")
    steps = args.steps
    while True:
        nats, seconds = ours(config, data, dtype, steps)
        print(f"nano_ar   {nats:6.2f} nats per test image after {seconds:.0f} s, {steps} steps, "
              f"{steps * config.batch * 64 / seconds:,.0f} tokens/s")
        if nats <= goal:
            break
        if seconds > args.seconds:
            print(f"nano_ar has not reached {goal:.2f} nats in nanoGPT's time")
            return
        steps += args.more
    print(f"the same loss in {seconds:.0f} s instead of {args.seconds:.0f} s: {args.seconds / seconds:.1f} times sooner")


if __name__ == "__main__":
    main()
