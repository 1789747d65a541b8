"""Peak memory of a method, in a process of its own: the parent's is everybody's.

The child builds one contestant, takes a few steps, and says what the kernel saw (VmHWM). Our methods run under the
allocator's settings of a real run, autograd's under those of the C library, which is what everybody gets.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from wasi_edge.children import python_command
from wasi_edge.errors import WasiEdgeError

_STEPS = 3


def measure_peak(question: dict[str, Any]) -> int:
    """Peak resident bytes of a fresh process. `question`: model, image_size, entry, choices, batch, seed, threads.

    Raises WasiEdgeError with the last line of what the child said, if it fails.
    """
    child = subprocess.run(
        python_command("-m", "wasi_edge.bench.peak"),
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return int(json.loads(child.stdout.strip().splitlines()[-1])["peak_rss_bytes"])
    except (ValueError, IndexError, KeyError):
        detail = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise WasiEdgeError(f"{question['entry']['name']}: its memory could not be measured: {detail}") from None


def _main() -> int:
    question = json.load(sys.stdin)
    from wasi_edge.memory.malloc import reuse_freed_memory, settle_threads, tune_malloc
    from wasi_edge.memory.process import read_memory
    from wasi_edge.method import Method

    method = Method(question["entry"]["method"])
    if method.is_explicit:
        tune_malloc()
    threads = settle_threads(question["threads"])
    import torch

    from wasi_edge.bench.contestant import Contestant, Entry, choices_from
    from wasi_edge.bench.subject import find_subject
    from wasi_edge.memory.libraries import release_library_pages

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if method.is_explicit:
        release_library_pages()
    asked = question["entry"]
    entry = Entry(asked["name"], method, asked["epsilon"], asked["budget_bytes"])
    contestant = Contestant(
        find_subject(question["model"], question["image_size"]),
        entry,
        choices_from(question["choices"]),
        question["batch"],
        question["seed"],
    )
    for number in range(_STEPS):
        contestant.step()
        if method.is_explicit and number == 0:
            reuse_freed_memory()
    print(json.dumps({"peak_rss_bytes": read_memory().peak_rss_bytes}))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
