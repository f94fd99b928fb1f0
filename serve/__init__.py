"""`cembed serve`: one bundle and one index over HTTP, and a page in the browser.

    client ──> guard ──> routes ──> Service ──> Pool ──frames──> worker processes (Embedder, decoding process)
                                       └──────> Shelf (index, pictures of its pages)

The process that speaks HTTP loads no engine and decodes no picture.
"""
