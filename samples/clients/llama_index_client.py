"""One vector of a text by LlamaIndex, from a bundle that pools.

python samples/clients/llama_index_client.py http://localhost:8080 "pension seminar"
"""

import sys

from llama_index.embeddings.openai import OpenAIEmbedding


def main(url: str, query: str) -> None:
    model = OpenAIEmbedding(model_name="", api_base=f"{url}/v1", api_key="none")
    vector = model.get_query_embedding(query)
    print(f"dim {len(vector)}, first {vector[0]:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
