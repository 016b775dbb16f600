"""Federated fine-tuning of Mixture-of-Experts language models."""

from importlib.metadata import version

__version__ = version("fedexperts")
