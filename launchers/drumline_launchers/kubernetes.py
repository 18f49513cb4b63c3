"""Renders a Kubernetes job (Kubeflow TrainJob, JobSet or Indexed Job) and the run's ConfigMap. Pure.

One pod per node runs `drumline attend`: the first supervises, the others follow it through the run folder,
which is on a volume that all pods mount. Manifests refer to Secrets by name and never contain their values.
"""

from typing import Any

from drumline.errors import LaunchError, PlanError
from drumline.plan.model import Plan
from drumline_launchers.base import attend_command
from drumline_launchers.site import Kubernetes, Site

CONFIG = "/etc/drumline"
_MAX_CONFIG = 1 << 20
_CONTAINER = "node"
"""Kubeflow's runtimes give this name to the container that trains."""

Manifest = dict[str, Any]


def render_manifests(plan: Plan, site: Site, name: str, files: dict[str, str]) -> list[Manifest]:
    """Render a ConfigMap with the run's `files`, and the job that mounts it; both are called `name`."""
    place = site.kubernetes
    if place is None:
        raise PlanError(
            "--site: it has no `kubernetes` section. Nearest: kubernetes: {image, claim}"
        )
    size = sum(map(len, files.values()))
    if size > _MAX_CONFIG:
        raise PlanError(
            f"the run's files have {size:,} characters, a ConfigMap holds {_MAX_CONFIG:,}. Nearest: commit "
            "or ignore the untracked files beside the recipe"
        )
    meta = {
        "name": name,
        "namespace": place.namespace,
        "labels": {"app.kubernetes.io/managed-by": "drumline"},
    }
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files}
    kinds = {"trainjob": _train_job, "jobset": _job_set, "job": _job}
    return [config, {**kinds[place.kind](plan, site, place, name), "metadata": meta}]


def check_manifests(manifests: list[Manifest]) -> None:
    """Raise LaunchError if a field is wrong, missing or unknown to Kubernetes.

    The models of `kubeflow-trainer-api` silently drop unknown fields, so their output is compared with the
    manifest.
    """
    try:
        from kubeflow_trainer_api import models
    except ImportError:
        raise LaunchError(
            "kubeflow-trainer-api is not installed. Nearest: pip install 'drumline[kubernetes]'"
        ) from None
    from pydantic import ValidationError

    kinds = {
        "ConfigMap": models.IoK8sApiCoreV1ConfigMap,
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "JobSet": models.JobsetV1alpha2JobSet,
        "Job": models.IoK8sApiBatchV1Job,
    }
    for manifest in manifests:
        try:
            known = kinds[manifest["kind"]].from_dict(manifest).to_dict()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise LaunchError(f"{manifest['kind']}: {where}: {first['msg']}") from None
        lost = _lost(manifest, known)
        if lost:
            raise LaunchError(f"{manifest['kind']}: {lost[0]}: unknown to Kubernetes")


def _train_job(plan: Plan, site: Site, place: Kubernetes, name: str) -> Manifest:
    pod = _pod(plan, site, place, name)
    container = pod["containers"][0]
    own = {"name": _CONTAINER, "env": container["env"], "volumeMounts": container["volumeMounts"]}
    kept: Manifest = {k: pod[k] for k in ("nodeSelector", "serviceAccountName") if k in pod}
    patch: Manifest = {"volumes": pod["volumes"], "containers": [own], **kept}
    job: Manifest = {"name": "node", "template": {"spec": {"template": {"spec": patch}}}}
    spec: Manifest = {"template": {"spec": {"replicatedJobs": [job]}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "spec": {
            "runtimeRef": {"name": place.runtime},
            "trainer": {
                "image": place.image,
                "numNodes": plan.batch.nodes,
                "command": container["command"],
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [{"manager": "drumline", "trainingRuntimeSpec": spec}],
        },
    }


def _job_set(plan: Plan, site: Site, place: Kubernetes, name: str) -> Manifest:
    job = _job(plan, site, place, name)["spec"]
    job["backoffLimit"] = 0
    restarts = plan.recipe.launch.max_restarts
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "spec": {
            "failurePolicy": {"maxRestarts": restarts},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _job(plan: Plan, site: Site, place: Kubernetes, name: str) -> Manifest:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "spec": {
            "completionMode": "Indexed",
            "completions": plan.batch.nodes,
            "parallelism": plan.batch.nodes,
            "backoffLimit": plan.recipe.launch.max_restarts * plan.batch.nodes,
            "template": {"spec": {"restartPolicy": "Never", **_pod(plan, site, place, name)}},
        },
    }


def _pod(plan: Plan, site: Site, place: Kubernetes, name: str) -> Manifest:
    """Render the pod: the volumes of run folder and configuration, shared memory, references to Secrets."""
    run = f"{place.mount.rstrip('/')}/{name}"
    resources: dict[str, str] = {}
    if plan.recipe.cluster.gpu != "cpu":
        resources[place.gpu_resource] = str(plan.mesh.ranks_per_node)
    if site.cpus_per_node:
        resources["cpu"] = str(site.cpus_per_node)
    if site.memory_per_node and site.memory_per_node != "0":
        resources["memory"] = f"{site.memory_per_node}i"
    container = {
        "name": _CONTAINER,
        "image": place.image,
        "command": attend_command(run, plan.batch.nodes, CONFIG),
        "env": _environment(site, place),
        "resources": {"limits": resources, "requests": dict(resources)},
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG, "readOnly": True},
            {"name": "runs", "mountPath": place.mount},
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 - not a temporary file
        ],
    }
    pod: Manifest = {
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": name}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": place.claim}},
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": place.shared_memory},
            },
        ],
    }
    if place.node_selector:
        pod["nodeSelector"] = place.node_selector
    if place.service_account:
        pod["serviceAccountName"] = place.service_account
    return pod


def _environment(site: Site, place: Kubernetes) -> list[Manifest]:
    found: list[Manifest] = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    if site.fabric.interface:
        found += [{"name": name, "value": site.fabric.interface}
                  for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")]  # fmt: skip
    if site.fabric.infiniband:
        found.append({"name": "NCCL_IB_HCA", "value": site.fabric.infiniband})
    if site.cache:
        found.append({"name": "DRUMLINE_CACHE", "value": site.cache})
    for variable, reference in place.secrets.items():
        key = {"name": reference.name, "key": reference.key}
        found.append({"name": variable, "valueFrom": {"secretKeyRef": key}})
    return found


def _lost(given: Any, known: Any, path: str = "") -> list[str]:
    """Return the paths of values in `given` that are missing or different in `known`."""
    if isinstance(given, dict):
        known = known if isinstance(known, dict) else {}
        missing = [f"{path}{key}" for key in given if key not in known]
        both = [(f"{path}{key}.", given[key], known[key]) for key in given if key in known]
    elif isinstance(given, list) and isinstance(known, list):
        missing = []
        both = [(f"{path}{n}.", a, b) for n, (a, b) in enumerate(zip(given, known, strict=False))]
    else:
        return [] if given == known else [path.rstrip(".")]
    return missing + [name for where, a, b in both for name in _lost(a, b, where)]
