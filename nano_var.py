"""nano_var: draw images scale by scale, and train the multi-scale tokenizer that this needs.

An image becomes a pyramid of token maps, 1x1, 2x2, 4x4, 8x8. Each map codes what the coarser ones left over; their sum is the
image. A transformer draws one whole map per call, given the coarser ones and the class: 4 calls, where raster order takes 64.

    32x32 image   8x8 latent f        f = up(r1) + up(r2) + up(r3) + r4 + what is lost             4 calls

    +-------+  conv  +-------+    r1     r2      r3         r4         [class] -> r1
    |  /|   | -----> | f     |   +-+   +-+-+  +-+-+-+-+  +-------+     area(f1, 2x2) -> r2         f1 = up(r1)
    |   |   |        |       |   |3|   |7|1|  | | | | |  |  8x8  |     area(f2, 4x4) -> r3         f2 = f1 + up(r2)
    |  _|_  | <----- |       |   +-+   |0|9|  +-+-+-+-+  |       |     area(f3, 8x8) -> r4         f3 = f2 + up(r3)
    +-------+  conv  +-------+         +-+-+   4x4       +-------+     all cells of a map at once, given all coarser maps

Order    --order scales     one map per call (VAR)
                            with --mask markov a map attends to itself alone; of the coarser ones it gets the sum (HMAR, M-VAR)
         --order tokens     the same tokens one by one, map after map: what do the parallel draws cost?
         --order raster     one 8x8 map, one token per call, row by row: the classical baseline (a pyramid of one map)
Options  --targets absolute every map codes the whole picture: other lists of maps work at sampling time (FlexVAR)
         --noise P          training inputs with a share P of wrong tokens and the targets that repair them (Infinity)
         --refiner WIDTH    a small second model draws the last map, three quarters of the tokens (CoDe)

Papers   VAR (Tian et al. 2024, arXiv:2404.02905; github.com/FoundationVision/VAR: no training code for its tokenizer). FlexVAR
         (Jiao et al. 2025, arXiv:2502.20313), HMAR (Kumbong et al. 2025, arXiv:2506.04421), M-VAR (Ren et al. 2024,
         arXiv:2411.10433), CoDe (Chen et al. 2024, arXiv:2411.17787), Infinity (Han et al. 2024, arXiv:2412.04431). The
         optimizer is Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Commands                                            two CPU cores     expect
    python nano_var.py                              205 s, 1.2 GB     98 % read as the class asked for, gFD 9 (ceiling 3.6)
    python nano_var.py --data mnist --steps 1800 --guidance 1.4 --temperature 1.05
                                                    285 s             97 % (on 9,000 images), gFD 6.4 (ceiling 2.5)
    python nano_var.py compare --seeds 3            an hour or less   raster, tokens, scales, Markov: a table and a figure
    python nano_var.py sample --guidance 3          seconds           draws from the trained model
    python nano_var.py edit                         seconds           in-painting, out-painting, class editing, super-resolution
    python nano_var.py bench                        half a minute     calls and milliseconds: 4 calls against 64
--check exits with 1 when fewer than 95 % of the samples are read as the class that was asked for.

Left out on purpose: adversarial and perceptual losses and pretrained networks (VAR's tokenizer uses all three), distributed
training, text conditions, images larger than 32x32.

Read in this order: `Pyramid`, `VAR`, `generate`, `generator_loss`; the rest is data, metrics and pictures.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gzip
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import statistics
import sys
import threading
import time
import urllib.request
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tqdm

import kernels

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
    data: str = opt("glyphs", "glyphs, mnist, fashion-mnist, or a path: IDX file, .npz with images and labels, folder of "
                    "class folders", fixed=True)
    out: str = opt("out/var", "folder for checkpoints, pictures, samples.npz and metrics.json")
    preset: str = opt("cpu", "cpu: four minutes on two cores; gpu: wider, deeper, longer", choices=("cpu", "gpu"))
    seed: int = opt(0, "seed of the data, the models and the samples", low=0, fixed=True)
    device: str = opt("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = opt("auto", "of the matrix products in training; auto: bf16 where the hardware is fast at it",
                         choices=("auto", "fp32", "bf16"))
    compile: bool = opt(False, "torch.compile the training step: a slow start, then faster steps; needs a C++ compiler")
    resume: bool = opt(False, "go on from OUT/last.pt exactly where it stopped")
    check: bool = opt(False, "exit with code 1 when the metrics miss the band of the docstring")
    # tokenizer
    tokenizer: str = opt("", "a last.pt or best.pt of another run: take its tokenizer instead of training one")
    scales: str = opt("1,2,4,8", "sides of the token maps, rising to 8", fixed=True)
    targets: str = opt("residual", "a map codes what the coarser ones left over, or (absolute) the whole picture",
                       choices=("residual", "absolute"), fixed=True)
    codebook: int = opt(512, "codes, shared by all scales", low=2, high=65536, fixed=True)
    code_dim: int = opt(8, "numbers in a code vector", low=1, fixed=True)
    width: int = opt(64, "channels of the convolutions", low=8, fixed=True)
    blocks: int = opt(1, "residual blocks in the encoder and in the decoder", low=1, fixed=True)
    tok_steps: int = opt(800, "optimizer steps of the tokenizer", low=1, fixed=True)
    tok_batch: int = opt(128, "images per step of the tokenizer", low=1, fixed=True)
    tok_lr: float = opt(0.02, "its learning rate of Muon, for the convolutions inside the blocks", low=0, fixed=True)
    tok_lr_adam: float = opt(0.01, "its learning rate of AdamW, for all else", low=0, fixed=True)
    commitment: float = opt(0.25, "weight of the loss that pulls latents to their codes", low=0, fixed=True)
    # generator
    order: str = opt("scales", "what is drawn per call: a map, a token of the pyramid, a token of one 8x8 map",
                     choices=("scales", "tokens", "raster"), fixed=True)
    mask: str = opt("full", "which maps a map sees: its own and all coarser ones, or (markov) only its own",
                    choices=("full", "markov"), fixed=True)
    adaln: str = opt("shared", "the map from class to scales and shifts: one for all blocks, or one per block",
                     choices=("shared", "block"), fixed=True)
    noise: float = opt(0.0, "share of wrong tokens in the training inputs", low=0, high=1, fixed=True)
    refiner: int = opt(0, "width of a small model for the last map; 0: none", low=0, fixed=True)
    dim: int = opt(128, "width", low=8, fixed=True)
    depth: int = opt(4, "number of blocks", low=1, fixed=True)
    heads: int = opt(4, "attention heads", low=1, fixed=True)
    steps: int = opt(900, "optimizer steps of the generator", low=1, fixed=True)
    batch: int = opt(32, "images per step of the generator", low=1, fixed=True)
    lr: float = opt(0.04, "its learning rate of Muon, for the matrices inside the blocks", low=0, fixed=True)
    lr_adam: float = opt(0.01, "its learning rate of AdamW, for embeddings and heads", low=0, fixed=True)
    label_dropout: float = opt(0.1, "share of labels hidden in training: guidance needs an unconditional model too",
                               low=0, high=1, fixed=True)
    eval_every: int = opt(250, "steps between validations and checkpoints", low=1, fixed=True)
    # sampling
    samples: int = opt(2000, "images drawn for the metrics", low=10)
    guidance: float = opt(1.5, "classifier-free guidance at the last map, rising from 1 (none) at the first", low=0)
    temperature: float = opt(1.0, "divides the logits; 0 takes the most probable token", low=0)
    top_k: str = opt("0", "keep the k most probable tokens, 0 all: one number, or one per map as in 0,0,64,32")
    top_p: str = opt("1", "keep the most probable tokens up to this mass: one number, or one per map")
    sample_scales: str = opt("", "--targets absolute: another list of maps at sampling time, as in 1,2,3,4,6,8")
    seeds: int = opt(1, "compare: number of seeds, from --seed on", low=1)


PARTS = {"train": "only train", "sample": "draw from the checkpoint", "eval": "only the metrics",
         "edit": "in-painting, out-painting, class editing, super-resolution", "compare": "raster, tokens, scales, markov",
         "bench": "milliseconds per image"}
PRESETS = {"cpu": {}, "gpu": dict(codebook=512, code_dim=16, width=128, blocks=2, tok_steps=6000, tok_batch=256, tok_lr=0.01,
                                  tok_lr_adam=0.003, dim=384, depth=8, heads=6, steps=6000, batch=256, lr=0.02, lr_adam=0.005,
                                  eval_every=500, samples=10000)}
CHECK = {"class_accuracy": 0.95}  # what --check asks for
SIDE = 8                          # of the latent: 32 pixels, stride 4
TOKENIZER_FIELDS = ("data", "seed", "scales", "targets", "codebook", "code_dim", "width", "blocks")  # of a --tokenizer


def numbers(text, flag, kind, count=None):
    """"0" or "0,0,64,32" -> a list of numbers, of `count` entries where a count is asked for."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text}: expected numbers separated by commas") from None
    values = values * count if count and len(values) == 1 else values
    if count and len(values) != count:
        raise UserError(f"{flag} {text}: {len(values)} numbers, but there are {count} maps")
    return values


def parse_scales(text, flag="--scales"):
    scales = numbers(text, flag, int)
    if scales != sorted(set(scales)) or scales[0] < 1 or scales[-1] != SIDE:
        raise UserError(f"{flag} {text}: sides must rise strictly, from 1 or more to {SIDE}, as in 1,2,4,8")
    return scales


def complete_config(config):
    """Check what no single flag can check; a raster model is a pyramid of one map."""
    config = dataclasses.replace(config, scales=str(SIDE)) if config.order == "raster" else config
    scales = parse_scales(config.scales)
    for flag, bad, advice in (
            ("--dim", config.dim % (4 * config.heads), f"a multiple of 4 times the {config.heads} heads is needed"),
            ("--refiner", config.refiner % (4 * config.heads), f"a multiple of 4 times the {config.heads} heads is needed"),
            ("--mask markov", config.mask == "markov" and config.order != "scales", "it needs --order scales"),
            ("--noise", config.noise and config.targets == "absolute", "absolute targets leave nothing over to repair"),
            ("--refiner", config.refiner and (config.order != "scales" or len(scales) < 2), "it needs --order scales, 2 maps or more"),
            ("--targets absolute", config.targets == "absolute" and (config.order != "scales" or config.refiner),
             "it needs --order scales and no --refiner"),
            ("--sample-scales", config.sample_scales and config.targets != "absolute", "it needs --targets absolute")):
        if bad:
            raise UserError(f"{flag}: {advice}")
    count = len(parse_scales(config.sample_scales or config.scales, "--sample-scales" if config.sample_scales else "--scales"))
    if min(numbers(config.top_k, "--top-k", int, count)) < 0:
        raise UserError(f"--top-k {config.top_k}: k must be 0 (off) or more")
    if not all(0 < p <= 1 for p in numbers(config.top_p, "--top-p", float, count)):
        raise UserError(f"--top-p {config.top_p}: p must be above 0 and at most 1 (off)")
    return config


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
# data
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

# --- shared: images


@dataclasses.dataclass
class Images:
    """Grey images uint8 (N, 32, 32) with class labels int64 (N,), in a training and a test part."""
    name: str
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor

    @property
    def classes(self):
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


GLYPH_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
               "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold",
               "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
               "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10")  # matplotlib ships them: the same on every machine
GLYPH_STROKES = (0, 1, 2, 3)  # extra outline in 96ths of the picture


def glyph_masters(size=96):
    """Every digit in every font and stroke weight, drawn once by Pillow -> float (10, fonts * strokes, size, size) in [0, 1]."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), int(size * 0.68)) for name in GLYPH_FONTS]
    masters = np.zeros((10, len(fonts), len(GLYPH_STROKES), size, size), np.float32)
    for digit in range(10):
        for i, font in enumerate(fonts):
            for j, stroke in enumerate(GLYPH_STROKES):
                picture = Image.new("L", (size, size))
                ImageDraw.Draw(picture).text((size / 2, size / 2), str(digit), 255, font, anchor="mm", stroke_width=stroke)
                masters[digit, i, j] = np.asarray(picture) / 255
    return torch.from_numpy(masters).flatten(1, 2)


def glyphs(n, seed, masters=None):
    """n digits under random affine maps, in random font, weight and contrast -> uint8 (n, 32, 32), labels (n,). Fixed by seed."""
    masters = glyph_masters() if masters is None else masters
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=g)
    chosen = torch.randint(masters.shape[1], (n,), generator=g)
    u = lambda low, high: torch.rand(n, generator=g) * (high - low) + low
    angle, shear, contrast = u(-0.2, 0.2), u(-0.2, 0.2), u(0.8, 1.0)
    size, stretch = u(0.72, 1.0), u(0.85, 1.15)
    # rows of the 2 x 3 map from output to input coordinates: rotation, shear, scale, shift (all in units of half a picture)
    theta = torch.stack([torch.stack([stretch * size * angle.cos(), size * (shear - angle.sin()), u(-0.1, 0.1)], 1),
                         torch.stack([stretch * size * angle.sin(), size * angle.cos(), u(-0.1, 0.1)], 1)], 1)
    images = torch.empty(n, 32, 32, dtype=torch.uint8)
    for i in range(0, n, 1024):  # in chunks: the 64 x 64 samples before averaging take 16 KB an image
        part = slice(i, i + 1024)
        grid = F.affine_grid(theta[part], (len(theta[part]), 1, 64, 64), align_corners=False)
        fine = F.grid_sample(masters[labels[part], chosen[part]][:, None], grid, align_corners=False)
        images[part] = (F.avg_pool2d(fine, 2)[:, 0] * contrast[part, None, None] * 255).round().byte()
    return images, labels


def read_idx(path):
    """An IDX file (the format of MNIST), plain or gzipped -> uint8 array of any rank."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = [int.from_bytes(raw[i:i + 4], "big") for i in range(4, 4 + 4 * raw[3], 4)] if raw[:3] == b"\0\0\x08" else []
    if not shape or len(raw) != 4 + 4 * len(shape) + math.prod(shape):
        raise ValueError(f"not a complete IDX file of bytes (its header says {shape or 'nothing'}, it has {len(raw)} bytes)")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def read_images(path):
    """An IDX file, an .npz with `images` and `labels`, or a folder of PNG and JPEG files, one sub-folder per class -> two arrays."""
    if path.is_dir():
        from PIL import Image, ImageOps
        classes = sorted(p for p in path.iterdir() if p.is_dir())
        kinds = (".png", ".jpg", ".jpeg")
        files = [(p, i) for i, c in enumerate(classes) for p in sorted(c.iterdir()) if p.suffix.lower() in kinds]
        if not files:
            raise ValueError("no PNG or JPEG files in sub-folders, one per class")
        images = [np.asarray(ImageOps.fit(Image.open(p).convert("L"), (32, 32))) for p, _ in files]  # cropped to a square
        return np.stack(images), np.array([label for _, label in files])
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return file["images"], file["labels"] if "labels" in file else np.zeros(len(file["images"]), np.int64)
    labels = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    images = read_idx(path)
    if labels == path or not labels.exists():
        raise ValueError("labels are missing: a file ...-images-idx3-ubyte needs its ...-labels-idx1-ubyte beside it")
    return images, read_idx(labels)


def as_images(images, labels):
    """Check, turn grey, pad to 32 x 32 -> torch uint8 (N, 32, 32), int64 (N,)."""
    if images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8:
        images = images.mean(-1).round().astype(np.uint8)
    if images.ndim != 3 or images.shape[1:] not in ((28, 28), (32, 32)) or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 of shape (N, 28, 28) or (N, 32, 32), got {images.dtype} {images.shape}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise ValueError(f"need one label >= 0 per image, got {labels.dtype} {labels.shape} for {len(images)} images")
    pad = (32 - images.shape[1]) // 2
    return F.pad(torch.from_numpy(images.copy()), (pad,) * 4), torch.from_numpy(labels.astype(np.int64))


IMAGE_SETS = {  # name: sub-folder (both sets use the same file names), address, MD5 of the four files
    "mnist": ("", "https://ossci-datasets.s3.amazonaws.com/mnist/", "f68b3c2dcbeaaa9fbdd348bbdeb94873",
              "d53e105ee54ea40749a09fcbcd1e9432", "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
    "fashion-mnist": ("fashion-mnist/", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                      "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
}
IDX_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


def load_images(data, seed=0):
    """`glyphs`, a named set, or a path -> Images. A path, which has no test part of its own, is split 9:1 by seed."""
    if data == "glyphs":
        masters = glyph_masters()
        return Images(data, *glyphs(20000, 2 * seed, masters), *glyphs(2000, 2 * seed + 1, masters))
    if data in IMAGE_SETS:
        folder, address, *sums = IMAGE_SETS[data]
        files = [read_idx(find_file(folder + name, address + name, "md5:" + md5)) for name, md5 in zip(IDX_FILES, sums)]
        return Images(data, *as_images(*files[:2]), *as_images(*files[2:]))
    path = pathlib.Path(data)
    if not path.exists():
        raise UserError(f"--data {data}: no such file or folder, and not one of glyphs, {', '.join(IMAGE_SETS)}")
    try:
        images, labels = as_images(*read_images(path))
        if len(images) < 20:
            raise ValueError(f"{len(images)} images are too few for a 9:1 split, 20 are the least")
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"--data {data}: {error}") from None
    order, cut = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)), len(images) * 9 // 10
    return Images(path.name, images[order[:cut]], labels[order[:cut]], images[order[cut:]], labels[order[cut:]])


# --- end shared

# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer: image <-> pyramid of token maps
#   B images   f (B, C, 8, 8) latent   scales s_1 < ... < s_K = 8   L = sum of s_k^2 tokens   codes (V, C)
#   tokens (B, L): map after map, each in raster order   sum_k (B, C, 8, 8): what the maps 1 .. k say about f
# ---------------------------------------------------------------------------------------------------------------------


def area(x, side):
    """(B, C, H, H) -> (B, side^2, C): means over the cells of a coarser grid, as a sequence in raster order."""
    return F.adaptive_avg_pool2d(x, side).flatten(2).mT


def split_maps(tokens, scales):
    """(B, L, ...) -> K maps (B, s_k^2, ...)

    >>> [m.tolist() for m in split_maps(torch.arange(5)[None], [1, 2])]
    [[[0]], [[1, 2, 3, 4]]]
    """
    return tokens.split([s * s for s in scales], 1)


def kmeans(points, k, generator, rounds=8):
    """Lloyd's algorithm from k of the distinct points: (N, C) -> codebook (k, C); a code without points stays where it is."""
    distinct = points.unique(dim=0)
    codebook = distinct[torch.randint(len(distinct), (k,), generator=generator).to(points.device)]  # there may be fewer than k
    for _ in range(rounds):
        nearest = kernels.nearest_code(points, codebook)
        counts = torch.bincount(nearest, minlength=k)[:, None]
        means = torch.zeros_like(codebook).index_add_(0, nearest, points) / counts.clamp(min=1)
        codebook = torch.where(counts > 0, means, codebook)
    return codebook


def disturb(index, codes, share, generator, near=0.1):
    """Replace a share of the tokens (B, N) by one of the nearest tenth of the other codes (V, C)."""
    distance = torch.cdist(codes, codes).fill_diagonal_(math.inf)
    nearest = distance.topk(max(1, int(near * len(codes))), largest=False).indices  # (V, n)
    draw = lambda: torch.rand(index.shape, generator=generator).to(index.device)
    other = nearest[index, (draw() * nearest.shape[1]).long()]
    return torch.where(draw() < share, other, index)


def usage(index, size):
    """Integers of any shape -> share of the `size` codes that occur, perplexity exp(entropy): how many are in effective use.

    >>> usage(torch.tensor([0, 0, 1, 1]), 4)
    (0.5, 2.0)
    """
    counts = torch.bincount(index.flatten(), minlength=size).double()
    p = counts / counts.sum()
    return float((counts > 0).double().mean()), float(torch.exp(torch.special.entr(p).sum()))


class Pyramid(nn.Module):
    """The multi-scale quantizer (VAR, algorithms 1 and 2): one codebook for all maps, a small convolution phi per map.

        rest = f;  sum = 0                                residual: each map codes what is left over
        for each side s:
            r   = nearest code of area(rest, s)           tokens of this map
            h   = phi_s(bicubic(codes[r], 8))             the last map needs neither: it already has 8 x 8 cells
            sum = sum + h;  rest = f - sum

    Absolute targets (FlexVAR): rest stays f, sum = h alone, no phi; every map codes the whole picture. A single map of side 8 is
    plain vector quantization. Unlike VAR, codes are running means of the vectors that choose them (EMA), not learned by gradient:
    a learned codebook collapses easily. Unlike VAR, phi leaves out the last map, whose codes need no repair after resizing.
    """

    def __init__(self, scales, size, dim, absolute=False, commitment=0.25, decay=0.95, restart=0.05):
        super().__init__()
        self.scales, self.absolute, self.commitment = scales, absolute, commitment
        self.decay, self.restart = decay, restart  # memory per step; below this part of its fair share a code is dead
        self.codes = nn.Buffer(torch.zeros(size, dim))
        self.count, self.total = nn.Buffer(torch.zeros(size)), nn.Buffer(torch.zeros(size, dim))
        self.phi = nn.ModuleDict({str(s): nn.Conv2d(dim, dim, 3, padding=1) for s in scales[:-1] if not absolute})
        for conv in self.phi.values():
            nn.init.dirac_(conv.weight), nn.init.zeros_(conv.bias)  # the identity

    def grow(self, vectors, side):
        """One map of code vectors (B, s^2, C) -> what it says about the latent (B, C, 8, 8)"""
        h = vectors.mT.unflatten(2, (side, side))
        if side == SIDE:
            return h
        h = F.interpolate(h, SIDE, mode="bicubic")
        return h if self.absolute else (h + self.phi[str(side)](h)) / 2  # phi(h) = h / 2 + conv(h) / 2, as in VAR

    def add(self, total, index, side):
        """total (B, C, 8, 8) of the coarser maps, tokens of the next (B, s^2) -> total with that map"""
        h = self.grow(F.embedding(index, self.codes), side)
        return h if self.absolute else total + h

    def encode(self, f, scales=None, noise=0.0, generator=None):
        """Latent f -> tokens (B, L), fed (B, L), [sum_1 .. sum_K], [vectors of each map (B, s^2, C)].

        `fed` are the tokens with a share `noise` of them wrong; later maps code what is left over *after the wrong ones*, so that
        `tokens` teach to repair what `fed` broke (Infinity's self-correction). Without noise the two are the same.
        """
        tokens, fed, sums, vectors = [], [], [], []
        total = torch.zeros_like(f)
        for side in scales or self.scales:
            z = area(f if self.absolute else f - total.detach(), side)
            index = kernels.nearest_code(z.flatten(0, 1), self.codes).view(len(f), -1)
            tokens.append(index)
            fed.append(disturb(index, self.codes, noise, generator) if noise else index)
            total = self.add(total, fed[-1], side)
            sums.append(total)
            vectors.append(z)
        return torch.cat(tokens, 1), torch.cat(fed, 1), sums, vectors

    def inputs(self, tokens, scales=None):
        """Teacher forcing: tokens (B, L) -> (B, L, C). The input of map k is sum_{k-1}, averaged to s_k x s_k; of the first, zeros.

        It lies cell on cell with its target, so nothing is shifted, and it depends on the maps before k alone.
        """
        scales = scales or self.scales
        total, parts = self.codes.new_zeros(len(tokens), self.codes.shape[1], SIDE, SIDE), []
        for side, index in zip(scales, split_maps(tokens, scales)):
            parts.append(area(total, side))
            total = self.add(total, index, side)
        return torch.cat(parts, 1)

    def sums(self, tokens, scales=None):
        """tokens (B, L) -> [sum_1 .. sum_K], each (B, C, 8, 8): the decoder makes the image of the last, previews of the others."""
        scales = scales or self.scales
        sums = [self.codes.new_zeros(len(tokens), self.codes.shape[1], SIDE, SIDE)]
        for side, index in zip(scales, split_maps(tokens, scales)):
            sums.append(self.add(sums[-1], index, side))
        return sums[1:]

    def forward(self, f, generator):
        """Training: f -> quantized f with the gradient of f, tokens, auxiliary loss. Moves the codes."""
        if self.training and not self.count.any():
            self.start(f.detach(), generator)
        scales = self.scales
        if self.absolute:  # any one map must do: in training draw its side, more than half of the time the last
            side = torch.randint(1, 2 * SIDE + 1, (), generator=generator).clamp(max=SIDE) if self.training else SIDE
            scales = [int(side)]
        tokens, _, sums, vectors = self.encode(f.detach(), scales)
        if self.training:
            self.update(torch.cat(vectors, 1), tokens, scales, generator)
        if self.absolute:
            z = area(f, scales[0])
            q = F.embedding(tokens, self.codes)
            return self.grow(z + (q - z).detach(), scales[0]), tokens, self.commitment * F.mse_loss(z, q)
        # every partial sum is pulled to f, which trains phi; f is pulled to the last sum alone. VAR pulls it to every one: here that
        # cost 0.5 dB after 300 steps, since f then shrinks towards what the coarse maps can say
        loss = sum(F.mse_loss(s, f.detach()) for s in sums) / len(sums) + self.commitment * F.mse_loss(f, sums[-1].detach())
        return sums[-1] + f - f.detach(), tokens, loss

    @torch.no_grad()
    def start(self, f, generator):
        """Each map starts with its share of the codes: the means of what is left over when its turn comes."""
        total, first = torch.zeros_like(f), 0
        for side, share in zip(self.scales, self.codes.tensor_split(len(self.scales))):
            z = area(f if self.absolute else f - total, side).flatten(0, 1)
            share.copy_(kmeans(z, len(share), generator))
            total = self.add(total, kernels.nearest_code(z, share).view(len(f), -1) + first, side)
            first += len(share)
        self.count.fill_(1)
        self.total.copy_(self.codes)

    @torch.no_grad()
    def update(self, z, tokens, scales, generator):
        """codes = weighted sum of vectors / weight, both with exponential forgetting; then restart the dead.

        z (B, L, C). A vector of map k weighs 1 / s_k^2, so that all maps pull alike; the last one has 64 of the 85 vectors.
        """
        weight = torch.cat([torch.full((s * s,), 1 / s**2) for s in scales]).to(z).repeat(len(z))
        z, index = z.flatten(0, 1), tokens.flatten()
        self.count.lerp_(torch.bincount(index, weight, len(self.codes)), 1 - self.decay)
        self.total.lerp_(torch.zeros_like(self.codes).index_add_(0, index, z * weight[:, None]), 1 - self.decay)
        fair = float(weight.sum()) / len(self.codes)
        dead = (self.count < self.restart * fair).nonzero()[:, 0]
        if len(dead):  # born again as vectors that are badly coded now
            badness = (weight * (z - self.codes[index]).square().sum(-1)).cpu() + 1e-12
            fresh = z[torch.multinomial(badness, len(dead), replacement=len(dead) > len(z), generator=generator).to(z.device)]
            self.count[dead], self.total[dead] = fair, fresh * fair
        self.codes.copy_(self.total / self.count[:, None])


def norm(x):
    return F.layer_norm(x, x.shape[-1:])  # no gain, no bias


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3x3; starts as the identity. Kernels are the matrices (out, in * 9) that Muon wants."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width * 9) * (2 / (width * 9)) ** 0.5)
        self.second = nn.Parameter(torch.zeros(width, width * 9))

    def forward(self, x):
        kernel = lambda matrix: matrix.unflatten(1, (-1, 3, 3))
        return x + F.conv2d(F.relu(F.conv2d(F.relu(x), kernel(self.first), padding=1)), kernel(self.second), padding=1)


class Tokenizer(nn.Module):
    """Image -> latent -> pyramid of tokens -> latent -> image; float images (B, 32, 32) in [0, 1]."""

    def __init__(self, scales, size, dim, width, blocks, absolute=False, commitment=0.25):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 8, stride=4, padding=2)
        self.encoder = nn.Sequential(*[Residual(width) for _ in range(blocks)])
        self.to_code, self.from_code = nn.Linear(width, dim), nn.Linear(dim, width)
        self.pyramid = Pyramid(scales, size, dim, absolute, commitment)
        self.decoder = nn.Sequential(*[Residual(width) for _ in range(blocks)])
        self.paint = nn.ConvTranspose2d(width, 1, 8, stride=4, padding=2)  # 4x4 pixels a cell, overlapping by 2

    def latents(self, images):
        """(B, 32, 32) -> f (B, C, 8, 8)"""
        x = self.encoder(self.stem(images[:, None])).flatten(2).mT
        return self.to_code(norm(x)).mT.unflatten(2, (SIDE, SIDE)).float()

    def decode(self, f):
        """f (B, C, 8, 8) -> images (B, 32, 32), not yet clamped"""
        x = self.from_code(f.flatten(2).mT).mT.unflatten(2, (SIDE, SIDE))
        return self.paint(F.relu(self.decoder(x)))[:, 0].float()

    def forward(self, images, generator):
        """-> rebuilt images, tokens (B, L), auxiliary loss"""
        f = self.latents(images)
        with torch.autocast(images.device.type, enabled=False):
            q, tokens, loss = self.pyramid(f, generator)
        return self.decode(q), tokens, loss


# ---------------------------------------------------------------------------------------------------------------------
# the generator
#   d width   H heads   D = d / H   slot t belongs to token t: its input is known before that token is drawn
# ---------------------------------------------------------------------------------------------------------------------


def rope_rotations(places, head_dim, base=100.0):
    """2-D rotary positions (Su et al. 2021; per axis as in LlamaGen): places (N, 2) of (row, column) -> complex (N, D/2).

    The first half of the D/2 pairs turns with the row, the second with the column, at speeds 1 .. 1/base per cell. Places are
    those of the 8 x 8 map, where a cell of a coarser map lies at its centre (as in STAR, Ma et al. 2024, arXiv:2406.10797).
    """
    quarter = head_dim // 4
    speed = base ** (-torch.arange(quarter) / quarter)
    angle = torch.cat([places[:, :1] * speed, places[:, 1:] * speed], 1)
    return torch.polar(torch.ones_like(angle), angle)


def cell_centres(side):
    """Places of the cells of a map, in cells of the 8 x 8 map: (s^2, 2)

    >>> cell_centres(2).tolist()
    [[1.5, 1.5], [1.5, 5.5], [5.5, 1.5], [5.5, 5.5]]
    """
    centres = (torch.arange(side) + 0.5) * SIDE / side - 0.5
    return torch.cartesian_prod(centres, centres)


def rotate(x, rotations):
    """Pairs (x0, x1), (x2, x3), ... read as complex numbers and turned, in fp32: x (..., D), rotations (..., D/2)"""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2)


class Block(nn.Module):
    """x + g1 * attention(modulate(norm(x))), then x + g2 * mlp(modulate(norm(x))); gates, scales, shifts from the class (AdaLN).

    Both output layers start at zero and all gates at one: a new block is the identity.
    """

    def __init__(self, dim, heads, own_condition):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        self.sharpness = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))
        self.offset = nn.Parameter(torch.zeros(6 * dim))
        self.condition = nn.Linear(dim, 6 * dim, bias=False) if own_condition else None
        for layer in (self.proj, self.down, *([self.condition] if own_condition else [])):
            nn.init.zeros_(layer.weight)

    def forward(self, x, rotations, shared, label, mask=None, cache=None, start=0):
        """x (B, N, d); rotations (N, D/2); shared (B, 6d): AdaLN of all blocks, or label (B, d) for an own one.

        cache: None, or keys and values (2, B, H, L, D) to extend at slots start .. start + N.
        """
        condition = self.offset + (shared if self.condition is None else self.condition(label))
        gate1, gate2, scale1, scale2, shift1, shift2 = condition[:, None].chunk(6, -1)
        qkv = self.qkv(norm(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, D)
        # cosine attention: scores are bounded by a learned sharpness, whatever the lengths of q and k
        q, k = F.normalize(rotate(q, rotations), dim=-1), F.normalize(rotate(k, rotations), dim=-1)
        q = q * self.sharpness.clamp(max=math.log(100)).exp()
        q, k = q.to(v.dtype), k.to(v.dtype)
        end = start + x.shape[1]
        if cache is not None:
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
        if cache is None or mask is not None:
            y = kernels.attention(q, k, v, mask, scale=1.0)
        else:  # no mask: the new slots see all older ones and each other
            y = kernels.decode_attention(q, cache[0], cache[1], end, scale=1.0, causal=False)
        x = x + (1 + gate1) * self.proj(y.transpose(1, 2).flatten(2))
        return x + (1 + gate2) * self.down(F.relu(self.up(norm(x) * (1 + scale2) + shift2)).square())


class VAR(nn.Module):
    """p(tokens of a map | coarser maps, class), or p(token | tokens before, class) where `parallel` is off."""

    def __init__(self, size, code_dim, classes, scales, parallel, markov, dim, depth, heads, own_condition=False):
        super().__init__()
        self.scales, self.parallel, self.markov, self.null, self.size = scales, parallel, markov, classes, size
        self.label = nn.Embedding(classes + 1, dim)     # the first input, and the condition of every norm
        self.word = nn.Linear(code_dim, dim)            # what is known of a cell
        self.token = None if parallel else nn.Embedding(size + 1, dim)  # the token before, in its map; the last row: none
        self.place = nn.Parameter(torch.randn(1, dim, SIDE, SIDE) * 0.02)
        self.level = nn.Embedding(SIDE + 1, dim)        # by the side of the map
        nn.init.normal_(self.level.weight, std=0.02)
        self.condition = None if own_condition else nn.Linear(dim, 6 * dim, bias=False)  # AdaLN of all blocks
        self.blocks = nn.ModuleList(Block(dim, heads, own_condition) for _ in range(depth))
        self.final = nn.Linear(dim, 2 * dim, bias=False)
        self.refiner = None                             # a small VAR that draws the last map
        self.head = nn.Linear(dim, size, bias=False)
        self.rotations = {s: rope_rotations(cell_centres(s), dim // heads) for s in range(1, SIDE + 1)}
        for layer in filter(None, (self.condition, self.final, self.head)):
            nn.init.zeros_(layer.weight)  # the first loss is exactly log V

    def mask(self, scales):
        counts = [s * s for s in scales]
        if not self.parallel:
            return kernels.causal(sum(counts))
        return kernels.markov(counts) if self.markov else kernels.scales(counts)

    def before(self, tokens, scales):
        """(B, L) -> the token before each one in its map, `none` for the first of a map"""
        parts = [torch.cat([torch.full_like(m[:, :1], self.size), m[:, :-1]], 1) for m in split_maps(tokens, scales)]
        return torch.cat(parts, 1)

    def places(self, scales):
        """Per slot: vectors (L, d) of its cell (one learned 8 x 8 table, averaged for coarser maps) and of its map; rotations (L, D/2)"""
        added = torch.cat([area(self.place, s)[0] + self.level.weight[s] for s in scales])
        return added, torch.cat([self.rotations[s] for s in scales]).to(added.device)

    def run(self, known, before, labels, places, mask=None, cache=None, start=0):
        """Logits (B, N, V) of slots start .. start + N: known (B, N, C) from the coarser maps, before (B, N) or None, labels (B,)"""
        added, rotations = (p[start:start + known.shape[1]] for p in places)
        x, label = self.word(known) + added, self.label(labels)
        if self.token is not None:
            x = x + self.token(before)
        if start == 0:
            x = torch.cat([x[:, :1] + label[:, None], x[:, 1:]], 1)
        label = F.silu(label)
        shared = None if self.condition is None else self.condition(label)
        for i, block in enumerate(self.blocks):
            x = block(x, rotations, shared, label, mask, None if cache is None else cache[i], start)
        scale, shift = self.final(label)[:, None].chunk(2, -1)
        return self.head(norm(x) * (1 + scale) + shift)

    def forward(self, inputs, tokens, labels, scales=None):
        """Teacher forcing: inputs (B, L, C) of `Pyramid.inputs`, tokens (B, L), labels (B,) -> logits (B, L, V)"""
        scales = scales or self.scales
        before = None if self.parallel else self.before(tokens, scales)
        return self.run(inputs, before, labels, self.places(scales), self.mask(scales))

    def new_cache(self, batch, length):
        """Zeros (depth, 2, B, H, L, D): keys and values of every slot; none for a Markov model, which never looks back."""
        if self.markov:
            return None
        heads = self.blocks[0].heads
        return self.place.new_zeros(len(self.blocks), 2, batch, heads, length, self.place.shape[1] // heads)


# ---------------------------------------------------------------------------------------------------------------------
# sampling
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Known:
    """What a zero-shot use keeps: cells of the latent f (B, C, 8, 8) where masks[side], bool (side, side), is True."""
    f: torch.Tensor
    masks: dict

    def tokens(self, pyramid, total, side):
        """-> tokens (B, s^2) that bring `total` closest to f, and where to use them (s^2,): coded anew, to repair the free draws."""
        z = area(self.f if pyramid.absolute else self.f - total, side)
        return kernels.nearest_code(z.flatten(0, 1), pyramid.codes).view(len(z), -1), self.masks[side].flatten().to(z.device)


def guide(conditional, unconditional, scale):
    """Classifier-free guidance on logits (Ho & Salimans 2022, eq. 6 with w = scale - 1); scale 1 is the conditional model.

    >>> guide(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]), 3.0).tolist()
    [4.0, -2.0]
    """
    return unconditional + scale * (conditional - unconditional)


def guidance_ramp(guidance, count):
    """Guidance of each of `count` maps: none (1) at the first, full at the last, as in VAR; a single map has all of it.

    >>> guidance_ramp(2.5, 4)
    [1.0, 1.5, 2.0, 2.5]
    """
    return [1 + (guidance - 1) * k / (count - 1) for k in range(count)] if count > 1 else [guidance]


@torch.no_grad()
def generate(model, pyramid, labels, generator, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, scales=None, known=None,
             cached=True):
    """Draw one image per label (B,) -> tokens (B, L): one call per map, or per token where the model is not parallel.

    top_k, top_p: numbers, or lists with one for each map. With guidance other than 1 each call runs twice the batch: with the
    labels and with the class "none". cached=False runs the training pass, mask and all, in every call: the slow twin that must
    give the same logits.
    """
    scales = scales or model.scales
    count, length, device = len(scales), sum(s * s for s in scales), labels.device
    per_map = lambda value: value if isinstance(value, list) else [value] * count
    double = (lambda x: x.repeat(2, *[1] * (x.ndim - 1))) if guidance != 1 else (lambda x: x)
    both = torch.cat([labels, torch.full_like(labels, model.null)]) if guidance != 1 else labels
    tokens = torch.zeros(len(labels), length, dtype=torch.long, device=device)
    total = pyramid.codes.new_zeros(len(labels), pyramid.codes.shape[1], SIDE, SIDE)
    cache, places, first, fed = model.new_cache(len(both), length), model.places(scales), 0, []
    for side, strength, k, p in zip(scales, guidance_ramp(guidance, count), per_map(top_k), per_map(top_p)):
        if model.refiner is not None and side == SIDE:  # the small model reads all earlier inputs at once, then takes over
            model, earlier = model.refiner, torch.cat(fed, 1)
            cache, places = model.new_cache(len(both), length), model.places(scales)
            model.run(double(earlier), None, both, places, model.mask(scales[:-1]), cache)
        inputs, cells = area(total, side), side * side
        fed.append(inputs)
        if known is not None:
            kept, keep = known.tokens(pyramid, total, side)
        for i, j in [(0, cells)] if model.parallel else [(i, i + 1) for i in range(cells)]:
            part = slice(first + i, first + j)
            if cached:
                before = None if model.parallel else model.before(tokens[:, first:first + cells], [side])[:, i:j]
                logits = model.run(double(inputs[:, i:j]), before if model.parallel else double(before), both, places, None,
                                   cache, part.start)
            else:
                logits = model(double(pyramid.inputs(tokens, scales)), double(tokens), both, scales)[:, part]
            if guidance != 1:
                logits = guide(*logits.chunk(2), strength)
            tokens[:, part] = kernels.sample(logits, temperature, k, p, generator)
            if known is not None:
                tokens[:, part] = torch.where(keep[i:j], kept[:, i:j], tokens[:, part])
        total, first = pyramid.add(total, tokens[:, first:first + cells], side), first + cells
    return tokens


def draw(config, run, labels, known=None, chunk=250):
    """`generate` with the settings and the seed of the config, in chunks -> tokens (N, L) on the device"""
    device, bar, parts = run.device, Progress(len(labels), "sampling"), []
    generator, scales = torch.Generator(device).manual_seed(config.seed), sampling_scales(config)
    top_k, top_p = numbers(config.top_k, "--top-k", int, len(scales)), numbers(config.top_p, "--top-p", float, len(scales))
    for i in range(0, len(labels), chunk):
        part = labels[i:i + chunk].to(device)
        some = known and Known(known.f[i:i + chunk], known.masks)
        parts.append(generate(run.generator, run.tokenizer.pyramid, part, generator, config.guidance, config.temperature, top_k,
                              top_p, scales, some))
        bar.update(len(part))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def latents(tokenizer, images, device):
    """uint8 (N, 32, 32) -> f (N, C, 8, 8) on the device"""
    return torch.cat([tokenizer.latents(part.to(device).float() / 255) for part in images.split(500)])


@torch.no_grad()
def paint(tokenizer, tokens, scales=None, upto=None):
    """tokens (N, L) -> uint8 (N, 32, 32) on the CPU. upto: only the first so many maps, a preview."""
    parts = [tokenizer.decode(tokenizer.pyramid.sums(part, scales)[(upto or 0) - 1]) for part in tokens.split(500)]
    return (torch.cat(parts).clamp(0, 1) * 255).round().byte().cpu()


def psnr(images, other):
    """Peak signal-to-noise ratio in dB, of the error over all pixels of all images (not the mean of the images' own PSNRs).

    >>> psnr(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([0, 230], dtype=torch.uint8)).__round__(2)
    23.18
    """
    error = (images.float() - other.float()).square().mean() / 255**2
    return float(-10 * torch.log10(error))


def tokenizer_metrics(tokenizer, images, f):
    """Over all images (N, 32, 32) with latents f: PSNR after each map; usage and perplexity of each map and of all together."""
    pyramid = tokenizer.pyramid
    tokens = torch.cat([pyramid.encode(part)[0] for part in f.split(500)])
    shares, perplexities = zip(*(usage(m, len(pyramid.codes)) for m in split_maps(tokens, pyramid.scales)))
    share, perplexity = usage(tokens, len(pyramid.codes))
    quality = [psnr(paint(tokenizer, tokens, upto=k + 1), images) for k in range(len(pyramid.scales))]
    return {"rpsnr": quality[-1], "rpsnr_per_map": quality, "usage": share, "perplexity": perplexity,
            "usage_per_map": list(shares), "perplexity_per_map": list(perplexities)}


@torch.no_grad()
def nats_per_map(model, pyramid, f, labels):
    """-log p(tokens | label) in nats per image, for each map: latents f (N, C, 8, 8), labels (N,) -> K numbers"""
    totals = 0
    for part, label in zip(f.split(250), labels.to(f.device).split(250)):
        tokens = pyramid.encode(part)[0]
        logits = model(pyramid.inputs(tokens), tokens, label)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        totals = totals + torch.stack([m.sum().double() for m in split_maps(loss, pyramid.scales)]).cpu()
    return totals / len(f)


def unigram_nats(train_tokens, tokens, size):
    """The baseline: every slot draws its token from the training frequencies of that slot, whatever the others are."""
    counts = torch.stack([torch.bincount(slot, minlength=size) for slot in train_tokens.T]) + 0.5  # (L, V)
    log_p = torch.log(counts / counts.sum(-1, keepdim=True))
    return float(-log_p.gather(1, tokens.T).sum() / len(tokens))


def milliseconds(function, repeats=5):
    """Median wall-clock of function() in milliseconds, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


# --- shared: metrics


class Judge(nn.Module):
    """A small classifier, trained on the train split; its 64 penultimate features are the space of the Fréchet distance."""

    def __init__(self, classes):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.body = nn.Sequential(conv(1, 16), conv(16, 32), conv(32, 64), nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, images):
        """images float (N, 32, 32) in [0, 1] -> features (N, 64), logits (N, classes)"""
        features = self.body(images[:, None])
        return features, self.head(features)


def train_judge(images, labels, classes, device, seed, epochs=4):
    """Fit the Judge to uint8 images (N, 32, 32) with random shifts of up to 2 pixels. Seconds on a CPU."""
    with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers alone
        torch.manual_seed(seed)
        judge = Judge(classes).to(device).train()
        steps = max(epochs * len(images) // 128, 50)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        bar = Progress(steps, "classifier")
        for _ in range(steps):
            pick = torch.randint(len(images), (min(128, len(images)),))
            batch = torch.roll(images[pick], tuple(torch.randint(-2, 3, (2,)).tolist()), (1, 2)).to(device).float() / 255
            loss = F.cross_entropy(judge(batch)[1], labels[pick].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(loss=loss.item())
    return judge.eval()


@torch.no_grad()
def judged(judge, images):
    """uint8 (N, 32, 32) -> features float64 (N, 64), predicted classes (N,), both on the CPU"""
    device = next(judge.parameters()).device
    parts = [judge(part.to(device).float() / 255) for part in images.split(500)]
    return torch.cat([f for f, _ in parts]).double().cpu(), torch.cat([z for _, z in parts]).argmax(-1).cpu()


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of two feature sets (N, D), (M, D) (Heusel et al. 2017, eq. 6).

    Biased upwards by about 1/N: compare only values with the same N and the same reference.

    >>> a = torch.randn(500, 3, dtype=torch.float64)
    >>> round(float(frechet_distance(a, a + torch.tensor([3.0, 4.0, 0.0]))), 6)   # equal covariances, means 5 apart
    25.0
    """
    def root(m):  # of a symmetric positive matrix; rounding may leave tiny negative eigenvalues
        values, vectors = torch.linalg.eigh(m)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT

    cov_a, cov_b = torch.cov(a.mT), torch.cov(b.mT)
    half = root(cov_a)
    cross = torch.linalg.eigvalsh(half @ cov_b @ half).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def diversity(features, labels):
    """Mean distance between two samples of the same class, in feature space; guidance that kills variety makes it fall."""
    per_class = [torch.pdist(features[labels == c]).mean() for c in labels.unique() if (labels == c).sum() > 1]
    return float(torch.stack(per_class).mean()) if per_class else float("nan")


def image_metrics(judge, images, labels, real, real_labels):
    """uint8 samples and the classes asked for, against real images -> gfd, class_accuracy, diversity (1: as varied as real)"""
    (features, seen), (real_features, _) = judged(judge, images), judged(judge, real)
    return {"gfd": frechet_distance(features, real_features), "class_accuracy": float((seen == labels).double().mean()),
            "diversity": diversity(features, labels) / diversity(real_features, real_labels)}


def nearest_images(images, pool):
    """For every image (N, 32, 32) the closest of the pool (M, 32, 32) in mean squared error -> indices (N,): did we memorise?"""
    return kernels.nearest_code(images.flatten(1).float(), pool.flatten(1).float())


# --- end shared


def calls_per_image(model, scales):
    """Forward passes that one image takes; the refiner reads the earlier maps in a pass of its own."""
    return (len(scales) if model.parallel else sum(s * s for s in scales)) + (model.refiner is not None)


def speed(config, run, batch):
    """Milliseconds per image, drawn `batch` at a time and decoded to pixels."""
    labels, scales = torch.zeros(batch, dtype=torch.long, device=run.device), sampling_scales(config)
    tokens = lambda: generate(run.generator, run.tokenizer.pyramid, labels, None, config.guidance, scales=scales)
    return milliseconds(lambda: paint(run.tokenizer, tokens(), scales)) / batch


def evaluate(config, run, data, sweep=()):
    """All metrics of the README, and the samples they were measured on -> metrics, tokens, images uint8 (N, 32, 32), labels (N,).

    sweep: other values of guidance, whose gfd, class_accuracy and diversity are reported too.
    """
    tokenizer, model, pyramid, scales = run.tokenizer, run.generator, run.tokenizer.pyramid, sampling_scales(config)
    test = latents(tokenizer, data.test, run.device)
    metrics = tokenizer_metrics(tokenizer, data.test, test)
    nats = nats_per_map(model, pyramid, test, data.test_labels)
    if model.refiner is not None:
        nats[-1] = nats_per_map(model.refiner, pyramid, test, data.test_labels)[-1]
    train_f = latents(tokenizer, data.train[:len(data.train) // 2], run.device)
    encode = lambda f: torch.cat([pyramid.encode(part)[0] for part in f.split(500)]).cpu()
    # half of the training images are enough for the frequencies of a slot
    unigram = unigram_nats(encode(train_f), encode(test), model.size)
    metrics |= {"val_nats_per_image": float(nats.sum()), "nats_per_map": nats.tolist(), "unigram_nats_per_image": unigram,
                "bits_per_image": float(nats.sum()) / math.log(2)}

    labels = torch.arange(config.samples) % data.classes
    tokens = draw(config, run, labels)
    images = paint(tokenizer, tokens, scales)
    judge = train_judge(data.train, data.train_labels, data.classes, run.device, config.seed)
    real, real_labels = data.test[:config.samples], data.test_labels[:config.samples]
    metrics |= image_metrics(judge, images, labels, real, real_labels)
    if sweep:
        metrics["sweep"] = []
        for guidance in sweep:
            other = paint(tokenizer, draw(dataclasses.replace(config, guidance=guidance), run, labels), scales)
            metrics["sweep"].append({"guidance": guidance} | image_metrics(judge, other, labels, real, real_labels))
    # floor and ceiling through the same function: as many training images as samples, untouched and through the tokenizer
    some = slice(0, config.samples)
    metrics["gfd_floor"] = image_metrics(judge, data.train[some], data.train_labels[some], real, real_labels)["gfd"]
    rebuilt = paint(tokenizer, encode(latents(tokenizer, data.train[some], run.device)).to(run.device))
    metrics["rfd"] = image_metrics(judge, rebuilt, data.train_labels[some], real, real_labels)["gfd"]
    metrics["judge_accuracy"] = float((judged(judge, real)[1] == real_labels).double().mean())
    metrics |= {"samples": config.samples, "calls_per_image": calls_per_image(model, scales),
                "tokens_per_image": sum(s * s for s in scales), "ms_per_image_b1": speed(config, run, 1),
                "ms_per_image_b64": speed(config, run, 64)}
    return metrics, tokens, images, labels


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
# train: first the tokenizer, then the generator
# ---------------------------------------------------------------------------------------------------------------------

# --- shared: muon


def orthogonalize(G, rounds=5, dtype=torch.float32):
    """G (..., m, n) -> nearly the nearest orthogonal matrix: U V^T of G = U S V^T, but with singular values of 0.7 to 1.2.

    Newton-Schulz: the odd quintic a x + b x^3 + c x^5, applied to a matrix, acts on its singular values alone, and these
    coefficients push every value in (0, 1] towards 1 in five rounds of matrix products (Jordan et al. 2024).

    >>> orthogonalize(torch.diag(torch.tensor([3.0, 0.2]))).diagonal().round(decimals=1)    # 3 and 0.2 both become about 1
    tensor([0.7000, 1.1000])
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.mT if G.shape[-2] > G.shape[-1] else G  # X X^T on the short side
    X = (X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)  # bf16 is exact enough, and faster where the hardware has it
    for _ in range(rounds):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    X = X.float()
    return X.mT if G.shape[-2] > G.shape[-1] else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: all directions of a weight matrix move at one speed, the rare ones too (Jordan et al. 2024).

    For the matrices inside the blocks only. Matrices of one shape are orthogonalised in one batched product.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.dtype = dtype  # of the products in `orthogonalize`

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                for p in params:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    velocity.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(velocity, group["momentum"]))  # Nesterov: look one step ahead
                updates = orthogonalize(torch.stack(updates), dtype=self.dtype)
                scale = max(1, rows / columns) ** 0.5  # an update then changes the outputs by about lr, whatever the shape
                for p, update in zip(params, updates):
                    p.sub_(update, alpha=group["lr"] * scale)


# --- end shared


def batch_indices(step, batch, n, seed):
    """Which of n images step number `step` takes. A pure function: the position in the data is the step, nothing else to save."""
    places = torch.arange(step * batch, (step + 1) * batch)
    generator = lambda epoch: torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    first, last = step * batch // n, int(places[-1]) // n
    orders = torch.cat([torch.randperm(n, generator=generator(epoch)) for epoch in range(first, last + 1)])
    return orders[places - first * n]


def build(config, classes, device):
    """-> Tokenizer, VAR, on the device"""
    scales = parse_scales(config.scales)
    tokenizer = Tokenizer(scales, config.codebook, config.code_dim, config.width, config.blocks, config.targets == "absolute",
                          config.commitment)
    make = lambda dim, depth: VAR(config.codebook, config.code_dim, classes, scales, config.order == "scales",
                                  config.mask == "markov", dim, depth, config.heads, config.adaln == "block")
    generator = make(config.dim, config.depth)
    if config.refiner:
        generator.refiner = make(config.refiner, max(config.depth // 2, 1))
    return tokenizer.to(device), generator.to(device)


class Run:
    """What must survive a restart: both models, the stage and its optimizers, random numbers, history, and the step.

    The step is the position in the data. Stages: "tokenizer", "generator".
    """

    def __init__(self, config, classes, device, dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.tokenizer, self.generator = build(config, classes, device)
        self.history = {"tokenizer": [], "generator": []}
        self.seconds = {"tokenizer": 0.0, "generator": 0.0}
        self.enter("tokenizer")

    def enter(self, stage):
        """Start a stage with fresh optimizers: Muon for the matrices between layers, AdamW for the rest."""
        self.stage, self.step, self.best = stage, 0, math.inf
        self.rng = torch.Generator().manual_seed(self.config.seed)  # hidden labels, restarts, noise, lists of maps
        model, prefix = getattr(self, stage), "tok_" if stage == "tokenizer" else ""
        ends = ("stem", "to_code", "from_code", "paint", "phi", "label", "word", "token", "place", "level", "head")
        inside = [p for name, p in model.named_parameters() if p.ndim == 2 and not set(ends) & set(name.split("."))]
        taken = {id(p) for p in inside}
        rest = [p for p in model.parameters() if id(p) not in taken]
        self.rates = getattr(self.config, prefix + "lr"), getattr(self.config, prefix + "lr_adam")
        self.optimizers = [Muon(inside, lr=self.rates[0], dtype=self.dtype),
                           torch.optim.AdamW(rest, lr=self.rates[1], betas=(0.9, 0.95), weight_decay=0.0, fused=True)]

    def update(self, loss, steps):
        """One optimizer step; the rates fall linearly to zero, without warm-up."""
        loss.backward()
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = rate * (1 - self.step / steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def save(self, path):
        save_checkpoint(path, {
            "config": dataclasses.asdict(self.config), "stage": self.stage, "step": self.step, "best": self.best,
            "model": {"tokenizer": self.tokenizer.state_dict(), "generator": self.generator.state_dict()},
            "optimizers": [o.state_dict() for o in self.optimizers], "run_rng": self.rng.get_state(), "rng": rng_state(),
            "seconds": self.seconds, "history": self.history})

    def load_models(self, state):
        self.tokenizer.load_state_dict(state["model"]["tokenizer"])
        self.generator.load_state_dict(state["model"]["generator"])

    def load(self, state):
        self.enter(state["stage"])
        self.load_models(state)
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.rng.set_state(state["run_rng"])
        set_rng_state(state["rng"])
        self.step, self.best, self.seconds, self.history = (state[k] for k in ("step", "best", "seconds", "history"))


def tokenizer_loss(run, images, forward, variance):
    """images float (B, 32, 32) -> what is minimised; the part to show: the squared error in units of the images' variance"""
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        rebuilt, _, extra = forward(images, run.rng)
    error = F.mse_loss(rebuilt, images) / variance
    return error + extra, error


def random_scales(generator):
    """A list of maps for absolute targets: 1 and 8 always, each side between with probability 0.4 (FlexVAR, section 3.3)."""
    return [1, *(s for s in range(2, SIDE) if torch.rand((), generator=generator) < 0.4), SIDE]


def generator_loss(run, f, labels, forward):
    """Latents f (B, C, 8, 8), labels (B,) -> what is minimised; the part to show: nats per token, without the refiner's"""
    config, model, pyramid = run.config, run.generator, run.tokenizer.pyramid
    hide = torch.rand(len(labels), generator=run.rng) < config.label_dropout
    labels = torch.where(hide, model.null, labels).to(f.device)
    scales = random_scales(run.rng) if pyramid.absolute else pyramid.scales
    with torch.no_grad():
        tokens, fed, _, _ = pyramid.encode(f, scales, config.noise, run.rng)
        inputs = pyramid.inputs(fed, scales)
    with torch.autocast(f.device.type, run.dtype, enabled=run.dtype != torch.float32):
        logits = forward(inputs, fed, labels, scales)
        small = model.refiner(inputs, fed, labels, scales)[:, -SIDE**2:] if model.refiner is not None else None
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    extra = 0 if small is None else F.cross_entropy(small.float().flatten(0, 1), tokens[:, -SIDE**2:].flatten())
    return loss + extra, loss


def train(run, steps, batch, n, loss_of, validate, out):
    """One stage. `loss_of(indices)` gives the loss, `validate()` a dict with a "score", lower is better.

    Keeps OUT/last.pt, the newest state, and of the generator OUT/best.pt, the best score; fills run.history.
    """
    config, stage = run.config, run.stage
    bar, began, losses = Progress(steps, stage, start=run.step), time.time() - run.seconds[stage], []
    with Interrupt() as stop:
        while run.step < steps:
            size = 4 * batch if stage == "tokenizer" and run.step == 0 else batch  # the codes start from this first batch
            loss, shown = loss_of(batch_indices(run.step, size, n, config.seed))
            losses.append(shown.item())
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss of the {stage} is {loss.item()} at step {run.step}: lower its learning rates; the "
                                f"last checkpoint in {config.out} is still good")
            run.update(loss, steps)
            bar.update(loss=losses[-1])
            report = run.step % config.eval_every == 0 or run.step == steps
            if report:
                getattr(run, stage).eval()
                found = validate()
                getattr(run, stage).train()
                run.history[stage].append({"step": run.step, "train": statistics.fmean(losses[-config.eval_every:])} | found)
            if report or stop.asked:
                run.seconds[stage] = time.time() - began
                if report and stage == "generator" and found["score"] < run.best:
                    run.best = found["score"]
                    run.save(out / "best.pt")
                run.save(out / "last.pt")
            if stop.asked:
                raise KeyboardInterrupt(f"Step {run.step} of the {stage} is saved: the same command with --resume goes on "
                                        "from there")


def train_both(run, data, out):
    """The tokenizer, unless it is trained already; then the generator on its latents, which it does not change any more."""
    config, device = run.config, run.device
    compiled = torch.compile if config.compile else (lambda model: model)
    if run.stage == "tokenizer":
        variance, forward = float((data.train.float() / 255).var()), compiled(run.tokenizer)
        pick = lambda chosen: data.train[chosen].to(device).float() / 255
        test = data.test[:1000]

        def validate():
            found = tokenizer_metrics(run.tokenizer, test, latents(run.tokenizer, test, device))
            return {"score": -found["rpsnr"], "rpsnr": found["rpsnr"], "usage": found["usage_per_map"]}

        run.tokenizer.train()
        train(run, config.tok_steps, config.tok_batch, len(data.train),
              lambda chosen: tokenizer_loss(run, pick(chosen), forward, variance), validate, out)
        run.enter("generator")
    run.tokenizer.eval().requires_grad_(False)
    f, test = latents(run.tokenizer, data.train, device), latents(run.tokenizer, data.test, device)
    model, forward = run.generator, compiled(run.generator)

    def validate():
        nats = nats_per_map(model, run.tokenizer.pyramid, test, data.test_labels)
        return {"score": float(nats.sum()), "val": float(nats.sum()), "nats_per_map": nats.tolist()}

    run.generator.train()
    train(run, config.steps, config.batch, len(f),
          lambda chosen: generator_loss(run, f[chosen], data.train_labels[chosen], forward), validate, out)


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


def draw_samples(images, labels, data, out):
    """samples.png: a column per class, generated; nearest.png: samples above the training images closest to them."""
    columns = min(data.classes, 10)
    rows = [(labels == c).nonzero()[:8, 0] for c in range(columns)]
    chosen = torch.stack([r[:min(map(len, rows))] for r in rows], 1)
    figure, axes = new_figure(6, 5.2)
    show_images(axes[0, 0], images[chosen.flatten()], columns, f"{data.name}: generated, one column per class")
    save_figure(figure, out / "samples.png")
    some = chosen[:4].flatten()
    near = data.train[nearest_images(images[some], data.train)]
    pairs = torch.stack([images[some].view(-1, columns, 32, 32), near.view(-1, columns, 32, 32)], 1).flatten(0, 2)
    figure, axes = new_figure(6, 5.2)
    show_images(axes[0, 0], pairs, columns, "odd rows: generated; even rows: the nearest training image of each")
    save_figure(figure, out / "nearest.png")


def draw_maps(run, data, tokens, scales, out):
    """maps.png: test images after each map, beside the originals; generated images after each map."""
    count, pyramid = 10, run.tokenizer.pyramid
    coded = pyramid.encode(latents(run.tokenizer, data.test[:count], run.device))[0]
    figure, axes = new_figure(6, 1.3 + 0.62 * (len(pyramid.scales) + len(scales)), 2)
    after = [paint(run.tokenizer, coded, upto=k + 1) for k in range(len(pyramid.scales))]
    name = lambda sides: ", ".join(f"{s}x{s}" for s in sides)
    show_images(axes[0, 0], torch.cat([*after, data.test[:count]]), count,
                f"test images after the maps {name(pyramid.scales)}; the originals")
    after = [paint(run.tokenizer, tokens[:count], scales, k + 1) for k in range(len(scales))]
    show_images(axes[1, 0], torch.cat(after), count, f"generated, after the maps {name(scales)}")
    save_figure(figure, out / "maps.png")


def draw_history(run, metrics, out):
    """training.png: both losses over the steps, and where the codes and the nats go, map by map."""
    figure, axes = new_figure(9, 5.2, 2, 2)
    (psnrs, loss), (codes, nats) = axes
    history = run.history["tokenizer"]
    psnrs.plot([h["step"] for h in history], [h["rpsnr"] for h in history], ".-")
    psnrs.set(xlabel="step", ylabel="dB", title="tokenizer: PSNR of reconstructed test images")
    history, length = run.history["generator"], sum(s * s for s in run.tokenizer.pyramid.scales)
    loss.plot([h["step"] for h in history], [h["train"] for h in history], ".-", label="train")
    loss.plot([h["step"] for h in history], [h["val"] / length for h in history], ".-", label="test")
    loss.axhline(metrics["unigram_nats_per_image"] / length, color="gray", ls=":", label="unigram baseline")
    loss.set(xlabel="step", ylabel="nats per token", title="generator: cross-entropy")
    loss.legend()
    scales = run.tokenizer.pyramid.scales
    names, places = [f"{s}x{s}" for s in scales], np.arange(len(scales))
    codes.bar(places - 0.2, metrics["usage_per_map"], 0.4, label="usage")
    codes.bar(places + 0.2, np.array(metrics["perplexity_per_map"]) / run.generator.size, 0.4, label="perplexity / codes")
    codes.set(title=f"codes in use, of {run.generator.size}, over all test images", xticks=places, xticklabels=names, ylim=(0, 1.3))
    codes.legend(ncols=2)
    nats.bar(places, np.array(metrics["nats_per_map"]) / np.square(scales), 0.5)
    nats.set(title="nats per token, map by map", xticks=places, xticklabels=names)
    save_figure(figure, out / "training.png")


def region(rows, columns):
    """A mask of what is kept: True outside the given rows and columns of pixels; bool (32, 32)"""
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[rows, columns] = False
    return mask


def keep(run, images, mask):
    """Known cells of images whose other pixels are blacked out before the encoder sees them: nothing leaks.

    A cell of a map is known when all its pixels are, and the pixels around it that its latents depend on do not matter much.
    """
    f = latents(run.tokenizer, images * mask, run.device)
    return Known(f, {s: area(mask[None, None].float(), s).view(s, s) == 1 for s in range(1, SIDE + 1)})


def edit(config, run, data, out, count=10, draws=4):
    """inpainting.png, outpainting.png, editing.png, superresolution.png: uses that the model was not trained for."""
    picked = torch.stack([(data.test_labels == c).nonzero()[0, 0] for c in data.test_labels.unique()[:count]])
    images, labels, count = data.test[picked], data.test_labels[picked], len(picked)
    again = lambda x: x.repeat(draws, *[1] * (x.ndim - 1))
    redraw = lambda known, labels: paint(run.tokenizer, draw(config, run, labels, known), sampling_scales(config))

    def page(name, mask, labels, title):
        drawn = redraw(keep(run, again(images), mask), again(labels))
        shown = torch.where(mask, images, torch.full_like(images, 96))
        figure, axes = new_figure(6, 4.1)
        show_images(axes[0, 0], torch.cat([shown, drawn, images]), count, title)
        save_figure(figure, out / f"{name}.png")

    page("inpainting", region(slice(12, 20), slice(4, 28)), labels, f"given with a hole; {draws} fillings; the originals")
    page("outpainting", ~region(slice(0, 16), slice(0, 32)), labels, f"given upper halves; {draws} completions; the originals")
    page("editing", region(slice(16, 32), slice(0, 32)), labels.roll(1), "upper halves kept, drawn as another class; the originals")
    # super-resolution: the coarse maps of a blurred image, the finer ones from the model
    low = F.interpolate(F.avg_pool2d(images[:, None].float(), 4), 32, mode="bicubic").clamp(0, 255)[:, 0].round().byte()
    known = Known(latents(run.tokenizer, again(low), run.device),
                  {s: torch.full((s, s), s <= 4) for s in range(1, SIDE + 1)})
    drawn = redraw(known, again(labels))
    figure, axes = new_figure(6, 4.1)
    show_images(axes[0, 0], torch.cat([low, drawn, images]), count,
                f"8x8 pixels, enlarged ({psnr(low, images):.1f} dB); {draws} draws of the last map "
                f"({psnr(drawn, again(images)):.1f} dB); originals")
    save_figure(figure, out / "superresolution.png")


def print_summary(metrics, scales):
    m = SimpleNamespace(**metrics)
    row = lambda name, values, form: f"{name:<12}" + "".join(f"{v:>{8}{form}}" for v in values)
    print(f"""
map         {"".join(f"{f'{s}x{s}':>8}" for s in scales)}
{row("PSNR, dB", m.rpsnr_per_map, ".1f")}   of the image after this map
{row("usage", m.usage_per_map, ".0%")}   of the codes; all maps together {m.usage:.0%} (healthy: 95 % and more)
{row("perplexity", m.perplexity_per_map, ".0f")}   all maps together {m.perplexity:.0f}
{row("nats", m.nats_per_map, ".1f")}   in all {m.val_nats_per_image:.1f} ({m.bits_per_image:.0f} bits); \
unigram baseline {m.unigram_nats_per_image:.1f}

quality     gFD {m.gfd:.2f}; floor (real training images) {m.gfd_floor:.2f}; ceiling (the tokenizer alone) {m.rfd:.2f}
            {m.class_accuracy:.1%} read as the class asked for (real: {m.judge_accuracy:.1%}); diversity {m.diversity:.2f} of real
speed       {m.calls_per_image} calls, {m.tokens_per_image} tokens per image; {m.ms_per_image_b1:.0f} ms alone, \
{m.ms_per_image_b64:.1f} ms in a batch of 64
total       {m.seconds:.0f} s, peak memory {m.peak_memory_mb:.0f} MB""")


def check(config, metrics):
    """--check: exit with code 1 when a metric misses its band."""
    missed = [f"{name} {metrics[name]:.3f} < {least}" for name, least in CHECK.items() if metrics[name] < least]
    if config.check and missed:
        raise SystemExit(f"nano_var: check failed: {'; '.join(missed)}")


# ---------------------------------------------------------------------------------------------------------------------
# bench and compare
# ---------------------------------------------------------------------------------------------------------------------

VARIANTS = {"raster": dict(order="raster"), "tokens": dict(order="tokens"), "scales": dict(order="scales"),
            "markov": dict(order="scales", mask="markov")}
GUIDANCES = (1.0, 1.5, 2.0)


def bench(config, device, dtype):
    """Milliseconds per image of every variant, alone and in a batch of 64, with random weights; medians."""
    result = {}
    for name, change in VARIANTS.items():
        run = Run(complete_config(dataclasses.replace(config, **change)), 10, device, dtype)
        run.tokenizer.eval(), run.generator.eval()
        once, many = speed(run.config, run, 1), speed(run.config, run, 64)
        result[name] = {"calls_per_image": calls_per_image(run.generator, run.generator.scales), "ms_per_image_b1": once,
                        "ms_per_image_b64": many}
        ratio = result["raster"]["ms_per_image_b1"] / once, result["raster"]["ms_per_image_b64"] / many
        print(f"{name:<8} {result[name]['calls_per_image']:>3} calls   alone {once:7.1f} ms ({ratio[0]:.1f} x raster)   "
              f"in a batch of 64 {many:6.2f} ms ({ratio[1]:.1f} x raster)", flush=True)
    return result


def compare(config, out):
    """Train all variants with the same encoder, backbone, images and steps, for --seeds seeds; print a table, draw compare.png.

    The pyramid's three variants share one tokenizer per seed. Each run has a folder OUT/NAME-SEED; with --resume finished runs
    are not repeated. Guidance is no fixed point of comparison, so every variant is measured at each value of GUIDANCES.
    """
    results = {name: [] for name in VARIANTS}
    for seed in range(config.seed, config.seed + config.seeds):
        for name, change in VARIANTS.items():
            folder = out / f"{name}-{seed}"
            if not (config.resume and (folder / "metrics.json").exists()):
                print(f"\n{name}, seed {seed}", flush=True)
                tokenizer = "" if name in ("raster", "tokens") else str(out / f"tokens-{seed}" / "best.pt")
                resume = config.resume and (folder / "last.pt").exists()
                changed = dict(change, seed=seed, out=str(folder), tokenizer=tokenizer, resume=resume)
                execute("all", dataclasses.replace(config, **changed), GUIDANCES)
            results[name].append(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    print_comparison(results)
    draw_comparison(results, out)
    (out / "compare.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def mean_and_error(values, form):
    """"mean ± standard error of the mean" as a text; one value has no error."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{error}"


def print_comparison(results):
    """One row per variant: what does not depend on guidance; then gFD and class accuracy at each guidance."""
    columns = {"calls_per_image": ("calls", ".0f"), "ms_per_image_b1": ("ms alone", ".1f"), "ms_per_image_b64": ("ms in 64", ".2f"),
               "bits_per_image": ("bits per image", ".1f"), "rpsnr": ("PSNR, dB", ".2f"), "rfd": ("ceiling rFD", ".2f")}
    print(f"\nmeans over {len(results['raster'])} seeds ± their standard errors")
    print(" " * 8 + "".join(f"{title:>16}" for title, _ in columns.values()))
    for name, runs in results.items():
        texts = [mean_and_error([m[key] for m in runs], form) for key, (_, form) in columns.items()]
        print(f"{name:<8}" + "".join(f"{text:>16}" for text in texts))
    for key, title, form in (("gfd", "gFD", ".2f"), ("class_accuracy", "class accuracy", ".3f"), ("diversity", "diversity", ".3f")):
        print(f"\n{title} at guidance" + "".join(f"{g:>18}" for g in GUIDANCES))
        for name, runs in results.items():
            texts = [mean_and_error([m["sweep"][i][key] for m in runs], form) for i in range(len(GUIDANCES))]
            print(f"{name:<{len(title) + 12}}" + "".join(f"{text:>18}" for text in texts))


def draw_comparison(results, out):
    """compare.png: quality against obedience over the guidance, the bits of each map, and samples of every variant."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplot_mosaic([["quality", "bits"], *[[name, name] for name in results]], height_ratios=[4] + [1] * len(results))
    for i, (name, runs) in enumerate(results.items()):
        curves = np.array([[(s["class_accuracy"], s["gfd"]) for s in m["sweep"]] for m in runs])  # (seeds, guidances, 2)
        axes["quality"].plot(*curves.mean(0).T, ".-", color=f"C{i}", label=name)
        axes["quality"].scatter(*curves.reshape(-1, 2).T, s=6, color=f"C{i}", alpha=0.5)
        bits = np.mean([m["nats_per_map"] for m in runs], 0) / math.log(2)
        axes["bits"].bar(i, bits[-1], color=f"C{i}", alpha=0.5)
        axes["bits"].bar(i, bits[:-1].sum(), bottom=bits[-1], color=f"C{i}")
        with np.load(out / f"{name}-{runs[0]['seed']}" / "samples.npz") as file:
            show_images(axes[name], torch.from_numpy(file["images"][:20]), 20, f"{name}: {runs[0]['calls_per_image']} calls")
    axes["quality"].set(xlabel="class accuracy", ylabel="gFD, lower is better",
                        title=f"guidance {', '.join(map(str, GUIDANCES))}; dots: seeds")
    axes["quality"].legend()
    axes["bits"].set(xticks=range(len(results)), xticklabels=list(results), ylabel="bits per image",
                     title="-log2 p(test image); pale: the 8x8 map")
    save_figure(figure, out / "compare.png")


# ---------------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------------


def sampling_scales(config):
    return parse_scales(config.sample_scales or config.scales)


def borrow_tokenizer(config):
    """--tokenizer FILE: -> its checkpoint, and the config with the fields that belong to the tokenizer taken from it"""
    state = load_checkpoint(pathlib.Path(config.tokenizer))
    try:
        saved = {name: state["config"][name] for name in TOKENIZER_FIELDS}
        complete = state["stage"] == "generator"
    except KeyError:
        raise UserError(f"--tokenizer {config.tokenizer}: not a checkpoint of nano_var") from None
    if not complete:
        raise UserError(f"--tokenizer {config.tokenizer}: its training is not finished; go on with --resume there")
    return state, adopt(config, saved, config.tokenizer, PRESETS[config.preset])


def execute(part, config, sweep=()):
    """One run: everything that `main` does after the command line is read. sweep: see `evaluate`."""
    began = time.time()
    config = complete_config(config)
    device, dtype, reason = pick_device(config.device, config.precision)
    print(f"nano_var: {reason}; attention: {kernels.path(torch.empty(0, device=device)).name}", flush=True)
    torch.manual_seed(config.seed)
    if part == "bench":
        return bench(config, device, dtype)
    out, saved, borrowed = make_folder(config.out), None, None
    if part == "compare":
        return compare(config, out)
    if config.resume or part not in ("all", "train"):
        saved = load_checkpoint(out / ("last.pt" if config.resume else "best.pt"))
        config = complete_config(adopt(config, saved["config"], config.out, PRESETS[config.preset]))
    elif config.tokenizer:
        borrowed, config = borrow_tokenizer(config)
    data = load_images(config.data, config.seed)
    run = Run(config, data.classes, device, dtype)
    params = [sum(p.numel() for p in model.parameters()) for model in (run.tokenizer, run.generator)]
    print(f"data {data.name}: {len(data.train)} train, {len(data.test)} test; maps {config.scales} of {config.codebook} codes; "
          f"tokenizer {params[0] / 1e6:.2f} M, generator {params[1] / 1e6:.2f} M parameters", flush=True)
    metrics = {"device": reason, "params": params[1], "tokenizer_params": params[0], "seed": config.seed}

    if part in ("all", "train"):
        if config.resume:
            run.load(saved)
        if borrowed:
            run.tokenizer.load_state_dict(borrowed["model"]["tokenizer"])
            run.history["tokenizer"] = borrowed["history"]["tokenizer"]
            run.enter("generator")
        train_both(run, data, out)
        trained = run.step * config.batch * sum(s * s for s in run.generator.scales)
        metrics["tokens_per_second"] = trained / max(run.seconds["generator"], 1e-9)
        saved = load_checkpoint(out / "best.pt")
    else:
        run.history = saved["history"]
    run.load_models(saved)
    run.tokenizer.eval(), run.generator.eval()
    scales = sampling_scales(config)
    if part in ("all", "eval"):
        measured, tokens, images, labels = evaluate(config, run, data, sweep)
        metrics |= measured
    if part == "sample":
        labels = torch.arange(min(config.samples, 8 * data.classes)) % data.classes
        tokens = draw(config, run, labels)
        images = paint(run.tokenizer, tokens, scales)
    if part in ("all", "eval", "sample"):
        np.savez_compressed(out / "samples.npz", images=images.numpy(), labels=labels.numpy(), tokens=tokens.cpu().numpy())
        draw_samples(images, labels, data, out)
        draw_maps(run, data, tokens, scales, out)
    if part in ("all", "edit"):
        edit(config, run, data, out)
    metrics |= {"seconds": time.time() - began, "peak_memory_mb": peak_memory_mb(device)}
    if part in ("all", "eval"):
        draw_history(run, metrics, out)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        print_summary(metrics, run.generator.scales)
        check(config, metrics)
    return metrics


def main(argv=None):
    """Run the script as from the command line; -> the dict of metrics that it also writes to OUT/metrics.json."""
    keep_freed_memory()
    return execute(*parse_config(Config, argv, PARTS, PRESETS, __doc__))


if __name__ == "__main__":
    sys.exit(cli(main))
