"""A FedMeZO run as a job of NVIDIA FLARE: two sites, in its simulator or in processes of their own.

    export FEDMEZO_WORKER_DATA='/where/the/rows/are/{site}.jsonl'
    python job.py --model MODEL          # NVFlare's simulator
    python job.py --model MODEL --poc    # a server and two sites, with NVFlare's mutual TLS

MODEL is a model folder or a hub name. Each site names its own rows; here both do it in the
environment. The last line of the output says how the run ended.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

from nvflare.recipe import PocEnv, SimEnv
from nvflare.recipe.spec import ExecEnv

from fedmezo_nvflare import FedMezoRecipe, ScalarPrivacy


def main() -> None:
    """Build the job, run it, and show its result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path(__file__).with_name("run.toml"))
    parser.add_argument("--model", default="", help="if not the name that the contract gives")
    parser.add_argument("--rate-rows", help="file of rows to measure the learning rate on")
    parser.add_argument("--poc", action="store_true", help="use provisioned processes")
    parser.add_argument("--project", default="", help="project file to provision from")
    parser.add_argument("--workspace", default="/tmp/nvflare/simulation", help="the simulator's")
    parser.add_argument("--clip", type=float, help="clip what leaves a site to this size")
    parser.add_argument("--noise-multiplier", type=float, default=0.0, help="noise in clips")
    parser.add_argument("--journal", default="", help="file on the server to go on from")
    given = parser.parse_args()

    contract = tomllib.loads(given.run.read_text())["run"]
    recipe = FedMezoRecipe(
        contract=contract,
        model=given.model,
        rate_rows=given.rate_rows,
        journal=given.journal,
        privacy=None if given.clip is None else ScalarPrivacy(given.clip, given.noise_multiplier),
        task_request_interval=0.05,  # seconds; both sites are on this machine
    )
    sites: int = contract["workers_min"]
    env: ExecEnv
    if given.poc:
        env = PocEnv(num_clients=sites, project_conf_path=given.project)
    else:
        env = SimEnv(num_clients=sites, workspace_root=given.workspace)
    folder = recipe.execute(env).get_result(timeout=3600, clean_up=False)
    result = next(Path(folder or ".").rglob("fedmezo_result.json"), None)
    if result is None:
        parser.exit(1, f"The run did not finish; read the logs below {folder}.\n")
    print(json.dumps({"folder": str(result.parent), **json.loads(result.read_text())}))


if __name__ == "__main__":
    main()
