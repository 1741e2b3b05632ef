"""train.py: settings, schedules, and what is refused before the first step."""
import dataclasses
import fcntl
import json
import math
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import distill
import train


def test_recipes_and_flags_that_override_them():
    assert train.parse_settings([]).recipe == "demo" and train.parse_settings([]).size == (64, 32)
    paper = train.parse_settings(["--data", "my/set"])
    assert (paper.recipe, paper.size, paper.K, paper.name) == ("paper", (256, 128), (2, 4, 6, 8), "set-r50ibn")
    mine = train.parse_settings(["--arch", "r10ibn", "--size", "32", "16", "--K", "2", "4", "--epochs", "1", "3", "--lr", "1e-3", "--no-head_norm"])
    assert (mine.size, mine.K, mine.epochs, mine.lr, mine.head_norm, mine.name) == ((32, 16), (2, 4), (1, 3), 1e-3, False, "walkers-r10ibn")
    assert mine.batch == train.DEMO["batch"]
    steps = {arch: train.parse_settings(["--arch", arch]).epoch_steps for arch in ("r10ibn", "vit_tiny", "r18ibn", "r50ibn")}
    assert steps == {"r10ibn": 90, "vit_tiny": 72, "r18ibn": 36, "r50ibn": 36}
    assert train.parse_settings(["--arch", "r10ibn", "--epoch_steps", "5"]).epoch_steps == 5
    assert train.parse_settings(["--arch", "r10ibn", "--recipe", "paper"]).epoch_steps == train.Settings().epoch_steps


def test_the_paper_recipe_is_the_papers():
    s = train.Settings()
    assert (s.size, s.local_size, s.local_crops, s.global_scale, s.local_scale, s.ratio) == ((256, 128), (128, 64), 8, (0.8, 1.0), (0.05, 0.8), (0.4, 0.6))
    assert (s.jitter, s.grey, s.blur, s.solarize) == ((0.4, 0.4, 0.2, 0.1), 0.2, (1.0, 0.1, 0.5), 0.2)
    assert (s.K, tuple(np.cumsum(s.epochs)), s.batch) == ((2, 4, 6, 8), (40, 60, 80, 100), 120 * 8)
    assert (s.prototypes, s.hidden, s.bottleneck, s.student_temp, s.teacher_temp, s.centering) == (65536, 2048, 256, 0.1, (0.04, 0.04), "ema")
    assert (s.lr, s.min_lr, s.warmup, s.weight_decay, s.clip, s.ema, s.center_momentum) == (5e-4, 1e-6, 10 / 100, (0.04, 0.4), 3.0, (0.996, 1.0), 0.9)
    assert s.loss == "paper"
    first, second, *local = train.view_kinds(s)
    assert len(local) == 8 and {(kind.size, kind.scale, kind.blur_p, kind.solarize_p) for kind in local} == {((128, 64), (0.05, 0.8), 0.5, 0.0)}
    assert (first.blur_p, second.blur_p, first.solarize_p, second.solarize_p) == (1.0, 0.1, 0.0, 0.2)


def test_every_setting_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        train.parse_settings(["--help"])
    text = capsys.readouterr().out
    for field in train.Settings.__dataclass_fields__:
        assert f"--{field}" in text
    assert "share of the image's area in a global crop" in text


@pytest.mark.parametrize("flags, message", [
    (["--arch", "resnet"], "unknown arch 'resnet'; known: r10ibn"),
    (["--batch", "30", "--K", "4", "--epochs", "1"], "--batch 30 over 1 processes is not a multiple of K=4"),
    (["--precision", "float16"], "expected auto, float32 or bfloat16"),
    (["--loss", "dino"], "expected paper or release"),
    (["--K", "2", "4", "--epochs", "1"], r"2 phases and --epochs \(1,\) 1"),
    (["--K", "0", "--epochs", "1"], r"--K \(0,\): expected numbers above 0"),
    (["--identities", "all"], "expected instance, tracklet, cion or true"),
    (["--identities", "true", "--labels", __file__], "goes without --labels"),
    (["--levels", "4"], "levels=4: expected 1, 2 or 3"),
    (["--rounds", "0"], "expected numbers above 0"),
    (["--recipe", "quick"], "expected paper or demo"),
    (["--centering", "none"], "expected ema or sinkhorn"),
    (["--sigma_cst", "3"], r"lies in \[0, 2\]"),
    (["--sigma_drm", "nan"], r"lies in \[0, 2\]"),
    (["--denoising", "theirs"], "expected ours or paper"),
    (["--nearness", "-1"], "nearness=-1.0: expected a cosine distance"),
    (["--ratio", "0.6", "0.4"], r"--ratio \(0.6, 0.4\): expected two numbers above 0, the smaller first"),
    (["--local_scale", "0.05", "1.5"], "at most 1"),
    (["--r_s", "0"], "r_s=0: the sliding range"),
    (["--teacher_temp", "0.04", "0"], "expected numbers above 0"),
    (["--save_every", "0"], "expected numbers above 0"),
    (["--warmup", "1"], "expected a share of the steps"),
    (["--lr", "-1"], "--lr -1.0: expected numbers of 0 or more"),
    (["--name", "../elsewhere"], "not a path"),
    (["--canvas", "16", "16"], "smaller than --size"),
    (["--local_size", "16", "8"], "at least 32 16, which the networks need"),
    (["--weights", "nothing.pt"], "nothing.pt: expected a file"),
    (["--labels", "nothing.json"], "nothing.json: expected a file"),
])
def test_settings_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        train.parse_settings(flags)


def test_denoising_is_called_with_what_the_flags_say():
    """Every option by its own flag; thresholds that are not given are left to be calibrated."""
    options = train.denoising_options(train.parse_settings([]))
    assert not options["paper"]
    assert options["sigma_cst"] is None and options["sigma_drm"] is None
    flags = "--denoising paper --sigma_cst 0.5 --sigma_drm 0 --r_s 7 --levels 2 --nearness 0.3"
    flags += " --no-center --no-whiten --no-cut --no-cannot_link --no-closest_first"
    assert train.denoising_options(train.parse_settings(flags.split())) == {
        "paper": True,
        "sigma_cst": 0.5,
        "sigma_drm": 0.0,
        "r_s": 7,
        "levels": 2,
        "nearness": 0.3,
        "center": False,
        "whiten": False,
        "cut": False,
        "cannot_link": False,
        "closest_first": False,
    }


def test_schedules_at_their_corners():
    """10 + 6 epochs of 10 and 15 steps, by hand: warm-up end, phase change, middle and last step."""
    s = train.Settings(batch=512, lr=1.0, min_lr=0.5, warmup=0.2, weight_decay=(0.04, 0.4), ema=(0.996, 1.0), teacher_temp=(0.02, 0.04))
    total = 10 * 10 + 10 * 10
    at = lambda step: train.schedule(s, step, total)
    peak = 1.0 * 512 / 256
    assert at(0) == (pytest.approx(peak / 40), pytest.approx(0.04), pytest.approx(0.996), pytest.approx(0.02))
    assert at(20).lr == pytest.approx(peak * 21 / 40) and at(20).teacher_temp == pytest.approx(0.03)  # halfway up
    assert at(39).lr == at(40).lr == pytest.approx(peak) and at(39).teacher_temp < 0.04  # the warm-up's last step and the next
    assert at(40).teacher_temp == at(199).teacher_temp == 0.04
    assert at(100) == (pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 60 / 160)) / 2), pytest.approx(0.22), pytest.approx(0.998), 0.04)  # phase change
    assert at(120).lr == pytest.approx(1.25)  # halfway down
    assert at(199).lr == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 159 / 160)) / 2) and at(199).lr - 0.5 < 2e-4
    assert 0.4 - at(199).weight_decay < 3e-5 and 1 - at(199).ema < 3e-7
    lrs = [at(step).lr for step in range(total)]
    assert np.all(np.diff(lrs[:40]) > 0) and np.all(np.diff(lrs[40:]) < 0)
    assert train.schedule(dataclasses.replace(s, warmup=0.0), 0, total).lr == pytest.approx(peak)  # without a warm-up


def test_the_readmes_commands_can_split_their_batches():
    lines = re.findall(r"torchrun (.*?)train\.py([^#`\n]*)", (ROOT / "README.md").read_text())
    assert len(lines) >= 5
    for launcher, flags in lines:
        processes = math.prod(int(n) for n in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", launcher))
        s = train.parse_settings(flags.split())
        assert all(s.batch % (processes * K) == 0 for K in s.K), (launcher, flags)


def test_identities_are_found_evenly_over_stage_2():
    s = train.Settings(K=(2, 4), epochs=(2, 4), tracklet_epochs=1, rounds=3)
    assert train.plan_epochs(s) == ([2, 2, 2, 4, 4, 4, 4], {1: "tracklet", 3: "round 1", 5: "round 2"})
    assert train.plan_epochs(dataclasses.replace(s, rounds=1))[1] == {1: "tracklet"}
    assert train.plan_epochs(dataclasses.replace(s, weights="file", rounds=2)) == ([2, 2, 4, 4, 4, 4], {0: "weights", 3: "round 1"})
    assert train.plan_epochs(dataclasses.replace(s, labels="file")) == ([2, 2, 4, 4, 4, 4], {})
    for who in ("instance", "tracklet", "true"):  # the same number of epochs
        Ks, finds = train.plan_epochs(dataclasses.replace(s, identities=who))
        assert len(Ks) == 7 and not finds


def test_gradients_are_clipped_one_parameter_at_a_time():
    network = torch.nn.Linear(2, 2)
    network.weight.grad, network.bias.grad = torch.tensor([[3.0, 0], [0, 4]]), torch.tensor([0.3, 0.4])
    torch.testing.assert_close(train.clip_gradients(network, 2.5), torch.tensor([5.0, 0.5]))
    torch.testing.assert_close(network.weight.grad, torch.tensor([[1.5, 0], [0, 2]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(network.bias.grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("precision, expected", [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_is_what_was_asked_for(precision, expected):
    with train.networks_in_bfloat16(train.Settings(precision=precision), torch.device("cpu")):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_a_checkpoint_with_a_flipped_bit_is_not_read(tmp_path):
    torch.save({"weights": torch.arange(5000.0), "step": 3}, tmp_path / "last.pt")
    state = train.read_state(tmp_path / "last.pt")
    assert state["step"] == 3 and state["weights"][-1] == 4999
    whole = bytearray((tmp_path / "last.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(whole)
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("flipped.pt", "half.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            train.read_state(tmp_path / name)


# ---------------------------------------------------------------- one step


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a tiny network, in this process."""
    monkeypatch.chdir(tmp_path)
    s = train.parse_settings("--recipe demo --arch r10ibn --size 32 16 --local_size 32 16 --canvas 32 16 --batch 8 --hidden 16 --bottleneck 8 "
                             "--prototypes 16 --clip 0.001 --workers 0".split())
    run = train.Run(s)
    run.folder.mkdir(parents=True)
    yield run
    torch.distributed.destroy_process_group()


def take_steps(run, walkers, monkeypatch, steps=1, epoch=0):
    """Steps on true identities, K 2; the optimizer, and what the loss of each step was given, as (student, teacher, center, K, ...)."""
    tracklets = data.read_tracklets(walkers / "train")
    given = []

    def loss(student, teacher, center, *others):
        given.append((student.detach().clone(), teacher.clone(), center.clone(), *others))
        return distill.identity_loss(student, teacher, center, *others)

    monkeypatch.setattr(train, "identity_loss", loss)
    optimizer = train.make_optimizer(run.student)
    train.train_epoch(run, run.student, optimizer, tracklets, data.read_labels(walkers / "train.json", tracklets), 2, epoch, steps, steps)
    return optimizer, given


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_does_what_its_schedule_says(run, frozen, walkers, monkeypatch):
    run.settings.freeze_last = int(frozen)
    monkeypatch.setattr(train, "schedule", lambda *_: train.Schedule(lr=1e-3, weight_decay=0.5, ema=0.9, teacher_temp=0.04))
    before = {name: p.detach().clone() for name, p in run.student.named_parameters()}
    optimizer, _ = take_steps(run, walkers, monkeypatch)
    decaying, others = (group["params"] for group in optimizer.param_groups)
    assert {p.ndim for p in others} == {1} and min(p.ndim for p in decaying) == 2
    assert len(decaying) + len(others) == len(list(run.student.parameters()))
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.5), (1e-3, 0.0)]
    for name, old in before.items():
        new, teacher = run.student.get_parameter(name).detach(), run.teacher.get_parameter(name)
        if name in ("backbone.conv1.weight", "head.mlp.0.bias", "head.last_layer.weight"):
            assert torch.equal(new, old) == (frozen and name == "head.last_layer.weight"), name
        torch.testing.assert_close(teacher, 0.9 * old + 0.1 * new, atol=1e-6, rtol=0)
        state = optimizer.state.get(run.student.get_parameter(name))
        if state:  # AdamW's mean is a tenth of the gradient: clipped to 0.001, and not less than the largest were
            assert state["exp_avg"].norm() <= 1.01e-4, name
    largest = max(state["exp_avg"].norm() for state in optimizer.state.values())
    assert largest > 0.9e-4


def test_the_loss_is_given_what_the_settings_say(run, walkers, monkeypatch):
    run.settings.loss, run.settings.student_temp, run.settings.teacher_temp = "release", 0.2, (0.03, 0.07)
    _, given = take_steps(run, walkers, monkeypatch)
    student, teacher, _, *others = given[0]
    assert student.shape == (4, 8, 16) and teacher.shape == (2, 8, 16) and student.dtype == teacher.dtype == torch.float32
    assert others == [2, 0.2, 0.03, "release"]


def test_the_running_center_moves_after_it_was_used(run, walkers, monkeypatch):
    run.settings.centering, run.settings.center_momentum = "ema", 0.9
    _, [(_, first, center, *_), (_, second, moved, *_)] = take_steps(run, walkers, monkeypatch, steps=2)
    assert not center.any()
    torch.testing.assert_close(moved, 0.1 * first.mean((0, 1)))
    torch.testing.assert_close(run.center, 0.9 * moved + 0.1 * second.mean((0, 1)))


def test_sinkhorn_has_the_teachers_temperature(run, walkers, monkeypatch):
    run.settings.centering, run.settings.teacher_temp = "sinkhorn", (0.07, 0.07)
    _, [(_, teacher, center, *_)] = take_steps(run, walkers, monkeypatch)
    torch.testing.assert_close(center, distill.sinkhorn(teacher, 0.07))
    assert (center - distill.sinkhorn(teacher, 0.04)).abs().max() > 1e-4 and not run.center.any()


def test_the_teacher_normalises_by_its_own_batch(run, walkers, monkeypatch):
    run.teacher.eval()  # as features leave it
    take_steps(run, walkers, monkeypatch)
    assert run.teacher.training and run.teacher.backbone.bn1.num_batches_tracked == 1


def test_what_is_not_finite_is_noticed(run, walkers, monkeypatch):
    run.check_finite()
    run.student.head.mlp[0].weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="last good state"):
        take_steps(run, walkers, monkeypatch)
    assert not (run.folder / "last.pt").exists()


# ---------------------------------------------------------------- the same run in other ways

DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
from torch import nn
import data, distill, train

torch.set_num_threads(1)

class WithoutBatchStatistics(nn.Module):  # so that any split of a batch computes the same
    embed_dim = 32

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.GroupNorm(2, 16), nn.ReLU(), nn.Conv2d(16, 32, 2, 2), nn.GroupNorm(2, 32), nn.ReLU())

    def forward(self, x):
        return self.layers(x).mean((2, 3))

train.build = lambda arch: WithoutBatchStatistics()
{more}
try:
    train.main()
except (ValueError, FloatingPointError) as error:
    sys.exit(f"train.py: {{error}}")
"""
FIVE_STEPS = "--recipe demo --arch small --size 32 16 --local_size 32 16 --canvas 32 16 --batch 16 --hidden 32 --bottleneck 16 --prototypes 32 --no-head_norm " \
             "--K 4 --epochs 1 --epoch_steps 5 --log_every 1 --workers 0 --lr 1e-2 --name run".split()


DIE = """
steps = 0

def make_views(*args, of=train.make_views):
    global steps
    steps += 1
    if steps == 4 and {when}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return of(*args)

train.make_views = make_views
"""


def drive(folder, walkers, *flags, processes=1, more="", torchrun=(), environment=None, fails=False):
    """Run train.py with a network without batch statistics on true identities, five steps; its output and its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), more=more))
    launcher = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *torchrun] if processes > 1 or torchrun else [])]
    command = [*launcher, folder / "driver.py", "--data", walkers, "--labels", walkers / "train.json", *FIVE_STEPS, *flags]
    result = subprocess.run([*map(str, command)], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}), capture_output=True, text=True, timeout=300)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr, folder / "runs" / "run"


def outcome(run):
    """Losses of all steps, and the student's and teacher's weights at the end."""
    losses = [e["loss"] for e in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if e["event"] == "train"]
    state = torch.load(run / "last.pt", weights_only=True)
    assert "cion" in state["results"]
    return losses, {f"{part}.{name}": value for part in ("student", "teacher") for name, value in state[part].items()}


def assert_same(one, other, tolerance=1e-5):
    assert len(one[0]) == len(other[0]) == 5
    np.testing.assert_allclose(one[0], other[0], atol=tolerance, rtol=0)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], atol=tolerance, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.fixture(scope="module", params=["ema", "sinkhorn"])
def five_steps(request, walkers, tmp_path_factory):
    """Five steps in one process: flags, and the outcome."""
    flags = ["--centering", request.param]
    _, run = drive(tmp_path_factory.mktemp("one"), walkers, *flags)
    return flags, outcome(run)


@pytest.fixture(scope="module")
def five(walkers, tmp_path_factory):
    """The same by the running center alone: its outcome."""
    return outcome(drive(tmp_path_factory.mktemp("one"), walkers, "--centering", "ema")[1])


def test_two_processes_with_half_the_batch_equal_one(five_steps, walkers, tmp_path):
    flags, one = five_steps
    assert len(set(one[0])) == 5  # no step repeats another
    assert_same(one, outcome(drive(tmp_path / "two", walkers, *flags, processes=2)[1]))


def test_frozen_prototypes_stay_and_the_rest_learns(walkers, tmp_path):
    _, frozen = outcome(drive(tmp_path / "frozen", walkers, "--centering", "ema", "--freeze_last", 1)[1])
    same = lambda name: torch.equal(frozen[f"student.{name}"], frozen[f"teacher.{name}"])  # both began alike
    assert same("head.last_layer.weight") and not same("head.mlp.0.weight") and not same("backbone.layers.0.weight")


@pytest.mark.parametrize("flags, words", [
    (("--teacher_temp", 100, 100), "uniform collapse"),
    (("--teacher_temp", 0.01, 0.01, "--center_momentum", 1), "collapse to one prototype"),
])
def test_a_collapse_is_named_once(flags, words, walkers, tmp_path):
    output, _ = drive(tmp_path, walkers, "--centering", "ema", *flags, "--epoch_steps", 20)
    assert output.count(words) == 1 and output.count("warning ") == 1


def test_the_number_of_workers_changes_nothing(five, walkers, tmp_path):
    other = outcome(drive(tmp_path / "workers", walkers, "--centering", "ema", "--workers", 2)[1])
    assert five[0] == other[0] and all(torch.equal(five[1][name], other[1][name]) for name in five[1])


def test_another_seed_changes_everything(five, walkers, tmp_path):
    other = outcome(drive(tmp_path / "seed", walkers, "--centering", "ema", "--seed", 1)[1])
    assert min(abs(a - b) for a, b in zip(five[0], other[0])) > 1e-4


def test_bfloat16_goes_the_same_way(five, walkers, tmp_path):
    losses, _ = outcome(drive(tmp_path, walkers, "--precision", "bfloat16", "--centering", "ema")[1])
    assert losses != five[0]
    np.testing.assert_allclose(losses, five[0], atol=0.05, rtol=0)


def test_the_releases_weighting_is_another_loss(five, walkers, tmp_path):
    losses, _ = outcome(drive(tmp_path, walkers, "--loss", "release", "--centering", "ema")[1])
    assert min(abs(a - b) for a, b in zip(losses, five[0])) > 1e-5


def test_a_run_goes_on_with_another_number_of_processes(five, walkers, tmp_path):
    drive(tmp_path, walkers, "--centering", "ema", "--save_every", 2, more=DIE.format(when="True", before="0"), fails=True)
    output, run = drive(tmp_path, walkers, "--centering", "ema", "--save_every", 2, processes=2)
    assert "step 2" in output and "resume" in output
    assert_same(five, outcome(run))


def test_two_machines_equal_one_even_when_one_of_them_loses_a_process(five, walkers, tmp_path):
    """Two torchrun agents that meet on the loopback, as the README says it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    die = DIE.format(when="os.environ['RANK'] == '1' and not os.path.exists('died')", before="open('died', 'w')")
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = ["--nnodes=2", "--max-restarts=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={meet}"]
    with ThreadPoolExecutor() as pool:
        run = lambda _: drive(tmp_path, walkers, "--centering", "ema", "--save_every", 2, more=die, torchrun=agent, environment=environment)
        outputs = list(pool.map(run, range(2)))
    assert sorted("stage 2" in output for output, _ in outputs) == [False, True]  # one of them speaks
    assert any("resume" in output and "step 2" in output for output, _ in outputs)
    assert_same(five, outcome(outputs[0][1]))


def test_torchrun_restarts_a_run_of_which_one_process_died(five, walkers, tmp_path):
    die = DIE.format(when="os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'", before="0")
    output, run = drive(tmp_path, walkers, "--centering", "ema", "--save_every", 2, processes=2, more=die, torchrun=["--max-restarts=1"])
    assert "resume" in output and "step 2" in output
    assert_same(five, outcome(run))


def test_a_second_run_in_the_same_folder_is_refused(walkers, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    with open(tmp_path / "runs" / "run" / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert "another run works in runs/run" in drive(tmp_path, walkers, fails=True)[0]


def test_processes_that_see_different_checkpoints_are_refused(walkers, tmp_path):
    """As on machines that do not share the folder: one finds a checkpoint, the other none."""
    drive(tmp_path, walkers)
    apart = "if os.environ['RANK'] == '1': train.Path = lambda *parts: __import__('pathlib').Path('elsewhere', *parts) if parts == ('runs',) else __import__('pathlib').Path(*parts)"
    output, _ = drive(tmp_path, walkers, processes=2, more=apart, fails=True)
    assert "must be on a file system that all machines share" in output


KILLS = """
kind, count = {kind!r}, {count}

def counting(function):
    def wrapped(*args, **kwargs):
        global count
        count -= 1
        return function(*args, last=count == 0, **kwargs)
    return wrapped

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if kind == "step":
    train.make_views = counting(lambda *args, last, of=train.make_views: die() if last else of(*args))
if kind == "writing":  # half of a checkpoint is on the disk
    def save(state, file, last, of=torch.save):
        of(state, file)
        if last:
            os.truncate(file, os.path.getsize(file) // 2)
            die()
    torch.save = counting(save)
if kind == "renaming":  # the old checkpoint has been moved, the new one not yet
    def replace(source, target, last, of=os.replace):
        of(source, target)
        if last:
            die()
    moving = counting(replace)
    data.os.replace = lambda a, b, of=os.replace: moving(a, b) if str(b).endswith("previous.pt") else of(a, b)
"""


@pytest.mark.parametrize("kills", [
    [("step", 3), ("writing", 2), ("renaming", 1)],
    [("renaming", 2), ("renaming", 1), ("writing", 1)],
])
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(kills, five, walkers, tmp_path):
    """SIGKILL before a step, in the middle of writing a checkpoint, between the two renames: the same command ends with the same bits."""
    for kind, count in kills:
        drive(tmp_path, walkers, "--centering", "ema", "--save_every", 1, more=KILLS.format(kind=kind, count=count), fails=True)
    output, run = drive(tmp_path, walkers, "--centering", "ema", "--save_every", 1)
    assert "resume" in output
    losses, weights = outcome(run)
    assert losses == five[0] and all(torch.equal(weights[name], five[1][name]) for name in weights)
    assert [file.name for file in run.glob(".*")] == [".lock"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(five, walkers, tmp_path):
    drive(tmp_path, walkers, "--centering", "ema", "--save_every", 1, more=KILLS.format(kind="step", count=4), fails=True)
    last = tmp_path / "runs" / "run" / "last.pt"
    whole = bytearray(last.read_bytes())
    whole[len(whole) // 2] ^= 255
    last.write_bytes(whole)
    output, run = drive(tmp_path, walkers, "--centering", "ema", "--save_every", 1)
    assert "last.pt is damaged" in output and "going back to previous.pt" in output and "step 2" in output
    losses, weights = outcome(run)
    assert losses == five[0] and all(torch.equal(weights[name], five[1][name]) for name in weights)
    assert (run / "damaged.pt").read_bytes() == whole
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes(b"")
    output, _ = drive(tmp_path, walkers, "--centering", "ema", "--save_every", 1, fails=True)
    assert "last.pt is damaged" in output and "previous.pt is damaged" in output and "start anew" in output
