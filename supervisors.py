#!/usr/bin/env python3
"""Run, restart, log and watch the programs of a TOML file; be the init of a container.

Copy this file anywhere; it needs Python 3.11 and nothing else.

    python3 supervisors.py supervisors.toml     run the programs of a file
    python3 supervisors.py status               ask the running supervisor
    python3 supervisors.py -- COMMAND           be the init of one command

The file reads from top to bottom; code uses only what stands above it.

    1   Init mode        one command under an init; first, as it imports next to nothing
    2   Configuration    the keys, their checks, `load_config`
    3   State machine    `step`: what follows what, as values
    4   Log text         lines and their formats
    5   Log files        rotation, the terminal, the log thread
    6   Processes        spawn, signal, leftovers
    7   Health           checks and the notify socket
    8   HTTP             routes, the page
    9   Supervisor       the loop that owns everything
    10  Client           the verbs, the library's client, the command line

Three rules hold it together:

1.  The core (configuration, state machine, log text) does no I/O and reads no clock:
    `now` is passed in.
2.  The main thread owns every program's state; the log thread owns pipes and log files;
    HTTP threads read published, immutable statuses, and ask the main thread for more.
3.  Every state that waits owns a deadline or names the event that it waits for.
"""

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 11):
    _found = sys.version.split()[0]
    sys.stderr.write(f"supervisors needs Python 3.11 or newer, this is {_found}\n")
    sys.exit(2)

import signal
import time

__version__ = "1.0"
__all__ = ["Client", "Config", "ConfigError", "Program", "State", "Status"]
__all__ += ["Supervisor", "SupervisorError", "load_config", "running"]


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
SIGNALS = signal.valid_signals()
STOPS = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
COERCED = {"C.UTF-8", "C.utf8", "UTF-8"}  # values that PEP 538 gives LC_CTYPE
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def signal_number(name: str) -> int:
    """Return the number of a signal's name or number; ValueError if there is none."""
    if name.isdecimal() and int(name) in SIGNALS:
        return int(name)
    try:
        return signal.Signals["SIG" + name.upper().removeprefix("SIG")]
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
        plain = environ.get("LANG", "") in ("", "C", "POSIX")
        ours = plain and not environ.get("LC_ALL")
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

    [0] is the state, [1] the parent, [2] the group, [3] the session, [19] the start in
    ticks since boot. Empty where there is no /proc.
    """
    table = {}
    names = os.listdir("/proc") if os.path.isdir("/proc") else []
    for name in filter(str.isdecimal, names):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                table[int(name)] = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it ended meanwhile
    return table


def descendants(of: int, spare: Set[int] = frozenset()) -> list[int]:
    """Return the pids of the children of `of` and of all theirs.

    Without those in `spare`, those whose group or session that is, and theirs.
    """
    children: dict[int, list[int]] = {}
    for pid, fields in process_table().items():
        # A program's group, and session, lives on while its leader is reaped.
        if not {pid, int(fields[2]), int(fields[3])} & spare:
            children.setdefault(int(fields[1]), []).append(pid)
    found = list(children.get(of, ()))
    for pid in found:  # grows while it is read: a walk, breadth first
        found += children.get(pid, ())
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


def say(text: str) -> None:
    print(f"supervisors: {text}", file=sys.stderr)


def attempt(call: Callable[..., object], *arguments: object) -> None:
    """Call something whose failure, as a lost terminal's, leaves nothing to be done."""
    try:
        call(*arguments)
    except OSError:
        return


def terminal_group() -> int:
    """Return the foreground group of the terminal on standard input; -1 without one."""
    try:
        return os.tcgetpgrp(0)
    except OSError:
        return -1


class Init:
    """One command under an init. `run` returns the exit status; main thread, once."""

    def __init__(self) -> None:
        self.command: list[str] = []
        self.rewrites: dict[int, int] = {}
        self.single, self.grace = False, GRACE
        self.pid, self.terms, self.foreground = 0, 0, False
        self.code: int | None = None

    def run(self) -> int:
        inherited = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if not become_subreaper() and sys.platform == "linux":
            say("cannot become a subreaper: orphans go to PID 1")
        self.foreground = terminal_group() == os.getpgrp()
        try:
            here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
            os.chdir("/")  # no mount is kept busy
        except OSError:
            here = -1  # unreadable or removed: the command stays here with us
        self.pid = os.fork()
        if self.pid == 0:
            self.become_command(here, inherited)
        # Here as well: whoever of the two is first. It may have called exec since.
        attempt(os.setpgid, self.pid, self.pid)
        while self.code is None:
            self.pass_on(signal.sigwait(SIGNALS))
        self.sweep()
        if self.foreground:
            attempt(os.tcsetpgrp, 0, os.getpgrp())
        return self.code

    def become_command(self, here: int, inherited: object) -> None:
        """Turn this forked process into the command. Never returns."""
        code, name = 126, self.command[0]
        try:
            os.setpgid(0, 0)
            if self.foreground:
                attempt(os.tcsetpgrp, 0, os.getpid())
            if here >= 0:
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
            os.execvpe(name, self.command, environ)
        except OSError as error:
            # With `tostop`, a background group is stopped by what it writes.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
            code = 127 if isinstance(error, FileNotFoundError) else 126
            reason = "no such command" if code == 127 else error.strerror
            say(f"cannot run {name!r}: {reason}")
        finally:
            os._exit(code)

    def pass_on(self, number: int) -> None:
        """Do what a signal asks for."""
        self.terms += number == signal.SIGTERM
        target = self.rewrites.get(number, number)
        if number == signal.SIGCHLD:
            self.reap()
        elif target == signal.SIGCONT:
            self.resume()
        elif target:
            # The kernel ignores these for an orphaned group; SIGSTOP it does not.
            stop = target in STOPS and not self.single
            self.forward(signal.SIGSTOP if stop else target)
            if number in STOPS:
                os.kill(os.getpid(), signal.SIGSTOP)
                self.resume()

    def forward(self, number: int) -> None:
        send(self.pid if self.single else -self.pid, number)

    def suspend(self) -> None:
        """Stop as the command has stopped, and go on together with it.

        Not where no shell of our session could continue us, as the kernel ignores
        Ctrl-Z for an orphaned group.
        """
        parent = os.getppid()
        if os.getpid() != 1 and parent and os.getsid(parent) == os.getsid(0):
            os.kill(os.getpid(), signal.SIGSTOP)
        self.resume()

    def resume(self) -> None:
        """Hand the terminal over again, if it is ours to give, and pass CONT on."""
        group = terminal_group()
        if group == os.getpgrp():
            attempt(os.tcsetpgrp, 0, self.pid)
        self.foreground = group in (os.getpgrp(), self.pid)  # else we are a job of `bg`
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

    def sweep(self) -> None:
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
            number = signal.sigwait(SIGNALS)
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
        everything = [-1]  # all that PID 1 may signal, itself excepted
        rest = [-self.pid, *descendants(os.getpid())]
        for pid in everything if os.getpid() == 1 else rest:
            send(pid, number)


def parse_init(arguments: list[str]) -> Init | None:
    """Return the init that the arguments ask for, None if `--` does not come first.

    Raises ValueError with what is wrong. By hand: argparse alone takes 8 ms to import.
    """
    init, rest = Init(), list(arguments)
    while "--" in rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if word == "--":
            if not rest:
                raise ValueError("no command behind --")
            init.command = rest
            return init
        if word in ("-c", "--single-child"):
            init.single = True
            continue
        if word.startswith("-r") and word != "-r":
            option, value = "-r", word[2:]
        elif not equals:
            value = rest.pop(0)
        if option in ("-r", "--rewrite"):
            init.rewrites.update([parse_rewrite(value)])
        elif option == "--grace":
            if not value.replace(".", "", 1).isdecimal():
                raise ValueError(f"--grace: expected seconds >= 0, got {value!r}")
            init.grace = float(value)
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


if __name__ == "__main__":
    try:
        _init = parse_init(sys.argv[1:])
    except ValueError as _error:
        say(str(_error))
        sys.exit(2)
    if _init:
        sys.exit(_init.run())
    # A signal to PID 1 is lost until there is a handler, unless it is blocked: then it
    # waits. `Supervisor` unblocks these, and `main` for the verbs.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})

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
import typing
from collections import deque
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, assert_never

if TYPE_CHECKING:
    import http.server

T = typing.TypeVar("T")


# === 2. Configuration =================================================================
#
# A key is declared once, as the field of a tuple: its name, its type, its default, and
# in the type's `Annotated` the check that converts a TOML value or refuses it. A table
# is read by `read_table`, which collects what is wrong instead of raising at the first
# mistake. Values are immutable and compare by value: a reload compares with `!=`.

NAME = re.compile(r"[A-Za-z0-9_.-]+")
VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_]\w*)(?::-([^}]*))?\})?")
ESCAPE = "write $${ for a literal ${"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", re.IGNORECASE)
MOST_INSTANCES = 10_000
NOWHERE = "/dev/null"
TERMINALS = {"/dev/stdout": 1, "/dev/stderr": 2}  # by descriptor, never opened by path


class SupervisorError(Exception):
    """What the user asked for cannot be done; the message says why."""

    code = 1  # exit status of a verb
    errors: Sequence[str] = ()


class ConfigError(SupervisorError):
    """A configuration is not valid; `errors` lists everything that is wrong with it."""

    code = 2

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors: list[str] = list(dict.fromkeys(errors))
        super().__init__("; ".join(self.errors))


def freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Check(NamedTuple):
    """What a key accepts, in words and as a function, and how it is converted then.

    The conversion may raise ValueError as well, or ConfigError with lines of its own.
    """

    expects: str
    accepts: Callable[[Any], object]
    convert: Callable[[Any], object] = freeze


def shown(value: object) -> str:
    """Return a value as the file has it, cut to a line."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def whole(least: int, most: float = float("inf")) -> Callable[[Any], bool]:
    """Return a test for an integer of a range; a boolean is none."""
    return lambda one: type(one) is int and least <= one <= most


def list_of(accepts: Callable[[Any], object]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value))


def any_of(*tests: Callable[[Any], object]) -> Callable[[Any], bool]:
    return lambda value: any(accepts(value) for accepts in tests)


def one_of(*values: object) -> Check:
    *first, last = [shown(value).replace("'", '"') for value in values]
    kinds = [(type(value), value) for value in values]
    words = f"{', '.join(first)} or {last}"
    return Check(words, lambda value: (type(value), value) in kinds)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def is_table(value: Any) -> bool:
    return isinstance(value, dict)


def is_environment(value: Any) -> bool:
    names_fit = is_table(value) and all(re.fullmatch(r"[^=\0]+", key) for key in value)
    return names_fit and all(map(is_text, value.values()))


def is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1e9  # neither infinite nor NaN


def is_size(value: Any) -> bool:
    return type(value) in (int, str) and bool(SIZE.fullmatch(str(value).strip()))


def to_some(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def to_size(value: int | str) -> int:
    match = SIZE.fullmatch(str(value).strip())
    if isinstance(value, int) or not match:
        return int(value)
    return int(float(match[1]) * 1024 ** " KMG".index(match[2].upper() or " "))


def to_signal(value: str) -> str:
    return signal.Signals(signal_number(value)).name.removeprefix("SIG")


def to_rlimits(table: dict[str, Any]) -> dict[str, int]:
    """Return limits by the kernel's name for them; -1 is none (setrlimit(2))."""
    import resource

    limits, errors = {}, []
    for name, limit in table.items():
        if not hasattr(resource, f"RLIMIT_{name.upper()}"):
            errors.append(f"{name}: no such limit")
        elif limit == "unlimited" or is_size(limit):
            limits[name] = -1 if limit == "unlimited" else to_size(limit)
        else:
            errors.append(f'{name}: expected a size or "unlimited", got {shown(limit)}')
    if errors:
        raise ConfigError(errors)
    return limits


def to_health(table: dict[str, object]) -> Health:
    errors: list[str] = []
    health = Health(**read_table(Health, table, str, errors))
    if not errors and sum(map(bool, (health.http, health.tcp, health.command))) != 1:
        errors.append("expected one of http, tcp and command")
    errors += unusable(health) if health.command else ()
    if errors:
        raise ConfigError(errors)
    return health


LIST = tuple[str, ...]
COMMAND = "a command: a string or a list of strings"
INHERITED = "true, false or a list of names"
INSTANCES = f"a whole number from 1 to {MOST_INSTANCES}"
FLAG = one_of(True, False)
VARIABLES = Check("a table of strings", is_environment)
LIMITS = Check("a table of limits", is_table, to_rlimits)
is_instances, is_octal = (
    whole(1, MOST_INSTANCES),
    re.compile("(0o?)?[0-7]{1,3}").fullmatch,
)
is_words, is_codes = list_of(is_text), list_of(whole(0, 255))
is_path, is_some = re.compile(r"[^\0]+").fullmatch, any_of(is_text, is_words)
is_user = any_of(whole(0, 2**32 - 2), lambda one: is_text(one) and one)

String = Annotated[str, Check("a string", is_text)]
Path = Annotated[str, Check("a path", is_path)]
Url = Annotated[str, Check("a URL", re.compile(r"https?://[^/\0][^\0]*").fullmatch)]
HostPort = Annotated[str, Check("HOST:PORT", re.compile(r"[^\0]+:\d+").fullmatch)]
Words = Annotated[LIST, Check("a list of strings", is_words)]
Paths = Annotated[LIST, Check("a path or a list of paths", is_some, to_some)]
Addresses = Annotated[LIST, Check("an address or a list of them", is_some, to_some)]
Command = Annotated[str | LIST, Check(COMMAND, lambda one: one and is_some(one))]
Inherited = Annotated[bool | LIST, Check(INHERITED, any_of(FLAG.accepts, is_words))]
Flag = Annotated[bool, FLAG]
Count = Annotated[int, Check("a whole number >= 0", whole(0))]
Positive = Annotated[int, Check("a whole number >= 1", whole(1))]
Instances = Annotated[int, Check(INSTANCES, is_instances)]
Nice = Annotated[int, Check("a whole number from -20 to 19", whole(-20, 19))]
Codes = Annotated[tuple[int, ...], Check("a list of codes from 0 to 255", is_codes)]
Seconds = Annotated[float, Check("seconds >= 0", is_seconds, float)]
Interval = Annotated[float, Check("seconds > 0", lambda s: s and is_seconds(s), float)]
Size = Annotated[int, Check('bytes, or a string such as "10MB"', is_size, to_size)]
UserName = Annotated[str | int, Check("a name or a number", is_user)]
Octal = Annotated[
    int, Check('an octal string such as "022"', is_octal, lambda one: int(one, 8))
]
SignalName = Annotated[str, Check("the name of a signal", is_text, to_signal)]
Ending = Annotated[str, one_of("ignore", "shutdown")]
LogFormat = Annotated[str, one_of("raw", "prefix", "timestamp", "json")]


class Health(NamedTuple):
    """The table `healthcheck` of a program: one of three probes, and its times."""

    http: Url = ""
    tcp: HostPort = ""
    command: Command = ()
    interval: Interval = 10.0
    timeout: Interval = 3.0
    retries: Positive = 3
    start_period: Seconds = 30.0

    @property
    def argv(self) -> tuple[str, ...]:
        return split(self.command)


class Program(NamedTuple):
    """One program, or one instance of it; the fields are the keys of the file."""

    name: str
    group: str
    number: int = 0
    needs: tuple[str, ...] = ()  # `depends_on`, by names of instances
    command: Command = ()
    args: Words | None = None
    numprocs: Instances = 1
    directory: Path | None = None
    environment: Annotated[Mapping[str, str], VARIABLES] = {}
    env_file: Paths = ()
    inherit_env: Inherited = True
    user: UserName | None = None
    group_name: UserName | None = None
    umask: Octal | None = None
    nice: Nice | None = None
    rlimits: Annotated[Mapping[str, int], LIMITS] = {}
    autostart: Flag = True
    autorestart: Annotated[bool | str, one_of(True, False, "unexpected")] = False
    exitcodes: Codes = (0,)
    startsecs: Seconds = 1.0
    startretries: Count | None = None
    backoff_delay: Seconds = 0.5
    backoff_limit: Seconds = 30.0
    stopsignal: SignalName = "TERM"
    stopwaitsecs: Seconds = 8.0
    stopasgroup: Flag = True
    type: Annotated[str, one_of("simple", "oneshot", "notify")] = "simple"
    watchdog_secs: Interval | None = None
    depends_on: Words = ()
    healthcheck: Annotated[Health | None, Check("a table", is_table, to_health)] = None
    on_success: Ending = "ignore"
    on_failure: Ending = "ignore"
    logfile: Path | None = None
    stderr_logfile: Path | None = None
    logfile_maxbytes: Size = 10 * 1024 * 1024
    logfile_backups: Count = 3
    log_format: LogFormat | None = None

    @property
    def argv(self) -> tuple[str, ...]:
        """The argument vector; with `args`, a string is the executable itself."""
        if self.args is None:
            return split(self.command)
        return to_some(self.command) + self.args


class Config(NamedTuple):
    """A whole configuration; `path` is the file's real path, "" if it has none."""

    path: str = ""
    programs: Mapping[str, Program] = {}
    listen: Addresses = ("localhost:3000",)
    control: String = "auto"
    token: String = ""
    token_file: String = ""
    allowed_hosts: Words = ()
    include: Words = ()
    exit_when_done: Flag = False
    log_format: LogFormat = "prefix"
    pidfile: Path | None = None
    shutdown_timeout: Seconds | None = None


@functools.cache
def declared(kind: type) -> dict[str, tuple[str, Check]]:
    """Return the fields of a tuple class and their checks, by TOML key."""
    checks = {}
    for field, hint in typing.get_type_hints(kind, include_extras=True).items():
        # `group` is the user's group in TOML, and in the status, as in supervisord,
        # the group of a program's instances: the field has another name.
        key = "group" if field == "group_name" else field
        for part in (
            hint,
            *getattr(hint, "__args__", ()),
        ):  # of `Path | None`, the path
            for check in getattr(part, "__metadata__", ()):
                checks[key] = (field, check)
    return checks


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
        name, default = match.groups()
        if match[0] == "$${":
            return "${"
        if name is None:
            raise LookupError(f"expected ${{NAME}} or ${{NAME:-default}}; {ESCAPE}")
        if name not in variables and default is None:
            example = f"${{{name}:-x}} is x then"
            raise LookupError(f"${{{name}}} is not set; {example}; {ESCAPE}")
        return variables.get(name) or default or ""

    if isinstance(value, list):
        return [expand(one, variables) for one in value]
    if isinstance(value, dict):
        return {key: expand(one, variables) for key, one in value.items()}
    return VARIABLE.sub(replace, value) if isinstance(value, str) else value


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
        where = locate(key)
        if key not in checks:
            tables = ("programs", "defaults") if kind is Config else ()
            errors.append(f"{where}: unknown key{hint(key, [*checks, *tables])}")
            continue
        field, check = checks[key]
        try:
            value = value if variables is None else expand(value, variables)
            if not check.accepts(value):
                raise ValueError
            values[field] = check.convert(value)
        except LookupError as error:
            errors.append(f"{where}: {error.args[0]}")
        except ConfigError as error:
            errors += [f"{where}.{line}" for line in error.errors]
        except (TypeError, ValueError):
            errors.append(f"{where}: expected {check.expects}, got {shown(value)}")
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
    count = merged.get("numprocs", 1)
    programs, before = [], len(errors)
    if "command" not in table:
        errors.append(f"programs.{name}.command: missing")
    for number in range(count if is_instances(count) else 1):
        variables = {**environ, "PROCESS_NUM": str(number)}
        values = read_table(Program, merged, locate, errors, variables)
        instance = f"{name}:{number}" if count != 1 else name
        values.pop("numprocs", None)  # the others are none of an instance's business
        programs.append(Program(name=instance, group=name, number=number, **values))
        if len(errors) == before:
            errors += [f"programs.{name}.{error}" for error in unlikely(programs[-1])]
        if len(errors) > before:
            return []
    return programs


def unlikely(program: Program) -> Iterator[str]:
    """Yield what single keys cannot tell: keys that do not go together."""
    yield from unusable(program) if program.command else ()
    if program.watchdog_secs is not None and program.type != "notify":
        yield f'watchdog_secs: expected type "notify" with it, got "{program.type}"'
    if program.healthcheck and program.type == "oneshot":
        yield "healthcheck: expected none for a oneshot, which ends"


def unusable(owner: Program | Health) -> Iterator[str]:
    """Yield what is wrong with a command that cannot be split, or is all blanks."""
    command = shown(owner.command)
    try:
        if not owner.argv:
            yield f"command: expected a command, got {command}"
    except ValueError as error:
        yield f"command: cannot split {command}: {str(error).lower()}"


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
    keys = {key: data[key] for key in data if key not in ("programs", "defaults")}
    values = read_table(Config, keys, str, errors, environ)
    if values.get("token") and values.get("token_file"):
        errors.append("token_file: expected token or token_file, not both")
    for address in filter(None, values.get("listen", ())):
        try:
            parse_address(address)
        except ValueError as error:
            errors.append(f"listen: {error}")
    defaults = read_defaults(data.get("defaults", {}), environ, errors)
    tables = collect_programs({"": data, **(included or {})}, errors)
    programs: dict[str, Program] = {}
    for name, table in tables.items():
        for program in read_program(name, table, defaults, environ, errors):
            programs[program.name] = program
    if not tables and not errors:
        errors.append("programs: expected at least one program")
    programs = resolve_dependencies(programs, tables, defaults, errors)
    errors += shared_files(programs.values())
    if errors:
        raise ConfigError(errors)
    return Config(path=path, programs=programs, **values)


def read_defaults(
    table: Any, environ: Mapping[str, str], errors: list[str]
) -> dict[str, Any]:
    """Return the table `defaults` as it stands; it is converted program by program."""
    if not is_table(table):
        errors.append(f"defaults: expected a table, got {shown(table)}")
        return {}
    before, variables = len(errors), {**environ, "PROCESS_NUM": "0"}
    usable = {key: table[key] for key in table if key not in ("command", "args")}
    errors += [
        f"defaults.{key}: expected in a program only"
        for key in table
        if key not in usable
    ]
    read_table(Program, usable, "defaults.{}".format, errors, variables)
    return usable if len(errors) == before else {}


def collect_programs(
    files: Mapping[str, Mapping[str, Any]], errors: list[str]
) -> dict[str, dict[str, Any]]:
    """Return all tables of programs by name, those of the included files too."""
    tables: dict[str, dict[str, Any]] = {}
    for file, content in files.items():
        place = f"{file}: " if file else ""
        for key in content:
            if file and key != "programs":
                only = "expected nothing but programs in an included file"
                errors.append(f"{place}{key}: {only}")
        programs = content.get("programs", {})
        if not is_table(programs):
            errors.append(f"{place}programs: expected tables, got {shown(programs)}")
            continue
        for name, table in programs.items():
            where = f"{place}programs.{name}: "
            if name in tables:
                errors.append(where + "defined twice")
            elif not NAME.fullmatch(name) or name == "all":
                letters = "letters, digits, '_', '-', '.', and not 'all'"
                errors.append(f"{where}expected a name of {letters}")
            elif not is_table(table):
                errors.append(f"{where}expected a table, got {shown(table)}")
            else:
                tables[name] = table
    return tables


def resolve_dependencies(
    programs: dict[str, Program],
    tables: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Any],
    errors: list[str],
) -> dict[str, Program]:
    """Return the programs with what they need: `depends_on`, by names of instances."""
    members: dict[str, list[str]] = {name: [] for name in tables}
    for program in programs.values():
        for name in {program.name, program.group}:
            members.setdefault(name, []).append(program.name)
    for name, table in tables.items():  # of programs with other mistakes as well
        wanted: Any = {**defaults, **table}.get("depends_on")
        for one in wanted if is_words(wanted) else ():
            unread = not members.get(one.partition(":")[0], [""])
            if one not in members and not unread and "${" not in one:
                where = f"programs.{name}.depends_on"
                errors.append(f"{where}: no program {one!r}{hint(one, members)}")
    graph = {}
    for name, program in programs.items():
        needs = [
            member for one in program.depends_on for member in members.get(one, ())
        ]
        graph[name] = tuple(dict.fromkeys(needs))
    if any(graph.values()):
        import graphlib  # only where there is an order

        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            cycle = error.args[1][::-1]
            where = f"programs.{programs[cycle[0]].group}.depends_on"
            errors.append(f"{where}: cycle {' -> '.join(cycle)}")
    return {name: programs[name]._replace(needs=graph[name]) for name in programs}


def shared_files(programs: Iterable[Program]) -> Iterator[str]:
    """Yield where programs share a log file and do not agree on its rotation."""
    firsts: dict[str, Program] = {}
    for program in programs:
        for path in filter(None, (program.logfile, program.stderr_logfile)):
            if path in TERMINALS:
                continue
            first = firsts.setdefault(os.path.abspath(path), program)
            for key in ("logfile_maxbytes", "logfile_backups"):
                want, found = getattr(first, key), getattr(program, key)
                if found != want:
                    expected = f"{want} as in {first.group}, which shares {path!r}"
                    where = f"programs.{program.group}.{key}"
                    yield f"{where}: expected {expected}, got {found}"


class Address(NamedTuple):
    """Where to listen or to connect: a unix socket's path, or host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.path}" if self.path else f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return self.host.startswith("127.") or self.host == "::1"


def parse_address(text: str) -> Address:
    """Return the address of `HOST:PORT`, `[V6]:PORT`, `:PORT`, `unix:PATH`, or a URL.

    No name but `localhost` is looked up, so HOST is a number. Raises ValueError.
    """
    wanted = "expected HOST:PORT with a number for HOST, [V6]:PORT, :PORT or unix:PATH"
    if text.startswith("unix:") and text != "unix:":
        return Address(path=re.sub("^/+", "/", text.removeprefix("unix:")))
    plain = re.sub(r"^http://([^/]+)/?$", r"\1", text)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/]*)):(\d{1,5})", plain)
    try:
        if not match or int(match[3]) > 65535:
            raise ValueError
        host = match[1] or match[2].lower() or "::"
        host = {"localhost": "127.0.0.1", "*": "::"}.get(host, host)
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except (OSError, ValueError):
        raise ValueError(f"{wanted}, got {text!r}") from None
    return Address(host=host, port=int(match[3]))


def read_toml(path: str) -> dict[str, Any]:
    """Return a file's content; raises ConfigError with the reason and the place."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        text = f"cannot read {path!r}: {error.strerror}"
    except UnicodeDecodeError as error:
        text = f"{path}: not UTF-8 at byte {error.start}"
    except RecursionError:
        text = f"{path}: nested too deeply"
    except tomllib.TOMLDecodeError as error:
        reason = str(error)
        text = f"{path}: {reason[:1].lower()}{reason[1:]}"
    raise ConfigError([text])


def load_config(path: str = "supervisors.toml") -> Config:
    """Read a configuration and the files that it includes.

    Raises ConfigError, whose `errors` are complete lines; never exits.
    """
    data, environ, included = read_toml(path), original_environ(), {}
    patterns = data.get("include", [])
    for pattern in patterns if isinstance(patterns, list) else []:
        import glob  # only where something is included

        with contextlib.suppress(LookupError, TypeError, ValueError):
            where = os.path.join(os.path.dirname(path), expand(pattern, environ))
            for file in sorted(glob.glob(where)):
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


# What STOPPING leads to: it was asked to stop, or to start again; its leader ended
# unasked; or it was found to have failed, alive.
After = enum.Enum("After", "STOP START JUDGE FAIL")
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
        return self.state in (State.STARTING, State.RUNNING, State.STOPPING)


# Events, in the order of the table below. Those with defaults are classes.
Start = NamedTuple("Start", [])  # somebody wants it to run
Stop = NamedTuple("Stop", [])  # not to run
Restart = NamedTuple("Restart", [])  # a new run
Due = NamedTuple("Due", [])  # the deadline of the status has come
Spawned = NamedTuple("Spawned", [("pid", int)])
SpawnFailed = NamedTuple("SpawnFailed", [("reason", str), ("code", int)])  # 127 or 126
Emptied = NamedTuple("Emptied", [])  # the leader was reaped, its group is empty
Ready = NamedTuple("Ready", [])  # it said READY=1
Alive = NamedTuple("Alive", [])  # it said WATCHDOG=1
Text = NamedTuple("Text", [("text", str)])  # it said STATUS=text


class Exited(NamedTuple):  # the leader was reaped
    code: int | None
    signal: int | None
    survivors: bool = False  # some of its group live on


class Blocked(NamedTuple):  # what it depends on is not ready; or is: no reason
    reason: str
    cause: str = ""  # "failing": no mere delay; "failed": it will not end by itself


class Checked(NamedTuple):  # a health check passed, or failed
    passed: bool
    detail: str = ""


Happening = Due | Spawned | SpawnFailed | Exited | Emptied | Blocked
Event = Start | Stop | Restart | Happening | Ready | Alive | Text | Checked
# Actions. Spawn is answered with Spawned or SpawnFailed before any other event; a
# signal goes to the group, or to the leader where `stopasgroup` is false; a Kill is
# SIGKILL to the group, answered with Emptied if that was empty.
Spawn = NamedTuple("Spawn", [])
Signal = NamedTuple("Signal", [("name", str)])
Kill = NamedTuple("Kill", [])
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
    state = status.state
    if isinstance(event, Start):
        runs = state in (State.WAITING, State.STARTING, State.RUNNING)
        return (status, ()) if runs else order(program, now, status, After.START)
    if isinstance(event, Stop):
        stopped = state is State.STOPPED
        return (status, ()) if stopped else order(program, now, status, After.STOP)
    if isinstance(event, Restart):
        return order(program, now, status, After.START)
    if isinstance(event, Due):
        is_due = status.deadline is not None and now >= status.deadline
        return due(program, now, status) if is_due else (status, ())
    if isinstance(event, Spawned):
        return spawned(program, now, status, event)
    if isinstance(event, SpawnFailed):
        assert state is State.STARTING
        status = status._replace(ran=-1.0, exit_code=event.code, exit_signal=None)
        return judge(program, now, status, event.reason)
    if isinstance(event, Exited):
        return exited(program, now, status, event)
    if isinstance(event, Emptied):
        over = state is State.STOPPING
        return settle(program, now, status) if over else (status, ())
    if isinstance(event, Blocked):
        status = status._replace(blocked=event.reason, blocked_as=event.cause)
        return begin(status) if state is State.WAITING else (status, ())
    if isinstance(event, Ready):
        if program.type == "notify" and state is State.STARTING:
            status = status._replace(state=State.RUNNING, notified=True, reason="")
            status = watched(program, now, status)
        return status, ()
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
    """Return whether it has ended, not as it should, and stays so by itself."""
    failed = status.state is State.EXITED and not status.succeeded
    return failed or status.state is State.FATAL


def end_code(status: Status) -> int | None:
    """Return how the last run ended: the code, or 128 plus the signal's number."""
    return status.exit_code if status.exit_signal is None else 128 + status.exit_signal


def exit_status(status: Status) -> int:
    """Return a final end as an exit status, which is never 0 for a failure."""
    return end_code(status) or int(has_failed(status))


def order(program: Program, now: float, status: Status, after: After) -> Step:
    """Have it stop, or have a new run: at once, or when the present one is over."""
    if status.state is State.STOPPING:
        return status._replace(after=after), ()
    status = status._replace(after=after, reason="")
    proceed = halt if status.is_alive else settle
    return proceed(program, now, status)


def begin(status: Status, automatic: bool = False) -> Step:
    """Start a run, or wait for what it depends on."""
    status = status._replace(
        state=State.WAITING if status.blocked else State.STARTING,
        deadline=None,
        restarts=status.restarts + automatic,
        notified=False,
        reason=status.blocked,
        status_text="",
    )
    return status, () if status.blocked else (Spawn(),)


def halt(program: Program, now: float, status: Status) -> Step:
    """Ask a run to end; its status says already why, and what comes after."""
    deadline = now + program.stopwaitsecs
    status = status._replace(state=State.STOPPING, deadline=deadline)
    return status, (Signal(program.stopsignal),)


def due(program: Program, now: float, status: Status) -> Step:
    """Do what the deadline of a state was for."""
    if status.state is State.STARTING:
        return status._replace(state=State.RUNNING, deadline=None), ()
    if status.state is State.RUNNING:
        reason = f"no WATCHDOG=1 for {program.watchdog_secs:g} s"
        return halt(program, now, status._replace(after=After.FAIL, reason=reason))
    if status.state is State.BACKOFF:
        return begin(status, automatic=True)
    if status.state is not State.STOPPING:
        return status, ()
    killed, reason = f"killed after {program.stopwaitsecs:g} s", status.reason
    if killed not in reason:
        reason = f"{reason}, {killed}".removeprefix(", ")
    return status._replace(deadline=now + KILL_AGAIN, reason=reason), (Kill(),)


def spawned(program: Program, now: float, status: Status, event: Spawned) -> Step:
    assert status.state is State.STARTING
    status = status._replace(pid=event.pid, started=now, ran=-1.0, checks_failed=0)
    if program.type == "notify":
        return status._replace(reason=AWAITS_READY), ()
    if program.type == "oneshot" or program.startsecs == 0:
        return status._replace(state=State.RUNNING), ()
    return status._replace(deadline=now + program.startsecs), ()


def exited(program: Program, now: float, status: Status, event: Exited) -> Step:
    assert status.is_alive
    status = status._replace(pid=None, ran=now - status.started)
    status = status._replace(exit_code=event.code, exit_signal=event.signal)
    actions: tuple[Action, ...] = ()
    if status.state is not State.STOPPING:
        reason = f"{describe_end(status)}, its group lives on"
        status = status._replace(after=After.JUDGE, reason=reason)
        status, actions = halt(program, now, status)
    if not event.survivors:
        return settle(program, now, status)
    if program.stopasgroup:
        return status, actions
    return status._replace(deadline=now + KILL_AGAIN), (Kill(),)


def settle(program: Program, now: float, status: Status) -> Step:
    """Decide what follows a run that is over, its whole group gone."""
    if status.after in (After.JUDGE, After.FAIL):
        judged = status.after is After.JUDGE
        reason = describe_end(status) if judged else status.reason
        return judge(program, now, status, reason)
    status = status._replace(deadline=None, healthy=None, failures=0)
    if status.after is After.START:
        return begin(status)
    return status._replace(state=State.STOPPED), ()


def judge(program: Program, now: float, status: Status, reason: str) -> Step:
    """Decide whether and when a program that ended unasked comes back.

    An expected end after `startsecs` is no failure. Any other is; the first after
    `startsecs` is forgiven, then the waits double, and only a run of `backoff_limit`
    starts the count anew, so that a slow crash loop trips as well.
    """
    executed = status.ran >= 0
    expected = executed and end_code(status) in program.exitcodes
    expected = expected and status.after is not After.FAIL
    status = status._replace(deadline=None, healthy=None, reason=reason)
    status = status._replace(succeeded=expected)
    if program.autorestart is False or (expected and program.autorestart is not True):
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
    # The factor from 0.9 to 1.1, so that a fleet does not restart in step, is a hash of
    # the moment: no generator to import, to seed or to hand around.
    factor = 0.9 + hash((program.name, failures, now)) % 2001 / 10_000
    wait = backoff_delay(program, failures) * factor
    return status._replace(state=State.BACKOFF, deadline=now + wait), ()


def backoff_delay(program: Program, failures: int) -> float:
    """Return the seconds to wait before restart number `failures`, counted from 1."""
    doublings = min(failures - 1, 60)  # 2**60 seconds is beyond every limit
    return min(program.backoff_delay * 2.0**doublings, program.backoff_limit)


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
    status = status._replace(checks_failed=status.checks_failed + 1)
    if status.checks_failed < check.retries:
        return status._replace(reason=f"check failed: {event.detail}"), ()
    reason = f"unhealthy: {event.detail}"
    status = status._replace(healthy=False, reason=reason)
    if program.autorestart is False:
        return status, ()
    return halt(program, now, status._replace(after=After.FAIL))


def verdict(program: Program, status: Status) -> str:
    """Return "ok", "starting" or "failing"; "" for one that does not count.

    Those do not count that were stopped on purpose or have ended as they should.
    """
    state = status.state
    if state is State.STOPPED or (state is State.EXITED and status.succeeded):
        return ""
    if state is State.STOPPING:
        return {After.STOP: "", After.FAIL: "failing"}.get(status.after, "starting")
    if state in (State.BACKOFF, State.EXITED, State.FATAL) or status.healthy is False:
        return "failing"
    if state is State.WAITING and status.blocked_as:
        return "failing"
    passes = program.healthcheck is None or status.healthy
    return "ok" if state is State.RUNNING and passes else "starting"


def blocked_by(others: Mapping[str, tuple[Program, Status]]) -> Blocked:
    """Return what a program has to wait for: those of its dependencies not ready."""
    waits, causes = [], []
    for name, (other, status) in others.items():
        if is_ready(other, status):
            continue
        waits_itself = status.state is State.WAITING
        told = f": {status.reason}" if status.reason and not waits_itself else ""
        waits.append(f"{name} ({status.state.value}{told})")
        if has_failed(status) or (waits_itself and status.blocked_as == "failed"):
            causes.append("failed")
        elif verdict(other, status) == "failing":
            causes.append("failing")
    # "failed" comes before "failing", in the alphabet as in weight.
    cause = min(causes, default="")
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
    done, at = [], 0
    while len(data) - at > LINE_LIMIT:
        end = data.rfind(b"\n", at, at + LINE_LIMIT + 1) + 1
        done += [data[at:end]] if end else [data[at : at + LINE_LIMIT], mark]
        at = end or at + LINE_LIMIT
    end = max(data.rfind(b"\n", at) + 1, at)
    return b"".join([*done, data[at:end]]), data[end:]


def log_formatter(
    log_format: str, name: str, stream: str, width: int = 0, colour: int | None = None
) -> Format:
    """Return the function that formats the lines of one stream of one program."""
    if log_format == "json":
        return json_formatter(name, stream)
    label = f"{name:<{width}}"
    prefix = f"{label} | " if colour is None else f"\033[{colour}m{label} |\033[0m "
    start, stamped = prefix.encode(), log_format == "timestamp"

    def format_lines(lines: bytes, now: float) -> bytes:
        head = timestamp(now).encode() + b" " + start if stamped else start
        return head + lines[:-1].replace(b"\n", b"\n" + head) + b"\n"

    return format_lines


def json_formatter(name: str, stream: str) -> Format:
    import json  # only where it is the format

    encode = json.JSONEncoder(ensure_ascii=False).encode

    def format_lines(lines: bytes, now: float) -> bytes:
        fields = {"time": timestamp(now), "program": name, "stream": stream}
        start = encode(fields)[:-1] + ', "message": '
        texts = lines[:-1].decode(errors="replace").split("\n")
        return "".join(f"{start}{encode(text)}}}\n" for text in texts).encode()

    return format_lines


def message_line(
    now: float, name: str, text: str, level: str = "info", as_json: bool = False
) -> bytes:
    """Return one of the supervisor's own messages; `name` is a program's, or ""."""
    line = f"{timestamp(now, 0)} {name or 'supervisors'}: {text}"
    if as_json:
        import json

        fields = {"time": timestamp(now), "level": level, "program": name or None}
        line = json.dumps({**fields, "message": text})
    return f"{line}\n".encode(errors="replace")


class Route(NamedTuple):  # where a stream goes
    target: int | str  # descriptor 1 or 2, or a file
    log_format: str
    direct: bool  # the program gets the descriptor itself


def route(program: Program, stream: str, log_format: str) -> Route:
    """Return where "stdout" or "stderr" goes; `log_format` is that for terminals."""
    path = (program.stderr_logfile if stream == "stderr" else "") or program.logfile
    target: int | str = 1 if stream == "stdout" else 2
    if path:
        target = TERMINALS.get(path) or os.path.abspath(path)
    unlimited = isinstance(target, int) or program.logfile_maxbytes == 0
    chosen = program.log_format or (log_format if isinstance(target, int) else "raw")
    direct = path == NOWHERE or (chosen == "raw" and unlimited)
    return Route(target, chosen, direct)


# === 5. Log files =====================================================================
#
# One thread owns every pipe and every log file, so a slow disk or a stopped terminal
# delays output and nothing else. Other threads hand it jobs.
#
# It reads into one reused buffer, makes a pipe larger that it finds full, and naps
# after a pass that moved little, so that the next one finds more: for lines of 100
# bytes that is fewer wake-ups by a hundred, and a tenth of the CPU.

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
            return [self.items[i][1] for i in range(-missing, 0)], self.end

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


class Output:  # of one program, over all its runs
    def __init__(self, name: str) -> None:
        self.name = name
        self.dropped = 0  # bytes
        # The newest lines by stream, where no file keeps them.
        self.recent: Feed[tuple[str, bytes]] = Feed(REMEMBERED, LAG)


class Sink:
    """Where lines go. `write` returns how many bytes it had to drop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.complained = float("-inf")
        self.error = ""
        self.held = bytearray()  # what nobody takes
        self.maxbytes = self.backups = 0

    def failed(self, error: OSError, count: int) -> int:
        self.error = error.strerror or str(error)
        return count

    def write(self, data: bytes | memoryview) -> int:
        raise NotImplementedError

    def reopen(self) -> None:
        """Let go of the file; the next write opens it anew."""


class FileSink(Sink):
    """A log file, rotated at `maxbytes` on a line boundary; 0 never rotates."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.fd = -1
        self.size = 0
        self.is_regular = False
        self.is_one_line = False  # it holds nothing but one unfinished line

    def write(self, data: bytes | memoryview) -> int:
        data = memoryview(data)
        try:
            self.check()
            while data:
                fits = len(data)
                if self.is_regular and 0 < self.maxbytes < self.size + fits:
                    fits = self.make_room(data)
                data = data[self.put(data[:fits]) :]
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
            self.size = status.st_size  # it may have been truncated (copytruncate)
            if status.st_nlink or not self.is_regular:
                return
            self.reopen()
        self.fd, self.is_regular = open_log(self.name, os.O_RDWR)
        self.size = os.fstat(self.fd).st_size
        self.is_one_line = False

    def make_room(self, data: memoryview) -> int:
        """Return how much of `data` the file takes now, rotated if it takes no line.

        A line that is in the file already moves on with its end, so that none is split.
        """
        room = max(self.maxbytes - self.size, 0)
        fits = bytes(data[:room]).rfind(b"\n") + 1
        start = 0 if fits or self.is_one_line else self.line_start()
        if start:
            tail = memoryview(os.pread(self.fd, self.size - start, start))
            os.ftruncate(self.fd, start)
            self.rotate()
            while tail:
                tail = tail[self.put(tail) :]
            return 0
        end = fits or bytes(data).find(b"\n") + 1
        self.is_one_line = not end
        return end or len(data)

    def line_start(self) -> int:
        """Return where the file's unfinished line begins; its size if it has none."""
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
            newer = f"{self.name}.{number - 1}" if number > 1 else self.name
            with contextlib.suppress(FileNotFoundError):
                os.rename(newer, f"{self.name}.{number}")
        if self.backups:
            self.reopen()
        self.check()

    def reopen(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def open_log(path: str, access: int = os.O_WRONLY) -> tuple[int, bool]:
    """Open a log file to append, and make its folders; return whether it is regular.

    Without O_NONBLOCK the open of a FIFO that nobody reads would hang.
    """
    with contextlib.suppress(FileExistsError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    flags = os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, access | flags, 0o666)
    return fd, stat.S_ISREG(os.fstat(fd).st_mode)


class TerminalSink(Sink):
    """Standard output or error, which may be a terminal or a pipe that nobody reads.

    Its descriptor is shared with the shell and cannot be made non-blocking; so it is
    written to only as much as it certainly takes, and the rest is held.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(f"descriptor {fd}")
        self.fd = fd
        self.capacity = 0  # of a pipe
        self.is_file = False
        with contextlib.suppress(OSError, AttributeError):
            self.is_file = stat.S_ISREG(os.fstat(fd).st_mode)
            self.capacity = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)  # Linux; pipes only
        self.poll = select.poll()
        self.poll.register(fd, select.POLLOUT)

    def write(self, data: bytes | memoryview) -> int:
        """Write what is held, then `data`, as far as it goes; hold the rest."""
        try:
            if self.held:
                del self.held[: self.send(self.held)]
            if not self.held:
                data = data[self.send(data) :]
        except OSError as error:
            lost = len(self.held) + len(data)
            self.held.clear()
            return self.failed(error, lost)
        if (
            len(self.held) > HELD
        ):  # of messages; nothing is read while something is held
            return len(data)
        self.held += data
        return 0

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Write without ever blocking; return how many bytes."""
        done = 0
        with memoryview(data) as view, contextlib.suppress(BlockingIOError):
            while done < len(view) and (room := self.room()):
                done += os.write(self.fd, view[done : done + room])
        return done

    def room(self) -> int:
        """Return how many bytes a write takes for sure.

        All that it holds for a pipe that is empty (FIONREAD); PIPE_BUF for anything
        that poll(2) calls writable.
        """
        if self.is_file:
            return BUFFER
        if self.capacity:
            import termios

            if not any(fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4))):
                return self.capacity
        return select.PIPE_BUF if self.poll.poll(0) else 0


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
        self.fd, self.sink, self.output, self.recent = fd, sink, output, recent
        self.stream, self.format_lines = stream, format_lines
        self.whole_lines = whole_lines  # others write to the same place
        self.partial = b""
        self.capacity = PIPE

    def read(self, buffer: bytearray) -> int:
        """Move once what is there; return the bytes, -1 at the end of the pipe."""
        try:
            count = os.readv(self.fd, [buffer])
        except BlockingIOError:
            return 0
        if self.capacity <= count < BUFFER:
            self.capacity = BUFFER
            # The user's share of pipe memory may be used up; and this is Linux only.
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, BUFFER)
        with memoryview(buffer) as view:
            self.take(view[:count])
        return count or -1

    def take(self, data: memoryview) -> None:
        if self.format_lines is None and not self.whole_lines:
            self.emit(data)
            return
        mark = b"\n" if self.format_lines else b""
        lines, self.partial = cut_lines(self.partial + bytes(data), mark)
        self.emit(lines)

    def finish(self) -> None:
        """Keep a last line that has no end."""
        if self.partial:
            self.emit(self.partial + b"\n")
        self.partial = b""

    def emit(self, lines: bytes | memoryview) -> None:
        if not lines:
            return
        if self.recent is not None:
            self.recent.append((self.stream, bytes(lines)), len(lines))
        if self.format_lines:
            lines = self.format_lines(bytes(lines), time.time())
        self.output.dropped += self.sink.write(lines)


class LogThread:
    """The thread that owns pipes and log files. Public methods: any thread."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.jobs: deque[Callable[[], object]] = deque()
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.wake_read, selectors.EVENT_READ, self.wake_up)
        self.buffer = bytearray(BUFFER)
        self.sinks: dict[int | str, Sink] = {2: TerminalSink(2)}
        self.paused: set[Sink] = set()  # that hold something: nothing is read for them
        self.sources: set[Source] = set()
        self.closing = float("inf")
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    def post(self, job: Callable[[], object]) -> None:
        """Have the thread do something, in the order of the calls."""
        self.jobs.append(job)
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: too late
            os.write(self.wake_write, b"\0")

    def say(self, name: str, text: str, level: str = "info") -> None:
        """Write one of the supervisor's own messages to standard error."""
        line = message_line(time.time(), name, text, level, self.as_json)
        self.post(functools.partial(self.write, self.sinks[2], line))

    def reopen(self) -> None:
        """Have every log file reopened, as after a rotation by somebody else."""
        for sink in list(self.sinks.values()):
            self.post(sink.reopen)

    def close(self) -> None:
        """Write what there still is, for a second at most, and end the thread."""
        self.post(self.begin_closing)
        self.thread.join(2 * FAREWELL)

    # In this thread

    def write(self, sink: Sink, data: bytes = b"") -> int:
        sink.write(data)
        self.look_after(sink)
        return 0

    def begin_closing(self) -> None:
        self.closing = time.monotonic() + FAREWELL

    def add(self, source: Source) -> None:
        """Read a pipe from now on."""
        self.sources.add(source)
        if source.sink not in self.paused:
            job = functools.partial(self.move, source)
            self.selector.register(source.fd, selectors.EVENT_READ, job)

    def sink(self, target: int | str, maxbytes: int = 0, backups: int = 0) -> Sink:
        """Return the sink of a target, with these limits from now on."""
        sink = self.sinks.get(target)
        if sink is None:
            sink = TerminalSink(target) if isinstance(target, int) else FileSink(target)
            self.sinks[target] = sink
        sink.maxbytes, sink.backups = maxbytes, backups
        return sink

    def run(self) -> None:
        # All signals are the main thread's; and a terminal with `tostop` stops a
        # background writer unless SIGTTOU is blocked (tty_ioctl(4)).
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self.closing == float("inf"):
            if 0 < self.turn(None) < LITTLE:
                time.sleep(NAP)
        self.drain()
        for source in list(self.sources):
            self.drop(source)
        self.drain()
        for sink in self.sinks.values():
            sink.reopen()
        self.selector.close()
        os.close(self.wake_read)
        os.close(self.wake_write)

    def drain(self) -> None:
        """Move what there is, until nothing is left or held, or time is over."""
        while time.monotonic() < self.closing:
            if not self.turn(NAP if self.paused else 0) and not self.paused:
                return

    def turn(self, timeout: float | None) -> int:
        """Do what is to be done now; return the bytes that were read."""
        moved: int = sum(key.data() for key, _ in self.selector.select(timeout))
        while self.jobs:
            self.jobs.popleft()()
        return moved

    def wake_up(self) -> int:
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_read, 4096)
        return 0

    def move(self, source: Source) -> int:
        """Read a pipe once, unless its sink has just begun to hold something."""
        count = 0 if source.sink.held else source.read(self.buffer)
        if count < 0:
            self.drop(source)
        self.look_after(source.sink)
        return max(count, 0)

    def drop(self, source: Source) -> None:
        """Forget a pipe that has ended, but not a last line without end."""
        source.finish()
        self.sources.discard(source)
        if source.sink not in self.paused:
            self.selector.unregister(source.fd)
        os.close(source.fd)
        self.look_after(source.sink)

    def look_after(self, sink: Sink) -> None:
        """Say that a sink fails; read no more for one that holds bytes, or again."""
        now = time.monotonic() if sink.error else 0.0
        if sink.error and now >= sink.complained + SAY_AGAIN:
            sink.complained = now
            text = f"cannot write to {sink.name}: {sink.error}; dropping"
            self.say("", text, "warning")
        sink.error = ""
        holds = bool(sink.held)
        if not isinstance(sink, TerminalSink) or holds == (sink in self.paused):
            return
        mine = [source for source in self.sources if source.sink is sink]
        if holds:
            job = functools.partial(self.write, sink)
            self.selector.register(sink.fd, selectors.EVENT_WRITE, job)
            self.paused.add(sink)
            for source in mine:
                self.selector.unregister(source.fd)
        else:
            self.selector.unregister(sink.fd)
            self.paused.discard(sink)
            for source in mine:
                self.add(source)


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
ENV_ENTRY = re.compile(  # a line, or more where quotes span them; all of it optional
    r"""[ \t]*(?:(?:export[ \t]+)?([A-Za-z_][\w.-]*)[ \t]*=[ \t]*
        (?:"((?:[^"\\]|\\[\s\S])*)"|'([^']*)'
        |((?!["'])(?:[^ \t\n#]|(?<![ \t])\#|[ \t]+(?![ \t]|\#|$))*)))?
        [ \t]*(?:\#.*)?$""",
    re.VERBOSE | re.MULTILINE,
)
# Limits and niceness have no Popen argument, and need root's rights where the program
# gives them up; preexec_fn is unsafe with threads. So a small interpreter stands in
# between for the programs that set them. It reports on a pipe that exec closes.
TRAMPOLINE = """
import os, resource, signal, sys, warnings  # all before the user is switched
fd, limits, nice, switch, coerced = eval(sys.argv[1])
argv, code = sys.argv[2:], 126
try:
    for name, limit in limits.items():
        doing = "set the limit " + name
        limit = resource.RLIM_INFINITY if limit < 0 else limit
        resource.setrlimit(getattr(resource, "RLIMIT_" + name.upper()), (limit, limit))
    if nice is not None:
        doing = "set nice %d" % nice
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    if switch:
        doing = "switch to user %d" % switch[0]
        os.setgroups(switch[2])
        os.setgid(switch[1])
        os.setuid(switch[0])
    doing = "execute %r" % argv[0]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if coerced:
        os.environ.pop("LC_CTYPE", None)
    os.execvp(argv[0], argv)
except FileNotFoundError:
    code, reason = 127, "no such command: %r" % argv[0]
except (OSError, ValueError) as error:
    reason = "cannot %s: %s" % (doing, getattr(error, "strerror", None) or error)
os.write(fd, ("%d %s" % (code, reason)).encode(errors="replace"))
os._exit(code)
"""


class SpawnError(Exception):
    """A program cannot be executed; `code` is 127 for a missing command, else 126."""

    def __init__(self, reason: str, code: int = 126) -> None:
        super().__init__(reason)
        self.reason, self.code = reason, code


class Account(NamedTuple):  # who a program runs as
    uid: int
    gid: int
    groups: list[int]
    variables: dict[str, str]


def find_account(program: Program) -> Account | None:
    """Return the account of `user` and `group`, None where neither is set.

    Raises SpawnError: then it does not start, rather than as somebody else.
    """
    if program.user is None and program.group_name is None:
        return None
    import grp  # these two only where somebody is named
    import pwd

    uid, gid, groups, variables = os.geteuid(), os.getegid(), os.getgroups(), {}
    user, group = str(program.user), str(program.group_name)
    entry = None
    with contextlib.suppress(KeyError):
        if program.user is not None:
            entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    if entry:
        uid, gid, home = entry.pw_uid, entry.pw_gid, entry.pw_dir
        groups = os.getgrouplist(entry.pw_name, gid)
        variables = {"USER": entry.pw_name, "LOGNAME": entry.pw_name, "HOME": home}
        variables["SHELL"] = entry.pw_shell or "/bin/sh"
    elif user.isdecimal():  # a number without an entry, as images without users have
        uid = gid = int(user)
        groups, variables = [], {"HOME": "/"}
    elif program.user is not None:
        raise SpawnError(f"no such user: {user!r}")
    if program.group_name is not None:
        try:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise SpawnError(f"no such group: {group!r}") from None
        groups = [gid, *(one for one in groups if one != gid)]
    return Account(uid, gid, groups, variables)


def parse_env_file(text: str, path: str) -> dict[str, str]:
    """Return the variables of `KEY=VALUE` lines, quoted as in Compose.

    Nothing is expanded. Raises SpawnError with file and line.
    """
    variables, at, escapes = {}, 0, {"n": "\n", "t": "\t", "r": "\r"}
    while at < len(text):
        match = ENV_ENTRY.match(text, at)
        if not match:
            number = text.count("\n", 0, at) + 1
            raise SpawnError(f"{path}:{number}: expected KEY=VALUE")
        at = match.end() + 1
        name, double, single, bare = match.groups()
        if double is not None:
            double = re.sub(r"\\([\s\S])", lambda m: escapes.get(m[1], m[1]), double)
        if name:
            variables[name] = double or single or bare or ""
    return variables


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
    """Return the environment of a program; `files` is what `read_env_files` gave."""
    chosen, environ = program.inherit_env, dict(base)
    if chosen is not True:
        inherited = {name: base[name] for name in chosen or () if name in base}
        environ = {"PATH": os.defpath, **inherited}
    for name in (*OWN_VARIABLES, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    environ |= account.variables if account else {}
    for path, text in zip(program.env_file, files.split("\0")):
        environ |= parse_env_file(text, path)
    own = {
        "SUPERVISOR_ENABLED": "1",
        "SUPERVISOR_PROCESS_NAME": program.name,
        "SUPERVISOR_GROUP_NAME": program.group,
        "PROCESS_NUM": str(program.number),
    }
    return {**environ, **program.environment, **own, **extra}


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
        if self.raised:
            with contextlib.suppress(OSError):
                high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self.soft)
                os.close(fd)
                return high
        return fd


class Child(NamedTuple):
    pid: int
    report: int | None  # the trampoline's pipe


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
    command, report = argv, tuple[int, ...]()
    if account and os.geteuid() != 0:
        if (account.uid, account.gid) != (os.geteuid(), os.getegid()):
            who = program.user if program.user is not None else program.group_name
            raise SpawnError(f"cannot switch to {who!r}: not root")
        account = None
    if program.rlimits or program.nice is not None:
        report, coerced = os.pipe(), "LC_CTYPE" not in environ
        limits, switch = dict(program.rlimits), account and account[:3]
        orders = repr((report[1], limits, program.nice, switch, coerced))
        command = (sys.executable, "-I", "-S", "-c", TRAMPOLINE, orders, *argv)
        account = None
    limit.set(limit.soft)
    try:
        popen = subprocess.Popen(
            command,
            stdin=files[0],
            stdout=files[1],
            stderr=files[2],
            env=environ,
            cwd=program.directory,
            umask=-1 if program.umask is None else program.umask,
            user=account and account.uid,
            group=account and account.gid,
            extra_groups=account and account.groups,
            start_new_session=True,
            # All our descriptors are close-on-exec; to close them one by one costs more
            # the more programs there are.
            close_fds=bool(report),
            pass_fds=report[1:],
        )
    except OSError as error:
        if report:
            os.close(report[0])
        raise spawn_error(program, command, error) from None
    finally:
        limit.set(limit.most)
        if report:
            os.close(report[1])
    popen.returncode = 0  # it is reaped elsewhere; keep its destructor from waiting
    return Child(popen.pid, report[0] if report else None)


def spawn_error(program: Program, argv: tuple[str, ...], error: OSError) -> SpawnError:
    """Return what is wrong, told apart as exec(2) and chdir(2) fail alike."""
    folder = program.directory
    if folder and not os.path.isdir(folder):
        return SpawnError(f"no such directory: {folder!r}")
    if folder and error.filename == folder:
        return SpawnError(f"cannot enter {folder!r}: {error.strerror}")
    if isinstance(error, FileNotFoundError):
        return SpawnError(f"no such command: {argv[0]!r}", 127)
    if error.errno == errno.EPERM and (program.user, program.group_name) != (
        None,
        None,
    ):
        who = program.user if program.user is not None else program.group_name
        return SpawnError(f"cannot switch to {who!r}: {error.strerror}")
    return SpawnError(f"cannot execute {argv[0]!r}: {error.strerror}")


def proc_file(pid: int, name: str) -> bytes:
    """Return a file of /proc/PID; nothing if it is gone or we may not."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def start_time(pid: int) -> str:
    """Return when a process started, in ticks since boot; "" if it is gone."""
    fields = proc_file(pid, "stat").rpartition(b")")[2].split()
    return "" if not fields or fields[0] in (b"Z", b"X") else fields[19].decode()


def path_hash(path: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of a path."""
    # hashlib, the public way, loads OpenSSL: 3.6 MB, for one hash. 3.12 has _sha2.
    for module in ("_sha2", "_sha256", "hashlib"):
        with contextlib.suppress(ImportError):
            sha256 = __import__(module).sha256
            break
    return str(sha256(os.fsencode(path)).hexdigest()[:16])


def find_leftovers(digest: str) -> dict[int, str]:
    """Return what dead supervisors of this configuration left running: names by pid.

    Never ourselves or our ancestors, whose shell may stem from such a program; never
    another PID namespace's, where numbers mean something else (Linux).
    """
    table, pid = process_table(), os.getpid()
    spared, found = set(), {}
    while pid in table:
        spared.add(pid)
        pid = int(table[pid][1])
    for pid in table.keys() - spared:
        entries = os.fsdecode(proc_file(pid, "environ")).split("\0")
        variables = dict(entry.partition("=")[::2] for entry in entries)
        run, _, started = variables.get(RUN_VARIABLE, "").rpartition(".")
        owner, _, supervisor = run.rpartition(".")
        if owner != digest or not supervisor.isdecimal():
            continue
        over = start_time(int(supervisor)) != started
        with contextlib.suppress(OSError):  # it is gone, or not for us to look at
            if over and os.path.samefile(f"/proc/{pid}/ns/pid", "/proc/self/ns/pid"):
                found[pid] = variables.get("SUPERVISOR_PROCESS_NAME", "")
    return found


# === 7. Health ========================================================================
#
# A check never delays the loop: a command is a child like any other, http and tcp run
# in a thread that ends by itself. Whoever is too slow is given up at `timeout`.
#
# A notify program speaks through a datagram socket (sd_notify(3)), one for all, in the
# abstract namespace: no folder needs to be writable. The kernel says who sent a message
# (SCM_CREDENTIALS, unix(7)).

FIRST_INTERVAL = 1.0  # seconds between checks until one has passed
SO_PASSCRED, SCM_CREDENTIALS = 16, 2  # unix(7)


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
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        self.socket.bind(
            ""
        )  # the kernel finds a free abstract name (unix(7), autobind)
        self.address = "@" + str(self.socket.getsockname().decode()).lstrip("\0")

    def receive(self) -> tuple[int, list[str]] | None:
        """Return the sender's pid and the lines of one message; None without one."""
        space = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4 * 253)
        try:
            data, ancillary, _, _ = self.socket.recvmsg(65536, space)
        except OSError:
            return None
        pid = 0
        for _, kind, content in ancillary:
            numbers = memoryview(content[: len(content) // 4 * 4]).cast("i")
            if kind == SCM_CREDENTIALS:
                pid = numbers[0]
            elif kind == socket.SCM_RIGHTS:  # with BARRIER=1, which waits for the close
                for fd in numbers:
                    os.close(fd)
        return pid, data.decode(errors="replace").split("\n")


def tell_manager(message: str) -> None:
    """Tell who runs us, where it listens (systemd's Type=notify)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    speaker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with contextlib.suppress(OSError), speaker:
        speaker.setblocking(False)
        speaker.connect("\0" + path[1:] if path[0] == "@" else path)
        speaker.send(message.encode())


# === 8. HTTP ==========================================================================
#
# A request is answered in a thread of its own by a function of a fixed table. It reads
# published snapshots; what changes something is done by the main thread, on request.
# Sockets are bound at start; http.server is imported with the first connection, since
# it costs 15 ms and 8 MB. (ThreadingHTTPServer would bind and poll by itself.)

REQUEST_TIME = 5.0  # seconds for a client to send a request, or to take an answer
MOST_CONNECTIONS = 64
MOST_STREAMS = 32  # of those; the others are for probes
MOST_HEAD = 96 * 1024  # bytes of request line and headers
MOST_BODY = 64 * 1024  # bytes
MOST_WAIT = 300.0  # seconds
MOST_EVENTS = 1000  # that a client may be behind
COMMENT_INTERVAL = 15.0  # seconds between signs of life on /events
LOOK_INTERVAL = 1.0  # seconds between two looks whether a follower is still there
FILE_INTERVAL = 0.05  # seconds between two looks at a log file that is followed
PLAIN = "text/plain; charset=utf-8"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
)
PAGE = r"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>supervisors</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>
:root{--bg:#fbfbfc; --fg:#1c2128; --dim:#626c79; --line:#e0e3e8; --soft:#f1f3f6;
  --good:#17763d; --busy:#8a5700; --bad:#c02429}
@media (prefers-color-scheme: dark){:root{--bg:#111418; --fg:#dde2e8; --dim:#929dab;
  --line:#2a3039; --soft:#191e24; --good:#4cc07c; --busy:#dba53c; --bad:#ff7b78}}
*{box-sizing:border-box} [hidden], p:empty{display:none !important}
html:has(#log:not([hidden])){scroll-padding-bottom:50vh} body{max-width:1400px;
  margin:auto; padding:0 24px; color:var(--fg); background:var(--bg);
  font:14px/20px system-ui, sans-serif; font-variant-numeric:tabular-nums}
header, form, #log div{display:flex; flex-wrap:wrap; gap:8px; align-items:center}
header{min-height:60px; padding:14px 0; gap:8px 16px; background:var(--bg)}
.gone header, #error{position:sticky; top:0; z-index:1} .gone main{opacity:.6}
form, #log-close{margin-left:auto} small{margin-left:8px; font-weight:400}
h1, h2, small{margin-block:0; font-size:14px} .number{text-align:right}
small, label, thead, .off, .detail, [data-label]::before{color:var(--dim)}
.good{color:var(--good)} .busy{color:var(--busy)} .bad{color:var(--bad)}
.dot::before{content:""; display:inline-block; width:.6em; height:.6em;
  margin-right:.5em; border-radius:50%; background:currentColor}
#health{margin:8px 0 16px; font-size:20px; line-height:28px; font-weight:600}
#error{padding:8px 12px; border-left:3px solid; background:var(--soft)}
table{width:100%; margin-bottom:32px; border-spacing:0}
th, td{padding:5px 24px 5px 0; border-bottom:1px solid var(--line); text-align:left;
  vertical-align:baseline; white-space:nowrap}
thead th, .state, [data-label]::before{font-size:12px; font-weight:500}
tbody th, .detail{min-width:160px; white-space:normal} .detail{width:100%}
p, pre, tbody th, .detail{overflow-wrap:anywhere}
.verbs{display:none; padding-right:0} .may .verbs{display:table-cell}
button, input{padding:2px 9px; border:1px solid var(--line); border-radius:6px;
  background:none; color:inherit; font:13px/18px system-ui, sans-serif}
button:disabled{opacity:.4} :focus-visible{outline:2px solid #4a86e8}
#log{position:sticky; bottom:0; padding:10px 0 16px; background:var(--bg);
  border-top:1px solid var(--line)}
pre{height:36vh; margin:10px 0 0; padding:10px 12px; overflow:auto;
  background:var(--soft); font:12px/18px monospace; white-space:pre-wrap}
@media (max-width: 1000px){ body{padding:0 16px} form{width:100%} thead{display:none}
  button, input{padding-block:6px} input, .verbs button{flex:1} table{display:block}
  tbody{display:grid; gap:0 32px;
    grid-template-columns:repeat(auto-fill, minmax(min(100%, 340px), 1fr))}
  tr{display:grid; grid-template-columns:3fr 4fr 3fr 3fr; gap:8px 12px;
    align-content:start; padding:14px 0; border-top:1px solid var(--line)}
  tr > *{padding:0; border:0} tr > .number{text-align:left} tr > th{grid-column:span 3}
  tr > :nth-child(n+7){grid-column:1 / -1} .detail:empty{display:none}
  td[data-label]::before{content:attr(data-label); display:block}
  .may .verbs{display:flex; gap:8px} }
</style>
<header><h1>supervisors<small id="host"></small></h1>
  <span id="connection" class="dot off" role="status">Connecting</span>
  <form id="unlock"><label for="token">Token</label><input id="token" type="password"
    autocomplete="off"><button>Unlock</button></form></header>
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
const put = (node, text) => { if (node.textContent !== text) node.textContent = text };
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
    : s.restart_in > 0 ? `in ${Math.max(0, Math.ceil(s.restart_in - age))} s` : '–';
  const health = !s.running || s.state === 'STOPPING' ? '–' : s.healthy ? 'healthy'
    : s.healthy === false ? 'unhealthy' : s.ready ? '–' : 'not ready';
  const why = [s.status_text, s.reason || !s.running && s.description].filter(Boolean);
  [s.name, s.state, `${s.pid ?? '–'}`, uptime, `${s.restarts}`, health, why.join(' · ')]
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
  const [bad, busy] = ['bad', 'busy'].map(word => all.filter(s => kind(s) === word));
  const [worst, word] = bad.length ? [bad, 'failing'] : [busy, 'not ready'];
  const names = worst.slice(0, 6).map(s => s.name).join(', ');
  const [summary, count] = $('#health').children;
  put(summary, names ? `${worst.length} ${word}: ${names}` : 'All well');
  put(count, `${all.filter(s => s.running).length} of ${all.length} alive`);
  summary.className = `dot ${bad.length ? 'bad' : names ? 'busy' : 'good'}`;
  document.title = `${live ? summary.textContent : 'Gone'} · supervisors`;
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
  on('removed', ({name}) => {
    programs.get(name)?.row.remove(); programs.delete(name);
  });
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
  const answer = await fetch(`programs/${encodeURIComponent(name)}/${rest}`,
    {method, signal, headers: {Authorization: `Bearer ${sessionStorage.token}`}});
  if (answer.ok) return answer;
  const {error = `HTTP ${answer.status}`} = await answer.json().catch(() => ({}));
  if (answer.status === 401) setControl(false);
  throw Error(error, {cause: answer.status});
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
      pre.append(part.value.replace(/\x1b\[[0-9;?]*[@-~]/g, '').slice(-LOG_LIMIT));
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
    log_format: str = "prefix"  # of the terminal
    started_at: float | None = None  # Unix time of the last start
    changed_at: float | None = None  # Unix time of the last change of state

    @property
    def ready(self) -> bool:
        return is_ready(self.program, self.status)


def status_object(snapshot: Snapshot, now: float) -> dict[str, Any]:
    """Return a program's status as JSON has it; never its arguments or environment."""
    program, status, output, _, started_at, _ = snapshot
    number, due = status.exit_signal, status.deadline
    backoff = due is not None and status.state is State.BACKOFF
    return {
        "name": program.name,
        "group": program.group,
        "running": status.is_alive,
        "state": status.state.value,
        "ready": snapshot.ready,
        "healthy": status.healthy,
        "pid": status.pid,
        "uptime": round(now - status.started, 3) if status.is_alive else None,
        "started_at": timestamp(started_at) if started_at else None,
        "restarts": status.restarts,
        "failures": status.failures,
        "exit_code": status.exit_code,
        "exit_signal": None if number is None else signal_name(number),
        "reason": status.reason,
        "status_text": status.status_text,
        "restart_in": round(max((due or now) - now, 0), 3) if backoff else None,
        "log_dropped_bytes": output.dropped,
        "description": describe(snapshot, now),
    }


def describe(snapshot: Snapshot, now: float) -> str:
    """Return the last column of supervisorctl's status."""
    status = snapshot.status
    words = [status.reason]
    if status.state is State.RUNNING:
        minutes, seconds = divmod(int(now - status.started), 60)
        days, hours = divmod(minutes // 60, 24)
        spent = f"{days} day{'s' * (days != 1)}, " * bool(days)
        clock = f"{hours}:{minutes % 60:02}:{seconds:02}"
        words[:0] = [f"pid {status.pid}, uptime {spent}{clock}", status.status_text]
    elif status.state in (State.STOPPED, State.EXITED):
        when = snapshot.changed_at
        moment = time.strftime("%b %d %I:%M %p", time.localtime(when))
        words.insert(0, moment if when else "Not started")
    return ", ".join(filter(None, words))


def outcome(verb: str, snapshot: Snapshot) -> bool | None:
    """Return whether an order has been carried out; None while that is open."""
    state = snapshot.status.state
    if verb == "stop":
        return None if state is State.WAITING or snapshot.status.is_alive else True
    if snapshot.ready or (state is State.EXITED and snapshot.status.succeeded):
        return True
    ended = (State.BACKOFF, State.EXITED, State.FATAL, State.STOPPED)
    return False if state in ended else None


class Listener(NamedTuple):
    """A bound socket; over `is_control` everything is allowed."""

    socket: socket.socket
    address: Address
    is_control: bool


class Request(NamedTuple):
    query: Mapping[str, str]
    headers: Mapping[str, str]
    targets: list[Snapshot]  # of the NAME in the path
    several: bool  # NAME asks for an array


class Response(NamedTuple):
    body: bytes | Iterator[bytes]  # a stream, in which b"" is a moment to look around
    status: int = 200
    kind: str = PLAIN
    headers: tuple[tuple[str, str], ...] = ()


class HttpError(Exception):
    def __init__(self, status: int, error: str, **headers: str) -> None:
        self.status, self.content = status, {"error": error}
        self.headers = tuple((key.replace("_", "-"), headers[key]) for key in headers)


def as_json(content: object, status: int = 200, *headers: tuple[str, str]) -> Response:
    import json  # with the first answer

    return Response(json.dumps(content).encode(), status, "application/json", headers)


def objects(
    request: Request, snapshots: Iterable[Snapshot], status: int = 200
) -> Response:
    """Answer status objects: an array, or one where one program was named."""
    now = time.monotonic()
    found = [status_object(one, now) for one in snapshots]
    several = request.several or not request.targets
    return as_json(found if several else found[0], status)


def select_programs(
    snapshots: Mapping[str, Snapshot], name: str
) -> tuple[list[Snapshot], bool]:
    """Return the programs that a NAME means, and whether it may mean several.

    A program, a group, a glob, `all`, or such joined by commas. Raises HttpError 404.
    """
    if name in snapshots:
        return [snapshots[name]], False
    import fnmatch  # only for names that are no program's

    found: dict[str, Snapshot] = {}
    for word in name.split(","):
        glob = "*" if word == "all" else word
        matches = [
            one
            for key, one in snapshots.items()
            if one.program.group == word or fnmatch.fnmatchcase(key, glob)
        ]
        if not matches:
            raise HttpError(404, f"no program {word!r}{hint(word, snapshots)}")
        found |= {one.program.name: one for one in matches}
    return list(found.values()), True


def get_page(supervisor: Supervisor, request: Request) -> Response:
    if "text/html" not in request.headers.get("Accept", ""):
        return Response(b"Supervisor Running. Check /status")
    headers = (("Content-Security-Policy", POLICY), ("X-Frame-Options", "DENY"))
    return Response(PAGE.encode(), 200, "text/html; charset=utf-8", headers)


def get_health(supervisor: Supervisor, request: Request) -> Response:
    """Answer how all that is wanted is, or the programs that were named."""
    verdicts, reasons = {"ok"}, {}
    for snapshot in request.targets or list(supervisor.snapshots.values()):
        program, status = snapshot.program, snapshot.status
        found = verdict(program, status)
        if found == "ok" or not (found or request.targets):
            continue
        reasons[program.name] = ", ".join(
            filter(None, (status.state.value, status.reason))
        )
        ended_well = status.state is State.EXITED and status.succeeded
        verdicts.add(found or ("ok" if ended_well else "failing"))
    worst = next(word for word in ("failing", "starting", "ok") if word in verdicts)
    return as_json(
        {"status": worst, "programs": reasons}, 200 if worst == "ok" else 503
    )


def get_live(supervisor: Supervisor, request: Request) -> Response:
    supervisor.ask(lambda: None)
    return as_json({"status": "ok"})


def get_status(supervisor: Supervisor, request: Request) -> Response:
    return objects(request, request.targets or list(supervisor.snapshots.values()))


def last_code(status: Status) -> int | None:
    return status.exit_code if status.exit_signal is None else 128 + status.exit_signal


METRICS: tuple[tuple[str, str, Callable[[Snapshot, float], float | None]], ...] = (
    ("up", "1 while alive", lambda one, now: one.status.is_alive),
    ("ready", "1 while ready", lambda one, now: one.ready),
    ("uptime_seconds", "seconds since its start",
     lambda one, now: one.status.is_alive and now - one.status.started),
    ("restarts_total", "automatic restarts", lambda one, now: one.status.restarts),
    ("exit_code", "last exit code, 128+N for a signal",
     lambda one, now: last_code(one.status)),
    ("log_dropped_bytes_total", "output that could not be written",
     lambda one, now: one.output.dropped),
)  # fmt: skip


def get_metrics(supervisor: Supervisor, request: Request) -> Response:
    """Answer in Prometheus' text format 0.0.4."""
    snapshots, now = list(supervisor.snapshots.values()), time.monotonic()
    lines: list[str] = []

    def family(name: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
        kind = "counter" if name.endswith("_total") else "gauge"
        lines.append(
            f"# HELP supervisors_{name} {text}\n# TYPE supervisors_{name} {kind}"
        )
        lines.extend(
            f"supervisors_{name}{labels} {value:.15g}" for labels, value in samples
        )

    labels = [
        f'{{name="{one.program.name}",group="{one.program.group}"' for one in snapshots
    ]
    family("info", "version", [(f'{{version="{__version__}"}}', 1)])
    family("start_time_seconds", "start, Unix time", [("", supervisor.started_at)])
    for name, text, value in METRICS:
        pairs = [
            (label + "}", value(one, now)) for label, one in zip(labels, snapshots)
        ]
        samples = [(label, number) for label, number in pairs if number is not None]
        family(f"program_{name}", text, samples)
    states = [
        (f'{label},state="{state.value}"}}', one.status.state is state)
        for label, one in zip(labels, snapshots)
        for state in State
    ]
    family("program_state", "1 for the present state", states)
    text = "\n".join([*lines, ""])
    return Response(text.encode(), kind="text/plain; version=0.0.4; charset=utf-8")


def get_events(supervisor: Supervisor, request: Request) -> Response:
    return Response(stream_events(supervisor), kind="text/event-stream")


def stream_events(supervisor: Supervisor) -> Iterator[bytes]:
    """Yield every change of state as server-sent events, a snapshot of all first."""
    import json

    feed = supervisor.events
    with feed.followed():
        at, spoke = feed.end, time.monotonic()
        all_of_them: Any = [
            status_object(one, spoke) for one in supervisor.snapshots.values()
        ]
        events = [("snapshot", all_of_them)]
        while events or not feed.closed:
            for kind, content in events:
                yield f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode()
            items, at = feed.read(at, LOOK_INTERVAL)
            now = time.monotonic()
            if items:
                spoke = now
            elif now >= spoke + COMMENT_INTERVAL:
                spoke = now
                yield b": still here\n\n"
            yield b""
            events = [
                ("removed", {"name": one})
                if isinstance(one, str)
                else ("state", status_object(one, now))
                for one in items
            ]


def get_logs(supervisor: Supervisor, request: Request) -> Response:
    """Answer the newest lines of one program, and go on with `follow`."""
    snapshot = request.targets[0]
    program, recent = snapshot.program, snapshot.output.recent
    lines = int(number_of(request, "lines", 100, 1e9))
    follow = word_of(request, "follow", "0", "1") == "1"
    if lines == 0 and not follow:
        return Response(b"")  # how a page asks whether its token is right
    if len(request.targets) != 1:
        raise HttpError(400, "expected one program, not several")
    stream = word_of(request, "stream", "", "stdout", "stderr")
    both = [route(program, one, snapshot.log_format) for one in ("stdout", "stderr")]
    if stream and isinstance(both[0].target, str) and both[0].target == both[1].target:
        raise HttpError(400, f"both streams of {program.name} share one file")
    target, _, direct = both[stream == "stderr"]
    gone = functools.partial(supervisor.is_gone, program.name)
    if isinstance(target, str) and target != NOWHERE:
        paths = [f"{target}.{n}" for n in range(program.logfile_backups, 0, -1)]
        return Response(file_log([*paths, target], lines, follow, gone))
    if direct:
        raise HttpError(
            409, f"{program.name} has a descriptor of its own, not seen here"
        )
    return Response(memory_log(recent, stream, lines, follow, gone))


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


def word_of(request: Request, key: str, *words: str) -> str:
    word = request.query.get(key, words[0])
    if word not in words:
        raise HttpError(400, f"{key}: expected one of {words}, got {word!r}")
    return word


def memory_log(
    feed: Feed[tuple[str, bytes]],
    stream: str,
    lines: int,
    follow: bool,
    gone: Callable[[], bool],
) -> Iterator[bytes]:
    with feed.followed():
        items, at = feed.newest()
        text = b"".join(data for name, data in items if stream in ("", name))
        newest = text.splitlines(keepends=True)
        yield b"".join(newest[max(len(newest) - lines, 0) :])
        while follow:
            over = gone()
            items, at = feed.read(at, 0 if over else LOOK_INTERVAL)
            yield b"".join(data for name, data in items if stream in ("", name))
            if over:
                return


def file_log(
    paths: list[str], lines: int, follow: bool, gone: Callable[[], bool]
) -> Iterator[bytes]:
    """Yield the last lines of a log and its backups, the newest path last; then follow.

    What has been rotated meanwhile is found again by its inode, and read to its end.
    """
    with contextlib.ExitStack() as stack:
        files: list[tuple[int, int]] = []  # descriptors and offsets, the oldest first
        for path in reversed(paths):
            if lines > 0 or not files:
                with contextlib.suppress(OSError):
                    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                    stack.callback(os.close, fd)
                    start, found = tail_start(fd, lines)
                    files.insert(0, (fd, start))
                    lines -= found
        fd, at = -1, 0
        while True:
            over = not follow or gone()
            if files:
                fd, at = files.pop(0)
            while fd >= 0 and (chunk := os.pread(fd, PIPE, at)):
                at += len(chunk)
                yield chunk
            newer = None if files else next_file(fd, paths)
            if newer is not None and (fd < 0 or os.fstat(fd).st_size <= at):
                stack.callback(os.close, newer)
                files.append((newer, 0))
            elif not files:
                if over:
                    return
                time.sleep(FILE_INTERVAL)
                yield b""


def next_file(fd: int, paths: list[str]) -> int | None:
    """Return the file that came after `fd`, opened; None if there is none yet."""
    known = [path for path in paths if os.path.exists(path)]
    with contextlib.suppress(OSError):
        here = [
            fd >= 0 and os.path.samestat(os.stat(one), os.fstat(fd)) for one in known
        ]
        if known and not here[-1]:
            after = here.index(True) + 1 if True in here else -1
            return os.open(known[after], os.O_RDONLY | os.O_NONBLOCK)
    return None


def tail_start(fd: int, lines: int) -> tuple[int, int]:
    """Return where the last `lines` lines of a file begin, and how many those are."""
    end = size = os.fstat(fd).st_size
    found = 0
    while end > 0 and lines > 0:
        start = max(end - PIPE, 0)
        chunk = os.pread(fd, end - start, start)
        at = len(chunk) - (end == size)  # the end of the last line begins no other
        while (at := chunk.rfind(b"\n", 0, at)) >= 0:
            found += 1
            if found == lines:
                return start + at + 1, found
        end = start
    return end, found + (size > 0)


def post_verb(verb: str, supervisor: Supervisor, request: Request) -> Response:
    """Start, stop or restart; answer at the outcome of all, or after `wait` seconds."""
    wait = number_of(request, "wait", 0, MOST_WAIT)
    names = [one.program.name for one in request.targets]
    feed, end = supervisor.events, time.monotonic() + wait
    with feed.followed():
        at, found = supervisor.ask(lambda: supervisor.order(verb, names))
        undecided = {name for name, one in found.items() if outcome(verb, one) is None}
        while undecided and not feed.closed and (left := end - time.monotonic()) > 0:
            try:
                items, at = feed.read(at, left)
            except Lagged:
                at = feed.end
                items = list(supervisor.snapshots.values())
            for item in items:
                name = item if isinstance(item, str) else item.program.name
                if name in undecided and not isinstance(item, str):
                    found[name] = item
                if isinstance(item, str) or outcome(verb, item) is not None:
                    undecided.discard(name)
    return objects(request, found.values(), 202 if undecided or not wait else 200)


def post_signal(supervisor: Supervisor, request: Request) -> Response:
    name = request.query.get("signal", "")
    try:
        number = signal_number(name)
    except ValueError:
        raise HttpError(
            400, f"signal: expected a signal's name, got {name!r}"
        ) from None
    names = [one.program.name for one in request.targets]
    return objects(request, supervisor.ask(lambda: supervisor.signal(number, names)))


def post_reload(supervisor: Supervisor, request: Request) -> Response:
    try:
        return as_json(supervisor.ask(supervisor.reload))
    except ConfigError as error:
        return as_json({"error": str(error), "errors": error.errors}, 422)


def post_shutdown(supervisor: Supervisor, request: Request) -> Response:
    supervisor.ask(lambda: supervisor.begin_shutdown(0, "shutdown over HTTP"))
    return as_json({"status": "shutting down"}, 202)


Answer = Callable[["Supervisor", Request], Response]
# The first that matches answers; `*` stands for NAME. Over TCP, what is `guarded` needs
# the token: every POST, and logs.
ENDPOINTS: tuple[tuple[str, str, Answer], ...] = (
    ("GET", "/", get_page),
    ("GET", "/health", get_health),
    ("GET", "/health/live", get_live),
    ("GET", "/health/*", get_health),
    ("GET", "/status", get_status),
    ("GET", "/status/*", get_status),
    ("GET", "/metrics", get_metrics),
    ("GET", "/events", get_events),
    ("GET", "/programs/*/logs", get_logs),
    ("POST", "/programs/*/start", functools.partial(post_verb, "start")),
    ("POST", "/programs/*/stop", functools.partial(post_verb, "stop")),
    ("POST", "/programs/*/restart", functools.partial(post_verb, "restart")),
    ("POST", "/programs/*/signal", post_signal),
    ("POST", "/reload", post_reload),
    ("POST", "/shutdown", post_shutdown),
)


def find_endpoint(method: str, words: list[str]) -> tuple[Answer, str | None]:
    """Return who answers, and the NAME in the path; raises HttpError 404 or 405."""
    for wanted, path, answer in ENDPOINTS:
        pattern = path.split("/")[1:]
        if len(pattern) != len(words):
            continue
        if all(
            one == word or (one == "*" and word) for one, word in zip(pattern, words)
        ):
            allowed = ["GET", "HEAD"] if wanted == "GET" else ["POST"]
            if method not in allowed:
                raise HttpError(
                    405, f"{method} is not allowed", Allow=", ".join(allowed)
                )
            return answer, dict(zip(pattern, words)).get("*")
    raise HttpError(404, "no such path")


def respond(
    supervisor: Supervisor,
    listener: Listener,
    method: str,
    target: str,
    headers: dict[str, str],
) -> Response:
    """Answer a request. Refusals come in a fixed order: 400, 404, 405, 403, 401."""
    import urllib.parse  # http.server has loaded it

    path, _, query = re.sub(r"^http://[^/?]*", "", target).partition("?")
    try:
        words = [
            urllib.parse.unquote(word, errors="strict") for word in path.split("/")
        ]
        if words.pop(0) or not target.isascii() or not "".join(words).isprintable():
            raise ValueError
    except ValueError:
        raise HttpError(400, "malformed path") from None
    answer, name = find_endpoint(method, words)
    targets, several = (
        select_programs(supervisor.snapshots, name) if name else ([], False)
    )
    if not listener.is_control:
        check_origin(supervisor.config, listener, method, headers)
        if method == "POST" or answer is get_logs:
            check_token(supervisor.token, headers.get("Authorization", ""))
    pairs = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    return answer(supervisor, Request(pairs, headers, targets, several))


def check_origin(
    config: Config, listener: Listener, method: str, headers: Mapping[str, str]
) -> None:
    """Refuse what another site has a browser send; raises HttpError 403.

    A name that an attacker's DNS points at loopback is caught by the Host, another
    site's script by the Origin. Without Host it is no browser's request.
    """
    host, port = headers.get("Host", "").lower(), r":\d*$"
    allowed = {one.lower() for one in config.allowed_hosts}
    ours = r"(.*\.)?localhost|127(\.\d{1,3}){3}|\[::1\]|"
    known = (
        re.fullmatch(ours, re.sub(port, "", host))
        or {host, re.sub(port, "", host)} & allowed
    )
    if listener.address.is_loopback and not known:
        raise HttpError(403, f"Host {host!r} is not one of ours, see allowed_hosts")
    place = headers.get("Origin", "").lower().partition("://")[2]
    foreign = not place or not {place, re.sub(port, "", place)} & {host, *allowed}
    if method == "POST" and "Origin" in headers and foreign:
        raise HttpError(403, f"Origin {headers['Origin']!r} is foreign")


def check_token(token: str, authorization: str) -> None:
    """Raise HttpError 403 where there is no token, 401 where it is not this one."""
    if not token:
        raise HttpError(403, "no token is configured: read-only over TCP, see `token`")
    import base64
    import hmac

    scheme, _, given = authorization.partition(" ")
    offered = (
        given.strip().encode(errors="replace") if scheme.lower() == "bearer" else b""
    )
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            offered = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    if not hmac.compare_digest(offered, token.encode()):
        raise HttpError(401, "wrong or missing token", WWW_Authenticate="Bearer")


class DeadlineReader(io.RawIOBase):
    """A socket's input: what belongs to one request has to come in REQUEST_TIME."""

    def __init__(self, source: socket.socket) -> None:
        self.source = source
        self.begin()

    def begin(self) -> None:
        """Expect another request."""
        self.deadline = time.monotonic() + REQUEST_TIME
        self.allowance, self.count = MOST_HEAD, 0

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
    RequestHandler = object  # until the first connection, see `handler_class`


class Conversation(RequestHandler):
    """One connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
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
        self.close_connection, self.answered = True, False
        self.command, self.requestline = "", ""
        self.request_version = self.protocol_version
        try:
            self.answer()
        except HttpError as error:
            self.refuse(as_json(error.content, error.status, *error.headers))
        except SupervisorError as error:
            self.refuse(as_json({"error": str(error)}, 409))
        except TimeoutError:
            if self.raw.count:  # a client that says nothing gets no answer
                self.send_error(408, f"no whole request within {REQUEST_TIME:g} s")
        except OSError:
            pass  # it is gone
        except Exception as error:
            text = f"cannot answer {self.requestline!r}: {error!r}"
            self.server.supervisor.say("", text, "error")
            self.send_error(500, "internal error")

    def answer(self) -> None:
        """Read a request and answer it."""
        self.raw.begin()
        line = self.raw_requestline = self.rfile.readline(65537)
        if len(line) > 65536:
            raise HttpError(414, "the request line is too long")
        words = line.decode("iso-8859-1").split()
        if line and (len(words) != 3 or line[-1:] != b"\n"):
            raise HttpError(400, "malformed request line")
        if not line or not self.parse_request():
            return  # the client is done, or `send_error` was called
        if not self.request_version.startswith("HTTP/1"):
            raise HttpError(400, "expected HTTP/1.0 or HTTP/1.1")
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise HttpError(400, "expected a Content-Length")
        if int(length) > MOST_BODY:
            raise HttpError(413, f"expected a body of at most {MOST_BODY} bytes")
        self.raw.allowance += MOST_BODY
        self.rfile.read(int(length))  # none of the requests has a use for it
        self.connection.settimeout(REQUEST_TIME)
        headers = {name.title(): value for name, value in self.headers.items()}
        self.send(respond(*self.server, words[0], words[1], headers))

    def send(self, response: Response) -> None:
        if isinstance(response.body, bytes):
            self.send_head(response, len(response.body))
            if self.command != "HEAD":
                self.wfile.write(response.body)
            self.wfile.flush()
            return
        self.close_connection = True
        with self.server.supervisor.stream_slot(self.server.listener):
            self.send_head(response, None)
            self.wfile.flush()
            if self.command != "HEAD":
                self.send_stream(response.body)

    def send_head(self, response: Response, length: int | None) -> None:
        self.answered = True
        self.send_response_only(response.status)
        more = [("Content-Length", str(length))] if length is not None else []
        more.append(("Connection", "close" if self.close_connection else "keep-alive"))
        kind = ("Content-Type", response.kind)
        for pair in (kind, ("Cache-Control", "no-store"), *response.headers, *more):
            self.send_header(*pair)
        self.end_headers()

    def send_stream(self, stream: Iterator[bytes]) -> None:
        """Send what comes, until it ends, or the client is gone or does not keep up."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        with contextlib.suppress(Lagged):
            for chunk in stream:
                if chunk:
                    self.connection.sendall(chunk)
                elif poll.poll(0) and not self.connection.recv(4096):
                    return

    def refuse(self, response: Response) -> None:
        self.close_connection = True
        if self.answered:  # in the middle of a stream: there is nothing to be said
            return
        self.request_version = self.protocol_version
        with contextlib.suppress(OSError):
            self.connection.settimeout(REQUEST_TIME)
            self.send(response)
            # Closed with unread input, the kernel would send a reset, which can
            # overtake the answer.
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(0.2)
            for _ in range(64):
                if not self.connection.recv(65536):
                    break

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Answer what the library finds malformed as JSON."""
        text = (message or "malformed request").lower()
        self.refuse(as_json({"error": text}, 400 if code == 505 else code))


@functools.cache
def handler_class() -> type[Conversation]:
    with without_ssl():
        import http.server  # 15 ms and 8 MB, with the first connection

    return type("Handler", (Conversation, http.server.BaseHTTPRequestHandler), {})


def turn_away(connection: socket.socket) -> None:
    """Answer 503 to one connection too many, without waiting for its request."""
    body = '{"error": "too many connections"}'
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(body)}\r\n"
    head += (
        "Content-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    with contextlib.suppress(OSError), connection:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.recv(65536)  # unread input would turn the close into a reset
        connection.send((head + body).encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(65536)


NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def bind(address: Address, private: bool = False) -> socket.socket:
    """Return a listening socket; raises OSError. A stale unix socket is replaced.

    A private one has mode 0600 from its first moment: the umask sees to that, no chmod.
    """
    if address.path:
        remove_stale(address.path)
        listener, place = socket.socket(socket.AF_UNIX), address.path
    else:
        listener = socket.socket(
            socket.AF_INET6 if ":" in address.host else socket.AF_INET
        )
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        place = (address.host, address.port)  # type: ignore[assignment]
    before = os.umask(0o177) if private else None
    try:
        listener.bind(place)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    finally:
        if before is not None:
            os.umask(before)
    listener.setblocking(False)
    return listener


def remove_stale(path: str) -> None:
    """Remove a unix socket that nobody answers; raises OSError for anything else."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "it exists and is no socket", path)
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
                raise OSError(
                    errno.EADDRINUSE, "a supervisor answers there already", path
                )
            except ConnectionRefusedError:
                os.unlink(path)  # its supervisor was killed


def control_path(control: str, path: str) -> str:
    """Return the control socket of a configuration's real path.

    A derived one is in /run, the user's own folder, or one of ours in /tmp. Raises
    OSError where that is somebody else's.
    """
    if control != "auto":
        return os.path.abspath(control) if control else ""
    folder = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    if not folder:
        folder = f"/tmp/supervisors-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or status.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "it is not ours alone", folder)
    return os.path.join(folder, f"supervisors-{path_hash(path)[:8]}.sock")


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
        self.at: dict[Callable[[], object], float] = {}
        self.heap: list[tuple[float, int, Callable[[], object]]] = []
        self.count = 0

    def set(self, callback: Callable[[], object], when: float | None) -> None:
        """Have `callback` called at an instant, or with None not at all."""
        if when is None:
            self.at.pop(callback, None)
        elif self.at.get(callback) != when:
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
        self.pid = 0  # of a command that is under way
        self.busy = False  # a thread is under way

    def begin(self) -> None:
        """Start a check, and set the deadline for giving it up."""
        check = self.process.program.healthcheck
        if check is None:
            return
        self.run += 1
        self.began = time.monotonic()
        self.supervisor.deadlines.set(self.give_up, self.began + check.timeout)
        end = functools.partial(self.end, self.run)
        if check.command:
            self.begin_command(check, end)
        elif not self.busy:
            # One that is stuck, in a name server say, makes this check fail with it.
            self.busy = True

            def done(detail: str) -> None:
                self.busy = False
                end(detail)

            def work() -> None:
                detail = probe(check)
                self.supervisor.post(functools.partial(done, detail))

            threading.Thread(target=work, daemon=True).start()

    def begin_command(self, check: Health, end: Callable[[str], None]) -> None:
        try:
            child = self.process.spawn(check.argv, (self.supervisor.null_fd,) * 3)
        except SpawnError as error:
            end(error.reason)
            return
        self.pid = child.pid

        def ended(wait_status: int) -> None:
            send(-child.pid, signal.SIGKILL)  # what it has forked
            self.pid = 0 if self.pid == child.pid else self.pid
            code, number = decode(wait_status)
            status = Status(exit_code=code, exit_signal=number)
            report = read_report(child) or describe_end(status)
            end("" if status.exit_code == 0 else report)

        self.supervisor.children[child.pid] = ended

    def give_up(self) -> None:
        check = self.process.program.healthcheck
        self.kill()
        if check:
            self.end(self.run, f"no answer within {check.timeout:g} s")

    def end(self, run: int, detail: str) -> None:
        """Take a result, "" if it passed, and set the time of the next check."""
        check, deadlines = self.process.program.healthcheck, self.supervisor.deadlines
        if run != self.run or check is None:
            return
        self.run += 1
        deadlines.set(self.give_up, None)
        self.process.apply(Checked(not detail, detail))
        status = self.process.status
        if status.state in (State.STARTING, State.RUNNING):
            first = min(check.interval, FIRST_INTERVAL)
            interval = first if status.healthy is None else check.interval
            deadlines.set(self.begin, max(self.began + interval, time.monotonic()))

    def kill(self) -> None:
        if self.pid:
            send(-self.pid, signal.SIGKILL)
        self.pid = 0

    def cancel(self) -> None:
        """The run is over, or ending: no more checks."""
        self.run += 1
        for callback in (self.give_up, self.begin):
            self.supervisor.deadlines.set(callback, None)
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
    report = b""
    with contextlib.suppress(BlockingIOError):
        report = os.read(child.report, 4096)
    os.close(child.report)
    return report.decode(errors="replace")


class Process:
    """A program's place in the supervisor. Main thread, but for `snapshot`."""

    def __init__(self, supervisor: Supervisor, program: Program) -> None:
        self.supervisor = supervisor
        self.program = program
        self.name = program.name
        self.status = Status()
        self.successor: Program | None = None  # from a reload, for the next start
        self.removed = False
        self.told = False  # to stop, in a shutdown
        self.dependents: list[Process] = []
        self.child: Child | None = None
        self.group = 0  # the last run's
        self.env_text = ""  # of the env_files, as it was started with
        self.output = Output(program.name)
        self.checker = Checker(self)
        self.snapshot = Snapshot(program, self.status, self.output)

    def apply(self, event: Event) -> None:
        """Feed an event to the state machine, do what it says, publish the result."""
        self.status, actions = step(self.program, time.monotonic(), self.status, event)
        for action in actions:
            answer = self.perform(action)
            if answer is not None:  # an event without fields is false
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
        gone = not send(-self.group, signal.SIGKILL) and self.child is None
        return Emptied() if gone else None

    def signal(self, number: int) -> None:
        """Signal the group, or the leader where that is wanted."""
        assert self.group > 0  # 0 would be our own
        if self.program.stopasgroup:
            send(-self.group, number)
        elif self.child:
            send(self.child.pid, number)

    def start_run(self) -> Event:
        """Start the program as it is defined now."""
        self.take_successor()
        files: list[int] = []  # to be closed here
        sources: list[Callable[[], None]] = []
        try:
            self.env_text = read_env_files(self.program)
            out, err = self.open_streams(files, sources)
            self.child = self.spawn(
                self.program.argv, (self.supervisor.null_fd, out, err)
            )
        except SpawnError as error:
            return SpawnFailed(f"cannot start {self.name}: {error.reason}", error.code)
        finally:
            for fd in files:
                os.close(fd)
            for add in sources:  # even where it failed: they end at once then
                self.supervisor.log.post(add)
        self.group = self.child.pid
        self.supervisor.children[self.group] = self.ended
        self.supervisor.deadlines.set(self.checker.begin, time.monotonic())
        return Spawned(self.group)

    def take_successor(self) -> None:
        self.program, self.successor = self.successor or self.program, None

    def open_streams(
        self, files: list[int], sources: list[Callable[[], None]]
    ) -> tuple[int | None, int | None]:
        """Return the descriptors of standard output and error; None for our own."""
        log_format = self.supervisor.config.log_format
        out, err = (
            route(self.program, one, log_format) for one in ("stdout", "stderr")
        )
        fd = self.open_stream("stdout", out, files, sources)
        if out == err and out.log_format != "json":
            return fd, fd  # one pipe keeps the order of the two
        return fd, self.open_stream("stderr", err, files, sources)

    def open_stream(
        self,
        stream: str,
        where: Route,
        files: list[int],
        sources: list[Callable[[], None]],
    ) -> int:
        """Open a log file for the program itself, or a pipe for the log thread."""
        if isinstance(where.target, int) and where.direct:
            return where.target
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
        read_end, write_end = os.pipe()
        read_end = self.supervisor.file_limit.out_of_the_way(read_end)
        os.set_blocking(read_end, False)
        files.append(write_end)
        sources.append(functools.partial(self.add_source, read_end, stream, where))
        return write_end

    def add_source(self, fd: int, stream: str, where: Route) -> None:
        """Have a pipe read. Log thread."""
        supervisor, program, output = self.supervisor, self.program, self.output
        terminal = isinstance(where.target, int)
        form: Format | None = None
        if where.log_format != "raw":
            width = supervisor.name_width if terminal else 0
            colour = None
            if where.target in supervisor.ttys:
                colour = COLOURS[
                    list(supervisor.processes).index(self.name) % len(COLOURS)
                ]
            form = log_formatter(where.log_format, program.name, stream, width, colour)
        shared = supervisor.sharers.get(where.target, 0) > 1
        log = supervisor.log
        sink = log.sink(where.target, program.logfile_maxbytes, program.logfile_backups)
        recent = output.recent if terminal else None
        log.add(Source(fd, sink, output, recent, stream, form, shared))

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
        assert self.child
        self.checker.cancel()
        report, self.child = read_report(self.child), None
        if report and self.status.state is not State.STOPPING:
            code, _, reason = report.partition(" ")
            self.status = self.status._replace(state=State.STARTING, pid=None)
            self.apply(SpawnFailed(f"cannot start {self.name}: {reason}", int(code)))
            return
        survivors = send(-self.group, 0)
        if survivors:
            self.supervisor.lingering.add(self)
        self.apply(Exited(*decode(wait_status), survivors))

    def publish(self) -> None:
        """Make the status known: to HTTP threads, the log, and who depends on it."""
        old, status, supervisor = self.snapshot, self.status, self.supervisor
        if (status, self.program) == (old.status, old.program):
            return
        new_run = status.pid is not None and status.pid != old.status.pid
        new_state = status.state is not old.status.state
        self.snapshot = Snapshot(
            self.program,
            status,
            self.output,
            supervisor.config.log_format,
            time.time() if new_run else old.started_at,
            time.time() if new_state else old.changed_at,
        )
        if supervisor.processes.get(self.name) is self:
            supervisor.snapshots[self.name] = self.snapshot
        if status._replace(deadline=None) != old.status._replace(deadline=None):
            supervisor.events.append(self.snapshot)
        if status.state not in (State.STARTING, State.RUNNING):
            self.checker.cancel()
        if new_state or new_run:
            self.announce(old.status, status)
        changed = (
            self.snapshot.ready != old.ready or status.healthy != old.status.healthy
        )
        if new_state or new_run or changed:
            supervisor.react(self)

    def announce(self, old: Status, status: Status) -> None:
        """Say what state it is in, and why."""
        words = [
            status.state.value,
            f"pid {status.pid}" if status.pid else "",
            status.reason,
        ]
        backoff = status.state is State.BACKOFF
        if status.restarts > old.restarts and old.state is not State.BACKOFF:
            words.append(f"after {describe_end(status)}")
        if backoff and status.deadline is not None:
            words.append(
                f"restart in {max(status.deadline - time.monotonic(), 0):.2g} s"
            )
        level = "warning" if backoff or has_failed(status) else "info"
        self.supervisor.say(self.name, ", ".join(filter(None, words)), level)

    def block(self) -> None:
        """Learn anew what it has to wait for."""
        others = self.supervisor.processes
        names = [one for one in (self.successor or self.program).needs if one in others]
        event = blocked_by(
            {one: (others[one].program, others[one].status) for one in names}
        )
        if event != (self.status.blocked, self.status.blocked_as):
            self.apply(event)


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
        self.leftovers: dict[int, str] = {}  # names by pid
        self.kill_leftovers_at = 0.0
        self.deadlines = Deadlines()
        self.calls: deque[Callable[[], object]] = deque()
        self.notify: NotifySocket | None = None
        self.connections = 0
        self.streams = 0
        self.counts = threading.Lock()
        self.token = ""
        self.warnings: list[str] = []  # until there is a log, and of a reload
        self.variables: dict[str, str] = {}  # that every program gets
        self.ending = False  # a shutdown has begun
        self.sweep_at: float | None = None  # when orphans are killed
        self.finished = False
        self.exit_code = 0
        self.told_manager = ""
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
        self.catch_signals()
        self.bind_all()
        self.log = LogThread(self.config.log_format == "json")
        self.cleanup.callback(self.release_followers)
        self.cleanup.callback(self.log.close)
        self.file_limit = FileLimit()
        self.cleanup.callback(lambda: self.file_limit.set(self.file_limit.soft))
        for fd in inherited_descriptors():
            os.set_inheritable(fd, False)
        self.null_fd = open_null()
        self.cleanup.callback(os.close, self.null_fd)
        self.spared = children_before()
        if not become_subreaper() and sys.platform == "linux":
            self.warnings.append("cannot become a subreaper: orphans go to PID 1")
        self.write_pidfile()
        self.say_warnings()
        if self.lifeline is not None:
            self.selector.register(
                self.lifeline, selectors.EVENT_READ, self.lose_lifeline
            )
        self.add_programs(self.config.programs.values())
        if self.config.path:
            run = (
                f"{path_hash(self.config.path)}.{os.getpid()}.{start_time(os.getpid())}"
            )
            self.variables[RUN_VARIABLE] = run
            self.end_leftovers()

    def catch_signals(self) -> None:
        """Have signals arrive as bytes in a pipe; none is ignored in programs.

        The handlers do nothing: a handler in Python has to be set for the wake-up
        descriptor to get its byte. SIGPIPE and SIGXFSZ, which the interpreter ignores,
        are reset by Popen.
        """
        self.wake_read, self.wake_write = wake = os.pipe()
        for fd in wake:
            os.set_blocking(fd, False)
            self.cleanup.callback(os.close, fd)
        self.selector.register(self.wake_read, selectors.EVENT_READ, self.read_wakeups)
        before = signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        self.cleanup.callback(signal.set_wakeup_fd, before)
        wanted = {*ENDINGS, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR2}
        fixed = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGKILL, signal.SIGSTOP}
        for number in signal.valid_signals() - fixed:
            handler = signal.getsignal(number)
            if number in wanted or handler == signal.SIG_IGN:  # from nohup, say
                self.cleanup.callback(signal.signal, number, handler or signal.SIG_DFL)
                signal.signal(number, lambda number, frame: None)
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.cleanup.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)

    def bind_all(self) -> None:
        """Bind the control socket and all addresses; raises SupervisorError."""
        config, warnings, path = self.config, self.warnings, ""
        if config.path or config.control != "auto":
            try:
                path = control_path(config.control, config.path)
                if path:
                    self.listen(Address(path=path), is_control=True)
                    self.variables["SUPERVISOR_SERVER_URL"] = f"unix://{path}"
            except OSError as error:
                place = f"the control socket {path or error.filename}"
                reason = f"{place}: {error.strerror or error}"
                if error.errno in (errno.EADDRINUSE, errno.EEXIST):
                    raise SupervisorError(f"cannot listen on {reason}") from None
                warnings.append(f"cannot have {reason}; the verbs need another way in")
        for address in map(parse_address, filter(None, config.listen)):
            try:
                self.listen(address)
            except OSError as error:
                reason = f"cannot listen on {address}: {error.strerror or error}"
                if os.getpid() != 1:
                    raise SupervisorError(reason) from None
                warnings.append(reason)  # a container's programs run all the same
            else:
                if not (address.path or address.is_loopback or self.token):
                    warnings.append(f"{address} is open for reading, no token is set")

    def listen(self, address: Address, is_control: bool = False) -> None:
        try:
            bound = bind(address, private=is_control)
        except OSError as error:
            if address.host != "::" or error.errno not in NO_IPV6:
                raise
            bound = bind(address._replace(host="0.0.0.0"))
        self.cleanup.callback(bound.close)
        if address.path:
            self.cleanup.callback(
                remove_file, address.path, os.stat(address.path).st_ino
            )
        self.watch(Listener(bound, address, is_control))

    def watch(self, listener: Listener) -> None:
        accept = functools.partial(self.accept, listener)
        self.selector.register(listener.socket, selectors.EVENT_READ, accept)

    def write_pidfile(self) -> None:
        path = self.config.pidfile
        if not path:
            return
        try:
            with open(path, "w") as file:
                file.write(f"{os.getpid()}\n")
            self.cleanup.callback(remove_file, path, os.stat(path).st_ino)
        except OSError as error:
            self.warnings.append(f"cannot write the pidfile {path!r}: {error.strerror}")

    def read_token(self) -> str:
        """Return the token of the configuration; raises SupervisorError."""
        path = self.config.token_file
        if not path:
            return self.config.token
        try:
            with open(path, encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    self.warnings.append(f"token_file {path!r} can be read by others")
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SupervisorError(f"cannot read token_file {path!r}: {error}") from None

    # --- the loop

    def turn(self) -> None:
        """Sleep until something happens, and do what it asks for."""
        nearest = self.deadlines.nearest()
        sleep = None
        if nearest is not None:
            sleep = min(max(nearest - time.monotonic(), 0), LONGEST_SLEEP)
        for key, _ in self.selector.select(sleep):
            key.data()
        self.deadlines.call_due(time.monotonic())

    def post(self, call: Callable[[], object]) -> None:
        """Have the main thread call something. Any thread."""
        self.calls.append(call)
        with contextlib.suppress(OSError):  # full: it is awake anyway; closed: too late
            os.write(self.wake_write, b"\0")

    def ask(self, question: Callable[[], T]) -> T:
        """Have the main thread call something; return or raise its result."""
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

    def say_warnings(self) -> None:
        for warning in self.warnings:
            self.say("", warning, "warning")
        self.warnings.clear()

    def read_wakeups(self) -> None:
        numbers = set(os.read(self.wake_read, 65536))
        if signal.SIGCHLD in numbers:
            self.reap()
            self.look_at_groups()
            if self.ending:
                self.finish_if_done()
        for number in numbers.intersection(ENDINGS):
            if self.ending:
                self.kill_all(f"{signal_name(number)} during the shutdown")
            else:
                self.begin_shutdown(0, signal_name(number))
        if signal.SIGHUP in numbers:
            self.reload_by_signal()
        if signal.SIGUSR2 in numbers:
            self.reopen_logs()
        while self.calls:
            self.calls.popleft()()

    def reap(self) -> bool:
        """Collect every child that has ended, orphans too; return whether any is left.

        One SIGCHLD may stand for many ends. What is started again meanwhile may end at
        once: it is for the next turn, or this would never return.
        """
        ends = []
        with contextlib.suppress(ChildProcessError):
            while (end := os.waitpid(-1, os.WNOHANG))[0]:
                ends.append(end)
            ends.append((0, 0))
        for pid, wait_status in ends:
            ended = self.children.pop(pid, None)
            if ended:
                ended(wait_status)
            elif pid:
                self.say("", f"reaped orphan {pid}", "debug")
        return (0, 0) in ends

    def look_at_groups(self) -> None:
        """Notice that a group is empty; not every end makes a SIGCHLD."""
        for process in list(self.lingering):
            if process.child or process.status.state is not State.STOPPING:
                self.lingering.discard(process)  # it has been settled already
            elif not send(-process.group, 0):
                self.lingering.discard(process)
                process.apply(Emptied())
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
            self.connections += not (full or listener.is_control)
        if full:
            turn_away(connection)
        else:
            work = functools.partial(self.converse, listener, connection)
            threading.Thread(target=work, daemon=True).start()

    def converse(self, listener: Listener, connection: socket.socket) -> None:
        """Serve one connection, in its thread."""
        try:
            with connection, contextlib.suppress(OSError):
                handler_class()(connection, "", Place(self, listener))  # type: ignore[arg-type]
        finally:
            with self.counts:
                self.connections -= not listener.is_control

    @contextlib.contextmanager
    def stream_slot(self, listener: Listener) -> Iterator[None]:
        """Hold one of the places for streams; raises HttpError 503. Any thread."""
        with self.counts:
            if self.streams >= MOST_STREAMS and not listener.is_control:
                raise HttpError(503, f"{MOST_STREAMS} streams are open already")
            self.streams += not listener.is_control
        try:
            yield
        finally:
            with self.counts:
                self.streams -= not listener.is_control

    # --- programs

    def add_programs(self, programs: Iterable[Program]) -> None:
        """Take programs in, without starting them, and put all in the file's order."""
        for program in programs:
            if program.name not in self.processes:
                self.processes[program.name] = Process(self, program)
        names = dict.fromkeys([*self.config.programs, *self.processes])
        self.processes = {name: self.processes[name] for name in names}
        self.snapshots = {name: one.snapshot for name, one in self.processes.items()}
        for process in self.processes.values():
            process.dependents = []
        for process in self.processes.values():
            for name in (process.successor or process.program).needs:
                if name in self.processes:
                    self.processes[name].dependents.append(process)
        self.survey()

    def survey(self) -> None:
        """Learn what programs decide together: the width of names, who shares files."""
        self.sharers: dict[int | str, int] = {}
        self.ttys = {
            fd for fd in (1, 2) if os.isatty(fd) and not self.environ.get("NO_COLOR")
        }
        self.name_width = 0
        for name, program in self.config.programs.items():
            both = {
                route(program, one, self.config.log_format)
                for one in ("stdout", "stderr")
            }
            for target in {one.target for one in both}:
                self.sharers[target] = self.sharers.get(target, 0) + 1
            if any(isinstance(one.target, int) and not one.direct for one in both):
                self.name_width = max(self.name_width, len(name))

    def start_all(self) -> None:
        """Start what is to be started, in the order of the file."""
        for process in self.processes.values():
            process.block()
        for process in list(self.processes.values()):
            if process.program.autostart:
                process.apply(Start())
        self.finish_if_done()
        self.keep_manager_informed()

    def is_gone(self, name: str) -> bool:
        """Return whether a program was removed, or everything is over. Any thread."""
        return self.events.closed or name not in self.snapshots

    def react(self, process: Process) -> None:
        """Do what the change of one program means to the others."""
        for dependent in process.dependents:
            dependent.block()
        status = process.status
        if not status.is_alive:
            if process.successor:
                process.take_successor()
                process.block()
            if process.removed and self.processes.get(process.name) is process:
                del self.processes[process.name]
                del self.snapshots[process.name]
                self.events.append(process.name)
            if status.state in (State.EXITED, State.FATAL):
                program = process.program
                wish = program.on_failure if has_failed(status) else program.on_success
                if wish == "shutdown":
                    self.begin_shutdown(
                        exit_status(status), f"{process.name} has ended"
                    )
            if self.ending:
                for name in process.program.needs:
                    if name in self.processes:
                        self.stop_unless_needed(self.processes[name])
            self.finish_if_done()
        self.keep_manager_informed()

    def order(self, verb: str, names: list[str]) -> tuple[int, dict[str, Snapshot]]:
        """Start, stop or restart programs; return where the events after it begin."""
        if self.ending and verb != "stop":
            raise SupervisorError("cannot start anything: shutting down")
        chosen = [self.processes[name] for name in names if name in self.processes]
        for process in chosen:
            orders: dict[str, Event] = {
                "start": Start(),
                "stop": Stop(),
                "restart": Restart(),
            }
            process.apply(orders[verb])
        return self.events.end, {one.name: one.snapshot for one in chosen}

    def signal(self, number: int, names: list[str]) -> list[Snapshot]:
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
            readable = self.read_notifications
            self.selector.register(self.notify.socket, selectors.EVENT_READ, readable)
        return self.notify.address

    def read_notifications(self) -> None:
        """Take what programs say of themselves, a bounded number at a time."""
        for _ in range(64):
            message = self.notify.receive() if self.notify else None
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
        """Return the program of a process: by session, group or ancestry."""
        with contextlib.suppress(OSError, IndexError):
            while pid > 1:
                for leader in (pid, os.getsid(pid), os.getpgid(pid)):
                    process = getattr(self.children.get(leader), "__self__", None)
                    if isinstance(process, Process):
                        return process
                with open(f"/proc/{pid}/stat", "rb") as file:
                    pid = int(file.read().rpartition(b")")[2].split()[1])
        return None

    # --- leftovers of a supervisor that was killed

    def end_leftovers(self) -> None:
        """End what a dead supervisor of this configuration left; programs wait for it.

        They are no children, so they are looked at; and what they start on the way is
        found as well.
        """
        now, before = time.monotonic(), self.leftovers
        self.leftovers = find_leftovers(path_hash(self.config.path))
        fresh = sorted(self.leftovers.items() - before.items())
        if fresh:
            names = ", ".join(f"{name} ({pid})" for pid, name in fresh)
            self.say("", f"ending what a killed supervisor left: {names}", "warning")
        for pid, name in fresh:
            program = self.config.programs.get(name, Program(name, name))
            if not before:
                due = now + program.stopwaitsecs
                self.kill_leftovers_at = max(self.kill_leftovers_at, due)
            send(pid, signal_number(program.stopsignal))
            send(pid, signal.SIGCONT)
        if self.leftovers and now < self.kill_leftovers_at + SWEEP:
            for pid in self.leftovers if now >= self.kill_leftovers_at else ():
                send(pid, signal.SIGKILL)
            self.deadlines.set(self.end_leftovers, now + TICK)
        elif before:
            self.leftovers = {}
            self.finish_if_done() if self.ending else self.start_all()

    # --- reload

    def reload_by_signal(self) -> None:
        try:
            self.reload()
        except SupervisorError as error:
            for line in getattr(error, "errors", [error]):
                self.say("", f"cannot reload: {line}", "error")

    def reload(self) -> dict[str, Any]:
        """Read the file anew and become what it says; raises ConfigError first."""
        if self.ending or not self.config.path:
            raise SupervisorError(
                "shutting down" if self.ending else "there is no file"
            )
        old = self.config
        self.config = load_config(old.path)._replace(**self.overrides)
        try:
            self.token = self.read_token()
        except SupervisorError as error:
            self.config = old
            raise ConfigError([str(error)]) from None
        self.say_warnings()
        self.log.as_json = self.config.log_format == "json"
        result = self.change_programs(self.config.programs)
        fixed = ("listen", "control", "pidfile")
        stuck = [key for key in fixed if getattr(old, key) != getattr(self.config, key)]
        if stuck:
            result["needs_restart"] = stuck
            self.say("", f"a changed {', '.join(stuck)} needs a restart", "warning")
        counts = [
            f"{len(result[key])} {key}" for key in ("added", "changed", "removed")
        ]
        self.say("", f"reloaded: {', '.join(counts)}, {result['unchanged']} unchanged")
        return result

    def change_programs(self, programs: Mapping[str, Program]) -> dict[str, Any]:
        """Stop, start and restart what differs; leave all else untouched."""
        gone = [one for one in self.processes.values() if one.name not in programs]
        added = [name for name in programs if name not in self.processes]
        changed, revived = [], []
        for name in programs.keys() & self.processes.keys():
            process = self.processes[name]
            if process.removed or self.differs(process, programs[name]):
                revived += [name] * process.removed
                process.removed, process.successor = False, programs[name]
                changed.append(process)
            else:  # but there may be more instances of what it needs
                process.program = process.program._replace(needs=programs[name].needs)
        self.add_programs(programs.values())
        for process in changed:
            self.renew(process)
        for process in self.processes.values():
            process.block()
        for process in gone:
            process.removed = True
            process.apply(Stop())
            self.react(process)  # it may have been stopped before
        for name in [*added, *revived]:
            if programs[name].autostart:
                self.processes[name].apply(Start())
        renewed = [name for name in programs if self.processes[name] in changed]
        unchanged = len(programs) - len(added) - len(changed)
        names = [process.name for process in gone]
        return {
            "added": added,
            "changed": renewed,
            "removed": names,
            "unchanged": unchanged,
        }

    def differs(self, process: Process, program: Program) -> bool:
        if program != (process.successor or process.program)._replace(
            needs=program.needs
        ):
            return True
        try:
            return bool(process.group) and read_env_files(program) != process.env_text
        except SpawnError:
            return True

    def renew(self, process: Process) -> None:
        """Give a program its new definition, and a new run if it was to be running."""
        state, program = process.status.state, process.successor
        ended = state in (State.EXITED, State.FATAL)
        if not process.status.is_alive:
            process.take_successor()
            process.publish()
        process.block()
        stopping = state is State.STOPPING and process.status.after is After.STOP
        asleep = stopping or state is State.STOPPED
        if program and (program.autostart if ended else not asleep):
            process.apply(Restart())

    def reopen_logs(self) -> None:
        self.log.reopen()
        for process in self.processes.values():
            for stream in ("stdout", "stderr"):
                where = route(process.program, stream, self.config.log_format)
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

    def release_followers(self) -> None:
        """Let streams send what there still is, and end."""
        self.events.close()
        for process in self.processes.values():
            process.output.recent.close()
        end = time.monotonic() + FAREWELL
        while self.streams and time.monotonic() < end:
            time.sleep(TICK)

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
        self.say("", f"shutting down: {reason}")
        tell_manager("STOPPING=1")
        for process in self.processes.values():
            # From here on nothing comes back, whatever way it ends.
            process.program = process.program._replace(
                autorestart=False, healthcheck=None
            )
            process.checker.cancel()
            process.told = process.status.state is State.STOPPING
            if process.status.state in (State.STOPPING, State.WAITING, State.BACKOFF):
                process.apply(Stop())
        for process in list(self.processes.values()):
            self.stop_unless_needed(process)
        now = time.monotonic()
        self.deadlines.set(self.name_waiting, now + WAITING_FIRST)
        if self.config.shutdown_timeout is not None:
            late = functools.partial(self.kill_all, "shutdown_timeout is over")
            self.deadlines.set(late, now + self.config.shutdown_timeout)
        self.finish_if_done()

    def stop_unless_needed(self, process: Process) -> None:
        needed = any(one.status.is_alive for one in process.dependents)
        if process.status.is_alive and not process.told and not needed:
            process.told = True
            process.apply(Stop())

    def name_waiting(self) -> None:
        names = [one.name for one in self.processes.values() if one.status.is_alive]
        names = names or sorted(set(self.leftovers.values())) or ["orphans"]
        self.say("", f"still waiting for {', '.join(names)}")
        self.deadlines.set(self.name_waiting, time.monotonic() + WAITING_NEXT)

    def kill_all(self, reason: str) -> None:
        self.say("", f"killing everything: {reason}", "warning")
        self.sweep_at = self.kill_leftovers_at = time.monotonic()
        for process in list(self.processes.values()):
            if process.status.is_alive:
                process.told = True
                process.apply(Stop())
                process.status = process.status._replace(deadline=self.sweep_at)
                process.apply(Due())
        self.finish_if_done()

    def finish_if_done(self) -> None:
        """Notice that all has ended; called when something has.

        Orphans get SIGTERM together with the last level of programs, and SIGKILL when
        the programs have been gone for a while.
        """
        processes, now = self.processes.values(), time.monotonic()
        if not self.ending:
            if self.config.exit_when_done and not self.leftovers:
                self.finish_when_done()
            return
        if self.sweep_at is None:
            if any(one.status.is_alive and not one.told for one in processes):
                return
            self.sweep_at = float("inf")
            self.signal_orphans(signal.SIGTERM)
            self.signal_orphans(signal.SIGCONT)
        if self.leftovers or any(one.status.is_alive for one in processes):
            return
        self.sweep_at = min(self.sweep_at, now + SWEEP)
        none_left = not self.reap() or not self.orphans()
        if now >= self.sweep_at:
            self.signal_orphans(signal.SIGKILL)
        self.finished = none_left or now >= self.sweep_at + SWEEP
        self.deadlines.set(self.finish_if_done, None if self.finished else now + TICK)

    def orphans(self) -> list[int]:
        """Return what is ours to reap and no program's: what has left its program."""
        groups = {one.group for one in self.processes.values() if one.status.is_alive}
        return descendants(os.getpid(), self.children.keys() | self.spared | groups)

    def signal_orphans(self, number: int) -> None:
        for pid in self.orphans():
            send(pid, number)

    def finish_when_done(self) -> None:
        """With `exit_when_done`, shut down once every program has ended for good."""
        codes = []
        for process in self.processes.values():
            status = process.status
            if status.state is State.WAITING and status.blocked_as == "failed":
                codes.append(1)
            elif status.state not in (State.STOPPED, State.EXITED, State.FATAL):
                return
            elif has_failed(status):
                codes.append(exit_status(status))
        self.begin_shutdown([*codes, 0][0], "all programs have ended")

    # --- who runs us

    def keep_manager_informed(self) -> None:
        """Tell systemd, where it asked for it, that all is ready, and that we live."""
        if "NOTIFY_SOCKET" not in self.environ or self.ending:
            return
        wanted = [one for one in self.processes.values() if one.program.autostart]
        done = (True, State.EXITED)
        missing = [one.name for one in wanted
                   if not one.snapshot.ready
                   and (one.status.succeeded, one.status.state) != done]  # fmt: skip
        text = (
            f"STATUS=waiting for {', '.join(missing)}"
            if missing
            else "READY=1\nSTATUS=ready"
        )
        if text != self.told_manager:
            self.told_manager = text
            tell_manager(text)
        period = self.environ.get("WATCHDOG_USEC", "")
        if period.isdecimal() and self.keep_alive not in self.deadlines.at:
            self.keep_alive()

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


def inherited_descriptors() -> list[int]:
    """Return the descriptors that a program would inherit beyond the standard ones."""
    names = os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else map(str, range(256))
    found = []
    for fd in map(int, names):
        with contextlib.suppress(OSError):
            if fd > 2 and os.get_inheritable(fd):
                found.append(fd)
    return found


def open_null() -> int:
    """Open /dev/null; in a bare root a pipe without writer: it reads as empty, too."""
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError:
        read_end, write_end = os.pipe()
        os.close(write_end)
        return read_end


def children_before() -> set[int]:
    """Return what a host process had started before: not ours to end. None as PID 1."""
    with contextlib.suppress(ChildProcessError):
        if os.getpid() != 1:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return set(descendants(os.getpid()))
    return set()


# === 10. Client and command line ======================================================
#
# The verbs talk HTTP to the control socket, with the same client as the library.

DEFAULT_FILE = "supervisors.toml"
START_TIME = 10.0  # seconds for a supervisor in a test to answer
POLL = 0.02  # seconds between two looks of a client that waits
STATE_COLOURS = dict.fromkeys(("STARTING", "WAITING", "STOPPING"), 33)
STATE_COLOURS.update({"RUNNING": 32, "BACKOFF": 31, "FATAL": 31})
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

    code = 4


class Refused(SupervisorError):
    """The supervisor answered with an error; `status` is HTTP's."""

    def __init__(self, status: int, content: Mapping[str, Any]) -> None:
        super().__init__(str(content.get("error", f"HTTP status {status}")))
        self.status, self.errors = status, content.get("errors", [])
        self.code = 4 if status == 404 else 1


class Client:
    """Talks to a running supervisor, at `unix:PATH` or `HOST:PORT`. Any thread.

    Names are programs, groups, globs or `all`. Everything raises SupervisorError.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        try:
            self.address = parse_address(address)
        except ValueError as error:
            raise SupervisorError(str(error)) from None
        self.headers = {"Connection": "close"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"

    def open(self, method: str, path: str, timeout: float) -> http.client.HTTPResponse:
        """Send a request; return the answer, to be read; seconds between packets."""
        with without_ssl():
            import http.client

        path_to, host, port = self.address
        connection = http.client.HTTPConnection(host or "localhost", timeout=timeout)
        try:
            if path_to:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(timeout)
                connection.sock.connect(path_to)
            else:
                connection.sock = socket.create_connection((host, port), timeout)
            connection.request(method, path, headers=self.headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = (
                getattr(error, "strerror", "") or str(error) or type(error).__name__
            )
            raise Unreachable(f"{self.address}: {reason}") from None

    def ask(self, method: str, path: str, timeout: float = 10.0) -> Any:
        """Return the JSON of an answer; raises Refused for an error."""
        import json

        with self.open(method, path, timeout) as response:
            try:
                content = json.loads(response.read())
            except (OSError, ValueError) as error:
                raise Unreachable(f"{self.address}: {error}") from None
        if response.status >= 400 and "programs" not in content:  # as in ill health
            raise Refused(response.status, content)
        return content

    def status(self, name: str | None = None) -> Any:
        """Return one program's status object, or a list of them."""
        return self.ask("GET", "/status" if name is None else f"/status/{quote(name)}")

    def health(self, name: str | None = None) -> Any:
        """Return `status` ("ok", "starting", "failing") and the `programs` not well."""
        return self.ask("GET", "/health" if name is None else f"/health/{quote(name)}")

    def order(self, verb: str, name: str, wait: float) -> Any:
        wait = min(max(wait, 0.0), MOST_WAIT)
        path = f"/programs/{quote(name)}/{verb}?wait={wait}"
        return self.ask("POST", path, wait + ASK_TIME)

    def start(self, name: str, wait: float = 60.0) -> Any:
        """Start a program; return its status once it is ready, failed, or late."""
        return self.order("start", name, wait)

    def stop(self, name: str, wait: float = 60.0) -> Any:
        return self.order("stop", name, wait)

    def restart(self, name: str, wait: float = 60.0) -> Any:
        return self.order("restart", name, wait)

    def signal(self, name: str, signal: str) -> Any:
        path = f"/programs/{quote(name)}/signal?signal={quote(signal)}"
        return self.ask("POST", path)

    def logs(self, name: str, lines: int = 100) -> str:
        with self.open_logs(name, lines, 0) as response:
            return response.read().decode(errors="replace")

    def open_logs(self, name: str, lines: int, follow: int) -> http.client.HTTPResponse:
        import json

        path = f"/programs/{quote(name)}/logs?lines={lines}&follow={follow}"
        response = self.open("GET", path, 30.0)
        if response.status == 200:
            return response
        with response:
            raise Refused(response.status, json.loads(response.read()))

    def reload(self) -> Any:
        """Have the configuration read anew; return what was added, changed, removed."""
        return self.ask("POST", "/reload", 30.0)

    def shutdown(self) -> None:
        """Ask for the end of everything; returns before that has come."""
        self.ask("POST", "/shutdown")

    def wait_healthy(self, timeout: float = 30.0) -> None:
        """Wait until all that is wanted is well; else raises SupervisorError."""
        end = time.monotonic() + timeout
        while (answer := self.health())["status"] != "ok":
            if time.monotonic() >= end:
                reasons = "; ".join(map(": ".join, answer["programs"].items()))
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
            lines = [f"{to_toml(key)} = {to_toml(config[key])}\n" for key in config]
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(lines)
        else:
            path = os.fspath(config)
        lifeline, hold = os.pipe()
        private = f"--private={folder}/s,{lifeline}"
        argv = [sys.executable, os.path.abspath(__file__), private, "-c", path]
        try:
            null = subprocess.DEVNULL
            popen = subprocess.Popen(argv, stdin=null, pass_fds=[lifeline])
            try:
                client = Client(f"unix:{folder}/s")
                wait_for(client, popen)
                yield client
            finally:
                os.close(hold)  # the only one: the supervisor sees the end of file
                popen.wait()
        finally:
            os.close(lifeline)


def wait_for(client: Client, popen: subprocess.Popen[bytes]) -> None:
    """Wait until a supervisor answers; raises SupervisorError if it does not."""
    end = time.monotonic() + START_TIME
    while True:
        try:
            client.status()
            return
        except Unreachable:
            if popen.poll() is not None:
                text = f"the supervisor ended with exit status {popen.returncode}"
                raise SupervisorError(text) from None
            if time.monotonic() >= end:
                raise
            time.sleep(POLL)


def to_toml(value: Any) -> str:
    """Return a value, or a key, as TOML; tables inline."""
    import json

    if isinstance(value, Mapping):
        pairs = [f"{to_toml(key)} = {to_toml(value[key])}" for key in value]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def find_clients(options: Any) -> Iterator[Client]:
    """Yield the clients to try: of -s, else -c, the environment, the default file."""
    server = os.environ.get("SUPERVISOR_SERVER_URL", "")
    server = options.server or (server if not options.configfile else "")
    path = options.configfile or DEFAULT_FILE
    values: dict[str, Any] = {}  # a verb works while the file is broken
    with contextlib.suppress(ConfigError):
        values = read_table(Config, read_toml(path), str, [], original_environ())
    if server:
        yield Client(server, own_token(values))
        return
    if not os.path.exists(path):
        values["listen"] = ()  # who listens on the default address is another one
    addresses = []
    with contextlib.suppress(OSError):
        control = control_path(values.get("control", "auto"), os.path.realpath(path))
        addresses += [f"unix:{control}"] if control else []
    for address in filter(None, values.get("listen", ("localhost:3000",))):
        place = address.replace("0.0.0.0", "127.0.0.1")
        addresses.append(f"127.0.0.1{place}" if place.startswith(":") else place)
    for address in addresses:
        with contextlib.suppress(SupervisorError):
            yield Client(address, own_token(values))


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


def as_list(answer: Any) -> list[dict[str, Any]]:
    return answer if isinstance(answer, list) else [answer]


def print_json(options: Any, content: object) -> bool:
    """Print JSON where --json asks for it; return whether it did."""
    import json

    if options.json:
        print(json.dumps(content, indent=2))
    return bool(options.json)


def do_status(client: Client, options: Any) -> int:
    objects = as_list(client.status(",".join(options.names) or None))
    if not print_json(options, objects):
        width = max([len(one["name"]) for one in objects], default=0)
        coloured = not os.environ.get("NO_COLOR") and sys.stdout.isatty()
        for one in objects:
            state, code = f"{one['state']:<9}", STATE_COLOURS.get(one["state"])
            state = f"\033[{code}m{state}\033[0m" if code and coloured else state
            print(f"{one['name']:<{width}}   {state} {one['description']}".rstrip())
    unwell = client.health()["programs"]
    return 3 if any(one["name"] in unwell for one in objects) else 0


def do_health(client: Client, options: Any) -> int:
    answer = client.health(",".join(options.names) or None)
    if not print_json(options, answer):
        print(answer["status"], *map(": ".join, answer["programs"].items()), sep="\n")
    return 0 if answer["status"] == "ok" else 1


def do_order(client: Client, options: Any) -> int:
    """Start, stop or restart, and say what came of it."""
    verb, names, code = options.verb, ",".join(options.names), 0
    before = {one["name"]: one for one in as_list(client.status(names))}
    objects = as_list(client.order(verb, names, 0 if options.no_wait else options.t))
    print_json(options, objects)
    for one in objects:
        name = one["name"]
        if one["state"] == "EXITED" and client.health(name)["status"] == "ok":
            one["ready"] = True
        text, done = describe_outcome(before.get(name, one), one, options)
        if not options.json:
            print(f"{name}: {text}", file=sys.stdout if done else sys.stderr)
        code = code if done else 1
    return code


def describe_outcome(
    before: dict[str, Any], after: dict[str, Any], options: Any
) -> tuple[str, bool]:
    """Return what became of an order in words, and whether it is what was asked for."""
    verb, state, pid, reason = (
        options.verb,
        after["state"],
        after["pid"],
        after["reason"],
    )
    reason = f", {reason}" if reason else ""
    if verb == "stop":
        if before["state"] == "STOPPED":
            return "not running", True
        if not after["running"] and state != "WAITING":
            return f"stopped{reason}", True
    elif after["ready"]:
        if verb == "start" and pid is not None and before["pid"] == pid:
            return "already running", True
        return f"started, pid {pid}" if pid else f"done{reason}", True
    elif state in ("BACKOFF", "FATAL", "EXITED", "STOPPED"):
        return f"{state}{reason}", False
    if options.no_wait:
        return f"{verb} requested, {state}", True
    return f"{state} after {options.t:g} s{reason}", False


def do_signal(client: Client, options: Any) -> int:
    """Send a signal; its name is checked by `check_names`."""
    objects = as_list(client.signal(",".join(options.names[1:]), options.names[0]))
    for one in objects:
        text, file = "signalled", sys.stdout
        if not one["running"]:
            text, file = "not running", sys.stderr
        print(f"{one['name']}: {text}", file=file)
    return 0 if all(one["running"] for one in objects) else 1


def do_logs(client: Client, options: Any) -> int:
    """Print the newest lines; with several programs, each line with its name."""
    objects = as_list(client.status(",".join(options.names) or None))
    names = [one["name"] for one in objects]
    width = max(map(len, names), default=0)
    failed: list[str] = []

    def copy(name: str) -> None:
        prefix = f"{name:<{width}} | ".encode() if len(names) > 1 else b""
        try:
            with client.open_logs(name, options.n, int(options.f)) as response:
                parts = iter(lambda: response.read1(65536), b"")
                for part in response if prefix else parts:
                    os.write(1, prefix + part)
        except Refused as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
        except OSError:
            return  # the supervisor is gone, or nobody reads on

    copies = [threading.Thread(target=copy, args=[one], daemon=True) for one in names]
    for thread in copies:
        thread.start()
        if not options.f:
            thread.join()
    for thread in copies:
        thread.join()
    return 1 if failed and len(failed) == len(names) else 0


def do_reload(client: Client, options: Any) -> int:
    answer = client.reload()
    if print_json(options, answer):
        return 0
    for key in ("added", "changed", "removed"):
        for name in answer[key]:
            print(f"{name}: {key}")
    print(f"{answer['unchanged']} unchanged")
    late = "takes effect when the supervisor is started again"
    for key in answer.get("needs_restart", ()):
        print(f"{key}: {late}", file=sys.stderr)
    return 0


def do_shutdown(client: Client, options: Any) -> int:
    """Ask for the end, and wait: the stream of events ends with the supervisor."""
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
        with contextlib.suppress(Refused):
            try:
                client.ask("GET", "/health/live")
            except Unreachable:
                print("shut down")
                return 0
        time.sleep(POLL)
    print(f"not yet shut down after {options.t:g} s", file=sys.stderr)
    return 1


class Verb(NamedTuple):
    """What a verb does, how many words it takes, and which options."""

    run: Callable[[Client, Any], int]
    least: int = 0
    most: float = float("inf")
    takes: str = ""


ORDER = Verb(do_order, 1, takes="--json --no-wait -t")
VERBS = {
    "health": Verb(do_health, takes="--json"),
    "logs": Verb(do_logs, takes="-f -n"),
    "reload": Verb(do_reload, most=0, takes="--json"),
    "restart": ORDER,
    "shutdown": Verb(do_shutdown, most=0, takes="--no-wait -t"),
    "signal": Verb(do_signal, 2),
    "start": ORDER,
    "status": Verb(do_status, takes="--json"),
    "stop": ORDER,
}


def parse_arguments(arguments: list[str]) -> Any:
    """Return the options; exits with 2 on a bad command line, with 0 after --help."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def format_help(self) -> str:
            return HELP + "\n"

        def error(self, message: str) -> typing.NoReturn:
            sys.stderr.write(f"supervisors: {message} (see --help)\n")
            raise SystemExit(1 if "health" in arguments else 2)

    parser = Parser(prog="supervisors.py", allow_abbrev=False)
    add = parser.add_argument
    add("-c", "--configfile")
    add("-s", "--server")
    add("-v", dest="level", action="store_const", const="debug", default="info")
    add("-q", dest="level", action="store_const", const="warning")
    add("--private", default="")  # of `running`
    add("--version", action="version", version=f"supervisors {__version__}")
    own = {"-t": add("-t", type=float, default=60.0)}
    own["-n"] = add("-n", type=int, default=100)
    for flag in ("--json", "--no-wait", "-f"):
        own[flag] = add(flag, action="store_true")
    add("names", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    first = options.names[0] if options.names else ""
    options.verb = options.names.pop(0) if first in (*VERBS, "check") else ""
    takes = VERBS[options.verb].takes if options.verb in VERBS else ""
    for flag, action in own.items():
        if (
            getattr(options, action.dest) != action.default
            and flag not in takes.split()
        ):
            parser.error(f"unrecognized arguments: {flag}")
    check_names(parser, options)
    return options


def check_names(parser: Any, options: Any) -> None:
    """Refuse too few or too many names; make a CONFIG of what is one."""
    verb, names = options.verb, options.names
    if verb not in VERBS:
        if len(names) > 1 or (names and options.configfile):
            parser.error(f"expected one CONFIG, got {names[-1]!r} as well")
        options.configfile = options.configfile or (names or [DEFAULT_FILE])[0]
    elif len(names) < VERBS[verb].least:
        parser.error(f"{verb}: expected {'SIGNAL ' * (verb == 'signal')}NAME...")
    elif len(names) > VERBS[verb].most:
        parser.error(f"{verb}: expected no name, got {names[0]!r}")
    if verb == "signal":
        try:
            signal_number(names[0])
        except ValueError as error:
            parser.error(f"signal: {error}")
    if not 0 <= options.t <= MOST_WAIT:
        parser.error(f"-t: expected from 0 to {MOST_WAIT:g} seconds")


def run_file(options: Any) -> int:
    """Run the programs of a file; return the exit status."""
    path, lifeline, overrides = options.configfile, None, {}
    config = load_config(path)
    if options.private:
        control, _, fd = options.private.rpartition(",")
        lifeline, overrides = int(fd), {"control": control}
        if "listen" not in read_toml(path):
            overrides["listen"] = ()
    return Supervisor(config, options.level, lifeline, overrides).run()


def main(arguments: list[str]) -> int:
    """Do what a command line says; return the exit status."""
    options = parse_arguments(arguments)
    verb = options.verb
    if verb:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        if verb in VERBS:
            return VERBS[verb].run(connect(options), options)
        if not verb:
            return run_file(options)
        config = load_config(options.configfile)
        print(f"{options.configfile}: ok, {len(config.programs)} programs")
        return 0
    except SupervisorError as error:
        lines = error.errors or [f"supervisors: {error}"]
        print(*lines, sep="\n", file=sys.stderr)
        return 1 if verb == "health" else error.code if verb else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the interpreter's last flush
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
