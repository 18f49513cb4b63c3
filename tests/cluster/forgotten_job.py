"""What drumline learns of a job that Slurm's controller has forgotten; run by test_forgotten_jobs.py.

    unshare --mount --net python forgotten_job.py FOLDER [accounting]

In namespaces of its own: slurmdbd listens on all addresses, and /etc/hosts is a copy.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lab import HOSTS, Lab, wait

from conftest import tiny_recipe
from drumline.cluster import slurm
from drumline.cluster.limits import check_limits
from drumline.cluster.site import validate_site
from drumline.errors import LaunchError
from drumline.plan.resolve import resolve
from drumline.recipe.load import validate


def try_accounts(lab: Lab) -> list[str]:
    """What `submit` says of an account and a QOS that this user does not have, and of those that he has."""
    lab.ask("sacctmgr", "-i", "add", "account", "physics")
    lab.ask("sacctmgr", "-i", "add", "user", "root", "account=physics")
    wait(lambda: any(row[0] == "physics" for row in slurm.associations("root")), 60)
    plan = resolve(validate(tiny_recipe(cluster={"gpus_per_node": 2}), "r"))
    told = []
    for changes in (
        {"account": "chemistry"},
        {"account": "physics", "qos": "fast"},
        {"account": "physics"},
    ):
        try:
            check_limits(
                plan, validate_site({"site": "lab", "partition": "batch", **changes}, "s"), 1
            )
            told.append("")
        except LaunchError as error:
            told.append(str(error))
    return told


def main(folder: Path, accounting: bool) -> None:
    """Print the job's state before and after."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # Names are only looked up where some address is not 127.0.0.1.
    subprocess.run(["ip", "address", "add", "10.99.0.1/32", "dev", "lo"], check=True)
    shutil.copyfile(HOSTS, folder / "hosts")
    subprocess.run(["mount", "--bind", str(folder / "hosts"), str(HOSTS)], check=True)
    lab = Lab(folder / "lab")
    os.environ |= lab.environment
    try:
        if accounting:
            lab.start_accounting()
        lab.start()
        script = folder / "job.sh"
        script.write_text("#!/bin/bash\n#SBATCH --nodes=2 --output=/dev/null\nexit 3\n")
        job = slurm.submit(script)
        wait(lambda: lab.job(job).get("JobState") == "FAILED", 60)
        before = slurm.job_state(job)
        if (
            accounting
        ):  # a controller that is killed before it has told the database lets the job be lost
            asked = ("sacct", "-n", "-X", "-j", job, "-o", "State")
            wait(lambda: "FAILED" in lab.ask(*asked), 60)
        lab.kill("slurmctld")
        lab.start_controller(forgetful=True)
        wait(lambda: "batch" in lab.ask("sinfo", "-h", "-o", "%P"), 60)
        after = wait(lambda: (found := slurm.job_state(job)) and found.is_final and found, 60)
        assert before
        accounts = try_accounts(lab) if accounting else []
        states = [dataclasses.asdict(state) for state in (before, after)]
        print(json.dumps([*states, accounts]))
    finally:
        lab.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "accounting" in sys.argv[2:])
