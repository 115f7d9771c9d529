"""A small simulation and rows that it could have given, for the tests of its tables, plots and files."""

from __future__ import annotations

from glora_cli.simulate_results import Consensus, DeviceRecord, Result

TOML = """\
name = "tiny"
seeds = [0, 1]
rounds = 1

[model]
path = "{model}"

[data]
train = "train.jsonl"
held_out = "held_out.jsonl"
min_rows = 8

[devices]
count = 2
ranks = [1, 2]

[lora]
max_rank = 2

[training]
steps = 1
batch_size = 4
max_length = 16

[[strategies]]
name = "glora"

[[strategies]]
name = "fedit"
"""

CONSENSUS = Consensus(
    eigenvalues=(0.9, 0.4),
    mean_angle=0.1,
    largest_angle=0.2,
    devices=(DeviceRecord(device="device-00000", update_norm=1.0, cosine=0.5, capture=None),),
)


def result_row(strategy: str, seed: int, rank: int, accuracy: float | None, *, number: int = 1) -> Result:
    return Result(
        settings=strategy,
        strategy=strategy,
        seed=seed,
        round=number,
        rank=rank,
        server_rank=2,
        devices=1,
        accuracy=accuracy,
        loss=None if accuracy is None else 1 - accuracy,
        training_loss=0.5,
        truncation_error=0.25,
        captured_energy=0.9,
        eigengap=0.1,
        mean_norm=1.0,
        sigma=(1.0, 0.5),
        coverage=(1.0, 0.5),
        updates=2,
        failed=1,
        rejected=0,
        bytes_up=1024,
        bytes_down=2048,
        seconds=3.0,
        aggregation_seconds=0.1,
    )


def scored_rows() -> tuple[Result, ...]:
    """Two strategies with two seeds, measured at ranks 1 and 2 after the only round."""
    scores = {("glora", 0): (0.6, 0.8), ("glora", 1): (0.7, 0.9), ("fedit", 0): (0.4, 0.7), ("fedit", 1): (0.5, 0.6)}
    return tuple(
        result_row(name, seed, rank, pair[rank - 1]) for (name, seed), pair in scores.items() for rank in (1, 2)
    )
