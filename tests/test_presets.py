"""The models of `--preset gpu`, at their full width and depth, on any machine: two steps of training on a handful of rows.

What a preset says is read from the script. The numbers of weights are written down as formulas in its sizes: W channels or width,
D blocks, V codes, C numbers in a code, L slots.
"""
import contextlib
import io
import re
from types import SimpleNamespace

import pytest
import torch

import nano_ar
import nano_spec
import nano_tok
import nano_ts
import nano_var

N, CLASSES, STEPS = 12, 10, 2


def settings(script, **others):
    """The settings of `--preset gpu`, but two steps of two rows."""
    defaults = {name: default for name, (default, _, _) in script.FLAGS.items()}
    return SimpleNamespace(**defaults | script.PRESETS["gpu"] | {"preset": "gpu", "batch": 2, "steps": STEPS} | others)


def images():
    """A dozen small images with their labels, as `load_images` gives them."""
    pictures, labels = nano_ar.glyphs(N, 0)
    return {"train_images": pictures, "train_labels": labels, "test_images": pictures[:4], "test_labels": labels[:4], "classes": CLASSES}


def tokens(V, L):
    drawn = torch.randint(V, (N, L), generator=torch.Generator().manual_seed(0))
    return {"train_tokens": drawn, "test_tokens": drawn[:4], "codebook_size": V}


def ar():
    config = settings(nano_ar)
    W, D, V, L = config.dim, config.depth, config.codebook, nano_ar.SIDE**2
    torch.manual_seed(0)
    model = nano_ar.GPT(V, CLASSES, nano_ar.SIDE, nano_ar.SIDE, W, D, W // 32)
    data = SimpleNamespace(**images() | tokens(V, L))
    weights = V * W + (CLASSES + 1) * W + L * W + D * 12 * W * W + W * V  # in, classes, slots, blocks, out
    return model, weights, lambda: [entry["train"] for entry in nano_ar.train(config, model, data)]


def tok():
    config = settings(nano_tok)
    W, D, C, model = config.width, config.blocks, config.code_dim, nano_tok.build(config)
    residual, patches = 2 * 9 * W * W, 64 * W            # two kernels of 3 x 3; one layer that sees 8 x 8 pixels
    weights = patches + W + 2 * D * residual + (W * C + C) + (C * W + W) + patches + 1
    return model, weights, lambda: [entry["error"] for entry in nano_tok.train(config, model, SimpleNamespace(**images()))]


def var():
    config = settings(nano_var, tok_steps=STEPS)
    W, C, d, D, V, K = config.width, config.code_dim, config.dim, config.depth, config.codebook, len(nano_var.SCALES)
    tokenizer, model = nano_var.build(config, CLASSES, "cpu")
    data = SimpleNamespace(**images() | tokens(V, model.length))
    first = 64 * W + W + 64 * W + 1 + 2 * (2 * 9 * W * W) + (W * C + C) + (C * W + W) + (K - 1) * (9 * C * C + C)
    blocks = D * (12 * d * d + 6 * d + d // 32)          # an offset for the six numbers of AdaLN, a sharpness for each head
    second = (CLASSES + 1) * d + (C * d + d) + 64 * d + K * d + 6 * d * d + blocks + 2 * d * d + d * V

    def run():
        history = nano_var.train_tokenizer(config, tokenizer, data)
        tokenizer.eval().requires_grad_(False)
        return [entry["error"] for entry in history] + [entry["train"] for entry in nano_var.train(config, model, tokenizer.pyramid, data)]
    return torch.nn.ModuleList([tokenizer, model]), first + second, run


def spec():
    config = settings(nano_spec, context=64)              # no weight depends on it, and 512 takes long
    W, D, w, models = config.dim, config.depth, config.draft_dim, nano_spec.make_models(config)
    text = torch.randint(256, (N, config.context + 1), generator=torch.Generator().manual_seed(0))
    data = SimpleNamespace(train=text, test=text[:2])
    weights = 2 * 256 * W + D * 12 * W * W + 2 * 256 * w + 12 * w * w
    return models, weights, lambda: [entry["target"] for entry in nano_spec.train(config, models, data)]


def ts(config, net, weights):
    """A net of nano_ts on two sine waves. Both begin with a linear layer of W outputs and end with one of 96."""
    wave = torch.sin(torch.arange(net.lookback + net.chunk + 40)[:, None] / 4 + torch.arange(2))
    W, D = config.width, config.layers
    block = 2 * 2 * W + (3 * W * W + 3 * W) + (W * W + W) + (2 * W * W + 2 * W) + (2 * W * W + W)
    weights += W + D * block + 2 * W + (W * 96 + 96)
    return net, weights, lambda: nano_ts.train(net, wave, (STEPS, 2, 1e-3), config)


def decoder():                                               # of hours: 28 tokens of a day each, four days ahead
    config = settings(nano_ts)
    net = nano_ts.SegmentDecoder(24, 28, 96, config.width, config.layers)
    return ts(config, net, 24 * config.width + 28 * config.width + 1)    # from a day; positions; gate


def itransformer():                                          # reads four days
    config = settings(nano_ts)
    net = nano_ts.ITransformer(96, 96, config.width, config.layers)
    return ts(config, net, 96 * config.width)


MODELS = {"nano_ar": ar, "nano_tok": tok, "nano_var": var, "nano_spec": spec,
          "nano_ts decoder": decoder, "nano_ts itransformer": itransformer}


# A block starts with its last layers at 0, so that it changes nothing: what lies before them has no gradient in the first two steps.
STILL = {"nano_ar": r"qkv|up", "nano_spec": r"qkv|up", "nano_var": r"condition|sharpness|offset|qkv|up"}


def of_one_length(G, dtype=torch.float32):
    """In place of `orthogonalize`: only as long as it would make G. Of the 98 matrices of nano_spec it takes 25 seconds, on one core."""
    return G / (G.norm() + 1e-7) * min(G.shape) ** 0.5


@pytest.mark.parametrize("name", MODELS)
def test_two_steps_of_the_gpu_preset(name, monkeypatch):
    """The number of weights; losses and weights stay finite; every weight that can move moves."""
    monkeypatch.setattr(nano_spec, "orthogonalize", of_one_length)       # the others take their own
    model, weights, run = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == weights
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with contextlib.redirect_stdout(io.StringIO()):
        losses = run()
    assert losses and torch.tensor(losses).isfinite().all()
    after = model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    still = {key for key in before if after[key].equal(before[key])}
    assert still == {key for key in before if name in STILL and re.search(rf"\b({STILL[name]})\b", key)}
