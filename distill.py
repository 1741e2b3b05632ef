"""Identity-guided self-distillation: images of one person teach each other (paper, section 3.3).

In this order: views of the images, the network, the loss (eq. 8 and 9), the center that keeps the
teacher from collapsing, the teacher, gauges of its health; then what fine-tuning has instead.
train.py puts them together.

Read first: `identity_loss`, `sinkhorn`.
"""
import math
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import distributed as dist, nn

from model import normalize

# ---------------------------------------------------------------- views


@dataclass
class Views:
    """How one view of an image is drawn. Defaults are the first global crop's: the size is the
    paper's, the rest the released code's, where the paper is silent."""

    size: tuple[int, int] = (256, 128)  # height, width
    scale: tuple[float, float] = (0.8, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (0.4, 0.6)  # width / height
    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 1.0
    blur_sigma: float = 2.0  # largest sigma of the Gaussian, in pixels; the smallest is 0.1
    solarize_p: float = 0.0

    def draw(self, n, canvas, generator):
        """Random parameters, a dict of tensors (n, ...), of n views, each of an image of its own;
        images have height and width `canvas`. On the CPU: the same for every device."""
        boxes = draw_boxes(n, canvas, self.scale, self.ratio, generator)
        chance = torch.rand(5, n, generator=generator)
        # what brightness, contrast and saturation are multiplied with, and what is added to hue
        unchanged = torch.tensor([1.0, 1.0, 1.0, 0.0])
        change = torch.empty(n, 4).uniform_(-1, 1, generator=generator)
        factors = unchanged + change * torch.tensor(self.jitter)
        order = torch.rand(n, 4, generator=generator).argsort(1)
        share = torch.rand(n, generator=generator)
        return {
            "box": boxes,
            "flip": chance[0] < 0.5,
            "jitter": chance[1] < self.jitter_p,
            "order": order,
            "factors": factors,
            "grey": chance[2] < self.grey_p,
            "blur": chance[3] < self.blur_p,
            "sigma": 0.1 + (self.blur_sigma - 0.1) * share,
            "solarize": chance[4] < self.solarize_p,
        }

    def render(self, images, drawn):
        """The drawn view of each image: uint8 (n, 3, H, W) -> (n, 3, height, width) in [0, 1]."""
        x = crop_and_resize(images, drawn["box"], self.size)
        x = change_some(x, drawn["flip"], mirror)
        for place in range(4):
            for i, operation in enumerate(JITTER):
                if self.jitter[i] > 0:
                    # the views in which operation i comes at this place
                    chosen = drawn["jitter"] & (drawn["order"][:, place] == i)
                    x = change_some(x, chosen, operation, drawn["factors"][:, i])
        no_colour = torch.zeros(len(x))
        x = change_some(x, drawn["grey"], adjust_saturation, no_colour)
        x = change_some(x, drawn["blur"], self.blur, drawn["sigma"])
        return change_some(x, drawn["solarize"], solarize)

    def blur(self, x, sigma):
        """Views (n, 3, h, w), each blurred by a Gaussian of its own sigma (n, 1, 1, 1), in pixels,
        none above `blur_sigma`; it is cut off at three times that."""
        reach = math.ceil(3 * self.blur_sigma)
        offsets = torch.arange(-reach, reach + 1, device=x.device)
        exponents = -(offsets**2) / (2 * sigma**2)
        weights = torch.softmax(exponents, dim=3)  # (n, 1, 1, taps)
        # each channel of each view is a channel of one large image, with a kernel of its own
        weights = weights.repeat_interleave(3, dim=0)  # (3 n, 1, 1, taps)
        x = F.pad(x, [reach] * 4, mode="replicate")
        x = x.flatten(0, 1)[None]
        x = F.conv2d(x, weights, groups=len(weights))
        x = F.conv2d(x, weights.transpose(2, 3), groups=len(weights))
        return x[0].unflatten(0, (-1, 3))


def draw_boxes(n, canvas, scale, ratio, generator):
    """Top, left, height and width (n, 4) of boxes in whole pixels, as torchvision's
    RandomResizedCrop draws them: the first of ten tries that fits into the image. Where none does,
    it is the largest centred box of an allowed ratio."""
    H, W = canvas
    low = math.log(ratio[0])
    high = math.log(ratio[1])
    area = H * W * torch.empty(n, 10).uniform_(*scale, generator=generator)
    shape = torch.empty(n, 10).uniform_(low, high, generator=generator).exp()
    tries = torch.stack([area / shape, area * shape], dim=2)
    tries = tries.sqrt().round()  # (n, 10, 2), heights and widths
    limits = torch.tensor(canvas)
    fits = ((tries >= 1) & (tries <= limits)).all(2)
    size = tries[torch.arange(n), fits.float().argmax(1)]  # (n, 2), the first that fits
    place = torch.rand(n, 2, generator=generator)

    none = ~fits.any(1)
    allowed = min(max(W / H, ratio[0]), ratio[1])
    size[none, 0] = min(H, round(W / allowed))
    size[none, 1] = min(W, round(H * allowed))
    place[none] = 0.5
    corner = (place * (limits - size + 1)).floor()
    return torch.cat([corner, size], dim=1).long()


def crop_and_resize(images, boxes, size):
    """Boxes (n, 4), on the CPU, of uint8 images (n, 3, H, W), resized (bilinear, antialiased) ->
    (n, 3, height, width) in [0, 1]. On a CPU rounded to bytes, as PIL does it and for its speed;
    a GPU cannot resize bytes."""
    if images.is_cuda:
        images = images.float()
    resized = []
    for image, (top, left, height, width) in zip(images, boxes.tolist()):
        crop = image[None, :, top : top + height, left : left + width]
        resized.append(F.interpolate(crop, size, mode="bilinear", antialias=True))
    x = torch.cat(resized).contiguous()
    return x.float() / 255


def change_some(x, chosen, operation, *amounts):
    """In place, replace the chosen ones of the views x (n, 3, h, w) by operation(view, amounts).
    chosen, amounts: (n,), on the CPU, so that no device is waited for."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return x
    theirs = [amount[rows, None, None, None].to(x.device, non_blocking=True) for amount in amounts]
    rows = rows.to(x.device, non_blocking=True)
    changed = operation(x.index_select(0, rows), *theirs)
    return x.index_copy_(0, rows, changed)


def mirror(x):
    """Left and right exchanged."""
    return x.flip(3)


def luma(x):
    """Grey value (n, 1, h, w) of views (n, 3, h, w), by ITU-R 601 weights."""
    red, green, blue = x.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def adjust_brightness(x, factor):
    """Pixels times a factor (n, 1, 1, 1)."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Distances to the view's mean grey value times a factor (n, 1, 1, 1)."""
    mean = luma(x.mean((2, 3), keepdim=True))
    return mean.lerp(x, factor).clamp_(0, 1)


def adjust_saturation(x, factor):
    """Distances to each pixel's grey value times a factor (n, 1, 1, 1); 0 is a grey view."""
    return luma(x).lerp(x, factor).clamp_(0, 1)


def adjust_hue(x, turn):
    """Hue turned by a share (n, 1, 1, 1) of the colour circle."""
    red, green, blue = x.unbind(1)  # (n, h, w)
    value = x.amax(1)
    chroma = value - x.amin(1)
    # Hue is a place on a circle of 6 sectors, red at 0, green at 2, blue at 4, and lies near the
    # largest channel. These signs, 0 where it is red or green and else 1, choose between formulas.
    not_red = (value - red).sign()
    not_green = (value - green).sign()
    near_green = blue - red + 2 * chroma
    near_blue = red - green + 4 * chroma
    hue = near_green.lerp(near_blue, not_green)
    hue = (green - blue).lerp(hue, not_red)
    hue /= chroma.clamp(min=1e-6)
    hue += 6 * turn[:, 0]
    hue -= 6 * (hue / 6).floor()
    # a channel is largest up to one sector from its place, and smallest from two on
    channels = []
    for place in (0, 2, 4):
        distance = (hue - place).abs()
        distance = torch.minimum(distance, 6 - distance)
        drop = (distance - 1).clamp(0, 1)
        channels.append(value - chroma * drop)
    return torch.stack(channels, dim=1)


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def solarize(x):
    """Pixels of 0.5 and more inverted."""
    return torch.where(x >= 0.5, 1 - x, x)


def make_views(images, kinds, generator, rank=0, world_size=1):
    """One normalised view (B, 3, height, width) for each kind, of this process's uint8 images
    (B, 3, H, W). Parameters are drawn for the global batch and each process takes its rows, so
    views don't depend on the number of processes."""
    B = len(images)
    first = rank * B
    images = images.contiguous(memory_format=torch.channels_last)  # cut and resized faster
    views = []
    for kind in kinds:
        drawn = kind.draw(world_size * B, images.shape[2:], generator)
        mine = {name: values[first : first + B] for name, values in drawn.items()}
        views.append(normalize(kind.render(images, mine)))
    return views


# ---------------------------------------------------------------- the network


class Network(nn.Module):
    """Backbone and projection head: V crops, each (B, 3, h, w) -> logits (V, B, D), float32."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops):
        features = []
        for _, same_size in groupby(crops, key=lambda crop: crop.shape):
            batch = torch.cat(list(same_size))
            features.append(self.backbone(batch))
        logits = self.head(torch.cat(features))  # (V * B, D)
        return logits.unflatten(0, (len(crops), -1))


# ---------------------------------------------------------------- the loss (eq. 8 and 9)


def identity_loss(
    student, teacher, center, K, student_temp=0.1, teacher_temp=0.04, weights="paper"
):
    """The mean (in the paper: the sum) of H(p of x, q of x') = -<p, log q> (eq. 8) over all ordered
    pairs i, j of images of an identity, both global views x of i and all views x' of j, but x' != x
    (eq. 9). H is linear in p, so with G_b the sum of p over both global views of all images of b's
    identity (below: `together`, of the sums `G` of each view)
        t_{v,b} = (G_b - [v < 2] p_{v,b}) / (2 B (K V - 1))
        loss = - sum_v sum_b <t_{v,b}, log q_{v,b}>.
    student: logits (V, B, D), the first two views global; teacher: (2, B, D); center: (D,). A batch
    has K images of each identity, side by side; ValueError where K does not divide B. weights:
    "release" is the authors' code: x' has another view index, and pairs i = j weigh 1 / K."""
    V, B, _ = student.shape
    if B % K:
        raise ValueError(f"a batch of {B} images cannot hold K={K} of each identity")
    p = torch.softmax((teacher.detach() - center) / teacher_temp, dim=-1)  # (2, B, D)
    G = p.unflatten(1, (-1, K)).sum(2)  # (2, B / K, D)
    G = G.repeat_interleave(K, dim=1)  # (2, B, D), an identity's sum for each of its images
    # together: what both teacher views give to every view of an image; own: what a global view must
    # not get of it, which is itself or, in the release, all of its view index
    if weights == "paper":
        together = G.sum(0)
        own = p
        terms = 2 * B * (K * V - 1)
    else:
        # an image itself counts 1, each of its K - 1 others K
        own = p + K * (G - p)
        together = own.sum(0)
        pairs = 2 * (V - 1)
        terms = B * pairs * (K * (K - 1) + 1)
    loss = 0
    for v, logits in enumerate(student):
        target = together - own[v] if v < 2 else together  # (B, D)
        log_q = F.log_softmax(logits / student_temp, dim=-1)
        loss = loss - (target * log_q).sum()
    return loss / terms


# ---------------------------------------------------------------- the center


def all_reduce(x, operation=dist.ReduceOp.SUM):
    """Sum (or another operation) of x over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x, operation)
    return x


def all_mean(x):
    """Mean of x over all processes, in place."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return all_reduce(x).div_(processes)


def update_center(center, teacher, momentum=0.9):
    """EMA (D,) of the teacher's logits (2, B, D), of their mean over the global batch."""
    mean = all_mean(teacher.mean((0, 1)))
    return center.lerp(mean, 1 - momentum)


def sinkhorn(logits, temp=0.04, iterations=3):
    """The center (D,) for which softmax((logits - center) / temp) uses all prototypes about equally
    in this global batch, by Sinkhorn-Knopp (SwAV, Caron et al., NeurIPS 2020); logits (..., D).
    In logarithms, so that nothing overflows; how processes split the batch changes nothing."""
    center = torch.zeros(logits.shape[-1], device=logits.device)
    for _ in range(iterations):
        # each image spreads 1 over the prototypes; a prototype's total is taken off its logits
        log_p = torch.log_softmax((logits - center) / temp, dim=-1)
        log_p = log_p.flatten(0, -2)
        largest = all_reduce(log_p.amax(0), dist.ReduceOp.MAX)
        total = all_reduce((log_p - largest).exp().sum(0))
        center = center + temp * (largest + total.log())
    return center


# ---------------------------------------------------------------- the teacher


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, over parameters. The statistics of
    its batch norm are its own: it is in training mode."""
    for old, new in zip(teacher.parameters(), student.parameters()):
        old.lerp_(new, 1 - momentum)


# ---------------------------------------------------------------- gauges


def teacher_statistics(p):
    """Mean entropy (nats) of the teacher's p (2, B, D) over the global batch, and how many
    prototypes are some image's first choice."""
    entropy = torch.special.entr(p).sum(-1)  # (2, B)
    entropy = all_mean(entropy.mean())
    used = torch.zeros_like(p[0, 0])
    used[p.argmax(-1).flatten()] = 1
    used = all_reduce(used, dist.ReduceOp.MAX).sum()
    return entropy.item(), int(used)


def collapse(entropy, used, D, identities):
    """What to say where the teacher does not tell the identities of a batch apart, and what to
    change; "" where it does. For entropy and used see `teacher_statistics`."""
    if entropy > 0.95 * math.log(D):
        return (
            "uniform collapse: to the teacher all prototypes are alike, and nothing is learned. "
            "Try --centering sinkhorn, --head_norm, fewer --prototypes or a higher --lr"
        )
    if used <= min(D, identities) / 2:
        return (
            "collapse to few prototypes: the teacher has fewer than half as many as a batch has "
            "identities. Try --centering sinkhorn or a higher --teacher_temp"
        )
    return ""


# ---------------------------------------------------------------- fine-tuning


def make_shifted_views(images, generator, rank=0, world_size=1):
    """One view (B, 3, H, W) of each image for fine-tuning, see `make_views`: moved by up to 10
    pixels of 256, mirrored or not, and half of them with a box erased (Zhong et al., AAAI 2020).
    The box gets the mean colour of ImageNet; the released trainer fills it with noise."""
    B, _, H, W = images.shape
    n = world_size * B
    pad = round(10 * H / 256)
    corner = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator).tolist()
    flip, erase = (torch.rand(2, n, generator=generator) < 0.5).tolist()
    hole = draw_boxes(n, (H, W), (0.02, 1 / 3), (0.3, 3.3), generator).tolist()
    padded = normalize(F.pad(images, [pad] * 4).float() / 255)
    views = []
    for i, image in enumerate(padded, start=rank * B):
        top, left = corner[i]
        view = image[:, top : top + H, left : left + W]
        if flip[i]:
            view = view.flip(2)
        if erase[i]:
            top, left, height, width = hole[i]
            view[:, top : top + height, left : left + width] = 0
        views.append(view)
    return torch.stack(views)


class Classifier(nn.Module):
    """Backbone, BNNeck and classifier, for fine-tuning (Luo et al., 2019): images (B, 3, H, W) ->
    features (A, embed_dim) and logits (A, people), of the images of all processes in their order.
    The neck is a batch norm whose bias stays 0; retrieval is by the features before it."""

    def __init__(self, backbone, people):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.BatchNorm1d(backbone.embed_dim)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(backbone.embed_dim, people, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, images):
        features = self.backbone(images).float().contiguous()
        world_size = dist.get_world_size()
        shares = [torch.empty_like(features) for _ in range(world_size)]
        dist.all_gather(shares, features.detach())
        # each process has the whole loss, but only its own images' gradient, of which
        # DistributedDataParallel will take the mean over processes: the sum is wanted
        shares[dist.get_rank()] = features
        features.register_hook(lambda gradient: gradient * world_size)
        features = torch.cat(shares)
        with torch.autocast(features.device.type, enabled=False):
            return features, self.classifier(self.neck(features))


def supervised_loss(features, logits, labels):
    """Of fine-tuning, of features (B, d), logits (B, people) and labels (B,): cross-entropy, and
    log(1 + exp(farthest - nearest)), the distances of each image to the farthest one of its person
    and to the nearest one of others in the batch (Hermans et al., 2017)."""
    distance = torch.cdist(features, features)
    same = labels[:, None] == labels
    farthest = distance.where(same, -torch.inf).amax(1)
    nearest = distance.where(~same, torch.inf).amin(1)
    return F.cross_entropy(logits, labels) + F.softplus(farthest - nearest).mean()
