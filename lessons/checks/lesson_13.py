"""Checks of lesson 13. Oracles: loops in float64, closed forms, a symmetric matrix root, files whose parts are known."""

import math
import pathlib
import tempfile

import numpy as np
import torch
from PIL import Image

from lessons.checks import close, exercise, need


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# --- decibels ---------------------------------------------------------------------------------------------------------


def mean_of_decibels(a, b):
    """Wrong: the mean over images of what each has."""
    each = (a.double() - b.double()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / each)).mean())


@exercise(
    ("uint8 wraps around", "(a.double() - b.double()).square().mean()", "(a - b).double().square().mean()"),
    ("absolute error", ".square().mean()", ".abs().mean()"),
    ("the peak is not squared", "255**2", "255"),
    ("pixels taken for 0 .. 1", "255**2", "1"),
    ("20, as for amplitudes", "10 * math", "20 * math"),
    ("natural logarithm", "math.log10", "math.log"),
    ("upside down", "255**2 / mse", "mse / 255**2"),
    ("the mean of decibels", mean_of_decibels),
)
def check_psnr(psnr):
    plain = torch.full((1, 4, 4), 100, dtype=torch.uint8)
    close(psnr(plain, plain + 8), 30.0721, "all pixels wrong by 8 (100 and 108)", 1e-4)
    for shape, seed in (((1, 1, 1), 4), ((3, 5, 7), 1), ((2, 32, 32), 2)):
        a, b = (integers(256, *shape, seed=seed + s).byte() for s in (0, 10))
        a[0] = (b[0].int() + 2).clamp(max=255).byte()  # one image much nearer than the others
        pairs = list(zip(a.flatten().tolist(), b.flatten().tolist()))
        mse = sum((x - y) ** 2 for x, y in pairs) / len(pairs)
        case = f"images {shape}; is it the error over all pixels, without the wrap of uint8?"
        close(psnr(a, b), 10 * math.log(65025 / mse, 10), case)
        close(psnr(b, a), 10 * math.log(65025 / mse, 10), case + " (a and b exchanged)")


# --- the distance of two crowds ---------------------------------------------------------------------------------------


def frechet_by_symmetric_root(a, b):
    """tr (AB)^1/2 as the trace of the root of the symmetric A^1/2 B A^1/2."""
    A, B = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    values, vectors = np.linalg.eigh(A)
    half = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(half @ B @ half).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(A) + np.trace(B) - 2 * cross


@exercise(
    ("means forgotten", "means + A.trace()", "A.trace()"),
    ("distance of means not squared", ".square().sum()", ".abs().sum()"),
    ("only one of the two roots", "- 2 * roots", "- roots"),
    ("eigenvalues, not their roots", ".clamp(min=0).sqrt()", ""),
    ("the lower triangle of AB", "torch.linalg.eigvals(A @ B).real", "torch.linalg.eigvalsh(A @ B)"),
    ("roots of the entries", "torch.linalg.eigvals(A @ B).real", "(A @ B).diagonal()"),
    ("root of A times root of B", "torch.linalg.eigvals(A @ B).real", "(torch.linalg.eigvalsh(A) * torch.linalg.eigvalsh(B))"),
    ("A twice", "A.trace() + B.trace()", "2 * A.trace()"),
    ("rounding below 0", ".clamp(min=0)", ""),
)
def check_frechet(frechet):
    a, b = torch.tensor([[-1.0, 0], [0, 0], [1, 0]]).double(), torch.tensor([[1.0, 0], [3, 0], [5, 0]]).double()
    close(frechet(a, b), 10.0, "means 0 and 3, standard deviations 1 and 2 (and a feature that is always 0)")
    for n, m, c in ((9, 12, 2), (40, 31, 5), (300, 200, 32)):
        a, b = normal(n, c) @ normal(c, c, seed=1), normal(m, c, seed=2) @ normal(c, c, seed=3) + 1
        close(frechet(a, b), frechet_by_symmetric_root(a, b), f"features ({n}, {c}) and ({m}, {c})", 1e-6)
    a = torch.cat([normal(50, 4), torch.zeros(50, 4)], 1)  # four features that are always 0, as after a ReLU
    b = torch.cat([normal(50, 4, seed=1), normal(50, 4, seed=1)], 1) @ torch.kron(torch.eye(2), torch.ones(4, 4)).double()
    close(frechet(a, b), frechet_by_symmetric_root(a, b), "features that never vary: is an eigenvalue of -1e-17 kept out of the root?", 1e-5)


# --- headers ----------------------------------------------------------------------------------------------------------


def first_match(raw):
    """Wrong: the first FF DA, which may lie in a comment."""
    scan = raw.find(b"\xff\xda")
    return len(raw) - scan - 2 - int.from_bytes(raw[scan + 2 : scan + 4], "big")


def own_header_kept(raw):
    """Wrong: the header of FF DA counts as pixels."""
    place = 2
    while raw[place + 1] != 0xDA:
        place += 2 + int.from_bytes(raw[place + 2 : place + 4], "big")
    return len(raw) - place


@exercise(
    ("the first FF DA found", first_match),
    ("its own header counted as pixels", own_header_kept),
    ("without the two last bytes", "return len(raw) - place", "return len(raw) - place - 2"),
    ("the headers", "return len(raw) - place", "return place"),
    ("stopped at the tables", "marker != 0xDA", "marker not in (0xDA, 0xDB)"),
    ("stopped at the frame header", "marker != 0xDA", "marker not in (0xDA, 0xC0)"),
    ("one byte of length", "raw[place + 2:place + 4]", "raw[place + 3:place + 4]"),
)
def check_payload(payload):
    import io

    worked = bytes.fromhex("ffd8 fffe00044142 ffda000301") + b"123456789"
    close(payload(worked), 9, "the worked example")
    for size, quality in (((1, 1), 50), ((7, 9), 90), ((32, 32), 5), ((64, 48), 75)):
        file = io.BytesIO()
        Image.fromarray(integers(256, *size, seed=quality).byte().numpy()).save(file, "JPEG", quality=quality)
        raw = file.getvalue()
        scan = raw.rfind(b"\xff\xda")  # the last one: in coded pixels a byte FF is followed by 00
        truth = len(raw) - scan - 2 - (raw[scan + 2] * 256 + raw[scan + 3])
        close(payload(raw), truth, f"a file of {size[0]} x {size[1]} pixels; do you leap over the header of FF DA itself?")
        for comment in (b"\xff\xda\x00\x05ab", b"\xff\xda" * 300):
            length = (len(comment) + 2).to_bytes(2, "big")
            with_comment = raw[:2] + b"\xff\xfe" + length + comment + raw[2:]
            close(payload(with_comment), truth, "a comment holds FF DA: go from segment to segment")


# --- what tokens cost -------------------------------------------------------------------------------------------------


@exercise(
    ("nats", "torch.log2", "torch.log"),
    ("counted on the test images", "torch.bincount(train[:, i]", "torch.bincount(test[:, i]"),
    ("one table for all places", "torch.bincount(train[:, i]", "torch.bincount(train.flatten()"),
    ("unseen tokens cost infinitely much", "counts + 1", "counts"),
    ("probabilities that do not sum to 1", "len(train) + V", "len(train)"),
    ("the mean over places", "return float(bits)", "return float(bits) / train.shape[1]"),
    ("the sum over images", ".mean()", ".sum()"),
    ("the last place only", "bits = bits - torch", "bits = -torch"),
    ("the entropy of training", "torch.log2(p[test[:, i]]).mean()", "(p * torch.log2(p)).sum()"),
)
def check_code_length(code_length):
    close(code_length(torch.tensor([[0], [0], [1]]), torch.tensor([[0]]), 2), 0.736966, "the worked example")
    for n, m, L, V in ((1, 1, 1, 1), (5, 3, 4, 7), (50, 20, 16, 30)):
        train = integers(V, n, L) // integers(3, 1, L, seed=1).add(1)  # places with laws of their own
        test = integers(V, m, L, seed=2) // integers(3, 1, L, seed=1).add(1)
        bits = 0.0
        for image in test.tolist():
            for i, token in enumerate(image):
                seen = sum(row[i] == token for row in train.tolist())
                bits -= math.log((seen + 1) / (n + V), 2)
        close(code_length(train, test, V), bits / m, f"{n} training and {m} test images of {L} tokens below {V}")


# --- a folder of pictures ---------------------------------------------------------------------------------------------


def write_folder(path):
    """Six pictures whose 32 x 32 grey pixels are known -> images, labels as they must come back."""
    noise = integers(256, 32, 32).byte().numpy()
    thirds = np.repeat(np.uint8([10, 120, 250]), 32)[None].repeat(32, 0)  # (32, 96): the middle is 120
    tall = np.full((90, 40), 200, np.uint8)
    tall[15:75] = 60  # the central square of 40 x 40, and some more: shrinking looks a little beyond it
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 255
    for name in ("b", "a", "c"):
        (path / name).mkdir()
    Image.fromarray(noise).save(path / "a" / "2.PNG", "PNG")
    Image.fromarray(thirds).save(path / "a" / "1.png")
    Image.fromarray(tall).save(path / "b" / "x.png")
    (path / "b" / "notes.txt").write_text("no picture")
    Image.fromarray(red).save(path / "c" / "1.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # "turn me a quarter clockwise"
    Image.fromarray(noise).save(path / "c" / "2.png", exif=turned)
    Image.fromarray(np.full((33, 35), 77, np.uint8)).save(path / "c" / "3.jpeg", quality=95)
    flat = [np.full((32, 32), value, np.uint8) for value in (120, 60, 76, 77)]  # grey of red: 0.299 * 255
    return np.stack([flat[0], noise, flat[1], flat[2], np.rot90(noise, -1), flat[3]]), np.array([0, 0, 1, 2, 2, 2])


@exercise(
    ("squeezed, not cropped", "ImageOps.fit(picture, (32, 32))", "picture.resize((32, 32))"),
    ("cropped at the left", "ImageOps.fit(picture, (32, 32))", "ImageOps.fit(picture, (32, 32), centering=(0, 0))"),
    ("the EXIF tag ignored", "ImageOps.exif_transpose(Image.open(file))", "Image.open(file)"),
    ("capitals passed over", "file.suffix.lower()", "file.suffix"),
    ("one kind forgotten", '(".png", ".jpg", ".jpeg")', '(".png", ".jpg")'),
    ("classes backwards", "if p.is_dir())", "if p.is_dir())[::-1]"),
    ("files backwards", "sorted(folder.iterdir())", "sorted(folder.iterdir(), reverse=True)"),
    ("a label for each file", "labels.append(label)", "labels.append(len(labels))"),
    ("floats from 0 to 1", "return np.stack(images), ", "return np.stack(images) / 255, "),
)
def check_read_folder(read_folder):
    with tempfile.TemporaryDirectory() as folder:
        images, labels = write_folder(pathlib.Path(folder))
        ours, classes = read_folder(pathlib.Path(folder))
    close(classes, labels, "labels of the pictures 1.png, 2.PNG of class a, x.png of b, 1.png, 2.png, 3.jpeg of c")
    need(ours.dtype == np.uint8, f"pixels are {ours.dtype}, wanted uint8")
    what = ("96 x 32 in three stripes: the middle one", "2.PNG as it is", "40 x 90: the central square", "red as grey",
            "2.png with EXIF orientation 6: a quarter clockwise", "35 x 33")
    for picture, truth, name in zip(ours, images, what):
        close(picture, truth, name)
