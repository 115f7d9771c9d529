"""One strategy with one seed, from the first round to the last: plan, train, judge, fold, measure."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from glora_cli.simulate_data import Corpus, deal, device_ranks
from glora_cli.simulate_devices import Bench, Score
from glora_cli.simulate_means import consensus_of, mean, mean_list, mean_of
from glora_cli.simulate_results import Result
from glora_cli.simulate_server import Folded, SimulatedServer, Upload
from glora_cli.simulate_spec import SimSpec, StrategyEntry
from glora_client.data import ClassificationRow
from glora_client.plan import AdapterUse, DeliveredAdapter
from glora_server.aggregation import STRATEGIES
from glora_server.coordinator.opening import seed_of
from glora_server.coordinator.run_spec import RunSpec
from glora_server.rounds.ids import DeviceId
from glora_server.rounds.plan import Candidate, Pick, Waiting, rank_for, staff
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest

_NEVER_THE_SERVER = frozenset({Reason.TRAINING_DIVERGED, Reason.TRAINING_FAILED})
"""Ways to fail that a device of a real run would report, and the round would go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every run of a simulation shares."""

    spec: SimSpec
    manifest: Manifest
    corpus: Corpus
    digests: Mapping[str, str]


@dataclass(slots=True, kw_only=True)
class _Round:
    """What is counted while a round goes on."""

    uploads: list[Upload] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failed: int = 0
    rejected: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


def simulate_pair(setting: Setting, bench: Bench, entry: StrategyEntry, seed: int) -> tuple[Result, ...]:
    """All results of a strategy with a seed; the same numbers each time, only the seconds differ."""
    with _folder() as folder:
        run = _Run(setting, bench, entry, seed, folder)
        return tuple(row for number in range(1, setting.spec.rounds + 1) for row in run.round(number))


class _Run:
    """A federation of virtual devices with one server."""

    def __init__(self, setting: Setting, bench: Bench, entry: StrategyEntry, seed: int, folder: Path) -> None:
        spec = setting.spec
        self._setting = setting
        self._bench = bench
        self._entry = entry
        self._seed = seed
        self._folder = folder
        self._spec: RunSpec = spec.run_spec(entry, seed=seed, labels=setting.corpus.labels)
        self._server = SimulatedServer(self._spec, setting.manifest, folder)
        rows = deal(setting.corpus.train, spec.data, spec.devices.count, seed=seed)
        ranks = device_ranks(spec.devices, entry.ranks or spec.devices.ranks, seed=seed)
        self._rows: dict[DeviceId, tuple[ClassificationRow, ...]] = {}
        self._candidates: list[Candidate] = []
        for number, (ours, rank) in enumerate(zip(rows, ranks, strict=True)):
            device = DeviceId(f"device-{number:05d}")
            self._rows[device] = ours
            self._candidates.append(_candidate(device, rank, len(ours), setting.manifest))
        self._own: dict[DeviceId, Path] = {}
        """The last adapter of each device, for strategies whose devices keep their B."""

    def round(self, number: int) -> Iterator[Result]:
        """Hold the round and yield its rows."""
        begun = time.perf_counter()
        counted = _Round()
        picks = self._plan(number)
        for pick in picks:
            self._work(pick, number, counted, total=sum(p.rank for p in picks))
        folded: Folded | None = None
        if counted.uploads:
            folded = self._server.fold(counted.uploads)
        else:
            self._server.skip()
        scores: dict[int, Score | None] = {rank: self._measure(rank) for rank in self._ranks_to_measure(number)}
        for upload in counted.uploads:
            if upload.path not in self._own.values():
                upload.path.unlink(missing_ok=True)
        for rank, score in (scores or {self._spec.lora.max_rank: None}).items():
            yield self._row(number, rank, score, counted, folded, seconds=time.perf_counter() - begun)

    def _plan(self, number: int) -> tuple[Pick, ...]:
        """The devices of the round, as the service draws them; the same for every strategy."""
        seed = seed_of(self._seed, "staff", number)
        staffing = staff(self._candidates, self._spec.policy, max_rank=self._spec.lora.max_rank, seed=seed)
        if isinstance(staffing, Waiting):
            raise GloraError(Reason.INTERNAL, f"Round {number} cannot open: {staffing.message}")
        return tuple(sorted(staffing.picks, key=lambda pick: pick.device_id))

    def _work(self, pick: Pick, number: int, counted: _Round, *, total: int) -> None:
        """One device's part: it trains what it is offered, and the server judges what comes back."""
        wanted = self._server.contract()
        rows = self._rows[pick.device_id]
        adapters = self._server.offer(pick.rank)
        if wanted.keeps_b and pick.device_id in self._own:
            adapters = (self._server.personal(pick.rank, self._own[pick.device_id], AdapterUse.TRAIN), *adapters[1:])
        out = self._folder / f"{pick.device_id}-{number}.safetensors"
        counted.bytes_down += self._bytes(pick.rank, total, down=True) + self._frozen_bytes(adapters)
        try:
            # The same batches for a device and a round under every strategy: comparisons are paired.
            seed = seed_of(self._seed, "batches", pick.device_id, number)
            report = self._bench.train(
                rows, adapters, self._spec, rank=pick.rank, mask=wanted.train, seed=seed, out=out
            )
        except GloraError as error:
            if error.reason not in _NEVER_THE_SERVER:
                raise
            counted.failed += 1
            return
        counted.bytes_up += self._bytes(pick.rank, total, down=False)
        upload = Upload(
            device_id=pick.device_id, path=out, config_json=adapters[0].config_json, rank=pick.rank, rows=len(rows)
        )
        if self._server.judge(upload) is not None:
            counted.rejected += 1
            out.unlink()
            return
        counted.losses.append(report.loss)
        counted.uploads.append(upload)
        if wanted.keeps_b:
            if pick.device_id in self._own:
                self._own[pick.device_id].unlink(missing_ok=True)
            self._own[pick.device_id] = out

    def _ranks_to_measure(self, number: int) -> tuple[int, ...]:
        measuring, last = self._setting.spec.measuring, number == self._setting.spec.rounds
        if last or (measuring.ranks_every and number % measuring.ranks_every == 0):
            return self._setting.spec.measured_ranks(self._entry)
        return (self._spec.lora.max_rank,) if number % measuring.every == 0 else ()

    def _measure(self, rank: int) -> Score:
        """The model of that rank; where devices keep their B, the mean over the models of those that have one."""
        if not self._own:
            return self._bench.measure(self._server.exhibit(rank), self._spec)
        scores = [
            self._bench.measure([self._server.personal(self._rank(device), own, AdapterUse.EVALUATE)], self._spec)
            for device, own in self._own.items()
        ]
        return Score(loss=fmean(s.loss for s in scores), accuracy=fmean(s.accuracy for s in scores))

    def _rank(self, device: DeviceId) -> int:
        found = next(c for c in self._candidates if c.device_id == device)
        return rank_for(found, self._spec.lora.max_rank)

    def _bytes(self, rank: int, total: int, *, down: bool) -> int:
        """What the method moves for one device; `total` is Σr of the round."""
        properties = STRATEGIES[self._spec.strategy.name].properties
        volume = properties.down if down else properties.up
        top = self._spec.lora.max_rank
        numbers = sum(
            volume.count(d=m.out_features, n=m.in_features, r=rank, total=total, server=top)
            for m in self._setting.manifest.modules
        )
        numbers += sum(math.prod(dense.shape) for dense in self._setting.manifest.dense)
        return numbers * self._spec.wire.dtype.bytes

    def _frozen_bytes(self, adapters: Sequence[DeliveredAdapter]) -> int:
        ranks = sum(adapter.rank for adapter in adapters if adapter.use is AdapterUse.FROZEN)
        sides = sum(m.out_features + m.in_features for m in self._setting.manifest.modules)
        return ranks * sides * self._spec.wire.dtype.bytes

    def _row(
        self, number: int, rank: int, score: Score | None, counted: _Round, folded: Folded | None, *, seconds: float
    ) -> Result:
        modules = () if folded is None else folded.modules
        return Result(
            settings=self._setting.digests[self._entry.title],
            strategy=self._entry.title,
            seed=self._seed,
            round=number,
            rank=rank,
            server_rank=self._spec.lora.max_rank,
            devices=sum(rank_for(c, self._spec.lora.max_rank) == rank for c in self._candidates),
            accuracy=None if score is None else score.accuracy,
            loss=None if score is None else _finite(score.loss),
            training_loss=mean(counted.losses),
            truncation_error=mean_of(modules, "truncation_error"),
            aggregation_bias=mean_of(modules, "aggregation_bias"),
            captured_energy=mean_of(modules, "captured_energy"),
            eigengap=mean_of(modules, "eigengap"),
            mean_norm=mean_of(modules, "mean_norm"),
            sigma=mean_list(modules, "sigma"),
            coverage=mean_list(modules, "coverage"),
            updates=len(counted.uploads),
            failed=counted.failed,
            rejected=counted.rejected,
            bytes_up=counted.bytes_up,
            bytes_down=counted.bytes_down,
            seconds=round(seconds, 3),
            aggregation_seconds=0.0 if folded is None else round(folded.seconds, 3),
            consensus=consensus_of(modules) if rank == self._spec.lora.max_rank else None,
        )


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="glora-simulate-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _candidate(device: DeviceId, rank: int, rows: int, manifest: Manifest) -> Candidate:
    return Candidate(
        device_id=device,
        granted_rank=rank,
        declared_rank=rank,
        fingerprint=manifest.base_model_fingerprint,
        task=manifest.task,
        run_name="",
        tags=frozenset(),
        training_rows=rows,
        evaluation_rows=0,
        trains=True,
        evaluates=False,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
