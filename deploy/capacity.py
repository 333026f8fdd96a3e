"""How many servers a load needs: a simulation of a fleet with measured service times, and the sum on paper.

    python -m deploy.capacity --rate 1000 --service-ms 13.4 --workers 2 --p99-ms 100

Requests arrive by a Poisson process, or in bursts (a Poisson process between a low and a high rate). A balancer gives
each to a server, which has one queue and some workers (model instances). An autoscaler looks at the mean time in the
queue, as the chart's does, and its servers come late. The network, and servers that share a machine, are left out.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Fleet:
    """What is simulated.

    Attributes:
        rate: requests per second, on average.
        service_ms: measured times of one request on one worker, drawn from at random.
        servers: at the start.
        workers: of each server.
        burst: how much faster than on average requests arrive in a burst; 1 = a plain Poisson process.
        burst_seconds: mean length of a burst, and of the quiet after it.
        balancer: roundrobin, random or leastconn.
        autoscale: whether servers are added (never taken away) while the mean time in the queue is above `queue_ms`.
        queue_ms: that bound.
        look_seconds: how often the autoscaler looks, at the requests since it last did.
        start_seconds: until a new server takes requests.
        most: servers at most.
        seconds: of the simulation.
        times: of arrival, in seconds, that were recorded; they replace those that `rate` and `burst` make.
        seed: of everything random.
    """

    rate: float
    service_ms: Sequence[float]
    servers: int
    workers: int = 1
    burst: float = 1.0
    burst_seconds: float = 5.0
    balancer: str = "leastconn"
    autoscale: bool = False
    queue_ms: float = 20.0
    look_seconds: float = 15.0
    start_seconds: float = 30.0
    most: int = 1000
    seconds: float = 120.0
    times: Sequence[float] = ()
    seed: int = 1


@dataclass
class Result:
    """What the clients of a simulated fleet see; times in milliseconds."""

    latencies_ms: list[float] = field(default_factory=list)
    queue_ms: list[float] = field(default_factory=list)
    servers: int = 0

    def percentile(self, share: float) -> float:
        """The latency that `share` of the requests do not exceed."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def arrivals(fleet: Fleet, chance: random.Random) -> Iterator[float]:
    """Times of arrival, in seconds.

    In a burst requests come `burst` times as fast as on average, between bursts so much slower that the average holds.
    """
    now, change, high = 0.0, 0.0, True
    while now < fleet.seconds:
        if fleet.burst > 1 and now >= change:
            high = not high
            change = now + chance.expovariate(1 / fleet.burst_seconds)
        quiet = max(0.0, 2 - fleet.burst)
        rate = fleet.rate * (1 if fleet.burst == 1 else fleet.burst if high else quiet)
        if rate == 0:
            now = change
            continue
        step = chance.expovariate(rate)
        if fleet.burst > 1 and now + step > change:
            now = change  # a Poisson process forgets: draw again at the new rate
            continue
        now += step
        yield now


def simulate(fleet: Fleet) -> Result:
    """Runs the fleet.

    Each server is a heap of the times when its workers are free again, and a heap of the ends of what it has taken.
    """
    chance = random.Random(fleet.seed)
    result = Result(servers=fleet.servers)
    free = [[0.0] * fleet.workers for _ in range(fleet.servers)]
    taken: list[list[float]] = [[] for _ in free]
    ready = [0.0] * fleet.servers
    look, since = fleet.look_seconds, 0
    for number, now in enumerate(fleet.times or arrivals(fleet, chance)):
        while fleet.autoscale and now >= look:
            seen = result.queue_ms[since:]
            mean = sum(seen) / len(seen) if seen else 0.0
            starting = sum(time > look for time in ready)
            wanted = min(fleet.most, math.ceil((len(free) - starting) * mean / fleet.queue_ms))  # as a HPA computes it
            for _ in range(max(0, min(wanted, 2 * len(free)) - len(free))):
                start = look + fleet.start_seconds
                free.append([start] * fleet.workers)
                taken.append([])
                ready.append(start)
            since, look = len(result.queue_ms), look + fleet.look_seconds
        able = [index for index, time in enumerate(ready) if time <= now]
        for index in able:
            while taken[index] and taken[index][0] <= now:
                heapq.heappop(taken[index])
        if fleet.balancer == "roundrobin":
            chosen = able[number % len(able)]
        elif fleet.balancer == "random":
            chosen = chance.choice(able)
        else:
            fewest = min(len(taken[index]) for index in able)
            chosen = chance.choice([index for index in able if len(taken[index]) == fewest])
        begin = max(now, heapq.heappop(free[chosen]))
        end = begin + chance.choice(fleet.service_ms) / 1000
        heapq.heappush(free[chosen], end)
        heapq.heappush(taken[chosen], end)
        result.latencies_ms.append((end - now) * 1000)
        result.queue_ms.append((begin - now) * 1000)
    result.servers = len(free)
    return result


def servers_for(fleet: Fleet, p99_ms: float) -> int:
    """The fewest servers whose p99 stays within a bound; found by doubling and halving.

    Raises:
        ValueError: a request on an idle server takes longer than that.
    """
    if sorted(fleet.service_ms)[math.ceil(0.99 * len(fleet.service_ms)) - 1] > p99_ms:
        raise ValueError(f"p99 {p99_ms:g} ms is less than a request takes on an idle server")
    mean = sum(fleet.service_ms) / len(fleet.service_ms)
    low = max(1, math.ceil(fleet.rate * mean / 1000 / fleet.workers))
    high = low
    while simulate(replace(fleet, servers=high)).percentile(0.99) > p99_ms:
        low, high = high + 1, high + max(1, high // 4)
    while low < high:
        middle = (low + high) // 2
        if simulate(replace(fleet, servers=middle)).percentile(0.99) > p99_ms:
            low = middle + 1
        else:
            high = middle
    return high


def on_paper(rate: float, mean_ms: float, workers: int, utilisation: float = 0.7) -> int:
    """Servers that a rate needs if each is busy for a share of its time; for rates too high to simulate."""
    return math.ceil(rate * mean_ms / 1000 / workers / utilisation)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--service-ms", type=float, required=True, help="mean time of a request on one instance")
    parser.add_argument("--workers", type=int, default=1, help="instances per server")
    parser.add_argument("--p99-ms", type=float, required=True, help="bound that 99 %% of the requests must keep")
    parser.add_argument("--burst", type=float, default=1.0, help="1 to 2: how much faster than the mean a burst is")
    given = parser.parse_args()
    fleet = Fleet(given.rate, [given.service_ms], 1, given.workers, min(2.0, max(1.0, given.burst)), seconds=30)
    paper = on_paper(given.rate, given.service_ms, given.workers)
    needed = servers_for(fleet, given.p99_ms)
    result = simulate(replace(fleet, servers=needed))
    print(f"{needed} servers: p50 {result.percentile(0.5):.1f} ms, p99 {result.percentile(0.99):.1f} ms")
    print(f"{paper} servers at 70 % busy, on paper")


if __name__ == "__main__":
    main()
