"""Run a file in MediaPipe's ImageClassifier or ObjectDetector: ``mediapipe_tasks.py
classify|detect MODEL IMAGES.npy``.

Run by .venv-mediapipe's Python. Images are uint8 [N, H, W, 3]; for each, prints a JSON
list of [label, score] or [label, score, left, top, width, height]. To MediaPipe,
detections with the same whole pixels are a single one with several categories.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mediapipe
import numpy as np
from mediapipe.tasks.python import BaseOptions, vision


def classified(model: str, images: list[Any]) -> list[Any]:
    options = vision.ImageClassifierOptions(base_options=BaseOptions(model_asset_path=model))
    with vision.ImageClassifier.create_from_options(options) as classifier:
        results = [classifier.classify(image).classifications[0].categories for image in images]
    return [
        [[category.category_name, category.score] for category in categories]
        for categories in results
    ]


def detected(model: str, images: list[Any]) -> list[Any]:
    options = vision.ObjectDetectorOptions(base_options=BaseOptions(model_asset_path=model))
    with vision.ObjectDetector.create_from_options(options) as detector:
        results = [detector.detect(image).detections for image in images]
    return [[row for detection in detections for row in rows(detection)] for detections in results]


def rows(detection: Any) -> list[Any]:
    box = detection.bounding_box
    return [
        [category.category_name, category.score, box.origin_x, box.origin_y, box.width, box.height]
        for category in detection.categories
    ]


task, model, images_file = sys.argv[1:]
pictures = [
    mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image)
    for image in np.load(images_file)
]
try:
    answer: Any = {"classify": classified, "detect": detected}[task](model, pictures)
except (RuntimeError, NotImplementedError) as error:
    answer = {"refused": str(error)}
print(json.dumps(answer))
