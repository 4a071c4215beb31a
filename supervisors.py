#!/usr/bin/env python3
"""Run, restart, log and watch the programs of a TOML file; be the init of a container.

Copy this file anywhere; it needs Python 3.11 and nothing else.

    python3 supervisors.py supervisors.toml     run the programs of a file
    python3 supervisors.py status               ask the running supervisor
    python3 supervisors.py -- COMMAND           be the init of one command

The file reads from top to bottom; code uses only what stands above it.

    1   Init mode        one command under an init; first, since it imports next to nothing
    2   Configuration    the keys, their checks, `load_config`
    3   State machine    `step`: what follows what, as values
    4   Log text         lines and their formats
    5   Log files        rotation, the terminal, the log thread
    6   Processes        spawn, signal, leftovers
    7   Health           checks and the notify socket
    8   Supervisor       the loop that owns everything
    9   HTTP             routes, the page
    10  Client           the verbs, the library's client, the command line

Three rules hold it together:

1.  The core (configuration, state machine, log text) does no I/O and reads no clock:
    `now` is passed in.
2.  The main thread owns every program's state; the log thread owns pipes and log files;
    HTTP threads read published, immutable statuses, and ask the main thread for the rest.
3.  Every state that waits owns a deadline or names the event that it waits for.
"""

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 11):
    sys.stderr.write(
        "supervisors needs Python 3.11 or newer, this is %d.%d\n" % sys.version_info[:2]
    )
    sys.exit(2)

import signal
import time

__version__ = "1.0"
__all__ = [
    "Client",
    "Config",
    "ConfigError",
    "Program",
    "State",
    "Status",
    "Supervisor",
    "SupervisorError",
    "load_config",
    "running",
]

# === 1. Init mode =====================================================================
#
# One command, and what an init owes it: signals are passed on, the terminal is handed
# over, orphans are reaped, and what the command leaves behind is ended.
#
# All signals are blocked and taken one by one with sigwait(3): there are no handlers,
# so nothing is lost and nothing runs in between. A blocked signal is queued even for
# PID 1, whose default actions the kernel ignores (pid_namespaces(7)).
#
# This section stands first because of its price: compiling the file takes most of the
# 25 ms that a container's start may cost, so nothing below is run, or imported, for it.

GRACE = 3.0  # seconds that what a command leaves behind has between TERM and KILL
TICK = 0.05  # seconds between two looks at what is left, while something is
STOPS = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
COERCED = {"C.UTF-8", "C.utf8", "UTF-8"}  # values that PEP 538 gives LC_CTYPE
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def signal_number(name: str) -> int:
    """Return the number of a signal's name or number; ValueError if there is none."""
    if name.isdecimal() and int(name) in signal.valid_signals():
        return int(name)
    name = name.upper()
    try:
        return signal.Signals["SIG" + name.removeprefix("SIG")]
    except KeyError:
        raise ValueError(f"no such signal: {name!r}") from None


def original_environ() -> dict[str, str]:
    """Return the environment without the LC_CTYPE that the interpreter may have added.

    In a C locale CPython sets it for itself (PEP 538); programs must not see that.
    """
    environ = dict(os.environ)
    if environ.get("LC_CTYPE") not in COERCED:
        return environ
    try:
        with open("/proc/self/environ", "rb") as file:
            ours = b"\0LC_CTYPE=" not in b"\0" + file.read()
    except OSError:
        ours = not environ.get("LC_ALL") and environ.get("LANG", "C") in (
            "",
            "C",
            "POSIX",
        )
    if ours:
        del environ["LC_CTYPE"]
    return environ


def become_subreaper() -> bool:
    """Have orphaned descendants become our children; return whether they will.

    Without ctypes, and off Linux, they become those of PID 1.
    """
    if os.getpid() == 1:
        return True
    try:
        import ctypes  # 2 ms, and only needed here

        return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def process_table() -> dict[int, list[bytes]]:
    """Return the fields of /proc/PID/stat behind the name, by pid (proc(5)).

    [0] is the state, [1] the parent, [2] the group, [3] the session, [19] the start time
    in ticks since boot. Empty where there is no /proc.
    """
    table: dict[int, list[bytes]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return table
    for name in filter(str.isdecimal, names):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                stat = file.read()
        except OSError:
            continue  # it ended meanwhile
        table[int(name)] = stat[stat.rindex(b")") + 2 :].split()
    return table


def descendants(of: int, spare: Collection[int] = ()) -> list[int]:
    """Return the pids of the children of `of` and of all theirs, `spare` and its left out."""
    children: dict[int, list[int]] = {}
    for pid, fields in process_table().items():
        children.setdefault(int(fields[1]), []).append(pid)
    found = [pid for pid in children.get(of, ()) if pid not in spare]
    for pid in found:  # grows while it is read: a walk, breadth first
        found += [child for child in children.get(pid, ()) if child not in spare]
    return found


def send(pid: int, number: int) -> bool:
    """Send a signal to a process, to a group as -PGID; return whether it was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False  # it ended first, which is normal
    except PermissionError:
        return True  # a set-user-ID program: it is there, and not ours to signal
    return True


class Init:
    """One command under an init. `run` returns the exit status; main thread, once."""

    def __init__(
        self, command: list[str], single: bool, rewrites: dict[int, int], grace: float
    ) -> None:
        self.command = command
        self.single = single
        self.rewrites = rewrites
        self.grace = grace
        self.pid = 0
        self.code: int | None = None
        self.terms = 0
        self.foreground = False

    def run(self) -> int:
        signals = signal.valid_signals()
        inherited = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        if not become_subreaper() and sys.platform == "linux":
            os.write(
                2, b"supervisors: cannot become a subreaper: orphans go to PID 1\n"
            )
        self.foreground = in_foreground()
        here = open_here()
        self.pid = os.fork()
        if self.pid == 0:
            self.become_command(here, inherited)
        try:
            os.setpgid(self.pid, self.pid)  # here as well: whoever of the two is first
        except OSError:
            pass  # it did so itself, and has called exec since
        while self.code is None:
            self.pass_on(signal.sigwait(signals))
        self.sweep(signals)
        if self.foreground and not in_foreground():
            take_terminal(os.getpgrp())
        return self.code

    def become_command(self, here: int | None, inherited: object) -> None:
        """Turn this forked process into the command. Never returns."""
        code = 126
        try:
            os.setpgid(0, 0)
            if self.foreground:
                take_terminal(os.getpid())
            if here is not None:
                os.fchdir(here)
            # The interpreter ignores two signals for itself, and handles SIGINT.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            if inherited == signal.SIG_IGN:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            environ = original_environ()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvpe(self.command[0], self.command, environ)
        except OSError as error:
            code = 127 if isinstance(error, FileNotFoundError) else 126
            reason = "no such command" if code == 127 else error.strerror
            os.write(
                2, f"supervisors: cannot run {self.command[0]!r}: {reason}\n".encode()
            )
        finally:
            os._exit(code)

    def pass_on(self, number: int) -> None:
        """Do what a signal asks for."""
        if number == signal.SIGCHLD:
            self.reap()
            return
        self.terms += number == signal.SIGTERM
        target = self.rewrites.get(number, number)
        if target == 0:
            return
        if target in STOPS and not self.single:
            # The kernel ignores these for an orphaned group; SIGSTOP it does not.
            target = signal.SIGSTOP
        if target == signal.SIGCONT:
            self.resume()
            return
        self.forward(target)
        if number in STOPS:
            self.suspend()

    def forward(self, number: int) -> None:
        send(self.pid if self.single else -self.pid, number)

    def suspend(self) -> None:
        """Stop as the command has stopped, and go on together with it."""
        if can_be_continued():
            os.kill(os.getpid(), signal.SIGSTOP)
        self.resume()

    def resume(self) -> None:
        """Hand the terminal over again, if it is ours to give, and pass CONT on."""
        if self.foreground and in_foreground():
            take_terminal(self.pid)
        self.forward(signal.SIGCONT)

    def reap(self) -> bool:
        """Collect what has ended or stopped; return whether there are children left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.pid and os.WIFSTOPPED(status):
                self.suspend()
            elif pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code

    def sweep(self, signals: set[signal.Signals]) -> None:
        """End what the command left: TERM, `grace` seconds, KILL.

        Orphans are children by then; without a subreaper only the group is known, and
        its end makes no SIGCHLD: hence the ticks.
        """
        if not self.is_left():
            return
        self.signal_rest(signal.SIGTERM)
        self.signal_rest(signal.SIGCONT)  # a stopped process takes its TERM only then
        deadline = time.monotonic() + self.grace
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        while self.is_left() and time.monotonic() < deadline and self.terms < 2:
            number = signal.sigwait(signals)
            self.terms += number == signal.SIGTERM
            if number not in (signal.SIGCHLD, signal.SIGALRM):
                self.signal_rest(number)
        deadline = time.monotonic() + 1.0  # a process in the kernel's hands may take it
        while self.is_left() and time.monotonic() < deadline:
            self.signal_rest(signal.SIGKILL)
            signal.sigwait({signal.SIGCHLD, signal.SIGALRM})

    def is_left(self) -> bool:
        return self.reap() or send(-self.pid, 0)

    def signal_rest(self, number: int) -> None:
        if os.getpid() == 1:
            send(-1, number)  # everything that it may, itself excepted
            return
        send(-self.pid, number)
        for pid in descendants(os.getpid()):
            send(pid, number)


def in_foreground() -> bool:
    """Return whether standard input is a terminal whose foreground group is ours."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def take_terminal(group: int) -> None:
    """Make `group` the terminal's foreground group; SIGTTOU must be blocked."""
    try:
        os.tcsetpgrp(0, group)
    except OSError:
        pass  # the terminal is gone, or the group is: nothing that could be done


def can_be_continued() -> bool:
    """Return whether a shell of our session could continue us, were we to stop."""
    parent = os.getppid()
    return os.getpid() != 1 and parent != 0 and os.getsid(parent) == os.getsid(0)


def open_here() -> int | None:
    """Go to `/`, so that no mount is kept busy; return the way back for the command."""
    try:
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None  # unreadable or removed: the command stays here with us
    os.chdir("/")
    return here


def parse_init(arguments: list[str]) -> Init | None:
    """Return the init that the arguments ask for, None if `--` does not come first.

    Raises ValueError with what is wrong. By hand: argparse alone takes 8 ms to import.
    """
    rewrites: dict[int, int] = {}
    rest, single, grace = list(arguments), False, GRACE
    while "--" in rest:
        word = rest.pop(0)
        if word == "--":
            if not rest:
                raise ValueError("no command behind --")
            return Init(rest, single, rewrites, grace)
        if word in ("-c", "--single-child"):
            single = True
            continue
        option, equals, value = word.partition("=")
        if word.startswith("-r") and word != "-r":
            option, value = "-r", word[2:]
        elif not equals:
            value = rest.pop(0)
        if option in ("-r", "--rewrite"):
            rewrites.update([parse_rewrite(value)])
        elif option == "--grace":
            grace = parse_grace(value)
        else:
            return None
    return None


def parse_rewrite(text: str) -> tuple[int, int]:
    """Return the two numbers of `15:3` or `TERM:QUIT`; the second may be 0."""
    old, colon, new = text.partition(":")
    if not colon:
        raise ValueError(f"expected SIGNAL:SIGNAL, got {text!r}")
    source = signal_number(old)
    if source in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"{old} cannot be caught, so it cannot be rewritten")
    return source, 0 if new == "0" else signal_number(new)


def parse_grace(text: str) -> float:
    """Return seconds from 0 to a year."""
    try:
        grace = float(text)
    except ValueError:
        grace = -1.0
    if not 0 <= grace <= 31_536_000:
        raise ValueError(f"--grace: expected seconds >= 0, got {text!r}")
    return grace


if __name__ == "__main__":
    try:
        _init = parse_init(sys.argv[1:])
    except ValueError as _error:
        sys.stderr.write(f"supervisors: {_error}\n")
        sys.exit(2)
    if _init is not None:
        sys.exit(_init.run())

import contextlib
import enum
import errno
import fcntl
import functools
import heapq
import io
import re
import select
import selectors
import shlex
import socket
import stat
import subprocess
import threading
import tomllib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    NamedTuple,
    NoReturn,
    TypeVar,
    assert_never,
    get_type_hints,
)

if TYPE_CHECKING:
    import http.server

T = TypeVar("T")

# === 2. Configuration =================================================================
#
# A key is declared once, as the field of a tuple: its name, its type, its default, and
# in `Annotated` the check that converts a TOML value or refuses it. A table is read by
# `read_table`, which collects what is wrong instead of raising at the first mistake.
# Values are immutable and compare by value: a reload compares programs with `!=`.

NAME = re.compile(r"[A-Za-z0-9_.-]+")
VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_]\w*)(?::-([^}]*))?\})?")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", re.IGNORECASE)
MOST_INSTANCES = 10_000
NOWHERE = "/dev/null"
TERMINALS = {"/dev/stdout": 1, "/dev/stderr": 2}  # by descriptor, never opened by path


class SupervisorError(Exception):
    """What the user asked for cannot be done; the message says why."""


class ConfigError(SupervisorError):
    """A configuration is not valid; `errors` lists everything that is wrong with it."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = list(dict.fromkeys(errors))
        super().__init__("; ".join(self.errors))


class Check(NamedTuple):
    """What a key accepts: the words for it, and a function that raises ValueError."""

    expects: str
    convert: Callable[[Any], object]


def need(condition: object) -> None:
    if not condition:
        raise ValueError


def to_text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return value


def to_path(value: object) -> str:
    need(value != "")
    return to_text(value)


def to_words(value: object) -> tuple[str, ...]:
    need(isinstance(value, list))
    return tuple(to_text(word) for word in value)  # type: ignore[attr-defined]


def to_some(value: object) -> tuple[str, ...]:
    """Return the strings of a list, or a single one as a tuple."""
    return (to_text(value),) if isinstance(value, str) else to_words(value)


def to_command(value: object) -> str | tuple[str, ...]:
    need(value)
    return to_text(value) if isinstance(value, str) else to_words(value)


def to_variables(value: object) -> dict[str, str]:
    need(isinstance(value, dict))
    table: dict[str, str] = value  # type: ignore[assignment]
    need(all(name and "=" not in name and "\0" not in name for name in table))
    return {name: to_text(text) for name, text in table.items()}


def integers(least: int, most: float = float("inf")) -> Callable[[object], int]:
    """Return a check for an integer of a range; a boolean is none."""

    def convert(value: object) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError
        return value

    return convert


def to_seconds(value: object) -> float:
    need(type(value) in (int, float))
    seconds = float(value)  # type: ignore[arg-type]
    need(0 <= seconds <= 1e9)  # neither infinite nor NaN
    return seconds


def to_more_than_no_seconds(value: object) -> float:
    need(value != 0)
    return to_seconds(value)


def to_size(value: object) -> int:
    if isinstance(value, str):
        match = SIZE.fullmatch(value.strip())
        need(match)
        assert match
        return int(float(match[1]) * 1024 ** " KMG".index(match[2].upper() or " "))
    return integers(0)(value)


def to_signal(value: object) -> str:
    number = signal_number(to_text(value))
    return signal.Signals(number).name.removeprefix("SIG")


def to_umask(value: object) -> int:
    mask = int(to_text(value), 8)
    need(0 <= mask <= 0o777)
    return mask


def to_account(value: object) -> str | int:
    if type(value) is int:
        return integers(0, 2**32 - 2)(value)
    return to_path(value)


def to_rlimits(value: object) -> dict[str, int]:
    """Return limits by the kernel's name for them; -1 is none (setrlimit(2))."""
    import resource

    need(isinstance(value, dict))
    limits, errors = {}, []
    for name, limit in value.items():  # type: ignore[attr-defined]
        if not hasattr(resource, f"RLIMIT_{name.upper()}"):
            errors.append(f"{name}: no such limit")
            continue
        try:
            limits[name] = -1 if limit == "unlimited" else to_size(limit)
        except ValueError:
            errors.append(f'{name}: expected a size or "unlimited", got {shown(limit)}')
    if errors:
        raise ConfigError(errors)
    return limits


def one_of(*values: object) -> Callable[[object], object]:
    def convert(value: object) -> object:
        need(any(value == one and type(value) is type(one) for one in values))
        return value

    return convert


TEXT = Check("a string", to_text)
PATH = Check("a path", to_path)
WORDS = Check("a list of strings", to_words)
PATHS = Check("a path or a list of paths", to_some)
COMMAND = Check("a command: a string or a list of strings", to_command)
VARIABLES = Check("a table of strings", to_variables)
BOOLEAN = Check("true or false", one_of(True, False))
COUNT = Check("a whole number >= 0", integers(0))
POSITIVE = Check("a whole number >= 1", integers(1))
SECONDS = Check("seconds >= 0", to_seconds)
INTERVAL = Check("seconds > 0", to_more_than_no_seconds)
BYTES = Check('bytes, or a string such as "10MB"', to_size)
ACCOUNT = Check("a name or a number", to_account)
ENDING = Check('"ignore" or "shutdown"', one_of("ignore", "shutdown"))
LOG_FORMAT = Check(
    '"raw", "prefix", "timestamp" or "json"',
    one_of("raw", "prefix", "timestamp", "json"),
)


class Health(NamedTuple):
    """The table `healthcheck` of a program: one of three probes, and its times."""

    http: Annotated[str, TEXT] = ""
    tcp: Annotated[str, TEXT] = ""
    command: Annotated[str | tuple[str, ...], COMMAND] = ()
    interval: Annotated[float, INTERVAL] = 10.0
    timeout: Annotated[float, INTERVAL] = 3.0
    retries: Annotated[int, POSITIVE] = 3
    start_period: Annotated[float, SECONDS] = 30.0

    @property
    def argv(self) -> tuple[str, ...]:
        return split(self.command)


def to_health(value: object) -> Health:
    need(isinstance(value, dict))
    table: dict[str, object] = value  # type: ignore[assignment]
    errors: list[str] = []
    health = Health(**read_table(Health, table, str, errors))
    if not errors and sum(map(bool, (health.http, health.tcp, health.command))) != 1:
        errors.append("expected one of http, tcp and command")
    if health.http and not re.match(r"https?://[^/]", health.http):
        errors.append(f"http: expected a URL, got {health.http!r}")
    if health.tcp and not re.fullmatch(r".+:\d+", health.tcp):
        errors.append(f"tcp: expected HOST:PORT, got {health.tcp!r}")
    try:
        split(health.command)
    except ValueError as error:
        errors.append(f"command: {str(error).lower()}")
    if errors:
        raise ConfigError(errors)
    return health


class Program(NamedTuple):
    """One program, or one instance of it; the fields are the keys of the file."""

    name: str
    group: str
    number: int = 0
    command: Annotated[str | tuple[str, ...], COMMAND] = ()
    args: Annotated[tuple[str, ...] | None, WORDS] = None
    numprocs: Annotated[
        int,
        Check(
            f"a whole number from 1 to {MOST_INSTANCES}", integers(1, MOST_INSTANCES)
        ),
    ] = 1
    directory: Annotated[str | None, PATH] = None
    environment: Annotated[Mapping[str, str], VARIABLES] = {}
    env_file: Annotated[tuple[str, ...], PATHS] = ()
    inherit_env: Annotated[
        bool | tuple[str, ...],
        Check(
            "true, false or a list of names",
            lambda value: value if isinstance(value, bool) else to_words(value),
        ),
    ] = True
    user: Annotated[str | int | None, ACCOUNT] = None
    group_name: Annotated[str | int | None, ACCOUNT] = None
    umask: Annotated[int | None, Check('an octal string such as "022"', to_umask)] = (
        None
    )
    nice: Annotated[
        int | None, Check("a whole number from -20 to 19", integers(-20, 19))
    ] = None
    rlimits: Annotated[Mapping[str, int], Check("a table of limits", to_rlimits)] = {}
    autostart: Annotated[bool, BOOLEAN] = True
    autorestart: Annotated[
        bool | str,
        Check('true, false or "unexpected"', one_of(True, False, "unexpected")),
    ] = False
    exitcodes: Annotated[
        tuple[int, ...],
        Check(
            "a list of codes from 0 to 255",
            lambda value: tuple(map(integers(0, 255), [*value])),
        ),
    ] = (0,)
    startsecs: Annotated[float, SECONDS] = 1.0
    startretries: Annotated[int | None, COUNT] = None
    backoff_delay: Annotated[float, SECONDS] = 0.5
    backoff_limit: Annotated[float, SECONDS] = 30.0
    stopsignal: Annotated[str, Check("the name of a signal", to_signal)] = "TERM"
    stopwaitsecs: Annotated[float, SECONDS] = 8.0
    stopasgroup: Annotated[bool, BOOLEAN] = True
    type: Annotated[
        str,
        Check('"simple", "oneshot" or "notify"', one_of("simple", "oneshot", "notify")),
    ] = "simple"
    watchdog_secs: Annotated[float | None, INTERVAL] = None
    depends_on: Annotated[tuple[str, ...], WORDS] = ()
    healthcheck: Annotated[Health | None, Check("a table", to_health)] = None
    on_success: Annotated[str, ENDING] = "ignore"
    on_failure: Annotated[str, ENDING] = "ignore"
    logfile: Annotated[str | None, PATH] = None
    stderr_logfile: Annotated[str | None, PATH] = None
    logfile_maxbytes: Annotated[int, BYTES] = 10 * 1024 * 1024
    logfile_backups: Annotated[int, COUNT] = 3
    log_format: Annotated[str | None, LOG_FORMAT] = None

    @property
    def argv(self) -> tuple[str, ...]:
        """The argument vector; with `args`, a string is the executable itself."""
        if self.args is None:
            return split(self.command)
        first = (self.command,) if isinstance(self.command, str) else self.command
        return first + self.args


class Config(NamedTuple):
    """A whole configuration; `path` is the file's real path, "" if it has none."""

    path: str = ""
    programs: Mapping[str, Program] = {}
    listen: Annotated[
        tuple[str, ...], Check("an address or a list of them", to_some)
    ] = ("localhost:3000",)
    control: Annotated[str, TEXT] = "auto"
    token: Annotated[str, TEXT] = ""
    token_file: Annotated[str, TEXT] = ""
    allowed_hosts: Annotated[tuple[str, ...], WORDS] = ()
    include: Annotated[tuple[str, ...], WORDS] = ()
    exit_when_done: Annotated[bool, BOOLEAN] = False
    log_format: Annotated[str, LOG_FORMAT] = "prefix"
    pidfile: Annotated[str | None, PATH] = None
    shutdown_timeout: Annotated[float | None, SECONDS] = None


# The TOML key of a field that cannot have its name: `group` is the user's group there,
# and in the status, as in supervisord, the group of a program's instances.
KEYS = {"group_name": "group"}


def declared(kind: type) -> dict[str, tuple[str, Check]]:
    """Return the fields of a tuple class and their checks, by TOML key."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        KEYS.get(field, field): (field, hint.__metadata__[0])
        for field, hint in hints.items()
        if hasattr(hint, "__metadata__")
    }


def shown(value: object) -> str:
    """Return a value as the file has it, cut to a line."""
    text = (
        {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    )
    text = text or repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def hint(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?`, or nothing if no known name is near."""
    import difflib  # only for somebody's mistake

    near = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""


def split(command: str | tuple[str, ...]) -> tuple[str, ...]:
    """Split a string as a shell splits words, without running one."""
    return tuple(shlex.split(command)) if isinstance(command, str) else command


def expand(value: Any, variables: Mapping[str, str]) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in all strings of a value.

    `$${` is a literal `${`, a lone `$` stays. Raises LookupError with what is wrong.
    """

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match[1], match[2]
        escape = "write $${ for a literal ${"
        if name is None:
            raise LookupError(f"expected ${{NAME}} or ${{NAME:-default}}; {escape}")
        text = variables.get(name, "")
        if default is not None:
            return text or default
        if name not in variables:
            raise LookupError(
                f"${{{name}}} is not set; ${{{name}:-x}} is x then; {escape}"
            )
        return text

    if isinstance(value, str):
        return VARIABLE.sub(replace, value)
    if isinstance(value, list):
        return [expand(one, variables) for one in value]
    if isinstance(value, dict):
        return {key: expand(one, variables) for key, one in value.items()}
    return value


def read_table(
    kind: type,
    table: Mapping[str, object],
    locate: Callable[[str], str],
    errors: list[str],
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the values of a TOML table by field, and add what is wrong to `errors`.

    `locate` gives a key's dotted path. Without `variables` nothing is expanded.
    """
    checks, values = declared(kind), {}
    for key, value in table.items():
        if key not in checks:
            errors.append(f"{locate(key)}: unknown key{hint(key, checks)}")
            continue
        field, check = checks[key]
        try:
            if variables is not None:
                value = expand(value, variables)
            values[field] = check.convert(value)
        except LookupError as error:
            errors.append(f"{locate(key)}: {error.args[0]}")
        except ConfigError as error:
            errors += [f"{locate(key)}.{line}" for line in error.errors]
        except (TypeError, ValueError):
            errors.append(
                f"{locate(key)}: expected {check.expects}, got {shown(value)}"
            )
    return values


def read_program(
    name: str,
    table: Mapping[str, Any],
    defaults: Mapping[str, Any],
    environ: Mapping[str, str],
    errors: list[str],
) -> list[Program]:
    """Return the instances of one program; none if something is wrong with it."""

    def locate(key: str) -> str:
        return f"programs.{name}.{key}" if key in table else f"defaults.{key}"

    merged = {**defaults, **table}
    common, own = defaults.get("environment"), table.get("environment")
    if isinstance(common, dict) and isinstance(own, dict):
        merged["environment"] = {**common, **own}
    count = table.get("numprocs", defaults.get("numprocs", 1))
    if type(count) is not int or not 1 <= count <= MOST_INSTANCES:
        count = 1  # `read_table` says what is wrong with it
    programs, before = [], len(errors)
    for number in range(count):
        variables = {**environ, "PROCESS_NUM": str(number)}
        values = read_table(Program, merged, locate, errors, variables)
        instance = f"{name}:{number}" if count > 1 else name
        programs.append(Program(name=instance, group=name, number=number, **values))
        if len(errors) == before:
            errors += [f"programs.{name}.{error}" for error in unlikely(programs[-1])]
        if len(errors) > before:
            return []
    return programs


def unlikely(program: Program) -> Iterator[str]:
    """Yield what single keys cannot tell: keys that do not go together."""
    if not program.command:
        yield "command: missing"
        return
    try:
        if not program.argv:
            yield f"command: expected a command, got {shown(program.command)}"
    except ValueError as error:
        yield f"command: cannot split {shown(program.command)}: {str(error).lower()}"
    if program.watchdog_secs is not None and program.type != "notify":
        yield f'watchdog_secs: expected type "notify" with it, got "{program.type}"'
    if program.healthcheck and program.type == "oneshot":
        yield "healthcheck: expected none for a oneshot, which ends"


def parse_config(
    data: Mapping[str, Any],
    environ: Mapping[str, str],
    included: Mapping[str, Mapping[str, Any]] | None = None,
    path: str = "",
) -> Config:
    """Return the configuration of parsed TOML; `included` by file name. No I/O.

    Raises ConfigError with all that is wrong.
    """
    errors: list[str] = []
    special = ("programs", "defaults")
    keys = {key: value for key, value in data.items() if key not in special}
    values = read_table(Config, keys, str, errors, environ)
    if values.get("token") and values.get("token_file"):
        errors.append("token_file: expected token or token_file, not both")
    for address in values.get("listen", ()):
        try:
            address and parse_address(address)
        except ValueError as error:
            errors.append(f"listen: {error}")
    defaults = read_defaults(data.get("defaults", {}), environ, errors)
    tables = collect_programs(data, included or {}, errors)
    programs: dict[str, Program] = {}
    for name, table in tables.items():
        for program in read_program(name, table, defaults, environ, errors):
            programs[program.name] = program
    if not tables and not errors:
        errors.append("programs: expected at least one program")
    programs = resolve_dependencies(programs, tables, errors)
    errors += shared_files(programs.values())
    if errors:
        raise ConfigError(errors)
    return Config(path=path, programs=programs, **values)


def read_defaults(
    table: Any, environ: Mapping[str, str], errors: list[str]
) -> dict[str, Any]:
    """Return the table `defaults` as it stands; it is converted program by program."""
    if not isinstance(table, dict):
        errors.append(f"defaults: expected a table, got {shown(table)}")
        return {}
    usable = {key: table[key] for key in table if key not in ("command", "args")}
    for key in table.keys() - usable.keys():
        errors.append(f"defaults.{key}: expected in a program only")
    before = len(errors)
    read_table(
        Program, usable, "defaults.{}".format, errors, {**environ, "PROCESS_NUM": "0"}
    )
    return usable if len(errors) == before else {}


def collect_programs(
    data: Mapping[str, Any],
    included: Mapping[str, Mapping[str, Any]],
    errors: list[str],
) -> dict[str, dict[str, Any]]:
    """Return all tables of programs by name, those of the included files too."""
    tables: dict[str, dict[str, Any]] = {}
    for file, content in {"": data, **included}.items():
        place = f"{file}: " if file else ""
        for key in content.keys() - {"programs"} if file else ():
            errors.append(
                f"{place}{key}: expected nothing but programs in an included file"
            )
        programs = content.get("programs", {})
        if not isinstance(programs, dict):
            errors.append(f"{place}programs: expected tables, got {shown(programs)}")
            continue
        for name, table in programs.items():
            if name in tables:
                errors.append(f"{place}programs.{name}: defined twice")
            elif not NAME.fullmatch(name) or name == "all":
                expected = "letters, digits, '_', '-', '.', and not 'all'"
                errors.append(f"{place}programs.{name}: expected a name of {expected}")
            elif not isinstance(table, dict):
                errors.append(
                    f"{place}programs.{name}: expected a table, got {shown(table)}"
                )
            else:
                tables[name] = table
    return tables


def resolve_dependencies(
    programs: dict[str, Program], tables: Collection[str], errors: list[str]
) -> dict[str, Program]:
    """Return the programs with the names of instances in `depends_on`."""
    members: dict[str, list[str]] = {}
    for program in programs.values():
        for name in {program.name, program.group}:
            members.setdefault(name, []).append(program.name)
    resolved = {}
    for program in programs.values():
        for name in program.depends_on:
            if name not in members and name not in tables:
                where = f"programs.{program.group}.depends_on"
                errors.append(f"{where}: no program {name!r}{hint(name, members)}")
        names = [one for name in program.depends_on for one in members.get(name, ())]
        resolved[program.name] = program._replace(
            depends_on=tuple(dict.fromkeys(names))
        )
    if any(program.depends_on for program in resolved.values()):
        import graphlib  # only where there is an order

        graph = {program.name: program.depends_on for program in resolved.values()}
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            cycle = error.args[1][::-1]
            where = f"programs.{resolved[cycle[0]].group}.depends_on"
            errors.append(f"{where}: cycle {' -> '.join(cycle)}")
    return resolved


def shared_files(programs: Iterable[Program]) -> Iterator[str]:
    """Yield where programs share a log file and do not agree on its rotation."""
    limits: dict[str, Program] = {}
    for program in programs:
        for path in filter(None, (program.logfile, program.stderr_logfile)):
            if path in TERMINALS:
                continue
            other = limits.setdefault(os.path.abspath(path), program)
            for key in ("logfile_maxbytes", "logfile_backups"):
                theirs, ours = getattr(other, key), getattr(program, key)
                if ours != theirs:
                    expected = f"{theirs} as in {other.group}, which shares {path!r}"
                    yield f"programs.{program.group}.{key}: expected {expected}, got {ours}"


class Address(NamedTuple):
    """Where to listen or to connect: a unix socket's path, or host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return (
            f"[{self.host}]:{self.port}"
            if ":" in self.host
            else f"{self.host}:{self.port}"
        )

    @property
    def is_loopback(self) -> bool:
        return self.host.startswith("127.") or self.host == "::1"


def parse_address(text: str) -> Address:
    """Return the address of `HOST:PORT`, `[V6]:PORT`, `:PORT`, `unix:PATH`, or a URL.

    No name but `localhost` is looked up, so HOST is a number. Raises ValueError.
    """
    wanted = "expected HOST:PORT with a number for HOST, [V6]:PORT, :PORT or unix:PATH"
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        path = "/" + path.lstrip("/") if path.startswith("//") else path
        if path:
            return Address(path=path)
    text = re.sub(r"^http://([^/]+)/?$", r"\1", text)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/]*)):(\d{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ValueError(f"{wanted}, got {text!r}")
    host = match[1] or match[2].lower() or "::"
    host = {"localhost": "127.0.0.1", "*": "::"}.get(host, host)
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        raise ValueError(f"{wanted}, got {text!r}") from None
    return Address(host=host, port=int(match[3]))


def read_toml(path: str) -> dict[str, Any]:
    """Return a file's content; raises ConfigError with the reason and the place."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError([f"cannot read {path!r}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = (
            "nested too deeply" if isinstance(error, RecursionError) else str(error)
        )
        raise ConfigError([f"{path}: {reason[:1].lower()}{reason[1:]}"]) from None


def load_config(path: str = "supervisors.toml") -> Config:
    """Read a configuration and the files that it includes.

    Raises ConfigError, whose `errors` are complete lines; never exits.
    """
    data = read_toml(path)
    environ = original_environ()
    included = {}
    patterns = data.get("include", [])
    if isinstance(patterns, list):
        import glob  # only where something is included

        here = os.path.dirname(path)
        for pattern in patterns:
            with contextlib.suppress(LookupError, TypeError, ValueError):
                pattern = os.path.join(here, to_text(expand(pattern, environ)))
                for file in sorted(glob.glob(pattern)):
                    included[file] = read_toml(file)
    try:
        return parse_config(data, environ, included, os.path.realpath(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {line}" for line in error.errors) from None


# === 3. State machine =================================================================
#
# A program's life as values: `step` takes a program's definition, the time, its status
# and an event, and returns the next status and what is to be done. It does no I/O and
# reads no clock. Whether a program comes back, and when, is decided here and only here.
#
# A run ends in two moments. Its leader is reaped (Exited), which fixes how long it ran
# and how it ended; and its process group is empty (at once, as a rule; else Emptied).
# Only then is the end judged, so that no program ever runs twice. In between, and after
# a stop, it is STOPPING; `after` says what comes next, and the last order wins.


class State(enum.Enum):
    """supervisord's states, and WAITING: for what it depends on."""

    STOPPED = "STOPPED"
    WAITING = "WAITING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    BACKOFF = "BACKOFF"
    STOPPING = "STOPPING"
    EXITED = "EXITED"
    FATAL = "FATAL"


ALIVE = {State.STARTING, State.RUNNING, State.STOPPING}


class After(enum.Enum):
    """What STOPPING leads to."""

    STOP = "it was asked to stop"
    START = "it was asked to start again"
    JUDGE = "its leader ended unasked"
    FAIL = "it was found to have failed, alive"


AWAITS_READY = "waiting for READY=1"
KILL_AGAIN = 1.0  # seconds between SIGKILLs to a group that does not end


class Status(NamedTuple):
    """Where a program is. Instants are those of the monotonic clock."""

    state: State = State.STOPPED
    pid: int | None = None  # of the leader, until it is reaped
    started: float = 0.0
    deadline: float | None = None  # when Due is due
    after: After = After.STOP
    ran: float = -1.0  # seconds that the last run lasted; negative if none began
    notified: bool = False  # it has said READY=1 in this run
    failures: int = 0  # in a row
    restarts: int = 0  # automatic ones
    exit_code: int | None = None
    exit_signal: int | None = None
    succeeded: bool = False  # EXITED as it should
    reason: str = ""
    status_text: str = ""
    healthy: bool | None = None
    checks_failed: int = 0  # in a row
    blocked: str = ""  # what it would have to wait for
    blocked_as: str = ""  # "failing", or "failed" for good, if one of those is

    @property
    def is_alive(self) -> bool:
        return self.state in ALIVE


class Start(NamedTuple):
    """Somebody wants it to run."""


class Stop(NamedTuple):
    """Somebody wants it not to run."""


class Restart(NamedTuple):
    """Somebody wants a new run."""


class Due(NamedTuple):
    """The deadline of the status has come."""


class Spawned(NamedTuple):
    pid: int


class SpawnFailed(NamedTuple):
    """It cannot be executed; `code` is 127 for a missing command, else 126."""

    reason: str
    code: int


class Exited(NamedTuple):
    """The leader was reaped; `survivors` of its group live on."""

    code: int | None
    signal: int | None
    survivors: bool = False


class Emptied(NamedTuple):
    """Nothing of its group is left, the leader has been reaped."""


class Blocked(NamedTuple):
    """What it depends on is not ready, for this reason; or is, with an empty one.

    `cause` is "failing" if that is no mere delay, "failed" if it will not end by itself.
    """

    reason: str
    cause: str = ""


class Ready(NamedTuple):
    """It said READY=1."""


class Alive(NamedTuple):
    """It said WATCHDOG=1."""


class Text(NamedTuple):
    """It said STATUS=text."""

    text: str


class Checked(NamedTuple):
    """A health check passed, or failed for a reason."""

    passed: bool
    detail: str = ""


Event = (
    Start
    | Stop
    | Restart
    | Due
    | Spawned
    | SpawnFailed
    | Exited
    | Emptied
    | Blocked
    | Ready
    | Alive
    | Text
    | Checked
)


class Spawn(NamedTuple):
    """Start it; answer with Spawned or SpawnFailed before any other event."""


class Signal(NamedTuple):
    """Send a signal to its group, or its leader where `stopasgroup` is false."""

    name: str


class Kill(NamedTuple):
    """Send SIGKILL to its group; answer with Emptied if that was empty."""


Action = Spawn | Signal | Kill
Step = tuple[Status, tuple[Action, ...]]


def step(program: Program, now: float, status: Status, event: Event) -> Step:
    """Return the status after an event, and what is to be done.

    `begin` is STARTING, or WAITING while a dependency is not ready; `end` is what
    `settle` decides; `=` stays; `!` cannot happen. Where there are two, it depends.

                    STOPPED WAITING STARTING  RUNNING   BACKOFF STOPPING EXITED  FATAL
        Start       begin   =       =         =         begin   =        begin   begin
        Stop        =       STOPPED STOPPING  STOPPING  STOPPED =        STOPPED STOPPED
        Restart     begin   begin   STOPPING  STOPPING  begin   =        begin   begin
        Due         =       =       =|RUNNING =|STOPPING =|begin =       =       =
        Spawned     !       !       =|RUNNING !         !       !        !       !
        SpawnFailed !       !       end       !         !       !        !       !
        Exited      !       !       end|STOPPING end|STOPPING ! end|=    !       !
        Emptied     =       =       =         =         =       end      =       =
        Blocked     =       =|begin =         =         =       =        =       =
        Ready       =       =       =|RUNNING =         =       =        =       =
        Alive       =       =       =         =         =       =        =       =
        Text        =       =       =         =         =       =        =       =
        Checked     =       =       =|STOPPING =|STOPPING =     =        =       =
    """
    if isinstance(event, Start):
        return start(program, now, status)
    if isinstance(event, Stop):
        return stop(program, now, status)
    if isinstance(event, Restart):
        return restart(program, now, status)
    if isinstance(event, Due):
        return due(program, now, status)
    if isinstance(event, Spawned):
        return spawned(program, now, status, event)
    if isinstance(event, SpawnFailed):
        assert status.state is State.STARTING
        status = status._replace(ran=-1.0, exit_code=event.code, exit_signal=None)
        return judge(program, now, status, event.reason, executed=False)
    if isinstance(event, Exited):
        return exited(program, now, status, event)
    if isinstance(event, Emptied):
        return (
            settle(program, now, status)
            if status.state is State.STOPPING
            else (status, ())
        )
    if isinstance(event, Blocked):
        return blocked(program, now, status, event)
    if isinstance(event, Ready):
        return ready(program, now, status)
    if isinstance(event, Alive):
        return watched(program, now, status), ()
    if isinstance(event, Text):
        return status._replace(status_text=event.text), ()
    if isinstance(event, Checked):
        return checked(program, now, status, event)
    assert_never(event)


def is_ready(program: Program, status: Status) -> bool:
    """Return whether what depends on it may start."""
    if program.type == "oneshot":
        return status.state is State.EXITED and status.succeeded
    passes = program.healthcheck is None or status.healthy is True
    return status.state is State.RUNNING and passes


def has_failed(status: Status) -> bool:
    """Return whether it has ended, not as it should, and does not come back by itself."""
    failed = status.state is State.EXITED and not status.succeeded
    return failed or status.state is State.FATAL


def exit_status(status: Status) -> int:
    """Return a final end as an exit status: the code, or 128 plus the signal's number."""
    code = status.exit_code if status.exit_signal is None else 128 + status.exit_signal
    return code or int(has_failed(status))


def start(program: Program, now: float, status: Status) -> Step:
    if status.state in (State.WAITING, State.STARTING, State.RUNNING):
        return status, ()
    if status.state is State.STOPPING:
        return status._replace(after=After.START), ()
    return begin(status._replace(failures=0))


def stop(program: Program, now: float, status: Status) -> Step:
    if status.state is State.STOPPED:
        return status, ()
    if status.state is State.STOPPING:
        return status._replace(after=After.STOP), ()
    if status.is_alive:
        return begin_stop(program, now, status, After.STOP)
    return status._replace(
        state=State.STOPPED, deadline=None, reason="", failures=0
    ), ()


def restart(program: Program, now: float, status: Status) -> Step:
    if status.state is State.STOPPING:
        return status._replace(after=After.START), ()
    if status.is_alive:
        return begin_stop(program, now, status, After.START)
    return begin(status._replace(failures=0))


def begin(status: Status, automatic: bool = False) -> Step:
    """Start a run, or wait for what it depends on."""
    status = status._replace(
        deadline=None,
        restarts=status.restarts + automatic,
        notified=False,
        reason=status.blocked,
        status_text="",
    )
    if status.blocked:
        return status._replace(state=State.WAITING), ()
    return status._replace(state=State.STARTING), (Spawn(),)


def begin_stop(
    program: Program, now: float, status: Status, after: After, reason: str = ""
) -> Step:
    deadline = now + program.stopwaitsecs
    status = status._replace(
        state=State.STOPPING, after=after, deadline=deadline, reason=reason
    )
    return status, (Signal(program.stopsignal),)


def due(program: Program, now: float, status: Status) -> Step:
    if status.deadline is None or now < status.deadline:
        return status, ()
    if status.state is State.STARTING:
        return status._replace(state=State.RUNNING, deadline=None), ()
    if status.state is State.RUNNING:
        reason = f"no WATCHDOG=1 for {program.watchdog_secs:g} s"
        return begin_stop(program, now, status, After.FAIL, reason)
    if status.state is State.BACKOFF:
        return begin(status, automatic=True)
    if status.state is State.STOPPING:
        killed = f"killed after {program.stopwaitsecs:g} s"
        reason = status.reason
        if killed not in reason:
            reason = f"{reason}, {killed}".removeprefix(", ")
        return status._replace(deadline=now + KILL_AGAIN, reason=reason), (Kill(),)
    return status, ()


def spawned(program: Program, now: float, status: Status, event: Spawned) -> Step:
    assert status.state is State.STARTING
    status = status._replace(
        pid=event.pid, started=now, ran=-1.0, reason="", healthy=None, checks_failed=0
    )
    if program.type == "notify":
        return status._replace(reason=AWAITS_READY), ()
    if program.type == "oneshot" or program.startsecs == 0:
        return status._replace(state=State.RUNNING), ()
    return status._replace(deadline=now + program.startsecs), ()


def exited(program: Program, now: float, status: Status, event: Exited) -> Step:
    assert status.is_alive
    status = status._replace(
        pid=None,
        ran=now - status.started,
        exit_code=event.code,
        exit_signal=event.signal,
    )
    unasked = status.state is not State.STOPPING
    if unasked:
        status = status._replace(after=After.JUDGE)
    if not event.survivors:
        return settle(program, now, status)
    actions: tuple[Action, ...] = ()
    if unasked:
        ended = f"{describe_end(status)}, its group lives on"
        status, actions = begin_stop(program, now, status, After.JUDGE, ended)
    if not program.stopasgroup:
        return status._replace(deadline=now + KILL_AGAIN), (Kill(),)
    return status, actions


def settle(program: Program, now: float, status: Status) -> Step:
    """Decide what follows a run that is over, its whole group gone."""
    status = status._replace(deadline=None, healthy=None)
    if status.after is After.STOP:
        return status._replace(state=State.STOPPED, failures=0), ()
    if status.after is After.START:
        return begin(status._replace(failures=0))
    if status.after is After.FAIL:
        return judge(program, now, status, status.reason, failed=True)
    return judge(program, now, status, describe_end(status))


def judge(
    program: Program,
    now: float,
    status: Status,
    reason: str,
    *,
    failed: bool = False,
    executed: bool = True,
) -> Step:
    """Decide whether and when a program that ended unasked comes back.

    An expected end after `startsecs` is no failure. Any other is; the first after
    `startsecs` is forgiven, then the waits double, and only a run of `backoff_limit`
    starts the count anew, so that a slow crash loop trips as well.
    """
    code = status.exit_code if status.exit_signal is None else 128 + status.exit_signal
    expected = executed and not failed and code in program.exitcodes
    status = status._replace(deadline=None, reason=reason, succeeded=expected)
    wanted = program.autorestart is True
    wanted = wanted or (program.autorestart == "unexpected" and not expected)
    if not wanted:
        return status._replace(state=State.EXITED if executed else State.FATAL), ()
    announced = program.type != "notify" or status.notified
    stayed_up = executed and announced and status.ran >= program.startsecs
    if expected and stayed_up:
        return begin(status._replace(failures=0), automatic=True)
    long = executed and status.ran >= program.backoff_limit
    failures = 1 if long else status.failures + 1
    status = status._replace(failures=failures)
    if program.startretries is not None and failures > program.startretries:
        return status._replace(state=State.FATAL), ()
    if failures == 1 and stayed_up:
        return begin(status, automatic=True)
    wait = backoff_delay(program, failures) * jitter(program, failures, now)
    reason = f"{reason}, restart in {wait:.3g} s"
    return status._replace(state=State.BACKOFF, deadline=now + wait, reason=reason), ()


def backoff_delay(program: Program, failures: int) -> float:
    """Return the seconds to wait before restart number `failures`, counted from 1."""
    doublings = min(failures - 1, 60)  # 2**60 seconds is beyond every limit
    return min(program.backoff_delay * 2.0**doublings, program.backoff_limit)


def jitter(program: Program, failures: int, now: float) -> float:
    """Return a factor from 0.9 to 1.1, so that a fleet does not restart in step.

    From the hash of the moment: no generator to import, to seed or to hand around.
    """
    return 0.9 + hash((program.name, failures, now)) % 2001 / 10_000


def describe_end(status: Status) -> str:
    if status.exit_signal is not None:
        return f"killed by {signal_name(status.exit_signal)}"
    return f"exit code {status.exit_code}"


def signal_name(number: int) -> str:
    """Return `SIGTERM` for 15; real-time signals are numbers above SIGRTMIN."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def blocked(program: Program, now: float, status: Status, event: Blocked) -> Step:
    status = status._replace(blocked=event.reason, blocked_as=event.cause)
    if status.state is not State.WAITING:
        return status, ()
    return begin(status)


def ready(program: Program, now: float, status: Status) -> Step:
    if program.type != "notify" or status.state is not State.STARTING:
        return status, ()
    status = status._replace(state=State.RUNNING, notified=True, reason="")
    return watched(program, now, status), ()


def watched(program: Program, now: float, status: Status) -> Status:
    """Return the status with the watchdog wound up again."""
    if status.state is not State.RUNNING or program.watchdog_secs is None:
        return status
    return status._replace(deadline=now + program.watchdog_secs)


def checked(program: Program, now: float, status: Status, event: Checked) -> Step:
    check = program.healthcheck
    if check is None or status.state not in (State.STARTING, State.RUNNING):
        return status, ()
    if event.passed:
        silent = program.type == "notify" and status.state is State.STARTING
        reason = AWAITS_READY if silent else ""
        return status._replace(healthy=True, checks_failed=0, reason=reason), ()
    # As in Compose, the start period ends with the first check that passes.
    if status.healthy is None and now < status.started + check.start_period:
        return status._replace(reason=f"not yet healthy: {event.detail}"), ()
    failed = status.checks_failed + 1
    status = status._replace(checks_failed=failed)
    if failed < check.retries:
        return status._replace(reason=f"check failed: {event.detail}"), ()
    reason = f"unhealthy: {event.detail}"
    status = status._replace(healthy=False, reason=reason)
    if program.autorestart is False:
        return status, ()
    return begin_stop(program, now, status, After.FAIL, reason)


def verdict(program: Program, status: Status) -> str:
    """Return "ok", "starting" or "failing"; "" for one that does not count.

    Those do not count that were stopped on purpose, and those that ended as they should.
    """
    state, after = status.state, status.after
    if state is State.STOPPED or (state is State.EXITED and status.succeeded):
        return ""
    if state is State.STOPPING:
        return {After.STOP: "", After.FAIL: "failing"}.get(after, "starting")
    if state in (State.BACKOFF, State.EXITED, State.FATAL) or status.healthy is False:
        return "failing"
    if state is State.WAITING:
        return "failing" if status.blocked_as else "starting"
    passes = program.healthcheck is None or status.healthy
    return "ok" if state is State.RUNNING and passes else "starting"


def blocked_by(others: Mapping[str, tuple[Program, Status]]) -> Blocked:
    """Return what a program has to wait for: those of its dependencies not ready."""
    waits, causes = [], {""}
    for name, (other, status) in others.items():
        if is_ready(other, status):
            continue
        detail = status.state.value
        if status.reason and status.state is not State.WAITING:
            detail += f": {status.reason}"
        waits.append(f"{name} ({detail})")
        causes.add("failing" if verdict(other, status) == "failing" else "")
        waits_in_vain = status.state is State.WAITING and status.blocked_as == "failed"
        causes.add("failed" if has_failed(status) or waits_in_vain else "")
    cause = "failed" if "failed" in causes else max(causes)
    return Blocked("waiting for " + ", ".join(waits) if waits else "", cause)


# === 4. Log text ======================================================================
#
# Bytes in, bytes out: whatever a program writes goes through untouched, save in JSON.
# A chunk is formatted as a whole, by two C-speed replacements, not line by line.

LINE_LIMIT = 64 * 1024  # bytes; a longer line is cut where it gets a prefix
COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)  # SGR codes, cyan first

Format = Callable[[bytes, float], bytes]  # whole lines and the time (Unix), to bytes


def timestamp(now: float, digits: int = 3) -> str:
    """Return a Unix time as RFC 3339 in UTC."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{whole}.{int(now % 1 * 1000):03}Z" if digits else f"{whole}Z"


def cut_lines(data: bytes, mark: bytes = b"\n") -> tuple[bytes, bytes]:
    """Return the whole lines of `data`, and the rest behind the last line end.

    What is longer than LINE_LIMIT is cut into pieces, each ended by `mark`.
    """
    end = data.rfind(b"\n") + 1
    lines, rest = data[:end], data[end:]
    if mark and end > LINE_LIMIT:
        parts = lines[:-1].split(b"\n")
        if max(map(len, parts)) > LINE_LIMIT:
            lines = b"".join(piece + b"\n" for part in parts for piece in pieces(part))
    if len(rest) > LINE_LIMIT:
        *full, rest = pieces(rest)
        lines += b"".join(piece + mark for piece in full)
    return lines, rest


def pieces(line: bytes) -> list[bytes]:
    return [line[at : at + LINE_LIMIT] for at in range(0, len(line), LINE_LIMIT)] or [
        line
    ]


def log_formatter(
    log_format: str, name: str, stream: str, width: int = 0, colour: int | None = None
) -> Format:
    """Return the function that formats the lines of one stream of one program."""
    if log_format == "json":
        return json_formatter(name, stream)
    label = f"{name:<{width}}"
    prefix = f"{label} | " if colour is None else f"\033[{colour}m{label} |\033[0m "
    start = prefix.encode()
    if log_format == "prefix":
        return lambda lines, now: (
            start + lines[:-1].replace(b"\n", b"\n" + start) + b"\n"
        )
    if log_format == "timestamp":

        def stamped(lines: bytes, now: float) -> bytes:
            head = timestamp(now).encode() + b" " + start
            return head + lines[:-1].replace(b"\n", b"\n" + head) + b"\n"

        return stamped
    return lambda lines, now: lines


def json_formatter(name: str, stream: str) -> Format:
    import json  # only where it is the format

    def format_lines(lines: bytes, now: float) -> bytes:
        head = {"time": timestamp(now), "program": name, "stream": stream}
        texts = lines[:-1].decode(errors="replace").split("\n")
        objects = [
            json.dumps({**head, "message": text}, ensure_ascii=False) for text in texts
        ]
        return "".join(f"{line}\n" for line in objects).encode(errors="replace")

    return format_lines


def message_line(
    now: float, name: str, text: str, level: str = "info", as_json: bool = False
) -> bytes:
    """Return one of the supervisor's own messages; `name` is a program's, or ""."""
    if as_json:
        import json

        fields = {"time": timestamp(now), "level": level, "program": name or None}
        return (json.dumps({**fields, "message": text}) + "\n").encode()
    return f"{timestamp(now, 0)} {name or 'supervisors'}: {text}\n".encode(
        errors="replace"
    )


class Route(NamedTuple):
    """Where a stream goes: descriptor 1 or 2, or a file; in which format."""

    target: int | str
    log_format: str
    direct: bool  # the program gets the descriptor itself


def route(program: Program, stream: str, log_format: str) -> Route:
    """Return where "stdout" or "stderr" of a program goes; `log_format` for terminals."""
    path = program.logfile
    if stream == "stderr" and program.stderr_logfile:
        path = program.stderr_logfile
    target: int | str = 1 if stream == "stdout" else 2
    if path:
        target = TERMINALS.get(path) or os.path.abspath(path)
    if isinstance(target, int):
        chosen = program.log_format or log_format
        return Route(target, chosen, chosen == "raw")
    chosen = program.log_format or "raw"
    direct = path == NOWHERE or (chosen == "raw" and program.logfile_maxbytes == 0)
    return Route(target, chosen, direct)


# === 5. Log files =====================================================================
#
# One thread owns every pipe and every log file, so a slow disk or a stopped terminal
# delays output and nothing else. Other threads hand it jobs.
#
# It reads into one reused buffer, makes a pipe larger that it finds full, and naps after
# a pass that moved little, so that the next one finds more: for lines of 100 bytes that
# is fewer wake-ups by a hundred, and a tenth of the CPU.

BUFFER = 1024 * 1024  # bytes; also what a busy pipe is enlarged to
PIPE = 64 * 1024  # bytes that a pipe holds as it comes (pipe(7))
NAP = 0.001  # seconds
LITTLE = 256 * 1024  # bytes moved in a pass, below which a nap is worth it
SAY_AGAIN = 60.0  # seconds between two complaints about one file
HELD = 1024 * 1024  # bytes that wait for a terminal that nobody reads; then they drop
REMEMBERED = 64 * 1024  # bytes of a piped program's output that stay in memory
LAG = 1024 * 1024  # bytes that a follower may be behind
FAREWELL = 1.0  # seconds that the last output has at the end


class Lagged(Exception):
    """A follower was too slow: what it would read next is gone."""


class Feed(Generic[T]):
    """The newest items of something, which any thread may append to and follow.

    Items are counted from 0. `limit` bounds the sum of their sizes, `followed_limit`
    while somebody follows: that is how far a follower may be behind.
    """

    def __init__(self, limit: int, followed_limit: int) -> None:
        self.limits = (limit, followed_limit)
        self.items: deque[tuple[int, T]] = deque()
        self.size = 0
        self.end = 0  # the number of the next item
        self.followers = 0
        self.closed = False
        self.changed = threading.Condition()

    def append(self, item: T, size: int = 1) -> None:
        with self.changed:
            self.items.append((size, item))
            self.end += 1
            self.size += size
            most = self.limits[self.followers > 0]
            while self.size > most and len(self.items) > 1:
                self.size -= self.items.popleft()[0]
            if self.followers:
                self.changed.notify_all()

    def read(self, after: int, timeout: float | None = 0) -> tuple[list[T], int]:
        """Return the items from number `after` on, and the number of the next.

        Waits until there is one, or the feed is closed. Raises Lagged.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.end > after, timeout)
            missing = self.end - after
            if missing > len(self.items):
                raise Lagged
            found = [self.items[i][1] for i in range(-missing, 0)]
            return found, self.end

    def newest(self) -> tuple[list[T], int]:
        """Return all items that are kept, and the number of the next."""
        with self.changed:
            return [item for _, item in self.items], self.end

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        with self.changed:
            self.followers += 1
        try:
            yield
        finally:
            with self.changed:
                self.followers -= 1


class Output:
    """One program's output over all its runs: what is remembered, what was dropped."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dropped = 0
        self.recent: Feed[tuple[str, bytes]] | None = (
            None  # where nothing else keeps it
        )


class Sink:
    """Where lines go. `write` returns how many bytes it had to drop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.complained = float("-inf")
        self.error = ""

    def failed(self, error: OSError, count: int) -> int:
        self.error = error.strerror or str(error)
        return count

    def write(self, data: bytes | memoryview) -> int:
        raise NotImplementedError

    def reopen(self) -> None:
        """Let go of the file; the next write opens it anew."""

    def waits(self) -> bool:
        """Return whether it has bytes that nobody takes."""
        return False


class FileSink(Sink):
    """A log file, rotated at `maxbytes` on a line boundary; 0 never rotates."""

    def __init__(self, path: str, maxbytes: int, backups: int) -> None:
        super().__init__(path)
        self.path = path
        self.maxbytes = maxbytes
        self.backups = backups
        self.fd = -1
        self.size = 0
        self.is_regular = False
        self.is_one_line = False  # it holds nothing but one unfinished line

    def write(self, data: bytes | memoryview) -> int:
        data = memoryview(data)
        try:
            self.check()
            while (
                data and self.is_regular and 0 < self.maxbytes < self.size + len(data)
            ):
                data = self.fill(data)
            while data:
                data = data[self.put(data) :]
        except OSError as error:
            return self.failed(error, len(data))
        return 0

    def put(self, data: bytes | memoryview) -> int:
        written = os.write(self.fd, data)
        self.size += written
        return written

    def check(self) -> None:
        """Open the file, anew if it was removed; learn what its size is now."""
        if self.fd >= 0:
            status = os.fstat(self.fd)
            if status.st_nlink or not self.is_regular:
                self.size = status.st_size  # it may have been truncated (copytruncate)
                return
            self.reopen()
        self.fd, self.is_regular = open_log(self.path, os.O_RDWR)
        self.size = os.fstat(self.fd).st_size
        self.is_one_line = False

    def fill(self, data: memoryview) -> memoryview:
        """Write what of `data` still fits, rotate if it is time; return what is left.

        A line that is in the file already moves on with its end, so that none is split.
        """
        room = max(self.maxbytes - self.size, 0)
        fits = bytes(data[:room]).rfind(b"\n") + 1
        if fits:
            self.put_all(data[:fits])
            self.rotate()
            return data[fits:]
        start = 0 if self.is_one_line else self.line_start()
        if start:
            tail = (
                os.pread(self.fd, self.size - start, start)
                if start < self.size
                else b""
            )
            os.ftruncate(self.fd, start)
            self.rotate()
            self.put_all(tail)
            return data
        end = bytes(data).find(b"\n") + 1
        self.put_all(data[: end or len(data)])
        self.is_one_line = not end
        return data[end or len(data) :]

    def put_all(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            data = data[self.put(data) :]

    def line_start(self) -> int:
        """Return where the file's last, unfinished line begins; its size if it has none."""
        end = self.size
        while end > 0:
            start = max(end - PIPE, 0)
            found = os.pread(self.fd, end - start, start).rfind(b"\n") + 1
            if found:
                return start + found
            end = start
        return 0

    def rotate(self) -> None:
        """web.log -> web.log.1 -> ... -> web.log.N; without backups, start over."""
        if self.backups == 0:
            os.ftruncate(self.fd, 0)
        for number in range(self.backups, 0, -1):
            older = f"{self.path}.{number}"
            newer = f"{self.path}.{number - 1}" if number > 1 else self.path
            with contextlib.suppress(FileNotFoundError):
                os.rename(newer, older)
        if self.backups:
            self.reopen()
        self.check()

    def reopen(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def open_log(path: str, access: int = os.O_WRONLY) -> tuple[int, bool]:
    """Open a log file to append, and make its folders; return whether it is a regular one.

    Without O_NONBLOCK the open of a FIFO that nobody reads would hang.
    """
    with contextlib.suppress(FileExistsError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    flags = os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, access | flags, 0o666)
    kind = os.fstat(fd).st_mode & 0o170000
    return fd, kind == 0o100000


class TerminalSink(Sink):
    """Standard output or error, which may be a terminal or a pipe that nobody reads.

    Its descriptor is shared with the shell and cannot be made non-blocking; so it is
    written to only as much as it certainly takes, and the rest is held.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(f"descriptor {fd}")
        self.fd = fd
        self.held = bytearray()
        self.capacity = 0  # of a pipe
        self.is_file = False
        with contextlib.suppress(OSError, AttributeError):
            self.is_file = os.fstat(fd).st_mode & 0o170000 == 0o100000
            self.capacity = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)  # Linux; pipes only
        self.poll = select.poll()
        self.poll.register(fd, select.POLLOUT)

    def write(self, data: bytes | memoryview) -> int:
        if not self.held:
            try:
                data = data[self.send(data) :]
            except OSError as error:
                return self.failed(error, len(data))
        elif len(self.held) > HELD:
            return len(data)  # a message; sources are not read while something is held
        self.held += data
        return 0

    def flush(self) -> None:
        """Write what is held, as far as it goes."""
        try:
            del self.held[: self.send(self.held)]
        except OSError as error:
            self.failed(error, len(self.held))
            self.held.clear()

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Write without ever blocking; return how many bytes."""
        done = 0
        with memoryview(data) as view:
            while done < len(view):
                room = self.room()
                if room == 0:
                    break
                try:
                    done += os.write(self.fd, view[done : done + room])
                except BlockingIOError:
                    break
        return done

    def room(self) -> int:
        """Return how many bytes a write takes for sure.

        All that it holds for a pipe that is empty (FIONREAD); PIPE_BUF for anything that
        poll(2) calls writable.
        """
        if self.is_file:
            return BUFFER
        if self.capacity:
            import termios

            unread = fcntl.ioctl(self.fd, termios.FIONREAD, b"\0" * 4)
            if not any(unread):
                return self.capacity
        events = self.poll.poll(0)
        return select.PIPE_BUF if events else 0

    def waits(self) -> bool:
        return bool(self.held)


class Source:
    """The read end of one pipe, and what becomes of the bytes. Log thread only."""

    def __init__(
        self,
        fd: int,
        sink: Sink,
        output: Output,
        recent: Feed[tuple[str, bytes]] | None,
        stream: str,
        format_lines: Format | None,
        whole_lines: bool,
    ) -> None:
        self.fd = fd
        self.sink = sink
        self.output = output
        self.recent = recent
        self.stream = stream
        self.format_lines = format_lines
        self.whole_lines = whole_lines  # others write to the same place
        self.partial = b""
        self.capacity = PIPE

    def read(self, buffer: bytearray) -> int:
        """Move once what is there; return the bytes, -1 at the end of the pipe."""
        try:
            count = os.readv(self.fd, [buffer])
        except BlockingIOError:
            return 0
        if count >= self.capacity and self.capacity < BUFFER:
            self.capacity = BUFFER
            with contextlib.suppress(
                OSError, AttributeError
            ):  # the user's share is used up
                fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, BUFFER)
        if count == 0:
            self.finish()
            return -1
        with memoryview(buffer) as view:
            self.take(view[:count])
        return count

    def take(self, data: memoryview) -> None:
        if self.format_lines is None and not self.whole_lines:
            self.emit(data)
            return
        lines, self.partial = cut_lines(
            self.partial + bytes(data), b"\n" if self.format_lines else b""
        )
        if lines:
            self.emit(lines)

    def finish(self) -> None:
        """Keep a last line that has no end."""
        if self.partial:
            self.emit(self.partial + b"\n")
        self.partial = b""

    def emit(self, lines: bytes | memoryview) -> None:
        if self.recent is not None:
            self.recent.append((self.stream, bytes(lines)), len(lines))
        if self.format_lines:
            lines = self.format_lines(bytes(lines), time.time())
        self.output.dropped += self.sink.write(lines)


class LogThread:
    """The thread that owns pipes and log files. Public methods: any thread."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.jobs: deque[Callable[[], None]] = deque()
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.wake_read, selectors.EVENT_READ, None)
        self.buffer = bytearray(BUFFER)
        self.sinks: dict[int | str, Sink] = {}
        self.paused: dict[Sink, list[Source]] = {}
        self.sources: set[Source] = set()
        self.closing: float | None = None
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """Have the thread do something, in the order of the calls."""
        self.jobs.append(job)
        with contextlib.suppress(BlockingIOError):  # full: it is about to wake anyway
            os.write(self.wake_write, b"\0")

    def say(self, name: str, text: str, level: str = "info") -> None:
        """Write one of the supervisor's own messages to standard error."""
        line = message_line(time.time(), name, text, level, self.as_json)
        self.post(lambda: self.tell(line))

    def tell(self, line: bytes) -> None:
        self.sink(2).write(line)
        self.look_after(self.sink(2))

    def add(self, source: Source) -> None:
        """Read a pipe from now on. In this thread."""
        self.sources.add(source)
        if source.sink in self.paused:
            self.paused[source.sink].append(source)
        else:
            self.selector.register(source.fd, selectors.EVENT_READ, source)

    def sink(self, target: int | str, maxbytes: int = 0, backups: int = 0) -> Sink:
        """Return the sink of a target, with these limits from now on."""
        sink = self.sinks.get(target)
        if isinstance(target, int):
            sink = sink or TerminalSink(target)
        elif isinstance(sink, FileSink):
            sink.maxbytes, sink.backups = maxbytes, backups
        else:
            sink = FileSink(target, maxbytes, backups)
        self.sinks[target] = sink
        return sink

    def reopen(self) -> None:
        """Have every log file reopened, as after a rotation by somebody else."""

        def reopen_all() -> None:
            for sink in self.sinks.values():
                sink.reopen()

        self.post(reopen_all)

    def close(self) -> None:
        """Write what there still is, for a second at most, and end the thread."""
        self.post(self.begin_closing)
        self.thread.join(2 * FAREWELL)

    def begin_closing(self) -> None:
        self.closing = time.monotonic() + FAREWELL

    def run(self) -> None:
        if hasattr(signal, "pthread_sigmask"):
            # All signals are the main thread's; and a terminal with `tostop` stops a
            # background writer unless SIGTTOU is blocked (tty_ioctl(4)).
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self.closing is None:
            moved = self.turn(None)
            if 0 < moved < LITTLE:
                time.sleep(NAP)
        while time.monotonic() < self.closing and self.turn(0):
            pass
        for source in list(self.sources):
            source.finish()
        while time.monotonic() < self.closing and self.turn(NAP) >= 0:
            if not any(sink.waits() for sink in self.sinks.values()):
                break
        for source in list(self.sources):
            self.drop(source)
        for sink in self.sinks.values():
            sink.reopen()
        self.selector.close()
        os.close(self.wake_read)
        os.close(self.wake_write)

    def turn(self, timeout: float | None) -> int:
        """Do what is to be done now; return the bytes that were read."""
        moved = 0
        for key, _ in self.selector.select(timeout):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake_read, 4096)
            elif isinstance(key.data, TerminalSink):
                key.data.flush()
                self.look_after(key.data)
            elif key.data.fd >= 0 and not key.data.sink.waits():
                moved += self.move(key.data)
        while self.jobs:
            self.jobs.popleft()()
        return moved

    def move(self, source: Source) -> int:
        count = source.read(self.buffer)
        if count < 0:
            self.drop(source)
        self.look_after(source.sink)
        return max(count, 0)

    def drop(self, source: Source) -> None:
        """Forget a pipe that has ended."""
        self.sources.discard(source)
        with contextlib.suppress(KeyError):  # it is paused
            self.selector.unregister(source.fd)
        os.close(source.fd)
        source.fd = -1

    def look_after(self, sink: Sink) -> None:
        """Say that a sink fails; stop reading for one that nobody reads, and go on again."""
        if sink.error:
            error, sink.error = sink.error, ""
            now = time.monotonic()
            if now >= sink.complained + SAY_AGAIN:
                sink.complained = now
                self.say(
                    "", f"cannot write to {sink.name}: {error}; dropping", "warning"
                )
        if not isinstance(sink, TerminalSink) or sink.waits() == (sink in self.paused):
            return
        if sink.waits():
            try:
                self.selector.register(sink.fd, selectors.EVENT_WRITE, sink)
            except (OSError, ValueError):
                return
            mine = [source for source in self.sources if source.sink is sink]
            self.paused[sink] = mine
            for source in mine:
                self.selector.unregister(source.fd)
        else:
            self.selector.unregister(sink.fd)
            for source in self.paused.pop(sink):
                if source.fd >= 0:
                    self.selector.register(source.fd, selectors.EVENT_READ, source)


# === 6. Processes =====================================================================
#
# Only the main thread starts and reaps processes. A program leads a session, hence a
# group, of its own: a signal to the group reaches all that it forked, the terminal's
# Ctrl-C reaches none of it.
#
# subprocess.Popen does the work (vfork, 0.45 ms). It is never asked to wait: all
# children are reaped in one place, and its own waitpid would steal a status.

RUN_VARIABLE = "SUPERVISOR_RUN"  # HASH.PID.START of the supervisor, for leftovers
OWN_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")  # ours, of systemd
DEFAULT_STOP = 8.0  # seconds for a leftover of a program that is no longer known
MOST_FILES = 65536  # where the hard limit of open files is infinite
ENV_LINE = re.compile(
    r"""[ \t]*(?:export[ \t]+)?([A-Za-z_][\w.-]*)[ \t]*=[ \t]*
        (?:"((?:[^"\\]|\\.)*)"|'([^']*)'|((?:[^\s#]|(?<!\s)\#|[ \t]+(?!\#|\s*$))*))
        [ \t]*(?:\#.*)?$""",
    re.VERBOSE | re.DOTALL,
)
# Limits and niceness have no Popen argument, and need root's rights where the program
# gives them up; preexec_fn is unsafe with threads. So a small interpreter stands in
# between for the programs that set them. It reports on a pipe that exec closes.
TRAMPOLINE = """
import os, resource, signal, sys
def fail(code, text):
    os.write({fd}, f"{{code}} {{text}}".encode())
    os._exit(code)
try:
    for name, limit in {limits!r}.items():
        limit = resource.RLIM_INFINITY if limit < 0 else limit
        resource.setrlimit(getattr(resource, "RLIMIT_" + name.upper()), (limit, limit))
except (OSError, ValueError) as error:
    fail(126, f"cannot set the limit {{name}}: {{error}}")
try:
    if {nice!r} is not None:
        os.setpriority(os.PRIO_PROCESS, 0, {nice!r})
except OSError as error:
    fail(126, f"cannot set nice {nice!r}: {{error.strerror}}")
try:
    if {switch!r}:
        uid, gid, groups = {switch!r}
        os.setgroups(groups)
        os.setgid(gid)
        os.setuid(uid)
except OSError as error:
    fail(126, f"cannot switch to user {{uid}}: {{error.strerror}}")
try:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if {coerced!r}:
        os.environ.pop("LC_CTYPE", None)
    os.execvp({argv!r}[0], {argv!r})
except FileNotFoundError:
    fail(127, "no such command: " + repr({argv!r}[0]))
except OSError as error:
    fail(126, "cannot execute " + repr({argv!r}[0]) + ": " + error.strerror)
"""


class SpawnError(Exception):
    """A program cannot be executed; `code` is 127 for a missing command, else 126."""

    def __init__(self, reason: str, code: int = 126) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


class Account(NamedTuple):
    """Who a program runs as."""

    uid: int
    gid: int
    groups: list[int]
    variables: dict[str, str]

    @property
    def is_ours(self) -> bool:
        return self.uid == os.geteuid() and self.gid == os.getegid()


def find_account(program: Program) -> Account | None:
    """Return the account of `user` and `group`, None where neither is set.

    Raises SpawnError: then it does not start, rather than as somebody else.
    """
    if program.user is None and program.group_name is None:
        return None
    import grp  # these two only where somebody is named
    import pwd

    uid, gid, groups, variables = os.geteuid(), os.getegid(), os.getgroups(), {}
    try:
        if program.user is not None:
            named = isinstance(program.user, str) and not program.user.isdecimal()
            entry = pwd.getpwnam(str(program.user)) if named else None
            with contextlib.suppress(KeyError):
                entry = entry or pwd.getpwuid(int(program.user))
            if entry:
                uid, gid = entry.pw_uid, entry.pw_gid
                groups = os.getgrouplist(entry.pw_name, gid)
                names = {"USER": entry.pw_name, "LOGNAME": entry.pw_name}
                shell = entry.pw_shell or "/bin/sh"
                variables = {**names, "HOME": entry.pw_dir, "SHELL": shell}
            else:  # a number without an entry, as images without users have
                uid = gid = int(program.user)
                groups, variables = [gid], {"HOME": "/"}
    except KeyError:
        raise SpawnError(f"no such user: {program.user!r}") from None
    if program.group_name is not None:
        name = str(program.group_name)
        try:
            gid = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
        except KeyError:
            raise SpawnError(f"no such group: {name!r}") from None
        groups = [gid, *(one for one in groups if one != gid)]
    return Account(uid, gid, groups, variables)


def parse_env_file(text: str, path: str) -> dict[str, str]:
    """Return the variables of `KEY=VALUE` lines, quoted as in Compose, nothing expanded.

    Raises SpawnError with file and line.
    """
    variables, lines, at = {}, text.split("\n"), 0
    while at < len(lines):
        line, number = lines[at], at + 1
        at += 1
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = ENV_LINE.match(line)
        while not match and at < len(lines) and opens_quote(line):
            line += "\n" + lines[at]  # a quoted value may go on over line ends
            at += 1
            match = ENV_LINE.match(line)
        if not match:
            raise SpawnError(f"{path}:{number}: expected KEY=VALUE")
        name, double, single, bare = match.groups()
        if double is not None:
            escapes = {"n": "\n", "t": "\t", "r": "\r"}
            bare = re.sub(
                r"\\(.)", lambda m: escapes.get(m[1], m[1]), double, flags=re.S
            )
        variables[name] = bare if single is None else single
    return variables


def opens_quote(line: str) -> bool:
    value = line.partition("=")[2].lstrip()
    return value[:1] in ('"', "'")


def read_env_files(program: Program) -> str:
    """Return the content of a program's `env_file`s, to compare; raises SpawnError."""
    texts = []
    for path in program.env_file:
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                texts.append(file.read())
        except OSError as error:
            reason = f"cannot read env_file {path!r}: {error.strerror}"
            raise SpawnError(reason) from None
    return "\0".join(texts)


def program_environ(
    program: Program,
    base: Mapping[str, str],
    account: Account | None,
    files: str,
    extra: Mapping[str, str],
) -> dict[str, str]:
    """Return the environment of a program; `files` is what `read_env_files` returned."""
    chosen = program.inherit_env
    if chosen is True:
        environ = dict(base)
    else:
        environ = {"PATH": os.defpath}
        environ |= {name: base[name] for name in chosen or () if name in base}
    for name in (*OWN_VARIABLES, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    if account:
        environ |= account.variables
    for path, text in zip(program.env_file, files.split("\0")):
        environ |= parse_env_file(text, path)
    environ |= program.environment
    return environ | {
        "SUPERVISOR_ENABLED": "1",
        "SUPERVISOR_PROCESS_NAME": program.name,
        "SUPERVISOR_GROUP_NAME": program.group,
        "PROCESS_NUM": str(program.number),
        **extra,
    }


class FileLimit:
    """The limit of open files: the hard one for us, the original for the programs.

    Programs inherit what is set while they are spawned, so it is lowered for that
    moment. The descriptors that last are moved above the original limit: the low
    numbers, which Popen needs for its own pipe then, stay free.
    """

    def __init__(self) -> None:
        import resource

        self.resource = resource
        self.soft, self.hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        infinite = resource.RLIM_INFINITY
        self.most = MOST_FILES if self.hard == infinite else self.hard
        self.raised = self.soft != infinite and self.soft < self.most
        try:
            self.set(self.most)
        except (OSError, ValueError):
            self.raised = False

    def set(self, soft: int) -> None:
        if self.raised:
            self.resource.setrlimit(self.resource.RLIMIT_NOFILE, (soft, self.hard))

    def out_of_the_way(self, fd: int) -> int:
        """Return a duplicate of `fd` above the original limit, or `fd` itself."""
        if not self.raised:
            return fd
        try:
            high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self.soft)
        except OSError:
            return fd
        os.close(fd)
        return high


class Child(NamedTuple):
    """A process that was started; `report` is the trampoline's pipe."""

    pid: int
    report: int | None


def spawn(
    program: Program,
    argv: tuple[str, ...],
    environ: dict[str, str],
    account: Account | None,
    files: tuple[int, int | None, int | None],
    limit: FileLimit,
) -> Child:
    """Start a process in a session of its own, with these three descriptors.

    None leaves it ours. Raises SpawnError with the reason. Main thread.
    """
    switch = account if account and not (account.is_ours and os.geteuid()) else None
    if switch and os.geteuid() != 0:
        who = program.user if program.user is not None else program.group_name
        raise SpawnError(f"cannot switch to {who!r}: not root")
    report: tuple[int, int] | None = None
    arguments: dict[str, Any] = {}
    if program.rlimits or program.nice is not None:
        report = os.pipe()
        argv = trampoline(program, argv, environ, switch, report[1])
        arguments = {"pass_fds": [report[1]], "close_fds": True}
    elif switch:
        arguments = {
            "user": switch.uid,
            "group": switch.gid,
            "extra_groups": switch.groups,
        }
    limit.set(limit.soft)
    try:
        popen = subprocess.Popen(
            argv,
            stdin=files[0],
            stdout=files[1],
            stderr=files[2],
            env=environ,
            cwd=program.directory,
            umask=-1 if program.umask is None else program.umask,
            start_new_session=True,
            # All our descriptors are close-on-exec; to close them one by one costs more
            # the more programs there are.
            **{"close_fds": False, **arguments},
        )
    except OSError as error:
        if report:
            os.close(report[0])
        raise spawn_error(program, argv, error) from None
    finally:
        limit.set(limit.most)
        if report:
            os.close(report[1])
    popen.returncode = 0  # it is reaped elsewhere; keep its destructor from waiting
    return Child(popen.pid, report[0] if report else None)


def trampoline(
    program: Program,
    argv: tuple[str, ...],
    environ: Mapping[str, str],
    switch: Account | None,
    fd: int,
) -> tuple[str, ...]:
    code = TRAMPOLINE.format(
        fd=fd,
        limits=dict(program.rlimits),
        nice=program.nice,
        switch=switch and switch[:3],
        coerced="LC_CTYPE" not in environ,
        argv=argv,
    )
    return (sys.executable, "-I", "-S", "-c", code)


def spawn_error(program: Program, argv: tuple[str, ...], error: OSError) -> SpawnError:
    """Return what is wrong, told apart as exec(2) and chdir(2) fail alike."""
    if program.directory and not os.path.isdir(program.directory):
        return SpawnError(f"no such directory: {program.directory!r}")
    if program.directory and error.filename == program.directory:
        return SpawnError(f"cannot enter {program.directory!r}: {error.strerror}")
    if isinstance(error, FileNotFoundError):
        return SpawnError(f"no such command: {argv[0]!r}", 127)
    return SpawnError(f"cannot execute {argv[0]!r}: {error.strerror}")


def start_time(pid: int) -> str:
    """Return when a process started, in ticks since boot; "" if it is gone or unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def path_hash(path: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of a path."""
    try:
        # hashlib loads OpenSSL: 3.6 MB, for one hash.
        from _sha2 import sha256  # type: ignore[import-not-found]  # private; 3.12
    except ImportError:
        try:
            from _sha256 import sha256  # type: ignore[import-not-found]  # 3.11
        except ImportError:
            from hashlib import sha256
    return str(sha256(os.fsencode(path)).hexdigest()[:16])


def variables_of(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; nothing if we may not."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(entry).partition("=")[::2] for entry in entries)


def find_leftovers(digest: str) -> dict[int, str]:
    """Return what dead supervisors of this configuration left running: names by pid.

    Never ourselves or our ancestors, whose shell may stem from such a program; never
    another PID namespace's, where numbers mean something else (Linux).
    """
    table = process_table()
    spared, pid = set(), os.getpid()
    while pid in table:
        spared.add(pid)
        pid = int(table[pid][1])
    found = {}
    for pid in table.keys() - spared:
        variables = variables_of(pid)
        run, _, started = variables.get(RUN_VARIABLE, "").rpartition(".")
        owner, _, supervisor = run.rpartition(".")
        if owner != digest or not supervisor.isdecimal():
            continue
        if start_time(int(supervisor)) != started and namespace(pid) == namespace(
            "self"
        ):
            found[pid] = variables.get("SUPERVISOR_PROCESS_NAME", "")
    return found


def namespace(pid: int | str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


# === 7. Health ========================================================================
#
# A check never delays the loop: a command is a child like any other, http and tcp run in
# a thread that ends by itself. Whoever is too slow is given up at `timeout`.
#
# A notify program speaks through a datagram socket (sd_notify(3)), one for all, in the
# abstract namespace: no folder needs to be writable. The kernel says who sent a message
# (SCM_CREDENTIALS, unix(7)).

FIRST_INTERVAL = 1.0  # seconds between checks until one has passed
SO_PASSCRED = 16  # socket(7)
SCM_CREDENTIALS = 2


def probe(check: Health) -> str:
    """Run an http or tcp check; return what is wrong, or "". Blocks; any thread."""
    try:
        if check.http:
            return probe_http(check.http, check.timeout)
        host, _, port = check.tcp.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), check.timeout).close()
    except Exception as error:  # whatever a server may answer: it did not pass
        return str(getattr(error, "strerror", None) or error) or type(error).__name__
    return ""


@contextlib.contextmanager
def without_ssl() -> Iterator[None]:
    """Import http.client without OpenSSL, half of its 8 MB, which nothing here needs.

    Only where the process is ours: a host may want its HTTPS.
    """
    lean = __name__ == "__main__" and "ssl" not in sys.modules
    if lean:
        sys.modules["ssl"] = None  # type: ignore[assignment]  # "import of ssl halted"
    try:
        yield
    finally:
        if lean:
            del sys.modules["ssl"]


def probe_http(url: str, timeout: float) -> str:
    """GET a URL; any 2xx or 3xx passes, a redirect is not followed."""
    import urllib.parse

    with without_ssl():
        import http.client  # only where there is such a check

    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
    with contextlib.closing(connection):
        if parts.scheme == "https":
            import ssl

            place = (parts.hostname or "", parts.port or 443)
            plain = socket.create_connection(place, timeout)
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(plain, server_hostname=parts.hostname)
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", target, headers={"User-Agent": "supervisors"})
        status = connection.getresponse().status
    return "" if 200 <= status < 400 else f"HTTP status {status}"


class NotifySocket:
    """The socket that notify programs speak to (Linux)."""

    def __init__(self) -> None:
        self.socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        )
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        self.socket.bind(
            ""
        )  # the kernel finds a free abstract name (unix(7), autobind)
        self.address = "@" + self.socket.getsockname().decode().lstrip("\0")

    def receive(self) -> tuple[int, list[str]] | None:
        """Return the sender's pid and the lines of one message; None if there is none."""
        space = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4 * 253)
        try:
            data, ancillary, _, _ = self.socket.recvmsg(65536, space)
        except OSError:
            return None
        pid = 0
        for _, kind, content in ancillary:
            if kind == SCM_CREDENTIALS:
                pid = int.from_bytes(content[:4], sys.byteorder)
            elif kind == socket.SCM_RIGHTS:  # with BARRIER=1, which waits for the close
                for at in range(0, len(content) // 4 * 4, 4):
                    os.close(int.from_bytes(content[at : at + 4], sys.byteorder))
        return pid, data.decode(errors="replace").split("\n")


def tell_manager(message: str) -> None:
    """Tell who runs us, where it listens (systemd's Type=notify)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM
        ) as speaker:
            speaker.setblocking(False)
            speaker.connect("\0" + path[1:] if path[0] == "@" else path)
            speaker.send(message.encode())


# === 8. HTTP ==========================================================================
#
# A request is answered in a thread of its own by a function of a fixed table. It reads
# published snapshots; whatever changes something is done by the main thread, on request.
#
# Sockets are bound at start; http.server is imported with the first connection, since it
# costs 15 ms and 8 MB.

REQUEST_TIME = 5.0  # seconds for a client to send a request, or to take an answer
NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
MOST_CONNECTIONS = 64
MOST_STREAMS = 32  # of those; the others are for probes
MOST_HEAD = 96 * 1024  # bytes of request line and headers
MOST_BODY = 64 * 1024  # bytes
MOST_WAIT = 300.0  # seconds
MOST_EVENTS = 1000  # that a client may be behind
COMMENT_INTERVAL = 15.0  # seconds between signs of life on /events
LOOK_INTERVAL = 1.0  # seconds between two looks whether a follower is still there
FILE_INTERVAL = 0.05  # seconds between two looks at a log file that is followed
GREETING = "Supervisor Running. Check /status"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)
PAGE = r"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>supervisors</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>
:root { --bg: #fbfbfc; --fg: #1c2128; --dim: #626c79; --line: #e0e3e8; --soft: #f1f3f6;
  --good: #17763d; --busy: #8a5700; --bad: #c02429 }
@media (prefers-color-scheme: dark) { :root { --bg: #111418; --fg: #dde2e8;
  --dim: #929dab; --line: #2a3039; --soft: #191e24; --good: #4cc07c; --busy: #dba53c;
  --bad: #ff7b78 } } * { box-sizing: border-box }
[hidden], p:empty { display: none !important }
html:has(#log:not([hidden])) { scroll-padding-bottom: 50vh }
body { max-width: 1400px; margin: auto; padding: 0 24px; color: var(--fg);
  background: var(--bg); font: 14px/20px system-ui, sans-serif;
  font-variant-numeric: tabular-nums }
header, form, #log div { display: flex; flex-wrap: wrap; gap: 8px; align-items: center }
header { min-height: 60px; padding: 14px 0; gap: 8px 16px; background: var(--bg) }
.gone header, #error { position: sticky; top: 0; z-index: 1 } .gone main { opacity: .6 }
form, #log-close { margin-left: auto } small { margin-left: 8px; font-weight: 400 }
h1, h2, small { margin-block: 0; font-size: 14px } .number { text-align: right }
small, label, thead, .off, .detail, [data-label]::before { color: var(--dim) }
.good { color: var(--good) } .busy { color: var(--busy) } .bad { color: var(--bad) }
.dot::before { content: ""; display: inline-block; width: .6em; height: .6em;
  margin-right: .5em; border-radius: 50%; background: currentColor }
#health { margin: 8px 0 16px; font-size: 20px; line-height: 28px; font-weight: 600 }
#error { padding: 8px 12px; border-left: 3px solid; background: var(--soft) }
table { width: 100%; margin-bottom: 32px; border-spacing: 0 }
th, td { padding: 5px 24px 5px 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: baseline; white-space: nowrap }
thead th, .state, [data-label]::before { font-size: 12px; font-weight: 500 }
tbody th, .detail { min-width: 160px; white-space: normal } .detail { width: 100% }
p, pre, tbody th, .detail { overflow-wrap: anywhere }
.verbs { display: none; padding-right: 0 } .may .verbs { display: table-cell }
button, input { padding: 2px 9px; border: 1px solid var(--line); border-radius: 6px;
  background: none; color: inherit; font: 13px/18px system-ui, sans-serif }
button:disabled { opacity: .4 } :focus-visible { outline: 2px solid #4a86e8 }
#log { position: sticky; bottom: 0; padding: 10px 0 16px; background: var(--bg);
  border-top: 1px solid var(--line) }
pre { height: 36vh; margin: 10px 0 0; padding: 10px 12px; overflow: auto;
  background: var(--soft); font: 12px/18px monospace; white-space: pre-wrap }
@media (max-width: 1000px) { body { padding: 0 16px } form { width: 100% }
  button, input { padding-block: 6px } input, .verbs button { flex: 1 }
  thead { display: none } table { display: block } tbody { display: grid; gap: 0 32px;
    grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
  tr { display: grid; grid-template-columns: 3fr 4fr 3fr 3fr; gap: 8px 12px;
    align-content: start; padding: 14px 0; border-top: 1px solid var(--line) }
  tr > * { padding: 0; border: 0 } tr > .number { text-align: left }
  tr > th { grid-column: span 3 } tr > td:nth-child(n+7) { grid-column: 1 / -1 }
  td[data-label]::before { content: attr(data-label); display: block }
  .detail:empty { display: none } .may .verbs { display: flex; gap: 8px } }
</style>
<header><h1>supervisors<small id="host"></small></h1>
  <span id="connection" class="dot off" role="status">Connecting</span>
  <form id="unlock"><label for="token">Token</label>
    <input id="token" type="password" autocomplete="off"><button>Unlock</button></form></header>
<main hidden><p id="error" class="bad" role="alert"></p>
  <p id="health" role="status"><span></span><small></small></p>
  <table aria-label="Programs"><thead><tr><th>Program<th>State<th class="number">PID
    <th class="number">Uptime<th class="number">Restarts<th>Health<th>Detail
    <th class="verbs">Control</thead><tbody></tbody></table></main>
<section id="log" aria-labelledby="log-name" hidden>
  <div><h2 id="log-name"></h2><small id="log-state" role="status"></small>
    <button id="log-close">Close</button></div><pre tabindex="0"></pre></section>
<template><tr><th scope="row"><td><td class="number" data-label="PID">
  <td class="number" data-label="Uptime"><td class="number" data-label="Restarts">
  <td data-label="Health"><td class="detail"><td class="verbs">
    <button data-verb="start">Start</button> <button data-verb="stop">Stop</button>
    <button data-verb="restart">Restart</button> <button data-verb="log">Log</button>
</template>
<script>'use strict';
const $ = selector => document.querySelector(selector), programs = new Map();
const rows = $('tbody'), pre = $('pre'), error = $('#error'), LOG_LIMIT = 200_000;
let live = false, goneAt = '', follower = null, opener = null, timer = 0;
const put = (node, text) => { node.textContent === `${text}` || (node.textContent = text) };
const fail = (what, e) => put(error, `${what}: ${e.message}`);
const clock = seconds => (seconds < 86400 ? '' : `${Math.floor(seconds / 86400)}d `)
  + new Date(seconds * 1000).toISOString().slice(11, 19);
function kind({state, running, ready, healthy, exit_code}) {
  if (/BACKOFF|FATAL/.test(state) || running && healthy === false
    || state === 'EXITED' && !ready && exit_code !== 0) return 'bad';
  return state === 'WAITING' || running && !ready ? 'busy' : running ? 'good' : 'off';
}
function paint({row: {children: cells}, status: s, at}) {
  const age = (performance.now() - at) / 1000;
  const uptime = s.uptime !== null ? clock(s.uptime + age)
    : s.restart_in !== null ? `in ${Math.max(0, Math.ceil(s.restart_in - age))} s` : '–';
  const health = !s.running || s.state === 'STOPPING' ? '–' : s.healthy ? 'healthy'
    : s.healthy === false ? 'unhealthy' : s.ready ? '–' : 'not ready';
  const why = [s.status_text, s.reason || !s.running && s.description].filter(Boolean);
  [s.name, s.state, s.pid ?? '–', uptime, s.restarts, health, why.join(' · ')]
    .forEach((text, i) => put(cells[i], text));
  cells[1].className = `state dot ${kind(s)}`;
  cells[5].className = health === '–' ? 'off' : kind(s);
  const stop = s.running || /BACKOFF|WAITING/.test(s.state);
  const can = {start: !s.running, stop, restart: stop, log: true};
  for (const button of cells[7].children) {
    button.disabled = !live || !can[button.dataset.verb];
    button.ariaLabel = `${button.textContent} ${s.name}`;
  }
}
function repaint() {
  timer = 0; programs.forEach(paint);
  const all = [...programs.values()].map(program => program.status);
  const bad = all.filter(s => kind(s) === 'bad');
  const busy = all.filter(s => kind(s) === 'busy' && s.state !== 'STOPPING');
  const [worst, word] = bad.length ? [bad, 'failing'] : [busy, 'starting'];
  const names = worst.slice(0, 6).map(s => s.name).join(', ');
  const [summary, count] = $('#health').children;
  put(summary, names ? `${worst.length} ${word}: ${names}` : 'All well');
  put(count, `${all.filter(s => s.running).length} of ${all.length} alive`);
  summary.className = `dot ${bad.length ? 'bad' : names ? 'busy' : 'good'}`;
  document.title = `${live ? bad.length || '' : 'gone:'} supervisors`;
}
function show(status) {
  const {name} = status, row = programs.get(name)?.row
    ?? rows.appendChild($('template').content.firstChild.cloneNode(true));
  programs.set(row.dataset.name = name, {row, status, at: performance.now()});
}
function setLive(value, text) {
  live = value; put($('#connection'), text); repaint();
  $('#connection').className = `dot ${live ? 'good' : 'bad'}`;
  document.body.classList.toggle('gone', !live);
}
function connect() {
  const events = new EventSource('events'), now = () => new Date().toLocaleTimeString();
  const on = (type, act) => events.addEventListener(type, event => {
    act(JSON.parse(event.data)); timer ||= setTimeout(repaint, 20);  // once for a burst
  });
  on('state', show);
  on('removed', ({name}) => { programs.get(name)?.row.remove(); programs.delete(name) });
  on('snapshot', statuses => {
    programs.clear(); rows.replaceChildren(); statuses.forEach(show);
    $('main').hidden = false;
    setLive(true, goneAt ? `Supervisor is back since ${now()}` : 'Live'); goneAt = '';
    if (sessionStorage.token) unlock(); else setControl(false);
  });
  events.onerror = () => {
    setLive(false, `Supervisor is gone since ${goneAt ||= now()}, trying again`);
    if (events.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
  };
}
function setControl(allowed) {
  $('#unlock').hidden = allowed; document.body.classList.toggle('may', allowed);
  if (!allowed) { delete sessionStorage.token; closeLog() }
}
async function call(method, name, rest, signal) {
  const headers = {Authorization: `Bearer ${sessionStorage.token}`};
  const url = `programs/${encodeURIComponent(name)}/${rest}`;
  const answer = await fetch(url, {method, headers, signal}), cause = answer.status;
  if (answer.ok) return answer;
  const {error = `HTTP ${cause}`} = await answer.json().catch(() => ({}));
  if (cause === 401) setControl(false);
  throw Error(error, {cause});
}
async function unlock() {  // asks for what needs the token and changes nothing
  const answer = await call('GET', 'all', 'logs?lines=0').catch(e => e);
  if (answer.ok || answer.cause === 409) return setControl(true);
  if (answer.cause !== 403) return fail('unlock', answer);
  setControl(false); $('#unlock').hidden = true;
  put(error, 'Control over TCP is off: the supervisor has no token');
}
function closeLog() {
  follower?.abort(); opener?.focus(); follower = opener = null; $('#log').hidden = true;
}
async function openLog(name, button) {
  closeLog(); opener = button; pre.replaceChildren(); $('#log').hidden = false;
  put($('#log-name'), name); put($('#log-state'), 'following');
  pre.focus({preventScroll: true});
  const {signal} = follower = new AbortController();
  try {
    const {body} = await call('GET', name, 'logs?lines=100&follow=1', signal);
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part; !(part = await reader.read()).done;) {
      const atEnd = pre.scrollTop + pre.clientHeight > pre.scrollHeight - 20;
      pre.append(part.value.replace(/\x1b\[[0-9;?]*[ -/]*[@-~]/g, '').slice(-LOG_LIMIT));
      while (pre.textContent.length > LOG_LIMIT) pre.firstChild.remove();
      if (atEnd) pre.scrollTop = pre.scrollHeight;
    }
  } catch (e) {
    if (e.name === 'AbortError') return;
    if (!pre.firstChild) { closeLog(); fail(`log ${name}`, e) }
  }
  put($('#log-state'), 'ended');
}
rows.addEventListener('click', ({target}) => {
  const {verb} = target.dataset, {name} = target.closest('tr').dataset;
  if (verb) put(error, '');
  if (verb === 'log') openLog(name, target);
  else if (verb) call('POST', name, verb).catch(e => fail(`${verb} ${name}`, e));
});
$('#unlock').addEventListener('submit', event => {
  event.preventDefault(); sessionStorage.token = $('#token').value.trim();
  put(error, ''); $('#token').value = ''; unlock();
});
$('#log-close').addEventListener('click', closeLog);
$('#log').addEventListener('keydown', ({key}) => { if (key === 'Escape') closeLog() });
setInterval(() => { if (live) repaint() }, 1000);
put($('#host'), location.host); connect();
</script>"""


class Snapshot(NamedTuple):
    """What is published of a program; immutable, so that any thread may read it."""

    program: Program
    status: Status
    output: Output
    log_format: str  # of the terminal
    started_at: float | None = None  # Unix time of the last start
    changed_at: float | None = None  # Unix time of the last change of state

    @property
    def ready(self) -> bool:
        return is_ready(self.program, self.status)


def status_object(snapshot: Snapshot, now: float) -> dict[str, Any]:
    """Return a program's status as JSON has it; never its arguments or environment."""
    program, status = snapshot.program, snapshot.status
    alive = status.is_alive
    waits = status.state is State.BACKOFF and status.deadline is not None
    ended_by = status.exit_signal
    return {
        "name": program.name,
        "group": program.group,
        "running": alive,
        "state": status.state.value,
        "ready": snapshot.ready,
        "healthy": status.healthy,
        "pid": status.pid,
        "uptime": round(now - status.started, 3) if alive else None,
        "started_at": timestamp(snapshot.started_at) if snapshot.started_at else None,
        "restarts": status.restarts,
        "failures": status.failures,
        "exit_code": status.exit_code,
        "exit_signal": None if ended_by is None else signal_name(ended_by),
        "reason": status.reason,
        "status_text": status.status_text,
        "restart_in": round(max(status.deadline - now, 0), 3) if waits else None,  # type: ignore[operator]
        "log_dropped_bytes": snapshot.output.dropped,
        "description": describe(snapshot, now),
    }


def describe(snapshot: Snapshot, now: float) -> str:
    """Return the last column of supervisorctl's status."""
    status = snapshot.status
    if status.state is State.RUNNING:
        seconds = int(now - status.started)
        days, clock = divmod(seconds, 86400)
        hours, minutes = divmod(clock // 60, 60)
        spent = f"{days} day{'s' * (days != 1)}, " if days else ""
        text = f"pid {status.pid}, uptime {spent}{hours}:{minutes:02}:{clock % 60:02}"
        return ", ".join(filter(None, (text, status.status_text, status.reason)))
    if status.state in (State.STOPPED, State.EXITED):
        if snapshot.changed_at is None:
            return "Not started"
        when = time.strftime("%b %d %I:%M %p", time.localtime(snapshot.changed_at))
        return ", ".join(filter(None, (when, status.reason)))
    return status.reason


def outcome(verb: str, snapshot: Snapshot) -> bool | None:
    """Return whether an order has been carried out; None while that is open."""
    status = snapshot.status
    if verb == "stop":
        return (
            True if not status.is_alive and status.state is not State.WAITING else None
        )
    if snapshot.ready or (status.state is State.EXITED and status.succeeded):
        return True
    ended = (State.BACKOFF, State.EXITED, State.FATAL, State.STOPPED)
    return False if status.state in ended else None


class Listener(NamedTuple):
    """A bound socket; `is_control` may do everything."""

    socket: socket.socket
    address: Address
    is_control: bool


class Request(NamedTuple):
    method: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    targets: list[Snapshot]  # of the NAME in the path
    several: bool  # that NAME asks for an array


class Response(NamedTuple):
    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    stream: Iterator[bytes] | None = None  # instead of a body; b"" is a sign of life


class HttpError(Exception):
    def __init__(
        self, status: int, error: str, *headers: tuple[str, str], **more: Any
    ) -> None:
        super().__init__(error)
        self.status = status
        self.headers = headers
        self.content = {"error": error, **more}


def as_json(content: object, status: int = 200) -> Response:
    import json  # with the first answer

    return Response(status, json.dumps(content).encode())


def select_programs(
    snapshots: Mapping[str, Snapshot], name: str
) -> tuple[list[Snapshot], bool]:
    """Return the programs that a NAME means, and whether it may mean several.

    A program, a group, a glob, `all`, or such joined by commas. Raises HttpError 404.
    """
    if name in snapshots:
        return [snapshots[name]], False
    found: dict[str, Snapshot] = {}
    for word in name.split(","):
        pattern = re.compile(translate(word) if word != "all" else "(?s:.*)")
        matches = [
            one
            for one in snapshots.values()
            if pattern.fullmatch(one.program.name) or one.program.group == word
        ]
        if not matches:
            raise HttpError(404, f"no program {word!r}{hint(word, snapshots)}")
        found |= {one.program.name: one for one in matches}
    return list(found.values()), True


def translate(pattern: str) -> str:
    import fnmatch  # only for names that are no program's

    return fnmatch.translate(pattern)


def get_page(supervisor: Supervisor, request: Request) -> Response:
    if "text/html" not in request.headers.get("Accept", ""):
        return Response(200, GREETING.encode(), "text/plain; charset=utf-8")
    headers = (("Content-Security-Policy", POLICY), ("X-Frame-Options", "DENY"))
    return Response(200, PAGE.encode(), "text/html; charset=utf-8", headers)


def get_health(supervisor: Supervisor, request: Request) -> Response:
    """Answer how everything wanted is, or the programs that were named."""
    named = bool(request.targets)
    verdicts, reasons = {"ok"}, {}
    for snapshot in request.targets or list(supervisor.snapshots.values()):
        program, status = snapshot.program, snapshot.status
        found = verdict(program, status)
        if not found and named:
            reasons[program.name] = reason_of(status)
            found = (
                "ok" if status.succeeded and status.state is State.EXITED else "failing"
            )
        elif found not in ("", "ok"):
            reasons[program.name] = reason_of(status)
        verdicts.add(found)
    worst = next(word for word in ("failing", "starting", "ok") if word in verdicts)
    return as_json(
        {"status": worst, "programs": reasons}, 200 if worst == "ok" else 503
    )


def reason_of(status: Status) -> str:
    return ", ".join(filter(None, (status.state.value, status.reason)))


def get_live(supervisor: Supervisor, request: Request) -> Response:
    supervisor.ask(lambda: None)
    return as_json({"status": "ok"})


def get_status(supervisor: Supervisor, request: Request) -> Response:
    now = time.monotonic()
    targets = request.targets or list(supervisor.snapshots.values())
    objects = [status_object(one, now) for one in targets]
    return as_json(objects if request.several or not request.targets else objects[0])


def get_metrics(supervisor: Supervisor, request: Request) -> Response:
    """Answer in Prometheus' text format 0.0.4."""
    snapshots, now = list(supervisor.snapshots.values()), time.monotonic()

    def family(
        name: str, kind: str, text: str, lines: Iterable[tuple[str, float]]
    ) -> str:
        head = f"# HELP supervisors_{name} {text}\n# TYPE supervisors_{name} {kind}\n"
        return head + "".join(
            f"supervisors_{name}{labels} {n}\n" for labels, n in lines
        )

    def each(value: Callable[[Snapshot], float | None]) -> Iterator[tuple[str, float]]:
        for one in snapshots:
            number = value(one)
            if number is not None:
                names = f'name="{one.program.name}",group="{one.program.group}"'
                yield f"{{{names}}}", number

    states = (
        (
            f'{{name="{one.program.name}",group="{one.program.group}",state="{state.value}"}}',
            int(one.status.state is state),
        )
        for one in snapshots
        for state in State
    )
    spent = each(lambda one: round(now - one.status.started, 3) * one.status.is_alive)
    texts = [
        family("info", "gauge", "Version.", [(f'{{version="{__version__}"}}', 1)]),
        family("start_time_seconds", "gauge", "Start, Unix time.",
               [("", round(supervisor.started_at, 3))]),
        family("program_up", "gauge", "1 while alive.", each(lambda one: int(one.status.is_alive))),
        family("program_ready", "gauge", "1 while ready.", each(lambda one: int(one.ready))),
        family("program_state", "gauge", "1 for the present state.", states),
        family("program_uptime_seconds", "gauge", "Seconds since its start.", spent),
        family("program_restarts_total", "counter", "Automatic restarts.",
               each(lambda one: one.status.restarts)),
        family("program_exit_code", "gauge", "The last exit code, 128+N for a signal.",
               each(last_code)),
        family("program_log_dropped_bytes_total", "counter", "Output that was dropped.",
               each(lambda one: one.output.dropped)),
    ]  # fmt: skip
    return Response(
        200, "".join(texts).encode(), "text/plain; version=0.0.4; charset=utf-8"
    )


def last_code(snapshot: Snapshot) -> int | None:
    status = snapshot.status
    return status.exit_code if status.exit_signal is None else 128 + status.exit_signal


def get_events(supervisor: Supervisor, request: Request) -> Response:
    return Response(content_type="text/event-stream", stream=stream_events(supervisor))


def stream_events(supervisor: Supervisor) -> Iterator[bytes]:
    """Yield every change of state as server-sent events, a snapshot of all first."""
    import json

    def event(kind: str, content: object) -> bytes:
        return f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode()

    feed = supervisor.events
    with feed.followed():
        at, now = feed.end, time.monotonic()
        everything = [status_object(one, now) for one in supervisor.snapshots.values()]
        yield event("snapshot", everything)
        quiet_since = time.monotonic()
        while not feed.closed or feed.end > at:
            items, at = feed.read(at, LOOK_INTERVAL)
            now = time.monotonic()
            if items:
                quiet_since = now
            elif now - quiet_since >= COMMENT_INTERVAL:
                quiet_since = now
                yield b": still here\n\n"
            else:
                yield b""
            for item in items:
                if isinstance(item, str):
                    yield event("removed", {"name": item})
                else:
                    yield event("state", status_object(item, now))


def get_logs(supervisor: Supervisor, request: Request) -> Response:
    """Answer the newest lines of one program, and go on with `follow`."""
    snapshot = request.targets[0]
    name = snapshot.program.name
    if request.several and len(request.targets) != 1:
        raise HttpError(400, "expected one program, not several")
    lines = int(number_of(request, "lines", 100, 10**9))
    follow = one_word(request, "follow", ("0", "1")) == "1"
    stream = one_word(request, "stream", ("", "stdout", "stderr"))
    both = [
        route(snapshot.program, one, snapshot.log_format)
        for one in ("stdout", "stderr")
    ]
    if stream and isinstance(both[0].target, str) and both[0].target == both[1].target:
        raise HttpError(400, f"both streams of {name} share one file")
    chosen = both[stream == "stderr"]
    recent = snapshot.output.recent
    if isinstance(chosen.target, str) and chosen.target != NOWHERE:
        program = snapshot.program
        body = file_log(
            supervisor, name, chosen.target, program.logfile_backups, lines, follow
        )
    elif chosen.direct:
        raise HttpError(
            409, f"{name} writes to a descriptor of its own, which nobody reads"
        )
    elif recent is None:
        body = iter(())
    else:
        body = memory_log(recent, stream, lines, follow)
    return Response(content_type="text/plain; charset=utf-8", stream=body)


def number_of(request: Request, key: str, default: float, most: float) -> float:
    text = request.query.get(key, "")
    try:
        number = float(text) if text else default
    except ValueError:
        number = -1.0
    if not 0 <= number <= most:
        raise HttpError(
            400, f"{key}: expected a number from 0 to {most:g}, got {text!r}"
        )
    return number


def one_word(request: Request, key: str, words: tuple[str, ...]) -> str:
    word = request.query.get(key, words[0])
    if word not in words:
        expected = ", ".join(filter(None, words))
        raise HttpError(400, f"{key}: expected one of {expected}, got {word!r}")
    return word


def memory_log(
    feed: Feed[tuple[str, bytes]], stream: str, lines: int, follow: bool
) -> Iterator[bytes]:
    def text(items: list[tuple[str, bytes]]) -> bytes:
        return b"".join(data for name, data in items if stream in ("", name))

    with feed.followed() if follow else contextlib.nullcontext():
        items, at = feed.newest()
        newest = text(items).splitlines(keepends=True)
        yield b"".join(newest[max(len(newest) - lines, 0) :])
        while follow and not (feed.closed and feed.end <= at):
            items, at = feed.read(at, LOOK_INTERVAL)
            yield text(items)


def file_log(
    supervisor: Supervisor, name: str, path: str, backups: int, lines: int, follow: bool
) -> Iterator[bytes]:
    """Yield the end of a log file and its backups; then what is added, by looking.

    A file that was rotated is read to its end, then the ones after it, found by inode.
    """
    numbers = range(min(backups, 1000), 0, -1)
    files: list[tuple[int, int]] = []  # descriptors and offsets, the oldest first
    try:
        for file in (path, *(f"{path}.{number}" for number in reversed(numbers))):
            if files and lines <= 0:
                break
            with contextlib.suppress(OSError):
                fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
                start, found = tail_start(fd, os.fstat(fd).st_size, lines)
                files.insert(0, (fd, start))
                lines -= found
        while files:
            fd, at = files[0]
            while chunk := os.pread(fd, PIPE, at):
                at += len(chunk)
                yield chunk
            if len(files) > 1:
                os.close(files.pop(0)[0])
                continue
            files[0] = (fd, at)
            if not follow or supervisor.is_gone(name):
                return
            successor = newer_file(fd, path, numbers)
            if successor is None:
                time.sleep(FILE_INTERVAL)
                yield b""
            elif os.fstat(fd).st_size <= at:
                files.append((successor, 0))
            else:
                os.close(successor)
    finally:
        for fd, _ in files:
            os.close(fd)


def newer_file(fd: int, path: str, numbers: Iterable[int]) -> int | None:
    """Return the file that came after `fd`, opened; None if there is none yet."""
    mine = os.fstat(fd)
    names = [f"{path}.{number}" for number in numbers] + [path]
    known = [name for name in names if os.path.exists(name)]
    found = [os.path.samestat(os.stat(name), mine) for name in known]
    if not known or found[-1]:
        return None
    after = found.index(True) + 1 if True in found else len(known) - 1
    try:
        return os.open(known[after], os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None


def tail_start(fd: int, size: int, lines: int) -> tuple[int, int]:
    """Return where the last `lines` lines of a file begin, and how many those are."""
    found, end = 0, size
    if lines <= 0:
        return size, 0
    while end > 0:
        start = max(end - PIPE, 0)
        chunk = os.pread(fd, end - start, start)
        at = len(chunk)
        while (at := chunk.rfind(b"\n", 0, at)) >= 0:
            if start + at + 1 == size:
                continue  # the end of the last line begins no other
            found += 1
            if found == lines:
                return start + at + 1, found
        end = start
    return 0, found + (size > 0)


def post_verb(verb: str) -> Callable[[Supervisor, Request], Response]:
    """Return the answer to POST /programs/NAME/`verb`."""

    def answer(supervisor: Supervisor, request: Request) -> Response:
        wait = number_of(request, "wait", 0, MOST_WAIT)
        names = [one.program.name for one in request.targets]
        feed = supervisor.events
        with feed.followed():
            at, found = supervisor.ask(lambda: supervisor.order(verb, names))
            decided = follow_orders(feed, at, verb, found, time.monotonic() + wait)
        now = time.monotonic()
        objects = [status_object(one, now) for one in found.values()]
        code = 200 if wait and decided else 202
        return as_json(objects if request.several else objects[0], code)

    return answer


def follow_orders(
    feed: Feed[Snapshot | str],
    at: int,
    verb: str,
    found: dict[str, Snapshot],
    end: float,
) -> bool:
    """Update `found` until all outcomes are known, or it is too late; return whether."""
    open_ones = {name for name, one in found.items() if outcome(verb, one) is None}
    while open_ones and not feed.closed:
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            items, at = feed.read(at, left)
        except Lagged:
            at = feed.end
            continue
        for item in items:
            name = item if isinstance(item, str) else item.program.name
            if name not in open_ones:
                continue
            if not isinstance(item, str):
                found[name] = item
                if outcome(verb, item) is None:
                    continue
            open_ones.discard(name)
    return not open_ones


def post_signal(supervisor: Supervisor, request: Request) -> Response:
    name = request.query.get("signal", "")
    try:
        number = signal_number(name)
    except ValueError:
        raise HttpError(
            400, f"signal: expected the name of a signal, got {name!r}"
        ) from None
    names = [one.program.name for one in request.targets]
    found = supervisor.ask(lambda: supervisor.signal_programs(number, names))
    now = time.monotonic()
    objects = [status_object(one, now) for one in found]
    return as_json(objects if request.several else objects[0])


def post_reload(supervisor: Supervisor, request: Request) -> Response:
    try:
        return as_json(supervisor.ask(supervisor.reload))
    except ConfigError as error:
        raise HttpError(422, str(error), errors=error.errors) from None


def post_shutdown(supervisor: Supervisor, request: Request) -> Response:
    supervisor.ask(lambda: supervisor.begin_shutdown(0, "shutdown over HTTP"))
    return as_json({"status": "shutting down"}, 202)


class Endpoint(NamedTuple):
    """A route: `*` in its path stands for NAME; `guarded` needs the token over TCP."""

    method: str
    path: tuple[str, ...]
    answer: Callable[[Supervisor, Request], Response]
    guarded: bool = False


ENDPOINTS = (
    Endpoint("GET", ("",), get_page),
    Endpoint("GET", ("health",), get_health),
    Endpoint("GET", ("health", "live"), get_live),
    Endpoint("GET", ("health", "*"), get_health),
    Endpoint("GET", ("status",), get_status),
    Endpoint("GET", ("status", "*"), get_status),
    Endpoint("GET", ("metrics",), get_metrics),
    Endpoint("GET", ("events",), get_events),
    Endpoint("GET", ("programs", "*", "logs"), get_logs, True),
    Endpoint("POST", ("programs", "*", "start"), post_verb("start"), True),
    Endpoint("POST", ("programs", "*", "stop"), post_verb("stop"), True),
    Endpoint("POST", ("programs", "*", "restart"), post_verb("restart"), True),
    Endpoint("POST", ("programs", "*", "signal"), post_signal, True),
    Endpoint("POST", ("reload",), post_reload, True),
    Endpoint("POST", ("shutdown",), post_shutdown, True),
)


def find_endpoint(method: str, path: tuple[str, ...]) -> Endpoint:
    """Return the route of a request; raises HttpError 404 or 405."""
    matching = [
        one
        for one in ENDPOINTS
        if len(one.path) == len(path)
        and all(want in ("*", got) for want, got in zip(one.path, path))
    ]
    if not matching or ("*" in matching[0].path and "" in path):
        raise HttpError(404, "no such path")
    allowed = ["GET", "HEAD"] if matching[0].method == "GET" else ["POST"]
    if method not in allowed:
        raise HttpError(405, f"{method} is not allowed", ("Allow", ", ".join(allowed)))
    return matching[0]  # /health/live stands before /health/*


def parse_target(target: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the path's words and the query; raises HttpError 400."""
    import urllib.parse  # http.server has loaded it

    target = re.sub(r"^http://[^/?]*", "", target)
    path, _, query = target.partition("?")
    words = tuple(
        urllib.parse.unquote(word, errors="strict") for word in path.split("/")[1:]
    )
    if not path.startswith("/") or any("\0" in word for word in words):
        raise ValueError
    return words, dict(urllib.parse.parse_qsl(query, keep_blank_values=True))


def respond(
    supervisor: Supervisor,
    listener: Listener,
    method: str,
    target: str,
    headers: Mapping[str, str],
) -> Response:
    """Answer a request; raises HttpError. In the order that refusals have."""
    try:
        if not target.isascii() or not target.isprintable():
            raise ValueError
        words, query = parse_target(target)
    except ValueError:
        raise HttpError(400, "malformed path") from None
    endpoint = find_endpoint(method, words)
    targets: list[Snapshot] = []
    several = False
    if "*" in endpoint.path:
        name = words[endpoint.path.index("*")]
        targets, several = select_programs(supervisor.snapshots, name)
    if not listener.is_control:
        check_origin(supervisor.config, listener, method, headers)
        if endpoint.guarded:
            check_token(supervisor.token, headers.get("Authorization", ""))
    return endpoint.answer(
        supervisor, Request(method, query, headers, targets, several)
    )


def check_origin(
    config: Config, listener: Listener, method: str, headers: Mapping[str, str]
) -> None:
    """Refuse what another site has a browser send; raises HttpError 403.

    Without Host it is no browser's. A name that an attacker's DNS points at loopback is
    caught by the Host, a form or script of another site by the Origin.
    """
    host = headers.get("Host", "").lower()
    name = re.sub(r":\d*$", "", host).strip("[]")
    known = name == "localhost" or name.endswith(".localhost") or name == "::1"
    known = known or re.fullmatch(r"127(\.\d{1,3}){3}", name) is not None
    allowed = [one.lower() for one in config.allowed_hosts]
    if host and listener.address.is_loopback and not known:
        if name not in allowed and host not in allowed:
            raise HttpError(403, f"Host {host!r} is not one of ours, see allowed_hosts")
    origin = headers.get("Origin", "").lower()
    if method == "POST" and origin:
        place = origin.partition("://")[2]
        if place != host and re.sub(r":\d*$", "", place) not in allowed:
            raise HttpError(403, f"Origin {origin!r} is foreign")


def check_token(token: str, authorization: str) -> None:
    """Raise HttpError 403 where there is no token, 401 where it is not this one."""
    if not token:
        raise HttpError(403, "no token is configured: read-only over TCP, see `token`")
    import base64
    import hmac

    scheme, _, given = authorization.partition(" ")
    offered = given.strip().encode(errors="replace")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            offered = base64.b64decode(offered, validate=True).partition(b":")[2]
    elif scheme.lower() != "bearer":
        offered = b""
    if not hmac.compare_digest(offered, token.encode()):
        raise HttpError(401, "wrong or missing token", ("WWW-Authenticate", "Bearer"))


class DeadlineReader(io.RawIOBase):
    """A socket's input: what belongs to one request has to come in REQUEST_TIME."""

    def __init__(self, source: socket.socket) -> None:
        self.source = source
        self.begin()

    def begin(self) -> None:
        """Wait for another request."""
        self.deadline = time.monotonic() + REQUEST_TIME
        self.allowance = MOST_HEAD
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self.count > self.allowance:
            raise HttpError(431, "the headers are too long")
        self.source.settimeout(left)
        count = self.source.recv_into(buffer)
        self.count += count
        return count


class Place(NamedTuple):
    """What a conversation is about."""

    supervisor: Supervisor
    listener: Listener


if TYPE_CHECKING:
    RequestHandler = http.server.BaseHTTPRequestHandler
else:
    RequestHandler = object  # until the first connection, see `converse`


class Conversation(RequestHandler):
    """One connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    server_version = f"supervisors/{__version__}"
    sys_version = ""
    # Buffered: unbuffered, headers and body are two packets, and Nagle's algorithm
    # against the delayed ACK makes every answer take 44 ms.
    wbufsize = -1
    server: Place  # type: ignore[assignment]  # the base only hands it on

    def setup(self) -> None:
        super().setup()
        if self.connection.family != socket.AF_UNIX:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.raw = DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self.raw)

    def handle_one_request(self) -> None:
        self.close_connection = True
        self.command, self.request_version = "", self.protocol_version
        self.requestline = ""
        try:
            response = self.read_request()
            if response is not None:
                self.send(response)
        except HttpError as error:
            self.refuse(error)
        except SupervisorError as error:
            self.refuse(HttpError(409, str(error)))
        except TimeoutError:
            if self.raw.count:  # a client that says nothing gets no answer
                self.refuse(
                    HttpError(408, f"no whole request within {REQUEST_TIME:g} s")
                )
        except OSError:
            pass  # it is gone
        except Exception as error:
            self.server.supervisor.say(
                "", f"cannot answer {self.requestline!r}: {error!r}", "error"
            )
            self.refuse(HttpError(500, "internal error"))

    def read_request(self) -> Response | None:
        """Read and answer a request; None if there is none, or it was refused."""
        self.raw.begin()
        line = self.rfile.readline(65537)
        if not line:
            return None
        if len(line) > 65536:
            raise HttpError(414, "the request line is too long")
        words = line.decode("iso-8859-1").split()
        if len(words) != 3 or not line.endswith(b"\n"):
            raise HttpError(400, "malformed request line")
        self.raw_requestline = line
        if not self.parse_request():
            return None  # `send_error` was called
        self.read_body()
        self.connection.settimeout(REQUEST_TIME)
        headers = {name.title(): value for name, value in self.headers.items()}
        return respond(*self.server, words[0], words[1], headers)

    def read_body(self) -> None:
        """Read past a body: none of the requests has a use for it."""
        if "Transfer-Encoding" in self.headers:
            raise HttpError(411, "expected a Content-Length")
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal():
            raise HttpError(400, "malformed Content-Length")
        if int(length) > MOST_BODY:
            raise HttpError(413, f"expected a body of at most {MOST_BODY} bytes")
        self.raw.allowance += MOST_BODY
        self.rfile.read(int(length))

    def send(self, response: Response) -> None:
        if response.stream is None:
            self.send_head(response, len(response.body))
            if self.command != "HEAD":
                self.wfile.write(response.body)
            self.wfile.flush()
            return
        self.close_connection = True
        with self.server.supervisor.stream_slot():
            self.send_head(response, None)
            self.wfile.flush()
            if self.command != "HEAD":
                self.send_stream(response.stream)

    def send_head(self, response: Response, length: int | None) -> None:
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in response.headers:
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        elif self.request_version == "HTTP/1.0":
            self.send_header("Connection", "keep-alive")
        self.end_headers()

    def send_stream(self, stream: Iterator[bytes]) -> None:
        """Send what comes, until it ends, or the client is gone or does not keep up."""
        self.wfile.flush()
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        with contextlib.suppress(Lagged), contextlib.closing(stream):  # type: ignore[type-var]
            for chunk in stream:
                if chunk:
                    self.connection.sendall(chunk)
                elif poll.poll(0) and not self.connection.recv(4096):
                    return

    def refuse(self, error: HttpError) -> None:
        import json

        self.close_connection = True
        body = json.dumps(error.content).encode()
        with contextlib.suppress(OSError):
            self.connection.settimeout(REQUEST_TIME)
            self.send_head(Response(error.status, headers=error.headers), len(body))
            if self.command != "HEAD":
                self.wfile.write(body)
            self.wfile.flush()
            # Closed with unread input, the kernel would send a reset, which can overtake
            # the answer.
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(0.2)
            for _ in range(64):
                if not self.connection.recv(65536):
                    break

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Answer what the library finds malformed as JSON."""
        code = 400 if code == 505 else code
        self.refuse(HttpError(code, (message or "malformed request").lower()))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the answers are the clients' business."""


@functools.cache
def handler_class() -> type[Conversation]:
    with without_ssl():
        import http.server  # 15 ms and 8 MB, with the first connection

    bases = (Conversation, http.server.BaseHTTPRequestHandler)
    return type("Handler", bases, {})


def turn_away(connection: socket.socket) -> None:
    """Answer 503 to one connection too many, without waiting for its request."""
    body = b'{"error": "too many connections"}'
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(body)}\r\n"
    head += (
        "Content-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    with contextlib.suppress(OSError), connection:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.recv(65536)  # unread input would turn the close into a reset
        connection.send(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(65536)


def bind(address: Address, private: bool = False) -> socket.socket:
    """Return a listening socket; raises OSError. A stale unix socket is replaced.

    A private one has mode 0600 from its first moment: the umask sees to that, no chmod.
    """
    if address.path:
        return bind_unix(address.path, private)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address.host, address.port))
    except OSError as error:
        if address.host == "::" and error.errno in NO_IPV6:
            return bind(address._replace(host="0.0.0.0"))
        raise
    listener.listen(128)
    return listener


def bind_unix(path: str, private: bool) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "it exists and is no socket", path)
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
                raise OSError(errno.EADDRINUSE, "a supervisor is answering there", path)
            except ConnectionRefusedError:
                os.unlink(path)  # its supervisor was killed
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177) if private else None
    try:
        listener.bind(path)
    finally:
        if before is not None:
            os.umask(before)
    listener.listen(128)
    return listener


def runtime_folder() -> str:
    """Return the folder of derived control sockets: /run, the user's, or our own in /tmp.

    Raises OSError where that is somebody else's.
    """
    if os.geteuid() == 0:
        return "/run"
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    if folder:
        return folder
    folder = f"/tmp/supervisors-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    owned = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not owned or status.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "it is not ours alone", folder)
    return folder


def control_path(control: str, path: str) -> str:
    """Return the control socket of a configuration's real path; raises OSError."""
    if control != "auto":
        return os.path.abspath(control) if control else ""
    return os.path.join(runtime_folder(), f"supervisors-{path_hash(path)[:8]}.sock")


# === 9. Supervisor ====================================================================
#
# The main loop: the nearest deadline, select, signals through the wake-up descriptor,
# reap, feed `step`, do its actions, publish. There is no tick; idle, it sleeps.

ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
LONGEST_SLEEP = 86_400.0  # seconds; epoll_wait(2) takes milliseconds in 31 bits
WAITING_FIRST = 1.0  # seconds after a shutdown began that it names who it waits for
WAITING_NEXT = 5.0
SWEEP = 1.0  # seconds that orphans have once the programs are gone
ASK_TIME = 10.0  # seconds for the main loop to answer a thread
LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3}


class Deadlines:
    """What is to be called when: at most one instant for each callback."""

    def __init__(self) -> None:
        self.at: dict[Callable[[], None], float] = {}
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0

    def set(self, callback: Callable[[], None], when: float | None) -> None:
        """Have `callback` called at an instant, or with None not at all."""
        if when is None:
            self.at.pop(callback, None)
            return
        if self.at.get(callback) == when:
            return
        self.at[callback] = when
        self.count += 1
        heapq.heappush(self.heap, (when, self.count, callback))
        if len(self.heap) > 4 * len(self.at) + 64:  # mostly entries that were replaced
            self.heap = [one for one in self.heap if self.at.get(one[2]) == one[0]]
            heapq.heapify(self.heap)

    def nearest(self) -> float | None:
        while self.heap and self.at.get(self.heap[0][2]) != self.heap[0][0]:
            heapq.heappop(self.heap)
        return self.heap[0][0] if self.heap else None

    def call_due(self, now: float) -> None:
        while (when := self.nearest()) is not None and when <= now:
            callback = heapq.heappop(self.heap)[2]
            del self.at[callback]
            callback()


class Checker:
    """The health checks of one program: one at a time, given up at `timeout`."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.supervisor = process.supervisor
        self.run = 0  # number of the check; what an older one says is ignored
        self.began = 0.0
        self.pid: int | None = None
        self.thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start a check, and set the deadline for giving it up."""
        check = self.process.program.healthcheck
        assert check is not None
        self.run += 1
        self.began = time.monotonic()
        self.supervisor.deadlines.set(self.give_up, self.began + check.timeout)
        if check.command:
            self.begin_command(check)
        elif self.thread and self.thread.is_alive():
            pass  # the last one is stuck, in a name server say: this one fails with it
        else:
            run = self.run
            post = self.supervisor.post

            def work() -> None:
                detail = probe(check)
                post(lambda: self.end(run, detail))

            self.thread = threading.Thread(target=work, daemon=True)
            self.thread.start()

    def begin_command(self, check: Health) -> None:
        run = self.run
        try:
            child = self.process.spawn(check.argv, (self.supervisor.null_fd,) * 3)
        except SpawnError as error:
            self.end(run, error.reason)
            return
        self.pid = child.pid

        def ended(wait_status: int) -> None:
            send(-child.pid, signal.SIGKILL)  # what it has forked
            report = read_report(child)
            code, number = decode(wait_status)
            status = Status(exit_code=code, exit_signal=number)
            if self.pid == child.pid:
                self.pid = None
            self.end(run, "" if code == 0 else report or describe_end(status))

        self.supervisor.children[child.pid] = ended

    def give_up(self) -> None:
        check = self.process.program.healthcheck
        if check:
            self.end(self.run, f"no answer within {check.timeout:g} s")
        self.kill()

    def end(self, run: int, detail: str) -> None:
        """Take a result, and set the time of the next check."""
        program = self.process.program
        if run != self.run or program.healthcheck is None:
            return
        self.run += 1
        deadlines, check = self.supervisor.deadlines, program.healthcheck
        deadlines.set(self.give_up, None)
        self.process.apply(Checked(not detail, detail))
        if self.process.status.state in (State.STARTING, State.RUNNING):
            passed = self.process.status.healthy is not None
            interval = check.interval if passed else min(check.interval, FIRST_INTERVAL)
            deadlines.set(self.begin, max(self.began + interval, time.monotonic()))

    def kill(self) -> None:
        if self.pid is not None:
            send(-self.pid, signal.SIGKILL)
            self.pid = None

    def cancel(self) -> None:
        """The run is over, or ending: no more checks."""
        self.run += 1
        self.supervisor.deadlines.set(self.give_up, None)
        self.supervisor.deadlines.set(self.begin, None)
        self.kill()


def decode(wait_status: int) -> tuple[int | None, int | None]:
    """Return a wait status as exit code and signal, one of them None."""
    code = os.waitstatus_to_exitcode(wait_status)
    return (code, None) if code >= 0 else (None, -code)


def read_report(child: Child) -> str:
    """Return why the trampoline did not come to exec; "" if it did."""
    if child.report is None:
        return ""
    os.set_blocking(child.report, False)
    try:
        report = os.read(child.report, 4096).decode(errors="replace")
    except BlockingIOError:
        report = ""
    os.close(child.report)
    return report


class Process:
    """A program's place in the supervisor. Main thread, but for `snapshot`."""

    def __init__(self, supervisor: Supervisor, program: Program) -> None:
        self.supervisor = supervisor
        self.program = program
        self.status = Status()
        self.successor: Program | None = None  # from a reload, for the next start
        self.removed = False
        self.dependents: list[Process] = []
        self.child: Child | None = None
        self.group = 0  # the last run's
        self.env_text = ""  # of the env_files, as it was started with
        self.output = Output(program.name)
        self.checker = Checker(self)
        self.snapshot = Snapshot(
            program, self.status, self.output, supervisor.config.log_format
        )
        self.told = False  # to stop, in a shutdown

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def known(self) -> tuple[Program, Status]:
        return self.program, self.status

    def apply(self, event: Event) -> None:
        """Feed an event to the state machine, do what it says, publish what came of it."""
        status, actions = step(self.program, time.monotonic(), self.status, event)
        self.status = status
        for action in actions:
            answer = self.perform(action)
            if answer:
                self.apply(answer)
        if not any(isinstance(action, Spawn) for action in actions):
            self.supervisor.deadlines.set(self.wake, self.status.deadline)
            self.publish()

    def wake(self) -> None:
        self.apply(Due())

    def perform(self, action: Action) -> Event | None:
        """Do one action; return the event that answers it."""
        if isinstance(action, Spawn):
            return self.start_run()
        if isinstance(action, Signal):
            self.signal(signal_number(action.name))
            self.signal(signal.SIGCONT)  # a stopped process takes no signal but this
            return None
        assert self.group > 0
        send(-self.group, signal.SIGKILL)
        gone = self.child is None and not send(-self.group, 0)
        return Emptied() if gone else None

    def signal(self, number: int) -> bool:
        """Signal the group, or the leader where that is wanted; return whether it lives."""
        assert self.group > 0  # 0 is our own group
        if self.program.stopasgroup:
            return send(-self.group, number)
        return self.child is not None and send(self.child.pid, number)

    def start_run(self) -> Event:
        """Start the program as it is defined now."""
        self.take_successor()
        routes = [self.route("stdout"), self.route("stderr")]
        files: list[int] = []  # to be closed here
        sources: list[Callable[[], None]] = []
        try:
            self.env_text = read_env_files(self.program)
            out, err = self.open_streams(routes, files, sources)
            self.child = self.spawn(
                self.program.argv, (self.supervisor.null_fd, out, err)
            )
        except SpawnError as error:
            for add in sources:
                self.supervisor.log.post(add)  # they end at once
            return SpawnFailed(f"cannot start {self.name}: {error.reason}", error.code)
        finally:
            for fd in files:
                os.close(fd)
        for add in sources:
            self.supervisor.log.post(add)
        self.group = self.child.pid
        self.supervisor.children[self.group] = self.ended
        if self.program.healthcheck:
            self.supervisor.deadlines.set(self.checker.begin, time.monotonic())
        return Spawned(self.group)

    def take_successor(self) -> None:
        if self.successor:
            self.program, self.successor = self.successor, None

    def route(self, stream: str) -> Route:
        return route(self.program, stream, self.supervisor.config.log_format)

    def open_streams(
        self, routes: list[Route], files: list[int], sources: list[Callable[[], None]]
    ) -> list[int | None]:
        """Return the descriptors of standard output and error; None for our own."""
        if routes[0] == routes[1] and routes[0].log_format != "json":
            fd = self.open_stream("stdout", routes[0], files, sources)
            return [fd, routes[0].target if fd is None else fd]  # type: ignore[list-item]
        names = ("stdout", "stderr")
        return [self.open_stream(*pair, files, sources) for pair in zip(names, routes)]

    def open_stream(
        self,
        stream: str,
        where: Route,
        files: list[int],
        sources: list[Callable[[], None]],
    ) -> int | None:
        """Open a log file for the program itself, or a pipe for the log thread."""
        if isinstance(where.target, str):
            try:
                fd, _ = open_log(where.target)
            except OSError as error:
                reason = f"cannot open the log file {where.target!r}: {error.strerror}"
                raise SpawnError(reason) from None
            if where.direct:
                os.set_blocking(fd, True)
                files.append(fd)
                return fd
            os.close(fd)  # the log thread opens it again, and keeps it
        elif where.direct:
            return where.target
        read_end, write_end = os.pipe()
        read_end = self.supervisor.file_limit.out_of_the_way(read_end)
        os.set_blocking(read_end, False)
        files.append(write_end)
        sources.append(self.make_source(read_end, stream, where))
        return write_end

    def make_source(self, fd: int, stream: str, where: Route) -> Callable[[], None]:
        """Return the job that has the log thread read a pipe."""
        supervisor, program, output = self.supervisor, self.program, self.output
        terminal = isinstance(where.target, int)
        if terminal and output.recent is None:
            output.recent = Feed(REMEMBERED, LAG)
        formatter: Format | None = None
        if where.log_format != "raw":
            width = supervisor.name_width if terminal else 0
            colour = (
                supervisor.colour_of(program.name)
                if where.target in supervisor.ttys
                else None
            )
            formatter = log_formatter(
                where.log_format, program.name, stream, width, colour
            )
        shared = supervisor.targets.get(where.target, 0) > 1

        def add() -> None:
            log = supervisor.log
            sink = log.sink(
                where.target, program.logfile_maxbytes, program.logfile_backups
            )
            recent = output.recent if terminal else None
            log.add(Source(fd, sink, output, recent, stream, formatter, shared))

        return add

    def spawn(
        self, argv: tuple[str, ...], files: tuple[int, int | None, int | None]
    ) -> Child:
        """Start a process as this program's user, with its environment."""
        supervisor, program = self.supervisor, self.program
        account = find_account(program)
        extra = dict(supervisor.variables)
        if program.type == "notify":
            extra["NOTIFY_SOCKET"] = supervisor.notify_address()
            if program.watchdog_secs:
                extra["WATCHDOG_USEC"] = str(int(program.watchdog_secs * 1e6))
        environ = program_environ(
            program, supervisor.environ, account, self.env_text, extra
        )
        return spawn(program, argv, environ, account, files, supervisor.file_limit)

    def ended(self, wait_status: int) -> None:
        """The leader was reaped."""
        child, self.child = self.child, None
        assert child is not None
        report = read_report(child)
        if report and self.status.state is not State.STOPPING:
            code, _, reason = report.partition(" ")
            self.status = self.status._replace(state=State.STARTING, pid=None)
            self.apply(SpawnFailed(f"cannot start {self.name}: {reason}", int(code)))
            return
        survivors = send(-self.group, 0)
        self.apply(Exited(*decode(wait_status), survivors))
        if survivors and self.status.state is State.STOPPING:
            self.supervisor.lingering.add(self)
            self.supervisor.look_at_groups()

    def publish(self) -> None:
        """Make the status known: to HTTP threads, the log, and who depends on it."""
        old, status, supervisor = self.snapshot.status, self.status, self.supervisor
        if status == old and self.program is self.snapshot.program:
            return
        new_run = status.pid is not None and status.pid != old.pid
        changed = status.state is not old.state or new_run
        now = time.time()
        before = self.snapshot
        self.snapshot = Snapshot(
            self.program,
            status,
            self.output,
            supervisor.config.log_format,
            now if new_run else before.started_at,
            now if status.state is not old.state else before.changed_at,
        )
        if self.name in supervisor.snapshots:
            supervisor.snapshots[self.name] = self.snapshot
        if visible(status) != visible(old):
            supervisor.events.append(self.snapshot)
        if status.state not in (State.STARTING, State.RUNNING):
            self.checker.cancel()
        if changed:
            self.announce(status)
        if (
            changed
            or self.snapshot.ready != before.ready
            or status.healthy != old.healthy
        ):
            supervisor.react(self)

    def announce(self, status: Status) -> None:
        """Say what state it is in, and why."""
        words = [
            status.state.value,
            f"pid {status.pid}" if status.pid else "",
            status.reason,
        ]
        bad = has_failed(status) or status.state is State.BACKOFF
        text = ", ".join(filter(None, words))
        self.supervisor.say(self.name, text, "warning" if bad else "info")

    def block(self) -> None:
        """Learn anew what it has to wait for."""
        others = self.supervisor.processes
        program = self.successor or self.program
        names = [name for name in program.depends_on if name in others]
        event = blocked_by({name: others[name].known for name in names})
        if event != (self.status.blocked, self.status.blocked_as):
            self.apply(event)


def visible(status: Status) -> Status:
    """Return a status without what nobody sees of it."""
    return status._replace(deadline=None, blocked="", blocked_as="", checks_failed=0)


class Supervisor:
    """Runs the programs of a configuration. `run` blocks; main thread, once.

    It sets signal handlers, reaps every child of this process, and puts all back as it
    was when it returns. `lifeline` is a descriptor whose end of file ends it too;
    `overrides` are fields that stay as given, whatever a reload brings.
    """

    def __init__(
        self,
        config: Config,
        level: str = "info",
        lifeline: int | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.overrides = overrides or {}
        self.config = config._replace(**self.overrides)
        self.level = LEVELS[level]
        self.lifeline = lifeline
        self.started_at = time.time()
        self.processes: dict[str, Process] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self.events: Feed[Snapshot | str] = Feed(MOST_EVENTS, MOST_EVENTS)
        self.children: dict[int, Callable[[int], None]] = {}
        self.lingering: set[Process] = set()  # whose leader is gone, whose group is not
        self.leftovers: dict[int, str] = {}
        self.deadlines = Deadlines()
        self.listeners: list[Listener] = []
        self.calls: deque[Callable[[], None]] = deque()
        self.notify: NotifySocket | None = None
        self.connections = 0
        self.streams = 0
        self.counts = threading.Lock()
        self.token = ""
        self.ending = False  # a shutdown has begun
        self.swept = False
        self.finished = False
        self.exit_code = 0
        self.began_ending = 0.0
        self.cleanup = contextlib.ExitStack()

    # --- begin and end

    def run(self) -> int:
        """Run until all has ended; return the exit status. Raises SupervisorError."""
        with self.cleanup:
            self.open()
            if not self.leftovers:
                self.start_all()
            while not self.finished:
                self.turn()
        return self.exit_code

    def open(self) -> None:
        """Acquire everything, in an order in which failure leaves nothing behind."""
        open_standard_streams()
        self.environ = original_environ()
        self.token = self.read_token()
        self.selector = selectors.DefaultSelector()
        self.cleanup.callback(self.selector.close)
        self.clean_descriptors()
        self.catch_signals()
        warnings = self.bind_all()
        self.log = LogThread(self.config.log_format == "json")
        self.cleanup.callback(self.log.close)
        self.cleanup.callback(self.events.close)
        self.file_limit = FileLimit()
        self.cleanup.callback(lambda: self.file_limit.set(self.file_limit.soft))
        for warning in warnings:
            self.say("", warning, "warning")
        self.write_pidfile()
        self.spared = children_before()
        if not become_subreaper() and sys.platform == "linux":
            self.say("", "cannot become a subreaper: orphans go to PID 1", "warning")
        digest = path_hash(self.config.path)
        run = f"{digest}.{os.getpid()}.{start_time(os.getpid())}"
        self.variables = {RUN_VARIABLE: run} if self.config.path else {}
        if self.lifeline is not None:
            self.selector.register(
                self.lifeline, selectors.EVENT_READ, self.lose_lifeline
            )
        for one in self.listeners:
            if one.is_control:
                self.variables["SUPERVISOR_SERVER_URL"] = f"unix://{one.address.path}"
        self.add_programs(self.config.programs.values())
        if self.config.path:
            self.end_leftovers(digest)
        self.keep_manager_informed()

    def clean_descriptors(self) -> None:
        """See that nothing inherited is handed on, and have /dev/null at hand."""
        for name in (
            os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else map(str, range(256))
        ):
            if int(name) > 2:
                with contextlib.suppress(OSError):
                    os.set_inheritable(int(name), False)
        try:
            self.null_fd = os.open(os.devnull, os.O_RDWR)
        except OSError:  # a bare root: a pipe without a writer reads as empty, too
            self.null_fd, write_end = os.pipe()
            os.close(write_end)
        self.cleanup.callback(os.close, self.null_fd)

    def catch_signals(self) -> None:
        """Have signals arrive as bytes in a pipe, and none ignored or blocked in programs.

        The handlers do nothing: a handler in Python has to be set for the wake-up
        descriptor to get its byte.
        """
        self.wake_read, self.wake_write = os.pipe()
        for fd in (self.wake_read, self.wake_write):
            os.set_blocking(fd, False)
            self.cleanup.callback(os.close, fd)
        self.selector.register(self.wake_read, selectors.EVENT_READ, self.read_wakeups)
        before = signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        self.cleanup.callback(signal.set_wakeup_fd, before)
        wanted = {*ENDINGS, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR2}
        # SIGPIPE and SIGXFSZ, which the interpreter ignores, are reset by Popen.
        spared = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGKILL, signal.SIGSTOP}
        for number in signal.valid_signals() - spared:
            handler = signal.getsignal(number)
            if number in wanted:
                self.cleanup.callback(signal.signal, number, handler or signal.SIG_DFL)
                signal.signal(number, lambda number, frame: None)
            elif handler == signal.SIG_IGN:  # inherited, from nohup say
                self.cleanup.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, frame: None)
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.cleanup.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)

    def bind_all(self) -> list[str]:
        """Bind the control socket and all addresses; return warnings."""
        config, warnings = self.config, []
        if config.control and (config.path or config.control != "auto"):
            try:
                path = control_path(config.control, config.path)
                self.listen(Address(path=path), is_control=True)
            except OSError as error:
                text = f"control socket {error.filename or ''}".rstrip()
                reason = error.strerror or str(error)
                if error.errno in (errno.EADDRINUSE, errno.EEXIST):
                    raise SupervisorError(
                        f"cannot listen on {text}: {reason}"
                    ) from None
                warnings.append(f"no {text}: {reason}; the verbs need another way in")
        for text in filter(None, config.listen):
            address = parse_address(text)
            try:
                self.listen(address)
            except OSError as error:
                reason = f"cannot listen on {address}: {error.strerror or error}"
                if os.getpid() != 1:
                    raise SupervisorError(reason) from None
                warnings.append(reason)  # a container's programs run all the same
                continue
            if not address.path and not address.is_loopback and not self.token:
                warnings.append(
                    f"{address} is open to the network, for reading: no token is set"
                )
        return warnings

    def listen(self, address: Address, is_control: bool = False) -> None:
        bound = bind(address, private=is_control)
        bound.setblocking(False)
        self.cleanup.callback(bound.close)
        if address.path:
            inode = os.stat(address.path).st_ino
            self.cleanup.callback(remove_file, address.path, inode)
        elif address.port == 0:
            address = address._replace(port=bound.getsockname()[1])
        listener = Listener(bound, address, is_control)
        self.listeners.append(listener)
        self.watch(listener)

    def watch(self, listener: Listener) -> None:
        job = functools.partial(self.accept, listener)
        self.selector.register(listener.socket, selectors.EVENT_READ, job)

    def write_pidfile(self) -> None:
        path = self.config.pidfile
        if not path:
            return
        try:
            with open(path, "w") as file:
                file.write(f"{os.getpid()}\n")
            self.cleanup.callback(remove_file, path, os.stat(path).st_ino)
        except OSError as error:
            self.say(
                "", f"cannot write the pidfile {path!r}: {error.strerror}", "warning"
            )

    def read_token(self) -> str:
        """Return the token of the configuration; raises SupervisorError."""
        path = self.config.token_file
        if not path:
            return self.config.token
        try:
            with open(path, encoding="utf-8") as file:
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise SupervisorError(
                f"cannot read token_file {path!r}: {reason}"
            ) from None

    # --- the loop

    def turn(self) -> None:
        """Sleep until something happens, and do what it asks for."""
        nearest = self.deadlines.nearest()
        sleep = None if nearest is None else nearest - time.monotonic()
        if sleep is not None:
            sleep = min(max(sleep, 0), LONGEST_SLEEP)
        for key, _ in self.selector.select(sleep):
            key.data()
        self.deadlines.call_due(time.monotonic())

    def post(self, call: Callable[[], None]) -> None:
        """Have the main thread call something. Any thread."""
        self.calls.append(call)
        with contextlib.suppress(OSError):  # full: it is awake anyway; closed: too late
            os.write(self.wake_write, b"\0")

    def ask(self, question: Callable[[], T]) -> T:
        """Have the main thread call something; return or raise its result. Any other."""
        answers: list[T | SupervisorError] = []
        done = threading.Event()

        def call() -> None:
            try:
                answers.append(question())
            except SupervisorError as error:
                answers.append(error)
            done.set()

        self.post(call)
        if not done.wait(ASK_TIME):
            raise HttpError(503, "the main loop is busy")
        if isinstance(answers[0], SupervisorError):
            raise answers[0]
        return answers[0]

    def say(self, name: str, text: str, level: str = "info") -> None:
        """Write a message to standard error, through the log thread. Any thread."""
        if LEVELS[level] >= self.level:
            self.log.say(name, text, level)

    def read_wakeups(self) -> None:
        try:
            numbers = set(os.read(self.wake_read, 65536))
        except BlockingIOError:
            return
        if signal.SIGCHLD in numbers:
            self.reap()
            self.look_at_groups()
            if self.ending:
                self.finish_if_done()
        for number in ENDINGS:
            if number in numbers:
                self.end(number)
        if signal.SIGHUP in numbers:
            self.reload_by_signal()
        if signal.SIGUSR2 in numbers:
            self.reopen_logs()
        while self.calls:
            self.calls.popleft()()

    def reap(self) -> bool:
        """Collect every child that has ended, orphans too; return whether any is left.

        One SIGCHLD may stand for many ends.
        """
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            ended = self.children.pop(pid, None)
            if ended:
                ended(wait_status)
            else:
                self.say("", f"reaped orphan {pid}", "debug")

    def look_at_groups(self) -> None:
        """Notice that a group is empty; one that is not our child makes no SIGCHLD."""
        for process in list(self.lingering):
            over = (
                process.status.state is not State.STOPPING or process.child is not None
            )
            if not over and not send(-process.group, 0):
                process.apply(Emptied())
                over = True
            if over:
                self.lingering.discard(process)
        again = time.monotonic() + TICK if self.lingering else None
        self.deadlines.set(self.look_at_groups, again)

    def accept(self, listener: Listener) -> None:
        try:
            connection, _ = listener.socket.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors: wait for some to be closed
            self.say("", f"cannot accept a connection: {error.strerror}", "warning")
            self.selector.unregister(listener.socket)
            self.deadlines.set(
                functools.partial(self.watch, listener), time.monotonic() + 1
            )
            return
        connection.setblocking(True)
        with self.counts:
            full = not listener.is_control and self.connections >= MOST_CONNECTIONS
            self.connections += not full and not listener.is_control
        if full:
            turn_away(connection)
            return
        thread = threading.Thread(
            target=self.converse, args=(listener, connection), daemon=True
        )
        thread.start()

    def converse(self, listener: Listener, connection: socket.socket) -> None:
        """Serve one connection, in its thread."""
        try:
            with connection, contextlib.suppress(OSError):
                handler_class()(connection, "", Place(self, listener))  # type: ignore[arg-type]
        finally:
            with self.counts:
                self.connections -= not listener.is_control

    @contextlib.contextmanager
    def stream_slot(self) -> Iterator[None]:
        """Hold one of the places for streams; raises HttpError 503."""
        with self.counts:
            if self.streams >= MOST_STREAMS:
                raise HttpError(503, f"{MOST_STREAMS} streams are open already")
            self.streams += 1
        try:
            yield
        finally:
            with self.counts:
                self.streams -= 1

    # --- programs

    def add_programs(self, programs: Iterable[Program]) -> None:
        """Take programs in, without starting them, and put all in the file's order."""
        for program in programs:
            if program.name not in self.processes:
                self.processes[program.name] = Process(self, program)
        known = [name for name in self.config.programs if name in self.processes]
        known += [name for name in self.processes if name not in self.config.programs]
        self.processes = {name: self.processes[name] for name in known}
        self.snapshots = {name: one.snapshot for name, one in self.processes.items()}
        definitions = [self.config.programs.get(name) for name in known]
        self.survey([one for one in definitions if one])
        for process in self.processes.values():
            process.dependents = []
        for process in self.processes.values():
            for name in (process.successor or process.program).depends_on:
                if name in self.processes:
                    self.processes[name].dependents.append(process)

    def survey(self, programs: list[Program]) -> None:
        """Learn what all programs together decide: the width of names, who shares files."""
        self.targets: dict[int | str, int] = {}
        self.ttys = {
            fd for fd in (1, 2) if os.isatty(fd) and "NO_COLOR" not in self.environ
        }
        shown_names = [0]
        for program in programs:
            both = [
                route(program, one, self.config.log_format)
                for one in ("stdout", "stderr")
            ]
            for target in {one.target for one in both}:
                self.targets[target] = self.targets.get(target, 0) + 1
            if any(isinstance(one.target, int) and not one.direct for one in both):
                shown_names.append(len(program.name))
        self.name_width = max(shown_names)

    def colour_of(self, name: str) -> int:
        return COLOURS[list(self.processes).index(name) % len(COLOURS)]

    def start_all(self) -> None:
        """Start what is to be started, in the order of the file."""
        for process in self.processes.values():
            process.block()
        for process in list(self.processes.values()):
            if process.program.autostart:
                process.apply(Start())
        self.finish_if_done()

    def is_gone(self, name: str) -> bool:
        """Return whether a program was removed, or everything is over. Any thread."""
        return self.events.closed or name not in self.snapshots

    def react(self, process: Process) -> None:
        """Do what the change of one program means to the others."""
        for dependent in process.dependents:
            dependent.block()
        status = process.status
        if status.is_alive:
            self.keep_manager_informed()
            return
        if process.successor:
            process.take_successor()
            process.block()
        if process.removed and self.processes.get(process.name) is process:
            del self.processes[process.name]
            self.snapshots = {
                name: one.snapshot for name, one in self.processes.items()
            }
            self.events.append(process.name)
        if status.state in (State.EXITED, State.FATAL):
            program = process.program
            wish = program.on_failure if has_failed(status) else program.on_success
            if wish == "shutdown" and not self.ending:
                self.begin_shutdown(exit_status(status), f"{process.name} has ended")
        if self.ending:
            self.stop_next(process)
        self.finish_if_done()
        self.keep_manager_informed()

    def order(self, verb: str, names: list[str]) -> tuple[int, dict[str, Snapshot]]:
        """Start, stop or restart programs; return where the events after it begin."""
        if self.ending and verb != "stop":
            raise SupervisorError("cannot start anything: shutting down")
        event = {"start": Start(), "stop": Stop(), "restart": Restart()}[verb]
        chosen = [self.processes[name] for name in names if name in self.processes]
        for process in chosen:
            process.apply(event)  # type: ignore[arg-type]
        return self.events.end, {one.name: one.snapshot for one in chosen}

    def signal_programs(self, number: int, names: list[str]) -> list[Snapshot]:
        chosen = [self.processes[name] for name in names if name in self.processes]
        for process in chosen:
            if process.status.is_alive:
                process.signal(number)
        return [process.snapshot for process in chosen]

    def notify_address(self) -> str:
        """Return the address of the notify socket, made when first wanted."""
        if sys.platform != "linux":
            raise SpawnError('type "notify" needs Linux')
        if self.notify is None:
            self.notify = NotifySocket()
            self.cleanup.callback(self.notify.socket.close)
            self.selector.register(
                self.notify.socket, selectors.EVENT_READ, self.read_notifications
            )
        return self.notify.address

    def read_notifications(self) -> None:
        """Take what programs say of themselves, a bounded number at a time."""
        assert self.notify is not None
        for _ in range(64):
            message = self.notify.receive()
            if message is None:
                return
            process = self.owner(message[0])
            if process is None or process.program.type != "notify":
                self.say("", f"ignored a notification from {message[0]}", "debug")
                continue
            for line in message[1]:
                key, _, value = line.partition("=")
                if line == "READY=1":
                    process.apply(Ready())
                elif line == "WATCHDOG=1":
                    process.apply(Alive())
                elif key == "STATUS":
                    process.apply(Text(value))

    def owner(self, pid: int) -> Process | None:
        """Return the program that a process belongs to: by session, group or ancestry."""
        for _ in range(64):
            ids = {pid}
            with contextlib.suppress(ProcessLookupError, PermissionError):
                ids |= {os.getsid(pid), os.getpgid(pid)}
            for one in ids:
                ended = self.children.get(one)
                process = getattr(ended, "__self__", None)
                if isinstance(process, Process):
                    return process
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    pid = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                return None
            if pid <= 1:
                return None
        return None

    # --- leftovers of a supervisor that was killed

    def end_leftovers(self, digest: str) -> None:
        """End what a dead supervisor of this configuration left; programs wait for it."""
        self.leftovers = find_leftovers(digest)
        if not self.leftovers:
            return
        names = ", ".join(
            f"{name} ({pid})" for pid, name in sorted(self.leftovers.items())
        )
        self.say("", f"ending what a killed supervisor left: {names}", "warning")
        now, longest = time.monotonic(), 0.0
        for pid, name in self.leftovers.items():
            program = self.config.programs.get(name)
            number = signal_number(program.stopsignal if program else "TERM")
            longest = max(longest, program.stopwaitsecs if program else DEFAULT_STOP)
            send(pid, number)
            send(pid, signal.SIGCONT)
        self.leftover_deadline = now + longest
        self.deadlines.set(self.look_at_leftovers, now + TICK)

    def look_at_leftovers(self) -> None:
        """Go on once they are gone; they are no children, so they are looked at."""
        now = time.monotonic()
        self.leftovers = {
            pid: name for pid, name in self.leftovers.items() if start_time(pid)
        }
        if self.leftovers and now < self.leftover_deadline + SWEEP:
            if now >= self.leftover_deadline:
                for pid in self.leftovers:
                    send(pid, signal.SIGKILL)
            self.deadlines.set(self.look_at_leftovers, now + TICK)
            return
        self.leftovers = {}
        if self.ending:
            self.finish_if_done()
        else:
            self.start_all()

    # --- reload

    def reload_by_signal(self) -> None:
        try:
            self.reload()
        except ConfigError as error:
            for line in error.errors:
                self.say("", f"cannot reload: {line}", "error")
        except SupervisorError as error:
            self.say("", f"cannot reload: {error}", "error")

    def reload(self) -> dict[str, Any]:
        """Read the file anew and become what it says; raises ConfigError, changing nothing."""
        if self.ending:
            raise SupervisorError("shutting down")
        if not self.config.path:
            raise SupervisorError("there is no configuration file")
        new = load_config(self.config.path)._replace(**self.overrides)
        old, self.config = self.config, new
        try:
            self.token = self.read_token()
        except SupervisorError as error:
            self.config = old
            raise ConfigError([str(error)]) from None
        self.log.as_json = new.log_format == "json"
        fixed = ("listen", "control", "pidfile")
        stuck = [key for key in fixed if getattr(old, key) != getattr(new, key)]
        result = self.change_programs(new)
        if stuck:
            result["needs_restart"] = stuck
            self.say("", f"a changed {', '.join(stuck)} needs a restart", "warning")
        counts = ", ".join(
            f"{len(result[key])} {key}" for key in ("added", "changed", "removed")
        )
        self.say("", f"reloaded: {counts}, {result['unchanged']} unchanged")
        return result

    def change_programs(self, new: Config) -> dict[str, Any]:
        """Stop, start and restart what differs; leave all else untouched."""
        added, changed, removed = [], [], []
        gone = [one for one in self.processes.values() if one.name not in new.programs]
        for name, program in new.programs.items():
            process = self.processes.get(name)
            if process is None:
                added.append(name)
            elif process.removed or self.differs(process, program):
                changed.append(name)
                process.removed = False
                process.successor = program
        self.add_programs(new.programs.values())
        for process in gone:
            removed.append(process.name)
            process.removed = True
        for name in changed:
            self.renew(self.processes[name])
        for process in self.processes.values():
            process.block()
        for process in gone:
            process.apply(Stop())
            if not process.status.is_alive:
                self.react(process)
        for name in added:
            if self.processes[name].program.autostart:
                self.processes[name].apply(Start())
        unchanged = len(new.programs) - len(added) - len(changed)
        return {
            "added": added,
            "changed": changed,
            "removed": removed,
            "unchanged": unchanged,
        }

    def differs(self, process: Process, program: Program) -> bool:
        if program != (process.successor or process.program):
            return True
        if not program.env_file or not process.group:
            return False
        try:
            return read_env_files(program) != process.env_text
        except SpawnError:
            return True

    def renew(self, process: Process) -> None:
        """Give a program its new definition, and a new run if it was to be running."""
        state = process.status.state
        assert process.successor is not None
        ended = state in (State.EXITED, State.FATAL) and process.successor.autostart
        if not process.status.is_alive:
            process.take_successor()
            process.publish()
        process.block()
        if state is State.STOPPING and process.status.after is After.STOP:
            return
        if ended or state not in (State.STOPPED, State.EXITED, State.FATAL):
            process.apply(Restart())

    def reopen_logs(self) -> None:
        self.log.reopen()
        for process in self.processes.values():
            for stream in ("stdout", "stderr"):
                where = process.route(stream)
                if (
                    where.direct
                    and isinstance(where.target, str)
                    and where.target != NOWHERE
                ):
                    reason = f"{where.target} is held by the program itself: restart it"
                    self.say(
                        process.name, f"cannot reopen its log: {reason}", "warning"
                    )
                    break
        self.say("", "reopened the log files")

    # --- the end

    def end(self, number: int) -> None:
        """A signal asks for the end; the second one for an end at once."""
        if self.ending:
            self.kill_all(f"{signal_name(number)} again")
        else:
            self.begin_shutdown(0, signal_name(number))

    def lose_lifeline(self) -> None:
        if self.lifeline is not None and not os.read(self.lifeline, 4096):
            self.selector.unregister(self.lifeline)
            self.begin_shutdown(0, "the parent is gone")

    def begin_shutdown(self, code: int, reason: str) -> None:
        """Stop everything, dependents first, then return `code`."""
        if self.ending:
            return
        self.ending = True
        self.exit_code = code
        self.began_ending = now = time.monotonic()
        self.say("", f"shutting down: {reason}")
        tell_manager("STOPPING=1")
        for process in self.processes.values():
            # From here on nothing comes back, whatever way it ends.
            process.program = process.program._replace(
                autorestart=False, healthcheck=None
            )
            process.checker.cancel()
            state = process.status.state
            if state is State.STOPPING:
                process.told = True
            if state in (State.STOPPING, State.WAITING, State.BACKOFF):
                process.apply(Stop())
        for process in list(self.processes.values()):
            self.stop_unless_needed(process)
        self.deadlines.set(self.name_waiting, now + WAITING_FIRST)
        if self.config.shutdown_timeout is not None:
            self.deadlines.set(self.run_out_of_time, now + self.config.shutdown_timeout)
        self.finish_if_done()

    def stop_next(self, process: Process) -> None:
        """One is gone: stop what only it still needed."""
        for name in process.program.depends_on:
            if name in self.processes:
                self.stop_unless_needed(self.processes[name])

    def stop_unless_needed(self, process: Process) -> None:
        if process.told or not process.status.is_alive:
            return
        if not any(one.status.is_alive for one in process.dependents):
            process.told = True
            process.apply(Stop())

    def name_waiting(self) -> None:
        waiting = [one.name for one in self.processes.values() if one.status.is_alive]
        if not waiting and self.leftovers:
            waiting = sorted(set(self.leftovers.values()))
        who = ", ".join(waiting) or "orphans"
        self.say("", f"still waiting for {who}")
        self.deadlines.set(self.name_waiting, time.monotonic() + WAITING_NEXT)

    def run_out_of_time(self) -> None:
        self.kill_all(f"shutdown_timeout of {self.config.shutdown_timeout:g} s is over")

    def kill_all(self, reason: str) -> None:
        self.say("", f"killing everything: {reason}", "warning")
        for process in list(self.processes.values()):
            if process.status.is_alive:
                process.told = True
                process.apply(Stop())
                process.status = process.status._replace(deadline=time.monotonic())
                process.apply(Due())
        for pid in self.leftovers:
            send(pid, signal.SIGKILL)
        self.sweep_deadline = time.monotonic()
        self.swept = True
        self.kill_orphans()

    def finish_if_done(self) -> None:
        """Notice that all has ended; called when something has."""
        if not self.ending:
            if self.config.exit_when_done and not self.leftovers:
                self.finish_when_done()
            return
        processes = self.processes.values()
        if not self.swept and all(
            one.told or not one.status.is_alive for one in processes
        ):
            self.begin_sweep()
        if self.finished or self.is_busy():
            return
        self.sweep_deadline = min(self.sweep_deadline, time.monotonic() + SWEEP)
        self.kill_orphans()

    def is_busy(self) -> bool:
        """Return whether there is more to wait for than orphans."""
        living = any(one.status.is_alive for one in self.processes.values())
        return living or bool(self.leftovers)

    def begin_sweep(self) -> None:
        """Ask orphans to end, together with the last level of programs."""
        self.swept = True
        self.sweep_deadline = float("inf")
        for pid in self.orphans():
            send(pid, signal.SIGTERM)
            send(pid, signal.SIGCONT)

    def orphans(self) -> list[int]:
        """Return what is ours to reap and no program's: what has left its program."""
        return descendants(os.getpid(), self.children.keys() | self.spared)

    def kill_orphans(self) -> None:
        """End the run when no child is left, or cannot be ended; kill at the deadline."""
        if self.is_busy():
            return
        now = time.monotonic()
        none_left = not self.reap() or (self.spared and not self.orphans())
        if now >= self.sweep_deadline:
            for pid in self.orphans():
                send(pid, signal.SIGKILL)
        if none_left or now >= self.sweep_deadline + SWEEP:
            self.finished = True
            return
        self.deadlines.set(self.kill_orphans, now + TICK)

    def finish_when_done(self) -> None:
        """With `exit_when_done`, shut down once every program has ended for good."""
        code = 0
        for process in self.processes.values():
            status = process.status
            vain = status.state is State.WAITING and status.blocked_as == "failed"
            ended = status.state in (State.STOPPED, State.EXITED, State.FATAL)
            if not ended and not vain:
                return
            if not code and (vain or has_failed(status)):
                code = 1 if vain else exit_status(status)
        self.begin_shutdown(code, "all programs have ended")

    # --- who runs us

    def keep_manager_informed(self) -> None:
        """Tell systemd, where it asked for it, that all is ready, and that we live."""
        if "NOTIFY_SOCKET" not in self.environ or self.ending:
            return
        wanted = [one for one in self.processes.values() if one.program.autostart]
        missing = [one.name for one in wanted if not one.snapshot.ready and not (
            one.status.state is State.EXITED and one.status.succeeded)]  # fmt: skip
        state = (
            f"waiting for {', '.join(missing)}" if missing else "all programs are ready"
        )
        tell_manager(f"STATUS={state}" if missing else f"READY=1\nSTATUS={state}")
        period = self.environ.get("WATCHDOG_USEC", "")
        if period.isdecimal() and self.keep_alive not in self.deadlines.at:
            self.deadlines.set(self.keep_alive, time.monotonic())

    def keep_alive(self) -> None:
        tell_manager("WATCHDOG=1")
        half = int(self.environ["WATCHDOG_USEC"]) / 2e6
        self.deadlines.set(self.keep_alive, time.monotonic() + half)


def remove_file(path: str, inode: int) -> None:
    """Remove a file of ours, unless another has taken its place."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


def open_standard_streams() -> None:
    """See that 0, 1 and 2 are open, lest a socket become somebody's standard output."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(
                    os.devnull, os.O_RDWR
                )  # takes the lowest that is free: this one


def children_before() -> set[int]:
    """Return the children that a host process had before: not ours to end. None as PID 1."""
    if os.getpid() == 1:
        return set()
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    return set(descendants(os.getpid()))


# === 10. Client and command line ======================================================
#
# The verbs talk HTTP to the control socket, with the same client as the library.

DEFAULT_FILE = "supervisors.toml"
START_TIME = 10.0  # seconds for a supervisor in a test to answer
POLL = 0.02  # seconds between two looks of a client that waits
VERBS = (
    "check", "health", "logs", "reload", "restart", "shutdown", "signal", "start",
    "status", "stop",
)  # fmt: skip
STATE_COLOURS = {"RUNNING": 32, "STARTING": 33, "WAITING": 33, "STOPPING": 33,
                 "BACKOFF": 31, "FATAL": 31}  # fmt: skip
HELP = """\
example: python3 supervisors.py supervisors.toml

supervisors.py [CONFIG]                   run the programs of CONFIG (supervisors.toml)
supervisors.py check [CONFIG]             validate CONFIG, print every error
supervisors.py status [NAME...] [--json]  what runs
supervisors.py health [NAME...]           exit 0 when healthy, 1 when not
supervisors.py start|stop|restart NAME... wait for the outcome; --no-wait, -t SECONDS
supervisors.py signal SIGNAL NAME...      send a signal
supervisors.py logs [-f] [-n LINES] [NAME...]
supervisors.py reload                     read CONFIG anew, change what differs
supervisors.py shutdown                   stop everything
supervisors.py [-c] [-r SIG:SIG] [--grace SECONDS] -- COMMAND [ARG...]
                                          be the init of one command

NAME is a program, a group, a glob such as 'web:*', or all.

  -c, --configfile FILE   the configuration (in init mode: --single-child)
  -s, --server ADDRESS    the supervisor to talk to: unix:PATH or HOST:PORT
  -n LINES                lines of each program's log (100)
  -f                      follow the logs
  -t SECONDS              how long to wait for an outcome (60, at most 300)
  --no-wait               do not wait for it
  --json                  print JSON
  -v, -q                  debug messages; warnings and errors only
  --version, --help

The token for TCP comes from SUPERVISOR_TOKEN, else from CONFIG. Exit status of a run:
0 after a requested stop, else the code of the program that ended it, 128+N for a
signal; 2 for a bad command line or configuration. Of a verb: 0 done, 1 not so or not in
time, 4 no supervisor or no such name; status: 3 if something is not as wanted."""


class Unreachable(SupervisorError):
    """No supervisor answers at the address."""


class Refused(SupervisorError):
    """The supervisor answered with an error; `status` is HTTP's."""

    def __init__(self, status: int, content: Mapping[str, Any]) -> None:
        super().__init__(str(content.get("error", f"HTTP status {status}")))
        self.status = status
        self.errors = content.get("errors", [])


class Client:
    """Talks to a running supervisor, at `unix:PATH` or `HOST:PORT`. Any thread.

    Names are programs, groups, globs or `all`. Everything raises SupervisorError.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        try:
            self.address = parse_address(address)
        except ValueError as error:
            raise SupervisorError(str(error)) from None
        self.token = token

    def open(self, method: str, path: str, timeout: float) -> http.client.HTTPResponse:
        """Send a request; return the answer, to be read. Seconds between two packets."""
        with without_ssl():
            import http.client

        address = self.address
        connection = http.client.HTTPConnection(
            address.host or "localhost", timeout=timeout
        )
        headers = {"Connection": "close"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            if address.path:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(timeout)
                connection.sock.connect(address.path)
            else:
                place = (address.host, address.port)
                connection.sock = socket.create_connection(place, timeout)
        except OSError as error:
            connection.close()
            raise Unreachable(f"{address}: {error.strerror or error}") from None
        try:
            connection.request(method, path, headers=headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unreachable(f"{address}: {error or type(error).__name__}") from None

    def ask(self, method: str, path: str, timeout: float = 10.0, also: int = 0) -> Any:
        """Return the JSON of an answer; raises Refused for errors other than `also`."""
        import json

        with self.open(method, path, timeout) as response:
            try:
                content = json.loads(response.read())
            except (OSError, ValueError) as error:
                raise Unreachable(f"{self.address}: {error}") from None
            if response.status >= 400 and response.status != also:
                raise Refused(response.status, content)
            return content

    def status(self, name: str | None = None) -> Any:
        """Return one program's status object, or a list of them."""
        return self.ask("GET", "/status" if name is None else f"/status/{quote(name)}")

    def health(self, name: str | None = None) -> dict[str, Any]:
        """Return `status` ("ok", "starting", "failing") and the `programs` not well."""
        path = "/health" if name is None else f"/health/{quote(name)}"
        answer: dict[str, Any] = self.ask("GET", path, also=503)
        if "status" not in answer:
            raise Refused(503, answer)
        return answer

    def order(self, verb: str, name: str, wait: float) -> Any:
        wait = min(max(wait, 0.0), MOST_WAIT)
        return self.ask(
            "POST", f"/programs/{quote(name)}/{verb}?wait={wait}", wait + ASK_TIME
        )

    def start(self, name: str, wait: float = 60.0) -> Any:
        """Start a program; return its status when it is ready, has failed, or is late."""
        return self.order("start", name, wait)

    def stop(self, name: str, wait: float = 60.0) -> Any:
        return self.order("stop", name, wait)

    def restart(self, name: str, wait: float = 60.0) -> Any:
        return self.order("restart", name, wait)

    def signal(self, name: str, signal: str) -> Any:
        return self.ask(
            "POST", f"/programs/{quote(name)}/signal?signal={quote(signal)}"
        )

    def logs(self, name: str, lines: int = 100) -> str:
        with self.open_logs(name, lines, follow=False) as response:
            return response.read().decode(errors="replace")

    def open_logs(
        self, name: str, lines: int, *, follow: bool
    ) -> http.client.HTTPResponse:
        import json

        path = f"/programs/{quote(name)}/logs?lines={lines}&follow={int(follow)}"
        response = self.open("GET", path, 30.0)
        if response.status != 200:
            with response:
                raise Refused(response.status, json.loads(response.read()))
        return response

    def reload(self) -> dict[str, Any]:
        """Have the configuration read anew; return what was added, changed, removed."""
        answer: dict[str, Any] = self.ask("POST", "/reload", 30.0)
        return answer

    def shutdown(self) -> None:
        """Ask for the end of everything; returns before that has come."""
        self.ask("POST", "/shutdown")

    def wait_healthy(self, timeout: float = 30.0) -> None:
        """Wait until all that is wanted is well; raises SupervisorError with what is not."""
        end = time.monotonic() + timeout
        while True:
            answer = self.health()
            if answer["status"] == "ok":
                return
            if time.monotonic() >= end:
                programs = answer["programs"].items()
                reasons = "; ".join(f"{name}: {reason}" for name, reason in programs)
                raise SupervisorError(f"not healthy after {timeout:g} s: {reasons}")
            time.sleep(POLL)


def quote(name: str) -> str:
    import urllib.parse

    return urllib.parse.quote(name, safe="")


@contextlib.contextmanager
def running(config: str | os.PathLike[str] | Mapping[str, Any]) -> Iterator[Client]:
    """Run a supervisor as a child process, for tests; yield a client of it.

    `config` is a file or its content as a mapping. It listens on a private socket, and
    on TCP only where the configuration says so. It stops at the end of the block, and
    when this process ends, however that comes about.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="supervisors-") as folder:
        path = f"{folder}/supervisors.toml"
        if isinstance(config, Mapping):
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(
                    f"{to_toml(k)} = {to_toml(v)}\n" for k, v in config.items()
                )
        else:
            path = os.fspath(config)
        lifeline, hold = os.pipe()
        private = f"--private={folder}/s,{lifeline}"
        argv = [sys.executable, os.path.abspath(__file__), private, "-c", path]
        try:
            popen = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, pass_fds=[lifeline]
            )
        finally:
            os.close(lifeline)
        try:
            client = Client(f"unix:{folder}/s")
            wait_for(client, popen)
            yield client
        finally:
            os.close(
                hold
            )  # the only copy of its kind: the supervisor sees the end of file
            popen.wait()


def wait_for(client: Client, popen: subprocess.Popen[bytes]) -> None:
    """Wait until a supervisor answers; raises SupervisorError if it does not."""
    end = time.monotonic() + START_TIME
    while True:
        try:
            client.status()
            return
        except Unreachable:
            if popen.poll() is not None:
                code = popen.returncode
                raise SupervisorError(
                    f"the supervisor ended with exit status {code}"
                ) from None
            if time.monotonic() >= end:
                raise
            time.sleep(POLL)


def to_toml(value: Any) -> str:
    """Return a value, or a key, as TOML; tables inline."""
    import json

    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{to_toml(k)} = {to_toml(v)}" for k, v in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


class Usage(SupervisorError):
    """A bad command line."""


def find_clients(options: Any) -> list[Client]:
    """Return the clients to try in turn: of -s, of -c, of the environment, of the default."""
    if options.server:
        return [Client(options.server, own_token({}))]
    url = os.environ.get("SUPERVISOR_SERVER_URL", "")
    if url and not options.configfile:
        return [Client(url, own_token({}))]
    path = options.configfile or DEFAULT_FILE
    try:
        data = read_toml(path)
        values = read_table(Config, data, str, [], original_environ())
    except ConfigError:
        values = {}  # a verb works while the file is broken
    addresses = []
    with contextlib.suppress(OSError):
        control = control_path(values.get("control", "auto"), os.path.realpath(path))
        addresses += [f"unix:{control}"] if control else []
    for address in values.get("listen", ("localhost:3000",)):
        place = str(address).replace("0.0.0.0", "127.0.0.1")
        addresses.append(f"127.0.0.1{place}" if place.startswith(":") else place)
    token = own_token(values)
    clients = []
    for address in filter(None, addresses):
        with contextlib.suppress(SupervisorError):
            clients.append(Client(address, token))
    return clients


def own_token(values: Mapping[str, Any]) -> str | None:
    """Return the token of the environment, else of the configuration."""
    token = os.environ.get("SUPERVISOR_TOKEN") or values.get("token")
    if not token and values.get("token_file"):
        with contextlib.suppress(OSError), open(values["token_file"]) as file:
            token = file.read().strip()
    return token or None


def connect(options: Any) -> Client:
    """Return the first client that reaches a supervisor; raises Unreachable."""
    tried = []
    for client in find_clients(options):
        try:
            client.ask("GET", "/health/live")
            return client
        except Unreachable as error:
            tried.append(str(error))
        except Refused:
            return client
    places = "; ".join(tried) or "nowhere to ask"
    raise Unreachable(f"no supervisor answers ({places}): start one, or use -c or -s")


def coloured(text: str, code: int | None) -> str:
    """Return text in colour, if standard output is a terminal that wants it."""
    plain = code is None or "NO_COLOR" in os.environ or not sys.stdout.isatty()
    return text if plain else f"\033[{code}m{text}\033[0m"


def as_list(answer: Any) -> list[dict[str, Any]]:
    return answer if isinstance(answer, list) else [answer]


def do_status(client: Client, options: Any) -> int:
    names = ",".join(options.names) or None
    objects = as_list(client.status(names))
    if options.json:
        print_json(objects)
    else:
        width = max([len(one["name"]) for one in objects], default=0)
        for one in objects:
            state = coloured(f"{one['state']:<9}", STATE_COLOURS.get(one["state"]))
            print(f"{one['name']:<{width}}   {state} {one['description']}".rstrip())
    unwell = client.health()["programs"]
    return 3 if any(one["name"] in unwell for one in objects) else 0


def print_json(content: object) -> None:
    import json

    print(json.dumps(content, indent=2))


def do_health(client: Client, options: Any) -> int:
    answer = client.health(",".join(options.names) or None)
    if options.json:
        print_json(answer)
    else:
        print(answer["status"])
        for name, reason in answer["programs"].items():
            print(f"{name}: {reason}")
    return 0 if answer["status"] == "ok" else 1


def do_order(client: Client, options: Any) -> int:
    """Start, stop or restart, and say what came of it."""
    verb, names = options.verb, ",".join(options.names)
    before = {one["name"]: one for one in as_list(client.status(names))}
    objects = as_list(client.order(verb, names, 0 if options.no_wait else options.t))
    if options.json:
        print_json(objects)
    code = 0
    for one in objects:
        ended_well = (
            one["state"] == "EXITED" and client.health(one["name"])["status"] == "ok"
        )
        one["ready"] |= ended_well
        text, done = describe_outcome(verb, before.get(one["name"], one), one, options)
        if not options.json:
            print(f"{one['name']}: {text}", file=sys.stdout if done else sys.stderr)
        code = code if done else 1
    return code


def describe_outcome(
    verb: str, before: dict[str, Any], after: dict[str, Any], options: Any
) -> tuple[str, bool]:
    """Return what became of an order in words, and whether it is what was asked for."""
    state, reason = after["state"], after["reason"]
    if verb == "stop":
        if before["state"] == "STOPPED":
            return "not running", True
        if not after["running"] and state != "WAITING":
            return f"stopped, {reason}" if reason else "stopped", True
    elif after["ready"]:
        if (
            verb == "start"
            and before["pid"] is not None
            and before["pid"] == after["pid"]
        ):
            return "already running", True
        return f"started, pid {after['pid']}" if after[
            "pid"
        ] else f"done, {reason}", True
    elif state in ("BACKOFF", "FATAL", "EXITED", "STOPPED"):
        return f"{state}, {reason}" if reason else state, False
    if options.no_wait:
        return f"{verb} requested, {state}", True
    return f"{state} after {options.t:g} s" + (f", {reason}" if reason else ""), False


def do_signal(client: Client, options: Any) -> int:
    if not options.names[1:]:
        raise Usage("signal: expected SIGNAL NAME...")
    number, names = options.names[0], ",".join(options.names[1:])
    objects = as_list(client.signal(names, number))
    for one in objects:
        if one["running"]:
            print(f"{one['name']}: signalled")
        else:
            print(f"{one['name']}: not running", file=sys.stderr)
    return 0 if all(one["running"] for one in objects) else 1


def do_logs(client: Client, options: Any) -> int:
    """Print the newest lines; with several programs, each line with its name."""
    objects = as_list(client.status(",".join(options.names) or None))
    names = [one["name"] for one in objects]
    width = max(map(len, names), default=0)
    failed: list[str] = []

    def copy(name: str, prefix: bytes) -> None:
        try:
            with client.open_logs(name, options.n, follow=options.f) as response:
                for line in (
                    response if prefix else iter(lambda: response.read1(65536), b"")
                ):
                    os.write(1, prefix + line)
        except Refused as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
        except OSError:
            pass  # the supervisor is gone, or nobody reads on

    if len(names) == 1:
        copy(names[0], b"")
        return 1 if failed else 0
    copies = [
        threading.Thread(
            target=copy, args=(name, f"{name:<{width}} | ".encode()), daemon=True
        )
        for name in names
    ]
    for thread in copies:
        thread.start()
        if not options.f:
            thread.join()
    for thread in copies:
        thread.join()
    return 1 if len(failed) == len(names) else 0


def do_reload(client: Client, options: Any) -> int:
    try:
        answer = client.reload()
    except Refused as error:
        for line in error.errors or [str(error)]:
            print(line, file=sys.stderr)
        return 1
    if options.json:
        print_json(answer)
        return 0
    for key in ("added", "changed", "removed"):
        for name in answer[key]:
            print(f"{name}: {key}")
    print(f"{answer['unchanged']} unchanged")
    for key in answer.get("needs_restart", ()):
        print(
            f"{key}: takes effect when the supervisor is started again", file=sys.stderr
        )
    return 0


def do_shutdown(client: Client, options: Any) -> int:
    """Ask for the end, and wait for it: the stream of events ends with the supervisor."""
    end = time.monotonic() + options.t
    with client.open("GET", "/events", options.t) as events:
        client.shutdown()
        if options.no_wait:
            print("shutting down")
            return 0
        with contextlib.suppress(OSError):
            while events.read1(65536) and time.monotonic() < end:
                pass
    while time.monotonic() < end:
        try:
            client.ask("GET", "/health/live")
        except Unreachable:
            print("shut down")
            return 0
        except Refused:
            pass
        time.sleep(POLL)
    print(f"not yet shut down after {options.t:g} s", file=sys.stderr)
    return 1


ACTIONS: Mapping[str, Callable[[Client, Any], int]] = {
    "health": do_health,
    "logs": do_logs,
    "reload": do_reload,
    "restart": do_order,
    "shutdown": do_shutdown,
    "signal": do_signal,
    "start": do_order,
    "status": do_status,
    "stop": do_order,
}


def parse_arguments(arguments: list[str]) -> Any:
    """Return the options; exits with 2 on a bad command line, with 0 after --help."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def format_help(self) -> str:
            return HELP + "\n"

        def error(self, message: str) -> NoReturn:
            sys.stderr.write(f"supervisors: {message} (see --help)\n")
            raise SystemExit(2)

    common = Parser(add_help=False, allow_abbrev=False)
    common.add_argument("-c", "--configfile")
    common.add_argument("-s", "--server")
    common.add_argument(
        "-v", dest="level", action="store_const", const="debug", default="info"
    )
    common.add_argument("-q", dest="level", action="store_const", const="warning")
    common.add_argument("--private", default="")  # of `running`
    _, rest = common.parse_known_args(arguments)
    verb = next((word for word in rest if not word.startswith("-")), "")
    verb = verb if verb in VERBS else ""
    parser = Parser(prog="supervisors.py", parents=[common], allow_abbrev=False)
    parser.add_argument(
        "--version", action="version", version=f"supervisors {__version__}"
    )
    if verb:
        arguments = list(arguments)
        parser.add_argument("verb", choices=[verb])
    parser.set_defaults(verb="")
    parser.add_argument("names", nargs="*")
    if verb in ("status", "health", "start", "stop", "restart", "reload"):
        parser.add_argument("--json", action="store_true")
    if verb in ("start", "stop", "restart", "shutdown"):
        parser.add_argument("--no-wait", action="store_true")
        parser.add_argument("-t", type=parse_grace, default=60.0)
    if verb == "logs":
        parser.add_argument("-f", action="store_true")
        parser.add_argument("-n", type=int, default=100)
    options = parser.parse_intermixed_args(arguments)
    check_names(parser, options)
    return options


def check_names(parser: Any, options: Any) -> None:
    """Refuse too few or too many names; make a CONFIG of what is one."""
    verb, names = options.verb, options.names
    if verb in ("start", "stop", "restart", "signal") and not names:
        parser.error(f"{verb}: expected NAME...")
    if verb in ("reload", "shutdown") and names:
        parser.error(f"{verb}: expected no name, got {names[0]!r}")
    if verb in ("", "check"):
        if len(names) > 1 or (names and options.configfile):
            parser.error(f"expected one CONFIG, got {names[-1]!r} as well")
        options.configfile = options.configfile or (names or [DEFAULT_FILE])[0]
    if getattr(options, "t", 0) > MOST_WAIT:
        parser.error(f"-t: expected at most {MOST_WAIT:g} seconds")


def run_file(options: Any) -> int:
    """Run the programs of a file; return the exit status."""
    path, lifeline, overrides = options.configfile, None, {}
    config = load_config(path)
    if options.private:
        control, _, fd = options.private.rpartition(",")
        lifeline = int(fd)
        overrides = {"control": control}
        if "listen" not in read_toml(path):
            overrides["listen"] = ()
    return Supervisor(config, options.level, lifeline, overrides).run()


def main(arguments: list[str]) -> int:
    """Do what a command line says; return the exit status."""
    options = parse_arguments(arguments)
    verb = options.verb
    try:
        if not verb:
            return run_file(options)
        if verb == "check":
            config = load_config(options.configfile)
            print(f"{options.configfile}: ok, {len(config.programs)} programs")
            return 0
        return ACTIONS[verb](connect(options), options)
    except ConfigError as error:
        for line in error.errors:
            print(line, file=sys.stderr)
        return 2
    except SupervisorError as error:
        print(f"supervisors: {error}", file=sys.stderr)
        return exit_status_of(verb, error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the interpreter's last flush
        return 1


def exit_status_of(verb: str, error: SupervisorError) -> int:
    if verb == "health":
        return 1
    if not verb or isinstance(error, Usage):
        return 2
    missing = isinstance(error, Refused) and error.status == 404
    return 4 if missing or isinstance(error, Unreachable) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
