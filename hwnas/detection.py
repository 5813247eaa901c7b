"""Detectors in training and in judgement: the loss as the engine's criterion, and COCO's numbers of a network on a split."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from hwnas.core.arch import Architecture
from hwnas.core.detector import PostProcessing
from hwnas.data.coco import CocoImages
from hwnas.data.coco_eval import CocoMetrics, evaluate
from hwnas.data.images import Batch, evaluation_batches, evaluation_order
from hwnas.nn.detector import DetectionNetwork, Outputs
from hwnas.nn.ssd import DetectionLoss, Detections, PostProcessor


class DetectionCriterion(nn.Module):
    """The loss of a detector, logged with its two parts, both per matched anchor."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.loss = DetectionLoss(arch)

    def forward(self, outputs: Outputs, y_NM5: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Raw outputs and targets [N, M, 5] -> the sum of the parts, and the parts."""
        parts = self.loss.parts(outputs, y_NM5)
        logged = {"class_loss": parts["classification"], "box_loss": parts["bbox_regression"]}
        return logged["class_loss"] + logged["box_loss"], logged


def detect(
    network: DetectionNetwork, images: CocoImages, config: PostProcessing, *, batch_size: int, limit: int | None = None, workers: int = 0
) -> dict[int, Detections]:
    """What ``network`` finds, in eval mode, in all images or in ``limit`` of them: detections by image index, in ``evaluation_order``."""
    found = detections(network, evaluation_batches(images, batch_size, limit=limit, workers=workers), config)
    return dict(zip(evaluation_order(images, limit).tolist(), found, strict=True))


@torch.inference_mode()
def detections(network: DetectionNetwork, batches: Iterable[Batch], config: PostProcessing) -> list[Detections]:
    """What ``network`` finds, in eval mode, in the images of some batches, one after another, on the CPU."""
    network.eval()
    device = next(network.parameters()).device
    post_processor = PostProcessor(network.arch, config).to(device)
    found: list[Detections] = []
    for x_NCHW, _ in batches:
        found += post_processor(network(x_NCHW.to(device, memory_format=torch.channels_last)))
    return [Detections(*(part.cpu() for part in each)) for each in found]


def average_precision(images: CocoImages, found: dict[int, Detections]) -> CocoMetrics:
    """COCO's numbers of the detections in some images, by their indices. Raises DataError where none of these images has an object."""
    rows = [row for index, detections in found.items() for row in images.results(index, *(each.numpy() for each in detections))]
    return evaluate(images.ground_truth(np.array(list(found))), rows)
