"""Measures, and asserts nothing. Every command prints tables in Markdown.

    python tests/benchmark.py denoise    # the paper's levels, ours, other clusterings
    python tests/benchmark.py scale      # time and memory of denoising, by the number of images
    python tests/benchmark.py loss       # the loss against plain loops: time and memory
    python tests/benchmark.py step       # a training step of the paper's recipe, part by part
    python tests/benchmark.py networks   # parameters, multiply-adds and speed of backbones
    python tests/benchmark.py evaluate   # ranking and re-ranking at the sizes of two benchmarks

`denoise` needs scikit-learn, and an hour the first time, for it trains encoders. `scale` runs on a
CPU, the others on a GPU if there is one. Read first: `paper_levels`, `draw_video`, `make_steps`.
"""
import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data
import denoise
import distill
import evaluate
import model
import train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---------------------------------------------------------------- measuring


def used_memory():
    """GiB: the most that was in use on the GPU, where this process uses one, else what is this
    process's own now and no file's (Linux)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 2**20


def seconds_now():
    """The time, when a GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(function, *args):
    """What a function returns, its seconds, and its peak memory beyond what was there before, GiB,
    looked at 50 times a second."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    used = [used_memory()]
    over = threading.Event()

    def watch():
        while not over.wait(0.02):
            used.append(used_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    start = seconds_now()
    result = function(*args)
    seconds = seconds_now() - start
    over.set()
    thread.join()
    return result, seconds, max(used) - used[0]


def in_a_process(function, *args):
    """Call a function in a process of its own, for a memory that nothing else has used."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def print_table(title, header, rows):
    """A table in Markdown."""
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


# ---------------------------------------------------------------- quality of denoising

NOISES = (0.5, 1.0, 1.5)  # how often the walkers' tracker fails; 1 is the quick start's
SEEDS = (3, 4, 5)  # what denoise.py leaves to choice was chosen on seeds 0 to 2
PARTS = ("paper", "levels", "ablation", "peers")


class Case(NamedTuple):
    """A world to be denoised."""

    index: np.ndarray  # (3, N): video, track, frame
    truth: np.ndarray  # (N,)
    r_s: int
    plain: np.ndarray  # features (N, d), of unit length
    placed: np.ndarray  # (N, k), in the space of denoise.py


def make_case(features, index, truth, r_s):
    """A case from features (N, d) of any length."""
    index = np.asarray(index, np.int64)
    space = denoise.fit_space(features, *index[:2])
    placed = denoise.place(features, *index, space)
    return Case(index, truth.astype(np.int64), r_s, denoise.unit(features), placed)


def encoded_walkers(noise, seed):
    """Walkers with a tracker that fails so often, and features by an encoder trained on their raw
    tracklets: a case. Both are made once, in a few minutes, below data/ and runs/."""
    name = f"walkers-noise{noise}-seed{seed}"
    root = Path("data") / name
    if not root.exists():
        data.draw_walkers(root, seed, noise=noise)
    command = f"{sys.executable} {ROOT}/train.py --data {root} --recipe demo --arch r10ibn"
    command += f" --seed {seed} --name {name} --tracklet_epochs 4 --epochs 0 0"
    print(command, file=sys.stderr, flush=True)
    subprocess.run(command.split(), check=True, stdout=sys.stderr)
    tracklets = data.read_tracklets(root / "train")
    backbone, size = model.load_backbone(f"runs/{name}/last.pt")
    features = evaluate.extract(backbone, tracklets, size, "cpu")
    truth = data.read_labels(root / "train.json", tracklets)
    return make_case(features, [tracklets.video, tracklets.track, tracklets.frame], truth, 130)


def read_people(file, suffix="", remainders=(0, 1)):
    """A case from a file .npz with arrays features (N, d), video, track, frame and truth. Suffix
    "_swapped" takes a tracker that swaps people. remainders: of truth, modulo 2, that are taken."""
    arrays = np.load(file)
    kept = np.isin(arrays["truth"] % 2, remainders)
    index = [arrays[name][kept] for name in ("video", f"track{suffix}", f"frame{suffix}")]
    return make_case(arrays["features"][kept], index, arrays["truth"][kept], 1000)


def f1_of(case, features, **options):
    """Pairwise F1 of denoise.py on features (N, d) of a case."""
    labels = denoise.denoise(features, *case.index, **{"r_s": case.r_s} | options)
    return denoise.pairwise_scores(labels, case.truth)["f1"]


def best_f1(case, features, sigma_csts, sigma_drms, **options):
    """The best F1 of a grid of thresholds, by the truth."""
    best = 0.0
    for cst in sigma_csts:
        for drm in sigma_drms:
            best = max(best, f1_of(case, features, sigma_cst=cst, sigma_drm=drm, **options))
    return best


def paper_levels(case):
    """F1 of the paper's levels and of ours, by their own thresholds or the best by the truth."""
    raw = denoise.number_pairs(*case.index[:2])
    plain = (0.1, 0.3, 2.0), np.linspace(0.02, 0.3, 15)
    closure = (0.8, 2.0), np.linspace(0.2, 0.7, 11)
    closest = (0.8, 2.0), np.arange(0.64, 0.93, 0.02)
    return {
        "raw tracklets": denoise.pairwise_scores(raw, case.truth)["f1"],
        "paper's levels, 0.2 and 0.18": f1_of(case, case.plain, paper=True),
        "paper's levels, thresholds by truth": best_f1(case, case.plain, *plain, paper=True),
        "paper's levels in our space, by truth": best_f1(case, case.placed, *closure, paper=True),
        "ours, no truth": f1_of(case, case.placed),
        "ours, thresholds by truth": best_f1(case, case.placed, *closest),
        "ours, a range over all, no truth": f1_of(case, case.placed, r_s=len(case.truth)),
    }


def ablation(case):
    """F1 without each of our additions, with fewer levels, and with other ranges."""
    found = {"all of it": f1_of(case, case.placed)}
    for name in denoise.ADDITIONS:
        features = case.placed
        if name in ("center", "whiten"):
            space = denoise.fit_space(case.plain, *case.index[:2], **{name: False})
            features = denoise.place(case.plain, *case.index, space)
        found[f"`--without {name}`"] = f1_of(case, features, without=(name,))
    for levels in (1, 2):
        found[f"`--levels {levels}`"] = f1_of(case, case.placed, levels=levels)
    for share in (0.25, 0.5, 2, 4):
        found[f"range times {share}"] = f1_of(case, case.placed, r_s=int(share * case.r_s))
    return found


def level_figures(case):
    """What there is before level 1 and after each: its name, and number of identities, share of
    images kept, n_S and its two parts, precision, recall and F1."""
    sigmas = denoise.calibrate(case.placed, *case.index, case.r_s)
    for level, labels in denoise.level_by_level(case.placed, case.index, sigmas, case.r_s):
        n_S = denoise.noise(case.placed, labels, *sigmas, case.r_s)
        scores = denoise.pairwise_scores(labels, case.truth)
        yield level, [labels.max() + 1, (labels >= 0).mean(), *n_S, *scores.values()]


def peers(case):
    """F1 of other clusterings of images and of tracklets, with their best parameters by the truth,
    and of ours without it. Distances are cosines, or Jaccard's of k-reciprocal neighbours (k1 20,
    k2 6): every image is there twice, as query and gallery, hence twice of both."""
    track = denoise.number_pairs(*case.index[:2])
    found = {"ours, no truth": f1_of(case, case.placed)}
    for space, x in (("plain", case.plain), ("in our space", case.placed)):
        centroids = denoise.centroids_of(x, track)
        for items, of, y in (("images", np.arange(len(x)), x), ("tracklets", track, centroids)):
            cosine = np.clip(1 - y @ y.T, 0, 2)
            jaccard = evaluate.rerank(y, y, k1=40, k2=12, lambda_value=0.0).clip(0)
            for kind, distance in (("cosine", cosine), ("Jaccard", jaccard)):
                where = f"of {items}, {kind}, {space}"
                found[f"DBSCAN {where}"] = best_dbscan(distance, of, case.truth)
                found[f"average linkage {where}"] = best_linkage(distance, of, case.truth)
    return found


def best_dbscan(distance, of, truth):
    """F1 of scikit-learn's DBSCAN at its best parameters; distances (n, n) of items, of (N,) which
    item an image belongs to."""
    from sklearn.cluster import DBSCAN

    sample = distance[:: max(1, len(distance) // 500)]
    near = np.quantile(sample, np.geomspace(0.0003, 0.03, 12))
    best = 0.0
    for eps in np.unique(near[near > 0]):
        for least in (2, 4):
            items = DBSCAN(eps=eps, min_samples=least, metric="precomputed").fit_predict(distance)
            best = max(best, denoise.pairwise_scores(items[of], truth)["f1"])
    return best


def best_linkage(distance, of, truth):
    """F1 of SciPy's average linkage at its best cut; distances and `of` as above."""
    tree = linkage(distance[np.triu_indices(len(distance), 1)], "average")
    best = 0.0
    for cut in np.quantile(tree[:, 2], np.linspace(0.3, 0.999, 60)):
        items = fcluster(tree, cut, "distance") - 1
        best = max(best, denoise.pairwise_scores(items[of], truth)["f1"])
    return best


def print_f1(title, cases, function):
    """A table of the F1 that a function finds of a case, {row: F1}: a column a set, its mean."""
    columns = []
    for name, several in cases.items():
        print(title, name, file=sys.stderr, flush=True)
        columns.append([function(case) for case in several])
    rows = []
    for row in columns[0][0]:
        means = [np.mean([found[row] for found in column]) for column in columns]
        rows.append([row, *(f"{mean:.3f}" for mean in means)])
    print_table(title, ["F1", *cases], rows)


def quality(args):
    """Denoising of walkers and, where features of people are given, of these."""
    cases = {}
    for noise in NOISES:
        cases[f"walkers {noise}"] = [encoded_walkers(noise, seed) for seed in SEEDS]
    if args.people:
        cases["people"] = [read_people(args.people)]
        cases["people, swaps"] = [read_people(args.people, "_swapped")]
        cases["other half"] = [read_people(args.people, remainders=(1,))]
    if "paper" in args.parts:
        print_f1("The paper's levels, and ours", cases, paper_levels)
    if "levels" in args.parts:
        header = ["", "after", "identities", "images kept", "n_S", "too wide", "too close"]
        rows = []
        for name, several in cases.items():
            for same_level in zip(*map(level_figures, several)):
                levels, found = zip(*same_level)
                identities, kept, *values = np.mean(found, axis=0)
                n_S = [f"{value:.2f}" for value in values[:3]]
                scores = [f"{value:.3f}" for value in values[3:]]
                rows.append([name, levels[0], f"{identities:.0f}", f"{kept:.1%}", *n_S, *scores])
        print_table("Level by level", [*header, "P", "R", "F1"], rows)
    if "ablation" in args.parts:
        print_f1("What each addition is worth", cases, ablation)
    if "peers" in args.parts:
        print_f1("Other clusterings, their best parameters by the truth", cases, peers)


# ---------------------------------------------------------------- scale of denoising

# new people and tracklets of a video, images of a tracklet: LUPerson-NL's proportions
PEOPLE = 8
TRACKLETS = 20
FRAMES = 23
LOOKS = 32  # ways in which people differ: some look alike
AWAY = 150  # videos after which one person of each video returns


def draw_video(seed, v):
    """Features of a synthetic video, from (seed, v) alone: float16 (460, 256), and tracklet
    (0..19), frame and person, (460,) each.

    Each video brings 8 new people, who all return once within the next 16 videos, and one of them
    after 150 more. Some leave two tracklets; in every third video two tracklets go on as each
    other. A feature is the person's looks, and directions of the video, the tracklet, the image."""
    visits = [(v, k) for k in range(PEOPLE)]
    visits += [(v - 1 - 2 * k, k) for k in range(PEOPLE)]
    visits += [(v - AWAY, 0)]
    visits = [(home, k) for home, k in visits if home >= 0]
    whole = len(visits)
    visits += visits[: TRACKLETS - whole]
    random = np.random.default_rng([seed, 0, v])
    looks = []
    for home, k in visits:
        drawn = np.random.default_rng([seed, 1, home]).standard_normal((PEOPLE, LOOKS), np.float32)
        looks.append(drawn[k])
    directions = np.random.default_rng([seed, 2]).standard_normal((LOOKS, 256), np.float32)
    people = np.stack(looks) @ directions / np.sqrt(LOOKS)
    people += 0.35 * random.standard_normal(people.shape, np.float32)

    # a fragment goes on where the first one ended
    start = random.integers(0, 3 * FRAMES, len(visits))
    start[whole:] = start[: len(visits) - whole] + FRAMES + 2
    frame = (start[:, None] + np.arange(FRAMES)).ravel()
    who = np.repeat(np.arange(len(visits)), FRAMES)
    track = who.copy()
    if v % 3 == 0:
        late = frame >= (start[0] + start[1] + FRAMES) // 2
        track[late & (who == 0)] = 1
        track[late & (who == 1)] = 0

    features = people[who] + 1.2 * random.standard_normal(256).astype(np.float32)
    features += 1.5 * random.standard_normal(features.shape, np.float32)
    person = np.array([home * PEOPLE + k for home, k in visits])[who]
    order = np.lexsort((frame, track))
    features = denoise.unit(features).astype(np.float16)
    return features[order], track[order], frame[order], person[order]


def draw_features(folder, images):
    """Write features of so many images, float16, and their index and truth, (4, images)."""
    index = []
    count = 0
    with open(folder / "features", "wb") as file:
        while count < images:
            v = len(index)
            x, track, frame, person = draw_video(0, v)
            x.tofile(file)
            index.append([np.full(len(x), v), v * TRACKLETS + track, frame, person])
            count += len(x)
    np.save(folder / "index.npy", np.concatenate(index, axis=1)[:, :images])


def denoise_folder(folder):
    """Denoise what `draw_features` left in a folder: counts, seconds, peak memory, scores."""
    *index, truth = np.load(folder / "index.npy")
    features = np.memmap(folder / "features", np.float16, "r", shape=(len(truth), 256))

    def run():
        space = denoise.fit_space(features, *index[:2])
        shape = len(truth), space.matrix.shape[1]
        placed = np.lib.format.open_memmap(folder / "placed.npy", "w+", np.float16, shape)
        denoise.place(features, *index, space, placed)
        return denoise.denoise(placed, *index)

    labels, seconds, memory = measure(run)
    counts = [len(truth), index[0].max() + 1, len(np.unique(index[1])), labels.max() + 1]
    return counts, seconds, memory, denoise.pairwise_scores(labels, truth)


def scale(args):
    """Time and memory of denoising, each size in a process of its own. Features take 1 GB of disk
    a million images, in the system's temporary folder."""
    rows = []
    for images in args.images:
        with tempfile.TemporaryDirectory() as folder:
            draw_features(Path(folder), images)
            counts, seconds, memory, scores = in_a_process(denoise_folder, Path(folder))
        counts = [f"{count:,}" for count in counts]
        costs = [f"{seconds:.1f}", f"{1e6 * seconds / images:.1f}", f"{memory:.2f}"]
        rows.append([*counts, *costs, *(f"{score:.3f}" for score in scores.values())])
    header = ["images", "videos", "tracklets", "identities", "seconds", "microseconds an image"]
    print_table("Time and memory of denoising", [*header, "GiB", "P", "R", "F1"], rows)


# ---------------------------------------------------------------- the loss


def plain_loops(student, teacher, center, K):
    """Eq. 9 as it reads: loops over an identity's images i, j and their views u, v, for all
    identities of the batch at once. student (V, B, D), teacher (2, B, D)."""
    p = torch.softmax((teacher - center) / 0.04, dim=-1)
    # K tensors (views, identities, D): the first image of each identity, the second, ...
    teachers = p.unflatten(1, (-1, K)).unbind(2)
    students = student.unflatten(1, (-1, K)).unbind(2)
    total = 0
    terms = 0
    for i in range(K):
        for j in range(K):
            for u, target in enumerate(teachers[i]):
                for v, logits in enumerate(students[j]):
                    if (i, u) != (j, v):
                        log_q = torch.log_softmax(logits / 0.1, dim=-1)
                        total = total - (target * log_q).sum()
                        terms += len(target)
    return total / terms


LOSSES = {"plain loops": plain_loops, "`identity_loss`": distill.identity_loss}


def run_loss(name, D, K, batch):
    """Forward and backward of the head's last layer and a loss, 10 crops: seconds (best of 3),
    memory in GiB, and the loss."""
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    z = normalize(torch.randn(10, batch, 256), dim=-1).requires_grad_()
    prototypes = normalize(torch.randn(D, 256), dim=-1).requires_grad_()
    teacher = normalize(torch.randn(2, batch, 256), dim=-1) @ prototypes.detach().T
    center = torch.zeros(D)

    def run():
        z.grad = None
        prototypes.grad = None
        value = LOSSES[name](z @ prototypes.T, teacher, center, K)
        value.backward()
        return value.item()

    value, first, memory = measure(run)
    others = [measure(run)[1] for _ in range(2)]
    return min(first, *others), memory, value


def loss(args):
    """The identity-guided loss in linear time against plain loops."""
    rows = []
    for D in args.prototypes:
        for K in (2, 8):
            for name in LOSSES:
                seconds, memory, value = in_a_process(run_loss, name, D, K, args.batch)
                rows.append([f"{D:,}", K, name, f"{seconds:.3f}", f"{memory:.2f}", f"{value:.5f}"])
    title = f"Last layer and loss, {args.batch} images, 10 crops, {DEVICE}"
    print_table(title, ["D", "K", "", "seconds", "GiB", "loss"], rows)


# ---------------------------------------------------------------- a training step, networks


def make_steps(s, device):
    """The training step of train.py, again and again: yields the name of each part after it. The
    images are in memory."""
    student, teacher = train.make_networks(s, device)
    optimizer = train.make_optimizer(student)
    center = torch.zeros(s.prototypes, device=device)
    images = torch.randint(0, 256, (s.batch, 3, *s.size), dtype=torch.uint8, device=device)
    generator = torch.Generator().manual_seed(0)
    while True:
        views = distill.make_views(images, train.view_kinds(s), generator)
        yield "views"
        with train.networks_in_bfloat16(s, device):
            with torch.no_grad():
                taught = teacher(views[:2])
            logits = student(views)
        yield "forward"
        value = distill.identity_loss(logits, taught, center, s.K[-1])
        yield "loss"
        value.backward()
        yield "backward"
        train.clip_gradients(student)
        optimizer.step()
        optimizer.zero_grad()
        distill.update_teacher(teacher, student, 0.996)
        yield "optimiser, teacher"


def time_steps(steps):
    """Seconds of each part, the median of three steps after the first, which warms up."""
    seconds = {}
    start = seconds_now()
    for part in islice(steps, 4 * 5):
        now = seconds_now()
        seconds.setdefault(part, []).append(now - start)
        start = now
    return {part: np.median(times[1:]) for part, times in seconds.items()}


def step(args):
    """A training step of the paper's recipe."""
    device = train.join_processes()
    torch.empty(1, device=device)  # a GPU is in use from now on
    for arch in args.arch or ("r50ibn", "vit_small"):
        s = train.Settings(arch=arch, batch=args.batch)
        seconds, _, memory = measure(time_steps, make_steps(s, device))
        total = sum(seconds.values())
        rows = [[part, f"{value:.3f}"] for part, value in seconds.items()]
        rows += [["step", f"{total:.3f}"], ["images/s", f"{s.batch / total:.1f}"]]
        rows += [["peak memory, GiB", f"{memory:.1f}"]]
        title = f"A step of {s.batch} images, {device_name()}"
        print_table(title, [f"`{arch}`", "seconds"], rows)


def device_name():
    """What the figures were measured on."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


@torch.no_grad()
def networks(args):
    """Backbones: parameters, width of the embedding, multiply-adds of a 256x128 image, and images
    a second forward, in float32, 16 at a time."""
    rows = []
    for arch in args.arch or model.ARCHITECTURES:
        network = model.build(arch).eval()
        # torch counts a multiply-add as two, and attention only where it is plain products
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 256, 128))
        giga = counter.get_total_flops() / 2e9
        network.to(DEVICE)
        images = torch.randn(16, 3, 256, 128, device=DEVICE)
        network(images)
        start = seconds_now()
        for _ in range(3):
            network(images)
        speed = 3 * len(images) / (seconds_now() - start)
        count = sum(p.numel() for p in network.parameters())
        figures = [f"{count:,}", network.embed_dim, f"{giga:.2f} G", f"{speed:,.0f}"]
        rows.append([f"`{arch}`", model.AUTHORS.get(arch, ""), *figures])
    header = ["`--arch`", "short", "parameters", "embedding", "multiply-adds", "images/s"]
    print_table(f"Networks, {device_name()}", header, rows)


# ---------------------------------------------------------------- ranking

# queries, gallery, identities, cameras
SIZES = {"Market-1501": (3368, 15913, 750, 6), "MSMT17": (11659, 82161, 3060, 15)}


def draw_benchmark(name):
    """Features (2,048 dimensions) around a center for each identity, and the rest that
    `evaluate.evaluate` takes."""
    Q, G, people, cameras = SIZES[name]
    torch.manual_seed(0)
    ids = torch.randint(people, (Q + G,))
    cams = torch.randint(cameras, (Q + G,))
    centers = 0.35 * torch.randn(people, 2048)
    features = normalize(torch.randn(Q + G, 2048) + centers[ids])
    query, gallery = features.to(DEVICE).split([Q, G])
    ids = ids.numpy()
    cams = cams.numpy()
    return query, gallery, ids[:Q], ids[Q:], cams[:Q], cams[Q:]


def rank_once(name, what):
    """mAP (nan for the bare product), seconds and memory."""
    query, gallery, *protocol = draw_benchmark(name)
    torch.mm(query[:8], gallery[:8].T)  # starts threads

    def run():
        if what == "bare product":
            for part in query.split(1024):
                torch.mm(part, gallery.T)
            return {"mAP": float("nan")}
        rows = evaluate.similarities(query, gallery)
        if what == "re-ranking":
            rows = (-distances for distances in evaluate.reranked(query, gallery))
        return evaluate.score(rows, *protocol)

    result, seconds, memory = measure(run)
    return result["mAP"], seconds, memory


def ranking(args):
    """Ranking against the bare product of queries and gallery; re-ranking."""
    rows = []
    for name in args.sizes:
        for what in ("bare product", "ranking", "re-ranking"):
            mAP, seconds, memory = in_a_process(rank_once, name, what)
            rows.append([name, what, f"{seconds:.2f}", f"{memory:.2f}", f"{mAP:.1%}"])
    header = ["size of", "what", "seconds", "GiB beyond features", "mAP"]
    print_table(f"Ranking, {device_name()}", header, rows)


COMMANDS = {
    "denoise": quality,
    "scale": scale,
    "loss": loss,
    "step": step,
    "networks": networks,
    "evaluate": ranking,
}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--people", help="denoise: a file .npz, see `read_people`")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="denoise: which tables")
    add("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="scale")
    add("--prototypes", type=int, nargs="+", default=[1000, 8192, 65536], help="loss: D")
    add("--batch", type=int, default=120, help="loss, step: images")
    add("--arch", nargs="+", help="step, networks")
    add("--sizes", nargs="+", choices=SIZES, default=SIZES, help="evaluate")
    args = parser.parse_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
