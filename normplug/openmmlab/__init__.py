"""What knows mmengine, mmcv, mmdet and mmaction2 beyond the registry."""

__all__ = ["close_gaps", "register_hooks"]


def close_gaps() -> None:
    """Make the toolkits' last releases run on today's torch.

    Four repairs: stand-ins for the compiled ``mmcv._ext`` and for mmaction2's missing ``drn``, checkpoints that
    load with torch's safe unpickler, distributed training without an accelerator. Each acts only where its gap
    exists and says so once in the log. Called by ``import normplug``; calling it again changes nothing.
    """
    from normplug.openmmlab import _stand_ins, checkpoints, distributed

    _stand_ins.install()
    checkpoints.install()
    distributed.install()


def register_hooks() -> None:
    """Register hooks, backbones and a strategy: ``custom_imports=dict(imports=['normplug'])`` is all they need."""
    from normplug.openmmlab import (  # noqa: F401  importing them registers
        checkpoints,
        feature_percentiles,
        precise_bn,
        random_state,
        recompute,
        resnet_v2,
        sharding,
    )
