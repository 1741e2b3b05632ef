"""Tracklets: person crops that a tracker cut out of videos, as files on disk and as arrays in memory (paper, section 3.1).

The index, labels in the CION-AL annotation format, decoding, the identity sampler, cropping videos into tracklets
(`python data.py crop --video street.mp4 --tracks street.txt --out data/street`) and *walkers*, drawn people whose identities are known.
Read first: `read_tracklets`, `sample_identities`, `crop`.
"""
import argparse
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, encode_jpeg

FILE_NAME = re.compile(rb"(\d{1,18})_(\d{1,18})_(\d{1,18})\.jpe?g", re.IGNORECASE)  # <track:06d>_<frame:07d>_<det:02d>.jpg


def require(holds, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not holds:
        raise ValueError(message)


def refuse(source, wrong, what: str) -> None:
    """Raise ValueError that counts what is wrong in a source and names the first of it, if anything is."""
    if len(wrong):
        raise ValueError(f"{source}: {len(wrong):,} {what}, the first: {os.fsdecode(wrong[0])}")


class Tracklets:
    """N images of T tracklets in V videos, in arrays sorted by (video, track, frame, detection): name (file names, bytes),
    video, track (dense, unique over all videos) and frame, int64, each (N,). folders: of the V videos, relative to the root."""

    def __init__(self, root, folders: list[str], name, video, track, frame):
        self.root, self.folders, self.name, self.video, self.track, self.frame = Path(root), folders, name, video, track, frame

    def __len__(self) -> int:
        return len(self.name)

    def __str__(self) -> str:
        return f"{len(self.folders):,} videos, {self.track.max() + 1:,} tracklets, {len(self):,} images"

    def path(self, i: int) -> str:
        """Path of image i relative to the root."""
        return os.path.join(self.folders[self.video[i]], os.fsdecode(self.name[i]))

    def paths(self) -> np.ndarray:
        """All relative paths as bytes (N,)."""
        return np.char.add(np.array([os.fsencode(os.path.join(folder, "")) for folder in self.folders])[self.video], self.name)


def read_tracklets(root, keep: int = 100_000) -> Tracklets:
    """Index the JPEG files below a folder in LUPerson-NL's layout, <anything>/<video>/<track>_<frame>_<det>.jpg; videos by path,
    other files and hidden folders left alone. An index of `keep` and more images is kept beside the folder, <root>.index.npz, and read
    from there until a folder below the root changes. Raises ValueError for a folder without such files, and for JPEGs of other names."""
    require(os.path.isdir(root), f"{root}: no such folder; expected tracklets as <video>/<track>_<frame>_<det>.jpg below it")
    kept = Path(f"{Path(root).absolute()}.index.npz")
    last_change = lambda folder: os.stat(os.path.join(root, folder)).st_mtime_ns  # when a file came, left or was renamed
    with suppress(Exception), np.load(kept) as file:  # whatever is wrong with it: scan
        folders, name = file["folders"].tolist(), file["name"]
        inside = b"/" not in name.tobytes() and not any(os.path.isabs(f) or ".." in f.split("/") for f in folders)
        if inside and np.array_equal(file["changed"], [last_change(folder) for folder in file["visited"]]):
            return Tracklets(root, folders, name, file["video"], file["track"], file["frame"])
    changed, folders, columns, wrong = {".": last_change(".")}, [], [], []
    for folder, below, files in os.walk(root, followlinks=True):
        here = os.path.relpath(folder, root)
        below[:] = sorted(name for name in below if not name.startswith("."))  # hidden: what `crop` has not finished
        changed |= {path: last_change(path) for path in (os.path.join(here, name) for name in below)}  # before they are listed
        names = sorted(os.fsencode(file) for file in files if file.lower().endswith((".jpg", ".jpeg")))
        matches = [FILE_NAME.fullmatch(name) for name in names]
        wrong += [os.path.join(here, os.fsdecode(name)) for name, match in zip(names, matches) if not match]
        if names and all(matches):
            numbers = np.array([match.groups() for match in matches]).astype(np.int64)  # (n, 3)
            order = np.lexsort(numbers.T[::-1])
            columns.append((np.array(names)[order], np.full(len(names), len(folders)), *numbers[order, :2].T))
            folders.append("" if here == "." else here)
    refuse(root, wrong, "JPEG names are not <track>_<frame>_<det>.jpg (three numbers)")
    require(folders, f"{root}: no JPEG files; expected <video>/<track>_<frame>_<det>.jpg below it")
    name, video, number, frame = (np.concatenate(column) for column in zip(*columns))
    track = np.cumsum((np.diff(video, prepend=-1) != 0) | (np.diff(number, prepend=-1) != 0)) - 1  # rows are sorted
    if len(name) >= keep:
        with suppress(OSError), replacing(kept) as temporary, open(temporary, "wb") as out:  # no place to write: not kept
            np.savez(out, visited=[*changed], changed=[*changed.values()], folders=folders, name=name, video=video, track=track,
                     frame=frame)
    return Tracklets(root, folders, name, video, track, frame)


def find_splits(root) -> tuple[Path, Path | None]:
    """root/train and root/test where both are there, else root and None. Without root/test.json, the truth, nothing is tested on."""
    train, test = Path(root) / "train", Path(root) / "test"
    if not (train.is_dir() and test.is_dir()):
        held_out = [file for file in Path(root).glob("*/test.json") if file.with_suffix("").is_dir()]
        refuse(root, held_out, "folders below it hold people out, who would be learned from; give one of these")
        return Path(root), None
    return train, test if test.with_suffix(".json").is_file() else None


@contextmanager
def replacing(file, keep: bool = True):
    """A temporary name beside `file`, for a file or a folder that is moved over it when the block ends well: readers never see
    half of it. keep=False: only temporary, gone at the end."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        yield temporary
        if keep and not temporary.is_dir():
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        if keep and not (temporary.is_dir() and file.exists()):  # another process may have made the same folder
            os.replace(temporary, file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- labels
def write_labels(file, tracklets: Tracklets, labels: np.ndarray) -> None:
    """Write labels int64 (N,), -1 for images in no identity, as a CION-AL annotation: a JSON list of file_path and id,
    sorted by id, ids contiguous from 1. Streams; the file appears whole or not at all."""
    rows = np.flatnonzero(labels >= 0)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    ids = np.unique(labels[rows], return_inverse=True)[1] + 1
    with replacing(file) as temporary, open(temporary, "w") as out:
        out.write("[")
        for n, (row, identity) in enumerate(zip(rows, ids)):
            out.write((",\n" if n else "\n") + json.dumps({"file_path": tracklets.path(row), "id": int(identity)}))
        out.write("\n]\n")


def read_annotation(file) -> tuple[np.ndarray, np.ndarray]:
    """Paths as bytes (n,), sorted, and identities int64 (n,), from 0, of a CION-AL annotation: [{"file_path": ..., "id": 1}, ...].
    Raises ValueError for anything but that format, for paths that leave the root they are relative to, or that come twice."""
    paths, ids = [], []

    def take(entry):
        """Keep what an entry says, not the entry: millions of dicts would take gigabytes."""
        entry = dict(entry)
        path = entry["file_path"]
        ids.append(entry["id"])
        paths.append(os.fsencode(os.path.normpath(path) if "//" in path or "./" in path else path))

    try:
        entries = json.loads(Path(file).read_bytes(), object_pairs_hook=take)
        require(entries == [None] * len(ids), "something else is in it")
        require(ids and all(type(i) is int and 1 <= i < 2**62 for i in ids), f"at least one entry, ids whole numbers from 1; got {ids[:3]}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{file}: expected a JSON list of {{"file_path": ..., "id": ...}}; {error!r}') from None
    refuse(file, [p for p in paths if os.path.isabs(p) or b".." in p.split(b"/")], "paths leave the folder they are relative to")
    paths, ids = np.array(paths), np.array(ids) - 1
    order = np.argsort(paths)
    paths, ids = paths[order], ids[order]
    refuse(file, paths[1:][paths[1:] == paths[:-1]], "files are named more than once")
    return paths, ids


def read_labels(file, tracklets: Tracklets) -> np.ndarray:
    """Labels int64 (N,) of an index from a CION-AL annotation: id - 1, and -1 for images that it does not name.
    Raises ValueError for anything but that format, and for paths that are not in the index."""
    paths, ids = read_annotation(file)
    known = tracklets.paths()
    order = np.argsort(known)
    place = order[np.searchsorted(known, paths, sorter=order).clip(max=len(known) - 1)]
    refuse(file, paths[known[place] != paths], f"of {len(paths):,} files are not among the images of {tracklets.root}")
    labels = np.full(len(tracklets), -1, np.int64)
    labels[place] = ids
    return labels


def read_identities(file, root) -> tuple[Tracklets, np.ndarray]:
    """The images that a CION-AL annotation names, as an index whose tracklets are its identities, and their labels (N,).
    Nothing below the root is looked at, and files may have any names."""
    require(os.path.isdir(root), f"{root}: no such folder; {file} names images below it")
    paths, ids = read_annotation(file)
    parts = np.char.rpartition(paths, b"/")  # (n, 3): folder, slash, name
    folders, video = np.unique(parts[:, 0], return_inverse=True)
    track = np.unique(ids, return_inverse=True)[1]
    return Tracklets(root, [os.fsdecode(folder) for folder in folders], parts[:, 2], video, track, np.zeros(len(ids), np.int64)), ids


# ---------------------------------------------------------------- pixels
class Images(Dataset):
    """Images of an index, decoded and resized to one canvas (height, width): i -> (uint8 (3, H, W), readable).
    A file that cannot be read comes as black and not readable, so that one broken JPEG in ten million stops nothing."""

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
    frame = image.new_tensor(colour)[:, None, None].repeat(1, *image.shape[1:])
    frame[:, width:-width, width:-width] = image[:, width:-width, width:-width]
    return frame


def ignore_signals(_=None) -> None:
    """Loader workers leave Ctrl-C and SIGTERM to the process that feeds them, which has a checkpoint to write."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load_batches(tracklets: Tracklets, batches, canvas: tuple[int, int], workers: int = 0) -> DataLoader:
    """Iterate over (uint8 images (B, 3, H, W), readable bool (B,)) for a list of index arrays, each one batch."""
    return DataLoader(Images(tracklets, canvas), batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      worker_init_fn=ignore_signals, prefetch_factor=4 if workers else None)


def check_readable(tracklets: Tracklets, sample: int = 1000) -> None:
    """Decode an even sample of the images before a long run. Raises ValueError if more than 1% cannot be read."""
    rows = np.linspace(0, len(tracklets) - 1, min(sample, len(tracklets))).astype(np.int64)
    images = Images(tracklets, (8, 8))
    refuse_unreadable(tracklets, [i for i in rows if not images[i][1]], len(rows))


def refuse_unreadable(tracklets: Tracklets, bad, seen: int) -> None:
    """Raise ValueError if the unreadable images, given by their indices, are more than 1% of those seen."""
    if len(bad) > 0.01 * seen:
        refuse(tracklets.root, [tracklets.path(i) for i in bad], f"of {seen:,} images cannot be read as JPEG (more than 1%)")


def replace_unreadable(images: Tensor, readable: Tensor, K: int) -> Tensor:
    """Put another image of the same identity, or else of the batch, in the place of unreadable ones. (B, 3, H, W)."""
    for b in (~readable).nonzero()[:, 0].tolist():
        same = range(b // K * K, b // K * K + K)
        images[b] = images[next((i for i in same if readable[i]), int(readable.float().argmax()))]
    return images


# ---------------------------------------------------------------- sampling
def sample_identities(labels: np.ndarray, K: int, batch: int, seed: int, epoch: int, steps: int) -> np.ndarray:
    """The batches of one epoch: image indices (steps, batch), K images of each identity contiguous. Pure in its arguments.

    labels (N,), -1 for images left out. Every identity's images are shuffled and cut into groups of K, the remainder left for another
    shuffle; one with fewer than K images repeats them. Groups are shuffled into batches (one may hold two groups of an identity, which
    do not teach each other; the released code draws distinct ones), the last incomplete batch is dropped; where
    `steps` asks for more than one pass, all is shuffled again. Rank r of w takes columns r * batch/w to (r + 1) * batch/w, so identities
    are not split and the union is the same for any w. Raises ValueError where K does not divide the batch or identities fill none."""
    check_batches(labels, [K], batch)
    images, out = np.flatnonzero(labels >= 0), np.empty((0, batch), np.int64)
    count = np.unique(labels[images], return_counts=True)[1]
    start, groups = np.cumsum(count) - count, np.maximum(count // K, 1)
    which = np.repeat(np.arange(len(count)), groups)  # the identity of each group
    nth = np.arange(len(which)) - np.repeat(np.cumsum(groups) - groups, groups)  # its number within the identity
    slot = start[which, None] + (nth[:, None] * K + np.arange(K)) % count[which, None]  # (groups, K), wraps around for short identities
    random, full = np.random.default_rng([seed, epoch]), len(which) * K // batch
    while len(out) < steps:
        shuffled = images[random.permutation(len(images))]
        shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by identity, shuffled within
        out = np.concatenate([out, random.permutation(shuffled[slot])[: full * batch // K].reshape(full, batch)])
    return out[:steps]


def check_batches(labels: np.ndarray, Ks, batch: int) -> None:
    """Raises ValueError where a K does not divide the batch, or identities do not fill one with K images of each."""
    count = np.unique(labels[labels >= 0], return_counts=True)[1]
    for K in Ks:
        groups = int(np.maximum(count // K, 1).sum())
        require(batch % K == 0, f"a batch of {batch} images cannot hold K={K} of each identity; K must divide it")
        require(groups * K >= batch, f"{len(count):,} identities give {groups:,} groups of K={K}, fewer than the {batch // K} of one "
                                     "batch; a smaller --batch needs fewer (--recipe demo has one)")


# ---------------------------------------------------------------- from videos to tracklets
def read_tracks(file, confidence: float = -np.inf) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A MOTChallenge track file, `frame, id, left, top, width, height, confidence, ...` a line: numbers int64 (n, 3), frame, track and
    det, which counts the lines of a frame; boxes float64 (n, 4), pixels; fate (n,), why a box is dropped, or "". Of a truth, which is a
    file gt.txt or one of nine columns of which the last is a visibility, people (class 1) that are to be considered (flag) are kept.
    Raises ValueError for anything else."""
    try:
        with open(file) as lines:
            first = lines.readline()
        require(first.strip(), "it is empty")
        rows = np.loadtxt(file, delimiter="," if "," in first else None, ndmin=2)
        columns, frame, fate = rows.shape[1], rows[:, 0], np.full(len(rows), "", object)
        require(columns >= 6, f"got {len(rows)} lines of {columns} numbers")
        fine = np.isfinite(rows[:, :6]).all(1) & (rows[:, :2] == np.trunc(rows[:, :2])).all(1) & (frame >= 0)
        n = fine.argmin()
        require(fine[n], f"line {n + 1}: expected a frame and a track in whole numbers and a box, got {rows[n, :6].tolist()}")
        require((rows[:, 1] >= 0).any(), "every id is below 0: these are detections, not tracks; run a tracker first")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected lines of numbers, frame,id,left,top,width,height,confidence,...; {error}") from None
    det, order = np.empty(len(rows)), np.argsort(frame, kind="stable")
    det[order] = np.arange(len(rows)) - np.searchsorted(frame[order], frame[order])
    truth = columns > 6 and Path(file).name == "gt.txt" or columns == 9 and (rows[:, 8] >= 0).all()
    if truth and columns == 9:
        fate[rows[:, 7] != 1] = "not people (a truth: column 8 is read as the class, 1 for people)"
    if columns > 6:
        low, reason = (rows[:, 6] == 0, "not to be considered") if truth else (rows[:, 6] < confidence, f"below confidence {confidence:g}")
        fate[low] = reason
    fate[rows[:, 1] < 0] = "of no track"
    return np.column_stack([rows[:, :2], det]).astype(np.int64), rows[:, 2:6], fate


def list_frames(folder: Path, first: int | None) -> dict[int, Path]:
    """The images of a folder by their frames: the numbers in their names, or counted from `first` in the order of these."""
    names = [name for name in os.listdir(folder) if name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith(".")]
    digits = [re.search(r"(\d+)\.\w+$", name) for name in names]
    require(names and all(digits), f"{folder}: expected images named by their frames, such as 000001.jpg; got {sorted(names)[:3]}")
    frames = {int(match[1]): folder / name for name, match in zip(names, digits)}
    require(len(frames) == len(names), f"{folder}: {len(names)} images have {len(frames)} numbers; expected one image a frame")
    return {n if first is None else first + i: frames[n] for i, n in enumerate(sorted(frames))}


def decode_frames(video: Path, wanted, first: int):
    """Frames of a video file, decoded once in order, upright, the first one numbered `first`: yields (number, uint8 (H, W, 3)) for
    those wanted. A video that cannot be decoded to its end stops where it breaks, with a line that says so."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{video}: reading video files needs the package av: pip install av (a folder of frames needs nothing)") from None
    number = first
    try:
        with av.open(str(video)) as container:  # tty: a text, which ffmpeg would draw
            require(container.streams.video and container.format.name != "tty", f"{video}: holds no video")
            container.streams.video[0].thread_type = "AUTO"
            for number, frame in zip(range(first, max(wanted, default=first - 1) + 1), container.decode(video=0)):
                if number in wanted:
                    yield number, np.rot90(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0) // 90)  # as trackers saw it
    except av.error.FFmpegError as error:
        print(f"{video}: broken after frame {number}: {error.strerror}", flush=True)


def crop(video, tracks, out, every: int = 1, confidence: float = -np.inf, min_size: tuple[int, int] = (1, 1), first: int | None = None,
         quality: int = 95, workers: int = 2, name: str = "") -> dict[str, int]:
    """Cut a tracker's boxes out of a video: <out>/<name of the video>/<track:06d>_<frame:07d>_<det:02d>.jpg, det being the number of the
    box among the track file's lines of that frame. Refuses where more than 1% of the boxes are on frames that cannot be read.

    video: a file, or a folder of frames; tracks: a MOTChallenge file, see `read_tracks`; every: of so many frames one; min_size:
    (height, width) that a box must have after it is clipped to the frame. first: number of the first frame; if not given, for a
    folder that in its image's name, for a file 0 where some line names a frame 0, else 1. name: of the folder of crops, if not the video's.
    The folder appears whole or not at all. Returns counts. Raises ValueError for wrong input and for a folder that exists."""
    video, place = Path(video), Path(os.path.abspath(video))
    require(video.exists(), f"{video}: no such file or folder")
    folder = Path(out) / (name or (place.stem if place.is_file() else place.parent.name if place.name == "img1" else place.name))
    require(not folder.exists(), f"{folder}: exists already; delete it or give another --out")
    numbers, boxes, fate = read_tracks(tracks, confidence)
    frame, files = numbers[:, 0], list_frames(video, first) if video.is_dir() else {}
    if files:
        first, absent = min(files), np.setdiff1d(frame, list(files)).tolist()
        require(not absent, f"{tracks}: names frame {min(absent, default='')}, and {video} holds frames {first} to {max(files)}; "
                            "--first N numbers its images from N, in order")
    elif first is None:
        first = min(int(frame.min()), 1)
    fate[(fate == "") & ((frame - first) % every != 0)] = "between the frames taken"
    kept = np.flatnonzero(fate == "")
    fate[kept] = "second boxes of a track in a frame"
    kept = kept[np.unique(numbers[kept, :2], axis=0, return_index=True)[1]]  # but the first of them
    fate[kept] = "on broken frames"  # until they are written
    wanted, begin = np.unique(frame[kept], return_index=True)
    rows_of, waiting = dict(zip(wanted.tolist(), np.split(kept, begin[1:]))), deque()
    with replacing(folder) as beside, ThreadPoolExecutor(workers) as pool:  # encoding runs beside decoding
        beside.mkdir()
        for n, image in ((n, files[n]) for n in rows_of) if files else decode_frames(video, rows_of, first):
            waiting.append(pool.submit(write_crops, beside, image, rows_of[n], numbers, boxes, fate, min_size, quality))
            if len(waiting) > 4 * workers:
                waiting.popleft().result()
        for future in waiting:
            future.result()
        rows, count = np.flatnonzero(fate == "crops"), Counter(fate.tolist())
        broken = [str(files.get(n, n)) for n in np.unique(frame[fate == "on broken frames"]).tolist()]
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in count.items() if reason != "crops")
        require(count["on broken frames"] <= 0.01 * len(kept), f"{video}: {count['on broken frames']:,} of {len(kept):,} boxes are on "
                f"{len(broken):,} frames that cannot be read (more than 1%), the first: {''.join(broken[:1])}; {tracks} names frames "
                f"{frame.min()} to {frame.max()}, and the video's first is taken for frame {first}")
        require(len(rows), f"{tracks}: of {len(numbers):,} boxes all are dropped: {dropped}")
    count.update(tracks=len(np.unique(numbers[rows, 1])), frames=len(np.unique(frame[rows])))
    print(f"{folder}: {count['crops']:,} crops of {count['tracks']:,} tracks on {count['frames']:,} frames, the first frame being number "
          f"{first}; dropped: {dropped or 'none'}", flush=True)
    return count


def write_crops(folder: Path, image: np.ndarray | Path, rows, numbers, boxes, fate, min_size: tuple[int, int], quality: int) -> None:
    """Write the boxes of one frame, an array (H, W, 3) or its file, as JPEGs, and note their fate; rows: which of all boxes these are."""
    if isinstance(image, Path):
        try:
            file = torch.from_numpy(np.fromfile(image, np.uint8))
            image = decode_image(file, ImageReadMode.RGB, apply_exif_orientation=True).permute(1, 2, 0).numpy()
        except (RuntimeError, OSError):
            return
    corners = np.concatenate([boxes[rows, :2], boxes[rows, :2] + boxes[rows, 2:]], 1).round().clip(0, [image.shape[1], image.shape[0]] * 2)
    for row, (x0, y0, x1, y1) in zip(rows, corners.astype(np.int64)):
        large = y1 - y0 >= max(min_size[0], 1) and x1 - x0 >= max(min_size[1], 1)
        fate[row] = "crops" if large else "too small"
        if large:
            part = torch.from_numpy(np.ascontiguousarray(image[y0:y1, x0:x1]))  # torch would copy with threads of its own
            jpeg = encode_jpeg(part.permute(2, 0, 1), quality=quality).numpy()
            (folder / "{1:06d}_{0:07d}_{2:02d}.jpg".format(*numbers[row])).write_bytes(jpeg.tobytes())


def crop_split(split, out, tracks=None, **options) -> None:
    """`crop` every sequence of a MOTChallenge split (<split>/<sequence>/img1/), by its own gt/gt.txt, or a tracker's results
    <tracks>/<sequence>.txt. MOT17 holds each video three times, for three detectors: the first with tracks is taken. Sequences
    cropped before are passed over. Raises ValueError where there is none, and for those without tracks."""
    files = {folder.parent: folder.parent / "gt" / "gt.txt" for folder in sorted(Path(split).glob("*/img1"))}
    if tracks:
        files = {sequence: Path(tracks) / f"{sequence.name}.txt" for sequence in files}
    require(files, f"{split}: no such folder or no sequences; expected <sequence>/img1/000001.jpg and <sequence>/gt/gt.txt, or --tracks")
    videos, failed = {}, []
    for sequence in sorted(files, key=lambda sequence: not files[sequence].exists()):
        videos.setdefault(re.sub(r"-(DPM|FRCNN|SDP)$", "", sequence.name), sequence)
    refuse(split, [files[s] for s in videos.values() if not files[s].exists()], f"of {len(videos)} sequences have no tracks")
    for sequence in sorted(videos.values()):
        if (Path(out) / sequence.name).exists():
            print(f"{Path(out) / sequence.name}: there already, left as it is", flush=True)
        elif not files[sequence].stat().st_size:
            print(f"{files[sequence]}: empty, nobody was tracked", flush=True)
        else:
            try:
                crop(sequence / "img1", files[sequence], out, **options)
            except ValueError as error:
                failed.append(sequence.name)
                print(error, flush=True)
    refuse(split, failed, f"of {len(videos)} sequences failed, the others are in {out}")


# ---------------------------------------------------------------- walkers: drawn people whose identities are known
HEIGHT, WIDTH = 128, 64
BOX = np.dtype([("video", int), ("track", int), ("frame", int), ("person", int),  # person: -1 for a false box
                ("heading", float), ("phase", float), ("place", float)])  # radians, 0 faces the camera; of the gait; along the scene


def draw_walkers(root, seed: int = 0, people: int = 100, videos: int = 48, held_out: int = 60, noise: float = 1.0,
                 test_videos: int = 24) -> None:
    """Draw a set of tracklets into root: train/ and test/ in LUPerson-NL's layout, their truth in train.json and test.json.

    The people and videos of test/ are others than those of train/; test/ holds fewer frames of each and no identity switches.
    noise scales how often the tracker of train/ fails: switches, fragments, missed and false boxes; 0 is a perfect one.
    Deterministic in the arguments; the root appears whole or not at all. Raises ValueError if it exists."""
    require(not Path(root).exists(), f"{root}: exists already; delete it to draw walkers there anew")
    with replacing(root) as beside:
        for split, n, v, frames, faults in (("train", people, videos, (14, 24), noise), ("test", held_out, test_videos, (6, 10), 1.0)):
            random = np.random.default_rng([seed, split == "test"])
            looks, cameras = draw_looks(random, n), draw_cameras(random, v)
            boxes = track_people(random, n, v, frames, split == "train", faults)
            for part in np.split(boxes, range(32, len(boxes), 32)):
                for box, image in zip(part, torch.from_numpy(draw_boxes(random, looks, cameras, part))):
                    file = beside / split / "video_{:03d}/{:06d}_{:07d}_00.jpg".format(*box)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(encode_jpeg(image, quality=90).numpy().tobytes())
            boxes.sort(order=["video", "track", "frame"])
            write_labels(beside / f"{split}.json", read_tracklets(beside / split), boxes["person"])


def track_people(random, people: int, videos: int, frames: tuple[int, int], switches: bool, noise: float = 1.0) -> np.ndarray:
    """Who walks where, for frames[0] to frames[1] boxes a video, and what the tracker makes of it: an array of BOX."""
    crowds = [[] for _ in range(videos)]
    for person in range(people):  # in 2 to 4 videos, not far apart in time
        near = random.integers(videos) + np.arange(-6, 7)
        near = near[(near >= 0) & (near < videos)]
        for video in random.choice(near, min(len(near), random.integers(2, 5)), replace=False):
            crowds[video].append(person)

    def start(video, track, person, n):
        """A walk of n boxes, beginning somewhere in the video."""
        walk = np.zeros(n, BOX)
        walk["video"], walk["track"], walk["person"] = video, track, person
        walk["frame"] = random.integers(0, 2 * frames[1]) + np.arange(n)
        return walk

    done = []
    for video, crowd in enumerate(crowds):
        walks = [start(video, track, person, random.integers(frames[0], frames[1] + 1)) for track, person in enumerate(crowd)]
        walks.sort(key=lambda walk: walk["frame"][0])
        for a, b in zip(walks[::2], walks[1::2]) if switches else ():  # identity switch: two tracks go on as each other
            low, high = max(a["frame"][0], b["frame"][0]) + 3, min(a["frame"][-1], b["frame"][-1]) - 3
            if low < high and random.random() < 0.65 * noise:
                at = random.integers(low, high)
                a["track"][a["frame"] >= at], b["track"][b["frame"] >= at] = b["track"][0], a["track"][0]
        tracks = len(walks)
        for i, walk in enumerate(walks):  # fragmentation: the tracker loses the person for a frame or two and starts anew
            n = len(walk)
            if random.random() < 0.5 * noise:
                cut, gap = random.integers(n // 4, n - n // 4), random.integers(0, 3)
                walk["track"][cut:] = tracks + (walk["track"][cut:] != walk["track"][cut])
                walks[i] = np.delete(walk, slice(cut, cut + gap))
                tracks += 2
        for walk in walks:
            n, t = len(walk), walk["frame"] - walk["frame"][0]
            walk["heading"] = random.uniform(-np.pi, np.pi) + random.uniform(-2.0, 2.0) * t / n
            walk["phase"] = random.uniform(0, 2 * np.pi) + random.uniform(0.8, 1.4) * t
            walk["place"] = random.uniform(0, 1) + random.uniform(0.01, 0.04) * t * random.choice([-1, 1])
            walk["person"][random.random(n) < 0.02 * noise] = -1  # the box missed
        for track in range(tracks, tracks + random.integers(0, 1 + round(2 * noise))):  # false tracklets: no person at all
            walks.append(start(video, track, -1, random.integers(3, 8)))
            walks[-1]["heading"] = walks[-1]["phase"] = walks[-1]["place"] = random.uniform(0, 1)
        done += walks
    boxes = np.concatenate(done)
    boxes["frame"] *= 5
    return boxes


def draw_looks(random, people: int) -> dict[str, np.ndarray]:
    """What people look like, one row a person: build, clothes, bag, and colours (people, 3, 1, 1) in [0, 1]."""
    colour = lambda low=0.03, high=0.97, channels=3: random.uniform(low, high, (people, channels, 1, 1)).astype(np.float32)
    return {
        "skin": np.float32([0.93, 0.76, 0.65])[:, None, None] * colour(0.35, 1.05, 1),
        "hair": np.float32([0.5, 0.35, 0.2])[:, None, None] * colour(0.1, 1.6, 1),
        "girth": random.uniform(0.8, 1.25, people), "tall": random.uniform(0.9, 1.06, people), "long_hair": random.random(people) < 0.4,
        "top": colour(), "pattern": colour(), "back": colour(), "bottom": colour(0.03, 0.8), "shoes": colour(),
        "stripes": random.integers(0, 2, (people, 2)) * random.uniform(8, 22, (people, 2)),  # per body height, along x and y
        "vest": random.random(people) < 0.2,  # the back of the top has a colour of its own
        "long_sleeve": random.choice([False, True], people), "long_leg": random.choice([False, True], people, p=[0.3, 0.7]),
        "skirt": random.random(people) < 0.25, "bag": random.integers(0, 3, people), "bag_colour": colour(),
    }


def draw_cameras(random, videos: int) -> dict[str, np.ndarray]:
    """A colour gain and gamma for every video, and its scene: a wide picture (videos, 3, HEIGHT, 8 * WIDTH)."""
    scene = draw_texture(random, (videos, 6, 24), 8 * WIDTH) + draw_texture(random, (videos, 32, 128), 8 * WIDTH) / 2 - 0.25
    gain, gamma = random.uniform(0.9, 1.08, (videos, 3, 1, 1)), random.uniform(0.85, 1.2, (videos, 1))
    return {"scene": scene.clip(0, 1), "gain": gain.astype(np.float32), "gamma": gamma.astype(np.float32)}


def draw_texture(random, grid: tuple[int, int, int], width: int) -> np.ndarray:
    """Smooth blotches of muted colours from a coarse grid, (n, rows, columns) -> (n, 3, HEIGHT, width) in [0, 1]."""
    colours = random.uniform(0.2, 0.8, (grid[0], 3, *grid[1:])).astype(np.float32)
    return F.interpolate(torch.from_numpy(0.4 * colours + 0.6 * colours[:, :1]), (HEIGHT, width), mode="bilinear").numpy()


def draw_boxes(random, looks: dict, cameras: dict, boxes: np.ndarray) -> np.ndarray:
    """The crops of n boxes, uint8 (n, 3, HEIGHT, WIDTH)."""
    n, video = len(boxes), boxes["video"]
    uniform = lambda low, high, *shape: random.uniform(low, high, (n, *shape)).astype(np.float32)
    look = {key: value[np.maximum(boxes["person"], 0)] for key, value in looks.items()}
    left = (boxes["place"] * 8 * WIDTH).astype(np.int64) + random.integers(-6, 7, n)
    columns = (left[:, None] + np.arange(WIDTH)) % (8 * WIDTH)  # (n, WIDTH): where in the scene the person walks
    image = 0.5 * np.stack([cameras["scene"][v][:, :, c] for v, c in zip(video, columns)])
    image += 0.5 * draw_texture(random, (n, 5, 3), WIDTH)  # what differs from frame to frame

    # body coordinates: y from 0 (crown) to 1 (soles), x in body heights; the tracker's box is not exact
    scale = uniform(0.82, 1.0, 1, 1) * look["tall"].astype(np.float32)[:, None, None]
    y = (np.arange(HEIGHT, dtype=np.float32)[:, None] / HEIGHT - 0.5 - uniform(-0.04, 0.04, 1, 1)) / scale + 0.5  # (n, HEIGHT, 1)
    x = (np.arange(WIDTH, dtype=np.float32) / HEIGHT - 0.25 - uniform(-0.03, 0.03, 1, 1)) / scale  # (n, 1, WIDTH)
    draw_person(image, x, y, scale * HEIGHT, look, boxes)

    low, aside = uniform(0.55, 0.9, 1, 1), uniform(0.05, 0.2, 1, 1)  # occluders: a block that enters from below, another from a side
    for covered in y > low, x * random.choice([-1, 1], (n, 1, 1)) > aside:
        colour = uniform(0.1, 0.9, 3, 1, 1)
        image = np.where(covered[:, None] & (random.random((n, 1, 1, 1)) < 0.15), colour, image)

    lit = np.linspace(0, 1, 256, dtype=np.float32) ** cameras["gamma"]  # gamma as a table, (videos, 256)
    image = np.stack([table[levels] for table, levels in zip(lit[video], (image * 255).astype(np.uint8))]) * cameras["gain"][video]
    weight = uniform(0, 0.33, 1, 1, 1)  # blur along y, then x: three taps
    image[:, :, 1:-1] += weight * (image[:, :, :-2] + image[:, :, 2:] - 2 * image[:, :, 1:-1])
    image[..., 1:-1] += weight * (image[..., :-2] + image[..., 2:] - 2 * image[..., 1:-1])
    image += uniform(0.005, 0.03, 1, 1, 1) * random.standard_normal(image.shape, np.float32)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def draw_person(image: np.ndarray, x: np.ndarray, y: np.ndarray, pixels: np.ndarray, look: dict, boxes: np.ndarray) -> None:
    """Paint a person on each image (n, 3, HEIGHT, WIDTH) but those of false boxes, limb by limb, far side first.
    x (n, 1, WIDTH) and y (n, HEIGHT, 1) are body coordinates, pixels (n, 1, 1) the body's height in pixels."""
    heading, phase = np.array([boxes["heading"], boxes["phase"]])
    side, front = np.sin(heading), np.cos(heading)  # side is 1 or -1 in profile, front is 1 facing the camera
    girth = look["girth"] * (0.7 + 0.3 * np.abs(front))
    step = np.sin(phase) * (0.04 + 0.14 * np.abs(side))  # a step shows sideways
    column = lambda value: np.broadcast_to(np.float32(value), len(x))[:, None, None]
    where = lambda condition, one, other: np.where(condition[:, None, None, None], one, other)
    skin, hair, bottom, bag = (look[key] for key in ("skin", "hair", "bottom", "bag_colour"))
    top = where(look["vest"] & (front <= 0), look["back"], look["top"])
    across, down = look["stripes"].T  # along x, along y, both (a check) or none
    wave = np.sin(2 * np.pi * column(across / girth) * x) + np.sin(2 * np.pi * column(down) * y)
    shirt = np.where(wave[:, None] > 0, look["pattern"], top)  # (n, 3, HEIGHT, WIDTH)
    backpack = (-0.09 * side, 0.27, -0.09 * side, 0.38, 0.06, 0.065, bag)
    handbag = 0.13 * girth * np.sign(front)  # in the left hand

    def arm(s):
        """Upper arm, forearm and hand of one side, s = -1 or 1."""
        shoulder, reach = s * 0.1 * girth * np.abs(front), -s * step * 0.8
        elbow, hand = shoulder + reach * 0.5 + s * 0.015, shoulder + reach
        return [(shoulder, 0.22, elbow, 0.36, 0.032 * girth, 0.026 * girth, top),
                (elbow, 0.36, hand, 0.5, 0.026 * girth, 0.02 * girth, where(look["long_sleeve"], top, skin)),
                (hand, 0.51, hand, 0.52, 0.018, 0.018, skin)]

    def leg(s):
        """Thigh, shin and shoe of one side, s = -1 or 1."""
        hip, lift = s * 0.045 * girth * np.abs(front), 0.03 * np.maximum(0, s * np.cos(phase))
        knee, foot = hip + s * step * 0.6, hip + s * step
        return [(hip, 0.52, knee, 0.72, 0.05 * girth, 0.038 * girth, bottom),
                (knee, 0.72, foot, 0.93 - lift, 0.036 * girth, 0.026 * girth, where(look["long_leg"], bottom, skin)),
                (foot, 0.96 - lift, foot + 0.03 * side, 0.965 - lift, 0.022, 0.02, look["shoes"])]

    limbs = [  # from (x, y) to (x, y), the radius at either end, the colour, and whether it is shown
        (*backpack, (look["bag"] == 1) & (front > -0.3)), *arm(-1), *leg(-1), *leg(1),
        (0, 0.5, 0, 0.62, 0.09 * girth, 0.12 * girth, bottom, look["skirt"]), (0, 0.23, 0, 0.48, 0.1 * girth, 0.085 * girth, shirt),
        (*backpack, (look["bag"] == 1) & (front <= -0.3)),
        (0, 0.14, 0, 0.17, 0.03, 0.03, skin), (0, 0.055, 0, 0.2, 0.055, 0.06, hair, look["long_hair"]),
        (0, 0.07, 0.01 * side, 0.09, 0.055, 0.05, skin),
        (-0.02 * side, 0.04, -0.02 * side, np.where(front > 0, 0.03, 0.09), 0.052, 0.05, hair),
        *arm(1), (handbag, 0.5, handbag, 0.58, 0.04, 0.05, bag, look["bag"] == 2)]
    for ax, ay, bx, by, ra, rb, colour, *shown in limbs:
        ax, ay, bx, by, ra, rb = map(column, (ax, ay, bx, by, ra, rb))
        rows, columns = (np.flatnonzero(((z > np.minimum(a - ra, b - rb) - 0.01) & (z < np.maximum(a + ra, b + rb) + 0.01)).any(0))
                         for z, a, b in ((y, ay, by), (x, ax, bx)))
        if not len(rows) or not len(columns):
            continue
        rows, columns = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # all that a limb touches, in any image
        px, py, dx, dy = x[:, :, columns] - ax, y[:, rows] - ay, bx - ax, by - ay
        along = ((px * dx + py * dy) / (dx * dx + dy * dy + 1e-8)).clip(0, 1)
        distance = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2) - (ra + along * (rb - ra))
        alpha = (0.5 - distance * pixels).clip(0, 1) * column(np.all([boxes["person"] >= 0, *shown], axis=0))  # antialiased
        part = image[:, :, rows, columns]
        part += alpha[:, None] * (np.broadcast_to(colour, image.shape)[:, :, rows, columns] - part)


def main() -> None:
    """Cut tracklets out of videos."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("crop", help="cut a tracker's boxes out of a video", description=crop.__doc__.split("\n\n")[0])
    video = command.add_mutually_exclusive_group(required=True)
    video.add_argument("--video", help="a video file (needs the package av), or a folder of frames")
    video.add_argument("--split", help="a MOTChallenge split, <split>/<sequence>/img1/, instead")
    command.add_argument("--tracks", help="MOTChallenge track file; with --split a folder of <sequence>.txt (default: each gt/gt.txt)")
    command.add_argument("--out", required=True, help="folder to write <video>/<track>_<frame>_<det>.jpg into")
    command.add_argument("--name", default="", help="name of the video's folder (default: the video's)")
    command.add_argument("--every", type=int, default=1, help="take every n-th frame")
    command.add_argument("--confidence", type=float, default=-np.inf, help="drop boxes of a lower one (default: keep all)")
    command.add_argument("--min_size", type=int, nargs=2, default=(1, 1), metavar=("H", "W"), help="drop smaller boxes, pixels")
    command.add_argument("--first", type=int, help="number of the first frame (default: a folder's own; else 0 if tracks name it, or 1)")
    command.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100")
    command.add_argument("--workers", type=int, default=2, help="threads that encode crops while the video is decoded")
    args = vars(parser.parse_args())
    for flag, high in (("every", np.inf), ("quality", 100), ("workers", np.inf)):
        require(1 <= args[flag] <= high, f"--{flag} {args[flag]}: expected 1 to {high}")
    video, split, tracks, out, name = (args.pop(key) for key in ("video", "split", "tracks", "out", "name"))
    require(name == Path(name).name, f"--name {name}: expected the name of a folder, not a path")
    require(not (split and name), "--name is for one --video; the sequences of a split have theirs")
    require(split or tracks, "--video needs --tracks, a MOTChallenge track file of that video")
    crop_split(split, out, tracks, **args) if split else crop(video, tracks, out, name=name, **args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; what is finished stays, what was begun is gone")
