"""distill.py: views against torchvision, the loss against its definition, centering against direct computation."""
import dataclasses
import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF

import distill


def uint8_images(n, size=(64, 32), seed=0):
    small = torch.rand(n, 3, 8, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(small, size, mode="bilinear") * 255).byte()


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("scale", [(0.8, 1.0), (0.05, 0.8)])
def test_crop_equals_torchvisions(scale):
    images = uint8_images(12)
    views = distill.Views(size=(32, 16), scale=scale)
    drawn = views.draw(12, (64, 32), torch.Generator().manual_seed(0))
    got = views.crop_resize(images, drawn)
    for i in range(12):
        box = [int(drawn[key][i]) for key in ("top", "left", "height", "width")]
        want = TF.resized_crop(images[i].float() / 255, *box, [32, 16], antialias=True)
        torch.testing.assert_close(got[i], want.flip(2) if drawn["flip"][i] else want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("operation, reference, factors", [
    (0, TF.adjust_brightness, [0.6, 1.0, 1.4]), (1, TF.adjust_contrast, [0.6, 1.0, 1.4]),
    (2, TF.adjust_saturation, [0.0, 0.8, 1.2]), (3, TF.adjust_hue, [-0.1, 0.0, 0.1]),
])
def test_colour_equals_torchvisions(operation, reference, factors):
    images = uint8_images(3).float() / 255
    images[0, :, :4] = 0.5  # grey and black have no hue
    images[1, :, :4] = 0
    got = distill.adjust(images.clone(), operation, torch.tensor(factors)[:, None, None, None])
    torch.testing.assert_close(got, torch.stack([reference(i, f) for i, f in zip(images, factors)]), atol=2e-4, rtol=0)


def test_blur_equals_torchvisions_inside():
    images = uint8_images(2).float() / 255
    got = distill.Views(blur_sigma=1.5).blur(images, torch.tensor([0.8, 1.5])[:, None, None, None])
    for i, sigma in enumerate((0.8, 1.5)):
        want = TF.gaussian_blur(images[i], [2 * int(3 * sigma) + 1] * 2, sigma)  # 3 sigma each way
        torch.testing.assert_close(got[i, :, 8:-8, 8:-8], want[:, 8:-8, 8:-8], atol=1e-4, rtol=0)


def test_each_image_gets_its_own_parameters_and_the_rest_stay():
    images = uint8_images(4)
    views = distill.Views(size=(64, 32), jitter_p=0, blur_p=0)
    drawn = views.draw(4, (64, 32), torch.Generator().manual_seed(0))
    drawn["flip"][:], drawn["top"][:], drawn["left"][:], drawn["height"][:], drawn["width"][:] = False, 0, 0, 64, 32
    drawn["grey"] = torch.tensor([True, False, False, False])
    drawn["solarize"] = torch.tensor([False, True, False, False])
    drawn["jitter"] = torch.tensor([False, False, True, False])
    drawn["factors"][2] = torch.tensor([0.5, 1.0, 1.0, 0.0])
    x, want = views.render(images, drawn), images.float() / 255
    torch.testing.assert_close(x[3], want[3], atol=1e-6, rtol=0)
    assert (x[0] == x[0, :1]).all()
    torch.testing.assert_close(x[1], TF.solarize(want[1], 0.5), atol=1e-6, rtol=0)
    torch.testing.assert_close(x[2], want[2] * 0.5, atol=1e-3, rtol=0)


def test_parameters_follow_the_recipe():
    views = distill.Views(size=(64, 32), scale=(0.05, 0.8), blur_p=0.5, solarize_p=0.2)
    drawn = views.draw(20_000, (256, 128), torch.Generator().manual_seed(0))
    mean = lambda x: x.float().mean().item()
    for key, p in (("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("solarize", 0.2)):
        assert mean(drawn[key]) == pytest.approx(p, abs=0.02), key
    assert mean(drawn["sigma"] > 0) == pytest.approx(0.5, abs=0.02)
    assert drawn["sigma"][drawn["sigma"] > 0].min() >= 0.1 and drawn["sigma"].max() <= 2.0
    share = drawn["height"] * drawn["width"] / (256 * 128)
    assert share.min() > 0.045 and share.max() < 0.82 and mean(share) == pytest.approx(0.425, abs=0.02)
    ratio = drawn["width"] / drawn["height"]
    assert ratio.min() > 0.38 and ratio.max() < 0.63 and mean(ratio.log()) == pytest.approx(math.log(0.24) / 2, abs=0.02)
    assert (drawn["top"] + drawn["height"] <= 256).all() and (drawn["left"] + drawn["width"] <= 128).all() and drawn["top"].min() >= 0
    low, high = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
    assert (drawn["factors"] >= low).all() and (drawn["factors"] <= high).all()
    torch.testing.assert_close(drawn["factors"].mean(0), (low + high) / 2, atol=0.01, rtol=0)
    torch.testing.assert_close(drawn["order"].float().mean(0), torch.full((4,), 1.5), atol=0.05, rtol=0)


def test_views_do_not_depend_on_the_number_of_processes():
    images = uint8_images(8)
    kinds = [distill.Views(size=(32, 16)), distill.Views(size=(16, 8), scale=(0.05, 0.8), solarize_p=0.5)]
    whole = distill.make_views(images, kinds, torch.Generator().manual_seed(5))
    parts = [distill.make_views(images[r * 4 : r * 4 + 4], kinds, torch.Generator().manual_seed(5), r, 2) for r in range(2)]
    for v in range(2):
        torch.testing.assert_close(torch.cat([parts[0][v], parts[1][v]]), whole[v])
    other = distill.make_views(images, kinds, torch.Generator().manual_seed(6))
    assert (other[0] - whole[0]).abs().max() > 0.1


def test_views_do_not_depend_on_what_is_rendered_with_them():
    images, kind = uint8_images(8), distill.Views(size=(32, 16), scale=(0.05, 1.0), solarize_p=0.5)
    drawn = kind.draw(8, (64, 32), torch.Generator().manual_seed(1))
    alone = [kind.render(images[i : i + 1], {key: value[i : i + 1] for key, value in drawn.items()}) for i in range(8)]
    torch.testing.assert_close(torch.cat(alone), kind.render(images, drawn), atol=1e-6, rtol=0)


def test_no_view_waits_for_the_device():
    """On a device that has no values: reading one would raise."""
    kind = distill.Views(size=(32, 16), solarize_p=0.5)
    drawn = kind.draw(6, (64, 32), torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta").max().item()
    assert distill.normalize(kind.render(uint8_images(6).to("meta"), drawn)).shape == (6, 3, 32, 16)


def test_copies_are_views_of_their_own_of_every_image():
    images = uint8_images(6)
    kind = distill.Views(size=(64, 32), scale=(1.0, 1.0), ratio=(0.5, 0.5), jitter_p=0, grey_p=0, blur_p=0, copies=3)
    views = distill.make_views(images, [kind], torch.Generator().manual_seed(0))
    assert [view.shape for view in views] == [(6, 3, 64, 32)] * 3
    plain = distill.normalize(images.float() / 255)
    flips = torch.stack([torch.isclose(view, plain, atol=1e-5).flatten(1).all(1) for view in views])
    mirrored = torch.stack([torch.isclose(view, plain.flip(3), atol=1e-5).flatten(1).all(1) for view in views])
    assert (flips ^ mirrored).all() and 0 < flips.sum() < 18 and (flips[0] != flips[1]).any()


def test_jitter_follows_each_images_own_order():
    """Against torchvision's functions called image by image, in the order that was drawn."""
    images = uint8_images(12)
    kind = distill.Views(size=(64, 32), scale=(1.0, 1.0), ratio=(0.5, 0.5), grey_p=0, blur_p=0)
    drawn = kind.draw(12, (64, 32), torch.Generator().manual_seed(2))
    drawn["flip"][:] = False
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    want = []
    for i, image in enumerate(images.float() / 255):
        for operation in drawn["order"][i].tolist() if drawn["jitter"][i] else ():
            image = operations[operation](image, drawn["factors"][i, operation].item())
        want.append(image)
    torch.testing.assert_close(kind.render(images, drawn), torch.stack(want), atol=2e-4, rtol=0)
    assert len({tuple(order) for order in drawn["order"][drawn["jitter"]].tolist()}) > 4 and not drawn["jitter"].all()
    only = dataclasses.replace(kind, jitter=(0.4, 0, 0, 0)).render(images, drawn)  # strength 0 leaves an operation out
    factor = torch.where(drawn["jitter"], drawn["factors"][:, 0], 1.0)[:, None, None, None]
    torch.testing.assert_close(only, (images.float() / 255 * factor).clamp(0, 1))


# ---------------------------------------------------------------- loss


def by_definition(student, teacher, center, K, student_temp=0.1, teacher_temp=0.04):
    """The loss as the paper writes it: loops over views, over pairs of images of an identity, and over identities."""
    p = torch.softmax((teacher - center) / teacher_temp, -1)
    log_q = torch.log_softmax(student / student_temp, -1)
    H = lambda p, q: -(p * q).sum()
    V, B = len(student), student.shape[1]
    losses = []
    for u in range(2):
        for v in range(V):
            if u == v:
                continue
            loss = sum(H(p[u, b], log_q[v, b]) for b in range(B)) / B
            for i in range(K):
                for j in range(K):
                    if i != j:
                        loss = loss + sum(H(p[u, n + i], log_q[v, n + j]) for n in range(0, B, K)) / (B // K)
            losses.append(loss / (K * (K - 1) + 1))
    return sum(losses) / len(losses)


def logits(V=4, B=8, D=12, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student = (torch.randn(V, B, D, generator=g, dtype=dtype) / 5).requires_grad_()
    return student, torch.randn(2, B, D, generator=g, dtype=dtype) / 5, torch.randn(D, generator=g, dtype=dtype) / 9


def units(V=4, B=8, C=5, D=12, dtype=torch.float64, seed=0):
    """z (V, B, C), prototypes (D, C), teacher probabilities (2, B, D), as training has them."""
    g = torch.Generator().manual_seed(seed)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=g, dtype=dtype), dim=-1)
    prototypes = unit(D, C)
    p = torch.softmax(unit(2, B, C) @ prototypes.T / 0.04, dim=-1)
    return unit(V, B, C).requires_grad_(), prototypes.requires_grad_(), p


@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("local_crops", [0, 2, 8])
def test_loss_equals_its_definition(K, local_crops):
    """In float32; the definition is summed in float64."""
    student, teacher, center = logits(2 + local_crops, dtype=torch.float32)
    fast, slow = distill.identity_loss(student, teacher, center, K), by_definition(student.double(), teacher.double(), center.double(), K)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-6)
    a, b = torch.autograd.grad(fast, student)[0], torch.autograd.grad(slow, student)[0]
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert a.abs().max() > 1e-3


@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("local_crops", [0, 2, 8])
def test_loss_crop_by_crop_equals_the_definition_too(K, local_crops):
    z, prototypes, p = units(2 + local_crops, dtype=torch.float32)
    fast = distill.matching_loss(z, prototypes, p, K)
    got = torch.autograd.grad(3 * fast, (z, prototypes))  # what comes from above scales the gradient
    exact = [x.detach().double().requires_grad_() for x in (z, prototypes)]
    slow = by_definition(exact[0] @ exact[1].T, 0.04 * p.double().log(), 0, K)  # the softmax gives p back
    assert fast.item() == pytest.approx(slow.item(), abs=1e-6)
    for a, b in zip(got, torch.autograd.grad(3 * slow, exact)):
        torch.testing.assert_close(a.double(), b, atol=3e-6, rtol=0)
        assert a.abs().max() > 1e-2


@pytest.mark.parametrize("local_crops", [0, 8])
def test_loss_of_single_images_is_dinos(local_crops):
    """K = 1: the mean over pairs of views u != v of the mean over images of the cross-entropy, as DINO defines it."""
    z, prototypes, p = units(2 + local_crops)
    total, pairs = 0, 0
    for u in range(2):
        for v in range(2 + local_crops):
            if u != v:
                log_q = torch.log_softmax(z[v] @ prototypes.T / 0.1, dim=-1)
                total, pairs = total + torch.sum(-p[u] * log_q, dim=-1).mean(), pairs + 1
    dino = torch.autograd.grad(total / pairs, (z, prototypes))
    by_logits = distill.identity_loss(z @ prototypes.T, 0.04 * p.log(), torch.zeros(12), K=1)  # the softmax gives p back
    for loss in (distill.matching_loss(z, prototypes, p, K=1), by_logits):
        assert loss.item() == pytest.approx((total / pairs).item(), abs=1e-12)
        for got, want in zip(torch.autograd.grad(loss, (z, prototypes)), dino):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("K", [1, 4])
def test_gradient_by_finite_differences(K):
    z, prototypes, p = units(V=3, B=4, C=3, D=5)
    assert torch.autograd.gradcheck(lambda z, w: distill.matching_loss(z, w, p, K), (z, prototypes))
    student, teacher, center = logits(V=3, B=4, D=5)
    assert torch.autograd.gradcheck(lambda x: distill.identity_loss(x, teacher, center, K), student)


def test_loss_under_bfloat16_is_off_by_its_rounding_only():
    """A network under autocast gives unit vectors rounded to 8 bits: a relative 2^-9 each, so a cosine of at most 1 is off by at
    most 2 * 2^-9, and a logit by that over the temperature 0.1: 0.04. A log softmax is off by at most twice its logits; the mean of
    B * V such errors of either sign comes out far below: a tenth of that bound is allowed."""
    import model

    torch.manual_seed(0)
    head, features = model.Head(16, prototypes=64, hidden=32, bottleneck=16), torch.randn(6 * 8, 16)
    _, _, p = units(B=8, C=16, D=64, dtype=torch.float32)
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z, prototypes = head(features)
            assert head.mlp(features).dtype == (torch.bfloat16 if enabled else torch.float32)
            losses.append(distill.matching_loss(z.unflatten(0, (6, 8)), prototypes, p, 4))
        losses[-1].backward()
    assert losses[1].dtype == torch.float32 and 0 < abs(losses[0] - losses[1]) < 2 * 0.04 / 10


def test_no_more_than_one_crops_logits_are_in_memory():
    """No tensor on the way, forward or backward, is larger than the teacher's probabilities."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.numel = max([self.numel] + [x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)])
            return out

    z, prototypes, p = units(V=10, B=8, C=4, D=500, dtype=torch.float32)
    with Largest() as largest:
        distill.matching_loss(z, prototypes, p, 4).backward()
    assert 8 * 500 <= largest.numel <= p.numel()
    with Largest() as largest:
        distill.identity_loss((z @ prototypes.T), torch.randn(2, 8, 500), torch.zeros(500), 4).backward()
    assert largest.numel >= 10 * 8 * 500  # the gauge works


def test_loss_knows_identities_and_nothing_else():
    student, teacher, center = logits()
    z, prototypes, p = units()
    for loss in (lambda order: distill.identity_loss(student[:, order], teacher[:, order], center, 4).item(),
                 lambda order: distill.matching_loss(z[:, order], prototypes, p[:, order], 4).item()):
        plain = loss([0, 1, 2, 3, 4, 5, 6, 7])
        assert loss([4, 5, 6, 7, 0, 1, 2, 3]) == pytest.approx(plain, abs=1e-12)  # identities in another order
        assert loss([0, 2, 1, 3, 4, 5, 6, 7]) == pytest.approx(plain, abs=1e-12)  # images of one identity swapped
        assert abs(loss([0, 4, 2, 3, 1, 5, 6, 7]) - plain) > 1e-4  # images of two identities swapped


def test_loss_refuses_a_batch_that_K_does_not_divide():
    with pytest.raises(ValueError, match="batch of 8 images cannot hold K=3"):
        distill.identity_loss(*logits(), K=3)


def test_center_is_the_moving_average_of_the_teachers_mean():
    _, teacher, center = logits(dtype=torch.float32)
    torch.testing.assert_close(distill.update_center(center, teacher, 0.9), 0.9 * center + 0.1 * teacher.mean((0, 1)))


def alternate(logits, temp, iterations):
    """Sinkhorn-Knopp as its definition reads, in float64."""
    q = torch.exp(logits.double().flatten(0, 1) / temp)
    q = q / q.sum(1, keepdim=True)
    for _ in range(iterations):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q.view(logits.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_equals_direct_alternation_and_balances_prototypes(dtype):
    _, teacher, _ = logits(B=32, D=8, dtype=torch.float32)
    teacher = teacher.to(dtype)
    got = distill.sinkhorn(teacher, 0.04, 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), alternate(teacher, 0.04, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 32))
    balanced = distill.sinkhorn(teacher, 0.04, 100).sum((0, 1))
    torch.testing.assert_close(balanced, torch.full((8,), 64 / 8), atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_survives_what_no_exponential_does(dtype):
    logits = (torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    logits[..., 5] -= 2000  # a prototype that is far from every image still gets its share
    p = distill.sinkhorn(logits, temp=20, iterations=300)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 16))
    torch.testing.assert_close(p.sum((0, 1)), torch.full((6,), 32 / 6), atol=0.6, rtol=0)


def test_network_places_every_crop_and_batches_equal_sizes():
    class Mean(torch.nn.Module):
        calls = 0

        def forward(self, x):
            Mean.calls += 1
            return x.mean((2, 3))

    class Prototypes(torch.nn.Module):
        def forward(self, x):
            return x, torch.eye(3)

    crops = [torch.randn(3, 3, 8, 4), torch.randn(3, 3, 8, 4), torch.randn(3, 3, 4, 2)]
    z, prototypes = distill.Network(Mean(), Prototypes())(crops)
    torch.testing.assert_close(z, torch.stack([c.mean((2, 3)) for c in crops]))
    assert Mean.calls == 2 and torch.equal(prototypes, torch.eye(3))


def test_resnets_run_in_channels_last_and_others_do_not():
    import model

    formats = {arch: distill.Network(model.build(arch), torch.nn.Identity()).memory_format for arch in ("r18ibn", "vit_tiny", "mnasnet0_5")}
    assert formats == {"r18ibn": torch.channels_last, "vit_tiny": torch.contiguous_format, "mnasnet0_5": torch.contiguous_format}
    views = distill.make_views(uint8_images(2), [distill.Views(size=(32, 16))], torch.Generator(), memory_format=torch.channels_last)
    assert views[0].is_contiguous(memory_format=torch.channels_last) and not views[0].is_contiguous()


def test_teacher_follows_the_student():
    student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = [0.9 * t + 0.1 * s for s, t in zip(student.parameters(), teacher.parameters())]
    distill.update_teacher(teacher, student, 0.9)
    for got, value in zip(teacher.parameters(), want):
        torch.testing.assert_close(got, value)


def test_teachers_batch_statistics_are_its_own():
    student, teacher = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    student(torch.randn(8, 2) + 5)
    before = teacher.running_mean.clone()
    distill.update_teacher(teacher, student, 0.5)
    assert torch.equal(teacher.running_mean, before)


def test_teacher_statistics_of_uniform_certain_and_mixed():
    entropy, used = distill.teacher_statistics(torch.full((2, 3, 8), 1 / 8))
    assert entropy == pytest.approx(math.log(8), abs=1e-5)
    certain = torch.zeros(2, 4, 8)
    certain[:, :, 5] = 1
    assert distill.teacher_statistics(certain) == (pytest.approx(0, abs=1e-6), 1)
    assert distill.teacher_statistics(torch.eye(8).view(2, 4, 8)) == (pytest.approx(0, abs=1e-6), 8)


def test_each_collapse_is_named_with_a_way_out_and_health_is_not():
    D = 64
    assert distill.collapse(loss=3.0, entropy=2.5, used=20, D=D, identities=30) == ""
    uniform = distill.collapse(loss=3.9, entropy=math.log(D) - 1e-3, used=20, D=D, identities=30)
    student_uniform = distill.collapse(loss=math.log(D), entropy=2.5, used=20, D=D, identities=30)
    single = distill.collapse(loss=0.1, entropy=0.01, used=1, D=D, identities=30)
    few = distill.collapse(loss=0.1, entropy=0.01, used=15, D=D, identities=30)
    assert all(text.startswith("uniform collapse") and "--centering sinkhorn" in text for text in (uniform, student_uniform))
    assert single.startswith("collapse to one prototype") and few.startswith("collapse to few prototypes: 15 for the 30") and "--center_momentum" in few
    assert distill.collapse(loss=3.0, entropy=2.5, used=16, D=D, identities=30) == ""
