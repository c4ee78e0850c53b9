"""Where every figure comes from: figures.csv holds what README and docstrings quote, and this shows its age, or measures it again.

    python tests/figures.py                 the table, with the commits that have touched a file since it was measured
    python tests/figures.py --run 100 vq    run again what has vq in its command and takes at most 100 s a run: is it in its band?

Columns: file, and the quote as it stands there; from: a command, or "definition" for what follows from the code, or a paper or lesson that
says so; metric: the path in the command's metrics.json, with a % behind it where the quote is in per cent; seeds: of the numbers in the
quote, in order ({seed} in the command); band: how far a number may lie from a new measurement; seconds of one run; commit and date of the
measurement; machine. One thread of a CPU unless the machine says otherwise; a band holds for other machines, too, seeds being equal.
"""

import argparse
import csv
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"\d[\d,]*\.?\d*|\.\d+")


def rows():
    with open(ROOT / "tests" / "figures.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(quote):
    """'1,034 bytes, .25' -> [1034.0, 0.25]"""
    return [float(text.replace(",", "")) for text in NUMBER.findall(quote)]


def find(metrics, path):
    """Follow a path like models/sar/mse/mean: keys, items of a list by their name, the mean of a dict's values."""
    for key in path.split("/"):
        if isinstance(metrics, list):
            metrics = next(item for item in metrics if item["name"] == key)
        elif key == "mean":
            metrics = sum(metrics.values()) / len(metrics)
        else:
            metrics = metrics[key]
    return metrics


def age(row):
    """Commits that have touched the script of a command since its row was measured; '?' where git does not know."""
    script = re.search(r"(?:nano_\w+|kernels)\.py", row["from"])
    command = ["git", "rev-list", "--count", f"{row['commit']}..HEAD", "--", script[0] if script else row["file"]]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "?"


def measure(row, cache):
    """Run the row's command for each seed -> the numbers now."""
    now = []
    for seed in row["seeds"].split():
        command = row["from"].replace("{seed}", seed)
        if command not in cache:
            with tempfile.TemporaryDirectory() as out:
                kept = Path(os.environ.get("NANO_DATA", "data"))        # where a file of a command may lie
                words = [str(kept / word) if (kept / word).is_file() else word for word in shlex.split(command)]
                argv = [sys.executable, *words[1:], "--out", out]
                subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                cache[command] = json.loads((Path(out) / "metrics.json").read_text(encoding="utf-8"))
        value = find(cache[command], row["metric"].rstrip(" %"))
        now.append(value * 100 if row["metric"].endswith("%") else value)
    return now


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=float, default=0, help="measure again what takes at most so many seconds a run")
    parser.add_argument("only", nargs="?", default="", help="rows whose command holds this text")
    args = parser.parse_args()
    limit, cache, off = args.run, {}, 0
    for row in rows():
        if row["from"] == "definition" or args.only not in row["from"]:
            continue
        since = (datetime.date.today() - datetime.date.fromisoformat(row["date"])).days
        print(f"{row['file']:<14} {row['quote'][:44]:<44} {age(row):>3} commits {since:>4} days   {row['from'][:60]}")
        if row["metric"] and limit and float(row["seconds"]) <= limit:
            for was, now in zip(numbers(row["quote"]), measure(row, cache), strict=True):
                good = abs(was - now) <= float(row["band"])
                off += not good
                print(f"{'':<14} {was:g} now {now:.4g}, band {row['band']}: {'ok' if good else 'OFF'}", flush=True)
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
