"""Mutation fuzzing: whatever a user's file or command line holds, a script reads it correctly or refuses it in one line.

    python tests/fuzz.py --cases 20000 --seed 0          all readers; prints a table, and each violation with its seed
    python tests/fuzz.py --reader csv --only 1234 -v     one case again, with the input that it was given

A case is made from (seed, reader, number) alone: a good input, mutated one to three times (bits, cuts, insertions, repeated
chunks, header fields at their extremes, another file in its place; cells and encodings of tables; words of a command line).
The reader runs in this process. It must end in a reading that an independent, slow reading confirms, or in exit code 2 and one
line "nano_x: what, where, what to do" on stderr. Anything else is a violation: a traceback, two lines, a wrong value, a
warning, 20 seconds, 1 GB. Good inputs, not mutated, come too, and must be read: to refuse everything is no cure.
"""
import argparse
import ast
import collections
import contextlib
import csv
import datetime
import gzip
import io
import json
import math
import os
import pathlib
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import torch

import nano_ar
import nano_spec
import nano_tok
import nano_ts
import nano_var

SCRIPTS = (nano_ar, nano_tok, nano_var, nano_spec, nano_ts)
EXTREME = [bytes([b]) * n for b in (0, 255, 127, 128, 1) for n in (1, 2, 4, 8)] + [b"\x7f\xff\xff\xff", b"\x80\0\0\0"]


# --- mutations ------------------------------------------------------------------------------------------------------------
def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def mutate(rng, data, other=b""):
    """bytes -> other bytes; half of the places lie in the first 64 bytes, where headers are."""
    for _ in range(rng.integers(1, 4)):
        i = int(rng.integers(max(1, min(len(data), 64) if rng.random() < 0.5 else len(data))))
        j = i + int(rng.integers(1, 64))
        kind = rng.integers(9)
        if kind == 0 and data:
            data = data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i + 1:]
        elif kind == 1:
            data = data[:i]
        elif kind == 2:
            data = data[:i] + rng.bytes(int(rng.integers(1, 9))) + data[i:]
        elif kind == 3:
            data = data[:i] + data[j:]
        elif kind == 4:
            data = data[:j] + data[i:j] * int(rng.integers(1, 20)) + data[j:]
        elif kind in (5, 6):
            extreme = pick(rng, EXTREME)
            data = data[:i] + extreme + data[i + len(extreme):]
        elif kind == 7:
            data = pick(rng, [other, data + other, b"", data + b"\0" * 9])
        else:
            data = data[i:j] + data[:i] + data[j:]
    return data


def gzip_bomb(head, megabytes):
    """`head`, then so many megabytes of zeros, about 1 KB each: a gzip file may have many members."""
    return gzip.compress(head) + gzip.compress(bytes(2**24), 6) * (megabytes // 16)


def zip_bomb(path, members, megabytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, head in members.items():
            with file.open(name, "w", force_zip64=True) as member:
                member.write(head)
                for _ in range(megabytes // 16):
                    member.write(bytes(2**24))


# --- independent readings -------------------------------------------------------------------------------------------------
def idx_bytes(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_by_hand(raw):
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        return None
    sizes = struct.unpack_from(f">{raw[3]}I", raw, 4)
    body = raw[4 + 4 * raw[3]:]
    return np.frombuffer(body, np.uint8).reshape(sizes) if len(body) == math.prod(sizes) and len(sizes) < 33 else None


def npy_by_hand(raw):
    if raw[:6] != b"\x93NUMPY":
        return None
    wide = 2 if raw[6] == 1 else 4
    end = 8 + wide + int.from_bytes(raw[8:8 + wide], "little")
    header = ast.literal_eval(raw[8 + wide:end].decode("latin1").strip())
    dtype = np.dtype(header["descr"])
    values = np.frombuffer(raw[end:], dtype, count=math.prod(header["shape"]))
    return values.reshape(header["shape"], order="F" if header["fortran_order"] else "C")


def pairs(images, labels):
    """What an image set holds, whatever the order: how often each image comes with each label; None: not an image set."""
    if images is None or labels is None or images.dtype != np.uint8 or images.shape[1:] not in ((28, 28), (32, 32)):
        return None
    if len(images) < 20 or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        return None
    if labels.min() < 0 or labels.max() > 999:
        return None
    pad = (32 - images.shape[1]) // 2
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad)))
    return collections.Counter((x.tobytes(), int(y)) for x, y in zip(padded, labels))


def quietly(function, *arguments):
    """What the independent reading gives; None where it fails."""
    try:
        return function(*arguments)
    except Exception:
        return None


# --- readers: (rng, folder) -> script, what to call, what to check, what was given, whether it must be read ------------------
def image_set(rng):
    side, n = pick(rng, [28, 32]), int(rng.integers(20, 30))
    return rng.integers(0, 256, (n, side, side), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)


def reads_images(script, path, wanted, whole):
    def call():
        return script.load_images(str(path), 0)

    def check(value):
        x, y, test_x, test_y = (part.numpy() for part in value)
        assert wanted is not None, "read, but it is not an image set"
        assert pairs(np.concatenate([x, test_x]), np.concatenate([y, test_y])) == wanted, "another reading"
        assert len(test_x) == (len(x) + len(test_x)) // 10 and value[0].is_contiguous()
    return script, call, check, path, whole


def case_idx(rng, folder):
    images, labels = image_set(rng)
    script, gz = pick(rng, SCRIPTS[:3]), rng.random() < 0.5
    inner, untouched = [idx_bytes(images), idx_bytes(labels)], rng.random() < 0.05
    which = [] if untouched else pick(rng, [[0], [0], [1], [0, 1]])
    outer_level = gz and rng.random() < 0.5
    raw = [gzip.compress(part, 1) for part in inner] if outer_level else inner
    for i in which:
        raw[i] = mutate(rng, raw[i], raw[1 - i])
    if gz and not outer_level:
        raw = [gzip.compress(part, 1) for part in raw]
    names = [f"x-images-idx3-ubyte{'.gz' * gz}", f"x-labels-idx1-ubyte{'.gz' * gz}"]
    arrays = []
    for name, content in zip(names, raw):
        (folder / name).write_bytes(content)
        content = quietly(gzip.decompress, content) if gz else content
        arrays.append(None if content is None else quietly(idx_by_hand, content))
    wanted = pairs(*arrays)
    return reads_images(script, folder / names[0], wanted, wanted is not None)  # exactly the good ones are read


def case_npz(rng, folder):
    images, labels = image_set(rng)
    labels = labels.astype(pick(rng, [np.uint8, np.int64, np.int32, np.uint16]))
    path, members, whole = folder / "set.npz", {}, rng.random() < 0.05
    for name, array in (("images.npy", images), ("labels.npy", labels)):
        members[name] = io.BytesIO()
        np.save(members[name], array)
        members[name] = members[name].getvalue()
    kind = "none" if whole else pick(rng, ["outer", "outer", "inner", "inner", "header", "array", "names"])
    name = pick(rng, list(members))
    if kind == "inner":
        members[name] = mutate(rng, members[name], members["labels.npy"])
    if kind == "header":
        old = {b"'|u1'": [b"'|O'", b"'<f8'", b"'|b1'", b"'<M8[s]'", b"'|S1'", b"[('a', '|u1')]", b"'|V1'", b"'>i8'", b"'U9'"],
               b"(": [b"(-1, ", b"(10**9, ", b"(1000000000000, ", b"((", b"(2.5, ", b"('a', ", b"(True, ", b"(" * 300, b"(0, "],
               b"False": [b"True", b"None", b"1", b"__import__('os')"], b"}": [b", 'x': 1}", b"", b"} + {}", b"L}"]}
        target = pick(rng, list(old))
        members[name] = members[name].replace(target, pick(rng, old[target]), 1)
    if kind == "array":
        strange = [np.array([object()] * 25), np.zeros((25, 28, 28)), np.zeros((25, 28, 28, 1), np.uint8), np.array("x"),
                   np.zeros((0, 28, 28), np.uint8), np.full(25, -1), np.full(25, 2**63, np.uint64), np.full(25, 0.5),
                   np.array(5), np.zeros((25, 2), int), np.zeros(25, [("a", int)]), np.zeros((25, 28, 28), np.int8)]
        members[name] = io.BytesIO()
        np.save(members[name], pick(rng, strange), allow_pickle=True)
        members[name] = members[name].getvalue()
    if kind == "names":
        change = pick(rng, ["gone", "renamed", "twice", "raw"])
        if change == "renamed":
            members["../" + name] = members[name]
        if change in ("gone", "renamed"):
            del members[name]
        if change == "raw":
            members[name] = b"text"
        if change == "twice":
            members["images"] = members["labels.npy"]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", pick(rng, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        warnings.simplefilter("ignore")
        for member, content in members.items():
            file.writestr(member, content)
    if kind == "outer":
        path.write_bytes(mutate(rng, path.read_bytes(), pick(rng, list(members.values()))))

    def by_hand():
        with zipfile.ZipFile(path) as file:                      # reads each member whole, so it compares the checksums
            found = {member: file.read(member) for member in file.namelist()}
        return pairs(*(npy_by_hand(found.get(name[:-4], found.get(name))) for name in ("images.npy", "labels.npy")))
    return reads_images(pick(rng, SCRIPTS[:3]), path, quietly(by_hand), whole)


CELLS = ["", "nan", "NaN", "inf", "-inf", "1e400", "-1e400", "1e308", "1e150", "9" * 400, "1e-400", "1,5", "1.234,5", "1.5", "12.5",
         "1,000.5", "0x10", "1_000", "\u0663", "\uff11", "--1", "+-1", "1-", ".", ",", "e", "1e", '"', "'", '""', "a", "\0",
         " 7 ", "\t", "\u00a05", "=1+1", "#N/A", "9999-12-31", "0001-01-01", "2024-13-45", "2024-02-30", "10000-01-01",
         "2024-01-01T00:00:00+14:00", "2024-01-01 25:00", "20240101", "2024-W05-1", "2024", "-5", "1\n2", "1\r2", "\u2028", "\ufeff",
         "\U0001f600", "x" * 200, "true", "None", "1 2", "1;2", "$_$", "${", "31/12/2024", "2024-01"]


def table_text(rng):
    """A good table of one of six kinds -> rows of cells, separator, --dates."""
    n, kind = int(rng.integers(30, 60)), int(rng.integers(6))
    values = np.round(np.cumsum(rng.normal(size=(n, 2)), 0), 3)
    first, form = datetime.datetime(int(rng.integers(1900, 2100)), int(rng.integers(1, 13)), 1), ""
    header, separator, rows = ["date", "v", "w"], ",", []
    for i, (a, b) in enumerate(values.tolist()):
        cells = [f"{a}", f"{b}"]
        if kind == 0:
            head = [str(first + datetime.timedelta(hours=i))]
        elif kind == 1:
            head, cells = [f"{first + datetime.timedelta(days=i):%Y-%m-%d}"], [cell.replace(".", ",") for cell in cells]
            separator = ";"
        elif kind == 2:
            header, head = ["year", "month", "v", "w"], [str(first.year + i // 12), str(i % 12 + 1)]
        elif kind == 3:
            head, form = [f"{first + datetime.timedelta(days=7 * i):%d/%m/%Y}"], "%d/%m/%Y"
        elif kind == 4:
            header, head = ["v", "w", "note"], []
            cells.append(pick(rng, ["a", "b"]))
        else:
            header, separator, head = ["when", "v", "w", "remark"], ";", [str(first + datetime.timedelta(minutes=15 * i))]
            cells.append(pick(rng, ["fog, rain", "sun"]))
        rows.append(head + cells)
    return [header, *rows], separator, form


def case_csv(rng, folder):
    rows, separator, form = table_text(rng)
    whole = rng.random() < 0.05
    for _ in range(0 if whole else rng.integers(0, 5)):
        r, c = int(rng.integers(len(rows))), int(rng.integers(max(1, len(rows[0]))))
        row = rows[r] = list(rows[r])
        kind = rng.integers(10)
        if kind < 5 and c < len(row):
            row[c] = pick(rng, CELLS)
        elif kind == 5:
            del row[c:]
        elif kind == 6:
            row.insert(c, pick(rng, CELLS))
        elif kind == 7:
            rows[r:r] = [row] * int(rng.integers(1, 4))
        elif kind == 8:
            for other in rows[1:]:
                other[c:c + 1] = [pick(rng, CELLS)]
        else:
            rows = rows[:1] + [rows[i] for i in rng.permutation(np.arange(1, len(rows)))]
    text = pick(rng, ["\n", "\n", "\r\n", "\r"]).join(separator.join(row) for row in rows) + "\n"
    if not whole and rng.random() < 0.15:
        other = pick(rng, [",", ";", "\t", "|", '"'])
        text = text.replace(separator, other)
    data = text.encode(pick(rng, ["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]) if not whole else "utf-8", "replace")
    if not whole and rng.random() < 0.4:
        data = mutate(rng, data, b'date,v\n"' + b"x" * 140_000)
    path = folder / "table.csv"
    path.write_bytes(data)
    target = "" if whole or rng.random() < 0.8 else pick(rng, ["v", "w", "nothing", "", "date"])
    if not whole and rng.random() < 0.1:
        form = pick(rng, ["%d/%m/%Y", "%Y %Y", "%", "%Q", "(", "%Y-%m-%d", "%%", "%s", "%y%m%d%H%M%S%f", "%c", "\n"])
    config = SimpleNamespace(data=str(path), target=target, dates=form, period=int(pick(rng, [0, 0, 1, 7, 24, 10**9 - 1])), seed=0)

    def call():
        return nano_ts.load_series(config)

    def check(series):
        assert series.table.shape == (len(series.dates), len(series.columns)) and series.table.dtype == float
        assert not np.isinf(series.table).any() and np.isfinite(series.table[0]).all()
        compare_table(path, form, series)
        nano_ts.fill(series.table, series.period)
        with np.errstate(all="raise", under="ignore"):           # what comes next must not leave 64 bits
            np.nanstd(series.table, 0)
        nano_ts.advance(series.dates[0], series.step, len(series.dates) + 100)
    return nano_ts, call, check, path, whole


def cell_number(cell, comma):
    """Literal: digits, one decimal sign, groups of three by points beside decimal commas."""
    cell = cell.strip()
    if comma:
        head, mark, tail = cell.partition(",")
        if "." in head:
            sign, first, *groups = head[:1] if head[:1] in "+-" else "", *head.lstrip("+-").split(".")
            if not 1 <= len(first) <= 3 or any(len(group) != 3 for group in groups):
                return math.nan
            head = sign + first + "".join(groups)
        if "." in tail or "," in tail:
            return math.nan
        cell = head + "." * bool(mark) + tail
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return math.nan if "_" in cell or not abs(value) < 1e100 else value


def cell_date(cell, form):
    cell = cell.strip()
    try:
        if form:
            return datetime.datetime.strptime(cell, form).replace(tzinfo=None)
        return datetime.datetime.fromisoformat(cell[:-1] if cell.endswith("Z") else cell + "-01" * (len(cell) == 7)).replace(tzinfo=None)
    except Exception:
        return None


def compare_table(path, form, series):
    """Every row of the file, by the csv module and float(), against the tick of the clock that it belongs to."""
    text = path.read_bytes().decode("utf-8-sig")
    first_line = io.StringIO(text, newline="").readline()
    separator = max(",;\t", key=first_line.count)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if any(cell.strip() for cell in row)]
    header, body = rows[0], [row + [""] * (len(rows[0]) - len(row)) for row in rows[1:]]
    assert not any(cell for row in body for cell in row[len(header):]), "a row is wider than the header"
    places = [header.index(column) for column in series.columns]
    comma = separator == ";" and any("," in cell and not math.isnan(cell_number(cell, True)) for row in body for cell in row)
    ticks = {date: t for t, date in enumerate(series.dates)}
    dated = isinstance(series.dates[0], datetime.datetime)
    keys = list(range(len(body)))
    if dated:
        for place, name in enumerate(header):
            keys = [cell_date(row[place], form) for row in body]
            if sum(key is not None and key.year < 9000 for key in keys) > 0.9 * len(keys):
                break
        else:
            lower = {name.strip().lower(): i for i, name in enumerate(header)}
            parts = [lower[part] for part in ("year", "month", "day", "hour") if part in lower]
            keys = [cell_date(" ".join(row[part] for part in parts), "%Y %m %d %H"[:3 * len(parts) - 1]) for row in body]
    expected = np.full(series.table.shape, math.nan)
    for key, row in zip(keys, body):
        if key is None or dated and key.year >= 9000:
            continue
        if key in ticks:
            expected[ticks[key]] = [cell_number(row[place], comma) for place in places]
        else:
            assert dated or key < series.dates[0] or key > series.dates[-1], "a numbered row is missing"
    exact = [t for date, t in ticks.items() if date in set(keys)]  # rows beside the ticks have no say
    inside = [t for t in exact if not np.isnan(expected[t]).all()]
    assert len(inside) >= 0.5 * np.isfinite(series.table).any(1).sum(), "ticks are not the dates of the file"
    assert np.array_equal(series.table[inside], expected[inside], equal_nan=True), "another reading"


TEXTS = [b"to be or not to be, that is the question: ", "na\u00efve caf\u00e9 \u4f60\u597d 123 456\r\n".encode(), b"aaaaaaaa    \n\n\t", bytes(range(256)),
         b"\0\0\0\xff\xff", b"GATTACAGATTACA", b"  a  b  "]


def case_text(rng, folder):
    path, whole = folder / "book.txt", rng.random() < 0.05
    data = b"".join(pick(rng, TEXTS) for _ in range(rng.integers(40, 60)))
    data = data if whole else mutate(rng, data, rng.bytes(200))
    path.write_bytes(data)
    if rng.random() < 0.5:
        def call():
            text = nano_tok.load_text(str(path))
            merges = nano_tok.train_bpe(text, 256 + 30)
            bpe = nano_tok.BPE(json.loads(json.dumps(merges)))
            return text, merges, bpe.encode(text), bpe

        def check(value):
            text, merges, tokens, bpe = value
            assert text == data and bpe.decode(tokens) == data and len(merges) <= 30
            assert not tokens or max(tokens) < 256 + len(merges)
        return nano_tok, call, check, path, len(data) >= 20

    def read():
        return nano_spec.load_data(SimpleNamespace(data=str(path), context=40))

    def same(value):
        assert bytes(value.test_text) == data[len(data) * 9 // 10:] and abs(value.unigram.sum() - 1) < 1e-9
        assert (value.train[0].tolist() == list(data[:41])) and value.train.shape[1] == 41
    return nano_spec, read, same, path, len(data) - len(data) * 9 // 10 > 40


def plain(state):
    """Nested dicts and lists with bytes for tensors, so that == compares bit for bit."""
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    return (str(state.dtype), tuple(state.shape), state.numpy().tobytes()) if isinstance(state, torch.Tensor) else state


def checkpoint_of(script, folder):
    """A small checkpoint, with the settings of the script -> its path, its state."""
    path = folder / "last.pt"
    config = {name: default for name, (default, _, _) in script.FLAGS.items()}
    state = {"config": config, "step": 3, "history": [{"step": 3, "train": 1.5}], "losses": [1.0],
             "model": {"w": torch.arange(300.0), "b": torch.ones(3, 4, dtype=torch.int64)}, "optimizers": [{"lr": 0.1}]}
    script.save(path, state)
    return path, {"script": script.NAME, **state}


def case_checkpoint(rng, folder):
    script, whole = pick(rng, SCRIPTS), rng.random() < 0.05
    path, state = checkpoint_of(script, folder)
    if not whole:
        path.write_bytes(mutate(rng, path.read_bytes(), rng.bytes(100)))

    def check(value):
        assert plain(value) == plain(state), "a changed checkpoint was accepted"
    return script, lambda: script.load(path), check, path, whole


VALUES = ["", "0", "1", "-1", "2", "32", "0.5", "1e400", "-1e400", "nan", "inf", "-inf", "1e-9", "999999999", "9" * 30, "9" * 5000, "0x10", "1_0",
          "\u0663", "\u00b2", "a", "\n", "two\nlines", "caf\u00e9", "\udcff", "\U0001f600", " 5", "5 ", "--", "-", "-x", "--seed", "cpu", "gpu",
          "all", "glyphs", "%", "%s", "%(prog)s", "{}", "None", "True", "../..", "/dev/null", "x" * 300, "'", '"', "$HOME", "\u2028"]


def case_argv(rng, folder):
    script = pick(rng, SCRIPTS)
    checkpoint_of(script, folder)
    flags = ["--" + name.replace("_", "-") for name in script.FLAGS]
    argv = []
    for _ in range(rng.integers(0, 4)):
        flag = pick(rng, flags)
        default, allowed, _ = script.FLAGS[flag[2:].replace("-", "_")]
        good = pick(rng, allowed) if isinstance(allowed, tuple) else str(default)
        argv += [flag] if default is False else [flag, good]
    if rng.random() < 0.5:
        argv.insert(0, pick(rng, ["all", *script.PARTS]))
    if rng.random() < 0.5:
        argv += ["--out", str(folder)]
    whole = rng.random() < 0.03 and script is not nano_ts
    for _ in range(0 if whole else rng.integers(1, 4)):
        i, kind = int(rng.integers(len(argv) + 1)), rng.integers(7)
        if kind == 0:
            argv[i:i] = [pick(rng, flags), pick(rng, VALUES)]
        elif kind == 1:
            argv[i:i + 1] = [pick(rng, VALUES)]
        elif kind == 2:
            argv.insert(i, pick(rng, flags) + "=" + pick(rng, VALUES))
        elif kind == 3:
            del argv[i:i + 1]
        elif kind == 4:
            argv.insert(i, pick(rng, ["--unknown", "--ste", "-s", "--Seed", "---seed", "--se\u00e9d", "-h", "--seed", "--resume=1", "@file"]))
        elif kind == 5:
            argv += argv[i:i + 2]
        elif argv:
            word = argv[i - 1]
            argv[i - 1] = word[:len(word) // 2] + pick(rng, ["", "\0", "\u00e9", " ", "-"]) + word[len(word) // 2:]

    def check(value):
        part, config = value[:2]
        assert part in ("all", *script.PARTS)
        wanted, k = {}, 0
        while k < len(argv):                                     # the last of each flag wins
            name, mark, text = argv[k].partition("=")
            k += 1
            if name.startswith("--") and name != "--":
                if not mark and name != "--resume":
                    text, k = argv[k], k + 1
                wanted[name[2:].replace("-", "_")] = text
        for name, (default, allowed, _) in script.FLAGS.items():
            setting = getattr(config, name)
            assert type(setting) is type(default), f"{name} is {setting!r}"
            assert not isinstance(allowed, tuple) or setting in allowed, f"{name} is {setting!r}"
            assert not isinstance(allowed, (int, float)) or allowed <= setting < 1e9, f"{name} is {setting!r}"
            if name in wanted:
                assert setting == (True if default is False else type(default)(wanted[name])), f"{name} is {setting!r}"
    return script, lambda: script.read_settings(argv), check, argv, False


READERS = {"idx": case_idx, "npz": case_npz, "csv": case_csv, "text": case_text, "checkpoint": case_checkpoint, "argv": case_argv}


# --- running --------------------------------------------------------------------------------------------------------------
def judge(script, call, check, given, must_be_read):
    """Run one case -> "read", "refused" or "help"; AssertionError: what is wrong with it."""
    out, err, began = io.StringIO(), io.StringIO(), time.perf_counter()
    verdict = "read"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            value = call()
    except SystemExit as stop:
        verdict = "refused" if stop.code == 2 else "help"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise AssertionError(f"{type(error).__name__}: {error} ({pathlib.Path(where.filename).name}:{where.lineno})") from error
    said, seconds = err.getvalue() + "".join(f"{warning.message}\n" for warning in warned), time.perf_counter() - began
    assert seconds < 20, f"took {seconds:.0f} s"
    if verdict == "refused":
        assert said.startswith(script.NAME + ": ") and said.count("\n") == 1 == len(said.splitlines()), f"said {said!r}"
        assert len(said) > len(script.NAME) + 12 and (not said.rstrip().endswith(":") or "unrecognized" in said), f"said {said!r}"
        assert out.getvalue() == "" or script is nano_ts, "printed before it refused"
        assert not must_be_read, f"a good input was refused: {said}"
    if verdict == "read":
        assert said == "", f"read, but said {said!r}"
        check(value)
    return verdict


def run_case(reader, seed, number, folder):
    rng = np.random.default_rng([seed, zlib.crc32(reader.encode()), number])
    return judge(*READERS[reader](rng, folder))


def peak_megabytes():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def bombs(folder):
    """Real ones, above 1 GB each, and headers that claim terabytes -> {what: case}."""
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {"descr": "|u1", "fortran_order": False, "shape": (1_400_000, 28, 28)})
    good = io.BytesIO()
    np.save(good, np.zeros(25, np.uint8))
    head = b"\0\0\x08\x03" + struct.pack(">3I", 1_400_000, 28, 28)
    claims = b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 28, 28)
    files = {"gzip bomb": ("a-images-idx3-ubyte.gz", gzip_bomb(head, 1040)),
             "gzip bomb, a small header": ("b-images-idx3-ubyte.gz", gzip_bomb(idx_bytes(np.zeros((25, 28, 28), np.uint8)), 1040)),
             "IDX claims 3 TB": ("c-images-idx3-ubyte", claims + bytes(10_000)),
             "IDX claims 3 TB, gzip": ("d-images-idx3-ubyte.gz", gzip.compress(claims + bytes(10_000)))}
    for name, content in files.values():
        (folder / name).write_bytes(content)
    zip_bomb(folder / "e.npz", {"images.npy": npy.getvalue(), "labels.npy": good.getvalue()}, 1040)
    files["zip bomb"] = ("e.npz", b"")
    with zipfile.ZipFile(folder / "f.npz", "w") as file:
        file.writestr("images.npy", npy.getvalue().replace(b"1400000, 28", b"9000000000000, 28").replace(b"  \n", b"\n", 1)[:128])
        file.writestr("labels.npy", good.getvalue())
    files["npz member claims terabytes"] = ("f.npz", b"")
    cases = {what: reads_images(nano_ar, folder / name, None, False) for what, (name, _) in files.items()}
    for script in SCRIPTS:
        path = folder / f"{script.NAME}.pt"
        zip_bomb(path, {"last/data.pkl": b"\x80\x02}q\0.", "last/data/0": b""}, 1040 if script is nano_ar else 32)
        cases[f"checkpoint of {script.NAME} is a zip bomb"] = (script, lambda s=script, p=path: s.load(p), None, path, False)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=list(READERS), action="append")
    parser.add_argument("--only", type=int)
    parser.add_argument("-v", action="store_true")
    options = parser.parse_args()
    readers, violations = options.reader or list(READERS), 0
    numbers = [options.only] if options.only is not None else range(options.cases // len(readers))
    start = peak_megabytes()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        os.chdir(folder)
        if not options.reader:
            for what, case in bombs(folder).items():
                began, before = time.perf_counter(), peak_megabytes()
                try:
                    result = judge(*case)
                    assert result == "refused", "it was read"
                except AssertionError as error:
                    result, violations = f"VIOLATION {error}", violations + 1
                print(f"{what:42} {result}, {time.perf_counter() - began:5.2f} s, peak + {peak_megabytes() - before:.0f} MB", flush=True)
        print(f"{'reader':12}{'cases':>8}{'read':>8}{'refused':>9}{'help':>6}{'violations':>12}{'slowest s':>11}{'peak MB':>9}")
        for reader in readers:
            counts, slowest = collections.Counter(), 0.0
            for number in numbers:
                began = time.perf_counter()
                try:
                    counts[run_case(reader, options.seed, number, folder)] += 1
                except AssertionError as error:
                    counts["violation"] += 1
                    print(f"VIOLATION --reader {reader} --seed {options.seed} --only {number}: {error}", flush=True)
                    if options.v:
                        traceback.print_exc()
                slowest = max(slowest, time.perf_counter() - began)
                if options.v:
                    rng = np.random.default_rng([options.seed, zlib.crc32(reader.encode()), number])
                    given = READERS[reader](rng, folder)[3]
                    print(given.read_bytes()[:3000] if isinstance(given, pathlib.Path) else given, dict(counts))
            violations += counts["violation"]
            print(f"{reader:12}{sum(counts.values()):8}{counts['read']:8}{counts['refused']:9}{counts['help']:6}"
                  f"{counts['violation']:12}{slowest:11.2f}{peak_megabytes():9.0f}", flush=True)
        os.chdir(pathlib.Path(__file__).parent)
    print(f"{violations} violations; peak memory {peak_megabytes():.0f} MB, of which {start:.0f} before the first case")
    sys.exit(violations > 0 or peak_megabytes() > 1024)


if __name__ == "__main__":
    main()
