"""An environment for each job: this one, and before it the packages that the job replaces."""

from __future__ import annotations

import importlib.metadata
import os
import site
import subprocess
import venv
from dataclasses import dataclass, field
from pathlib import Path

import edgevlm
from edgevlm.errors import BenchError
from edgevlm.models import cache_directory


@dataclass(frozen=True)
class Job:
    """One back end: what is compared, its word, what pip installs for it, and with what around.

    part: "vision" or "decoder", or "choice" where only the selection is looked at.

    build: environment variables of the installation, run: those of the comparison. needs: what has
    to be on the system beside pip's packages.
    """

    name: str
    part: str
    word: str
    packages: tuple[str, ...]
    build: dict[str, str] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)
    needs: str = ""


def jobs() -> dict[str, Job]:
    """The jobs by name."""
    llama = importlib.metadata.version("llama-cpp-python")
    found = (
        # The plugin onnxruntime-ep-openvino offers its devices on Intel's processors only; this
        # package has an onnxruntime of its own and runs on any x86-64.
        Job("openvino", "vision", "openvino:cpu", ("onnxruntime-openvino", "openvino")),
        Job(
            "plugins",
            "choice",
            "",
            ("onnxruntime-ep-openvino", "onnxruntime-ep-webgpu", "onnxruntime-qnn"),
        ),
        Job(
            "vulkan",
            "decoder",
            "vulkan",
            (f"llama-cpp-python=={llama}",),
            build={"CMAKE_ARGS": "-DGGML_VULKAN=on -DLLAVA_BUILD=off"},
            # Without it llama.cpp passes over software adapters such as Mesa's lavapipe.
            run={"GGML_VK_VISIBLE_DEVICES": "0"},
            needs="a Vulkan driver (mesa-vulkan-drivers has a software one), glslc, spirv-headers "
            "and Vulkan headers of 1.3.272 or newer (libvulkan-dev of Debian 13, not of 12)",
        ),
    )
    return {job.name: job for job in found}


def python(job: Job, folder: Path | None = None) -> Path:
    """The Python of a job's environment, which is made the first time; raises BenchError."""
    folder = folder or cache_directory() / "backends" / job.name
    found = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / "ready").exists():
        return found
    venv.create(folder, with_pip=True, clear=True)
    install = [str(found), "-m", "pip", "install", "--no-deps", "--no-cache-dir", *job.packages]
    done = subprocess.run(
        install, env=os.environ | job.build, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        needs = f"; it needs {job.needs}" if job.needs else ""
        raise BenchError(f"{job.name}: cannot be installed ({''.join(last)}){needs}")
    _add_this_environment(found)
    (folder / "ready").touch()
    return found


def _add_this_environment(other: Path) -> None:
    """Everything that the job did not install comes from here; its own packages come first."""
    ask = "import site; print(site.getsitepackages()[-1])"
    target = subprocess.run([other, "-c", ask], capture_output=True, text=True, check=True)
    here = [*site.getsitepackages(), str(Path(edgevlm.__file__).parent.parent)]
    Path(target.stdout.strip(), "zz-edgevlm.pth").write_text(
        "\n".join(here) + "\n", encoding="utf-8"
    )


def run(job: Job, arguments: list[str], folder: Path | None = None) -> int:
    """Runs the comparison in the job's environment; returns its exit code."""
    # A PYTHONPATH would stand before the job's own packages.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | job.run
    module = ["-m", "workshop.backends", job.name, "--here"]
    command = [str(python(job, folder)), *module, *arguments]
    return subprocess.run(command, env=env, check=False).returncode
