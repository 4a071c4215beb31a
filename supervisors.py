#!/usr/bin/env python3
"""Run, restart, log and watch the programs of a TOML file; be the init of a container.

Copy this file anywhere; it needs Python 3.11 and nothing else.

    example: python3 supervisors.py supervisors.toml

    supervisors.py [CONFIG]                 run the programs of CONFIG
    supervisors.py check [CONFIG]           validate CONFIG, print every error
    supervisors.py status|health [NAME...]  what runs; exit 0 when it is well
    supervisors.py start|stop|restart [--no-wait] [-t SECONDS] NAME...
    supervisors.py signal SIGNAL NAME...    NAME: a program, a group, 'web:*', or all
    supervisors.py logs [-f] [-n LINES] [NAME...]
    supervisors.py reload|shutdown          read CONFIG anew; stop everything
    supervisors.py [-c] [-r SIG:SIG] [--grace SECONDS] -- COMMAND [ARG...]
                                            be the init of one command

    -c, --configfile FILE   CONFIG (supervisors.toml); in init mode: --single-child
    -s, --server ADDRESS    the supervisor to ask: unix:PATH or HOST:PORT
    -v, -q                  debug messages; warnings and errors only
    --json (of status), --version, --help

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

1.  The core (configuration, state machine, log text) does no I/O and reads no clock.
2.  The main thread owns every program's state; the log thread owns pipes and log files;
    HTTP threads read published, immutable statuses, and ask the main thread for more.
3.  Every state that waits owns a deadline or names the event that it waits for.
"""

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 11):
    sys.stderr.write("supervisors needs Python 3.11 or newer\n")
    sys.exit(2)

import signal
import time

__version__ = "1.0"
__all__ = ["Client", "Config", "ConfigError", "Program", "State", "Status"]
__all__ += ["Supervisor", "SupervisorError", "load_config", "running"]


# === 1. Init mode =====================================================================
#
# One command, and what an init owes it: signals are passed on, the terminal is handed
# over, orphans are reaped, and what the command leaves behind is ended. All signals are
# blocked and taken one by one with sigwait(3); a blocked one is queued even for PID 1,
# whose default actions the kernel ignores (pid_namespaces(7)). It stands first because
# compiling the file takes most of the 25 ms that a container's start may cost.

GRACE = 3.0  # seconds that what a command leaves behind has between TERM and KILL
TICK = 0.05  # seconds between two looks at what is left, while something is
SIGNALS = signal.valid_signals()
STOPS = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
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
    """Return the environment without the LC_CTYPE that CPython may add (PEP 538)."""
    environ = dict(os.environ)
    try:
        with open("/proc/self/environ", "rb") as file:
            ours = b"\0LC_CTYPE=" not in b"\0" + file.read()
    except OSError:
        ours = environ.get("LANG", "") in ("", "C", "POSIX")
    if ours and environ.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        del environ["LC_CTYPE"]
    return environ


def become_subreaper() -> bool:
    """Have orphaned descendants become our children, not those of PID 1, if we can."""
    if os.getpid() == 1:
        return True
    try:
        import ctypes  # 2 ms, and only needed here

        return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def process_fields(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat behind the name (proc(5)); [] if it is gone.

    [0] is the state, [1] the parent, [2] the group, [3] the session, [19] the start in
    ticks since boot.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def process_table() -> dict[int, list[bytes]]:
    """Return the fields of all processes by pid; empty where there is no /proc."""
    names = os.listdir("/proc") if os.path.isdir("/proc") else []
    table = {int(name): process_fields(int(name)) for name in names if name.isdecimal()}
    return {pid: fields for pid, fields in table.items() if fields}


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


def group_lives(group: int) -> bool:
    """Return whether a group has more than zombies, which kill(2) counts too."""
    if not send(-group, 0):
        return False
    table = process_table()
    members = [fields for fields in table.values() if int(fields[2]) == group]
    return not table or any(fields[0] not in (b"Z", b"X") for fields in members)


def send(pid: int, number: int) -> bool:
    """Send a signal to a process, to a group as -PGID; return whether it was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False  # it ended first, which is normal
    except PermissionError:
        pass  # a set-user-ID program: it is there, and not ours to signal
    return True


def say(text: str) -> None:
    print(f"supervisors: {text}", file=sys.stderr)


def attempt(call: Callable[..., Any], *arguments: object) -> Any:
    """Call something whose failure, as a lost terminal's, is no harm: it gives -1."""
    try:
        return call(*arguments)
    except OSError:
        return -1


class Init:
    """One command under an init. `run` returns the exit status; main thread, once."""

    def __init__(self, arguments: list[str]) -> None:
        """Take what stands around `--`; without that in front there is no `command`.

        Raises ValueError. By hand: argparse alone takes 8 ms to import.
        """
        self.command: list[str] = []
        self.rewrites: dict[int, int] = {}
        self.single, self.grace = False, GRACE
        self.pid, self.target, self.terms, self.foreground = 0, 0, 0, False
        self.code: int | None = None
        words = iter(arguments)
        for option, equals, value in (word.partition("=") for word in words):
            if option == "--" and not equals:
                self.command = list(words)
                if not self.command:
                    raise ValueError("no command behind --")
            elif option in ("-c", "--single-child"):
                self.single = True
            elif option in ("-r", "--rewrite"):
                old, _, new = (value if equals else next(words, "")).partition(":")
                source = signal_number(old)
                if source in (signal.SIGKILL, signal.SIGSTOP):
                    raise ValueError(f"{old} cannot be caught or rewritten")
                self.rewrites[source] = 0 if new == "0" else signal_number(new)
            elif option == "--grace":
                self.grace = float(value if equals else next(words, ""))
                if not self.grace >= 0:
                    raise ValueError(
                        f"--grace: expected seconds >= 0, got {self.grace}"
                    )
            else:
                return

    def run(self) -> int:
        inherited = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if not become_subreaper() and sys.platform == "linux":
            say("cannot become a subreaper: orphans go to PID 1")
        self.foreground = attempt(os.tcgetpgrp, 0) == os.getpgrp()
        here = attempt(os.open, ".", os.O_RDONLY | os.O_DIRECTORY)
        if here >= 0:  # else unreadable or removed: the command stays here with us
            os.chdir("/")  # no mount is kept busy
        self.pid = os.fork()
        if self.pid == 0:
            self.become_command(here, inherited)
        self.target = self.pid if self.single else -self.pid
        # Here as well: whoever of the two is first. It may have called exec since.
        attempt(os.setpgid, self.pid, self.pid)
        while self.code is None:
            self.pass_on(signal.sigwait(SIGNALS))
        self.sweep()
        if self.foreground:
            attempt(os.tcsetpgrp, 0, os.getpgrp())
        return self.code

    def become_command(self, here: int, inherited: Any) -> None:
        """Turn this forked process into the command. Never returns."""
        code, name = 126, self.command[0]
        try:
            os.setpgid(0, 0)
            if self.foreground:
                attempt(os.tcsetpgrp, 0, os.getpid())
            if here >= 0:
                os.fchdir(here)
            # The interpreter ignores two signals for itself, and handles SIGINT.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, inherited)
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
        wanted = self.rewrites.get(number, number)
        if number == signal.SIGCHLD:
            self.reap()
        elif wanted == signal.SIGCONT:
            self.resume()
        elif wanted:
            # The kernel ignores these for an orphaned group; SIGSTOP it does not.
            stop = wanted in STOPS and not self.single
            send(self.target, signal.SIGSTOP if stop else wanted)
            if number in STOPS:
                os.kill(os.getpid(), signal.SIGSTOP)
                self.resume()

    def resume(self) -> None:
        """Hand the terminal over again, if it is ours to give, and pass CONT on."""
        group = attempt(os.tcgetpgrp, 0)
        if group == os.getpgrp():
            attempt(os.tcsetpgrp, 0, self.pid)
        self.foreground = group in (os.getpgrp(), self.pid)  # else we are a job of `bg`
        send(self.target, signal.SIGCONT)

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
                # Stop with the command, but where no shell of our session could
                # continue us, as the kernel ignores Ctrl-Z for an orphaned group.
                parent = os.getppid()
                if os.getpid() != 1 and parent and os.getsid(parent) == os.getsid(0):
                    os.kill(os.getpid(), signal.SIGSTOP)
                self.resume()
            elif pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code

    def sweep(self) -> None:
        """End what the command left: TERM, `grace` seconds, KILL.

        Orphans are children by then; without a subreaper only the group is known, and
        its end makes no SIGCHLD: hence the ticks.
        """
        # A stopped process takes its TERM only when it is continued.
        numbers: list[int] = [signal.SIGTERM, signal.SIGCONT]
        self.terms = 0
        kill_at = time.monotonic() + self.grace
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        while self.reap() or send(-self.pid, 0):
            now = time.monotonic()
            kill_at = min(kill_at, now) if self.terms >= 2 else kill_at
            if now >= kill_at + 1.0:
                return  # it is in the kernel's hands
            if now >= kill_at:
                numbers = [signal.SIGKILL]
            pids = [-1]  # all that PID 1 may signal, itself excepted
            if numbers and os.getpid() != 1:
                pids = [-self.pid, *descendants(os.getpid())]
            for number in numbers:
                for pid in pids:
                    send(pid, number)
            number = signal.sigwait(SIGNALS)
            self.terms += number == signal.SIGTERM
            numbers = [] if number in (signal.SIGCHLD, signal.SIGALRM) else [number]


if __name__ == "__main__":
    try:
        _init = Init(sys.argv[1:])
    except ValueError as _error:
        say(str(_error))
        sys.exit(2)
    if _init.command:
        sys.exit(_init.run())
    # A signal to PID 1 is lost until there is a handler, unless it is blocked: then it
    # waits. `Supervisor` unblocks these, and `main` for the verbs.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})

import contextlib
import enum
import errno
import fcntl
import functools
import io
import re
import select
import selectors
import shlex
import socket
import stat
import subprocess
import termios
import threading
import tomllib
import typing
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
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
LETTERS = "letters, digits, '_', '-', '.', and not 'all'"
SIZE = re.compile(r"\A(\d+)\s*([KMG]?)B?\Z", re.IGNORECASE)
TABLES = ("programs", "defaults")  # whose strings are expanded program by program
NOWHERE = "/dev/null"
TERMINALS = {"/dev/stdout": 1, "/dev/stderr": 2}  # by descriptor, never opened by path
PLACE = "HOST:PORT with a number for HOST, [V6]:PORT, :PORT or unix:PATH"

Table = Mapping[str, Any]
Variables = Mapping[str, str]


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


class Address(NamedTuple):  # a unix socket's path, or host and port
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
    """Return the address of a PLACE or a URL, without a look-up; raises ValueError."""
    if unix := re.fullmatch(r"unix:([^\0]+)", text):
        return Address(path=re.sub("^/+", "/", unix[1]))
    match = re.fullmatch(r"(?:http://)?(?:\[(.+)\]|([^:/]*)):(\d{1,5})/?", text)
    if match and int(match[3]) <= 65535:
        host = match[1] or match[2] or "::"
        host = "127.0.0.1" if host == "localhost" else host
        with contextlib.suppress(OSError, ValueError):
            socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
            return Address(host=host, port=int(match[3]))
    raise ValueError(f"expected {PLACE}, got {text!r}")


class Check(NamedTuple):  # what a key accepts, once it is converted
    expects: str
    accepts: Callable[[Any], object]
    convert: Callable[[Any], object] = lambda value: value


@functools.cache
def declared(kind: type) -> dict[str, tuple[str, Check]]:
    """Return the fields of a tuple class and their checks, by TOML key."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        # In TOML `group` is the user's, in the status that of a program's instances.
        field.replace("group_name", "group"): (field, check)
        for field, hint in hints.items()
        for part in (hint, *typing.get_args(hint))  # of `Path | None`, the path
        for check in getattr(part, "__metadata__", ())
    }


def hint(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?`, or nothing if no known name is near."""
    import difflib  # only for somebody's mistake

    near = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {near[0]!r}?" if near else ""


def expand(value: Any, variables: Variables) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in all strings; `$${` gives `${`."""

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        if match[0] == "$${":
            return "${"
        if name not in variables and default is None:
            raise ConfigError(
                [f": {match[0]} is not set; write $${{ for a literal ${{"]
            )
        return variables.get(name) or default or ""

    if isinstance(value, list):
        return [expand(one, variables) for one in value]
    if isinstance(value, dict):
        return {key: expand(one, variables) for key, one in value.items()}
    return VARIABLE.sub(replace, value) if isinstance(value, str) else value


def read_table(
    kind: type,
    table: Table,
    locate: Callable[[str], str],
    errors: list[str],
    variables: Variables | None = None,
) -> dict[str, Any]:
    """Return the values of a TOML table by field, and add what is wrong to `errors`.

    `locate` gives a key's dotted path; without `variables` nothing is expanded.
    """
    checks, values = declared(kind), {}
    for key, value in table.items():
        if key not in checks:
            errors.append(f"{locate(key)}: unknown key{hint(key, checks)}")
            continue
        field, check = checks[key]
        try:
            if variables is not None and key not in TABLES:
                value = expand(value, variables)
            found = check.convert(value)
            if not check.accepts(found):
                raise ValueError
            values[field] = tuple(found) if isinstance(found, list) else found
        except ConfigError as error:
            errors += [locate(key) + line for line in error.errors]
        except (AttributeError, TypeError, ValueError):
            got = f"got {value!r:.80}"
            errors.append(f"{locate(key)}: expected {check.expects}, {got}")
    return values


def within(least: float, most: float, *types: type) -> Callable[[Any], bool]:
    """Return a test for a number of a range; NaN is in none, a boolean no number."""
    return lambda one: type(one) in types and least <= one <= most


def list_of(accepts: Callable[[Any], object]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value))


def one_of(*values: object) -> Check:
    known = [repr(value) for value in values]  # 1 == True
    return Check(f"one of {', '.join(known).lower()}", lambda one: repr(one) in known)


def if_text(convert: Callable[[str], object]) -> Callable[[Any], object]:
    return lambda value: convert(value) if isinstance(value, str) else value


def to_size(value: int | str) -> int:
    ((number, unit),) = SIZE.findall(str(value))  # ValueError if it is no size
    return int(number) << 10 * "-KMG".index(unit.upper() or "-")


def to_rlimits(table: Table) -> dict[str, int]:
    """Return limits by the kernel's name for them; -1 is none (setrlimit(2))."""
    import resource

    limits, errors = {}, []
    for name, limit in table.items():
        try:
            getattr(resource, f"RLIMIT_{name.upper()}")
            limits[name] = -1 if limit == "unlimited" else to_size(limit)
        except (AttributeError, ValueError):
            expected = 'expected a limit of setrlimit(2), a size or "unlimited"'
            errors.append(f".{name}: {expected}, got {limit!r:.80}")
    if errors:
        raise ConfigError(errors)
    return limits


def to_health(table: Table) -> Health:
    errors: list[str] = []
    values = read_table(Health, table, ".{}".format, errors)
    if len({"http", "tcp", "command"} & table.keys()) != 1:
        errors.append(": expected one of http, tcp and command")
    if errors:
        raise ConfigError(errors)
    return Health(**values)


is_text, is_path = re.compile(r"[^\0]*").fullmatch, re.compile(r"[^\0]+").fullmatch
is_count, is_seconds = within(0, float("inf"), int), within(0, 1e9, int, float)
is_words, is_id = list_of(is_text), within(0, 2**32 - 2, int)
is_variable = re.compile(r"[^=\0]+").fullmatch
to_list, split = if_text(lambda one: [one]), if_text(shlex.split)

LIST = tuple[str, ...]
TABLE = Check("a table", lambda one: isinstance(one, dict))
PROBE = Check("a table", bool, to_health)
LIMITS = Check("a table of limits", TABLE.accepts, to_rlimits)
VARIABLES = Check(
    "a table of strings",
    lambda one: is_words([*one.values()]) and all(map(is_variable, one)),
)
ARGV = Check("a command", lambda argv: any(argv) and is_words(argv), split)
ADDRESSES = Check(PLACE, list_of(lambda one: one == "" or parse_address(one)), to_list)
INHERIT = Check("true, false or names", lambda one: type(one) is bool or is_words(one))
CODES = Check("a list of codes from 0 to 255", list_of(within(0, 255, int)))
INSTANCES = Check("a whole number from 1 to 10000", within(1, 10_000, int))
USER = Check(
    "a name or a number",
    lambda one: is_id(int(one)) if str(one).isdecimal() else is_path(one),
)
UMASK = Check('octal, as in "022"', within(0, 0o777, int), lambda one: int(one, 8))
RESTART, TYPE = one_of(True, False, "unexpected"), one_of("simple", "oneshot", "notify")
SIGNAL = Check(
    "a signal's name", bool, lambda one: signal.Signals(signal_number(one)).name[3:]
)

Flag = Annotated[bool, one_of(True, False)]
Count = Annotated[int, Check("a whole number >= 0", is_count)]
Positive = Annotated[int, Check("a whole number >= 1", within(1, float("inf"), int))]
Nice = Annotated[int, Check("a whole number from -20 to 19", within(-20, 19, int))]
Size = Annotated[int, Check('bytes, or a string such as "10MB"', is_count, to_size)]
Seconds = Annotated[float, Check("seconds >= 0", is_seconds)]
Interval = Annotated[float, Check("seconds > 0", lambda one: one and is_seconds(one))]
String = Annotated[str, Check("a string", is_text)]
Path = Annotated[str, Check("a path", is_path)]
Url = Annotated[str, Check("a URL", re.compile(r"https?://[^/\0][^\0]*").fullmatch)]
HostPort = Annotated[str, Check("HOST:PORT", re.compile(r"[^\0]+:\d+").fullmatch)]
LogFormat = Annotated[str, one_of("raw", "prefix", "timestamp", "json")]
Ending = Annotated[str, one_of("ignore", "shutdown")]
Words = Annotated[LIST, Check("a list of strings", is_words)]
Some = Annotated[LIST, Check("a string or a list of strings", is_words, to_list)]


class Health(NamedTuple):  # the table `healthcheck`: one of three probes, its times
    http: Url = ""
    tcp: HostPort = ""
    command: Annotated[LIST, ARGV] = ()
    interval: Interval = 10.0
    timeout: Interval = 3.0
    retries: Positive = 3
    start_period: Seconds = 30.0

    @property
    def argv(self) -> tuple[str, ...]:
        return self.command


class Program(NamedTuple):
    """One program, or one instance of it; the fields are the keys of the file."""

    name: str
    group: str
    number: int = 0
    needs: tuple[str, ...] = ()  # `depends_on`, by names of instances
    command: Annotated[LIST, ARGV] = ()
    args: Words = ()
    numprocs: Annotated[int, INSTANCES] = 1
    directory: Path | None = None
    environment: Annotated[Mapping[str, str], VARIABLES] = {}
    env_file: Some = ()
    inherit_env: Annotated[bool | LIST, INHERIT] = True
    user: Annotated[str | int | None, USER] = None
    group_name: Annotated[str | int | None, USER] = None
    umask: Annotated[int | None, UMASK] = None
    nice: Nice | None = None
    rlimits: Annotated[Mapping[str, int], LIMITS] = {}
    autostart: Flag = True
    autorestart: Annotated[bool | str, RESTART] = False
    exitcodes: Annotated[tuple[int, ...], CODES] = (0,)
    startsecs: Seconds = 1.0
    startretries: Count | None = None
    backoff_delay: Seconds = 0.5
    backoff_limit: Seconds = 30.0
    stopsignal: Annotated[str, SIGNAL] = "TERM"
    stopwaitsecs: Seconds = 8.0
    stopasgroup: Flag = True
    type: Annotated[str, TYPE] = "simple"
    watchdog_secs: Interval | None = None
    depends_on: Words = ()
    healthcheck: Annotated[Health | None, PROBE] = None
    on_success: Ending = "ignore"
    on_failure: Ending = "ignore"
    logfile: Path | None = None
    stderr_logfile: Path | None = None
    logfile_maxbytes: Size = 10 * 1024 * 1024
    logfile_backups: Count = 3
    log_format: LogFormat | None = None

    @property
    def argv(self) -> tuple[str, ...]:
        return self.command + self.args


class Config(NamedTuple):
    """A whole configuration; `path` is the file's real path, "" if it has none."""

    path: str = ""
    programs: Annotated[Mapping[str, Program], TABLE] = {}
    defaults: Annotated[Mapping[str, Any], TABLE] = {}  # as they stand
    listen: Annotated[LIST, ADDRESSES] = ("localhost:3000",)
    control: String = "auto"
    token: String = ""
    token_file: String = ""
    allowed_hosts: Words = ()
    include: Words = ()
    exit_when_done: Flag = False
    log_format: LogFormat = "prefix"
    pidfile: Path | None = None
    shutdown_timeout: Seconds | None = None


def read_program(
    name: str, table: Table, defaults: Table, environ: Variables, errors: list[str]
) -> Iterator[Program]:
    """Yield the instances of a program, without the values that are wrong."""

    def locate(key: str) -> str:
        return f"programs.{name}.{key}" if key in table else f"defaults.{key}"

    if not NAME.fullmatch(name) or name == "all":
        errors.append(f"programs.{name}: expected a name of {LETTERS}")
    if not isinstance(table, dict):
        errors.append(f"programs.{name}: expected a table, got {table!r:.80}")
        return
    merged, count, number = {**defaults, **table}, 1, 0
    with contextlib.suppress(KeyError, TypeError):  # unless both are tables
        merged["environment"] = defaults["environment"] | table["environment"]
    if "command" not in table:
        errors.append(f"programs.{name}.command: missing")
    elif "args" in table:  # then a string is the executable itself
        merged["command"] = to_list(table["command"])
    while number < count:
        variables = {**environ, "PROCESS_NUM": str(number)}
        values = read_table(Program, merged, locate, errors, variables)
        count = values.pop("numprocs", 1)  # which is none of an instance's business
        instance = f"{name}:{number}" if count > 1 else name
        program = Program(instance, name, number, **values)
        if program.watchdog_secs is not None and program.type != "notify":
            errors.append(f'programs.{name}.watchdog_secs: expected type "notify"')
        yield program
        number += 1


def resolve(programs: dict[str, Program], errors: list[str]) -> dict[str, Program]:
    """Return the programs with what they need: `depends_on`, by names of instances."""
    members: dict[str, list[str]] = {}
    for name, program in programs.items():
        for key in {name, program.group}:
            members.setdefault(key, []).append(name)
    graph = {}
    for name, program in programs.items():
        for one in program.depends_on:
            if one not in members:
                where = f"programs.{program.group}.depends_on"
                errors.append(f"{where}: no program {one!r}{hint(one, members)}")
        needs = [key for one in program.depends_on for key in members.get(one, ())]
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


def parse_config(
    data: Table, environ: Variables, included: Mapping[str, Table] | None = None
) -> Config:
    """Return what parsed TOML means, `included` by file name; raises ConfigError."""
    errors: list[str] = []
    values = read_table(Config, data, str, errors, environ)
    if values.get("token") and values.get("token_file"):
        errors.append("token_file: expected token or token_file, not both")
    defaults, tables = values.get("defaults", {}), dict(values.pop("programs", {}))
    numbered = {**environ, "PROCESS_NUM": "0"}
    read_table(Program, defaults, "defaults.{}".format, errors, numbered)
    for key in defaults.keys() & {"command", "args"}:
        errors.append(f"defaults.{key}: expected in a program only")
    for file, content in (included or {}).items():
        for key, more in content.items():
            if key != "programs" or not isinstance(more, dict):
                errors.append(f"{file}: {key}: expected tables of programs only")
                continue
            for name in tables.keys() & more.keys():
                errors.append(f"{file}: programs.{name}: defined twice")
            tables.update(more)
    programs: dict[str, Program] = {}
    for name, table in tables.items():
        for program in read_program(name, table, defaults, environ, errors):
            programs[program.name] = program
    if not tables and not errors:
        errors.append("programs: expected at least one program")
    programs = resolve(programs, errors)
    if errors:
        raise ConfigError(errors)
    return Config(programs=programs, **values)


def read_toml(path: str) -> dict[str, Any]:
    """Return a file's content; raises ConfigError with the reason and the place."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError([f"cannot read {path!r}: {error.strerror}"]) from None
    except (ValueError, RecursionError) as error:  # bad UTF-8, too
        raise ConfigError([f"{path}: not TOML: {error}"]) from None


def load_config(path: str = "supervisors.toml") -> Config:
    """Read a configuration and what it includes; raises ConfigError, never exits."""
    data, environ, included = read_toml(path), original_environ(), {}
    for pattern in read_table(Config, data, str, [], environ).get("include", ()):
        import glob  # only where something is included

        for file in sorted(glob.glob(os.path.join(os.path.dirname(path), pattern))):
            included[file] = read_toml(file)
    try:
        config = parse_config(data, environ, included)
    except ConfigError as error:
        raise ConfigError(f"{path}: {line}" for line in error.errors) from None
    except RecursionError:
        raise ConfigError([f"{path}: nested too deeply"]) from None
    return config._replace(path=os.path.realpath(path))


# === 3. State machine =================================================================
#
# A program's life as values: whether it comes back, and when, is decided here only.
#
# A run ends in two moments: its leader is reaped (Exited), and its process group is
# empty (at once, as a rule; else Emptied). Only then is the end judged, so no program
# runs twice. Until then it is STOPPING; `after` says what comes next: the last order.


class State(enum.Enum):
    """supervisord's states, and WAITING: for what it depends on."""

    STOPPED, WAITING, STARTING = "STOPPED", "WAITING", "STARTING"
    RUNNING, BACKOFF, STOPPING = "RUNNING", "BACKOFF", "STOPPING"
    EXITED, FATAL = "EXITED", "FATAL"


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


class Blocked(NamedTuple):  # what it depends on is not ready; or is: no reason
    reason: str
    cause: str = ""  # "failing": no mere delay; "failed": it will not end by itself


class Checked(NamedTuple):  # a health check passed, or failed
    passed: bool
    detail: str = ""


# The other events.
Start = NamedTuple("Start", [])  # somebody wants it to run
Stop = NamedTuple("Stop", [])  # not to run
Restart = NamedTuple("Restart", [])  # a new run
Due = NamedTuple("Due", [])  # the deadline of the status has come
Spawned = NamedTuple("Spawned", [("pid", int)])
SpawnFailed = NamedTuple("SpawnFailed", [("reason", str), ("code", int)])  # 127 or 126
Exited = NamedTuple(  # the leader was reaped; some of its group may live on
    "Exited", [("code", int | None), ("signal", int | None), ("survivors", bool)]
)
Emptied = NamedTuple("Emptied", [])  # the leader was reaped, its group is empty
Ready = NamedTuple("Ready", [])  # it said READY=1
Alive = NamedTuple("Alive", [])  # it said WATCHDOG=1
Text = NamedTuple("Text", [("text", str)])  # it said STATUS=text
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
    if isinstance(event, (Start, Stop, Restart)):
        return order(program, now, status, event)
    if isinstance(event, Due):
        return due(program, now, status)
    if isinstance(event, Spawned):
        assert state is State.STARTING
        status = status._replace(pid=event.pid, started=now, ran=-1.0, checks_failed=0)
        if program.type == "notify":
            return status._replace(reason=AWAITS_READY), ()
        if program.type == "oneshot" or program.startsecs == 0:
            return status._replace(state=State.RUNNING), ()
        return status._replace(deadline=now + program.startsecs), ()
    if isinstance(event, SpawnFailed):
        assert state is State.STARTING
        status = status._replace(ran=-1.0, exit_code=event.code, exit_signal=None)
        return judge(program, now, status._replace(reason=event.reason))
    if isinstance(event, Exited):
        return exited(program, now, status, event)
    if isinstance(event, Emptied):
        over = state is State.STOPPING
        return settle(program, now, status) if over else (status, ())
    if isinstance(event, Blocked):
        status = status._replace(blocked=event.reason, blocked_as=event.cause)
        return begin(status) if state is State.WAITING else (status, ())
    if isinstance(event, (Ready, Alive)):
        announced = isinstance(event, Ready) and program.type == "notify"
        if announced and state is State.STARTING:
            status = status._replace(state=State.RUNNING, notified=True, reason="")
        if status.state is State.RUNNING and program.watchdog_secs is not None:
            status = status._replace(deadline=now + program.watchdog_secs)
        return status, ()
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


def last_code(status: Status) -> int | None:
    """Return how the last run ended: the code, or 128 plus the signal's number."""
    return status.exit_code if status.exit_signal is None else 128 + status.exit_signal


def exit_status(status: Status) -> int:
    """Return the same for a final end: never 0 for a failure."""
    return last_code(status) or int(has_failed(status))


def order(
    program: Program, now: float, status: Status, event: Start | Stop | Restart
) -> Step:
    """Have it stop, or have a new run: at once, or when the present one is over."""
    runs = status.state in (State.WAITING, State.STARTING, State.RUNNING)
    stops = isinstance(event, Stop)
    if status.state is State.STOPPED if stops else runs and isinstance(event, Start):
        return status, ()
    after = After.STOP if stops else After.START
    if status.state is State.STOPPING:
        return status._replace(after=after), ()
    proceed = halt if status.is_alive else settle
    return proceed(program, now, status._replace(after=after, reason=""))


def begin(status: Status, automatic: bool = False) -> Step:
    """Start a run, or wait for what it depends on."""
    state = State.WAITING if status.blocked else State.STARTING
    status = status._replace(state=state, deadline=None, notified=False, status_text="")
    restarts = status.restarts + automatic
    status = status._replace(restarts=restarts, reason=status.blocked)
    return status, () if status.blocked else (Spawn(),)


def halt(program: Program, now: float, status: Status) -> Step:
    """Ask a run to end; its status says already why, and what comes after."""
    deadline = now + program.stopwaitsecs
    status = status._replace(state=State.STOPPING, deadline=deadline)
    return status, (Signal(program.stopsignal),)


def due(program: Program, now: float, status: Status) -> Step:
    """Do what the deadline of a state was for, if it has come."""
    if status.deadline is None or now < status.deadline:
        return status, ()
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


def exited(program: Program, now: float, status: Status, event: Exited) -> Step:
    assert status.is_alive
    status = status._replace(pid=None, ran=now - status.started)
    status = status._replace(exit_code=event.code, exit_signal=event.signal)
    actions: tuple[Action, ...] = ()
    if status.state is not State.STOPPING:
        status = status._replace(after=After.JUDGE, reason=describe_end(status))
        status, actions = halt(program, now, status)
    if not event.survivors:
        return settle(program, now, status)
    if program.stopasgroup:
        return status, actions
    return status._replace(deadline=now + KILL_AGAIN), (Kill(),)


def settle(program: Program, now: float, status: Status) -> Step:
    """Decide what follows a run that is over, its whole group gone."""
    if status.after in (After.JUDGE, After.FAIL):
        return judge(program, now, status)
    status = status._replace(deadline=None, healthy=None, failures=0)
    if status.after is After.START:
        return begin(status)
    return status._replace(state=State.STOPPED), ()


def judge(program: Program, now: float, status: Status) -> Step:
    """Decide whether and when a program that ended unasked comes back.

    An expected end after `startsecs` is no failure. Any other is; the first after
    `startsecs` is forgiven, then the waits double, and only a run of `backoff_limit`
    starts the count anew, so that a slow crash loop trips as well.
    """
    executed = status.ran >= 0
    expected = executed and exit_status(status) in program.exitcodes
    expected = expected and status.after is not After.FAIL
    status = status._replace(deadline=None, healthy=None, succeeded=expected)
    if program.autorestart is False or (expected and program.autorestart is not True):
        return status._replace(state=State.EXITED if executed else State.FATAL), ()
    announced = program.type != "notify" or status.notified
    stayed_up = announced and status.ran >= program.startsecs
    if expected and stayed_up:
        return begin(status._replace(failures=0), automatic=True)
    failures = 1 + (status.failures if status.ran < program.backoff_limit else 0)
    status = status._replace(failures=failures)
    if program.startretries is not None and failures > program.startretries:
        return status._replace(state=State.FATAL), ()
    if failures == 1 and stayed_up:
        return begin(status, automatic=True)
    doublings = min(failures - 1, 60)  # 2**60 seconds is beyond every limit
    wait = min(program.backoff_delay * 2.0**doublings, program.backoff_limit)
    # So that a fleet does not restart in step; importing `random` would cost too much.
    factor = 0.9 + hash((program.name, failures, now)) % 2001 / 10_000
    return status._replace(state=State.BACKOFF, deadline=now + wait * factor), ()


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


def checked(program: Program, now: float, status: Status, event: Checked) -> Step:
    check, failed = program.healthcheck, status.checks_failed + 1
    if check is None or status.state not in (State.STARTING, State.RUNNING):
        return status, ()
    if event.passed:
        silent = program.type == "notify" and status.state is State.STARTING
        reason = AWAITS_READY if silent else ""
        return status._replace(healthy=True, checks_failed=0, reason=reason), ()
    # As in Compose, the start period ends with the first check that passes.
    if status.healthy is None and now < status.started + check.start_period:
        return status._replace(reason=f"not yet healthy: {event.detail}"), ()
    status = status._replace(checks_failed=failed)
    if failed < check.retries:
        return status._replace(reason=f"check failed: {event.detail}"), ()
    reason = f"unhealthy: {event.detail}"
    status = status._replace(healthy=False, after=After.FAIL, reason=reason)
    return (status, ()) if program.autorestart is False else halt(program, now, status)


def verdict(program: Program, status: Status) -> str:
    """Return "ok", "starting" or "failing"; "" for one that does not count.

    Those do not count that were stopped on purpose or have ended as they should.
    """
    state = status.state
    if state is State.STOPPED or (state is State.EXITED and status.succeeded):
        return ""
    if state is State.STOPPING:
        return {After.STOP: "", After.FAIL: "failing"}.get(status.after, "starting")
    waits_in_vain = state is State.WAITING and status.blocked_as
    if waits_in_vain or status.healthy is False or has_failed(status):
        return "failing"
    passes = program.healthcheck is None or status.healthy
    started = "ok" if state is State.RUNNING and passes else "starting"
    return "failing" if state is State.BACKOFF else started


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
    label = f"{name:<{width}}"
    prefix = f"{label} | " if colour is None else f"\033[{colour}m{label} |\033[0m "
    start, stamped = prefix.encode(), log_format == "timestamp"

    def add_prefix(lines: bytes, now: float) -> bytes:
        head = timestamp(now).encode() + b" " + start if stamped else start
        return head + lines[:-1].replace(b"\n", b"\n" + head) + b"\n"

    if log_format != "json":
        return add_prefix
    import json  # only where it is the format

    encode = json.JSONEncoder(ensure_ascii=False).encode

    def make_objects(lines: bytes, now: float) -> bytes:
        fields = {"time": timestamp(now), "program": name, "stream": stream}
        head = encode(fields)[:-1] + ', "message": '
        texts = lines[:-1].decode(errors="replace").split("\n")
        return "".join(f"{head}{encode(text)}}}\n" for text in texts).encode()

    return make_objects


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
    return Route(target, chosen, path == NOWHERE or (chosen == "raw" and unlimited))


# === 5. Log files =====================================================================
#
# One thread owns every pipe and every log file, so a slow disk or a stopped terminal
# delays output and nothing else. It reads into one reused buffer, makes a pipe larger
# that it finds full, and naps after a pass that moved little, so that the next one
# finds more: for lines of 100 bytes fewer wake-ups by a hundred, a tenth of the CPU.

BUFFER = 1024 * 1024  # bytes; also what a busy pipe is enlarged to
PIPE = 64 * 1024  # bytes that a pipe holds as it comes (pipe(7))
NAP = 0.001  # seconds
LITTLE = 256 * 1024  # bytes moved in a pass, below which a nap is worth it
SAY_AGAIN = 60.0  # seconds between two complaints about one file
HELD = 1024 * 1024  # bytes that wait for a terminal that nobody reads; then they drop
REMEMBERED = 64 * 1024  # bytes of a piped program's output that stay in memory
LAG = 1024 * 1024  # bytes that a follower may be behind
ITEM = 64  # bytes that each costs besides its text
FAREWELL = 1.0  # seconds that the last output has at the end


class Lagged(Exception):
    """A follower was too slow: what it would read next is gone."""


class Feed(Generic[T]):
    """The newest items of something, which any thread may append to and follow.

    Items are counted from 0. `limit` bounds the sum of their sizes, or `lag` while
    somebody follows: that is how far a follower may be behind.
    """

    def __init__(self, limit: int, lag: int) -> None:
        self.limit, self.lag = limit, lag
        self.items: deque[tuple[int, T]] = deque()
        self.size = self.followers = 0
        self.end = 0  # the number of the next item
        self.closed = False
        self.changed = threading.Condition()

    def append(self, item: T, size: int = 1) -> None:
        with self.changed:
            self.items.append((size, item))
            self.end += 1
            self.size += size
            most = self.lag if self.followers else self.limit
            while self.size > most and len(self.items) > 1:
                self.size -= self.items.popleft()[0]
            self.changed.notify_all()

    def read(self, after: int, timeout: float) -> tuple[list[T], int]:
        """Wait for items from number `after` on; return them, and the next's number.

        They are none at the timeout, and when the feed is closed. Raises Lagged.
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
        self.dropped = 0  # bytes
        # The newest lines by stream, where no file keeps them.
        self.recent: Feed[tuple[str, bytes]] = Feed(REMEMBERED, LAG)


class Sink:
    """Where lines go. `put` writes a piece and returns its length, 0 to wait."""

    def __init__(self, name: str, fd: int = -1) -> None:
        self.name, self.fd = name, fd
        self.maxbytes = self.backups = 0
        self.complained = float("-inf")
        self.torn = False  # in the middle of a line
        self.held = memoryview(b"")  # what it did not take yet
        self.waiting: list[Source] = []  # not read while something is held

    def put(self, data: memoryview) -> int:
        raise NotImplementedError

    def reopen(self) -> None:
        """Let go of the file; the next write opens it anew."""


class FileSink(Sink):
    """A log file, rotated at `maxbytes` on a line boundary; 0 never rotates."""

    is_regular = False
    size = 0
    searched = 0  # so many bytes at its beginning hold no line end

    def put(self, data: memoryview) -> int:
        self.check()
        fits = len(data)
        if self.is_regular and 0 < self.maxbytes < self.size + fits:
            room = max(self.maxbytes - self.size, 0)
            fits = bytes(data[:room]).rfind(b"\n") + 1
            if not fits:
                self.rotate(self.line_start())
                fits = bytes(data).find(b"\n") + 1 or len(data)
        return os.write(self.fd, data[:fits])

    def check(self) -> None:
        """Open the file, anew if it was removed; learn what its size is now."""
        if self.fd >= 0 and not os.fstat(self.fd).st_nlink:
            self.reopen()
        if self.fd < 0:
            self.fd, self.is_regular = open_log(self.name, os.O_RDWR)
        self.size = os.fstat(self.fd).st_size  # it may have been truncated
        if self.size < self.searched:
            self.searched = 0

    def line_start(self) -> int:
        """Return where the file's unfinished line begins; its size if it has none."""
        end = self.size
        while end > self.searched:
            start = max(end - PIPE, self.searched)
            found = os.pread(self.fd, end - start, start).rfind(b"\n") + 1
            if found:
                return start + found
            end = start
        self.searched = self.size
        return 0

    def rotate(self, start: int) -> None:
        """web.log -> web.log.1 -> ... -> web.log.N; without backups, start over.

        The unfinished line at `start` moves on, so that none is split; and a file that
        is nothing but that stays.
        """
        if start == 0:
            return
        line = os.pread(self.fd, self.size - start, start)
        os.ftruncate(self.fd, start if self.backups else 0)
        names = [self.name, *(f"{self.name}.{n + 1}" for n in range(self.backups))]
        for older, newer in zip(names[:0:-1], names[-2::-1]):
            if os.path.lexists(newer):
                # Renaming over it, ext4 would first write the new one to the disk (its
                # auto_da_alloc): at 64 KB writes that halves what the log takes.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(older)
                os.rename(newer, older)
        self.reopen()
        self.check()
        os.write(self.fd, line)

    def reopen(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.searched = -1, 0


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
    written to only as much as it certainly takes.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(f"descriptor {fd}", fd)
        # A terminal that poll(2) calls writable may take less, and then block; a
        # description of our own can be non-blocking without the shell's being it.
        with contextlib.suppress(OSError):
            path = os.ttyname(fd)
            fd = self.fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        self.poll = select.poll()
        self.poll.register(fd, select.POLLOUT)
        self.takes = select.PIPE_BUF  # when poll(2) calls it writable
        self.capacity = 0  # of a pipe; it takes all of that when it is empty
        with contextlib.suppress(OSError, AttributeError):  # F_GETPIPE_SZ: Linux
            if stat.S_ISREG(os.fstat(fd).st_mode):
                self.takes = BUFFER
            self.capacity = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)

    def put(self, data: memoryview) -> int:
        room = self.takes if self.poll.poll(0) else 0
        if self.capacity and not any(fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4))):
            room = self.capacity
        with contextlib.suppress(BlockingIOError):  # somebody made it non-blocking
            return os.write(self.fd, data[:room])
        return 0


class Source(NamedTuple):
    """The read end of one pipe, and what becomes of the bytes."""

    fd: int
    sink: Sink
    output: Output
    recent: Feed[tuple[str, bytes]] | None
    stream: str
    format_lines: Format | None
    whole_lines: bool  # others write to the same place


class LogThread:
    """The thread that owns pipes and log files. Other threads hand it jobs."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.jobs: deque[Callable[[], object]] = deque()
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_write, False)
        self.selector = selectors.DefaultSelector()
        wake_up = functools.partial(os.read, self.wake_read, PIPE)
        self.selector.register(self.wake_read, selectors.EVENT_READ, wake_up)
        self.buffer = memoryview(bytearray(BUFFER))
        self.moved = 0  # bytes in this pass
        self.sinks: dict[int | str, Sink] = {2: TerminalSink(2)}
        self.sources: dict[Source, bytes] = {}  # with what a next line begins with
        self.closing = float("inf")
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    def post(self, job: Callable[[], object]) -> None:
        """Have the thread do something, in the order of the calls."""
        self.jobs.append(job)
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: too late
            os.write(self.wake_write, b"\0")

    def say(self, name: str, text: str, level: str = "info") -> None:
        """Write one of the supervisor's own messages; `name` is a program's, or ""."""
        now = time.time()
        line = f"{timestamp(now, 0)} {name or 'supervisors'}: {text}"
        if self.as_json:
            import json

            fields = {"time": timestamp(now), "level": level, "program": name or None}
            line = json.dumps({**fields, "message": text})
        data = f"{line}\n".encode(errors="replace")
        self.post(functools.partial(self.write, self.sinks[2], data))

    def reopen(self) -> None:
        """Have every log file reopened, as after a rotation by somebody else."""
        for sink in list(self.sinks.values()):
            self.post(sink.reopen)

    def close(self) -> None:
        """Write what there still is, for a second at most, and end the thread."""
        self.closing = time.monotonic() + FAREWELL
        self.post(lambda: None)
        self.thread.join(2 * FAREWELL)

    # In this thread

    def run(self) -> None:
        # All signals are the main thread's; and a terminal with `tostop` stops a
        # background writer unless SIGTTOU is blocked (tty_ioctl(4)).
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self.closing == float("inf"):
            if 0 < self.turn(None) < LITTLE:
                time.sleep(NAP)
        while time.monotonic() < self.closing:
            held = any(sink.held for sink in self.sinks.values())
            if not self.turn(NAP) and not held:
                break
        for source in list(self.sources):
            self.end(source)
        for sink in self.sinks.values():
            sink.reopen()
        self.selector.close()
        os.close(self.wake_read)
        os.close(self.wake_write)

    def turn(self, timeout: float | None) -> int:
        """Do what is to be done now; return the bytes that were read."""
        self.moved = 0
        calls = [self.jobs.popleft() for _ in range(len(self.jobs))]
        calls += [key.data for key, _ in self.selector.select(0 if calls else timeout)]
        for call in calls:
            try:
                call()
            except Exception as error:  # every program would block without this thread
                self.say("", f"internal error of the log: {error!r}", "error")
                time.sleep(TICK)
        return self.moved

    def sink(self, target: int | str, maxbytes: int, backups: int) -> Sink:
        """Return the sink of a target, with these limits from now on."""
        if target not in self.sinks:
            new = TerminalSink(target) if isinstance(target, int) else FileSink(target)
            self.sinks[target] = new
        sink = self.sinks[target]
        sink.maxbytes, sink.backups = maxbytes, backups
        return sink

    def add(self, source: Source) -> None:
        """Read a pipe from now on."""
        self.sources.setdefault(source, b"")
        job = functools.partial(self.move, source)
        self.selector.register(source.fd, selectors.EVENT_READ, job)

    def move(self, source: Source) -> None:
        """Read a pipe once, unless its sink holds something."""
        if source.sink.held:
            self.selector.unregister(source.fd)
            source.sink.waiting.append(source)
            return
        count = os.readv(source.fd, [self.buffer])
        if count == 0:
            self.selector.unregister(source.fd)
            self.end(source)
        elif PIPE // 2 <= count <= PIPE:
            # Full, or nearly: what is written in short pieces leaves gaps in its pages.
            # The user's share of pipe memory may be used up; and this is Linux only.
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(source.fd, fcntl.F_SETPIPE_SZ, BUFFER)
        self.moved += count
        lines: bytes | memoryview = self.buffer[:count]
        if count and (source.format_lines or source.whole_lines):
            data = b"".join([self.sources[source], lines])
            mark = b"\n" if source.format_lines else b""
            lines, self.sources[source] = cut_lines(data, mark)
        self.emit(source, lines)

    def emit(self, source: Source, lines: bytes | memoryview) -> None:
        if lines and source.recent is not None:
            kept = bytes(lines if source.recent.followers else lines[-REMEMBERED:])
            source.recent.append((source.stream, kept), len(kept) + ITEM)
        if lines and source.format_lines:
            lines = source.format_lines(bytes(lines), time.time())
        source.output.dropped += self.write(source.sink, lines)

    def end(self, source: Source) -> None:
        """Forget a pipe that has ended, but not a last line without end."""
        os.close(source.fd)
        if rest := self.sources.pop(source):
            self.emit(source, rest + b"\n")
        if not any(other.sink is source.sink for other in self.sources):
            source.sink.reopen()  # nobody writes there: no descriptor is held

    def write(self, sink: Sink, data: bytes | memoryview = b"") -> int:
        """Write, and hold what is not taken yet; return how many bytes were dropped."""
        held, dropped = sink.held, 0
        if data and len(held) > HELD:  # messages; the pipes are not read meanwhile
            return len(data)
        if sink.torn and data:  # the line that a failure cut off ends here
            data, sink.torn = b"\n" + bytes(data), False
        left = memoryview(b"".join([held, data]) if held and data else held or data)
        begun: bytes | memoryview = b""  # the last byte that was written
        try:
            while left and (count := sink.put(left)):
                begun, left = left[count - 1 : count], left[count:]
        except OSError as error:
            sink.torn = begun not in (b"", b"\n")
            dropped, left = len(left), memoryview(b"")
            if time.monotonic() >= sink.complained + SAY_AGAIN:
                sink.complained = time.monotonic()
                text = f"cannot write to {sink.name}: {error.strerror}; dropping"
                self.say("", text, "warning")
        # Without `held` it is part of the buffer.
        sink.held = left if held else memoryview(bytes(left))
        if sink.held and not held:
            job = functools.partial(self.write, sink)
            self.selector.register(sink.fd, selectors.EVENT_WRITE, job)
        elif held and not sink.held:
            self.selector.unregister(sink.fd)
            for source in sink.waiting:
                self.add(source)
            sink.waiting.clear()
        return dropped


# === 6. Processes =====================================================================
#
# Only the main thread starts and reaps processes. A program leads a session, hence a
# group, of its own: a signal to the group reaches all that it forked, the terminal's
# Ctrl-C reaches none of it. subprocess.Popen does the work (vfork, 0.45 ms), and is
# never asked to wait: it would steal a status from the one place that reaps.

RUN_VARIABLE = "SUPERVISOR_RUN"  # HASH.PID.START of the supervisor, for leftovers
OWN_VARIABLES = {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}  # ours, of systemd
OWN_VARIABLES |= {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}
MOST_FILES = 65536  # of ours, however high the hard limit is
# KEY=VALUE, which quotes may stretch over lines; a comment; or, last, a wrong line.
ENV_ENTRY = re.compile(
    r"""^[ \t]*(?:\#.*|(?:export[ \t]+)?([A-Za-z_][\w.-]*)[ \t]*=
    (?:[ \t]*"((?:[^"\\]|\\[\s\S])*)"|[ \t]*'([^']*)'|((?![ \t]*["']).*?))
    (?:[ \t]+\#.*)?)?[ \t]*$|(.+)""",
    re.VERBOSE | re.MULTILINE,
)
# Limits and niceness have no Popen argument, and need root's rights where the program
# gives them up; preexec_fn is unsafe with threads. So a small interpreter stands in
# between for the programs that set them. It reports on a pipe that exec closes.
TRAMPOLINE = """
import sys, warnings  # which execvp imports, too late for a user who may not read it
from os import *
from resource import *
from signal import *
fd, steps = eval(sys.argv[1])
argv = sys.argv[2:]
set_inheritable(fd, False)
try:
    for step in steps:
        exec(step)
except FileNotFoundError:
    report = "127 no such command: %r" % argv[0]
except (OSError, ValueError) as error:
    report = "126 cannot %s: %s" % (step, getattr(error, "strerror", None) or error)
write(fd, report.encode(errors="replace"))
_exit(126)
"""
Environ = dict[str, str]
Descriptors = tuple[int, int | None, int | None]  # standard streams; None is ours
Child = NamedTuple("Child", [("pid", int), ("report", int | None)])  # a pipe, if any


class SpawnError(Exception):
    """A program cannot be executed; `code` is 127 for a missing command, else 126."""

    def __init__(self, reason: str, code: int = 126) -> None:
        self.reason, self.code = reason, code


class Account(NamedTuple):
    """Who a program runs as: what to switch to, if to anything, and its variables."""

    variables: Environ
    user: int | None = None
    group: int | None = None
    groups: list[int] | None = None


def find_account(program: Program) -> Account:
    """Return the account of `user` and `group`; SpawnError, rather than another."""
    if program.user is None and program.group_name is None:
        return Account({})
    import grp  # these two only where somebody is named
    import pwd

    uid, gid, groups, variables = os.geteuid(), os.getegid(), os.getgroups(), {}
    name, group = str(program.user), str(program.group_name)
    if program.user is not None:
        try:
            entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        except KeyError:  # fine for a number, as in images without users
            if not name.isdecimal():
                raise SpawnError(f"no such user: {name!r}") from None
            entry = pwd.struct_passwd((name, "", int(name), int(name), "", "/", ""))
        name, _, uid, gid, _, home, shell = entry
        groups = os.getgrouplist(name, gid)
        variables = {"USER": name, "LOGNAME": name, "HOME": home}
        variables["SHELL"] = shell or "/bin/sh"
    if program.group_name is not None:
        try:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise SpawnError(f"no such group: {group!r}") from None
    if 0 != os.geteuid() == uid and gid == os.getegid():  # this needs no right
        return Account(variables)
    return Account(variables, uid, gid, [*{gid, *groups}])


def read_env_files(program: Program) -> str:
    """Return what its `env_file`s hold, as /proc/PID/environ; raises SpawnError."""
    variables, escapes = {}, {"n": "\n", "t": "\t", "r": "\r"}
    for path in program.env_file:
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                text = file.read()
        except OSError as error:
            reason = f"cannot read env_file {path!r}: {error.strerror}"
            raise SpawnError(reason) from None
        for match in ENV_ENTRY.finditer(text):
            name, double, single, bare, wrong = match.groups("")
            if wrong:
                number = text.count("\n", 0, match.start()) + 1
                raise SpawnError(f"{path}:{number}: expected KEY=VALUE")
            double = re.sub(r"\\([\s\S])", lambda m: escapes.get(m[1], m[1]), double)
            variables[name] = double or single or bare.strip()
    return "\0".join(f"{name}={variables[name]}" for name in variables if name)


def split_environ(text: str) -> Environ:
    """Return the variables of a text such as /proc/PID/environ (proc(5))."""
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def program_environ(
    program: Program, base: Environ, account: Account, files: str, extra: Environ
) -> Environ:
    """Return the environment of a program; `files` is what `read_env_files` gave."""
    chosen = program.inherit_env
    names = set(base if chosen is True else chosen or ()) - OWN_VARIABLES
    path = {} if chosen is True else {"PATH": os.defpath}
    return {
        **path,
        **{name: base[name] for name in base if name in names},
        **account.variables,
        **split_environ(files),
        **program.environment,
        "SUPERVISOR_ENABLED": "1",
        "SUPERVISOR_PROCESS_NAME": program.name,
        "SUPERVISOR_GROUP_NAME": program.group,
        "PROCESS_NUM": str(program.number),
        **extra,
    }


class FileLimit:
    """The limit of open files: a high one for us, the original for the programs.

    They inherit what is set while they are spawned, so it is lowered for that moment.
    What lasts is moved above it: Popen needs a low number for its own pipe then.
    """

    def __init__(self) -> None:
        import resource

        kind = resource.RLIMIT_NOFILE
        self.soft, hard = resource.getrlimit(kind)
        self.most = max(self.soft, min(hard, MOST_FILES))
        self.set: Callable[[int], None]
        self.set = lambda soft: resource.setrlimit(kind, (soft, hard))
        try:
            self.set(self.most)
        except (OSError, ValueError):  # macOS has a lower one of its own
            self.most = self.soft

    def out_of_the_way(self, fd: int) -> int:
        """Return a duplicate of `fd` above the original limit, or `fd` itself."""
        with contextlib.suppress(OSError, OverflowError):  # nothing is above it
            high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self.soft)
            os.close(fd)
            return high
        return fd


def spawn(
    program: Program,
    argv: tuple[str, ...],
    environ: Environ,
    account: Account,
    files: Descriptors,
    limit: FileLimit,
) -> Child:
    """Start a process in a session of its own; raises SpawnError. Main thread."""
    command, report, switch = argv, tuple[int, ...](), account
    if program.rlimits or program.nice is not None:
        report, switch = os.pipe(), Account({})
        orders = repr((report[1], trampoline_steps(program, argv, environ, account)))
        command = (sys.executable, "-I", "-S", "-c", TRAMPOLINE, orders, *argv)
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
            user=switch.user,
            group=switch.group,
            extra_groups=switch.groups,
            start_new_session=True,
            close_fds=bool(report),  # all are close-on-exec; one by one costs more
            pass_fds=report[1:],
        )
    except (OSError, ValueError, OverflowError) as error:
        for fd in report[:1]:
            os.close(fd)
        raise spawn_error(program, command[0], error) from None
    finally:
        limit.set(limit.most)
        for fd in report[1:]:
            os.close(fd)
    popen.returncode = 0  # it is reaped elsewhere; keep its destructor from waiting
    return Child(popen.pid, report[0] if report else None)


def trampoline_steps(
    program: Program, argv: tuple[str, ...], environ: Environ, account: Account
) -> list[str]:
    """Return the statements that the trampoline is to execute."""
    steps = []
    for name, number in program.rlimits.items():
        limit = "RLIM_INFINITY" if number < 0 else number
        steps.append(f"setrlimit(RLIMIT_{name.upper()}, ({limit}, {limit}))")
    if program.nice is not None:
        steps.append(f"setpriority(PRIO_PROCESS, 0, {program.nice})")
    if account.groups is not None:
        steps.append(f"setgroups({account.groups})")
        steps += [f"setgid({account.group})", f"setuid({account.user})"]
    steps += [f"signal({name}, SIG_DFL)" for name in ("SIGPIPE", "SIGXFSZ")]
    if "LC_CTYPE" not in environ:  # the interpreter may have added it (PEP 538)
        steps.append("environ.pop('LC_CTYPE', None)")
    return [*steps, f"execvp({argv[0]!r}, argv)"]


def spawn_error(program: Program, command: str, error: Exception) -> SpawnError:
    """Return what is wrong, told apart as exec, chdir and setuid fail alike."""
    if not isinstance(error, OSError):  # an id, or a text, that exec cannot have
        return SpawnError(str(error))
    missing, place, why = error.errno == errno.ENOENT, program.directory, error.strerror
    who = program.group_name if program.user is None else program.user
    if who is not None and error.errno in (errno.EPERM, errno.EINVAL):
        return SpawnError(f"cannot switch to {who!r}: {why}")
    if place and place == error.filename:
        reason = "no such directory: {!r}" if missing else "cannot enter {!r}: {}"
        return SpawnError(reason.format(place, why))
    if missing:
        return SpawnError(f"no such command: {command!r}", 127)
    return SpawnError(f"cannot execute {command!r}: {why}")


def start_time(pid: int) -> str:
    """Return when a process started, in ticks since boot; "" if it is gone."""
    fields = process_fields(pid)
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
    table, pid, found = process_table(), os.getpid(), {}
    others = set(table)
    while pid in table:
        others.discard(pid)
        pid = int(table[pid][1])
    for pid in others:
        with contextlib.suppress(OSError, ValueError):  # gone, or not for us to look at
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = split_environ(os.fsdecode(file.read()))
            run = variables.get(RUN_VARIABLE, "").split(".")
            if len(run) != 3 or run[0] != digest or start_time(int(run[1])) == run[2]:
                continue
            if os.path.samefile(f"/proc/{pid}/ns/pid", "/proc/self/ns/pid"):
                found[pid] = variables.get("SUPERVISOR_PROCESS_NAME", "")
    return found


# === 7. Health ========================================================================
#
# A check never delays the loop: a command is a child like any other, http and tcp run
# in a thread that ends by itself. Whoever is too slow is given up at `timeout`.
#
# A notify program speaks through a datagram socket (sd_notify(3)), one for all, in the
# abstract namespace. The kernel says who sent a message (SCM_CREDENTIALS, unix(7)).

FIRST_INTERVAL = 1.0  # seconds between checks until one has passed
SO_PASSCRED = 16  # unix(7)


# http.client loads OpenSSL, half of its 8 MB, for HTTPS alone; a host may want that.
if __name__ == "__main__":
    sys.modules["ssl"] = None  # type: ignore[assignment]  # "import of ssl halted"


def probe(check: Health) -> str:
    """Run an http or tcp check; return what is wrong, or "". Blocks; any thread."""
    import urllib.parse

    try:
        url = urllib.parse.urlsplit(check.http or f"tcp://{check.tcp}")
        host = url.hostname or ""
        port = url.port or (443 if url.scheme == "https" else 80)
        plain = socket.create_connection((host, port), check.timeout)
        if check.tcp:
            plain.close()
            return ""
        import http.client  # only where there is such a check

        connection = http.client.HTTPConnection(host, port, check.timeout)
        connection.sock = plain
        with contextlib.closing(connection):
            if url.scheme == "https":
                if sys.modules.get("ssl", 0) is None:
                    del sys.modules["ssl"]
                import ssl

                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(plain, server_hostname=host)
            target = f"{url.path or '/'}?{url.query}".rstrip("?")
            connection.request("GET", target, headers={"User-Agent": "supervisors"})
            status = connection.getresponse().status
        # A redirect passes, and is not followed.
        return "" if 200 <= status < 400 else f"HTTP status {status}"
    except Exception as error:  # whatever a server may answer: it did not pass
        return str(getattr(error, "strerror", None) or error) or type(error).__name__


class NotifySocket:
    """The socket that notify programs speak to (Linux)."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        self.socket.bind("")  # to an abstract name that is free (unix(7), autobind)
        self.address = "@" + str(self.socket.getsockname().decode()).lstrip("\0")

    def receive(self) -> tuple[int, list[str]] | None:
        """Return the sender's pid and the lines of one message; None without one."""
        try:
            # No room for descriptors: the kernel closes one that comes with BARRIER=1.
            data, ancillary, _, _ = self.socket.recvmsg(65536, socket.CMSG_SPACE(12))
        except OSError:
            return None
        pid = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
        return pid, data.decode(errors="replace").split("\n")


def tell_manager(message: str) -> None:
    """Tell who runs us, where it listens (systemd's Type=notify)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    with contextlib.suppress(OSError):
        speaker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with speaker:
            speaker.setblocking(False)
            address = "\0" + path[1:] if path[:1] == "@" else path
            speaker.sendto(message.encode(), address)


# === 8. HTTP ==========================================================================
#
# A request is answered in a thread of its own by a function of a fixed table. It reads
# published snapshots; what changes something is done by the main thread, on request.
# Sockets are bound at start; http.server is imported with the first connection, since
# it costs 15 ms and 8 MB. (ThreadingHTTPServer would bind and poll by itself.)

REQUEST_TIME = 5.0  # seconds for a client to send a request, or to take an answer
MOST_CONNECTIONS = 64
MOST_STREAMS = 32  # of those; the others are for probes
MOST_BYTES = 64 * 1024  # of a request's line, of its head, and of its body
MOST_WAIT = 300.0  # seconds
MOST_NAME = 4096  # characters of a NAME in a path, which becomes a pattern
MOST_EVENTS = 1000  # that a client may be behind
COMMENT_INTERVAL = 15.0  # seconds between signs of life on /events
LOOK_INTERVAL = 1.0  # seconds between two looks whether a follower is still there
FILE_INTERVAL = 0.05  # seconds between two looks at a log file that is followed
NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
)
PAGE = r"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>supervisors</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
:root{color-scheme:light dark}
body{max-width:1400px; margin:auto; padding:0 16px; font:14px/20px system-ui;
  background:light-dark(#fbfbfc, #111418); color:light-dark(#1c2128, #dde2e8)}
header, form, tr{display:flex; flex-wrap:wrap; gap:8px 12px; align-items:center}
header form{margin-left:auto} [hidden]{display:none} [inert]{opacity:.6}
#health{margin:8px 0 16px; font-size:20px} h1, h2{font-size:14px}
.good{color:light-dark(#17763d, #4cc07c)} .busy{color:light-dark(#8a5700, #dba53c)}
.bad{color:light-dark(#c02429, #ff7b78)} .dot::before{content:"● "}
label, .off, [data-label]::before{color:light-dark(#626c79, #929dab)}
[data-label]::before{content:attr(data-label); display:block; font-size:12px}
tr{padding:12px 0; border-top:1px solid #8884; font-variant-numeric:tabular-nums}
table, tbody{display:block} th, td{padding:0; text-align:left; overflow-wrap:anywhere}
td{flex:0 0 80px} .state{flex-basis:100px} th, .detail{flex:1 0 200px}
.verbs{flex-basis:auto} body:not(.may) .verbs{display:none}
button, input{padding:4px 9px; font:inherit; border:1px solid #8884; border-radius:6px}
dialog{width:min(1000px, 95%)} dialog form{justify-content:space-between}
pre{display:flex; flex-direction:column-reverse; height:65vh; overflow:auto;
  white-space:pre-wrap; overflow-wrap:anywhere}  /* reverse: it stays at the end */
</style>
<header><h1>supervisors</h1><span id="connection" role="status">Connecting</span>
  <form id="unlock"><label for="token">Token</label>
    <input id="token" type="password" autocomplete="off"><button>Unlock</button></form>
</header><main><div id="error" class="bad" role="alert"></div>
<div id="health" role="status"></div>
<table aria-label="Programs"><tbody></tbody></table></main>
<dialog id="log" aria-labelledby="name"><form method="dialog"><h2 id="name"></h2>
  <button id="log-close">Close</button></form><pre tabindex="0"></pre></dialog>
<template><tr><th scope="row"><td><td data-label="PID"><td data-label="Uptime">
  <td data-label="Restarts"><td data-label="Health"><td class="detail">
  <td class="verbs"><button data-verb="start">Start</button>
  <button data-verb="stop">Stop</button> <button data-verb="restart">Restart</button>
  <button data-verb="log">Log</button></template>
<script>'use strict';
const $ = selector => document.querySelector(selector), rows = $('tbody');
const log = $('#log'), pre = $('pre'), LOG_LIMIT = 200_000;  // characters
let gone = '', follower;  // since when; what ends the request for the log
const put = (node, text) => { if (node.textContent !== text) node.textContent = text };
const fail = (what, error) => put($('#error'), `${what}: ${error.message}`);
const find = name => [...rows.children].find(row => row.dataset.name === name);
const clock = seconds => (seconds < 86400 ? '' : `${Math.floor(seconds / 86400)}d `)
  + new Date(seconds * 1000).toISOString().slice(11, 19);
const kind = s => /BACKOFF|FATAL/.test(s.state) || s.running && s.healthy === false
  || s.state === 'EXITED' && !s.ready && s.exit_code !== 0 ? 'bad'
  : s.state === 'WAITING' || s.running && !s.ready ? 'busy'
  : s.running ? 'good' : 'off';
function paint({status: s, at, children: cells}) {
  const age = (performance.now() - at) / 1000, left = Math.ceil(s.restart_in - age);
  const uptime = s.running ? clock(s.uptime + age) : left > 0 ? `in ${left} s` : '–';
  const health = {true: 'healthy', false: 'unhealthy'}[s.healthy] ?? '–';
  const detail = [s.status_text, s.reason].filter(Boolean).join(' · ');
  [s.name, s.state, s.pid ?? '–', uptime, s.restarts, health, detail]
    .forEach((text, i) => put(cells[i], `${text}`));
  cells[1].className = `state dot ${kind(s)}`;
  const idle = !s.running && !/BACKOFF|WAITING/.test(s.state);
  const cannot = {start: s.running, stop: idle, restart: idle};
  for (const button of cells[7].children) button.disabled = cannot[button.dataset.verb];
}
function repaint() {
  rows.childNodes.forEach(paint);
  const names = [...rows.querySelectorAll('.bad, .busy')]
    .map(cell => cell.parentNode.dataset.name).join(', ');
  put($('#health'), names ? `Not well: ${names}` : 'All well');
}
function show(status) {
  const row = find(status.name)
    ?? rows.appendChild($('template').content.firstChild.cloneNode(true));
  Object.assign(row, {status, at: performance.now()}).dataset.name = status.name;
}
function tell(live, text) {
  $('main').inert = !live; put($('#connection'), text);
  $('#connection').className = live ? 'dot good' : 'dot bad';
}
function connect() {
  const events = new EventSource('events'), now = () => new Date().toLocaleTimeString();
  const acts = {state: show, removed: ({name}) => find(name)?.remove(),
    snapshot(statuses) {
      tell(true, gone ? `Supervisor is back since ${now()}` : 'Live'); gone = '';
      rows.replaceChildren(); statuses.forEach(show);
      if (sessionStorage.token) unlock();
    }};
  for (const type in acts) events.addEventListener(type, ({data}) => {
    acts[type](JSON.parse(data)); repaint();
  });
  events.onerror = () => {
    tell(false, `Supervisor is gone since ${gone ||= now()}, trying again`);
    if (events.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
  };
}
async function call(method, name, rest, signal) {
  put($('#error'), '');
  const answer = await fetch(`programs/${encodeURIComponent(name)}/${rest}`,
    {method, signal, headers: {Authorization: `Bearer ${sessionStorage.token}`}});
  if (!answer.ok) throw Error((await answer.json()).error, {cause: answer.status});
  return answer;
}
async function unlock() {  // asks for what needs the token and changes nothing
  const answer = await call('GET', 'all', 'logs?lines=0').catch(error => error);
  const allowed = answer.ok || answer.cause === 409;
  $('#unlock').hidden = allowed; document.body.classList.toggle('may', allowed);
  if (!allowed) fail('unlock', answer);
}
async function openLog(name) {
  follower = new AbortController();
  const {body} = await call('GET', name, 'logs?lines=100&follow=1', follower.signal);
  put($('#name'), name); pre.replaceChildren(); log.showModal();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done;) {
    pre.append(part.value.replace(/\x1b\[[0-9;?]*[@-~]/g, '').slice(-LOG_LIMIT));
    while (pre.textContent.length > LOG_LIMIT) pre.firstChild.remove();
  }
}
log.onclose = () => follower.abort();
rows.onclick = ({target}) => {
  const {verb} = target.dataset, {name} = target.closest('tr').dataset;
  const done = verb === 'log' ? openLog(name) : verb && call('POST', name, verb);
  done?.catch(error => error.name === 'AbortError' || fail(`${verb} ${name}`, error));
};
$('#unlock').onsubmit = event => {
  event.preventDefault(); sessionStorage.token = $('#token').value; unlock();
};
setInterval(() => gone || repaint(), 1000); connect();
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
    program, status, output, _, started_at, changed_at = snapshot
    number, due = status.exit_signal, status.deadline
    words = [status.reason]  # after what supervisorctl's status has in its last column
    if status.state is State.RUNNING:
        minutes, seconds = divmod(int(now - status.started), 60)
        days, hours = divmod(minutes // 60, 24)
        spent = f"{days} day{'s' * (days != 1)}, " * bool(days)
        clock = f"{hours}:{minutes % 60:02}:{seconds:02}"
        words[:0] = [f"pid {status.pid}, uptime {spent}{clock}", status.status_text]
    elif status.state in (State.STOPPED, State.EXITED):
        moment = time.strftime("%b %d %I:%M %p", time.localtime(changed_at))
        words.insert(0, moment if changed_at else "Not started")
    backoff = due is not None and status.state is State.BACKOFF
    return {
        "name": program.name, "group": program.group, "running": status.is_alive,
        "state": status.state.value, "ready": snapshot.ready,
        "healthy": status.healthy, "pid": status.pid,
        "uptime": round(now - status.started, 3) if status.is_alive else None,
        "started_at": timestamp(started_at) if started_at else None,
        "restarts": status.restarts, "failures": status.failures,
        "exit_code": status.exit_code,
        "exit_signal": None if number is None else signal_name(number),
        "reason": status.reason, "status_text": status.status_text,
        "restart_in": round(max((due or now) - now, 0), 3) if backoff else None,
        "log_dropped_bytes": output.dropped,
        "description": ", ".join(filter(None, words)),
    }  # fmt: skip


def is_settled(verb: str, snapshot: Snapshot) -> bool:
    """Return whether it is known what came of an order."""
    state = snapshot.status.state
    if verb == "stop":
        return not (snapshot.status.is_alive or state is State.WAITING)
    ended = (State.BACKOFF, State.EXITED, State.FATAL, State.STOPPED)
    return snapshot.ready or state in ended


class Listener(NamedTuple):
    socket: socket.socket
    address: Address
    is_control: bool  # everything is allowed there


class Request(NamedTuple):
    name: str  # in the path, "" if it has none
    targets: list[Snapshot]  # what NAME means, without it all
    query: Mapping[str, str]
    headers: Mapping[str, str]


class Response(NamedTuple):
    body: bytes | Iterator[bytes]  # a stream, in which b"" is a moment to look around
    status: int = 200
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[str, ...] = ()


class HttpError(Exception):
    """A refusal: its status, its text, and lines for the head of the answer."""


def as_json(content: object, status: int = 200, *headers: str) -> Response:
    import json  # with the first answer

    return Response(json.dumps(content).encode(), status, "application/json", headers)


def get_status(supervisor: Supervisor, request: Request) -> Response:
    """Answer all that there is, or what was named.

    To make the text of 20 programs takes 0.3 ms, most of a request's time; unless
    something happens it serves for 10 ms.
    """
    moment = (supervisor.events.end, int(time.monotonic() * 100))
    if request.name:
        return objects(request, request.targets, 200)
    if supervisor.all_statuses[0] != moment:
        supervisor.all_statuses = (moment, objects(request, request.targets, 200))
    return supervisor.all_statuses[1]


def objects(request: Request, chosen: Iterable[Snapshot], status: int) -> Response:
    """Answer status objects: an array, or one where one program was named."""
    now = time.monotonic()
    found = [status_object(one, now) for one in chosen]
    single = [one for one in found if one["name"] == request.name]
    return as_json(single[0] if single else found, status)


def select_programs(snapshots: list[Snapshot], name: str) -> list[Snapshot]:
    """Return the programs that a NAME means; raises HttpError 404.

    A program, a group, a glob, `all`, or such joined by commas.
    """
    import fnmatch  # only where there is a NAME

    known = {one.program.name: one for one in snapshots}
    found: dict[str, Snapshot] = {}
    if len(name) > MOST_NAME:
        raise HttpError(404, "no program has such a long name")
    for word in name.split(","):
        glob = "*" if word == "all" else word
        # Not fnmatchcase: it keeps 32768 compiled patterns for ever.
        matching = re.compile(fnmatch.translate(glob)).match
        matches = {
            key: one
            for key, one in known.items()
            if one.program.group == word or matching(key)
        }
        if not matches:
            raise HttpError(404, f"no program {word!r}{hint(word, known)}")
        found |= matches
    return list(found.values())


def get_page(supervisor: Supervisor, request: Request) -> Response:
    if "text/html" not in request.headers.get("Accept", ""):
        return Response(b"Supervisor Running. Check /status")
    headers = (f"Content-Security-Policy: {POLICY}", "X-Frame-Options: DENY")
    return Response(PAGE.encode(), 200, "text/html; charset=utf-8", headers)


def get_health(supervisor: Supervisor, request: Request) -> Response:
    """Answer how all that is wanted is, or the programs that were named."""
    worst, reasons = "ok", {}
    for program, status, *_ in request.targets:
        found = verdict(program, status)
        if request.name and not found:  # not wanted, but asked for
            found = "ended" if status.state is State.EXITED else "failing"
        if found in ("starting", "failing", "ended"):
            words = (status.state.value, status.reason)
            reasons[program.name] = ", ".join(filter(None, words))
        if found in ("starting", "failing") and worst != "failing":
            worst = found
    status_code = 200 if worst == "ok" else 503
    return as_json({"status": worst, "programs": reasons}, status_code)


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
    lines: list[str] = []

    def family(name: str, text: str, samples: Mapping[str, float | None]) -> None:
        kind = "counter" if name.endswith("_total") else "gauge"
        lines.append(f"# HELP supervisors_{name} {text}")
        lines.append(f"# TYPE supervisors_{name} {kind}")
        found = [(key, one) for key, one in samples.items() if one is not None]
        lines.extend(f"supervisors_{name}{key} {one:.15g}" for key, one in found)

    family("info", "version", {f'{{version="{__version__}"}}': 1})
    family("start_time_seconds", "start, Unix time", {"": supervisor.started_at})
    now, labelled = time.monotonic(), {}
    for one in request.targets:
        labelled[f'{{name="{one.program.name}",group="{one.program.group}"'] = one
    for name, text, value in METRICS:
        numbers = {key + "}": value(one, now) for key, one in labelled.items()}
        family(f"program_{name}", text, numbers)
    states: dict[str, float | None] = {
        f'{key},state="{state.value}"}}': one.status.state is state
        for key, one in labelled.items()
        for state in State
    }
    family("program_state", "1 for the present state", states)
    body = "\n".join([*lines, ""]).encode()
    return Response(body, kind="text/plain; version=0.0.4; charset=utf-8")


def stream_events(supervisor: Supervisor) -> Iterator[bytes]:
    """Yield every change of state as server-sent events, a snapshot of all first."""
    import json

    def event(kind: str, content: object) -> bytes:
        return f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode()

    feed = supervisor.events
    with feed.followed():
        at, known = feed.end, list(supervisor.snapshots.values())
        spoke = now = time.monotonic()
        yield event("snapshot", [status_object(one, now) for one in known])
        while at < feed.end or not feed.closed:
            items, at = feed.read(at, LOOK_INTERVAL)
            now = time.monotonic()
            for one in items:
                if isinstance(one, str):
                    yield event("removed", {"name": one})
                else:
                    yield event("state", status_object(one, now))
            if now >= spoke + COMMENT_INTERVAL:
                spoke = now
                yield b": still here\n\n"
            yield b""


def number_of(request: Request, key: str, default: float, most: float) -> float:
    text = request.query.get(key) or str(default)
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= most:
            return float(text)
    raise HttpError(400, f"{key}: expected a number from 0 to {most:g}, got {text!r}")


def get_logs(supervisor: Supervisor, request: Request) -> Response:
    """Answer the newest lines of one program, and go on with `follow`."""
    lines = int(number_of(request, "lines", 100, 1e9))
    follow = number_of(request, "follow", 0, 1)
    if lines == 0 and not follow:
        return Response(b"")  # how a page asks whether its token is right
    if len(request.targets) != 1:
        raise HttpError(400, "expected one program, not several")
    program, _, output, log_format, _, _ = request.targets[0]
    name, stream = program.name, request.query.get("stream", "")
    if stream not in ("", "stdout", "stderr"):
        raise HttpError(400, f"stream: expected stdout or stderr, got {stream!r}")
    out, err = (route(program, one, log_format) for one in ("stdout", "stderr"))
    target, _, direct = err if stream == "stderr" else out
    over = functools.partial(supervisor.is_gone, name) if follow else None
    if isinstance(target, str) and target != NOWHERE:
        if stream and out.target == err.target:
            raise HttpError(400, f"both streams of {name} share one file")
        backups = [f"{target}.{n + 1}" for n in range(program.logfile_backups)]
        return Response(file_log([target, *backups], lines, over))
    if direct:
        raise HttpError(409, f"{name} has a descriptor of its own, not seen here")
    return Response(memory_log(output, stream, lines, over))


Over = Callable[[], bool] | None  # whether a follower is to end; None follows not


def memory_log(output: Output, stream: str, lines: int, over: Over) -> Iterator[bytes]:
    def text(items: list[tuple[str, bytes]]) -> bytes:
        return b"".join(data for name, data in items if stream in ("", name))

    feed = output.recent
    with feed.followed():
        items, at = feed.newest()
        yield b"".join(deque(text(items).splitlines(keepends=True), lines))
        while over:
            ended = over()
            items, at = feed.read(at, 0 if ended else LOOK_INTERVAL)
            yield text(items)
            if ended:
                return


def file_log(paths: list[str], lines: int, over: Over) -> Iterator[bytes]:
    """Yield the last lines of a log and its backups, the newest path first; follow it.

    What has been rotated meanwhile is found again by its inode, and read to its end.
    """
    file: io.FileIO | None = None
    with contextlib.ExitStack() as stack:
        for path in filter(os.path.isfile, paths):
            file = stack.enter_context(open(path, "rb", buffering=0))
            lines -= seek_tail(file, lines)
            if lines <= 0:
                break
        while True:
            ended, newer = over is None or over(), newer_file(file, paths)
            if file and os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)  # it was truncated: no backups, or copytruncate
            while file and (chunk := file.read(PIPE)):
                yield chunk
            if newer:
                stack.close()
                file = stack.enter_context(newer)
            elif ended:
                return
            else:
                time.sleep(FILE_INTERVAL)
                yield b""


def newer_file(file: io.FileIO | None, paths: list[str]) -> io.FileIO | None:
    """Open what came after a log file that was rotated; None for the newest."""
    with contextlib.suppress(OSError):
        known = [path for path in paths if os.path.isfile(path)]
        inodes = [os.stat(path).st_ino for path in known]
        inode = os.fstat(file.fileno()).st_ino if file else 0
        at = inodes.index(inode) if inode in inodes else 1
        if known and at > 0:
            return open(known[at - 1], "rb", buffering=0)
    return None


def seek_tail(file: io.FileIO, lines: int) -> int:
    """Go to where the last `lines` lines of a file begin; return how many those are."""
    end = size = file.seek(0, os.SEEK_END)
    found = 0
    while end > 0 and lines > 0:
        start = max(end - PIPE, 0)
        chunk = os.pread(file.fileno(), end - start, start)
        at = len(chunk) - (end == size)  # the end of the last line begins no other
        while (at := chunk.rfind(b"\n", 0, at)) >= 0:
            found += 1
            if found == lines:
                file.seek(start + at + 1)
                return found
        end = start
    file.seek(end)
    return found + (size > 0)


def post_verb(verb: str, supervisor: Supervisor, request: Request) -> Response:
    """Start, stop or restart; answer at the outcome of all, or after `wait` seconds."""
    wait = number_of(request, "wait", 0, MOST_WAIT)
    names = [one.program.name for one in request.targets]
    feed, end = supervisor.events, time.monotonic() + wait
    with feed.followed():
        at, found = supervisor.ask(lambda: supervisor.order(verb, names))
        open_ones = {name for name, one in found.items() if not is_settled(verb, one)}
        while open_ones and not feed.closed and (left := end - time.monotonic()) > 0:
            try:
                items, at = feed.read(at, left)
            except Lagged:
                at, items = feed.end, list(supervisor.snapshots.values())
            for item in items:
                if isinstance(item, Snapshot) and item.program.name in open_ones:
                    found[item.program.name] = item
                    if is_settled(verb, item):
                        open_ones.discard(item.program.name)
    return objects(request, found.values(), 202 if open_ones or not wait else 200)


def post_signal(supervisor: Supervisor, request: Request) -> Response:
    try:
        number = signal_number(request.query.get("signal", ""))
    except ValueError as error:
        raise HttpError(400, f"signal: {error}") from None
    names = [one.program.name for one in request.targets]
    found = supervisor.ask(lambda: supervisor.signal(number, names))
    return objects(request, found, 200)


def post_shutdown(supervisor: Supervisor, request: Request) -> Response:
    supervisor.ask(lambda: supervisor.begin_shutdown(0, "shutdown over HTTP"))
    return as_json({"status": "shutting down"}, 202)


Answer = Callable[["Supervisor", Request], Response]
# Method and answer by path, where `*` stands for NAME.
ENDPOINTS: dict[str, tuple[str, Answer]] = {
    "/": ("GET", get_page),
    "/health": ("GET", get_health),
    "/health/*": ("GET", get_health),
    "/health/live": ("GET",
        lambda supervisor, _: as_json(supervisor.ask(lambda: {"status": "ok"}))),
    "/status": ("GET", get_status),
    "/status/*": ("GET", get_status),
    "/metrics": ("GET", get_metrics),
    "/events": ("GET", lambda supervisor, _:
        Response(stream_events(supervisor), kind="text/event-stream")),
    "/programs/*/logs": ("GET", get_logs),
    "/programs/*/start": ("POST", functools.partial(post_verb, "start")),
    "/programs/*/stop": ("POST", functools.partial(post_verb, "stop")),
    "/programs/*/restart": ("POST", functools.partial(post_verb, "restart")),
    "/programs/*/signal": ("POST", post_signal),
    "/reload": ("POST", lambda supervisor, _:
        as_json(supervisor.ask(supervisor.reload))),
    "/shutdown": ("POST", post_shutdown),
}  # fmt: skip


def encode(response: Response, lasts: bool, method: str = "GET") -> bytes:
    """Return the head of an answer, and its body unless that is a stream."""
    from http import HTTPStatus

    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
    lines += [f"Content-Type: {response.kind}", "Cache-Control: no-store"]
    lines += [*response.headers, f"Connection: {'keep-alive' if lasts else 'close'}"]
    body = b""
    if isinstance(response.body, bytes):
        body = response.body
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body * (method != "HEAD")


class DeadlineReader(io.RawIOBase):
    """A socket's input: what belongs to one request has to come in REQUEST_TIME."""

    def __init__(self, source: socket.socket) -> None:
        self.source = source
        self.expect()

    def expect(self) -> None:
        """Begin to count for another request."""
        self.deadline, self.count = time.monotonic() + REQUEST_TIME, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self.count > MOST_BYTES:
            raise HttpError(431, "the request is too long")
        self.source.settimeout(left)
        count = self.source.recv_into(buffer)
        self.count += count
        return count


class Place(NamedTuple):  # what a conversation is about
    supervisor: Supervisor
    listener: Listener


if TYPE_CHECKING:
    RequestHandler = http.server.BaseHTTPRequestHandler
else:
    RequestHandler = object  # until the first connection, see `handler_class`


class Conversation(RequestHandler):
    """One connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    server: Place  # type: ignore[assignment]  # the base only hands it on

    def setup(self) -> None:
        super().setup()
        if self.connection.family != socket.AF_UNIX:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.raw = DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self.raw)

    def handle_one_request(self) -> None:
        """Answer a request, or say why not."""
        self.close_connection, self.command = True, ""
        with contextlib.ExitStack() as stack:
            stack.callback(self.server.supervisor.answering.discard, self)
            try:
                response = self.read_request()
                if response is None:
                    return
                if not isinstance(response.body, bytes):
                    self.close_connection = True
                    slot = self.server.supervisor.stream_slot(self.server.listener)
                    stack.enter_context(slot)
            except HttpError as error:
                response = self.refuse(*error.args)
            except SupervisorError as error:  # of ConfigError alone there is a list
                more = {"errors": error.errors} if error.errors else {}
                status = 422 if error.errors else 409
                response = as_json({"error": str(error), **more}, status)
            except TimeoutError:
                if not self.raw.count:
                    return  # a client that says nothing gets no answer
                late = f"no whole request within {REQUEST_TIME:g} s"
                response = self.refuse(408, late)
            self.send(response)

    def refuse(self, status: int, text: str, *headers: str) -> Response:
        self.close_connection = True
        return as_json({"error": text}, status, *headers)

    def read_request(self) -> Response | None:
        """Read a request and return the answer; None when the client is done."""
        self.raw.expect()
        line = self.raw_requestline = self.rfile.readline(MOST_BYTES)
        if len(line) == MOST_BYTES:
            raise HttpError(414, "the request line is too long")
        words = line.decode("latin-1").split()
        if not line:
            return None
        if len(words) != 3 or not re.fullmatch(r"HTTP/1\.\d", words[2]):
            raise HttpError(400, "malformed request: expected HTTP/1.0 or HTTP/1.1")
        self.parse_request()
        length = self.headers.get("Content-Length", "0")
        lengths = self.headers.get_all("Content-Length", [])
        if self.headers.defects or len(lengths) > 1:  # a proxy may read it otherwise
            raise HttpError(400, "malformed headers")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise HttpError(400, "expected a Content-Length")
        if len(length) > 9 or int(length) > MOST_BYTES:
            raise HttpError(413, f"expected a body of at most {MOST_BYTES} bytes")
        self.raw.count = 0
        self.rfile.read(int(length))  # none of the requests has a use for it
        headers = {key.title(): value for key, value in self.headers.items()}
        if absolute := re.match("http://([^/?]*)", words[1]):
            headers["Host"] = absolute[1]
        self.server.supervisor.answering.add(self)
        try:
            return self.respond(self.command, words[1], headers)
        except (HttpError, SupervisorError, OSError):
            raise
        except Exception as error:
            self.server.supervisor.say(
                "", f"cannot answer {words[1]}: {error!r}", "error"
            )
            raise HttpError(500, "internal error") from error

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Refuse what the library finds malformed."""
        raise HttpError(code, str(message).lower())

    def send(self, response: Response) -> None:
        self.connection.settimeout(REQUEST_TIME)
        # In one piece: two would take 44 ms (Nagle's algorithm, delayed ACK).
        lasts, body = not self.close_connection, response.body
        self.connection.sendall(encode(response, lasts, self.command))
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        with contextlib.suppress(Lagged):
            for chunk in () if self.command == "HEAD" or type(body) is bytes else body:
                if chunk:
                    self.connection.sendall(chunk)
                elif poll.poll(0) and not self.connection.recv(4096):
                    break  # the client is gone

    def finish(self) -> None:
        """Close, when the client has: unread input would make the kernel send a reset.

        That can overtake the answer.
        """
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(0.2)
        for _ in range(64):
            if not self.connection.recv(65536):
                break

    def respond(self, method: str, target: str, headers: dict[str, str]) -> Response:
        """Answer a request. Refusals come in this order: 400, 404, 405, 403, 401."""
        import urllib.parse  # with the first request

        path, _, query = re.sub("^http://[^/]*", "", target).partition("?")
        words, name = path.split("/"), ""
        if words[0] or not target.isascii() or "%00" in path:
            raise HttpError(400, "malformed path")
        if len(words) > 2 and path != "/health/live":
            name, words[2] = urllib.parse.unquote(words[2]), "*"
        wanted, answer = ENDPOINTS.get("/".join(words), ("", get_page))
        if not wanted or (not name and "*" in words):
            raise HttpError(404, "no such path")
        allowed = "GET, HEAD" if wanted == "GET" else "POST"
        if method not in allowed.split(", "):
            raise HttpError(405, f"{method} is not allowed", f"Allow: {allowed}")
        targets = list(self.server.supervisor.snapshots.values())
        targets = select_programs(targets, name) if name else targets
        if not self.server.listener.is_control:
            self.check_rights(method, headers, wanted == "POST" or answer is get_logs)
        pairs = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        return answer(self.server.supervisor, Request(name, targets, pairs, headers))

    def check_rights(self, method: str, headers: dict[str, str], guarded: bool) -> None:
        """Refuse what another site has a browser send, or what is without the token.

        A name that an attacker's DNS points at loopback is caught by the Host, another
        site's script by the Origin. Without Host it is no browser's request.
        """
        host, port = headers.get("Host", "").lower(), r":\d*$"
        allowed = {one.lower() for one in self.server.supervisor.config.allowed_hosts}
        name, origin = re.sub(port, "", host), headers.get("Origin", "").lower()
        known = re.fullmatch(r"(.*\.)?localhost|127(\.\d{1,3}){3}|\[::1\]|", name)
        if self.server.listener.address.is_loopback and not (
            known or {host, name} & allowed
        ):
            raise HttpError(403, f"Host {host!r} is not one of ours, see allowed_hosts")
        place = origin.partition("://")[2]
        ours = place and (place == host or {place, re.sub(port, "", place)} & allowed)
        if method == "POST" and origin and not ours:
            raise HttpError(403, f"Origin {origin!r} is foreign")
        if not guarded:
            return
        if not self.server.supervisor.token:
            raise HttpError(403, "no token is configured: read-only, see `token`")
        import base64
        import hmac

        scheme, _, given = headers.get("Authorization", "").partition(" ")
        offered = given.strip().encode() if scheme.lower() == "bearer" else b""
        if scheme.lower() == "basic":
            with contextlib.suppress(ValueError):
                offered = base64.b64decode(given, validate=True).partition(b":")[2]
        if not hmac.compare_digest(offered, self.server.supervisor.token.encode()):
            raise HttpError(401, "wrong or missing token", "WWW-Authenticate: Bearer")


@functools.cache
def handler_class() -> type[Conversation]:
    import http.server  # 15 ms and 8 MB, with the first connection

    return type("Handler", (Conversation, http.server.BaseHTTPRequestHandler), {})


def turn_away(connection: socket.socket) -> None:
    """Answer 503 to one connection too many, without waiting for its request."""
    response = as_json({"error": "too many connections"}, 503, "Retry-After: 1")
    with contextlib.suppress(OSError), connection:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.recv(65536)  # unread input would turn the close into a reset
        connection.send(encode(response, lasts=False))


def bind(address: Address, private: bool = False) -> socket.socket:
    """Return a listening socket; raises OSError. A stale unix socket is replaced.

    A private one has mode 0600 from its first moment: the umask sees to that, no chmod.
    """
    path, host, port = address
    if path and os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "it exists and is no socket", path)
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(path) != errno.ECONNREFUSED:
                text = "a supervisor answers there already"
                raise OSError(errno.EADDRINUSE, text, path)
        os.unlink(path)  # its supervisor was killed
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(socket.AF_UNIX if path else family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if host == "::":
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    before = os.umask(0o177)
    try:
        os.umask(0o177 if private else before)
        listener.bind(path or (host, port))
        listener.listen(128)
    finally:
        os.umask(before)
    listener.setblocking(False)
    return listener


def control_path(control: str, path: str) -> str:
    """Return the control socket of a configuration's real path.

    A derived one is in /run, the user's own folder, or one of ours in /tmp. Raises
    OSError where that is somebody else's.
    """
    if control != "auto":
        return os.path.abspath(control) if control else ""
    user = os.geteuid()
    folder = "/run" if user == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    if not folder:
        folder = f"/tmp/supervisors-{user}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == user
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
MOST_TEXT = 1000  # characters of STATUS=
ASK_TIME = 10.0  # seconds for the main loop to answer a thread
LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3}
STREAMS = ("stdout", "stderr")
FOREVER = float("inf")


def read_end(child: Child, wait_status: int) -> tuple[str, Exited]:
    """Return why a child did not come to exec, "" if it did; and how it ended."""
    report = b""
    if child.report is not None:
        os.set_blocking(child.report, False)
        with contextlib.suppress(BlockingIOError):
            report = os.read(child.report, 4096)
        os.close(child.report)
    code = os.waitstatus_to_exitcode(wait_status)
    end = Exited(code, None, False) if code >= 0 else Exited(None, -code, False)
    return report.decode(errors="replace"), end


def children_before() -> set[int]:
    """Return what a host process had started before: not ours to end. None as PID 1."""
    with contextlib.suppress(ChildProcessError):
        if os.getpid() != 1:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return set(descendants(os.getpid()))
    return set()


def remove_file(path: str, inode: int) -> None:
    """Remove a file of ours, unless another has taken its place."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


class Process:
    """A program's place in the supervisor, and its checks. Main thread.

    Checks run one at a time, and are given up at `timeout`.
    """

    def __init__(self, supervisor: Supervisor, program: Program) -> None:
        self.supervisor = supervisor
        self.program = program
        self.name = program.name
        self.status = Status()
        self.successor: Program | None = None  # from a reload, for the next start
        self.child: Child | None = None
        self.group = 0  # the last run's
        self.env_text = ""  # of the env_files, as it was started with
        self.output = Output(program.name)
        self.snapshot = Snapshot(program, self.status, self.output)
        self.check_began: float | None = None  # of the one that is under way
        self.check_pid = 0  # of its command

    def apply(self, event: Event) -> None:
        """Feed an event to the state machine, do what it says, publish the result."""
        self.status, actions = step(self.program, time.monotonic(), self.status, event)
        for action in actions:
            if isinstance(action, Spawn):
                self.apply(self.start_run())
                return
            if isinstance(action, Signal):
                # A stopped process takes no signal but SIGCONT.
                self.signal(signal_number(action.name))
                self.signal(signal.SIGCONT)
            elif not send(-self.group, signal.SIGKILL) and self.child is None:
                self.apply(Emptied())
        self.supervisor.at(self.status.deadline, self.wake)
        self.publish()

    def wake(self) -> None:
        self.apply(Due())

    def signal(self, number: int) -> None:
        """Signal the group, or the leader where that is wanted."""
        assert self.group > 0  # 0 would be our own
        if self.program.stopasgroup or self.child:
            send(-self.group if self.program.stopasgroup else self.group, number)

    def start_run(self) -> Event:
        """Start the program as it is defined now."""
        supervisor = self.supervisor
        self.program, self.successor = self.successor or self.program, None
        with contextlib.ExitStack() as stack:
            try:
                self.env_text = read_env_files(self.program)
                out, err = self.open_streams(stack)
                self.child = self.spawn(self.program.argv, out, err)
            except OSError as error:  # out of descriptors
                reason = f"cannot start {self.name}: {error.strerror}"
                return SpawnFailed(reason, 126)
            except SpawnError as error:
                reason = f"cannot start {self.name}: {error.reason}"
                return SpawnFailed(reason, error.code)
        self.group = self.child.pid
        supervisor.children[self.group] = self.ended
        supervisor.at(time.monotonic(), self.check)
        return Spawned(self.group)

    def open_streams(self, stack: contextlib.ExitStack) -> list[int]:
        """Return standard output and error; `stack` closes them, and has pipes read."""
        supervisor, fds = self.supervisor, list[int]()
        log_format = supervisor.config.log_format
        routes = [route(self.program, stream, log_format) for stream in STREAMS]
        for stream, where in zip(STREAMS, routes):
            if fds and where == routes[0] and where.log_format != "json":
                return fds * 2  # one pipe keeps the order of the two
            if isinstance(where.target, int):
                fd = where.target
            else:
                try:
                    fd, _ = open_log(where.target)
                except OSError as error:
                    place = f"the log file {where.target!r}"
                    reason = f"cannot open {place}: {error.strerror}"
                    raise SpawnError(reason) from None
                os.set_blocking(fd, True)
                stack.callback(os.close, fd)
            if not where.direct:  # the log thread opens the file again, and keeps it
                read_fd, fd = os.pipe()
                stack.callback(os.close, fd)
                read_fd = supervisor.file_limit.out_of_the_way(read_fd)
                os.set_blocking(read_fd, False)
                add = functools.partial(self.add_source, read_fd, stream, where)
                stack.callback(supervisor.log.post, add)
            fds.append(fd)
        return fds

    def add_source(self, fd: int, stream: str, where: Route) -> None:
        """Have a pipe read. Log thread."""
        supervisor, log, program = self.supervisor, self.supervisor.log, self.program
        recent, width, colour, form = None, 0, None, None
        if isinstance(where.target, int):
            recent, width = self.output.recent, supervisor.name_width
            if os.isatty(where.target) and not supervisor.environ.get("NO_COLOR"):
                names = [self.name, *supervisor.processes]  # it may be gone already
                colour = COLOURS[names[::-1].index(self.name) % len(COLOURS)]
        if where.log_format != "raw":
            form = log_formatter(where.log_format, self.name, stream, width, colour)
        sink = log.sink(where.target, program.logfile_maxbytes, program.logfile_backups)
        shared = supervisor.sharers[where.target] > 1
        log.add(Source(fd, sink, self.output, recent, stream, form, shared))

    def spawn(self, argv: tuple[str, ...], out: int, err: int) -> Child:
        """Start a process as this program's user, with its environment."""
        supervisor, program = self.supervisor, self.program
        account, extra = find_account(program), dict(supervisor.variables)
        if program.type == "notify":
            extra["NOTIFY_SOCKET"] = supervisor.notify_address()
        if program.watchdog_secs:
            extra["WATCHDOG_USEC"] = str(int(program.watchdog_secs * 1e6))
        environ = program_environ(
            program, supervisor.environ, account, self.env_text, extra
        )
        files = (supervisor.null_fd, out, err)
        return spawn(program, argv, environ, account, files, supervisor.file_limit)

    def ended(self, wait_status: int) -> None:
        """The leader was reaped."""
        assert self.child
        self.cancel_check()
        report, end = read_end(self.child, wait_status)
        self.child = None
        if report and self.status.state is not State.STOPPING:
            self.status = self.status._replace(state=State.STARTING, pid=None)
            failed, _, reason = report.partition(" ")
            self.apply(SpawnFailed(f"cannot start {self.name}: {reason}", int(failed)))
        else:
            survivors = send(-self.group, 0)
            self.apply(end._replace(survivors=survivors))
            if survivors:
                self.supervisor.lingering.add(self)

    def check(self) -> None:
        """Begin a health check; or give up the one that is under way."""
        check, supervisor = self.program.healthcheck, self.supervisor
        if check is None:
            return
        if self.check_began is not None:
            self.take_result(self.check_began, f"no answer within {check.timeout:g} s")
            return
        self.check_began = time.monotonic()
        supervisor.at(self.check_began + check.timeout, self.check)
        take = functools.partial(self.take_result, self.check_began)
        if not check.command:

            def work() -> None:
                supervisor.post(functools.partial(take, probe(check)))

            threading.Thread(target=work, daemon=True).start()
            return
        try:
            child = self.spawn(check.argv, supervisor.null_fd, supervisor.null_fd)
        except SpawnError as error:
            take(error.reason)
            return
        self.check_pid = child.pid

        def ended(wait_status: int) -> None:
            report, end = read_end(child, wait_status)
            status = Status(exit_code=end.code, exit_signal=end.signal)
            take("" if end.code == 0 else report or describe_end(status))

        supervisor.children[child.pid] = ended

    def take_result(self, began: float, detail: str) -> None:
        """Take what a check found, "" if it passed, and set the time of the next."""
        check = self.program.healthcheck
        if check is None or began != self.check_began:  # of one that was given up
            return
        self.cancel_check()
        self.apply(Checked(not detail, detail))
        status = self.status
        if status.state in (State.STARTING, State.RUNNING):
            first = min(check.interval, FIRST_INTERVAL)
            interval = first if status.healthy is None else check.interval
            self.supervisor.at(max(began + interval, time.monotonic()), self.check)

    def cancel_check(self) -> None:
        """End the check that is under way, and plan no other."""
        self.check_began = None
        self.supervisor.at(None, self.check)
        if self.check_pid:
            send(-self.check_pid, signal.SIGKILL)
        self.check_pid = 0

    def publish(self) -> None:
        """Make the status known: to HTTP threads, the log, and who depends on it."""
        old, status, supervisor = self.snapshot, self.status, self.supervisor
        if (status, self.program) == (old.status, old.program):
            return
        new_run = status.pid not in (None, old.status.pid)
        new_state = status.state is not old.status.state
        started_at = time.time() if new_run else old.started_at
        changed_at = time.time() if new_state else old.changed_at
        log_format = supervisor.config.log_format
        self.snapshot = new = Snapshot(
            self.program, status, self.output, log_format, started_at, changed_at
        )
        if supervisor.processes.get(self.name) is self:
            supervisor.snapshots[self.name] = new
        moved = status._replace(deadline=None) != old.status._replace(deadline=None)
        if moved:
            supervisor.events.append(new)
        if status.state not in (State.STARTING, State.RUNNING):
            self.cancel_check()
        if new_state or new_run:
            pid = f"pid {status.pid}" if status.pid else ""
            words = [status.state.value, pid, status.reason]
            backoff = status.state is State.BACKOFF
            before = old.status
            if status.restarts > before.restarts and before.state is not State.BACKOFF:
                words.append(f"after {describe_end(status)}")
            if backoff and status.deadline is not None:
                seconds = max(status.deadline - time.monotonic(), 0)
                words.append(f"restart in {seconds:.2g} s")
            level = "warning" if backoff or has_failed(status) else "info"
            supervisor.say(self.name, ", ".join(filter(None, words)), level)
        if moved:
            supervisor.react(self)

    def block(self) -> None:
        """Learn anew what it has to wait for."""
        others = self.supervisor.processes
        names = [one for one in (self.successor or self.program).needs if one in others]
        event = blocked_by({n: (others[n].program, others[n].status) for n in names})
        if event != (self.status.blocked, self.status.blocked_as):
            self.apply(event)

    def differs(self, program: Program) -> bool:
        """Return whether a definition, its env_files included, is another than ours."""
        if program != (self.successor or self.program)._replace(needs=program.needs):
            return True
        try:
            return self.group > 0 and read_env_files(program) != self.env_text
        except SpawnError:
            return True

    def renew(self) -> None:
        """Take over a new definition, with a new run if it was to be running."""
        status, program = self.status, self.successor or self.program
        stopping = status.state is State.STOPPING and status.after is After.STOP
        wanted = not stopping and status.state is not State.STOPPED
        if status.state in (State.EXITED, State.FATAL):
            wanted = program.autostart
        if not status.is_alive:
            self.program, self.successor = program, None
            self.publish()
        self.block()
        if wanted:
            self.apply(Restart())


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
        self.children: dict[int, Callable[[int], None]] = {}  # what to do at their end
        self.deadlines: dict[Callable[[], object], float] = {}
        self.calls: deque[Callable[[], object]] = deque()
        self.lingering: set[Process] = set()  # whose leader is gone, whose group is not
        self.answering: set[Conversation] = set()  # that are about to send
        self.told_manager = ""
        self.all_statuses: tuple[object, Response] = (None, Response(b""))
        self.notify: NotifySocket | None = None
        self.connections = threading.Semaphore(MOST_CONNECTIONS)
        self.streams = threading.Semaphore(MOST_STREAMS)
        self.variables: dict[str, str] = {}  # that every program gets
        self.started = False  # the first programs
        self.ending = False  # a shutdown has begun
        self.sweep_at: float | None = None  # when orphans are killed
        self.finished = False
        self.exit_code = 0
        self.cleanup = contextlib.ExitStack()

    def run(self) -> int:
        """Run until all has ended; return the exit status. Raises SupervisorError."""
        with self.cleanup:
            self.open()
            self.end_leftovers()
            for process in self.processes.values():
                process.block()
            for process in () if self.ending else list(self.processes.values()):
                if process.program.autostart and not self.ending:
                    process.apply(Start())
            self.started = True
            self.finish_if_done()
            self.keep_manager_informed()
            while not self.finished:
                self.turn(LONGEST_SLEEP)
        return self.exit_code

    def turn(self, longest: float) -> None:
        """Sleep until something happens, and do what it asks for."""
        nearest = min(self.deadlines.values(), default=FOREVER)
        sleep = min(max(nearest - time.monotonic(), 0), longest)
        for key, _ in self.selector.select(sleep):
            self.guard(key.data)
        now = time.monotonic()
        for call in [call for call, at in self.deadlines.items() if at <= now]:
            if self.deadlines.get(call, FOREVER) <= now:
                del self.deadlines[call]
                self.guard(call)

    def guard(self, call: Callable[..., object], *arguments: object) -> None:
        """Call something; a mistake in it must not end what all programs hang on."""
        try:
            call(*arguments)
        except Exception as error:
            where = error.__traceback__
            while where and where.tb_next:
                where = where.tb_next
            line = where.tb_lineno if where else 0
            self.say("", f"internal error: {error!r}, line {line}", "error")
            time.sleep(TICK)  # so that one that comes again does not fill the log

    def open(self) -> None:
        """Acquire everything, in an order in which failure leaves nothing behind."""
        defer = self.cleanup.callback
        try:
            while (null_fd := os.open(os.devnull, os.O_RDWR)) < 3:
                pass  # a standard descriptor was closed: no socket may take its place
        except OSError:  # a bare root: a pipe without a writer reads as empty, too
            null_fd, write_end = os.pipe()
            os.close(write_end)
        self.null_fd = null_fd
        defer(os.close, null_fd)
        for fd in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else range(256):
            with contextlib.suppress(OSError):  # it is closed
                if int(fd) > 2:
                    os.set_inheritable(int(fd), False)
        self.environ = original_environ()
        self.selector = selectors.DefaultSelector()
        defer(self.selector.close)
        self.catch_signals()
        self.log = LogThread(self.config.log_format == "json")
        defer(self.release_followers)
        defer(self.log.close)
        self.token = self.read_token(self.config)
        self.bind_all()
        self.file_limit = FileLimit()
        defer(lambda: self.file_limit.set(self.file_limit.soft))
        self.spared = children_before()
        if not become_subreaper() and sys.platform == "linux":
            self.warn("cannot become a subreaper: orphans go to PID 1")
        if self.config.pidfile:
            self.write_pidfile(self.config.pidfile)
        if self.lifeline is not None:
            self.watch(self.lifeline, self.lose_lifeline)
        if self.config.path:
            run = (path_hash(self.config.path), os.getpid(), start_time(os.getpid()))
            self.variables[RUN_VARIABLE] = ".".join(map(str, run))
        self.add_programs(self.config.programs.values())
        self.keep_alive()

    def write_pidfile(self, path: str) -> None:
        try:
            with open(path, "w") as file:
                file.write(f"{os.getpid()}\n")
            self.cleanup.callback(remove_file, path, os.stat(path).st_ino)
        except OSError as error:
            self.warn(f"cannot write the pidfile {path!r}: {error.strerror}")

    def watch(self, source: int | socket.socket, call: Callable[[], object]) -> None:
        """Have `call` called whenever something can be read."""
        self.selector.register(source, selectors.EVENT_READ, call)

    def catch_signals(self) -> None:
        """Have signals arrive as bytes in a pipe; none is ignored in programs.

        The wake-up descriptor gets its byte only where a handler is set in Python.
        Popen resets SIGPIPE and SIGXFSZ, which the interpreter ignores.
        """
        defer = self.cleanup.callback
        self.wake_read, self.wake_write = wake = os.pipe()
        for fd in wake:
            os.set_blocking(fd, False)
            defer(os.close, fd)
        defer(setattr, self, "wake_write", -1)  # for threads that come too late
        self.watch(self.wake_read, self.read_wakeups)
        before = signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        defer(signal.set_wakeup_fd, before)
        wanted = {*ENDINGS, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR2}
        fixed = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGKILL, signal.SIGSTOP}
        for number in signal.valid_signals() - fixed:
            handler = signal.getsignal(number)
            if number in wanted or handler == signal.SIG_IGN:  # from nohup, say
                defer(signal.signal, number, handler or signal.SIG_DFL)
                signal.signal(number, lambda number, frame: None)
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        defer(signal.pthread_sigmask, signal.SIG_SETMASK, mask)

    def bind_all(self) -> None:
        """Bind the control socket and all addresses; raises SupervisorError."""
        config = self.config
        addresses = [(parse_address(text), False) for text in config.listen if text]
        try:
            if config.path or config.control != "auto":
                path = control_path(config.control, config.path)
                addresses[:0] = [(Address(path=path), True)] * bool(path)
        except OSError as error:
            self.warn(f"cannot have a control socket in {error.filename}: {error}")
        for address, is_control in addresses:
            try:
                self.listen(address, is_control)
            except OSError as error:
                place = f"{'the control socket ' * is_control}{address}"
                reason = f"cannot listen on {place}: {error.strerror or error}"
                taken = error.errno in (errno.EADDRINUSE, errno.EEXIST)
                # A container's programs run without; others' verbs find another way.
                if taken if is_control else os.getpid() != 1:
                    raise SupervisorError(reason) from None
                self.warn(reason)
            else:
                if not (address.path or address.is_loopback or self.token):
                    self.warn(f"{address} is open for reading, no token is set")

    def listen(self, address: Address, is_control: bool) -> None:
        try:
            bound = bind(address, private=is_control)
        except OSError as error:
            if address.host != "::" or error.errno not in NO_IPV6:
                raise
            bound = bind(address._replace(host="0.0.0.0"))
        self.cleanup.callback(bound.close)
        if address.path:
            inode = os.stat(address.path).st_ino
            self.cleanup.callback(remove_file, address.path, inode)
        if is_control:
            self.variables["SUPERVISOR_SERVER_URL"] = f"unix://{address.path}"
        listener = Listener(bound, address, is_control)
        self.watch(bound, functools.partial(self.accept, listener))

    def read_token(self, config: Config) -> str:
        """Return the token of a configuration; raises ConfigError."""
        path = config.token_file
        if not path:
            return config.token
        try:
            with open(path, encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    self.warn(f"token_file {path!r} can be read by others")
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"cannot read token_file {path!r}: {error}"]) from None

    def at(self, when: float | None, call: Callable[[], object]) -> None:
        """Have something called once, at an instant; with None not at all."""
        self.deadlines.pop(call, None)
        if when is not None:
            self.deadlines[call] = when

    def post(self, call: Callable[[], object]) -> None:
        """Have the main thread call something. Any thread."""
        self.calls.append(call)
        with contextlib.suppress(OSError):  # full: it is awake anyway; closed: too late
            os.write(self.wake_write, b"\0")

    def ask(self, question: Callable[[], T]) -> T:
        """Have the main thread call something; return or raise its result."""
        answers: list[T | Exception] = []
        done = threading.Event()

        def call() -> None:
            try:
                answers.append(question())
            except Exception as error:
                answers.append(error)
            done.set()

        self.post(call)
        if not done.wait(ASK_TIME):
            raise HttpError(503, "the main loop is busy")
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    def say(self, name: str, text: str, level: str = "info") -> None:
        """Write a message to standard error, through the log thread. Any thread."""
        if LEVELS[level] >= self.level:
            self.log.say(name, text, level)

    def warn(self, text: str) -> None:
        self.say("", text, "warning")

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
            try:
                self.reload()
            except SupervisorError as error:
                self.say("", f"cannot reload: {error}", "error")
        if signal.SIGUSR2 in numbers:
            self.reopen_logs()
        while self.calls:
            self.guard(self.calls.popleft())

    def reap(self) -> bool:
        """Collect all children that have ended; return whether any is left."""
        ends = []  # at first only these: what is started again may end at once
        with contextlib.suppress(ChildProcessError):
            while (end := os.waitpid(-1, os.WNOHANG))[0]:
                ends.append(end)
            ends.append((0, 0))
        for pid, wait_status in ends:
            if pid in self.children:
                self.guard(self.children.pop(pid), wait_status)
        return (0, 0) in ends

    def alive(self) -> list[Process]:
        return [one for one in self.processes.values() if one.status.is_alive]

    def look_at_groups(self) -> None:
        """Notice that a group is empty; not every end makes a SIGCHLD."""
        for process in list(self.lingering):
            settled = process.child or process.status.state is not State.STOPPING
            if settled or not group_lives(process.group):
                self.lingering.discard(process)
                if not settled:
                    process.apply(Emptied())
        again = time.monotonic() + TICK if self.lingering else None
        self.at(again, self.look_at_groups)

    def accept(self, listener: Listener) -> None:
        try:
            connection, _ = listener.socket.accept()
        except OSError:  # out of descriptors, as a rule: wait for some to be closed
            call = self.selector.unregister(listener.socket).data
            again = functools.partial(self.watch, listener.socket, call)
            self.at(time.monotonic() + 1, again)
            return
        connection.setblocking(True)
        if not (listener.is_control or self.connections.acquire(blocking=False)):
            turn_away(connection)
            return

        def converse() -> None:
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                if not listener.is_control:
                    stack.callback(self.connections.release)
                stack.enter_context(connection)
                handler_class()(connection, "", Place(self, listener))  # type: ignore[arg-type]

        try:
            threading.Thread(target=converse, daemon=True).start()
        except RuntimeError:  # no thread to be had: a limit of processes
            connection.close()
            if not listener.is_control:
                self.connections.release()

    @contextlib.contextmanager
    def stream_slot(self, listener: Listener) -> Iterator[None]:
        """Hold one of the places for streams; raises HttpError 503. Any thread."""
        if not (listener.is_control or self.streams.acquire(blocking=False)):
            raise HttpError(503, f"{MOST_STREAMS} streams are open already")
        try:
            yield
        finally:
            if not listener.is_control:
                self.streams.release()

    def add_programs(self, programs: Iterable[Program]) -> None:
        """Take programs in, without starting them, and put all in the file's order."""
        for program in programs:
            if program.name not in self.processes:
                self.processes[program.name] = Process(self, program)
        names = dict.fromkeys([*self.config.programs, *self.processes])
        self.processes = {name: self.processes[name] for name in names}
        self.snapshots = {name: one.snapshot for name, one in self.processes.items()}
        self.dependents: defaultdict[str, list[Process]] = defaultdict(list)
        for process in self.processes.values():
            for name in (process.successor or process.program).needs:
                self.dependents[name].append(process)
        self.sharers: Counter[int | str] = Counter()  # of a target of output
        self.name_width = 0  # of those in the lines of the terminal
        for name, program in self.config.programs.items():
            for where in {route(program, s, self.config.log_format) for s in STREAMS}:
                self.sharers[where.target] += 1
                if isinstance(where.target, int) and not where.direct:
                    self.name_width = max(self.name_width, len(name))

    def is_gone(self, name: str) -> bool:
        """Return whether a program was removed, or everything is over. Any thread."""
        return self.events.closed or name not in self.snapshots

    def react(self, process: Process) -> None:
        """Do what the change of one program means to the others."""
        status, program, name = process.status, process.program, process.name
        for dependent in self.dependents[name]:
            dependent.block()
        if not status.is_alive:
            if process.successor:
                process.program, process.successor = process.successor, None
                process.block()
            if name in self.processes and name not in self.config.programs:
                del self.processes[name]
                del self.snapshots[name]
                self.events.append(name)
            if status.state in (State.EXITED, State.FATAL):
                wish = program.on_failure if has_failed(status) else program.on_success
                if wish == "shutdown":
                    code = exit_status(status)
                    self.begin_shutdown(code, f"{name} has ended")
            self.finish_if_done()
        self.keep_manager_informed()

    def order(self, verb: str, names: list[str]) -> tuple[int, dict[str, Snapshot]]:
        """Start, stop or restart programs; return where the events after it begin."""
        if self.ending and verb != "stop":
            raise SupervisorError("cannot start anything: shutting down")
        orders: dict[str, Event] = {"start": Start(), "stop": Stop()}
        event = orders.get(verb, Restart())
        chosen = [self.processes[name] for name in names if name in self.processes]
        for process in chosen:
            if verb == "stop" or not self.ending:
                process.apply(event)
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
            self.watch(self.notify.socket, self.read_notifications)
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
                    text = "".join(filter(str.isprintable, value[:MOST_TEXT]))
                    process.apply(Text(text))

    def owner(self, pid: int) -> Process | None:
        """Return the program of a process: by session or ancestry."""
        leaders = {one.group: one for one in self.processes.values() if one.child}
        with contextlib.suppress(OSError, IndexError):
            while pid > 1:
                leader = os.getsid(pid)  # every program leads a session
                if leader in leaders:
                    return leaders[leader]
                pid = int(process_fields(pid)[1])
        return None

    def end_leftovers(self) -> None:
        """End what a dead supervisor of this configuration left; they are no children.

        What they start on the way is found as well.
        """
        digest, told, began = path_hash(self.config.path), set[int](), time.monotonic()
        # While a process executes, its environment cannot be read: hence a second look.
        while left := find_leftovers(digest) or (told and find_leftovers(digest)):
            longest, passed = 0.0, time.monotonic() - began
            for pid, name in left.items():
                program = self.config.programs.get(name, Program(name, name))
                longest = max(longest, program.stopwaitsecs)
                if pid not in told:
                    self.warn(f"ending what a killed supervisor left: {name} ({pid})")
                    send(pid, signal_number(program.stopsignal))
                    send(pid, signal.SIGCONT)
                if self.ending or passed >= program.stopwaitsecs:
                    send(pid, signal.SIGKILL)
            told |= left.keys()
            if passed >= longest + SWEEP:
                return
            self.turn(TICK)

    def reload(self) -> dict[str, Any]:
        """Read the file anew and become what it says; raises ConfigError first."""
        old = self.config
        if self.ending or not old.path:
            raise SupervisorError("shutting down" if self.ending else "it has no file")
        config = load_config(old.path)._replace(**self.overrides)
        self.token = self.read_token(config)
        self.config = config
        self.log.as_json = config.log_format == "json"
        result = self.change_programs(old.programs)
        fixed = ("listen", "control", "pidfile")
        stuck = [key for key in fixed if getattr(old, key) != getattr(config, key)]
        if stuck:
            result["needs_restart"] = stuck
            self.warn(f"a changed {', '.join(stuck)} needs a restart")
        counts = [f"{len(names)} {key}" for key, names in list(result.items())[:3]]
        self.say("", f"reloaded: {', '.join(counts)}, {result['unchanged']} unchanged")
        return result

    def change_programs(self, old: Mapping[str, Program]) -> dict[str, Any]:
        """Stop, start and restart what differs; leave all else untouched."""
        programs = self.config.programs
        added = [name for name in programs if name not in old]
        gone = [one for name, one in self.processes.items() if name not in programs]
        changed = []
        for name in [name for name in programs if name in self.processes]:
            process, program = self.processes[name], programs[name]
            if name in added or process.differs(program):
                process.successor = program
                changed += [process] * (name in old)
            else:  # but there may be more instances of what it needs
                process.program = process.program._replace(needs=program.needs)
        self.add_programs(programs.values())
        for process in changed:
            if not self.ending:
                process.renew()
        for process in list(self.processes.values()):
            process.block()
        for process in gone:
            process.apply(Stop())
            self.react(process)  # it may have been stopped before
        for name in added:
            if programs[name].autostart and not self.ending:
                self.processes[name].apply(Start())
        return {
            "added": added,
            "changed": [process.name for process in changed],
            "removed": [process.name for process in gone],
            "unchanged": len(programs) - len(added) - len(changed),
        }

    def reopen_logs(self) -> None:
        self.log.reopen()
        for name, program in self.config.programs.items():
            for where in {route(program, s, self.config.log_format) for s in STREAMS}:
                if where.direct and where.target not in (1, 2, NOWHERE):
                    reason = f"{where.target} is held by the program itself: restart it"
                    self.say(name, f"cannot reopen its log: {reason}", "warning")
        self.say("", "reopened the log files")

    def release_followers(self) -> None:
        """Let streams send what there still is, and end."""
        self.events.close()
        for process in self.processes.values():
            process.output.recent.close()
        end = time.monotonic() + FAREWELL
        while self.answering and time.monotonic() < end:
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
        for process in list(self.processes.values()):
            # From here on nothing comes back, whatever way it ends.
            program = process.program
            process.program = program._replace(autorestart=False, healthcheck=None)
            process.cancel_check()
            if process.status.state in (State.STOPPING, State.WAITING, State.BACKOFF):
                process.apply(Stop())
        now = time.monotonic()
        self.at(now + WAITING_FIRST, self.name_waiting)
        if self.config.shutdown_timeout is not None:
            late = functools.partial(self.kill_all, "shutdown_timeout is over")
            self.at(now + self.config.shutdown_timeout, late)
        self.finish_if_done()

    def name_waiting(self) -> None:
        names = ", ".join(one.name for one in self.alive())
        self.say("", f"still waiting for {names or 'orphans'}")
        self.at(time.monotonic() + WAITING_NEXT, self.name_waiting)

    def kill_all(self, reason: str) -> None:
        self.warn(f"killing everything: {reason}")
        self.sweep_at = time.monotonic()
        for process in self.alive():
            process.apply(Stop())
            send(-process.group, signal.SIGKILL)
        self.finish_if_done()

    def finish_if_done(self) -> None:
        """Do what the end of a program allows; called when one has ended.

        In a shutdown those stop that nothing alive depends on. Orphans get SIGTERM with
        the last level of programs, and SIGKILL when those have been gone for a while.
        """
        if not self.ending:
            if self.config.exit_when_done and self.started:
                self.finish_when_done()
            return
        now, alive = time.monotonic(), self.alive()
        for process in alive:
            dependents = self.dependents[process.name]
            needed = any(one.status.is_alive for one in dependents)
            if process.status.state is not State.STOPPING and not needed:
                process.apply(Stop())
        if self.sweep_at is None:
            if any(one.status.state is not State.STOPPING for one in alive):
                return
            self.sweep_at = FOREVER
            self.orphans(signal.SIGTERM, signal.SIGCONT)
        if alive:
            return
        self.sweep_at = min(self.sweep_at, now + SWEEP)
        none_left = not self.reap() or not self.orphans()
        if now >= self.sweep_at:
            self.orphans(signal.SIGKILL)
        self.finished = none_left or now >= self.sweep_at + SWEEP
        self.at(None if self.finished else now + TICK, self.finish_if_done)

    def orphans(self, *signals: int) -> list[int]:
        """Signal, and return, what is ours to reap and has left its program."""
        programs = {one.group for one in self.alive()}
        found = descendants(os.getpid(), self.children.keys() | self.spared | programs)
        for pid in found:
            for number in signals:
                send(pid, number)
        return found

    def finish_when_done(self) -> None:
        """With `exit_when_done`, shut down once every program has ended for good."""
        codes = []
        for process in self.processes.values():
            status = process.status
            if has_failed(status):
                codes.append(exit_status(status))
            elif status.state is State.WAITING and status.blocked_as == "failed":
                codes.append(1)
            elif status.state not in (State.STOPPED, State.EXITED):
                return
        self.begin_shutdown([*codes, 0][0], "all programs have ended")

    def keep_manager_informed(self) -> None:
        """Tell systemd, where it asked for it, whether all is ready."""
        if "NOTIFY_SOCKET" in self.environ and not self.ending:
            wanted = [one for one in self.processes.values() if one.program.autostart]
            missing = [
                one.name
                for one in wanted
                if not one.snapshot.ready
                and (one.status.state is not State.EXITED or has_failed(one.status))
            ]
            waiting = f"STATUS=waiting for {', '.join(missing)}"
            text = waiting if missing else "READY=1\nSTATUS=ready"
            if text != self.told_manager:
                self.told_manager = text
                tell_manager(text)

    def keep_alive(self) -> None:
        period = self.environ.get("WATCHDOG_USEC", "")
        if period.isdecimal():
            tell_manager("WATCHDOG=1")
            self.at(time.monotonic() + int(period) / 2e6, self.keep_alive)


# === 10. Client and command line ======================================================
#
# The verbs talk HTTP to the control socket, with the same client as the library.

DEFAULT_FILE = "supervisors.toml"
START_TIME = 10.0  # seconds for a supervisor in a test to answer
POLL = 0.02  # seconds between two looks of a client that waits
MANY = 1000  # names


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

    def ask(self, request: str, timeout: float | None = 10.0, read: Any = None) -> Any:
        """Return what `read` makes of the answer, else its JSON."""
        import http.client
        import json

        unix, place, status = self.address.path, str(self.address), 0
        host = "localhost" if unix else place
        connection = http.client.HTTPConnection(host, timeout=timeout)
        try:
            with contextlib.closing(connection):
                if unix:
                    connection.sock = socket.socket(socket.AF_UNIX)
                    connection.sock.settimeout(timeout)
                    connection.sock.connect(unix)
                method, path = request.split(" ")
                connection.request(method, path, headers=self.headers)
                response = connection.getresponse()
                status = response.status
                content = (read if read and status < 400 else json.load)(response)
            if status < 400 or "programs" in content:  # as in ill health
                return content
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", "") or repr(error)
            advice = "start one, or name another with -c or -s"
            text = f"no supervisor at {place}: {reason}; {advice}"
            status, content = 0, {"error": text}
        failure = SupervisorError(content.get("error", f"HTTP status {status}"))
        failure.code = 4 if status in (0, 404) else 1
        failure.errors = content.get("errors", ())
        raise failure

    def answers(self) -> bool:
        try:
            self.ask("GET /health/live")
        except SupervisorError as error:
            return error.code != 4
        return True

    def get(self, what: str, name: str | None = None) -> Any:
        return self.ask(f"GET /{what}{quote(name)}")

    def order(self, verb: str, name: str, wait: float = 60.0) -> Any:
        """Return the status once the program is as wanted, has failed, or is late."""
        wait = min(max(wait, 0.0), MOST_WAIT)
        request = f"POST /programs{quote(name)}/{verb}?wait={wait}"
        return self.ask(request, wait + ASK_TIME)

    status = functools.partialmethod(get, "status")  # of one, or a list
    health = functools.partialmethod(get, "health")  # `status` and `programs` not well
    start = functools.partialmethod(order, "start")
    stop = functools.partialmethod(order, "stop")
    restart = functools.partialmethod(order, "restart")
    reload = functools.partialmethod(ask, "POST /reload", 30.0)
    shutdown = functools.partialmethod(ask, "POST /shutdown")  # only asks for it

    def signal(self, name: str, signal: str) -> Any:
        return self.ask(f"POST /programs{quote(name)}/signal?signal={signal}")

    def logs(self, name: str, lines: int = 100) -> str:
        request = f"GET /programs{quote(name)}/logs?lines={lines}"
        content: bytes = self.ask(request, 30.0, lambda answer: answer.read())
        return content.decode(errors="replace")

    def wait_healthy(self, timeout: float = 30.0) -> None:
        """Wait until all that is wanted is well; else raises SupervisorError."""
        end = time.monotonic() + timeout
        while (answer := self.health())["status"] != "ok":
            if time.monotonic() >= end:
                reasons = "; ".join(map(": ".join, answer["programs"].items()))
                raise SupervisorError(f"not healthy after {timeout:g} s: {reasons}")
            time.sleep(POLL)


def quote(name: str | None) -> str:
    """Return a name as a part of a path, with the slash before it."""
    import urllib.parse

    return "/" + urllib.parse.quote(name, safe="") if name else ""


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
                file.writelines(f"{key} = {to_toml(config[key])}\n" for key in config)
        else:
            path = os.fspath(config)
        argv = [sys.executable, os.path.abspath(__file__), "-c", path]
        argv.append(f"--private={folder}/s")
        # At its end it closes the pipe, and the supervisor sees the end of file.
        with subprocess.Popen(argv, stdin=subprocess.PIPE) as popen:
            client, end = Client(f"unix:{folder}/s"), time.monotonic() + START_TIME
            while not client.answers():
                if popen.poll() is not None or time.monotonic() >= end:
                    raise SupervisorError("the supervisor does not start")
                time.sleep(POLL)
            yield client


def to_toml(value: Any) -> str:
    """Return a value, or a key, as TOML; tables inline."""
    import json

    if isinstance(value, Mapping):
        pairs = [f"{to_toml(key)} = {to_toml(one)}" for key, one in value.items()]
        return "{" + ", ".join(pairs) + "}"
    return json.dumps(value, ensure_ascii=False)


def connect(options: Mapping[str, str]) -> Client:
    """Return a client of -s, else -c, the environment, the default file."""
    server = "" if options["-c"] else os.environ.get("SUPERVISOR_SERVER_URL", "")
    server, path = options["-s"] or server, options["-c"] or DEFAULT_FILE
    config = Config(listen=())
    with contextlib.suppress(ConfigError):  # a verb works while the file is broken
        environ = original_environ()
        config = Config(**read_table(Config, read_toml(path), str, [], environ))
    token = os.environ.get("SUPERVISOR_TOKEN") or config.token
    if config.token_file and not token:
        with contextlib.suppress(OSError), open(config.token_file) as file:
            token = file.read().strip()
    addresses = [server]
    if not server:
        addresses = [
            re.sub(r"^(0\.0\.0\.0)?:", "127.0.0.1:", one) for one in config.listen
        ]
        with contextlib.suppress(OSError):
            control = control_path(config.control, os.path.realpath(path))
            addresses.insert(0, f"unix:{control}" if control else "")
    clients = [Client(address, token) for address in addresses if address]
    if not clients:
        raise SupervisorError(f"{path} has neither control nor listen: use -s")
    # One that does not answer says so when it is asked again.
    return next(filter(Client.answers, clients), clients[0])


def do_status(client: Client, options: Mapping[str, str], names: str) -> int:
    objects, unwell = client.status(names), client.health()["programs"]
    if "--json" in options:
        import json

        print(json.dumps(objects, indent=2))
    else:
        width = max(len(one["name"]) for one in objects)
        coloured = not os.environ.get("NO_COLOR") and sys.stdout.isatty()
        colours = {"RUNNING": 32, "BACKOFF": 31, "FATAL": 31} if coloured else {}
        for one in objects:
            state, code = f"{one['state']:<9}", colours.get(one["state"])
            state = f"\033[{code}m{state}\033[0m" if code else state
            print(f"{one['name']:<{width}}   {state} {one['description']}".rstrip())
    return 3 if any(one["name"] in unwell for one in objects) else 0


def do_health(client: Client, options: Mapping[str, str], names: str) -> int:
    answer = client.health(names)
    print(answer["status"], *map(": ".join, answer["programs"].items()), sep="\n")
    return 0 if answer["status"] == "ok" else 1


def do_order(verb: str, client: Client, options: Mapping[str, str], names: str) -> int:
    """Start, stop or restart, and say what came of it."""
    before = {one["name"]: one for one in client.status(names)}
    no_wait, code = "--no-wait" in options, 0
    wait = 0.0 if no_wait else float(options["-t"])
    for one in client.order(verb, names, wait):
        name, state, pid = one["name"], one["state"], one["pid"]
        old = before.get(name, one)
        text, done = f"{state} {one['reason']}".rstrip(), no_wait
        if verb == "stop" and state == "STOPPED":
            text, done = "stopped" if old["state"] != state else "not running", True
        elif verb != "stop" and state == "EXITED":
            done = done or client.health(name)["status"] == "ok"
        elif verb != "stop" and one["ready"]:
            same = verb == "start" and pid == old["pid"]
            text, done = "already running" if same else f"started, pid {pid}", True
        print(f"{name}: {text}")
        code = code if done else 1
    return code


def do_signal(client: Client, options: Mapping[str, str], names: str) -> int:
    number, _, names = names.partition(",")
    objects = client.signal(names, number)
    for one in objects:
        print(f"{one['name']}: {'signalled' if one['running'] else 'not running'}")
    return 0 if all(one["running"] for one in objects) else 1


def do_logs(client: Client, options: Mapping[str, str], names: str) -> int:
    """Print the newest lines; with several programs, each line with its name."""
    found = [one["name"] for one in client.status(names)]
    width, follow, failed = max(map(len, found)), "-f" in options, set()
    query = f"lines={options['-n']}&follow={follow:d}"
    output = io.FileIO(1, "wb", closefd=False)  # a line is one write

    def copy(name: str) -> None:
        prefix = f"{name:<{width}} | ".encode() if len(found) > 1 else b""
        end = b"\n" if prefix else b""  # which a last line may lack
        try:
            client.ask(
                f"GET /programs{quote(name)}/logs?{query}",
                None if follow else 30.0,
                lambda answer: output.writelines(
                    prefix + line.removesuffix(end) + end for line in answer
                ),
            )
        except SupervisorError as error:
            if error.code != 4:  # else it is gone, or nobody reads on
                failed.add(name)
                print(f"{name}: {error}", file=sys.stderr)

    copies = [threading.Thread(target=copy, args=[one], daemon=True) for one in found]
    for thread in copies:
        thread.start()
        thread.join(0 if follow else None)
    for thread in copies:
        thread.join()
    return 1 if len(failed) == len(found) else 0


def do_reload(client: Client, options: Mapping[str, str], names: str) -> int:
    for key, found in client.reload().items():
        if found:
            print(f"{key}:", ", ".join(found) if isinstance(found, list) else found)
    return 0


def do_shutdown(client: Client, options: Mapping[str, str], names: str) -> int:
    client.shutdown()
    end = time.monotonic() + float(options["-t"])
    while "--no-wait" not in options and client.answers():
        if time.monotonic() >= end:
            print("still shutting down", file=sys.stderr)
            return 1
        time.sleep(POLL)
    print("shutting down" if "--no-wait" in options else "shut down")
    return 0


Verb = Callable[[Client, Mapping[str, str], str], int]
# What a verb does, how many words it takes, from and to, and which options.
VERBS: dict[str, tuple[Verb, int, int, str]] = {
    "health": (do_health, 0, MANY, ""),
    "logs": (do_logs, 0, MANY, "-f -n"),
    "reload": (do_reload, 0, 0, ""),
    "shutdown": (do_shutdown, 0, 0, "--no-wait -t"),
    "signal": (do_signal, 2, MANY, ""),
    "status": (do_status, 0, MANY, "--json"),
}
for _verb in ("start", "stop", "restart"):
    VERBS[_verb] = (functools.partial(do_order, _verb), 1, MANY, "--no-wait -t")


def parse_arguments(arguments: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """Return verb, words, and options by flag; raises SupervisorError."""
    import getopt  # argparse takes 8 ms

    flags = ["configfile=", "server=", "private=", "json", "no-wait"]
    short = {"--configfile": "-c", "--server": "-s"}
    try:
        found, words = getopt.gnu_getopt(arguments, "c:s:n:t:fvq", flags)
        given = {short.get(flag, flag): value for flag, value in found}
        verb = words.pop(0) if words and words[0] in (*VERBS, "check") else ""
        _, least, most, takes = VERBS.get(verb, (None, 0, "-c" not in given, ""))
        if unknown := given.keys() - f"-c -s -v -q --private {takes}".split():
            raise ValueError(f"unexpected {min(unknown)}")
        if not least <= len(words) <= most:
            raise ValueError(f"too {'few' if len(words) < least else 'many'} words")
        options = {"-c": "", "-s": "", "-t": "60", "-n": "100", **given}
        if verb == "signal":
            signal_number(words[0])
        if not 0 <= float(options["-t"]) <= MOST_WAIT or int(options["-n"]) < 0:
            raise ValueError(f"expected -t from 0 to {MOST_WAIT:g}, -n >= 0")
    except (getopt.GetoptError, ValueError) as error:
        raise SupervisorError(f"{error} (see --help)") from None
    return verb, words, options


def main(arguments: list[str]) -> int:
    """Do what a command line says; return the exit status."""
    if {"-h", "--help", "--version"} & {*arguments}:
        text = str(__doc__).partition("else.\n\n")[2].partition("The file")[0].rstrip()
        print(f"supervisors {__version__}" if "--version" in arguments else text)
        return 0
    verb = ""
    try:
        verb, words, options = parse_arguments(arguments)
        if verb:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        if verb in VERBS:
            names = ",".join(words + words[-1:])  # with a comma it gets an array
            return VERBS[verb][0](connect(options), options, names)
        path = [*words, options["-c"] or DEFAULT_FILE][0]
        config, lifeline = load_config(path), None
        if verb == "check":
            print(f"{path}: ok, {len(config.programs)} programs")
            return 0
        overrides: dict[str, Any] = {}
        if "--private" in options:  # of `running`
            lifeline, overrides = 0, {"control": options["--private"]}
            if "listen" not in read_toml(path):
                overrides["listen"] = ()
        level = "debug" if "-v" in options else "warning" if "-q" in options else "info"
        return Supervisor(config, level, lifeline, overrides).run()
    except SupervisorError as error:
        print(*(error.errors or [f"supervisors: {error}"]), sep="\n", file=sys.stderr)
        return 1 if "health" in (verb, *arguments[:1]) else error.code if verb else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the interpreter's last flush
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
