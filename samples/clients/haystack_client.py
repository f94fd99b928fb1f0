"""One vector of a text by Haystack, from a bundle that pools.

python samples/clients/haystack_client.py http://localhost:8080 "pension seminar"
"""

import sys

from haystack.components.embedders import OpenAITextEmbedder
from haystack.utils import Secret


def main(url: str, query: str) -> None:
    embedder = OpenAITextEmbedder(api_base_url=f"{url}/v1", api_key=Secret.from_token("none"), model="")
    vector = embedder.run(query)["embedding"]
    print(f"dim {len(vector)}, first {vector[0]:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
