"""Networks and weights: what turns a person crop into a feature vector.

Two families, both with instance-batch normalisation (IBN-Net, Pan et al., ECCV 2018), which the paper uses because instance
norm removes camera style while batch norm keeps identity: ResNet-IBN, and ViT with an IBN convolution stem (Luo et al., 2021).
State-dict names are those of the authors' release, so that weights travel both ways.

Read first: `IBN`, `ResNet`, `build`.
"""
import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        patches = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid)  # (1, C, 16, 8)
        patches = F.interpolate(patches, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images)  # (B, C, h, w)
        positions = self.positions(*tokens.shape[2:])
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens.flatten(2).transpose(1, 2)], dim=1) + positions
        return self.norm(self.blocks(x))[:, 0]


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


def build(arch: str) -> nn.Module:
    """The backbone of that name: images (B, 3, H, W), normalised -> features (B, embed_dim); has the attribute `embed_dim`.

    Raises ValueError for a name that is not in ARCHITECTURES.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown arch '{arch}'; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[arch]()


def read_checkpoint(file) -> dict:
    """What torch.save wrote, as tensors and plain values: nothing in the file is executed. Raises ValueError."""
    try:
        # the authors keep their command line in the checkpoint; a Namespace holds values only
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file of weights") from None
    except Exception as error:  # whatever a foreign or damaged file makes torch.load raise
        raise ValueError(f"{file}: cannot be read as weights: damaged, or it holds more than tensors and plain values ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file}: expected a checkpoint or a state dict, got {type(checkpoint).__name__}")
    return checkpoint


def backbone_weights(checkpoint: dict) -> dict[str, Tensor]:
    """The backbone's state dict inside any supported checkpoint, the teacher's where there is one, without wrappers' prefixes."""
    nested = [checkpoint[key] for key in ("teacher", "student", "state_dict", "model") if isinstance(checkpoint.get(key), dict)]
    state = nested[0] if nested else checkpoint
    names = {}
    for name, value in state.items():
        for prefix in ("module.", "backbone.", "base."):
            name = name.removeprefix(prefix)
        if isinstance(value, Tensor) and not name.startswith(("head.", "fc.", "classifier.")):
            names[name] = value
    return names


def load_weights(model: nn.Module, file) -> dict:
    """Load backbone weights from a file: our checkpoints, the authors' release, IBN-Net's and torchvision's ImageNet files.

    Returns {"matched", "missing", "left_over"}: lists of names. Raises ValueError, leaving the model as it was, where less
    than 90% of the model's parameters find a tensor of their name and shape.
    """
    state, own = backbone_weights(read_checkpoint(file)), model.state_dict()
    matched = [name for name in own if name in state and state[name].shape == own[name].shape]
    report = {
        "matched": matched,
        "missing": [name for name in own if name not in matched],
        "left_over": [name for name in state if name not in matched],
    }
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    share = sum(sizes.get(name, 0) for name in matched) / sum(sizes.values())
    if share < 0.9:
        raise ValueError(
            f"{file}: only {share:.0%} of the model's parameters matched ({len(matched)} of {len(own)} tensors; "
            f"missing {report['missing'][:3]}, left over {report['left_over'][:3]}); is it the weights of another architecture?"
        )
    model.load_state_dict({name: state[name] for name in matched}, strict=False)
    return report


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the paper


def normalize(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> zero mean, unit variance over ImageNet."""
    mean, std = torch.tensor([MEAN, STD], dtype=images.dtype).to(images.device, non_blocking=True)  # which is not waited for
    return (images - mean[:, None, None]).div_(std[:, None, None])


def main() -> None:
    """Print the table of architectures."""
    print(f"{'arch':<10} {'parameters':>12} {'embedding':>10}")
    for arch in ARCHITECTURES:
        model = build(arch)
        print(f"{arch:<10} {sum(p.numel() for p in model.parameters()):>12,} {model.embed_dim:>10}")


if __name__ == "__main__":
    sys.exit(main())
