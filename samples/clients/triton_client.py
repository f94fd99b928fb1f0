"""A page's vectors as binary tensors, by Triton's client.

python samples/clients/triton_client.py http://localhost:8080 page.jpg MODEL
"""

import sys
from pathlib import Path

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput


def main(url: str, page: str, model: str) -> None:
    client = InferenceServerClient(url.removeprefix("http://"))
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    image = InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([Path(page).read_bytes()], object), binary_data=True)
    outputs = [InferRequestedOutput(name, binary_data=True) for name in ("vectors", "rows")]
    found = client.infer(model, [image], outputs=outputs)
    vectors = found.as_numpy("vectors")
    print(f"vectors {vectors.shape}, rows {found.as_numpy('rows').tolist()}, first {vectors[0, 0]:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
