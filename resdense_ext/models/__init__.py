"""Whole networks, built from `resdense_ext.nn`, with the parameter names of the libraries they stem from."""

from resdense_ext.models.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
)

__all__ = ["DenseNet", "densenet121", "densenet161", "densenet169", "densenet201", "densenet264"]
