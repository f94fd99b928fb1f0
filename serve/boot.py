"""How a worker of the server begins: it gives up what it will not need, before it loads anything that has threads."""

from __future__ import annotations

import json
import sys

from cembed.serve.confinement import confine_embedding, give_up_little, readable


def main() -> None:
    told = json.loads(sys.argv[1])
    give_up_little(told["max_memory"])
    if told["confined"]:
        confine_embedding(readable(told["bundle"], told["trusted"], *told["reads"]))
    from cembed.serve import worker

    worker.main()
