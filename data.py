"""Tracklets: person crops that a tracker cut out of videos, as files on disk and as arrays in memory (paper, section 3.1).

The index and its reader, labels in the CION-AL annotation format, cropping videos into tracklets, decoding to a canvas, the
identity sampler, and *walkers*, a synthetic set of tracklets whose true identities are known.

    python data.py crop --video street.mp4 --tracks street.txt --out data/street

Read first: `read_tracklets`, `sample_identities`, `crop`.
"""
import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, encode_jpeg
from torchvision.transforms.functional import pad

# ---------------------------------------------------------------- index


class Tracklets:
    """N images of T tracklets in V videos, held in arrays sorted by (video, track, frame, detection).

    root: folder all paths are relative to. folders: V strings. name: file names, bytes (N,). video, track (dense, unique over
    all videos), frame: int64 (N,).
    """

    def __init__(self, root, folders: list[str], name, video, track, frame):
        self.root, self.folders = Path(root), folders
        self.name, self.video, self.track, self.frame = name, video, track, frame

    def __len__(self) -> int:
        return len(self.name)

    def path(self, i: int) -> str:
        """Path of image i relative to the root, with forward slashes."""
        return os.path.join(self.folders[self.video[i]], os.fsdecode(self.name[i]))

    def paths(self) -> np.ndarray:
        """All relative paths as bytes (N,)."""
        folders = np.array([os.fsencode(os.path.join(folder, "")) for folder in self.folders])
        return np.char.add(folders[self.video], self.name)

    def __str__(self) -> str:
        return f"{len(self.folders):,} videos, {self.track.max() + 1:,} tracklets, {len(self):,} images"


FILE_NAME = re.compile(rb"(\d{1,18})_(\d{1,18})_(\d{1,18})\.jpe?g", re.IGNORECASE)  # <track:06d>_<frame:07d>_<det:02d>.jpg


def read_tracklets(root, keep: int = 100_000) -> Tracklets:
    """Index the JPEG files below a folder in LUPerson-NL's layout, <anything>/<video>/<track>_<frame>_<det>.jpg.

    A folder that holds JPEGs is a video; videos are ordered by path. Files of other types and hidden folders are left alone. The index of `keep`
    and more images is written beside the folder, <root>.index.npz, and read from there until a folder below the root changes.
    Raises ValueError for a missing or empty folder, and for JPEGs whose names are not of that form.
    """
    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder; expected tracklets as <video>/<track>_<frame>_<det>.jpg below it")
    kept = Path(f"{Path(root).absolute()}.index.npz")
    if kept.is_file():
        try:
            with np.load(kept) as file:  # no pickles: arrays only
                folders, name = file["folders"].tolist(), file["name"]
                inside = b"/" not in name.tobytes() and not any(os.path.isabs(f) or ".." in f.split("/") for f in folders)
                if inside and np.array_equal(file["changed"], [last_change(os.path.join(root, folder)) for folder in file["visited"]]):
                    return Tracklets(root, folders, name, file["video"], file["track"], file["frame"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # damaged: scanned again
    changed, folders, columns, wrong = {".": last_change(root)}, [], [], []
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))  # hidden: what `crop` has not finished
        here = os.path.relpath(folder, root)
        changed |= {os.path.join(here, name): last_change(os.path.join(folder, name)) for name in below}  # before they are listed
        names = sorted(os.fsencode(file) for file in files if file.lower().endswith((".jpg", ".jpeg")))
        matches = [FILE_NAME.fullmatch(name) for name in names]
        wrong += [os.path.join(folder, os.fsdecode(name)) for name, match in zip(names, matches) if not match]
        if names and all(matches):
            numbers = np.array([match.groups() for match in matches]).astype(np.int64)  # (n, 3)
            order = np.lexsort(numbers.T[::-1])
            columns.append((np.array(names)[order], np.full(len(names), len(folders)), *numbers[order, :2].T))
            folders.append("" if here == "." else here)
    if wrong:
        raise ValueError(
            f"{root}: {len(wrong):,} JPEG names are not <track>_<frame>_<det>.jpg (three numbers), the first: {', '.join(wrong[:3])}"
        )
    if not folders:
        raise ValueError(f"{root}: no JPEG files; expected <video>/<track>_<frame>_<det>.jpg below it")
    name, video, number, frame = (np.concatenate(column) for column in zip(*columns))
    new = np.ones(len(name), bool)  # rows are sorted, so a tracklet starts where the video or the track number changes
    new[1:] = (video[1:] != video[:-1]) | (number[1:] != number[:-1])
    tracklets = Tracklets(root, folders, name, video, np.cumsum(new) - 1, frame)
    if len(tracklets) >= keep:
        try:
            with replacing(kept) as temporary, open(temporary, "wb") as out:
                np.savez(out, changed=list(changed.values()), visited=list(changed), folders=folders, name=name, video=video, track=tracklets.track, frame=frame)
        except OSError:  # no place to write: the next run scans again
            pass
    return tracklets


def last_change(folder) -> int:
    """When a file last came to, left or was renamed in a folder, nanoseconds."""
    return os.stat(folder).st_mtime_ns


def find_splits(root) -> tuple[Path, Path | None]:
    """The folders to train on and to test on: root/train and root/test where both are there, else all of root and None.
    Without root/test.json, the truth, there is nothing to test on."""
    root = Path(root)
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        return root, None
    return root / "train", root / "test" if (root / "test.json").is_file() else None


# ---------------------------------------------------------------- labels


def write_labels(file, tracklets: Tracklets, labels: np.ndarray) -> None:
    """Write labels int64 (N,), -1 for images in no identity, as a CION-AL annotation: a JSON list of file_path and id,
    sorted by id, ids contiguous from 1. Streams; the file appears whole or not at all."""
    rows = np.flatnonzero(labels >= 0)
    ids = np.unique(labels[rows], return_inverse=True)[1] + 1
    order = np.argsort(ids, kind="stable")
    with replacing(file) as temporary, open(temporary, "w") as out:
        out.write("[")
        for n, (row, identity) in enumerate(zip(rows[order], ids[order])):
            out.write((",\n" if n else "\n") + json.dumps({"file_path": tracklets.path(row), "id": int(identity)}))
        out.write("\n]\n")


def read_annotation(file) -> tuple[np.ndarray, np.ndarray]:
    """Paths as bytes (n,), sorted, and identities int64 (n,), from 0, of a CION-AL annotation: [{"file_path": ..., "id": 1}, ...].

    Raises ValueError for anything but that format, for paths that leave the root they are relative to, or that come twice.
    """
    paths, ids = [], []

    def take(entry):  # millions of dicts would take gigabytes: each is read and dropped
        entry = dict(entry)
        path = entry["file_path"]
        paths.append(os.fsencode(os.path.normpath(path) if "//" in path or "./" in path else path))
        ids.append(entry["id"])

    try:
        entries = json.loads(Path(file).read_bytes(), object_pairs_hook=take)
        if not isinstance(entries, list) or any(entry is not None for entry in entries) or len(entries) != len(ids):
            raise ValueError("something else is in it")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{file}: expected a JSON list of {{"file_path": ..., "id": ...}}; {error!r}') from None
    paths = np.array(paths)
    if not ids or any(type(i) is not int or not 1 <= i < 2**62 for i in ids):
        raise ValueError(f"{file}: expected at least one entry and ids that are whole numbers from 1; got {ids[:3]}")
    outside = [p for p in paths if os.path.isabs(p) or b".." in p.split(b"/")]
    if outside:
        raise ValueError(f"{file}: {len(outside):,} paths leave the folder they are relative to, the first: {os.fsdecode(outside[0])}")
    order = np.argsort(paths)
    paths, ids = paths[order], np.array(ids)[order] - 1
    twice = np.flatnonzero(paths[1:] == paths[:-1])
    if len(twice):
        raise ValueError(f"{file}: {len(twice):,} files are named more than once, the first: {os.fsdecode(paths[twice[0]])}")
    return paths, ids


def read_labels(file, tracklets: Tracklets) -> np.ndarray:
    """Labels int64 (N,) of an index from a CION-AL annotation: id - 1, and -1 for images that it does not name.

    Raises ValueError for anything but that format, and for paths that are not in the index.
    """
    paths, ids = read_annotation(file)
    known = tracklets.paths()
    order = np.argsort(known)
    place = order[np.searchsorted(known, paths, sorter=order).clip(max=len(known) - 1)]
    missing = np.flatnonzero(known[place] != paths)
    if len(missing):
        raise ValueError(
            f"{file}: {len(missing):,} of {len(paths):,} files are not among the images of {tracklets.root}, "
            f"the first: {os.fsdecode(paths[missing[0]])}"
        )
    labels = np.full(len(tracklets), -1, np.int64)
    labels[place] = ids
    return labels


def read_identities(file, root) -> tuple[Tracklets, np.ndarray]:
    """The images that a CION-AL annotation names, as an index whose tracklets are its identities, and their labels (N,).

    Nothing below the root is looked at and files may have any names, so millions of images of CION-AL are there at once."""
    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder; {file} names images below it")
    paths, ids = read_annotation(file)
    parts = np.char.rpartition(paths, b"/")  # (n, 3): folder, slash, name
    folders, video = np.unique(parts[:, 0], return_inverse=True)
    track = np.unique(ids, return_inverse=True)[1]
    return Tracklets(root, [os.fsdecode(folder) for folder in folders], parts[:, 2], video, track, np.zeros(len(ids), np.int64)), ids


class replacing:
    """A temporary file beside `file`, moved over it when the block ends well: readers never see half of it.
    keep=False: only a temporary file, gone at the end."""

    def __init__(self, file, keep: bool = True):
        self.file, self.keep = Path(file), keep
        self.temporary = self.file.with_name(f".{self.file.name}.{os.uname().nodename}.{os.getpid()}")

    def __enter__(self) -> Path:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, error, *_) -> None:
        if error is None and self.keep:
            with open(self.temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(self.temporary, self.file)
        else:
            self.temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- pixels


class Images(Dataset):
    """Images of an index, decoded and resized to one canvas (height, width): i -> (uint8 (3, H, W), readable).

    A file that cannot be read comes as black and not readable, so that one broken JPEG in ten million stops nothing.
    """

    def __init__(self, tracklets: Tracklets, canvas: tuple[int, int]):
        self.tracklets, self.canvas = tracklets, canvas

    def __len__(self) -> int:
        return len(self.tracklets)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        try:
            file = np.fromfile(self.tracklets.root / self.tracklets.path(i), np.uint8)  # any name that the file system has
            image = decode_image(torch.from_numpy(file), ImageReadMode.RGB)
        except (RuntimeError, OSError):
            return torch.zeros(3, *self.canvas, dtype=torch.uint8), False
        if image.shape[1:] != self.canvas:
            image = F.interpolate(image[None], self.canvas, mode="bilinear", antialias=True)[0]
        return image, True


def framed(image: Tensor, colour: tuple[float, float, float], width: int = 3) -> Tensor:
    """A picture (3, H, W) in [0, 1] with a coloured frame of `width` pixels inside its edge."""
    inner = image[:, width:-width, width:-width]
    return torch.stack([pad(channel[None], width, fill=c)[0] for channel, c in zip(inner, colour)])


def ignore_signals(_=None) -> None:
    """Loader workers leave Ctrl-C and SIGTERM to the process that feeds them, which has a checkpoint to write."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def load_batches(tracklets: Tracklets, batches, canvas: tuple[int, int], workers: int = 0) -> DataLoader:
    """Iterate over (uint8 images (B, 3, H, W), readable bool (B,)) for a list of index arrays, each one batch."""
    return DataLoader(
        Images(tracklets, canvas), batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals, prefetch_factor=4 if workers else None,
    )  # fmt: skip


def check_readable(tracklets: Tracklets, sample: int = 1000) -> None:
    """Decode an even sample of the images before a long run. Raises ValueError if more than 1% cannot be read."""
    rows = np.linspace(0, len(tracklets) - 1, min(sample, len(tracklets))).astype(np.int64)
    images = Images(tracklets, (8, 8))
    refuse_unreadable(tracklets, [i for i in rows if not images[i][1]], len(rows))


def refuse_unreadable(tracklets: Tracklets, bad, seen: int) -> None:
    """Raise ValueError if the unreadable images, given by their indices, are more than 1% of those seen."""
    if len(bad) > 0.01 * seen:
        files = ", ".join(str(tracklets.root / tracklets.path(i)) for i in list(bad)[:3])
        raise ValueError(f"{len(bad):,} of {seen:,} images cannot be read as JPEG (more than 1%), the first: {files}")


def replace_unreadable(images: Tensor, readable: Tensor, K: int) -> Tensor:
    """Put another image of the same identity, or else of the batch, in the place of unreadable ones. (B, 3, H, W)."""
    for b in (~readable).nonzero()[:, 0].tolist():
        same = range(b // K * K, b // K * K + K)
        substitute = next((i for i in same if readable[i]), int(readable.float().argmax()))
        images[b] = images[substitute]
    return images


# ---------------------------------------------------------------- sampling


def sample_identities(labels: np.ndarray, K: int, batch: int, seed: int, epoch: int, steps: int) -> np.ndarray:
    """The batches of one epoch: image indices (steps, batch), K images of each identity contiguous. Pure in its arguments.

    Every identity's images are shuffled and cut into groups of K, the remainder left for another shuffle; an identity with fewer
    than K images repeats them. Groups are shuffled into batches, the last incomplete batch is dropped; once all have come, it
    begins anew. Rank r of w takes columns r * batch/w to (r + 1) * batch/w: identities are not split, the union is the same for any w.
    Images with label -1 are left out. Raises ValueError where K does not divide the batch or the identities fill no batch.
    """
    check_batches(labels, [K], batch)
    images, out = np.flatnonzero(labels >= 0), np.empty((0, batch), np.int64)
    count = np.unique(labels[images], return_counts=True)[1]
    start, groups = np.cumsum(count) - count, np.maximum(count // K, 1)
    which = np.repeat(np.arange(len(count)), groups)  # the identity of each group
    nth = np.arange(len(which)) - np.repeat(np.cumsum(groups) - groups, groups)  # its number within the identity
    slot = start[which, None] + (nth[:, None] * K + np.arange(K)) % count[which, None]  # (groups, K), wraps around for short identities
    random = np.random.default_rng([seed, epoch])
    while len(out) < steps:
        shuffled = images[random.permutation(len(images))]
        shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by identity, shuffled within
        full = len(which) * K // batch
        out = np.concatenate([out, random.permutation(shuffled[slot])[: full * batch // K].reshape(full, batch)])
    return out[:steps]


def check_batches(labels: np.ndarray, Ks, batch: int) -> None:
    """Raises ValueError where a K does not divide the batch, or identities do not fill one with K images of each."""
    count = np.unique(labels[labels >= 0], return_counts=True)[1]
    for K in Ks:
        if batch % K:
            raise ValueError(f"a batch of {batch} images cannot hold K={K} of each identity; K must divide it")
        groups = int(np.maximum(count // K, 1).sum())
        if groups * K < batch:
            raise ValueError(f"{len(count):,} identities give {groups:,} groups of K={K}, fewer than the {batch // K} of one batch; "
                             "a smaller --batch needs fewer (--recipe demo has one)")  # fmt: skip


# ---------------------------------------------------------------- from videos to tracklets


def read_tracks(file, confidence: float = -math.inf) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """A MOTChallenge track file, line by line: numbers int64 (n, 2), frame and track; boxes float64 (n, 4), left, top, width, height
    in pixels; and for each reason to drop lines, which those are, bool (n,).

    Lines are `frame, id, left, top, width, height, confidence, ...`, what trackers write. In a truth, which is a file gt.txt or one of
    nine columns of which the last is a visibility, only people (class 1) that are to be considered (flag) are kept.
    Raises ValueError for anything else.
    """
    try:
        with open(file) as lines:
            first = lines.readline()
        if not first.strip():
            raise ValueError("it is empty")
        rows = np.loadtxt(file, delimiter="," if "," in first else None, ndmin=2)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file}: expected lines of numbers, frame,id,left,top,width,height,confidence,...; {error}") from None
    if not rows.size or rows.shape[1] < 6:
        raise ValueError(f"{file}: expected lines of frame,id,left,top,width,height,confidence,...; got {rows.shape[0]} lines of {rows.shape[1]} numbers")
    bad = np.flatnonzero(~np.isfinite(rows[:, :6]).all(1) | (rows[:, :2] != np.trunc(rows[:, :2])).any(1) | (rows[:, 0] < 0))
    if len(bad):
        raise ValueError(f"{file}, line {bad[0] + 1}: expected a frame and a track in whole numbers and a box, got {rows[bad[0], :6].tolist()}")
    numbers, columns = rows[:, :2].astype(np.int64), rows.shape[1]
    if (numbers[:, 1] < 0).all():
        raise ValueError(f"{file}: every id is below 0: these are detections, not tracks; run a tracker first")
    drop = {"of no track": numbers[:, 1] < 0}
    truth = columns > 6 and Path(file).name == "gt.txt" or columns == 9 and (rows[:, 8] >= 0).all()
    if truth:
        drop["not to be considered"] = rows[:, 6] == 0
        drop["not people (a truth: column 8 is read as the class, 1 for people)"] = (rows[:, 7] != 1) if columns == 9 else np.zeros(len(rows), bool)
    elif columns > 6 and confidence > -math.inf:
        drop[f"below confidence {confidence:g}"] = rows[:, 6] < confidence
    return numbers, rows[:, 2:6], drop


def list_frames(folder: Path, first: int | None) -> dict[int, Path]:
    """The images of a folder by their frames: the numbers in their names, or counted from `first` in the order of these."""
    names = [name for name in os.listdir(folder) if name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith(".")]
    digits = {name: re.search(r"(\d+)\.\w+$", name) for name in names}
    if not names or not all(digits.values()):
        raise ValueError(f"{folder}: expected images named by their frames, such as 000001.jpg; got {sorted(names)[:3]}")
    frames = {int(match[1]): folder / name for name, match in digits.items()}
    if len(frames) < len(names):
        raise ValueError(f"{folder}: {len(names)} images have {len(frames)} numbers; expected one image a frame")
    return dict(sorted(frames.items())) if first is None else dict(enumerate((frames[n] for n in sorted(frames)), first))


def decode_frames(video: Path, wanted: np.ndarray, first: int):
    """Frames of a video file, decoded once in order, upright, the first one numbered `first`: yields (number, uint8 (H, W, 3)) for
    those wanted. A video that cannot be decoded to its end stops where it breaks, with a line that says so."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{video}: reading video files needs the package av: pip install av (a folder of frames needs nothing)") from None
    last, wanted, number = int(wanted.max(initial=-1)), set(wanted.tolist()), first
    try:
        with av.open(str(video)) as container:
            if not container.streams.video or container.format.name == "tty":  # which is a text, drawn
                raise ValueError(f"{video}: holds no video")
            container.streams.video[0].thread_type = "AUTO"
            for number, frame in enumerate(container.decode(video=0), first):
                if number in wanted:
                    yield number, np.rot90(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0) // 90)  # as trackers saw it
                if number >= last:
                    return
    except av.error.FFmpegError as error:
        print(f"{video}: broken after frame {number}: {error.strerror}", flush=True)


def crop(video, tracks, out, every: int = 1, confidence: float = -math.inf, min_size: tuple[int, int] = (1, 1), first: int | None = None,
         quality: int = 95, workers: int = 2, name: str = "") -> dict[str, int]:  # fmt: skip
    """Cut a tracker's boxes out of a video: <out>/<name of the video>/<track:06d>_<frame:07d>_<det:02d>.jpg, det being the number of the
    box among the track file's lines of that frame.

    video: a file, or a folder of frames; tracks: a MOTChallenge file, see `read_tracks`; every: of so many frames one; min_size:
    (height, width) that a box must have after it is clipped to the frame. first: number of the first frame; if not given, for a
    folder that in its image's name, for a file 0 where some line names a frame 0, else 1. name: of the folder of crops, if not the video's.
    The folder appears whole or not at all, and is hidden until then. Returns counts. Raises ValueError for wrong input, a folder
    that exists, tracks on frames that a folder does not have, and where more than 1% of the boxes are on frames that are broken.
    """
    video, started = Path(video), time.time()
    if not video.exists():
        raise ValueError(f"{video}: no such file or folder")
    folder = Path(out) / (name or video_name(video))
    if folder.exists():
        raise ValueError(f"{folder}: exists already; delete it or give another --out")
    numbers, boxes, drop = read_tracks(tracks, confidence)
    lowest, highest = numbers[:, 0].min(), numbers[:, 0].max()
    if video.is_dir():
        files = list_frames(video, first)
        first = min(files)
        absent = np.setdiff1d(numbers[:, 0], list(files))
        if len(absent):
            raise ValueError(f"{tracks}: names frame {absent[0]}, and {video} holds frames {first} to {max(files)}; "
                             "--first N numbers its images from N, in order")  # fmt: skip
    elif first is None:
        first = min(int(lowest), 1)
    order = np.argsort(numbers[:, 0], kind="stable")
    _, begin, size = np.unique(numbers[order, 0], return_index=True, return_counts=True)
    det = np.empty(len(numbers), np.int64)
    det[order] = np.arange(len(numbers)) - np.repeat(begin, size)
    drop["between the frames taken"] = (numbers[:, 0] - first) % every != 0
    kept = order[~np.any(list(drop.values()), axis=0)[order]]
    single = np.sort(np.unique(numbers[kept], axis=0, return_index=True)[1])  # of a track's boxes in a frame the first: it is one person
    dropped = {reason: int(which.sum()) for reason, which in drop.items()} | {"second boxes of a track in a frame": len(kept) - len(single)}
    kept = kept[single]
    wanted, begin = np.unique(numbers[kept, 0], return_index=True)
    rows_of = dict(zip(wanted.tolist(), np.split(kept, begin[1:])))
    beside = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}")
    arrived, written = [], [np.zeros(0, np.int64)]  # frames, and rows of the crops

    def take(number: int, future) -> None:
        """Note what of a frame was written."""
        large = future.result()
        if large is not None:
            arrived.append(number)
            written.append(rows_of[number][large])

    try:
        beside.mkdir(parents=True)
        with ThreadPoolExecutor(workers) as pool:  # encoding runs beside decoding
            waiting = deque()
            for number, frame in ((n, files[n]) for n in wanted.tolist()) if video.is_dir() else decode_frames(video, wanted, first):
                rows = rows_of[number]
                waiting.append((number, pool.submit(write_crops, beside, number, frame, numbers[rows, 1], det[rows], boxes[rows], min_size, quality)))
                if len(waiting) > 4 * workers:
                    take(*waiting.popleft())
            while waiting:
                take(*waiting.popleft())
        rows, absent = np.concatenate(written), np.setdiff1d(wanted, arrived)
        missed = sum(len(rows_of[number]) for number in absent.tolist())
        dropped |= {"too small": len(kept) - missed - len(rows), "on broken frames": missed}
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
        if missed > 0.01 * len(kept):
            raise ValueError(f"{video}: {missed:,} of {len(kept):,} boxes are on {len(absent):,} frames that cannot be read (more than 1%), the first: "
                             f"{files[absent[0]] if video.is_dir() else absent[0]}; {tracks} names frames {lowest} to {highest}, and the video's "
                             f"first is taken for frame {first}")  # fmt: skip
        if not len(rows):
            raise ValueError(f"{tracks}: of {len(numbers):,} boxes all are dropped: {reasons}")
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    count = {"crops": len(rows), "tracks": len(np.unique(numbers[rows, 1])), "frames": len(np.unique(numbers[rows, 0]))}
    print(f"{folder}: {count['crops']:,} crops of {count['tracks']:,} tracks on {count['frames']:,} frames, the first frame being number {first}; "
          f"{len(arrived) / (time.time() - started):.0f} frames/s" + (f"; dropped: {reasons}" if reasons else ""), flush=True)  # fmt: skip
    return count | dropped


def write_crops(folder: Path, number: int, frame: np.ndarray | Path, tracks: np.ndarray, det: np.ndarray, boxes: np.ndarray,
                min_size: tuple[int, int], quality: int) -> np.ndarray | None:  # fmt: skip
    """Write the boxes (n, 4) of a frame, an array (H, W, 3) or its file, as JPEGs. Which were large enough, bool (n,); None where the
    file cannot be read."""
    if isinstance(frame, Path):
        try:
            encoded = torch.from_numpy(np.fromfile(frame, np.uint8))
            frame = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True).permute(1, 2, 0).numpy()
        except (RuntimeError, OSError):
            return None
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).round()
    x0, y0, x1, y1 = corners.clip(0, [frame.shape[1], frame.shape[0]] * 2).astype(np.int64).T
    large = (y1 - y0 >= max(min_size[0], 1)) & (x1 - x0 >= max(min_size[1], 1))
    for i in np.flatnonzero(large):
        image = torch.from_numpy(np.ascontiguousarray(frame[y0[i] : y1[i], x0[i] : x1[i]]))  # torch would copy with threads of its own
        jpeg = encode_jpeg(image.permute(2, 0, 1), quality=quality).numpy()
        (folder / f"{tracks[i]:06d}_{number:07d}_{det[i]:02d}.jpg").write_bytes(jpeg.tobytes())
    return large


def video_name(video: Path) -> str:
    """The name of a video's folder of crops: its own without suffix, that of the sequence for MOTChallenge's img1/."""
    video = Path(os.path.abspath(video))
    return video.stem if video.is_file() else video.parent.name if video.name == "img1" else video.name


def crop_split(split, out, tracks=None, **options) -> None:
    """`crop` every sequence of a MOTChallenge split (<split>/<sequence>/img1/), by its own gt/gt.txt, or a tracker's results
    <tracks>/<sequence>.txt. MOT17 holds each video three times, for three detectors: the first with tracks is taken. Sequences
    cropped before are passed over. Raises ValueError where there is none, and for those without tracks."""
    if not Path(split).is_dir():
        raise ValueError(f"{split}: no such folder")
    sequences = sorted(folder.parent for folder in Path(split).glob("*/img1"))
    file_of = lambda sequence: Path(tracks) / f"{sequence.name}.txt" if tracks else sequence / "gt" / "gt.txt"
    videos = {}
    for sequence in sorted(sequences, key=lambda sequence: not file_of(sequence).exists()):
        videos.setdefault(re.sub(r"-(DPM|FRCNN|SDP)$", "", sequence.name), sequence)
    missing = [str(file_of(sequence)) for sequence in videos.values() if not file_of(sequence).exists()]
    if not videos or missing:
        raise ValueError(f"{split}: " + (f"no tracks for {len(missing)} of {len(videos)} sequences, the first: {missing[0]}" if videos else
                         "no sequences; expected <sequence>/img1/000001.jpg and <sequence>/gt/gt.txt, or --tracks FOLDER"))  # fmt: skip
    failed = []
    for sequence in sorted(videos.values()):
        if (Path(out) / sequence.name).exists():
            print(f"{Path(out) / sequence.name}: there already, left as it is", flush=True)
        elif not file_of(sequence).stat().st_size:
            print(f"{file_of(sequence)}: empty, nobody was tracked", flush=True)
        else:
            try:
                crop(sequence / "img1", file_of(sequence), out, **options)
            except ValueError as error:
                failed.append(sequence.name)
                print(error, flush=True)
    if failed:
        raise ValueError(f"{split}: {len(failed)} of {len(videos)} sequences failed, the others are in {out}: {', '.join(failed)}")


# ---------------------------------------------------------------- walkers: drawn people whose identities are known

HEIGHT, WIDTH = 128, 64


def draw_walkers(root, seed: int = 0, people: int = 100, videos: int = 48, held_out: int = 60, noise: float = 1.0, test_videos: int = 24, chunk: int = 32) -> None:
    """Draw a set of tracklets into root: train/ and test/ in LUPerson-NL's layout, their truth in train.json and test.json.

    The people and videos of test/ are others than those of train/; test/ holds fewer frames of each and no identity switches.
    noise scales how often the tracker of train/ fails: switches, fragments, missed and false boxes; 0 is a perfect one.
    Deterministic in the arguments. Draws beside the root, then renames. Raises ValueError if the root exists.
    """
    root = Path(root)
    if root.exists():
        raise ValueError(f"{root}: exists already; delete it to draw walkers there anew")
    beside = root.with_name(f".{root.name}.{os.getpid()}")
    try:
        for split, n, v, frames in (("train", people, videos, (14, 24)), ("test", held_out, test_videos, (6, 10))):
            random = np.random.default_rng([seed, split == "test"])
            looks, cameras, boxes = draw_looks(random, n), draw_cameras(random, v), track_people(random, n, v, frames, split == "train", noise if split == "train" else 1.0)
            for start in range(0, len(boxes["video"]), chunk):
                part = {key: value[start : start + chunk] for key, value in boxes.items()}
                images = torch.from_numpy(draw_boxes(random, looks, cameras, part))
                for image, video, track, frame in zip(images, part["video"], part["track"], part["frame"]):
                    file = beside / split / f"video_{video:03d}" / f"{track:06d}_{frame:07d}_00.jpg"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(encode_jpeg(image, quality=90).numpy().tobytes())
            tracklets = read_tracklets(beside / split)
            order = np.lexsort((boxes["frame"], boxes["track"], boxes["video"]))
            write_labels(beside / f"{split}.json", tracklets, boxes["person"][order])
        if not root.exists():  # another process may have drawn the same
            os.replace(beside, root)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def track_people(random, people: int, videos: int, frames: tuple[int, int], switches: bool, noise: float = 1.0) -> dict[str, np.ndarray]:
    """Who walks where and what the tracker makes of it: one row a box, arrays video, person (-1 for a false box), track,
    frame, heading (radians, 0 faces the camera), phase (gait) and place (along the video's scene)."""
    rows = []
    here = [[] for _ in range(videos)]
    for person in range(people):  # in 2 to 4 videos, not far apart in time
        near = random.integers(videos) + np.arange(-6, 7)
        near = near[(near >= 0) & (near < videos)]
        for video in random.choice(near, min(len(near), random.integers(2, 5)), replace=False):
            here[video].append(person)
    for video, crowd in enumerate(here):
        tracks = 0
        walks = []  # ticks, person, track of every box; tracker faults below change the tracks
        for person in crowd:
            n = random.integers(frames[0], frames[1] + 1)
            tick = random.integers(0, 2 * frames[1]) + np.arange(n)
            walks.append({"tick": tick, "person": np.full(n, person), "track": np.full(n, tracks)})
            tracks += 1
        walks.sort(key=lambda walk: walk["tick"][0])
        for a, b in zip(walks[::2], walks[1::2]) if switches else ():  # identity switch: two tracks go on as each other
            low, high = max(a["tick"][0], b["tick"][0]) + 3, min(a["tick"][-1], b["tick"][-1]) - 3
            if low < high and random.random() < 0.65 * noise:
                at = random.integers(low, high)
                a_track, b_track = a["track"][0], b["track"][0]
                a["track"][a["tick"] >= at], b["track"][b["tick"] >= at] = b_track, a_track
        for walk in walks:  # fragmentation: the tracker loses the person for a frame or two and starts anew
            n = len(walk["tick"])
            if random.random() < 0.5 * noise:
                cut, gap = random.integers(n // 4, n - n // 4), random.integers(0, 3)
                walk["track"][cut:] = tracks + (walk["track"][cut:] != walk["track"][cut])
                tracks += 2
                for key in walk:
                    walk[key] = np.delete(walk[key], np.arange(cut, cut + gap))
        for walk in walks:
            n, t = len(walk["tick"]), walk["tick"] - walk["tick"][0]
            walk["heading"] = random.uniform(-math.pi, math.pi) + random.uniform(-2.0, 2.0) * t / n
            walk["phase"] = random.uniform(0, 2 * math.pi) + random.uniform(0.8, 1.4) * t
            walk["place"] = random.uniform(0, 1) + random.uniform(0.01, 0.04) * t * random.choice([-1, 1])
            walk["person"][random.random(n) < 0.02 * noise] = -1  # the box missed
        for _ in range(random.integers(0, 1 + round(2 * noise))):  # false tracklets: no person at all
            n = random.integers(3, 8)
            tick, drift = random.integers(0, 2 * frames[1]) + np.arange(n), random.uniform(0, 1) + np.zeros(n)
            walks.append({"tick": tick, "person": np.full(n, -1), "track": np.full(n, tracks)} | dict.fromkeys(("heading", "phase", "place"), drift))
            tracks += 1
        for walk in walks:
            rows.append(walk | {"video": np.full(len(walk["tick"]), video)})
    boxes = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    boxes["frame"] = boxes.pop("tick") * 5
    return boxes


def draw_looks(random, people: int) -> dict[str, np.ndarray]:
    """What a person looks like, one row a person: build, colours (people, 3), patterns, clothes, bag."""
    colour = lambda low=0.03, high=0.97: random.uniform(low, high, (people, 3)).astype(np.float32)
    skin = np.float32([0.93, 0.76, 0.65]) * random.uniform(0.35, 1.05, (people, 1)).astype(np.float32)
    hair = np.float32([0.5, 0.35, 0.2]) * random.uniform(0.1, 1.6, (people, 1)).astype(np.float32)
    return {
        "girth": random.uniform(0.8, 1.25, people), "tall": random.uniform(0.9, 1.06, people),
        "skin": skin, "hair": hair, "long_hair": random.random(people) < 0.4,
        "top": colour(), "top_pattern": colour(), "back": colour(), "bottom": colour(0.03, 0.8), "shoes": colour(),
        "stripes": random.integers(0, 2, (people, 2)) * random.uniform(8, 22, (people, 2)),  # per body height, along x and y
        "vest": random.random(people) < 0.2,  # the back of the top has a colour of its own
        "sleeve": random.choice([0.45, 1.0], people), "leg": random.choice([0.5, 1.0], people, p=[0.3, 0.7]),
        "skirt": random.random(people) < 0.25, "bag": random.integers(0, 3, people), "bag_colour": colour(),
    }  # fmt: skip


def draw_cameras(random, videos: int) -> dict[str, np.ndarray]:
    """A colour gain and gamma for every video, and its scene: a wide picture (videos, 3, HEIGHT, 8 * WIDTH)."""
    scene = draw_texture(random, (videos, 6, 24), 8 * WIDTH) + draw_texture(random, (videos, 32, 128), 8 * WIDTH) / 2 - 0.25
    return {
        "gain": random.uniform(0.9, 1.08, (videos, 3)).astype(np.float32),
        "gamma": random.uniform(0.85, 1.2, videos).astype(np.float32),
        "scene": scene.clip(0, 1),
    }


def draw_texture(random, shape: tuple[int, int, int], width: int, saturation: float = 0.4) -> np.ndarray:
    """Smooth blotches of muted colours from a coarse grid, shape (n, rows, columns) -> (n, 3, HEIGHT, width) in [0, 1]."""
    n, rows, columns = shape
    colours = random.uniform(0.2, 0.8, (n, 3, rows, columns)).astype(np.float32)
    muted = saturation * colours + (1 - saturation) * colours[:, :1]
    return F.interpolate(torch.from_numpy(muted), (HEIGHT, width), mode="bilinear").numpy()


def draw_boxes(random, looks: dict, cameras: dict, boxes: dict) -> np.ndarray:
    """The crops of n boxes, uint8 (n, 3, HEIGHT, WIDTH)."""
    n = len(boxes["video"])
    uniform = lambda low, high, *shape: random.uniform(low, high, (n, *shape)).astype(np.float32)
    look = {key: value[np.maximum(boxes["person"], 0)] for key, value in looks.items()}
    image = draw_background(random, cameras["scene"], boxes)

    # body coordinates: y from 0 (crown) to 1 (soles), x in body heights; the tracker's box is not exact
    scale = uniform(0.82, 1.0) * look["tall"].astype(np.float32)
    y = (np.arange(HEIGHT, dtype=np.float32) / HEIGHT - 0.5 - uniform(-0.04, 0.04, 1)) / scale[:, None] + 0.5  # (n, HEIGHT)
    x = (np.arange(WIDTH, dtype=np.float32) / HEIGHT - 0.25 - uniform(-0.03, 0.03, 1)) / scale[:, None]  # (n, WIDTH)
    draw_person(image, x[:, None, :], y[:, :, None], look, boxes, scale * HEIGHT, boxes["person"] >= 0)

    low, aside = uniform(0.55, 0.9, 1), uniform(0.05, 0.2, 1)  # occluders: a block that enters from below, another from a side
    for covered in (y > low)[:, :, None], (x * random.choice([-1, 1], (n, 1)) > aside)[:, None, :]:
        colour = uniform(0.1, 0.9, 3, 1, 1)
        for i in np.flatnonzero(random.random(n) < 0.15):
            image[i] = np.where(covered[i], colour[i], image[i])

    lit = np.linspace(0, 1, 256, dtype=np.float32) ** cameras["gamma"][:, None]  # gamma as a table, (videos, 256)
    levels = (image * 255).astype(np.uint8)
    for i, video in enumerate(boxes["video"]):
        image[i] = lit[video][levels[i]] * cameras["gain"][video, :, None, None]
    weight = uniform(0, 0.33, 1, 1, 1)  # blur along y, then x: three taps
    image[:, :, 1:-1] += weight * (image[:, :, :-2] + image[:, :, 2:] - 2 * image[:, :, 1:-1])
    image[..., 1:-1] += weight * (image[..., :-2] + image[..., 2:] - 2 * image[..., 1:-1])
    image += uniform(0.005, 0.03, 1, 1, 1) * random.standard_normal(image.shape, np.float32)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def draw_background(random, scenes: np.ndarray, boxes: dict, own: float = 0.5) -> np.ndarray:
    """The video's scene where the person walks, mixed with what differs from frame to frame (a share of 1 - own)."""
    n = len(boxes["video"])
    left = (boxes["place"] * scenes.shape[3]).astype(np.int64) + random.integers(-6, 7, n)
    columns = (left[:, None] + np.arange(WIDTH)) % scenes.shape[3]  # (n, WIDTH)
    scene = np.stack([scenes[video][:, :, column] for video, column in zip(boxes["video"], columns)])
    return own * scene + (1 - own) * draw_texture(random, (n, 5, 3), WIDTH)


def draw_person(image: np.ndarray, x: np.ndarray, y: np.ndarray, look: dict, boxes: dict, pixels: np.ndarray, visible: np.ndarray) -> None:
    """Paint a person on each image (n, 3, HEIGHT, WIDTH), limb by limb, far side first.

    x (n, 1, WIDTH) and y (n, HEIGHT, 1) are body coordinates, pixels (n,) the body's height in pixels, visible (n,) bool.
    """
    side, front = np.sin(boxes["heading"]), np.cos(boxes["heading"])  # side is 1 or -1 in profile, front is 1 facing the camera
    girth = look["girth"] * (0.7 + 0.3 * np.abs(front))
    swing = np.sin(boxes["phase"])
    column = lambda value: np.broadcast_to(np.float32(value), len(x))[:, None, None]

    def limb(ax, ay, bx, by, ra, rb, colour, stripes=None, shown=True):
        """A capsule from (ax, ay) to (bx, by), of radius ra at one end and rb at the other, antialiased."""
        ax, ay, bx, by, ra, rb = map(column, (ax, ay, bx, by, ra, rb))
        near_y = (y > np.minimum(ay - ra, by - rb) - 0.01) & (y < np.maximum(ay + ra, by + rb) + 0.01)
        near_x = (x > np.minimum(ax - ra, bx - rb) - 0.01) & (x < np.maximum(ax + ra, bx + rb) + 0.01)
        rows, columns = np.flatnonzero(near_y.any((0, 2))), np.flatnonzero(near_x.any((0, 1)))
        if not len(rows) or not len(columns):
            return
        window = np.s_[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        lx, ly = x[:, :, window[3]], y[:, window[2]]
        px, py, dx, dy = lx - ax, ly - ay, bx - ax, by - ay
        along = ((px * dx + py * dy) / (dx * dx + dy * dy + 1e-8)).clip(0, 1)
        distance = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2) - (ra + along * (rb - ra))
        alpha = (0.5 - distance * pixels[:, None, None]).clip(0, 1) * column(visible & shown)
        colour = colour[:, :, None, None].astype(np.float32)
        if stripes is not None:  # along x, along y, both (a check) or none
            across, down, second = stripes
            wave = np.sin(2 * np.pi * column(across / girth) * lx) + np.sin(2 * np.pi * column(down) * ly)
            colour = np.where(wave[:, None] > 0, second[:, :, None, None], colour)
        image[window] += alpha[:, None] * (colour - image[window])

    facing = (front > 0)[:, None]
    top = np.where(look["vest"][:, None] & ~facing, look["back"], look["top"])
    sleeve = np.where(look["sleeve"][:, None] > 0.5, top, look["skin"])
    shin = np.where(look["leg"][:, None] > 0.5, look["bottom"], look["skin"])
    step = swing * (0.04 + 0.14 * np.abs(side))  # a step shows sideways

    def arm(s):
        shoulder, reach = s * 0.1 * girth * np.abs(front), -s * step * 0.8
        elbow, hand = shoulder + reach * 0.5 + s * 0.015, shoulder + reach
        limb(shoulder, 0.22, elbow, 0.36, 0.032 * girth, 0.026 * girth, top)
        limb(elbow, 0.36, hand, 0.5, 0.026 * girth, 0.02 * girth, sleeve)
        limb(hand, 0.51, hand, 0.52, 0.018, 0.018, look["skin"])

    def leg(s):
        hip, lift = s * 0.045 * girth * np.abs(front), 0.03 * np.maximum(0, s * np.cos(boxes["phase"]))
        knee, foot = hip + s * step * 0.6, hip + s * step
        limb(hip, 0.52, knee, 0.72, 0.05 * girth, 0.038 * girth, look["bottom"])
        limb(knee, 0.72, foot, 0.93 - lift, 0.036 * girth, 0.026 * girth, shin)
        limb(foot, 0.96 - lift, foot + 0.03 * side, 0.965 - lift, 0.022, 0.02, look["shoes"])

    def backpack(shown):
        limb(-0.09 * side, 0.27, -0.09 * side, 0.38, 0.06, 0.065, look["bag_colour"], shown=shown & (look["bag"] == 1))

    backpack(front > -0.3)  # behind the body
    arm(-1)
    leg(-1)
    leg(1)
    limb(0, 0.5, 0, 0.62, 0.09 * girth, 0.12 * girth, look["bottom"], shown=look["skirt"])
    limb(0, 0.23, 0, 0.48, 0.1 * girth, 0.085 * girth, top, (*look["stripes"].T, look["top_pattern"]))
    backpack(front <= -0.3)
    limb(0, 0.14, 0, 0.17, 0.03, 0.03, look["skin"])
    limb(0, 0.055, 0, 0.2, 0.055, 0.06, look["hair"], shown=look["long_hair"])
    limb(0, 0.07, 0.01 * side, 0.09, 0.055, 0.05, look["skin"])
    limb(-0.02 * side, 0.04, -0.02 * side, np.where(front > 0, 0.03, 0.09), 0.052, 0.05, look["hair"])
    arm(1)
    bag = 0.13 * girth * np.sign(front)  # in the left hand
    limb(bag, 0.5, bag, 0.58, 0.04, 0.05, look["bag_colour"], shown=look["bag"] == 2)


def main() -> None:
    """Cut tracklets out of videos."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    command = parser.add_subparsers(required=True).add_parser(
        "crop", help="cut a tracker's boxes out of a video",
        description="Cut a tracker's boxes out of a video into <out>/<video>/<track>_<frame>_<det>.jpg; det is the number of the box among "
                    "the track file's lines of its frame. Refuses where more than 1% of the boxes are on frames that cannot be read.")
    given = command.add_mutually_exclusive_group(required=True)
    given.add_argument("--video", help="a video file (needs the package av), or a folder of frames")
    given.add_argument("--split", help="a MOTChallenge split, <split>/<sequence>/img1/, instead")
    command.add_argument("--tracks", help="MOTChallenge track file; with --split a folder of <sequence>.txt (default: each gt/gt.txt)")
    command.add_argument("--out", required=True, help="folder to write <video>/<track>_<frame>_<det>.jpg into")
    command.add_argument("--name", default="", help="name of the video's folder (default: the video's)")
    command.add_argument("--every", type=int, default=1, help="take every n-th frame")
    command.add_argument("--confidence", type=float, default=-math.inf, help="drop boxes of a lower one (default: keep all)")
    command.add_argument("--min_size", type=int, nargs=2, default=(1, 1), metavar=("H", "W"), help="drop smaller boxes, pixels")
    command.add_argument("--first", type=int, help="what the tracks call the first frame (default: for a file 0 if they name a frame 0, else 1; "
                         "for a folder the number in its image's name)")  # fmt: skip
    command.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100")
    command.add_argument("--workers", type=int, default=2, help="threads that encode crops while the video is decoded")
    args = vars(parser.parse_args())
    for flag, low, high in (("every", 1, math.inf), ("quality", 1, 100), ("workers", 1, math.inf)):
        if not low <= args[flag] <= high:
            raise ValueError(f"--{flag} {args[flag]}: expected {low} " + ("or more" if high == math.inf else f"to {high}"))
    video, split, tracks, out = (args.pop(name) for name in ("video", "split", "tracks", "out"))
    args["min_size"] = tuple(args["min_size"])
    if args["name"] != Path(args["name"]).name:
        raise ValueError(f"--name {args['name']}: expected the name of a folder, not a path")
    if split and args.pop("name"):
        raise ValueError("--name is for one --video; the sequences of a split have theirs")
    if split:
        crop_split(split, out, tracks, **args)
    elif not tracks:
        raise ValueError("--video needs --tracks, a MOTChallenge track file of that video")
    else:
        crop(video, tracks, out, **args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; what is finished stays, what was begun is gone")
