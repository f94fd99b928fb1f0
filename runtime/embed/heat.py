"""Heat over a page: its hottest box, and the picture of both."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Heat = NDArray[np.float32]
Shares = tuple[float, float, float, float]

WARM = 0.7  # of the highest heat: what is as warm and connected to the hottest cell is outlined with it
COLOURS = ((255, 190, 0), (230, 10, 40))  # of faint heat and of the highest
OPACITY = 0.6
COLD = 0.04  # up to here nothing is drawn
LINE = 300  # the outline takes a pixel for so many of the page's shorter side


def hottest_box(heat: Heat) -> Shares:
    """x0, y0, x1, y1, in shares of the width and height of heat [rows, columns], around the hottest cell and what is
    warm beside it; all 0 where there is no heat.

    >>> hottest_box(np.array([[0, 0, 0, 0.9], [0, 0.8, 1, 0]], np.float32))
    (0.25, 0.5, 0.75, 1.0)
    """
    if not heat.any():
        return 0.0, 0.0, 0.0, 0.0
    rows, columns = (np.flatnonzero(hot) for hot in (warm_part(heat).any(axis=1), warm_part(heat).any(axis=0)))
    height, width = heat.shape
    left, top, right, bottom = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return float(left), float(top), float(right), float(bottom)


def warm_part(heat: Heat) -> NDArray[np.bool_]:
    """The hottest cell, and the warm ones that lead to it by their sides."""
    warm, part = heat >= WARM * heat.max(), np.zeros(heat.shape, bool)
    part.flat[heat.argmax()] = True
    while True:
        wider = part.copy()
        wider[1:] |= part[:-1]
        wider[:-1] |= part[1:]
        wider[:, 1:] |= part[:, :-1]
        wider[:, :-1] |= part[:, 1:]
        wider &= warm
        if np.array_equal(wider, part):
            return part
        part = wider


def draw_heat(page: Image.Image, heat: Heat, box: Shares) -> Image.Image:
    """An RGB page with heat [rows, columns] from 0 to 1 over it, and a box in shares of it outlined, unless empty."""
    warmth = smooth(heat, page.size)[:, :, None]
    faint, high = np.array(COLOURS, np.float32)
    cover = OPACITY * np.sqrt(np.maximum(warmth - COLD, 0) / (1 - COLD))
    pixels = (1 - cover) * np.asarray(page, np.float32) + cover * (faint + (high - faint) * warmth)
    picture = Image.fromarray(np.rint(pixels).astype(np.uint8))
    if box[2] > box[0]:
        outline(picture, box)
    return picture


def smooth(heat: Heat, size: tuple[int, int]) -> Heat:
    """Heat [rows, columns] as [height, width] of a size in pixels: cubic between the middles of cells."""
    wider = Image.fromarray(np.pad(heat, 1, mode="edge"))
    inner = 1.0, 1.0, heat.shape[1] + 1.0, heat.shape[0] + 1.0
    fine: Heat = np.asarray(wider.resize(size, Image.Resampling.BICUBIC, box=inner)).clip(0, 1)
    return fine


def outline(picture: Image.Image, box: Shares) -> None:
    """Draws a box in shares of the picture: a line of the colour of high heat in a white one."""
    line = max(2, min(picture.size) // LINE)
    corners = np.array(box) * np.array(picture.size * 2)
    most = np.array(picture.size * 2) - 1
    for wider, width, colour in ((2 * line, 3 * line, "white"), (line, line, COLOURS[1])):
        grown = np.clip(corners + wider * np.array([-1, -1, 1, 1]), 0, most)
        ImageDraw.Draw(picture).rounded_rectangle(tuple(grown.tolist()), 3 * line, outline=colour, width=width)
