"""nano_tok: turn text and images into short sequences of integers, the tokens that every other script here models.

Text     bytes --merge the most frequent pair, again and again--> vocabulary of 256 + merges        (byte pair encoding)

Images   32x32 image      latent z           nearest code         code vectors       image again
         +--------+ conv  +-----------+      +-----------+        +-----------+ conv +--------+
         |   /|   | ----> | 8x8 cells | ---> | 7 0 12 .. | -----> | 8x8 cells | ---> |   /|   |
         |   _|_  | enc.  | C numbers |      | integers  | lookup | C numbers | dec. |   _|_  |
         +--------+       +-----------+      +-----------+        +-----------+      +--------+
         loss = |image - rebuilt|^2 / variance  +  0.25 |z - stop_gradient(code)|^2
         The nearest code has no gradient: z gets the decoder's gradient at the code as it is ("straight through").

--quantizer vq    one codebook; a code is the mean of the vectors that choose it
                  (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1)
            rvq   --depth codebooks, each codes what the ones before left over
                  (SoundStream, Zeghidour et al. 2021, arXiv:2107.03312)
            fsq   no codebook: every channel rounded to a few levels (Mentzer et al. 2023, arXiv:2309.15505)
            lfq   no codebook: the signs of log2(V) channels are the index (MAGVIT-v2, Yu et al. 2023, arXiv:2310.05737)
--layout    grid  64 tokens, one per 4x4 cell
            1d    --tokens K for the whole image: learned queries read the cells, then "mask tokens" read the codes
                  (TiTok, Yu et al. 2024, arXiv:2406.07550); ordered by cutting off the tail in training (One-D-Piece,
                  Miwa et al. 2025, arXiv:2501.10064), so that every prefix decodes; --no-nested: all K or nothing
--mixer dense     two dense layers in place of the queries: better pictures, sooner, but every token is about the whole
                  picture, and a generator learns such tokens badly (queries settle on places: see codes.png)
--perturb   a decoder that has seen wrong tokens forgives a generator's mistakes (Robust Latent Matters, Qiu et al.
            2025, arXiv:2503.08354)
--learned-codebook   the textbook codebook, trained by gradient from a small random start: watch it collapse

Commands                                              two CPU cores        expect
    python nano_tok.py                                1 minute, 0.7 GB     28.5 dB, every code in use, rFD 3.3 (floor 3.4)
    python nano_tok.py --quantizer rvq                < 1.5 minutes        3 dB above vq for twice the tokens (MNIST)
    python nano_tok.py --layout 1d                    < 5 minutes          22.0 dB with 16 tokens, 17.1 with the first 4 (MNIST)
    python nano_tok.py --layout 1d --mixer dense      < 2.3 minutes        23.4 dB with 16 tokens, 17.3 with the first 4 (MNIST)
                       --layout 1d --mixer dense --no-nested                   24.4 dB, 3 below vq for a quarter of the tokens
    python nano_tok.py --learned-codebook             < 1.6 minutes        21 % of the codes in use, and what to do (MNIST)
    python nano_tok.py bpe --data FILE --vocab 1024   seconds              bytes per token, tokens per word, unused entries
    python nano_tok.py encode --input digit.png       a second             digit.tokens.json
    python nano_tok.py decode --input out/tok/vq/digit.tokens.json         digit.png, rebuilt
    python nano_ar.py --tokens out/tok/vq             2 minutes            a generator trained on these tokens
--check fails when the glyphs, under the default settings, come back with less than 27.5 dB or 99 % of the codes in use.

A run leaves in out/tok/vq (vq-1d, vq-4, ...: after its flags) checkpoints, pictures, metrics.json, and `tokens.npz` with
`decoder.pt2`: the token folder whose format nano_ar.py documents. Runs in folders beside it on the same data join its
rate-distortion picture.

Left out on purpose: adversarial and perceptual losses (they need a pretrained network, and invented texture hides the
quantizer's own error), two-stage recipes, the rotation trick, annealing of --perturb, a length fitted to each image, a
codebook of its own for each 1-D token (half a dB more for 16 times the codes).

Read in this order: `train_bpe`, `straight_through` and its neighbours, `VectorQuantizer`, `Tokenizer`, `train`.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import gzip
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
import zipfile
import zlib

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
    data: str = opt("", "images: glyphs, mnist, fashion-mnist, or a path (IDX file, .npz, folder of class folders); "
                    "bpe: pydoc, shakespeare, or a UTF-8 file; default glyphs and pydoc", fixed=True)
    out: str = opt("", "folder of the run; default out/tok/vq, vq-1d, vq-4, ... after the tokenizer")
    preset: str = opt("cpu", "cpu: a minute on two cores; gpu: a wider model, a longer run", choices=("cpu", "gpu"))
    seed: int = opt(0, "seed of the data, the model and the training", low=0, fixed=True)
    device: str = opt("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = opt("auto", "of the matrix products in training; auto: bf16 where the hardware is fast at it",
                         choices=("auto", "fp32", "bf16"))
    compile: bool = opt(False, "torch.compile the training step: a slow start, then faster steps; needs a C++ compiler")
    resume: bool = opt(False, "go on from OUT/last.pt exactly where it stopped")
    check: bool = opt(False, "exit with code 1 when the metrics miss the band of the docstring")
    # tokens of an image
    quantizer: str = opt("vq", "how vectors become integers", choices=("vq", "rvq", "fsq", "lfq"), fixed=True)
    layout: str = opt("grid", "grid: a token per 4x4 cell; 1d: ordered, for the whole image", choices=("grid", "1d"), fixed=True)
    codebook: int = opt(256, "codes in a codebook; lfq: a power of two; fsq: see --levels", low=2, high=16384, fixed=True)
    code_dim: int = opt(0, "vq, rvq: numbers in a code vector; 0: 8 on the grid, 4 for 1d", low=0, fixed=True)
    depth: int = opt(2, "rvq: codebooks, that is, tokens per cell", low=1, high=16, fixed=True)
    levels: str = opt("8,6,5", "fsq: levels of each channel; their product is the number of codes", fixed=True)
    tokens: int = opt(16, "1d: tokens per image", low=1, high=256, fixed=True)
    mixer: str = opt("queries", "1d: from cells to tokens and back. queries: attention, as in TiTok; dense: two dense layers",
                     choices=("queries", "dense"), fixed=True)
    nested: bool = opt(True, "1d: cut off the tail of some images' tokens in training, so that every prefix decodes", fixed=True)
    learned_codebook: bool = opt(False, "vq, rvq: codes trained by gradient: they collapse", fixed=True)
    cosine: bool = opt(False, "vq: vectors and codes of length 1, so that only the direction is coded", fixed=True)
    perturb: float = opt(0.0, "share of training images with disturbed tokens", low=0, high=1, fixed=True)
    # model and training
    width: int = opt(64, "channels of the convolutions", low=8, fixed=True)
    blocks: int = opt(1, "residual blocks in the encoder and in the decoder", low=1, fixed=True)
    steps: int = opt(1000, "optimizer steps", low=1, fixed=True)
    batch: int = opt(128, "images per step", low=1, fixed=True)
    lr: float = opt(0.02, "learning rate of Muon, for the kernels and matrices inside the blocks", low=0, fixed=True)
    lr_adam: float = opt(0.01, "learning rate of AdamW, for all else", low=0, fixed=True)
    commitment: float = opt(0.25, "weight of the loss that pulls vectors to their codes", low=0, fixed=True)
    eval_every: int = opt(200, "steps between validations and checkpoints", low=1, fixed=True)
    samples: int = opt(2000, "images for the Frechet distance", low=10)
    input: str = opt("", "encode: an image file; decode: a .tokens.json that encode wrote")
    # text
    vocab: int = opt(1024, "bpe: entries of the vocabulary, 256 bytes included", low=256, high=1 << 17)
    split: str = opt("words", "bpe: words: merges stay inside a word; none: they cross spaces", choices=("words", "none"))
    bytes: bool = opt(False, "bpe: take the file as raw bytes, not as UTF-8 text")


PARTS = {"train": "only train", "eval": "report, pictures and token folder of a trained model",
         "encode": "an image file to tokens", "decode": "tokens to an image file", "bpe": "byte pair encoding of text"}
PRESETS = {"cpu": {}, "gpu": dict(width=256, blocks=4, steps=10000, batch=256, lr=0.01, lr_adam=0.002, eval_every=1000, samples=10000)}
BAND = {"glyphs": dict(usage=0.99, rpsnr=27.5)}  # what --check asks for, with the default settings


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
# data: images
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
# text: byte pair encoding
#   a token is an integer; 0..255 are the bytes, 256 + i is merge number i, special tokens come last
# ---------------------------------------------------------------------------------------------------------------------

# A chunk is a run of letters, of digits or of other signs, with the one space before it, or white space. Merges stay inside
# a chunk. On bytes, so that any file goes through; those from 128 on (all non-ASCII UTF-8) count as letters.
WORDS = rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+"
SPLIT = {"words": WORDS, "none": rb"(?s:.+)"}
SHAKESPEARE = ("tinyshakespeare.txt",
               "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def train_bpe(text, vocab, split="words"):
    """bytes -> list of merges (left, right); merge i makes token 256 + i of the most frequent pair.

    Among equally frequent pairs the smallest wins. Each different chunk is stored once, with its number of occurrences.
    Pairs are counted once; a merge then touches only the places where its pair stands, and changes only the counts of the
    pairs beside them (Sennrich et al. 2016, arXiv:1508.07909, fast version). Stops early when no pair occurs twice.

    >>> train_bpe(b"aaabdaaabac", 259, "none")      # aa -> 256, ab -> 257, 256 257 -> 258, as in the Wikipedia article
    [(97, 97), (97, 98), (256, 257)]
    """
    ids, weight = [-1], [0]  # all chunks in one list, -1 between them
    for chunk, times in collections.Counter(re.findall(SPLIT[split], text)).items():
        ids += [*chunk, -1]
        weight += [times] * (len(chunk) + 1)
    before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))  # linked list: a merge unlinks a place
    counts, places = collections.Counter(), collections.defaultdict(list)
    for i, pair in enumerate(zip(ids, ids[1:])):
        if pair[0] >= 0 and pair[1] >= 0:
            counts[pair] += weight[i]
            places[pair].append(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < vocab - 256:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:  # out of date: once its pair is made a count only falls, so looking on top is enough
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -n < 2:
            break
        new, (left, right), made = 256 + len(merges), pair, set()
        merges.append(pair)
        for i in sorted(places.pop(pair)):  # from left to right: of "aaa" the first two
            j = after[i]
            if ids[i] != left or ids[j] != right:
                continue  # the place has been merged into something else since
            for pair_was, pair_is, at in (((ids[before[i]], left), (ids[before[i]], new), before[i]),
                                          ((right, ids[after[j]]), (new, ids[after[j]]), i)):
                if pair_was[0] >= 0 and pair_was[1] >= 0:
                    counts[pair_was] -= weight[i]
                    counts[pair_is] += weight[i]
                    places[pair_is].append(at)
                    made.add(pair_is)
            ids[i], ids[j], after[i], before[after[j]] = new, -2, after[j], i
        counts[pair] = 0
        for p in made:
            heapq.heappush(heap, (-counts[p], p))
    return merges


def apply_merges(ids, merges):
    """int32 array of tokens, -1 between chunks -> the same after all merges, in order, each in one pass over the array.

    >>> apply_merges(np.frombuffer(b"aaaab", np.uint8).astype(np.int32), [(97, 97), (256, 98)]).tolist()
    [256, 257]
    """
    present = np.bincount(ids[ids >= 0], minlength=256 + len(merges)).tolist()
    for new, (left, right) in enumerate(merges, 256):
        if not (present[left] and present[right]):
            continue
        at = np.flatnonzero((ids[:-1] == left) & (ids[1:] == right))
        if left == right and len(at) > 1:  # "aaaa" matches at 0, 1, 2: of a run of neighbours take every other
            first = np.flatnonzero(np.diff(at, prepend=-2) > 1)
            at = at[(np.arange(len(at)) - np.repeat(first, np.diff(first, append=len(at)))) % 2 == 0]
        if len(at):
            ids[at] = new
            keep = np.ones(len(ids), bool)
            keep[at + 1] = False
            ids = ids[keep]
            present[left], present[right], present[new] = present[left] - len(at), present[right] - len(at), len(at)
    return ids


class BPE:
    """Text <-> tokens under a list of merges. Special tokens have ids after the merges and never arise from plain text."""

    def __init__(self, merges, split="words", special=()):
        self.merges, self.split, self.special = [tuple(m) for m in merges], split, tuple(special)
        self.bytes = [bytes([i]) for i in range(256)]
        for left, right in self.merges:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.bytes += [s.encode() for s in self.special]
        self.known = {}  # chunk -> its tokens: text repeats its words

    def encode(self, text, allow_special=False):
        """str or bytes -> list of tokens. A special token in `text` is an error unless allowed: no document may end itself.

        >>> BPE([(97, 98)]).encode("abab c")
        [256, 256, 32, 99]
        """
        text = text.encode() if isinstance(text, str) else text
        found = [s for s in self.special if s.encode() in text]
        if found and not allow_special:
            raise UserError(f"the text contains the special token {found[0]!r}: remove it, or pass allow_special=True")
        if not found:
            return self.encode_plain(text)
        pieces = re.split(b"(" + b"|".join(re.escape(s.encode()) for s in self.special) + b")", text)
        ids = {s.encode(): 256 + len(self.merges) + i for i, s in enumerate(self.special)}
        return [t for piece in pieces for t in ([ids[piece]] if piece in ids else self.encode_plain(piece))]

    def encode_plain(self, text):
        chunks = re.findall(SPLIT[self.split], text)
        if len(self.known) > 1 << 20:
            self.known.clear()
        new = list(set(chunks).difference(self.known))
        if new:  # all unknown chunks at once, in one array
            lengths = np.array([len(chunk) for chunk in new])
            ids = np.full(lengths.sum() + len(new), -1, np.int32)
            ends = np.cumsum(lengths + 1) - 1
            ids[np.delete(np.arange(len(ids)), ends)] = np.frombuffer(b"".join(new), np.uint8)
            ids = apply_merges(ids, self.merges)
            start, flat = 0, ids.tolist()
            for chunk, end in zip(new, np.flatnonzero(ids < 0).tolist()):
                self.known[chunk] = flat[start:end]
                start = end + 1
        return list(itertools.chain.from_iterable(map(self.known.__getitem__, chunks)))

    def decode(self, ids):
        """Tokens -> bytes. One token alone need not be valid UTF-8: decode the whole, then `.decode("utf-8", "replace")`."""
        return b"".join(map(self.bytes.__getitem__, ids))

    def save(self, path):
        state = {"format": "nano_tok bpe 1", "split": self.split, "merges": self.merges, "special": self.special}
        pathlib.Path(path).write_text(json.dumps(state) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path):
        try:
            state = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            if any(max(pair) >= 256 + i or min(pair) < 0 or len(pair) != 2 for i, pair in enumerate(state["merges"])):
                raise ValueError("a merge uses a token that does not exist yet")
            if state["split"] not in SPLIT:
                raise ValueError(f"unknown split {state['split']!r}")
            return cls(state["merges"], state["split"], state["special"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no vocabulary of nano_tok ({error}): train one with the part bpe") from None


def load_text(data, raw):
    """`pydoc` (the help topics inside every CPython), `shakespeare`, or a file -> bytes. UTF-8, unless `raw`."""
    if data == "pydoc":
        from pydoc_data.topics import topics
        return "\n".join(topics[name] for name in sorted(topics)).encode()
    path = find_file(*SHAKESPEARE) if data == "shakespeare" else pathlib.Path(data)
    try:
        text = path.read_bytes()
        if not raw:
            text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {data}: byte {error.start} is not UTF-8; convert the file, or add --bytes") from None
    except OSError as error:
        raise UserError(f"--data {data}: {error.strerror}; known names: pydoc, shakespeare") from None
    if len(text) < 20:
        raise UserError(f"--data {data} holds {len(text)} bytes: too few to learn merges from")
    return text


def bpe_report(bpe, text):
    """-> bytes_per_token, fertility (tokens per word), unused entries, of one text"""
    used = np.bincount(bpe.encode_plain(text), minlength=len(bpe.bytes))
    return {"bytes_per_token": len(text) / used.sum(), "fertility": used.sum() / max(len(text.split()), 1),
            "unused": int((used == 0).sum())}


def run_bpe(config, out):
    """Train on the first nine tenths of a text, report on both parts, save OUT/bpe.json -> metrics"""
    text = load_text(config.data or "pydoc", config.bytes)
    cut, clock = len(text) * 9 // 10, [time.perf_counter()]
    bpe = BPE(train_bpe(text[:cut], config.vocab, config.split), config.split, special=("<|endoftext|>",))
    clock.append(time.perf_counter())
    assert bpe.decode(bpe.encode_plain(text)) == text
    clock.append(time.perf_counter())
    bpe.save(out / "bpe.json")
    m = {"bpe_vocab": 256 + len(bpe.merges), "bpe_train_seconds": clock[1] - clock[0],
         "bpe_encode_mb_per_second": len(text) / 1e6 / (clock[2] - clock[1]),
         "bpe_train": bpe_report(bpe, text[:cut]), "bpe_test": bpe_report(bpe, text[cut:])}
    if m["bpe_vocab"] < config.vocab:
        print(f"only {m['bpe_vocab']} entries: after them no pair occurs twice in this text")
    print(f"bpe: {len(text) / 1e6:.2f} MB, {m['bpe_vocab']} entries, split {config.split}: trained in "
          f"{m['bpe_train_seconds']:.2f} s; encodes and decodes {m['bpe_encode_mb_per_second']:.1f} MB/s from a cold start")
    print(f"{'':20}{'train 90 %':>12}{'test 10 %':>12}")
    for name, words in {"bytes_per_token": "bytes per token", "fertility": "tokens per word", "unused": "unused entries"}.items():
        print(f"{words:20}{m['bpe_train'][name]:12.4g}{m['bpe_test'][name]:12.4g}")
    longest = sorted(bpe.bytes[:m["bpe_vocab"]], key=len, reverse=True)[:8]
    print("longest tokens      " + "  ".join(repr(t.decode("utf-8", "replace")) for t in longest))
    return m


# ---------------------------------------------------------------------------------------------------------------------
# the idea: vectors to integers and back
#   B images   T tokens of an image (64 cells, or K)   D depth (1, or the codebooks of rvq)   C code dimension   V codes
#   z (B, T, C) latents   codes (D, V, C)   index (B, T, D) integers   q (B, T, C) = sum over depth of the chosen codes
# ---------------------------------------------------------------------------------------------------------------------


def straight_through(z, q):
    """The value of q with the gradient of z: rounding has slope 0 almost everywhere, so pretend that it has slope 1.

    >>> z = torch.tensor([0.3], requires_grad=True)
    >>> (straight_through(z, z.round()) * 5).backward(); z.grad
    tensor([5.])
    """
    return z + (q - z).detach()


def kmeans(points, k, generator, rounds=10):
    """Points (N, C) -> k means (k, C). Starts far apart, as k-means++ does, but draws an eighth of the starts at a time."""
    means = points[torch.randint(len(points), (1,), generator=generator)]
    distance = (points - means).square().sum(-1)
    while len(means) < k:
        fresh = points[spread(distance, min(max(k // 8, 1), k - len(means)), generator)]
        means = torch.cat([means, fresh])
        distance = torch.minimum(distance, kernels.nearest_code(points, fresh, return_distance=True)[1])
    for _ in range(rounds):
        index = kernels.nearest_code(points, means)
        counts = torch.bincount(index, minlength=k)[:, None]
        sums = torch.zeros_like(means).index_add_(0, index, points)
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)
    return means


def spread(distance, n, generator):
    """n points, drawn in proportion to their squared distance (N,) from the nearest code: where a new code helps most."""
    weights = distance.float().cpu() + 1e-12
    return torch.multinomial(weights, n, replacement=n > len(weights), generator=generator).to(distance.device)


def residual_quantize(z, codes):
    """z (N, C), codes (D, V, C) -> index (N, D), partial sums (D, N, C): each codebook codes what those before left over.

    >>> residual_quantize(torch.tensor([[5.2]]), torch.tensor([[[0.0], [4.0]], [[0.0], [1.0]]]))   # 4, then 1
    (tensor([[1, 1]]), tensor([[[4.]],
    <BLANKLINE>
            [[5.]]]))
    """
    index, sums, q = [], [], torch.zeros_like(z)
    for codebook in codes:
        index.append(kernels.nearest_code(z - q, codebook))
        q = q + codebook[index[-1]]
        sums.append(q)
    return torch.stack(index, -1), torch.stack(sums)


def fsq_bound(z, levels):
    """z (..., C), squashed so that rounding gives levels[c] integers in channel c (Mentzer et al. 2023, appendix A).

    An odd L gives -(L-1)/2 .. (L-1)/2; an even L gives -L/2 .. L/2 - 1, and the shift keeps z = 0 at 0.

    >>> fsq_bound(torch.tensor([-99.0, 0.0, 99.0])[:, None], torch.tensor([4])).round().flatten().tolist()
    [-2.0, 0.0, 1.0]
    """
    half = (levels - 1) * (1 + 1e-3) / 2  # a hair beyond the edge: without it the shift of L = 2 would be infinite
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    return torch.tanh(z + torch.atanh(offset / half)) * half - offset


def fsq_index(digits, levels):
    """Rounded channels (..., C) -> one integer (...): the digits of a number whose place c has base levels[c], lowest first.

    >>> fsq_index(torch.tensor([-2, 1]), torch.tensor([4, 3]))     # digits 0 and 2: 0 + 4 * 2
    tensor(8)
    """
    return ((digits.long() + levels // 2) * (levels.cumprod(0) // levels)).sum(-1)


def fsq_digits(index, levels):
    """The inverse of `fsq_index`: (...) -> (..., C)"""
    return index[..., None] // (levels.cumprod(0) // levels) % levels - levels // 2


def lfq_index(z):
    """The signs of z (..., bits) read as a binary number, lowest bit first (zero counts as negative).

    >>> lfq_index(torch.tensor([0.3, -2.0, 0.1]))    # + - + : 1 + 0 + 4
    tensor(5)
    """
    return ((z > 0) << torch.arange(z.shape[-1], device=z.device)).sum(-1)


def lfq_code(index, bits):
    """The inverse of `lfq_index`: (...) -> (..., bits) of -1 and 1"""
    return (index[..., None] >> torch.arange(bits, device=index.device) & 1) * 2.0 - 1


def entropies(z, codes, temperature=1.0):
    """z (N, C), codes (V, C), p = softmax(-|z - c|^2 / temperature) -> mean entropy of p, entropy of the mean p, in nats.

    lfq wants the first small (every vector decides), the second large (all codes are used): Yu et al. 2023, equation 5.
    """
    log_p = F.log_softmax((2 * z @ codes.T - codes.square().sum(-1)) / temperature, -1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -(mean * mean.clamp(min=1e-9).log()).sum()


def perturb(index, codes, share, generator, swap=0.5, near=0.1):
    """In a `share` of the images every index (B, T) becomes, with probability `swap`, one of its nearest codes (RobustTok).

    `near`: which part of the codes (V, C) counts as nearest. A decoder that has seen near misses forgives a generator.
    """
    distance = torch.cdist(codes, codes).fill_diagonal_(math.inf)
    nearest = distance.topk(max(1, int(near * len(codes))), largest=False).indices  # (V, n)
    draw = lambda *shape: torch.rand(*shape, generator=generator).to(index.device)
    chosen = (draw(len(index), 1) < share) & (draw(*index.shape) < swap)
    other = nearest[index, (draw(*index.shape) * nearest.shape[1]).long()]
    return torch.where(chosen, other, index)


def keep_prefix(q, keep):
    """q (B, T, C) with all tokens from number keep[b] on zeroed: the decoder learns to do with the rest (nested dropout)."""
    return q * (torch.arange(q.shape[1], device=q.device) < keep[:, None])[..., None]


def usage(index, size):
    """Integers of any shape -> share of the `size` codes that occur, perplexity exp(entropy): how many are in effective use.

    >>> usage(torch.tensor([0, 0, 1, 1]), 4)
    (0.5, 2.0)
    """
    counts = torch.bincount(index.flatten(), minlength=size).double()
    p = counts / counts.sum()
    return float((counts > 0).double().mean()), float(torch.exp(torch.special.entr(p).sum()))


# ---------------------------------------------------------------------------------------------------------------------
# model: three quantizers behind one interface, one encoder, one decoder
#   quantizer(z, generator) -> q with the gradient of z, index, auxiliary loss;  .codes (D, V, C);  .lookup(index) -> q
# ---------------------------------------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    def lookup(self, index):
        """index (B, T, D) -> q (B, T, C)"""
        return sum(codebook[i] for codebook, i in zip(self.codes, index.unbind(-1)))


class VectorQuantizer(Quantizer):
    """vq (depth 1) and rvq. A code is the running mean of the vectors that choose it; one that nobody chooses is born again.

    restart: how small a share of its fair number of vectors makes a code dead. decay: memory of the means, per step.
    """

    def __init__(self, size, dim, depth=1, learned=False, cosine=False, commitment=0.25, decay=0.95, restart=0.05):
        super().__init__()
        self.learned, self.cosine, self.commitment = learned, cosine, commitment
        self.decay, self.restart = decay, restart
        codes = torch.empty(depth, size, dim).uniform_(-1 / size, 1 / size)  # customary; only a learned codebook keeps it
        self.codes = nn.Parameter(codes) if learned else nn.Buffer(codes)
        self.count, self.total = nn.Buffer(torch.zeros(depth, size)), nn.Buffer(torch.zeros(depth, size, dim))

    def forward(self, z, generator=None):
        z = F.normalize(z, dim=-1) if self.cosine else z
        points = z.detach().flatten(0, 1)
        if self.training and not self.learned and not self.count.any():
            self.start(points, generator)
        codes = F.normalize(self.codes, dim=-1) if self.cosine else self.codes
        index, sums = residual_quantize(points, codes.detach())
        if self.training and not self.learned:
            self.update(points, index, sums, generator)
        index = index.view(*z.shape[:2], -1)
        loss = self.commitment * (z - sums.view(-1, *z.shape)).square().mean()
        if self.learned:  # the codes move towards their vectors by gradient
            loss = loss + F.mse_loss(self.lookup(index), z.detach())
        return straight_through(z, sums[-1].view_as(z)), index, loss

    @torch.no_grad()
    def start(self, points, generator):
        """Codes = means of the first vectors, so that every code has a job from the first step."""
        for d, codebook in enumerate(self.codes):
            codebook.copy_(kmeans(points, len(codebook), generator))
            points = points - codebook[kernels.nearest_code(points, codebook)]
            self.count[d], self.total[d] = 1, codebook

    @torch.no_grad()
    def update(self, points, index, sums, generator):
        """codes = sum of vectors / number of vectors, both with exponential forgetting; then restart the dead."""
        for d, codebook in enumerate(self.codes):
            rest = points - (sums[d - 1] if d else 0)
            number = torch.bincount(index[:, d], minlength=len(codebook)).float()
            self.count[d].lerp_(number, 1 - self.decay)
            self.total[d].lerp_(torch.zeros_like(codebook).index_add_(0, index[:, d], rest), 1 - self.decay)
            dead = (self.count[d] < self.restart * len(points) / len(codebook)).nonzero()[:, 0]
            if len(dead):
                fresh = rest[spread((points - sums[d]).square().sum(-1), len(dead), generator)]
                self.count[d, dead] = fair = len(points) / len(codebook)
                self.total[d, dead] = fresh * fair
            codebook.copy_(self.total[d] / self.count[d, :, None])
        if self.cosine:
            self.codes.copy_(F.normalize(self.codes, dim=-1))


class FSQ(Quantizer):
    """Every channel rounded to a few levels. The grid is the codebook: no codes to move, none to die, no auxiliary loss."""

    def __init__(self, levels):
        super().__init__()
        self.levels = nn.Buffer(torch.tensor(levels))
        self.codes = nn.Buffer(self.scale(fsq_digits(torch.arange(math.prod(levels)), self.levels))[None])

    def scale(self, digits):
        return digits / (self.levels // 2)  # into -1 .. 1

    def forward(self, z, generator=None):
        bounded = fsq_bound(3 * z, self.levels)  # z starts at about 1, the outer levels lie beyond 2
        digits = bounded.round()
        q = straight_through(self.scale(bounded), self.scale(digits))
        return q, fsq_index(digits, self.levels)[..., None], z.new_zeros(())


class LFQ(Quantizer):
    """The sign of every channel; two entropies keep the vectors decided and the codes in use."""

    def __init__(self, bits, commitment=0.25, entropy=0.1):
        super().__init__()
        self.commitment, self.entropy = commitment, entropy
        self.codes = nn.Buffer(lfq_code(torch.arange(2**bits), bits)[None])

    def forward(self, z, generator=None):
        index = lfq_index(z)[..., None]
        q = self.lookup(index)
        each, overall = entropies(z.flatten(0, 1), self.codes[0])
        return straight_through(z, q), index, self.commitment * F.mse_loss(z, q) + self.entropy * (each - overall)


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


def matrix(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class Block(nn.Module):
    """x + attention(norm(x), norm(memory)), then x + mlp(norm(x)): every query of x (B, N, C) reads the memory (B, M, C)."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // 16
        self.q, self.kv, self.proj = matrix(width, width), matrix(width, 2 * width), matrix(width, width)
        self.up, self.down = matrix(width, 4 * width), matrix(4 * width, width)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, memory):
        heads = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, 16)
        q, (k, v) = heads(self.q(norm(x))), map(heads, self.kv(norm(memory)).chunk(2, -1))
        look = (norm(q) @ norm(k).mT * 0.5).softmax(-1)  # sharper than 16^-0.5: queries part sooner
        x = x + self.proj((look.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())


class Queries(nn.Module):
    """x (B, inputs, C) -> (B, outputs, C): learned queries read the inputs, and what they hold at the end is kept (TiTok).

    Encoder: K queries read 64 cells -> K tokens. Decoder: 64 queries, the "mask tokens", read K tokens -> 64 cells. TiTok
    lets inputs and queries all see one another; beside convolutions that gave the same PSNR (22.0 dB) at more work.
    """

    def __init__(self, inputs, outputs, width, blocks):
        super().__init__()
        self.input_places = nn.Parameter(torch.randn(inputs, width))
        self.queries = nn.Parameter(torch.randn(outputs, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x):
        memory, x = norm(x) + self.input_places, self.queries.expand(x.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, memory)
        return norm(x)


class Dense(nn.Module):
    """The same by two dense layers: every output has its own weight for every input, nothing need be found by attention."""

    def __init__(self, inputs, outputs, width, neck=8):
        super().__init__()
        self.outputs, self.narrow, self.widen = outputs, matrix(width, neck), matrix(neck, width)
        self.first, self.second = matrix(inputs * neck, 8 * width), matrix(8 * width, outputs * neck)

    def forward(self, x):
        x = self.second(F.relu(self.first(self.narrow(x).flatten(1))))
        return self.widen(x.unflatten(1, (self.outputs, -1)))


class Tokenizer(nn.Module):
    """Images <-> tokens. `encode` and `decode` are the two halves; `forward` is both, for training."""

    def __init__(self, config):
        super().__init__()
        self.layout, self.disturb, self.nested, width = config.layout, config.perturb, config.nested, config.width
        self.quantizer = make_quantizer(config)
        self.depth, self.size, dim = self.quantizer.codes.shape
        self.vocabulary = self.depth * self.size  # codebook d takes the integers from d V on
        self.slots = 64 if config.layout == "grid" else config.tokens
        self.grid = (8, 8 * self.depth) if config.layout == "grid" else (1, self.slots * self.depth)
        self.stem = nn.Conv2d(1, width, 8, stride=4, padding=2)
        self.encoder = nn.Sequential(*[Residual(width) for _ in range(config.blocks)])
        self.gather = self.scatter = nn.Identity()
        if config.layout == "1d":
            mixer = lambda *sizes: Queries(*sizes, config.blocks + 1) if config.mixer == "queries" else Dense(*sizes)
            self.gather, self.scatter = mixer(64, self.slots, width), mixer(self.slots, 64, width)
        self.to_code, self.from_code = nn.Linear(width, dim), nn.Linear(dim, width)
        self.decoder = nn.Sequential(*[Residual(width) for _ in range(config.blocks)])
        self.paint = nn.ConvTranspose2d(width, 1, 8, stride=4, padding=2)  # 4x4 pixels a cell, overlapping by 2

    @property
    def device(self):
        return self.stem.weight.device

    def latents(self, images):
        """float (B, 32, 32) -> z (B, T, C)"""
        cells = norm(self.encoder(self.stem(images[:, None])).flatten(2).mT)
        return self.to_code(self.gather(cells)).float()

    def paint_codes(self, q):
        """q (B, T, C) -> images float (B, 32, 32), not yet clamped"""
        cells = self.scatter(self.from_code(q))
        return self.paint(F.relu(self.decoder(cells.mT.unflatten(2, (8, 8)))))[:, 0].float()

    def forward(self, images, generator):
        """float (B, 32, 32) -> rebuilt images, index (B, T, D), auxiliary loss"""
        z = self.latents(images)
        with torch.autocast(images.device.type, enabled=False):
            q, index, loss = self.quantizer(z, generator)
            if self.disturb:
                q = straight_through(q, self.quantizer.lookup(self.swap(index, self.disturb, generator)))
        if self.layout == "1d" and self.nested:  # three images in four keep all tokens, the others 1 .. T of them
            keep = torch.randint(1, 4 * self.slots + 1, (len(q),), generator=generator).clamp(max=self.slots)
            q = keep_prefix(q, keep.to(q.device))
        return self.paint_codes(q), index, loss

    @torch.no_grad()
    def encode(self, images):
        """float (B, 32, 32) in [0, 1] -> tokens (B, T * D); the D codes of a slot stand side by side"""
        index = self.quantizer(self.latents(images))[1]
        return (index + torch.arange(self.depth, device=index.device) * self.size).flatten(1)

    def index(self, tokens):
        """tokens (B, T * D) -> index (B, T, D)"""
        return tokens.unflatten(1, (self.slots, self.depth)) % self.size

    def swap(self, index, share, generator, **how):
        """`perturb` in every codebook: index (B, T, D) -> the same shape"""
        codebooks = self.quantizer.codes.detach().to(index.device)
        return torch.stack([perturb(index[..., d], codes, share, generator, **how) for d, codes in enumerate(codebooks)], -1)

    def decode(self, tokens, keep=None):
        """tokens (B, T * D) -> images (B, 32, 32) in [0, 1]. keep: use only so many tokens (1d) or codebooks (rvq)."""
        index = self.index(tokens)
        q = self.quantizer.lookup(index if self.layout == "1d" else index[..., :keep])
        if keep is not None and self.layout == "1d":
            q = keep_prefix(q, torch.full((len(q),), keep, device=q.device))
        return self.paint_codes(q).clamp(0, 1)


def make_quantizer(config):
    if config.quantizer == "fsq":
        return FSQ([int(level) for level in config.levels.split(",")])
    if config.quantizer == "lfq":
        return LFQ(config.codebook.bit_length() - 1, config.commitment)
    dim = config.code_dim or (8 if config.layout == "grid" else 4)
    depth = config.depth if config.quantizer == "rvq" else 1
    return VectorQuantizer(config.codebook, dim, depth, config.learned_codebook, config.cosine, config.commitment)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------------------------------------------------

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

def to_float(images, device):
    return images.to(device).float() / 255


@torch.no_grad()
def tokenize(model, images):
    """uint8 (N, 32, 32) -> tokens int64 (N, L), on the CPU"""
    return torch.cat([model.encode(to_float(part, model.device)).cpu() for part in images.split(500)])


@torch.no_grad()
def rebuild(model, tokens, keep=None):
    """tokens (N, L) -> uint8 (N, 32, 32), on the CPU"""
    parts = [model.decode(part.to(model.device), keep) for part in tokens.split(500)]
    return torch.cat([(part * 255).round().byte().cpu() for part in parts])


def psnr(images, other):
    """Peak signal-to-noise ratio in dB, of the error over all pixels of all images (not the mean of the images' own PSNRs).

    >>> psnr(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([0, 230], dtype=torch.uint8)).__round__(2)
    23.18
    """
    error = (images.float() - other.float()).square().mean() / 255**2
    return float(-10 * torch.log10(error))


def prefixes(model):
    """Lengths at which prefixes are decoded: 1, 2, 4, ... K tokens (1d), 1 .. D codebooks (grid)."""
    if model.layout == "1d" and model.depth == 1:
        return sorted({2**i for i in range(model.slots.bit_length())} | {model.slots})
    return list(range(1, model.depth + 1)) if model.layout == "grid" else [model.slots]


def validate(model, images):
    """Over all of `images`: PSNR, usage and perplexity per codebook, error of the codes relative to the latents' variance"""
    tokens = tokenize(model, images)
    shares, perplexities = zip(*(usage(i, model.size) for i in model.index(tokens).unbind(-1)))
    metrics = {"rpsnr": psnr(rebuild(model, tokens), images), "usage": min(shares), "perplexity": min(perplexities),
               "usage_per_codebook": list(shares), "perplexity_per_codebook": list(perplexities)}
    if isinstance(model.quantizer, VectorQuantizer) and not model.quantizer.cosine:
        with torch.no_grad():
            z = model.latents(to_float(images[:500], model.device))
            error = (z - model.quantizer(z)[0]).square().mean()
        metrics["latent_error"] = float(error / z.flatten(0, 1).var(0).mean())
    return metrics


def codec_curve(images, kind, qualities=(1, 5, 10, 20, 35, 50, 70, 90)):
    """JPEG or WebP of Pillow at several qualities -> list of (bits of the whole file, bits of the coded pixels alone, PSNR).

    Bits are means per image. A file of a 32x32 image is mostly header; the second figure leaves out what a decoder could
    know beforehand: in JPEG all before the scan (standard tables), in WebP the 30 bytes of container and frame header.
    """
    from PIL import Image
    curve = []
    for quality in qualities:
        whole, inner, back = 0, 0, []
        for image in images.numpy():
            file = io.BytesIO()
            Image.fromarray(image).save(file, kind, quality=quality)
            raw = file.getvalue()
            scan = raw.find(b"\xff\xda")
            header = scan + 2 + int.from_bytes(raw[scan + 2:scan + 4], "big") if kind == "JPEG" else 30
            whole, inner = whole + len(raw), inner + len(raw) - header
            back.append(np.asarray(Image.open(file).convert("L")))
        curve.append((8 * whole / len(images), 8 * inner / len(images), psnr(images, torch.from_numpy(np.stack(back)))))
    return curve


def evaluate(config, model, data, tokens, test_tokens):
    """All numbers of the report; every one over the whole validation set."""
    bits = model.slots * model.depth * math.log2(model.size)
    metrics = validate(model, data.test)
    metrics |= {"bits_per_image": bits, "tokens_per_image": math.prod(model.grid), "codebook_size": model.size}
    judge = train_judge(data.train, data.train_labels, data.classes, model.device, config.seed)
    some = slice(0, config.samples)
    real = data.test[some], data.test_labels[some]
    distance = lambda images: image_metrics(judge, images, data.train_labels[some], *real)["gfd"]
    metrics |= {"gfd_floor": distance(data.train[some]), "rfd": distance(rebuild(model, tokens[some]))}
    # pFD (RobustTok): the same after one token in four became a near one, as a generator's mistakes would have it
    generator = torch.Generator().manual_seed(config.seed)
    near = model.swap(model.index(tokens[some]), 1.0, generator, swap=0.25)
    metrics["pfd"] = distance(rebuild(model, near.flatten(1)))
    metrics["mean_image_psnr"] = psnr(data.test, data.train.float().mean(0).expand(len(data.test), -1, -1))
    metrics["prefix_psnr"] = {str(n): psnr(rebuild(model, test_tokens, n), data.test) for n in prefixes(model)}
    return metrics


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
    """Muon for the matrices inside the blocks, AdamW for all else; a learned codebook gets a tenth, the customary 1e-3"""
    matrices = [p for module in model.modules() if isinstance(module, (Residual, Block, Dense)) for p in module.parameters()]
    codes = list(model.quantizer.parameters())
    taken = {id(p) for p in matrices + codes}
    adam = lambda params, lr: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizers = [Muon(matrices, lr=config.lr, dtype=dtype),
                  adam([p for p in model.parameters() if id(p) not in taken], config.lr_adam)]
    return optimizers + [adam(codes, config.lr_adam / 10)] if codes else optimizers


def train(config, model, data, dtype, out):
    """Fit the model; write last.pt and best.pt (highest validation PSNR) into `out`; -> history, a dict per validation."""
    device, variance = model.device, float((data.train.float() / 255).var())
    optimizers = make_optimizers(model, config, dtype)
    base_lr = [o.param_groups[0]["lr"] for o in optimizers]
    rng = torch.Generator().manual_seed(config.seed)  # draws images, restarts, perturbations, prefix lengths
    at = {"step": 0, "best": -math.inf, "history": [], "seconds": 0.0}
    if config.resume:
        state = load_checkpoint(out / "last.pt")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        rng.set_state(state["rng"])
        at = {name: state[name] for name in at}

    def snapshot(name):
        save_checkpoint(out / name, at | {"config": dataclasses.asdict(config), "model": model.state_dict(),
                                          "optimizers": [o.state_dict() for o in optimizers], "rng": rng.get_state()})

    forward = torch.compile(model) if config.compile else model
    bar, began = Progress(config.steps, "train", start=at["step"]), time.time() - at["seconds"]
    with Interrupt() as stop:
        while at["step"] < config.steps:
            images = to_float(data.train[torch.randint(len(data.train), (config.batch,), generator=rng)], device)
            for optimizer, lr in zip(optimizers, base_lr):
                optimizer.param_groups[0]["lr"] = lr * (1 - at["step"] / config.steps)  # linear decay to zero, no warm-up
                optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                rebuilt, _, extra = forward(images, rng)
            error = F.mse_loss(rebuilt, images) / variance  # so that the commitment weighs the same on any data
            loss = error + extra
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss is {loss.item()} at step {at['step']}: lower --lr; {out / 'last.pt'} has the last "
                                "good state")
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            at["step"] += 1
            bar.update(error=error.item(), extra=extra.item())
            due = at["step"] % config.eval_every == 0 or at["step"] == config.steps
            if due:
                model.eval()
                at["history"].append({"step": at["step"], "error": error.item()} | validate(model, data.test))
                model.train()
            if due or stop.asked:
                at["seconds"] = time.time() - began
                if due and at["history"][-1]["rpsnr"] > at["best"]:
                    at["best"] = at["history"][-1]["rpsnr"]
                    snapshot("best.pt")
                snapshot("last.pt")
            if stop.asked:
                raise KeyboardInterrupt(f"step {at['step']} is saved; go on with the same command and --resume")
    return at["history"]


# ---------------------------------------------------------------------------------------------------------------------
# export: what nano_ar reads
# ---------------------------------------------------------------------------------------------------------------------


class Decode(nn.Module):
    """The decoder alone, for torch.export: int64 tokens (B, L) -> float images (B, 32, 32) in [0, 1]"""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.decode(tokens)


def export(model, data, train_tokens, test_tokens, out):
    """Write OUT/tokens.npz and OUT/decoder.pt2; nano_ar.py documents the format."""
    np.savez_compressed(out / "tokens.npz", grid=np.array(model.grid), codebook_size=model.vocabulary,
                        train_tokens=train_tokens.int(), train_images=data.train, train_labels=data.train_labels,
                        test_tokens=test_tokens.int(), test_images=data.test, test_labels=data.test_labels)
    decoder = Decode(copy.deepcopy(model).cpu().requires_grad_(False).eval())
    shapes = {"tokens": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(decoder, (test_tokens[:2],), dynamic_shapes=shapes)
    torch.export.save(program, out / "decoder.pt2")
    print(f"wrote {out / 'tokens.npz'} and {out / 'decoder.pt2'}: python nano_ar.py --tokens {out}")


def encode_file(config, model, out):
    """--input IMAGE -> OUT/<name>.tokens.json"""
    from PIL import Image, ImageOps
    path = pathlib.Path(config.input)
    try:
        image = np.asarray(ImageOps.fit(Image.open(path).convert("L"), (32, 32)))
    except OSError as error:
        raise UserError(f"--input {config.input or '(empty)'}: no readable image ({error})") from None
    tokens = tokenize(model, torch.from_numpy(image.copy())[None])[0].tolist()
    write_json(out / f"{path.stem}.tokens.json", {"grid": model.grid, "codebook_size": model.vocabulary, "tokens": tokens})
    print(f"{len(tokens)} tokens: {' '.join(map(str, tokens))}\nwrote {out / f'{path.stem}.tokens.json'}")


def decode_file(config, model, out):
    """--input FILE.tokens.json -> OUT/FILE.png"""
    from PIL import Image
    path = pathlib.Path(config.input)
    try:
        tokens = torch.tensor(json.loads(path.read_text(encoding="utf-8"))["tokens"])
        length, most = math.prod(model.grid), model.vocabulary - 1
        if tokens.dtype != torch.long or tokens.shape != (length,) or not 0 <= tokens.min() <= tokens.max() <= most:
            raise ValueError(f"need {length} integers from 0 to {most}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--input {config.input or '(empty)'}: no tokens of this tokenizer ({error})") from None
    target = out / (path.name.removesuffix(".tokens.json") + ".png")
    Image.fromarray(rebuild(model, tokens[None])[0].numpy()).save(target)
    print(f"wrote {target}")


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

def draw_reconstructions(model, data, test_tokens, out):
    """reconstructions.png: originals, then what every prefix of the code shows, then where the last one errs"""
    firsts = [(data.test_labels == c).nonzero()[:1, 0] for c in range(min(data.classes, 10))]
    picked = torch.cat(firsts)
    rows, labels = [data.test[picked]], ["original"]
    for n in prefixes(model):
        rows.append(rebuild(model, test_tokens[picked], n))
        count = n * (model.slots if model.layout == "grid" else model.depth)
        labels.append(f"{count} token{'s' * (count > 1)}")
    rows.append(((rows[-1].int() - rows[0].int()).abs() * 2).clamp(max=255).byte())
    labels.append("error x 2")
    figure, axes = new_figure(7, 0.6 * len(rows) + 0.4)
    show_images(axes[0, 0], torch.cat(rows), len(picked), f"{data.name}: what the tokens keep")
    for row, label in enumerate(labels):
        axes[0, 0].text(-2, 33 * row + 16, label, ha="right", va="center", fontsize=8)
    save_figure(figure, out / "reconstructions.png")


def draw_detail(model, data, test_tokens, out):
    """detail.png: the best, a middling and the worst reconstruction, enlarged: what an average hides"""
    rebuilt = rebuild(model, test_tokens)
    errors = (rebuilt.float() - data.test.float()).square().mean((1, 2))
    order = errors.argsort()
    ranks = {"best": 0, "middle": len(order) // 2, "worst of 100": len(order) * 99 // 100, "worst": -1}
    picked = {name: order[rank] for name, rank in ranks.items()}
    figure, axes = new_figure(8, 6.2, 3, len(picked))
    gray, signed = dict(cmap="gray", vmin=0, vmax=255), dict(cmap="RdBu", vmin=-128, vmax=128)
    for column, (name, i) in enumerate(picked.items()):
        difference = rebuilt[i].float() - data.test[i].float()
        for row, (picture, style) in enumerate(((data.test[i], gray), (rebuilt[i], gray), (difference, signed))):
            axes[row, column].imshow(picture, interpolation="nearest", **style)
            axes[row, column].set_xticks([]), axes[row, column].set_yticks([])
        axes[0, column].set_title(f"{name}: {psnr(data.test[i], rebuilt[i]):.1f} dB", fontsize=9)
    for row, words in enumerate(("original", "rebuilt", "rebuilt - original\n(red: too dark)")):
        axes[row, 0].set_ylabel(words, fontsize=9)
    save_figure(figure, out / "detail.png")


def draw_codes(model, data, history, test_tokens, out):
    """codes.png: how often each code is used, what a code (grid) or a token (1d) stands for, and how the run went"""
    figure, axes = new_figure(11, 3.4, 1, 3)
    index = model.index(test_tokens)
    counts = [torch.bincount(i.flatten(), minlength=model.size) for i in index.unbind(-1)]
    for d, count in enumerate(counts):
        axes[0, 0].plot(count.sort(descending=True).values / count.sum(), label=f"codebook {d + 1}")
    axes[0, 0].axhline(1 / model.size, color="gray", ls=":", label="all alike")
    axes[0, 0].set(yscale="log", xlabel="codes, most frequent first", ylabel="share of tokens", title="use of the codes")
    axes[0, 0].legend(fontsize=8)
    if model.layout == "grid":
        show_codes(axes[0, 1], data.test, index[..., 0], counts[0])
    else:
        show_positions(axes[0, 1], model, test_tokens)
    column = lambda name: [h[name] for h in history]
    axes[0, 2].plot(column("step"), [100 * share for share in column("usage")], ".-", color="C1")
    axes[0, 2].set(xlabel="step", ylim=(0, 105), title="test images, in the course of training")
    axes[0, 2].set_ylabel("codes in use, %", color="C1")
    right = axes[0, 2].twinx()
    right.plot(column("step"), column("rpsnr"), "k.--")
    right.set_ylabel("PSNR, dB (dashed)")
    save_figure(figure, out / "codes.png")


def show_codes(axis, images, index, counts):
    """What does a code stand for? The mean of the 8x8 pixels around all cells that chose it."""
    cells = F.unfold(F.pad(images[:, None].float(), (2, 2, 2, 2)), 8, stride=4).mT.flatten(0, 1)
    mean = torch.zeros(len(counts), 64).index_add_(0, index.flatten(), cells) / counts[:, None].clamp(min=1)
    mean = mean[counts.argsort(descending=True)][:256]
    show_images(axis, mean.view(-1, 8, 8).round().byte(), 16, "mean 8x8 neighbourhood of each code, by frequency")


def show_positions(axis, model, test_tokens):
    """1d: the mean absolute change of the picture when one token, first to last, is swapped for that of another image"""
    index, maps = model.index(test_tokens[:200]), []
    whole = rebuild(model, test_tokens[:200]).float()
    for i in range(min(model.slots, 64)):
        mixed = index.clone()
        mixed[:, i] = index[:, i].roll(1, 0)
        maps.append((rebuild(model, mixed.flatten(1)).float() - whole).abs().mean(0))
    maps = torch.stack(maps)
    show_images(axis, (maps / maps.max() * 255).byte(), math.isqrt(len(maps)), "where each token, first to last, matters")


def draw_rate_distortion(data, metrics, out):
    """rate_distortion.png: PSNR against bits, beside JPEG, WebP and the runs in neighbouring folders on the same data.

    Not counted, as the codecs' standard tables are not: our codebook and decoder, which both sides have to know.
    """
    figure, axes = new_figure(8, 5)
    axis, images, curves = axes[0, 0], data.test[:300], collections.defaultdict(dict)
    for kind, color in (("JPEG", "gray"), ("WEBP", "black")):
        whole, inner, quality = zip(*codec_curve(images, kind))
        axis.plot(inner, quality, ".-", color=color, label=f"{kind}, coded pixels only")
        axis.plot(whole, quality, ".:", color=color, label=f"{kind}, whole file")
    others = [path for path in sorted(out.parent.glob("*/metrics.json")) if path.parent != out]
    for m in [metrics, *(json.loads(path.read_text(encoding="utf-8")) for path in others)]:
        if m.get("data") == data.name and "prefix_psnr" in m:  # one curve a kind: over prefixes, or over runs of several sizes
            most = max(int(n) for n in m["prefix_psnr"])
            curves[m["kind"]] |= {m["bits_per_image"] * int(n) / most: quality for n, quality in m["prefix_psnr"].items()}
    for kind, curve in sorted(curves.items()):
        axis.plot(*zip(*sorted(curve.items())), "o-", ms=7 if kind == metrics["kind"] else 4, label=kind)
    axis.axhline(metrics["mean_image_psnr"], color="black", lw=0.8, ls="--", label="the mean image, 0 bits")
    axis.set(xscale="log", ylim=(None, 36), title=data.name, ylabel="PSNR (dB)")
    axis.set_xlabel("bits per image (tokens without entropy coding; left of its curve a codec cannot go)")
    axis.legend(fontsize=7)
    save_figure(figure, out / "rate_distortion.png")


def report(config, model, data, metrics, history, out):
    """Everything that is known of a trained tokenizer, as pictures and a token folder in `out` -> its metrics"""
    tokens, test_tokens = tokenize(model, data.train), tokenize(model, data.test)
    metrics = metrics | evaluate(config, model, data, tokens, test_tokens)
    draw_reconstructions(model, data, test_tokens, out)
    draw_detail(model, data, test_tokens, out)
    draw_codes(model, data, history, test_tokens, out)
    draw_rate_distortion(data, metrics, out)
    export(model, data, tokens, test_tokens, out)
    return metrics


def write_json(path, metrics):
    path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def print_report(m):
    """The table that answers "is this normal?": value, healthy range, what to do."""
    bits, size = m["bits_per_image"], m["codebook_size"]
    per = lambda name, scale: " ".join(f"{scale * v:.1f}" for v in m[name])
    rows = [("usage", f"{per('usage_per_codebook', 100)} %", "above 90 % of all codes, over all validation images"),
            ("perplexity", per("perplexity_per_codebook", 1), f"above a fifth of the codes ({size / 5:.3g})"),
            ("PSNR", f"{m['rpsnr']:.2f} dB", f"the mean image alone has {m['mean_image_psnr']:.2f} dB"),
            ("rFD", f"{m['rfd']:.2f}", f"real training images have {m['gfd_floor']:.2f}: the nearer the better"),
            ("pFD", f"{m['pfd']:.2f}", "a quarter of the tokens swapped for near ones, as a generator errs"),
            ("bits per image", f"{bits:.0f}", f"{m['tokens_per_image']} tokens; {bits / 1024:.3f} bits per pixel")]
    if "latent_error" in m:
        rows.insert(2, ("latent error", f"{m['latent_error']:.3f}", "|z - code|^2 / variance of z: 0.01 to 0.3"))
    if len(m["prefix_psnr"]) > 1:
        values = " ".join(f"{n}:{v:.1f}" for n, v in m["prefix_psnr"].items())
        rows.append(("PSNR of prefixes", values, "rises with every length"))
    print("\n" + "\n".join(f"{name:17}{value:>26}   {words}" for name, value, words in rows))
    if m["usage"] < 0.3:
        print(f"COLLAPSED: {100 * (1 - m['usage']):.0f} % of the codes are never chosen. Drop --learned-codebook (the default is "
              "k-means start, running means, restarts), lower --code-dim, or try fsq, which has no codebook to move")
    print(f"total {m['seconds']:.0f} s, training {m['train_seconds']:.0f} s; peak memory {m['peak_memory_mb']:.0f} MB")


def check(config, metrics):
    """--check: exit with code 1 when a metric misses its band."""
    band = BAND.get(config.data, {})
    missed = [f"{name} {metrics[name]:.3f} < {least}" for name, least in band.items() if metrics[name] < least]
    if config.check and missed:
        raise SystemExit(f"nano_tok: check failed: {'; '.join(missed)}")


# ---------------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------------


def kind_of(config):
    """The words that tell this tokenizer from others, apart from its size: a curve of the rate-distortion picture"""
    one_d = ["1d"] + ["dense"] * (config.mixer == "dense") + ["fixed"] * (not config.nested) if config.layout == "1d" else []
    return "-".join([config.quantizer, *one_d] + ["learned"] * config.learned_codebook + ["perturb"] * (config.perturb > 0))


def complete_config(config, part):
    """Fill the defaults that depend on other flags; refuse what does not fit together."""
    name = kind_of(config) + (f"-{config.codebook}" if config.codebook != 256 else "")
    config = dataclasses.replace(config, out=config.out or f"out/tok/{'bpe' if part == 'bpe' else name}")
    if config.quantizer == "lfq" and config.codebook & (config.codebook - 1):
        raise UserError(f"--codebook {config.codebook}: lfq needs a power of two")
    if not re.fullmatch(r"([2-9]|[1-9]\d)(,([2-9]|[1-9]\d))*", config.levels):
        raise UserError(f"--levels {config.levels}: integers from 2 to 99 with commas between, as in 8,6,5")
    if config.cosine and config.quantizer != "vq":
        raise UserError(f"--cosine is for --quantizer vq: what {config.quantizer} codes has no fixed length")
    if config.learned_codebook and config.quantizer not in ("vq", "rvq"):
        raise UserError(f"--learned-codebook: {config.quantizer} has no codebook to learn")
    if config.width % 16:
        raise UserError(f"--width {config.width}: must be a multiple of 16")
    return config


def main(argv=None):
    """Run the script as from the command line; -> the dict of metrics that it also writes to OUT/metrics.json."""
    began = time.time()
    part, config = parse_config(Config, argv, PARTS, PRESETS, __doc__)
    config = complete_config(config, part)
    out = make_folder(config.out)
    if part == "bpe":
        metrics = run_bpe(config, out)
        write_json(out / "metrics.json", metrics)
        return metrics
    device, dtype, reason = pick_device(config.device, config.precision)
    keep_freed_memory()
    if config.resume or part not in ("all", "train"):
        saved = load_checkpoint(out / ("last.pt" if config.resume else "best.pt"))
        config = adopt(config, saved["config"], out / "last.pt", PRESETS[config.preset])
    config = dataclasses.replace(config, data=config.data or "glyphs")
    torch.manual_seed(config.seed)
    model = Tokenizer(config).to(device)
    if part in ("encode", "decode"):
        model.load_state_dict(saved["model"])
        (encode_file if part == "encode" else decode_file)(config, model.eval(), out)
        return {}
    data = load_images(config.data, config.seed)
    params = sum(p.numel() for p in model.parameters())
    print(f"nano_tok: {reason}\ndata {data.name}: {len(data.train)} train, {len(data.test)} test, {data.classes} classes; "
          f"{kind_of(config)}: {model.slots} x {model.depth} tokens of {model.size}; {params / 1e6:.2f} M parameters", flush=True)
    if part in ("all", "train"):
        train(config, model, data, dtype, out)
        saved = load_checkpoint(out / "best.pt")
    metrics = {"device": reason, "params": params, "seed": config.seed, "data": data.name, "kind": kind_of(config),
               "train_seconds": saved["seconds"], "images_per_second": saved["step"] * config.batch / max(saved["seconds"], 1e-9)}
    if part != "train":
        model.load_state_dict(saved["model"])
        metrics |= report(config, model.eval(), data, metrics, saved["history"], out)
        metrics |= {"seconds": time.time() - began, "peak_memory_mb": peak_memory_mb(device)}
        write_json(out / "metrics.json", metrics)
        print_report(metrics)
        check(config, metrics)
    return metrics


if __name__ == "__main__":
    sys.exit(cli(main))
