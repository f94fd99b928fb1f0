"""More pages than one machine embeds or one file holds: rows in Arrow, parts that go on, clusters, databases.

    paths ──> documents ──> pages ──> PageEmbedder (a process of a cluster) ──> rows ──> parts ──> index, database

Nothing here is imported by the runtime, and every engine is an extra of its own.
"""

SUFFIXES = (".parquet", ".lance")
"""Of folders of parts."""
