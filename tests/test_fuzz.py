"""Bad input: a few seeded cases of fuzz.py, and more than a hundred that were thought of by hand. One line, exit code 2, no memory."""
import contextlib
import gzip
import io
import os
import struct
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fuzz
import nano_ar
import nano_spec
import nano_tok
import nano_ts
import nano_var
from fuzz import SCRIPTS, idx_bytes

AR, TOK, VAR, SPEC, TS = SCRIPTS
IMAGES, LABELS = np.zeros((25, 28, 28), np.uint8), np.arange(25, dtype=np.uint8) % 10


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_seeded_mutations_are_read_right_or_refused_in_one_line(reader, tmp_path):
    counts = {"read": 0, "refused": 0, "help": 0}
    for number in range(80):
        try:
            counts[fuzz.run_case(reader, 1, number, tmp_path)] += 1
        except AssertionError as error:
            raise AssertionError(f"python tests/fuzz.py --reader {reader} --seed 1 --only {number} -v: {error}") from error
    assert counts["read"] > 3 and counts["refused"] > 3


def refused(script, call):
    """-> the one line that it says."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        with pytest.raises(SystemExit) as stop:
            script.run_as_program(call)
    said = err.getvalue()
    assert stop.value.code == 2 and said.startswith(script.NAME + ": ") and said.count("\n") == 1, said
    return said


# --- command lines --------------------------------------------------------------------------------------------------------
EVERYWHERE = [("--unknown", "unrecognized"), ("--see", "unrecognized"), ("nonsense", "invalid choice"), ("all extra words", "extra words"),
              ("--seed", "expected one argument"), ("--seed=--", "--"), ("--out=--", "-- is no value"), ("--seed -1", "from 0 on"), ("--seed 1.5", "invalid int"), ("--seed nan", "invalid int"),
              ("--seed 9999999999", "below a billion"), ("--seed " + "9" * 5000, "invalid int"), ("--device tpu", "choose one of"),
              ("--device=", "choose one of"), ("--preset huge", "choose one of"), ("--resume=yes", "ignored explicit argument"),
              ("--out good.npz", "cannot use good.npz"), ("--out good.npz/sub", "cannot use good.npz/sub")]
ONE = [
    (AR, "--dim 48", "multiple of 32"), (AR, "--dim 0", "from 32 on"), (AR, "--dim -32", "from 32 on"), (AR, "--lr nan", "--lr nan"),
    (AR, "--lr inf", "--lr inf"), (AR, "--lr=-1e-3", "from 0 on"), (AR, "--lr 1e400", "--lr inf"), (AR, "--lr", "expected one argument"),
    (AR, "--top-p 1.5", "at most 1"), (AR, "--top-p 0", "from 0.001 on"), (AR, "--samples 5", "from 10 on"), (AR, "--codebook 1", "from 2 on"),
    (AR, "--steps 0", "from 1 on"), (AR, "--batch 0", "from 1 on"), (AR, "--batch 1e3", "invalid int"), (AR, "--temperature -0.1", "from 0 on"),
    (AR, "--guidance nan", "--guidance nan"), (AR, "--precision fp8", "auto, fp32, bf16"), (AR, "--depth 0x4", "invalid int"),
    (AR, "eval", "train first"), (AR, "sample", "train first"), (AR, "complete", "train first"), (AR, "train --resume", "train first"),
    (AR, "--data missing.npz", "missing.npz"), (AR, "--data nothing", "not glyphs, mnist"), (AR, "--data=", "not glyphs, mnist"),
    (AR, "--data .", "not glyphs, mnist"), (AR, "--data short.txt", "not glyphs, mnist"), (AR, "--data missing-images-idx3-ubyte", "No such file"),
    (TOK, "--quantizer pq", "vq, rvq"), (TOK, "--quantizer=", "vq, rvq"), (TOK, "--quantizer fsq --levels 8,2", "--levels 8,2"), (TOK, "--quantizer fsq --levels 8,x", "from 3 on"),
    (TOK, "--quantizer fsq --levels=", "--levels"), (TOK, "--quantizer fsq --levels 8,,6", "--levels 8,,6"), (TOK, "--quantizer fsq --levels \u00b2", "from 3 on"), (TOK, "--quantizer fsq --levels -8", "from 3 on"),
    (TOK, "--depth 3", "--depth has no effect on --quantizer vq"), (TOK, "--quantizer vq --depth=2", "--depth has no effect"),
    (TOK, "--levels 8,6,5", "--levels has no effect"), (TOK, "--quantizer rvq --levels=8,8,8", "--levels has no effect"), (TOK, "--quantizer fsq --codebook 256", "--codebook has"),
    (TOK, "--quantizer=fsq --code-dim 8", "--code-dim has"), (TOK, "--quantizer fsq --depth 1", "--depth has"), (TOK, "bpe --depth 2", "--depth has"),
    (TOK, "--width 20", "multiple of 16"), (TOK, "--batch 1", "from 2 on"), (TOK, "--queries -1", "from 0 on"), (TOK, "--code-dim 0", "from 1 on"),
    (TOK, "bpe --vocab 100", "from 256 on"), (TOK, "bpe --text missing.txt", "No such file"), (TOK, "bpe --text .", "Is a directory"),
    (TOK, "bpe --text short.txt", "too few"), (TOK, "eval", "train first"), (TOK, "bpe --text=", "Is a directory"),
    (VAR, "--dim 48", "multiple of 32"), (VAR, "--last-top-p 2", "at most 1"), (VAR, "--tok-steps 0", "from 1 on"), (VAR, "--tok-lr nan", "--tok-lr nan"),
    (VAR, "--width 4", "from 8 on"), (VAR, "sample", "train first"), (VAR, "--data good.npz.bak", "not glyphs, mnist"),
    (SPEC, "--dim 48", "multiples of 32"), (SPEC, "--draft-dim 40", "multiples of 32"), (SPEC, "--context 39", "from 40 on"),
    (SPEC, "--new 200", "more than --context"), (SPEC, "--top-p 2", "at most 1"), (SPEC, "--top-k -1", "from 0 on"), (SPEC, "--gamma 2.5", "invalid int"),
    (SPEC, "--prompts 0", "from 1 on"), (SPEC, "--data missing.txt", "No such file"), (SPEC, "--data .", "Is a directory"),
    (SPEC, "--data short.txt", "less than --context"), (SPEC, "bench", "train first"), (SPEC, "prove --resume", "train first"),
    (TS, "--level 1", "below 1"), (TS, "--level 0", "from 0.01 on"), (TS, "--level nan", "--level nan"), (TS, "--width 6", "a multiple of 4"),
    (TS, "--layers 0", "from 1 on"), (TS, "--period -7", "from 0 on"), (TS, "--horizon two", "--horizon two"), (TS, "--horizon 0", "--horizon 0"),
    (TS, "--horizon=-5", "--horizon -5"), (TS, "--horizon 1.5", "--horizon 1.5"), (TS, "--horizon \u00b2", "number of steps"), (TS, "--horizon ,", "--horizon ,"),
    (TS, "--horizon 999999999", "too few"), (TS, "--period 999999999", "too few"), (TS, "--model magic", "no model 'magic'"), (TS, "--model sar+", "no model ''"),
    (TS, "--model ,", "no model ''"), (TS, "--target nothing", "no column nothing"), (TS, "--dates %d.%m.%Y", "no column holds dates"),
    (TS, "--dates %Y_%Y", "no column holds dates"), (TS, "--dates %", "no column holds dates"), (TS, "--data missing.csv", "No such file"),
    (TS, "--data .", "Is a directory"), (TS, "--data known --target a", "are for a file"), (TS, "--data etth1 --horizon 0", ""),
]
LINES = [(script, line, word) for script in SCRIPTS for line, word in EVERYWHERE] + ONE


@pytest.mark.parametrize("script, line, word", LINES, ids=[f"{script.NAME} {line[:40]}" for script, line, _ in LINES])
def test_command_lines(script, line, word, tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DATA", str(tmp_path))
    (tmp_path / "etth1.csv").write_text("date,v\n")
    (tmp_path / "ETTh1.csv").write_text(table())
    np.savez(tmp_path / "good.npz", images=IMAGES, labels=LABELS)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "good.csv").write_text(table())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    argv = [word.replace("_", " ") if word == "%Y_%Y" else word for word in line.split(" ")]
    data = {SPEC: [], TS: ["--data", "good.csv"]}.get(script, ["--data", "good.npz"])
    text_only = argv[0] == "bpe"                                 # that word must stand first
    argv = argv[:text_only] + ([] if "--data" in line else data) + (argv[text_only:])
    argv += [] if "--out" in line else ["--out", str(tmp_path / "out")]
    assert word in refused(script, lambda: script.main(argv))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert not list(tmp_path.glob("out/*"))                      # nothing half-written


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.NAME)
def test_too_large_for_memory_is_one_line_and_other_errors_stay_errors(script):
    for call in (lambda: torch.empty(2**58), lambda: torch.empty(2**40, 2**40), lambda: np.empty(2**58), lambda: [0] * 2**58):
        assert "more memory than there is" in refused(script, call)
    with pytest.raises(RuntimeError, match="invalid"):
        script.run_as_program(lambda: torch.zeros(2).view(3))


# --- files ----------------------------------------------------------------------------------------------------------------
def gz(data):
    return gzip.compress(data, 1)


HEAD, GOOD, TAGS = b"\0\0\x08\x03", idx_bytes(IMAGES), idx_bytes(LABELS)
IDX = {  # what: images, labels (None: no file), a word; x.gz: compressed
    "empty": (b"", TAGS, "no IDX file"), "three bytes": (HEAD[:3], TAGS, "no IDX file"), "text": (b"hello world", TAGS, "no IDX file"),
    "floats": (b"\0\0\x0d\x03" + GOOD[4:], TAGS, "no IDX file"), "little-endian": (HEAD + np.array([25, 28, 28], "<u4").tobytes() + IMAGES.tobytes(), TAGS, "unpack it first"),
    "rank 0": (b"\0\0\x08\0a", TAGS, "uint8 ()"), "rank 255": (b"\0\0\x08\xff" + GOOD[4:], TAGS, ""), "rank 2": (idx_bytes(IMAGES[0]), TAGS, "(28, 28)"),
    "header alone": (GOOD[:16], TAGS, "is cut"), "half a header": (GOOD[:9], TAGS, "is cut"), "one byte short": (GOOD[:-1], TAGS, "is cut"),
    "one byte long": (GOOD + b"\0", TAGS, "longer than"), "no images": (idx_bytes(IMAGES[:0]), TAGS, "20 images"), "19 images": (idx_bytes(IMAGES[:19]), TAGS, "20 images"),
    "27 x 27": (idx_bytes(IMAGES[:, 1:, 1:]), TAGS, "28 x 28"), "one count less": (HEAD + struct.pack(">3I", 24, 28, 28) + GOOD[16:], TAGS, "longer than"),
    "count -1": (HEAD + struct.pack(">3i", -1, 28, 28) + GOOD[16:], TAGS, "unpack it first"), "claims 3 TB": (HEAD + struct.pack(">3I", 2**32 - 1, 28, 28), TAGS, "unpack it first"),
    "claims 2**96": (HEAD + b"\xff" * 12, TAGS, "unpack it first"), "no labels": (GOOD, None, "labels-idx1"), "labels empty": (GOOD, b"", "no IDX file"),
    "labels of another": (GOOD, idx_bytes(LABELS[:24]), "needs 25 labels"), "images as labels": (GOOD, GOOD, "needs 25 labels"), "labels cut": (GOOD, TAGS[:-3], "is cut"),
    "swapped": (TAGS, GOOD, "needs 20 images"), "not gzip.gz": (GOOD, gz(TAGS), "gzip"), "cut.gz": (gz(GOOD)[:-20], gz(TAGS), "end-of-stream"),
    "a bit of its checksum.gz": (gz(GOOD)[:-8] + bytes([gz(GOOD)[-8] ^ 1]) + gz(GOOD)[-7:], gz(TAGS), "CRC"), "empty.gz": (b"", gz(TAGS), "no IDX file"),
    "garbage behind.gz": (gz(GOOD) + b"garbage", gz(TAGS), "gzip"), "twice.gz": (gz(GOOD) * 2, gz(TAGS), "longer than"), "text.gz": (gz(b"hello world"), gz(TAGS), "no IDX file"),
    "claims 3 TB.gz": (gz(HEAD + struct.pack(">3I", 2**32 - 1, 28, 28)), gz(TAGS), "unpack it first"), "zip.gz": (b"PK\3\4" + GOOD, gz(TAGS), "gzip"),
}


@pytest.mark.parametrize("what", IDX)
def test_idx_files(what, tmp_path):
    images, labels, word = IDX[what]
    end = ".gz" if what.endswith(".gz") else ""
    (tmp_path / f"a-images-idx3-ubyte{end}").write_bytes(images)
    if labels is not None:
        (tmp_path / f"a-labels-idx1-ubyte{end}").write_bytes(labels)
    assert word in refused(AR, lambda: AR.load_images(str(tmp_path / f"a-images-idx3-ubyte{end}"), 0))


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, content in members.items():
            out.writestr(name + ".npy", content)
    return file.getvalue()


def turned(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


CLAIM = npy(IMAGES).replace(b"(25, 28, 28), }            ", b"(25000000000000, 28, 28), }")
NPZ = {
    "empty": (b"", "not a zip"), "text": (b"hello", "not a zip"), "cut": (npz(images=IMAGES, labels=LABELS)[:-30], "not a zip"), "an .npy": (npy(IMAGES), "not a zip"),
    "no members": (archive(), "images"), "no labels": (npz(images=IMAGES), "labels"), "no images": (npz(labels=LABELS), "images"),
    "other names": (npz(x=IMAGES, y=LABELS), "images"), "pickled objects": (npz(images=np.array([object] * 25), labels=LABELS), "allow_pickle"),
    "floats": (npz(images=IMAGES / 255, labels=LABELS), "float64"), "signed": (npz(images=IMAGES.astype(np.int8), labels=LABELS), "int8"),
    "16 bits": (npz(images=IMAGES.astype(np.uint16), labels=LABELS), "uint16"), "colour": (npz(images=np.zeros((25, 28, 28, 3), np.uint8), labels=LABELS), "28, 3"),
    "flat": (npz(images=IMAGES.reshape(25, -1), labels=LABELS), "(25, 784)"), "one image": (npz(images=IMAGES[0], labels=LABELS), "(28, 28)"),
    "a number": (npz(images=np.uint8(5), labels=LABELS), "()"), "19": (npz(images=IMAGES[:19], labels=LABELS[:19]), "20 images"), "none": (npz(images=IMAGES[:0], labels=LABELS[:0]), "20 images"),
    "28 x 32": (npz(images=np.zeros((25, 28, 32), np.uint8), labels=LABELS), "28 x 28"), "labels too few": (npz(images=IMAGES, labels=LABELS[1:]), "needs 25 labels"),
    "labels one-hot": (npz(images=IMAGES, labels=np.eye(25, dtype=int)), "needs 25 labels"), "labels floats": (npz(images=IMAGES, labels=LABELS / 1), "float64"),
    "labels text": (npz(images=IMAGES, labels=LABELS.astype(str)), "needs 25 labels"), "label -1": (npz(images=IMAGES, labels=LABELS.astype(int) - 1), "0..999"),
    "label 1000": (npz(images=IMAGES, labels=LABELS.astype(int) + 991), "0..999"), "label 2**63": (npz(images=IMAGES, labels=LABELS.astype(np.uint64) + 2**63), "0..999"),
    "labels bool": (npz(images=IMAGES, labels=LABELS > 3), "needs 25 labels"), "label nan": (npz(images=IMAGES, labels=LABELS * np.nan), "needs 25 labels"),
    "structured": (npz(images=np.zeros(25, [("a", np.uint8)]), labels=LABELS), "20 images"), "no npy": (archive(images=b"hello", labels=npy(LABELS)), ""),
    "cut npy": (archive(images=npy(IMAGES)[:-1], labels=npy(LABELS)), ""), "empty npy": (archive(images=b"", labels=npy(LABELS)), ""),
    "claims 20 PB": (archive(images=CLAIM, labels=npy(LABELS)), ""), "long header": (archive(images=npy(IMAGES).replace(b"\x76\0", b"\xff\xff", 1) + b" " * 70000, labels=npy(LABELS)), ""),
    "a bit": (turned(npz(images=IMAGES, labels=LABELS), 5000), "CRC"),
}


@pytest.mark.parametrize("what", NPZ)
def test_npz_files(what, tmp_path):
    (tmp_path / "a.npz").write_bytes(NPZ[what][0])
    said = refused(AR, lambda: AR.load_images(str(tmp_path / "a.npz"), 0))
    assert NPZ[what][1] in said and len(said) > len("nano_ar: --data ") + len(str(tmp_path)) + 12, said


@pytest.mark.parametrize("script", (AR, TOK, VAR), ids=lambda script: script.NAME)
def test_equal_images_are_refused_and_two_different_ones_are_not(script):
    """With a variance of 0, and a distance of 0 between real images, nothing that is divided by them says anything."""
    first = torch.randperm(25, generator=torch.Generator().manual_seed(0))[0]  # it goes to the tenth to test on
    dot, tested, two = (IMAGES.copy() for _ in range(3))
    dot[:, 5:9, 5:9], tested[first], two[::2, 5:9, 5:9] = 255, 255, 255
    for images in (IMAGES, np.full_like(IMAGES, 90), dot, tested):
        np.savez("equal.npz", images=images, labels=LABELS)
        assert "equal.npz: all images are equal" in refused(script, lambda: script.load_images("equal.npz", 0))
    np.savez("two.npz", images=two, labels=LABELS)
    assert [len(part) for part in script.load_images("two.npz", 0)] == [23, 23, 2, 2]


def table(values=None, days=60, first="2024-01-01", header="date,v"):
    """Days, each with a value of its own."""
    dates = np.datetime64(first) + np.arange(days)
    values = [i * i % 37 for i in range(days)] if values is None else values
    return header + "\n" + "".join(f"{date},{value}\n" for date, value in zip(dates, values))


BIG = '"' + "x" * 200_000
CSV = {  # what: the file, a word, --target, --dates
    "empty": ("", "0 lines"), "a byte order mark": ("\ufeff", "0 lines"), "header alone": ("date,v\n", "1 lines"), "two rows": (table(days=2), "three rows"),
    "blank lines": ("date,v\n" + "\n,\n" * 40, "1 lines"), "UTF-16": (table().encode("utf-16"), "UTF-8"), "Latin-1": (table(header="date,Temp\u00e9rature").encode("latin-1"), "UTF-8"),
    "binary": (bytes(range(256)) * 9, "UTF-8"), "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), "UTF-8"), "a quote that never ends": (table() + '2024-06-01,"5\n' + table(), "end of data"),
    "a cell of 200,000": ("date,v\n" + BIG + '",1\n' * 4, "field larger"), "text after a quote": (table() + '2024-06-01,"5"x\n', "expected after"), "a row too wide": (table() + "2024-03-01,1,5\n", "a row 3"),
    "decimal commas": (table([f"{i},5" for i in range(60)]), "a row 3"), "twice the same name": ("date,v,v\n" + "2024-01-01,1,2\n" * 4, "same name"), "text only": (table(["a"] * 60), "changing numbers"),
    "a constant": (table([5] * 60), "changing numbers"), "a counter": (table(range(60)), "changing numbers"), "nan": (table(["nan"] * 60), "changing numbers"), "inf": (table(["inf", "-inf"] * 30), "changing numbers"),
    "1e400": (table([f"{i}e400" for i in range(60)]), "changing numbers"), "1e200": (table([f"{i * i}e200" for i in range(60)]), "changing numbers"), "hex": (table([hex(i * i) for i in range(60)]), "changing numbers"),
    "underscores": (table([f"{i * i}_0" for i in range(60)]), "changing numbers"), "half missing": (table([i * i if i % 2 else "" for i in range(60)]), "changing numbers"), "dates only": ("date\n" + table().replace(",", "\n"), ""),
    "one date": ("date,v\n" + "".join(f"2024-01-01,{i * i % 7}\n" for i in range(30)), "only one date"), "every date twice": (table() + table(), "no regular clock"), "two stations": (table() + table(days=30), "no regular clock"),
    "no clock": ("date,v\n" + "".join(f"2024-01-01 00:{m:02},{m * m}\n" for m in (0, 1, 2, 4, 9, 17, 33, 58)), "no regular clock"), "a hole of years": (table() + table(days=5, first="2090-01-01"), "no regular clock"),
    "from year 9000 on": (table(first="9990-01-01"), "", "date"), "no row is full": ("date,u,v,w\n" + "".join(f"2024-01-{i + 1:02},{a},{b},{c}\n" for i, (a, b, c) in enumerate([("", 1, 2), (4, "", 9), (7, 3, "")] * 10)), "no row holds all"),
    "no such column": (table(), "no column w", "w"), "a column of text": ("date,v,w\n" + table().split("\n", 1)[1].replace("\n", ",a\n"), "no column w", "w"), "the date as target": (table(), "no column date", "date"),
    "another format": (table(), "no column holds dates", "", "%d/%m/%Y"), "a broken format": (table(), "no column holds dates", "", "%Q"), "a part twice": (table(), "no column holds dates", "", "%Y %Y"),
    "year without numbers": ("year,v\n" + "".join(f"x,{i * i % 7}\n" for i in range(30)), "no cell of the date column"), "month 13": ("year,month,v\n" + "".join(f"2024,{i},{i * i % 7}\n" for i in range(13, 40)), "no cell of the date column"),
}


@pytest.mark.parametrize("what", CSV)
def test_csv_files(what, tmp_path):
    content, word, target, form = (*CSV[what], "", "")[:4]
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    config = SimpleNamespace(data="a.csv", target=target, dates=form, period=0, seed=0)
    assert word in refused(TS, lambda: TS.load_series(config))


def test_what_looks_odd_and_is_right_is_read(tmp_path):
    """The other side: a refusal of everything would pass all tests above."""
    def read(text, **more):
        (tmp_path / "a.csv").write_bytes(text.encode(more.pop("encoding", "utf-8")))
        config = SimpleNamespace(**{"data": "a.csv", "target": "", "dates": "", "period": 0, "seed": 0} | more)
        with contextlib.redirect_stdout(io.StringIO()):
            return TS.load_series(config)
    plain = read(table()).table[:, 0].tolist()
    for text in (table().replace("\n", "\r\n"), table().replace("\n", "\r"), "\ufeff" + table(), table().replace(",", " , "), table().replace(",", '","').replace("\n", '"\n"')[:-1].join('""')[1:-1]):
        assert read(text).table[:, 0].tolist() == plain
    note = table(header="date;v;note").replace(",", ";").replace("\n", ";fog, rain\n").replace("note;fog, rain", "note").replace(";16;", ";12.5;")
    assert 12.5 in read(note).table                              # a comma in a remark is no decimal comma
    assert read(table(header='date,"a, ""b"""')).columns == ['a, "b"']
    assert np.isnan(read(table([1e300 if i == 20 else i * i % 37 for i in range(60)])).table[20, 0])
    assert len(read(table() + "9999-12-31,7\n").dates) == 60     # a date that stands for "never"
    lines = table(['"1\n2"' if i == 20 else i * i % 37 for i in range(60)])
    assert np.isnan(read(lines).table[20, 0])                    # two lines in a cell are no number 12


TEXT = [(TOK, b"", "0 bytes"), (TOK, b"x" * 19, "19 bytes"), (SPEC, b"", "less than"), (SPEC, b"x" * 400, "less than")]


@pytest.mark.parametrize("script, data, word", TEXT, ids=["empty", "19 bytes", "nothing to test on", "a tenth is too short"])
def test_texts(script, data, word, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    reader = {TOK: lambda: TOK.load_text("a.txt"), SPEC: lambda: SPEC.load_data(SimpleNamespace(data="a.txt", context=40))}[script]
    assert word in refused(script, reader)


def test_bombs_and_headers_that_claim_terabytes_cost_no_memory(tmp_path):
    """Each would unpack to 160 MB or more. (fuzz.py does it with a gigabyte, and looks at the whole process.)"""
    claim = HEAD + struct.pack(">3I", 210_000, 28, 28)
    (tmp_path / "a-images-idx3-ubyte.gz").write_bytes(fuzz.gzip_bomb(claim, 160))
    (tmp_path / "b-images-idx3-ubyte.gz").write_bytes(fuzz.gzip_bomb(GOOD, 160))
    (tmp_path / "c-images-idx3-ubyte").write_bytes(IDX["claims 2**96"][0])
    fuzz.zip_bomb(tmp_path / "e.npz", {"images.npy": npy(IMAGES), "labels.npy": npy(LABELS)}, 160)
    fuzz.zip_bomb(tmp_path / "f.pt", {"f/data.pkl": b"\x80\x02}q\0.", "f/data/0": b""}, 160)
    for path in sorted(tmp_path.iterdir()):
        tracemalloc.start()
        refused(AR, lambda: AR.load(path) if path.suffix == ".pt" else AR.load_images(str(path), 0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e6, (path.name, peak)


def test_there_are_more_than_a_hundred_by_hand():
    assert len(LINES) + len(IDX) + len(NPZ) + len(CSV) + len(TEXT) > 250
