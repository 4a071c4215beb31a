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
    5   Log files        rotation, the terminal, a thread's loop, the log thread
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


def shell_code(code: int) -> int:
    """Return an exit code as a shell has it: 128 + N in the place of -N, a signal."""
    return code if code >= 0 else 128 - code


def attempt(call: Callable[..., Any], *arguments: object) -> Any:
    """Call something whose failure, as a lost terminal's, is no harm: it gives -1."""
    try:
        return call(*arguments)
    except (OSError, OverflowError):  # the latter of a number that is none in C
        return -1


def process_file(pid: int | str, name: str) -> bytes:
    """Return a file of /proc/PID; b"" if it is gone, or not for us to look at."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def original_environ() -> dict[str, str]:
    """Return the environment without what CPython does to LC_CTYPE (PEP 538)."""
    environ = dict(os.environ)
    known = os.fsdecode(process_file("self", "environ")).split("\0")
    given = {one[:8]: one[9:] for one in known if one.startswith("LC_CTYPE=")}
    # Without /proc we guess: it does it where the locale is that of C.
    ours = known != [""] or environ.get("LANG", "") in ("", "C", "POSIX")
    if ours and environ.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        del environ["LC_CTYPE"]
        environ |= given
    return environ


def call_libc(name: str, *arguments: int) -> int:
    """Call a function of the C library; return -1 where it cannot be had."""
    try:
        import ctypes  # 2 ms, and only needed here

        return int(getattr(ctypes.CDLL(None), name)(*arguments))
    except (ImportError, OSError, AttributeError):
        return -1


def sees_processes() -> bool:
    """Return whether there is a /proc, and not one of another PID namespace."""
    return bool(attempt(os.readlink, "/proc/self") == str(os.getpid()))


def adopt_orphans(warn: Callable[[str], object]) -> None:
    """Have orphaned descendants become our children; warn if they cannot be had."""
    if sys.platform != "linux":
        return
    if not sees_processes():
        warn("no /proc of this PID namespace: cannot find what leaves its group")
    if os.getpid() != 1 and call_libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        warn("cannot become a subreaper: orphans go to PID 1")


def process_fields(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat behind the name (proc(5)); [] if it is gone.

    [0] state, [1] parent, [2] group, [3] session, [17] threads, [19] start in ticks.
    """
    return process_file(pid, "stat").rpartition(b")")[2].split()


def is_dead(fields: list[bytes]) -> bool:
    """Return whether all of a process, not only its main thread, waits to be reaped."""
    return fields[0] in (b"Z", b"X") and int(fields[17]) < 2


def process_table() -> dict[int, list[bytes]]:
    """Return the fields of all processes by pid; empty where there is no /proc."""
    names = os.listdir("/proc") if sees_processes() else []
    pids = map(int, filter(str.isdecimal, names))
    return {pid: fields for pid in pids if (fields := process_fields(pid))}


def descendants(spare: Set[int] = frozenset()) -> list[int]:
    """Return our children and all theirs, but none of a group or session in `spare`."""
    children: dict[int, list[int]] = {}
    for pid, fields in process_table().items():
        # A program's group, and session, lives on while its leader is reaped.
        group, session = int(fields[2]), int(fields[3])
        if not is_dead(fields) and not {pid, group, session} & spare:
            children.setdefault(int(fields[1]), []).append(pid)
    found = list(children.get(os.getpid(), ()))
    for pid in found:  # grows while it is read: a walk, breadth first
        found += children.get(pid, ())
    return found


def group_lives(group: int) -> bool:
    """Return whether a group has more than zombies, which kill(2) counts too."""
    if not send(-group, 0):
        return False
    members = [one for one in process_table().values() if int(one[2]) == group]
    return not members or not all(map(is_dead, members))


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
    # Not `print`: it takes standard output where this one is closed.
    attempt(os.write, 2, os.fsencode(f"supervisors: {text}\n"))


class Init:
    """One command under an init. `run` returns the exit status; main thread, once."""

    def __init__(self, arguments: list[str]) -> None:
        """Take what stands around `--`, else have no `command`; raises ValueError."""
        self.command: list[str] = []
        self.rewrites: dict[int, int] = {}
        self.single, self.grace = False, GRACE
        words = iter(arguments)
        for word, equals, value in (word.partition("=") for word in words):
            if word == "--":
                self.command = list(words)
                if not self.command:
                    raise ValueError("no command behind --")
            elif word in ("-c", "--single-child"):
                self.single = True
            elif word == "-r":
                old, _, new = next(words, "").partition(":")
                source = signal_number(old)
                if source in (signal.SIGKILL, signal.SIGSTOP):
                    raise ValueError(f"{old} cannot be caught or rewritten")
                self.rewrites[source] = 0 if new == "0" else signal_number(new)
            elif word == "--grace":
                self.grace = float(value if equals else next(words, ""))
                if not self.grace >= 0:
                    raise ValueError(f"--grace: expected seconds, got {self.grace}")
            else:
                return

    def run(self) -> int:
        inherited = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if os.getpid() != 1:  # which has orphans, and ends them all with one kill(2)
            adopt_orphans(say)
        self.foreground = attempt(os.tcgetpgrp, 0) == os.getpgrp()
        here = attempt(os.open, ".", os.O_RDONLY | os.O_DIRECTORY)
        if here >= 0:  # else unreadable or removed: the command stays here with us
            os.chdir("/")  # no mount is kept busy
        self.code: int | None = None
        try:
            self.pid = os.fork()
        except OSError as error:
            say(f"cannot start a process: {error.strerror}")
            return 1
        if self.pid == 0:
            self.become_command(here, inherited)
        self.target = self.pid if self.single else -self.pid
        # Here as well: whoever of the two is first. It may have called exec since.
        attempt(os.setpgid, self.pid, self.pid)
        call_libc("malloc_trim", 0)  # see `exit_with`
        while self.code is None:
            self.pass_on(signal.sigwait(SIGNALS))
        self.sweep()
        if self.foreground:
            attempt(os.tcsetpgrp, 0, os.getpgrp())
        return self.code

    def become_command(self, here: int, inherited: Any) -> None:
        """Turn this forked process into the command. Never returns."""
        code = 126
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
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvpe(self.command[0], self.command, original_environ())
        except (OSError, ValueError) as error:  # the latter of an empty name
            # With `tostop`, a background group is stopped by what it writes.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
            reason = getattr(error, "strerror", "")
            if isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError)):
                code, reason = 127, "no such command"
            say(f"cannot run {self.command[0]!r}: {reason}")
        finally:
            os._exit(code)

    def pass_on(self, number: int) -> None:
        """Do what a signal asks for."""
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

    def suspend(self, number: int) -> None:
        """Stop our whole job with the command, as Ctrl-Z does where no init is."""
        group = attempt(os.tcgetpgrp, 0)
        reads = number in (signal.SIGTTIN, signal.SIGTTOU)  # or writes
        if os.getpid() == 1 or (reads and group == os.getpgrp()):
            self.resume()  # a shell's `fg` tells us nothing if the job was running
        elif group != -1:  # else no job control: whoever stopped it continues it
            os.killpg(0, signal.SIGTSTP)
            # Ours comes now; the kernel drops it where no shell could continue us.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP})
            if not reads:  # it would be stopped again at once
                self.resume()

    def reap(self) -> bool:
        """Collect what has ended or stopped; return whether there are children left."""
        options = os.WNOHANG | os.WUNTRACED
        while (found := attempt(os.waitpid, -1, options)) not in ((0, 0), -1):
            pid, status = found
            if pid == self.pid and os.WIFSTOPPED(status):
                self.suspend(os.WSTOPSIG(status))
            elif pid == self.pid:
                self.code = shell_code(os.waitstatus_to_exitcode(status))
        return bool(found == (0, 0))

    def sweep(self) -> None:
        """End what the command left: TERM, `grace` seconds, KILL.

        Orphans are children by then; without a subreaper only the group is known, and
        its end makes no SIGCHLD: hence the ticks.
        """
        # A stopped process takes its TERM only when it is continued.
        numbers: list[int] = [signal.SIGTERM, signal.SIGCONT]
        terms, kill_at = 0, time.monotonic() + self.grace
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        while self.reap() or send(-self.pid, 0):
            now = time.monotonic()
            kill_at = min(kill_at, now) if terms >= 2 else kill_at
            if now >= kill_at + 1.0:
                return  # it is in the kernel's hands
            if now >= kill_at:
                numbers = [signal.SIGKILL]
            for number in numbers:
                # -1 is all that PID 1 may signal, itself excepted.
                pids = [-1] if os.getpid() == 1 else [-self.pid, *descendants()]
                for pid in pids:
                    if attempt(os.getpgid, pid) != self.pid:  # the group has got it
                        send(pid, number)
            number = signal.sigwait(SIGNALS)
            terms += number == signal.SIGTERM
            numbers = [] if number in (signal.SIGCHLD, signal.SIGALRM) else [number]


def exit_with(call: Callable[[], int]) -> None:
    """Exit with what something returns, called when the script itself is over.

    Until then CPython keeps the syntax tree of a script; not while it calls the hook
    for the exception that ended the script. malloc_trim(3) then gives back 9 MB.
    """

    def hook(*_: object) -> None:
        sys.excepthook = before
        try:
            sys.exit(call())
        except Exception as error:  # else Python would tell of the other one, too
            before(type(error), error, error.__traceback__)
            sys.exit(1)

    if sys._getframe(1).f_back:  # we are run by Python code, as with `-m`
        sys.exit(call())
    before, sys.excepthook = sys.excepthook, hook
    raise Exception("the script is over")


if __name__ == "__main__":
    # A signal to PID 1 is lost until there is a handler, unless it is blocked: then it
    # waits. `Init` takes all from there, `Supervisor` and `act` unblock these.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        _init = Init(sys.argv[1:])
    except ValueError as _error:
        say(str(_error))
        sys.exit(2)
    if _init.command:
        exit_with(_init.run)

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
import threading
import tomllib
import typing
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Annotated, Any, Generic, NamedTuple, assert_never

T = typing.TypeVar("T")


# === 2. Configuration =================================================================
#
# A key is declared once, as the field of a tuple: its name, its type, its default, and
# in the type's `Annotated` the check that converts a TOML value or refuses it. A table
# is read by `read_table`, which collects what is wrong instead of raising at the first
# mistake. Values are immutable and compare by value: a reload compares with `!=`.

VARIABLE = re.compile(r"\$(\$\{)|\$\{(?:([A-Za-z_]\w*)(?::-([^{}]*))?\})?")
PLACE = "HOST:PORT with a number for HOST, [V6]:PORT, :PORT or unix:PATH"

Table = Mapping[str, Any]
Variables = Mapping[str, str]
Checks = Mapping[str, "Check"]


class SupervisorError(Exception):
    """What the user asked for cannot be done; the message says why."""

    errors: Sequence[str] = ()

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code  # exit status of a verb


class ConfigError(SupervisorError):
    """A configuration is not valid; `errors` lists everything that is wrong with it."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors: list[str] = list(dict.fromkeys(errors))
        super().__init__("; ".join(self.errors), 2)


class Address(NamedTuple):  # a unix socket's path, or host and port
    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.path}" if self.path else f"{host}:{self.port}"

    @property
    def family(self) -> int:
        internet = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        return socket.AF_UNIX if self.path else internet

    @property
    def is_loopback(self) -> bool:
        return self.host.startswith("127.") or self.host == "::1"


def parse_address(text: str) -> Address:
    """Return the address of a PLACE or a URL, without a look-up; raises ValueError.

    A host may be a name, which only a client can use: see `ADDRESSES`.
    """
    if unix := re.fullmatch(r"unix:([^\0]+)", text):
        return Address(path=re.sub("^/+", "/", unix[1]))
    match = re.fullmatch(r"(?:http://)?(?:\[(.+)\]|([^:/]*)):(\d{1,5})/?", text)
    if match and int(match[3]) <= 65535:
        host = match[1] or match[2] or "::"
        host = "127.0.0.1" if host == "localhost" else host
        return Address(host=host, port=int(match[3]))
    raise ValueError(f"expected {PLACE}, got {text!r}")


class Check(NamedTuple):  # what a key accepts, once it is converted
    expects: str
    accepts: Callable[[Any], object]
    convert: Callable[[Any], object] = lambda value: value


@functools.cache
def declared(kind: type) -> dict[str, Check]:
    """Return the checks of a tuple class by TOML key."""
    return {
        # In TOML `group` is the user's, in the status that of a program's instances.
        field.replace("group_name", "group"): check
        for field, hint in typing.get_type_hints(kind, include_extras=True).items()
        for part in (hint, *typing.get_args(hint))  # of `Path | None`, the path
        for check in getattr(part, "__metadata__", ())
    }


def hint(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?`, or nothing if no known name is near."""
    import difflib  # only for somebody's mistake

    near = difflib.get_close_matches(name, known, 1)
    return f", did you mean {near[0]!r}?" if near else ""


def expand(value: Any, variables: Variables, errors: list[str]) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in all strings; `$${` gives `${`."""

    def replace(match: re.Match[str]) -> str:
        literal, name, default = match.groups()
        if not literal and name not in variables and default is None:
            errors.append(f": {match[0]} is not set; write $${{ for a literal ${{")
        return literal or variables.get(name) or default or ""

    if isinstance(value, list):
        return [expand(one, variables, errors) for one in value]
    if isinstance(value, dict):
        return {key: expand(one, variables, errors) for key, one in value.items()}
    return VARIABLE.sub(replace, value) if isinstance(value, str) else value


def read_table(
    checks: Checks, table: Table, variables: Variables | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return a table's values by key, expanded if need be, and what is wrong."""
    values, errors = {}, []
    for key, value in table.items():
        if key not in checks:
            errors.append(f"{key}: unknown key{hint(key, checks)}")
            continue
        expects, accepts, convert = checks[key]
        unset: list[str] = []
        try:
            if variables is not None and checks[key] is not TABLE:
                value = expand(value, variables, unset)
            if unset:
                raise ConfigError(unset)
            found = convert(value)
            if not accepts(found):
                raise ValueError
            values[key] = tuple(found) if isinstance(found, list) else found
        except ConfigError as error:
            errors += [key + line for line in error.errors]
        except RecursionError:
            errors.append(f"{key}: nested too deeply")
        except (AttributeError, OSError, TypeError, ValueError):
            errors.append(f"{key}: expected {expects}, got {value!r:.80}")
    return values, errors


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


def to_size(value: int | str) -> int:  # raises ValueError
    if value == "unlimited":
        return -1
    ((number, unit),) = re.findall(r"\A(\d+)\s*([KMG]?)B?\Z", str(value).upper())
    return int(number) << 10 * "-KMG".index(unit or "-")


def read_nested(checks: Checks, table: Table, *problems: str) -> dict[str, Any]:
    """Return a nested table's values; raises ConfigError, of given `problems` too."""
    values, errors = read_table(checks, table)
    if errors or problems:
        raise ConfigError([*(f".{line}" for line in errors), *problems])
    return values


def to_rlimits(table: Table) -> dict[str, int]:
    """Return limits by the kernel's name for them; -1 is none (setrlimit(2))."""
    import resource

    names = [name[7:].lower() for name in dir(resource) if name.startswith("RLIMIT_")]
    return read_nested(dict.fromkeys(names, LIMIT), table)


def to_variables(table: Table) -> dict[str, str]:
    return read_nested({name: STRING for name in table if is_variable(name)}, table)


def is_place(text: str) -> object:
    """Return whether one can listen there, without a look-up; raises ValueError."""
    address = parse_address(text or ":0")
    return address.path or socket.inet_pton(address.family, address.host)


def to_token(text: str, key: str = "") -> str:
    """Return a token as it is sent; raises ConfigError, which does not tell it."""
    if not re.fullmatch(r"[ -~]*", text := text.strip()):
        raise ConfigError([f"{key}: expected printable ASCII"])
    return text


def to_health(table: Table) -> Health:
    is_one = len({"http", "tcp", "command"} & table.keys()) == 1
    problems = () if is_one else (": expected one of http, tcp and command",)
    return Health(**read_nested(declared(Health), table, *problems))


is_text, is_path = re.compile(r"[^\0]*").fullmatch, re.compile(r"[^\0]+").fullmatch
is_count, is_seconds = within(0, float("inf"), int), within(0, 1e9, int, float)
is_words, is_id = list_of(is_text), within(0, 2**32 - 2, int)
is_variable = re.compile(r"[^=\0]+").fullmatch
to_list, split = if_text(lambda one: [one]), if_text(shlex.split)

LIST = tuple[str, ...]
TABLE = Check("a table", lambda one: isinstance(one, dict))
LIMIT = Check('a size or "unlimited"', within(-1, 2**63 - 1, int), to_size)
LIMITS = Check("a table of limits", TABLE.accepts, to_rlimits)
STRING = Check("a string", is_text)
TOKEN = Check("a string", is_text, to_token)
VARIABLES = Check("a table of strings", TABLE.accepts, to_variables)
ARGV = Check("a command", lambda argv: any(argv[:1]) and is_words(argv), split)
ADDRESSES = Check(PLACE, list_of(is_place), to_list)
INHERIT = Check("true, false or names", lambda one: type(one) is bool or is_words(one))
CODES = Check("a list of codes from 0 to 255", list_of(within(0, 255, int)))
USER = Check(
    "a name or a number",
    lambda one: is_id(int(one)) if str(one).isdecimal() else is_path(one),
)
UMASK = Check('octal, as in "022"', within(0, 0o777, int), lambda one: int(one, 8))
SIGNAL = Check(
    "a signal's name", bool, lambda one: signal.Signals(signal_number(one)).name[3:]
)

Flag = Annotated[bool, one_of(True, False)]
Count = Annotated[int, Check("a whole number >= 0", is_count)]
Times = Annotated[int, Check("a whole number from 1 to 10000", within(1, 10_000, int))]
Nice = Annotated[int, Check("a whole number from -20 to 19", within(-20, 19, int))]
Size = Annotated[int, Check('bytes, or a string such as "10MB"', is_count, to_size)]
Seconds = Annotated[float, Check("seconds >= 0", is_seconds)]
Interval = Annotated[float, Check("seconds > 0", lambda one: one and is_seconds(one))]
String = Annotated[str, STRING]
Path = Annotated[str, Check("a path", is_path)]
Url = Annotated[str, Check("a URL", re.compile(r"https?://[^/\0][^\0]*").fullmatch)]
HostPort = Annotated[str, Check("HOST:PORT", re.compile(r"[^\0]+:\d{1,5}").fullmatch)]
LogFormat = Annotated[str, one_of("raw", "prefix", "timestamp", "json")]
Ending = Annotated[str, one_of("ignore", "shutdown")]
Words = Annotated[LIST, Check("a list of strings", is_words)]
Paths = Annotated[LIST, Check("a path or a list of paths", list_of(is_path), to_list)]


class Health(NamedTuple):  # the table `healthcheck`: one of three probes, its times
    http: Url = ""
    tcp: HostPort = ""
    command: Annotated[LIST, ARGV] = ()
    interval: Interval = 10.0
    timeout: Interval = 3.0
    retries: Times = 3
    start_period: Seconds = 30.0


class Program(NamedTuple):
    """One program, or one instance of it; the fields are the keys of the file."""

    name: str
    group: str
    number: int = 0
    needs: tuple[str, ...] = ()  # `depends_on`, by names of instances
    command: Annotated[LIST, ARGV] = ()
    args: Words = ()
    numprocs: Times = 1
    directory: Path | None = None
    environment: Annotated[Mapping[str, str], VARIABLES] = {}
    env_file: Paths = ()
    inherit_env: Annotated[bool | LIST, INHERIT] = True
    user: Annotated[str | int | None, USER] = None
    group_name: Annotated[str | int | None, USER] = None
    umask: Annotated[int | None, UMASK] = None
    nice: Nice | None = None
    rlimits: Annotated[Mapping[str, int], LIMITS] = {}
    autostart: Flag = True
    autorestart: Annotated[bool | str, one_of(True, False, "unexpected")] = False
    exitcodes: Annotated[tuple[int, ...], CODES] = (0,)
    startsecs: Seconds = 1.0
    startretries: Count | None = None
    backoff_delay: Seconds = 0.5
    backoff_limit: Seconds = 30.0
    stopsignal: Annotated[str, SIGNAL] = "TERM"
    stopwaitsecs: Seconds = 8.0
    stopasgroup: Flag = True
    type: Annotated[str, one_of("simple", "oneshot", "notify")] = "simple"
    watchdog_secs: Interval | None = None
    depends_on: Words = ()
    healthcheck: Annotated[Health | None, Check("a table", bool, to_health)] = None
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
    """A whole configuration; `path` is the file's absolute one, "" if it has none."""

    path: str = ""
    private: str = ""  # see `load_config`
    programs: Annotated[Mapping[str, Program], TABLE] = {}
    defaults: Annotated[Mapping[str, Any], TABLE] = {}  # as they stand
    listen: Annotated[LIST, ADDRESSES] = ("localhost:3000",)
    control: String = "auto"
    token: Annotated[str, TOKEN] = ""
    token_file: String = ""
    allowed_hosts: Words = ()
    include: Words = ()
    exit_when_done: Flag = False
    log_format: LogFormat = "prefix"
    pidfile: Path | None = None
    shutdown_timeout: Seconds | None = None


def read_program(
    where: str, name: str, table: Table, defaults: Table, environ: Variables
) -> tuple[list[Program], list[str]]:
    """Return the instances of a program without wrong values, and what is wrong."""
    checks, count, programs, errors = declared(Program), 1, list[Program](), list[str]()
    if not re.fullmatch(r"(?!(all|live)$)[\w.-]+", name, re.ASCII):
        text = "expected letters, digits, '_', '-', '.'; neither 'all' nor 'live'"
        errors.append(f"{where}: {text}")
    if not isinstance(table, dict):
        return [], [*errors, f"{where}: expected a table, got {table!r:.80}"]
    if "command" not in table:
        errors.append(f"{where}.command: missing")
    elif "args" in table:  # then a string is the executable itself
        table = {**table, "command": to_list(table["command"])}
    while (number := len(programs)) < count:
        variables = {**environ, "PROCESS_NUM": str(number)}
        common, wrong = read_table(checks, defaults, variables)
        errors += [f"defaults.{line}" for line in wrong]
        own, wrong = read_table(checks, table, variables)
        errors += [f"{where}.{line}" for line in wrong]
        shared = common.get("environment", {})
        values = {**common, **own, "environment": shared | own.get("environment", {})}
        count = values.pop("numprocs", 1)  # which is none of an instance's business
        account = values.pop("group", None)
        instance = f"{name}:{number}" if count > 1 else name
        program = Program(instance, name, number, group_name=account, **values)
        if program.watchdog_secs is not None and program.type != "notify":
            errors.append(f'{where}.watchdog_secs: expected type "notify"')
        programs.append(program)
    return programs, errors


def resolve(groups: dict[str, list[Program]], errors: list[str]) -> dict[str, Program]:
    """Return all programs with what they need: `depends_on`, by names of instances."""
    programs = {one.name: one for group in groups.values() for one in group}
    members = {name: [one] for name, one in programs.items()} | groups
    for name, program in programs.items():
        for key in program.depends_on:
            if key not in members:
                where = f"programs.{program.group}.depends_on"
                errors.append(f"{where}: no program {key!r}{hint(key, members)}")
        found = [one.name for key in program.depends_on for one in members.get(key, ())]
        programs[name] = program._replace(needs=tuple(dict.fromkeys(found)))
    graph = {name: program.needs for name, program in programs.items()}
    if any(graph.values()):
        import graphlib  # only where there is an order

        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            cycle = error.args[1][::-1]
            where = f"programs.{programs[cycle[0]].group}.depends_on"
            errors.append(f"{where}: cycle {' -> '.join(cycle)}")
    return programs


def parse_config(
    data: Table, environ: Variables, included: Mapping[str, Table] = {}
) -> Config:
    """Return what parsed TOML means, `included` by file name; raises ConfigError."""
    values, errors = read_table(declared(Config), data, environ)
    if values.get("token") and values.get("token_file"):
        errors.append("token_file: expected token or token_file, not both")
    defaults, tables = values.get("defaults", {}), dict(values.pop("programs", {}))
    places = dict.fromkeys(tables, "")
    for key in defaults.keys() & {"command", "args"}:
        errors.append(f"defaults.{key}: expected in a program only")
    for file, content in included.items():
        found, wrong = read_table({"programs": TABLE}, content)
        errors += [f"{file}: {line} (it may hold programs only)" for line in wrong]
        for name, table in found.get("programs", {}).items():
            if name in tables:
                errors.append(f"{file}: programs.{name}: defined twice")
            tables[name], places[name] = table, f"{file}: "
    wrong = read_table(declared(Program), defaults, {**environ, "PROCESS_NUM": "0"})[1]
    errors += [f"defaults.{line}" for line in wrong]
    groups = {}
    for name, table in tables.items():
        where = f"{places[name]}programs.{name}"
        groups[name], wrong = read_program(where, name, table, defaults, environ)
        errors += wrong
    if not tables and not errors:
        errors.append("programs: expected at least one program")
    programs = resolve(groups, errors)
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


def load_config(path: str = "supervisors.toml", private: str = "") -> Config:
    """Read a configuration and what it includes; raises ConfigError, never exits.

    With `private` that is the control socket, and no `listen` means none.
    """
    data, environ, included = read_toml(path), original_environ(), {}
    if private:
        data = {"listen": "", **data, "control": private}
    for pattern in read_table(declared(Config), data, environ)[0].get("include", ()):
        import glob  # only where something is included

        folder = os.path.dirname(path)
        for name in sorted(glob.glob(pattern, root_dir=folder or None)):
            file = os.path.join(folder, name)
            included[file] = read_toml(file)
    try:
        config = parse_config(data, environ, included)
        # Not the real one: in Kubernetes what the name leads to changes, and vanishes.
        return config._replace(path=os.path.abspath(path), private=private)
    except ConfigError as error:
        raise ConfigError(f"{path}: {line}" for line in error.errors) from None


# === 3. State machine =================================================================
#
# A program's life as values: whether it comes back, and when, is decided here only.
#
# A run ends in two moments: its leader is reaped (Exited), and its process group is
# empty (at once, as a rule; else Emptied). Only then is the end judged, so no program
# runs twice. Until then it is STOPPING; `after` says what comes next: the last order.


class State(enum.Enum):  # supervisord's, and WAITING: for what it depends on
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
    announced: bool = False  # READY=1 was said in this run, or need not be
    failures: int = 0  # in a row
    restarts: int = 0  # automatic ones
    exit_code: int | None = None  # -N for signal N
    succeeded: bool = False  # EXITED as it should
    reason: str = ""
    status_text: str = ""
    healthy: bool | None = None
    checks_failed: int = 0  # in a row
    blocked_as: str = ""  # "failing" or "failed", if what it waits for is

    @property
    def is_alive(self) -> bool:
        return self.state in (State.STARTING, State.RUNNING, State.STOPPING)


# Events.
Start = NamedTuple("Start", [])  # somebody wants it to run
Stop = NamedTuple("Stop", [])  # not to run
Restart = NamedTuple("Restart", [])  # a new run
Due = NamedTuple("Due", [])  # the deadline has come, or what it waits for has changed
# What it depends on is not ready; the worst verdict on it, "failing" or "failed".
Blocked = NamedTuple("Blocked", [("reason", str), ("cause", str)])
Spawned = NamedTuple("Spawned", [("pid", int)])
SpawnFailed = NamedTuple("SpawnFailed", [("reason", str), ("code", int)])  # 127 or 126
# The leader was reaped, with -N for signal N; some of its group may live on.
Exited = NamedTuple("Exited", [("code", int), ("survivors", bool)])
Emptied = NamedTuple("Emptied", [])  # the leader was reaped, its group is empty
Told = NamedTuple("Told", [("text", str)])  # it said a line of sd_notify(3)
Checked = NamedTuple("Checked", [("problem", str)])  # of a health check; "" it passed
Happening = Due | Blocked | Spawned | SpawnFailed | Exited | Emptied | Told | Checked
Event = Start | Stop | Restart | Happening
# Actions. Spawn is answered with Blocked, Spawned or SpawnFailed before any other
# event, but what was spawned may be a `trampoline`, whose SpawnFailed comes later. A
# signal goes to the group, or to the leader where `stopasgroup` is false; KILL always
# goes to the group.
Spawn = NamedTuple("Spawn", [])
Signal = NamedTuple("Signal", [("name", str)])
Step = tuple[Status, Spawn | Signal | None]


def step(program: Program, now: float, status: Status, event: Event) -> Step:
    """Return the status after an event, and what is to be done, if anything.

    `begin` is STARTING, with the action Spawn; `end` is what `judge` decides; `=`
    stays; `!` cannot happen. Where there are two, it depends.

                    STOPPED WAITING STARTING  RUNNING   BACKOFF STOPPING EXITED  FATAL
        Start       begin   begin   =         =         begin   =        begin   begin
        Stop        =       STOPPED STOPPING  STOPPING  STOPPED =        STOPPED STOPPED
        Restart     begin   begin   STOPPING  STOPPING  begin   =        begin   begin
        Due         =       begin   =|RUNNING =|STOPPING =|begin =       =       =
        Spawned     !       !       =|RUNNING !         !       !        !       !
        SpawnFailed !       !       end       end       !       !        !       !
        Exited      !       !       end|STOPPING end|STOPPING ! end|=    !       !
        Emptied     !       !       !         !         !       end      !       !
        Blocked     !       !       WAITING   !         !       !        !       !
        Told        =       =       =|RUNNING =         =       =        =       =
        Checked     =       =       =|STOPPING =|STOPPING =     =        =       =
    """
    state = status.state
    if isinstance(event, (Start, Stop, Restart)):
        after = After.STOP if isinstance(event, Stop) else After.START
        if state is State.STOPPING:  # the last order wins
            return status._replace(after=after), None
        if isinstance(event, Start) and status.is_alive:
            return status, None
        proceed = halt if status.is_alive else judge
        return proceed(program, now, status._replace(after=after, reason=""))
    if isinstance(event, Due):
        return due(program, now, status)
    if isinstance(event, Spawned):
        assert state is State.STARTING
        status = status._replace(pid=event.pid, started=now)
        if program.type == "notify":
            return status._replace(reason=AWAITS_READY), None
        startsecs = 0.0 if program.type == "oneshot" else program.startsecs
        status = status._replace(announced=True, deadline=now + startsecs)
        return due(program, now, status)
    if isinstance(event, SpawnFailed):
        assert state in (State.STARTING, State.RUNNING)
        status = status._replace(pid=None, ran=-1.0, exit_code=event.code)
        status = status._replace(after=After.JUDGE, reason=event.reason)
        return judge(program, now, status)
    if isinstance(event, Exited):
        return exited(program, now, status, event)
    if isinstance(event, Emptied):
        assert state is State.STOPPING
        return judge(program, now, status)
    if isinstance(event, Blocked):
        assert state is State.STARTING
        status = status._replace(state=State.WAITING, reason=event.reason)
        return status._replace(blocked_as=event.cause), None
    if isinstance(event, Told):
        return told(program, now, status, event.text), None
    if isinstance(event, Checked):
        return checked(program, now, status, event)
    assert_never(event)


def begin(status: Status, automatic: bool = False) -> Step:
    restarts = status.restarts + automatic
    status = status._replace(state=State.STARTING, deadline=None, restarts=restarts)
    return status._replace(announced=False, reason="", status_text=""), Spawn()


def halt(program: Program, now: float, status: Status) -> Step:
    """Ask a run to end; its status says already why, and what comes after."""
    status = status._replace(state=State.STOPPING, deadline=now + program.stopwaitsecs)
    return status, Signal(program.stopsignal)


def due(program: Program, now: float, status: Status) -> Step:
    """Do what the deadline of a state was for, if it has come."""
    state = status.state
    if state is State.WAITING:
        return begin(status)
    if status.deadline is None or now < status.deadline:
        return status, None
    if state is State.STARTING:
        return status._replace(state=State.RUNNING, deadline=None), None
    if state is State.RUNNING:
        reason = f"no WATCHDOG=1 for {program.watchdog_secs:g} s"
        return halt(program, now, status._replace(after=After.FAIL, reason=reason))
    if state is State.BACKOFF:
        return begin(status, automatic=True)
    if state is not State.STOPPING:
        return status, None
    killed, reason = f"killed after {program.stopwaitsecs:g} s", status.reason
    if killed not in reason:
        reason = f"{reason}, {killed}".removeprefix(", ")
    return status._replace(deadline=now + KILL_AGAIN, reason=reason), Signal("KILL")


def exited(program: Program, now: float, status: Status, event: Exited) -> Step:
    assert status.is_alive
    ran, asked = now - status.started, status.state is State.STOPPING
    status = status._replace(pid=None, ran=ran, exit_code=event.code)
    if not asked:
        status = status._replace(after=After.JUDGE, reason=describe_end(event.code))
    if not event.survivors:
        return judge(program, now, status)
    if not program.stopasgroup:
        status = status._replace(state=State.STOPPING, deadline=now + KILL_AGAIN)
        return status, Signal("KILL")
    return (status, None) if asked else halt(program, now, status)


def told(program: Program, now: float, status: Status, text: str) -> Status:
    """Take what a program says of itself, a line of sd_notify(3)."""
    if text.startswith("STATUS="):
        return status._replace(status_text=text[7:])
    awaited = program.type == "notify" and status.state is State.STARTING
    if text == "READY=1" and awaited:
        status = status._replace(state=State.RUNNING, announced=True, reason="")
    lives = text in ("READY=1", "WATCHDOG=1") and status.state is State.RUNNING
    if lives and program.watchdog_secs is not None:
        status = status._replace(deadline=now + program.watchdog_secs)
    return status


def judge(program: Program, now: float, status: Status) -> Step:
    """Decide what follows a run that is over, its whole group gone.

    An expected end after `startsecs` is no failure. Any other is; the first after
    `startsecs` is forgiven, then the waits double, and only a run of `backoff_limit`
    starts the count anew, so that a slow crash loop trips as well.
    """
    status = status._replace(deadline=None, healthy=None, checks_failed=0)
    if status.after is After.STOP:
        return status._replace(state=State.STOPPED, failures=0), None
    if status.after is After.START:
        return begin(status._replace(failures=0))
    executed, failed = status.ran >= 0, status.after is After.FAIL
    expected = executed and not failed and last_code(status) in program.exitcodes
    if program.autorestart is False or (expected and program.autorestart is not True):
        state = State.EXITED if executed else State.FATAL
        return status._replace(state=state, succeeded=expected), None
    stayed_up = status.announced and status.ran >= program.startsecs
    earlier = status.failures if status.ran < program.backoff_limit else 0
    failures = 0 if expected and stayed_up else earlier + 1
    status = status._replace(failures=failures)
    if program.startretries is not None and failures > program.startretries:
        return status._replace(state=State.FATAL, succeeded=False), None
    if stayed_up and failures <= 1:
        return begin(status, automatic=True)
    doublings = min(failures - 1, 60)  # 2**60 seconds is beyond every limit
    wait = min(program.backoff_delay * 2.0**doublings, program.backoff_limit)
    # So that a fleet does not restart in step; importing `random` would cost too much.
    factor = 0.9 + hash((program.name, failures, now)) % 2001 / 10_000
    return status._replace(state=State.BACKOFF, deadline=now + wait * factor), None


def checked(program: Program, now: float, status: Status, event: Checked) -> Step:
    check, failed = program.healthcheck, status.checks_failed + 1
    if check is None or status.state not in (State.STARTING, State.RUNNING):
        return status, None
    if not event.problem:
        reason = "" if status.announced else AWAITS_READY
        return status._replace(healthy=True, checks_failed=0, reason=reason), None
    # As in Compose, the start period ends with the first check that passes.
    if status.healthy is None and now < status.started + check.start_period:
        return status._replace(reason=f"not yet healthy: {event.problem}"), None
    status = status._replace(checks_failed=failed)
    if failed < check.retries:
        return status._replace(reason=f"check failed: {event.problem}"), None
    reason = f"unhealthy: {event.problem}"
    status = status._replace(healthy=False, after=After.FAIL, reason=reason)
    if program.autorestart is False:
        return status, None
    return halt(program, now, status)


def last_code(status: Status) -> int | None:
    """Return how the last run ended, as a shell has it; None if none has ended."""
    return None if status.exit_code is None else shell_code(status.exit_code)


def describe_end(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"killed by {signal_name(-code)}"


def signal_name(number: int) -> str:
    """Return `SIGTERM` for 15; real-time signals are numbers above SIGRTMIN."""
    names = {int(one): one.name for one in signal.Signals}
    return names.get(number) or f"SIGRTMIN+{number - signal.SIGRTMIN}"


def has_failed(status: Status) -> bool:
    """Return whether it has ended, not as it should, and stays so by itself."""
    return status.state in (State.EXITED, State.FATAL) and not status.succeeded


def verdict(program: Program, status: Status) -> str:
    """Return "ok", "starting", "failing", "failed" for good; "" if not counted."""
    state = status.state
    if has_failed(status):
        return "failed"
    if state in (State.STOPPED, State.EXITED):  # on purpose, or as it should
        return ""
    if state is State.STOPPING:
        return {After.STOP: "", After.FAIL: "failing"}.get(status.after, "starting")
    if state is State.WAITING:
        return status.blocked_as or "starting"
    if state is State.BACKOFF or status.healthy is False:
        return "failing"
    passes = program.healthcheck is None or status.healthy
    return "ok" if state is State.RUNNING and passes else "starting"


def is_ready(program: Program, status: Status) -> bool:
    """Return whether what depends on it may start."""
    if program.type == "oneshot":
        return status.state is State.EXITED and status.succeeded
    return verdict(program, status) == "ok"


def blocked_by(others: Mapping[str, tuple[Program, Status]]) -> Blocked | None:
    """Return what a program has to wait for: those of its dependencies not ready."""
    waits, verdicts = [], set[str]()
    for name, (other, status) in others.items():
        if not is_ready(other, status):
            known = "" if status.state is State.WAITING else status.reason
            words = filter(None, (status.state.value, known))
            waits.append(f"{name} ({': '.join(words)})")
            ended = status.state is State.EXITED  # it will not be ready by itself
            verdicts.add("failed" if ended else verdict(other, status))
    cause = min(verdicts & {"failed", "failing"}, default="")  # the graver is smaller
    return Blocked("waiting for " + ", ".join(waits), cause) if waits else None


# === 4. Log text ======================================================================
#
# Bytes in, bytes out: whatever a program writes goes through untouched, save in JSON.
# A chunk is formatted as a whole, by two C-speed replacements, not line by line.

LINE_LIMIT = 64 * 1024  # bytes; a longer line is cut where it gets a prefix
COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)  # SGR codes, cyan first

STREAMS = ("stdout", "stderr")
Data = bytes | memoryview
Format = Callable[[bytes, float], bytes]  # whole lines and the time (Unix), to bytes


def timestamp(now: float) -> str:
    """Return a Unix time as RFC 3339 in UTC."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{whole}.{int(now % 1 * 1000):03}Z"


def cut_lines(data: bytes) -> tuple[bytes, bytes]:
    """Return the whole lines of `data`, and the rest behind the last line end.

    What is longer than LINE_LIMIT is cut into several lines.
    """
    done, at = [], 0
    while len(data) - at > LINE_LIMIT:
        end = data.rfind(b"\n", at, at + LINE_LIMIT + 1) + 1
        done += [data[at:end]] if end else [data[at : at + LINE_LIMIT], b"\n"]
        at = end or at + LINE_LIMIT
    end = max(data.rfind(b"\n", at) + 1, at)
    return b"".join([*done, data[at:end]]), data[end:]


def log_formatter(log_format: str, name: str, stream: str, prefix: str) -> Format:
    """Return the function that formats the lines of one stream of one program."""
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


# === 5. Log files =====================================================================
#
# One thread owns every pipe and every log file, so a slow disk or a stopped terminal
# delays output and nothing else. It reads into one reused buffer, makes a pipe larger
# that it finds full, and naps after a pass that moved little, so that the next one
# finds more: for lines of 100 bytes fewer wake-ups by a hundred, a tenth of the CPU.
# It writes whole lines: those of others, and a rotation, come between two of them.

BUFFER = 1024 * 1024  # bytes; also what a busy pipe is enlarged to
PIPE = 64 * 1024  # bytes that a pipe holds as it comes (pipe(7))
LONGEST = BUFFER // 2  # bytes of a line that is not cut; a longer one comes in pieces
NAP = 0.001  # seconds
LITTLE = 256 * 1024  # bytes moved in a pass, below which a nap is worth it
SAY_AGAIN = 60.0  # seconds between two complaints about one file
REMEMBERED = 64 * 1024  # bytes of a piped program's output that stay in memory
PIECE = 4096  # bytes of it that are forgotten at once
LAG = 1024 * 1024  # bytes that a follower, or a terminal nobody reads, may be behind
ITEM = 64  # bytes that each costs besides its text
FAREWELL = 1.0  # seconds that the last output has at the end
FOREVER = float("inf")
LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3}
OWN_OUTPUTS = {"/dev/stdout": 1, "/dev/fd/1": 1, "/dev/stderr": 2, "/dev/fd/2": 2}
LIMITED = threading.Lock()  # held while the limit of open files is that of programs


def log_target(path: str) -> int | str:
    """Return a log file's real path; 1 or 2 for our own output, by whatever name."""
    if path in OWN_OUTPUTS:
        return OWN_OUTPUTS[path]
    for fd in (1, 2) if path != os.devnull else ():
        if attempt(os.path.samefile, path, fd) is True:
            return fd
    return os.path.realpath(path)


class Route(NamedTuple):  # where a stream goes
    target: int | str  # descriptor 1 or 2, never opened by path; or a file
    log_format: str
    direct: bool  # the program gets the descriptor itself


def log_path(program: Program, stream: str) -> str:
    own = program.stderr_logfile if stream == "stderr" else None
    return own or program.logfile or f"/dev/{stream}"


def routes(program: Program, log_format: str) -> list[Route]:
    """Return where the two streams go; `log_format` is that for terminals."""
    found = []
    for stream in STREAMS:
        target = log_target(log_path(program, stream))
        ours = isinstance(target, int)
        chosen = program.log_format or (log_format if ours else "raw")
        as_is = chosen == "raw" and (ours or program.logfile_maxbytes == 0)
        found.append(Route(target, chosen, as_is or target == os.devnull))
    return found


class Feed(Generic[T]):
    """The newest items of something, which any thread may append to and follow.

    Items are counted from 0. `limit` bounds the sum of their sizes, or `lag` while
    somebody follows: that is how far a follower may be behind.
    """

    def __init__(self, limit: int, lag: int) -> None:
        self.limit, self.lag = limit, lag
        self.items: deque[tuple[int, T]] = deque()
        self.size = 0
        self.end = 0  # the number of the next item
        self.followers: set[object] = set()  # something that stands for each
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

    def read(self, after: int | None, timeout: float) -> tuple[list[T], int]:
        """Wait for items from number `after` on; return them, and the next's number.

        They are none at the timeout, and when the feed is closed. None is the number of
        the oldest that is kept. Raises ConnectionAbortedError: the reader was too slow.
        """
        with self.changed:
            at = self.end - len(self.items) if after is None else after
            self.changed.wait_for(lambda: self.closed or self.end > at, timeout)
            if self.end - at > len(self.items):
                raise ConnectionAbortedError
            return [self.items[i][1] for i in range(at - self.end, 0)], self.end

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Output(Feed[tuple[str, bytes]]):  # of one program, by stream, if no file has it
    dropped = 0  # bytes that could not be written
    log_format = "prefix"  # of the terminal, in this run

    def keep(self, stream: str, lines: bytes) -> None:
        """Append whole lines in pieces: what is too old goes little by little."""
        with self.changed:
            if self.items and not self.followers:  # which count what they have read
                size, (name, last) = self.items[-1]
                if name == stream and len(last) < PIECE:
                    self.items.pop()
                    self.end, self.size = self.end - 1, self.size - size
                    lines = last + lines
            while lines:
                end = lines.rfind(b"\n", 0, PIECE) + 1 or lines.find(b"\n") + 1
                # For a follower whole: it has not had the time to read a part of it.
                end = len(lines) if self.followers else end
                self.append((stream, lines[:end]), end + ITEM)
                lines = lines[end:]


def line_starts(fd: int, end: int) -> Iterator[int]:
    """Yield where lines of a file begin, back from `end`; at last 0."""
    while end > 0:
        start = max(end - PIPE, 0)
        chunk = os.pread(fd, end - start, start)
        at = len(chunk)
        while (at := chunk.rfind(b"\n", 0, at)) >= 0:
            yield start + at + 1
        end = start
    yield 0


def move_up(fd: int, lowest: int) -> int:
    """Return a duplicate of a descriptor from `lowest` on, or itself without room."""
    # Popen needs one below the original limit, which a thousand log files would take.
    with LIMITED:
        high = int(attempt(fcntl.fcntl, fd, fcntl.F_DUPFD_CLOEXEC, lowest))
    if high < 0:
        return fd
    os.close(fd)
    return high


def open_log(path: str) -> int:
    """Open a log file to append, and make its folders."""
    with contextlib.suppress(FileExistsError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    # Without O_NONBLOCK the open of a FIFO that nobody reads would hang.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY
    return os.open(path, flags, 0o666)


class Sink:
    """A log file, rotated at `maxbytes` on a line boundary; 0 never rotates."""

    maxbytes = backups = 0
    unfinished = False  # what was written last is no line end
    writer: object = None  # of that
    problem = ""  # what is to be complained of
    complained = -FOREVER
    held = memoryview(b"")  # what it did not take yet; its sources are not read then

    def __init__(self, path: str, lowest: int) -> None:
        self.path, self.name, self.lowest, self.fd = path, path, lowest, -1

    def put(self, data: memoryview) -> int:
        """Write a piece; return its length, 0 to wait."""
        size, fits = self.open(), len(data)
        if 0 < self.maxbytes < size + fits:
            room = max(self.maxbytes - size, 0)
            fits = bytes(data[:room]).rfind(b"\n") + 1
            if not fits and size and not self.unfinished:
                self.rotate()
                return self.put(data)
            fits = fits or bytes(data).find(b"\n") + 1 or len(data)
        return os.write(self.fd, data[:fits])

    def open(self) -> int:
        """Open the file, anew if it was removed; return its size."""
        if self.fd >= 0 and not os.fstat(self.fd).st_nlink:
            self.reopen()
        if self.fd < 0:
            self.name = os.path.realpath(self.path)  # a link may lead elsewhere by now
            self.fd = move_up(open_log(self.name), self.lowest)
        return os.fstat(self.fd).st_size  # may shrink; 0 for no regular file

    def rotate(self) -> None:
        """web.log -> web.log.1 -> ... -> web.log.N; where that fails, start over."""
        try:
            for n in range(self.backups, 0, -1):
                older = f"{self.name}.{n}"
                newer = f"{self.name}.{n - 1}".removesuffix(".0")
                if os.path.lexists(newer):
                    # Renaming over it, ext4 would first write the new one to the disk
                    # (its auto_da_alloc): at 64 KB writes that halves what it takes.
                    attempt(os.unlink, older)
                    os.rename(newer, older)
        except OSError as error:  # as for a file that is a mount of its own
            self.problem = f"cannot rename {self.name}: {error.strerror}; starting over"
            os.ftruncate(self.fd, 0)
        if not self.backups:
            os.ftruncate(self.fd, 0)
        self.reopen()

    def reopen(self) -> None:
        """Let go of the file; the next write opens it anew."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def open_output(fd: int) -> int:
    """Open what a descriptor leads to once more, not to block; raises OSError."""
    flags, path = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY, f"/proc/self/fd/{fd}"
    try:
        return os.open(path if os.path.exists(path) else os.ttyname(fd), flags)
    except PermissionError:  # as of the terminal of another user, after `su`
        os.tcgetpgrp(fd)  # raises unless it is our controlling terminal
        return os.open("/dev/tty", flags)


class TerminalSink(Sink):
    """Standard output or error, which may be a terminal or a pipe that nobody reads."""

    def __init__(self, fd: int) -> None:
        self.name, self.fd = f"descriptor {fd}", fd
        # The shell's description of it must stay blocking, one of our own need not.
        # Without one, as of a socket, only what it certainly takes is written.
        self.takes = select.PIPE_BUF  # when poll(2) calls it writable
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(os.fstat(fd).st_mode):  # its position is shared, too
                self.fd = open_output(fd)
            self.takes = BUFFER
        self.poll = select.poll()
        self.poll.register(self.fd, select.POLLOUT)

    def put(self, data: memoryview) -> int:
        room = self.takes if self.poll.poll(0) else 0
        with contextlib.suppress(BlockingIOError):
            return os.write(self.fd, data[:room])
        return 0

    def reopen(self) -> None:
        """Keep the descriptor: where it leads has no name to open."""


class Source(NamedTuple):  # the read end of one pipe, and what becomes of the bytes
    fd: int
    sink: Sink
    output: Output
    stream: str
    format_lines: Format | None


class Loop:
    """What a thread sleeps for: descriptors, and calls that other threads post."""

    log: LogThread  # which is told of mistakes

    def open_loop(self) -> None:
        self.calls: deque[Callable[[], object]] = deque()
        self.selector = selectors.DefaultSelector()
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_write, False)
        self.watch(self.wake_read, self.wake_up)

    def close_loop(self) -> None:
        write_end, self.wake_write = self.wake_write, -1
        os.close(write_end)
        os.close(self.wake_read)
        self.selector.close()

    def watch(self, source: int | socket.socket, call: Callable[[], object]) -> None:
        """Have `call` called whenever something can be read."""
        self.selector.register(source, selectors.EVENT_READ, call)

    def post(self, call: Callable[[], object]) -> None:
        """Have the thread call something, in the order of the posts. Any thread."""
        self.calls.append(call)
        attempt(os.write, self.wake_write, b"\0")  # full: it wakes anyway; or closed

    def wake_up(self) -> None:
        os.read(self.wake_read, PIPE)

    def sleep(self, timeout: float | None) -> None:
        """Sleep until something happens, and do what it asks for."""
        for key, _ in self.selector.select(timeout):
            self.guard(key.data)
        while self.calls:
            self.guard(self.calls.popleft())

    def guard(self, call: Callable[..., object], *arguments: object) -> None:
        """Call something; a mistake in it must not end what all programs hang on."""
        try:
            call(*arguments)
        except Exception as error:
            import traceback

            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            self.log.say("", f"internal error: {error!r}, line {line}", "error")
            time.sleep(TICK)  # so that one that comes again does not fill the log


class LogThread(Loop):
    """The thread that owns pipes and log files."""

    def __init__(self, log_format: str, level: str) -> None:
        self.log, self.log_format, self.level = self, log_format, LEVELS[level]
        self.open_loop()
        self.bytes = bytearray(BUFFER)
        self.buffer = memoryview(self.bytes)
        self.moved = 0  # bytes in this pass
        self.sinks: dict[int | str, Sink] = {2: TerminalSink(2)}
        one_place = os.path.sameopenfile(1, 2)  # then lines would mix in two sinks
        self.sinks[1] = self.sinks[2] if one_place else TerminalSink(1)
        self.sources: dict[Source, bytes] = {}  # with what a next line begins with
        self.closing = FOREVER
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    def say(self, name: str, text: str, level: str = "info") -> None:
        """Write one of the supervisor's own messages; `name` is a program's, or ""."""
        if LEVELS[level] < self.level:
            return
        now = time.time()
        line = f"{timestamp(now)[:19]}Z {name or 'supervisors'}: {text}"
        if self.log_format == "json":
            import json

            fields = {"time": timestamp(now), "level": level, "program": name or None}
            line = json.dumps({**fields, "message": text})
        data = f"{line}\n".encode(errors="replace")
        self.post(functools.partial(self.write, self.sinks[2], data))

    def close(self) -> None:
        """Write what there still is, for a second at most, and end the thread."""
        self.closing = time.monotonic() + FAREWELL
        self.post(lambda: None)
        self.thread.join(2 * FAREWELL)

    # In this thread

    def run(self) -> None:
        # All signals are the main thread's; and a terminal with `tostop` stops a
        # background writer unless SIGTTOU is blocked (tty_ioctl(4)).
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        while self.closing == FOREVER:
            self.moved = 0
            self.sleep(None)
            if 0 < self.moved < LITTLE:
                time.sleep(NAP)
        while time.monotonic() < self.closing:
            busy = bool(self.calls) or any(one.held for one in self.sinks.values())
            self.moved = 0
            self.sleep(NAP)
            if not self.moved and not busy:
                break
        for source in list(self.sources):
            self.end(source)
        self.close_loop()
        for fd in {self.sinks[1].fd, self.sinks[2].fd} - {1, 2}:
            os.close(fd)

    def add(self, source: Source) -> None:
        self.sources.setdefault(source, b"")
        self.watch(source.fd, functools.partial(self.move, source))

    def move(self, source: Source) -> None:
        """Read a pipe once, behind what is left of it; or, its sink being full, not."""
        if source.sink.held:
            self.selector.unregister(source.fd)
            return
        rest = self.sources[source]
        self.buffer[: len(rest)] = rest
        count = os.readv(source.fd, [self.buffer[len(rest) :]])
        if count == 0:
            self.selector.unregister(source.fd)
            self.end(source)
            return
        if PIPE // 2 <= count <= PIPE:
            # Full, or nearly: what is written in short pieces leaves gaps in its pages.
            # The user's share of pipe memory may be used up; and this is Linux only.
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(source.fd, fcntl.F_SETPIPE_SZ, BUFFER)
        self.moved += count
        data = self.buffer[: len(rest) + count]
        lines: Data
        if source.format_lines:
            lines, self.sources[source] = cut_lines(bytes(data))
        else:
            end = self.bytes.rfind(b"\n", 0, len(data)) + 1
            end = end if len(data) - end < LONGEST else len(data)
            lines, self.sources[source] = data[:end], bytes(data[end:])
        if lines:
            self.emit(source, lines)

    def emit(self, source: Source, lines: Data) -> None:
        output = source.output
        if isinstance(source.sink, TerminalSink):
            kept = bytes(lines if output.followers else lines[-REMEMBERED:])
            output.keep(source.stream, kept)
        if source.format_lines:
            lines = source.format_lines(bytes(lines), time.time())
        output.dropped += self.write(source.sink, lines, output)

    def end(self, source: Source) -> None:
        """Forget a pipe that has ended, but not a last line without end."""
        os.close(source.fd)
        if rest := self.sources.pop(source):
            self.emit(source, rest + b"\n" if source.format_lines else rest)
        if not any(other.sink is source.sink for other in self.sources):
            source.sink.reopen()  # nobody writes there: no descriptor is held

    def write(self, sink: Sink, data: Data = b"", writer: object = None) -> int:
        """Write, and hold what is not taken yet; return how many bytes were dropped."""
        held, dropped = sink.held, 0
        if data and len(held) > LAG:  # messages; the pipes are not read meanwhile
            return len(data)
        # What another left unfinished, or a failure cut off, ends here.
        other = sink.unfinished and sink.writer is not writer
        ahead = held or (b"\n" if other else b"")
        text = b"".join([ahead, data]) if ahead and data else ahead or data
        left, sink.writer = memoryview(text), writer
        try:
            while left and (count := sink.put(left)):
                sink.unfinished = left[count - 1] != ord("\n")
                left = left[count:]
        except OSError as error:
            dropped, left, sink.writer = len(left), left[:0], sink
            sink.problem = f"cannot write to {sink.name}: {error.strerror}; dropping"
        if sink.problem and time.monotonic() >= sink.complained + SAY_AGAIN:
            sink.complained = time.monotonic()
            self.say("", sink.problem, "warning")
        sink.problem = ""
        # Only a terminal leaves something: formatted lines, no part of the buffer.
        sink.held = left
        if left and not held:
            job = functools.partial(self.write, sink)
            self.selector.register(sink.fd, selectors.EVENT_WRITE, job)
        elif held and not left:
            self.selector.unregister(sink.fd)
            for source in self.sources:
                if source.sink is sink and source.fd not in self.selector.get_map():
                    self.add(source)
        return dropped


# === 6. Processes =====================================================================
#
# Only the main thread starts and reaps processes. A program leads a session, hence a
# group, of its own: a signal to the group reaches all that it forked, the terminal's
# Ctrl-C reaches none of it. subprocess.Popen does the work (vfork, 0.45 ms), and is
# never asked to wait: it would steal a status from the one place that reaps.
#
# What a killed supervisor leaves is known by two marks with its hash, pid and start: a
# variable, and, as some programs write their title over their environment, a lock on
# the /dev/null that all have as standard input.

RUN_VARIABLE = "SUPERVISOR_RUN"  # HASH.PID.START of the supervisor, for leftovers
PID_BITS = 22  # of a pid: PID_MAX_LIMIT is 2**22
OWN_VARIABLES = {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}  # ours, of systemd
OWN_VARIABLES |= {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "SUPERVISOR_SERVER_URL"}
# Of ours, however high the hard limit is; more is an error on macOS (setrlimit(2)).
MOST_FILES = 65536 if sys.platform == "linux" else 10240
# KEY=VALUE, which quotes may stretch over lines; a comment; or, last, a wrong line.
ENV_ENTRY = r"""(?mx)^[ \t]*(?:\#.*|(?:export[ \t]+)?([A-Za-z_][\w.-]*)[ \t]*=
    (?:[ \t]*"((?:[^"\\]|\\[\s\S])*)"|[ \t]*'((?:[^'\\]|\\[\s\S])*)'
    |((?![ \t]*["']).*?))
    (?:[ \t]+\#.*)?)?[ \t]*$|(.+)"""
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
    code, report = 127, "no such command: %r" % argv[0]
except (OSError, ValueError, OverflowError) as error:
    reason = getattr(error, "strerror", None) or error
    code, report = 126, "cannot %s: %s" % (step, reason)
write(fd, report.encode(errors="replace"))
_exit(code)
"""


def find_account(program: Program) -> tuple[Variables, dict[str, Any]]:
    """Return a user's variables, and what Popen is to switch to; raises ValueError."""
    if program.user is None and program.group_name is None:
        return {}, {}
    import grp  # these two only where somebody is named
    import pwd

    uid, gid, groups, variables = os.geteuid(), os.getegid(), os.getgroups(), {}
    name, group = str(program.user), str(program.group_name)
    if program.user is not None:
        try:
            entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        except KeyError:  # fine for a number, as in images without users
            if not name.isdecimal():
                raise ValueError(f"no such user: {name!r}") from None
            entry = pwd.struct_passwd((name, "", int(name), int(name), "", "/", ""))
        name, _, uid, gid, _, home, shell = entry
        groups = os.getgrouplist(name, gid)
        variables = {"USER": name, "LOGNAME": name, "HOME": home}
        variables["SHELL"] = shell or "/bin/sh"
    if program.group_name is not None:
        try:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise ValueError(f"no such group: {group!r}") from None
    if 0 != os.geteuid() == uid and gid == os.getegid():  # this needs no right
        return variables, {}
    return variables, {"user": uid, "group": gid, "extra_groups": [*{gid, *groups}]}


def read_env_files(program: Program) -> Variables:
    """Return the variables of its `env_file`s; raises ValueError."""
    variables, escapes = dict[str, str](), {"n": "\n", "t": "\t", "r": "\r"}
    for path in program.env_file:
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                text = file.read()
        except OSError as error:
            raise ValueError(f"cannot read {path!r}: {error.strerror}") from None
        for match in re.finditer(ENV_ENTRY, text):
            name, double, single, bare, wrong = match.groups("")
            if wrong:
                number = text.count("\n", 0, match.start()) + 1
                raise ValueError(f"{path}:{number}: expected KEY=VALUE")
            # Other backslashes stay, as in Compose.
            double = re.sub(r'\\([nrt"$\\])', lambda m: escapes.get(m[1], m[1]), double)
            single = single.replace("\\'", "'")
            if name:  # else it is a comment
                variables[name] = double or single or bare.strip()
    return variables


def trampoline(
    program: Program, argv: LIST, environ: Variables, switch: Table, report: int
) -> LIST:
    """Return the command that sets limits, switches, and then becomes `argv`."""
    steps = []
    for name, number in program.rlimits.items():
        limit = "RLIM_INFINITY" if number < 0 else number
        steps.append(f"setrlimit(RLIMIT_{name.upper()}, ({limit}, {limit}))")
    if program.nice is not None:
        steps.append(f"setpriority(PRIO_PROCESS, 0, {program.nice})")
    if switch:
        steps.append(f"setgroups({switch['extra_groups']})")
        steps += [f"setgid({switch['group']})", f"setuid({switch['user']})"]
    steps += ["signal(SIGPIPE, SIG_DFL)", "signal(SIGXFSZ, SIG_DFL)"]
    # The interpreter may have changed it (PEP 538).
    given = {"LC_CTYPE": environ["LC_CTYPE"]} if "LC_CTYPE" in environ else {}
    steps.append(f"environ.pop('LC_CTYPE', None), environ.update({given!r})")
    steps.append(f"execvp({argv[0]!r}, argv)")
    return (sys.executable, "-I", "-S", "-c", TRAMPOLINE, repr((report, steps)), *argv)


def why_not(program: Program, argv: LIST, error: Exception) -> tuple[str, int]:
    """Return why a process did not start, and 127 for a missing command, else 126."""
    if not isinstance(error, OSError):  # our own, or a text that exec cannot have
        return str(error), 126
    # Popen reports a failure of exec, chdir and setuid alike.
    missing, place, why = error.errno == errno.ENOENT, error.filename, error.strerror
    who = program.group_name if program.user is None else program.user
    if who is not None and error.errno in (errno.EPERM, errno.EINVAL):
        return f"cannot switch to {who!r}: {why}", 126
    if missing and place == program.directory:
        return f"no such directory: {place!r}", 126
    if missing and place == argv[0]:
        return f"no such command: {place!r}", 127
    return f"{place!r}: {why}" if place else str(why), 126


def start_time(pid: int) -> str:
    """Return when a process started, in ticks since boot; "" if it is gone."""
    fields = process_fields(pid)
    return "" if not fields or is_dead(fields) else fields[19].decode()


def path_hash(path: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of a file's real path."""
    # hashlib, the public way, loads OpenSSL: 3.6 MB, for one hash. 3.12 has _sha2.
    for module in ("_sha2", "_sha256", "hashlib"):
        with contextlib.suppress(ImportError):
            sha256 = __import__(module).sha256
            break
    return str(sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16])


def mark(fd: int, path: str) -> str:
    """Lock bytes of a file, from our hash and pid on as many as our start in ticks.

    The lock belongs to the open file, not to us (F_OFD_SETLK, fcntl(2)): it lasts while
    anybody has that inherited, and is seen in /proc/PID/fdinfo (proc(5)). Returns what
    RUN_VARIABLE says, the same three.
    """
    import struct  # 0.2 ms, and only here

    digest, pid = path_hash(path), os.getpid()
    start = start_time(pid)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # only a second mark
        place = (int(digest[:10], 16) << PID_BITS) + pid
        lock = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, place, int(start), 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    return f"{digest}.{pid}.{start}"


def supervisor_of(pid: int, environ: bytes, digest: str) -> tuple[int, str]:
    """Return pid and start of who started a process, by its marks; (0, "") if none."""
    variable = rf"\0{RUN_VARIABLE}={digest}\.(\d+)\.(\d+)\0"
    if run := re.search(variable.encode(), environ):
        return int(run[1]), run[2].decode()
    locks = process_file(pid, "fdinfo/0")
    for first, last in re.findall(rb" (\d+) (\d+)\n", locks):
        place, owner = divmod(int(first), 1 << PID_BITS)
        if place == int(digest[:10], 16):
            return owner, str(int(last) - int(first) + 1)
    return 0, ""


def ancestors(pid: int) -> set[int]:
    """Return a process, its parent, and so on up."""
    found = set[int]()
    while fields := process_fields(pid):
        found.add(pid)
        pid = int(fields[1])
    return found


def find_leftovers(config: Config) -> dict[int, Program]:
    """Return what dead supervisors of this configuration left running, by pid."""
    digest, found = path_hash(config.path), dict[int, Program]()
    # Never ourselves or our ancestors, whose shell may stem from such a program.
    for pid in process_table().keys() - ancestors(os.getpid()):
        environ = b"\0" + process_file(pid, "environ")
        owner, start = supervisor_of(pid, environ, digest)
        if not owner or start_time(owner) == start:
            continue
        known = re.search(rb"\0SUPERVISOR_PROCESS_NAME=([^\0]*)", environ)
        name = os.fsdecode(known[1] if known else process_file(pid, "comm").strip())
        # In another PID namespace numbers mean something else.
        spaces = (f"/proc/{pid}/ns/pid", "/proc/self/ns/pid")
        if attempt(os.path.samefile, *spaces) is True:
            found[pid] = config.programs.get(name, Program(name, ""))
    return found


# === 7. Health ========================================================================
#
# A check never delays the loop: a command is a child like any other, http and tcp run
# in a thread that ends by itself. A program has one check at a time; whichever is too
# slow is given up at `timeout`. Our own health is told to who runs us, such as systemd.

FIRST_INTERVAL = 1.0  # seconds between checks until one has passed


def probe(check: Health) -> str:
    """Run an http or tcp check; return what is wrong, or "". Blocks; any thread."""
    import urllib.parse

    try:
        url = urllib.parse.urlsplit(check.http or f"tcp://{check.tcp}")
        port = url.port or (443 if url.scheme == "https" else 80)
        peer = socket.create_connection((url.hostname, port), check.timeout)
        if url.scheme == "https":
            import ssl

            context = ssl.create_default_context()
            peer = context.wrap_socket(peer, server_hostname=url.hostname)
        with peer:
            if check.tcp:
                return ""
            target = f"{url.path or '/'}?{url.query}".rstrip("?")
            host = url.netloc.rpartition("@")[2]
            head = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            peer.sendall(f"{head}User-Agent: supervisors\r\n\r\n".encode())
            answer = peer.makefile("rb").readline(LINE_LIMIT).decode("latin-1")
        # A redirect passes, and is not followed.
        passed = re.match(r"HTTP/1\.\d [23]\d\d\b", answer)
        return "" if passed else f"answered {answer.rstrip()!r:.80}"
    except Exception as error:  # whatever a server may answer: it did not pass
        return str(getattr(error, "strerror", None) or error) or type(error).__name__


def tell_manager(message: str) -> None:
    """Tell who runs us, where it listens (sd_notify(3))."""
    address = re.sub("^@", "\0", os.environ.get("NOTIFY_SOCKET", ""))
    kind = (socket.AF_UNIX, socket.SOCK_DGRAM)
    with contextlib.suppress(OSError), socket.socket(*kind) as speaker:
        speaker.sendto(message.encode(), socket.MSG_DONTWAIT, address)


# === 8. HTTP ==========================================================================
#
# A connection is served in a thread of its own, a request by a function of a fixed
# table. It reads published snapshots; what changes something is done by the main
# thread, on request. What is read of a request are its line and its fields (RFC 9112),
# strictly; http.server would cost 15 ms and 8 MB.

REQUEST_TIME = 5.0  # seconds for a client to send a request, or to take an answer
STREAM_TIME = 60.0  # to take the next piece of a stream, which a pager may stop
MOST_CONNECTIONS = 64  # but for the control socket, which has no limit
MOST_STREAMS = 32  # of those; the others are for probes
MOST_LINE = 8 * 1024  # bytes of a request's line, with a NAME that becomes a pattern
MOST_BYTES = 64 * 1024  # of a request's head, and of its body
MOST_WAIT = 300.0  # seconds
MOST_EVENTS = 1000  # that a client may be behind
LOOK_INTERVAL = 1.0  # seconds between two looks whether a follower is still there
COMMENT_LOOKS = 15  # looks without news, until /events gives a sign of life
FILE_INTERVAL = 0.05  # seconds between two looks at a log file that is followed
# Method, the host that a proxy's request has, path and query, minor version.
REQUEST_LINE = re.compile(r"(\S+) (?:http://([^/\s]*))?(/[!-~]*) HTTP/1\.(\d)\r?\n")
FIELD = re.compile(r"([^\s:]+):([^\r\0]*)\r?")
Order = Start | Stop | Restart | Signal  # what somebody may want of a program
ENDED = (State.BACKOFF, State.EXITED, State.FATAL, State.STOPPED)
POLICY = (
    "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'"
)
PAGE = r"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>supervisors</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
:root{color-scheme:light dark} [hidden]{display:none} [inert]{opacity:.6}
body{max-width:1400px; margin:auto; padding:0 16px; font:14px/20px system-ui}
body{background:Canvas} h1, h2{font-size:14px} #health{font:20px/28px system-ui}
header, form, tr{display:flex; flex-wrap:wrap; gap:8px 12px; align-items:center}
.good{color:light-dark(#17763d, #4cc07c)} .busy{color:light-dark(#8a5700, #dba53c)}
.bad{color:light-dark(#c02429, #ff7b78)} .dot::before{content:"● "}
[data-label]::before{content:attr(data-label); display:block; opacity:.7}
tr{padding:12px 0; border-top:1px solid #8884; font-variant-numeric:tabular-nums}
table, tbody{display:block} th, td{padding:0; text-align:left; overflow-wrap:anywhere}
td{flex:0 0 80px} .state{flex-basis:100px} th, .detail{flex:1 0 200px}
#error{position:sticky; top:0; z-index:1; background:Canvas}
.verbs{flex-basis:auto} body:not(.may) .verbs{display:none} button{padding:4px 9px}
dialog{width:min(1000px, 95%)} dialog form, header{justify-content:space-between}
pre{display:flex; flex-direction:column-reverse; height:65vh; overflow:auto;
  white-space:pre-wrap; overflow-wrap:anywhere}  /* reverse: it stays at the end */
</style>
<header><h1>supervisors</h1><span id="connection" role="status">Connecting</span>
  <form id="unlock"><input id="token" type="password" placeholder="Token"
    aria-label="Token" autocomplete="off"><button>Unlock</button></form></header>
<main><p id="error" class="bad" role="alert"></p><p id="health" role="status"></p>
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
  : s.running && s.ready ? 'good' : s.running || s.state === 'WAITING' ? 'busy' : '';
function paint({status: s, at, children: cells}) {
  const age = (performance.now() - at) / 1000, left = Math.ceil(s.restart_in - age);
  const uptime = s.running ? clock(s.uptime + age) : left > 0 ? `in ${left} s` : '–';
  const health = {true: 'healthy', false: 'unhealthy'}[s.healthy] ?? '–';
  const detail = [s.status_text, s.reason].filter(Boolean).join(' · ');
  [s.name, s.state, s.pid ?? '–', uptime, s.restarts, health, detail]
    .forEach((text, i) => put(cells[i], `${text}`));
  cells[1].className = `state dot ${kind(s)}`;
  const [start, stop, restart] = cells[7].children;
  start.disabled = s.running;
  stop.disabled = restart.disabled = !s.running && !/BACKOFF|WAITING/.test(s.state);
}
function repaint() {
  rows.childNodes.forEach(paint);
  const unwell = [...rows.querySelectorAll('.bad, .busy')]
    .map(cell => cell.parentNode.dataset.name).join(', ');
  put($('#health'), unwell ? `Not well: ${unwell}` : 'All well');
}
function show(status) {
  const row = find(status.name)
    ?? rows.appendChild($('template').content.firstChild.cloneNode(true));
  Object.assign(row, {status, at: performance.now()}).dataset.name = status.name;
}
const tell = (live, text) => {
  $('main').inert = !live; put($('#connection'), text);
  $('#connection').className = live ? 'dot good' : 'dot bad';
};
function connect() {
  const events = new EventSource('events'), now = () => new Date().toLocaleTimeString();
  const acts = {state: show, removed: ({name}) => find(name)?.remove(),
    snapshot(statuses) {
      tell(true, gone ? `Back since ${now()}` : 'Live'); gone = '';
      rows.replaceChildren(); statuses.forEach(show);
      if (sessionStorage.token) unlock();
      if (log.open && !follower) order('log', log.dataset.name);
    }};
  for (const type in acts) events.addEventListener(type, ({data}) => {
    acts[type](JSON.parse(data)); repaint();
  });
  events.onerror = () => {
    const refused = events.readyState === EventSource.CLOSED;  // as the 33rd stream is
    const what = refused ? 'Events are refused' : 'Supervisor is gone';
    tell(false, `${what} since ${gone ||= now()}, trying again`);
    if (refused) setTimeout(connect, 2000);
  };
}
async function call(method, name, rest, signal) {
  put($('#error'), '');
  const answer = await fetch(`programs/${encodeURIComponent(name)}/${rest}`,
    {method, signal, headers: {Authorization: `Bearer ${sessionStorage.token}`}});
  if (!answer.ok) throw Error((await answer.json()).error);
  return answer;
}
async function unlock() {  // asks for what needs the token and changes nothing
  const answer = await call('GET', 'all', 'logs?lines=0').catch(error => error);
  $('#unlock').hidden = document.body.classList.toggle('may', answer.ok === true);
  if (!answer.ok) fail('unlock', answer);
}
async function openLog(name) {
  follower?.abort();
  const own = follower = new AbortController();
  try {
    const {body} = await call('GET', name, 'logs?lines=100&follow=1', own.signal);
    put($('#name'), log.dataset.name = name); pre.replaceChildren();
    if (!log.open) log.showModal();
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part; !(part = await reader.read()).done;) {
      pre.append(part.value.replace(/\x1b\[[0-9;?]*[@-~]/g, '').slice(-LOG_LIMIT));
      while (pre.textContent.length > LOG_LIMIT) pre.firstChild.remove();
    }
  } finally {
    if (own === follower) { follower = null; put($('#name'), `${name} (ended)`); }
  }
}
log.onclose = () => follower?.abort();
const order = (verb, name) =>
  (verb === 'log' ? openLog(name) : call('POST', name, verb))
  .catch(error => error.name === 'AbortError' || fail(`${verb} ${name}`, error));
rows.onclick = ({target}) => {
  const {verb} = target.dataset;
  if (verb) order(verb, target.closest('tr').dataset.name);
};
$('#unlock').onsubmit = event => {
  event.preventDefault(); sessionStorage.token = $('#token').value; unlock();
};
setInterval(() => gone || repaint(), 1000); connect();
</script>"""


class Snapshot(NamedTuple):  # what any thread may read of a program
    program: Program
    status: Status
    output: Output
    started_at: float | None = None  # Unix time of the last start
    changed_at: float | None = None  # Unix time of the last change of state


def status_object(snapshot: Snapshot, now: float) -> dict[str, Any]:
    """Return a program's status as JSON has it; never its arguments or environment."""
    import datetime  # with the first answer

    program, status, output, started_at, changed_at = snapshot
    code, due = status.exit_code, status.deadline
    number = -min(code or 0, 0)  # of the signal that ended it
    words = [status.reason]  # after what supervisorctl's status has in its last column
    if status.state is State.RUNNING:
        uptime = datetime.timedelta(seconds=int(now - status.started))
        words[:0] = [f"pid {status.pid}, uptime {uptime}", status.status_text]
    elif status.state in (State.STOPPED, State.EXITED):
        moment = time.strftime("%b %d %I:%M %p", time.localtime(changed_at))
        words.insert(0, moment if changed_at else "Not started")
    backoff = status.state is State.BACKOFF
    return {
        "name": program.name, "group": program.group, "running": status.is_alive,
        "state": status.state.value, "ready": is_ready(program, status),
        "healthy": status.healthy, "pid": status.pid,
        "uptime": round(now - status.started, 3) if status.is_alive else None,
        "started_at": timestamp(started_at) if started_at else None,
        "restarts": status.restarts, "failures": status.failures,
        "exit_code": None if number else code,
        "exit_signal": signal_name(number) if number else None,
        "reason": status.reason, "status_text": status.status_text,
        "restart_in": round(max((due or now) - now, 0), 3) if backoff else None,
        "log_dropped_bytes": output.dropped,
        "description": ", ".join(filter(None, words)),
    }  # fmt: skip


class Request(NamedTuple):
    name: str  # in the path, "" if it has none
    targets: list[Snapshot]  # what NAME means, without it all
    query: Mapping[str, str]
    headers: Mapping[str, str]


class Response(NamedTuple):
    body: bytes = b""
    status: int = 200
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[str, ...] = ()
    stream: Iterable[bytes] = ()  # follows; b"" in it is a moment to look around


class HttpError(Exception):
    """A refusal: its status, its text, and lines for the head of the answer."""


def as_json(content: object, status: int = 200, *headers: str) -> Response:
    import json  # with the first answer

    return Response(json.dumps(content).encode(), status, "application/json", headers)


@functools.lru_cache(maxsize=1)
def all_statuses(supervisor: Supervisor, *moment: int) -> Response:
    """Answer for a moment: the text of 20 programs takes 0.3 ms, most of a request."""
    return objects("", supervisor.snapshots())


def get_status(supervisor: Supervisor, request: Request) -> Response:
    if request.name:
        return objects(request.name, request.targets)
    moment = int(time.monotonic() * 100)  # it serves for 10 ms, or until news
    return all_statuses(supervisor, supervisor.events.end, moment)


def objects(name: str, chosen: list[Snapshot], status: int = 200) -> Response:
    """Answer status objects: an array, or one where `name` is a program's."""
    now = time.monotonic()
    found = [status_object(one, now) for one in chosen]
    is_single = [one["name"] for one in found] == [name]
    return as_json(found[0] if is_single else found, status)


def select_programs(known: list[Snapshot], name: str) -> list[Snapshot]:
    """Return what a NAME means: a program, a group, a glob, `all`, several by comma."""
    import fnmatch  # only where there is a NAME

    named, found = {one.program.name: one for one in known}, dict[str, Snapshot]()
    for word in name.split(","):
        # Not fnmatchcase: it keeps 32768 compiled patterns for ever.
        matches = re.compile(fnmatch.translate("*" if word == "all" else word)).match
        names = [
            key
            for key, (one, *_) in named.items()  # a single one is number 0, too
            if matches(one.group) or matches(f"{one.group}:{one.number}")
        ]
        if not names:
            raise HttpError(404, f"no program {word!r}{hint(word, named)}")
        found |= {key: named[key] for key in names}
    return list(found.values())


def get_page(supervisor: Supervisor, request: Request) -> Response:
    if "text/html" not in request.headers.get("Accept", ""):
        return Response(b"Supervisor Running. Check /status")
    return Response(PAGE.encode(), 200, "text/html; charset=utf-8", (POLICY,))


def get_health(supervisor: Supervisor, request: Request) -> Response:
    """Answer how all that is wanted is, or the programs that were named."""
    reasons, found = {}, set[str]()
    if supervisor.busy:  # nothing has been started yet, or all is about to stop
        found.add("failing" if supervisor.ending else "starting")
    for program, status, *_ in request.targets:
        health = verdict(program, status).replace("failed", "failing")
        if request.name and not health:  # not wanted, but asked for
            health = "ended" if status.state is State.EXITED else "failing"
        if health not in ("", "ok"):
            words = (status.state.value, status.reason)
            reasons[program.name] = ", ".join(filter(None, words))
            found.add(health)
    worst = min(found - {"ended"}, default="ok")  # "failing" comes before "starting"
    code = 200 if worst == "ok" else 503
    return as_json({"status": worst, "programs": reasons}, code)


METRICS = {  # by name: the key of the status that it shows, and its help
    "info": ("", "version"),
    "start_time_seconds": ("", "start, Unix time"),
    "program_up": ("running", "1 while alive"),
    "program_ready": ("ready", "1 while ready"),
    "program_uptime_seconds": ("uptime", "seconds since its start"),
    "program_restarts_total": ("restarts", "automatic restarts"),
    "program_exit_code": ("exit_code", "last exit code, 128+N for a signal"),
    "program_log_dropped_bytes_total": (
        "log_dropped_bytes",
        "output that could not be written",
    ),
    "program_state": ("", "1 for the present state"),
}


def get_metrics(supervisor: Supervisor, request: Request) -> Response:
    """Answer in Prometheus' text format 0.0.4."""
    samples: defaultdict[str, list[str]] = defaultdict(list)
    samples["info"] = [f'{{version="{__version__}"}} 1']
    samples["start_time_seconds"] = [f" {supervisor.started_at:.15g}"]
    for one in request.targets:
        found = status_object(one, time.monotonic())
        found |= {"uptime": found["uptime"] or 0, "exit_code": last_code(one.status)}
        labels = f'name="{found["name"]}",group="{found["group"]}"'
        for name, (key, _) in METRICS.items():
            if found.get(key) is not None:
                samples[name].append(f"{{{labels}}} {found[key]:.15g}")
        for state in State:
            value = f'{{{labels},state="{state.value}"}} {one.status.state is state:d}'
            samples["program_state"].append(value)
    lines = []
    for name, (_, text) in METRICS.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP supervisors_{name} {text}"]
        lines += [f"# TYPE supervisors_{name} {kind}"]
        lines += [f"supervisors_{name}{sample}" for sample in samples[name]]
    body = "\n".join([*lines, ""]).encode()
    return Response(body, kind="text/plain; version=0.0.4; charset=utf-8")


def stream_events(supervisor: Supervisor) -> Iterator[bytes]:
    """Yield every change of state as server-sent events, a snapshot of all first."""
    form = b"event: %b\ndata: %b\n\n"
    feed, quiet = supervisor.events, 0
    at, known = feed.end, supervisor.snapshots()
    yield form % (b"snapshot", objects("", known).body)
    while at < feed.end or not feed.closed:
        items, at = feed.read(at, LOOK_INTERVAL)
        for one in items:
            if isinstance(one, str):
                yield form % (b"removed", as_json({"name": one}).body)
            else:
                yield form % (b"state", objects(one.program.name, [one]).body)
        quiet = 0 if items else quiet + 1
        yield b"" if items or quiet % COMMENT_LOOKS else b": still here\n\n"


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
        return Response()  # how a page asks whether its token is right
    if len(request.targets) != 1:
        raise HttpError(400, "expected one program, not several")
    program, _, output, *_ = request.targets[0]
    name, stream = program.name, request.query.get("stream", "")
    if stream not in ("", *STREAMS):
        raise HttpError(400, f"stream: expected stdout or stderr, got {stream!r}")
    out, err = routes(program, output.log_format)
    target, log_format, direct = err if stream == "stderr" else out
    if direct and target in (1, 2, os.devnull):
        raise HttpError(409, f"{name} has a descriptor of its own, not seen here")
    if stream and out == err and (isinstance(target, str) or log_format != "json"):
        raise HttpError(400, f"both streams of {name} share one file")
    if isinstance(target, str):
        backups = [f"{target}.{n + 1}" for n in range(program.logfile_backups)]
        until = output if follow else None
        return Response(stream=file_log([target, *backups], lines, until))
    return Response(stream=memory_log(output, stream, lines, follow > 0))


def memory_log(feed: Output, stream: str, lines: int, follow: bool) -> Iterator[bytes]:
    """Yield the last lines of what is remembered; then, to follow, what comes."""

    def text(items: list[tuple[str, bytes]]) -> bytes:
        return b"".join(data for name, data in items if stream in ("", name))

    feed.followers.add(text)
    try:
        items, at = feed.read(None, 0)
        yield b"".join(deque(io.BytesIO(text(items)), lines))
        while follow and (at < feed.end or not feed.closed):
            items, at = feed.read(at, LOOK_INTERVAL)
            yield text(items)
    finally:
        feed.followers.discard(text)


def file_log(paths: list[str], lines: int, until: Feed[Any] | None) -> Iterator[bytes]:
    """Yield the last lines of a log and its backups, newest first; follow the log."""
    file: io.FileIO | None = None
    left = sys.maxsize if until else 0  # else what there is now: a writer may be faster
    with contextlib.ExitStack() as stack:
        for path in filter(os.path.isfile, paths):
            file = stack.enter_context(open(path, "rb", buffering=0))
            start = size = file.seek(0, os.SEEK_END)
            # The end of the last line begins no other.
            starts = line_starts(file.fileno(), size - 1) if size else ()
            for _, found in zip(range(lines), starts):
                start, lines = found, lines - 1
            left += size - file.seek(start)
            if lines <= 0:
                break
        while True:  # a file that was rotated meanwhile is read to its end
            ended, newer = not until or until.closed, newer_file(file, paths)
            if file and os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)  # it was truncated: no backups, or copytruncate
            while file and (chunk := file.read(min(PIPE, left))):
                left -= len(chunk)
                yield chunk
            if newer and left:
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


def post_order(order: Order, supervisor: Supervisor, request: Request) -> Response:
    """Do it; answer when the outcome of all is known, or after `wait` seconds."""
    wait = number_of(request, "wait", 0, MOST_WAIT)
    chosen = supervisor.ask(lambda: supervisor.order(order, request.targets))
    events, starts = supervisor.events, not isinstance(order, Stop)

    def is_known() -> bool:
        return all(
            status.state in ENDED or (starts and is_ready(program, status))
            for program, status in (one.snapshot[:2] for one in chosen)
        )

    with events.changed:
        events.changed.wait_for(lambda: events.closed or is_known(), wait)
    code = 200 if wait and is_known() else 202
    return objects(request.name, [one.snapshot for one in chosen], code)


def post_signal(supervisor: Supervisor, request: Request) -> Response:
    name = request.query.get("signal", "")
    try:
        signal_number(name)
    except ValueError as error:
        raise HttpError(400, f"signal: {error}") from None
    return post_order(Signal(name), supervisor, request)


def post_shutdown(supervisor: Supervisor, request: Request) -> Response:
    supervisor.ask(lambda: supervisor.begin_shutdown(0, "shutdown over HTTP"))
    return as_json({"status": "shutting down"}, 202)


Answer = Callable[["Supervisor", Request], Response]
# By path, where `*` stands for NAME.
READS: dict[str, Answer] = {
    "/": get_page,
    "/health": get_health,
    "/health/*": get_health,
    "/health/live": lambda owner, _: as_json(owner.ask(lambda: {"status": "ok"})),
    "/status": get_status,
    "/status/*": get_status,
    "/metrics": get_metrics,
    "/events": lambda owner, _: Response(
        kind="text/event-stream", stream=stream_events(owner)
    ),
    "/programs/*/logs": get_logs,
}
ORDERS: dict[str, Answer] = {
    "/programs/*/start": functools.partial(post_order, Start()),
    "/programs/*/stop": functools.partial(post_order, Stop()),
    "/programs/*/restart": functools.partial(post_order, Restart()),
    "/programs/*/signal": post_signal,
    "/reload": lambda owner, _: as_json(owner.ask(owner.reload)),
    "/shutdown": post_shutdown,
}


class Conversation:  # one connection, in a thread of its own
    def __init__(self, owner: Supervisor, peer: socket.socket, at: Address) -> None:
        self.supervisor, self.address, self.connection = owner, at, peer
        self.is_control = at is owner.control
        self.poll = select.poll()
        self.poll.register(peer, select.POLLIN)
        self.input = b""  # what has come and is not used yet
        self.lasts = True  # so far

    def run(self) -> None:
        """Answer requests until one side has enough; close when the client has."""
        suppress, slots = contextlib.suppress(OSError), self.supervisor.connections
        with contextlib.ExitStack() as whole, suppress, self.connection:
            self.is_welcome = self.takes(slots, whole)
            self.connection.settimeout(REQUEST_TIME)
            while self.lasts:
                with contextlib.ExitStack() as stack:
                    stack.callback(self.supervisor.answering.discard, self)
                    self.answer_one(stack)
            self.connection.shutdown(socket.SHUT_WR)
            # Unread, input has the kernel send a reset, which overtakes the answer.
            self.connection.settimeout(0.2 if self.is_welcome else 0)
            all(self.connection.recv(PIPE) for _ in range(64))  # until b""

    def takes(self, slots: threading.Semaphore, stack: contextlib.ExitStack) -> bool:
        """Take a slot until `stack` closes; return False if it needs one in vain."""
        if self.is_control:
            return True
        if taken := slots.acquire(blocking=False):
            stack.callback(slots.release)
        return taken

    def answer_one(self, stack: contextlib.ExitStack) -> None:
        """Answer a request, or say why not."""
        self.line, self.lasts = "", False
        try:
            if not self.is_welcome:
                raise HttpError(503, "too many connections", "Retry-After: 1")
            response = self.respond(*self.read_request())
            if response.stream:
                self.lasts = False  # its end is that of the connection
                if not self.takes(self.supervisor.streams, stack):
                    raise HttpError(503, "too many streams")
        except HttpError as error:
            status, text, *headers = error.args
            response = as_json({"error": text}, status, *headers)
        except SupervisorError as error:  # of ConfigError alone there is a list
            more = {"errors": error.errors} if error.errors else {}
            response = as_json({"error": str(error), **more}, 422 if more else 409)
        except OSError:
            raise
        except Exception as error:
            text = f"cannot answer {self.line!r}: {error!r}"
            self.supervisor.say("", text, "error")
            response = as_json({"error": "internal error"}, 500)
        self.send(response)

    def receive(self, end: bytes, most: int, status: int, deadline: float) -> str:
        """Return the input up to a blank line or line end, when that has come."""
        while not (found := re.search(end, self.input[:most])):
            if len(self.input) >= most:
                raise HttpError(status, "the request is too long")
            left = max(deadline - time.monotonic(), 0)
            data = self.connection.recv(PIPE) if self.poll.poll(left * 1000) else b""
            if not data and not self.input:
                raise ConnectionAbortedError  # who says nothing gets no answer
            if not data:
                raise HttpError(408, f"no whole request within {REQUEST_TIME:g} s")
            self.input += data
        return self.input[: found.end()].decode("latin-1")

    def read_request(self) -> tuple[str, str, dict[str, str]]:
        """Return the method, the target and the fields of a request."""
        deadline = time.monotonic() + REQUEST_TIME
        self.line = self.receive(rb"\n", MOST_LINE, 414, deadline)
        if not (line := REQUEST_LINE.fullmatch(self.line)):
            raise HttpError(400, "malformed request: expected HTTP/1.0 or HTTP/1.1")
        head = self.receive(rb"\n\r?\n", MOST_BYTES, 431, deadline)
        self.input = self.input[len(head) :]
        fields: dict[str, str] = {}
        for text in head.split("\n")[1:-2]:
            field = FIELD.fullmatch(text)
            if not field or (field[1].title() == "Host" and "Host" in fields):
                raise HttpError(400, "malformed headers")
            key, value = field[1].title(), field[2].strip(" \t")
            # What comes twice is a list (RFC 9110, 5.3), which a length cannot be.
            fields[key] = f"{fields[key]}, {value}" if key in fields else value
        length = fields.get("Content-Length", "0")
        if not length.isdecimal():
            raise HttpError(400, "expected a Content-Length")
        if len(length) > 9 or int(length) > MOST_BYTES:
            raise HttpError(413, f"expected a body of at most {MOST_BYTES} bytes")
        # None has a use for a body: that stays unread, and ends the connection.
        ends = int(length) > 0 or "Transfer-Encoding" in fields
        kept = fields.get("Connection", "close" if line[4] == "0" else "keep-alive")
        self.lasts = not ends and kept.lower() == "keep-alive"
        fields["Host"] = line[2] or fields.get("Host", "")
        return line[1], line[3], fields

    def send(self, response: Response) -> None:
        from http import HTTPStatus

        status = HTTPStatus(response.status)
        lines = [f"HTTP/1.1 {status:d} {status.phrase}", "Cache-Control: no-store"]
        lines += [f"Content-Type: {response.kind}", *response.headers]
        lines += [f"Connection: {'keep-alive' if self.lasts else 'close'}"]
        in_chunks = self.line.rstrip().endswith("1")  # HTTP/1.1
        if not response.stream:
            lines += [f"Content-Length: {len(response.body)}"]
        elif in_chunks:  # so that its end is told from a cut (RFC 9112, 7.1)
            lines += ["Transfer-Encoding: chunked"]
        head, is_head = "\r\n".join([*lines, "", ""]).encode(), self.line[:5] == "HEAD "
        # In one piece: two would take 44 ms (Nagle's algorithm, delayed ACK).
        self.connection.sendall(head if is_head else head + response.body)
        if is_head or not response.stream:
            return
        self.connection.settimeout(None if self.is_control else STREAM_TIME)
        for piece in response.stream:
            if piece:
                size = b"%x\r\n" % len(piece)
                self.connection.sendall(size + piece + b"\r\n" if in_chunks else piece)
            elif self.poll.poll(0) and not self.connection.recv(PIPE):
                break  # the client is gone
        self.connection.sendall(b"0\r\n\r\n" if in_chunks else b"")

    def respond(self, method: str, target: str, headers: dict[str, str]) -> Response:
        """Answer a request. Refusals come in this order: 400, 404, 405, 403, 401."""
        import urllib.parse  # with the first request

        self.supervisor.answering.add(self)
        path, _, query = target.partition("?")
        words, name = path.split("/"), ""
        if path not in READS and any(words[2:3]):
            name, words[2] = urllib.parse.unquote(words[2]), "*"
        path = "/".join(words)
        answer = READS.get(path) or ORDERS.get(path)
        if not answer:
            raise HttpError(404, "no such path")
        known = self.supervisor.snapshots()
        targets = select_programs(known, name) if name else known
        allowed = "GET, HEAD" if path in READS else "POST"
        if method not in allowed.split(", "):
            raise HttpError(405, f"{method} is not allowed", f"Allow: {allowed}")
        if not self.is_control:
            self.check_rights(method, headers, path in ORDERS or answer is get_logs)
        pairs = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        return answer(self.supervisor, Request(name, targets, pairs, headers))

    def check_rights(self, method: str, headers: dict[str, str], guarded: bool) -> None:
        """Refuse what another site has a browser send, or what is without the token."""
        # The Host shows a name that an attacker's DNS points at loopback, the Origin
        # another site's script. Without Host it is no browser's request.
        host, port = headers["Host"].lower(), r":\d*$"
        allowed = {one.lower() for one in self.supervisor.config.allowed_hosts}
        name, origin = re.sub(port, "", host), headers.get("Origin", "").lower()
        known = re.fullmatch(r"(.*\.)?localhost|127(\.\d{1,3}){3}|\[::1\]|", name)
        if self.address.is_loopback and not (known or {host, name} & allowed):
            raise HttpError(403, f"Host {host!r} is not one of ours, see allowed_hosts")
        place = origin.partition("://")[2]
        ours = place and (place == host or {place, re.sub(port, "", place)} & allowed)
        if method == "POST" and origin and not ours:
            raise HttpError(403, f"Origin {origin!r} is foreign")
        if not guarded:
            return
        if not self.supervisor.token:
            raise HttpError(403, "no token is configured: read-only, see `token`")
        import base64
        import hmac

        scheme, _, given = headers.get("Authorization", "").partition(" ")
        offered = given.strip().encode() if scheme.lower() == "bearer" else b""
        if scheme.lower() == "basic":
            with contextlib.suppress(ValueError):
                offered = base64.b64decode(given, validate=True).partition(b":")[2]
        if not hmac.compare_digest(offered, self.supervisor.token.encode()):
            raise HttpError(401, "wrong or missing token", "WWW-Authenticate: Bearer")


def bind(address: Address, private: bool = False) -> socket.socket:
    """Return a listening socket; raises OSError. A stale unix socket is replaced."""
    path, host, _ = address
    if path and os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "it exists and is no socket", path)
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(path) != errno.ECONNREFUSED:
                text = "a supervisor answers there already"
                raise OSError(errno.EADDRINUSE, text, path)
        os.unlink(path)  # its supervisor was killed
    if host == "::" and not socket.has_dualstack_ipv6():
        address = address._replace(host="0.0.0.0")
    listener = socket.socket(address.family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if host:  # inherited by its connections
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if address.host == "::":
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    with contextlib.ExitStack() as stack:
        if private:  # mode 0600 from its first moment, which chmod could not give
            stack.callback(os.umask, os.umask(0o177))
        listener.bind(path or address[1:])
    listener.listen(128)
    listener.setblocking(False)
    return listener


def control_path(control: str, path: str) -> str:
    """Return the control socket of a configuration; raises OSError."""
    if control != "auto":
        return os.path.abspath(control) if control else ""
    user = os.geteuid()
    folder = "/run" if user == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    if not folder:
        folder = f"/tmp/supervisors-{user}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
        if (status.st_uid, status.st_mode) != (user, stat.S_IFDIR | 0o700):
            raise PermissionError(errno.EPERM, "it is not ours alone", folder)
    return os.path.join(folder, f"supervisors-{path_hash(path)[:8]}.sock")


# === 9. Supervisor ====================================================================
#
# The main loop: the nearest deadline, select, signals through the wake-up descriptor,
# reap, feed `step`, do its action, publish. There is no tick; idle, it sleeps.

ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
LONGEST_SLEEP = 86_400.0  # seconds; epoll_wait(2) takes milliseconds in 31 bits
WAITING_FIRST = 1.0  # seconds after a shutdown began that it names who it waits for
WAITING_NEXT = 5.0
SWEEP = 1.0  # seconds that orphans have once the programs are gone
ORPHAN = Program("an orphan", "", stopwaitsecs=SWEEP)
MOST_TEXT = 1000  # characters of a line that a program says of itself
MOST_TOLD = 4096  # bytes of a message of sd_notify(3), as in systemd
MOST_NOTIFICATIONS = 512  # in a turn; the kernel queues 10, under systemd 512
ASK_TIME = 10.0  # seconds for the main loop to answer a thread


def children_before() -> set[int]:
    """Return what a host process had started before: not ours to end. None as PID 1."""
    with contextlib.suppress(ChildProcessError, AttributeError):  # macOS, before 3.13
        if os.getpid() != 1:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return set(descendants())
    return set()


def remove_file(path: str, inode: int) -> None:
    """Remove a file of ours, unless another has taken its place."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


class Process:
    """A program's place in the supervisor. Main thread."""

    def __init__(self, supervisor: Supervisor, program: Program) -> None:
        self.supervisor = supervisor
        self.program = program  # as it runs, or ran
        self.name = program.name
        self.status = Status()
        self.group = 0  # the last run's
        self.env_files: Variables | None = None  # what those said at its last start
        self.account: tuple[Variables, dict[str, Any]] = {}, {}  # whose it was then
        self.output = Output(REMEMBERED, LAG)
        self.colour = COLOURS[len(supervisor.processes) % len(COLOURS)]
        self.snapshot = Snapshot(program, self.status, self.output)
        self.check_began: float | None = None  # of the one that is under way
        self.check_pid = 0  # of its command
        self.has_passed = False  # a check of this run

    @property
    def definition(self) -> Program:
        """What the configuration says now, of which the next run is made."""
        return self.supervisor.config.programs.get(self.name, self.program)

    def apply(self, event: Event) -> None:
        """Feed an event to the state machine, do what it says, publish the result."""
        self.status, action = step(self.program, time.monotonic(), self.status, event)
        if isinstance(action, Spawn):
            self.apply(self.start_run())
            return
        if isinstance(action, Signal):
            # A stopped process takes no signal but SIGCONT.
            self.signal(signal_number(action.name))
            self.signal(signal.SIGCONT)
        self.supervisor.at(self.status.deadline, self.renew)
        self.publish()

    def signal(self, number: int) -> None:
        whole = self.program.stopasgroup or number == signal.SIGKILL
        target = -self.group if whole else self.status.pid
        if target:  # 0 would be our own group
            send(target, number)

    def start_run(self) -> Event:
        """Start the program as it is defined now, unless it has to wait."""
        self.program = program = self.definition
        known, names = self.supervisor.processes, program.needs
        if blocked := blocked_by({name: known[name].snapshot[:2] for name in names}):
            return blocked
        self.has_passed = False
        self.plan_check(time.monotonic())
        report: typing.BinaryIO = io.BytesIO()
        with contextlib.ExitStack() as stack:
            try:
                self.env_files = {}
                self.env_files = read_env_files(program)
                self.account = find_account(program)
                fds = self.open_streams(stack)
                if program.rlimits or program.nice is not None:
                    read_fd, write_fd = os.pipe()
                    report = io.FileIO(read_fd)
                    os.set_blocking(read_fd, False)
                    stack.callback(os.close, write_fd)
                    fds.append(write_fd)
                self.group = self.spawn(program.argv, *fds)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                reason, code = why_not(program, program.argv, error)
                # It was STARTING, though nobody was told: its end is news.
                self.snapshot = self.snapshot._replace(status=self.status)
                return SpawnFailed(f"cannot start {self.name}: {reason}", code)
        self.supervisor.children[self.group] = lambda code: self.ended(report, code)
        return Spawned(self.group)

    def open_streams(self, stack: contextlib.ExitStack) -> list[int]:
        """Return standard output and error; `stack` closes them, and has pipes read."""
        supervisor, fds = self.supervisor, list[int]()
        self.output.log_format = log_format = supervisor.config.log_format
        found = routes(self.program, log_format)
        user = self.account[1].get("user", -1)
        for stream, where in zip(STREAMS, found):
            if fds and where == found[0] and where.log_format != "json":
                return fds * 2  # one pipe keeps the order of the two
            fd = where.target
            if isinstance(fd, str):
                try:
                    fd = open_log(fd)
                except OSError as error:
                    raise ValueError(f"cannot open {fd!r}: {error.strerror}") from None
                os.set_blocking(fd, True)
                stack.callback(os.close, fd)
            if not where.direct:  # the log thread opens the file again, and keeps it
                read_fd, fd = os.pipe()
                stack.callback(os.close, fd)
                attempt(os.fchown, fd, user, -1)  # that it may open /dev/stdout, too
                read_fd = move_up(read_fd, supervisor.few_files[0])
                os.set_blocking(read_fd, False)
                add = functools.partial(self.add_source, read_fd, stream, where)
                stack.callback(supervisor.log.post, add)
            fds.append(fd)
        return fds

    def add_source(self, fd: int, stream: str, where: Route) -> None:
        """Have a pipe read. Log thread."""
        supervisor, log, program = self.supervisor, self.supervisor.log, self.program
        form, prefix = None, f"{self.name} | "
        if isinstance(where.target, int):
            prefix = f"{self.name:<{supervisor.name_width}} | "
            if os.isatty(where.target) and not supervisor.environ.get("NO_COLOR"):
                prefix = f"\033[{self.colour}m{prefix[:-1]}\033[0m "
        if where.log_format != "raw":
            form = log_formatter(where.log_format, self.name, stream, prefix)
        new = Sink(log_path(program, stream), supervisor.few_files[0])
        sink = log.sinks.setdefault(where.target, new)
        sink.maxbytes, sink.backups = program.logfile_maxbytes, program.logfile_backups
        log.add(Source(fd, sink, self.output, stream, form))

    def environ(self) -> dict[str, str]:
        supervisor, program = self.supervisor, self.program
        inherited, chosen = supervisor.environ, program.inherit_env
        names = set(inherited if chosen is True else chosen or ()) - OWN_VARIABLES
        environ = {
            "PATH": os.defpath,
            **{name: text for name, text in inherited.items() if name in names},
            **self.account[0],
            **(self.env_files or {}),
            **program.environment,
            "SUPERVISOR_PROCESS_NAME": program.name,
            "SUPERVISOR_GROUP_NAME": program.group,
            "PROCESS_NUM": str(program.number),
            **supervisor.variables,
        }
        if program.type == "notify":
            environ["NOTIFY_SOCKET"] = supervisor.notify_address
        if program.watchdog_secs:
            environ["WATCHDOG_USEC"] = str(int(program.watchdog_secs * 1e6))
        return environ

    def spawn(self, argv: LIST, out: int, err: int, *report: int) -> int:
        """Start a process as this program's user; raises what `why_not` explains."""
        supervisor, program = self.supervisor, self.program
        environ, switch = self.environ(), self.account[1]
        if report:
            argv, switch = trampoline(program, argv, environ, switch, *report), {}
        with LIMITED:
            supervisor.limit_files(supervisor.few_files)
            try:
                popen = subprocess.Popen(
                    argv,
                    stdin=supervisor.null_fd,
                    stdout=out,
                    stderr=err,
                    env=environ,
                    cwd=program.directory,
                    umask=-1 if program.umask is None else program.umask,
                    start_new_session=True,
                    # All others are close-on-exec; to close them one by one costs more.
                    close_fds=bool(report),
                    pass_fds=report,
                    **switch,
                )
            finally:
                supervisor.limit_files(supervisor.many_files)
        popen.returncode = 0  # it is reaped elsewhere; keep its destructor from waiting
        return popen.pid

    def ended(self, report: typing.BinaryIO, code: int) -> None:
        """The leader was reaped; its exit code is negative for a signal."""
        with report:  # b"" after exec; None while another holds the pipe's other end
            reason = (report.read() or b"").decode(errors="replace")
        if reason and self.status.state is not State.STOPPING:
            self.apply(SpawnFailed(f"cannot start {self.name}: {reason}", code))
        else:
            survivors = send(-self.group, 0)
            if survivors:
                self.supervisor.leaderless.add(self)
            self.apply(Exited(code, survivors))

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

        def ask() -> None:
            supervisor.post(functools.partial(take, probe(check)))

        if not check.command:
            threading.Thread(target=ask, daemon=True).start()
            return
        try:
            self.check_pid = self.spawn(check.command, *[supervisor.null_fd] * 2)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            take(why_not(self.program, check.command, error)[0])
            return
        ends = supervisor.children
        ends[self.check_pid] = lambda code: take(describe_end(code) if code else "")

    def take_result(self, began: float, problem: str) -> None:
        """Take what a check found, "" if it passed, and set the time of the next."""
        check = self.program.healthcheck
        if check is None or began != self.check_began:  # of one that was given up
            return
        self.apply(Checked(problem))
        if self.status.state in (State.STARTING, State.RUNNING):
            self.has_passed |= not problem
            longest = FOREVER if self.has_passed else FIRST_INTERVAL
            self.plan_check(began + min(check.interval, longest))

    def plan_check(self, when: float | None) -> None:
        """End the check that is under way; the next begins at an instant, or never."""
        self.check_began = None
        self.supervisor.at(when, self.check)
        if self.check_pid:
            send(-self.check_pid, signal.SIGKILL)
        self.check_pid = 0

    def publish(self) -> None:
        """Make the status known: to HTTP threads, the log, and who depends on it."""
        status, supervisor = self.status, self.supervisor
        program, before, _, started_at, changed_at = self.snapshot
        moved = status._replace(deadline=None) != before._replace(deadline=None)
        if not moved and self.program is program:
            return  # as at each WATCHDOG=1
        new_run = status.pid not in (None, before.pid)
        new_state = status.state is not before.state
        started_at = time.time() if new_run else started_at
        changed_at = time.time() if new_state else changed_at
        new = Snapshot(self.program, status, self.output, started_at, changed_at)
        self.snapshot = new
        supervisor.events.append(new)
        if status.state not in (State.STARTING, State.RUNNING):
            self.plan_check(None)
        unhealthy, was = status.healthy is False, before.healthy is False
        if new_state or new_run or unhealthy is not was:
            pid = f"pid {status.pid}" if status.pid else ""
            words = [status.state.value, pid, status.reason]
            words += ["healthy again"] if was and status.healthy else []
            backoff = status.state is State.BACKOFF
            if status.restarts > before.restarts and before.state is not State.BACKOFF:
                words.append(f"after {describe_end(status.exit_code)}")
            if backoff:
                seconds = max((status.deadline or 0) - time.monotonic(), 0)
                words.append(f"restart in {seconds:.2g} s")
            bad = backoff or (unhealthy and not was) or has_failed(status)
            level = "warning" if bad else "info"
            supervisor.say(self.name, ", ".join(filter(None, words)), level)
        final = new_state and status.state in (State.EXITED, State.FATAL)
        supervisor.changes.append((self, status if final else None))

    def renew(self) -> None:
        """Become what is defined now, unless it runs; go on if it need not wait."""
        if not self.status.is_alive:
            self.program = self.definition
        self.apply(Due())

    def differs(self) -> bool:
        """Return whether it is defined otherwise, env_files included, than it runs."""
        new, env_files = self.definition, self.env_files
        if env_files is not None:
            try:
                env_files = read_env_files(new)
            except ValueError as error:  # no reason to end what runs
                self.supervisor.say(self.name, str(error), "warning")
        same = new._replace(needs=self.program.needs) == self.program
        return not same or env_files != self.env_files

    def needs_new_run(self) -> bool:
        """Return whether it takes one to become what is defined now."""
        state, program = self.status.state, self.definition
        if state in (State.EXITED, State.FATAL):
            return program.autostart
        # One that waits goes on as the new one.
        return state is not State.WAITING and verdict(program, self.status) != ""


def read_token(config: Config) -> str:
    """Return the token of a configuration; raises ConfigError."""
    path = config.token_file
    if not path:
        return config.token
    try:
        with open(path, encoding="utf-8") as file:
            return to_token(file.read(), "token_file")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot read token_file {path!r}: {error}"]) from None


class Supervisor(Loop):
    """Runs the programs of a configuration. `run` blocks; main thread, once.

    It sets signal handlers, reaps every child of this process, and puts all back as it
    was when it returns. Children that its host starts meanwhile are ended with it. If
    it is private, the end of its standard input or of its parent ends it, too.
    """

    def __init__(self, config: Config, level: str = "info") -> None:
        self.config, self.first_config, self.level = config, config, level
        self.started_at = time.time()
        self.control: Address | None = None  # of the control socket
        self.processes: dict[str, Process] = {}
        self.events: Feed[Snapshot | str] = Feed(MOST_EVENTS, MOST_EVENTS)
        self.children: dict[int, Callable[[int], None]] = {}  # what to do at their end
        self.deadlines: dict[Callable[[], object], float] = {}
        self.changes: deque[tuple[Process, Status | None]] = deque()  # see `spread`
        # Of a thousand programs, few: an event must not cost a look at all.
        self.leaderless: set[Process] = set()  # whose group lives on
        self.answering: set[Conversation] = set()  # that are about to send
        self.told_manager = ""
        self.connections = threading.Semaphore(MOST_CONNECTIONS)
        self.streams = threading.Semaphore(MOST_STREAMS)
        self.variables = {"SUPERVISOR_ENABLED": "1"}  # that every program gets
        self.ending = self.killing = False  # a shutdown has begun, and may not wait
        self.busy = "ending what a killed supervisor left"  # why nothing may start
        self.asked: set[int] = set()  # what is no program's, to end
        self.exit_code = 0
        self.cleanup = contextlib.ExitStack()

    def run(self) -> int:
        """Run until all has ended; return the exit status. Raises SupervisorError."""
        with self.cleanup:
            self.open()
            self.end_strays(lambda: find_leftovers(self.config))
            self.start(self.processes.values())
            if not self.ending:
                self.busy = ""
            self.guard(self.conclude)
            while not self.ending:
                self.turn()
            while self.stop_level():
                self.turn()
            self.ask_to_end(self.orphans())  # together with the last level
            while self.alive():
                self.turn()
            self.end_strays(self.orphans)
            self.sleep(0)  # for calls that came too late for a turn
        return self.exit_code

    def turn(self, longest: float = LONGEST_SLEEP) -> None:
        """Sleep until something happens, and do what it asks for."""
        nearest = min(self.deadlines.values(), default=FOREVER)
        # Of before the sleep: what came in time is taken before a deadline is judged,
        # even if we were held up.
        now = time.monotonic()
        self.sleep(min(max(nearest - now, 0), longest))
        for call in [call for call, at in self.deadlines.items() if at <= now]:
            if self.deadlines.get(call, FOREVER) <= now:
                del self.deadlines[call]
                self.guard(call)
        self.guard(self.conclude)

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
                before = os.get_inheritable(int(fd))
                os.set_inheritable(int(fd), int(fd) < 3)
                defer(attempt, os.set_inheritable, int(fd), before)
        self.environ = original_environ()
        self.open_loop()
        defer(self.close_loop)
        self.catch_signals()
        self.log = LogThread(self.config.log_format, self.level)
        self.say = self.log.say
        defer(self.release_followers)
        defer(self.log.close)
        self.token = read_token(self.config)
        self.bind_all()
        self.raise_file_limit()
        self.spared = children_before()
        adopt_orphans(self.warn)
        if self.config.private:
            self.watch_parent()
        if self.config.path:
            self.variables[RUN_VARIABLE] = mark(null_fd, self.config.path)
        self.add_programs()
        self.keep_alive()

    def raise_file_limit(self) -> None:
        """Have room for many open files; programs get the original limit."""
        import resource

        self.limit_files = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE)
        self.few_files = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.many_files = max(soft, min(hard, MOST_FILES)), hard
        self.limit_files(self.many_files)
        self.cleanup.callback(self.limit_files, self.few_files)

    def catch_signals(self) -> None:
        """Have signals arrive as bytes in a pipe; none is ignored in programs.

        The wake-up descriptor gets its byte only where a handler is set in Python.
        Popen resets SIGPIPE and SIGXFSZ, which the interpreter ignores.
        """
        defer = self.cleanup.callback
        before = signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        defer(signal.set_wakeup_fd, before)
        wanted = {*ENDINGS, signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR2}
        for number in SIGNALS - {signal.SIGPIPE, signal.SIGXFSZ}:
            handler = signal.getsignal(number)
            if number in wanted or handler == signal.SIG_IGN:  # from nohup, say
                signal.signal(number, lambda number, frame: None)
                defer(signal.signal, number, handler or signal.SIG_DFL)
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        defer(signal.pthread_sigmask, signal.SIG_SETMASK, mask)

    def bind_all(self) -> None:
        """Bind all addresses, write the pidfile; raises SupervisorError."""
        config, control = self.config, ""
        try:
            if config.path or config.control != "auto":
                control = control_path(config.control, config.path)
        except OSError as error:
            self.warn(f"cannot have a control socket in {error.filename}: {error}")
        if control:
            self.control = Address(path=control)
            self.listen(self.control)
        for text in filter(None, config.listen):
            self.listen(parse_address(text))
        if path := config.pidfile:
            try:
                with open(path, "w") as file:
                    file.write(f"{os.getpid()}\n")
                self.cleanup.callback(remove_file, path, os.stat(path).st_ino)
            except OSError as error:
                self.warn(f"cannot write the pidfile {path!r}: {error.strerror}")

    def listen(self, address: Address) -> None:
        is_control = address is self.control
        try:
            bound = bind(address, private=is_control)
        except OSError as error:
            place = f"{'the control socket ' * is_control}{address}"
            reason = f"cannot listen on {place}: {error.strerror or error}"
            taken = error.errno in (errno.EADDRINUSE, errno.EEXIST)
            # A container's programs run without; others' verbs find another way.
            must = taken or self.config.private
            if must if is_control else os.getpid() != 1:
                raise SupervisorError(reason) from None
            self.warn(reason)
            return
        self.cleanup.callback(bound.close)
        if path := address.path:
            self.cleanup.callback(remove_file, path, os.stat(path).st_ino)
        elif not (address.is_loopback or self.token):
            self.warn(f"{address} is open for reading, no token is set")
        if is_control:
            self.variables["SUPERVISOR_SERVER_URL"] = f"unix://{path}"
        self.watch(bound, functools.partial(self.accept, bound, address))

    def at(self, when: float | None, call: Callable[[], object]) -> None:
        """Have something called once, at an instant; with None not at all."""
        self.deadlines.pop(call, None)
        if when is not None:
            self.deadlines[call] = when

    def ask(self, question: Callable[[], T]) -> T:
        """Have the main thread call something; return or raise its result."""
        answers: Feed[T | Exception] = Feed(1, 1)

        def call() -> None:
            try:
                answers.append(question())
            except Exception as error:
                answers.append(error)

        self.post(call)
        for answer in answers.read(0, ASK_TIME)[0]:
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise HttpError(503, "the main loop is busy")

    def warn(self, text: str) -> None:
        self.say("", text, "warning")

    def wake_up(self) -> None:
        """Do what signals ask for, whose numbers are in the pipe."""
        numbers = set(os.read(self.wake_read, PIPE))
        if signal.SIGCHLD in numbers:
            self.reap()
        for number in numbers.intersection(ENDINGS):
            if self.busy:
                self.kill_all(f"{signal_name(number)} while {self.busy}")
            self.begin_shutdown(0, signal_name(number))
        if signal.SIGHUP in numbers:
            try:
                self.reload()
            except SupervisorError as error:
                self.say("", f"cannot reload: {error}", "error")
        if signal.SIGUSR2 in numbers:
            self.reopen_logs()

    def reap(self) -> None:
        """Collect all children that have ended, and notice groups that are empty."""
        ends = []  # at first only these: what is started again may end at once
        while (end := attempt(os.waitpid, -1, os.WNOHANG)) not in ((0, 0), -1):
            ends.append(end)
        for pid, status in ends:
            if pid in self.children:
                self.guard(self.children.pop(pid), os.waitstatus_to_exitcode(status))
        for process in [*self.leaderless]:
            if not group_lives(process.group):
                self.leaderless.remove(process)
                process.apply(Emptied())
        # Not every end makes a SIGCHLD.
        self.at(time.monotonic() + TICK if self.leaderless else None, self.reap)

    def snapshots(self) -> list[Snapshot]:
        """Return what is known of all programs, in order. Any thread."""
        return [one.snapshot for one in [*self.processes.values()]]

    def alive(self) -> list[Process]:
        return [one for one in self.processes.values() if one.status.is_alive]

    def accept(self, listener: socket.socket, address: Address) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # out of descriptors, as a rule: wait for some to be closed
            call = self.selector.unregister(listener).data
            self.at(time.monotonic() + 1, functools.partial(self.watch, listener, call))
            return
        conversation = Conversation(self, connection, address)
        try:
            threading.Thread(target=conversation.run, daemon=True).start()
        except RuntimeError:  # no thread to be had: a limit of processes
            connection.close()

    def add_programs(self) -> None:
        """Take in what the configuration names, in its order, without starting it."""
        programs, known = self.config.programs, self.processes
        for name in programs:
            if name not in known:
                known[name] = Process(self, programs[name])
                self.events.append(known[name].snapshot)
        self.processes = {name: known[name] for name in [*programs, *known]}
        self.name_width = max(map(len, programs), default=0)
        self.dependents: defaultdict[str, list[Process]] = defaultdict(list)
        for process in self.processes.values():
            for name in process.definition.needs:
                self.dependents[name].append(process)
        for process in self.processes.values():
            process.renew()

    def start(self, processes: Iterable[Process]) -> None:
        """Start those that are to run, unless the end of one begins a shutdown."""
        for process in processes:
            if process.definition.autostart and not self.ending:
                self.guard(process.apply, Start())
                self.react()

    def react(self) -> None:
        """Do what changes mean to others; from a queue, as chains may be long."""
        while self.changes:
            self.guard(self.spread, *self.changes.popleft())

    def spread(self, process: Process, end: Status | None) -> None:
        """Do what the change of one program, or its final end, means to the others."""
        name = process.name
        for dependent in self.dependents[name]:
            dependent.renew()
        if not process.status.is_alive:
            process.renew()  # it may be defined otherwise by now
            if name in self.processes and name not in self.config.programs:
                del self.processes[name]
                self.events.append(name)
                # Its last lines may still be in the pipe.
                self.at(time.monotonic() + FAREWELL, process.output.close)
        if end:
            program, failed = process.program, has_failed(end)
            wish = program.on_failure if failed else program.on_success
            if wish == "shutdown":
                self.begin_shutdown(last_code(end) or int(failed), f"{name} has ended")

    def order(self, order: Order, targets: Iterable[Snapshot]) -> list[Process]:
        """Do what somebody wants of those programs that are still there."""
        names = [one.program.name for one in targets]
        starts = isinstance(order, (Start, Restart))
        known = self.config.programs if starts else self.processes
        chosen = [self.processes[name] for name in names if name in known]
        if starts and (reason := self.busy or ("" if chosen else "it was removed")):
            raise SupervisorError(f"cannot start {', '.join(names):.100}: {reason}")
        for process in chosen:
            if not isinstance(order, Signal):
                process.apply(order)
            elif process.status.is_alive:
                process.signal(signal_number(order.name))
        return chosen

    @functools.cached_property
    def notify_address(self) -> str:
        """Where notify programs speak to (sd_notify(3)), made when first wanted.

        The kernel says who sent a message (SCM_CREDENTIALS, unix(7)).
        """
        if sys.platform != "linux":
            raise ValueError('type "notify" needs Linux')
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.cleanup.callback(bound.close)
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        bound.bind("")  # to an abstract name that is free (autobind)
        self.watch(bound, functools.partial(self.read_notifications, bound))
        return str(bound.getsockname().decode()).replace("\0", "@")

    def read_notifications(self, bound: socket.socket) -> None:
        """Take all that programs have said of themselves: deadlines hang on it."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(MOST_NOTIFICATIONS):
                # No room for descriptors: the kernel closes what BARRIER=1 comes with.
                data, who, *_ = bound.recvmsg(MOST_TOLD, socket.CMSG_SPACE(12))
                pid = int.from_bytes(who[0][2][:4], sys.byteorder)
                self.take_notification(data, pid)

    def take_notification(self, data: bytes, pid: int) -> None:
        process = self.owner(pid)
        if process is None or process.program.type != "notify":
            lost = b"READY=1" in data and not process_fields(pid)
            why = ", which has ended: whose it was cannot be told" if lost else ""
            level = "warning" if lost else "debug"
            self.say("", f"ignored a notification from {pid}{why}", level)
            return
        # One line of a kind: a flood of them is no work for the machine.
        lines = data.decode(errors="replace").split("\n")
        said = {line.partition("=")[0]: line[:MOST_TEXT] for line in lines}
        for key in said.keys() & {"READY", "STATUS", "WATCHDOG"}:
            process.apply(Told("".join(filter(str.isprintable, said[key]))))

    def owner(self, pid: int) -> Process | None:
        """Return the program of a process: by session or ancestry."""
        leaders = {one.status.pid: one for one in self.processes.values()}
        with contextlib.suppress(OSError, IndexError):
            while pid > 1:
                leader = os.getsid(pid)  # every program leads a session
                if leader in leaders:
                    return leaders[leader]
                pid = int(process_fields(pid)[1])
        return None

    def orphans(self) -> dict[int, Program]:
        """Return what programs left that have ended; at last, health checks, too."""
        groups = {one.group for one in self.alive()}
        spare = self.spared | groups | (self.children.keys() if groups else set())
        return dict.fromkeys(descendants(spare), ORPHAN)

    def ask_to_end(self, strays: Mapping[int, Program]) -> None:
        """Ask processes that are no program's to end, each once.

        What one that was asked has started is how it ends: not while that one lives.
        """
        others = strays.keys() - self.asked
        new = [pid for pid in others if not ancestors(pid) & self.asked]
        for pid in new:
            self.warn(f"{self.busy}: {strays[pid].name} ({pid})")
            send(pid, signal_number(strays[pid].stopsignal))
            send(pid, signal.SIGCONT)
        self.asked.update(new)

    def end_strays(self, find: Callable[[], dict[int, Program]]) -> None:
        """End processes that are no program's, and what they start on the way."""
        began = time.monotonic()
        # While a process executes, its environment cannot be read: hence a second look.
        while left := find() or (find() if self.asked else {}):
            self.ask_to_end(left)
            passed = time.monotonic() - began
            for pid, program in left.items():
                if self.killing or passed >= program.stopwaitsecs:
                    send(pid, signal.SIGKILL)
            if all(passed >= one.stopwaitsecs + SWEEP for one in left.values()):
                break
            self.turn(TICK)
        self.asked.clear()  # a pid comes again

    def reload(self) -> dict[str, Any]:
        """Read the file anew and become what it says; raises ConfigError first."""
        old = self.config
        if self.busy or not old.path:
            raise SupervisorError(self.busy or "it has no file")
        config = load_config(old.path, old.private)
        self.token = read_token(config)
        self.config = config
        self.log.log_format = config.log_format
        result = self.change_programs(old.programs)
        first = self.first_config
        fixed = ("listen", "control", "pidfile", "log_format")
        stuck = [key for key in fixed if getattr(first, key) != getattr(config, key)]
        words = [f"{len(names)} {key}" for key, names in [*result.items()][:3]]
        self.say("", f"reloaded: {', '.join(words)}, {result['unchanged']} unchanged")
        if stuck:
            result["needs_restart"] = stuck
            self.warn(f"a changed {', '.join(stuck)} needs a restart")
        return result

    def change_programs(self, old: Mapping[str, Program]) -> dict[str, Any]:
        """Stop, start and restart what differs; leave all else untouched."""
        programs, known = self.config.programs, self.processes
        added = [name for name in programs if name not in old]
        removed = [name for name in known if name not in programs]
        changed = [one for one in programs if one in old and known[one].differs()]
        renewed = [known[name] for name in changed if known[name].needs_new_run()]
        self.add_programs()
        for name in removed:
            known[name].apply(Stop())  # which changes nothing where it was stopped
            self.changes.append((known[name], None))
        for process in renewed:
            process.apply(Restart())
        self.start(self.processes[name] for name in added)
        result = {"added": added, "changed": changed, "removed": removed}
        return {**result, "unchanged": len(programs) - len(added) - len(changed)}

    def reopen_logs(self) -> None:
        for sink in list(self.log.sinks.values()):
            self.log.post(sink.reopen)
        for name, program in self.config.programs.items():
            for where in set(routes(program, self.config.log_format)):
                if where.direct and where.target not in (1, 2, os.devnull):
                    reason = f"{where.target} is held by the program itself: restart it"
                    self.say(name, f"cannot reopen its log: {reason}", "warning")
        self.say("", "reopened the log files")

    def release_followers(self) -> None:
        """Let streams send what there still is, and end."""
        self.events.close()
        for process in self.processes.values():
            process.output.close()
        end = time.monotonic() + FAREWELL
        while self.answering and time.monotonic() < end:
            time.sleep(TICK)
        for one in [*self.answering]:  # whose clients take nothing
            attempt(one.connection.shutdown, socket.SHUT_RDWR)

    def watch_parent(self) -> None:
        """End when its pipe does; or, as a fork of it may hold that, when it does."""
        fds = [0]
        with contextlib.suppress(OSError, AttributeError):  # needs Linux 5.3
            fds.append(os.pidfd_open(os.getppid()))
            self.cleanup.callback(os.close, fds[1])
        for fd in fds:
            self.watch(fd, functools.partial(self.lose_parent, fd))

    def lose_parent(self, fd: int) -> None:
        self.selector.unregister(fd)
        self.begin_shutdown(0, "the parent is gone")

    def begin_shutdown(self, code: int, reason: str) -> None:
        """Stop everything, dependents first, then return `code`."""
        if self.ending:
            return
        self.ending, self.busy, self.exit_code = True, "shutting down", code
        self.say("", f"shutting down: {reason}")
        tell_manager("STOPPING=1")
        for process in self.processes.values():
            # From here on nothing comes back, whatever way it ends.
            process.program = process.program._replace(autorestart=False)
            if process.status.state in (State.STOPPING, State.WAITING, State.BACKOFF):
                process.apply(Stop())
        now, limit = time.monotonic(), self.config.shutdown_timeout
        self.at(now + WAITING_FIRST, self.name_waiting)
        if limit is not None:
            self.at(now + limit, lambda: self.kill_all("shutdown_timeout is over"))

    def name_waiting(self) -> None:
        names = ", ".join(one.name for one in self.alive())
        self.say("", f"still waiting for {names or 'orphans'}")
        self.at(time.monotonic() + WAITING_NEXT, self.name_waiting)

    def kill_all(self, reason: str) -> None:
        self.warn(f"killing everything: {reason}")
        self.killing = True
        for process in self.alive():
            process.apply(Stop())
            process.signal(signal.SIGKILL)

    def conclude(self) -> None:
        """Do what changes mean to the others, then look at all programs together."""
        self.react()
        watched, finite = "NOTIFY_SOCKET" in self.environ, self.config.exit_when_done
        if self.busy or not (watched or finite):
            return
        missing, codes = [], list[int]()
        for program, status, *_ in self.snapshots():
            health = verdict(program, status)
            if health and not is_ready(program, status):
                missing.append(program.name)
                if health == "failed":
                    codes.append(last_code(status) or 1)
        waiting = f"STATUS=waiting for {', '.join(missing)}"
        text = waiting if missing else "READY=1\nSTATUS=ready"
        if text != self.told_manager:
            self.told_manager = text
            tell_manager(text)
        if finite and len(missing) == len(codes) and not self.alive():
            self.begin_shutdown([*codes, 0][0], "all programs have ended")

    def stop_level(self) -> bool:
        """Stop what nothing alive depends on; return whether there is another level."""
        found = alive = self.alive()
        needs = set[str]()
        while found:  # what is between two may have ended
            new = {name for one in found for name in one.definition.needs} - needs
            needs |= new
            found = [self.processes[name] for name in new & self.processes.keys()]
        running = [one for one in alive if one.status.state is not State.STOPPING]
        for process in running:
            if process.name not in needs:
                self.guard(process.apply, Stop())
        return any(one.name in needs for one in running)

    def keep_alive(self) -> None:
        period, pid = map(self.environ.get, ("WATCHDOG_USEC", "WATCHDOG_PID"))
        # Another process's are none of ours (sd_watchdog_enabled(3)).
        if period and period.strip("0").isdecimal() and pid in (None, str(os.getpid())):
            tell_manager("WATCHDOG=1")
            self.at(time.monotonic() + int(period) / 2e6, self.keep_alive)


# === 10. Client and command line ======================================================
#
# The verbs talk HTTP to the control socket, with the same client as the library.

DEFAULT_FILE = "supervisors.toml"
START_TIME = 10.0  # seconds for a supervisor in a test to answer
POLL = 0.02  # seconds between two looks of a client that waits
MANY = 1000  # names


def chunked_lines(answer: typing.BinaryIO) -> Iterator[bytes]:
    """Yield the lines of an answer in chunks (RFC 9112, 7.1), if none is missing."""
    rest = list[bytes]()  # joined once: a line may have many chunks
    while size := int(answer.readline() or b"-1", 16):
        if size < 0:
            raise SupervisorError("the answer was cut off")
        *lines, last = answer.read(size + 2)[:-2].split(b"\n")
        for line in lines:
            yield b"".join([*rest, line, b"\n"])
            rest.clear()
        rest.append(last)
    if any(rest):
        yield b"".join(rest)


class Client:
    """Talks to a running supervisor, at `unix:PATH` or `HOST:PORT`. Any thread.

    Names are programs, groups, globs or `all`. Everything raises SupervisorError.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        try:
            self.address = parse_address(address)
        except ValueError as error:
            raise ConfigError([f"server: {error}"]) from None
        token = to_token(token or "", "token")
        self.fields = f"Authorization: Bearer {token}\r\n" if token else ""

    def ask(
        self, request: str, name: str = "", limit: float | None = 10.0, read: Any = None
    ) -> Any:
        """Return what `read` makes of the answer, else its JSON; `*` is the name's."""
        import json
        import urllib.parse

        place, path = str(self.address), self.address.path
        request = request.replace("*", urllib.parse.quote(name or "", "")).rstrip("/")
        # http.client takes 15 ms, and takes a cut between two chunks for the end.
        head = f"{request} HTTP/1.1\r\nHost: {place}\r\nConnection: close\r\n"
        # Of a name for a host, whichever address answers.
        dial = functools.partial(socket.create_connection, self.address[1:], limit)
        try:
            with socket.socket(socket.AF_UNIX) if path else dial() as peer:
                peer.settimeout(limit)
                if path:
                    peer.connect(path)
                peer.sendall(f"{head}{self.fields}\r\n".encode())
                answer, head = peer.makefile("rb"), ""
                while line := answer.readline().decode("latin-1").strip():
                    head += line.lower() + "\n"
                status = int(head[9:12])  # of `HTTP/1.1 200 OK`
                lines = chunked_lines(answer) if ": chunked\n" in head else answer
                if status < 400 and read:
                    return read(lines)
                content = json.loads(b"".join(lines))
            if status < 400 or "programs" in content:  # as in ill health
                return content
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", "") or repr(error)
            text = f"no supervisor at {place}: {reason}; "
            text += "start one, or name another with -c or -s"
            status, content = 404, {"error": text}
        text = content.get("error", f"HTTP status {status}")
        failure = SupervisorError(text, 4 if status == 404 else 1)
        failure.errors = content.get("errors", ())
        raise failure

    def answers(self) -> bool:
        try:
            self.ask("GET /health/live")
        except SupervisorError as error:
            return error.code != 4
        return True

    def order(self, verb: str, name: str, wait: float = 60.0) -> Any:
        """Return the status once it is as wanted, has failed, or `wait` is over."""
        return self.ask(f"POST /programs/*/{verb}?wait={wait}", name, wait + ASK_TIME)

    status = functools.partialmethod(ask, "GET /status/*")  # of one, or a list
    health = functools.partialmethod(ask, "GET /health/*")  # and `programs` not well
    start = functools.partialmethod(order, "start")
    stop = functools.partialmethod(order, "stop")
    restart = functools.partialmethod(order, "restart")
    reload = functools.partialmethod(ask, "POST /reload", limit=30.0)
    shutdown = functools.partialmethod(ask, "POST /shutdown")  # only asks for it

    def signal(self, name: str, signal: str) -> Any:
        import urllib.parse

        request = f"POST /programs/*/signal?signal={urllib.parse.quote(signal)}"
        return self.ask(request, name)

    def logs(self, name: str, lines: int = 100) -> str:
        request = f"GET /programs/*/logs?lines={lines}"
        content: bytes = self.ask(request, name, 30.0, b"".join)
        return content.decode(errors="replace")

    def wait_healthy(self, timeout: float = 30.0) -> None:
        """Wait until all that is wanted is well; else raises SupervisorError."""
        end = time.monotonic() + timeout
        while (answer := self.health())["status"] != "ok":
            if time.monotonic() >= end:
                reasons = "; ".join(map(": ".join, answer["programs"].items()))
                raise SupervisorError(f"not healthy after {timeout:g} s: {reasons}")
            time.sleep(POLL)


def to_toml(config: Mapping[str, Any]) -> str:
    """Return TOML, which JSON with `=` in the place of `:` is; raises TypeError."""
    import json

    def plain(one: Any) -> Any:
        return dict(one) if isinstance(one, Mapping) else os.fspath(one)

    encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", "="), default=plain)
    return "".join(f"{key}={encoder.encode(config[key])}\n" for key in config)


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
                file.write(to_toml(config))
        else:
            path = os.fspath(config)
        load_config(path, f"{folder}/s")  # raises what is wrong with it
        argv = [sys.executable, os.path.abspath(__file__), "-c", path]
        argv.append(f"--private={folder}/s")
        # At its end it closes the pipe, and the supervisor sees the end of file, unless
        # somebody forked meanwhile: hence the order.
        with subprocess.Popen(argv, stdin=subprocess.PIPE) as popen:
            client, end = Client(f"unix:{folder}/s"), time.monotonic() + START_TIME
            while not client.answers():
                if popen.poll() is not None or time.monotonic() >= end:
                    raise SupervisorError("the supervisor does not start")
                time.sleep(POLL)
            try:
                yield client
            finally:
                with contextlib.suppress(SupervisorError):  # it has ended already
                    client.shutdown()


def connect(options: Mapping[str, str]) -> Client:
    """Return a client of -s, else -c, the environment, the default file."""
    server, path = options["-s"], options["-c"]
    config, token = Config(listen=()), ""
    with contextlib.suppress(ConfigError):  # what cannot be sent is none
        token = to_token(os.environ.get("SUPERVISOR_TOKEN", ""))
    with contextlib.suppress(ConfigError):  # a verb works while the file is broken
        environ = original_environ()
        config = Config(**read_table(declared(Config), read_toml(path), environ)[0])
        token = token or read_token(config)
    addresses = [server]
    if not server:
        any_host = re.compile(r"^(0\.0\.0\.0)?:")
        addresses = [any_host.sub("127.0.0.1:", one) for one in config.listen]
        with contextlib.suppress(OSError):
            control = control_path(config.control, path)
            addresses.insert(0, f"unix:{control}" if control else "")
    clients = [Client(address, token) for address in addresses if address]
    if not clients:
        raise SupervisorError(f"{path} has neither control nor listen: use -s", 4)
    # One that does not answer says so when it is asked again.
    return next(filter(Client.answers, clients), clients[0])


def do_status(client: Client, options: Mapping[str, str], names: str) -> int:
    objects, unwell = client.status(names), client.health()["programs"]
    if "--json" in options:
        import json

        print(json.dumps(objects, indent=2))
    else:
        width = max(len(one["name"]) for one in objects)
        for one in objects:
            line = f"{one['name']:<{width}}   {one['state']:<9} {one['description']}"
            print(line.rstrip())
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
    width, follow, failed = max(map(len, found)), "-f" in options, list[str]()
    broken = list[OSError]()  # our output, by what
    request = f"GET /programs/*/logs?lines={options['-n']}&follow={follow:d}"
    output = io.FileIO(1, "wb", closefd=False)  # a line is one write

    def copy(name: str) -> None:
        prefix = f"{name:<{width}} | ".encode() if len(found) > 1 else b""
        end = b"\n" if prefix else b""  # which a last line may lack

        def show(lines: Iterable[bytes]) -> None:
            for line in lines:
                try:
                    output.write(prefix + line.removesuffix(end) + end)
                except OSError as error:
                    broken.append(error)
                    return

        try:
            client.ask(request, name, None if follow else 30.0, show)
        except SupervisorError as error:
            failed.append(name)
            if not broken:
                print(f"{name}: {error}", file=sys.stderr)

    copies = [threading.Thread(target=copy, args=[one], daemon=True) for one in found]
    for thread in copies:
        thread.start()
        thread.join(0 if follow else None)
    while not broken and any(thread.is_alive() for thread in copies):
        time.sleep(POLL)
    for error in broken:
        raise error
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

OPTIONS = {  # that are numbers
    "-n": Check("a whole number >= 0", is_count, int),
    "-t": Check(f"seconds from 0 to {MOST_WAIT:g}", within(0, MOST_WAIT, float), float),
}


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
        server = "" if "-c" in given else os.environ.get("SUPERVISOR_SERVER_URL", "")
        options = {"-c": DEFAULT_FILE, "-s": server, "-t": "60", "-n": "100", **given}
        if verb == "signal":
            signal_number(words[0])
        if wrong := read_table(OPTIONS, {key: options[key] for key in OPTIONS})[1]:
            raise ValueError(wrong[0])
    except (getopt.GetoptError, ValueError) as error:
        raise SupervisorError(f"{error} (see --help)") from None
    return verb, words, options


def act(verb: str, words: list[str], options: Mapping[str, str]) -> int:
    """Do what a command line says; return the exit status."""
    if verb:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    if verb in VERBS:
        names = ",".join(words + words[-1:])  # with a comma it gets an array
        return VERBS[verb][0](connect(options), options, names)
    path = [*words, options["-c"]][0]
    config = load_config(path, options.get("--private", ""))
    if verb == "check":
        print(f"{path}: ok, {len(config.programs)} programs")
        return 0
    level = "debug" if "-v" in options else "warning" if "-q" in options else "info"
    call_libc("malloc_trim", 0)  # see `exit_with`
    return Supervisor(config, level).run()


def main(arguments: list[str]) -> int:
    """Do what a command line says; return the exit status."""
    # Until it is parsed; the code of `health` is 0 or 1 then, too.
    verb = "health" if "health" in arguments else ""
    try:
        if {"-h", "--help", "--version"} & {*arguments}:
            text = str(__doc__).partition("else.\n\n")[2].partition("The file")[0]
            version = "--version" in arguments
            print(f"supervisors {__version__}" if version else text.rstrip())
            code = 0
        else:
            verb, words, options = parse_arguments(arguments)
            code = act(verb, words, options)
        print(end="", flush=True)  # what cannot be written fails here
    except SupervisorError as error:
        print(*(error.errors or [f"supervisors: {error}"]), sep="\n", file=sys.stderr)
        code = error.code if verb else 2
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # of our output, as a rule
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the interpreter's last flush
        code = 1
        if not isinstance(error, BrokenPipeError):
            say(f"cannot go on: {error}")
    return min(code, 1) if verb == "health" else code


if __name__ == "__main__":
    exit_with(functools.partial(main, sys.argv[1:]))
