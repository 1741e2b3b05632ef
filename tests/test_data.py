"""data.py: the index, labels, pixels, the sampler, and the drawn set."""
import json
import re
import struct

import numpy as np
import pytest
import torch
from torchvision.io import ImageReadMode, decode_image, encode_jpeg, encode_png

import data


def make_tree(root, files):
    jpeg = encode_jpeg(torch.full((3, 16, 8), 100, dtype=torch.uint8)).numpy().tobytes()
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
    return root


FILES = ["b/000002_0000010_00.jpg", "a/000001_0000005_00.jpg", "a/000001_0000001_01.jpg", "a/000002_0000001_00.jpg", "x/y/000001_0000003_00.jpeg"]


def test_index_is_sorted_and_tracks_are_unique_over_videos(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path, FILES))
    assert [t.path(i) for i in range(len(t))] == [FILES[2], FILES[1], FILES[3], FILES[0], FILES[4]]
    assert [p.decode() for p in t.paths()] == [t.path(i) for i in range(len(t))]
    assert t.video.tolist() == [0, 0, 0, 1, 2] and t.track.tolist() == [0, 0, 1, 2, 3] and t.frame.tolist() == [1, 5, 1, 10, 3]
    assert t.video.dtype == t.track.dtype == t.frame.dtype == np.int64


def test_numbers_order_tracks_and_frames_even_where_names_are_not_padded(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path, ["v/10_2_0.jpg", "v/9_100_0.jpg", "v/9_20_0.jpg"]))
    assert [t.path(i) for i in range(3)] == ["v/9_20_0.jpg", "v/9_100_0.jpg", "v/10_2_0.jpg"]


def test_images_in_the_root_itself_are_one_video(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path, ["000001_0000001_00.jpg"]))
    assert t.path(0) == "000001_0000001_00.jpg" and t.paths()[0] == b"000001_0000001_00.jpg"


def test_wrong_names_are_counted_and_shown(tmp_path):
    make_tree(tmp_path, FILES + ["a/portrait.jpg", "b/1_2.jpg"])
    with pytest.raises(ValueError, match=r"2 JPEG names.*portrait\.jpg"):
        data.read_tracklets(tmp_path)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        data.read_tracklets(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no images here")
    with pytest.raises(ValueError, match="no JPEG files"):
        data.read_tracklets(tmp_path)


def same(a, b):
    return a.folders == b.folders and all((getattr(a, key) == getattr(b, key)).all() for key in ("name", "video", "track", "frame"))


def test_a_kept_index_is_read_until_a_folder_changes(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "set", FILES)
    scanned = data.read_tracklets(root, keep=5)
    assert (tmp_path / "set.index.npz").is_file() and not list(tmp_path.glob(".*"))
    walk = data.os.walk
    monkeypatch.setattr(data.os, "walk", lambda *args, **kwargs: pytest.fail("scanned again"))
    assert same(data.read_tracklets(f"{root}/"), scanned)
    monkeypatch.setattr(data.os, "walk", walk)
    for change in (lambda: make_tree(root, ["x/z/000001_0000003_00.jpg"]), lambda: (root / FILES[0]).unlink()):
        before = len(data.read_tracklets(root, keep=5))
        change()
        assert len(data.read_tracklets(root, keep=5)) != before
        assert same(data.read_tracklets(root, keep=5), data.read_tracklets(root, keep=10**9))


def test_a_file_that_comes_during_the_scan_is_found_the_next_time(tmp_path, monkeypatch):
    root, walk = make_tree(tmp_path / "set", FILES), data.os.walk

    def slow(*args, **kwargs):
        for entry in walk(*args, **kwargs):
            yield entry
            if entry[0].endswith("a"):  # listed already
                make_tree(root, ["a/000009_0000001_00.jpg"])

    monkeypatch.setattr(data.os, "walk", slow)
    assert len(data.read_tracklets(root, keep=1)) == 5
    monkeypatch.setattr(data.os, "walk", walk)
    assert len(data.read_tracklets(root, keep=1)) == 6


def test_names_that_are_no_text_are_read_too(tmp_path):
    make_tree(tmp_path / "set", FILES)
    data.os.rename(data.os.fsencode(tmp_path / "set" / "b"), data.os.fsencode(tmp_path / "set") + b"/\xff")
    t = data.read_tracklets(tmp_path / "set", keep=1)
    assert all(data.Images(t, (16, 8))[i][1] for i in range(5))
    assert same(data.read_tracklets(tmp_path / "set"), t)
    data.write_labels(tmp_path / "labels.json", t, np.arange(5))
    np.testing.assert_array_equal(data.read_labels(tmp_path / "labels.json", t), np.arange(5))


def test_a_small_index_is_not_kept_and_a_wrong_one_not_believed(tmp_path):
    root, kept = make_tree(tmp_path / "set", FILES), tmp_path / "set.index.npz"
    scanned = data.read_tracklets(root)
    assert not kept.exists()
    data.read_tracklets(root, keep=1)
    whole = kept.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"no index"):
        kept.write_bytes(damaged)
        assert same(data.read_tracklets(root), scanned)
    for key, value in (("folders", ["a", "b", "../.."]), ("folders", ["a", "b", "/etc"]), ("name", np.array([b"../1_1_1.jpg"] * 5))):
        kept.write_bytes(whole)
        np.savez(kept, **{**np.load(kept), key: value})  # paths that leave the root
        assert same(data.read_tracklets(root), scanned)


def test_labels_make_the_round_trip_in_the_published_format(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path / "set", FILES))
    labels = np.array([1, -1, 0, 1, 2])
    data.write_labels(tmp_path / "labels.json", t, labels)
    entries = json.loads((tmp_path / "labels.json").read_text())
    assert [e["id"] for e in entries] == [1, 2, 2, 3] and entries[0]["file_path"] == FILES[3 - 0]
    np.testing.assert_array_equal(data.read_labels(tmp_path / "labels.json", t), labels)


def test_ids_are_written_contiguous_from_one(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path / "set", FILES))
    data.write_labels(tmp_path / "labels.json", t, np.array([70, -1, 5, 70, 9]))
    assert [e["id"] for e in json.loads((tmp_path / "labels.json").read_text())] == [1, 2, 3, 3]


@pytest.mark.parametrize("entries, message", [
    ([{"file_path": "../secret.jpg", "id": 1}], "leave the folder"),
    ([{"file_path": "/etc/1_1_1.jpg", "id": 1}], "leave the folder"),
    ([{"file_path": "a/000009_0000001_00.jpg", "id": 1}], "not among the images"),
    ([{"file_path": FILES[0], "id": 0}], "whole numbers from 1"),
    ([{"file_path": FILES[0], "id": "1"}], "whole numbers from 1"),
    ([{"file_path": FILES[0], "id": 1}, {"file_path": FILES[0], "id": 2}], "1 files are named more than once, the first: b/000002"),
    ([{"path": FILES[0], "id": 1}], "expected a JSON list"),
    ({"file_path": FILES[0]}, "expected a JSON list"),
    ({"file_path": FILES[0], "id": 1}, "expected a JSON list"),
    ([[{"file_path": FILES[0], "id": 1}]], "expected a JSON list"),
    ([{"file_path": FILES[0], "id": 1}, 3], "expected a JSON list"),
    ([{"file_path": 7, "id": 1}], "expected a JSON list"),
    (7, "expected a JSON list"),
    ([], "at least one entry"),
])
def test_broken_annotations_are_refused(tmp_path, entries, message):
    t = data.read_tracklets(make_tree(tmp_path / "set", FILES))
    (tmp_path / "labels.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        data.read_labels(tmp_path / "labels.json", t)


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    (tmp_path / "kept").write_text("old")
    with pytest.raises(KeyboardInterrupt), data.replacing(tmp_path / "kept") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "kept").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_broken_jpeg_is_black_counted_and_replaced_by_its_own_identity(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path, FILES))
    (tmp_path / t.path(1)).write_bytes(b"not a jpeg")
    (tmp_path / t.path(4)).unlink()
    images, readable = next(iter(data.load_batches(t, [[0, 1, 2, 3, 4, 0]], (32, 16))))
    assert images.shape == (6, 3, 32, 16) and images.dtype == torch.uint8
    assert readable.tolist() == [True, False, True, True, False, True] and images[1].max() == 0
    images[0], images[5] = 50, 60
    fixed = data.replace_unreadable(images, readable, K=2)
    assert (fixed[1] == 50).all() and (fixed[4] == 60).all()
    with pytest.raises(ValueError, match="2 of 5 images cannot be read"):
        data.check_readable(t)


def pass_length(labels, K, batch):
    """Batches until every group of K images, of which short identities have one, has come once."""
    return sum(max(1, n // K) for n in np.unique(labels[labels >= 0], return_counts=True)[1]) * K // batch


def test_sampler_by_definition():
    random = np.random.default_rng(0)
    labels = random.integers(-1, 30, 500)
    labels[:3] = 30  # an identity of three images: repeats them
    count = np.bincount(labels[labels >= 0])
    for K in (1, 2, 4):
        full = pass_length(labels, K, 16)
        batches = data.sample_identities(labels, K, 16, seed=1, epoch=0, steps=2 * full + 3)
        assert batches.shape == (2 * full + 3, 16) and (labels[batches] >= 0).all()  # as many as asked for, none of label -1
        groups = labels[batches].reshape(-1, K)
        assert (groups == groups[:, :1]).all()
        for row in batches.reshape(-1, K)[count[groups[:, 0]] >= K]:
            assert len(set(row)) == K  # repeats only where there are too few
        for once in (batches[:full], batches[full : 2 * full]):  # every group comes once before any comes again
            images = once.reshape(-1, K)[count[labels[once].reshape(-1, K)[:, 0]] >= K]
            assert len(np.unique(images)) == images.size
            assert (np.bincount(labels[once].reshape(-1, K)[:, 0], minlength=31) <= np.maximum(count // K, 1)).all()
        assert (batches[:full] != batches[full : 2 * full]).any()


def test_a_pass_that_fills_its_batches_holds_every_group():
    labels = np.repeat(np.arange(8), 4)
    for once in np.split(data.sample_identities(labels, 2, 8, 0, 0, steps=12), 3):
        assert sorted(once.ravel()) == list(range(32))


def test_sampler_is_pure_and_epochs_differ():
    labels = np.repeat(np.arange(20), 10)
    draw = lambda *key, steps=30: data.sample_identities(labels, 4, 16, *key, steps)
    np.testing.assert_array_equal(draw(3, 1), draw(3, 1))
    assert (draw(3, 1) != draw(3, 2)).any() and (draw(3, 1) != draw(4, 1)).any()
    for steps in (0, 1, 10, 11, 29):  # fewer steps are the first of more
        np.testing.assert_array_equal(draw(3, 1, steps=steps), draw(3, 1)[:steps])


def test_every_image_is_used_evenly_over_epochs():
    labels = np.repeat([0, 1, 2, 3], [6, 10, 8, 12])
    steps = pass_length(labels, 4, 4)
    counts = sum(np.bincount(data.sample_identities(labels, 4, 4, 0, epoch, steps).ravel(), minlength=36) for epoch in range(300))
    for identity in range(4):
        own = counts[labels == identity]
        assert own.max() < 1.25 * own.min(), own


def test_sampler_says_what_does_not_fit():
    few = np.array([0, 0, 1, 1, -1])
    for refused in (lambda labels, K: data.sample_identities(labels, K, 16, 0, 0, 1), lambda labels, K: data.check_batches(labels, [1, K], 16)):
        with pytest.raises(ValueError, match="K must divide"):
            refused(np.arange(16), 3)
    for refused in (lambda: data.sample_identities(few, 4, 16, 0, 0, 1), lambda: data.check_batches(few, [4], 16)):
        with pytest.raises(ValueError, match="2 identities give 2 groups of K=4, fewer than the 4 of one batch"):
            refused()
    data.check_batches(np.arange(16), [1, 2], 16)


def test_walkers_are_the_same_every_time_and_their_truth_is_kept_aside(walkers, tmp_path):
    data.draw_walkers(tmp_path / "again", people=10, videos=6, held_out=6, test_videos=3)
    first, second = data.read_tracklets(walkers / "train"), data.read_tracklets(tmp_path / "again" / "train")
    assert [first.path(i) for i in range(len(first))] == [second.path(i) for i in range(len(second))]
    for i in range(0, len(first), 7):
        assert (walkers / "train" / first.path(i)).read_bytes() == (tmp_path / "again" / "train" / second.path(i)).read_bytes()
    assert (walkers / "train.json").read_bytes() == (tmp_path / "again" / "train.json").read_bytes()
    data.draw_walkers(tmp_path / "other", seed=1, people=10, videos=6, held_out=6, test_videos=3)
    assert (tmp_path / "other" / "train.json").read_bytes() != (walkers / "train.json").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        data.draw_walkers(walkers)


def test_walkers_have_the_faults_of_a_tracker(tmp_path):
    boxes = data.track_people(np.random.default_rng(0), 200, 80, (14, 24), switches=True)
    key = boxes["video"] * 1000 + boxes["track"]
    people = [set(boxes["person"][key == k]) - {-1} for k in np.unique(key)]
    mixed = np.mean([len(p) > 1 for p in people])
    assert 0.15 < mixed < 0.25  # identity switches
    assert 0.01 < np.mean([not p for p in people]) < 0.15  # tracklets of no person
    assert 0.01 < (boxes["person"] < 0).mean() < 0.1
    for person in range(200):
        mine = boxes["person"] == person
        assert 2 <= len(np.unique(boxes["video"][mine])) <= 4
    fragments = [len(np.unique(key[(boxes["person"] == p) & (boxes["video"] == v)])) for p in range(50) for v in np.unique(boxes["video"][boxes["person"] == p])]
    assert np.mean(np.array(fragments) > 1) > 0.4
    for v in range(80):  # a person is in one place at a time
        mine = (boxes["video"] == v) & (boxes["person"] >= 0)
        seen = np.stack([boxes["person"][mine], boxes["frame"][mine]])
        assert len(np.unique(seen, axis=1).T) == mine.sum()


def test_walkers_noise_is_how_often_the_tracker_fails(tmp_path):
    shares = {}
    for noise in (0, 1):
        root = tmp_path / str(noise)
        data.draw_walkers(root, people=8, videos=4, held_out=2, noise=noise)
        t = data.read_tracklets(root / "train")
        ids = data.read_labels(root / "train.json", t)
        shares[noise] = np.mean([len(np.unique(ids[t.track == n])) > 1 or ids[t.track == n][0] < 0 for n in range(t.track[-1] + 1)])
    assert shares[0] == 0 < shares[1]


def test_an_annotation_alone_is_an_index_of_files_of_any_names(tmp_path):
    """CION-AL's layout: sec0/ to sec129/ and cional_annos.json beside them."""
    files = ["sec0/Japan/Tokyo/abc/000001_0000010_03.jpg", "sec0/Japan/Tokyo/abc/000002_0000010_01.jpg", "sec12/anything at all.jpg", "sec129/Österreich/7.jpg"]
    make_tree(tmp_path, files + ["sec0/not named.jpg"])
    entries = [{"file_path": files[i], "id": n} for i, n in ((0, 1), (2, 1), (3, 2), (1, 3))]
    (tmp_path / "cional_annos.json").write_text(json.dumps(entries))
    t, labels = data.read_identities(tmp_path / "cional_annos.json", tmp_path)
    assert sorted(t.path(i) for i in range(len(t))) == sorted(files)
    assert {t.path(i): int(label) + 1 for i, label in enumerate(labels)} == {e["file_path"]: e["id"] for e in entries}
    assert all(data.Images(t, (16, 8))[i][1] for i in range(len(t)))
    data.write_labels(tmp_path / "again.json", t, labels)
    assert data.read_labels(tmp_path / "again.json", t).tolist() == labels.tolist()
    with pytest.raises(ValueError, match="no such folder"):
        data.read_identities(tmp_path / "cional_annos.json", tmp_path / "elsewhere")


# ---------------------------------------------------------------- from videos to tracklets

SIDE = (120, 160)  # height and width of the frames


def frame_of(number: int) -> np.ndarray:
    """A frame whose red tells its number, green grows from left to right and blue from top to bottom, one level a pixel."""
    frame = np.empty((*SIDE, 3), np.uint8)
    frame[..., 0], frame[..., 1], frame[..., 2] = 20 * number % 256, np.arange(SIDE[1]), np.arange(SIDE[0])[:, None]
    return frame


def make_frames(folder, numbers, suffix=".png"):
    folder.mkdir(parents=True)
    for number in numbers:
        image, encode = torch.from_numpy(frame_of(number)).permute(2, 0, 1), encode_png if suffix == ".png" else encode_jpeg
        (folder / f"{number:06d}{suffix}").write_bytes(encode(image.contiguous()).numpy().tobytes())
    return folder


def make_tracks(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return file


def seen(file) -> tuple[int, tuple, tuple]:
    """Of a crop: the number of its frame, left and top, width and height, as the pixels tell."""
    image = decode_image(torch.from_numpy(np.fromfile(file, np.uint8)), ImageReadMode.RGB).float()
    return round(float(image[0].mean()) / 20), (image[1, :, 0].mean().item(), image[2, 0].mean().item()), tuple(image.shape[:0:-1])


def test_crops_show_what_the_boxes_held(tmp_path):
    tracks = make_tracks(tmp_path / "street.txt", [
        (1, 7, 30, 20, 40, 60, 0.9, -1, -1, -1), (1, 3, 100.4, 50.6, 20, 30, 0.9, -1, -1, -1), (2, 7, 35, 20, 40, 60, 0.9, -1, -1, -1),
        (4, 3, 140, 100, 40, 60, 0.9, -1, -1, -1),  # hangs over the lower right corner
        (4, 7, -10, -5, 30, 25, 0.9, -1, -1, -1), (4, 9, 300, 20, 40, 60, 0.9, -1, -1, -1),  # over the upper left; outside
    ])
    count = data.crop(make_frames(tmp_path / "street", [1, 2, 3, 4]), tracks, tmp_path / "out")
    want = {"000007_0000001_00": (1, (30, 20), (40, 60)), "000003_0000001_01": (1, (100, 51), (20, 30)), "000007_0000002_00": (2, (35, 20), (40, 60)),
            "000003_0000004_00": (4, (140, 100), (20, 20)), "000007_0000004_01": (4, (0, 0), (20, 20))}
    folder = tmp_path / "out" / "street"
    assert {file.stem for file in folder.iterdir()} == set(want)
    for name, (number, corner, size) in want.items():
        found = seen(folder / f"{name}.jpg")
        assert (found[0], found[2]) == (number, size) and np.allclose(found[1], corner, atol=3), name
    assert count["crops"] == 5 and count["too small"] == 1 and count["tracks"] == 2 and count["frames"] == 3
    t = data.read_tracklets(tmp_path / "out")
    assert t.track.tolist() == [0, 0, 1, 1, 1] and t.frame.tolist() == [1, 4, 1, 2, 4] and t.folders == ["street"]


def test_flags_of_cropping(tmp_path):
    frames = make_frames(tmp_path / "f", range(1, 9), ".jpg")
    rows = [(n, 1, 10, 10, 20, 40, 0.1 * n, -1, -1, -1) for n in range(1, 9)] + [(1, 2, 60, 10, 19, 40, 1, -1, -1, -1), (1, -1, 9, 9, 20, 40, 1, -1, -1, -1)]
    tracks = make_tracks(tmp_path / "t.txt", rows)
    names = lambda out: sorted(file.stem for file in (tmp_path / out / "f").iterdir())
    data.crop(frames, tracks, tmp_path / "every", every=3)
    assert names("every") == ["000001_0000001_00", "000001_0000004_00", "000001_0000007_00", "000002_0000001_01"]
    count = data.crop(frames, tracks, tmp_path / "sure", confidence=0.75)
    assert names("sure") == ["000001_0000008_00", "000002_0000001_01"] and count["below confidence 0.75"] == 7 and count["of no track"] == 1
    count = data.crop(frames, tracks, tmp_path / "large", min_size=(40, 20))
    assert len(names("large")) == 8 and count["too small"] == 1
    over = make_tracks(tmp_path / "over.txt", [(1, 1, 150, 10, 20, 40, 1, -1, -1, -1), (1, 2, 140, 10, 20, 40, 1, -1, -1, -1)])
    assert data.crop(frames, over, tmp_path / "clipped", min_size=(40, 20))["crops"] == 1  # sizes count inside the frame
    small = data.crop(frames, tracks, tmp_path / "small", quality=5)
    size = lambda out: sum(file.stat().st_size for file in (tmp_path / out / "f").iterdir())
    assert small["crops"] == 9 and size("small") < size("large")


def test_a_folder_of_frames_and_tracks_that_count_otherwise_are_not_guessed(tmp_path):
    frames = make_frames(tmp_path / "f", range(1, 13))
    tracks = make_tracks(tmp_path / "t.txt", [(n, 1, 0, 0, 20, 40, 1, -1, -1, -1) for n in range(12)])
    with pytest.raises(ValueError, match="names frame 0, and .* holds frames 1 to 12; --first N numbers its images from N"):
        data.crop(frames, tracks, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for file in frames.iterdir():
        file.rename(frames / f"shot {int(file.stem)}.png")  # 1, 10, 11, 12, 2, ... by name
    data.crop(frames, tracks, tmp_path / "out", first=0)
    assert [seen(tmp_path / "out" / "f" / f"000001_{n:07d}_{0:02d}.jpg")[0] for n in range(12)] == list(range(1, 13))
    (frames / "shot 3.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="13 images have 12 numbers"):
        data.crop(frames, tracks, tmp_path / "again", first=0)


def test_flags_do_not_change_how_frames_are_counted(tmp_path):
    """The only box of frame 0 is not sure; without it the tracks would seem to count from 1."""
    video = make_video(tmp_path / "walk.mp4", range(1, 11))
    rows = [(0, 1, 30, 20, 40, 60, 0.3, -1, -1, -1)] + [(n, 1, 30, 20, 40, 60, 0.9, -1, -1, -1) for n in range(1, 10)]
    tracks = make_tracks(tmp_path / "t.txt", rows)
    data.crop(video, tracks, tmp_path / "out", confidence=0.5, every=3)
    assert {file.name: seen(file)[0] for file in (tmp_path / "out" / "walk").iterdir()} == {
        "000001_0000003_00.jpg": 4, "000001_0000006_00.jpg": 7, "000001_0000009_00.jpg": 10}
    with pytest.raises(ValueError, match="1 of 10 boxes are on 1 frames that cannot be read .*, the first: 0; .* names frames 0 to 9, and the video's first is taken for frame 1"):
        data.crop(video, tracks, tmp_path / "first", first=1)


def test_det_is_the_line_of_the_frame_whatever_is_dropped(tmp_path):
    # and of two boxes of one track in one frame the first is kept, since they cannot both be the person
    rows = [(1, 1, 5, 5, 20, 20, 0.2, -1, -1, -1), (1, 2, 50, 5, 20, 20, 0.9, -1, -1, -1), (1, 2, 90, 5, 20, 20, 0.9, -1, -1, -1)]
    data.crop(make_frames(tmp_path / "f", [1]), make_tracks(tmp_path / "t.txt", rows), tmp_path / "out", confidence=0.5)
    assert sorted(file.stem for file in (tmp_path / "out" / "f").iterdir()) == ["000002_0000001_01"]


def test_motchallenges_truth_keeps_people_to_consider(tmp_path):
    """Nine columns, as MOT17's gt.txt: flag, class (1 walks, 7 stands, 8 distracts), visibility; ten, as MOT15's."""
    people, flag = "not people (a truth: column 8 is read as the class, 1 for people)", "not to be considered"
    rows = [(1, 1, 10, 10, 20, 40, 1, 1, 0.8), (1, 2, 30, 10, 20, 40, 0, 1, 1), (1, 3, 50, 10, 20, 40, 1, 7, 1), (1, 4, 70, 10, 20, 40, 0, 8, 1)]
    for name in ("gt.txt", "renamed.txt"):
        _, _, fate = data.read_tracks(make_tracks(tmp_path / name, rows))
        assert fate.tolist() == ["", flag, people, flag]
    _, _, fate = data.read_tracks(make_tracks(tmp_path / "gt.txt", [(1, 1, 10, 10, 20, 40, 1, 4.2, 3.1, 0), (1, 2, 30, 10, 20, 40, 0, 4.2, 3.1, 0)]))
    assert fate.tolist() == ["", flag]
    _, _, fate = data.read_tracks(make_tracks(tmp_path / "boxmot.txt", [(1, 1, 10, 10, 20, 40, 0, 0, -1), (2, 1, 10, 10, 20, 40, 0, 0, -1)]))
    assert not any(fate)  # a tracker's nine columns


@pytest.mark.parametrize("text, message", [
    ("", "t.txt: expected lines of numbers.*it is empty"),
    ("1,2,3\n", r"got 1 lines of 3 numbers"),
    ("1,2,3,4,5,6,1\nframe,2,3,4,5,6,1\n", "expected lines of numbers.*'frame'"),
    ("1,2,3,4,5,6,1\n1,2,3,4,5\n", "expected lines of numbers.*columns changed"),
    ("1,2,3,4,5,6,1\n1,2.5,3,4,5,6,1\n", "line 2: expected a frame and a track in whole numbers"),
    ("1,2,3,4,nan,6,1\n", "line 1: expected"),
    ("1,-1,3,4,5,6,1\n2,-1,3,4,5,6,1\n", "these are detections, not tracks"),
])
def test_broken_tracks_are_refused(tmp_path, text, message):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.read_tracks(tmp_path / "t.txt")


def test_tracks_separated_by_spaces_are_read(tmp_path):
    (tmp_path / "t.txt").write_text("3 1 10 10 20 40 1\n1 1 10 11 20 40 1\n")
    numbers, boxes, _ = data.read_tracks(tmp_path / "t.txt")
    assert numbers.tolist() == [[3, 1, 0], [1, 1, 0]] and boxes[:, 1].tolist() == [10, 11]


def test_wrong_videos_are_refused_and_leave_nothing(tmp_path):
    tracks = make_tracks(tmp_path / "t.txt", [(n, 1, 10, 10, 20, 40, 1, -1, -1, -1) for n in (1, 2)])
    with pytest.raises(ValueError, match="nothing: no such file or folder"):
        data.crop(tmp_path / "nothing", tracks, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected images named by their frames"):
        data.crop(tmp_path / "empty", tracks, tmp_path / "out")
    frames = make_frames(tmp_path / "f", [1, 2])
    with pytest.raises(ValueError, match="names frame 7, and .* holds frames 1 to 2"):
        data.crop(frames, make_tracks(tmp_path / "far.txt", [(7, 1, 10, 10, 20, 40, 1, -1, -1, -1)]), tmp_path / "out")
    (frames / "000002.png").write_bytes((frames / "000002.png").read_bytes()[:100])
    with pytest.raises(ValueError, match="1 of 2 boxes are on 1 frames that cannot be read .*, the first: .*000002.png"):
        data.crop(frames, tracks, tmp_path / "out")
    with pytest.raises(ValueError, match="of 1 boxes all are dropped: 1 too small"):
        data.crop(frames, make_tracks(tmp_path / "o.txt", [(1, 1, 500, 10, 20, 40, 1, -1, -1, -1)]), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out" / "f").mkdir()
    with pytest.raises(ValueError, match="out/f: exists already"):
        data.crop(frames, tracks, tmp_path / "out")


@pytest.mark.parametrize("broken, refused", [(1, False), (3, True)])
def test_of_many_frames_one_in_a_hundred_may_be_broken(tmp_path, broken, refused):
    frames = make_frames(tmp_path / "f", range(1, 101))
    for n in range(1, broken + 1):
        (frames / f"{n:06d}.png").write_bytes(b"")
    tracks = make_tracks(tmp_path / "t.txt", [(n, 1, 10, 10, 20, 40, 1, -1, -1, -1) for n in range(1, 101)])
    if refused:
        with pytest.raises(ValueError, match="3 of 100 boxes"):
            data.crop(frames, tracks, tmp_path / "out")
    else:
        assert data.crop(frames, tracks, tmp_path / "out")["on broken frames"] == 1


def test_a_killed_crop_leaves_nothing_that_is_read(tmp_path):
    make_tree(tmp_path, FILES[:2] + [".street.host.123/000001_0000001_00.jpg"])
    assert data.read_tracklets(tmp_path).folders == ["a", "b"]


def test_a_split_of_motchallenge_at_once(tmp_path, capsys):
    row = lambda n: [(n, 1, 10, 10, 20, 40, 1, 1, 1.0)]
    for name in ("MOT17-02-DPM", "MOT17-02-FRCNN", "MOT17-02-SDP", "MOT17-04-DPM", "dancetrack0001"):
        make_frames(tmp_path / "train" / name / "img1", [1, 2])
        make_tracks(tmp_path / "train" / name / "gt" / "gt.txt", row(1))
        make_tracks(tmp_path / "train" / name / "det" / "det.txt", [(1, -1, 10, 10, 20, 40, 1)])
    data.crop_split(tmp_path / "train", tmp_path / "out")
    files = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.jpg"))
    assert files == [f"{name}/000001_0000001_00.jpg" for name in ("MOT17-02-DPM", "MOT17-04-DPM", "dancetrack0001")]
    capsys.readouterr()
    data.crop_split(tmp_path / "train", tmp_path / "out")
    assert capsys.readouterr().out.count("there already, left as it is") == 3
    for name in ("MOT17-02-SDP", "MOT17-04-DPM"):  # a tracker's results, for one of three detectors
        make_tracks(tmp_path / "results" / f"{name}.txt", [(2, 5, 10, 10, 20, 40, 1, -1, -1, -1)])
    with pytest.raises(ValueError, match="1 of 3 sequences have no tracks, the first: .*dancetrack0001.txt"):
        data.crop_split(tmp_path / "train", tmp_path / "other", tmp_path / "results")
    make_tracks(tmp_path / "results" / "dancetrack0001.txt", [(2, 5, 10, 10, 20, 40, 1, -1, -1, -1)])
    data.crop_split(tmp_path / "train", tmp_path / "other", tmp_path / "results")
    assert (tmp_path / "other" / "MOT17-02-SDP" / "000005_0000002_00.jpg").is_file() and not (tmp_path / "other" / "MOT17-02-DPM").exists()
    (tmp_path / "results" / "MOT17-02-SDP.txt").write_text("")
    make_tracks(tmp_path / "results" / "MOT17-04-DPM.txt", [(77, 5, 10, 10, 20, 40, 1, -1, -1, -1)])
    with pytest.raises(ValueError, match="1 of 3 sequences failed, the others are in .*: MOT17-04-DPM"):
        data.crop_split(tmp_path / "train", tmp_path / "fourth", tmp_path / "results")
    assert [folder.name for folder in (tmp_path / "fourth").iterdir()] == ["dancetrack0001"] and "empty, nobody was tracked" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing: no such folder"):
        data.crop_split(tmp_path / "nothing", tmp_path / "fifth")
    with pytest.raises(ValueError, match="no sequences; expected <sequence>/img1/000001.jpg"):
        data.crop_split(tmp_path / "results", tmp_path / "third")


def make_video(file, numbers):
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate, stream.gop_size = SIDE[1], SIDE[0], "yuv420p", 8_000_000, 4
        for number in numbers:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame_of(number), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file


@pytest.mark.parametrize("start", [0, 1])
def test_a_video_file_is_cropped_at_the_frames_that_the_tracks_name(tmp_path, start):
    video = make_video(tmp_path / "walk.mp4", range(1, 11))
    rows = [(n, 1, 30, 20, 40, 60, 1, -1, -1, -1) for n in range(start, start + 10, 3)]
    data.crop(video, make_tracks(tmp_path / "t.txt", rows), tmp_path / "out")
    files = sorted((tmp_path / "out" / "walk").iterdir())
    assert [int(re.search(r"_(\d+)_", file.name)[1]) for file in files] == [start, start + 3, start + 6, start + 9]
    assert [seen(file)[0] for file in files] == [1, 4, 7, 10]
    assert all(seen(file)[2] == (40, 60) and np.allclose(seen(file)[1], (30, 20), atol=8) for file in files)


def test_a_video_that_is_to_be_turned_is_turned(tmp_path):
    """Phones film sideways and say so in the track header's matrix; OpenCV, with which trackers read, turns the frames."""
    video = make_video(tmp_path / "phone.mp4", [5, 5])
    content = bytearray(video.read_bytes())
    matrix = content.find(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, SIDE[0] << 16, 0, 1 << 30)  # a quarter clockwise
    video.write_bytes(content)
    (_, frame), *_ = data.decode_frames(video, np.array([1]), 1)
    assert frame.shape == (SIDE[1], SIDE[0], 3)
    assert frame[120, 60, 1] > frame[20, 60, 1] + 80 and frame[80, 20, 2] > frame[80, 100, 2] + 60  # green grows downwards, blue to the left


def test_half_a_video_is_refused(tmp_path):
    video = make_video(tmp_path / "walk.avi", range(1, 11))
    tracks = make_tracks(tmp_path / "t.txt", [(n, 1, 30, 20, 40, 60, 1, -1, -1, -1) for n in range(1, 11)])
    video.write_bytes(video.read_bytes()[: len(video.read_bytes()) // 2])
    with pytest.raises(ValueError, match="of 10 boxes are on . frames that cannot be read"):
        data.crop(video, tracks, tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("1,1,30,20,40,60,1,-1,-1,-1\n" * 400)  # which ffmpeg would draw
    with pytest.raises(ValueError, match="text.txt: holds no video"):
        data.crop(text, tracks, tmp_path / "out")
    video.write_bytes(b"nothing that moves")
    with pytest.raises(ValueError, match="10 of 10 boxes are on 10 frames"):
        data.crop(video, tracks, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_av_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "walk.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="needs the package av: pip install av"):
        data.crop(tmp_path / "walk.mp4", make_tracks(tmp_path / "t.txt", [(1, 1, 30, 20, 40, 60, 1)]), tmp_path / "out")
