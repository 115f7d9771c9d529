"""One transaction with all repositories."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection

from glora_server.storage.recent_rounds import RecentRounds
from glora_server.storage.repositories.devices import DeviceRepository, TokenRepository
from glora_server.storage.repositories.history import AnswerRepository, HistoryRepository
from glora_server.storage.repositories.journal import AuditRepository, OutboxRepository
from glora_server.storage.repositories.people import ApiTokenRepository, SessionRepository, UserRepository
from glora_server.storage.repositories.reading import ListsRepository
from glora_server.storage.repositories.rounds import RoundRepository
from glora_server.storage.repositories.rows import Session
from glora_server.storage.repositories.runs import RunRepository
from glora_server.storage.repositories.uploads import MeasurementRepository, UploadRepository
from glora_server.storage.repositories.versions import VersionRepository


class SqlUnitOfWork:
    """The repositories over one connection; `locks` when rows that are loaded may be changed afterwards."""

    def __init__(self, connection: Connection, *, locks: bool, now: Callable[[], float], recent: RecentRounds) -> None:
        session = Session(connection, locks, now)
        self.connection = connection
        self.devices = DeviceRepository(session)
        self.tokens = TokenRepository(session)
        self.runs = RunRepository(session)
        self.rounds = RoundRepository(session, recent)
        self.uploads = UploadRepository(session)
        self.versions = VersionRepository(session)
        self.measurements = MeasurementRepository(session)
        self.audit = AuditRepository(session)
        self.users = UserRepository(session)
        self.sessions = SessionRepository(session)
        self.api_tokens = ApiTokenRepository(session)
        self.outbox = OutboxRepository(session)
        self.lists = ListsRepository(session)
        self.history = HistoryRepository(session)
        self.answers = AnswerRepository(session)
