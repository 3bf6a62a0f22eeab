"""Counters of floating-point operations find in our layers what they find in torch's and mmcv's own."""

import pytest
import torch
from cases import DEVICE
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from normplug import layers

C = 8


class StockConvWS2d(nn.Conv2d):
    """Weight standardization as mmcv spells it out."""

    def forward(self, x):
        filters = self.weight.flatten(1)
        mean, std = (t.view(-1, 1, 1, 1) for t in (filters.mean(1), filters.std(1)))
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


def group_norm():
    return nn.GroupNorm(2, C)


def batch_norm():
    return nn.BatchNorm2d(C)


# Ours, and what counts as much. What has no counterpart in torch counts as group norm, whose work it does.
PAIRS = {
    "GN": (lambda: layers.GroupNorm(C, 2), group_norm),
    "GN-relu": (lambda: layers.GroupNorm(C, 2, act="relu"), group_norm),
    "GN-no-affine": (lambda: layers.GroupNorm(C, 2, affine=False), lambda: nn.GroupNorm(2, C, affine=False)),
    "EvoNormS0": (lambda: layers.EvoNormS0(C, 2), group_norm),
    "EvoNormS0-no-affine": (lambda: layers.EvoNormS0(C, 2, affine=False), lambda: nn.GroupNorm(2, C, affine=False)),
    "EvoNormB0": (lambda: layers.EvoNormB0(C), group_norm),
    "FRN": (lambda: layers.FilterResponseNorm(C), group_norm),
    "FRN-learned-eps": (lambda: layers.FilterResponseNorm(C, learnable_eps=True), group_norm),
    "BNAct": (lambda: layers.BatchNormAct(C), batch_norm),
    "BNAct-silu": (lambda: layers.BatchNormAct(C, act="silu"), batch_norm),
    "SyncBN": (lambda: layers.SyncBatchNorm(C), batch_norm),
    "CBN": (lambda: layers.CrossIterationBatchNorm(C), batch_norm),
    "FrozenBatchNorm": (lambda: layers.FrozenBatchNorm(C, act="relu"), batch_norm),
    "ConvWS": (lambda: layers.WSConv2d(C, C, 3), lambda: StockConvWS2d(C, C, 3)),
}
each = pytest.mark.parametrize(("ours", "stock"), PAIRS.values(), ids=PAIRS)
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


def in_net(layer, dtype):
    return nn.Sequential(nn.Conv2d(C, C, 3), layer()).to(DEVICE, dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("analysis", [FlopAnalyzer, FlopCountAnalysis, ActivationAnalyzer, ActivationCountAnalysis])
@each
def test_counters_that_trace(ours, stock, analysis, dtype):
    x = torch.randn(2, C, 7, 6, device=DEVICE, dtype=dtype)
    counts, wanted = (analysis(in_net(layer, dtype), x) for layer in (ours, stock))
    assert counts.total() == wanted.total()
    assert counts.by_module()["1"] == wanted.by_module()["1"]
    assert ("Flop" not in analysis.__name__) or wanted.by_module()["1"] > 0


def test_a_handle_of_the_users_own_counts():
    analysis = FlopCountAnalysis(in_net(PAIRS["FRN"][0], torch.float32), torch.randn(2, C, 7, 6, device=DEVICE))
    analysis.set_op_handle("normplug::filter_response_norm", lambda inputs, outputs: 7)
    assert analysis.by_module()["1"] == 7


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each
def test_torchs_counter(ours, stock, dtype, training):
    """It counts convolutions and products of matrices, forward and backward."""

    def count(layer):
        net, x = in_net(layer, dtype).train(training), torch.randn(2, C, 7, 6, device=DEVICE, dtype=dtype)
        with FlopCounterMode(display=False) as forward:
            y = net(x.requires_grad_())
        with FlopCounterMode(display=False) as backward:
            y.float().sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    (forward, backward), wanted = count(ours), count(stock)
    if training and ours is PAIRS["CBN"][0]:  # which takes a gradient of the convolution's weight in forward, too
        forward -= wanted[0]
    assert (forward, backward) == wanted
