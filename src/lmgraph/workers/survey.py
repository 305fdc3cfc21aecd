"""Whether the servers of a whole graph have the bases and adapters that it names: looked at before anybody asks anything.

It knows which nodes there are to look at, and how long a look may take. It changes nothing on any server; a node whose graph names no
dialect has nothing to be looked for.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass

from lmgraph.errors import WorkerError
from lmgraph.graph import Graph, Node
from lmgraph.workers.inventory import Seen
from lmgraph.workers.openai import OpenAIWorker

LOOK_S = 5.0
"""seconds for the servers of one node; all nodes are looked at together"""


@dataclass(frozen=True)
class Found:
    """What was seen of one replica of one node (`url` '': of the node itself, whose key is missing)."""

    node: str
    url: str
    problem: str = ""
    note: str = ""


async def survey(given: Graph, environment: Mapping[str, str] = os.environ) -> list[Found]:
    """Every replica of every node that names a dialect, in the order of the graph."""
    named = [node for node in given.nodes.values() if node.worker.dialect]
    return [found for rows in await asyncio.gather(*(_look(node, environment) for node in named)) for found in rows]


async def _look(node: Node, environment: Mapping[str, str]) -> list[Found]:
    worker = OpenAIWorker.of(node.worker, environment)
    try:
        seen = await asyncio.wait_for(worker.look(), LOOK_S)
    except WorkerError as error:
        return [Found(node.name, "", str(error))]
    except asyncio.TimeoutError:
        seen = [
            Seen(url, note=f"it is not up yet: {url} did not answer within {LOOK_S:g} s")
            for url in (state["url"] for state in worker.states())
        ]
    finally:
        await worker.close()
    return [Found(node.name, one.url, one.problem, one.note) for one in seen]
