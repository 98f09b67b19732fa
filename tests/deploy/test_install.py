"""`install.sh` on a device that is made up: a Python that notes what it is asked for."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.tools import DEPLOY, output_of, tool

SCRIPT = DEPLOY / "edge/install.sh"
JOIN = "fedmezo1:secret"
PYTHON = f"""#!/bin/sh
# Stands for Python: makes an environment with itself and a worker in it, and installs nothing.
echo "$*" >> "$ASKED"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
    printf '#!/bin/sh\\necho fedmezo-worker 9.9\\n' > "$3/bin/fedmezo-worker"
    chmod 755 "$3/bin/fedmezo-worker" ;;
  "-m pip "*) ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
SYSTEMCTL = """#!/bin/sh
echo "systemctl $*" >> "$ASKED"
"""


class Device:
    """A home folder, and commands that are found before the machine's own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self.data = folder / "my rows.jsonl"
        self.data.touch()
        (folder / "bin").mkdir()
        # The script has no right to act as root on the machine that tests it.
        for name, text in {
            "python3": PYTHON,
            "systemctl": SYSTEMCTL,
            "loginctl": "#!/bin/sh\n",
            "id": '#!/bin/sh\n[ "$1" = -u ] && echo 1000 || echo me\n',
            "nvidia-smi": "#!/bin/sh\nexit 9\n",
        }.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.asked = folder / "asked"
        self.asked.touch()
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "ASKED": str(self.asked),
        }

    def run(self, *arguments: str | Path, status: int = 0, **more: str) -> str:
        return output_of(
            "sh", SCRIPT, *arguments, status=status, env=self.environment | more, cwd=self.home
        )

    def files(self) -> dict[str, bytes]:
        """Every file in the home folder."""
        return {
            str(one.relative_to(self.home)): one.read_bytes()
            for one in self.home.rglob("*")
            if one.is_file()
        }


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_the_linter_has_nothing_to_say() -> None:
    output_of(tool("shellcheck"), SCRIPT, DEPLOY / "slurm/site.sbatch")


def test_one_command_makes_a_worker_and_the_second_time_changes_nothing(device: Device) -> None:
    said = device.run(JOIN, "--data", device.data, "--set", "threads = 2")
    assert "torch>=2.6 from https://download.pytorch.org/whl/cpu" in said
    config = device.home / ".config/fedmezo"
    settings = tomllib.loads((config / "worker.toml").read_text())
    assert settings["data"] == str(device.data)
    assert settings["threads"] == 2
    # A coordinator may have one run or many.
    assert Path(settings["journal_copy"]).is_dir()
    assert (config / "worker.env").read_text() == f"FEDMEZO_WORKER_JOIN={JOIN}\n"
    assert (config / "worker.env").stat().st_mode & 0o077 == 0
    unit = (device.home / ".config/systemd/user/fedmezo-worker.service").read_text()
    assert f"{device.home}/.local/share/fedmezo/bin/fedmezo-worker --config" in unit
    assert JOIN not in unit + (config / "worker.toml").read_text()
    assert "systemctl --user restart fedmezo-worker" in device.asked.read_text()
    before = device.files()
    device.run(JOIN, "--data", device.data, "--set", "threads = 2")
    device.run()
    assert device.files() == before


def test_the_unit_is_one_that_systemd_takes(device: Device, tmp_path: Path) -> None:
    device.run("--data", device.data, "--no-service", FEDMEZO_JOIN=JOIN)
    assert "systemctl" not in device.asked.read_text()
    unit = device.home / ".config/systemd/user/fedmezo-worker.service"
    own = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert output_of(tool("systemd-analyze"), "--user", "verify", unit, env=own).strip() == ""


def test_uninstalling_leaves_the_identity_and_purging_does_not(device: Device) -> None:
    device.run(JOIN, "--data", device.data)
    key = device.home / ".local/state/fedmezo/worker/identity/key"
    key.parent.mkdir()
    key.touch()
    device.run("--uninstall")
    assert key.exists()
    assert not (device.home / ".local/share/fedmezo").exists()
    assert (device.home / ".config/fedmezo/worker.toml").exists()
    device.run("--uninstall", "--purge")
    assert device.files() == {}
    assert device.data.exists()
    device.run("--uninstall")


def test_a_folder_that_it_has_not_made_is_not_removed(device: Device) -> None:
    device.run(JOIN, "--data", device.data)
    mine = device.home / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    device.run("--uninstall", "--prefix", mine)
    assert (mine / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "rows"], "give the operator's join string"),
        ([JOIN], "--data is missing"),
        ([JOIN, "--data", "gone.jsonl"], "there is no gone.jsonl"),
        (["token", "--data", "rows"], "begins with fedmezo1:"),
        ([JOIN, "--dada", "rows"], "there is no flag --dada"),
        ([JOIN, "--data"], "--data needs a value"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_made(
    device: Device, arguments: list[str], said: str
) -> None:
    (device.home / "rows").touch()
    assert said in device.run(*arguments, status=2)
    assert set(device.files()) == {"rows"}


def test_a_gpu_gets_the_wheels_with_cuda(device: Device, tmp_path: Path) -> None:
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\n")
    said = device.run(JOIN, "--data", device.data)
    assert "NVIDIA GPU" in said
    assert "--index-url" not in device.asked.read_text()
