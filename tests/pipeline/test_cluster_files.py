"""What is handed to Ray, Slurm and Kubernetes is what they take, and agrees: one Ray version, one command, GPUs asked for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.__main__ import parse
from pipeline.config import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for pattern in ("lm1b_*.yaml", "owt_*.yaml") for path in (ROOT / "recipes").glob(pattern))
POSITIONS = {"openai-community/gpt2": 1024, "openai-community/gpt2-large": 1024, "Qwen/Qwen2.5-0.5B": 32_768}
IN_THE_IMAGE = "~/gumbel/"


def pinned(name: str) -> str:
    return next(line.partition("==")[2] for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith(f"{name}=="))


def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text())


def only(value: dict[str, Any], *allowed: str) -> None:
    assert set(value) <= set(allowed), f"{set(value) - set(allowed)} is not a field there"


def read(words: list[str]) -> Recipe:
    """The recipe of `python -m pipeline extract ...`, or of what follows `extract`, with the folder of the other machines' home put here."""
    words = [str(ROOT / word.removeprefix(IN_THE_IMAGE)) if word.startswith(IN_THE_IMAGE) else word for word in words]
    return parse(words[words.index("extract") :])[1]


def commented_command(text: str, begin: str) -> list[str]:
    """The words of the command in a file's head that begins so."""
    lines = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#")]
    start = next(number for number, line in enumerate(lines) if line.strip().startswith(begin))
    words, number = lines[start], start
    while words.endswith("\\"):
        number += 1
        words = words[:-1] + lines[number]
    return shlex.split(words)


def test_rays_schema_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster()))


def test_only_the_head_has_no_gpu_and_only_workers_are_spot() -> None:
    kinds = cluster()["available_node_types"]
    head = kinds.pop(cluster()["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    assert kinds and all(kind["resources"]["GPU"] >= 1 and kind["min_workers"] == 0 < kind["max_workers"] for kind in kinds.values())
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in kinds.values())
    assert sum(kind["max_workers"] for kind in kinds.values()) == cluster()["max_workers"]


def test_every_file_has_the_ray_of_constraints() -> None:
    import ray

    version = pinned("ray")
    assert version == ray.__version__
    image = f"rayproject/ray:{version}-py311-gpu"
    assert cluster()["docker"]["image"] == image
    assert f"\nFROM {image}\n" in (ROOT / "deploy" / "Dockerfile").read_text()
    assert job()["spec"]["rayClusterSpec"]["rayVersion"] == version
    images = re.findall(r"image: (\S+)", (ROOT / "deploy" / "kuberay.yaml").read_text())
    assert len(images) == 3 and {image.rpartition(":")[2] for image in images} == {version}


def test_machines_install_the_versions_of_constraints() -> None:
    (setup,) = cluster()["setup_commands"]
    assert "pip install -c constraints.txt -e '.[pipeline]'" in setup
    (folder,) = [remote for remote, here in cluster()["file_mounts"].items() if here == "."]
    assert folder + "/" == IN_THE_IMAGE and f"cd {folder} " in setup
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert "-c constraints.txt -e '.[pipeline]'" in dockerfile and f"WORKDIR {folder.removeprefix('~/')}\n" in dockerfile
    copied = {word for line in re.findall(r"^COPY --chown=\S+ (.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()}
    assert {"constraints.txt", "pyproject.toml", "README.md", "noise", "pipeline", "recipes"} <= copied
    assert all((ROOT / word).exists() for word in copied)


def test_what_must_be_filled_in_cannot_be_taken_for_a_value() -> None:
    """AWS refuses such a name, where one left out would be Ray's own image, with a driver too old for torch."""
    assert all(kind["node_config"]["ImageId"] == "ami-FILL-IN" for kind in cluster()["available_node_types"].values())


def test_commands_ask_for_the_gpus_that_the_autoscaler_may_start() -> None:
    """Without --ray.workers and --ray.gpus the driver would count the GPUs of a cluster that has no machine yet."""
    on_aws = read(commented_command((ROOT / "ray_cluster.yaml").read_text(), "ray submit"))
    on_kubernetes = read(shlex.split(job()["spec"]["entrypoint"]))
    assert on_aws == on_kubernetes
    assert on_aws.ray.address == "auto" and on_aws.ray.gpus == 1
    workers = job()["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert on_aws.ray.workers == cluster()["max_workers"] == sum(group["maxReplicas"] for group in workers)
    assert on_aws.output.startswith("/shared/") and "-v /shared:/shared" in cluster()["docker"]["run_options"]


def test_ray_reads_the_kubernetes_cluster() -> None:
    """As Ray's autoscaler does in the head's pod; raises what its schema does not take."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive

    config = derive({"metadata": {"name": "x", "namespace": job()["metadata"]["namespace"]}, "spec": job()["spec"]["rayClusterSpec"]})
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == head["resources"]["GPU"] == 0
    assert [(kind["resources"]["GPU"], kind["min_workers"], kind["max_workers"]) for kind in kinds.values()] == [(1, 0, cluster()["max_workers"])]
    assert config["idle_timeout_minutes"] == cluster()["idle_timeout_minutes"]


def test_kubernetes_job_has_no_field_that_the_operator_does_not_know() -> None:
    """Fields of ray.io/v1, as far as they are used here: the API server drops others without a word."""
    whole = job()
    assert (whole["apiVersion"], whole["kind"]) == ("ray.io/v1", "RayJob")
    only(whole, "apiVersion", "kind", "metadata", "spec")
    spec = whole["spec"]
    only(spec, "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec", "submitterPodTemplate")
    inner = spec["rayClusterSpec"]
    only(inner, "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs")
    only(inner["autoscalerOptions"], "idleTimeoutSeconds", "upscalingMode")
    only(inner["headGroupSpec"], "rayStartParams", "template")
    for group in inner["workerGroupSpecs"]:
        only(group, "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template")
    templates = [inner["headGroupSpec"]["template"], *(group["template"] for group in inner["workerGroupSpecs"]), spec["submitterPodTemplate"]]
    for template in templates:
        pod = template["spec"]
        only(template, "spec")
        only(pod, "containers", "volumes", "nodeSelector", "tolerations", "restartPolicy")
        (container,) = pod["containers"]
        only(container, "name", "image", "env", "resources", "volumeMounts")
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == {volume["name"] for volume in pod.get("volumes", [])}
        values = [*group_values(inner), *(setting["value"] for setting in container.get("env", []))]
        assert all(isinstance(value, str) for value in values), "rayStartParams and environment are strings"


def group_values(cluster_spec: dict[str, Any]) -> list[Any]:
    groups = [cluster_spec["headGroupSpec"], *cluster_spec["workerGroupSpecs"]]
    return [value for group in groups for value in group["rayStartParams"].values()]


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment like that of sbatch, where srun prints what it is given, and no other program of Slurm or Ray does anything."""
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", 'printf "%s\\n" "$@"'), ("ray", ":"), ("hostname", "echo 10.0.0.7 fd00::7")):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    allocation = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)} | allocation


def sbatch(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "deploy" / "slurm.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_slurm_starts_one_ray_and_a_worker_for_every_gpu(slurm: dict[str, str]) -> None:
    done = sbatch(slurm, "--config", str(ROOT / "recipes" / "owt_gpt2.yaml"), "--output", "/scratch/with space")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    separator = words.index("--")
    start, command = words[words.index("symmetric-run") : separator], words[separator + 1 :]
    assert {"--nodes=3", "--ntasks=3"} <= set(words)
    assert start[1:5] == ["--address", "10.0.0.7:6379", "--min-nodes", "3"] and {"--num-cpus=16", "--num-gpus=4"} <= set(start)
    assert command[:4] == ["python", "-m", "pipeline", "extract"]
    recipe = read(command)
    assert (recipe.ray.workers, recipe.ray.gpus, recipe.ray.address) == (12, 1, "10.0.0.7:6379")
    assert recipe.output == "/scratch/with space"


def test_rays_symmetric_run_takes_what_slurm_gives_it(slurm: dict[str, str]) -> None:
    from ray.scripts import symmetric_run
    from ray.scripts.scripts import start

    words = sbatch(slurm, "--config", "x.yaml").stdout.splitlines()
    options = symmetric_run.curate_and_validate_ray_start_args(words[words.index("symmetric-run") + 1 : words.index("--")])
    parsed = start.make_context("start", ["--address", "10.0.0.7:6379", *options]).params
    assert (parsed["num_cpus"], parsed["num_gpus"]) == (16, 4)
    assert parsed["include_dashboard"] is None, "an option of the head, which `ray start` refuses on other nodes"


@pytest.mark.parametrize("missing", ["SLURM_SUBMIT_DIR", "SLURM_GPUS_ON_NODE"])
def test_slurm_script_says_what_it_misses(slurm: dict[str, str], missing: str) -> None:
    del slurm[missing]
    done = sbatch(slurm)
    assert done.returncode != 0 and missing in done.stderr and ("sbatch" in done.stderr or "--gpus-per-node" in done.stderr)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_their_teachers_and_the_published_layout(path: Path) -> None:
    recipe = read(["extract", "--config", str(path)])
    assert recipe.packing.block_length <= POSITIONS[str(recipe.teacher.model)]
    assert recipe.packing.block_length == (128 if path.stem.startswith("lm1b") else 1024)
    assert (recipe.packing.policy, recipe.packing.block_end, recipe.packing.tail) == ("concat", "eos", "drop")
    assert recipe.corpus.clean_up == ("lm1b" if path.stem.startswith("lm1b") else "none")
    assert recipe.tokenizer.path is None and recipe.teacher_brings_tokenizer()
    assert recipe.output == f"runs/{path.stem}/dataset"
    assert recipe.ray.address == "local" and recipe.ray.workers is None, "the command line says where it runs"
    for words in (line for line in path.read_text().splitlines() if line.startswith("#   python -m pipeline")):
        assert read(["extract", *shlex.split(words.partition(" (")[0], comments=False)[5:]]).teacher == recipe.teacher


def test_there_is_a_recipe_for_every_published_pair() -> None:
    assert [path.stem for path in RECIPES] == ["lm1b_gpt2", "owt_gpt2", "owt_gpt2_large", "owt_qwen"]
