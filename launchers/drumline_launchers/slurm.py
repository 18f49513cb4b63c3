"""Slurm: renders the batch script, and the srun that starts an attempt on the job's nodes. Pure."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from drumline.plan.model import Plan
from drumline_launchers.base import Command, Job
from drumline_launchers.site import Container, Site

_ALWAYS = ("PATH", "HOME", "USER", "SHELL", "LANG", "SLURM_CONF", "DRUMLINE_CACHE")
"""Variables to pass on besides the site's `environment`; unused if that is empty."""


@dataclass(frozen=True)
class Batch:
    """What the batch script needs besides plan and site.

    `fewest` to `most`: the nodes to ask for. Several run folders make a job array, one task each. `name`: the
    job's, by default the run folder's. `after`: the job of the chain that this one waits for; `dependency`: a
    further one in Slurm's words. `is_followed`: another job waits for this one, which then does not
    requeue itself after saving (exit 75). `at_most`: array tasks that run at the same time.
    """

    run_folders: list[Path]
    python: str
    import_path: list[Path]
    fewest: int
    most: int
    name: str | None = None
    after: str | None = None
    dependency: str | None = None
    is_followed: bool = False
    at_most: int | None = None


def render_script(plan: Plan, site: Site, batch: Batch) -> str:
    """Render the sbatch script; every value is quoted, except in #SBATCH lines."""
    per_node = plan.mesh.ranks_per_node
    return _template("slurm.sh.j2").render(
        options=_options(plan, site, batch, per_node),
        site=site,
        runs=batch.run_folders,
        python=site.python or batch.python,
        import_path=":".join(map(str, batch.import_path)),
        fabric=_fabric(site),
        cache=site.cache,
        is_followed=batch.is_followed,
        recipe=plan.recipe.recipe,
        split=str(plan.batch.split),
        effective=plan.batch.effective,
        nodes_range=None if batch.fewest == batch.most else f"{batch.fewest}-{batch.most}",
    )


def render_command_script(
    site: Site, name: str, arguments: list[str], batch: Batch, output: Path
) -> str:
    """Render the sbatch script of one drumline command, with its `arguments`, on one node without GPUs."""
    found = [
        f"--job-name={_quoted(name if _QUOTABLE.fullmatch(name) else 'drumline')}",
        f"--output={_quoted(str(output)) if _QUOTABLE.fullmatch(str(output)) else '/dev/null'}",
        "--nodes=1",
        *_of_site(site, batch),
    ]
    start = [site.python or batch.python, "-P", "-m", "drumline.cli", *arguments]
    return _template("slurm_command.sh.j2").render(
        options=[option for option in found if option],
        command=shlex.join(start),
        import_path=":".join(map(str, batch.import_path)),
        site=site,
        fabric=_fabric(site),
        cache=site.cache,
    )


def step_command(plan: Plan, job: Job, site: Site, hosts: list[str]) -> Command:
    """Render the srun of one launcher per node, on the first hosts, as many as the plan has nodes."""
    node = ["-P", "-m", "drumline_launchers.node", "--plan", str(job.plan_file),
            "--run-dir", str(job.run_folder), "--attempt", str(job.attempt),
            "--host", job.host, "--port", str(job.port),
            *(["--until", str(job.until)] if job.until else [])]  # fmt: skip
    start = [*python_of(site, job.python, job.run_folder), *node]
    return Command(on_each(hosts[: plan.batch.nodes], start, site), {}, is_remote=True)


def on_each(hosts: list[str], command: list[str], site: Site | None = None) -> list[str]:
    """Render an srun of the command, once on each of the job's hosts; if one fails, all are ended."""
    cores = site.cpus_per_node if site else None
    return [
        *_one_task_on_each(hosts),
        "--kill-on-bad-exit=1",
        "--wait=30",
        "--export=ALL",
        *([f"--cpus-per-task={cores}"] if cores else []),
        *command,
    ]


def python_of(site: Site, python: str, run_folder: Path) -> list[str]:
    """Return what starts Python in a job step: `python`, or that of the site's container."""
    container = site.container
    if container is None:
        return [python]
    enter = _pyxis if container.kind == "pyxis" else _apptainer
    return [*enter(container, run_folder), container.python]


def roll_call(hosts: list[str]) -> list[str]:
    """Render an srun whose tasks print their host names; a lost host does not end the other tasks."""
    return [
        *_one_task_on_each(hosts),
        "--no-kill",
        "--kill-on-bad-exit=0",
        "printenv",
        "SLURMD_NODENAME",
    ]


def _one_task_on_each(hosts: list[str]) -> list[str]:
    return [
        "srun",
        f"--nodes={len(hosts)}",
        f"--ntasks={len(hosts)}",
        "--ntasks-per-node=1",
        f"--nodelist={','.join(hosts)}",
        "--overlap",  # otherwise srun waits until Slurm has cleaned up the previous step
    ]


def _options(plan: Plan, site: Site, batch: Batch, per_node: int) -> list[str]:
    """Return the #SBATCH options; they cannot be quoted, so the schemas restrict their values."""
    nodes = str(batch.most) if batch.fewest == batch.most else f"{batch.fewest}-{batch.most}"
    gpus = None
    if plan.recipe.cluster.gpu != "cpu":
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        gpus = f"--gpus-per-node={kind}{per_node}"
    found = [
        f"--job-name={_quoted(batch.name or _job_name(plan, batch))}",
        *_where_an_admin_looks(batch),
        f"--nodes={nodes}",  # no --ntasks-per-node: with it Slurm gives the fewest nodes of a range
        gpus,
        *_of_site(site, batch),
        _array(batch),
        f"--signal=B:USR1@{site.warning_s}",
        "--requeue",
        "--open-mode=append",
        *(_option_of_site(option) for option in site.sbatch),
    ]
    return [option for option in found if option]


def _of_site(site: Site, batch: Batch) -> list[str | None]:
    """Options that every job of a site has, and what it waits for."""
    waits = [f"afterany:{batch.after}" if batch.after else "", batch.dependency or ""]
    mail = site.mail
    return [
        f"--cpus-per-task={site.cpus_per_node}" if site.cpus_per_node else None,
        f"--mem={site.memory_per_node}" if site.memory_per_node else None,
        f"--time={site.time_limit}" if site.time_limit else None,
        f"--partition={site.partition}" if site.partition else None,
        f"--account={site.account}" if site.account else None,
        f"--qos={site.qos}" if site.qos else None,
        f"--exclude={','.join(site.exclude)}" if site.exclude else None,
        f"--dependency={','.join(filter(None, waits))}" if any(waits) else None,
        f"--mail-user={mail.user}" if mail else None,
        f"--mail-type={','.join(event.upper() for event in mail.events)}" if mail else None,
        f"--export={','.join([*_ALWAYS, *site.environment])}" if site.environment else None,
    ]


_PLAIN = re.compile(r"[A-Za-z0-9_./+@,=:-]+")
_QUOTABLE = re.compile(r"[A-Za-z0-9_./+@,=: -]+")
"""What #SBATCH lines take as it is, and in double quotes."""


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else f'"{value}"'


def _option_of_site(option: str) -> str:
    """Quote the value of an option, so that it stays one word."""
    name, equals, value = option.partition("=")
    is_whole = _PLAIN.fullmatch(value) or (
        value[:1] == value[-1:] and value[:1] in "\"'" and len(value) > 1
    )
    return option if not equals or is_whole else f'{name}="{value}"'


def _job_name(plan: Plan, batch: Batch) -> str:
    """The run folder's name, an array's that of the folder around its runs; the recipe's if it is odd."""
    first = batch.run_folders[0]
    name = first.name if len(batch.run_folders) == 1 else first.parent.name
    return name if _QUOTABLE.fullmatch(name) else plan.recipe.recipe


def _where_an_admin_looks(batch: Batch) -> list[str]:
    """Comment and output file; a path that #SBATCH lines cannot hold has neither."""
    first = batch.run_folders[0]
    is_array = len(batch.run_folders) > 1
    folder = first.parent if is_array else first
    if not _QUOTABLE.fullmatch(str(folder)):
        return ["--output=/dev/null"]
    name = "slurm-%A_%a.out" if is_array else "logs/slurm-%j.out"
    return [f'--comment="drumline {folder}"', f"--output={_quoted(f'{folder}/{name}')}"]


def _array(batch: Batch) -> str | None:
    if len(batch.run_folders) == 1:
        return None
    throttle = f"%{batch.at_most}" if batch.at_most else ""
    return f"--array=0-{len(batch.run_folders) - 1}{throttle}"


def _fabric(site: Site) -> dict[str, str]:
    found: dict[str, str] = {}
    if site.fabric.interface:
        found |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), site.fabric.interface)
    if site.fabric.infiniband:
        found["NCCL_IB_HCA"] = site.fabric.infiniband
    return found


def _mounts(container: Container, run_folder: Path) -> list[str]:
    return [*container.mounts, str(run_folder)]


def _pyxis(container: Container, run_folder: Path) -> list[str]:
    mounts = [m if ":" in m else f"{m}:{m}" for m in _mounts(container, run_folder)]
    return [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]


def _apptainer(container: Container, run_folder: Path) -> list[str]:
    binds = [part for mount in _mounts(container, run_folder) for part in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *binds, container.image]


@cache
def _template(name: str) -> Template:
    """Return the parsed template; its filter `quoted` quotes a value, and an undefined name is an error."""
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - a shell script, where every value is quoted
        loader=FileSystemLoader(Path(__file__).parent),
    )
    environment.filters["quoted"] = lambda value: shlex.quote(str(value))
    return environment.get_template(name)
