"""Networks and their weights: what turns a person crop into a vector.

ResNet-IBN and ViT with an IBN convolution stem (Luo et al., 2021) are written out here. Their
instance-batch normalisation (IBN-Net, Pan et al., ECCV 2018) removes camera style and keeps
identity. Names in state dicts are those of the authors' release. Other networks come from
torchvision and timm.

    python model.py r50ibn ghostnet_1_0             # parameters, width of the embedding
    python model.py export last.pt --out FILE.pth   # weights as in the authors' release

Read first: `ResNet`, `build`, `load_weights`.
"""
import argparse
import copy
import io
import os
import re
import sys
import types
import warnings

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3

from data import whole_file

# over ImageNet's images, as in the paper
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images):
    """Images (B, 3, H, W) in [0, 1] -> zero mean, unit variance over ImageNet."""
    values = torch.tensor([MEAN, STD])[:, :, None, None]
    mean, std = values.to(images, non_blocking=True)  # which the device does not wait for
    return (images - mean) / std


class IBN(nn.Module):
    """Instance norm on half of the channels, batch norm on the rest: (B, C, H, W) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)
        self.BN = nn.BatchNorm2d(channels // 2)

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return torch.cat([self.IN(first), self.BN(second)], dim=1)


class ResNet(nn.Module):
    """ResNet (He et al., CVPR 2016), its last stage at stride 1 (Luo et al., 2019); with `ibn`,
    IBN in each block of stages 1 to 3 (IBN-a). Images (B, 3, H, W) -> features (B, embed_dim)."""

    memory_format = torch.channels_last  # in which it trains faster

    def __init__(self, block, layers, width=64, ibn=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.embed_dim = width
        for stage, stride in enumerate((1, 2, 2, 1)):
            blocks = nn.Sequential()
            planes = width * 2**stage
            for _ in range(layers[stage]):
                inplanes = self.embed_dim
                self.embed_dim = planes * block.expansion
                shortcut = None
                if inplanes != self.embed_dim:
                    projection = conv1x1(inplanes, self.embed_dim, stride)
                    shortcut = nn.Sequential(projection, nn.BatchNorm2d(self.embed_dim))
                blocks.append(block(inplanes, planes, stride, shortcut))
                stride = 1
                if ibn and stage < 3:
                    blocks[-1].bn1 = IBN(planes)
            self.add_module(f"layer{stage + 1}", blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if isinstance(module, block):
                # each block starts as its shortcut (Goyal et al., 2017)
                nn.init.zeros_(getattr(module, "bn3", module.bn2).weight)

    def forward(self, images):
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)  # (B, width, H/4, W/4)
        x = self.layer2(self.layer1(x))
        x = self.layer4(self.layer3(x))  # (B, embed_dim, H/16, W/16)
        return x.mean((2, 3))


def init_linear(module):
    """The initial values of transformers' and the head's linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Self-attention and a perceptron, each behind a norm (Dosovitskiy et al., ICLR 2021):
    (B, N, C) -> same. A head has 64 channels."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        qkv = self.attn.qkv(self.norm1(x)).unflatten(2, (3, -1, 64))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, 64) each
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attn.proj(heads.transpose(1, 2).flatten(2))  # (B, N, C)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer with a convolution stem: images (B, 3, H, W) -> the class token's
    feature (B, embed_dim). Positions are those of 256x128, resized for any other size."""

    def __init__(self, embed_dim):
        super().__init__()
        self.embed_dim = embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + 16 * 8, embed_dim))
        stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            IBN(64),
            nn.ReLU(),
            conv3x3(64, 64),
            IBN(64),
            nn.ReLU(),
            conv3x3(64, 64),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        projection = nn.Conv2d(64, embed_dim, 8, stride=8)
        self.patch_embed = nn.ModuleDict({"conv": stem, "proj": projection})
        self.blocks = nn.Sequential(*[Block(embed_dim) for _ in range(12)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks.apply(init_linear)

    def forward(self, images):
        tokens = self.patch_embed.proj(self.patch_embed.conv(images))
        tokens = tokens.permute(0, 2, 3, 1)  # (B, H/16, W/16, C)
        positions = self.pos_embed[:, 1:].unflatten(1, (16, 8))
        tokens = tokens + resize_positions(positions, tokens.shape[1:3])
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([first, tokens.flatten(1, 2)], dim=1)  # (B, 1 + N, C)
        return self.norm(self.blocks(x))[:, 0]


def resize_positions(positions, size):
    """Position embeddings of a grid of tokens for another grid: (1, h, w, C) -> (1, *size, C)."""
    grid = positions.permute(0, 3, 1, 2)  # (1, C, h, w)
    return F.interpolate(grid, size=size, mode="bicubic").permute(0, 2, 3, 1)


class Head(nn.Module):
    """Projection head of DINO (Caron et al., ICCV 2021): features (B, embed_dim) -> logits (B, D),
    cosines of what a perceptron makes of the features and D prototypes: a last layer with weight
    norm, its gain fixed at 1. `batch_norm` puts a batch norm without affine before the L2 norm,
    with which a short run on few images learns more."""

    def __init__(self, embed_dim, prototypes, hidden=2048, bottleneck=256, batch_norm=False):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        if batch_norm:
            self.mlp.append(nn.BatchNorm1d(bottleneck, affine=False))
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        self.apply(init_linear)

    def forward(self, features):
        z = self.mlp(features)
        # A logit is divided by a small temperature and told from D others. So it is computed in
        # full float32: without autocast, and without TF32, which torch leaves off for matrix
        # products (torch.backends.cuda.matmul.allow_tf32).
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(z.float())  # (B, bottleneck)
            prototypes = F.normalize(self.last_layer.weight)  # (D, bottleneck)
            return z @ prototypes.T


# ---------------------------------------------------------------- networks by name

RESNETS = {
    "r10": (BasicBlock, (1, 1, 1, 1), 32),
    "r18": (BasicBlock, (2, 2, 2, 2)),
    "r50": (Bottleneck, (3, 4, 6, 3)),
    "r101": (Bottleneck, (3, 4, 23, 3)),
    "r152": (Bottleneck, (3, 8, 36, 3)),
}
VITS = {"vit_tiny": 192, "vit_small": 384, "vit_base": 768}
# What grid n tokens of 16 x 16 pixels are: those of 256x128, 384x128, 224x224 and 384x384 images.
GRIDS = {128: (16, 8), 192: (24, 8), 196: (14, 14), 576: (24, 24)}
# The authors' names of networks that are theirs to the last weight. Their Swin (windows of 8) and
# RepViT (another gate) are other networks than torchvision's and timm's.
AUTHORS = dict(
    names.split("=")
    for names in """
    resnet18=r18 resnet50=r50 resnet101=r101 resnet152=r152
    resnet18_ibn=r18ibn resnet50_ibn=r50ibn resnet101_ibn=r101ibn resnet152_ibn=r152ibn
    convnext_tiny=timm/convnext_tiny convnext_small=timm/convnext_small
    convnext_base=timm/convnext_base edgenext_x_small=timm/edgenext_x_small
    edgenext_small=timm/edgenext_small edgenext_base=timm/edgenext_base
    fastvit_s12=timm/fastvit_s12 fastvit_sa12=timm/fastvit_sa12 fastvit_sa24=timm/fastvit_sa24
    ghostnet_0_5=timm/ghostnet_050 ghostnet_1_0=timm/ghostnet_100 ghostnet_1_3=timm/ghostnet_130
    volo_d1=timm/volo_d1_224 volo_d2=timm/volo_d2_224 volo_d3=timm/volo_d3_224
    """.split()
)
ARCHITECTURES = ["r10ibn", *VITS, *AUTHORS]


def build(arch):
    """The backbone of that name, with the attribute `embed_dim`: normalised images (B, 3, H, W) ->
    features (B, embed_dim). arch: of ARCHITECTURES or its short form (r50ibn), else a classifier
    of torchvision by its name or of timm as timm/<name>, which loses its last layer. Raises
    ValueError for others."""
    arch = AUTHORS.get(arch, arch)
    depth = arch.removesuffix("ibn")
    if depth in RESNETS:
        return ResNet(*RESNETS[depth], ibn=arch != depth)
    if arch in VITS:
        return ViT(VITS[arch])
    if arch.startswith("timm/"):
        network = build_timm(arch.removeprefix("timm/"))
    elif arch in torchvision.models.list_models(torchvision.models):
        network = torchvision.models.get_model(arch)
        linear = [pair for pair in network.named_modules() if isinstance(pair[1], nn.Linear)]
        if not linear:
            raise ValueError(f"{arch}: has no linear layer that could be taken off")
        name, last = linear[-1]
        network.embed_dim = last.in_features
        network.set_submodule(name, nn.Identity())
    else:
        raise ValueError(f"unknown arch '{arch}'; python model.py lists the known ones")
    # dropout and stochastic depth draw from a global generator: a resumed run could not repeat it
    for module in network.modules():
        for name in ("p", "drop_rate", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return network


def build_timm(name):
    """A network of timm without its classifier. VOLO takes any size, others what they can."""
    options = {}
    if name.startswith("volo"):
        options["img_size"] = (256, 128)
    try:
        import timm

        network = timm.create_model(name, num_classes=0, **options)
    except ImportError:
        raise ValueError(f"timm/{name}: needs timm; pip install timm") from None
    except RuntimeError as error:
        raise ValueError(f"timm/{name}: {error}") from None
    if options:
        network.forward_tokens = types.MethodType(volo_tokens, network)
    network.embed_dim = getattr(network, "head_hidden_size", network.num_features)
    return network


def volo_tokens(volo, x):
    """VOLO's `forward_tokens`, but with positions resized to the input:
    (B, H/8, W/8, C) -> (B, N, embed_dim)."""
    for i, block in enumerate(volo.network):
        if i == 2:
            x = x + resize_positions(volo.pos_embed, x.shape[1:3])
        x = block(x)
    return x.flatten(1, 2)


def check_sizes(backbone, arch, sizes):
    """Raises ValueError where the backbone cannot take images of one of the sizes (H, W)."""
    backbone = copy.deepcopy(backbone)  # for its running statistics will change
    for size in sizes:
        try:
            with torch.no_grad():
                features = backbone(torch.zeros(2, 3, *size))
            if features.shape != (2, backbone.embed_dim):
                raise ValueError(f"features are {tuple(features.shape)}")
        except Exception as error:  # whatever a network of somebody else's raises
            size = f"{size[0]}x{size[1]}"
            raise ValueError(f"{arch} cannot take images of {size}: {error}") from None


def sync_batch_norm(network):
    """The network with batch norms that share their statistics over all processes."""
    converter = nn.SyncBatchNorm
    if "timm" in sys.modules:
        # which knows timm's norms with an activation inside: torch's would lose it
        import timm.layers as converter
    return converter.convert_sync_batchnorm(network)


# ---------------------------------------------------------------- weights


def read_checkpoint(file):
    """The dict in a file of torch.save, tensors and plain values: nothing in the file is executed.
    Raises OSError where there is no such file, ValueError for another format."""
    try:
        # the authors keep their command line in the file
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a foreign or damaged file makes it raise
        kind = type(error).__name__
        raise ValueError(f"{file}: cannot be read as weights, by torch.load: {kind}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a dict of weights, got a {type(found).__name__}")
    return found


def write_checkpoint(file, content):
    """Write a file of torch.save, which appears whole or not at all. Raises OSError. It is written
    to memory first: on a full disk torch.save does not say what is wrong."""
    memory = io.BytesIO()
    torch.save(content, memory)
    with whole_file(file) as out:
        out.write(memory.getbuffer())


def backbone_weights(checkpoint):
    """The state dict in a checkpoint, the teacher's if there is one, without prefixes of names."""
    keys = ("teacher", "model_ema", "state_dict_ema", "model", "state_dict")
    for key in keys:
        if isinstance(checkpoint.get(key), dict):
            return backbone_weights(checkpoint[key])
    state = {}
    for name, value in checkpoint.items():
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            name = re.sub(r"^((module|backbone|base|model|_orig_mod|encoder_q)\.)+", "", str(name))
            state[name] = value
    return state


def vit_positions(file, positions):
    """A file's position embeddings (1, 1 + n, C) -> those of 16 x 8 tokens. ValueError where n does
    not tell the grid: 144 may be 12 x 12 or 18 x 8, and 256 may be 16 x 16 or 32 x 8."""
    n = positions.shape[1] - 1
    if n not in GRIDS:
        raise ValueError(f"{file}: {n} position embeddings; known grids are {GRIDS}")
    if n == 192:  # 256x192 images have as many
        taken = "are taken for those of 384x128 images; of 256x192 ones they would be wrong"
        warnings.warn(f"{file}: {n} position embeddings {taken}")
    grid = positions[:, 1:].unflatten(1, GRIDS[n])
    grid = resize_positions(grid, (16, 8)).flatten(1, 2)
    return torch.cat([positions[:, :1], grid], dim=1)


def match_weights(file, own, state):
    """What of a state has the name and shape of one of a network's own, in its type. Raises
    ValueError where that is less than 90% of the network, for positions of another grid, and for
    numbers that are not finite."""
    matched = {}
    for name, mine in own.items():
        value = state.get(name, torch.empty(0))
        if value.shape == mine.shape and value.is_floating_point() == mine.is_floating_point():
            matched[name] = value.to(mine.dtype)
    found = sum(value.numel() for value in matched.values())
    share = found / sum(value.numel() for value in own.values())
    others = [name for name in own if name not in matched]
    if share < 0.9:
        lacks = f"it lacks, or has in another shape, {others[:3]}; it has {list(state)[:3]}"
        raise ValueError(f"{file}: has only {share:.0%} of this network's weights: {lacks}")
    for name in others:
        if name in state and "pos_embed" in name:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            raise ValueError(f"{file}: {name}, which is of another grid, has the shape {shapes}")
    for name, value in matched.items():
        if not value.isfinite().all():
            raise ValueError(f"{file}: {name} holds numbers that are not finite")
    return matched


def load_weights(model, file):
    """Load backbone weights from our checkpoints, the authors' release, ImageNet's of IBN-Net,
    torchvision and timm, or DINO's; a ViT takes the blocks of timm's and DINO's, not the stem
    (which is 14% of vit_tiny: refused).
    Returns {"matched", "missing", "left_over"}, lists of names. Raises ValueError, leaving the
    model as it was, where less than 90% of its weights are found under their name and in their
    shape, one is not finite, or positions are of a grid that is not known."""
    own = model.state_dict()
    state = backbone_weights(read_checkpoint(file))
    # ConvNeXt, EdgeNeXt and FastViT have other names where they were published, and in the
    # authors' release, than in timm, which translates them
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate and own.keys().isdisjoint(state):
        try:
            state = translate(state, model)
        except Exception:  # whatever it raises for another network's weights, refused below
            pass
    if "pos_embed" in state:
        positions = state["pos_embed"].float()
        if isinstance(model, ViT) and positions.ndim == 3:
            state["pos_embed"] = vit_positions(file, positions)
        elif positions.ndim == 4 and "pos_embed" in own:  # VOLO's (1, h, w, C)
            state["pos_embed"] = resize_positions(positions, own["pos_embed"].shape[1:3])
    matched = match_weights(file, own, state)
    model.load_state_dict(matched, strict=False)
    return {
        "matched": list(matched),
        "missing": [name for name in own if name not in matched],
        "left_over": [name for name in state if name not in matched],
    }


def describe(report):
    """What `load_weights` did, in a line."""
    text = ", ".join(f"{len(names)} {key} {names[:3]}" for key, names in report.items())
    if report["missing"]:
        text += "; WARNING: what is missing keeps its initial values"
    return text


def load_backbone(weights, arch=None, size=None):
    """A backbone with weights, in eval mode, and its input size (H, W), both as the checkpoint
    says unless given."""
    settings = read_checkpoint(weights).get("settings")
    if not isinstance(settings, dict):
        settings = {}
    arch = arch or settings.get("arch")
    if not isinstance(arch, str):
        raise ValueError(f"{weights}: does not say which architecture it is for; add --arch")
    size = tuple(size or settings.get("size", (256, 128)))
    backbone = build(arch).eval()
    report = load_weights(backbone, weights)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{weights}: images of {size[0]}x{size[1]}, {describe(report)}")
    check_sizes(backbone, arch, [size])
    return backbone, size


def export(file, out, names="authors"):
    """Write the teacher's backbone of our checkpoint for other code: under the names of the
    authors' release, or plain ones. An existing file is not overwritten."""
    checkpoint = read_checkpoint(file)
    if not {"settings", "step", "teacher"} <= checkpoint.keys():
        raise ValueError(f"{file}: is not a checkpoint of train.py")
    settings = {name: checkpoint["settings"][name] for name in ("arch", "size")}
    weights = {
        name.removeprefix("backbone."): value
        for name, value in checkpoint["teacher"].items()
        if name.startswith("backbone.")
    }
    if names == "authors":
        # their networks with batch norms are wrapped in a module
        wrapped = any(name.endswith("running_mean") for name in weights)
        prefix = "module.backbone." if wrapped else "backbone."
        weights = {"teacher": {prefix + name: value for name, value in weights.items()}}
        weights["settings"] = settings
    if os.path.exists(out):
        raise ValueError(f"{out}: exists already")
    write_checkpoint(out, weights)
    print(f"written: {out}, {settings}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("arch", nargs="*", help="names, or the word export and a checkpoint")
    parser.add_argument("--out", default="backbone.pth", help="of export: the file to write")
    names = ("authors", "plain")
    parser.add_argument("--names", choices=names, default="authors", help="of export: its names")
    args = parser.parse_args()
    if args.arch[:1] == ["export"]:
        if len(args.arch) != 2:
            parser.error("export takes one checkpoint")
        export(args.arch[1], args.out, args.names)
        return
    for arch in args.arch or ARCHITECTURES:
        try:
            with torch.device("meta"):
                network = build(arch)
        except ValueError as error:
            if args.arch:
                raise
            print(f"{arch:<24} {error}")  # the list goes on without timm
            continue
        count = sum(p.numel() for p in network.parameters())
        print(f"{arch:<24} {count:>12,} {network.embed_dim:>6}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"model.py: {error}")
