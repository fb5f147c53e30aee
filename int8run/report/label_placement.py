"""Where the labels of a plot go: beside their points, clear of dots, lines and each other if there is room.

Plain geometry in pixels, y pointing up; `plots` measures the labels and writes them.
"""

from collections.abc import Sequence
from itertools import pairwise

Box = tuple[float, float, float, float]  # left, bottom, right, top
Position = tuple[float, float]

LABEL_DISTANCES = (9, 16, 26, 38, 52, 70, 90)  # px between a point and its label
LABEL_DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
DOT_RADIUS = 6  # px that labels keep clear
LINE_ROOM = 2  # px on both sides of a line


def place_labels(
    spots: Sequence[Position], sizes: Sequence[Position], frame: Box, taken: Sequence[Box] = ()
) -> list[Box]:
    """A box for each label: inside the frame, near its point, clear of points and other labels if possible.

    The first labels choose first.

    Args:
        spots: of the points.
        sizes: width and height of each label.
        frame: where labels may be.
        taken: further boxes to keep clear of.
    """
    dots = [surround_dot(spot) for spot in spots]
    placed: list[Box] = []
    for spot, size in zip(spots, sizes, strict=True):
        obstacles = [*placed, *dots, *taken]
        boxes = list_label_boxes(spot, size, frame)
        overlaps = [sum_overlaps(box, obstacles) for box in boxes]
        # the first of the clearest: they come in the order of preference
        placed.append(boxes[overlaps.index(min(overlaps))])
    return placed


def surround_dot(spot: Position) -> Box:
    """The box around a point that labels keep clear of."""
    x, y = spot
    return x - DOT_RADIUS, y - DOT_RADIUS, x + DOT_RADIUS, y + DOT_RADIUS


def list_label_boxes(spot: Position, size: Position, frame: Box) -> list[Box]:
    """Where a label may go: around its point, the nearest places first, each moved into the frame."""
    x, y = spot
    width, height = min(size[0], frame[2] - frame[0]), size[1]
    boxes = []
    for distance in LABEL_DISTANCES:
        for dx, dy in LABEL_DIRECTIONS:
            left = x + dx * distance + align(dx, width)
            bottom = y + dy * distance + align(dy, height)
            left = min(max(left, frame[0]), frame[2] - width)
            bottom = min(max(bottom, frame[1]), frame[3] - height)
            boxes.append((left, bottom, left + width, bottom + height))
    return boxes


def align(direction: int, length: float) -> float:
    """Offset of a label's lower edge on one axis, so that it begins, is centered or ends beside its point."""
    if direction < 0:
        return -length
    if direction > 0:
        return 0.0
    return -length / 2


def sum_overlaps(box: Box, obstacles: Sequence[Box]) -> float:
    """The area that a box shares with others."""
    return sum(compute_overlap(box, obstacle) for obstacle in obstacles)


def compute_overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def surround_step_line(corners: Sequence[Position]) -> list[Box]:
    """Narrow boxes around the parts of a step line: across, then down."""
    across: list[Box] = []
    down: list[Box] = []
    for (x, y), (next_x, next_y) in pairwise(corners):
        # the line goes across at the height of the next corner, and down at the x of this one
        across.append((min(x, next_x), next_y - LINE_ROOM, max(x, next_x), next_y + LINE_ROOM))
        down.append((x - LINE_ROOM, min(y, next_y), x + LINE_ROOM, max(y, next_y)))
    return [*across, *down]
