"""Kubernetes: the manifests of a run, and giving them to kubectl."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from drumline.errors import LaunchError
from drumline.files import write_text
from drumline.plan.model import Plan
from drumline.recipe import yaml12
from drumline.runs.code import CODE
from drumline.runs.folder import RunFolder
from drumline.runs.freeze import CODE_TEXT, frozen_text
from drumline.runs.record import now
from drumline_launchers.kubernetes import check_manifests, render_manifests
from drumline_launchers.site import SITE, Site

MANIFESTS = "manifests.yaml"
_LONGEST_LABEL = 50
"""Kubernetes allows names of 63 characters; a JobSet appends some for its pods."""


def manifests_of(
    plan: Plan, site: Site, name: str, record: dict[str, Any], code: Path
) -> list[dict[str, Any]]:
    """Render the manifests; the frozen `code`, if there is any, is passed on as text with the recipe."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_LONGEST_LABEL].strip("-")
    if not label:
        raise LaunchError(f"{name}: no name for Kubernetes is in it. Nearest: another --run-dir")
    recipe, files = plan.recipe, {}
    if code.is_dir() and site.kubernetes:
        project = f"{site.kubernetes.mount.rstrip('/')}/{label}/{CODE}"
        recipe = recipe.model_copy(update={"project": project})
        files[CODE_TEXT] = json.dumps(frozen_text(code))
    plain = recipe.model_dump(by_alias=True)
    files |= {
        "recipe.yaml": yaml12.dump(plain),
        "record.json": json.dumps({**record, "recipe": plain}),
        SITE: yaml12.dump(site.to_plain()),
    }
    found = render_manifests(plan, site, label, files)
    check_manifests(found)
    return found


def manifest_text(manifests: list[dict[str, Any]]) -> str:
    """Return the manifests as one YAML stream."""
    return "---\n".join(yaml12.dump(manifest) for manifest in manifests)


def apply(plan: Plan, site: Site, folder: RunFolder) -> str:
    """Run `kubectl apply` on the manifests, keep them in the run folder, and return the object's name."""
    name = folder.path.name
    manifests = manifests_of(plan, site, name, folder.read_record(), folder.path / CODE)
    text = manifest_text(manifests)
    write_text(folder.path / MANIFESTS, text)
    _kubectl(["apply", "-f", "-"], text)
    kind, meta = manifests[-1]["kind"].lower(), manifests[-1]["metadata"]
    entry = {"target": "kubernetes", "id": f"{kind}/{meta['name']}", "namespace": meta["namespace"]}
    folder.add_job({**entry, "submitted": now()})
    return str(entry["id"])


def apply_again(plan: Plan, site: Site, folder: RunFolder) -> str:
    """Give the run's manifests, rendered anew, to Kubernetes in place of the object that has ended."""
    record = folder.read_record()
    manifests = manifests_of(plan, site, folder.path.name, record, folder.path / CODE)
    _kubectl(["delete", "--ignore-not-found", "--wait", "-f", "-"], manifest_text(manifests))
    return apply(plan, site, folder)


def _kubectl(arguments: list[str], text: str) -> None:
    command = ["kubectl", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or "it printed no error").splitlines()[-1]
        raise LaunchError(f"kubectl {arguments[0]}: {words}")
