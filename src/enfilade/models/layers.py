"""The layer that all networks of pixels share."""

from torch import nn


def conv_bn(
    cin: int, cout: int, kernel: int = 3, *, relu: bool = True, dilation: int = 1, kaiming: bool = False
) -> nn.Sequential:
    """A convolution that keeps the map's size, batch normalisation in the place of a bias and, with `relu`, a ReLU.
    `kaiming` draws the weights as He et al. (ICCV 2015) do; otherwise they are as torch draws them."""
    conv = nn.Conv2d(cin, cout, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    if kaiming:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    layers = [conv, nn.BatchNorm2d(cout)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)
