"""A distributed run on one machine: eleven hosts, and what becomes of conversations while hosts, links and processes fail.

    scripts/hosts --out benchmarks/results/hosts.json     # toy models; root, on Linux; two minutes
    scripts/hosts --real                                  # the built-in master and SmolLM2-135M

Clients talk all the time, through HAProxy, and send only the new turn. One after another: worker hosts are cut off, a gateway is killed,
then cut off, another one is drained, Redis is killed, then cut off, a gateway's link becomes slow and lossy. In the end the history is
compared with what clients were told. The status is 1 where anything was not as it must be, 2 where it cannot run here.

All times are in seconds:

- `median`, `longest`: of the turns that were under way while the fault lasted, answered or not;
- `first`: from the fault to the end of the first turn that began after it and was answered;
- `recovered`: from the fault to the end of the last turn that failed or was slow (over twice the longest of the quiet time, at least 1 s);
- `back`: from the end of the fault until what had failed works again (a killed gateway's start is in it).

`unkept` are answers that say that they are in no history.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import models
from figures import table
from hosts import CannotMake, network
from places import Places
from processes import Broken
from scenario import play


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--talkers", type=int, default=8, help="conversations at the same time")
    parser.add_argument("--real", action="store_true", help="the built-in master and SmolLM2-135M in place of toys")
    parser.add_argument("--logs", type=Path, help="leave what the processes said there")
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    parser.add_argument("--out", type=Path, help="write the figures there")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything is taken down, as by Ctrl-C
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="lmgraph-hosts-") as name, network() as net:
            folder = Path(name)
            try:
                made = models.real(folder) if given.real else models.toy(folder)
                figures = play(net, Places(net, folder, made), given.talkers)
            finally:
                if given.logs:
                    given.logs.mkdir(parents=True, exist_ok=True)
                    for log in folder.glob("*.log"):
                        shutil.copy(log, given.logs)
    except (CannotMake, Broken) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; nothing is left.", file=sys.stderr)
        return 130
    report = {
        "command": " ".join(["benchmarks/hosts/run.py", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
        "models": made.kind,
        "talkers": given.talkers,
        "slow": round(figures.slow_s, 3),
        "seconds": round(time.monotonic() - began, 1),
        "phases": figures.phases,
        "musts": figures.musts,
    }
    text = json.dumps(report, indent=1) + "\n"
    if given.out:
        given.out.write_text(text)
    print(text if given.json else table(report))
    return 0 if all(figures.musts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
