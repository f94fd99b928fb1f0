"""One vector of a text by LangChain, from a bundle that pools.

python samples/clients/langchain_client.py http://localhost:8080 "pension seminar"
"""

import sys

from langchain_openai import OpenAIEmbeddings


def main(url: str, query: str) -> None:
    # Without check_embedding_ctx_length=False it would send the tokens of another model.
    embeddings = OpenAIEmbeddings(base_url=f"{url}/v1", api_key="none", model="", check_embedding_ctx_length=False)
    vector = embeddings.embed_query(query)
    print(f"dim {len(vector)}, first {vector[0]:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
