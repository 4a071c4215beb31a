"""Tests of supervisors.py: real processes, real sockets, real files."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import itertools
import json
import os
import pty
import pwd
import random
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import textwrap
import time
import tomllib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import pytest

import supervisors
from supervisors import (
    Blocked,
    Checked,
    ConfigError,
    Due,
    Emptied,
    Exited,
    Program,
    Restart,
    Spawned,
    SpawnFailed,
    Start,
    State,
    Status,
    Stop,
    Told,
    step,
)

SCRIPT = Path(__file__).with_name("supervisors.py")
PYTHON = sys.executable
# As `python3 -m supervisors`: from cached bytecode, which saves half of every start.
RUN_MODULE = f"""
import runpy, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_module("supervisors", run_name="__main__", alter_sys=True)
"""
COMPILED = (PYTHON, "-c", RUN_MODULE)
LIMIT = 30.0  # seconds that anything may take before a test gives up
T = TypeVar("T")

# A shell's background job inherits these as ignored, and so would what a test starts.
for number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def eventually(read: Callable[[], T], want: Any = True, timeout: float = LIMIT) -> T:
    """Return the first value of `read` that is `want`, or that `want` accepts."""
    end = time.monotonic() + timeout
    while True:
        value = read()
        if want(value) if callable(want) else value == want:
            return value
        assert time.monotonic() < end, f"still {value!r} after {timeout} s"
        time.sleep(0.01)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout: float = LIMIT) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.path.relpath(self.path))


class Run:
    """A supervisor that a test started, its folder, and what it has printed.

    Its standard output and error go to the files `out` and `err` of the folder, and
    it is asked over its control socket `folder/s`.
    """

    def __init__(self, folder: Path, popen: subprocess.Popen[bytes], mark: str) -> None:
        self.folder = folder
        self.popen = popen
        self.mark = mark
        self.pid = popen.pid

    @property
    def out(self) -> bytes:
        return (self.folder / "out").read_bytes()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def ask(self, path: str, method: str = "GET") -> tuple[int, Any]:
        """Return the status code and the JSON (or text) of a request's answer."""
        connection = UnixConnection(self.folder / "s")
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.headers.get_content_type() == "application/json":
            return answer.status, json.loads(body)
        return answer.status, body.decode()

    def status(self, name: str) -> dict[str, Any]:
        code, answer = self.ask(f"/status/{name}")
        assert code == 200, answer
        assert isinstance(answer, dict)
        return answer

    def status_all(self) -> list[dict[str, Any]]:
        code, answer = self.ask("/status")
        assert code == 200, answer
        assert isinstance(answer, list)
        return answer

    def state(self, name: str) -> str:
        return str(self.status(name)["state"])

    def wait_state(self, name: str, state: str) -> dict[str, Any]:
        """Wait until `name` is in `state`; return its status object."""
        return eventually(lambda: self.status(name), lambda s: s["state"] == state)

    def wait_err(self, text: str) -> str:
        """Wait until standard error contains `text`."""
        return eventually(lambda: self.err, lambda err: text in err)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.send(number)
        return self.popen.wait(LIMIT)

    def left(self) -> list[int]:
        """Return the processes that carry this run's mark, the supervisor included."""
        return [pid for pid in all_pids() if self.mark.encode() in environ_of(pid)]


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def environ_of(pid: int) -> bytes:
    """Return a process's environment; nothing for one that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def children(pid: int) -> list[int]:
    """Return the children of a process, zombies included."""
    stats = {child: stat_of(child) for child in all_pids()}
    return [child for child, stat in stats.items() if stat[1:2] == [str(pid)]]


def stat_of(pid: int) -> list[str]:
    """Return what `/proc/PID/stat` says after the name: state, parent, group, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def supervisor_below(pid: int) -> int:
    """Return the supervisor's own process, below `unshare --fork` its child."""
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if argv[:2] == [word.encode() for word in COMPILED[:2]]:
        return pid
    return supervisor_below(children(pid)[0])


def unshare(*flags: str) -> tuple[str, ...]:
    """Return the words that run a command in namespaces of its own, or skip the test.

    In CI that skip is a failure.
    """
    mapped = () if os.getuid() == 0 else ("--map-root-user",)
    words = ("unshare", *mapped, *flags)
    try:
        done = subprocess.run([*words, "true"], capture_output=True, text=True)
    except OSError as error:
        cannot(f"no unshare: {error}")
    if done.returncode != 0:
        cannot(f"{' '.join(words)}: {done.stderr.strip()}")
    return words


def cannot(reason: str) -> NoReturn:
    """Skip a test for something that this machine lacks; fail it in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


Supervise = Callable[..., Run]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Supervise]:
    with supervising(tmp_path) as start:
        yield start


@contextlib.contextmanager
def supervising(tmp_path: Path) -> Iterator[Supervise]:
    """Start supervisors in a folder; end them, and see that nothing is left."""
    runs: list[Run] = []

    def start(
        config: str,
        *,
        ready: bool = True,
        prefix: tuple[str, ...] = (),
        arguments: tuple[str, ...] = (),
        folder: Path | None = None,
        env: dict[str, str] | None = None,
        listen: str = '""',
        stdout: int | None = None,
    ) -> Run:
        folder = folder or tmp_path
        head = f'listen = {listen}\ncontrol = "s"\n'
        (folder / "supervisors.toml").write_text(head + config)
        mark = f"TEST_MARK={uuid.uuid4().hex}"
        variables = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
        variables |= (env or {}) | dict([mark.split("=")])
        with open(folder / "out", "ab") as out, open(folder / "err", "ab") as err:
            popen = subprocess.Popen(
                [*prefix, *COMPILED, *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stderr=err,
                stdout=out if stdout is None else stdout,
                env=variables,
                start_new_session=True,
            )
        run = Run(folder, popen, mark)
        runs.append(run)
        if ready:
            eventually(lambda: answers(run) or popen.poll() is not None)
            assert popen.poll() is None, run.err
            run.pid = supervisor_below(popen.pid)
        return run

    def answers(run: Run) -> bool:
        with contextlib.suppress(OSError):
            return run.ask("/health/live")[0] == 200
        return False

    try:
        yield start
        for run in runs:
            if run.popen.poll() is None:
                run.end()
            eventually(run.left, [])
    finally:
        for run in runs:
            for pid in run.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if run.popen.poll() is None:
                run.popen.kill()
            run.popen.wait(LIMIT)


def script(folder: Path, name: str, text: str) -> str:
    """Write a Python program and return the TOML list that runs it."""
    path = folder / name
    path.write_text(text)
    return json.dumps([PYTHON, "-S", str(path)])


def sh(text: str, *arguments: str) -> str:
    """Return the TOML list that runs a line of shell."""
    return json.dumps(["sh", "-c", text, "sh", *arguments])


def python(text: str, *arguments: object) -> str:
    """Return the TOML list that runs Python code."""
    return json.dumps([PYTHON, "-S", "-c", text, *map(str, arguments)])


# === Configuration ====================================================================


def configured(text: str, **environ: str) -> supervisors.Config:
    """Return the configuration that a TOML text means in an environment."""
    return supervisors.parse_config(tomllib.loads(text), environ)


def program(keys: str = "", **environ: str) -> Program:
    """Return a program `web` with these keys."""
    config = configured(f"[programs.web]\ncommand = 'web'\n{keys}", **environ)
    return config.programs["web"]


def mistakes(text: str, **environ: str) -> list[str]:
    """Return the errors that a configuration has."""
    with pytest.raises(ConfigError) as caught:
        configured(text, **environ)
    return caught.value.errors


def loaded(path: Path) -> supervisors.Config:
    return supervisors.load_config(str(path))


def supervisors_py(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the script to its end."""
    return subprocess.run(
        [PYTHON, str(SCRIPT), *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


TEN_MISTAKES = """
listn = "localhost:3000"
shutdown_timeout = "soon"
[defaults]
autostrat = true
[programs.web]
command = "touch started"
autorestrat = true
stopwaitsecs = -1
exitcodes = [0, "one"]
stopsignal = "BOGUS"
[programs.db]
umask = "999"
[programs.job]
command = "touch started"
logfile_maxbytes = "10 parsecs"
"""

TEN_KEYS = [
    "listn: unknown key, did you mean 'listen'?",
    "shutdown_timeout: ",
    "defaults.autostrat: unknown key, did you mean 'autostart'?",
    "programs.web.autorestrat: unknown key, did you mean 'autorestart'?",
    "programs.web.stopwaitsecs: ",
    "programs.web.exitcodes",
    "programs.web.stopsignal: ",
    "programs.db.command: ",
    "programs.db.umask: ",
    "programs.job.logfile_maxbytes: ",
]


def test_a_health_check_tells_all_its_mistakes() -> None:
    errors = mistakes("programs.web = {command = 'a', healthcheck = {htp = 1}}")
    where = "programs.web.healthcheck"
    assert errors == [
        f"{where}.htp: unknown key, did you mean 'http'?",
        f"{where}: expected one of http, tcp and command",
    ]


def test_ten_mistakes_give_ten_located_errors() -> None:
    errors = mistakes(TEN_MISTAKES)
    assert len(errors) == len(TEN_KEYS)
    for key in TEN_KEYS:
        assert any(key in error for error in errors), key


@pytest.mark.parametrize("arguments", [(), ("check",)])
def test_ten_mistakes_are_printed_and_nothing_is_started(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "supervisors.toml").write_text(TEN_MISTAKES)
    done = supervisors_py(*arguments, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == len(TEN_KEYS)
    for key in TEN_KEYS:
        assert any(f"supervisors.toml: {key}" in line for line in lines), key
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ("numprocs = 0", "numprocs"),
        ("numprocs = true", "numprocs"),
        ("autostart = 1", "autostart"),
        ("autostart = 'yes'", "autostart"),
        ("autorestart = 'always'", "autorestart"),
        ("startsecs = nan", "startsecs"),
        ("startsecs = '1s'", "startsecs"),
        ("startsecs = true", "startsecs"),
        ("startretries = -1", "startretries"),
        ("startretries = 1.5", "startretries"),
        ("backoff_delay = -0.5", "backoff_delay"),
        ("stopsignal = 15", "stopsignal"),
        ("umask = '8'", "umask"),
        ("umask = 18", "umask"),
        ("nice = 'low'", "nice"),
        ("rlimits = {nofiles = 1}", "rlimits.nofiles"),
        ("rlimits = {nofile = 'many'}", "rlimits.nofile"),
        ("rlimits = {nofile = 99999999999999999999}", "rlimits.nofile"),
        ("type = 'forking'", "type"),
        ("watchdog_secs = 1", "watchdog_secs"),
        ("on_failure = 'reboot'", "on_failure"),
        ("exitcodes = 0", "exitcodes"),
        ("environment = {A = 'a', PORT = 80}", "environment.PORT: "),
        ("environment = {'A=B' = 'a'}", "environment.A=B: "),
        ("env_file = ''", "env_file"),
        ("environment = ['PORT=80']", "environment"),
        ("inherit_env = 'PATH'", "inherit_env"),
        ("logfile_maxbytes = -1", "logfile_maxbytes"),
        ("logfile_maxbytes = '10XB'", "logfile_maxbytes"),
        ("logfile_backups = -1", "logfile_backups"),
        ("log_format = 'xml'", "log_format"),
        ("directory = 5", "directory"),
        ("depends_on = ['nobody']", "depends_on"),
        ("depends_on = 'db'", "depends_on"),
        ("healthcheck = {}", "healthcheck"),
        ("healthcheck = {tcp = 'a:1', http = 'http://a'}", "healthcheck"),
        ("healthcheck = {tcp = 'nowhere'}", "healthcheck.tcp"),
        ("healthcheck = {tcp = 'nowhere:800000'}", "healthcheck.tcp"),
        ("healthcheck = {http = 'ftp://a'}", "healthcheck.http"),
        ("healthcheck = {tcp = 'a:1', interval = 0}", "healthcheck.interval"),
        ("healthcheck = {tcp = 'a:1', retrys = 1}", "healthcheck.retrys"),
    ],
)
def test_impossible_value_is_an_error_with_its_key(keys: str, where: str) -> None:
    (error,) = mistakes(f"[programs.web]\ncommand = 'web'\n{keys}")
    assert f"programs.web.{where}" in error


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "programs"),
        ("[programs]", "programs"),
        ("programs = 1", "programs"),
        ("[programs]\nweb = 'sleep 1'", "programs.web"),
        ("[programs.web]", "programs.web.command: "),
        ("[programs.web]\ncommand = ''", "programs.web.command: "),
        ("[programs.web]\ncommand = []", "programs.web.command: "),
        ("[programs.web]\ncommand = ['a', 1]", "programs.web.command"),
        ("[programs.web]\ncommand = ['', 'a']", "programs.web.command"),
        ('[programs.web]\ncommand = "it\'s"', "programs.web.command: "),
        ("[programs.'a b']\ncommand = 'a'", "programs.a b"),
        ("[programs.all]\ncommand = 'a'", "programs.all"),
        ("[programs.live]\ncommand = 'a'", "programs.live"),  # as in /health/live
        ("[programs.all]\ncommand = 'a'", "programs.all"),
        ("[program.web]\ncommand = 'a'", "did you mean 'programs'?"),
        ("listen = 3000\n[programs.web]\ncommand = 'a'", "listen: "),
        ("listen = 'a:b'\n[programs.web]\ncommand = 'a'", "listen: "),
        ("listen = 'a:80'\n[programs.web]\ncommand = 'a'", "listen: "),
        ("listen = 'a:70000'\n[programs.web]\ncommand = 'a'", "listen: "),
        ("token = 'a'\ntoken_file = 'b'\n[programs.web]\ncommand = 'a'", "token"),
        ("log_format = 'xml'\n[programs.web]\ncommand = 'a'", "log_format: "),
        ("[defaults]\ncommand = 'b'\n[programs.web]\ncommand = 'a'", "defaults.comm"),
        ("[defaults]\nnice = 'b'\n[programs.web]\ncommand = 'a'", "defaults.nice: "),
    ],
)
def test_mistake_outside_of_a_key_is_located_too(text: str, where: str) -> None:
    assert any(where in error for error in mistakes(text))


def test_mistakes_in_the_defaults_are_found_without_any_program() -> None:
    errors = mistakes("[defaults]\nautostrat = true\nstopwaitsecs = -1")
    keys = sorted(error.partition(": ")[0] for error in errors)
    assert keys == ["defaults.autostrat", "defaults.stopwaitsecs"]


def test_error_says_what_was_expected_and_what_was_found() -> None:
    (error,) = mistakes("[programs.web]\ncommand = 'web'\nstopwaitsecs = -1")
    assert "expected" in error
    assert "got -1" in error


def test_cycle_of_dependencies_is_an_error_that_shows_it() -> None:
    (error,) = mistakes("""
        [programs.a]
        command = "a"
        depends_on = ["b"]
        [programs.b]
        command = "b"
        depends_on = ["c"]
        [programs.c]
        command = "c"
        depends_on = ["a"]
        """)
    assert re.search("a.*b.*c.*a", error.partition(": ")[2])


def test_defaults_of_a_program_are_the_documented_ones() -> None:
    web = program()
    assert web.argv == ("web",)
    assert web.autostart is True
    assert web.autorestart is False
    assert set(web.exitcodes) == {0}
    assert web.startsecs == 1
    assert web.startretries is None
    assert (web.backoff_delay, web.backoff_limit) == (0.5, 30)
    assert web.stopwaitsecs == 8
    assert web.stopasgroup is True
    assert web.type == "simple"
    assert web.logfile_maxbytes == 10 << 20
    assert web.logfile_backups == 3
    assert web.inherit_env is True


def test_defaults_of_the_supervisor_are_the_documented_ones() -> None:
    config = configured("[programs.web]\ncommand = 'web'")
    assert config.listen == ("localhost:3000",)
    assert config.control == "auto"
    assert config.token == config.token_file == ""
    assert config.exit_when_done is False
    assert config.shutdown_timeout is None


@pytest.mark.parametrize(
    ("keys", "argv"),
    [
        ("command = 'a b'", ("a", "b")),
        ("command = '''a 'b c' \"d e\" f\\ g'''", ("a", "b c", "d e", "f g")),
        ("command = 'a b'\nargs = []", ("a b",)),
        ("command = 'a b'\nargs = ['c d']", ("a b", "c d")),
        ("command = ['a b', 'c']", ("a b", "c")),
        ("command = 'a > b && c'", ("a", ">", "b", "&&", "c")),
    ],
)
def test_command_is_a_list_or_is_split_without_a_shell(
    keys: str, argv: tuple[str, ...]
) -> None:
    assert configured(f"[programs.web]\n{keys}").programs["web"].argv == argv


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${A}", "x"),
        ("-${A}-${A}-", "-x-x-"),
        ("${A:-d}", "x"),
        ("${UNSET:-d}", "d"),
        ("${UNSET:-}", ""),
        ("${EMPTY:-d}", "d"),
        ("${EMPTY}", ""),
        ("$${A}", "${A}"),
        ("$A", "$A"),
        ("$", "$"),
        ("a$b$", "a$b$"),
        ("$$", "$$"),
        ("${UNSET:-a b:c}", "a b:c"),
    ],
)
def test_variables_are_replaced_in_strings(written: str, expected: str) -> None:
    web = program(f"directory = '/{written}'", A="x", EMPTY="")
    assert str(web.directory) == f"/{expected}"


def test_variables_are_replaced_in_lists_and_tables() -> None:
    web = program("args = ['${A}']\nenvironment = {B = '${A}'}", A="x")
    assert web.argv == ("web", "x")
    assert dict(web.environment)["B"] == "x"


def test_replaced_value_is_not_replaced_again() -> None:
    assert program("args = ['${A}']", A="${B}", B="x").argv == ("web", "${B}")


def test_replaced_value_stays_one_word_of_a_command() -> None:
    config = configured("[programs.web]\ncommand = ['${A}']", A="a b")
    assert config.programs["web"].argv == ("a b",)


def test_unset_variable_is_an_error_that_says_how_to_escape_it() -> None:
    (error,) = mistakes("[programs.web]\ncommand = 'a ${NOPE}'")
    assert "programs.web.command" in error
    assert "NOPE" in error
    assert "$${" in error


def test_all_unset_variables_of_a_key_are_told() -> None:
    found = mistakes("[programs.web]\ncommand = 'a'\nargs = ['${A_} ${B_}', '${C_}']")
    assert [error.count("is not set") for error in found] == [1, 1, 1]


@pytest.mark.parametrize("text", ["${UNSET:-${A}}", "${A:-{a}}"])
def test_a_default_with_braces_in_it_is_an_error(text: str) -> None:
    (error,) = mistakes(f"[programs.web]\ncommand = 'a'\nargs = ['{text}']", A="x")
    assert "programs.web.args" in error


def test_program_takes_defaults_and_merges_the_environment() -> None:
    config = configured("""
        [defaults]
        startsecs = 5
        exitcodes = [0, 1]
        environment = {A = "default", B = "default"}
        [programs.web]
        command = "web"
        exitcodes = [7]
        environment = {B = "own", C = "own"}
        """)
    web = config.programs["web"]
    assert web.startsecs == 5
    assert set(web.exitcodes) == {7}
    assert dict(web.environment) == {"A": "default", "B": "own", "C": "own"}


def test_numprocs_makes_numbered_instances() -> None:
    config = configured("""
        [programs.web]
        command = "web --port 80${PROCESS_NUM}"
        numprocs = 3
        logfile = "web.${PROCESS_NUM}.log"
        [programs.db]
        command = "db"
        """)
    assert list(config.programs) == ["web:0", "web:1", "web:2", "db"]
    groups = [one.group for one in config.programs.values()]
    assert groups == ["web", "web", "web", "db"]
    assert config.programs["web:2"].argv == ("web", "--port", "802")
    assert config.programs["web:2"].logfile == "web.2.log"


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("'1000'", 1000),
        ("'1KB'", 1 << 10),
        ("'10MB'", 10 << 20),
        ("'2GB'", 2 << 30),
    ],
)
def test_sizes_are_bytes_or_powers_of_1024(written: str, size: int) -> None:
    assert program(f"logfile_maxbytes = {written}").logfile_maxbytes == size


@pytest.mark.parametrize(("written", "seconds"), [("2", 2), ("0.25", 0.25), ("0", 0)])
def test_durations_are_seconds(written: str, seconds: float) -> None:
    assert program(f"startsecs = {written}").startsecs == seconds


@pytest.mark.parametrize("written", ["TERM", "SIGTERM"])
def test_signal_name_may_lack_its_prefix(written: str) -> None:
    assert program(f"stopsignal = '{written}'") == program("stopsignal = 'TERM'")


@pytest.mark.parametrize(
    "listen",
    [
        "''",
        "':80'",
        "'127.0.0.1:80'",
        "'[::1]:80'",
        "'unix:a/b'",
        "[':80', 'unix:b']",
        "[]",
    ],
)
def test_listen_takes_every_documented_form(listen: str) -> None:
    configured(f"listen = {listen}\n[programs.web]\ncommand = 'web'")


def test_every_form_of_healthcheck_is_accepted() -> None:
    configured("""
        [programs.a]
        command = "a"
        healthcheck = {http = "http://localhost:80/health", interval = 5}
        [programs.b]
        command = "b"
        healthcheck = {tcp = "localhost:80", timeout = 1.5, retries = 1}
        [programs.c]
        command = "c"
        healthcheck = {command = "true && false", start_period = 0}
        [programs.d]
        command = "d"
        healthcheck = {command = ["true"]}
        """)


def test_included_programs_follow_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    for name in "cab":
        text = f"[programs.{name}]\ncommand = '{name}'\n"
        (tmp_path / f"conf.d/{name}.toml").write_text(text)
    path = tmp_path / "main.toml"
    path.write_text("""
        include = ["conf.d/*.toml", "nothing/*.toml"]
        [defaults]
        startsecs = 5
        [programs.z]
        command = "z"
        """)
    config = loaded(path)
    assert list(config.programs) == ["z", "a", "b", "c"]
    assert {one.startsecs for one in config.programs.values()} == {5}


def test_program_defined_in_two_files_is_an_error(tmp_path: Path) -> None:
    text = "[programs.web]\ncommand = 'web'\n"
    (tmp_path / "more.toml").write_text(text)
    path = tmp_path / "main.toml"
    path.write_text(f"include = ['more.toml']\n{text}")
    with pytest.raises(ConfigError) as caught:
        loaded(path)
    (error,) = caught.value.errors
    assert "programs.web" in error
    assert "more.toml" in error


def test_included_file_may_hold_programs_only(tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text("listen = ''\n[programs.a]\ncommand = 'a'\n")
    path = tmp_path / "main.toml"
    path.write_text("include = ['more.toml']\n")
    with pytest.raises(ConfigError) as caught:
        loaded(path)
    (error,) = caught.value.errors
    assert "more.toml: listen" in error


def test_error_in_an_included_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text("[programs.a]\ncommand = 'a'\nnice = 50\n")
    path = tmp_path / "main.toml"
    path.write_text("include = ['more.toml']\n[programs.b]\ncommand = 'b'\nnice = 50")
    with pytest.raises(ConfigError) as caught:
        loaded(path)
    own, included = caught.value.errors
    assert own.startswith(f"{path}: programs.b.nice")
    assert included.startswith(f"{path}: {tmp_path}/more.toml: programs.a.nice")


def test_include_is_relative_to_a_folder_of_whatever_name(tmp_path: Path) -> None:
    folder = tmp_path / "[app]*"
    folder.mkdir()
    (folder / "more.toml").write_text("[programs.a]\ncommand = 'a'\n")
    (folder / "main.toml").write_text("include = ['m?re.toml']\n")
    assert list(loaded(folder / "main.toml").programs) == ["a"]


def test_include_of_nothing_includes_nothing(tmp_path: Path) -> None:
    text = "include = ['${NO_SUCH_VARIABLE:-}']\n[programs.a]\ncommand = 'a'\n"
    (tmp_path / "main.toml").write_text(text)
    assert list(loaded(tmp_path / "main.toml").programs) == ["a"]


def test_check_counts_the_programs(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[programs.web]\ncommand = 'web'\nnumprocs = 2\n")
    for arguments in (
        ("check", "a.toml"),
        ("check", "-c", "a.toml"),
        ("--configfile", "a.toml", "check"),
    ):
        done = supervisors_py(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "a.toml: ok, 2 programs\n"


def test_invalid_toml_gives_file_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("\n[programs.web]\ncommand = sleep\n")
    done = supervisors_py("a.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"a\.toml: .*line 3, column 11.*\n", done.stderr)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.toml", "no such file"),
        (".", "is a directory"),
        ("latin.toml", "utf-8"),
    ],
)
def test_configuration_that_cannot_be_read_says_so(
    tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    done = supervisors_py("check", name, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert name in line
    assert reason in line.casefold()


@pytest.mark.parametrize("arguments", [("--bogus",), ("a.toml", "b.toml"), ("-c",)])
def test_bad_command_line_exits_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = supervisors_py(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_help_fits_a_screen_and_shows_an_example(tmp_path: Path) -> None:
    done = supervisors_py("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert 5 < len(done.stdout.splitlines()) <= 40
    assert "supervisors.py" in done.stdout.splitlines()[0]


def test_version_is_one_line(tmp_path: Path) -> None:
    done = supervisors_py("--version", cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(r"\d+\.\d+", done.stdout)
    assert len(done.stdout.splitlines()) == 1


def test_old_python_gets_one_line_that_names_the_version_needed(tmp_path: Path) -> None:
    installed = Path.home().glob(".pyenv/versions/3.9*/bin/python3")
    python = next(map(str, installed), None) or shutil.which("python3.9")
    if python is None:
        pytest.skip("no Python 3.9 here")
    done = subprocess.run(
        [python, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "3.11" in done.stderr


def test_import_has_no_side_effect_and_is_cheap(tmp_path: Path) -> None:
    code = """
import sys, signal, threading
before = signal.getsignal(signal.SIGTERM)
import supervisors
assert signal.getsignal(signal.SIGTERM) is before
assert threading.active_count() == 1
print([m for m in ("dataclasses", "http", "argparse") if m in sys.modules])
"""
    done = subprocess.run(
        [PYTHON, "-S", "-c", code],
        cwd=SCRIPT.parent,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


# === State machine ====================================================================
#
# Pure: a program, a clock that is only a number, a status, an event; compare values.


def follow(web: Program, *events: tuple[float, Any]) -> supervisors.Step:
    """Feed events, each with its time, to a stopped program; return the last answer."""
    status, action = Status(), None
    for now, event in events:
        status, action = step(web, now, status, event)
    return status, action


def crash(web: Program, now: float, status: Status, ran: float) -> Status:
    """Spawn what waits, let it live for `ran` seconds and fail with code 1."""
    status, _ = step(web, now, status, Spawned(100))
    if ran >= web.startsecs:
        status, _ = step(web, now + web.startsecs, status, Due())
    status, _ = step(web, now + ran, status, Exited(1, False))
    return status


STARTED = ((0.0, Start()), (0.0, Spawned(100)))
RUNNING = (*STARTED, (1.0, Due()))


def test_start_spawns() -> None:
    _, action = follow(program(), (0.0, Start()))
    assert repr(action) == "Spawn()"


def test_spawned_program_is_starting_until_startsecs() -> None:
    status, action = follow(program("startsecs = 3"), *STARTED)
    assert (status.state, status.pid, status.deadline) == (State.STARTING, 100, 3.0)
    assert action is None


def test_program_runs_after_startsecs() -> None:
    status, _ = follow(program(), *RUNNING)
    assert (status.state, status.pid, status.deadline) == (State.RUNNING, 100, None)


def test_program_with_no_startsecs_runs_at_once() -> None:
    status, _ = follow(program("startsecs = 0"), *STARTED)
    if status.state is State.STARTING:
        assert status.deadline == 0.0
        status, _ = step(program("startsecs = 0"), 0.0, status, Due())
    assert status.state is State.RUNNING


def test_oneshot_runs_at_once() -> None:
    status, _ = follow(program("type = 'oneshot'"), *STARTED)
    assert status.state is State.RUNNING


@pytest.mark.parametrize("code", [0, 1])
def test_end_without_autorestart_is_final(code: int) -> None:
    status, action = follow(program(), *RUNNING, (5.0, Exited(code, False)))
    assert (status.state, status.exit_code, status.pid) == (State.EXITED, code, None)
    assert (status.deadline, action) == (None, None)


def test_unexecutable_program_without_autorestart_is_fatal() -> None:
    failed = SpawnFailed("cannot start web: no such command: 'web'", 127)
    status, action = follow(program(), (0.0, Start()), (0.0, failed))
    assert (status.state, status.exit_code) == (State.FATAL, 127)
    assert "no such command" in status.reason
    assert action is None


def test_unexecutable_program_with_autorestart_backs_off() -> None:
    failed = SpawnFailed("no such command: 'web'", 127)
    web = program("autorestart = true")
    status, _ = follow(web, (0.0, Start()), (0.0, failed))
    assert (status.state, status.failures) == (State.BACKOFF, 1)
    assert "no such command" in status.reason
    assert status.deadline == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("autorestart", "code", "final"),
    [
        ("true", 0, False),
        ("true", 1, False),
        ("true", -signal.SIGKILL, False),
        ("'unexpected'", 0, True),
        ("'unexpected'", 7, True),
        ("'unexpected'", 1, False),
        ("'unexpected'", -signal.SIGTERM, True),
        ("'unexpected'", -signal.SIGKILL, False),
        ("false", 1, True),
    ],
)
def test_autorestart_says_which_ends_are_final(
    autorestart: str, code: int, final: bool
) -> None:
    web = program(f"autorestart = {autorestart}\nexitcodes = [0, 7, 143]")
    status, action = follow(web, *RUNNING, (5.0, Exited(code, False)))
    assert (status.state is State.EXITED) == final
    assert (repr(action) == "Spawn()") == (not final)
    assert status.exit_code == code


def test_expected_end_of_a_good_run_is_no_failure_and_restarts_at_once() -> None:
    web = program("autorestart = true")
    status = crash(web, 0.0, follow(web, (0.0, Start()))[0], 0.1)
    status = crash(web, 1.0, step(web, 1.0, status, Due())[0], 0.1)
    assert status.failures == 2
    status, _ = step(web, 3.0, status, Due())
    status, _ = step(web, 3.0, status, Spawned(101))
    status, _ = step(web, 4.0, status, Due())
    status, action = step(web, 5.0, status, Exited(0, False))
    assert status.failures == 0
    assert repr(action) == "Spawn()"
    assert status.restarts == 3


def test_expected_end_before_startsecs_is_a_failure() -> None:
    web = program("autorestart = true")
    status, action = follow(web, *STARTED, (0.9, Exited(0, False)))
    assert (status.state, status.failures, action) == (State.BACKOFF, 1, None)


def test_end_just_before_startsecs_never_counts_as_stayed_up() -> None:
    web = program("autorestart = true\nstartsecs = 10")
    status, action = follow(web, *STARTED, (9.0, Exited(1, False)))
    assert (status.state, status.failures, action) == (State.BACKOFF, 1, None)


def test_end_after_startsecs_is_judged_by_uptime_though_due_comes_late() -> None:
    web = program("autorestart = true")
    status, action = follow(web, *STARTED, (1.5, Exited(1, False)))
    assert (status.failures, repr(action)) == (1, "Spawn()")


def test_first_failure_after_a_good_run_restarts_at_once() -> None:
    web = program("autorestart = true")
    status, action = follow(web, *RUNNING, (5.0, Exited(1, False)))
    assert (status.failures, status.restarts, repr(action)) == (1, 1, "Spawn()")


def test_second_failure_after_a_good_run_waits() -> None:
    web = program("autorestart = true")
    status, _ = follow(web, *RUNNING, (5.0, Exited(1, False)))
    status = crash(web, 5.0, status, 5.0)
    assert (status.state, status.failures) == (State.BACKOFF, 2)
    assert status.deadline == pytest.approx(10.0 + 1.0, abs=0.1)


def test_run_of_backoff_limit_clears_the_failures() -> None:
    web = program("autorestart = true\nbackoff_limit = 8")
    status, _ = follow(web, *RUNNING, (5.0, Exited(1, False)))
    status = crash(web, 5.0, status, 5.0)
    status, _ = step(web, 11.5, status, Due())
    status, _ = step(web, 11.5, status, Spawned(101))
    status, _ = step(web, 12.5, status, Due())
    status, action = step(web, 20.0, status, Exited(1, False))
    assert (status.failures, repr(action)) == (1, "Spawn()")


def test_backoff_doubles_up_to_its_limit_within_a_tenth() -> None:
    web = program("autorestart = true")
    status, _ = follow(web, (0.0, Start()))
    now = 100.0
    for expected in (0.5, 1, 2, 4, 8, 16, 30, 30, 30):
        status = crash(web, now, status, 0.1)
        assert status.state is State.BACKOFF
        assert status.deadline is not None
        assert status.deadline - (now + 0.1) == pytest.approx(expected, rel=0.1)
        now = status.deadline
        status, action = step(web, now, status, Due())
        assert repr(action) == "Spawn()"


def test_backoff_of_a_thousand_failures_is_still_its_limit() -> None:
    web = program("autorestart = true")
    status, _ = follow(web, (0.0, Start()))
    for now in range(0, 100_000, 100):
        status = crash(web, float(now), status, 0.0)
        assert status.state is State.BACKOFF
        status, _ = step(web, now + 50.0, status, Due())
    status = crash(web, 100_000.0, status, 0.0)
    assert status.failures == 1001
    assert status.deadline == pytest.approx(100_030.0, abs=3.0)


def test_backoff_is_spread_so_that_a_fleet_does_not_march_in_step() -> None:
    def deadlines(name: str) -> list[float | None]:
        web = program("autorestart = true")._replace(name=name)
        status, _ = follow(web, (0.0, Start()))
        return [crash(web, 0.0, status, 0.1).deadline for _ in range(5)]

    assert len({d for name in ("a", "b", "c", "d") for d in deadlines(name)}) > 1


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_more_failures_than_startretries_are_fatal(retries: int) -> None:
    web = program(f"autorestart = true\nstartretries = {retries}")
    status, _ = follow(web, (0.0, Start()))
    for number in range(retries):
        status = crash(web, number * 100.0, status, 0.1)
        assert (status.state, status.failures) == (State.BACKOFF, number + 1)
        status, _ = step(web, number * 100.0 + 50, status, Due())
    status = crash(web, 1000.0, status, 0.1)
    assert (status.state, status.deadline) == (State.FATAL, None)
    assert status.exit_code == 1
    assert status.reason


def test_due_before_the_deadline_changes_nothing() -> None:
    web = program("autorestart = true")
    starting, _ = follow(web, *STARTED)
    assert step(web, 0.5, starting, Due()) == (starting, None)
    waiting = crash(web, 0.0, follow(web, (0.0, Start()))[0], 0.1)
    assert step(web, 0.2, waiting, Due()) == (waiting, None)


def test_stop_sends_the_stop_signal_and_waits_stopwaitsecs() -> None:
    web = program("stopsignal = 'QUIT'\nstopwaitsecs = 4")
    status, action = follow(web, *RUNNING, (5.0, Stop()))
    assert (status.state, status.deadline) == (State.STOPPING, 9.0)
    assert repr(action) == "Signal(name='QUIT')"


def test_stop_that_overruns_is_killed_and_then_awaited() -> None:
    web = program("stopwaitsecs = 4")
    status, action = follow(web, *RUNNING, (5.0, Stop()), (9.0, Due()))
    assert (status.state, repr(action)) == (State.STOPPING, "Signal(name='KILL')")
    status, _ = step(web, 9.1, status, Exited(-signal.SIGKILL, False))
    assert status.state is State.STOPPED


def test_requested_stop_is_never_a_failure() -> None:
    web = program("autorestart = true")
    events = (*RUNNING, (5.0, Stop()), (5.1, Exited(-signal.SIGTERM, False)))
    status, action = follow(web, *events)
    assert (status.state, status.failures, action) == (State.STOPPED, 0, None)
    assert (status.exit_code, status.pid) == (-signal.SIGTERM, None)


def test_leader_that_leaves_its_group_behind_is_stopping_until_it_is_empty() -> None:
    web = program("autorestart = true\nstopwaitsecs = 4")
    status, action = follow(web, *RUNNING, (5.0, Exited(1, True)))
    assert (status.state, status.deadline) == (State.STOPPING, 9.0)
    assert repr(action) == "Signal(name='TERM')"
    status, action = step(web, 9.0, status, Due())
    assert repr(action) == "Signal(name='KILL')"
    status, action = step(web, 9.5, status, Emptied())
    assert repr(action) == "Spawn()"
    assert (status.exit_code, status.failures, status.restarts) == (1, 1, 1)


def test_group_that_outlives_its_leader_does_not_lengthen_the_run() -> None:
    web = program("autorestart = true\nstopwaitsecs = 40")
    events = (*STARTED, (0.5, Exited(1, True)), (30.0, Emptied()))
    status, _ = follow(web, *events)
    assert (status.state, status.failures) == (State.BACKOFF, 1)


def test_group_is_killed_at_once_where_only_the_leader_is_signalled() -> None:
    web = program("stopasgroup = false")
    status, action = follow(web, *RUNNING, (5.0, Exited(0, True)))
    assert (status.state, repr(action)) == (State.STOPPING, "Signal(name='KILL')")


def test_stop_of_a_program_whose_leader_is_gone_ends_stopped() -> None:
    web = program("autorestart = true")
    events = (*RUNNING, (5.0, Exited(1, True)), (5.1, Stop()), (6.0, Emptied()))
    status, action = follow(web, *events)
    assert (status.state, action) == (State.STOPPED, None)


def test_stop_in_backoff_is_honoured_at_once() -> None:
    web = program("autorestart = true")
    waiting = crash(web, 0.0, follow(web, (0.0, Start()))[0], 0.1)
    status, action = step(web, 0.2, waiting, Stop())
    assert (status.state, status.deadline, action) == (State.STOPPED, None, None)


def test_start_in_backoff_spawns_at_once_and_clears_the_failures() -> None:
    web = program("autorestart = true")
    waiting = crash(web, 0.0, follow(web, (0.0, Start()))[0], 0.1)
    status, action = step(web, 0.2, waiting, Start())
    assert (status.failures, status.restarts, repr(action)) == (0, 0, "Spawn()")


@pytest.mark.parametrize("code", [0, 1])
def test_start_of_an_exited_program_spawns_and_is_no_restart(code: int) -> None:
    events = (*RUNNING, (5.0, Exited(code, False)), (6.0, Start()))
    status, action = follow(program(), *events)
    assert (status.restarts, repr(action)) == (0, "Spawn()")


def test_start_of_what_runs_does_nothing() -> None:
    running, _ = follow(program(), *RUNNING)
    assert step(program(), 5.0, running, Start()) == (running, None)


@pytest.mark.parametrize("code", [0, 1])
def test_stop_turns_an_exited_program_into_a_stopped_one(code: int) -> None:
    events = (*RUNNING, (5.0, Exited(code, False)), (6.0, Stop()))
    status, action = follow(program(), *events)
    assert (status.state, action) == (State.STOPPED, None)


def test_start_while_stopping_wins_when_it_is_the_last_word() -> None:
    web = program()
    events = (*RUNNING, (5.0, Stop()), (5.1, Start()))
    status, action = follow(web, *events)
    assert (status.state, action) == (State.STOPPING, None)
    _, action = step(web, 5.2, status, Exited(-signal.SIGTERM, False))
    assert repr(action) == "Spawn()"


def test_stop_while_restarting_wins_when_it_is_the_last_word() -> None:
    web = program("autorestart = true")
    events = (*RUNNING, (5.0, Restart()), (5.1, Start()), (5.2, Stop()))
    status, action = follow(web, *events)
    status, action = step(web, 5.3, status, Exited(-signal.SIGTERM, False))
    assert (status.state, action) == (State.STOPPED, None)


def test_restart_stops_and_spawns_again_without_counting() -> None:
    web = program()
    status, action = follow(web, *RUNNING, (5.0, Restart()))
    assert status.state is State.STOPPING
    assert repr(action) == "Signal(name='TERM')"
    status, action = step(web, 5.1, status, Exited(-signal.SIGTERM, False))
    assert (status.restarts, status.failures, repr(action)) == (0, 0, "Spawn()")


def test_restart_of_a_stopped_program_starts_it() -> None:
    _, action = follow(program(), (0.0, Restart()))
    assert repr(action) == "Spawn()"


def documented_transitions() -> dict[tuple[str, str], list[str]]:
    """Return the table of `step`'s docstring: by event and state, what may follow."""
    _, _, table = (step.__doc__ or "").partition("\n\n        ")
    rows = [line.split() for line in table.strip().splitlines()[-12:]]
    states, *events = rows
    return {
        (event, state): cell.split("|")
        for event, *cells in events
        for state, cell in zip(states, cells, strict=True)
    }


TRANSITIONS = documented_transitions()
BEGIN = {State.STARTING}
END = BEGIN | {State.STOPPED, State.BACKOFF, State.EXITED, State.FATAL}

EVENTS: dict[str, list[supervisors.Event]] = {
    "Start": [Start()],
    "Stop": [Stop()],
    "Restart": [Restart()],
    "Due": [Due()],
    "Spawned": [Spawned(100)],
    "SpawnFailed": [SpawnFailed("no such command: 'web'", 127)],
    "Exited": [
        Exited(code, survivors)
        for code in (0, 1, -signal.SIGKILL)
        for survivors in (False, True)
    ],
    "Emptied": [Emptied()],
    "Blocked": [Blocked("waiting for db", ""), Blocked("waiting for db", "failed")],
    "Told": [Told("READY=1"), Told("WATCHDOG=1"), Told("STATUS=hello"), Told("")],
    "Checked": [Checked(""), Checked("refused")],
}


@functools.cache
def all_kinds() -> list[Program]:
    """Return programs that differ in all that the state machine looks at."""
    return [
        program(),
        program("startsecs = 0"),
        program("type = 'oneshot'"),
        program("type = 'notify'\nwatchdog_secs = 5"),
        program("autorestart = true"),
        program("autorestart = 'unexpected'"),
        program("autorestart = true\nstartretries = 0"),
        program("autorestart = true\nstopasgroup = false"),
        program("autorestart = true\nhealthcheck = {tcp = 'a:1', retries = 1}"),
    ]


def situations(state: State) -> Iterator[tuple[Program, Status]]:
    """Yield programs in a state, at its different moments."""
    for web in all_kinds():
        idle = state is State.RUNNING and web.watchdog_secs is None
        for deadline in (None,) if idle else (None, 50.0, 150.0):
            for after in supervisors.After:
                yield web, Status(state, deadline=deadline, after=after)


def test_table_of_transitions_names_all_states_and_events() -> None:
    assert set(TRANSITIONS) == {
        (event.__name__, state.name)
        for event in supervisors.Event.__args__
        for state in State
    }


@pytest.mark.parametrize(("event", "name"), TRANSITIONS)
def test_step_does_what_its_table_says(event: str, name: str) -> None:
    state, cell = State[name], TRANSITIONS[event, name]
    may = {"=": {state}, "begin": BEGIN, "end": END}
    sets = [may.get(word) or {State[word]} for word in cell if word != "!"]
    reached = set()
    for (web, status), one in itertools.product(situations(state), EVENTS[event]):
        if cell == ["!"]:
            with pytest.raises(AssertionError):
                step(web, 100.0, status, one)
            continue
        after, action = step(web, 100.0, status, one)
        reached.add(after.state)
        assert any(after.state in allowed for allowed in sets)
        if after.state is not state:
            asked = "Spawn()" if after.state is State.STARTING else "None"
            assert repr(action) == asked or after.state is State.STOPPING
    assert all(reached & allowed for allowed in sets)


@pytest.mark.parametrize("year", [-31_536_000.0, 31_536_000.0])
def test_state_machine_depends_on_differences_of_its_clock_only(year: float) -> None:
    """`now` is monotonic time from wherever it starts: the wall clock plays no part."""
    web = program("autorestart = true")
    events = (*RUNNING, (5.0, Exited(1, False)), (5.0, Spawned(101)))
    here, _ = follow(web, *events)
    there, _ = follow(web, *((now + year, event) for now, event in events))
    assert there.deadline == pytest.approx((here.deadline or 0) + year)
    assert there._replace(deadline=None, started=0.0) == here._replace(
        deadline=None, started=0.0
    )


# === Programs =========================================================================


def exists(path: Path) -> bool:
    return eventually(path.exists)


def pid_in(path: Path) -> int:
    """Wait until a program has written a process number and a newline to a file."""
    exists(path)
    return int(eventually(path.read_text, lambda text: text.endswith("\n")))


SLEEPER = """
[programs.web]
command = "sleep 1000"
autorestart = true
startsecs = 0
"""

LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
up = struct.pack("16sh", b"lo", 1)
fcntl.ioctl(socket.socket(), 0x8914, up)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_configuration_of_the_original_runs_unchanged(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "echo.toml").write_text("""
[programs.echo]
command = "echo"
args = ["I run forever in a loop"]
autorestart = true
""")
    # Port 3000 may be taken here, so it is looked at in a network of its own.
    net = (*unshare("--net"), PYTHON, "-c", LOOPBACK_UP)
    run = supervise("", ready=False, prefix=net, arguments=("-c", "echo.toml"))
    line = b"echo | I run forever in a loop\n"
    eventually(lambda: run.out, lambda out: line in out)
    mapped = ("-U", "--preserve-credentials") if os.getuid() else ()
    there = ("nsenter", f"-t{run.pid}", *mapped, "-n")
    code = "import urllib.request as u; print(u.urlopen(%r).read().decode())"
    ask = (PYTHON, "-c", code % "http://localhost:3000/status")
    done = subprocess.run([*there, *ask], capture_output=True)
    (status,) = json.loads(done.stdout)
    assert status["name"] == "echo"
    assert isinstance(status["running"], bool)
    assert run.end() == 0


def test_killed_program_is_restarted_at_once(supervise: Supervise) -> None:
    run = supervise(SLEEPER)
    first = run.wait_state("web", "RUNNING")
    os.kill(first["pid"], signal.SIGKILL)
    status = eventually(lambda: run.status("web"), lambda s: s["restarts"] == 1)
    assert status["pid"] != first["pid"]
    assert status["exit_signal"] == "SIGKILL"
    assert status["exit_code"] is None
    assert status["failures"] == 1
    run.wait_state("web", "RUNNING")
    assert "BACKOFF" not in run.err


def test_program_that_fails_at_once_backs_off_and_becomes_fatal(
    supervise: Supervise,
) -> None:
    run = supervise("""
        [programs.web]
        command = ["sh", "-c", "exit 3"]
        autorestart = true
        startretries = 2
        backoff_delay = 0.01
        """)
    status = run.wait_state("web", "FATAL")
    assert (status["restarts"], status["failures"]) == (2, 3)
    assert (status["exit_code"], status["exit_signal"]) == (3, None)
    assert (status["pid"], status["running"]) == (None, False)
    assert status["reason"]
    assert run.err.count("web: BACKOFF, exit code 3, restart in ") == 2
    assert run.err.count("web: FATAL") == 1


def test_waiting_program_says_when_it_restarts(supervise: Supervise) -> None:
    run = supervise("""
        [programs.web]
        command = "false"
        autorestart = true
        backoff_delay = 1000
        backoff_limit = 1000
        """)
    status = run.wait_state("web", "BACKOFF")
    assert 0 < status["restart_in"] <= 1100
    assert run.end() == 0


CANNOT_START = {
    "missing": ("no such command: 'no-such'", 127, 'command = "no-such"'),
    "absent": ("no such command: './no-such'", 127, 'command = "./no-such"'),
    "plain": ("'./plain': Permission denied", 126, 'command = "./plain"'),
    "folder": ("'/': Permission denied", 126, 'command = "/"'),
    "script": ("'./script': Exec format error", 126, 'command = "./script"'),
    "place": ("no such directory: '/no'", 126, 'command="true"\ndirectory="/no"'),
    "env": ("'absent.env'", 126, 'command = "true"\nenv_file = "absent.env"'),
    "log": ("'/proc/no/log'", 126, 'command = "true"\nlogfile = "/proc/no/log"'),
    "user": ("no such user: 'nix'", 126, 'command = "true"\nuser = "nix"'),
    "group": ("no such group: 'nix'", 126, 'command = "true"\ngroup = "nix"'),
}


def test_program_that_cannot_start_says_why_and_disturbs_nobody(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "plain").write_text("no program\n")
    (tmp_path / "script").write_text("echo it has no interpreter line\n")
    (tmp_path / "script").chmod(0o755)
    tables = [f"[programs.{name}]\n{CANNOT_START[name][2]}\n" for name in CANNOT_START]
    run = supervise("".join(tables) + SLEEPER)
    for name, (reason, code, _) in CANNOT_START.items():
        status = run.wait_state(name, "FATAL")
        assert f"cannot start {name}: " in status["reason"]
        assert reason in status["reason"]
        assert status["exit_code"] == code
        run.wait_err(f" {name}: FATAL, {status['reason']}\n")
    run.wait_state("web", "RUNNING")


def test_limit_that_no_kernel_knows_is_a_reason_and_no_traceback(
    supervise: Supervise,
) -> None:
    run = supervise("""
        [programs.web]
        command = "true"
        rlimits = {nofile = 9223372036854775807}
        """)
    eventually(lambda: run.state("web"), lambda state: state in ("FATAL", "EXITED"))
    assert run.status("web")["reason"].startswith("cannot start web: ")
    assert run.state("web") == "FATAL"
    run.end()
    assert "Traceback" not in run.err + run.out.decode()


def test_each_change_of_state_is_one_message(supervise: Supervise) -> None:
    run = supervise("""
        [programs.web]
        command = ["sh", "-c", "sleep 0.1; exit 3"]
        startsecs = 0.05
        """)
    run.wait_state("web", "EXITED")
    lines = run.wait_err("EXITED").splitlines()
    web = [line.partition(" ")[2] for line in lines if " web: " in line]
    pid = web[0].rpartition(" ")[2]
    assert web == [
        f"web: STARTING, pid {pid}",
        f"web: RUNNING, pid {pid}",
        "web: EXITED, exit code 3",
    ]
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "
    assert all(re.match(stamp, line) for line in lines)


def test_program_that_is_not_to_start_stays_stopped(supervise: Supervise) -> None:
    run = supervise(f"{SLEEPER}\n[programs.idle]\ncommand='true'\nautostart=false")
    run.wait_state("web", "RUNNING")
    assert run.state("idle") == "STOPPED"
    assert run.status("idle")["started_at"] is None


def test_pidfile_is_written_and_removed(tmp_path: Path, supervise: Supervise) -> None:
    run = supervise(f'pidfile = "me.pid"\n{SLEEPER}')
    assert (tmp_path / "me.pid").read_text() == f"{run.pid}\n"
    run.end()
    assert not (tmp_path / "me.pid").exists()


def test_quiet_supervisor_reports_failures_only(supervise: Supervise) -> None:
    run = supervise(f"{SLEEPER}[programs.bad]\ncommand='nope'", arguments=("-q",))
    run.wait_state("web", "RUNNING")
    run.wait_err("bad: FATAL")
    run.end()
    assert "web: RUNNING" not in run.err


# === Stopping =========================================================================

STUBBORN = """
[programs.web]
command = ["sh", "-c", "trap '' TERM; touch up; exec sleep 1000"]
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_everything_with_exit_status_0(
    supervise: Supervise, number: int
) -> None:
    run = supervise(SLEEPER)
    run.wait_state("web", "RUNNING")
    assert run.end(number) == 0
    assert "web: STOPPED" in run.err
    assert run.left() == []


def test_stop_kills_a_program_that_ignores_term(
    tmp_path: Path, supervise: Supervise
) -> None:
    run = supervise(f"{STUBBORN}\nstopwaitsecs = 0.2")
    exists(tmp_path / "up")
    assert run.end() == 0
    assert run.left() == []


def test_stop_ends_the_whole_group(tmp_path: Path, supervise: Supervise) -> None:
    command = sh("sleep 1000 & sleep 1000 & touch up; wait")
    run = supervise(f"[programs.web]\ncommand = {command}")
    exists(tmp_path / "up")
    assert run.end() == 0
    assert run.left() == []


ASKED = """
import os, signal, time
number = os.environ["PROCESS_NUM"]
asked = []
if os.fork():
    signal.pause()
signal.signal(signal.SIGTERM, lambda *_: asked.append(time.monotonic()))
open("up" + number, "w").close()
while not asked or time.monotonic() < asked[0] + 0.3:
    time.sleep(0.01)
open("asked" + number, "w").write(str(len(asked)))
"""


def test_stop_signals_each_process_once(tmp_path: Path, supervise: Supervise) -> None:
    """A second SIGTERM means "now" to many programs, one that lost its leader too."""
    run = supervise(f"[programs.web]\ncommand = {python(ASKED)}\nnumprocs = 5")
    for number in range(5):
        exists(tmp_path / f"up{number}")
    assert run.end() == 0
    asked = [(tmp_path / f"asked{number}").read_text() for number in range(5)]
    assert asked == ["1"] * 5


def test_stop_kills_a_grandchild_that_ignores_term(
    tmp_path: Path, supervise: Supervise
) -> None:
    child = "trap '' TERM; touch up; exec sleep 1000"
    command = sh(f'sh -c "{child}" & wait')
    run = supervise(f"[programs.web]\ncommand = {command}\nstopwaitsecs = 0.2")
    exists(tmp_path / "up")
    assert run.end() == 0
    assert run.left() == []


def test_successor_waits_until_the_group_of_a_dead_leader_is_gone(
    tmp_path: Path, supervise: Supervise
) -> None:
    child = "trap '' TERM; echo \\$\\$ > new; mv new child; exec sleep 1000"
    overlap = "test -f child && kill -0 $(cat child) && touch overlap"
    command = sh(f'{overlap}; sh -c "{child}" & wait')
    run = supervise(f"""
        [programs.web]
        command = {command}
        autorestart = true
        startsecs = 0
        stopwaitsecs = 0.2
        """)
    first = pid_in(tmp_path / "child")
    os.kill(run.status("web")["pid"], signal.SIGKILL)
    run.wait_err("web: STOPPING")
    eventually(lambda: run.status("web"), lambda status: status["restarts"] == 1)
    eventually(lambda: pid_in(tmp_path / "child"), lambda pid: pid != first)
    assert not is_alive(first)
    assert not (tmp_path / "overlap").exists()
    assert run.status("web")["exit_signal"] == "SIGKILL"


def test_stop_of_the_leader_alone_kills_the_rest_of_its_group(
    tmp_path: Path, supervise: Supervise
) -> None:
    child = "trap 'touch signalled' TERM; touch up; while :; do sleep 0.01; done"
    command = sh(f'sh -c "{child}" & wait')
    run = supervise(f"[programs.web]\ncommand = {command}\nstopasgroup = false")
    exists(tmp_path / "up")
    assert run.end() == 0
    assert run.left() == []
    assert not (tmp_path / "signalled").exists()


def test_hundred_programs_stop_in_parallel(supervise: Supervise) -> None:
    """One after the other they would need 100 s."""
    run = supervise("""
        [programs.web]
        command = ["sh", "-c", "trap '' TERM; exec sleep 1000"]
        numprocs = 100
        startsecs = 0
        stopwaitsecs = 1
        """)
    eventually(lambda: {s["state"] for s in run.status_all()}, {"RUNNING"})
    assert run.end() == 0
    assert run.left() == []


def test_term_in_backoff_works_at_once(supervise: Supervise) -> None:
    run = supervise("""
        [programs.web]
        command = "false"
        autorestart = true
        backoff_delay = 1000
        backoff_limit = 1000
        """)
    run.wait_state("web", "BACKOFF")
    assert run.end() == 0


def test_term_while_starting_works_at_once(supervise: Supervise) -> None:
    run = supervise("[programs.web]\ncommand = 'sleep 1000'\nstartsecs = 1000")
    run.wait_state("web", "STARTING")
    assert run.end() == 0
    assert "web: STOPPED" in run.err


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_kills_everything_now(
    tmp_path: Path, supervise: Supervise, second: int
) -> None:
    run = supervise(f"{STUBBORN}\nstopwaitsecs = 1000")
    exists(tmp_path / "up")
    run.send(signal.SIGTERM)
    run.wait_err("web: STOPPING")
    assert run.end(second) == 0
    assert run.left() == []


def test_supervisor_says_on_whom_it_waits(tmp_path: Path, supervise: Supervise) -> None:
    run = supervise(f"{STUBBORN}\nstopwaitsecs = 1000\n[programs.db]\ncommand='true'")
    exists(tmp_path / "up")
    run.send(signal.SIGTERM)
    run.wait_err("supervisors: still waiting for web\n")
    assert run.end() == 0


def test_shutdown_timeout_kills_what_is_still_alive(
    tmp_path: Path, supervise: Supervise
) -> None:
    run = supervise(f"shutdown_timeout = 0.2\n{STUBBORN}\nstopwaitsecs = 1000")
    exists(tmp_path / "up")
    assert run.end() == 0
    assert run.left() == []


def test_stopsignal_is_what_the_program_gets(
    tmp_path: Path, supervise: Supervise
) -> None:
    command = sh("trap 'echo usr1 > got; exit' USR1; touch up; while :; do :; done")
    run = supervise(f"[programs.web]\ncommand = {command}\nstopsignal = 'USR1'")
    exists(tmp_path / "up")
    assert run.end() == 0
    assert (tmp_path / "got").read_text() == "usr1\n"


def test_signal_during_start_up_is_not_lost(tmp_path: Path) -> None:
    """Whenever SIGTERM comes, the supervisor ends and leaves nothing behind."""
    (tmp_path / "supervisors.toml").write_text(f"listen = ''\ncontrol = 's'\n{SLEEPER}")
    for _ in range(3):
        with subprocess.Popen(
            [PYTHON, str(SCRIPT)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        ) as popen:
            assert popen.stderr is not None
            popen.stderr.readline()
            popen.terminate()
            rest = popen.stderr.read()
        assert popen.returncode == 0
        assert "Traceback" not in rest


# === PID 1 ============================================================================

PID1 = ("--pid", "--fork", "--mount-proc", "--kill-child")


def test_pid_1_reaps_200_orphans_that_end_at_the_same_moment(
    tmp_path: Path, supervise: Supervise
) -> None:
    code = """
import os, time
go, release = os.pipe()
ready, tell = os.pipe()
for _ in range(200):
    if os.fork() == 0:
        if os.fork() == 0:
            os.close(release)
            while os.getppid() != 1:
                time.sleep(0.001)
            os.write(tell, b".")
            os.read(go, 1)
        os._exit(0)
    os.wait()
for _ in range(200):
    os.read(ready, 1)
open("orphans", "w").close()
while not os.path.exists("go"):
    time.sleep(0.001)
os.close(release)
time.sleep(1000)
"""
    keys = (
        f"[programs.web]\ncommand = {python(code)}\nautorestart = true\nstartsecs = 0"
    )
    run = supervise(keys, prefix=unshare(*PID1))
    exists(tmp_path / "orphans")
    (leader, *orphans) = sorted(children(run.pid))
    assert len(orphans) == 200
    (tmp_path / "go").touch()
    eventually(lambda: children(run.pid), [leader])
    assert run.status("web")["restarts"] == 0
    assert run.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_pid_1_stops_in_order(supervise: Supervise, number: int) -> None:
    run = supervise(SLEEPER, prefix=unshare(*PID1))
    run.wait_state("web", "RUNNING")
    assert run.end(number) == 0
    assert "web: STOPPED" in run.err


def test_pid_1_kills_everything_at_a_second_signal(
    tmp_path: Path, supervise: Supervise
) -> None:
    run = supervise(f"{STUBBORN}\nstopwaitsecs = 1000", prefix=unshare(*PID1))
    exists(tmp_path / "up")
    run.send(signal.SIGTERM)
    run.wait_err("web: STOPPING")
    assert run.end() == 0


def test_pid_1_runs_its_programs_though_an_address_is_taken(
    supervise: Supervise,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        run = supervise(SLEEPER, listen=f'"{address}"', prefix=unshare(*PID1))
        run.wait_state("web", "RUNNING")
        assert address in run.err


# === What a program sees ==============================================================


def printed(tmp_path: Path, supervise: Supervise, text: str, keys: str) -> list[str]:
    """Return the lines that a shell script prints when run with these keys."""
    config = f"[programs.web]\ncommand = {sh(text)}\nlogfile = 'log'\n{keys}"
    run = supervise(config)
    run.wait_err("web: EXITED")
    last = eventually((tmp_path / "log").read_text, lambda log: log.endswith("end\n"))
    return last.splitlines()[:-1]


def as_root() -> None:
    if os.getuid() != 0:
        pytest.skip("needs root")


def test_program_runs_as_its_user(tmp_path: Path, supervise: Supervise) -> None:
    as_root()
    nobody = pwd.getpwnam("nobody")
    text = "id -u; id -g; id -G; echo $HOME:$USER:$LOGNAME:$SHELL; echo end"
    lines = printed(tmp_path, supervise, text, "user = 'nobody'\ndirectory = '/'")
    groups = os.getgrouplist("nobody", nobody.pw_gid)
    assert lines[:2] == [str(nobody.pw_uid), str(nobody.pw_gid)]
    assert sorted(map(int, lines[2].split())) == sorted(set(groups))
    assert lines[3] == f"{nobody.pw_dir}:nobody:nobody:{nobody.pw_shell}"


def test_user_and_group_may_be_numbers(tmp_path: Path, supervise: Supervise) -> None:
    as_root()
    keys = "user = 12345\ngroup = 54321\ndirectory = '/'"
    lines = printed(tmp_path, supervise, "id -u; id -g; echo end", keys)
    assert lines == ["12345", "54321"]


def test_user_may_open_its_standard_output_by_name(
    tmp_path: Path, supervise: Supervise
) -> None:
    as_root()
    text = "echo one >/dev/stdout; echo two >/dev/stderr; echo end"
    keys = "user = 'nobody'\ndirectory = '/'"
    assert printed(tmp_path, supervise, text, keys) == ["one", "two"]


def test_user_that_the_supervisor_is_needs_no_right(
    tmp_path: Path, supervise: Supervise
) -> None:
    name = pwd.getpwuid(os.getuid()).pw_name
    (line,) = printed(tmp_path, supervise, "id -un; echo end", f"user = '{name}'")
    assert line == name


def test_program_does_not_start_without_the_right_to_switch(
    supervise: Supervise,
) -> None:
    # Root of a user namespace that maps nobody else can't switch either.
    prefix = unshare("--user", "--map-root-user") if os.getuid() == 0 else ()
    user = "root" if os.getuid() else "nobody"
    keys = f"[programs.bad]\ncommand = 'touch started'\nuser = '{user}'"
    run = supervise(f"{keys}\n{SLEEPER}", prefix=prefix)
    assert user in run.wait_state("bad", "FATAL")["reason"]
    run.wait_state("web", "RUNNING")
    assert not (run.folder / "started").exists()


def test_program_gets_umask_directory_nice_and_limits(
    tmp_path: Path, supervise: Supervise
) -> None:
    text = "umask; pwd; nice; ulimit -n; ulimit -Hn; ulimit -c; ulimit -v; echo end"
    keys = """
        umask = "027"
        directory = "/usr"
        nice = 5
        rlimits = {nofile = 512, core = 0, as = "512MB"}
        """
    lines = printed(tmp_path, supervise, text, keys)
    assert lines == ["0027", "/usr", "5", "512", "512", "0", str(512 << 10)]


def test_user_and_limits_go_together(tmp_path: Path, supervise: Supervise) -> None:
    as_root()
    keys = "user = 'nobody'\ndirectory = '/'\nnice = 5\nrlimits = {core = 0}"
    text = "id -un; nice; ulimit -Hc; echo end"
    assert printed(tmp_path, supervise, text, keys) == ["nobody", "5", "0"]


def test_unlimited_is_a_limit(tmp_path: Path, supervise: Supervise) -> None:
    keys = "rlimits = {cpu = 'unlimited'}"
    assert printed(tmp_path, supervise, "ulimit -t; echo end", keys) == ["unlimited"]


def variables(lines: Iterable[str]) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_limits_do_not_change_the_caller_s_locale(
    tmp_path: Path, supervise: Supervise
) -> None:
    run = supervise(
        f"""
        [programs.web]
        command = {sh("printenv LC_CTYPE > locale")}
        nice = 1
        """,
        prefix=("env", "-u", "LC_ALL", "-u", "LANG", "LC_CTYPE=POSIX"),
    )
    run.wait_state("web", "EXITED")
    assert (tmp_path / "locale").read_text() == "POSIX\n"


def test_environment_is_inherited_and_added_to(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "a.env").write_text(
        "# comment\n\nexport A=file\nB = file\n"
        "SINGLE='x $A ${A}'\nDOUBLE=\"x # y\"\nTAIL=x # comment\n"
        'APOSTROPHE=\'Let\\\'s go!\'\nPATTERN="\\d+\\.js"\nESCAPED="a\\tb \\$A"\n'
    )
    keys = "env_file = 'a.env'\nenvironment = {B = 'own'}\nnumprocs = 1"
    env = variables(printed(tmp_path, supervise, "env; echo end", keys))
    assert env["PATH"] == os.environ["PATH"]
    assert (env["A"], env["B"]) == ("file", "own")
    assert (env["SINGLE"], env["DOUBLE"]) == ("x $A ${A}", "x # y")
    assert env["TAIL"] == "x"
    assert (env["APOSTROPHE"], env["PATTERN"]) == ("Let's go!", "\\d+\\.js")
    assert env["ESCAPED"] == "a\tb $A"
    assert env["SUPERVISOR_ENABLED"] == "1"
    assert env["SUPERVISOR_PROCESS_NAME"] == env["SUPERVISOR_GROUP_NAME"] == "web"
    assert env["SUPERVISOR_SERVER_URL"] == f"unix://{tmp_path.resolve()}/s"


def test_program_may_inherit_nothing(tmp_path: Path, supervise: Supervise) -> None:
    env = variables(
        printed(tmp_path, supervise, "env; echo end", "inherit_env = false")
    )
    assert "TEST_MARK" not in env
    assert "/bin" in env["PATH"]
    assert env["SUPERVISOR_ENABLED"] == "1"


def test_program_may_inherit_some_variables(
    tmp_path: Path, supervise: Supervise
) -> None:
    keys = "inherit_env = ['TEST_MARK', 'UNSET']"
    env = variables(printed(tmp_path, supervise, "env; echo end", keys))
    assert "TEST_MARK" in env
    assert "UNSET" not in env
    assert ("HOME" in env) == ("HOME" not in os.environ)


def test_instances_know_their_number(tmp_path: Path, supervise: Supervise) -> None:
    run = supervise(f"""
        [programs.web]
        command = {sh("echo $0 $PROCESS_NUM $SUPERVISOR_PROCESS_NAME > $PROCESS_NUM")}
        environment = {{X = "${{PROCESS_NUM}}"}}
        numprocs = 2
        """)
    run.wait_state("web:1", "EXITED")
    assert (tmp_path / "1").read_text() == "sh 1 web:1\n"


def test_command_is_looked_up_on_the_path_of_the_program(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mine").write_text("#!/bin/sh\ntouch mine-ran\n")
    (tmp_path / "bin/mine").chmod(0o755)
    run = supervise(f"""
        [programs.web]
        command = "mine"
        environment = {{PATH = "{tmp_path}/bin:/usr/bin:/bin"}}
        """)
    run.wait_state("web", "EXITED")
    assert (tmp_path / "mine-ran").exists()


def test_relative_command_is_resolved_against_the_directory(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mine").write_text("#!/bin/sh\ntouch mine-ran\n")
    (tmp_path / "bin/mine").chmod(0o755)
    run = supervise('[programs.web]\ncommand = "./mine"\ndirectory = "bin"')
    run.wait_state("web", "EXITED")
    assert (tmp_path / "bin/mine-ran").exists()


def test_program_inherits_nothing_of_the_supervisor_but_its_streams(
    tmp_path: Path, supervise: Supervise
) -> None:
    text = "grep -E 'Sig(Blk|Ign)' /proc/self/status; readlink /proc/$$/fd/0"
    lines = printed(tmp_path, supervise, f"{text}; ls /proc/$$/fd; echo end", "")
    masks = [line.split()[1] for line in lines[:2]]
    assert {int(mask, 16) & ~(0b11 << 31) for mask in masks} == {0}
    assert lines[2:] == ["/dev/null", "0", "1", "2"]


# === Output ===========================================================================

EMIT = """
import itertools, os, sys
data = open(sys.argv[1], "rb").read()
start = 0
for size in itertools.cycle((3, 1, 50, 70_000, 1_000_000)):
    os.write(1, data[start : start + size])
    start += size
    if start >= len(data):
        break
"""


def odd_bytes(letter: bytes) -> bytes:
    """Return NUL, broken UTF-8, 10 MB without a newline, and no newline at the end."""
    words = [letter, b"\0" + letter, b"\xff\xfe" + letter + b"\xc3", b"", b"\r"]
    short = b"\n".join(words * 200) + b"\n"
    return short + letter * (10 << 20) + b"\n" + short + letter + b" no newline"


def rotated(path: Path) -> list[Path]:
    """Return a log file after its backups, the oldest first."""
    backups = path.parent.glob(f"{path.name}.*")
    return [*sorted(backups, key=lambda p: -int(p.suffix[1:])), path]


def joined(paths: Iterable[Path]) -> bytes:
    return b"".join(path.read_bytes() for path in paths)


@pytest.mark.parametrize("maxbytes", ["'1GB'", "0"])
def test_files_hold_exactly_the_bytes(
    tmp_path: Path, supervise: Supervise, maxbytes: str
) -> None:
    data = {name: odd_bytes(name.encode()) for name in "ab"}
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    config = "".join(
        f"[programs.{name}]\ncommand = {python(EMIT, name)}\nlogfile = '{name}.log'\n"
        for name in data
    )
    run = supervise(f"[defaults]\nlogfile_maxbytes = {maxbytes}\n{config}")
    for name in data:
        run.wait_state(name, "EXITED")
    assert run.end() == 0
    for name, content in data.items():
        assert (tmp_path / f"{name}.log").read_bytes() == content


def test_terminal_shows_whole_lines_of_one_program_each(
    tmp_path: Path, supervise: Supervise
) -> None:
    data = {name: odd_bytes(name.encode()) for name in ("a", "b")}
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    run = supervise(f"""
        [programs.a]
        command = {python(EMIT, "a")}
        [programs.b]
        command = {python(EMIT, "b")}
        """)
    for name in data:
        run.wait_state(name, "EXITED")
    assert run.end() == 0
    lines = run.out.split(b"\n")
    assert lines.pop() == b""
    for name, content in data.items():
        mine = [line[4:] for line in lines if line.startswith(name.encode() + b" | ")]
        assert max(map(len, mine)) <= 64 << 10
        # The line of 10 MB is in pieces; put together again it is whole.
        assert b"".join(mine) == content.replace(b"\n", b"")
        short = content[: content.index(name.encode() * 9)]
        assert mine[: short.count(b"\n")] == short.split(b"\n")[:-1]
    assert len(lines) == sum(line[1:4] == b" | " for line in lines)


FLOOD = """
import os, sys
lines = (b"%07d %s\\n" % (i, b"x" * (i * 7919 % 150)) for i in range(40_000))
data = b"".join(lines)
open("flood", "wb").write(data)
for start in range(0, len(data), 1_000_003):
    os.write(1, data[start : start + 1_000_003])
"""


def test_rotation_under_a_flood_loses_no_byte_and_splits_no_line(
    tmp_path: Path, supervise: Supervise
) -> None:
    run = supervise(f"""
        [programs.web]
        command = {python(FLOOD)}
        logfile = "logs/deep/web.log"
        logfile_maxbytes = "64KB"
        logfile_backups = 100
        """)
    run.wait_state("web", "EXITED")
    run.end()
    files = rotated(tmp_path / "logs/deep/web.log")
    assert joined(files) == (tmp_path / "flood").read_bytes()
    assert len(files) > 40
    for path in files:
        assert path.stat().st_size <= 64 << 10
        assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("backups", [0, 2])
def test_rotation_keeps_the_newest_backups_only(
    tmp_path: Path, supervise: Supervise, backups: int
) -> None:
    run = supervise(f"""
        [programs.web]
        command = {python(FLOOD)}
        logfile = "web.log"
        logfile_maxbytes = "64KB"
        logfile_backups = {backups}
        """)
    run.wait_state("web", "EXITED")
    run.end()
    files = rotated(tmp_path / "web.log")
    assert len(files) == backups + 1
    assert (tmp_path / "flood").read_bytes().endswith(joined(files))
    assert joined(files)


def test_log_that_cannot_be_renamed_starts_over_and_says_so_once(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "web.log").touch()
    bind = 'mount --bind file web.log; exec "$@"'
    run = supervise(
        f"""
        [programs.web]
        command = {sh("seq 1000; exec sleep 1000")}
        logfile = "web.log"
        logfile_maxbytes = 40
        """,
        prefix=(*unshare("--mount"), "sh", "-c", bind, "sh"),
    )
    eventually((tmp_path / "file").read_text, lambda text: text.endswith("\n1000\n"))
    assert len((tmp_path / "file").read_text()) <= 40
    assert run.status("web")["log_dropped_bytes"] == 0
    assert run.err.count("cannot rename") == 1


def test_line_that_is_longer_than_a_log_file_has_a_file_of_its_own(
    tmp_path: Path, supervise: Supervise
) -> None:
    code = "print('short'); print('x' * 5000); print('end')"
    run = supervise(f"""
        [programs.web]
        command = {python(code)}
        logfile = "web.log"
        logfile_maxbytes = "1KB"
        logfile_backups = 9
        """)
    run.wait_state("web", "EXITED")
    run.end()
    logs = [path.read_bytes() for path in rotated(tmp_path / "web.log")]
    assert logs == [b"short\n", b"x" * 5000 + b"\n", b"end\n"]


LONG_LINE = """
import fcntl, os
if hasattr(fcntl, "F_SETPIPE_SZ"):  # that it can be read at once
    fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)
os.write(1, b"a" * 10_000 + b"\\n" + b"b" * 150_000)
open("go").readline()
os.write(1, b"b" * 45_000 + b"\\n")
"""


def test_line_that_comes_in_large_pieces_moves_to_the_next_file_as_a_whole(
    tmp_path: Path, supervise: Supervise, gate: Callable[[str], Gate]
) -> None:
    go, log = gate("go"), tmp_path / "web.log"
    run = supervise(f"""
        [programs.web]
        command = {python(LONG_LINE)}
        logfile = "web.log"
        logfile_maxbytes = 200000
        """)
    eventually(lambda: log.exists() and log.stat().st_size, 10_001)
    go.open()
    run.wait_state("web", "EXITED")
    run.end()
    logs = [path.read_bytes() for path in rotated(log)]
    assert logs == [b"a" * 10_000 + b"\n", b"b" * 195_000 + b"\n"]


def test_log_goes_on_after_what_is_there_at_the_start(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "web.log").write_text("before\n")
    run = supervise("[programs.web]\ncommand = 'echo after'\nlogfile = 'web.log'")
    run.wait_state("web", "EXITED")
    run.end()
    assert (tmp_path / "web.log").read_text() == "before\nafter\n"


def test_programs_that_name_the_same_file_share_it(
    tmp_path: Path, supervise: Supervise
) -> None:
    code = "for i in range(1000): print('x' * 100, flush=True)"
    run = supervise(f"""
        [programs.web]
        command = {python(code)}
        numprocs = 2
        logfile = "web.log"
        logfile_maxbytes = "100KB"
        """)
    run.wait_state("web:0", "EXITED")
    run.wait_state("web:1", "EXITED")
    run.end()
    files = rotated(tmp_path / "web.log")
    assert joined(files) == (b"x" * 100 + b"\n") * 2000
    assert all(path.stat().st_size <= 100 << 10 for path in files)


def test_usr2_follows_a_link_that_leads_elsewhere_by_now(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "web.log").symlink_to("a.log")
    command = sh("while :; do echo line; sleep 0.02; done")
    run = supervise(f"[programs.web]\ncommand = {command}\nlogfile = 'web.log'")
    eventually(lambda: len(logs(run)), lambda count: count > 3)
    (tmp_path / "web.log").unlink()
    (tmp_path / "web.log").symlink_to("b.log")
    run.send(signal.SIGUSR2)
    eventually(lambda: len(logs(run)), lambda count: count > 3)
    assert (tmp_path / "b.log").read_text().startswith("line\n")


def test_rotation_of_a_link_happens_where_the_file_is(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "web.log").symlink_to("volume/log")
    run = supervise(f"""
        [programs.web]
        command = {sh("echo one; echo two; echo three")}
        logfile = "web.log"
        logfile_maxbytes = 4
        """)
    run.wait_state("web", "EXITED")
    assert logs(run) == ["one", "two", "three"]
    run.end()
    assert (tmp_path / "web.log").is_symlink()
    files = rotated(tmp_path / "volume/log")
    assert [path.read_text() for path in files] == ["one\n", "two\n", "three\n"]


def test_programs_that_name_one_file_by_two_names_share_it(
    tmp_path: Path, supervise: Supervise, gate: Callable[[str], Gate]
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "linked").symlink_to("logs")
    log, gates = tmp_path / "logs/log", [gate("web.go"), gate("db.go")]
    line = "print('x' * 99, flush=True)"
    code = (
        f"import sys; {line}; open(sys.argv[1]).readline()\nfor i in range(299): {line}"
    )
    run = supervise(f"""
        [defaults]
        logfile_maxbytes = 1000
        logfile_backups = 99
        [programs.web]
        command = {python(code, "web.go")}
        logfile = "logs/log"
        [programs.db]
        command = {python(code, "db.go")}
        logfile = "linked/log"
        """)
    eventually(lambda: log.exists() and log.stat().st_size, 200)
    for each in gates:
        each.open()
    run.wait_state("web", "EXITED")
    run.wait_state("db", "EXITED")
    run.end()
    sizes = [path.stat().st_size for path in rotated(log)]
    assert sizes == [1000] * 60


def test_both_streams_in_one_file_keep_their_order(
    tmp_path: Path, supervise: Supervise
) -> None:
    code = "import os\nfor i in range(2000): os.write(1 + i % 2, b'%d\\n' % i)"
    run = supervise(f"[programs.web]\ncommand = {python(code)}\nlogfile = 'web.log'")
    run.wait_state("web", "EXITED")
    run.end()
    numbers = (tmp_path / "web.log").read_text().split()
    assert numbers == [str(i) for i in range(2000)]


def test_streams_may_have_files_of_their_own(
    tmp_path: Path, supervise: Supervise
) -> None:
    run = supervise(f"""
        [programs.web]
        command = {sh("echo one; echo two >&2")}
        logfile = "out.log"
        stderr_logfile = "err.log"
        """)
    run.wait_state("web", "EXITED")
    run.end()
    assert (tmp_path / "out.log").read_text() == "one\n"
    assert (tmp_path / "err.log").read_text() == "two\n"


def test_streams_that_share_a_pipe_tear_no_line_of_each_other(
    supervise: Supervise,
) -> None:
    source, sink = os.pipe()
    run = supervise(
        f"""
        [programs.out]
        command = {sh(f"yes {'o' * 63} | head -n 20000")}
        [programs.err]
        command = {sh(f"yes {'e' * 63} | head -n 20000 >&2")}
        """,
        prefix=("sh", "-c", 'exec "$@" 2>&1', "sh"),
        stdout=sink,
    )
    # A slow reader: it waits until there is no room. What the last 64 KB are is left.
    data = b""
    while len(data) < 2 * 20_000 * 70 - 65536:
        eventually(lambda: select.select([], [sink], [], 0)[1], [])
        data += os.read(source, 65536)
    os.close(source)
    os.close(sink)
    run.end()
    whole = re.compile(rb"out \| o{63}|err \| e{63}|\d{4}-\d\d-\d\dT.*")
    assert [x for x in data.split(b"\n")[:-1] if not whole.fullmatch(x)] == []


def test_streams_on_the_terminal_stay_apart(supervise: Supervise) -> None:
    command = sh("echo one; echo two >&2")
    run = supervise(f"[programs.web]\ncommand = {command}")
    run.wait_state("web", "EXITED")
    run.end()
    assert run.out == b"web | one\n"
    assert "web | two\n" in run.err


def test_names_on_the_terminal_are_aligned(supervise: Supervise) -> None:
    run = supervise("""
        [programs.db]
        command = "echo one"
        [programs.worker]
        command = "echo two"
        """)
    run.wait_state("db", "EXITED")
    run.wait_state("worker", "EXITED")
    run.end()
    assert sorted(run.out.splitlines()) == [b"db     | one", b"worker | two"]


def test_time_stamps_lead_the_lines(tmp_path: Path, supervise: Supervise) -> None:
    run = supervise("""
        log_format = "timestamp"
        [programs.web]
        command = "echo hello"
        [programs.file]
        command = "echo hello"
        logfile = "file.log"
        log_format = "timestamp"
        """)
    run.wait_state("web", "EXITED")
    run.wait_state("file", "EXITED")
    run.end()
    stamp = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    assert re.fullmatch(stamp + rb"web +\| hello\n", run.out)
    log = (tmp_path / "file.log").read_bytes()
    assert re.fullmatch(stamp + rb"file \| hello\n", log)


def test_json_lines_are_objects(supervise: Supervise) -> None:
    code = r"import os; os.write(1, b'a \"b\" \0\xff\n\n'); os.write(2, b'oops')"
    run = supervise(f'log_format = "json"\n[programs.web]\ncommand = {python(code)}')
    run.wait_state("web", "EXITED")
    run.end()
    first, second = map(json.loads, run.out.splitlines())
    assert list(first) == ["time", "program", "stream", "message"]
    assert first["program"] == "web"
    assert first["stream"] == "stdout"
    assert first["message"] == 'a "b" \0\ufffd'
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*Z", first["time"])
    assert second["message"] == ""
    messages = [json.loads(line) for line in run.err.splitlines()]
    (oops,) = [m for m in messages if m.get("stream") == "stderr"]
    assert oops["message"] == "oops"
    own = [m for m in messages if "stream" not in m]
    assert all({"time", "level", "program", "message"} == m.keys() for m in own)
    assert any(m["program"] == "web" and "EXITED" in m["message"] for m in own)


@pytest.mark.parametrize("log_format", ["raw", "prefix"])
@pytest.mark.parametrize("kind", ["file", "pipe", "terminal"])
@pytest.mark.parametrize(
    "path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"]
)
def test_dev_stdout_is_a_log_file_whatever_standard_output_is(
    tmp_path: Path, supervise: Supervise, kind: str, log_format: str, path: str
) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    opener = {"file": None, "pipe": os.pipe, "terminal": pty.openpty}[kind]
    source, sink = opener() if opener else (-1, None)
    config = f"""
        [programs.web]
        command = {sh("echo hello; echo hello; echo oops >&2")}
        logfile = "{path}"
        stderr_logfile = "/dev/stderr"
        logfile_maxbytes = 4
        log_format = "{log_format}"
        """
    run = supervise(config, stdout=sink, env={"NO_COLOR": "1"})
    run.wait_state("web", "EXITED")
    run.end()
    line = b"hello" if log_format == "raw" else b"web | hello"
    if sink is None:
        assert run.out.splitlines() == [line, line]
    else:
        os.close(sink)
        assert drained(source).splitlines() == [line, line]
    assert "oops\n" in run.err
    assert not list(tmp_path.glob("*.1"))


def drained(fd: int) -> bytes:
    """Close a descriptor, after reading all that its writers left in it."""
    data = b""
    # A terminal whose writers are gone gives EIO instead of an end.
    with contextlib.suppress(OSError):
        while piece := os.read(fd, 65536):
            data += piece
    os.close(fd)
    return data


@pytest.mark.parametrize("plain", [False, True])
def test_names_are_coloured_on_a_terminal_only(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    source, sink = pty.openpty()
    run = supervise(
        """
        [programs.web]
        command = "echo hello"
        [programs.db]
        command = "echo hello"
        """,
        stdout=sink,
    )
    os.close(sink)
    run.wait_state("web", "EXITED")
    run.wait_state("db", "EXITED")
    run.end()
    colours = re.findall(rb"\x1b\[(\d+)m(?:web|db) ", drained(source))
    assert len({*colours}) == (0 if plain else 2)


def test_full_disk_drops_counts_and_recovers(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "disk").mkdir()
    fill = "mount -t tmpfs -o size=64k none disk; cat /dev/zero > disk/filler 2>&-"
    mounted = (*unshare("--mount"), "sh", "-c", f'{fill}; exec "$@"', "sh")
    count = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.01; done"
    run = supervise(
        f"[programs.web]\ncommand = {sh(count)}\nlogfile = 'disk/log'\nstartsecs = 0",
        prefix=mounted,
    )
    pid = run.wait_state("web", "RUNNING")["pid"]
    eventually(lambda: run.status("web")["log_dropped_bytes"], lambda n: n > 100)
    run.wait_err("No space left on device")
    disk = Path(f"/proc/{run.pid}/root{tmp_path}/disk")
    (disk / "filler").unlink()
    eventually((disk / "log").read_text, lambda log: log.count("\n") > 10)
    assert run.status("web")["pid"] == pid
    lines = (disk / "log").read_text().splitlines()[:-1]
    assert all(re.fullmatch(r"line \d+", line) for line in lines)
    assert run.err.count("No space left on device") == 1


def test_usr2_writes_to_a_new_file_after_a_move(
    tmp_path: Path, supervise: Supervise
) -> None:
    count = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done"
    run = supervise(f"[programs.web]\ncommand = {sh(count)}\nlogfile = 'web.log'")
    log, moved = tmp_path / "web.log", tmp_path / "web.log.old"
    eventually(lambda: log.exists() and log.stat().st_size > 10)
    log.rename(moved)
    run.send(signal.SIGUSR2)
    eventually(lambda: log.exists() and log.stat().st_size > 10)
    run.end()
    numbers = (moved.read_text() + log.read_text()).split()
    assert numbers == [str(i + 1) for i in range(len(numbers))]


HALF_A_LINE = """
import os
os.write(1, b"a" * 99 + b"\\n" + b"b" * 500)
open("go").readline()
os.write(1, b"b" * 450 + b"\\n")
"""


def test_usr2_in_the_middle_of_a_line_lets_no_rotation_split_it(
    tmp_path: Path, supervise: Supervise, gate: Callable[[str], Gate]
) -> None:
    go, log = gate("go"), tmp_path / "web.log"
    run = supervise(f"""
        [programs.web]
        command = {python(HALF_A_LINE)}
        logfile = "web.log"
        logfile_maxbytes = 1000
        """)
    eventually(lambda: log.exists() and log.stat().st_size, 100)
    run.send(signal.SIGUSR2)
    run.wait_err("reopened the log files")
    go.open()
    run.wait_state("web", "EXITED")
    run.end()
    logs = [path.read_bytes() for path in rotated(log)]
    assert logs == [b"a" * 99 + b"\n", b"b" * 950 + b"\n"]


def test_program_without_rotation_gets_the_descriptor_itself(
    tmp_path: Path, supervise: Supervise
) -> None:
    run = supervise(f"{SLEEPER}\nlogfile = 'a/web.log'\nlogfile_maxbytes = 0")
    pid = run.wait_state("web", "RUNNING")["pid"]
    for fd in (1, 2):
        assert os.readlink(f"/proc/{pid}/fd/{fd}") == str(tmp_path / "a/web.log")
        info = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        flags = re.search(r"flags:\s+(\d+)", info)
        assert flags is not None
        assert int(flags[1], 8) & os.O_APPEND
    run.send(signal.SIGUSR2)
    run.wait_err("web.log")


def test_raw_program_on_the_terminal_gets_the_descriptor_itself(
    supervise: Supervise,
) -> None:
    run = supervise(f"{SLEEPER}\nlog_format = 'raw'")
    pid = run.wait_state("web", "RUNNING")["pid"]
    assert os.readlink(f"/proc/{pid}/fd/1") == str(run.folder / "out")
    assert os.readlink(f"/proc/{pid}/fd/2") == str(run.folder / "err")


def test_terminal_that_nobody_reads_delays_output_only(supervise: Supervise) -> None:
    source, sink = os.pipe()
    run = supervise(f"{SLEEPER}\n[programs.flood]\ncommand = 'yes'", stdout=sink)
    pid = run.wait_state("web", "RUNNING")["pid"]
    eventually(lambda: select.select([], [sink], [], 0)[1], [])
    os.close(sink)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: run.status("web")["restarts"], 1)
    assert run.end() == 0
    os.close(source)


def test_terminal_of_another_user_delays_output_only(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    as_root()
    if not shutil.which("setpriv"):
        cannot("needs setpriv")
    source, sink = pty.openpty()
    os.fchown(sink, pwd.getpwnam("nobody").pw_uid, -1)
    go = gate("go")
    run = supervise(
        f"""
        [programs.flood]
        command = "yes"
        [programs.web]
        command = {sh("read x <go; echo hello; exec sleep 1000")}
        logfile = "web.log"
        """,
        # It becomes our controlling terminal before the right to open it goes.
        prefix=(
            "sh",
            "-c",
            'exec 3<>"$0"; exec >&3; exec setpriv --bounding-set=-dac_override "$@"',
            os.ttyname(sink),
        ),
    )
    # It sleeps when its pipe is full, and nobody reads the terminal.
    eventually(lambda: stat_of(run.status("flood")["pid"])[0], "S")
    go.open()
    eventually(lambda: logs(run), ["hello"])
    assert run.end() == 0
    os.close(source)
    os.close(sink)


def test_terminal_that_went_away_ends_nobody(supervise: Supervise) -> None:
    source, sink = os.pipe()
    command = sh("while :; do echo hello; sleep 0.01; done")
    run = supervise(f"[programs.web]\ncommand = {command}", stdout=sink)
    os.close(sink)
    os.close(source)
    eventually(lambda: run.status("web")["log_dropped_bytes"], lambda n: n > 50)
    assert run.status("web")["running"]
    assert run.end() == 0


def test_supervisor_logs_what_a_killed_program_left_in_its_pipe(
    tmp_path: Path, supervise: Supervise
) -> None:
    command = sh("echo bye; kill -9 $$")
    run = supervise(f"[programs.web]\ncommand = {command}\nlogfile = 'web.log'")
    assert run.wait_state("web", "EXITED")["exit_signal"] == "SIGKILL"
    eventually((tmp_path / "web.log").read_text, "bye\n")


def test_more_log_files_than_the_limit_of_open_files_leave_room_for_restarts(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(
        """
        [programs.web]
        command = ["sh", "-c", "echo up; exec sleep 1000"]
        numprocs = 60
        logfile = "web${PROCESS_NUM}.log"
        autorestart = true
        startsecs = 0
        """,
        prefix=("sh", "-c", 'ulimit -Sn 40; exec "$@"', "sh"),
    )
    logs = [tmp_path / f"web{number}.log" for number in range(60)]
    eventually(lambda: all(log.exists() and lines(log) == ["up"] for log in logs))
    os.kill(run.status("web:59")["pid"], signal.SIGKILL)
    eventually(lambda: lines(logs[59]), ["up", "up"])


# === HTTP =============================================================================
#
# Over `listen = "unix:h"`, which has the rights of TCP and needs no free port.

UNIX = '"unix:h"'


def connected(run: Run) -> socket.socket:
    """Return a connection to what a supervisor listens on."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(LIMIT)
    client.connect(os.path.relpath(run.folder / "h"))
    return client


def answered(client: socket.socket, method: str = "GET") -> tuple[int, Any, bytes]:
    """Return status code, headers and body of the answer that arrives."""
    answer = http.client.HTTPResponse(client, method=method)
    answer.begin()
    return answer.status, answer.headers, answer.read()


def exchange(run: Run, request: bytes) -> tuple[int, Any, bytes]:
    """Send bytes to what a supervisor listens on; return its answer."""
    with connected(run) as client:
        # A server may answer, and hang up, before it has read all.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(request)
        method = request.partition(b" ")[0].decode("latin-1")
        return answered(client, method)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"\x16\x03\x01\x02\x00\xff\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /status\r\n\r\n", 400),
        (b"GET /status HTTP/x\r\n\r\n", 400),
        (b"GET /status HTTP/0.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", 431),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\nhost: localhost\r\n\r\n", 400),
        (b"GET /nope HTTP/1.1\r\n\r\n", 404),
        (b"GET //status HTTP/1.1\r\n\r\n", 404),
        (b"GET /status/nope HTTP/1.1\r\n\r\n", 404),
        (b"GET /health/nope HTTP/1.1\r\n\r\n", 404),
        (b"GET /status/%2e%2e HTTP/1.1\r\n\r\n", 404),
        (b"GET /__class__ HTTP/1.1\r\n\r\n", 404),
        (b"BREW /nope HTTP/1.1\r\n\r\n", 404),
        (b"POST /status/nope HTTP/1.1\r\n\r\n", 404),
        (b"GET /programs/nope/start HTTP/1.1\r\n\r\n", 404),
        (b"BREW /status HTTP/1.1\r\n\r\n", 405),
        (b"POST /status HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"DELETE /health HTTP/1.1\r\n\r\n", 405),
    ],
)
def test_bad_request_gets_the_right_code_as_json(
    http_run: Run, request_: bytes, code: int
) -> None:
    got, headers, body = exchange(http_run, request_)
    assert got == code
    assert headers.get_content_type() == "application/json"
    assert json.loads(body)["error"]
    if code == 405:
        assert headers["Allow"].split(", ")[0] == "GET"


@pytest.fixture(scope="module")
def http_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A supervisor that a test may ask but not change."""
    with supervising(tmp_path_factory.mktemp("http")) as start:
        yield start(SLEEPER, listen=UNIX)


def test_answers_say_their_length_and_are_not_stored(http_run: Run) -> None:
    for path in ("/", "/status", "/status/web", "/health", "/health/live", "/nope"):
        _, headers, body = exchange(
            http_run, b"GET %s HTTP/1.0\r\n\r\n" % path.encode()
        )
        assert int(headers["Content-Length"]) == len(body)
        assert headers["Cache-Control"] == "no-store"


def test_head_is_get_without_a_body(http_run: Run) -> None:
    code, headers, body = exchange(http_run, b"HEAD /status HTTP/1.0\r\n\r\n")
    assert (code, body) == (200, b"")
    assert int(headers["Content-Length"]) > 10


def test_root_is_the_line_of_the_original_for_who_is_no_browser(http_run: Run) -> None:
    code, headers, body = exchange(http_run, b"GET / HTTP/1.0\r\nAccept: */*\r\n\r\n")
    assert (code, headers.get_content_type()) == (200, "text/plain")
    assert body.decode().strip() == "Supervisor Running. Check /status"


def test_loop_says_that_it_turns(http_run: Run) -> None:
    assert http_run.ask("/health/live") == (200, {"status": "ok"})


STATUS_KEYS = (
    "name group running state ready healthy pid uptime started_at restarts failures "
    "exit_code exit_signal reason status_text restart_in log_dropped_bytes description"
)


def test_status_shows_what_is_documented_and_no_secret(supervise: Supervise) -> None:
    run = supervise("""
        [programs.web]
        command = ["sleep", "1000.0"]
        environment = {PASSWORD = "hunter2"}
        startsecs = 0
        [programs.job]
        command = "true"
        [programs.many]
        command = "sleep 1000"
        numprocs = 2
        """)
    web = run.wait_state("web", "RUNNING")
    run.wait_state("job", "EXITED")
    code, programs = run.ask("/status")
    assert code == 200
    assert [p["name"] for p in programs] == ["web", "job", "many:0", "many:1"]
    assert [p["group"] for p in programs] == ["web", "job", "many", "many"]
    assert all(set(STATUS_KEYS.split()) <= p.keys() for p in programs)
    assert web["running"] is web["ready"] is True
    assert web["healthy"] is web["exit_code"] is web["exit_signal"] is None
    assert web["uptime"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", web["started_at"])
    description = rf"pid {web['pid']}, uptime \d+:\d\d:\d\d"
    assert re.fullmatch(description, web["description"])
    assert (programs[1]["running"], programs[1]["exit_code"]) == (False, 0)
    assert programs[1]["pid"] is programs[1]["uptime"] is None
    assert [p["name"] for p in run.ask("/status/many")[1]] == ["many:0", "many:1"]
    assert "hunter2" not in json.dumps(programs)
    assert "1000.0" not in json.dumps(programs)


def test_health_is_starting_then_ok(tmp_path: Path, supervise: Supervise) -> None:
    run = supervise("[programs.web]\ncommand = 'sleep 1000'\nstartsecs = 0.3")
    code, health = run.ask("/health")
    if run.state("web") == "STARTING":
        assert (code, health["status"]) == (503, "starting")
        assert list(health["programs"]) == ["web"]
    run.wait_state("web", "RUNNING")
    assert run.ask("/health") == (200, {"status": "ok", "programs": {}})
    assert run.ask("/health/web")[0] == 200


def test_health_names_who_fails_and_why(supervise: Supervise) -> None:
    run = supervise(f"""
        {SLEEPER}
        [programs.bad]
        command = "no-such-command"
        [programs.failed]
        command = ["sh", "-c", "exit 3"]
        [programs.looping]
        command = "false"
        autorestart = true
        backoff_delay = 1000
        backoff_limit = 1000
        """)
    run.wait_state("bad", "FATAL")
    run.wait_state("failed", "EXITED")
    run.wait_state("looping", "BACKOFF")
    code, health = run.ask("/health")
    assert (code, health["status"]) == (503, "failing")
    assert set(health["programs"]) == {"bad", "failed", "looping"}
    assert "no-such-command" in health["programs"]["bad"]
    assert "3" in health["programs"]["failed"]
    assert run.ask("/health/web")[0] == 200
    assert run.ask("/health/bad")[0] == 503


def test_health_counts_only_what_is_wanted(supervise: Supervise) -> None:
    run = supervise(f"""
        {SLEEPER}
        [programs.done]
        command = "true"
        [programs.idle]
        command = "true"
        autostart = false
        """)
    run.wait_state("done", "EXITED")
    run.wait_state("web", "RUNNING")
    assert run.ask("/health") == (200, {"status": "ok", "programs": {}})
    assert run.ask("/health/done")[0] == 200
    assert run.ask("/health/idle")[0] == 503


def test_64_slow_clients_disturb_nobody(supervise: Supervise) -> None:
    run = supervise(SLEEPER, listen=UNIX)
    pid = run.wait_state("web", "RUNNING")["pid"]
    request = b"GET /health/live HTTP/1.1\r\n\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(run)) for _ in range(64)]
        for client in slow:
            client.sendall(b"G")
        code, _, body = exchange(run, request)
        assert code == 503
        assert json.loads(body)["error"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: run.status("web")["restarts"], 1)

        def dripped() -> bool:
            slow[0].sendall(b"E")
            return bool(select.select([slow[0]], [], [], 0)[0])

        # They have 5 s in all, however they spend them; then their places are free.
        eventually(dripped)
        assert {answered(client)[0] for client in slow} == {408}
        eventually(lambda: exchange(run, request)[0], 200)


def test_port_in_use_is_an_error_and_nothing_is_started(
    tmp_path: Path, supervise: Supervise
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = "[programs.web]\ncommand = 'touch started'\n"
        run = supervise(config, listen=f'"{address}"', ready=False)
        assert run.popen.wait(LIMIT) == 2
    assert address in run.err
    assert "in use" in run.err
    assert "Traceback" not in run.err
    assert not (tmp_path / "started").exists()


def test_second_supervisor_of_one_configuration_is_refused(
    supervise: Supervise,
) -> None:
    first = supervise(SLEEPER)
    second = supervise(SLEEPER, ready=False)
    assert second.popen.wait(LIMIT) == 2
    first.wait_state("web", "RUNNING")


# === Helpers: programs that wait for the test ==================================


class Gate:
    """A named pipe that programs wait on: `read x < PATH` ends once it is opened."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        # Open for both, a named pipe neither blocks its writer nor ever ends.
        self.fd = os.open(path, os.O_RDWR)

    def open(self) -> None:
        self.send("")

    def send(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Callable[[str], Gate]]:
    """Make gates in the test's folder."""
    gates: list[Gate] = []

    def make(name: str) -> Gate:
        gates.append(Gate(tmp_path / name))
        return gates[-1]

    yield make
    for each in gates:
        os.close(each.fd)


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def lines(path: Path) -> list[str]:
    """Return a file's lines, none where there is no file yet."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def post(run: Run, path: str) -> None:
    """Ask for a change and wait until its outcome is known."""
    code, answer = run.ask(f"/programs/{path}?wait=30", "POST")
    assert code in (200, 202), answer


def reload(run: Run, config: str) -> None:
    """Replace the configuration, but for its first two lines, and reload it."""
    path = run.folder / "supervisors.toml"
    head = path.read_text().split("\n")[:2]
    path.write_text("\n".join([*head, config]))
    run.send(signal.SIGHUP)


# Answers every request with the number in the file `code`, or 200 without one.
SERVER = """
import os, socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    client = server.accept()[0]
    try:
        client.recv(65536)
        code = open("code").read() if os.path.exists("code") else "200"
        head = f"HTTP/1.0 {code} -\\r\\nLocation: http://127.0.0.1:1/\\r\\n"
        client.sendall(head.encode() + b"Content-Length: 0\\r\\n\\r\\n")
    except OSError:
        pass
    client.close()
"""
IGNORING_TERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


# === Order and readiness =======================================================


def test_programs_start_when_what_they_depend_on_is_ready(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    migration, database = gate("migration"), gate("database")
    db_port, web_port = unused_port(), unused_port()
    serve = (PYTHON, "-S", "-c", SERVER)
    web = sh('echo web >> order; exec "$@"', *serve, str(web_port))
    db = sh('echo db >> order; read x < database; exec "$@"', *serve, str(db_port))
    run = supervise(f"""
        [defaults]
        startsecs = 0
        [programs.worker]
        command = {sh("echo worker >> order; exec sleep 1000")}
        depends_on = ["migrate", "db", "web"]
        [programs.web]
        command = {web}
        depends_on = ["db"]
        healthcheck.http = "http://127.0.0.1:{web_port}/up"
        healthcheck.interval = 0.05
        [programs.db]
        command = {db}
        depends_on = ["migrate"]
        healthcheck.tcp = "127.0.0.1:{db_port}"
        healthcheck.interval = 0.05
        healthcheck.retries = 1
        [programs.migrate]
        type = "oneshot"
        command = {sh("echo migrate >> order; read x < migration")}
    """)
    run.wait_state("migrate", "RUNNING")
    assert "migrate" in run.wait_state("db", "WAITING")["reason"]
    assert "db" in run.wait_state("web", "WAITING")["reason"]
    waiting = run.wait_state("worker", "WAITING")
    assert "migrate" in waiting["reason"]
    assert waiting["pid"] is None and not waiting["running"] and not waiting["ready"]
    code, health = run.ask("/health")
    assert (code, health["status"]) == (503, "starting")
    assert "migrate" in health["programs"]["db"]

    migration.open()
    run.wait_state("migrate", "EXITED")
    assert not run.wait_state("db", "RUNNING")["ready"]
    assert run.state("web") == run.state("worker") == "WAITING"
    assert "db" in run.status("worker")["reason"]
    assert run.ask("/health")[1]["status"] == "starting"

    database.open()
    run.wait_state("worker", "RUNNING")
    assert run.status("web")["healthy"] is True
    assert eventually(lambda: run.ask("/health")[0], 200)
    assert run.ask("/health")[1]["status"] == "ok"
    order = ["migrate", "db", "web", "worker"]
    eventually(lambda: lines(tmp_path / "order"), order)
    assert run.status("db")["restarts"] == 0


def test_restarting_a_program_leaves_its_dependents_alone(
    supervise: Supervise, gate: Callable[[str], Gate]
) -> None:
    up = gate("up")
    run = supervise(f"""
        [programs.db]
        command = "sleep 1000"
        startsecs = 0
        healthcheck.command = {sh("test -e passed || read x < up && : > passed")}
        healthcheck.interval = 0.1
        healthcheck.timeout = 60
        [programs.worker]
        command = "sleep 1000"
        depends_on = ["db"]
    """)
    up.open()
    worker = run.wait_state("worker", "STARTING")["pid"]
    (run.folder / "passed").unlink()
    db = run.status("db")["pid"]
    run.ask("/programs/db/restart", "POST")
    eventually(lambda: run.status("db")["pid"], lambda pid: pid not in (db, None))
    assert run.status("worker")["pid"] == worker
    # Started anew, it waits again: its database is not ready yet.
    run.ask("/programs/worker/restart", "POST")
    assert "db" in run.wait_state("worker", "WAITING")["reason"]
    assert not is_alive(worker)
    up.open()
    eventually(lambda: run.status("worker")["pid"], lambda pid: pid is not None)


@pytest.mark.parametrize(
    ("first", "states"),
    [("sleep 1000", {"RUNNING": 400}), ("/none", {"FATAL": 1, "WAITING": 399})],
)
def test_a_long_chain_of_dependencies_is_no_special_case(
    supervise: Supervise, first: str, states: dict[str, int]
) -> None:
    links = [f'[programs.p0]\ncommand = "{first}"']
    for number in range(1, 400):
        links += [f'[programs.p{number}]\ndepends_on = ["p{number - 1}"]']
        links += ['command = "sleep 1000"']
    run = supervise("\n".join(["[defaults]", "startsecs = 0", *links]))
    eventually(lambda: Counter(one["state"] for one in run.status_all()), states)
    eventually(lambda: run.ask("/health")[1]["status"] != "starting")
    assert run.end() == 0


def test_depending_on_instances_waits_for_all_of_them(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    last = gate("last")
    run = supervise(f"""
        [programs.shard]
        command = {sh("test $PROCESS_NUM = 0 || read x < last")}
        type = "oneshot"
        numprocs = 2
        [programs.web]
        command = "sleep 1000"
        depends_on = ["shard"]
    """)
    run.wait_state("shard:0", "EXITED")
    assert "shard:1" in run.wait_state("web", "WAITING")["reason"]
    last.open()
    run.wait_state("web", "STARTING")


# === A oneshot that fails ======================================================


def test_failed_migration_with_on_failure_shutdown_gives_its_code(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(
        f"""
        [programs.beside]
        command = "sleep 1000"
        [programs.migrate]
        command = {sh("exit 7")}
        type = "oneshot"
        on_failure = "shutdown"
        [programs.web]
        command = {sh("echo > started; sleep 1000")}
        depends_on = ["migrate"]
        """,
        ready=False,
    )
    assert run.popen.wait(LIMIT) == 7
    assert not (tmp_path / "started").exists()
    assert "migrate: EXITED, exit code 7" in run.err


def test_failed_migration_with_autorestart_is_tried_until_it_succeeds(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(f"""
        [programs.migrate]
        command = {sh("echo >> tries; test -e fixed")}
        type = "oneshot"
        autorestart = "unexpected"
        backoff_delay = 0.02
        [programs.web]
        command = "sleep 1000"
        depends_on = ["migrate"]
    """)
    eventually(lambda: len(lines(tmp_path / "tries")), lambda number: number >= 3)
    assert run.state("web") == "WAITING"
    (tmp_path / "fixed").touch()
    run.wait_state("web", "STARTING")
    migrate = run.status("migrate")
    assert migrate["state"] == "EXITED" and migrate["ready"]
    assert migrate["restarts"] == len(lines(tmp_path / "tries")) - 1


def test_failed_migration_leaves_its_dependents_waiting_and_health_names_it(
    supervise: Supervise,
) -> None:
    run = supervise(f"""
        [programs.migrate]
        command = {sh("exit 7")}
        type = "oneshot"
        [programs.web]
        command = "sleep 1000"
        depends_on = ["migrate"]
        [programs.worker]
        command = "sleep 1000"
        depends_on = ["web"]
    """)
    run.wait_state("migrate", "EXITED")
    failing = eventually(
        lambda: run.ask("/health"), lambda answer: answer[1]["status"] == "failing"
    )
    assert failing[0] == 503
    assert "7" in failing[1]["programs"]["migrate"]
    assert "migrate" in failing[1]["programs"]["web"]
    assert "migrate" in run.wait_state("web", "WAITING")["reason"]
    assert "web" in run.wait_state("worker", "WAITING")["reason"]
    # A start by hand that succeeds lets the rest go on.
    reload(
        run,
        """
        [programs.migrate]
        command = "true"
        type = "oneshot"
        [programs.web]
        command = "sleep 1000"
        startsecs = 0
        depends_on = ["migrate"]
        """,
    )
    run.wait_state("web", "RUNNING")
    assert eventually(lambda: run.ask("/health")[0], 200)


# === What an end means =========================================================


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        (f"command = {sh('ulimit -c 0; kill -SEGV $$')}", 139),
        ('command = "no-such-command-anywhere"', 127),
        ('command = ["./plain"]', 126),
        ('command = "true"\ndirectory = "missing"', 126),
        (f"command = {sh('exit 9')}\nautorestart = true\nstartretries = 1", 9),
        ('command = "true"\nautorestart = true\nstartretries = 0', 1),
        (f"command = {sh('exit 4')}\nexitcodes = [0, 4]\non_success = 'shutdown'", 4),
        ('command = "true"\non_success = "shutdown"', 0),
    ],
    ids=["signal", "missing", "plain", "folder", "fatal", "fatal-0", "expected", "ok"],
)
def test_a_final_end_shuts_down_with_the_code(
    supervise: Supervise, tmp_path: Path, keys: str, code: int
) -> None:
    (tmp_path / "plain").write_text("not executable")
    run = supervise(
        f"""
        [programs.beside]
        command = "sleep 1000"
        [programs.key]
        backoff_delay = 0.01
        on_failure = "shutdown"
        {keys}
        """,
        ready=False,
    )
    assert run.popen.wait(LIMIT) == code


@pytest.mark.parametrize(
    ("programs", "code"),
    [
        (["exit 0", "exit 3", "exit 0"], 3),
        (["exit 0", "exit 0"], 0),
        (["sleep 0.1; exit 5", "exit 6"], 5),
        (["exit 0", "ulimit -c 0; kill -ABRT $$"], 134),
    ],
    ids=["one-fails", "none", "file-order", "signal"],
)
def test_exit_when_done_gives_the_first_failure_in_file_order(
    supervise: Supervise, programs: list[str], code: int
) -> None:
    tables = [
        f"[programs.p{number}]\ncommand = {sh(text)}\n"
        for number, text in enumerate(programs)
    ]
    run = supervise("exit_when_done = true\n" + "".join(tables), ready=False)
    assert run.popen.wait(LIMIT) == code


def test_exit_when_done_counts_one_that_waits_for_a_failed_one_as_ended(
    supervise: Supervise,
) -> None:
    run = supervise(
        f"""
        exit_when_done = true
        [programs.never]
        command = "sleep 1000"
        autostart = false
        [programs.migrate]
        command = {sh("exit 4")}
        type = "oneshot"
        [programs.web]
        command = "sleep 1000"
        depends_on = ["migrate"]
        """,
        ready=False,
    )
    assert run.popen.wait(LIMIT) == 4


def test_exit_when_done_counts_one_that_waits_for_what_will_not_be_ready_as_ended(
    supervise: Supervise,
) -> None:
    run = supervise(
        """
        exit_when_done = true
        [programs.setup]
        command = "true"
        startsecs = 1000
        [programs.web]
        command = "sleep 1000"
        depends_on = ["setup"]
        """,
        ready=False,
    )
    assert run.popen.wait(LIMIT) == 1


def test_exit_when_done_counts_one_that_was_stopped_by_hand_as_ended(
    supervise: Supervise,
) -> None:
    run = supervise(f"""
        exit_when_done = true
        [programs.done]
        command = {sh("exit 3")}
        exitcodes = [0, 3]
        [programs.web]
        command = "sleep 1000"
    """)
    run.wait_state("done", "EXITED")
    with contextlib.suppress(OSError, http.client.HTTPException):
        run.ask("/programs/web/stop", "POST")
    assert run.popen.wait(LIMIT) == 0


# === Health checks =============================================================


def test_a_server_that_stops_answering_is_killed_and_restarted(
    supervise: Supervise,
) -> None:
    port = unused_port()
    run = supervise(f"""
        [programs.web]
        command = {python(IGNORING_TERM + SERVER, port)}
        autorestart = true
        startsecs = 0
        stopwaitsecs = 0.1
        healthcheck.http = "http://127.0.0.1:{port}/"
        healthcheck.interval = 0.1
        healthcheck.timeout = 0.5
        healthcheck.retries = 2
    """)
    old = eventually(lambda: run.status("web"), lambda status: status["healthy"])
    os.kill(old["pid"], signal.SIGSTOP)
    new = eventually(
        lambda: run.status("web"),
        lambda status: status["healthy"] and status["pid"] != old["pid"],
    )
    assert not is_alive(old["pid"])
    assert new["exit_signal"] == "SIGKILL"
    assert (new["restarts"], new["failures"]) == (1, 1)
    assert eventually(lambda: run.ask("/health")[0], 200)


def test_http_checks_pass_with_2xx_and_3xx_and_follow_nothing(
    supervise: Supervise, tmp_path: Path
) -> None:
    port = unused_port()
    run = supervise(f"""
        [programs.web]
        command = {python(SERVER, port)}
        startsecs = 0
        healthcheck.http = "http://127.0.0.1:{port}/"
        healthcheck.interval = 0.02
        healthcheck.retries = 1
        healthcheck.start_period = 0.5
        healthcheck.timeout = 90
    """)
    pid = eventually(lambda: run.status("web"), lambda x: x["healthy"])["pid"]
    for code, healthy in [("404", False), ("302", True), ("500", False), ("204", True)]:
        (tmp_path / "new").write_text(code)
        (tmp_path / "new").rename(tmp_path / "code")
        status = eventually(
            lambda: run.status("web"), lambda x, want=healthy: x["healthy"] is want
        )
        assert status["ready"] is healthy
        assert run.ask("/health")[1]["status"] == ("ok" if healthy else "failing")
    # Without `autorestart`, being unhealthy is shown and changes nothing else.
    assert run.status("web")["pid"] == pid


def test_failures_inside_start_period_do_not_count(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(f"""
        [programs.web]
        command = "sleep 1000"
        autorestart = true
        startsecs = 0
        healthcheck.command = {sh("echo >> checks; test -e passes")}
        healthcheck.interval = 0.02
        healthcheck.retries = 1
        healthcheck.start_period = 60
        [programs.after]
        command = "sleep 1000"
        depends_on = ["web"]
    """)
    eventually(lambda: len(lines(tmp_path / "checks")), lambda number: number >= 4)
    assert run.status("web")["restarts"] == 0
    assert not run.status("web")["ready"]
    assert run.ask("/health")[1]["status"] == "starting"
    assert run.state("after") == "WAITING"
    (tmp_path / "passes").touch()
    run.wait_state("after", "STARTING")
    assert run.status("web")["healthy"] is True


def test_check_commands_run_as_the_program_does(supervise: Supervise) -> None:
    # Only root may choose.
    user = "nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    text = 'test "$COLOUR" = blue && test "$PWD" = / && test $(id -un) = "$1"'
    run = supervise(f"""
        [programs.web]
        command = "sleep 1000"
        directory = "/"
        environment = {{COLOUR = "blue"}}
        user = "{user}"
        healthcheck.command = {sh(text, user)}
        healthcheck.start_period = 0
        healthcheck.interval = 0.1
    """)
    eventually(lambda: run.status("web")["healthy"] is not None)
    assert run.status("web")["healthy"] is True


def test_a_check_that_hangs_is_killed_with_its_group(
    supervise: Supervise, tmp_path: Path
) -> None:
    hang = sh("sleep 1000 & echo $$ $! >> checks; wait")
    run = supervise(f"""
        [programs.web]
        command = "sleep 1000"
        startsecs = 0
        healthcheck.command = {hang}
        healthcheck.interval = 0.1
        healthcheck.timeout = 0.2
        healthcheck.retries = 1
        healthcheck.start_period = 0
    """)
    status = eventually(lambda: run.status("web"), lambda x: x["healthy"] is False)
    assert status["state"] == "RUNNING"
    shell, child = map(int, lines(tmp_path / "checks")[0].split())
    eventually(lambda: is_alive(shell) or is_alive(child), False)


def test_a_check_that_leaves_a_child_behind_is_over_with_its_leader(
    supervise: Supervise, tmp_path: Path
) -> None:
    leave = sh("sleep 1000 & echo $! >> children")
    run = supervise(f"""
        [programs.web]
        command = "sleep 1000"
        startsecs = 0
        healthcheck.command = {leave}
        healthcheck.interval = 60
        healthcheck.timeout = 0.3
    """)
    eventually(lambda: run.status("web")["healthy"])
    child = int(lines(tmp_path / "children")[0])
    eventually(lambda: is_alive(child), False)


def test_hanging_checks_delay_neither_a_restart_nor_the_end(
    supervise: Supervise,
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as deaf:
        port = deaf.getsockname()[1]
        checks = [
            f'http = "http://127.0.0.1:{port}/"',
            'command = "sleep 1000"',
            f'tcp = "127.0.0.1:{port}"',
        ]
        tables = [
            f"""
            [programs.p{number}]
            command = "sleep 1000"
            healthcheck.{checks[number % 3]}
            healthcheck.interval = 1
            healthcheck.timeout = 90
            """
            for number in range(60)
        ]
        run = supervise(f"""
            [programs.victim]
            command = "sleep 1000"
            startsecs = 0
            autorestart = true
            exitcodes = [137]
            {"".join(tables)}
        """)
        # The last one's check is under way, so all are.
        eventually(lambda: run.status("p59")["healthy"])
        delays = []
        for _ in range(3):
            pid = run.wait_state("victim", "RUNNING")["pid"]
            begin = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            eventually(
                lambda: run.status("victim")["pid"],
                lambda new, old=pid: new not in (old, None),
            )
            delays.append(time.monotonic() - begin)
        assert min(delays) < 1
        assert run.end() == 0


def test_checks_go_on_every_second_until_one_has_passed(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(f"""
        [programs.web]
        command = "sleep 1000"
        startsecs = 0
        healthcheck.command = {sh("echo >> checks; test -e well")}
        healthcheck.interval = 1000
        healthcheck.retries = 1
        healthcheck.start_period = 0
    """)
    eventually(lambda: run.status("web")["healthy"], False)
    eventually(lambda: len(lines(tmp_path / "checks")) >= 2)
    (tmp_path / "well").touch()
    eventually(lambda: run.status("web")["healthy"], True)


def test_ill_health_that_restarts_nothing_is_logged_and_its_end_is(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise("""
        [programs.web]
        command = "sleep 1000"
        startsecs = 0
        healthcheck.command = "test -e well"
        healthcheck.interval = 0.05
        healthcheck.retries = 1
        healthcheck.start_period = 0
    """)
    pid = run.wait_state("web", "RUNNING")["pid"]
    run.wait_err("unhealthy")
    eventually(lambda: run.status("web")["healthy"], False)
    (tmp_path / "well").touch()
    run.wait_err(f"web: RUNNING, pid {pid}, healthy again")
    assert run.err.count("unhealthy: ") == run.err.count("healthy again") == 1


# === notify ====================================================================

# Sends each line of the named pipe `notify`; with "child " in front from a child.
NOTIFIER = """
import os, signal, socket, sys
address = os.environ["NOTIFY_SOCKET"]
with open("address", "a") as file:
    print(address, os.environ.get("WATCHDOG_USEC"), file=file)
peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
peer.connect(address.replace("@", "\\0", 1) if address[0] == "@" else address)
for line in open(sys.argv[1]):
    text = line.rstrip("\\n").replace("|", "\\n")
    if text == "exit":
        sys.exit(1)
    elif text == "barrier":
        end, sent = os.pipe()
        socket.send_fds(peer, [b"BARRIER=1"], [sent])
        os.close(sent)
        os.read(end, 1)
        open("barrier", "w").close()
    elif not text.startswith("child "):
        peer.send(text.encode(errors="surrogateescape"))
    elif os.fork() == 0:
        peer.send(text[6:].encode())
        signal.pause()
"""


def tell(address: str, text: str) -> None:
    """Send a notification as this process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.connect("\0" + address[1:] if address[0] == "@" else address)
        peer.send(text.encode())


def test_notify_program_runs_when_it_says_so(
    supervise: Supervise, gate: Callable[[str], Gate]
) -> None:
    say = gate("say")
    run = supervise(f"""
        [programs.app]
        command = {python(NOTIFIER, "say")}
        type = "notify"
        startsecs = 0
        [programs.after]
        command = "sleep 1000"
        depends_on = ["app"]
    """)
    say.send("STATUS=loading 1/2 \u00e9")
    status = eventually(
        lambda: run.status("app"), lambda x: x["status_text"] == "loading 1/2 \u00e9"
    )
    assert status["state"] == "STARTING" and not status["ready"]
    assert "READY" in status["reason"]
    assert run.state("after") == "WAITING"
    assert run.ask("/health")[1]["status"] == "starting"
    say.send("RELOADING=1|MONOTONIC_USEC=1|X_NO_SUCH=1|MAINPID=1|nonsense")
    say.send("READY=1|STATUS=serving")
    run.wait_state("after", "STARTING")
    status = run.wait_state("app", "RUNNING")
    assert status["ready"] and status["status_text"] == "serving"
    say.send("STOPPING=1|STATUS=going")
    eventually(lambda: run.status("app")["status_text"], "going")
    assert run.state("app") == "RUNNING"
    # What it said is forgotten with the next start.
    post(run, "app/stop")
    run.ask("/programs/app/start", "POST")
    status = run.wait_state("app", "STARTING")
    assert not status["status_text"] and not status["ready"]


def test_ready_counts_from_a_child_and_not_from_a_stranger(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    say, tell_other = gate("say"), gate("other")
    run = supervise(f"""
        [programs.app]
        command = {python(NOTIFIER, "say")}
        type = "notify"
        [programs.other]
        command = {python(NOTIFIER, "other")}
        type = "notify"
    """)
    eventually(lambda: len(lines(tmp_path / "address")), 2)
    for line in lines(tmp_path / "address"):
        tell(line.split()[0], "READY=1")
        tell(line.split()[0], f"MAINPID={run.status('app')['pid']}|READY=1")
    tell_other.send("READY=1")
    run.wait_state("other", "RUNNING")
    say.send("STATUS=working")
    status = eventually(
        lambda: run.status("app"), lambda x: x["status_text"] == "working"
    )
    assert status["state"] == "STARTING"
    say.send("child READY=1")
    assert run.wait_state("app", "RUNNING")["ready"]


def test_a_barrier_is_closed_at_once(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    say = gate("say")
    run = supervise(f"""
        [programs.app]
        command = {python(NOTIFIER, "say")}
        type = "notify"
    """)
    before = len(os.listdir(f"/proc/{run.pid}/fd"))
    say.send("barrier")
    eventually((tmp_path / "barrier").exists)
    for _ in range(20):
        say.send("barrier")
    say.send("READY=1")
    run.wait_state("app", "RUNNING")
    eventually(lambda: len(os.listdir(f"/proc/{run.pid}/fd")) <= before + 2)


def test_a_missed_watchdog_restarts_and_a_kept_one_does_not(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    say = gate("say")
    keeper = (
        NOTIFIER.replace("for line", "peer.send(b'READY=1')\nfor line")
        .replace("open(sys.argv[1])", "__import__('itertools').repeat('WATCHDOG=1')")
        .replace("    text =", "    __import__('time').sleep(0.05)\n    text =", 1)
    )
    run = supervise(f"""
        [defaults]
        type = "notify"
        autorestart = true
        startsecs = 0
        backoff_delay = 0.01
        [programs.app]
        command = {python(NOTIFIER, "say")}
        watchdog_secs = 0.4
        [programs.keeper]
        command = {python(keeper)}
        watchdog_secs = 1
    """)
    # It starts with READY=1, not before.
    keeper_pid = run.wait_state("keeper", "RUNNING")["pid"]
    first = run.wait_state("app", "STARTING")["pid"]
    for number in range(3):
        say.send("READY=1")
        status = eventually(
            lambda: run.status("app"),
            lambda x, want=number + 1: x["restarts"] == want and x["pid"],
        )
    assert status["pid"] != first and not is_alive(first)
    assert "watchdog" in run.err.lower()
    assert run.status("keeper")["pid"] == keeper_pid
    told = [line.split()[1] for line in lines(tmp_path / "address")]
    assert "400000" in told and "1000000" in told


def test_a_flood_of_notifications_holds_nothing_up(supervise: Supervise) -> None:
    flood = NOTIFIER.partition("for line")[0]
    flood += "peer.send(b'READY=1')\nwhile True:\n    peer.send(b'\\n' * 60000)"
    run = supervise(f"""
        [programs.app]
        command = {python(flood)}
        type = "notify"
    """)
    run.wait_state("app", "RUNNING")
    for _ in range(20):
        assert run.ask("/health/live")[0] == 200
    assert run.end() == 0


def test_a_watchdog_is_not_missed_while_the_supervisor_is_held_up(
    supervise: Supervise, gate: Callable[[str], Gate]
) -> None:
    say = gate("say")
    run = supervise(f"""
        [programs.app]
        command = {python(NOTIFIER, "say")}
        type = "notify"
        watchdog_secs = 2
        autorestart = true
    """)
    say.send("READY=1")
    run.wait_state("app", "RUNNING")
    run.send(signal.SIGSTOP)
    deadline = time.monotonic() + 2.1
    for line in ["STATUS=1", "STATUS=2", "WATCHDOG=1", "STATUS=after"]:
        say.send(line)
    eventually(lambda: time.monotonic() > deadline)
    run.send(signal.SIGCONT)

    def read() -> dict[str, Any]:
        say.send("WATCHDOG=1")
        return run.status("app")

    status = eventually(read, lambda x: x["status_text"] == "after" or x["restarts"])
    assert (status["state"], status["restarts"]) == ("RUNNING", 0)


def test_a_notification_whose_sender_has_ended_is_not_lost_without_a_word(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    go, code = gate("go"), "peer.send(b'READY=1')"
    sender = NOTIFIER.partition("for line")[0] + code
    text = 'read x < go; "$@"; echo > sent; exec sleep 1000'
    run = supervise(f"""
        [programs.app]
        command = {sh(text, PYTHON, "-S", "-c", sender)}
        type = "notify"
    """)
    run.wait_state("app", "STARTING")
    run.send(signal.SIGSTOP)
    go.open()
    eventually((tmp_path / "sent").exists)
    run.send(signal.SIGCONT)
    run.wait_err("which has ended")


@pytest.mark.skipif(not shutil.which("systemd-notify"), reason="no systemd-notify")
def test_the_systemd_notify_command_works(supervise: Supervise) -> None:
    text = "systemd-notify --status=warm && systemd-notify --ready && exec sleep 1000"
    run = supervise(f"""
        [programs.app]
        command = {sh(text)}
        type = "notify"
    """)
    status = run.wait_state("app", "RUNNING")
    assert status["ready"] and status["status_text"] == "warm"


def test_the_supervisor_tells_its_own_manager(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    migration = gate("migration")
    name = uuid.uuid4().hex
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        manager.setblocking(False)
        heard: list[str] = []

        def hear() -> list[str]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    heard.extend(manager.recv(4096).decode().split("\n"))
            return heard

        run = supervise(
            f"""
            [programs.migrate]
            type = "oneshot"
            command = {sh("env > env; read x < migration")}
            [programs.web]
            command = "sleep 1000"
            startsecs = 0
            depends_on = ["migrate"]
            """,
            env={"NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": "200000"},
            prefix=("sh", "-c", 'WATCHDOG_PID=$$ exec "$@"', "sh"),
        )
        eventually(lambda: "WATCHDOG=1" in hear())
        assert run.state("migrate") == "RUNNING"
        assert "READY=1" not in hear()
        migration.open()
        eventually(lambda: "READY=1" in hear())
        assert run.state("web") == "RUNNING"
        assert any(line.startswith("STATUS=") for line in hear())
        assert run.end() == 0
        assert "STOPPING=1" in hear()
    environment = (tmp_path / "env").read_text()
    assert "NOTIFY_SOCKET" not in environment and "WATCHDOG_" not in environment


@pytest.mark.parametrize("mistaken", ["WATCHDOG_PID=1", "WATCHDOG_USEC=0"])
def test_a_watchdog_that_is_not_for_the_supervisor_is_not_kept(
    supervise: Supervise, mistaken: str
) -> None:
    name = uuid.uuid4().hex
    env = {"NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": "1000"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        manager.settimeout(LIMIT)
        config = "[programs.web]\ncommand = 'sleep 1000'\nstartsecs = 1000"
        supervise(config, env=env | dict([mistaken.split("=")]))
        # It would come before all else.
        assert manager.recv(4096) == b"STATUS=waiting for web"


def test_the_manager_hears_of_no_readiness_while_a_oneshot_runs(
    supervise: Supervise, gate: Callable[[str], Gate]
) -> None:
    migration = gate("migration")
    name = uuid.uuid4().hex
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        manager.settimeout(LIMIT)
        run = supervise(
            f"""
            [programs.migrate]
            type = "oneshot"
            command = {sh("read x < migration")}
            """,
            env={"NOTIFY_SOCKET": f"@{name}"},
        )
        run.wait_state("migrate", "RUNNING")
        assert manager.recv(4096) == b"STATUS=waiting for migrate"
        migration.open()
        assert manager.recv(4096).startswith(b"READY=1\n")


# === The order of the stop =====================================================

# Writes when it was told to stop and when it ended, meeting its peer in between.
STOPPER = """
import os, signal, sys, time
name, meet, flag = sys.argv[1:]
def stamp(what):
    with open(f"{name}.{what}", "w") as file:
        file.write(str(time.monotonic()))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
stamp("up")
signal.sigwait({signal.SIGTERM})
stamp("told")
if meet:
    os.close(os.open(meet, int(flag)))
stamp("ended")
"""


def test_everything_stops_dependents_first_and_the_rest_in_parallel(
    supervise: Supervise, tmp_path: Path
) -> None:
    # Both `db` and `queue` end only when they are stopped at the same time: each
    # opens its side of a named pipe, which waits for the other.
    os.mkfifo(tmp_path / "meet")
    run = supervise(f"""
        [defaults]
        startsecs = 0
        [programs.db]
        command = {python(STOPPER, "db", "meet", os.O_RDONLY)}
        [programs.queue]
        command = {python(STOPPER, "queue", "meet", os.O_WRONLY)}
        [programs.web]
        command = {python(STOPPER, "web", "", 0)}
        depends_on = ["db", "queue"]
        [programs.proxy]
        command = {python(STOPPER, "proxy", "", 0)}
        depends_on = ["web"]
    """)
    for name in ["db", "queue", "web", "proxy"]:
        eventually((tmp_path / f"{name}.up").exists)
    assert run.end() == 0

    def at(stamp: str) -> float:
        return float((tmp_path / stamp).read_text())

    assert at("proxy.ended") <= at("web.told") <= at("web.ended")
    assert at("web.ended") <= at("db.told") and at("web.ended") <= at("queue.told")
    assert at("db.told") <= at("queue.ended") and at("queue.told") <= at("db.ended")


def stops_before(run: Run, name: str) -> None:
    """See that a program is told to stop after `app`, which takes its time."""
    eventually((run.folder / "app.up").exists)
    run.wait_state(name, "RUNNING")
    run.send(signal.SIGTERM)
    run.wait_state("app", "STOPPING")
    assert run.state(name) == "RUNNING"
    (run.folder / "meet").write_text("")
    assert run.popen.wait(LIMIT) == 0
    order = re.findall(r" (\S+): STOP(?:PING|PED)", run.err)
    assert order.index("app", 1 + order.index("app")) < order.index(name)


def test_programs_stop_in_order_though_a_oneshot_between_them_has_ended(
    supervise: Supervise, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "meet")
    run = supervise(f"""
        [defaults]
        startsecs = 0
        stopwaitsecs = 1000
        [programs.database]
        command = "sleep 1000"
        [programs.migrate]
        type = "oneshot"
        command = "true"
        depends_on = ["database"]
        [programs.app]
        command = {python(STOPPER, "app", "meet", os.O_RDONLY)}
        depends_on = ["migrate"]
    """)
    stops_before(run, "database")


def test_programs_stop_before_an_instance_that_a_reload_has_added(
    supervise: Supervise, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "meet")
    config = f"""
        [defaults]
        startsecs = 0
        stopwaitsecs = 1000
        [programs.database]
        command = "sleep 1000"
        numprocs = 2
        [programs.app]
        command = {python(STOPPER, "app", "meet", os.O_RDONLY)}
        depends_on = ["database"]
    """
    run = supervise(config)
    app = run.wait_state("app", "RUNNING")["pid"]
    reload(run, config.replace("numprocs = 2", "numprocs = 3"))
    eventually(lambda: run.ask("/status/database:2")[0], 200)
    assert run.status("app")["pid"] == app
    stops_before(run, "database:2")


# === Orders at any moment ======================================================

BLOCKED = f"""
[programs.migrate]
type = "oneshot"
command = {sh("echo $$ >> migrations; read x < migration; exit 1")}
[programs.web]
command = "sleep 1000"
depends_on = ["migrate"]
"""


def test_a_waiting_program_can_be_stopped_started_and_restarted(
    supervise: Supervise, gate: Callable[[str], Gate]
) -> None:
    gate("migration")
    run = supervise(BLOCKED)
    run.wait_state("web", "WAITING")
    post(run, "web/stop")
    assert run.state("web") == "STOPPED"
    run.ask("/programs/web/start", "POST")
    run.wait_state("web", "WAITING")
    run.ask("/programs/web/restart", "POST")
    assert "migrate" in run.wait_state("web", "WAITING")["reason"]
    reload(run, BLOCKED.replace('depends_on = ["migrate"]', "startsecs = 0"))
    run.wait_state("web", "RUNNING")
    reload(run, BLOCKED)
    run.wait_state("web", "WAITING")
    assert run.end() == 0


def test_a_oneshot_can_be_stopped_started_and_restarted_while_it_works(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    gate("migration")
    run = supervise(BLOCKED)

    def migrations(number: int) -> int:
        pids = eventually(
            lambda: lines(tmp_path / "migrations"), lambda found: len(found) == number
        )
        assert [is_alive(int(pid)) for pid in pids] == [False] * (number - 1) + [True]
        return int(run.wait_state("migrate", "RUNNING")["restarts"])

    migrations(1)
    run.ask("/programs/migrate/restart", "POST")
    assert migrations(2) == 0
    post(run, "migrate/stop")
    assert run.state("migrate") == "STOPPED"
    assert "migrate" in run.wait_state("web", "WAITING")["reason"]
    run.ask("/programs/migrate/start", "POST")
    assert migrations(3) == 0
    reload(run, BLOCKED.replace("exit 1", "exit 2"))
    assert migrations(4) == 0
    assert run.end() == 0


def test_orders_during_a_check_are_carried_out_at_once_and_end_the_check(
    supervise: Supervise, tmp_path: Path
) -> None:
    check = sh("echo $$ >> checks; exec sleep 1000")
    config = f"""
        [programs.web]
        command = "sleep 1000"
        startsecs = 0
        healthcheck.command = {check}
        healthcheck.timeout = 90
    """
    run = supervise(config)

    def checks(number: int) -> int:
        pids = eventually(
            lambda: lines(tmp_path / "checks"), lambda found: len(found) == number
        )
        alive = [False] * (number - 1) + [True]
        eventually(lambda: [is_alive(int(pid)) for pid in pids], alive)
        return int(pids[-1])

    pid = checks(1)
    post(run, "web/stop")
    assert run.state("web") == "STOPPED"
    eventually(lambda: is_alive(pid), False)
    run.ask("/programs/web/start", "POST")
    checks(2)
    run.ask("/programs/web/restart", "POST")
    checks(3)
    reload(run, config.replace("sleep 1000", "sleep 999", 1))
    checks(4)
    assert run.end() == 0


def test_the_program_may_end_during_its_check(
    supervise: Supervise, tmp_path: Path
) -> None:
    check = sh("echo $$ >> checks; exec sleep 1000")
    run = supervise(f"""
        [programs.web]
        command = "sleep 1000"
        startsecs = 0
        autorestart = true
        healthcheck.command = {check}
        healthcheck.timeout = 90
    """)
    first = int(eventually(lambda: lines(tmp_path / "checks"), len)[0])
    os.kill(run.status("web")["pid"], signal.SIGKILL)
    eventually(lambda: len(lines(tmp_path / "checks")), 2)
    eventually(lambda: is_alive(first), False)
    assert run.wait_state("web", "RUNNING")["restarts"] == 1


# === Random sequences of events against the pure machine =======================


class World:
    """The processes of one program: what the state machine's actions do, and meet.

    `wanted` is the last order; a program that is not wanted must not be started.
    """

    def __init__(self, program: supervisors.Program, seed: int) -> None:
        self.program = program
        self.random = random.Random(seed)
        self.now = 1000.0
        self.status = supervisors.Status()
        self.leader: int | None = None
        self.members = False
        self.wanted = False
        self.pids = 0

    def feed(self, event: supervisors.Event) -> None:
        self.status, action = supervisors.step(
            self.program, self.now, self.status, event
        )
        if isinstance(action, supervisors.Spawn):
            self.feed(self.spawn())
        elif action is not None:
            assert self.leader or self.members, "a signal to nobody"
        if action == supervisors.Signal("KILL") and not self.leader:
            self.empty()

    def spawn(self) -> supervisors.Event:
        assert self.wanted, "started against the last order"
        assert not self.leader, "two leaders"
        assert not self.members, "started while its old group lives"
        if self.random.random() < 0.1:
            return supervisors.SpawnFailed("no such command", 127)
        if self.random.random() < 0.2:
            return supervisors.Blocked("waiting for db", "")
        self.pids += 1
        self.leader, self.members = self.pids, True
        return supervisors.Spawned(self.pids)

    def exit(self, survivors: bool) -> None:
        self.leader, self.members = None, survivors
        if self.random.random() < 0.2:
            self.feed(supervisors.Exited(-9, survivors))
        else:
            code = self.random.choice([0, 0, 1, 3])
            self.feed(supervisors.Exited(code, survivors))

    def empty(self) -> None:
        self.members = False
        self.feed(supervisors.Emptied())

    def due(self) -> None:
        if self.status.deadline is not None:
            self.now = max(self.now, self.status.deadline)
            self.feed(supervisors.Due())
            later = self.status.deadline is None or self.status.deadline > self.now
            assert later or self.status.state is supervisors.State.STARTING

    def order(self, event: supervisors.Event, wanted: bool) -> None:
        self.wanted = wanted
        self.feed(event)

    def happen(self) -> None:
        """Let something happen that can."""
        self.now += self.random.choice([0.0, 0.01, 0.5, 2.0, 40.0])
        can: list[Callable[[], None]] = [
            lambda: self.order(supervisors.Start(), True),
            lambda: self.order(supervisors.Stop(), False),
            lambda: self.order(supervisors.Restart(), True),
            lambda: self.feed(supervisors.Told("READY=1")),
            lambda: self.feed(supervisors.Told("WATCHDOG=1")),
            lambda: self.feed(supervisors.Told("STATUS=busy")),
            lambda: self.feed(supervisors.Checked("")),
            lambda: self.feed(supervisors.Checked("no answer")),
            lambda: self.feed(supervisors.Due()),
            self.due,
            self.due,
        ]
        if self.leader:
            can += [lambda: self.exit(False)] * 3 + [lambda: self.exit(True)]
        elif self.members:
            can += [self.empty] * 3
        self.random.choice(can)()

    def is_sound(self) -> None:
        """Assert that the status tells the truth, and that nothing waits forever."""
        state, status, deadline = supervisors.State, self.status, self.status.deadline
        assert status.pid == self.leader
        assert status.is_alive == bool(self.leader or self.members)
        assert self.leader or not self.members or status.state is state.STOPPING
        if status.state in (state.STOPPED, state.EXITED, state.FATAL):
            assert deadline is None
        elif status.state in (state.BACKOFF, state.STOPPING):
            assert deadline is not None
        elif status.state is state.STARTING:
            assert (deadline is None) == (self.program.type == "notify")
        elif status.state is state.WAITING:
            assert status.reason
        elif self.program.watchdog_secs is not None:
            assert deadline is not None
        if not self.wanted:
            assert status.state not in (state.STARTING, state.RUNNING, state.BACKOFF)


@pytest.mark.parametrize("kind", ["simple", "oneshot", "notify"])
def test_random_events_never_break_the_machine(kind: str) -> None:
    for seed in range(150):
        choose = random.Random(seed).choice
        table: dict[str, object] = {
            "command": "x",
            "type": kind,
            "autorestart": choose([False, True, "unexpected"]),
            "startsecs": choose([0, 1]),
            "stopasgroup": choose([False, True]),
        }
        if choose([False, True]):
            table["startretries"] = choose([0, 2])
        if kind == "notify" and choose([False, True]):
            table["watchdog_secs"] = 1
        if kind != "oneshot" and choose([False, True]):
            table["healthcheck"] = {"tcp": "localhost:1", "retries": choose([1, 3])}
        config = supervisors.parse_config({"programs": {"web": table}}, {})
        world = World(config.programs["web"], seed)
        for _ in range(60):
            world.happen()
            world.is_sound()
        # Whatever it has been through, a stop brings it to rest.
        world.order(supervisors.Stop(), False)
        for _ in range(3):
            world.due()
            if world.leader:
                world.exit(False)
        assert world.status.state is supervisors.State.STOPPED
        world.is_sound()


# === The verbs ========================================================================
#
# Each is the script run a second time, in the folder of the configuration, as a person
# or another script would.

FAST = "[defaults]\nstartsecs = 0\n"
SLEEP = 'command = "sleep 1000"\n'
# Nothing of it reacts to URG, so it is STOPPING until somebody kills it.
HARD_TO_STOP = SLEEP + 'stopsignal = "URG"\nstopwaitsecs = 1000\n'
TALKER = """
import itertools, signal
numbers = itertools.count(1)
signal.signal(signal.SIGUSR1, lambda *_: print("line", next(numbers), flush=True))
print("ready", flush=True)
while True:
    signal.pause()
"""


def own_environment(**variables: str) -> dict[str, str]:
    """Return the environment without what would change a verb or a pytest in it."""
    unwanted = ("SUPERVISOR", "PYTEST", "NO_COLOR", "XDG_RUNTIME", "NOTIFY_SOCKET")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    return kept | {"TERM": "xterm"} | variables


def run_verb(
    folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the script with `arguments` in a folder; keep what it prints.

    As a module, so with cached bytecode: that halves the time of every call.
    """
    return subprocess.run(
        [PYTHON, "-m", SCRIPT.stem, *arguments],
        cwd=folder,
        env=own_environment(PYTHONPATH=str(SCRIPT.parent), **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def rewrite(run: Run, config: str, listen: str = '""') -> None:
    """Replace the configuration of a supervisor that the fixture has started."""
    head = f'listen = {listen}\ncontrol = "s"\n'
    (run.folder / "supervisors.toml").write_text(head + config)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def is_one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith("\n")


class Shared(NamedTuple):
    run: Run
    port: int


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Keep one supervisor for all tests that change nothing in it."""
    port = free_port()
    with supervising(tmp_path_factory.mktemp("shared")) as start:
        run = start(
            f"""
            token = "sesame"
            allowed_hosts = ["proxy.example"]
            {FAST}
            [programs.web]
            {SLEEP}
            [programs.a-longer-name]
            {SLEEP}autostart = false
            [programs.done]
            command = "true"
            [programs.slow]
            {SLEEP}startsecs = 1000
            [programs.broken]
            command = "no-such-command"
            """,
            listen=f'"127.0.0.1:{port}"',
        )
        pid = run.wait_state("web", "RUNNING")["pid"]
        run.wait_state("done", "EXITED")
        run.wait_state("slow", "STARTING")
        run.wait_state("broken", "FATAL")
        yield Shared(run, port)
        assert run.status("web")["pid"] == pid


def test_status_verb_prints_aligned_columns(shared: Shared) -> None:
    answer = run_verb(shared.run.folder, "status")
    lines = answer.stdout.splitlines()
    words = [line.split()[:2] for line in lines]
    assert words == [
        ["web", "RUNNING"],
        ["a-longer-name", "STOPPED"],
        ["done", "EXITED"],
        ["slow", "STARTING"],
        ["broken", "FATAL"],
    ]
    column = len("a-longer-name") + 3
    assert all(
        line[:column].split() == word[:1]
        for line, word in zip(lines, words, strict=True)
    )
    assert all(
        line[column:].startswith(word[1])
        for line, word in zip(lines, words, strict=True)
    )
    pid = shared.run.status("web")["pid"]
    assert re.search(rf"pid {pid}, uptime 0:\d\d:\d\d$", lines[0])
    assert "no-such-command" in lines[4]
    assert answer.stderr == ""


def test_status_verb_is_3_while_something_is_not_as_wanted(shared: Shared) -> None:
    def code(*names: str) -> int:
        return run_verb(shared.run.folder, "status", *names).returncode

    assert code() == 3
    assert code("slow") == 3
    assert code("broken") == 3
    assert code("web", "done", "a-longer-name") == 0


def test_status_verb_as_json_is_the_array_of_the_http_answer(shared: Shared) -> None:
    shown = json.loads(run_verb(shared.run.folder, "status", "--json").stdout)
    changing = {"uptime": None, "description": None}
    assert [one | changing for one in shown] == [
        one | changing for one in shared.run.ask("/status")[1]
    ]
    one = json.loads(run_verb(shared.run.folder, "status", "--json", "done").stdout)
    assert [status["name"] for status in one] == ["done"]


def test_stop_start_and_restart_verbs_wait_and_say_the_outcome(
    supervise: Supervise,
) -> None:
    run = supervise(f"{FAST}[programs.web]\n{SLEEP}[programs.db]\n{SLEEP}")
    db = run.wait_state("db", "RUNNING")["pid"]
    first = run.wait_state("web", "RUNNING")["pid"]

    def outcome(*arguments: str, state: str) -> str:
        answer = run_verb(run.folder, *arguments)
        assert run.state("web") == state
        assert (answer.returncode, answer.stderr) == (0, "")
        assert is_one_line(answer.stdout)
        assert "web" in answer.stdout
        return answer.stdout

    assert "stopped" in outcome("stop", "web", state="STOPPED")
    assert not is_alive(first)
    assert "not running" in outcome("stop", "web", state="STOPPED")
    started = outcome("start", "web", state="RUNNING")
    second = run.status("web")["pid"]
    assert f"pid {second}" in started
    assert "already running" in outcome("start", "web", state="RUNNING")
    assert run.status("web")["pid"] == second
    outcome("restart", "web", state="RUNNING")
    assert run.status("web")["pid"] not in (first, second)
    assert run.status("web")["restarts"] == 0
    assert run.status("db")["pid"] == db


def test_verbs_take_several_names_globs_groups_and_all(supervise: Supervise) -> None:
    run = supervise(
        f"{FAST}[programs.api]\nnumprocs = 2\n{SLEEP}[programs.web]\n{SLEEP}"
        f"[programs.worker]\n{SLEEP}"
    )
    names = ["api:0", "api:1", "web", "worker"]
    for name in names:
        run.wait_state(name, "RUNNING")

    def stopped_after(verb: str, name: str) -> list[str]:
        assert run.ask(f"/programs/{name}/{verb}?wait=30", "POST")[0] == 200
        return [n for n in names if run.state(n) == "STOPPED"]

    assert stopped_after("stop", "api:*") == ["api:0", "api:1"]
    assert stopped_after("start", "api") == []
    assert stopped_after("stop", "api:1,w*") == ["api:1", "web", "worker"]
    assert stopped_after("start", "all") == []
    answer = run_verb(run.folder, "stop", "api:1", "w*", "web")
    shown = [line.partition(": ")[0] for line in answer.stdout.splitlines()]
    assert (answer.returncode, shown) == (0, ["api:1", "web", "worker"])
    assert run.state("api:0") == "RUNNING"


def test_names_of_instances_still_match_where_only_one_is_left(shared: Shared) -> None:
    for name in ("web:*", "web:0"):
        (status,) = shared.run.ask(f"/status/{name}")[1]
        assert status["name"] == "web"
    assert shared.run.ask("/status/web:1")[0] == 404


def test_start_verb_is_1_with_the_reason_when_the_program_fails(
    supervise: Supervise,
) -> None:
    run = supervise(
        """
        [defaults]
        autostart = false
        [programs.missing]
        command = "no-such-command"
        [programs.crashing]
        command = "sh -c 'exit 7'"
        autorestart = true
        [programs.migration]
        type = "oneshot"
        command = "sh -c 'exit 3'"
        [programs.good-migration]
        type = "oneshot"
        command = "true"
        """
    )

    def start(name: str) -> tuple[int, str]:
        answer = run_verb(run.folder, "start", name)
        return answer.returncode, answer.stdout + answer.stderr

    code, shown = start("missing")
    assert code == 1 and "no-such-command" in shown and "FATAL" in shown
    code, shown = start("crashing")
    assert code == 1 and "exit code 7" in shown and "BACKOFF" in shown
    code, shown = start("migration")
    assert code == 1 and "exit code 3" in shown and "EXITED" in shown
    assert start("good-migration")[0] == 0
    assert run.state("good-migration") == "EXITED"


def test_t_limits_the_wait_of_a_verb_and_no_wait_does_without(
    supervise: Supervise,
) -> None:
    run = supervise(f'[programs.slow]\ntype = "notify"\nautostart = false\n{SLEEP}')
    limited = run_verb(run.folder, "start", "-t", "0.1", "slow")
    assert limited.returncode == 1
    assert "STARTING" in limited.stdout + limited.stderr
    assert run_verb(run.folder, "stop", "slow").returncode == 0
    assert run_verb(run.folder, "start", "slow", "--no-wait").returncode == 0
    assert run.wait_state("slow", "STARTING")["ready"] is False


def test_signal_verb_signals_the_program(supervise: Supervise) -> None:
    run = supervise(
        "[programs.web]\ncommand = " + "['sh', '-c', '''"
        "trap 'echo hup >got' HUP; echo up; while :; do sleep 0.01; done''']"
    )
    eventually(lambda: run.ask("/programs/web/logs")[1], "up\n")
    answer = run_verb(run.folder, "signal", "SIGHUP", "web")
    assert answer.returncode == 0, answer
    eventually((run.folder / "got").exists)
    assert run_verb(run.folder, "signal", "NOPE", "web").returncode == 2


def test_health_verb_is_0_or_1_and_nothing_else(supervise: Supervise) -> None:
    run = supervise(f"{FAST}[programs.web]\n{SLEEP}[programs.db]\n{SLEEP}")
    run.wait_state("web", "RUNNING")
    pid = run.wait_state("db", "RUNNING")["pid"]
    assert run_verb(run.folder, "health").returncode == 0
    os.kill(pid, signal.SIGKILL)
    run.wait_state("db", "EXITED")
    sick = run_verb(run.folder, "health")
    assert sick.returncode == 1
    assert "db" in sick.stdout + sick.stderr
    assert run_verb(run.folder, "health", "web").returncode == 0
    assert run_verb(run.folder, "health", "wbe").returncode == 1
    assert run_verb(run.folder, "health", "--nope").returncode == 1
    before = ("-c", "supervisors.toml")
    assert run_verb(run.folder, *before, "health", "--json").returncode == 1
    run.end()
    assert run_verb(run.folder, "health").returncode == 1
    assert run_verb(run.folder, "stop", "health").returncode == 4


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A supervisor whose program has printed something."""
    with supervising(tmp_path_factory.mktemp("talking")) as start:
        command = "['sh', '-c', 'echo hello; exec sleep 1000']"
        run = start(f"{FAST}[programs.web]\ncommand = {command}")
        eventually(lambda: run.ask("/programs/web/logs")[1], "hello\n")
        yield run


@pytest.mark.parametrize(
    "verb",
    ["health", "status", "start web", "check", "logs web", "logs -f web", "--help"],
)
def test_verb_whose_output_cannot_be_written_is_1(talking: Run, verb: str) -> None:
    """Into a full disk with the reason, into a pipe that nobody reads without."""
    read_end, pipe = os.pipe()
    os.close(read_end)
    full = os.open("/dev/full", os.O_WRONLY)
    for fd, reason in ((pipe, ""), (full, "No space left on device")):
        done = subprocess.run(
            [PYTHON, str(SCRIPT), *verb.split()],
            cwd=talking.folder,
            env=own_environment(PYTHONUNBUFFERED=""),
            stdout=fd,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
        )
        os.close(fd)
        assert done.returncode == 1
        assert reason in done.stderr
        assert done.stderr.count("\n") == bool(reason)


@pytest.mark.parametrize("verb", ["health", "status", "logs web", "--help"])
def test_verb_with_its_output_closed_is_no_traceback(talking: Run, verb: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" "$1" {verb} >&-', PYTHON, str(SCRIPT)],
        cwd=talking.folder,
        env=own_environment(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == (verb == "logs web")
    assert "Traceback" not in done.stderr


def test_ctrl_c_of_the_health_verb_is_1(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "s"))
        listener.listen()
        verb = subprocess.Popen(
            [PYTHON, str(SCRIPT), "-s", "unix:s", "health"],
            cwd=tmp_path,
            env=own_environment(),
        )
        connection = listener.accept()[0]  # it waits for an answer
        with connection:
            verb.send_signal(signal.SIGINT)
            assert verb.wait(LIMIT) == 1


def test_file_that_is_named_as_a_verb_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "health").write_text("no TOML")
    assert run_verb(tmp_path, "-c", "health").returncode == 2


def test_verbs_are_4_where_nothing_is_listened_on(tmp_path: Path) -> None:
    head = 'control = ""\nlisten = ""\n'
    (tmp_path / "supervisors.toml").write_text(f"{head}[programs.web]\n{SLEEP}")
    done = run_verb(tmp_path, "status")
    assert done.returncode == 4
    assert "use -s" in done.stderr


def test_client_takes_whichever_address_a_host_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not socket.has_ipv6:
        cannot("no IPv6")
    lookup = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **more: Any) -> Any:
        return lookup("::1" if host == "six.test" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        client = supervisors.Client(f"six.test:{server.getsockname()[1]}")
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(client.health)
            server.settimeout(LIMIT)
            with server.accept()[0] as peer:
                assert b"\r\nHost: six.test:" in peer.recv(4096)
                peer.sendall(b'HTTP/1.1 200 OK\r\n\r\n{"status": "ok"}')
            assert asked.result(LIMIT) == {"status": "ok"}


def test_an_inherited_address_is_of_no_concern_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERVISOR_SERVER_URL", "http://supervisor")
    (tmp_path / "supervisors.toml").write_text(f"[programs.web]\n{SLEEP}")
    assert supervisors_py("check", cwd=tmp_path).returncode == 0
    assert supervisors_py("status", cwd=tmp_path).returncode == 2


def test_a_supervisor_may_be_asked_by_its_hosts_name(tmp_path: Path) -> None:
    done = supervisors_py("-s", "nowhere.invalid:9001", "status", cwd=tmp_path)
    assert done.returncode == 4
    assert "no supervisor at nowhere.invalid:9001" in done.stderr


def test_shutdown_verb_ends_the_supervisor_with_0(supervise: Supervise) -> None:
    run = supervise(f"[programs.web]\n{SLEEP}")
    answer = run_verb(run.folder, "shutdown")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert run.popen.wait(LIMIT) == 0
    assert not (run.folder / "s").exists()


def test_an_unknown_name_is_4_with_the_nearest_in_one_line(shared: Shared) -> None:
    for verb in (["status"], ["signal", "HUP"]):
        answer = run_verb(shared.run.folder, *verb, "bronken")
        assert answer.returncode == 4
        assert is_one_line(answer.stderr)
        assert "'bronken'" in answer.stderr and "'broken'" in answer.stderr
    # One wrong name, and nothing is done.
    assert run_verb(shared.run.folder, "stop", "web", "x*").returncode == 4


@pytest.mark.parametrize("verb", ["status", "stop web", "logs -f", "shutdown"])
def test_without_a_supervisor_a_verb_is_4_and_names_the_socket(
    tmp_path: Path, verb: str
) -> None:
    config = f'listen = "127.0.0.1:{free_port()}"\ncontrol = "my.sock"\n'
    (tmp_path / "supervisors.toml").write_text(config + f"[programs.web]\n{SLEEP}")
    answer = run_verb(tmp_path, *verb.split())
    assert (answer.returncode, answer.stdout) == (4, "")
    assert is_one_line(answer.stderr)
    assert "my.sock" in answer.stderr


def test_without_a_supervisor_the_derived_socket_is_named(tmp_path: Path) -> None:
    config = f'listen = ""\n[programs.web]\n{SLEEP}'
    (tmp_path / "supervisors.toml").write_text(config)
    answer = run_verb(tmp_path, "status", XDG_RUNTIME_DIR=str(tmp_path))
    assert answer.returncode == 4
    assert is_one_line(answer.stderr)
    assert re.search(r"supervisors-[0-9a-f]{8}\.sock", answer.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        "start",
        "signal HUP",
        "status --nope",
        "stop web -t soon",
        "logs -n few",
        "-c",
        "-s foo status",
    ],
)
def test_a_bad_command_line_is_2(tmp_path: Path, arguments: str) -> None:
    answer = run_verb(tmp_path, *arguments.split())
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_number_that_is_none_gets_what_was_expected(tmp_path: Path) -> None:
    few = run_verb(tmp_path, "logs", "-n", "few").stderr
    assert "-n: expected a whole number >= 0, got 'few'" in few
    soon = run_verb(tmp_path, "stop", "web", "-t", "soon").stderr
    assert "-t: expected seconds from 0 to 300, got 'soon'" in soon


def test_verbs_work_from_inside_a_program_without_an_option(
    supervise: Supervise,
) -> None:
    command = f"{PYTHON} {SCRIPT} stop web && exec {PYTHON} {SCRIPT} status --json"
    run = supervise(
        f"""{FAST}
        [programs.web]
        {SLEEP}
        [programs.inner]
        command = ["sh", "-c", "{command}"]
        directory = "/"
        depends_on = ["web"]
        logfile = "inner.log"
        """
    )
    assert run.wait_state("inner", "EXITED")["exit_code"] == 0
    stop, _, status = (run.folder / "inner.log").read_text().partition("\n")
    assert "web" in stop
    states = {s["name"]: s["state"] for s in json.loads(status)}
    assert states == {"web": "STOPPED", "inner": "RUNNING"}


def test_a_program_may_restart_itself_with_the_verb(supervise: Supervise) -> None:
    command = (
        "echo x >>starts; if [ $(wc -l <starts) = 1 ]; "
        f"then {PYTHON} {SCRIPT} restart me; fi; exec sleep 1000"
    )
    run = supervise(f"{FAST}[programs.me]\ncommand = ['sh', '-c', '{command}']")
    eventually(lambda: (run.folder / "starts").read_text(), "x\nx\n")
    run.wait_state("me", "RUNNING")
    assert run.status("me")["restarts"] == 0


def test_verbs_work_while_the_configuration_is_broken(supervise: Supervise) -> None:
    run = supervise(f"{FAST}[programs.web]\n{SLEEP}")
    rewrite(run, "nonsense = 1\n[programs.web]\nautorestrat = true\n")
    assert run_verb(run.folder, "stop", "web").returncode == 0
    assert run.state("web") == "STOPPED"


def test_verbs_find_the_derived_socket_of_a_file_that_is_no_toml(
    supervise: Supervise,
) -> None:
    folder = supervise("", ready=False).folder  # ends at once: it has no programs
    (folder / "own.toml").write_text(f'listen = ""\n{FAST}[programs.web]\n{SLEEP}')
    runtime = {"XDG_RUNTIME_DIR": str(folder)}
    arguments = ("-c", "own.toml")
    own = supervise("", ready=False, arguments=arguments, env=runtime)

    def verb(*words: str) -> int:
        return run_verb(folder, *words, *arguments, **runtime).returncode

    eventually(lambda: verb("status"), 0)
    (folder / "own.toml").write_text("this is [no TOML")
    assert verb("stop", "web") == 0
    assert verb("reload") == 1
    assert verb("shutdown") == 0
    assert own.popen.wait(LIMIT) == 0


def test_whom_a_verb_talks_to(shared: Shared, tmp_path: Path) -> None:
    folder = shared.run.folder
    nowhere = {"SUPERVISOR_SERVER_URL": "unix:///nowhere"}

    def code(folder: Path, *words: str, **variables: str) -> int:
        return run_verb(folder, *words, "web", **variables).returncode

    assert code(folder, "status", **nowhere) == 4
    assert code(folder, "-c", "supervisors.toml", "status", **nowhere) == 0
    assert code(folder, "status", "-c", "supervisors.toml", **nowhere) == 0
    assert code(tmp_path, "-s", f"unix:{folder / 's'}", "status", **nowhere) == 0
    assert code(tmp_path, "status", "--server", f"unix://{folder / 's'}") == 0
    url = f"unix://{folder / 's'}"
    assert code(tmp_path, "status", SUPERVISOR_SERVER_URL=url) == 0


def test_verbs_over_tcp_take_the_token_from_the_environment_or_the_file(
    shared: Shared, tmp_path: Path
) -> None:
    server = f"127.0.0.1:{shared.port}"
    order = ("signal", "URG", "web")
    assert run_verb(tmp_path, "-s", server, "status", "web").returncode == 0
    refused = run_verb(tmp_path, "-s", server, *order)
    assert refused.returncode == 1
    assert "token" in refused.stderr
    token = {"SUPERVISOR_TOKEN": "sesame"}
    assert run_verb(tmp_path, "-s", f"http://{server}", *order, **token).returncode == 0
    file = ("-c", str(shared.run.folder / "supervisors.toml"))
    assert run_verb(tmp_path, "-s", server, *file, *order).returncode == 0


def test_status_and_health_do_without_a_control_socket(supervise: Supervise) -> None:
    port = free_port()
    folder = supervise("", ready=False).folder  # ends at once: it has no programs
    (folder / "own.toml").write_text(
        f'listen = "127.0.0.1:{port}"\ncontrol = ""\n{FAST}[programs.web]\n{SLEEP}'
    )
    supervise("", ready=False, arguments=("own.toml",))
    verb = ("-c", "own.toml")
    eventually(lambda: run_verb(folder, *verb, "status").returncode, 0)
    assert run_verb(folder, *verb, "health").returncode == 0
    refused = run_verb(folder, *verb, "stop", "web")
    assert refused.returncode == 1
    assert is_one_line(refused.stderr)


# === Control over HTTP ================================================================


def test_a_post_without_wait_is_202_and_with_wait_200_when_known(
    supervise: Supervise,
) -> None:
    run = supervise(f"{FAST}[programs.web]\n{SLEEP}[programs.slow]\n{HARD_TO_STOP}")
    run.wait_state("web", "RUNNING")
    run.wait_state("slow", "RUNNING")
    code, status = run.ask("/programs/web/stop?wait=30", "POST")
    assert (code, status["name"], status["state"]) == (200, "web", "STOPPED")
    code, status = run.ask("/programs/slow/stop", "POST")
    assert (code, status["name"]) == (202, "slow")
    code, status = run.ask("/programs/slow/stop?wait=0.05", "POST")
    assert (code, status["state"]) == (202, "STOPPING")
    os.kill(run.status("slow")["pid"], signal.SIGKILL)
    code, status = run.ask("/programs/slow/stop?wait=30", "POST")
    assert (code, status["state"]) == (200, "STOPPED")
    code, both = run.ask("/programs/web,slow/start?wait=30", "POST")
    assert code == 200
    assert [s["state"] for s in both] == ["RUNNING", "RUNNING"]
    os.kill(run.status("slow")["pid"], signal.SIGKILL)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/programs/web/stop?wait=soon", 400),
        ("/programs/web/stop?wait=-1", 400),
        ("/programs/web/stop?wait=301", 400),
        ("/programs/web/stop?wait=nan", 400),
        ("/programs/web/signal", 400),
        ("/programs/web/signal?signal=NOPE", 400),
        ("/programs/wbe/stop", 404),
        ("/programs/web/explode", 404),
        ("/programs/web/stop/", 404),
        ("/programs/web/__class__", 404),
        ("/status", 405),
        ("/programs/web/logs", 405),
    ],
)
def test_a_post_that_makes_no_sense_is_refused(
    shared: Shared, path: str, code: int
) -> None:
    run = shared.run
    pid = run.status("web")["pid"]
    answered, body = run.ask(path, "POST")
    assert answered == code
    assert isinstance(body["error"], str)
    assert run.status("web")["pid"] == pid


# === Reload ===========================================================================


def test_reload_of_50_programs_leaves_48_alone(supervise: Supervise) -> None:
    names = [f"p{i:02}" for i in range(50)]
    run = supervise(FAST + "".join(f"[programs.{n}]\n{SLEEP}" for n in names))
    eventually(lambda: {s["state"] for s in run.ask("/status")[1]}, {"RUNNING"})
    before = {s["name"]: s["pid"] for s in run.ask("/status")[1]}
    wanted = [*names[:10], *names[11:], "new"]
    config = "".join(f"[programs.{n}]\n{SLEEP}" for n in wanted)
    rewrite(
        run, FAST + config.replace("[programs.p20]\n", "[programs.p20]\numask='077'\n")
    )
    code, answer = run.ask("/reload", "POST")
    assert (code, answer) == (
        200,
        {"added": ["new"], "changed": ["p20"], "removed": ["p10"], "unchanged": 48},
    )

    def pids() -> dict[str, int]:
        statuses = run.ask("/status")[1]
        return {s["name"]: s["pid"] for s in statuses if s["state"] == "RUNNING"}

    after = eventually(
        pids, lambda now: list(now) == wanted and now["p20"] != before["p20"]
    )
    untouched = [name for name in wanted if name not in ("new", "p20")]
    assert {n: after[n] for n in untouched} == {n: before[n] for n in untouched}
    eventually(lambda: is_alive(before["p10"]), False)
    assert run.ask("/status/p10")[0] == 404


def test_reload_by_verb_and_by_signal(supervise: Supervise) -> None:
    run = supervise(f"[programs.web]\n{SLEEP}")
    rewrite(run, f"[programs.web]\n{SLEEP}[programs.new]\n{SLEEP}")
    answer = run_verb(run.folder, "reload")
    assert answer.returncode == 0, answer
    assert "new" in answer.stdout
    assert run.ask("/status/new")[0] == 200
    rewrite(run, f"[programs.web]\n{SLEEP}[programs.newer]\n{SLEEP}")
    run.send(signal.SIGHUP)
    eventually(lambda: run.ask("/status/newer")[0], 200)


BROKEN = """
nonsense = 1
[programs.web]
command = "sleep 2000"
autorestrat = true
[programs.db]
command = "sleep 1000"
stopwaitsecs = -1
"""


def test_reload_of_a_broken_file_changes_nothing_and_tells_all_errors(
    supervise: Supervise,
) -> None:
    run = supervise(f"{FAST}[programs.web]\n{SLEEP}")
    pid = run.wait_state("web", "RUNNING")["pid"]
    rewrite(run, BROKEN)
    code, answer = run.ask("/reload", "POST")
    assert code == 422
    assert isinstance(answer["error"], str)
    assert len(answer["errors"]) == 3
    errors = "\n".join(answer["errors"])
    for key in ("nonsense", "programs.web.autorestrat", "programs.db.stopwaitsecs"):
        assert key in errors
    verb = run_verb(run.folder, "reload")
    assert verb.returncode == 1
    assert all(error in verb.stderr for error in answer["errors"])
    run.send(signal.SIGHUP)
    run.wait_err("programs.db.stopwaitsecs")
    (run.folder / "supervisors.toml").write_text("[programs.web\n")
    code, answer = run.ask("/reload", "POST")
    assert code == 422
    assert "line 1" in answer["errors"][0]
    (run.folder / "supervisors.toml").unlink()
    assert run.ask("/reload", "POST")[0] == 422
    assert [(s["name"], s["pid"]) for s in run.ask("/status")[1]] == [("web", pid)]


def test_reload_in_the_middle_of_a_start(supervise: Supervise) -> None:
    starting = f"{SLEEP}startsecs = 1000\n"
    run = supervise(
        f"[programs.a]\n{starting}[programs.b]\n{starting}[programs.c]\n{starting}"
    )
    pids = {n: run.wait_state(n, "STARTING")["pid"] for n in "abc"}
    rewrite(run, f"[programs.a]\nstartsecs=0\n{SLEEP}[programs.c]\n{starting}")
    assert run.ask("/reload", "POST")[0] == 200
    assert run.wait_state("a", "RUNNING")["pid"] != pids["a"]
    eventually(lambda: run.ask("/status/b")[0], 404)
    assert not is_alive(pids["b"])
    assert (run.state("c"), run.status("c")["pid"]) == ("STARTING", pids["c"])


def test_reload_in_the_middle_of_a_backoff(supervise: Supervise) -> None:
    crashing = (
        'command = "false"\nautorestart=true\nbackoff_delay=1000\nbackoff_limit=1000\n'
    )
    run = supervise("".join(f"[programs.{n}]\n{crashing}" for n in "abc"))
    for name in "abc":
        run.wait_state(name, "BACKOFF")
    rewrite(run, f"[programs.a]\n{SLEEP}startsecs=0\n[programs.c]\n{crashing}")
    assert run.ask("/reload", "POST")[0] == 200
    run.wait_state("a", "RUNNING")
    eventually(lambda: run.ask("/status/b")[0], 404)
    assert run.state("c") == "BACKOFF"


def test_reload_in_the_middle_of_a_stop(supervise: Supervise) -> None:
    names = ("removed", "again", "restarting", "stopped")
    run = supervise(FAST + "".join(f"[programs.{n}]\n{HARD_TO_STOP}" for n in names))
    pids = {n: run.wait_state(n, "RUNNING")["pid"] for n in names}
    run.ask("/programs/removed,stopped/stop", "POST")
    run.ask("/programs/restarting/restart", "POST")
    changed = HARD_TO_STOP.replace("sleep 1000", "sleep 2000")
    rewrite(run, f"{FAST}[programs.restarting]\n{changed}[programs.stopped]\n{changed}")
    assert run.ask("/reload", "POST")[0] == 200
    for name in names:
        run.wait_state(name, "STOPPING")
    rewrite(
        run,
        f"{FAST}[programs.restarting]\n{changed}[programs.stopped]\n{changed}"
        f"[programs.again]\n{changed}",
    )
    assert run.ask("/reload", "POST")[0] == 200
    assert all(is_alive(pid) for pid in pids.values())
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    for name in ("again", "restarting"):
        pid = run.wait_state(name, "RUNNING")["pid"]
        assert b"2000" in Path(f"/proc/{pid}/cmdline").read_bytes()
    run.wait_state("stopped", "STOPPED")
    eventually(lambda: run.ask("/status/removed")[0], 404)
    run.ask("/shutdown", "POST")
    run.send(signal.SIGTERM)


def test_reload_restarts_what_ran_and_starts_what_failed_but_not_what_was_stopped(
    supervise: Supervise,
) -> None:
    run = supervise(
        f"{FAST}[programs.stopped]\n{SLEEP}[programs.failed]\ncommand = 'false'\n"
        f"[programs.by-hand]\nautostart = false\ncommand = 'false'\n"
        f"[programs.fatal]\ncommand = 'no-such-command'\n"
    )
    run.ask("/programs/stopped/stop?wait=30", "POST")
    run.ask("/programs/by-hand/start?wait=30", "POST")
    run.wait_state("by-hand", "EXITED")
    run.wait_state("failed", "EXITED")
    run.wait_state("fatal", "FATAL")
    changed = SLEEP.replace("1000", "2000")
    rewrite(
        run,
        f"{FAST}[programs.stopped]\n{changed}[programs.failed]\n{changed}"
        f"[programs.by-hand]\nautostart = false\n{changed}[programs.fatal]\n{changed}",
    )
    assert len(run.ask("/reload", "POST")[1]["changed"]) == 4
    run.wait_state("failed", "RUNNING")
    run.wait_state("fatal", "RUNNING")
    assert run.state("stopped") == "STOPPED"
    assert run.state("by-hand") == "EXITED"
    pid = run.ask("/programs/stopped/start?wait=30", "POST")[1]["pid"]
    assert b"2000" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_reload_with_another_numprocs_keeps_the_instances(supervise: Supervise) -> None:
    run = supervise(f"{FAST}[programs.web]\nnumprocs = 2\n{SLEEP}")
    zero = run.wait_state("web:0", "RUNNING")["pid"]
    one = run.wait_state("web:1", "RUNNING")["pid"]
    rewrite(run, f"{FAST}[programs.web]\nnumprocs = 3\n{SLEEP}")
    answer = run.ask("/reload", "POST")[1]
    assert (answer["added"], answer["changed"], answer["unchanged"]) == (
        ["web:2"],
        [],
        2,
    )
    run.wait_state("web:2", "RUNNING")
    rewrite(run, f"{FAST}[programs.web]\nnumprocs = 2\n{SLEEP}")
    assert run.ask("/reload", "POST")[1]["removed"] == ["web:2"]
    eventually(lambda: run.ask("/status/web:2")[0], 404)
    assert [s["pid"] for s in run.ask("/status/web")[1]] == [zero, one]


def test_reload_sees_a_changed_env_file(supervise: Supervise, tmp_path: Path) -> None:
    (tmp_path / "a.env").write_text("A=1\n")
    run = supervise(
        f'{FAST}[programs.a]\n{SLEEP}env_file = "a.env"\n[programs.b]\n{SLEEP}'
    )
    first = run.wait_state("a", "RUNNING")["pid"]
    assert run.ask("/reload", "POST")[1]["unchanged"] == 2
    (tmp_path / "a.env").write_text("A=2\n")
    assert run.ask("/reload", "POST")[1]["changed"] == ["a"]
    second = eventually(
        lambda: run.status("a"), lambda s: s["state"] == "RUNNING" and s["pid"] != first
    )
    assert b"A=2" in environ_of(second["pid"])


def test_reload_lets_a_program_run_on_whose_env_file_is_gone(
    supervise: Supervise, tmp_path: Path
) -> None:
    (tmp_path / "a.env").write_text("A=1\n")
    run = supervise(f'{FAST}[programs.a]\n{SLEEP}env_file = "a.env"')
    pid = run.wait_state("a", "RUNNING")["pid"]
    (tmp_path / "a.env").unlink()
    answer = run.ask("/reload", "POST")[1]
    assert (answer["changed"], answer["unchanged"]) == ([], 1)
    assert (run.state("a"), run.status("a")["pid"]) == ("RUNNING", pid)
    run.wait_err("a: cannot read 'a.env'")


@pytest.mark.parametrize("text", ["", "PATH=/nowhere\n"])
def test_reload_starts_what_could_not_start_for_its_env_file(
    supervise: Supervise, tmp_path: Path, text: str
) -> None:
    if text:
        (tmp_path / "a.env").write_text(text)
    run = supervise(f'{FAST}[programs.a]\n{SLEEP}env_file = "a.env"')
    run.wait_state("a", "FATAL")
    (tmp_path / "a.env").write_text("A=2\n")
    assert run.ask("/reload", "POST")[1]["changed"] == ["a"]
    run.wait_state("a", "RUNNING")


def test_reload_reads_what_the_files_name_leads_to_now(
    supervise: Supervise, tmp_path: Path
) -> None:
    """As in Kubernetes, where `..data` comes to lead to a new folder."""
    head = 'listen = ""\ncontrol = "s"\ninclude = ["more/*.toml"]\n'
    for number in (1, 2):
        folder = tmp_path / f"v{number}"
        folder.mkdir()
        text = f"{head}[programs.a{number}]\n{SLEEP}"
        (folder / "supervisors.toml").write_text(text)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/b.toml").write_text(f"[programs.b]\n{SLEEP}")
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "app.toml").symlink_to("data/supervisors.toml")
    run = supervise("", arguments=("app.toml",))
    assert [one["name"] for one in run.status_all()] == ["a1", "b"]
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to("v2")
    shutil.rmtree(tmp_path / "v1")
    assert run.ask("/reload", "POST")[1]["added"] == ["a2"]
    assert run.status("b")["running"]


def test_a_program_that_cannot_start_again_ends_again(supervise: Supervise) -> None:
    check = "healthcheck = {command = 'touch checked'}"
    config = f"[programs.web]\ncommand = '/none'\n{check}\n"
    run = supervise(config)
    run.wait_state("web", "FATAL")
    run.ask("/programs/web/start", "POST")
    rewrite(run, f"{config}on_failure = 'shutdown'")
    run.ask("/reload", "POST")
    assert run.popen.wait(LIMIT) == 127
    # A check begins when a program is spawned, which it never was.
    assert not (run.folder / "checked").exists()


def test_reload_reports_what_changed_during_its_stop_once(supervise: Supervise) -> None:
    run = supervise(f"{FAST}[programs.web]\n{HARD_TO_STOP}")
    pid = run.wait_state("web", "RUNNING")["pid"]
    run.ask("/programs/web/stop", "POST")
    rewrite(run, f"{FAST}[programs.web]\numask = '077'\n{HARD_TO_STOP}")
    assert run.ask("/reload", "POST")[1]["changed"] == ["web"]
    assert run.state("web") == "STOPPING"
    os.kill(pid, signal.SIGKILL)
    run.wait_state("web", "STOPPED")
    assert run.ask("/reload", "POST")[1]["changed"] == []


def test_a_program_that_a_reload_removed_is_not_started_again(
    supervise: Supervise,
) -> None:
    beside = f"{FAST}[programs.beside]\n{SLEEP}"
    run = supervise(f"{beside}[programs.web]\n{HARD_TO_STOP}")
    pid = run.wait_state("web", "RUNNING")["pid"]
    rewrite(run, beside)
    assert run.ask("/reload", "POST")[1]["removed"] == ["web"]
    for verb in ("start", "restart"):
        code, answer = run.ask(f"/programs/web/{verb}", "POST")
        assert code == 409
        assert "it was removed" in answer["error"]
    code, answer = run.ask("/programs/all/restart?wait=30", "POST")
    assert (code, [one["name"] for one in answer]) == (200, ["beside"])
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: run.ask("/status/web")[0], 404)


def test_reload_that_ends_the_waiting_of_a_program_starts_it_once(
    supervise: Supervise,
) -> None:
    db = f"[programs.db]\n{SLEEP}autostart = false\n"
    web = f"[programs.web]\n{SLEEP}startsecs = 1000\n"
    run = supervise(f'{db}{web}depends_on = ["db"]')
    run.wait_state("web", "WAITING")
    rewrite(run, db + web)
    assert run.ask("/reload", "POST")[1]["changed"] == ["web"]
    err = run.wait_err("reloaded: ")
    assert re.findall(r" web: (\w+)", err) == ["WAITING", "STARTING"]


def test_logs_of_a_stopped_program_are_those_of_its_new_file_after_a_reload(
    supervise: Supervise, tmp_path: Path
) -> None:
    (tmp_path / "old.log").write_text("old\n")
    (tmp_path / "new.log").write_text("new\n")
    web = f"[programs.web]\n{SLEEP}autostart = false\n"
    run = supervise(f"{web}logfile = 'old.log'")
    assert logs(run) == ["old"]
    rewrite(run, f"{web}logfile = 'new.log'")
    assert run.ask("/reload", "POST")[1]["changed"] == ["web"]
    assert logs(run) == ["new"]


def test_reload_that_makes_an_ended_program_a_oneshot_releases_its_dependent(
    supervise: Supervise,
) -> None:
    job = "[programs.job]\ncommand = 'true'\nautostart = false\nstartsecs = 1000\n"
    web = f'[programs.web]\n{SLEEP}depends_on = ["job"]\n'
    run = supervise(job + web)
    post(run, "job/start")
    run.wait_state("job", "EXITED")
    assert run.state("web") == "WAITING"
    rewrite(run, f"{job}type = 'oneshot'\n{web}")
    assert run.ask("/reload", "POST")[1]["changed"] == ["job"]
    run.wait_state("web", "STARTING")
    assert run.state("job") == "EXITED"


def test_reload_of_token_and_listen_takes_effect_or_says_that_it_does_not(
    supervise: Supervise,
) -> None:
    port, other_port = free_port(), free_port()
    (token_file := Path("token.txt"))
    run = supervise(
        f'token = "sesame"\n[programs.web]\n{SLEEP}', listen=f'"127.0.0.1:{port}"'
    )
    (run.folder / token_file).write_text("first\n")
    (run.folder / token_file).chmod(0o600)
    with_file = f'token_file = "token.txt"\n[programs.web]\n{SLEEP}'
    rewrite(run, with_file, listen=f'"127.0.0.1:{port}"')
    assert run.ask("/reload", "POST")[0] == 200
    assert reload_over_tcp(port, "sesame") == 401
    assert reload_over_tcp(port, "first") == 200
    (run.folder / token_file).write_text("second\n")
    assert reload_over_tcp(port, "first") == 200
    assert reload_over_tcp(port, "first") == 401
    assert reload_over_tcp(port, "second") == 200
    rewrite(run, with_file, listen=f'"127.0.0.1:{other_port}"')
    code, answer = run.ask("/reload", "POST")
    assert code == 200
    if "restart" not in json.dumps(answer):
        eventually(lambda: answers_on(other_port))
        eventually(lambda: answers_on(port), False)


def test_reload_tells_what_needs_a_restart_until_there_was_one(
    supervise: Supervise,
) -> None:
    config = f"[programs.web]\n{SLEEP}"
    run = supervise(config)
    rewrite(run, f'pidfile = "pid"\nlog_format = "json"\n{config}')
    for _ in range(2):
        needed = run.ask("/reload", "POST")[1]["needs_restart"]
        assert needed == ["pidfile", "log_format"]
    rewrite(run, config)
    assert "needs_restart" not in run.ask("/reload", "POST")[1]


def reload_over_tcp(port: int, token: str) -> int:
    return ask_over_tcp(port, "/reload", "POST", Authorization=f"Bearer {token}").status


def answers_on(port: int) -> bool:
    with contextlib.suppress(OSError):
        return ask_over_tcp(port, "/health/live").status == 200
    return False


# === Security =========================================================================
#
# Raw requests, as an attacker would send them: http.client would tidy them up.


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def exchange_bytes(port: int, request: bytes, method: str = "GET") -> Answer:
    """Send bytes to a port of this host and return what is answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection, method=method)
        answer.begin()
        return Answer(answer.status, answer.headers, answer.read())


def ask_over_tcp(
    port: int, path: str, method: str = "GET", /, **headers: str
) -> Answer:
    """Send a request as it stands; a Host of "" leaves that header out."""
    headers = {"Host": f"127.0.0.1:{port}", "Connection": "close"} | headers
    if method == "POST":
        headers["Content-Length"] = "0"
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    text = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return exchange_bytes(port, text.encode(errors="surrogateescape"), method)


Serve = Callable[..., tuple[Run, int]]


@pytest.fixture
def serve(supervise: Supervise) -> Serve:
    """Start a supervisor with one program, `web`, that also listens on a port."""

    def start(head: str = "", program: str = SLEEP) -> tuple[Run, int]:
        port = free_port()
        config = f"{head}\n{FAST}[programs.web]\n{program}"
        run = supervise(config, listen=f'"127.0.0.1:{port}"')
        run.wait_state("web", "RUNNING")
        return run, port

    return start


NEEDS_TOKEN = [
    ("POST", "/programs/web/stop"),
    ("POST", "/programs/web/start"),
    ("POST", "/programs/web/restart"),
    ("POST", "/programs/web/signal?signal=HUP"),
    ("POST", "/reload"),
    ("POST", "/shutdown"),
    ("GET", "/programs/web/logs"),
    ("HEAD", "/programs/web/logs"),
]


@pytest.mark.parametrize("head", ["", 'token = ""'])
def test_without_a_configured_token_nothing_is_controlled_over_tcp(
    serve: Serve, head: str
) -> None:
    run, port = serve(head)
    pid = run.status("web")["pid"]
    for method, path in NEEDS_TOKEN:
        assert ask_over_tcp(port, path, method).status == 403
        bearer = {"Authorization": "Bearer "}
        assert ask_over_tcp(port, path, method, **bearer).status == 403
    assert ask_over_tcp(port, "/programs/nope/stop", "POST").status == 404
    assert ask_over_tcp(port, "/reload", "GET").status == 405
    assert ask_over_tcp(port, "/status").status == 200
    assert run.status("web")["pid"] == pid


def test_over_tcp_a_missing_or_wrong_token_is_401(shared: Shared) -> None:
    port, order = shared.port, "/programs/web/signal?signal=URG"
    for method, path in NEEDS_TOKEN:
        answer = ask_over_tcp(port, path, method)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    wrong = [
        "Bearer",
        "Bearer wrong",
        "Bearer sesam",
        "Bearer sesame2",
        "Bearer s\u00e9same",
        "Bearer \udcff\udc80",
        "Basic",
        "Basic sesame",
        "Basic %%%",
        "Basic " + base64.b64encode(b"sesame").decode(),
        "Basic " + base64.b64encode(b"sesame:wrong").decode(),
        "Basic " + base64.b64encode(b"x:\xff\xfe").decode(),
        "Digest sesame",
        "sesame",
    ]
    for value in wrong:
        answer = ask_over_tcp(port, order, "POST", Authorization=value)
        assert answer.status == 401, value
        assert b"sesame" not in answer.body
    assert ask_over_tcp(port, f"{order}&token=sesame", "POST").status in (400, 401)


def test_over_tcp_the_right_token_works_as_bearer_and_as_basic(shared: Shared) -> None:
    basic = "Basic " + base64.b64encode(b"anyone:sesame").decode()
    for value in ("Bearer sesame", "bearer sesame", basic):
        right = {"Authorization": value}
        logs = ask_over_tcp(shared.port, "/programs/web/logs", **right)
        assert logs.status == 200
        path = "/programs/web/signal?signal=URG"
        order = ask_over_tcp(shared.port, path, "POST", **right)
        assert order.status in (200, 202)


def test_a_foreign_origin_may_post_nothing(shared: Shared) -> None:
    port, path = shared.port, "/programs/web/signal?signal=URG"
    token = {"Authorization": "Bearer sesame"}
    foreign = [
        "http://evil.example",
        f"http://evil.example:{port}",
        f"http://127.0.0.1:{port % 65535 + 1}",
        "http://127.0.0.1",
        f"http://127.0.0.1:{port}.evil.example",
        "null",
        "file://",
    ]
    for origin in foreign:
        answer = ask_over_tcp(port, path, "POST", Origin=origin, **token)
        assert answer.status == 403, origin
    own = {"Origin": f"http://127.0.0.1:{port}"} | token
    assert ask_over_tcp(port, path, "POST", **own).status in (200, 202)


def test_a_foreign_host_is_refused_on_loopback(shared: Shared) -> None:
    port = shared.port
    token = {"Authorization": "Bearer sesame"}
    foreign = [
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example@localhost",
        "0.0.0.0",
    ]
    for host in foreign:
        for path in ("/", "/status", "/health", "/metrics", "/events"):
            assert ask_over_tcp(port, path, Host=host).status == 403, host
        answer = ask_over_tcp(port, "/reload", "POST", Host=host, **token)
        assert answer.status == 403, host
    own = [
        f"localhost:{port}",
        "LOCALHOST",
        f"[::1]:{port}",
        "127.0.0.1",
        "proxy.example",
    ]
    for host in own:
        assert ask_over_tcp(port, "/status", Host=host).status == 200, host
    assert exchange_bytes(port, b"GET /status HTTP/1.0\r\n\r\n").status == 200


def test_host_of_an_absolute_target_is_the_one_that_counts(shared: Shared) -> None:
    host = b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    evil = exchange_bytes(shared.port, b"GET http://evil.example/status" + host)
    own = exchange_bytes(shared.port, b"GET http://localhost/status" + host)
    assert (evil.status, own.status) == (403, 200)


@pytest.mark.parametrize(
    "path",
    [
        "//status",
        "/./status",
        "/../status",
        "/status/..",
        "/status/../health",
        "/%2e%2e/status",
        "/status/%2e%2e%2fhealth",
        "/status%2fweb",
        "/status/web/",
        "/status/web%00",
        "/status/web\0",
        "/status/\udcff",
        "/status/%ff",
        "/status/w\u00e9b",
        "/STATUS",
        "/status;web",
        "/../../../../etc/passwd",
        "/programs/../status",
        "/programs//logs",
        "/" + "a" * 60_000,
        "/status/" + "%41" * 10_000,
        "status",
        "*",
        "",
    ],
)
def test_tricks_with_the_path_find_nothing(shared: Shared, path: str) -> None:
    answer = ask_over_tcp(shared.port, path)
    assert answer.status in (400, 404, 414)
    assert isinstance(json.loads(answer.body)["error"], str)


def test_no_answer_shows_environment_or_arguments(serve: Serve) -> None:
    secret = "hunter2"
    run, port = serve(
        f'token = "{secret}"',
        f"""command = "sleep"
        args = ["1000", "0{secret and ""}"]
        environment = {{PASSWORD = "{secret}"}}
        [programs.args]
        command = ["sh", "-c", "exec sleep 1000", "{secret}"]
        [programs.missing]
        command = ["no-such-command", "{secret}"]
        [programs.failing]
        command = ["sh", "-c", "exit 3", "{secret}"]
        [programs.checked]
        {SLEEP}
        healthcheck = {{command = ["false", "{secret}"], start_period = 0, retries = 1}}
        """,
    )
    run.wait_state("missing", "FATAL")
    run.wait_state("failing", "EXITED")
    eventually(lambda: run.status("checked")["healthy"], False)
    names = ["web", "args", "missing", "failing", "checked", "nope"]
    paths = ["/", "/status", "/health", "/health/live", "/metrics", "/nope"]
    paths += [f"/status/{n}" for n in names] + [f"/health/{n}" for n in names]
    for path in paths:
        answer = ask_over_tcp(port, path, Accept="text/html,*/*")
        assert secret.encode() not in answer.body, path
        assert secret not in str(answer.headers), path
        assert answer.headers["Cache-Control"] == "no-store", path
        assert int(answer.headers["Content-Length"]) == len(answer.body), path
    with EventClient(run) as events:
        assert secret not in json.dumps(events.read())
    for verb in ("restart", "stop", "start"):
        assert secret not in json.dumps(run.ask(f"/programs/all/{verb}", "POST"))
    rewrite(run, f'token = "{secret}"\n[programs.web]\ncomand = "{secret}"')
    assert secret not in json.dumps(run.ask("/reload", "POST")[1]["error"])
    assert secret not in run.err


def test_the_page_can_not_be_framed_and_loads_nothing_from_outside(
    shared: Shared,
) -> None:
    port = shared.port
    page = ask_over_tcp(port, "/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert page.headers.get_content_type() == "text/html"
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert len(page.body) < 30_000
    assert not re.search(rb"(src|href)\s*=\s*[\"']?(https?:)?//", page.body)
    plain = ask_over_tcp(port, "/", Accept="*/*")
    assert plain.body == b"Supervisor Running. Check /status"


def test_the_control_socket_is_private_from_its_first_moment(
    supervise: Supervise, tmp_path: Path
) -> None:
    open_umask = ("sh", "-c", 'umask 0; exec "$@"', "sh")
    path = tmp_path / "s"
    run = supervise(f"[programs.web]\n{SLEEP}", prefix=open_umask, ready=False)
    modes = set()
    while "web: " not in run.err:
        assert run.popen.poll() is None
        with contextlib.suppress(FileNotFoundError):
            modes.add(stat.S_IMODE(path.stat().st_mode))
    eventually(path.exists)
    modes.add(stat.S_IMODE(path.stat().st_mode))
    assert modes == {0o600}
    assert stat.S_ISSOCK(path.stat().st_mode)


def test_the_control_socket_needs_neither_token_nor_host(shared: Shared) -> None:
    connection = UnixConnection(shared.run.folder / "s")
    headers = {"Host": "evil.example", "Origin": "http://evil.example"}
    path = "/programs/web/signal?signal=URG"
    connection.request("POST", path, headers=headers)
    assert connection.getresponse().status in (200, 202)
    connection.close()


def test_a_unix_listener_has_the_rights_of_tcp(supervise: Supervise) -> None:
    run = supervise(
        f'token = "sesame"\n[programs.web]\n{SLEEP}', listen='["unix:public.sock"]'
    )
    connection = UnixConnection(run.folder / "public.sock")
    connection.request("POST", "/programs/web/stop", headers={"Connection": "close"})
    answer = connection.getresponse()
    assert (answer.status, bool(answer.read())) == (401, True)
    server = f"unix:{run.folder / 'public.sock'}"
    assert run_verb(run.folder.parent, "-s", server, "stop", "web").returncode == 1
    token = {"SUPERVISOR_TOKEN": "sesame"}
    stop = run_verb(run.folder.parent, "-s", server, "stop", "web", **token)
    assert stop.returncode == 0


def test_a_second_supervisor_is_refused_and_harms_nothing(supervise: Supervise) -> None:
    run = supervise(f'pidfile = "pid"\n{FAST}[programs.web]\n{SLEEP}')
    pid = run.wait_state("web", "RUNNING")["pid"]
    second = run_verb(run.folder, "supervisors.toml")
    assert second.returncode == 2
    assert is_one_line(second.stderr)
    assert str(run.folder / "s") in second.stderr
    assert (run.folder / "pid").read_text().strip() == str(run.pid)
    assert run.status("web")["pid"] == pid
    assert run.end() == 0
    assert not (run.folder / "pid").exists()
    assert not (run.folder / "s").exists()


def test_a_stale_control_socket_is_replaced(
    supervise: Supervise, tmp_path: Path
) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(os.path.relpath(tmp_path / "s"))
    stale.close()
    run = supervise(f"[programs.web]\n{SLEEP}")
    assert run.ask("/status")[0] == 200


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_never_replaced_by_the_control_socket(
    supervise: Supervise, tmp_path: Path, kind: str
) -> None:
    path, target = tmp_path / "s", tmp_path / "target"
    target.write_text("precious")
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(target)
    run = supervise(f"[programs.web]\n{SLEEP}", ready=False)
    eventually(lambda: run.popen.poll() is not None or "web: STARTING" in run.err)
    if run.popen.poll() is None:
        assert run.end() == 0
    assert "Traceback" not in run.err
    assert "'s'" in run.err or str(path) in run.err
    if kind == "folder":
        assert path.is_dir()
    else:
        assert path.read_text() == "precious"
    assert path.is_symlink() == (kind == "link")


def test_the_token_may_come_from_a_file(supervise: Supervise, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "token.txt").write_text("sesame\n")
    run = supervise(
        f'token_file = "token.txt"\n[programs.web]\n{SLEEP}',
        listen=f'"127.0.0.1:{port}"',
    )
    assert reload_over_tcp(port, "sesame") == 200
    assert "token.txt" not in run.err
    assert "sesame" not in run.err


def test_a_token_may_end_with_a_line_as_secrets_do(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "sesame\n")
    _, port = serve('token = "${SECRET}"')
    assert reload_over_tcp(port, "sesame") == 200
    order = ("-s", f"127.0.0.1:{port}", "signal", "URG", "web")
    assert run_verb(tmp_path, *order, SUPERVISOR_TOKEN="sesame\n").returncode == 0
    assert run_verb(tmp_path, "health", SUPERVISOR_TOKEN="\u00fc").returncode == 0


def test_a_line_may_come_in_many_chunks() -> None:
    parts = [b"one\ntw", b"o", b"", b"\n\nthree"]
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part]
    answer = io.BytesIO(b"".join(chunks) + b"0\r\n\r\n")
    assert [*supervisors.chunked_lines(answer)] == [b"one\n", b"two\n", b"\n", b"three"]
    cut = supervisors.chunked_lines(io.BytesIO(b"".join(chunks)))
    with pytest.raises(supervisors.SupervisorError, match="cut off"):
        list(cut)


def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(tmp_path: Path) -> None:
    for token in ("s\u00e9same", "open\nsesame"):
        with pytest.raises(ConfigError, match=r"^token: expected printable ASCII$"):
            supervisors.parse_config(
                {"token": token, "programs": {"web": {"command": "true"}}}, {}
            )
        with pytest.raises(ConfigError, match=r"^token: expected printable ASCII$"):
            supervisors.Client("localhost:1", token)
        (tmp_path / "token").write_text(token, encoding="utf-8")
        config = supervisors.Config(token_file=str(tmp_path / "token"))
        with pytest.raises(ConfigError, match=r"^token_file: expected printable"):
            supervisors.read_token(config)


def test_streams_leave_room_for_probes(shared: Shared) -> None:
    run, port = shared
    request = f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stream = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            stream.settimeout(LIMIT)
            stream.sendall(request)
            assert b" 200 " in stream.recv(64)
        assert ask_over_tcp(port, "/events").status == 503
        assert ask_over_tcp(port, "/health/live").status == 200
        with EventClient(run) as events:
            assert events.read()[0] == "snapshot"
    eventually(lambda: streams_again(port))


def streams_again(port: int) -> bool:
    """Return whether one more stream is let in."""
    request = f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as stream:
        stream.sendall(request)
        return b" 200 " in stream.recv(64)


# === Logs =============================================================================


class Stream:
    """An answer over the control socket that is read while it goes on."""

    def __init__(self, run: Run, path: str) -> None:
        self.connection = UnixConnection(run.folder / "s")
        self.connection.request("GET", path)
        self.answer = self.connection.getresponse()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.answer.close()
        self.connection.close()

    def line(self) -> str:
        """Return the next line without its end; the empty string at the end."""
        return self.answer.readline().decode().rstrip("\n")


class EventClient(Stream):
    """A client of `/events`."""

    def __init__(self, run: Run) -> None:
        super().__init__(run, "/events")

    def read(self) -> tuple[str, Any]:
        """Return the next event's name and data; raise EOFError at the end."""
        fields: dict[str, str] = {}
        while True:
            line = self.answer.readline().decode()
            if not line:
                raise EOFError
            if line == "\n" and fields:
                return fields["event"], json.loads(fields["data"])
            name, _, value = line.rstrip("\n").partition(": ")
            if name:
                fields[name] = value

    def states(self, name: str, until: str) -> list[str]:
        """Return the states that one program goes through, until it is in the last."""
        states: list[str] = []
        while states[-1:] != [until]:
            event, status = self.read()
            if event == "state" and status["name"] == name:
                states.append(status["state"])
        return [state for state, _ in itertools.groupby(states)]


def logs(run: Run, query: str = "", name: str = "web") -> list[str]:
    code, text = run.ask(f"/programs/{name}/logs{query}")
    assert code == 200, text
    return str(text).splitlines()


NUMBERS = ["sh", "-c", "seq 300; seq 301 600 >&2; exec sleep 1000"]


@pytest.mark.parametrize("log_format", ["prefix", "json"])
def test_logs_of_a_piped_program_are_its_last_lines(
    supervise: Supervise, log_format: str
) -> None:
    run = supervise(f'log_format = "{log_format}"\n[programs.web]\ncommand = {NUMBERS}')
    eventually(lambda: len(logs(run, "?lines=601")), 600)
    out = [str(n) for n in range(1, 301)]
    err = [str(n) for n in range(301, 601)]
    assert logs(run, "?stream=stdout&lines=3") == out[-3:]
    assert logs(run, "?stream=stderr&lines=1000") == err
    assert logs(run, "?stream=stdout") == out[-100:]
    assert sorted(logs(run, "?lines=1000"), key=int) == out + err
    assert logs(run, "?lines=0") == []
    verb = run_verb(run.folder, "logs", "-n", "1000", "web")
    assert (verb.returncode, verb.stderr) == (0, "")
    assert {line.split()[-1] for line in verb.stdout.splitlines()} == {*out, *err}


def test_logs_keep_the_newest_64_kb_after_a_burst(
    supervise: Supervise, gate: Callable[[str], Gate]
) -> None:
    go = gate("go")
    code = "seq -w 100000; read x <go; echo end; exec sleep 1000"
    run = supervise(f"[programs.web]\ncommand = {sh(code)}")
    numbers = [f"{n:06}" for n in range(1, 100_001)]
    eventually(lambda: logs(run, "?lines=1"), numbers[-1:])
    go.open()
    eventually(lambda: logs(run, "?lines=1"), ["end"])
    kept = logs(run, "?lines=100000")
    assert kept == [*numbers, "end"][-len(kept) :]
    assert sum(len(line) + 1 for line in kept) > 58_000


def test_memory_of_many_short_lines_is_used_for_their_text() -> None:
    output = supervisors.Output(supervisors.REMEMBERED, supervisors.LAG)
    for n in range(100_000):
        output.keep("stdout", b"%d\n" % n)
    items, _ = output.read(None, 0)
    text = b"".join(piece for _, piece in items)
    assert text.endswith(b"\n99998\n99999\n")
    assert 58_000 < len(text) < 64 << 10
    assert len(items) < 20


def test_logs_count_only_newlines(supervise: Supervise) -> None:
    text = r"import os; os.write(1, b'first\n10 %\r20 %\x0b30 %\x0c\n')"
    run = supervise(f"[programs.web]\ncommand = {python(text)}")
    run.wait_state("web", "EXITED")
    answer = eventually(lambda: run.ask("/programs/web/logs?lines=1"), lambda a: a[1])
    assert answer == (200, "10 %\r20 %\x0b30 %\x0c\n")


def test_logs_of_a_file_end_though_its_writer_is_faster(tmp_path: Path) -> None:
    log = tmp_path / "web.log"
    log.write_bytes(b"x" * 99_999 + b"\n")
    shown = 0
    for chunk in supervisors.file_log([str(log)], 1, None):
        shown += len(chunk)
        with log.open("ab") as file:
            file.write(chunk)
        assert shown <= 100_000
    assert shown == 100_000


def test_one_stream_of_two_that_share_standard_output_is_refused(
    supervise: Supervise,
) -> None:
    run = supervise(f"[programs.web]\n{SLEEP}logfile = '/dev/stdout'")
    assert run.ask("/programs/web/logs?stream=stderr")[0] == 400
    assert run.ask("/programs/web/logs")[0] == 200


def test_logs_of_a_rotated_file_reach_into_its_backups(supervise: Supervise) -> None:
    run = supervise(
        f"""[programs.web]
        command = {NUMBERS}
        logfile = "web.log"
        logfile_maxbytes = 1000
        logfile_backups = 9
        """
    )
    eventually(lambda: "600" in logs(run) and "300" in logs(run, "?lines=600"))
    assert (run.folder / "web.log.2").exists()
    numbers = {str(n) for n in range(1, 601)}
    assert set(logs(run, "?lines=600")) == numbers
    assert len(logs(run, "?lines=500")) == 500
    assert logs(run, "?lines=500") == logs(run, "?lines=9999")[-500:]
    code, answer = run.ask("/programs/web/logs?stream=stderr")
    assert code == 400
    assert "error" in answer


def test_logs_of_a_file_that_the_program_holds_itself(supervise: Supervise) -> None:
    run = supervise(
        f"""[programs.web]
        command = {NUMBERS}
        logfile = "out.log"
        stderr_logfile = "err.log"
        logfile_maxbytes = 0
        """
    )
    eventually(lambda: logs(run, "?stream=stderr&lines=1"), ["600"])
    eventually(lambda: logs(run, "?stream=stdout&lines=2"), ["299", "300"])
    numbers = [str(n) for n in range(1, 601)]
    assert logs(run, "?stream=stdout&lines=600") == numbers[:300]
    assert logs(run, "?stream=stderr&lines=600") == numbers[300:]


def test_logs_that_the_supervisor_never_sees_are_409(supervise: Supervise) -> None:
    run = supervise(f'log_format = "raw"\n{FAST}[programs.web]\n{SLEEP}')
    code, answer = run.ask("/programs/web/logs")
    assert code == 409
    assert "web" in answer["error"]
    verb = run_verb(run.folder, "logs", "web")
    assert verb.returncode == 1
    assert is_one_line(verb.stderr)


def test_logs_of_what_runs_outlive_a_reload_of_the_format(supervise: Supervise) -> None:
    web = '[programs.web]\ncommand = ["sh", "-c", "echo hello; exec sleep 1000"]\n'
    run = supervise(web)
    eventually(lambda: logs(run), ["hello"])
    rewrite(run, f'log_format = "raw"\n{web}')
    assert run.ask("/reload", "POST")[1]["unchanged"] == 1
    assert logs(run) == ["hello"]


@pytest.mark.parametrize(
    "query", ["?lines=many", "?lines=-1", "?stream=both", "?follow=perhaps"]
)
def test_logs_refuse_a_query_that_makes_no_sense(shared: Shared, query: str) -> None:
    assert shared.run.ask(f"/programs/web/logs{query}")[0] == 400


def test_logs_of_a_program_that_never_ran_are_empty(shared: Shared) -> None:
    assert logs(shared.run, name="a-longer-name") == []


def test_logs_verb_without_names_shows_all_with_their_names(
    supervise: Supervise,
) -> None:
    run = supervise(
        "[programs.web]\ncommand = ['sh', '-c', 'echo one; exec sleep 1000']\n"
        "[programs.db]\ncommand = ['sh', '-c', 'echo two; exec sleep 1000']\n"
    )
    eventually(lambda: logs(run) == ["one"] and logs(run, name="db") == ["two"])
    shown = run_verb(run.folder, "logs").stdout.splitlines()
    words = sorted((line.split()[0], line.split()[-1]) for line in shown)
    assert words == [("db", "two"), ("web", "one")]


LOG_KINDS = {
    "piped": "",
    "rotated": 'logfile = "{name}.log"',
    "own": 'logfile = "{name}.log"\nlogfile_maxbytes = 0',
}


def talker_config(folder: Path, name: str, kind: str) -> str:
    """Return a program that says one line more at each USR1."""
    command = script(folder, "talker.py", TALKER)
    keys = LOG_KINDS[kind].format(name=name)
    return f"[programs.{name}]\ncommand = {command}\nstartsecs = 0\n{keys}\n"


@pytest.mark.parametrize("kind", LOG_KINDS)
def test_follow_shows_lines_as_they_come_and_lives_through_a_restart(
    supervise: Supervise, tmp_path: Path, kind: str
) -> None:
    run = supervise(talker_config(tmp_path, "web", kind))
    with Stream(run, "/programs/web/logs?follow=1") as stream:
        assert stream.line() == "ready"
        for number in (1, 2, 3):
            assert run.ask("/programs/web/signal?signal=USR1", "POST")[0] in (200, 202)
            assert stream.line() == f"line {number}"
        run.ask("/programs/web/restart", "POST")
        assert stream.line() == "ready"
        run.ask("/programs/web/signal?signal=USR1", "POST")
        assert stream.line() == "line 1"
    assert run.ask("/status")[0] == 200


@pytest.mark.parametrize("kind", LOG_KINDS)
def test_follow_ends_with_the_program_and_with_the_supervisor(
    supervise: Supervise, tmp_path: Path, kind: str
) -> None:
    web, other = (talker_config(tmp_path, name, kind) for name in ("web", "other"))
    run = supervise(web + other)
    with contextlib.ExitStack() as stack:
        gone = stack.enter_context(Stream(run, "/programs/web/logs?follow=1"))
        last = stack.enter_context(Stream(run, "/programs/other/logs?follow=1"))
        assert gone.line() == "ready"
        assert last.line() == "ready"
        rewrite(run, other)
        assert run.ask("/reload", "POST")[0] == 200
        assert gone.answer.read() == b""
        run.send(signal.SIGTERM)
        assert last.answer.read() == b""
        assert run.popen.wait(LIMIT) == 0


TALKS_AT_THE_END = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.write(1, b"up\\n")
signal.sigwait({signal.SIGTERM})
for _ in range(8):  # less than a follower may be behind
    os.write(1, (b"x" * 49 + b"\\n") * 1000)
os.write(1, b"end\\n")
os._exit(0)
"""


def test_follow_shows_the_last_line_of_a_program_that_a_reload_removes(
    supervise: Supervise, tmp_path: Path
) -> None:
    command = script(tmp_path, "talks.py", TALKS_AT_THE_END)
    kept = f"{FAST}[programs.kept]\n{SLEEP}"
    run = supervise(f"{kept}[programs.web]\ncommand = {command}\nnumprocs = 16")
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(Stream(run, f"/programs/web:{n}/logs?follow=1"))
            for n in range(16)
        ]
        assert [stream.line() for stream in streams] == ["up"] * 16
        rewrite(run, kept)
        assert len(run.ask("/reload", "POST")[1]["removed"]) == 16
        ends = [stream.answer.read()[-4:] for stream in streams]
        assert ends == [b"end\n"] * 16


@pytest.mark.parametrize("kind", ["piped", "rotated"])
def test_follow_may_begin_before_the_first_start(
    supervise: Supervise, tmp_path: Path, kind: str
) -> None:
    run = supervise(talker_config(tmp_path, "web", kind) + "autostart = false\n")
    with Stream(run, "/programs/web/logs?follow=1") as stream:
        run.ask("/programs/web/start", "POST")
        assert stream.line() == "ready"


def test_follow_of_one_stream_shows_only_that(supervise: Supervise) -> None:
    command = [
        "sh",
        "-c",
        "read x <go; echo out; echo err >&2; echo more; exec sleep 1000",
    ]
    run = supervise(f"{FAST}[programs.web]\ncommand = {command}\nautostart = false\n")
    os.mkfifo(run.folder / "go")
    run.ask("/programs/web/start?wait=30", "POST")
    with Stream(run, "/programs/web/logs?follow=1&stream=stderr") as stream:
        (run.folder / "go").write_text("go\n")
        assert stream.line() == "err"
        eventually(lambda: logs(run, "?stream=stdout"), ["out", "more"])
        run.send(signal.SIGTERM)
        assert stream.answer.read() == b""


@contextlib.contextmanager
def following(
    run: Run, *names: str, text: bool = False
) -> Iterator[subprocess.Popen[Any]]:
    """Run the verb that follows logs, and end it if it has not ended."""
    with subprocess.Popen(
        [PYTHON, str(SCRIPT), "logs", "-f", *names],
        cwd=run.folder,
        env=own_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=text,
    ) as verb:
        try:
            yield verb
        finally:
            verb.kill()


def test_ctrl_c_of_the_logs_verb_is_quiet(supervise: Supervise, tmp_path: Path) -> None:
    talker = script(tmp_path, "talker.py", TALKER)
    run = supervise(f"{FAST}[programs.web]\ncommand = {talker}\n")
    with following(run, "web") as verb:
        assert verb.stdout is not None
        assert b"ready" in verb.stdout.readline()
        run.ask("/programs/web/signal?signal=USR1", "POST")
        assert b"line 1" in verb.stdout.readline()
        verb.send_signal(signal.SIGINT)
        assert verb.communicate(timeout=LIMIT) == (b"", b"")
        assert verb.returncode in (0, 130, -signal.SIGINT)


def test_logs_verb_ends_with_its_output_though_a_program_is_quiet(
    supervise: Supervise, tmp_path: Path
) -> None:
    talker = script(tmp_path, "talker.py", TALKER)
    run = supervise(
        f"{FAST}[programs.web]\ncommand = {talker}\n[programs.quiet]\n{SLEEP}"
    )
    with following(run) as verb:
        assert verb.stdout is not None and verb.stderr is not None
        assert b"ready" in verb.stdout.readline()
        verb.stdout.close()
        run.ask("/programs/web/signal?signal=USR1", "POST")
        assert verb.wait(LIMIT) == 1
        assert verb.stderr.read() == b""


def test_readers_of_a_log_may_pause(supervise: Supervise, tmp_path: Path) -> None:
    # More than sockets hold, so that the supervisor has to wait for its readers.
    (tmp_path / "web.log").write_bytes((b"x" * 99 + b"\n") * 200_000)
    port = free_port()
    run = supervise(
        f'token = "sesame"\n[programs.web]\n{SLEEP}logfile = "web.log"\n'
        f'type = "notify"\n',
        listen=f'"127.0.0.1:{port}"',
    )
    path = "/programs/web/logs?lines=999999"
    over_tcp = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    with Stream(run, path) as stream, contextlib.closing(over_tcp):
        over_tcp.request("GET", path, headers={"Authorization": "Bearer sesame"})
        answers = (stream.answer, over_tcp.getresponse())
        # For longer than a request, or an answer of one piece, may take.
        wait = supervisors.REQUEST_TIME + 1
        assert run.ask(f"/programs/web/start?wait={wait}", "POST")[0] == 202
        assert [len(one.read()) for one in answers] == [20_000_000] * 2


def test_reader_of_a_log_that_pauses_delays_no_end(
    supervise: Supervise, tmp_path: Path
) -> None:
    (tmp_path / "web.log").write_bytes((b"x" * 99 + b"\n") * 200_000)
    run = supervise(f'{FAST}[programs.web]\n{SLEEP}logfile = "web.log"\n')
    with Stream(run, "/programs/web/logs?lines=999999") as stream:
        assert run.end() == 0
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            stream.answer.read()


def test_http_1_0_gets_a_log_without_chunks(http_run: Run) -> None:
    request = b"GET /programs/web/logs?lines=1 HTTP/1.0\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT)
        client.connect(os.path.relpath(http_run.folder / "s"))
        client.sendall(request)
        status, headers, _ = answered(client)
    assert status == 200
    assert "Transfer-Encoding" not in headers


def test_logs_verb_is_1_when_the_supervisor_is_killed(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(talker_config(tmp_path, "web", "piped"))
    with following(run, "web", text=True) as verb:
        assert verb.stdout is not None
        assert verb.stdout.readline() == "ready\n"
        os.kill(run.pid, signal.SIGKILL)
        out, err = verb.communicate(timeout=LIMIT)
        assert (out, err) == ("", "web: the answer was cut off\n")
        assert verb.returncode == 1
    for pid in run.left():
        os.kill(pid, signal.SIGKILL)


def test_logs_verb_is_0_when_the_supervisor_ends(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(talker_config(tmp_path, "web", "piped"))
    with following(run, "web", text=True) as verb:
        assert verb.stdout is not None
        assert verb.stdout.readline() == "ready\n"
        assert run.end() == 0
        assert verb.communicate(timeout=LIMIT) == ("", "")
        assert verb.returncode == 0


FLOOD_ON_USR1 = """
import os, signal
block = b"x" * 99 + b"\\n"
def flood(*_):
    for _ in range(400):
        os.write(1, block * 500)
    os.write(1, b"end\\n")
signal.signal(signal.SIGUSR1, flood)
print("ready", flush=True)
while True:
    signal.pause()
"""


def memory_of(pid: int) -> int:
    """Return the bytes of memory that a process holds."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) * 1024


def test_a_follower_gets_one_burst_of_nearly_the_lag_as_a_whole() -> None:
    output = supervisors.Output(supervisors.REMEMBERED, supervisors.LAG)
    output.followers.add("somebody")
    burst = (b"x" * 99 + b"\n") * (supervisors.LAG // 100 - 10)
    output.keep("stdout", burst)
    assert b"".join(text for _, text in output.read(0, 0)[0]) == burst


def test_a_follower_that_never_reads_costs_little_and_delays_nobody(
    supervise: Supervise, tmp_path: Path
) -> None:
    flood = script(tmp_path, "flood.py", FLOOD_ON_USR1)
    run = supervise(f"{FAST}[programs.web]\ncommand = {flood}\n")
    eventually(lambda: logs(run), ["ready"])
    before = memory_of(run.pid)
    with Stream(run, "/programs/web/logs?follow=1") as stream:
        run.ask("/programs/web/signal?signal=USR1", "POST")  # 20 MB
        eventually(lambda: logs(run, "?lines=1"), ["end"])
        first = run.status("web")["pid"]
        os.kill(first, signal.SIGKILL)
        run.ask("/programs/web/restart?wait=30", "POST")
        assert memory_of(run.pid) < before + 16_000_000
        # It lagged by more than 1 MB, so it was let go.
        with contextlib.suppress(ConnectionResetError, http.client.IncompleteRead):
            assert len(stream.answer.read()) < 10_000_000


# === Metrics and events ===============================================================


SAMPLE = re.compile(r"([a-z_:][a-z0-9_:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'([a-z_][a-z0-9_]*)="((?:[^"\\]|\\[\\"n])*)"(?:,|$)')
Metrics = dict[str, dict[tuple[str, ...], float]]


def parse_metrics(text: str) -> Metrics:
    """Return the samples of a text in Prometheus format, by name and label values.

    It is stricter than Prometheus: a family has HELP, then TYPE, then its samples.
    """
    assert text.endswith("\n")
    samples: Metrics = {}
    helped = family = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            helped = line.split(" ", 3)[2]
            assert helped not in samples, f"{helped} comes twice"
        elif line.startswith("# TYPE "):
            family, kind = line.split(" ")[2:]
            assert family == helped, line
            assert kind == ("counter" if family.endswith("_total") else "gauge"), line
            samples[family] = {}
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            assert name == family, line
            pairs = LABEL.findall(labels or "")
            assert ",".join(f'{k}="{v}"' for k, v in pairs) == (labels or ""), line
            key = tuple(v for _, v in pairs)
            assert key not in samples[name], f"{line} comes twice"
            samples[name][key] = float(value)
    return samples


def test_metrics_are_prometheus_text_with_all_that_is_promised(
    supervise: Supervise,
) -> None:
    run = supervise(
        f"{FAST}[programs.web]\nnumprocs = 2\n{SLEEP}autorestart = true\n"
        "[programs.job]\ncommand = \"sh -c 'exit 3'\"\n"
        f"[programs.off]\n{SLEEP}autostart = false\n"
    )
    run.wait_state("job", "EXITED")
    first = run.wait_state("web:0", "RUNNING")["pid"]
    os.kill(first, signal.SIGKILL)
    eventually(lambda: run.status("web:0")["restarts"], 1)
    run.wait_state("web:0", "RUNNING")
    run.wait_state("web:1", "RUNNING")
    connection = UnixConnection(run.folder / "s")
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    metrics = parse_metrics(answer.read().decode())
    connection.close()
    content_type = answer.headers["Content-Type"]
    assert content_type.startswith("text/plain; version=0.0.4")
    assert all(name.startswith("supervisors_") for name in metrics)
    assert list(metrics["supervisors_info"].values()) == [1]
    assert metrics["supervisors_start_time_seconds"][()] > 1e9
    web, job, off = ("web:0", "web"), ("job", "job"), ("off", "off")
    assert metrics["supervisors_program_up"] == {
        web: 1,
        ("web:1", "web"): 1,
        job: 0,
        off: 0,
    }
    assert metrics["supervisors_program_ready"][web] == 1
    assert metrics["supervisors_program_ready"][off] == 0
    assert metrics["supervisors_program_restarts_total"][web] == 1
    assert metrics["supervisors_program_exit_code"][job] == 3
    assert metrics["supervisors_program_log_dropped_bytes_total"][web] == 0
    assert metrics["supervisors_program_uptime_seconds"][web] >= 0
    states = metrics["supervisors_program_state"]
    assert len(states) == 4 * 8
    present = {key for key, value in states.items() if value == 1}
    assert set(states.values()) == {0, 1}
    assert present == {
        (*web, "RUNNING"),
        ("web:1", "web", "RUNNING"),
        (*job, "EXITED"),
        (*off, "STOPPED"),
    }


def test_events_reach_all_clients_in_order_after_a_snapshot(
    supervise: Supervise,
) -> None:
    web = f"[programs.web]\nstartsecs = 0.05\n{SLEEP}"
    gone = f"[programs.gone]\nstartsecs = 0.05\n{SLEEP}"
    run = supervise(web + gone)
    run.wait_state("web", "RUNNING")
    run.wait_state("gone", "RUNNING")
    with EventClient(run) as one, EventClient(run) as two, EventClient(run) as three:
        assert one.answer.headers.get_content_type() == "text/event-stream"
        clients = [one, two, three]
        for client in clients:
            event, statuses = client.read()
            assert event == "snapshot"
            assert [s["name"] for s in statuses] == ["web", "gone"]
            assert statuses[0] == statuses[0] | {"state": "RUNNING", "ready": True}
        run.ask("/programs/web/stop?wait=30", "POST")
        run.ask("/programs/web/start?wait=30", "POST")
        wanted = ["STOPPING", "STOPPED", "STARTING", "RUNNING"]
        for client in clients:
            assert client.states("web", until="RUNNING") == wanted
        rewrite(run, web)
        run.ask("/reload", "POST")
        for client in clients:
            seen: list[tuple[str, Any]] = []
            while seen[-1:] != [("removed", {"name": "gone"})]:
                event, data = client.read()
                seen.append((event, data if event == "removed" else data["state"]))
            assert seen[0] == ("state", "STOPPING")


def test_events_tell_of_a_program_that_is_added_and_does_not_start(
    supervise: Supervise,
) -> None:
    run = supervise(f"{FAST}[programs.web]\n{SLEEP}")
    run.wait_state("web", "RUNNING")
    with EventClient(run) as client:
        assert client.read()[0] == "snapshot"
        off = f"[programs.off]\n{SLEEP}autostart = false\n"
        rewrite(run, f"{FAST}[programs.web]\n{SLEEP}{off}")
        assert run.ask("/reload", "POST")[1]["added"] == ["off"]
        run.ask("/programs/web/stop", "POST")
        event, status = client.read()
        assert event == "state"
        assert (status["name"], status["state"]) == ("off", "STOPPED")


FLAPPING = """
command = "true"
autorestart = true
startsecs = 0
"""


def test_events_drop_a_client_that_is_too_slow_and_keep_the_others(
    supervise: Supervise,
) -> None:
    # These end at once, with success, so they are restarted at once, for ever.
    run = supervise(f"[programs.web]\n{SLEEP}[programs.f]\nnumprocs = 2\n{FLAPPING}")
    with EventClient(run) as slow, EventClient(run) as quick:
        seen = 0
        while seen < 1800:  # what the kernel holds for the slow one, 1000, and more
            quick.read()
            seen += 1
        run.ask("/programs/all/stop", "POST")
        quick.states("web", until="STOPPED")
        missed = 0
        with contextlib.suppress(EOFError, ConnectionResetError):
            while missed < seen:
                slow.read()
                missed += 1
        assert missed < seen


def test_programs_that_end_at_once_for_ever_delay_nobody(supervise: Supervise) -> None:
    run = supervise(f"[programs.web]\n{SLEEP}[programs.f]\nnumprocs = 9\n{FLAPPING}")
    eventually(lambda: run.status("f:8")["restarts"], lambda n: n > 2)
    before = run.status("f:8")["restarts"]
    assert run.ask("/programs/web/stop?wait=30", "POST")[0] == 200
    assert run.status("f:8")["restarts"] < before + 200
    assert run.end() == 0


# === The library ======================================================================


def run_python(folder: Path, text: str, *arguments: str) -> str:
    """Run a Python program that can import supervisors; return what it prints."""
    done = subprocess.run(
        [PYTHON, "-c", text, *arguments],
        cwd=folder,
        env=own_environment(PYTHONPATH=str(SCRIPT.parent), TMPDIR=str(folder)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_import_has_no_side_effect_and_loads_nothing_heavy(tmp_path: Path) -> None:
    shown = run_python(
        tmp_path,
        """
import json, os, signal, sys, threading

def world():
    handlers = [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())]
    return handlers, os.listdir("/dev/fd"), threading.active_count(), dict(os.environ)

before, modules = world(), set(sys.modules)
import supervisors
assert world() == before
assert signal.set_wakeup_fd(-1) == -1
print(json.dumps(sorted(set(sys.modules) - modules)))
""",
    )
    heavy = {"http", "http.server", "http.client", "ssl", "email", "urllib.request"}
    heavy |= {"argparse", "asyncio", "dataclasses", "inspect", "ctypes", "logging"}
    heavy |= {"multiprocessing", "html", "difflib"}
    assert not heavy & set(json.loads(shown))
    assert [p.name for p in tmp_path.iterdir()] == []


def test_load_config_returns_a_config_or_raises_all_errors(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(f"[programs.web]\n{SLEEP}")
    (tmp_path / "bad.toml").write_text(BROKEN)
    run_python(
        tmp_path,
        """
import supervisors
config = supervisors.load_config("good.toml")
assert isinstance(config, supervisors.Config), config
for name in ("bad.toml", "missing.toml"):
    try:
        supervisors.load_config(name)
    except supervisors.ConfigError as error:
        assert isinstance(error, supervisors.SupervisorError)
        assert len(error.errors) == (3 if name == "bad.toml" else 1), error.errors
    else:
        assert False, name
""",
    )


def test_supervisor_run_returns_the_exit_status_and_leaves_the_process_as_it_was(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.toml").write_text(
        f'listen = "127.0.0.1:{free_port()}"\ncontrol = "s"\nexit_when_done = true\n'
        '[programs.web]\ncommand = ["sh", "-c", "echo hello; exit 3"]\n'
    )
    shown = run_python(
        tmp_path,
        """
import os, signal, threading
import supervisors

def world():
    handlers = [signal.getsignal(n) for n in sorted(signal.valid_signals())]
    return handlers, sorted(os.listdir("/dev/fd")), threading.active_count()

config = supervisors.load_config("own.toml")
inherited = os.open("/dev/null", os.O_RDONLY)
os.set_inheritable(inherited, True)
before = world()
devnull = os.open("/dev/null", os.O_WRONLY)
error = os.dup(2)
os.dup2(devnull, 2)
code = supervisors.Supervisor(config).run()
os.dup2(error, 2)
os.close(error)
os.close(devnull)
assert code == 3, code
assert world() == before, (before, world())
assert os.get_inheritable(inherited)
assert signal.set_wakeup_fd(-1) == -1
""",
    )
    assert "hello" in shown
    assert not (tmp_path / "s").exists()


def test_supervisor_run_leaves_no_health_check_to_its_host(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "begun")
    (tmp_path / "own.toml").write_text(f"""
        listen = ""
        control = ""
        [programs.web]
        command = {sh("read x < begun; exit 3")}
        on_failure = "shutdown"
        healthcheck.command = {sh("echo > begun; exec sleep 1000")}
        healthcheck.timeout = 1000
        """)
    run_python(
        tmp_path,
        """
import os, sys
import supervisors

sys.stderr = open(os.dup(2), "w")
os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
code = supervisors.Supervisor(supervisors.load_config("own.toml")).run()
assert code == 3, code
try:
    child = os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    pass
else:
    assert False, child
""",
    )


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_client_does_what_the_verbs_do(supervise: Supervise, kind: str) -> None:
    port = free_port()
    run = supervise(
        f'token = "sesame"\n{FAST}[programs.web]\n'
        "command = ['sh', '-c', 'echo hello; exec sleep 1000']\n"
        f"[programs.api]\nnumprocs = 2\n{SLEEP}",
        listen=f'"127.0.0.1:{port}"',
    )
    address = f"unix:{run.folder / 's'}" if kind == "unix" else f"127.0.0.1:{port}"
    run_python(
        run.folder,
        """
import sys
import supervisors

address, token = sys.argv[1:]
client = supervisors.Client(address, token=token or None)
client.wait_healthy(10)
assert [s["name"] for s in client.status()] == ["web", "api:0", "api:1"]
first = client.status("web")
assert (first["name"], first["state"]) == ("web", "RUNNING")
assert client.health()["status"] == "ok"
client.stop("web")
assert client.status("web")["state"] == "STOPPED"
client.start("web", wait=10)
client.restart("web")
second = client.status("web")
assert second["state"] == "RUNNING" and second["pid"] != first["pid"]
client.signal("web", "URG")
assert "hello" in client.logs("web", lines=5)
assert client.reload()["unchanged"] == 3
for call in (
    lambda: client.stop("wbe"),
    lambda: client.status("wbe"),
    lambda: client.signal("web", "NOPE"),
    lambda: client.signal("web", "HUP X"),
    lambda: supervisors.Client("unix:/nowhere").status(),
    lambda: supervisors.Client("127.0.0.1:1").status(),
):
    try:
        call()
    except supervisors.SupervisorError as error:
        assert "malformed" not in str(error), error
    else:
        assert False, call
client.shutdown()
""",
        address,
        "sesame" if kind == "tcp" else "",
    )
    assert run.popen.wait(LIMIT) == 0


def test_running_takes_any_mappings_and_any_text(tmp_path: Path) -> None:
    shown = run_python(
        tmp_path,
        r"""
import os, sys
from types import MappingProxyType as Read
import supervisors

command = ["sh", "-c", 'echo "$FACE"']
web = Read({"command": command, "environment": Read({"FACE": "\U0001f600"})})
sys.stderr = open(os.dup(2), "w")
os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
with supervisors.running(Read({"programs": Read({"web": web})})) as client:
    while not (shown := client.logs("web")):
        pass
print(ascii(shown))
""",
    )
    assert r"'\U0001f600\n'" in shown


def test_running_raises_what_is_wrong_with_a_configuration() -> None:
    config = {"programs": {"web": {"comand": "true"}}}
    with pytest.raises(ConfigError) as caught, supervisors.running(config):
        pass
    assert any("programs.web.comand: unknown" in line for line in caught.value.errors)


def test_running_takes_paths_and_ends_though_a_fork_lives_on(tmp_path: Path) -> None:
    run_python(
        tmp_path,
        r"""
import os, pathlib, signal, sys
import supervisors

folder = pathlib.Path.cwd()
web = {"command": ["sleep", "1000"], "startsecs": 0, "directory": folder}
sys.stderr = open(os.dup(2), "w")
os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
with supervisors.running({"programs": {"web": web}}) as client:
    client.wait_healthy(10)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        signal.pause()
assert os.waitpid(child, os.WNOHANG) == (0, 0)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
""",
    )


def test_private_supervisor_without_its_socket_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(f"[programs.web]\n{SLEEP}")
    too_long = f"--private={tmp_path}/{'x' * 200}"
    with subprocess.Popen(
        [PYTHON, str(SCRIPT), "-c", "own.toml", too_long],
        cwd=tmp_path,
        env=own_environment(),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as popen:
        try:
            assert popen.wait(LIMIT) == 2
        finally:
            popen.kill()
        assert popen.stderr is not None
        assert b"cannot listen on the control socket" in popen.stderr.read()


SUITE = """
import os, signal, time
import pytest, supervisors

CONFIG = {
    "defaults": {"startsecs": 0},
    "programs": {
        "web": {"command": ["sleep", "1000"]},
        "db": {"command": ["sh", "-c", "trap '' TERM; sleep 1000; sleep 1000"],
               "stopwaitsecs": 0.1},
    },
}

@pytest.mark.parametrize("config", [CONFIG, "own.toml"])
def test_passes(config):
    with supervisors.running(config) as s:
        s.wait_healthy(timeout=10)
        assert s.status("web")["state"] == "RUNNING"
        s.restart("web")

def test_fails():
    with supervisors.running(CONFIG) as s:
        s.wait_healthy(timeout=10)
        assert s.status("web")["state"] == "BROKEN"

def test_bad():
    with pytest.raises(supervisors.SupervisorError):
        with supervisors.running({"programs": {"web": {"comand": "x"}}}):
            pass

def test_hangs():
    with supervisors.running(CONFIG) as s:
        s.wait_healthy(timeout=10)
        open("up", "w").close()
        while True:
            signal.pause()

def test_forks():
    with supervisors.running(CONFIG) as s:
        s.wait_healthy(timeout=10)
        if os.fork() == 0:  # holds what this process holds, until all is over
            while s.answers():
                time.sleep(0.02)
            os._exit(0)
        open("up", "w").close()
        while True:
            signal.pause()
"""


class Suite:
    """A pytest run that uses the library, and the processes that belong to it."""

    def __init__(self, folder: Path, test: str) -> None:
        (folder / "test_suite.py").write_text(SUITE)
        (folder / "own.toml").write_text(f"{FAST}[programs.web]\n{SLEEP}")
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        mark = {"TEST_MARK": uuid.uuid4().hex}
        self.popen = subprocess.Popen(
            [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", test],
            cwd=folder,
            env=own_environment(
                PYTHONPATH=str(SCRIPT.parent), TMPDIR=str(self.temporary), **mark
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.left = Run(folder, self.popen, mark["TEST_MARK"]).left


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Callable[[str], Suite]]:
    """Start pytest runs of `SUITE`; see that each leaves nothing behind."""
    suites: list[Suite] = []

    def start(test: str) -> Suite:
        suites.append(Suite(tmp_path, test))
        return suites[-1]

    try:
        yield start
        for each in suites:
            eventually(each.left, [])
    finally:
        for each in suites:
            for pid in each.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            each.popen.communicate(timeout=LIMIT)


StartSuite = Callable[[str], Suite]


def test_running_in_a_test_suite_leaves_nothing_behind(suite: StartSuite) -> None:
    run = suite("not hangs and not forks")
    shown = run.popen.communicate(timeout=LIMIT)[0].decode()
    assert "1 failed, 3 passed" in shown
    assert "BROKEN" in shown
    assert run.left() == []
    assert list(run.temporary.iterdir()) == []


@pytest.mark.parametrize("test", ["hangs", "forks"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_running_ends_with_its_parent_however_that_ends(
    suite: StartSuite, tmp_path: Path, number: int, test: str
) -> None:
    run = suite(test)
    eventually((tmp_path / "up").exists)
    assert len(run.left()) > 3
    os.kill(run.popen.pid, number)
    run.popen.communicate(timeout=LIMIT)
    eventually(run.left, [])


# === The page =========================================================================
#
# A real browser, driven over the W3C protocol that its driver speaks.


class Browser:
    """A Chromium of its own, without a window."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # names an element, in the protocol

    def __init__(self, folder: Path) -> None:
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if not chromium or not driver:
            cannot("chromium and chromedriver are not installed")
        self.driver = subprocess.Popen(
            [driver, "--port=0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.session = ""
        try:
            assert self.driver.stdout is not None
            ready = rb"started successfully on port (\d+)"
            said = (re.search(ready, line) for line in self.driver.stdout)
            port = next(int(match[1]) for match in said if match)
            self.connection = http.client.HTTPConnection(
                "127.0.0.1", port, timeout=LIMIT
            )
            options = {
                "binary": chromium,
                "args": [*self.FLAGS.split(), f"--user-data-dir={folder}"],
            }
            wanted = {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            answer = self.post("session", capabilities={"alwaysMatch": wanted})
            self.session = f"session/{answer['sessionId']}/"
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.session:
            self.ask("DELETE", self.session.rstrip("/"))
        self.driver.terminate()
        self.driver.communicate(timeout=LIMIT)

    def ask(self, method: str, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        self.connection.request(method, f"/{path}", json.dumps(body), headers)
        answer = self.connection.getresponse()
        value = json.loads(answer.read())["value"]
        assert answer.status == 200, value
        return value

    def post(self, path: str, **body: Any) -> Any:
        return self.ask("POST", self.session + path, **body)

    def go(self, url: str) -> None:
        self.post("url", url=url)

    def run(self, code: str, *arguments: Any) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return self.post("execute/sync", script=code, args=arguments)

    def text(self, selector: str) -> str:
        """Return the text that one can see of the first element that matches."""
        code = (
            "let e = document.querySelector(arguments[0]); return e ? e.innerText : ''"
        )
        return str(self.run(code, selector))

    def wait_text(self, selector: str, text: str) -> None:
        eventually(lambda: self.text(selector), text)

    def is_visible(self, selector: str) -> bool:
        code = "return document.querySelector(arguments[0])?.checkVisibility() || false"
        return bool(self.run(code, selector))

    def is_enabled(self, selector: str) -> bool:
        return bool(
            self.run("return !document.querySelector(arguments[0]).disabled", selector)
        )

    def find(self, selector: str) -> str:
        found = self.post("element", using="css selector", value=selector)
        return str(found[self.ELEMENT])

    def click(self, selector: str) -> None:
        """Click where the element is, as a person does."""
        self.post(f"element/{self.find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self.post(f"element/{self.find(selector)}/value", text=text)

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        kinds = ("keyDown", "keyUp")
        actions = [{"type": kind, "value": key} for key in keys for kind in kinds]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        self.post("actions", actions=[source])

    def tab_to(self, selector: str) -> None:
        """Press Tab until the focus is on an element."""
        code = "return document.activeElement.matches(arguments[0])"
        for _ in range(50):
            if self.run(code, selector):
                return
            self.press("\ue004")
        raise AssertionError(f"no Tab leads to {selector}")

    def devtools(self, command: str, **parameters: Any) -> None:
        self.post("goog/cdp/execute", cmd=command, params=parameters)

    def resize(self, width: int, height: int) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def prefer(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def complaints(self) -> list[str]:
        """Return what the console got since the last call, above mere information."""
        entries = self.post("se/log", type="browser")
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """Return the browser with an empty page, a console that says nothing yet."""
    chromium.go("about:blank")
    chromium.resize(1280, 844)
    chromium.complaints()
    return chromium


def row(name: str) -> str:
    """Return the selector of a program's row; it needs the page's own names."""
    return f'tr[data-name="{name}"]'


def page_config(talker: str) -> str:
    return (
        f'token = "sesame"\n{FAST}[programs.web]\ncommand = {talker}\n'
        f"[programs.db]\n{SLEEP}"
        f"[programs.broken]\ncommand = 'no-such-command'\n"
    )


def test_page_shows_programs_live_and_controls_them_with_the_token(
    supervise: Supervise, browser: Browser, tmp_path: Path
) -> None:
    port = free_port()
    talker = script(tmp_path, "talker.py", TALKER)
    run = supervise(page_config(talker), listen=f'"127.0.0.1:{port}"')
    run.wait_state("broken", "FATAL")
    browser.go(f"http://127.0.0.1:{port}/")
    for name, state in (("web", "RUNNING"), ("db", "RUNNING"), ("broken", "FATAL")):
        browser.wait_text(f"{row(name)} .state", state)
    assert "no-such-command" in browser.text(row("broken"))
    assert browser.text("#health")
    run.ask("/programs/db/stop", "POST")
    browser.wait_text(f"{row('db')} .state", "STOPPED")
    rewrite(
        run,
        page_config(talker) + f"[programs.late]\n{SLEEP}",
        listen=f'"127.0.0.1:{port}"',
    )
    run.ask("/reload", "POST")
    browser.wait_text(f"{row('late')} .state", "RUNNING")

    # Buttons only where the client may use them.
    assert not browser.is_visible("[data-verb=stop]")
    browser.type("#token", "sesame")
    browser.click("#unlock button")
    stop, start = f"{row('web')} [data-verb=stop]", f"{row('web')} [data-verb=start]"
    eventually(lambda: browser.is_visible(stop) and browser.is_enabled(stop))
    browser.click(stop)
    browser.wait_text(f"{row('web')} .state", "STOPPED")
    assert run.state("web") == "STOPPED"
    eventually(lambda: browser.is_enabled(start))
    browser.click(start)
    browser.wait_text(f"{row('web')} .state", "RUNNING")
    pid = run.status("web")["pid"]
    eventually(lambda: str(pid) in browser.text(row("web")))

    browser.click(f"{row('web')} [data-verb=log]")
    eventually(lambda: browser.text("#log pre"), lambda text: text.count("ready") == 2)
    run.ask("/programs/web/signal?signal=USR1", "POST")
    eventually(lambda: "line 1" in browser.text("#log pre"))
    browser.click("#log-close")
    eventually(lambda: browser.is_visible("#log"), False)

    # The token survives a reload of the page.
    browser.go(f"http://127.0.0.1:{port}/")
    eventually(lambda: browser.is_visible(stop))
    assert browser.complaints() == []


def test_page_is_usable_by_keyboard(
    supervise: Supervise, browser: Browser, tmp_path: Path
) -> None:
    port = free_port()
    talker = script(tmp_path, "talker.py", TALKER)
    run = supervise(page_config(talker), listen=f'"127.0.0.1:{port}"')
    browser.go(f"http://127.0.0.1:{port}/")
    browser.wait_text(f"{row('web')} .state", "RUNNING")
    browser.tab_to("#token")
    browser.press(*"sesame", "\ue007")
    stop, start = f"{row('web')} [data-verb=stop]", f"{row('web')} [data-verb=start]"
    eventually(lambda: browser.is_visible(stop) and browser.is_enabled(stop))
    browser.tab_to(stop)
    browser.press(" ")
    run.wait_state("web", "STOPPED")
    eventually(lambda: browser.is_enabled(start))
    browser.tab_to(start)
    browser.press("\ue007")
    run.wait_state("web", "RUNNING")
    browser.tab_to(f"{row('web')} [data-verb=log]")
    browser.press("\ue007")
    eventually(lambda: "ready" in browser.text("#log pre"))
    browser.tab_to("#log-close")
    browser.press("\ue007")
    eventually(lambda: browser.is_visible("#log"), False)
    assert browser.complaints() == []


def test_page_fits_phone_and_desktop_in_dark_and_light(
    supervise: Supervise, browser: Browser, tmp_path: Path
) -> None:
    port = free_port()
    talker = script(tmp_path, "talker.py", TALKER)
    long_name = "a-program-with-a-name-that-is-longer-than-most-names-are"
    run = supervise(
        page_config(talker) + f"[programs.{long_name}]\n{SLEEP}",
        listen=f'"127.0.0.1:{port}"',
    )
    run.wait_state("broken", "FATAL")
    browser.go(f"http://127.0.0.1:{port}/")
    browser.type("#token", "sesame\ue007")
    eventually(lambda: browser.is_visible(f"{row('web')} [data-verb=stop]"))
    grounds = set()
    for scheme, width in itertools.product(("dark", "light"), (390, 1280)):
        browser.resize(width, 844)
        browser.prefer(scheme)
        wide = browser.run("return document.documentElement.scrollWidth")
        assert wide <= width, "nobody has to scroll sideways"
        for name in ("web", "db", "broken", long_name):
            for part in ("", " .state", " [data-verb=restart]"):
                assert is_inside(browser, row(name) + part, width)
        ground = browser.run("return getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
        assert (brightness < 100) == (scheme == "dark")
        grounds.add(ground)
        assert contrast_is_enough(browser)
    assert len(grounds) == 2
    assert browser.complaints() == []


def is_inside(browser: Browser, selector: str, width: int) -> bool:
    """Return whether an element can be seen without scrolling sideways."""
    code = (
        "let b = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [b.left, b.right, b.width]"
    )
    left, right, wide = browser.run(code, selector)
    return bool(left >= 0 and right <= width and wide > 0)


def contrast_is_enough(browser: Browser) -> bool:
    """Return whether all states have a contrast of 4.5 to the ground (WCAG 2, AA)."""

    def luminance(color: str) -> float:
        channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in channels
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ground = luminance(
        browser.run("return getComputedStyle(document.body).backgroundColor")
    )
    code = (
        "return [...document.querySelectorAll('tr th, tr td')]"
        ".map(e => getComputedStyle(e).color)"
    )
    for color in browser.run(code):
        dark, light = sorted([luminance(color), ground])
        if (light + 0.05) / (dark + 0.05) < 4.5:
            return False
    return True


def test_page_says_when_the_token_is_wrong_or_none_is_configured(
    supervise: Supervise, browser: Browser, tmp_path: Path
) -> None:
    port = free_port()
    listen = f'"127.0.0.1:{port}"'
    run = supervise(f'token = "sesame"\n{FAST}[programs.web]\n{SLEEP}', listen=listen)
    browser.go(f"http://127.0.0.1:{port}/")
    browser.wait_text(f"{row('web')} .state", "RUNNING")
    browser.type("#token", "wrong\ue007")
    eventually(lambda: browser.text("#error"), lambda text: text != "")
    assert not browser.is_visible("[data-verb=stop]")
    rewrite(run, f"{FAST}[programs.web]\n{SLEEP}", listen=listen)
    run.ask("/reload", "POST")
    browser.go(f"http://127.0.0.1:{port}/")
    browser.wait_text(f"{row('web')} .state", "RUNNING")
    assert not browser.is_visible("[data-verb=stop]")


def test_page_says_that_the_supervisor_is_gone_and_when_it_is_back(
    supervise: Supervise, browser: Browser
) -> None:
    port = free_port()
    listen = f'"127.0.0.1:{port}"'
    config = f"{FAST}[programs.web]\n{SLEEP}"
    run = supervise(config, listen=listen)
    browser.go(f"http://127.0.0.1:{port}/")
    browser.wait_text(f"{row('web')} .state", "RUNNING")
    run.end()
    eventually(lambda: "gone" in browser.text("#connection"))
    again = supervise(config, listen=listen)
    pid = again.wait_state("web", "RUNNING")["pid"]
    eventually(lambda: "Back" in browser.text("#connection"))
    eventually(lambda: str(pid) in browser.text(row("web")))


def unlocked(browser: Browser, port: int) -> None:
    """Open the page and give it the token."""
    browser.go(f"http://127.0.0.1:{port}/")
    browser.type("#token", "sesame\ue007")
    eventually(lambda: browser.is_visible(f"{row('web')} [data-verb=log]"))


def test_page_follows_one_log_however_often_it_is_asked_to(
    supervise: Supervise, browser: Browser, tmp_path: Path
) -> None:
    port = free_port()
    talker = script(tmp_path, "talker.py", TALKER)
    run = supervise(page_config(talker), listen=f'"127.0.0.1:{port}"')
    unlocked(browser, port)
    twice = "let b = document.querySelector(arguments[0]); b.click(); b.click()"
    browser.run(twice, f"{row('web')} [data-verb=log]")
    browser.wait_text("#log pre", "ready\n")
    for number in (1, 2, 3):
        run.ask("/programs/web/signal?signal=USR1", "POST")
        last = f"line {number}"
        eventually(
            lambda: browser.text("#log pre"), lambda text, last=last: last in text
        )
    assert browser.text("#log pre") == "ready\nline 1\nline 2\nline 3\n"
    assert browser.complaints() == []


def test_page_says_that_a_log_has_ended_and_opens_it_anew(
    supervise: Supervise, browser: Browser, tmp_path: Path
) -> None:
    port = free_port()
    config = page_config(script(tmp_path, "talker.py", TALKER))
    run = supervise(config, listen=f'"127.0.0.1:{port}"')
    unlocked(browser, port)
    browser.click(f"{row('web')} [data-verb=log]")
    browser.wait_text("#log pre", "ready\n")
    assert browser.text("#name") == "web"
    run.ask("/programs/web/signal?signal=USR1", "POST")
    browser.wait_text("#log pre", "ready\nline 1\n")
    run.end()
    browser.wait_text("#name", "web (ended)")
    supervise(config, listen=f'"127.0.0.1:{port}"')
    browser.wait_text("#name", "web")
    browser.wait_text("#log pre", "ready\n")


def test_page_shows_an_error_wherever_one_has_scrolled_to(
    supervise: Supervise, browser: Browser
) -> None:
    port = free_port()
    supervise(
        f'token = "sesame"\n{FAST}[programs.many]\n{SLEEP}numprocs = 30\n'
        f'[programs.web]\n{SLEEP}log_format = "raw"\n',
        listen=f'"127.0.0.1:{port}"',
    )
    unlocked(browser, port)
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.click(f"{row('web')} [data-verb=log]")
    eventually(lambda: "web has a descriptor of its own" in browser.text("#error"))
    code = "return document.querySelector('#error').getBoundingClientRect().top"
    assert 0 <= browser.run(code) < 844


def test_page_tells_a_refusal_of_its_events_from_the_end(
    shared: Shared, browser: Browser
) -> None:
    port = shared.port
    request = f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stream = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            stream.settimeout(LIMIT)
            stream.sendall(request)
            assert b" 200 " in stream.recv(64)
        browser.go(f"http://127.0.0.1:{port}/")
        eventually(lambda: "Events are refused" in browser.text("#connection"))
    eventually(lambda: "Back since" in browser.text("#connection"))


# === Init mode: helpers ========================================================

INIT = (PYTHON, str(SCRIPT))
NAMESPACES = ("--pid", "--fork", "--kill-child", "--mount-proc")
AS_PID_1 = pytest.mark.parametrize("namespaces", [(), NAMESPACES], ids=["-", "pid-1"])


def prefix(namespaces: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words that make namespaces, none for none."""
    return unshare(*namespaces) if namespaces else ()


def init(
    *arguments: str, before: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run an init to its end."""
    words = [*before, *INIT, *arguments]
    given = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(words, timeout=LIMIT, **(given | options))


StartInit = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start_init(tmp_path: Path) -> Iterator[StartInit]:
    """Start inits in the test's folder; end them and all that carries their mark."""
    started: list[subprocess.Popen[bytes]] = []
    mark = f"{os.getpid()}:{tmp_path}"

    def start(
        *arguments: str, before: tuple[str, ...] = (), own_session: bool = False
    ) -> subprocess.Popen[bytes]:
        with open(tmp_path / "err", "ab") as err:
            popen = subprocess.Popen(
                [*before, *INIT, *arguments],
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stderr=err,
                env=os.environ | {"TEST_MARK": mark},
                process_group=None if own_session else 0,
                start_new_session=own_session,
            )
        started.append(popen)
        return popen

    try:
        yield start
    finally:
        for pid in all_pids():
            if f"TEST_MARK={mark}\0".encode() in environ_of(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for popen in started:
            popen.wait(LIMIT)


def process_state(pid: int) -> str:
    """Return a process's state as in `/proc/PID/stat`; nothing for one that is gone."""
    return "".join(stat_of(pid)[:1])


def name_of(pid: int) -> str:
    """Return the name of a process; nothing for one that is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def init_below(popen: subprocess.Popen[bytes], before: tuple[str, ...]) -> int:
    """Return the init's process: the started one, or under `before` its child."""
    if not before:
        return popen.pid
    return eventually(lambda: children(popen.pid), len)[0]


# === Init mode: exit status ====================================================

FATAL_SIGNALS = sorted(
    signal.valid_signals()
    - {
        signal.SIGCHLD,
        signal.SIGCONT,
        signal.SIGSTOP,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGURG,
        signal.SIGWINCH,
    }
)


def test_init_ends_as_its_command_does_and_says_nothing(tmp_path: Path) -> None:
    # A module's bytecode is cached, a script's is not: 310 inits take a while.
    (tmp_path / "supervisors.py").symlink_to(SCRIPT.resolve())

    def end(text: str) -> tuple[int, str]:
        done = subprocess.run(
            [PYTHON, "-S", "-m", "supervisors", "--", "sh", "-c", text],
            cwd=tmp_path,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        return done.returncode, done.stdout

    end("exit 0")
    assert (tmp_path / "__pycache__").exists()
    codes = {f"exit {code}": code for code in range(256)}
    codes |= {f"ulimit -c 0; kill -{n} $$": 128 + n for n in FATAL_SIGNALS}
    with ThreadPoolExecutor(8) as pool:
        ends = dict(zip(codes, pool.map(end, codes), strict=True))
    assert ends == {text: (code, "") for text, code in codes.items()}


def test_init_says_in_one_line_why_it_cannot_run_the_command(tmp_path: Path) -> None:
    for name, text in {"plain": "", "empty": "", "garbage": "\0\1\2"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o644 if name == "plain" else 0o755)
    for command, code in {
        "no-such-command": 127,
        "./no/such/file": 127,
        "": 127,
        "./plain": 126,
        ".": 126,
        "./empty": 126,
        "./garbage": 126,
    }.items():
        done = init("--", command, cwd=tmp_path)
        assert (command, done.returncode) == (command, code)
        assert command in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_command_is_missing_too_where_path_names_what_is_no_folder() -> None:
    path = f"{os.environ['PATH']}:/dev/null"
    done = init("--", "no-such-command", env=os.environ | {"PATH": path})
    assert done.returncode == 127
    assert "no such command" in done.stderr


def test_init_says_in_one_line_that_it_cannot_start_a_process() -> None:
    before = (*minimal_root("nobody"), "prlimit", "--nproc=1")
    done = init("--", "true", before=before)
    assert done.returncode == 1
    assert done.stderr.startswith("supervisors: cannot start a process: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("target", ["&-", "/dev/full"])
def test_exit_status_does_not_need_standard_error(target: str) -> None:
    before = ("sh", "-c", f'exec "$@" 2>{target}', "sh")
    for arguments, code in {("no-such-command",): 127, (): 2}.items():
        done = init("--", *arguments, before=before)
        assert (done.returncode, done.stdout) == (code, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--"],
        ["-c", "--"],
        ["-r", "KILL:TERM", "--", "true"],
        ["-r", "19:0", "--", "true"],
        ["-r", "NONSENSE:TERM", "--", "true"],
        ["-r", "TERM", "--", "true"],
        ["--grace", "soon", "--", "true"],
    ],
    ids=" ".join,
)
def test_init_refuses_a_bad_command_line(arguments: list[str]) -> None:
    done = init(*arguments)
    assert done.returncode == 2
    assert done.stderr and "Traceback" not in done.stderr


def test_init_passes_options_after_the_command_on() -> None:
    done = init("--", "printf", "<%s>", "-c", "--", "-r", "", "a b")
    assert done.stdout == "<-c><--><-r><><a b>"


@pytest.mark.parametrize("runner", ["run_path", "exec"])
def test_script_that_python_code_runs_raises_its_status_there(runner: str) -> None:
    text = """
        import runpy, sys
        path, run = sys.argv.pop(1), sys.argv.pop(1)
        try:
            if run == "exec":
                exec(compile(open(path).read(), path, "exec"))
            runpy.run_path(path, run_name="__main__")
        except SystemExit as error:
            print("raised", error.code)
        """
    words = [PYTHON, "-c", textwrap.dedent(text), str(SCRIPT), runner]
    words += ["--", "sh", "-c", "exit 9"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT)
    assert (done.stdout, done.stderr) == ("raised 9\n", "")


def test_traceback_of_a_mistake_ends_with_the_mistake(tmp_path: Path) -> None:
    broken = SCRIPT.read_text().replace("\ndef main(", "\ndef main(*_): 1 / 0\ndef _(")
    (tmp_path / "broken.py").write_text(broken)
    words = [PYTHON, "broken.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("\nZeroDivisionError: division by zero\n")
    assert done.stderr.count("Traceback") == 1


def private_kilobytes(pid: int) -> int:
    """Return what a process holds that no other shares."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        cannot("needs /proc/PID/smaps_rollup")
    return sum(map(int, re.findall(r"(?m)^Private_\w+: +(\d+) kB", text)))


@pytest.mark.parametrize("words", ["supervisors.py", "-B -m supervisors"])
def test_init_does_not_keep_what_compiling_it_took(words: str, tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    pipes["cwd"] = tmp_path
    wait = "print(1, flush=True); import sys; sys.stdin.read()"
    argv = [PYTHON, *words.split(), "--", "sh", "-c", "echo 1; cat"]
    with (
        subprocess.Popen([PYTHON, "-c", wait], **pipes) as bare,
        subprocess.Popen(argv, **pipes) as init,
    ):
        for popen in (bare, init):
            assert popen.stdout and popen.stdout.readline() == b"1\n"

        def more() -> int:
            return private_kilobytes(init.pid) - private_kilobytes(bare.pid)

        # The goal is 6 MB; the syntax tree alone is 9.
        eventually(more, lambda kilobytes: kilobytes < 7 * 1024)


# === Init mode: signals ========================================================

# Two processes of one group that write every signal they get to a file each.
RECORDER = """
import os, signal, sys
signals = signal.valid_signals() - {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
name = "child" if os.fork() == 0 else "leader"
with open(name, "w") as file:
    print("up", file=file, flush=True)
    while True:
        number = signal.sigwait(signals)
        print(int(number), file=file, flush=True)
        if number == signal.SIGUSR2:
            sys.exit(3)
"""
JOB_CONTROL = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
CATCHABLE = (
    signal.valid_signals()
    - JOB_CONTROL
    - {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR2}
)


def record(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "record").write_text(RECORDER)
    return (PYTHON, "-S", "record")


def recorded(tmp_path: Path, name: str) -> list[int]:
    """Return the signals that a recorder has got; wait until it can get any."""
    return [int(x) for x in eventually(lambda: lines(tmp_path / name), len)[1:]]


def test_init_passes_every_signal_to_the_group(
    tmp_path: Path, start_init: StartInit
) -> None:
    popen = start_init("--", *record(tmp_path))
    assert recorded(tmp_path, "leader") == recorded(tmp_path, "child") == []
    for number in sorted(CATCHABLE):
        popen.send_signal(number)
        eventually(lambda: recorded(tmp_path, "leader")[-1:], [number])
        eventually(lambda: recorded(tmp_path, "child")[-1:], [number])
    popen.send_signal(signal.SIGUSR2)
    assert popen.wait(LIMIT) == 3
    # Each came once.
    assert recorded(tmp_path, "leader") == [*sorted(CATCHABLE), signal.SIGUSR2]


def test_init_with_c_passes_every_signal_to_the_command_alone(
    tmp_path: Path, start_init: StartInit
) -> None:
    popen = start_init("-c", "--grace=0.1", "--", *record(tmp_path))
    assert recorded(tmp_path, "leader") == recorded(tmp_path, "child") == []
    for number in sorted(CATCHABLE):
        popen.send_signal(number)
        eventually(lambda: recorded(tmp_path, "leader")[-1:], [number])
    for number in sorted(JOB_CONTROL):
        popen.send_signal(number)
        eventually(lambda: recorded(tmp_path, "leader")[-1:], [number])
        eventually(lambda: process_state(popen.pid), "T")
        popen.send_signal(signal.SIGCONT)
        eventually(lambda: recorded(tmp_path, "leader")[-1:], [signal.SIGCONT])
    assert recorded(tmp_path, "child") == []
    popen.send_signal(signal.SIGUSR2)
    assert popen.wait(LIMIT) == 3


def test_init_rewrites_and_drops_signals(tmp_path: Path, start_init: StartInit) -> None:
    popen = start_init(
        *("-r", "15:3", "-r", "SIGINT:SIGUSR1", "-r", "ALRM:0"),
        *("--", *record(tmp_path)),
    )
    assert recorded(tmp_path, "leader") == []
    popen.send_signal(signal.SIGALRM)
    popen.send_signal(signal.SIGTERM)
    eventually(lambda: recorded(tmp_path, "leader"), [signal.SIGQUIT])
    popen.send_signal(signal.SIGINT)
    eventually(lambda: recorded(tmp_path, "child")[1:], [signal.SIGUSR1])
    popen.send_signal(signal.SIGUSR2)
    assert popen.wait(LIMIT) == 3
    assert signal.SIGALRM not in recorded(tmp_path, "leader")


@pytest.mark.parametrize(
    ("number", "own_session"),
    [(number, False) for number in sorted(JOB_CONTROL)] + [(signal.SIGTSTP, True)],
)
def test_init_stops_its_group_and_itself_and_goes_on(
    tmp_path: Path, start_init: StartInit, number: int, own_session: bool
) -> None:
    popen = start_init("--", *record(tmp_path), own_session=own_session)
    assert recorded(tmp_path, "leader") == recorded(tmp_path, "child") == []
    (leader,) = children(popen.pid)
    (child,) = children(leader)
    popen.send_signal(number)
    eventually(
        lambda: [process_state(pid) for pid in (popen.pid, leader, child)], ["T"] * 3
    )
    popen.send_signal(signal.SIGCONT)
    eventually(lambda: process_state(popen.pid), "S")
    eventually(lambda: recorded(tmp_path, "child")[-1:], [signal.SIGCONT])
    popen.send_signal(signal.SIGUSR2)
    assert popen.wait(LIMIT) == 3


def test_init_with_a_rewritten_tstp_still_suspends_itself(
    tmp_path: Path, start_init: StartInit
) -> None:
    popen = start_init("-r", "TSTP:USR1", "--", *record(tmp_path))
    assert recorded(tmp_path, "leader") == []
    popen.send_signal(signal.SIGTSTP)
    eventually(lambda: process_state(popen.pid), "T")
    eventually(lambda: recorded(tmp_path, "leader"), [signal.SIGUSR1])
    popen.send_signal(signal.SIGCONT)
    popen.send_signal(signal.SIGUSR2)
    assert popen.wait(LIMIT) == 3


def test_init_as_pid_1_continues_a_command_that_stops() -> None:
    done = init("--", "sh", "-c", "kill -STOP $$; exit 6", before=unshare(*NAMESPACES))
    assert done.returncode == 6


def test_init_without_a_terminal_goes_on_while_its_command_is_stopped(
    tmp_path: Path, start_init: StartInit
) -> None:
    popen = start_init("--", *record(tmp_path))
    assert recorded(tmp_path, "leader") == []
    (leader,) = children(popen.pid)
    os.kill(leader, signal.SIGSTOP)
    eventually(lambda: process_state(leader), "T")
    popen.send_signal(signal.SIGUSR1)
    eventually(lambda: recorded(tmp_path, "child"), [signal.SIGUSR1])
    os.kill(leader, signal.SIGCONT)
    popen.send_signal(signal.SIGUSR2)
    assert popen.wait(LIMIT) == 3


def test_init_as_pid_1_is_ended_by_sigterm(
    tmp_path: Path, start_init: StartInit
) -> None:
    before = unshare(*NAMESPACES)
    popen = start_init("--", "sh", "-c", "echo >> up; exec sleep 1000", before=before)
    eventually((tmp_path / "up").exists)
    os.kill(init_below(popen, before), signal.SIGTERM)
    assert popen.wait(LIMIT) == 143


# === Init mode: terminals ======================================================


class Terminal:
    """A pseudo terminal and the process that leads its session."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.fd, other = pty.openpty()
        self.seen = ""
        # The first terminal that a session's leader opens controls the session.
        self.popen = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(other), *command],
            cwd=folder,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "HISTFILE": "", "PS1": "$ "},
        )
        os.close(other)
        os.set_blocking(self.fd, False)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def read(self) -> str:
        """Return all that was written to the terminal since the last `wait_for`."""
        # EIO says that nobody has the other side open.
        with contextlib.suppress(BlockingIOError, OSError):
            while piece := os.read(self.fd, 65536):
                self.seen += piece.decode(errors="replace")
        return self.seen

    def wait_for(self, text: str) -> None:
        eventually(self.read, lambda seen: text in seen)
        self.seen = self.seen.partition(text)[2]

    def close(self) -> None:
        """Hang up, and end what a lost terminal doesn't."""
        members = [p for p in all_pids() if stat_of(p)[3:4] == [str(self.popen.pid)]]
        for pid in [self.popen.pid, *members]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait(LIMIT)
        os.close(self.fd)


Open = Callable[..., Terminal]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Open]:
    """Start commands on terminals of their own."""
    opened: list[Terminal] = []

    def start(*command: str) -> Terminal:
        opened.append(Terminal(tmp_path, *command))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


BASH = ("bash", "--norc", "--noprofile", "-i")
needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


def test_init_puts_its_command_in_the_foreground(terminal: Open) -> None:
    tty = terminal(*INIT, "--", "sh", "-c", "echo pid $$.; read x; exit $x")
    tty.wait_for("pid ")
    eventually(tty.read, lambda seen: "." in seen)
    assert os.tcgetpgrp(tty.fd) == int(tty.seen.partition(".")[0]) != tty.popen.pid
    tty.type("9\n")
    assert tty.popen.wait(LIMIT) == 9


def test_ctrl_c_ends_a_command_under_init_with_130(terminal: Open) -> None:
    tty = terminal(*INIT, "--", "sh", "-c", "echo up; sleep 100; true")
    tty.wait_for("up")
    shell = os.tcgetpgrp(tty.fd)
    eventually(lambda: [name_of(pid) for pid in children(shell)], ["sleep"])
    tty.type("\x03")
    assert tty.popen.wait(LIMIT) == 130


@needs_bash
def test_a_command_under_init_can_be_suspended_and_continued(
    terminal: Open, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("echo up; read x; echo got $x; exit 3")
    tty = terminal(*BASH)
    tty.type(f"{' '.join(INIT)} -- sh run\n")
    tty.wait_for("up\r\n")
    command = os.tcgetpgrp(tty.fd)
    for _ in range(2):
        tty.type("\x1a")
        tty.wait_for("Stopped")
        tty.type("echo 'here'\n")
        tty.wait_for("\nhere")
        tty.type("fg\n")
        tty.wait_for("-- sh run")
        # A Ctrl-Z typed between tcsetpgrp and SIGCONT is lost: the kernel discards it.
        eventually(lambda: os.tcgetpgrp(tty.fd) == command)
        eventually(lambda: stat_of(command)[0] != "T")
    tty.type("hello\n")
    tty.wait_for("got hello")
    tty.type("echo code $?.\n")
    tty.wait_for("code 3.")


@needs_bash
def test_a_command_under_init_can_go_on_in_the_background(
    terminal: Open, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    (tmp_path / "run").write_text("echo up; read x < go; echo done > done; exit 3")
    tty = terminal(*BASH)
    tty.type(f"{' '.join(INIT)} -- sh run\n")
    tty.wait_for("up\r\n")
    tty.type("\x1a")
    tty.wait_for("Stopped")
    tty.type("bg\n")
    tty.type("echo > go\n")
    eventually((tmp_path / "done").exists)
    tty.type("wait; echo 'over'\n")
    tty.wait_for("\nover")


@needs_bash
def test_a_command_under_init_reads_after_it_went_on_in_the_background(
    terminal: Open, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    go = gate("go")
    (tmp_path / "run").write_text("echo up; read x < go; read x; echo got $x")
    tty = terminal(*BASH)
    tty.type(f"{' '.join(INIT)} -- sh run\n")
    tty.wait_for("up\r\n")
    tty.type("\x1a")
    tty.wait_for("Stopped")
    tty.type("bg\n")
    tty.wait_for("&")
    # A shell that brings a running job to the front sends no signal.
    tty.type("fg\n")
    tty.wait_for("-- sh run")
    eventually(lambda: os.tcgetpgrp(tty.fd) != tty.popen.pid)
    go.open()
    tty.type("hello\n")
    tty.wait_for("got hello")


def script_around_init(tmp_path: Path) -> str:
    """Write a script that has a command under an init; return its name."""
    (tmp_path / "run").write_text("echo up; read x; echo got $x")
    text = f"{' '.join(INIT)} -- sh run\necho the script goes on\n"
    (tmp_path / "around").write_text(text)
    return "around"


@needs_bash
def test_ctrl_z_stops_a_script_around_init_too(terminal: Open, tmp_path: Path) -> None:
    tty = terminal(*BASH)
    tty.type(f"sh {script_around_init(tmp_path)}\n")
    tty.wait_for("up\r\n")
    command = os.tcgetpgrp(tty.fd)
    tty.type("\x1a")
    tty.wait_for("Stopped")
    tty.type("echo 'here'\n")
    tty.wait_for("\nhere")
    tty.type("fg\n")
    eventually(lambda: os.tcgetpgrp(tty.fd), command)
    tty.type("hello\n")
    tty.wait_for("got hello")
    tty.wait_for("the script goes on")


@AS_PID_1
def test_ctrl_z_is_without_effect_where_no_shell_could_continue_the_script(
    terminal: Open, tmp_path: Path, namespaces: tuple[str, ...]
) -> None:
    tty = terminal(*prefix(namespaces), "sh", script_around_init(tmp_path))
    tty.wait_for("up\r\n")
    tty.type("\x1a")
    tty.type("hello\n")
    tty.wait_for("got hello")
    tty.wait_for("the script goes on")


@needs_bash
def test_a_command_under_init_can_be_brought_to_the_foreground(
    terminal: Open, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("read x; echo got $x; exit 3")
    tty = terminal(*BASH)
    tty.type(f"{' '.join(INIT)} -- sh run &\n")
    # It reads from the terminal, and is not in front: that stops it, and the init.
    tty.type("while [ -z \"$(jobs -s)\" ]; do :; done; echo 'here'\n")
    tty.wait_for("\nhere")
    tty.type("fg\n")
    eventually(lambda: os.tcgetpgrp(tty.fd) != tty.popen.pid)
    tty.type("hello\n")
    tty.wait_for("got hello")
    tty.type("echo code $?.\n")
    tty.wait_for("code 3.")


def started_sleep(tty: Terminal) -> int:
    """Run `sleep` in the foreground of a shell; return the shell's process group."""
    tty.type("echo 'begin'\n")
    eventually(tty.read, lambda seen: "\nbegin" in seen)
    assert "job control" not in tty.seen
    shell = os.tcgetpgrp(tty.fd)
    tty.type("sleep 1000\n")
    # The shell makes it the foreground group before it gives it its signals back.
    eventually(lambda: name_of(os.tcgetpgrp(tty.fd)), "sleep")
    return shell


@needs_bash
def test_an_interactive_shell_under_init_has_job_control(terminal: Open) -> None:
    tty = terminal(*INIT, "--", *BASH)
    shell = started_sleep(tty)
    tty.type("\x1a")
    tty.wait_for("Stopped")
    eventually(lambda: os.tcgetpgrp(tty.fd), shell)
    tty.type("fg\n")
    eventually(lambda: os.tcgetpgrp(tty.fd) != shell)
    tty.type("\x03")
    tty.type("echo 'back' $?.\n")
    tty.wait_for("back 130.")
    tty.type("exit 5\n")
    assert tty.popen.wait(LIMIT) == 5


@needs_bash
def test_an_interactive_shell_under_pid_1_has_job_control(terminal: Open) -> None:
    tty = terminal(*unshare(*NAMESPACES), *INIT, "--", *BASH)
    started_sleep(tty)
    tty.type("\x1a")
    tty.wait_for("Stopped")
    tty.type("exit 5\n")
    tty.type("exit 5\n")
    assert tty.popen.wait(LIMIT) == 5


@needs_bash
def test_tostop_never_stops_init(terminal: Open) -> None:
    tty = terminal(*BASH)
    tty.type("stty tostop\n")
    start = f"{' '.join(INIT)} --"
    tty.type(f"{start} no-such-command & wait $!; echo code $?.\n")
    tty.wait_for("no-such-command'")
    tty.wait_for("code 127.")
    tty.type(f"{start} true; echo code $?.\n")
    tty.wait_for("code 0.")
    tty.type(f"{start} true & wait $!; echo code $?.\n")
    tty.wait_for("code 0.")


def test_init_returns_the_terminal_as_it_found_it(terminal: Open) -> None:
    # What follows is in the foreground again: reading doesn't stop it.
    text = '"$@" -- true; echo up; read x; echo got $x'
    tty = terminal("sh", "-c", text, "sh", *INIT)
    before = termios.tcgetattr(tty.fd)
    tty.wait_for("up")
    assert os.tcgetpgrp(tty.fd) == tty.popen.pid
    assert termios.tcgetattr(tty.fd) == before
    tty.type("it\n")
    tty.wait_for("got it")


def test_init_works_without_standard_streams() -> None:
    assert init("--", "cat", stdin=None, input="over a pipe").stdout == "over a pipe"
    for closed in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]:
        text = f'exec "$@" {closed}'
        words = ["sh", "-c", text, "sh", *INIT, "--", "sh", "-c", "exit 4"]
        done = subprocess.run(words, timeout=LIMIT, capture_output=True, check=False)
        assert (closed, done.returncode, done.stderr) == (closed, 4, b"")
    text = 'exec "$@" <&-'
    words = ["sh", "-c", text, "sh", *INIT, "--", "sh", "-c", "ls /proc/$$/fd"]
    done = subprocess.run(words, timeout=LIMIT, capture_output=True, check=False)
    assert done.stdout.split()[:2] == [b"1", b"2"]


# === Orphans ===================================================================

# Starts 500 orphans that end at random times, waits for the test, and ends with 7.
ORPHANER = """
import os, random, sys, time
for number in range(500):
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            time.sleep(random.random() / 4)
        os._exit(0)
    os.waitpid(middle, 0)
open("up", "w").close()
open("go").readline()
sys.exit(7)
"""


@AS_PID_1
def test_init_reaps_500_orphans(
    tmp_path: Path,
    start_init: StartInit,
    gate: Callable[[str], Gate],
    namespaces: tuple[str, ...],
) -> None:
    before, go = prefix(namespaces), gate("go")
    popen = start_init("--", PYTHON, "-S", "-c", ORPHANER, before=before)
    eventually((tmp_path / "up").exists)
    eventually(lambda: len(children(init_below(popen, before))), 1)
    go.open()
    assert popen.wait(LIMIT) == 7
    assert (tmp_path / "err").read_text() == ""


@AS_PID_1
def test_supervisor_reaps_500_orphans(
    supervise: Supervise,
    tmp_path: Path,
    gate: Callable[[str], Gate],
    namespaces: tuple[str, ...],
) -> None:
    go = gate("go")
    run = supervise(
        f"""
        [programs.parent]
        command = {python(ORPHANER)}
        startsecs = 0
        [programs.beside]
        command = "sleep 1000"
        startsecs = 0
        """,
        prefix=prefix(namespaces),
    )
    beside = run.wait_state("beside", "RUNNING")["pid"]
    eventually((tmp_path / "up").exists)
    eventually(lambda: len(children(run.pid)), 2)
    go.open()
    assert run.wait_state("parent", "EXITED")["exit_code"] == 7
    assert run.status("beside")["pid"] == beside
    assert len(run.err.strip().split("\n")) <= 10, "noise about orphans"


def test_without_prctl_init_says_so_once_and_goes_on(
    tmp_path: Path, supervise: Supervise
) -> None:
    (tmp_path / "ctypes.py").write_text("raise ImportError('no ctypes here')")
    path = {"PYTHONPATH": str(tmp_path)}
    done = init("--", "sh", "-c", "exit 4", env=os.environ | path)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    run = supervise("[programs.web]\ncommand = 'sleep 1000'\nstartsecs = 0", env=path)
    run.wait_state("web", "RUNNING")
    assert run.err.count("subreaper") == 1
    assert run.end() == 0


# === The end: nothing is left behind ===========================================

# Leaves two daemons behind: `bad` ignores SIGTERM, `good` ends by it in its own time.
DAEMONS = """
import os, signal, sys, time
def start(name, wait):
    end, up = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, {15, 10})
            os.write(up, b"x")
            wait()
        os._exit(0)
    os.read(end, 1)
def good():
    signal.sigwait({15})
    time.sleep(0.1)
    open("good-end", "w").close()
def bad():
    while True:
        number = signal.sigwait({15, 10})
        with open("bad-signals", "a") as file:
            print(int(number), file=file)
start("good", good)
start("bad", bad)
"""


def daemons(pid: int) -> list[int]:
    """Wait until a process has adopted both daemons, which have left its session."""
    session = stat_of(pid)[3:4]
    return eventually(
        lambda: [child for child in children(pid) if stat_of(child)[3:4] != session],
        lambda found: len(found) == 2,
    )


@AS_PID_1
def test_init_leaves_no_daemon_behind(
    tmp_path: Path,
    start_init: StartInit,
    gate: Callable[[str], Gate],
    namespaces: tuple[str, ...],
) -> None:
    before, go = prefix(namespaces), gate("go")
    text = DAEMONS + "open('go').readline()\nsys.exit(7)"
    popen = start_init("--grace", "0.5", "--", PYTHON, "-S", "-c", text, before=before)
    found = daemons(init_below(popen, before))
    go.open()
    assert popen.wait(LIMIT) == 7
    assert (tmp_path / "good-end").exists()
    assert lines(tmp_path / "bad-signals") == ["15"]
    assert not any(map(is_alive, found))


# Only the main thread ends: the process is a zombie by its state, and goes on.
HALF_DEAD = """
import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
with open("pid", "w") as file:
    print(os.getpid(), file=file)
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
"""


def test_init_ends_what_has_lost_its_main_thread(
    tmp_path: Path, start_init: StartInit, gate: Callable[[str], Gate]
) -> None:
    go = gate("go")
    text = 'setsid "$@" & read line <go; exit 7'
    command = ("sh", "-c", text, "sh", PYTHON, "-S", "-c", HALF_DEAD)
    popen = start_init("--grace", "0.5", "--", *command)
    path = tmp_path / "pid"
    eventually(lambda: path.exists() and path.read_text().endswith("\n"))
    pid = int(path.read_text())
    eventually(lambda: stat_of(pid)[0], "Z")
    go.open()
    assert popen.wait(LIMIT) == 7
    assert not Path(f"/proc/{pid}").exists()


@AS_PID_1
def test_supervisor_leaves_no_daemon_behind(
    supervise: Supervise, tmp_path: Path, namespaces: tuple[str, ...]
) -> None:
    run = supervise(
        f"""
        [programs.parent]
        command = {python(DAEMONS)}
        """,
        prefix=prefix(namespaces),
    )
    run.wait_state("parent", "EXITED")
    found = daemons(run.pid)
    run.send(signal.SIGTERM)
    assert run.popen.wait(LIMIT) == 0
    assert (tmp_path / "good-end").exists()
    assert lines(tmp_path / "bad-signals") == ["15"]
    assert not any(map(is_alive, found))


def test_what_the_end_of_the_last_program_leaves_can_end_by_itself(
    supervise: Supervise, tmp_path: Path
) -> None:
    daemon = "trap 'echo >> ended; exit' TERM; echo >> up; while :; do sleep 0.05; done"
    text = 'trap "sleep 0.5; exit 0" TERM; setsid "$@" & while :; do sleep 0.05; done'
    run = supervise(f"""
        [programs.parent]
        command = {sh(text, "sh", "-c", daemon)}
        startsecs = 0
    """)
    eventually((tmp_path / "up").exists)
    assert run.end() == 0
    assert (tmp_path / "ended").exists()


def test_signals_during_the_grace_period_go_to_what_is_left(
    tmp_path: Path, start_init: StartInit
) -> None:
    popen = start_init(
        "--grace", "1000", "--", PYTHON, "-S", "-c", DAEMONS + "sys.exit(7)"
    )
    bad = tmp_path / "bad-signals"
    eventually(lambda: lines(bad), ["15"])
    popen.send_signal(signal.SIGUSR1)
    eventually(lambda: lines(bad), ["15", "10"])
    popen.send_signal(signal.SIGTERM)
    eventually(lambda: lines(bad), ["15", "10", "15"])
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(LIMIT) == 7


def test_what_is_left_gets_each_signal_once(
    tmp_path: Path, start_init: StartInit
) -> None:
    popen = start_init("-c", "--grace", "1000", "--", *record(tmp_path))
    assert recorded(tmp_path, "leader") == recorded(tmp_path, "child") == []
    popen.send_signal(signal.SIGUSR2)  # ends the leader, and begins the grace period
    started = [signal.SIGTERM, signal.SIGCONT]
    eventually(lambda: recorded(tmp_path, "child"), started)
    # Of a real-time signal the kernel keeps every copy.
    popen.send_signal(signal.SIGRTMIN)
    eventually(lambda: recorded(tmp_path, "child")[2:3], [signal.SIGRTMIN])
    popen.send_signal(signal.SIGTERM)
    eventually(lambda: recorded(tmp_path, "child")[-1], signal.SIGTERM)
    once = [*started, signal.SIGRTMIN, signal.SIGTERM]
    assert recorded(tmp_path, "child") == once
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(LIMIT) == 3


def test_init_ends_at_once_when_nothing_is_left(
    tmp_path: Path, start_init: StartInit
) -> None:
    text = "sleep 1000 & echo >> up; exit 3"
    popen = start_init("--grace", "1000", "--", "sh", "-c", text)
    assert popen.wait(LIMIT) == 3


def test_strangers_of_another_namespace_s_proc_are_not_ours() -> None:
    words = [*unshare("--pid", "--fork"), PYTHON, "-S", "-c"]
    text = "import supervisors; print(supervisors.process_table())"
    done = subprocess.run(
        [*words, text],
        cwd=SCRIPT.parent,
        capture_output=True,
        timeout=LIMIT,
        check=True,
    )
    assert done.stdout == b"{}\n"


# === Leftovers of a supervisor that was killed =================================

# Writes itself to `pids`, and to `overlap` whoever of an earlier start still lives.
SUCCESSOR = """
import os, signal, sys, time
def is_alive(pid):
    try:
        stat = open(f"/proc/{pid}/stat").read()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
for line in open("old") if os.path.exists("old") else ():
    if is_alive(int(line)):
        open("overlap", "a").write(line)
what = sys.argv[1]
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what == "daemon" and os.fork() == 0:
    os.setsid()
    if os.fork() > 0:
        os._exit(0)
with open("pids", "a") as file:
    print(os.getpid(), file=file)
while True:
    signal.pause()
"""
LEFTOVERS = f"""
[defaults]
startsecs = 0
stopwaitsecs = 0.3
[programs.plain]
command = {python(SUCCESSOR, "plain")}
numprocs = 17
[programs.bare]
command = {python(SUCCESSOR, "plain")}
inherit_env = false
[programs.stubborn]
command = {python(SUCCESSOR, "stubborn")}
[programs.daemon]
command = {python(SUCCESSOR, "daemon")}
"""


def test_the_next_start_ends_what_a_killed_supervisor_left(
    supervise: Supervise, tmp_path: Path
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    run = supervise(LEFTOVERS, folder=mine)
    left = eventually(lambda: lines(mine / "pids"), lambda found: len(found) == 21)
    run.end(signal.SIGKILL)
    printed = len(run.err)
    assert all(is_alive(int(pid)) for pid in left)
    (mine / "old").write_text("".join(f"{pid}\n" for pid in left))
    # Another configuration's supervisor has nothing to do with them.
    beside = supervise("[programs.web]\ncommand = 'sleep 1000'", folder=other)
    web = beside.wait_state("web", "RUNNING")["pid"]
    assert all(is_alive(int(pid)) for pid in left)
    again = supervise(LEFTOVERS, folder=mine)
    eventually(lambda: len(lines(mine / "pids")), 42)
    assert not any(is_alive(int(pid)) for pid in left)
    assert not (mine / "overlap").exists()
    ended = again.err[printed:].partition("STARTING")[0]
    for name in ["plain:0", "plain:16", "bare", "stubborn", "daemon"]:
        assert name in ended
    # Neither has a second start by mistake to do with a living supervisor's.
    second = subprocess.run(
        [PYTHON, str(SCRIPT)], cwd=mine, capture_output=True, timeout=LIMIT, check=False
    )
    assert second.returncode == 2
    assert all(is_alive(int(pid)) for pid in lines(mine / "pids")[21:])
    assert beside.status("web")["pid"] == web


def test_the_next_start_ends_what_a_leftover_starts_in_its_last_moment(
    supervise: Supervise, tmp_path: Path
) -> None:
    trap = "sleep 1000 & echo \\$! >> last; exit"
    text = f'trap "{trap}" TERM; sleep 999 & echo >> up; wait'
    config = f"[programs.web]\nstopwaitsecs = 10\ncommand = {sh(text)}"
    run = supervise(config)
    eventually((tmp_path / "up").exists)
    run.end(signal.SIGKILL)
    again = supervise(config)
    eventually(lambda: len(lines(tmp_path / "up")), 2)
    assert not is_alive(int(lines(tmp_path / "last")[0]))
    assert again.state("web") in ("STARTING", "RUNNING")


@pytest.mark.skipif(sys.platform != "linux", reason="needs locks of open files")
def test_the_next_start_ends_a_leftover_without_its_environment(
    supervise: Supervise, tmp_path: Path
) -> None:
    """As nginx and redis, which write their title over it, have none to be seen."""
    config = f"""
        [programs.web]
        command = {sh("echo $$ >> pids; exec env -i sleep 1000")}
        startsecs = 0
    """
    run = supervise(config)
    pid = int(eventually(lambda: lines(tmp_path / "pids"), len)[0])
    eventually(lambda: stat_of(pid) != [] and environ_of(pid) == b"")
    try:
        run.end(signal.SIGKILL)
        again = supervise(config)
        again.wait_state("web", "RUNNING")
        assert not is_alive(pid)
        assert f"ending what a killed supervisor left: sleep ({pid})" in again.err
    finally:
        for line in lines(tmp_path / "pids"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)


def test_a_leftover_is_left_to_clean_up(supervise: Supervise, tmp_path: Path) -> None:
    text = """
        trap "sh -c 'sleep 0.5; exit 0' && echo >> clean; exit" TERM
        echo >> up
        while :; do sleep 0.01; done
    """
    config = f"""
        [programs.web]
        command = {sh(text)}
        startsecs = 0
        logfile = "/dev/null"
    """
    run = supervise(config)
    eventually((tmp_path / "up").exists)
    run.end(signal.SIGKILL)
    again = supervise(config)
    again.wait_state("web", "RUNNING")
    assert (tmp_path / "clean").exists()


def test_nothing_is_started_before_the_leftovers_are_gone(
    supervise: Supervise, tmp_path: Path
) -> None:
    config = f"""
        [programs.web]
        stopwaitsecs = 1000
        command = {python(SUCCESSOR, "stubborn")}
    """
    run = supervise(config)
    left = int(eventually(lambda: lines(tmp_path / "pids"), len)[0])
    run.end(signal.SIGKILL)
    again = supervise(config)
    again.wait_err("ending what a killed supervisor left: web")
    status, answer = again.ask("/programs/web/start", "POST")
    again.send(signal.SIGHUP)
    again.wait_err("cannot reload: ending what a killed supervisor left")
    assert status == 409
    assert "ending what a killed supervisor left" in answer["error"]
    assert again.state("web") == "STOPPED"
    assert again.ask("/health") == (503, {"status": "starting", "programs": {}})
    os.kill(left, signal.SIGKILL)
    again.wait_state("web", "RUNNING")
    again.send(signal.SIGTERM)
    again.wait_err("shutting down")
    assert again.ask("/health") == (503, {"status": "failing", "programs": {}})
    assert again.end() == 0


def test_the_next_start_does_not_touch_its_own_ancestors(
    supervise: Supervise, tmp_path: Path, gate: Callable[[str], Gate]
) -> None:
    again = gate("again")
    # A leftover itself, this shell starts the configuration anew.
    text = 'echo $$ >> shells; read x < again; "$@" 2>> err; echo $? > code'
    run = supervise(f"""
        [programs.shell]
        command = {sh(text, PYTHON, str(SCRIPT))}
        [programs.beside]
        command = "sleep 1000"
        startsecs = 0
    """)
    beside = run.wait_state("beside", "RUNNING")["pid"]
    shell = int(eventually(lambda: lines(tmp_path / "shells"), len)[0])
    run.end(signal.SIGKILL)
    again.open()
    eventually(lambda: len(lines(tmp_path / "shells")), 2)
    assert is_alive(shell)
    assert not is_alive(beside)
    with contextlib.suppress(OSError, http.client.HTTPException):
        run.ask("/shutdown", "POST")
    eventually((tmp_path / "code").exists)
    eventually(lambda: is_alive(shell), False)


# === What the command and the programs see =====================================

PROBE = "sed -En '/Sig(Blk|Ign|Cgt)/p' /proc/self/status; ls /proc/self/fd; umask"
# Runs a command with a blocked and an ignored signal and one more descriptor.
ODD = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.dup2(os.open("/dev/null", os.O_RDONLY), 7)
os.execvp(sys.argv[1], sys.argv[1:])
"""
ODDLY = (PYTHON, "-S", "-c", ODD)


# What the C library keeps for itself; a process that posix_spawn(3) started ignores it.
INTERNAL_SIGNALS = 1 << 31 | 1 << 32


def seen(text: str) -> dict[str, object]:
    """Return the signal sets, descriptors and umask that `PROBE` printed."""
    words = text.split()
    sets = zip(words[:6:2], words[1:6:2], strict=True)
    signals = {name: int(bits, 16) & ~INTERNAL_SIGNALS for name, bits in sets}
    return signals | {"fds": words[6:-1], "umask": words[-1]}


def test_command_under_init_sees_what_it_would_see_without() -> None:
    plain = subprocess.run(
        ["sh", "-c", PROBE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = seen(plain.stdout)
    assert seen(init("--", "sh", "-c", PROBE).stdout) == expected
    # An ignored signal and descriptors are handed on; a blocked signal is not.
    odd = seen(init("--", "sh", "-c", PROBE, before=ODDLY).stdout)
    assert odd["SigBlk:"] == 0
    assert odd["SigIgn:"] == int(str(expected["SigIgn:"])) | 1 << signal.SIGHUP - 1
    assert odd["fds"] == ["0", "1", "2", "3", "7"]


def test_program_sees_no_trace_of_the_supervisor(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(
        f"""
        [programs.probe]
        command = {sh(f"({PROBE}) > probe")}
        [programs.beside]
        command = "sleep 1000"
        """,
        prefix=ODDLY,
    )
    run.wait_state("probe", "EXITED")
    inside = seen((tmp_path / "probe").read_text())
    assert inside["SigBlk:"] == inside["SigIgn:"] == inside["SigCgt:"] == 0
    # The third is that of `ls` on the folder.
    assert inside["fds"] == ["0", "1", "2", "3"]


def test_command_under_init_has_the_caller_s_environment_and_directory(
    tmp_path: Path,
) -> None:
    types = [{"LC_CTYPE": name} for name in ("C.UTF-8", "C", "POSIX", "no_SUCH")]
    for given in [{}, *types, {"NO_SUPERVISOR": "1"}]:
        variables = given | {"PATH": os.environ["PATH"]}
        done = init("--", "env", env=variables)
        assert sorted(done.stdout.split()) == sorted(
            f"{name}={value}" for name, value in variables.items()
        )
    inside = "pwd; readlink /proc/$PPID/cwd"
    done = init("--", "sh", "-c", inside, cwd=tmp_path)
    assert done.stdout.split() == [os.path.realpath(tmp_path), "/"]


# === Minimal roots =============================================================

NO_PROC = 'umount -l /proc && exec "$@"'
# Nothing can be written but what the caller has opened.
READ_ONLY = """
while read -r _ path rest; do
    case $path in
        /proc*|/sys*) ;;
        *) mount -o remount,bind,ro "$path" || : ;;
    esac
done < /proc/mounts
exec "$@"
"""
# An ordinary user that may read everything, wherever the interpreter is installed.
NOBODY = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"),
)


def minimal_root(kind: str) -> tuple[str, ...]:
    """Return the words that run a command with less than it is used to."""
    if kind == "nobody":
        if os.getuid() != 0 or not shutil.which("setpriv"):
            cannot("needs root and setpriv")
        return NOBODY
    if kind == "nobody-read-only":
        return (*minimal_root("read-only"), *minimal_root("nobody"))
    text = {"no-proc": NO_PROC, "read-only": READ_ONLY}[kind]
    return (*unshare("--mount"), "sh", "-c", text, "sh")


@pytest.mark.parametrize("kind", ["no-proc", "read-only", "nobody", "nobody-read-only"])
def test_minimal_roots_are_enough(
    supervise: Supervise, tmp_path: Path, kind: str
) -> None:
    before = minimal_root(kind)
    done = init("--", "sh", "-c", "echo > written; exit 5", before=before, cwd=tmp_path)
    assert done.returncode == 5
    # The shell's complaint is no business of the init's.
    said = [line for line in done.stderr.split("\n") if "supervisors" in line]
    assert ["no /proc" in line for line in said] == [True] * (kind == "no-proc")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "written").exists() == (kind == "no-proc")
    run = supervise(
        """
        [programs.web]
        command = "sleep 1000"
        startsecs = 0
        [programs.crash]
        command = "false"
        """,
        prefix=before,
        ready=False,
    )
    run.wait_err("web: RUNNING")
    run.wait_err("crash: EXITED, exit code 1")
    assert run.end() == 0
    assert "Traceback" not in run.err
    assert run.err.count("no /proc") == (kind == "no-proc")
    if kind != "no-proc":
        assert sum("control" in line for line in run.err.split("\n")) == 1


# === What a hostile review found ======================================================


def test_supervisor_without_a_control_socket_hands_on_no_other_one_s(
    supervise: Supervise, tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(f"""
        listen = ""
        control = ""
        exit_when_done = true
        [programs.inner]
        command = {sh("env > env")}
        """)
    outer = {"SUPERVISOR_SERVER_URL": "unix:///outer", "OTHER": "kept"}
    run = supervise("", ready=False, arguments=("own.toml",), env=outer)
    assert run.popen.wait(LIMIT) == 0
    names = {line.partition("=")[0] for line in lines(tmp_path / "env")}
    assert "OTHER" in names
    assert "SUPERVISOR_SERVER_URL" not in names


def test_nothing_is_started_once_a_shutdown_has_begun(supervise: Supervise) -> None:
    run = supervise(
        """
        [programs.first]
        command = "/no/such/command"
        on_failure = "shutdown"
        [programs.second]
        command = "touch started"
        """,
        ready=False,
    )
    assert run.popen.wait(LIMIT) == 127
    assert "second" not in run.err
    assert not (run.folder / "started").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/fd")
def test_program_with_limits_inherits_no_descriptor(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise("""
        [programs.web]
        command = ["sh", "-c", "ls /proc/$$/fd > fds; sleep 1000"]
        nice = 1
        rlimits = {core = 0}
        startsecs = 0
        """)
    run.wait_state("web", "RUNNING")
    shell = {"10", "255"}  # where some shells keep their script
    seen = eventually(lambda: lines(tmp_path / "fds"), lambda found: len(found) >= 3)
    assert set(seen) - shell == {"0", "1", "2"}


ZOMBIE_KEEPER = """
import os, signal, sys, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os._exit(0)
    os.setsid()
    open("up", "w").close()
    time.sleep(1000)
time.sleep(1000)
"""


def test_group_of_zombies_counts_as_empty(supervise: Supervise, tmp_path: Path) -> None:
    """A zombie whose parent has left the group, and never reaps it, is still in it."""
    run = supervise(f"""
        [programs.web]
        command = {script(tmp_path, "keeper.py", ZOMBIE_KEEPER)}
        stopwaitsecs = 0.2
        """)
    eventually((tmp_path / "up").exists)
    assert run.ask("/programs/web/stop?wait=30", "POST")[0] == 200
    assert run.end() == 0
    assert run.left() == []


def test_internal_error_of_one_request_ends_nothing(supervise: Supervise) -> None:
    run = supervise('[programs.web]\ncommand = "sleep 1000"\nstartsecs = 0')
    pid = run.wait_state("web", "RUNNING")["pid"]
    (run.folder / "supervisors.toml").write_text("a." * 3000 + "a = 1")
    assert run.ask("/reload", "POST")[0] in (422, 500)
    assert run.status("web")["pid"] == pid
