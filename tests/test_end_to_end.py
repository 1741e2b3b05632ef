"""The scripts as a user runs them: from tracklets to mAP, in one process and in two, stopped and resumed."""
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
from denoise import denoise, pairwise_scores

TINY = "--recipe demo --arch r10ibn --size 32 16 --local_size 32 16 --canvas 32 16 --batch 16 --hidden 32 --bottleneck 16 --prototypes 32 " \
       "--tracklet_epochs 1 --K 2 4 --epochs 1 1 --rounds 2 --epoch_steps 12 --log_every 3 --workers 0".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def command(script, *flags, launcher=(sys.executable,)):
    return [*launcher, str(ROOT / script), *map(str, flags)]


def run(folder, *args, launcher=(sys.executable,), fails=False):
    """Run a script in a folder; its output, after checking the exit code."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run(command(*args, launcher=launcher), cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr


def events(folder, kind):
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["event"] == kind]


@pytest.fixture(scope="module")
def finished(walkers, tmp_path_factory):
    """A folder in which one tiny run under torchrun has come to its end, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder, "train.py", "--data", walkers, "--name", "tiny", *TINY, launcher=TORCHRUN)


def test_the_whole_chain_leaves_what_it_promises(finished, walkers):
    folder, output = finished
    tiny = folder / "runs" / "tiny"
    for name in ("last.pt", "log.jsonl", "identities.json", "crops.png", "denoised.png", "retrieval.png"):
        assert (tiny / name).stat().st_size > 500, name
    for line in ("data", "stage 1", "denoise", "cross video", "stage 2", "result"):
        assert line in output
    assert [e["stage"] for e in events(tiny, "evaluate")] == ["random", "tracklet", "round 1", "cion"]
    for e in events(tiny, "evaluate"):
        assert 0 < e["mAP"] <= 1 and e["R1"] <= e["R5"] <= e["R10"] <= 1
    stages = [e["stage"] for e in events(tiny, "train")]
    assert stages == sorted(stages, reverse=True) and {"tracklet", "cion"} == set(stages)
    assert all(np.isfinite(e["loss"]) and e["images_per_second"] > 0 for e in events(tiny, "train"))
    _, denoised = events(tiny, "denoise")
    assert denoised["identities"] > 1 and denoised["noise_after"][0] <= denoised["noise_before"][0] and 0 < denoised["f1_tracklets"] < 1 and "f1" in denoised
    labels = data.read_labels(tiny / "identities.json", data.read_tracklets(walkers / "train"))
    assert labels.max() + 1 == denoised["identities"] and (labels >= 0).sum() == denoised["images_kept"]


def test_who_teaches_whom_changes_nothing_else(walkers, tmp_path):
    """--identities: the same steps and schedules on other identities, as many as there are; denoising for cion alone."""
    identities, schedules = {}, {}
    for who in ("instance", "tracklet", "true", "cion"):
        output = run(tmp_path, "train.py", "--data", walkers, "--identities", who, "--name", who, *TINY, "--epoch_steps", 4, "--log_every", 2)
        log = tmp_path / "runs" / who
        assert [e["stage"] for e in events(log, "evaluate")] == (["random", "tracklet", "round 1", "cion"] if who == "cion" else ["random", who])
        assert len(events(log, "denoise")) == (2 if who == "cion" else 0)
        assert [e["K"] for e in events(log, "train")] == ([1] * 6 if who == "instance" else [2, 2, 2, 2, 4, 4])
        identities[who] = int(next(line for line in output.splitlines() if line.startswith("stage 1")).split()[2].replace(",", ""))
        schedules[who] = [[e[key] for key in ("step", "lr", "weight_decay", "ema")] for e in events(log, "train")]
    t = data.read_tracklets(walkers / "train")
    assert identities == {"instance": len(t), "tracklet": t.track.max() + 1, "cion": t.track.max() + 1, "true": 10}
    assert all(schedule == schedules["cion"] for schedule in schedules.values())
    assert "--identities true" in run(tmp_path, "train.py", "--data", walkers / "train", "--identities", "true", *TINY, fails=True)


def test_denoising_up_to_a_level(walkers, tmp_path):
    """--levels 1 keeps identities within tracklets, --levels 2 within videos."""
    t = data.read_tracklets(walkers / "train")
    for levels, within in ((1, t.track), (2, t.video)):
        run(tmp_path, "train.py", "--data", walkers, "--levels", levels, "--name", levels, *TINY, "--epoch_steps", 4, "--rounds", 1)
        labels = data.read_labels(tmp_path / "runs" / str(levels) / "identities.json", t)
        kept = labels >= 0
        assert len(np.unique(np.stack([labels[kept], within[kept]]), axis=1).T) == len(np.unique(labels[kept]))
        tracks = len(np.unique(np.stack([labels[kept], t.track[kept]]), axis=1).T)
        assert (tracks > len(np.unique(labels[kept]))) == (levels == 2)


def test_denoising_as_the_paper_has_it(walkers, tmp_path):
    """--denoising paper: its thresholds, and no space; the other flags reach denoise.py as well, one by one."""
    t = data.read_tracklets(walkers / "train")
    flags = ["train.py", "--data", walkers, "--levels", 1, *TINY, "--epoch_steps", 4, "--rounds", 1]
    output = run(tmp_path, *flags, "--name", "paper", "--denoising", "paper")
    assert "sigma_cst 0.200, sigma_drm 0.180, r_s" in output
    folder = tmp_path / "runs" / "paper"
    assert not (folder / "space.npz").exists()
    (event,) = events(folder, "denoise")
    assert (event["sigma_cst"], event["sigma_drm"]) == (0.2, 0.18)
    run(tmp_path, *flags, "--name", "off", "--no-center", "--no-whiten", "--no-cut")
    space = np.load(tmp_path / "runs" / "off" / "space.npz")
    assert np.isinf(space["prior"]) and (space["matrix"] == np.eye(len(space["matrix"]))).all()
    for name in ("paper", "off"):  # level 1 leaves each tracklet one identity
        labels = data.read_labels(tmp_path / "runs" / name / "identities.json", t)
        kept = labels >= 0
        pairs = {*zip(labels[kept], t.track[kept])}
        assert len(pairs) == len(np.unique(t.track)) == labels.max() + 1


def test_training_changed_the_weights_and_kept_them_finite(finished):
    state = torch.load(finished[0] / "runs" / "tiny" / "last.pt", weights_only=True)
    assert list(state["results"]) == ["random", "tracklet", "round 1", "cion"] and state["step"] == 36
    assert not torch.equal(state["teacher"]["backbone.conv1.weight"], state["student"]["backbone.conv1.weight"])
    assert all(torch.isfinite(v).all() for v in state["teacher"].values() if v.is_floating_point())


def test_evaluate_gives_the_same_number_again(finished, walkers):
    folder, _ = finished
    output = run(folder, "evaluate.py", "--weights", "runs/tiny/last.pt", "--data", walkers, "--workers", 0)
    last = events(folder / "runs" / "tiny", "evaluate")[-1]
    assert f"{last['mAP']:.1%}" in output and f"{last['R1']:.1%}" in output


def test_denoise_alone_writes_an_annotation_that_training_takes(finished, walkers):
    folder, _ = finished
    output = run(folder, "denoise.py", "--weights", "runs/tiny/last.pt", "--data", walkers, "--workers", 0, "--out", "mine.json")
    assert "cross video" in output and "F1" in output
    assert (folder / "mine.png").exists() and json.loads((folder / "mine.summary.json").read_text())["identities"] > 1
    assert "exists already" in run(folder, "denoise.py", "--weights", "runs/tiny/last.pt", "--data", walkers, "--out", "mine.json", fails=True)
    output = run(folder, "train.py", "--data", walkers, "--labels", "mine.json", "--name", "labelled", *TINY)
    assert "stage 2" in output and "stage 1" not in output and "denoise " not in output
    output = run(folder, "train.py", "--data", walkers, "--weights", "runs/tiny/last.pt", "--name", "weighted", *TINY)
    assert "tensors matched, missing 0, left over" in output and "denoise" in output and "stage 1" not in output


def test_denoise_takes_features_from_anywhere_and_other_thresholds_without_extracting_again(finished, walkers, tmp_path):
    denoise = ["denoise.py", "--data", walkers]
    flags = [*denoise, "--weights", finished[0] / "runs" / "tiny" / "last.pt", "--workers", 0]
    run(tmp_path, *flags, "--out", "a.json")
    (file,) = tmp_path.glob("features-*.npy")
    stamp = file.stat().st_mtime_ns
    output = run(tmp_path, *flags, "--out", "b.json", "--sigma_cst", 0.4, "--sigma_drm", 0.3)
    assert f"features: found in {file.name}" in output and file.stat().st_mtime_ns == stamp
    assert "sigma_cst 0.400, sigma_drm 0.300" in output
    t = data.read_tracklets(walkers / "train")
    assert run(tmp_path, *denoise, "--index").split() == [t.path(i) for i in range(len(t))]
    features = np.load(file).astype(np.float32) * 3
    np.save(tmp_path / "mine.npy", features)
    run(tmp_path, *denoise, "--features", "mine.npy", "--out", "c.json")
    a, b, c = (data.read_labels(tmp_path / f"{name}.json", t) for name in "abc")
    assert (a == c).all() and not (a == b).all()
    with np.load(tmp_path / "a.space.npz") as space:
        assert sorted(space) == ["matrix", "mean", "prior"] and len(space["matrix"]) == features.shape[1]
    features[7] = np.nan
    np.save(tmp_path / "nan.npy", features)
    np.save(tmp_path / "short.npy", features[1:])
    np.savez(tmp_path / "archive.npz", features)
    features[7] = 0
    np.save(tmp_path / "zero.npy", features)
    for name, words in (("short.npy", f"a row for each of the {len(t):,} images"), ("nan.npy", "row 7 is zero or not finite"),
                        ("zero.npy", "row 7 is zero or not finite"), ("archive.npz", "got an archive"), ("no.npy", "No such file")):
        assert words in run(tmp_path, *denoise, "--features", name, "--out", "d.json", fails=True)
    assert "expected a name that ends in .json" in run(tmp_path, *denoise, "--out", "d.txt", fails=True)
    assert not list(tmp_path.glob("d.*")) and not list(tmp_path.glob("*scratch*")) and not list(tmp_path.glob(".*"))
    two = tmp_path / "two"
    two.mkdir()
    run(two, *flags, launcher=[*TORCHRUN, "--nproc_per_node=2"])
    assert np.abs(np.load(next(two.glob("features-*.npy"))) - np.load(file)).max() < 2e-3


def test_the_paper_alone_says_the_noise_of_every_level(finished, walkers, tmp_path):
    """denoise.py --paper: n_S and its two parts, a line a level, as the summary and the library have them."""
    weights = finished[0] / "runs" / "tiny" / "last.pt"
    output = run(tmp_path, "denoise.py", "--data", walkers, "--weights", weights, "--workers", 0, "--paper", "--r_s", 9, "--sigma_drm", 0.01)
    assert "sigma_cst 0.200, sigma_drm 0.010, r_s 9" in output
    t = data.read_tracklets(walkers / "train")
    features = np.load(next(tmp_path.glob("features-*.npy")))
    reports = []
    labels = denoise(features, t.video, t.track, t.frame, None, 0.01, 9, paper=True, report=lambda *line: reports.append(line))
    assert (data.read_labels(tmp_path / "identities.json", t) == labels).all()
    levels = json.loads((tmp_path / "identities.summary.json").read_text())["levels"]
    assert [level["noise"] for level in levels] == [pytest.approx(n_S) for _, _, n_S in reports]
    for name, found, n_S in reports:
        (line,) = [line for line in output.splitlines() if line.startswith(name + " ")]
        numbers = [f"{found.max() + 1:,}", f"{(found >= 0).sum():,}"] + [f"{share:.2f}" for share in n_S]
        assert line[len(name) :].split()[:5] == numbers
    assert not (tmp_path / "identities.space.npz").exists() and (tmp_path / "identities.png").stat().st_size > 500


def test_the_benchmark_of_scale_runs(tmp_path):
    output = run(tmp_path, ROOT / "tests" / "benchmark.py", "scale", "--images", 3000, "--ranges", 30, 60)
    assert "| 3,000 |" in output


def test_the_same_command_again_says_that_it_is_done(finished, walkers):
    folder, _ = finished
    before = (folder / "runs" / "tiny" / "log.jsonl").read_text()
    output = run(folder, "train.py", "--data", walkers, "--name", "tiny", *TINY)
    assert "at its end" in output and (folder / "runs" / "tiny" / "log.jsonl").read_text() == before


def test_other_settings_in_the_same_folder_are_refused(finished, walkers):
    folder, _ = finished
    output = run(folder, "train.py", "--data", walkers, "--name", "tiny", *TINY, "--lr", "0.5", fails=True)
    assert "made with other settings" in output and "--lr" in output


def test_a_run_that_was_stopped_ends_as_one_that_was_not(finished, walkers, tmp_path):
    """SIGTERM in the middle of stage 1: a checkpoint is written, and the same command ends with the same weights."""
    arguments = command("train.py", "--data", walkers, "--name", "tiny", *TINY)
    process = subprocess.Popen(arguments, cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step" in line and "left" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM and "the same command goes on" in rest
    halfway = torch.load(tmp_path / "runs" / "tiny" / "last.pt", weights_only=True)
    assert 0 < halfway["step"] < 12
    with open(tmp_path / "runs" / "tiny" / "log.jsonl", "a") as log:
        log.write('{"event": "train", "stage": "tracklet", "step": 999}\n')  # logged after the checkpoint, then lost
    assert "resume" in run(tmp_path, "train.py", "--data", walkers, "--name", "tiny", *TINY)
    ends = [torch.load(folder / "runs" / "tiny" / "last.pt", weights_only=True)["teacher"] for folder in (finished[0], tmp_path)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    steps = [[(e["stage"], e["step"], e["loss"]) for e in events(folder / "runs" / "tiny", "train")] for folder in (finished[0], tmp_path)]
    assert steps[0] == steps[1]


def test_two_processes_share_the_work_and_find_the_same_identities(finished, walkers, tmp_path):
    """The same weights in one process and in two: the same features and labels, and training that goes through."""
    weights = finished[0] / "runs" / "tiny" / "last.pt"
    flags = ["train.py", "--data", walkers, "--weights", weights, "--name", "tiny", *TINY, "--rounds", 1]
    run(tmp_path, *flags, launcher=[*TORCHRUN, "--nproc_per_node=2"])
    run(tmp_path, "denoise.py", "--data", walkers, "--weights", weights, "--workers", 0, "--r_s", 130)  # as the demo has it
    t = data.read_tracklets(walkers / "train")
    one, two = (data.read_labels(tmp_path / file, t) for file in ("identities.json", "runs/tiny/identities.json"))
    assert pairwise_scores(two, one)["f1"] > 0.99
    first, *_, last = events(tmp_path / "runs" / "tiny", "evaluate")
    assert first["mAP"] == pytest.approx(events(finished[0] / "runs" / "tiny", "evaluate")[0]["mAP"], abs=1e-6)  # random weights
    assert last["stage"] == "cion" and all(np.isfinite(e["loss"]) for e in events(tmp_path / "runs" / "tiny", "train"))


def test_what_cannot_work_is_said_before_the_first_step(walkers, tmp_path):
    assert "no such folder" in run(tmp_path, "train.py", "--data", tmp_path / "nowhere", *TINY, fails=True)
    assert "hold people out" in run(tmp_path, "train.py", "--data", walkers.parent, *TINY, fails=True)
    assert "is not a multiple of K=4" in run(tmp_path, "train.py", "--data", walkers, *TINY, "--batch", 4, launcher=[*TORCHRUN, "--nproc_per_node=2"], fails=True)
    (tmp_path / "bad.json").write_text('[{"file_path": "../../etc/passwd.jpg", "id": 1}]')
    assert "leave the folder" in run(tmp_path, "train.py", "--data", walkers, "--labels", "bad.json", *TINY, fails=True)
    torch.save({"layer9.weight": torch.ones(3)}, tmp_path / "bad.pt")
    assert "of the model's parameters matched" in run(tmp_path, "train.py", "--data", walkers, "--weights", "bad.pt", *TINY, fails=True)


def test_a_few_broken_images_are_skipped_and_reported_many_stop_the_run(walkers, tmp_path):
    shutil.copytree(walkers, tmp_path / "set")
    t = data.read_tracklets(tmp_path / "set" / "train")
    (tmp_path / "set" / "train" / t.path(3)).write_bytes(b"broken")
    output = run(tmp_path, "train.py", "--data", "set", "--name", "broken", *TINY)
    assert "1 unreadable images were skipped" in output
    labels = data.read_labels(tmp_path / "runs" / "broken" / "identities.json", t)
    assert labels[3] == -1
    for i in range(0, len(t), 20):
        (tmp_path / "set" / "train" / t.path(i)).write_bytes(b"broken")
    assert "cannot be read as JPEG" in run(tmp_path, "train.py", "--data", "set", "--name", "other", *TINY, fails=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(walkers, tmp_path):
    output = run(tmp_path, "train.py", "--data", walkers, "--name", "nan", *TINY, "--student_temp", "1e-45", fails=True)
    assert "not finite" in output or "the loss is" in output
    state = torch.load(tmp_path / "runs" / "nan" / "last.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state["teacher"].values() if v.is_floating_point())


def test_a_benchmark_is_evaluated_with_everything_on(finished, market, tmp_path):
    weights = finished[0] / "runs" / "tiny" / "last.pt"
    flags = ["evaluate.py", "--weights", weights, "--data", market, "--workers", 0, "--flip", "--rerank", "--show", 13, "--out", tmp_path / "sheets"]
    output = run(tmp_path, *flags, "--export", "features.npz")
    for text in ("tensors matched, missing 0", "query: ", "gallery: ", "junk left out", "last + flip ", "last + flip, re-ranked ", "features: features.npz"):
        assert text in output, output
    assert sorted(file.name for file in (tmp_path / "sheets").iterdir()) == [f"last-{market.name}-ranked-0{n}.png" for n in (1, 2)]
    with np.load(tmp_path / "features.npz") as f:
        arrays = {name: f[name] for name in f}
    assert len(arrays["features"]) == len(arrays["paths"]) == len(arrays["query"]) + len(arrays["gallery"])
    assert all((market / path).is_file() for path in arrays["paths"])
    assert "features.npz: exists already" in run(tmp_path, *flags, "--export", "features.npz", fails=True)
    # two processes share the images and come to the same bits
    again = run(tmp_path, *flags, "--export", "two.npz", launcher=[*TORCHRUN, "--nproc_per_node=2"])
    with np.load(tmp_path / "two.npz") as f:
        assert all(np.array_equal(f[name], arrays[name]) for name in arrays)
    table = lambda text: [line.split()[-8:] for line in text.splitlines() if line.startswith("last")]
    assert table(again) == table(output) and len(table(output)) == 2 and table(output)[0] != table(output)[1]
    run(tmp_path, *flags[:7], "--size", 48, 24, "--export", "other.npz")
    run(tmp_path, *flags[:7], "--export", "plain.npz")
    assert all(not np.allclose(np.load(tmp_path / f"{name}.npz")["features"], arrays["features"], atol=1e-4) for name in ("other", "plain"))


def test_what_evaluate_refuses(finished, market, tmp_path):
    weights = finished[0] / "runs" / "tiny" / "last.pt"
    evaluate = lambda data, *flags: run(tmp_path, "evaluate.py", "--weights", weights, "--data", data, "--workers", 0, "--export", "out.npz", *flags, fails=True)
    copy = tmp_path / "copy"
    shutil.copytree(market, copy)
    for file in (copy / "bounding_box_test").iterdir():  # every camera of the gallery is the first
        file.rename(file.with_name(file.name.replace(file.name.split("_")[1], "c1s1")))
    for file in (copy / "query").iterdir():
        if "_c1s" not in file.name:
            file.unlink()
    assert "under the query's own camera" in evaluate(copy)
    for file in (copy / "bounding_box_test").iterdir():
        file.rename(file.with_name(f"9{file.name.lstrip('-')}"))
    assert "no image of their identities is in the gallery" in evaluate(copy)
    for file in sorted((copy / "bounding_box_test").iterdir())[:50]:
        file.write_bytes(b"half a JPEG")
    assert "images cannot be read as JPEG (more than 1%)" in evaluate(copy)
    shutil.rmtree(copy / "query")
    assert "has bounding_box_test but no query" in evaluate(copy)
    assert "does not say which architecture" in run(tmp_path, "evaluate.py", "--weights", save_plain(tmp_path), "--data", market, fails=True)
    assert "--show -1: expected 0 or more" in evaluate(market, "--show", -1)
    assert not list(tmp_path.glob("*.npz*"))


def save_plain(folder):
    from model import build

    torch.save(build("r10ibn").state_dict(), folder / "plain.pth")
    return folder / "plain.pth"


def test_a_damaged_image_is_left_out_and_said(finished, market, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(market, copy)
    victim = next(file for file in sorted((copy / "bounding_box_test").iterdir()) if not file.name.startswith("-1"))
    victim.write_bytes(victim.read_bytes()[:200])
    output = run(tmp_path, "evaluate.py", "--weights", finished[0] / "runs" / "tiny" / "last.pt", "--data", copy, "--workers", 0)
    assert f"1 images cannot be read and are left out, the first: bounding_box_test/{victim.name}" in output and "mAP" in output


def test_crops_of_a_video_can_be_trained_on(tmp_path):
    """Frames and tracks to tracklets, to a run: the commands that the README gives for videos of one's own."""
    from torchvision.io import encode_jpeg

    generator = torch.Generator().manual_seed(0)
    for video in range(3):
        (tmp_path / f"v{video}").mkdir()
        for n in range(1, 7):
            frame = torch.randint(0, 256, (3, 9, 16), dtype=torch.uint8, generator=generator).repeat_interleave(10, 1).repeat_interleave(10, 2)
            (tmp_path / f"v{video}" / f"{n:06d}.jpg").write_bytes(encode_jpeg(frame).numpy().tobytes())
        rows = [f"{n},{track},{20 * track},10,20,50,1,-1,-1,-1\n" for n in range(1, 7) for track in range(7)]
        (tmp_path / f"v{video}.txt").write_text("".join(rows))
        output = run(tmp_path, "data.py", "crop", "--video", f"v{video}", "--tracks", f"v{video}.txt", "--out", "crops", "--min_size", 20, 10)
        assert "42 crops of 7 tracks on 6 frames" in output
    assert "exists already" in run(tmp_path, "data.py", "crop", "--video", "v0", "--tracks", "v0.txt", "--out", "crops", fails=True)
    output = run(tmp_path, "train.py", "--data", "crops", "--name", "own", *TINY, "--batch", 8)
    assert "3 videos, 21 tracklets, 126 images" in output and "stage 1" in output


def test_a_network_of_another_library_is_trained_and_evaluated(walkers, tmp_path):
    tiny = [flag if flag != "r10ibn" else "mobilenet_v3_small" for flag in TINY]
    output = run(tmp_path, "train.py", "--data", walkers, *tiny, "--epochs", 0, 0)
    assert "mobilenet_v3_small, 1.5 M parameters" in output
    output = run(tmp_path, "evaluate.py", "--data", walkers, "--weights", f"runs/{walkers.name}-mobilenet_v3_small/last.pt", "--workers", 0)
    assert "missing 0" in output and "mAP" in output
    refused = [flag if flag != "r10ibn" else "vit_b_16" for flag in TINY]
    assert "vit_b_16 cannot take images of 32x16" in run(tmp_path, "train.py", "--data", walkers, *refused, fails=True)


def test_a_damaged_checkpoint_falls_back_to_its_own_identities(finished, walkers, tmp_path):
    """Killed when identities had just been found anew, and the last checkpoint damaged: the one before it belongs to the identities before."""
    (tmp_path / "driver.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train

steps = 0

def make_views(*args, of=train.make_views):
    global steps
    steps += 1
    if steps == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    return of(*args)

train.make_views = make_views
train.main()
""")
    flags = ["--data", walkers, "--name", "tiny", *TINY, "--save_every", 5]
    run(tmp_path, tmp_path / "driver.py", *flags, fails=True)
    last = tmp_path / "runs" / "tiny" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    output = run(tmp_path, "train.py", *flags)
    assert "going back to previous.pt" in output and "at step 20" in output
    ends = [torch.load(folder / "runs" / "tiny" / "last.pt", weights_only=True) for folder in (finished[0], tmp_path)]
    assert torch.equal(ends[0]["labels"], ends[1]["labels"])
    assert all(torch.equal(ends[0]["teacher"][key], ends[1]["teacher"][key]) for key in ends[0]["teacher"])
