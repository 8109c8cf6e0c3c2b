"""Ask a model about images it has no labels for: prompts, class vectors, answers and their evaluation."""

from .classifier import ZeroShotClassifier, class_vectors, classify
from .evaluate import Accuracy, evaluate

__all__ = ["Accuracy", "ZeroShotClassifier", "class_vectors", "classify", "evaluate"]
