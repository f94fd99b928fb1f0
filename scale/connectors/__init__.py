"""Rows go into a database that people have, and come back: an index or a folder of parts is read, an engine is filled.

    source (index, parts) ──> points ──> batches ──> target (Qdrant, LanceDB, PostgreSQL, files) ──> queried back

A target is a module of this package and a row of TARGETS. Nothing heavy is imported here.
"""

TARGETS = {
    "parquet": "parquet",
    "lance": "lance",
    "qdrant": "qdrant",
    "pgvector": "pgvector",
    "vespa-json": "vespa",
    "elastic-json": "elastic",
}
"""Names of targets, and their modules; each has a class `Connector`, a `Target`."""
