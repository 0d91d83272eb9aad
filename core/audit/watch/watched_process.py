"""The process that an audited evaluation runs in; isolation.py starts `python -I -S watched_process.py REQUEST.json`.

The hook is there before anything is imported, site included. It sees what Python does; what a library does natively is
for the system to see. The request names `module:function`, its keyword arguments, further folders to import from, and
where announced inputs and the response go; standard input is a pipe whose end means that the parent is gone.
"""

import sys

OPENED: dict[tuple[str | bytes, int, str, bool], None] = {}
"""(path, flags of os.open, working folder if the path is relative, whether the file was there before)."""
NETWORK: dict[str, None] = {}
EXECUTED: dict[str, None] = {}
_posix = sys.modules["posix"]  # built in and loaded before any code runs


def _exists(path: str | bytes) -> bool:
    try:
        _posix.stat(path)
    except (OSError, ValueError):
        return False
    return True


def _file(path: object, flags: int) -> None:
    if isinstance(path, str | bytes):  # else a number, of a file that was opened before
        absolute, there = path[:1] in ("/", b"/"), _exists(path)
        if there or flags & _posix.O_CREAT or not absolute:  # a relative name may belong to a folder handle
            OPENED[path, flags, "" if absolute else _folder(), there] = None


def _folder() -> str:
    try:
        return _posix.getcwd()
    except OSError:  # it was deleted, and a hook must not raise
        return "/"


def _program(path: object, arguments: object) -> None:
    words = [path, *arguments[1:]] if isinstance(arguments, list | tuple) else [path if path else arguments]
    EXECUTED[" ".join(map(_text, words))] = None


def _text(word: object) -> str:
    return word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)


def hook(event: str, arguments: tuple) -> None:
    """Note what the report needs of an audit event; called very often, so most events leave at once."""
    if event == "open":
        _file(arguments[0], arguments[2] or 0)
    elif event == "import":
        if isinstance(arguments[1], str):  # an extension, which the system's loader opens
            _file(arguments[1], 0)
    elif event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        if arguments[1] is not None:  # sendmsg without an address: over a connection that was noted
            local = isinstance(arguments[1], str | bytes)
            NETWORK[f"{event} unix {_text(arguments[1])}" if local else f"{event} {arguments[1]!r}"] = None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        NETWORK[f"{event} {arguments[0]!r}"] = None
    elif event in ("subprocess.Popen", "os.posix_spawn", "os.exec"):
        _program(arguments[0], arguments[1])
    elif event == "os.system":
        _program("/bin/sh", ["sh", "-c", arguments[0]])
    elif event in ("os.fork", "os.forkpty"):
        EXECUTED[f"({event}: a copy of the process)"] = None
    elif event == "ctypes.dlopen" and isinstance(arguments[0], str) and "/" in arguments[0]:
        _file(arguments[0], 0)  # a bare name is one of the system's, found by the loader


sys.addaudithook(hook)


def _follow_parent() -> None:
    """End with the parent: its end of the pipe closes however it dies."""
    while _posix.read(0, 1):
        pass
    _posix._exit(1)


def _listed() -> dict[str, list]:
    """Return what the hook has seen; paths are real ones."""
    import os

    opened = [
        [os.path.realpath(os.path.join(folder, os.fsdecode(name))), flags, there]
        for name, flags, folder, there in OPENED.copy()
    ]
    return {"opened": opened, "network": list(NETWORK), "executed": list(EXECUTED)}


def main(path: str) -> int:
    """Run the request in the file `path`, write the response and return 0, or 1 if the function raised."""
    import _thread

    _thread.start_new_thread(_follow_parent, ())
    import site

    site.main()
    root = __file__.rsplit("/", 4)[0]
    if root not in sys.path:  # a checkout, installed as editable or not at all
        sys.path.insert(0, root)
    import importlib
    import json
    import traceback

    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    sys.path += [
        folder for folder in request["paths"] if folder not in sys.path
    ]  # after site: no code of theirs starts
    import core.files

    core.files.TELL = open(request["announced"], "ab", buffering=0)  # noqa: SIM115 - open to the end
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed where the audit was started
            setattr(sys, name, open("/dev/null", "w"))  # noqa: SIM115 - open to the end
    value, error = None, None
    try:
        module, _, name = request["function"].partition(":")
        value = getattr(importlib.import_module(module), name)(**request["arguments"])
        json.dumps(value)
    except BaseException as raised:
        kind = type(raised)
        error = {
            "kind": f"{kind.__module__}.{kind.__qualname__}",
            "message": str(raised),
            "traceback": traceback.format_exc(),
        }
        value = None
    response = {
        "value": value,
        "error": error,
        "events": _listed(),
        "announced": list(core.files.OPENED),
        "process": _posix.getpid(),
        "modules": [file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))],
        "packages": sorted({name.partition(".")[0] for name in sys.modules}),
    }
    with open(f"{request['response']}.part", "w", encoding="utf-8") as file:
        json.dump(response, file)
    _posix.rename(f"{request['response']}.part", request["response"])  # whole, or not there
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
