"""denoise.py: the paper's levels against loops over its equations, our additions against theirs.

A literal implementation stands before each test that uses it: float64, one sample, tracklet or pair
after another, in the words of docs and docstrings."""
import functools
import itertools
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import full_disk

import denoise as D
from data import Tracklets


def distance(a, b):
    return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def apart(degrees):
    """The distance of two vectors with this angle between them."""
    return 1 - np.cos(np.deg2rad(degrees))


def at(*degrees):
    """Unit vectors (n, 2) in these directions."""
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def partition(labels):
    """What belongs together, whatever its number; noise left out."""
    labels = np.asarray(labels)
    return {frozenset(np.flatnonzero(labels == k).tolist()) for k in set(labels) - {-1}}


def people(seed, n=6, videos=3, frames=8, d=48, spread=0.25, switches=0):
    """Tracklets of n people who are in all videos: features, video, track, frame; and truth.
    In the first videos, as many as there are switches, two tracks go on as each other halfway."""
    random = np.random.default_rng(seed)
    centers = D.unit(random.standard_normal((n, d)))
    index = list(itertools.product(range(videos), range(n), range(frames)))
    video, truth, frame = np.array(index).T
    late = (video < switches) & (frame >= frames // 2) & (truth < 2)
    track = video * n + np.where(late, 1 - truth, truth)
    features = centers[truth] + spread / np.sqrt(d) * random.standard_normal((len(truth), d))
    return (D.unit(features), video, track, frame), truth


def small_parts(n):
    for start in range(0, n, 7):
        yield slice(start, start + 7)


# ---------------------------------------------------------------- the paper


def by_the_paper(x, video, track, frame, sigma_cst, sigma_drm, r_s, happened):
    """Eq. 4 to 7: identities as lists of rows. `happened` counts what each level did."""
    sequence = []
    for v in sorted(set(video)):
        tracklets = []
        excluded = []
        for k in sorted(set(track[video == v])):
            rows = np.flatnonzero((video == v) & (track == k))
            rows = sorted(rows, key=lambda i: frame[i])
            while len(rows) > 1:
                far = []
                for i in rows:
                    remaining = [j for j in rows if j != i]
                    far.append(distance(x[i], x[remaining].mean(0)))
                equal = [n for n in range(len(rows)) if far[n] >= max(far) - 1e-6]
                if far[equal[-1]] < sigma_cst:
                    break
                happened["ties"] += len(equal) > 1
                excluded.append((rows.pop(equal[-1]), len(tracklets)))
            tracklets.append(rows)
        centroids = [x[rows].mean(0) for rows in tracklets]
        happened["excluded"] += len(excluded)
        for i, own in excluded:
            others = [t for t in range(len(tracklets)) if t != own]
            nearest = min(others, key=lambda t: distance(x[i], centroids[t]), default=None)
            if nearest is not None and distance(x[i], centroids[nearest]) < sigma_cst:
                tracklets[nearest].append(i)
                happened["reallocated"] += 1
            else:
                happened["discarded"] += 1
        identities = linked(x, tracklets, sigma_drm, len(tracklets))
        happened["merged in video"] += len(tracklets) - len(identities)
        # tracks that begin in the same frame have the order of their numbers
        sequence += sorted(identities, key=lambda rows: min((frame[i], track[i]) for i in rows))
    identities = linked(x, sequence, sigma_drm, r_s)
    happened["linked across"] += len(sequence) - len(identities)
    happened["out of range"] += len(identities) - len(linked(x, sequence, sigma_drm, len(x)))
    return identities


def linked(x, identities, sigma_drm, r_s):
    """Eq. 6 between those at most r_s places apart, and the closure of eq. 7."""
    centroids = [x[rows].mean(0) for rows in identities]
    name = list(range(len(identities)))
    for i, j in itertools.combinations(range(len(identities)), 2):
        if j - i <= r_s and distance(centroids[i], centroids[j]) < sigma_drm:
            name = [name[i] if n == name[j] else n for n in name]
    closure = {n: [] for n in name}
    for n, rows in zip(name, identities):
        closure[n] += rows
    return list(closure.values())


def random_case(seed):
    """Anything from clean to hopeless: features, video, track, frame in random order of rows, and
    options. Tracklets of 1 to 7 images, some of strangers, with images that are exactly alike;
    tracks have the same numbers in every video."""
    random = np.random.default_rng(seed)
    d = random.integers(2, 7)
    centers = random.standard_normal((6, d))
    spread = random.uniform(0.05, 0.8)
    rows = []
    for v, k in itertools.product((0, 3, 4, 7, 8), range(random.integers(1, 8))):
        start = random.integers(0, 20)
        for f in range(random.integers(1, 8)):
            who = random.integers(6) if random.random() < 0.3 else k % 6
            if f == 0 or random.random() < 0.9:
                image = centers[who] + spread * random.standard_normal(d)
            rows.append((v, k, start + 2 * f, *image))
    rows = random.permutation(rows)
    features = rows[:, 3:] * random.uniform(0.5, 4, (len(rows), 1))
    options = dict(zip(("sigma_cst", "sigma_drm"), random.uniform(0.02, 0.5, 2)))
    options["r_s"] = int(random.integers(1, 12))
    return (features, *rows[:, :3].astype(int).T), options


def test_the_levels_are_the_papers_equations():
    happened = Counter()
    for seed in range(60):
        (features, *index), options = random_case(seed)
        x = features / np.linalg.norm(features, axis=1, keepdims=True)
        want = by_the_paper(x, *index, **options, happened=happened)
        got = D.denoise(features, *index, **options, paper=True)
        assert partition(got) == {frozenset(rows) for rows in want}, seed
        assert set(got) - {-1} == set(range(len(want)))
    # every part of the equations had something to do, many times
    assert len(happened) == 7
    assert min(happened.values()) > 100, happened


def test_at_exactly_the_thresholds():
    """At sigma_cst a sample is excluded and not taken in elsewhere, at sigma_drm nobody merges."""
    for video in (0, 1):
        index = [0, 0, video], [0, 0, 1], [0, 1, 2]
        assert D.denoise(np.eye(3), *index, 1.0, 1.0, paper=True).tolist() == [0, -1, 1]
    # of radii what differs by rounding is equal
    for less, wide in ((5e-7, 0), (2e-6, 1)):
        assert D.noise(at(-60, 60), np.zeros(2, int), apart(60) - less, 1.0).consistency == wide


def test_reallocate_by_hand():
    """Tracklets at 0 and 60 degrees, and five samples that were excluded from `track`."""
    features = at(0, 60, 20, 20, 35, 35, 30)
    labels = np.array([0, 1, -1, -1, -1, -1, -1])
    track = np.array([0, 1, 1, 0, 0, 1, 0])
    alone = D.reallocate(features, labels, track, apart(36), np.arange(7))
    assert alone.tolist() == [0, 1, 0, -1, 1, 0, 1]  # not to their own, however near
    # ours: nobody joins who is in the same frame, be it by having been moved there
    frame = np.array([5, 6, 5, 7, 8, 8, 8])
    got = D.reallocate(features, labels, track, apart(36), frame)
    assert got.tolist() == [0, 1, -1, -1, 1, 0, -1]


@pytest.mark.parametrize("degrees, pair", [((0, 36, 200, 75), {0, 1}), ((0, 200, 36, 75), {2, 3})])
def test_those_of_a_video_who_are_equally_near_go_with_their_neighbour_in_time(degrees, pair):
    track = np.array([3, 0, 2, 1])
    frame = np.arange(4)
    got = D.single_video(at(*degrees), track, track, frame, 2.0, 0.3, closest_first=True)
    assert pair in partition(got)


@pytest.mark.parametrize("r_s", [1, 3, 4, 9, 40])
def test_closures_go_across_the_borders_of_blocks(r_s, monkeypatch):
    monkeypatch.setattr(D, "BLOCK", 4)
    x = D.unit(np.random.default_rng(r_s).standard_normal((21, 3)))
    groups = linked(x, [[k] for k in range(21)], 0.6 / r_s**0.5, r_s)
    assert 1 < len(groups) < 21
    assert partition(D.closure(x, 0.6 / r_s**0.5, r_s)) == set(map(frozenset, groups))


@pytest.mark.parametrize("r_s", [3, None])
def test_noise_is_its_definition(r_s, monkeypatch):
    monkeypatch.setattr(D, "BLOCK", 4)
    monkeypatch.setattr(D, "parts", small_parts)
    random = np.random.default_rng(0)
    features = random.standard_normal((60, 3))
    labels = random.permutation(np.append(np.arange(20), random.integers(-1, 20, 40)))
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    groups = [x[labels == k] for k in range(20)]
    centroids = [group.mean(0) for group in groups]
    radii = [max(distance(a, c) for a in group) for group, c in zip(groups, centroids)]
    wide = sum(radius > 0.4 for radius in radii)
    close = 0
    for i, j in itertools.permutations(range(20), 2):
        if r_s is None or abs(i - j) <= r_s:
            close += distance(centroids[i], centroids[j]) < 0.3
    assert 0 < wide < 20 and close
    want = (wide + close) / 20, wide / 20, close / 20
    assert D.noise(features, labels, 0.4, 0.3, r_s) == pytest.approx(want)


def test_pairwise_scores_by_hand():
    labels = np.array([0, 0, 0, 1, 1, -1])
    scores = D.pairwise_scores(labels, np.array([0, 0, 2, 0, -1, 0]))
    assert scores == pytest.approx({"precision": 1 / 4, "recall": 1 / 6, "f1": 1 / 5})
    assert D.pairwise_scores(labels, np.full(6, -1))["f1"] == 0


# ---------------------------------------------------------------- ours: cuts and cannot-link


def test_tracklets_are_cut_where_the_person_changes_and_nowhere_else():
    features = at(0, 1, 2, 90, 91, 180, 50, 60, 70)
    track = np.array([7] * 6 + [3] * 3)
    cut = D.cut_tracklets(features, track, 0.5)
    assert cut.tolist() == [0, 0, 0, 3, 3, 5, 6, 6, 6]
    assert D.cut_tracklets(features, track, 1.8).tolist() == [0] * 6 + [6] * 3
    # it is sigma_drm that counts
    one = np.zeros(6, int)
    cut = D.denoise(at(0, 0, 0, 60, 60, 60), one, one, np.arange(6), 2.0, 0.4, levels=1)
    assert cut.tolist() == [0, 0, 0, 1, 1, 1]


def test_rows_of_labels_leave_noise_out():
    assert [rows.tolist() for rows in D.rows_of(np.array([3, -1, 0, 3]))] == [[2], [0, 3]]


def test_seen_together_are_all_pairs_of_a_frame():
    random = np.random.default_rng(0)
    labels = random.integers(-1, 12, 60)
    frame = random.integers(0, 9, 60) * 1000
    want = set()
    for i, j in itertools.permutations(range(60), 2):
        if frame[i] == frame[j] and 0 <= labels[i] < labels[j]:
            want.add((labels[i], labels[j]))
    assert set(zip(*D.seen_together(labels, frame))) == want


# ---------------------------------------------------------------- ours: closest first


def closest_first(centroids, sigma_drm, r_s, never, nearness, at_once):
    """Groups of tracklets, joined by average linkage: one pair at a time, or all at once that are
    each other's closest. A link that is too long when it is looked at is forgotten."""
    T = len(centroids)
    far = 1 - centroids.astype(float) @ centroids.T
    links = set()
    for i, j in itertools.combinations(range(T), 2):
        if j - i <= r_s and far[i, j] < sigma_drm:
            links.add((i, j))
    groups = [frozenset([k]) for k in range(T)]
    while True:
        found = []
        for a, b in itertools.combinations(groups, 2):
            pairs = {(min(pair), max(pair)) for pair in itertools.product(a, b)}
            if pairs & never or not pairs & links:
                continue
            gap = abs(np.mean(list(a)) - np.mean(list(b)))
            mean = np.mean([far[pair] for pair in pairs]) + nearness * min(gap / r_s, 1)
            if mean < sigma_drm:
                found.append((mean, a, b))
            else:
                links -= pairs
        if not found:
            return set(groups)
        found.sort(key=lambda entry: entry[0])
        closest = {}
        for _, a, b in found:
            closest.setdefault(a, b)
            closest.setdefault(b, a)
        mutual = [(a, b) for _, a, b in found if closest[a] == b and closest[b] == a]
        for a, b in mutual if at_once else mutual[:1]:
            groups = [group for group in groups if group not in (a, b)] + [a | b]


@pytest.mark.parametrize("at_once", [False, True])
def test_closest_first_is_its_definition(at_once, monkeypatch):
    """Pair by pair where every tracklet may be linked to every other and places count nothing;
    where links are out of range, round by round."""
    monkeypatch.setattr(D, "parts", small_parts)
    several = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        T = random.integers(4, 14)
        centroids = D.unit(random.standard_normal((T, random.integers(2, 6))))
        sigma_drm = random.uniform(0.2, 0.9)
        r_s = int(random.integers(2, T)) if at_once else T
        nearness = 0.1 if at_once else 0.0
        never = {tuple(sorted(random.choice(T, 2, replace=False).tolist())) for _ in range(T // 3)}
        pairs = np.array(sorted(never)).T
        got = D.merge_closest_first(centroids, sigma_drm, r_s, pairs, nearness)
        want = closest_first(centroids, sigma_drm, r_s, never, nearness, at_once)
        assert partition(got) == want, seed
        several += max(map(len, want)) > 2
    assert several > 50


def test_only_the_nearest_links_count():
    """Each keeps the links to its nearest; 3 is nobody's, but has its own."""
    for most, want in ((1, [1, 6, 11]), (2, [1, 2, 6, 7, 11])):
        assert D.nearest_links(at(0, 1, 3, 7), 0.1, 9, most).tolist() == want  # 4 i + j
    # ten of them: those of the first of 13 end at its tenth
    assert {10, 11, 12} & set(D.nearest_links(at(*range(13)), 1.0, 99)) == {10}


def test_the_edge_of_the_range_is_soft():
    """r_s places count as much as a distance of 0.2."""
    nobody = np.empty((2, 0), np.int64)
    for more, want in ((0.19, [0, 1, 2]), (0.21, [0, 1, 0])):
        got = D.merge_closest_first(at(0, 180, 40), apart(40) + more, 2, nobody)
        assert got.tolist() == want


# ---------------------------------------------------------------- ours: calibration and space


def literal_calibrate(x, video, track, frame, r_s):
    tracklets = [np.flatnonzero(track == k) for k in set(track)]
    tracklets.sort(key=lambda rows: (video[rows[0]], frame[rows].min(), track[rows[0]]))
    own = []
    for rows in tracklets:
        if len(rows) > 1:
            own += [distance(x[i], x[rows].sum(0) - x[i]) for i in rows]
    between = []
    for c, t in itertools.permutations(range(len(tracklets)), 2):
        a = tracklets[c]
        b = tracklets[t]
        if abs(c - t) <= r_s and video[a[0]] != video[b[0]]:
            between.append(distance(x[a].sum(0), x[b].sum(0)))
    between = np.sort(between)
    far = np.median(between)
    links = []
    trusted = [0]
    for n in range(len(between) // 2):
        strangers = (between >= far + (far - between[n])).sum()
        links.append(n + 1 - strangers)
        if strangers <= (n + 1) / 4:
            trusted.append(between[n])
    half = next(between[n] for n in range(len(links)) if links[n] >= max(links) / 2)
    sigma_drm = max((np.median(own) + far) / 2, min(half, trusted[-1]))
    return (np.quantile(own, 0.95) + far) / 2, sigma_drm


@pytest.mark.parametrize("r_s", [12, 1000])
@pytest.mark.parametrize("change", [0.1, 0.15, 0.2, 0.25])
def test_calibration_is_its_definition(change, r_s):
    """People look different from video to video, by `change`: links beyond halfway decide then."""
    (x, *index), _ = people(3, n=8, videos=4, frames=4, spread=0.4)
    random = np.random.default_rng(0)
    x = D.unit(x + change * random.standard_normal((32, 48))[index[1]])
    keep = random.random(len(x)) < 0.8
    index = [array[keep] for array in index]
    want = literal_calibrate(x[keep].astype(float), *index, r_s)
    assert (want[1] > want[0]) == (change > 0.1)
    assert D.calibrate(x[keep] * 3, *index, r_s) == pytest.approx(want, abs=1e-5)


def test_of_many_tracklets_calibration_looks_at_some_all_along():
    """Neighbours are 2 apart in the first half, 1 in the second."""
    n = np.arange(3000)
    x = at(*np.where(n < 1500, 180, 90) * (n % 2))
    found = D.distances_between_videos(x, n, n, 1)
    assert len(found) == 2 * 1000 - 2 and found.mean() == pytest.approx(1.5, abs=0.01)


def literal_space(x, video, track):
    """The whole space in memory: (N, most 512 and half the tracklets) unit rows."""
    N, d = x.shape
    centred = np.empty_like(x)
    for v in set(video):
        means = [x[track == k].mean(0) for k in set(track[video == v])]
        mean = (np.sum(means, 0) + 8 * x.mean(0)) / (len(means) + 8)
        centred[video == v] = x[video == v] - mean
    S = centred.T @ centred / N
    # Chen et al. (2010), eq. 23
    rho = (1 - 2 / d) * np.trace(S @ S) + np.trace(S) ** 2
    rho /= (N + 1 - 2 / d) * (np.trace(S @ S) - np.trace(S) ** 2 / d)
    rho = min(1, rho)
    shrunk = (1 - rho) * S + rho * np.trace(S) / d * np.eye(d)
    values, vectors = np.linalg.eigh(shrunk)
    kept = np.argsort(-values)[: len(set(track)) // 2]
    placed = centred @ vectors[:, kept] / np.sqrt(values[kept])
    return placed / np.linalg.norm(placed, axis=1, keepdims=True)


def test_the_space_is_its_definition():
    (x, *index), _ = people(0, n=12, videos=3, frames=4, d=20, spread=0.7)
    keep = (index[1] % 5 > 0) | (index[2] > 1)  # tracklets of 2 and of 4 images
    index = [array[keep] for array in index]
    background = np.random.default_rng(0).standard_normal((3, 20))
    x = D.unit(x[keep] + 0.3 * background[index[0]])
    space = D.fit_space(x * 2, *index[:2])
    placed = D.place(x * 3, *index, space)
    want = literal_space(x.astype(float), *index[:2])
    assert placed.shape == want.shape == (len(x), 18)
    assert placed @ placed.T == pytest.approx(want @ want.T, abs=1e-3)  # signs are free
    # without either, only the mean of all is taken off
    space = D.fit_space(x, *index[:2], center=False, whiten=False)
    assert D.place(x, *index, space) == pytest.approx(D.unit(x - x.mean(0)), abs=1e-5)


def test_the_space_has_512_directions_at_most():
    x = np.random.default_rng(0).standard_normal((1100, 520))
    space = D.fit_space(x, np.zeros(1100, int), np.arange(1100))
    assert space.matrix.shape == (520, 512)


@pytest.mark.parametrize("N, d", [(1, 4), (2, 3), (6, 100), (40, 5)])
def test_the_space_is_safe_for_few_images_and_for_images_all_alike(N, d):
    n = np.arange(N)
    features = np.random.default_rng(0).standard_normal((N, d)), np.ones((N, d))
    for x, on in itertools.product(features, (True, False)):
        placed = D.place(x, n // 4, n // 2, n, D.fit_space(x, n // 4, n // 2, on, on))
        assert np.linalg.norm(placed, axis=1) == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------- all of it


@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_neither_order_of_rows_nor_memory_changes_a_number(seed, paper, monkeypatch, tmp_path):
    (features, *index), options = random_case(seed)
    if seed % 2:
        options = {"r_s": 5}  # thresholds calibrated, or the paper's
    features = features.astype(np.float16)
    want = D.denoise(features, *index, **options, paper=paper)
    order = np.random.default_rng(seed).permutation(len(want))
    moved = [array[order] for array in index]
    got = D.denoise(features[order], *moved, **options, paper=paper)
    assert (got == want[order]).all()
    np.save(tmp_path / "features.npy", features)
    monkeypatch.setattr(D, "parts", small_parts)
    monkeypatch.setattr(D, "BLOCK", 3)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert (D.denoise(mapped, *index, **options, paper=paper) == want).all()


@pytest.mark.parametrize("seed", range(10))
def test_levels_leave_what_they_should(seed):
    (features, *index), options = random_case(seed)
    video, track, frame = index
    sigmas = options["sigma_cst"], options["sigma_drm"]
    names, found = zip(*D.level_by_level(features, np.array(index), sigmas, options["r_s"]))
    assert names == ("tracklets", "single tracklet", "single video", "cross video")
    assert partition(found[0]) == partition(100 * video + track)
    for n in (1, 2, 3):
        assert (D.denoise(features, *index, **options, levels=n) == found[n]).all()
    for group in partition(found[1]):  # level 1 leaves parts of tracklets, and nobody to exclude
        rows = sorted(group, key=lambda i: frame[i])
        assert len(set(zip(video[rows], track[rows]))) == 1
        assert len(D.trim(D.unit(features[rows]), sigmas[0])) == len(rows)
    assert ((found[3] >= 0) == (found[2] >= 0)).all()  # level 3 removes nothing
    for group in map(list, partition(found[2]) | partition(found[3])):  # nobody is twice in a frame
        assert len(set(zip(video[group], frame[group]))) == len(group)
    for group in map(list, partition(found[2])):  # level 2 stays within videos
        assert len(set(video[group])) == 1


@pytest.mark.parametrize("name", ["cut", "cannot_link", "closest_first"])
def test_an_addition_that_is_left_out_changes_levels_2_and_3(name):
    changed = Counter()
    for seed, levels in itertools.product(range(12), (2, 3)):
        (features, *index), options = random_case(seed)
        options |= {"sigma_drm": options["sigma_drm"] + 0.3, "levels": levels}
        run = functools.partial(D.denoise, features, *index, **options)
        changed[levels] += (run(without=[name]) != run()).any()
        # the paper has none of them
        assert (run(without=D.ADDITIONS) == run(paper=True)).all()
    assert changed[2] and changed[3]


@pytest.mark.parametrize("seed", range(5))
def test_people_come_out_whole(seed):
    for options, least in (({}, 1.0), ({"n": 20, "videos": 8, "spread": 1.2}, 0.7)):
        arrays, truth = people(seed, switches=2, **options)
        assert D.pairwise_scores(arrays[2], truth)["f1"] < 0.5
        assert D.pairwise_scores(D.denoise(*arrays), truth)["f1"] >= least


@pytest.mark.parametrize("options", [
    {"paper": True},
    {"r_s": 7, "sigma_drm": 0.6},
    {"without": ("center", "cut"), "levels": 2},
    {"without": ("whiten",)},
])
def test_tracklets_are_denoised_in_their_space_and_figures_tell_it(options, tmp_path, capsys):
    (x, *index), truth = people(0, switches=1)
    tracklets = Tracklets(tmp_path, [], np.full(len(x), b"image"), *index)
    scratch = tmp_path / "scratch.npy"
    labels, figures = D.denoise_tracklets(tracklets, x, scratch, truth, **options)
    if "paper" not in options:
        without = options.get("without", ())
        space = D.fit_space(x, *index[:2], "center" not in without, "whiten" not in without)
        x = D.place(x, *index, space).astype(np.float16)
    assert (labels == D.denoise(x, *index, **options)).all()
    sigmas = figures["sigma_cst"], figures["sigma_drm"]
    r_s = options.get("r_s", 1000)
    want = (0.2, 0.18) if "paper" in options else D.calibrate(x, *index, r_s)
    assert sigmas == (want[0], options.get("sigma_drm", want[1]))
    for name, found in (("noise_before", index[1]), ("noise_after", labels)):
        assert figures[name] == D.noise(x, found, *sigmas, r_s)
    assert figures["f1_tracklets"] == D.pairwise_scores(index[1], truth)["f1"]
    assert D.pairwise_scores(labels, truth).items() <= figures.items()
    assert figures["identities"] == labels.max() + 1
    assert figures["images_kept"] == (labels >= 0).sum()
    # a line before level 1 and after each, below two others
    assert len(capsys.readouterr().out.splitlines()) == 3 + options.get("levels", 3)
    assert not list(tmp_path.iterdir())


def test_pictures_show_those_of_most_videos_first(monkeypatch):
    monkeypatch.setattr(D, "Images", lambda tracklets, size: [(255 * i, i) for i in range(6)])
    sheets = []
    monkeypatch.setattr(D, "write_pictures", lambda *arguments: sheets.append(arguments))
    tracklets = SimpleNamespace(video=np.array([0, 0, 0, 1, 1, 2]))
    D.show_identities("file", tracklets, np.array([1, -1, 0, 0, 1, 1]), columns=3)
    assert sheets == [("file", [0, 4, 5, 2, 2, 3], 3)]


def test_features_that_do_not_become_whole_leave_no_file(tmp_path, monkeypatch):
    def extract(*_, out):
        assert out.shape == (5, 8)
        raise KeyboardInterrupt

    monkeypatch.setattr(D, "extract", extract)
    with pytest.raises(KeyboardInterrupt):
        backbone = SimpleNamespace(embed_dim=8)
        D.extract_features(backbone, range(5), (64, 32), "cpu", 0, tmp_path / "features.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, message", [
    ({"video": np.zeros(3, int)}, "same shape"),
    ({"features": np.ones(144)}, r"got \(144,\), \(3, 144\)"),
    ({"features": np.ones((145, 2))}, r"got \(145, 2\), \(3, 144\)"),
    ({"features": (100, np.nan)}, "row 100 is zero"),
    ({"features": (100, 0.0)}, "row 100 is zero"),
    ({"features": (100, 1e-30)}, "row 100 is zero, too small"),
    ({"features": (100, 1e30)}, "row 100 is zero, too small or large"),
    ({"without": "cut"}, "without cut: expected .* of .*'cut'"),
    ({"levels": 0}, "levels 0"),
    ({"frame": np.full(144, 0.5)}, "Cannot cast"),
    ({"track": (9, -1)}, "a row of features and index for each image"),
    ({"sigma_cst": np.nan}, "sigma_cst nan: expected a distance from 0 to 2"),
    ({"sigma_drm": -0.1}, "sigma_drm -0.1: expected a distance from 0 to 2"),
    ({"r_s": 0}, "r_s 0: expected 1 to 2147483647 tracklets"),
    ({"r_s": 2**63}, "r_s 9223372036854775808: expected"),
])
def test_wrong_input_is_named(change, message, monkeypatch):
    monkeypatch.setattr(D, "parts", small_parts)
    arrays = dict(zip(("features", "video", "track", "frame"), people(0)[0]))
    ((name, value),) = change.items()
    if isinstance(value, tuple):
        row, number = value
        value = arrays[name].copy()
        value[row] = number
    with pytest.raises((ValueError, TypeError), match=message):
        D.denoise(**arrays | {name: value})


@pytest.mark.parametrize("paper", [True, False])
def test_tiny_inputs_work(paper):
    assert D.denoise(np.ones((1, 4)), [0], [0], [0], paper=paper).tolist() == [0]
    # a single video has no strangers
    assert np.isfinite(D.calibrate(*people(0, videos=1)[0])).all()
    # a collapsed encoder loses nobody
    tracks = [0, 0, 1, 2, 2, 2]
    alike = D.denoise(np.ones((6, 3)), [0, 0, 0, 1, 1, 1], tracks, range(6), paper=paper)
    assert min(alike) >= 0 and alike[3] == alike[4] == alike[5]


def test_a_map_has_its_space_on_the_disk_before_it_is_written(tmp_path, monkeypatch):
    D.new_map(tmp_path / "a.npy", (1000, 1000))
    if hasattr(os, "posix_fallocate"):
        assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 2_000_000

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    message = "b.npy: cannot take 2 MB: "
    with full_disk(1_000_000), pytest.raises(OSError, match=message):
        D.new_map(tmp_path / "b.npy", (1000, 1000))
    monkeypatch.setattr(os, "posix_fallocate", no_space, raising=False)
    with pytest.raises(OSError, match=message + "No space left on device"):
        D.new_map(tmp_path / "b.npy", (1000, 1000))
    assert os.listdir(tmp_path) == ["a.npy"]


def test_numbers_of_identities_may_be_large():
    truth = np.array([20240501000001, 20240501000001, 5, 7])
    scores = D.pairwise_scores(np.array([0, 0, 1, 1]), truth)
    assert (scores["precision"], scores["recall"]) == (0.5, 1)
