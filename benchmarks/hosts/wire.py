"""A long and bad wire between two interfaces of one namespace: every frame is late, some never come. For kernels without netem.

    wire.py NEAR FAR --delay-ms 200 --loss-percent 5

It prints "ready" when it carries. Frames travel with what the kernel says about them (PACKET_VNET_HDR): checksums that are not there yet
and segments that are not cut yet pass as they are, so that a lost one may be several packets of one flow. (packet(7))
"""

from __future__ import annotations

import argparse
import random
import select
import socket
import time
from collections import deque

EVERY_PROTOCOL = 0x0003
SOL_PACKET, PACKET_VNET_HDR = 263, 15
LARGEST = 70_000


def end(interface: str) -> socket.socket:
    """One end: what comes in at an interface is read from it, what is sent to it goes out there."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL))
    made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    made.bind((interface, EVERY_PROTOCOL))
    made.setblocking(False)
    return made


def carry(near: socket.socket, far: socket.socket, delay_s: float, loss: float, chance: random.Random) -> None:
    """For ever."""
    other = {near: far, far: near}
    under_way: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for ready in select.select([near, far], [], [], wait)[0]:
            try:
                frame, (_, _, kind, *_) = ready.recvfrom(LARGEST)
            except OSError:  # its link went down: said once
                continue
            if kind != socket.PACKET_OUTGOING and chance.random() >= loss:
                under_way.append((time.monotonic() + delay_s, other[ready], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, out, frame = under_way.popleft()
            try:
                out.send(frame)
            except OSError:  # the link is down, or there is no room: lost
                continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("near")
    parser.add_argument("far")
    parser.add_argument("--delay-ms", type=float, required=True)
    parser.add_argument("--loss-percent", type=float, required=True)
    given = parser.parse_args()
    near, far = end(given.near), end(given.far)
    print("ready", flush=True)
    carry(near, far, given.delay_ms / 1000, given.loss_percent / 100, random.Random(0))


if __name__ == "__main__":
    main()
