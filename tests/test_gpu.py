"""What only a GPU shows; skipped without one. Figures are printed: pytest -s tests/test_gpu.py"""
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TORCHRUN, checkpoint, events
from test_train import ONE

import evaluate
import train
from distill import make_views
from model import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_views_on_the_device_equal_the_cpus():
    s = train.Settings()
    images = torch.randint(0, 256, (6, 3, 256, 128), dtype=torch.uint8)
    views = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        views.append(make_views(images.to(device), train.view_kinds(s), generator))
    for cpu, cuda in zip(*views):
        difference = (cpu - cuda.cpu()).abs()
        # a CPU cuts and resizes in bytes, so colours are off by a part of 1/255, which is 0.017
        assert difference.mean() < 0.01 and (difference > 0.05).float().mean() < 1e-3


def test_features_ranking_and_reranking_equal_the_cpus(walkers):
    benchmark = evaluate.read_benchmark(walkers)
    torch.manual_seed(0)
    backbone = build("r10ibn")
    results = []
    for device in ("cpu", "cuda"):
        features = evaluate.extract(backbone.to(device), benchmark.images, (64, 32), device)
        plain = evaluate.evaluate_features(features, benchmark, device=device)
        again = evaluate.evaluate_features(features, benchmark, reranking=True, device=device)
        results.append((features, plain["mAP"], again["mAP"]))
    # convolutions may use TF32
    assert np.abs(results[0][0] - results[1][0]).max() < 5e-3
    assert results[0][1:] == pytest.approx(results[1][1:], abs=0.01)


def test_logits_are_those_of_float32():
    """A logit that TF32 is used for is off by 0.001, and over the temperature by 0.02."""
    torch.manual_seed(0)
    head = train.Head(64, 512)
    features = torch.randn(40, 64)
    cpu = head(features)
    cuda = head.cuda()(features.cuda()).cpu()
    assert (cpu - cuda).abs().max() < 2e-5
    with torch.autocast("cuda", torch.bfloat16):
        assert head(features.cuda()).dtype == torch.float32


@pytest.mark.parametrize("arch", ["r10ibn", "vit_tiny"])
def test_bfloat16_takes_the_step_of_float32(arch, run):
    """Losses of four steps to 0.05 of about 5, and the student's weights to a cosine of 0.999."""
    students = {}
    losses = {}
    for precision in ("float32", "bfloat16"):
        flags = [*ONE, "--arch", arch, "--epoch_steps", 4, "--precision", precision]
        flags += ["--lr", 6e-3]
        folder = run(*flags, "--name", precision)
        losses[precision] = [event["loss"] for event in events(folder, "train")]
        values = [value.flatten() for value in checkpoint(folder)["student"].values()]
        students[precision] = torch.cat(values)
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], atol=0.05)
    assert torch.cosine_similarity(*(v.double() for v in students.values()), dim=0) > 0.999


@pytest.mark.parametrize("arch", ["r10ibn", "vit_tiny"])
def test_fine_tuning_in_bfloat16(arch, few, in_process, tmp_path, monkeypatch):
    """Losses of four epochs of two steps, of about 3, to 0.15."""
    monkeypatch.chdir(tmp_path)
    losses = []
    for precision in ("float32", "bfloat16"):
        flags = f"--finetune {few} --arch {arch} --recipe demo --batch 16 --epochs 4"
        flags += f" --epoch_steps 2 --precision {precision} --workers 0 --name {precision}"
        in_process("train.py", *flags.split())
        trained = events(tmp_path / "runs" / precision, "train")
        losses.append([event["loss"] for event in trained])
    np.testing.assert_allclose(*losses, atol=0.15)


def test_compiled_networks_take_the_same_steps(run):
    flags = [*ONE, "--arch", "vit_tiny", "--epoch_steps", 4, "--precision", "float32"]
    losses = []
    for extra in ([], ["--compile"]):
        folder = run(*flags, *extra, "--name", f"run{len(extra)}")
        losses.append([event["loss"] for event in events(folder, "train")])
    np.testing.assert_allclose(*losses, atol=0.02)


@pytest.mark.parametrize("processes", [1, 2])
def test_nccl_and_synchronised_batch_norm(processes, walkers, tmp_path):
    """torchrun with as many GPUs: batch statistics are of the whole batch, so two processes see the
    losses of one."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    losses = []
    for n in {1, processes}:
        command = [*TORCHRUN, f"--nproc_per_node={n}"]
        flags = f"--data {walkers} --arch r10ibn --recipe demo --identities true"
        flags += " --tracklet_epochs 0 --K 2 --epochs 1 --epoch_steps 5 --log_every 1"
        flags += f" --precision float32 --name n{n}"
        subprocess.run([*command, str(ROOT / "train.py"), *flags.split()], cwd=tmp_path, check=True)
        losses.append([event["loss"] for event in events(tmp_path / "runs" / f"n{n}", "train")])
    assert len(losses[0]) == 5 and np.isfinite(losses[0]).all()
    np.testing.assert_allclose(losses[0], losses[-1], atol=2e-3)


def test_the_demo(tmp_path, capfd):
    """The quick start, as a user runs it: at least four times the mAP of random weights."""
    start = time.time()
    command = [*TORCHRUN, str(ROOT / "train.py")]
    command += ["--arch", "r10ibn", "--workers", "8"]
    subprocess.run(command, cwd=tmp_path, check=True)
    seconds = time.time() - start
    first, *_, last = events(tmp_path / "runs" / "walkers-r10ibn", "evaluate")
    with capfd.disabled():
        print(f"\ndemo: mAP {first['mAP']:.1%} to {last['mAP']:.1%} in {seconds:.0f} s")
    assert last["mAP"] > 4 * first["mAP"]


@pytest.mark.parametrize("arch", ["r50ibn", "vit_small"])
@pytest.mark.parametrize("K", [2, 8])
def test_a_step_of_the_papers_recipe(arch, K, run, monkeypatch, capfd):
    """120 images, 2 + 8 crops, 65,536 prototypes: images a second and memory, decoding left out."""
    images = torch.randint(0, 256, (120, 3, 256, 128), dtype=torch.uint8, device="cuda")

    def load_epoch(state, *_):
        for _ in range(15):
            if state.step == 5:
                torch.cuda.synchronize()
                times.append(time.time())
            yield images
        torch.cuda.synchronize()
        times.append(time.time())

    times = []
    monkeypatch.setattr(train, "load_epoch", load_epoch)
    torch.cuda.reset_peak_memory_stats()
    flags = ["--recipe", "paper", "--arch", arch, "--batch", 120, "--K", K, "--epoch_steps", 15]
    flags += ["--size", 256, 128, "--local_crops", 8, "--head", 2048, 256, "--prototypes", 65536]
    flags += ["--identities", "true", "--tracklet_epochs", 0, "--epochs", 1, "--log_every", 100]
    folder = run(*flags)
    rate = 10 * 120 / (times[1] - times[0])
    memory = torch.cuda.max_memory_allocated() / 2**30
    with capfd.disabled():
        name = torch.cuda.get_device_name()
        print(f"\n{arch}, K {K}: {rate:,.0f} images/s, {memory:.1f} GiB, {name}")
    assert checkpoint(folder)["step"] == 15
