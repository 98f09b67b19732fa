"""One job under POC, for the benchmark: it says what the job's server says."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from pathlib import Path

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import PocEnv
from nvflare.recipe.spec import Recipe

from benchmarks.integrations import nvflare_fedavg
from benchmarks.integrations.rounds_over import BATCH_SIZE, LOCAL_STEPS, WORKERS, contract
from fedmezo_nvflare import FedMezoRecipe

TASK_REQUEST_INTERVAL_S = 0.05
"""For both: NVFlare's own 2 s would be most of a round."""


def fedavg(rounds: int, model: str, data: str) -> Recipe:
    """NVFlare's FedAvg as its recipe has it."""
    # NVFlare takes a path in a package for the package's own.
    shutil.copy(nvflare_fedavg.__file__, "train.py")
    recipe = FedAvgRecipe(
        name="fedavg",
        model=nvflare_fedavg.Model(model),
        min_clients=len(WORKERS),
        num_rounds=rounds,
        train_script="train.py",
        train_args=f"--model {model} --data {data} --steps {LOCAL_STEPS} --batch-size {BATCH_SIZE}",
        launch_external_process=True,
    )
    recipe._job.set_app_packages(["benchmarks"])  # It is installed here.
    recipe.add_server_config({"server": {"task_request_interval": TASK_REQUEST_INTERVAL_S}})
    recipe.add_client_config({"default_task_fetch_interval": TASK_REQUEST_INTERVAL_S})
    return recipe


def fedmezo(rounds: int, model: str) -> Recipe:
    """A run of ours."""
    return FedMezoRecipe(
        contract=contract(rounds),
        model=model,
        task_request_interval=TASK_REQUEST_INTERVAL_S,
    )


def say_what_the_server_says() -> None:
    """Repeat the console of the server, as it grows."""
    workspace, shown = Path(os.environ["NVFLARE_POC_WORKSPACE"]), 0
    while True:
        for console in workspace.rglob("server/poc_console.log"):
            text = console.read_text(errors="replace")
            print(text[shown:], end="", flush=True)
            shown = len(text)
        time.sleep(0.02)


def main() -> None:
    """Run the job that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["fedmezo", "fedavg"])
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--project", required=True)
    given = parser.parse_args()
    if given.kind == "fedmezo":
        recipe = fedmezo(given.rounds, given.model)
    else:
        recipe = fedavg(given.rounds, given.model, given.data)
    threading.Thread(target=say_what_the_server_says, daemon=True).start()
    run = recipe.execute(PocEnv(num_clients=len(WORKERS), project_conf_path=given.project))
    run.get_result(timeout=3600, clean_up=False)
    print(json.dumps({"status": run.get_status()}), flush=True)


if __name__ == "__main__":
    main()
