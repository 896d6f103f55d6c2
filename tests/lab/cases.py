"""Which test files run inside which booted hosts. Pure.

A case is one boot: its files are run by one pytest, one after the other, in its first host. Files
that want the same machine share a case, as a boot and pytest's start cost some ten seconds.
"""

from dataclasses import dataclass

from tests.lab.booted.machine import Machine

DEFAULT = Machine()


@dataclass(frozen=True)
class Case:
    """One boot and what runs in it."""

    name: str
    files: tuple[str, ...]
    """Paths below tests/lab/inside."""
    machine: Machine = DEFAULT
    hosts: int = 1
    """With more than one, a test reaches the others by the fixture `other_host`."""
    core: bool = False
    """Whether `./dev test` runs it; the others wait for `--lab-all`."""
    seconds_max: float = 300.0
    """For everything inside; each test has as much, as the host is slow and pytest must not be."""


CASES = (
    Case("host-6.1", ("test_the_host.py",), core=True),
    Case("host-6.12", ("test_the_host.py",), Machine(kernel="6.12")),
    Case("host-qemu-10", ("test_the_host.py",), Machine(qemu="10")),
    Case("plug-6.1", ("test_qdisc_plug.py",), core=True, seconds_max=600),
    Case("plug-6.12", ("test_qdisc_plug.py",), Machine(kernel="6.12"), seconds_max=600),
    Case("soft-dirty", ("test_soft_dirty.py",), core=True, seconds_max=600),
    Case(
        "kvm-tracking-6.1",
        ("test_kvm_tracking.py",),
        Machine(modules=("kvm_amd",)),
        seconds_max=600,
    ),
    Case(
        "kvm-tracking-6.12",
        ("test_kvm_tracking.py",),
        Machine(kernel="6.12", modules=("kvm_amd",)),
        seconds_max=600,
    ),
    Case(
        "kvm-6.12",
        ("test_kvm_protection.py",),
        Machine(kernel="6.12", memory_mb=3072),
        seconds_max=1200,
    ),
    Case("kvm-6.1", ("test_kvm_protection.py",), Machine(memory_mb=3072), seconds_max=1200),
    Case("pair-6.1", ("test_a_pair.py", "test_rdma.py"), hosts=2, core=True, seconds_max=600),
    Case(
        "pair-6.12",
        ("test_a_pair.py", "test_rdma.py"),
        Machine(kernel="6.12"),
        hosts=2,
        seconds_max=600,
    ),
)
