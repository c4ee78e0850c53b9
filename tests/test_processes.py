"""Several processes train what one would: same batches, same losses, same weights. Gloo on the CPU, over this machine's own loopback."""
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import nano_ar
import nano_var

ROOT = pathlib.Path(__file__).parent.parent
TINY = {"nano_ar": "--steps 5 --batch 12 --dim 32 --depth 1 --codebook 16",
        "nano_var": "--tok-steps 4 --steps 5 --batch 12 --dim 32 --depth 1 --codebook 32 --width 8"}
STOPPED = """
import sys, {script} as script
keep = script.save
def save(path, state):
    keep(path, state)
    if "model" in state and state["step"] == 3:
        sys.exit("stopped here")
script.save = save
script.main()
"""


def start(processes, program, script, out, *flags):
    """Run a program with the flags of a tiny training -> the finished process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, str(program), "train", *TINY[script].split(), *flags, "--out", str(out),
               "--data", str(out.parent / "tiny.npz"), "--device", "cpu", "--precision", "fp32"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    blobs = np.kron(random.integers(0, 256, (400, 8, 8)), np.ones((4, 4)))
    np.savez(tmp_path / "tiny.npz", images=blobs.astype(np.uint8), labels=random.integers(0, 3, 400))
    return tmp_path


def same_training(one, two, *histories):
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (one, two))
    for name in histories:
        for mine, theirs in zip(a[name], b[name], strict=True):
            numbers = [key for key in ("train", "test", "error") if key in mine]
            assert numbers and mine["step"] == theirs["step"]
            for key in numbers:
                assert abs(mine[key] - theirs[key]) <= 1e-4 * abs(mine[key]), (name, key, mine, theirs)
    assert a["model"].keys() == b["model"].keys()                   # a checkpoint does not know who made it
    for name, weights in a["model"].items():
        assert torch.allclose(weights, b["model"][name], atol=1e-3), name


def test_two_processes_train_what_one_does(folder):
    for processes, out in ((1, folder / "one"), (2, folder / "two")):
        ended = start(processes, ROOT / "nano_ar.py", "nano_ar", out)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("training images") == 1           # only number 0 speaks
    assert [file.name for file in (folder / "two").iterdir()] == ["last.pt"]
    same_training(folder / "one", folder / "two", "history")


def test_one_process_goes_on_where_two_were_stopped(folder):
    (folder / "stopped.py").write_text(STOPPED.format(script="nano_var"), encoding="utf-8")
    ended = start(2, folder / "stopped.py", "nano_var", folder / "two")
    assert ended.returncode != 0 and "stopped here" in ended.stderr, ended.stderr
    assert torch.load(folder / "two" / "last.pt", weights_only=True)["step"] == 3
    for out, flags in ((folder / "two", ["--resume"]), (folder / "one", [])):
        ended = start(1, ROOT / "nano_var.py", "nano_var", out, *flags)
        assert ended.returncode == 0, ended.stderr
    same_training(folder / "one", folder / "two", "tokenizer_history", "history")


@pytest.mark.parametrize("script", [nano_ar, nano_var], ids=lambda s: s.__name__)
def test_parts_of_a_batch(script, monkeypatch, capsys):
    whole, parts = torch.arange(12).view(6, 2), []
    monkeypatch.setattr(script, "PROCESSES", 3)
    for rank in range(3):
        monkeypatch.setattr(script, "RANK", rank)
        parts.append(script.my_part(whole))
    assert [len(part) for part in parts] == [2, 2, 2] and torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(script, "PROCESSES", 4)
    with pytest.raises(SystemExit) as ended:
        script.my_part(whole)
    assert ended.value.code == 2 and "6 images do not divide by 4 processes" in capsys.readouterr().err


@pytest.mark.parametrize("script", [nano_ar, nano_var], ids=lambda s: s.__name__)
def test_more_processes_than_gpus(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "PROCESSES", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as ended:
        script.meet(torch.device("cuda"))
    assert ended.value.code == 2 and "process 1 finds no GPU of its own" in capsys.readouterr().err
