"""The programs as a user runs them, from videos to mAP, in one process and in two."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TORCHRUN, checkpoint, events

import data
import train

TWO = [*TORCHRUN, "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run_captured(command, folder):
    """A process in a folder, with what it prints. One that hangs is a failure."""
    options = {"capture_output": True, "text": True, "timeout": 500}
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, **options)


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    """The folder of a run under torchrun that has come to its end, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    command = [*TORCHRUN, str(ROOT / "train.py"), "--data", str(few), *TINY, "--name", "run"]
    result = run_captured(command, folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "runs" / "run", result.stdout


def test_the_whole_chain_leaves_what_it_promises(finished, few):
    folder, output = finished
    for name in ("identities.json", "crops.jpg", "denoised.jpg", "retrieval.jpg"):
        assert (folder / name).stat().st_size > 500, name
    for word in ("data", "network", "step", "cross video", "evaluate", "result"):
        assert word in output
    assert not list(folder.glob(".*"))
    found = events(folder, "evaluate")
    assert [event["stage"] for event in found] == ["random", "tracklet", "round 1", "cion"]
    for event in found:
        assert 0 < event["mAP"] <= 1 and event["R1"] <= event["R5"] <= event["R10"] <= 1
    steps = events(folder, "train")
    assert [event["stage"] for event in steps] == ["tracklet"] * 3 + ["cion"] * 6
    assert [event["K"] for event in steps] == [2] * 6 + [4] * 3
    for event in steps:
        assert np.isfinite(event["loss"]) and event["images_per_second"] > 0
        assert 0 <= event["entropy"] and 1 <= event["prototypes_used"] <= 32
    first, last = events(folder, "denoise")
    assert 0 < first["f1_tracklets"] < 1 and "f1" in first
    labels = data.read_labels(folder / "identities.json", data.read_tracklets(few / "train"))
    assert labels.max() + 1 == last["identities"] and (labels >= 0).sum() == last["images_kept"]
    state = checkpoint(folder)
    assert state["step"] == 9 and np.array_equal(state["labels"], labels)
    name = "backbone.conv1.weight"
    assert not torch.equal(state["teacher"][name], state["student"][name])


def test_evaluate_gives_the_same_number_again(finished, few, in_process, capsys):
    folder, _ = finished
    last = events(folder, "evaluate")[-1]
    for flags in (["--data", few], ["--data", few / "test", "--labels", few / "test.json"]):
        in_process("evaluate.py", "--weights", folder / "last.pt", *flags, "--workers", 0)
        output = capsys.readouterr().out
        assert f"{last['mAP']:.1%}" in output and f"{last['R1']:.1%}" in output


def test_denoise_alone_and_its_features_again(
    finished, few, in_process, tmp_path, monkeypatch, capsys
):
    """The same identities from a checkpoint, and from the features that it wrote; others by other
    thresholds. The index names the rows."""
    folder, _ = finished
    monkeypatch.chdir(tmp_path)
    flags = ["--data", few, "--r_s", 130]
    weights = folder / "last.pt"
    in_process("denoise.py", *flags, "--weights", weights, "--out", "a.json", "--workers", 0)
    assert "F1" in capsys.readouterr().out
    in_process("denoise.py", *flags, "--features", "a.features.npy", "--out", "b.json")
    flags += ["--features", "a.features.npy"]
    in_process("denoise.py", *flags, "--out", "c.json", "--sigma_drm", 0.01)
    assert "sigma_drm 0.010" in capsys.readouterr().out
    t = data.read_tracklets(few / "train")
    a, b, c = (data.read_labels(f"{name}.json", t) for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    in_process("denoise.py", "--data", few, "--index")
    assert capsys.readouterr().out.split() == [t.path(i) for i in range(len(t))]
    with pytest.raises(ValueError, match="exists already"):
        in_process("denoise.py", *flags, "--out", "a.json")
    Path("d.jpg").touch()
    with pytest.raises(ValueError, match="d.jpg: exists already"):
        in_process("denoise.py", *flags, "--out", "d.json")
    Path("d.jpg").unlink()
    with pytest.raises(ValueError, match="--out d.jpg: expected a name that ends in .json"):
        in_process("denoise.py", *flags, "--out", "d.jpg")
    with pytest.raises(ValueError, match="a.features.npy: features of an earlier .*--features"):
        in_process("denoise.py", "--data", few, "--weights", weights, "--out", "a.json")
    features = np.load("a.features.npy").astype(np.float32)
    np.save("short.npy", features[1:])
    features[7] = np.nan
    np.save("nan.npy", features)
    Path("text.npy").write_text("no numbers")
    np.savez("several.npz", features=features)
    for name, words in (
        ("short.npy", r"short.npy: .* each of 305 images of --index; .* shape \(304, 256\)"),
        ("text.npy", "text.npy: expected a .npy file of floats"),
        ("several.npz", "several.npz: expected a .npy file of floats"),
        ("nan.npy", "row 7 is zero"),
    ):
        with pytest.raises(ValueError, match=words):
            in_process("denoise.py", *flags, "--features", name, "--out", "d.json")
    monkeypatch.setenv("RANK", "1")  # of several processes the first one denoises
    in_process("denoise.py", *flags, "--out", "d.json")
    assert not list(tmp_path.glob("d*")) and not list(tmp_path.glob(".*"))


def test_labels_and_weights_replace_stages(finished, few, tmp_path):
    """An annotation replaces stage 1 and denoising, a checkpoint stage 1 alone."""
    folder, _ = finished
    flags = [sys.executable, str(ROOT / "train.py"), "--data", str(few), *TINY, "--name", "run"]
    for flag, file, stages in (
        ("--labels", folder / "identities.json", ["random", "cion"]),
        ("--weights", folder / "last.pt", ["weights", "round 1", "cion"]),
    ):
        command = [*flags, flag, str(file), "--name", flag[2:]]
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True)
        run_folder = tmp_path / "runs" / flag[2:]
        found = events(run_folder, "evaluate")
        assert [event["stage"] for event in found] == stages
        assert {event["stage"] for event in events(run_folder, "train")} == {"cion"}
    assert found[0]["mAP"] == events(folder, "evaluate")[-1]["mAP"]  # the end's weights


def test_two_processes_denoise_as_one(finished, few, in_process, tmp_path):
    folder, _ = finished
    flags = ["--data", few, "--weights", folder / "last.pt", "--workers", 0, "--r_s", 130]
    in_process("denoise.py", *flags, "--out", tmp_path / "one.json")
    command = [*TWO, ROOT / "denoise.py", *flags, "--out", tmp_path / "two.json"]
    subprocess.run([*map(str, command)], env=ENVIRONMENT, check=True)
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


PATHS = [str(ROOT), str(ROOT / "tests")]
# A process dies in its fourth step; torchrun starts both anew, from the checkpoint of step 2.
DRIVER = """
import os, signal, sys
sys.path[:0] = {paths!r}
import torch
import train
from test_end_to_end import WithoutBatchStatistics

torch.set_num_threads(1)
train.build = lambda arch: WithoutBatchStatistics()
make_views = train.{make_views}
steps = []

def dies(*args):
    steps.append(0)
    if len(steps) == 4 and os.environ["RANK"] + os.environ["TORCHELASTIC_RESTART_COUNT"] == "10":
        os.kill(os.getpid(), signal.SIGKILL)
    return make_views(*args)

train.{make_views} = dies
train.main()
"""


class WithoutBatchStatistics(torch.nn.Module):
    """However a batch is split, it computes the same."""

    embed_dim = 16

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 4, 4)
        self.norm = torch.nn.GroupNorm(2, 16)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


def test_two_processes_equal_one_even_when_one_is_killed(few, tmp_path, run, monkeypatch):
    flags = "--tracklet_epochs 0 --K 4 --epochs 1 --epoch_steps 6 --save_every 2 --r_s 20"
    flags += " --no-head_norm --centering ema --lr 1e-2"
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", lambda arch: WithoutBatchStatistics())
        folder = run(*flags.split())
    one = checkpoint(folder)
    (tmp_path / "driver.py").write_text(DRIVER.format(paths=PATHS, make_views="make_views"))
    command = [*TWO, "--max-restarts=1", tmp_path / "driver.py", "--data", few, *TINY]
    command += [*flags.split(), "--name", "two"]
    command = [*map(str, command)]
    result = run_captured(command, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resume" in result.stdout and "at step 2" in result.stdout
    two = checkpoint(tmp_path / "runs" / "two")
    assert torch.equal(two["labels"], one["labels"])
    losses = [events(name, "train")[-1]["loss"] for name in (folder, tmp_path / "runs" / "two")]
    assert losses[0] == pytest.approx(losses[1], abs=4e-6)
    for name in ("student", "teacher"):
        for key, value in one[name].items():
            torch.testing.assert_close(two[name][key], value, atol=1e-5, rtol=0)
    torch.testing.assert_close(two["center"], one["center"], atol=1e-5, rtol=0)


def test_a_failing_loader_ends_the_run(few, tmp_path):
    """No image of a video can be read: the workers' error ends the process, by itself."""
    shutil.copytree(few, tmp_path / "set")
    t = data.read_tracklets(tmp_path / "set" / "train")
    for i in np.flatnonzero(t.video == 0):
        (t.root / t.path(i)).write_bytes(b"broken")
    command = [sys.executable, str(ROOT / "train.py"), "--data", "set", *TINY, "--workers", "2"]
    command += ["--identities", "true"]
    result = run_captured(command, tmp_path)
    assert result.returncode == 1 and "cannot be read" in result.stderr
