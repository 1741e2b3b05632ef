"""The run, from video tracklets to mAP (paper, section 3 and appendix).

    torchrun train.py --arch r10ibn                     # walkers, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data DIR     # your tracklets, the paper's recipe

Stage 1 learns from raw tracklets, denoising finds people with that encoder, stage 2 learns from them, and retrieval of people never
seen says what it was worth. Read first: `Settings`, `main`, `train_epoch`.
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
from collections import namedtuple
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import data
from denoise import OPTIONS, check_settings, denoise_tracklets, show_identities
from distill import (
    Network, Views, identity_loss, make_views, show_views, sinkhorn, update_center, update_teacher
)
from distill import all_mean, all_reduce, collapse, teacher_statistics
from evaluate import evaluate_features, label_tracklets, show_retrieval
from model import Head, build, check_sizes, describe, extract, extract_to_file, load_weights


@dataclass
class Settings:
    """Every flag of the run. Defaults are the paper's recipe (ResNet50-IBN), or ours where it has none; a comment is its flag's --help."""

    arch: str = "r50ibn"  # backbone; `python model.py` lists them
    data: str = ""  # folder of tracklets, <video>/<track>_<frame>_<det>.jpg; none: walkers, drawn into data/walkers, or data/walkers-<seed>
    recipe: str = ""  # paper, or demo: small images and few steps (the default without --data)
    name: str = ""  # folder below runs/ (default: data and arch); the same command resumes what is there
    weights: str = ""  # backbone weights that replace stage 1
    labels: str = ""  # annotation JSON of identities that replaces stage 1 and denoising
    identities: str = "cion"  # who teaches whom: cion (denoised), instance (itself: DINO, K 1), tracklet (raw), true (train.json)
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
    tracklet_epochs: int = 20  # stage 1, on raw tracklets, with the first of the K; none with --weights or --labels
    K: tuple[int, ...] = (2, 4, 6, 8)  # images of each identity in a batch, phase by phase
    epochs: tuple[int, ...] = (40, 20, 20, 20)  # stage 2, on identities across videos: epochs of each phase
    rounds: int = 2  # how often identities are found, evenly over stage 2, each time with the encoder so far
    epoch_steps: int = 0  # steps of an epoch; 0: as many as the images fill
    # head and loss
    prototypes: int = 65536  # D, the width of the head's output
    hidden: int = 2048  # width of the head's layers
    bottleneck: int = 256  # width before the prototypes
    head_norm: bool = False  # batch norm (no affine) before the head's L2 norm
    loss: str = "paper"  # paper: eq. 9; release: the authors' code's weighting, with which the published weights were made
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
    denoising: str = "ours"  # ours, or paper: its equations 4 to 7 alone, thresholds 0.2 and 0.18 unless given
    sigma_cst: float = -1.0  # intra-identity consistency, cosine distance in [0, 2]; negative: calibrated from the tracklets
    sigma_drm: float = -1.0  # inter-identity discrimination, likewise
    r_s: int = 1000  # half-width of the sliding range, in tracklets
    levels: int = 3  # of denoising: 1 within tracklets, 2 within videos, 3 across videos
    nearness: float = 0.1  # how much farther two identities count that are r_s places apart
    center: bool = True  # subtract each video's mean
    whiten: bool = True  # divide out the covariance
    cut: bool = True  # cut tracklets where the person changes
    cannot_link: bool = True  # images of one frame are two people
    closest_first: bool = True  # join the closest first, instead of the closure of all links
    # this machine
    precision: str = "auto"  # of the networks: float32 or bfloat16; auto: bfloat16 on a GPU that has it, else float32
    compile: bool = False  # torch.compile the networks: minutes at the start, faster steps
    workers: int = 4  # processes that decode images, for each process that trains
    log_every: int = 20  # steps between log lines
    save_every: int = 500  # steps between checkpoints; one is written at the end of each epoch too


# The demo differs from the paper where a short run on small images needs it; the README says why, line by line.
DEMO = dict(
    size=(64, 32), local_size=(32, 16), canvas=(64, 32), local_crops=2,
    jitter=(0.2, 0.2, 0.0, 0.0), grey=0.0, blur=(0.0, 0.0, 0.0), solarize=0.0,
    batch=64, tracklet_epochs=1, K=(2, 4), epochs=(2, 4), rounds=3, epoch_steps=36,
    prototypes=256, hidden=512, bottleneck=64, head_norm=True, r_s=130, centering="sinkhorn",
    lr=6e-3, freeze_last=0, ema=(0.95, 0.95), workers=1,
)
DEMO_OF = {"r10ibn": dict(epoch_steps=90), "vit_tiny": dict(epoch_steps=72)}  # r10ibn's steps are quick, vit_tiny needs more
MAY_DIFFER = {"name", "workers", "log_every", "save_every"}  # settings that change nothing in the result
RULES = [  # flags, what must hold of their values, and that in words
    ("recipe", lambda v: v in ("paper", "demo"), "paper or demo"),
    ("identities", lambda v: v in ("instance", "tracklet", "cion", "true"), "instance, tracklet, cion or true"),
    ("loss", lambda v: v in ("paper", "release"), "paper or release"),
    ("denoising", lambda v: v in ("ours", "paper"), "ours or paper"),
    ("centering", lambda v: v in ("ema", "sinkhorn"), "ema or sinkhorn"),
    ("precision", lambda v: v in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
    ("size local_size", lambda v: v[0] >= 32 and v[1] >= 16, "at least 32 16, which the networks need"),
    ("global_scale local_scale ratio", lambda v: 0 < v[0] <= v[1], "two numbers above 0, the smaller first"),
    ("global_scale local_scale", lambda v: v[1] <= 1, "shares of the image, at most 1"),
    ("K batch prototypes hidden bottleneck student_temp teacher_temp rounds log_every save_every",
     lambda v: np.min(v) > 0, "numbers above 0"),
    ("epochs tracklet_epochs epoch_steps lr seed workers local_crops freeze_last", lambda v: np.min(v) >= 0, "numbers of 0 or more"),
    ("warmup", lambda v: 0 <= v < 1, "a share of the steps, from 0 to below 1"),
    ("name", lambda v: v == Path(v).name, "the name of a folder below runs/, not a path"),
    ("weights labels", lambda v: not v or os.path.isfile(v), "a file; no such file"),
]


def parse_settings(argv=None) -> Settings:
    """Settings from the recipe and the flags that override it. Raises ValueError where they cannot work."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Settings), re.MULTILINE))
    description = __doc__.split("\n\n")[0] + " In brackets: the paper's recipe."
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    for field in fields(Settings):
        values = field.default if isinstance(field.default, tuple) else (field.default,)
        options = {"help": f"{comments[field.name]} [{' '.join(map(str, values))}]".replace("%", "%%").replace(" []", "")}
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": type(values[0])} | ({"metavar": field.name.upper()} if values == (field.default,) else {})
        if isinstance(field.default, tuple):
            options["nargs"] = "+" if field.name in ("K", "epochs") else len(values)
        parser.add_argument(f"--{field.name}", **options)
    flags = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(parser.parse_args(argv)).items()}
    recipe = flags.get("recipe") or ("paper" if flags.get("data") else "demo")
    demo = DEMO | DEMO_OF.get(flags.get("arch"), {})
    s = Settings(**(demo if recipe == "demo" else {}) | flags | {"recipe": recipe})
    if s.identities == "instance":
        s.K = (1,) * len(s.K)
    parts = [data_folder(s).resolve().name, s.arch.replace("/", "-")] + [s.identities] * (s.identities != "cion")
    s.name = s.name or "-".join(parts)
    check_run(s)
    return s


def data_folder(s: Settings) -> Path:
    """Where the tracklets are; another seed draws other walkers."""
    return Path(s.data or f"data/walkers{f'-{s.seed}' if s.seed else ''}")


def denoising_options(s: Settings) -> dict:
    """What `denoise_tracklets` is called with; thresholds are None where they are calibrated."""
    options = {name: getattr(s, name) for name in OPTIONS}
    for name in ("sigma_cst", "sigma_drm"):
        if options[name] < 0:
            options[name] = None
    return options | {"paper": s.denoising == "paper"}


def check_run(s: Settings) -> None:
    """Raises ValueError for settings that cannot work, before anything is read or drawn."""
    for flags, holds, expected in RULES:
        for flag in flags.split():
            data.require(holds(getattr(s, flag)), f"--{flag} {getattr(s, flag)}: expected {expected}")
    phases = f"--K {s.K} has {len(s.K)} phases and --epochs {s.epochs} {len(s.epochs)}"
    data.require(len(s.K) == len(s.epochs), f"{phases}: give each its epochs")
    data.require(s.canvas[0] >= s.size[0] and s.canvas[1] >= s.size[1], f"--canvas {s.canvas} is smaller than --size {s.size}")
    options = denoising_options(s)
    check_settings(options["sigma_cst"], options["sigma_drm"], s.r_s, s.nearness, s.levels)
    data.require(s.identities == "cion" or not (s.labels or s.weights), f"--identities {s.identities} goes without --labels and --weights")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    for K in s.K:
        data.require(s.batch % (processes * K) == 0, f"--batch {s.batch} over {processes} processes is not a multiple of K={K}: "
                     "identities are not split")
    backbone = build(s.arch)
    check_sizes(backbone, s.arch, (s.size, s.local_size))
    if s.weights:
        load_weights(backbone, s.weights)


Schedule = namedtuple("Schedule", "lr weight_decay ema teacher_temp")  # what changes from step to step


def cosine(step: int, total: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `total`."""
    return end + (start - end) * (1 + math.cos(math.pi * step / max(total, 1))) / 2


def schedule(s: Settings, step: int, total: int) -> Schedule:
    """The values at a step of the whole run, 0 to total - 1."""
    warmup, peak, (sharp, soft) = max(1, round(s.warmup * total)), s.lr * s.batch / 256, s.teacher_temp
    lr = peak * (step + 1) / warmup if step < warmup else cosine(step - warmup, total - warmup, peak, s.min_lr)
    return Schedule(lr, cosine(step, total, *s.weight_decay), cosine(step, total, *s.ema), sharp + (soft - sharp) * min(1, step / warmup))


def plan_epochs(s: Settings) -> tuple[list[int], dict[int, str]]:
    """K of every epoch; and, by the epoch before which identities are found, what the encoder is called in the log."""
    first = 0 if s.weights or s.labels else s.tracklet_epochs
    Ks = [s.K[0]] * first + [K for K, n in zip(s.K, s.epochs) for _ in range(n)]
    if s.identities != "cion" or s.labels:
        return Ks, {}
    before = sorted({first + i * sum(s.epochs) // s.rounds for i in range(s.rounds)})  # once in an epoch at most
    names = ["weights" if s.weights else "tracklet", *(f"round {i}" for i in range(1, s.rounds))]
    return Ks, dict(zip(before, names))


class Run:
    """Where a run happens and what it has come to: processes, folder, log, networks, progress."""

    def __init__(self, s: Settings):
        self.settings, self.folder = s, Path("runs") / s.name
        self.rank, self.world_size, self.device = join_processes()
        self.step, self.results, self.resumed, self.done = 0, {}, None, False
        self.stop_asked, self.training, self.collapsed, self.unreadable, self.tensorboard = 0, False, 0, set(), None
        self.labels, self.images = None, 0  # int32 (N,), identities across videos, once they are found; N
        self.stage = ""  # whose images teach each other: what figures are logged under
        torch.manual_seed(s.seed)  # the same initial weights on every rank
        backbone = build(s.arch)
        student = Network(backbone, Head(backbone.embed_dim, s.prototypes, s.hidden, s.bottleneck, s.head_norm)).to(self.device)
        if self.device.type == "cuda" and self.world_size > 1:  # batch statistics over all processes; CPUs keep their own
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        if s.compile:
            self.student.backbone.compile()
            self.teacher.backbone.compile()
        self.center = torch.zeros(s.prototypes, device=self.device)  # the running center of the teacher's logits
        self.finite = torch.ones((), device=self.device)  # 0 once a loss or gradient was not; read now and then

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

    def average_buffers(self) -> None:
        """The teacher's batch-norm statistics, which each process gathers from its own images: their mean over processes."""
        for buffer in self.teacher.buffers() if self.world_size > 1 else ():
            if buffer.is_floating_point():
                all_mean(buffer)

    def save(self, optimizer=None) -> None:
        """Write last.pt beside the old one and to the disk before it takes its place, so that a crash at any moment destroys
        nothing (the released code overwrites it); the old one is kept as previous.pt."""
        self.average_buffers()
        if self.rank == 0:
            log, last = self.folder / "log.jsonl", self.folder / "last.pt"
            checkpoint = {
                "student": self.student.state_dict(), "teacher": self.teacher.state_dict(), "center": self.center,
                "optimizer": optimizer.state_dict() if optimizer else None, "step": self.step, "results": self.results,
                "labels": self.labels, "images": self.images, "unreadable": sorted(self.unreadable), "settings": asdict(self.settings),
                "log_bytes": log.stat().st_size if log.exists() else 0,
            }
            with data.replacing(last) as temporary:
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
                raise ValueError(f"another run works in {self.folder} ({self.lock.read() or 'unknown'}; a killed torchrun may have left "
                                 "it); wait for its end, end it, or give another --name") from None
            self.lock.truncate(0)
            print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=self.lock, flush=True)
            for left in self.folder.glob(".*.*"):  # of what was cut short: a checkpoint, features in their space
                left.unlink()
        dist.barrier()
        found, wrong, log = None, [], self.folder / "log.jsonl"
        for name in ("last.pt", "previous.pt"):
            if not found and (self.folder / name).exists():
                try:
                    found, source = read_state(self.folder / name), name
                except ValueError as error:
                    wrong.append(str(error))
        data.require(found or not wrong, f"{'; '.join(wrong)}. Delete {self.folder} to start anew, or give another --name")
        states = self.gather(found["step"] if found else self.folder.is_dir() and "nothing")
        data.require(len(set(states)) == 1, f"{self.folder} must be on a file system that all machines share: the processes found {states}")
        if not found:
            if self.rank == 0:
                log.unlink(missing_ok=True)  # of a start that came to nothing
            return
        now, then = asdict(self.settings), found["settings"]
        differ = [f"--{key} {then.get(key)} there, {now[key]} here" for key in now if key not in MAY_DIFFER and now[key] != then.get(key)]
        data.require(not differ, f"{self.folder} was made with other settings ({'; '.join(differ)}); delete it, or give another --name")
        data.require(found["images"] == self.images, f"{self.folder} was made with {found['images']:,} images, there are {self.images:,} "
                     "now; delete it, or give another --name")
        self.student.load_state_dict(found["student"])
        self.teacher.load_state_dict(found["teacher"])
        self.center.copy_(found["center"])
        self.step, self.results, self.labels = found["step"], found["results"], found["labels"]
        self.resumed, self.unreadable = found["optimizer"], set(found["unreadable"])
        if self.rank == 0:
            if wrong:
                os.replace(self.folder / "last.pt", self.folder / "damaged.pt")
            if log.exists():
                os.truncate(log, min(found["log_bytes"], log.stat().st_size))  # lines after the checkpoint will come again
        if source != "last.pt":
            self.say("resume", f"{wrong[0] if wrong else 'last.pt is missing'}: going back to {source}, the checkpoint before")
        self.done = self.resumed is None and self.step > 0  # the last checkpoint holds no optimizer
        self.say("resume", f"{self.folder} at {'its end' if self.done else f'step {self.step:,}'}")

    def gather(self, value) -> list:
        """What each process has, on all of them."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def check_finite(self) -> None:
        """Raise FloatingPointError where a loss or a gradient of any process was not finite since the start. Reading it waits
        for the device, so it is done before logging and saving only."""
        finite = all_reduce(self.finite.clone(), dist.ReduceOp.MIN)
        if not finite:
            raise FloatingPointError(f"a loss or a gradient is not finite by step {self.step}; {self.folder}/last.pt is the last good "
                                     f"state. Try a lower --lr (now {self.settings.lr}) under another --name")

    def gather_unreadable(self, tracklets) -> None:
        """Unite what the processes found unreadable. Raises ValueError if that is more than 1% of the images."""
        self.unreadable = set().union(*self.gather(self.unreadable))
        data.refuse_unreadable(tracklets, sorted(self.unreadable), len(tracklets))

    def on_signal(self, number: int, _) -> None:
        """Ctrl-C or SIGTERM (torchrun may send both): training ends the process after its step, with a checkpoint; others here."""
        self.stop_asked = number
        if not self.training:
            self.leave()

    def leave(self) -> None:
        """Say how to go on, and exit as a process that got a signal does."""
        last = self.folder / "last.pt"
        self.say("stopped", f"the same command goes on from {last if last.exists() else 'the start'}")
        sys.exit(128 + (self.stop_asked or signal.SIGTERM))


def join_processes() -> tuple[int, int, torch.device]:
    """Rank, world size and device, from torchrun's environment or as the only process."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        # Of what is float32, torch lets convolutions use TF32, and nothing else should: it would
        # put logits off by up to 0.001, which divided by the teacher's temperature is 0.02.
        torch.cuda.set_device(device)
    store, rank, world_size = next(rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):  # a store that was restarted holds dead processes' addresses
        store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size,
                            timeout=timedelta(days=1))  # others wait while one denoises
    return rank, world_size, device


def read_state(file: Path) -> dict:
    """A checkpoint of ours on the CPU, whole: its checksums are compared, which torch.load does not. Raises ValueError where it is
    damaged; what goes wrong for other reasons (a disk, too little memory) says nothing about the file and goes through."""
    try:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"checksum of {damaged}")
        return torch.load(file, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error})") from None


def make_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """AdamW. Matrices and kernels decay, biases and norms do not."""
    decaying = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim == 1]
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def clip_gradients(network: nn.Module, largest: float) -> torch.Tensor:
    """Scale each parameter's gradient down to a norm of `largest` (DINO); the norms before."""
    norms = []
    for parameter in network.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm()
            parameter.grad.mul_((largest / (norm + 1e-6)).clamp(max=1))
            norms.append(norm)
    return torch.stack(norms)


def networks_in_bfloat16(s: Settings, device: torch.device) -> torch.autocast:
    """The context in which networks compute, in bfloat16 where it is asked for. Their logits, the
    loss, parameters and the optimizer are float32 anyway."""
    enabled = s.precision == "bfloat16"
    if s.precision == "auto" and device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def load_epoch(run: Run, tracklets, labels: np.ndarray, K: int, epoch: int, steps: int):
    """Yields this process's images, uint8 (B, 3, H, W), of every step of an epoch that is still to
    come: B is its share of a batch, K images of each identity side by side. An unreadable image is
    noted and replaced by another of its identity."""
    s = run.settings
    local = s.batch // run.world_size
    batches = data.sample_identities(labels, K, s.batch, s.seed, epoch, steps)
    left = batches[run.step - epoch * steps :]
    mine = left[:, run.rank * local : (run.rank + 1) * local]
    loaded = data.load_batches(tracklets, list(mine), s.canvas, s.workers)
    for rows, (images, readable) in zip(mine, loaded):
        if not readable.all():
            run.unreadable.update(rows[~readable.numpy()].tolist())
            images = data.replace_unreadable(images, readable, K)
        yield images


def train_epoch(
    run: Run,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    tracklets,
    labels: np.ndarray,
    K: int,
    epoch: int,
    steps: int,
    total: int,
) -> None:
    """Identity-guided self-distillation on labels (N,), from run.step to the end of an epoch of so
    many steps. total: the steps of all epochs, over which schedules run (the released code lays
    them out for the steps of the first K). network: the student, as DistributedDataParallel wraps
    it. Nothing in a step waits for the device.

    Raises ValueError where images are unreadable or identities too few, FloatingPointError where
    the loss is not finite.
    """
    s = run.settings
    kinds = view_kinds(s)
    clock = time.time()
    first_step = run.step
    run.training = True
    for images in load_epoch(run, tracklets, labels, K, epoch, steps):
        # this step's schedule and its own random numbers, so that a resumed run repeats it
        now = schedule(s, run.step, total)
        for group in optimizer.param_groups:
            group["lr"] = now.lr
        optimizer.param_groups[0]["weight_decay"] = now.weight_decay
        seed = np.random.SeedSequence((s.seed, epoch, run.step)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))

        # the teacher sees the two global views, the student all
        images = images.to(run.device, non_blocking=True)
        views = make_views(images, kinds, generator, run.rank, run.world_size)
        run.teacher.train()  # it normalises by its own batch, as the student does
        with networks_in_bfloat16(s, run.device):
            with torch.no_grad():
                teacher = run.teacher(views[:2])  # logits (2, B, D)
            student = network(views)  # logits (V, B, D)

        # what the teacher says of one view, the student learns to say of its identity's others
        center = run.center
        if s.centering == "sinkhorn":
            center = sinkhorn(teacher, now.teacher_temp)
        loss = identity_loss(student, teacher, center, K, s.student_temp, now.teacher_temp, s.loss)
        loss.backward()
        norms = clip_gradients(run.student, s.clip)
        if epoch < s.freeze_last:
            run.student.head.last_layer.weight.grad = None
        optimizer.step()
        optimizer.zero_grad()

        # the next step's center and teacher
        if s.centering == "ema":
            run.center = update_center(run.center, teacher, s.center_momentum)
        update_teacher(run.teacher, run.student, now.ema)
        loss = loss.detach()
        run.finite *= torch.isfinite(loss) & torch.isfinite(norms).all()
        run.step += 1

        if run.step % s.log_every == 0 or run.step == total:
            run.check_finite()
            rate = (run.step - first_step) * s.batch / (time.time() - clock)
            p = torch.softmax((teacher - center) / now.teacher_temp, dim=-1)
            entropy, used = teacher_statistics(p)
            log_step(run, K, epoch, total, now, rate, all_mean(loss).item(), entropy, used)
        stop = any_process_was_stopped(run)
        if stop or run.step % s.save_every == 0 or run.step == (epoch + 1) * steps:
            run.check_finite()
            run.gather_unreadable(tracklets)
            run.save(optimizer)
        if stop:
            run.leave()
    run.training = False
    if any_process_was_stopped(run):  # asked during the last save
        run.leave()


def any_process_was_stopped(run: Run) -> bool:
    """Whether Ctrl-C or SIGTERM reached any process; on the CPU, so that no device waits."""
    return bool(all_reduce(torch.tensor(float(run.stop_asked > 0))))


def log_step(
    run: Run,
    K: int,
    epoch: int,
    total: int,
    now: Schedule,
    rate: float,
    loss: float,
    entropy: float,
    used: int,
) -> None:
    """A line on the terminal and in log.jsonl; a warning, once, where the teacher has been
    collapsed in three lines running."""
    s = run.settings
    uniform = math.log(s.prototypes)
    minutes, seconds = divmod(round((total - run.step) * s.batch / rate), 60)
    run.say(
        "",
        f"step {run.step:>5,}/{total:,}  K {K}  loss {loss:.3f} of {uniform:.3f}  "
        f"entropy {entropy / uniform:4.0%}  used {used:,}  lr {now.lr:.1e}  "
        f"{rate:6,.0f} images/s  {minutes}:{seconds:02} left",
    )
    run.log(
        "train",
        stage=run.stage,
        step=run.step,
        epoch=epoch,
        K=K,
        loss=loss,
        entropy=entropy,
        entropy_share=entropy / uniform,
        prototypes_used=used,
        images_per_second=rate,
        **now._asdict(),
    )
    words = ""
    if run.step > s.warmup * total:
        words = collapse(loss, entropy, used, s.prototypes, s.batch // K)
    run.collapsed = run.collapsed + 1 if words else min(run.collapsed, 0)
    if run.collapsed == 3:
        run.say("warning", words)
        run.collapsed = -math.inf


def view_kinds(s: Settings) -> list[Views]:
    """The views of an image by the recipe: two global ones, then the local ones."""
    common = {"ratio": s.ratio, "jitter": s.jitter, "grey_p": s.grey, "blur_sigma": s.blur_sigma}
    first = Views(s.size, s.global_scale, blur_p=s.blur[0], **common)
    second = Views(s.size, s.global_scale, blur_p=s.blur[1], solarize_p=s.solarize, **common)
    local = Views(s.local_size, s.local_scale, blur_p=s.blur[2], **common)
    return [first, second] + [local] * s.local_crops


def read_inputs(run: Run) -> tuple:
    """Find the tracklets, or draw walkers, and refuse what cannot be trained on: the index, the labels (N,) of stage 1 or those given,
    the truth (N,) where it is known, and the held-out split or None."""
    s, root, clock, drawn = run.settings, data_folder(run.settings), time.time(), ""
    if not s.data and run.rank == 0 and not root.exists():
        run.say("data", f"drawing walkers into {root}/")
        data.draw_walkers(root, s.seed)
        drawn = f" (drawn in {time.time() - clock:.0f} s)"
    dist.barrier()
    train_folder, test_folder = data.find_splits(root)
    if run.rank > 0:
        dist.barrier()  # the first process scans; the others may find its index
    tracklets, labels = data.read_identities(s.labels, train_folder) if s.labels else (data.read_tracklets(train_folder), None)
    test = data.read_tracklets(test_folder) if test_folder else None
    if run.rank == 0:
        dist.barrier()
    named = f"{len(tracklets):,} images of {tracklets.track.max() + 1:,} identities, by {s.labels}"
    run.say("data", f"{train_folder}: {named if s.labels else tracklets}{drawn}")
    run.say("", f"{test_folder}: {test}, held out" if test else f"{root} does not hold all of train/, test/ and test.json: no evaluation")
    truth = data.read_labels(root / "train.json", tracklets) if test and not s.labels and (root / "train.json").exists() else None
    data.require(s.identities != "true" or truth is not None, f"--identities true: {root} does not hold train/, test/ and their .json")
    if labels is None:
        labels = {"instance": np.arange(len(tracklets)), "true": truth}.get(s.identities, tracklets.track)
    data.check_readable(tracklets)
    Ks, finds = plan_epochs(s)
    data.check_batches(labels, dict.fromkeys(Ks[: min(finds, default=len(Ks))]), s.batch)
    return tracklets, labels, truth, label_tracklets(test, data.read_labels(root / "test.json", test)) if test else None


def measure(run: Run, benchmark, stage: str) -> torch.Tensor | None:
    """Retrieval on the held-out split, once for each stage: printed, logged, kept in the checkpoint. The features, if it was now."""
    s = run.settings
    if benchmark is None or stage in run.results:
        return None
    run.average_buffers()
    features, _ = extract(run.teacher.backbone, benchmark.images, s.size, run.device, s.workers)
    result = run.results[stage] = evaluate_features(features, benchmark)
    del result["ap"]
    run.say("evaluate", f"{stage:<9}" + "".join(f" {key} {result[key]:5.1%}  " for key in ("mAP", "R1", "R5", "R10")))
    run.log("evaluate", stage=stage, step=run.step, **result)
    return features


def find_identities(run: Run, tracklets, truth: np.ndarray | None) -> None:
    """Denoise with the teacher's features, printing each level: labels (N,) into run.labels, on every process, and identities.json."""
    s, clock = run.settings, time.time()
    run.average_buffers()
    features = extract_to_file(run.folder, run.teacher.backbone, tracklets, s.size, run.device, s.workers)
    N, seconds = len(tracklets), time.time() - clock
    run.say("denoise", f"{N:,} features of {features.shape[1]} dimensions in {seconds:.0f} s, {N / seconds:,.0f} images/s")
    if run.rank == 0:
        for file in run.folder.glob("features-*"):  # of the round before, or of one cut short; they are large
            if file.stem != Path(features.filename).stem:
                file.unlink()
        labels, report, space = denoise_tracklets(
            tracklets, features, run.folder / "features.scratch", truth, say=lambda text: run.say("", text), **denoising_options(s)
        )
        run.unreadable.update(report.pop("unreadable"))
        run.log("denoise", step=run.step, **report)
        if space is not None:
            with data.replacing(run.folder / "space.npz") as temporary, open(temporary, "wb") as file:
                np.savez(file, **space._asdict())
        show_identities(run.folder / "denoised.png", tracklets, labels)
        data.write_labels(run.folder / "identities.json", tracklets, labels)
        try:
            data.check_batches(labels, s.K, s.batch)
        except ValueError as error:
            raise ValueError(f"stage 2 cannot be trained on these identities: {error}. Other settings can start from this encoder: "
                             f"--weights {run.folder}/last.pt --name NEW") from None
    run.gather_unreadable(tracklets)
    run.labels = torch.from_numpy(labels).int() if run.rank == 0 else torch.empty(N, dtype=torch.int32)
    dist.broadcast(run.labels, 0)


def main() -> None:
    """Data, stage 1, denoising, stage 2, evaluation: the same command goes on where the last one ended."""
    s = parse_settings()
    run = Run(s)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.on_signal)
    tracklets, labels, truth, benchmark = read_inputs(run)
    run.images = len(tracklets)
    run.resume()  # what the run's folder holds already
    try:
        from torch.utils.tensorboard import SummaryWriter

        run.tensorboard = SummaryWriter(run.folder) if run.rank == 0 else None
    except ImportError:  # curves are an extra for those who have it
        pass
    million = sum(p.numel() for p in run.student.backbone.parameters()) / 1e6
    run.say("network", f"{s.arch}, {million:.1f} M parameters, images {s.size[0]}x{s.size[1]}, recipe {s.recipe}, "
            f"{run.world_size} x {run.device.type}, {run.folder}/")
    if run.step == 0:
        measure(run, benchmark, "random")
        if s.weights:
            report = load_weights(run.student.backbone, s.weights)
            run.teacher.backbone.load_state_dict(run.student.backbone.state_dict())
            run.say("weights", f"{s.weights}: {describe(report)}")
        run.save()

    Ks, finds = plan_epochs(s)
    steps = s.epoch_steps or max(1, len(tracklets) // s.batch)  # of an epoch, whatever K and the labels are
    network = DistributedDataParallel(run.student, gradient_as_bucket_view=True)
    optimizer = make_optimizer(run.student)
    if run.resumed:
        optimizer.load_state_dict(run.resumed)
        run.resumed = None  # as large as the networks, twice
    for epoch in range(run.step // steps, len(Ks)):
        if epoch in finds and run.step == epoch * steps:
            measure(run, benchmark, finds[epoch])
            find_identities(run, tracklets, truth)
        labels = labels if run.labels is None else run.labels.numpy()
        across = bool(s.labels) or run.labels is not None  # identities across videos
        stage = "tracklet" if s.identities == "cion" and not across else s.identities
        if stage != run.stage or epoch in finds:
            run.stage, kept = stage, labels[labels >= 0]
            run.say(f"stage {1 + across}", f"{len(np.unique(kept)):,} {stage} identities of {len(kept):,} images, "
                    f"from step {run.step:,} of {len(Ks) * steps:,}, {s.batch} images each")
        train_epoch(run, network, optimizer, tracklets, labels, Ks[epoch], epoch, steps, len(Ks) * steps)

    if not run.done:
        labels = labels if run.labels is None else run.labels.numpy()
        features = measure(run, benchmark, "tracklet" if s.identities == "cion" and not sum(s.epochs) else s.identities)
        if run.rank == 0:
            rows = data.sample_identities(labels, s.K[-1], s.batch, s.seed, 0, 1)[0, :16]
            images = torch.stack([data.Images(tracklets, s.canvas)[i][0] for i in rows])
            show_views(run.folder / "crops.png", images, view_kinds(s), torch.Generator().manual_seed(s.seed))
            if features is not None:
                queries = benchmark.query[np.linspace(0, len(benchmark.query) - 1, 12).astype(int)]
                show_retrieval(run.folder / "retrieval.png", benchmark, features, np.unique(queries))
        run.save()
    run.gather_unreadable(tracklets)
    if run.unreadable:
        run.say("data", f"{len(run.unreadable):,} unreadable images were skipped, the first: {tracklets.path(min(run.unreadable))}")
    for stage, result in run.results.items():
        run.say("result" if stage == "random" else "", f"{stage:<9} mAP {result['mAP']:5.1%}   R1 {result['R1']:5.1%}")
    files = sorted(file.name for file in run.folder.iterdir() if not file.name.startswith((".", "events")))
    run.say("done", f"{run.folder}/: {', '.join(files)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
