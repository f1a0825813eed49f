"""Every contender by name, in the order of the tables."""

from __future__ import annotations

from bench.peers.eager import Eager
from bench.peers.generate import Generate
from bench.peers.inductor import Inductor, InductorFreezing
from bench.peers.llama_cpp import LlamaCpp
from bench.peers.openvino import OpenVino
from bench.peers.ours import Ours
from bench.peers.peer import Peer
from bench.peers.vllm import Vllm
from bench.peers.zentorch import Zentorch

OURS = Ours.name

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Ours(),
        Generate(),
        Eager(),
        Inductor(),
        InductorFreezing(),
        Zentorch(),
        LlamaCpp(),
        OpenVino(),
        Vllm(),
    )
}
