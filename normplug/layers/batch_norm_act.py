"""BatchNormAct: batch normalization that can do the sum and the activation behind it in its own pass."""

from torch.nn.modules.batchnorm import _BatchNorm

from normplug.layers._batch_statistics import LocalBatchNorm

__all__ = ["BatchNormAct"]


class BatchNormAct(LocalBatchNorm, _BatchNorm):
    """Batch normalization by the statistics of one process, optionally followed by an activation.

    y = act(weight * (x - mean) / sqrt(var + eps) + bias), with mean and population variance of the batch in
    training and the running ones in evaluation: ``nn.BatchNorm2d`` with its arguments and its state dict, for any
    number of spatial axes, whose activation costs no further pass over memory.

    Args:
        num_features: Number of channels C.
        eps: Added to the population variance, inside the root.
        momentum: Weight of this batch in the running statistics; None for the mean over all batches.
        affine: Learn weight and bias per channel.
        track_running_stats: Keep running statistics (the unbiased variance) for evaluation.
        bias: With affine, learn the bias.
        act: Activation applied in the same op: 'relu', 'leaky_relu', 'silu', 'gelu' or None. It is lost if the
            layer is folded into a convolution (mmcv's ``fuse_conv_bn``): leave it None where that is wanted.
        skip_nonfinite: Leave the running statistics as they are where a batch would make one of them NaN or infinite,
            which nothing could undo. The output is that of the batch all the same.

    Shape:
        - Input: (N, C, *), any number of spatial axes; N = 0 is fine.
        - Output: shape, dtype and memory format of the input.

    Raises:
        ValueError: If the activation is unknown, axis 1 of the input is not C long, or a batch has a single value
            per channel in training.

    Reference:
        S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift", ICML 2015, arXiv 1502.03167, algorithms 1 and 2.
    """

    _name_ = "BNAct"
