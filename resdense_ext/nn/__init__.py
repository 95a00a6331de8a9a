"""Modules: state and policy; a forward is one functional call."""

from resdense_ext.nn.dense import Chain, DenseBlock, DenseLayer, Transition

__all__ = ["Chain", "DenseBlock", "DenseLayer", "Transition"]
