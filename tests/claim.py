"""The paper's claim in miniature: single images < single-video tracklets < identities across videos (its figure 1).

    python tests/claim.py              # every run that docs/claim.jsonl does not hold yet, two at a time; goes on where it was stopped
    python tests/claim.py r10ibn       # of these, the runs whose command has this word
    python tests/claim.py --list       # the commands
    python tests/claim.py --tables     # write the tables of README.md and docs/claim.md anew, from docs/claim.jsonl

A seed draws a world of its own (the people and videos to learn from and the held-out ones) and everything random in training.
The settings and the walkers' difficulty were chosen on seeds 0 and 11, the constants of denoise.py on 0, 1 and 2; the tables are of seeds 1 to 5, or
3 to 5. Every run is one command, and every run is in the file.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FILE = ROOT / "docs" / "claim.jsonl"
PAGES = ROOT / "README.md", ROOT / "docs" / "claim.md"
SEEDS = {"r10ibn": (1, 2, 3, 4, 5), "r18ibn": (3, 4, 5), "vit_tiny": (3, 4, 5)}
SMALL = (3, 4, 5)  # seeds of the smaller tables
WHO = ("instance", "tracklet", "cion", "true")
SHARES = {"10%": (10, 5), "30%": (30, 14)}  # of 100 people in 48 videos


def command(arch: str, seed, flags: str = "") -> str:
    """The command of one run."""
    return f"torchrun train.py --arch {arch} --seed {seed} {flags}".strip()


def claim(who: str) -> str:
    """The flags of a row of the claim's table. Lines that don't name a loss were made before equation 9 and today's denoising."""
    return "" if who == "cion" else f"--identities {who}"


def run_name(flags: str) -> str:
    """Flags as a name."""
    return re.sub(r"[^\w.]+", "-", flags).strip("-")


def fewer(share: str, seed) -> str:
    """The flags of a run on a smaller world, which `run` draws."""
    return f"--data data/walkers-{seed}-{share.rstrip('%')} --recipe demo"


LEVELS = {"raw tracklets": "--identities tracklet", "level 1, single tracklet": "--levels 1", "level 2, single video": "--levels 2",
          "level 3, across videos": ""}
LOSS = {"eq. 9 (default)": "--loss paper", "the release's weighting": "--loss release"}
GROWTH = {"2": "--K 2 2", "4": "--K 4 4", "8": "--K 8 8", "2, then 4 (default)": ""}
ROUNDS = {"1": "--rounds 1", "2": "--rounds 2", "3 (default)": ""}
TUNED = 11  # the seed on which the recipe was chosen
RECIPE = {"the demo's": "", "no batch norm in the head": "--no-head_norm", "EMA 0.996 to 1, not 0.95": "--ema 0.996 1",
          "running center, not Sinkhorn": "--centering ema", "teacher's temperature 0.07, not 0.04": "--teacher_temp 0.07 0.07",
          "student's temperature 0.2, not 0.1": "--student_temp 0.2", "D 1,024, not 256": "--prototypes 1024", "D 64": "--prototypes 64",
          "lr 3e-3, not 6e-3": "--lr 3e-3", "lr 1.2e-2": "--lr 1.2e-2", "no local crops, not 2": "--local_crops 0",
          "local crops from 0.3 of the area on, not 0.05": "--local_scale 0.3 0.8", "no warm-up, not 10% of the steps": "--warmup 0",
          "`instance`": claim("instance"), "`instance`, colours changed as in the paper": claim("instance") + " --jitter 0.4 0.4 0.2 0.1 --grey 0.2"}


def commands() -> list[str]:
    """Every run, those of the main table first."""
    runs = [command(arch, seed, claim(who)) for arch, seeds in SEEDS.items() for seed in seeds for who in WHO]
    runs += [command("r10ibn", seed, flags) for flags in LOSS.values() for seed in SEEDS["r10ibn"]]
    for flags in (*LEVELS.values(), *GROWTH.values(), *ROUNDS.values()):
        runs += [command("r10ibn", seed, flags) for seed in SMALL]
    runs += [command("r10ibn", seed, fewer(share, seed)) for share in SHARES for seed in SMALL]
    runs += [command("r10ibn", TUNED, flags) for flags in RECIPE.values()]
    return list(dict.fromkeys(runs))


def histogram(root: Path) -> dict:
    """The held-out split ranked by colour: square roots of the RGB histograms (8 bins a channel) of six stripes."""
    import torch

    from data import Images, read_labels, read_tracklets
    from evaluate import evaluate_features, label_tracklets

    test = read_tracklets(root / "test")
    images = Images(test, (64, 32))
    pixels, features = np.stack([images[i][0].numpy() for i in range(len(test))]), []  # (N, 3, 64, 32)
    for stripe in np.array_split(pixels // 32, 6, axis=2):
        features += [np.sqrt((stripe == level).mean((2, 3))) for level in range(8)]  # (N, 3) each
    features = torch.from_numpy(np.concatenate(features, 1)).float()
    result = evaluate_features(features / features.norm(dim=1, keepdim=True), label_tracklets(test, read_labels(root / "test.json", test)))
    return {"mAP": result["mAP"], "R1": result["R1"]}


def run(line: str) -> None:
    """Make one run, or go on with it, and append its figures to the file."""
    seed, data = int(re.search(r"--seed (\d+)", line)[1]), re.search(r"--data (\S+)", line)
    if data and not (ROOT / data[1]).exists():
        from data import draw_walkers

        people, videos = SHARES[data[1].rsplit("-", 1)[1] + "%"]
        draw_walkers(ROOT / data[1], seed, people, videos)
    name = run_name(line.removeprefix("torchrun train.py --arch "))
    logs, arguments = ROOT / "runs" / "claim", line.split()[2:]
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / f"{name}.log", "a") as log:
        subprocess.run([sys.executable, "train.py", *arguments, "--name", f"claim-{name}", "--workers", "0"], cwd=ROOT, check=True,
                       stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    events = [json.loads(event) for event in open(ROOT / "runs" / f"claim-{name}" / "log.jsonl")]
    found = [event for event in events if event["event"] == "denoise"]
    scores = {event["stage"]: {"mAP": event["mAP"], "R1": event["R1"]} for event in events if event["event"] == "evaluate"}
    result = {"command": line, **scores, "histogram": histogram(ROOT / (data[1] if data else f"data/walkers-{seed}"))}
    result |= {"f1_tracklets": found[-1]["f1_tracklets"], "f1": [event["f1"] for event in found], "identities": found[-1]["identities"]} if found else {}
    with open(FILE, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{line}: " + ", ".join(f"{stage} {score['mAP']:.1%}" for stage, score in scores.items()), flush=True)


def attempt(line: str) -> str:
    """Make a run; its command if it failed, so that the others go on."""
    try:
        run(line)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        print(f"FAILED: {line}: {error}; its log is in runs/claim/", flush=True)
        return line
    return ""


# ---------------------------------------------------------------- tables


def results() -> dict[str, dict]:
    """What the file holds, by command."""
    return {line["command"]: line for line in map(json.loads, FILE.read_text().splitlines())} if FILE.exists() else {}


def last(line: dict) -> dict:
    """The figures of a run's end."""
    return next(line[who] for who in reversed(WHO) if who in line)  # cion's runs hold their encoder on tracklets too


def spread(values) -> str:
    """Mean and standard deviation, in percent."""
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{100 * values[0]:.1f}"


def table(head: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def of_seeds(known: dict, arch: str, seeds, flags) -> list[dict]:
    """The runs of a row that are there, one a seed; flags may be a function of the seed."""
    lines = [command(arch, seed, flags(seed) if callable(flags) else flags) for seed in seeds]
    return [known[line] for line in lines if line in known]


def claim_table(known: dict) -> str:
    """Who taught whom: mAP and R1 on held-out people, mean and standard deviation over seeds."""
    rows = []
    for arch, seeds in SEEDS.items():
        any_run = of_seeds(known, arch, seeds, claim("cion"))
        rows_of = {name: [run[key] for run in any_run] for name, key in (("random weights", "random"), ("colour histograms", "histogram"))}
        rows_of |= {f"`{who}`": [last(run) for run in of_seeds(known, arch, seeds, claim(who))] for who in WHO}
        for name, scores in rows_of.items():
            if scores:
                rows.append([f"`{arch}`", name, spread([s["mAP"] for s in scores]), spread([s["R1"] for s in scores]), len(scores)])
    return table(["network", "who teaches whom", "mAP", "R1", "seeds"], rows)


def scores_of(known: dict, arch: str, rows) -> np.ndarray:
    """mAP of these rows (instance, tracklet, ...) on the seeds that all of them have: (rows, seeds)."""
    runs = [[run for who in rows for run in of_seeds(known, arch, [seed], claim(who))] for seed in SEEDS[arch]]
    return np.array([[last(run)["mAP"] for run in of_seed] for of_seed in runs if len(of_seed) == len(rows)]).reshape(-1, len(rows)).T


def gap_table(known: dict) -> str:
    """The steps between the rows, each over the seeds that both have."""
    rows = []
    for arch in SEEDS:
        for step in zip(WHO, WHO[1:]):
            low, high = scores_of(known, arch, step)
            if (n := len(low)) > 1:
                mean, error = 100 * (high - low).mean(), 100 * (high - low).std(ddof=1) / np.sqrt(n)
                reach = stats.t.ppf(0.975, n - 1) * error
                rows.append([f"`{arch}`", "`{}` to `{}`".format(*step), f"{mean:+.1f}", f"{error:.1f}", f"{mean - reach:+.1f} to {mean + reach:+.1f}", n])
    return table(["network", "step", "mAP", "standard error", "95% interval", "seeds"], rows)


def closed_table(known: dict) -> str:
    """The share of the step from tracklets to the truth that denoised identities make."""
    rows = []
    for arch in SEEDS:
        tracklet, cion, true = scores_of(known, arch, WHO[1:])
        if len(cion):
            closed = (cion - tracklet) / (true - tracklet)
            rows.append([f"`{arch}`", f"{(cion - tracklet).mean() / (true - tracklet).mean():.0%}", f"{closed.min():.0%} to {closed.max():.0%}", len(cion)])
    return table(["network", "share closed, of means", "of single seeds", "seeds"], rows)


def small_table(known: dict, what: str, choices: dict, seeds=SMALL) -> str:
    """One choice after the other, `r10ibn`, on the same seeds: pairwise F1 of the labels that training ended with, and mAP."""
    complete = [seed for seed in seeds if all(of_seeds(known, "r10ibn", [seed], flags) for flags in choices.values())]
    rows, seeds = [], complete or seeds  # rows of other seeds are not to be compared
    for name, flags in choices.items():
        runs = of_seeds(known, "r10ibn", seeds, flags)
        if runs:
            f1 = [run["f1"][-1] for run in runs if "f1" in run]
            if flags == "--identities tracklet":  # measured where the same world was denoised
                f1 = [run["f1_tracklets"] for run in of_seeds(known, "r10ibn", seeds, "")]
            rows.append([name, f"{np.mean(f1):.3f}" if f1 else "", *(spread([last(run)[key] for run in runs]) for key in ("mAP", "R1")), len(runs)])
    return table([what, "F1 of the labels", "mAP", "R1", "seeds"], rows)


def row_commands() -> str:
    """The command of every row; a row's runs differ in the seed."""
    rows = [(arch, SEEDS[arch], claim(who)) for arch in SEEDS for who in WHO]
    rows += [("r10ibn", SEEDS["r10ibn"], flags) for flags in LOSS.values()]
    rows += [("r10ibn", SMALL, flags) for flags in (*LEVELS.values(), *GROWTH.values(), *ROUNDS.values())]
    kept = {}
    for arch, seeds, flags in rows:
        kept.setdefault((arch, flags), " ".join(map(str, seeds)))  # a row of two tables is of the first one's seeds
    named = lambda flags, seed: flags if re.fullmatch(r"(--identities \w+)?", flags) else f"{flags} --name {run_name(flags)}-{seed}"  # else the default's
    lines = [f"    for seed in {seeds}; do {command(arch, '$seed', named(flags, '$seed'))}; done" for (arch, flags), seeds in kept.items()]
    lines += [f"    {command('r10ibn', TUNED, named(flags, TUNED))}" for flags in RECIPE.values()]
    for share, (people, videos) in SHARES.items():
        draw = f"python -c \"from data import draw_walkers; draw_walkers('data/walkers-$seed-{share.rstrip('%')}', $seed, {people}, {videos})\""
        lines.append(f"    for seed in {' '.join(map(str, SMALL))}; do {draw}; {command('r10ibn', '$seed', fewer(share, '$seed'))}; done")
    return "\n".join(lines)


def blocks(known: dict) -> dict[str, str]:
    """Every table by its name."""
    shares = {share: (lambda seed, share=share: fewer(share, seed)) for share in SHARES} | {"100%": ""}
    return {"claim": claim_table(known), "gaps": gap_table(known), "closed": closed_table(known), "levels": small_table(known, "identities of stage 2", LEVELS),
            "growth": small_table(known, "K, phase by phase", GROWTH), "shares": small_table(known, "people and videos", shares),
            "rounds": small_table(known, "rounds of denoising", ROUNDS), "loss": small_table(known, "loss", LOSS, SEEDS["r10ibn"]), "recipe": small_table(known, "recipe", RECIPE, [TUNED]),
            "commands": row_commands()}


def fill(text: str, known: dict) -> str:
    """A page with its tables printed anew, each between <!-- its name --> and <!-- end -->."""
    for name, block in blocks(known).items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda match: f"{match[1]}\n{block}\n\n{match[2]}", text, flags=re.DOTALL)
    return text


def main() -> str | None:
    """Make the runs that are not there yet, or print the tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("words", nargs="*", help="only runs whose command has one of these words")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--tables", action="store_true", help="write the tables of README.md and docs/claim.md anew")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    args = parser.parse_args()
    wanted = [line for line in commands() if not args.words or any(word in line for word in args.words)]
    if args.list:
        print("\n".join(wanted))
        return None
    if args.tables:
        for page in PAGES:
            page.write_text(fill(page.read_text(), results()))
        return None
    known = results()
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [line for line in pool.map(attempt, [line for line in wanted if line not in known]) if line]
    return f"{len(failed)} runs failed" if failed else None


if __name__ == "__main__":
    sys.exit(main())
