"""The run folder: journal of calls, records, quarantine, manifest, lock."""

from cai.store.database import Call, Database, Quarantined, RoleUsage
from cai.store.folder import Mode, RunFolder, holds_run

__all__ = ["Call", "Database", "Mode", "Quarantined", "RoleUsage", "RunFolder", "holds_run"]
