"""Rows of vectors by OpenAI's client, and MaxSim between a query and a page.

python samples/clients/openai_client.py http://localhost:8080 page.jpg "pension seminar"
"""

import base64
import sys

import numpy as np
from numpy.typing import NDArray
from openai import OpenAI


def rows(client: OpenAI, what: str) -> NDArray[np.float32]:
    """Vectors float32 [K, dim] of a text, or of a page as a data: URI."""
    made = client.embeddings.create(model="", input=what, extra_body={"return_multivector": True}).data[0]
    return np.array(made.embedding, np.float32).reshape(made.model_extra["shape"])


def main(url: str, page: str, query: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    with open(page, "rb") as file:
        uri = "data:image/jpeg;base64," + base64.b64encode(file.read()).decode()
    words, picture = rows(client, query), rows(client, uri)
    score = (words @ picture.T).max(axis=1).sum()
    print(f"query {words.shape}, page {picture.shape}, MaxSim {score:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
