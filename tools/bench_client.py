"""What the rollout client adds to SGLang's own time.

    python tools/bench_client.py --out docs/bench_client

One real server. In every round, in random order, the same requests go to it twice: as a bare load
(one HTTP POST a request, answers parsed as JSON and dropped, so many under way at once) and through
a session of the engine (records checked, log-probs and weight versions read, samples handed out).
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


def make_requests(vocab: int, arguments: argparse.Namespace) -> list[Any]:
    """Random prompts; a group of samples of each."""
    from megaopd.data.types import Prompt
    from megaopd.rollout.base import Request

    rng = random.Random(1)
    requests = []
    for number in range(arguments.requests // arguments.group):
        ids = tuple(rng.randrange(vocab - 1) for _ in range(arguments.prompt))
        prompt = Prompt(str(number), ids, "", None, "")
        requests += [Request(prompt, number, i) for i in range(arguments.group)]
    return requests


async def bare_load(url: str, bodies: list[dict[str, Any]], concurrency: int) -> int:
    """Tokens that came back."""
    import aiohttp

    room, tokens = asyncio.Semaphore(concurrency), 0

    async def one(session: Any, body: dict[str, Any]) -> None:
        nonlocal tokens
        async with room, session.post(f"{url}/generate", json=body) as answer:
            tokens += len((await answer.json())["output_ids"])

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session, body) for body in bodies))
    return tokens


def endless(model_dir: Path) -> None:
    """Take the end token out, so that every response has the same length."""
    (model_dir / "generation_config.json").unlink(missing_ok=True)
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))


def memory_mb() -> float:
    """Of this process, resident, in 10^6 bytes."""
    import psutil

    return psutil.Process().memory_info().rss / 1e6


class Bench:
    """One engine on one server, whose weights are the checkpoint's own."""

    def __init__(self, root: Path, arguments: argparse.Namespace) -> None:
        import transformers

        from megaopd.quickstart import make_checkpoint
        from megaopd.rollout.base import SamplingParams
        from megaopd.rollout.config import ServerConfig
        from megaopd.rollout.sglang import SGLangEngine

        model_dir = root / "student"
        make_checkpoint("teacher", model_dir, seed=1)
        endless(model_dir)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
        self.vocab = model.config.vocab_size
        self.arguments = arguments
        self.params = SamplingParams(arguments.tokens)
        self.engine = SGLangEngine(
            ServerConfig(
                concurrency=arguments.concurrency,
                cores=arguments.server_cores,
                max_tokens=20000,
                verify="off",
            ),
            model_dir,
            eos_ids=[],
            dtype="float32",
            device="cpu",
            run_dir=root,
            rank=0,
            world_size=1,
        )
        names = [n for n, _ in model.named_parameters()]
        state = model.state_dict()
        self.engine.update_weights([(n, state[n]) for n in names], 0)
        tier: Any = self.engine._here()
        self.limits = tier.dispatcher.limits
        self.url = tier.fleet.servers[0].url
        self.requests = make_requests(self.vocab, arguments)

    def bodies(self) -> list[dict[str, Any]]:
        """What the engine itself would send."""
        from megaopd.rollout.records import Draft, generate_body

        return [
            generate_body(
                request,
                self.params,
                Draft(),
                rid=f"bare-{random.getrandbits(60):015x}",
                ends=frozenset(),
                limits=self.limits,
            )
            for request in self.requests
        ]

    def bare(self) -> float:
        bodies = self.bodies()
        begun = time.perf_counter()
        tokens = asyncio.run(bare_load(self.url, bodies, self.arguments.concurrency))
        assert tokens == len(self.requests) * self.params.max_new_tokens
        return time.perf_counter() - begun

    def client(self) -> float:
        begun = time.perf_counter()
        samples = self.engine.generate(self.requests, self.params)
        seconds = time.perf_counter() - begun
        assert sum(len(s.response_ids) for s in samples) == (
            len(self.requests) * self.params.max_new_tokens
        )
        return seconds

    def memory(self, total: int) -> list[float]:
        """MB after every tenth of `total` samples that are handed out and dropped."""
        session = self.engine.session()
        readings = []
        for _ in range(10):
            for i in range(total // 10):
                session.submit(self.requests[i % len(self.requests)], self.short)
            while session.pending:
                session.wait()
            readings.append(memory_mb())
        session.close()
        return readings

    @property
    def short(self) -> Any:
        from dataclasses import replace

        return replace(self.params, max_new_tokens=8)


def describe(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    """The markdown page."""
    command = ("python tools/bench_client.py " + " ".join(sys.argv[1:])).strip()
    low, high = result["interval"]
    return f"""# The rollout client, measured

    {command}

{arguments.requests} requests of {arguments.prompt} + {arguments.tokens} tokens,
{arguments.concurrency} at once, {arguments.rounds} rounds; the client on one core, the server on
another.

| | seconds (median) |
|---|---|
| bare HTTP load | {result["bare_s"]:.3f} |
| engine | {result["client_s"]:.3f} |

Engine / bare, by round: median {result["ratio"]:.3f}, 95% interval [{low:.3f}, {high:.3f}];
{result["tokens_per_s"]:,.0f} tokens/s.

Resident memory of the client after every tenth of {arguments.samples:,} samples (MB):
{", ".join(f"{mb:.0f}" for mb in result["memory_mb"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256, help="of one measurement")
    parser.add_argument("--group", type=int, default=4, help="samples a prompt")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=10_000, help="of the memory measurement")
    parser.add_argument("--server-cores", default="1")
    parser.add_argument("--client-core", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench_client"))
    arguments = parser.parse_args()
    from bench.measure import Pairs, bootstrap_median, pin

    from megaopd.report.progress import progress

    rng, found = random.Random(0), {"bare": [], "client": []}
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root), arguments)
        pin(arguments.client_core)  # the server has its own core, and has been started
        with bench.engine:
            bench.bare(), bench.client()  # the server's first requests are slow
            with progress("rounds", arguments.rounds) as advance:
                for _ in range(arguments.rounds):
                    for name in rng.sample(["bare", "client"], 2):
                        found[name].append(getattr(bench, name)())
                    advance(1)
            readings = bench.memory(arguments.samples)
    ratio = bootstrap_median(Pairs(found["client"], found["bare"]).ratios())
    tokens = arguments.requests * arguments.tokens
    result = {
        "concurrency": arguments.concurrency,
        "bare_s": statistics.median(found["bare"]),
        "client_s": statistics.median(found["client"]),
        "ratio": ratio.median,
        "interval": [ratio.low, ratio.high],
        "tokens_per_s": tokens / statistics.median(found["client"]),
        "memory_mb": readings,
    }
    page = describe(arguments, result)
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    arguments.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
