"""What runs around transformers: DeepSpeed's inference, bitsandbytes' weights, the server's replicas on a Ray cluster.

Skipped where they are not installed; ``nox -s engines`` installs them.
"""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from integration import tensor_parallel
from integration.tiny import balanced, generate, lossless_cache, prompt, tiny_llama
from transformers import DynamicCache, LlamaForCausalLM
from unit.serving_tiny import ascii_tiny

pytestmark = [
    pytest.mark.slow,
    # accelerate imports DeepSpeed where it is installed; releases before 0.19.8 script a function.
    pytest.mark.filterwarnings("ignore:.torch.jit.script"),
]

TESTS = Path(__file__).parents[1]
PATIENCE = 600  # seconds; DeepSpeed compiles when it first runs in two processes


def needs(package: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(is_missing, reason=f"{package} is not installed: nox -s engines")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment() -> dict[str, str]:
    """Let a process find the modules of the tests."""
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


# DeepSpeed


def converse_with_deepspeed(processes: int, folder: Path) -> list[dict[str, Any]]:
    """Let `deepspeed_parallel.py` converse, in that many processes; return what each saved."""
    tiny_llama(**tensor_parallel.OPTIONS).save_pretrained(folder)
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes)]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    script = [str(TESTS / "integration" / "deepspeed_parallel.py"), str(folder), str(folder)]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    # DeepSpeed compiles with ninja, which is installed beside Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    given = environment() | {"DS_ACCELERATOR": "cpu", "PATH": path}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=PATIENCE, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


def in_transformers(name: str) -> dict[str, Any]:
    model = tiny_llama(**tensor_parallel.OPTIONS)
    return tensor_parallel.converse(model, tensor_parallel.CACHES[name](model))


@needs("deepspeed")
def test_deepspeed_in_one_process_is_transformers(tmp_path: Path) -> None:
    """The same tokens in two turns, the same tokens kept, and the same codes, with every preset and policy."""
    (engine,) = converse_with_deepspeed(1, tmp_path)
    for name in tensor_parallel.CACHES:
        alone = in_transformers(name)
        assert torch.equal(engine[name]["text"], alone["text"])
        for what in ("positions", "kept", "codes"):
            assert all(map(torch.equal, engine[name][what], alone[what])), (name, what)
        assert int(alone["kept"][0].max()) < 4 * alone["text"].shape[1]  # of four heads


@needs("deepspeed")
def test_deepspeed_in_two_processes_with_half_the_heads_each_is_one(tmp_path: Path) -> None:
    """AutoTP: ranks agree on the tokens, and each keeps what one process keeps of its heads."""
    ranks = converse_with_deepspeed(2, tmp_path)
    for name in tensor_parallel.CACHES:
        assert torch.equal(*(rank[name]["text"] for rank in ranks)), name
    for name in ("balanced", "lossless"):
        alone, here = in_transformers(name), [rank[name] for rank in ranks]
        assert torch.equal(here[0]["text"], alone["text"])
        for index in range(2):
            positions = torch.cat([rank["positions"][index] for rank in here], 1)
            assert torch.equal(positions, alone["positions"][index])
            codes = torch.cat([rank["codes"][index] for rank in here], 1)
            assert torch.equal(codes, alone["codes"][index])


# bitsandbytes


@needs("bitsandbytes")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_weights_of_bitsandbytes(tmp_path: Path, options: dict[str, Any]) -> None:
    """Keys and values come in the dtype of activations, whatever weights are stored in."""
    from transformers import BitsAndBytesConfig  # noqa: PLC0415 - it needs bitsandbytes

    tiny_llama(hidden_size=128).save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **options)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantized, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    assert not model.model.layers[0].self_attn.k_proj.weight.is_floating_point()
    plain = generate(model, prompt(60), DynamicCache())
    assert torch.equal(generate(model, prompt(60), lossless_cache(model.config)), plain)
    cache = balanced(model)
    generate(model, prompt(60), cache)
    assert cache.layers[0].state.kept < cache.get_seq_length() == 71
    assert {x.dtype for x in cache.layers[0].state.tail} == {torch.bfloat16}


# Ray Serve


class Cluster:
    """`examples/serve_with_ray.py` in a process of its own, with a home of its own."""

    def __init__(self, model: Path, home: Path, *options: str) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", home / "log"
        script = str(TESTS.parent / "examples" / "serve_with_ray.py")
        command = [sys.executable, script, str(model), "--name=tiny", f"--port={port}", *options]
        given = environment() | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}  # Ray puts a key there
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=given, stdout=log, stderr=log)  # noqa: S603 - our own
        self.wait_for(lambda: "replicas answer at" in self.log.read_text())
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        return found

    def ask(self, messages: list[dict[str, str]], session: str, **options: Any) -> Any:
        settings = {"model": "tiny", "temperature": 0, "max_tokens": 16} | options
        return self.client.chat.completions.create(
            messages=messages, extra_headers={"x-session-id": session}, **settings
        )

    def metric(self, session: str, name: str) -> float:
        """Return a metric of the replica that a conversation goes to; 0 if it has never been counted."""
        text = httpx.get(f"{self.url}/metrics", headers={"x-session-id": session}, timeout=PATIENCE).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(PATIENCE) == 0, self.log.read_text()
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    ascii_tiny().model.save_pretrained(folder)
    ascii_tiny().tokenizer.save_pretrained(folder)
    return folder


ASKED = 'nexusquant_tokens_total{kind="prompt"}'


def known(answer: Any) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


def beginning(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Text {number}. " + "This is a sentence of some length. " * 20}]


@needs("ray")
def test_conversations_stay_with_their_replica(model_folder: Path, tmp_path: Path) -> None:
    """Every later turn finds its cache; under another name it does not; and the store has all when the cluster ends."""
    cluster = Cluster(model_folder, tmp_path, "--replicas=2", "--cpus=0.5", f"--store={tmp_path / 'store'}")
    try:
        first = "name 0"
        cluster.ask(beginning(8), first)
        names = [f"name {i}" for i in range(1, 25)]  # that all go to one replica is unlikely: 1 in 16 million
        sessions = [first, cluster.wait_for(lambda: next((x for x in names if not cluster.metric(x, ASKED)), None))]
        conversations = {name: beginning(i) for i, name in enumerate([*sessions, "another"])}
        read = dict.fromkeys(conversations, 0)
        for _ in range(3):
            for name, messages in conversations.items():
                answer = cluster.ask(messages, name)
                assert known(answer) == read[name]
                read[name] = answer.usage.total_tokens - 1  # the last token has not been read
                messages.append({"role": "assistant", "content": answer.choices[0].message.content})
                messages.append({"role": "user", "content": "Go on."})
        assert all(cluster.metric(name, ASKED) > 0 for name in sessions)
        assert known(cluster.ask(conversations[sessions[0]], sessions[1])) == 0  # where it is not known
        # A client that goes away ends its answer there, too.
        stream = cluster.ask(beginning(9), sessions[0], stream=True, max_tokens=3000)
        next(iter(stream))
        stream.close()
        cluster.wait_for(lambda: cluster.metric(sessions[0], 'nexusquant_answers_total{ended="left"}'))
    finally:
        cluster.stop()
    again = Cluster(model_folder, tmp_path, "--replicas=1", f"--store={tmp_path / 'store'}")
    try:
        for name, messages in conversations.items():
            assert known(again.ask(messages, f"not {name}")) == read[name]
    finally:
        again.stop()
