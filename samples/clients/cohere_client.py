"""Pages ranked for a query by Cohere's client.

python samples/clients/cohere_client.py http://localhost:8080 "pension seminar" page.jpg other.jpg
"""

import base64
import sys
from pathlib import Path

import cohere


def main(url: str, query: str, *pages: str) -> None:
    client = cohere.ClientV2(api_key="none", base_url=url)
    documents = ["data:image/jpeg;base64," + base64.b64encode(Path(page).read_bytes()).decode() for page in pages]
    found = client.rerank(model="", query=query, documents=documents)
    for result in found.results:
        print(f"{pages[result.index]} {result.relevance_score:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
