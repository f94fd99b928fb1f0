"""Embeds a page, and says on what; with --compare, how far two such results are from each other.

python embed_page.py BUNDLE PAGE OUT.npy
python embed_page.py --compare ONE.npy OTHER.npy LIMIT
"""

from __future__ import annotations

import platform
import sys

import numpy as np


def embed(bundle: str, page: str, out: str) -> None:
    from PIL import Image

    from cembed.runtime import Embedder, maxsim
    from cembed.runtime.scoring.kernels import kernel_sets

    embedder = Embedder.load(bundle)
    (vectors,) = embedder.embed_images([Image.open(page)])
    (score,) = maxsim(embedder.embed_queries(["warranty period"]), [vectors])[0]
    print(f"{platform.machine()}: vectors {vectors.shape}, score {score:.6f}, kernels {', '.join(kernel_sets())}")
    np.save(out, vectors)


def compare(one: str, other: str, limit: str) -> None:
    a, b = np.load(one), np.load(other)
    difference, cosine = float(np.abs(a - b).max()), float((a * b).sum(axis=1).min())
    print(f"largest difference of a component {difference:.1e}, at most {limit} is right; lowest cosine {cosine:.6f}")
    sys.exit(difference > float(limit))


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        compare(*sys.argv[2:])
    else:
        embed(*sys.argv[1:])
