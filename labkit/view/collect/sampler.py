"""The sampler: telemetry and an inventory in, a `Scene` out.

`telemetry` counts events, and `inventory` finds what is in the swarm. The sampler puts the two together: the `registry`
says which experts and servers there are and in what state, `rates` makes rates and means of counters, and
`server_reports` does so with what servers report.
"""

# N: experts, S: servers, T: servers in telemetry

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from labkit.errors import CAUSES
from labkit.histogram import BUCKETS, percentiles
from labkit.server.statistics import CopyStatistics
from labkit.training.run import Run
from labkit.view.collect import telemetry
from labkit.view.collect import time_series as series
from labkit.view.collect.curves import Curves
from labkit.view.collect.inventory import Inventory
from labkit.view.collect.moves import MoveWords
from labkit.view.collect.rates import Rates, RecentSums, pad_rows, ratio
from labkit.view.collect.registry import Registry
from labkit.view.collect.server_reports import RATE_TAU, REQUESTS, ROWS, SECONDS, TIMES_TAU, ServerReports
from labkit.view.collect.telemetry import Telemetry
from labkit.view.collect.time_series import Bins, series_of
from labkit.view.collect.waiting import waits_of
from labkit.view.scene import (
    PERCENTILES,
    SERIES,
    SPLIT,
    CopySummary,
    Doubles,
    Experts,
    Headline,
    Ints,
    Scene,
    Series,
    Servers,
    State,
    copies_of,
    count_text,
)

GAUGE_MAX_AGE = 5.0  # seconds for which a gauge reported by a server is shown
HISTOGRAM_PERIOD = 0.45  # seconds between readings of the latency histograms, which are most of the work
IN_FLIGHT_MAX_AGE = 2.5  # seconds for which a count of the calls in flight holds
LOGGING_MAX_AGE = 30.0  # seconds after the last logged step that a loop counts as training
UNLISTED_GRACE = 3.0  # seconds that polling has to find a called address before the address gets a row of its own
STALENESS_COLUMNS = [telemetry.STALENESS_SUM, telemetry.STALENESS_COUNT]
TOTAL_COLUMNS = (series.CALLS, series.BYTES, series.STALENESS_SUM, series.STALENESS_COUNT)


class Sampler:
    """Makes scenes of a swarm. `scene()` is cheap, does not use the network, and is called in one thread at a time.

    Args:
        telemetry: The counters of this process's events.
        inventory: Returns the last inventory.
        in_flight: Returns how many calls are in flight.
        run: Returns the last run over this swarm, or None.
        name: The swarm's name.
        clock: Returns monotonic seconds, on the clock of the events.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        inventory: Callable[[], Inventory],
        in_flight: Callable[[], int],
        run: Callable[[], Run | None],
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        started = telemetry.started
        self._telemetry = telemetry
        self._inventory = inventory
        self._in_flight = in_flight
        self._run = run
        self._name = name
        self._clock = clock
        self._registry = Registry()
        self._reports = ServerReports()
        self._moves = MoveWords(self._label_of)
        self._expert_rows = np.zeros(0, dtype=np.int64)  # [experts in telemetry] -> row, or -1
        self._server_rows = np.zeros(0, dtype=np.int64)  # [T] -> row, or -1
        self._unlisted_since: dict[str, float] = {}
        self._expert_rates = Rates(3, RATE_TAU, started)  # rows, calls, failures
        self._server_rates = Rates(1, RATE_TAU, started)
        self._total_rates = Rates(len(TOTAL_COLUMNS) + 1, RATE_TAU, started)
        self._latencies = RecentSums(2, TIMES_TAU)
        self._stalenesses = RecentSums(2, TIMES_TAU)
        self._staleness = RecentSums(2, TIMES_TAU)
        self._times = RecentSums(len(SPLIT) * BUCKETS, TIMES_TAU)
        self._percentiles = np.zeros((0, len(SPLIT), len(PERCENTILES)), dtype=np.float32)
        self._times_at = -math.inf
        self._steps = Bins(series.STEP_COLUMNS, started)
        self._samples = 0
        self._curves = Curves(started)
        self._run_at = -math.inf  # when a run was last seen running
        self._in_flight_at, self._in_flight_seen = -math.inf, 0
        self._last_run: tuple[int, int, float] = (0, 0, math.nan)

    def scene(self, open: bool = True) -> Scene:
        """Make a scene of the swarm as it is now: 1. read what was counted and found; 2. tables; 3. time series."""
        now = self._clock()
        inventory, registry = self._inventory(), self._registry
        counted = self._telemetry.experts.read(), self._telemetry.servers.read()  # 1
        totals = self._telemetry.bins.total()
        own = bool(totals[series.CALLS] + totals[series.FAILED :].sum())
        registry.take(inventory, now)
        self._place_rows(inventory, counted[0], now)
        self._reports.take(inventory, registry, now, counters=not own)
        self._take_steps(now)
        self._curves.take(self._telemetry.metrics)
        while self._telemetry.lost:
            lost = self._telemetry.lost.popleft()
            words = f"{self._label_of(lost.address)} lost, with {count_text(len(lost.uids), 'expert')}"
            self._telemetry.mark(words, lost.at)
        for at, words in self._moves.take(self._telemetry.moves, now, last=not open):
            self._telemetry.mark(words, at)
        copies = copies_of(_said_of_copies(inventory))

        servers, expert_states, calls = self._servers(counted[1], own, now)  # 2
        experts = self._experts(counted[0], expert_states, own, now)
        headline = self._headline(totals, experts, servers, calls if not own else math.nan, copies, own, now)
        return Scene(
            at=now - self._telemetry.started,
            wall=time.time(),
            swarm=self._name,
            open=open,
            source="calls" if own else "servers",
            headline=headline,
            layers=tuple(registry.layers),
            experts=experts,
            servers=servers,
            series=self._series(own, now),  # 3
            marks=tuple(sorted(self._telemetry.marks.copy(), key=lambda mark: mark.at)),
            curves=self._curves.read(),
            waits=waits_of(self._telemetry, now, self._server_of),
            reachability=inventory.reachability,
            copies=copies,
        )

    # ------------------------------------------------------------ from telemetry's rows to the registry's

    def _place_rows(self, inventory: Inventory, experts: Doubles, now: float) -> None:
        uids = self._telemetry.experts.names[len(self._expert_rows) : len(experts)]
        if uids:
            new = np.array([self._registry.expert(uid) for uid in uids], dtype=np.int64)
            self._expert_rows = np.concatenate([self._expert_rows, new])
        addresses = self._telemetry.servers.names
        self._server_rows = pad_rows(self._server_rows, len(addresses), -1)
        polled = inventory.polled_at > -math.inf
        for number in (self._server_rows < 0).nonzero()[0].tolist():
            address = addresses[number]
            row = self._registry.known_address(address)
            if row < 0 and (not polled or now - self._unlisted_since.setdefault(address, now) > UNLISTED_GRACE):
                row = self._registry.address_row(address, now)
            self._server_rows[number] = row
        at = experts[:, telemetry.SERVER].astype(np.int64) - 1  # telemetry's servers; -1: beyond its limit
        self._registry.called(self._expert_rows, np.append(self._server_rows, -1)[at])

    def _take_steps(self, now: float) -> None:
        """Add the steps since the last scene, and the number of calls in flight, to the bins."""
        steps = self._telemetry.steps
        while steps:
            step = steps.popleft()
            self._advance(step.at)
            bin = self._steps.current
            bin[series.LOSS_SUM] += step.loss
            bin[series.STEPS] += 1
            bin[series.SAMPLES] += step.samples
            self._samples += step.samples
        self._advance(now)
        self._in_flight_at, self._in_flight_seen = now, self._in_flight()
        self._steps.current[series.IN_FLIGHT_SUM] += self._in_flight_seen
        self._steps.current[series.IN_FLIGHT_LOOKS] += 1

    def _advance(self, at: float) -> None:
        """Advance to the bin of a time. Bins on the way get the last number of calls in flight, for a while."""
        bins = self._steps
        while bins.until <= at:
            carry = at - self._in_flight_at < IN_FLIGHT_MAX_AGE
            bins.advance(bins.until + 1e-6 if carry else at + 1e-6)
            if carry:
                bins.current[series.IN_FLIGHT_SUM] += self._in_flight_seen
                bins.current[series.IN_FLIGHT_LOOKS] += 1

    # ------------------------------------------------------------ tables

    def _experts(self, counted: Doubles, states: Ints, own: bool, now: float) -> Experts:
        registry, reported = self._registry, self._reports
        count, here = len(registry.uids), self._expert_rows >= 0
        at = self._expert_rows[here]

        def spread(values: Doubles, fill: float) -> Doubles:  # [experts in telemetry] -> [N]
            column = np.full(count, fill)
            column[at] = values[here]
            return column

        calls, failed = spread(counted[:, telemetry.CALLS], 0), spread(counted[:, telemetry.FAILED], 0)
        updates = np.fmax(spread(counted[:, telemetry.UPDATES], 0), reported.updates)
        stale = self._stalenesses.take(counted[:, STALENESS_COLUMNS], counted[:, telemetry.STALENESS_COUNT], now)
        rates = self._expert_rates.take(counted[:, [telemetry.ROWS, telemetry.CALLS, telemetry.FAILED]], now)
        slow = self._latencies.take(counted[:, [telemetry.SECONDS, telemetry.CALLS]], counted[:, telemetry.CALLS], now)
        if own:
            load = spread(rates[:, 0], 0)
            latency = spread(ratio(slow[:, 0], slow[:, 1]), np.nan)
        else:
            load = np.where(np.isnan(reported.counts[:, ROWS]), np.nan, reported.rates[:, ROWS])
            latency = ratio(reported.recent[:, SECONDS], reported.recent[:, REQUESTS])
            calls = np.nan_to_num(reported.counts[:, REQUESTS])
        attempts = rates[:, 1] + rates[:, 2]
        failures = np.where(attempts > 0, np.divide(rates[:, 2], attempts, where=attempts > 0, out=attempts * 0), 0)
        return Experts(
            uids=registry.uids,
            layer=registry.layer,
            cell=registry.cell,
            server=registry.server.copy(),
            state=states,
            load=load.astype(np.float32),
            latency=(1000 * latency).astype(np.float32),
            failures=spread(failures, np.nan).astype(np.float32),
            staleness=spread(ratio(stale[:, 0], stale[:, 1]), np.nan).astype(np.float32),
            calls=calls.astype(np.int64),
            failed=failed.astype(np.int64),
            updates=updates.astype(np.int64),
            adopted=reported.adopted & (states != State.DEAD),
        )

    def _servers(self, counted: Doubles, own: bool, now: float) -> tuple[Servers, Ints, float]:
        """Returns the table of servers, the states of the experts, and the calls/s of all servers together."""
        registry, reported = self._registry, self._reports
        count, here = len(registry.labels), self._server_rows[: len(counted)] >= 0
        at, counted_here = self._server_rows[: len(counted)][here], counted[here]
        one_address_each = bool((np.bincount(at, minlength=1) <= 1).all())

        def gather(values: Doubles) -> Doubles:  # [T, …] -> [S, …]: one server may have had several addresses
            column = np.zeros((count, *values.shape[1:]))
            if one_address_each:
                column[at] = values
            else:
                np.add.at(column, at, values)
            return column

        reported_at = pad_rows(reported.heard_at, count, np.nan)
        answered = np.full(count, np.nan)
        np.fmax.at(answered, at, np.where(counted_here[:, telemetry.LAST_ANSWER] > 0,
                                          counted_here[:, telemetry.LAST_ANSWER], np.nan))  # fmt: skip
        heard_at = np.fmax(answered, reported_at)
        expert_states, states, words = registry.states(heard_at, now)
        their = registry.server[registry.server >= 0]
        alive = registry.server[(registry.server >= 0) & (expert_states == State.ALIVE)]

        all_times = counted[:, telemetry.TIMES :]
        answers = all_times[:, :BUCKETS].sum(axis=1)
        rates = self._server_rates.take(answers[:, None], now)
        calls = gather(rates[here, 0]) if own else self._calls_reported(count)
        if now - self._times_at >= HISTOGRAM_PERIOD or len(self._percentiles) != count:
            self._times_at = now
            times = np.zeros((count, len(SPLIT), BUCKETS))
            if own:
                times[:] = gather(self._times.take(all_times, answers, now)[here]).reshape(times.shape)
            else:  # the network's part is not known
                times[:, :3] = pad_rows(reported.times, count).reshape(count, 3, BUCKETS)
            self._percentiles = percentiles(times, PERCENTILES)
        fresh = now - reported_at < GAUGE_MAX_AGE
        copies = pad_rows(reported.copies, count, np.nan)
        injected = np.where(np.isnan(registry.injected), pad_rows(reported.injected, count, np.nan), registry.injected)
        servers = Servers(
            labels=tuple(registry.labels),
            addresses=tuple(registry.addresses),
            words=words,
            local=registry.local.copy(),
            state=states,
            heard=np.maximum(now - heard_at, 0).astype(np.float32),
            experts=np.bincount(their, minlength=count),
            alive=np.bincount(alive, minlength=count),
            calls=calls.astype(np.float32),
            queue=np.where(fresh, pad_rows(reported.queue, count, np.nan), np.nan).astype(np.float32),
            latency=self._percentiles,
            failed=gather(counted_here[:, telemetry.CAUSE : telemetry.TIMES]).astype(np.int64),
            injected=injected.astype(np.float32),
            copies=np.where(fresh, copies[:, 0], np.nan).astype(np.float32),
            adopted=np.where(fresh, copies[:, 1], np.nan).astype(np.float32),
        )
        return servers, expert_states, float(np.nansum(calls))

    def _calls_reported(self, count: int) -> Doubles:
        server, rates = self._registry.server, self._reports.rates[:, REQUESTS]
        calls = np.bincount(server[server >= 0], weights=rates[server >= 0], minlength=count)
        return np.where(np.isnan(pad_rows(self._reports.heard_at, count, np.nan)), np.nan, calls)

    def _series(self, own: bool, now: float) -> Series:
        found = series_of(self._telemetry.bins, self._steps, now)
        if not own:  # this process made no calls
            unknown = ("calls", "bytes", *CAUSES, *(() if self._samples else ("samples",)))
            found.values[:, [SERIES.index(name) for name in unknown]] = np.nan
        return found

    def _label_of(self, address: str) -> str:
        row = self._registry.known_address(address)
        return self._registry.labels[row] if row >= 0 else address

    def _server_of(self, uid: str) -> str:
        row = self._registry.known_server(uid)
        return self._registry.labels[row] if row >= 0 else ""

    # ------------------------------------------------------------ the headline

    def _headline(
        self, totals: Doubles, experts: Experts, servers: Servers, reported_calls: float, copies: CopySummary | None,
        own: bool, now: float,
    ) -> Headline:  # fmt: skip
        counts = np.append(totals[list(TOTAL_COLUMNS)], self._samples)
        rates = self._total_rates.take(counts[None], now)[0]
        stales = totals[None, [series.STALENESS_SUM, series.STALENESS_COUNT]]
        stale = self._staleness.take(stales, stales[:, 1], now)[0]
        run = self._run()
        running = run is not None and run.running
        if run is not None:
            self._last_run = run.steps, run.total_steps, run.loss
            self._run_at = now if running else self._run_at
        steps, total_steps, loss = self._last_run
        logged, logging = self._telemetry.logged_step, False
        if logged is not None and not running and logged[2] > self._run_at:  # a loop of one's own
            (steps, loss, logged_at), total_steps = logged, 0
            logging = now - logged_at < LOGGING_MAX_AGE
        failed = {cause: int(n) for cause, n in zip(CAUSES, totals[series.FAILED :], strict=True) if n}
        return Headline(
            running=running,
            steps=steps,
            total_steps=total_steps,
            loss=loss,
            samples=float(rates[-1]) if self._samples else math.nan,
            calls=float(rates[0]) if own else reported_calls,
            bytes=float(rates[1]) if own else math.nan,
            in_flight=self._in_flight_seen,
            staleness=float(stale[0] / stale[1]) if stale[1] else math.nan,
            experts=len(experts.uids),
            experts_alive=int((experts.state == State.ALIVE).sum()),
            servers=len(servers.labels),
            servers_alive=int((servers.state == State.ALIVE).sum()),
            answered=int(totals[series.CALLS]) if own else int(experts.calls.sum()),
            failed=failed,
            unanswered_rows=self._telemetry.unanswered_rows,
            logging=logging,
            at_risk=math.nan if copies is None else copies.at_risk,
            taken_over=self._telemetry.taken_over,
            updates_lost=self._telemetry.updates_lost,
        )


def _said_of_copies(inventory: Inventory) -> Iterator[CopyStatistics | None]:
    """What servers that are there say of copies."""
    ended = {local.address for local in inventory.locals if local.word != "running"}
    for address, (statistics, _) in inventory.statistics.items():
        if address not in ended and address not in inventory.failures:
            yield statistics.copies
