"""Vespa: lines of its document JSON, with a page's vectors as one mixed tensor, for `vespa feed`; and a schema."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

from cembed.runtime.errors import CembedError
from cembed.scale.connectors.json_files import JsonTarget
from cembed.scale.connectors.points import Point
from cembed.scale.connectors.sources import Survey

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SCHEMA = """\
# Made by cembed {cell_note}; `vespa feed {name}-*.jsonl`. A query is input.query(qt), {{vector number: [numbers]}}.
schema {name} {{
    document {name} {{
        field page_id type string {{ indexing: summary | attribute }}
        field path type string {{ indexing: summary | attribute }}
        field page type int {{ indexing: summary | attribute }}
        field sha256 type string {{ indexing: summary | attribute }}
        field content type string {{ indexing: summary | attribute }}
        field version type string {{ indexing: summary | attribute }}
        field bundle type string {{ indexing: summary | attribute }}
        field warning type string {{ indexing: summary }}
        field folder type string {{ indexing: summary }}
        field metadata type string {{ indexing: summary }}
        field embedding type tensor<{cell}>(patch{{}}, v[{dim}]) {{ indexing: attribute }}
    }}
    rank-profile maxsim {{
        inputs {{
            query(qt) tensor<float>(querytoken{{}}, v[{dim}])
        }}
        first-phase {{
            expression: sum(reduce(sum(query(qt) * attribute(embedding), v), max, patch), querytoken)
        }}
    }}
}}
"""


class Connector(JsonTarget):
    """A folder of feed files for Vespa. Metadata are JSON in a string."""

    engine, target = "Vespa", "vespa-json"
    cells: ClassVar = {32: "float", 16: "float", 8: "int8"}

    def check(self, survey: Survey) -> None:
        if not NAME.fullmatch(self.place.collection):
            raise CembedError(
                f"Vespa has no schema called {self.place.collection!r}: letters, digits and _ are possible"
            )

    def schema_file(self) -> tuple[str, str]:
        name, cell = self.place.collection, self.cell
        note = f"for {self.schema.storage}" + (", components times 127" if self.storage.has_scale else "")
        return f"{name}.sd", SCHEMA.format(name=name, cell=cell, dim=self.schema.dim, cell_note=note)

    def lines(self, point: Point) -> list[str]:
        fields: dict[str, Any] = {**point.known, "metadata": json.dumps(point.fields["metadata"])}
        put = json.dumps(f"id:{self.place.collection}:{self.place.collection}::{point.id}")
        blocks = ",".join(f'"{number}":{array}' for number, array in enumerate(self.arrays(point.vectors)))
        told = json.dumps(fields, separators=(",", ":"))[:-1]
        return [f'{{"put":{put},"fields":{told},"embedding":{{"blocks":{{{blocks}}}}}}}}}']
