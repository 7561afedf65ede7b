"""LitServe: FastAPI on uvicorn before two inference workers, bodies as raw bytes; as many API servers as workers, its default.

`fast_queue=True`, its ZeroMQ queue, was tried: with small calls on two cores it was the slower one (3.0 ms a call to 1.5
ms, 430 calls/s to 510 at 64 outstanding), so the queue is the default one.
Its annotations must be types, not their names: FastAPI reads them, and would look the names up elsewhere.
"""

import sys
from functools import partial
from typing import Annotated, Any

import litserve
from fastapi import Body, Response

from bench.peers.http_client import BYTES, serving
from bench.peers.load import BATCH, BATCH_NOOP, BATCH_WAIT_S, REPLICAS, run, size_told

NAME = "bench.peers.litserve_http"

Raw = Annotated[bytes, Body(media_type=BYTES)]


class Echo(litserve.LitAPI):
    def setup(self, device: str) -> None:
        pass

    def decode_request(self, request: Raw) -> Any:
        return request

    def predict(self, body: Any) -> Any:
        return body

    def encode_response(self, output: Any) -> Response:
        return Response(output, media_type=BYTES)


class Batch(Echo):
    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, body: list[Any]) -> list[bytes]:
        return [size_told(len(body))] * len(body)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output


def serve(kind: str, port: str) -> None:
    if kind == BATCH_NOOP:
        api = Batch(api_path=f"/{kind}", max_batch_size=BATCH, batch_timeout=BATCH_WAIT_S)
    else:
        api = Echo(api_path=f"/{kind}")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=REPLICAS, fast_queue=False)
    server.run(host="127.0.0.1", port=int(port), log_level="error", access_log=False, generate_client_file=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    else:
        run(partial(serving, NAME), "litserve", "fastapi", "uvicorn", "httptools", "uvloop")
