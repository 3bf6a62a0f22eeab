"""What knows mmengine, mmcv, mmdet and mmaction2 beyond the registry."""

__all__ = ["close_gaps", "register_hooks"]


def close_gaps() -> None:
    """Make the toolkits' last releases run on today's torch.

    Repairs: stand-ins for the compiled ``mmcv._ext`` and for mmaction2's missing ``drn``, what NumPy and SciPy have
    dropped, checkpoints that load with torch's safe unpickler, whose text is never run, and that are whole or not
    there, distributed training without an accelerator. Called by ``import normplug``; calling it again changes nothing.
    """
    from normplug.openmmlab import (
        _stand_ins,
        checkpoints,
        distributed,
        finders,
        inert,
        repairs,
        resuming,
        saving,
        sync_batch_norms,
        weight_checks,
    )

    _stand_ins.install()
    repairs.install()
    checkpoints.install()
    inert.install()
    saving.install()
    resuming.install()
    weight_checks.install()
    distributed.install()
    finders.install()
    sync_batch_norms.install()


def register_hooks() -> None:
    """Register hooks, backbones and a strategy: ``custom_imports=dict(imports=['normplug'])`` is all they need."""
    from normplug.openmmlab import (  # noqa: F401  importing them registers
        checkpoints,
        compile_kernels,
        feature_percentiles,
        parameter_groups,
        precise_bn,
        random_state,
        recompute,
        resnet_v2,
        sharding,
    )
