"""What is measured: the inputs of the norm layers of Mask R-CNN R50-FPN and of I3D R50, and their filters.

Mask R-CNN sees 2 images of 800 x 1333, padded to 800 x 1344, 512 RoIs each in the box head and 64 positive ones in
the mask head; I3D sees 8 clips of 32 frames of 224 x 224. ``tests/test_bench.py`` compares with the models.
"""

from dataclasses import dataclass

__all__ = ["ROLES", "Shape", "select"]

# Blocks of the four stages of a ResNet-50.
BLOCKS = (3, 4, 6, 3)

# What follows the norm: nothing (FPN, shortcuts), an activation, or a residual sum and an activation. And filters.
ROLES = ("plain", "act", "add", "weights")


@dataclass(frozen=True)
class Shape:
    """Inputs of one call: the shape of x, or of all filters that are standardized together.

    Attributes:
        model: Where it comes from.
        place: Where it is in the model.
        role: What follows, see ``ROLES``.
        dims: The shape of x, or the shapes of all filters.
        quick: Whether it is one of the few that stand for all.
        layers: How many calls of the model have it.
    """

    model: str
    place: str
    role: str
    dims: tuple[tuple[int, ...], ...]
    quick: bool = False
    layers: int = 1

    def __str__(self) -> str:
        dims = "x".join(map(str, self.dims[0])) if len(self.dims) == 1 else f"{len(self.dims)} weights"
        return f"{self.model} {self.place} {dims}"


def _detector() -> list[Shape]:
    name = "Mask R-CNN"
    maps = [(200, 336), (100, 168), (50, 84), (25, 42)]
    shapes = [Shape(name, "stem", "act", ((2, 64, 400, 672),))]
    for stage, (size, width) in enumerate(zip(maps, (64, 128, 256, 512), strict=True), 1):
        place = f"stage {stage}"
        if stage > 1:  # the first block's first convolution, before the stride
            shapes.append(Shape(name, f"{place} in", "act", ((2, width, *maps[stage - 2]),)))
        blocks = BLOCKS[stage - 1]
        inside, quick = 2 * blocks - (stage > 1), stage in (1, 3)
        shapes.append(Shape(name, place, "act", ((2, width, *size),), quick, inside))
        shapes.append(Shape(name, place, "add", ((2, 4 * width, *size),), quick, blocks))
        shapes.append(Shape(name, f"{place} shortcut", "plain", ((2, 4 * width, *size),)))
    for level, size in enumerate(maps, 2):
        shapes.append(Shape(name, f"FPN P{level}", "plain", ((2, 256, *size),), level in (2, 4), layers=2))
    shapes.append(Shape(name, "box head", "act", ((1024, 256, 7, 7),), quick=True, layers=4))
    shapes.append(Shape(name, "mask head", "act", ((128, 256, 14, 14),), layers=4))
    return shapes


def _video() -> list[Shape]:
    name = "I3D"
    maps = [(8, 56, 56), (4, 28, 28), (4, 14, 14), (4, 7, 7)]
    before = [None, (4, 56, 56), (4, 28, 28), (4, 14, 14)]  # pool2 halves the time, stage 2 the rest
    shapes = [Shape(name, "stem", "act", ((8, 64, 16, 112, 112),))]
    for stage, (size, width) in enumerate(zip(maps, (64, 128, 256, 512), strict=True), 1):
        place = f"stage {stage}"
        if before[stage - 1]:
            shapes.append(Shape(name, f"{place} in", "act", ((8, width, *before[stage - 1]),)))
        blocks = BLOCKS[stage - 1]
        shapes.append(Shape(name, place, "act", ((8, width, *size),), stage == 1, 2 * blocks - (stage > 1)))
        shapes.append(Shape(name, place, "add", ((8, 4 * width, *size),), stage == 2, blocks))
        shapes.append(Shape(name, f"{place} shortcut", "plain", ((8, 4 * width, *size),)))
    return shapes


def _filters(video: bool) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the 53 filters of a ResNet-50, inflated as in I3D or not."""
    inflated = ((1, 1, 1), (1, 0, 1, 0), (1, 0, 1, 0, 1, 0), (0, 1, 0))
    flat, wide, stem = ((1, 1, 1), (1, 3, 3), (5, 7, 7)) if video else ((1, 1), (3, 3), (7, 7))
    filters: list[tuple[int, ...]] = [(64, 3, *stem)]
    inputs = 64
    for blocks, width in zip(inflated, (64, 128, 256, 512), strict=True):
        for i, over_time in enumerate(blocks):
            first = (3, 1, 1) if video and over_time else flat
            filters += [(width, inputs, *first), (width, width, *wide), (4 * width, width, *flat)]
            if i == 0:
                filters.append((4 * width, inputs, *flat))
            inputs = 4 * width
    return tuple(filters)


ALL = [
    *_detector(),
    *_video(),
    Shape("R50", "all filters", "weights", _filters(video=False), quick=True),
    Shape("I3D", "all filters", "weights", _filters(video=True)),
]

# No layer of a model: small enough for a CPU and for a test.
TINY = [
    *(Shape("tiny", "2-D", role, ((2, 64, 10, 14),)) for role in ROLES[:3]),
    *(Shape("tiny", "3-D", role, ((2, 64, 4, 7, 7),)) for role in ROLES[:3]),
    Shape("tiny", "filters", "weights", ((64, 3, 7, 7), (64, 64, 1, 1), (64, 64, 3, 3))),
]


def select(which: str, role: str) -> list[Shape]:
    """Return the shapes of a role: of 'all' layers, a 'quick' choice, or 'tiny' ones."""
    shapes = TINY if which == "tiny" else [s for s in ALL if which == "all" or s.quick]
    return [s for s in shapes if s.role == role]
