"""Names, addresses and commands of the lab, before anything is started."""

import itertools
import tomllib
from pathlib import Path

import pytest

from holdfast_lab import control_plane, network, services, vm
from holdfast_lab.cli import parse_memory_mb
from holdfast_lab.errors import LabRefused
from holdfast_lab.guest import Image, load_order
from holdfast_lab.state import Folder, LabState
from holdfast_lab.vm import VmOptions, VmPlan, check, qemu_argv

IMAGE = Image(Path("/image/vmlinuz"), Path("/image/initrd"))


def plan(name: str = "redis", number: int = 1, **options: int | bool) -> VmPlan:
    return VmPlan(
        name=name,
        number=number,
        options=VmOptions(**options),  # type: ignore[arg-type] # the test names them rightly
        qmp=Path("/run/h1/redis.qmp"),
        console=Path("/log"),
        accelerator="tcg",
    )


def after(argv: list[str], option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(argv) if word == option]


def test_no_two_parties_share_an_address() -> None:
    parties = [network.CONTROL, network.CLIENT]
    parties += [f"{kind}-{n}" for kind in control_plane.KINDS for n in range(1, 6)]
    parties += [f"h{number}" for number in range(1, network.HOSTS_MAX + 1)]
    assert len({network.party_address(party) for party in parties}) == len(parties)


def test_no_two_nics_of_guests_share_an_address_or_a_mac() -> None:
    nics = [(number, nic) for number in range(1, 600) for nic in range(network.NICS_MAX)]
    assert len({network.guest_address(*each) for each in nics}) == len(nics)
    assert len({network.guest_mac(*each) for each in nics}) == len(nics)


def test_every_direction_of_every_cut_has_a_rule_of_its_own() -> None:
    parties = [network.CONTROL, network.CLIENT, "etcd-1", "controller-5", "h1", "h2", "h80"]
    pairs = list(itertools.permutations(parties, 2))
    preferences = {network._preference(*pair) for pair in pairs}
    assert len(preferences) == len(pairs)
    assert all(0 < preference < 65536 for preference in preferences)


def test_taps_fit_into_an_interface_name_and_differ_for_long_names() -> None:
    taps = [tap for number in (1, 2, 999) for tap in plan("a" * 40, number=number, nics=4).taps]
    assert len(set(taps)) == len(taps)
    assert all(len(tap) <= vm.INTERFACE_NAME_MAX for tap in taps)


def test_private_memory_is_the_default_and_shared_memory_is_a_memfd() -> None:
    private, shared = qemu_argv(plan(), IMAGE), qemu_argv(plan(shared_memory=True), IMAGE)
    assert "-object" not in private
    assert after(shared, "-object") == ["memory-backend-memfd,id=ram0,size=256M,share=on"]
    assert after(shared, "-machine") == ["q35,memory-backend=ram0"]


def test_a_vga_card_is_there_unless_it_is_not_wanted() -> None:
    assert after(qemu_argv(plan(), IMAGE), "-vga") == ["std"]
    assert after(qemu_argv(plan(graphics=False), IMAGE), "-vga") == ["none"]


def test_every_nic_has_its_tap_and_its_address() -> None:
    two = plan(nics=2)
    argv = qemu_argv(two, IMAGE)
    assert [
        f"ifname={tap}," in netdev
        for tap, netdev in zip(two.taps, after(argv, "-netdev"), strict=True)
    ] == [True, True]
    assert len(after(argv, "-device")) == 2
    assert "holdfast.ip=10.77.1.1/16,10.78.1.1/16" in after(argv, "-append")[0]


def test_the_guest_is_asked_to_rewrite_memory_only_when_wanted() -> None:
    assert "dirty" not in after(qemu_argv(plan(), IMAGE), "-append")[0]
    busy = after(qemu_argv(plan(dirty_mb=32, dirty_pps=100), IMAGE), "-append")[0]
    assert busy.endswith("dirty_mb=32 dirty_pps=100")


def test_all_faults_of_a_vm_are_named_at_once() -> None:
    with pytest.raises(LabRefused) as refusal:
        check("No Name", VmOptions(memory_mb=64, vcpus=0, nics=9))
    for word in ("No Name", "128 MiB", "vcpus", "nics"):
        assert word in str(refusal.value)


@pytest.mark.parametrize("name", ["", "-a", "A", "a/b", "a" * 21])
def test_a_lab_with_a_name_that_would_not_do_is_refused(name: str) -> None:
    with pytest.raises(LabRefused):
        Folder(name)


def test_paths_of_sockets_stay_below_the_kernels_limit() -> None:
    path = Folder("a" * 20).run(f"h{network.HOSTS_MAX}") / "vms" / ("v" * 40 + ".qmp")
    assert len(str(path)) <= 107


def test_configuration_files_are_toml() -> None:
    text = services.toml(host='h"1', listen=["a:1", "b:2"], memory_total_bytes=1 << 40)
    assert tomllib.loads(text) == {
        "host": 'h"1',
        "listen": ["a:1", "b:2"],
        "memory_total_bytes": 1 << 40,
    }


def test_an_unknown_service_is_refused_with_those_there_are() -> None:
    state = LabState(name="x", components=("agents",), accelerator="tcg", hosts={"h1": True})
    with pytest.raises(LabRefused, match="agent h1"):
        services.describe(Folder("x"), state, "agent h2")
    with pytest.raises(LabRefused, match="agent h1"):
        services.describe(Folder("x"), state, "etcd")


def replicated(controllers: int, etcd: int) -> LabState:
    return LabState(
        name="x",
        components=services.COMPONENTS,
        accelerator="tcg",
        hosts={"h1": True, "h2": True},
        replicas={"controller": controllers, "etcd": etcd},
    )


def test_one_of_a_kind_keeps_its_plain_name_and_place() -> None:
    state = replicated(1, 1)
    assert control_plane.all_names(state) == ["etcd", "controller"]
    assert control_plane.parties(state) == ["control", "client"]
    assert control_plane.canonical(state, "etcd 1") == "etcd"
    assert control_plane.parties_named(state, "etcd") == ["control"]
    old = LabState(name="x", components=services.COMPONENTS, accelerator="tcg")
    assert control_plane.all_names(old) == ["etcd", "controller"]


def test_several_of_a_kind_have_numbers_and_a_place_each() -> None:
    state = replicated(2, 3)
    assert control_plane.all_names(state) == [
        "etcd 1",
        "etcd 2",
        "etcd 3",
        "controller 1",
        "controller 2",
    ]
    assert control_plane.canonical(state, "etcd-2") == "etcd 2"
    assert control_plane.canonical(state, "agent h1") == "agent h1"
    assert control_plane.parties_named(state, "controller 2") == ["controller-2"]
    assert control_plane.parties_named(state, "etcd-9") == ["etcd-9"]
    whole = ["control", "etcd-1", "etcd-2", "etcd-3", "controller-1", "controller-2"]
    assert control_plane.parties_named(state, "control") == whole
    with pytest.raises(LabRefused, match=r"etcd 1, etcd 2, etcd 3, controller 1"):
        services.describe(Folder("x"), state, "etcd")


@pytest.mark.parametrize("count", [0, 6])
def test_a_number_of_replicas_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(LabRefused, match="1 to 5 of etcd"):
        control_plane.check_counts({"etcd": count, "controller": 1})


def test_everyone_is_told_all_replicas_and_begins_at_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = Folder("x"), replicated(3, 3)
    monkeypatch.setattr(folder, "path", tmp_path)
    told = {}
    for name in ("controller 1", "controller 2", "agent h1", "agent h2"):
        path = Path(services.describe(folder, state, name).argv[-1])
        told[name] = tomllib.loads(path.read_text())
    members = [f"10.77.0.{last}:2379" for last in (111, 112, 113)]
    assert told["controller 1"]["etcd_endpoints"] == members
    assert told["controller 2"]["etcd_endpoints"] == [members[1], members[2], members[0]]
    controllers = [f"http://10.77.0.{last}:7700" for last in (101, 102, 103)]
    assert told["agent h1"]["controllers"] == controllers
    assert told["agent h2"]["controllers"] == [controllers[1], controllers[2], controllers[0]]


def test_components_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(LabRefused, match="etcd"):
        services.check_components(("controller",))
    with pytest.raises(LabRefused, match="nothing"):
        services.check_components(("nothing",))


def test_modules_are_loaded_after_what_they_need() -> None:
    needs = {"d/net.ko": ["d/ring.ko", "d/fail-over.ko"], "d/ring.ko": [], "d/fail-over.ko": [],
             "d/virtio-pci.ko": ["d/ring.ko"]}  # fmt: skip
    order = load_order(needs, ("virtio_pci", "net"))
    assert sorted(order) == sorted(needs)
    for module, needed in needs.items():
        assert all(order.index(other) < order.index(module) for other in needed)


def test_memory_is_given_with_or_without_a_unit() -> None:
    assert [parse_memory_mb(text) for text in ("256", "256M", "4g")] == [256, 256, 4096]
    with pytest.raises(LabRefused):
        parse_memory_mb("1.5G")
