"""Installing on a Pi: the image's files, the locked wheels, the service, and what is measured under emulation."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from photos import class_folders
from tiny_artefact import write_tiny

from deploy import healthcheck, wheels
from deploy.arm64 import __main__ as arm64
from deploy.arm64 import emulated, host
from deploy.arm64.image import is_unwanted
from deploy.arm64.proof import MB, Report
from wasi_edge.memory import hardware

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile.arm64").read_text()


# ---- wheels ------------------------------------------------------------------------------------


def elf(*alignments: int) -> bytes:
    """The headers of a 64-bit ELF file with a NOTE segment and LOAD segments aligned so."""
    kinds = [(4, 4), *((1, alignment) for alignment in alignments)]
    header = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, len(kinds), 0, 0, 0)
    return header + b"".join(struct.pack("<IIQQQQQQ", kind, 0, 0, 0, 0, 0, 0, align) for kind, align in kinds)


def test_alignments_are_read_from_program_headers():
    assert wheels.load_alignments(elf(65536, 4096)) == [65536, 4096]


def test_the_lock_names_everything_that_setup_cfg_asks_for():
    locked = {line.name: line for line in wheels.read_lock()}
    for text in [*wheels.declared(), wheels.TORCH]:
        wanted = Requirement(text)
        assert locked[canonicalize_name(wanted.name)].version in wanted.specifier, text
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert set(settings["options.extras_require"]) == {*wheels.EXTRAS, "dev"}  # a new extra has to be locked too
    assert all(line.hashes for line in locked.values())


@pytest.fixture(scope="session", params=wheels.PYTHONS)
def locked_wheels(request, tmp_path_factory) -> tuple[str, list[Path]]:
    """Python version and its downloaded wheels."""
    folder = tmp_path_factory.mktemp(f"wheels-{request.param}")
    try:
        return request.param, wheels.fetch(["--require-hashes", "-r", str(wheels.LOCK)], request.param, folder)
    except subprocess.CalledProcessError as error:
        if not os.environ.get("CI") and re.search(
            r"NewConnectionError|NameResolutionError|Max retries|timed out|ProxyError", error.stderr
        ):
            pytest.skip("no package index can be reached")
        pytest.fail(f"a wheel for aarch64 is missing: {error.stderr.strip().splitlines()[-3:]}")


def test_every_dependency_has_an_aarch64_wheel_for_pages_of_16_kb(locked_wheels):
    python, found = locked_wheels
    versions = {canonicalize_name(parse_wheel_filename(w.name)[0]): parse_wheel_filename(w.name)[1] for w in found}
    assert set(versions) == {line.name for line in wheels.read_lock()}
    missing, too_small, objects = [], [], 0
    for wheel in found:
        for wanted in wheels.requirements_of(wheel, python):
            version = versions.get(canonicalize_name(wanted.name))
            if version is None or version not in wanted.specifier:
                missing.append(f"{wheel.name} asks for {wanted}")
        for name, alignments in wheels.shared_objects(wheel):
            objects += 1
            if min(alignments, default=wheels.PAGE_BYTES) < wheels.PAGE_BYTES:
                too_small.append(f"{wheel.name}: {name}")
        print(wheel.name)
    assert not missing and not too_small and objects > 50
    assert not [name for name in versions if re.match(r"nvidia|cuda|triton", name)]


# ---- Dockerfile, compose, systemd --------------------------------------------------------------


def instruction(name: str) -> str:
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)[-1]


def test_the_image_runs_as_nobody_special_and_can_be_stopped():
    assert instruction("USER") == "10001:10001" and instruction("STOPSIGNAL") == "SIGTERM"
    assert json.loads(instruction("ENTRYPOINT")) == ["wasi-edge"]
    assert json.loads(instruction("VOLUME")) == ["/photos", "/out"]
    assert "healthcheck.py" in instruction("HEALTHCHECK .*")
    assert "--require-hashes" in DOCKERFILE and "/out" in instruction("WORKDIR")
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / source).exists() for source in copied.split()), copied


def test_the_image_takes_wheels_for_the_platforms_that_were_checked():
    platforms = set(re.findall(r"--platform (manylinux\S+)", DOCKERFILE))
    assert platforms and platforms <= set(wheels.PLATFORMS)
    assert re.search(r"ARG PYTHON_VERSION=(\S+)", DOCKERFILE)[1] in wheels.PYTHONS


def test_compose_mounts_photos_read_only_and_names_commands_that_exist():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert any(volume.endswith(":/photos:ro") for volume in service["volumes"])
        assert service["network_mode"] == "none" and "stop_grace_period" in service
        help_of = [sys.executable, "-m", "wasi_edge", service["command"][0], "--help"]
        shown = subprocess.run(help_of, capture_output=True, text=True, check=True).stdout
        assert all(word in shown for word in service["command"] if word.startswith("--"))


def test_the_service_is_one_that_systemd_understands(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    unit = tmp_path / "wasi-edge@.service"
    unit.write_text((ROOT / "deploy" / "wasi-edge@.service").read_text())
    verified = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "wasi-edge" not in verified.stderr, verified.stderr


# ---- the health check --------------------------------------------------------------------------


def thread(proc: Path, pid: int, voluntary: int, forced: int) -> None:
    status = proc / str(pid) / "task" / str(pid) / "status"
    status.parent.mkdir(parents=True, exist_ok=True)
    lines = f"voluntary_ctxt_switches:\t{voluntary}\nnonvoluntary_ctxt_switches:\t{forced}\n"
    status.write_text(f"Name:\tpython3\n{lines}")


def test_a_command_is_healthy_while_its_threads_run(tmp_path, capsys):
    proc, note = tmp_path / "proc", tmp_path / "note"
    thread(proc, 1, 5, 2)
    thread(proc, os.getpid(), 1, 1)  # the check itself does not count
    assert healthcheck.main(proc, note) == 0
    thread(proc, os.getpid(), 7, 1)
    assert healthcheck.main(proc, note) == 1 and "no main thread has run" in capsys.readouterr().err
    watcher = proc / "1" / "task" / "9" / "status"  # a thread that looks at the clock does not count either
    watcher.parent.mkdir()
    watcher.write_text("voluntary_ctxt_switches:\t99\n")
    assert healthcheck.main(proc, note) == 1
    thread(proc, 1, 5, 3)
    assert healthcheck.main(proc, note) == 0


# ---- process 1 of a container ------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_docker_stop_ends_other_commands_at_once(tmp_path):
    """The image's launcher, waiting for names on standard input."""
    launcher = [sys.executable, str(ROOT / "deploy" / "wasi-edge.py"), "predict", str(write_tiny(tmp_path / "m")), "-"]
    wrapped = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *launcher]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(wrapped, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    try:
        end = time.monotonic() + 30
        while len(emulated.descendants(process.pid)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(4)  # until it waits for names
        assert process.poll() is None
        first = next(pid for pid in emulated.descendants(process.pid) if pid != process.pid)
        os.kill(first, signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    finally:
        process.kill()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_docker_stop_saves_a_checkpoint_though_the_command_is_process_1(tmp_path):
    """The kernel ignores signals to process 1 that it has no handler for, which is what `docker stop` relies on."""
    photos, out = tmp_path / "photos", tmp_path / "run"
    class_folders(photos, {"red": 12, "blue": 12})
    command = [sys.executable, "-m", "wasi_edge", "finetune", str(photos), "--out", str(out), "--image-size", "56"]
    command += ["--epochs", "200", "--batch", "4", "--checkpoint-every", "1s", "--json"]
    wrapped = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command]
    process = subprocess.Popen(wrapped, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not list((out / "checkpoint").glob("step-*[1-9]*/manifest.json")) and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        first = next(pid for pid in emulated.descendants(process.pid) if pid != process.pid)
        os.kill(first, signal.SIGTERM)
        answer, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    report = json.loads(answer)
    assert report["status"] == "interrupted" and report["optimizer_steps"] > 0


# ---- the proof under emulation -----------------------------------------------------------------

SMAPS = """\
00400000-009cf000 r--p 00000000 fe:00 1 /mnt/rootfs/usr/bin/python3.13
Rss:                1784 kB
00a6d000-070bf000 rw-p 00000000 00:00 0
Rss:              104056 kB
55555a0db000-555561cb2000 rw-p 00000000 00:00 0                          [heap]
Rss:              126684 kB
7f652c000000-7f6533fff000 rwxp 00000000 00:00 0
Rss:              131068 kB
7f653ba28000-7f653bea7000 r-xp 00000000 fe:00 2 /usr/bin/qemu-aarch64-static
Rss:                2620 kB
"""


def test_the_emulators_memory_is_told_from_the_guests():
    guest, emulator = emulated.shares(SMAPS)
    assert guest == (1784 + 104056) * 1024
    assert emulator == (126684 + 131068 + 2620) * 1024


@pytest.mark.parametrize(
    ("cpu", "name", "integers"),
    [
        ("cortex-a76", "Cortex-A76", "dot product"),
        ("cortex-a72", "Cortex-A72", "NEON, without dot product"),
    ],
)
def test_the_emulated_processors_are_those_of_a_pi(tmp_path, cpu, name, integers):
    (tmp_path / "cpuinfo").write_text(emulated.cpuinfo(cpu, cores=2))
    assert (hardware.cpu_name(tmp_path), hardware.integer_instructions(tmp_path)) == (name, integers)


def test_a_command_starts_as_the_image_says():
    config = {"Env": ["PATH=/usr/bin", "A=b=c"], "User": "10001:10001", "WorkingDir": "/out"}
    root = emulated.Root.of(Path("/images/root"), config)
    assert root.environment == {"PATH": "/usr/bin", "A": "b=c"}
    script = emulated._script(root, Path("/tmp/cores"), {Path("/my photos"): "/tmp/proof/photos:ro"}).splitlines()
    assert "mount --bind '/my photos' /images/root/tmp/proof/photos" in script
    assert "mount -o remount,bind,ro /images/root/tmp/proof/photos" in script
    assert script[-1] == 'exec chroot --userspec=10001:10001 /images/root "$@"'


def test_compilers_and_cuda_are_found_in_an_image():
    unwanted = ["usr/bin/gcc-14", "usr/bin/aarch64-linux-gnu-ld", "usr/libexec/gcc/aarch64-linux-gnu/14/cc1plus"]
    unwanted += ["opt/wasi-edge/nvidia/lib/libcudart.so.12", "opt/wasi-edge/torch/lib/libtorch_cuda.so"]
    wanted = ["usr/bin/python3.13", "opt/wasi-edge/torch/lib/libtorch_cpu.so", "usr/bin/dash", "usr/bin/basename"]
    wanted += ["opt/wasi-edge/torch/cuda/gds.py", "usr/share/doc/gcc-14-base/copyright"]
    assert [is_unwanted(Path(path)) for path in unwanted] == [True] * len(unwanted)
    assert [is_unwanted(Path(path)) for path in wanted] == [False] * len(wanted)


def good_report() -> Report:
    report = Report(uname_m="aarch64", image_bytes=800_000_000, peak_rss_bytes=300 * MB, optimizer_steps=3)
    report.first_loss_difference, report.labels_compared, report.labels_equal = 1e-6, 120, 119
    report.tests_passed, report.exported_bytes = 90, 1
    return report


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("uname_m", "x86_64"),
        ("image_bytes", 900_000_001),
        ("unwanted_files", ["usr/bin/gcc"]),
        ("peak_rss_bytes", 512 * MB + 1),
        ("peak_rss_bytes", 0),
        ("optimizer_steps", 0),
        ("first_loss_difference", 2e-4),
        ("labels_equal", 117),
        ("labels_compared", 99),
        ("tests_passed", 0),
        ("exported_bytes", 0),
    ],
)
def test_a_report_says_what_does_not_hold(name, value):
    report = good_report()
    assert report.defects() == []
    setattr(report, name, value)
    assert len(report.defects()) == 1


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ((os, "geteuid", lambda: 1000), "needs root"),
        ((shutil, "which", lambda tool: None), "apt-get install --no-install-recommends arch-test buildah mmdebstrap"),
    ],
)
def test_where_it_cannot_run_it_says_so_and_exits_1(patch, reason, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(*patch)
    monkeypatch.setattr(sys, "argv", ["arm64", "--out", str(tmp_path / "arm64")])
    (tmp_path / "arm64").mkdir()
    (tmp_path / "arm64" / "report.json").write_text("{}")
    assert arm64.main() == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "arm64" / "report.json").exists()


def test_a_kernel_without_binfmt_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_BINFMT", tmp_path / "nothing")
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    with pytest.raises(host.CannotRun, match="binfmt_misc"):
        host._register()
