"""`make setup`: who is refused, which way torch comes, and what the user is shown."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tools import install, machine, progress
from tools.install import Failed, Installation, lacks, pins_in
from tools.machine import Disk, Interpreter, Machine, why_not
from tools.progress import Progress, reasons_in

ROOT = Path(__file__).parent.parent

FINE = Machine(
    system="Linux",
    processor="x86_64",
    glibc=(2, 36),
    x86_flags=frozenset({"sse4_2", "avx", "avx2", "fma", "f16c"}),
    missing_libraries=(),
    python=Interpreter(version=(3, 11), standard=True, has_venv=True),
    disks=(Disk("/home/me/pdserve", free_gb=20, needed_gb=5), Disk("/tmp", 2, 1)),
)


def python(minor: int, *, standard: bool = True, has_venv: bool = True) -> Interpreter:
    return Interpreter(version=(3, minor), standard=standard, has_venv=has_venv)


ACCEPTED = {
    "x86_64": FINE,
    "newest python": replace(FINE, python=python(14)),
    "oldest glibc": replace(FINE, glibc=(2, 31)),
    "aarch64": replace(FINE, processor="aarch64", x86_flags=None),
    "flags unknown": replace(FINE, x86_flags=None),
    "all installed": replace(FINE, disks=(Disk("/home", free_gb=0.1, needed_gb=0),)),
}

REFUSED = {
    "macos": (
        replace(FINE, system="Darwin", processor="arm64", glibc=None),
        "needs Linux on x86_64 or aarch64; this is Darwin on arm64",
    ),
    "windows": (
        replace(FINE, system="Windows", processor="AMD64", glibc=None),
        "needs Linux on x86_64 or aarch64; this is Windows on AMD64",
    ),
    "processor": (
        replace(FINE, processor="riscv64"),
        "needs Linux on x86_64 or aarch64; this is Linux on riscv64",
    ),
    "musl": (
        replace(FINE, glibc=None),
        "needs glibc 2.31 or newer; this system has another C library",
    ),
    "old glibc": (
        replace(FINE, glibc=(2, 28)),
        "needs glibc 2.31 or newer; this system has 2.28",
    ),
    "no avx2": (
        replace(FINE, x86_flags=frozenset({"sse4_2", "avx", "f16c"})),
        "needs a processor with AVX2; this one lacks avx2, fma"
        " (a virtual machine may hide it unless it has the host's CPU model)",
    ),
    "old python": (
        replace(FINE, python=python(10)),
        "needs Python 3.11 to 3.14, and none is on PATH; this is 3.10: make setup PYTHON=path",
    ),
    "new python": (
        replace(FINE, python=python(15)),
        "needs Python 3.11 to 3.14, and none is on PATH; this is 3.15: make setup PYTHON=path",
    ),
    "another build": (
        replace(FINE, python=python(14, standard=False)),
        "needs Python 3.11 to 3.14 in its standard build; this is another: make setup PYTHON=path",
    ),
    "no venv": (
        replace(FINE, python=python(12, has_venv=False)),
        "needs Python's venv module: install python3.12-venv (so named in Debian and Ubuntu)",
    ),
    "libraries": (
        replace(FINE, missing_libraries=("libnuma1", "libstdc++6")),
        "needs libnuma1 libstdc++6 (so named in Debian and Ubuntu); install it first",
    ),
    "disk": (
        replace(FINE, disks=(Disk("/home", 9, 5), Disk("/tmp", free_gb=0.52, needed_gb=1))),
        "needs 1.0 GB in /tmp; 0.5 GB are free",
    ),
}


@pytest.mark.parametrize("snapshot", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(snapshot: Machine) -> None:
    assert why_not(snapshot) is None


@pytest.mark.parametrize(("snapshot", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(snapshot: Machine, reason: str) -> None:
    assert why_not(snapshot) == reason


def test_a_refusal_has_status_2_and_installs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "observe_machine", lambda _: replace(FINE, glibc=None))
    assert install.main([str(tmp_path / ".venv")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "glibc" in err
    assert list(tmp_path.iterdir()) == []


def test_this_machine_is_observed() -> None:
    seen = machine.observe_machine(ROOT / ".venv")
    assert why_not(replace(seen, disks=())) is None
    assert seen.python.version == sys.version_info[:2]


def test_flags_of_the_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert machine.observe_x86_flags(cpuinfo) is None
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t:\n")
    assert machine.observe_x86_flags(cpuinfo) == frozenset({"fpu", "avx2", "fma"})


def test_another_python_is_picked_if_it_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.pick_python() is None
    script(tmp_path / "python3.11", "#!/bin/sh\nexit 127\n")  # a shim with nothing behind it
    script(tmp_path / "python3.12", "#!/bin/sh\nexit 0\n")
    assert machine.pick_python() == str(tmp_path / "python3.12")


def test_pins() -> None:
    text = '# all\ntorch==2.13.0+cpu\n\nintel-openmp==1.0; platform_machine == "x86_64"  # x86\n'
    assert pins_in(text) == ("torch==2.13.0+cpu", "intel-openmp==1.0")


def test_torch_is_pinned_to_a_build_for_cpus() -> None:
    pins = pins_in((ROOT / "requirements-cpu.txt").read_text())
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.13.0+cpu"]


PIP = (
    (
        "Collecting torch==2.13.0+cpu",
        "2 s, 1 of 3 packages: finding torch",
    ),
    (
        "  Downloading https://host/ab/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (191.8 MB)",
        "2 s, 1 of 3 packages, 192 MB: downloading torch (192 MB)",
    ),
    (
        "Collecting numpy==2.3.5 (from -r requirements-cpu.txt (line 9))",
        "2 s, 2 of 3 packages, 192 MB: finding numpy",
    ),
    (
        "  Downloading numpy-2.3.5-cp311-cp311-linux_x86_64.whl.metadata (62 kB)",
        "2 s, 2 of 3 packages, 192 MB: finding numpy",
    ),
    (
        "Requirement already satisfied: attrs==26.1.0 in ./.venv/lib",
        "2 s, 3 of 3 packages, 192 MB: finding attrs",
    ),
    (
        "Downloading numpy-2.3.5-cp311-cp311-linux_x86_64.whl (16.9 MB)",
        "2 s, 3 of 3 packages, 209 MB: downloading numpy (17 MB)",
    ),
    (
        "Installing collected packages: torch, numpy",
        "2 s, 1 of 3 packages, 209 MB: unpacking",
    ),
)


def test_progress_of_pip() -> None:
    state = Progress(num_packages=3, doing="starting")
    assert state.text(0, 1.6) == "2 s: starting"
    for line, shown in PIP:
        state = state.after(line)
        assert state.text(1, 1.6) == shown


def test_progress_of_uv() -> None:
    state = Progress(num_packages=3).after("Downloading torch (182.9MiB)")
    assert state.text(0, 9) == "9 s, 183 MB: downloading torch (183 MB)"


def test_reasons_leave_out_what_pip_ignores() -> None:
    ignored = "WARNING: Location 'file:///a/torch/' is ignored: it is neither a file nor a folder."
    output = [
        ignored,
        "Looking in links: /wheels",
        "ERROR: Could not find a version that satisfies the requirement numpy==9",
        "ERROR: No matching distribution found for numpy==9",
        ignored,
        "",
    ]
    assert reasons_in(output) == (
        "ERROR: Could not find a version that satisfies the requirement numpy==9",
        "ERROR: No matching distribution found for numpy==9",
    )
    assert reasons_in([ignored, "Killed"]) == ("Killed",)
    assert reasons_in([]) == ()


LACKING = "ERROR: No matching distribution found for torch==2.13.0+cpu"
CONSTRAINED = (
    "ERROR: Cannot install torch==2.13.0+cpu because these package versions have conflicting"
    " dependencies."
)


@pytest.mark.parametrize(
    ("line", "lacking"),
    [
        (LACKING, True),
        (CONSTRAINED, True),
        ("ERROR: No matching distribution found for numpy==9", False),
        ("ERROR: No space left on device", False),
    ],
)
def test_lacks(line: str, lacking: bool) -> None:
    assert lacks("torch==2.13.0+cpu", ["Looking in links: /wheels", line]) is lacking


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Checkout:
    """A folder with pins, and a pip and a uv that say what the test has them say."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"
        (root / "requirements-cpu.txt").write_text("attrs==26.1.0\ntorch==2.13.0+cpu\n")
        self.says: dict[str, tuple[int, str]] = {}
        for program in ("python", "uv"):
            script(
                self.venv / "bin" / program,
                f"#!{sys.executable}\n"
                "import json, pathlib, sys\n"
                f"root = pathlib.Path({str(root)!r})\n"
                "if sys.argv[1] == '-c': sys.exit()\n"
                f"call = ' '.join([{program!r}, *sys.argv[1:]])\n"
                "with open(root / 'calls', 'a') as calls: print(call, file=calls)\n"
                "for key, (status, text) in json.loads((root / 'says').read_text()).items():\n"
                "    if call.startswith(key.split()[0]) and call.endswith(key.split()[1]):\n"
                "        print(text)\n"
                "        sys.exit(status)\n",
            )

    def install(self) -> str:
        (self.root / "says").write_text(json.dumps(self.says))
        return Installation(self.root, self.venv).run()

    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_pip_is_enough_where_it_finds_torch(checkout: Checkout) -> None:
    assert checkout.install().startswith("Installed 2 packages")
    torch, rest, ours = checkout.calls()
    assert torch.endswith("--no-deps --only-binary :all: torch==2.13.0+cpu")
    assert rest.endswith(
        f"--no-deps --only-binary :all: --requirement {checkout.root}/requirements-cpu.txt"
    )
    assert ours.endswith(f"--editable {checkout.root}")


def test_else_uv_gets_torch_and_pip_the_rest(checkout: Checkout) -> None:
    checkout.says["python torch==2.13.0+cpu"] = (1, LACKING)
    checkout.install()
    _, get_uv, by_uv, rest, _ = checkout.calls()
    assert get_uv.startswith("python -m pip install")
    assert get_uv.endswith(install.UV)
    assert by_uv.startswith(f"uv pip install --python {checkout.venv}/bin/python")
    assert "--torch-backend cpu" in by_uv
    assert by_uv.endswith("torch==2.13.0+cpu")
    assert rest.startswith("python -m pip install")


def test_uv_is_not_asked_when_pip_fails_otherwise(checkout: Checkout) -> None:
    checkout.says["python torch==2.13.0+cpu"] = (1, "ERROR: No space left on device")
    with pytest.raises(Failed, match="No space left on device"):
        checkout.install()
    assert len(checkout.calls()) == 1


def test_a_failure_says_why_and_where_the_rest_is(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    warning = "WARNING: Location 'file:///a/torch/' is ignored: it is neither a file nor a folder."
    checkout.says["python torch==2.13.0+cpu"] = (1, f"{warning}\n{LACKING}")
    checkout.says["uv torch==2.13.0+cpu"] = (2, "error: Request failed\n  cause: dns error")
    with pytest.raises(Failed) as failed:
        checkout.install()
    shown = str(failed.value)
    assert "error: Request failed\n    cause: dns error\n" in shown
    assert "PIP_FIND_LINKS" in shown
    log = checkout.root / "build" / "setup.log"
    assert str(log) in shown
    assert warning in log.read_text()
    assert "is ignored" not in shown + capsys.readouterr().out


def test_a_package_that_pip_was_stopped_at_is_installed_again(checkout: Checkout) -> None:
    packages = checkout.venv / "lib" / "python3.11" / "site-packages"
    whole, half = packages / "attrs-26.1.0.dist-info", packages / "torch-2.13.0.dist-info"
    whole.mkdir(parents=True)
    half.mkdir()
    (whole / "INSTALLER").write_text("pip\n")
    (half / "METADATA").write_text("Name: torch\n")
    checkout.install()
    assert whole.exists()
    assert not half.exists()


def test_ctrl_c_ends_what_runs(checkout: Checkout) -> None:
    pid = checkout.root / "pid"
    script(
        checkout.venv / "bin" / "python",
        "#!/bin/sh\ntest $1 = -c && exit\n"
        f"echo $$ > {pid}.new; mv {pid}.new {pid}\nexec sleep 60\n",
    )
    code = (
        "import signal, sys; from pathlib import Path; from tools import install, machine\n"
        # Ignored where whoever runs the tests does so in the background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"install.ROOT = Path({str(checkout.root)!r})\n"
        "install.why_not = lambda machine: None\n"
        "sys.exit(install.main(['.venv']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as setup:
        while not pid.exists():
            assert setup.poll() is None
            time.sleep(0.05)
        os.killpg(setup.pid, signal.SIGINT)
        _, err = setup.communicate()
    assert setup.returncode == 130
    assert err == "Interrupted. make setup goes on from here.\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_terminal_has_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "11")
    screen = progress.Screen()
    screen.show("one")
    screen.show("a longer text")
    screen.clear()
    assert capsys.readouterr().out == "\r\x1b[Kone\r\x1b[Ka longer t\r\x1b[K"


def test_elsewhere_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    screen = progress.Screen()
    screen.show("too soon")
    screen.clear()
    assert capsys.readouterr().out == ""
