#!/usr/bin/env python3
"""Compare supervisors.py with supervisord, runit and s6, and print one table.

    python3 .ci/bench.py --runs 3          everything: some 15 minutes a run
    python3 .ci/bench.py --small           sees only that it works: a minute
    python3 .ci/bench.py --only log stop   some of the measures

It is a benchmark, not a test. Linux only: it reads /proc. Every supervisor runs the
same programs in turn, in a folder of its own (TMPDIR says where; the disk should not
be the bottleneck), and each process of a run is found by a variable in its environment
and killed at the end. The column "bare" has what things cost without any supervisor: a
shell starts the programs, a reader throws the log away. Nothing can be much faster.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).absolute().parents[1] / "supervisors.py"
SCRIPT = Path(os.environ.get("SUPERVISORS_PY", SCRIPT)).absolute()
PEER = "supervisor==4.3.0"
LIMIT = 90.0  # seconds that anything may take before it counts as failed
ROTATE_BYTES, BACKUPS = 10 * 1024**2, 3


class Sizes(NamedTuple):
    """How much is measured: numbers of programs and of repetitions, and seconds."""

    few: int
    many: int
    repeat: int
    settle: float  # until programs count as up: 1 s by default with all of them
    idle: float
    load: float


FULL = Sizes(few=100, many=1000, repeat=5, settle=1.5, idle=60, load=3)
SMALL = Sizes(few=5, many=10, repeat=1, settle=0.2, idle=0.5, load=0.2)

GOALS = {  # for the full sizes; a start comes on top of the bare interpreter's
    "exec to 1 up, ms": "< bare + 40",
    "exec to 100 up, ms": "< 130",
    "exec to 1000 up, ms": "< 700",
    "kill -9 to successor up, ms": "< 3",
    "PSS, 1 up, HTTP off, MB": "< 14",
    "PSS, 100 up, HTTP off, MB": "< 15",
    "PSS, 1 up, HTTP on, MB": "< 17",
    "PSS, 100 up, HTTP on, MB": "< 18",
    "idle, 100 up, HTTP on, wake-ups a minute": "= 0",
    "log, rotating, 64 KB writes, MB/s": "> 1700",
    "log, rotating, 64 KB writes, CPU s/GB": "< 0.6",
    "log, rotating, 100-byte writes, MB/s": "> 374",
    "log, rotating, 100-byte writes, CPU s/GB": "< 0.6",
    "SIGTERM to 100 gone, ms": "< 64",
    "HTTP, 4 clients, keep-alive, requests/s": "> 4000",
    "HTTP, 4 clients, keep-alive, median ms": "< 0.5",
}

# --- Programs -------------------------------------------------------------------------

# A program says its pid on the FIFO when it is up. Its shell costs about a millisecond,
# the same for all.
SLEEPER = "echo $$ >{folder}/fifo\nexec sleep 1000\n"

# Writes lines for some seconds, once told to, and says how many bytes and seconds it
# was. `map` over `repeat` loops in C: one write(2) a block, with the 60 ns of os.write
# around it. With blocks of 100 bytes the system call is the limit: a loop in C is a
# tenth faster, perl and dd with obs=100 are slower.
WRITER = """
import os, sys, time
from collections import deque
from itertools import repeat
size, seconds = int(sys.argv[1]), float(sys.argv[2])
line = b"x" * 99 + b"\\n"
block = line * (size // 100 - 1) + b"x" * (size % 100) + line
say = open("{folder}/fifo", "w", buffering=1)
print(os.getpid(), file=say)
open("{folder}/go").read()
total, began = 0, time.monotonic()
while time.monotonic() - began < seconds:
    deque(map(os.write, repeat(1), repeat(block, 2**20 // size)), 0)
    total += 2**20 // size * size
print(total, time.monotonic() - began, file=say)
time.sleep(1000)
"""

# The cheapest reader of a log: a large pipe, and a nap when there was little in it.
DRAIN = """
import fcntl, os, time
fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, 2**20)
buffers = [bytearray(2**20)]
while count := os.readv(0, buffers):
    if count < 2**16:
        time.sleep(0.001)
"""

# --- Supervisors ----------------------------------------------------------------------


class Job(NamedTuple):
    """What a supervisor is asked to run: some programs with the same shell text."""

    programs: int
    text: str = SLEEPER
    port: int | None = None
    rotates: bool = False  # the output goes to a log file that is rotated
    is_read: bool = False  # the output goes to a pipe that is read


class Subject(NamedTuple):
    """A supervisor, what of it can be measured, and the page that it serves."""

    name: str
    configure: Callable[[Path, Job], list[str]]  # writes files, returns its command
    measures: str
    page: str = ""
    stop_signal: signal.Signals = signal.SIGTERM
    python: str = sys.executable


def configure_bare(folder: Path, job: Job) -> list[str]:
    if job.rotates:
        reader = shlex.join([sys.executable, "-S", "-c", DRAIN])
        return ["/bin/sh", "-c", f"{folder}/program | exec {reader}"]
    return ["/bin/sh", "-c", f"{folder}/program &\n" * job.programs + "wait"]


def configure_supervisors(python: str, folder: Path, job: Job) -> list[str]:
    listen, control = (f"127.0.0.1:{job.port}", "control") if job.port else ("", "")
    lines = [f'listen = "{listen}"', f'control = "{control}"']
    lines += ["[defaults]", "autorestart = true"]
    if job.rotates:
        lines += ['logfile = "main.log"', f"logfile_maxbytes = {ROTATE_BYTES}"]
        lines += [f"logfile_backups = {BACKUPS}"]
    for number in range(job.programs):
        lines += [f"[programs.p{number}]", f'command = ["{folder}/program"]']
    (folder / "supervisors.toml").write_text("\n".join(lines))
    return [python, str(SCRIPT), "supervisors.toml"]


def configure_supervisord(python: str, folder: Path, job: Job) -> list[str]:
    lines = ["[supervisord]", "nodaemon=true", "minfds=9000", f"childlogdir={folder}"]
    lines += [f"logfile={folder}/log", f"pidfile={folder}/pid"]
    if job.port:
        lines += ["[inet_http_server]", f"port=127.0.0.1:{job.port}"]
    for number in range(job.programs):
        lines += [f"[program:p{number}]", f"command={folder}/program"]
        lines += ["autorestart=true"]
        if job.rotates:
            lines += [f"stdout_logfile={folder}/main.log"]
            lines += [f"stdout_logfile_maxbytes={ROTATE_BYTES}"]
            lines += [f"stdout_logfile_backups={BACKUPS}"]
    (folder / "supervisord.conf").write_text("\n".join(lines))
    return [python, "-m", "supervisor.supervisord", "-c", "supervisord.conf"]


def configure_services(command: str, logger: str, folder: Path, job: Job) -> list[str]:
    """Write a folder of services, as runit and s6 have them."""
    for number in range(job.programs):
        service = folder / "services" / f"p{number}"
        service.mkdir(parents=True)
        (service / "run").symlink_to(folder / "program")
        if job.rotates:
            (service / "log" / "main").mkdir(parents=True)
            (service / "log" / "run").write_text(f"#!/bin/sh\nexec {logger}\n")
            (service / "log" / "run").chmod(0o755)
            config = service / "log" / "main" / "config"  # for svlogd
            config.write_text(f"s{ROTATE_BYTES}\nn{BACKUPS}\n")
    return [*command.split(), "services"]


def install_supervisord(folder: str) -> tuple[str, bool]:
    """Return the interpreter to use, and whether it has a supervisord.

    Both Python supervisors get the same, in a new virtual environment: what is in the
    site-packages of this one would count for one of them.
    """
    python, pipe = f"{folder}/bin/python", subprocess.PIPE
    venv = [sys.executable, "-m", "venv", folder]
    pip = [python, "-m", "pip", "install", "-q", PEER]
    for command, fallback in ((venv, sys.executable), (pip, python)):
        try:
            subprocess.run(command, check=True, timeout=300, stdout=pipe, stderr=pipe)
        except (OSError, subprocess.SubprocessError) as error:
            say(f"left out: supervisord: {error}")
            return fallback, False
    return python, True


def find_subjects(folder: str) -> Iterator[Subject]:
    """Yield what can be measured here; `folder` is for a virtual environment."""
    common = "start restart memory idle log stop"
    python, has_supervisord = install_supervisord(folder)
    configure = partial(configure_supervisors, python)
    yield Subject("supervisors", configure, common + " http", "/status")
    yield Subject("bare", configure_bare, "interpreter start log", python=python)
    if has_supervisord:
        configure = partial(configure_supervisord, python)
        yield Subject("supervisord", configure, common + " http", "/")
    if shutil.which("runsvdir") and shutil.which("svlogd"):
        configure = partial(configure_services, "runsvdir", "svlogd main")
        # On SIGTERM runsvdir leaves all that runs; SIGHUP is its way to stop it.
        yield Subject("runit", configure, common, stop_signal=signal.SIGHUP)
    if shutil.which("s6-svscan") and shutil.which("s6-log"):
        logger = f"s6-log n{BACKUPS} s{ROTATE_BYTES} ./main"
        configure = partial(configure_services, "s6-svscan -c 2000", logger)
        yield Subject("s6", configure, common)


# --- Processes ------------------------------------------------------------------------


class BenchError(Exception):
    """What could not be measured, and why."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Run(NamedTuple):
    """A supervisor at work; `pids` are its programs', as they say them."""

    folder: Path
    popen: subprocess.Popen[bytes]
    fifo: int
    mark: bytes
    began: float
    pids: list[int]

    def read(self, count: int) -> list[str]:
        """Return the next `count` lines that programs say."""
        text, end = b"", time.monotonic() + LIMIT
        while (got := text.count(b"\n")) < count:
            if select.select([self.fifo], [], [], 0.5)[0]:
                text += os.read(self.fifo, 65536)
            elif self.popen.poll() is not None or time.monotonic() > end:
                out = (self.folder / "out").read_text(errors="replace")[-300:]
                raise BenchError(f"{got} of {count} programs spoke: {out}")
        return text.decode().splitlines()

    def wait_up(self, count: int, settle: float = 0) -> float:
        """Wait until so many more programs are up; return how long it took in ms."""
        lines, now = self.read(count), time.monotonic()
        self.pids.extend(map(int, lines))
        time.sleep(settle)
        return (now - self.began) * 1000

    def marked(self) -> set[int]:
        """Return all processes of this run; zombies carry no mark."""
        found = set()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                if self.mark in Path(f"/proc/{pid}/environ").read_bytes():
                    found.add(int(pid))
        return found

    def own(self) -> set[int]:
        """Return the supervisor's processes: all that aren't its programs."""
        return self.marked() - set(self.pids)

    def end(self) -> None:
        """Kill what is left, until nothing is."""
        limit = time.monotonic() + LIMIT
        while (left := self.marked()) or self.popen.poll() is None:
            for pid in sorted(left):
                with suppress(ProcessLookupError):  # it ended by itself
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > limit:
                raise BenchError(f"cannot end processes: {left}")
            time.sleep(0.01)


@contextmanager
def running(subject: Subject, job: Job) -> Iterator[Run]:
    """Run a supervisor in a folder of its own, and leave nothing of it behind.

    Its environment is bare: no PYTHON* variable that is set here takes part.
    """
    mark = uuid.uuid4().hex
    env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "BENCH_MARK": mark}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        folder = Path(name)
        text = "#!/bin/sh\n" + job.text.replace("{folder}", name)
        (folder / "program").write_text(text)
        (folder / "program").chmod(0o755)
        os.mkfifo(folder / "go")
        os.mkfifo(folder / "fifo")
        fifo = os.open(folder / "fifo", os.O_RDWR | os.O_NONBLOCK)
        stack.callback(os.close, fifo)
        out = stack.enter_context(open(folder / "out", "wb"))
        command = subject.configure(folder, job)
        if job.is_read:  # the reader is not the supervisor's: it carries no mark
            reader = "env -u BENCH_MARK cat >/dev/null"
            command = ["/bin/sh", "-c", f"{shlex.join(command)} | {reader}"]
        began = time.monotonic()
        popen = subprocess.Popen(
            command, cwd=folder, env=env, stdout=out, stderr=out,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        run = Run(folder, popen, fifo, mark.encode(), began, [])
        stack.callback(run.end)
        yield run


def pss(pids: set[int]) -> float:
    """Return the proportional set size of processes, in MB.

    Pages that other Python processes share count for less, this benchmark's own the
    first of them: run no others, and compare with the bare interpreter's.
    """
    files = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(text.split("Pss:")[1].split()[0]) for text in files) / 1024


def usage(pids: set[int]) -> tuple[int, float]:
    """Return the voluntary switches and CPU seconds of all threads of processes."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    texts = [(task / "status").read_text() for task in tasks]
    ran = [(task / "schedstat").read_text() for task in tasks]  # ns, the first word
    switches = [
        text.split("\nvoluntary_ctxt_switches:")[1].split()[0] for text in texts
    ]
    return sum(map(int, switches)), sum(int(text.split()[0]) for text in ran) / 1e9


# --- HTTP -----------------------------------------------------------------------------

ANSWER = re.compile(rb"(?is)HTTP/1.1 200 .*?content-length: (\d+).*?\r\n\r\n")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def read_answer(connection: socket.socket) -> None:
    data = b""
    while not (head := ANSWER.match(data)) or len(data) < head.end() + int(head[1]):
        if not (more := connection.recv(65536)):
            raise BenchError(f"not the answer wanted: {data[:200]!r}")
        data += more


def ask(port: int, page: str, seconds: float, keeps: bool) -> list[float]:
    """Ask for a page over and over, at least once; return the latencies in ms.

    Bare sockets: http.client would take more CPU than what it asks.
    """
    kind = "keep-alive" if keeps else "close"
    head = f"GET {page} HTTP/1.1\r\nHost: localhost\r\nConnection: {kind}\r\n\r\n"
    latencies: list[float] = []
    end = (began := time.monotonic()) + seconds
    while not latencies or began < end:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            asks = True
            while asks:
                connection.sendall(head.encode())
                read_answer(connection)
                now = time.monotonic()
                latencies.append((now - began) * 1000)
                began = now
                asks = keeps and now < end
    return latencies


# --- Measures -------------------------------------------------------------------------

Values = Iterator[tuple[str, float]]  # rows of the table with what was measured


def measure_interpreter(subject: Subject, sizes: Sizes) -> Values:
    times = []
    for _ in range(sizes.repeat * 2):
        began = time.monotonic()
        subprocess.run([subject.python, "-c", "pass"], check=True)
        times.append((time.monotonic() - began) * 1000)
    yield "interpreter's start, ms", statistics.median(times)
    command, pipe = [subject.python, "-c", "print(flush=1), input()"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as bare:
        assert bare.stdin and bare.stdout
        bare.stdout.readline()
        yield "interpreter's PSS, MB", pss({bare.pid})
        bare.stdin.write(b"\n")


def measure_start(subject: Subject, sizes: Sizes) -> Values:
    for count in (1, sizes.few, sizes.many):
        with running(subject, Job(count)) as run:
            yield f"exec to {count} up, ms", run.wait_up(count)


def measure_restart(subject: Subject, sizes: Sizes) -> Values:
    times = []
    for _ in range(sizes.repeat):  # a new supervisor each: further failures may wait
        with running(subject, Job(1)) as run:
            run.wait_up(1, sizes.settle)
            killed = time.monotonic()
            os.kill(run.pids[0], signal.SIGKILL)
            run.wait_up(1)
            times.append((time.monotonic() - killed) * 1000)
    yield "kill -9 to successor up, ms", statistics.median(times)


def measure_memory(subject: Subject, sizes: Sizes) -> Values:
    for http in ("off", "on") if subject.page else ("off",):
        for count in (1, sizes.few):
            port = free_port() if http == "on" else None
            with running(subject, Job(count, port=port)) as run:
                run.wait_up(count, sizes.settle)
                if port:  # as a probe does: the first request may load something
                    ask(port, subject.page, 0, keeps=False)
                yield f"PSS, {count} up, HTTP {http}, MB", pss(run.own())


def measure_idle(subject: Subject, sizes: Sizes) -> Values:
    port = free_port() if subject.page else None
    with running(subject, Job(sizes.few, port=port)) as run:
        run.wait_up(sizes.few, 2 * sizes.settle)
        before, cpu_before = usage(run.own())
        time.sleep(sizes.idle)
        switches, cpu = usage(run.own())
    row = f"idle, {sizes.few} up, HTTP on,"
    yield f"{row} wake-ups a minute", (switches - before) * 60 / sizes.idle
    yield f"{row} CPU ms a minute", (cpu - cpu_before) * 60_000 / sizes.idle


def flood(subject: Subject, sizes: Sizes, job: Job) -> tuple[float, float]:
    """Let a program write; return its MB/s and the supervisor's CPU seconds per GB."""
    with running(subject, job) as run:
        run.wait_up(1, sizes.settle)
        before = usage(run.own())[1]
        (run.folder / "go").write_text("")
        count, seconds = map(float, run.read(1)[0].split())
        time.sleep(0.5)  # for what is still in the pipe
        cpu = usage(run.own())[1] - before
    return count / 1e6 / seconds, cpu / (count / 1e9)


def measure_log(subject: Subject, sizes: Sizes) -> Values:
    jobs = {"rotating": Job(1, rotates=True), "prefix to a pipe": Job(1, is_read=True)}
    if subject.name != "supervisors":
        del jobs["prefix to a pipe"]
    for kind, job in jobs.items():
        for size, length in (("64 KB", 65536), ("100-byte", 100)):
            words = [sys.executable, "-S", "-c", WRITER, str(length), str(sizes.load)]
            text = f"exec {shlex.join(words)}\n"
            rate, cpu = flood(subject, sizes, job._replace(text=text))
            yield f"log, {kind}, {size} writes, MB/s", rate
            yield f"log, {kind}, {size} writes, CPU s/GB", cpu


def measure_stop(subject: Subject, sizes: Sizes) -> Values:
    with running(subject, Job(sizes.few)) as run, ExitStack() as stack:
        run.wait_up(sizes.few, sizes.settle)
        fds = [os.pidfd_open(pid) for pid in run.pids]  # readable when it has ended
        for fd in fds:
            stack.callback(os.close, fd)
        began = time.monotonic()
        os.kill(run.popen.pid, subject.stop_signal)
        for fd in fds:
            if not select.select([fd], [], [], LIMIT)[0]:
                raise BenchError(f"not all ended after {LIMIT} s")
        yield f"SIGTERM to {sizes.few} gone, ms", (time.monotonic() - began) * 1000


def measure_http(subject: Subject, sizes: Sizes) -> Values:
    job = Job(20, port=free_port())
    with running(subject, job) as run:
        run.wait_up(job.programs, sizes.settle)
        for clients, keeps in ((4, True), (4, False), (1, True)):
            with get_context("spawn").Pool(clients) as pool:
                request = (job.port, subject.page, sizes.load, keeps)
                parts = pool.starmap_async(ask, [request] * clients).get(LIMIT)
            took = [latency for part in parts for latency in part]
            kind = "keep-alive" if keeps else "new connections"
            row = f"HTTP, {clients} client{'s' * (clients > 1)}, {kind}"
            yield f"{row}, requests/s", len(took) / sizes.load
            yield f"{row}, median ms", statistics.median(took)


MEASURES: dict[str, Callable[[Subject, Sizes], Values]] = {
    "interpreter": measure_interpreter,
    "start": measure_start,
    "restart": measure_restart,
    "memory": measure_memory,
    "idle": measure_idle,
    "log": measure_log,
    "stop": measure_stop,
    "http": measure_http,
}

# --- Table ----------------------------------------------------------------------------

Results = dict[str, dict[str, list[float]]]  # by row, then by subject's name


def collect(
    subjects: list[Subject], sizes: Sizes, only: list[str]
) -> tuple[Results, list[str]]:
    """Measure all subjects in turn; return the results, and what failed."""
    results: Results = {}
    failures = []
    for name, subject in itertools.product(only, subjects):
        if name in subject.measures.split():
            say(f"{name}: {subject.name}")
            try:
                for row, value in MEASURES[name](subject, sizes):
                    found = results.setdefault(row, {})
                    found.setdefault(subject.name, []).append(value)
            except (BenchError, OSError) as error:
                failures.append(f"cannot measure {name} of {subject.name}: {error}")
                say(failures[-1])
    return results, failures


def heading(runs: int) -> str:
    """Return date, size of the machine, and versions, where a dpkg knows them."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [time.strftime("%Y-%m-%d"), f"{os.cpu_count()} CPUs, {gigabytes:.1f} GB"]
    parts += [f"Linux {os.uname().release}", f"Python {sys.version.split()[0]}", PEER]
    query = ["dpkg-query", "-W", "-f=${Package} ${Version}\n", "runit", "s6"]
    with suppress(FileNotFoundError):
        done = subprocess.run(query, check=False, capture_output=True, text=True)
        parts += done.stdout.splitlines()
    return "; ".join([*parts, f"median of {runs}"])


def is_met(goal: str, value: float, start: float) -> bool:
    sign, bound = goal.split(maxsplit=1)
    limit = float(bound.removeprefix("bare + ")) + start * ("bare" in bound)
    return {"<": value < limit, ">": value > limit, "=": value == limit}[sign]


def table(results: Results, names: list[str], goals: dict[str, str]) -> str:
    """Return the medians as a Markdown table, with the goals and verdicts."""
    medians = {
        row: {name: statistics.median(values) for name, values in found.items()}
        for row, found in results.items()
    }
    start = medians.get("interpreter's start, ms", {}).get("bare", 0)
    lines = [["", "goal", "met", *names]]
    for row, found in medians.items():
        goal, met = goals.get(row, ""), ""
        if goal and "supervisors" in found:
            met = "yes" if is_met(goal, found["supervisors"], start) else "NO"
        texts = {n: f"{v:.0f}" if v >= 100 else f"{v:.3g}" for n, v in found.items()}
        lines.append([row, goal, met, *(texts.get(name, "—") for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [map(str.ljust, line, widths) for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def main() -> int:
    """Measure and print; return 1 where something could not be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1, help="the median is reported")
    parser.add_argument("--small", action="store_true", help="small sizes, no verdicts")
    parser.add_argument("--only", nargs="+", default=list(MEASURES), choices=MEASURES)
    options = parser.parse_args()
    if sys.platform != "linux":
        say("cannot measure here: it reads Linux's /proc")
        return 2
    sizes, goals = (SMALL, {}) if options.small else (FULL, GOALS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is ended
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        subjects = list(find_subjects(folder))
        results, failures = collect(subjects, sizes, options.only * options.runs)
    print(heading(options.runs), end="\n\n")
    print(table(results, [subject.name for subject in subjects], goals))
    print("", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
