"""Modules: state and policy; a forward is one functional call."""

from resdense_ext.nn.dense import DenseBlock, DenseLayer, Transition

__all__ = ["DenseBlock", "DenseLayer", "Transition"]
