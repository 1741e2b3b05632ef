"""Identity-guided self-distillation: how images of one person teach each other (paper, section 3.3).

The views (random crops and augmentation), made on the batch and on the training device; the multi-crop forward; the loss in
linear time; the two ways to keep the teacher from collapsing (running center, Sinkhorn-Knopp); the teacher's moving average.

Read first: `identity_loss`, `Views`, `sinkhorn`.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from model import normalize

# ---------------------------------------------------------------- views


@dataclass
class Views:
    """The distribution of one kind of view; `draw` samples it. Defaults are the paper's first global crop."""

    size: tuple[int, int] = (256, 128)  # height, width
    scale: tuple[float, float] = (0.8, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (0.4, 0.6)  # width / height
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 1.0
    blur_sigma: float = 2.0  # largest sigma of the Gaussian, in pixels; the smallest is 0.1
    solarize_p: float = 0.0
    copies: int = 1  # views of this kind that are made of every image

    def draw(self, n: int, canvas: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random parameters of n views on the CPU, one row a view: the same for any world size and any device."""
        top, left, height, width = random_boxes(n, canvas, self.scale, self.ratio, generator)
        uniform = torch.rand(n, 10, generator=generator)
        b, c, s, h = self.jitter
        low, high = torch.tensor([1 - b, 1 - c, 1 - s, -h]), torch.tensor([1 + b, 1 + c, 1 + s, h])
        return {
            "top": top, "left": left, "height": height, "width": width,
            "flip": uniform[:, 0] < 0.5,
            "jitter": uniform[:, 1] < self.jitter_p,
            "factors": low + (high - low) * uniform[:, 2:6],  # (n, 4)
            "order": torch.rand(n, 4, generator=generator).argsort(1),  # the four operations in random order
            "grey": uniform[:, 6] < self.grey_p,
            "sigma": torch.where(uniform[:, 7] < self.blur_p, 0.1 + (self.blur_sigma - 0.1) * uniform[:, 8], 0.0),
            "solarize": uniform[:, 9] < self.solarize_p,
        }  # fmt: skip

    def render(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """Views in [0, 1], (n, 3, height, width), of uint8 images (B, 3, H, W) with the parameters of n views that `draw` gave;
        n is a multiple of B: all images once, all images again, and so on."""
        x = jitter(crop_resize(images, drawn, self.size), drawn, self.jitter)
        x = at(x, drawn["grey"], lambda x: grey(x).repeat(1, 3, 1, 1))
        x = at(x, drawn["sigma"] > 0, lambda x, sigma: blur(x, sigma, self.blur_sigma), drawn["sigma"])
        return at(x, drawn["solarize"], lambda x: torch.where(x >= 0.5, 1 - x, x))


def random_boxes(n: int, canvas: tuple[int, int], scale, ratio, generator: torch.Generator) -> Tensor:
    """Top, left, height, width (4, n) in whole pixels: area uniform in `scale`, width/height log-uniform in `ratio`.

    As torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest centred box of an allowed ratio.
    """
    H, W = canvas
    area = H * W * torch.empty(n, 10).uniform_(*scale, generator=generator)
    aspect = torch.empty(n, 10).uniform_(*[torch.tensor(r).log().item() for r in ratio], generator=generator).exp()
    height, width = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (height <= H) & (width <= W) & (height > 0) & (width > 0)
    first = fits.float().argmax(1, keepdim=True)
    height, width = height.gather(1, first)[:, 0], width.gather(1, first)[:, 0]
    where = torch.rand(2, n, generator=generator)
    top, left = (where[0] * (H - height + 1)).floor(), (where[1] * (W - width + 1)).floor()
    allowed = min(max(W / H, ratio[0]), ratio[1])
    whole = torch.tensor([min(H, max(1, round(W / allowed))), min(W, max(1, round(H * allowed)))])
    centred = torch.tensor([(H - whole[0]) // 2, (W - whole[1]) // 2, *whole]).float()
    return torch.where(fits.any(1), torch.stack([top, left, height, width]), centred[:, None])


def mix_lines(lines: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of lines of pixels: lines (B, L, C); which ones and how much, (n, l, taps), view i of image i mod B ->
    (n, l, C). An embedding bag computes just this, fast on every device; resizing and blur are two each."""
    B, L, C = lines.shape
    first = torch.arange(len(index), device=lines.device) % B * L  # of each view's image
    index = (index.clamp(0, L - 1).long() + first[:, None, None]).flatten(0, 1)
    weight = (weight / weight.sum(2, keepdim=True)).flatten(0, 1)
    return F.embedding_bag(index, lines.reshape(B * L, C), mode="sum", per_sample_weights=weight).view(len(first), -1, C)


def resize_taps(start: Tensor, length: Tensor, target: int, device) -> tuple[Tensor, Tensor]:
    """What `mix_lines` takes to resize lines start..start+length (n,) to `target`: bilinear with antialiasing, as PIL does it."""
    taps = 2 * max(1, math.ceil(length.max() / target)) + 1
    start, length = (x.to(device, non_blocking=True)[:, None, None] for x in (start, length))
    scale = length / target
    width = scale.clamp(min=1)
    center = (torch.arange(target, device=device)[:, None] + 0.5) * scale  # (n, target, 1)
    place = (center - width).floor() + torch.arange(taps, device=device)  # (n, target, taps), within the box
    return place + start, (1 - (place + 0.5 - center).abs() / width).clamp(min=0) * ((place >= 0) & (place < length))


def crop_resize(images: Tensor, drawn: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Crop, resize and flip: uint8 (B, 3, H, W) -> (n, 3, *size) in [0, 1]. In memory a line holds its three colours, so that the
    last step needs no transposition."""
    columns = images.permute(0, 3, 1, 2).contiguous().float().div_(255)  # (B, W, 3, H)
    index, weight = resize_taps(drawn["left"], drawn["width"], size[1], images.device)
    flip = drawn["flip"].to(images.device, non_blocking=True)[:, None, None]
    x = mix_lines(columns.flatten(2), torch.where(flip, index.flip(1), index), torch.where(flip, weight.flip(1), weight))
    rows = x.unflatten(2, columns.shape[2:]).transpose(1, 3)  # (n, H, 3, w)
    x = mix_lines(rows.flatten(2), *resize_taps(drawn["top"], drawn["height"], size[0], images.device))
    return x.unflatten(2, (3, size[1])).transpose(1, 2)  # (n, 3, h, w)


def jitter(x: Tensor, drawn: dict[str, Tensor], strengths: tuple) -> Tensor:
    """Brightness, contrast, saturation and hue of the chosen views, in each view's own order; those of strength 0 are left out.

    At each of the four places views with the same operation are moved together, and all are moved back at the end.
    """
    now = torch.arange(len(x))  # which view is where
    used = [operation for operation, strength in enumerate(strengths) if strength]
    if not used:
        return x
    for place in range(4):
        turn = torch.where(drawn["jitter"], drawn["order"][:, place], -1)[now]
        groups = [(turn == operation).nonzero()[:, 0] for operation in used]
        rest = torch.isin(turn, torch.tensor(used), invert=True).nonzero()[:, 0]
        parts = [select(x, rows) for rows in groups + [rest]]
        for i, operation in enumerate(used):
            parts[i] = ADJUST[operation](parts[i], drawn["factors"][now[groups[i]], operation].to(x.device, non_blocking=True)[:, None, None, None])
        x, now = torch.cat(parts), now[torch.cat(groups + [rest])]
    return select(x, now.argsort())


def select(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x, for a row index on the CPU: the device is not waited for."""
    return x.index_select(0, rows.to(x.device, non_blocking=True))


def at(x: Tensor, chosen: Tensor, operation, *parameters: Tensor) -> Tensor:
    """Apply an operation to the chosen views (n,) of a batch only. It may work in place."""
    rows = chosen.nonzero()[:, 0]
    parameters = [p[rows].to(x.device, non_blocking=True)[:, None, None, None] for p in parameters]
    if len(rows) == len(x):
        return operation(x, *parameters)
    return x.index_copy_(0, rows.to(x.device, non_blocking=True), operation(select(x, rows), *parameters)) if len(rows) else x


def grey(x: Tensor) -> Tensor:
    """Luma of (n, 3, h, w) as (n, 1, h, w), ITU-R 601 weights."""
    r, g, b = x.split(1, dim=1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle: each channel is value - chroma * (its distance from the hue, on a circle of 6
    sectors, beyond 1 and up to 2)."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    not_red, not_green = (value - r).sign_(), (value - g).sign_()  # 0 where that channel is the largest, else 1
    hue = (g - b).lerp_((b - r).add_(chroma, alpha=2).lerp_((r - g).add_(chroma, alpha=4), not_green), not_red)
    hue = hue.div_(chroma.clamp(min=1e-6)).add_(6 * shift[:, 0])
    hue.sub_((hue / 6).floor_(), alpha=6)  # (n, h, w), 0 to 6
    distances = torch.minimum(hue, 6 - hue), (hue - 2).abs_(), (hue - 4).abs_()  # from red, green, blue; right below 2
    for channel, distance in enumerate(distances):
        torch.addcmul(value, distance.sub_(1).clamp_(0, 1), chroma, value=-1, out=x[:, channel])
    return x


ADJUST = (
    lambda x, f: x.mul_(f).clamp_(0, 1),  # brightness
    lambda x, f: torch.lerp(grey(x.mean((2, 3), keepdim=True)), x, f).clamp_(0, 1),  # contrast
    lambda x, f: torch.lerp(grey(x), x, f).clamp_(0, 1),  # saturation
    adjust_hue,
)


def blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur of (n, 3, h, w), cut off at 3 sigma, with a sigma (n, 1, 1, 1) of up to `largest` pixels for every view."""
    reach, sigma = int(3 * largest), sigma[:, 0]

    def along(lines):  # (n, L, C)
        offset = torch.arange(-reach, reach + 1, device=x.device)
        place = torch.arange(lines.shape[1], device=x.device)[:, None] + offset  # (L, taps)
        weight = torch.exp(-(offset**2) / (2 * sigma**2)) * (offset.abs() <= 3 * sigma) * ((place >= 0) & (place < lines.shape[1]))
        return mix_lines(lines, place.expand_as(weight), weight)

    columns = along(x.transpose(1, 2).flatten(2)).unflatten(2, x.shape[1::2]).transpose(1, 3)  # (n, h, 3, w) -> (n, w, 3, h)
    return along(columns.flatten(2)).unflatten(2, x.shape[1:3]).permute(0, 2, 3, 1)


def make_views(images: Tensor, kinds: list[Views], generator: torch.Generator, rank: int = 0, world_size: int = 1,
               memory_format: torch.memory_format = torch.contiguous_format) -> list[Tensor]:  # fmt: skip
    """Normalised views, each (B, 3, h, w), of this rank's uint8 images (B, 3, H, W): `copies` of every kind.

    Parameters are drawn for the global batch and each rank takes its rows, so views don't depend on the world size.
    """
    B, canvas, views = len(images), tuple(images.shape[2:]), []
    chunk = max(1, 2**17 // (canvas[0] * canvas[1])) if images.device.type == "cpu" else B  # pixels that a CPU's cache holds
    for kind in kinds:
        drawn = kind.draw(kind.copies * B * world_size, canvas, generator)
        mine = {key: value.unflatten(0, (kind.copies, -1))[:, rank * B : rank * B + B] for key, value in drawn.items()}  # (copies, B, ...)
        made = [torch.empty(B, 3, *kind.size, device=images.device, memory_format=memory_format) for _ in range(kind.copies)]
        for start in range(0, B, chunk):
            rows = slice(start, start + chunk)
            x = normalize(kind.render(images[rows], {key: value[:, rows].flatten(0, 1) for key, value in mine.items()}))
            for view, part in zip(made, x.chunk(kind.copies)):
                view[rows] = part
        views += made
    return views


def show_views(file, images: Tensor, kinds: list[Views], generator: torch.Generator) -> None:
    """Write a picture: an image a row (uint8 (B, 3, H, W)), as it is, then as the two networks see it."""
    height, width = kinds[0].size
    columns = [F.interpolate(images.float() / 255, kinds[0].size, mode="bilinear", antialias=True)]
    for kind in kinds:
        x = kind.render(images, kind.draw(kind.copies * len(images), tuple(images.shape[2:]), generator))
        x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), value=1.0)
        columns += x.chunk(kind.copies)
    sheet = torch.stack(columns, 1).flatten(0, 1).repeat_interleave(max(1, 128 // height), 2).repeat_interleave(max(1, 128 // height), 3)
    save_image(make_grid(sheet, nrow=len(columns), pad_value=1.0), file)


# ---------------------------------------------------------------- network


class Network(nn.Module):
    """Backbone and projection head; the multi-crop forward runs crops of one size as one batch."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.memory_format = getattr(backbone, "memory_format", torch.contiguous_format)
        self.to(memory_format=self.memory_format)

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        """V crops, each (B, 3, h, w) -> unit vectors z (V, B, C) and the head's unit prototypes (D, C); z @ prototypes.T are the
        logits, which the loss makes one crop at a time."""
        features, start = [], 0
        for end in range(1, len(crops) + 1):
            if end == len(crops) or crops[end].shape != crops[start].shape:
                features.append(self.backbone(torch.cat(crops[start:end])))
                start = end
        z, prototypes = self.head(torch.cat(features))
        return z.unflatten(0, (len(crops), -1)), prototypes


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, over parameters. The teacher's batch-norm statistics are its
    own: it runs in training mode, and averaging a variance over networks would not give the variance of the averaged one."""
    torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 1 - momentum)


# ---------------------------------------------------------------- loss


def identity_loss(student: Tensor, teacher: Tensor, center: Tensor, K: int, student_temp: float = 0.1,
                  teacher_temp: float = 0.04) -> Tensor:  # fmt: skip
    """CION's loss with the running center (paper, equations 5 to 7), in time linear in K. Scalar.

    student: logits (V, B, D), the first two views global. teacher: logits (2, B, D). center: (D,). The batch is ordered by
    identity, K images of each contiguous; ValueError where K does not divide B. Training has the same in less memory:
    `matching_loss`.
    """
    targets = student_targets(torch.softmax((teacher.detach() - center) / teacher_temp, dim=-1), K, len(student))
    return -sum((target * F.log_softmax(logits / student_temp, dim=-1)).sum() for target, logits in zip(targets, student))


def student_targets(p: Tensor, K: int, V: int):
    """For each of V student crops the target t (B, D) that makes the loss -<t, log q> summed over crops; p (2, B, D) is the teacher's.

    The definition, for one teacher view u and one student view v != u, with H(p, q) = -<p, log q>:
        loss(u, v) = [ mean_b H(p_b, q_b) + sum over i != j of mean over identities of H(p_i, q_j) ] / (K (K - 1) + 1)
    1. the mean over the B / K identities of the cross terms is K / B times their sum over all pairs of the batch;
    2. H is linear in p, so image b meets the sum of its K - 1 partners' p at once: G_b - p_b, with G_b the identity's sum;
    3. both parts together are one target per image: [ p_b + K (G_b - p_b) ] / (B (K (K - 1) + 1)), and loss(u, v) = -<target, log q>;
    4. the same linearity adds up teacher views: a local crop is scored once against both views' targets, a global crop once
       against the other view's;
    5. the total is the mean over the 2 (V - 1) pairs u != v. One log_softmax per student crop, whatever K is.
    """
    B = p.shape[1]
    if B % K:
        raise ValueError(f"a batch of {B} images cannot hold K={K} of each identity")
    share = 1 / (B * (K * (K - 1) + 1) * 2 * (V - 1))

    def target(p):
        p = p.unflatten(0, (-1, K))  # (B / K, K, D)
        return (p * (1 - K)).add_(p.sum(1, keepdim=True), alpha=K).mul_(share).flatten(0, 1)

    yield target(p[1])
    yield target(p[0])
    both = target(p[0] + p[1]) if V > 2 else None
    yield from [both] * (V - 2)


class MatchCrops(torch.autograd.Function):
    """The loss and its gradient crop by crop, so that one crop's logits are all that is ever in memory.

    The gradient of -<t, log softmax(l)> is softmax(l) * sum(t) - t: known as soon as the loss is, so it is carried on to z and
    the prototypes at once, and backward only hands it out. Nothing is computed twice.
    """

    @staticmethod
    def forward(ctx, z: Tensor, prototypes: Tensor, p: Tensor, K: int, temp: float) -> Tensor:
        loss, dz, dprototypes = z.new_zeros(()), torch.empty_like(z), torch.zeros_like(prototypes)
        for v, target in enumerate(student_targets(p, K, len(z))):
            log_q = torch.log_softmax((z[v] @ prototypes.T).div_(temp), dim=-1)  # (B, D)
            loss -= (target * log_q).sum()
            gradient = log_q.exp_().mul_(target.sum(-1, keepdim=True)).sub_(target).div_(temp)
            torch.mm(gradient, prototypes, out=dz[v])
            dprototypes.addmm_(gradient.T, z[v])
        ctx.save_for_backward(dz, dprototypes)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        dz, dprototypes = ctx.saved_tensors
        return gradient * dz, gradient * dprototypes, None, None, None


def matching_loss(z: Tensor, prototypes: Tensor, p: Tensor, K: int, student_temp: float = 0.1) -> Tensor:
    """The loss for unit vectors z (V, B, C) and prototypes (D, C), which give the student's logits, and teacher probabilities
    p (2, B, D), in float32 (on a GPU with TF32) even under autocast: a logit is divided by a temperature and told from D others."""
    precise = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        return MatchCrops.apply(z.to(precise), prototypes.to(precise), p, K, student_temp)


# ---------------------------------------------------------------- what keeps the teacher from collapsing


def all_reduce(x: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
    """Sum (or another operation) of x over all processes, in place; x itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(x, operation)
    return x


@torch.no_grad()
def update_center(center: Tensor, teacher: Tensor, momentum: float = 0.9) -> Tensor:
    """EMA of the teacher's mean logits over the global batch. center (D,), teacher (2, B, D) with the same B everywhere -> (D,)."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return center.lerp(all_reduce(teacher.float().mean((0, 1))) / processes, 1 - momentum)


@torch.no_grad()
def sinkhorn(logits: Tensor, temp: float = 0.04, iterations: int = 3) -> Tensor:
    """Teacher probabilities in which every prototype is used equally over the global batch (SwAV, Caron et al., NeurIPS 2020).

    logits (..., D) of this process, any float type -> probabilities of that shape, float32, each row summing to 1. It works on
    logarithms, so that nothing under- or overflows, and sums run over all processes, so that the result does not depend on
    how the batch is split.
    """
    log_p = torch.log_softmax(logits.float().flatten(0, -2) / temp, dim=-1)
    for _ in range(iterations):
        largest = all_reduce(log_p.max(0).values, dist.ReduceOp.MAX)
        log_p -= largest + all_reduce((log_p - largest).exp_().sum(0)).log()  # prototypes share the batch
        log_p -= log_p.logsumexp(1, keepdim=True)  # every image is one unit
    return log_p.exp_().view(logits.shape)


@torch.no_grad()
def gauge(p: Tensor) -> tuple[float, int]:
    """How the teacher's probabilities (2, B, D) are doing, over the global batch: their mean entropy in nats (log D where all
    prototypes are alike), and how many prototypes are some image's first choice (1 where all images are alike)."""
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
    counts = all_reduce(torch.stack([entropy.sum(), entropy.new_tensor(entropy.numel())]))
    used = torch.zeros(p.shape[-1], device=p.device).index_fill_(0, p.argmax(-1).flatten(), 1.0)
    return (counts[0] / counts[1]).item(), int(all_reduce(used, dist.ReduceOp.MAX).sum())


def collapse(loss: float, entropy: float, used: int, D: int, identities: int) -> str:
    """What to say where the teacher does not tell the identities of a batch apart, and what to change; "" where it does."""
    uniform = math.log(D)
    if entropy > 0.995 * uniform or abs(loss / uniform - 1) < 0.003:
        return (f"uniform collapse: the teacher's entropy is {entropy:.3f} and the loss {loss:.3f}, of log D = {uniform:.3f}: all prototypes "
                "are alike and nothing is learned. Try --centering sinkhorn, --head_norm, fewer --prototypes or a higher --lr")  # fmt: skip
    if used <= min(D, identities) / 2:
        return (f"collapse to {'one prototype' if used == 1 else 'few prototypes'}: {used} for the {identities} identities of a batch. "
                "Try --centering sinkhorn, a lower --center_momentum or a higher --teacher_temp")  # fmt: skip
    return ""
