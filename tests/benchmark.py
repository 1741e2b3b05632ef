"""Measures, and asserts nothing. Every command prints tables in Markdown, and says what it needs.

    python tests/benchmark.py denoise     # quality against other clusterings, calibration, what each part is worth; 30 min the first time
    python tests/benchmark.py scale       # time and memory from ten thousand images up, effect of the range's width; 10 min

Read first: `denoise`, `scale`, `draw_video`.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data
import denoise as D

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


# ---------------------------------------------------------------- scale

PEOPLE, TRACKLETS, FRAMES = 8, 20, 23  # new people and tracklets in a video, images in a tracklet: LUPerson-NL's proportions
LOOKS = 64  # ways in which people differ: some look alike
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
    return features.astype(np.float16), track, frame, np.array([home * PEOPLE + k for home, k in visits])[who]


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


def run_scale(folder: Path, **options) -> dict:
    """Denoise what `draw_features` left in a folder: seconds and peak memory of every part, and the result's quality."""
    features, (video, track, frame, truth) = np.load(folder / "features.npy", mmap_mode="r"), np.load(folder / "index.npy")
    seconds, clock = {}, [time.time()]

    def lap(name):
        seconds[name] = time.time() - clock[0]
        clock[0] = time.time()

    figures = {"images": len(video), "videos": int(video[-1]) + 1, "tracklets": len(np.unique(track))}
    with measured() as whole:
        space = D.fit_space(features, video, track)
        lap("space")
        placed = np.lib.format.open_memmap(folder / "placed.npy", "w+", np.float16, (len(video), space.matrix.shape[1]))
        D.place(features, video, track, frame, space, out=placed)
        lap("placing")
        sigma, tau = D.calibrate(placed, video, track, frame)
        lap("calibration")
        labels = D.denoise(placed, video, track, frame, sigma, tau, report=lambda level, labels, share: lap(level), **options)
    seconds["check"] = seconds.pop("tracklets")
    return figures | {"seconds": whole.seconds, "parts": seconds, "memory": whole.peak, "sigma": sigma, "tau": tau, "dims": placed.shape[1],
                      "identities": int(labels.max()) + 1, "kept": float((labels >= 0).mean()), **D.pairwise_scores(labels, truth)}  # fmt: skip


def scale(args) -> None:
    """Time and memory at growing sizes, the effect of the range's width, and of looking for people who stay away longer."""
    for images in args.images:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            clock = time.time()
            draw_features(Path(folder), images)
            drawn = time.time() - clock
            code = f"import sys, json; sys.path.insert(0, {str(ROOT / 'tests')!r}); import benchmark as B; from pathlib import Path; " \
                   f"print(json.dumps(B.run_scale(Path({folder!r}))))"  # fmt: skip
            result = json.loads(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(f"{images:>10,} images drawn in {drawn:.0f} s:", json.dumps(result), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("scale", help=scale.__doc__)
    command.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    command.add_argument("--folder", help="where the features go (default: the system's temporary folder)")
    command.set_defaults(run=scale)
    args = parser.parse_args()
    args.run(args)
