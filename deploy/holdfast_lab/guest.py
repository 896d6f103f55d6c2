"""Builds the lab's guest: a Debian kernel and a small root file system with Redis in it.

Reads the packages that `./dev` unpacked, compiles one C file, writes `.cache/guest/`.

Theory of operation: the image is two files, a kernel and an archive that the kernel unpacks into
memory, so that a guest needs no disk. The archive holds busybox, the network driver's modules in
the order in which they must be loaded (from `modules.dep`), redis-server with every library that
the dynamic loader finds for it, and a dirtier. A fingerprint of the inputs lies beside the image;
while it fits, nothing is built again.

The archive is not compressed: under emulation the guest would spend seconds on unpacking it.
"""

import fcntl
import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from holdfast_lab.archive import Archive
from holdfast_lab.compiling import compiled
from holdfast_lab.errors import LabRefused
from holdfast_lab.paths import find_tool, guest_folder, packages_folder

GUEST_FILES = Path(__file__).parent / "guest_files"
WANTED_MODULES = ("virtio_pci", "virtio_net")
MINIMUM_MEMORY_MB = 128
"""With less, the kernel finds no room for its own unpacked root and Redis."""
LIBRARIES_SECONDS_MAX = 120.0


@dataclass(frozen=True)
class Image:
    """A bootable guest."""

    kernel: Path
    initrd: Path


def ensure_image() -> Image:
    """Return the guest image, building it first if it is missing or its inputs have changed.

    Safe to call from several processes at once. Raises LabRefused when an ingredient is missing.
    """
    folder = guest_folder()
    folder.mkdir(parents=True, exist_ok=True)
    image = Image(folder / "vmlinuz", folder / "initrd")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel, modules = _find_kernel()
        stamp = folder / "stamp"
        fingerprint = _fingerprint(kernel)
        built = image.kernel.exists() and image.initrd.exists() and stamp.exists()
        if not built or stamp.read_text() != fingerprint:
            _replace(image.initrd, _build_archive(modules))
            _replace(image.kernel, kernel.read_bytes())
            _replace(stamp, fingerprint.encode())
    return image


def _find_kernel() -> tuple[Path, Path]:
    """Return the newest unpacked kernel and its folder of modules."""
    kernels = sorted((packages_folder() / "boot").glob("vmlinuz-*"), key=_version_key)
    if not kernels:
        raise LabRefused("there is no guest kernel below .cache/packages: run ./dev setup")
    release = kernels[-1].name.removeprefix("vmlinuz-")
    modules = packages_folder() / "lib" / "modules" / release
    if not modules.is_dir():
        modules = packages_folder() / "usr" / "lib" / "modules" / release
    return kernels[-1], modules


def _version_key(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _fingerprint(kernel: Path) -> str:
    digest = hashlib.sha256(kernel.name.encode())
    for path in (*sorted(GUEST_FILES.iterdir()), Path(__file__)):
        digest.update(path.read_bytes())
    for tool in ("redis-server", "busybox"):
        facts = Path(find_tool(tool)).stat()
        digest.update(f"{tool} {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a guest may be booting from the old one."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(content)
    temporary.rename(path)


def _build_archive(modules: Path) -> bytes:
    archive = Archive()
    for folder in ("dev", "proc", "sys", "tmp", "bin"):
        archive.add_folder(folder)
    # The kernel opens it for init before anything could be mounted on /dev.
    archive.add_character_device("dev/console", 5, 1)
    archive.add_file("init", (GUEST_FILES / "init").read_bytes(), executable=True)
    archive.add_file("bin/poweroff", (GUEST_FILES / "poweroff").read_bytes(), executable=True)
    archive.add_file("bin/busybox", Path(find_tool("busybox")).read_bytes(), executable=True)
    archive.add_file("bin/dirty", compiled(GUEST_FILES / "dirty.c", "-static"), executable=True)
    _add_modules(archive, modules)
    _add_program(archive, "bin/redis-server", find_tool("redis-server"))
    return archive.finish()


def _add_modules(archive: Archive, modules: Path) -> None:
    order = load_order(_dependencies(modules), WANTED_MODULES)
    for path in order:
        archive.add_file(f"modules/{Path(path).name}", (modules / path).read_bytes())
    archive.add_file("modules/order", "".join(f"{Path(path).name}\n" for path in order).encode())


def _dependencies(modules: Path) -> dict[str, list[str]]:
    """Return what each module needs, by path below `modules`, as its own header says.

    An unpacked package has no `modules.dep` yet (its installation script would write it), so the
    list is read from the modules: each carries `depends=a,b` among its strings.
    """
    found = {path.stem.replace("-", "_"): path for path in modules.glob("kernel/**/*.ko")}
    pending, result = list(WANTED_MODULES), dict[str, list[str]]()
    while pending:
        name = pending.pop()
        if name not in found:
            raise LabRefused(f"the guest kernel has no module {name} below {modules}")
        path = str(found[name].relative_to(modules))
        if path in result:
            continue
        match = re.search(rb"\0depends=([^\0]*)\0", b"\0" + found[name].read_bytes())
        needed = match[1].decode().replace("-", "_").split(",") if match and match[1] else []
        result[path] = [str(found[other].relative_to(modules)) for other in needed]
        pending.extend(needed)
    return result


def load_order(dependencies: dict[str, list[str]], wanted: tuple[str, ...]) -> list[str]:
    """Return the paths of `wanted` modules and all they need, every module after its needs."""
    order: list[str] = []

    def visit(path: str) -> None:
        for needed in dependencies[path]:
            visit(needed)
        if path not in order:
            order.append(path)

    for name in wanted:
        visit(next(path for path in dependencies if Path(path).stem.replace("-", "_") == name))
    return order


def _add_program(archive: Archive, name: str, program: str) -> None:
    """Add a program and every library the dynamic loader would map for it."""
    archive.add_file(name, Path(program).read_bytes(), executable=True)
    for library in map(Path, _libraries(program)):
        # The loader's own path is written into every program; the rest it finds by name.
        folder = "lib64" if library.name.startswith("ld-linux") else "lib/x86_64-linux-gnu"
        archive.add_file(
            f"{folder}/{library.name}", library.resolve().read_bytes(), executable=True
        )


def _libraries(program: str) -> list[str]:
    """Return the loader and the libraries of a program, those of the unpacked packages first."""
    unpacked = packages_folder() / "usr/lib/x86_64-linux-gnu"
    done = subprocess.run(
        ["ldd", program],
        env={**os.environ, "LD_LIBRARY_PATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIBRARIES_SECONDS_MAX,
    )
    missing = re.findall(r"(\S+) => not found", done.stdout)
    if missing or done.returncode != 0:
        raise LabRefused(f"{program} lacks {', '.join(missing) or done.stderr}: run ./dev setup")
    return re.findall(r"(?:=> |^\s+)(/\S+)", done.stdout, flags=re.MULTILINE)


if __name__ == "__main__":
    ensure_image()
