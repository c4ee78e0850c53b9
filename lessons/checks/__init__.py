"""What the checks of all lessons share: to say in one line what failed, to try wrong solutions, to run small.

A check is a function `check_NAME(function)` in `checks/lesson_NN.py`. It compares the student's `NAME` with an oracle
that shares no code with the solution, and calls `need` or `close`; the first that fails raises `Wrong`.
`@exercise(...)` above it holds the kill list: wrong solutions, each of which the check must refuse.
"""

import contextlib
import functools
import os
import warnings

import matplotlib.pyplot as plt
import torch

plt.rcParams["figure.dpi"] = 70  # a solved notebook holds its pictures: at 70 dots per inch it stays under 400 KB


class Wrong(Exception):
    """The student's function is wrong. Nothing else counts: a check that only crashes has examined nothing."""


class Skip(Exception):
    """The exercise cannot be examined on this machine, for instance because triton is missing."""


def need(condition, message):
    """The message names the likely mistake: "the last row is missing: did the loop stop one early?"."""
    if not condition:
        raise Wrong(message)


def close(ours, truth, message, tolerance=1e-5):
    """Shape first, then values, each within `tolerance` (absolute, and relative to the truth); NaN is never close."""
    ours, truth = torch.as_tensor(ours).detach(), torch.as_tensor(truth).detach()
    need(ours.shape == truth.shape, f"{message}: shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}")
    ours, truth = ours.double().cpu(), truth.double().cpu()
    wrong = ~torch.isclose(ours, truth, rtol=tolerance, atol=tolerance)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())  # the first place that differs
        need(False, f"{message}: at {list(place)} {ours[place]:.6g}, wanted {truth[place]:.6g}")


def unwritten(error):
    """Is this the `raise NotImplementedError("about 4 lines, ...")` of a stub? Triton wraps what a kernel raises."""
    while error is not None:
        if isinstance(error, NotImplementedError) and str(error).startswith("about"):
            return True
        error = error.__cause__
    return False


def examine(check, function):
    """Verdict and one line about it: right, wrong, unwritten, skipped, or crashed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a wrong solution divides by zero: numpy's remark only hides our line
            check(function)
    except Wrong as error:
        return "wrong", f"not yet. {error}"
    except Skip as error:
        return "skipped", f"skipped, {error}"
    except Exception as error:
        if unwritten(error):
            return "unwritten", "not written yet"
        return "crashed", f"stopped with {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return "right", "right"


def exercise(*kills):
    """Makes a check of a lesson: called with a function it prints one line and never raises.

    kills: the wrong solutions (why, old, new): in the solution's source, `old` (which occurs once) becomes `new`;
    or (why, function) where an edit would be clumsy.
    """

    def decorate(check):
        @functools.wraps(check)
        def say(function):
            verdict, line = examine(check, function)
            known = f" (this check refuses {len(kills)} wrong solutions)" if verdict == "right" else ""
            print(f"{say.name}: {line}{known}")

        say.check, say.kills, say.name = check, kills, check.__name__.removeprefix("check_")
        return say

    return decorate


def mutants(exercise, source, names):
    """The kill list as (why, function): each edit applied to `source`, the solved cell, and run beside `names`."""
    for why, *wrong in exercise.kills:
        if callable(wrong[0]):
            yield why, wrong[0]
            continue
        old, new = wrong
        assert source.count(old) == 1, f"{exercise.name}, {why!r}: {old!r} occurs {source.count(old)} times, not once"
        yield why, run_cell(source.replace(old, new), f"<{exercise.name}: {why}>", dict(names))[exercise.name]


def run_cell(source, title, names):
    """Run one cell as Jupyter would, in the dictionary `names`; Triton and tracebacks find its lines by the title."""
    import linecache

    linecache.cache[title] = len(source), None, source.splitlines(True), title
    exec(compile(source, title, "exec"), names)
    return names


def steps(n, few=2):
    """n, or `few` where the tests only want to see a cell run: every length of a training or a sample goes through it."""
    return min(n, few) if os.environ.get("NANO_LESSON_FEW") else n


def band(what, value, low, high):
    """Where a figure should land, wider than the noise of seeds; a short run of the tests lands anywhere."""
    verdict = "in the band" if low <= value <= high else "OUTSIDE the band"
    print(f"{what} {value:.3g}: {verdict} {low:g} to {high:g}")


@contextlib.contextmanager
def put(module, name, function):
    """`with put(nano_x, "f", my_f):` the script runs with the student's function, and has its own again afterwards.

    An unwritten function ends the block with one line.
    """
    own = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    except Exception as error:
        if not unwritten(error):
            raise
        print(f"{name}: not written yet, so the script was not run with it")
    finally:
        setattr(module, name, own)
