"""QEMU's command line as options and their values. Pure.

A word of an option is `-name` or `--name`; whether a value follows is QEMU's table
(`qemu-options.hx`). A value is `first,key=value,...` with `,,` for a comma, or a JSON object.
Rewriting keeps what it does not know, in its order: `render(parse(argv)) == argv` but for `--`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

WITHOUT_VALUE = frozenset(
    {
        *("S", "h", "help", "version", "snapshot", "nodefaults", "no-user-config", "nographic"),
        *("daemonize", "no-shutdown", "no-reboot", "no-acpi", "no-hpet", "enable-kvm", "usb"),
        *("only-migratable", "full-screen", "no-fd-bootchk", "portrait", "preconfig", "s"),
        *("singlestep", "win2k-hack", "xen-attach", "xen-domid-restrict", "mem-prealloc"),
        *("enable-sync-profile", "semihosting", "old-param", "no-quit", "alt-grab", "ctrl-grab"),
        *("no-frame", "nodefconfig", "sdl", "curses", "no-kvm", "enable-hax"),
    }
)


@dataclass(frozen=True)
class Option:
    """One option; a word that is none (a disk image) has an empty name."""

    name: str
    value: str | None = None

    @property
    def parameters(self) -> "Parameters":
        """The value, taken apart."""
        return Parameters.parse(self.value or "")

    def with_parameters(self, parameters: "Parameters") -> "Option":
        """Return the same option with another value."""
        return replace(self, value=parameters.render())


@dataclass(frozen=True)
class Parameters:
    """A value `first,key=value,...`; from and to text or a JSON object."""

    first: str
    """What stands before the first comma without a key: the type, the driver, the path."""
    pairs: tuple[tuple[str, str], ...]
    first_key: str = ""
    """Under which name JSON gives `first`; empty for text."""
    json_values: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, text: str) -> "Parameters":
        """Read a value; of JSON only the top level."""
        if text.startswith("{"):
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):  # no JSON, or nested like none that QEMU reads
                values = None
            if isinstance(values, dict):
                return cls._of_json(values)
        parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
        first = ""
        if parts and "=" not in parts[0]:
            first = parts.pop(0)
        pairs = []
        for part in parts:
            key, equals, value = part.partition("=")
            pairs.append((key, value if equals else "on"))
        return cls(first, tuple(pairs))

    @classmethod
    def _of_json(cls, values: dict[str, Any]) -> "Parameters":
        first_key = next((key for key in ("type", "qom-type", "driver") if key in values), "")
        pairs = tuple(
            (key, _word(value))
            for key, value in values.items()
            if key != first_key and not isinstance(value, dict | list)
        )
        return cls(str(values.get(first_key, "")), pairs, first_key, values)

    def get(self, *keys: str) -> str | None:
        """Return the last value given under one of `keys`."""
        return next((value for key, value in reversed(self.pairs) if key in keys), None)

    def changed(
        self, changes: Mapping[str, str | None], *, first: str | None = None
    ) -> "Parameters":
        """Return a copy with keys set, or removed where the value is None."""
        pairs = [(key, value) for key, value in self.pairs if key not in changes]
        pairs += [(key, value) for key, value in changes.items() if value is not None]
        new_first = self.first if first is None else first
        json_values = None
        if self.json_values is not None:
            json_values = {k: v for k, v in self.json_values.items() if k not in changes}
            json_values |= {k: _typed(v) for k, v in changes.items() if v is not None}
            if self.first_key:
                json_values[self.first_key] = new_first
        return Parameters(new_first, tuple(pairs), self.first_key, json_values)

    def render(self) -> str:
        """Return the value as QEMU reads it."""
        if self.json_values is not None:
            return json.dumps(self.json_values)
        words = [self.first.replace(",", ",,")] if self.first else []
        words += [f"{key}={value}".replace(",", ",,") for key, value in self.pairs]
        return ",".join(words)


def _word(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _typed(value: str) -> str | bool:
    return {"on": True, "off": False}.get(value, value)


def parse(argv: Sequence[str]) -> list[Option]:
    """Read the words behind the program's name."""
    options: list[Option] = []
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-") or word == "-":
            options.append(Option("", word))
            continue
        name = word.removeprefix("-").removeprefix("-")
        options.append(Option(name, None if name in WITHOUT_VALUE else next(words, None)))
    return options


def render(program: str, options: Iterable[Option]) -> tuple[str, ...]:
    """Return the command line of `options`."""
    argv = [program]
    for option in options:
        if option.name:
            argv.append(f"-{option.name}")
        if option.value is not None:
            argv.append(option.value)
    return tuple(argv)
