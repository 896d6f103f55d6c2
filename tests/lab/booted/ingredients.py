"""Finds and builds what a host is booted from. Reads `.cache/booted`, writes `.cache/booted/boot`.

Theory of operation: `./dev` has unpacked kernels, a layer of packages and a second QEMU. From a
kernel two files are made, once: its image, and an archive with busybox, `init` and the modules
that mounting the root file system takes. Every boot appends a small archive of its own with the
runner and what this boot is about (a kernel unpacks archives one after the other), so that editing
the runner needs nothing rebuilt.

An image packed with xz is unpacked here, as QEMU enters the ELF file inside it directly: emulated,
the kernel would spend two seconds on unpacking itself. Others are quick and stay packed.

Source: Linux, Documentation/arch/x86/boot.rst (payload), xen/hvm/start_info.h (the PVH entry).
"""

import fcntl
import hashlib
import lzma
from dataclasses import dataclass
from pathlib import Path

from holdfast_lab.archive import Archive
from holdfast_lab.errors import LabRefused
from holdfast_lab.paths import cache_folder, find_tool

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
MODULES = ("virtio_pci", "virtio_console", "virtio_net", "9p", "9pnet_virtio", "overlay")
"""What it takes to mount the root, to report, and to give the network card its address early."""
XZ_MAGIC = b"\xfd7zXZ\0"
ELF_MAGIC = b"\x7fELF"
KERNELS = ("6.1", "6.12")
QEMUS = ("7.2", "10")


@dataclass(frozen=True)
class BootFiles:
    """What QEMU needs to boot a kernel, and the layers to lay over the root, top first."""

    image: Path
    archive: bytes
    layers: tuple[Path, ...]


def booted_folder() -> Path:
    """Return the folder that `./dev` filled."""
    folder = cache_folder() / "booted"
    if not (folder / "complete").exists():
        raise LabRefused("what booted hosts need is not below .cache: run ./dev setup")
    return folder


def python_path() -> str:
    """Return the folder with pyverbs alone: Debian's whole one would hide the environment's."""
    return str(booted_folder() / "layer/usr/lib/python3/dist-packages")


def qemu_program(version: str) -> str:
    """Return the installed QEMU for `7.2`, the one of backports for `10`."""
    assert version in QEMUS, f"QEMU is one of {QEMUS}"
    if version == "7.2":
        return find_tool("qemu-system-x86_64")
    return str(booted_folder() / "qemu-backports/usr/bin/qemu-system-x86_64")


def boot_files(kernel: str) -> BootFiles:
    """Return the files of a kernel, building them if they are missing or their inputs changed.

    Safe to call from several processes at once.
    """
    assert kernel in KERNELS, f"a kernel is one of {KERNELS}"
    unpacked = booted_folder() / "kernels" / kernel
    release = (unpacked / "release").read_text().strip()
    packed = unpacked / "boot" / f"vmlinuz-{release}"
    built = booted_folder() / "boot" / kernel
    built.mkdir(parents=True, exist_ok=True)
    with (built / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = _fingerprint(release)
        stamp = built / "stamp"
        if not stamp.exists() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            (built / "image").write_bytes(unpack_image(packed.read_bytes()))
            (built / "archive").write_bytes(_archive(unpacked / "usr/lib/modules" / release))
            stamp.write_text(wanted)
        archive = (built / "archive").read_bytes()
    return BootFiles(built / "image", archive, (unpacked, booted_folder() / "layer"))


def _fingerprint(release: str) -> str:
    digest = hashlib.sha256(release.encode())
    for path in (HERE / "init", Path(__file__), Path(find_tool("busybox"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def unpack_image(packed: bytes) -> bytes:
    """Return the ELF file inside a kernel image that was packed with xz, or the image as it is."""
    at = packed.find(XZ_MAGIC)
    while at > 0:
        try:
            image = lzma.LZMADecompressor().decompress(packed[at:])
        except lzma.LZMAError:
            image = b""  # the magic stood in the unpacker's own code
        if image.startswith(ELF_MAGIC):
            return image
        at = packed.find(XZ_MAGIC, at + 1)
    return packed


def _archive(modules: Path) -> bytes:
    archive = Archive()
    for folder in ("dev", "proc", "sys", "bin"):
        archive.add_folder(folder)
    # The kernel opens it for init before anything could be mounted on /dev.
    archive.add_character_device("dev/console", 5, 1)
    archive.add_file("init", (HERE / "init").read_bytes(), executable=True)
    archive.add_file("bin/busybox", Path(find_tool("busybox")).read_bytes(), executable=True)
    names = []
    for path in modules_in_order(modules):
        content = (modules / path).read_bytes()
        if path.endswith(".xz"):
            content = lzma.decompress(content)
        names.append(Path(path).name.removesuffix(".xz"))
        archive.add_file(f"modules/{names[-1]}", content)
    archive.add_file("modules/order", "".join(f"{name}\n" for name in names).encode())
    return archive.finish()


def modules_in_order(modules: Path) -> list[str]:
    """Return the paths of MODULES and of all they need, in the order in which they load."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        needs[path] = needed.split()
    by_name = {Path(path).name.split(".")[0].replace("-", "_"): path for path in needs}
    # What is built into the kernel has no file.
    builtin = {Path(p).stem for p in (modules / "modules.builtin").read_text().split()}
    wanted = [name for name in MODULES if name in by_name]
    missing = [name for name in MODULES if name not in by_name and name not in builtin]
    if missing:
        raise LabRefused(f"the kernel below {modules} has no module {', '.join(missing)}")
    order: list[str] = []
    for name in wanted:
        for path in (*reversed(needs[by_name[name]]), by_name[name]):
            if path not in order:
                order.append(path)
    return order


def archive_of_a_boot(words: str, environment: str) -> bytes:
    """Return the archive that one boot appends: the runner, and what it is told."""
    archive = Archive()
    archive.add_file("boot-words", words.encode())
    archive.add_file("environment.json", environment.encode())
    archive.add_file("runner.py", (HERE / "runner.py").read_bytes())
    return archive.finish()
