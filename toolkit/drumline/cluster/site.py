"""Reads a site file, which is validated like a recipe but never part of one."""

import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from drumline.architectures.gpus import find_gpu
from drumline.errors import PlanError, RecipeError
from drumline.plan.model import NO_SITE, SiteFacts
from drumline.recipe import yaml12
from drumline.recipe.load import read_text
from drumline.recipe.problems import explain
from drumline.recipe.schema import Recipe
from drumline.secrets import is_secret_name, secrets_in
from drumline_launchers.site import Site


def load_site(path: Path) -> Site:
    """Read a site file; RecipeError lists every problem with its key and value."""
    try:
        raw = yaml12.parse(read_text(path))
    except RecipeError as error:
        raise RecipeError(f"--site {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"--site {path}: a site is a mapping that begins with `site:`")
    return validate_site(raw, f"--site {path}")


def validate_site(raw: dict[str, Any], origin: str) -> Site:
    """Validate a plain mapping as a Site; RecipeError if it contains secrets."""
    plain = {key: value for key, value in raw.items() if key != "kubernetes"}
    kubernetes = raw.get("kubernetes")
    if isinstance(kubernetes, dict):  # `kubernetes.secrets` holds only names of Secrets
        plain["kubernetes"] = {k: v for k, v in kubernetes.items() if k != "secrets"}
    found = list(secrets_in(plain))
    for key in ("setup", "sbatch"):
        lines = raw.get(key)
        text = "\n".join(map(str, lines)) if isinstance(lines, list) else ""
        assigned = re.findall(r"(?<![\w$-])([A-Za-z_]\w*)=", text)
        found += [f"{key}: {name}" for name in assigned if is_secret_name(name)]
    if found:
        raise RecipeError(
            f"{origin}: {found[0]}: secrets do not belong in a site. "
            "Nearest: name the variable under `environment`"
        )
    try:
        site = Site.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(explain(error, Site, origin)) from None
    _refuse_contradictions(site, origin)
    limit = limit_seconds(site.time_limit) if site.time_limit else None
    if limit is not None and limit <= site.warning_s:
        fix = f"warning_s: {max(1, limit // 10)}" if limit > 1 else "a longer time_limit"
        raise RecipeError(
            f"{origin}: warning_s: {site.warning_s} s are not before the end of time_limit {site.time_limit} "
            f"({limit} s). Nearest: {fix}"
        )
    at_home = {key: os.path.expanduser(value) for key in ("python", "runs", "cache")
               if (value := getattr(site, key))}  # fmt: skip
    return site.model_copy(update=at_home)


_OWN_OPTIONS = {
    "account": "account", "array": "", "chdir": "runs", "cpus-per-task": "cpus_per_node", "dependency": "",
    "error": "", "exclude": "exclude", "export": "environment", "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node", "gpus-per-task": "gpus_per_node", "gres": "gpu_type", "hold": "",
    "job-name": "", "mem": "memory_per_node", "mem-per-cpu": "memory_per_node",
    "mem-per-gpu": "memory_per_node", "no-requeue": "", "nodes": "", "ntasks": "", "ntasks-per-node": "",
    "open-mode": "", "output": "", "parsable": "", "partition": "partition", "qos": "qos", "requeue": "",
    "signal": "warning_s", "time": "time_limit", "wrap": "",
    "cpus-per-gpu": "cpus_per_node", "get-user-env": "environment", "gpus-per-socket": "gpus_per_node",
    "help": "", "mincpus": "cpus_per_node", "ntasks-per-core": "", "ntasks-per-gpu": "",
    "ntasks-per-socket": "", "test-only": "", "uid": "", "usage": "", "version": "",
}  # fmt: skip
"""Options of sbatch that drumline writes itself, and the site's key for them, if there is one."""


def _refuse_contradictions(site: Site, origin: str) -> None:
    """Raise RecipeError for an option that would silently replace one that the plan or the site states."""
    for option in site.sbatch:
        name, _, value = option.removeprefix("--").partition("=")
        is_quoted = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in value[1:-1]
        if ('"' in value and not is_quoted) or "\\" in value:
            raise RecipeError(
                f"{origin}: sbatch: {option}: quotes within a value cannot stand in a script"
            )
        meant = [
            own for own in _OWN_OPTIONS if own.startswith(name)
        ]  # sbatch takes a beginning, too
        if not meant:
            continue
        key = _OWN_OPTIONS[min(meant, key=len)]
        instead = f"the site's key {key}" if key else "leave it out: the plan says it"
        raise RecipeError(
            f"{origin}: sbatch: {option} contradicts what drumline writes. Nearest: {instead}"
        )
    if site.mail and any(option.startswith("--mail-") for option in site.sbatch):
        raise RecipeError(f"{origin}: sbatch: --mail-… contradicts mail. Nearest: mail alone")


def limit_seconds(time_limit: str) -> int | None:
    """Seconds of one of Slurm's forms of a time limit (see `TimeLimit`); None for no limit."""
    if time_limit in ("UNLIMITED", "INFINITE"):
        return None
    days, dash, clock = time_limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    minutes, seconds = [*parts, 0][:2]
    return minutes * 60 + seconds


def facts_of(site: Site | None) -> SiteFacts:
    """What a plan takes from a site."""
    if site is None:
        return NO_SITE
    links = site.bandwidths
    return SiteFacts(site.gpu_hour_price, links.within, links.between, links.copy_)


def on_site(recipe: Recipe, site: Site) -> Recipe:
    """Fill the recipe's unset hardware keys from the site; PlanError if the two contradict each other."""
    cluster = recipe.cluster
    update: dict[str, str | int] = {}
    if site.gpu and "gpu" not in cluster.model_fields_set:
        update["gpu"] = site.gpu
    elif site.gpu and find_gpu(site.gpu).name != find_gpu(cluster.gpu).name:
        raise PlanError(
            f"cluster.gpu: the recipe says {cluster.gpu_name}, site {site.site} has {site.gpu}. "
            f"Nearest: cluster.gpu={site.gpu}"
        )
    if site.gpus_per_node and cluster.gpus_per_node is None:
        update["gpus_per_node"] = site.gpus_per_node
    elif site.gpus_per_node and (cluster.gpus_per_node or 0) > site.gpus_per_node:
        raise PlanError(
            f"cluster.gpus_per_node: {cluster.gpus_per_node}, nodes of site {site.site} have "
            f"{site.gpus_per_node}. Nearest: cluster.gpus_per_node={site.gpus_per_node}"
        )
    return recipe.model_copy(update={"cluster": cluster.model_copy(update=update)})
