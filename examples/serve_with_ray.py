"""Several replicas of the server behind one address, with Ray Serve; a conversation stays with its replica.

pip install ".[serve]" "ray[serve]"
python examples/serve_with_ray.py ./my-model --replicas 2 --port 8000

A client names its conversation in the header ``x-session-id``, and all requests of that name go to one replica, where
the cache of the conversation is.  With OpenAI's client: ``OpenAI(..., default_headers={"x-session-id": "a name"})``.
A request without the header goes to any replica; the answer is right, but the conversation may have to be read again.

If the environment names a cluster (``RAY_ADDRESS``), the replicas run there; otherwise on this machine.  The model, and
the store if there is one, must then have the same path on every machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from nexusquant_cache.evaluation import load_model
from nexusquant_cache.serving.command import ServerOptions, make_app

NAME = "nexusquant"
# The same name leads to the same replica; while that one has too much to do, the request waits for it.
STAYS = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    request_router_kwargs={"num_fallback_replicas": 0},
)
BESIDES = 8  # requests that a replica takes besides those which wait: the one being answered, /metrics, /health


def application(model: str | None, options: ServerOptions, replicas: int, cpus: float) -> serve.Application:
    """Return what Ray Serve runs: in each replica the model, and the server in front of it."""

    def build() -> Any:  # noqa: ANN401 - FastAPI
        return make_app(load_model(model), options)

    deployment = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=options.waiting + BESIDES,
        max_queued_requests=max(replicas * options.waiting, 1),  # more are answered with 503
        request_router_config=STAYS,
    )
    return deployment(serve.ingress(build)()).bind()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    default = ServerOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder, a GGUF file or a name on the model hub")
    parser.add_argument("--replicas", type=int, default=2, help="how many (%(default)s)")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs, and threads, of a replica (%(default)s)")
    parser.add_argument("--preset", default=default.preset, help="how far to compress (%(default)s)")
    parser.add_argument("--name", help="what clients call the model; by default the name of its folder or file")
    parser.add_argument("--host", default=default.host, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=default.port, help="port to listen on (%(default)s)")
    key = os.environ.get("NEXUSQUANT_API_KEY") or None
    parser.add_argument("--api-key", default=key, help="a secret that clients must send; by default all may ask")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="prefix store, one for all replicas")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Serve until interrupted or terminated."""
    given = parse(arguments)
    store = None if given.store is None else given.store.absolute()  # replicas have a working directory of their own
    model = given.model if given.model is None or not Path(given.model).exists() else str(Path(given.model).absolute())
    options = ServerOptions(host=given.host, preset=given.preset, name=given.name, api_key=given.api_key, store=store)
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": given.host, "port": given.port})
    serve.run(application(model, options, given.replicas, given.cpus), name=NAME)
    print(f"{given.replicas} replicas answer at http://{given.host}:{given.port}/v1", flush=True)
    is_over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: is_over.set())
    is_over.wait()
    serve.delete(NAME)  # replicas end the present answer, and put conversations into the store


if __name__ == "__main__":
    main()
