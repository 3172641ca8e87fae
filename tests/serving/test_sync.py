"""Weights from a sharded student reach real SGLang servers, verified; or a sync says why not.

The tests run in order: each takes the two servers as the one before has left them.
"""

import asyncio
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers

from megaopd.errors import UserError
from megaopd.rollout.base import Probe
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.loop import LoopThread
from tests.dist.models import save_tiny, tiny

pytest.importorskip("sglang", reason="SGLang is not installed: want=sglang bash launch/env.sh")

from megaopd.rollout import group, push, transfer
from megaopd.rollout.encode import pickled, post_pickles
from megaopd.rollout.server import Fleet
from megaopd.rollout.sync import WeightSync
from megaopd.rollout.verify import score, verify_log_probs

METHODS = ("tensor", "broadcast", "disk")
TEXT = (5, 9, 3, 7, 7, 50, 20, 30, 40, 1, 2)
SMALL = 0.1  # MB a bucket: the tiny model then takes nine
NOISE = 2e-5  # of log-probs in float32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sync")


@pytest.fixture(scope="module")
def base(root):
    """What the servers start with."""
    return save_tiny(root / "base", "qwen3", tied=False, seed=1)


@pytest.fixture(scope="module")
def students(root):
    """Checkpoints of one architecture and other weights."""
    return [save_tiny(root / f"{seed}", "qwen3", tied=False, seed=seed) for seed in (11, 12, 13)]


@pytest.fixture(scope="module")
def loop():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def fleet(base, loop, root):
    fleet = Fleet(
        ServerConfig(count=2), base, device="cpu", dtype="float32", log_dir=root / "servers"
    )
    loop.run(fleet.start())
    yield fleet
    loop.run(fleet.stop())


@pytest.fixture
def make_sync(base, loop, root):
    """A WeightSync by some method."""
    made = []

    def make(method, *, work_dir=None, **config):
        config = ServerConfig(sync=method, **{"bucket_mb": SMALL, **config})
        sync = WeightSync(
            config,
            model_dir=base,
            work_dir=work_dir or root / "weights",
            nonce=f"n{len(made)}{os.urandom(2).hex()}",
            run=loop.run,
            device="cpu",
            dtype="float32",
        )
        made.append(sync)
        return sync

    yield make
    for sync in made:
        sync.close()


def model(seed):
    return tiny("qwen3", tied=False, seed=seed)


def weights_of(of):
    return [(name, tensor.clone()) for name, tensor in of.state_dict().items()]


@torch.no_grad()
def log_probs(of):
    """transformers' log-probs of TEXT[1:]."""
    rows = of(torch.tensor([TEXT])).logits[0].log_softmax(-1)
    return [float(rows[t, token]) for t, token in enumerate(TEXT[1:])]


def holds(loop, server, of):
    """Largest difference of a server's log-probs of TEXT from a model's."""
    got = loop.run(score(server.client, TEXT))
    return max(abs(a - b) for a, b in zip(got, log_probs(of), strict=True))


def sums(loop, server):
    answer = loop.run(server.client.control("/weights_checker", {"action": "checksum"}))
    return answer["per_engine_checksum"]


def named(loop, server):
    return loop.run(server.client.get("/model_info"))["weight_version"]


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


def test_disk_that_cannot_be_written(loop, fleet, make_sync, tmp_path):
    """A file where the directory should be; a limit on the size of files."""
    old, new = model(28), model(29)
    blocked = tmp_path / "file"
    blocked.write_text("")
    sync = make_sync("disk", work_dir=blocked)
    assert make_sync("disk").push(fleet.servers, weights_of(old), 12).failed == {}
    with pytest.raises(UserError, match=f"cannot write weights to {blocked}"):
        sync.push(fleet.servers, weights_of(new), 13)
    sync, limits = make_sync("disk", work_dir=tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write weights to"):
            sync.push(fleet.servers, weights_of(new), 13)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p for p in tmp_path.iterdir() if p != blocked] == []
    for server in fleet.servers:
        assert (server.state, server.version) == ("serving", 12)
        assert holds(loop, server, old) < NOISE


def test_disk_that_a_server_cannot_see(loop, fleet, make_sync, monkeypatch):
    """The server keeps its old weights, and goes on with them."""
    sync, old = make_sync("disk"), model(30)
    assert sync.push(fleet.servers, weights_of(old), 14).failed == {}
    monkeypatch.setattr(push, "export", lambda weights, out, **_: [None for _ in weights])
    report = sync.push(fleet.servers, weights_of(model(31)), 15)
    assert report.failed.keys() == {"server 0", "server 1"}
    for server in fleet.servers:
        assert (server.state, server.version) == ("serving", 14)
        assert named(loop, server) == sync.tag(14)
        assert holds(loop, server, old) < NOISE


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


def killing(weights, at, action):
    """A stream that does something to a server on its way."""
    for i, item in enumerate(weights):
        if i == at:
            action()
        yield item


def restart(loop, fleet, server):
    loop.run(fleet.bring_up(server))
    assert (server.state, server.version) == ("unsynced", -1)


@pytest.mark.parametrize("method", METHODS)
def test_a_server_killed_half_way(loop, fleet, make_sync, method):
    """The other one gets its weights, and the one that comes back is given them anew."""
    sync, new = make_sync(method), model(40)
    victim, other = fleet.servers
    assert sync.push(fleet.servers, weights_of(model(41)), 18).failed == {}

    def kill():
        os.killpg(victim.process.group, signal.SIGKILL)

    stream, started = killing(weights_of(new), 30, kill), time.monotonic()
    report = sync.push(fleet.servers, stream, 19)
    assert time.monotonic() - started < 30
    assert next(stream, None) is None  # to its end
    assert report.failed.keys() == {victim.name}
    assert (victim.state, victim.version) == ("unsynced", -1)
    assert (other.state, other.version) == ("serving", 19)
    assert holds(loop, other, new) < NOISE
    restart(loop, fleet, victim)
    assert sync.push(fleet.servers, weights_of(new), 19).failed == {}
    assert (victim.state, victim.version) == ("serving", 19)
    assert holds(loop, victim, new) < NOISE


@pytest.mark.parametrize("method", ["tensor", "broadcast"])
def test_a_server_that_hangs_half_way(loop, fleet, make_sync, method, monkeypatch):
    """Rank 0 waits no longer than it said; the stuck group is left, and the next sync makes one."""
    monkeypatch.setattr(transfer, "patience", lambda nbytes: 4.0)
    monkeypatch.setattr(push, "GIVE_UP_S", 1.0)
    sync, new = make_sync(method), model(42)
    if method == "broadcast":
        sync.transport.timeout = 3.0
    victim, other = fleet.servers
    assert sync.push(fleet.servers, weights_of(model(43)), 20).failed == {}

    def stop():
        os.killpg(victim.process.group, signal.SIGSTOP)

    started = time.monotonic()
    report = sync.push(fleet.servers, killing(weights_of(new), 30, stop), 21)
    assert time.monotonic() - started < 30
    assert report.failed.keys() == {victim.name}
    assert (other.state, other.version) == ("serving", 21)
    os.killpg(victim.process.group, signal.SIGKILL)
    restart(loop, fleet, victim)
    monkeypatch.undo()
    assert sync.push(fleet.servers, weights_of(new), 21).failed == {}
    assert holds(loop, victim, new) < NOISE


def test_all_servers_killed(loop, fleet, make_sync):
    """The stream is brought to its end all the same."""
    sync = make_sync("broadcast")
    assert sync.push(fleet.servers, weights_of(model(44)), 22).failed == {}

    def kill():
        for server in fleet.servers:
            os.killpg(server.process.group, signal.SIGKILL)

    stream = killing(weights_of(model(45)), 20, kill)
    report = sync.push(fleet.servers, stream, 23)
    assert next(stream, None) is None
    assert report.failed.keys() == {"server 0", "server 1"}
    assert {server.state for server in fleet.servers} == {"unsynced"}


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
