"""What a long run meets: kills, broken, foreign and hostile checkpoints, a full disk, a loss that is not a number.

One set of tests for all scripts that train. A killed run is a forked copy of this process: it dies of a real SIGKILL at a moment
that a seed has chosen, and costs no second start of torch. More of them: NANO_KILLS=50 pytest tests/test_faults.py -k kill
"""
import contextlib
import io
import json
import os
import pathlib
import pickle
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import nano_ar
import nano_spec
import nano_tok
import nano_ts
import nano_var
from fuzz import plain

DATA = pathlib.Path(tempfile.gettempdir(), f"nano-faults-{os.getpid()}")
FLAGS = {  # so small that a run takes about half a second
    nano_ar: "--data toy.npz --steps 10 --dim 32 --depth 1 --codebook 16 --batch 8",
    nano_tok: "--data toy.npz --steps 10 --width 16 --codebook 16 --batch 8 --queries 4",
    nano_var: "--data toy.npz --tok-steps 4 --steps 5 --width 8 --codebook 16 --code-dim 4 --dim 32 --depth 1 --batch 8",
    nano_spec: "--data book.txt --steps 6 --dim 32 --depth 1 --draft-dim 32 --context 64 --batch 4",
    nano_ts: "",
}
scripts = pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)
forks = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has loaded torch")
KILLS = int(os.environ.get("NANO_KILLS", 0)) // len(FLAGS) or 2


@pytest.fixture(scope="module", autouse=True)
def data():
    DATA.mkdir(exist_ok=True)
    images, labels = nano_ar.glyphs(100, 0)
    np.savez(DATA / "toy.npz", images=images, labels=labels)
    (DATA / "book.txt").write_text("".join(f"line {i} of a book that counts its lines.\n" for i in range(100)))
    yield
    shutil.rmtree(DATA)


def go(script, out, resume=False):
    """Train, or go on, with the state in out/last.pt."""
    if script is nano_ts:                                        # its nets are trained one by one; here one is enough
        defaults = {name: default for name, (default, _, _) in nano_ts.FLAGS.items()}
        config = SimpleNamespace(**defaults | {"width": 8, "resume": resume})
        torch.manual_seed(0)
        wave = torch.sin(torch.arange(300)[:, None] / 4 + torch.arange(2))
        nano_ts.train(nano_ts.SegmentDecoder(24, 3, 24, 8, 1), wave, (105, 4, 1e-3), config, out / "last.pt")
    else:
        flags = ["--resume"] if resume else FLAGS[script].replace("--data ", f"--data {DATA}/").split()
        script.main(["train", *flags, "--device", "cpu", "--out", str(out)])


def stopped(script, function, *arguments):
    """Call what must end as a user's mistake, or as the machine's -> the one line that it says."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        script.run_as_program(lambda: function(*arguments))
    said = err.getvalue()
    assert stop.value.code == 2 and said.startswith(f"{script.NAME}: ") and said.count("\n") == 1, said
    assert not warned, warned[0]                                 # as a program it would be a second line
    return said


def result(path):
    """All that a run has kept, bit for bit, but the time it took and where it lay."""
    state = plain(torch.load(path, weights_only=True))
    state.pop("seconds", None)
    if "config" in state:
        state["config"] = {name: value for name, value in state["config"].items() if name not in ("out", "resume")}
    return state


class Watch:
    """Counts the moments of a run: a function of the script begins, ends, or calls one in C. Kills the process at one of them."""

    def __init__(self, script, at=0):
        self.file, self.at, self.moment, self.saving = script.__file__, at, 0, []

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename != self.file:                # torch does more in a first run than in the next
            return
        self.moment += 1
        if self.moment == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if frame.f_code.co_name == "save":
            self.saving.append(self.moment)

    @contextlib.contextmanager
    def on(self):
        sys.setprofile(self)
        try:
            yield self
        finally:
            sys.setprofile(None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """script -> folder of a run that nothing has happened to, its result, its moments. Made when asked for."""
    made = {}

    def make(script):
        if script not in made:
            out = tmp_path_factory.mktemp(script.__name__)
            with contextlib.redirect_stdout(io.StringIO()), Watch(script).on() as watch:
                go(script, out)
            made[script] = out, result(out / "last.pt"), watch
        return made[script]
    return make


def in_a_fork(function):
    """Call it in a copy of this process -> its exit status (negative: the signal that killed it) and its stderr."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writing, 2)
            sys.stdout, sys.stderr, status = io.StringIO(), open(2, "w", closefd=False), 1
            function()
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with open(reading) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def torn(count, share):
    """An os.fsync that at its call number `count` leaves only a share of the file on the disk: then the power is gone."""
    calls = []

    def fsync(file):
        calls.append(file)
        if len(calls) == count:
            os.ftruncate(file, int(share * os.fstat(file).st_size))
            os.kill(os.getpid(), signal.SIGKILL)
    return fsync


def killed(script, out, rng, moments, how):
    """Start or go on, and die: anywhere, inside `save`, or in the middle of its write."""
    def run():
        if how == "torn":
            os.fsync = torn(rng.integers(1, 3), rng.random())
        with Watch(script, at).on():
            go(script, out, (out / "last.pt").exists())
    at = {"torn": 0, "save": rng.choice(moments.saving), "anywhere": rng.integers(1, moments.moment)}[how]
    return in_a_fork(run)


@forks
@scripts
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_that_is_killed_and_resumed_ends_as_the_run_that_was_not(script, number, whole, tmp_path):
    """Bit for bit: weights, optimizers, history. Every third run is killed twice."""
    _, wanted, moments = whole(script)
    rng, died = np.random.default_rng([number, len(script.__name__)]), 0
    for kill in range(2 if number % 3 == 2 else 1):
        how = ("torn", "save", "anywhere")[(number + kill) % 3]
        status, said = killed(script, tmp_path, rng, moments, how)
        died += status == -signal.SIGKILL
        assert status == -signal.SIGKILL or kill and status == 0, said  # what is left may end before its moment comes
        if (tmp_path / "last.pt").exists():
            script.load(tmp_path / "last.pt")                    # whole, whenever it was
    assert died
    with contextlib.redirect_stdout(io.StringIO()):
        if script is not nano_ts and not (tmp_path / "last.pt").exists():
            assert "train first" in stopped(script, go, script, tmp_path, True)
            go(script, tmp_path)
        else:
            go(script, tmp_path, resume=True)
    assert result(tmp_path / "last.pt") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@scripts
def test_a_cut_or_turned_checkpoint_is_refused_and_left_alone(script, whole, tmp_path):
    """Cut at 12 lengths. One bit turned at 60 places: refused, or, between the parts of the archive, of no effect."""
    good, path, refused = (whole(script)[0] / "last.pt").read_bytes(), tmp_path / "last.pt", 0
    rng = np.random.default_rng(0)
    for length in [0, 1, 4, 30, 1000, len(good) - 1, len(good) - 22, *rng.integers(len(good), size=5)]:
        path.write_bytes(good[:length])
        assert "is broken" in stopped(script, script.load, path)
    for place in rng.integers(len(good), size=60):
        turned = bytearray(good)
        turned[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(turned)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                script.load(path)
            assert result(path) == whole(script)[1], f"a bit of byte {place} has changed, and the reading with it"
        except SystemExit:
            refused += 1
    assert refused > 30                                          # the parts are most of it
    path.write_bytes(turned)
    assert "is broken" in stopped(script, go, script, tmp_path, True) and path.read_bytes() == turned


def foreign(folder):
    """Files that are no checkpoints of ours -> {what: path}."""
    paths = {what: folder / f"{what}.pt" for what in ("text", "empty", "zip", "tensor", "net", "old", "lone", "npz")}
    paths["text"].write_text("epoch,loss\n1,0.5\n")
    paths["empty"].write_bytes(b"")
    with zipfile.ZipFile(paths["zip"], "w") as file:
        file.writestr("readme.txt", "hello")
    torch.save(torch.zeros(3), paths["tensor"])
    torch.save({"epoch": 3, "state_dict": torch.nn.Linear(2, 2).state_dict()}, paths["net"])
    torch.save({"script": "nano_ar"}, paths["old"], _use_new_zipfile_serialization=False)
    torch.save({"script": None}, paths["lone"])
    with open(paths["npz"], "wb") as file:
        np.savez(file, images=np.zeros((20, 28, 28), np.uint8))
    (folder / "folder.pt").mkdir()
    return {**paths, "folder": folder / "folder.pt"}


@scripts
def test_foreign_files_are_refused(script, whole, tmp_path):
    for path in foreign(tmp_path).values():
        assert "not a checkpoint of" in stopped(script, script.load, path), path.name
    for other in FLAGS:
        if other is not script:                                  # a real one, of another script
            assert "not a checkpoint of" in stopped(script, script.load, whole(other)[0] / "last.pt")


def wrong(state):
    """A good state -> {what: one that lacks a part, or has one of another type or shape}."""
    made = {}
    for key in state.keys() - {"script", "seconds", "codebook"}:  # without these a run goes on: reported only, or made again
        made[f"no {key}"] = {name: value for name, value in state.items() if name != key}
        if key != "tokenizer_history":                           # that one is only reported
            made[f"a number as {key}"] = state | {key: 5.5}
    if "codebook" in state:
        made["a codebook of vectors twice as long"] = state | {"codebook": state["codebook"].repeat(1, 2)}
        made["a codebook of words"] = state | {"codebook": "words"}
    made["seconds of words"] = state | {"seconds": "words"}
    for key in state.keys() & {"model", "models", "tokenizer"}:
        first, *others = state[key]
        made[f"{key} of a foreign name"] = state | {key: {"foreign": state[key][first], **state[key]}}
        made[f"{key} without {first}"] = state | {key: {name: state[key][name] for name in others}}
        made[f"{first} of one more axis"] = state | {key: state[key] | {first: state[key][first][None]}}
        made[f"{first} twice as wide"] = state | {key: state[key] | {first: state[key][first].repeat_interleave(2, -1)}}
    *some, last = state["optimizers"]
    means = {i: {name: x[..., None] if x.dim() else x for name, x in m.items()} for i, m in last["state"].items()}
    made["one optimizer too few"] = state | {"optimizers": some}
    made["running means of another shape"] = state | {"optimizers": [*some, last | {"state": means}]}
    made["an optimizer of fewer weights"] = state | {"optimizers": [*some, last | {"param_groups": [last["param_groups"][0] | {"params": [0]}]}]}
    return made


@scripts
def test_a_checkpoint_that_lacks_something_or_fits_another_network_is_refused(script, whole, tmp_path):
    state, path = torch.load(whole(script)[0] / "last.pt", weights_only=True), tmp_path / "last.pt"
    cases = wrong(state)
    if script is not nano_ts:
        for setting in ({"seed": "0"}, {"seed": -1}, {"seed": None}, {"device": "cpu", "depth": 2, "blocks": 2}, {"preset": "huge"}):
            cases[f"with {setting}"] = state | {"config": state["config"] | setting}
    for what, case in cases.items():
        script.save(path, case)
        with contextlib.redirect_stdout(io.StringIO()):
            said = stopped(script, go, script, tmp_path, True)
        assert any(word in said for word in ("train again", "drop --resume", "--seed -1", "choose one of")), (what, said)
        if script is not nano_ts and what in ("no model", "no models", "no tokenizer_history"):
            stopped(script, script.main, [script.PARTS[1], "--out", str(tmp_path)])
    script.save(path, state)
    with contextlib.redirect_stdout(io.StringIO()):
        go(script, tmp_path, True)                               # and the whole one is taken
    assert result(path) == whole(script)[1]


class Call:
    """Pickled, it is the order to call a function when it is read back."""

    def __init__(self, function, *arguments):
        self.__reduce__ = None
        self.order = function, arguments

    def __reduce_ex__(self, protocol):
        return self.order


@scripts
def test_hostile_pickles_do_nothing(script, tmp_path):
    """Orders to make a file, as a raw pickle, in torch's old format and inside a whole archive, beside good settings."""
    orders, marker, path = [], tmp_path / "marker", tmp_path / "hostile.pt"
    for order in (Call(os.system, f"touch {marker}"), Call(exec, f"open({str(marker)!r}, 'w')"), Call(open, str(marker), "w")):
        orders += [{"script": script.NAME, "config": {}, "step": 1, "model": order}, order]
    for number, state in enumerate(orders):
        for write in (lambda: path.write_bytes(pickle.dumps(state)), lambda: torch.save(state, path),
                      lambda: torch.save(state, path, _use_new_zipfile_serialization=False)):
            write()
            assert "is broken" in stopped(script, script.load, path) and not marker.exists()
        torch.save(state, path)                                  # the orders are real: without weights_only they are obeyed
        torch.load(path, weights_only=False)
        assert marker.exists(), number
        marker.unlink()


@forks
@scripts
def test_a_full_disk_costs_one_line_and_leaves_the_old_checkpoint_whole(script, whole, tmp_path):
    """A limit on the size of files stands for the disk: nothing, or a part of the new file, can be written."""
    import resource
    path = tmp_path / "last.pt"
    shutil.copy(whole(script)[0] / "last.pt", path)
    before = path.read_bytes()
    for room in (0, 1000, 9000):                                # of some 100,000 bytes
        def run():
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            script.run_as_program(lambda: go(script, tmp_path))
        status, said = in_a_fork(run)
        assert status == 2 and said.startswith(f"{script.NAME}: cannot use") and said.count("\n") == 1, said
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


WRITES = {  # a part of the script, the files that it writes, in order, besides pictures
    nano_ar: ("eval --samples 20", ("samples.npz", "metrics.json")), nano_tok: ("eval", ("tokens.npz", "metrics.json")),
    nano_var: ("eval --samples 20", ("samples.npz", "metrics.json")), nano_spec: ("bench --new 8", ("metrics.json",)),
    nano_ts: (f"forecast --data {DATA}/days.csv --model repeat --horizon 2 --period 1 --level 0.5", ("forecast.csv", "metrics.json")),
}


def no_room(at):
    """An os.fsync that finds the disk full, with half of a file on it, at its call number `at`."""
    calls = []

    def fsync(file):
        calls.append(file)
        if len(calls) == at:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            raise OSError(28, "no space left", "a file")
    return fsync


@scripts
def test_results_are_all_of_the_old_file_or_all_of_the_new(script, whole, tmp_path, monkeypatch):
    """The disk is full at each of the writes in turn: what came before is new, this one and all after it are old."""
    days = [f"2024-01-{i + 1:02},{i * i % 7}" for i in range(31)] + [f"2024-02-{i + 1:02},{i * i % 7}" for i in range(29)]
    (DATA / "days.csv").write_text("\n".join(["date,v", *days]) + "\n")
    part, names = WRITES[script]
    argv = [*part.split(), "--device", "cpu", "--out", str(tmp_path)]
    if script is not nano_ts:
        shutil.copy(whole(script)[0] / "last.pt", tmp_path)
        monkeypatch.setattr(script, *{nano_spec: ("bench", lambda *_: ({}, {}))}.get(script, ("evaluate", lambda *_: {})))
        monkeypatch.setattr(script, "print_bench" if script is nano_spec else "print_summary", lambda *_: None)
    for at in range(1, len(names) + 2):                          # the last time nothing fails
        for name in names:
            (tmp_path / name).write_bytes(b"old")
        monkeypatch.setattr(os, "fsync", no_room(at))
        with contextlib.redirect_stdout(io.StringIO()):
            if at <= len(names):
                assert "no space left" in stopped(script, script.main, argv)
            else:
                script.main(argv)
        assert [(tmp_path / name).read_bytes() == b"old" for name in names] == [i >= at - 1 for i in range(len(names))]
        assert not list(tmp_path.glob("*.part"))
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    for name in names[:-1]:                                      # the first is a table or arrays, and whole
        assert (tmp_path / name).read_bytes()[-1:] == b"\n" if name.endswith("csv") else len(np.load(tmp_path / name).files) > 1


@forks
@scripts
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(script, tmp_path):
    def run():
        os.fsync = torn(1, 0.5)
        script.write(tmp_path / "metrics.json", b"new" * 1000)
    (tmp_path / "metrics.json").write_bytes(b"old")
    assert in_a_fork(run)[0] == -signal.SIGKILL and (tmp_path / "metrics.json").read_bytes() == b"old"
    script.write(tmp_path / "metrics.json", b"new" * 1000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"metrics.json": b"new" * 1000}


LOSSES = {nano_ar: "loss_of", nano_var: "nats", nano_spec: "loss_of"}


@scripts
def test_a_loss_that_is_not_a_number_stops_before_it_is_saved(script, whole, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    shutil.copy(whole(script)[0] / "last.pt", path)
    before, place, name = path.read_bytes(), script, LOSSES.get(script, "mse_loss")
    if script is nano_tok:
        place = script.F
    if script is nano_ts:
        place, name = nano_ts.SegmentDecoder, "loss"
    true = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *inputs: true(*inputs) * float("nan"))
    assert "nan" in stopped(script, go, script, tmp_path)
    if script is not nano_var:                                   # there the tokenizer was saved, before the loss was nan
        assert path.read_bytes() == before
    else:
        assert "model" not in torch.load(path)
        assert "finish it by train --resume" in stopped(script, script.main, ["sample", "--out", str(tmp_path)])
        monkeypatch.setattr(script.F, "mse_loss", lambda *inputs: inputs[0].sum() * float("nan"))
        before = path.read_bytes()
        assert "nan at step 1" in stopped(script, go, script, tmp_path) and path.read_bytes() == before


def test_codes_that_die_of_nan_end_in_the_same_line(tmp_path):
    """nano_tok: nan in weights and codes, long enough that codes are declared dead; the report comes after 80 steps."""
    flags = FLAGS[nano_tok].replace("toy.npz", f"{DATA}/toy.npz").replace("--steps 10", "--steps 400 --lr 1e8").split()
    argv = ["train", *flags, "--device", "cpu", "--out", str(tmp_path)]
    assert "lower --lr" in stopped(nano_tok, nano_tok.main, argv) and not list(tmp_path.iterdir())
