"""Runs one of our programs, and writes down what no message may lead to.

python -m tests.integration.support.watched MODULE HOME:FUNCTION ARGUMENTS...

The watch begins with the first call of FUNCTION in the module HOME, which takes the first message.
The environment has WATCH_REPORT, a file for what was found; WATCH_FOLDERS, the only ones to write
into, separated by colons; and WATCH_NAMES, names in messages that nobody may import or open.
"""

from __future__ import annotations

import os
import runpy
import sys
from types import FrameType
from typing import Any

PATHS_CHANGED = {
    "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
    "os.truncate", "shutil.copyfile", "shutil.move", "shutil.rmtree", "tempfile.mkdtemp",
    "tempfile.mkstemp",
}  # fmt: skip
ALWAYS = {
    "ftplib.connect", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system",
    "pty.spawn", "smtplib.connect", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname",
    "subprocess.Popen", "urllib.Request", "webbrowser.open",
}  # fmt: skip
"""Events that a program of ours never causes once it has started."""
UNLESS_IMPORTING = {"compile", "exec", "marshal.load", "marshal.loads", "ctypes.dlopen"}
"""What importing a module does; outside of an import it would be code from elsewhere."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SPECIAL = ("/dev/", "/proc/")

report = os.open(os.environ["WATCH_REPORT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
folders = tuple(map(os.path.realpath, os.environ["WATCH_FOLDERS"].split(":")))
forbidden = set(os.environ["WATCH_NAMES"].split(","))
is_armed = False


def arm() -> None:
    """Begin; a report that has no pickle at its start shows that the hook sees nothing."""
    global is_armed
    import pickle

    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.load = lambda *_, **__: found("torch.load", ())
    is_armed = True
    pickle.loads(pickle.dumps(os.getcwd))


def found(event: str, arguments: tuple[Any, ...]) -> None:
    frame: FrameType | None = sys._getframe(2)
    stack: list[str] = []
    while frame is not None and len(stack) < 12:
        stack.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    os.write(report, f"{event} {arguments!r:.300} at {' < '.join(stack)}\n".encode())


def is_within(*parts: str) -> bool:
    """Whether a frame above is of a file whose name has one of these in it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in parts):
            return True
        frame = frame.f_back
    return False


def is_outside(path: object) -> bool:
    if not isinstance(path, (str, bytes)):
        return False  # A number of an open file.
    text = os.fsdecode(path)
    return not text.startswith(SPECIAL) and not os.path.realpath(text).startswith(folders)


def is_named(path: object) -> bool:
    """Whether a path has a part that a message has given it."""
    text = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
    return any(part.partition(".")[0] in forbidden for part in text.split("/"))


class Imports:
    """Is asked for every module that is not loaded yet; audit events tell of some imports only."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name.partition(".")[0] in forbidden:
            found("import", (name,))


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook."""
    if not is_armed:
        return
    is_bad = event in ALWAYS or event == "pickle.find_class"
    if event == "open":
        path, _, flags = arguments
        is_bad = bool(flags & WRITES and is_outside(path)) or is_named(path)
    elif event in PATHS_CHANGED:
        is_bad = any(is_outside(argument) for argument in arguments[:2])
    elif event in UNLESS_IMPORTING:
        is_bad = not is_within("<frozen importlib")
    # numba keeps compiled kernels in a cache of this machine's user, with pickles.
    if is_bad and (event in ALWAYS or not is_within("/numba/")):
        found(event, arguments)


def main() -> None:
    module, armed_by = sys.argv[1:3]
    del sys.argv[1:3]
    home, _, name = armed_by.partition(":")
    __import__(home)
    original = getattr(sys.modules[home], name)

    def armed(*arguments: Any, **named: Any) -> Any:
        if not is_armed:
            arm()
        return original(*arguments, **named)

    setattr(sys.modules[home], name, armed)
    sys.meta_path.insert(0, Imports)
    sys.addaudithook(watch)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
