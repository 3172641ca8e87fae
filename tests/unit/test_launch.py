"""Scripts, Dockerfile, manifests, recipes: what linters find, and what they cannot know."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import yaml

from megaopd.elastic import wait_for
from megaopd.recipes import recipe
from megaopd.rollout.serve import addresses, server_config
from megaopd.schema import load_config, make_config

ROOT = Path(__file__).parents[2]
SCRIPTS = [*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch"), ROOT / ".ci/run"]
MANIFESTS = sorted((ROOT / "launch" / "k8s").glob("*.yaml"))
# recipe -> GPUs that train.
RECIPES = {
    "qwen3_8b_to_1p7b_8gpu": 8,
    "qwen3_8b_to_1p7b_colocated": 8,
    "qwen3_32b_to_8b_3nodes": 16,
    "qwen3_32b_to_8b_served_teacher": 8,
    "qwen3_32b_to_8b_16gpu": 16,
    "qwen3_235b_to_32b_64gpu": 64,
    "llama_70b_to_8b_8gpu": 8,
}


def tool(name: str) -> str:
    """A linter beside this interpreter, or the test is skipped."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed: pip install -r launch/requirements-lint.txt")
    return found


def accepted(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def documents() -> list[dict]:
    return [d for path in MANIFESTS for d in yaml.safe_load_all(path.read_text())]


def manifest(kind: str, name: str) -> dict:
    return next(d for d in documents() if (d["kind"], d["metadata"]["name"]) == (kind, name))


def container(workload: dict) -> dict:
    return workload["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_pass_shellcheck(script):
    accepted("bash", "-n", script)
    accepted(tool("shellcheck"), "--external-sources", "--source-path=SCRIPTDIR", script)


def test_scripts_explain_themselves():
    """Without arguments: the header, exit code 2."""
    for name in ("torchrun_multinode.sh", "sglang_servers.sh"):
        done = subprocess.run(["bash", ROOT / "launch" / name], capture_output=True, text=True)
        assert done.returncode == 2 and name in done.stdout


def test_the_dockerfile_passes_hadolint():
    accepted(tool("hadolint"), "Dockerfile")


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    text = (ROOT / "Dockerfile").read_text()
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source == "." or source.split("/")[0] in allowed, source
    for name in allowed:
        assert (ROOT / name).exists(), name
    assert re.findall(r"^FROM \S+ AS (trainer|rollouts|cpu)$", text, re.M)
    for stage in re.split(r"^FROM ", text, flags=re.M)[1:]:
        if re.search(r"^CMD", stage, re.M):  # a target: never root, numeric for runAsNonRoot
            assert "USER 10001:10001" in stage


def test_requirement_files_agree():
    """One release of a package, whichever file installs it; two environments are their own."""
    seen: dict[str, tuple[str, str]] = {}
    for path in sorted((ROOT / "launch").glob("requirements-*.txt")):
        if "sglang-gpu" in path.name or "bench" in path.name:
            continue
        for line in path.read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            name, version = re.match(r"([\w.-]+)==([\w.!+]+)", line).groups()
            other = seen.setdefault(name.lower().replace("_", "-"), (version, path.name))
            assert other[0] == version, (name, path.name, other)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
@pytest.mark.parametrize("version", ["1.31", "1.37"])  # podFailurePolicy is stable since 1.31
def test_manifests_are_valid(path, version):
    accepted(tool("kubernetes-validate"), "--strict", "--kubernetes-version", version, path)


def test_the_job_of_the_trainer():
    job = manifest("Job", "megaopd-trainer")["spec"]
    pod = job["template"]["spec"]
    env = {e["name"]: e.get("value") for e in container({"spec": job})["env"]}
    assert env["NNODES"] == str(job["completions"]) == str(job["parallelism"])
    service = manifest("Service", pod["subdomain"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    assert env["HEAD"] == f"megaopd-trainer-0.{service['metadata']['name']}"
    assert env["GPUS"] == container({"spec": job})["resources"]["limits"]["nvidia.com/gpu"]
    said = (ROOT / "launch" / "torchrun_multinode.sh").read_text()
    assert set(env) - {"MEGAOPD_KEY", "NCCL_DEBUG"} <= set(re.findall(r"\$\{(\w+):", said))
    rules = {r["onExitCodes"]["values"][0]: r["action"] for r in job["podFailurePolicy"]["rules"]
             if "onExitCodes" in r}  # fmt: skip
    assert rules == {2: "FailJob", 75: "Ignore"}


@pytest.mark.parametrize("pool", ["rollout", "teacher"])
def test_servers_have_names_and_a_probe_that_works_while_paused(pool):
    workload = manifest("StatefulSet", f"megaopd-{pool}")
    assert manifest("Service", workload["spec"]["serviceName"])["spec"]["clusterIP"] == "None"
    one = container(workload)
    for probe in ("startupProbe", "readinessProbe"):
        assert one[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert one["ports"][0]["containerPort"] == 30000
    allowed = manifest("NetworkPolicy", "megaopd-servers")["spec"]["podSelector"]["matchLabels"]
    assert allowed.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    arguments = one["args"]
    gpus = next(a for a in arguments if a.startswith("server.tensor=")).split("=")[1]
    assert one["resources"]["limits"]["nvidia.com/gpu"] == gpus
    config = server_config([a for a in arguments if a.startswith("server.")])
    assert addresses(config)[0].endswith(":30000")


def test_the_run_of_the_manifests_loads_and_names_its_servers():
    values = tomllib.loads(manifest("ConfigMap", "megaopd-run")["data"]["run.toml"])
    config = make_config(values)
    pool = manifest("StatefulSet", "megaopd-rollout")
    names = [f"http://megaopd-rollout-{i}.megaopd-rollout:30000"
             for i in range(pool["spec"]["replicas"])]  # fmt: skip
    assert list(config.server.addresses) == names
    assert config.student.path in container(pool)["args"]
    secret = manifest("Secret", "megaopd-key")
    assert secret["stringData"] == {"key": ""}, "no key in the repository"
    for workload in (manifest("Job", "megaopd-trainer"), pool):
        key = next(e for e in container(workload)["env"] if e["name"] == config.server.api_key_env)
        assert key["valueFrom"]["secretKeyRef"] == {"name": "megaopd-key", "key": "key"}


def test_pods_run_without_rights():
    for workload in documents():
        if workload["kind"] not in ("Job", "StatefulSet"):
            continue
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        rights = container(workload)["securityContext"]
        assert rights == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert any(v["mountPath"] == "/dev/shm" for v in container(workload)["volumeMounts"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_h100_recipes_load(name):
    config = load_config(recipe(f"h100/{name}"))
    data_parallel, rest = divmod(RECIPES[name], config.parallel.model_parallel)
    assert rest == 0
    # No masked filler: the responses of a step divide into data-parallel ranks and micro-batches.
    batch = config.trainer.micro_batch_size * data_parallel
    assert config.rollout.samples_per_step % batch == 0
    assert config.student.dtype == "bfloat16"


def test_every_h100_recipe_is_checked():
    assert {p.stem for p in (ROOT / "megaopd/recipes/h100").glob("*.toml")} == set(RECIPES)


def test_the_addresses_of_the_batch_script(tmp_path):
    """The functions of run.sbatch, as bash runs them."""
    text = (ROOT / "launch/slurm/run.sbatch").read_text()
    pattern = r"^join\(\)[^\n]*|^addresses\(\) \{\n.*?^\}"
    functions = "\n".join(re.findall(pattern, text, re.M | re.S))
    call = "addresses server.addresses n1 n2 -- server.tensor=4 server.count=2"
    said = subprocess.run(["bash", "-c", functions + "\n" + call], capture_output=True, text=True)
    key, _, value = said.stdout.strip().partition("=")
    assert key == "server.addresses"
    assert json.loads(value) == [f"http://n{n}:{30000 + i}" for n in (1, 2) for i in (0, 1)]


def test_a_node_waits_for_the_head():
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        port = head.getsockname()[1]
        assert not wait_for("127.0.0.1", port, seconds=1.2)
        threading.Timer(1.5, head.listen).start()
        assert wait_for("127.0.0.1", port, seconds=20)
