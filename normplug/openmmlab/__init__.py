"""What knows mmengine, mmcv, mmdet and mmaction2 beyond the registry."""


def close_gaps() -> None:
    """Make the toolkits' last releases run on today's torch."""
