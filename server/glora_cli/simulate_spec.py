"""What `glora simulate` is asked to do, as sim.toml says it; the sections that runs have too are the runs' own."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

from pydantic import Field

from glora_server.coordinator.policy_table import MAX_ROUNDS
from glora_server.coordinator.run_sections import (
    MAX_RANK,
    LimitsSpec,
    LoraSpec,
    ModelSpec,
    Section,
    StrategySpec,
    TrainingSpec,
    WireSpec,
)
from glora_server.coordinator.run_spec import RunSpec, parse_toml
from glora_server.rounds.policy import RoundPolicy, Sampling
from glora_server.validation_text import Location, Problem, raise_complete, raise_problems, shown

DEMO_MODEL: Final = "demo"
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Readout = Literal["balanced", "a_orthonormal"]


class SimulatedModel(Section):
    """What is adapted; classes come from the data."""

    path: str = Field(
        default=DEMO_MODEL,
        min_length=1,
        max_length=4096,
        description='Folder or hub name of the base model, or "demo" for the encoder that glora[demo] brings.',
    )
    target_modules: tuple[str, ...] = Field(
        default=("query", "value"), min_length=1, max_length=1000, description="Last names of the modules to adapt."
    )
    layers: tuple[Annotated[int, Field(ge=0, le=100_000)], ...] = Field(
        default=(), max_length=10_000, description="Numbers of the layers to adapt, from 0; empty = all."
    )

    def model_post_init(self, _context: object, /) -> None:
        """Check what every run would refuse."""
        lists: dict[str, tuple[object, ...]] = {"target_modules": self.target_modules, "layers": self.layers}
        twice = ((key, items) for key, items in lists.items() if len(set(items)) < len(items))
        raise_problems("model", (((key,), "must not name anything twice", items) for key, items in twice))


class DataSection(Section):
    """Where the rows are and how they are dealt to the devices."""

    kind: Literal["jsonl"] = Field(default="jsonl", description='Format of the files: "jsonl", one object a line.')
    train: str = Field(min_length=1, description="Rows to train on; a path under the folder given with --data.")
    held_out: str = Field(min_length=1, description="Rows to measure on; a path under the folder given with --data.")
    text: str = Field(default="text", min_length=1, description="Key of the text.")
    text_b: str = Field(default="text_b", min_length=1, description="Key of a pair's second text, where rows have one.")
    label: str = Field(default="label_name", min_length=1, description="Key of the class.")
    train_rows: int = Field(default=0, ge=0, description="How many rows to train on, drawn once; 0 = all.")
    held_out_rows: int = Field(default=500, ge=0, description="How many rows to measure on, drawn once; 0 = all.")
    split: Literal["dirichlet", "iid"] = Field(
        default="dirichlet", description='"dirichlet": each class in shares of its own; "iid": at random, equally many.'
    )
    alpha: float = Field(default=0.5, gt=0, le=1e6, description="Concentration of dirichlet; small = very different.")
    min_rows: int = Field(default=16, ge=1, description="Fewest rows of a device; the richest give some away.")


class DevicesSection(Section):
    """The virtual devices."""

    count: int = Field(default=8, ge=1, le=100_000, description="How many devices there are.")
    ranks: tuple[_Rank, ...] = Field(
        default=(2, 4, 8, 16), min_length=1, max_length=100_000, description="Their ranks, repeated in turn."
    )
    rank_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(),
        max_length=100_000,
        description="Odds of each of `ranks`: every device draws its rank (by seed) instead of taking turns.",
    )
    participation: float = Field(default=1.0, gt=0, le=1, description="Share of the devices in each round.")
    sampling: Sampling = Field(
        default=Sampling.UNIFORM, description='How they are drawn: "uniform", "weighted" (by rows) or "rank".'
    )


class MeasuringSection(Section):
    """What is measured on the held-out rows, and how often."""

    every: int = Field(default=1, ge=1, description="Measure at the server's rank after every so many rounds.")
    ranks_every: int = Field(
        default=0, ge=0, description="Measure at all ranks after every so many rounds; 0 = after the last one only."
    )
    ranks: tuple[_Rank, ...] = Field(
        default=(),
        max_length=64,
        description="Ranks to read out, of each strategy those up to its R; the devices' own are always among them.",
    )
    batch_size: int = Field(default=128, ge=1, le=65_536, description="Rows at a time.")


class StrategyEntry(StrategySpec):
    """A strategy to simulate, and what it has otherwise than the rest."""

    label: str = Field(default="", max_length=64, description="What tables and plots call it; empty = its name.")
    ranks: tuple[_Rank, ...] = Field(
        default=(), max_length=100_000, description="Ranks of the devices, for strategies that need one for all."
    )
    max_rank: _Rank | None = Field(default=None, description="The server's rank R.")
    readout: _Readout | None = Field(default=None, description="How factors are handed out.")
    learning_rate: float | None = Field(default=None, gt=0, le=10, description="Peak learning rate.")

    @property
    def title(self) -> str:
        """What tables, plots and results call it."""
        return self.label or self.name


class SimSpec(Section):
    """A simulation: every strategy with every seed, all else the same."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Its name.")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        default=(0, 1, 2), min_length=1, max_length=1000, description="Each repeats everything with other draws."
    )
    rounds: int = Field(default=10, ge=1, le=MAX_ROUNDS, description="Rounds of every run.")
    model: SimulatedModel = Field(default_factory=SimulatedModel)
    data: DataSection
    devices: DevicesSection = Field(default_factory=DevicesSection)
    lora: LoraSpec = Field(default_factory=LoraSpec)
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    wire: WireSpec = Field(default_factory=WireSpec)
    limits: LimitsSpec = Field(default_factory=LimitsSpec)
    measuring: MeasuringSection = Field(default_factory=MeasuringSection)
    strategies: tuple[StrategyEntry, ...] = Field(min_length=1, max_length=1000)

    def model_post_init(self, _context: object, /) -> None:
        """Check what no single section shows, also that every strategy can be simulated as it is described."""
        found: list[Problem] = []
        if len(set(self.seeds)) < len(self.seeds):
            found.append(_wrong(("seeds",), "must not name anything twice", self.seeds))
        weights = self.devices.rank_weights
        if weights and (len(weights) != len(self.devices.ranks) or sum(weights) <= 0):
            sentence = "must be one number for each of ranks, not all 0"
            found.append(_wrong(("devices", "rank_weights"), sentence, weights))
        seen: set[str] = set()
        for index, entry in enumerate(self.strategies):
            if entry.title in seen:
                sentence = "must have a label that no other strategy has"
                found.append(_wrong(("strategies", index), sentence, entry.title))
            seen.add(entry.title)
            found += [problem for problem in _problems(self, entry, index) if problem not in found]
        found += _unmeasured_ranks(self)
        if found:
            raise_complete("simulation", found)

    def ranks_of(self, entry: StrategyEntry) -> tuple[int, ...]:
        """The ranks that devices can have under this strategy, rising."""
        return tuple(sorted(set(entry.ranks or self.devices.ranks)))

    def server_rank(self, entry: StrategyEntry) -> int:
        """R under this strategy."""
        return entry.max_rank or self.lora.max_rank

    def measured_ranks(self, entry: StrategyEntry) -> tuple[int, ...]:
        """The ranks that are read out and measured after the last round, rising."""
        top = self.server_rank(entry)
        return tuple(sorted({top, *self.ranks_of(entry), *(r for r in self.measuring.ranks if r <= top)}))

    def run_spec(self, entry: StrategyEntry, *, seed: int, labels: tuple[str, ...]) -> RunSpec:
        """The run that a server would be given for this strategy and seed."""
        wanted = math.ceil(self.devices.participation * self.devices.count - 1e-9)
        lora = {"max_rank": self.server_rank(entry), "readout": entry.readout or self.lora.readout}
        rate = entry.learning_rate or self.training.learning_rate
        return RunSpec(
            name=self.name,
            seed=seed,
            model=ModelSpec(
                path=self.model.path,
                labels=labels,
                target_modules=self.model.target_modules,
                layers=self.model.layers,
            ),
            lora=self.lora.model_copy(update=lora),
            strategy=StrategySpec(name=entry.name, options=entry.options),
            training=self.training.model_copy(update={"learning_rate": rate}),
            policy=RoundPolicy(rounds=self.rounds, target_devices=wanted, sampling=self.devices.sampling),
            wire=self.wire,
            limits=self.limits,
        )


def parse_sim_toml(text: str, source: str = "sim.toml") -> SimSpec:
    """The simulation that a TOML document describes; raises SPEC_INVALID with a line for every problem."""
    return parse_toml(text, SimSpec, source)


def _problems(spec: SimSpec, entry: StrategyEntry, index: int) -> list[Problem]:
    """All that makes a strategy impossible here."""
    from glora_server.aggregation import AggregationError, TrainMask, UploadSet, check_options, find_strategy

    ranks, place = spec.ranks_of(entry), ("strategies", index)
    if ranks[-1] > spec.server_rank(entry):
        return [_rank_above(spec, entry, index)]
    try:
        strategy = find_strategy(entry.name)
    except AggregationError as error:
        return [_wrong((*place, "name"), _clause(error), entry.name)]
    if len(ranks) > 1 and not strategy.properties.mixed_ranks:
        return [_mixed_ranks(spec, entry, index)]
    try:
        options = check_options(entry.name, entry.options)
        contract = strategy.contract(options)
        strategy.check_plan(ranks, options)
    except AggregationError as error:
        return [_wrong((*place, "options"), _clause(error), entry.options)]
    if contract.train is TrainMask.CORE or contract.upload is UploadSet.CORE:
        sentence = "cannot be simulated: devices would train an r×r core, which adapters here lack"
        return [_wrong((*place, "name"), sentence, entry.name)]
    return []


def _rank_above(spec: SimSpec, entry: StrategyEntry, index: int) -> Problem:
    """Told where the rank or R was written that does not fit."""
    largest, top = spec.ranks_of(entry)[-1], spec.server_rank(entry)
    if entry.ranks:
        return _wrong(("strategies", index, "ranks"), f"must not be above the server's rank ({top})", largest)
    if entry.max_rank is not None:
        sentence = f"must not be below the largest rank of the devices ({largest})"
        return _wrong(("strategies", index, "max_rank"), sentence, top)
    sentence = f"must not be above the server's rank, lora.max_rank = {top}"
    return _wrong(("devices", "ranks"), sentence, spec.devices.ranks)


def _mixed_ranks(spec: SimSpec, entry: StrategyEntry, index: int) -> Problem:
    if entry.ranks:
        sentence = f"must be one rank, for {entry.name} needs devices of equal ranks"
        return _wrong(("strategies", index, "ranks"), sentence, entry.ranks)
    ranks = spec.ranks_of(entry)
    return Problem(
        location=("strategies", index, "name"),
        text=f"{entry.name} needs devices of equal ranks, and these have {', '.join(map(str, ranks))}; give it `ranks` "
        f"of its own, such as ranks = [{ranks[0]}]",
    )


def _unmeasured_ranks(spec: SimSpec) -> list[Problem]:
    """Ranks to read out that no strategy has."""
    top = max(map(spec.server_rank, spec.strategies))
    sentence = f"must not be above the server's rank ({top}, the largest of the strategies)"
    ranks = enumerate(spec.measuring.ranks)
    return [_wrong(("measuring", "ranks", index), sentence, rank) for index, rank in ranks if rank > top]


def _wrong(location: Location, text: str, value: object) -> Problem:
    return Problem(location=location, text=f"{text} (you wrote {shown(value)})")


def _clause(error: Exception) -> str:
    return str(error).rstrip(".")
