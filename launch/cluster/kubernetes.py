"""An indexed Job for Kubernetes: one pod per node, each with torchrun's agent and its ranks."""

import re
from pathlib import Path
from typing import Any

import yaml

from launch.cluster.hosts import NODE_SCRIPT, node_script
from launch.cluster.layout import CONFIG, RANK_SCRIPT, Launch, Rendered, rank_script
from launch.local.failures import USER_ERROR_EXIT
from train.config.file import dumps
from train.errors import UserError

_MANIFEST = "job.yaml"
_FILES = Path("/engram")
_CONTAINER = "node"
_SPARE_S = 30


def kubernetes(launch: Launch) -> Rendered:
    """The manifests in one file, and the command that submits it.

    Raises:
        UserError: the job names no image, or no ranks per node.
    """
    launch = launch.requeued()
    text = yaml.safe_dump_all(manifests(launch), sort_keys=False)
    return Rendered(
        launch,
        {_MANIFEST: text},
        [["kubectl", "apply", "-f", str(launch.folder / _MANIFEST)]],
        in_place=True,
        queue=True,
    )


def manifests(launch: Launch) -> list[dict[str, Any]]:
    """ConfigMap with scripts and config, headless Service, by which pods find each other, and Job."""
    job, wanted = launch.job, launch.job.launch.kubernetes
    if wanted.image is None:
        raise UserError("launch.kubernetes.image is null: name an image in which Engram Pretrain is installed")
    name = f"{_dns_label(job.run.name)}-{launch.folder.name}"
    there = launch.in_pod(_FILES, Path(wanted.workdir))
    names = [f"{name}-{index}.{name}" for index in range(job.launch.nodes)]
    files = {
        CONFIG: dumps(job),
        RANK_SCRIPT: rank_script(there),
        NODE_SCRIPT: node_script(there, names, "number=$JOB_COMPLETION_INDEX"),
    }
    meta = {"name": name, "namespace": wanted.namespace, "labels": {"app.kubernetes.io/name": "engram-pretrain"}}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            # Pods must find each other before any of them is ready. The selector's label is the Job controller's.
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"job-name": name},
                "ports": [{"name": "ranks", "port": there.port}],
            },
        },
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": _job(launch, name)},
    ]


def _job(launch: Launch, name: str) -> dict[str, Any]:
    job, wanted = launch.job, launch.job.launch.kubernetes

    def ends_with(code: int) -> dict[str, Any]:
        return {"containerName": _CONTAINER, "operator": "In", "values": [code]}

    limit = job.launch.time_limit_min
    return {
        "completionMode": "Indexed",
        "completions": job.launch.nodes,
        "parallelism": job.launch.nodes,
        "backoffLimit": wanted.retries * job.launch.nodes,
        **({"activeDeadlineSeconds": 60 * limit} if limit else {}),
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onExitCodes": ends_with(job.checkpoint.interrupted_exit)},
                {"action": "FailJob", "onExitCodes": ends_with(USER_ERROR_EXIT)},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": _pod(launch, name)},
    }


def _pod(launch: Launch, name: str) -> dict[str, Any]:
    job, wanted = launch.job, launch.job.launch.kubernetes
    limits: dict[str, int | str] = {wanted.gpu_resource: launch.gpus} if launch.gpus else {}
    limits |= {"cpu": wanted.cpus} if wanted.cpus else {}
    limits |= {"memory": f"{wanted.memory_gib}Gi"} if wanted.memory_gib else {}
    claims = sorted(set(wanted.volumes.values()))
    volumes = [
        {"name": "engram", "configMap": {"name": name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{wanted.shm_gib}Gi"}},
        *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims),
    ]
    mounts = [
        {"name": "engram", "mountPath": str(_FILES)},
        {"name": "shm", "mountPath": "/dev/shm"},
        *({"name": claim, "mountPath": path} for path, claim in wanted.volumes.items()),
    ]
    container = {
        "name": _CONTAINER,
        "image": wanted.image,
        "command": ["bash", str(_FILES / NODE_SCRIPT)],
        "resources": {"limits": limits},
        "volumeMounts": mounts,
    }
    return {
        "restartPolicy": "Never",
        "subdomain": name,
        "terminationGracePeriodSeconds": round(job.checkpoint.grace_s) + _SPARE_S,
        "containers": [container],
        "volumes": volumes,
    }


def _dns_label(name: str) -> str:
    """A run's name as Kubernetes allows names, with room for the launch's number and the pod's index."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:45] or "run"
