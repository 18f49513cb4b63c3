"""What does a cold `drumline plan` cost, against a process that only starts its libraries, and on what?

    python benchmarks/cold_plan.py [--rounds 20]

Runs them in turns, measures CPU seconds (user + system) of each process, and prints medians and their ratio to
the libraries: PyYAML, typer, and one pydantic model that validates one value. (A bare import of pydantic is shown
as well; since version 2.12 it imports next to nothing, and what a first model needs comes with that model.) Then
the phases of a plan, each by the CPU clock of its process. The aim is a ratio of at most 1.95.
`tests/test_layers.py` counts the modules that a dry run imports.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys

LIBRARIES = """
import yaml, typer
from pydantic import BaseModel, Field
class One(BaseModel):
    value: int = Field(ge=1)
One.model_validate({"value": 1})
"""
PROGRAMS = {
    "yaml, typer, one pydantic model": ["-c", LIBRARIES],
    "yaml, typer, import pydantic": ["-c", "import yaml, typer; from pydantic import BaseModel"],
    "drumline plan 8B": ["-m", "drumline.cli", "plan", "llama-8b-8xh100"],
    "drumline plan 8B --json": ["-m", "drumline.cli", "plan", "llama-8b-8xh100", "--json"],
}
PHASES = f"""
import time
at = [("interpreter", time.process_time())]
def done(phase):
    at.append((phase, time.process_time()))
{LIBRARIES}
done("libraries")
import gc
gc.disable()
import drumline.cli.plan
from drumline.recipe.load import load_recipe
from drumline.session import planning
done("modules of drumline")
recipe = load_recipe("recipes/llama-8b-8xh100.yaml", [])
world = planning.read_world(recipe, None)
done("recipe and files")
plan = planning.resolve(recipe, world)
done("plan and memory")
planning.with_advice(plan, world)
done("advice")
import json
spent = [at[0][1], *(later[1] - earlier[1] for earlier, later in zip(at, at[1:]))]
print(json.dumps(dict(zip((name for name, _ in at), spent))))
"""


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def phases() -> dict[str, float]:
    """CPU seconds of a plan by phase, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PHASES], check=True, capture_output=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # bytecode is cached, as after an install
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    parts = []
    for _ in range(rounds + 1):
        for name, arguments in PROGRAMS.items():
            times[name].append(cpu_seconds(arguments))
        parts.append(phases())
    base = statistics.median(times["yaml, typer, one pydantic model"][1:])
    print(f"{'process':<32} {'CPU ms, median':>15} {'ratio':>7}   ({rounds} rounds in turns)")
    for name, values in times.items():
        median = statistics.median(values[1:])
        print(f"{name:<32} {1000 * median:>15.0f} {median / base:>7.2f}")
    print(f"\n{'phase of a plan':<32} {'CPU ms, median':>15}")
    for name in parts[0]:
        print(f"{name:<32} {1000 * statistics.median(one[name] for one in parts[1:]):>15.0f}")


if __name__ == "__main__":
    main()
