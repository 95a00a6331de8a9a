"""Whole networks, built from `resdense_ext.nn`, with the parameter names of the libraries they stem from."""

from resdense_ext.models.densenet import (
    DenseNet,
    densenet121,
    densenet121_3d,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_bc40,
    densenet_bc100,
)
from resdense_ext.models.dual_path import DPN, dpn68, dpn92, dpn98
from resdense_ext.models.fc_densenet import FCDenseNet, fc_densenet103, fc_densenet56, fc_densenet67
from resdense_ext.models.preact_resnet import PreActResNet, preact_resnet1001, preact_resnet110, preact_resnet164
from resdense_ext.models.registry import create, names
from resdense_ext.models.residual_unet import ResidualUNet, residual_unet_2d, residual_unet_3d
from resdense_ext.models.resnet import (
    ResNet,
    resnet101,
    resnet152,
    resnet18,
    resnet34,
    resnet50,
    resnext101_32x8d,
    resnext50_32x4d,
    wide_resnet50_2,
)

__all__ = [
    "DPN",
    "DenseNet",
    "FCDenseNet",
    "PreActResNet",
    "ResNet",
    "ResidualUNet",
    "create",
    "densenet121",
    "densenet121_3d",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc100",
    "densenet_bc40",
    "dpn68",
    "dpn92",
    "dpn98",
    "fc_densenet103",
    "fc_densenet56",
    "fc_densenet67",
    "names",
    "preact_resnet1001",
    "preact_resnet110",
    "preact_resnet164",
    "residual_unet_2d",
    "residual_unet_3d",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext50_32x4d",
    "wide_resnet50_2",
]
