"""The kernel's sets, what they hold and for how long, and the ipset commands that change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rstguard.engine.ruleset import SECOND
from rstguard.kernel.command import refusal
from tests.support.fake_kernel.members import KernelSet, Key, Member, Refused, key_text
from tests.support.fake_kernel.words import words_of

_VERSION = "ipset v7.17: "
_NOT_THERE = "The set with the given name does not exist"
_FLAGS = ("comment", "counters", "forceadd")


class IpSets:
    """All sets of a kernel.

    Args:
        clock: monotonic nanoseconds, by which elements end.
        references: how many rules name a set.
    """

    def __init__(self, clock: Callable[[], int], references: Callable[[str], int]) -> None:
        self._clock = clock
        self._references = references
        self._sets: dict[str, KernelSet] = {}
        self._slots: list[str | None] = []
        """The names in the order of the kernel: a new set takes the first free place."""

    @property
    def names(self) -> list[str]:
        """The names of all sets, in the kernel's order."""
        return [name for name in self._slots if name is not None]

    def get(self, name: str) -> KernelSet:
        """Return a set, without the elements whose time is over.

        Raises:
            Refused: there is none of that name.
        """
        if name not in self._sets:
            raise Refused(_NOT_THERE)
        held = self._sets[name]
        if "timeout" in held.options:
            now = self._clock()
            over = [k for k, m in held.members.items() if m.until is not None and m.until <= now]
            for key in over:
                del held.members[key]
        return held

    def left(self, member: Member) -> int:
        """Return the seconds that an element has left as the kernel tells them; 0 is for ever."""
        return 0 if member.until is None else max(1, (member.until - self._clock()) // SECOND)

    def place(self, held: KernelSet, key: Key, seconds: int | None, comment: str = "") -> None:
        """Add an element or renew it; without `seconds` it lasts as long as the set says.

        Raises:
            Refused: the set is full.
        """
        if key not in held.members and held.is_full:
            if "forceadd" not in held.options:
                raise Refused("Hash is full, cannot add more elements")
            del held.members[next(iter(held.members))]
        until = None
        if "timeout" in held.options:
            lasts = int(held.options["timeout"]) if seconds is None else seconds
            until = self._clock() + lasts * SECOND if lasts else None
        held.members[key] = Member(until, comment)

    def command(self, arguments: Sequence[str], text: str = "") -> str:
        """Carry out an ipset command and return what it prints.

        Raises:
            KernelError: it was refused.
        """
        try:
            if arguments[1] == "restore":
                self._restore(text)
                return ""
            exist = "-exist" in arguments
            words = [word for word in arguments[1:] if word != "-exist"]
            return self._carry_out(words, exist)
        except Refused as problem:
            raise refusal(arguments, f"{_VERSION}{problem}") from None

    def _restore(self, text: str) -> None:
        """Carry out line by line; what is done stays.

        The real one collects the additions to one set: those before a line that it cannot even
        read are lost.
        """
        collected: list[tuple[int, list[str]]] = []

        def add_all() -> None:
            while collected:
                number, words = collected.pop(0)
                try:
                    self._add(*words[1:])
                except Refused as problem:
                    raise Refused(f"Error in line {number}: {problem}") from None

        for number, line in enumerate(text.splitlines(), 1):
            words = list(words_of(line))
            if not words:
                continue
            try:
                if words[0] == "add":
                    self.get(words[1]).keys(words[2])
            except Refused as problem:
                raise Refused(f"Error in line {number}: {problem}") from None
            if collected and (words[0] != "add" or words[1] != collected[0][1][1]):
                add_all()
            if words[0] == "add":
                collected.append((number, words))
                continue
            try:
                self._carry_out(words, exist=False)
            except Refused as problem:
                raise Refused(f"Error in line {number}: {problem}") from None
        add_all()

    def _carry_out(self, words: Sequence[str], exist: bool) -> str:
        order, *rest = words
        match order:
            case "create":
                self._create(*rest, exist=exist)
            case "add":
                self._add(*rest, exist=exist)
            case "del":
                held = self.get(rest[0])
                if held.members.pop(held.key(rest[1]), None) is None and not exist:
                    raise Refused("Element cannot be deleted from the set: it's not added")
            case "swap":
                self._swap(*rest)
            case "flush":
                for name in rest or self.names:
                    self.get(name).members.clear()
            case "destroy":
                self._destroy(rest)
            case "save":
                return "".join(self._saved(name) for name in rest or self.names)
            case "list":
                return self._listed([word for word in rest if word[0] != "-"], "-name" in rest)
            case _:
                raise Refused(f"the fake kernel does not know ipset {order}")
        return ""

    def _create(self, name: str, kind: str, *words: str, exist: bool) -> None:
        if name in self._sets:
            if exist:
                return
            raise Refused("Set cannot be created: set with the same name already exists")
        options = {} if kind == "bitmap:port" else {"family": "inet", "maxelem": "65536"}
        options |= {} if kind == "bitmap:port" else {"hashsize": "1024"}
        rest = iter(words)
        for word in rest:
            options[word] = "" if word in _FLAGS else next(rest)
        self._sets[name] = KernelSet(kind, options)
        if None not in self._slots:
            self._slots.append(None)
        self._slots[self._slots.index(None)] = name

    def _add(self, name: str, element: str, *words: str, exist: bool = False) -> None:
        held = self.get(name)
        options = dict(zip(words[::2], words[1::2], strict=True))
        seconds = int(options["timeout"]) if "timeout" in options else None
        for key in held.keys(element):
            if key in held.members and not exist:
                raise Refused("Element cannot be added to the set: it's already added")
            self.place(held, key, seconds, options.get("comment", ""))

    def _swap(self, one: str, other: str) -> None:
        first = self.get(one)
        if other not in self._sets:
            raise Refused("Sets cannot be swapped: the second set does not exist")
        if first.kind != self._sets[other].kind:
            raise Refused("The sets cannot be swapped: their type does not match")
        self._sets[one], self._sets[other] = self._sets[other], first

    def _destroy(self, names: Sequence[str]) -> None:
        for name in names or self.names:
            self.get(name)
            if self._references(name):
                raise Refused("Set cannot be destroyed: it is in use by a kernel component")
        for name in names or self.names:
            del self._sets[name]
            self._slots[self._slots.index(name)] = None

    def _saved(self, name: str) -> str:
        held = self.get(name)
        lines = [f"create {name} {held.type} {held.header}"]
        for key, member in held.members.items():
            line = f"add {name} {key_text(key)}"
            if "timeout" in held.options:
                line += f" timeout {self.left(member)}"
            lines.append(f'{line} comment "{member.comment}"' if member.comment else line)
        return "".join(f"{line}\n" for line in lines)

    def _listed(self, names: Sequence[str], only_names: bool) -> str:
        if only_names:
            return "".join(f"{name}\n" for name in names or self.names)
        return "\n".join(
            f"Name: {name}\nType: {held.type}\nRevision: 7\nHeader: {held.header}\n"
            f"Size in memory: 0\nReferences: {self._references(name)}\n"
            f"Number of entries: {len(held.members)}\n"
            for name in names or self.names
            for held in (self.get(name),)
        )
