"""The ClientApp: it hands each message to a worker outside of Flower, and loads no model itself.

Flower starts a process for each message and ends it afterwards. A model would have to be loaded
each time, so it lives in a worker that stays.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedmezo_core.errors import ConfigError, UnavailableError
from fedmezo_worker.resident import ask

log = logging.getLogger("fedmezo.flower")

RECORD: Final = "fedmezo"
"""Name of the only record of a message and of its reply."""
SOCKET_KEY: Final = "fedmezo-socket"
"""Key of the node's configuration: the path of its resident worker's socket."""
SETTINGS_KEY: Final = "fedmezo-worker"
"""Key of the node's configuration: the TOML file of the worker that it starts."""

app = ClientApp()


@app.train("fedmezo")
def exchange(message: Message, context: Context) -> Message:
    """Hand the coordinator's bytes to this node's resident worker, and reply with its bytes."""
    asked = record_in(message)
    worker, up = ask(
        node_path(context, SOCKET_KEY, "the socket of its resident worker"),
        f"flower {context.run_id}",
        bytes_in(asked, "genesis"),
        bytes_in(asked, "down"),
    )
    return _reply(ConfigRecord({"worker": worker, "up": up}), message)


@app.train("fedmezo_beside")
def take_part(message: Message, context: Context) -> Message:
    """Start a worker that connects to the coordinator named in the message; reply when it ends."""
    asked = record_in(message)
    settings = node_path(context, SETTINGS_KEY, "the TOML file of its worker's settings")
    given = {key: str(asked.get(key, "")) for key in ("coordinator", "run_id", "checkpoint_key")}
    status = subprocess.run(worker_command(settings, given), check=False).returncode
    if status != 0:
        raise UnavailableError(
            f"The worker that this node started ended with status {status}; look at the log of "
            "this SuperNode."
        )
    return _reply(ConfigRecord({"status": status}), message)


def worker_command(settings: Path, given: dict[str, str]) -> list[str]:
    """The command of a worker with the node's settings; they come before what was `given`."""
    try:
        own = tomllib.loads(settings.read_text())
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read as TOML: %s", settings, error)
        # Flower sends this sentence to the server, which has no use for a path or its lines.
        raise ConfigError(
            f"The file that {SETTINGS_KEY} of this node's configuration names cannot be read as "
            f"TOML ({type(error).__name__}); its SuperNode's log says why."
        ) from None
    flags = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in given.items()
        if value and key not in own
    ]
    return [sys.executable, "-m", "fedmezo_worker", f"--config={settings}", *flags]


def node_path(context: Context, key: str, what: str) -> Path:
    """A path that the node's own configuration names; raises `ConfigError` if it does not."""
    value = context.node_config.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"This node's configuration does not name {what}; start its SuperNode with "
            f"--node-config '{key}=\"/a/path\"'."
        )
    return Path(value).expanduser()


def record_in(message: Message) -> ConfigRecord:
    """The only record of a message or reply; raises `ConfigError` if it is not there."""
    found = message.content.config_records.get(RECORD)
    if found is None:
        raise ConfigError(
            f"The message has no record {RECORD}; run the app of fedmezo_flower in the ServerApp "
            "and on the nodes."
        )
    return found


def bytes_in(record: ConfigRecord, key: str) -> bytes:
    """The bytes of a record; raises `ConfigError` if it has none under that key."""
    value = record.get(key)
    if not isinstance(value, bytes):
        raise ConfigError(
            f"The message has no bytes {key}; use the same FedMeZO version in the ServerApp and "
            "on the nodes."
        )
    return value


def _reply(record: ConfigRecord, message: Message) -> Message:
    return Message(RecordDict({RECORD: record}), reply_to=message)
