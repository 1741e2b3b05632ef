"""The run, from video tracklets to mAP: data, stage 1, denoising, stage 2, evaluation (paper, section 3 and appendix).

    torchrun train.py --arch r10ibn                     # walkers, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data DIR     # your tracklets, the paper's recipe

Read first: `Settings`, `main`, `train_stage`.
"""
import argparse
import copy
import fcntl
import inspect
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from data import (
    Images, check_batches, check_readable, draw_walkers, find_splits, load_batches, read_identities, read_labels, read_tracklets, refuse_unreadable,
    replace_unreadable, replacing, sample_identities, write_labels,
)  # fmt: skip
from denoise import check_index, denoise_tracklets, show_identities
from distill import (
    Network, Views, all_reduce, collapse, gauge, make_views, matching_loss, show_views, sinkhorn, update_center, update_teacher,
)  # fmt: skip
from evaluate import evaluate_features, label_tracklets, show_retrieval
from model import Head, build, check_sizes, describe, extract, extract_to_file, load_weights


@dataclass
class Settings:
    """Every flag of the run. Defaults are the paper's recipe (ResNet50-IBN); the comment behind each is its --help."""

    arch: str = "r50ibn"  # backbone; `python model.py` lists them
    data: str = ""  # folder of tracklets, <video>/<track>_<frame>_<det>.jpg; none: walkers, drawn into data/walkers
    recipe: str = ""  # paper, or demo: small images and few steps (the default without --data)
    name: str = ""  # folder below runs/ (default: data and arch); the same command resumes what is there
    weights: str = ""  # backbone weights that replace stage 1
    labels: str = ""  # annotation JSON of identities that replaces stage 1 and denoising
    identities: str = "cion"  # who teaches whom: cion (denoised), or instance (each image itself: DINO), tracklet (raw), true (train.json)
    seed: int = 0  # of everything random
    # views
    size: tuple[int, int] = (256, 128)  # global crops and evaluation: height, width
    local_size: tuple[int, int] = (128, 64)  # local crops: height, width
    canvas: tuple[int, int] = (256, 128)  # images are decoded and resized to this before they are cropped
    local_crops: int = 8  # how many, for the student only
    global_scale: tuple[float, float] = (0.8, 1.0)  # share of the image's area in a global crop
    local_scale: tuple[float, float] = (0.05, 0.8)  # share of the image's area in a local crop
    ratio: tuple[float, float] = (0.4, 0.6)  # width / height of crops
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    grey: float = 0.2  # probability of a grey view
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)  # probability of blur: first global, second global, local
    blur_sigma: float = 2.0  # largest sigma of the blur, pixels
    solarize: float = 0.2  # probability on the second global view
    # batches and phases
    batch: int = 960  # images of a step, over all processes
    accumulate: int = 1  # parts in which each process takes its share of a batch, for less memory
    K: tuple[int, ...] = (2, 4, 6, 8)  # stage 2: images of each identity in a batch, phase by phase
    epochs: tuple[int, ...] = (40, 20, 20, 20)  # stage 2: epochs of each phase
    tracklet_K: tuple[int, ...] = (2,)  # stage 1: the same
    tracklet_epochs: tuple[int, ...] = (20,)  # stage 1: the same
    epoch_steps: int = 0  # steps of an epoch; 0: as many as the images fill
    # head and loss
    prototypes: int = 65536  # D, the width of the head's output
    hidden: int = 2048  # width of the head's layers
    bottleneck: int = 256  # width before the prototypes
    head_norm: bool = False  # batch norm (no affine) before the head's L2 norm
    centering: str = "ema"  # what keeps the teacher from collapsing: ema (running center) or sinkhorn
    student_temp: float = 0.1  # softmax temperature
    teacher_temp: tuple[float, float] = (0.04, 0.04)  # softmax temperature, first step and after the warm-up; lower is sharper
    # optimiser
    lr: float = 5e-4  # AdamW, for 256 images; scaled by batch / 256
    min_lr: float = 1e-6  # at the end of the cosine
    warmup: float = 0.1  # share of the steps over which lr rises from 0
    weight_decay: tuple[float, float] = (0.04, 0.4)  # first and last step, cosine; none on biases and norms
    clip: float = 3.0  # largest gradient norm of each parameter
    freeze_last: int = 1  # epochs in which the prototypes of a new head stay as they are
    ema: tuple[float, float] = (0.996, 1.0)  # the teacher's momentum, first and last step, cosine
    center_momentum: float = 0.9  # of the running center
    # denoising
    sigma: float = -1.0  # intra-identity consistency, cosine distance in [0, 2]; negative: calibrated from the tracklets
    tau: float = -1.0  # inter-identity discrimination, likewise
    min_images: int = 2  # a tracklet that keeps fewer dissolves
    window: int = 16  # videos in the sliding range
    stride: int = 8  # videos by which it moves
    levels: int = 3  # of denoising: 1 within tracklets, 2 within videos, 3 across videos
    rounds: int = 1  # how often identities are found and stage 2 is trained on them
    # this machine
    precision: str = "auto"  # of the networks: float32, bfloat16, float16; auto: the GPU's best half, float32 on a CPU
    compile: bool = False  # torch.compile the networks: minutes at the start, faster steps
    workers: int = 4  # processes that decode images, for each process that trains
    log_every: int = 20  # steps between log lines
    save_every: int = 500  # steps between checkpoints; one is written at the end of each epoch too


# The demo differs from the paper where a short run on small images needs it; the README says why, line by line.
DEMO = dict(
    size=(64, 32), local_size=(32, 16), canvas=(64, 32), local_crops=2,
    jitter=(0.2, 0.2, 0.0, 0.0), grey=0.0, blur=(0.0, 0.0, 0.0), solarize=0.0,
    batch=64, K=(2, 4), epochs=(1, 2), tracklet_K=(2,), tracklet_epochs=(4,),
    prototypes=256, hidden=512, bottleneck=64, head_norm=True, centering="sinkhorn",
    lr=6e-3, freeze_last=0, ema=(0.95, 0.95), workers=1,
)  # fmt: skip
DEMO_LARGE = DEMO | dict(batch=32, K=(4,), epochs=(1,), tracklet_epochs=(1,), epoch_steps=80)  # networks that take seconds a step
MAY_DIFFER = {"name", "workers", "log_every", "save_every"}  # settings that change nothing in the result


def parse_settings(argv=None) -> Settings:
    """Settings from the recipe and the flags that override it."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Settings), re.MULTILINE))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] + " In brackets: the paper's recipe.", argument_default=argparse.SUPPRESS)
    for field in fields(Settings):
        several = isinstance(field.default, tuple)
        kind = type(field.default[0]) if several else type(field.default)
        paper = " ".join(map(str, field.default)) if several else field.default
        options = dict(help=f"{comments[field.name]} [{paper}]".replace("%", "%%").replace(" []", ""))
        if kind is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        else:
            options |= dict(type=kind, metavar=field.name.upper() if not several else None)
        if several:
            options |= dict(nargs="+" if field.name in ("K", "epochs", "tracklet_K", "tracklet_epochs") else len(field.default))
        parser.add_argument(f"--{field.name}", **options)
    flags = vars(parser.parse_args(argv))
    flags = {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items()}
    arch = flags.get("arch", Settings.arch)
    recipe = flags.get("recipe") or ("paper" if flags.get("data") else "demo")
    if recipe not in ("paper", "demo"):
        raise ValueError(f"--recipe {recipe}: expected paper or demo")
    base = {} if recipe == "paper" else DEMO if arch == "r10ibn" else DEMO_LARGE
    settings = Settings(**base | flags | {"recipe": recipe})
    if settings.identities == "instance":
        settings.K, settings.tracklet_K = (1,) * len(settings.K), (1,) * len(settings.tracklet_K)
    parts = [Path(settings.data or "walkers").resolve().name, arch.replace("/", "-")]
    parts += [settings.identities] * (settings.identities != "cion") + [f"seed{settings.seed}"] * (settings.seed > 0)
    settings.name = settings.name or "-".join(parts)
    check_settings(settings)
    return settings


def check_settings(s: Settings) -> None:
    """Raises ValueError for settings that cannot work, before anything is read or drawn."""
    for stage, Ks, epochs in (("", s.K, s.epochs), ("tracklet_", s.tracklet_K, s.tracklet_epochs)):
        if len(Ks) != len(epochs):
            raise ValueError(f"--{stage}K {Ks} has {len(Ks)} phases and --{stage}epochs {epochs} {len(epochs)}: give each its epochs")
        if min(Ks) < 1 or min(epochs) < 0:
            raise ValueError(f"--{stage}K {Ks} --{stage}epochs {epochs}: expected K of 1 and more, epochs of 0 and more")
    for flag, known in (("identities", ("instance", "tracklet", "cion", "true")), ("levels", (1, 2, 3)), ("centering", ("ema", "sinkhorn")), ("precision", ("auto", "float32", "bfloat16", "float16"))):
        if getattr(s, flag) not in known:
            raise ValueError(f"--{flag} {getattr(s, flag)}: expected {', '.join(map(str, known[:-1]))} or {known[-1]}")
    if s.canvas[0] < s.size[0] or s.canvas[1] < s.size[1]:
        raise ValueError(f"--canvas {s.canvas} is smaller than --size {s.size}")
    for flag in ("size", "local_size"):
        if getattr(s, flag)[0] < 32 or getattr(s, flag)[1] < 16:
            raise ValueError(f"--{flag} {getattr(s, flag)}: the networks need at least 32 16")
    for flag, most in (("global_scale", 1), ("local_scale", 1), ("ratio", math.inf)):
        low, high = getattr(s, flag)
        if not 0 < low <= high <= most:
            raise ValueError(f"--{flag} {low} {high}: expected two numbers above 0, the smaller first" + (", at most 1" if most == 1 else ""))
    for flag in ("sigma", "tau"):
        if not getattr(s, flag) <= 2:
            raise ValueError(f"--{flag} {getattr(s, flag)}: a cosine distance lies in [0, 2]")
    for flag in ("batch", "accumulate", "prototypes", "hidden", "bottleneck", "student_temp", "teacher_temp", "min_images", "rounds", "log_every", "save_every"):
        if not np.all(np.array(getattr(s, flag)) > 0):
            raise ValueError(f"--{flag} {getattr(s, flag)}: expected a number above 0")
    for flag in ("lr", "seed", "workers", "local_crops", "freeze_last", "epoch_steps"):
        if not getattr(s, flag) >= 0:
            raise ValueError(f"--{flag} {getattr(s, flag)}: expected a number of 0 or more")
    for K in s.K + s.tracklet_K:
        if s.batch % (K * s.accumulate):
            parts = f" in {s.accumulate} parts" if s.accumulate > 1 else ""
            raise ValueError(f"--batch {s.batch}{parts} is not divisible by K={K}: a batch holds K images of each of its identities")
    if s.name != Path(s.name).name:
        raise ValueError(f"--name {s.name}: expected the name of a folder below runs/, not a path")
    if not 0 <= s.warmup < 1:
        raise ValueError(f"--warmup {s.warmup}: expected a share of the steps, from 0 to below 1")
    if not 1 <= s.stride < s.window:
        raise ValueError(f"--stride {s.stride} --window {s.window}: ranges must overlap, so 1 <= stride < window")
    for flag in ("weights", "labels"):
        if getattr(s, flag) and not os.path.isfile(getattr(s, flag)):
            raise ValueError(f"--{flag} {getattr(s, flag)}: no such file")
    if s.identities != "cion" and (s.labels or s.weights):
        raise ValueError(f"--identities {s.identities} goes without --labels and --weights, which replace a stage of cion")
    backbone = build(s.arch)
    check_sizes(backbone, s.arch, (s.size, s.local_size))
    if s.weights:
        load_weights(backbone, s.weights)


# ---------------------------------------------------------------- schedules


def cosine(step: int, total: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `total`."""
    return end + (start - end) * (1 + math.cos(math.pi * step / max(total, 1))) / 2


class Schedule(NamedTuple):
    """What changes from step to step."""

    lr: float
    weight_decay: float
    ema: float
    teacher_temp: float


def schedule(s: Settings, step: int, total: int) -> Schedule:
    """The values at a step, 0 to total - 1, of a stage: total counts the steps of all its phases."""
    warmup, peak = max(1, round(s.warmup * total)), s.lr * s.batch / 256
    first, last = s.teacher_temp
    return Schedule(
        lr=peak * (step + 1) / warmup if step < warmup else cosine(step - warmup, total - warmup, peak, s.min_lr),
        weight_decay=cosine(step, total, *s.weight_decay),
        ema=cosine(step, total, *s.ema),
        teacher_temp=first + (last - first) * min(1, step / warmup),
    )


def plan_epochs(images: int, s: Settings, Ks, epochs) -> list[tuple[int, int]]:
    """(K, steps) of every epoch of a stage. An epoch is as many steps as the images fill, whatever K and the labels are, and the
    schedules run over the sum: laying them out for the first K, as the released code does, runs off their end."""
    return [(K, s.epoch_steps or max(1, images // s.batch)) for K, n in zip(Ks, epochs) for _ in range(n)]


def stage_name(s: Settings, stage: int) -> str:
    """Whose images teach each other in a stage: what its figures are logged under."""
    if s.identities != "cion":
        return s.identities
    return "tracklet" if stage == 0 else "cion" if stage == s.rounds else f"round {stage}"


# ---------------------------------------------------------------- the run's state


class Run:
    """Where a run happens and what it has come to: processes, folder, log, networks, progress."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.rank, self.world_size, self.device = join_processes()
        self.folder = Path("runs") / settings.name
        self.stage, self.step, self.results, self.resumed = 0, 0, {}, None
        self.stop_asked, self.training = 0, False
        self.precision = choose_precision(settings.precision, self.device)
        torch.manual_seed(settings.seed)  # the same initial weights on every rank
        backbone = build(settings.arch)
        head = Head(backbone.embed_dim, settings.prototypes, settings.hidden, settings.bottleneck, settings.head_norm)
        self.student = Network(backbone, head).to(self.device)
        if self.device.type == "cuda" and self.world_size > 1:  # batch statistics over all processes; CPUs keep their own
            self.student = nn.SyncBatchNorm.convert_sync_batchnorm(self.student)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        if settings.compile:
            self.student.backbone.compile()
            self.teacher.backbone.compile()
        self.center = torch.zeros(settings.prototypes, device=self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.finite = torch.ones((), device=self.device)  # 0 once a loss or gradient was not; read now and then
        self.unreadable = set()
        self.tensorboard = None

    def say(self, what: str, text: str) -> None:
        """One line on the first process's terminal."""
        if self.rank == 0:
            print(f"{what:<9}{text}", flush=True)

    def log(self, event: str, **values) -> None:
        """One line in log.jsonl, and curves in tensorboard where that is installed."""
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"event": event, **values}) + "\n")
            for key, value in values.items() if self.tensorboard else ():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(f"{event}/{values.get('stage', '')}/{key}", value, values.get("step", 0))

    def save(self, optimizer=None) -> None:
        """Write last.pt beside the old one and to the disk before it takes its place, so that a crash at any moment destroys
        nothing; the old one is kept as previous.pt."""
        average_buffers(self.teacher, self.world_size)
        if self.rank == 0:
            log, last = self.folder / "log.jsonl", self.folder / "last.pt"
            checkpoint = {
                "student": self.student.state_dict(), "teacher": self.teacher.state_dict(), "center": self.center,
                "optimizer": optimizer.state_dict() if optimizer else None, "scaler": self.scaler.state_dict(),
                "stage": self.stage, "step": self.step, "results": self.results, "unreadable": sorted(self.unreadable),
                "settings": asdict(self.settings), "log_bytes": log.stat().st_size if log.exists() else 0,
            }  # fmt: skip
            with replacing(last) as temporary:
                torch.save(checkpoint, temporary)
                if last.exists():
                    os.replace(last, self.folder / "previous.pt")
        dist.barrier()

    def resume(self) -> None:
        """Take up what the folder holds: last.pt, or previous.pt where that is missing or damaged. Raises ValueError if both are,
        if they were made with other settings, if processes find different ones, or another run works in the folder."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "a+")
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with this process, however it ends
            except OSError:
                self.lock.seek(0)
                raise ValueError(f"another run works in {self.folder} ({self.lock.read() or 'unknown'}; a killed torchrun may have left it); "
                                 "wait for its end, end it, or give another --name") from None
            self.lock.truncate(0)
            print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=self.lock, flush=True)
            for left in self.folder.glob(".last.pt.*"):  # of a save that was cut short
                left.unlink()
        dist.barrier()
        log, found, wrong = self.folder / "log.jsonl", None, []
        files = [file for file in (self.folder / "last.pt", self.folder / "previous.pt") if file.exists()]
        for file in files:
            try:
                found = read_state(file)
                break
            except ValueError as error:
                wrong.append(str(error))
        if files and not found:
            raise ValueError(f"{'; '.join(wrong)}. Delete {self.folder} to start anew, or give another --name")
        state = (found["stage"], found["step"]) if found else self.folder.is_dir() and "nothing"
        self.agree(state, f"{self.folder} must be on a file system that all machines share")
        if not found:
            if self.rank == 0:
                log.unlink(missing_ok=True)  # of a start that came to nothing
            return
        now, then = asdict(self.settings), found["settings"]
        differ = [f"--{key} {then.get(key)} there, {now[key]} here" for key in now if key not in MAY_DIFFER and now[key] != then.get(key)]
        if differ:
            raise ValueError(f"{self.folder} was made with other settings ({'; '.join(differ)}); delete it, or give another --name")
        self.student.load_state_dict(found["student"])
        self.teacher.load_state_dict(found["teacher"])
        self.center.copy_(found["center"])
        self.stage, self.step, self.results = found["stage"], found["step"], found["results"]
        self.resumed, self.unreadable = found["optimizer"], set(found["unreadable"])
        self.scaler.load_state_dict(found["scaler"])
        if self.rank == 0:
            if wrong:
                os.replace(files[0], self.folder / "damaged.pt")
            if log.exists():
                os.truncate(log, min(found["log_bytes"], log.stat().st_size))  # lines after the checkpoint will come again
        if file.name != "last.pt":
            self.say("resume", f"{wrong[0] if wrong else 'last.pt is missing'}: going back to {file.name}, the checkpoint before")
        self.say("resume", f"{self.folder} at {'its end' if self.stage > self.settings.rounds else f'stage {self.stage + 1}, step {self.step:,}'}")

    def agree(self, value, otherwise: str) -> None:
        """Raise ValueError where processes come with different values."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise ValueError(f"{otherwise}: the processes found {values}")

    def check_finite(self) -> None:
        """Raise FloatingPointError where a loss or a gradient of any process was not finite since the start. Reading it waits
        for the device, so it is done before logging and saving only. A scaler meets infinities by design, but finds its scale."""
        if not all_reduce(self.finite.clone(), dist.ReduceOp.MIN) or self.scaler.get_scale() < 1:
            raise FloatingPointError(f"a loss or a gradient is not finite by step {self.step} of stage {self.stage + 1}; {self.folder}/last.pt is the "
                                     f"last good state. Try a lower --lr (now {self.settings.lr}) under another --name")  # fmt: skip

    def should_stop(self) -> bool:
        """Whether any process was asked to stop. Asked on the CPU, so that no device waits."""
        return bool(all_reduce(torch.tensor(float(self.stop_asked > 0))))

    def gather_unreadable(self, tracklets) -> None:
        """Unite what the processes found unreadable. Raises ValueError if that is more than 1% of the images."""
        found = [None] * self.world_size
        dist.all_gather_object(found, self.unreadable)
        self.unreadable = set().union(*found)
        refuse_unreadable(tracklets, sorted(self.unreadable), len(tracklets))

    def on_signal(self, number, _) -> None:
        """Ctrl-C or SIGTERM (torchrun may send both): training ends after its step with a checkpoint, anything else ends here."""
        if not self.training:
            self.leave(number)
        self.stop_asked = number

    def leave(self, number: int) -> None:
        """Say how to go on, and exit as a process that got this signal does."""
        self.say("stopped", "the same command goes on from " + (f"{self.folder}/last.pt" if (self.folder / "last.pt").exists() else "the start"))
        sys.exit(128 + number)


def join_processes() -> tuple[int, int, torch.device]:
    """Rank, world size and device, from torchrun's environment or as the only process."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if "RANK" in os.environ:  # torchrun's
        store, rank, world_size = next(rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # after a restart the store still holds dead processes' addresses
            store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(days=1))  # others wait while one denoises
    return dist.get_rank(), dist.get_world_size(), device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """What the networks compute in; parameters, losses and the optimiser stay float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def read_state(file: Path) -> dict:
    """A checkpoint of ours on the CPU, whole: its checksums are compared, which torch.load does not. Raises ValueError where it is
    damaged; what goes wrong for other reasons (a disk, too little memory) says nothing about the file and goes through."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        return torch.load(file, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error})") from None


def average_buffers(network: nn.Module, world_size: int) -> None:
    """The mean over processes of batch-norm statistics, which each process gathers from its own images."""
    for buffer in network.buffers() if world_size > 1 else ():
        if buffer.is_floating_point():
            all_reduce(buffer).div_(world_size)


# ---------------------------------------------------------------- one stage of training


def train_stage(run: Run, tracklets, labels: np.ndarray, Ks, epochs, first_epoch: int) -> None:
    """Identity-guided self-distillation on labels (N,), from run.step on. epochs are counted over both stages, from first_epoch.

    Raises ValueError where images are unreadable or identities too few, FloatingPointError where the loss is not finite.
    """
    s, local = run.settings, run.settings.batch // run.world_size
    plan = plan_epochs(len(labels), s, Ks, epochs)
    total, name = sum(steps for _, steps in plan), stage_name(s, run.stage)
    run.say(f"stage {run.stage + 1}", f"{name} identities: {len(np.unique(labels[labels >= 0])):,} of {(labels >= 0).sum():,} images, {total:,} steps of {s.batch}")

    network = DistributedDataParallel(run.student, gradient_as_bucket_view=True)
    new_head = run.stage == 0 or bool(s.weights or s.labels)  # its prototypes stay as they are at first
    optimizer = make_optimizer(run.student)
    if run.resumed:
        optimizer.load_state_dict(run.resumed)
    run.resumed = None
    run.training, collapsed, clock, first_step = True, 0, time.time(), run.step
    done = 0  # steps before this epoch
    for epoch, (K, steps) in enumerate(plan, start=first_epoch):
        start = run.step - done
        done += steps
        if start >= steps:
            continue
        mine = sample_identities(labels, K, s.batch, s.seed, epoch, steps)[start:, run.rank * local : (run.rank + 1) * local]
        for rows, (images, readable) in zip(mine, load_batches(tracklets, list(mine), s.canvas, s.workers)):
            if not readable.all():
                run.unreadable.update(rows[~readable.numpy()].tolist())
                images = replace_unreadable(images, readable, K)
            now, frozen = schedule(s, run.step, total), new_head and epoch - first_epoch < s.freeze_last
            loss, p = train_step(run, network, optimizer, images, K, epoch, now, frozen)
            run.step += 1

            if run.step % s.log_every == 0 or run.step == total:
                run.check_finite()
                loss = (all_reduce(loss) / run.world_size).item()
                entropy, used = gauge(p)
                rate, uniform = (run.step - first_step) * s.batch / (time.time() - clock), math.log(s.prototypes)
                left = (total - run.step) * s.batch / rate
                run.say("", f"step {run.step:>5,}/{total:,}  K {K}  loss {loss:.3f} of {uniform:.3f}  entropy {entropy / uniform:4.0%}  "
                        f"used {used:,}  lr {now.lr:.1e}  {rate:6,.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left")  # fmt: skip
                run.log("train", stage=name, step=run.step, epoch=epoch, K=K, loss=loss, entropy=entropy, entropy_share=entropy / uniform,
                        prototypes_used=used, images_per_second=rate, **now._asdict())  # fmt: skip
                words = collapse(loss, entropy, used, s.prototypes, s.batch // K) if run.step > s.warmup * total else ""
                collapsed = collapsed + 1 if words else min(collapsed, 0)
                if collapsed == 3:  # in three lines running; said once
                    run.say("warning", words)
                    collapsed = -math.inf
            stop = run.should_stop()
            if stop or run.step % s.save_every == 0 or run.step == done:
                run.check_finite()
                run.gather_unreadable(tracklets)
                run.save(optimizer)
            if stop:
                run.leave(run.stop_asked or signal.SIGTERM)
    run.training = False
    if run.should_stop():  # asked in the very last step
        run.leave(run.stop_asked or signal.SIGTERM)


def make_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices and kernels, whose weights decay, and biases and norms, whose do not."""
    decay, rest = ([p for p in student.parameters() if (p.ndim > 1) == many] for many in (True, False))
    return torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.0, fused=True)


def train_step(run: Run, network: nn.Module, optimizer, images: torch.Tensor, K: int, epoch: int, now: Schedule, frozen: bool) -> tuple:
    """One step on this process's uint8 images (B, 3, H, W): its loss (a tensor: nothing here waits for the device) and the
    teacher's probabilities (2, B, D). `frozen` keeps the prototypes as they are.

    The teacher sees all parts of the batch first, so centering is over the whole; then the student's gradients add up.
    """
    s = run.settings
    for group in optimizer.param_groups:
        group["lr"] = now.lr
    optimizer.param_groups[0]["weight_decay"] = now.weight_decay

    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([s.seed, epoch, run.step]).generate_state(1)[0]))
    views = make_views(images.to(run.device, non_blocking=True), view_kinds(s), generator, run.rank, run.world_size, run.student.memory_format)
    parts = list(zip(*[view.chunk(s.accumulate) for view in views]))
    autocast = torch.autocast(run.device.type, run.precision, enabled=run.precision is not torch.float32)
    with torch.no_grad(), autocast:
        run.teacher.train()  # it normalises by its own batch, as the student does
        z, prototypes = zip(*[run.teacher(part[:2]) for part in parts])
    taught = torch.cat(z, dim=1).float() @ prototypes[0].float().T  # logits (2, B, D)
    if s.centering == "sinkhorn":
        p = sinkhorn(taught, now.teacher_temp)
    else:
        p = torch.softmax((taught - run.center) / now.teacher_temp, dim=-1)
        run.center.copy_(update_center(run.center, taught, s.center_momentum))
    del taught

    loss = torch.zeros((), device=run.device)
    for i, (part, target) in enumerate(zip(parts, p.chunk(s.accumulate, dim=1))):
        with network.no_sync() if i + 1 < s.accumulate else nullcontext():
            with autocast:
                z, prototypes = network(part)  # (V, B / parts, C), (D, C)
            part_loss = matching_loss(z, prototypes, target, K, s.student_temp) / s.accumulate
            run.scaler.scale(part_loss).backward()
        loss += part_loss.detach()
    run.scaler.unscale_(optimizer)  # the released code clips before this
    norms = clip_gradients(run.student, s.clip)
    run.finite *= torch.isfinite(loss) & (run.scaler.is_enabled() or torch.isfinite(norms).all())
    if frozen:
        run.student.head.last_layer.weight.grad = None
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad()
    update_teacher(run.teacher, run.student, now.ema)
    return loss, p


def clip_gradients(network: nn.Module, largest: float) -> torch.Tensor:
    """Scale each parameter's gradient down to a norm of `largest`, as DINO does; the norms before."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((largest / (norms + 1e-6)).clamp(max=1)))
    return norms


def view_kinds(s: Settings) -> list[Views]:
    """Two global views and the local ones, by the recipe."""
    common = dict(ratio=s.ratio, jitter=s.jitter, grey_p=s.grey, blur_sigma=s.blur_sigma)
    first = Views(s.size, s.global_scale, blur_p=s.blur[0], **common)
    second = Views(s.size, s.global_scale, blur_p=s.blur[1], solarize_p=s.solarize, **common)
    local = Views(s.local_size, s.local_scale, blur_p=s.blur[2], copies=s.local_crops, **common)
    return [first, second] + [local] * (s.local_crops > 0)


# ---------------------------------------------------------------- the whole method


def main() -> None:
    """Data, stage 1, denoising, stage 2, evaluation: the same command goes on where the last one ended."""
    s = parse_settings()
    run = Run(s)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.on_signal)
    parts = f", each in {s.accumulate} parts," if s.accumulate > 1 else ""
    for K in s.K + s.tracklet_K:
        if s.batch % (run.world_size * s.accumulate * K):
            raise ValueError(f"--batch {s.batch} over {run.world_size} processes{parts} is not a multiple of K={K}: identities are not split")

    # 1. data
    root = Path(s.data or "data/walkers")
    clock, drawn = time.time(), ""
    if not s.data and run.rank == 0 and not root.exists():
        run.say("data", f"drawing walkers into {root}/")
        draw_walkers(root)
        drawn = f" (drawn in {time.time() - clock:.0f} s)"
    dist.barrier()
    train_folder, test_folder = find_splits(root)
    if run.rank > 0:
        dist.barrier()  # the first process scans; the others may find its index
    tracklets, given = read_identities(s.labels, train_folder) if s.labels else (read_tracklets(train_folder), None)
    test = read_tracklets(test_folder) if test_folder else None
    if run.rank == 0:
        dist.barrier()
    named = f"{len(tracklets):,} images of {tracklets.track.max() + 1:,} identities, by {s.labels}"
    run.say("data", f"{train_folder}: {named if s.labels else tracklets}{drawn}")
    truth = read_labels(root / "train.json", tracklets) if test and not s.labels and (root / "train.json").exists() else None
    benchmark = label_tracklets(test, read_labels(root / "test.json", test)) if test else None
    if s.identities == "true" and truth is None:
        raise ValueError(f"--identities true: {root} does not hold train/, test/, test.json and train.json, the truth")
    raw = {"instance": np.arange(len(tracklets)), "true": truth}.get(s.identities, tracklets.track)
    run.say("", f"{test_folder}: {test}, held out" if test else f"{root} does not hold all of train/, test/ and test.json: no evaluation")
    check_readable(tracklets)
    if given is not None:
        check_batches(given, s.K, s.batch)
    else:
        check_index(tracklets.video, tracklets.track, tracklets.frame, name=tracklets.path)
        if not s.weights:
            check_batches(raw, s.tracklet_K, s.batch)

    run.resume()  # what the run's folder holds already
    try:
        from torch.utils.tensorboard import SummaryWriter

        run.tensorboard = SummaryWriter(run.folder) if run.rank == 0 else None
    except ImportError:  # curves are an extra for those who have it
        pass
    million = sum(p.numel() for p in run.student.backbone.parameters()) / 1e6
    run.say("network", f"{s.arch}, {million:.1f} M parameters, images {s.size[0]}x{s.size[1]}, recipe {s.recipe}, "
            f"{run.world_size} x {run.device.type}, {run.folder}/")  # fmt: skip

    def measure(stage: str):
        """Retrieval on the held-out split, once: printed, logged, kept in the checkpoint."""
        if benchmark is None or stage in run.results:
            return None
        average_buffers(run.teacher, run.world_size)
        features, _ = extract(run.teacher.backbone, test, s.size, run.device, s.workers)
        result = run.results[stage] = evaluate_features(features, benchmark)
        del result["ap"]
        run.say("evaluate", f"{stage:<9}" + "".join(f" {key} {result[key]:5.1%}  " for key in ("mAP", "R1", "R5", "R10")))
        run.log("evaluate", stage=stage, **result)
        return features

    # 2. to 4. stages: raw tracklets first, then, each time, the identities that denoising finds with the encoder so far
    measure("random")
    if run.stage == run.step == 0:
        if s.weights:
            report = load_weights(run.student.backbone, s.weights)
            run.teacher.backbone.load_state_dict(run.student.backbone.state_dict())
            run.say("weights", f"{s.weights}: {describe(report)}")
        run.save()
    while run.stage <= s.rounds:
        found = run.folder / "identities.json"
        Ks, epochs = (s.K, s.epochs) if run.stage else (s.tracklet_K, s.tracklet_epochs)
        if run.stage or not s.weights and given is None:
            labels = read_labels(found, tracklets) if run.stage and s.identities == "cion" else raw
            if run.stage == s.rounds and run.rank == 0:
                rows = sample_identities(labels, s.K[-1], s.batch, s.seed, 0, 1)[0, :16]
                images = torch.stack([Images(tracklets, s.canvas)[i][0] for i in rows])
                show_views(run.folder / "crops.png", images, view_kinds(s), torch.Generator().manual_seed(s.seed))
            train_stage(run, tracklets, labels, Ks, epochs, first_epoch=run.stage and sum(s.tracklet_epochs) + (run.stage - 1) * sum(s.epochs))
        features = measure(stage_name(s, run.stage)) if given is None and (run.stage == s.rounds or s.identities == "cion") or run.stage else None
        if run.stage < s.rounds and s.identities == "cion":
            labels = given if given is not None else find_identities(run, tracklets, truth)
            try:
                check_batches(labels, s.K, s.batch)
            except ValueError as error:
                raise ValueError(f"stage 2 cannot be trained on these identities: {error}. Other settings can start from this encoder: "
                                 f"--weights {run.folder}/last.pt --name NEW") from None  # fmt: skip
            if run.rank == 0:
                write_labels(found, tracklets, labels)
            dist.barrier()
        elif run.stage == s.rounds and features is not None and run.rank == 0:
            queries = benchmark.query[np.linspace(0, len(benchmark.query) - 1, 12).astype(int)]
            show_retrieval(run.folder / "retrieval.png", benchmark, features, np.unique(queries))
        run.stage, run.step = run.stage + 1, 0
        run.save()
    run.gather_unreadable(tracklets)
    if run.unreadable:
        run.say("data", f"{len(run.unreadable):,} unreadable images were skipped, the first: {tracklets.path(min(run.unreadable))}")
    for stage, result in run.results.items():
        run.say("result" if stage == "random" else "", f"{stage:<9} mAP {result['mAP']:5.1%}   R1 {result['R1']:5.1%}")
    run.say("done", f"{run.folder}/: {', '.join(sorted(file.name for file in run.folder.iterdir() if not file.name.startswith(('events', '.'))))}")
    dist.destroy_process_group()


def find_identities(run: Run, tracklets, truth: np.ndarray | None) -> np.ndarray:
    """Denoise with the teacher's features, printing each level. Labels (N,), the same on every process."""
    s, clock = run.settings, time.time()
    average_buffers(run.teacher, run.world_size)
    features = extract_to_file(run.folder, run.teacher.backbone, tracklets, s.size, run.device, s.workers)
    seconds = time.time() - clock
    run.say("denoise", f"{len(tracklets):,} features of {features.shape[1]} dimensions in {seconds:.0f} s, {len(tracklets) / seconds:,.0f} images/s")
    labels = torch.full((len(tracklets),), -1)
    if run.rank == 0:
        found, report, space = denoise_tracklets(
            tracklets, features, run.folder / "features.scratch", truth, print_line=lambda text: run.say("", text),
            sigma=None if s.sigma < 0 else s.sigma, tau=None if s.tau < 0 else s.tau,
            min_images=s.min_images, window=s.window, stride=s.stride, levels=s.levels,
        )  # fmt: skip
        run.unreadable.update(report.pop("unreadable"))
        run.log("denoise", round=run.stage + 1, **report)
        with replacing(run.folder / "space.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **space._asdict())
        show_identities(run.folder / "denoised.png", tracklets, found)
        labels = torch.from_numpy(found)
    run.gather_unreadable(tracklets)
    labels = labels.to(run.device)
    dist.broadcast(labels, 0)
    return labels.cpu().numpy()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
