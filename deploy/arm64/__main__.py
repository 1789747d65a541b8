"""python -m deploy.arm64 [--out build/arm64] [--limit 900]: build the image, prove it, write report.json.

Exits 1 with a reason where this machine cannot, where something in the image is wrong, or after --limit seconds.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deploy.arm64 import image
from deploy.arm64.host import CannotRun, prepare
from deploy.arm64.proof import MB, Failed, Proof


def main() -> int:
    parser = argparse.ArgumentParser(prog="make arm64", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=image.ROOT / "build" / "arm64")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for everything")
    parser.add_argument("--no-build", action="store_true", help="prove the image that was built last")
    given = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"arm64 {time.monotonic() - began:4.0f} s: {text}", file=sys.stderr, flush=True)

    # so that everything that is mounted and started is taken down
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    given.out.mkdir(parents=True, exist_ok=True)
    report_path = given.out / "report.json"
    report_path.unlink(missing_ok=True)  # an old one would look like this one's
    # in a place of its own: the image's user has to reach it, and the project may lie in a closed folder
    scratch = Path(tempfile.mkdtemp(prefix="wasi-edge-arm64-"))
    scratch.chmod(0o755)
    try:
        prepare()
        if not given.no_build:
            say("building the image")
            image.build(scratch / "bases")
        with image.mounted() as root:
            proof = Proof(root, scratch, given.limit - (time.monotonic() - began), say)
            proof.report.image_bytes, proof.report.unwanted_files = image.contents(root.path)
            say(f"the image has {proof.report.image_bytes / 1e6:.0f} MB")
            proof.run()
        proof.report.seconds = round(time.monotonic() - began, 1)
        defects = proof.report.defects()
        proof.report.write(report_path)
    except CannotRun as reason:
        print(f"make arm64 cannot run here: {reason}", file=sys.stderr)
        return 1
    except (Failed, RuntimeError) as error:
        print(f"make arm64: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"make arm64: {error}\n{error.stderr or ''}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:  # a full disk, an answer that is no JSON
        print(f"make arm64: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except subprocess.TimeoutExpired as error:
        print(f"make arm64: not finished after {given.limit:.0f} s: {error.cmd[-6:]}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for defect in defects:
        print(f"make arm64: {defect}", file=sys.stderr)
    report = proof.report
    peaks = (report.peak_rss_bytes, report.budget_bytes, report.emulator_peak_rss_bytes)
    trained = "{:.0f} MB of {:.0f} ({:.0f} of them QEMU's)".format(*(size / MB for size in peaks))
    say(
        f"{'not ' if defects else ''}as it should be: trained {report.optimizer_steps} steps in {trained},"
        f" {report.labels_equal} of {report.labels_compared} labels equal; {report_path}"
    )
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
