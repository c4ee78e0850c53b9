"""nano_spec: a cheap drafter runs ahead, the model checks many guesses in one call, the law of the output stays exact.

    text so far      a drafter proposes      the target scores every       each token: accept with min(1, p/q),
                                             path in ONE call              else draw from norm(max(p - q, 0)), stop
    t h e _          c --- h - a - t         p(.)  p(.|c)  p(.|ch) ..
                       \\- a - t             p(.|ca) ..                    emitted: c h e   (tau = 3 tokens a call)

Every method here is the same eight lines, `speculate`. What differs is who proposes and how one token is `select`ed:

    drafter                               paper                                       select
    small GPT, chain or tree              2211.17192, 2302.01318, 2305.09781          rejection, +- replacement
    small GPT, several draws              SpecTr 2310.15141                           K-SEQ
    first layers of the target            S2D 2407.01955                              rejection
    heads on the last hidden state        Medusa 2401.10774                           rejection
    n-gram counts, online                 ADED 2407.12021                             rejection, or top of a tree
    what was seen before                  prompt lookup, token recycling 2408.08696   point masses
    the target's own previous call        Jacobi 2305.10427, SJD 2410.01699           rejection
    relaxed: NOT exact, price printed     lenience, GSD 2508.07747, LANTERN 2410.03355

The proof is a program. `verify` replaces the random numbers by an enumeration of every outcome, runs the *real*
decoders on tiny models and adds up the probabilities: the total variation to the true law is 1e-16. Then it edits one
line of this file at a time, after bugs reported against known implementations, and shows that each mutant is caught.

Commands                                              two CPU cores   expect
    python nano_spec.py                               5 min, 0.9 GB   n-gram drafts: 2 times plain decoding, tau 3 to 4
    python nano_spec.py --task image                  4 min, 0.9 GB   exact SJD: 18 calls per image, not 64, same gFD
    python nano_spec.py verify                        12 s            19 decoders at 1e-16, 14 of 14 mutants caught
    python nano_spec.py sample --prompt "The import"  seconds         trace.png: who chose each byte, draft or target
    python nano_spec.py bench                         2 minutes       the table again, from the checkpoint

Words    gamma: drafted tokens per call (depth of a tree). alpha: sum_x min(p, q), the chance that a draft is accepted.
         tau: tokens emitted per target call, the target's own token included. speed-up: time per token of plain
         decoding with a KV cache, divided by that of the method, measured in turn in one process.
Left out on purpose: EAGLE's feature-level drafts, ragged batches of text, paged caches, constrained decoding.
Read in this order: `select`, `speculate`, `ChainDraft`, `Replay`, `cases`; then the other drafters.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gzip
import hashlib
import itertools
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
    task: str = opt("text", "text: bytes; image: 8x8 patch tokens of 32x32 images behind a class token",
                    choices=("text", "image"), fixed=True)
    data: str = opt("", "text: pydoc (default), shakespeare or a UTF-8 file; image: glyphs (default), mnist, "
                        "fashion-mnist, or a path: IDX file, .npz, folder of class folders", fixed=True)
    out: str = opt("out/spec", "folder for checkpoints, pictures and metrics.json")
    preset: str = opt("cpu", "cpu: four minutes on two cores; gpu: wider and longer", choices=("cpu", "gpu"))
    seed: int = opt(0, "seed of the data, the models and the samples", low=0, fixed=True)
    device: str = opt("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    resume: bool = opt(False, "go on from OUT/last.pt exactly where it stopped")
    check: bool = opt(False, "exit with code 1 when the metrics miss the band of the docstring")
    # models; the target is deep and thin: a draft of one layer is then many times cheaper (the cost table of `bench`)
    dim: int = opt(64, "width of the target", low=8, fixed=True)
    depth: int = opt(16, "layers of the target", low=1, fixed=True)
    heads: int = opt(2, "attention heads of target and draft", low=1, fixed=True)
    exit: int = opt(2, "the target also learns to answer after this many layers, as its own draft", low=1, fixed=True)
    draft_dim: int = opt(128, "width of the draft, which has one layer", low=8, fixed=True)
    medusa: int = opt(4, "number of Medusa heads", low=1, fixed=True)
    block: int = opt(128, "text: longest context in bytes", low=16, fixed=True)
    codebook: int = opt(256, "image: number of patch codes", low=2, fixed=True)
    # training
    steps: int = opt(450, "optimizer steps of the target", low=1, fixed=True)
    draft_steps: int = opt(800, "optimizer steps of the draft", low=1, fixed=True)
    head_steps: int = opt(120, "optimizer steps of the Medusa heads", low=1, fixed=True)
    batch: int = opt(16, "text: sequences per step; images: four times as many", low=1, fixed=True)
    lr: float = opt(0.02, "learning rate of Muon, for the matrices inside the blocks", low=0, fixed=True)
    lr_adam: float = opt(0.005, "learning rate of AdamW, for embeddings and heads", low=0, fixed=True)
    # decoding
    prompt: str = opt("", "sample: text to go on from; default: a piece of the test split")
    new: int = opt(96, "tokens to write per prompt", low=1)
    gamma: int = opt(4, "sample: drafted tokens per call", low=1)
    temperature: float = opt(1.0, "divides the logits of target and draft; 0 takes the most probable token", low=0)
    top_k: int = opt(0, "keep the k most probable tokens; 0 keeps all", low=0)
    top_p: float = opt(1.0, "keep the most probable tokens up to this mass", low=1e-6, high=1)
    prompts: int = opt(4, "bench: prompts, each of 32 bytes of the test split", low=1)
    repeats: int = opt(2, "bench: repetitions of every measurement, in turn", low=1)
    samples: int = opt(1000, "image: samples per method for gFD and accuracy", low=40)
    window: int = opt(8, "image: drafted tokens per call", low=1)


PARTS = {"train": "only train", "sample": "write a text, or draw images", "verify": "the proof by enumeration",
         "bench": "acceptance, tau and time of every method"}
LONG = dict(steps=4000, draft_steps=4000, head_steps=1000, batch=64, lr=0.01, lr_adam=0.002)
IMAGE = dict(out="out/spec/image", dim=128, depth=4, heads=4, steps=600, draft_steps=200)
PRESETS = {"text": {"cpu": {}, "gpu": LONG | dict(dim=512, depth=24, heads=8, draft_dim=256, block=512, new=384)},
           "image": {"cpu": IMAGE, "gpu": IMAGE | LONG | dict(dim=384, depth=12, heads=6, draft_dim=192, samples=5000)}}
BAND = {"text": dict(best_speedup=1.3, best_tau=2.5), "image": dict(calls_saved_exact=1.3)}  # what --check asks for


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


def load_text(data):
    """`pydoc` (the help topics inside every CPython), `shakespeare`, or a UTF-8 file -> train and test bytes."""
    if data == "pydoc":
        from pydoc_data.topics import topics
        raw = "\n".join(topics[name] for name in sorted(topics)).encode()
    else:
        path = pathlib.Path(data)
        if data == "shakespeare":
            path = find_file("tinyshakespeare.txt", *SHAKESPEARE)
        try:
            raw = path.read_bytes()
            raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data {data}: no UTF-8 text ({error}); known names: pydoc, shakespeare") from None
        if len(raw) < 5000:
            raise UserError(f"--data {data} holds {len(raw)} bytes; 5000 are the least to split and learn from")
    tokens = torch.tensor(list(raw))
    return tokens.split([len(raw) * 9 // 10, len(raw) - len(raw) * 9 // 10])


SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def patches_of(images):
    """uint8 (N, 32, 32) -> float (N, 64, 16): 4x4 patches in raster order"""
    return images.view(-1, 8, 4, 8, 4).transpose(2, 3).reshape(len(images), 64, 16).float()


def images_of(tokens, codebook):
    """int64 (N, 64), codebook (K, 16) -> uint8 (N, 32, 32)"""
    return codebook[tokens.cpu()].view(-1, 8, 8, 4, 4).transpose(2, 3).reshape(-1, 32, 32).round().byte()


def fit_codebook(images, size, seed, rounds=12):
    """k-means of patches -> (size, 16), from distinct patches; an empty code moves to the patch that is worst off."""
    g = torch.Generator().manual_seed(seed)
    points = patches_of(images[torch.randperm(len(images), generator=g)[:1000]]).flatten(0, 1)
    distinct = points.unique(dim=0)
    codes = distinct[torch.randperm(len(distinct), generator=g)[:size]].clone()
    for _ in range(rounds):
        nearest, error = kernels.nearest_code(points, codes, return_distance=True)
        count = torch.bincount(nearest, minlength=len(codes))
        codes = torch.zeros_like(codes).index_add_(0, nearest, points) / count[:, None].clamp(min=1)
        codes[count == 0] = points[error.topk(int((count == 0).sum())).indices]
    return codes


# ---------------------------------------------------------------------------------------------------------------------
# model
#   B sequences  T new tokens  C width  H heads  D = C / H  S rows of the cache  V answers (images: V + classes inputs)
# ---------------------------------------------------------------------------------------------------------------------


def rope_table(places, head_dim, base):
    """Rotary positions: places (S, axes) -> cos, sin (S, D), the sine signed for x * cos + roll(x, D/2) * sin."""
    pairs = head_dim // 2 // places.shape[1]
    angle = (places[:, :, None] * base ** (-torch.arange(pairs) / pairs)).flatten(1)
    return torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)


def norm(x):
    return F.layer_norm(x, x.shape[-1:])


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); output layers start at zero."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def attend(self, q, k, v, kv, slots, mask):
        """kv (2, B, H, S, D) and where the new rows go: a slice, (B, T) integers (ragged), None in training."""
        if slots is None:
            return kernels.attention(q, k, v, kernels.causal(q.shape[2]))
        if torch.is_tensor(slots):
            kv[:, torch.arange(len(slots))[:, None], :, slots] = torch.stack([k, v]).permute(1, 3, 0, 2, 4)
            return kernels.decode_attention(q, kv[0], kv[1], slots[:, -1] + 1)
        kv[0, :, :, slots], kv[1, :, :, slots] = k, v
        k, v = kv[0, :, :, :slots.stop], kv[1, :, :, :slots.stop]
        if isinstance(mask, kernels.Mask):  # on a GPU
            return kernels.attention(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, mask)

    def forward(self, x, rope, kv=None, slots=None, mask=None):
        qkv = self.qkv(norm(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # (B, H, 3, T, D)
        qk = norm(qkv[:, :, :2])
        qk = (qk * rope[0] + qk.roll(qk.shape[-1] // 2, -1) * rope[1]).to(qkv.dtype)
        y = self.attend(qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2], kv, slots, mask)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    """places (S, 1) for text or (S, 2) for a grid; inputs: number of input tokens, answers: of output tokens."""

    def __init__(self, inputs, answers, places, dim, depth, heads):
        super().__init__()
        self.token = nn.Embedding(inputs, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, answers, bias=False)
        nn.init.zeros_(self.head.weight)
        base = 10000.0 if places.shape[1] == 1 else 100.0  # 100 suits grids of up to 32 cells
        for name, table in zip(("cos", "sin"), rope_table(places, dim // heads, base)):
            self.register_buffer(name, table, persistent=False)

    def cache(self, batch, size, depth=None):
        """Keys and values of `size` tokens, allocated once (layers, 2, B, H, S, D)."""
        heads = self.blocks[0].heads
        return self.cos.new_zeros(depth or len(self.blocks), 2, batch, heads, size, self.token.embedding_dim // heads)

    def forward(self, tokens, places=None, kv=None, slots=None, mask=None, depth=None, tap=None):
        """tokens (B, T) -> hidden states (B, T, C) after `depth` layers; with `tap`: (after `tap`, after all)."""
        places = slice(tokens.shape[1]) if places is None else places
        rope = self.cos[places], self.sin[places]
        if torch.is_tensor(places) and places.dim() == 2:
            rope = rope[0][:, None, None], rope[1][:, None, None]
        x, early = norm(self.token(tokens)), None
        for i, block in enumerate(self.blocks[:depth]):
            x = block(x, rope, None if kv is None else kv[i], slots, mask)
            early = x if i + 1 == tap else early
        return x if tap is None else (early, x)

    def logits(self, x):
        return self.head(norm(x))


class Medusa(nn.Module):
    """k residual blocks x + SiLU(W_j x) on a hidden state; the target's head makes each the law of one later token."""

    def __init__(self, dim, k):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(k))

    def forward(self, x):
        """x [..., C] -> [k, ..., C]"""
        return torch.stack([norm(x) + F.silu(layer(norm(x))) for layer in self.layers])


# ---------------------------------------------------------------------------------------------------------------------
# The idea, 1: randomness, laws, and how one token is selected
# ---------------------------------------------------------------------------------------------------------------------


class Rng:
    """All chance goes through these two calls, on one row or a batch; `Replay` below enumerates their outcomes."""

    def __init__(self, seed=0, device="cpu"):
        self.generator = torch.Generator(device).manual_seed(seed)

    def choice(self, p):
        """A token per row of p [..., V]; an int if p is [V]."""
        if p.dim() > 1:
            return torch.multinomial(p.flatten(0, -2), 1, generator=self.generator).view(p.shape[:-1])
        # inverse cdf, a third of multinomial's time; float64 and right=True: a token with p = 0 is never drawn
        cdf = p.double().cumsum(0)
        u = torch.rand((), dtype=torch.float64, generator=self.generator)
        return int(torch.searchsorted(cdf, u * cdf[-1], right=True))

    def bern(self, a):
        """True with probability a, elementwise. u is in [0, 1), so a = 0 never passes and a = 1 always does."""
        if torch.is_tensor(a):
            return torch.rand(a.shape, generator=self.generator, device=a.device) < a
        return float(torch.rand((), generator=self.generator)) < a


def warp(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits [..., V] -> law. Always *before* verification, for both models: it is the warped law that is kept."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return kernels.truncate(logits / temperature, top_k, top_p).softmax(-1)


def at(p, x):
    """p(x): p [V] and an int, or rows p [..., V] and tokens x [...]."""
    return p[x] if isinstance(x, int) else p.gather(-1, x[..., None])[..., 0]


def point(p, x):
    """The law that always says x: what a deterministic proposal was 'drawn' from."""
    return torch.zeros_like(p).index_fill_(-1, torch.tensor(x), 1.0)


def residual(p, q):
    """norm(max(p - q, 0)), the law that tops q up to p; rows [..., V].

    >>> residual(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.7, 0.2, 0.1]))
    tensor([0.0000, 0.5000, 0.5000])
    """
    r = (p - q).clamp(min=0)
    total = r.sum(-1, keepdim=True)
    return torch.where(total > 0, r / total.clamp(min=torch.finfo(p.dtype).tiny), p)  # 0: p == q, refused by rounding


def exact(p, q, x):
    """Acceptance ratio of x drafted from q, and the law to fall back on (Leviathan 2211.17192, Chen 2302.01318).

    Why min(1, p/q) and then the residual: a draft emits x with probability q min(1, p/q) = min(p, q); what p still
    lacks, max(p - q, 0), is the residual. They add up to p. The acceptance is sum_x min(p, q) = 1 - TV(p, q).
    """
    return at(p, x) / at(q, x), p


def select(p, q, proposals, rng, replace=True, relax=exact):
    """Draw a token y whose law is exactly p [V], so that y is often one of the `proposals`: the heart of all below.

    proposals: tokens drawn one after another from q [V] (replace=False: without replacement, as in EAGLE), or any
    tokens if q is None (point masses: prompt lookup, top-k trees), or none at all: a plain draw, the bonus token.
    Recursive rejection (SpecInfer 2305.09781): accept the next proposal, or subtract what it could have given.

    >>> select(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), [0], Rng())        # p(0) = 0 is never emitted
    1
    """
    for x in proposals:
        draft = point(p, x) if q is None else q
        ratio, law = relax(p, draft, x)
        if rng.bern(min(1.0, float(ratio))):
            return x
        p = residual(law, draft)
        if q is not None and not replace:
            q = residual(q, point(q, x))
    return rng.choice(p)


def kseq_factor(p, q, k):
    """The smallest rho in [1, k] with 1 - (1 - beta)^k <= rho beta, beta = sum_x min(q, p / rho); `high` always is."""
    low, high = 1.0, float(k)
    for _ in range(25 if k > 1 else 0):
        rho = (low + high) / 2
        beta = float(torch.minimum(q, p / rho).sum())
        low, high = (low, rho) if 1 - (1 - beta) ** k <= rho * beta else (rho, high)
    return high


def select_kseq(p, q, proposals, rng):
    """K-SEQ (SpecTr 2310.15141): k independent draws from q, accepted with min(1, p / (rho q)); k = 1 is `select`."""
    k = len(proposals)
    rho = kseq_factor(p, q, k) if k else 1.0
    for x in proposals:
        if rng.bern(min(1.0, float(p[x] / (rho * q[x])))):
            return x
    if k == 0:
        return rng.choice(p)
    one = torch.minimum(q, p / rho)  # what one draft emits; all k of them emit (1 - (1 - beta)^k) / beta times as much
    beta = float(one.sum())
    return rng.choice(residual(p, one * ((1 - (1 - beta) ** k) / beta if beta else 0.0)))


# Relaxations accept more and are *not* exact. If only the acceptance grows, from a to a' >= a, the price is known:
# TV(output, p) = sum_x q (a' - a), each token gained is paid for. (LANTERN changes the residual too: no such law.)


def lenience(p, q, x, factor=0.5):
    """Accept min(1, p / (factor q)) (Leviathan et al., appendix)."""
    return at(p, x) / (factor * at(q, x)), p


def grouped(p, q, x, near):
    """GSD (2508.07747): compare the mass of x's cluster; near [V, m]: the nearest codes of each token, itself first."""
    cluster = near[x]
    return p.gather(-1, cluster).sum(-1) / q.gather(-1, cluster).sum(-1), p


def lantern(p, q, x, near, delta=0.1):
    """LANTERN (2410.03355): x borrows the mass of its nearest codes, as many as keep the sum within delta.

    delta bounds the change of the target *per drafted token*; the output mixes such targets: its TV can exceed delta.
    """
    others = near[x][..., 1:]
    mass = p.gather(-1, others)
    taken = torch.where(mass.cumsum(-1) <= delta, mass, 0)
    own = torch.as_tensor(x)[..., None]
    law = p.scatter_add(-1, others, -taken).scatter_add(-1, own, taken.sum(-1, keepdim=True)).clamp(min=0)
    return at(law, x) / at(q, x), law


# ---------------------------------------------------------------------------------------------------------------------
# The idea, 2: one loop for every method
# ---------------------------------------------------------------------------------------------------------------------
# A *path* is the tuple of tokens drafted after the text so far; () is the text itself. A drafter proposes a tree
# {path: (q, proposals)}: at this path these tokens, drawn from this law; a chain is a tree with one proposal per path.
# Sorted, the paths are the tree in depth-first pre-order, so that a subtree is a run of rows and the attention mask one
# integer per column (see kernels.tree).
#
#     tree {(): (q, [c, d]), (c,): (q, [a])}      paths (c) (c, a) (d)      rows _ c a d      _ sees the text; c: _ c;
#                                                                                             a: _ c a; d: _ d
# A *model* answers laws(out, paths) -> {path: law of the next token}. Its cache of keys and values is allocated once,
# `length` says how many rows are valid: a rollback is one assignment. Invariant between calls: length == len(out) - 1.


class Output:
    """The one place where tokens are emitted: stop token, length limit and statistics, all after truncation."""

    def __init__(self, prompt, n, stop=None):
        self.tokens, self.start, self.stop, self.blocks = list(prompt), len(prompt), stop, []
        self.limit, self.done = len(prompt) + n, n == 0

    def emit(self, new):
        before = len(self.tokens)
        for token in new:
            if not self.done:
                self.tokens.append(token)
                self.done = token == self.stop or len(self.tokens) == self.limit
        self.blocks.append(len(self.tokens) - before)  # of one target call: accepted drafts, then its own token

    @property
    def calls(self):
        return len(self.blocks)

    @property
    def tau(self):
        """Tokens emitted per target call."""
        return (len(self.tokens) - self.start) / max(1, self.calls)


def plain(target, prompt, rng, n, stop=None):
    """Ordinary decoding with the cache, one token per call: the baseline of every ratio."""
    out = Output(prompt, n, stop)
    while not out.done:
        out.emit([rng.choice(target.laws(out.tokens)[()])])
    return out


def speculate(target, drafter, prompt, rng, n, gamma=4, select=select, stop=None):
    """Speculative decoding with any drafter (chain, tree, lookup, Jacobi) and any `select`; the law is that of `plain`.

    By induction along the path: the token selected at a path has law p[path] whatever was proposed there, and the
    proposals further down were drawn without looking at it. At temperature 0 the output *is* the greedy one.
    """
    if getattr(drafter, "vocab", target.vocab) != target.vocab:
        raise UserError(f"the drafter has {drafter.vocab} tokens, the target {target.vocab}: use one tokenizer")
    out = Output(prompt, n, stop)
    while not out.done:
        base = len(out.tokens)
        tree = drafter.propose(out.tokens, min(gamma, out.limit - base - 1), rng)
        paths = sorted({path + (x,) for path, (_, proposals) in tree.items() for x in proposals})
        p = target.laws(out.tokens, paths)  # the one call of the target
        path = ()
        while path in p:  # as long as the token selected last was verified too
            q, proposals = tree.get(path, (None, ()))
            path += (select(p[path], q, proposals, rng),)
        out.emit(path)
        target.keep(base, tuple(out.tokens[base:]))
        drafter.update(out.tokens, base, p)
    return out


class Model:
    """Cache bookkeeping, one for the real model and the table of the proofs: rows of the text, then of the paths."""

    length, paths = 0, [()]

    def keep(self, base, path):
        """Of the tree fed after `base` tokens keep the branch `path`, less its last token, which nobody has fed."""
        rows = [base - 1 + self.paths.index(path[:i]) for i in range(len(path))]
        if rows != list(range(base - 1, base - 1 + len(rows))):  # a chain lies there already
            self.move(base - 1, rows)
        self.length = base - 1 + len(rows)

    def update(self, out, base, p):
        """Called with the new text and the laws of the last call; drafters that learn override it."""


class Stream(Model):
    """One sequence being written: a GPT or its first `depth` layers, a cache of `size` rows, the keywords of `warp`."""

    def __init__(self, net, size, depth=None, **warp):
        if size > len(net.cos):
            raise UserError(f"{size} tokens exceed the {len(net.cos)} positions of the model: shorten prompt or --new")
        self.net, self.vocab, self.depth, self.warp = net, net.head.out_features, depth, warp
        self.kv = net.cache(1, size, depth)

    @torch.inference_mode()
    def laws(self, out, paths=()):
        start, self.paths = self.length, [(), *paths]
        text, rows = len(out) - start, len(out) - start + len(paths)
        tokens = out[start:] + [path[-1] for path in paths]
        places = [*range(start, len(out)), *(len(out) - 1 + len(path) for path in paths)]  # siblings share a position
        device = self.kv.device
        tokens, places = torch.tensor([tokens], device=device), torch.tensor(places, device=device)
        mask = self.mask(text, rows) if rows > 1 else None
        x = self.net(tokens, places, self.kv, slice(start, start + rows), mask, self.depth)
        self.features, self.length = x[0, text - 1:], len(out)
        return dict(zip(self.paths, warp(self.net.logits(self.features), **self.warp).cpu()))

    def mask(self, text, rows):
        """What each of the new rows sees: all of the cache, the text, and on its own branch the nodes above it."""
        if self.kv.is_cuda:
            parents = [*range(-1, text - 1), *(text - 1 + self.paths.index(path[:-1]) for path in self.paths[1:])]
            return kernels.tree(parents, prefix=self.length)
        end = torch.full((self.length + rows,), rows)  # a column is seen by later rows until its subtree ends
        depths = [len(path) for path in self.paths[1:]]
        if depths != sorted(set(depths)):  # a chain has but one branch
            later = lambda j: (i for i in range(j + 1, len(depths)) if depths[i] <= depths[j])
            end[self.length + text:] = torch.tensor([text + next(later(j), len(depths)) for j in range(len(depths))])
        return torch.ones(rows, len(end), dtype=torch.bool).tril(self.length) & (torch.arange(rows)[:, None] < end)

    def keep(self, base, path):
        super().keep(base, path)
        self.feature = self.features[self.paths.index(path[:-1])]  # the hidden state that led to the last token

    def move(self, first, rows):
        self.kv[..., first : first + len(rows), :] = self.kv[..., rows, :]


# ---------------------------------------------------------------------------------------------------------------------
# Drafters
# ---------------------------------------------------------------------------------------------------------------------


class ChainDraft:
    """gamma tokens in a row from any model: a small GPT, the first layers of the target, or one of the models below."""

    def __init__(self, model):
        self.model, self.vocab = model, model.vocab

    def propose(self, out, gamma, rng):
        self.model.length = min(self.model.length, len(out) - 1)  # after a full acceptance it is fed two
        tree, path = {}, ()
        for _ in range(gamma):
            q = self.model.laws(out + list(path))[()]
            tree[path] = (q, [rng.choice(q)])
            path += tuple(tree[path][1])
        return tree

    def update(self, out, base, p):
        self.model.update(out, base, p)


class TreeDraft(ChainDraft):
    """A tree, level by level, widths[d] proposals per path of length d.

    how: "drawn" from q, "distinct" (without replacement), or the "top" ones: chosen, not drawn, so point masses
    (EAGLE-2, Medusa, token recycling).
    """

    def __init__(self, model, widths, how="distinct"):
        super().__init__(model)
        self.widths, self.how = widths, how

    def draw(self, q, width, rng):
        if self.how == "top":
            return None, q.topk(min(width, len(q))).indices.tolist()
        left, tokens = q, []
        for _ in range(width if self.how == "drawn" else min(width, int((q > 0).sum()))):
            tokens.append(rng.choice(left))
            left = residual(left, point(left, tokens[-1])) if self.how == "distinct" else left
        return q, tokens

    def propose(self, out, gamma, rng):
        tree, level = {}, [()]
        for width in self.widths[:gamma]:
            self.model.length = min(self.model.length, len(out) - 1)
            q = self.model.laws(out, sorted({*tree, *level} - {()}))
            tree.update((path, self.draw(q[path], width, rng)) for path in level)
            level = sorted({path + (x,) for path in level for x in tree[path][1]})
        return tree


class NGram(Model):
    """Interpolated counts p_n = (count + k p_{n-1}) / (total + k), updated with every token emitted (ADED 2407.12021).

    Costs microseconds, and no training but counting. Any law is a legal draft: the lowest order stays as fitted.
    """

    def __init__(self, vocab, data=(), order=4, k=5.0, dtype=torch.float32):
        self.vocab, self.order, self.k, self.counts = vocab, order, k, {}
        pairs = torch.full((vocab, vocab), 1.0 / vocab, dtype=dtype)
        if len(data) > 1:
            data = torch.as_tensor(data)
            pairs.view(-1).index_add_(0, data[:-1] * vocab + data[1:], torch.ones(len(data) - 1, dtype=dtype))
        self.pairs = pairs / pairs.sum(1, keepdim=True)
        self.learn([int(x) for x in data], 0)

    def learn(self, tokens, start):
        for n in range(2, self.order + 1):
            for i in range(max(n, start), len(tokens)):
                counts = self.counts.setdefault(tuple(tokens[i - n : i]), {})
                counts[tokens[i]] = counts.get(tokens[i], 0) + 1

    def law(self, tokens):
        weight, p = 1.0, {}
        for n in range(min(self.order, len(tokens)), 1, -1):
            counts = self.counts.get(tuple(tokens[-n:]), {})
            total = sum(counts.values()) + self.k
            for x, c in counts.items():
                p[x] = p.get(x, 0.0) + weight * c / total
            weight *= self.k / total
        law = self.pairs[tokens[-1]] * weight
        law[list(p)] += torch.tensor(list(p.values()), dtype=law.dtype)
        return law

    def laws(self, out, paths=()):
        return {path: self.law(out[-self.order :] + list(path)) for path in [(), *paths]}

    def update(self, out, base, p):
        self.learn(out[max(0, base - self.order) :], min(base, self.order))


class Jacobi(Model):
    """Speculative Jacobi decoding (2410.01699): draft from the law that the target gave this position in its last call.

    That law was conditioned on guesses since refuted, so it is only a draft; `init` (position -> law) serves positions
    never seen. Exact because the recorded law is the one drawn from. At temperature 0: Jacobi's iteration (2305.10427).
    """

    def __init__(self, init):
        self.init, self.memory, self.vocab = init, {}, len(init(0))

    def laws(self, out, paths=()):
        places = {path: len(out) + len(path) for path in [(), *paths]}
        return {path: self.memory[n] if n in self.memory else self.init(n) for path, n in places.items()}

    def update(self, out, base, p):
        self.memory = {base + len(path): law for path, law in p.items()}


class Recycle(Model):
    """Token recycling (2408.08696): what followed this token last time? For "top" trees; learns from every node."""

    def __init__(self, vocab):
        self.vocab, self.rows = vocab, torch.full((vocab, vocab), 1.0 / vocab)

    def laws(self, out, paths=()):
        return {path: self.rows[(out[-1], *path)[-1]] for path in [(), *paths]}

    def update(self, out, base, p):
        for path, law in p.items():
            self.rows[path[-1] if path else out[base - 1]] = law.float()


class Heads(Model):
    """Medusa heads (2401.10774): head j guesses the token j + 1 places after the one the hidden state led to."""

    def __init__(self, target, heads):
        self.target, self.heads, self.vocab, self.rows, self.end = target, heads, target.vocab, [], 0
        self.blank = torch.full((target.vocab,), 1.0 / target.vocab, dtype=torch.float64)  # when no head knows

    @torch.inference_mode()
    def update(self, out, base, p):
        x = self.target.net.logits(self.heads(self.target.feature))
        self.rows, self.end = list(warp(x, **self.target.warp).cpu()), len(out)

    def laws(self, out, paths=()):
        guess = dict(enumerate(self.rows, self.end))
        return {path: guess.get(len(out) + len(path), self.blank) for path in [(), *paths]}


class Lookup(Model):
    """Prompt lookup: find the last earlier place of the last `order` .. 1 tokens, propose what followed. No law."""

    def __init__(self, order=4):
        self.order = order

    def propose(self, out, gamma, rng):
        for n in range(self.order, 0, -1):
            for i in range(len(out) - n - 1, -1, -1):
                if out[i : i + n] == out[-n:]:
                    found = out[i + n : i + n + gamma]
                    return {tuple(found[:j]): (None, [x]) for j, x in enumerate(found)}
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# The idea, 3: the same for a batch
# ---------------------------------------------------------------------------------------------------------------------


class JacobiBatch:
    """`Jacobi` for B rows: memory (B, S, V) of laws by position, at first `init` (S, V). gamma = 0 is plain."""

    def __init__(self, init, batch):
        self.memory = init.expand(batch, -1, -1).clone()

    def propose(self, tokens, length, gamma, rng):
        q = self.memory[torch.arange(len(length))[:, None], length[:, None] + torch.arange(gamma, device=length.device)]
        return rng.choice(q), q

    def update(self, length, p):
        where = length[:, None] + torch.arange(p.shape[1], device=length.device)
        self.memory[torch.arange(len(length))[:, None], where] = p


class ChainBatch:
    """A draft GPT for B rows. It is also fed its last guess, so that no cache is ever short: one more cheap call."""

    def __init__(self, net, batch, size, **warp):
        self.net, self.kv, self.warp = net, net.cache(batch, size), warp

    def propose(self, tokens, length, gamma, rng):
        last, rows, guesses, laws = tokens.gather(1, length[:, None] - 1), length[:, None] - 1, [], []
        for i in range(gamma + 1):
            q = batch_laws(self.net, self.kv, last, rows + i, self.warp)
            if i < gamma:
                last = rng.choice(q)
                guesses, laws = [*guesses, last], [*laws, q]
        return torch.cat(guesses, 1), torch.cat(laws, 1)

    def update(self, length, p):
        pass


def batch_laws(net, kv, tokens, slots, settings):
    """Laws (B, T, V) after each of tokens (B, T), which are written to rows `slots` (B, T) of the cache."""
    return warp(net.logits(net(tokens, slots, kv, slots)), **settings)


@torch.inference_mode()
def speculate_batch(net, drafter, prompts, rng, n, gamma=4, relax=exact, watch=None, **settings):
    """`speculate` with chains for B prompts (B, P) at once -> tokens (B, P + n), target calls per row (B,).

    Rows accept different numbers of tokens, so each has its own length; one that is done idles until all are. All
    decisions of a call are drawn at once, those behind the first refusal ignored (`kernels.verify`: the same as one
    kernel). `watch`: a list for some (p, q) pairs.
    """
    (B, start), device = prompts.shape, prompts.device
    row, step, limit = torch.arange(B, device=device), torch.arange(gamma + 1, device=device), start + n
    tokens, kv = F.pad(prompts, (0, n + gamma + 1)), net.cache(B, limit + gamma)
    length, calls = torch.full((B,), start, device=device), torch.zeros(B, dtype=torch.long, device=device)
    if start > 1:
        net(prompts[:, :-1], None, kv, torch.arange(start - 1, device=device).expand(B, -1))
    while (active := length < limit).any():
        slots = length[:, None] - 1 + step  # the last token and the drafts after it
        draft, q = drafter.propose(tokens, length, gamma, rng)
        tokens[row[:, None], slots[:, 1:]] = draft
        p = batch_laws(net, kv, tokens[row[:, None], slots], slots, settings)
        ratio, law = relax(p[:, :-1], q, draft)
        accepted = rng.bern(ratio.clamp(max=1)).long().cumprod(1).sum(1)
        if watch is not None:
            watch.append((p[active, 0][:4], (q if gamma else p)[active, 0][:4]))
        law = torch.cat([law, p[:, -1:]], 1)[row, accepted]
        q = F.pad(q, (0, 0, 0, 1))[row, accepted]  # nothing to subtract from the law of the bonus token
        tokens[row, length + accepted] = rng.choice(residual(law, q))
        drafter.update(length, p)
        calls += active
        length = torch.where(active, length + accepted + 1, length).clamp(max=limit)
    return tokens[:, :limit], calls


# ---------------------------------------------------------------------------------------------------------------------
# The proof: enumerate every outcome of the real decoders
# ---------------------------------------------------------------------------------------------------------------------


class Replay:
    """Follows prescribed decisions first, then takes the first possible one and notes the others in `todo`."""

    def __init__(self, prefix=()):
        self.prefix, self.trace, self.weight, self.todo = prefix, [], 1.0, []

    def choice(self, p):
        if torch.is_tensor(p) and p.dim() > 1:
            return torch.tensor([self.choice(row) for row in p.flatten(0, -2)]).view(p.shape[:-1])
        p = p.tolist() if torch.is_tensor(p) else p
        if len(self.trace) < len(self.prefix):
            k = self.prefix[len(self.trace)]
        else:
            k, *others = [i for i, x in enumerate(p) if x > 0]
            self.todo += [(*self.trace, other) for other in others]
        self.trace.append(k)
        self.weight *= p[k]
        return k

    def bern(self, a):
        if torch.is_tensor(a):
            return torch.tensor([self.bern(x) for x in a.flatten().tolist()]).view(a.shape)
        return self.choice([1 - a, a]) == 1


def law_of(decode):
    """The exact law of decode(rng), outcome -> probability: run it once for every sequence of decisions possible.

    >>> law_of(lambda rng: rng.bern(0.25) and rng.bern(0.5))
    {False: 0.875, True: 0.125}
    """
    law, todo = {}, [()]
    while todo:
        rng = Replay(todo.pop())
        outcome = decode(rng)
        law[outcome] = law.get(outcome, 0.0) + rng.weight
        todo += rng.todo
    return law


def total_variation(a, b):
    return sum(abs(a.get(y, 0.0) - b.get(y, 0.0)) for y in {*a, *b}) / 2


def joint(law, prompt, n, stop=None):
    """The true law of n more tokens, by the chain rule; law(tokens) -> [V]. What every decoder is compared with."""
    states = {(): 1.0}
    for _ in range(n):
        states = {y: w for past, weight in states.items() for y, w in (
            [(past, weight)] if past and past[-1] == stop else
            [((*past, x), weight * px) for x, px in enumerate(law([*prompt, *past]).tolist()) if px > 0])}
    return states


class Table(Model):
    """A language model small enough to enumerate: after every prefix a fixed random law, in float64.

    It plays the KV cache too: a row holds the prefix it was computed from, and a call on top of rows of another text
    fails. So a wrong rollback is found even where it would only spoil the acceptance, which no test of outputs can see.
    """

    def __init__(self, vocab, seed=0):
        self.vocab, self.seed, self.cache = vocab, seed, []

    def law(self, tokens):
        g = torch.Generator().manual_seed(hash((self.seed, *tokens)))
        w = torch.rand(self.vocab, generator=g, dtype=torch.float64) ** 2
        return w / w.sum()

    def laws(self, out, paths=()):
        text = [tuple(out[: i + 1]) for i in range(len(out))]
        assert self.length < len(out) and self.cache[: self.length] == text[: self.length], "stale cache"
        self.paths, self.length = [(), *paths], len(out)
        self.cache = text + [text[-1] + path for path in paths]
        return {path: self.law((*out, *path)) for path in self.paths}

    def move(self, first, rows):
        self.cache[first : first + len(rows)] = [self.cache[row] for row in rows]


def tiny_gpt(seed, vocab=3, dim=8, depth=2):
    """A real GPT with random weights, in float64, for proofs that include attention, masks and the KV cache."""
    net = GPT(vocab, vocab, torch.arange(200)[:, None], dim, depth, 2).double()
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.6
    return net.requires_grad_(False)


def cases():
    """name -> (decode(rng) -> tokens, truth() -> true law): every decoder, on a problem with all its branches."""
    uniform = lambda vocab: torch.full((vocab,), 1.0 / vocab, dtype=torch.float64)
    found = {}

    def add(name, vocab, n, drafter, gamma=2, stop=None, target=None, prompt=(0,), **how):
        target = target or (lambda: Table(vocab))
        law = lambda tokens: target().laws(tokens)[()]

        def decode(rng):
            model = target()
            return tuple(speculate(model, drafter(model), prompt, rng, n, gamma, stop=stop, **how).tokens[len(prompt):])
        found[name] = decode, lambda: joint(law, prompt, n, stop)

    distinct = functools.partial(select, replace=False)
    draft = lambda vocab: Table(vocab, 1)
    add("chain", 3, 3, lambda _: ChainDraft(draft(3)))
    add("chain, gamma 3", 2, 4, lambda _: ChainDraft(draft(2)), gamma=3)
    add("chain, draft = target", 3, 3, lambda _: ChainDraft(Table(3)))
    add("chain, stop token", 3, 3, lambda _: ChainDraft(draft(3)), stop=2)
    add("tree, drawn", 2, 3, lambda _: TreeDraft(draft(2), (2, 2), "drawn"))
    add("tree, distinct", 3, 3, lambda _: TreeDraft(draft(3), (2, 1), "distinct"), select=distinct)
    add("tree, top", 3, 3, lambda _: TreeDraft(draft(3), (2, 2), "top"))
    add("K-SEQ", 2, 3, lambda _: TreeDraft(draft(2), (3, 2), "drawn"), select=select_kseq)
    add("n-gram", 2, 4, lambda _: ChainDraft(NGram(2, order=2, dtype=torch.float64)))
    add("n-gram, top tree", 3, 3, lambda _: TreeDraft(NGram(3, order=2, dtype=torch.float64), (2, 1), "top"))
    add("prompt lookup", 3, 3, lambda _: Lookup(2), prompt=(0, 1, 2, 0, 1, 0))
    add("token recycling", 3, 3, lambda _: TreeDraft(Recycle(3), (2, 1), "top"))
    add("Jacobi (SJD)", 3, 3, lambda _: ChainDraft(Jacobi(lambda n: uniform(3))))
    net, small, heads = tiny_gpt(0), tiny_gpt(1, depth=1), Medusa(8, 2).double().requires_grad_(False)
    stream = lambda net, depth=None: Stream(net, 16, depth)
    add("GPT: chain", 3, 3, lambda _: ChainDraft(stream(small)), target=lambda: stream(net))
    add("GPT: tree", 3, 3, lambda _: TreeDraft(stream(small), (2, 1)), target=lambda: stream(net), select=distinct)
    add("GPT: self-exit", 3, 3, lambda _: ChainDraft(stream(net, 1)), target=lambda: stream(net))
    add("GPT: heads", 3, 3, lambda model: ChainDraft(Heads(model, heads)), target=lambda: stream(net))

    def batch(make, B, vocab, n, gamma):
        nets = tiny_gpt(2, vocab), tiny_gpt(3, vocab, depth=1)
        prompts = torch.arange(B)[:, None] % vocab
        one = lambda b: joint(lambda tokens: stream(nets[0]).laws(tokens)[()], (b % vocab,), n).items()
        rows = lambda: itertools.product(*map(one, range(B)))
        truth = lambda: {tuple(y for y, _ in row): math.prod(w for _, w in row) for row in rows()}
        run = lambda rng: speculate_batch(nets[0], make(nets[1], B), prompts, rng, n, gamma)[0]
        decode = lambda rng: tuple(map(tuple, run(rng)[:, 1:].tolist()))
        return decode, truth
    found["batch of 1, chain"] = batch(lambda net, B: ChainBatch(net, B, 16), 1, 3, 3, 1)
    found["batch of 2, Jacobi"] = batch(lambda net, B: JacobiBatch(uniform(2).expand(16, 2), B), 2, 2, 2, 1)
    return found


MUTANTS = [  # what goes wrong, the case that must notice it, a line of this file, what to write instead
    ("after a rejection draw from p, not from the residual", "chain", "p = residual(law, draft)", "p = law"),
    ("the ratio uses the q of the position before", "chain", "q, proposals = tree.get(path, (None, ()))",
     "proposals = tree.get(path, (None, ()))[1]; q = tree.get(path[:-1], (None,))[0]"),
    ("the bonus token comes from the draft", "chain", "path += (select(p[path], q, proposals, rng),)",
     "path += (select(p[path] if proposals else drafter.model.laws(out.tokens + list(path))[()], q, proposals, rng),)"),
    ("a token is lost after a rejection", "chain", "out.emit(path)",
     "out.emit(path if path[:-1] in paths[-1:] else path[:-1] or path)"),
    ("drafts are argmax, the ratio uses the softmax", "chain", "(q, [rng.choice(q)])", "(q, [int(q.argmax())])"),
    ("text goes on after a stop token", "chain, stop token", "if not self.done:", "if len(self.tokens) < self.limit:"),
    ("the target's cache keeps refused tokens", "chain", "self.length = base - 1 + len(rows)",
     "self.length = base - 1 + len(self.paths)"),
    ("the draft's cache keeps refused tokens", "chain",
     "self.model.length = min(self.model.length, len(out) - 1)", "pass"),
    ("tree rows are not moved", "GPT: tree",
     "self.kv[..., first : first + len(rows), :] = self.kv[..., rows, :]", "pass"),
    ("siblings see each other", "GPT: tree", "if depths != sorted(set(depths)):", "if False:"),
    ("without replacement, but q is not renormalised", "tree, distinct", "q = residual(q, point(q, x))", "pass"),
    ("K-SEQ with rho below its root", "K-SEQ", "return high", "return max(1.0, 0.8 * high)"),
    ("batch: one row's refusal stops the others", "batch of 2, Jacobi", ".cumprod(1).sum(1)",
     ".cumprod(1).sum(1).amin().expand(B)"),
    ("batch: q is subtracted from the bonus law too", "batch of 1, chain", "F.pad(q, (0, 0, 0, 1))[row",
     "torch.cat([q, q[:, -1:]], 1)[row"),
]


def run_mutant(old, new, case):
    """This file up to here with one edit: total variation of `case`, infinity if the table met a stale cache."""
    source = pathlib.Path(__file__).read_text(encoding="utf-8").split("\nMUTANTS = [")[0]
    if old not in source:
        raise UserError(f"the mutant edits {old!r}, which this file no longer contains")
    mutant = {"__name__": "mutant", "__file__": __file__}
    exec(compile(source.replace(old, new, 1), "mutant", "exec"), mutant)
    try:
        return total_variation(law_of(mutant["cases"]()[case][0]), cases()[case][1]())
    except AssertionError:
        return math.inf


def optimal_acceptance(p, q, n):
    """The most that n independent drafts can give under any exact rule: min over H of p(H) + 1 - q(H)^n (2502.18779)

    The minimiser is a prefix of the tokens sorted by q / p: V + 1 sets suffice.
    """
    order = (q / p).argsort(descending=True)
    taken = torch.cat([torch.zeros(1), p[order].cumsum(0)]) + 1 - torch.cat([torch.zeros(1), q[order].cumsum(0)]) ** n
    return float(taken.min())


def acceptance(p, q, n, how, select):
    """The exact probability that `select` returns one of n proposals, by enumerating the drafting and the selection."""
    def hit(rng):
        law, proposals = TreeDraft(Table(len(q)), (), how).draw(q, n, rng)
        return select(p, law, proposals, rng) in proposals
    return law_of(hit)[True]


def multi_draft_table(pairs=20, vocab=5):
    """Mean acceptance of n drafts over random (p, q): the exact rules beside the bound for independent drafts."""
    laws = [(Table(vocab, 2 * i).law(()), Table(vocab, 2 * i + 1).law(())) for i in range(pairs)]
    mean = lambda f: statistics.fmean(f(p, q) for p, q in laws)
    distinct = functools.partial(select, replace=False)
    return {n: {"one draft": mean(lambda p, q: float(torch.minimum(p, q).sum())),
                "recursive rejection": mean(lambda p, q: acceptance(p, q, n, "drawn", select)),
                "K-SEQ": mean(lambda p, q: acceptance(p, q, n, "drawn", select_kseq)),
                "bound, independent drafts": mean(lambda p, q: optimal_acceptance(p, q, n)),
                "without replacement": mean(lambda p, q: acceptance(p, q, n, "distinct", distinct)),
                "top of q": mean(lambda p, q: acceptance(p, q, n, "top", select))} for n in (2, 3)}


def selected_law(p, q, relax):
    """-> law of the emitted token [V] and acceptance, for one draft from q selected under `relax`, in closed form."""
    every = torch.arange(len(p), device=p.device)
    ratio, law = relax(p.expand(len(p), -1), q.expand(len(p), -1), every)
    drafted = torch.where(q > 0, q * ratio.nan_to_num(0).clamp(max=1), 0)
    rest = (q - drafted)[:, None] * residual(law, q.expand(len(p), -1))
    return drafted + rest.sum(0), float(drafted.sum())


def price(p, q, relax):
    """Means over rows p, q [..., V]: total variation of the output to p, acceptance gained over the exact rule."""
    paid, gained = [], []
    for a, b in zip(p, q):
        law, accepted = selected_law(a, b, relax)
        paid.append(float((law - a).abs().sum()) / 2)
        gained.append(accepted - float(torch.minimum(a, b).sum()))
    return statistics.fmean(paid), statistics.fmean(gained)


def verify(out):
    """Print and draw the proof; -> metrics."""
    print("exact decoders: total variation between the enumerated output law and the true joint law")
    truth, tv, began = {}, {}, time.time()
    for name, (decode, true) in cases().items():
        truth[name] = true()
        law = law_of(decode)
        tv[name] = total_variation(law, truth[name])
        print(f"  {name:24} {tv[name]:8.1e}   {len(law)} outcomes", flush=True)
    print("mutants: one line of this file edited; each must differ (inf: stopped by the cache check)")
    caught = {}
    for what, case, old, new in MUTANTS:
        caught[what] = run_mutant(old, new, case)
        print(f"  {what:58} {caught[what]:8.3f}   in {case}", flush=True)
    print("acceptance of n drafts, mean over 20 random pairs of laws on 5 tokens")
    table = multi_draft_table()
    for n, row in table.items():
        print(f"  n = {n}   " + "   ".join(f"{name} {value:.3f}" for name, value in row.items()))
    worst, missed = max(tv.values()), [what for what, x in caught.items() if x < 1e-6]
    print(f"worst exact decoder {worst:.1e}; {len(caught) - len(missed)} of {len(caught)} mutants caught; "
          f"{time.time() - began:.0f} s")
    draw_proof(tv, caught, out)
    if worst > 1e-12 or missed:
        raise SystemExit(f"nano_spec: the proof FAILED: worst total variation {worst}, mutants not caught: {missed}")
    caught = {what: x if x < math.inf else "cache check" for what, x in caught.items()}
    return {"tv": tv, "mutants": caught, "multi_draft": table}


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


@dataclasses.dataclass
class Data:
    """Sequences to learn: text (N,), or images (N, 1 + 64) with the class token first."""
    name: str
    train: torch.Tensor
    test: torch.Tensor
    inputs: int
    answers: int
    images: Images = None
    codebook: torch.Tensor = None

    def batch(self, config, step, device):
        """The sequences of one step (B, T + 1): a pure function of seed and step, nothing of it needs to be saved."""
        g = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        if self.images is None:
            starts = torch.randint(len(self.train) - config.block, (config.batch, 1), generator=g)
            return self.train[starts + torch.arange(config.block + 1)].to(device)
        return self.train[torch.randint(len(self.train), (4 * config.batch,), generator=g)].to(device)


def load_data(config, codebook=None):
    if config.task == "text":
        name = config.data or "pydoc"
        train, test = load_text(name)
        if min(len(train), len(test)) <= config.block + 1:
            raise UserError(f"--data {name}: {len(test)} bytes of test text, fewer than --block {config.block}")
        return Data(name, train, test, 256, 256)
    images = load_images(config.data or "glyphs", config.seed)
    codebook = fit_codebook(images.train, config.codebook, config.seed) if codebook is None else codebook
    K, code = len(codebook), lambda x: kernels.nearest_code(patches_of(x).flatten(0, 1), codebook).view(-1, 64)
    train = torch.cat([images.train_labels[:, None] + K, code(images.train)], 1)
    test = torch.cat([images.test_labels[:, None] + K, code(images.test)], 1)
    return Data(images.name, train, test, K + images.classes, K, images, codebook)


def make_models(config, data, device):
    """-> {"target": GPT, "draft": GPT of one layer, "medusa": heads of the target}. All share one vocabulary."""
    if config.task == "text":
        places = torch.arange(2 * config.block + 64)[:, None]
    else:  # the class at (0, 0), patches from (1, 1); a window may look beyond the end
        cells = torch.cartesian_prod(torch.arange(1, 9), torch.arange(1, 9))
        places = torch.cat([torch.zeros(1, 2, dtype=torch.long), cells, cells])
    target = GPT(data.inputs, data.answers, places, config.dim, config.depth, config.heads)
    draft = GPT(data.inputs, data.answers, places, config.draft_dim, 1, config.heads)
    return nn.ModuleDict({"target": target, "draft": draft, "medusa": Medusa(config.dim, config.medusa)}).to(device)


def loss_of(stage, models, x, config):
    """Cross-entropy in nats per token of one stage on sequences x (B, T + 1)."""
    ce = lambda logits, y: F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
    if stage == "draft":
        return ce(models["draft"].logits(models["draft"](x[:, :-1])), x[:, 1:])
    target = models["target"]
    if stage == "target":  # the early exit learns too: that is the draft of self-speculation
        early, late = target(x[:, :-1], tap=min(config.exit, config.depth))
        return ce(target.logits(late), x[:, 1:]) + 0.2 * ce(target.logits(early), x[:, 1:])
    with torch.no_grad():
        hidden = target(x[:, :-1])
    guesses = target.logits(models["medusa"](hidden))  # (k, B, T, V); head j guesses the token j + 2 places on
    return sum(ce(guess[:, : x.shape[1] - 2 - j], x[:, 2 + j:]) for j, guess in enumerate(guesses)) / len(guesses)


@torch.no_grad()
def test_nats(net, data, config, device):
    """Nats per token on the test split, all of it cut into sequences (text: at most 256 of them)."""
    x = data.test
    if data.images is None:
        x = x[: len(x) // (config.block + 1) * (config.block + 1)].view(-1, config.block + 1)[:256]
    total = 0.0
    for part in x.to(device).split(64):
        logits = net.logits(net(part[:, :-1])).float()
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())) * len(part)
    return total / len(x)


def make_optimizers(module, config):
    matrices = [p for name, p in module.named_parameters() if p.ndim == 2 and name.startswith(("blocks", "layers"))]
    inside = {id(p) for p in matrices}
    rest = [p for p in module.parameters() if id(p) not in inside]
    return [Muon(matrices, lr=config.lr), torch.optim.AdamW(rest, config.lr_adam, betas=(0.9, 0.95), weight_decay=0.0)]


def train(config, models, data, device, dtype, out):
    """Target, draft and heads, one after the other: last.pt on the way, best.pt at the end. -> the state in best.pt."""
    stages = {"target": config.steps, "draft": config.draft_steps}
    if config.task == "text":
        stages["medusa"] = config.head_steps
    state = {"config": dataclasses.asdict(config), "codebook": data.codebook, "stage": 0, "step": 0, "nats": {},
             "seconds": 0}
    if config.resume:
        state |= load_checkpoint(out / "last.pt")
        models.load_state_dict(state["model"])
    began = time.time() - state["seconds"]
    with Interrupt() as stop:
        for number, (stage, steps) in enumerate(stages.items()):
            if number < state["stage"]:
                continue
            optimizers = make_optimizers(models[stage], config)
            base = [o.param_groups[0]["lr"] for o in optimizers]
            for optimizer, saved in zip(optimizers, state.pop("optimizers", [])):
                optimizer.load_state_dict(saved)
            bar = Progress(steps, f"train {stage}", start=state["step"])
            while state["step"] < steps:
                step = state["step"]
                for optimizer, lr in zip(optimizers, base):  # ten steps of warm-up, linear decay over the second half
                    optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, 2 * (1 - step / steps))
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = loss_of(stage, models, data.batch(config, step, device), config)
                if not math.isfinite(loss.item()):
                    raise UserError(f"the loss of the {stage} is {loss.item()} at step {step}: lower --lr; "
                                    f"{out / 'last.pt'} holds the last good state, if any")
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                models.zero_grad(set_to_none=True)
                state["step"] += 1
                bar.update(loss=loss.item())
                if state["step"] % 200 == 0 or stop.asked:
                    state["seconds"] = time.time() - began
                    save_checkpoint(out / "last.pt", state | {"model": models.state_dict(),
                                                              "optimizers": [o.state_dict() for o in optimizers]})
                if stop.asked:
                    raise KeyboardInterrupt(f"{stage} step {state['step']} is saved; add --resume to go on")
            if stage != "medusa":
                state["nats"][stage] = test_nats(models[stage], data, config, device)
            state |= {"stage": number + 1, "step": 0}
    state |= {"model": models.state_dict(), "seconds": time.time() - began}
    save_checkpoint(out / "last.pt", state)
    save_checkpoint(out / "best.pt", state)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: text
# ---------------------------------------------------------------------------------------------------------------------


def warp_settings(config):
    return dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)


def drafters(config, models, data, size):
    """name -> (target -> drafter, select, the case that proves it). All runs share counts and memories, not caches."""
    ngram, recycle = NGram(data.answers, data.train), Recycle(data.answers)
    unigram = torch.bincount(data.train, minlength=data.answers).add(1).float()
    stream = lambda net, depth=None: Stream(net, size, depth, **warp_settings(config))
    draft, wide = lambda: stream(models["draft"]), lambda *first: (*first, *[1] * 8)
    distinct, lenient = functools.partial(select, replace=False), functools.partial(select, relax=lenience)
    return {
        "draft GPT": (lambda t: ChainDraft(draft()), select, "GPT: chain"),
        "draft GPT, tree": (lambda t: TreeDraft(draft(), wide(2)), distinct, "GPT: tree"),
        "draft GPT, K-SEQ": (lambda t: TreeDraft(draft(), wide(2), "drawn"), select_kseq, "K-SEQ"),
        "first layers": (lambda t: ChainDraft(stream(t.net, config.exit)), select, "GPT: self-exit"),
        "Medusa heads": (lambda t: ChainDraft(Heads(t, models["medusa"])), select, "GPT: heads"),
        "n-gram": (lambda t: ChainDraft(ngram), select, "n-gram"),
        "n-gram, top tree": (lambda t: TreeDraft(ngram, wide(3, 2), "top"), select, "n-gram, top tree"),
        "prompt lookup": (lambda t: Lookup(), select, "prompt lookup"),
        "token recycling": (lambda t: TreeDraft(recycle, wide(3, 2), "top"), select, "token recycling"),
        "Jacobi (SJD)": (lambda t: ChainDraft(Jacobi(lambda n: unigram / unigram.sum())), select, "Jacobi (SJD)"),
        "n-gram, lenience": (lambda t: ChainDraft(ngram), lenient, None),
    }


def watched(select, log):
    """`select` that also notes p, q, the acceptance of the first proposal in closed form, and whether one was taken."""
    def spy(p, q, proposals, rng):
        y = select(p, q, proposals, rng)
        if proposals:
            law = point(p, proposals[0]) if q is None else q
            log.append((p, law, float(torch.minimum(p, law).sum()), y in proposals))
        return y
    return spy


def seconds_of(function, repeats=15):
    """Median wall-clock of function() after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def cost_table(target, text, rows=(1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 49)):
    """Seconds of one target call on k new tokens behind a cached text: the t(k) of every prediction."""
    def call(k):
        target.length = len(text) - 1
        target.laws(text, [(0,) * j for j in range(1, k)])
    target.length = 0
    target.laws(text)
    return {k: seconds_of(lambda: call(k)) for k in rows}


def explain(row, make, choose, target, prompt, text, costs, config):
    """Add to a row what does not come from its timing: alpha, and the speed-up that tau and costs predict.

    speed-up = tau t(1) / (t_draft(gamma) + t(rows)): tokens per call over the price of a call.
    """
    drafter, log, gamma, target.length = make(target), [], row["gamma"], 0
    speculate(target, drafter, prompt, Rng(99), config.new, gamma, watched(choose, log))
    nodes = {path + (x,) for path, (_, xs) in drafter.propose(text, gamma, Rng(0)).items() for x in xs}
    drafting = seconds_of(lambda: drafter.propose(text, gamma, Rng(0)), 9)
    checking = float(np.interp(1 + len(nodes), list(costs), list(costs.values())))
    alpha = statistics.fmean([closed for _, _, closed, _ in log] or [0.0])
    row |= {"alpha": alpha, "tau_if_iid": sum(alpha ** i for i in range(gamma + 1)),
            "draft_cost": drafting / gamma / costs[1],
            "predicted_speedup": row["tau"] * costs[1] / (drafting + checking)}
    if not row["exact"]:
        row["tv"] = price(*zip(*[(p, q) for p, q, *_ in log[:40]]), lenience)[0]


def bench_text(config, models, data, tv):
    """Every method at gamma 1 .. 8 beside plain decoding, all in turn in this process -> rows, cost table."""
    size, every = 32 + config.new + 64, len(data.test) // config.prompts
    target, methods = Stream(models["target"], size, **warp_settings(config)), drafters(config, models, data, size)
    prompts = [data.test[i * every:i * every + 32].tolist() for i in range(config.prompts)]
    text, gammas, rows = data.test[:32 + config.new // 2].tolist(), (1, 2, 3, 4, 6, 8), []
    tables, bar = [], Progress(len(gammas), "bench")

    def timed(decode):
        target.length, start = 0, time.perf_counter()
        out = decode()
        return time.perf_counter() - start, out

    for gamma in gammas:
        tables.append(cost_table(target, text))  # anew for every gamma: machines drift
        runs = {name: [] for name in ("plain", *methods)}
        for i, prompt in enumerate(prompts * config.repeats):
            runs["plain"].append(timed(lambda: plain(target, prompt, Rng(i), config.new)))
            for name, (make, choose, _) in methods.items():
                drafter = make(target)
                runs[name].append(timed(lambda: speculate(target, drafter, prompt, Rng(i), config.new, gamma, choose)))
        total = {name: sum(t for t, _ in run) for name, run in runs.items()}
        per_prompt = lambda run: (min(t for t, _ in run[i::len(prompts)]) for i in range(len(prompts)))
        least = {name: sum(per_prompt(run)) for name, run in runs.items()}
        for name, (*_, proof) in methods.items():
            tau = config.new * len(runs[name]) / sum(out.calls for _, out in runs[name])
            rows.append({"name": name, "task": "text", "exact": proof is not None, "gamma": gamma, "tau": tau,
                         "calls_per_token": 1 / tau, "speedup": total["plain"] / total[name],
                         "speedup_of_minima": least["plain"] / least[name], "tv": tv.get(proof),
                         "ms_per_token": 1000 * total[name] / len(runs[name]) / config.new})
        bar.update()
    costs = {k: statistics.median(table[k] for table in tables) for k in tables[0]}
    for row in rows:
        explain(row, *methods[row["name"]][:2], target, prompts[0], text, costs, config)
    return rows, costs


def best_rows(rows):
    """The row of every method at the gamma that was fastest."""
    names = dict.fromkeys(r["name"] for r in rows)
    return [max((r for r in rows if r["name"] == name), key=lambda r: r["speedup"]) for name in names]


def print_text(rows, costs):
    print(f"target: {1000 * costs[1]:.2f} ms for one token; k tokens at once cost, in units of that:  "
          + "  ".join(f"{k}: {t / costs[1]:.2f}" for k, t in costs.items()))
    print("method at its best gamma  gamma  alpha    tau  calls/token  speed-up (of minima)  predicted  draft/t(1)")
    for r in best_rows(rows):
        print(f"{r['name']:25} {r['gamma']:5} {r['alpha']:6.2f} {r['tau']:6.2f} {r['calls_per_token']:12.2f} "
              f"{r['speedup']:9.2f} {r['speedup_of_minima']:12.2f} {r['predicted_speedup']:10.2f} {r['draft_cost']:8.3f}"
              + ("" if r["exact"] else f"   NOT exact: TV {r['tv']:.2f} per token"))


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: images
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


def image_methods(config, models, data, device):
    """-> {name: (batch size -> drafter, gamma, relaxation)}, prior (S, V): how often a code stands at a position"""
    K, W = data.answers, config.window
    size = 65 + 2 * W  # a window may look beyond the end
    uniform = torch.full((size, K), 1.0 / K, device=device)
    prior = uniform.clone()
    places = torch.arange(64) * K + data.train[:, 1:]
    counts = torch.bincount(places.flatten(), minlength=64 * K).view(64, K)
    prior[1:65] = (counts / len(data.train) * 0.99 + 0.01 / K).to(device)
    near = torch.cdist(data.codebook, data.codebook).argsort(1).to(device)
    jacobi = lambda init: lambda batch: JacobiBatch(init, batch)
    relaxed = {"lenience 0.5": lenience, "lenience 0.1": functools.partial(lenience, factor=0.1),
               **{f"GSD, {m} codes": functools.partial(grouped, near=near[:, :m]) for m in (2, 4, 16)},
               **{f"LANTERN {d}": functools.partial(lantern, near=near[:, :17], delta=d) for d in (0.05, 0.2)}}
    return {"plain": (jacobi(uniform), 0, exact),
            "draft GPT": (lambda batch: ChainBatch(models["draft"], batch, size, **warp_settings(config)), W, exact),
            "SJD, uniform start": (jacobi(uniform), W, exact),
            "SJD": (jacobi(prior), W, exact),
            **{name: (jacobi(prior), W, relax) for name, relax in relaxed.items()}}, prior


def draw(config, models, data, method, labels, device, watch=None):
    """Images of the classes `labels` (N,) by one of the methods -> uint8 (N, 32, 32), target calls (N,)"""
    (make, gamma, relax), rng, found = method, Rng(config.seed, device), []
    for part in (labels + data.answers).to(device).split(250):
        found.append(speculate_batch(models["target"], make(len(part)), part[:, None], rng, 64, gamma, relax, watch,
                                     **warp_settings(config)))
    tokens, calls = (torch.cat(x).cpu() for x in zip(*found))
    return images_of(tokens[:, 1:], data.codebook), calls


def bench_images(config, models, data, tv, device):
    """Calls, gFD (mean of four quarters, with its standard error) and class accuracy of every method."""
    pictures, labels = data.images, torch.arange(config.samples // 4 * 4) % data.images.classes
    judge = train_judge(pictures.train, pictures.train_labels, pictures.classes, device, config.seed)
    test = judged(judge, pictures.test)[0]
    methods, prior = image_methods(config, models, data, device)
    rows, shown, bar = [], {}, Progress(len(methods), "images")
    for name, method in methods.items():
        pairs, start = [], time.perf_counter()
        images, calls = draw(config, models, data, method, labels, device, pairs)
        seconds, tau, lossless = time.perf_counter() - start, 64 / float(calls.double().mean()), method[2] is exact
        features, seen = judged(judge, images)
        gfd, shown[name] = [frechet_distance(part, test) for part in features.chunk(4)], images[:10]
        p, q = (torch.cat(side)[:60] for side in zip(*pairs))
        rows.append({"name": name, "task": "image", "exact": lossless, "gamma": method[1], "tau": tau,
                     "alpha": float(torch.minimum(p, q).sum(-1).mean()), "calls_per_token": 1 / tau,
                     "calls_per_image": 64 / tau, "gfd": statistics.fmean(gfd), "gfd_se": statistics.stdev(gfd) / 2,
                     "class_accuracy": float((seen == labels).double().mean()),
                     "ms_per_image": 1000 * seconds / len(labels),
                     "tv": tv.get("batch of 2, Jacobi") if lossless else price(p, q, method[2])[0]})
        rows[-1]["speedup"] = rows[0]["ms_per_image"] / rows[-1]["ms_per_image"]
        bar.update()
    some = slice(0, len(labels) // 4)
    levels = {"gfd_floor": pictures.train[some], "rfd": images_of(data.train[some, 1:], data.codebook)}
    return rows, shown, prior, {name: frechet_distance(judged(judge, x)[0], test) for name, x in levels.items()}


def print_images(rows, extra):
    print(f"gFD of as many training images {extra['gfd_floor']:.2f} (floor), through the tokenizer {extra['rfd']:.2f}")
    print("method               calls/image  saved   gFD +- s.e.   class accuracy   ms/image   TV per token")
    for r in rows:
        print(f"{r['name']:20} {r['calls_per_image']:11.1f} {r['tau']:6.2f} {r['gfd']:7.2f} +- {r['gfd_se']:.2f} "
              f"{r['class_accuracy']:13.3f} {r['ms_per_image']:13.1f}   " + ("0" if r["exact"] else f"{r['tv']:.2f}  NOT exact"))


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


def draw_proof(tv, caught, out):
    """proof.png: exact decoders at the level of rounding, mutants ten orders of magnitude above."""
    figure, axes = new_figure(9, 6.5)
    axis, values = axes[0, 0], [*(max(x, 1e-17) for x in tv.values()), *(min(x, 1.0) for x in caught.values())]
    axis.barh([*tv, *caught], values, color=["tab:green"] * len(tv) + ["tab:red"] * len(caught), log=True)
    axis.axvline(1e-12, color="black", ls=":", label="tolerance")
    axis.set(xlim=(1e-18, 3), xlabel="total variation between the law of the output, by enumeration, and the true law",
             title="exact decoders (green), and this file with one line edited (red)")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.legend()
    save_figure(figure, out / "proof.png")


def draw_text(rows, costs, out):
    """bench.png: what a call costs, how many tokens it gives, and what comes out."""
    figure, axes = new_figure(15, 4.6, 1, 3)
    cost, tau, speed = axes[0]
    cost.plot(list(costs), [t / costs[1] for t in costs.values()], ".-")
    cost.set(xlabel="k, tokens in one call", ylabel="t(k) / t(1)", ylim=(0, None), title="what checking more tokens costs")
    best = best_rows(rows)
    for i, name in enumerate(r["name"] for r in best):
        mine = [r for r in rows if r["name"] == name]
        gammas, style = [r["gamma"] for r in mine], ".-" if mine[0]["exact"] else ".:"
        tau.plot(gammas, [r["tau"] for r in mine], style, color=f"C{i % 10}", label=name)
        if i == 0:
            tau.plot(gammas, [r["tau_if_iid"] for r in mine], "k--", lw=1, label="the same if every alpha were equal")
    tau.set(xlabel="gamma, drafted tokens per call", ylabel="tau, tokens per call", title="what a call gives")
    tau.legend(fontsize=6)
    labels = [f"{r['name']}, gamma {r['gamma']}{'' if r['exact'] else ' (not exact)'}" for r in best]
    speed.barh(labels, [r["speedup"] for r in best], color=[f"C{i % 10}" for i in range(len(best))], alpha=0.7)
    speed.plot([r["predicted_speedup"] for r in best], labels, "kx", label="predicted from tau and costs")
    speed.axvline(1, color="gray", lw=1)
    speed.set(xlabel="times plain cached decoding", title="speed-up at the best gamma")
    speed.invert_yaxis()
    speed.legend(fontsize=7)
    save_figure(figure, out / "bench.png")


def draw_trace(output, out, width=64):
    """trace.png: the text, coloured by who chose each byte: the prompt, an accepted draft, or the target itself."""
    colours = ["0.85"] * output.start + [c for n in output.blocks for c in ["#b7e4b0"] * (n - 1) + ["#f4b183"]]
    lines = -(-len(colours) // width)
    figure, axes = new_figure(9, 0.5 + 0.25 * lines)
    for i, (token, colour) in enumerate(zip(output.tokens, colours)):
        y, x = divmod(i, width)
        shown = chr(token) if 32 <= token < 127 else "\u21b5" if token == 10 else "\u00b7"
        axes[0, 0].fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=colour)
        style = dict(family="monospace", fontsize=8, ha="center", va="center")
        axes[0, 0].text(x + 0.5, y + 0.5, shown.replace("$", r"\$"), **style)
    axes[0, 0].set(xlim=(0, width), ylim=(lines, 0))
    title = "grey: prompt; green: drafted and accepted; orange: chosen by the target;"
    axes[0, 0].set_title(f"{title} {output.tau:.2f} bytes per target call", fontsize=9)
    axes[0, 0].axis("off")
    save_figure(figure, out / "trace.png")


def draw_images(shown, rows, models, data, prior, window, out):
    """images.png: ten samples of every method; beside them, of exact SJD, which call wrote which patch."""
    figure, axes = new_figure(12, 5, 1, 2)
    show_images(axes[0, 0], torch.cat(list(shown.values())), 10, "method (*: not exact), calls per image, gFD; samples")
    for i, r in enumerate(rows):
        words = f"{r['name']}{'' if r['exact'] else '*'}  {r['calls_per_image']:.0f}  {r['gfd']:.0f}"
        axes[0, 0].text(-3, 33 * i + 16, words, ha="right", va="center", fontsize=8)
    maps = []
    for label in range(min(10, data.images.classes)):
        drafter = ChainDraft(Jacobi(lambda n: prior[n].cpu()))
        one = speculate(Stream(models["target"], 66 + window), drafter, [data.answers + label], Rng(label), 64, window)
        call = torch.tensor([i for i, n in enumerate(one.blocks) for _ in range(n)]).view(8, 8)
        image = images_of(torch.tensor(one.tokens[1:])[None], data.codebook)[0].numpy()[..., None] / 255
        tint = np.array([[0.25, 0.45, 0.8], [0.95, 0.6, 0.2]])[np.kron(call % 2, np.ones((4, 4), int))]
        maps.append(np.maximum(image, tint * 0.6))
    grid = np.ones((2 * 33, 5 * 33, 3))
    for i, picture in enumerate(maps):
        grid[i // 5 * 33:i // 5 * 33 + 32, i % 5 * 33:i % 5 * 33 + 32] = picture
    axes[0, 1].imshow(grid, interpolation="nearest")
    axes[0, 1].set_title("exact SJD: patches of one call have one colour, calls alternate", fontsize=9)
    axes[0, 1].axis("off")
    save_figure(figure, out / "images.png")


def sample(config, models, data, device, out):
    """Text: go on from a prompt with the exact chain of the draft, print and colour it. Images: a page by exact SJD."""
    if data.images is not None:
        labels = torch.arange(100) % data.images.classes
        methods, _ = image_methods(config, models, data, device)
        images, calls = draw(config, models, data, methods["SJD"], labels, device)
        figure, axes = new_figure(5, 5.3)
        show_images(axes[0, 0], images, 10, f"exact SJD: {calls.double().mean():.1f} calls per image instead of 64")
        return save_figure(figure, out / "samples.png")
    prompt = list(config.prompt.encode()) or data.test[:32].tolist()
    size = len(prompt) + config.new + config.gamma + 1
    target, draft = (Stream(models[name], size, **warp_settings(config)) for name in ("target", "draft"))
    output = speculate(target, ChainDraft(draft), prompt, Rng(config.seed), config.new, config.gamma)
    print(bytes(output.tokens).decode("utf-8", "replace"))
    draw_trace(output, out)


def check(config, metrics):
    """--check: exit with code 1 when a metric misses its band."""
    band = BAND[config.task].items()
    missed = [f"{name} {metrics[name]:.3f} < {least}" for name, least in band if metrics[name] < least]
    if config.check and missed:
        raise SystemExit(f"nano_spec: check failed: {'; '.join(missed)}")


# ---------------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------------


def bench(config, models, data, device, tv, out):
    """The tables and pictures of one task -> metrics."""
    if config.task == "image":
        rows, shown, prior, extra = bench_images(config, models, data, tv, device)
        print_images(rows, extra)
        draw_images(shown, rows, models, data, prior, config.window, out)
        return {"methods": rows, "calls_saved_exact": max(r["tau"] for r in rows if r["exact"]), **extra}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at these sizes a second thread costs more than it brings
    try:
        rows, costs = bench_text(config, models, data, tv)
    finally:
        torch.set_num_threads(threads)
    print_text(rows, costs)
    draw_text(rows, costs, out)
    best = max((r for r in rows if r["exact"]), key=lambda r: r["speedup"])
    speed = 1000 / best["ms_per_token"]
    print(f"best exact method: {best['name']}, gamma {best['gamma']}: {best['speedup']:.2f} times plain decoding "
          f"(predicted {best['predicted_speedup']:.2f}), tau {best['tau']:.2f}, {speed:.0f} tokens/s")
    return {"methods": rows, "costs": {str(k): t for k, t in costs.items()}, "tokens_per_second": speed,
            "best_speedup": best["speedup"], "best_predicted": best["predicted_speedup"], "best_tau": best["tau"]}


def main(argv=None):
    """Run the script as from the command line; -> the dict of metrics that it also writes to OUT/metrics.json."""
    began, peek = time.time(), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--task")
    presets = PRESETS.get(peek.parse_known_args(argv)[0].task, PRESETS["text"])  # each task has its own defaults
    part, config = parse_config(Config, argv, PARTS, presets, __doc__)
    if config.dim % (4 * config.heads) or config.draft_dim % (4 * config.heads):
        raise UserError(f"--dim {config.dim} and --draft-dim {config.draft_dim} must be multiples of 4 x {config.heads} heads")
    thin = config.dim < 128 and not torch.cuda.is_available()  # then converting to bf16 costs more than it brings
    device, dtype, reason = pick_device(config.device, "fp32" if thin else "auto")
    keep_freed_memory()
    out, saved, metrics = make_folder(config.out), None, {"device": reason, "seed": config.seed}
    if part in ("all", "verify"):
        metrics["proof"] = verify(out)
    if part == "verify":
        return metrics
    if config.resume or part in ("sample", "bench"):
        where = out / ("last.pt" if config.resume else "best.pt")
        saved = load_checkpoint(where)
        config = adopt(config, saved["config"], where, presets[config.preset])
    torch.manual_seed(config.seed)
    data = load_data(config, saved and saved["codebook"])
    models = make_models(config, data, device)
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    print(f"nano_spec: {reason}\n{config.task} {data.name}; target {config.depth} layers of {config.dim}, "
          f"{params['target'] / 1e6:.2f} M parameters; draft 1 layer of {config.draft_dim}, {params['draft'] / 1e6:.2f} M")
    if part in ("all", "train"):
        saved = train(config, models, data, device, dtype, out)
        nats = saved["nats"]
        print(f"test nats per token: target {nats['target']:.3f}, draft {nats['draft']:.3f}; {saved['seconds']:.0f} s")
    metrics |= {"params": params, "nats_per_token": saved["nats"], "train_seconds": saved["seconds"]}
    models.load_state_dict(saved["model"])
    models.requires_grad_(False).eval()
    if part in ("all", "sample"):
        sample(config, models, data, device, out)
    if part in ("all", "bench"):
        metrics |= bench(config, models, data, device, metrics.get("proof", {}).get("tv", {}), out)
        metrics |= {"seconds": time.time() - began, "peak_memory_mb": peak_memory_mb(device)}
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        print(f"total {metrics['seconds']:.0f} s, peak memory {metrics['peak_memory_mb']:.0f} MB")
        check(config, metrics)
    return metrics


if __name__ == "__main__":
    sys.exit(cli(main))
