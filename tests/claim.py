"""The paper's claim in miniature (its figure 1): learning from single images < from single-video
tracklets < from identities across videos. On walkers, and on people:

    python tests/claim.py            # make every run that docs/claim.jsonl does not hold yet
    python tests/claim.py r10ibn     # of these, the runs whose command has this word
    python tests/claim.py --list     # the commands
    python tests/claim.py --tables   # write the tables of README.md and docs/
    python tests/claim.py --people   # likewise: docs/people.jsonl, with the folders data/market-1,
                                     # -2, -3 of data.py tracklets
    python tests/claim.py --finetune [--people]    # likewise: docs/finetuning.jsonl, of these runs'
                                                   # weights
    python tests/claim.py --curves   # docs/people.svg, docs/finetuning.svg, with matplotlib

A seed is of a world of its own (the people to learn from and those held out) and of everything
random in training. Every run is one command, and every run is a line of the file. What was
interrupted goes on.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import Images, draw_walkers, read_labels, read_tracklets
from evaluate import evaluate_features, read_benchmark
from train import RECIPES, SHORT_FINETUNING

PEOPLE = "data/market"  # and -SEED: the folder of what data.py tracklets made
DOCS = ROOT / "docs"
FILES = {
    "walkers": DOCS / "claim.jsonl",
    "people": DOCS / "people.jsonl",
    "finetuning": DOCS / "finetuning.jsonl",
}
PAGES = ROOT / "README.md", DOCS / "claim.md", DOCS / "people.md", DOCS / "finetuning.md"

# who teaches whom: the rows of the main tables
WHO = {
    "instance": "--identities instance",
    "tracklet": "--identities tracklet",
    "cion": "",
    "true": "--identities true",
}
SEEDS = {
    "walkers": {"r10ibn": (1, 2, 3, 4, 5), "r18ibn": (3, 4, 5), "vit_tiny": (3, 4, 5)},
    "people": {"r10ibn": (1, 2, 3), "r18ibn": (1,), "vit_tiny": (1,)},
}
# how much of the labels to fine-tune with, and how: a column each
LABELS = {
    "--labels_share 0.1": "10% of the labels",
    "--labels_share 0.1 --lr 8e-2": "the same, `--lr 8e-2`",
    "--labels_share 0.3": "30% of the labels",
    "--labels_share 1": "100% of the labels",
}
FINETUNED = {
    "walkers": {"r10ibn": (1, 2, 3), "r18ibn": (3,)},
    "people": {"r10ibn": (1, 2, 3)},
}
# other methods, of r10ibn on people
PEERS = "clusters", "supervised"

# the smaller tables, of r10ibn: their flags, row by row; without any flag, the default
LEVELS = ("--identities tracklet", "--levels 1", "--levels 2", "")
LOSS = ("", "--loss release")
GROWTH = ("--K 2 2", "--K 4 4", "--K 8 8", "")
ROUNDS = ("--rounds 1", "--rounds 2", "")
SHARES = (
    "--data data/walkers-SEED-10 --recipe demo --epoch_steps 90",
    "--data data/walkers-SEED-30 --recipe demo --epoch_steps 90",
    "",
)
SMALL = {"levels": LEVELS, "loss": LOSS, "growth": GROWTH, "rounds": ROUNDS, "shares": SHARES}
SMALL_SEEDS = 3, 4, 5
# people and videos of a world, by the percentage in its folder's name
WORLDS = {"10": (10, 5), "30": (30, 14), "100": (100, 48)}


def command(arch, seed, flags, people=""):
    """The command of one run, of walkers or of the people in the folder <people>-<seed>."""
    world = f"--data {people}-SEED --recipe people " if people else ""
    line = f"torchrun train.py {world}--arch {arch} --seed {seed} {flags}"
    return line.strip().replace("SEED", str(seed))


def peer_command(peer, seed, people):
    """The command of another method's run."""
    flags = command("r10ibn", seed, "", people).split("train.py ")[1]
    return f"python tests/peers.py {peer} {flags}"


def name_of(line):
    """The folder of a run below runs/."""
    script = line.split()[1]
    return "claim-" + re.sub(r"[^\w.]+", "-", f"{Path(script).stem} {line.split(script)[1]}")


def finetuning_command(arch, seed, who, labels, people=""):
    """Fine-tuning with the labels that a column has, from random weights or from a row's."""
    start = f"--arch {arch} --recipe {'people' if people else 'demo'}"
    if who != "random":
        start = f"--weights runs/{name_of(command(arch, seed, WHO[who], people))}/last.pt"
    folder = f"{people or 'data/walkers'}-{seed}"
    return f"torchrun train.py --finetune {folder} --seed {seed} {labels} {start}"


def finetuning_commands(people):
    """Every run of fine-tuning."""
    runs = []
    for arch, seeds in FINETUNED["people" if people else "walkers"].items():
        for labels in LABELS:
            for seed in seeds:
                for who in ("random", *WHO):
                    runs.append(finetuning_command(arch, seed, who, labels, people))
    return runs


def commands(people):
    """Every run once, those of the main table first."""
    runs = []
    for arch, seeds in SEEDS["people" if people else "walkers"].items():
        for seed in seeds:
            runs += [command(arch, seed, flags, people) for flags in WHO.values()]
    if people:
        for seed in SEEDS["people"]["r10ibn"]:
            runs += [peer_command(peer, seed, people) for peer in PEERS]
    else:
        for rows in SMALL.values():
            runs += [command("r10ibn", seed, flags) for seed in SMALL_SEEDS for flags in rows]
    return list(dict.fromkeys(runs))


# ---------------------------------------------------------------- runs


def world_of(line):
    """The folder of a run's data."""
    folder = re.search(r"data/\S+", line)
    seed = re.search(r"--seed (\d+)", line)[1]
    return folder[0] if folder else f"data/walkers-{seed}"


def rank_colours(folder):
    """Draw a world that is missing, data/walkers-SEED or data/walkers-SEED-PERCENT, and rank its
    held-out people by colour: mAP and R1 of the square roots of RGB histograms, 8 bins a channel,
    of six stripes. Raises ValueError where people are missing."""
    name, seed, percent, *_ = f"{folder}-100".split("-")
    if not (ROOT / folder).exists():
        if name != "data/walkers":
            make = f"python data.py tracklets --market DIR --out {folder} --seed {seed}"
            raise ValueError(f"{folder} is missing; make it, with {make}")
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


def run(line, histogram, file, flags):
    """Make a run, or go on with it, and append its figures to the file; False if it failed. flags:
    more flags of train.py, for this machine."""
    name = name_of(line)
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
    result |= {"flags": " ".join(flags), "histogram": histogram, "stages": {}, "rounds": []}
    rates = []
    for event in map(json.loads, open(ROOT / "runs" / name / "log.jsonl")):
        if event["event"] == "evaluate":
            score = {key: event[key] for key in ("step", "mAP", "R1")}
            result["stages"][event["stage"]] = score
        if event["event"] == "denoise":
            result |= {key: event[key] for key in ("identities", "f1_tracklets", "f1")}
            levels = [[level["f1"], *level["noise"]] for level in event["levels"]]
            result["rounds"].append({"step": event["step"], "levels": levels})
        if event["event"] == "train":
            rates.append(event["images_per_second"])
    result["images_per_second"] = round(np.median(rates), 1)
    if (ROOT / "runs" / name / "identities.json").exists() and file == FILES["people"]:
        result["found"] = share_found(name, ROOT / world_of(line))
    with open(file, "a") as out:
        out.write(json.dumps(result) + "\n")
    print(f"{last(result)['mAP']:.1%}  {line}", flush=True)
    return True


def share_found(name, folder):
    """Of the people who came by 1, 2, ... cameras, the mean share of a person's images that a run's
    last identities have together."""
    tracklets = read_tracklets(folder / "train")
    truth = read_labels(folder / "train.json", tracklets)
    labels = read_labels(ROOT / "runs" / name / "identities.json", tracklets)
    camera = np.array([path.split("camera_")[1] for path in tracklets.folders])[tracklets.video]
    shares = defaultdict(list)
    for person in range(truth.max() + 1):
        own = truth == person
        found = labels[own & (labels >= 0)]
        together = max(np.unique(found, return_counts=True)[1], default=0)
        shares[len(set(camera[own]))].append(together / own.sum())
    return {cameras: round(np.mean(values), 3) for cameras, values in sorted(shares.items())}


# ---------------------------------------------------------------- tables


def results(file):
    """What a file holds, by command."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    return {line["command"]: line for line in lines}


def last(result):
    """mAP and R1 at a run's end."""
    return list(result["stages"].values())[-1]


def row_of(known, arch, seeds, flags, people=""):
    """A row's runs that are there, by seed."""
    lines = {seed: command(arch, seed, flags, people) for seed in seeds}
    return {seed: known[line] for seed, line in lines.items() if line in known}


def spread(values, sign="", of=1):
    """Mean and standard deviation, in percent, this divided by the square root of `of`."""
    if not values:
        return ""
    text = f"{100 * np.mean(values):{sign}.1f}"
    if len(values) > 1:
        text += f" ± {100 * np.std(values, ddof=1) / np.sqrt(of):.1f}"
    return text


def difference(scores, others):
    """mAP of a row above another's, seed by seed: mean and standard error, in points."""
    both = scores.keys() & others.keys()
    values = [scores[seed]["mAP"] - others[seed]["mAP"] for seed in both]
    return spread(values, sign="+", of=len(values))


def figures(scores):
    """mAP and R1 of a row's {seed: scores}."""
    return [spread([score[key] for score in scores.values()]) for key in ("mAP", "R1")]


def table(head, rows):
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def mean_f1(runs, key="f1"):
    """Of a row's runs, where they found identities."""
    values = [run[key] for run in runs.values() if key in run]
    return f"{np.mean(values):.3f}" if values else ""


CLAIM = "network", "who teaches whom", "F1", "mAP", "R1", "over the row above", "seeds"


def claim_rows(known, seeds_of, people=""):
    """Who taught whom, by the columns of CLAIM."""
    rows = []
    for arch, seeds in seeds_of.items():
        runs = row_of(known, arch, seeds, "", people)
        scores = {
            "random weights": {seed: run["stages"]["random"] for seed, run in runs.items()},
            "colour histograms": {seed: run["histogram"] for seed, run in runs.items()},
        }
        f1 = {}
        for who, flags in WHO.items():
            runs = row_of(known, arch, seeds, flags, people)
            scores[f"`{who}`"] = {seed: last(run) for seed, run in runs.items()}
            f1[f"`{who}`"] = mean_f1(runs)
        above = {}
        for name, row in scores.items():
            if not row:  # not made yet
                continue
            over = difference(row, above)
            rows.append([f"`{arch}`", name, f1.get(name, ""), *figures(row), over, len(row)])
            above = row
    return rows


def readme_table(walkers, people):
    """The same of r10ibn, on walkers and on people."""
    columns = []
    for known, world, folder in ((walkers, "walkers", ""), (people, "people", PEOPLE)):
        rows = claim_rows(known, {"r10ibn": SEEDS[world]["r10ibn"]}, folder)
        columns.append({name: [f1, score, over] for _, name, f1, score, _, over, _ in rows})
    nothing = ["", "", ""]
    rows = []
    for name in columns[0] | columns[1]:
        rows.append([name, *columns[0].get(name, nothing), *columns[1].get(name, nothing)])
    head = ["who teaches whom", "walkers: F1", "mAP", "over the row above"]
    return table([*head, "people: F1", "mAP", "over the row above"], rows)


def peer_table(known, seeds):
    """Other methods beside ours, of r10ibn on people."""
    rows = []
    cion = row_of(known, "r10ibn", seeds, "", PEOPLE)
    ours = {seed: last(run) for seed, run in cion.items()}
    for name in ("cion", "clusters", "true", "supervised"):
        runs = row_of(known, "r10ibn", seeds, WHO.get(name, ""), PEOPLE)
        if name in PEERS:
            lines = {seed: peer_command(name, seed, PEOPLE) for seed in seeds}
            runs = {seed: known[line] for seed, line in lines.items() if line in known}
        if not runs:
            continue
        scores = {seed: last(run) for seed, run in runs.items()}
        over = difference(scores, ours) if name != "cion" else ""
        rows.append([f"`{name}`", mean_f1(runs), *figures(scores), over, len(runs)])
    return table(["method", "F1", "mAP", "R1", "over `cion`", "seeds"], rows)


def small_table(known, flags_of_rows):
    """One choice after the other, of r10ibn."""
    default = {seed: last(run) for seed, run in row_of(known, "r10ibn", SMALL_SEEDS, "").items()}
    rows = []
    for flags in flags_of_rows:
        runs = row_of(known, "r10ibn", SMALL_SEEDS, flags)
        if not runs:
            continue
        scores = {seed: last(run) for seed, run in runs.items()}
        f1 = mean_f1(runs, "f1_tracklets"), mean_f1(runs)
        name = f"`{flags}`" if flags else "the default"
        over = difference(scores, default) if flags else ""
        rows.append([name, *f1, *figures(scores), over, len(runs)])
    head = ["flags", "F1 of raw tracklets", "of the labels", "mAP", "R1", "over the default"]
    return table([*head, "seeds"], rows)


def finetuning_rows(known, arch, seeds, who, people=""):
    """The runs of fine-tuning that are there, a {seed: run} for each column."""
    rows = []
    for labels in LABELS:
        lines = {seed: finetuning_command(arch, seed, who, labels, people) for seed in seeds}
        rows.append({seed: known[line] for seed, line in lines.items() if line in known})
    return rows


def finetuning_table(known, seeds_of, people=""):
    """mAP / R1 after fine-tuning with more and more labels."""
    rows = []
    for arch, seeds in seeds_of.items():
        above = {}
        for who in ("random", *WHO):
            columns = finetuning_rows(known, arch, seeds, who, people)
            few = columns[0]
            if not few:
                continue
            before = [next(iter(run["stages"].values()))["mAP"] for run in few.values()]
            cells = []
            for runs in columns:
                if not runs:
                    cells.append("")
                    continue
                ends = [last(run) for run in runs.values()]
                mAP = spread([end["mAP"] for end in ends])
                R1 = np.mean([end["R1"] for end in ends])
                cells.append(f"{mAP} / {100 * R1:.1f}")
            scores = {seed: last(run) for seed, run in few.items()}
            over = difference(scores, above)
            above = scores
            rows.append([f"`{arch}`", who, spread(before), *cells, over, len(few)])
    head = ["network", "pre-training", "mAP before", *LABELS.values()]
    return table([*head, "over the row above, first column", "seeds"], rows)


def draw_finetuning(pyplot):
    """docs/finetuning.svg, of r10ibn: mAP by epoch."""
    known = results(FILES["finetuning"])
    epochs = SHORT_FINETUNING["epochs"][0]
    figure, axes = pyplot.subplots(2, len(LABELS), figsize=(15, 6.4), layout="tight")
    for row, (world, people) in zip(axes, (("walkers", ""), ("people", PEOPLE))):
        for i, title in enumerate(LABELS.values()):
            for who in ("random", *WHO):
                seeds = FINETUNED[world]["r10ibn"]
                runs = finetuning_rows(known, "r10ibn", seeds, who, people)[i]
                curves = []
                for run in runs.values():
                    stages = run["stages"].values()
                    curves.append([(stage["step"], stage["mAP"]) for stage in stages])
                if curves:
                    steps, maps = np.mean(curves, axis=0).T
                    row[i].plot(epochs * steps / steps[-1], maps, marker="o", label=who)
            row[i].set(title=f"{world}, {title.replace('`', '')}", xlabel="epochs", ylim=0)
    axes[0, 0].legend(frameon=False)
    figure.savefig(DOCS / "finetuning.svg", metadata={"Date": None})


def draw_curves():
    """docs/people.svg and docs/finetuning.svg, of r10ibn's runs; needs matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("--curves needs matplotlib: pip install matplotlib")
    # text stays text, and the same figures make the same file
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "cion"}
    draw_finetuning(pyplot)
    known = results(FILES["people"])
    seeds = SEEDS["people"]["r10ibn"]
    runs = list(row_of(known, "r10ibn", seeds, "", PEOPLE).values())
    levels = np.array([[found["levels"] for found in run["rounds"]] for run in runs])
    levels = levels.mean(0)  # (rounds, levels, 4), over seeds
    rounds = np.arange(1, len(levels) + 1)
    figure, (f1, noise, found, speed) = pyplot.subplots(1, 4, figsize=(15, 3.4), layout="tight")

    names = "raw tracklets", "single tracklet", "single video", "across videos"
    for level, name in enumerate(names):
        f1.plot(rounds, levels[:, level, 0], marker="o", label=name)
        noise.plot(rounds, levels[:, level, 1], marker="o", label=name)
    f1.set(title="pairwise F1 after each level", xlabel="round", ylim=(0, 1), xticks=rounds)
    noise.set(title="noise $n_S$ (eq. 3)", xlabel="round", ylim=0, xticks=rounds)
    f1.legend(frameon=False)

    cameras = sorted(runs[0]["found"])
    shares = [np.mean([run["found"][n] for run in runs]) for n in cameras]
    found.bar(cameras, shares)
    title = "share of a person in one identity"
    found.set(title=title, xlabel="cameras of the person", ylim=(0, 1))

    batch = RECIPES["people"]["batch"]
    for who, flags in WHO.items():
        for n, run in enumerate(row_of(known, "r10ibn", seeds, flags, PEOPLE).values()):
            stages = run["stages"].values()
            minutes = [stage["step"] * batch / run["images_per_second"] / 60 for stage in stages]
            colour = f"C{list(WHO).index(who)}"
            label = None if n else who
            maps = [stage["mAP"] for stage in stages]
            speed.plot(minutes, maps, color=colour, marker="o", label=label)
    speed.set(title="mAP by minutes of training steps", xlabel="minutes on one core", ylim=0)
    speed.legend(frameon=False)
    figure.savefig(DOCS / "people.svg", metadata={"Date": None})


def fill(text):
    """A page with its tables printed anew, each between <!-- its name --> and <!-- end -->."""
    walkers = results(FILES["walkers"])
    people = results(FILES["people"])
    blocks = {}
    finetuned = results(FILES["finetuning"])
    for name, known in (("claim", walkers), ("people", people), ("finetuning", finetuned)):
        machines = {"- {device}, torch {torch} {flags}".format(**run) for run in known.values()}
        blocks[f"{name} machines"] = "\n".join(sorted(machines))
    blocks["claim"] = table(CLAIM, claim_rows(walkers, SEEDS["walkers"]))
    blocks["people"] = table(CLAIM, claim_rows(people, SEEDS["people"], PEOPLE))
    blocks["claim r10ibn"] = readme_table(walkers, people)
    blocks["finetuned walkers"] = finetuning_table(finetuned, FINETUNED["walkers"])
    blocks["finetuned people"] = finetuning_table(finetuned, FINETUNED["people"], PEOPLE)
    blocks["peers"] = peer_table(people, SEEDS["people"]["r10ibn"])
    for name, rows in SMALL.items():
        blocks[name] = small_table(walkers, rows)
    for name, block in blocks.items():
        between = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(between, rf"\1\n{block}\n\n\2", text, flags=re.DOTALL)
    return text


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("word", nargs="?", default="", help="only runs whose command has it")
    add("--people", action="store_const", const=PEOPLE, default="", help="not walkers")
    add("--finetune", action="store_true", help="the runs of fine-tuning")
    add("--list", action="store_true", help="print the commands")
    add("--tables", action="store_true", help="write all tables of README.md and docs/ anew")
    add("--curves", action="store_true", help="draw docs/people.svg, docs/finetuning.svg")
    add("--jobs", type=int, default=2, help="runs at a time, a thread each")
    add("--flags", default="", help='for this machine: --flags="--precision float32 --workers 2"')
    args = parser.parse_args()
    if args.tables:
        for page in PAGES:
            page.write_text(fill(page.read_text()))
        return
    if args.curves:
        draw_curves()
        return
    runs = finetuning_commands(args.people) if args.finetune else commands(args.people)
    wanted = [line for line in runs if args.word in line]
    if args.list:
        print("\n".join(wanted))
        return
    world = "people" if args.people else "walkers"
    file = FILES["finetuning" if args.finetune else world]
    known = results(file)
    missing = []
    for line in wanted:
        if line in known:
            continue
        weights = re.search(r"--weights (\S+)", line)
        if weights and not (ROOT / weights[1]).exists():
            print(f"left out, its pre-training has not been made: {line}")
        else:
            missing.append(line)
    (ROOT / "runs").mkdir(exist_ok=True)
    # runs of one world would draw it at the same time
    worlds = sorted({world_of(line) for line in missing})
    with ProcessPoolExecutor(args.jobs) as pool:
        histograms = dict(zip(worlds, pool.map(rank_colours, worlds)))
    with ThreadPoolExecutor(args.jobs) as pool:
        made = []
        for line in missing:
            job = line, histograms[world_of(line)], file, args.flags.split()
            made.append(pool.submit(run, *job))
    failed = [not job.result() for job in made]
    if any(failed):
        sys.exit(f"{sum(failed)} runs failed")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"claim.py: {error}")
