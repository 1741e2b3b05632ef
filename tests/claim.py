"""The paper's claim in miniature (its figure 1): learning from single images < from single-video
tracklets < from identities across videos.

    python tests/claim.py            # make every run that docs/claim.jsonl does not hold yet
    python tests/claim.py r10ibn     # of these, the runs whose command has this word
    python tests/claim.py --list     # the commands
    python tests/claim.py --tables   # write the tables of README.md and docs/claim.md anew

A seed draws a world of its own (the people to learn from and those held out) and everything random
in training. Every run is one command, and every run is a line of the file. What was interrupted
goes on.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import Images, draw_walkers
from evaluate import evaluate_features, read_benchmark

FILE = ROOT / "docs" / "claim.jsonl"
PAGES = ROOT / "README.md", ROOT / "docs" / "claim.md"

# who teaches whom: the rows of the main table
WHO = {
    "instance": "--identities instance",
    "tracklet": "--identities tracklet",
    "cion": "",
    "true": "--identities true",
}
SEEDS = {"r10ibn": (1, 2, 3, 4, 5), "r18ibn": (3, 4, 5), "vit_tiny": (3, 4, 5)}

# the smaller tables, of r10ibn: their flags, row by row; without any flag, the default
LEVELS = ("--identities tracklet", "--levels 1", "--levels 2", "")
LOSS = ("", "--loss release")
GROWTH = ("--K 2 2", "--K 4 4", "--K 8 8", "")
ROUNDS = ("--rounds 1", "--rounds 2", "")
SHARES = (
    "--data data/walkers-SEED-10 --recipe demo",
    "--data data/walkers-SEED-30 --recipe demo",
    "",
)
RECIPE = (
    "",
    "--no-head_norm",
    "--ema 0.996 1",
    "--centering ema",
    "--teacher_temp 0.07",
    "--student_temp 0.2",
    "--prototypes 1024",
    "--prototypes 64",
    "--lr 3e-3",
    "--lr 1.2e-2",
    "--local_crops 0",
    "--local_scale 0.3 0.8",
    "--warmup 0",
    "--identities instance",
    "--identities instance --jitter 0.4 0.4 0.2 0.1 --grey 0.2",
)
SMALL = {
    "levels": (LEVELS, (3, 4, 5)),
    "loss": (LOSS, (3, 4, 5)),
    "growth": (GROWTH, (3, 4, 5)),
    "rounds": (ROUNDS, (3, 4, 5)),
    "shares": (SHARES, (3, 4, 5)),
    "recipe": (RECIPE, (11,)),  # the seed on which it was chosen
}
# people and videos of a world, by the percentage in its folder's name
WORLDS = {"10": (10, 5), "30": (30, 14), "100": (100, 48)}


def command(arch, seed, flags):
    """The command of one run."""
    line = f"torchrun train.py --arch {arch} --seed {seed} {flags}"
    return line.strip().replace("SEED", str(seed))


def commands():
    """Every run once, those of the main table first."""
    runs = []
    for arch, seeds in SEEDS.items():
        runs += [command(arch, seed, flags) for seed in seeds for flags in WHO.values()]
    for rows, seeds in SMALL.values():
        runs += [command("r10ibn", seed, flags) for seed in seeds for flags in rows]
    return list(dict.fromkeys(runs))


# ---------------------------------------------------------------- runs


def world_of(line):
    """The folder of a run's data."""
    folder = re.search(r"data/\S+", line)
    seed = re.search(r"--seed (\d+)", line)[1]
    return folder[0] if folder else f"data/walkers-{seed}"


def draw(folder):
    """Draw a world, data/walkers-SEED or data/walkers-SEED-PERCENT, and rank its held-out people by
    colour: mAP and R1 of the square roots of RGB histograms, 8 bins a channel, of six stripes."""
    _, seed, percent, *_ = f"{folder}-100".split("-")
    if not (ROOT / folder).exists():
        draw_walkers(ROOT / folder, int(seed), *WORLDS[percent])
    benchmark = read_benchmark(ROOT / folder)
    images = Images(benchmark.images, (64, 32))
    bins = np.stack([images[i][0] for i in range(len(images))]) // 32  # (N, 3, 64, 32)
    features = []
    for stripe in np.array_split(bins, 6, axis=2):
        for level in range(8):
            features.append(np.sqrt((stripe == level).mean((2, 3))))
    result = evaluate_features(np.concatenate(features, axis=1), benchmark)
    return {"mAP": result["mAP"], "R1": result["R1"]}


def run(line, histogram, flags):
    """Make a run, or go on with it, and append its figures to the file; False if it failed. flags:
    more flags of train.py, for this machine."""
    name = "claim-" + re.sub(r"[^\w.]+", "-", line.split("--arch ")[1])
    arguments = [*line.split()[1:], "--name", name, "--workers", "0", *flags]
    with open(ROOT / "runs" / f"{name}.log", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    if done.returncode:
        print(f"FAILED, see runs/{name}.log: {line}", flush=True)
        return False
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"command": line, "device": device, "torch": torch.__version__}
    result |= {"flags": " ".join(flags), "histogram": histogram, "stages": {}}
    for event in map(json.loads, open(ROOT / "runs" / name / "log.jsonl")):
        if event["event"] == "evaluate":
            result["stages"][event["stage"]] = {"mAP": event["mAP"], "R1": event["R1"]}
        if event["event"] == "denoise":
            result |= {key: event[key] for key in ("identities", "f1_tracklets", "f1")}
    with open(FILE, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{last(result)['mAP']:.1%}  {line}", flush=True)
    return True


# ---------------------------------------------------------------- tables


def results():
    """What the file holds, by command."""
    lines = map(json.loads, FILE.read_text().splitlines())
    return {line["command"]: line for line in lines}


def last(result):
    """mAP and R1 at a run's end."""
    return list(result["stages"].values())[-1]


def row_of(known, arch, seeds, flags):
    """A row's runs that are there, by seed."""
    lines = {seed: command(arch, seed, flags) for seed in seeds}
    return {seed: known[line] for seed, line in lines.items() if line in known}


def spread(values):
    """Mean and standard deviation, in percent."""
    if not values:
        return ""
    text = f"{100 * np.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {100 * np.std(values, ddof=1):.1f}"
    return text


def difference(scores, others):
    """mAP of a row above another's, seed by seed: mean and standard error, in points."""
    both = scores.keys() & others.keys()
    values = [scores[seed]["mAP"] - others[seed]["mAP"] for seed in both]
    if not values:
        return ""
    text = f"{100 * np.mean(values):+.1f}"
    if len(values) > 1:
        text += f" ± {100 * np.std(values, ddof=1) / np.sqrt(len(values)):.1f}"
    return text


def figures(scores):
    """mAP and R1 of a row's {seed: scores}."""
    return [spread([score[key] for score in scores.values()]) for key in ("mAP", "R1")]


def table(head, rows):
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def claim_table(known, archs):
    """Who taught whom."""
    rows = []
    for arch in archs:
        runs = row_of(known, arch, SEEDS[arch], "")
        scores = {
            "random weights": {seed: run["stages"]["random"] for seed, run in runs.items()},
            "colour histograms": {seed: run["histogram"] for seed, run in runs.items()},
        }
        for who, flags in WHO.items():
            runs = row_of(known, arch, SEEDS[arch], flags)
            scores[f"`{who}`"] = {seed: last(run) for seed, run in runs.items()}
        above = {}
        for name, row in scores.items():
            rows.append([f"`{arch}`", name, *figures(row), difference(row, above), len(row)])
            above = row
    return table(["network", "who teaches whom", "mAP", "R1", "over the row above", "seeds"], rows)


def small_table(known, flags_of_rows, seeds):
    """One choice after the other, of r10ibn."""
    default = {seed: last(run) for seed, run in row_of(known, "r10ibn", seeds, "").items()}
    rows = []
    for flags in flags_of_rows:
        runs = row_of(known, "r10ibn", seeds, flags)
        scores = {seed: last(run) for seed, run in runs.items()}
        f1 = []
        for key in ("f1_tracklets", "f1"):
            values = [run[key] for run in runs.values() if key in run]
            f1.append(f"{np.mean(values):.3f}" if values else "")
        name = f"`{flags}`" if flags else "the default"
        over = difference(scores, default) if flags else ""
        rows.append([name, *f1, *figures(scores), over, len(runs)])
    head = ["flags", "F1 of raw tracklets", "of the labels", "mAP", "R1", "over the default"]
    return table([*head, "seeds"], rows)


def fill(text, known):
    """A page with its tables printed anew, each between <!-- its name --> and <!-- end -->."""
    machines = {"{device}, torch {torch} {flags}".format(**run) for run in known.values()}
    blocks = {"claim": claim_table(known, SEEDS), "claim r10ibn": claim_table(known, ["r10ibn"])}
    blocks["machines"] = "\n".join(sorted(machines))
    for name, (rows, seeds) in SMALL.items():
        blocks[name] = small_table(known, rows, seeds)
    for name, block in blocks.items():
        between = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(between, rf"\1\n{block}\n\n\2", text, flags=re.DOTALL)
    return text


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("word", nargs="?", default="", help="only runs whose command has it")
    add("--list", action="store_true", help="print the commands")
    add("--tables", action="store_true", help="write the tables of README.md and docs/claim.md")
    add("--jobs", type=int, default=2, help="runs at a time, a thread each")
    add("--flags", default="", help='for this machine: --flags="--precision float32 --workers 2"')
    args = parser.parse_args()
    if args.tables:
        for page in PAGES:
            page.write_text(fill(page.read_text(), results()))
        return
    wanted = [line for line in commands() if args.word in line]
    if args.list:
        print("\n".join(wanted))
        return
    missing = [line for line in wanted if line not in results()]
    (ROOT / "runs").mkdir(exist_ok=True)
    # runs of one world would draw it at the same time
    worlds = sorted({world_of(line) for line in missing})
    with ProcessPoolExecutor(args.jobs) as pool:
        histograms = dict(zip(worlds, pool.map(draw, worlds)))
    with ThreadPoolExecutor(args.jobs) as pool:
        colours = [histograms[world_of(line)] for line in missing]
        flags = [args.flags.split()] * len(missing)
        made = list(pool.map(run, missing, colours, flags))
    if not all(made):
        sys.exit(f"{made.count(False)} runs failed")


if __name__ == "__main__":
    main()
