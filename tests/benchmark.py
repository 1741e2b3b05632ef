"""Measures, and asserts nothing. Every command prints tables in Markdown, and says what it needs.

    python tests/benchmark.py denoise     # the paper's levels, ours, other clusterings (scikit-learn); an hour the first time
    python tests/benchmark.py scale       # time and memory from ten thousand images up, effect of the range's width; 10 min
    python tests/benchmark.py loss        # head and loss by three ways of writing them: time, memory; 10 min
    python tests/benchmark.py augment     # views of an image against a pipeline of PIL and torchvision; 1 min
    python tests/benchmark.py index       # index, sampler and labels at millions of images; 3 min
    python tests/benchmark.py step        # a training step and its parts, against one written the plain way; 5 min an architecture
    python tests/benchmark.py evaluate    # ranking at Market-1501's and MSMT17's sizes against the bare product, re-ranking; 15 min
    python tests/benchmark.py crop        # crops from a drawn 1080p video against its decoding (needs av); 1 min

Read first: `denoise`, `scale`, `draw_video`, `step`.
"""
import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data
import denoise as D
import distill
import evaluate as E
import model
import train

# ---------------------------------------------------------------- measuring


def anonymous_memory() -> float:
    """Memory of this process that is not a file's, GiB (Linux; nan elsewhere)."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) / 2**20
    except OSError:
        return float("nan")


class measured:
    """Seconds and peak memory (GiB beyond what was there before) of a block, sampled 50 times a second."""

    def __enter__(self):
        self.before, self.peak, self.over, self.clock = anonymous_memory(), 0.0, threading.Event(), time.time()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while True:
            self.peak = max(self.peak, anonymous_memory() - self.before)
            if self.over.wait(0.02):
                break

    def __exit__(self, *_):
        self.seconds = time.time() - self.clock
        self.over.set()
        self.thread.join()


def in_a_process(function: str, **options) -> dict:
    """Call a function of this file in a process of its own, for a memory that nothing else has used."""
    code = f"import sys, json; sys.path.insert(0, {str(ROOT / 'tests')!r}); import benchmark as B; " \
           f"print(json.dumps(B.{function}(**{options!r})))"
    result = json.loads(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(json.dumps(options | result), file=sys.stderr, flush=True)
    return result


def print_rows(title: str, header: list[str], rows: list[list]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(map(str, header))} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


# ---------------------------------------------------------------- quality, on walkers and on people

NOISES = (0.5, 1.0, 1.5)
SEEDS = (3, 4, 5)  # what denoise.py leaves to choice was chosen on seeds 0 to 2
WALKERS_RANGE = 130  # r_s of the demo's recipe, in tracklets


class Case(NamedTuple):
    """Features of tracklets and the truth: (N, d), then (N,) each; and a range of theirs."""

    features: np.ndarray
    video: np.ndarray
    track: np.ndarray
    frame: np.ndarray
    truth: np.ndarray
    r_s: int


def encoded_walkers(noise: float, seed: int) -> Case:
    """Walkers whose tracker fails so often, drawn with a seed of their own, and their features by an
    encoder that was trained on their raw tracklets. Made once, about three minutes each, into data/
    and runs/."""
    name = f"walkers-noise{noise}-seed{seed}"
    root = Path("data") / name
    folder = Path("runs") / f"{name}-stage1"
    if not root.exists():
        data.draw_walkers(root, seed=seed, noise=noise)
    if not (folder / "retrieval.png").exists():  # drawn at its end
        print(f"training an encoder on {root} ...", file=sys.stderr, flush=True)
        command = f"{sys.executable} {ROOT / 'train.py'} --arch r10ibn --data {root} --recipe demo"
        command += f" --seed {seed} --name {folder.name} --tracklet_epochs 4 --epochs 0 0"
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)
    tracklets = data.read_tracklets(root / "train")
    backbone, size, _ = model.load_backbone(folder / "last.pt")
    with contextlib.redirect_stdout(sys.stderr):
        features = model.extract_to_file(folder, backbone, tracklets, size, "cpu")
    truth = data.read_labels(root / "train.json", tracklets)
    index = tracklets.video, tracklets.track, tracklets.frame
    return Case(np.asarray(features, np.float32), *index, truth, WALKERS_RANGE)


def read_people(file, swapped: bool, half: int | None = None) -> Case:
    """People in an .npz of arrays features (N, d), video, track, frame, truth and, of a tracker that
    swaps people, track_swapped and frame_swapped; only those of even (0) or odd (1) truth if `half`."""
    arrays = np.load(file)
    track = arrays["track_swapped" if swapped else "track"]
    frame = arrays["frame_swapped" if swapped else "frame"]
    truth = arrays["truth"].astype(np.int64)
    kept = np.ones(len(truth), bool) if half is None else truth % 2 == half
    features = arrays["features"][kept].astype(np.float32)
    return Case(features, arrays["video"][kept], track[kept], frame[kept], truth[kept], 1000)


def all_cases(args) -> dict[str, list[Case]]:
    """Every set that quality is measured on; walkers have one for each seed."""
    cases = {}
    for noise in args.noises:
        cases[f"walkers {noise}"] = [encoded_walkers(noise, seed) for seed in args.seeds]
    if args.people:
        cases["people"] = [read_people(args.people, swapped=False)]
        cases["people, swaps"] = [read_people(args.people, swapped=True)]
        cases["other half"] = [read_people(args.people, swapped=False, half=1)]
    return cases


def placed(case: Case, **options) -> np.ndarray:
    """Features in the space of denoise.py."""
    space = D.fit_space(case.features, case.video, case.track, **options)
    return D.place(*case[:4], space)


def score_of(case: Case, features, space=None, **options) -> dict[str, float]:
    """Precision, recall and F1 of denoise.py on these features of a case."""
    labels = D.denoise(features, *case[1:4], r_s=options.pop("r_s", case.r_s), **options)
    return D.pairwise_scores(labels, case.truth)


def best_f1(case: Case, features, sigma_csts, sigma_drms, **options) -> tuple[float, float, float]:
    """The best F1 of a grid, by the truth, and its thresholds."""
    found = []
    for sigma_cst in sigma_csts:
        for sigma_drm in sigma_drms:
            scores = score_of(case, features, sigma_cst=sigma_cst, sigma_drm=sigma_drm, **options)
            found.append((scores["f1"], sigma_cst, sigma_drm))
    return max(found)


def jaccard(x: np.ndarray) -> np.ndarray:
    """Jaccard distances (n, n) between the sets of k-reciprocal neighbours, k1 20 and k2 6. Each
    image is there twice, as query and as gallery, hence twice of both."""
    return np.maximum(E.rerank(x, x, k1=40, k2=12, lambda_value=0.0), 0)


def cosine(x: np.ndarray) -> np.ndarray:
    """Cosine distances (n, n) of unit features (n, d)."""
    return np.clip(1 - x @ x.T, 0, 2)


def best_dbscan(distance: np.ndarray, of: np.ndarray, truth: np.ndarray) -> float:
    """F1 of scikit-learn's DBSCAN at its best parameters; distances (n, n) of items, of (N,) which
    item an image belongs to."""
    from sklearn.cluster import DBSCAN

    near = np.quantile(distance[:: max(1, len(distance) // 500)], np.geomspace(0.0003, 0.03, 12))
    scores = []
    for eps in np.unique(near[near > 0]):
        for least in (2, 4):
            items = DBSCAN(eps=eps, min_samples=least, metric="precomputed").fit_predict(distance)
            scores.append(D.pairwise_scores(D.dense(items)[of], truth)["f1"])
    return max(scores)


def best_average_linkage(distance: np.ndarray, of: np.ndarray, truth: np.ndarray) -> float:
    """F1 of SciPy's average linkage at its best cut; distances and `of` as above."""
    upper = distance[np.triu_indices(len(distance), 1)]
    tree = linkage(upper, "average")
    scores = []
    for cut in np.quantile(tree[:, 2], np.linspace(0.3, 0.999, 60)):
        items = fcluster(tree, cut, "distance") - 1
        scores.append(D.pairwise_scores(items[of], truth)["f1"])
    return max(scores)


def table(title: str, cases: dict, rows: dict) -> None:
    """Print a row for each function of a case, the mean over the cases of each set."""
    body = []
    for name, function in rows.items():
        line = [name]
        for set_name, several in cases.items():
            values = [function(case) for case in several]
            line.append(f"{np.mean(values):.3f}")
            print(name, set_name, line[-1], file=sys.stderr, flush=True)
        body.append(line)
    print_rows(title, ["F1", *cases], body)


def denoise(args) -> None:
    """What the paper's levels, our additions, calibration and other clusterings are worth."""
    cases = all_cases(args)
    plain = {id(case): D.unit(case.features) for several in cases.values() for case in several}
    ours = {id(case): placed(case) for several in cases.values() for case in several}

    def f1(case, **options):
        return score_of(case, ours[id(case)], **options)["f1"]

    if "paper" in args.parts:
        csts = (0.1, 0.3, 2.0)
        drms = np.linspace(0.02, 0.3, 15)
        wide = (0.8, 2.0)
        wider = np.linspace(0.2, 0.7, 11)
        table("The paper's levels, and ours", cases, {
            "raw tracklets": lambda c: D.pairwise_scores(D.dense(c.track), c.truth)["f1"],
            "paper's levels, 0.2 and 0.18": lambda c: score_of(c, plain[id(c)], paper=True)["f1"],
            "paper's levels, thresholds by truth": lambda c: best_f1(c, plain[id(c)], csts, drms, paper=True)[0],
            "paper's levels in our space, by truth": lambda c: best_f1(c, ours[id(c)], wide, wider, paper=True)[0],
            "ours, no truth": f1,
            "ours, a range over all, no truth": lambda c: f1(c, r_s=len(c.truth)),
        })

    if "levels" in args.parts:
        body = []
        for name, several in cases.items():
            levels = {}
            for case in several:
                def report(level, labels, n_S):
                    scores = D.pairwise_scores(labels, case.truth)
                    kept = (labels >= 0).mean()
                    figures = [labels.max() + 1, kept, *n_S, *scores.values()]
                    levels.setdefault(level, []).append(figures)

                D.denoise(ours[id(case)], *case[1:4], r_s=case.r_s, report=report)
            for level, figures in levels.items():
                m = np.mean(figures, 0)
                body.append([name, level, f"{m[0]:.0f}", f"{m[1]:.1%}", *(f"{v:.2f}" for v in m[2:5]), *(f"{v:.3f}" for v in m[5:])])
        print_rows("Level by level", ["", "after", "identities", "images kept", "n_S", "too wide", "too close", "P", "R", "F1"], body)

    if "ablation" in args.parts:
        rows = {"all of it": f1}
        for name in ("cut", "cannot_link", "closest_first"):
            rows[f"no {name}"] = lambda c, name=name: f1(c, **{name: False})
        rows["nearness 0"] = lambda c: f1(c, nearness=0.0)
        for name in ("center", "whiten"):
            rows[f"no {name}"] = lambda c, name=name: score_of(c, placed(c, **{name: False}))["f1"]
        rows["level 1"] = lambda c: f1(c, levels=1)
        rows["levels 1, 2"] = lambda c: f1(c, levels=2)
        for share in (0.25, 0.5, 2, 4):
            rows[f"range times {share}"] = lambda c, share=share: f1(c, r_s=int(share * c.r_s))
        table("What each addition is worth: without it", cases, rows)

    if "calibration" in args.parts:
        body = []
        for name, several in cases.items():
            for case in several:
                x = ours[id(case)]
                sigma_cst, sigma_drm = D.calibrate(x, *case[1:4], case.r_s)
                mine = f1(case)
                best = best_f1(case, x, (0.8, 2.0), np.arange(0.64, 0.93, 0.02))
                body.append([name, f"{sigma_cst:.3f}", f"{sigma_drm:.3f}", f"{mine:.3f}", *(f"{v:.3f}" for v in best), f"{best[0] - mine:+.3f}"])
        print_rows("Calibrated, and the best of a grid by the truth", ["", "sigma_cst", "sigma_drm", "F1", "best F1", "at sigma_cst", "sigma_drm", "missed"], body)

    if "peers" in args.parts:
        rows = {"ours, no truth": f1}
        for space, where in (("plain", plain), ("in our space", ours)):
            for kind, distances in (("cosine", cosine), ("Jaccard", jaccard)):
                for method, best in (("DBSCAN", best_dbscan), ("average linkage", best_average_linkage)):
                    def images(c, where=where, distances=distances, best=best):
                        return best(distances(where[id(c)]), np.arange(len(c.truth)), c.truth)

                    def tracklets(c, where=where, distances=distances, best=best):
                        track = D.dense(c.track)
                        return best(distances(D.centroids_of(where[id(c)], track)), track, c.truth)

                    rows[f"{method} of images, {kind}, {space}"] = images
                    rows[f"{method} of tracklets, {kind}, {space}"] = tracklets
        table("Other clusterings, their best parameters by the truth", cases, rows)


# ---------------------------------------------------------------- scale

PEOPLE, TRACKLETS, FRAMES = 8, 20, 23  # new people and tracklets in a video, images in a tracklet: LUPerson-NL's proportions
LOOKS = 32  # ways in which people differ: some look alike
AWAY = 150  # videos after which one person of each video returns


def draw_video(seed: int, v: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features of one synthetic video, from (seed, video) alone: float16 (460, d), and tracklet (0..19), frame, person (460,).

    Each video brings 8 new people, who all return once within the next 16 videos, and one of them after 150 more. Some leave
    two tracklets; in every third video two tracklets go on as each other. A feature is the person's looks, the
    video's, the tracklet's and the image's own directions.
    """
    visits = [(v, k) for k in range(PEOPLE)] + [(v - 1 - 2 * k, k) for k in range(PEOPLE)] + [(v - AWAY, 0)]
    visits = [(home, k) for home, k in visits if home >= 0]
    visits = visits + visits[: TRACKLETS - len(visits)] if v < AWAY else visits + visits[:3]  # fragments
    random, tracks = np.random.default_rng([seed, 0, v]), len(visits)
    looks = np.stack([np.random.default_rng([seed, 1, home]).standard_normal((PEOPLE, LOOKS), np.float32)[k] for home, k in visits])
    people = looks @ np.random.default_rng([seed, 2]).standard_normal((LOOKS, d), np.float32) / np.sqrt(LOOKS)
    of_track = 0.35 * random.standard_normal((tracks, d), np.float32)
    start = random.integers(0, 3 * FRAMES, tracks)
    for later in range(tracks - 1, -1, -1):
        first = visits.index(visits[later])
        if first < later:  # a fragment goes on where the first one ended
            start[later] = start[first] + FRAMES + 2
    track = np.repeat(np.arange(tracks), FRAMES)
    frame = start[track] + np.tile(np.arange(FRAMES), tracks)
    who = track.copy()
    if v % 3 == 0:  # identity switch of the first two
        middle = (max(start[0], start[1]) + min(start[0], start[1]) + FRAMES) // 2
        a, b = (track == 0) & (frame >= middle), (track == 1) & (frame >= middle)
        track[a], track[b] = 1, 0
    features = people[who] + of_track[who] + 1.2 * random.standard_normal(d).astype(np.float32)
    features += 1.5 * random.standard_normal((len(who), d), np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    order = np.lexsort((frame, track))
    return features.astype(np.float16)[order], track[order], frame[order], np.array([home * PEOPLE + k for home, k in visits])[who][order]


def draw_features(folder: Path, images: int, seed: int = 0, d: int = 256) -> None:
    """Features of so many images, float16 on disk, and their index and truth, int64: never whole in memory."""
    rows, v = 0, 0
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (images, d))
    index = np.lib.format.open_memmap(folder / "index.npy", "w+", np.int64, (4, images))  # video, track, frame, person
    while rows < images:
        x, track, frame, person = (part[: images - rows] for part in draw_video(seed, v, d))
        features[rows : rows + len(x)] = x
        index[:, rows : rows + len(x)] = np.full(len(x), v), v * TRACKLETS + track, frame, person
        rows, v = rows + len(x), v + 1


def run_scale(folder: str, **options) -> dict:
    """Denoise what `draw_features` left in a folder: seconds and peak memory of every part, and the result's quality."""
    folder = Path(folder)
    features, (video, track, frame, truth) = np.load(folder / "features.npy", mmap_mode="r"), np.load(folder / "index.npy")
    seconds, clock = {}, [time.time()]

    def lap(name):
        seconds[name] = time.time() - clock[0]
        clock[0] = time.time()

    figures = {"images": len(video), "videos": int(video[-1]) + 1, "tracklets": len(np.unique(track))}
    with measured() as whole:
        space = D.fit_space(features, video, track)
        lap("space")
        shape = len(video), space.matrix.shape[1]
        placed = np.lib.format.open_memmap(folder / "placed.npy", "w+", np.float16, shape)
        D.place(features, video, track, frame, space, placed)
        lap("placing")
        labels = D.denoise(placed, video, track, frame, report=lambda level, labels, n_S: lap(level), **options)
    seconds["calibration, noise"] = seconds.pop("tracklets")
    return figures | {"seconds": whole.seconds, "parts": seconds, "memory": whole.peak, "dims": placed.shape[1],
                      "identities": int(labels.max()) + 1, "kept": float((labels >= 0).mean()), **D.pairwise_scores(labels, truth)}


def scale(args) -> None:
    """Time and memory at growing sizes, each in a process of its own, and the effect of the range's width."""
    run = lambda folder, **options: in_a_process("run_scale", folder=folder, **options)
    results, windows = [], []
    for images in args.images:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            draw_features(Path(folder), images)
            results.append(run(folder))
            if images == args.images[-1] or images == 100_000:
                windows = windows or [(r_s, run(folder, r_s=r_s)) for r_s in args.ranges]
    quality = lambda r: [f"{r['identities']:,}", *(f"{r[c]:.3f}" for c in ("precision", "recall", "f1"))]
    print_rows("Time and memory", ["images", "videos", "tracklets", "seconds", "microseconds an image", "GiB", "identities", "P", "R", "F1"],
               [[f"{r['images']:,}", f"{r['videos']:,}", f"{r['tracklets']:,}", f"{r['seconds']:.1f}", f"{1e6 * r['seconds'] / r['images']:.1f}",
                 f"{r['memory']:.2f}", *quality(r)] for r in results])
    print_rows("Where the time goes, seconds", ["images", *results[0]["parts"]],
               [[f"{r['images']:,}", *(f"{t:.1f}" for t in r["parts"].values())] for r in results])
    if windows:
        print_rows(f"Width of the range, {windows[0][1]['images']:,} images", ["r_s", "seconds", "of them level 3", "identities", "P", "R", "F1"],
                   [[w, f"{r['seconds']:.1f}", f"{r['parts']['cross video']:.1f}", *quality(r)] for w, r in windows])


# ---------------------------------------------------------------- the loss


def double_loop(student, teacher, center, K: int, student_temp: float = 0.1, teacher_temp: float = 0.04):
    """Eq. 9 as it reads: loops over an identity's images i, j and their views, over all identities of the batch at once."""
    p = torch.softmax((teacher - center) / teacher_temp, dim=-1)
    images = [x.unflatten(1, (-1, K)).unbind(2) for x in (p, student)]  # K times (views, identities, D): the i-th of each identity
    total, terms = 0, 0
    for i, taught in enumerate(images[0]):
        for j, learning in enumerate(images[1]):
            for u, target in enumerate(taught.unbind(0)):
                for v, logits in enumerate(learning.unbind(0)):
                    if (i, u) != (j, v):
                        total = total - (target * torch.log_softmax(logits / student_temp, dim=-1)).sum()
                        terms += len(target)
    return total / terms


def crop_by_crop(z, prototypes, teacher, center, K: int):
    """The same, with a backward pass as soon as a view's logits are there, so that no other view's are in memory."""
    V, B, _ = z.shape
    p = torch.softmax((teacher - center) / 0.04, dim=-1)
    together = p.sum(0).unflatten(0, (-1, K)).sum(1).repeat_interleave(K, dim=0)
    loss = 0
    for v in range(V):
        target = together - p[v] if v < 2 else together
        part = -(target * torch.log_softmax(z[v] @ prototypes.T / 0.1, dim=-1)).sum() / (2 * B * (K * V - 1))
        part.backward()
        loss += part.detach()
    return loss


def run_loss(how: str, K: int, D: int, batch: int, crops: int, threads: int) -> dict:
    """Forward and backward of the head's last layer and the loss: seconds (best of 3), peak memory in GiB, the loss."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)
    z, prototypes = unit(crops, batch, 256).requires_grad_(), unit(D, 256).requires_grad_()
    teacher, center = unit(2, batch, 256) @ prototypes.detach().T, torch.zeros(D)
    seconds, memory = [], []
    for _ in range(3):
        z.grad = prototypes.grad = None
        with measured() as run:
            if how == "crop by crop":
                loss = crop_by_crop(z, prototypes, teacher, center, K)
            else:
                loss = {"double loop": double_loop, "straight": distill.identity_loss}[how](z @ prototypes.T, teacher, center, K)
                loss.backward()
        seconds.append(run.seconds)
        memory.append(run.peak)
    return {"seconds": min(seconds), "memory": memory[0], "loss": loss.item(), "gradient": z.grad.norm().item()}


def loss(args) -> None:
    """Head and loss, forward and backward: eq. 9's loops, identity_loss as it trains, and the same crop by crop, in less memory."""
    rows = []
    for D in args.prototypes:
        for K in args.K:
            results = {how: in_a_process("run_loss", how=how, K=K, D=D, batch=args.batch, crops=args.crops, threads=args.threads)
                       for how in ("double loop", "straight", "crop by crop")}
            base = results["straight"]
            for how, r in results.items():
                rows.append([f"{D:,}", K, how, f"{r['seconds']:.2f}", f"{r['seconds'] / base['seconds']:.2f}", f"{r['memory']:.2f}",
                             f"{r['loss']:.5f}"])
    print_rows(f"Head and loss, forward and backward, {args.batch} images, {args.crops} crops, {args.threads} threads",
               ["D", "K", "", "seconds", "of straight", "GiB", "loss"], rows)


# ---------------------------------------------------------------- views


def pil_views(settings) -> list:
    """The recipe's views as the usual pipeline makes them: a function of a PIL image for every view, with torchvision transforms."""
    from PIL import Image, ImageFilter
    from torchvision import transforms as T

    s = settings
    blur = lambda p: T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, s.blur_sigma)))) if torch.rand(1) < p else x)

    def kind(size, scale, blur_p, solarize=0.0):
        return T.Compose([
            T.RandomResizedCrop(size, scale, s.ratio, Image.BILINEAR), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(*s.jitter)], 0.8), T.RandomGrayscale(s.grey), blur(blur_p),
            T.RandomSolarize(128, solarize), T.ToTensor(), T.Normalize(model.MEAN, model.STD),
        ])

    both = [kind(s.size, s.global_scale, s.blur[0]), kind(s.size, s.global_scale, s.blur[1], s.solarize)]
    return both + [kind(s.local_size, s.local_scale, s.blur[2])] * s.local_crops


def draw_images(root: Path, n: int, canvas: tuple[int, int]) -> data.Tracklets:
    """n smooth random JPEGs of the canvas' size."""
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 16, 8, generator=torch.Generator().manual_seed(0)), canvas, mode="bilinear")
    (root / "video").mkdir()
    for i, image in enumerate((x * 255).byte()):
        (root / "video" / f"{i // 8:06d}_{i % 8:07d}_00.jpg").write_bytes(data.encode_jpeg(image, 90).numpy().tobytes())
    return data.read_tracklets(root)


def augment(args) -> None:
    """From JPEG files to a batch of views: ours on the batch, and the usual pipeline image by image, on one core each."""
    from PIL import Image

    torch.set_num_threads(1)
    s = train.Settings()
    kinds, transforms, generator = train.view_kinds(s), pil_views(s), torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tracklets = draw_images(Path(folder), args.batch, s.canvas)
        images, files = data.Images(tracklets, s.canvas), [tracklets.root / tracklets.path(i) for i in range(len(tracklets))]
        stack = lambda: torch.stack([images[i][0] for i in range(len(images))])
        batch, opened = stack(), [Image.open(file).convert("RGB") for file in files]
        ways = {
            ("decoding", "ours"): stack,
            ("decoding", "PIL"): lambda: [Image.open(file).convert("RGB") for file in files],
            ("views", "ours"): lambda: distill.make_views(batch, kinds, generator),
            ("views", "PIL"): lambda: torch.utils.data.default_collate([[t(image) for t in transforms] for image in opened]),
        }
        times = {way: [] for way in ways}
        for _ in range(args.repeat):  # in turns, so that a slow moment of the machine meets both
            for way, function in ways.items():
                clock = time.perf_counter()
                function()
                times[way].append(1e3 * (time.perf_counter() - clock) / args.batch)
    median = {way: np.median(values) for way, values in times.items()}
    rows = [[what, f"{median[what, 'PIL']:.2f}", f"{median[what, 'ours']:.2f}", f"{median[what, 'PIL'] / median[what, 'ours']:.2f}"] for what in ("decoding", "views")]
    total = {how: median["decoding", how] + median["views", how] for how in ("PIL", "ours")}
    rows.append(["both", f"{total['PIL']:.2f}", f"{total['ours']:.2f}", f"{total['PIL'] / total['ours']:.2f}"])
    print_rows(f"Milliseconds an image on one core, 2 + {s.local_crops} views at {s.size} and {s.local_size}, batches of {args.batch}, median of {args.repeat}",
               ["", "PIL and torchvision", "ours", "faster"], rows)


# ---------------------------------------------------------------- the index


def index_parts(images: int, videos: int, labelled: int, identities: int) -> dict:
    """Seconds and GiB (peak) of reading a kept index, planning an epoch, writing and reading labels."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root, random = Path(folder) / "set", np.random.default_rng(0)
        folders = [f"city_{v % 100:02d}/video_{v:06d}" for v in range(videos)]
        for video in folders:
            (root / video).mkdir(parents=True)
        track, frame = np.arange(images) // 23, np.arange(images) % 23
        digits = lambda x, n: (x[:, None] // 10 ** np.arange(n - 1, -1, -1) % 10 + 48).astype(np.uint8)
        fixed = lambda text: np.broadcast_to(np.frombuffer(text, np.uint8), (images, len(text)))
        name = np.concatenate([digits(track, 6), fixed(b"_"), digits(frame, 7), fixed(b"_00.jpg")], 1).view("S21")[:, 0]
        visited = [".", *sorted({f[:7] for f in folders}), *folders]
        np.savez(f"{root}.index.npz", changed=[(root / f).stat().st_mtime_ns for f in visited], visited=visited, folders=folders, name=name,
                 video=np.sort(random.integers(0, videos, images)), track=track, frame=frame)
        del name, track, frame
        with measured() as run:
            tracklets = data.read_tracklets(root)
        assert len(tracklets) == images
        rows.append(["reading the index", f"{images:,} images, {videos:,} videos", run.seconds, run.peak])
        del tracklets
        labels = np.sort(random.integers(0, identities, labelled))
        for K in (2, 8):
            with measured() as run:
                plan = data.sample_identities(labels, K, 960, 0, 0, labelled // 960)
            rows.append([f"planning an epoch, K {K}", f"{labelled:,} images, {identities:,} identities: {len(plan):,} steps", run.seconds, run.peak])
        part = data.read_tracklets(root)
        part = data.Tracklets(root, part.folders, part.name[:labelled], part.video[:labelled], part.track[:labelled], part.frame[:labelled])
        with measured() as run:
            data.write_labels(root / "labels.json", part, labels)
        rows.append(["writing labels", f"{labelled:,} images", run.seconds, run.peak])
        with measured() as run:
            again = data.read_labels(root / "labels.json", part)
        assert (data.read_labels(root / "labels.json", part) == again).all() and len(np.unique(again)) == len(np.unique(labels))
        rows.append(["reading labels", f"{labelled:,} images", run.seconds, run.peak])
    with tempfile.TemporaryDirectory() as folder:  # and the scan, of real files
        root = Path(folder) / "set"
        for v in range(100):
            (root / f"video_{v:03d}").mkdir(parents=True)
            for i in range(500):
                (root / f"video_{v:03d}" / f"{i // 20:06d}_{i:07d}_00.jpg").touch()
        with measured() as run:
            data.read_tracklets(root)
        rows.append(["scanning folders, once", "50,000 images, 100 videos", run.seconds, run.peak])
    return {"rows": rows}


def index(args) -> None:
    """Time and memory of the index, the sampler and labels at the size of LUPerson-NL and CION-AL."""
    rows = in_a_process("index_parts", images=args.images, videos=args.videos, labelled=args.labelled, identities=args.identities)["rows"]
    print_rows("The index", ["", "of", "seconds", "GiB"], [[what, of, f"{s:.2f}", f"{m:.2f}"] for what, of, s, m in rows])


# ---------------------------------------------------------------- a training step


def plain_step(student, teacher, optimizer, images, transforms, K: int, lap) -> None:
    """A step as it is usually written: PIL views, one crop at a time, the loss as loops, parameters one by one."""
    crops = torch.utils.data.default_collate([[t(image) for t in transforms] for image in images])
    lap("data")
    with torch.no_grad():
        taught = torch.stack([teacher.head(teacher.backbone(crop)) for crop in crops[:2]])
    logits = torch.stack([student.head(student.backbone(crop)) for crop in crops])
    lap("forward")
    loss = double_loop(logits, taught, taught.mean((0, 1)), K)
    lap("loss")
    loss.backward()
    lap("backward")
    for parameter in student.parameters():
        parameter.grad.mul_((3.0 / (parameter.grad.norm() + 1e-6)).clamp(max=1))
    optimizer.step()
    optimizer.zero_grad()
    lap("optimiser")
    with torch.no_grad():
        for a, b in zip(teacher.parameters(), student.parameters()):
            a.mul_(0.996).add_(b, alpha=0.004)
    lap("EMA")


def our_step(student, teacher, optimizer, images, kinds, K: int, lap) -> None:
    """The same step as train.py takes it, in one process."""
    views = distill.make_views(images, kinds, torch.Generator().manual_seed(0))
    lap("data")
    with torch.no_grad():
        taught = teacher(views[:2])
    logits = student(views)
    lap("forward")
    loss = distill.identity_loss(logits, taught, taught.mean((0, 1)), K)
    lap("loss")
    loss.backward()
    lap("backward")
    train.clip_gradients(student, 3.0)
    optimizer.step()
    optimizer.zero_grad()
    lap("optimiser")
    distill.update_teacher(teacher, student, 0.996)
    lap("EMA")


def step(args) -> None:
    """A training step at the paper's crops and its parts, ours and written the plain way, in turns in one process; what the
    arithmetic alone would take."""
    from PIL import Image

    torch.set_num_threads(args.threads)
    s = train.Settings(arch=args.arch)
    torch.manual_seed(0)
    backbone = model.build(args.arch)
    plain = distill.Network(backbone, model.Head(backbone.embed_dim, s.prototypes))
    ours = copy.deepcopy(plain)
    plain.to(memory_format=torch.contiguous_format)
    networks = {"plain": (plain, copy.deepcopy(plain).requires_grad_(False)), "ours": (ours, copy.deepcopy(ours).requires_grad_(False))}
    adam = {"plain": torch.optim.AdamW(plain.parameters(), lr=1e-6), "ours": torch.optim.AdamW(ours.parameters(), lr=1e-6, fused=True)}
    with tempfile.TemporaryDirectory() as folder:
        tracklets = draw_images(Path(folder), args.batch, s.canvas)
        files = [tracklets.root / tracklets.path(i) for i in range(args.batch)]
        decode = {"plain": lambda: [Image.open(file).convert("RGB") for file in files],
                  "ours": lambda: torch.stack([data.Images(tracklets, s.canvas)[i][0] for i in range(args.batch)])}
        steps, views = {"plain": plain_step, "ours": our_step}, {"plain": pil_views(s), "ours": train.view_kinds(s)}
        times = {}
        for n in range(args.repeat + 1):  # the first is not counted
            for how in args.ways:
                clock = [time.perf_counter()]

                def lap(part):
                    times.setdefault((how, part), []).append(time.perf_counter() - clock[0])
                    clock[0] = time.perf_counter()

                steps[how](*networks[how], adam[how], decode[how](), views[how], args.K, lap)
        crops = [torch.randn(2, 3, *s.size)] * 2 + [torch.randn(2, 3, *s.local_size)] * s.local_crops
        counter = FlopCounterMode(display=False)
        with counter:
            with torch.no_grad():
                networks["ours"][1](crops[:2])
            ours(crops).sum().backward()
        flops = counter.get_total_flops() / 2 * args.batch
    a, b = torch.randn(2, 2048, 2048)
    (a @ b).sum()
    clock = time.perf_counter()
    for _ in range(10):
        a @ b
    rate = 10 * 2 * 2048**3 / (time.perf_counter() - clock)
    seconds = {key: float(np.median(values[1:])) for key, values in times.items()}
    parts = ["data", "forward", "loss", "backward", "optimiser", "EMA"]
    rows = [[part, *(f"{seconds[how, part]:.2f}" for how in args.ways)] for part in parts]
    total = {how: sum(seconds[how, part] for part in parts) for how in args.ways}
    rows += [["step", *(f"{total[how]:.2f}" for how in args.ways)], ["images/s", *(f"{args.batch / total[how]:.2f}" for how in args.ways)],
             ["arithmetic", *(f"{flops / rate / total[how]:.0%}" for how in args.ways)]]
    print_rows(f"Seconds of a step of {args.arch}, {args.batch} images, K {args.K}, {len(crops)} crops, D {s.prototypes:,}, {args.threads} threads, median of {args.repeat}",
               ["", *args.ways], rows)
    print(f"\nArithmetic: {flops / 1e9:,.0f} GFLOP a step would take {flops / rate:.2f} s at the {rate / 1e9:,.0f} GFLOP/s of a product of two 2,048 x 2,048 matrices.")


# ---------------------------------------------------------------- ranking

SIZES = {"Market-1501": (3368, 15913, 750, 6), "MSMT17": (11659, 82161, 3060, 15)}  # queries, gallery, identities, cameras


def drawn_features(benchmark: str, strength: float, d: int = 2048) -> tuple:
    """Features of a benchmark's size around a center for each identity, or without one: what evaluate.evaluate takes."""
    Q, G, people, cameras = SIZES[benchmark]
    random = torch.Generator().manual_seed(0)
    ids, cams = torch.randint(people, (Q + G,), generator=random), torch.randint(cameras, (Q + G,), generator=random)
    features, centers = torch.randn(Q + G, d, generator=random), strength * torch.randn(people, d, generator=random)
    for part in torch.arange(Q + G).split(4096):
        features[part] = torch.nn.functional.normalize(features[part] + centers[ids[part]], dim=1)
    return features[:Q], features[Q:], ids[:Q].numpy(), ids[Q:].numpy(), cams[:Q].numpy(), cams[Q:].numpy()


def sort_based(blocks, query_ids, gallery_ids, query_cams, gallery_cams) -> dict:
    """The metric as it is mostly written: every row of similarities sorted."""
    ap = []
    for start, block in blocks:
        for q, similarity in enumerate(block, start):
            order = np.argsort(-similarity)
            valid = (gallery_ids[order] != query_ids[q]) | (gallery_cams[order] != query_cams[q])
            ranks = np.flatnonzero((gallery_ids[order] == query_ids[q])[valid]) + 1
            if len(ranks):
                ap.append((np.arange(1, len(ranks) + 1) / ranks).mean())
    return {"mAP": float(np.mean(ap)), "queries": len(ap)}


def rank_one(benchmark: str, strength: float, what: str) -> dict:
    """Seconds and memory of one way through one set of features."""
    query, gallery, *arrays = drawn_features(benchmark, strength)
    rows = 2**26 // len(gallery)
    if what in ("metric alone", "sorted"):
        blocks = [(first, block.copy()) for first, block in E.similarities(query, gallery)]
    torch.mm(query[:8], gallery[:8].T)  # threads are there
    with measured() as run:
        if what == "bare product":  # blocks of ours' size, written over each other
            block, result = torch.empty(min(rows, len(query)), len(gallery)), {}
            for first in range(0, len(query), rows):
                part = query[first : first + rows]
                torch.mm(part, gallery.T, out=block[: len(part)])
        elif what == "whole evaluation":
            result = E.evaluate(query, gallery, *arrays)
        elif what == "re-ranking and metric":
            result = E.score(((first, -distances) for first, distances in E.reranked(query, gallery)), *arrays)
        else:
            result = {"metric alone": E.score, "sorted": sort_based}[what](blocks, *arrays)
    return {"seconds": run.seconds, "gib": run.peak, "mAP": result.get("mAP"), "queries": result.get("queries")}


def evaluate(args) -> None:
    """The whole evaluation against the bare matrix product, for a strong and a weak encoder; a metric that sorts; re-ranking."""
    rows = []
    for benchmark in args.sizes:
        for name, strength in (("strong", 0.35), ("weak", 0.02)):
            extra = ["metric that sorts"] * (name == "strong") + ["re-ranking and metric"]
            bare = None
            for what in ("bare product", "whole evaluation", "metric alone", *extra):
                runs = [in_a_process("rank_one", benchmark=benchmark, strength=strength, what=what.replace("metric that sorts", "sorted"))
                        for _ in range(1 if what in extra else args.repeat)]
                run = min(runs, key=lambda run: run["seconds"])
                bare = bare or run["seconds"]
                ratio = f"{run['seconds'] / bare:.2f}" if what in ("bare product", "whole evaluation") else ""
                shown = "" if run["mAP"] is None else f"{run['mAP']:.1%}"
                rows.append([benchmark, name, what, f"{run['seconds']:.2f}", ratio, f"{run['gib']:.2f}", shown])
    print_rows("Ranking, d = 2,048", ["size of", "encoder", "what", "seconds", "of bare", "GiB beyond features", "mAP"], rows)


# ---------------------------------------------------------------- videos


def crop(args) -> None:
    """Frames a second of cropping a drawn 1080p video with 22 boxes a frame, of decoding it alone, and of decoding it to RGB."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        video, random = Path(folder) / "drawn.mp4", np.random.default_rng(0)
        small = torch.from_numpy(random.uniform(0, 255, (1, 3, 68, 120)).astype(np.float32))
        scene = torch.nn.functional.interpolate(small, (1080, 1920), mode="bicubic")[0].clamp(0, 255).permute(1, 2, 0).byte().numpy()
        with av.open(str(video), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 1920, 1080, "yuv420p", 8_000_000
            for n in range(args.frames):
                frame = np.roll(scene, 3 * n, 1)
                frame ^= random.integers(0, 32, frame.shape, dtype=np.uint8)  # a sensor's noise
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        left, top, height = random.integers(0, 1800, 22), random.integers(0, 800, 22), random.integers(100, 260, 22)
        tracks = Path(folder) / "drawn.txt"
        tracks.write_text("".join(f"{n},{i},{left[i]},{top[i]},{int(0.4 * height[i])},{height[i]},1,-1,-1,-1\n"
                                  for n in range(1, args.frames + 1) for i in range(22)))

        def decode(convert: bool) -> None:
            with av.open(str(video)) as container:
                container.streams.video[0].thread_type = "AUTO"
                for frame in container.decode(video=0):
                    if convert:
                        frame.to_ndarray(format="rgb24")

        ways = {"decoding": lambda: decode(False), "decoding to RGB": lambda: decode(True),
                "crops of every frame": lambda: data.crop(video, tracks, Path(folder) / "all"),
                "crops of every 5th frame": lambda: data.crop(video, tracks, Path(folder) / "fifth", every=5)}
        rows = []
        for name, way in ways.items():
            with measured() as run:
                way()
            rows.append([name, f"{args.frames / run.seconds:.0f}"])
        size = video.stat().st_size * 8 * 30 / args.frames / 1e6
        print_rows(f"1080p, H.264 at {size:.0f} Mbit/s, 22 boxes a frame", ["what", "frames of the video a second"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("denoise", help=denoise.__doc__)
    command.add_argument("--noises", type=float, nargs="+", default=NOISES, help="how often the tracker fails")
    command.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    command.add_argument("--parts", nargs="+", default=["paper", "levels", "ablation", "calibration", "peers"])
    command.add_argument("--people", help=read_people.__doc__)
    command.set_defaults(run=denoise)
    command = commands.add_parser("scale", help=scale.__doc__)
    command.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    command.add_argument("--ranges", type=int, nargs="*", default=[100, 300, 1000, 3000], help="r_s, tried at 100,000 images")
    command.add_argument("--folder", help="where the features go (default: the system's temporary folder)")
    command.set_defaults(run=scale)
    command = commands.add_parser("loss", help=loss.__doc__)
    command.add_argument("--prototypes", type=int, nargs="+", default=[1000, 8192, 65536])
    command.add_argument("--K", type=int, nargs="+", default=[2, 8])
    command.add_argument("--batch", type=int, default=120)
    command.add_argument("--crops", type=int, default=10)
    command.add_argument("--threads", type=int, default=2)
    command.set_defaults(run=loss)
    command = commands.add_parser("augment", help=augment.__doc__)
    command.add_argument("--batch", type=int, default=32)
    command.add_argument("--repeat", type=int, default=7)
    command.set_defaults(run=augment)
    command = commands.add_parser("index", help=index.__doc__)
    command.add_argument("--images", type=int, default=10_000_000)
    command.add_argument("--videos", type=int, default=21_000)
    command.add_argument("--labelled", type=int, default=4_000_000)
    command.add_argument("--identities", type=int, default=250_000)
    command.set_defaults(run=index)
    command = commands.add_parser("step", help=step.__doc__)
    command.add_argument("--arch", default="r50ibn")
    command.add_argument("--batch", type=int, default=16)
    command.add_argument("--K", type=int, default=8)
    command.add_argument("--repeat", type=int, default=3)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--ways", nargs="+", default=["plain", "ours"])
    command.set_defaults(run=step)
    command = commands.add_parser("evaluate", help=evaluate.__doc__)
    command.add_argument("--sizes", nargs="+", default=[*SIZES], choices=[*SIZES])
    command.add_argument("--repeat", type=int, default=3, help="the fastest of so many runs counts")
    command.set_defaults(run=evaluate)
    command = commands.add_parser("crop", help=crop.__doc__)
    command.add_argument("--frames", type=int, default=300)
    command.set_defaults(run=crop)
    args = parser.parse_args()
    args.run(args)
