"""distill.py: views against torchvision, the loss against its definition, centering against direct computation."""
import dataclasses
import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF

import distill
import model


def uint8_images(n, size=(64, 32), seed=0):
    small = torch.rand(n, 3, 8, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(small, size, mode="bilinear") * 255).byte()


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("scale", [(0.8, 1.0), (0.05, 0.8)])
def test_crop_and_flip_equal_torchvisions(scale):
    """Floats, as on a GPU, exactly; bytes up to their rounding, half a step for columns and for rows."""
    images = torch.randint(0, 256, (12, 3, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = distill.Views(size=(32, 16), scale=scale, jitter_p=0, grey_p=0, blur_p=0)
    drawn = views.draw(12, (64, 32), torch.Generator().manual_seed(0))
    got, floats = views.render(images, drawn), distill.crop_and_resize(images.float(), drawn["box"], (32, 16))
    for i in range(12):
        want = TF.resized_crop(images[i].float() / 255, *drawn["box"][i].tolist(), [32, 16], antialias=True)
        torch.testing.assert_close(floats[i], want, atol=1e-5, rtol=0)
        want = want.flip(2) if drawn["flip"][i] else want
        torch.testing.assert_close(got[i], want, atol=1.01 / 255, rtol=0)
    assert 0 < drawn["flip"].sum() < 12


@pytest.mark.parametrize("operation, reference, factors", [
    (distill.adjust_brightness, TF.adjust_brightness, [0.6, 1.0, 1.4]),
    (distill.adjust_contrast, TF.adjust_contrast, [0.6, 1.0, 1.4]),
    (distill.adjust_saturation, TF.adjust_saturation, [0.0, 0.8, 1.2]),
    (distill.adjust_hue, TF.adjust_hue, [-0.1, 0.0, 0.1]),
])
def test_colour_equals_torchvisions(operation, reference, factors):
    images = uint8_images(3).float() / 255
    images[0, :, :4] = 0.5  # grey and black have no hue
    images[1, :, :4] = 0
    got = operation(images, torch.tensor(factors)[:, None, None, None])
    torch.testing.assert_close(got, torch.stack([reference(i, f) for i, f in zip(images, factors)]), atol=2e-4, rtol=0)


def test_blur_equals_torchvisions():
    images = uint8_images(2).float() / 255
    got = distill.Views(blur_sigma=1.5).blur(images, torch.tensor([0.8, 1.5])[:, None, None, None])
    framed = torch.nn.functional.pad(images, [5] * 4, mode="replicate")  # torchvision mirrors at the border
    for i, sigma in enumerate((0.8, 1.5)):
        want = TF.gaussian_blur(framed[i], [11, 11], sigma)[:, 5:-5, 5:-5]  # 3 x 1.5 pixels each way
        torch.testing.assert_close(got[i], want, atol=1e-5, rtol=0)


def test_each_image_gets_its_own_parameters_and_the_rest_stay():
    images = uint8_images(4)
    views = distill.Views(size=(64, 32), jitter_p=0, blur_p=0)
    drawn = views.draw(4, (64, 32), torch.Generator().manual_seed(0))
    drawn["flip"][:] = False
    drawn["box"] = torch.tensor([[0, 0, 64, 32]] * 4)
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
    for key, p in (("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("blur", 0.5), ("solarize", 0.2)):
        assert mean(drawn[key]) == pytest.approx(p, abs=0.02), key
    assert drawn["sigma"].min() >= 0.1 and drawn["sigma"].max() <= 2.0 and mean(drawn["sigma"]) == pytest.approx(1.05, abs=0.02)
    top, left, height, width = drawn["box"].T
    share = height * width / (256 * 128)
    assert share.min() > 0.045 and share.max() < 0.82 and mean(share) == pytest.approx(0.425, abs=0.02)
    ratio = width / height
    assert ratio.min() > 0.38 and ratio.max() < 0.63 and mean(ratio.log()) == pytest.approx(math.log(0.24) / 2, abs=0.02)
    assert (top + height <= 256).all() and (left + width <= 128).all() and top.min() >= 0 and left.min() >= 0
    low, high = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
    assert (drawn["factors"] >= low).all() and (drawn["factors"] <= high).all()
    torch.testing.assert_close(drawn["factors"].mean(0), (low + high) / 2, atol=0.01, rtol=0)
    torch.testing.assert_close(drawn["order"].float().mean(0), torch.full((4,), 1.5), atol=0.05, rtol=0)


def test_a_box_that_cannot_fit_is_the_largest_in_the_middle():
    """Of a square image, no box of 0.9 of the area is half as wide as high."""
    boxes = distill.draw_boxes(5, (64, 64), (0.9, 1.0), (0.4, 0.5), torch.Generator().manual_seed(0))
    assert boxes.tolist() == [[0, 16, 64, 32]] * 5


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
    assert kind.render(uint8_images(6).to("meta"), drawn).shape == (6, 3, 32, 16)


def test_every_view_of_an_image_is_drawn_anew():
    images = uint8_images(6)
    kind = distill.Views(size=(64, 32), scale=(1.0, 1.0), ratio=(0.5, 0.5), jitter_p=0, grey_p=0, blur_p=0)
    views = torch.stack(distill.make_views(images, [kind] * 3, torch.Generator().manual_seed(0)))  # (3, 6, 3, 64, 32)
    plain = distill.normalize(images.float() / 255)
    as_it_is = torch.isclose(views, plain, atol=1e-5).flatten(2).all(2)
    mirrored = torch.isclose(views, plain.flip(3), atol=1e-5).flatten(2).all(2)
    assert (as_it_is ^ mirrored).all() and 0 < as_it_is.sum() < 18 and (as_it_is[0] != as_it_is[1]).any()


def test_jitter_follows_each_images_own_order():
    """Against torchvision's functions called image by image, in the order that was drawn."""
    images = uint8_images(24)
    kind = distill.Views(size=(64, 32), scale=(1.0, 1.0), ratio=(0.5, 0.5), grey_p=0, blur_p=0)
    drawn = kind.draw(24, (64, 32), torch.Generator().manual_seed(2))
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


def H(p, log_q):
    return -(p * log_q).sum()


def papers(p, log_q, K):
    """Eq. 9 as it reads: all ordered pairs (i, j) of an identity's images, both global views x of i, all views x' != x of j."""
    V, B, _ = log_q.shape
    terms = []
    for first in range(0, B, K):
        for i in range(first, first + K):
            for j in range(first, first + K):
                for x in range(2):
                    for x_ in range(V):
                        if (i, x) != (j, x_):
                            terms.append(H(p[x, i], log_q[x_, j]))
    return sum(terms) / len(terms)


def releases(p, log_q, K):
    """The authors' code: pairs of different views, in each the mean over images and, for each i != j, the mean over identities."""
    V, B, _ = log_q.shape
    losses = []
    for u in range(2):
        for v in range(V):
            if u != v:
                loss = sum(H(p[u, b], log_q[v, b]) for b in range(B)) / B
                for i in range(K):
                    for j in range(K):
                        if i != j:
                            loss = loss + sum(H(p[u, n + i], log_q[v, n + j]) for n in range(0, B, K)) / (B // K)
                losses.append(loss / (K * (K - 1) + 1))
    return sum(losses) / len(losses)


DEFINITIONS = {"paper": papers, "release": releases}


def logits(V=4, B=8, D=12, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student = (torch.randn(V, B, D, generator=g, dtype=dtype) / 5).requires_grad_()
    return student, torch.randn(2, B, D, generator=g, dtype=dtype) / 5, torch.randn(D, generator=g, dtype=dtype) / 9


@pytest.mark.parametrize("weights", DEFINITIONS)
@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("local_crops", [0, 2, 8])
def test_loss_equals_its_definition(weights, K, local_crops):
    """In float32; the definition is summed in float64."""
    student, teacher, center = logits(2 + local_crops, dtype=torch.float32)
    fast = distill.identity_loss(student, teacher, center, K, 0.2, 0.05, weights)
    p = torch.softmax((teacher - center).double() / 0.05, -1)
    slow = DEFINITIONS[weights](p, torch.log_softmax(student.double() / 0.2, -1), K)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-6)
    a, b = torch.autograd.grad(fast, student)[0], torch.autograd.grad(slow, student)[0]
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert a.abs().max() > 1e-3


@pytest.mark.parametrize("weights", DEFINITIONS)
@pytest.mark.parametrize("local_crops", [0, 8])
def test_loss_of_single_images_is_dinos(weights, local_crops):
    """K = 1: the mean over pairs of views u != v of the mean over images of the cross-entropy, as DINO defines it."""
    student, teacher, center = logits(2 + local_crops)
    p = torch.softmax((teacher - center) / 0.04, dim=-1)
    pairs = [(u, v) for u in range(2) for v in range(2 + local_crops) if u != v]
    dino = sum(torch.sum(-p[u] * torch.log_softmax(student[v] / 0.1, dim=-1), dim=-1).mean() for u, v in pairs) / len(pairs)
    loss = distill.identity_loss(student, teacher, center, K=1, weights=weights)
    assert loss.item() == pytest.approx(dino.item(), abs=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, dino)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("weights", DEFINITIONS)
@pytest.mark.parametrize("K", [1, 4])
def test_gradient_by_finite_differences(weights, K):
    student, teacher, center = logits(V=3, B=4, D=5)
    assert torch.autograd.gradcheck(lambda x: distill.identity_loss(x, teacher, center, K, weights=weights), student)
    assert not distill.identity_loss(student.detach(), teacher.requires_grad_(), center, K).requires_grad  # the teacher learns nothing


@pytest.mark.parametrize("weights", DEFINITIONS)
def test_loss_knows_identities_and_nothing_else(weights):
    student, teacher, center = logits()
    loss = lambda order: distill.identity_loss(student[:, order], teacher[:, order], center, 4, weights=weights).item()
    plain = loss([0, 1, 2, 3, 4, 5, 6, 7])
    assert loss([4, 5, 6, 7, 0, 1, 2, 3]) == pytest.approx(plain, abs=1e-12)  # identities in another order
    assert loss([0, 2, 1, 3, 4, 5, 6, 7]) == pytest.approx(plain, abs=1e-12)  # images of one identity swapped
    assert abs(loss([0, 4, 2, 3, 1, 5, 6, 7]) - plain) > 1e-4  # images of two identities swapped


def test_loss_refuses_a_batch_that_K_does_not_divide():
    with pytest.raises(ValueError, match="batch of 8 images cannot hold K=3"):
        distill.identity_loss(*logits(), K=3)


def test_logits_are_float32_under_bfloat16():
    """What the perceptron makes is rounded to 8 bits, its cosines with the prototypes are not: they are exact for what it made."""
    torch.manual_seed(0)
    head, features = model.Head(16, prototypes=64, hidden=32, bottleneck=16), torch.randn(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, got = head.mlp(features), head(features)
    assert rounded.dtype == torch.bfloat16 and got.dtype == torch.float32
    want = torch.cosine_similarity(rounded.double()[:, None], head.last_layer.weight.double()[None], dim=-1)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- center, teacher, gauges


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


@pytest.mark.parametrize("temp, iterations", [(0.04, 3), (0.04, 1), (0.1, 3), (0.02, 5)])
def test_sinkhorns_center_equals_alternation(temp, iterations):
    _, teacher, _ = logits(B=32, D=8, dtype=torch.float32)
    center = distill.sinkhorn(teacher, temp, iterations)
    p = torch.softmax((teacher - center) / temp, dim=-1)
    torch.testing.assert_close(p.double(), alternate(teacher, temp, iterations), atol=1e-5, rtol=0)


def test_sinkhorn_balances_what_no_exponential_could_hold():
    teacher = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)) * 100
    teacher[..., 5] -= 2000  # a prototype that is far from every image still gets its share
    p = torch.softmax((teacher - distill.sinkhorn(teacher, temp=20, iterations=300)) / 20, dim=-1)
    torch.testing.assert_close(p.sum((0, 1)), torch.full((6,), 32 / 6), atol=0.6, rtol=0)


def test_network_places_every_crop_and_batches_equal_sizes():
    class Mean(torch.nn.Module):
        calls = 0

        def forward(self, x):
            Mean.calls += 1
            return x.mean((2, 3))

    crops = [torch.randn(3, 3, 8, 4), torch.randn(3, 3, 8, 4), torch.randn(3, 3, 4, 2)]
    got = distill.Network(Mean(), torch.nn.Identity())(crops)
    torch.testing.assert_close(got, torch.stack([crop.mean((2, 3)) for crop in crops]))
    assert Mean.calls == 2


@pytest.mark.parametrize("arch, last", [("r18ibn", True), ("vit_tiny", False)])
def test_resnets_run_in_channels_last_and_others_do_not(arch, last):
    network = distill.Network(model.build(arch), torch.nn.Identity())
    first = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
    found = []
    first.register_forward_hook(lambda module, inputs, out: found.append(out.is_contiguous(memory_format=torch.channels_last)))
    network([torch.randn(2, 3, 32, 16)])
    assert found == [last]


def test_teacher_follows_the_students_parameters_and_not_its_batch_statistics():
    student, teacher = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    student(torch.randn(8, 2) + 5)
    torch.nn.init.normal_(student.weight)
    want = 0.9 * teacher.weight.detach() + 0.1 * student.weight.detach()
    distill.update_teacher(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight.detach(), want)
    assert not teacher.running_mean.any() and student.running_mean.any()


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
