"""Puts a session together from what the person asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glora_client.assignment import LocalWork
from glora_client.capabilities import profile
from glora_client.channel import Stop
from glora_client.data import rows_of
from glora_client.model_path import resolve_model
from glora_client.process import TrainerOptions
from glora_client.session import Session, SessionOptions
from glora_client.state import StateFolder, not_joined
from glora_client.view import View
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import fingerprint_folder, fingerprint_of


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """What `glora client run` was told."""

    state_dir: Path
    model: str
    data: str | None
    evaluation_data: str | None
    threads: int = 0
    run_name: str = ""
    fit: str | None = None
    quantization: str = "none"
    rank: int | None = None
    once: bool = False


def prepare(options: AgentOptions, view: View, stop: Stop) -> Session:
    """A session that is ready to run; everything that the person can mend is refused here.

    Raises GloraError: DATA_DIR_UNUSABLE, BASE_MODEL_MISSING, DATA_EMPTY, DATA_INVALID, NO_TRAINING_DATA.
    """
    if options.data is None and options.evaluation_data is None:
        raise GloraError(
            Reason.NO_TRAINING_DATA, "There is nothing to work with: give --data to train, --eval-data to evaluate."
        )
    if not options.state_dir.is_dir():
        raise not_joined(options.state_dir)
    state = StateFolder(options.state_dir)
    identity = state.identity()
    if identity is None:
        raise not_joined(options.state_dir)
    model = resolve_model(options.model)
    training_rows, evaluation_rows = rows_of(options.data), rows_of(options.evaluation_data)
    fingerprint = fingerprint_of(fingerprint_folder(model, state.fingerprint_cache))
    rank = identity.rank if options.rank is None else min(options.rank, identity.rank)
    return Session(
        state=state,
        identity=identity,
        options=SessionOptions(
            profile=profile(
                rank=rank,
                fingerprint=fingerprint,
                training_rows=training_rows,
                evaluation_rows=evaluation_rows,
                run_name=options.run_name,
            ),
            local=LocalWork(
                model=model, fingerprint=fingerprint, data=options.data, evaluation_data=options.evaluation_data
            ),
            trainer=TrainerOptions(
                log=state.log_path, threads=options.threads, fit=options.fit, quantization=options.quantization
            ),
            once=options.once,
        ),
        view=view,
        stop=stop,
    )
