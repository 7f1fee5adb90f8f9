"""Reads from the environment which node of a job this machine is, and where the nodes meet."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

MEETING_SECONDS = 1800  # for all nodes to connect: one may still draw the figures of the last fold
PORTS = range(1, 2**16)


@dataclass(frozen=True)
class Node:
    """This machine among the nodes of a job."""

    count: int
    rank: int
    endpoint: str  # host:port, on the first node

    def log_dir(self, folder: Path) -> Path:
        """The folder for the logs of this node's ranks; with several nodes, each has its own."""
        return folder / f"node{self.rank}" if self.count > 1 else folder

    @property
    def rendezvous(self) -> list[str]:
        """torchrun's arguments for several nodes, without the id."""
        # torchrun would guess it from the address, which may be a service's name and not the machine's
        hosts = int(self.rank == 0)
        limits = f"join_timeout={MEETING_SECONDS},read_timeout={MEETING_SECONDS},is_host={hosts}"
        return [
            f"--nnodes={self.count}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-conf={limits}",
        ]


def this_node() -> Node:
    """Read NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, or torchrun's PET_NNODES etc. for those that are not set.

    PET_RDZV_ENDPOINT (host:port) has precedence over PET_MASTER_ADDR and PET_MASTER_PORT, as in torchrun.

    Raises: ValueError for values that contradict each other or lack the first node's address.
    """
    ours, torchruns = os.environ.get, lambda name: os.environ.get(f"PET_{name}")
    count = whole_number("NNODES", ours("NNODES") or torchruns("NNODES") or "1", range(1, 10_000))
    if count == 1:
        if ours("NODE_RANK", "0") not in ("", "0"):
            raise ValueError(f"NODE_RANK is {ours('NODE_RANK')!r} and NNODES is 1; set NNODES on every node")
        return Node(1, 0, "")
    rank = whole_number("NODE_RANK", ours("NODE_RANK") or torchruns("NODE_RANK") or "", range(count))
    endpoint = torchruns("RDZV_ENDPOINT") or f"{torchruns('MASTER_ADDR') or ''}:{torchruns('MASTER_PORT') or ''}"
    host, port = re.fullmatch(r"(\[.*\]|[^:]*):?(.*)", endpoint.strip()).groups()
    if not (host := ours("MASTER_ADDR") or host):
        raise ValueError(f"NNODES is {count} and MASTER_ADDR is not set; set it to the first node's address on each")
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return Node(count, rank, f"{host}:{whole_number('MASTER_PORT', ours('MASTER_PORT') or port or '29500', PORTS)}")


def whole_number(name: str, text: str, allowed: range) -> int:
    least, _, most = text.partition(":")
    text = least if least == most else text  # PET_NNODES=2:2 is torchrun's way to say exactly 2
    if not re.fullmatch(r"[0-9]+", text) or int(text) not in allowed:
        problem = f"is {text!r}" if text else "is not set"
        raise ValueError(f"{name} (or PET_{name}) {problem}; it is a whole number, {allowed[0]} to {allowed[-1]}")
    return int(text)
