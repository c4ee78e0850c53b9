"""nano_ar: draw images one token at a time, as a language model writes text.

An image becomes a grid of tokens, the grid becomes a sequence, and a small GPT learns p(next token | tokens so far, class).

    32x32 image          8x8 tokens                 GPT                              sample
    +--------+  4x4     +----------+   raster   [class] t0 t1 t2 ...  t62      pick t0, feed it back,
    |   /|   | patches  | 0 0 7 0  |  ------->     |    |  |  |        |       pick t1, ... 64 calls,
    |    |   | -------> | 0 3 9 1  |               v    v  v  v        v       paste 64 patches:
    |   _|_  | nearest  | 0 0 9 0  |              t0   t1 t2 t3 ...   t63      a new image
    +--------+ codeword +----------+            p(t0|c) p(t1|c,t0) ...

Tokens   --tokens patches   k-means codebook over 4x4 patches (default, 64 tokens)
         --tokens pixels    grey levels of the image scaled to --size: exact bits per pixel
         --tokens FOLDER    what another tokenizer exported; the format stands below
Order    --order raster     row by row: one call per token
         --order diag       all tokens of an anti-diagonal at once: 2n-1 calls (NAR, He et al. 2025, arXiv:2503.10696)

Papers   The recipe of LlamaGen (Sun et al. 2024, arXiv:2406.06525; github.com/FoundationVision/LlamaGen) at small scale:
         class token, 2-D RoPE (Su et al. 2021, arXiv:2104.09864), label dropout, classifier-free guidance (Ho & Salimans
         2022, arXiv:2207.12598). The optimizer is Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Commands                                            two CPU cores     expect
    python nano_ar.py                               112 s, 0.9 GB     99 % read as the class asked for, gFD 4.6 (ceiling 4.1)
    python nano_ar.py --data mnist                  2 minutes         97 % (on 9,000 images), gFD 2.6 (ceiling 2.3)
    python nano_ar.py --order diag --out out/diag   a little less     15 calls per image instead of 64
    python nano_ar.py sample --guidance 3           seconds           draws from the trained model
    python nano_ar.py complete                      seconds           lower halves for given upper halves
    python nano_ar.py bench                         seconds           tokens per second, with and without the cache
--check exits with 1 when fewer than 95 % of the samples are read as the class that was asked for.

Token folder (--tokens FOLDER), for tokens that another program made. `tokens.npz` holds `train_tokens` (N, L) and
`test_tokens` (M, L), integers in 0 .. codebook_size - 1; `train_labels`, `test_labels`; `train_images`, `test_images`, the
originals (uint8, N x 32 x 32) that the metrics compare with; `grid`, rows and columns with rows * columns = L;
`codebook_size`. `decoder.pt2` is a `torch.export` program, int64 tokens (B, L) -> float images (B, 32, 32) in [0, 1]: it runs
without the code of the class that made it.

Left out on purpose: a learned decoder (nano_tok), next-scale order (nano_var), faster decoding (nano_spec), warm-up (Muon with
zero-initialised output layers needs none), dropout and weight averaging, distributed training.

Read in this order: `make_order`, `GPT`, `generate`, `train`; the rest is data, metrics and pictures.
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
    out: str = opt("out/ar", "folder for checkpoints, pictures, samples.npz and metrics.json")
    preset: str = opt("cpu", "cpu: two minutes on two cores; gpu: a wider, deeper model and a longer run", choices=("cpu", "gpu"))
    seed: int = opt(0, "seed of the data, the model and the samples", low=0, fixed=True)
    device: str = opt("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = opt("auto", "of the matrix products in training; auto: bf16 where the hardware is fast at it",
                         choices=("auto", "fp32", "bf16"))
    compile: bool = opt(False, "torch.compile the training step: a slow start, then faster steps; needs a C++ compiler")
    resume: bool = opt(False, "go on from OUT/last.pt exactly where it stopped")
    check: bool = opt(False, "exit with code 1 when the metrics miss the band of the docstring")
    # tokens
    tokens: str = opt("patches", "patches, pixels, or a folder that another tokenizer exported (see above)", fixed=True)
    codebook: int = opt(512, "patches: number of codewords", low=2, high=65536, fixed=True)
    size: int = opt(16, "pixels: side of the scaled-down image", choices=(8, 16, 32), fixed=True)
    levels: int = opt(16, "pixels: number of grey levels", low=2, high=256, fixed=True)
    order: str = opt("raster", "raster: one token a call; diag: one anti-diagonal a call", choices=("raster", "diag"), fixed=True)
    # model
    dim: int = opt(128, "width", low=8, fixed=True)
    depth: int = opt(4, "number of blocks", low=1, fixed=True)
    heads: int = opt(4, "attention heads; width / heads must be a multiple of 4", low=1, fixed=True)
    # training
    steps: int = opt(500, "optimizer steps", low=1, fixed=True)
    batch: int = opt(64, "images per step", low=1, fixed=True)
    lr: float = opt(0.04, "learning rate of Muon, for the matrices inside the blocks", low=0, fixed=True)
    lr_adam: float = opt(0.02, "learning rate of AdamW, for embeddings and heads", low=0, fixed=True)
    label_dropout: float = opt(0.1, "share of labels hidden in training: guidance needs an unconditional model too",
                               low=0, high=1, fixed=True)
    eval_every: int = opt(100, "steps between validations and checkpoints", low=1, fixed=True)
    # sampling
    samples: int = opt(2000, "images drawn for the metrics", low=10)
    guidance: float = opt(1.25, "classifier-free guidance: 1 is the plain conditional model", low=0)
    temperature: float = opt(1.0, "divides the logits; 0 takes the most probable token", low=0)
    top_k: int = opt(0, "keep the k most probable tokens; 0 keeps all", low=0)
    top_p: float = opt(1.0, "keep the most probable tokens up to this mass", low=1e-6, high=1)


PARTS = {"train": "only train", "sample": "draw from the checkpoint", "eval": "only the metrics", "complete": "finish half images",
         "bench": "tokens per second"}
PRESETS = {"cpu": {}, "gpu": dict(codebook=1024, dim=384, depth=8, heads=6, steps=4000, batch=256, lr=0.02, lr_adam=0.005,
                                  eval_every=500, samples=10000)}
CHECK = {"class_accuracy": 0.95}  # what --check asks for


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
# tokens: image <-> sequence of integers
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tokens:
    """Token sequences in raster order, and the way back to pixels."""
    train: torch.Tensor      # (N, L) int64
    test: torch.Tensor       # (M, L) int64
    grid: tuple              # (rows, columns), L = rows * columns
    codebook_size: int
    decode: object           # int64 (B, L) -> uint8 (B, 32, 32)


def to_patches(images, side=4):
    """(N, 32, 32) -> (N, 64, 16): 4 x 4 patches in raster order, pixels of a patch in raster order."""
    n, height, width = images.shape
    return images.view(n, height // side, side, width // side, side).transpose(2, 3).reshape(n, -1, side * side)


def from_patches(patches, grid, side=4):
    """The inverse of `to_patches`: (N, rows * columns, side^2) -> (N, rows * side, columns * side)"""
    n, (rows, columns) = len(patches), grid
    return patches.view(n, rows, columns, side, side).transpose(2, 3).reshape(n, rows * side, columns * side)


def kmeans(points, k, generator, rounds=20):
    """Lloyd's algorithm: points (N, D) -> codebook (k, D) that locally minimises the mean squared distance.

    Starts from k distinct points, since most patches of a digit are the same black; started so, no codeword of an image
    codebook was seen to lose all its points (if one did, it would stay where it is).
    """
    distinct = points.unique(dim=0)
    codebook = distinct[torch.randperm(len(distinct), generator=generator)[:k]].clone()
    for _ in range(rounds):
        nearest = kernels.nearest_code(points, codebook)
        counts = torch.bincount(nearest, minlength=len(codebook))[:, None]
        means = torch.zeros_like(codebook).index_add_(0, nearest, points) / counts.clamp(min=1)
        codebook = torch.where(counts > 0, means, codebook)
    return codebook


def patch_tokens(data, codebook, device):
    """Images -> Tokens under a codebook of 4 x 4 patches, float (V, 16) in 0..255."""
    def encode(images):
        patches = to_patches(images).to(device).float().flatten(0, 1)
        return kernels.nearest_code(patches, codebook.to(device)).view(len(images), -1).cpu()

    decode = lambda tokens: from_patches(codebook.cpu()[tokens.cpu()].round().byte(), (8, 8))
    return Tokens(encode(data.train), encode(data.test), (8, 8), len(codebook), decode)


def pixel_tokens(data, size, levels):
    """Images scaled down to size x size, grey levels as tokens: lossless from there on, so bits per dimension are exact."""
    def encode(images):
        small = F.avg_pool2d(images[:, None].float(), 32 // size).flatten(1)
        return (small / 255 * (levels - 1)).round().long()

    def decode(tokens):
        small = (tokens.cpu().float() / (levels - 1) * 255).round().byte().view(-1, size, size)
        return small.repeat_interleave(32 // size, 1).repeat_interleave(32 // size, 2)

    return Tokens(encode(data.train), encode(data.test), (size, size), levels, decode)


def read_token_folder(folder):
    """A folder in the format of the docstring -> Images (the originals), Tokens"""
    path = pathlib.Path(folder) / "tokens.npz"
    if not path.exists():
        raise UserError(f"--tokens {folder}: expected patches, pixels, or a folder that holds tokens.npz and decoder.pt2")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("train_tokens", "test_tokens", "train_labels", "test_labels")
            train, test, train_labels, test_labels = (torch.from_numpy(file[name].astype(np.int64)) for name in names)
            train_images, test_images = torch.from_numpy(file["train_images"]), torch.from_numpy(file["test_images"])
            grid, size = tuple(int(g) for g in file["grid"]), int(file["codebook_size"])
        decoder = torch.export.load(path.with_name("decoder.pt2")).module()
    except Exception as error:  # numpy and torch report broken files by many types
        raise UserError(f"{folder} is no complete token folder ({error}): export it again") from None
    shapes_fit = train.shape[1:] == test.shape[1:] == (math.prod(grid),)
    if not shapes_fit or not 0 <= min(train.min(), test.min()) <= max(train.max(), test.max()) < size:
        raise UserError(f"{path}: tokens {tuple(train.shape)}, {tuple(test.shape)} do not fit the grid {grid} of {size} codes")

    @torch.no_grad()
    def decode(tokens):
        return torch.cat([(decoder(t).clamp(0, 1) * 255).round().byte() for t in tokens.cpu().split(256)])

    images = Images(path.parent.name, train_images, train_labels, test_images, test_labels)
    return images, Tokens(train, test, grid, size, decode)


def load_tokens(config, device, codebook=None):
    """-> Images, Tokens, codebook (of the patches; None otherwise). A codebook from a checkpoint is taken as it is."""
    if config.tokens not in ("patches", "pixels"):
        return *read_token_folder(config.tokens), None
    data = load_images(config.data, config.seed)
    if config.tokens == "pixels":
        return data, pixel_tokens(data, config.size, config.levels), None
    if codebook is None:
        g = torch.Generator().manual_seed(config.seed)
        patches = to_patches(data.train).flatten(0, 1)
        some = patches[torch.randperm(len(patches), generator=g)[:100_000]].float()  # enough for 512 means
        codebook = kmeans(some.to(device), config.codebook, g).cpu()
    return data, patch_tokens(data, codebook, device), codebook


# ---------------------------------------------------------------------------------------------------------------------
# model
#   B batch   L tokens of an image   V codebook size   C width   H heads   D = C / H
#   slot 0 holds the class, slot s > 0 the token number s - 1 of the order; L slots go in, logits for L tokens come out
# ---------------------------------------------------------------------------------------------------------------------


def rope_rotations(places, head_dim, base=100.0):
    """2-D rotary positions (Su et al. 2021; per axis as in LlamaGen): places (N, 2) of (row, column) -> complex (N, D/2).

    The first half of the D/2 pairs turns with the row, the second with the column, at speeds 1 .. 1/base per cell (a base of 100
    suits grids of up to 32 cells; text uses 10,000). Scores then depend on differences of places only:

    >>> r = rope_rotations(torch.tensor([[0, 0], [2, 3], [5, 7], [7, 10]]), 8)
    >>> torch.allclose(r[1] * r[0].conj(), r[3] * r[2].conj(), atol=1e-6)   # both (2, 3) apart
    True
    """
    quarter = head_dim // 4
    speed = base ** (-torch.arange(quarter) / quarter)
    angle = torch.cat([places[:, :1] * speed, places[:, 1:] * speed], 1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, rotations):
    """Pairs (x0, x1), (x2, x3), ... read as complex numbers and turned, in fp32: x (..., D), rotations (..., D/2)"""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2)


def norm(x):
    return F.layer_norm(x, x.shape[-1:])  # no gain, no bias; rms_norm would do, but its backward is not fused on the CPU


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Both output layers start at zero: a new block is the identity."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, rotations, mask=None, cache=None, start=0):
        """x (B, N, C); cache: None, or keys and values (2, B, H, S, D) to extend at slots start .. start + N"""
        qk, v = self.qkv(norm(x)).unflatten(-1, (3 * self.heads, -1)).split([2 * self.heads, self.heads], 2)  # (B, N, heads, D)
        qk = rotate(norm(qk), rotations[:, None]).to(v.dtype)  # q/k norm: scores stay bounded, so bf16 and large steps are safe
        q, k, v = *qk.transpose(1, 2).chunk(2, 1), v.transpose(1, 2)
        if cache is None:
            y = kernels.attention(q, k, v, mask)
        else:  # no mask: the new slots see all older ones and each other
            end = start + x.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
            y = kernels.decode_attention(q, cache[0], cache[1], end, causal=False)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    """p(token | tokens before it in the order, class). One head per neighbour that predicts: raster 1, diag 2."""

    def __init__(self, codebook_size, classes, order, dim, depth, heads):
        super().__init__()
        length = len(order.cells)
        self.order, self.null = order, classes  # the class "none", for guidance
        self.token = nn.Embedding(codebook_size, dim)
        self.label = nn.Embedding(classes + 1, dim)
        self.place = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Linear(dim, codebook_size, bias=False) for _ in order.sources)
        for head in self.heads:
            nn.init.zeros_(head.weight)  # the first loss is exactly log V
        places = torch.cat([torch.zeros(1, 2), order.places + 1])[:length]  # the class at (0, 0), cells from (1, 1)
        self.register_buffer("rotations", rope_rotations(places, dim // heads), persistent=False)

    def embed(self, tokens, labels, start, end):
        """Slots start .. end of the input: tokens (B, L) in the model's order, labels (B,) -> (B, end - start, C)"""
        x = self.token(tokens[:, max(start - 1, 0):end - 1])
        if start == 0:
            x = torch.cat([self.label(labels)[:, None], x], 1)
        return x + self.place[start:end]

    def logits(self, hidden, first, start, end):
        """hidden (B, n, C) of the slots from `first` on -> logits (B, end - start, V) of the tokens start .. end."""
        if len(self.heads) == 1:  # raster: token t is predicted by slot t
            return self.heads[0](hidden)
        return sum(head(hidden)[:, (slots[start:end] - first).clamp(min=0)] * weight[start:end, None].to(hidden.device)
                   for head, slots, weight in zip(self.heads, self.order.sources, self.order.weights))

    def forward(self, tokens, labels):
        """Teacher forcing: tokens (B, L) in the model's order, labels (B,) -> logits (B, L, V), each given the tokens before."""
        x = self.embed(tokens, labels, 0, tokens.shape[1])
        for block in self.blocks:
            x = block(x, self.rotations, self.order.mask)
        return self.logits(norm(x), 0, 0, tokens.shape[1])

    def new_cache(self, batch):
        """Zeros (depth, 2, B, H, L, D): keys and values of every slot."""
        head_dim = 2 * self.rotations.shape[1]
        return self.place.new_zeros(len(self.blocks), 2, batch, self.blocks[0].heads, len(self.place), head_dim)

    def step(self, tokens, labels, group, cache):
        """Logits (B, n, V) of the n tokens of one group, from the group before it and the cache, which grows by that group."""
        first, start, end = self.order.steps[group]
        x = self.embed(tokens, labels, first, start + 1)
        for block, layer in zip(self.blocks, cache):
            x = block(x, self.rotations[first:start + 1], cache=layer, start=first)
        return self.logits(norm(x), first, start, end)


# ---------------------------------------------------------------------------------------------------------------------
# the idea: an order, a rule for the next token
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Order:
    """A factorisation: p(image) = product over groups of p(group | groups before). Slot 0 is the class, slot t + 1 is token t."""
    cells: torch.Tensor      # (L,) raster index of the cell that each token belongs to
    places: torch.Tensor     # (L, 2) its row and column
    groups: list             # sizes of the groups of tokens that are drawn together
    sources: list            # per head: (L,) the slot whose hidden state predicts each token
    weights: list            # per head: (L,) its share of the logits, 0 where the token has no such neighbour
    mask: object             # of kernels.attention, over the first L slots

    @property
    def steps(self):
        """Per group: (first slot fed, first token drawn, end); the slots fed are those of the group before."""
        ends = np.cumsum(self.groups).tolist()
        starts = [0] + ends[:-1]
        feeds = [0] + [s + 1 for s in starts[:-1]]
        return list(zip(feeds, starts, ends))


def make_order(rows, columns, kind):
    """`raster`: left to right, top to bottom, one token a group. `diag`: anti-diagonals (NAR, He et al. 2025, section 3).

    On the 2 x 3 grid 0 1 2 / 3 4 5:

    >>> order = make_order(2, 3, "diag")
    >>> order.cells.tolist(), order.groups
    ([0, 1, 3, 2, 4, 5], [1, 2, 2, 1])
    """
    raster = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    length = rows * columns
    if kind == "raster":
        before = torch.arange(length)  # slot t holds token t - 1, or the class
        return Order(torch.arange(length), raster, [1] * length, [before], [torch.ones(length)], kernels.causal(length))
    distance = raster.sum(1)
    cells = distance.argsort(stable=True)
    groups = distance.bincount().tolist()
    slot = torch.empty(rows, columns, dtype=torch.long)
    slot.view(-1)[cells] = torch.arange(length) + 1
    row, column = raster[cells].unbind(1)
    left = torch.where(column > 0, slot[row, (column - 1).clamp(min=0)], 0)  # predicts this cell by its "right" head
    above = torch.where(row > 0, slot[(row - 1).clamp(min=0), column], 0)    # predicts this cell by its "below" head
    has_left, has_above = (column > 0).float(), (row > 0).float()
    has_left[0] = 1.0                                                        # the first cell: the class, by the "right" head
    both = has_left + has_above
    # the last group is one token that predicts nothing and is never fed; the class is a group of its own
    mask = kernels.scales([1] + groups[:-1])
    return Order(cells, raster[cells], groups, [left, above], [has_left / both, has_above / both], mask)


def guide(conditional, unconditional, scale):
    """Classifier-free guidance on logits (Ho & Salimans 2022, eq. 6 with w = scale - 1); scale 1 is the conditional model.

    >>> guide(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]), 3.0).tolist()
    [4.0, -2.0]
    """
    return unconditional + scale * (conditional - unconditional)


# ---------------------------------------------------------------------------------------------------------------------
# sampling
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, labels, generator, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, given=None, cached=True):
    """Draw one image per label -> tokens (B, L) in raster order. One model call per group of the order.

    given: (B, L) raster tokens to keep, -1 where free; kept tokens condition all that come later in the order.
    With guidance other than 1 each call runs twice the batch: once with the labels, once with the class "none".
    cached=False recomputes everything in every call: the slow twin that must give the same logits.
    """
    order, batch, device = model.order, len(labels), labels.device
    tokens = torch.zeros(batch, len(order.cells), dtype=torch.long, device=device)
    kept = None if given is None else given[:, order.cells].to(device)
    twice = guidance != 1
    both = torch.cat([labels, torch.full_like(labels, model.null)]) if twice else labels
    cache = model.new_cache(len(both)) if cached else None
    for group, (_, start, end) in enumerate(order.steps):
        fed = tokens.repeat(2, 1) if twice else tokens
        logits = model.step(fed, both, group, cache) if cached else model(fed, both)[:, start:end]
        if twice:
            logits = guide(*logits.chunk(2), guidance)
        tokens[:, start:end] = kernels.sample(logits, temperature, top_k, top_p, generator)
        if kept is not None:
            tokens[:, start:end] = torch.where(kept[:, start:end] >= 0, kept[:, start:end], tokens[:, start:end])
    return torch.empty_like(tokens).index_copy_(1, order.cells.to(device), tokens)


def draw(config, model, tokens, labels, given=None, chunk=250):
    """`generate` with the settings and the seed of the config, in chunks, through the tokens' decoder -> uint8 (N, 32, 32)"""
    device, bar, parts = model.place.device, Progress(len(labels), "sampling"), []
    generator = torch.Generator(device).manual_seed(config.seed)
    for i in range(0, len(labels), chunk):
        part = labels[i:i + chunk].to(device)
        parts.append(generate(model, part, generator, config.guidance, config.temperature, config.top_k, config.top_p,
                              given if given is None else given[i:i + chunk]))
        bar.update(len(part))
    return tokens.decode(torch.cat(parts))


# ---------------------------------------------------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nats_per_image(model, tokens, labels):
    """-log p(tokens | label) in nats, averaged over all images: tokens (N, L) in raster order."""
    device = model.place.device
    total = 0.0
    for part, label in zip(tokens.split(250), labels.split(250)):
        part = part[:, model.order.cells].to(device)
        logits = model(part, label.to(device))
        total += F.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="sum").item()
    return total / len(tokens)


class Unigram(nn.Module):
    """The baseline: every cell draws its token from the training frequencies of that cell, whatever the others are."""

    def __init__(self, train_tokens, codebook_size, order):
        super().__init__()
        self.order, self.place = order, torch.empty(0)
        columns = train_tokens[:, order.cells].T
        counts = torch.stack([torch.bincount(column, minlength=codebook_size) for column in columns]) + 0.5
        self.log_p = torch.log(counts / counts.sum(-1, keepdim=True))

    def forward(self, tokens, labels):
        return self.log_p.expand(len(tokens), -1, -1)


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


def evaluate(config, model, data, tokens):
    """All metrics of the README, and the samples they were measured on -> metrics, images uint8 (N, 32, 32), labels (N,)."""
    device, length = model.place.device, len(model.place)
    nats = nats_per_image(model, tokens.test, data.test_labels)
    unigram = nats_per_image(Unigram(tokens.train, tokens.codebook_size, model.order), tokens.test, data.test_labels)
    metrics = {"val_nats_per_image": nats, "unigram_nats_per_image": unigram, "bits_per_image": nats / math.log(2),
               "bits_per_token": nats / math.log(2) / length}

    labels = torch.arange(config.samples) % data.classes
    images = draw(config, model, tokens, labels)
    judge = train_judge(data.train, data.train_labels, data.classes, device, config.seed)
    real, real_labels = data.test[:config.samples], data.test_labels[:config.samples]
    metrics |= image_metrics(judge, images, labels, real, real_labels)
    # floor and ceiling through the same function: as many training images as samples, untouched and through the tokenizer
    some = slice(0, config.samples)
    metrics["gfd_floor"] = image_metrics(judge, data.train[some], data.train_labels[some], real, real_labels)["gfd"]
    rebuilt = tokens.decode(tokens.train[some])
    metrics["rfd"] = image_metrics(judge, rebuilt, data.train_labels[some], real, real_labels)["gfd"]
    metrics["judge_accuracy"] = float((judged(judge, real)[1] == real_labels).double().mean())
    error = (tokens.decode(tokens.test).float() - data.test.float()).square().mean() / 255**2
    metrics["rpsnr"] = float(-10 * torch.log10(error))

    one = lambda n: generate(model, labels[:1].repeat(n).to(device), None, config.guidance)
    metrics |= {"samples": config.samples, "calls_per_image": len(model.order.groups), "tokens_per_image": length,
                "ms_per_image_b1": milliseconds(lambda: one(1)), "ms_per_image_b64": milliseconds(lambda: one(64)) / 64}
    return metrics, images, labels


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


def make_optimizers(model, config, dtype):
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [Muon(matrices, lr=config.lr, dtype=dtype),
            torch.optim.AdamW(rest, lr=config.lr_adam, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def batch_indices(step, batch, n, seed):
    """Which of n images step number `step` takes. A pure function: the position in the data is the step, nothing else to save."""
    places = torch.arange(step * batch, (step + 1) * batch)
    generator = lambda epoch: torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    first, last = step * batch // n, int(places[-1]) // n
    orders = torch.cat([torch.randperm(n, generator=generator(epoch)) for epoch in range(first, last + 1)])
    return orders[places - first * n]


class Run:
    """What must survive a restart: model, optimizers, random numbers, history, and the step, which is the position in the data."""

    def __init__(self, config, model, dtype, codebook=None):
        self.config, self.model, self.codebook = config, model, codebook
        self.optimizers = make_optimizers(model, config, dtype)
        self.rng = torch.Generator().manual_seed(config.seed)  # which labels are hidden
        self.step, self.best, self.seconds, self.history = 0, math.inf, 0.0, []

    def save(self, path):
        save_checkpoint(path, {
            "config": dataclasses.asdict(self.config), "model": self.model.state_dict(), "codebook": self.codebook,
            "optimizers": [o.state_dict() for o in self.optimizers], "label_rng": self.rng.get_state(), "rng": rng_state(),
            "step": self.step, "best": self.best, "seconds": self.seconds, "history": self.history})

    def load(self, state):
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.rng.set_state(state["label_rng"])
        set_rng_state(state["rng"])
        self.step, self.best, self.seconds, self.history = (state[k] for k in ("step", "best", "seconds", "history"))


def train_step(run, x, labels, forward, dtype):
    """One optimizer step on tokens x (B, L), in the model's order -> loss in nats per token"""
    config, device = run.config, x.device
    hide = torch.rand(len(labels), generator=run.rng) < config.label_dropout
    labels = torch.where(hide, run.model.null, labels).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = forward(x, labels)
    loss = F.cross_entropy(logits.float().flatten(0, 1), x.flatten())
    if not math.isfinite(loss.item()):
        raise UserError(f"the loss is {loss.item()} at step {run.step}: lower --lr or --lr-adam; the last checkpoint in "
                        f"{config.out} is still good")
    loss.backward()
    for optimizer, lr in zip(run.optimizers, (config.lr, config.lr_adam)):
        optimizer.param_groups[0]["lr"] = lr * (1 - run.step / config.steps)  # linear decay to zero, no warm-up
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return loss.item()


def train(run, data, tokens, dtype, out):
    """Fit run.model; keep OUT/last.pt (the newest state) and OUT/best.pt (the lowest test loss); fill run.history."""
    config, model, device = run.config, run.model, run.model.place.device
    x, length = tokens.train[:, model.order.cells], len(model.place)
    forward = torch.compile(model) if config.compile else model
    bar, began, losses = Progress(config.steps, "train", start=run.step), time.time() - run.seconds, []
    with Interrupt() as stop:
        while run.step < config.steps:
            chosen = batch_indices(run.step, config.batch, len(x), config.seed)
            losses.append(length * train_step(run, x[chosen].to(device), data.train_labels[chosen], forward, dtype))
            bar.update(nats_per_image=losses[-1])
            report = run.step % config.eval_every == 0 or run.step == config.steps
            if report:
                val = nats_per_image(model, tokens.test, data.test_labels)
                run.history.append({"step": run.step, "train": statistics.fmean(losses[-config.eval_every:]), "val": val})
            if report or stop.asked:
                run.seconds = time.time() - began
                if report and val < run.best:
                    run.best = val
                    run.save(out / "best.pt")
                run.save(out / "last.pt")
            if stop.asked:
                raise KeyboardInterrupt(f"Step {run.step} is saved: the same command with --resume goes on from there")


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


def draw_history(history, unigram, out):
    figure, axes = new_figure(6, 3.5)
    axis, steps = axes[0, 0], [h["step"] for h in history]
    axis.plot(steps, [h["train"] for h in history], ".-", label="train")
    axis.plot(steps, [h["val"] for h in history], ".-", label="test")
    axis.axhline(unigram, color="gray", ls=":", label="unigram baseline")
    axis.set(xlabel="step", ylabel="nats per image", title="negative log-likelihood of the tokens")
    axis.legend()
    save_figure(figure, out / "loss.png")


def complete(config, model, data, tokens, out, count=10, draws=4):
    """completions.png: the upper halves of test images, `draws` completions of each, and the originals."""
    picked = torch.stack([(data.test_labels == c).nonzero()[0, 0] for c in data.test_labels.unique()[:count]])
    given = tokens.test[picked].clone()
    given[:, given.shape[1] // 2:] = -1
    drawn = draw(config, model, tokens, data.test_labels[picked].repeat(draws), given.repeat(draws, 1))
    half = data.test[picked].clone()
    half[:, 16:] = 64
    figure, axes = new_figure(6, 3.8)
    show_images(axes[0, 0], torch.cat([half, drawn, data.test[picked]]), len(picked),
               f"first row: what is given; {draws} rows: completions; last row: the original")
    save_figure(figure, out / "completions.png")


def print_summary(metrics):
    m = SimpleNamespace(**metrics)
    print(f"""
likelihood  {m.val_nats_per_image:.1f} nats per image ({m.bits_per_image:.0f} bits); unigram baseline {m.unigram_nats_per_image:.1f}
quality     gFD {m.gfd:.2f}; floor (real training images) {m.gfd_floor:.2f}; ceiling (the tokenizer alone) {m.rfd:.2f}
            {m.class_accuracy:.1%} read as the class asked for (real: {m.judge_accuracy:.1%}); diversity {m.diversity:.2f} of real
speed       {m.calls_per_image} calls per image; {m.ms_per_image_b1:.0f} ms per image alone, {m.ms_per_image_b64:.1f} ms in a batch of 64
total       {m.seconds:.0f} s, peak memory {m.peak_memory_mb:.0f} MB""")


def check(config, metrics):
    """--check: exit with code 1 when a metric misses its band."""
    missed = [f"{name} {metrics[name]:.3f} < {least}" for name, least in CHECK.items() if metrics[name] < least]
    if config.check and missed:
        raise SystemExit(f"nano_ar: check failed: {'; '.join(missed)}")


# ---------------------------------------------------------------------------------------------------------------------
# bench
# ---------------------------------------------------------------------------------------------------------------------


def bench(config, device, dtype):
    """Speed of training and of sampling, with random weights: tokens per second and seconds, medians."""
    sizes = {"patches": (8, 8, config.codebook), "pixels": (config.size, config.size, config.levels)}
    if config.tokens not in sizes:
        raise UserError("bench takes --tokens patches or pixels")
    rows, columns, vocabulary = sizes[config.tokens]
    model = GPT(vocabulary, 10, make_order(rows, columns, config.order), config.dim, config.depth, config.heads).to(device)
    run, forward = Run(config, model, dtype), torch.compile(model) if config.compile else model
    x = torch.randint(vocabulary, (config.batch, rows * columns), device=device)
    labels = torch.zeros(config.batch, dtype=torch.long)
    speed = x.numel() / milliseconds(lambda: train_step(run, x, labels, forward, dtype), 20) * 1000
    print(f"training on {config.batch} x {rows * columns} tokens, optimizer included: {speed:,.0f} tokens/s")
    draw = lambda cached: generate(model, labels[:1].repeat(64).to(device), None, guidance=1.5, cached=cached)
    with_cache, without = milliseconds(lambda: draw(True), 5) / 1000, milliseconds(lambda: draw(False), 1) / 1000
    ratio = without / with_cache
    print(f"sampling 64 images with guidance: {with_cache:.2f} s; without the cache {without:.2f} s, {ratio:.1f} times as long")
    return {"tokens_per_second": speed, "seconds_64": with_cache, "seconds_64_uncached": without, "cache_speedup": ratio}


# ---------------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Run the script as from the command line; -> the dict of metrics that it also writes to OUT/metrics.json."""
    began = time.time()
    part, config = parse_config(Config, argv, PARTS, PRESETS, __doc__)
    device, dtype, reason = pick_device(config.device, config.precision)
    if config.dim % config.heads or config.dim // config.heads % 4:
        raise UserError(f"--dim {config.dim} --heads {config.heads}: the width must be a multiple of 4 times the number of heads")
    print(f"nano_ar: {reason}; attention: {kernels.path(torch.empty(0, device=device)).name}", flush=True)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    if part == "bench":
        return bench(config, device, dtype)
    out, saved = make_folder(config.out), None
    if config.resume or part not in ("all", "train"):
        saved = load_checkpoint(out / ("last.pt" if config.resume else "best.pt"))
        config = adopt(config, saved["config"], config.out, PRESETS[config.preset])
    data, tokens, codebook = load_tokens(config, device, saved and saved["codebook"])
    order = make_order(*tokens.grid, config.order)
    model = GPT(tokens.codebook_size, data.classes, order, config.dim, config.depth, config.heads).to(device)
    params = sum(p.numel() for p in model.parameters())
    print(f"data {data.name}: {len(data.train)} train, {len(data.test)} test; tokens: {tokens.grid[0]} x {tokens.grid[1]} of "
          f"{tokens.codebook_size}; model: {params / 1e6:.2f} M parameters", flush=True)
    metrics = {"device": reason, "params": params, "seed": config.seed}

    if part in ("all", "train"):
        run = Run(config, model, dtype, codebook)
        if config.resume:
            run.load(saved)
        train(run, data, tokens, dtype, out)
        metrics["tokens_per_second"] = run.step * config.batch * len(model.place) / max(run.seconds, 1e-9)
        saved = load_checkpoint(out / "best.pt")
    model.load_state_dict(saved["model"])
    model.eval()
    if part in ("all", "eval"):
        measured, images, labels = evaluate(config, model, data, tokens)
        metrics |= measured
    if part == "sample":
        labels = torch.arange(min(config.samples, 8 * data.classes)) % data.classes
        images = draw(config, model, tokens, labels)
    if part in ("all", "eval", "sample"):
        np.savez_compressed(out / "samples.npz", images=images.numpy(), labels=labels.numpy())
        draw_samples(images, labels, data, out)
    if part in ("all", "complete"):
        complete(config, model, data, tokens, out)
    metrics |= {"seconds": time.time() - began, "peak_memory_mb": peak_memory_mb(device)}
    if part in ("all", "eval"):
        draw_history(saved["history"], metrics["unigram_nats_per_image"], out)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        print_summary(metrics)
        check(config, metrics)
    return metrics


if __name__ == "__main__":
    sys.exit(cli(main))
