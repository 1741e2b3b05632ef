"""Networks and weights: what turns a person crop into a feature vector.

Two families of our own, both with instance-batch normalisation (IBN-Net, Pan et al., ECCV 2018), which the paper uses because
instance norm removes camera style while batch norm keeps identity: ResNet-IBN, and ViT with an IBN convolution stem (Luo et al.,
2021). State-dict names are those of the authors' release, so that weights travel both ways. The other structures of the paper's
zoo (its table 5) come from torchvision and timm, by their names there.

    python model.py                              # parameters, multiply-adds and speed of the paper's 32 networks
    python model.py r50ibn timm/ghostnet_100     # of these

Read first: `IBN`, `ResNet`, `build`.
"""
import argparse
import hashlib
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data import Tracklets, load_batches, replacing


class IBN(nn.Module):
    """Instance norm on the first half of the channels, batch norm on the rest. (B, C, H, W) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.half)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.IN(x[:, : self.half]), self.BN(x[:, self.half :])], dim=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016)."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, ibn: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = IBN(planes) if ibn else nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = shortcut(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride is on the 3x3, as in torchvision."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, ibn: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = IBN(planes) if ibn else nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.downsample = shortcut(inplanes, planes * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def shortcut(inplanes: int, outplanes: int, stride: int) -> nn.Module:
    """The identity where shapes allow it, else a strided 1x1 convolution."""
    if stride == 1 and inplanes == outplanes:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


class ResNet(nn.Module):
    """ResNet with the last stage at stride 1 (Luo et al., 2019) and, with `ibn`, IBN-a in stages 1 to 3.

    images (B, 3, H, W) -> features (B, embed_dim), the mean over the last feature map of H/16 x W/16.
    """

    memory_format = torch.channels_last  # in which it trains faster

    def __init__(self, block: type, layers: tuple, width: int = 64, ibn: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inplanes = width
        for stage, (depth, stride) in enumerate(zip(layers, (1, 2, 2, 1)), start=1):
            planes, blocks = width * 2 ** (stage - 1), []
            for i in range(depth):
                blocks.append(block(inplanes, planes, stride if i == 0 else 1, ibn and stage < 4))
                inplanes = planes * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.embed_dim = inplanes
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):  # each block starts as its shortcut (Goyal et al., 2017)
                nn.init.zeros_((module.bn2 if block is BasicBlock else module.bn3).weight)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)  # (B, width, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, embed_dim, H/16, W/16)
        return x.mean(dim=(2, 3))


class ConvStem(nn.Module):
    """Three convolutions with IBN before the patches: (B, 3, H, W) -> tokens (B, embed_dim, H/16, W/16)."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), IBN(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, bias=False), IBN(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.proj = nn.Conv2d(64, embed_dim, 8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.conv(images))


class Attention(nn.Module):
    """Multi-head self-attention. (B, N, C) -> same."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, N, C/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    """The two-layer perceptron of a transformer block."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al., ICLR 2021). (B, N, C) -> same."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer with a convolution stem; images (B, 3, H, W) -> the class token's feature (B, embed_dim).

    Position embeddings belong to a 256x128 input (16x8 tokens) and are resized for any other.
    """

    def __init__(self, embed_dim: int, heads: int, depth: int = 12, grid: tuple = (16, 8)):
        super().__init__()
        self.embed_dim, self.grid = embed_dim, grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], embed_dim))
        self.patch_embed = ConvStem(embed_dim)
        self.blocks = nn.Sequential(*[Block(embed_dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def positions(self, h: int, w: int) -> Tensor:
        """Position embeddings for h x w tokens and the class token, (1, 1 + h*w, embed_dim)."""
        if (h, w) == self.grid:
            return self.pos_embed
        patches = resize_grid(self.pos_embed[:, 1:].unflatten(1, self.grid), (h, w))
        return torch.cat([self.pos_embed[:, :1], patches.flatten(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images)  # (B, C, h, w)
        positions = self.positions(*tokens.shape[2:])
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens.flatten(2).transpose(1, 2)], dim=1) + positions
        return self.norm(self.blocks(x))[:, 0]


def resize_grid(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings of a grid of tokens for another one, bicubic: (1, h, w, C) -> (1, *grid, C)."""
    if positions.shape[1:3] == grid:
        return positions
    return F.interpolate(positions.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


class Head(nn.Module):
    """Projection head of DINO (Caron et al., ICCV 2021): features (B, embed_dim) -> z (B, bottleneck), prototypes (D, bottleneck).

    Both have unit length, and z @ prototypes.T are the logits: a last layer with weight norm, its gain fixed at 1.
    `batch_norm` puts a batch norm without affine before the L2 norm, with which a short run on few images learns more.
    """

    def __init__(self, embed_dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, batch_norm: bool = False):
        super().__init__()
        layers = [nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)]
        if batch_norm:
            layers.append(nn.BatchNorm1d(bottleneck, affine=False))
        self.mlp = nn.Sequential(*layers)
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.mlp(features), dim=-1), F.normalize(self.last_layer.weight, dim=-1)


ARCHITECTURES = {
    "r10ibn": lambda: ResNet(BasicBlock, (1, 1, 1, 1), width=32),
    "r18": lambda: ResNet(BasicBlock, (2, 2, 2, 2), ibn=False),
    "r18ibn": lambda: ResNet(BasicBlock, (2, 2, 2, 2)),
    "r50": lambda: ResNet(Bottleneck, (3, 4, 6, 3), ibn=False),
    "r50ibn": lambda: ResNet(Bottleneck, (3, 4, 6, 3)),
    "r101": lambda: ResNet(Bottleneck, (3, 4, 23, 3), ibn=False),
    "r101ibn": lambda: ResNet(Bottleneck, (3, 4, 23, 3)),
    "r152": lambda: ResNet(Bottleneck, (3, 8, 36, 3), ibn=False),
    "r152ibn": lambda: ResNet(Bottleneck, (3, 8, 36, 3)),
    "vit_tiny": lambda: ViT(192, heads=3),
    "vit_small": lambda: ViT(384, heads=6),
    "vit_base": lambda: ViT(768, heads=12),
}


ZOO = [  # the paper's 32 networks of ten structures, as `build` names them
    *[name for name in ARCHITECTURES if name != "r10ibn"],
    *["convnext_tiny", "convnext_small", "convnext_base", "swin_t", "swin_s", "swin_b"],
    *["timm/ghostnet_050", "timm/ghostnet_100", "timm/ghostnet_130", "timm/edgenext_x_small", "timm/edgenext_small", "timm/edgenext_base"],
    *["timm/repvit_m0_9", "timm/repvit_m1_0", "timm/repvit_m1_5", "timm/fastvit_s12", "timm/fastvit_sa12", "timm/fastvit_sa24"],
    *["timm/volo_d1_224", "timm/volo_d2_224", "timm/volo_d3_224"],
]  # fmt: skip


def build(arch: str) -> nn.Module:
    """The backbone of that name: images (B, 3, H, W), normalised -> features (B, embed_dim); has the attribute `embed_dim`.

    arch: a name in ARCHITECTURES, any classifier of torchvision by its name, or of timm as timm/<name>; the classifier is removed.
    Raises ValueError for a name that nobody knows, and where timm is needed and not installed.
    """
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]()
    if arch.startswith("timm/"):
        return build_timm(arch.removeprefix("timm/"))
    if arch not in torchvision.models.list_models(torchvision.models):
        raise ValueError(f"unknown arch '{arch}'; known: {', '.join(ARCHITECTURES)}, torchvision's models by their names (convnext_tiny), "
                         "timm's as timm/<name> (timm/ghostnet_100)")  # fmt: skip
    model = torchvision.models.get_model(arch)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{arch}: does not end in a linear classifier that could be removed")
    name, classifier = linear[-1]
    model.set_submodule(name, nn.Identity())
    model.embed_dim = classifier.in_features
    return without_chance(model)


def without_chance(model: nn.Module) -> nn.Module:
    """Switch dropout and stochastic depth off: they draw from a global generator, and a resumed run could not repeat that."""
    for module in model.modules():
        for name in ("p", "drop_rate", "drop_prob"):  # of nn.Dropout and StochasticDepth, of timm's networks, of its DropPath
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def build_timm(name: str) -> nn.Module:
    """A model of timm without its classifier, for inputs of any size where timm or a few lines here can make it so."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"arch 'timm/{name}' needs the package timm: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"unknown arch 'timm/{name}'; python -c 'import timm; print(timm.list_models())' prints what this timm knows")
    volo = name.startswith("volo")
    # ViTs of timm resize their positions, and its Swins cut their windows, where they are asked to; others don't know the question
    for option in [{"img_size": (256, 128)}] if volo else [{"dynamic_img_size": True}, {"strict_img_size": False}, {}]:
        try:
            model = timm.create_model(name, num_classes=0, **option)
            break
        except TypeError:
            if not option:
                raise
    model.embed_dim = getattr(model, "head_hidden_size", None) or model.num_features
    if volo:
        model.__class__ = any_size(type(model))
    return without_chance(model)


def any_size(volo: type) -> type:
    """timm's VOLO class with position embeddings that follow the input; as it is, it adds those of one size to any tokens."""

    class VOLO(volo):
        """Takes images of any size."""

        @property
        def pos_embed(self) -> Tensor:
            """The position embeddings for the grid of the last input."""
            return resize_grid(self._parameters["pos_embed"], self.grid)

        def forward(self, images: Tensor) -> Tensor:
            self.grid = tuple((side + 1) // 2 // 8 for side in images.shape[2:])  # as its strided convolutions round
            return super().forward(images)

    return VOLO


def check_sizes(backbone: nn.Module, arch: str, sizes) -> None:
    """Try a network of another library on images of the sizes (H, W). Raises ValueError where it gives no (B, embed_dim)."""
    for size in sizes if arch not in ARCHITECTURES else ():
        try:
            with torch.no_grad():
                out = backbone(torch.zeros(2, 3, *size))
        except Exception as error:  # whatever a network of somebody else's raises
            raise ValueError(f"{arch} cannot take images of {size[0]}x{size[1]}: {error}") from None
        if getattr(out, "shape", None) != (2, backbone.embed_dim):
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{arch}: expected features (2, {backbone.embed_dim}) of two images, got {found}")


# ---------------------------------------------------------------- weights


def read_checkpoint(file) -> dict:
    """What torch.save wrote, as tensors and plain values: nothing in the file is executed. Raises ValueError."""
    scalar = np.float64(0).__reduce__()[0]  # makes a NumPy number, under its old and its new name
    # the authors keep their command line in the checkpoint, others an accuracy: values only
    values = [argparse.Namespace, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype,
              *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]  # fmt: skip
    try:
        if str(file).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(file)
        with torch.serialization.safe_globals(values):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file of weights") from None
    except IsADirectoryError:
        raise ValueError(f"{file}: is a folder; expected a file of weights") from None
    except ImportError:
        raise ValueError(f"{file}: needs the package safetensors: pip install safetensors") from None
    except Exception as error:  # whatever a foreign or damaged file makes torch.load raise
        why = re.search(r"(Unsupported (?:global|operand|class)[^.\n]*)", str(error))
        raise ValueError(f"{file}: cannot be read as weights: damaged, or it holds more than tensors and plain values "
                         f"({type(error).__name__}{': ' + why[1] if why else ''})") from None  # fmt: skip
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file}: expected a checkpoint or a state dict, got {type(checkpoint).__name__}")
    return checkpoint


def backbone_weights(checkpoint: dict, own) -> dict[str, Tensor]:
    """The state dict inside any supported checkpoint, the teacher's where there is one, without wrappers' prefixes of the names
    that are not among the model's `own`."""
    state = checkpoint
    while nested := [state[key] for key in ("teacher", "student", "state_dict", "model") if isinstance(state.get(key), dict)]:
        state = nested[0]
    names = {}
    for name, value in state.items():
        while name not in own and (wrapper := re.match(r"(module|backbone|base|model|_orig_mod|encoder_q)\.", name)):
            name = name[wrapper.end() :]
        if isinstance(value, Tensor):
            names[name] = value
    return names


def fit_positions(positions: Tensor, model: nn.Module, shape: torch.Size) -> Tensor:
    """Position embeddings from a file at the model's shape: a square grid (1, 1 + n*n, C) as ViTs have it, or a grid (1, h, w, C)
    as VOLO has. Returned as they are where they are neither."""
    if positions.ndim == len(shape) == 4:
        return resize_grid(positions, tuple(shape[1:3]))
    side = math.isqrt(max(positions.shape[1] - 1, 0)) if positions.ndim == 3 else 0
    if not isinstance(model, ViT) or side < 1 or side * side != positions.shape[1] - 1:
        return positions
    patches = resize_grid(positions[:, 1:].unflatten(1, (side, side)), model.grid)
    return torch.cat([positions[:, :1], patches.flatten(1, 2)], dim=1)


def load_weights(model: nn.Module, file) -> dict:
    """Load backbone weights from a file: our checkpoints, the authors' release, ImageNet's of IBN-Net, torchvision and timm, DINO's.

    A ViT takes the blocks of timm's and DINO's, their position embeddings resized; its stem is not theirs.
    Returns {"matched", "missing", "left_over"}: lists of names. Raises ValueError, leaving the model as it was, where less
    than 90% of the model's parameters find a tensor of their name and shape, or one of these is not finite.
    """
    own = model.state_dict()
    state = backbone_weights(read_checkpoint(file), own)
    if "pos_embed" in state and "pos_embed" in own and state["pos_embed"].shape != own["pos_embed"].shape:
        state["pos_embed"] = fit_positions(state["pos_embed"].float(), model, own["pos_embed"].shape)
    matched = [name for name in own if name in state and state[name].shape == own[name].shape]
    report = {
        "matched": matched,
        "missing": [name for name in own if name not in state or state[name].shape != own[name].shape],
        "left_over": [name for name in state if name not in own or state[name].shape != own[name].shape],
    }
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    share = sum(sizes.get(name, 0) for name in matched) / sum(sizes.values())
    if share < 0.9:
        raise ValueError(
            f"{file}: only {share:.0%} of the model's parameters matched ({len(matched)} of {len(own)} tensors; "
            f"missing {report['missing'][:3]}, left over {report['left_over'][:3]}); is it the weights of another architecture?"
        )
    broken = [name for name in matched if not torch.isfinite(state[name]).all()]
    if broken:
        raise ValueError(f"{file}: {len(broken)} of {len(matched)} tensors hold numbers that are not finite, the first: {broken[0]}")
    model.load_state_dict({name: state[name] for name in matched}, strict=False)
    return report


def describe(report: dict) -> str:
    """What `load_weights` did, in a line."""
    name = lambda names: f"{len(names)}" + (f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "")
    return f"{len(report['matched'])} tensors matched, missing {name(report['missing'])}, left over {name(report['left_over'])}" + (
        "; WARNING: what is missing keeps its initial values, so features are not the file's until it is trained" * bool(report["missing"]))  # fmt: skip


def load_backbone(weights, arch: str | None = None, size: tuple[int, int] | None = None, say=lambda text: None):
    """A backbone with weights, its input size and the settings of the run they come from (empty for other people's files)."""
    settings = read_checkpoint(weights).get("settings")
    settings = settings if isinstance(settings, dict) else {}
    arch = arch or settings.get("arch")
    if not arch:
        raise ValueError(f"{weights}: does not say which architecture it is for; add --arch")
    torch.manual_seed(0)  # whatever the file does not hold is at least the same every time
    backbone = build(arch)
    say(f"{weights}: {describe(load_weights(backbone, weights))}")
    size = tuple(size or settings.get("size", (256, 128)))
    check_sizes(backbone.eval(), arch, [size])
    return backbone, size, settings


# ---------------------------------------------------------------- features

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the paper


def normalize(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> zero mean, unit variance over ImageNet."""
    mean, std = torch.tensor([MEAN, STD], dtype=images.dtype).to(images.device, non_blocking=True)  # which is not waited for
    return (images - mean[:, None, None]).div_(std[:, None, None])


@torch.no_grad()
def embed(backbone: nn.Module, tracklets: Tracklets, batches: list[np.ndarray], canvas: tuple[int, int], device, workers: int = 0, flip: bool = False):
    """Features of batches of images: yields (rows, float32 (B, embed_dim) of unit length on the CPU), zero where unreadable.
    flip: the sum of the image's and its mirror image's."""
    backbone.eval()
    for rows, (images, readable) in zip(batches, load_batches(tracklets, batches, canvas, workers)):
        images = normalize(images.to(device, non_blocking=True).float() / 255)
        out = backbone(images)
        if flip:
            out = out + backbone(images.flip(3))
        yield rows, F.normalize(out.float(), dim=1).cpu() * readable[:, None]


def extract(backbone: nn.Module, tracklets: Tracklets, canvas: tuple[int, int], device, workers: int = 0, batch: int = 256,
            item: np.ndarray | None = None, flip: bool = False) -> tuple[Tensor, np.ndarray]:  # fmt: skip
    """Features of all images, float32 (N, embed_dim) of unit length on the CPU, and which could be read, bool (N,): others have a
    zero row.

    item (N,), ascending: the mean of the features of each item's images instead, one row an item, of unit length again.
    Where several processes run, each takes its share of the batches, which are the same for any number of them, and all end with
    all features.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    item = np.arange(len(tracklets)) if item is None else item
    begin = np.searchsorted(item, item) // batch  # an item's images stay together, so that their sum has one order
    batches = np.split(np.arange(len(item)), np.flatnonzero(np.diff(begin)) + 1)[rank::world_size]
    features, readable = torch.zeros(int(item[-1]) + 1, backbone.embed_dim), torch.zeros(len(item), dtype=torch.uint8)
    for rows, out in embed(backbone, tracklets, batches, canvas, device, workers, flip):
        features.index_add_(0, torch.from_numpy(item[rows]), out)
        readable[rows] = out.any(1).byte()
    if world_size > 1:
        features, readable = features.to(device), readable.to(device)
        dist.all_reduce(features)  # of each row one summand is not zero
        dist.all_reduce(readable)
    features = features.cpu() if item[-1] + 1 == len(item) else F.normalize(features.cpu(), dim=1)
    return features, readable.cpu().numpy().astype(bool)


def extract_to_file(folder, backbone: nn.Module, tracklets: Tracklets, canvas: tuple[int, int], device, workers: int = 0,
                    batch: int = 256, save_every: float = 30) -> np.ndarray:  # fmt: skip
    """Features as `extract`'s, float16 (N, embed_dim), memory-mapped from folder/features-<key>.npy; the key stands for weights
    and names of images (after changing images under their names, delete it). What is there is not computed again, and a run that
    was killed goes on where it was, on any number of processes (which share the folder): blocks of `batch` images are ticked off
    in features-<key>.done, every `save_every` seconds.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    key = hashlib.sha256(repr((str(tracklets.root.resolve()), tracklets.folders, canvas, batch)).encode())
    for array in (tracklets.name, tracklets.video, *(tensor.cpu().float().numpy() for tensor in backbone.state_dict().values())):
        key.update(np.ascontiguousarray(array))
    file = Path(folder) / f"features-{key.hexdigest()[:12]}.npy"
    part, done = file.with_suffix(".part"), file.with_suffix(".done")
    blocks = -(-len(tracklets) // batch)
    wait = dist.barrier if world_size > 1 else lambda: None
    if rank == 0:
        print(f"features: {f'found in {file}' if file.exists() else f'going on with {part}' if done.exists() else f'into {file}'}", flush=True)
    wait()
    if not file.exists():
        if rank == 0 and not (part.exists() and done.exists()):
            with replacing(part) as temporary:
                np.lib.format.open_memmap(temporary, "w+", np.float16, (len(tracklets), backbone.embed_dim))
            with replacing(done) as temporary:
                np.zeros(blocks, bool).tofile(temporary)
        wait()
        features, ticks = np.lib.format.open_memmap(part, "r+"), np.memmap(done, bool, "r+")
        mine = np.flatnonzero(~ticks)[rank::world_size]
        wait()  # nobody ticks before all have looked
        batches, finished, clock = [np.arange(b * batch, min((b + 1) * batch, len(tracklets))) for b in mine], [], time.time()
        for block, (rows, out) in zip(mine, embed(backbone, tracklets, batches, canvas, device, workers)):
            features[rows] = out.numpy()
            finished.append(block)
            if time.time() >= clock + save_every or block == mine[-1]:
                features.flush()  # to the disk before it is said to be there
                ticks[finished] = True
                finished, clock = [], time.time()
                if rank == 0 and block != mine[-1]:
                    print(f"features of {ticks.mean():.1%} of {len(tracklets):,} images", flush=True)
        del features
        wait()
        if rank == 0:
            done.unlink()
            os.replace(part, file)
        wait()
    return np.load(file, mmap_mode="r")


# ---------------------------------------------------------------- a table of networks


def multiply_adds(backbone: nn.Module, size: tuple[int, int] = (256, 128)) -> int:
    """Multiply-adds of one image, which torch counts as two operations."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.eval()(torch.zeros(1, 3, *size))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def images_per_second(backbone: nn.Module, device, size: tuple[int, int] = (256, 128), batch: int = 16) -> float:
    """Speed of the forward pass, the best of three after one to warm up."""
    backbone, images, best = backbone.eval().to(device), torch.randn(batch, 3, *size, device=device), 0.0
    for _ in range(4):
        clock = time.perf_counter()
        backbone(images).sum().item()  # which waits for a GPU
        best = max(best, batch / (time.perf_counter() - clock))
    return best


def main() -> None:
    """Print a table of architectures: parameters, multiply-adds of a 256x128 image, width of the embedding, speed here."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("arch", nargs="*", help="names as --arch of train.py takes them (default: the paper's 32 networks)")
    names = parser.parse_args().arch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'arch':<22} {'parameters':>12} {'multiply-adds':>14} {'embedding':>10} {'images/s':>9}   ({device.type}, float32, eval mode)")
    failed = 0
    for arch in names or ["r10ibn", *ZOO]:
        try:
            model = build(arch).eval()
            check_sizes(model, arch, [(256, 128)])
        except ValueError as error:
            failed += 1
            print(f"{arch:<22} {error}", flush=True)
            continue
        count, work = sum(p.numel() for p in model.parameters()), multiply_adds(model)
        print(f"{arch:<22} {count:>12,} {work / 1e9:>12.2f} G {model.embed_dim:>10} {images_per_second(model, device):>9,.0f}", flush=True)
    if names and failed:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"model.py: {error}")
