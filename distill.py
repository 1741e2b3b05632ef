"""Identity-guided self-distillation: how images of one person teach each other (paper, section 3.3).

The views (random crops and augmentation), made on the batch and on the training device; the multi-crop forward; the loss in
linear time; the two ways to keep the teacher from collapsing (running center, Sinkhorn-Knopp); the teacher's moving average.

Read first: `identity_loss`, `Views`, `sinkhorn`.
"""
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

    def draw(self, n: int, canvas: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random parameters of n views on the CPU, one row an image: the same for any world size and any device."""
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
        """Views in [0, 1], (B, 3, height, width), of uint8 images (B, 3, H, W) with the parameters that `draw` gave."""
        x = crop_resize(images.float() / 255, drawn, self.size)
        for place in range(4):
            for operation, adjust in enumerate(ADJUST):
                if self.jitter[operation]:
                    x = at(x, drawn["jitter"] & (drawn["order"][:, place] == operation), adjust, drawn["factors"][:, operation])
        x = at(x, drawn["grey"], lambda x: grey(x).expand_as(x))
        x = at(x, drawn["sigma"] > 0, blur, drawn["sigma"])
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
    whole = torch.tensor([min(H, round(W / allowed)), min(W, round(H * allowed))])
    centred = torch.tensor([(H - whole[0]) // 2, (W - whole[1]) // 2, *whole]).float()
    return torch.where(fits.any(1), torch.stack([top, left, height, width]), centred[:, None])


def resize_matrix(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Matrices (n, target, source) that resize pixels start..start+length of a line to `target`, bilinear with antialiasing."""
    scale = (length / target)[:, None, None]
    centers = (torch.arange(target) + 0.5)[:, None] * scale
    pixels = torch.arange(source) + 0.5 - start[:, None, None]  # (n, 1, source)
    weights = (1 - (pixels - centers).abs() / scale.clamp(min=1)).clamp(min=0) * ((pixels > 0) & (pixels < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def crop_resize(x: Tensor, drawn: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Crop, resize and flip as two matrix products an image: rows @ x @ columns. (B, 3, H, W) -> (B, 3, *size)."""
    rows = resize_matrix(drawn["top"], drawn["height"], x.shape[2], size[0])
    columns = resize_matrix(drawn["left"], drawn["width"], x.shape[3], size[1])
    columns = torch.where(drawn["flip"][:, None, None], columns.flip(1), columns)
    return rows.to(x.device)[:, None] @ x @ columns.transpose(1, 2).to(x.device)[:, None]


def at(x: Tensor, chosen: Tensor, operation, *parameters: Tensor) -> Tensor:
    """Apply an operation to the chosen images (B,) of a batch only."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        where = rows.to(x.device)
        x[where] = operation(x[where], *[p[rows].to(x.device)[:, None, None, None] for p in parameters])
    return x


def grey(x: Tensor) -> Tensor:
    """Luma of (B, 3, H, W) as (B, 1, H, W), ITU-R 601 weights."""
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle, through HSV."""
    value, argmax = x.max(1)
    chroma = value - x.min(1).values
    r, g, b = (x / chroma.clamp(min=1e-6)[:, None]).unbind(1)
    hue = torch.where(argmax == 0, g - b, torch.where(argmax == 1, b - r + 2, r - g + 4)) / 6  # (B, H, W), in turns
    sector = ((hue[:, None] + shift) * 6 + x.new_tensor([5, 3, 1])[:, None, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(sector, 4 - sector).clamp(0, 1)


ADJUST = (
    lambda x, f: (x * f).clamp(0, 1),  # brightness
    lambda x, f: (x * f + grey(x).mean((2, 3), keepdim=True) * (1 - f)).clamp(0, 1),  # contrast
    lambda x, f: (x * f + grey(x) * (1 - f)).clamp(0, 1),  # saturation
    adjust_hue,
)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a sigma of its own for every image, as two matrix products. sigma (B, 1, 1, 1), pixels."""
    for dim in (2, 3):
        place = torch.arange(x.shape[dim], device=x.device)
        weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))  # (B, 1, n, n)
        weights = weights / weights.sum(3, keepdim=True)
        x = weights @ x if dim == 2 else x @ weights.transpose(2, 3)
    return x


def make_views(images: Tensor, kinds: list[Views], generator: torch.Generator, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """One normalised batch of views (B, 3, h, w) for every kind, of this rank's uint8 images (B, 3, H, W).

    Parameters are drawn for the global batch and each rank takes its rows, so views don't depend on the world size.
    """
    B = len(images)
    views = []
    for kind in kinds:
        drawn = kind.draw(B * world_size, tuple(images.shape[2:]), generator)
        views.append(normalize(kind.render(images, {k: v[rank * B : (rank + 1) * B] for k, v in drawn.items()})))
    return views


def show_views(file, images: Tensor, kinds: list[Views], generator: torch.Generator) -> None:
    """Write a picture: an image a row (uint8 (B, 3, H, W)), as it is, then as the two networks see it."""
    height, width = kinds[0].size
    columns = [F.interpolate(images.float() / 255, kinds[0].size, mode="bilinear", antialias=True)]
    for kind in kinds:
        view = kind.render(images, kind.draw(len(images), tuple(images.shape[2:]), generator))
        columns.append(F.pad(view, (0, width - view.shape[3], 0, height - view.shape[2]), value=1.0))
    sheet = torch.stack(columns, 1).flatten(0, 1).repeat_interleave(max(1, 128 // height), 2).repeat_interleave(max(1, 128 // height), 3)
    save_image(make_grid(sheet, nrow=len(columns), pad_value=1.0), file)


# ---------------------------------------------------------------- network


class Network(nn.Module):
    """Backbone and projection head; the multi-crop forward runs crops of one size as one batch."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: list[Tensor]) -> Tensor:
        """V crops, each (B, 3, h, w) -> prototype logits (V, B, D)."""
        features, start = [], 0
        for end in range(1, len(crops) + 1):
            if end == len(crops) or crops[end].shape != crops[start].shape:
                features.append(self.backbone(torch.cat(crops[start:end]).contiguous(memory_format=torch.channels_last)))
                start = end
        return self.head(torch.cat(features)).unflatten(0, (len(crops), -1))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, over parameters. The teacher's batch-norm statistics are its
    own: it runs in training mode, and averaging a variance over networks would not give the variance of the averaged one."""
    torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 1 - momentum)


# ---------------------------------------------------------------- loss


def identity_loss(student: Tensor, teacher: Tensor, center: Tensor, K: int, student_temp: float = 0.1,
                  teacher_temp: float = 0.04) -> Tensor:  # fmt: skip
    """CION's loss with the running center (paper, equations 5 to 7). Scalar.

    student: logits (V, B, D), the first two views global. teacher: logits (2, B, D). center: (D,). The batch is ordered by
    identity, K images of each contiguous; ValueError where K does not divide B.
    """
    return matching_loss(student, torch.softmax((teacher - center) / teacher_temp, dim=-1), K, student_temp)


def matching_loss(student: Tensor, p: Tensor, K: int, student_temp: float = 0.1) -> Tensor:
    """The loss for teacher probabilities p (2, B, D) and student logits (V, B, D), in time linear in K.

    The definition, for one teacher view u and one student view v != u, with H(p, q) = -<p, log q>:
        loss(u, v) = [ mean_b H(p_b, q_b) + sum over i != j of mean over identities of H(p_i, q_j) ] / (K (K - 1) + 1)
    1. the mean over the B / K identities of the cross terms is K / B times their sum over all pairs of the batch;
    2. H is linear in p, so image b meets the sum of its K - 1 partners' p at once: G_b - p_b, with G_b the identity's sum;
    3. both parts together are one target per image: [ p_b + K (G_b - p_b) ] / (B (K (K - 1) + 1)), and loss(u, v) = -<target, log q>;
    4. the same linearity adds up teacher views: a local crop is scored once against both views' targets, a global crop once
       against the other view's;
    5. the total is the mean over the 2 (V - 1) pairs u != v. One log_softmax per student crop, whatever K is.
    """
    V, B, _ = student.shape
    if B % K:
        raise ValueError(f"a batch of {B} images cannot hold K={K} of each identity")
    together = p.unflatten(1, (B // K, K)).sum(2).repeat_interleave(K, dim=1)  # G, (2, B, D)
    targets = (p + K * (together - p)) / (B * (K * (K - 1) + 1))
    both = targets.sum(0)
    loss = student.new_zeros((), dtype=torch.float32)
    for v in range(V):
        target = targets[1 - v] if v < 2 else both
        loss = loss - (target * F.log_softmax(student[v].float() / student_temp, dim=-1)).sum()
    return loss / (2 * (V - 1))


def all_reduce(x: Tensor) -> Tensor:
    """Sum of x over all processes, in place; x itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


@torch.no_grad()
def update_center(center: Tensor, teacher: Tensor, momentum: float = 0.9) -> Tensor:
    """EMA of the teacher's mean logits over the global batch. center (D,), teacher (2, B, D) -> (D,)."""
    count = all_reduce(teacher.new_tensor(teacher.shape[0] * teacher.shape[1], dtype=torch.float32))
    return center.lerp(all_reduce(teacher.float().sum((0, 1))) / count, 1 - momentum)


@torch.no_grad()
def sinkhorn(logits: Tensor, temp: float = 0.04, iterations: int = 3) -> Tensor:
    """Teacher probabilities in which every prototype is used equally over the global batch (SwAV, Caron et al., NeurIPS 2020).

    logits (..., D) of this process -> probabilities of that shape, each row summing to 1. Sums run over all processes, so
    that the result does not depend on how the batch is split.
    """
    q = torch.softmax(logits.float() / temp, dim=-1).flatten(0, -2)
    for _ in range(iterations):
        q = q / all_reduce(q.sum(0)).clamp(min=1e-30)  # prototypes share the batch
        q = q / q.sum(1, keepdim=True)  # every image is one unit
    return q.view_as(logits)


def teacher_entropy(p: Tensor) -> Tensor:
    """Mean entropy of teacher probabilities (..., D), in nats: log D is the uniform collapse."""
    return -(p * p.clamp(min=1e-30).log()).sum(-1).mean()
