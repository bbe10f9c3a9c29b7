"""The run folder: journal of calls, records, quarantine, manifest, lock."""

from cai.store.database import Call, Claim, Database, Quarantined, RoleUsage
from cai.store.folder import Mode, RunFolder, content_hash, would_lose, write_whole

__all__ = [
    "Call",
    "Claim",
    "Database",
    "Mode",
    "Quarantined",
    "RoleUsage",
    "RunFolder",
    "content_hash",
    "would_lose",
    "write_whole",
]
