"""The command line and environment of a server, for CPU and GPU; nothing is started."""

import json
from pathlib import Path

import pytest

from megaopd.errors import UserError
from megaopd.rollout.command import Served, read_key, served, server_command
from megaopd.rollout.config import ServerConfig
from megaopd.rollout.serve import addresses, main, server_config

MODEL = Path("/models/qwen")
ENVIRON = {"PATH": "/bin", "HOME": "/home/me"}


def command(config=None, *, device="cuda", dtype="bfloat16", environ=ENVIRON, **options):
    return server_command(
        config or ServerConfig(),
        MODEL,
        device=device,
        dtype=dtype,
        port=31000,
        environ=environ,
        **options,
    )


def value(argv, flag):
    assert argv.count(flag) == 1, (flag, argv)
    return argv[argv.index(flag) + 1]


def test_cpu():
    made = command(device="cpu", dtype="float32", seed=7)
    argv = made.argv
    assert argv[1:3] == ("-m", "sglang.launch_server")
    expected = {
        "--model-path": "/models/qwen",
        "--host": "127.0.0.1",
        "--port": "31000",
        "--device": "cpu",
        "--dtype": "float32",
        "--attention-backend": "torch_native",
        "--sampling-backend": "pytorch",
        "--grammar-backend": "none",
        "--cuda-graph-backend-decode": "disabled",
        "--cuda-graph-backend-prefill": "disabled",
        "--max-total-tokens": "65536",
        "--max-running-requests": "256",
        "--random-seed": "7",
    }
    assert {flag: value(argv, flag) for flag in expected} == expected
    for flag in ("--skip-tokenizer-init", "--sleep-on-idle", "--skip-server-warmup"):
        assert flag in argv
    assert made.env["SGLANG_PLATFORM"] == "megaopd_cpu"
    assert made.env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"
    assert made.env["OMP_NUM_THREADS"] == "1" and made.env["HF_HUB_OFFLINE"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in made.env


def test_gpu():
    config = ServerConfig(tensor=4, data=2, expert=2, memory_fraction=0.7, concurrency=64)
    made = command(config, gpus=range(8))
    sizes = [value(made.argv, flag) for flag in ("--tp-size", "--dp-size", "--ep-size")]
    assert sizes == ["4", "2", "2"]
    assert value(made.argv, "--mem-fraction-static") == "0.7"
    assert value(made.argv, "--device") == "cuda" and value(made.argv, "--dtype") == "bfloat16"
    assert made.env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert "SGLANG_PLATFORM" not in made.env
    for flag in ("--attention-backend", "--max-total-tokens", "--enable-memory-saver"):
        assert flag not in made.argv


def test_what_sglang_chooses_is_not_said():
    argv = command().argv
    for flag in ("--tp-size", "--dp-size", "--ep-size", "--mem-fraction-static", "--random-seed"):
        assert flag not in argv


def test_colocated_servers_can_give_their_memory_back():
    argv = command(ServerConfig(placement="colocated")).argv
    assert "--enable-memory-saver" in argv


def test_gpus_count_from_those_that_are_shown():
    environ = ENVIRON | {"CUDA_VISIBLE_DEVICES": "4,5,GPU-6"}
    made = command(ServerConfig(tensor=2), environ=environ, gpus=(1, 2))
    assert made.env["CUDA_VISIBLE_DEVICES"] == "5,GPU-6"
    with pytest.raises(UserError, match="GPU 3 for a server, with CUDA_VISIBLE_DEVICES=4,5,GPU-6"):
        command(ServerConfig(), environ=environ, gpus=(3,))


def test_the_key_stays_out_of_the_command_line():
    config = ServerConfig(api_key_env="MEGAOPD_KEY", host="0.0.0.0")
    with pytest.raises(UserError, match="that variable is not set"):
        command(config)
    made = command(config, environ=ENVIRON | {"MEGAOPD_KEY": "s3cret"})
    assert "s3cret" not in " ".join(made.argv)
    assert made.env["MEGAOPD_KEY"] == "s3cret"
    assert read_key(config, made.env) == "s3cret" and read_key(ServerConfig(), {}) == ""


def test_a_server_inherits_nothing_of_the_trainer():
    trainer = {
        "RANK": "0",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TRITON_INTERPRET": "1",
        "MEGAOPD_KILL_AT": "rollout:3",
    }
    env = command(environ=ENVIRON | trainer | {"NCCL_SOCKET_IFNAME": "eth0"}).env
    assert not trainer.keys() & env.keys()
    assert env["NCCL_SOCKET_IFNAME"] == "eth0" and env["HOME"] == "/home/me"


def test_dtypes():
    assert value(command(ServerConfig(dtype="float16")).argv, "--dtype") == "float16"
    argv = command(ServerConfig(dtype="fp8")).argv
    assert value(argv, "--quantization") == "fp8" and value(argv, "--dtype") == "bfloat16"
    with pytest.raises(UserError, match="fp8 on a CPU"):
        command(ServerConfig(dtype="fp8"), device="cpu")


def test_extra_arguments_come_last():
    config = ServerConfig(extra_args=("--sampling-mask-max-tokens", "9"), max_tokens=500)
    for device in ("cpu", "cuda"):
        argv = command(config, device=device).argv
        assert argv[-2:] == ("--sampling-mask-max-tokens", "9")
        assert value(argv, "--max-total-tokens") == "500"


def test_no_code_of_a_checkpoint_runs():
    for device in ("cpu", "cuda"):
        assert "--trust-remote-code" not in command(device=device).argv


def test_a_directory_without_weights_waits_for_the_first_sync(tmp_path):
    def argv():
        return server_command(
            ServerConfig(), tmp_path, device="cpu", dtype="float32", port=1, environ=ENVIRON
        ).argv

    assert value(argv(), "--load-format") == "dummy"
    (tmp_path / "model.safetensors").touch()
    assert "--load-format" not in argv()


def test_experts_must_divide():
    with pytest.raises(UserError, match=r"server.expert = 3 with server.tensor = 4"):
        command(ServerConfig(tensor=4, expert=3))


@pytest.mark.parametrize("cores", ["one", "0-100000", "3-"])
def test_cores_must_be_there(cores):
    with pytest.raises(UserError, match=r"server\.cores = "):
        command(ServerConfig(cores=cores), device="cpu")


def test_an_interpreter_of_its_own():
    environ = ENVIRON | {"MEGAOPD_SGLANG_PYTHON": "/opt/sglang/bin/python"}
    assert command(environ=environ).argv[0] == "/opt/sglang/bin/python"


def test_a_model_says_what_its_server_needs(tmp_path):
    dense, mixture = Served(4096, False), Served(4096, True)
    assert "--enable-return-routed-experts" in command(model=mixture).argv
    for made in (command(), command(model=dense), command(device="cpu", model=mixture)):
        assert "--enable-return-routed-experts" not in made.argv
    made = command(model=dense)
    context = int(made.argv[made.argv.index("--context-length") + 1])
    assert context > 4096 and made.env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] == "1"
    config = {"max_position_embeddings": 4096}
    for more, expected in (({"num_experts": 128}, mixture), ({"hidden_size": 64}, dense)):
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        assert served(tmp_path) == expected
    with pytest.raises(UserError, match="cannot be read"):
        served(tmp_path / "nothing")


def test_servers_of_their_own(tmp_path, capsys):
    config = server_config(["server.count=2"])
    assert addresses(config) == ["http://127.0.0.1:30000", "http://127.0.0.1:30001"]
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    arguments = ["--model", str(tmp_path), "--print-commands", "server.count=2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["--port 3000" + str(i) in line for i, line in enumerate(lines)] == [True, True]
    assert main([*arguments, "rollout.top_k=3"]) == 2
    assert main(["--model", str(tmp_path / "nothing"), "--print-commands"]) == 2
    assert "cannot be read" in capsys.readouterr().err
