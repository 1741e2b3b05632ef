"""Tracklets: person crops that a tracker cut out of videos, as files on disk and as arrays in
memory (paper, section 3.1).

In this order: the index of a folder, labels in the CION-AL annotation format, images, the identity
sampler; then cropping videos into tracklets (`python data.py crop`), tracklets out of benchmarks
(`python data.py tracklets`) and *walkers*, drawn people whose identities are known. Read first:
`Tracklets`, `read_tracklets`, `sample_identities`.
"""
import argparse
import atexit
import codecs
import hashlib
import json
import math
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.io import encode_jpeg
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

FILE_NAME = re.compile(r"(?ai)(\d+)_(\d+)_(\d+)\.jpe?g")
LARGEST = 2**63 - 1  # the largest number that an array of int64 holds


# ---------------------------------------------------------------- the index
@dataclass(eq=False)
class Tracklets:
    """N images of T tracklets in V videos. `read_tracklets` sorts them by video, track, frame and
    detection."""

    root: Path
    folders: list  # of the V videos, relative to the root
    name: np.ndarray  # (N,) file names, bytes
    video: np.ndarray  # (N,) int64
    track: np.ndarray  # (N,) int64, 0 to T - 1 over all videos
    frame: np.ndarray  # (N,) int64

    def __len__(self):
        return len(self.name)

    def __str__(self):
        tracks = self.track.max() + 1
        return f"{len(self.folders):,} videos, {tracks:,} tracklets, {len(self):,} images"

    def path(self, i):
        """Path of image i relative to the root."""
        return os.path.join(self.folders[self.video[i]], os.fsdecode(self.name[i]))

    def paths(self):
        """Paths of all images relative to the root, bytes (N,)."""
        folders = [os.fsencode(os.path.join(folder, "")) for folder in self.folders]
        return np.char.add(np.array(folders)[self.video], self.name)

    def digest(self, labels):
        """A fingerprint, hexadecimal, of all paths in their order and of labels int64."""
        digest = hashlib.sha256(self.paths())
        digest.update(labels)
        return digest.hexdigest()


def stop(error):
    """What os.walk is to do at a folder that cannot be read."""
    raise error


def read_tracklets(root):
    """Index the JPEG files of a folder in LUPerson-NL's layout, <video>/<track>_<frame>_<det>.jpg,
    where folders may stand above the videos'. What is hidden and other files are left alone. Raises
    OSError for a folder that cannot be read, ValueError for JPEG files of other names, and where
    there are none."""
    folders = []
    columns = []
    tracks = 0
    seen = set()
    for folder, below, files in os.walk(root, onerror=stop, followlinks=True):
        # a link to a folder above would lead here again and again
        here = os.path.realpath(folder)
        if here in seen:
            below.clear()
            continue
        seen.add(here)
        below[:] = sorted(name for name in below if not name.startswith("."))
        images = []
        for file in files:
            if file.lower().endswith((".jpg", ".jpeg")) and not file.startswith("."):
                match = FILE_NAME.fullmatch(file)
                if not match or max(map(int, match.groups())) > LARGEST:
                    wanted = "<track>_<frame>_<det>.jpg, numbers below 2**63"
                    raise ValueError(f"{folder}/{file}: expected {wanted}")
                images.append((*map(int, match.groups()), file.encode()))
        if images:
            number, frame, _, name = zip(*sorted(images))
            video = np.full(len(name), len(folders))
            track = tracks + np.unique(number, return_inverse=True)[1]
            tracks = track[-1] + 1
            columns.append((np.array(name), video, track, np.array(frame, int)))
            folders.append(folder.removeprefix(os.fspath(root)).strip("/"))
    if not folders:
        raise ValueError(f"{root}: no JPEG files; expected <video>/<track>_<frame>_<det>.jpg")
    return Tracklets(Path(root), folders, *map(np.concatenate, zip(*columns)))


def find_splits(root):
    """root/train and root/test where both are there, else root and None. Without the truth,
    root/test.json, there is nothing to test on: None. Raises ValueError if a folder below the root
    holds people out, who would be learned from."""
    root = Path(root)
    train = root / "train"
    test = root / "test"
    if train.is_dir() and test.is_dir():
        return train, test if (root / "test.json").exists() else None
    if (root / "test.json").exists():
        raise ValueError(f"{root}: test.json holds people out, but train/ or test/ is missing")
    held_out = sorted(root.glob("*/test.json"))
    if held_out:
        raise ValueError(f"{root}: {held_out[0]} holds people out; give {held_out[0].parent}")
    return root, None


# ---------------------------------------------------------------- labels
@contextmanager
def whole_file(file):
    """An open file to write bytes into, which takes the place of `file` when all of it is on the
    disk. Raises OSError, and leaves the old file, where it cannot be written."""
    file = Path(file)
    beside = file.with_name(f".{file.name}.part")
    try:
        with open(beside, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{file}: cannot be written: {error.strerror or error}") from None


def write_labels(file, tracklets, labels):
    """Write labels int64 (N,), -1 for images in no identity, as a CION-AL annotation: a JSON list
    of file_path and id, sorted by id, ids contiguous from 1. It appears whole or not at all."""
    rows = np.flatnonzero(labels >= 0)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    ids = np.unique(labels[rows], return_inverse=True)[1] + 1
    separator = "\n"
    with whole_file(file) as out:
        out.write(b"[")
        for row, identity in zip(rows, ids.tolist()):
            entry = {"file_path": tracklets.path(row), "id": identity}
            out.write((separator + json.dumps(entry)).encode())
            separator = ",\n"
        out.write(b"\n]\n")


def read_annotation(file):
    """Paths, sorted bytes (n,), and identities int64 (n,), from 0, of a CION-AL annotation. Raises
    ValueError for another format, and paths that come twice or leave the images' folder."""
    paths = []
    ids = []

    def take(entry):
        """Keep what an entry says, not millions of dicts."""
        path = entry.get("file_path")
        identity = entry.get("id")
        if type(path) is not str or type(identity) is not int or not 1 <= identity <= LARGEST:
            raise ValueError(f"entry {len(ids) + 1} is {str(entry):.200}")
        path = os.path.normpath(path)
        if path.split("/")[0] in ("", ".."):
            raise ValueError(f"{path} leaves the images' folder")
        paths.append(os.fsencode(path))
        ids.append(identity)

    try:
        entries = json.loads(Path(file).read_bytes(), object_hook=take)
        # `take` returns None, so that a list of n entries is read as n times None
        if not ids or entries != [None] * len(ids):
            raise ValueError("got something else")
    except (ValueError, RecursionError) as error:
        wanted = "file_path, below the images' folder, and id, a whole number from 1"
        raise ValueError(f"{file}: expected a list of {wanted}; {error}") from None
    ids = np.array(ids)
    paths, first, times = np.unique(paths, return_index=True, return_counts=True)
    if len(paths) < len(ids):
        raise ValueError(f"{file}: {os.fsdecode(paths[times.argmax()])} comes twice")
    return paths, ids[first] - 1


def read_labels(file, tracklets):
    """Labels int64 (N,) from a CION-AL annotation: id - 1, and -1 for images that it does not name.
    Raises ValueError for a path that is not among the tracklets'; see also `read_annotation`."""
    paths, ids = read_annotation(file)
    found, image, entry = np.intersect1d(tracklets.paths(), paths, True, return_indices=True)
    if len(found) < len(paths):
        path = os.fsdecode(np.setdiff1d(paths, found)[0])
        raise ValueError(f"{file}: {path} is not among the images of {tracklets.root}")
    labels = np.full(len(tracklets), -1)
    labels[image] = ids[entry]
    return labels


def read_identities(file, root):
    """The images that a CION-AL annotation names, as Tracklets of which each is an identity, and
    their labels int64 (N,). The folder is not searched, and files may have any names."""
    paths, labels = read_annotation(file)
    folders, _, names = np.char.rpartition(paths, b"/").T
    folders, video = np.unique(folders, return_inverse=True)
    folders = [os.fsdecode(folder) for folder in folders]
    track = np.unique(labels, return_inverse=True)[1]
    frame = np.zeros_like(labels)
    return Tracklets(Path(root), folders, names, video, track, frame), labels


# ---------------------------------------------------------------- images
def read_image(file):
    """An image file, uint8 (3, H, W). Raises ValueError for one that cannot be read."""
    try:
        with PIL.Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError("expected 8 bits a colour")
            return pil_to_tensor(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # whatever decoders raise
        raise ValueError(f"{file}: cannot be read: {error}") from None


@dataclass
class Images(Dataset):
    """Images of an index, resized to (height, width): i -> (uint8 (3, H, W), used). `used` is the
    image that was read, i or, where that cannot be, the next one of its tracklet that can, or else
    of its video. Raises ValueError where no image of the video can be read."""

    tracklets: Tracklets
    size: tuple

    def __len__(self):
        return len(self.tracklets)

    def __getitem__(self, i):
        used = i
        try:
            image = self.read(i)
        except ValueError as error:
            used, image = self.substitute(i, error)
        if image.shape[1:] != tuple(self.size):
            image = F.interpolate(image[None], self.size, mode="bilinear", antialias=True)[0]
        return image, used

    def read(self, i):
        """Image i as it is. Raises ValueError if it cannot be read."""
        return read_image(self.tracklets.root / self.tracklets.path(i))

    def substitute(self, i, error):
        """Another image in the place of image i. Raises the error, which is that of image i, if no
        image of the video can be read."""
        same = np.flatnonzero(self.tracklets.track == self.tracklets.track[i])
        after = np.roll(same, -np.searchsorted(same, i))
        near = np.flatnonzero(self.tracklets.video == self.tracklets.video[i])
        for other in np.concatenate([after, near]).tolist():
            with suppress(ValueError):
                return other, self.read(other)
        raise error


def load_batches(tracklets, batches, size, workers=0):
    """Yield uint8 images (B, 3, H, W) for each index array of the list `batches`. A file that can't
    be read is replaced, see `Images`, with a warning. Raises ValueError where such files are more
    than 1% of the images asked for, and more than 10."""
    loader = DataLoader(
        Images(tracklets, size),
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    allowed = max(10, 0.01 * sum(map(len, batches)))
    bad = []
    try:
        for batch, (images, used) in zip(batches, loader):
            for i, other in zip(batch, used.tolist()):
                if i != other and i not in bad:
                    bad.append(i)
                    path = tracklets.root / tracklets.path(i)
                    warnings.warn(f"{path}: cannot be read, replaced by {tracklets.path(other)}")
            if len(bad) > allowed:
                first = tracklets.root / tracklets.path(bad[0])
                raise ValueError(f"{first}: cannot be read, one of {len(bad)}, more than 1%")
            yield images
    except ValueError as error:
        # of what a worker reports the last line is its error
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None


def ignore_signals(worker):
    """Leave Ctrl-C and SIGTERM to the process that the workers feed: it writes a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers():
    """At its end Python sends SIGTERM to workers, which they ignore, and would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report that they died
    for worker in multiprocessing.active_children():
        if worker.daemon:  # as a DataLoader's are
            worker.kill()


# ---------------------------------------------------------------- sampling
def sample_identities(labels, K, batch, seed, epoch, steps, video=None):
    """The batches of one epoch: image indices (steps, batch), K images of an identity contiguous.
    labels (N,), -1 for images that are left out. Pure in its arguments.

    A pass shuffles the images of each identity and deals them into groups of K: what is left over
    waits for another pass, an identity with fewer repeats them. Groups are shuffled into batches.
    `steps` may ask for more than one pass. With video (N,) a group is of different videos, as far
    as its identity has been seen in them, and groups of one video are left out, unless the others
    hold less than a batch or a tenth of the images. Process r of w takes columns r * batch / w to
    (r + 1) * batch / w: their union is the same for any w. Raises ValueError if K does not divide
    the batch, or if all groups together do not fill one."""
    if batch % K:
        raise ValueError(f"a batch of {batch} does not divide into K={K} images of each identity")
    if video is None:
        video = np.zeros(len(labels), int)
    random = np.random.default_rng([seed, epoch])
    batches = []
    while len(batches) < steps:
        images = random.permutation(np.flatnonzero(labels >= 0))
        # identities one after the other, and in each its videos, in random order
        place = random.permutation(video.max() + 1)[video[images]]
        images = images[np.lexsort((place, labels[images]))]
        begins = np.flatnonzero(np.diff(labels[images])) + 1
        groups = []
        for own in np.split(images, begins):
            # dealt like cards: neighbours, who may be of one video, go to different groups;
            # resize cuts off the end, or repeats from the beginning
            count = max(len(own) // K, 1)
            groups.append(np.resize(own, (K, count)).T)
        groups = random.permutation(np.concatenate(groups))
        across = (video[groups] != video[groups[:, :1]]).any(1)
        if across.sum() * K >= max(batch, len(images) / 10):
            groups = groups[across]
        full = len(groups) * K // batch
        if full == 0:
            groups = f"{len(groups)} groups of K={K} images"
            raise ValueError(f"{groups} do not fill a batch of {batch}; it has to be smaller")
        batches.extend(groups[: full * batch // K].reshape(full, batch))
    return np.array(batches[:steps]).reshape(steps, batch)


# ---------------------------------------------------------------- crops from videos
@contextmanager
def whole_folder(folder):
    """A hidden folder to write into, which becomes `folder` if nothing goes wrong, and else is
    removed. Raises FileExistsError if that exists, OSError where it cannot be written."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: exists already; delete it or choose another")
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, folder)
    except OSError as error:
        raise OSError(f"{folder}: is not made: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class NoBoxes(ValueError):
    """A track file has no boxes, or all are dropped."""


def read_tracks(file):
    """A MOTChallenge file, `frame,id,left,top,width,height,confidence,...` a line: a list of
    (frame, track, corners of the box, confidence or 1). Raises ValueError, with the line, for
    anything else."""
    rows = []
    lines = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        values = line.split(b",") if b"," in line else line.split()
        try:
            frame, track = map(int, values[:2])
            left, top, width, height = map(float, values[2:6])
            corners = [round(edge) for edge in (left, top, left + width, top + height)]
            score = float(values[6]) if len(values) > 6 else 1
            largest = max(map(abs, [frame, track, *corners]))
            if frame < 0 or largest > LARGEST or not math.isfinite(score):
                raise ValueError(f"got {line.decode()}")
        except (ValueError, OverflowError) as error:
            wanted = "frame,id,left,top,width,height,... below 2**63, frame and id whole"
            raise ValueError(f"{file}, line {n}: expected {wanted}; {error}") from None
        rows.append((frame, track, corners, score))
    if not rows:
        raise NoBoxes(f"{file}: no boxes")
    return rows


def choose_boxes(tracks, every, confidence):
    """The boxes of a track file that are to be cropped, {frame: {track: corners}}, the number of
    its first frame, and how many boxes are dropped for which reason. For the arguments see `crop`.
    """
    rows = read_tracks(tracks)
    flagged = {row[3] for row in rows} <= {-1, 0, 1}
    if flagged and confidence > -np.inf:
        raise ValueError(f"{tracks}: no confidences, column 7 holds only -1, 0 and 1")
    truth = flagged and Path(tracks).name == "gt.txt"
    first = min(row[0] for row in rows)
    chosen = defaultdict(dict)
    dropped = Counter()
    for frame, track, corners, score in rows:
        if track < 0:
            dropped["of no track"] += 1
        elif truth and score == 0:
            dropped["not to be considered"] += 1
        elif score < confidence:
            dropped["below the confidence"] += 1
        elif (frame - first) % every:
            dropped["between the frames taken"] += 1
        elif track in chosen[frame]:
            dropped["second boxes of a track in a frame"] += 1
        else:
            chosen[frame][track] = corners
    if not chosen:
        raise NoBoxes(f"{tracks}: no boxes are left; dropped: {reasons(dropped)}")
    return chosen, first, dropped


def reasons(dropped):
    """How many boxes were dropped for which reason, in words."""
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()) or "none"


def read_frames(video, wanted, first):
    """Yield (number, uint8 (3, H, W)) for those of the wanted frames that are there: of a folder,
    where names end in numbers, or of a video file, whose first frame has the number `first`."""
    if video.is_dir():
        yield from read_folder(video, wanted)
        return
    try:
        import av

        av.VideoFrame.rotation
    except (ImportError, AttributeError):
        raise ValueError(f"{video}: video files take av from 14.1 on: pip install -U av") from None
    numbers = range(first, max(wanted) + 1)
    try:
        with av.open(str(video)) as container:
            # a text would be shown as a terminal shows it
            if not container.streams.video or container.format.name == "tty":
                raise ValueError(f"{video}: holds no video")
            container.streams.video[0].thread_type = "AUTO"
            for number, frame in zip(numbers, container.decode(video=0)):
                if number in wanted:
                    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    yield number, torch.from_numpy(upright.copy()).permute(2, 0, 1)
    except av.FFmpegError as error:
        raise ValueError(f"{video}: cannot be decoded: {error}") from None


def read_folder(folder, wanted):
    """`read_frames` of a folder of images."""
    files = {}
    starts = set()
    for file in os.listdir(folder):
        match = re.fullmatch(r"(?i)(?!\.)(.*?)(\d*)\.(jpe?g|png)", file)
        if match:
            starts.add(match[1])
            number = int(match[2] or -1)
            if number >= 0 and number in files:
                raise ValueError(f"{folder / file}: has the same number as {files[number].name}")
            files[number] = folder / file
    # of 12-00-59 and 12-01-00, or 59.5 and 59.25, the last number does not tell the order
    if len(starts) != 1 or re.fullmatch(r"\d+\.", min(starts)):
        got = f"names that begin with {sorted(starts)}" if starts else "none"
        raise ValueError(f"{folder}: expected frames of one kind, such as 000001.jpg; got {got}")
    for number in sorted(wanted):
        if number in files:
            yield number, read_image(files[number])


def crop(video, tracks, out, every=1, confidence=-np.inf, min_size=(1, 1)):
    """Cut the boxes of a track file, see `read_tracks`, out of a video, see `read_frames`, into
    <out>/<name of the video>/<track>_<frame>_00.jpg, which appears whole or not at all.

    every: of so many frames one; confidence: the lowest one that is kept; min_size: (height, width)
    of a box inside the frame. In a truth, a file gt.txt, column 7 says by 0 or 1 whether a box is
    to be considered: 1 for people. A video file's frames are numbered from 0 if the tracks name a
    frame 0, else from 1. Raises ValueError for wrong input and frames that cannot be read."""
    video = Path(os.path.abspath(video))
    if not video.exists():
        raise ValueError(f"{video}: no such file or folder")
    folder = Path(out) / name_of(video)
    chosen, first, dropped = choose_boxes(tracks, every, confidence)
    crops = 0
    with whole_folder(folder) as beside:
        for number, image in read_frames(video, chosen, min(first, 1)):
            for track, corners in chosen.pop(number).items():
                left, top, right, bottom = np.maximum(corners, 0)
                part = image[:, top:bottom, left:right]
                if part.shape[1] < min_size[0] or part.shape[2] < min_size[1]:
                    dropped["too small"] += 1
                else:
                    write_image(f"{beside}/{track:06d}_{number:07d}_00.jpg", part, 95)
                    crops += 1
        if chosen:
            missing = f"{len(chosen):,} frames that the tracks name, the first: {min(chosen)}"
            raise ValueError(f"{video}: does not hold {missing}")
        if crops == 0:
            raise NoBoxes(f"{tracks}: no boxes are left; dropped: {reasons(dropped)}")
    print(f"{folder}: {crops:,} crops; dropped: {reasons(dropped)}", flush=True)


def write_image(file, image, quality):
    """A JPEG file of an image, uint8 (3, H, W). Raises OSError, also on a full disk, where
    torchvision's write_jpeg and save_image say nothing."""
    try:
        Path(file).write_bytes(encode_jpeg(image.contiguous(), quality).numpy())
    except OSError as error:
        raise OSError(f"{file}: cannot be written: {error.strerror or error}") from None


def write_pictures(file, pictures, columns):
    """A JPEG file of pictures (3, H, W) in [0, 1], side by side in rows."""
    sheet = make_grid(pictures, columns)
    write_image(file, (255 * sheet).round().byte(), 90)


def name_of(video):
    """What the folder of a video's tracklets is called. MOTChallenge has sequences <name>/img1."""
    if video.name == "img1":
        video = video.parent
    name = video.name if video.is_dir() else video.stem
    return name.lstrip(".") or "video"  # a hidden folder would be left out


def crop_split(split, tracks, out, *options):
    """`crop` every sequence of a MOTChallenge split, <split>/<sequence>/img1/, by its own gt/gt.txt
    or a tracker's <tracks>/<sequence>.txt. Of MOT17's three copies of a video one is taken. What
    was cropped before is passed over, so that one may go on."""
    done = set()
    found = 0
    for name in sorted(os.listdir(split)):
        frames = Path(split) / name / "img1"
        file = Path(tracks) / f"{name}.txt" if tracks else Path(split) / name / "gt/gt.txt"
        if not frames.is_dir():
            continue
        if not file.exists():
            print(f"{file}: no such file, {name} is left out", flush=True)
            continue
        found += 1
        video = re.sub("-(DPM|FRCNN|SDP)$", "", name)
        if video not in done and not (Path(out) / name_of(frames)).exists():
            try:
                crop(frames, file, out, *options)
            except NoBoxes as error:
                print(error, flush=True)
                continue
        done.add(video)
    if not found:
        raise ValueError(f"{split}: no sequences with tracks; expected <sequence>/img1/000001.jpg")


# ---------------------------------------------------------------- tracklets out of benchmarks
def cut_benchmark(root, layout, out, held=251, seed=0, swap=0.0):
    """What a tracker would have given of a benchmark's training images, whose identities are known:
    tracklets in <out>/train, and `held` people who are held out in <out>/test, where a video is a
    camera; the truth in train.json and test.json, as for walkers. Images are links.

    layout: a function below. seed: of who is held out. swap: see `join_tracklets`. Raises
    ValueError for other names of files and too few people, FileExistsError where `out` exists."""
    files, person, camera, video, track, frame = layout(Path(root))
    random = np.random.default_rng(seed)
    people = np.unique(person)
    if not 0 < held < len(people):
        raise ValueError(f"{root}: has {len(people)} people, of whom {held} cannot be held out")
    test = np.isin(person, random.permutation(people)[:held])
    joined = track.copy()
    joined[~test] = join_tracklets(video[~test], track[~test], frame[~test], swap, random)
    cameras = np.char.mod("camera_%02d", camera)
    with whole_folder(out) as beside:
        for split, rows, videos, tracks in (
            ("train", ~test, video, joined),
            ("test", test, cameras, track),
        ):
            columns = files, person, videos, tracks, frame
            tracklets = link_split(beside / split, *[column[rows] for column in columns])
            print(f"{out}/{split}: {tracklets}")


def link_split(folder, files, person, video, track, frame):
    """A folder of links to files in LUPerson-NL's layout, and <folder>.json; arrays (N,). Returns
    its index."""
    order = np.lexsort((frame, track, video))
    for det, i in enumerate(order):
        link = folder / video[i] / f"{track[i]:06d}_{frame[i]:07d}_{det:02d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.abspath(files[i]))
    tracklets = read_tracklets(folder)
    write_labels(f"{folder}.json", tracklets, person[order])
    return tracklets


def join_tracklets(video, track, frame, share, random):
    """Tracklets (N,), some joined. By video and time, the first and the second, the third and the
    fourth, ... are pairs; one within a video becomes one tracklet with a probability of `share`."""
    _, first, track = np.unique(track, return_index=True, return_inverse=True)
    in_time = np.lexsort((frame[first], video[first]))
    union = np.arange(len(first))
    for a, b in zip(in_time[::2], in_time[1::2]):
        if video[first[a]] == video[first[b]] and random.random() < share:
            union[b] = a
    return union[track]


def read_names(folder, pattern):
    """The JPEG files in a folder and its folders, sorted, and the parts of their names (N, k)."""
    files = []
    for path, _, inside in os.walk(folder, onerror=stop):
        wanted = [file for file in inside if file.endswith(".jpg") and not file.startswith(".")]
        files += [Path(path) / file for file in wanted]
    files.sort()
    names = []
    for file in files:
        match = re.fullmatch(pattern, file.stem)
        if not match:
            raise ValueError(f"{file}: expected a name of the pattern {pattern}")
        names.append(match.groups())
    if not files:
        raise ValueError(f"{folder}: no images")
    return np.array(files), names


def number_columns(*columns):
    """Numbers (N,) of the combinations that columns (N,) have."""
    return np.unique(np.stack(columns), axis=1, return_inverse=True)[1].ravel()


def market(root):
    """Market-1501's bounding_box_train: 0002_c1s1_000451_03.jpg is person 2 under camera 1, in its
    sequence 1 at frame 451. A tracklet is a person under a camera with gaps of 200 frames at most;
    a video is 5,000 frames. Videos sort by time and camera.

    All cameras ran at one time and, by their sequences' lengths, stopped together. Each began to
    count anew with each of its sequences, which are not the other cameras'."""
    pattern = r"(\d{1,18})_c(\d{1,18})s(\d{1,18})_(\d{1,18})_(\d+)"
    files, names = read_names(root / "bounding_box_train", pattern)
    person, camera, sequence, frame = np.array(names)[:, :4].astype(int).T
    order = np.lexsort((frame, sequence, camera, person))
    where = np.stack([person, camera, sequence])[:, order]
    new = (np.diff(where) != 0).any(0) | (np.diff(frame[order]) > 200)
    new = np.append(True, new)
    track = np.empty_like(frame)
    track[order] = new.cumsum() - 1

    time = frame.copy()  # before the end, then since the beginning
    for c in np.unique(camera):
        own = camera == c
        for s in np.unique(sequence[own]):
            time[own & (sequence <= s)] -= frame[own & (sequence == s)].max()
    time -= time.min()
    first = time[order][new]
    video = np.array(["part_%03d/camera_%d" % place for place in zip(first[track] // 5000, camera)])
    return files, person, camera, video, track, time


def frames_in_no_order(track):
    """Frames (N,), all different, of images whose times are not known: the tracklets in random
    order. That of the files' names is by person, and would tell denoising who is who."""
    place = np.random.default_rng(0).permutation(track.max() + 1)
    return np.argsort(place[track], kind="stable").argsort()


def msmt17(root):
    """MSMT17's training images, 0000_000_01_0303morning_0015_0.jpg: person 0, image 0, camera 1, a
    date and a time of day, tracklet 15. A video is a camera at a date and time of day; the order
    within it is not known."""
    folder = "mask_train_v2" if (root / "mask_train_v2").exists() else "train"
    pattern = r"(\d{1,18})_(\d+)_(\d{1,18})_(\d{4})(morning|noon|afternoon)_(\d{1,18})_.*"
    files, names = read_names(root / folder, pattern)
    hours = {"morning": 1, "noon": 2, "afternoon": 3}
    numbers = [[name[0], *name[2:4], hours[name[4]], name[5]] for name in names]
    person, camera, date, hour, tracklet = np.array(numbers, int).T
    places = zip(date, hour, camera)
    video = np.array(["date_%04d/part_%d/camera_%02d" % place for place in places])
    track = number_columns(person, camera, date, hour, tracklet)
    return files, person, camera, video, track, frames_in_no_order(track)


def mars(root):
    """MARS' bbox_train, 0001C1T0001F001.jpg: person 1, camera 1, tracklet 1 of theirs, image 1. A
    video is a camera; the order within it is not known."""
    files, names = read_names(root / "bbox_train", r"(\d{1,18})C(\d)T(\d{1,18})F(\d+)")
    person, camera, tracklet = np.array(names)[:, :3].astype(int).T
    video = np.char.mod("camera_%d", camera)
    track = number_columns(person, camera, tracklet)
    return files, person, camera, video, track, frames_in_no_order(track)


def read_training(root):
    """The images to learn from that a folder has, as Tracklets, and who is on them (N,): those of
    train/ that train.json names, or a benchmark's, whose names begin with the person's number.
    Raises ValueError if there are none."""
    root = Path(root)
    if (root / "test.json").exists():
        return read_identities(root / "train.json", root / "train")
    layouts = "bounding_box_train", "mask_train_v2", "train", "bbox_train"
    for folder in layouts:  # Market-1501's, MSMT17's two, MARS'
        if (root / folder).exists():
            files, names = read_names(root / folder, r"(\d{1,18}).*")
            paths = np.array([os.fsencode(file.relative_to(root)) for file in files])
            person = np.array(names)[:, 0].astype(int)
            # a person is a tracklet: an image that cannot be read is replaced by another of theirs
            track = number_columns(person)
            no_frame = np.zeros_like(track)
            return Tracklets(root, [""] * len(files), paths, track, track, no_frame), person
    raise ValueError(f"{root}: no images to learn from; expected one of {layouts}")


# ---------------------------------------------------------------- walkers, drawn people
HEIGHT = 128
WIDTH = 64
SCENE = 8 * WIDTH
# person is -1 in a box that holds nobody; heading is 0 where the person faces the camera, phase is
# the gait's, both radians; place is where in the video's scene, which is 1 long and repeats
BOX = np.dtype("i8, i8, i8, i8, f8, f8, f8")
BOX.names = "video", "track", "frame", "person", "heading", "phase", "place"


def draw_walkers(root, seed=0, people=100, videos=48, held_out=60, noise=1.0, test_videos=24):
    """Draw people whose identities are known, as a tracker finds them: root/train and root/test in
    LUPerson-NL's layout, the truth in train.json and test.json. Deterministic in the arguments.

    test/ holds other people and videos than train/, fewer frames of each and no identity switches.
    noise scales how often the tracker of train/ fails; 0 is a perfect one. The root appears whole
    or not at all. Raises FileExistsError if it exists."""
    with whole_folder(root) as beside:
        draw_split(beside / "train", [seed, 0], people, videos, (14, 24), noise, True)
        draw_split(beside / "test", [seed, 1], held_out, test_videos, (6, 10), 1, False)


def draw_split(folder, seed, people, videos, frames, noise, switches):
    """Draw one set of people into a folder, and write who they are to <folder>.json."""
    random = np.random.default_rng(seed)
    looks = draw_looks(random, people)
    cameras = draw_cameras(random, videos)
    boxes = track_people(random, people, videos, frames, noise, switches)
    for part in np.split(boxes, range(32, len(boxes), 32)):
        images = draw_boxes(random, looks, cameras, part)
        for box, image in zip(part, torch.from_numpy(images)):
            file = folder / "video_{:06d}/{:06d}_{:07d}_00.jpg".format(*box)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_image(file, image, 90)
    boxes.sort(order=["video", "track", "frame"])
    write_labels(f"{folder}.json", read_tracklets(folder), boxes.person)


def track_people(random, people, videos, frames, noise, switches):
    """Who walks where, and what a tracker makes of it: an array of BOX. See `track_video`."""
    crowds = [[] for _ in range(videos)]
    # everyone walks through 2 to 4 videos that are not far apart in time
    for person in range(people):
        middle = random.integers(videos)
        near = range(max(middle - 6, 0), min(middle + 7, videos))
        count = min(len(near), random.integers(2, 5))
        for video in random.choice(near, count, replace=False):
            crowds[video].append(person)
    walks = []
    for video, crowd in enumerate(crowds):
        walks += track_video(random, video, crowd, frames, noise, switches)
    boxes = np.rec.array(np.concatenate(walks))
    boxes.frame *= 5
    return boxes


def track_video(random, video, crowd, frames, noise, switches):
    """The walks in one video, frames[0] to frames[1] boxes a person, in tracks with faults."""

    def start(track, person, length):
        """So many boxes of a person in one track, from a random frame on."""
        walk = np.recarray(length, BOX)
        walk.video = video
        walk.track = track
        walk.person = person
        walk.frame = random.integers(0, 2 * frames[1]) + np.arange(length)
        return walk

    walks = []
    for track, person in enumerate(crowd):
        length = random.integers(*frames, endpoint=True)
        walks.append(start(track, person, length))
    walks.sort(key=lambda walk: walk.frame[0])

    # an identity switch: from some frame on, two people's tracks go on as each other's
    for a, b in zip(walks[::2], walks[1::2]):
        low = b.frame[0] + 3
        high = min(a.frame[-1], b.frame[-1]) - 3
        if switches and low < high and random.random() < 0.65 * noise:
            frame = random.integers(low, high)
            first = a.track[0]
            a.track[a.frame >= frame] = b.track[0]
            b.track[b.frame >= frame] = first

    # a fragment: the tracker loses a person for up to two frames and starts anew
    tracks = len(walks)
    for i, walk in enumerate(walks):
        length = len(walk)
        if random.random() < 0.5 * noise:
            cut = random.integers(length // 4, length - length // 4)
            lost = random.integers(0, 3)
            rest = walk.track[cut:]
            rest[:] = tracks + (rest != rest[0])
            walks[i] = np.delete(walk, slice(cut, cut + lost))
            tracks += 2

    for walk in walks:
        time = walk.frame - walk.frame[0]
        length = len(walk)
        walk.heading = random.uniform(-np.pi, np.pi)
        walk.heading += random.uniform(-2, 2) * time / length
        walk.phase = random.uniform(0, 2 * np.pi)
        walk.phase += random.uniform(0.8, 1.4) * time
        walk.place = random.uniform(0, 1)
        walk.place += random.uniform(0.01, 0.04) * time * random.choice([-1, 1])
        # boxes that miss the person
        walk.person[random.random(length) < 0.02 * noise] = -1

    # false tracklets hold nobody
    false = random.integers(0, 1 + round(2 * noise))
    for track in range(tracks, tracks + false):
        walk = start(track, -1, random.integers(3, 8))
        walk.heading = walk.phase = walk.place = random.uniform(0, 1)
        walks.append(walk)
    return walks


def draw_looks(random, people):
    """What people look like: a dict of arrays, one row a person; colours are (people, 3, 1, 1)."""

    def colour(low=0.03, high=0.97, channels=3):
        """A random colour for each person or, with one channel, a number."""
        drawn = random.uniform(low, high, (people, channels, 1, 1))
        return drawn.astype(np.float32)

    return dict(
        skin=np.float32([[[0.93]], [[0.76]], [[0.65]]]) * colour(0.35, 1.05, 1),
        hair=np.float32([[[0.5]], [[0.35]], [[0.2]]]) * colour(0.1, 1.6, 1),
        girth=random.uniform(0.8, 1.25, people),
        tall=colour(0.9, 1.06, 1),
        long_hair=random.random(people) < 0.4,
        top=colour(),
        pattern=colour(),
        back=colour(),  # of a vest, the back of the top
        bottom=colour(0.03, 0.8),
        shoes=colour(),
        # how many a body height, across and down; none, one or both
        stripes=random.integers(0, 2, (people, 2)) * random.uniform(8, 22, (people, 2)),
        vest=random.random(people) < 0.2,
        long_sleeve=random.integers(0, 2, people),
        long_leg=random.random(people) >= 0.3,
        skirt=random.random(people) < 0.25,
        bag=random.integers(0, 3, people),  # none, on the back, in the hand
        bag_colour=colour(),
    )


def draw_cameras(random, videos):
    """The videos' scenes (videos, 3, HEIGHT, SCENE), colour gains and gammas."""
    coarse = draw_texture(random, videos, 6, 24, SCENE)
    fine = draw_texture(random, videos, 32, 128, SCENE)
    scene = (coarse + fine / 2 - 0.25).clip(0, 1)
    gain = random.uniform(0.9, 1.08, (videos, 3, 1, 1))
    gamma = random.uniform(0.85, 1.2, (videos, 1))
    return scene, gain.astype(np.float32), gamma.astype(np.float32)


def draw_texture(random, n, rows, columns, width):
    """Smooth blotches of muted colours from a grid, (n, 3, HEIGHT, width) in [0, 1]."""
    colours = random.uniform(0.2, 0.8, (n, 3, rows, columns))
    colours = torch.tensor(colours, dtype=torch.float32)
    muted = 0.4 * colours + 0.6 * colours[:, :1]
    return F.interpolate(muted, (HEIGHT, width), mode="bilinear").numpy()


def draw_boxes(random, looks, cameras, boxes):
    """The crops of n boxes, uint8 (n, 3, HEIGHT, WIDTH)."""
    n = len(boxes)
    scene, gain, gamma = cameras

    def uniform(low, high, channels=1):
        """A random number, or three, for each box: (n, channels, 1, 1)."""
        drawn = random.uniform(low, high, (n, channels, 1, 1))
        return drawn.astype(np.float32)

    # half of the background differs from frame to frame, half is a part of the video's scene, below
    left = (boxes.place * SCENE).astype(int)
    left += random.integers(-6, 7, n)
    image = 0.5 * draw_texture(random, n, 5, 3, WIDTH)

    # body coordinates: y from 0 (crown) to 1 (soles), x from the middle; the box is not exact
    scale = uniform(0.82, 1) * looks["tall"][boxes.person.clip(0)]
    y = np.arange(HEIGHT, dtype=np.float32)[:, None] / HEIGHT - 0.5
    y = (y - uniform(-0.04, 0.04)) / scale + 0.5  # (n, 1, HEIGHT, 1)
    x = np.arange(WIDTH, dtype=np.float32) / HEIGHT - 0.25
    x = (x - uniform(-0.03, 0.03)) / scale  # (n, 1, 1, WIDTH)

    for i, box in enumerate(boxes):
        columns = left[i] + np.arange(WIDTH)
        image[i] += 0.5 * scene[box.video].take(columns, axis=2, mode="wrap")
        if box.person >= 0:
            look = {key: value[box.person] for key, value in looks.items()}
            draw_person(image[i], x[i], y[i], scale[i], box, SimpleNamespace(**look))

    # something hides the legs, something hides one side
    low = y > uniform(0.55, 0.9)
    edge = uniform(0.05, 0.2)
    aside = x * random.choice([-1, 1], (n, 1, 1, 1)) > edge
    for hidden in low, aside:
        colour = uniform(0.1, 0.9, 3)
        hidden = hidden & (random.random((n, 1, 1, 1)) < 0.15)
        image = np.where(hidden, colour, image)

    # the camera: gamma, from a table, and gain, blur along y and along x, noise
    table = np.linspace(0, 1, 256, dtype=np.float32) ** gamma  # (videos, 256)
    level = (image * 255).astype(np.uint8)
    image = table[boxes.video[:, None, None, None], level] * gain[boxes.video]
    blur = uniform(0, 0.33)
    for line in image, image.swapaxes(2, 3):
        inner = line[:, :, 1:-1]
        inner += blur * (line[:, :, :-2] + line[:, :, 2:] - 2 * inner)
    noise = uniform(0.005, 0.03)
    image += noise * random.standard_normal(image.shape, np.float32)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def draw_person(image, x, y, scale, box, look):
    """Paint a person on an image (3, HEIGHT, WIDTH), limb by limb, the far side first. x, of shape
    (1, 1, WIDTH), and y (1, HEIGHT, 1) are body coordinates, scale is the body's height in images.
    """

    def limb(colour, *ends):
        """From (ax, ay), with a radius of ra, to (bx, by), with a radius of rb."""
        ax, ay, bx, by, ra, rb = np.float32(ends)
        px = x - ax
        py = y - ay
        dx = bx - ax
        dy = by - ay
        along = (px * dx + py * dy) / (dx * dx + dy * dy + 1e-8)
        along = along.clip(0, 1)
        across = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2)
        outside = across - (ra + along * (rb - ra))
        alpha = (0.5 - outside * HEIGHT * scale).clip(0, 1)
        image[:] += alpha * (colour - image)

    side = np.sin(box.heading)  # 1 or -1 in profile
    front = np.cos(box.heading)  # 1 where the person faces the camera
    girth = look.girth * (0.7 + 0.3 * abs(front))
    wide = girth * abs(front)
    stride = np.sin(box.phase) * (0.04 + 0.14 * abs(side))
    top = look.back if look.vest and front <= 0 else look.top
    sleeve = top if look.long_sleeve else look.skin
    trousers = look.bottom if look.long_leg else look.skin
    across, down = 2 * np.pi * np.float32(look.stripes / [girth, 1])
    wave = np.sin(across * x) + np.sin(down * y)
    shirt = np.where(wave > 0, look.pattern, top)  # (3, HEIGHT, WIDTH)

    def arm(s):
        """On one side, s = -1 or 1."""
        shoulder = 0.1 * s * wide
        hand = shoulder - 0.8 * s * stride
        elbow = (shoulder + hand) / 2 + 0.015 * s
        limb(top, shoulder, 0.22, elbow, 0.36, 0.032 * girth, 0.026 * girth)
        limb(sleeve, elbow, 0.36, hand, 0.5, 0.026 * girth, 0.02 * girth)
        limb(look.skin, hand, 0.51, hand, 0.52, 0.018, 0.018)

    def leg(s):
        """On one side, s = -1 or 1."""
        hip = 0.045 * s * wide
        knee = hip + 0.6 * s * stride
        foot = hip + s * stride
        lift = 0.03 * max(0, s * np.cos(box.phase))
        limb(look.bottom, hip, 0.52, knee, 0.72, 0.05 * girth, 0.038 * girth)
        limb(trousers, knee, 0.72, foot, 0.93 - lift, 0.036 * girth, 0.026 * girth)
        toe = foot + 0.03 * side
        limb(look.shoes, foot, 0.96 - lift, toe, 0.965 - lift, 0.022, 0.02)

    def backpack():
        """Behind the body, or before it where the person is seen from behind."""
        limb(look.bag_colour, -0.09 * side, 0.27, -0.09 * side, 0.38, 0.06, 0.065)

    if look.bag == 1 and front > -0.3:
        backpack()
    arm(-1)
    leg(-1)
    leg(1)
    if look.skirt:
        limb(look.bottom, 0, 0.5, 0, 0.62, 0.09 * girth, 0.12 * girth)
    limb(shirt, 0, 0.23, 0, 0.48, 0.1 * girth, 0.085 * girth)
    if look.bag == 1 and front <= -0.3:
        backpack()
    limb(look.skin, 0, 0.14, 0, 0.17, 0.03, 0.03)
    if look.long_hair:
        limb(look.hair, 0, 0.055, 0, 0.2, 0.055, 0.06)
    limb(look.skin, 0, 0.07, 0.01 * side, 0.09, 0.055, 0.05)
    fringe = 0.03 if front > 0 else 0.09
    limb(look.hair, -0.02 * side, 0.04, -0.02 * side, fringe, 0.052, 0.05)
    arm(1)
    if look.bag == 2:
        handbag = 0.13 * girth * np.sign(front)
        limb(look.bag_colour, handbag, 0.5, handbag, 0.58, 0.04, 0.05)


# ---------------------------------------------------------------- the program
def parse_flags():
    """The command and its flags, and the parser, whose `error` says what is wrong with them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("crop", help="the boxes of a tracker, out of videos").add_argument
    add("--video", help="a video file (needs the package av) or a folder of frames")
    add("--split", help="instead a MOTChallenge split, <split>/<sequence>/img1/")
    add("--tracks", help="MOTChallenge file, or for --split a folder of them")
    add("--out", required=True, help="folder for <video>/<track>_<frame>_<det>.jpg")
    add("--every", type=int, default=1, help="take every n-th frame [1]")
    add("--confidence", type=float, default=-np.inf, help="drop boxes of a lower one")
    add("--min_size", type=int, nargs=2, default=(1, 1), help="height, width: drop smaller boxes")
    add = commands.add_parser("tracklets", help="out of a benchmark's training set").add_argument
    add("--market", help="folder with Market-1501's bounding_box_train/")
    add("--msmt17", help="MSMT17's folder, with train/ or mask_train_v2/")
    add("--mars", help="MARS' folder, with bbox_train/")
    add("--out", required=True, help="folder for train/, test/, train.json, test.json")
    add("--held", type=int, default=251, help="people who are held out, in test/ [251]")
    add("--seed", type=int, default=0, help="of the choice of these [0]")
    add("--swap", type=float, default=0, help="share of pairs of tracklets that are joined [0]")
    return parser.parse_args(), parser


def main():
    """Tracklets out of videos that were tracked, or out of a benchmark's training images."""
    args, parser = parse_flags()
    if args.command == "tracklets":
        layouts = [layout for layout in (market, msmt17, mars) if vars(args)[layout.__name__]]
        if len(layouts) != 1 or not 0 <= args.swap <= 1:
            parser.error("expected one of --market, --msmt17 and --mars, and --swap from 0 to 1")
        root = vars(args)[layouts[0].__name__]
        cut_benchmark(root, layouts[0], args.out, args.held, args.seed, args.swap)
        return
    if min(args.every, *args.min_size) < 1 or math.isnan(args.confidence):
        parser.error("--every and --min_size: expected numbers from 1, --confidence: a number")
    options = args.every, args.confidence, args.min_size
    if args.split and not args.video:
        crop_split(args.split, args.tracks, args.out, *options)
    elif args.video and args.tracks and not args.split:
        crop(args.video, args.tracks, args.out, *options)
    else:
        parser.error("expected --video with --tracks, or --split")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
