"""Aggregation of one module and of a whole 8B adapter: ours, what others do, and the limits of this machine.

    python bench/aggregation.py [--quick] [--json]

One thread, CPU seconds (`time.process_time`), the best of a few runs. Two kinds of uploads: `random` (independent
Gaussian factors: a flat spectrum, the worst case for any iteration) and `shared` (a common space plus a private part
a quarter of its size, nearer to what devices that learn one task send). The rule is `replace` unless a row says
`delta`, where all devices start from one readout of rank 16 of a state of rank 32 and move it by a tenth.

`floor`: three products of K with R + 16 columns and one projection, 12·d·Σr·(R + 16) + 2(d + n)·Σr·R flops, at the
measured speed of sgemm. `objective`: tr(UᵀKU) over the largest of the size (that of `exact`, which is float64, or of
K + eigh where `exact` is skipped); for methods without a U it is left out. `extra`: peak resident memory of one call
beyond what was resident before it, see `extra_memory`. `no report`: the same round without its diagnostics.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from glora_server.aggregation import (
    AggregationResult,
    ClientUpdate,
    LayerState,
    aggregate,
    aggregate_many,
    canonical_state,
    readout,
)
from glora_server.aggregation.fast import probes, survey
from glora_server.aggregation.product import times_transposed
from glora_server.aggregation.strategies import glora as strategy

RANK, SERVER_RANK = 16, 32
LIMIT_SECONDS = 60.0
ADAPTER_8B = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one size; seconds None: skipped, for the reason in `note`."""

    size: str
    method: str
    seconds: float | None
    floor: float
    objective: float | None = None
    extra_mb: float | None = None
    note: str = ""


def uploads(d: int, n: int, count: int, kind: str, seed: int = 0) -> list[ClientUpdate]:
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(d, RANK, generator=g)
    updates = []
    for _ in range(count):
        own = torch.randn(d, RANK, generator=g)
        b = own if kind == "random" else 0.8 * common @ torch.randn(RANK, RANK, generator=g) / RANK**0.5 + 0.2 * own
        updates.append(ClientUpdate(b, torch.randn(RANK, n, generator=g), 1.0, 1.0))
    return updates


def nudged(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """The next round: every factor moved by a tenth."""
    g = torch.Generator().manual_seed(99)
    return [
        ClientUpdate(
            u.b + 0.1 * torch.randn(u.b.shape, generator=g), u.a + 0.1 * torch.randn(u.a.shape, generator=g), 1.0, 1.0
        )
        for u in updates
    ]


def cpu_seconds(work: Callable[[], object], *, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def extra_memory(d: int, count: int, kind: str) -> float | None:
    """Peak resident MB of one fast round beyond its inputs, in a process of its own; None where the system is silent.

    What `malloc` and the libraries keep of earlier calls would be counted, or not, by chance: so all larger blocks go
    back to the system at once, and it is the second call of its size that is measured.
    """
    call = [sys.executable, __file__, "--memory-of", f"{d},{count},{kind}"]
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = subprocess.run(call, check=True, capture_output=True, text=True, env=given).stdout.strip()
    return float(found) if found else None


def print_memory(d: int, count: int, kind: str) -> None:
    """The body of the process that `extra_memory` starts."""
    updates = uploads(d, d, count, kind)
    glora(None, updates, "fast")
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    ctypes.CDLL(None).malloc_trim(0)
    try:
        reset.write_text("5")
    except OSError:
        return
    before = _status_mb(status, "VmRSS")
    glora(None, updates, "fast")
    print(_status_mb(status, "VmHWM") - before)


def _status_mb(status: Path, key: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def limits() -> tuple[float, float, float]:
    """GFLOP/s of sgemm (the quicker of MKL and oneDNN) and of bfloat16, GB/s of reading memory, one thread."""
    x = torch.randn(2048, 2048)
    low, long = x.bfloat16(), torch.ones(1 << 26)
    flops = 2 * 2048**3 / 1e9
    return (
        flops / min(cpu_seconds(lambda: x @ x, repeats=5), cpu_seconds(lambda: times_transposed(x, x), repeats=5)),
        flops / cpu_seconds(lambda: low @ low, repeats=5),
        long.numel() * 4 / 1e9 / cpu_seconds(long.sum, repeats=5),
    )


def floor_seconds(d: int, n: int, count: int, sgemm: float) -> float:
    total = count * RANK
    return (12 * d * total * (SERVER_RANK + 16) + 2 * (d + n) * total * SERVER_RANK) / 1e9 / sgemm


def objective(u: Tensor, updates: Sequence[ClientUpdate]) -> float:
    """tr(UᵀKU) of the projector subspace, float64."""
    wide, total = u.double(), 0.0
    for update in updates:
        b = update.b.double()
        onto = wide.mT @ b
        total += float((torch.linalg.solve(b.mT @ b, onto.mT) * onto.mT).sum()) / len(updates)
    return total


def k_and_eigh(updates: Sequence[ClientUpdate]) -> Tensor:
    """The published round taken literally: U_i by QR, K as a d×d matrix, its eigenvectors; float32."""
    z = torch.cat([torch.linalg.qr(update.b).Q for update in updates], dim=1) / len(updates) ** 0.5
    u: Tensor = torch.linalg.eigh(z @ z.mT).eigenvectors[:, -SERVER_RANK:]
    sum((u.mT @ update.b) @ update.a for update in updates)
    return u


def dense_mean(updates: Sequence[ClientUpdate]) -> Tensor:
    left = torch.cat([update.b for update in updates], dim=1) / len(updates)
    mean: Tensor = left @ torch.cat([update.a for update in updates])
    return mean


def fedit(updates: Sequence[ClientUpdate]) -> tuple[Tensor, Tensor]:
    """The two averages and nothing else."""
    b, a = torch.zeros_like(updates[0].b), torch.zeros_like(updates[0].a)
    for update in updates:
        b.add_(update.b, alpha=1 / len(updates))
        a.add_(update.a, alpha=1 / len(updates))
    return b, a


def glora(state: LayerState | None, updates: Sequence[ClientUpdate], accuracy: str) -> LayerState:
    return aggregate("glora", state, updates, rank=SERVER_RANK, rule="replace", accuracy=accuracy).state


def without_report(state: LayerState | None, updates: Sequence[ClientUpdate]) -> None:
    """A fast round without probes and without diagnostics."""

    def nothing(_survey: object, modules: Sequence[object], _states: object, *, rank: int) -> list[int]:
        return [rank] * len(modules)

    with patch.object(probes, "PROBES", 0), patch.object(survey.Survey, "diagnostics", nothing):
        glora(state, updates, "fast")


def exact_rows(d: int, count: int, updates: Sequence[ClientUpdate], floor: float) -> list[Row]:
    """`exact` under `replace` and under `delta`, and the share of its report."""
    size, repeats = f"d={d} N={count} random", 3 if exact_estimate(d, count) < 1 else 1
    state, moved = delta_round(d, d, count)

    def row(method: str, work: Callable[[], AggregationResult], *, share: float | None = None) -> Row:
        seconds = cpu_seconds(work, repeats=repeats)
        with patch.object(strategy, "_diagnostics", lambda *_, **__: None):
            silent = cpu_seconds(work, repeats=repeats)
        note = f"no report {silent:.4f}: it is {1 - silent / seconds:.0%}"
        return Row(size=size, method=method, seconds=seconds, floor=floor, objective=share, note=note)

    def replace() -> AggregationResult:
        return aggregate("glora", None, updates, rank=SERVER_RANK, rule="replace", accuracy="exact")

    def delta() -> AggregationResult:
        return aggregate("glora", state, moved, rank=SERVER_RANK, rule="delta", accuracy="exact")

    share = objective(replace().state.u, updates)
    return [row("glora exact", replace, share=share), row("glora exact, delta", delta)]


def delta_round(d: int, n: int, count: int) -> tuple[LayerState, list[ClientUpdate]]:
    """A state of rank R, and what devices make of its readout."""
    g = torch.Generator().manual_seed(7)
    left, right = torch.randn(d, SERVER_RANK, generator=g), 0.01 * torch.randn(SERVER_RANK, n, generator=g)
    state = canonical_state(left, right, rank=SERVER_RANK)
    sent = readout(state, RANK, 1.0)

    def moved(factor: Tensor) -> Tensor:
        return factor + 0.1 * factor.std() * torch.randn(factor.shape, generator=g)

    return state, [ClientUpdate(moved(sent[0]), moved(sent[1]), 1.0, 1.0, sent=sent) for _ in range(count)]


def exact_estimate(d: int, count: int) -> float:
    """Rough seconds of `exact`: QR of both stacks and an SVD of the smaller side, at 20 GFLOP/s."""
    q = min(d, count * RANK)
    return (4 * d * q * count * RANK + 20 * q**3) / 2e10


def fast_rows(d: int, count: int, kind: str, floor: float) -> list[Row]:
    """Our fast rounds: cold, warm and without the report, and their memory; for `shared` also the rule `delta`."""
    updates, size = uploads(d, d, count, kind), f"d={d} N={count} {kind}"
    repeats = 5 if count > 64 else 9
    cold, later = glora(None, updates, "fast"), nudged(updates)
    silent = cpu_seconds(lambda: without_report(None, updates), repeats=repeats)
    seconds = cpu_seconds(lambda: glora(None, updates, "fast"), repeats=repeats)
    warm = cpu_seconds(lambda: glora(cold, later, "fast"), repeats=repeats)
    ratio = objective(glora(cold, later, "fast").u, later) / objective(glora(None, later, "fast").u, later)
    note = f"no report {silent:.4f}: it is {1 - silent / seconds:.0%}"
    rows = [
        Row(
            size=size, method="glora fast, cold", seconds=seconds, floor=floor, objective=objective(cold.u, updates),
            extra_mb=extra_memory(d, count, kind), note=note,
        ),
        Row(size=size, method="glora fast, warm", seconds=warm, floor=floor, note=f"{ratio:.4f} of cold"),
    ]  # fmt: skip
    if kind == "shared":
        state, moved = delta_round(d, d, count)

        def delta() -> None:
            aggregate("glora", state, moved, rank=SERVER_RANK, rule="delta", accuracy="fast")

        rows.append(
            Row(size=size, method="glora fast, delta", seconds=cpu_seconds(delta, repeats=repeats), floor=floor)
        )
    return rows


def module_rows(d: int, count: int, kind: str, sgemm: float, *, quick: bool) -> list[Row]:
    size, floor = f"d={d} N={count} {kind}", floor_seconds(d, d, count, sgemm)
    rows = fast_rows(d, count, kind, floor)
    if kind == "shared":  # the others do not depend on the spectrum
        return rows
    updates = uploads(d, d, count, kind)

    def add(method: str, work: Callable[[], object], *, u: Tensor | None = None, times: int = 1) -> None:
        share = None if u is None else objective(u, updates)
        rows.append(
            Row(
                size=size, method=method, seconds=cpu_seconds(work, repeats=times), floor=floor, objective=share
            )
        )  # fmt: skip

    def skip(method: str, reason: str) -> None:
        rows.append(Row(size=size, method=method, seconds=None, floor=floor, note=reason))

    def once(method: str, work: Callable[[], Tensor]) -> None:
        found: list[Tensor] = []
        seconds = cpu_seconds(lambda: found.append(work()), repeats=1)
        rows.append(
            Row(
                size=size, method=method, seconds=seconds, floor=floor, objective=objective(found[0], updates)
            )
        )  # fmt: skip

    if exact_estimate(d, count) * (3 if quick else 1) < LIMIT_SECONDS:
        rows += exact_rows(d, count, updates, floor)
    else:
        skip("glora exact", f"would take more than {LIMIT_SECONDS:.0f} s")
    add("FedIT (two averages)", lambda: fedit(updates), times=5)
    add("strategy fedit, with report", lambda: aggregate("fedit", None, updates, rank=RANK), times=3)
    broadcast, options = aggregate("fedrot", None, updates, rank=RANK).state, {"rotation": "orthogonal"}
    add(
        "strategy fedrot (hard), with report",
        lambda: aggregate("fedrot", broadcast, updates, rank=RANK, round_index=1, **options),
        times=3,
    )
    if quick and d > 768:
        for method in ("K + eigh", "svd_lowrank of the dense mean", "FlexLoRA dense SVD"):
            skip(method, "left out by --quick")
        return rows
    once("K + eigh", lambda: k_and_eigh(updates))
    add("svd_lowrank of the dense mean", lambda: torch.svd_lowrank(dense_mean(updates), q=SERVER_RANK + 16, niter=2))
    if count == 512 and d > 768:
        skip("FlexLoRA dense SVD", "as at N=64, plus the product")
    else:
        add("FlexLoRA dense SVD", lambda: torch.linalg.svd(dense_mean(updates), full_matrices=False))
    return rows


def sampled(d: int, n: int, samples: int) -> tuple[float, float]:
    """Mean seconds of a cold and of a warm fast round at N=64."""
    updates = uploads(d, n, 64, "shared")
    later = nudged(updates)
    state = glora(None, updates, "fast")
    cold = [cpu_seconds(lambda: glora(None, updates, "fast"), repeats=1) for _ in range(samples)]
    warm = [cpu_seconds(lambda: glora(state, later, "fast"), repeats=1) for _ in range(samples)]
    return sum(cold) / samples, sum(warm) / samples


def wall_seconds(d: int, n: int, samples: int, threads: int, *, threads_a_product: int = 1) -> float:
    """Seconds by the clock for each of the modules that `threads` threads fold side by side."""
    modules = [uploads(d, n, 64, "shared", seed=seed) for seed in range(samples * threads)]

    def work(updates: Sequence[ClientUpdate]) -> None:
        glora(None, updates, "fast")

    best = float("inf")
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(threads_a_product,)) as pool:
        for _ in range(2):
            started = time.perf_counter()
            list(pool.map(work, modules))
            best = min(best, time.perf_counter() - started)
    torch.set_num_threads(1)  # what a thread of the pool sets is everybody's
    return best / len(modules)


def gpu_rows(sgemm: float) -> list[Row]:
    """A sixteenth of the 8B adapter at N=64 on the GPU, in one call and one by one; wall seconds without the copy."""
    states: list[LayerState | None] = []
    updates: list[list[ClientUpdate]] = []
    floor = 0.0
    for (d, n), count in ADAPTER_8B.items():
        for module in range(count // 16):
            own = uploads(d, n, 64, "shared", seed=module)
            updates.append([ClientUpdate(u.b.cuda(), u.a.cuda(), 1.0, 1.0) for u in own])
            states.append(None)
            floor += floor_seconds(d, n, 64, sgemm)

    def work(*, batched: bool) -> float:
        best = float("inf")
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            options = {"rule": "replace", "accuracy": "fast"}
            aggregate_many("glora", states, updates, rank=SERVER_RANK, options=options, batched=batched)
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    size = f"8B adapter N=64 shared, {len(updates)} of 224 matrices on {torch.cuda.get_device_name()}"
    return [
        Row(size=size, method=f"glora fast, {how}", seconds=work(batched=how == "batched"), floor=floor)
        for how in ("batched", "one by one")
    ]


def adapter_rows(sgemm: float, *, samples: int) -> list[Row]:
    """All 224 matrices of an 8B model's adapter at N=64, from `samples` matrices of each of its four shapes."""
    cold = warm = clock = own = floor = 0.0
    cores = len(os.sched_getaffinity(0))
    for (d, n), count in ADAPTER_8B.items():
        seconds = sampled(d, n, samples)
        cold, warm = cold + count * seconds[0], warm + count * seconds[1]
        clock += count * wall_seconds(d, n, 1, cores)
        own += count * wall_seconds(d, n, cores, 1, threads_a_product=cores)
        floor += count * floor_seconds(d, n, 64, sgemm)
    note = f"extrapolated from {samples} of each shape; sum over cores"
    size = "8B adapter N=64 shared, 224 matrices"
    return [
        Row(size=size, method="glora fast, cold", seconds=cold, floor=floor, note=note),
        Row(size=size, method="glora fast, warm", seconds=warm, floor=floor, note=note),
        Row(
            size=size, method="glora fast, cold, by the clock", seconds=clock, floor=floor,
            note=f"one module a thread on {cores} cores, extrapolated from {cores} of each shape",
        ),
        Row(
            size=size, method="the same, one after the other", seconds=own, floor=floor,
            note=f"every product on {cores} threads of the library",
        ),
    ]  # fmt: skip


def printed(rows: Sequence[Row]) -> None:
    best = {row.size: 0.0 for row in rows}
    for row in rows:
        best[row.size] = max(best[row.size], row.objective or 0.0)
    print("| size | method | CPU-s | × floor | objective | extra MB | note |\n|---|---|---|---|---|---|---|")
    for row in rows:
        seconds = "skipped" if row.seconds is None else f"{row.seconds:.4f}"
        ratio = "" if row.seconds is None else f"{row.seconds / row.floor:.2f}"
        share = "" if row.objective is None else f"{row.objective / best[row.size]:.5f}"
        extra = "" if row.extra_mb is None else f"{row.extra_mb:.0f}"
        print(f"| {row.size} | {row.method} | {seconds} | {ratio} | {share} | {extra} | {row.note} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no d×d methods at d=4096, fewer samples")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--sizes", default="768,4096", help="module sizes d, with commas")
    parser.add_argument("--clients", default="8,64,512", help="numbers of devices, with commas")
    parser.add_argument("--adapter", action=argparse.BooleanOptionalAction, default=True, help="the 8B adapter")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if arguments.memory_of:
        d, count, kind = arguments.memory_of.split(",")
        print_memory(int(d), int(count), kind)
        return
    sgemm, low, memory = limits()
    rows: list[Row] = []
    for d in map(int, arguments.sizes.split(",")):
        for count in map(int, arguments.clients.split(",")):
            for kind in ("random", "shared"):
                print(f"d={d} N={count} {kind} ...", file=sys.stderr, flush=True)
                rows += module_rows(d, count, kind, sgemm, quick=arguments.quick)
    if arguments.adapter:
        print("8B adapter ...", file=sys.stderr, flush=True)
        rows += adapter_rows(sgemm, samples=1 if arguments.quick else 3)
        if torch.cuda.is_available():
            rows += gpu_rows(sgemm)
    machine = {"sgemm_gflops": sgemm, "bfloat16_gflops": low, "memory_gb_per_second": memory}
    if arguments.json:
        print(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    print(f"One thread: sgemm {sgemm:.0f} GFLOP/s, bfloat16 {low:.0f} GFLOP/s, memory {memory:.0f} GB/s")
    print(f"Load of the machine: {' '.join(f'{value:.1f}' for value in os.getloadavg())}\n")
    printed(rows)


if __name__ == "__main__":
    main()
