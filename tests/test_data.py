"""data.py: the index, labels, images, the sampler, crops from videos and walkers."""
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import write_jpeg, write_png

import data
from conftest import full_disk

FILES = [
    "a/000001_0000001_01.jpg",
    "a/000001_0000005_00.jpg",
    "a/000002_0000001_00.jpg",
    "b/000002_0000010_00.jpg",
    "x/y/000001_0000003_00.jpeg",
]


def make_tree(root, files):
    """Image number i is grey, of level 20 i."""
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(torch.full((3, 16, 8), 20 * i, dtype=torch.uint8), str(root / file))
    return root


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "set", FILES)


# ---------------------------------------------------------------- the index
def test_the_index_is_sorted_by_video_track_frame_and_detection(tree):
    (tree / "a" / "notes.txt").write_text("other files are left alone")
    make_tree(tree, [".part/000001_0000001_00.jpg", "a/._000001_0000001_01.jpg"])
    t = data.read_tracklets(tree)
    assert [t.path(i) for i in range(len(t))] == [path.decode() for path in t.paths()] == FILES
    assert t.video.tolist() == [0, 0, 0, 1, 2]
    assert t.track.tolist() == [0, 0, 1, 2, 3]
    assert t.frame.tolist() == [1, 5, 1, 10, 3]
    assert t.video.dtype == t.track.dtype == t.frame.dtype == np.int64
    assert str(t) == "3 videos, 4 tracklets, 5 images"


def test_names_are_ordered_as_numbers_and_a_root_may_be_a_video(tmp_path):
    names = ["9_20_0.jpg", "9_100_0.jpg", "9_100_2.JPG", "9_100_10.jpg", "10_2_0.jpg"]
    nanoseconds = "10_1717243240000000001_0.jpg"
    t = data.read_tracklets(make_tree(tmp_path, [*names, nanoseconds]))
    assert [path.decode() for path in t.paths()] == [*names, nanoseconds]
    assert t.frame[-1] == 1717243240000000001


NAMES = ["portrait.jpg", "1_2.jpg", "1_2_3_4.jpg", "1_2_x.jpg", f"1_{2**63}_0.jpg"]


@pytest.mark.parametrize("name", NAMES)
def test_jpegs_of_other_names_are_refused(tree, name):
    make_tree(tree, [f"b/{name}"])
    with pytest.raises(ValueError, match=f"b/{name}: expected <track>_<frame>_<det>.jpg"):
        data.read_tracklets(tree)


def test_folders_that_are_missing_empty_or_closed_are_refused(tmp_path, tree, monkeypatch):
    with pytest.raises(OSError, match="nowhere"):
        data.read_tracklets(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no JPEG files"):
        data.read_tracklets(tmp_path / "empty")
    scan = os.scandir

    def closed(folder):
        if str(folder).endswith("b"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="set/b"):
        data.read_tracklets(tree)


def test_links_are_followed_but_not_in_circles(tmp_path, tree):
    other = make_tree(tmp_path / "other", ["000007_0000001_00.jpg"])
    (tree / "z").symlink_to(other)
    (tree / "a" / "up").symlink_to(tree)
    (tree / "a" / "again").symlink_to(tree / "a")
    paths = [path.decode() for path in data.read_tracklets(tree).paths()]
    assert paths == [*FILES, "z/000007_0000001_00.jpg"]


def test_the_digest_tells_whether_files_and_labels_are_the_same(tree):
    labels = np.array([0, 0, 1, 1, -1])
    digests = [data.read_tracklets(tree).digest(labels)]
    moved = tree.rename(tree.parent / "moved")
    assert data.read_tracklets(moved).digest(labels) == digests[0]
    digests.append(data.read_tracklets(moved).digest(labels + 1))
    (moved / "b").rename(moved / "c")
    digests.append(data.read_tracklets(moved).digest(labels))
    (moved / FILES[0]).rename(moved / "a/000001_0000001_02.jpg")
    digests.append(data.read_tracklets(moved).digest(labels))
    assert len(set(digests)) == 4


def test_folders_may_have_names_that_are_not_utf_8(tmp_path):
    folder = os.fsdecode(b"caf\xe9")
    try:
        make_tree(tmp_path, ["v/1_1_0.jpg"])
        (tmp_path / "v").rename(tmp_path / folder)
    except OSError:
        pytest.skip("this file system has no such names")
    t = data.read_tracklets(tmp_path)
    assert t.paths().tolist() == [b"caf\xe9/1_1_0.jpg"]
    data.write_labels(tmp_path / "labels.json", t, np.array([3]))
    assert data.read_labels(tmp_path / "labels.json", t).tolist() == [0]
    assert data.read_image(tmp_path / t.path(0)).shape == (3, 16, 8)


def test_splits_are_found_and_held_out_people_are_not_learned_from(tmp_path):
    root = tmp_path / "all" / "set"
    (root / "train").mkdir(parents=True)
    assert data.find_splits(root) == (root, None)
    (root / "test").mkdir()
    assert data.find_splits(root) == (root / "train", None)
    (root / "test.json").write_text("[]")
    assert data.find_splits(root) == (root / "train", root / "test")
    with pytest.raises(ValueError, match="set/test.json holds people out; give .*/set"):
        data.find_splits(tmp_path / "all")
    (root / "train").rmdir()
    with pytest.raises(ValueError, match="test.json holds people out, but train/ or test/ is miss"):
        data.find_splits(root)


# ---------------------------------------------------------------- labels
def test_labels_make_the_round_trip_in_the_published_format(tmp_path, tree, monkeypatch):
    t = data.read_tracklets(tree)
    file = tmp_path / "labels.json"
    data.write_labels(file, t, np.array([70, -1, 5, 70, 9]))
    assert json.loads(file.read_text()) == [
        {"file_path": FILES[2], "id": 1},
        {"file_path": FILES[4], "id": 2},
        {"file_path": FILES[0], "id": 3},
        {"file_path": FILES[3], "id": 3},
    ]
    assert data.read_labels(file, t).tolist() == [2, -1, 0, 2, 1]
    data.write_labels(tmp_path / "nobody.json", t, np.full(5, -1))
    assert json.loads((tmp_path / "nobody.json").read_text()) == []

    def stop(old, new):
        raise KeyboardInterrupt

    # whatever happens before it is whole, the old file stays
    with full_disk(100), pytest.raises(OSError, match="labels.json: cannot be written: "):
        data.write_labels(file, t, np.arange(5))
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        data.write_labels(file, t, np.arange(5))
    assert data.read_labels(file, t).tolist() == [2, -1, 0, 2, 1]


GOOD = {"file_path": FILES[0], "id": 1}


@pytest.mark.parametrize(
    "entries, message",
    [
        ([{"file_path": "a/../../secret.jpg", "id": 1}], "../secret.jpg leaves the images'"),
        ([{"file_path": "/etc/1_1_1.jpg", "id": 1}], "leaves the images'"),
        ([{"file_path": "a/../..", "id": 1}], r"\.\. leaves the images'"),
        ([{"file_path": "a/9_1_0.jpg", "id": 1}], "a/9_1_0.jpg is not among the images"),
        ([GOOD, {"file_path": f"./{FILES[0]}", "id": 2}], f"{FILES[0]} comes twice"),
        ([GOOD, {"file_path": FILES[1], "id": 0}, GOOD], "a whole number from 1; entry 2 is .* 0}"),
        ([GOOD, {"file_path": FILES[1], "id": 1.5}], "entry 2 is .*1.5}"),
        ([GOOD, {"file_path": FILES[1], "id": 2**63}], "entry 2 is .*9223372036854775808}"),
        ([GOOD, {"file_path": FILES[1], "id": True}], "entry 2 is .*True}"),
        ([{"file_path": 1, "id": 1}], "entry 1 is "),
        ([{"path": FILES[0], "id": 1}], "entry 1 is "),
        ([GOOD, 3], "expected a list"),
        (GOOD, "expected a list"),
        ([], "expected a list"),
    ],
)
def test_broken_annotations_are_refused(tmp_path, tree, entries, message):
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=f"labels.json: .*{message}"):
        data.read_labels(file, data.read_tracklets(tree))


def test_an_annotation_that_nests_too_deep_is_refused(tmp_path, tree):
    (tmp_path / "labels.json").write_text(100_000 * "[")
    with pytest.raises(ValueError, match="labels.json: expected a list"):
        data.read_labels(tmp_path / "labels.json", data.read_tracklets(tree))


def test_an_annotation_alone_is_an_index_of_files_of_any_names(tmp_path):
    """CION-AL's layout: sec0/ to sec129/ and the annotation beside them."""
    ids = {"sec9/at all.jpg": 1, "sec0/a/1_1_3.jpg": 1, "sec10/Österreich/7.jpg": 2, "8.jpg": 9}
    make_tree(tmp_path, [*ids, "sec0/not named.jpg"])
    entries = [{"file_path": path, "id": identity} for path, identity in ids.items()]
    (tmp_path / "annotation.json").write_text(json.dumps(entries))
    t, labels = data.read_identities(tmp_path / "annotation.json", tmp_path)
    assert {path.decode(): label for path, label in zip(t.paths(), labels + 1)} == ids
    assert len(np.unique(t.track)) == 3
    assert ((t.track[:, None] == t.track) == (labels[:, None] == labels)).all()
    assert [used for _, used in data.Images(t, (16, 8))] == [0, 1, 2, 3]
    data.write_labels(tmp_path / "again.json", t, labels)
    assert data.read_labels(tmp_path / "again.json", t).tolist() == [2, 0, 1, 0]


# ---------------------------------------------------------------- images
def test_images_are_turned_upright_and_have_three_colours(tmp_path):
    sideways = Image.Exif()
    sideways[0x0112] = 6
    Image.new("L", (8, 16)).save(tmp_path / "grey.jpg", exif=sideways)
    assert data.read_image(tmp_path / "grey.jpg").shape == (3, 8, 16)


def test_where_an_image_gets_smaller_every_pixel_counts(tree):
    stripes = torch.zeros(3, 16, 8, dtype=torch.uint8)
    stripes[:, :, 1::4] = stripes[:, :, 2::4] = 255
    write_png(stripes, str(tree / FILES[0]))
    image, _ = data.Images(data.read_tracklets(tree), (16, 2))[0]
    assert 100 < image.min() and image.max() < 160


def level(image):
    """Which image of `make_tree` it is."""
    return round(image.float().mean().item() / 20)


def test_an_image_that_cannot_be_read_is_the_next_of_its_tracklet(tmp_path):
    files = [f"v/000001_000000{n}_00.jpg" for n in range(4)] + ["v/000002_0000000_00.jpg"]
    t = data.read_tracklets(make_tree(tmp_path, files))
    t.track = np.array([0, 1, 0, 0, 1])
    images = data.Images(t, (32, 16))
    assert [(level(image), used) for image, used in images] == [(i, i) for i in range(5)]
    assert images[0][0].shape == (3, 32, 16) and images[0][0].dtype == torch.uint8
    (tmp_path / files[2]).write_bytes(b"no image")
    (tmp_path / files[3]).unlink()
    # 16 bits, which would come out as other colours
    Image.fromarray(np.full((16, 8), 40_000, np.uint16)).save(tmp_path / files[4], "png")
    assert [(level(image), used) for image, used in images] == [(i, i) for i in (0, 1, 0, 0, 1)]
    (tmp_path / files[1]).write_bytes(b"")
    assert images[4][1] == 0  # of no other tracklet but of its video
    (tmp_path / files[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{files[4]}: cannot be read: .*8 bits"):
        images[4]
    with pytest.raises(ValueError, match=f"{files[3]}: cannot be read: .*No such file"):
        images[3]
    # a damaged PNG, at which torchvision's decoder would end the program
    write_png(torch.zeros(3, 16, 8, dtype=torch.uint8), str(tmp_path / files[4]))
    content = bytearray((tmp_path / files[4]).read_bytes())
    begin = content.find(b"IDAT")
    content[begin + 8] ^= 255
    (size,) = struct.unpack(">i", content[begin - 4 : begin])
    checksum = zlib.crc32(content[begin : begin + 4 + size])
    content[begin + 4 + size : begin + 8 + size] = struct.pack(">I", checksum)
    (tmp_path / files[4]).write_bytes(content)
    with pytest.raises(ValueError, match=f"{files[4]}: cannot be read: "):
        images[4]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_bad_files_are_named_once(tmp_path, workers):
    files = [f"v/000001_000000{n}_00.jpg" for n in range(4)]
    t = data.read_tracklets(make_tree(tmp_path, files))
    batches = [np.array([3, 0]), np.array([1, 1, 2])] * 20
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "", UserWarning)
        loaded = list(data.load_batches(t, batches, (16, 8), workers))
    for images, batch in zip(loaded, batches):
        assert images.dtype == torch.uint8 and images.shape == (len(batch), 3, 16, 8)
        assert [level(image) for image in images] == batch.tolist()
    (tmp_path / files[1]).write_bytes(b"no image")
    with pytest.warns(UserWarning) as record:
        loaded = list(data.load_batches(t, batches, (16, 8), workers))
    assert [level(image) for image in loaded[1]] == [2, 2, 2]
    said = [str(w.message) for w in record if w.category is UserWarning]
    assert said == [f"{tmp_path / files[1]}: cannot be read, replaced by {files[2]}"]


def test_more_than_ten_bad_files_and_one_percent_are_refused(tmp_path):
    """Each is alone in its tracklet, so that another image of its video takes its place."""
    files = [f"v/{n:06d}_0000001_00.jpg" for n in range(12)]
    t = data.read_tracklets(make_tree(tmp_path, files))
    for file in files[:10]:
        (tmp_path / file).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="replaced by v/000010_"):
        (images,) = data.load_batches(t, [np.arange(12)], (16, 8))
    assert [level(image) for image in images[:11]] == [10] * 11
    (tmp_path / files[10]).write_bytes(b"no image")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="000000_.*one of 11, more"):
        list(data.load_batches(t, [np.arange(12)], (16, 8)))
    with pytest.warns(UserWarning):  # of 1,200 they are less than 1%
        list(data.load_batches(t, [np.arange(12), np.full(1188, 11)], (16, 8)))


def test_loader_workers_leave_signals_to_the_process_that_they_feed(tree):
    loading = data.load_batches(data.read_tracklets(tree), [[i] for i in range(5)] * 4, (16, 8), 1)
    seen = [level(next(loading)[0])]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert seen + [level(images[0]) for images in loading] == [0, 1, 2, 3, 4] * 4


@pytest.mark.parametrize("fault", ["raises", "is killed"])
def test_a_worker_that_fails_ends_the_process(tree, fault):
    """Workers ignore SIGTERM, with which Python would end them, and wait for, at its own end. Other
    children of the process are left alone."""
    said = b"Error: "  # of a DataLoader or of its connection
    if fault == "raises":
        (tree / FILES[3]).write_bytes(b"no image")
        said = b"b/000002_0000010_00.jpg: cannot be read: "
    script = f"""if True:
        import data, multiprocessing, time
        def work():
            time.sleep(1)
            open({str(tree / "done")!r}, "w")
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        loading = data.load_batches(data.read_tracklets({str(tree)!r}), [[0], [3]] * 99, (16, 8), 2)
        for images in loading:
            if {fault!r} == "is killed":
                [one for one in multiprocessing.active_children() if one is not child][0].kill()"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=data.__file__[:-8], timeout=60, capture_output=True)
    lines = ended.stderr.splitlines()
    # where a worker is killed, another may say something after it
    assert ended.returncode == 1 and said in (lines[-1] if fault == "raises" else ended.stderr)
    assert (tree / "done").exists()


# ---------------------------------------------------------------- sampling
def sample_literally(labels, K, batch, seed, epoch, steps, video):
    """The definition: shuffle, deal into groups of K, shuffle these, fill batches; and again."""
    random = np.random.default_rng([seed, epoch])
    batches = []
    while len(batches) < steps:
        shuffled = random.permutation([i for i in range(len(labels)) if labels[i] >= 0])
        place = random.permutation(max(video) + 1)
        groups = []
        for identity in sorted(set(labels) - {-1}):
            own = [i for i in shuffled if labels[i] == identity]
            own.sort(key=lambda i: place[video[i]])
            count = max(len(own) // K, 1)
            for n in range(count):
                groups.append([own[(n + k * count) % len(own)] for k in range(K)])
        groups = [groups[n] for n in random.permutation(len(groups))]
        across = [group for group in groups if len({video[i] for i in group}) > 1]
        if len(across) * K >= batch:
            groups = across
        images = [i for group in groups for i in group]
        while len(images) >= batch:
            batches.append(images[:batch])
            images = images[batch:]
    return batches[:steps]


@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_sampler_is_its_definition(K):
    labels = np.random.default_rng(0).integers(-1, 30, 300)
    labels[:3] = 30  # three images only
    video = np.random.default_rng(1).integers(0, 3, 300)
    for steps in 0, 1, 50:
        batches = data.sample_identities(labels, K, 16, 5, 7, steps, video)
        assert batches.shape == (steps, 16)
        assert batches.tolist() == sample_literally(labels, K, 16, 5, 7, steps, video)
    groups = batches.reshape(-1, K)
    assert (labels[groups] == labels[groups[:, :1]]).all() and (labels[groups] >= 0).all()
    for group in groups:
        own = (labels == labels[group[0]]).sum()
        assert len(set(group)) == min(K, own)


def test_images_of_a_group_are_of_different_videos():
    """As far as there are: identity 0 has a video of three quarters, identity 1 is in one only."""
    labels = np.repeat([0, 1, 2], [8, 8, 8])
    video = np.array([0] * 6 + [1, 2] + [3] * 8 + [4, 5] * 4)
    seen = set()
    for epoch in range(30):
        batches = data.sample_identities(labels, 2, 12, 0, epoch, 1, video).reshape(-1, 2)
        assert (video[batches[:, 0]] != video[batches[:, 1]]).all()
        assert sorted(labels[batches[:, 0]]) == [0] * 2 + [2] * 4
        seen |= {tuple(sorted(pair)) for pair in batches.tolist()}
    assert len(seen) > 24  # of 13 + 16: who is with whom is random
    # too few for a larger batch: all groups of all
    batches = data.sample_identities(labels, 2, 24, 0, 0, 1, video)
    assert sorted(batches.ravel()) == list(range(24))
    # nine of a hundred identities fill batches, but there is more to learn from than these
    for crossing, learned in ((18, 200), (20, 20)):
        video = np.where(np.arange(200) < crossing, np.arange(200) % 2, 0)
        batches = data.sample_identities(np.repeat(np.arange(100), 2), 2, 4, 0, 0, 50, video)
        assert len(np.unique(batches)) == learned


def test_who_meets_in_a_batch_is_random():
    """Two identities a batch, of ten: by and by, each meets each."""
    labels = np.repeat(np.arange(10), 4)
    met = set()
    for epoch in range(60):
        batches = labels[data.sample_identities(labels, 4, 8, 0, epoch, 5)]
        # every identity comes once an epoch
        assert sorted(batches[:, ::4].ravel()) == list(range(10))
        met |= {frozenset(batch) for batch in batches}
    assert len(met) == 45


def test_every_image_comes_round_and_no_more_often_than_others():
    labels = np.repeat([0, 1, 2, 3], [6, 10, 8, 12])
    counts = np.zeros(36)
    for epoch in range(300):
        batches = data.sample_identities(labels, 4, 4, 0, epoch, 8)
        counts += np.bincount(batches.ravel(), minlength=36)
    for identity in range(4):
        own = counts[labels == identity]
        assert own.max() < 1.25 * own.min()


def test_processes_share_the_batches_of_one_without_cutting_identities():
    labels = np.repeat(np.arange(20), 10)
    batches = data.sample_identities(labels, 4, 16, 3, 1, 10)
    for processes in 2, 4:
        for part in np.split(batches, processes, axis=1):
            groups = labels[part.reshape(-1, 4)]
            assert (groups == groups[:, :1]).all()
    # each process calls for itself and takes its part
    assert (data.sample_identities(labels, 4, 16, 3, 1, 10) == batches).all()
    for seed, epoch in (3, 2), (4, 1):
        assert (data.sample_identities(labels, 4, 16, seed, epoch, 10) != batches).any()


def test_the_sampler_says_what_does_not_fit():
    with pytest.raises(ValueError, match="batch of 16 does not divide into K=3"):
        data.sample_identities(np.arange(16), 3, 16, 0, 0, 1)
    with pytest.raises(ValueError, match="2 groups of K=4 images do not fill a batch of 16"):
        data.sample_identities(np.array([0, 0, 1, 1, -1]), 4, 16, 0, 0, 1)


# ---------------------------------------------------------------- crops from videos
HEIGHT = 120
WIDTH = 160


def draw_frame(number):
    """Red tells the frame's number, green the column, blue the row: uint8 (3, HEIGHT, WIDTH)."""
    frame = np.empty((3, HEIGHT, WIDTH), np.uint8)
    frame[0] = 20 * number % 256
    frame[1] = np.arange(WIDTH)
    frame[2] = np.arange(HEIGHT)[:, None]
    return torch.from_numpy(frame)


def make_frames(folder, numbers, name="{:06d}.png"):
    folder.mkdir(parents=True)
    for number in numbers:
        write_png(draw_frame(number), str(folder / name.format(number)))
    return folder


def make_tracks(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return file


def box(frame, track=1, left=10, top=10, width=20, height=40, *others):
    return (frame, track, left, top, width, height, *(others or (1, -1, -1, -1)))


def names(folder):
    return sorted(file.stem for file in folder.iterdir())


def seen(file):
    """Of a crop, by its pixels: the number of its frame, left, top, width and height."""
    image = data.read_image(file).float()
    number = image[0].mean().item() / 20
    left = image[1, :, 0].mean().item()
    top = image[2, 0].mean().item()
    return round(number), left, top, image.shape[2], image.shape[1]


def test_crops_show_what_the_boxes_held(tmp_path, capsys):
    frames = make_frames(tmp_path / "street", [1, 2])
    tracks = make_tracks(
        tmp_path / "street.txt",
        box(1, 7, 30, 20, 40, 60),
        box(1, 0, 100.4, 50.6, 20, 30),
        box(2, 0, 140, 100, 40, 60),  # hangs over the lower right corner
        box(2, 7, -10, -5, 30, 25),  # and over the upper left
        box(2, 9, 300, 20, 40, 60),  # outside
        box(2, 8, -50, 20, 40, 60),  # outside
        box(2, 7, 90, 20, 40, 60),  # a track has one box in a frame
        box(2, -1, 90, 20, 40, 60),  # a detection
    )
    data.crop(frames, tracks, tmp_path / "out")
    folder = tmp_path / "out" / "street"
    want = {
        "000000_0000001_00": (1, 100, 51, 20, 30),
        "000000_0000002_00": (2, 140, 100, 20, 20),
        "000007_0000001_00": (1, 30, 20, 40, 60),
        "000007_0000002_00": (2, 0, 0, 20, 20),
    }
    assert names(folder) == list(want)
    for name, expected in want.items():
        assert seen(folder / f"{name}.jpg") == pytest.approx(expected, abs=3)
    said = capsys.readouterr().out
    for count in "4 crops", "2 too small", "1 of no track", "1 second boxes":
        assert count in said
    assert data.read_tracklets(tmp_path / "out").track.tolist() == [0, 0, 1, 1]
    with pytest.raises(OSError, match="out/street: exists already"):
        data.crop(frames, tracks, tmp_path / "out")
    # not half of an image
    with full_disk(500), pytest.raises(OSError, match="full/street: is not made: .*written"):
        data.crop(frames, tracks, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == []


def test_flags_of_cropping(tmp_path, in_process, capsys):
    frames = make_frames(tmp_path / "f", range(1, 9))
    rows = [box(n, 1, 10, 10, 20, 40, n / 10) for n in range(1, 9)]
    # of the second one 19 columns are inside
    tracks = make_tracks(tmp_path / "t.txt", *rows, box(1, 2, 141, 10, 20, 40, 0.75))
    command = ["--video", frames, "--tracks", tracks, "--out"]
    for flags, kept, reason in (
        (["--every", 3], "1_1 1_4 1_7 2_1", "5 between the frames taken"),
        (["--confidence", 0.75], "1_8 2_1", "7 below the confidence"),
        (["--min_size", 40, 20], "1_1 1_2 1_3 1_4 1_5 1_6 1_7 1_8", "1 too small"),
    ):
        out = tmp_path / flags[0]
        in_process("data.py crop", *command, out, *flags)
        numbers = [[int(part) for part in name.split("_")] for name in names(out / "f")]
        assert " ".join(f"{track}_{frame}" for track, frame, _ in numbers) == kept
        assert reason in capsys.readouterr().out
    in_process("data.py crop", *command, tmp_path / "first", "--every", 10**22)
    assert len(names(tmp_path / "first" / "f")) == 2
    no = ["--confidence", "nan"]
    for wrong in (["--every", 0], ["--min_size", 0, 1], ["--split", tmp_path], no):
        with pytest.raises(SystemExit):
            in_process("data.py crop", *command, tmp_path / "no", *wrong)
    for nothing in (["--confidence", 7], ["--min_size", 41, 1]):
        with pytest.raises(ValueError, match="t.txt: no boxes are left; dropped: 9 "):
            in_process("data.py crop", *command, tmp_path / "no", *nothing)


@pytest.mark.parametrize(
    "name, others, kept",
    [
        ("gt.txt", [(1, 1, 0.8), (0, 7, 1)], [1]),  # flag, class, visibility
        ("gt.txt", [(0.9, 0, 1), (0, 0, 1)], [1, 2]),  # a tracker's scores
        ("tracker.txt", [(1, 1, 0.8), (0, 7, 1)], [1, 2]),
    ],
)
def test_a_truth_keeps_who_is_to_be_considered(tmp_path, name, others, kept):
    rows = [box(1, track, 10, 10, 20, 40, *more) for track, more in enumerate(others, 1)]
    tracks = make_tracks(tmp_path / name, *rows)
    data.crop(make_frames(tmp_path / "f", [1]), tracks, tmp_path / "out")
    assert names(tmp_path / "out" / "f") == [f"{track:06d}_0000001_00" for track in kept]


@pytest.mark.parametrize("others", [(1, 0, 0.3), (1, -1, -1, -1), (-1, -1, -1, -1), ()])
def test_confidences_are_asked_for_where_column_7_holds_none(tmp_path, others):
    tracks = make_tracks(tmp_path / "t.txt", (1, 1, 10, 10, 20, 40, *others))
    with pytest.raises(ValueError, match="t.txt: no confidences, column 7 holds only -1, 0 and 1"):
        data.crop(make_frames(tmp_path / "f", [1]), tracks, tmp_path / "no", confidence=0.5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "t.txt: no boxes"),
        ("1,2,3\n", "line 1: expected frame,id,left,top"),
        ("1,2,3,4,5,6,1\n\nframe,2,3,4,5,6,1\n", "line 3: .*'frame'"),
        ("1,2.5,3,4,5,6,1\n", "line 1: .*'2.5'"),
        ("1,99999999999999999999,3,4,5,6,1\n", "line 1: "),
        ("1,1,3,4,nan,6,1\n", "line 1: "),
        ("1,1,3,4,inf,6,1\n", "line 1: "),
        ("1,1,3,4,1e30,6,1\n", "line 1: "),
        ("1,1,3,4,,5,6,1\n", "line 1: "),
        ("1,1,3,4,5,6,nan\n", "line 1: "),
        ("1,1,3,4,5,6,1\n-1,1,3,4,5,6,1\n", "line 2: "),
        ("1,1,3,4,5,6,1\n1,\xff,3,4,5,6,1\n", "t.txt, line 2: "),
    ],
)
def test_broken_tracks_are_refused(tmp_path, text, message):
    (tmp_path / "t.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        data.read_tracks(tmp_path / "t.txt")


def test_numbers_are_read_as_they_are(tmp_path):
    # with the mark with which Windows begins a text
    (tmp_path / "t.txt").write_text("\ufeff3 9007199254740993 10 10.5 20 40 0.5\r\n\r\n")
    rows = data.read_tracks(tmp_path / "t.txt")
    assert rows == [(3, 2**53 + 1, [10, 10, 30, 50], 0.5)]


def test_frames_are_ordered_by_all_that_their_names_say(tmp_path):
    tracks = make_tracks(tmp_path / "t.txt", box(2), box(10))
    frames = make_frames(tmp_path / "f", [2, 10], "cam3 shot {}.png")
    data.crop(frames, tracks, tmp_path / "out")
    files = [tmp_path / "out" / "f" / f"000001_{n:07d}_00.jpg" for n in (2, 10)]
    assert [seen(file)[0] for file in files] == [2, 10]
    for other in "760577.950899.png", "2024-05-01_12-00-40.png", "cover.png":
        (frames / other).write_bytes((frames / "cam3 shot 2.png").read_bytes())
        with pytest.raises(ValueError, match="f: expected frames of one kind, such as 000001.jpg"):
            data.crop(frames, tracks, tmp_path / "again")
        (frames / other).unlink()
    seconds = make_frames(tmp_path / "seconds", [2, 10], "1717243240.{}.png")
    with pytest.raises(ValueError, match="got names that begin with .'1717243240.'"):
        data.crop(seconds, tracks, tmp_path / "again")
    for number in 2, 10:
        shutil.copy(frames / f"cam3 shot {number}.png", frames / f"cam3.{number}.png")
        (frames / f"cam3 shot {number}.png").unlink()
    data.crop(frames, tracks, tmp_path / "dots")
    (frames / "cam3.02.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cam3.0?2.png: has the same number as cam3.0?2.png"):
        data.crop(frames, tracks, tmp_path / "again")


def test_frames_that_cannot_be_read_stop_it_and_no_folder_appears(tmp_path):
    frames = make_frames(tmp_path / "f", [1, 2])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="f: does not hold 1 frames .*, the first: 7"):
        data.crop(frames, make_tracks(tmp_path / "t.txt", box(1), box(7)), out)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(frames / "000002.png")
    with pytest.raises(ValueError, match="f/000002.png: cannot be read: .*8 bits"):
        data.crop(frames, make_tracks(tmp_path / "t.txt", box(1), box(2)), out)
    assert os.listdir(out) == []
    data.crop(frames, make_tracks(tmp_path / "t.txt", box(1)), out)
    assert os.listdir(out) == ["f"]


def test_a_split_of_motchallenge_at_once(tmp_path, in_process, capsys):
    split = tmp_path / "train"
    out = tmp_path / "out"
    for name in "MOT17-02-DPM", "MOT17-02-SDP", "MOT17-03-SDP", "MOT17-04-SDP", "dance.1":
        make_frames(split / name / "img1", [1, 2])
        make_tracks(split / name / "gt" / "gt.txt", box(1))
    # of one copy's boxes none is a person, of another video there are none
    make_tracks(split / "MOT17-02-DPM" / "gt" / "gt.txt", box(1, 1, 10, 10, 20, 40, 0))
    make_tracks(split / "MOT17-03-SDP" / "gt" / "gt.txt")
    for _ in range(2):
        in_process("data.py crop", "--split", split, "--out", out)
        files = sorted(str(file.relative_to(out)) for file in out.rglob("*.jpg"))
        cropped = ["MOT17-02-SDP", "MOT17-04-SDP", "dance.1"]
        assert files == [f"{name}/000001_0000001_00.jpg" for name in cropped]
    # a tracker's results, for one of the copies
    results = make_tracks(tmp_path / "results" / "MOT17-02-SDP.txt", box(2, 5)).parent
    flags = ["--split", split, "--tracks", results, "--out", tmp_path / "other"]
    in_process("data.py crop", *flags)
    assert names(tmp_path / "other") == ["MOT17-02-SDP"]
    said = capsys.readouterr().out
    assert "dance.1.txt: no such file" in said
    assert "MOT17-02-DPM/gt/gt.txt: no boxes are left; dropped: 1 not to be considered" in said
    assert "MOT17-03-SDP/gt/gt.txt: no boxes\n" in said
    with pytest.raises(ValueError, match="no sequences with tracks"):
        in_process("data.py crop", "--split", results, "--out", out)


def make_video(file, numbers):
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000
        for number in numbers:
            frame = draw_frame(number).permute(1, 2, 0).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file


@pytest.mark.parametrize("numbers, shown", [([0, 3, 9], [1, 4, 10]), ([4, 7, 10], [4, 7, 10])])
def test_a_video_file_is_cropped_at_the_frames_that_the_tracks_name(tmp_path, numbers, shown):
    video = make_video(tmp_path / "walk.mp4", range(1, 11))
    tracks = make_tracks(tmp_path / "t.txt", *[box(n, 1, 30, 20, 40, 60) for n in numbers])
    data.crop(video, tracks, tmp_path / "out")
    for number, frame in zip(numbers, shown):
        found = seen(tmp_path / "out" / "walk" / f"000001_{number:07d}_00.jpg")
        assert found[0] == frame and found == pytest.approx((frame, 30, 20, 40, 60), abs=8)
    tracks = make_tracks(tmp_path / "t.txt", box(1), box(20))
    with pytest.raises(ValueError, match="walk.mp4: does not hold 1 frames .*, the first: 20"):
        data.crop(video, tracks, tmp_path / "no")


def test_a_video_that_is_to_be_turned_is_turned(tmp_path):
    """Phones film sideways and say so in a matrix; what a tracker reads with turns the frames."""
    video = make_video(tmp_path / "phone.mp4", [5, 5])
    content = bytearray(video.read_bytes())
    matrix = content.find(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, HEIGHT << 16, 0, 1 << 30)
    content[matrix : matrix + 36] = quarter
    video.write_bytes(content)
    _, frame = next(data.read_frames(video, [1], 1))
    assert frame.shape == (3, WIDTH, HEIGHT)
    # green grows downwards, blue to the left
    assert frame[1, 120, 60] > frame[1, 20, 60] + 80
    assert frame[2, 80, 20] > frame[2, 80, 100] + 60


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    with pytest.raises(OSError, match="set: is not made: .*not empty"):
        with data.whole_folder(tmp_path / "set") as first:
            # meanwhile another one makes it
            with data.whole_folder(tmp_path / "set") as second:
                assert first != second and first.exists()
                (second / "file").write_bytes(b"")
    assert os.listdir(tmp_path) == ["set"] and os.listdir(tmp_path / "set") == ["file"]
    # a hidden video is not cropped into a hidden folder
    make_frames(tmp_path / ".cam", [1])
    data.crop(tmp_path / ".cam", make_tracks(tmp_path / "t.txt", box(1)), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["cam"]


def test_videos_that_are_none_are_named(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "walk.mp4").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="walk.mp4: cannot be decoded: "):
        next(data.read_frames(tmp_path / "walk.mp4", [1], 1))
    tracks = make_tracks(tmp_path / "tracks.txt", *[box(n) for n in range(100)])
    with pytest.raises(ValueError, match="tracks.txt: holds no video"):
        next(data.read_frames(tracks, [1], 1))


def test_av_is_asked_for_where_it_is_missing_or_too_old(tmp_path, monkeypatch):
    (tmp_path / "walk.mp4").write_bytes(b"")
    old = type(sys)("av")
    old.VideoFrame = object
    for module in None, old:
        monkeypatch.setitem(sys.modules, "av", module)
        with pytest.raises(ValueError, match="walk.mp4: .*pip install -U av"):
            next(data.read_frames(tmp_path / "walk.mp4", [1], 1))


# ---------------------------------------------------------------- tracklets out of benchmarks
LAYOUTS = {
    # of each image: the tracklet it is of, and the video
    "market": """
        bounding_box_train/0002_c1s1_000451_03 a part_000/camera_1
        bounding_box_train/0002_c1s1_000651_01 a part_000/camera_1
        bounding_box_train/0002_c1s1_000852_01 b part_000/camera_1
        bounding_box_train/0002_c1s1_004990_01 c part_000/camera_1
        bounding_box_train/0002_c1s1_005100_01 c part_000/camera_1
        bounding_box_train/0002_c1s2_005100_01 d part_001/camera_1
        bounding_box_train/0002_c3s1_005100_01 e part_001/camera_3
        bounding_box_train/0007_c1s1_000451_01 f part_000/camera_1
        bounding_box_train/0007_c1s1_000451_02 f part_000/camera_1
        bounding_box_train/0010_c2s1_000451_01 g part_001/camera_2""",
    "msmt17": """
        mask_train_v2/0000/0000_000_01_0303morning_0015_0 a date_0303/part_1/camera_01
        mask_train_v2/0000/0000_001_01_0303morning_0015_1_ex a date_0303/part_1/camera_01
        mask_train_v2/0000/0000_002_01_0303morning_0016_0 b date_0303/part_1/camera_01
        mask_train_v2/0000/0000_003_14_0303afternoon_0015_0 c date_0303/part_3/camera_14
        mask_train_v2/0001/0001_000_01_0303noon_0015_0 d date_0303/part_2/camera_01
        mask_train_v2/0001/0001_001_01_0113noon_0015_0 e date_0113/part_2/camera_01""",
    "mars": """
        bbox_train/0001/0001C1T0001F001 a camera_1
        bbox_train/0001/0001C1T0001F002 a camera_1
        bbox_train/0001/0001C1T0002F001 b camera_1
        bbox_train/0001/0001C6T0001F001 c camera_6
        bbox_train/0003/0003C1T0001F001 d camera_1""",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_of_benchmarks_tell_tracklets_and_videos(tmp_path, name):
    names, tracklets, videos = zip(*map(str.split, LAYOUTS[name].strip().splitlines()))
    make_tree(tmp_path, [f"{name}.jpg" for name in names])
    files, person, camera, video, track, frame = getattr(data, name)(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == [f"{name}.jpg" for name in names]
    assert video.tolist() == list(videos)
    same = np.array(tracklets)[:, None] == tracklets
    assert ((track[:, None] == track) == same).all()
    assert person.tolist() == [int(file.name[:4]) for file in files]
    assert camera.tolist() == [int(folder.split("camera_")[1]) for folder in videos]
    if name == "market":
        # the cameras stop together, after two sequences of the first, one of the others
        assert frame.tolist() == [0, 200, 401, 4539, 4649, 9749, 9749, 0, 0, 9749]
    else:
        assert len(set(frame)) == len(files)  # nobody is taken to be seen together
        assert frame.tolist() == data.frames_in_no_order(track).tolist()
    folder = names[0].split("/")[0]
    make_tree(tmp_path, [f"{folder}/._0001.jpg"])  # of macOS
    assert len(getattr(data, name)(tmp_path)[0]) == len(files)
    for wrong in "portrait.jpg", names[0].split("/")[-1].replace("0", 19 * "9", 1) + ".jpg":
        make_tree(tmp_path, [f"{folder}/{wrong}"])
        with pytest.raises(ValueError, match=f"{wrong}: expected a name "):
            getattr(data, name)(tmp_path)
        (tmp_path / folder / wrong).unlink()
    shutil.rmtree(tmp_path / folder)
    with pytest.raises(FileNotFoundError, match="train"):
        getattr(data, name)(tmp_path)


def test_where_times_are_not_known_tracklets_come_in_no_order():
    track = np.repeat(np.arange(100), 3)
    place = data.frames_in_no_order(track).reshape(100, 3)
    # the images of a tracklet stay together and in their order
    assert (np.diff(place) == 1).all() and sorted(place[:, 0]) == list(range(0, 300, 3))
    assert abs(np.corrcoef(place[:, 0], np.arange(100))[0, 1]) < 0.2


def test_all_pairs_of_training_tracklets_can_be_joined(tmp_path):
    people = np.arange(40)

    def layout(root):
        files = np.array([f"{person}.jpg" for person in people])
        return files, people, 0 * people, np.full(40, "video"), people, people

    data.cut_benchmark(tmp_path, layout, tmp_path / "out", held=20, swap=1)
    train, test = map(data.read_tracklets, data.find_splits(tmp_path / "out"))
    assert np.bincount(train.track).tolist() == [2] * 10
    assert np.bincount(test.track).tolist() == [1] * 20


def test_a_benchmark_as_a_tracker_would_have_given_it(tmp_path, in_process, monkeypatch):
    names = [line.split()[0] for line in LAYOUTS["market"].strip().splitlines()]
    root = make_tree(tmp_path / "market", [f"{name}.jpg" for name in names])
    monkeypatch.chdir(tmp_path)
    people = [{0, 1, 2, 3, 4, 5, 6}, {7, 8}, {9}]
    drawn = set()
    for seed in range(8):
        out = tmp_path / str(seed)
        flags = ["--out", out, "--held", 1, "--seed", seed, "--swap", seed % 2]
        flags += ["--market", "market"]  # from where the program runs
        in_process("data.py tracklets", *flags)
        shown = {}
        for split in data.find_splits(out):
            t = data.read_tracklets(split)
            labels = data.read_labels(f"{split}.json", t)
            shown[split.name] = [level(image) for image, _ in data.Images(t, (16, 8))]
            for label in set(labels):
                own = {shown[split.name][i] for i in np.flatnonzero(labels == label)}
                assert own in people
        # all that a person is seen in is on one side
        assert sorted(shown["train"] + shown["test"]) == list(range(10))
        assert set(shown["test"]) in people
        drawn.add(tuple(shown["test"]))
        assert all(folder.startswith("camera_0") for folder in os.listdir(out / "test"))
        # of the first video of persons 2 and 7 the pairs in time are a, f and b, c
        if set(shown["test"]) == {9}:
            t = data.read_tracklets(out / "train")
            first = [shown["train"][i] for i in range(len(t)) if t.track[i] == 0]
            assert set(first) == ({0, 1, 7, 8} if seed % 2 else {0, 1})
    assert len(drawn) == 3
    with pytest.raises(ValueError, match="has 3 people, of whom 3 cannot be held out"):
        in_process("data.py tracklets", "--market", root, "--out", tmp_path / "no", "--held", 3)
    with pytest.raises(SystemExit):
        in_process("data.py tracklets", "--out", tmp_path / "no")


# ---------------------------------------------------------------- walkers
SMALL = dict(people=10, videos=6, held_out=6, test_videos=3)


def contents(root):
    return {file.relative_to(root): file.read_bytes() for file in root.rglob("*.*")}


def test_walkers_depend_on_the_seed_alone(walkers, tmp_path):
    data.draw_walkers(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(walkers)
    data.draw_walkers(tmp_path / "other", seed=1, **SMALL)
    for split in "train", "test":
        assert contents(tmp_path / "other" / split) != contents(walkers / split)
    assert sorted(os.listdir(tmp_path)) == ["again", "other"]
    with pytest.raises(FileExistsError, match="exists already"):
        data.draw_walkers(walkers)


def test_people_held_out_are_others_and_their_tracks_have_no_switches(tmp_path, monkeypatch):
    splits = []
    monkeypatch.setattr(data, "draw_split", lambda folder, *rest: splits.append(rest))
    data.draw_walkers(tmp_path / "set", seed=7, noise=0.5)
    assert splits[0] == ([7, 0], 100, 48, (14, 24), 0.5, True)
    assert splits[1] == ([7, 1], 60, 24, (6, 10), 1, False)


def test_walkers_look_like_whom_the_truth_names(walkers):
    t = data.read_tracklets(walkers / "test")
    ids = data.read_labels(walkers / "test.json", t)
    assert set(ids) == {-1, *range(6)}
    pixels = torch.stack([image / 255 for image, _ in data.Images(t, (16, 8))]).flatten(1)
    distance = torch.cdist(pixels, pixels).numpy()
    elsewhere = t.video[:, None] != t.video
    same = ids[:, None] == ids
    assert distance[elsewhere & same].mean() < 0.9 * distance[elsewhere & ~same].mean()


@pytest.mark.parametrize("person, alike", [(-1, True), (0, False)])
def test_only_a_box_of_a_person_shows_how_people_look(person, alike):
    cameras = data.draw_cameras(np.random.default_rng(0), 2)
    boxes = data.track_people(np.random.default_rng(0), 3, 2, (6, 10), 1, False)[:4]
    boxes.person = person
    images = []
    for seed in 0, 1:
        looks = data.draw_looks(np.random.default_rng(seed), 3)
        looks["tall"][:] = 1
        images.append(data.draw_boxes(np.random.default_rng(0), looks, cameras, boxes))
    assert (images[0] == images[1]).all() == alike


def test_walkers_have_the_faults_of_a_tracker():
    random = np.random.default_rng(0)
    boxes = data.track_people(random, 200, 80, (14, 24), noise=1, switches=True)
    key = boxes.video * 1000 + boxes.track
    people = [set(boxes.person[key == k]) - {-1} for k in np.unique(key)]
    assert 0.15 < np.mean([len(p) > 1 for p in people]) < 0.25  # identity switches
    assert 0.01 < np.mean([len(p) == 0 for p in people]) < 0.15  # tracklets of nobody
    assert 0.01 < (boxes.person < 0).mean() < 0.1
    fragments = []
    for person in range(200):
        mine = boxes.person == person
        videos = np.unique(boxes.video[mine])
        assert 2 <= len(videos) <= 4
        fragments += [len(np.unique(key[mine & (boxes.video == v)])) for v in videos]
    assert np.mean(np.array(fragments) > 1) > 0.4
    # nobody is in two places at a time
    known = boxes[boxes.person >= 0]
    assert len(np.unique(known[["video", "person", "frame"]])) == len(known)


def test_a_perfect_tracker_is_one_without_noise():
    random = np.random.default_rng(0)
    boxes = data.track_people(random, 50, 20, (14, 24), noise=0, switches=True)
    key = boxes.video * 1000 + boxes.track
    for k in np.unique(key):
        assert len(set(boxes.person[key == k])) == 1 and boxes.person[key == k][0] >= 0
