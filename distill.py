"""Identity-guided self-distillation: how images of one person teach each other (paper, section 3.3). Views of the images, the network,
the loss in linear time, what keeps the teacher from collapsing, and a step of training.

Read first: `identity_loss`, `student_targets`, `Distillation`.
"""
import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed as dist, nn
from torchvision.utils import save_image

from model import normalize


@dataclass
class Views:
    """The distribution of one kind of view: random crops and augmentation. Defaults are the paper's first global crop."""
    size: tuple[int, int] = (256, 128)  # height, width
    scale: tuple[float, float] = (0.8, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (0.4, 0.6)  # width / height
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue; 0 leaves one out
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 1.0
    blur_sigma: float = 2.0  # largest sigma of the Gaussian, in pixels; the smallest is 0.1
    solarize_p: float = 0.0
    copies: int = 1  # views of this kind that are made of every image

    def draw(self, n: int, canvas: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random parameters of n views, (n, ...) each, of images of one height and width. On the CPU: the same for every device."""
        (H, W), limits = canvas, torch.tensor(canvas)[:, None]  # (2, 1)
        area = H * W * torch.empty(n, 10).uniform_(*self.scale, generator=generator)  # ten tries of a box in whole pixels
        ratio = torch.empty(n, 10).uniform_(*torch.tensor(self.ratio).log().tolist(), generator=generator).exp()
        tries = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()])  # (2, n, 10), height and width
        fits = ((tries > 0) & (tries <= limits[:, None])).all(0)
        size = tries[:, torch.arange(n), fits.float().argmax(1)]  # (2, n), the first that fits, as torchvision's RandomResizedCrop
        corner = (torch.rand(2, n, generator=generator) * (limits - size + 1)).floor()
        allowed = min(max(W / H, self.ratio[0]), self.ratio[1])  # none fits: the largest centred box of an allowed ratio
        largest = torch.tensor([[min(H, max(1, round(W / allowed)))], [min(W, max(1, round(H * allowed)))]])
        box = torch.where(fits.any(1), torch.cat([corner, size]), torch.cat([(limits - largest) // 2, largest]))
        uniform, order = torch.rand(n, 10, generator=generator), torch.rand(n, 4, generator=generator).argsort(1)
        b, c, s, h = self.jitter
        low, high = torch.tensor([1 - b, 1 - c, 1 - s, -h]), torch.tensor([1 + b, 1 + c, 1 + s, h])
        return {"top": box[0], "left": box[1], "height": box[2], "width": box[3], "flip": uniform[:, 0] < 0.5,
                "jitter": uniform[:, 1] < self.jitter_p, "grey": uniform[:, 6] < self.grey_p, "solarize": uniform[:, 9] < self.solarize_p,
                "factors": low + (high - low) * uniform[:, 2:6], "order": order,  # (n, 4): how much of each operation, which comes first
                "sigma": torch.where(uniform[:, 7] < self.blur_p, 0.1 + (self.blur_sigma - 0.1) * uniform[:, 8], 0.0)}

    def render(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """uint8 images (B, 3, H, W) and n drawn views -> (n, 3, height, width) in [0, 1], view i of image i mod B."""
        x = self.crop_resize(images, drawn)
        for place, op in product(range(4), (op for op in range(4) if self.jitter[op])):
            x = apply_to(x, drawn["jitter"] & (drawn["order"][:, place] == op), lambda x, f: adjust(x, op, f), drawn["factors"][:, op])
        x = apply_to(x, drawn["grey"], lambda x: grey(x).repeat(1, 3, 1, 1))
        x = apply_to(x, drawn["sigma"] > 0, self.blur, drawn["sigma"])
        return apply_to(x, drawn["solarize"], lambda x: torch.where(x >= 0.5, 1 - x, x))

    def crop_resize(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """Crop, resize (bilinear with antialiasing, as PIL does it) and flip: uint8 (B, 3, H, W) -> (n, 3, height, width) in [0, 1]."""
        x = images.movedim(3, 1).contiguous().movedim(1, 3).float().div_(255)  # columns first in memory: cheapest to do in uint8
        for dim, start, length, target in ((3, "left", "width", self.size[1]), (2, "top", "height", self.size[0])):
            taps = 2 * max(1, math.ceil(drawn[length].max() / target)) + 1
            start, length, flip = (drawn[key].to(x.device, non_blocking=True)[:, None, None] for key in (start, length, "flip"))
            pixel = torch.arange(target, device=x.device)[:, None] + 0.5
            scale = length / target
            reach = scale.clamp(min=1)
            center = (torch.where(flip, target - pixel, pixel) if dim == 3 else pixel) * scale  # (n, target, 1), within the box
            place = (center - reach).floor() + torch.arange(taps, device=x.device)  # (n, target, taps)
            weight = (1 - (place + 0.5 - center).abs() / reach).clamp(min=0) * ((place >= 0) & (place < length))
            x = mix_lines(x, dim, start + place, weight)
        return x.contiguous()

    def blur(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gaussian blur of (n, 3, h, w), cut off at 3 sigma; sigma (n, 1, 1, 1) in pixels, none above `blur_sigma`."""
        offset = torch.arange(-int(3 * self.blur_sigma), int(3 * self.blur_sigma) + 1, device=x.device)
        weight = torch.exp(-(offset**2) / (2 * sigma[:, 0] ** 2)) * (offset.abs() <= 3 * sigma[:, 0])  # (n, 1, taps)
        for dim in (2, 3):
            x = mix_lines(x, dim, torch.arange(x.shape[dim], device=x.device)[:, None] + offset, weight)
        return x


def apply_to(x: Tensor, chosen: Tensor, operation, *parameters: Tensor) -> Tensor:
    """Apply an operation to the chosen views of x, in place where it can. chosen, parameters: (n,), on the CPU: no device is waited for."""
    rows = chosen.nonzero()[:, 0]
    parameters = [p[rows].to(x.device, non_blocking=True)[:, None, None, None] for p in parameters]
    if len(rows) in (0, len(x)):
        return operation(x, *parameters) if len(rows) else x
    rows = rows.to(x.device, non_blocking=True)
    return x.index_copy_(0, rows, operation(x.index_select(0, rows), *parameters))


def mix_lines(x: Tensor, dim: int, index: Tensor, weight: Tensor) -> Tensor:
    """Lines of the result are weighted means of lines of x (B, 3, H, W): rows (dim 2) or columns (dim 3). index, weight: (n, lines, taps)
    or broadcast to it; view i is of image i mod B, and what lies outside of it has no weight."""
    lines = x.movedim(dim, 1)  # (B, L, 3, pixels of a line)
    B, L = lines.shape[:2]
    weight = weight * ((index >= 0) & (index < L))
    weight = weight / weight.sum(2, keepdim=True)
    index = index.clamp(0, L - 1).long() + torch.arange(len(weight), device=x.device)[:, None, None] % B * L
    mixed = F.embedding_bag(index.flatten(0, 1), lines.reshape(B * L, -1), mode="sum", per_sample_weights=weight.flatten(0, 1))
    return mixed.view(*weight.shape[:2], *lines.shape[2:]).movedim(1, dim)


def grey(x: Tensor) -> Tensor:
    """Luma (n, 1, h, w) of views (n, 3, h, w), by ITU-R 601 weights."""
    return (0.299 * x[:, :1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def adjust(x: Tensor, operation: int, factor: Tensor) -> Tensor:
    """Brightness, contrast, saturation (operation 0, 1, 2) of views (n, 3, h, w) times, or hue (3) plus, a factor (n, 1, 1, 1)."""
    if operation == 0:
        return x.mul_(factor).clamp_(0, 1)
    if operation < 3:  # the distance from the grey of the view's mean, or of each pixel
        return torch.lerp(grey(x.mean((2, 3), keepdim=True) if operation == 1 else x), x, factor).clamp_(0, 1)
    (r, g, b), value = x.unbind(1), x.amax(1)  # (n, h, w)
    chroma = value - x.amin(1)
    not_red, not_green = (value - r).sign_(), (value - g).sign_()  # 0 where that channel is the largest, else 1
    hue = (g - b).lerp_((b - r).add_(chroma, alpha=2).lerp_((r - g).add_(chroma, alpha=4), not_green), not_red)
    hue = hue.div_(chroma.clamp(min=1e-6)).add_(6 * factor[:, 0])
    hue.sub_((hue / 6).floor_(), alpha=6)  # on a circle of 6 sectors: red at 0, green at 2, blue at 4
    for channel, distance in enumerate((torch.minimum(hue, 6 - hue), (hue - 2).abs_(), (hue - 4).abs_())):  # right where below 2
        torch.addcmul(value, distance.sub_(1).clamp_(0, 1), chroma, value=-1, out=x[:, channel])
    return x


def make_views(images: Tensor, kinds: list[Views], generator, rank=0, world_size=1, memory_format=torch.contiguous_format) -> list[Tensor]:
    """Normalised views, each (B, 3, h, w), of this rank's uint8 images (B, 3, H, W): `copies` of every kind. Parameters are drawn for
    the global batch and each rank takes its rows, so views don't depend on the world size."""
    (B, _, *canvas), views = images.shape, []
    chunk = max(1, 2**17 // math.prod(canvas)) if images.device.type == "cpu" else B  # pixels that a CPU's cache holds
    for kind in kinds:
        drawn = kind.draw(kind.copies * world_size * B, canvas, generator)
        drawn = {key: value.unflatten(0, (kind.copies, world_size, B))[:, rank] for key, value in drawn.items()}  # (copies, B, ...)
        made = torch.empty(kind.copies * B, 3, *kind.size, device=images.device, memory_format=memory_format).unflatten(0, (-1, B))
        for rows in (slice(start, start + chunk) for start in range(0, B, chunk)):
            x = kind.render(images[rows], {key: value[:, rows].flatten(0, 1) for key, value in drawn.items()})
            made[:, rows] = normalize(x).unflatten(0, (kind.copies, -1))
        views += made
    return views


def show_views(file, images: Tensor, kinds: list[Views], generator: torch.Generator) -> None:
    """Write a picture: a row for each image (uint8 (B, 3, H, W)), as it is and then all its views."""
    (height, width), zoom = kinds[0].size, max(1, 128 // kinds[0].size[0])
    columns = [F.interpolate(images.float() / 255, kinds[0].size, mode="bilinear", antialias=True)]
    for kind in kinds:
        x = kind.render(images, kind.draw(kind.copies * len(images), images.shape[2:], generator))
        columns += F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), value=1.0).chunk(kind.copies)
    sheet = torch.stack(columns, 1).flatten(0, 1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    save_image(sheet, file, nrow=len(columns), pad_value=1.0)


class Network(nn.Module):
    """Backbone and projection head. V crops, each (B, 3, h, w) -> unit vectors z (V, B, C), prototypes (D, C); z @ prototypes.T: logits."""
    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.memory_format = getattr(backbone, "memory_format", torch.contiguous_format)
        self.to(memory_format=self.memory_format)

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        batches = [torch.cat(list(same_size)) for _, same_size in groupby(crops, key=lambda crop: crop.shape)]
        z, prototypes = self.head(torch.cat([self.backbone(batch) for batch in batches]))
        return z.unflatten(0, (len(crops), -1)), prototypes


def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, over parameters; its batch-norm statistics are its own (training mode)."""
    torch._foreach_lerp_([p.detach() for p in teacher.parameters()], [p.detach() for p in student.parameters()], 1 - momentum)


def identity_loss(student: Tensor, teacher: Tensor, center: Tensor, K: int, student_temp: float = 0.1, teacher_temp: float = 0.04):
    """CION's loss with the running center (paper, equations 5 to 7), in time linear in K; DINO's where K = 1. Scalar.
    student: logits (V, B, D), the first two views global. teacher: logits (2, B, D). center: (D,). The batch is ordered by identity,
    K images of each contiguous; ValueError where K does not divide B. Training has the same in less memory: `matching_loss`."""
    targets = student_targets(torch.softmax((teacher.detach() - center) / teacher_temp, dim=-1), K, len(student))
    return -sum((t * F.log_softmax(logits / student_temp, dim=-1)).sum() for t, logits in zip(targets, student))


def student_targets(p: Tensor, K: int, V: int):
    """One target t (B, D) for each of V student crops, in order: the loss is the sum over crops of -<t, log q>. p (2, B, D): the teacher's.
    Definition: the mean over the 2 (V - 1) pairs of a teacher view and a different student view, with H(p, q) = -<p, log q>, of
        [ mean_b H(p_b, q_b) + sum over i != j of mean over identities of H(p_i, q_j) ] / (K (K - 1) + 1).
    H is linear in p: image b meets its K - 1 partners at once in G_b - p_b, with G_b the sum of p over b's identity.
    A mean over the B / K identities is K / B times a sum over the batch: both parts are one target for each image,
        t_b = [ p_b + K (G_b - p_b) ] / (B (K (K - 1) + 1)).
    Teacher views add up too: a global crop's target comes from the other view, a local crop's once from p[0] + p[1]."""
    B = p.shape[1]
    if B % K:
        raise ValueError(f"a batch of {B} images cannot hold K={K} of each identity")
    for teachers, crops in ((p[1:], 1), (p[:1], 1), (p, V - 2)):
        t = teachers.sum(0).unflatten(0, (-1, K))  # (B / K, K, D)
        t = (t * (1 - K)).add_(t.sum(1, keepdim=True), alpha=K).mul_(1 / (B * (K * (K - 1) + 1) * 2 * (V - 1))).flatten(0, 1)
        yield from [t] * crops


def matching_loss(z: Tensor, prototypes: Tensor, p: Tensor, K: int, student_temp: float = 0.1) -> Tensor:
    """The same loss of unit vectors z (V, B, C) and prototypes (D, C), with z @ prototypes.T the logits, and the teacher's p (2, B, D).
    One crop's logits l are all that is ever in memory: the gradient of -<t, log softmax(l)>, softmax(l) * sum(t) - t, is carried on to z
    and the prototypes at once. In float32 even under autocast: a logit is divided by a temperature and told from D others."""
    z, prototypes = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, prototypes))
    loss, dz, dprototypes = z.new_zeros(()), torch.empty_like(z), torch.zeros_like(prototypes)
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        for v, t in enumerate(student_targets(p, K, len(z))):
            log_q = torch.log_softmax((z[v] @ prototypes.T).div_(student_temp), dim=-1)  # (B, D)
            loss -= (t * log_q).sum()
            gradient = log_q.exp_().mul_(t.sum(-1, keepdim=True)).sub_(t).div_(student_temp)
            torch.mm(gradient, prototypes, out=dz[v])
            dprototypes.addmm_(gradient.T, z[v])
    linear = torch.dot(z.flatten(), dz.flatten()) + torch.dot(prototypes.flatten(), dprototypes.flatten())
    return loss + (linear - linear.detach())  # zero in value; its gradient is (dz, dprototypes)


def all_reduce(x: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
    """Sum (or another operation) of x over all processes, in place; x itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(x, operation)
    return x


def update_center(center: Tensor, teacher: Tensor, momentum: float = 0.9) -> Tensor:
    """EMA of the teacher's mean logits over the global batch. center (D,), teacher (2, B, D) with the same B everywhere -> (D,)."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return center.lerp(all_reduce(teacher.detach().float().mean((0, 1))) / processes, 1 - momentum)


def sinkhorn(logits: Tensor, temp: float = 0.04, iterations: int = 3) -> Tensor:
    """Teacher probabilities (..., D), float32, of logits (..., D): over the global batch all prototypes are used about equally (SwAV,
    Caron et al., NeurIPS 2020). On logarithms, so that nothing under- or overflows; how processes split the batch changes nothing."""
    log_p = torch.log_softmax(logits.detach().float().flatten(0, -2) / temp, dim=-1)
    for _ in range(iterations):
        largest = all_reduce(log_p.max(0).values, dist.ReduceOp.MAX)
        log_p -= largest + all_reduce((log_p - largest).exp_().sum(0)).log()  # prototypes share the batch
        log_p -= log_p.logsumexp(1, keepdim=True)  # every image is one unit
    return log_p.exp_().view(logits.shape)


def teacher_statistics(p: Tensor) -> tuple[float, int]:
    """Mean entropy (nats) of the teacher's p (2, B, D) over the global batch, and how many prototypes are some image's first choice."""
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).detach()
    counts = all_reduce(torch.stack([entropy.sum(), entropy.new_tensor(entropy.numel())]))
    used = torch.zeros(p.shape[-1], device=p.device).index_fill_(0, p.argmax(-1).flatten(), 1.0)
    return (counts[0] / counts[1]).item(), int(all_reduce(used, dist.ReduceOp.MAX).sum())


def collapse(loss: float, entropy: float, used: int, D: int, identities: int) -> str:
    """What to say where the teacher does not tell the identities of a batch apart, and what to change; "" where it does."""
    if entropy > 0.995 * math.log(D) or abs(loss / math.log(D) - 1) < 0.003:
        return (f"uniform collapse: the teacher's entropy is {entropy:.3f} and the loss {loss:.3f}, of log D = {math.log(D):.3f}: all "
                "prototypes are alike and nothing is learned. Try --centering sinkhorn, --head_norm, fewer --prototypes or a higher --lr")
    if used <= min(D, identities) / 2:
        return (f"collapse to {'one prototype' if used == 1 else 'few prototypes'}: {used} for the {identities} identities of a batch. "
                "Try --centering sinkhorn, a lower --center_momentum or a higher --teacher_temp")
    return ""


class Distillation:
    """Student and teacher, and what else a step changes: the center, the loss scale, whether all was finite.

    student: a Network, of which the teacher begins as a copy. s: the settings of a run, see train.py.
    """

    def __init__(self, student: Network, s):
        self.student, self.settings = student, s
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        for network in (self.student, self.teacher) if s.compile else ():
            network.backbone.compile()
        self.device = next(student.parameters()).device
        self.precision = choose_precision(s.precision, self.device)
        self.center = torch.zeros(s.prototypes, device=self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.finite = torch.ones((), device=self.device)  # 0 once a loss or gradient was not; read now and then

    def state_dict(self) -> dict:
        """All of it as tensors and plain values."""
        return {part: getattr(self, part).state_dict() for part in ("student", "teacher", "scaler")} | {"center": self.center}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""
        for part in ("student", "teacher", "scaler"):
            getattr(self, part).load_state_dict(state[part])
        self.center.copy_(state["center"])

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW in two groups: matrices and kernels, whose weights decay, and biases and norms, whose do not."""
        decay, rest = ([p for p in self.student.parameters() if (p.ndim > 1) == many] for many in (True, False))
        return torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.0, fused=True)

    def step(self, network: nn.Module, optimizer, images: Tensor, kinds: list[Views], K: int, seeds: tuple, now, frozen: bool = False):
        """One step on this process's uint8 images (B, 3, H, W): its loss (a tensor: nothing here waits for the device) and the teacher's
        probabilities (2, B, D). network: the student, as DistributedDataParallel wraps it; seeds: integers from which the views are
        drawn; now: lr, weight_decay, ema, teacher_temp (train.Schedule); frozen: the prototypes stay as they are.

        The teacher sees all parts of the batch first, so centering is over the whole; then the student's gradients add up.
        """
        s = self.settings
        for group in optimizer.param_groups:
            group["lr"] = now.lr
        optimizer.param_groups[0]["weight_decay"] = now.weight_decay

        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        views = make_views(images.to(self.device, non_blocking=True), kinds, generator, rank, world_size, self.student.memory_format)
        parts = list(zip(*[view.chunk(s.accumulate) for view in views]))
        autocast = torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)
        with torch.no_grad(), autocast:
            self.teacher.train()  # it normalises by its own batch, as the student does
            z, prototypes = zip(*[self.teacher(part[:2]) for part in parts])
        logits = torch.cat(z, dim=1).float() @ prototypes[0].float().T  # (2, B, D)
        if s.centering == "sinkhorn":
            p = sinkhorn(logits, now.teacher_temp)
        else:
            p = torch.softmax((logits - self.center) / now.teacher_temp, dim=-1)
            self.center.copy_(update_center(self.center, logits, s.center_momentum))
        del logits

        loss = torch.zeros((), device=self.device)
        for i, (part, target) in enumerate(zip(parts, p.chunk(s.accumulate, dim=1))):
            with network.no_sync() if i + 1 < s.accumulate else nullcontext():
                with autocast:
                    z, prototypes = network(part)  # (V, B / parts, C), (D, C)
                part_loss = matching_loss(z, prototypes, target, K, s.student_temp) / s.accumulate
                self.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        self.scaler.unscale_(optimizer)  # the released code clips before this
        norms = clip_gradients(self.student, s.clip)
        self.finite *= torch.isfinite(loss) & (self.scaler.is_enabled() or torch.isfinite(norms).all())
        if frozen:
            self.student.head.last_layer.weight.grad = None
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        update_teacher(self.teacher, self.student, now.ema)
        return loss, p


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """What the networks compute in; parameters, losses and the optimiser stay float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def clip_gradients(network: nn.Module, largest: float) -> Tensor:
    """Scale each parameter's gradient down to a norm of `largest`, as DINO does; the norms before."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((largest / (norms + 1e-6)).clamp(max=1)))
    return norms
