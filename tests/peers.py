"""Peers in the table of docs/people.md: other losses on the same network, images and steps.

    python tests/peers.py supervised FLAGS    # the truth's labels, cross-entropy and triplets
    python tests/peers.py clusters FLAGS      # Cluster-Contrast (Dai et al., ACCV 2022): no labels

FLAGS are train.py's. A peer takes of them the data, network, seed, views, batch, optimiser, number
of steps and of rounds, and leaves its figures in runs/NAME/log.jsonl as train.py does. Clusters are
raw tracklets in stage 1, then found by DBSCAN. `clusters` needs scikit-learn.
"""
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
from denoise import pairwise_scores
from distill import Classifier, make_views, supervised_loss
from evaluate import evaluate_features, extract, join_processes, rerank
from model import build
from train import (
    clip_gradients,
    follow_schedule,
    generator_of,
    log,
    make_optimizer,
    networks_in_bfloat16,
    parse_settings,
    plan_epochs,
    read_inputs,
    view_kinds,
)

IMAGES = 4  # of each identity in a batch


class Clusters(nn.Module):
    """A memory of one feature for each cluster, which follows the images that it is compared to."""

    def __init__(self, features, labels, temperature=0.05, momentum=0.1):
        super().__init__()
        self.temperature = temperature
        self.momentum = momentum
        kept = labels >= 0
        sums = torch.zeros(labels.max() + 1, features.shape[1])
        sums.index_add_(0, labels[kept], features[kept])
        self.register_buffer("memory", F.normalize(sums))

    def forward(self, features, labels):
        features = F.normalize(features)
        logits = features @ self.memory.clone().T  # which changes before the gradient is taken
        loss = F.cross_entropy(logits / self.temperature, labels)
        for feature, label in zip(features.detach(), labels):
            self.memory[label].lerp_(feature, 1 - self.momentum)
            self.memory[label] = F.normalize(self.memory[label], dim=0)
        return loss


def find_clusters(features, eps=0.5, least=4):
    """DBSCAN on Jaccard distances of k-reciprocal neighbours (k1 30, k2 6; all images are there
    twice, as queries and as gallery, hence twice of both). Labels (N,), -1 for outliers."""
    from sklearn.cluster import DBSCAN

    distance = rerank(features, features, k1=60, k2=12, lambda_value=0.0).clip(0)
    found = DBSCAN(eps=eps, min_samples=least, metric="precomputed").fit_predict(distance)
    return torch.from_numpy(found).long()


def log_clusters(s, step, tracklets, labels, truth):
    """How good they are."""
    figures = {"identities": int(labels.max() + 1), "levels": []}
    figures["f1_tracklets"] = pairwise_scores(tracklets.track, truth)["f1"]
    figures["f1"] = pairwise_scores(labels.numpy(), truth)["f1"]
    log(s, "denoise", step=step, **figures)
    print(figures, flush=True)


def main():
    peer = sys.argv[1]
    s = parse_settings(sys.argv[2:])
    if peer == "supervised":
        s.identities = "true"
    device = join_processes()
    torch.manual_seed(s.seed)
    tracklets, labels, truth, benchmark = read_inputs(s)
    labels = torch.from_numpy(labels)
    backbone = build(s.arch)
    network = Classifier(backbone, labels.max() + 1).to(device)
    optimizer = make_optimizer(network)
    Ks, finds = plan_epochs(s)  # the epochs before which identities are found
    epochs = len(Ks)
    steps = s.epoch_steps or max(1, len(tracklets) // s.batch)
    s.folder.mkdir(parents=True, exist_ok=True)
    (s.folder / "log.jsonl").unlink(missing_ok=True)  # it begins anew
    for epoch in range(epochs):
        if peer == "clusters" and epoch in [0, *finds]:
            features = extract(backbone, tracklets, s.size, device, s.workers)
            if epoch in finds:
                labels = find_clusters(features)
                log_clusters(s, epoch * steps, tracklets, labels, truth)
            clusters = Clusters(torch.from_numpy(features), labels).to(device)
        batches = data.sample_identities(labels.numpy(), IMAGES, s.batch, s.seed, epoch, steps)
        images = data.load_batches(tracklets, list(batches), s.size, s.workers)
        network.train()
        start = time.time()
        for i, batch in enumerate(images):
            step = epoch * steps + i
            state = SimpleNamespace(step=step, optimizer=optimizer)
            follow_schedule(state, s, epochs * steps)
            generator = generator_of(s.seed, step)
            views = make_views(batch.to(device), view_kinds(s)[:2], generator)
            with networks_in_bfloat16(s, device):
                features, logits = network(torch.cat(views))
            theirs = labels[batches[i]].repeat(2).to(device)
            if peer == "clusters":
                loss = clusters(features, theirs)
            else:
                loss = supervised_loss(features, logits, theirs)
            loss.backward()
            clip_gradients(backbone)
            optimizer.step()
            optimizer.zero_grad()
        rate = steps * s.batch / (time.time() - start)
        figures = {"loss": loss.item(), "images_per_second": rate}
        log(s, "train", stage=peer, step=step + 1, **figures)
        print(f"epoch {epoch}: {figures}", flush=True)
    features = extract(backbone, benchmark.images, s.size, device, s.workers)
    result = evaluate_features(features, benchmark)
    log(s, "evaluate", stage=peer, step=step + 1, mAP=result["mAP"], R1=result["R1"])
    print(f"mAP {result['mAP']:.1%}  R1 {result['R1']:.1%}")


if __name__ == "__main__":
    main()
