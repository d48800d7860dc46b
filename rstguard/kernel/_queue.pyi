from rstguard.engine.wire import Packet

FIELDS: str
MOST: int

class Reader:
    def __new__(
        cls, descriptor: int, packet_type: type[Packet], states: bytes, base: int, outbound: int, /
    ) -> Reader: ...
    def receive(self, most: int, whole: int, /) -> list[tuple[int, int, Packet | bytes]]: ...

def parse(packet_type: type[Packet], data: bytes, state: int, whole: int, /) -> Packet | None: ...
