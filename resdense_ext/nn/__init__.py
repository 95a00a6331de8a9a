"""Modules: state and policy; a forward is one functional call."""

from resdense_ext.nn.bn_act_conv import BNActConv1d, BNActConv2d, BNActConv3d
from resdense_ext.nn.dense import Chain, DenseBlock, DenseLayer, Transition
from resdense_ext.nn.dual_path import DualPathBlock, DualPathStage
from resdense_ext.nn.ends import AddAct, BNAddAct
from resdense_ext.nn.protocols import DualPathModules, LayerModules, PooledModules, ResidualModules
from resdense_ext.nn.residual import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck

__all__ = [
    "AddAct",
    "BNActConv1d",
    "BNActConv2d",
    "BNActConv3d",
    "BNAddAct",
    "BasicBlock",
    "Bottleneck",
    "Chain",
    "DenseBlock",
    "DenseLayer",
    "DualPathBlock",
    "DualPathModules",
    "DualPathStage",
    "LayerModules",
    "PooledModules",
    "PreActBlock",
    "PreActBottleneck",
    "ResidualModules",
    "Transition",
]
