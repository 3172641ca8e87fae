"""Bad input ends with one clear error from one rank, exit code 2, and nothing half-written."""

import json
import socket

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.runs import make_models, megaopd, opd_arguments


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def refused(process, *said: str) -> None:
    assert process.returncode == 2, (process.returncode, process.stderr)
    for text in said:
        assert text in process.stderr, process.stderr
    assert process.stderr.count("megaopd: ") == 1, process.stderr
    assert "Traceback" not in process.stderr


def test_a_missing_config():
    refused(megaopd("train", "--config", "nowhere.toml"), "no config file nowhere.toml")


def test_a_missing_checkpoint(tmp_path, models):
    run = opd_arguments(tmp_path / "none", models[1], tmp_path / "run", "parallel.tensor=2")
    refused(megaopd(*run), "none", "expected:")
    assert not (tmp_path / "run").exists()


def test_a_tensor_that_is_missing(tmp_path, models):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in models[0].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.layers.1.input_layernorm.weight")
    save_file(tensors, broken / "model.safetensors")
    run = opd_arguments(broken, models[1], tmp_path / "run", "parallel.tensor=2")
    refused(megaopd(*run), "model.layers.1.input_layernorm.weight", "expected:", "fix:")
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer(tmp_path, models):
    other = tmp_path / "other"
    other.mkdir()
    for file in models[1].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"+"', '"*"'))
    run = opd_arguments(models[0], other, tmp_path / "run")
    refused(megaopd(*run), "tokenizer", "expected:")


def test_a_malformed_prompt_file(tmp_path, models):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1="}\n{"prompt": \n')
    run = opd_arguments(*models, tmp_path / "run", f"data.source={prompts}")
    refused(megaopd(*run), "prompts.jsonl:2")
    assert not (tmp_path / "run").exists()


def test_a_port_in_use(tmp_path, models):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = opd_arguments(*models, tmp_path / "run")
        refused(megaopd(*run, "--port", port), f"port {port}", "in use")


def test_ranks_that_the_layout_does_not_divide(tmp_path, models):
    run = opd_arguments(*models, tmp_path / "run", "parallel.tensor=2")
    refused(megaopd(*run, "--ranks", 3), "--ranks 3", "a multiple of 2")


def test_a_layout_that_the_model_does_not_divide(tmp_path, models):
    run = opd_arguments(*models, tmp_path / "run", "parallel.tensor=4")
    refused(megaopd(*run), "2 key/value heads with tensor parallel 4", "fix:")


def test_an_error_on_one_rank_of_many_is_said_once(tmp_path, models):
    """The prompts run into an id that the other rank never sees."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{i}+1="}) for i in range(15)]
    prompts.write_text("\n".join([*lines, json.dumps({"prompt": "1" * 62})]) + "\n")
    run = opd_arguments(*models, tmp_path / "run", f"data.source={prompts}", "parallel.tensor=2")
    refused(megaopd(*run, "data.shuffle=false"), "at most 64 positions")
