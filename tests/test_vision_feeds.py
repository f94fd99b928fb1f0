"""The table of what the vision graph is fed."""

from __future__ import annotations

import numpy as np
import pytest

from cembed.runtime.bundle.contract import rows_of
from cembed.runtime.bundle.image_processing import ImageProcessing, Tiles
from cembed.runtime.bundle.manifest import Tensor
from cembed.runtime.embed.vision_feeds import FEEDS, vision_feeds

GREY = ((0.5,) * 3, (0.5,) * 3)
WINDOWED = ImageProcessing("smart", 14, 2, 784, 78400, 1.0, *GREY, window_size=56)
TILED = ImageProcessing("tiles", 16, 2, 1024, 10240, 1.0, *GREY, tiles=Tiles(32, 128, "", "", "", ""))


def test_there_is_a_row_for_every_input_that_a_bundle_may_declare() -> None:
    assert {row.name for row in rows_of("vision", "in")} == set(FEEDS)


def test_only_what_a_graph_declares_is_made() -> None:
    pixels = np.zeros((24, 588), np.float32)
    inputs = [Tensor(name, "int64", ()) for name in ("pixel_values", "window_index", "window_restore")]
    feeds = vision_feeds(inputs, pixels, (4, 6), WINDOWED)
    assert {name: feed.shape for name, feed in feeds.items()} == {
        "pixel_values": (1, 24, 588),
        "window_index": (2, 16),
        "window_restore": (24,),
    }
    places = feeds["window_index"].reshape(-1)
    assert np.array_equal(places[feeds["window_restore"]], np.arange(24))


@pytest.mark.parametrize(("spec", "patches", "shape"), [(WINDOWED, 24, (1, 24, 768)), (TILED, 12, (3, 4, 768))])
def test_tiles_are_images_of_their_own(spec: ImageProcessing, patches: int, shape: tuple[int, int, int]) -> None:
    pixels = np.arange(patches * 768, dtype=np.float32).reshape(patches, 768)
    feeds = vision_feeds([Tensor("pixel_values", "float32", ())], pixels, (4, 6), spec)
    assert np.array_equal(feeds["pixel_values"], pixels.reshape(shape))
