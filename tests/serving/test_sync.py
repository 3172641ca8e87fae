"""Weights from a sharded student reach real SGLang servers, verified; or a sync says why not.

The tests run in order: each takes the two servers as the one before has left them.
"""

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers

from megaopd.errors import UserError
from megaopd.rollout import group
from megaopd.rollout.base import Probe
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.encode import pickled, post_pickles
from megaopd.rollout.loop import LoopThread
from megaopd.rollout.server import Fleet
from megaopd.rollout.sync import WeightSync
from megaopd.rollout.verify import score, verify_log_probs
from tests.dist.models import save_tiny
from tests.serving.syncing import (
    METHODS,
    NOISE,
    SMALL,
    TEXT,
    base,
    fleet,
    holds,
    log_probs,
    loop,
    make_sync,
    model,
    named,
    root,
    sums,
    weights_of,
)

__all__ = ["base", "fleet", "loop", "make_sync", "root"]  # fixtures


@pytest.fixture(scope="module")
def students(root):
    """Checkpoints of one architecture and other weights."""
    return [save_tiny(root / f"{seed}", "qwen3", tied=False, seed=seed) for seed in (11, 12, 13)]


def push_from_ranks(path, base, addresses, method, work_dir, probe):
    """TP2 x PP2: rank 0 attaches to servers and pushes; (report, tags, states, leftovers)."""
    import torch.distributed as dist

    from megaopd.models.weights import WeightStream
    from tests.dist.test_weight_stream import student

    weights = WeightStream(*student(path, 2, 2), only_rank_0=True)
    if dist.get_rank():
        return sum(1 for _ in weights)
    loop = LoopThread()
    config = ServerConfig(addresses=tuple(addresses), sync=method, bucket_mb=SMALL)
    fleet = Fleet(config, Path(base), device="cpu", dtype="float32", log_dir=Path(work_dir))
    loop.run(fleet.start())
    sync = WeightSync(
        config,
        model_dir=Path(base),
        work_dir=Path(work_dir),
        nonce=method,
        run=loop.run,
        device="cpu",
        dtype="float32",
    )
    report = sync.push(fleet.servers, weights, 4, probe=probe)
    states = [(server.state, server.version) for server in fleet.servers]
    again = [sync.check(server) for server in fleet.servers]
    sync.close()
    loop.run(fleet.stop())
    loop.close()
    return report, states, again, sorted(p.name for p in Path(work_dir).glob("*"))


@pytest.mark.parametrize("verify", ["probe", "checksum"])
@pytest.mark.parametrize("method", METHODS)
def test_from_tensor_and_pipeline_shards(
    ranks, loop, fleet, base, students, tmp_path, method, verify
):
    """Three methods; against transformers, and by both ways to verify."""
    path = students[METHODS.index(method)]
    reference = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    probe = Probe(TEXT, tuple(log_probs(reference))) if verify == "probe" else None
    urls = [server.url for server in fleet.servers]
    (report, states, again, left), *others = ranks.run(
        push_from_ranks, 4, str(path), str(base), urls, method, str(tmp_path), probe, timeout=240
    )
    assert others == [0, 0, 0]
    assert report.failed == {}
    assert states == [("serving", 4)] * 2
    assert again == ["", ""]
    assert left == []
    state = reference.state_dict()
    assert report.tensors == len(state)
    assert report.bytes == sum(t.nbytes for t in state.values()) == report.metrics()["sync/bytes"]
    assert {"pause", "transfer", "verify", "resume", "total"} <= report.seconds.keys()
    if probe is not None:
        assert report.gap < NOISE
    for server in fleet.servers:
        assert holds(loop, server, reference) < NOISE
        assert named(loop, server) == f"{method}-4"


def load_by_hand(loop, server, weights):
    """Something that changes a server's weights behind the sync's back."""

    async def load():
        client = server.client
        await client.control("/begin_weight_update")
        await post_pickles(
            client,
            "/update_weights_from_tensor",
            {"load_format": None, "flush_cache": True},
            "serialized_named_tensors",
            [pickled(weights)],
            timeout=60.0,
        )
        await client.control("/end_weight_update")

    loop.run(load())


def test_one_changed_bit_is_found(loop, fleet, make_sync):
    sync, new = make_sync("tensor"), model(21)
    assert sync.push(fleet.servers, weights_of(new), 5).failed == {}
    assert [sync.check(server) for server in fleet.servers] == ["", ""]
    name = "model.layers.2.self_attn.k_proj.weight"
    wrong = new.state_dict()[name].clone()
    wrong.view(torch.int32)[17, 3] ^= 1
    load_by_hand(loop, fleet.servers[0], [(name, wrong)])
    why = sync.check(fleet.servers[0])
    assert "1 differ (such as model.layers.2.self_attn.qkv_proj.weight)" in why
    assert sync.check(fleet.servers[1]) == ""


def test_a_wrong_tensor_shows_in_the_probe(loop, fleet, make_sync):
    sync, new = make_sync("tensor"), model(22)
    probe = Probe(TEXT, tuple(log_probs(new)))
    assert sync.push(fleet.servers, weights_of(new), 6, probe=probe).failed == {}
    assert not sync.checksums  # it was the probe alone
    server, name = fleet.servers[0], "model.layers.3.mlp.down_proj.weight"
    load_by_hand(loop, server, [(name, new.state_dict()[name] * 1.5)])
    assert "log-probs of the probe differ by" in sync.check(server)
    gap = loop.run(verify_log_probs(server, probe, 1e-3))
    assert gap.why and gap.worst >= gap.mean > 1e-3


def test_a_wrong_architecture_is_found_though_the_server_says_success(
    loop, fleet, make_sync, tmp_path
):
    sync = make_sync("disk")
    assert sync.push(fleet.servers, weights_of(model(23)), 7).failed == {}
    short = save_tiny(tmp_path, "qwen3", tied=False, num_hidden_layers=3)
    server = fleet.servers[0]
    answer = loop.run(
        server.client.control("/update_weights_from_disk", {"model_path": str(short)})
    )
    assert answer["success"] is True
    why = sync.check(server)
    assert "differ" in why
    print(why)


def test_a_push_with_a_probe_that_does_not_agree_fails(loop, fleet, make_sync):
    """As where a server computes something else than the trainer, with the same weights."""
    sync = make_sync("tensor")
    probe = Probe(TEXT, tuple(log_probs(model(99))))
    report = sync.push(fleet.servers, weights_of(model(24)), 8, probe=probe)
    assert report.failed.keys() == {"server 0", "server 1"}
    assert all("log-probs of the probe differ" in why for why in report.failed.values())
    for server in fleet.servers:
        assert (server.state, server.version) == ("unsynced", -1)
        assert named(loop, server) == f"{sync.tag(8)}-unfinished"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda good: good[:-1], "missing: .*lm_head.weight"),
        (lambda good: [("extra", torch.zeros(1)), *good], "no such"),
        (lambda good: [*good[:-1], (good[-1][0], torch.zeros(2, 2))], r"expected: \(101, 64\)"),
        (lambda good: [*good, good[0]], "twice"),
    ],
)
def test_weights_that_do_not_fit_leave_the_servers_alone(
    loop, fleet, make_sync, method, spoil, said
):
    sync, old = make_sync(method), model(25)
    assert sync.push(fleet.servers, weights_of(old), 9).failed == {}
    before = [sums(loop, server) for server in fleet.servers]
    with pytest.raises(UserError, match=said):
        sync.push(fleet.servers, spoil(weights_of(model(26))), 10)
    assert [sums(loop, server) for server in fleet.servers] == before
    for server in fleet.servers:
        assert (server.state, server.version) == ("serving", 9)
        assert named(loop, server) == sync.tag(9)
        assert holds(loop, server, old) < NOISE  # it is not paused


def test_a_stream_that_turns_out_wrong_half_way(loop, fleet, make_sync):
    """A generator cannot be checked ahead: what was sent by then cannot be taken back."""
    sync, taken = make_sync("tensor"), []

    def stream():
        for name, tensor in weights_of(model(27))[:-1]:
            taken.append(name)
            yield name, tensor

    with pytest.raises(UserError, match="missing"):
        sync.push(fleet.servers, stream(), 11)
    assert len(taken) == 46  # to its end: on the other ranks it is a collective
    for server in fleet.servers:
        assert (server.state, server.version) == ("unsynced", -1)
        assert named(loop, server) == f"{sync.tag(11)}-unfinished"
        assert loop.run(score(server.client, TEXT))  # it is not paused
    assert sync.push(fleet.servers, weights_of(model(27)), 11).failed == {}


@pytest.mark.parametrize("pause", ["retract", "in_place", "abort"])
def test_requests_under_way(loop, fleet, make_sync, pause):
    """They go on under the new weights, or end; their spans name nothing but whole versions."""
    sync = make_sync("tensor", pause=pause)
    assert sync.push(fleet.servers, weights_of(model(32)), 16).failed == {}
    server = fleet.servers[0]
    body = {
        "input_ids": list(TEXT),
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 45, "ignore_eos": True},
    }

    async def requests():
        return await asyncio.gather(*(server.client.post("/generate", body) for _ in range(200)))

    answers = []
    thread = threading.Thread(target=lambda: answers.extend(loop.run(requests())))
    thread.start()
    time.sleep(0.3)
    report = sync.push(fleet.servers, weights_of(model(33)), 17)
    thread.join(120)
    assert report.failed == {}
    assert len(answers) == 200
    spans = [span for answer in answers for span in answer["meta_info"]["weight_versions"]]
    versions = {span["version"] for span in spans if span["end"] > span["start"]}
    ends = {answer["meta_info"]["finish_reason"]["type"] for answer in answers}
    if pause == "abort":
        assert versions <= {sync.tag(16), sync.tag(17)} and "abort" in ends
    else:
        assert versions == {sync.tag(16), sync.tag(17)} and ends == {"length"}
    assert holds(loop, server, model(33)) < NOISE


def test_what_cannot_work_is_refused_ahead(fleet, make_sync):
    """By what a server says about itself; no server is asked."""
    server = fleet.servers[0]
    info, server.info = server.info, dict(server.info)
    try:
        for method, verify, key, value, said in (
            ("tensor", "probe", "dp_size", 2, "2 data-parallel replicas"),
            ("broadcast", "probe", "pp_size", 2, "pipeline stages"),
            ("tensor", "probe", "quantization", "fp8", "quantization=fp8"),
            ("tensor", "probe", "dtype", "bfloat16", "bfloat16 weights, not float32"),
            ("tensor", "checksum", "pp_size", 2, "cannot be verified by checksum"),
            ("tensor", "probe", "pp_size", 2, "cannot be verified by checksum"),
        ):
            server.info = {**info, key: value}
            sync = make_sync(method, verify=verify)
            with pytest.raises(UserError, match=said):
                sync.push(fleet.servers, weights_of(model(46)), 24)
    finally:
        server.info = info


def test_the_address_that_a_server_reaches_us_by():
    assert group.own_address("http://127.0.0.1:30000") == "127.0.0.1"
    assert group.own_address("http://localhost:30000") in ("127.0.0.1", "::1")
