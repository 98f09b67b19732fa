"""The coordinator's image itself: built, and started as locked up as compose and the chart do."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator

import pytest

from tests.deploy.tools import DEPLOY, ROOT, TOOLS, output_of

BASE = os.environ.get("FEDMEZO_TEST_PYTHON_IMAGE", "python:3.11.13-slim-bookworm")
"""The image below; another one where no registry is in reach."""
OPTIONS = shlex.split(os.environ.get("FEDMEZO_TEST_BUILD_OPTIONS", ""))
"""More options for the build: volumes with the machine's certificates, a network."""
LOCKED = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
STATE = "/var/lib/fedmezo/coordinator"
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def engine() -> str:
    """Podman or Docker, with the base image."""
    if not TOOLS:
        pytest.skip("make test-deploy builds the coordinator's image")
    for name in ("podman", "docker"):
        if shutil.which(name) is None or _fails(name, "info"):
            continue
        if _fails(name, "image", "inspect", BASE) and _fails(name, "pull", BASE):
            pytest.skip(f"{name} neither has {BASE} nor can fetch it")
        return name
    pytest.skip("neither podman nor a Docker engine runs here, so no image is built")


@pytest.fixture(scope="module")
def image(engine: str) -> Iterator[str]:
    name = f"fedmezo-test-{uuid.uuid4().hex[:8]}"
    docker_format = ["--format=docker"] if engine == "podman" else []
    output_of(
        *[engine, "build", *docker_format, *OPTIONS, f"--build-arg=PYTHON_IMAGE={BASE}"],
        "--file",
        DEPLOY / "docker/coordinator.Dockerfile",
        "--target=coordinator",
        "--tag",
        name,
        ROOT,
        timeout=800,
    )
    yield name
    output_of(engine, "image", "rm", name)


@pytest.fixture
def volume(engine: str) -> Iterator[str]:
    name = f"fedmezo-test-{uuid.uuid4().hex[:8]}"
    output_of(engine, "volume", "create", name)
    yield name
    output_of(engine, "volume", "rm", name)


@pytest.mark.timeout(900)
def test_the_image_is_small_and_nobody_in_it_is_root(engine: str, image: str) -> None:
    sizes = [
        int(output_of(engine, "image", "inspect", "--format={{.Size}}", one))
        for one in (image, BASE)
    ]
    assert sizes[0] - sizes[1] < 200e6
    inside = [engine, "run", "--rm", "--network=none", "--no-healthcheck", "--entrypoint=sh", image]
    assert output_of(*inside, "-c", "id").startswith("uid=65532(fedmezo) gid=65532(fedmezo)")
    assert output_of(*inside, "-c", "ls -A /var/lib/fedmezo; test ! -e /build") == ""


@pytest.mark.timeout(900)
def test_it_serves_a_fleet_from_a_system_that_cannot_be_written_and_stops_with_status_0(
    engine: str, image: str, volume: str
) -> None:
    options = [*LOCKED, "--network=none", "--no-healthcheck", f"--volume={volume}:/var/lib/fedmezo"]
    init = ["init", f"--state={STATE}", "--name=fleet.example.org"]
    output_of(engine, "run", "--rm", *options, image, *init)
    serve = [f"--state={STATE}", "--runs=/var/lib/fedmezo/runs"]
    started = output_of(engine, "run", "--detach", *options, image, *serve).split()[-1]
    try:
        probe = json.loads(output_of(engine, "image", "inspect", image))[0]["Config"]
        [kind, *health] = probe["Healthcheck"]["Test"]
        assert kind == "CMD"
        until = time.monotonic() + PATIENCE_S
        while _fails(engine, "exec", started, *health):
            assert time.monotonic() < until, output_of(engine, "logs", started)
        token = ["fedmezo", "token", "create", f"--state={STATE}", "--name=clinic-a"]
        assert "fedmezo1:" in output_of(engine, "exec", started, *token)
        output_of(engine, "stop", "--time=60", started)
        assert output_of(engine, "wait", started).split()[-1] == "0"
    finally:
        output_of(engine, "rm", "--force", started)


def _fails(*command: str) -> bool:
    done = subprocess.run(command, capture_output=True, check=False, timeout=300)
    return done.returncode != 0
